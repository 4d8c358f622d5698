//! When a request is tried again at another node, and when it must not be.

use std::time::{Duration, Instant};

use e2e::client::Call;
use e2e::load::Load;
use e2e::origin::keepalive_race::Death;
use e2e::origin::{Origin, early_close, echo, keepalive_race, reset, stall};
use e2e::ports::Port;
use e2e::{Edge, Value, eventually, json};

async fn one_route(upstream: Value) -> Edge {
    Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": upstream})).start().await
}

/// Roundrobin over these nodes in this order.
fn nodes(nodes: &[String]) -> Value {
    let nodes: Vec<Value> = nodes
        .iter()
        .map(|node| {
            let (host, port) = node.rsplit_once(':').expect("host:port");
            json!({"host": host, "port": port.parse::<u16>().expect("a port"), "weight": 1})
        })
        .collect();
    json!({"type": "roundrobin", "nodes": nodes})
}

#[tokio::test]
async fn a_connection_that_was_not_established_is_tried_elsewhere_for_every_method() {
    let (dead, origin) = (Port::free(), echo::start().await);
    let edge = one_route(nodes(&[dead.addr().to_string(), origin.node()])).await;
    // Fewer than the retries that the budget gives to a quiet upstream.
    for method in ["GET", "POST", "PUT", "DELETE", "PATCH"] {
        let answer = edge.send(Call::new(method, "/").body("body")).await.expect_status(200);
        assert_eq!(answer.json()["body"], "body", "{method}: the body is sent in full");
    }
    assert_eq!(origin.requests(), 5);
}

#[tokio::test]
async fn an_idempotent_request_is_tried_elsewhere_when_the_origin_breaks_off() {
    for bad in [early_close::after("").await, reset::after("").await, early_close::at_once().await] {
        let good = echo::start().await;
        let edge = one_route(nodes(&[bad.node(), good.node()])).await;
        for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"] {
            edge.send(Call::new(method, "/")).await.expect_status(200);
        }
        assert!(bad.connections() >= 3, "the bad node was asked: {}", bad.connections());
    }
}

#[tokio::test]
async fn a_post_of_which_bytes_were_sent_is_never_tried_again() {
    for bad in [early_close::after("").await, reset::after("").await] {
        let good = echo::start().await;
        let edge = one_route(nodes(&[bad.node(), good.node()])).await;
        let mut failed = 0;
        for _ in 0..6 {
            for method in ["POST", "PATCH"] {
                match edge.send(Call::new(method, "/").body("order")).await.status {
                    200 => {}
                    502 => failed += 1,
                    status => panic!("{method}: status {status}"),
                }
            }
        }
        assert!(failed > 0, "the bad node was asked");
        assert_eq!(bad.requests(), failed, "each failure is one request the bad node has seen");
        assert_eq!(bad.requests() + good.requests(), 12, "no request was sent twice");
    }
}

#[tokio::test]
async fn a_reused_connection_that_dies_before_the_first_byte_is_replaced() {
    for death in [Death::Close, Death::Reset] {
        let origin = keepalive_race::start(death).await;
        let edge = one_route(origin.upstream()).await;
        let mut connection = edge.connect().await;
        for _ in 0..10 {
            connection.send(Call::get("/")).await.expect_status(200);
        }
        assert!(origin.connections() >= 10, "each connection serves one request");
    }
}

#[tokio::test]
async fn a_post_on_a_reused_connection_that_dies_is_not_sent_twice() {
    let origin = keepalive_race::start(Death::Close).await;
    let edge = one_route(origin.upstream()).await;
    let mut connection = edge.connect().await;
    connection.send(Call::get("/")).await.expect_status(200);
    // The origin reads the whole request before it closes: it may have acted upon it.
    let answer = connection.send(Call::new("POST", "/").body("order")).await;
    assert_eq!(answer.status, 502, "{answer:?}");
}

#[tokio::test]
async fn retries_stop_at_their_number() {
    let bad = early_close::after("").await;
    for (retries, attempts) in [(0, 1), (1, 2), (2, 3)] {
        let others: Vec<Origin> =
            vec![early_close::after("").await, early_close::after("").await, early_close::after("").await];
        let mut upstream = nodes(&others.iter().map(Origin::node).collect::<Vec<_>>());
        upstream["retries"] = json!(retries);
        let edge = one_route(upstream).await;
        edge.get("/").await.expect_status(502);
        let asked: usize = others.iter().map(Origin::requests).sum();
        assert_eq!(asked, attempts, "retries: {retries}");
    }
    assert_eq!(bad.requests(), 0);
}

