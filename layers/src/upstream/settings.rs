//! The settings of an upstream, compiled: what a request needs to know without looking at configuration.
//!
//! Everything that can be wrong is found here, on the control thread. Settings that decide which connections
//! may be shared (scheme and TLS identity) carry a number that changes when they do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use config::error::ConfigError;
use config::template::Template;
use config::upstream::discovery::Origin;
use config::upstream::extensions::{Retry as WireRetry, RetryOn};
use config::upstream::{
    ActiveCheck, AllUnhealthy, CheckType, HashOn, KeepalivePool, PassHost as WirePassHost, Scheme, Upstream,
    UpstreamTls,
};
use config::var::{Var, Vars};
use http::{HeaderName, HeaderValue};
use rustls::ClientConfig;

use super::breaker;
use super::budget::Allowance;
use super::chash;
use super::cluster::{ClusterEnv, Places};
use super::failover;
use super::health::{Limits, Report};
use super::locality::Nearness;
use super::mesh::MeshRule;
use super::picker::Algorithm;
use super::pool::Keepalive;
use super::send::Protocol;
use super::sticky;
use super::tls_client::{ClientPem, Offer, TlsClients, TlsSettings};
use crate::error::Reason;
use crate::exchange::State as ExchangeState;
use crate::target::Timeouts;
use crate::transport::original_dst::AsClient;

/// Numbers transports for connection pools; never reused in a process.
static NEXT_TRANSPORT: AtomicU64 = AtomicU64::new(1);

/// The transport without TLS over HTTP/1: most upstreams have it, and their endpoints tell them apart.
static PLAIN: LazyLock<Arc<Transport>> = LazyLock::new(|| {
    let number = next_transport();
    Arc::new(Transport { number, scheme: Scheme::Http, http2: false, tls: None, client: None, config: None })
});

/// A number for a transport.
pub(super) fn next_transport() -> u64 {
    NEXT_TRANSPORT.fetch_add(1, Ordering::Relaxed)
}

/// Which `Host` an upstream gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassHost {
    /// The client's, or what a plugin put in its place.
    Pass,
    /// The node's own.
    Node,
    /// Always this.
    Rewrite(Box<HeaderValue>),
}

/// What `chash` goes by.
#[derive(Clone, Debug)]
pub enum HashKey {
    Var(Var),
    Combination(Template),
}

impl HashKey {
    /// The hash of a request's key. A request without one goes by the client's address, as in APISIX.
    pub fn hash(&self, x: &ExchangeState) -> u64 {
        match self {
            Self::Var(var) => {
                if let Some(value) = x.get(var) {
                    return chash::hash(value.as_bytes());
                }
            }
            Self::Combination(template) => {
                if template.vars().any(|var| x.get(var).is_some()) {
                    return chash::hash(template.to_text(x).as_bytes());
                }
            }
        }
        chash::hash(x.get(&Var::RemoteAddr).unwrap_or_default().as_bytes())
    }
}

/// A set of HTTP statuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statuses([u64; 16]);

impl Statuses {
    pub(crate) fn new(statuses: impl Iterator<Item = u32>) -> Self {
        let mut set = Self::default();
        for status in statuses {
            if let Some(word) = usize::try_from(status / 64).ok().and_then(|index| set.0.get_mut(index)) {
                *word |= 1 << (status % 64);
            }
        }
        set
    }

    pub fn contains(&self, status: u16) -> bool {
        self.0.get(usize::from(status / 64)).is_some_and(|word| word & 1 << (status % 64) != 0)
    }
}

/// After what another node is tried. Without a block of its own: after every failure, and no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    connect_failure: bool,
    timeout: bool,
    reset: bool,
    statuses: Statuses,
    /// Also requests that are not idempotent.
    pub non_idempotent: bool,
}

impl Retry {
    fn compile(wire: Option<&WireRetry>) -> Self {
        let default = WireRetry::default();
        let wire = wire.unwrap_or(&default);
        let on = |condition| wire.on.contains(&condition);
        let all = if on(RetryOn::Http5xx) { 500..600 } else { 0..0 };
        let listed = wire.statuses.iter().flatten().map(|status| status.get());
        Self {
            connect_failure: on(RetryOn::ConnectFailure),
            timeout: on(RetryOn::Timeout),
            reset: on(RetryOn::Reset),
            statuses: Statuses::new(listed.chain(all)),
            non_idempotent: wire.non_idempotent,
        }
    }

