//! Upstreams that live inside the test, one behaviour per file.
//!
//! An origin runs on the runtime of its test and stops when its [`Origin`] is dropped.

pub mod chunk_drip;
pub mod early_close;
pub mod echo;
pub mod grpc;
pub mod h2_reset;
pub mod held;
pub mod kafka;
pub mod keepalive_race;
pub mod malformed;
pub mod recorder;
pub mod reset;
pub mod slow_body;
pub mod sse;
pub mod stall;
pub mod websocket;

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::client::Io;
use crate::eventually;
use crate::ports::Port;

/// A running upstream and what it has seen.
#[derive(Debug)]
pub struct Origin {
    pub addr: SocketAddr,
    seen: Arc<Seen>,
    task: tokio::task::JoinHandle<()>,
    _port: Option<Port>,
}

/// Counters every origin keeps.
#[derive(Debug, Default)]
pub struct Seen {
    connections: AtomicUsize,
    open: AtomicUsize,
    requests: AtomicUsize,
}

impl Seen {
    /// To be called by an origin for each request it has begun to read.
    pub fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}

impl Origin {
    /// Starts an origin that handles each accepted connection by `handle`.
    pub async fn tcp<H, F>(handle: H) -> Origin
    where
        H: Fn(TcpStream, Arc<Seen>) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        Origin::tcp_at((Ipv4Addr::LOCALHOST, 0).into(), handle).await
    }

    /// [`Origin::tcp`] at an address: to come back where another origin was.
    pub async fn tcp_at<H, F>(addr: SocketAddr, handle: H) -> Origin
    where
        H: Fn(TcpStream, Arc<Seen>) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        // A port of the kernel's choice may be taken for an outgoing connection while nobody listens there.
        let port = (addr.port() == 0).then(Port::free);
        let addr = SocketAddr::new(addr.ip(), port.as_ref().map_or(addr.port(), Port::number));
        // A process that is being started has what was open here until it runs, a listener that was closed meanwhile included.
        let bind = || async move { TcpListener::bind(addr).await.ok() };
        let listener = eventually(&format!("{addr} can be listened on"), bind).await;
        let seen = Arc::new(Seen::default());
        let counters = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            // Dropping the set ends every connection together with the origin.
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((stream, _)) = accepted else { continue };
                        let _ = stream.set_nodelay(true);
                        counters.connections.fetch_add(1, Ordering::Relaxed);
                        counters.open.fetch_add(1, Ordering::Relaxed);
                        let closed = OnDrop(Arc::clone(&counters));
                        let handled = handle(stream, Arc::clone(&counters));
                        connections.spawn(async move {
                            handled.await;
                            drop(closed);
                        });
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Origin { addr, seen, task, _port: port }
    }

    /// An HTTP/1 and cleartext HTTP/2 origin that answers each whole request by `answer`.
    pub async fn http<H, F>(answer: H) -> Origin
    where
        H: Fn(Request<Bytes>) -> F + Send + Sync + 'static,
        F: Future<Output = Response<Bytes>> + Send + 'static,
    {
        Origin::http_at((Ipv4Addr::LOCALHOST, 0).into(), answer).await
    }

    /// [`Origin::http`] at an address.
    pub async fn http_at<H, F>(addr: SocketAddr, answer: H) -> Origin
    where
        H: Fn(Request<Bytes>) -> F + Send + Sync + 'static,
        F: Future<Output = Response<Bytes>> + Send + 'static,
    {
        let answer = whole(answer);
        Origin::tcp_at(addr, move |stream, seen| serve(stream, seen, Arc::clone(&answer))).await
    }

    /// [`Origin::http`] over TLS.
    pub async fn https<H, F>(config: Arc<ServerConfig>, answer: H) -> Origin
    where
        H: Fn(Request<Bytes>) -> F + Send + Sync + 'static,
        F: Future<Output = Response<Bytes>> + Send + 'static,
    {
        let answer = whole(answer);
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        Origin::tcp(move |stream, seen| {
            let (acceptor, answer) = (acceptor.clone(), Arc::clone(&answer));
            async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream, seen, answer).await;
                }
            }
        })
        .await
    }

    /// `host:port`, as the nodes of an upstream are named.
    pub fn node(&self) -> String {
        self.addr.to_string()
    }

    /// `{"nodes": {"host:port": 1}, "type": "roundrobin"}`
    pub fn upstream(&self) -> Value {
        json!({"type": "roundrobin", "nodes": {self.node(): 1}})
    }

    /// How many connections were accepted so far.
    pub fn connections(&self) -> usize {
        self.seen.connections.load(Ordering::Relaxed)
    }

    /// How many connections are open now.
    pub fn open_connections(&self) -> usize {
        self.seen.open.load(Ordering::Relaxed)
    }

    /// How many requests were begun so far.
    pub fn requests(&self) -> usize {
        self.seen.requests.load(Ordering::Relaxed)
    }

    /// Stops listening and cuts every connection; gives the address for another origin to take.
    pub async fn stop(mut self) -> SocketAddr {
        self.task.abort();
        let _ = (&mut self.task).await;
        self.addr
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct OnDrop(Arc<Seen>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

type Answering =
    dyn Fn(Request<Bytes>) -> futures_util::future::BoxFuture<'static, Response<Bytes>> + Send + Sync;

fn whole<H, F>(answer: H) -> Arc<Answering>
where
    H: Fn(Request<Bytes>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Bytes>> + Send + 'static,
{
    Arc::new(move |request| Box::pin(answer(request)))
}

async fn serve(io: impl Io + 'static, seen: Arc<Seen>, answer: Arc<Answering>) {
    serve_with(io, move |request: Request<Incoming>| {
        let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
        async move {
            seen.request();
            let (mut parts, body) = request.into_parts();
            // A client that breaks off its body gets no answer worth looking at.
            let collected = body.collect().await.ok();
            if let Some(trailers) = collected.as_ref().and_then(|body| body.trailers()) {
                parts.extensions.insert(trailers.clone());
            }
            let body = collected.map(|body| body.to_bytes()).unwrap_or_default();
            answer(Request::from_parts(parts, body)).await.map(Full::new)
        }
    })
    .await;
}

/// Serves one connection, HTTP/1 or cleartext HTTP/2, with bodies as streams.
pub async fn serve_with<H, F, B>(io: impl Io + 'static, handle: H)
where
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<crate::client::BoxError>,
{
    let handle = Arc::new(handle);
    let service = service_fn(move |request| {
        let answer = handle(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().half_close(true);
    let _ = builder.serve_connection_with_upgrades(TokioIo::new(io), service).await;
}

/// Reads up to the end of the next request head on a raw connection; `None` when the peer closed.
pub async fn read_head(stream: &mut (impl Io + ?Sized)) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).await.ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    Some(head)
}

/// Writes an answer of `status` with a whole body, keep-alive.
pub async fn write_answer(stream: &mut (impl Io + ?Sized), status: u16, body: &str) -> std::io::Result<()> {
    let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await
}
