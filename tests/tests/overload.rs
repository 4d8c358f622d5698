//! Limits: how large, how many and how slow a client may be.

use std::time::{Duration, Instant};

use e2e::client::{Call, Connection, End, Raw, exchange};
use e2e::origin::{Origin, echo, held, slow_body};
use e2e::{Edge, Value, eventually, json};

const LIMIT: Duration = Duration::from_secs(20);

async fn limited(config: Value) -> (Edge, Origin) {
    let origin = echo::start().await;
    let edge = Edge::file()
        .config(config)
        .route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()}))
        .start()
        .await;
    (edge, origin)
}

#[tokio::test]
async fn heads_that_are_too_large_are_refused() {
    let (edge, origin) = limited(json!({})).await;
    let long = "x".repeat(1_000_000);
    let many: String = (0..5000).map(|number| format!("x-{number}: y\r\n")).collect();
    let cases = [
        ("a long URI", format!("GET /{long} HTTP/1.1\r\nhost: a\r\n\r\n"), 414),
        ("a long field", format!("GET / HTTP/1.1\r\nhost: a\r\nx-a: {long}\r\n\r\n"), 431),
        ("many fields", format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n"), 431),
    ];
    for (name, request, status) in cases {
        let outcome = exchange(edge.http, request, LIMIT).await;
        assert!(matches!(outcome.status(), Some(got) if got == status), "{name}: {:?}", outcome.statuses());
        assert_eq!(outcome.end, End::Closed, "{name}");
    }
    assert_eq!(origin.requests(), 0);
    let call = Call::get(&format!("/{}", "x".repeat(4000))).header("x-a", &"y".repeat(4000));
    edge.send(call).await.expect_status(200);
}

#[tokio::test]
async fn bodies_over_the_limit_are_refused_before_and_while_they_come() {
    let (edge, origin) = limited(json!({"nginx_config": {"http": {"client_max_body_size": "1k"}}})).await;
    edge.send(Call::new("POST", "/").body(vec![b'x'; 1024])).await.expect_status(200);
    let before = origin.requests();
    edge.send(Call::new("POST", "/").body(vec![b'x'; 1025])).await.expect_status(413);
    assert_eq!(origin.requests(), before, "a body known to be too large is not begun");
    let chunk = format!("400\r\n{}\r\n", "x".repeat(0x400));
    let request = format!(
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{}0\r\n\r\n",
        chunk.repeat(4)
    );
    let outcome = exchange(edge.http, request, LIMIT).await;
    assert_eq!(outcome.statuses(), [413], "chunks are counted");
    let mut connection = Connection::http2(edge.http).await;
    connection.send(Call::new("POST", "/").body(vec![b'x'; 5000])).await.expect_status(413);
    connection.send(Call::new("POST", "/").body(vec![b'x'; 10])).await.expect_status(200);
}

#[tokio::test]
async fn a_slow_head_has_a_deadline() {
    let (edge, _origin) = limited(json!({"nginx_config": {"http": {"client_header_timeout": "1s"}}})).await;
    for beginning in ["", "GET", "GET / HTTP/1.1\r\nhost: a\r\nx-a: "] {
        let begin = Instant::now();
        let mut raw = Raw::connect(edge.http).await;
        // Drop by drop: every byte comes in time, the head does not.
        raw.write(beginning).await;
        let mut closed = false;
        while begin.elapsed() < LIMIT && !closed {
            if !beginning.is_empty() {
                raw.write("x").await;
            }
            closed = raw.read_to_end(Duration::from_millis(300)).await.end != End::Open;
        }
        assert!(closed, "{beginning:?}: the connection is ended");
        assert!(begin.elapsed() < Duration::from_secs(10), "{beginning:?}: {:?}", begin.elapsed());
    }
}

#[tokio::test]
async fn a_slow_http2_preface_has_a_deadline() {
    let (edge, _origin) = limited(json!({"nginx_config": {"http": {"client_header_timeout": "1s"}}})).await;
    for beginning in [&e2e::frames::PREFACE[..10], e2e::frames::PREFACE] {
        let outcome = exchange(edge.http, beginning, Duration::from_secs(10)).await;
        assert_ne!(outcome.end, End::Open, "{beginning:?}");
    }
}

#[tokio::test]
async fn a_slow_body_has_a_deadline() {
    let (edge, _origin) = limited(json!({"nginx_config": {"http": {"client_body_timeout": "1s"}}})).await;
    let request = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf";
    let begin = Instant::now();
    let outcome = exchange(edge.http, request, Duration::from_secs(15)).await;
    assert!(outcome.end != End::Open && begin.elapsed() < Duration::from_secs(10), "{outcome:?}");
    assert!(matches!(outcome.status(), Some(408 | 400) | None), "{:?}", outcome.statuses());
}

#[tokio::test]
async fn a_client_that_does_not_read_has_a_deadline() {
    let origin = slow_body::start(64, 1024 * 1024, Duration::ZERO).await;
    let edge = Edge::file()
        .config(json!({"nginx_config": {"http": {"send_timeout": "1s"}}}))
        .route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()}))
        .start()
        .await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request is under way", || async { (origin.open_connections() == 1).then_some(()) }).await;
    eventually("the gateway gives up on the client", || async {
        (origin.open_connections() == 0).then_some(())
    })
    .await;
    assert_ne!(raw.read_to_end(LIMIT).await.end, End::Open);
}

