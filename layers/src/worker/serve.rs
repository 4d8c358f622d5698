//! Hands a connection to the protocol engine, and takes it back while it idles. The only file that knows hyper on
//! the client's side: another engine replaces what is here and nothing else.
//!
//! A connection waits for its first bytes without an engine, so it costs a socket and little more; after a second
//! of idling it is taken out of the engine again. The worker's stack is borrowed for the length of `call` only.

use std::cell::{Cell, OnceCell, RefCell};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};

use crate::body::{Body, BodyError};
use crate::error::{Error, Fault, Reason};
use crate::exchange::{Conn, Exchange, OwnStack, ResponseBody};
use crate::local::LocalBox;
use crate::rescue;
use crate::stack::{HttpService, Requests};
use crate::transport::framing::{Guard, HeadLimits, Position};
use crate::upgrade::Upgrade;
use crate::worker::context::{OpenConnection, WorkerContext};
use crate::worker::deadlines::{Ended, Phase, Watch, Watched};
use crate::worker::io::{Command, Io, Link, Stream};

/// What an HTTP/2 connection begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes read at once while no engine holds the connection.
const PIECE: usize = 16 * 1024;
/// While draining, a connection that was quiet for this many ticks is closed; a busier one gets its close with the
/// next answer, so that no request crosses it on the way.
const QUIET: u32 = 2;
/// Buffered bytes of one HTTP/1 connection in each direction.
const BUFFER: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; PIECE].into());
}

/// Limits of HTTP/2 connections.
#[derive(Clone, Copy, Debug)]
pub struct Http2 {
    /// Requests at once on one connection.
    pub streams: u32,
    /// Bytes of a request body that may wait for their reader.
    pub stream_window: u32,
    /// The same for the whole connection.
    pub connection_window: u32,
    /// Bytes of an answer that may wait for the client.
    pub send_buffer: usize,
    /// Resets that the client provokes before the connection ends.
    pub local_resets: usize,
    /// How often a silent client is asked whether it is there. It costs a timer per connection; the keep-alive of
    /// TCP notices a vanished client too, only later.
    pub ping: Option<Duration>,
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            streams: 128,
            stream_window: 64 * 1024,
            connection_window: 1024 * 1024,
            send_buffer: 64 * 1024,
            local_resets: 1024,
            ping: None,
        }
    }
}

/// How connections are served.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// How large a request head may be, in both protocols.
    pub head: HeadLimits,
    /// HTTP/2.
    pub http2: Http2,
    /// A client that closes its sending side still gets its answer. Where it is off, that ends the request.
    pub half_close: bool,
}

impl Default for ServeSettings {
    fn default() -> Self {
        Self { head: HeadLimits::default(), http2: Http2::default(), half_close: true }
    }
}

/// Which protocol a connection is known to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1 only.
    Http1,
    /// HTTP/2, agreed on in the handshake.
    Http2,
    /// Either: its first bytes tell.
    Either,
}

/// The engines and the stack of one worker.
pub struct Server<S> {
    stack: RefCell<S>,
    context: Rc<WorkerContext>,
    settings: ServeSettings,
    http1: http1::Builder,
}

impl<S: HttpService> Server<S> {
    /// With the worker's own stack.
    pub fn new(context: &Rc<WorkerContext>, stack: S, settings: ServeSettings) -> Rc<Self> {
        let mut http1 = http1::Builder::new();
        http1
            .half_close(settings.half_close)
            // The deadlines see to it, without a timer per connection.
            .header_read_timeout(None)
            .max_buf_size(BUFFER.max(settings.head.head + 8 * 1024));
        if settings.head.fields > 100 {
            http1.max_headers(settings.head.fields);
        }
        Rc::new(Self { stack: RefCell::new(stack), context: context.clone(), settings, http1 })
    }

