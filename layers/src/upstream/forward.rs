//! The innermost service: chooses an endpoint, sends the request, and tries again where that is safe.
//!
//! A request is tried again when no connection was established, when a reused connection died before the first byte of
//! an answer (once, on a fresh connection, even with `retries: 0`), or when an idempotent request failed or timed out.
//! A request that is not idempotent and of which bytes were sent is never repeated, unless the upstream's `retry` block
//! says so. A budget keeps retries from becoming a storm.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::header::{self, HeaderValue};
use http::{HeaderName, Response, StatusCode};
use hyper::body::Incoming;
use tower::Service;

use super::breaker::Leave;
use super::cluster::{Choice, Cluster, State};
use super::connect::{self, Io};
use super::endpoint::{EndpointState, Picked};
use super::fields;
use super::health::Report;
use super::http1::connection::{Http1, Upgraded};
use super::http1::head::Head;
use super::mesh::{self, By, Carries, MeshPeer};
use super::picker::{Algorithm, PickKey, Tried};
use super::pool::{Claim, Key, Pool};
use super::request_body::Outgoing;
use super::response_body::{self, Home};
use super::send::{self, Failure, Http2, Http2Stream, Protocol, Route, Wait};
use super::settings::PassHost;
use super::{tls_client, tunnel};
use crate::body::Body;
use crate::chain;
use crate::error::{Blame, Error, Fault, Reason};
use crate::exchange::{Answered, Attempt, Exchange};
use crate::local::LocalBox;
use crate::target::{Destination, Timeouts};
use crate::telemetry::metrics::Metrics;
use crate::upgrade::Upgrade;

const UPSTREAM_STATUS: HeaderName = HeaderName::from_static("x-apisix-upstream-status");

/// Forwards requests. One for each worker; clones share its connections.
#[derive(Clone)]
pub struct UpstreamService {
    pool: Pool,
    metrics: Arc<Metrics>,
    /// `X-APISIX-Upstream-Status` on every answer, not only on errors.
    show_status: bool,
}

impl UpstreamService {
    /// The service of one worker.
    pub fn new(show_status: bool, metrics: &Arc<Metrics>) -> Self {
        Self { pool: Pool::default(), metrics: metrics.clone(), show_status }
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
                Err(error) => {
                    if error.reason().blame() == Blame::Upstream
                        && let Some(statuses) = service.statuses(&x)
                    {
                        x.response_headers.push((UPSTREAM_STATUS, statuses));
                    }
                    Err(Fault { exchange: x, error })
                }
            }
        })
    }
}

/// What stays the same over the attempts of one request.
struct Job {
    cluster: Arc<Cluster>,
    outgoing: Outgoing,
    idempotent: bool,
    upgrade: Option<HeaderValue>,
    on_upgrade: Option<Upgrade>,
}

/// One endpoint with the host that it is sent.
struct Peer {
    picked: Picked,
    leave: Option<Leave>,
    host: HeaderValue,
    /// There where it is of the mesh.
    mesh: Option<Arc<MeshPeer>>,
}

impl Peer {
    fn new(x: &mut Exchange, state: &State, choice: Choice) -> Self {
        let Choice { picked, leave } = choice;
        x.balancer = Some(picked.endpoint().addr());
        let mesh = state.settings.mesh.as_ref().and_then(|_| picked.endpoint().mesh());
        Self { host: host(x, state, picked.endpoint()), picked, leave, mesh }
    }

    /// What is spoken to it. Requests of the mesh share connections, but for those that switch protocols: they need HTTP/1.
    fn protocol(&self, x: &Exchange, state: &State, upgrades: bool) -> Protocol {
        match &self.mesh {
            Some(_) if upgrades => Protocol::Http1,
            // Nobody at the other end of a tunnel translates: the application hears what the client speaks.
            Some(mesh) if mesh.by() == By::Tunnel && x.request.version < http::Version::HTTP_2 => {
                state.settings.protocol()
            }
            Some(_) => Protocol::Http2,
            None => state.settings.protocol(),
        }
    }

    /// The number under which connections to it are shared.
    fn transport(&self, state: &State) -> u64 {
        self.mesh.as_ref().map_or_else(|| state.settings.transport(), |mesh| mesh.number())
    }

    /// The name under which TLS is spoken: the host that is sent, without its port.
    fn tls_name(&self, state: &State) -> Option<&str> {
        if self.mesh.is_some() {
            return None;
        }
        state.settings.tls().map(|_| tls_client::host_of(self.host.to_str().unwrap_or_default()))
    }

