//! An upstream for as long as its id lives: its settings, its endpoints, and what is thought of them.
//!
//! Workers read one immutable [`State`]; the control side replaces it when the resource is edited, when a name resolves
//! to other addresses, or when a verdict changes. Endpoints that stay keep their state, so that an edit forgets neither
//! health nor latency. Routes hold the cluster and are not touched by any of this.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use config::error::ConfigError;
use config::upstream::Upstream;
use discovery::{Discovery, Endpoint, Endpoints, Health, Node, Watch};
use hashbrown::{HashMap, HashSet};
use http::HeaderValue;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::breaker::{Leave, Phase};
use super::budget::Budget;
use super::drains::{Drains, Mark};
use super::endpoint::{EndpointKey, EndpointState};
use super::health::{Report, Source};
use super::picker::{Peer, PickKey, Picker, Tried};
use super::pool::Keepalive;
use super::probe::Probes;
use super::round_robin::CursorCell;
use super::settings::Settings;
use super::sticky::{OwnKey, Sessions};
use super::tls_client::{ClientPem, TlsClients};
use crate::error::Reason;
use crate::exchange::State as Exchange;
use crate::upstream::endpoint::Picked;

/// An endpoint that only live traffic judges is given another chance after this long without any.
const PAROLE: Duration = Duration::from_secs(10);

/// How often the shares of endpoints that start slowly grow, at the most and at the least.
const GROWTH: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

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
    /// Where probes and followers run.
    pub control: Handle,
}

/// What workers read.
#[derive(Debug)]
pub struct State {
    /// The compiled settings.
    pub settings: Arc<Settings>,
    picker: Picker,
    peers: Vec<Peer>,
    /// Endpoints that take no new request. They are known still, for what is under way on them.
    draining: Box<[Peer]>,
    /// No address is known because names do not resolve.
    unresolved: bool,
    /// Endpoints that were left out, where it matters that they come back.
    left_out: Box<[u64]>,
    /// Some endpoint has less than its whole share for now.
    cold: bool,
    /// There where sessions stay at their endpoint.
    sessions: Option<Box<Sessions>>,
}

/// An endpoint for one attempt.
#[derive(Debug)]
pub(crate) struct Choice {
    pub(crate) picked: Picked,
    /// The leave of its breaker, if it has one that is to hear of the outcome.
    pub(crate) leave: Option<Leave>,
}

impl State {
    /// Nothing to pick yet.
    fn new(settings: Arc<Settings>) -> Self {
        Self {
            settings,
            picker: Picker::default(),
            peers: Vec::new(),
            draining: Box::default(),
            unresolved: false,
            left_out: Box::default(),
            cold: false,
            sessions: None,
        }
    }

    /// The state of `endpoints`; those that were there before keep what is known of them. The ones that `marks` cover take
    /// no new request.
    fn of(
        settings: Arc<Settings>,
        endpoints: &Endpoints,
        marks: &[Mark],
        before: &Self,
        cursor: &CursorCell,
    ) -> Self {
        let mut draining = Vec::new();
        let mut peers = if endpoints.list.is_empty() && endpoints.pending > 0 {
            // New names are still asked for: until they answer, the former addresses serve.
            draining.extend(before.draining.iter().cloned());
            before.peers.clone()
        } else {
            peers(&endpoints.list, before)
        };
        let leaves = |endpoint: &Endpoint| {
            endpoint.health == Health::Draining || marks.iter().any(|mark| mark.covers(endpoint))
        };
        if endpoints.list.iter().any(leaves) {
            let mut list = endpoints.list.iter();
            draining.extend(peers.extract_if(.., |_| list.next().is_some_and(leaves)));
        }
        let mut left_out = Box::default();
        if settings.slow_start.is_some() {
            before.chill(&peers);
            let out = peers.iter().filter(|peer| !peer.state.health.state().usable());
            left_out = out.map(|peer| peer.state.id()).collect();
        }
        let now = Instant::now();
        for peer in &mut peers {
            peer.warmth = peer.state.warmth(settings.slow_start, now);
            peer.state.settle_breaker(settings.breaker.as_ref());
        }
        let picker = Picker::new(settings.algorithm, &peers, settings.fail_open, cursor);
        let unresolved = endpoints.pending > 0 || !endpoints.failures.is_empty();
        let sessions = settings.sticky.as_ref().map(|rule| Box::new(Sessions::new(rule, &peers)));
        let cold = peers.iter().any(|peer| peer.warmth < 100);
        Self { picker, peers, draining: draining.into(), unresolved, left_out, cold, sessions, settings }
    }