    /// Serves a connection to its end. `watched` has its deadlines so far.
    pub(crate) async fn serve(
        self: Rc<Self>,
        stream: Stream,
        conn: Box<Conn>,
        speaks: Speaks,
        watched: Watched,
        _open: OpenConnection,
    ) {
        let mut conn = conn;
        conn.stack = OwnStack(Some(self.clone()));
        let shared = Rc::new(Shared {
            conn: Rc::from(conn),
            context: self.context.clone(),
            watch: watched.watch().clone(),
            link: Arc::default(),
            calls: Cell::new(0),
            next_stream: Cell::new(None),
        });
        // Boxed, and handed over as a box: every place it may be in would count in the size of the task.
        let mut client =
            Box::new(Client { stream, guard: Guard::new(self.settings.head), early: Vec::new() });
        let mut speaks = speaks;
        watched.park(Phase::Head);
        loop {
            let served = match client.first_bytes(&watched, &self.context, speaks).await {
                First::Http1 => {
                    speaks = Speaks::Http1;
                    watched.unpark();
                    self.http1(client, &shared, &watched).await
                }
                First::Http2 => {
                    watched.unpark();
                    return self.http2(client, &shared, &watched).await;
                }
                First::Quiet | First::Ended(Ended::IdleTimeout) => Served::Close(client),
                First::Ended(cause) => return shared.ended(cause),
                First::Closed => return,
            };
            match served {
                Served::Idle(idle) => {
                    self.context.stats().parked.add(1);
                    watched.park(Phase::Idle);
                    client = idle;
                }
                Served::Close(client) => return client.close(&watched, &self.context).await,
                Served::Tunnel => return tunnel(&shared, &watched).await,
                Served::Gone => return,
            }
        }
    }

    async fn http1(self: &Rc<Self>, client: Box<Client>, shared: &Rc<Shared>, watched: &Watched) -> Served {
        let link = &shared.link;
        link.restart();
        let mut engine = self.http1_engine(client, shared);
        watched.allow_parking(true);
        let mut excused = false;
        let end = poll_fn(|cx| {
            let idle = watched.phase() == Phase::Idle && link.is_sent() && watched.in_flight() == 0;
            match watched.ended() {
                None => {}
                Some(Ended::IdleTimeout) if idle => return Poll::Ready(End::Quiet),
                // These are answered, once.
                Some(Ended::HeaderTimeout) if !excused => {
                    excused = true;
                    link.command(Command::SlowHead);
                    watched.pardon();
                    shared.context.count_ended(Ended::HeaderTimeout);
                }
                Some(Ended::BodyTimeout) if !excused => {
                    excused = true;
                    link.command(Command::SlowBody);
                    watched.pardon();
                    shared.context.count_ended(Ended::BodyTimeout);
                }
                Some(cause) => return Poll::Ready(End::Ended(cause)),
            }
            if idle && watched.wants_parking() {
                return Poll::Ready(End::Idle);
            }
            if idle && self.context.is_draining() && watched.waited() >= QUIET {
                return Poll::Ready(End::Quiet);
            }
            Pin::new(&mut *engine).poll(cx).map(End::Served)
        })
        .await;
        watched.allow_parking(false);
        match &end {
            End::Ended(cause) => {
                shared.ended(*cause);
                return Served::Gone;
            }
            End::Served(Err(error)) => tracing::debug!(%error, peer = %shared.conn.peer, "connection ended"),
            _ => {}
        }
        let Some(parts) = engine.into_parts() else { return Served::Tunnel };
        let (stream, Some(mut guard)) = parts.io.into_inner().into_parts() else { return Served::Gone };
        guard.put_back(&parts.read_buf);
        let client = Box::new(Client { stream, guard, early: Vec::new() });
        match end {
            End::Idle => Served::Idle(client),
            End::Quiet => Served::Close(client),
            // The engine has said goodbye. While the client may still be sending, closing would take the answer
            // from it: the kernel answers unread bytes with a reset.
            _ if !link.is_eof() && client.may_send() => Served::Close(client),
            _ => Served::Gone,
        }
    }

    fn http1_engine(self: &Rc<Self>, client: Box<Client>, shared: &Rc<Shared>) -> Box<Http1Engine<S>> {
        let io = Io::http1(client.stream, client.guard, shared.watch.clone(), shared.link.clone());
        let bridge = Bridge { server: self.clone(), shared: shared.clone(), http2: false };
        Box::new(self.http1.serve_connection(TokioIo::new(io), bridge).with_upgrades())
    }

