//! Which plugins run for a request, and in which order, told as prose and checked over the wire.
//!
//! Most of it is seen by one header: `proxy-rewrite` sets `X-From` to the place its settings came from, and the
//! origin tells what arrived.

use e2e::client::Call;
use e2e::origin::{Origin, echo};
use e2e::{Answer, Edge, EdgeBuilder, Value, json};

/// `proxy-rewrite` that names its place.
fn from(place: &str) -> Value {
    json!({"proxy-rewrite": {"headers": {"set": {"X-From": place}}}})
}

/// What the origin saw as `X-From`.
fn seen(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["headers"]["x-from"].to_string()
}

fn with(mut plugins: Value, more: Value) -> Value {
    for (name, value) in more.as_object().expect("plugins") {
        plugins[name] = value.clone();
    }
    plugins
}

async fn start(builder: EdgeBuilder, origin: &Origin) -> Edge {
    builder.resource("upstreams", with(json!({"id": "u"}), origin.upstream())).start().await
}

fn get() -> Call {
    Call::get("/")
}

fn ann() -> Call {
    Call::get("/").header("apikey", "ann")
}

#[tokio::test]
async fn a_route_takes_the_plugins_of_its_service() {
    let origin = echo::start().await;
    let edge = start(
        Edge::file()
            .resource("services", json!({"id": "s", "upstream_id": "u", "plugins": from("service")}))
            .route(json!({"id": "r", "uri": "/*", "service_id": "s"})),
        &origin,
    )
    .await;
    assert_eq!(seen(&edge.send(get()).await), r#"["service"]"#);
}

#[tokio::test]
async fn a_plugin_config_is_stronger_than_the_service_and_the_route_is_stronger_than_both() {
    let origin = echo::start().await;
    let edge = start(
        Edge::file()
            .resource("services", json!({"id": "s", "upstream_id": "u", "plugins": from("service")}))
            .resource("plugin_configs", json!({"id": "p", "plugins": from("plugin_config")}))
            .route(json!({"id": "1", "uri": "/config", "service_id": "s", "plugin_config_id": "p"}))
            .route(json!({"id": "2", "uri": "/route", "service_id": "s", "plugin_config_id": "p",
                          "plugins": from("route")})),
        &origin,
    )
    .await;
    assert_eq!(seen(&edge.get("/config").await), r#"["plugin_config"]"#);
    assert_eq!(seen(&edge.get("/route").await), r#"["route"]"#);
}

#[tokio::test]
async fn settings_of_one_plugin_are_replaced_whole_and_not_mixed() {
    let origin = echo::start().await;
    let service = json!({"proxy-rewrite": {"headers": {"set": {"X-From": "service", "X-Service": "1"}}}});
    let edge = start(
        Edge::file()
            .resource("services", json!({"id": "s", "upstream_id": "u", "plugins": service}))
            .route(json!({"id": "r", "uri": "/*", "service_id": "s", "plugins": from("route")})),
        &origin,
    )
    .await;
    let answer = edge.send(get()).await;
    assert_eq!(seen(&answer), r#"["route"]"#);
    assert!(answer.json()["headers"]["x-service"].is_null());
}

#[tokio::test]
async fn the_consumer_is_stronger_than_its_group_and_the_group_than_the_route() {
    let origin = echo::start().await;
    let key = |name: &str| json!({"key-auth": {"key": name}});
    let answer = |place: &str| json!({"response-rewrite": {"headers": {"set": {"X-From": place}}}});
    let edge = start(
        Edge::file()
            .resource("consumer_groups", json!({"id": "g", "plugins": answer("group")}))
            .resource(
                "consumers",
                json!({"username": "ann", "group_id": "g",
                                          "plugins": with(key("ann"), answer("consumer"))}),
            )
            .resource("consumers", json!({"username": "bob", "group_id": "g", "plugins": key("bob")}))
            .resource("consumers", json!({"username": "cat", "plugins": key("cat")}))
            .route(json!({"id": "r", "uri": "/*", "upstream_id": "u",
                          "plugins": with(answer("route"), json!({"key-auth": {}}))})),
        &origin,
    )
    .await;
    for (key, place) in [("ann", "consumer"), ("bob", "group"), ("cat", "route")] {
        let answer = edge.send(Call::get("/").header("apikey", key)).await.expect_status(200);
        assert_eq!(answer.header("x-from"), Some(place), "{key}");
    }
}

#[tokio::test]
async fn what_the_route_has_rewritten_before_the_consumer_was_known_is_not_rewritten_again() {
    let origin = echo::start().await;
    let plugins = with(json!({"key-auth": {"key": "ann"}}), from("consumer"));
    let edge = start(
        Edge::file()
            .resource("consumers", json!({"username": "ann", "plugins": plugins}))
            .route(json!({"id": "1", "uri": "/both", "upstream_id": "u",
                          "plugins": with(from("route"), json!({"key-auth": {}}))}))
            .route(json!({"id": "2", "uri": "/added", "upstream_id": "u", "plugins": {"key-auth": {}}})),
        &origin,
    )
    .await;
    let ask = async |path: &str| seen(&edge.send(Call::get(path).header("apikey", "ann")).await);
    assert_eq!(ask("/both").await, r#"["route"]"#);
    assert_eq!(ask("/added").await, r#"["consumer"]"#);
}

#[tokio::test]
async fn a_plugin_only_the_consumer_has_runs_too() {
    let origin = echo::start().await;
    let plugins = json!({"key-auth": {"key": "ann"}, "ip-restriction": {"blacklist": ["127.0.0.1"]}});
    let edge = start(
        Edge::file()
            .resource("consumers", json!({"username": "ann", "plugins": plugins}))
            .resource("consumers", json!({"username": "bob", "plugins": {"key-auth": {"key": "bob"}}}))
            .route(json!({"id": "r", "uri": "/*", "upstream_id": "u", "plugins": {"key-auth": {}}})),
        &origin,
    )
    .await;
    edge.send(ann()).await.expect_status(403);
    edge.send(Call::get("/").header("apikey", "bob")).await.expect_status(200);
}

#[tokio::test]
async fn global_rules_run_beside_everything_and_before_the_route() {
    let origin = echo::start().await;
    let add = |place: &str| json!({"proxy-rewrite": {"headers": {"add": {"X-Order": place}}}});
    let edge = start(
        Edge::file()
            .resource("global_rules", json!({"id": "g", "plugins": add("global")}))
            .route(json!({"id": "r", "uri": "/*", "upstream_id": "u", "plugins": add("route")})),
        &origin,
    )
    .await;
    let answer = edge.send(get()).await.expect_status(200);
    assert_eq!(answer.json()["headers"]["x-order"], json!(["global", "route"]));
}

#[tokio::test]
async fn global_rules_run_even_when_no_route_matches() {
    let origin = echo::start().await;
    let edge = start(
        Edge::file()
            .resource("global_rules", json!({"id": "1", "plugins": {"request-id": {}}}))
            .route(json!({"id": "r", "uri": "/only", "upstream_id": "u"})),
        &origin,
    )
    .await;
    let answer = edge.get("/none").await.expect_status(404);
    assert!(answer.header("x-request-id").is_some(), "{answer:?}");
    let edge = start(
        Edge::file().resource(
            "global_rules",
            json!({"id": "1", "plugins": {"ip-restriction": {"blacklist": ["127.0.0.1"]}}}),
        ),
        &origin,
    )
    .await;
    edge.get("/none").await.expect_status(403);
}

#[tokio::test]
async fn within_one_phase_the_higher_priority_runs_first() {
    let origin = echo::start().await;
    // Both answer in the rewrite phase: fault-injection has 11000, redirect 900.
    let both = json!({"fault-injection": {"abort": {"http_status": 418}},
                      "redirect": {"uri": "/elsewhere", "ret_code": 302}});
    let mut turned = both.clone();
    turned["redirect"]["_meta"] = json!({"priority": 12_000});
    let edge = start(
        Edge::file()
            .route(json!({"id": "1", "uri": "/default", "upstream_id": "u", "plugins": both}))
            .route(json!({"id": "2", "uri": "/turned", "upstream_id": "u", "plugins": turned})),
        &origin,
    )
    .await;
    edge.get("/default").await.expect_status(418);
    edge.get("/turned").await.expect_status(302);
}

#[tokio::test]
async fn all_plugins_rewrite_before_any_decides_access() {
    let origin = echo::start().await;
    // ip-restriction has the higher priority (3000 to 2500) but works in the access phase.
    let plugins = json!({"key-auth": {}, "ip-restriction": {"blacklist": ["127.0.0.1"]}});
    let edge = start(
        Edge::file()
            .resource("consumers", json!({"username": "ann", "plugins": {"key-auth": {"key": "ann"}}}))
            .route(json!({"id": "r", "uri": "/*", "upstream_id": "u", "plugins": plugins})),
        &origin,
    )
    .await;
    edge.send(get()).await.expect_status(401);
    edge.send(ann()).await.expect_status(403);
}

#[tokio::test]
async fn the_rewrite_of_the_route_runs_before_the_access_of_global_rules() {
    let origin = echo::start().await;
    let edge = start(
        Edge::file()
            .resource(
                "global_rules",
                json!({"id": "g", "plugins": {"ip-restriction": {"blacklist": ["127.0.0.1"]}}}),
            )
            .route(json!({"id": "r", "uri": "/*", "upstream_id": "u", "plugins": {"key-auth": {}}})),
        &origin,
    )
    .await;
    edge.send(get()).await.expect_status(401);
}

#[tokio::test]
async fn the_answer_passes_all_plugins_even_when_one_of_them_made_it() {
    let origin = echo::start().await;
    let plugins = json!({"key-auth": {}, "request-id": {},
                         "response-rewrite": {"headers": {"set": {"X-After": "yes"}}}});
    let edge = start(
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream_id": "u", "plugins": plugins})),
        &origin,
    )
    .await;
    let answer = edge.send(get()).await.expect_status(401);
    assert_eq!(answer.header("x-after"), Some("yes"));
    assert!(answer.header("x-request-id").is_some());
}

#[tokio::test]
async fn a_disabled_plugin_does_not_run_and_hides_the_weaker_one() {
    let origin = echo::start().await;
    let off = json!({"proxy-rewrite": {"headers": {"set": {"X-From": "route"}}, "_meta": {"disable": true}}});
    let edge = start(
        Edge::file()
            .resource("services", json!({"id": "s", "upstream_id": "u", "plugins": from("service")}))
            .route(json!({"id": "r", "uri": "/*", "service_id": "s", "plugins": off})),
        &origin,
    )
    .await;
    assert_eq!(seen(&edge.send(get()).await), "null");
}

#[tokio::test]
async fn a_filter_lets_a_plugin_run_for_some_requests_only() {
    let origin = echo::start().await;
    let plugins = json!({"fault-injection":
        {"abort": {"http_status": 418}, "_meta": {"filter": [["arg_tea", "==", "1"]]}}});
    let edge = start(
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream_id": "u", "plugins": plugins})),
        &origin,
    )
    .await;
    edge.get("/?tea=1").await.expect_status(418);
    edge.get("/?tea=2").await.expect_status(200);
}

#[tokio::test]
async fn a_plugin_can_answer_with_words_of_the_user() {
    let origin = echo::start().await;
    let plugins = |response: Value| json!({"key-auth": {"_meta": {"error_response": response}}});
    let edge = start(
        Edge::file()
            .route(json!({"id": "1", "uri": "/object", "upstream_id": "u",
                          "plugins": plugins(json!({"code": 7, "text": "no"}))}))
            .route(
                json!({"id": "2", "uri": "/text", "upstream_id": "u", "plugins": plugins(json!("just no"))}),
            ),
        &origin,
    )
    .await;
    assert_eq!(edge.get("/object").await.expect_status(401).json(), json!({"code": 7, "text": "no"}));
    assert_eq!(edge.get("/text").await.expect_status(401).text().trim(), "just no");
}

#[tokio::test]
async fn a_missing_service_is_a_404_and_a_missing_plugin_config_or_group_a_503() {
    let origin = echo::start().await;
    let edge = start(
        Edge::file()
            .resource(
                "consumers",
                json!({"username": "ann", "group_id": "none", "plugins": {"key-auth": {"key": "ann"}}}),
            )
            .route(json!({"id": "1", "uri": "/service", "service_id": "none"}))
            .route(json!({"id": "2", "uri": "/config", "upstream_id": "u", "plugin_config_id": "none"}))
            .route(json!({"id": "3", "uri": "/group", "upstream_id": "u", "plugins": {"key-auth": {}}})),
        &origin,
    )
    .await;
    edge.get("/service").await.expect_status(404);
    edge.get("/config").await.expect_status(503);
    edge.send(Call::get("/group").header("apikey", "ann")).await.expect_status(503);
    assert_eq!(origin.requests(), 0);
}

#[tokio::test]
async fn a_missing_upstream_is_a_502_and_none_at_all_a_503() {
    let edge = Edge::file()
        .route(json!({"id": "1", "uri": "/missing", "upstream_id": "none"}))
        .route(json!({"id": "2", "uri": "/without", "plugins": {"request-id": {}}}))
        .route(json!({"id": "3", "uri": "/empty", "upstream": {"type": "roundrobin", "nodes": []}}))
        .start()
        .await;
    edge.get("/missing").await.expect_status(502);
    edge.get("/without").await.expect_status(503);
    edge.get("/empty").await.expect_status(503);
}
