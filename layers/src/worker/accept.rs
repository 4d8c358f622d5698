//! From a listening socket to a connection that is served: accept, count, PROXY header, TLS handshake. A worker that
//! has its fill closes its longest idle connection for a new one, or else the new one; one that has no file
//! descriptor left waits a little instead of spinning. Where connections may be something else than HTTP, a [`Doorman`]
//! meets them first; they are counted, limited and ended as all others.

use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use ipnet::IpNet;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::exchange::{Conn, Tls};
use crate::local::LocalBox;
use crate::stack::HttpService;
use crate::transport::proxy_protocol::{self, Ends, Malformed, Parsed};
use crate::transport::tls_server::{self, HandshakeError, TlsListen};
use crate::worker::context::{OpenConnection, WorkerContext};
use crate::worker::deadlines::{Ended, Phase, Watch, Watched};
use crate::worker::drain::Stage;
use crate::worker::io::{Socket, Stream};
use crate::worker::serve::{Server, Speaks, until_ended};

/// The pause after the first failure to accept for want of descriptors or memory; it doubles up to the second.
const STARVED: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// What connections of one listener are.
#[derive(Clone, Default)]
pub struct ListenOptions {
    /// TLS, and HTTP/2 by ALPN.
    pub tls: Option<TlsListen>,
    /// HTTP/2 without TLS, told by its first bytes.
    pub http2: bool,
    /// A PROXY header is expected.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Who meets connections first; `tls` and `http2` are its matter then.
    pub doorman: Option<Arc<dyn Doorman>>,
}

/// Meets the connections of a listener before HTTP does: tells what they are, and serves those that are not HTTP.
pub trait Doorman: Send + Sync + 'static {
    /// Meets one connection, on the worker that has accepted it. Until it says [`Arrival::opaque`] the time for handshakes
    /// runs; it is dropped when the connection is ended from outside.
    fn meet(self: Arc<Self>, socket: Socket, arrival: Arrival) -> LocalBox<'static, Met>;
}

/// A connection that has just been accepted.
pub struct Arrival {
    /// Its ends.
    pub ends: Ends,
    /// The worker that has accepted it.
    pub context: Rc<WorkerContext>,
    /// By which it can be ended while its doorman has it.
    pub watch: Arc<Watch>,
}

impl Arrival {
    /// Waits until the worker drains. Every connection's task is woken then, and as often as needed after it.
    pub fn draining(&self) -> impl Future<Output = ()> + use<> {
        let context = self.context.clone();
        poll_fn(move |_| if context.is_draining() { Poll::Ready(()) } else { Poll::Pending })
    }

    /// From here on the connection is bytes, which nobody has to understand. It counts as a tunnel until this is dropped.
    pub fn opaque(&self) -> OpaqueGuard {
        self.watch.busy();
        self.context.stats().tunnels.add(1);
        OpaqueGuard(self.context.clone())
    }
}

/// Counts a connection whose bytes nobody understands.
pub struct OpaqueGuard(Rc<WorkerContext>);

impl Drop for OpaqueGuard {
    fn drop(&mut self) {
        let tunnels = &self.0.stats().tunnels;
        tunnels.set(tunnels.get().saturating_sub(1));
    }
}

/// What a doorman made of a connection.
pub enum Met {
    /// It goes on as HTTP.
    Http {
        /// Its bytes, with those that were looked at.
        stream: Stream,
        /// What is known of it.
        conn: Box<Conn>,
        /// Which HTTP.
        speaks: Speaks,
    },
    /// It was served to its end, or refused.
    Over,
    /// The handshake failed, and why that was told.
    Failed,
}

/// Whose PROXY header is believed.
#[derive(Clone, Debug, Default)]
pub struct ProxyProtocol {
    /// Peers whose header names the client; from others it is read and ignored. Empty means everybody's.
    pub trusted: Vec<IpNet>,
}

/// A listener: its sockets, one for each worker, and what its connections are.
pub struct Listening {
    /// As [`Listen::bind`](crate::transport::listen::Listen::bind) makes them.
    pub sockets: Vec<StdListener>,
    /// What arrives there.
    pub options: ListenOptions,
}

