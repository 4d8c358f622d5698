//! One request and its answer, from the parsed head to the last byte of the response body.
//!
//! The exchange travels through the layers by value. When the response leaves, it moves into the response body; when
//! that ends or is dropped, the exchange is dropped, and its end is told: log phase, access log, metrics. So an
//! aborted request is counted like any other.

use std::any::{Any, TypeId};
use std::cell::Cell;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Request, Response, Uri, request};
use http_body::{Body as HttpBody, Frame, SizeHint};
use smallvec::SmallVec;

use crate::body::{Body, BodyError};
use crate::chain::Plan;
use crate::consumer::Consumer;
use crate::error::{Error, Reason};
use crate::route::Params;
use crate::spare;
use crate::stack::Requests;
use crate::target::{Destination, Target};
use crate::upgrade::Upgrade;
use crate::upstream::cluster::Cluster;
use crate::worker::deadlines::Watch;

/// What is known of the client's connection. Shared by its requests.
#[derive(Debug)]
pub struct Conn {
    /// The other end: the socket's peer, or what a trusted PROXY protocol header says.
    pub peer: SocketAddr,
    /// Our end of the socket.
    pub local: SocketAddr,
    /// Present when the client speaks TLS.
    pub tls: Option<Tls>,
    /// Requests served on this connection so far.
    pub requests: Cell<u64>,
    /// Parts of the forwarding fields that are the same for every request of the connection.
    pub forwarded: ForwardedParts,
    /// The stack that serves the connection.
    pub stack: OwnStack,
    /// What the role knows of the connection besides, for its own layers.
    pub door: Option<OwnDoor>,
}

/// What a role knows of a connection beyond what every connection has: which way it goes, where to.
pub trait Door: Any {
    /// The connection is served from now on, and can be ended by this.
    fn watched(&self, _watch: &Arc<Watch>) {}
}

/// A role's knowledge of a connection.
#[derive(Clone)]
pub struct OwnDoor(Rc<dyn Door>);

impl OwnDoor {
    /// Keeps it with the connection.
    pub fn new(door: Rc<dyn Door>) -> Self {
        Self(door)
    }

    /// The same, by its type.
    pub fn get<T: Door>(&self) -> Option<&T> {
        let door: &dyn Any = &*self.0;
        door.downcast_ref()
    }

    pub(crate) fn watched(&self, watch: &Arc<Watch>) {
        self.0.watched(watch);
    }
}

impl fmt::Debug for OwnDoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnDoor")
    }
}

/// The stack that serves a connection; none in tests and where nothing is served.
#[derive(Clone, Default)]
pub struct OwnStack(pub Option<Rc<dyn Requests>>);

impl fmt::Debug for OwnStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnStack").field(&self.0.is_some()).finish()
    }
}

/// Header values made once a connection.
#[derive(Debug)]
pub struct ForwardedParts {
    /// The peer's address.
    pub peer: HeaderValue,
    /// Our port.
    pub port: HeaderValue,
}

impl Conn {
    /// A connection between these ends.
    pub fn new(peer: SocketAddr, local: SocketAddr, tls: Option<Tls>) -> Self {
        // An IPv4 client of an IPv6 socket is still an IPv4 client.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let text = peer.ip().to_string();
        let forwarded = ForwardedParts {
            peer: HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("unknown")),
            port: HeaderValue::from(local.port()),
        };
        Self { peer, local, tls, requests: Cell::new(0), forwarded, stack: OwnStack::default(), door: None }
    }

    /// A plain connection.
    pub fn plain(peer: SocketAddr, local: SocketAddr) -> Self {
        Self::new(peer, local, None)
    }

    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }
}

/// What the handshake with the client settled.
#[derive(Debug, Default)]
pub struct Tls {
    /// The server name the client asked for, in lower case.
    pub sni: Option<Box<str>>,
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite's IANA name.
    pub cipher: &'static str,
    /// The `ssl` resource that served the handshake.
    pub ssl_id: Option<Arc<str>>,
    /// Whether that resource asks for a client certificate (also one that `skip_mtls_uri_regex` may waive).
    pub asks_client_certificate: bool,
    /// The client's leaf certificate, verified against `client.ca`.
    pub client: Option<Box<ClientCertificate>>,
    /// The compiled resource that served the handshake.
    pub entry: Option<Arc<certs::SslEntry>>,
    /// Who called, where both ends are of the mesh.
    pub peer: Option<Arc<certs::trust::Peer>>,
}