    /// Whether another node is tried after this failure.
    pub fn after(&self, reason: Reason) -> bool {
        match reason {
            Reason::ConnectFailed
            | Reason::TlsFailed
            | Reason::TlsCertificate
            | Reason::MeshPeer
            | Reason::MeshRefused => self.connect_failure,
            Reason::ConnectTimeout => self.connect_failure || self.timeout,
            Reason::SendTimeout | Reason::ReadTimeout => self.timeout,
            _ => self.reset,
        }
    }

    /// Whether another node is tried after an answer of this status.
    pub fn after_status(&self, status: u16) -> bool {
        self.statuses.contains(status)
    }
}

/// How an answer or its absence is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judge {
    pub healthy: Statuses,
    pub unhealthy: Statuses,
    pub limits: Limits,
    /// Only connections count, not what comes over them.
    pub connections_only: bool,
}

impl Judge {
    /// What a status means; none if it is in neither list.
    pub fn status(&self, status: u16) -> Option<Report> {
        if self.connections_only {
            return Some(Report::Success(0));
        }
        if self.healthy.contains(status) {
            Some(Report::Success(status))
        } else if self.unhealthy.contains(status) || status == 0 {
            Some(Report::HttpFailure(status))
        } else {
            None
        }
    }
}

/// Probes, ready to be sent.
#[derive(Debug)]
pub struct Active {
    pub judge: Judge,
    pub healthy_interval: Duration,
    pub unhealthy_interval: Duration,
    pub timeout: Duration,
    pub concurrency: usize,
    pub port: Option<u16>,
    /// `Host` of the probe and its TLS name; the endpoint's where there is none.
    pub host: Option<Box<str>>,
    /// What is sent over a connection, before and after the value of `Host`; none for TCP.
    pub request: Option<(Box<str>, Box<str>)>,
    pub tls: Option<Arc<ClientConfig>>,
    source: ActiveCheck,
}

impl PartialEq for Active {
    fn eq(&self, other: &Self) -> bool {
        let same_tls = match (&self.tls, &other.tls) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        self.source == other.source && self.host == other.host && same_tls
    }
}

/// Health checks.
#[derive(Clone, Debug, Default)]
pub struct Checks {
    pub active: Option<Arc<Active>>,
    pub passive: Option<Arc<Judge>>,
}

/// What connections to an upstream have in common.
#[derive(Debug)]
struct Transport {
    number: u64,
    scheme: Scheme,
    http2: bool,
    tls: Option<Box<UpstreamTls>>,
    client: Option<ClientPem>,
    config: Option<Arc<ClientConfig>>,
}

/// The compiled settings of an upstream.
#[derive(Debug)]
pub struct Settings {
    pub algorithm: Algorithm,
    pub hash_key: Option<Box<HashKey>>,
    pub pass_host: PassHost,
    /// Further tries; none means one for every other endpoint.
    pub retries: Option<u32>,
    pub retry_timeout: Option<Duration>,
    pub timeouts: Timeouts,
    pub keepalive: Keepalive,
    pub allowance: Allowance,
    pub retry: Retry,
    pub fail_open: bool,
    /// While a smaller percentage of endpoints is healthy, all are used; 0 for only when none is.
    pub panic_threshold: u8,
    /// Which endpoints are near.
    pub nearness: Option<Box<Nearness>>,
    /// When traffic returns to a better priority.
    pub failover: Option<Box<failover::Rule>>,
    /// Where nodes are that are written down.
    pub(crate) places: Option<Box<Places>>,
    /// Endpoints come from a registry.
    pub is_discovered: bool,
    pub checks: Checks,
    pub breaker: Option<Arc<breaker::Rule>>,
    pub sticky: Option<Arc<sticky::Rule>>,
    /// The time in which the share of a new endpoint grows.
    pub slow_start: Option<Duration>,
    /// Which nodes are of the mesh.
    pub mesh: Option<Box<MeshRule>>,
    /// As whom nodes are connected.
    pub as_client: Option<AsClient>,
    transport: Arc<Transport>,
}

