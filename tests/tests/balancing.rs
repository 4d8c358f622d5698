//! How requests are spread over the nodes of an upstream.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use e2e::client::{Call, Connection};
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};
use http::Response;

/// The origins that served these calls, in order, over one connection.
async fn served(edge: &Edge, calls: impl IntoIterator<Item = Call>) -> Vec<String> {
    let mut connection = edge.connect().await;
    let mut names = Vec::new();
    for call in calls {
        let answer = connection.send(call).await.expect_status(200);
        names.push(answer.header("x-origin").expect("the name of the origin").to_owned());
    }
    names
}

fn counts(names: &[String]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name.as_str()).or_default() += 1;
    }
    counts
}

async fn one_route(upstream: Value) -> Edge {
    Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": upstream})).start().await
}

fn gets(count: usize) -> impl Iterator<Item = Call> {
    std::iter::repeat_with(|| Call::get("/")).take(count)
}

#[tokio::test]
async fn weights_three_to_one_hold_in_every_window_of_four() {
    let (heavy, light) = (echo::named("heavy").await, echo::named("light").await);
    let edge = one_route(json!({"type": "roundrobin", "nodes": {heavy.node(): 3, light.node(): 1}})).await;
    let names = served(&edge, gets(200)).await;
    for (start, window) in names.windows(4).enumerate() {
        let heavy = window.iter().filter(|name| *name == "heavy").count();
        assert_eq!(heavy, 3, "the window at {start}: {window:?}");
    }
}

#[tokio::test]
async fn a_node_of_weight_zero_gets_nothing() {
    let (used, unused) = (echo::named("used").await, echo::named("unused").await);
    let edge = one_route(json!({"type": "roundrobin", "nodes": {used.node(): 1, unused.node(): 0}})).await;
    served(&edge, gets(50)).await;
    assert_eq!((used.requests(), unused.requests()), (50, 0));
}

#[tokio::test]
async fn a_changed_weight_takes_effect_at_once() {
    let (left, right) = (echo::named("left").await, echo::named("right").await);
    let edge = Edge::embedded().start().await;
    edge.put("upstreams/u", json!({"type": "roundrobin", "nodes": {left.node(): 1, right.node(): 0}})).await;
    edge.put("routes/r", json!({"uri": "/*", "upstream_id": "u"})).await;
    edge.until_status("/", 200).await;
    assert_eq!(counts(&served(&edge, gets(20)).await), BTreeMap::from([("left", 20)]));
    edge.patch("upstreams/u", json!({"nodes": {left.node(): 0, right.node(): 1}})).await;
    eventually("only the other node is used", || async {
        (served(&edge, gets(4)).await == ["right"; 4]).then_some(())
    })
    .await;
}

/// Ten origins and the nodes of an upstream with all of them.
async fn ten() -> (Vec<Origin>, Vec<Value>) {
    let mut origins = Vec::new();
    for number in 0..10 {
        origins.push(echo::named(&format!("node-{number}")).await);
    }
    let nodes = origins
        .iter()
        .map(|origin| json!({"host": "127.0.0.1", "port": origin.addr.port(), "weight": 1}))
        .collect();
    (origins, nodes)
}

fn keyed(count: usize) -> impl Iterator<Item = Call> {
    (0..count).map(|number| Call::get(&format!("/?user=u{number}")))
}

#[tokio::test]
async fn chash_keeps_its_node_and_moves_about_a_tenth_when_one_of_ten_goes() {
    const KEYS: usize = 1000;
    let (_origins, mut nodes) = ten().await;
    let upstream =
        |nodes: &[Value]| json!({"type": "chash", "hash_on": "vars", "key": "arg_user", "nodes": nodes});
    let edge =
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": upstream(&nodes)})).start().await;
    let before = served(&edge, keyed(KEYS)).await;
    assert_eq!(before, served(&edge, keyed(KEYS)).await, "the same key, the same node");
    for (name, count) in counts(&before) {
        assert!((40..=180).contains(&count), "{name} has {count} of {KEYS} keys");
    }
    nodes.remove(3);
    edge.reload(&json!({"routes": [{"id": "r", "uri": "/*", "upstream": upstream(&nodes)}]})).await;
    let after = served(&edge, keyed(KEYS)).await;
    let gone = before.iter().filter(|name| *name == "node-3").count();
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    assert!(gone > 40, "the removed node had keys");
    assert!(moved <= gone + KEYS / 50, "{moved} of {KEYS} keys moved, {gone} had to");
}

