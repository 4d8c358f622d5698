//! What the sidecar knows of a connection, from the moment it is accepted: which way it goes, and where to.

use std::borrow::Cow;
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
    /// To this address, before the kernel led it here. A request may ask for a service by its name.
    Captured(SocketAddr),
    /// Each request says for itself.
    Asked,
}

impl To {
    /// The address, where it is one.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Host(host, _) => discovery::literal(host),
            Self::Captured(address) => Some(address.ip()),
            Self::Service(_) | Self::Asked => None,
        }
    }

    /// Host and port, where it is known.
    pub fn host(&self) -> Option<(Cow<'_, str>, u16)> {
        match self {
            Self::Host(host, port) => Some((Cow::Borrowed(host), *port)),
            Self::Captured(address) => Some((Cow::Owned(address.ip().to_string()), address.port())),
            Self::Service(_) | Self::Asked => None,
        }
    }
}

/// How a connection to the workload has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// By the listener with this number in the snapshot.
    Listener(usize),
    /// It was going to an address of the workload.
    Captured {
        /// The address.
        to: SocketAddr,
        /// As whom the workload is connected, where it shall see who its client is.
        client: Option<IpAddr>,
    },
}

/// The way of a connection.
#[derive(Debug)]
pub enum Way {
    /// To a port of the workload; what a sidecar carries in it, if it is of the mesh.
    In(Entrance, Option<Carries>),
    /// From the workload.
    Out(To),
}

/// What the sidecar knows of a connection that carries requests.
pub struct SideDoor {
    /// Where it goes.
    pub way: Way,
    /// It is open as long as this is there.
    pub tracked: Rc<Tracked>,
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
