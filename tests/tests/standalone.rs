//! The whole configuration by one PUT: `/apisix/admin/configs`, as the Ingress Controller and ADC use it.

use e2e::client::Call;
use e2e::origin::{Origin, echo};
use e2e::{ADMIN_KEY, Answer, Edge, Value, eventually, json};

/// Without any configuration the gateway is not ready; it is alive and takes one.
async fn started() -> Edge {
    let edge = Edge::standalone().launch();
    eventually("the Admin API answers", || async {
        tokio::net::TcpStream::connect(edge.admin).await.ok().map(drop)
    })
    .await;
    edge
}

async fn put(edge: &Edge, digest: &str, body: &Value) -> Answer {
    let call = Call::new("PUT", "/apisix/admin/configs").header("x-api-key", ADMIN_KEY);
    let call = if digest.is_empty() { call } else { call.header("x-digest", digest) };
    call.json(body).send_to(edge.admin).await
}

fn route(origin: &Origin, id: &str, index: u64) -> Value {
    json!({"id": id, "uri": format!("/{id}"), "modifiedIndex": index, "upstream": origin.upstream()})
}

#[tokio::test]
async fn a_configuration_is_put_read_and_served() {
    let origin = echo::start().await;
    let edge = started().await;
    let body = json!({"routes": [route(&origin, "one", 1)], "routes_conf_version": 1});
    put(&edge, "d1", &body).await.expect_status(202);
    edge.until_status("/one", 200).await;
    let answer = edge.call_admin("GET", "configs", None).await.expect_status(200);
    assert_eq!(answer.header("x-digest"), Some("d1"));
    assert!(answer.header("x-last-modified").is_some());
    assert_eq!(answer.json()["routes"][0]["uri"], "/one");
    let head = Call::new("HEAD", "/apisix/admin/configs").header("x-api-key", ADMIN_KEY);
    assert_eq!(head.send_to(edge.admin).await.expect_status(200).header("x-digest"), Some("d1"));
}

#[tokio::test]
async fn the_same_digest_changes_nothing() {
    let origin = echo::start().await;
    let edge = started().await;
    let one = json!({"routes": [route(&origin, "one", 1)], "routes_conf_version": 1});
    put(&edge, "d1", &one).await.expect_status(202);
    edge.until_status("/one", 200).await;
    let two = json!({"routes": [route(&origin, "two", 2)], "routes_conf_version": 2});
    put(&edge, "d1", &two).await.expect_status(204);
    edge.get("/two").await.expect_status(404);
    put(&edge, "d2", &two).await.expect_status(202);
    edge.until_status("/two", 200).await;
    edge.get("/one").await.expect_status(404);
}

#[tokio::test]
async fn versions_decide_kind_by_kind() {
    let origin = echo::start().await;
    let edge = started().await;
    let body = |routes: Value, version: u64| json!({"routes": routes, "routes_conf_version": version});
    put(&edge, "d1", &body(json!([route(&origin, "one", 1)]), 5)).await.expect_status(202);
    edge.until_status("/one", 200).await;
    // Less than what stands is a mistake of the sender, equal means unchanged.
    put(&edge, "d2", &body(json!([route(&origin, "two", 2)]), 4)).await.expect_status(400);
    put(&edge, "d3", &body(json!([route(&origin, "two", 2)]), 5)).await.expect_status(202);
    edge.get("/one").await.expect_status(200);
    edge.get("/two").await.expect_status(404);
    put(&edge, "d4", &body(json!([route(&origin, "two", 2)]), 6)).await.expect_status(202);
    edge.until_status("/two", 200).await;
}

#[tokio::test]
async fn an_invalid_configuration_is_refused_whole() {
    let origin = echo::start().await;
    let edge = started().await;
    put(&edge, "d1", &json!({"routes": [route(&origin, "one", 1)]})).await.expect_status(202);
    edge.until_status("/one", 200).await;
    let bad = json!({"routes": [route(&origin, "two", 2), {"id": "bad", "uri": 5}]});
    put(&edge, "d2", &bad).await.expect_status(400);
    put(&edge, "", &json!({"routes": []})).await.expect_status(400);
    edge.get("/one").await.expect_status(200);
    edge.get("/two").await.expect_status(404);
}

#[tokio::test]
async fn yaml_is_taken_and_given_on_request() {
    let origin = echo::start().await;
    let edge = started().await;
    let text = format!(
        "routes:\n  - id: one\n    uri: /one\n    upstream:\n      type: roundrobin\n      nodes:\n        \"{}\": 1\n",
        origin.node()
    );
    let call = Call::new("PUT", "/apisix/admin/configs")
        .header("x-api-key", ADMIN_KEY)
        .header("x-digest", "d1")
        .header("content-type", "application/yaml")
        .body(text);
    call.send_to(edge.admin).await.expect_status(202);
    edge.until_status("/one", 200).await;
    let call = Call::get("/apisix/admin/configs")
        .header("x-api-key", ADMIN_KEY)
        .header("accept", "application/yaml");
    let answer = call.send_to(edge.admin).await.expect_status(200);
    assert!(answer.text().contains("uri: /one"), "{}", answer.text());
}

#[tokio::test]
async fn the_last_good_configuration_serves_after_a_restart() {
    let origin = echo::start().await;
    let mut edge = started().await;
    put(&edge, "d1", &json!({"routes": [route(&origin, "one", 1)]})).await.expect_status(202);
    edge.until_status("/one", 200).await;
    assert!(edge.terminate().await.success());
    edge.start_again().await;
    edge.get("/one").await.expect_status(200);
}