    fn http2_engine(self: &Rc<Self>, client: Box<Client>, shared: &Rc<Shared>) -> Pin<Box<Http2Engine<S>>> {
        let io = Io::http2(client.stream, client.early, shared.watch.clone(), shared.link.clone());
        let limits = &self.settings.http2;
        let mut builder = http2::Builder::new(StreamExecutor(shared.clone()));
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(limits.ping)
            .max_concurrent_streams(limits.streams)
            .initial_stream_window_size(limits.stream_window)
            .initial_connection_window_size(limits.connection_window)
            .max_send_buf_size(limits.send_buffer)
            .max_local_error_reset_streams(limits.local_resets)
            .max_header_list_size(u32::try_from(self.settings.head.head).unwrap_or(u32::MAX));
        let bridge = Bridge { server: self.clone(), shared: shared.clone(), http2: true };
        Box::pin(builder.serve_connection(TokioIo::new(io), bridge))
    }

    async fn http2(self: &Rc<Self>, client: Box<Client>, shared: &Rc<Shared>, watched: &Watched) {
        let link = &shared.link;
        let mut engine = self.http2_engine(client, shared);
        let mut leaving = false;
        let end = poll_fn(|cx| {
            if let Some(flood) = link.flood() {
                shared.context.stats().floods.add(1);
                tracing::info!(peer = %shared.conn.peer, %flood, "connection ended");
                // GOAWAY goes out if the socket takes it at once; nothing more is read or waited for.
                engine.as_mut().graceful_shutdown();
                let _ = engine.as_mut().poll(cx);
                return Poll::Ready(None);
            }
            match watched.ended() {
                None => {}
                Some(cause @ (Ended::IdleTimeout | Ended::HeaderTimeout)) if !leaving => {
                    leaving = true;
                    shared.context.count_ended(cause);
                    engine.as_mut().graceful_shutdown();
                    watched.pardon();
                    watched.enter(Phase::Linger);
                }
                Some(cause) => {
                    shared.ended(cause);
                    return Poll::Ready(None);
                }
            }
            if shared.context.is_draining() && !leaving {
                leaving = true;
                engine.as_mut().graceful_shutdown();
            }
            engine.as_mut().poll(cx).map(Some)
        })
        .await;
        if let Some(Err(error)) = end {
            tracing::debug!(%error, peer = %shared.conn.peer, "connection ended");
        }
    }
}

type Http1Engine<S> = http1::UpgradeableConnection<TokioIo<Io>, Bridge<S>>;
type Http2Engine<S> = http2::Connection<TokioIo<Io>, Bridge<S>, StreamExecutor>;

/// Waits for the end of a tunnel; whoever took it over moves the bytes.
async fn tunnel(shared: &Shared, watched: &Watched) {
    let stats = shared.context.stats();
    stats.tunnels.add(1);
    let mut told = false;
    poll_fn(|_| {
        if shared.link.is_closed() {
            return Poll::Ready(());
        }
        if let Some(cause) = watched.ended()
            && !std::mem::replace(&mut told, true)
        {
            shared.ended(cause);
            shared.link.wake_tunnel();
        }
        Poll::Pending
    })
    .await;
    stats.tunnels.set(stats.tunnels.get().saturating_sub(1));
}

/// Lets `future` run until the deadline of `watched`.
///
/// # Errors
/// Why it was ended.
pub(crate) async fn until_ended<F: Future>(watched: &Watched, future: F) -> Result<F::Output, Ended> {
    let mut future = pin!(future);
    poll_fn(|cx| match watched.ended() {
        Some(cause) => Poll::Ready(Err(cause)),
        None => future.as_mut().poll(cx).map(Ok),
    })
    .await
}

/// A connection that no engine holds.
struct Client {
    stream: Stream,
    guard: Guard,
    /// What came of a preface.
    early: Vec<u8>,
}

/// What a connection began with.
enum First {
    Http1,
    Http2,
    Closed,
    Ended(Ended),
    /// Nothing for a while, and the worker drains.
    Quiet,
}

/// How an engine came to its end.
enum End {
    Idle,
    Quiet,
    Ended(Ended),
    Served(hyper::Result<()>),
}

/// What is left of a connection after an engine had it.
enum Served {
    Idle(Box<Client>),
    Close(Box<Client>),
    Tunnel,
    Gone,
}