/// One worker's end of a listener.
pub(crate) struct Acceptor<S: HttpService> {
    pub server: Rc<Server<S>>,
    pub context: Rc<WorkerContext>,
    pub options: Rc<ListenOptions>,
    /// Connections that the worker has at most.
    pub limit: usize,
}

impl<S: HttpService> Clone for Acceptor<S> {
    fn clone(&self) -> Self {
        Self {
            server: self.server.clone(),
            context: self.context.clone(),
            options: self.options.clone(),
            limit: self.limit,
        }
    }
}

impl<S: HttpService> Acceptor<S> {
    /// Accepts until the worker drains, and then what is still queued.
    ///
    /// # Errors
    /// The socket cannot be used by this runtime.
    pub async fn run(self, socket: StdListener, mut stage: watch::Receiver<Stage>) -> io::Result<()> {
        let listener = TcpListener::from_std(socket)?;
        let local = listener.local_addr()?;
        let mut pause = STARVED.0;
        while matches!(*stage.borrow_and_update(), Stage::Serving) {
            let accepted = tokio::select! {
                biased;
                changed = stage.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => break,
                },
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((tcp, peer)) => {
                    pause = STARVED.0;
                    self.admit(tcp, peer, local);
                }
                Err(error) if is_starved(&error) => {
                    self.starved(&error, pause == STARVED.0);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(STARVED.1);
                }
                // The client was gone before we came: that is its matter.
                Err(error) => tracing::debug!(%error, %local, "accept"),
            }
        }
        // Closing a socket resets what is queued on it, so the queue is emptied first.
        let socket = listener.into_std()?;
        while let Ok((tcp, peer)) = socket.accept() {
            tcp.set_nonblocking(true)?;
            self.admit(TcpStream::from_std(tcp)?, peer, local);
        }
        Ok(())
    }

    fn starved(&self, error: &io::Error, first: bool) {
        self.context.stats().starved.add(1);
        if first {
            tracing::error!(%error, "cannot accept connections; raise the limit of open files or connections");
        }
        if self.context.deadlines().evict() {
            self.context.stats().evicted.add(1);
        }
    }

    fn admit(&self, tcp: TcpStream, peer: SocketAddr, local: SocketAddr) {
        let stats = self.context.stats();
        stats.accepted.add(1);
        if self.context.connections() >= self.limit {
            if !self.context.deadlines().evict() {
                stats.rejected.add(1);
                return;
            }
            stats.evicted.add(1);
        }
        let open = OpenConnection::new(&self.context);
        // Known for all connections of a socket that is bound to one address.
        let local = if local.ip().is_unspecified() { tcp.local_addr().unwrap_or(local) } else { local };
        let ends = Ends { source: peer, destination: local };
        let socket = Socket::new(tcp);
        let options = &self.options;
        if options.tls.is_some() || options.proxy_protocol.is_some() || options.doorman.is_some() {
            tokio::task::spawn_local(self.clone().greet(socket, ends, open));
        } else {
            let speaks = if self.options.http2 { Speaks::Either } else { Speaks::Http1 };
            self.serve(Stream::Plain(socket), ends, None, speaks, open);
        }
    }

    fn serve(&self, stream: Stream, ends: Ends, tls: Option<Tls>, speaks: Speaks, open: OpenConnection) {
        let conn = Box::new(Conn::new(ends.source, ends.destination, tls));
        self.serve_as(stream, conn, speaks, open);
    }

    /// Serves a connection in a task of its own, which is small however large what came before was.
    fn serve_as(&self, stream: Stream, conn: Box<Conn>, speaks: Speaks, open: OpenConnection) {
        let watched = self.context.deadlines().watch(Phase::Head);
        if let Some(door) = &conn.door {
            door.watched(watched.watch());
        }
        tokio::task::spawn_local(self.server.clone().serve(stream, conn, speaks, watched, open));
    }

    /// What a connection has before its first request: a PROXY header, a TLS handshake.
    async fn greet(self, mut socket: Socket, mut ends: Ends, open: OpenConnection) {
        let watched = self.context.deadlines().watch(Phase::Handshake);
        poll_fn(|cx| {
            watched.attach(cx);
            Poll::Ready(())
        })
        .await;
        let peer = ends.source;
        if let Some(proxy) = &self.options.proxy_protocol {
            match until_ended(&watched, proxy_header(&mut socket)).await {
                Ok(Ok(Some(told))) if proxy.believes(peer) => ends = told,
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    self.context.stats().proxy_refused.add(1);
                    tracing::info!(%error, %peer, "connection refused");
                    return;
                }
                Err(cause) => return self.ended(&watched, cause, peer),
            }
        }
        if let Some(doorman) = self.options.doorman.clone() {
            let arrival = Arrival { ends, context: self.context.clone(), watch: watched.watch().clone() };
            match until_ended(&watched, doorman.meet(socket, arrival)).await {
                Ok(Met::Http { stream, conn, speaks }) => {
                    self.context.stats().handshakes.add(u64::from(conn.tls.is_some()));
                    self.serve_as(stream, conn, speaks, open);
                }
                Ok(Met::Over) => {}
                Ok(Met::Failed) => self.context.stats().handshakes_failed.add(1),
                Err(cause) => self.ended(&watched, cause, peer),
            }
            return;
        }
        let (stream, tls, speaks) = match &self.options.tls {
            None => {
                let speaks = if self.options.http2 { Speaks::Either } else { Speaks::Http1 };
                (Stream::Plain(socket), None, speaks)
            }
            Some(listen) => match until_ended(&watched, tls_server::accept(socket, listen)).await {
                Ok(Ok(accepted)) => self.accepted(accepted),
                Ok(Err(error)) => return self.handshake_failed(&error, peer),
                Err(cause) => return self.ended(&watched, cause, peer),
            },
        };
        self.serve(stream, ends, tls, speaks, open);
    }

    fn accepted(&self, accepted: tls_server::Accepted<Socket>) -> (Stream, Option<Tls>, Speaks) {
        let stats = self.context.stats();
        stats.handshakes.add(1);
        stats.resumed.add(u64::from(accepted.resumed));
        let speaks = if accepted.http2 { Speaks::Http2 } else { Speaks::Http1 };
        (Stream::Tls(Box::new(accepted.stream)), Some(accepted.tls), speaks)
    }

    fn handshake_failed(&self, error: &HandshakeError, peer: SocketAddr) {
        let stats = self.context.stats();
        match error {
            HandshakeError::AcmeChallenge => stats.handshakes.add(1),
            _ => stats.handshakes_failed.add(1),
        }
        tracing::debug!(%error, %peer, "handshake");
    }

    fn ended(&self, watched: &Watched, cause: Ended, peer: SocketAddr) {
        self.context.count_ended(cause);
        if cause == Ended::Drain {
            self.context.report_casualty(peer, watched.in_flight());
        }
    }
}