#[tokio::test]
async fn an_idle_connection_has_a_deadline() {
    let (edge, _origin) = limited(json!({"nginx_config": {"http": {"keepalive_timeout": "1s"}}})).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    raw.answer().await.expect("an answer");
    assert_eq!(raw.read_to_end(Duration::from_secs(10)).await.end, End::Closed);
}

#[tokio::test]
async fn a_slow_handshake_has_a_deadline() {
    let ca = e2e::certs::Authority::new("ca");
    let leaf = ca.server(&["a.test"]);
    let edge = Edge::file()
        .config(json!({"postern": {"limits": {"handshake_timeout": "1s"}}}))
        .resource("ssls", json!({"id": "a", "snis": ["a.test"], "cert": leaf.cert, "key": leaf.key}))
        .start()
        .await;
    // The head of a record that never comes.
    let outcome = exchange(edge.https, b"\x16\x03\x01\x02\x00\x01", LIMIT).await;
    assert_ne!(outcome.end, End::Open);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_over_the_limit_wait_or_are_refused_and_the_others_live() {
    let (slow, go) = held::start().await;
    let edge = Edge::file()
        .config(json!({"postern": {"limits": {"connections": 50}}}))
        .route(json!({"id": "r", "uri": "/*", "upstream": slow.upstream()}))
        .start()
        .await;
    // Those that idle would make room.
    let mut held = Vec::new();
    for _ in 0..40 {
        let mut raw = Raw::connect(edge.http).await;
        raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        held.push(raw);
    }
    eventually("all are under way", || async { (slow.requests() == 40).then_some(()) }).await;
    let mut surplus = Vec::new();
    for _ in 0..100 {
        if let Ok(stream) = tokio::net::TcpStream::connect(edge.http).await {
            surplus.push(stream);
        }
    }
    go.send_replace(true);
    for raw in &mut held {
        assert_eq!(raw.answer().await.expect("an answer").status, 200);
    }
    drop((held, surplus));
    eventually("the gateway serves when there is room again", || async {
        let mut connection = edge.connect().await;
        (connection.try_send(Call::get("/")).await.ok()?.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_honest_client_is_served_beside_stuck_ones() {
    let (edge, _origin) = limited(json!({})).await;
    let mut stuck = Vec::new();
    for number in 0..300 {
        let mut raw = Raw::connect(edge.http).await;
        match number % 3 {
            0 => {}
            1 => raw.write("GET / HTTP/1.1\r\nhost: a\r\nx-a: ").await,
            _ => raw.write("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf").await,
        }
        stuck.push(raw);
    }
    let mut connection = edge.connect().await;
    for _ in 0..50 {
        let begin = Instant::now();
        connection.send(Call::get("/")).await.expect_status(200);
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    }
}

#[tokio::test]
async fn concurrent_streams_are_limited_and_told() {
    let (edge, _origin) = limited(json!({})).await;
    let outcome = exchange(edge.http, e2e::frames::hello(), Duration::from_secs(1)).await;
    let frames = e2e::frames::parse(&outcome.bytes);
    let settings = frames.iter().find(|frame| frame.kind == e2e::frames::SETTINGS && frame.flags == 0);
    let settings = settings.expect("the settings of the gateway");
    // Six bytes each; 3 is SETTINGS_MAX_CONCURRENT_STREAMS.
    let streams = settings.payload.chunks(6).find_map(|setting| match setting {
        [0, 3, a, b, c, d] => Some(u32::from_be_bytes([*a, *b, *c, *d])),
        _ => None,
    });
    assert!(streams.is_some_and(|streams| (1..=1000).contains(&streams)), "{streams:?}");
}

#[tokio::test]
async fn files_and_memory_are_given_back_after_a_burst() {
    let (edge, _origin) = limited(json!({})).await;
    edge.get("/").await.expect_status(200);
    let (files, memory) = (edge.descriptors(), edge.resident());
    for _ in 0..5 {
        let calls = (0..100).map(|_| async {
            let mut connection = Connection::http1(edge.http).await;
            connection.send(Call::new("POST", "/").body(vec![b'x'; 50_000])).await.status
        });
        assert!(futures_util::future::join_all(calls).await.iter().all(|status| *status == 200));
    }
    // Idle connections to the origin stay in the pool.
    eventually("the files are closed", || async { (edge.descriptors() <= files + 330).then_some(()) }).await;
    assert!(edge.resident() < memory + 128 * 1024, "{memory} KiB before, {} KiB after", edge.resident());
}
