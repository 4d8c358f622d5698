//! What the sidecar knows of a connection, from the moment it is accepted: which way it goes, and where to.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use layers::exchange::{Conn, Door};
use layers::upstream::mesh::Carries;
use layers::worker::deadlines::Watch;

use crate::connections::Tracked;
use crate::live::{Admission, Live};

/// Where a connection of the workload goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// To this service, whatever is asked for.
    Service(Arc<str>),
    /// To this host and port: an address, or a name.
    Host(Arc<str>, u16),
    /// Each request says for itself.
    Asked,
}

impl To {
    /// An address.
    pub fn address(address: SocketAddr) -> Self {
        Self::Host(address.ip().to_canonical().to_string().into(), address.port())
    }

    /// The address, where it is one.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Host(host, _) => discovery::literal(host),
            _ => None,
        }
    }
}

/// The way of a connection.
#[derive(Debug)]
pub enum Way {
    /// To the port of the workload with this number in the snapshot; what a sidecar carries in it, if it is of the mesh.
    In(usize, Option<Carries>),
    /// From the workload.
    Out(To),
}

/// What the sidecar knows of a connection that carries requests.
pub struct SideDoor {
    /// Where it goes.
    pub way: Way,
    /// It is open as long as this is there.
    pub tracked: Tracked,
    /// Its leave to be there, on the way in.
    pub admission: Option<Admission>,
}

impl Door for SideDoor {
    fn watched(&self, watch: &Arc<Watch>) {
        self.tracked.watched(watch);
        if let Some(admission) = &self.admission {
            admission.watched(watch);
        }
    }
}

impl SideDoor {
    /// That of a connection.
    pub fn of(conn: &Conn) -> Option<&Self> {
        conn.door.as_ref()?.get()
    }

    /// The leave of a connection.
    pub fn admission(conn: &Conn) -> Option<&Admission> {
        Self::of(conn)?.admission.as_ref()
    }
}

/// The connections of one worker that may be forbidden, where its doormen find them.
pub struct OwnLive(pub Rc<Live>);
