//! The Admin API over the wire: bodies and statuses as golden transcripts, keys and roles, and that what it
//! accepts serves traffic.
//!
//! A transcript is made anew with `UPDATE_GOLDEN=1`; read its difference before you commit it.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use e2e::client::Call;
use e2e::edge::VIEWER_KEY;
use e2e::golden::{assert_golden, without_times};
use e2e::origin::echo;
use e2e::{ADMIN_KEY, Answer, Edge, Value, eventually, json};

/// A conversation with the Admin API, written down.
struct Transcript {
    edge: Edge,
    text: String,
}

impl Transcript {
    async fn start() -> Transcript {
        Transcript { edge: Edge::embedded().start().await, text: String::new() }
    }

    async fn call(&mut self, method: &str, path: &str, body: Value) -> Answer {
        let sent = (!body.is_null()).then_some(&body);
        let answer = self.edge.call_admin(method, path, sent).await;
        writeln!(self.text, "{method} /apisix/admin/{path}").expect("text");
        if let Some(body) = sent {
            writeln!(self.text, "{body}").expect("text");
        }
        let shown = match serde_json::from_slice::<Value>(&answer.body) {
            Ok(value) => serde_json::to_string_pretty(&without_times(&value)).expect("JSON"),
            Err(_) => answer.text(),
        };
        writeln!(self.text, "\n{} {shown}\n", answer.status).expect("text");
        answer
    }

    async fn get(&mut self, path: &str) -> Answer {
        self.call("GET", path, Value::Null).await
    }

    fn assert_golden(self, name: &str) {
        assert_golden(&format!("admin_api/{name}.txt"), &self.text);
    }
}

fn upstream() -> Value {
    json!({"type": "roundrobin", "nodes": {"127.0.0.1:1980": 1}})
}

#[tokio::test]
async fn routes_live_through_all_methods() {
    let mut api = Transcript::start().await;
    api.get("routes").await.expect_status(200);
    api.get("routes/1").await.expect_status(404);
    let route = json!({"uri": "/a", "upstream": upstream()});
    api.call("PUT", "routes/1", route.clone()).await.expect_status(201);
    api.call("PUT", "routes/1", route).await.expect_status(200);
    api.get("routes/1").await.expect_status(200);
    api.call("PATCH", "routes/1", json!({"methods": ["GET"], "desc": "one"})).await.expect_status(200);
    api.call("PATCH", "routes/1", json!({"desc": null})).await.expect_status(200);
    api.call("PATCH", "routes/1/upstream/nodes", json!({"127.0.0.1:1981": 2})).await.expect_status(200);
    api.call("PATCH", "routes/none", json!({"desc": "x"})).await.expect_status(404);
    api.call("DELETE", "routes/1", Value::Null).await.expect_status(200);
    api.call("DELETE", "routes/1", Value::Null).await.expect_status(404);
    api.assert_golden("routes");
}

#[tokio::test]
async fn a_posted_route_gets_an_id() {
    let edge = Edge::embedded().start().await;
    let answer = edge.call_admin("POST", "routes", Some(&json!({"uri": "/a", "upstream": upstream()}))).await;
    let created = answer.expect_status(201).json();
    let id = created["value"]["id"].as_str().expect("an id").to_owned();
    assert_eq!(created["key"], format!("/apisix/routes/{id}"));
    edge.call_admin("GET", &format!("routes/{id}"), None).await.expect_status(200);
}

