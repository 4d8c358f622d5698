//! One request over one connection, and its response: what both protocols have in common, and HTTP/2 by hyper. This is
//! the only file that knows hyper's client; HTTP/1 is our own (`http1/`).
//!
//! An HTTP/1 connection has no task: whoever waits for its answer drives it, so that a request is one task from the
//! client's first byte to the last; an HTTP/2 connection, which many share, has one. What a caller gets back of a
//! failure is whether anything of the request can have reached the upstream and whether anything of an answer came,
//! because that is what decides about another attempt.
//!
//! `Expect: 100-continue` is not forwarded: the client is told to go on when the upstream connection starts to
//! take the body, and other informational answers end here.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use certs::trust::VerifyError;
use http::header::{self, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::TokioIo;
use tokio::time::{Sleep, sleep_until};

use super::connect::{Io, Traffic};
use super::fields;
use super::mesh::{self, MeshLink};
use super::request_body::{Outgoing, Progress, RequestBody};
use crate::error::{Error, Reason};
use crate::exchange::State;
use crate::local::LocalBox;
use crate::target::Timeouts;

/// Bytes of a response that one connection buffers while the client does not read.
const BUFFER: usize = 64 * 1024;
/// Streams of one HTTP/2 connection at most, whatever the peer would allow: its window for all of them is fixed
/// when it is made, and a few that are not read must not stop the others.
const MAX_STREAMS: usize = 128;
/// Streams given up before an HTTP/2 connection is replaced. The h2 crate breaks it at 1,024.
const MAX_RESETS: u32 = 900;

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

/// Why there is no response head.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    /// Nothing of the request can have been processed.
    pub(crate) unsent: bool,
    /// No byte of an answer came.
    pub(crate) silent: bool,
}

/// How long to wait for a response head.
pub(crate) struct Wait<'a> {
    pub(crate) outgoing: &'a Outgoing,
    pub(crate) timeouts: &'a Timeouts,
    pub(crate) started: Instant,
}

impl Wait<'_> {
    /// The moment at which patience ends if nothing moves until then, and who is to blame for it.
    fn deadline(&self, now: Instant) -> (Instant, Reason) {
        match self.outgoing.progress() {
            None => (self.started + self.timeouts.read, Reason::ReadTimeout),
            Some(Progress::Done(at)) => (at + self.timeouts.read, Reason::ReadTimeout),
            Some(Progress::Upstream(at)) => (at + self.timeouts.send, Reason::SendTimeout),
            // The client has deadlines of its own; look again later.
            Some(Progress::Client) => (now + self.timeouts.read, Reason::ReadTimeout),
        }
    }

    /// `response`, unless the upstream lets time pass. One timer, which is looked at only when it fires: it may have been
    /// set for an earlier request on the connection.
    pub(crate) async fn head<T>(
        &self,
        timer: &mut Option<Pin<Box<Sleep>>>,
        response: impl Future<Output = T>,
    ) -> Result<T, Reason> {
        let mut response = pin!(response);
        let (first, _) = self.deadline(self.started);
        let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(first.into())));
        if timer.deadline() > first.into() {
            timer.as_mut().reset(first.into());
        }
        poll_fn(|cx| {
            if let Poll::Ready(response) = response.as_mut().poll(cx) {
                return Poll::Ready(Ok(response));
            }
            loop {
                ready!(timer.as_mut().poll(cx));
                let now = Instant::now();
                let (deadline, reason) = self.deadline(now);
                if deadline <= now {
                    return Poll::Ready(Err(reason));
                }
                timer.as_mut().reset(deadline.into());
            }
        })
        .await
    }
}

/// Where a request goes and in which form.
pub(crate) struct Route<'a> {
    pub(crate) host: &'a HeaderValue,
    pub(crate) tls: bool,
    /// The protocol to switch to, if the route allows it. HTTP/1 only.
    pub(crate) upgrade: Option<&'a HeaderValue>,
    /// What the node's sidecar is told of the client's protocol, where the node is of the mesh.
    pub(crate) spoken: Option<HeaderValue>,
}

