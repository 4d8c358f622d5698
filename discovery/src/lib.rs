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
pub mod eureka;
pub mod file;
pub mod fixed;
pub mod follow;
mod guard;
pub mod http;
mod in_use;
pub mod kubernetes;
mod merge;
pub mod nacos;
pub mod notice;
pub mod own_drain;
mod poll;
pub mod probe;
pub mod registries;
pub mod retire;
pub mod rpc;
#[cfg(test)]
mod simulation;
mod snapshot;
pub mod source;
pub mod target;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod views;
mod watched;

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;

pub use backoff::Backoff;
pub use dns::{Dns, NameOptions, NameView};
pub use endpoints::{Endpoint, Endpoints, Failure, Node, Receipt};
pub use follow::{Followed, Freshness, Held};
pub use in_use::WeakDiscovery;
pub use own_drain::OwnDrain;
pub use retire::Retired;
pub use source::{
    Again, Details, Health, Instance, Listing, Query, Retire, Source, SourceError, Standing, Watcher,
};
pub use target::{Guards, Merge, Origin, Part, Target, TargetError};
pub use views::{ServiceView, TargetView};

use follow::{Follow, Followers, Service};
use probe::{Probe, TcpProbe};
use snapshot::Snapshots;
use watched::{Supply, Watched, Work};

/// The receiving end of one target's endpoints. Dropping it ends the work done for it.
pub type Watch = watch::Receiver<Arc<Endpoints>>;

/// What endpoints are found with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How names are resolved.
    pub dns: dns::Settings,
    /// The registries. Several of one kind are asked together.
    pub sources: Vec<Arc<dyn Source>>,
    /// Where the last good endpoints of services are kept for the next start, in a directory `discovery`. None: nowhere.
    pub data_dir: Option<PathBuf>,
    /// How far apart the answers of a registry about one service are at least, after a burst of five.
    pub interval: Duration,
    /// How it is found out whether an endpoint still answers that its registry has forgotten.
    pub probe: Arc<dyn Probe>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            dns: dns::Settings::default(),
            sources: Vec::new(),
            data_dir: None,
            interval: Duration::from_secs(1),
            probe: Arc::new(TcpProbe::default()),
        }
    }
}

/// One handle to every source; clones share resolvers and what is under watch.
#[derive(Clone)]
pub struct Discovery(Arc<Inner>);