#[tokio::test]
async fn refusals_name_the_field_and_the_reason() {
    let mut api = Transcript::start().await;
    let refused = [
        ("routes/1", json!({"upstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "uris": ["/b"], "upstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "methods": ["FETCH"], "upstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "uppstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "upstream_id": "none"})),
        ("routes/1", json!({"uri": "/a", "service_id": "none"})),
        ("routes/1", json!({"uri": "/a", "plugin_config_id": "none", "upstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "vars": [["a", "=", "b"]], "upstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "priority": "high", "upstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "plugins": {"no-such-plugin": {}}, "upstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "plugins": {"limit-count": {"count": -1}}, "upstream": upstream()})),
        ("routes/1", json!({"uri": "/a", "create_time": 1, "upstream": upstream()})),
        ("routes/not%20an%20id", json!({"uri": "/a", "upstream": upstream()})),
        ("upstreams/1", json!({"type": "roundrobin"})),
        ("upstreams/1", json!({"type": "best", "nodes": {"127.0.0.1:1": 1}})),
        (
            "upstreams/1",
            json!({"type": "chash", "hash_on": "cookies", "key": "x", "nodes": {"127.0.0.1:1": 1}}),
        ),
        ("upstreams/1", json!({"nodes": [{"host": "127.0.0.1", "port": 70000, "weight": 1}]})),
        ("consumers", json!({"plugins": {}})),
        ("consumers", json!({"username": "an n"})),
        ("ssls/1", json!({"sni": "a.test", "cert": "x", "key": "y"})),
        ("global_rules/1", json!({})),
        ("routes/1", json!("text")),
        // What depends on config.yaml, and what stands in metadata.
        (
            "routes/1",
            json!({"uri": "/a", "plugins": {"proxy-cache": {"cache_zone": "nowhere"}}, "upstream": upstream()}),
        ),
        ("plugin_metadata/error-log-logger", json!({"skywalking": {"endpoint_addr": "nowhere"}})),
        ("plugin_metadata/error-page", json!({"enable": true, "error_404": {"content_type": "a\nb"}})),
        (
            "services/1",
            json!({"plugins": {"body-transformer": {"request": {"template": "{% if a then %}"}}}}),
        ),
    ];
    for (path, body) in refused {
        let answer = api.call("PUT", path, body).await.expect_status(400);
        assert!(answer.json()["error_msg"].is_string(), "{}", answer.text());
    }
    for kind in ["routes", "services", "plugin_metadata"] {
        assert_eq!(api.edge.call_admin("GET", kind, None).await.json()["total"], 0, "{kind}");
    }
    api.assert_golden("refusals");
}

#[tokio::test]
async fn a_body_that_is_not_json_is_refused() {
    let edge = Edge::embedded().start().await;
    let call = Call::new("PUT", "/apisix/admin/routes/1").header("x-api-key", ADMIN_KEY).body("{\"uri\": ");
    let answer = call.send_to(edge.admin).await.expect_status(400);
    assert!(answer.json()["error_msg"].is_string());
    let huge = Call::new("PUT", "/apisix/admin/routes/1").header("x-api-key", ADMIN_KEY);
    let huge = huge.body(vec![b' '; 1_600_000]).send_to(edge.admin).await;
    assert!(matches!(huge.status, 400 | 413), "{huge:?}");
}

#[tokio::test]
async fn the_other_kinds_have_their_own_methods() {
    let mut api = Transcript::start().await;
    api.call("PUT", "services/s", json!({"upstream": upstream()})).await.expect_status(201);
    api.call("PUT", "upstreams/u", upstream()).await.expect_status(201);
    api.call("PATCH", "upstreams/u", json!({"nodes": {"127.0.0.1:1981": 3}})).await.expect_status(200);
    api.call("PUT", "consumers", json!({"username": "ann", "plugins": {"key-auth": {"key": "k1"}}}))
        .await
        .expect_status(201);
    api.get("consumers/ann").await.expect_status(200);
    api.call("PATCH", "consumers/ann", json!({"desc": "x"})).await.expect_status(405);
    api.call("POST", "consumers", json!({"username": "bob"})).await.expect_status(405);
    api.call("PUT", "consumers/ann/credentials/c1", json!({"plugins": {"key-auth": {"key": "k2"}}}))
        .await
        .expect_status(201);
    api.get("consumers/ann/credentials").await.expect_status(200);
    api.call("PUT", "consumers/none/credentials/c1", json!({"plugins": {"key-auth": {"key": "k3"}}}))
        .await
        .expect_status(404);
    api.call("PUT", "consumer_groups/g", json!({"plugins": {"cors": {}}})).await.expect_status(201);
    api.call("PUT", "plugin_configs/p", json!({"plugins": {"cors": {}}})).await.expect_status(201);
    api.call("PUT", "global_rules/r", json!({"plugins": {"request-id": {}}})).await.expect_status(201);
    api.call("POST", "global_rules", json!({"plugins": {"request-id": {}}})).await.expect_status(405);
    api.call("PUT", "plugin_metadata/cors", json!({})).await;
    api.call("PUT", "secrets/vault/v", json!({"uri": "http://127.0.0.1:8200", "prefix": "kv", "token": "t"}))
        .await
        .expect_status(201);
    api.get("nothing").await.expect_status(404);
    api.assert_golden("kinds");
}

