//! Names resolved in the background, one task per name however many upstreams use it.
//!
//! A name keeps its last good addresses through anything a resolver can do to it (NXDOMAIN, SERVFAIL,
//! silence, an empty answer), is asked again with growing pauses, and recovers by itself. The time to live
//! has a floor, so a zero from the server is not a query per request. The system's resolver settings and
//! hosts file are read again when they change.

#[cfg(any(test, feature = "testing"))]
pub mod hostile;
mod lookup;
mod options;
mod resolver;
mod watcher;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{Either, select_all};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

pub use lookup::{Order, RecordKind};
pub use options::{NameOptions, Settings};
pub use watcher::Dns;

use crate::source::{Again, Health, Listing, SourceError};
use crate::{Backoff, Endpoint, Endpoints, Failure, Node, Watch, fixed, literal};

/// Addresses kept of one answer. More than any real service has, less than would hurt a picker.
const MAX_ADDRESSES: usize = 1024;
/// First and longest pause after a failed question.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// What is known about one name, for the Control API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameView {
    pub name: Arc<str>,
    pub addresses: Vec<IpAddr>,
    /// Time since the addresses were last confirmed; none before the first answer.
    pub age: Option<Duration>,
    /// Time until the next question.
    pub next: Duration,
    /// Why the last question failed and for how long questions have been failing.
    pub failure: Option<(Arc<str>, Duration)>,
}

/// The latest state of one name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) addrs: Arc<[IpAddr]>,
    pub(crate) answered: Option<Instant>,
    pub(crate) failure: Option<(Arc<str>, Instant)>,
    next: Option<Instant>,
}

impl Answer {
    pub(crate) fn pending(&self) -> bool {
        self.answered.is_none() && self.failure.is_none()
    }
}

/// A name and how it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct NameKey {
    name: Arc<str>,
    options: NameOptions,
}

#[derive(Debug)]
struct Entry {
    answer: watch::Sender<Answer>,
    refresh: Notify,
}

#[derive(Debug)]
struct Inner {
    runtime: Handle,
    dns: Dns,
    stale_limit: Option<Duration>,
    names: Mutex<HashMap<NameKey, Arc<Entry>>>,
}

/// The names under watch.
#[derive(Clone, Debug)]
pub(crate) struct Names(Arc<Inner>);

impl Names {
    pub(crate) fn new(runtime: Handle, settings: Settings) -> Self {
        let stale_limit = settings.stale_limit;
        let dns = Dns::nodes(settings);
        Self(Arc::new(Inner { runtime, dns, stale_limit, names: Mutex::new(HashMap::new()) }))
    }

    pub(crate) fn refresh(&self, name: Option<&str>) -> bool {
        let names = lock(&self.0.names);
        let wanted = |key: &NameKey| name.is_none_or(|name| name.eq_ignore_ascii_case(&key.name));
        let matching = names.iter().filter(|(key, _)| wanted(key));
        matching.map(|(_, entry)| entry.refresh.notify_one()).count() > 0
    }

    pub(crate) fn views(&self) -> Vec<NameView> {
        let now = Instant::now();
        let mut views: Vec<NameView> = lock(&self.0.names)
            .iter()
            .map(|(key, entry)| {
                let answer = entry.answer.borrow();
                NameView {
                    name: Arc::clone(&key.name),
                    addresses: answer.addrs.to_vec(),
                    age: answer.answered.map(|at| now.saturating_duration_since(at)),
                    next: answer.next.map_or(Duration::ZERO, |at| at.saturating_duration_since(now)),
                    failure: answer
                        .failure
                        .as_ref()
                        .map(|(why, since)| (Arc::clone(why), now.saturating_duration_since(*since))),
                }
            })
            .collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    /// The answers of `name`; the first subscriber starts its task, the last one to leave ends it.
    pub(crate) fn subscribe(&self, name: &str, options: NameOptions) -> watch::Receiver<Answer> {
        let key = NameKey { name: name.to_ascii_lowercase().into(), options };
        let mut names = lock(&self.0.names);
        if let Some(entry) = names.get(&key) {
            return entry.answer.subscribe();
        }
        let (answer, receiver) = watch::channel(Answer::default());
        let entry = Arc::new(Entry { answer, refresh: Notify::new() });
        names.insert(key.clone(), Arc::clone(&entry));
        self.0.runtime.spawn(self.clone().follow(key, entry));
        receiver
    }

    /// True when nobody listens any more; then the name is gone from the table.
    fn release(&self, key: &NameKey, entry: &Entry) -> bool {
        // Subscriptions happen under this lock, so none can slip in between the look and the removal.
        let mut names = lock(&self.0.names);
        let unused = entry.answer.receiver_count() == 0;
        if unused {
            names.remove(key);
        }
        unused
    }

    async fn follow(self, key: NameKey, entry: Arc<Entry>) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut watcher = self.0.dns.watch(Arc::clone(&key.name), None, &key.options);
        loop {
            let outcome = tokio::select! {
                biased;
                () = entry.answer.closed() => {
                    if self.release(&key, &entry) { return }
                    continue;
                }
                outcome = watcher.ask() => outcome,
            };
            let pause = match &outcome {
                Ok(listing) => {
                    backoff.reset();
                    match listing.again {
                        Again::After(pause) => pause,
                        Again::Now => Duration::ZERO,
                    }
                }
                Err(_) => backoff.pause(),
            };
            self.publish(&key.name, &entry, outcome, pause);
            tokio::select! {
                biased;
                () = entry.answer.closed() => if self.release(&key, &entry) { return },
                () = sleep(pause) => {}
                () = entry.refresh.notified() => {}
            }
        }
    }

