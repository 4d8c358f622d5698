//! Names resolved in the background, one task per name however many upstreams use it.
//!
//! A name keeps its last good addresses through anything a resolver can do to it (NXDOMAIN, SERVFAIL,
//! silence, an empty answer), is asked again with growing pauses, and recovers by itself. The time to live
//! has a floor, so a zero from the server is not a query per request. The system's resolver settings and
//! hosts file are read again when they change.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::{Either, select_all};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::read_system_conf;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::source::Health;
use crate::{Backoff, Endpoint, Endpoints, Failure, Node, Watch, fixed};

/// Addresses kept of one answer. More than any real service has, less than would hurt a picker.
const MAX_ADDRESSES: usize = 256;
/// Questions under way at once, so that ten thousand names do not become one burst.
const MAX_CONCURRENT: usize = 64;
/// First and longest pause after a failed question.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// A change of either asks for a new resolver.
const SYSTEM_FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// How names are resolved. The defaults are those of a stock gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Name servers; none means the system's (`/etc/resolv.conf`).
    pub servers: Vec<SocketAddr>,
    /// No name is asked again sooner than this, whatever its time to live.
    pub min_ttl: Duration,
    /// No name is trusted longer than this without a question.
    pub max_ttl: Duration,
    /// Replaces every time to live (`dns_resolver_valid`).
    pub valid: Option<Duration>,
    /// One question to one server.
    pub timeout: Duration,
    /// Questions to the servers before an attempt counts as failed; at least 1.
    pub attempts: usize,
    /// Ask for AAAA when there is no A record.
    pub ipv6: bool,
    /// Apply the search list of `/etc/resolv.conf` (`enable_resolv_search_opt`).
    pub search: bool,
    /// Drop addresses whose name could not be resolved for this long; none keeps them for ever.
    pub stale_limit: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            min_ttl: Duration::from_secs(1),
            max_ttl: Duration::from_secs(3600),
            valid: None,
            timeout: Duration::from_secs(5),
            attempts: 2,
            ipv6: true,
            search: true,
            stale_limit: None,
        }
    }
}

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

/// A name and the floor of its time to live. Upstreams that want different floors do not share questions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct NameKey {
    name: Arc<str>,
    min_ttl: Duration,
}

#[derive(Debug)]
struct Entry {
    answer: watch::Sender<Answer>,
    refresh: Notify,
}

#[derive(Debug)]
struct Inner {
    runtime: Handle,
    settings: Settings,
    resolver: Mutex<Option<(SystemFiles, TokioResolver)>>,
    names: Mutex<HashMap<NameKey, Arc<Entry>>>,
    gate: Semaphore,
}

/// The names under watch.
#[derive(Clone, Debug)]
pub(crate) struct Names(Arc<Inner>);