#[tokio::test]
async fn what_is_used_is_not_deleted_unless_forced() {
    let mut api = Transcript::start().await;
    api.call("PUT", "upstreams/u", upstream()).await.expect_status(201);
    api.call("PUT", "services/s", json!({"upstream_id": "u"})).await.expect_status(201);
    api.call("PUT", "routes/r", json!({"uri": "/a", "service_id": "s"})).await.expect_status(201);
    api.call("DELETE", "upstreams/u", Value::Null).await.expect_status(400);
    api.call("DELETE", "services/s", Value::Null).await.expect_status(400);
    api.call("DELETE", "services/s?force=true", Value::Null).await.expect_status(200);
    api.call("DELETE", "upstreams/u", Value::Null).await.expect_status(200);
    api.assert_golden("references");
}

#[tokio::test]
async fn lists_are_paged_and_filtered() {
    let edge = Edge::embedded().start().await;
    for number in 0..25 {
        let labels = if number % 2 == 0 { json!({"even": "yes"}) } else { json!({"odd": "yes"}) };
        let route = json!({"uri": format!("/page/{number}"), "name": format!("name-{number}"), "labels": labels,
                           "upstream": upstream()});
        edge.put(&format!("routes/{number}"), route).await;
    }
    let list = |query: &str| {
        let path = format!("routes?{query}");
        let edge = &edge;
        async move {
            let body = edge.call_admin("GET", &path, None).await.expect_status(200).json();
            let shown = body["list"].as_array().expect("a list").len();
            (body["total"].as_u64().expect("a total"), shown)
        }
    };
    assert_eq!(list("").await, (25, 25));
    assert_eq!(list("page=1&page_size=10").await, (25, 10));
    assert_eq!(list("page=3&page_size=10").await, (25, 5));
    assert_eq!(list("page=9&page_size=10").await, (25, 0));
    assert_eq!(list("page=1&page_size=10&name=name-1").await.0, 11);
    assert_eq!(list("page=1&page_size=100&label=odd").await, (12, 12));
    assert_eq!(list("page=1&page_size=100&uri=page%2F2$").await, (1, 1));
    edge.call_admin("GET", "routes?page=1&page_size=5", None).await.expect_status(400);
    edge.call_admin("GET", "routes?page=1&page_size=501", None).await.expect_status(400);
}

#[tokio::test]
async fn without_the_right_key_nothing_is_told() {
    let edge = Edge::embedded().start().await;
    let ask = |call: Call| call.send_to(edge.admin);
    let missing = ask(Call::get("/apisix/admin/routes")).await.expect_status(401);
    assert_eq!(
        missing.json(),
        json!({"error_msg": "failed to check token", "description": "missing apikey"})
    );
    let wrong = ask(Call::get("/apisix/admin/routes").header("x-api-key", "nope")).await.expect_status(401);
    assert_eq!(wrong.json(), json!({"error_msg": "failed to check token", "description": "wrong apikey"}));
    ask(Call::get(&format!("/apisix/admin/routes?api_key={ADMIN_KEY}"))).await.expect_status(200);
    let cookie = format!("x-api-key={ADMIN_KEY}");
    ask(Call::get("/apisix/admin/routes").header("cookie", &cookie)).await.expect_status(200);
    ask(Call::get("/apisix/admin/routes").header("x-api-key", VIEWER_KEY)).await.expect_status(200);
    let route = json!({"uri": "/a", "upstream": upstream()});
    let write = Call::new("PUT", "/apisix/admin/routes/1").header("x-api-key", VIEWER_KEY).json(&route);
    ask(write).await.expect_status(401);
    assert_eq!(edge.call_admin("GET", "routes", None).await.json()["total"], 0);
}

#[tokio::test]
async fn without_a_configured_key_one_is_made_and_kept_secret() {
    let mut edge =
        Edge::embedded().config(json!({"deployment": {"admin": {"admin_key": null}}})).start().await;
    edge.call_admin("GET", "routes", None).await.expect_status(401);
    let file = eventually("the place of the key is printed", || async {
        let output = edge.output();
        let data = edge.folder.join("data").display().to_string();
        let at = output.find(&data)?;
        let path: String = output[at..].chars().take_while(|c| !c.is_whitespace() && *c != '"').collect();
        std::path::Path::new(&path).is_file().then_some(path)
    })
    .await;
    let mode = std::fs::metadata(&file).expect("the key file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "only its owner reads {file}");
    let key = std::fs::read_to_string(&file).expect("the key file").trim().to_owned();
    assert!(key.len() >= 16, "a key worth the name");
    assert!(!edge.output().contains(&key), "the key itself is not printed");
    let with = || Call::get("/apisix/admin/routes").header("x-api-key", &key);
    with().send_to(edge.admin).await.expect_status(200);
    edge.start_again().await;
    with().send_to(edge.admin).await.expect_status(200);
}

#[tokio::test]
async fn what_the_api_accepts_serves_and_what_it_deletes_does_not() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    edge.get("/a").await.expect_status(404);
    edge.put("upstreams/u", origin.upstream()).await;
    edge.put("routes/1", json!({"uri": "/a", "upstream_id": "u"})).await;
    edge.until_status("/a", 200).await;
    edge.patch("routes/1", json!({"uri": "/b"})).await;
    edge.until_status("/b", 200).await;
    edge.get("/a").await.expect_status(404);
    edge.delete("routes/1").await;
    edge.until_status("/b", 404).await;
}

