//! An upstream for as long as its id lives: its settings, its endpoints, and what is thought of them.
//!
//! Workers read one immutable [`State`]; the control side replaces it when the resource is edited, when a name resolves
//! to other addresses, or when a verdict changes. Endpoints that stay keep their state, so that an edit forgets neither
//! health nor latency. Routes hold the cluster and are not touched by any of this.

mod origin;
mod state;
mod view;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use config::error::ConfigError;
use config::process::Place;
use config::upstream::Upstream;
use discovery::{Discovery, Endpoints, Target, Watch};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::breaker::{Leave, Phase};
use super::budget::Budget;
use super::drains::{Drains, Mark};
use super::endpoint::EndpointState;
use super::failover::Tiers;
use super::health::{Report, Source};
use super::mesh::Mesh;
use super::picker::Peer;
use super::pool::Keepalive;
use super::probe::Probes;
use super::round_robin::CursorCell;
use super::settings::Settings;
use super::sticky::OwnKey;
use super::tls_client::{ClientPem, TlsClients};
use crate::transport::original_dst::AsClient;
use origin::Origin;
pub(crate) use origin::Places;
pub(crate) use state::Choice;
use state::Made;
pub use state::State;
pub use view::{EndpointView, Place as EndpointPlace, Verdict};

/// An endpoint that only live traffic judges is given another chance after this long without any.
const PAROLE: Duration = Duration::from_secs(10);

/// How often the shares of endpoints that start slowly grow, at the most and at the least.
const GROWTH: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// A state that takes this long to make is not made at every opportunity.
const COSTLY: Duration = Duration::from_millis(1);

/// From so many endpoints on, a state is freed on the control side, whoever has used it last.
const LARGE: usize = 64;

/// How long a request waits for the first answer of names and registries, and how many of an upstream may.
const UNKNOWN_WAIT: Duration = Duration::from_secs(3);
const UNKNOWN_QUEUE: u32 = 1000;

/// What clusters are made with.
#[derive(Clone)]
pub struct ClusterEnv {
    /// Finds the addresses of nodes.
    pub discovery: Discovery,
    /// TLS identities towards upstreams.
    pub tls: Arc<TlsClients>,
    /// Whether health checks run at all. APISIX `disable_upstream_healthcheck` says no.
    pub checks: bool,
    /// The pool of an upstream without `keepalive_pool`. nginx `upstream` block.
    pub keepalive: Keepalive,
    /// The key of the cookies of sessions, where an upstream has none of its own.
    pub session_key: OwnKey,
    /// Nodes that operators are about to stop.
    pub drains: Drains,
    /// Where this gateway is, for upstreams that prefer what is near.
    pub place: Arc<Place>,
    /// How nodes of the mesh are reached, where this process has an identity in it.
    pub mesh: Option<Mesh>,
    /// As whom nodes are connected, where they shall not see this process.
    pub as_client: Option<AsClient>,
    /// Where probes and followers run.
    pub control: Handle,
}

/// What the control side keeps for one cluster. Its lock is held over every change of the state, so that an edit,
/// a new address and a new verdict never overtake each other.
#[derive(Default)]
struct Control {
    /// There where endpoints are names or services of registries.
    followed: Option<Box<Followed>>,
    /// Waits for what can change by itself: addresses and verdicts.
    follower: Option<JoinHandle<()>>,
    /// There where endpoints are probed.
    probes: Option<Box<Probes>>,
    /// A verdict flipped: the picker is old.
    flipped: Arc<Notify>,
    /// Those who wait for the first endpoints.
    arrivals: Arc<Arrivals>,
    /// What is remembered of priorities.
    tiers: Tiers,
}

/// What has to be followed, and what is known of it.
struct Followed {
    target: Target,
    watch: Watch,
}

/// Requests that wait for the first endpoints.
#[derive(Default)]
struct Arrivals {
    news: Notify,
    waiting: AtomicU32,
}

/// A place among those who wait, until it is dropped.
struct Waiting<'a>(&'a AtomicU32);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicU32) -> Option<Self> {
        let before = count.fetch_add(1, Ordering::Relaxed);
        let place = Self(count);
        (before < UNKNOWN_QUEUE).then_some(place)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Some(follower) = &self.follower {
            follower.abort();
        }
    }
}