#[tokio::test]
async fn chash_hashes_on_headers_cookies_and_consumers() {
    let (_origins, nodes) = ten().await;
    let upstream = |fields: Value| {
        let mut upstream = json!({"type": "chash", "nodes": nodes});
        for (name, value) in fields.as_object().expect("fields") {
            upstream[name] = value.clone();
        }
        upstream
    };
    let edge = Edge::file()
        .route(json!({"id": "h", "uri": "/header", "upstream":
                      upstream(json!({"hash_on": "header", "key": "X-User"}))}))
        .route(json!({"id": "c", "uri": "/cookie", "upstream":
                      upstream(json!({"hash_on": "cookie", "key": "session"}))}))
        .route(json!({"id": "v", "uri": "/combination", "upstream":
                      upstream(json!({"hash_on": "vars_combinations", "key": "$arg_a-$http_x_b"}))}))
        .route(json!({"id": "u", "uri": "/consumer", "plugins": {"key-auth": {}}, "upstream":
                      upstream(json!({"hash_on": "consumer"}))}))
        .resource("consumers", json!({"username": "ann", "plugins": {"key-auth": {"key": "a"}}}))
        .resource("consumers", json!({"username": "bob", "plugins": {"key-auth": {"key": "b"}}}))
        .start()
        .await;
    type Make = fn(usize) -> Call;
    let sources: [(&str, Make); 3] = [
        ("header", |n| Call::get("/header").header("x-user", &format!("u{n}"))),
        ("cookie", |n| Call::get("/cookie").header("cookie", &format!("a=1; session=s{n}"))),
        ("combination", |n| Call::get(&format!("/combination?a={n}")).header("x-b", &n.to_string())),
    ];
    for (name, make) in sources {
        let first = served(&edge, (0..40).map(make)).await;
        assert_eq!(first, served(&edge, (0..40).map(make)).await, "{name}: the same key, the same node");
        assert!(counts(&first).len() > 4, "{name}: forty keys are on several nodes: {first:?}");
    }
    for key in ["a", "b"] {
        let calls = std::iter::repeat_with(|| Call::get("/consumer").header("apikey", key)).take(10);
        assert_eq!(counts(&served(&edge, calls).await).len(), 1, "one consumer, one node");
    }
}

/// An origin that holds each request for `time` and knows how many it has held at once.
async fn holding(name: &'static str, time: Duration) -> (Origin, Arc<AtomicUsize>) {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let highest = Arc::clone(&most);
    let origin = Origin::http(move |_| {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            tokio::time::sleep(time).await;
            now.fetch_sub(1, Ordering::Relaxed);
            Response::builder().header("x-origin", name).body(Bytes::new()).expect("an answer")
        }
    })
    .await;
    (origin, highest)
}

#[tokio::test]
async fn least_conn_spares_the_node_that_is_busy() {
    let (slow, _) = holding("slow", Duration::from_secs(20)).await;
    let (fast, _) = holding("fast", Duration::ZERO).await;
    let edge = one_route(json!({"type": "least_conn", "nodes": {slow.node(): 1, fast.node(): 1}})).await;
    // One request hangs on the slow node; until it is done every other one goes to the idle node.
    let mut waiting = Vec::new();
    for _ in 0..2 {
        let mut connection = edge.connect().await;
        waiting.push(tokio::spawn(async move { connection.try_send(Call::get("/")).await.is_ok() }));
    }
    eventually("the slow node is busy", || async { (slow.requests() == 1).then_some(()) }).await;
    assert_eq!(counts(&served(&edge, gets(30)).await), BTreeMap::from([("fast", 30)]));
    for task in waiting {
        task.abort();
    }
}

#[tokio::test]
async fn least_conn_weighs_connections_by_weight() {
    let (heavy, most_heavy) = holding("heavy", Duration::from_millis(700)).await;
    let (light, most_light) = holding("light", Duration::from_millis(700)).await;
    let edge = one_route(json!({"type": "least_conn", "nodes": {heavy.node(): 3, light.node(): 1}})).await;
    let calls =
        (0..16).map(|_| async { Connection::http1(edge.http).await.send(Call::get("/")).await.status });
    assert!(futures_util::future::join_all(calls).await.iter().all(|status| *status == 200));
    let (heavy, light) = (most_heavy.load(Ordering::Relaxed), most_light.load(Ordering::Relaxed));
    assert!(heavy >= 10 && (2..=6).contains(&light), "of sixteen at once: {heavy} and {light}");
}

