//! Lookup tables: thousands of entries, changed while requests are served, from the Admin API, a file and a list.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use e2e::certs::Authority;
use e2e::client::{Answer, Call};
use e2e::load::Load;
use e2e::origin::Origin;
use e2e::{Edge, Value, eventually, json};
use http::Response;

const ENTRIES: usize = 5_000;

/// An origin that tells its name and the target it was asked for.
async fn named(name: &'static str) -> Origin {
    Origin::http(move |request| async move {
        let target = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
        Response::builder()
            .header("x-origin", name)
            .header("x-target", target)
            .body(Bytes::new())
            .expect("an answer")
    })
    .await
}

fn entry(origin: &Origin) -> Value {
    json!({"upstream": {"type": "roundrobin", "nodes": {origin.node(): 1}}})
}

fn entry_at(origin: &Origin, uri: &str) -> Value {
    let mut entry = entry(origin);
    entry["uri"] = json!(uri);
    entry
}

fn route() -> Value {
    json!({"uri": "/clusters/:id/*path", "plugins": {
        "upstream-lookup": {"table": "clusters", "key": "$uri_param_id", "uri": "/$uri_param_path"}}})
}

fn parameters() -> Value {
    json!({"apisix": {"router": {"http": "radixtree_uri_with_parameter"}}})
}

fn told(answer: &Answer) -> (String, String) {
    let field = |name| answer.header(name).unwrap_or_default().to_owned();
    (field("x-origin"), field("x-target"))
}

async fn embedded() -> Edge {
    let edge = Edge::embedded().config(parameters()).start().await;
    edge.put("lookup_tables/clusters", json!({})).await;
    edge.put("routes/c", route()).await;
    edge.until_status("/clusters/none/x", 404).await;
    edge
}

#[tokio::test]
async fn a_key_of_the_path_picks_upstream_and_path() {
    let (one, two) = (named("one").await, named("two").await);
    let edge = embedded().await;
    edge.put("upstreams/manager", json!({"type": "roundrobin", "nodes": {two.node(): 1}})).await;
    edge.put("lookup_tables/clusters/entries/BCS-K8S-1", entry(&one)).await;
    edge.put(
        "lookup_tables/clusters/entries/BCS-K8S-2",
        json!({
        "upstream_id": "manager", "uri": "/proxy/${uri_param_id}/$uri_param_path?via=manager"}),
    )
    .await;
    edge.until_status("/clusters/BCS-K8S-2/x", 200).await;
    for (path, origin, target) in [
        ("/clusters/BCS-K8S-1/api/v1/pods?watch=1", "one", "/api/v1/pods?watch=1"),
        ("/clusters/BCS-K8S-2/api", "two", "/proxy/BCS-K8S-2/api?via=manager"),
        ("/clusters/BCS-K8S-2/a?b=c", "two", "/proxy/BCS-K8S-2/a?via=manager&b=c"),
    ] {
        let answer = edge.get(path).await.expect_status(200);
        assert_eq!(told(&answer), (origin.to_owned(), target.to_owned()), "{path}");
    }
    let unknown = edge.get("/clusters/BCS-K8S-3/api").await.expect_status(404);
    assert_eq!(unknown.text(), "{\"error_msg\":\"404 Unknown Lookup Key\"}\n");
    assert!(
        unknown.header("proxy-status").is_some_and(|told| told.contains("lookup_unknown")),
        "{unknown:?}"
    );

    // Everything that can be asked of an entry.
    let shown = edge.call_admin("GET", "lookup_tables/clusters/entries/BCS-K8S-2", None).await.json();
    assert_eq!(shown["value"]["upstream_id"], "manager");
    let list = edge.call_admin("GET", "lookup_tables/clusters/entries", None).await.json();
    assert_eq!(list["total"], 2);
    let live = edge.call_control("/v1/lookup_tables/clusters").await.json();
    assert_eq!((&live["entries"], &live["active"], &live["complete"]), (&json!(2), &json!(1), &json!(true)));
    let live = edge.call_control("/v1/lookup_tables/clusters/BCS-K8S-1").await.json();
    assert_eq!(live["nodes"][0]["address"], one.node());

    // What is in use stays; what is gone is unknown.
    for (path, who) in [("upstreams/manager", "lookup entry"), ("lookup_tables/clusters", "route")] {
        let refused = edge.call_admin("DELETE", path, None).await.expect_status(400);
        assert!(refused.text().contains("is still using it now"), "{who}: {}", refused.text());
    }
    edge.delete("lookup_tables/clusters/entries/BCS-K8S-1").await;
    edge.until_status("/clusters/BCS-K8S-1/api", 404).await;
    edge.delete("routes/c").await;
    edge.delete("lookup_tables/clusters").await;
    let gone = edge.call_admin("GET", "lookup_tables/clusters/entries/BCS-K8S-2", None).await;
    assert_eq!(gone.status, 404, "entries go with their table");
}

