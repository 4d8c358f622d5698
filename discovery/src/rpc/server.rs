//! The server's side: one topic for each service, one session for each client.
//!
//! A session sends a state of a service only when the one before was answered, made from what there is at that moment, so
//! that nothing is queued for a slow client: it skips states. What a client has confirmed stays known for a while after it
//! is gone, because it goes on using that.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use certs::grpc::{self, Caller};
use futures_util::stream::{self, FuturesUnordered, Stream, StreamExt};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use super::drains::{Drains, covers};
use super::proto;
use super::proto::client_message::Body as FromClient;
use super::proto::discovery_server::{Discovery as Rpc, DiscoveryServer};
use super::proto::server_message::Body as FromServer;
use super::topic::{State, Topic};
use crate::source::Query;
use crate::{Discovery, Node, Retire, Retired, Target};

/// A message of a client is a name or an answer.
const LONGEST_MESSAGE: usize = 64 * 1024;
const HELLO: Duration = Duration::from_secs(10);
/// Clients that one answer about a drain names.
const MOST_LATE: usize = 100;
/// Calls of one connection: the stream, and somebody who asks who the clients are.
const CALLS: u32 = 8;

/// What a server allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time. Those beyond are closed at once.
    pub clients: usize,
    /// Services that one client may follow.
    pub subscriptions: usize,
    /// How long a client that is gone is known.
    pub linger: Duration,
    /// Whether clients may have nodes drained.
    pub drains: bool,
    /// How long after the start clients of before may not be back yet.
    pub returning: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 10_000,
            subscriptions: 1_000,
            linger: Duration::from_secs(300),
            drains: false,
            returning: Duration::from_secs(5),
        }
    }
}

/// A discovery server; clones are the same one.
#[derive(Clone, Debug)]
pub struct Server(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    discovery: Discovery,
    limits: Limits,
    epoch: u64,
    topics: Mutex<HashMap<(String, Query), Weak<Topic>>>,
    drains: Drains,
    begun: Instant,
    clients: Mutex<BTreeMap<u64, Arc<Client>>>,
    next: AtomicU64,
}

/// What is known of a client.
#[derive(Debug)]
struct Client {
    hello: proto::Hello,
    address: String,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    heard: Instant,
    /// Since when it is gone.
    gone: Option<Instant>,
    subscriptions: BTreeMap<u64, Followed>,
}

/// A service that a client follows.
#[derive(Clone, Debug)]
struct Followed {
    topic: Arc<Topic>,
    sent: u64,
    confirmed: u64,
    refused: String,
}

impl Server {
    /// A server that follows services with the sources of this discovery.
    pub fn new(discovery: Discovery, limits: Limits) -> Self {
        Self(Arc::new(Inner {
            discovery,
            limits,
            epoch: fastrand::u64(1..),
            topics: Mutex::default(),
            drains: Drains::default(),
            begun: Instant::now(),
            clients: Mutex::default(),
            next: AtomicU64::new(0),
        }))
    }

    /// Serves until it is dropped.
    pub async fn serve(self, listener: TcpListener, tls: Option<Arc<ServerConfig>>) {
        // Ends with the server.
        let mut sweep = tokio::task::JoinSet::new();
        sweep.spawn(self.clone().sweep());
        let limits = grpc::Limits { connections: self.0.limits.clients, calls: CALLS };
        let rpc = DiscoveryServer::new(self).max_decoding_message_size(LONGEST_MESSAGE);
        grpc::serve(listener, tls, limits, rpc).await;
    }

    /// Forgets drains that are not said any more.
    async fn sweep(self) {
        let mut pace = tokio::time::interval(Duration::from_secs(1));
        loop {
            pace.tick().await;
            self.0.drains.sweep();
        }
    }

