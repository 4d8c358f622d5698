//! Serves connections: by our own engine over HTTP/1 ([`http1`](crate::worker::http1)), by hyper's over HTTP/2. The only
//! file that knows hyper on the client's side. Both engines make an exchange of each request and pass it on to the
//! worker's stack, which is borrowed for the length of `call` only.

use std::cell::{Cell, OnceCell, RefCell};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};

use crate::body::{Body, BodyError};
use crate::error::{Error, Fault, Reason};
use crate::exchange::{Conn, Exchange, OwnStack, ResponseBody};
use crate::local::LocalBox;
use crate::rescue;
use crate::stack::{HttpService, Requests};
use crate::transport::framing::HeadLimits;
use crate::upgrade::Tunnel;
use crate::worker::context::{OpenConnection, WorkerContext};
use crate::worker::deadlines::{Ended, Phase, Watch, Watched};
use crate::worker::http1::{Connection, Date, End, Engine};
use crate::worker::io::{Io, Link, Stream};

/// What an HTTP/2 connection begins with.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes read at once before it is known what they are.
const PIECE: usize = 16 * 1024;
/// While draining, a connection that was quiet for this many ticks is closed; a busier one gets its close with the
/// next answer, so that no request crosses it on the way.
pub(crate) const QUIET: u32 = 2;
/// Engines that a worker keeps for its next requests over HTTP/1.
const ENGINES: usize = 128;

thread_local! {
    pub(crate) static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; PIECE].into());
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

/// The stack of one worker, and what its engines need.
pub struct Server<S: HttpService> {
    stack: RefCell<S>,
    context: Rc<WorkerContext>,
    settings: ServeSettings,
    /// Without work.
    #[expect(clippy::vec_box, reason = "the same box goes to a connection and comes back")]
    engines: RefCell<Vec<Box<Engine<S::Future>>>>,
    date: RefCell<Date>,
}