impl Client {
    /// Waits until there is something for an engine to do.
    async fn first_bytes(&mut self, watched: &Watched, context: &WorkerContext, speaks: Speaks) -> First {
        poll_fn(|cx| {
            watched.attach(cx);
            loop {
                if self.guard.is_ready() {
                    return Poll::Ready(First::Http1);
                }
                match watched.ended() {
                    Some(Ended::HeaderTimeout) if self.guard.position() == Position::Head => {
                        watched.pardon();
                        context.count_ended(Ended::HeaderTimeout);
                        self.guard.expire();
                        continue;
                    }
                    Some(cause) => return Poll::Ready(First::Ended(cause)),
                    None => {}
                }
                let begun = self.guard.position() != Position::Between || !self.early.is_empty();
                if !begun && context.is_draining() && watched.waited() >= QUIET {
                    return Poll::Ready(First::Quiet);
                }
                let decided = SCRATCH.with_borrow_mut(|scratch| {
                    let mut buf = ReadBuf::new(scratch);
                    match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf)) {
                        Ok(()) if !buf.filled().is_empty() => Poll::Ready(self.take(buf.filled(), speaks)),
                        _ => Poll::Ready(Some(First::Closed)),
                    }
                });
                match ready!(decided) {
                    Some(first) => return Poll::Ready(first),
                    None if watched.phase() == Phase::Idle => {
                        // The next request has begun; from here on it is to be complete in time.
                        watched.enter(Phase::Head);
                        watched.reschedule();
                    }
                    None => {}
                }
            }
        })
        .await
    }

    fn take(&mut self, bytes: &[u8], speaks: Speaks) -> Option<First> {
        match speaks {
            Speaks::Http1 => self.guard.push(bytes),
            Speaks::Http2 => {
                self.early.extend_from_slice(bytes);
                return Some(First::Http2);
            }
            Speaks::Either => {
                self.early.extend_from_slice(bytes);
                if self.early.starts_with(PREFACE) {
                    return Some(First::Http2);
                }
                if !PREFACE.starts_with(&self.early) {
                    let early = std::mem::take(&mut self.early);
                    if is_neither(&early) {
                        return Some(First::Closed);
                    }
                    self.guard.push(&early);
                }
            }
        }
        None
    }

    /// Whether more may come from the client than was read.
    fn may_send(&self) -> bool {
        self.guard.position() != Position::Between || self.guard.refusal().is_some() || !self.guard.is_empty()
    }

    /// Says goodbye, and reads what still comes until the client has closed too, so that nothing is reset.
    async fn close(mut self: Box<Self>, watched: &Watched, context: &WorkerContext) {
        watched.pardon();
        watched.enter(Phase::Linger);
        watched.unpark();
        if until_ended(watched, self.stream.shutdown()).await.is_err() {
            return context.count_ended(Ended::LingerTimeout);
        }
        let end = until_ended(
            watched,
            poll_fn(|cx| {
                loop {
                    if context.is_draining() && watched.waited() >= QUIET {
                        return Poll::Ready(());
                    }
                    let read = SCRATCH.with_borrow_mut(|scratch| {
                        let mut buf = ReadBuf::new(scratch);
                        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf));
                        Poll::Ready(read.is_ok() && !buf.filled().is_empty())
                    });
                    if !ready!(read) {
                        return Poll::Ready(());
                    }
                }
            }),
        );
        if let Err(cause) = end.await {
            context.count_ended(cause);
        }
    }
}

/// Whether bytes begin neither protocol: an answer in the one would be noise in the other.
fn is_neither(bytes: &[u8]) -> bool {
    let begin = bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(bytes.len());
    let line = bytes.get(begin..).unwrap_or_default();
    memchr::memchr(b'\n', line)
        .and_then(|end| line.get(..end))
        .is_some_and(|line| memchr::memmem::find(line, b" HTTP/1.").is_none())
}

impl<S: HttpService> Requests for Server<S> {
    fn send(&self, mut x: Exchange) -> LocalBox<'static, Exchange> {
        let called = match self.stack.try_borrow_mut() {
            Ok(mut stack) => Ok(stack.call(x)),
            Err(_) => {
                rescue::rescue(&mut x, Error::new(Reason::Internal).detail("the stack is in use"));
                Err(x)
            }
        };
        Box::pin(async move {
            match called {
                Ok(future) => future.await.unwrap_or_else(|Fault { mut exchange, error }| {
                    rescue::rescue(&mut exchange, error);
                    exchange
                }),
                Err(x) => x,
            }
        })
    }
}

/// What the requests of one connection share.
struct Shared {
    conn: Rc<Conn>,
    context: Rc<WorkerContext>,
    watch: Arc<Watch>,
    link: Arc<Link>,
    /// Requests that the engine has passed on.
    calls: Cell<u32>,
    /// From the call for an HTTP/2 request to the task that the engine makes of it.
    next_stream: Cell<Option<Rc<StreamState>>>,
}

