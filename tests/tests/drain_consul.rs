//! A rolling deployment through a real Consul: each node is drained by the command before it is stopped.

use e2e::consul::{self, Consul};
use e2e::load::Load;
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};

const NODES: usize = 10;

/// An instance that is registered, and its id there.
async fn instance(consul: &Consul, number: usize, version: &str) -> (Origin, String) {
    let origin = echo::named(&format!("{version}-{number}")).await;
    let id = format!("orders-{version}-{number}");
    consul.register("orders", &id, origin.addr).await;
    (origin, id)
}

async fn registered(consul: &Consul) -> Vec<String> {
    let services = consul.get("/v1/agent/services").await.expect_status(200).json();
    services.as_object().expect("services by id").keys().cloned().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_nodes_are_replaced_one_by_one_and_nothing_is_lost() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let mut nodes = Vec::new();
    for number in 0..NODES {
        nodes.push(instance(&consul, number, "v1").await);
    }
    let upstream = json!({"type": "roundrobin", "service_name": "orders", "discovery_type": "consul"});
    let edge = Edge::file()
        .config(json!({"discovery": {"consul": {"servers": [consul.url()]}}}))
        .route(json!({"id": "r", "uri": "/*", "upstream": upstream}))
        .start()
        .await;
    edge.until_status("/", 200).await;
    let load = Load::start(edge.http, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, 20, 500);
    for number in 0..NODES {
        let (old, id) = nodes.remove(0);
        let target = format!("orders/{}", old.node());
        let (code, view, err) = edge.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
        assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
        let told = view["registries"][0]["instance"].as_str().unwrap_or_default();
        assert!(told.ends_with(&format!("/{id}")), "the id at its node: {view}");
        assert!(
            !registered(&consul).await.contains(&id),
            "it is out of the registry when the command returns"
        );
        let served = old.requests();
        let (new, id) = instance(&consul, number, "v2").await;
        eventually("the new node is used", || async { (new.requests() > 0).then_some(()) }).await;
        assert_eq!(old.requests(), served, "a node that may be stopped gets nothing");
        old.stop().await;
        nodes.push((new, id));
    }
    load.finish_after(500).await.expect_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn maintenance_begins_with_the_drain_and_ends_with_its_undoing() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let nodes = [instance(&consul, 0, "v1").await, instance(&consul, 1, "v1").await];
    let upstream =
        json!({"id": "shop", "type": "roundrobin", "service_name": "orders", "discovery_type": "consul"});
    let edge = Edge::file()
        .config(json!({"discovery": {"consul": {"servers": [consul.url()]}}}))
        .resource("upstreams", upstream)
        .route(json!({"id": "r", "uri": "/*", "upstream_id": "shop"}))
        .start()
        .await;
    edge.until_status("/", 200).await;
    let in_maintenance = || async {
        let checks = consul.get("/v1/agent/checks").await.expect_status(200).json();
        checks
            .as_object()
            .is_some_and(|checks| checks.keys().any(|id| id.starts_with("_service_maintenance")))
    };
    // By the id of the upstream: its services are those that the registry is told of.
    let target = format!("shop/{}", nodes[0].0.node());
    let (code, view, err) = edge.command("drain", &[&target, "--wait", "--registry", "maintenance"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    assert!(in_maintenance().await);
    let served = nodes[0].0.requests();
    for _ in 0..10 {
        edge.get("/").await.expect_status(200);
    }
    assert_eq!(nodes[0].0.requests(), served);
    let (code, _, err) = edge.command("drain", &["--undo", &target]).await;
    assert_eq!(code, 0, "{err}");
    assert!(!in_maintenance().await);
    eventually("it is used again", || async {
        edge.get("/").await;
        (nodes[0].0.requests() > served).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_cannot_be_told_is_named_and_told_when_it_is_back() {
    if !consul::is_there() {
        return;
    }
    let mut consul = Consul::start().await;
    let nodes = [instance(&consul, 0, "v1").await, instance(&consul, 1, "v1").await];
    let upstream = json!({"type": "roundrobin", "service_name": "orders", "discovery_type": "consul"});
    let edge = Edge::file()
        .config(json!({"discovery": {"consul": {"servers": [consul.url()]}}}))
        .route(json!({"id": "r", "uri": "/*", "upstream": upstream}))
        .start()
        .await;
    edge.until_status("/", 200).await;
    consul.kill();
    let target = format!("orders/{}", nodes[0].0.node());
    let (code, view, err) = edge.command("drain", &[&target, "--wait", "--timeout", "2"]).await;
    assert_eq!((code, &view["stage"]), (1, &json!("confirming")), "{view} {err}");
    assert!(view["registries"][0]["why"].as_str().is_some_and(|why| !why.is_empty()), "{view}");
    assert_eq!(view["observers"][0]["confirmed"], true, "the gateway does not choose it: {view}");
    let served = nodes[0].0.requests();
    for _ in 0..10 {
        edge.get("/").await.expect_status(200);
    }
    assert_eq!(nodes[0].0.requests(), served);
    consul.start_again().await;
    let (code, view, err) = edge.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
}

/// A gateway whose route has the nodes of `orders`.
async fn gateway(consul: &Consul) -> Edge {
    let upstream = json!({"type": "roundrobin", "service_name": "orders", "discovery_type": "consul"});
    let edge = Edge::file()
        .config(json!({"discovery": {"consul": {"servers": [consul.url()]}}}))
        .route(json!({"id": "r", "uri": "/*", "upstream": upstream}))
        .start()
        .await;
    edge.until_status("/", 200).await;
    edge
}

async fn drains(edge: &Edge) -> Value {
    edge.call_control("/v1/drains").await.expect_status(200).json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_node_is_used_again_however_soon_it_is_back() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let (origin, id) = instance(&consul, 0, "v1").await;
    let edge = gateway(&consul).await;
    for _ in 0..3 {
        let target = format!("orders/{}", origin.node());
        let (code, view, err) = edge.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
        assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
        consul.register("orders", &id, origin.addr).await;
        eventually("it is used again", || async { (edge.get("/").await.status == 200).then_some(()) }).await;
        assert_eq!(drains(&edge).await, json!([]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_takes_nobody_out_who_has_come_back_meanwhile() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let nodes = [instance(&consul, 0, "v1").await, instance(&consul, 1, "v1").await];
    let mut edge = gateway(&consul).await;
    let target = format!("orders/{}", nodes[0].0.node());
    let (code, view, err) = edge.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    eventually("it is gone", || async { (drains(&edge).await[0]["gone"] == true).then_some(()) }).await;
    edge.terminate().await;
    consul.register("orders", &nodes[0].1, nodes[0].0.addr).await;
    let served = nodes[0].0.requests();
    edge.start_again().await;
    eventually("it is used again", || async {
        edge.get("/").await;
        (nodes[0].0.requests() > served && drains(&edge).await == json!([])).then_some(())
    })
    .await;
    assert!(registered(&consul).await.contains(&nodes[0].1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_was_left_alone_is_told_when_the_order_says_so() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let nodes = [instance(&consul, 0, "v1").await, instance(&consul, 1, "v1").await];
    let edge = gateway(&consul).await;
    let target = format!("orders/{}", nodes[0].0.node());
    let (code, ..) = edge.command("drain", &[&target, "--wait", "--registry", "keep"]).await;
    assert_eq!(code, 0);
    assert!(registered(&consul).await.contains(&nodes[0].1));
    let (code, view, err) = edge.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    assert!(!registered(&consul).await.contains(&nodes[0].1), "{view}");
}
