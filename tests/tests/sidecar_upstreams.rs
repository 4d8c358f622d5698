//! What a sidecar does for the calls of its application, over the mesh: retries and their budget, breakers, outliers, failover,
//! plugins; and for bytes as well as for requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use bytes::Bytes;
use e2e::client::{Call, DEADLINE};
use e2e::origin::{Origin, echo};
use e2e::ports::Port;
use e2e::sidecar::{Mesh, Sidecar, id};
use e2e::{Value, eventually, json};
use http::Response;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

/// An application that answers with a status that the test can change, behind its sidecar.
struct Callee {
    origin: Origin,
    sidecar: Sidecar,
    status: Arc<AtomicU16>,
}

impl Callee {
    async fn start(mesh: &Mesh) -> Callee {
        let status = Arc::new(AtomicU16::new(200));
        let current = status.clone();
        let origin = Origin::http(move |_| {
            let status = current.load(Ordering::Relaxed);
            async move { Response::builder().status(status).body(Bytes::new()).expect("an answer") }
        })
        .await;
        let sidecar = mesh.sidecar("payments").inbound(origin.addr, json!({})).start().await;
        Callee { origin, sidecar, status }
    }

    fn node(&self, priority: i32) -> Value {
        let at = self.sidecar.inbound(0);
        json!({"host": at.ip().to_string(), "port": at.port(), "weight": 1, "priority": priority})
    }

    fn answers(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }
}

fn nobody(port: &Port, priority: i32) -> Value {
    json!({"host": "127.0.0.1", "port": port.number(), "weight": 1, "priority": priority})
}

/// A sidecar that calls these nodes of `payments`.
async fn caller(mesh: &Mesh, nodes: Value, upstream: Value, more: Value) -> Sidecar {
    let placeholder = "127.0.0.1:1".parse().expect("an address");
    let service = json!({"upstream": {"nodes": null}});
    let nodes = json!({"services": [{
        "name": "payments", "identities": [id("payments")], "upstream": {"type": "roundrobin", "nodes": nodes},
    }]});
    let mut config = nodes;
    for (target, patch) in [("/services/0/upstream", upstream), ("/services/0", more)] {
        let members = config.pointer_mut(target).and_then(Value::as_object_mut).expect("an object");
        members.extend(patch.as_object().cloned().expect("an object"));
    }
    mesh.sidecar("orders").service("payments", placeholder, service).config(config).start().await
}

async fn get(sidecar: &Sidecar) -> u16 {
    Call::get("/").send_to(sidecar.listener(0)).await.status
}

