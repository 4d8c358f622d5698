//! The client's side: a source that asks a discovery server.
//!
//! One connection and one call serve all services that this process follows, whatever their kind. When the server is gone
//! the states stay and the failure is told; the next server, which may be another one, sends them whole. A state is
//! answered when the watcher is asked for the next one, and confirmed when it is in use: as soon as a [`Gate`] says so, or
//! with the answer where there is none.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use certs::grpc::{self, Dial};
use config::discovery::postern::Postern;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{FuturesUnordered, Stream, StreamExt};
use rustls::ClientConfig;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tracing::{debug, info};

use super::proto;
use super::proto::client_message::Body as FromClient;
use super::proto::discovery_client::DiscoveryClient;
use super::proto::server_message::Body as FromServer;
use crate::backoff::Backoff;
use crate::notice::{Heard, Notice};
use crate::source::{Again, Instance, Listing, Query, Source, SourceError, Standing, Watcher};

/// The state of a service of 100,000 instances.
const LONGEST_STATE: usize = 64 << 20;
const WELCOME: Duration = Duration::from_secs(10);
/// What telling a server of a drain may take; its registries may be slow.
const DRAIN: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often a list that has not changed is said again, while the server is there.
const CONFIRM: Duration = Duration::from_secs(30);
/// Messages to the server that wait. Who writes them waits, too.
const OUTBOX: usize = 64;

/// Where discovery servers are, and who asks.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `host:port`; one of them at a time is used.
    pub servers: Vec<String>,
    pub tls: Option<Arc<ClientConfig>>,
    /// The name that the server's certificate has to have, where it is not its host.
    pub server_name: Option<String>,
    pub hello: proto::Hello,
    /// Kinds that are asked for at the servers instead of at their registries.
    pub kinds: Vec<&'static str>,
    /// When a state is in use.
    pub gate: Option<Arc<dyn Gate>>,
    /// How long the server may take to answer a connection. Shorter in tests.
    pub patience: Option<Duration>,
}

impl Settings {
    /// As written in `config.yaml`.
    ///
    /// # Errors
    /// A file that the settings name cannot be read or used.
    pub fn new(written: &Postern, hello: proto::Hello) -> Result<Self, String> {
        let tls = match &written.tls {
            None => None,
            Some(tls) => {
                let identity = tls.cert_file.as_deref().zip(tls.key_file.as_deref());
                Some(grpc::client_tls(tls.ca_file.as_deref(), identity)?)
            }
        };
        Ok(Self {
            servers: written.servers.clone(),
            tls,
            server_name: written.tls.as_ref().and_then(|tls| tls.server_name.clone()),
            hello,
            kinds: written.kinds.iter().filter_map(|kind| Postern::kind(kind)).collect(),
            ..Self::default()
        })
    }
}

/// Knows when what discovery has published is in use.
pub trait Gate: fmt::Debug + Send + Sync + 'static {
    /// Until nothing picks endpoints any more by what was published for the service before what is published now.
    fn used<'a>(&'a self, kind: &'a str, query: &'a Query) -> BoxFuture<'a, ()>;
}

/// The kind whose services are named with their own kind in front: `consul/web`.
pub const KIND: &str = "postern";

/// A source `postern`, and one for each kind that is asked for at the servers. They share a connection.
pub fn sources(settings: Settings) -> Vec<Arc<dyn Source>> {
    let kinds: Vec<&'static str> = std::iter::once(KIND).chain(settings.kinds.iter().copied()).collect();
    let link = Arc::new(LinkMaker { settings, running: Mutex::default(), channels: Mutex::default() });
    let source = |kind| Arc::new(ServerSource { kind, link: Arc::clone(&link) }) as Arc<dyn Source>;
    kinds.into_iter().map(source).collect()
}

/// Asks a discovery server for services of one kind.
#[derive(Debug)]
struct ServerSource {
    kind: &'static str,
    link: Arc<LinkMaker>,
}

impl Source for ServerSource {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn name(&self) -> &str {
        if self.kind == KIND { "" } else { "discovery server" }
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        let service = self.service(query)?;
        Ok(Box::new(ServerWatcher {
            maker: Arc::clone(&self.link),
            service,
            own: (self.kind, query.clone()),
            attached: None,
        }))
    }

