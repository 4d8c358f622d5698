//! A real etcd with APISIX's own keys: served as it is, written as APISIX would, and survived when it is gone,
//! emptied or compacted.

use std::time::Duration;

use e2e::etcd::Etcd;
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};

/// What APISIX 3 leaves in etcd for a route.
fn stored(origin: &Origin, id: &str, uri: &str) -> Value {
    json!({"id": id, "uri": uri, "priority": 0, "status": 1, "create_time": 1_700_000_000,
           "update_time": 1_700_000_000,
           "upstream": {"type": "roundrobin", "nodes": {origin.node(): 1}, "scheme": "http",
                        "hash_on": "vars", "pass_host": "pass"}})
}

#[tokio::test]
async fn what_apisix_left_in_etcd_is_served() {
    let origin = echo::start().await;
    let etcd = Etcd::start().await;
    // APISIX keeps an empty marker under each kind.
    for kind in ["routes", "services", "upstreams", "consumers", "ssls", "plugin_metadata"] {
        etcd.put_raw(&format!("/apisix/{kind}/"), "init_dir").await;
    }
    etcd.put("routes/1", &stored(&origin, "1", "/direct")).await;
    etcd.put("upstreams/u", &json!({"id": "u", "type": "roundrobin", "nodes": {origin.node(): 1}})).await;
    etcd.put("services/s", &json!({"id": "s", "upstream_id": "u", "plugins": {"key-auth": {}}})).await;
    etcd.put("routes/2", &json!({"id": "2", "uri": "/by-service", "service_id": "s"})).await;
    etcd.put("consumers/ann", &json!({"username": "ann", "plugins": {}})).await;
    let credential = json!({"id": "c", "plugins": {"key-auth": {"key": "secret"}}});
    etcd.put("consumers/ann/credentials/c", &credential).await;
    let edge = Edge::etcd(&etcd).start().await;
    edge.get("/direct").await.expect_status(200);
    edge.get("/by-service").await.expect_status(401);
    let call = e2e::client::Call::get("/by-service").header("apikey", "secret");
    edge.send(call).await.expect_status(200);
}

#[tokio::test]
async fn an_etcd_that_answers_is_not_called_stale() {
    let etcd = Etcd::start().await;
    let edge = Edge::etcd(&etcd).start().await;
    // Past the two seconds after which a start without etcd serves its snapshot.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let config = edge.call_control("/v1/config").await.expect_status(200).json();
    assert_eq!(config["stale"], Value::Null);
}

#[tokio::test]
async fn changes_in_etcd_arrive_and_bad_ones_are_set_aside() {
    let origin = echo::start().await;
    let etcd = Etcd::start().await;
    let edge = Edge::etcd(&etcd).start().await;
    edge.get("/a").await.expect_status(404);
    etcd.put("routes/1", &stored(&origin, "1", "/a")).await;
    edge.until_status("/a", 200).await;
    etcd.put_raw("/apisix/routes/broken", "{\"uri\": ").await;
    etcd.put("routes/2", &stored(&origin, "2", "/b")).await;
    edge.until_status("/b", 200).await;
    etcd.delete("routes/1").await;
    edge.until_status("/a", 404).await;
}

#[tokio::test]
async fn the_admin_api_writes_apisix_keys() {
    let origin = echo::start().await;
    let etcd = Etcd::start().await;
    let edge = Edge::etcd(&etcd).start().await;
    let answer = edge.put("routes/1", json!({"uri": "/a", "upstream": origin.upstream()})).await;
    assert_eq!(answer.status, 201);
    assert_eq!(answer.json()["key"], "/apisix/routes/1");
    let value = etcd.get("routes/1").await.expect("the key in etcd");
    assert_eq!((&value["id"], &value["uri"], &value["status"]), (&json!("1"), &json!("/a"), &json!(1)));
    edge.until_status("/a", 200).await;
    edge.put("consumers", json!({"username": "ann", "plugins": {"key-auth": {"key": "k"}}})).await;
    assert!(etcd.get("consumers/ann").await.is_some());
    edge.delete("routes/1").await;
    assert!(etcd.get("routes/1").await.is_none());
}