#[tokio::test]
async fn what_is_wrong_is_refused_before_it_is_written() {
    let edge = embedded().await;
    let bad = json!({"upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:1": 1}, "tls": {"verify": true, "ca": ["x".repeat(128)]}, "scheme": "https"}});
    for (method, path, body, status, says) in [
        ("PUT", "lookup_tables/none/entries/a", json!({"upstream_id": "x"}), 400, "upstream"),
        (
            "PUT",
            "lookup_tables/none/entries/a",
            json!({"upstream": {"nodes": {"127.0.0.1:1": 1}}}),
            404,
            "table",
        ),
        ("PUT", "lookup_tables/clusters/entries/a", json!({}), 400, "upstream"),
        ("PUT", "lookup_tables/clusters/entries/a", json!({"upstream_id": "none"}), 400, "none"),
        ("PATCH", "lookup_tables/clusters/entries", json!({"a": {}, "b": null}), 400, "/a"),
        ("PATCH", "lookup_tables/clusters/entries", json!({"a b": null}), 400, "a b"),
        ("PATCH", "lookup_tables/clusters/entries", json!({"a": {"upstream_id": "none"}}), 400, "none"),
        ("PATCH", "lookup_tables/clusters/entries", json!([]), 400, "object"),
        ("PATCH", "lookup_tables/none/entries", json!({}), 404, "table"),
    ] {
        let answer = edge.call_admin(method, path, Some(&body)).await.expect_status(status);
        assert!(answer.text().contains(says), "{method} {path} {body}: {}", answer.text());
    }
    // What only using it shows does not make the key unknown.
    edge.put("lookup_tables/clusters/entries/a", bad).await;
    let answer = edge.until_status("/clusters/a/x", 503).await;
    assert!(answer.header("proxy-status").is_some_and(|told| told.contains("lookup_refused")), "{answer:?}");
    let rejected = edge.call_control("/v1/rejected").await.text();
    assert!(rejected.contains("lookup_tables/clusters/entries/a"), "{rejected}");
}

#[tokio::test]
async fn a_route_before_its_table_answers_503_and_a_default_serves_unknown_keys() {
    let origin = named("one").await;
    let edge = Edge::embedded().config(parameters()).start().await;
    edge.put("routes/c", route()).await;
    let answer = edge.until_status("/clusters/a/x", 503).await;
    assert!(
        answer.header("proxy-status").is_some_and(|told| told.contains("lookup_not_ready")),
        "{answer:?}"
    );
    edge.put("lookup_tables/clusters", json!({"entries": {"manager": entry(&origin)}})).await;
    edge.until_status("/clusters/a/x", 404).await;
    let mut with_default = route();
    with_default["plugins"]["upstream-lookup"]["default_key"] = json!("manager");
    edge.put("routes/c", with_default).await;
    edge.until_status("/clusters/a/x", 200).await;
}