    /// Those of the next peers that are not among these, or were left out and are not any more, start cold. The first
    /// ones of all do not: there is nobody to take their part.
    fn chill(&self, next: &[Peer]) {
        if self.peers.is_empty() {
            return;
        }
        let now = Instant::now();
        let known: HashSet<u64> = self.peers.iter().map(|peer| peer.state.id()).collect();
        for Peer { state, .. } in next {
            let is_back = self.left_out.contains(&state.id()) && state.health.state().usable();
            if is_back || !known.contains(&state.id()) {
                state.start_cold(now);
            }
        }
    }

    /// The endpoints it was made of, where all of them are addresses.
    fn endpoints(&self) -> Endpoints {
        let endpoint = |peer: &Peer| Endpoint {
            addr: peer.state.addr(),
            host: peer.state.host().clone(),
            weight: peer.weight,
            siblings: peer.siblings,
            priority: peer.priority,
            health: discovery::Health::Healthy,
            details: None,
        };
        let list = self.peers.iter().chain(&self.draining).map(endpoint).collect();
        Endpoints { list, ..Endpoints::default() }
    }

    /// The endpoint for the first attempt: that of the request's session, or one that the algorithm chooses.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn first(&self, key: &PickKey, x: &Exchange) -> Result<Choice, Reason> {
        self.of_session(key, x).map_or_else(|| self.choose(key, &Tried::default()), Ok)
    }

    /// The endpoint for another attempt: one that was not tried. An upstream of one endpoint is asked there again, as
    /// often as `retries` says.
    pub(crate) fn again(&self, key: &PickKey, tried: &Tried) -> Option<Choice> {
        match &*self.peers {
            [_] => self.choose(key, &Tried::default()).ok(),
            _ => self.choose(key, tried).ok(),
        }
    }

    /// The next endpoint that was not tried and whose breaker lets the request pass.
    fn choose(&self, key: &PickKey, tried: &Tried) -> Result<Choice, Reason> {
        let Some(rule) = &self.settings.breaker else {
            let picked = self.picker.pick(key, tried).ok_or_else(|| self.nothing())?;
            return Ok(Choice { picked, leave: None });
        };
        let mut passed = tried.clone();
        let mut first: Option<&Arc<EndpointState>> = None;
        while let Some(endpoint) = self.picker.peek(key, &passed) {
            if let Some(choice) = admitted(endpoint, key.now) {
                return Ok(choice);
            }
            passed.add(endpoint);
            first = first.or(Some(endpoint));
        }
        match first {
            // Its outcome counts for no breaker: they have to cool down as they are.
            Some(endpoint) if rule.use_all => {
                Ok(Choice { picked: Picked::new(Arc::clone(endpoint)), leave: None })
            }
            Some(_) => Err(Reason::BreakerOpen),
            None => Err(self.nothing()),
        }
    }

    /// The endpoint of the request's session, if it can be used.
    fn of_session(&self, key: &PickKey, x: &Exchange) -> Option<Choice> {
        let endpoint = self.sessions.as_ref()?.endpoint(x)?;
        let usable = endpoint.health.state().usable() || (self.picker.degraded() && self.settings.fail_open);
        usable.then(|| admitted(endpoint, key.now)).flatten()
    }

    /// The cookie that an answer of this endpoint carries, unless the request has it already.
    pub(crate) fn cookie(&self, x: &Exchange, endpoint: &EndpointState) -> Option<&HeaderValue> {
        let sessions = self.sessions.as_ref()?;
        let is_known = sessions.endpoint(x).is_some_and(|known| known.id() == endpoint.id());
        if is_known { None } else { sessions.cookie(endpoint) }
    }

    #[cfg(test)]
    pub(crate) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// How many further attempts a request may make.
    pub(crate) fn retries(&self) -> u32 {
        let others = u32::try_from(self.peers.len().saturating_sub(1)).unwrap_or(u32::MAX);
        self.settings.retries.unwrap_or(others)
    }

    /// Why nothing could be picked by a request that has tried nothing yet.
    pub(crate) fn nothing(&self) -> Reason {
        match (self.peers.is_empty(), self.unresolved) {
            (true, _) if !self.draining.is_empty() => Reason::NoHealthyNode,
            (true, true) => Reason::DnsFailed,
            (true, false) => Reason::NoNodes,
            (false, _) => Reason::NoHealthyNode,
        }
    }
}