#[tokio::test]
async fn a_node_that_is_away_costs_nothing_but_retries_which_have_a_budget() {
    let (mesh, gone) = (Mesh::new(), Port::free());
    let good = Callee::start(&mesh).await;
    let sidecar = caller(&mesh, json!([nobody(&gone, 0), good.node(0)]), json!({}), json!({})).await;
    for _ in 0..6 {
        assert_eq!(get(&sidecar).await, 200);
    }
    let metrics = sidecar.ask("/metrics").await.text();
    let retries = metrics.lines().find_map(|line| line.strip_prefix("postern_upstream_retries_total "));
    assert!(retries.is_some_and(|retries| retries != "0"), "{metrics}");

    // Two that are away, and no more than one repetition in a second.
    let other = Port::free();
    let budget = json!({"retry_budget": {"percent": 0, "min_per_second": 1}});
    let sidecar = caller(&mesh, json!([nobody(&gone, 0), nobody(&other, 0)]), budget, json!({})).await;
    eventually("the budget is used up", || async {
        for _ in 0..20 {
            assert_eq!(get(&sidecar).await, 502);
        }
        let metrics = sidecar.ask("/metrics").await.text();
        let used_up =
            metrics.lines().find_map(|line| line.strip_prefix("postern_retry_budget_exhausted_total "));
        used_up.is_some_and(|count| count != "0").then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_breaker_takes_one_node_out() {
    let mesh = Mesh::new();
    let (bad, good) = (Callee::start(&mesh).await, Callee::start(&mesh).await);
    bad.answers(503);
    let upstream = json!({"retries": 0, "breaker": {"max_failures": 3, "window": 60, "cool_down": 1}});
    let sidecar = caller(&mesh, json!([bad.node(0), good.node(0)]), upstream, json!({})).await;
    for _ in 0..20 {
        get(&sidecar).await;
    }
    assert_eq!(bad.origin.requests(), 3, "three failures, and then nothing");
    bad.answers(200);
    eventually("it is let back", || async {
        assert_eq!(get(&sidecar).await, 200);
        (bad.origin.requests() > 4).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_outlier_is_ejected_by_live_traffic_alone() {
    let mesh = Mesh::new();
    let (bad, good) = (Callee::start(&mesh).await, Callee::start(&mesh).await);
    bad.answers(500);
    let passive = json!({"unhealthy": {"http_statuses": [500], "http_failures": 2}});
    let upstream = json!({"retries": 0, "checks": {"passive": passive}});
    let sidecar = caller(&mesh, json!([bad.node(0), good.node(0)]), upstream, json!({})).await;
    eventually("it is ejected", || async {
        let mut statuses = Vec::new();
        for _ in 0..6 {
            statuses.push(get(&sidecar).await);
        }
        statuses.iter().all(|status| *status == 200).then_some(())
    })
    .await;
    let told = sidecar.ask("/v1/endpoints").await.json();
    let port = bad.sidecar.inbound(0).port().to_string();
    assert!(told.to_string().contains("unhealthy") && told.to_string().contains(&port), "{told}");
    assert!(bad.origin.requests() <= 4, "{}", bad.origin.requests());
}

#[tokio::test]
async fn the_next_priority_serves_while_the_first_is_away() {
    let mesh = Mesh::new();
    let (near, far) = (Callee::start(&mesh).await, Callee::start(&mesh).await);
    let passive =
        json!({"unhealthy": {"http_statuses": [503], "http_failures": 2}, "healthy": {"successes": 1}});
    let active =
        json!({"http_path": "/", "healthy": {"interval": 1, "successes": 1}, "unhealthy": {"interval": 1}});
    let upstream = json!({"retries": 0, "checks": {"active": active, "passive": passive}});
    let sidecar = caller(&mesh, json!([near.node(0), far.node(-1)]), upstream, json!({})).await;
    let served = async |by: &Callee| {
        let before = by.origin.requests();
        let mut good = true;
        for _ in 0..20 {
            good &= get(&sidecar).await == 200;
        }
        // Active checks ask as well, and not twenty times in so short a time.
        good && by.origin.requests() >= before + 20
    };
    assert!(served(&near).await);
    near.answers(503);
    eventually("the other serves", || async { served(&far).await.then_some(()) }).await;
    near.answers(200);
    eventually("the first serves again", || async { served(&near).await.then_some(()) }).await;
}

#[tokio::test]
async fn plugins_of_a_service_run_as_at_the_edge_and_where_they_are_placed() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let callee = mesh.sidecar("payments").inbound(origin.addr, json!({})).start().await;
    let plugins = json!({
        "proxy-rewrite": {"uri": "/rewritten", "headers": {"set": {"x-from": "sidecar"}}},
        "response-rewrite": {"headers": {"set": {"x-edge": "1"}}, "_meta": {"placement": "edge"}},
        "limit-count": {"count": 2, "time_window": 600, "key_type": "constant", "key": "all", "rejected_code": 429},
    });
    let service = json!({"plugins": plugins});
    let sidecar = mesh.sidecar("orders").service("payments", callee.inbound(0), service).start().await;
    for _ in 0..2 {
        let answer = Call::get("/asked").send_to(sidecar.listener(0)).await.expect_status(200);
        assert_eq!(answer.header("x-edge"), None, "it is placed at the edge");
        let seen = answer.json();
        assert_eq!(seen["headers"]["x-from"], json!(["sidecar"]), "{seen}");
        assert!(seen.to_string().contains("/rewritten"), "{seen}");
    }
    assert_eq!(get(&sidecar).await, 429, "the third in its window");
    assert_eq!(origin.requests(), 2);
}

#[test]
fn a_plugin_that_a_sidecar_cannot_run_is_told_with_its_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("sidecar.yaml");
    for (meta, code) in [("", 1), ("_meta: {placement: edge}", 0), ("_meta: {disable: true}", 0)] {
        let text = format!(
            "trust_domain: mesh.local\nca: {{files: {{cert: a, key: b, trust: c}}}}\nworkload: {{service: orders}}\n\
             services:\n  - name: payments\n    upstream: {{type: roundrobin, nodes: {{\"127.0.0.1:1\": 1}}}}\n    \
             plugins: {{key-auth: {{{meta}}}}}\n"
        );
        std::fs::write(&file, text).expect("a file");
        let (ended, _, err) = e2e::edge::run(&["sidecar", "check", "-c", file.to_str().expect("text")]);
        assert_eq!(ended, code, "{meta}: {err}");
        assert_eq!(err.contains("sidecar.yaml:7:"), code == 1, "{meta}: {err}");
    }
}

#[tokio::test]
async fn bytes_go_to_another_node_where_the_first_does_not_take_them() {
    let (mesh, gone) = (Mesh::new(), Port::free());
    let origin = Origin::tcp(|mut stream, _| async move {
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"220 ready\r\n").await;
    })
    .await;
    let callee = mesh.sidecar("payments").inbound(origin.addr, json!({"protocol": "tcp"})).start().await;
    let at = callee.inbound(0);
    let node = json!({"host": at.ip().to_string(), "port": at.port(), "weight": 1});
    let nodes = json!([nobody(&gone, 0), node]);
    let sidecar = caller(&mesh, nodes, json!({}), json!({"protocol": "tcp"})).await;
    for _ in 0..4 {
        let mut stream = e2e::client::connect(sidecar.listener(0)).await;
        let mut greeting = [0; 11];
        timeout(DEADLINE, stream.read_exact(&mut greeting)).await.expect("in time").expect("a greeting");
        assert_eq!(&greeting, b"220 ready\r\n");
    }
}
