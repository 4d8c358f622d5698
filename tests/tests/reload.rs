//! A change of the configuration cuts nothing and loses nothing, however many there are.

use std::time::Duration;

use e2e::client::{Call, connect};
use e2e::load::{Account, Load};
use e2e::origin::grpc::{WordsClient, outgoing, word};
use e2e::origin::{Origin, echo, grpc, slow_body, websocket};
use e2e::{Edge, Value, eventually, json};
use futures_util::{SinkExt, StreamExt};
use http_body_util::BodyExt;
use tokio_tungstenite::tungstenite::Message;

const REQUEST: &str = "GET /steady HTTP/1.1\r\nhost: a\r\n\r\n";
const CHANGES: u64 = 100;

/// Nothing failed, and no connection died under a client that wanted to use it again.
fn assert_clean(account: &Account) {
    assert!(account.bad.is_empty(), "{} failed, the first: {:?}", account.bad.len(), account.bad.first());
    assert_eq!(account.died, 0, "connections that died on reuse");
    assert_eq!(account.announced, 0, "a reload closes no connection");
}

/// What each change does to the configuration besides the steady route.
fn turn(origin: &Origin, number: u64) -> Vec<(String, Value)> {
    let extra = json!({"uri": format!("/extra/{number}"), "upstream": origin.upstream(),
                       "plugins": {"request-id": {}, "limit-count": {"count": 10 + number, "time_window": 60}}});
    let steady = json!({"id": "steady", "uri": "/steady", "upstream_id": "u", "desc": format!("turn {number}"),
                        "plugins": {"proxy-rewrite": {"headers": {"set": {"X-Turn": number.to_string()}}}}});
    vec![(format!("routes/extra-{}", number % 10), extra), ("routes/steady".to_owned(), steady)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_changes_by_the_admin_api_fail_no_request() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    edge.put("upstreams/u", origin.upstream()).await;
    edge.put("routes/steady", json!({"uri": "/steady", "upstream_id": "u"})).await;
    edge.until_status("/steady", 200).await;
    let load = Load::start(edge.http, REQUEST, 200, 20, 500);
    for number in 0..CHANGES {
        for (path, object) in turn(&origin, number) {
            edge.put(&path, object).await;
        }
        if number % 10 == 9 {
            edge.put("upstreams/u", json!({"type": "roundrobin", "nodes": {origin.node(): 1 + number}}))
                .await;
            edge.delete(&format!("routes/extra-{}", number % 10)).await;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let account = load.finish_after(1000).await;
    assert_clean(&account);
    eventually("the last change is in use", || async {
        let seen = edge.get("/steady").await.expect_status(200).json();
        (seen["headers"]["x-turn"] == json!([(CHANGES - 1).to_string()])).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_the_file_fail_no_request() {
    let origin = echo::start().await;
    let resources = |number: u64| {
        let mut routes: Vec<Value> = turn(&origin, number)
            .into_iter()
            .map(|(path, mut route)| {
                route["id"] = json!(path.trim_start_matches("routes/"));
                route
            })
            .collect();
        routes.rotate_left(1);
        json!({"routes": routes, "upstreams": [{"id": "u", "type": "roundrobin", "nodes": {origin.node(): 1}}]})
    };
    let edge = Edge::file().resources(resources(0)).start().await;
    edge.get("/steady").await.expect_status(200);
    let load = Load::start(edge.http, REQUEST, 200, 20, 500);
    for number in 1..20 {
        edge.reload(&resources(number)).await;
        let seen = edge.get("/steady").await.expect_status(200).json();
        assert_eq!(seen["headers"]["x-turn"], json!([number.to_string()]));
    }
    assert_clean(&load.finish_after(1000).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_lived_connections_live_through_a_hundred_changes() {
    let (socket_origin, words_origin) = (websocket::start().await, grpc::start().await);
    let file_origin = slow_body::start(100, 10_000, Duration::from_millis(40)).await;
    let edge = Edge::embedded().start().await;
    let mut words_upstream = words_origin.upstream();
    words_upstream["scheme"] = json!("grpc");
    let put = async |number: u64| {
        let desc = format!("turn {number}");
        let socket = json!({"uri": "/socket", "enable_websocket": true, "desc": desc,
                            "upstream": socket_origin.upstream()});
        edge.put("routes/socket", socket).await;
        let words = json!({"uri": "/e2e.Words/*", "desc": desc, "upstream": words_upstream});
        edge.put("routes/words", words).await;
        edge.put("routes/file", json!({"uri": "/file", "desc": desc, "upstream": file_origin.upstream()}))
            .await;
    };
    put(0).await;
    edge.until_status("/file", 200).await;

    let (mut socket, _) =
        tokio_tungstenite::client_async("ws://a/socket", connect(edge.http).await).await.expect("an upgrade");
    let (sender, words) = outgoing();
    let mut chat = WordsClient::connect(edge.http).await.chat(words).await.expect("a call").into_inner();
    let mut connection = edge.connect().await;
    let download = connection.open(Call::get("/file")).await.expect("an answer");
    let download = tokio::spawn(download.into_body().collect());

    for number in 1..=CHANGES {
        put(number).await;
        let message = Message::text(format!("message {number}"));
        socket.send(message.clone()).await.expect("the WebSocket is open");
        assert_eq!(socket.next().await.expect("an answer").expect("a message"), message);
        let number = i32::try_from(number).expect("a small number");
        sender.send(word("x", number)).await.expect("the gRPC stream is open");
        assert_eq!(chat.message().await.expect("a message").expect("an answer").number, number);
    }
    // Even without their routes.
    for name in ["socket", "words", "file"] {
        edge.delete(&format!("routes/{name}")).await;
    }
    edge.until_status("/file", 404).await;
    socket.send(Message::text("after")).await.expect("the WebSocket is open");
    assert_eq!(socket.next().await.expect("an answer").expect("a message"), Message::text("after"));
    sender.send(word("after", 1)).await.expect("the gRPC stream is open");
    assert_eq!(chat.message().await.expect("a message").expect("an answer").text, "after");
    let body = download.await.expect("a task").expect("the whole body").to_bytes();
    assert_eq!(body.len(), 1_000_000);
}

#[tokio::test]
async fn counters_live_through_changes_elsewhere() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    let limit = json!({"count": 5, "time_window": 600, "rejected_code": 429, "key": "remote_addr"});
    edge.put(
        "routes/r",
        json!({"uri": "/limited", "plugins": {"limit-count": limit}, "upstream": origin.upstream()}),
    )
    .await;
    let first = edge.until_status("/limited", 200).await;
    assert_eq!(first.header("x-ratelimit-limit"), Some("5"));
    for number in 0..4 {
        edge.put("routes/other", json!({"uri": format!("/other/{number}"), "upstream": origin.upstream()}))
            .await;
        edge.until_status(&format!("/other/{number}"), 200).await;
        edge.get("/limited").await.expect_status(200);
    }
    edge.get("/limited").await.expect_status(429);
}

#[tokio::test]
async fn connections_to_an_origin_are_kept_over_changes_elsewhere() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    edge.put("routes/r", json!({"uri": "/kept", "upstream": origin.upstream()})).await;
    edge.until_status("/kept", 200).await;
    let other = echo::start().await;
    for number in 0..5 {
        edge.put("routes/other", json!({"uri": format!("/other/{number}"), "upstream": other.upstream()}))
            .await;
        edge.until_status(&format!("/other/{number}"), 200).await;
        edge.get("/kept").await.expect_status(200);
    }
    assert_eq!(origin.connections(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_plugins_in_the_file_takes_the_place_of_that_in_config_yaml() {
    let origin = echo::start().await;
    let file = |listed: &Value| {
        json!({
            "plugins": listed,
            "routes": [{"id": "1", "uri": "/echoed", "plugins": {"echo": {"body": "hi"}}, "upstream": origin.upstream()}],
        })
    };
    let edge = Edge::file()
        .config(json!({"plugins": ["key-auth"]}))
        .resources(file(&json!([{"name": "echo"}])))
        .start()
        .await;
    edge.until_status("/echoed", 200).await;
    edge.write(&file(&json!([{"name": "cors"}])));
    let refused = edge.until_status("/echoed", 503).await;
    let reason = refused.header("proxy-status").unwrap_or_default();
    assert!(reason.contains("refused"), "{refused:?}");
    edge.write(&file(&json!([{"name": "cors"}, {"name": "echo"}])));
    edge.until_status("/echoed", 200).await;
}
