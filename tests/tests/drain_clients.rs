//! `postern drain` among gateways that know of each other only by the discovery server that all of them ask.

use e2e::consul::{self, Consul};
use e2e::discovery_server::DiscoveryServer;
use e2e::load::Load;
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// A registry that can be told nothing: a file.
struct Services {
    folder: TempDir,
}

impl Services {
    fn of(origins: &[Origin]) -> Services {
        let services = Services { folder: tempfile::tempdir().expect("a folder") };
        services.list(origins);
        services
    }

    fn list(&self, origins: &[Origin]) {
        let nodes: Vec<Value> =
            origins.iter().map(|origin| json!({"host": "127.0.0.1", "port": origin.addr.port()})).collect();
        let new = self.folder.path().join("new");
        std::fs::write(&new, json!({ "shop": nodes }).to_string()).expect("a file");
        std::fs::rename(new, self.path()).expect("a file");
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("services.json")
    }

    fn settings(&self) -> Value {
        json!({"file": {"path": self.path()}})
    }
}

/// A gateway that finds `shop` by the server alone.
async fn edge(id: &str, server: &DiscoveryServer, kind: &str) -> Edge {
    let upstream =
        json!({"type": "roundrobin", "service_name": "shop", "discovery_type": kind, "retries": 0});
    let edge = Edge::file()
        .config(json!({
            "apisix": {"id": id},
            "discovery": {"postern": {"servers": [server.addr.to_string()], "kinds": [kind]}},
        }))
        .route(json!({"id": "r", "uri": "/*", "upstream": upstream}))
        .start()
        .await;
    edge.until_status("/", 200).await;
    edge
}

async fn serves(edges: &[&Edge]) {
    for edge in edges {
        for _ in 0..10 {
            edge.get("/").await.expect_status(200);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_client_of_the_server_confirms_and_the_one_that_does_not_is_named() {
    let origins = [echo::named("one").await, echo::named("two").await, echo::named("three").await];
    let services = Services::of(&origins);
    let server = DiscoveryServer::start(services.settings(), json!({"drains": true})).await;
    let (first, second) = (edge("first", &server, "file").await, edge("second", &server, "file").await);
    let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let loads = [&first, &second].map(|edge| Load::start(edge.http, request, 200, 10, 250));
    let target = format!("shop/{}", origins[0].node());
    let (code, view, err) = first.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    let served = origins[0].requests();
    serves(&[&first, &second]).await;
    for load in loads {
        load.finish().await.expect_no_failure();
    }
    assert_eq!(origins[0].requests(), served, "neither of them uses it");

    let (code, _, err) = first.command("drain", &["--undo", &target]).await;
    assert_eq!(code, 0, "{err}");
    eventually("the other one uses it again", || async {
        second.get("/").await;
        (origins[0].requests() > served).then_some(())
    })
    .await;

    second.signal(Signal::SIGSTOP);
    let target = format!("shop/{}", origins[1].node());
    let (code, view, err) = first.command("drain", &[&target, "--wait", "--timeout", "2"]).await;
    second.signal(Signal::SIGCONT);
    assert_eq!((code, &view["stage"]), (1, &json!("confirming")), "{view} {err}");
    let observers = view["observers"].as_array().expect("a list");
    let late: Vec<_> = observers.iter().filter(|one| one["confirmed"] == false).collect();
    assert_eq!(late.len(), 1, "{view}");
    assert_eq!(late[0]["name"], "second", "{view}");
    assert!(late[0]["problem"].as_str().is_some_and(|why| why.contains("has not confirmed")), "{view}");
    let (code, view, err) = first.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "it went on and confirmed: {view} {err}");
    let served = origins[1].requests();
    serves(&[&first, &second]).await;
    assert_eq!(origins[1].requests(), served);

    // It leaves and comes back as a new one.
    services.list(&origins[..1]);
    eventually("it is gone", || async {
        (first.call_control("/v1/drains").await.json()[0]["gone"] == true).then_some(())
    })
    .await;
    services.list(&origins[..2]);
    eventually("both use it again", || async {
        serves(&[&second]).await;
        let drains = first.call_control("/v1/drains").await.json();
        (drains == json!([]) && origins[1].requests() > served).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lets_nobody_drain_says_who_still_uses_the_node() {
    let origins = [echo::start().await, echo::start().await];
    let services = Services::of(&origins);
    let mut server = DiscoveryServer::start(services.settings(), json!({})).await;
    let (first, second) = (edge("first", &server, "file").await, edge("second", &server, "file").await);
    let target = format!("shop/{}", origins[0].node());
    let refused = |view: &Value| {
        let observers = view["observers"].as_array().cloned().unwrap_or_default();
        let told = |name: &str, why: &str| {
            let is_it = |one: &&Value| one["name"].as_str().is_some_and(|own| own.contains(name));
            let problem = observers.iter().find(is_it).and_then(|one| one["problem"].as_str());
            problem.is_some_and(|problem| problem.contains(why))
        };
        told("second", "still offered") && told("discovery server", "postern.discovery_server.drains")
    };
    let (code, view, err) = first.command("drain", &[&target]).await;
    assert_eq!(code, 0, "{view} {err}");
    let path = format!("/v1/drains/{}", view["id"].as_str().expect("an id"));
    eventually("it is told who still uses the node, and what to do", || async {
        refused(&first.call_control(&path).await.json()).then_some(())
    })
    .await;
    // Whoever keeps the registry takes it out.
    services.list(&origins[1..]);
    let (code, view, err) = first.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    let served = origins[0].requests();
    serves(&[&first, &second]).await;
    assert_eq!(origins[0].requests(), served);

    server.kill();
    eventually("nothing is certain without the server", || async {
        let view = first.call_control(&path).await.json();
        let problem = view["observers"][1]["problem"].as_str().unwrap_or_default().to_owned();
        (view["stage"] == "confirming" && !problem.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_registry_is_told_by_the_server() {
    if !consul::is_there() {
        return;
    }
    let origins = [echo::start().await, echo::start().await];
    let consul = Consul::start().await;
    for (number, origin) in origins.iter().enumerate() {
        consul.register("shop", &format!("shop-{number}"), origin.addr).await;
    }
    let registered = || async {
        let services = consul.get("/v1/agent/services").await.expect_status(200).json();
        services.as_object().map(serde_json::Map::len)
    };
    let discovery = json!({"consul": {"servers": [consul.url()]}});
    let server = DiscoveryServer::start(discovery, json!({"drains": true})).await;
    let (first, second) = (edge("first", &server, "consul").await, edge("second", &server, "consul").await);
    assert_eq!(registered().await, Some(2));
    let target = format!("shop/{}", origins[0].node());
    let (code, view, err) = first.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    assert_eq!(view["registries"][0]["done"], true, "{view}");
    assert_eq!(registered().await, Some(1), "it is out of the registry when the command returns");
    let served = origins[0].requests();
    serves(&[&first, &second]).await;
    assert_eq!(origins[0].requests(), served);
}