    /// Under which its connections are kept.
    fn key<'a>(&'a self, state: &State) -> Key<'a> {
        Key { endpoint: self.picked.id(), transport: self.transport(state), name: self.tls_name(state) }
    }

    /// What its sidecar is told of the protocol to speak to the application: the client's, unless another is declared.
    fn spoken(&self, x: &Exchange, state: &State) -> Option<HeaderValue> {
        self.mesh.as_ref().filter(|mesh| mesh.by() == By::Sidecar)?;
        let http1 = state.settings.protocol() == Protocol::Http1 && x.request.version < http::Version::HTTP_2;
        http1.then(|| HeaderValue::from_static(mesh::SPOKEN_HTTP1))
    }
}

/// A connection that is ready for a request.
enum Connected {
    Http1 { connection: Http1, reused: bool },
    Http2 { stream: Http2Stream, reused: bool },
}

impl Connected {
    fn is_reused(&self) -> bool {
        match self {
            Self::Http1 { reused, .. } | Self::Http2 { reused, .. } => *reused,
        }
    }
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
        let mut state = cluster.state();
        let mut key =
            PickKey { hash: state.settings.hash_key.as_ref().map_or(0, |key| key.hash(x)), now: started };
        let mut tried = Tried::default();
        let choice = match state.first(&key, x) {
            Err(_) if state.is_unknown() => {
                state = Box::pin(cluster.known()).await;
                state.first(&key, x)
            }
            choice => choice,
        };
        let choice = choice.map_err(Error::new)?;
        tried.add(choice.picked.endpoint());
        x.balancer = Some(choice.picked.endpoint().addr());
        if chain::before_proxy(x) {
            return Ok(());
        }
        let websocket = x.target.as_ref().is_none_or(|target| target.websocket);
        let upgrade = fields::wanted_upgrade(&x.request.headers).filter(|_| websocket).cloned();
        let mut job = Job {
            outgoing: Outgoing::new(std::mem::take(&mut x.request_body)),
            idempotent: state.settings.retry.non_idempotent
                || send::is_idempotent(x.forward.method.as_ref().unwrap_or(&x.request.method)),
            on_upgrade: upgrade.as_ref().and_then(|_| x.upgrade.take()),
            upgrade,
            cluster,
        };
        let mut left = state.retries();
        let until = state.settings.retry_timeout.map(|limit| started + limit);
        let mut peer = Peer::new(x, &state, choice);
        loop {
            let timeouts = x
                .target
                .as_ref()
                .and_then(|target| target.timeout.as_deref().copied())
                .unwrap_or(state.settings.timeouts);
            let outcome = self.attempt(x, &state, &job, &mut peer, &timeouts, key.now).await;
            let retry = &state.settings.retry;
            let may = match &outcome {
                Ok(answer) => job.idempotent && retry.after_status(answer.status().as_u16()),
                Err(error) => error.is_retryable() && retry.after(error.reason()),
            };
            if !may || left == 0 || !job.outgoing.replayable() {
                return self.conclude(x, &state, &mut job, peer, outcome, &timeouts);
            }
            let now = Instant::now();
            if until.is_some_and(|until| until <= now) {
                let outcome = outcome.map_err(|error| Error::new(Reason::RetryTimeout).because(error));
                return self.conclude(x, &state, &mut job, peer, outcome, &timeouts);
            }
            // What has become known since then counts: a verdict, another address, an edit.
            let next = job.cluster.state();
            key.now = now;
            let Some(choice) = next.again(&key, &tried) else {
                return self.conclude(x, &state, &mut job, peer, outcome, &timeouts);
            };
            if !job.cluster.budget.retry(now, next.settings.allowance) {
                self.metrics.retry_budget_exhausted.inc();
                let outcome = outcome.map_err(|error| error.detail("the retry budget is used up"));
                return self.conclude(x, &state, &mut job, peer, outcome, &timeouts);
            }
            self.metrics.retries.inc();
            left -= 1;
            tried.add(choice.picked.endpoint());
            state = next;
            peer = Peer::new(x, &state, choice);
        }
    }

    /// No other endpoint is tried: the last answer is taken over, or the last failure stands.
    fn conclude(
        &self,
        x: &mut Exchange,
        state: &State,
        job: &mut Job,
        peer: Peer,
        outcome: Result<Answer, Error>,
        timeouts: &Timeouts,
    ) -> Result<(), Error> {
        let answer = outcome?;
        job.outgoing.settle();
        self.answer(x, state, job, peer, answer, timeouts);
        Ok(())
    }

    /// One attempt at one endpoint, begun just now; a reused connection that died at once is replaced by a fresh one
    /// within it.
    async fn attempt(
        &self,
        x: &mut Exchange,
        state: &State,
        job: &Job,
        peer: &mut Peer,
        timeouts: &Timeouts,
        started: Instant,
    ) -> Result<Answer, Error> {
        let mut fresh = None;
        let mut connect = Duration::ZERO;
        let result = loop {
            let mut begun = fresh.unwrap_or(started);
            let protocol = peer.protocol(x, state, job.upgrade.is_some());
            let connected = match self.connect(state, peer, timeouts, protocol, fresh, begun).await {
                Ok(connected) => connected,
                Err(error) => break Err(error),
            };
            let reused = connected.is_reused();
            // An idle connection is there at once; all else has been waited for.
            if !matches!(connected, Connected::Http1 { reused: true, .. }) {
                let now = Instant::now();
                if !reused {
                    connect = now - begun;
                }
                begun = now;
            }
            let wait = Wait { outgoing: &job.outgoing, timeouts, started: begun };
            match self.exchange(x, state, job, peer, connected, &wait).await {
                Ok(answer) => break Ok(answer),
                // The peer closed an idle connection just as it was used: nothing was lost, so nothing is counted.
                Err(failure) if reused && fresh.is_none() && job.may_go_again(&failure) => {
                    fresh = Some(Instant::now());
                }
                Err(failure) => break Err(job.judge(failure)),
            }
        };
        let endpoint = peer.picked.endpoint();
        let now = Instant::now();
        let took = now - started;
        x.responded = Some(now);
        let status = result.as_ref().ok().map(|answer| answer.status().as_u16());
        let failed = result.as_ref().err().map(Error::reason);
        x.attempts.push(Attempt { address: endpoint.addr(), status, started, took, connect, failed });
        let leave = peer.leave.take();
        match result {
            Ok(answer) => {
                let status = answer.status().as_u16();
                if state.settings.algorithm == Algorithm::Ewma {
                    endpoint.latency.observe(took, now);
                }
                job.cluster.report_status(state, endpoint, status);
                if let Some(leave) = leave {
                    job.cluster.breaker_status(endpoint, leave, status, now);
                }
                Ok(answer)
            }
            Err(error) => {
                let reason = error.reason();
                // A client that broke off says nothing about the endpoint.
                if reason.blame() == Blame::Upstream {
                    endpoint.failed();
                    // With `pass_host: pass` the client chose the name that the certificate was checked against.
                    let clients =
                        reason == Reason::TlsCertificate && state.settings.pass_host == PassHost::Pass;
                    if !clients {
                        let report = if is_timeout(reason) { Report::Timeout } else { Report::TcpFailure };
                        job.cluster.report(state, endpoint, report);
                        if let Some(leave) = leave {
                            job.cluster.breaker_failed(endpoint, leave, Instant::now());
                        }
                    }
                }
                Err(error)
            }
        }
    }
}