/// The client's certificate, in the words of the `ssl_client_*` variables.
#[derive(Debug)]
pub struct ClientCertificate {
    /// Subject, RFC 2253.
    pub subject: String,
    /// Issuer, RFC 2253.
    pub issuer: String,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// SHA-1 of the certificate, hexadecimal.
    pub fingerprint: String,
    /// DER.
    pub der: Bytes,
}

/// Who answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answered {
    /// Nobody yet.
    #[default]
    No,
    /// The gateway, and why.
    Gateway(Reason),
    /// The upstream.
    Upstream,
}

/// One attempt to reach a node of the upstream.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The node's address.
    pub address: SocketAddr,
    /// The status it answered, if it did.
    pub status: Option<u16>,
    /// When the node was chosen.
    pub started: Instant,
    /// From the choice of the node to the response head or the failure.
    pub took: Duration,
    /// From the choice of the node to an established connection; zero when one was reused.
    pub connect: Duration,
    /// Why it failed.
    pub failed: Option<Reason>,
}

/// What plugins changed of the request that goes to the upstream, apart from its header fields.
#[derive(Debug, Default)]
pub struct Forward {
    /// Path and query in place of the client's (`upstream_uri`).
    pub uri: Option<PathAndQuery>,
    /// `Host` in place of what `pass_host` says (`upstream_host`).
    pub host: Option<HeaderValue>,
    /// Method in place of the client's.
    pub method: Option<http::Method>,
}

/// A [`Forward`] that takes no room in an exchange until somebody changes something.
#[derive(Debug, Default)]
pub struct Forwards(Option<Box<Forward>>);

impl Deref for Forwards {
    type Target = Forward;

    fn deref(&self) -> &Forward {
        static NOTHING: Forward = Forward { uri: None, host: None, method: None };
        self.0.as_deref().unwrap_or(&NOTHING)
    }
}

impl DerefMut for Forwards {
    fn deref_mut(&mut self) -> &mut Forward {
        self.0.get_or_insert_default()
    }
}

/// Told when an exchange is over.
pub trait Finish {
    /// The response has left, or the exchange was given up.
    fn finish(&self, exchange: &Exchange);
}

/// One request and its answer.
pub struct Exchange(Box<State>);

/// The fields of an [`Exchange`]. What few requests have is boxed: up to 1,024 bytes the allocator is five times as quick.
pub struct State {
    /// The request's head as it is now: the URI in its normal form, the header fields as plugins changed them.
    pub request: request::Parts,
    /// The request's body. Taken by whoever forwards it.
    pub request_body: Body,
    /// Present if the client asks for a switch of protocols. Taken by whoever grants it.
    pub upgrade: Option<Upgrade>,
    /// The target as the client wrote it (`request_uri`), where it differs from the normal form.
    pub original_uri: Option<Box<Uri>>,
    /// The percent-decoded path (`uri`), where it differs from the path of `request.uri`.
    pub decoded_path: Option<Box<str>>,
    /// The host asked for, in lower case, without port and trailing dot.
    pub host: Box<str>,
    /// The port asked for, where one was named.
    pub port: Option<u16>,
    /// The client's connection.
    pub conn: Rc<Conn>,
    /// The client's address: the connection's peer, or what trusted forwarding fields say.
    pub remote_addr: IpAddr,
    /// The client's port, as far as it is known.
    pub remote_port: u16,
    /// Part of another request, in which its client was settled: what its own fields say of that counts for nothing.
    pub nested: bool,
    /// When the head was complete.
    pub started: Instant,
    /// When the head of the answer was there, before response phases; or when the upstream was known to give none.
    pub responded: Option<Instant>,
    /// The matched route and its upstream.
    pub target: Option<Arc<Target>>,
    /// The URI pattern of the route that matched.
    pub matched_uri: Option<Arc<str>>,
    /// The host pattern of the route that matched.
    pub matched_host: Option<Arc<str>>,
    /// The endpoint that was chosen last.
    pub balancer: Option<SocketAddr>,
    /// The upstream that a plugin chose in place of the route's.
    pub chosen: Option<Arc<Cluster>>,
    /// Where in [`State::path`] the parameters of the route's URI pattern stand (`uri_param_*`).
    pub uri_params: Params,
    /// The policy of a sidecar that let the request pass or refused it (`policy`).
    pub policy: Option<Arc<str>>,
    /// The authenticated consumer.
    pub consumer: Option<Arc<Consumer>>,
    /// What plugins changed for the upstream.
    pub forward: Forwards,
    /// Fields that plugins add to whatever answer is sent. Each replaces a field of the same name.
    pub response_headers: Vec<(HeaderName, HeaderValue)>,
    /// The answer.
    pub response: Response<Body>,
    /// Who gave the answer.
    pub answered: Answered,
    /// The failure behind the answer, with words for the log.
    pub error: Option<Box<Error>>,
    /// Set by the connection for a request whose bytes are refused: `sanitize` answers it.
    pub refused: Option<Box<Error>>,
    /// Attempts to reach the upstream, in order.
    pub attempts: SmallVec<[Attempt; 1]>,
    /// Bytes of the response body that were handed to the connection.
    pub bytes_sent: u64,
    /// Bytes of the response head as HTTP/1.1 writes it, once it has left.
    pub head_sent: u64,
    /// The response body was handed over to its end.
    pub complete: bool,
    /// Somebody reads the fields of the response when it is over; otherwise they leave without being copied.
    pub keeps_head: bool,
    /// The plugins of every request, by phase.
    pub global_plan: Option<Arc<Plan>>,
    /// The plugins of the matched route (and consumer), by phase.
    pub plan: Option<Arc<Plan>>,
    slots: SmallVec<[(TypeId, Box<dyn Any>); 1]>,
    finish: SmallVec<[Rc<dyn Finish>; 3]>,
    rare: Option<Box<Rare>>,
}

