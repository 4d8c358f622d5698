//! The connections that are open, for whoever looks on and for whoever has to end some of them.
//!
//! A worker touches this twice a connection, when it begins and when it ends; bytes are counted in atomics of its own. One
//! that did not turn out to be HTTP, whose requests are logged, is logged when it ends, and so is one that was refused.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use certs::trust::Peer;
use hashbrown::HashMap;
use layers::transport::tcp::Traffic;
use layers::upstream::opaque::OpaqueStream;
use layers::worker::deadlines::{Ended, Watch};
use serde_json::{Value, json};

use crate::connection_log::ConnectionLog;

/// What connections speak whose requests are logged.
pub const HTTP: &str = "http";

/// Which way a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the workload.
    Inbound,
    /// From the workload.
    Outbound,
}

impl Direction {
    /// As it is written in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// One open connection.
#[derive(Debug)]
pub struct Connection {
    /// Unique in the process.
    pub id: u64,
    /// Which way it goes.
    pub direction: Direction,
    /// The other end.
    pub peer: SocketAddr,
    /// Where it was accepted.
    pub local: SocketAddr,
    /// The port of the workload, or of the destination where it is known; 0 where it is not.
    pub port: u16,
    /// When it began.
    pub since: SystemTime,
    /// Bytes, where nobody understands them.
    pub traffic: Arc<Traffic>,
    identity: OnceLock<Arc<Peer>>,
    protocol: OnceLock<&'static str>,
    service: OnceLock<Arc<str>>,
    upstream: OnceLock<SocketAddr>,
    reason: OnceLock<&'static str>,
    watch: Mutex<Option<Arc<Watch>>>,
}

impl Connection {
    /// Who the other party is, where it is of the mesh.
    pub fn identity(&self) -> Option<&Arc<Peer>> {
        self.identity.get()
    }

    /// Where its bytes go, where nobody understands them.
    pub fn upstream(&self) -> Option<SocketAddr> {
        self.upstream.get().copied()
    }

    /// Why it ended.
    pub fn reason(&self) -> Option<&'static str> {
        self.reason.get().copied()
    }