/// The request of one attempt over HTTP/2.
///
/// # Errors
/// The host cannot be written as the authority.
fn request(
    x: &State,
    route: &Route<'_>,
    outgoing: &Outgoing,
    now: Instant,
) -> Result<Request<RequestBody>, Error> {
    let mut headers = fields::forwarded(&x.request.headers);
    let target = x.forward.uri.as_ref().or(x.request.uri.path_and_query());
    let target = target.cloned().unwrap_or(PathAndQuery::from_static("/"));
    if fields::takes_trailers(&x.request.headers) || is_grpc(&x.request.headers) {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(if route.tls { Scheme::HTTPS } else { Scheme::HTTP });
    parts.authority = Some(Authority::try_from(route.host.as_bytes()).map_err(bad_host)?);
    parts.path_and_query = Some(target);
    headers.remove(header::HOST);
    match &route.spoken {
        Some(spoken) => drop(headers.insert(mesh::SPOKEN, spoken.clone())),
        None => drop(headers.remove(mesh::SPOKEN)),
    }
    let uri = Uri::from_parts(parts).map_err(bad_host)?;
    // The length is said where the client said it or the body has one.
    let said = headers.contains_key(header::CONTENT_LENGTH);
    match outgoing.exact_length() {
        Some(length) if length > 0 || said => {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        None if said => {
            headers.remove(header::CONTENT_LENGTH);
        }
        _ => {}
    }
    let mut request = Request::new(outgoing.attempt(now));
    *request.method_mut() = x.forward.method.as_ref().unwrap_or(&x.request.method).clone();
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = headers;
    Ok(request)
}

fn is_grpc(headers: &http::HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn bad_host(error: impl Into<http::Error>) -> Error {
    Error::new(Reason::BadHost).detail("not an authority for HTTP/2").because(error.into())
}

/// Methods that may be repeated although the first may have been carried out: those of RFC 9110, 9.2.2.
pub(crate) fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS | Method::TRACE
    )
}

/// An HTTP/2 connection that requests of this worker share.
#[derive(Clone, Debug)]
pub(crate) struct Http2 {
    sender: http2::SendRequest<RequestBody>,
    link: Rc<Link2>,
}

#[derive(Debug)]
struct Link2 {
    traffic: Rc<Traffic>,
    active: Cell<usize>,
    served: Cell<u32>,
    resets: Cell<u32>,
    peer_limit: Cell<usize>,
    retired: Cell<bool>,
    idle_since: Cell<Instant>,
    born: Instant,
    mesh: Option<Rc<MeshLink>>,
}

/// A connection task that remembers how many streams the peer allows.
struct Http2Driver {
    connection: http2::Connection<TokioIo<Io>, RequestBody, LocalExecutor>,
    link: Rc<Link2>,
    /// Ready when the peer's certificate was taken back.
    revoked: Option<LocalBox<'static, ()>>,
}

/// Waits until what the peer of a mesh connection has shown is taken back.
pub(crate) async fn revoked(mesh: Rc<MeshLink>) {
    let mut changes = mesh.changes();
    loop {
        if let Err(why @ (VerifyError::Revoked | VerifyError::Distrusted)) = mesh.verdict() {
            tracing::info!(%why, peer = mesh.peer().expected(), "a connection to the mesh is cut");
            return;
        }
        // The identity lives as long as the process.
        if changes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Future for Http2Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(revoked) = &mut self.revoked
            && revoked.as_mut().poll(cx).is_ready()
        {
            self.link.retired.set(true);
            return Poll::Ready(());
        }
        let end = Pin::new(&mut self.connection).poll(cx);
        self.link.peer_limit.set(self.connection.current_max_send_streams());
        let end = ready!(end);
        self.link.retired.set(true);
        if let Err(error) = end {
            tracing::debug!(%error, "upstream HTTP/2 connection failed");
        }
        Poll::Ready(())
    }
}

/// Runs hyper's tasks on this worker.
#[derive(Clone, Copy, Debug)]
struct LocalExecutor;

impl<F: Future<Output: 'static> + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(task);
    }
}

impl Http2 {
    /// Start HTTP/2 on a new connection.
    ///
    /// # Errors
    /// The preface cannot be written, or the peer agreed on something else.
    pub(crate) async fn start(io: Io) -> Result<Self, Error> {
        if io.mesh().is_none() && io.alpn().is_some_and(|protocol| protocol != b"h2") {
            let error = Error::new(Reason::TlsFailed).detail("the upstream does not offer h2");
            return Err(error.retryable(true));
        }
        let traffic = Rc::clone(io.traffic());
        let mesh = io.mesh().cloned();
        let (sender, connection) = http2::Builder::new(LocalExecutor)
            .initial_stream_window_size(65_535)
            .initial_connection_window_size((MAX_STREAMS * BUFFER) as u32)
            .max_send_buf_size(BUFFER)
            .max_header_list_size(BUFFER as u32)
            .handshake(TokioIo::new(io))
            .await
            .map_err(|error| classify(error, None))?;
        let link = Rc::new(Link2 {
            traffic,
            active: Cell::new(0),
            served: Cell::new(0),
            resets: Cell::new(0),
            peer_limit: Cell::new(connection.current_max_send_streams()),
            retired: Cell::new(false),
            idle_since: Cell::new(Instant::now()),
            born: Instant::now(),
            mesh: mesh.clone(),
        });
        let revoked = mesh.map(|mesh| Box::pin(revoked(mesh)) as LocalBox<'static, ()>);
        tokio::task::spawn_local(Http2Driver { connection, link: Rc::clone(&link), revoked });
        Ok(Self { sender, link })
    }

    /// May carry another stream.
    pub(crate) fn has_room(&self) -> bool {
        self.link.active.get() < MAX_STREAMS.min(self.link.peer_limit.get())
    }

    /// No new streams: closed, told to go away, worn out, suspected dead, or not to be made like this any more.
    pub(crate) fn is_retired(&self) -> bool {
        self.link.retired.get()
            || self.sender.is_closed()
            || self.link.resets.get() >= MAX_RESETS
            || self.link.mesh.as_ref().is_some_and(|mesh| mesh.is_stale(Instant::now()))
    }

    /// Give it no new streams; those under way finish.
    pub(crate) fn retire(&self) {
        self.link.retired.set(true);
    }

    /// When it was made.
    pub(crate) fn born(&self) -> Instant {
        self.link.born
    }

    pub(crate) fn served(&self) -> u32 {
        self.link.served.get()
    }

    /// When the last stream ended; none while there is one.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        (self.link.active.get() == 0).then(|| self.link.idle_since.get())
    }

