//! What upstreams have beyond APISIX's: breakers of nodes, conditions of retries, sessions, slow starts.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use bytes::Bytes;
use e2e::client::{Answer, Call};
use e2e::origin::{Origin, early_close};
use e2e::ports::Port;
use e2e::{Edge, Value, edge, eventually, json};
use http::Response;

/// An origin that tells its name and answers with a status that the test can change.
async fn named(name: &'static str, status: &Arc<AtomicU16>) -> Origin {
    let status = Arc::clone(status);
    Origin::http(move |_| {
        let status = status.load(Ordering::Relaxed);
        async move {
            Response::builder().status(status).header("x-origin", name).body(Bytes::new()).expect("an answer")
        }
    })
    .await
}

fn ok() -> Arc<AtomicU16> {
    Arc::new(AtomicU16::new(200))
}

fn upstream(origins: &[&Origin], fields: Value) -> Value {
    let nodes: Vec<Value> = origins
        .iter()
        .map(|origin| json!({"host": "127.0.0.1", "port": origin.addr.port(), "weight": 1}))
        .collect();
    let mut upstream = json!({"id": "u", "type": "roundrobin", "nodes": nodes});
    let members = upstream.as_object_mut().expect("an object");
    members.extend(fields.as_object().expect("an object").clone());
    upstream
}

fn resources(upstream: Value) -> Value {
    json!({"upstreams": [upstream], "routes": [{"id": "r", "uri": "/*", "upstream_id": "u"}]})
}

fn origin_of(answer: &Answer) -> String {
    answer.header("x-origin").unwrap_or_default().to_owned()
}

async fn health(edge: &Edge) -> Value {
    edge.call_control("/v1/healthcheck/upstreams/u").await.json()
}

async fn metrics(edge: &Edge) -> String {
    Call::get("/apisix/prometheus/metrics").send_to(edge.metrics).await.text()
}

#[tokio::test]
async fn a_breaker_takes_one_node_out_and_lets_it_back_by_a_probe() {
    let (status, good) = (Arc::new(AtomicU16::new(503)), ok());
    let (one, two) = (named("one", &status).await, named("two", &good).await);
    let fields = json!({"retries": 0, "breaker": {"max_failures": 3, "window": 60, "cool_down": 1}});
    let edge = Edge::file().resources(resources(upstream(&[&one, &two], fields))).start().await;
    for _ in 0..20 {
        edge.get("/").await;
    }
    assert_eq!(one.requests(), 3, "three failures, and then nothing");
    let node = &health(&edge).await["nodes"][0].clone();
    assert!(matches!(node["breaker"].as_str(), Some("open")), "{node}");
    assert_eq!(node["status"], "healthy", "health checks have nothing to say here");
    let text = metrics(&edge).await;
    let port = one.addr.port();
    let labels = format!("{{name=\"/apisix/upstreams/u\",ip=\"127.0.0.1\",port=\"{port}\"}}");
    assert!(text.contains(&format!("postern_node_breaker_state{labels} 2\n")), "{text}");
    assert!(text.contains(&format!("postern_node_breaker_opened_total{labels} 1\n")), "{text}");

    status.store(200, Ordering::Relaxed);
    eventually("a probe has closed it", || async {
        edge.get("/").await.expect_status(200);
        (health(&edge).await["nodes"][0]["breaker"] == "closed").then_some(())
    })
    .await;
}

#[tokio::test]
async fn when_every_breaker_is_open_the_answer_is_a_503_with_its_reason_or_all_are_used() {
    for (all_open, wanted) in [("refuse", 503), ("use_all", 502)] {
        let dead = Port::free();
        let node = json!([{"host": "127.0.0.1", "port": dead.addr().port(), "weight": 1}]);
        let breaker = json!({"max_failures": 2, "cool_down": 60, "all_open": all_open});
        let upstream =
            json!({"id": "u", "type": "roundrobin", "nodes": node, "retries": 0, "breaker": breaker});
        let edge = Edge::file().resources(resources(upstream)).start().await;
        for _ in 0..2 {
            edge.get("/").await.expect_status(502);
        }
        let answer = edge.get("/").await.expect_status(wanted);
        let told = answer.header("proxy-status").unwrap_or_default();
        assert_eq!(told.contains("breaker_open"), wanted == 503, "{told}");
    }
}

#[tokio::test]
async fn a_breaker_keeps_its_state_over_edits_elsewhere_and_forgets_it_with_its_rule() {
    let (status, good) = (Arc::new(AtomicU16::new(500)), ok());
    let (one, two) = (named("one", &status).await, named("two", &good).await);
    let fields = |max: u32, retries: u32| json!({"retries": retries, "breaker": {"max_failures": max, "cool_down": 600}});
    let edge = Edge::file().resources(resources(upstream(&[&one, &two], fields(1, 0)))).start().await;
    for _ in 0..4 {
        edge.get("/").await;
    }
    let breaker = |health: Value| health["nodes"][0]["breaker"].as_str().unwrap_or_default().to_owned();
    assert_eq!(breaker(health(&edge).await), "open");
    edge.reload(&resources(upstream(&[&one, &two], fields(1, 2)))).await;
    assert_eq!(breaker(health(&edge).await), "open");
    edge.reload(&resources(upstream(&[&one, &two], fields(2, 2)))).await;
    assert_eq!(breaker(health(&edge).await), "closed");
}

