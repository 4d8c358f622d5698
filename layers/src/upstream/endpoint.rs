//! What is known about one address of an upstream, shared by all workers and kept while the address stays.
//!
//! Workers touch only atomics here. The value outlives edits of the upstream and changes of the name it came
//! from, so health, latency and the number of requests under way are not forgotten by a reload.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use http::HeaderValue;

use super::breaker::{Breaker, Rule};
use super::ewma::Latency;
use super::health::Health;
use super::mesh::MeshPeer;

/// Numbers endpoints for connection pools and tried sets; never reused in a process.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Ports that a `Host` leaves out under one scheme or another.
const DEFAULT_PORTS: [u16; 2] = [80, 443];

/// What makes two endpoints the same over edits and DNS changes. The host counts, because two names that
/// share an address may be two services.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointKey {
    pub addr: SocketAddr,
    pub host: Arc<str>,
}

/// The shared state of one endpoint.
#[derive(Debug)]
pub struct EndpointState {
    id: u64,
    key: EndpointKey,
    host_and_port: HeaderValue,
    /// Only where the port is one that a scheme leaves out.
    host_only: Option<Box<HeaderValue>>,
    counters: Counters,
    /// Latency average for `ewma`.
    pub latency: Latency,
    /// Health counters and verdict.
    pub health: Health,
    /// There where the upstream has breakers.
    breaker: ArcSwapOption<Breaker>,
    /// There where the node is of the mesh.
    mesh: ArcSwapOption<MeshPeer>,
    /// When it began to get its growing share, in milliseconds since [`EPOCH`]; 0 if it has its full one.
    ramp: AtomicU64,
    /// It takes no new requests: nobody needs its idle connections.
    left: AtomicBool,
}

/// What the beginnings of ramps count from.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The share a new endpoint begins with, in percent of its weight.
const COLD: u8 = 10;

/// On its own cache line: the rest of the state is read much more often than it is written.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counters {
    active: AtomicU32,
    requests: AtomicU64,
    failures: AtomicU64,
}

impl EndpointState {
    /// A fresh endpoint: healthy, idle, with no latency known.
    pub fn new(key: EndpointKey) -> Self {
        let host = &*key.host;
        // A colon in a host without brackets is an IPv6 address.
        let bare =
            if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
        let full = format!("{bare}:{}", key.addr.port());
        // Hosts are checked when configuration is read; an address is always a valid field value.
        let value = |text: &str| {
            HeaderValue::from_str(text)
                .or_else(|_| HeaderValue::from_str(&key.addr.to_string()))
                .unwrap_or(HeaderValue::from_static("localhost"))
        };
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            host_and_port: value(&full),
            host_only: DEFAULT_PORTS.contains(&key.addr.port()).then(|| Box::new(value(&bare))),
            key,
            counters: Counters::default(),
            latency: Latency::default(),
            health: Health::default(),
            breaker: ArcSwapOption::empty(),
            mesh: ArcSwapOption::empty(),
            ramp: AtomicU64::new(0),
            left: AtomicBool::new(false),
        }
    }

    /// Unique in the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn addr(&self) -> SocketAddr {
        self.key.addr
    }

    /// The host as configured: an address or the name this address came from.
    pub fn host(&self) -> &Arc<str> {
        &self.key.host
    }

    pub fn key(&self) -> &EndpointKey {
        &self.key
    }

    /// The `Host` to send for `pass_host: node`: with the port unless it is `default_port`.
    pub fn authority(&self, default_port: u16) -> &HeaderValue {
        match &self.host_only {
            Some(host) if self.key.addr.port() == default_port => host,
            _ => &self.host_and_port,
        }
    }

    /// Requests under way, on all workers.
    pub fn active(&self) -> u32 {
        self.counters.active.load(Ordering::Relaxed)
    }

    /// Attempts sent here since the endpoint appeared.
    pub fn requests(&self) -> u64 {
        self.counters.requests.load(Ordering::Relaxed)
    }

    /// Attempts that failed before a response head.
    pub fn failures(&self) -> u64 {
        self.counters.failures.load(Ordering::Relaxed)
    }

    /// Its breaker, if the upstream has any.
    pub fn breaker(&self) -> Option<Arc<Breaker>> {
        self.breaker.load_full()
    }

    /// Sees that it has a breaker with this rule, or none. One that has it already stays as it is.
    pub(crate) fn settle_breaker(&self, rule: Option<&Arc<Rule>>) {
        let current = self.breaker.load();
        match (rule, current.as_ref()) {
            (None, None) => {}
            (Some(rule), Some(breaker)) if **rule == **breaker.rule() => {}
            (rule, _) => self.breaker.store(rule.map(|rule| Arc::new(Breaker::new(rule)))),
        }
    }

    /// How it is spoken to, if it is of the mesh.
    pub fn mesh(&self) -> Option<Arc<MeshPeer>> {
        self.mesh.load_full()
    }

    /// It is of the mesh, or not.
    pub(crate) fn settle_mesh(&self, peer: Option<Arc<MeshPeer>>) {
        let current = self.mesh.load();
        let same = match (&peer, current.as_ref()) {
            (Some(new), Some(old)) => Arc::ptr_eq(new, old),
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.mesh.store(peer);
        }
    }

    /// From now on its share grows from a small one.
    pub(crate) fn start_cold(&self, now: Instant) {
        let since = now.saturating_duration_since(*EPOCH).as_millis();
        self.ramp.store(u64::try_from(since).unwrap_or(u64::MAX - 1) + 1, Ordering::Relaxed);
    }

    /// Its share in percent of its weight, if it takes `time` to grow to the whole.
    pub(crate) fn warmth(&self, time: Option<Duration>, now: Instant) -> u8 {
        let since = self.ramp.load(Ordering::Relaxed);
        let (Some(time), 1..) = (time, since) else { return 100 };
        let passed = now.saturating_duration_since(*EPOCH + Duration::from_millis(since - 1));
        if passed >= time {
            self.ramp.store(0, Ordering::Relaxed);
            return 100;
        }
        let percent = passed.as_secs_f64() / time.as_secs_f64() * 100.0;
        // Below 100 by the comparison above.
        (percent as u8).max(COLD)
    }

    /// It is draining or gone: workers let go of its idle connections.
    pub(crate) fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
    }

    /// It is back.
    pub(crate) fn stay(&self) {
        self.left.store(false, Ordering::Relaxed);
    }

    /// Whether it is draining or gone.
    pub(crate) fn has_left(&self) -> bool {
        self.left.load(Ordering::Relaxed)
    }

    /// Count an attempt that failed before a response head.
    pub fn failed(&self) {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
    }
}

impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key.addr.fmt(f)
    }
}

/// A picked endpoint. It counts as active until this is dropped, which is when the response body has ended.
#[derive(Debug)]
pub struct Picked(Arc<EndpointState>);

impl Picked {
    /// Count a request on `endpoint`.
    pub fn new(endpoint: Arc<EndpointState>) -> Self {
        endpoint.counters.active.fetch_add(1, Ordering::Relaxed);
        endpoint.counters.requests.fetch_add(1, Ordering::Relaxed);
        Self(endpoint)
    }

    pub fn endpoint(&self) -> &Arc<EndpointState> {
        &self.0
    }
}

impl std::ops::Deref for Picked {
    type Target = EndpointState;

    fn deref(&self) -> &EndpointState {
        &self.0
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.0.counters.active.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_host_field_has_a_port_unless_it_is_the_schemes_own() {
        let cases = [
            ("api.test", "10.0.0.1:80", 80, "api.test"),
            ("api.test", "10.0.0.1:8080", 80, "api.test:8080"),
            ("10.0.0.1", "10.0.0.1:443", 80, "10.0.0.1:443"),
            ("::1", "[::1]:80", 80, "[::1]"),
            ("[::1]", "[::1]:81", 80, "[::1]:81"),
        ];
        for (host, addr, default_port, wanted) in cases {
            let key = EndpointKey { addr: addr.parse().unwrap(), host: host.into() };
            assert_eq!(EndpointState::new(key).authority(default_port), wanted, "{host} {addr}");
        }
    }

    #[test]
    fn the_share_of_a_cold_endpoint_grows_to_the_whole() {
        let key = EndpointKey { addr: "10.0.0.1:80".parse().unwrap(), host: "a".into() };
        let endpoint = EndpointState::new(key);
        let (time, start) = (Some(Duration::from_secs(10)), *EPOCH + Duration::from_secs(5));
        assert_eq!(endpoint.warmth(time, start), 100, "nothing was cold");
        endpoint.start_cold(start);
        for (seconds, percent) in [(0.0, 10), (0.5, 10), (3.0, 30), (7.5, 75), (9.99, 99), (10.0, 100)] {
            let now = start + Duration::from_secs_f64(seconds);
            assert_eq!(endpoint.warmth(time, now), percent, "{seconds} s");
        }
        endpoint.start_cold(start);
        assert_eq!(endpoint.warmth(None, start), 100, "without slow start nothing is cold");
    }

    #[test]
    fn a_request_is_active_until_its_guard_goes() {
        let key = EndpointKey { addr: "10.0.0.1:80".parse().unwrap(), host: "a".into() };
        let endpoint = Arc::new(EndpointState::new(key));
        let first = Picked::new(Arc::clone(&endpoint));
        let second = Picked::new(Arc::clone(&endpoint));
        assert_eq!((endpoint.active(), endpoint.requests()), (2, 2));
        drop((first, second));
        assert_eq!((endpoint.active(), endpoint.requests()), (0, 2));
    }
}
