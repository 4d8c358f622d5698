//! Every protocol between client and origin: HTTP/1, HTTP/2, gRPC, WebSocket, event streams, and what travels
//! beside a request.

use std::time::{Duration, Instant};

use bytes::Bytes;
use e2e::certs::Authority;
use e2e::client::{Call, Connection, End, Raw, channel, connect};
use e2e::nginx::Nginx;
use e2e::origin::grpc::{WordsClient, outgoing, word};
use e2e::origin::{Origin, chunk_drip, echo, grpc, h2_reset, recorder, slow_body, sse, stall, websocket};
use e2e::{Edge, Value, eventually, json};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Version};
use http_body_util::BodyExt;
use hyper::body::Frame;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

async fn one_route(upstream: Value) -> Edge {
    Edge::file()
        .route(json!({"id": "r", "uri": "/*", "enable_websocket": true, "upstream": upstream}))
        .start()
        .await
}

fn with(mut object: Value, name: &str, value: Value) -> Value {
    object[name] = value;
    object
}

#[tokio::test]
async fn http1_and_http2_clients_reach_an_http1_origin() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    for mut connection in [Connection::http1(edge.http).await, Connection::http2(edge.http).await] {
        for number in 0..3 {
            let call = Call::new("POST", &format!("/a/{number}?q=1")).header("x-a", "b").body("hello");
            let answer = connection.send(call).await.expect_status(200);
            assert_eq!(answer.version, connection.version());
            let seen = answer.json();
            assert_eq!(seen["version"], "HTTP/1.1");
            assert_eq!(seen["path"], format!("/a/{number}"));
            assert_eq!(seen["body"], "hello");
            assert_eq!(seen["headers"]["x-a"], json!(["b"]));
        }
    }
}

#[tokio::test]
async fn alpn_chooses_http2_or_http1_over_tls() {
    let ca = Authority::new("ca");
    let leaf = ca.server(&["a.test"]);
    let origin = echo::start().await;
    let edge = Edge::file()
        .resource("ssls", json!({"id": "a", "snis": ["a.test"], "cert": leaf.cert, "key": leaf.key}))
        .route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()}))
        .start()
        .await;
    let offers = [
        (&["h2", "http/1.1"][..], Version::HTTP_2),
        (&["http/1.1"][..], Version::HTTP_11),
        (&[][..], Version::HTTP_11),
    ];
    for (alpn, version) in offers {
        let config = ca.client_config().alpn(alpn).build();
        let mut connection = Connection::tls(edge.https, &config, "a.test").await.expect("a handshake");
        let answer = connection.send(Call::get("/")).await.expect_status(200);
        assert_eq!(answer.version, version, "{alpn:?}");
        assert_eq!(answer.json()["headers"]["host"], json!(["a.test"]));
    }
}

#[tokio::test]
async fn many_streams_of_one_http2_connection_run_at_once() {
    let origin = Origin::http(|request| async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        http::Response::new(Bytes::from(request.uri().path().to_owned()))
    })
    .await;
    let edge = one_route(origin.upstream()).await;
    let stream = connect(edge.http).await;
    let (sender, connection) = h2::client::handshake(stream).await.expect("an HTTP/2 client");
    tokio::spawn(connection);
    let begin = Instant::now();
    let calls = (0..50).map(|number| {
        let sender = sender.clone();
        async move {
            let mut sender = sender.ready().await.expect("a free stream");
            let request = http::Request::get(format!("http://a/{number}")).body(()).expect("a request");
            let (response, _) = sender.send_request(request, true).expect("a stream");
            let mut body = response.await.expect("an answer").into_body();
            assert_eq!(body.data().await.expect("a body").expect("data"), format!("/{number}"));
        }
    });
    futures_util::future::join_all(calls).await;
    assert!(begin.elapsed() < Duration::from_secs(10), "fifty at once, not one after the other");
}

