//! Active and passive health checks, and what becomes of their state.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use bytes::Bytes;
use e2e::client::Call;
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};
use http::Response;

/// An origin whose probe path and whose other paths answer with statuses the test can change.
struct Patient {
    origin: Origin,
    probe: Arc<AtomicU16>,
    status: Arc<AtomicU16>,
    probes: Arc<std::sync::atomic::AtomicUsize>,
}

async fn patient(name: &'static str) -> Patient {
    let (probe, status) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicU16::new(200)));
    let probes = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let state = (Arc::clone(&probe), Arc::clone(&status), Arc::clone(&probes));
    let origin = Origin::http(move |request| {
        let (probe, status, probes) = state.clone();
        async move {
            let code = if request.uri().path() == "/health" {
                probes.fetch_add(1, Ordering::Relaxed);
                probe.load(Ordering::Relaxed)
            } else {
                status.load(Ordering::Relaxed)
            };
            Response::builder().status(code).header("x-origin", name).body(Bytes::new()).expect("an answer")
        }
    })
    .await;
    Patient { origin, probe, status, probes }
}

impl Patient {
    fn probes(&self) -> usize {
        self.probes.load(Ordering::Relaxed)
    }
}

fn nodes(patients: &[&Patient]) -> Value {
    let nodes: Vec<Value> = patients
        .iter()
        .map(|patient| json!({"host": "127.0.0.1", "port": patient.origin.addr.port(), "weight": 1}))
        .collect();
    json!(nodes)
}

/// Probes each second, one failure or success decides.
fn active() -> Value {
    json!({"type": "http", "http_path": "/health", "timeout": 1,
           "healthy": {"interval": 1, "successes": 1}, "unhealthy": {"interval": 1, "http_failures": 1, "tcp_failures": 1}})
}

fn upstream(patients: &[&Patient], checks: Value) -> Value {
    json!({"id": "u", "type": "roundrobin", "retries": 0, "nodes": nodes(patients), "checks": checks})
}

fn resources(upstream: Value) -> Value {
    json!({"upstreams": [upstream], "routes": [{"id": "r", "uri": "/*", "upstream_id": "u"}]})
}

async fn served(edge: &Edge, count: usize) -> Vec<String> {
    let mut connection = edge.connect().await;
    let mut names = Vec::new();
    for _ in 0..count {
        let answer = connection.send(Call::get("/")).await;
        names.push(answer.header("x-origin").map_or_else(|| answer.status.to_string(), str::to_owned));
    }
    names
}

async fn until_only(edge: &Edge, name: &str) {
    eventually(&format!("only {name} is used"), || async {
        served(edge, 6).await.iter().all(|served| served == name).then_some(())
    })
    .await;
}