impl Names {
    pub(crate) fn new(runtime: Handle, settings: Settings) -> Self {
        Self(Arc::new(Inner {
            runtime,
            settings,
            resolver: Mutex::new(None),
            names: Mutex::new(HashMap::new()),
            gate: Semaphore::new(MAX_CONCURRENT),
        }))
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
    pub(crate) fn subscribe(&self, name: &str, min_ttl: Option<Duration>) -> watch::Receiver<Answer> {
        let min_ttl = min_ttl.unwrap_or(self.0.settings.min_ttl);
        let key = NameKey { name: name.to_ascii_lowercase().into(), min_ttl };
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
        loop {
            let outcome = tokio::select! {
                biased;
                () = entry.answer.closed() => {
                    if self.release(&key, &entry) { return }
                    continue;
                }
                outcome = self.resolve(&key) => outcome,
            };
            let pause = match &outcome {
                Ok((_, ttl)) => {
                    backoff.reset();
                    // Spread names that were first asked together.
                    *ttl + ttl.mul_f64(fastrand::f64() / 10.0)
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

    fn publish(
        &self,
        name: &str,
        entry: &Entry,
        outcome: Result<(Arc<[IpAddr]>, Duration), Arc<str>>,
        pause: Duration,
    ) {
        let now = Instant::now();
        entry.answer.send_if_modified(|answer| {
            answer.next = Some(now + pause);
            match outcome {
                Ok((addrs, _)) => {
                    let changed = answer.answered.is_none() || answer.addrs != addrs;
                    let recovered = answer.failure.take();
                    if changed || recovered.is_some() {
                        tracing::debug!(name, addresses = addrs.len(), "name resolved");
                    }
                    answer.answered = Some(now);
                    answer.addrs = addrs;
                    changed || recovered.is_some()
                }
                Err(reason) => {
                    let since = answer.failure.as_ref().map_or(now, |(_, since)| *since);
                    let changed = answer.failure.as_ref().is_none_or(|(old, _)| *old != reason);
                    if changed {
                        let serving = answer.addrs.len();
                        tracing::warn!(name, %reason, serving, "name not resolved, last good addresses stay");
                    }
                    answer.failure = Some((reason, since));
                    let expired = self.0.settings.stale_limit.is_some_and(|limit| {
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

    /// One attempt: sorted addresses and how long they hold, or the reason there are none.
    async fn resolve(&self, key: &NameKey) -> Result<(Arc<[IpAddr]>, Duration), Arc<str>> {
        let settings = &self.0.settings;
        let _permit = self.0.gate.acquire().await.map_err(|closed| closed.to_string())?;
        let resolver = self.resolver()?;
        // The resolver has its own time-outs; this one is for a resolver that forgets them.
        let attempts = u32::try_from(settings.attempts.max(1)).unwrap_or(1);
        let limit = settings.timeout.saturating_mul(attempts).saturating_mul(4);
        let lookup = timeout(limit, resolver.lookup_ip(&*key.name))
            .await
            .map_err(|_| "no answer in time")?
            .map_err(|error| error.to_string())?;
        let mut addrs: Vec<IpAddr> =
            lookup.iter().filter(|ip| !ip.is_unspecified() && !ip.is_multicast()).collect();
        // Servers rotate their answers; sorted, a rotation is no change and truncation is stable.
        addrs.sort_unstable();
        addrs.dedup();
        addrs.truncate(MAX_ADDRESSES);
        if addrs.is_empty() {
            return Err("the answer holds no usable address".into());
        }
        let ttl = lookup.as_lookup().answers().iter().map(|record| record.ttl).min().unwrap_or(0);
        let ttl = settings.valid.unwrap_or(Duration::from_secs(ttl.into()));
        let ttl = ttl.min(settings.max_ttl).max(key.min_ttl);
        Ok((addrs.into(), ttl))
    }

    fn resolver(&self) -> Result<TokioResolver, String> {
        let mut current = lock(&self.0.resolver);
        let files =
            if self.0.settings.servers.is_empty() { SystemFiles::now() } else { SystemFiles::default() };
        if let Some((at, resolver)) = current.as_ref()
            && *at == files
        {
            return Ok(resolver.clone());
        }
        let resolver = build(&self.0.settings)?;
        *current = Some((files, resolver.clone()));
        Ok(resolver)
    }
}

/// When the system's resolver files last changed.
#[derive(Debug, Default, PartialEq, Eq)]
struct SystemFiles([Option<SystemTime>; SYSTEM_FILES.len()]);

impl SystemFiles {
    fn now() -> Self {
        Self(SYSTEM_FILES.map(|path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok()))
    }
}

fn build(settings: &Settings) -> Result<TokioResolver, String> {
    let (config, mut options) = if settings.servers.is_empty() {
        let (mut config, options) =
            read_system_conf().map_err(|error| format!("/etc/resolv.conf: {error}"))?;
        if !settings.search {
            config = ResolverConfig::from_parts(None, Vec::new(), config.name_servers().to_vec());
        }
        (config, options)
    } else {
        let servers = settings.servers.iter().map(|server| {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                connection.port = server.port();
                connection
            });
            NameServerConfig::new(server.ip(), true, connections.into())
        });
        (ResolverConfig::from_name_servers(servers.collect()), ResolverOpts::default())
    };
    options.timeout = settings.timeout;
    options.attempts = settings.attempts.max(1);
    // Freshness is decided here, with the floor and the ceiling above; a second cache would hide changes.
    options.cache_size = 0;
    options.ip_strategy =
        if settings.ipv6 { LookupIpStrategy::Ipv4thenIpv6 } else { LookupIpStrategy::Ipv4Only };
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    builder.build().map_err(|error| error.to_string())
}

/// One node and, when it is a name, the answers for it.
enum Part {
    Fixed(Endpoint),
    Name { node: Node, answer: watch::Receiver<Answer> },
}

/// Follow nodes of which at least one is a name.
pub(crate) fn watch(names: &Names, runtime: &Handle, nodes: &[Node], min_ttl: Option<Duration>) -> Watch {
    let mut parts: Vec<Part> = nodes
        .iter()
        .map(|node| match fixed::endpoint(node) {
            Some(endpoint) => Part::Fixed(endpoint),
            None => Part::Name { node: node.clone(), answer: names.subscribe(&node.host, min_ttl) },
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
mod tests;