#[tokio::test]
async fn a_route_with_a_ttl_ends_by_itself() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    edge.put("routes/1?ttl=2", json!({"uri": "/brief", "upstream": origin.upstream()})).await;
    edge.until_status("/brief", 200).await;
    edge.until_status("/brief", 404).await;
    edge.call_admin("GET", "routes/1", None).await.expect_status(404);
}

#[tokio::test]
async fn what_was_accepted_is_there_after_a_restart() {
    let origin = echo::start().await;
    let mut edge = Edge::embedded().start().await;
    edge.put("routes/1", json!({"uri": "/kept", "upstream": origin.upstream()})).await;
    let before = edge.call_admin("GET", "routes/1", None).await.json();
    assert!(edge.terminate().await.success());
    edge.start_again().await;
    edge.get("/kept").await.expect_status(200);
    assert_eq!(edge.call_admin("GET", "routes/1", None).await.json(), before);
}

#[tokio::test]
async fn revisions_grow_and_times_are_set_by_the_server() {
    let edge = Edge::embedded().start().await;
    let route = json!({"uri": "/a", "upstream": upstream()});
    let first = edge.put("routes/1", route.clone()).await.json();
    let other = edge.put("routes/2", route.clone()).await.json();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let again = edge.put("routes/1", route).await.json();
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("a number, not {value}"));
    let get = async |id: &str| edge.call_admin("GET", &format!("routes/{id}"), None).await.json();
    let (one, two) = (get("1").await, get("2").await);
    assert!(number(&one["modifiedIndex"]) > number(&two["modifiedIndex"]));
    assert!(number(&one["createdIndex"]) < number(&two["createdIndex"]));
    assert_eq!(first["value"]["create_time"], again["value"]["create_time"]);
    assert!(number(&again["value"]["update_time"]) > number(&first["value"]["update_time"]));
    assert!(number(&other["value"]["create_time"]) > 1_700_000_000);
}

#[tokio::test]
async fn private_keys_are_never_given_back() {
    let ca = e2e::certs::Authority::new("ca");
    let leaf = ca.server(&["a.test"]);
    let edge = Edge::embedded().start().await;
    let ssl = json!({"snis": ["a.test"], "cert": leaf.cert, "key": leaf.key});
    let secret = leaf.key.lines().nth(1).expect("a line of the key");
    assert!(!edge.put("ssls/1", ssl).await.text().contains(secret));
    for path in ["ssls", "ssls/1"] {
        assert!(!edge.call_admin("GET", path, None).await.expect_status(200).text().contains(secret));
    }
    assert!(!edge.output().contains(secret));
}

#[tokio::test]
async fn a_certificate_that_cannot_be_read_is_refused() {
    let ca = e2e::certs::Authority::new("ca");
    let (leaf, other) = (ca.server(&["a.test"]), ca.server(&["b.test"]));
    let edge = Edge::embedded().start().await;
    let good = json!({"snis": ["a.test"], "cert": leaf.cert, "key": leaf.key});
    let broken =
        "-----BEGIN CERTIFICATE-----\nbm90IGEgY2VydGlmaWNhdGU=\n-----END CERTIFICATE-----\n".repeat(2);
    for (field, value, pointer) in [
        ("cert", json!("c".repeat(200)), "/cert"),
        ("cert", json!(broken), "/cert"),
        ("key", json!("k".repeat(200)), "/key"),
        ("client", json!({"ca": "c".repeat(200)}), "/client/ca"),
    ] {
        let mut ssl = good.clone();
        ssl[field] = value;
        let answer = edge.call_admin("PUT", "ssls/1", Some(&ssl)).await.expect_status(400);
        assert_eq!(answer.json()["errors"][0]["pointer"], pointer, "{}", answer.text());
    }
    edge.call_admin("GET", "ssls/1", None).await.expect_status(404);
    // As with APISIX, a key and its certificate may be exchanged one after the other.
    edge.put("ssls/1", good).await;
    edge.patch("ssls/1/key", json!(other.key)).await;
    edge.patch("ssls/1/cert", json!(other.cert)).await;
}

