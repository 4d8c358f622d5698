//! Plugins that keep or change bodies, over real sockets: what the cache promises over time, restarts and failures, and
//! calls of a real gRPC server.
//!
//! What single requests get is told by the cases of `tests/compat`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use e2e::client::{Call, Connection};
use e2e::origin::{Origin, grpc};
use e2e::{Edge, Value, eventually, json};
use http::Response;
use http_body_util::BodyExt;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

fn cache(zone: &str, settings: Value) -> Value {
    let strategy = if zone.starts_with("disk") { "disk" } else { "memory" };
    let mut all = json!({"cache_strategy": strategy, "cache_zone": zone});
    for (name, value) in settings.as_object().expect("settings") {
        all[name] = value.clone();
    }
    json!({"proxy-cache": all})
}

/// Answers with the number of the request, when it is let.
async fn counting(
    fields: &'static [(&'static str, &'static str)],
    gate: Arc<Semaphore>,
) -> (Origin, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let origin = Origin::http(move |_| {
        let (count, gate) = (counted.clone(), gate.clone());
        async move {
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            let _open = gate.acquire().await;
            let mut response = Response::builder();
            for (name, value) in fields {
                response = response.header(*name, *value);
            }
            response.body(format!("answer {number}").into()).expect("an answer")
        }
    })
    .await;
    (origin, count)
}

fn open() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(1000))
}

/// What the cache says of an answer, and its body.
async fn asked(edge: &Edge, path: &str) -> (String, u16, String) {
    let answer = edge.get(path).await;
    (answer.header("apisix-cache-status").unwrap_or_default().to_owned(), answer.status, answer.text())
}

fn told(status: &str, text: &str) -> (String, u16, String) {
    (status.to_owned(), 200, text.to_owned())
}

