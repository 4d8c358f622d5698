//! Plugins that keep or change bodies, over real sockets: what the cache promises over time, restarts and failures.
//!
//! What single requests get is told by the cases of `tests/compat`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use e2e::client::Call;
use e2e::origin::Origin;
use e2e::{Edge, Value, eventually, json};
use http::Response;
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
    edge.put("routes/1", json!({"uri": "/*", "plugins": plugins, "upstream": origin.upstream()})).await;
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