#[tokio::test]
async fn grpc_calls_of_all_four_kinds_pass() {
    let service = grpc::start().await;
    let ca = Authority::new("ca");
    let leaf = ca.server(&["words.test"]);
    let edge = Edge::file()
        .resource("ssls", json!({"id": "a", "snis": ["words.test"], "cert": leaf.cert, "key": leaf.key}))
        .route(json!({"id": "r", "uri": "/e2e.Words/*", "upstream": with(service.upstream(), "scheme", json!("grpc"))}))
        .start()
        .await;
    let config = ca.client_config().alpn(&["h2"]).build();
    let clients = [
        WordsClient::connect(edge.http).await,
        WordsClient::connect_tls(edge.https, config, "words.test").await,
    ];
    for mut client in clients {
        let mut request = tonic::Request::new(word("hello", 1));
        request.metadata_mut().insert("x-test", "seen".parse().expect("metadata"));
        let answer = client.unary(request).await.expect("unary");
        assert_eq!(answer.get_ref().text, "HELLO");
        assert_eq!(answer.metadata().get("x-seen").map(|value| value.as_bytes()), Some(&b"seen"[..]));

        let failure = client.unary(tonic::Request::new(word("fail", 9))).await.expect_err("a failure");
        assert_eq!((failure.code(), failure.message()), (tonic::Code::FailedPrecondition, "asked to fail"));

        let mut count = client.count(word("fail", 3)).await.expect("server streaming").into_inner();
        for number in 1..=3 {
            assert_eq!(count.message().await.expect("a message").expect("a word").number, number);
        }
        let end = count.message().await.expect_err("the status in the trailers");
        assert_eq!(end.code(), tonic::Code::Aborted);

        let words = futures_util::stream::iter((0..100).map(|number| word("a", number)));
        let joined = client.join(words).await.expect("client streaming").into_inner();
        assert_eq!((joined.text.len(), joined.number), (100, 4950));

        // Ping and pong: nothing may be held back until the other side is done.
        let (sender, words) = outgoing();
        let mut chat = client.chat(words).await.expect("streaming").into_inner();
        for number in 0..20 {
            sender.send(word("x", number)).await.expect("a message sent");
            assert_eq!(chat.message().await.expect("a message").expect("an answer").number, number);
        }
        drop(sender);
        assert!(chat.message().await.expect("a clean end").is_none());
    }
}

#[tokio::test]
async fn what_the_gateway_itself_answers_to_grpc_is_a_grpc_status() {
    let edge = Edge::file()
        .route(json!({"id": "r", "uri": "/e2e.Words/*", "upstream":
            {"type": "roundrobin", "scheme": "grpc", "nodes": {e2e::ports::Port::free().addr().to_string(): 1}}}))
        .start()
        .await;
    let mut client = WordsClient::connect(edge.http).await;
    let failure = client.unary(tonic::Request::new(word("hello", 1))).await.expect_err("a failure");
    assert_eq!(failure.code(), tonic::Code::Unavailable, "{failure:?}");
}

#[tokio::test]
async fn a_stream_that_the_origin_resets_is_reset_or_refused_for_the_client() {
    for before in [h2_reset::Before::Nothing, h2_reset::Before::Headers, h2_reset::Before::HalfTheBody] {
        let origin = h2_reset::start(before, h2::Reason::INTERNAL_ERROR).await;
        let edge = one_route(with(origin.upstream(), "scheme", json!("grpc"))).await;
        let mut connection = Connection::http2(edge.http).await;
        match connection.try_send(Call::get("/")).await {
            // The reset may overtake a head that nobody has passed on yet.
            Ok(answer) => {
                assert!(before != h2_reset::Before::HalfTheBody && answer.status == 502, "{answer:?}")
            }
            Err(_) => assert_ne!(before, h2_reset::Before::Nothing),
        }
        // The connection of the client is none the worse for it.
        assert!(!connection.is_closed());
    }
}