    /// A place for one stream, taken until it is dropped.
    pub(crate) fn stream(&self) -> Http2Stream {
        self.link.active.set(self.link.active.get() + 1);
        self.link.served.set(self.link.served.get() + 1);
        Http2Stream { connection: self.clone(), finished: false }
    }
}

/// One stream of a shared connection. Dropped before its end it counts as one that we gave up.
#[derive(Debug)]
pub(crate) struct Http2Stream {
    connection: Http2,
    finished: bool,
}

impl Http2Stream {
    pub(crate) fn connection(&self) -> &Http2 {
        &self.connection
    }

    /// Both sides ended it in order.
    pub(crate) fn finish(mut self) {
        self.finished = true;
    }

    /// Sends the request of `x` and waits for the head of its answer.
    pub(crate) async fn send(
        &mut self,
        x: &State,
        route: &Route<'_>,
        wait: &Wait<'_>,
    ) -> Result<Response<Incoming>, Failure> {
        let request = request(x, route, wait.outgoing, wait.started).map_err(|error| Failure {
            error,
            unsent: false,
            silent: true,
        })?;
        let read = self.connection.link.traffic.read.get();
        let result = wait.head(&mut None, self.connection.sender.try_send_request(request)).await;
        match result {
            Ok(Ok(response)) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                let error = Error::new(Reason::UpstreamProtocol).detail("a protocol switch over HTTP/2");
                Err(Failure { error, unsent: false, silent: false })
            }
            Ok(Ok(response)) => Ok(response),
            Ok(Err(mut failure)) => {
                let returned = failure.take_message().is_some();
                let error = failure.into_error();
                let refused = unprocessed(&error);
                if refused || returned {
                    // GOAWAY or a full peer: it does not want more.
                    self.connection.retire();
                }
                let traffic = &self.connection.link.traffic;
                let silent = traffic.read.get() == read;
                if traffic.refused.get() {
                    self.connection.retire();
                    let error = Error::new(Reason::MeshRefused).because(error);
                    return Err(Failure { error, unsent: true, silent });
                }
                let error = classify(error, Some(wait.outgoing));
                Err(Failure { error, unsent: returned || refused, silent })
            }
            Err(reason) => {
                // A peer that has gone silent on one stream may be gone altogether.
                self.connection.retire();
                Err(Failure { error: Error::new(reason), unsent: false, silent: true })
            }
        }
    }
}

impl Drop for Http2Stream {
    fn drop(&mut self) {
        let link = &self.connection.link;
        link.active.set(link.active.get() - 1);
        link.idle_since.set(Instant::now());
        if !self.finished {
            link.resets.set(link.resets.get() + 1);
        }
    }
}

/// The peer says that it did nothing with the request (RFC 9113, 8.7).
fn unprocessed(error: &hyper::Error) -> bool {
    let Some(error) = h2_error(error) else { return false };
    error.is_remote()
        && (error.reason() == Some(h2::Reason::REFUSED_STREAM)
            || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR)))
}

fn h2_error(error: &hyper::Error) -> Option<&h2::Error> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref() {
            return Some(error);
        }
        cause = error.source();
    }
    None
}

/// What hyper's error means to us.
fn classify(error: hyper::Error, outgoing: Option<&Outgoing>) -> Error {
    if let Some(reason) = outgoing.and_then(Outgoing::client_failed) {
        return Error::new(reason).because(error);
    }
    let malformed = error.is_parse()
        || h2_error(&error).is_some_and(|error| {
            !error.is_io() && error.reason().is_some_and(|reason| reason == h2::Reason::PROTOCOL_ERROR)
        });
    let reason = if malformed { Reason::UpstreamProtocol } else { Reason::UpstreamClosed };
    Error::new(reason).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_methods_without_a_second_effect_are_idempotent() {
        for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"] {
            assert!(
                Method::from_bytes(method.as_bytes()).is_ok_and(|method| is_idempotent(&method)),
                "{method}"
            );
        }
        for method in ["POST", "PATCH", "LOCK", "PURGE", "get", "ANYTHING"] {
            assert!(
                Method::from_bytes(method.as_bytes()).is_ok_and(|method| !is_idempotent(&method)),
                "{method}"
            );
        }
    }
}
