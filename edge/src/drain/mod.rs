//! Taking a service or a node out of use, and knowing when nothing uses it any more.
//!
//! The order is the one that loses nothing: the node is marked here and at the other gateways, so that nobody chooses it;
//! its registry is told; every gateway confirms that all its workers have seen the mark; what is under way ends. Only
//! then is the drain over, and the application may be stopped. A mark ends by itself when the node, having left its
//! registry, is registered anew.

mod marks_file;
mod peers;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use config::error::ConfigError;
use discovery::notice::{Heard, Named, Notice};
use discovery::{Node, Retire, Retired};
use layers::upstream::cluster::{Cluster, ClusterEnv};
use layers::upstream::drains::{BadNodeName, Mark, NodeName};
use layers::upstream::endpoint::EndpointState;
use layers::worker::turns::{Moment, Turns};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::running::Running;
use marks_file::Kept;
pub(crate) use peers::AMONG_GATEWAYS;
use peers::Peers;

/// How often a drain looks at what has changed.
const PACE: Duration = Duration::from_millis(100);
/// How long a registry that refused is left alone, and how often the others are asked when all is done.
const RETRY: Duration = Duration::from_secs(2);
/// How often clusters that came without a new configuration are looked for.
const LOOK: Duration = Duration::from_secs(5);
/// How long it is waited for that a node which was taken out of its registry is seen to be gone. One that is registered
/// again before that would not be known for a new one.
const NOTICE: Duration = Duration::from_secs(3);
/// Drains at once, so that a script that never undoes does not grow without an end.
const MOST: usize = 1024;

/// What an operator, or another gateway, asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// The name of a service in a registry, the id of an upstream, or an object with an upstream (`routes/7`).
    pub service: String,
    /// One node of it: an address, or a host with or without a port. All of them if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What its registry is told.
    #[serde(default)]
    pub registry: Retire,
    /// For whoever reads the list of drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Between gateways: which one leads, and by which id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub led: Option<Led>,
}

/// The gateway that leads a drain: it tells the registry and asks the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Led {
    pub by: String,
    pub id: String,
}

/// How far a drain has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Some gateway may still choose the node, or the registry still offers it.
    Confirming,
    /// Nobody chooses it any more; requests are under way.
    InFlight,
    /// Nothing uses it: it may be stopped.
    Drained,
}

/// What one gateway says of a drain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observer {
    /// The id of the gateway, or its address while it does not answer.
    pub name: String,
    /// None of its workers chooses the node any more.
    pub confirmed: bool,
    /// Requests under way.
    pub in_flight: u64,
    /// The addresses that it knows the node by.
    pub nodes: Vec<String>,
    /// Why it has not confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A drain, as the Control API shows it.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    pub id: String,
    pub service: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Seconds since 1970.
    pub since: u64,
    pub stage: Stage,
    /// The node is not among the endpoints any more. When it comes back it is a new one, and the drain is over.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub gone: bool,
    /// What each registry answered; none before it was asked, and where nodes come from no registry.
    pub registries: Vec<Retired>,
    /// The gateways, and of the other clients of discovery servers those that have not confirmed.
    pub observers: Vec<Observer>,
}

/// Why a drain was not begun.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    Invalid(#[from] BadNodeName),
    #[error(
        "no upstream here has nodes from `{0}`: write the name of a service in its registry, the id of an upstream, or \
         KIND/ID of an object with an upstream of its own (routes/7)"
    )]
    NoService(String),
    #[error("`{service}` has no node `{node}`; it has {known}")]
    NoNode { service: String, node: String, known: String },
    #[error(
        "`*` stands for whatever has a node: name the node (*/10.0.0.3:8080), or the service that is to be drained whole"
    )]
    Everything,
    #[error("{MOST} drains are on record: undo those that are over (DELETE /v1/drains/ID)")]
    TooMany,
}