/// The endpoint, if its breaker lets a request pass.
fn admitted(endpoint: &Arc<EndpointState>, now: Instant) -> Option<Choice> {
    let leave = match endpoint.breaker() {
        Some(breaker) => Some(breaker.enter(now)?),
        None => None,
    };
    Some(Choice { picked: Picked::new(Arc::clone(endpoint)), leave })
}

/// What the control side keeps for one cluster. Its lock is held over every change of the state, so that an edit,
/// a new address and a new verdict never overtake each other.
#[derive(Default)]
struct Control {
    /// There where a node is a name.
    names: Option<Box<Names>>,
    /// Waits for what can change by itself: addresses and verdicts.
    follower: Option<JoinHandle<()>>,
    /// There where endpoints are probed.
    probes: Option<Box<Probes>>,
    /// A verdict flipped: the picker is old.
    flipped: Arc<Notify>,
}

/// Nodes of which at least one is a name, and the addresses behind them.
struct Names {
    nodes: Vec<Node>,
    min_ttl: Option<Duration>,
    watch: Watch,
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

/// One endpoint, for the Control API and `postern explain`.
#[derive(Clone, Debug, Serialize)]
pub struct EndpointView {
    /// Where it is.
    pub address: SocketAddr,
    /// The host it was configured as.
    pub host: Arc<str>,
    /// The weight of its node.
    pub weight: u32,
    /// The priority of its node.
    pub priority: i32,
    /// `healthy`, `mostly_healthy`, `mostly_unhealthy` or `unhealthy`.
    pub status: &'static str,
    /// It takes no new request.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Why, if anything happened to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
    /// `closed`, `half_open` or `open`, where the upstream has breakers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<&'static str>,
    /// How often the breaker has opened.
    #[serde(skip_serializing_if = "is_zero")]
    pub breaker_opened: u64,
    /// Requests under way.
    pub active: u32,
    /// Attempts since it appeared.
    pub requests: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Health counters.
    #[serde(skip)]
    pub counts: super::health::Counts,
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
        let nodes = nodes(upstream)?;
        let cluster = Arc::new(Self {
            key: key.into(),
            state: ArcSwap::from_pointee(State::new(settings.clone())),
            budget: Budget::new(),
            cursor: CursorCell::default(),
            drains: env.drains.clone(),
            control: Mutex::default(),
        });
        cluster.settle(settings, nodes, min_ttl(upstream), env);
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
        nodes(upstream)?;
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
        self.settle(Arc::new(settings), nodes(upstream)?, min_ttl(upstream), env);
        Ok(())
    }

    /// Makes these the settings and nodes, and sees that what changes by itself is followed.
    fn settle(
        self: &Arc<Self>,
        settings: Arc<Settings>,
        nodes: Vec<Node>,
        min_ttl: Option<Duration>,
        env: &ClusterEnv,
    ) {
        let mut guard = self.control();
        if !settings.checks.any() {
            self.state.load().peers.iter().for_each(|peer| peer.state.health.reset());
        }
        let literal = discovery::fixed::endpoints(&nodes);
        let follows = settings.checks.any() || settings.slow_start.is_some();
        if let Some(endpoints) = literal.as_ref().filter(|_| !follows) {
            *guard = None;
            self.publish(None, settings, endpoints, &env.control);
            return;
        }
        let control = guard.get_or_insert_default();
        // The former names are let go of only at the end: those that stay must not lose their addresses in between.
        let former = control.names.take();
        let endpoints = match literal {
            Some(endpoints) => endpoints,
            None => {
                let same = |names: &&Names| names.nodes == nodes && names.min_ttl == min_ttl;
                let mut watch = match former.as_deref().filter(same) {
                    Some(names) => names.watch.clone(),
                    None => env.discovery.watch_nodes(&nodes, min_ttl),
                };
                let endpoints = Endpoints::clone(&watch.borrow_and_update());
                control.names = Some(Box::new(Names { nodes, min_ttl, watch }));
                endpoints
            }
        };
        let (checks, slow_start) = (settings.checks.clone(), settings.slow_start);
        self.publish(Some(control), settings, &endpoints, &env.control);
        let follower = Follower {
            cluster: Arc::downgrade(self),
            watch: control.names.as_ref().map(|names| names.watch.clone()),
            flipped: control.flipped.clone(),
            parole: checks.active.is_none() && checks.passive.is_some(),
            growth: slow_start.map(|time| (time / 20).clamp(GROWTH.0, GROWTH.1)),
            runtime: env.control.clone(),
        };
        if let Some(former) = control.follower.replace(env.control.spawn(follower.run())) {
            former.abort();
        }
        drop(former);
    }

