//! The innermost service: chooses an endpoint, sends the request, and tries again where that is safe.
//!
//! A request is tried again when no connection was established, when a reused connection died before the first byte of
//! an answer (once, on a fresh connection, even with `retries: 0`), or when an idempotent request failed or timed out.
//! A request that is not idempotent and of which bytes were sent is never repeated. A budget keeps retries from
//! becoming a storm.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderName, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tower::Service;

use super::cluster::{Cluster, State};
use super::connect::{self, Io};
use super::endpoint::{EndpointState, Picked};
use super::fields;
use super::health::Report;
use super::picker::{PickKey, Tried};
use super::pool::{Claim, Key, Pool};
use super::request_body::Outgoing;
use super::response_body::{self, Lease, Leased};
use super::send::{self, Failure, Http1, Http2, Http2Stream, Protocol, Route, Switching, Wait};
use super::settings::PassHost;
use super::tls_client;
use super::tunnel::Tunnels;
use crate::body::Body;
use crate::chain;
use crate::error::{Blame, Error, Fault, Reason};
use crate::exchange::{Answered, Attempt, Exchange};
use crate::local::LocalBox;
use crate::target::{Destination, Timeouts};
use crate::telemetry::metrics::Metrics;
use crate::worker::context::WorkerContext;

const UPSTREAM_STATUS: HeaderName = HeaderName::from_static("x-apisix-upstream-status");

/// Forwards requests. One for each worker; clones share its connections.
#[derive(Clone)]
pub struct UpstreamService {
    pool: Pool,
    tunnels: Rc<Tunnels>,
    metrics: Arc<Metrics>,
    /// `X-APISIX-Upstream-Status` on every answer, not only on errors.
    show_status: bool,
}

impl UpstreamService {
    /// The service of one worker.
    pub fn new(context: &WorkerContext, show_status: bool, metrics: &Arc<Metrics>) -> Self {
        Self {
            pool: Pool::default(),
            tunnels: context.slot(Tunnels::default),
            metrics: metrics.clone(),
            show_status,
        }
    }
}

impl Service<Exchange> for UpstreamService {
    type Response = Exchange;
    type Error = Fault;
    type Future = LocalBox<'static, Result<Exchange, Fault>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            match service.forward(&mut x).await {
                Ok(()) => Ok(x),
                Err(error) => Err(Fault { exchange: x, error }),
            }
        })
    }
}

/// What stays the same over the attempts of one request.
struct Job {
    cluster: Arc<Cluster>,
    outgoing: Outgoing,
    timeouts: Timeouts,
    idempotent: bool,
    upgrade: Option<HeaderValue>,
    on_upgrade: Option<OnUpgrade>,
}

/// One endpoint with the host that it is sent.
struct Peer {
    picked: Picked,
    host: HeaderValue,
}

/// A connection that is ready for a request.
enum Connected {
    Http1 { connection: Http1, reused: bool },
    Http2 { stream: Http2Stream, reused: bool },
}

impl UpstreamService {
    async fn forward(&self, x: &mut Exchange) -> Result<(), Error> {
        let Some(cluster) = x.cluster().cloned() else {
            let reason = match x.target.as_ref().map(|target| &target.destination) {
                Some(Destination::Nothing(reason)) => *reason,
                _ => Reason::RouteNotFound,
            };
            return Err(Error::new(reason));
        };
        let started = Instant::now();
        cluster.budget.request(started);
        let state = cluster.state();
        let state: &State = &state;
        let key =
            PickKey { hash: state.settings.hash_key.as_ref().map_or(0, |key| key.hash(x)), now: started };
        let mut tried = Tried::default();
        let Some(picked) = state.pick(&key, &tried) else { return Err(Error::new(state.nothing())) };
        tried.add(picked.endpoint());
        x.balancer = Some(picked.endpoint().addr());
        if chain::before_proxy(x) {
            return Ok(());
        }
        let websocket = x.target.as_ref().is_none_or(|target| target.websocket);
        let upgrade = fields::wanted_upgrade(&x.request.headers).filter(|_| websocket).cloned();
        let mut job = Job {
            outgoing: Outgoing::new(std::mem::take(&mut x.request_body)),
            timeouts: x.target.as_ref().and_then(|target| target.timeout).unwrap_or(state.settings.timeouts),
            idempotent: send::is_idempotent(x.forward.method.as_ref().unwrap_or(&x.request.method)),
            on_upgrade: upgrade.as_ref().and_then(|_| x.request.extensions.remove::<OnUpgrade>()),
            upgrade,
            cluster: cluster.clone(),
        };
        let mut left = state.retries();
        let until = state.settings.retry_timeout.map(|limit| started + limit);
        let mut peer = Peer { host: host(x, state, picked.endpoint())?, picked };
        loop {
            let error = match self.attempt(x, state, &mut job, peer, until).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let now = Instant::now();
            if left == 0 || !error.is_retryable() || !job.outgoing.replayable() {
                return Err(error);
            }
            if until.is_some_and(|until| until <= now) {
                return Err(Error::new(Reason::RetryTimeout).because(error));
            }
            let key = PickKey { now, ..key };
            let Some(picked) = state.pick(&key, &tried) else { return Err(error) };
            if !job.cluster.budget.retry(now, state.settings.allowance) {
                self.metrics.retry_budget_exhausted.inc();
                return Err(error.detail("the retry budget is used up"));
            }
            self.metrics.retries.inc();
            left -= 1;
            tried.add(picked.endpoint());
            x.balancer = Some(picked.endpoint().addr());
            peer = Peer { host: host(x, state, picked.endpoint())?, picked };
        }
    }