#[tokio::test]
async fn entries_have_tls_of_their_own() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let config = ours.server(&["one.test"]).server_config(&["http/1.1"]);
    let one = Origin::https(config, |_| async {
        Response::builder().header("x-origin", "one").body(Bytes::new()).expect("an answer")
    })
    .await;
    let edge = embedded().await;
    let entry = |ca: &Authority| {
        json!({"upstream": {"type": "roundrobin", "scheme": "https", "nodes": {one.node(): 1},
                            "pass_host": "rewrite", "upstream_host": "one.test",
                            "tls": {"verify": true, "ca_certs": [ca.pem()]}}})
    };
    edge.put("lookup_tables/clusters/entries/good", entry(&ours)).await;
    edge.put("lookup_tables/clusters/entries/bad", entry(&theirs)).await;
    let good = edge.until_status("/clusters/good/x", 200).await;
    assert_eq!(good.header("x-origin"), Some("one"));
    let bad = edge.until_status("/clusters/bad/x", 502).await;
    assert!(bad.header("proxy-status").is_some_and(|told| told.contains("tls_certificate")), "{bad:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_entries_change_under_load_without_a_failed_request() {
    let (one, two) = (named("one").await, named("two").await);
    let edge = embedded().await;
    let empty = edge.resident();
    let all: BTreeMap<String, Value> = (0..ENTRIES).map(|n| (format!("c{n}"), entry(&one))).collect();
    let begun = Instant::now();
    let answer = edge.call_admin("PATCH", "lookup_tables/clusters/entries", Some(&json!(all))).await;
    assert_eq!(answer.expect_status(200).json(), json!({"put": ENTRIES, "deleted": 0}));
    let last = format!("/clusters/c{}/x", ENTRIES - 1);
    edge.until_status(&last, 200).await;
    eventually("all entries are there", || async {
        (edge.call_control("/v1/lookup_tables/clusters").await.json()["entries"] == ENTRIES).then_some(())
    })
    .await;
    let grown = edge.resident().saturating_sub(empty);
    println!(
        "{ENTRIES} entries in {:?}, {} bytes of memory each",
        begun.elapsed(),
        grown * 1024 / ENTRIES as u64
    );
    assert!(grown * 1024 / (ENTRIES as u64) < 16 * 1024, "{grown} KiB");

    let load = Load::start(edge.http, "GET /clusters/c7/x HTTP/1.1\r\nhost: a\r\n\r\n", 200, 8, 400);
    let reloads = edge.call_control("/v1/config").await.json()["applied_revision"].as_u64();
    for round in 0..4 {
        let origin = if round % 2 == 0 { &two } else { &one };
        let some: BTreeMap<String, Value> =
            (0..500).map(|n| (format!("c{n}"), entry_at(origin, &format!("/r{round}")))).collect();
        edge.call_admin("PATCH", "lookup_tables/clusters/entries", Some(&json!(some)))
            .await
            .expect_status(200);
        let name = if round % 2 == 0 { "two" } else { "one" };
        eventually("the change is in use", || async {
            let answer = edge.get("/clusters/c7/x").await.expect_status(200);
            (told(&answer) == (name.to_owned(), format!("/r{round}"))).then_some(())
        })
        .await;
        edge.put("lookup_tables/clusters/entries/c7", entry(origin)).await;
        edge.delete(&format!("lookup_tables/clusters/entries/c{}", 1000 + round)).await;
    }
    let account = load.finish_after(100).await;
    assert!(account.bad.is_empty(), "{:?}", account.bad);
    assert!(edge.call_control("/v1/config").await.json()["applied_revision"].as_u64() > reloads);
    edge.until_status("/clusters/c1000/x", 404).await;
}

