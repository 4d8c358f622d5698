//! `postern drain`: nothing is lost when a node is taken out, and the command returns when it may be stopped.

use std::net::IpAddr;

use discovery::dns::hostile::{Behaviour, Server};
use e2e::client::Call;
use e2e::load::Load;
use e2e::origin::{Origin, echo, held};
use e2e::{Edge, Value, eventually, json};
use nix::sys::signal::Signal;

fn upstream(origins: &[Origin]) -> Value {
    let nodes: serde_json::Map<_, _> = origins.iter().map(|origin| (origin.node(), json!(1))).collect();
    json!({"type": "roundrobin", "nodes": nodes})
}

async fn edge_with(origins: &[Origin], config: Value) -> Edge {
    let mut upstream = upstream(origins);
    upstream["id"] = json!("shop");
    let builder = Edge::file().config(config).resource("upstreams", upstream);
    builder.route(json!({"id": "r", "uri": "/*", "upstream_id": "shop"})).start().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_that_drains_node_by_node_loses_nothing() {
    const NODES: usize = 10;
    let mut origins = Vec::new();
    for number in 0..NODES {
        origins.push(echo::named(&format!("old-{number}")).await);
    }
    let edge = edge_with(&origins, json!({})).await;
    let load = Load::start(edge.http, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, 20, 500);
    for index in 0..NODES {
        let old = origins.remove(index);
        let target = format!("shop/{}", old.node());
        let (code, view, err) = edge.command("drain", &[&target, "--wait", "--timeout", "20"]).await;
        assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
        let served = old.requests();
        let before: usize = origins.iter().map(Origin::requests).sum();
        eventually("fifty more requests are served", || async {
            (origins.iter().map(Origin::requests).sum::<usize>() >= before + 50).then_some(())
        })
        .await;
        assert_eq!(old.requests(), served, "a node that may be stopped gets nothing");
        let addr = old.stop().await;
        let new = echo::named_at(addr, &format!("new-{index}")).await;
        let (code, ..) = edge.command("drain", &["--undo", &target]).await;
        assert_eq!(code, 0);
        eventually("the new one is used", || async { (new.requests() > 0).then_some(()) }).await;
        origins.insert(index, new);
    }
    let account = load.finish_after(500).await;
    assert!(account.bad.is_empty() && account.died == 0, "{:?}", &account.bad[..account.bad.len().min(5)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_under_way_is_waited_for_and_counted() {
    let (slow, go) = held::start().await;
    let origins = [slow, echo::start().await];
    let edge = edge_with(&origins, json!({})).await;
    let http = edge.http;
    let calls: Vec<_> =
        (0..2).map(|_| tokio::spawn(async move { Call::get("/").send_to(http).await })).collect();
    eventually("one of them waits at the slow node", || async { (origins[0].requests() == 1).then_some(()) })
        .await;
    let target = format!("shop/{}", origins[0].node());
    let (code, view, err) = edge.command("drain", &[&target, "--wait", "--timeout", "1"]).await;
    assert_eq!((code, &view["stage"]), (1, &json!("in_flight")), "{view} {err}");
    assert_eq!(view["observers"][0]["in_flight"], 1, "{view}");
    assert!(err.contains("1 of 1 gateways confirmed, 1 request under way"), "{err}");
    for _ in 0..20 {
        edge.get("/").await.expect_status(200);
    }
    assert_eq!(origins[0].requests(), 1, "nothing new comes");
    go.send_replace(true);
    for call in calls {
        call.await.expect("a call").expect_status(200);
    }
    let (code, view, err) = edge.command("drain", &[&target, "--wait"]).await;
    assert_eq!(
        (code, &view["stage"]),
        (0, &json!("drained")),
        "the same order is the same drain: {view} {err}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_gateway_confirms_and_the_one_that_does_not_is_named() {
    let origins = [echo::start().await, echo::start().await];
    let second = edge_with(&origins, json!({"apisix": {"id": "second"}})).await;
    let peers = json!([second.control.to_string()]);
    let first = edge_with(&origins, json!({"apisix": {"id": "first"}, "postern": {"peers": peers}})).await;
    let target = format!("shop/{}", origins[0].node());
    let (code, view, err) =
        first.command("drain", &[&target, "--wait", "--timeout", "20", "--reason", "an upgrade"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    let names: Vec<_> =
        view["observers"].as_array().expect("a list").iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["first", "second"]);
    for edge in [&first, &second] {
        let served = origins[0].requests();
        for _ in 0..10 {
            edge.get("/").await.expect_status(200);
        }
        assert_eq!(origins[0].requests(), served, "neither uses it");
    }
    let (code, ..) = first.command("drain", &["--undo", &target]).await;
    assert_eq!(code, 0);
    let list = second.call_control("/v1/drains").await.expect_status(200);
    assert_eq!(list.json(), json!([]), "the other one uses it again too");

    second.signal(Signal::SIGSTOP);
    let (code, view, err) = first.command("drain", &[&target, "--wait", "--timeout", "1"]).await;
    second.signal(Signal::SIGCONT);
    assert_eq!((code, &view["stage"]), (1, &json!("confirming")), "{view} {err}");
    let late = &view["observers"][1];
    assert!(late["name"].as_str().is_some_and(|name| name.contains(&second.control.to_string())), "{view}");
    assert!(late["problem"].as_str().is_some_and(|why| why.contains("no answer")), "{view}");
    let (code, view, err) = first.command("drain", &[&target, "--wait", "--timeout", "20"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "it came back and confirmed: {view} {err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_is_undone_at_any_gateway() {
    let origins = [echo::start().await, echo::start().await];
    let second = edge_with(&origins, json!({"apisix": {"id": "second"}})).await;
    let peers = json!([second.control.to_string()]);
    let first = edge_with(&origins, json!({"apisix": {"id": "first"}, "postern": {"peers": peers}})).await;
    let target = format!("shop/{}", origins[0].node());
    let (code, ..) = first.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!(code, 0);
    let (code, _, err) = second.command("drain", &["--undo", &target]).await;
    assert_eq!(code, 0, "{err}");
    // The one that leads asks the other how it stands, and does not tell it again.
    for edge in [&first, &second] {
        eventually("nothing is drained", || async {
            (edge.call_control("/v1/drains").await.json() == json!([])).then_some(())
        })
        .await;
    }
    for edge in [&first, &second] {
        let served = origins[0].requests();
        for _ in 0..10 {
            edge.get("/").await.expect_status(200);
        }
        assert!(origins[0].requests() > served, "it is used again");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_outlives_the_process_and_an_edit() {
    let origins = [echo::start().await, echo::start().await];
    let mut edge = edge_with(&origins, json!({})).await;
    let target = format!("shop/{}", origins[0].node());
    let (code, ..) = edge.command("drain", &[&target, "--wait"]).await;
    assert_eq!(code, 0);
    let served = origins[0].requests();
    edge.start_again().await;
    for _ in 0..10 {
        edge.get("/").await.expect_status(200);
    }
    let mut other = upstream(&origins);
    other["id"] = json!("shop");
    other["retries"] = json!(1);
    let route = json!({"id": "r", "uri": "/*", "upstream_id": "shop"});
    edge.reload(&json!({"upstreams": [other], "routes": [route]})).await;
    for _ in 0..10 {
        edge.get("/").await.expect_status(200);
    }
    assert_eq!(origins[0].requests(), served);
    let listed = edge.call_control("/v1/drains").await.expect_status(200).json();
    assert_eq!(listed[0]["node"], origins[0].node());
    let shown = edge.call_control("/v1/endpoints/shop").await.expect_status(200);
    assert!(shown.text().contains(r#""verdict":"draining""#), "{}", shown.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_outlives_a_start_at_which_the_node_is_not_known_yet() {
    let server = Server::start().await;
    server.addresses("host.test", 0, [IpAddr::from([127, 0, 0, 1])]);
    server.behave(Behaviour::Well);
    let origins = [echo::start().await, echo::start().await];
    let named = format!("host.test:{}", origins[0].addr.port());
    let mut edge = Edge::file()
        .config(json!({"apisix": {"dns_resolver": [server.addr.to_string()], "resolver_timeout": 1}}))
        .resource(
            "upstreams",
            json!({"id": "shop", "type": "roundrobin", "nodes": {&named: 1, origins[1].node(): 1}}),
        )
        .route(json!({"id": "r", "uri": "/*", "upstream_id": "shop"}))
        .start()
        .await;
    let (code, view, err) = edge.command("drain", &[&format!("shop/{named}"), "--wait"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    let served = origins[0].requests();
    server.behave(Behaviour::Silence);
    edge.start_again().await;
    edge.until_status("/", 200).await;
    let asked = server.questions().len();
    eventually("the name was asked for in vain", || async {
        (server.questions().len() > asked + 2).then_some(())
    })
    .await;
    server.behave(Behaviour::Well);
    eventually("the name is known", || async {
        let shown = edge.call_control("/v1/endpoints/shop").await.expect_status(200).text();
        shown.contains(&origins[0].node()).then_some(())
    })
    .await;
    // One round of whoever looks after drains.
    let listed = edge.call_control("/v1/drains").await.expect_status(200).json();
    assert_eq!(listed[0]["node"], named);
    for _ in 0..20 {
        edge.get("/").await.expect_status(200);
    }
    assert_eq!(origins[0].requests(), served, "it is drained still");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_is_over_is_over_everywhere() {
    let origins = [echo::start().await, echo::start().await];
    // The node stands in the configuration of this one, and never leaves it.
    let second = edge_with(&origins, json!({"apisix": {"id": "second"}})).await;
    let peers = json!([second.control.to_string()]);
    let first = Edge::embedded()
        .config(json!({"apisix": {"id": "first"}, "postern": {"peers": peers}}))
        .start()
        .await;
    first.put("upstreams/shop", upstream(&origins)).await;
    first.put("routes/r", json!({"uri": "/*", "upstream_id": "shop"})).await;
    first.until_status("/", 200).await;
    let target = format!("shop/{}", origins[0].node());
    let (code, view, err) = first.command("drain", &[&target, "--wait", "--timeout", "30"]).await;
    assert_eq!((code, &view["stage"]), (0, &json!("drained")), "{view} {err}");
    let drains = async |edge: &Edge| edge.call_control("/v1/drains").await.expect_status(200).json();
    assert_eq!(drains(&second).await[0]["node"], origins[0].node());
    first.put("upstreams/shop", upstream(&origins[1..])).await;
    eventually("the node is gone", || async { (drains(&first).await[0]["gone"] == true).then_some(()) })
        .await;
    first.put("upstreams/shop", upstream(&origins)).await;
    eventually("both use it again", || async {
        (drains(&first).await == json!([]) && drains(&second).await == json!([])).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_leaves_and_comes_back_is_a_new_one() {
    let origins = [echo::start().await, echo::start().await];
    let edge = Edge::embedded().start().await;
    edge.put("upstreams/shop", upstream(&origins)).await;
    edge.put("routes/r", json!({"uri": "/*", "upstream_id": "shop"})).await;
    edge.until_status("/", 200).await;
    let (code, ..) = edge.command("drain", &[&format!("shop/{}", origins[0].node()), "--wait"]).await;
    assert_eq!(code, 0);
    edge.put("upstreams/shop", upstream(&origins[1..])).await;
    // What comes back before it was seen to be gone is the same node.
    eventually("the node is gone", || async {
        (edge.call_control("/v1/drains").await.json()[0]["gone"] == true).then_some(())
    })
    .await;
    edge.put("upstreams/shop", upstream(&origins)).await;
    eventually("it is used again", || async {
        edge.get("/").await;
        let drains = edge.call_control("/v1/drains").await;
        (drains.json() == json!([]) && origins[0].requests() > 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_names_nothing_is_refused_with_what_there_is() {
    let origins = [echo::start().await];
    let edge = edge_with(&origins, json!({})).await;
    let node = origins[0].node();
    let cases = [
        ("nobody/10.0.0.1:80", "no upstream here has nodes from `nobody`".to_owned()),
        ("shop/10.0.0.1:80", format!("`shop` has no node `10.0.0.1:80`; it has {node}")),
        ("shop//a:b", "names no node: write its address".to_owned()),
        ("*", "name the node".to_owned()),
    ];
    for (target, said) in cases {
        let (code, _, err) = edge.command("drain", &[target]).await;
        assert_eq!(code, 3, "{target}");
        assert!(err.contains(&said), "{target}: {err}");
    }
    let (code, _, err) = edge.command("drain", &["--undo", "shop"]).await;
    assert_eq!(code, 3);
    assert!(err.contains("shop is not drained"), "{err}");
    let (code, view, _) = edge.command("drain", &[&format!("*/{node}")]).await;
    assert_eq!((code, view["observers"][0]["nodes"].clone()), (0, json!([node])), "whoever has it: {view}");
}
