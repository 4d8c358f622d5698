//! What the Admin API has acknowledged survives `kill -9`, at whatever moment it comes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use e2e::client::{Call, Connection};
use e2e::origin::echo;
use e2e::{ADMIN_KEY, Edge, json};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_the_process_is_killed() {
    let origin = echo::start().await;
    let mut edge = Edge::embedded().start().await;
    let acknowledged = Arc::new(Mutex::new(BTreeSet::new()));
    for turn in 0..5u64 {
        let mut writers = JoinSet::new();
        for writer in 0..4 {
            let (admin, upstream, acknowledged) = (edge.admin, origin.upstream(), Arc::clone(&acknowledged));
            writers.spawn(async move {
                let mut connection = Connection::http1(admin).await;
                for number in 0..10_000 {
                    let id = format!("{turn}-{writer}-{number}");
                    let route = json!({"uri": format!("/{id}"), "upstream": upstream});
                    let call = Call::new("PUT", &format!("/apisix/admin/routes/{id}"))
                        .header("x-api-key", ADMIN_KEY)
                        .json(&route);
                    match connection.try_send(call).await {
                        Ok(answer) => assert_eq!(answer.status, 201, "{}", answer.text()),
                        // Killed: this one may or may not have been stored.
                        Err(_) => return,
                    }
                    acknowledged.lock().expect("the ids").insert(id);
                }
            });
        }
        // Another moment in each turn.
        tokio::time::sleep(Duration::from_millis(150 + turn * 37)).await;
        edge.kill();
        while let Some(writer) = writers.join_next().await {
            writer.expect("every write before the kill was accepted");
        }
        edge.start_again().await;
        let stored = stored(&edge).await;
        let lost: Vec<String> = acknowledged
            .lock()
            .expect("the ids")
            .iter()
            .filter(|id| !stored.contains(*id))
            .cloned()
            .collect();
        assert!(lost.is_empty(), "lost after kill {turn}: {lost:?}");
    }
    let last =
        acknowledged.lock().expect("the ids").iter().next_back().cloned().expect("some write succeeded");
    edge.get(&format!("/{last}")).await.expect_status(200);
}

async fn stored(edge: &Edge) -> BTreeSet<String> {
    let list = edge.call_admin("GET", "routes", None).await.expect_status(200).json();
    let list = list["list"].as_array().expect("a list").clone();
    list.iter().map(|item| item["value"]["id"].as_str().expect("an id").to_owned()).collect()
}

#[tokio::test]
async fn a_deletion_that_was_acknowledged_stays_deleted() {
    let origin = echo::start().await;
    let mut edge = Edge::embedded().start().await;
    edge.put("routes/1", json!({"uri": "/a", "upstream": origin.upstream()})).await;
    edge.until_status("/a", 200).await;
    edge.delete("routes/1").await;
    edge.kill();
    edge.start_again().await;
    edge.get("/a").await.expect_status(404);
}

#[tokio::test]
async fn a_broken_file_does_not_stop_a_restart() {
    let origin = echo::start().await;
    let mut edge =
        Edge::file().route(json!({"id": "1", "uri": "/a", "upstream": origin.upstream()})).start().await;
    edge.get("/a").await.expect_status(200);
    edge.kill();
    edge.write_text("routes: [\n  {uri: /broken\n#END\n");
    edge.start_again().await;
    edge.get("/a").await.expect_status(200);
    let readiness = edge.readiness().await.expect("the status API answers");
    let told = edge.output() + &readiness.text();
    assert!(told.contains("stale"), "it says that the configuration is stale");
    edge.write(&json!({"routes": [{"id": "1", "uri": "/mended", "upstream": origin.upstream()}]}));
    edge.until_status("/mended", 200).await;
}
