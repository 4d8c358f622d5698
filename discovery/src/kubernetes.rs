//! Kubernetes: the endpoints of services, listed and watched at the API server.
//!
//! A source is one cluster. Its EndpointSlices and Services are read once for all services that are followed, by two feeds
//! that live as long as somebody follows a service, into one store; a watcher waits for changes of its service there. A
//! service is `[id/]namespace/name[:port]`; the port is a name or a number, of the service or of its endpoints, and may be
//! left out where there is one only.
//!
//! Endpoints that are ready are healthy. Those that end and still serve are drained, and usable again when no other is
//! left, as kube-proxy has it. What is not ready is not listed.

mod api;
mod feed;
mod listing;
mod name;
mod objects;
mod store;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use config::discovery::kubernetes::{Cluster, Kubernetes};
use futures_util::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use self::api::Api;
use self::feed::{Selection, Shared, Timing};
use self::listing::Wanted;
use self::name::Name;
use self::store::{Follower, Status, Store};
use crate::source::{Again, Listing, Query, Source, SourceError, Standing, Watcher};

/// A source for each cluster of the settings, in their order; `env` gives variables of the environment.
///
/// # Errors
/// The index of a cluster, and what is wrong with it: a variable is not set, an address is none.
pub fn sources(
    settings: &Kubernetes,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Arc<dyn Source>>, (usize, String)> {
    let mut sources: Vec<Arc<dyn Source>> = Vec::with_capacity(settings.clusters.len());
    for (index, cluster) in settings.clusters.iter().enumerate() {
        let source = ClusterSource::new(cluster, &env).map_err(|problem| (index, problem))?;
        sources.push(Arc::new(source));
    }
    Ok(sources)
}

/// One cluster.
#[derive(Debug)]
pub struct ClusterSource {
    /// Empty where there is only one.
    id: Arc<str>,
    weight: u32,
    slices: Option<bool>,
    timing: Timing,
    api: Arc<Api>,
    selection: Arc<Selection>,
    running: Arc<Mutex<Weak<Running>>>,
}

impl ClusterSource {
    /// Nothing is asked yet.
    ///
    /// # Errors
    /// What is wrong with the settings and the environment.
    pub fn new(cluster: &Cluster, env: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        Ok(Self {
            id: cluster.id.as_deref().unwrap_or_default().into(),
            weight: cluster.default_weight,
            slices: cluster.watch_endpoint_slices,
            timing: Timing::new(cluster),
            api: Arc::new(Api::new(cluster, env)?),
            selection: Arc::new(Selection::new(cluster)?),
            running: Arc::default(),
        })
    }
}

impl Source for ClusterSource {
    fn kind(&self) -> &'static str {
        "kubernetes"
    }

    fn name(&self) -> &str {
        &self.id
    }

    fn serves(&self, query: &Query) -> bool {
        match Name::parse(&query.service) {
            Ok((id, _)) => id.unwrap_or_default() == &*self.id,
            // It is told when it is opened.
            Err(_) => true,
        }
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        let (id, name) = Name::parse(&query.service)?;
        if id.unwrap_or_default() != &*self.id {
            return Err(format!("`{}` is a service of another cluster than `{}`", query.service, self.id));
        }
        let namespace = &name.service.namespace;
        if !self.selection.admits(namespace) {
            return Err(format!("the namespace `{namespace}` is left out by `namespace_selector`"));
        }
        let wanted = Wanted::new(name, query, self.weight)?;
        Ok(Box::new(ServiceWatcher { feeds: self.feeds(), wanted, attached: None }))
    }
}

impl ClusterSource {
    fn feeds(&self) -> Feeds {
        Feeds {
            id: Arc::clone(&self.id),
            slices: self.slices,
            timing: self.timing,
            api: Arc::clone(&self.api),
            selection: Arc::clone(&self.selection),
            running: Arc::clone(&self.running),
        }
    }
}

/// What the feeds of a cluster are made from, and those that run.
struct Feeds {
    id: Arc<str>,
    slices: Option<bool>,
    timing: Timing,
    api: Arc<Api>,
    selection: Arc<Selection>,
    running: Arc<Mutex<Weak<Running>>>,
}

