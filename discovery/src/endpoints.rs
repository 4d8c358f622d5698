//! What discovery publishes: the configured nodes on one side, reachable addresses on the other.
//!
//! A node that is a name may stand for several addresses. They share the node's weight, so that adding an
//! address behind a name never changes how traffic is split between the nodes of an upstream.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::source::{Details, Health};

/// One configured node of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// An address or a name, as configured.
    pub host: Arc<str>,
    pub port: u16,
    /// Share of traffic among nodes of the same priority; 0 takes the node out of rotation.
    pub weight: u32,
    /// Nodes of a lower priority are used only when no higher one is left.
    pub priority: i32,
}

/// One address to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub addr: SocketAddr,
    /// The host of the node this address came from: the name for `pass_host: node` and for TLS.
    pub host: Arc<str>,
    /// The weight of the whole node.
    pub weight: u32,
    /// How many addresses share `weight`; at least 1.
    pub siblings: u32,
    pub priority: i32,
    /// What its registries think of it. A configured node is healthy.
    pub health: Health,
    /// What its registries know of it besides the address.
    pub details: Option<Arc<Details>>,
}

/// A name that could not be resolved at its last attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub name: Arc<str>,
    /// The resolver's own words.
    pub reason: Arc<str>,
    /// Addresses from an earlier answer are still in use.
    pub stale: bool,
}

/// The addresses of one target at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    pub list: Vec<Endpoint>,
    /// Names that were neither answered nor refused yet. 0 means the first resolution is over.
    pub pending: usize,
    pub failures: Vec<Failure>,
    /// Some registry has not been heard for longer than the target allows.
    pub degraded: bool,
    /// To be signed by whoever picks from the list.
    pub receipt: Receipt,
}

/// Tells discovery that endpoints are in use, in place of those that were published before. All receipts are equal: which
/// one it is does not make other endpoints.
#[derive(Clone, Debug, Default)]
pub struct Receipt(Arc<AtomicBool>);

impl Receipt {
    /// From now on nobody begins to pick from the endpoints of before.
    pub fn sign(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub(crate) fn is_signed(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl PartialEq for Receipt {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Receipt {}

impl Endpoints {
    /// Every name was answered or failed at least once.
    pub fn settled(&self) -> bool {
        self.pending == 0
    }
}