impl ProxyProtocol {
    fn believes(&self, peer: SocketAddr) -> bool {
        let ip = peer.ip().to_canonical();
        self.trusted.is_empty() || self.trusted.iter().any(|net| net.contains(&ip))
    }
}

fn is_starved(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let starved = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
    error.raw_os_error().is_some_and(|code| starved.contains(&Errno::from_raw(code)))
}

#[derive(Debug, thiserror::Error)]
enum ProxyError {
    #[error("the connection ended inside its PROXY header")]
    Cut,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads a PROXY header and leaves what follows it to the next reader.
async fn proxy_header(socket: &mut Socket) -> Result<Option<Ends>, ProxyError> {
    // Nearly every header comes in one piece of about a hundred bytes.
    let mut bytes = Vec::with_capacity(256);
    loop {
        if socket.read_buf(&mut bytes).await? == 0 {
            return Err(ProxyError::Cut);
        }
        match proxy_protocol::parse(&bytes)? {
            Parsed::Partial if bytes.len() > proxy_protocol::MAX_HEADER => {
                return Err(Malformed::TooLong.into());
            }
            Parsed::Partial => {}
            Parsed::Header { length, ends } => {
                socket.put_back(bytes.get(length..).unwrap_or_default());
                return Ok(ends);
            }
        }
    }
}