#[tokio::test]
async fn websockets_pass_both_ways() {
    let origin = websocket::start().await;
    let edge = one_route(origin.upstream()).await;
    let stream = connect(edge.http).await;
    let (mut socket, answer) =
        tokio_tungstenite::client_async("ws://a/chat", stream).await.expect("an upgrade");
    assert_eq!(answer.status(), 101);
    for size in [0, 1, 125, 126, 65_536, 1_000_000] {
        let message = Message::binary(vec![7; size]);
        socket.send(message.clone()).await.expect("a message sent");
        assert_eq!(socket.next().await.expect("an answer").expect("a message"), message, "{size} bytes");
    }
    socket.close(None).await.expect("a close frame");
    eventually("the origin's connection ends", || async { (origin.open_connections() == 0).then_some(()) })
        .await;
}

#[tokio::test]
async fn a_route_without_websockets_does_not_upgrade() {
    let origin = websocket::start().await;
    let edge =
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()})).start().await;
    let stream = connect(edge.http).await;
    assert!(tokio_tungstenite::client_async("ws://a/chat", stream).await.is_err());
}

#[tokio::test]
async fn a_refused_upgrade_is_an_ordinary_answer() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    let mut raw = Raw::connect(edge.http).await;
    let upgrade = "GET /status/403 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    raw.write(upgrade).await;
    assert_eq!(raw.answer().await.expect("an answer").status, 403);
    raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(raw.answer().await.expect("an answer").status, 200);
}

#[tokio::test]
async fn events_are_not_held_back() {
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let (origin, events) = sse::start().await;
        let edge = one_route(origin.upstream()).await;
        let mut connection = match version {
            Version::HTTP_2 => Connection::http2(edge.http).await,
            _ => Connection::http1(edge.http).await,
        };
        let response = connection.open(Call::get("/events")).await.expect("the head before any event");
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut body = response.into_body();
        for number in 0..5 {
            events.send(format!("event {number}")).await.expect("the stream takes events");
            let frame = tokio::time::timeout(Duration::from_secs(10), body.frame()).await;
            let data = frame.expect("the event at once").expect("a frame").expect("a good frame");
            assert_eq!(data.into_data().expect("data"), format!("data: event {number}\n\n"));
        }
    }
}

#[tokio::test]
async fn an_answer_in_dripping_chunks_is_passed_as_it_comes() {
    let origin = chunk_drip::start(&["one", "two", "three", "four"], Duration::from_millis(50)).await;
    let edge = one_route(origin.upstream()).await;
    let mut connection = edge.connect().await;
    let mut body = connection.open(Call::get("/")).await.expect("an answer").into_body();
    let first = body.frame().await.expect("a frame").expect("a good frame").into_data().expect("data");
    assert_eq!(first, "one");
    let rest = body.collect().await.expect("the rest").to_bytes();
    assert_eq!(rest, "twothreefour");
}

#[tokio::test]
async fn a_long_upload_streams_and_its_length_is_kept() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    let size = 8 * 1024 * 1024;
    for mut connection in [Connection::http1(edge.http).await, Connection::http2(edge.http).await] {
        let seen =
            connection.send(Call::new("PUT", "/").body(vec![b'x'; size])).await.expect_status(200).json();
        assert_eq!(seen["length"], size);
        let (sender, body) = channel();
        let response = connection.open_with(Call::new("PUT", "/"), body);
        let feed = async {
            for _ in 0..64 {
                let chunk = Frame::data(Bytes::from(vec![b'y'; 16 * 1024]));
                sender.send(chunk).await.expect("the body is taken");
            }
            drop(sender);
        };
        let (response, ()) = tokio::join!(response, feed);
        let body = response.expect("an answer").into_body().collect().await.expect("a body").to_bytes();
        let seen: Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(seen["length"], 64 * 16 * 1024);
    }
}