    fn pass_on<'a>(&'a self, notice: &'a Notice, services: &'a [Query]) -> BoxFuture<'a, Vec<Heard>> {
        let services: Vec<_> = services.iter().filter_map(|query| self.service(query).ok()).collect();
        let request = notice.request(services);
        let asked = self.link.settings.servers.iter().map(move |server| {
            let request = request.clone();
            async move {
                let answer = match timeout(DRAIN, self.link.drain(server, request)).await {
                    Ok(answer) => answer,
                    Err(_) => Err(format!("no answer within {} s", DRAIN.as_secs()).into()),
                };
                Heard::new(server, answer)
            }
        });
        Box::pin(join_all(asked))
    }
}

impl ServerSource {
    /// What the server calls a service.
    fn service(&self, query: &Query) -> Result<proto::Service, String> {
        if self.kind != KIND {
            return Ok(proto::Service::new(self.kind, query));
        }
        let named =
            query.service.split_once('/').filter(|(kind, service)| !kind.is_empty() && !service.is_empty());
        let (kind, service) = named.ok_or_else(|| {
            format!(
                "`{}` does not say of which kind it is: write `consul/NAME`, `kubernetes/NAMESPACE/NAME:PORT`",
                query.service
            )
        })?;
        Ok(proto::Service::new(kind, &Query { service: service.into(), args: query.args.clone() }))
    }
}

/// What a link is made from, and the one that runs.
#[derive(Debug)]
struct LinkMaker {
    settings: Settings,
    running: Mutex<Weak<Link>>,
    /// For drains: every server is asked, and not only the one that is followed.
    channels: Mutex<HashMap<String, Channel>>,
}

impl LinkMaker {
    /// Tells one server of a drain.
    async fn drain(
        &self,
        server: &str,
        request: proto::DrainRequest,
    ) -> Result<proto::DrainResponse, Arc<str>> {
        let known = self.channels().get(server).cloned();
        let channel = match known {
            Some(channel) => channel,
            None => {
                let channel = connect(server.to_owned(), self.settings.clone()).await?;
                self.channels().insert(server.to_owned(), channel.clone());
                channel
            }
        };
        let mut client = DiscoveryClient::new(channel).max_decoding_message_size(LONGEST_STATE);
        let answer = client.drain(request).await.map_err(told);
        if answer.is_err() {
            self.channels().remove(server);
        }
        answer.map(tonic::Response::into_inner)
    }

    fn channels(&self) -> MutexGuard<'_, HashMap<String, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) -> Arc<Link> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = running.upgrade() {
            return link;
        }
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(run(self.settings.clone(), Arc::clone(&shared))).abort_handle();
        let link = Arc::new(Link { shared, task });
        *running = Arc::downgrade(&link);
        link
    }
}

/// The connection; it ends with the last service that is followed.
#[derive(Debug)]
struct Link {
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What watchers and the task of the link share.
#[derive(Debug, Default)]
struct Shared {
    desk: Mutex<Desk>,
    /// Something is on the desk.
    work: Notify,
}

#[derive(Debug, Default)]
struct Desk {
    next: u64,
    subscriptions: HashMap<u64, Wanted>,
    errands: Vec<Errand>,
}

/// A service that somebody follows.
#[derive(Debug)]
struct Wanted {
    service: proto::Service,
    /// What it is called where it is used.
    own: (&'static str, Query),
    view: watch::Sender<View>,
}

/// What is to be told to the server.
#[derive(Debug)]
enum Errand {
    Subscribe(u64),
    Unsubscribe(u64),
    Refresh(u64),
    /// The state has been taken in.
    Answer(u64, Said),
}

/// A state that was said.
#[derive(Clone, Copy, Debug)]
struct Said {
    call: u64,
    nonce: u64,
    version: u64,
}

/// What a watcher sees of its service.
#[derive(Clone, Debug, Default)]
struct View {
    state: Option<Arc<State>>,
    /// Counts the states that came.
    states: u64,
    /// Counts failures of the link and of the subscription.
    failures: u64,
    /// Why nothing can be told now.
    failing: Option<Arc<str>>,
}

/// A service at a moment.
#[derive(Debug)]
struct State {
    epoch: u64,
    call: u64,
    nonce: u64,
    version: u64,
    known: bool,
    /// Why the registry cannot be asked.
    failure: Option<Arc<str>>,
    instances: BTreeMap<String, Instance>,
}

impl State {
    fn said(&self) -> Said {
        Said { call: self.call, nonce: self.nonce, version: self.version }
    }
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn errand(&self, errand: Errand) {
        self.desk().errands.push(errand);
        self.work.notify_one();
    }