impl Settings {
    /// Compile `upstream`. `client` is the certificate that `tls.client_cert_id` names; `previous` are the settings
    /// before an edit.
    ///
    /// # Errors
    /// What cannot work, with a pointer into the upstream.
    pub fn compile(
        upstream: &Upstream,
        client: Option<&ClientPem>,
        env: &ClusterEnv,
        previous: Option<&Self>,
    ) -> Result<Self, ConfigError> {
        if !upstream.scheme.is_http() {
            return Err(ConfigError::invalid(
                "/scheme",
                "write http, https, grpc, grpcs or mesh for an HTTP route",
            ));
        }
        let timeout = upstream.timeout();
        let budget = upstream.retry_budget();
        let transport = Transport::compile(upstream, client, &env.tls, previous.map(|old| &old.transport))?;
        Ok(Self {
            algorithm: algorithm(upstream.algorithm),
            hash_key: hash_key(upstream)?.map(Box::new),
            pass_host: pass_host(upstream)?,
            retries: upstream.retries,
            retry_timeout: upstream
                .retry_timeout
                .as_deref()
                .map(|limit| limit.duration())
                .filter(|limit| !limit.is_zero()),
            timeouts: Timeouts {
                connect: timeout.connect.duration(),
                send: timeout.send.duration(),
                read: timeout.read.duration(),
            },
            keepalive: upstream.keepalive_pool.as_deref().map_or(env.keepalive, keepalive),
            allowance: Allowance {
                percent: budget.percent.get().into(),
                floor: budget.min_per_second.get().into(),
            },
            retry: Retry::compile(upstream.retry.as_deref()),
            fail_open: upstream.all_unhealthy == AllUnhealthy::UseAll,
            panic_threshold: upstream.panic_threshold.map_or(0, |limit| small(limit.get())),
            nearness: upstream
                .locality
                .as_deref()
                .and_then(|wire| Nearness::compile(wire, &env.place))
                .map(Box::new),
            failover: upstream.failover.as_deref().map(|wire| Box::new(failover::Rule::new(wire))),
            places: Places::of(upstream),
            is_discovered: upstream.parts().iter().any(|part| matches!(part.origin, Origin::Service { .. })),
            breaker: upstream.breaker.as_deref().map(|wire| Arc::new(breaker::Rule::new(wire))),
            sticky: upstream
                .sticky
                .as_deref()
                .map(|wire| Arc::new(sticky::Rule::new(wire, &env.session_key))),
            slow_start: upstream.slow_start.as_deref().map(|time| time.duration()),
            mesh: mesh_rule(upstream, env)?.map(Box::new),
            as_client: env.as_client,
            checks: if env.checks {
                Checks::compile(upstream, &transport, &env.tls)?
            } else {
                Checks::default()
            },
            transport,
        })
    }

    /// The word of `scheme`.
    pub fn scheme(&self) -> &'static str {
        match self.transport.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
            Scheme::Grpc => "grpc",
            Scheme::Grpcs => "grpcs",
            Scheme::Mesh => "mesh",
            Scheme::Tcp => "tcp",
            Scheme::Tls => "tls",
            Scheme::Udp => "udp",
        }
    }

    /// The port that a `Host` for this scheme leaves out.
    pub fn default_port(&self) -> u16 {
        self.transport.scheme.default_port()
    }

    pub(crate) fn protocol(&self) -> Protocol {
        self.transport.protocol()
    }

    /// How to shake hands, where there is TLS.
    pub(crate) fn tls(&self) -> Option<&Arc<ClientConfig>> {
        self.transport.config.as_ref()
    }

    /// The number under which connections are shared.
    pub(crate) fn transport(&self) -> u64 {
        self.transport.number
    }
}

impl Transport {
    fn compile(
        upstream: &Upstream,
        client: Option<&ClientPem>,
        clients: &TlsClients,
        previous: Option<&Arc<Self>>,
    ) -> Result<Arc<Self>, ConfigError> {
        let (scheme, http2) = (upstream.scheme, upstream.http2);
        let client = client_pem(upstream, client)?;
        if let Some(old) = previous
            && (old.scheme, old.http2, &old.tls, &old.client) == (scheme, http2, &upstream.tls, &client)
        {
            return Ok(Arc::clone(old));
        }
        if (scheme, http2, &upstream.tls) == (Scheme::Http, false, &None) {
            return Ok(Arc::clone(&PLAIN));
        }
        let mut transport =
            Self { number: next_transport(), scheme, http2, tls: upstream.tls.clone(), client, config: None };
        if scheme.is_tls() {
            let offer = match transport.protocol() {
                Protocol::Http1 => Offer::Http1,
                Protocol::Http2 => Offer::Http2,
            };
            let verify = upstream.tls.as_ref().and_then(|tls| tls.verify).unwrap_or(false);
            let settings = transport.tls_settings(verify, offer);
            transport.config = Some(clients.config(&settings).map_err(|error| error.under("/tls"))?);
        }
        Ok(Arc::new(transport))
    }

    fn protocol(&self) -> Protocol {
        match self.scheme {
            Scheme::Grpc | Scheme::Grpcs => Protocol::Http2,
            _ if self.http2 => Protocol::Http2,
            _ => Protocol::Http1,
        }
    }

