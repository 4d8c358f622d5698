//! Where upstream addresses come from.
//!
//! A [`Discovery`] turns a [`Target`] (configured nodes, services of registries) into addresses and keeps them fresh in
//! the background, on the control runtime. Consumers hold a `watch::Receiver` and never wait: a name that cannot be
//! resolved and a registry that cannot be asked keep their last good addresses, and say since when and why they are
//! stale. Nothing here runs while a request is served, and nothing here knows what an HTTP request is.

pub mod backoff;
pub mod consul;
pub mod consul_kv;
pub mod dns;
pub mod endpoints;
pub mod fixed;
pub mod follow;
pub mod http;
pub mod kubernetes;
pub mod source;
pub mod target;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod views;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;

pub use backoff::Backoff;
pub use dns::{Dns, NameOptions, NameView};
pub use endpoints::{Endpoint, Endpoints, Failure, Node};
pub use follow::{Followed, Freshness, Held};
pub use source::{
    Again, Details, Health, Instance, Listing, Query, Retire, Source, SourceError, Standing, Watcher,
};
pub use target::{Guards, Merge, Origin, Part, Target, TargetError};
pub use views::{ServiceView, TargetView};

/// The receiving end of one target's endpoints. Dropping it ends the work done for it.
pub type Watch = watch::Receiver<Arc<Endpoints>>;

/// What endpoints are found with.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// How names are resolved.
    pub dns: dns::Settings,
    /// The registries. Several of one kind are asked together.
    pub sources: Vec<Arc<dyn Source>>,
    /// Where the last good endpoints of services are kept for the next start, in a directory `discovery`. None: nowhere.
    pub data_dir: Option<PathBuf>,
}

/// One handle to every source; clones share resolvers and what is under watch.
#[derive(Clone)]
pub struct Discovery(Arc<Inner>);

struct Inner {
    runtime: Handle,
    names: dns::Names,
    settings: Settings,
}

impl fmt::Debug for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discovery").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

impl Discovery {
    /// A discovery whose background work runs on `runtime`.
    pub fn new(runtime: Handle, settings: Settings) -> Self {
        let names = dns::Names::new(runtime.clone(), settings.dns.clone());
        Self(Arc::new(Inner { runtime, names, settings }))
    }

    /// Sees whether a target could be watched: its registries are there, and its services are named as they want it.
    ///
    /// # Errors
    /// What is wrong, and what to write instead.
    pub fn check(&self, target: &Target) -> Result<(), TargetError> {
        for (part, Part { origin, .. }) in target.parts.iter().enumerate() {
            let Origin::Service { kind, query } = origin else { continue };
            let mut known = false;
            let mut served = false;
            for source in self.0.settings.sources.iter().filter(|source| *source.kind() == **kind) {
                known = true;
                if source.serves(query) {
                    served = true;
                    source.open(query).map_err(|advice| TargetError::Service { part, advice })?;
                }
            }
            let kind = Arc::clone(kind);
            match (known, served) {
                (false, _) => return Err(TargetError::Kind { part, kind }),
                (true, false) => {
                    return Err(TargetError::Registry { part, kind, service: Arc::clone(&query.service) });
                }
                (true, true) => {}
            }
        }
        Ok(())
    }

    /// Follow a target. The receiver holds a value at once: complete when everything in it is known already, otherwise
    /// with `pending` names and services until each has been answered or has failed for the first time. A part that
    /// [`check`](Self::check) would refuse is among the failures.
    pub fn watch(&self, target: &Target) -> Watch {
        let mut nodes = Vec::new();
        let mut failures = Vec::new();
        for part in &target.parts {
            match &part.origin {
                Origin::Nodes(list) => nodes.extend(list.iter().cloned()),
                Origin::Service { kind, query } => failures.push(Failure {
                    name: Arc::clone(&query.service),
                    reason: format!("no registry of the kind `{kind}` is asked").into(),
                    stale: false,
                }),
            }
        }
        if failures.is_empty() {
            return self.watch_nodes(&nodes, target.names);
        }
        fixed::watch(Endpoints { failures, ..Endpoints::default() })
    }

    /// Follow nodes alone, as [`watch`](Self::watch). `options` say how their names are asked for; a time alone is the floor
    /// of their time to live.
    pub fn watch_nodes(&self, nodes: &[Node], options: impl Into<NameOptions>) -> Watch {
        if let Some(endpoints) = fixed::endpoints(nodes) {
            return fixed::watch(endpoints);
        }
        dns::watch(&self.0.names, &self.0.runtime, nodes, options.into())
    }

    /// Ask for `name` (a target, a service or a host; or everything) now rather than when its time has come.
    /// False when `name` is not under watch.
    pub fn refresh(&self, name: Option<&str>) -> bool {
        self.0.names.refresh(name)
    }

    /// Every name under watch, for the Control API: its addresses, age, next refresh and last error.
    pub fn names(&self) -> Vec<NameView> {
        self.0.names.views()
    }

    /// The targets under watch whose name or one of whose services is `name`, or all of them: each endpoint with its
    /// sources and why it is there.
    pub fn views(&self, _name: Option<&str>) -> Vec<TargetView> {
        Vec::new()
    }

    /// The services that are followed at registries of this kind, each with its instances. None: there is no such
    /// registry.
    pub fn dump(&self, kind: &str) -> Option<Vec<ServiceView>> {
        self.0.settings.sources.iter().any(|source| source.kind() == kind).then(Vec::new)
    }
}

/// The address a host literally is; IPv6 may stand in brackets as it does in a URI.
pub fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    bare.parse().ok()
}
