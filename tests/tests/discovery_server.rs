//! Discovery servers: one that watches, and those who ask it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use discovery::rpc::client::{self, Gate};
use discovery::rpc::proto;
use discovery::rpc::server::{Limits, Server};
use discovery::testing::fake::{FakeRegistry, instance};
use discovery::testing::{Able, Conduct, Registry, conduct};
use discovery::{Discovery, Query, Source, Target};
use e2e::eventually;
use e2e::eventually::eventually_within;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::task::{AbortHandle, JoinSet};

/// A discovery server with a registry of its own.
struct Running {
    server: Server,
    addr: SocketAddr,
    task: AbortHandle,
}

impl Running {
    async fn start(registry: &FakeRegistry, limits: Limits) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let settings =
            discovery::Settings { sources: vec![registry.source()], ..discovery::Settings::default() };
        let server = Server::new(Discovery::new(Handle::current(), settings), limits);
        let task = tokio::spawn(server.clone().serve(listener, None)).abort_handle();
        Running { server, addr, task }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn settings(name: &str, addr: SocketAddr) -> client::Settings {
    client::Settings {
        servers: vec![addr.to_string()],
        hello: proto::Hello { name: name.to_owned(), node: "node-1".to_owned(), version: "0".to_owned() },
        ..client::Settings::default()
    }
}

fn discovery(settings: client::Settings) -> Discovery {
    let sources = client::sources(settings);
    Discovery::new(Handle::current(), discovery::Settings { sources, ..discovery::Settings::default() })
}

fn target(service: &str) -> Target {
    Target::service("upstreams/1", client::KIND, query(service))
}

fn query(service: &str) -> Query {
    Query { service: service.into(), args: Default::default() }
}

fn addresses(watch: &discovery::Watch) -> Vec<String> {
    let mut list: Vec<String> =
        watch.borrow().list.iter().map(|endpoint| endpoint.addr.to_string()).collect();
    list.sort();
    list
}

async fn until(watch: &discovery::Watch, expected: &[&str]) {
    eventually(&format!("the endpoints are {expected:?}"), || async {
        (addresses(watch) == expected).then_some(())
    })
    .await;
}

/// A pipe between clients and a server that can be squeezed.
struct Pipe {
    addr: SocketAddr,
    kink: Arc<Mutex<Kink>>,
    open: Arc<AtomicUsize>,
    task: AbortHandle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kink {
    To(SocketAddr),
    /// Connections are closed at once.
    Closed,
    /// Nothing comes back any more.
    Silent,
    /// Connections are cut after some bytes.
    Half(SocketAddr),
    Garbage,
}

impl Pipe {
    async fn new(to: SocketAddr) -> Pipe {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let (kink, open) = (Arc::new(Mutex::new(Kink::To(to))), Arc::new(AtomicUsize::new(0)));
        let (shared, count) = (Arc::clone(&kink), Arc::clone(&open));
        let task = tokio::spawn(async move {
            let mut pipes = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (shared, count) = (Arc::clone(&shared), Arc::clone(&count));
                pipes.spawn(async move {
                    count.fetch_add(1, Ordering::Relaxed);
                    pump(stream, &shared).await;
                    count.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        Pipe { addr, kink, open, task: task.abort_handle() }
    }

    fn set(&self, kink: Kink) {
        *self.kink.lock().unwrap_or_else(PoisonError::into_inner) = kink;
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pump(mut client: TcpStream, kink: &Mutex<Kink>) {
    let now = || *kink.lock().unwrap_or_else(PoisonError::into_inner);
    let first = now();
    let mut server = match first {
        Kink::Closed => return,
        Kink::Garbage => {
            let _ = client.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").await;
            let _ = client.read(&mut [0; 1024]).await;
            return;
        }
        Kink::Silent => None,
        Kink::To(to) | Kink::Half(to) => TcpStream::connect(to).await.ok(),
    };
    let (mut up, mut down) = ([0; 4096], [0; 4096]);
    let mut left = if matches!(first, Kink::Half(_)) { 100 } else { usize::MAX };
    loop {
        let Some(server) = &mut server else {
            match client.read(&mut up).await {
                Ok(1..) if now() == first => continue,
                _ => return,
            }
        };
        tokio::select! {
            read = client.read(&mut up) => match read {
                Ok(read @ 1..) => if server.write_all(&up[..read]).await.is_err() { return },
                _ => return,
            },
            read = server.read(&mut down) => match read {
                Ok(read @ 1..) => {
                    let part = read.min(left);
                    left -= part;
                    if client.write_all(&down[..part]).await.is_err() || left == 0 {
                        return;
                    }
                }
                _ => return,
            },
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
        match now() {
            same if same == first => {}
            // What is open already says nothing any more.
            Kink::Silent => {
                while now() == Kink::Silent {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            _ => return,
        }
    }
}

/// The registry of the suite of conduct: a discovery server, a registry behind it and a pipe in front of it.
struct Chain {
    registry: FakeRegistry,
    running: Running,
    pipe: Pipe,
    kind: &'static str,
}

impl Chain {
    async fn new(kind: &'static str) -> Chain {
        let registry = FakeRegistry::default();
        let running = Running::start(&registry, Limits::default()).await;
        let pipe = Pipe::new(running.addr).await;
        Chain { registry, running, pipe, kind }
    }

    async fn begin_anew(&mut self) {
        self.running = Running::start(&self.registry, Limits::default()).await;
        self.pipe.set(Kink::To(self.running.addr));
    }
}

impl Registry for Chain {
    fn source(&self) -> Arc<dyn Source> {
        let mut settings = settings("conduct", self.pipe.addr);
        settings.patience = Some(Duration::from_millis(500));
        settings.kinds = vec!["fake"];
        client::sources(settings).into_iter().find(|source| source.kind() == self.kind).expect("a source")
    }

    fn service_name(&self, service: &str) -> String {
        let name = self.registry.service_name(service);
        if self.kind == client::KIND { format!("fake/{name}") } else { name }
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        self.registry.register(service, address, weight)
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        self.registry.deregister(service, address)
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        Box::pin(async move {
            match how {
                Conduct::Well => {
                    self.registry.behave(Conduct::Well).await;
                    self.pipe.set(Kink::To(self.running.addr));
                }
                // Of the registry behind.
                Conduct::Errors => return self.registry.behave(Conduct::Errors).await,
                Conduct::SlowBody => return Able::No,
                Conduct::Silent => self.pipe.set(Kink::Silent),
                Conduct::HalfBody => self.pipe.set(Kink::Half(self.running.addr)),
                Conduct::Garbage => self.pipe.set(Kink::Garbage),
                Conduct::Restarts => self.pipe.set(Kink::Closed),
                // Another server, whose versions have nothing to do with those of the first.
                Conduct::Rewinds => self.begin_anew().await,
                Conduct::RestartsEmpty => {
                    self.registry = FakeRegistry::default();
                    self.begin_anew().await;
                }
            }
            Able::Yes
        })
    }

    fn wrong_name(&self) -> Option<String> {
        (self.kind == client::KIND).then(|| "web".to_owned())
    }

    fn connections(&self) -> Option<usize> {
        Some(self.pipe.open.load(Ordering::Relaxed))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_conducts_itself_as_every_source_has_to() {
    let mut chain = Chain::new(client::KIND).await;
    let report = conduct(&mut chain).await.unwrap_or_else(|broken| panic!("{broken}"));
    assert_eq!(report.skipped, ["SlowBody"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn and_so_does_one_in_place_of_the_registry_itself() {
    let mut chain = Chain::new("fake").await;
    let report = conduct(&mut chain).await.unwrap_or_else(|broken| panic!("{broken}"));
    assert_eq!(report.skipped, ["a wrong name", "SlowBody"]);
}

/// Lets confirmations wait until it is opened.
#[derive(Debug)]
struct Door(tokio::sync::Semaphore);

impl Gate for Door {
    fn used<'a>(&'a self, _: &'a str, _: &'a Query) -> BoxFuture<'a, ()> {
        Box::pin(async {
            if let Ok(permit) = self.0.acquire().await {
                permit.forget();
            }
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_known_who_still_has_an_endpoint() {
    let registry = FakeRegistry::default();
    registry.set("web", vec![instance("127.0.0.1:1", 1), instance("127.0.0.1:2", 1)]);
    let running = Running::start(&registry, Limits::default()).await;
    let quick = discovery(settings("quick", running.addr)).watch(&target("fake/web"));
    let door = Arc::new(Door(tokio::sync::Semaphore::new(0)));
    let mut slow_settings = settings("slow", running.addr);
    slow_settings.gate = Some(Arc::clone(&door) as Arc<dyn Gate>);
    let slow = discovery(slow_settings).watch(&target("fake/web"));
    until(&quick, &["127.0.0.1:1", "127.0.0.1:2"]).await;
    until(&slow, &["127.0.0.1:1", "127.0.0.1:2"]).await;

    // The slow one has it, and does not say so: it does not use it yet.
    let service = query("web");
    let unconfirmed = |before: u64| {
        let clients = running.server.clients(Some(("fake", &service)), before);
        let mut names: Vec<String> =
            clients.into_iter().filter_map(|client| Some(client.hello?.name)).collect();
        names.sort();
        names
    };
    let version = || {
        let clients = running.server.clients(Some(("fake", &service)), 0);
        clients[0].subscriptions[0].version
    };
    let first = version();
    eventually("only the slow one has not confirmed", || async {
        (unconfirmed(first) == ["slow"]).then_some(())
    })
    .await;
    door.0.add_permits(1);
    eventually("all have confirmed", || async { unconfirmed(first).is_empty().then_some(()) }).await;

    registry.set("web", vec![instance("127.0.0.1:1", 1)]);
    until(&quick, &["127.0.0.1:1"]).await;
    until(&slow, &["127.0.0.1:1"]).await;
    let second = version();
    assert!(second > first);
    eventually("the slow one is known to have the old state", || async {
        (unconfirmed(second) == ["slow"]).then_some(())
    })
    .await;
    // What happens meanwhile it gets all the same: who takes long to use a state goes without no other one.
    registry.set("web", vec![instance("127.0.0.1:3", 1)]);
    until(&quick, &["127.0.0.1:3"]).await;
    registry.set("web", vec![instance("127.0.0.1:3", 1), instance("127.0.0.1:4", 1)]);
    until(&quick, &["127.0.0.1:3", "127.0.0.1:4"]).await;
    until(&slow, &["127.0.0.1:3", "127.0.0.1:4"]).await;
    assert_eq!(unconfirmed(version()), ["slow"]);
    door.0.add_permits(100);
    eventually("all have confirmed", || async { unconfirmed(version()).is_empty().then_some(()) }).await;

    // One that is gone is not forgotten at once: it goes on using what it had.
    drop((slow, quick));
    registry.set("web", vec![]);
    eventually("both are known to be gone", || async {
        let clients = running.server.clients(None, 0);
        (clients.len() == 2 && clients.iter().all(|client| !client.connected)).then_some(())
    })
    .await;
}

/// Speaks the protocol by hand.
struct ByHand {
    sender: tokio::sync::mpsc::Sender<proto::ClientMessage>,
    messages: tonic::Streaming<proto::ServerMessage>,
}

impl ByHand {
    async fn new(addr: SocketAddr) -> ByHand {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{addr}")).expect("an address");
        let channel = endpoint.connect().await.expect("a connection");
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        let requests = futures_util::stream::unfold(
            receiver,
            |mut receiver: tokio::sync::mpsc::Receiver<_>| async move { Some((receiver.recv().await?, receiver)) },
        );
        let mut rpc = proto::discovery_client::DiscoveryClient::new(channel);
        let hand = ByHand::say_to(&sender, proto::client_message::Body::Hello(proto::Hello::default()));
        hand.await;
        let messages = rpc.watch_endpoints(requests).await.expect("a call").into_inner();
        let mut hand = ByHand { sender, messages };
        assert!(matches!(hand.hear().await, proto::server_message::Body::Welcome(_)));
        hand
    }

    async fn say_to(
        sender: &tokio::sync::mpsc::Sender<proto::ClientMessage>,
        body: proto::client_message::Body,
    ) {
        sender.send(proto::ClientMessage { body: Some(body) }).await.expect("the call goes on");
    }

    async fn say(&self, body: proto::client_message::Body) {
        Self::say_to(&self.sender, body).await;
    }

    async fn hear(&mut self) -> proto::server_message::Body {
        let message = tokio::time::timeout(Duration::from_secs(10), self.messages.message()).await;
        message.expect("in time").expect("no error").expect("no end").body.expect("a body")
    }

    async fn state(&mut self) -> proto::State {
        match self.hear().await {
            proto::server_message::Body::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    async fn answer(&self, state: &proto::State, refused: &str, resync: bool) {
        let (refused, in_use) = (refused.to_owned(), true);
        let answer = proto::Answer { id: state.id, nonce: state.nonce, refused, resync, in_use };
        self.say(proto::client_message::Body::Answer(answer)).await;
    }

    async fn subscribe(&self, id: u64, service: &str) {
        let service =
            proto::Service { kind: "fake".into(), service: service.into(), ..proto::Service::default() };
        self.say(proto::client_message::Body::Subscribe(proto::Subscribe { id, service: Some(service) }))
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_are_sent_alone_and_the_whole_state_when_it_is_wanted() {
    let registry = FakeRegistry::default();
    let all: Vec<_> = (1..=100).map(|n| instance(&format!("127.0.0.1:{n}"), 1)).collect();
    registry.set("web", all.clone());
    let running = Running::start(&registry, Limits { subscriptions: 2, ..Limits::default() }).await;
    let mut hand = ByHand::new(running.addr).await;
    hand.subscribe(7, "web").await;
    let first = hand.state().await;
    assert_eq!((first.id, first.base, first.put.len(), first.known), (7, 0, 100, true));
    hand.answer(&first, "", false).await;

    registry.set("web", all[1..].to_vec());
    let second = hand.state().await;
    assert_eq!((second.base, second.put.len(), second.removed.len()), (first.version, 0, 1));
    assert!(second.version > first.version && second.nonce > first.nonce);
    // It is told what it refuses, and the next one is whole: it does not have this one.
    hand.answer(&second, "no room", false).await;
    eventually("the reason is known", || async {
        let clients = running.server.clients(None, 0);
        (clients[0].subscriptions[0].refused == "no room").then_some(())
    })
    .await;
    assert_eq!(running.server.clients(None, 0)[0].subscriptions[0].confirmed, first.version);
    registry.set("web", all[2..].to_vec());
    let third = hand.state().await;
    assert_eq!((third.base, third.put.len()), (0, 98));
    hand.answer(&third, "", false).await;
    registry.set("web", all[3..].to_vec());
    let fourth = hand.state().await;
    assert_eq!((fourth.base, fourth.removed.len()), (third.version, 1));
    hand.answer(&fourth, "", true).await;
    let again = hand.state().await;
    assert_eq!((again.base, again.put.len()), (0, 97));
    // An answer to something that was not sent.
    hand.answer(&proto::State { nonce: 4711, ..again.clone() }, "", false).await;
    assert_eq!(hand.state().await.base, 0);

    // Another service, and one too many.
    hand.subscribe(8, "other").await;
    hand.subscribe(9, "third").await;
    let mut bodies = vec![hand.hear().await];
    bodies.push(hand.hear().await);
    assert!(
        bodies
            .iter()
            .any(|body| matches!(body, proto::server_message::Body::Refusal(refusal) if refusal.id == 9))
    );
    assert!(bodies.iter().any(
        |body| matches!(body, proto::server_message::Body::State(state) if state.id == 8 && state.known)
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_cost_one_watch() {
    const CLIENTS: usize = 1_000;
    let registry = FakeRegistry::default();
    let endpoints: Vec<_> = (1..=50).map(|n| instance(&format!("127.0.0.1:{n}"), 1)).collect();
    registry.set("web", endpoints.clone());
    let running = Running::start(&registry, Limits::default()).await;

    let before = memory();
    let seen = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        let (addr, seen) = (running.addr, Arc::clone(&seen));
        clients.spawn(async move {
            let mut settings = settings(&format!("client-{n}"), addr);
            settings.patience = Some(Duration::from_secs(30));
            let discovery = discovery(settings);
            let mut watch = discovery.watch(&target("fake/web"));
            loop {
                let len = watch.borrow_and_update().list.len();
                match len {
                    50 => seen.fetch_add(1, Ordering::Relaxed),
                    49 => seen.fetch_add(1 << 32, Ordering::Relaxed),
                    _ => 0,
                };
                if watch.changed().await.is_err() {
                    return;
                }
            }
        });
    }
    eventually_within(Duration::from_secs(60), "every client has the endpoints", || async {
        (seen.load(Ordering::Relaxed) & 0xffff_ffff >= CLIENTS as u64).then_some(())
    })
    .await;
    let used = memory().saturating_sub(before);
    let questions = registry.questions();

    let begun = Instant::now();
    registry.set("web", endpoints[1..].to_vec());
    eventually_within(Duration::from_secs(60), "every client has the change", || async {
        (seen.load(Ordering::Relaxed) >> 32 >= CLIENTS as u64).then_some(())
    })
    .await;
    let took = begun.elapsed();
    eventually_within(Duration::from_secs(60), "every client has confirmed it", || async {
        let service = query("web");
        let version =
            running.server.clients(Some(("fake", &service)), 0).first()?.subscriptions.first()?.version;
        running.server.clients(Some(("fake", &service)), version).is_empty().then_some(())
    })
    .await;
    assert!(registry.questions() - questions < 10, "one watcher asks, not a thousand");
    println!(
        "{CLIENTS} clients and their server: {} KiB each; a change reached all in {took:?}",
        used / CLIENTS / 1024
    );
    // Both ends of each connection are in this process.
    assert!(used < CLIENTS * 512 * 1024, "{used} bytes");
}

/// Resident bytes of this process.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let pages: usize = status.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("pages");
    pages * 4096
}
