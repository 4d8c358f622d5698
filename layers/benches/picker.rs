//! What the choice of an endpoint costs, by algorithm and number of endpoints, and what a new picker costs.
//!
//! `cargo bench -p layers --bench picker`. A pick and a retry must not allocate, and a pick must not grow with the number
//! of endpoints, except for `least_conn`, which looks at all of them.

#![allow(clippy::indexing_slicing, reason = "a JSON object of a bench")]

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::process::Place;
use config::upstream::Upstream;
use discovery::Discovery;
use divan::{AllocProfiler, Bencher};
use layers::upstream::Keepalive;
use layers::upstream::budget::{Allowance, Budget};
use layers::upstream::chash;
use layers::upstream::cluster::{Cluster, ClusterEnv};
use layers::upstream::drains::{Drains, Mark};
use layers::upstream::endpoint::{EndpointKey, EndpointState};
use layers::upstream::health::{Health, Limits, Report, Source};
use layers::upstream::picker::{Algorithm, Peer, PickKey, Picker, Selection, Tried};
use layers::upstream::round_robin::CursorCell;
use layers::upstream::tls_client::TlsClients;
use rustls::RootCertStore;

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

const SIZES: [usize; 4] = [1, 10, 100, 1000];

fn main() {
    divan::main();
}

fn peers(count: usize) -> Vec<Peer> {
    let peer = |n: usize| {
        let addr = SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 8080));
        let key = EndpointKey { addr, host: addr.ip().to_string().into() };
        Peer {
            state: Arc::new(EndpointState::new(key)),
            weight: n as u32 % 4 + 1,
            siblings: 1,
            priority: 0,
            warmth: 100,
            health: discovery::Health::Healthy,
            details: None,
        }
    };
    (0..count).map(peer).collect()
}

fn picker(algorithm: Algorithm, count: usize) -> Picker {
    Picker::new(algorithm, &peers(count), &Selection::default(), &CursorCell::default())
}

fn pick(bencher: Bencher<'_, '_>, algorithm: Algorithm, count: usize) {
    let (picker, tried) = (picker(algorithm, count), Tried::default());
    let (mut hash, now) = (0u64, Instant::now());
    bencher.bench_local(|| {
        hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
        picker.pick(&PickKey { hash, now }, &tried)
    });
}

#[divan::bench(args = SIZES)]
fn round_robin(bencher: Bencher<'_, '_>, endpoints: usize) {
    pick(bencher, Algorithm::RoundRobin, endpoints);
}

#[divan::bench(args = SIZES)]
fn chash(bencher: Bencher<'_, '_>, endpoints: usize) {
    pick(bencher, Algorithm::Chash, endpoints);
}

#[divan::bench(args = SIZES)]
fn ewma(bencher: Bencher<'_, '_>, endpoints: usize) {
    pick(bencher, Algorithm::Ewma, endpoints);
}

#[divan::bench(args = SIZES)]
fn least_conn(bencher: Bencher<'_, '_>, endpoints: usize) {
    pick(bencher, Algorithm::LeastConn, endpoints);
}

#[divan::bench(args = SIZES)]
fn random(bencher: Bencher<'_, '_>, endpoints: usize) {
    pick(bencher, Algorithm::Random, endpoints);
}

/// All workers pick from one upstream: the counters of an endpoint and the cursor are what they share.
#[divan::bench(threads = [1, 4], args = [1, 10])]
fn round_robin_of_workers(bencher: Bencher<'_, '_>, endpoints: usize) {
    let (picker, tried, now) = (picker(Algorithm::RoundRobin, endpoints), Tried::default(), Instant::now());
    bencher.bench(|| picker.pick(&PickKey { hash: 0, now }, &tried).is_some());
}

/// A retry: three endpoints were tried.
#[divan::bench]
fn retry(bencher: Bencher<'_, '_>) {
    let peers = peers(10);
    let picker = Picker::new(Algorithm::RoundRobin, &peers, &Selection::default(), &CursorCell::default());
    let mut tried = Tried::default();
    peers.iter().take(3).for_each(|peer| tried.add(&peer.state));
    let key = PickKey { hash: 0, now: Instant::now() };
    bencher.bench_local(|| picker.pick(&key, &tried));
}

/// A verdict flipped or a name moved: the picker is built again, on the control side.
#[divan::bench(args = SIZES)]
fn build(bencher: Bencher<'_, '_>, endpoints: usize) {
    let (peers, cursor) = (peers(endpoints), CursorCell::default());
    bencher.bench_local(|| Picker::new(Algorithm::RoundRobin, &peers, &Selection::default(), &cursor));
}