    fn tls_settings(&self, verify: bool, offer: Offer) -> TlsSettings {
        let authorities = self.tls.as_ref().and_then(|tls| tls.ca_certs.as_ref());
        TlsSettings {
            verify,
            authorities: authorities.into_iter().flatten().map(|pem| Arc::from(&**pem)).collect(),
            client: self.client.clone(),
            offer,
        }
    }
}

/// Which nodes are of the mesh.
fn mesh_rule(upstream: &Upstream, env: &ClusterEnv) -> Result<Option<MeshRule>, ConfigError> {
    let Some(mesh) = &env.mesh else {
        return match upstream.scheme {
            Scheme::Mesh => {
                Err(ConfigError::invalid("/scheme", "this process has no identity in a mesh: configure one"))
            }
            _ => Ok(None),
        };
    };
    let mut identities = Vec::new();
    for (index, text) in upstream.identities.iter().flat_map(|list| list.iter()).enumerate() {
        let identity = text.as_str().parse();
        let wrong = |error: certs::identity::IdentityError| {
            ConfigError::invalid(format!("/identities/{index}"), error.to_string())
        };
        identities.push(identity.map_err(wrong)?);
    }
    let all = upstream.scheme == Scheme::Mesh || !identities.is_empty();
    // What has TLS of its own is what its `tls` says.
    let may_be = all || !upstream.scheme.is_tls();
    Ok(may_be.then(|| MeshRule::new(mesh, all, identities)))
}

fn client_pem(upstream: &Upstream, named: Option<&ClientPem>) -> Result<Option<ClientPem>, ConfigError> {
    let Some(tls) = upstream.tls.as_deref() else { return Ok(None) };
    if let Some(id) = &tls.client_cert_id {
        let missing =
            || ConfigError::invalid("/tls/client_cert_id", format!("there is no client certificate `{id}`"));
        return Ok(Some(named.ok_or_else(missing)?.clone()));
    }
    Ok(tls.client_cert.as_ref().zip(tls.client_key.as_deref()).map(|(certificate, key)| ClientPem {
        certificate: Arc::from(&**certificate),
        key: key.reveal().into(),
    }))
}

fn algorithm(algorithm: config::upstream::Algorithm) -> Algorithm {
    use config::upstream::Algorithm as Wire;
    match algorithm {
        Wire::RoundRobin => Algorithm::RoundRobin,
        Wire::Chash => Algorithm::Chash,
        Wire::Ewma => Algorithm::Ewma,
        Wire::LeastConn => Algorithm::LeastConn,
        Wire::Random => Algorithm::Random,
    }
}

fn hash_key(upstream: &Upstream) -> Result<Option<HashKey>, ConfigError> {
    if algorithm(upstream.algorithm) != Algorithm::Chash {
        return Ok(None);
    }
    let key = upstream.key.as_deref().unwrap_or_default();
    let var = match upstream.hash_on {
        HashOn::Vars => Var::parse(key),
        HashOn::Header => {
            let name = HeaderName::from_bytes(key.as_bytes());
            Var::Http(name.map_err(|_| ConfigError::invalid("/key", "write the name of a header field"))?)
        }
        HashOn::Cookie => Var::Cookie(key.into()),
        HashOn::Consumer => Var::ConsumerName,
        HashOn::VarsCombinations => return Ok(Some(HashKey::Combination(Template::parse(key)))),
    };
    Ok(Some(HashKey::Var(var)))
}

fn keepalive(pool: &KeepalivePool) -> Keepalive {
    let idle = pool.idle_timeout.duration();
    Keepalive {
        size: usize::try_from(pool.size.get()).unwrap_or(usize::MAX),
        idle: (!idle.is_zero()).then_some(idle),
        requests: pool.requests.get(),
    }
}

fn pass_host(upstream: &Upstream) -> Result<PassHost, ConfigError> {
    Ok(match upstream.pass_host {
        WirePassHost::Pass => PassHost::Pass,
        WirePassHost::Node => PassHost::Node,
        WirePassHost::Rewrite => {
            let host = upstream.upstream_host.as_deref().map_or("", |host| host.as_str());
            let invalid = |_| ConfigError::invalid("/upstream_host", "write a host, as host or host:port");
            PassHost::Rewrite(Box::new(HeaderValue::from_str(host).map_err(invalid)?))
        }
    })
}