    /// One attempt at one endpoint; a reused connection that died at once is replaced by a fresh one within it.
    async fn attempt(
        &self,
        x: &mut Exchange,
        state: &State,
        job: &mut Job,
        peer: Peer,
        until: Option<Instant>,
    ) -> Result<(), Error> {
        let started = Instant::now();
        let endpoint = peer.picked.endpoint().clone();
        let mut timeouts = job.timeouts;
        if let Some(until) = until {
            let rest = until.saturating_duration_since(started);
            timeouts.connect = timeouts.connect.min(rest);
            timeouts.read = timeouts.read.min(rest);
        }
        let mut fresh = false;
        let mut connect = Duration::ZERO;
        let result = loop {
            let connected = match self.connect(state, job, &peer, &timeouts, fresh).await {
                Ok(connected) => connected,
                Err(error) => break Err(error),
            };
            connect = started.elapsed();
            let reused = matches!(
                connected,
                Connected::Http1 { reused: true, .. } | Connected::Http2 { reused: true, .. }
            );
            match self.exchange(x, state, job, &peer, connected, &timeouts).await {
                Ok(answer) => break Ok(answer),
                // The peer closed an idle connection just as it was used: nothing was lost, so nothing is counted.
                Err(failure) if reused && !fresh && job.may_go_again(&failure) => fresh = true,
                Err(failure) => break Err(job.judge(failure)),
            }
        };
        let took = started.elapsed();
        let status = result.as_ref().ok().map(|answer| answer.response.status().as_u16());
        let failed = result.as_ref().err().map(Error::reason);
        x.attempts.push(Attempt { address: endpoint.addr(), status, took, connect, failed });
        match result {
            Ok(answer) => {
                endpoint.latency.observe(took, Instant::now());
                job.cluster.report_status(state, &endpoint, answer.response.status().as_u16());
                job.outgoing.settle();
                self.answer(x, state, job, peer, answer, &timeouts)
            }
            Err(error) => {
                // A client that broke off says nothing about the endpoint.
                if error.reason().blame() == Blame::Upstream {
                    endpoint.failed();
                    let timed_out = matches!(
                        error.reason(),
                        Reason::ConnectTimeout | Reason::SendTimeout | Reason::ReadTimeout
                    );
                    let report = if timed_out { Report::Timeout } else { Report::TcpFailure };
                    job.cluster.report(state, &endpoint, report);
                }
                Err(error)
            }
        }
    }
}

/// A response head, and the connection it came over.
struct Answer {
    response: Response<Incoming>,
    connection: Connected,
}

impl Job {
    /// Whether a failure on a reused connection may be made good on a fresh one: the peer was silent, and nothing that
    /// must not be repeated was sent.
    fn may_go_again(&self, failure: &Failure) -> bool {
        let closed = matches!(failure.error.reason(), Reason::UpstreamClosed | Reason::ConnectFailed);
        closed && failure.silent && (failure.unsent || self.idempotent) && self.outgoing.replayable()
    }