async fn storm(edge: &Edge, path: &'static str, clients: usize) -> JoinSet<String> {
    let mut running = JoinSet::new();
    for _ in 0..clients {
        let mut connection = edge.connect().await;
        running.spawn(async move { connection.send(Call::get(path)).await.expect_status(200).text() });
    }
    running
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_fetches_for_all_that_ask_meanwhile() {
    let gate = Arc::new(Semaphore::new(0));
    let (origin, count) = counting(&[], gate.clone()).await;
    let edge = Edge::embedded().config(json!({"nginx_config": {"worker_processes": 4}})).start().await;
    let plugins = cache("memory_cache", json!({}));
    edge.put("routes/1", json!({"uri": "/a", "plugins": plugins, "upstream": origin.upstream()})).await;
    let ready = cache("memory_cache", json!({"cache_control": true}));
    edge.put("routes/2", json!({"uri": "/ready", "plugins": ready, "upstream": origin.upstream()})).await;
    eventually("the routes are in use", || async {
        let call = Call::get("/ready").header("cache-control", "only-if-cached");
        (edge.send(call).await.status == 504).then_some(())
    })
    .await;

    let running = storm(&edge, "/a", 20).await;
    eventually("a request arrives", || async { (count.load(Ordering::SeqCst) > 0).then_some(()) }).await;
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(count.load(Ordering::SeqCst), 1, "the others wait");
    }
    gate.add_permits(1000);
    let answers = running.join_all().await;
    assert!(answers.iter().all(|answer| answer == "answer 1"), "{answers:?}");

    // What is not kept is waited for once, and then by nobody.
    let answers = storm(&edge, "/ready", 20).await.join_all().await;
    let mut distinct = answers.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 20, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_answer_stands_in_for_an_upstream_that_is_down_and_is_confirmed_when_it_is_back() {
    let (origin, _) = counting(&[("etag", "\"v1\"")], open()).await;
    let addr = origin.addr;
    let edge = Edge::embedded().start().await;
    let plugins = cache("memory_cache", json!({"cache_ttl": 1}));
    edge.put("routes/1", json!({"uri": "/*", "plugins": plugins, "upstream": origin.upstream()})).await;
    edge.until_status("/other", 200).await;
    assert_eq!(asked(&edge, "/a").await.0, "MISS");
    let kept = asked(&edge, "/a").await;
    assert_eq!(kept.0, "HIT");
    drop(origin);
    let stale = eventually("the time of the answer is over", || async {
        let answer = asked(&edge, "/a").await;
        (answer.0 != "HIT").then_some(answer)
    })
    .await;
    assert_eq!(stale, told("STALE", &kept.2));
    assert_eq!(edge.get("/never").await.status, 502);
    let _back = Origin::http_at(addr, |request| async move {
        let same = request.headers().get("if-none-match").is_some_and(|tag| tag == "\"v1\"");
        Response::builder().status(if same { 304 } else { 200 }).body("new".into()).expect("an answer")
    })
    .await;
    assert_eq!(asked(&edge, "/a").await, told("REVALIDATED", &kept.2));
    assert_eq!(asked(&edge, "/a").await, told("HIT", &kept.2));
    assert_eq!(asked(&edge, "/never").await, told("MISS", "new"));
}

/// The zones in use, as the Control API tells them.
async fn zones(edge: &Edge) -> Value {
    Call::get("/v1/caches").send_to(edge.control).await.expect_status(200).json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_on_disk_survive_a_kill_and_a_zone_can_be_emptied() {
    let (origin, count) = counting(&[("cache-control", "max-age=600")], open()).await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("zone");
    let zone = json!({"name": "disk_one", "memory_size": "1m", "disk_size": "10m", "disk_path": path});
    let config = json!({"apisix": {"proxy_cache": {"zones": [zone]}}});
    let mut edge = Edge::embedded().config(config).start().await;
    let plugins = cache("disk_one", json!({}));
    edge.put("routes/1", json!({"uri": "/*", "plugins": plugins, "upstream": origin.upstream()})).await;
    edge.until_status("/other", 200).await;
    let first = asked(&edge, "/a").await;
    assert_eq!(first.0, "MISS");
    let files = || async { (zones(&edge).await[0]["disk"]["entries"] == 2).then_some(()) };
    eventually("both answers are on disk", files).await;
    let before = count.load(Ordering::SeqCst);

    edge.kill();
    edge.start_again().await;
    let files = || async { (zones(&edge).await[0]["disk"]["entries"] == 2).then_some(()) };
    eventually("the files are found", files).await;
    assert_eq!(asked(&edge, "/a").await, told("HIT", &first.2));
    assert_eq!(count.load(Ordering::SeqCst), before, "nobody was asked");

    let purge = |zone: &str| Call::new("DELETE", &format!("/v1/caches/{zone}")).send_to(edge.control);
    assert_eq!(purge("nowhere").await.status, 404);
    assert_eq!(purge("disk_one").await.status, 200);
    assert_eq!(asked(&edge, "/a").await.0, "MISS");
    eventually("the file of the other answer is gone", || async {
        let parts = std::fs::read_dir(&path).expect("the zone").flatten();
        let files = parts.filter_map(|part| std::fs::read_dir(part.path()).ok()).flatten().count();
        (files == 1).then_some(())
    })
    .await;
}

/// The definition of the service of [`grpc`], in two files.
fn protos() -> [(&'static str, Value); 2] {
    let service = r#"
        syntax = "proto3";
        package e2e;
        import "words/word.proto";
        service Words {
            rpc Unary (Word) returns (Word) {}
            rpc Count (Word) returns (stream Word) {}
            rpc Join (stream Word) returns (Word) {}
        }
    "#;
    let word = r#"
        syntax = "proto3";
        package e2e;
        message Word { string text = 1; int32 number = 2; }
    "#;
    [
        ("protos/word", json!({"content": word, "name": "words/word.proto"})),
        ("protos/words", json!({"content": service})),
    ]
}

async fn calls(origin: &Origin) -> Edge {
    let router = json!({"apisix": {"router": {"http": "radixtree_uri_with_parameter"}}});
    let edge = Edge::embedded().config(router).start().await;
    for (path, proto) in protos() {
        edge.put(path, proto).await;
    }
    let upstream = json!({"type": "roundrobin", "scheme": "grpc", "nodes": {origin.node(): 1}});
    for (id, uri, method) in
        [("unary", "/unary/:text", "Unary"), ("plain", "/unary", "Unary"), ("count", "/count", "Count")]
    {
        let transcode = json!({"proto_id": "words", "service": "e2e.Words", "method": method});
        let route = json!({"uri": uri, "plugins": {"grpc-transcode": transcode}, "upstream": upstream});
        edge.put(&format!("routes/{id}"), route).await;
    }
    let web = json!({"uri": "/web/*", "plugins": {"grpc-web": {}}, "upstream": upstream});
    edge.put("routes/web", web).await;
    edge.until_status("/web/x", 405).await;
    edge
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_clients_call_a_grpc_service_with_json() {
    let origin = grpc::start().await;
    let edge = calls(&origin).await;
    let post = |path: &str, body: Value| edge.send(Call::new("POST", path).json(&body));
    let answer = edge.get("/unary?text=hello&number=3").await.expect_status(200);
    assert_eq!(answer.json(), json!({"text": "HELLO", "number": 3}));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("grpc-status"), Some("0"));
    let answer = post("/unary", json!({"text": "body", "number": 1})).await.expect_status(200);
    assert_eq!(answer.json(), json!({"text": "BODY", "number": 1}));
    let answer = edge.get("/unary/path?number=7").await.expect_status(200);
    assert_eq!(answer.json(), json!({"text": "PATH", "number": 7}));
    for (code, status) in [(5, 404), (8, 429), (14, 503), (16, 401)] {
        let answer = edge.get(&format!("/unary?text=fail&number={code}")).await.expect_status(status);
        assert_eq!(answer.header("grpc-status"), Some(&*code.to_string()));
        assert_eq!(answer.text(), "");
    }
    assert_eq!(post("/unary", json!({"number": "x"})).await.status, 400);

    let answer = edge.get("/count?text=a&number=3").await.expect_status(200);
    let numbers = |from: i32, to: i32| {
        (from..=to).map(|number| json!({"text": "a", "number": number})).collect::<Vec<_>>()
    };
    assert_eq!(answer.json(), json!(numbers(1, 3)));
    let call = Call::get("/count?text=fail&number=2").header("accept", "application/x-ndjson");
    let answer = edge.send(call).await.expect_status(200);
    let lines: Vec<Value> = answer.text().lines().map(serde_json).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(lines[2], json!({"error": {"code": 10, "message": "asked to fail"}}));
    assert_eq!(edge.get("/count?text=fail&number=0").await.status, 409, "it failed before its first message");
    assert_eq!(edge.get("/count?number=0").await.expect_status(200).json(), json!([]));
}

fn serde_json(text: &str) -> Value {
    text.parse().expect("JSON")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_definition_is_in_use_and_a_missing_one_refuses_the_route() {
    let origin = grpc::start().await;
    let edge = calls(&origin).await;
    assert_eq!(edge.get("/unary?text=a").await.json(), json!({"text": "A", "number": 0}));
    let word = r#"syntax = "proto3"; package e2e; message Word { string words = 1; int32 number = 2; }"#;
    edge.put("protos/word", json!({"content": word, "name": "words/word.proto"})).await;
    eventually("the import has changed", || async {
        (edge.get("/unary?words=a").await.json() == json!({"words": "A", "number": 0})).then_some(())
    })
    .await;
    edge.put("protos/word", json!({"content": "message {", "name": "words/word.proto"})).await;
    edge.until_status("/unary?words=a", 503).await;
    let rejected = Call::get("/v1/rejected").send_to(edge.control).await.text();
    assert!(rejected.contains("words/word.proto"), "{rejected}");
}

/// The frames of a gRPC-Web body: their flags and contents.
fn frames(mut body: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = body.split_first_chunk::<5>() {
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        frames.push((head[0], rest[..length].to_vec()));
        body = &rest[length..];
    }
    assert!(body.is_empty(), "a frame is cut");
    frames
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn browsers_call_a_grpc_service() {
    let origin = grpc::start().await;
    let edge = calls(&origin).await;
    let call = |path: &str, word: &grpc::Word| {
        Call::new("POST", path).header("content-type", "application/grpc-web+proto").body(grpc::frame(word))
    };
    let answer = edge.send(call("/web/e2e.Words/Unary", &grpc::word("hello", 4))).await.expect_status(200);
    assert_eq!(answer.header("content-type"), Some("application/grpc-web+proto"));
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    let got = frames(&answer.body);
    assert_eq!(got.len(), 2, "{got:?}");
    assert_eq!(got[0].1, grpc::frame(&grpc::word("HELLO", 4))[5..].to_vec());
    assert_eq!(got[1].0, 0x80);
    assert!(String::from_utf8_lossy(&got[1].1).contains("grpc-status:0\r\n"), "{got:?}");

    let answer = edge.send(call("/web/e2e.Words/Unary", &grpc::word("fail", 5))).await.expect_status(200);
    let got = frames(&answer.body);
    assert_eq!(got.len(), 1, "{got:?}");
    let end = String::from_utf8_lossy(&got[0].1).into_owned();
    assert!(end.contains("grpc-status:5\r\n") && end.contains("grpc-message:asked%20to%20fail\r\n"), "{end}");

    let got =
        frames(&edge.send(call("/web/e2e.Words/Count", &grpc::word("a", 3))).await.expect_status(200).body);
    assert_eq!(got.iter().map(|(flags, _)| *flags).collect::<Vec<_>>(), [0, 0, 0, 0x80]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compressed_event_leaves_before_the_next_is_made() {
    let (origin, events) = e2e::origin::sse::start().await;
    let edge = Edge::embedded().start().await;
    let plugins = json!({"gzip": {"types": ["text/event-stream"]}});
    edge.put("routes/1", json!({"uri": "/events", "plugins": plugins, "upstream": origin.upstream()})).await;
    // On one connection: the origin serves one client.
    edge.put("routes/ready", json!({"uri": "/ready", "plugins": {"mocking": {"response_example": "x"}}}))
        .await;
    edge.until_status("/ready", 200).await;
    let mut connection = Connection::http1(edge.http).await;
    let call = Call::get("/events").header("accept-encoding", "gzip");
    let response = connection.open(call).await.expect("an answer");
    assert_eq!(response.headers()["content-encoding"], "gzip");
    let mut body = response.into_body();
    for event in ["one", "two"] {
        events.send(event.to_owned()).await.expect("the stream is open");
        let mut got = Bytes::new();
        while got.is_empty() {
            let frame = tokio::time::timeout(Duration::from_secs(10), body.frame()).await;
            let frame = frame.expect("an event in time").expect("a frame").expect("bytes");
            got = frame.into_data().unwrap_or_default();
        }
    }
}