/// What a board works with.
pub struct Parts {
    /// What the gateway is called among others.
    pub name: String,
    pub clusters: ClusterEnv,
    pub running: Running,
    pub turns: Turns,
    /// Control APIs of the other gateways. `postern.peers`.
    pub peers: Vec<Node>,
    /// Where drains are kept over a restart.
    pub file: PathBuf,
}

/// The drains of this gateway. Clones are the same.
#[derive(Clone)]
pub struct Board(Arc<Inner>);

struct Inner {
    name: String,
    clusters: ClusterEnv,
    running: Running,
    turns: Turns,
    peers: Peers,
    file: PathBuf,
    warning: Option<String>,
    drains: Mutex<BTreeMap<String, Drain>>,
    /// Drains of other gateways that were undone here, the newest last: whoever leads one hears of it when it asks.
    undone: Mutex<VecDeque<String>>,
    /// Held while the file is written, so that an older list never replaces a newer one.
    writing: Arc<tokio::sync::Mutex<()>>,
}

struct Drain {
    order: Order,
    mark: Mark,
    since: u64,
    /// The clusters that are meant, as of the configuration published at this time.
    clusters: Vec<Weak<Cluster>>,
    looked: Option<(SystemTime, Instant)>,
    /// What was found to be meant. It is asked how much is under way on it also when its registry has forgotten it.
    endpoints: BTreeMap<u64, Arc<EndpointState>>,
    /// From when on workers have to go round.
    marked: Moment,
    confirmed: bool,
    registries: Option<Vec<Retired>>,
    /// Until then the node has to be seen to be gone.
    notice: Option<Instant>,
    others: Vec<Observer>,
    /// Clients of discovery servers that may still use the node, and servers that cannot tell.
    clients: Vec<Observer>,
    /// The node was seen to be gone: when it comes back it is a new one.
    left: bool,
    task: Option<JoinHandle<()>>,
}

impl Drop for Drain {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Drain {
    fn new(order: Order, mark: Mark, since: u64, marked: Moment) -> Self {
        Self {
            order,
            mark,
            since,
            clusters: Vec::new(),
            looked: None,
            endpoints: BTreeMap::new(),
            marked,
            confirmed: false,
            registries: None,
            notice: None,
            others: Vec::new(),
            clients: Vec::new(),
            left: false,
            task: None,
        }
    }

    fn meant(&self) -> Meant {
        let clusters = self.clusters.iter().filter_map(Weak::upgrade);
        Meant {
            services: clusters.flat_map(|cluster| cluster.services()).map(|(_, service)| service).collect(),
            node: self.mark.node.clone(),
            endpoints: self.endpoints.values().map(|state| (state.host().clone(), state.addr())).collect(),
        }
    }

    fn observer(&self, name: &str) -> Observer {
        let nodes: BTreeSet<_> = self.endpoints.values().map(|endpoint| endpoint.addr()).collect();
        Observer {
            name: name.to_owned(),
            confirmed: self.confirmed,
            in_flight: self.endpoints.values().map(|endpoint| u64::from(endpoint.active())).sum(),
            nodes: nodes.iter().map(ToString::to_string).collect(),
            problem: (!self.confirmed).then(|| "some worker has not seen the mark yet".to_owned()),
        }
    }

    /// The registries have done what they were told.
    fn is_retired(&self) -> bool {
        self.registries.as_ref().is_some_and(|all| all.iter().all(|one| one.done))
    }

    fn kept(&self) -> Kept {
        Kept { order: self.order.clone(), since: self.since, told: self.is_retired(), gone: self.left }
    }