#[tokio::test]
async fn two_gateways_on_one_etcd_agree() {
    let origin = echo::start().await;
    let etcd = Etcd::start().await;
    let (left, right) = (Edge::etcd(&etcd).start().await, Edge::etcd(&etcd).start().await);
    left.put("routes/1", json!({"uri": "/a", "upstream": origin.upstream()})).await;
    right.until_status("/a", 200).await;
    right.delete("routes/1").await;
    left.until_status("/a", 404).await;
}

#[tokio::test]
async fn without_etcd_the_gateway_serves_on_and_even_starts() {
    let origin = echo::start().await;
    let mut etcd = Etcd::start().await;
    etcd.put("routes/1", &stored(&origin, "1", "/a")).await;
    let mut edge = Edge::etcd(&etcd).start().await;
    edge.get("/a").await.expect_status(200);
    etcd.kill();
    edge.get("/a").await.expect_status(200);
    let write = json!({"uri": "/b", "upstream": origin.upstream()});
    edge.call_admin("PUT", "routes/2", Some(&write)).await.expect_status(503);

    assert!(edge.terminate().await.success());
    edge.start_again().await;
    edge.get("/a").await.expect_status(200);
    eventually("it says that its configuration is stale", || async {
        let readiness = edge.readiness().await?.text();
        (readiness.contains("stale") || edge.output().contains("stale")).then_some(())
    })
    .await;

    etcd.start_again().await;
    etcd.put("routes/2", &stored(&origin, "2", "/b")).await;
    edge.until_status("/b", 200).await;
}

#[tokio::test]
async fn an_etcd_that_comes_back_empty_takes_nothing_away_until_a_restart() {
    let origin = echo::start().await;
    let mut etcd = Etcd::start().await;
    // Several writes, so that the revisions of the new etcd are lower than what was seen.
    for number in 0..20 {
        etcd.put("routes/1", &stored(&origin, "1", &format!("/turn-{number}"))).await;
    }
    etcd.put("routes/1", &stored(&origin, "1", "/old")).await;
    let mut edge = Edge::etcd(&etcd).start().await;
    edge.get("/old").await.expect_status(200);
    etcd.kill();
    etcd.wipe();
    etcd.start_again().await;
    // A lost disk is not a wish to serve nothing. What is new is taken all the same.
    etcd.put("routes/2", &stored(&origin, "2", "/new")).await;
    edge.until_status("/new", 200).await;
    edge.get("/old").await.expect_status(200);
    assert!(edge.terminate().await.success());
    edge.start_again().await;
    edge.until_status("/old", 404).await;
    edge.get("/new").await.expect_status(200);
}

#[tokio::test]
async fn compaction_loses_no_change() {
    let origin = echo::start().await;
    let mut etcd = Etcd::start().await;
    etcd.put("routes/1", &stored(&origin, "1", "/a")).await;
    let edge = Edge::etcd(&etcd).start().await;
    edge.get("/a").await.expect_status(200);
    // While the gateway is watching: nothing must happen.
    etcd.compact().await;
    etcd.put("routes/2", &stored(&origin, "2", "/b")).await;
    edge.until_status("/b", 200).await;
    // While it is not: the revision it would continue from is gone when it comes back.
    edge.signal(nix::sys::signal::Signal::SIGSTOP);
    etcd.delete("routes/1").await;
    for number in 0..10 {
        etcd.put("routes/3", &stored(&origin, "3", &format!("/turn-{number}"))).await;
    }
    etcd.compact().await;
    etcd.kill();
    etcd.start_again().await;
    edge.signal(nix::sys::signal::Signal::SIGCONT);
    edge.until_status("/turn-9", 200).await;
    edge.until_status("/a", 404).await;
    edge.get("/b").await.expect_status(200);
}