    /// Tells everybody that the link is broken.
    fn fail(&self, reason: &Arc<str>) {
        for wanted in self.desk().subscriptions.values() {
            wanted.view.send_modify(|view| {
                view.failures += 1;
                view.failing = Some(Arc::clone(reason));
            });
        }
    }
}

/// Keeps a call to one of the servers, for ever.
async fn run(settings: Settings, shared: Arc<Shared>) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    // Thousands of clients do not all begin with the first one.
    let mut place = fastrand::usize(0..settings.servers.len().max(1));
    let mut calls = 0;
    loop {
        let server = settings.servers.get(place).cloned().unwrap_or_default();
        calls += 1;
        let mut call = Call {
            shared: Arc::clone(&shared),
            settings: settings.clone(),
            number: calls,
            epoch: 0,
            begun: false,
            waits: FuturesUnordered::new(),
            waiting: HashMap::new(),
        };
        let reason = call.run(server.clone()).await;
        if call.begun {
            info!(%server, %reason, "the discovery server is gone");
            backoff.reset();
        } else {
            debug!(%server, %reason, "no discovery server");
        }
        shared.fail(&format!("discovery server {server}: {reason}").into());
        place = (place + 1) % settings.servers.len().max(1);
        tokio::select! {
            () = sleep(backoff.pause()) => {}
            () = asked(Arc::clone(&shared)) => sleep(FIRST_PAUSE).await,
        }
    }
}

/// Until somebody wants to know now.
async fn asked(shared: Arc<Shared>) {
    loop {
        shared.work.notified().await;
        if shared.desk().errands.iter().any(|errand| matches!(errand, Errand::Refresh(_))) {
            return;
        }
    }
}

struct Call {
    shared: Arc<Shared>,
    settings: Settings,
    number: u64,
    epoch: u64,
    /// The server has said something.
    begun: bool,
    /// What the gate is asked for: subscriptions with the versions that are in use when it opens.
    waits: FuturesUnordered<BoxFuture<'static, (u64, u64)>>,
    /// Those subscriptions, each with the version that is asked for next.
    waiting: HashMap<u64, Option<u64>>,
}

impl Call {
    /// Says why it has ended.
    async fn run(&mut self, server: String) -> Arc<str> {
        match self.talk(server).await {
            Ok(()) => "it has ended the call".into(),
            Err(reason) => reason,
        }
    }

    async fn talk(&mut self, server: String) -> Result<(), Arc<str>> {
        let patience = self.settings.patience.unwrap_or(WELCOME);
        let channel = timeout(patience, connect(server, self.settings.clone())).await;
        let channel = channel.map_err(|_| "no connection in time")??;
        let (outbox, inbox) = mpsc::channel(OUTBOX);
        send(outbox.clone(), FromClient::Hello(self.settings.hello.clone())).await?;
        let call = timeout(patience, begin(channel, Inbox(inbox))).await;
        let mut messages = call.map_err(|_| "no answer in time")?.map_err(told)?;
        let first = timeout(patience, messages.message()).await;
        match first.map_err(|_| "no welcome in time")?.map_err(told)? {
            Some(proto::ServerMessage { body: Some(FromServer::Welcome(welcome)) }) => {
                self.epoch = welcome.epoch
            }
            _ => return Err("it does not speak the protocol of discovery".into()),
        }
        self.begun = true;
        // What was on the desk is for the call before, or is in what everybody wants.
        let all: Vec<u64> = {
            let mut desk = self.shared.desk();
            desk.errands.clear();
            desk.subscriptions.keys().copied().collect()
        };
        for id in all {
            self.subscribe(outbox.clone(), id).await?;
        }
        self.listen(outbox, messages).await
    }

