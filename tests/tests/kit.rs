//! The kit itself, without a gateway between: what another test relies on must be true here first.

use std::time::Duration;

use e2e::certs::{Authority, KeyKind};
use e2e::client::{Call, Connection, End, Raw, exchange};
use e2e::etcd::Etcd;
use e2e::load::Load;
use e2e::nginx::Nginx;
use e2e::origin::grpc::{WordsClient, outgoing, word};
use e2e::origin::keepalive_race::Death;
use e2e::origin::{
    chunk_drip, early_close, echo, grpc, h2_reset, keepalive_race, malformed, recorder, reset, slow_body,
    sse, stall, websocket,
};
use e2e::{eventually, json};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

const SHORT: Duration = Duration::from_millis(300);

#[tokio::test]
async fn echo_tells_what_it_got_over_http1_and_http2() {
    let origin = echo::named("left").await;
    for mut connection in [Connection::http1(origin.addr).await, Connection::http2(origin.addr).await] {
        let call = Call::new("POST", "/a?b=1").header("x-test", "one").header("x-test", "two").body("hello");
        let answer = connection.send(call).await.expect_status(200);
        let account = answer.json();
        assert_eq!(account["method"], "POST");
        assert_eq!(account["path"], "/a");
        assert_eq!(account["query"], "b=1");
        assert_eq!(account["headers"]["x-test"], json!(["one", "two"]));
        assert_eq!(account["body"], "hello");
        assert_eq!(answer.header("x-origin"), Some("left"));
    }
    assert_eq!((origin.connections(), origin.requests()), (2, 2));
}

#[tokio::test]
async fn a_stopped_origin_refuses_and_can_be_replaced_in_its_place() {
    let origin = echo::start().await;
    let addr = origin.stop().await;
    assert!(tokio::net::TcpStream::connect(addr).await.is_err());
    let _again = echo::named_at(addr, "again").await;
    assert_eq!(Call::get("/").send_to(addr).await.json()["name"], "again");
}