/// An upstream.
pub struct Cluster {
    key: Box<str>,
    state: ArcSwap<State>,
    pub(crate) budget: Budget,
    cursor: CursorCell,
    drains: Drains,
    /// None where nothing can change by itself: among a hundred thousand small upstreams most are so.
    control: Mutex<Option<Box<Control>>>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Cluster {
    /// A cluster for the upstream of `key` (`upstreams/1`, `routes/7`). `client` is the certificate that
    /// `tls.client_cert_id` names.
    ///
    /// # Errors
    /// What cannot work, with a pointer into the upstream.
    pub fn build(
        key: &str,
        upstream: &Upstream,
        client: Option<ClientPem>,
        env: &ClusterEnv,
    ) -> Result<Arc<Self>, ConfigError> {
        let settings = Arc::new(Settings::compile(upstream, client.as_ref(), env, None)?);
        let origin = Origin::of(key, upstream, &env.discovery)?;
        let cluster = Arc::new(Self {
            key: key.into(),
            state: ArcSwap::from_pointee(State::new(settings.clone())),
            budget: Budget::new(),
            cursor: CursorCell::default(),
            drains: env.drains.clone(),
            control: Mutex::default(),
        });
        cluster.settle(settings, origin, env);
        Ok(cluster)
    }

    /// Sees whether a cluster could be built, without one.
    ///
    /// # Errors
    /// As [`Cluster::build`].
    pub fn check(
        upstream: &Upstream,
        client: Option<ClientPem>,
        env: &ClusterEnv,
    ) -> Result<(), ConfigError> {
        Settings::compile(upstream, client.as_ref(), env, None)?;
        Origin::of("", upstream, &env.discovery)?;
        Ok(())
    }

    /// Takes in an edit of the upstream. Endpoints that stay keep what is known of them.
    ///
    /// # Errors
    /// What cannot work, with a pointer into the upstream; the cluster stays as it was.
    pub fn update(
        self: &Arc<Self>,
        upstream: &Upstream,
        client: Option<ClientPem>,
        env: &ClusterEnv,
    ) -> Result<(), ConfigError> {
        let before = self.state.load_full().settings.clone();
        let settings = Settings::compile(upstream, client.as_ref(), env, Some(&before))?;
        let origin = Origin::of(&self.key, upstream, &env.discovery)?;
        self.settle(Arc::new(settings), origin, env);
        Ok(())
    }

    /// Makes these the settings and endpoints, and sees that what changes by itself is followed.
    fn settle(self: &Arc<Self>, settings: Arc<Settings>, origin: Origin, env: &ClusterEnv) {
        let mut guard = self.control();
        if !settings.checks.any() {
            self.state.load().peers.iter().for_each(|peer| peer.state.health.reset());
        }
        let checks = settings.checks.clone();
        let endpoints = match &origin {
            Origin::Literal(endpoints) if !checks.any() && settings.slow_start.is_none() => {
                let former = guard.take();
                self.publish(None, settings, endpoints, &env.control);
                former.iter().for_each(|control| control.arrivals.news.notify_waiters());
                return;
            }
            Origin::Literal(endpoints) => Some(endpoints.clone()),
            Origin::Followed(_) => None,
        };
        let control = guard.get_or_insert_default();
        // What was followed is let go of only at the end: endpoints that stay must not be lost in between.
        let former = control.followed.take();
        let endpoints = match origin {
            Origin::Literal(_) => Arc::new(endpoints.unwrap_or_default()),
            Origin::Followed(target) => {
                let mut watch = match former.as_deref().filter(|former| former.target == target) {
                    Some(same) => same.watch.clone(),
                    None => env.discovery.watch(&target),
                };
                let endpoints = watch.borrow_and_update().clone();
                control.followed = Some(Box::new(Followed { target, watch }));
                endpoints
            }
        };
        let again = self.publish(Some(control), settings, &endpoints, &env.control);
        let follower = Follower {
            cluster: Arc::downgrade(self),
            watch: control.followed.as_ref().map(|followed| followed.watch.clone()),
            flipped: control.flipped.clone(),
            parole: checks.active.is_none() && checks.passive.is_some(),
            again: deadline(again),
            runtime: env.control.clone(),
        };
        if let Some(former) = control.follower.replace(env.control.spawn(follower.run())) {
            former.abort();
        }
        drop(former);
    }

    /// Replaces the state, and says after what time to do so again. Whoever calls this holds the lock.
    fn publish(
        &self,
        mut control: Option<&mut Control>,
        settings: Arc<Settings>,
        endpoints: &Endpoints,
        runtime: &Handle,
    ) -> Option<Duration> {
        let before = self.state.load_full();
        let services = control.as_deref().map_or(&[][..], Control::parts);
        let marks = self.drains.of(&self.key, origin::services(services).map(|service| &**service));
        let (next, again) = State::of(Made {
            settings,
            endpoints,
            marks: &marks,
            before: &before,
            cursor: &self.cursor,
            tiers: control.as_deref_mut().map(|control| &mut control.tiers),
        });
        match (before.is_degraded(), next.is_degraded()) {
            (false, true) if next.uses_all() => {
                tracing::error!(upstream = %self.key, "too few nodes are healthy; all of them are used");
            }
            (false, true) => tracing::error!(upstream = %self.key, "every node is unhealthy; none is used"),
            (true, false) => tracing::info!(upstream = %self.key, "enough nodes are healthy again"),
            _ => {}
        }
        if let Some(control) = control.as_deref_mut() {
            match &next.settings.checks.active {
                Some(active) => {
                    let endpoints = next.peers.iter().map(|peer| &peer.state);
                    let probes = control.probes.get_or_insert_default();
                    probes.settle(&self.key, active, endpoints, &control.flipped, runtime);
                }
                None => control.probes = None,
            }
        }
        self.state.store(Arc::new(next));
        // While nothing but new names is asked for, the former addresses serve.
        if !(endpoints.list.is_empty() && endpoints.pending > 0) {
            endpoints.receipt.sign();
        }
        if let Some(control) = control {
            control.arrivals.news.notify_waiters();
        }
        retire(before, runtime);
        again
    }

    /// Makes the state again: an address, a verdict or the time has changed. Says when to do so next.
    fn rebuild(&self, runtime: &Handle) -> Option<Duration> {
        let mut guard = self.control();
        let state = self.state.load_full();
        let endpoints = match guard.as_ref().and_then(|control| control.followed.as_ref()) {
            Some(followed) => followed.watch.borrow().clone(),
            None => Arc::new(state.endpoints()),
        };
        self.publish(guard.as_deref_mut(), state.settings.clone(), &endpoints, runtime)
    }

    /// Makes the state again: a mark has changed.
    pub fn refresh(&self, runtime: &Handle) {
        if self.rebuild(runtime).is_some() {
            // Somebody has to come back, and the follower knows when.
            self.flipped();
        }
    }

    /// Waits until something is known of the endpoints, for a while and if not too many do so already.
    pub(crate) async fn known(&self) -> Arc<State> {
        let arrivals = self.control().as_ref().map(|control| control.arrivals.clone());
        let Some(arrivals) = arrivals else { return self.state() };
        let Some(_waiting) = Waiting::new(&arrivals.waiting) else { return self.state() };
        let until = tokio::time::Instant::now() + UNKNOWN_WAIT;
        loop {
            let news = arrivals.news.notified();
            tokio::pin!(news);
            // From here on no news is missed.
            news.as_mut().enable();
            let state = self.state();
            if !state.is_unknown() || tokio::time::timeout_at(until, news).await.is_err() {
                return state;
            }
        }
    }

    /// Whether a mark is for this upstream.
    pub fn is_meant(&self, mark: &Mark) -> bool {
        let control = self.control();
        let parts = control.as_deref().map_or(&[][..], Control::parts);
        mark.is_for(&self.key, origin::services(parts).map(|service| &**service))
    }

    /// The endpoints that a mark covers.
    pub fn covered(&self, mark: &Mark) -> Vec<Arc<EndpointState>> {
        let state = self.state.load();
        let all = state.peers.iter().chain(&state.draining).map(|peer| &peer.state);
        all.filter(|state| mark.names(state.addr(), state.host())).cloned().collect()
    }

    /// Whether an endpoint that it does not have is gone, and not only unknown: whoever is asked has answered. One that was
    /// `seen` here is gone whatever those say who have never answered.
    pub fn is_sure(&self, seen: bool) -> bool {
        self.state.load().is_sure(seen)
    }

    /// Whether nothing is known of its endpoints yet.
    pub fn is_pending(&self) -> bool {
        self.state.load().is_unknown()
    }

    /// Its endpoints of the mesh, with who is expected there.
    pub fn mesh_peers(&self) -> BTreeMap<SocketAddr, String> {
        let state = self.state.load();
        let told = |peer: &Peer| Some((peer.state.addr(), peer.state.mesh()?.expected()));
        state.peers.iter().filter_map(told).collect()
    }

    /// Whether one of its endpoints is at this address.
    pub fn has_endpoint(&self, address: SocketAddr) -> bool {
        let state = self.state.load();
        state.peers.iter().chain(&state.draining).any(|peer| peer.state.addr() == address)
    }

    /// Where its endpoints are, once that is known; it is waited for as requests wait.
    ///
    /// # Errors
    /// Why there are none.
    pub async fn addresses(&self) -> Result<Vec<SocketAddr>, crate::error::Reason> {
        let mut state = self.state();
        if state.is_unknown() {
            state = self.known().await;
        }
        match state.peers.is_empty() {
            true => Err(state.nothing()),
            false => Ok(state.peers.iter().map(|peer| peer.state.addr()).collect()),
        }
    }

    /// The key of the object that holds the upstream.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// APISIX `scheme`.
    pub fn scheme(&self) -> &'static str {
        self.state.load().settings.scheme()
    }