    async fn listen(
        &mut self,
        outbox: mpsc::Sender<proto::ClientMessage>,
        mut messages: Streaming<proto::ServerMessage>,
    ) -> Result<(), Arc<str>> {
        loop {
            tokio::select! {
                message = messages.message() => match message.map_err(told)? {
                    None => return Ok(()),
                    Some(proto::ServerMessage { body: Some(FromServer::State(state)) }) => {
                        if let Some(answer) = self.take(state) {
                            send(outbox.clone(), FromClient::Answer(answer)).await?;
                        }
                    }
                    Some(proto::ServerMessage { body: Some(FromServer::Refusal(refusal)) }) => {
                        if let Some(wanted) = self.shared.desk().subscriptions.get(&refusal.id) {
                            wanted.view.send_modify(|view| {
                                view.failures += 1;
                                view.failing = Some(refusal.reason.into());
                            });
                        }
                    }
                    Some(_) => {}
                },
                Some((id, version)) = self.waits.next() => {
                    let confirm = proto::Confirm { id, version };
                    send(outbox.clone(), FromClient::Confirm(confirm)).await?;
                    if let Some(next) = self.waiting.remove(&id).flatten() {
                        self.wait(id, next);
                    }
                }
                () = self.shared.work.notified() => {
                    let errands = std::mem::take(&mut self.shared.desk().errands);
                    for errand in errands {
                        self.run_errand(outbox.clone(), errand).await?;
                    }
                }
            }
        }
    }

    async fn run_errand(
        &mut self,
        outbox: mpsc::Sender<proto::ClientMessage>,
        errand: Errand,
    ) -> Result<(), Arc<str>> {
        match errand {
            Errand::Subscribe(id) => self.subscribe(outbox.clone(), id).await,
            Errand::Unsubscribe(id) => {
                send(outbox.clone(), FromClient::Unsubscribe(proto::Unsubscribe { id })).await
            }
            Errand::Refresh(id) => send(outbox.clone(), FromClient::Refresh(proto::Refresh { id })).await,
            Errand::Answer(_, said) if said.call != self.number => Ok(()),
            Errand::Answer(id, said) => {
                let in_use = self.settings.gate.is_none();
                let answer = proto::Answer { id, nonce: said.nonce, in_use, ..proto::Answer::default() };
                send(outbox.clone(), FromClient::Answer(answer)).await?;
                match self.waiting.get_mut(&id) {
                    Some(next) => *next = Some(said.version),
                    None => self.wait(id, said.version),
                }
                Ok(())
            }
        }
    }

    /// Has the gate asked, if there is one, when this version is in use.
    fn wait(&mut self, id: u64, version: u64) {
        let own = self.shared.desk().subscriptions.get(&id).map(|wanted| wanted.own.clone());
        let (Some(gate), Some((kind, query))) = (self.settings.gate.clone(), own) else { return };
        self.waiting.insert(id, None);
        self.waits.push(Box::pin(async move {
            gate.used(kind, &query).await;
            (id, version)
        }));
    }

    async fn subscribe(
        &mut self,
        outbox: mpsc::Sender<proto::ClientMessage>,
        id: u64,
    ) -> Result<(), Arc<str>> {
        let Some(service) = self.shared.desk().subscriptions.get(&id).map(|wanted| wanted.service.clone())
        else {
            return Ok(());
        };
        send(outbox.clone(), FromClient::Subscribe(proto::Subscribe { id, service: Some(service) })).await
    }