async fn until_both(edge: &Edge) {
    eventually("both nodes are used", || async {
        let names = served(edge, 6).await;
        (names.contains(&"one".to_owned()) && names.contains(&"two".to_owned())).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_active_check_takes_a_node_out_and_brings_it_back() {
    let (one, two) = (patient("one").await, patient("two").await);
    let edge =
        Edge::file().resources(resources(upstream(&[&one, &two], json!({"active": active()})))).start().await;
    until_both(&edge).await;
    one.probe.store(500, Ordering::Relaxed);
    until_only(&edge, "two").await;
    let health = edge.call_control("/v1/healthcheck/upstreams/u").await.expect_status(200).json();
    let node = |port: u16| {
        let nodes = health["nodes"].as_array().expect("nodes");
        nodes.iter().find(|node| node["port"] == port).cloned().expect("the node")
    };
    assert_eq!(node(one.origin.addr.port())["status"], "unhealthy", "{health}");
    assert_eq!(node(two.origin.addr.port())["status"], "healthy", "{health}");
    one.probe.store(200, Ordering::Relaxed);
    until_both(&edge).await;
}

#[tokio::test]
async fn an_active_check_needs_its_number_of_failures() {
    let (one, two) = (patient("one").await, patient("two").await);
    let checks = json!({"active": {"type": "http", "http_path": "/health",
        "healthy": {"interval": 1, "successes": 2}, "unhealthy": {"interval": 1, "http_failures": 3}}});
    let edge = Edge::file().resources(resources(upstream(&[&one, &two], checks))).start().await;
    eventually("the first probe", || async { (one.probes() >= 1).then_some(()) }).await;
    one.probe.store(500, Ordering::Relaxed);
    let before = one.probes();
    until_only(&edge, "two").await;
    assert!(one.probes() - before >= 3, "three failures first, not {}", one.probes() - before);
}

#[tokio::test]
async fn a_tcp_check_notices_a_closed_port_and_an_opened_one() {
    let (one, two) = (patient("one").await, echo::named("two").await);
    let nodes = json!([{"host": "127.0.0.1", "port": one.origin.addr.port(), "weight": 1},
                       {"host": "127.0.0.1", "port": two.addr.port(), "weight": 1}]);
    let checks = json!({"active": {"type": "tcp", "timeout": 1, "healthy": {"interval": 1, "successes": 1},
                                   "unhealthy": {"interval": 1, "tcp_failures": 1}}});
    let upstream = json!({"id": "u", "type": "roundrobin", "retries": 0, "nodes": nodes, "checks": checks});
    let edge = Edge::file().resources(resources(upstream)).start().await;
    let addr = two.stop().await;
    until_only(&edge, "one").await;
    let _two = echo::named_at(addr, "two").await;
    until_both(&edge).await;
}

#[tokio::test]
async fn an_https_check_probes_over_tls() {
    let ca = e2e::certs::Authority::new("ca");
    let leaf = ca.server(&["127.0.0.1"]);
    let origin = echo::tls(leaf.server_config(&["http/1.1"]), "one").await;
    let checks = json!({"active": {"type": "https", "https_verify_certificate": false, "http_path": "/status/200",
        "healthy": {"interval": 1, "successes": 1}, "unhealthy": {"interval": 1, "http_failures": 1}}});
    let upstream = json!({"id": "u", "type": "roundrobin", "scheme": "https", "checks": checks,
                          "nodes": [{"host": "127.0.0.1", "port": origin.addr.port(), "weight": 1}]});
    let edge = Edge::file().resources(resources(upstream)).start().await;
    eventually("the probe has come", || async { (origin.requests() >= 2).then_some(()) }).await;
    edge.get("/").await.expect_status(200);
    let health = edge.call_control("/v1/healthcheck/upstreams/u").await.expect_status(200).json();
    assert_eq!(health["nodes"][0]["status"], "healthy", "{health}");
}

#[tokio::test]
async fn passive_checks_eject_without_any_probe() {
    let (one, two) = (patient("one").await, patient("two").await);
    let checks =
        json!({"passive": {"type": "http", "unhealthy": {"http_statuses": [500], "http_failures": 3}}});
    let edge = Edge::file().resources(resources(upstream(&[&one, &two], checks))).start().await;
    until_both(&edge).await;
    one.status.store(500, Ordering::Relaxed);
    until_only(&edge, "two").await;
    assert_eq!(one.probes() + two.probes(), 0);
}

#[tokio::test]
async fn passive_failures_and_active_successes_work_together() {
    let (one, two) = (patient("one").await, patient("two").await);
    let checks = json!({"active": active(),
        "passive": {"type": "http", "unhealthy": {"http_statuses": [503], "http_failures": 2}}});
    let edge = Edge::file().resources(resources(upstream(&[&one, &two], checks))).start().await;
    until_both(&edge).await;
    one.probe.store(500, Ordering::Relaxed);
    one.status.store(503, Ordering::Relaxed);
    until_only(&edge, "two").await;
    one.status.store(200, Ordering::Relaxed);
    one.probe.store(200, Ordering::Relaxed);
    until_both(&edge).await;
}

#[tokio::test]
async fn when_all_are_unhealthy_all_are_used() {
    let (one, two) = (patient("one").await, patient("two").await);
    let edge =
        Edge::file().resources(resources(upstream(&[&one, &two], json!({"active": active()})))).start().await;
    one.probe.store(500, Ordering::Relaxed);
    two.probe.store(500, Ordering::Relaxed);
    eventually("both are told unhealthy", || async {
        let health = edge.call_control("/v1/healthcheck/upstreams/u").await.json();
        let nodes = health["nodes"].as_array()?;
        nodes.iter().all(|node| node["status"] == "unhealthy").then_some(())
    })
    .await;
    until_both(&edge).await;
}

#[tokio::test]
async fn an_edit_keeps_the_state_of_nodes_that_stay() {
    let (one, two, three) = (patient("one").await, patient("two").await, patient("three").await);
    // Probes are rare here: what is known after the edit can only be known from before.
    let checks = json!({"active": {"type": "http", "http_path": "/health",
        "healthy": {"interval": 1, "successes": 5}, "unhealthy": {"interval": 600, "http_failures": 1}}});
    let edge = Edge::embedded().start().await;
    edge.put("upstreams/u", upstream(&[&one, &two], checks.clone())).await;
    edge.put("routes/r", json!({"uri": "/*", "upstream_id": "u"})).await;
    edge.until_status("/", 200).await;
    one.probe.store(500, Ordering::Relaxed);
    until_only(&edge, "two").await;
    edge.put("upstreams/u", upstream(&[&one, &two, &three], checks)).await;
    eventually("the new node is used", || async {
        served(&edge, 6).await.contains(&"three".to_owned()).then_some(())
    })
    .await;
    assert!(!served(&edge, 12).await.contains(&"one".to_owned()), "the node that was out is still out");
}

#[tokio::test]
async fn probes_end_with_their_node() {
    let (one, two) = (patient("one").await, patient("two").await);
    let edge = Edge::embedded().start().await;
    edge.put("upstreams/u", upstream(&[&one, &two], json!({"active": active()}))).await;
    edge.put("routes/r", json!({"uri": "/*", "upstream_id": "u"})).await;
    edge.until_status("/", 200).await;
    eventually("both are probed", || async { (one.probes() > 0 && two.probes() > 0).then_some(()) }).await;
    edge.put("upstreams/u", upstream(&[&two], json!({"active": active()}))).await;
    until_only(&edge, "two").await;
    let (gone, stayed) = (one.probes(), two.probes());
    eventually("the node that stayed is probed on", || async { (two.probes() >= stayed + 3).then_some(()) })
        .await;
    assert!(one.probes() <= gone + 1, "the removed node is not probed any more");
    edge.call_admin("DELETE", "routes/r", None).await.expect_status(200);
    edge.call_admin("DELETE", "upstreams/u", None).await.expect_status(200);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let last = two.probes();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(two.probes() <= last, "a deleted upstream is not probed");
}