/// The feeds of a cluster; they end when nobody follows a service any more.
#[derive(Debug)]
struct Running {
    shared: Arc<Shared>,
    tasks: [AbortHandle; 2],
}

impl Feeds {
    /// Those that run, or new ones on the runtime of the caller.
    fn run(&self) -> Arc<Running> {
        let mut current = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = current.upgrade() {
            return running;
        }
        let shared = Arc::new(Shared {
            api: Arc::clone(&self.api),
            selection: Arc::clone(&self.selection),
            store: Store::new(),
            timing: self.timing,
            slices: self.slices,
            wanted: AtomicU64::new(0),
            asked: Notify::new(),
            id: Arc::clone(&self.id),
        });
        let tasks = [
            tokio::spawn(feed::slices(Arc::clone(&shared))).abort_handle(),
            tokio::spawn(feed::services(Arc::clone(&shared))).abort_handle(),
        ];
        let running = Arc::new(Running { shared, tasks });
        *current = Arc::downgrade(&running);
        running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        self.shared.api.forget();
    }
}

/// Follows one service.
struct ServiceWatcher {
    feeds: Feeds,
    wanted: Wanted,
    attached: Option<Attached>,
}

/// What a watcher knows of the store that it looks into.
struct Attached {
    running: Arc<Running>,
    status: watch::Receiver<Status>,
    follower: Follower,
    /// The list that has to be there before anything is said.
    list: u64,
    /// The failure that was told last.
    told: u64,
    /// Nothing was said since the start, the last failure or the last restart.
    silent: bool,
    /// What was heard when it was said last.
    heard: u64,
    losses: u64,
}

impl Attached {
    fn new(feeds: &Feeds, wanted: &Wanted) -> Self {
        let running = feeds.run();
        let store = &running.shared.store;
        let (status, follower) = (store.status(), store.follow(&wanted.name.service));
        let losses = status.borrow().losses;
        Self { running, status, follower, list: 1, told: 0, silent: true, heard: 0, losses }
    }

    /// What there is to say, if there is something.
    fn news(&mut self, wanted: &mut Wanted) -> Option<Result<Listing, SourceError>> {
        let status = self.status.borrow_and_update().clone();
        let complete = status.listed >= self.list;
        if let Some(error) = status.failing
            // Who asks for the first time gets what is known, and then that it is old.
            && (!complete || !self.silent || self.told > 0)
        {
            if status.failures == self.told {
                return None;
            }
            self.told = status.failures;
            self.silent = true;
            return Some(Err(error));
        }
        if !complete || !(self.silent || self.follower.changed.has_changed().unwrap_or(true)) {
            return None;
        }
        self.follower.changed.mark_unchanged();
        self.silent = false;
        let store = &self.running.shared.store;
        self.heard = store.heard();
        let standing = match status.losses == std::mem::replace(&mut self.losses, status.losses) {
            true => Standing::Continued,
            false => Standing::Restarted,
        };
        let instances = wanted.instances(&store.service(&wanted.name.service));
        Some(instances.map(|instances| Listing { instances, standing, again: Again::Now }))
    }
}

/// How often a list is said again that has not changed, while the API server is heard: it is confirmed by that.
const CONFIRM: std::time::Duration = std::time::Duration::from_secs(30);

impl Watcher for ServiceWatcher {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(async move {
            let attached = self.attached.get_or_insert_with(|| Attached::new(&self.feeds, &self.wanted));
            loop {
                if let Some(news) = attached.news(&mut self.wanted) {
                    return news;
                }
                tokio::select! {
                    Ok(()) = attached.status.changed() => {}
                    Ok(()) = attached.follower.changed.changed() => attached.follower.changed.mark_changed(),
                    () = tokio::time::sleep(CONFIRM) => {
                        let heard = attached.running.shared.store.heard();
                        attached.silent |= heard != attached.heard && attached.status.borrow().failing.is_none();
                    }
                }
            }
        })
    }

    fn restart(&mut self) {
        if let Some(attached) = &mut self.attached {
            attached.list = attached.running.shared.ask();
            attached.told = attached.status.borrow().failures;
            attached.silent = true;
        }
    }
}
