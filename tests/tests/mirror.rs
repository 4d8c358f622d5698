//! Copies of requests: they never delay or fail the request, and they are bounded.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use e2e::client::{Call, Connection};
use e2e::origin::{Origin, echo, stall};
use e2e::{Edge, Value, eventually, json};
use http::Response;

async fn one_route(upstream: Value, mirror: Value) -> Edge {
    Edge::file()
        .route(json!({"id": "r", "uri": "/*", "upstream": upstream, "plugins": {"proxy-mirror": mirror}}))
        .start()
        .await
}

fn to(origin: &Origin, scheme: &str) -> Value {
    json!({"host": format!("{scheme}://{}", origin.node())})
}

async fn outcome(edge: &Edge, outcome: &str) -> u64 {
    let text = Call::get("/apisix/prometheus/metrics").send_to(edge.metrics).await.text();
    let line = format!("postern_mirrored_requests_total{{outcome=\"{outcome}\"}} ");
    let found = text.lines().find_map(|told| told.strip_prefix(&line));
    found.and_then(|number| number.parse().ok()).expect("the metric")
}

#[tokio::test]
async fn a_mirror_that_never_answers_delays_nothing_and_holds_a_bounded_number_of_copies() {
    let (good, stalled) = (echo::start().await, stall::start().await);
    let edge = one_route(good.upstream(), to(&stalled, "http")).await;
    let mut connection = edge.connect().await;
    let begun = Instant::now();
    for _ in 0..600 {
        connection.send(Call::new("POST", "/").body("order")).await.expect_status(200);
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "600 requests in {:?}", begun.elapsed());
    assert_eq!(good.requests(), 600);
    eventually("what is too much is left out", || async {
        (outcome(&edge, "dropped").await == 88).then_some(())
    })
    .await;
    assert!(stalled.connections() <= 512, "{}", stalled.connections());
}

#[tokio::test]
async fn bodies_are_copied_up_to_a_mebibyte_and_pass_whole_in_any_case() {
    let seen: Arc<Mutex<Vec<usize>>> = Arc::default();
    let noted = seen.clone();
    let mirror = Origin::http(move |request| {
        noted.lock().expect("what was seen").push(request.body().len());
        async { Response::new(Bytes::new()) }
    })
    .await;
    let length = Origin::http(|request| async move {
        let told = format!(
            "{} {:?}",
            request.body().len(),
            request.headers().get("content-length").map(|length| length.to_str().unwrap_or_default())
        );
        Response::new(Bytes::from(told))
    })
    .await;
    let edge = one_route(length.upstream(), to(&mirror, "http")).await;
    for size in [1, 100_000, 1 << 20, (1 << 20) + 1, 5 << 20] {
        let answer = edge.send(Call::new("PUT", "/").body(vec![b'x'; size])).await.expect_status(200);
        assert_eq!(answer.text(), format!("{size} Some(\"{size}\")"), "the request keeps its length");
    }
    eventually("three are copied", || async { (outcome(&edge, "sent").await == 3).then_some(()) }).await;
    assert_eq!(outcome(&edge, "dropped").await, 2);
    let mut seen = seen.lock().expect("what was seen").clone();
    seen.sort_unstable();
    assert_eq!(seen, [1, 100_000, 1 << 20]);
}

#[tokio::test]
async fn grpc_is_copied_by_http2_with_its_own_path() {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = seen.clone();
    let mirror = Origin::http(move |request| {
        let text = |name: &str| {
            request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        let told = format!(
            "{:?} {} {} {} {}",
            request.version(),
            request.uri().path(),
            text("content-type"),
            text("te"),
            request.body().len()
        );
        noted.lock().expect("what was seen").push(told);
        async { Response::new(Bytes::new()) }
    })
    .await;
    let backend = Origin::http(|_| async {
        let answer =
            Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
        answer.body(Bytes::new()).expect("an answer")
    })
    .await;
    let mut upstream = backend.upstream();
    upstream["scheme"] = json!("grpc");
    let mut settings = to(&mirror, "grpc");
    settings["path"] = json!("/not-for-grpc");
    let edge = one_route(upstream, settings).await;
    let call = Call::new("POST", "/shop.Orders/Put")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(vec![0, 0, 0, 0, 2, 8, 1]);
    Connection::http2(edge.http).await.send(call).await.expect_status(200);
    eventually("the copy is there", || async {
        (!seen.lock().expect("what was seen").is_empty()).then_some(())
    })
    .await;
    let seen = seen.lock().expect("what was seen").clone();
    assert_eq!(seen, ["HTTP/2.0 /shop.Orders/Put application/grpc trailers 7"]);
}

#[tokio::test]
async fn what_another_plugin_refuses_is_not_copied() {
    let (good, mirror) = (echo::start().await, echo::start().await);
    let edge = Edge::file()
        .route(json!({"id": "r", "uri": "/*", "upstream": good.upstream(), "plugins": {
            "proxy-mirror": to(&mirror, "http"),
            "limit-count": {"count": 1, "time_window": 600, "rejected_code": 429}}}))
        .start()
        .await;
    edge.get("/").await.expect_status(200);
    edge.get("/").await.expect_status(429);
    eventually("one is copied", || async { (outcome(&edge, "sent").await == 1).then_some(()) }).await;
    assert_eq!(mirror.requests(), 1);
}