/// What few exchanges have.
#[derive(Default)]
struct Rare {
    layered: Vec<Arc<Plan>>,
    kept: Vec<Box<dyn Any>>,
}

impl Exchange {
    /// Starts an exchange with a request whose URI is not yet normalised.
    pub fn new(request: Request<Body>, conn: Rc<Conn>) -> Self {
        let (request, request_body) = request.into_parts();
        let (remote_addr, remote_port) = (conn.peer.ip(), conn.peer.port());
        Self(Box::new(State {
            request,
            request_body,
            upgrade: None,
            original_uri: None,
            decoded_path: None,
            host: Box::default(),
            port: None,
            conn,
            remote_addr,
            remote_port,
            nested: false,
            started: Instant::now(),
            responded: None,
            target: None,
            matched_uri: None,
            matched_host: None,
            chosen: None,
            balancer: None,
            uri_params: Params::default(),
            policy: None,
            consumer: None,
            forward: Forwards::default(),
            response_headers: Vec::new(),
            response: Response::new(Body::Empty),
            answered: Answered::No,
            error: None,
            refused: None,
            attempts: SmallVec::new(),
            bytes_sent: 0,
            head_sent: 0,
            complete: false,
            keeps_head: false,
            global_plan: None,
            plan: None,
            slots: SmallVec::new(),
            finish: SmallVec::new(),
            rare: None,
        }))
    }

    /// Answers by the gateway itself.
    pub fn reply(&mut self, response: Response<Body>, reason: Reason) {
        self.response = response;
        self.answered = Answered::Gateway(reason);
    }

    /// Takes the response out to be sent; the exchange goes with its body.
    pub fn into_response(mut self) -> Response<ResponseBody> {
        self.head_sent = self.head_length();
        self.leave()
    }

    /// As [`into_response`](Self::into_response), for a connection that counts what it writes of the head.
    pub(crate) fn leave(mut self) -> Response<ResponseBody> {
        let (parts, body) = std::mem::take(&mut self.response).into_parts();
        *self.response.status_mut() = parts.status;
        if self.keeps_head {
            *self.response.headers_mut() = parts.headers.clone();
        }
        if body.is_empty() {
            self.complete = true;
        }
        Response::from_parts(parts, ResponseBody { body, exchange: self })
    }

    /// Runs something over the plans of plugins that are layers, the outermost first, if there are any.
    pub(crate) fn with_layered<T>(&mut self, run: impl FnOnce(&[Arc<Plan>], &mut Self) -> T) -> Option<T> {
        let layered = std::mem::take(&mut self.rare.as_mut()?.layered);
        let result = run(&layered, self);
        self.rare.get_or_insert_default().layered = layered;
        Some(result)
    }
}

