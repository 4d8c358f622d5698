//! Where upstream addresses come from.
//!
//! A [`Discovery`] turns the nodes of an upstream (host, port, weight, priority) into addresses and keeps
//! them fresh in the background, on the control runtime. Consumers hold a `watch::Receiver` and never wait:
//! a name that cannot be resolved keeps its last good addresses and says since when and why they are stale.
//! Nothing here runs while a request is served, and nothing here knows what an HTTP request is.

pub mod backoff;
pub mod dns;
pub mod endpoints;
pub mod fixed;
pub mod source;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;

pub use backoff::Backoff;
pub use dns::{NameView, Settings};
pub use endpoints::{Endpoint, Endpoints, Failure, Node};
pub use source::{
    Again, Details, Health, Instance, Listing, Query, Retire, Source, SourceError, Standing, Watcher,
};

/// The receiving end of one target's endpoints. Dropping it ends the work done for it.
pub type Watch = watch::Receiver<Arc<Endpoints>>;

/// One handle to every source; clones share resolvers and the names under watch.
#[derive(Clone, Debug)]
pub struct Discovery {
    names: dns::Names,
    runtime: Handle,
}

impl Discovery {
    /// A discovery whose background work runs on `runtime`.
    pub fn new(runtime: Handle, settings: Settings) -> Self {
        Self { names: dns::Names::new(runtime.clone(), settings), runtime }
    }

    /// Follow `nodes`. The receiver holds a value at once: complete when every host is an address,
    /// otherwise with `pending` names until each has been answered or has failed for the first time.
    /// `min_ttl` is a floor for these names in place of the one in the settings.
    pub fn watch(&self, nodes: &[Node], min_ttl: Option<Duration>) -> Watch {
        if let Some(endpoints) = fixed::endpoints(nodes) {
            return fixed::watch(endpoints);
        }
        dns::watch(&self.names, &self.runtime, nodes, min_ttl)
    }

    /// Resolve `name` (or every name) now rather than at the end of its time to live.
    /// False when `name` is not under watch.
    pub fn refresh(&self, name: Option<&str>) -> bool {
        self.names.refresh(name)
    }

    /// Every name under watch, for the Control API: its addresses, age, next refresh and last error.
    pub fn names(&self) -> Vec<NameView> {
        self.names.views()
    }
}

/// The address a host literally is; IPv6 may stand in brackets as it does in a URI.
pub fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    bare.parse().ok()
}