    /// Takes a state in. Gives what is answered at once: only that it is of no use.
    fn take(&self, told: proto::State) -> Option<proto::Answer> {
        let desk = self.shared.desk();
        let (id, nonce) = (told.id, told.nonce);
        let wanted = desk.subscriptions.get(&id)?;
        let before = wanted.view.borrow().state.clone();
        let before = before.filter(|before| before.call == self.number && before.version == told.base);
        let mut instances = match (told.base, before) {
            (0, _) => BTreeMap::new(),
            (_, Some(before)) => before.instances.clone(),
            (_, None) => {
                return Some(proto::Answer { id, nonce, resync: true, ..proto::Answer::default() });
            }
        };
        for key in &told.removed {
            instances.remove(key);
        }
        for instance in told.put {
            let key = instance.key.clone();
            let Some(instance) = instance.read() else {
                let refused = format!("the instance {key} has no port");
                return Some(proto::Answer { id, nonce, refused, ..proto::Answer::default() });
            };
            instances.insert(key, instance);
        }
        let state = State {
            epoch: self.epoch,
            call: self.number,
            nonce,
            version: told.version,
            known: told.known,
            failure: (!told.failure.is_empty()).then(|| told.failure.into()),
            instances,
        };
        wanted.view.send_modify(|view| {
            view.state = Some(Arc::new(state));
            view.states += 1;
            view.failing = None;
        });
        None
    }
}

/// Begins the call.
fn begin(
    channel: Channel,
    requests: Inbox,
) -> BoxFuture<'static, Result<Streaming<proto::ServerMessage>, Status>> {
    let mut client = DiscoveryClient::new(channel).max_decoding_message_size(LONGEST_STATE);
    Box::pin(async move { client.watch_endpoints(requests).await.map(tonic::Response::into_inner) })
}

/// Messages to the server.
struct Inbox(mpsc::Receiver<proto::ClientMessage>);

impl Stream for Inbox {
    type Item = proto::ClientMessage;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx)
    }
}

async fn send(outbox: mpsc::Sender<proto::ClientMessage>, body: FromClient) -> Result<(), Arc<str>> {
    // A server that takes nothing is found out by its pings.
    let message = proto::ClientMessage { body: Some(body) };
    outbox.send(message).await.map_err(|_| "the call has ended".into())
}

fn told(status: Status) -> Arc<str> {
    let message = status.message();
    if message.is_empty() { status.code().description().into() } else { message.into() }
}

fn connect(server: String, settings: Settings) -> BoxFuture<'static, Result<Channel, Arc<str>>> {
    let dial =
        Dial { server, tls: settings.tls, server_name: settings.server_name, patience: settings.patience };
    Box::pin(async move { dial.connect().await.map_err(Into::into) })
}

