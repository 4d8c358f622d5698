//! SIGTERM: what is under way is finished, nobody is cut off without a word, and the exit code is 0.

use std::time::{Duration, Instant};

use bytes::Bytes;
use e2e::client::{Call, Connection, End, Raw};
use e2e::frames;
use e2e::origin::{Origin, echo, slow_body, stall};
use e2e::{Edge, eventually, json};
use http_body_util::BodyExt;
use nix::sys::signal::Signal;

async fn one_route(origin: &Origin) -> Edge {
    Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()})).start().await
}

/// An origin that takes `time` for each answer.
async fn slow(time: Duration) -> Origin {
    Origin::http(move |_| async move {
        tokio::time::sleep(time).await;
        http::Response::new(Bytes::from_static(b"done"))
    })
    .await
}

#[tokio::test]
async fn without_work_it_ends_at_once_with_zero() {
    let origin = echo::start().await;
    let mut edge = one_route(&origin).await;
    edge.get("/").await.expect_status(200);
    let begin = Instant::now();
    let status = edge.terminate().await;
    assert_eq!(status.code(), Some(0));
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn requests_under_way_are_finished() {
    let origin = slow(Duration::from_secs(2)).await;
    let mut edge = one_route(&origin).await;
    let addr = edge.http;
    let calls: Vec<_> = (0..20)
        .map(|number| {
            tokio::spawn(async move {
                let mut connection = if number % 2 == 0 {
                    Connection::http1(addr).await
                } else {
                    Connection::http2(addr).await
                };
                connection.send(Call::get("/")).await
            })
        })
        .collect();
    eventually("all are under way", || async { (origin.requests() == 20).then_some(()) }).await;
    edge.signal(Signal::SIGTERM);
    for call in calls {
        assert_eq!(call.await.expect("a call").expect_status(200).text(), "done");
    }
    assert_eq!(edge.wait().await.code(), Some(0));
}

#[tokio::test]
async fn readiness_is_false_while_it_drains() {
    let origin = slow(Duration::from_secs(3)).await;
    let mut edge = one_route(&origin).await;
    let addr = edge.http;
    let call = tokio::spawn(async move { Connection::http1(addr).await.send(Call::get("/")).await.status });
    eventually("the request is under way", || async { (origin.requests() == 1).then_some(()) }).await;
    assert_eq!(edge.readiness().await.map(|answer| answer.status), Some(200));
    edge.signal(Signal::SIGTERM);
    eventually("it is not ready any more", || async {
        (edge.readiness().await?.status == 503).then_some(())
    })
    .await;
    assert_eq!(call.await.expect("a call"), 200);
    assert_eq!(edge.wait().await.code(), Some(0));
}

#[tokio::test]
async fn a_kept_connection_is_told_with_its_next_answer() {
    let origin = slow(Duration::from_secs(2)).await;
    let mut edge = one_route(&origin).await;
    let mut kept = Raw::connect(edge.http).await;
    kept.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let first = kept.answer().await.expect("an answer").expect_status(200);
    assert_ne!(first.header("connection"), Some("close"));
    kept.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request is under way", || async { (origin.requests() == 2).then_some(()) }).await;
    edge.signal(Signal::SIGTERM);
    let last = kept.answer().await.expect("the answer of what was under way").expect_status(200);
    assert_eq!(last.header("connection"), Some("close"));
    assert_eq!(kept.read_to_end(Duration::from_secs(10)).await.end, End::Closed);
    assert_eq!(edge.wait().await.code(), Some(0));
}

#[tokio::test]
async fn http2_clients_get_goaway() {
    let origin = slow(Duration::from_secs(1)).await;
    let mut edge = one_route(&origin).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write(frames::hello()).await;
    let block = frames::block(&frames::get("/", "a"));
    raw.write(frames::frame(frames::HEADERS, frames::END_HEADERS | frames::END_STREAM, 1, &block)).await;
    eventually("the request is under way", || async { (origin.requests() == 1).then_some(()) }).await;
    edge.signal(Signal::SIGTERM);
    // We acknowledge nothing: a client that is slow to react must not hold the drain up either.
    let outcome = raw.read_to_end(Duration::from_secs(10)).await;
    let frames = frames::parse(&outcome.bytes);
    assert!(frames.iter().any(|frame| frame.kind == frames::GOAWAY), "{frames:?}");
    let done = frames.iter().any(|frame| frame.kind == frames::DATA && frame.payload == "done");
    assert!(done, "the answer of what was under way: {frames:?}");
    assert_eq!(edge.wait().await.code(), Some(0));
}

#[tokio::test]
async fn a_long_download_is_finished() {
    let origin = slow_body::start(30, 10_000, Duration::from_millis(100)).await;
    let mut edge = one_route(&origin).await;
    let mut connection = edge.connect().await;
    let response = connection.open(Call::get("/")).await.expect("an answer");
    edge.signal(Signal::SIGTERM);
    let body = response.into_body().collect().await.expect("the whole body").to_bytes();
    assert_eq!(body.len(), 300_000);
    assert_eq!(edge.wait().await.code(), Some(0));
}

#[tokio::test]
async fn a_second_sigterm_ends_it_at_once() {
    let origin = stall::start().await;
    let mut edge = one_route(&origin).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request is under way", || async { (origin.requests() == 1).then_some(()) }).await;
    edge.signal(Signal::SIGTERM);
    eventually("it drains", || async {
        (edge.readiness().await.is_none_or(|answer| answer.status == 503)).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(edge.ended(), None, "it waits for the request");
    let begin = Instant::now();
    edge.signal(Signal::SIGTERM);
    edge.wait().await;
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn new_connections_are_not_accepted_while_it_drains() {
    let origin = slow(Duration::from_secs(2)).await;
    let mut edge = one_route(&origin).await;
    let addr = edge.http;
    let call = tokio::spawn(async move { Connection::http1(addr).await.send(Call::get("/")).await.status });
    eventually("the request is under way", || async { (origin.requests() == 1).then_some(()) }).await;
    edge.signal(Signal::SIGTERM);
    eventually("the port is closed", || async {
        tokio::net::TcpStream::connect(addr).await.is_err().then_some(())
    })
    .await;
    assert_eq!(call.await.expect("a call"), 200);
    assert_eq!(edge.wait().await.code(), Some(0));
}