    /// What a request goes by. Whole and not a guard: an attempt may take long, and guards that are held make the next
    /// ones slow.
    pub(crate) fn state(&self) -> Arc<State> {
        self.state.load_full()
    }

    /// `http`, `https` or `tcp` where endpoints are probed, `passive` where only live traffic judges them.
    pub fn check_kind(&self) -> Option<&'static str> {
        let state = self.state.load();
        let checks = &state.settings.checks;
        match &checks.active {
            Some(active) => Some(active.kind()),
            None => checks.passive.is_some().then_some("passive"),
        }
    }

    /// Whether its endpoints have breakers.
    pub fn has_breakers(&self) -> bool {
        self.state.load().settings.breaker.is_some()
    }

    /// Another number when anything about its endpoints has changed.
    pub fn version(&self) -> u64 {
        self.state.load().number
    }

    /// Its endpoints as they are now.
    pub fn endpoints(&self) -> Vec<EndpointView> {
        view::of(&self.state.load())
    }

    /// The services of registries that its endpoints come from, with the kind of the registry.
    pub fn services(&self) -> Vec<(Arc<str>, Arc<str>)> {
        let control = self.control();
        let parts = control.as_deref().map_or(&[][..], Control::parts);
        let service = |part: &discovery::Part| match &part.origin {
            discovery::Origin::Service { kind, query } => Some((kind.clone(), query.service.clone())),
            discovery::Origin::Nodes(_) => None,
        };
        parts.iter().filter_map(service).collect()
    }

    /// The names and services among its nodes that cannot be found out now, with the words of whoever was asked.
    pub fn unresolved(&self) -> Vec<(String, String)> {
        let control = self.control();
        let Some(followed) = control.as_ref().and_then(|control| control.followed.as_ref()) else {
            return Vec::new();
        };
        let endpoints = followed.watch.borrow();
        endpoints
            .failures
            .iter()
            .map(|failure| (failure.name.to_string(), failure.reason.to_string()))
            .collect()
    }

    /// Too few nodes are healthy, or none.
    pub fn is_degraded(&self) -> bool {
        self.state.load().is_degraded()
    }

    /// Waits until every name and registry was answered, or has failed once.
    pub async fn resolved(&self) {
        let watch =
            self.control().as_ref().and_then(|control| Some(control.followed.as_ref()?.watch.clone()));
        if let Some(mut watch) = watch {
            // The sender ends with the target; then there is nothing to wait for.
            let _ = watch.wait_for(|endpoints| endpoints.settled()).await;
        }
    }

    /// Live traffic says something about an endpoint.
    pub(crate) fn report(&self, state: &State, endpoint: &EndpointState, report: Report) {
        let Some(judge) = &state.settings.checks.passive else { return };
        if let Some(flip) = endpoint.health.report(Source::Passive, report, &judge.limits) {
            tracing::warn!(upstream = %self.key, endpoint = %endpoint, from = flip.from.as_str(), to = flip.to.as_str(), "health changed by live traffic");
            self.flipped();
        }
    }

    /// Tells the status of an answer to the passive check.
    pub(crate) fn report_status(&self, state: &State, endpoint: &EndpointState, status: u16) {
        if let Some(report) = state.settings.checks.passive.as_ref().and_then(|judge| judge.status(status)) {
            self.report(state, endpoint, report);
        }
    }

    /// Tells the breaker that gave `leave` that the endpoint failed.
    pub(crate) fn breaker_failed(&self, endpoint: &EndpointState, leave: Leave, now: Instant) {
        if leave.failed(now) {
            tracing::warn!(upstream = %self.key, endpoint = %endpoint, to = Phase::Open.as_str(), "breaker");
        }
    }

    /// Tells the breaker that gave `leave` that the endpoint took a connection, which is all that can be told of opaque ones.
    pub(crate) fn breaker_connected(&self, endpoint: &EndpointState, leave: Leave) {
        if leave.succeeded() {
            tracing::info!(upstream = %self.key, endpoint = %endpoint, to = Phase::Closed.as_str(), "breaker");
        }
    }

    /// Tells the breaker that gave `leave` of an answer.
    pub(crate) fn breaker_status(&self, endpoint: &EndpointState, leave: Leave, status: u16, now: Instant) {
        if leave.rule().fails(status) {
            self.breaker_failed(endpoint, leave, now);
        } else if leave.succeeded() {
            tracing::info!(upstream = %self.key, endpoint = %endpoint, to = Phase::Closed.as_str(), "breaker");
        }
    }

    fn flipped(&self) {
        if let Some(control) = self.control().as_ref() {
            control.flipped.notify_one();
        }
    }

    fn control(&self) -> MutexGuard<'_, Option<Box<Control>>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Endpoints that nothing probes get another chance.
    fn parole(&self) {
        let state = self.state.load();
        let checks = &state.settings.checks;
        let (None, Some(judge)) = (&checks.active, &checks.passive) else { return };
        let mut flipped = false;
        for peer in &state.peers {
            flipped |= peer.state.health.parole(&judge.limits).is_some();
        }
        if flipped {
            self.flipped();
        }
    }
}

