//! An upstream for as long as its id lives: its settings, its endpoints, and what is thought of them.
//!
//! Workers read one immutable [`State`]; the control side replaces it when the resource is edited, when a name resolves
//! to other addresses, or when a verdict changes. Endpoints that stay keep their state, so that an edit forgets neither
//! health nor latency. Routes hold the cluster and are not touched by any of this.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use config::error::ConfigError;
use config::upstream::Upstream;
use discovery::{Discovery, Endpoints, Node, Watch};
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
use super::round_robin::Cursor;
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

/// What the control side keeps for one cluster.
struct Control {
    nodes: Vec<Node>,
    min_ttl: Option<Duration>,
    watch: Watch,
    /// Follows names and verdicts; there is none where neither can change.
    follower: Option<JoinHandle<()>>,
    probes: Probes,
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
    cursor: Arc<Cursor>,
    /// A verdict flipped: the picker is old.
    flipped: Arc<Notify>,
    control: Mutex<Option<Control>>,
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
        let settings = Settings::compile(upstream, client.as_ref(), env, None)?;
        let nodes = nodes(upstream)?;
        let min_ttl = min_ttl(upstream);
        let watch = env.discovery.watch(&nodes, min_ttl);
        let cursor = Arc::<Cursor>::default();
        let state = state(Arc::new(settings), &watch.borrow(), &[], &cursor);
        let cluster = Arc::new(Self {
            key: key.into(),
            state: ArcSwap::from_pointee(state),
            budget: Budget::new(),
            cursor,
            flipped: Arc::default(),
            control: Mutex::new(None),
        });
        let control = Control { nodes, min_ttl, watch, follower: None, probes: Probes::default() };
        cluster.follow(control, env);
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
        let before = self.state.load_full();
        let settings = Settings::compile(upstream, client.as_ref(), env, Some(&before.settings))?;
        let (nodes, min_ttl) = (nodes(upstream)?, min_ttl(upstream));
        let kept =
            self.control().take().filter(|control| control.nodes == nodes && control.min_ttl == min_ttl);
        let watch = match &kept {
            Some(control) => control.watch.clone(),
            None => env.discovery.watch(&nodes, min_ttl),
        };
        if !settings.checks.any() {
            before.peers.iter().for_each(|peer| peer.state.health.reset());
        }
        let state = state(Arc::new(settings), &watch.borrow(), &before.peers, &self.cursor);
        self.state.store(Arc::new(state));
        // Probes are matched with the endpoints anew; those of endpoints and checks that stay go on.
        let probes = kept.map(|mut control| std::mem::take(&mut control.probes)).unwrap_or_default();
        self.follow(Control { nodes, min_ttl, watch, follower: None, probes }, env);
        Ok(())
    }

    /// The key of the object that holds the upstream.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// APISIX `scheme`.
    pub fn scheme(&self) -> &'static str {
        self.state.load().settings.scheme()
    }

    /// What a request goes by.
    pub(crate) fn state(&self) -> Guard<Arc<State>> {
        self.state.load()
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
        let Some(control) = control.as_ref() else { return Vec::new() };
        let endpoints = control.watch.borrow();
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
        let watch = self.control().as_ref().map(|control| control.watch.clone());
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
            self.flipped.notify_one();
        }
    }

    /// Tells the status of an answer to the passive check.
    pub(crate) fn report_status(&self, state: &State, endpoint: &EndpointState, status: u16) {
        if let Some(report) = state.settings.checks.passive.as_ref().and_then(|judge| judge.status(status)) {
            self.report(state, endpoint, report);
        }
    }

    fn control(&self) -> MutexGuard<'_, Option<Control>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts what keeps the cluster up to date, where something can change by itself.
    fn follow(self: &Arc<Self>, mut control: Control, env: &ClusterEnv) {
        let state = self.state.load();
        let named = control.nodes.iter().any(|node| discovery::literal(&node.host).is_none());
        let checked = state.settings.checks.any();
        control.probes.settle(
            &self.key,
            &state.settings.checks,
            &peers_of(&state),
            &self.flipped,
            &env.control,
        );
        if named || checked {
            let follower = follow(
                Arc::downgrade(self),
                control.watch.clone(),
                self.flipped.clone(),
                env.control.clone(),
            );
            control.follower = Some(env.control.spawn(follower));
        }
        *self.control() = Some(control);
    }

    /// Builds the picker again, with the endpoints that discovery says.
    fn refresh(&self, endpoints: &Endpoints, runtime: &Handle) {
        let before = self.state.load_full();
        let mut control = self.control();
        // An edit replaces the control block and the state under this lock's neighbourhood; the newer one wins.
        let Some(control) = control.as_mut() else { return };
        if !Arc::ptr_eq(&before, &self.state.load()) {
            return;
        }
        let settings = before.settings.clone();
        let next = state(settings, endpoints, &before.peers, &self.cursor);
        if next.picker.degraded() && !before.picker.degraded() {
            tracing::error!(upstream = %self.key, "every node is unhealthy; all of them are used");
        }
        control.probes.settle(&self.key, &next.settings.checks, &peers_of(&next), &self.flipped, runtime);
        self.state.store(Arc::new(next));
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
            self.flipped.notify_one();
        }
    }
}

/// Follows names and verdicts for as long as the cluster lives.
async fn follow(cluster: Weak<Cluster>, mut watch: Watch, flipped: Arc<Notify>, runtime: Handle) {
    let mut parole = tokio::time::interval(PAROLE);
    parole.tick().await;
    let mut named = true;
    loop {
        tokio::select! {
            changed = watch.changed(), if named => named = changed.is_ok(),
            () = flipped.notified() => {}
            _ = parole.tick() => {
                let Some(cluster) = cluster.upgrade() else { return };
                cluster.parole();
                continue;
            }
        }
        let Some(cluster) = cluster.upgrade() else { return };
        let endpoints = watch.borrow_and_update().clone();
        cluster.refresh(&endpoints, &runtime);
    }
}

fn peers_of(state: &State) -> Vec<Arc<EndpointState>> {
    state.peers.iter().map(|peer| peer.state.clone()).collect()
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

/// The state of these endpoints; those that were there before keep theirs.
fn state(settings: Arc<Settings>, endpoints: &Endpoints, before: &[Peer], cursor: &Arc<Cursor>) -> State {
    let known: HashMap<&EndpointKey, &Arc<EndpointState>> =
        before.iter().map(|peer| (peer.state.key(), &peer.state)).collect();
    let peers: Vec<Peer> = endpoints
        .list
        .iter()
        .map(|endpoint| {
            let key = EndpointKey { addr: endpoint.addr, host: endpoint.host.clone() };
            let state = match known.get(&key) {
                Some(state) => Arc::clone(state),
                None => Arc::new(EndpointState::new(key)),
            };
            Peer { state, weight: endpoint.weight, siblings: endpoint.siblings, priority: endpoint.priority }
        })
        .collect();
    let picker = Picker::new(settings.algorithm, &peers, settings.fail_open, cursor);
    let unresolved = endpoints.pending > 0 || !endpoints.failures.is_empty();
    State { picker, peers, unresolved, settings }
}