fn is_timeout(reason: Reason) -> bool {
    matches!(reason, Reason::ConnectTimeout | Reason::SendTimeout | Reason::ReadTimeout)
}

/// A response head, and what its body comes over.
enum Answer {
    Http1 { head: Head, connection: Http1 },
    Http2 { response: Response<Incoming>, stream: Http2Stream },
}

impl Answer {
    fn status(&self) -> StatusCode {
        match self {
            Self::Http1 { head, .. } => head.status,
            Self::Http2 { response, .. } => response.status(),
        }
    }
}

impl Job {
    /// Whether a failure on a reused connection may be made good on a fresh one: the peer did nothing with the request,
    /// or it was silent and the request may be repeated. A time-out is no dead connection.
    fn may_go_again(&self, failure: &Failure) -> bool {
        let reason = failure.error.reason();
        let dead = failure.unsent || (failure.silent && reason == Reason::UpstreamClosed && self.idempotent);
        dead && reason.blame() == Blame::Upstream && !is_timeout(reason) && self.outgoing.replayable()
    }

    /// The failure of an attempt, and whether another endpoint may be tried.
    fn judge(&self, failure: Failure) -> Error {
        match self.outgoing.client_failed() {
            Some(reason) => Error::new(reason).because(failure.error),
            None => {
                // What is the client's fault is no better elsewhere.
                let theirs = failure.error.reason().blame() == Blame::Upstream;
                failure.error.retryable(theirs && (failure.unsent || self.idempotent))
            }
        }
    }
}