/// Follows one service.
struct ServerWatcher {
    maker: Arc<LinkMaker>,
    service: proto::Service,
    own: (&'static str, Query),
    attached: Option<Attached>,
}

struct Attached {
    link: Arc<Link>,
    id: u64,
    view: watch::Receiver<View>,
    /// Nothing was said since the start, the last failure or the last restart.
    silent: bool,
    /// The state that has to have come before anything is said.
    wanted: u64,
    /// The state that was said last, to be answered.
    said: Option<Said>,
    /// The state whose list was said last, and the one whose failure was.
    listed: u64,
    behind: u64,
    epoch: Option<u64>,
    /// The failure of the link that was told last.
    told: u64,
}

impl Attached {
    fn new(link: Arc<Link>, service: proto::Service, own: (&'static str, Query)) -> Self {
        let (sender, view) = watch::channel(View::default());
        let id = {
            let mut desk = link.shared.desk();
            desk.next += 1;
            let id = desk.next;
            desk.subscriptions.insert(id, Wanted { service, own, view: sender });
            id
        };
        link.shared.errand(Errand::Subscribe(id));
        Self {
            link,
            id,
            view,
            silent: true,
            wanted: 1,
            said: None,
            listed: 0,
            behind: 0,
            epoch: None,
            told: 0,
        }
    }

    /// What was said last has been taken in.
    fn answer(&mut self) {
        if let Some(said) = self.said.take() {
            self.link.shared.errand(Errand::Answer(self.id, said));
        }
    }

    fn news(&mut self) -> Option<Result<Listing, SourceError>> {
        let view = self.view.borrow_and_update().clone();
        if let Some(reason) = view.failing {
            if view.failures == self.told {
                return None;
            }
            self.told = view.failures;
            self.silent = true;
            return Some(Err(SourceError::new(reason)));
        }
        let state = view.state.filter(|_| view.states >= self.wanted)?;
        if state.known && (self.silent || self.listed != view.states) {
            self.listed = view.states;
            self.silent = false;
            self.said = Some(state.said());
            // Another server, or one that has lost its memory, may not know everything yet.
            let restarted = self.epoch.replace(state.epoch).is_some_and(|epoch| epoch != state.epoch);
            let standing = if restarted { Standing::Restarted } else { Standing::Continued };
            let instances = state.instances.values().cloned().collect();
            return Some(Ok(Listing { instances, standing, again: Again::Now }));
        }
        // That the server cannot ask the registry is told after what it knows of it.
        let failure = state.failure.clone().filter(|_| self.behind != view.states)?;
        self.behind = view.states;
        self.said = Some(state.said());
        Some(Err(SourceError::new(failure)))
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.link.shared.desk().subscriptions.remove(&self.id);
        self.link.shared.errand(Errand::Unsubscribe(self.id));
    }
}

impl Watcher for ServerWatcher {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(async move {
            let Self { maker, service, own, attached } = self;
            let attached =
                attached.get_or_insert_with(|| Attached::new(maker.run(), service.clone(), own.clone()));
            attached.answer();
            loop {
                if let Some(news) = attached.news() {
                    return news;
                }
                tokio::select! {
                    changed = attached.view.changed() => {
                        if changed.is_err() {
                            return Err(SourceError::new("the connection to the discovery server has ended"));
                        }
                    }
                    () = sleep(CONFIRM) => {
                        let view = attached.view.borrow();
                        let well = view.state.as_ref().is_some_and(|state| state.known && state.failure.is_none());
                        attached.silent |= view.failing.is_none() && well;
                    }
                }
            }
        })
    }

    fn restart(&mut self) {
        if let Some(attached) = &mut self.attached {
            let view = attached.view.borrow();
            // The server sends no other state before one that has come is answered, and answered is what was said.
            let is_said = view.states <= attached.listed.max(attached.behind);
            attached.wanted = view.states + u64::from(is_said);
            attached.told = view.failures;
            drop(view);
            attached.silent = true;
            attached.link.shared.errand(Errand::Refresh(attached.id));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use futures_util::FutureExt;
    use tokio::net::TcpListener;
    use tokio::runtime::Handle;

    use super::*;
    use crate::Discovery;
    use crate::rpc::server::{Limits, Server};
    use crate::testing::Registry;
    use crate::testing::fake::FakeRegistry;

    #[tokio::test]
    async fn a_state_that_came_just_before_a_refresh_holds_up_nothing() {
        let mut registry = FakeRegistry::default();
        registry.register("web", "10.0.0.1:80", 1).await;
        let settings = crate::Settings { sources: vec![registry.source()], ..crate::Settings::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let servers = vec![listener.local_addr().unwrap().to_string()];
        let server = Server::new(Discovery::new(Handle::current(), settings), Limits::default());
        tokio::spawn(server.serve(listener, None));

        let settings = Settings { servers, ..Settings::default() };
        let maker = Arc::new(LinkMaker { settings, running: Mutex::default(), channels: Mutex::default() });
        let query = Query { service: "web".into(), args: BTreeMap::new() };
        let service = proto::Service::new("fake", &query);
        let mut watcher = ServerWatcher { maker, service, own: ("fake", query), attached: None };
        assert_eq!(watcher.next().await.unwrap().instances.len(), 1);
        assert!(watcher.next().now_or_never().is_none(), "the first list is answered, and there is no other");
        registry.register("web", "10.0.0.2:80", 1).await;
        let mut view = watcher.attached.as_ref().unwrap().view.clone();
        view.wait_for(|view| view.states == 2).await.unwrap();
        watcher.restart();
        registry.register("web", "10.0.0.3:80", 1).await;
        let all = async { while watcher.next().await.unwrap().instances.len() < 3 {} };
        timeout(Duration::from_secs(30), all).await.expect("what the registry says in the end");
    }
}
