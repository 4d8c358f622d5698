//! A Kubernetes API server made for tests.
//!
//! It keeps objects of any kind with versions and a history, and answers list, get, watch, create, replace, patch,
//! server-side apply and delete as the real one does, selectors, pages, bookmarks and time-outs included. And it
//! misbehaves on request: see [`KubeApi::behave`] and the functions beside it. It can be ended and started again on the
//! same port, with or without its memory.

mod cert_manager;
mod objects;
mod server;
pub mod slices;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::ServerConfig;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use self::objects::Kind;
use self::objects::Objects;
pub use self::slices::{Pod, Slice};

/// A running API server; ended when dropped.
pub struct KubeApi {
    pub addr: SocketAddr,
    state: Arc<State>,
    tls: Option<Arc<ServerConfig>>,
    task: Option<JoinHandle<()>>,
}

/// How it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    #[default]
    Well,
    /// 500 with a `Status`; running watches are ended.
    Errors,
    /// The head and some bytes of an answer come, and no more. Running watches are ended.
    SlowBody,
    /// Answers break off in the middle, running watches in the middle of an event.
    HalfBody,
    /// Requests are read and not answered. Running watches stay open and say nothing more, as if half open.
    Silent,
    /// 200 with something that is not JSON.
    Garbage,
    /// Lists break off after their first page: the next ones are answered with 500.
    FirstPages,
}

struct State {
    kept: Mutex<Kept>,
    /// Counts what happens, to wake the watches.
    changes: watch::Sender<u64>,
    connections: AtomicUsize,
}

struct Kept {
    objects: Objects,
    manner: Manner,
    /// Ends the watches that were begun under another number.
    era: u64,
    /// Watches are answered and then never say anything; not even their time-out ends them.
    deaf_watches: bool,
    /// Expired versions are told in the stream of a watch and not by the status of the answer.
    expire_in_stream: bool,
    /// Of how many versions the history is kept.
    tokens: Option<Vec<String>>,
    /// Kinds that there are not, and those that nobody may read, by their plural.
    missing: Vec<String>,
    forbidden: Vec<String>,
    bookmark_every: std::time::Duration,
    requests: Vec<String>,
    /// Names of users by token, for `TokenReview`.
    users: Vec<(String, String)>,
}

impl KubeApi {
    /// Speaks HTTP on a port of its own.
    pub async fn start() -> KubeApi {
        Self::start_with(None).await
    }

    /// Speaks HTTPS.
    pub async fn start_tls(tls: Arc<ServerConfig>) -> KubeApi {
        Self::start_with(Some(tls)).await
    }

    async fn start_with(tls: Option<Arc<ServerConfig>>) -> KubeApi {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port for the API server");
        let addr = listener.local_addr().expect("the address of the API server");
        let state = Arc::new(State {
            kept: Mutex::new(Kept::new()),
            changes: watch::channel(0).0,
            connections: AtomicUsize::new(0),
        });
        let task = tokio::spawn(server::serve(listener, Arc::clone(&state), tls.clone()));
        KubeApi { addr, state, tls, task: Some(task) }
    }