    fn publish(&self, name: &str, entry: &Entry, outcome: Result<Listing, SourceError>, pause: Duration) {
        let now = Instant::now();
        entry.answer.send_if_modified(|answer| {
            answer.next = Some(now + pause);
            match outcome {
                Ok(listing) => {
                    let addrs = listing.instances.iter().filter_map(|instance| literal(&instance.node.host));
                    let addrs: Arc<[IpAddr]> = addrs.collect();
                    let changed = answer.answered.is_none() || answer.addrs != addrs;
                    let recovered = answer.failure.take();
                    if changed || recovered.is_some() {
                        tracing::debug!(name, addresses = addrs.len(), "name resolved");
                    }
                    answer.answered = Some(now);
                    answer.addrs = addrs;
                    changed || recovered.is_some()
                }
                Err(SourceError { reason, .. }) => {
                    let since = answer.failure.as_ref().map_or(now, |(_, since)| *since);
                    let changed = answer.failure.as_ref().is_none_or(|(old, _)| *old != reason);
                    if changed {
                        let serving = answer.addrs.len();
                        tracing::warn!(name, %reason, serving, "name not resolved, last good addresses stay");
                    }
                    answer.failure = Some((reason, since));
                    let expired = self.0.stale_limit.is_some_and(|limit| {
                        answer.answered.is_some_and(|at| now.saturating_duration_since(at) > limit)
                    });
                    let dropped = expired && !answer.addrs.is_empty();
                    if dropped {
                        answer.addrs = Arc::default();
                    }
                    changed || dropped
                }
            }
        });
    }
}

/// One node and, when it is a name, the answers for it.
enum Part {
    Fixed(Endpoint),
    Name { node: Node, answer: watch::Receiver<Answer> },
}

/// Follow nodes of which at least one is a name.
pub(crate) fn watch(names: &Names, runtime: &Handle, nodes: &[Node], options: NameOptions) -> Watch {
    let mut parts: Vec<Part> = nodes
        .iter()
        .map(|node| match fixed::endpoint(node) {
            Some(endpoint) => Part::Fixed(endpoint),
            None => Part::Name { node: node.clone(), answer: names.subscribe(&node.host, options) },
        })
        .collect();
    let (sender, receiver) = watch::channel(Arc::new(merge(&mut parts)));
    runtime.spawn(async move {
        loop {
            {
                let changes = parts.iter_mut().filter_map(|part| match part {
                    Part::Fixed(_) => None,
                    Part::Name { answer, .. } => Some(Box::pin(answer.changed())),
                });
                let closed = std::pin::pin!(sender.closed());
                match futures_util::future::select(closed, select_all(changes)).await {
                    Either::Left(_) => return,
                    // The name's task is gone only when the runtime is.
                    Either::Right(((Err(_), ..), _)) => return,
                    Either::Right(((Ok(()), ..), _)) => {}
                }
            }
            let endpoints = merge(&mut parts);
            sender.send_if_modified(|current| {
                let changed = **current != endpoints;
                if changed {
                    *current = Arc::new(endpoints);
                }
                changed
            });
        }
    });
    receiver
}

fn merge(parts: &mut [Part]) -> Endpoints {
    let mut endpoints = Endpoints::default();
    for part in parts {
        match part {
            Part::Fixed(endpoint) => endpoints.list.push(endpoint.clone()),
            Part::Name { node, answer } => {
                let answer = answer.borrow_and_update();
                endpoints.pending += usize::from(answer.pending());
                if let Some((reason, _)) = &answer.failure {
                    endpoints.failures.push(Failure {
                        name: Arc::clone(&node.host),
                        reason: Arc::clone(reason),
                        stale: !answer.addrs.is_empty(),
                    });
                }
                let siblings = u32::try_from(answer.addrs.len()).unwrap_or(u32::MAX);
                endpoints.list.extend(answer.addrs.iter().map(|ip| Endpoint {
                    addr: SocketAddr::new(*ip, node.port),
                    host: Arc::clone(&node.host),
                    weight: node.weight,
                    siblings,
                    priority: node.priority,
                    health: Health::Healthy,
                    details: None,
                }));
            }
        }
    }
    endpoints
}

/// Nothing that can panic runs under these locks, so what a poisoned one guards is sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod services_tests;
#[cfg(test)]
mod tests;