#[tokio::test]
async fn a_slow_reader_holds_the_origin_back() {
    // The origin can send 256 MB at once; the client reads nothing at first.
    let origin = slow_body::start(256, 1024 * 1024, Duration::ZERO).await;
    let edge = one_route(origin.upstream()).await;
    let before = edge.resident();
    let mut raw = Raw::connect(edge.http).await;
    raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    raw.read_until("\r\n\r\n").await;
    let mut most = 0;
    for _ in 0..100 {
        most = most.max(edge.resident());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(most < before + 64 * 1024, "{before} KiB before, {most} KiB while the client stalls");
    assert_eq!(raw.take(1024 * 1024).await.expect("the beginning").len(), 1024 * 1024);
}

#[tokio::test]
async fn expect_continue_is_answered_before_the_body() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n").await;
    assert_eq!(raw.answer().await.expect("an interim answer").status, 100);
    raw.write("hello").await;
    assert_eq!(raw.answer().await.expect("an answer").expect_status(200).json()["body"], "hello");
}

#[tokio::test]
async fn expect_continue_is_refused_where_the_body_is_not_wanted() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    edge.reload(&json!({"routes": [{"id": "r", "uri": "/only", "upstream": origin.upstream()}]})).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write("POST /none HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n").await;
    assert_eq!(raw.answer().await.expect("an answer").status, 404);
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let origin = grpc_like().await;
    let edge = one_route(with(origin.upstream(), "scheme", json!("grpc"))).await;
    let mut connection = Connection::http2(edge.http).await;
    let (sender, body) = channel();
    let call = Call::new("POST", "/").header("te", "trailers");
    let feed = async {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("42"));
        sender.send(Frame::data("hello".into())).await.expect("the body is taken");
        sender.send(Frame::trailers(trailers)).await.expect("the trailers are taken");
        drop(sender);
    };
    let (response, ()) = tokio::join!(connection.open_with(call, body), feed);
    let body = response.expect("an answer").into_body().collect().await.expect("a body");
    let trailers = body.trailers().cloned().expect("trailers");
    assert_eq!(trailers["x-got"], "42");
}

/// An HTTP/2 origin that sends the trailer `x-sum` of a request back as `x-got`.
async fn grpc_like() -> Origin {
    Origin::tcp(|stream, seen| async move {
        e2e::origin::serve_with(stream, move |request: http::Request<hyper::body::Incoming>| {
            seen.request();
            async move {
                let body = request.into_body().collect().await.expect("a body");
                let sum = body.trailers().and_then(|trailers| trailers.get("x-sum").cloned());
                let mut trailers = HeaderMap::new();
                trailers.insert("x-got", sum.unwrap_or(HeaderValue::from_static("none")));
                let frames = [
                    Ok::<_, std::convert::Infallible>(Frame::data(body.to_bytes())),
                    Ok(Frame::trailers(trailers)),
                ];
                http::Response::new(http_body_util::StreamBody::new(futures_util::stream::iter(frames)))
            }
        })
        .await;
    })
    .await
}

#[tokio::test]
async fn trailers_of_http1_pass_to_a_client_that_wants_them() {
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 42\r\n\r\n";
    let (origin, _records) = recorder::start(answer).await;
    let edge = one_route(origin.upstream()).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write("GET / HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: te\r\n\r\n").await;
    let answer = raw.answer().await.expect("an answer").expect_status(200);
    assert_eq!(answer.text(), "hello");
    let trailers = answer.trailers.expect("trailers");
    assert_eq!(trailers["x-sum"], "42");
}