#[tokio::test]
async fn odd_origins_are_odd() {
    let request = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let stalled = stall::after("HTTP/1.1 200 OK\r\n").await;
    let outcome = exchange(stalled.addr, request, SHORT).await;
    assert_eq!((outcome.text().as_str(), outcome.end), ("HTTP/1.1 200 OK\r\n", End::Open));

    let closed = early_close::after("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await;
    assert_eq!(exchange(closed.addr, request, SHORT).await.end, End::Closed);

    let gone = reset::after("").await;
    assert_eq!(exchange(gone.addr, request, SHORT).await.end, End::Reset);

    let drip = chunk_drip::start(&["one", "two", "three"], Duration::from_millis(5)).await;
    assert_eq!(Call::get("/").send_to(drip.addr).await.text(), "onetwothree");

    let slow = slow_body::start(3, 10, Duration::from_millis(5)).await;
    assert_eq!(Call::get("/").send_to(slow.addr).await.body.len(), 30);

    let bad = malformed::start(malformed::ANSWERS[0]).await;
    assert_eq!(exchange(bad.addr, request, SHORT).await.status(), Some(0));
}

#[tokio::test]
async fn the_keepalive_race_answers_once_and_dies_on_reuse() {
    for (death, end) in [(Death::Close, End::Closed), (Death::Reset, End::Reset)] {
        let origin = keepalive_race::start(death).await;
        let mut raw = Raw::connect(origin.addr).await;
        raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert_eq!(raw.answer().await.expect("the first answer").text(), "first");
        raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert_eq!(raw.answer().await.expect_err("no second answer"), end);
    }
}

#[tokio::test]
async fn the_recorder_keeps_exact_bytes() {
    let (origin, records) = recorder::ok().await;
    let request = "GET /a HTTP/1.1\r\nHost:  odd\r\nX-b: C\r\n\r\n";
    assert_eq!(exchange(origin.addr, request, SHORT).await.status(), Some(200));
    assert_eq!(records.wait_for("X-b").await, request);
}

#[tokio::test]
async fn server_sent_events_come_when_they_are_sent() {
    let (origin, events) = sse::start().await;
    let mut raw = Raw::connect(origin.addr).await;
    raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    events.send("one".to_owned()).await.expect("the stream takes events");
    raw.read_until("data: one\n\n").await;
}

#[tokio::test]
async fn the_websocket_echoes() {
    let origin = websocket::start().await;
    let stream = e2e::client::connect(origin.addr).await;
    let (mut socket, _) = tokio_tungstenite::client_async("ws://a/", stream).await.expect("an upgrade");
    socket.send(Message::text("hello")).await.expect("a message sent");
    assert_eq!(socket.next().await.expect("an answer").expect("a message"), Message::text("hello"));
}

#[tokio::test]
async fn grpc_calls_of_all_four_kinds_work_in_cleartext_and_over_tls() {
    let ca = Authority::new("ca");
    let leaf = ca.server(&["words.test"]);
    let plain = grpc::start().await;
    let secure = grpc::tls(leaf.server_config(&["h2"])).await;
    let config = ca.client_config().alpn(&["h2"]).build();
    let clients = [
        WordsClient::connect(plain.addr).await,
        WordsClient::connect_tls(secure.addr, config, "words.test").await,
    ];
    for mut client in clients {
        let answer = client.unary(tonic::Request::new(word("hello", 1))).await.expect("unary");
        assert_eq!(answer.get_ref().text, "HELLO");
        let failure = client.unary(tonic::Request::new(word("fail", 9))).await.expect_err("a failure");
        assert_eq!(failure.code(), tonic::Code::FailedPrecondition);
        let mut count = client.count(word("n", 3)).await.expect("server streaming").into_inner();
        let mut numbers = Vec::new();
        while let Some(next) = count.message().await.expect("a message") {
            numbers.push(next.number);
        }
        assert_eq!(numbers, [1, 2, 3]);
        let words = futures_util::stream::iter([word("a", 1), word("b", 2)]);
        assert_eq!(client.join(words).await.expect("client streaming").into_inner(), word("ab", 3));
        let (sender, words) = outgoing();
        let mut chat = client.chat(words).await.expect("streaming").into_inner();
        for number in 1..4 {
            sender.send(word("x", number)).await.expect("a message sent");
            assert_eq!(chat.message().await.expect("a message").expect("an answer").number, number);
        }
    }
}

#[tokio::test]
async fn an_http2_origin_resets_its_streams() {
    let origin = h2_reset::start(h2_reset::Before::Nothing, h2::Reason::REFUSED_STREAM).await;
    let mut connection = Connection::http2(origin.addr).await;
    assert!(connection.try_send(Call::get("/")).await.is_err());
    assert_eq!(origin.requests(), 1);
}

#[tokio::test]
async fn certificates_are_accepted_by_those_who_trust_the_authority_alone() {
    let (ca, other) = (Authority::new("ca"), Authority::new("other"));
    let below = ca.intermediate("below");
    for leaf in [ca.server(&["a.test"]), below.server(&["a.test"]), ca.server_with(&["a.test"], KeyKind::Rsa)]
    {
        let origin = echo::tls(leaf.server_config(&["http/1.1"]), "tls").await;
        let trusting = ca.client_config().build();
        let mut connection = Connection::tls(origin.addr, &trusting, "a.test").await.expect("a handshake");
        connection.send(Call::get("/")).await.expect_status(200);
        let refusing = other.client_config().build();
        assert!(Connection::tls(origin.addr, &refusing, "a.test").await.is_err());
        assert!(Connection::tls(origin.addr, &trusting, "b.test").await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_load_counts_what_goes_right_and_what_dies() {
    let good = echo::start().await;
    let request = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let load = Load::start(good.addr, request, 200, 4, 400);
    eventually("each client has connected", || async { (good.connections() == 4).then_some(()) }).await;
    let account = load.finish_after(20).await;
    assert!(account.good >= 20 && account.bad.is_empty() && account.died == 0, "{account:?}");
    assert_eq!(good.connections(), 4);

    let dying = keepalive_race::start(Death::Close).await;
    let load = Load::start(dying.addr, request, 200, 2, 200);
    eventually("ten connections are made", || async { (dying.connections() >= 10).then_some(()) }).await;
    assert!(load.finish().await.died > 0);
}

#[tokio::test]
async fn etcd_can_be_killed_emptied_and_compacted() {
    let mut etcd = Etcd::start().await;
    etcd.put("routes/1", &json!({"uri": "/a"})).await;
    etcd.compact().await;
    etcd.kill();
    etcd.start_again().await;
    assert_eq!(etcd.get("routes/1").await, Some(json!({"uri": "/a"})));
    assert_eq!(etcd.keys().await, ["/apisix/routes/1"]);
    etcd.kill();
    etcd.wipe();
    etcd.start_again().await;
    assert_eq!(etcd.get("routes/1").await, None);
}

#[tokio::test]
async fn nginx_serves_files() {
    let nginx = Nginx::start("location /no { return 404; }").await;
    nginx.file("a.txt", b"hello");
    assert_eq!(Call::get("/a.txt").send_to(nginx.port.addr()).await.text(), "hello");
    Call::get("/no").send_to(nginx.port.addr()).await.expect_status(404);
}