impl UpstreamService {
    /// An idle connection, a stream on a shared one, or a new connection. `fresh` is the moment at which one that was
    /// reused turned out dead: only a connection made since then will do.
    async fn connect(
        &self,
        state: &State,
        peer: &Peer,
        timeouts: &Timeouts,
        protocol: Protocol,
        fresh: Option<Instant>,
        now: Instant,
    ) -> Result<Connected, Error> {
        // What is rare has a box of its own: it is large, and would be part of every request's future.
        if protocol == Protocol::Http2 {
            return Box::pin(self.stream(state, peer, timeouts, fresh)).await;
        }
        let idle = |cx: &mut Context<'_>| self.pool.take(peer.key(state), now, cx);
        if fresh.is_none()
            && let Some(connection) = poll_fn(|cx| Poll::Ready(idle(cx))).await
        {
            return Ok(Connected::Http1 { connection, reused: true });
        }
        let io = Box::pin(open(state, peer, Protocol::Http1, timeouts.connect)).await?;
        Ok(Connected::Http1 { connection: Http1::new(io), reused: false })
    }

    /// A stream on a shared connection, which is made if there is none.
    async fn stream(
        &self,
        state: &State,
        peer: &Peer,
        timeouts: &Timeouts,
        fresh: Option<Instant>,
    ) -> Result<Connected, Error> {
        let settings = &state.settings;
        let endpoint = peer.picked.endpoint();
        let key = peer.key(state);
        let timeout = || Error::new(Reason::ConnectTimeout).retryable(true);
        let until = tokio::time::Instant::now() + timeouts.connect;
        // Each turn either returns, waits for another request's connection, or retires one: it cannot spin.
        loop {
            match self.pool.claim(endpoint, key) {
                Claim::Stream(stream) if fresh.is_some_and(|since| stream.connection().born() < since) => {
                    // As old as the one that was dead, and likely so too: new streams go elsewhere.
                    stream.connection().retire();
                    stream.finish();
                }
                Claim::Stream(stream) => return Ok(Connected::Http2 { stream, reused: fresh.is_none() }),
                Claim::Wait(dial) => {
                    let waited = tokio::time::timeout_at(until, dial.wait()).await;
                    if let Some(reason) = waited.map_err(|_| timeout())? {
                        return Err(Error::new(reason).retryable(true));
                    }
                }
                Claim::Dial(dialing) => {
                    let left = until.saturating_duration_since(tokio::time::Instant::now());
                    let started =
                        async { Http2::start(open(state, peer, Protocol::Http2, left).await?).await };
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
        }
    }

    /// Sends the request over the connection and waits for the head of the answer.
    async fn exchange(
        &self,
        x: &Exchange,
        state: &State,
        job: &Job,
        peer: &Peer,
        connected: Connected,
        wait: &Wait<'_>,
    ) -> Result<Answer, Failure> {
        let tls = match &peer.mesh {
            Some(mesh) => mesh.by() == By::Sidecar,
            None => state.settings.tls().is_some(),
        };
        let mut route = Route { host: &peer.host, tls, upgrade: None, spoken: peer.spoken(x, state) };
        match connected {
            Connected::Http1 { mut connection, .. } => {
                route.upgrade = job.upgrade.as_ref();
                let head = connection.send(x, &route, wait).await?;
                Ok(Answer::Http1 { head, connection })
            }
            Connected::Http2 { mut stream, .. } => {
                let response = Box::pin(stream.send(x, &route, wait)).await?;
                Ok(Answer::Http2 { response, stream })
            }
        }
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
    ) {
        let now = x.responded.unwrap_or_else(Instant::now);
        x.answered = Answered::Upstream;
        *x.response.status_mut() = answer.status();
        x.response.extensions_mut().clear();
        let cookie = state.cookie(x, peer.picked.endpoint()).cloned();
        match answer {
            Answer::Http1 { head, connection } => {
                *x.response.headers_mut() = head.headers;
                if let Some(reason) = head.reason {
                    x.response.extensions_mut().insert(reason);
                }
                if let Some(protocol) = head.upgrade {
                    switch(x, job, peer.picked, protocol, connection, timeouts.read);
                } else {
                    let home = Home {
                        pool: self.pool.clone(),
                        transport: peer.transport(state),
                        name: peer.tls_name(state).map(Into::into),
                        keepalive: state.settings.keepalive,
                    };
                    *x.response.body_mut() =
                        response_body::http1(connection, peer.picked, home, timeouts.read, now);
                }
            }
            Answer::Http2 { response, stream } => {
                let (head, incoming) = response.into_parts();
                *x.response.headers_mut() = head.headers;
                fields::sanitize_response(x.response.headers_mut());
                *x.response.body_mut() = response_body::http2(incoming, stream, peer.picked, timeouts.read);
            }
        }
        if let Some(statuses) = self.statuses(x) {
            x.response.headers_mut().insert(UPSTREAM_STATUS, statuses);
        }
        if let Some(cookie) = cookie {
            x.response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }

    /// `X-APISIX-Upstream-Status`: the statuses of all attempts, if the last one is an error or they are always shown.
    /// An attempt without an answer counts with the status that the gateway gives for it.
    fn statuses(&self, x: &Exchange) -> Option<HeaderValue> {
        let status = |attempt: &Attempt| {
            attempt.status.or(attempt.failed.map(|reason| reason.status().as_u16())).unwrap_or_default()
        };
        let last = status(x.attempts.last()?);
        if !self.show_status && last < 500 {
            return None;
        }
        if x.attempts.len() == 1 {
            return Some(HeaderValue::from(last));
        }
        let all: Vec<String> = x.attempts.iter().map(|attempt| status(attempt).to_string()).collect();
        HeaderValue::try_from(all.join(", ")).ok()
    }
}

/// The upstream agreed to another protocol: from here on bytes go both ways.
fn switch(
    x: &mut Exchange,
    job: &mut Job,
    picked: Picked,
    protocol: HeaderValue,
    connection: Http1,
    idle: Duration,
) {
    *x.response.body_mut() = Body::Empty;
    let headers = x.response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol);
    if let (Some(client), Some(upstream)) = (job.on_upgrade.take(), connection.upgraded()) {
        let tunnel = carry(client, upstream, picked, idle);
        let kept = x.take_kept();
        tokio::task::spawn_local(async move {
            tunnel.await;
            drop(kept);
        });
    }
}

/// Carries a tunnel from the moment both sides have switched. The endpoint counts as active for as long.
async fn carry(client: Upgrade, upstream: Upgraded, picked: Picked, idle: Duration) {
    let Some(client) = client.await else {
        tracing::debug!(endpoint = %picked.endpoint(), "a protocol switch came to nothing");
        return;
    };
    let mesh = upstream.io.mesh().cloned();
    let tunnel = tunnel::run(client, upstream.io, upstream.early, idle);
    let ended = match mesh {
        None => tunnel.await,
        Some(mesh) => tokio::select! {
            ended = tunnel => ended,
            () = send::revoked(mesh) => tunnel::Ended::Broken,
        },
    };
    tracing::debug!(endpoint = %picked.endpoint(), ?ended, "tunnel ended");
}

/// A new connection to the endpoint.
async fn open(state: &State, peer: &Peer, protocol: Protocol, limit: Duration) -> Result<Io, Error> {
    let address = peer.picked.endpoint().addr();
    if let Some(mesh) = &peer.mesh {
        if mesh.by() == By::Tunnel {
            return connect::connect_tunnel(address, mesh, limit).await;
        }
        let carries = match protocol {
            Protocol::Http1 => Carries::Upgrades,
            Protocol::Http2 => Carries::Requests,
        };
        return connect::connect_mesh(address, mesh, carries, limit).await;
    }
    let tls = match (state.settings.tls(), peer.tls_name(state)) {
        (Some(config), Some(name)) => {
            let name = tls_client::server_name(name).ok_or_else(|| {
                // Whoever chose the host is to blame; with `pass_host: pass` that is the client.
                let passed = state.settings.pass_host == PassHost::Pass;
                let reason = if passed { Reason::BadHost } else { Reason::TlsFailed };
                Error::new(reason).detail("the host sent upstream is no TLS server name")
            })?;
            Some((config.clone(), name))
        }
        _ => None,
    };
    connect::connect(address, state.settings.as_client, tls, limit).await
}

/// The `Host` that the endpoint is sent. APISIX `pass_host`.
fn host(x: &Exchange, state: &State, endpoint: &EndpointState) -> HeaderValue {
    match &state.settings.pass_host {
        PassHost::Rewrite(host) => HeaderValue::clone(host),
        PassHost::Node => endpoint.authority(state.settings.default_port()).clone(),
        PassHost::Pass => {
            let asked = x.forward.host.as_ref().or_else(|| x.request.headers.get(header::HOST));
            asked.unwrap_or_else(|| endpoint.authority(state.settings.default_port())).clone()
        }
    }
}

#[cfg(test)]
mod tests;