#[tokio::test]
async fn head_and_bodiless_answers_have_no_body() {
    let nginx = Nginx::start("location = /none { return 204; }").await;
    nginx.file("a.txt", b"hello");
    let edge = one_route(nginx.upstream()).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write("HEAD /a.txt HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let head = raw.read_until("\r\n\r\n").await;
    let head = String::from_utf8_lossy(&head).to_lowercase();
    assert!(head.starts_with("http/1.1 200") && head.contains("content-length: 5"), "{head}");
    raw.write("GET /none HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(raw.answer().await.expect("an answer").status, 204);
    raw.write("GET /a.txt HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(raw.answer().await.expect("an answer").expect_status(200).text(), "hello");
}

#[tokio::test]
async fn a_large_file_of_nginx_arrives_whole() {
    let nginx = Nginx::start("").await;
    let content: Vec<u8> = (0..20_000_000u32).map(|number| (number % 251) as u8).collect();
    nginx.file("large", &content);
    let edge = one_route(nginx.upstream()).await;
    for mut connection in [Connection::http1(edge.http).await, Connection::http2(edge.http).await] {
        let answer = connection.send(Call::get("/large")).await.expect_status(200);
        assert!(answer.body == content, "{} bytes over {:?}", answer.body.len(), connection.version());
    }
    let part = edge.send(Call::get("/large").header("range", "bytes=10-19")).await.expect_status(206);
    assert_eq!(part.body, content[10..20]);
}

#[tokio::test]
async fn http_1_0_clients_are_served_and_closed() {
    let origin = chunk_drip::start(&["one", "two"], Duration::from_millis(1)).await;
    let edge = one_route(origin.upstream()).await;
    let request = "GET / HTTP/1.0\r\nhost: a\r\n\r\n";
    let outcome = e2e::client::exchange(edge.http, request, Duration::from_secs(5)).await;
    assert_eq!(outcome.end, End::Closed);
    let text = outcome.text();
    assert!(text.ends_with("onetwo"), "an HTTP/1.0 client knows no chunks: {text}");
    assert!(!text.to_lowercase().contains("transfer-encoding"), "{text}");
}

#[tokio::test]
async fn a_client_that_leaves_before_its_answer_ends_the_request() {
    let origin = stall::start().await;
    let edge = one_route(origin.upstream()).await;
    let mut client = connect(edge.http).await;
    client.write_all(b"GET /left HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    eventually("the origin has the request", || async { (origin.requests() == 1).then_some(()) }).await;
    drop(client);
    // Long before the upstream's time-out: nobody waits for it any more.
    let line = eventually("its line in the log", || async {
        edge.output().lines().find(|line| line.contains("GET /left")).map(str::to_owned)
    })
    .await;
    assert!(line.contains(" 499 ") && line.ends_with("client_closed"), "{line}");
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    let mut raw = Raw::connect(edge.http).await;
    let requests: String = (0..10).map(|n| format!("GET /{n} HTTP/1.1\r\nhost: a\r\n\r\n")).collect();
    raw.write(requests).await;
    for number in 0..10 {
        let answer = raw.answer().await.expect("an answer").expect_status(200);
        assert_eq!(answer.json()["path"], format!("/{number}"));
    }
}

#[tokio::test]
async fn the_host_of_an_absolute_target_replaces_the_field() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write("GET http://b.test/x?y=1 HTTP/1.1\r\nhost: a.test\r\n\r\n").await;
    let seen = raw.answer().await.expect("an answer").expect_status(200).json();
    assert_eq!((&seen["headers"]["host"], &seen["path"]), (&json!(["b.test"]), &json!("/x")));
}

#[tokio::test]
async fn proxy_protocol_tells_the_address_of_the_client() {
    let origin = echo::start().await;
    let edge = Edge::file()
        .proxy_protocol()
        .config(json!({"apisix": {"trusted_addresses": ["127.0.0.0/8"]}}))
        .route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()}))
        .start()
        .await;
    let v1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n".to_vec();
    let mut v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    v2.extend_from_slice(&[192, 0, 2, 7, 198, 51, 100, 1, 0xdc, 0x04, 0x01, 0xbb]);
    let v6 = b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 443\r\n".to_vec();
    for (header, client) in [(v1, "192.0.2.7"), (v2, "192.0.2.7"), (v6, "2001:db8::7")] {
        let mut raw = Raw::connect(edge.proxied).await;
        raw.write(&header).await;
        raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let seen = raw.answer().await.expect("an answer").expect_status(200).json();
        assert_eq!(seen["headers"]["x-real-ip"], json!([client]));
    }
    let bad: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"PROXY TCP4 999.0.2.7 198.51.100.1 56324 443\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443 and more than a line of this kind may ever be long, which is one hundred and seven bytes\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x31\x11\x00\x0c\xc0\x00\x02\x07\xc6\x33\x64\x01\xdc\x04\x01\xbbGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ];
    for header in bad {
        let outcome = e2e::client::exchange(edge.proxied, header, Duration::from_secs(15)).await;
        assert_ne!(outcome.status(), Some(200), "{}", String::from_utf8_lossy(header));
        assert_ne!(outcome.end, End::Open, "{}", String::from_utf8_lossy(header));
    }
}