impl State {
    /// The path that routes match and `$uri` tells: percent-decoded, normal.
    pub fn path(&self) -> &str {
        self.decoded_path.as_deref().unwrap_or_else(|| self.request.uri.path())
    }

    /// The status that was or will be sent.
    pub fn status(&self) -> u16 {
        if self.answered == Answered::No {
            Reason::ClientClosed.status().as_u16()
        } else {
            self.response.status().as_u16()
        }
    }

    /// Why the gateway answered by itself, if it did.
    pub fn reason(&self) -> Option<Reason> {
        match self.answered {
            Answered::Gateway(reason) => Some(reason),
            Answered::Upstream if self.complete => None,
            Answered::Upstream | Answered::No => Some(Reason::ClientClosed),
        }
    }

    /// The upstream that forwards the request: what a plugin chose, else the route's.
    pub fn cluster(&self) -> Option<&Arc<Cluster>> {
        self.chosen.as_ref().or_else(|| match &self.target.as_ref()?.destination {
            Destination::Cluster(cluster) => Some(cluster),
            Destination::Nothing(_) => None,
        })
    }

    /// A value that a plugin keeps from phase to phase.
    pub fn slot<T: 'static>(&self) -> Option<&T> {
        let (_, value) = self.slots.iter().find(|(id, _)| *id == TypeId::of::<T>())?;
        value.downcast_ref()
    }

    /// As [`slot`](Self::slot), to change it; made by `T::default()` where it is missing.
    pub fn slot_mut<T: Default + 'static>(&mut self) -> Option<&mut T> {
        let id = TypeId::of::<T>();
        let index = match self.slots.iter().position(|(slot, _)| *slot == id) {
            Some(index) => index,
            None => {
                self.slots.push((id, Box::new(T::default())));
                self.slots.len() - 1
            }
        };
        self.slots.get_mut(index)?.1.downcast_mut()
    }

    /// Keeps a value for later phases; an older value of the same type goes.
    pub fn put_slot<T: 'static>(&mut self, value: T) {
        let id = TypeId::of::<T>();
        self.slots.retain(|(slot, _)| *slot != id);
        self.slots.push((id, Box::new(value)));
    }

    /// Keeps a value, to drop it when all is over: after the log phase, or when the tunnel that the exchange became
    /// has ended.
    pub fn keep(&mut self, value: impl Any) {
        self.rare.get_or_insert_default().kept.push(Box::new(value));
    }

    /// What [`keep`](Self::keep) was given, for the tunnel.
    pub(crate) fn take_kept(&mut self) -> Vec<Box<dyn Any>> {
        self.rare.as_mut().map(|rare| std::mem::take(&mut rare.kept)).unwrap_or_default()
    }

    /// Adds the plan of a plugin that is a layer of the stack, within those that were added before.
    pub(crate) fn add_layered(&mut self, plan: Arc<Plan>) {
        self.rare.get_or_insert_default().layered.push(plan);
    }

    /// Asks to be told when the exchange is over. The last who asked is told first.
    pub fn on_finish(&mut self, hook: Rc<dyn Finish>) {
        self.finish.push(hook);
    }
}

impl Deref for Exchange {
    type Target = State;

    fn deref(&self) -> &State {
        &self.0
    }
}

impl DerefMut for Exchange {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.0
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Header fields may hold credentials.
        write!(f, "{} {}{} -> {:?}", self.request.method, self.host, self.path(), self.answered)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // A panic in a log plugin must neither abort the process nor hide the exchange from the others.
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| crate::chain::log(self)));
        if told.is_err() {
            tracing::error!("a log phase panicked");
        }
        while let Some(hook) = self.0.finish.pop() {
            hook.finish(self);
        }
        spare::give_back(std::mem::take(&mut self.0.request.headers));
    }
}

/// A response body that carries its exchange to the end.
pub struct ResponseBody {
    body: Body,
    exchange: Exchange,
}

impl ResponseBody {
    /// The head of the answer has left, in so many bytes.
    pub(crate) fn head_left(&mut self, bytes: usize) {
        self.exchange.head_sent = bytes as u64;
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                self.exchange.bytes_sent += frame.data_ref().map_or(0, |data| data.len() as u64);
                self.exchange.complete = self.body.is_end_stream();
            }
            Some(Err(error)) => tracing::debug!(%error, "response body failed"),
            None => self.exchange.complete = true,
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