    fn view(&self, id: &str, name: &str) -> View {
        let mut observers = vec![self.observer(name)];
        observers.extend(self.others.iter().chain(&self.clients).cloned());
        let registries = self.registries.clone().unwrap_or_default();
        let noticed = self.left || self.notice.is_none_or(|until| Instant::now() >= until);
        let told = self.order.led.is_some() || self.is_retired() && noticed;
        let stage = if !told || observers.iter().any(|observer| !observer.confirmed) {
            Stage::Confirming
        } else if observers.iter().any(|observer| observer.in_flight > 0) {
            Stage::InFlight
        } else {
            Stage::Drained
        };
        View {
            id: id.to_owned(),
            service: self.order.service.clone(),
            node: self.order.node.clone(),
            reason: self.order.reason.clone(),
            since: self.since,
            stage,
            gone: self.left,
            registries,
            observers,
        }
    }
}

/// What has become of the node of a drain since it was looked at last.
enum Seen {
    Same,
    /// It is not among the endpoints any more.
    Left,
    /// It had left, and is there again.
    Back,
}

/// What registries are told of: services and a node, as gateways know it.
struct Meant {
    services: HashSet<Arc<str>>,
    node: Option<NodeName>,
    endpoints: Vec<(Arc<str>, SocketAddr)>,
}

impl Meant {
    /// The nodes by the names that registries may have for them; none for all.
    fn named(&self) -> Vec<Named> {
        let Some(node) = &self.node else { return Vec::new() };
        let own = match node {
            NodeName::Address(addr) => (Some(addr.ip().to_string().into()), Some(addr.port())),
            NodeName::Ip(ip) => (Some(ip.to_string().into()), None),
            NodeName::Host { name, port } => (Some(name.clone()), *port),
        };
        let known = self.endpoints.iter().map(|(host, addr)| (Some(host.clone()), Some(addr.port())));
        let all: BTreeSet<_> = known.chain([own]).map(|(host, port)| Named { host, port }).collect();
        all.into_iter().collect()
    }

    /// Whether a registry means the node by `listed`. An address may be that of a name which a registry lists.
    fn is_node(&self, listed: &Node) -> bool {
        let Some(node) = &self.node else { return true };
        match discovery::literal(&listed.host) {
            Some(ip) => node.is(SocketAddr::new(ip, listed.port), &listed.host),
            None => {
                self.endpoints.iter().any(|(host, addr)| *host == listed.host && addr.port() == listed.port)
            }
        }
    }
}

impl Board {
    /// A board with the drains of the process before. Their marks are set at once, before anything is compiled.
    ///
    /// # Errors
    /// The client for the other gateways cannot be set up.
    pub fn new(parts: Parts) -> Result<Self, ConfigError> {
        let Parts { name, clusters, running, turns, peers, file } = parts;
        let peers = Peers::new(&peers, &clusters.tls, &clusters.discovery, &clusters.control)?;
        let (kept, warning) = marks_file::restore(&file);
        if let Some(warning) = &warning {
            tracing::error!("{warning}");
        }
        let drains = kept.into_iter().filter_map(|(id, kept)| {
            let mark = mark(&id, &kept.order)
                .inspect_err(|error| tracing::error!(%error, id, "a drain that was kept is left out"))
                .ok()?;
            let mut drain = Drain::new(kept.order, mark, kept.since, turns.now());
            // An instance that has come back meanwhile must not be taken out again.
            drain.registries = kept.told.then(Vec::new);
            drain.left = kept.gone;
            Some((id, drain))
        });
        let board = Self(Arc::new(Inner {
            name,
            drains: Mutex::new(drains.collect()),
            undone: Mutex::default(),
            clusters,
            running,
            turns,
            peers,
            file,
            warning,
            writing: Arc::default(),
        }));
        let mut drains = board.0.drains();
        board.0.set_marks(drains.values());
        for (id, drain) in &mut *drains {
            drain.task = Some(board.follow(id));
        }
        drop(drains);
        Ok(board)
    }