impl Control {
    /// Where what is followed comes from.
    fn parts(&self) -> &[discovery::Part] {
        self.followed.as_ref().map_or(&[][..], |followed| &followed.target.parts)
    }
}

/// Lets go of a former state on the control side: freeing thousands of endpoints on a worker that happens to be the last
/// to use them is a spike in its latency.
fn retire(state: Arc<State>, runtime: &Handle) {
    if state.peers.len() < LARGE {
        return;
    }
    runtime.spawn(async move {
        let mut pause = Duration::from_millis(10);
        while Arc::strong_count(&state) > 1 {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    });
}

/// Follows addresses and verdicts. The cluster ends it.
struct Follower {
    cluster: Weak<Cluster>,
    watch: Option<Watch>,
    flipped: Arc<Notify>,
    /// Nothing probes, so time must bring endpoints back.
    parole: bool,
    /// When the state has to be made again, whatever happens.
    again: Option<tokio::time::Instant>,
    runtime: Handle,
}

impl Follower {
    async fn run(mut self) {
        let mut parole = tokio::time::interval(PAROLE);
        parole.tick().await;
        loop {
            tokio::select! {
                () = changed(&mut self.watch) => {}
                () = self.flipped.notified() => {}
                () = at(self.again) => {}
                _ = parole.tick(), if self.parole => {
                    let Some(cluster) = self.cluster.upgrade() else { return };
                    cluster.parole();
                    continue;
                }
            }
            let Some(cluster) = self.cluster.upgrade() else { return };
            let begun = Instant::now();
            self.again = deadline(cluster.rebuild(&self.runtime));
            drop(cluster);
            // Many changes of a large upstream in a row are taken together: a fifth of the time is enough for one.
            let took = begun.elapsed();
            if took > COSTLY {
                tokio::time::sleep((took * 4).min(Duration::from_secs(1))).await;
            }
        }
    }
}

fn deadline(after: Option<Duration>) -> Option<tokio::time::Instant> {
    after.map(|after| tokio::time::Instant::now() + after)
}

/// Waits until then; for ever where nothing is waited for.
async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Waits for other addresses; for ever where there can be none.
async fn changed(watch: &mut Option<Watch>) {
    if let Some(followed) = watch {
        if followed.changed().await.is_ok() {
            return;
        }
        *watch = None;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests;