    /// The failure of an attempt, and whether another endpoint may be tried.
    fn judge(&self, failure: Failure) -> Error {
        match self.outgoing.client_failed() {
            Some(reason) => Error::new(reason).because(failure.error),
            None => failure.error.retryable(failure.unsent || self.idempotent),
        }
    }
}

impl UpstreamService {
    /// An idle connection, a stream on a shared one, or a new connection.
    async fn connect(
        &self,
        state: &State,
        job: &Job,
        peer: &Peer,
        timeouts: &Timeouts,
        fresh: bool,
    ) -> Result<Connected, Error> {
        let settings = &state.settings;
        let endpoint = peer.picked.endpoint();
        let name = settings.tls().map(|_| tls_client::host_of(peer.host.to_str().unwrap_or_default()));
        let key = Key { endpoint: endpoint.id(), transport: settings.transport(), name };
        match settings.protocol() {
            Protocol::Http1 => {
                if !fresh && let Some(connection) = self.pool.take(key) {
                    return Ok(Connected::Http1 { connection, reused: true });
                }
                let io = open(state, endpoint, name, timeouts).await?;
                Ok(Connected::Http1 { connection: Http1::start(io).await?, reused: false })
            }
            Protocol::Http2 => loop {
                match self.pool.claim(key) {
                    Claim::Stream(stream) if fresh => {
                        // The one that just failed, or one as old: new streams go elsewhere.
                        stream.connection().retire();
                        stream.finish();
                    }
                    Claim::Stream(stream) => return Ok(Connected::Http2 { stream, reused: true }),
                    Claim::Wait(dial) => {
                        let waited = tokio::time::timeout(timeouts.connect, dial.wait()).await;
                        match waited {
                            Err(_) => return Err(Error::new(Reason::ConnectTimeout).retryable(true)),
                            Ok(Some(reason)) => return Err(Error::new(reason).retryable(true)),
                            Ok(None) if fresh => {
                                if let Claim::Stream(stream) = self.pool.claim(key) {
                                    return Ok(Connected::Http2 { stream, reused: false });
                                }
                            }
                            Ok(None) => {}
                        }
                    }
                    Claim::Dial(dialing) => {
                        let started = async {
                            let io = open(state, endpoint, name, timeouts).await?;
                            Http2::start(io).await
                        };
                        return match started.await {
                            Ok(connection) => {
                                let stream = dialing.connected(&connection, settings.keepalive);
                                Ok(Connected::Http2 { stream, reused: false })
                            }
                            Err(error) => {
                                dialing.failed(error.reason());
                                Err(error)
                            }
                        };
                    }
                }
                debug_assert!(job.outgoing.replayable());
            },
        }
    }

    /// Sends the request over the connection and waits for the head of the answer.
    async fn exchange(
        &self,
        x: &Exchange,
        state: &State,
        job: &Job,
        peer: &Peer,
        mut connected: Connected,
        timeouts: &Timeouts,
    ) -> Result<Answer, Failure> {
        let now = Instant::now();
        let route = Route {
            host: &peer.host,
            tls: state.settings.tls().is_some(),
            protocol: state.settings.protocol(),
            upgrade: job.upgrade.as_ref(),
        };
        let request = send::request(x, &route, &job.outgoing, now).map_err(|error| Failure {
            error,
            unsent: false,
            silent: true,
        })?;
        let wait = Wait { outgoing: &job.outgoing, timeouts, started: now };
        let response = match &mut connected {
            Connected::Http1 { connection, .. } => connection.send(request, &wait).await?,
            Connected::Http2 { stream, .. } => stream.send(request, &wait).await?,
        };
        Ok(Answer { response, connection: connected })
    }