    /// Closes its socket and every connection; what it knows stays.
    pub async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
        self.state.end_watches();
    }

    /// Listens again on its port.
    pub async fn resume(&mut self) {
        self.stop().await;
        let addr = self.addr;
        let bind = || async move {
            // The port may be held for a moment by connections that are being closed.
            let socket = tokio::net::TcpSocket::new_v4().ok()?;
            socket.set_reuseaddr(true).ok()?;
            socket.bind(addr).ok()?;
            socket.listen(1024).ok()
        };
        let listener = crate::eventually("the API server listens again", bind).await;
        let task = tokio::spawn(server::serve(listener, Arc::clone(&self.state), self.tls.clone()));
        self.task = Some(task);
    }

    /// Forgets everything, and counts its versions from the beginning.
    pub fn forget(&self) {
        self.state.kept().objects = Objects::new();
        self.state.end_watches();
    }

    /// Is restored from a backup with the same contents: versions are those of another history, and smaller.
    pub fn rewind(&self) {
        self.state.kept().objects.rewind();
        self.state.end_watches();
    }

    pub fn behave(&self, manner: Manner) {
        self.state.kept().manner = manner;
        if !matches!(manner, Manner::Well | Manner::Silent | Manner::FirstPages) {
            self.state.end_watches();
        }
        self.state.changed();
    }

    /// Forgets the history up to now, as compaction does. A watch that begins before is told 410: by the status of the
    /// answer, or by an event in the stream. Running watches end, with that event where it is to be in the stream.
    pub fn expire(&self, in_stream: bool) {
        let mut kept = self.state.kept();
        kept.objects.compact();
        kept.expire_in_stream = in_stream;
        drop(kept);
        self.state.end_watches();
    }

    /// Ends all watches as their time-outs would.
    pub fn end_watches(&self) {
        self.state.end_watches();
    }

    /// Whether watches from now on are deaf: begun, and then silent for ever, as over a connection that is half open.
    /// Those that run are ended.
    pub fn deafen_watches(&self, deaf: bool) {
        self.state.kept().deaf_watches = deaf;
        self.state.end_watches();
    }

    /// The bearer tokens that are accepted from now on; none means that nobody has to show one.
    pub fn accept_tokens(&self, tokens: &[&str]) {
        let tokens: Vec<String> = tokens.iter().map(|token| (*token).to_owned()).collect();
        self.state.kept().tokens = (!tokens.is_empty()).then_some(tokens);
    }

    /// `TokenReview` says that the token is that of this user.
    pub fn user(&self, token: &str, name: &str) {
        self.state.kept().users.push((token.to_owned(), name.to_owned()));
    }

    /// Answers 404 for a kind, as a cluster that does not have it.
    pub fn lacks(&self, plural: &str) {
        self.state.kept().missing.push(plural.to_owned());
    }

    /// Answers 403 for a kind.
    pub fn forbids(&self, plural: &str) {
        self.state.kept().forbidden.push(plural.to_owned());
    }

    pub fn bookmark_every(&self, period: std::time::Duration) {
        self.state.kept().bookmark_every = period;
        self.state.end_watches();
    }

    /// Method, path and query of every request so far, in their order.
    pub fn requests(&self) -> Vec<String> {
        self.state.kept().requests.clone()
    }

    /// The lists of a kind so far, and the watches, pages counted once each.
    pub fn asked(&self, plural: &str) -> (usize, usize) {
        let requests = self.requests();
        let of_kind = requests
            .iter()
            .filter(|line| line.split('?').next().is_some_and(|path| path.ends_with(&format!("/{plural}"))));
        let (watches, lists): (Vec<_>, Vec<_>) = of_kind.partition(|line| line.contains("watch=1"));
        (lists.len(), watches.len())
    }

    /// Makes an object or replaces it.
    pub fn put(&self, kind: Kind, object: Value) {
        self.state.kept().objects.put(kind, object);
        self.state.changed();
    }

    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        self.state.kept().objects.delete(kind, namespace, name);
        self.state.changed();
    }

    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        self.state.kept().objects.get(kind, namespace, name)
    }

    /// Open connections.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// `discovery.kubernetes` for this server.
    pub fn settings(&self) -> Value {
        json!({
            "service": {
                "schema": if self.tls.is_some() { "https" } else { "http" },
                "host": "127.0.0.1", "port": self.addr.port().to_string(),
            },
            "watch_retry_max_seconds": 1, "request_timeout_seconds": 1,
        })
    }
}

impl Drop for KubeApi {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Kept {
    fn new() -> Self {
        Self {
            objects: Objects::new(),
            manner: Manner::Well,
            era: 0,
            deaf_watches: false,
            expire_in_stream: false,
            tokens: None,
            missing: Vec::new(),
            forbidden: Vec::new(),
            bookmark_every: std::time::Duration::from_secs(60),
            requests: Vec::new(),
            users: Vec::new(),
        }
    }
}

impl State {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn end_watches(&self) {
        self.kept().era += 1;
        self.changed();
    }
}