    /// Begins a drain. The mark is set when this returns; the rest goes on by itself. The same order again is the same
    /// drain.
    ///
    /// # Errors
    /// Nothing is meant by it.
    pub async fn begin(&self, order: Order) -> Result<View, Refusal> {
        let inner = &*self.0;
        let id = order.led.as_ref().map_or_else(|| uuid::Uuid::now_v7().to_string(), |led| led.id.clone());
        let mark = mark(&id, &order)?;
        if *mark.service == *"*" && mark.node.is_none() {
            return Err(Refusal::Everything);
        }
        let view = {
            let mut drains = inner.drains();
            let is_same = |drain: &Drain| {
                let known = &drain.order;
                (&known.service, &known.node, &known.led) == (&order.service, &order.node, &order.led)
            };
            if let Some(same) = drains.values_mut().find(|drain| is_same(drain)) {
                // Who says something else to its registry now is not told that it was done.
                if same.order.registry != order.registry && order.registry != Retire::Keep {
                    same.order.registry = order.registry;
                    same.registries = None;
                }
                return Ok(same.view(&same.mark.id, &inner.name));
            }
            // Another gateway may know nodes that this one does not: whoever leads has looked.
            if order.led.is_none() {
                inner.is_known(&order, &mark)?;
            }
            if drains.len() >= MOST {
                return Err(Refusal::TooMany);
            }
            let (service, node) = (&order.service, order.node.as_deref().unwrap_or("all nodes"));
            tracing::info!(service, node, id, "draining");
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let mut drain = Drain::new(order, mark, now, inner.turns.now());
            if drain.order.led.is_none() {
                drain.others = inner.peers.not_asked();
            }
            inner.set_marks(drains.values().chain([&drain]));
            inner.find(&mut drain);
            drain.task = Some(self.follow(&id));
            let view = drain.view(&id, &inner.name);
            drains.insert(id, drain);
            view
        };
        inner.keep().await;
        Ok(view)
    }

    /// All drains.
    pub fn views(&self) -> Vec<View> {
        self.0.drains().iter().map(|(id, drain)| drain.view(id, &self.0.name)).collect()
    }

    /// What somebody has to know of the drains of an earlier process.
    pub fn warning(&self) -> Option<&str> {
        self.0.warning.as_deref()
    }

    /// One of them.
    pub fn view(&self, id: &str) -> Option<View> {
        self.0.drains().get(id).map(|drain| drain.view(id, &self.0.name))
    }

    /// Ends a drain: the nodes are used again. Returns what could not be undone; nothing if there is no such drain. Where
    /// another gateway leads it, that one is told, unless it is a gateway that tells it (`among_gateways`).
    pub async fn undo(&self, id: &str, among_gateways: bool) -> Option<Vec<String>> {
        let inner = &*self.0;
        if !among_gateways {
            inner.note_undone(id);
        }
        let mut drain = inner.end(id)?;
        if let Some(task) = drain.task.take() {
            // Otherwise it might tell another gateway of the drain that has just been told that it is over.
            task.abort();
            let _ = task.await;
        }
        inner.keep().await;
        Some(match &drain.order.led {
            None => inner.undo(id, &drain).await,
            Some(_) if among_gateways => Vec::new(),
            Some(_) => inner.peers.undo(&inner.led(id)).await,
        })
    }

    /// Whether it is a drain of another gateway that was undone here.
    pub fn is_undone(&self, id: &str) -> bool {
        self.0.undone().iter().any(|undone| undone == id)
    }