    /// Takes the answer over into the exchange.
    fn answer(
        &self,
        x: &mut Exchange,
        state: &State,
        job: &mut Job,
        peer: Peer,
        answer: Answer,
        timeouts: &Timeouts,
    ) -> Result<(), Error> {
        let (mut head, incoming) = answer.response.into_parts();
        if let Some(coding) = head.headers.get(header::TRANSFER_ENCODING) {
            if head.headers.contains_key(header::CONTENT_LENGTH) {
                // Two lengths: which one the peer means cannot be known, so the connection goes with the answer.
                return Err(
                    Error::new(Reason::UpstreamProtocol).detail("Transfer-Encoding with Content-Length")
                );
            }
            if !coding.as_bytes().eq_ignore_ascii_case(b"chunked")
                || head.headers.get_all(header::TRANSFER_ENCODING).iter().count() > 1
            {
                // The coding would be taken off the head and left on the body.
                return Err(
                    Error::new(Reason::UpstreamProtocol).detail("a Transfer-Encoding besides chunked")
                );
            }
        }
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return self.switch(x, job, peer, head, answer.connection, timeouts);
        }
        fields::sanitize_response(&mut head.headers);
        if self.show_status || head.status.is_server_error() {
            head.headers.insert(UPSTREAM_STATUS, HeaderValue::from(head.status.as_u16()));
        }
        let connection = match answer.connection {
            Connected::Http1 { connection, .. } => Leased::Http1 {
                connection,
                transport: state.settings.transport(),
                name: state
                    .settings
                    .tls()
                    .map(|_| tls_client::host_of(peer.host.to_str().unwrap_or_default()).into()),
                keepalive: state.settings.keepalive,
                pool: self.pool.clone(),
            },
            Connected::Http2 { stream, .. } => Leased::Http2(stream),
        };
        let body = response_body::body(incoming, Lease { picked: peer.picked, connection }, timeouts.read);
        head.version = http::Version::default();
        x.response = Response::from_parts(head, body);
        x.answered = Answered::Upstream;
        Ok(())
    }

    /// The upstream agreed to another protocol: from here on bytes go both ways.
    fn switch(
        &self,
        x: &mut Exchange,
        job: &mut Job,
        peer: Peer,
        mut head: http::response::Parts,
        connection: Connected,
        timeouts: &Timeouts,
    ) -> Result<(), Error> {
        let not_asked =
            || Error::new(Reason::UpstreamProtocol).detail("a protocol switch that nobody asked for");
        let (Some(client), Connected::Http1 { connection, .. }) = (job.on_upgrade.take(), connection) else {
            return Err(not_asked());
        };
        let protocol = head.headers.get(header::UPGRADE).cloned().ok_or_else(not_asked)?;
        fields::sanitize_response(&mut head.headers);
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(header::UPGRADE, protocol);
        let tunnel = carry(self.tunnels.clone(), client, connection.switch(), peer.picked, timeouts.read);
        tokio::task::spawn_local(tunnel);
        x.response = Response::from_parts(head, Body::Empty);
        x.answered = Answered::Upstream;
        Ok(())
    }
}

/// Carries a tunnel from the moment both sides have switched. The endpoint counts as active for as long.
async fn carry(tunnels: Rc<Tunnels>, client: OnUpgrade, upstream: Switching, picked: Picked, idle: Duration) {
    let (Ok(client), Some(upstream)) = tokio::join!(client, upstream.upgraded()) else {
        tracing::debug!(endpoint = %picked.endpoint(), "a protocol switch came to nothing");
        return;
    };
    let early: Bytes = upstream.early;
    let ended = tunnels.run(TokioIo::new(client), upstream.io, early, idle).await;
    tracing::debug!(endpoint = %picked.endpoint(), ?ended, "tunnel ended");
}

/// A new connection to the endpoint.
async fn open(
    state: &State,
    endpoint: &EndpointState,
    name: Option<&str>,
    timeouts: &Timeouts,
) -> Result<Io, Error> {
    let tls = match (state.settings.tls(), name) {
        (Some(config), Some(name)) => {
            let name = tls_client::server_name(name).ok_or_else(|| {
                Error::new(Reason::TlsFailed).detail("the host sent upstream is no TLS server name")
            })?;
            Some((config.clone(), name))
        }
        _ => None,
    };
    connect::connect(endpoint.addr(), tls, timeouts.connect).await
}

/// The `Host` that the endpoint is sent. APISIX `pass_host`.
fn host(x: &Exchange, state: &State, endpoint: &EndpointState) -> Result<HeaderValue, Error> {
    match &state.settings.pass_host {
        PassHost::Rewrite(host) => Ok(host.clone()),
        PassHost::Node => Ok(endpoint.authority(state.settings.default_port()).clone()),
        PassHost::Pass => {
            let asked = x.forward.host.as_ref().or_else(|| x.request.headers.get(header::HOST));
            Ok(asked.unwrap_or_else(|| endpoint.authority(state.settings.default_port())).clone())
        }
    }
}