#[tokio::test]
async fn statuses_are_tried_again_where_the_upstream_says_so() {
    let (bad, good) = (Arc::new(AtomicU16::new(503)), ok());
    let (one, two) = (named("one", &bad).await, named("two", &good).await);
    let edge = Edge::file()
        .resources(resources(upstream(&[&one, &two], json!({"retry": {"on": ["http_5xx"]}}))))
        .start()
        .await;
    for _ in 0..4 {
        let answer = edge.get("/").await.expect_status(200);
        assert_eq!(origin_of(&answer), "two");
    }
    assert!(one.requests() >= 1, "the other was asked first at times");
    let mut posts = Vec::new();
    for _ in 0..2 {
        posts.push(edge.send(Call::new("POST", "/").body("order")).await.status);
    }
    posts.sort_unstable();
    assert_eq!(posts, [200, 503], "a POST is not sent twice");
}

#[tokio::test]
async fn a_broken_connection_is_not_tried_again_where_it_is_not_listed() {
    let (bad, good) = (early_close::after("").await, named("two", &ok()).await);
    let fields = json!({"retry": {"on": ["connect_failure", "timeout"]}});
    let edge = Edge::file().resources(resources(upstream(&[&bad, &good], fields))).start().await;
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(edge.get("/").await.status);
    }
    assert_eq!(statuses.iter().filter(|status| **status == 502).count(), bad.requests(), "{statuses:?}");
    assert!(bad.requests() > 0);
}

/// The `name=value` of the cookie that an answer sets.
fn cookie(answer: &Answer) -> Option<String> {
    Some(answer.header("set-cookie")?.split(';').next()?.to_owned())
}

#[tokio::test]
async fn a_session_stays_at_its_node_over_edits_and_a_restart() {
    let good = ok();
    let origins = [named("one", &good).await, named("two", &good).await, named("three", &good).await];
    let all: Vec<&Origin> = origins.iter().collect();
    let fields = json!({"sticky": {"cookie": "sid", "max_age": 3600, "same_site": "lax"}});
    let mut edge = Edge::file().resources(resources(upstream(&all, fields.clone()))).start().await;
    let first = edge.get("/").await.expect_status(200);
    let told = first.header("set-cookie").expect("a cookie").to_owned();
    assert!(told.ends_with("; Path=/; Max-Age=3600; HttpOnly; SameSite=Lax"), "{told}");
    let (cookie, node) = (cookie(&first).expect("a cookie"), origin_of(&first));
    for origin in &origins {
        assert!(!told.contains(&origin.addr.port().to_string()), "no address in {told}");
    }
    let again = || Call::get("/").header("cookie", &format!("a=b; {cookie}"));
    let stays = async |edge: &Edge, when: &str| {
        for _ in 0..8 {
            let answer = edge.send(again()).await.expect_status(200);
            assert_eq!((origin_of(&answer), answer.header("set-cookie")), (node.clone(), None), "{when}");
        }
    };
    stays(&edge, "at first").await;
    let mut edited = resources(upstream(&all, fields.clone()));
    edited["routes"][0]["desc"] = json!("edited");
    edited["upstreams"][0]["type"] = json!("least_conn");
    edge.reload(&edited).await;
    stays(&edge, "after an edit").await;
    edge.terminate().await;
    edge.start_again().await;
    stays(&edge, "after a restart").await;

    let rest: Vec<&Origin> = match node.as_str() {
        "one" => vec![&origins[1], &origins[2]],
        "two" => vec![&origins[0], &origins[2]],
        _ => vec![&origins[0], &origins[1]],
    };
    edge.reload(&resources(upstream(&rest, fields))).await;
    let moved = edge.send(again()).await.expect_status(200);
    assert_ne!(origin_of(&moved), node);
    assert!(moved.header("set-cookie").is_some_and(|cookie| cookie.starts_with("sid=")));
}

#[tokio::test]
async fn a_node_that_joins_gets_its_share_little_by_little() {
    let good = ok();
    let (one, two) = (named("one", &good).await, named("two", &good).await);
    let fields = json!({"slow_start": 6});
    let edge = Edge::file().resources(resources(upstream(&[&one], fields.clone()))).start().await;
    edge.reload(&resources(upstream(&[&one, &two], fields))).await;
    let mut connection = edge.connect().await;
    let mut served: HashMap<String, u32> = HashMap::new();
    for _ in 0..60 {
        *served.entry(origin_of(&connection.send(Call::get("/")).await)).or_default() += 1;
    }
    let early = served.get("two").copied().unwrap_or(0);
    assert!((1..=20).contains(&early), "{served:?}");
    eventually("both have the same share", || async {
        let before = two.requests();
        for _ in 0..10 {
            edge.get("/").await;
        }
        (two.requests() - before == 5).then_some(())
    })
    .await;
}

#[tokio::test]
async fn names_from_elsewhere_are_refused_with_the_place_where_they_belong() {
    let edge = Edge::embedded().start().await;
    for (field, says) in [("max_failures", "breaker"), ("retry_on", "retry"), ("sticky_cookie", "sticky")] {
        let body = json!({"nodes": {"127.0.0.1:1": 1}, "type": "roundrobin", field: 3});
        let answer = edge.call_admin("PUT", "upstreams/1", Some(&body)).await.expect_status(400);
        let told = answer.text();
        assert!(told.contains(field) && told.contains(&format!("\\\"{says}\\\": {{")), "{told}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let text = "upstreams:\n  - id: 1\n    nodes: {\"127.0.0.1:1\": 1}\n    cool_down: 5\n#END\n";
    std::fs::write(folder.path().join("apisix.yaml"), text).expect("a file");
    let (code, out, err) = edge::run(&["check", &folder.path().display().to_string()]);
    let told = format!("{out}{err}");
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("cool_down") && told.contains("\"breaker\": {"), "{told}");
}