#[tokio::test]
async fn forwarded_headers_are_ours_unless_the_client_is_trusted() {
    let origin = echo::start().await;
    let sent = || {
        Call::get("/")
            .header("host", "shop.test")
            .header("x-forwarded-for", "203.0.113.9")
            .header("x-forwarded-proto", "https")
            .header("x-forwarded-host", "evil.test")
            .header("x-forwarded-port", "8443")
            .header("x-real-ip", "203.0.113.9")
    };
    let route = json!({"id": "r", "uri": "/*", "upstream": origin.upstream()});
    // By default APISIX believes an X-Real-IP that comes from loopback.
    let strict = json!({"nginx_config": {"http": {"real_ip_from": ["192.0.2.1"]}}});
    let untrusting = Edge::file().config(strict.clone()).route(route.clone()).start().await;
    let headers = untrusting.send(sent()).await.expect_status(200).json()["headers"].clone();
    assert_eq!(headers["x-forwarded-for"], json!(["127.0.0.1"]));
    assert_eq!(headers["x-forwarded-proto"], json!(["http"]));
    assert_eq!(headers["x-forwarded-host"], json!(["shop.test"]));
    assert_eq!(headers["x-forwarded-port"], json!([untrusting.http.port().to_string()]));
    assert_eq!(headers["x-real-ip"], json!(["127.0.0.1"]));

    let trusting = Edge::file()
        .config(strict)
        .config(json!({"apisix": {"trusted_addresses": ["127.0.0.1"]}}))
        .route(route)
        .start()
        .await;
    let headers = trusting.send(sent()).await.expect_status(200).json()["headers"].clone();
    assert_eq!(headers["x-forwarded-for"], json!(["203.0.113.9, 127.0.0.1"]));
    assert_eq!(headers["x-forwarded-proto"], json!(["https"]));
    assert_eq!(headers["x-forwarded-host"], json!(["evil.test"]));
    assert_eq!(headers["x-forwarded-port"], json!(["8443"]));
}

#[tokio::test]
async fn hop_by_hop_headers_end_at_the_gateway() {
    let origin = echo::start().await;
    let edge = one_route(origin.upstream()).await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write(
        "GET / HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, x-secret, x-forwarded-for\r\nx-secret: 1\r\n\
         keep-alive: timeout=5\r\nproxy-connection: close\r\nte: gzip\r\nx-kept: 1\r\n\r\n",
    )
    .await;
    let headers = raw.answer().await.expect("an answer").expect_status(200).json()["headers"].clone();
    for name in ["x-secret", "keep-alive", "proxy-connection", "te"] {
        assert!(headers[name].is_null(), "{name} in {headers}");
    }
    assert_eq!(headers["x-kept"], json!(["1"]));
    assert_eq!(headers["x-forwarded-for"], json!(["127.0.0.1"]), "ours survives being named");
}