impl<S: HttpService> Server<S> {
    /// With the worker's own stack.
    pub fn new(context: &Rc<WorkerContext>, stack: S, settings: ServeSettings) -> Rc<Self> {
        Rc::new(Self {
            stack: RefCell::new(stack),
            context: context.clone(),
            settings,
            engines: RefCell::default(),
            date: RefCell::new(Date::new(context.clock().clone())),
        })
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
            tunnel: Rc::default(),
            next_stream: Cell::new(None),
        });
        // Boxed: every place it may be in would count in the size of the task.
        let mut connection = Box::new(Connection::new(&self, &shared, stream, speaks, watched));
        match poll_fn(|cx| connection.poll(cx)).await {
            End::Http2(early) => {
                let Some(stream) = connection.take_stream() else { return };
                connection.watched().unpark();
                self.http2(stream, early, &shared, connection.watched()).await;
            }
            End::Close { sending } => {
                let Some(stream) = connection.take_stream() else { return };
                close(Box::new(stream), sending, connection.watched(), &self.context).await;
            }
            End::Tunnel => tunnel(&shared, connection.watched()).await,
            End::Gone => {}
        }
    }

    /// How large a head may be.
    pub(crate) fn limits(&self) -> HeadLimits {
        self.settings.head
    }

    /// Whether a client that closes its sending side still gets its answer.
    pub(crate) fn half_close(&self) -> bool {
        self.settings.half_close
    }

    /// Passes an exchange on to the stack.
    pub(crate) fn call(&self, x: Exchange) -> S::Future {
        self.stack.borrow_mut().call(x)
    }

    /// Lets `write` write the date.
    pub(crate) fn date<T>(&self, write: impl FnOnce(&str) -> T) -> T {
        write(self.date.borrow_mut().text())
    }

    /// An engine for a request over HTTP/1.
    pub(crate) fn engine(&self) -> Box<Engine<S::Future>> {
        let kept = self.engines.borrow_mut().pop();
        kept.unwrap_or_else(|| Box::new(Engine::new(self.settings.head)))
    }

    /// An engine that has no work.
    pub(crate) fn give_back(&self, engine: Box<Engine<S::Future>>) {
        let mut engines = self.engines.borrow_mut();
        if engines.len() < ENGINES {
            engines.push(engine);
        }
    }

    fn http2_engine(
        self: &Rc<Self>,
        stream: Stream,
        early: Vec<u8>,
        shared: &Rc<Shared>,
        link: &Rc<Link>,
    ) -> Pin<Box<Http2Engine<S>>> {
        let io = Io::new(stream, early, shared.watch.clone(), link.clone());
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
        let bridge = Bridge { server: self.clone(), shared: shared.clone() };
        Box::pin(builder.serve_connection(TokioIo::new(io), bridge))
    }

    async fn http2(self: &Rc<Self>, stream: Stream, early: Vec<u8>, shared: &Rc<Shared>, watched: &Watched) {
        let link = Rc::default();
        let mut engine = self.http2_engine(stream, early, shared, &link);
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
                    if cause == Ended::Forbidden {
                        // GOAWAY goes out if the socket takes it at once; nothing more is read or waited for.
                        engine.as_mut().graceful_shutdown();
                        let _ = engine.as_mut().poll(cx);
                    }
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

type Http2Engine<S> = http2::Connection<TokioIo<Io>, Bridge<S>, StreamExecutor>;

/// Waits for the end of a tunnel; whoever took it over moves the bytes.
async fn tunnel(shared: &Shared, watched: &Watched) {
    let stats = shared.context.stats();
    stats.tunnels.add(1);
    let mut told = false;
    poll_fn(|_| {
        if shared.tunnel.is_closed() {
            return Poll::Ready(());
        }
        if let Some(cause) = watched.ended()
            && !std::mem::replace(&mut told, true)
        {
            shared.ended(cause);
            shared.tunnel.wake();
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

/// Says goodbye, and reads what still comes until the client has closed too, so that nothing is reset.
async fn close(mut stream: Box<Stream>, sending: bool, watched: &Watched, context: &WorkerContext) {
    if !sending && matches!(*stream, Stream::Plain(_)) {
        return;
    }
    watched.pardon();
    watched.enter(Phase::Linger);
    watched.unpark();
    if until_ended(watched, stream.shutdown()).await.is_err() {
        return context.count_ended(Ended::LingerTimeout);
    }
    if !sending {
        return;
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
                    let read = ready!(Pin::new(&mut *stream).poll_read(cx, &mut buf));
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
pub(crate) struct Shared {
    pub conn: Rc<Conn>,
    pub context: Rc<WorkerContext>,
    watch: Arc<Watch>,
    pub tunnel: Rc<Tunnel>,
    /// From the call for an HTTP/2 request to the task that the engine makes of it.
    next_stream: Cell<Option<Rc<StreamState>>>,
}

impl Shared {
    /// The connection was ended from outside.
    pub fn ended(&self, cause: Ended) {
        self.context.count_ended(cause);
        let in_flight = self.watch.in_flight();
        if cause == Ended::Drain {
            self.context.report_casualty(self.conn.peer, in_flight);
        } else {
            tracing::debug!(peer = %self.conn.peer, in_flight, cause = cause.code(), "connection ended");
        }
    }

    /// A request begins to count.
    pub fn begins(&self) {
        self.conn.requests.set(self.conn.requests.get() + 1);
        let stats = self.context.stats();
        stats.requests.add(1);
        stats.in_flight.add(1);
    }

    /// It counts no more.
    pub fn ends(&self) {
        let in_flight = &self.context.stats().in_flight;
        in_flight.set(in_flight.get().saturating_sub(1));
    }
}

/// Counts an HTTP/2 request while it is at work.
struct Flight(Rc<Shared>);

impl Flight {
    fn new(shared: &Rc<Shared>) -> Self {
        shared.watch.set_in_flight(shared.watch.in_flight() + 1);
        shared.watch.busy();
        shared.begins();
        Self(shared.clone())
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let watch = &self.0.watch;
        let left = watch.in_flight().saturating_sub(1);
        watch.set_in_flight(left);
        self.0.ends();
        if left == 0 {
            watch.enter(Phase::Idle);
        }
    }
}

/// The way of HTTP/2 requests to the stack.
struct Bridge<S: HttpService> {
    server: Rc<Server<S>>,
    shared: Rc<Shared>,
}

impl<S: HttpService> hyper::service::Service<Request<Incoming>> for Bridge<S> {
    type Response = Response<Outgoing>;
    type Error = Infallible;
    type Future = BridgeFuture<S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let shared = &self.shared;
        let flight = Flight::new(shared);
        let stream = StreamState::new(shared);
        shared.next_stream.set(Some(stream.clone()));
        let request = request.map(|body| {
            if body.is_end_stream() {
                Body::Empty
            } else {
                Body::boxed(TimedBody { body, state: stream.clone(), fresh: true })
            }
        });
        let future = self.server.call(Exchange::new(request, shared.conn.clone()));
        BridgeFuture { future, flight: Some(flight), stream: Some(stream) }
    }
}

pin_project! {
    /// The future of [`Bridge`].
    struct BridgeFuture<F> {
        #[pin]
        future: F,
        flight: Option<Flight>,
        stream: Option<Rc<StreamState>>,
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
        let (stream, flight) = (this.stream.take(), this.flight.take());
        Poll::Ready(Ok(x.into_response().map(|body| Outgoing { body, stream, _flight: flight })))
    }
}

/// A response body on its way out over HTTP/2. The request counts until it is gone.
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