#[tokio::test]
async fn schemas_and_plugins_can_be_read() {
    let edge = Edge::embedded().start().await;
    let get = async |path: &str| edge.call_admin("GET", path, None).await.expect_status(200).json();
    let list = get("plugins/list").await;
    let list: Vec<&str> = list.as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    for name in ["key-auth", "limit-count", "proxy-rewrite", "prometheus"] {
        assert!(list.contains(&name), "{list:?}");
    }
    let position = |name: &str| list.iter().position(|entry| *entry == name).expect("a plugin");
    assert!(position("key-auth") < position("limit-count"), "by priority");
    assert_eq!(get("schema/route").await["type"], "object");
    assert_eq!(get("schema/plugins/key-auth").await["type"], "object");
    assert!(get("plugins/limit-count").await["properties"]["count"].is_object());
    let validate = async |kind: &str, body: Value| {
        edge.call_admin("POST", &format!("schema/validate/{kind}"), Some(&body)).await
    };
    validate("routes", json!({"uri": "/a", "upstream": upstream()})).await.expect_status(200);
    validate("routes", json!({"uri": 5})).await.expect_status(400);
}

#[tokio::test]
async fn a_whole_configuration_can_be_validated_without_being_stored() {
    let edge = Edge::embedded().start().await;
    let body = json!({
        "routes": [{"id": "1", "uri": "/a", "upstream_id": "none"}, {"id": "2", "uri": 5}],
        "consumers": [{"username": "ann", "plugins": {"key-auth": {}}}],
    });
    let answer = edge.call_admin("POST", "configs/validate", Some(&body)).await.expect_status(400).json();
    let errors = answer["errors"].as_array().expect("a list of errors");
    let of = |kind: &str, id: &str| {
        errors.iter().find(|error| error["resource_type"] == kind && error["resource_id"] == id)
    };
    for (kind, id) in [("routes", "1"), ("routes", "2"), ("consumers", "ann")] {
        assert!(of(kind, id).is_some_and(|error| error["error"].is_string()), "{kind}/{id} in {answer}");
    }
    assert_eq!(edge.call_admin("GET", "routes", None).await.json()["total"], 0);
    let good = json!({"routes": [{"id": "1", "uri": "/a", "upstream": upstream()}]});
    edge.call_admin("POST", "configs/validate", Some(&good)).await.expect_status(200);
}

#[tokio::test]
async fn the_admin_api_is_not_reachable_through_the_proxy() {
    let edge = Edge::embedded().start().await;
    for path in [
        "/apisix/admin/routes",
        "/apisix%2Fadmin/routes",
        "//apisix/admin/routes",
        "/x/../apisix/admin/routes",
    ] {
        edge.send(Call::get(path).header("x-api-key", ADMIN_KEY)).await.expect_status(404);
    }
}

#[tokio::test]
async fn only_allowed_addresses_reach_the_admin_api() {
    let config = json!({"deployment": {"admin": {"allow_admin": ["192.0.2.0/24"]}}});
    let edge = Edge::embedded().config(config).start().await;
    edge.call_admin("GET", "routes", None).await.expect_status(403);
}

#[tokio::test]
async fn consumers_and_credentials_authenticate_at_once() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    edge.put("routes/1", json!({"uri": "/a", "plugins": {"key-auth": {}}, "upstream": origin.upstream()}))
        .await;
    edge.put("consumers", json!({"username": "ann", "plugins": {"key-auth": {"key": "first"}}})).await;
    edge.put("consumers/ann/credentials/c", json!({"plugins": {"key-auth": {"key": "second"}}})).await;
    let with = |key: &str| edge.send(Call::get("/a").header("apikey", key));
    eventually("both keys work", || async {
        (with("first").await.status == 200 && with("second").await.status == 200).then_some(())
    })
    .await;
    let seen = with("second").await.json();
    assert_eq!(seen["headers"]["x-consumer-username"], json!(["ann"]));
    with("third").await.expect_status(401);
    edge.delete("consumers/ann/credentials/c").await;
    eventually("the deleted key is refused", || async { (with("second").await.status == 401).then_some(()) })
        .await;
    with("first").await.expect_status(200);
}