#[tokio::test]
async fn by_default_every_node_is_tried_once() {
    let bad = [early_close::after("").await, early_close::after("").await, early_close::after("").await];
    let edge = one_route(nodes(&bad.iter().map(Origin::node).collect::<Vec<_>>())).await;
    edge.get("/").await.expect_status(502);
    assert_eq!(bad.iter().map(Origin::requests).collect::<Vec<_>>(), [1, 1, 1]);
}

#[tokio::test]
async fn the_time_for_all_tries_is_limited() {
    let stalled = [stall::start().await, stall::start().await, stall::start().await];
    let mut upstream = nodes(&stalled.iter().map(Origin::node).collect::<Vec<_>>());
    upstream["timeout"] = json!({"connect": 1, "send": 1, "read": 1});
    upstream["retries"] = json!(2);
    upstream["retry_timeout"] = json!(1.5);
    let edge = one_route(upstream).await;
    edge.get("/").await.expect_status(504);
    let tries: usize = stalled.iter().map(Origin::requests).sum();
    assert!((1..=2).contains(&tries), "of a second each, not three: {tries}");
}

#[tokio::test]
async fn a_slow_answer_is_a_504_and_a_refused_connection_a_502() {
    let stalled = stall::start().await;
    let mut upstream = stalled.upstream();
    upstream["timeout"] = json!({"connect": 1, "send": 1, "read": 0.3});
    let edge = Edge::file()
        .route(json!({"id": "s", "uri": "/stall", "upstream": upstream}))
        .route(json!({"id": "d", "uri": "/dead", "upstream":
                      {"type": "roundrobin", "nodes": {Port::free().addr().to_string(): 1}}}))
        .start()
        .await;
    for (path, status) in [("/stall", 504), ("/dead", 502)] {
        let answer = edge.get(path).await.expect_status(status);
        assert!(answer.header("proxy-status").is_some(), "{path} says why: {answer:?}");
    }
}

#[tokio::test]
async fn the_timeout_of_a_route_overrides_that_of_its_upstream() {
    let stalled = stall::start().await;
    let edge = Edge::file()
        .route(json!({"id": "s", "uri": "/*", "upstream": stalled.upstream(),
                      "timeout": {"connect": 1, "send": 1, "read": 0.3}}))
        .start()
        .await;
    let begin = Instant::now();
    edge.get("/").await.expect_status(504);
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn an_answer_that_breaks_off_after_its_head_is_not_made_whole() {
    let cut = early_close::after("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await;
    let good = echo::start().await;
    let edge = one_route(nodes(&[cut.node(), good.node()])).await;
    let mut broken = 0;
    for _ in 0..4 {
        let mut connection = edge.connect().await;
        broken += usize::from(connection.try_send(Call::get("/")).await.is_err());
    }
    assert_eq!(broken, cut.requests(), "the client sees every answer that was cut");
    assert!(broken > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_stops_a_storm_of_retries() {
    let (one, two) = (early_close::after("").await, early_close::after("").await);
    let mut upstream = nodes(&[one.node(), two.node()]);
    upstream["retries"] = json!(1);
    let edge = one_route(upstream).await;
    let begin = Instant::now();
    let load = Load::start(edge.http, "GET / HTTP/1.1\r\nhost: a\r\n\r\n", 502, 20, 400);
    eventually("a thousand requests have failed", || async {
        (one.requests() + two.requests() >= 1000).then_some(())
    })
    .await;
    let account = load.finish().await;
    let attempts = one.requests() + two.requests();
    let requests = account.good;
    let tenths = usize::try_from(begin.elapsed().as_millis() / 100).expect("a short time");
    assert!(account.bad.is_empty(), "{:?}", account.bad);
    // 20 % and ten a second, with room for the first burst; without a budget it would be twice the requests.
    assert!(attempts <= requests + requests / 5 + tenths + 60, "{attempts} attempts for {requests} requests");
}