struct Inner {
    runtime: Handle,
    names: dns::Names,
    settings: Settings,
    followers: Arc<Followers>,
    targets: Mutex<HashMap<u64, Arc<Watched>>>,
    next: AtomicU64,
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
        let snapshots = settings.data_dir.as_ref().map(|dir| Arc::new(Snapshots::new(runtime.clone(), dir)));
        let followers = Arc::new(Followers::new(runtime.clone(), &settings, snapshots));
        let (targets, next) = (Mutex::default(), AtomicU64::new(0));
        Self(Arc::new(Inner { runtime, names, settings, followers, targets, next }))
    }

    /// Sees whether a target could be watched: its registries are there, and its services are named as they want it.
    ///
    /// # Errors
    /// What is wrong, and what to write instead.
    pub fn check(&self, target: &Target) -> Result<(), TargetError> {
        for (part, Part { origin, .. }) in target.parts.iter().enumerate() {
            if let Origin::Service { kind, query } = origin {
                self.check_part(part, kind, query)?;
            }
        }
        Ok(())
    }

    fn check_part(&self, part: usize, kind: &Arc<str>, query: &Query) -> Result<(), TargetError> {
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
            (false, _) => Err(TargetError::Kind { part, kind }),
            (true, false) => Err(TargetError::Registry { part, kind, service: Arc::clone(&query.service) }),
            (true, true) => Ok(()),
        }
    }

    /// Follow a target. The receiver holds a value at once: complete when everything in it is known already, otherwise
    /// with `pending` names and services until each has been answered or has failed for the first time. A part that
    /// [`check`](Self::check) would refuse is among the failures.
    pub fn watch(&self, target: &Target) -> Watch {
        if let [Part { origin: Origin::Nodes(nodes), .. }] = &*target.parts {
            return self.watch_nodes(nodes, target.names);
        }
        let supply = |(part, of): (usize, &Part)| match &of.origin {
            Origin::Nodes(nodes) => Supply::Nodes(nodes.clone()),
            Origin::Service { kind, query } => match self.check_part(part, kind, query) {
                Ok(()) => Supply::Services(self.0.followers.follow(kind, query, target.guards.empty_confirm)),
                Err(error) => Supply::Refused(Failure {
                    name: format!("{kind}/{}", query.service).into(),
                    reason: error.to_string().into(),
                    stale: false,
                }),
            },
        };
        let supplies = target.parts.iter().enumerate().map(supply).collect();
        let probe = Arc::clone(&self.0.settings.probe);
        let (work, watched, watch) = Work::new(target.clone(), supplies, self.0.names.clone(), probe);
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.0.targets).insert(id, watched);
        let inner = Arc::downgrade(&self.0);
        self.0.runtime.spawn(async move {
            work.run().await;
            if let Some(inner) = inner.upgrade() {
                lock(&inner.targets).remove(&id);
            }
        });
        watch
    }

    /// Follow a service at every registry of its kind that serves it, as these list it.
    pub(crate) fn follow(&self, kind: &str, query: &Query, empty_confirm: Duration) -> Vec<Follow> {
        self.0.followers.follow(kind, query, empty_confirm)
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
        let mut services: Vec<Arc<Service>> = Vec::new();
        match name {
            None => services = self.0.followers.services(),
            Some(name) => {
                for watched in self.targets().iter().filter(|watched| watched.is_called(name)) {
                    services.extend(watched.services().cloned());
                }
            }
        }
        services.iter().for_each(|service| service.refresh());
        self.0.names.refresh(name) || !services.is_empty()
    }

    /// Every name under watch, for the Control API: its addresses, age, next refresh and last error.
    pub fn names(&self) -> Vec<NameView> {
        self.0.names.views()
    }

    fn sources(&self) -> &[Arc<dyn Source>] {
        &self.0.settings.sources
    }

    fn followed(&self) -> Vec<Arc<Service>> {
        self.0.followers.services()
    }

    fn source_of(&self, service: &Service) -> Option<Arc<dyn Source>> {
        let is_it = |source: &&Arc<dyn Source>| {
            *source.kind() == *service.kind && *source.name() == *service.registry
        };
        self.0.settings.sources.iter().find(is_it).cloned()
    }

    fn targets(&self) -> Vec<Arc<Watched>> {
        lock(&self.0.targets).values().cloned().collect()
    }

    /// The targets under watch whose name or one of whose services is `name`, or all of them: each endpoint with its
    /// sources and why it is there. Targets of nodes alone are not among them: nothing is done for most of these.
    pub fn views(&self, name: Option<&str>) -> Vec<TargetView> {
        let targets = self.targets();
        let wanted = targets.iter().filter(|watched| name.is_none_or(|name| watched.is_called(name)));
        let mut views: Vec<TargetView> = wanted.map(|watched| watched.view()).collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    /// The services that are followed at registries of this kind, each with its instances. None: there is no such
    /// registry.
    pub fn dump(&self, kind: &str) -> Option<Vec<ServiceView>> {
        let known = self.0.settings.sources.iter().any(|source| source.kind() == kind);
        let services = || self.0.followers.services().into_iter().filter(|service| *service.kind == *kind);
        known.then(|| services().map(|service| service.view(true)).collect())
    }

    /// Every service that is followed, without its instances and history: what metrics are made of.
    pub fn services(&self) -> Vec<ServiceView> {
        self.0.followers.services().iter().map(|service| service.view(false)).collect()
    }

    /// How often more was taken away at once than a target allows, by target.
    pub fn alarms(&self) -> Vec<(Arc<str>, u64)> {
        let mut alarms: Vec<_> = self
            .targets()
            .iter()
            .map(|watched| (Arc::clone(&watched.target.name), watched.alarms()))
            .collect();
        alarms.sort();
        alarms
    }
}

/// Nothing that can panic runs under these locks, so what a poisoned one guards is sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address a host literally is; IPv6 may stand in brackets as it does in a URI.
pub fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    bare.parse().ok()
}
