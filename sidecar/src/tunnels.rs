//! Tunnels to the application (HBONE): who may have one, and where it leads. Their bytes are asked about as those of a
//! connection, and are ended as those are.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use certs::trust::Fingerprint;
use layers::local::LocalBox;
use layers::transport::hbone::receiver::{Gate, Guest, Leave, ReceiveError, Receiver};
use layers::transport::tcp::Traffic;
use layers::worker::io::Socket;
use layers::worker::{Arrival, Doorman, Met};

use crate::connections::{Begun, Direction, Tracked};
use crate::door::Entrance;
use crate::inbound::{self, Shown};
use crate::live::Admission;

/// Meets connections of tunnels.
pub struct Tunnels {
    /// Takes them.
    pub hbone: Arc<Receiver>,
    /// What connections to the application are taken with.
    pub receiver: Arc<inbound::Receiver>,
}

impl Doorman for Tunnels {
    fn meet(self: Arc<Self>, socket: Socket, arrival: Arrival) -> LocalBox<'static, Met> {
        Box::pin(async move {
            // Hands are shaken in a time of its own.
            let _counted = arrival.opaque();
            let (peer, draining) = (arrival.ends.source, arrival.draining());
            let gate = Door { receiver: self.receiver.clone(), arrival };
            let Err(error) = self.hbone.clone().serve(socket, gate, draining).await else { return Met::Over };
            tracing::info!(%peer, %error, "connection of tunnels ended");
            match error {
                ReceiveError::Server(_) => Met::Over,
                ReceiveError::Handshake(_)
                | ReceiveError::Slow
                | ReceiveError::Protocol
                | ReceiveError::Peer(_) => Met::Failed,
            }
        })
    }
}

/// The gate for the tunnels of one connection.
struct Door {
    receiver: Arc<inbound::Receiver>,
    arrival: Arrival,
}

impl Gate for Door {
    fn admit(&self, guest: &Guest, target: SocketAddr) -> Option<Rc<dyn Leave>> {
        let receiver = &self.receiver;
        let snapshot = receiver.snapshot.load();
        let port = snapshot.port(Entrance::Captured { to: target, client: None }).ok()?;
        let tracked = receiver.connections.begin(Begun {
            direction: Direction::Inbound,
            peer: self.arrival.ends.source,
            local: self.arrival.ends.destination,
            port: port.forward.port(),
        });
        tracked.goes_to(&snapshot.workload);
        tracked.speaks("hbone");
        tracked.shows(guest.peer.clone());
        let shown = Shown {
            peer: Some(guest.peer.clone()),
            authorities: guest.chain.iter().skip(1).map(|above| Fingerprint::of(above)).collect(),
            connected: Some(Arc::new(receiver.identity.connected())),
        };
        match receiver.admit(&self.arrival, shown, port.forward.port(), true) {
            Ok(admission) => {
                admission.carries_bytes();
                tracked.leads_to(port.forward);
                Some(Rc::new(Granted { tracked, admission, application: port.forward, idle: snapshot.idle }))
            }
            Err(error) => {
                tracked.ends(error.reason().code());
                None
            }
        }
    }
}

/// One tunnel.
struct Granted {
    tracked: Tracked,
    admission: Admission,
    application: SocketAddr,
    idle: Duration,
}

impl Leave for Granted {
    fn application(&self) -> SocketAddr {
        self.application
    }

    fn idle(&self) -> Duration {
        self.idle
    }

    fn traffic(&self) -> &Arc<Traffic> {
        &self.tracked.traffic
    }

    fn revoked(&self) -> LocalBox<'static, &'static str> {
        Box::pin(self.admission.revoked())
    }

    fn over(&self, why: &'static str) {
        self.tracked.ends(why);
    }
}