    /// What is spoken on it, once that is known.
    pub fn protocol(&self) -> Option<&'static str> {
        self.protocol.get().copied()
    }

    /// The service that it goes to, where it is one.
    pub fn service(&self) -> Option<&Arc<str>> {
        self.service.get()
    }

    /// The other party is this one.
    pub fn shows(&self, peer: Arc<Peer>) {
        let _ = self.identity.set(peer);
    }

    /// Its bytes go there, and who has answered is the other party of one that goes out.
    pub fn reaches(&self, upstream: &OpaqueStream) {
        self.leads_to(upstream.address());
        if let Some(peer) = upstream.identity().filter(|_| self.direction == Direction::Outbound) {
            self.shows(Arc::new(peer));
        }
    }

    /// Its bytes go to this address.
    pub fn leads_to(&self, address: SocketAddr) {
        let _ = self.upstream.set(address);
    }

    /// It ends, for this reason; the first one counts.
    pub fn ends(&self, reason: &'static str) {
        let _ = self.reason.set(reason);
    }

    /// It turned out to speak this.
    pub fn speaks(&self, protocol: &'static str) {
        let _ = self.protocol.set(protocol);
    }

    /// It goes to this service.
    pub fn goes_to(&self, service: &Arc<str>) {
        let _ = self.service.set(service.clone());
    }

    /// From now on it is ended by this.
    pub fn watched(&self, watch: &Arc<Watch>) {
        *lock(&self.watch) = Some(watch.clone());
    }

    /// Ends it.
    pub fn end(&self, cause: Ended) {
        if let Some(watch) = &*lock(&self.watch) {
            watch.end(cause);
        }
    }

    fn told(&self) -> Value {
        json!({
            "id": self.id,
            "direction": self.direction.as_str(),
            "peer": self.peer.to_string(),
            "local": self.local.to_string(),
            "port": self.port,
            "identity": self.identity().map(|peer| peer.id.as_str()),
            "certificate_ends": self.identity().map(|peer| seconds(peer.not_after)),
            "protocol": self.protocol(),
            "service": self.service().map(|service| &**service),
            "since": seconds(self.since),
            "received": self.traffic.received(),
            "sent": self.traffic.sent(),
        })
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All open connections. Clones are the same.
#[derive(Clone, Default)]
pub struct Connections(Arc<Open>);

#[derive(Default)]
struct Open {
    log: Option<ConnectionLog>,
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Connection>>>,
}

/// What is known of a connection when it begins.
pub struct Begun {
    /// Which way it goes.
    pub direction: Direction,
    /// The other end.
    pub peer: SocketAddr,
    /// Where it was accepted.
    pub local: SocketAddr,
    /// The port of the workload or the destination.
    pub port: u16,
}

impl Connections {
    /// None yet; those of bytes go to `log` when they end.
    pub fn new(log: Option<ConnectionLog>) -> Self {
        Self(Arc::new(Open { log, ..Open::default() }))
    }

    /// A connection begins. It is there until the second value is dropped.
    pub fn begin(&self, begun: Begun) -> Tracked {
        let Begun { direction, peer, local, port } = begun;
        let connection = Arc::new(Connection {
            id: self.0.next.fetch_add(1, Ordering::Relaxed),
            direction,
            peer,
            local,
            port,
            since: SystemTime::now(),
            traffic: Arc::default(),
            identity: OnceLock::new(),
            protocol: OnceLock::new(),
            service: OnceLock::new(),
            upstream: OnceLock::new(),
            reason: OnceLock::new(),
            watch: Mutex::default(),
        });
        lock(&self.0.open).insert(connection.id, connection.clone());
        Tracked { connections: self.clone(), connection }
    }

    /// The open ones, oldest first.
    pub fn list(&self) -> Vec<Arc<Connection>> {
        let mut list: Vec<_> = lock(&self.0.open).values().cloned().collect();
        list.sort_by_key(|connection| connection.id);
        list
    }

    /// Ends those of which `forbidden` says so; how many these are.
    pub fn end_where(&self, forbidden: impl Fn(&Connection) -> bool) -> usize {
        let list = self.list();
        let ended = list.iter().filter(|connection| forbidden(connection));
        ended.inspect(|connection| connection.end(Ended::Forbidden)).count()
    }

    /// How many are open in this direction.
    pub fn count(&self, direction: Direction) -> usize {
        lock(&self.0.open).values().filter(|connection| connection.direction == direction).count()
    }

    /// For the admin interface.
    pub fn told(&self) -> Value {
        self.list().iter().map(|connection| connection.told()).collect()
    }
}

/// An open connection; dropped with it.
pub struct Tracked {
    connections: Connections,
    connection: Arc<Connection>,
}

impl std::ops::Deref for Tracked {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let open = &self.connections.0;
        lock(&open.open).remove(&self.connection.id);
        if let Some(log) = open.log.as_ref().filter(|_| self.connection.protocol() != Some(HTTP)) {
            log.write(&self.connection);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_there_while_it_is_open() {
        let connections = Connections::default();
        let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let begun = |direction| Begun { direction, peer: address, local: address, port: 80 };
        let first = connections.begin(begun(Direction::Inbound));
        let second = connections.begin(begun(Direction::Outbound));
        first.speaks("http/1");
        assert_eq!(connections.list().iter().map(|c| c.id).collect::<Vec<_>>(), [first.id, second.id]);
        assert_eq!(connections.count(Direction::Inbound), 1);
        assert_eq!(connections.end_where(|connection| connection.direction == Direction::Outbound), 1);
        drop(first);
        assert_eq!(connections.told().as_array().map(Vec::len), Some(1));
    }
}
