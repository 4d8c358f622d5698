//! Upstreams that find their nodes in a registry, by the simplest one there is: a file.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use e2e::client::{Call, Connection};
use e2e::edge::run;
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};

/// A file of services that the test writes, whole and at once.
struct Services {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Services {
    fn new(services: &Value) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("services.json");
        let services_file = Self { _dir: dir, path };
        services_file.write(services);
        services_file
    }

    fn write(&self, services: &Value) {
        let next = self.path.with_extension("next");
        std::fs::write(&next, services.to_string()).expect("a written file");
        std::fs::rename(&next, &self.path).expect("a renamed file");
    }

    fn settings(&self) -> Value {
        json!({"discovery": {"file": {"path": self.path}}, "postern": {"locality": {"zone": "a"}}})
    }

    async fn edge(&self, upstream: Value) -> Edge {
        let mut whole = json!({"type": "roundrobin", "service_name": "shop", "discovery_type": "file"});
        whole.as_object_mut().expect("fields").extend(upstream.as_object().expect("fields").clone());
        Edge::file()
            .config(self.settings())
            .route(json!({"id": "r", "uri": "/*", "upstream": whole}))
            .start()
            .await
    }
}

fn instance(origin: &Origin, fields: Value) -> Value {
    let mut instance = json!({"host": "127.0.0.1", "port": origin.addr.port()});
    instance.as_object_mut().expect("fields").extend(fields.as_object().expect("fields").clone());
    instance
}

async fn names(connection: &mut Connection, count: usize) -> Vec<String> {
    let mut names = Vec::new();
    for _ in 0..count {
        let answer = connection.send(Call::get("/")).await.expect_status(200);
        names.push(answer.header("x-origin").expect("the name of the origin").to_owned());
    }
    names.sort();
    names.dedup();
    names
}

/// Waits until exactly these origins serve, with no request that fails on the way.
async fn until_served_by(edge: &Edge, wanted: &[&str]) {
    let mut connection = edge.connect().await;
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let names = names(&mut connection, 8).await;
        if names == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{names:?} serve, and not {wanted:?}");
    }
}

#[tokio::test]
async fn endpoints_come_and_go_drain_and_fail_without_a_failed_request() {
    let (one, two) = (echo::named("one").await, echo::named("two").await);
    let services = Services::new(&json!({"shop": [instance(&one, json!({}))]}));
    let edge = services.edge(json!({})).await;
    until_served_by(&edge, &["one"]).await;
    let both = |health: &str| json!({"shop": [instance(&one, json!({})), instance(&two, json!({"health": health}))]});
    for (health, serving) in [
        ("healthy", &["one", "two"][..]),
        ("draining", &["one"]),
        ("warning", &["one", "two"]),
        ("unhealthy", &["one"]),
        ("healthy", &["one", "two"]),
    ] {
        services.write(&both(health));
        until_served_by(&edge, serving).await;
    }
    services.write(&json!({"shop": [instance(&two, json!({}))]}));
    until_served_by(&edge, &["two"]).await;
}

#[tokio::test]
async fn all_are_used_when_too_few_are_healthy() {
    let (one, two) = (echo::named("one").await, echo::named("two").await);
    let listed = |health: &str| {
        json!({"shop": [
            instance(&one, json!({})), instance(&two, json!({"health": health})),
        ]})
    };
    let services = Services::new(&listed("healthy"));
    let edge = services.edge(json!({"panic_threshold": 60})).await;
    until_served_by(&edge, &["one", "two"]).await;
    services.write(&listed("unhealthy"));
    eventually("panic is told", || async {
        let told = edge.call_control("/v1/endpoints/shop").await.expect_status(200).json();
        (told["upstreams"][0]["panic"] == true).then_some(())
    })
    .await;
    until_served_by(&edge, &["one", "two"]).await;
    services.write(&listed("draining"));
    until_served_by(&edge, &["one"]).await;
}

#[tokio::test]
async fn near_ones_are_used_first() {
    let (near, far) = (echo::named("near").await, echo::named("far").await);
    let listed = |health: &str| {
        json!({"shop": [
            instance(&far, json!({"details": {"zone": "b"}})),
            instance(&near, json!({"details": {"zone": "a"}, "health": health})),
        ]})
    };
    let services = Services::new(&listed("healthy"));
    let edge = services.edge(json!({"locality": {"prefer": "zone"}})).await;
    until_served_by(&edge, &["near"]).await;
    let told = edge.call_control("/v1/endpoints/routes/r").await.expect_status(200).json();
    let verdicts: Vec<_> = told["upstreams"][0]["endpoints"]
        .as_array()
        .expect("endpoints")
        .iter()
        .map(|endpoint| (endpoint["zone"].clone(), endpoint["verdict"].clone()))
        .collect();
    assert!(verdicts.contains(&(json!("a"), json!("used"))), "{told}");
    assert!(verdicts.contains(&(json!("b"), json!("standby"))), "{told}");
    services.write(&listed("unhealthy"));
    until_served_by(&edge, &["far"]).await;
}