    /// Who follows what, and what each has confirmed; see `ListClients`.
    pub fn clients(&self, service: Option<(&str, &Query)>, before: u64) -> Vec<proto::Client> {
        let mut known = self.known();
        let linger = self.0.limits.linger;
        known.retain(|_, client| client.progress().gone.is_none_or(|gone| gone.elapsed() < linger));
        let wanted = service.map(|(kind, query)| proto::Service::new(kind, query));
        let clients = known.values().map(|client| client.view());
        let fits = |subscription: &proto::Subscription| {
            wanted.as_ref().is_none_or(|wanted| subscription.service.as_ref() == Some(wanted))
                && (before == 0 || subscription.confirmed < before)
        };
        clients
            .filter_map(|mut client| {
                client.subscriptions.retain(fits);
                let all = wanted.is_none() && before == 0;
                (all || !client.subscriptions.is_empty()).then_some(client)
            })
            .collect()
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Client>>> {
        self.0.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a client in. One of the same name that is gone is the same one, come back.
    fn enter(&self, hello: proto::Hello, address: Option<SocketAddr>) -> (u64, Arc<Client>) {
        let mut known = self.known();
        let linger = self.0.limits.linger;
        known.retain(|_, client| {
            let progress = client.progress();
            progress.gone.is_none_or(|gone| gone.elapsed() < linger && client.hello.name != hello.name)
        });
        // Names that nobody uses twice would fill the memory: those that have been gone longest make room.
        while known.len() >= self.0.limits.clients * 2 {
            let gone = known.iter().filter_map(|(id, client)| Some((client.progress().gone?, *id))).min();
            let Some((_, id)) = gone else { break };
            known.remove(&id);
        }
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let client = Arc::new(Client {
            hello,
            address: address.map(|address| address.to_string()).unwrap_or_default(),
            progress: Mutex::new(Progress {
                heard: Instant::now(),
                gone: None,
                subscriptions: BTreeMap::new(),
            }),
        });
        known.insert(id, Arc::clone(&client));
        (id, client)
    }

    /// Takes nodes out of use for the clients, and says which of them may still use one; see `Drain`.
    async fn drain(&self, asked: proto::DrainRequest) -> proto::DrainResponse {
        let mut answer = proto::DrainResponse::default();
        let how = Retire::from(asked.retire());
        let allowed = self.0.limits.drains;
        if allowed {
            let (services, nodes) = (asked.services.clone(), asked.nodes.clone());
            if !self.0.drains.set(asked.id, (!asked.end).then_some((services, nodes))) {
                answer.problem = "there are too many drains".to_owned();
            }
            let is_meant = |kind: &str, query: &Query, node: &Node| {
                let is_it = |service: &proto::Service| service.kind == kind && service.query() == *query;
                asked.services.iter().any(is_it) && covers(&asked.nodes, &node.host, node.port.into())
            };
            answer.retired = match how {
                Retire::Keep => Vec::new(),
                how => {
                    let retired = self.0.discovery.retire_where(is_meant, how, asked.end).await;
                    retired.into_iter().map(Into::into).collect()
                }
            };
        }
        if asked.end {
            return answer;
        }
        for service in &asked.services {
            self.late(service, &asked.nodes, &asked.except, &mut answer);
        }
        if self.0.begun.elapsed() < self.0.limits.returning {
            answer.problem = "it has just started: not all of its clients may be back yet".to_owned();
        } else if !allowed && !answer.late.is_empty() {
            answer.problem = "it lets nobody drain: set postern.discovery_server.drains there".to_owned();
        }
        answer
    }

    /// The clients that may still use nodes of a service.
    fn late(
        &self,
        service: &proto::Service,
        nodes: &[proto::Node],
        except: &[String],
        answer: &mut proto::DrainResponse,
    ) {
        let place = (service.kind.clone(), service.query());
        let topics = self.0.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(topic) = topics.get(&place).and_then(Weak::upgrade) else { return };
        drop(topics);
        let since = topic.unused_since(nodes);
        for client in self.clients(Some((&service.kind, &place.1)), since.unwrap_or(u64::MAX)) {
            let name = client.hello.map(|hello| hello.name).unwrap_or_default();
            if except.contains(&name) {
                continue;
            }
            if answer.late.len() >= MOST_LATE {
                answer.more += 1;
                continue;
            }
            let why = match since {
                None => "the node is still offered to it".to_owned(),
                Some(_) if !client.connected => {
                    format!("gone for {} s, and may still use it", client.silent_ms / 1000)
                }
                Some(_) => "has not confirmed yet that it uses it no more".to_owned(),
            };
            answer.late.push(proto::Late { name, address: client.address, why });
        }
    }

    /// The topic of a service, shared by those who follow it.
    fn topic(&self, service: &proto::Service) -> Result<Arc<Topic>, String> {
        let query = service.query();
        let mut topics = self.0.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let place = (service.kind.clone(), query.clone());
        if let Some(topic) = topics.get(&place).and_then(Weak::upgrade) {
            return Ok(topic);
        }
        let target = Target::service("discovery server", service.kind.as_str(), query.clone());
        self.0.discovery.check(&target).map_err(|error| error.to_string())?;
        let follows = self.0.discovery.follow(&service.kind, &query, target.guards.empty_confirm);
        let topic = Arc::new(Topic::new(service.clone(), follows, self.0.drains.watch()));
        topics.retain(|_, topic| topic.strong_count() > 0);
        topics.insert(place, Arc::downgrade(&topic));
        Ok(topic)
    }
}

impl Client {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn view(&self) -> proto::Client {
        let progress = self.progress();
        let subscriptions = progress.subscriptions.values().map(|followed| proto::Subscription {
            service: Some(followed.topic.service.clone()),
            version: followed.topic.version(),
            sent: followed.sent,
            confirmed: followed.confirmed,
            refused: followed.refused.clone(),
        });
        proto::Client {
            hello: Some(self.hello.clone()),
            address: self.address.clone(),
            connected: progress.gone.is_none(),
            silent_ms: u64::try_from(progress.heard.elapsed().as_millis()).unwrap_or(u64::MAX),
            subscriptions: subscriptions.collect(),
        }
    }
}

type Messages = Pin<Box<dyn Stream<Item = Result<proto::ServerMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Rpc for Server {
    type WatchEndpointsStream = Messages;

    async fn watch_endpoints(
        &self,
        request: Request<Streaming<proto::ClientMessage>>,
    ) -> Result<Response<Messages>, Status> {
        let peer = Caller::of(&request).address;
        let mut messages = request.into_inner();
        // One message waits here, one is on its way; what a client has not taken yet is not made.
        let (sender, receiver) = mpsc::channel(1);
        let server = self.clone();
        tokio::spawn(async move {
            let end = match timeout(HELLO, messages.message()).await {
                Ok(Ok(Some(proto::ClientMessage { body: Some(FromClient::Hello(hello)) }))) => {
                    let mut session = Session::new(server, hello, peer, sender.clone());
                    let end = session.run(messages).await;
                    session.leave();
                    end
                }
                Ok(Err(status)) => Err(status),
                Ok(_) => Err(Status::invalid_argument("the first message has to be a hello")),
                Err(_) => Err(Status::deadline_exceeded("no hello within 10 s")),
            };
            if let Err(status) = end {
                // Who is gone does not hear it.
                let _ = timeout(HELLO, sender.send(Err(status))).await;
            }
        });
        let messages =
            stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn list_clients(
        &self,
        request: Request<proto::ListClientsRequest>,
    ) -> Result<Response<proto::ListClientsResponse>, Status> {
        let asked = request.into_inner();
        let service = asked.service.as_ref().map(|service| (service.kind.as_str(), service.query()));
        let service = service.as_ref().map(|(kind, query)| (*kind, query));
        let clients = self.clients(service, asked.before);
        Ok(Response::new(proto::ListClientsResponse { epoch: self.0.epoch, clients }))
    }

    async fn drain(
        &self,
        request: Request<proto::DrainRequest>,
    ) -> Result<Response<proto::DrainResponse>, Status> {
        Ok(Response::new(Server::drain(self, request.into_inner()).await))
    }
}

impl From<Retired> for proto::Retired {
    fn from(retired: Retired) -> Self {
        let Retired { source, instance, why, .. } = retired;
        Self { source, instance, why: why.unwrap_or_default() }
    }
}

/// One client's call.
struct Session {
    server: Server,
    id: u64,
    client: Arc<Client>,
    sender: mpsc::Sender<Result<proto::ServerMessage, Status>>,
    subscriptions: HashMap<u64, Subscription>,
    /// Those with something to send, in the order in which it came up.
    ready: VecDeque<u64>,
    /// The same, to have each once.
    queued: HashSet<u64>,
    refusals: VecDeque<proto::Refusal>,
    changes: FuturesUnordered<Pin<Box<dyn Future<Output = Option<u64>> + Send>>>,
    nonce: u64,
}

struct Subscription {
    topic: Arc<Topic>,
    states: watch::Receiver<Arc<State>>,
    /// What the client has, if it has answered that it has.
    sent: Option<Arc<State>>,
    /// The nonce that is to be answered.
    waiting: Option<u64>,
    /// Something has changed since.
    dirty: bool,
}

impl Session {
    fn new(
        server: Server,
        hello: proto::Hello,
        peer: Option<SocketAddr>,
        sender: mpsc::Sender<Result<proto::ServerMessage, Status>>,
    ) -> Self {
        let (id, client) = server.enter(hello, peer);
        Self {
            server,
            id,
            client,
            sender,
            subscriptions: HashMap::new(),
            ready: VecDeque::new(),
            queued: HashSet::new(),
            refusals: VecDeque::new(),
            changes: FuturesUnordered::new(),
            nonce: 0,
        }
    }

    async fn run(&mut self, mut messages: Streaming<proto::ClientMessage>) -> Result<(), Status> {
        let welcome = proto::Welcome { epoch: self.server.0.epoch };
        self.sender.send(Ok(message(FromServer::Welcome(welcome)))).await.ok();
        loop {
            let waits = !self.ready.is_empty() || !self.refusals.is_empty();
            let sender = self.sender.clone();
            tokio::select! {
                said = messages.message() => match said? {
                    Some(proto::ClientMessage { body: Some(body) }) => self.hear(body)?,
                    // A message of a later version of this.
                    Some(_) => {}
                    None => return Ok(()),
                },
                Some(changed) = self.changes.next() => {
                    if let Some(id) = changed {
                        self.changed(id);
                    }
                }
                place = sender.reserve(), if waits => {
                    let Ok(place) = place else { return Ok(()) };
                    if let Some(body) = self.next() {
                        place.send(Ok(message(body)));
                    }
                }
                () = sender.closed() => return Ok(()),
            }
        }
    }

    fn hear(&mut self, body: FromClient) -> Result<(), Status> {
        self.client.progress().heard = Instant::now();
        match body {
            FromClient::Hello(_) => return Err(Status::invalid_argument("a second hello")),
            FromClient::Subscribe(subscribe) => self.subscribe(subscribe)?,
            FromClient::Unsubscribe(proto::Unsubscribe { id }) => {
                self.subscriptions.remove(&id);
                self.client.progress().subscriptions.remove(&id);
            }
            FromClient::Refresh(proto::Refresh { id }) => {
                if let Some(subscription) = self.subscriptions.get_mut(&id) {
                    subscription.topic.refresh();
                    subscription.dirty = true;
                    self.queue(id);
                }
            }
            FromClient::Answer(answer) => self.answered(answer),
            FromClient::Confirm(proto::Confirm { id, version }) => {
                if let Some(followed) = self.client.progress().subscriptions.get_mut(&id) {
                    followed.confirmed = followed.confirmed.max(version.min(followed.sent));
                }
            }
        }
        Ok(())
    }

    fn subscribe(&mut self, subscribe: proto::Subscribe) -> Result<(), Status> {
        let proto::Subscribe { id, service } = subscribe;
        let service = service.ok_or_else(|| Status::invalid_argument("a subscription without a service"))?;
        if self.subscriptions.contains_key(&id) {
            return Err(Status::invalid_argument("an id is used twice"));
        }
        let most = self.server.0.limits.subscriptions;
        if self.changes.len() > most.saturating_mul(4) {
            return Err(Status::resource_exhausted("too many subscriptions come and go"));
        }
        let topic = match self.subscriptions.len() < most {
            true => self.server.topic(&service),
            false => Err(format!("one client may follow {most} services")),
        };
        match topic {
            Err(reason) if self.refusals.len() < most => {
                self.refusals.push_back(proto::Refusal { id, reason })
            }
            Err(_) => return Err(Status::resource_exhausted("too many subscriptions that are not possible")),
            Ok(topic) => {
                let followed =
                    Followed { topic: Arc::clone(&topic), sent: 0, confirmed: 0, refused: String::new() };
                self.client.progress().subscriptions.insert(id, followed);
                let states = topic.subscribe();
                self.changes.push(changes(id, states.clone()));
                self.subscriptions
                    .insert(id, Subscription { topic, states, sent: None, waiting: None, dirty: false });
            }
        }
        Ok(())
    }

    fn changed(&mut self, id: u64) {
        let Some(subscription) = self.subscriptions.get_mut(&id) else { return };
        subscription.states.borrow_and_update();
        subscription.dirty = true;
        self.changes.push(changes(id, subscription.states.clone()));
        self.queue(id);
    }

    /// Sends it when there is room, unless the client has not answered the last state.
    fn queue(&mut self, id: u64) {
        let due = self.subscriptions.get(&id).is_some_and(|it| it.dirty && it.waiting.is_none());
        if due && self.queued.insert(id) {
            self.ready.push_back(id);
        }
    }

    fn answered(&mut self, answer: proto::Answer) {
        let proto::Answer { id, nonce, refused, resync, in_use } = answer;
        let Some(subscription) = self.subscriptions.get_mut(&id) else { return };
        // An answer to something else says that the two do not have the same in mind.
        let resync = resync || subscription.waiting != Some(nonce);
        subscription.waiting = None;
        if resync {
            subscription.sent = None;
            subscription.dirty = true;
        } else if let Some(followed) = self.client.progress().subscriptions.get_mut(&id) {
            if refused.is_empty() {
                if in_use {
                    followed.confirmed = followed.sent;
                }
            } else {
                // It stays with an older one, to which no change will fit.
                subscription.sent = None;
            }
            followed.refused = refused.chars().take(1024).collect();
        }
        self.queue(id);
    }

    fn next(&mut self) -> Option<FromServer> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(FromServer::Refusal(refusal));
        }
        let id = self.ready.pop_front()?;
        self.queued.remove(&id);
        let subscription = self.subscriptions.get_mut(&id)?;
        let state = Arc::clone(&subscription.states.borrow());
        subscription.dirty = false;
        // Nothing is known yet and nothing went wrong: there is nothing to tell.
        if !state.known && state.failure.is_none() {
            return None;
        }
        self.nonce += 1;
        let change = subscription.topic.change(subscription.sent.as_deref(), &state);
        let told = proto::State {
            id,
            nonce: self.nonce,
            version: state.version,
            base: subscription.sent.as_ref().map_or(0, |sent| sent.version),
            put: change.put.iter().map(|instance| proto::Instance::clone(instance)).collect(),
            removed: change.removed.iter().map(ToString::to_string).collect(),
            known: state.known,
            failure: state.failure.as_deref().unwrap_or_default().to_owned(),
        };
        subscription.waiting = Some(self.nonce);
        if let Some(followed) = self.client.progress().subscriptions.get_mut(&id) {
            followed.sent = state.version;
        }
        subscription.sent = Some(state);
        Some(FromServer::State(told))
    }

    fn leave(&mut self) {
        self.client.progress().gone = Some(Instant::now());
        debug!(client = self.client.hello.name, id = self.id, "a client has gone");
    }
}

fn message(body: FromServer) -> proto::ServerMessage {
    proto::ServerMessage { body: Some(body) }
}

/// Gives the id when the state has changed.
fn changes(
    id: u64,
    mut states: watch::Receiver<Arc<State>>,
) -> Pin<Box<dyn Future<Output = Option<u64>> + Send>> {
    Box::pin(async move { states.changed().await.ok().map(|()| id) })
}