impl Checks {
    fn compile(upstream: &Upstream, transport: &Transport, tls: &TlsClients) -> Result<Self, ConfigError> {
        let Some(checks) = upstream.checks.as_deref() else { return Ok(Self::default()) };
        let active = checks.active.as_deref().map(|check| Active::compile(check, upstream, transport, tls));
        let passive = checks.passive.as_deref().map(|check| {
            let (healthy, unhealthy) = (check.healthy(), check.unhealthy());
            Arc::new(Judge {
                healthy: Statuses::new(healthy.http_statuses.iter().map(|status| status.get())),
                unhealthy: Statuses::new(unhealthy.http_statuses.iter().map(|status| status.get())),
                limits: Limits {
                    successes: small(healthy.successes.get()),
                    http_failures: small(unhealthy.http_failures.get()),
                    tcp_failures: small(unhealthy.tcp_failures.get()),
                    timeouts: small(unhealthy.timeouts.get()),
                },
                connections_only: check.kind == CheckType::Tcp,
            })
        });
        Ok(Self { active: active.transpose()?.map(Arc::new), passive })
    }

    /// Whether verdicts mean anything.
    pub fn any(&self) -> bool {
        self.active.is_some() || self.passive.is_some()
    }
}

/// The limits in the schema fit.
fn small(number: u32) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

impl Active {
    /// The word of `type`.
    pub fn kind(&self) -> &'static str {
        match self.source.kind {
            CheckType::Http => "http",
            CheckType::Https => "https",
            CheckType::Tcp => "tcp",
        }
    }

    fn compile(
        check: &ActiveCheck,
        upstream: &Upstream,
        transport: &Transport,
        clients: &TlsClients,
    ) -> Result<Self, ConfigError> {
        let (healthy, unhealthy) = (check.healthy(), check.unhealthy());
        let tls = if check.kind == CheckType::Https {
            let settings = transport.tls_settings(check.https_verify_certificate, Offer::Nothing);
            Some(clients.config(&settings).map_err(|error| error.under("/tls"))?)
        } else {
            None
        };
        let rewritten = (upstream.pass_host == WirePassHost::Rewrite)
            .then(|| upstream.upstream_host.as_deref().map(|host| host.as_str()))
            .flatten();
        let host = check.host.as_ref().map(|host| host.as_str()).or(rewritten);
        Ok(Self {
            judge: Judge {
                healthy: Statuses::new(healthy.http_statuses.iter().map(|status| status.get())),
                unhealthy: Statuses::new(unhealthy.http_statuses.iter().map(|status| status.get())),
                limits: Limits {
                    successes: small(healthy.successes.get()),
                    http_failures: small(unhealthy.http_failures.get()),
                    tcp_failures: small(unhealthy.tcp_failures.get()),
                    timeouts: small(unhealthy.timeouts.get()),
                },
                connections_only: check.kind == CheckType::Tcp,
            },
            healthy_interval: Duration::from_secs(healthy.interval.get().into()),
            unhealthy_interval: Duration::from_secs(unhealthy.interval.get().into()),
            timeout: check.timeout.duration(),
            concurrency: usize::try_from(check.concurrency.get()).unwrap_or(1),
            port: check.port.map(|port| port.get()),
            host: host.map(Into::into),
            request: (check.kind != CheckType::Tcp).then(|| probe_request(check)).transpose()?,
            tls,
            source: check.clone(),
        })
    }
}

/// The text of a probe around the value of its `Host` field.
fn probe_request(check: &ActiveCheck) -> Result<(Box<str>, Box<str>), ConfigError> {
    let path = &check.http_path;
    if !path.starts_with('/') || path.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
        return Err(ConfigError::invalid("/checks/active/http_path", "write a path without spaces, from /"));
    }
    let head = format!("{} {path} HTTP/1.1\r\nHost: ", check.http_method.as_str());
    let mut tail = String::from("\r\nConnection: close\r\n");
    let mut agent = false;
    for (index, field) in check.req_headers.iter().flatten().enumerate() {
        let valid = field.split_once(':').is_some_and(|(name, value)| {
            HeaderName::from_bytes(name.trim().as_bytes()).is_ok()
                && HeaderValue::from_str(value.trim()).is_ok()
        });
        if !valid {
            let pointer = format!("/checks/active/req_headers/{index}");
            return Err(ConfigError::invalid(pointer, "write a header field, as Name: value"));
        }
        agent |=
            field.split_once(':').is_some_and(|(name, _)| name.trim().eq_ignore_ascii_case("user-agent"));
        tail.push_str(field.trim());
        tail.push_str("\r\n");
    }
    if !agent {
        tail.push_str("User-Agent: postern-health-check\r\n");
    }
    if !check.http_req_body.is_empty() {
        tail.push_str(&format!("Content-Length: {}\r\n", check.http_req_body.len()));
    }
    tail.push_str("\r\n");
    tail.push_str(&check.http_req_body);
    Ok((head.into(), tail.into()))
}