#[tokio::test]
async fn traffic_returns_to_a_better_priority_after_the_delay() {
    let (best, spare) = (echo::named("best").await, echo::named("spare").await);
    let listed = |health: &str| {
        json!({"shop": [
            instance(&best, json!({"priority": 1, "health": health})), instance(&spare, json!({"priority": 0})),
        ]})
    };
    let services = Services::new(&listed("healthy"));
    let edge = services.edge(json!({"failover": {"delay": 2}})).await;
    until_served_by(&edge, &["best"]).await;
    services.write(&listed("unhealthy"));
    until_served_by(&edge, &["spare"]).await;
    let back = Instant::now();
    services.write(&listed("healthy"));
    eventually("it is held back", || async {
        let told = edge.call_control("/v1/endpoints/shop").await.expect_status(200).json();
        let endpoints = told["upstreams"][0]["endpoints"].as_array().expect("endpoints").clone();
        let held = |endpoint: &Value| endpoint["why"].as_str().is_some_and(|why| why.contains("held back"));
        endpoints.iter().any(held).then_some(())
    })
    .await;
    until_served_by(&edge, &["best"]).await;
    assert!(back.elapsed() >= Duration::from_secs(2), "not before the delay: {:?}", back.elapsed());
}

#[tokio::test]
async fn a_service_without_endpoints_is_503_with_the_reason() {
    let origin = echo::named("one").await;
    let services = Services::new(&json!({}));
    let edge = services.edge(json!({})).await;
    let answer = edge.get("/").await.expect_status(503);
    let status = answer.header("proxy-status").expect("a reason").to_owned();
    assert!(status.contains("no_nodes"), "{status}");
    services.write(&json!({"shop": [instance(&origin, json!({}))]}));
    edge.until_status("/", 200).await;
}

#[tokio::test]
async fn a_request_waits_for_a_registry_that_has_not_answered_and_not_for_ever() {
    // Accepts connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = format!("http://{}", silent.local_addr().expect("an address"));
    let edge = Edge::file()
        .config(json!({"discovery": {"nacos": {"host": [server]}}}))
        .route(json!({"id": "named", "uri": "/direct", "upstream": {
            "type": "roundrobin", "nodes": {"127.0.0.1:1": 1}, "retries": 0}}))
        .start()
        .await;
    edge.reload(&json!({"routes": [{"id": "r", "uri": "/*", "upstream": {
        "type": "roundrobin", "service_name": "shop", "discovery_type": "nacos"}}]}))
        .await;
    let begun = Instant::now();
    let answer = edge.get("/").await.expect_status(503);
    let status = answer.header("proxy-status").expect("a reason").to_owned();
    assert!(status.contains("discovery_pending") || status.contains("discovery_failed"), "{status}");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(6), "it waited {took:?}");
}

#[tokio::test]
async fn a_kind_that_is_not_configured_sets_the_upstream_aside_with_advice() {
    let services = Services::new(&json!({}));
    let edge = services.edge(json!({"discovery_type": "consul"})).await;
    edge.get("/").await.expect_status(503);
    let told = edge.call_control("/v1/rejected").await.expect_status(200).text();
    assert!(told.contains("add `discovery.consul` to config.yaml"), "{told}");
}

#[tokio::test]
async fn endpoints_are_told_by_the_command_and_asked_for_anew() {
    let one = echo::named("one").await;
    let services = Services::new(&json!({"shop": [instance(&one, json!({"details": {"zone": "a"}}))]}));
    let edge = services.edge(json!({})).await;
    until_served_by(&edge, &["one"]).await;
    let control = edge.control.to_string();
    let (code, out, err) = run(&["endpoints", "--control", &control]);
    assert!(code == 0 && out.contains("routes/r") && out.contains("1 used"), "{code} {out} {err}");
    let (code, out, err) = run(&["endpoints", "shop", "--control", &control]);
    for part in [one.node().as_str(), "used", "from file shop", "last changes"] {
        assert!(code == 0 && out.contains(part), "{part}: {code} {out} {err}");
    }
    let (code, out, err) = run(&["endpoints", "shop", "-o", "json", "--control", &control]);
    let told: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out} {err}"));
    let endpoint = &told["upstreams"][0]["endpoints"][0];
    assert_eq!((code, &endpoint["verdict"], &endpoint["staleness"]), (0, &json!("used"), &json!(0.0)));
    assert_eq!(endpoint["sources"][0]["kind"], "file");
    let (code, out, err) = run(&["endpoints", "refresh", "shop", "--control", &control]);
    assert_eq!((code, out.trim()), (0, "asked for shop"), "{err}");
    let (code, _, err) = run(&["endpoints", "cart", "--control", &control]);
    assert!(code == 3 && err.contains("no upstream has endpoints by the name cart"), "{code} {err}");

    // A question that waits is answered when something changes.
    let version = told["version"].as_str().expect("a version").to_owned();
    let path = format!("/v1/endpoints/shop?since={version}&wait=30");
    let (answer, ()) = tokio::join!(edge.call_control(&path), async { services.write(&json!({"shop": []})) });
    assert_ne!(answer.expect_status(200).json()["version"], json!(version));
    eventually("the command says that nothing serves", || async {
        let (code, _, _) = run(&["endpoints", "shop", "--control", &control]);
        (code == 1).then_some(())
    })
    .await;
    let dump = edge.call_control("/v1/discovery/file/dump").await.expect_status(200).json();
    assert!(dump["services"].get("shop").is_some(), "{dump}");
}