impl Shared {
    fn ended(&self, cause: Ended) {
        self.context.count_ended(cause);
        let in_flight = self.watch.in_flight();
        if cause == Ended::Drain {
            self.context.report_casualty(self.conn.peer, in_flight);
        } else {
            tracing::debug!(peer = %self.conn.peer, in_flight, cause = cause.code(), "connection ended");
        }
    }
}

/// Counts a request while it is at work.
struct Flight {
    shared: Rc<Shared>,
    http2: bool,
}

impl Flight {
    fn new(shared: &Rc<Shared>, http2: bool) -> Self {
        shared.watch.set_in_flight(shared.watch.in_flight() + 1);
        shared.watch.busy();
        shared.link.answering();
        let stats = shared.context.stats();
        stats.requests.add(1);
        stats.in_flight.add(1);
        Self { shared: shared.clone(), http2 }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Shared { watch, link, context, .. } = &*self.shared;
        let left = watch.in_flight().saturating_sub(1);
        watch.set_in_flight(left);
        let in_flight = &context.stats().in_flight;
        in_flight.set(in_flight.get().saturating_sub(1));
        link.answered();
        // The engine has asked for the next request before this one was over, and will not ask again.
        if left == 0 && (self.http2 || link.waits()) {
            watch.enter(Phase::Idle);
        }
    }
}

/// The engine's way to the stack.
struct Bridge<S> {
    server: Rc<Server<S>>,
    shared: Rc<Shared>,
    http2: bool,
}

impl<S: HttpService> hyper::service::Service<Request<Incoming>> for Bridge<S> {
    type Response = Response<Outgoing>;
    type Error = Infallible;
    type Future = BridgeFuture<S::Future>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let shared = &self.shared;
        let flight = Flight::new(shared, self.http2);
        let calls = shared.calls.get().wrapping_add(1);
        shared.calls.set(calls);
        shared.conn.requests.set(shared.conn.requests.get() + 1);
        let mut stream = None;
        if self.http2 {
            let state = StreamState::new(shared);
            shared.next_stream.set(Some(state.clone()));
            stream = Some(state);
        }
        // Present only if a switch of protocols is asked for, so a plain request pays nothing.
        let mut upgrade = request.extensions_mut().remove::<OnUpgrade>();
        let switches = upgrade.is_some();
        if switches && asks_for_http2(&request) {
            upgrade = None;
            request.headers_mut().remove(header::UPGRADE);
            request.headers_mut().remove(HTTP2_SETTINGS);
        }
        let request = request.map(|body| match &stream {
            Some(state) if !body.is_end_stream() => {
                Body::boxed(TimedBody { body, state: state.clone(), fresh: true })
            }
            _ => Body::from(body),
        });
        let mut x = Exchange::new(request, shared.conn.clone());
        x.upgrade = upgrade.map(Upgrade::new);
        if let Some(refusal) = shared.link.refusal()
            && refusal.request == calls
        {
            shared.context.stats().refused.add(1);
            x.refused = Some(Error::new(refusal.violation.reason()).detail(refusal.violation.text()));
        }
        let future = self.server.stack.borrow_mut().call(x);
        BridgeFuture { future, flight: Some(flight), stream, switches }
    }
}

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// An upgrade to cleartext HTTP/2 is not offered: its bytes would pass every check unseen.
fn asks_for_http2(request: &Request<Incoming>) -> bool {
    let starts_with_h2 =
        |part: &[u8]| part.trim_ascii().get(..2).is_some_and(|p| p.eq_ignore_ascii_case(b"h2"));
    request
        .headers()
        .get_all(header::UPGRADE)
        .iter()
        .any(|value| value.as_bytes().split(|byte| *byte == b',').any(starts_with_h2))
}

pin_project! {
    /// The future of [`Bridge`].
    struct BridgeFuture<F> {
        #[pin]
        future: F,
        flight: Option<Flight>,
        stream: Option<Rc<StreamState>>,
        switches: bool,
    }
}