    fn follow(&self, id: &str) -> JoinHandle<()> {
        let (inner, id) = (Arc::downgrade(&self.0), id.to_owned());
        self.0.clusters.control.spawn(follow(inner, id))
    }
}

/// Looks after one drain until it ends.
async fn follow(inner: Weak<Inner>, id: String) {
    // What others take their time for must not hold up what is known here.
    tokio::select! {
        ended = look(&inner, &id) => {
            let (Some(drain), Some(inner)) = (ended, inner.upgrade()) else { return };
            inner.keep().await;
            if drain.order.led.is_none() {
                let (meant, led) = (drain.meant(), inner.led(&id));
                tokio::join!(inner.over(&id, &meant, Retire::Keep), inner.peers.undo(&led));
            }
        }
        () = lead(&inner, &id) => {
            tracing::info!(id, "another gateway was told to undo a drain: it is over");
            let Some(inner) = inner.upgrade() else { return };
            let Some(drain) = inner.end(&id) else { return };
            inner.keep().await;
            for problem in inner.undo(&id, &drain).await {
                tracing::warn!(id, problem, "a drain was not undone everywhere");
            }
        }
    }
}

/// Sees what becomes of it here, until it is taken off the list or ends by itself: then it is given.
async fn look(inner: &Weak<Inner>, id: &str) -> Option<Drain> {
    while let Some(inner) = inner.upgrade() {
        match inner.look(id)? {
            Seen::Same => {}
            Seen::Left => inner.keep().await,
            Seen::Back => {
                tracing::info!(id, "a node that was drained is registered anew: the drain is over");
                return inner.end(id);
            }
        }
        drop(inner);
        tokio::time::sleep(PACE).await;
    }
    None
}

/// Tells the registries until they have done it, and asks the other gateways, if this is the one that leads. Returns when
/// one of them says that the drain was undone there.
async fn lead(inner: &Weak<Inner>, id: &str) {
    let mut told = None::<Instant>;
    while let Some(inner) = inner.upgrade() {
        let led = inner.order(id).filter(|(order, ..)| order.led.is_none());
        let Some((order, meant, is_known, drained)) = led else {
            // Somebody else leads, or it has ended.
            break;
        };
        // After a start nobody can be told before it is known what is meant.
        let is_due = is_known && !inner.is_retired(id) && told.is_none_or(|last| last.elapsed() >= RETRY);
        let Some(others) = inner.peers.observe(&order, &inner.led(id)).await else { return };
        let notice = Notice {
            id: id.to_owned(),
            nodes: meant.named(),
            retire: if is_due { order.registry } else { Retire::Keep },
            over: false,
            // These are asked by themselves.
            except: others.iter().map(|other| &other.name).chain([&inner.name]).cloned().collect(),
        };
        inner.change(id, |drain| drain.others = others);
        // What one of them takes its time for must not hold up the other.
        let (heard, mut retired) = tokio::join!(
            inner.clusters.discovery.pass_on(&notice, &meant.services),
            inner.retire(&meant, notice.retire, false),
        );
        retired.extend(heard.iter().flat_map(retired_by));
        inner.change(id, |drain| {
            drain.clients = clients(&heard);
            if is_due {
                let is_out = notice.retire == Retire::Deregister && !retired.is_empty();
                drain.notice = is_out.then(|| Instant::now() + NOTICE);
                drain.registries = Some(retired);
            }
        });
        if is_due {
            told = Some(Instant::now());
            if inner.is_retired(id) {
                inner.keep().await;
            }
        }
        drop(inner);
        tokio::time::sleep(if drained { RETRY } else { PACE }).await;
    }
    std::future::pending().await
}

/// What the registries of a discovery server did, or that it could not be told.
fn retired_by(heard: &Heard) -> Vec<Retired> {
    if heard.answered {
        return heard.retired.clone();
    }
    let why = heard.problem.clone();
    vec![Retired { source: server(&heard.server), instance: String::new(), done: false, why }]
}

/// Who is waited for among the clients of discovery servers.
fn clients(heard: &[Heard]) -> Vec<Observer> {
    let late = |name: String, problem: &str| Observer {
        name,
        problem: Some(problem.to_owned()),
        ..Observer::default()
    };
    let mut all = Vec::new();
    for heard in heard {
        all.extend(heard.late.iter().map(|(name, why)| late(name.clone(), why)));
        if heard.more > 0 {
            let name = format!("{} more clients of {}", heard.more, server(&heard.server));
            all.push(late(name, "they have not confirmed yet that they use it no more"));
        }
        all.extend(heard.problem.iter().map(|problem| late(server(&heard.server), problem)));
    }
    // Two of its services may be concerned, and it may have moved from one server to another.
    let mut seen = HashSet::new();
    all.retain(|one: &Observer| seen.insert(one.name.clone()));
    all
}

fn server(address: &str) -> String {
    format!("discovery server {address}")
}

impl Inner {
    fn drains(&self) -> MutexGuard<'_, BTreeMap<String, Drain>> {
        self.drains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Drain)) {
        if let Some(drain) = self.drains().get_mut(id) {
            change(drain);
        }
    }

    fn led(&self, id: &str) -> Led {
        Led { by: self.name.clone(), id: id.to_owned() }
    }

    /// Makes the marks those of these drains, and has every cluster that is concerned look at them.
    fn set_marks<'a>(&self, drains: impl Iterator<Item = &'a Drain>) {
        self.clusters.drains.set(drains.map(|drain| drain.mark.clone()).collect());
    }

    /// The clusters that the mark is for.
    fn meant(&self, mark: &Mark) -> Vec<Arc<Cluster>> {
        let clusters = self.running.configuration().compiler.every_cluster();
        clusters.into_iter().filter(|cluster| cluster.is_meant(mark)).collect()
    }

    /// The mark of a drain and the clusters that it is for. There may be a hundred thousand to look through: that is done
    /// again only when another configuration was published, and now and then for those that come without one.
    fn clusters_of(&self, id: &str) -> Option<(Mark, Vec<Arc<Cluster>>)> {
        let published = self.running.progress().borrow().at;
        let mark = {
            let drains = self.drains();
            let drain = drains.get(id)?;
            if drain.looked.is_some_and(|(at, when)| at == published && when.elapsed() < LOOK) {
                let clusters = drain.clusters.iter().filter_map(Weak::upgrade).collect();
                return Some((drain.mark.clone(), clusters));
            }
            drain.mark.clone()
        };
        let clusters = self.meant(&mark);
        self.change(id, |drain| {
            drain.clusters = clusters.iter().map(Arc::downgrade).collect();
            drain.looked = Some((published, Instant::now()));
        });
        Some((mark, clusters))
    }

    /// Refuses what names nothing.
    fn is_known(&self, order: &Order, mark: &Mark) -> Result<(), Refusal> {
        let clusters = self.meant(mark);
        if clusters.is_empty() {
            return Err(Refusal::NoService(order.service.clone()));
        }
        if clusters.iter().any(|cluster| !cluster.covered(mark).is_empty()) {
            return Ok(());
        }
        let views = clusters.iter().flat_map(|cluster| cluster.endpoints());
        let known: BTreeSet<_> = views.map(|endpoint| endpoint.address.to_string()).collect();
        let known = known.into_iter().take(20).collect::<Vec<_>>().join(", ");
        Err(Refusal::NoNode {
            service: order.service.clone(),
            node: order.node.clone().unwrap_or_default(),
            known: if known.is_empty() { "none now".to_owned() } else { known },
        })
    }

    /// Has the clusters of a drain look at the marks again, and notes which endpoints are meant.
    fn find(&self, drain: &mut Drain) {
        let clusters = self.meant(&drain.mark);
        for cluster in &clusters {
            cluster.refresh(&self.clusters.control);
            let found = cluster.covered(&drain.mark).into_iter().map(|state| (state.id(), state));
            drain.endpoints.extend(found);
        }
        drain.clusters = clusters.iter().map(Arc::downgrade).collect();
        drain.marked = self.turns.now();
    }

    /// What was ordered, what is meant by it, whether that is known, and whether it is through.
    fn order(&self, id: &str) -> Option<(Order, Meant, bool, bool)> {
        let drains = self.drains();
        let drain = drains.get(id)?;
        let is_known = drain.left || !drain.endpoints.is_empty();
        let drained = drain.view(id, &self.name).stage == Stage::Drained;
        Some((drain.order.clone(), drain.meant(), is_known, drained))
    }

    /// Sees what becomes of a drain here; none if it is not on the list any more.
    fn look(&self, id: &str) -> Option<Seen> {
        let (mark, clusters) = self.clusters_of(id)?;
        let seen = self.drains().get(id).is_some_and(|drain| !drain.endpoints.is_empty());
        // Looked at first, so that what becomes known in between is not missed.
        let sure = !clusters.is_empty() && clusters.iter().all(|cluster| cluster.is_sure(seen));
        let present: Vec<_> = clusters.iter().flat_map(|cluster| cluster.covered(&mark)).collect();
        let mut drains = self.drains();
        let drain = drains.get_mut(id)?;
        let known = drain.endpoints.len();
        let is_there = !present.is_empty();
        drain.endpoints.extend(present.into_iter().map(|state| (state.id(), state)));
        if drain.endpoints.len() > known {
            // It came marked: whoever published it looked at the marks first.
            drain.marked = self.turns.now();
            drain.confirmed = false;
        }
        if !drain.confirmed {
            drain.confirmed = self.turns.behind(&drain.marked) == 0;
        }
        if drain.left && is_there {
            return Some(Seen::Back);
        }
        // After a start it has not left only because nobody knows it yet.
        if !drain.left && !is_there && sure {
            drain.left = true;
            return Some(Seen::Left);
        }
        Some(Seen::Same)
    }

    fn is_retired(&self, id: &str) -> bool {
        self.drains().get(id).is_some_and(Drain::is_retired)
    }

    /// Tells the registries of the service.
    async fn retire(&self, meant: &Meant, how: Retire, undo: bool) -> Vec<Retired> {
        if how == Retire::Keep {
            return Vec::new();
        }
        let is_meant = |service: &str, node: &Node| meant.services.contains(service) && meant.is_node(node);
        self.clusters.discovery.retire(is_meant, how, undo).await
    }

    /// Tells discovery servers that a drain is over.
    async fn over(&self, id: &str, meant: &Meant, retire: Retire) -> Vec<Heard> {
        let (id, nodes, except) = (id.to_owned(), meant.named(), Vec::new());
        let notice = Notice { id, nodes, retire, over: true, except };
        self.clusters.discovery.pass_on(&notice, &meant.services).await
    }

    fn undone(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.undone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a drain which another gateway leads is undone here. That one would tell of it again otherwise.
    fn note_undone(&self, id: &str) {
        if self.drains().get(id).is_some_and(|drain| drain.order.led.is_some()) {
            let mut undone = self.undone();
            if undone.len() >= MOST {
                undone.pop_front();
            }
            undone.push_back(id.to_owned());
        }
    }

    /// Has everybody use the nodes of a drain again that is led from here. Returns what could not be undone.
    async fn undo(&self, id: &str, drain: &Drain) -> Vec<String> {
        let mut problems = self.peers.undo(&self.led(id)).await;
        let meant = drain.meant();
        let mut retired = self.retire(&meant, drain.order.registry, true).await;
        for heard in self.over(id, &meant, drain.order.registry).await {
            problems.extend(heard.problem.map(|why| format!("{}: {why}", server(&heard.server))));
            retired.extend(heard.retired);
        }
        for retired in retired {
            problems.extend(retired.why.map(|why| format!("{}: {why}", retired.source)));
        }
        problems
    }

    /// Takes a drain off the list and lets its nodes be used again.
    fn end(&self, id: &str) -> Option<Drain> {
        let mut drains = self.drains();
        let drain = drains.remove(id)?;
        self.set_marks(drains.values());
        drop(drains);
        for cluster in self.meant(&drain.mark) {
            cluster.refresh(&self.clusters.control);
        }
        Some(drain)
    }

    /// Writes the list down. What cannot be written is in force all the same.
    async fn keep(&self) {
        let turn = self.writing.clone().lock_owned().await;
        let kept: BTreeMap<_, _> =
            self.drains().iter().map(|(id, drain)| (id.clone(), drain.kept())).collect();
        let file = self.file.clone();
        // Whoever waits here may be ended before it is written: the next one has its turn after that all the same.
        let write = move || {
            let written = marks_file::write(&file, &kept);
            drop(turn);
            written
        };
        let written = tokio::task::spawn_blocking(write).await;
        if let Err(error) = written.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            tracing::error!(%error, file = ?self.file, "drains cannot be kept; after a restart they are forgotten");
        }
    }
}

fn mark(id: &str, order: &Order) -> Result<Mark, BadNodeName> {
    let node = order.node.as_deref().map(str::parse::<NodeName>).transpose()?;
    Ok(Mark { id: id.into(), service: order.service.as_str().into(), node })
}