#[tokio::test]
async fn ewma_prefers_the_fast_node() {
    // Much slower than a busy machine makes the other one.
    let (slow, _) = holding("slow", Duration::from_secs(2)).await;
    let (fast, _) = holding("fast", Duration::ZERO).await;
    let edge = one_route(json!({"type": "ewma", "nodes": {slow.node(): 1, fast.node(): 1}})).await;
    let names = served(&edge, gets(100)).await;
    let fast = names.iter().filter(|name| *name == "fast").count();
    assert!(fast >= 80, "{fast} of 100 on the fast node");
}

#[tokio::test]
async fn nodes_of_lower_priority_wait_until_the_higher_are_gone() {
    let (first, second) = (echo::named("first").await, echo::named("second").await);
    let node = |origin: &Origin, priority: i32| json!({"host": "127.0.0.1", "port": origin.addr.port(), "weight": 1, "priority": priority});
    let upstream = json!({"type": "roundrobin", "nodes": [node(&second, -1), node(&first, 0)]});
    let edge = one_route(upstream).await;
    assert_eq!(counts(&served(&edge, gets(20)).await), BTreeMap::from([("first", 20)]));
    let addr = first.stop().await;
    // Each of these is a retry, and a quiet upstream has ten a second.
    assert_eq!(counts(&served(&edge, gets(5)).await), BTreeMap::from([("second", 5)]));
    let _first = echo::named_at(addr, "first").await;
    eventually("the higher priority is used again", || async {
        (served(&edge, gets(1)).await == ["first"]).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_domain_is_resolved_and_used() {
    let origin = echo::start().await;
    let node = json!([{"host": "localhost", "port": origin.addr.port(), "weight": 1}]);
    let edge = one_route(json!({"type": "roundrobin", "nodes": node})).await;
    edge.get("/").await.expect_status(200);
}

#[tokio::test]
async fn pass_host_decides_what_host_the_origin_sees() {
    let origin = echo::start().await;
    let upstream = |fields: Value| {
        let mut upstream = origin.upstream();
        for (name, value) in fields.as_object().expect("fields") {
            upstream[name] = value.clone();
        }
        upstream
    };
    let edge = Edge::file()
        .route(json!({"id": "1", "uri": "/pass", "upstream": upstream(json!({}))}))
        .route(json!({"id": "2", "uri": "/node", "upstream": upstream(json!({"pass_host": "node"}))}))
        .route(json!({"id": "3", "uri": "/rewrite", "upstream":
                      upstream(json!({"pass_host": "rewrite", "upstream_host": "inner.test"}))}))
        .start()
        .await;
    let node = origin.node();
    for (path, expected) in [("/pass", "outer.test"), ("/node", node.as_str()), ("/rewrite", "inner.test")] {
        let seen = edge.send(Call::get(path).header("host", "outer.test")).await.expect_status(200).json();
        assert_eq!(seen["headers"]["host"], json!([expected]), "{path}");
    }
}

#[tokio::test]
async fn connections_to_the_origin_are_kept_and_counted() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    served(&edge, gets(100)).await;
    assert_eq!(origin.connections(), 1, "a hundred requests one after the other need one connection");
}

#[tokio::test]
async fn a_pooled_connection_ends_after_its_number_of_requests() {
    let origin = echo::start().await;
    let mut upstream = origin.upstream();
    upstream["keepalive_pool"] = json!({"size": 4, "idle_timeout": 60, "requests": 10});
    let edge = one_route(upstream).await;
    served(&edge, gets(100)).await;
    assert_eq!(origin.connections(), 10);
}

#[tokio::test]
async fn an_idle_pooled_connection_ends_after_its_time() {
    let origin = echo::start().await;
    let mut upstream = origin.upstream();
    upstream["keepalive_pool"] = json!({"size": 4, "idle_timeout": 1, "requests": 1000});
    let edge = one_route(upstream).await;
    served(&edge, gets(1)).await;
    assert_eq!(origin.open_connections(), 1);
    eventually("the idle connection is closed", || async { (origin.open_connections() == 0).then_some(()) })
        .await;
}