impl<F: Future<Output = Result<Exchange, Fault>>> Future for BridgeFuture<F> {
    type Output = Result<Response<Outgoing>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let x = match ready!(this.future.poll(cx)) {
            Ok(x) => x,
            Err(Fault { mut exchange, error }) => {
                // The stack answers its failures itself; this one came from outside of that layer.
                rescue::rescue(&mut exchange, error);
                exchange
            }
        };
        let mut response = x.into_response();
        let flight = this.flight.take();
        if let Some(Flight { shared, http2: false }) = &flight {
            if *this.switches {
                let granted = response.status() == StatusCode::SWITCHING_PROTOCOLS;
                shared.link.command(if granted { Command::Tunnel } else { Command::Next });
                shared.watch.wake();
            }
            if shared.context.is_draining() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
        }
        let stream = this.stream.take();
        Poll::Ready(Ok(response.map(|body| Outgoing { body, stream, _flight: flight })))
    }
}

/// A response body on its way out. The request counts until it is gone.
struct Outgoing {
    body: ResponseBody,
    stream: Option<Rc<StreamState>>,
    _flight: Option<Flight>,
}

impl HttpBody for Outgoing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(stream) = &this.stream {
            stream.unstuck();
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if let Some(stream) = &this.stream
            && matches!(frame, Some(Ok(_)))
            && !this.body.is_end_stream()
        {
            // The engine asks again when the client has taken enough of it.
            stream.watched().stuck();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// One HTTP/2 request's deadlines, which the connection's cannot tell apart. Watched from the first wait on.
struct StreamState {
    context: Rc<WorkerContext>,
    watched: OnceCell<Watched>,
    task: OnceCell<Waker>,
}

impl StreamState {
    fn new(shared: &Shared) -> Rc<Self> {
        Rc::new(Self { context: shared.context.clone(), watched: OnceCell::new(), task: OnceCell::new() })
    }

    fn watched(&self) -> &Watched {
        self.watched.get_or_init(|| {
            let watched = self.context.deadlines().watch(Phase::Busy);
            if let Some(waker) = self.task.get() {
                watched.attach_waker(waker.clone());
            }
            watched
        })
    }

    fn unstuck(&self) {
        if let Some(watched) = self.watched.get() {
            watched.unstuck();
        }
    }
}

/// A request body over HTTP/2 whose pauses are bounded.
struct TimedBody {
    body: Incoming,
    state: Rc<StreamState>,
    fresh: bool,
}

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let frame = Pin::new(&mut this.body).poll_frame(cx);
        if frame.is_ready() {
            if let Some(watched) = this.state.watched.get() {
                watched.busy();
            }
            this.fresh = true;
        } else if std::mem::take(&mut this.fresh) {
            this.state.watched().enter(Phase::Body);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for TimedBody {
    fn drop(&mut self) {
        // Nobody waits for the client any more.
        if let Some(watched) = self.state.watched.get() {
            watched.busy();
        }
    }
}

/// Makes a task of this worker of each HTTP/2 request.
#[derive(Clone)]
struct StreamExecutor(Rc<Shared>);

impl<F: Future<Output = ()> + 'static> Executor<F> for StreamExecutor {
    fn execute(&self, future: F) {
        let state = self.0.next_stream.take();
        tokio::task::spawn_local(StreamTask { future, state, context: self.0.context.clone() });
    }
}

pin_project! {
    /// One HTTP/2 request at work; dropping its future resets the stream.
    struct StreamTask<F> {
        #[pin]
        future: F,
        state: Option<Rc<StreamState>>,
        context: Rc<WorkerContext>,
    }
}

impl<F: Future<Output = ()>> Future for StreamTask<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if let Some(state) = this.state {
            state.task.get_or_init(|| cx.waker().clone());
            if let Some(cause) = state.watched.get().and_then(|watched| watched.ended()) {
                this.context.count_ended(cause);
                tracing::debug!(cause = cause.code(), "stream ended");
                return Poll::Ready(());
            }
        }
        this.future.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::testing::service;
    use crate::worker::Timeouts;
    use crate::worker::io::Socket;

    #[tokio::test]
    async fn the_task_of_a_connection_is_small() {
        let context = WorkerContext::new(0, 1, &Timeouts::default(), Arc::default());
        let server = Server::new(&context, service(|_| Ok(())), ServeSettings::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let end: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let future = server.serve(
            Stream::Plain(Socket::new(tcp)),
            Box::new(Conn::plain(end, end)),
            Speaks::Either,
            context.deadlines().watch(Phase::Head),
            OpenConnection::new(&context),
        );
        let size = std::mem::size_of_val(&future);
        assert!(size <= 640, "{size}");
    }
}