#[tokio::test]
async fn a_file_has_entries_in_its_tables() {
    let (one, two) = (named("one").await, named("two").await);
    let tables = |origin: &Origin| {
        json!({"lookup_tables": [{"id": "clusters", "entries": {"a": entry(origin), "b": entry(&one)}}],
               "routes": [route()]})
    };
    let edge = Edge::file().config(parameters()).resources(tables(&one)).start().await;
    assert_eq!(told(&edge.get("/clusters/a/x").await).0, "one");
    edge.get("/clusters/c/x").await.expect_status(404);
    edge.reload(&tables(&two)).await;
    assert_eq!(told(&edge.get("/clusters/a/x").await).0, "two");
    assert_eq!(told(&edge.get("/clusters/b/x").await).0, "one");
    edge.reload(&json!({"lookup_tables": [{"id": "clusters"}], "routes": [route()]})).await;
    edge.get("/clusters/a/x").await.expect_status(404);
}

/// A server of a list: what it answers, and what it was asked.
struct ListServer {
    origin: Origin,
    list: Arc<Mutex<(u16, String, String)>>,
    same: Arc<AtomicUsize>,
}

impl ListServer {
    async fn start() -> ListServer {
        ListServer::start_at("127.0.0.1:0".parse().expect("an address")).await
    }

