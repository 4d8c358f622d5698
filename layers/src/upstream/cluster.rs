//! An upstream for as long as its id lives: its settings, its endpoints, and what is thought of them.
//!
//! Workers read one immutable [`State`]; the control side replaces it when the resource is edited, when a name resolves
//! to other addresses, or when a verdict changes. Endpoints that stay keep their state, so that an edit forgets neither
//! health nor latency. Routes hold the cluster and are not touched by any of this.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use config::error::ConfigError;
use config::upstream::Upstream;
use discovery::{Discovery, Endpoint, Endpoints, Node, Watch};
use hashbrown::HashMap;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::budget::Budget;
use super::endpoint::{EndpointKey, EndpointState};
use super::health::{Report, Source};
use super::picker::{Peer, PickKey, Picker, Tried};
use super::pool::Keepalive;
use super::probe::Probes;
use super::round_robin::CursorCell;
use super::settings::Settings;
use super::tls_client::{ClientPem, TlsClients};
use crate::error::Reason;
use crate::upstream::endpoint::Picked;

/// An endpoint that only live traffic judges is given another chance after this long without any.
const PAROLE: Duration = Duration::from_secs(10);

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
    /// No address is known because names do not resolve.
    unresolved: bool,
}

impl State {
    /// Nothing to pick yet.
    fn new(settings: Arc<Settings>) -> Self {
        Self { settings, picker: Picker::default(), peers: Vec::new(), unresolved: false }
    }

    /// The state of `endpoints`; those that were there before keep what is known of them.
    fn of(settings: Arc<Settings>, endpoints: &Endpoints, before: &[Peer], cursor: &CursorCell) -> Self {
        let peers = if endpoints.list.is_empty() && endpoints.pending > 0 {
            // New names are still asked for: until they answer, the former addresses serve.
            before.to_vec()
        } else {
            peers(&endpoints.list, before)
        };
        let picker = Picker::new(settings.algorithm, &peers, settings.fail_open, cursor);
        let unresolved = endpoints.pending > 0 || !endpoints.failures.is_empty();
        Self { picker, peers, unresolved, settings }
    }

    /// The endpoints it was made of, where all of them are addresses.
    fn endpoints(&self) -> Endpoints {
        let endpoint = |peer: &Peer| Endpoint {
            addr: peer.state.addr(),
            host: peer.state.host().clone(),
            weight: peer.weight,
            siblings: peer.siblings,
            priority: peer.priority,
        };
        Endpoints { list: self.peers.iter().map(endpoint).collect(), ..Endpoints::default() }
    }

    /// The next endpoint for another attempt: one that was not tried. An upstream of one endpoint is asked there again,
    /// as often as `retries` says.
    pub(crate) fn pick_again(&self, key: &PickKey, tried: &Tried) -> Option<Picked> {
        match &*self.peers {
            [_] => self.picker.pick(key, &Tried::default()),
            _ => self.picker.pick(key, tried),
        }
    }

    /// The next endpoint that was not tried.
    pub(crate) fn pick(&self, key: &PickKey, tried: &Tried) -> Option<Picked> {
        self.picker.pick(key, tried)
    }

    /// How many further attempts a request may make.
    pub(crate) fn retries(&self) -> u32 {
        let others = u32::try_from(self.peers.len().saturating_sub(1)).unwrap_or(u32::MAX);
        self.settings.retries.unwrap_or(others)
    }

    /// Why nothing could be picked by a request that has tried nothing yet.
    pub(crate) fn nothing(&self) -> Reason {
        match (self.peers.is_empty(), self.unresolved) {
            (true, true) => Reason::DnsFailed,
            (true, false) => Reason::NoNodes,
            (false, _) => Reason::NoHealthyNode,
        }
    }
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
    /// Why, if anything happened to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
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
            control: Mutex::default(),
        });
        cluster.settle(settings, nodes, min_ttl(upstream), env);
        Ok(cluster)
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
        if let Some(endpoints) = literal.as_ref().filter(|_| !settings.checks.any()) {
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
                    None => env.discovery.watch(&nodes, min_ttl),
                };
                let endpoints = Endpoints::clone(&watch.borrow_and_update());
                control.names = Some(Box::new(Names { nodes, min_ttl, watch }));
                endpoints
            }
        };
        let checks = settings.checks.clone();
        self.publish(Some(control), settings, &endpoints, &env.control);
        let follower = Follower {
            cluster: Arc::downgrade(self),
            watch: control.names.as_ref().map(|names| names.watch.clone()),
            flipped: control.flipped.clone(),
            parole: checks.active.is_none() && checks.passive.is_some(),
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
        let next = State::of(settings, endpoints, &before.peers, &self.cursor);
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

    /// Builds the picker again: an address or a verdict has changed.
    fn refresh(&self, runtime: &Handle) {
        let mut guard = self.control();
        let Some(control) = guard.as_deref_mut() else { return };
        let state = self.state.load_full();
        let endpoints = match &control.names {
            Some(names) => Endpoints::clone(&names.watch.borrow()),
            None => state.endpoints(),
        };
        self.publish(Some(control), state.settings.clone(), &endpoints, runtime);
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

    /// Its endpoints as they are now.
    pub fn endpoints(&self) -> Vec<EndpointView> {
        let state = self.state.load();
        state
            .peers
            .iter()
            .map(|peer| EndpointView {
                address: peer.state.addr(),
                host: peer.state.host().clone(),
                weight: peer.weight,
                priority: peer.priority,
                status: peer.state.health.state().as_str(),
                because: peer.state.health.reason().map(|reason| reason.to_string()),
                active: peer.state.active(),
                requests: peer.state.requests(),
                failures: peer.state.failures(),
                counts: peer.state.health.counts(),
            })
            .collect()
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
                _ = parole.tick(), if self.parole => {
                    let Some(cluster) = self.cluster.upgrade() else { return };
                    cluster.parole();
                    continue;
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
    upstream.dns.as_ref().map(|dns| Duration::from_secs(dns.min_ttl.get().into()))
}

/// Endpoints as peers; one that was there before is the same still, and two of one key are one.
fn peers(endpoints: &[Endpoint], before: &[Peer]) -> Vec<Peer> {
    let mut known: HashMap<EndpointKey, Arc<EndpointState>> = HashMap::new();
    // One endpoint is the rule among many small upstreams and needs no map.
    if endpoints.len() > 1 || before.len() > 1 {
        known.extend(before.iter().map(|peer| (peer.state.key().clone(), peer.state.clone())));
    }
    let mut state = |endpoint: &Endpoint| {
        let key = EndpointKey { addr: endpoint.addr, host: endpoint.host.clone() };
        match before {
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
        })
        .collect()
}

#[cfg(test)]
mod tests;