/// One endpoint among ten thousand begins or ceases to drain: what the control side does for it, the new picker included.
/// With `chash` the next ring is made from the former one; with sessions their table is made again.
#[divan::bench(args = ["roundrobin", "least_conn", "ewma", "random", "chash", "sticky", "locality"])]
fn one_of_ten_thousand(bencher: Bencher<'_, '_>, kind: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let Ok(runtime) = runtime else { return };
    let env = env(runtime.handle().clone());
    let nodes: Vec<_> = (0..10_000)
        .map(|n: usize| {
            let zone = serde_json::json!({"zone": if n.is_multiple_of(3) { "a" } else { "b" }});
            serde_json::json!({"host": format!("10.0.{}.{}", n >> 8, n & 255), "port": 8080, "weight": 1, "metadata": zone})
        })
        .collect();
    let mut upstream = serde_json::json!({"type": kind, "nodes": nodes});
    match kind {
        "chash" => upstream["key"] = "remote_addr".into(),
        "sticky" => {
            upstream["type"] = "roundrobin".into();
            upstream["sticky"] = serde_json::json!({});
        }
        "locality" => {
            upstream["type"] = "roundrobin".into();
            upstream["locality"] = serde_json::json!({"prefer": "zone"});
        }
        _ => {}
    }
    let Ok(upstream) = serde_json::from_value::<Upstream>(upstream) else { return };
    let Ok(cluster) = Cluster::build("upstreams/1", &upstream, None, &env) else { return };
    let Ok(node) = "10.0.20.7:8080".parse() else { return };
    let mark = Mark { id: "1".into(), service: "1".into(), node: Some(node) };
    let mut drains = false;
    bencher.bench_local(|| {
        drains = !drains;
        env.drains.set(if drains { vec![mark.clone()] } else { Vec::new() });
        cluster.refresh(&env.control);
    });
}

/// The ring of ten thousand endpoints where there is none to make it from: at the start, and when all is different.
#[divan::bench]
fn ring_from_nothing(bencher: Bencher<'_, '_>) {
    let peers = peers(10_000);
    let picker = || Picker::new(Algorithm::Chash, &peers, &Selection::default(), &CursorCell::default());
    bencher.bench_local(picker);
}

#[divan::bench]
fn hash_of_a_key(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| chash::hash(black_box(b"203.0.113.77")));
}

/// A request and a retry that the budget allows or not.
#[divan::bench]
fn budget(bencher: Bencher<'_, '_>) {
    let (budget, now) = (Budget::new(), Instant::now());
    bencher.bench_local(|| {
        budget.request(now);
        budget.retry(now, Allowance::default())
    });
}

/// The usual report: a success at a healthy endpoint.
#[divan::bench]
fn report(bencher: Bencher<'_, '_>) {
    let limits = Limits { successes: 2, http_failures: 5, tcp_failures: 2, timeouts: 7 };
    let health = Health::default();
    bencher.bench_local(|| health.report(Source::Passive, Report::Success(200), &limits));
}

fn env(control: tokio::runtime::Handle) -> ClusterEnv {
    let place = Place { zone: Some("a".to_owned()), ..Place::default() };
    ClusterEnv {
        discovery: Discovery::new(control.clone(), discovery::Settings::default()),
        tls: Arc::new(TlsClients::new(Arc::new(RootCertStore::empty()))),
        checks: true,
        keepalive: Keepalive { size: 320, idle: Some(Duration::from_secs(60)), requests: 1000 },
        session_key: layers::upstream::sticky::own_key(Vec::new),
        drains: Drains::default(),
        place: Arc::new(place),
        mesh: None,
        as_client: None,
        control,
    }
}

/// An edit of an upstream with its endpoints kept.
#[divan::bench(args = SIZES)]
fn edit(bencher: Bencher<'_, '_>, endpoints: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let Ok(runtime) = runtime else { return };
    let env = env(runtime.handle().clone());
    let nodes: serde_json::Map<_, _> = (0..endpoints)
        .map(|n| (format!("10.0.{}.{}:8080", n >> 8, n & 255), serde_json::Value::from(1)))
        .collect();
    let upstream = serde_json::json!({"type": "roundrobin", "nodes": nodes});
    let Ok(upstream) = serde_json::from_value::<Upstream>(upstream) else { return };
    let Ok(cluster) = Cluster::build("upstreams/1", &upstream, None, &env) else { return };
    bencher.bench_local(|| cluster.update(&upstream, None, &env));
}