    async fn start_at(addr: std::net::SocketAddr) -> ListServer {
        let list = Arc::new(Mutex::new((404, String::new(), String::new())));
        let same = Arc::new(AtomicUsize::new(0));
        let (told, counted) = (list.clone(), same.clone());
        let origin = Origin::http_at(addr, move |request| {
            let (status, tag, body) = told.lock().expect("the list").clone();
            let known = request.headers().get("if-none-match").is_some_and(|known| known == tag.as_str());
            let keyed = request.headers().get("x-token").is_some_and(|token| token == "secret");
            if known {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            async move {
                let builder = Response::builder().header("etag", tag);
                let answer = match (keyed, known) {
                    (false, _) => builder.status(401).body(Bytes::new()),
                    (true, true) => builder.status(304).body(Bytes::new()),
                    (true, false) => builder.status(status).body(Bytes::from(body)),
                };
                answer.expect("an answer")
            }
        })
        .await;
        ListServer { origin, list, same }
    }

    fn put(&self, tag: &str, entries: &Value) {
        self.say(200, tag, &json!({"entries": entries}).to_string());
    }

    fn say(&self, status: u16, tag: &str, body: &str) {
        *self.list.lock().expect("the list") = (status, format!("\"{tag}\""), body.to_owned());
    }

    fn table(&self) -> Value {
        json!({"id": "clusters", "source": {"url": format!("http://{}/list", self.origin.node()),
               "interval": 0.05, "timeout": 2, "headers": {"x-token": "secret"}}})
    }
}

#[tokio::test]
async fn a_fetched_list_is_followed_and_the_last_good_one_kept() {
    let (one, two) = (named("one").await, named("two").await);
    let server = ListServer::start().await;
    let resources = json!({
        "lookup_tables": [server.table()],
        "upstreams": [{"id": "manager", "type": "roundrobin", "nodes": {two.node(): 1}}],
        "routes": [route()],
    });
    let mut edge = Edge::file().config(parameters()).resources(resources).start().await;
    let early = edge.get("/clusters/a/x").await.expect_status(503);
    assert!(early.header("proxy-status").is_some_and(|told| told.contains("lookup_not_ready")), "{early:?}");

    server.put("v1", &json!({"a": entry(&one), "m": {"upstream_id": "manager"}, "wrong": {"upstream": {}}}));
    let answer = edge.until_status("/clusters/a/x", 200).await;
    assert_eq!(told(&answer).0, "one");
    assert_eq!(told(&edge.get("/clusters/m/x").await).0, "two");
    edge.get("/clusters/unknown/x").await.expect_status(404);
    let wrong = edge.get("/clusters/wrong/x").await.expect_status(503);
    assert!(wrong.header("proxy-status").is_some_and(|told| told.contains("lookup_refused")), "{wrong:?}");
    eventually("the list is asked for with its tag", || async {
        (server.same.load(Ordering::Relaxed) > 1).then_some(())
    })
    .await;
    let shown = edge.call_control("/v1/lookup_tables/clusters").await.json();
    assert_eq!(shown["source"]["stale"], Value::Null, "{shown}");
    assert_eq!((&shown["entries"], &shown["source"]["refused"]), (&json!(3), &json!(1)));

    // Nonsense changes nothing and is told.
    for (status, body) in [(200, "<html>"), (500, ""), (200, "{}")] {
        server.say(status, "nonsense", body);
        let shown = eventually("the list is stale", || async {
            let shown = edge.call_control("/v1/lookup_tables/clusters").await.json();
            shown["source"]["stale"]["reason"].is_string().then_some(shown)
        })
        .await;
        assert!(shown["source"]["failed"].as_u64() > Some(0), "{shown}");
        assert_eq!(told(&edge.get("/clusters/a/x").await).0, "one");
    }
    let text = Call::get("/apisix/prometheus/metrics").send_to(edge.metrics).await.text();
    assert!(text.contains("postern_lookup_entries{table=\"clusters\"} 3\n"), "{text}");
    assert!(!text.contains("postern_lookup_list_stale_since_seconds{table=\"clusters\"} 0\n"), "{text}");

    server.put("v2", &json!({"a": entry(&two)}));
    eventually("the new list is in use", || async {
        (told(&edge.get("/clusters/a/x").await).0 == "two").then_some(())
    })
    .await;
    edge.until_status("/clusters/m/x", 404).await;

    // Over a restart, without the server, and until it is back.
    let addr = server.origin.addr;
    drop(server);
    edge.terminate().await;
    edge.start_again().await;
    let answer = edge.until_status("/clusters/a/x", 200).await;
    assert_eq!(told(&answer).0, "two");
    let server = ListServer::start_at(addr).await;
    server.put("v3", &json!({"a": entry(&one)}));
    eventually("the server that is back is believed", || async {
        (told(&edge.get("/clusters/a/x").await).0 == "one").then_some(())
    })
    .await;
}

#[tokio::test]
async fn entries_that_nobody_uses_have_no_probes_and_no_connections() {
    let (origin, clock) = (named("one").await, named("two").await);
    let checks = json!({"active": {"type": "http", "http_path": "/health", "healthy": {"interval": 1}}});
    let checked = |origin: &Origin| {
        let mut entry = entry(origin);
        entry["upstream"]["checks"] = checks.clone();
        entry
    };
    let mut entries: BTreeMap<String, Value> = (0..50).map(|n| (format!("c{n}"), checked(&origin))).collect();
    entries.insert("clock".to_owned(), checked(&clock));
    let edge = Edge::file()
        .config(parameters())
        .resources(json!({"lookup_tables": [{"id": "clusters", "entries": entries, "idle": 1}], "routes": [route()]}))
        .start()
        .await;
    edge.get("/clusters/unknown/x").await.expect_status(404);
    assert_eq!(origin.requests(), 0, "fifty entries, and no probe");
    edge.get("/clusters/c1/x").await.expect_status(200);
    eventually("it is probed while it is used", || async {
        edge.get("/clusters/c1/x").await.expect_status(200);
        let health = edge.call_control("/v1/healthcheck").await.json();
        let name = "/apisix/lookup_tables/clusters/entries/c1";
        health.as_array().is_some_and(|all| all.len() == 1 && all[0]["name"] == name).then_some(())
    })
    .await;
    eventually("it has let go", || async {
        let active = edge.call_control("/v1/lookup_tables/clusters").await.json()["active"] == 0;
        (active && origin.open_connections() == 0).then_some(())
    })
    .await;
    let (quiet, mut asked) = (origin.requests(), 0);
    eventually("another one was probed twice meanwhile", || {
        asked += 1;
        let probes = clock.requests().saturating_sub(asked);
        let call = edge.get("/clusters/clock/x");
        async move {
            call.await.expect_status(200);
            (probes >= 2).then_some(())
        }
    })
    .await;
    assert_eq!(origin.requests(), quiet, "nothing probes it any more");
    edge.get("/clusters/c1/x").await.expect_status(200);
}