    /// Replaces the state. Whoever calls this holds the lock.
    fn publish(
        &self,
        control: Option<&mut Control>,
        settings: Arc<Settings>,
        endpoints: &Endpoints,
        runtime: &Handle,
    ) {
        let before = self.state.load_full();
        let marks = self.drains.of(&self.key, std::iter::empty());
        let next = State::of(settings, endpoints, &marks, &before, &self.cursor);
        match (before.picker.degraded(), next.picker.degraded()) {
            (false, true) if next.settings.fail_open => {
                tracing::error!(upstream = %self.key, "every node is unhealthy; all of them are used");
            }
            (false, true) => tracing::error!(upstream = %self.key, "every node is unhealthy; none is used"),
            (true, false) => tracing::info!(upstream = %self.key, "not every node is unhealthy any more"),
            _ => {}
        }
        if let Some(control) = control {
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
    }

    /// Builds the picker again: an address, a verdict or a mark has changed.
    pub fn refresh(&self, runtime: &Handle) {
        let mut guard = self.control();
        let state = self.state.load_full();
        let endpoints = match guard.as_ref().and_then(|control| control.names.as_ref()) {
            Some(names) => Endpoints::clone(&names.watch.borrow()),
            None => state.endpoints(),
        };
        self.publish(guard.as_deref_mut(), state.settings.clone(), &endpoints, runtime);
    }

    /// Whether a mark is for this upstream.
    pub fn is_meant(&self, mark: &Mark) -> bool {
        mark.is_for(&self.key, std::iter::empty())
    }

    /// The endpoints that a mark covers.
    pub fn covered(&self, mark: &Mark) -> Vec<Arc<EndpointState>> {
        let state = self.state.load();
        let is_covered = |state: &Arc<EndpointState>| {
            mark.node.as_ref().is_none_or(|node| node.is(state.addr(), state.host()))
        };
        let all = state.peers.iter().chain(&state.draining).map(|peer| &peer.state);
        all.filter(|state| is_covered(state)).cloned().collect()
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

    /// Its endpoints as they are now.
    pub fn endpoints(&self) -> Vec<EndpointView> {
        let state = self.state.load();
        let view = |peer: &Peer, draining: bool| {
            let breaker = peer.state.breaker();
            EndpointView {
                address: peer.state.addr(),
                host: peer.state.host().clone(),
                weight: peer.weight,
                priority: peer.priority,
                status: peer.state.health.state().as_str(),
                draining,
                because: peer.state.health.reason().map(|reason| reason.to_string()),
                breaker: breaker.as_ref().map(|breaker| breaker.phase().as_str()),
                breaker_opened: breaker.map_or(0, |breaker| breaker.opened()),
                active: peer.state.active(),
                requests: peer.state.requests(),
                failures: peer.state.failures(),
                counts: peer.state.health.counts(),
            }
        };
        let used = state.peers.iter().map(|peer| view(peer, false));
        used.chain(state.draining.iter().map(|peer| view(peer, true))).collect()
    }

    /// The names among its nodes that do not resolve now, with the resolver's words.
    pub fn unresolved(&self) -> Vec<(String, String)> {
        let control = self.control();
        let Some(names) = control.as_ref().and_then(|control| control.names.as_ref()) else {
            return Vec::new();
        };
        let endpoints = names.watch.borrow();
        endpoints
            .failures
            .iter()
            .map(|failure| (failure.name.to_string(), failure.reason.to_string()))
            .collect()
    }

    /// Every node is unhealthy, and all of them are used.
    pub fn is_degraded(&self) -> bool {
        self.state.load().picker.degraded()
    }

    /// Waits until every name was answered, or has failed once.
    pub async fn resolved(&self) {
        let watch = self.control().as_ref().and_then(|control| Some(control.names.as_ref()?.watch.clone()));
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

/// Follows names and verdicts. The cluster ends it.
struct Follower {
    cluster: Weak<Cluster>,
    watch: Option<Watch>,
    flipped: Arc<Notify>,
    /// Nothing probes, so time must bring endpoints back.
    parole: bool,
    /// How often the shares of cold endpoints grow, where there can be any.
    growth: Option<Duration>,
    runtime: Handle,
}

impl Follower {
    async fn run(mut self) {
        let mut parole = tokio::time::interval(PAROLE);
        parole.tick().await;
        let mut growth = tokio::time::interval(self.growth.unwrap_or(PAROLE));
        loop {
            tokio::select! {
                () = changed(&mut self.watch) => {}
                () = self.flipped.notified() => {}
                _ = parole.tick(), if self.parole => {
                    let Some(cluster) = self.cluster.upgrade() else { return };
                    cluster.parole();
                    continue;
                }
                _ = growth.tick(), if self.growth.is_some() => {
                    let Some(cluster) = self.cluster.upgrade() else { return };
                    if !cluster.state.load().cold {
                        continue;
                    }
                }
            }
            let Some(cluster) = self.cluster.upgrade() else { return };
            cluster.refresh(&self.runtime);
        }
    }
}

/// Waits for other addresses; for ever where there can be none.
async fn changed(watch: &mut Option<Watch>) {
    if let Some(names) = watch {
        if names.changed().await.is_ok() {
            return;
        }
        *watch = None;
    }
    std::future::pending().await
}

/// The nodes as discovery knows them.
fn nodes(upstream: &Upstream) -> Result<Vec<Node>, ConfigError> {
    let Some(nodes) = &upstream.nodes else {
        let kind = upstream.discovery_type.as_deref().unwrap_or_default();
        return Err(ConfigError::invalid(
            "/discovery_type",
            format!(
                "discovery by `{kind}` is not offered yet: write `nodes`; names among them are resolved by DNS"
            ),
        ));
    };
    Ok(nodes
        .iter()
        .map(|node| Node {
            host: node.bare_host().into(),
            port: upstream.port_of(node),
            weight: node.weight,
            priority: node.priority,
        })
        .collect())
}

fn min_ttl(upstream: &Upstream) -> Option<Duration> {
    let seconds = upstream.dns.as_ref()?.min_ttl?;
    Some(Duration::from_secs(seconds.get().into()))
}

/// Endpoints as peers; one that was there before is the same still, and two of one key are one.
fn peers(endpoints: &[Endpoint], before: &State) -> Vec<Peer> {
    let mut known: HashMap<EndpointKey, Arc<EndpointState>> = HashMap::new();
    // One endpoint is the rule among many small upstreams and needs no map.
    if endpoints.len() > 1 || before.peers.len() > 1 || !before.draining.is_empty() {
        let before = before.peers.iter().chain(&before.draining);
        known.extend(before.map(|peer| (peer.state.key().clone(), peer.state.clone())));
    }
    let mut state = |endpoint: &Endpoint| {
        let key = EndpointKey { addr: endpoint.addr, host: endpoint.host.clone() };
        match &*before.peers {
            [only] if *only.state.key() == key => return only.state.clone(),
            _ if endpoints.len() == 1 && known.is_empty() => return Arc::new(EndpointState::new(key)),
            _ => {}
        }
        known.entry(key).or_insert_with_key(|key| Arc::new(EndpointState::new(key.clone()))).clone()
    };
    endpoints
        .iter()
        .map(|endpoint| Peer {
            state: state(endpoint),
            weight: endpoint.weight,
            siblings: endpoint.siblings,
            priority: endpoint.priority,
            warmth: 100,
        })
        .collect()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests;
