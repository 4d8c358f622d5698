//! Which route serves which request, over the wire, for the three routers and their options.
//!
//! Each row is told in words; its routes have paths or hosts of their own, so that one gateway serves the table.

use e2e::client::Call;
use e2e::origin::{Origin, echo};
use e2e::{Edge, EdgeBuilder, Value, json};

/// A route that tells its id to the origin.
fn route(origin: &Origin, id: &str, fields: &Value) -> Value {
    let mut route = json!({
        "id": id,
        "upstream": origin.upstream(),
        "plugins": {"proxy-rewrite": {"headers": {"set": {"X-Route": id}}}},
    });
    for (name, value) in fields.as_object().expect("fields of a route") {
        route[name] = value.clone();
    }
    route
}

/// A description, routes as (id, fields), and requests with the id of the route that must serve them.
struct Row {
    promise: &'static str,
    routes: Vec<(&'static str, Value)>,
    requests: Vec<(Call, Option<&'static str>)>,
}

fn get(uri: &str) -> Call {
    Call::get(uri)
}

fn at(host: &str, uri: &str) -> Call {
    Call::get(uri).header("host", host)
}

async fn check(builder: EdgeBuilder, rows: Vec<Row>) {
    let origin = echo::start().await;
    let mut builder = builder;
    for row in &rows {
        for (id, fields) in &row.routes {
            builder = builder.route(route(&origin, id, fields));
        }
    }
    let edge = builder.start().await;
    let mut failures = Vec::new();
    for row in rows {
        for (call, expected) in row.requests {
            let name = format!("{call:?}");
            let answer = edge.send(call).await;
            let served = match answer.status {
                200 => Some(answer.json()["headers"]["x-route"][0].as_str().expect("a route id").to_owned()),
                404 => {
                    assert_eq!(answer.text().trim(), r#"{"error_msg":"404 Route Not Found"}"#);
                    None
                }
                status => Some(format!("status {status}: {}", answer.text())),
            };
            if served.as_deref() != expected {
                failures.push(format!("{}: {name}: {served:?} instead of {expected:?}", row.promise));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn router(name: &str) -> EdgeBuilder {
    Edge::file().config(json!({"apisix": {"router": {"http": name}}}))
}

/// What every router does in the same way.
fn common() -> Vec<Row> {
    vec![
        Row {
            promise: "an exact URI matches itself alone",
            routes: vec![("exact", json!({"uri": "/exact"}))],
            requests: vec![
                (get("/exact"), Some("exact")),
                (get("/exact?query=1"), Some("exact")),
                (get("/exact/"), None),
                (get("/exactly"), None),
                (get("/Exact"), None),
            ],
        },
        Row {
            promise: "a prefix matches itself and everything below",
            routes: vec![("prefix", json!({"uri": "/prefix/*"})), ("stem", json!({"uri": "/stem*"}))],
            requests: vec![
                (get("/prefix/"), Some("prefix")),
                (get("/prefix/a/b"), Some("prefix")),
                (get("/prefix"), None),
                (get("/stem"), Some("stem")),
                (get("/stemmed/deep"), Some("stem")),
            ],
        },
        Row {
            promise: "exact beats prefix and the longer prefix beats the shorter, whatever the priority",
            routes: vec![
                ("long-1", json!({"uri": "/long/*", "priority": 100})),
                ("long-2", json!({"uri": "/long/a/*", "priority": 10})),
                ("long-3", json!({"uri": "/long/a/b"})),
            ],
            requests: vec![
                (get("/long/x"), Some("long-1")),
                (get("/long/a/x"), Some("long-2")),
                (get("/long/a/b"), Some("long-3")),
                (get("/long/a/b/c"), Some("long-2")),
            ],
        },
        Row {
            promise: "when the better match fails a predicate the next one is tried",
            routes: vec![
                ("next-1", json!({"uri": "/next/*"})),
                ("next-2", json!({"uri": "/next/a", "methods": ["POST"]})),
            ],
            requests: vec![(get("/next/a"), Some("next-1")), (Call::new("POST", "/next/a"), Some("next-2"))],
        },
        Row {
            promise: "for one URI the higher priority is asked first",
            routes: vec![
                ("low", json!({"uri": "/prio", "priority": 1})),
                ("high", json!({"uri": "/prio", "priority": 9, "vars": [["arg_v", "==", "2"]]})),
            ],
            requests: vec![(get("/prio"), Some("low")), (get("/prio?v=2"), Some("high"))],
        },
        Row {
            promise: "several URIs are one route",
            routes: vec![("many", json!({"uris": ["/many/a", "/many/b/*"]}))],
            requests: vec![
                (get("/many/a"), Some("many")),
                (get("/many/b/c"), Some("many")),
                (get("/many/c"), None),
            ],
        },
        Row {
            promise: "methods limit a route",
            routes: vec![
                ("read", json!({"uri": "/methods", "methods": ["GET", "HEAD"]})),
                ("write", json!({"uri": "/methods", "methods": ["PUT"]})),
            ],
            requests: vec![
                (get("/methods"), Some("read")),
                (Call::new("PUT", "/methods"), Some("write")),
                (Call::new("DELETE", "/methods"), None),
            ],
        },
        Row {
            promise: "hosts are exact or a wildcard, and case does not count",
            routes: vec![
                ("host-exact", json!({"uri": "/h", "host": "a.hosts.test"})),
                ("host-wild", json!({"uri": "/h", "host": "*.hosts.test"})),
                ("host-two", json!({"uri": "/h", "hosts": ["x.two.test", "*.y.two.test"]})),
            ],
            requests: vec![
                (at("a.hosts.test", "/h"), Some("host-exact")),
                (at("A.Hosts.Test", "/h"), Some("host-exact")),
                (at("a.hosts.test:8080", "/h"), Some("host-exact")),
                (at("b.hosts.test", "/h"), Some("host-wild")),
                (at("x.two.test", "/h"), Some("host-two")),
                (at("z.y.two.test", "/h"), Some("host-two")),
                (at("two.test", "/h"), None),
                (at("hosts.test.evil", "/h"), None),
            ],
        },
        Row {
            promise: "a route that is switched off is not there",
            routes: vec![
                ("off", json!({"uri": "/off/a", "status": 0})),
                ("behind", json!({"uri": "/off/*"})),
            ],
            requests: vec![(get("/off/a"), Some("behind"))],
        },
        Row {
            promise: "the client's address can be asked for",
            routes: vec![
                ("near", json!({"uri": "/addr", "remote_addr": "127.0.0.0/8"})),
                ("far", json!({"uri": "/far", "remote_addrs": ["192.0.2.0/24", "2001:db8::/32"]})),
                ("either", json!({"uri": "/either", "remote_addrs": ["192.0.2.1", "127.0.0.1"]})),
            ],
            requests: vec![
                (get("/addr"), Some("near")),
                (get("/far"), None),
                (get("/either"), Some("either")),
            ],
        },
        Row {
            promise: "an escaped URI is matched decoded and a dot segment does not lead around a match",
            routes: vec![
                ("public", json!({"uri": "/norm/public/*"})),
                ("secret", json!({"uri": "/norm/secret/*"})),
            ],
            requests: vec![
                (get("/norm/public/%61"), Some("public")),
                (get("/norm/%73ecret/a"), Some("secret")),
                (get("/norm/public/../secret/a"), Some("secret")),
                (get("/norm/public/%2e%2e/secret/a"), Some("secret")),
                (get("/norm//public/a"), Some("public")),
                (get("/norm/./public/a"), Some("public")),
            ],
        },
    ]
}

/// Every operator and logic form of `vars`.
fn vars() -> Vec<Row> {
    let operators: Vec<(&'static str, Value, &str, bool)> = vec![
        ("v-eq", json!([["arg_v", "==", "x"]]), "?v=x", true),
        ("v-eq-not", json!([["arg_v", "==", "x"]]), "?v=y", false),
        ("v-eq-absent", json!([["arg_v", "==", "x"]]), "", false),
        ("v-ne", json!([["arg_v", "~=", "x"]]), "?v=y", true),
        ("v-ne-absent", json!([["arg_v", "~=", "x"]]), "", true),
        ("v-gt", json!([["arg_v", ">", 10]]), "?v=11", true),
        ("v-gt-as-number", json!([["arg_v", ">", 10]]), "?v=9", false),
        ("v-ge", json!([["arg_v", ">=", 10]]), "?v=10", true),
        ("v-lt", json!([["arg_v", "<", 10]]), "?v=9", true),
        ("v-le", json!([["arg_v", "<=", 10]]), "?v=11", false),
        ("v-regex", json!([["arg_v", "~~", "^[a-c]+$"]]), "?v=abc", true),
        ("v-regex-case", json!([["arg_v", "~~", "^[a-c]+$"]]), "?v=ABC", false),
        ("v-regex-no-case", json!([["arg_v", "~*", "^[a-c]+$"]]), "?v=ABC", true),
        ("v-in", json!([["arg_v", "in", ["a", "b"]]]), "?v=b", true),
        ("v-in-not", json!([["arg_v", "in", ["a", "b"]]]), "?v=c", false),
        ("v-not-in", json!([["arg_v", "!", "in", ["a", "b"]]]), "?v=c", true),
        ("v-not-eq", json!([["arg_v", "!", "==", "x"]]), "?v=x", false),
        ("v-ipmatch", json!([["remote_addr", "ipmatch", ["127.0.0.0/8"]]]), "", true),
        ("v-ipmatch-not", json!([["remote_addr", "ipmatch", ["10.0.0.0/8"]]]), "", false),
        ("v-not-ipmatch", json!([["remote_addr", "!", "ipmatch", ["10.0.0.0/8"]]]), "", true),
        ("v-and", json!([["arg_a", "==", "1"], ["arg_b", "==", "2"]]), "?a=1&b=2", true),
        ("v-and-half", json!([["arg_a", "==", "1"], ["arg_b", "==", "2"]]), "?a=1", false),
        ("v-or", json!(["OR", ["arg_a", "==", "1"], ["arg_b", "==", "2"]]), "?b=2", true),
        ("v-or-none", json!(["OR", ["arg_a", "==", "1"], ["arg_b", "==", "2"]]), "?b=3", false),
        ("v-not-and", json!(["!AND", ["arg_a", "==", "1"], ["arg_b", "==", "2"]]), "?a=1", true),
        ("v-not-or", json!(["!OR", ["arg_a", "==", "1"], ["arg_b", "==", "2"]]), "?a=1", false),
        (
            "v-nested",
            json!(["AND", ["arg_a", "==", "1"], ["OR", ["arg_b", "==", "2"], ["arg_b", "==", "3"]]]),
            "?a=1&b=3",
            true,
        ),
        ("v-method", json!([["request_method", "==", "GET"]]), "", true),
        ("v-uri", json!([["uri", "~~", "^/vars/"]]), "", true),
        ("v-first-of-many", json!([["arg_v", "==", "1"]]), "?v=1&v=2", true),
    ];
    let mut rows: Vec<Row> = operators
        .into_iter()
        .map(|(id, vars, query, hits)| Row {
            promise: id,
            routes: vec![(id, json!({"uri": format!("/vars/{id}"), "vars": vars}))],
            requests: vec![(get(&format!("/vars/{id}{query}")), hits.then_some(id))],
        })
        .collect();
    rows.push(Row {
        promise: "headers and cookies are variables",
        routes: vec![
            ("var-header", json!({"uri": "/vars/header", "vars": [["http_x_api_version", "==", "2"]]})),
            ("var-cookie", json!({"uri": "/vars/cookie", "vars": [["cookie_group", "==", "beta"]]})),
            ("var-has", json!({"uri": "/vars/has", "vars": [["http_x_list", "~~", "b"]]})),
        ],
        requests: vec![
            (get("/vars/header").header("x-api-version", "2"), Some("var-header")),
            (get("/vars/header").header("x-api-version", "1"), None),
            (get("/vars/cookie").header("cookie", "a=b; group=beta"), Some("var-cookie")),
            (get("/vars/cookie").header("cookie", "group=alpha"), None),
            (get("/vars/has").header("x-list", "a,b"), Some("var-has")),
        ],
    });
    let form = |body: &'static str| {
        Call::new("POST", "/vars/form").header("content-type", "application/x-www-form-urlencoded").body(body)
    };
    let body = |body: Value| Call::new("POST", "/vars/json").json(&body);
    rows.push(Row {
        promise: "fields of a form and of a JSON body are variables, and the body still reaches the origin",
        routes: vec![
            ("var-form", json!({"uri": "/vars/form", "vars": [["post_arg_kind", "==", "new"]]})),
            ("var-json", json!({"uri": "/vars/json", "vars": [["post_arg.user.name", "==", "ann"]]})),
            ("var-item", json!({"uri": "/vars/json", "vars": [["post_arg.tags[*]", "has", "red"]]})),
        ],
        requests: vec![
            (form("a=1&kind=new"), Some("var-form")),
            (form("kind=old"), None),
            (body(json!({"user": {"name": "ann"}})), Some("var-json")),
            (body(json!({"user": {"name": "bob"}})), None),
            (body(json!({"tags": ["blue", "red"]})), Some("var-item")),
        ],
    });
    rows
}

#[tokio::test]
async fn radixtree_host_uri_serves_the_table() {
    let mut rows = common();
    rows.push(Row {
        promise: "a route of the host comes before any route without one, however long its URI",
        routes: vec![
            ("hosted", json!({"uri": "/first/*", "host": "first.test"})),
            ("hostless", json!({"uri": "/first/a"})),
        ],
        requests: vec![
            (at("first.test", "/first/a"), Some("hosted")),
            (at("other.test", "/first/a"), Some("hostless")),
        ],
    });
    rows.push(Row {
        promise: "routes without host are tried when those of the host do not fit",
        routes: vec![
            ("only-post", json!({"uri": "/fall", "host": "fall.test", "methods": ["POST"]})),
            ("fall", json!({"uri": "/fall"})),
        ],
        requests: vec![(at("fall.test", "/fall"), Some("fall"))],
    });
    check(router("radixtree_host_uri"), rows).await;
}

#[tokio::test]
async fn the_default_router_is_radixtree_host_uri() {
    let rows = vec![Row {
        promise: "a route of the host comes first",
        routes: vec![
            ("hosted", json!({"uri": "/first/*", "host": "first.test"})),
            ("hostless", json!({"uri": "/first/a"})),
        ],
        requests: vec![(at("first.test", "/first/a"), Some("hosted"))],
    }];
    check(Edge::file(), rows).await;
}

#[tokio::test]
async fn radixtree_uri_serves_the_table() {
    let mut rows = common();
    rows.push(Row {
        promise: "the URI decides before the host",
        routes: vec![
            ("hosted", json!({"uri": "/first/*", "host": "first.test"})),
            ("hostless", json!({"uri": "/first/a"})),
        ],
        requests: vec![
            (at("first.test", "/first/a"), Some("hostless")),
            (at("first.test", "/first/b"), Some("hosted")),
        ],
    });
    check(router("radixtree_uri"), rows).await;
}

#[tokio::test]
async fn radixtree_uri_with_parameter_serves_the_table() {
    let mut rows = common();
    rows.push(Row {
        promise: "a parameter takes one segment and a rest takes all",
        routes: vec![
            ("param", json!({"uri": "/param/:name/profile"})),
            ("rest", json!({"uri": "/rest/:name/*file"})),
            ("param-var", json!({"uri": "/value/:id", "vars": [["uri_param_id", "~~", "^[0-9]+$"]]})),
        ],
        requests: vec![
            (get("/param/ann/profile"), Some("param")),
            (get("/param/ann/bob/profile"), None),
            (get("/param//profile"), None),
            (get("/rest/ann/a/b"), Some("rest")),
            (get("/value/42"), Some("param-var")),
            (get("/value/x42"), None),
        ],
    });
    check(router("radixtree_uri_with_parameter"), rows).await;
}

#[tokio::test]
async fn every_operator_of_vars_decides() {
    check(Edge::file(), vars()).await;
}

#[tokio::test]
async fn the_tail_slash_can_be_ignored() {
    let builder = Edge::file().config(json!({"apisix": {"delete_uri_tail_slash": true}}));
    let rows = vec![Row {
        promise: "/tail and /tail/ are one",
        routes: vec![("tail", json!({"uri": "/tail"}))],
        requests: vec![(get("/tail"), Some("tail")), (get("/tail/"), Some("tail")), (get("/tail/a"), None)],
    }];
    check(builder, rows).await;
}

#[tokio::test]
async fn path_parameters_of_servlets_can_be_ignored() {
    let builder = Edge::file().config(json!({"apisix": {"normalize_uri_like_servlet": true}}));
    let rows = vec![Row {
        promise: "what follows a semicolon in a segment does not count",
        routes: vec![("servlet", json!({"uri": "/servlet/a"}))],
        requests: vec![(get("/servlet/a"), Some("servlet")), (get("/servlet;v=1/a;b=2"), Some("servlet"))],
    }];
    check(builder, rows).await;
}

#[tokio::test]
async fn an_encoded_slash_can_stay_inside_its_parameter() {
    let rows = || {
        vec![Row {
            promise: "%2F is no separator",
            routes: vec![("one", json!({"uri": "/slash/:name"})), ("two", json!({"uri": "/slash/:a/:b"}))],
            requests: vec![(get("/slash/a%2Fb"), Some("one")), (get("/slash/a/b"), Some("two"))],
        }]
    };
    let settings = json!({"apisix": {"match_uri_encoded_slash": true, "router": {"http": "radixtree_uri_with_parameter"}}});
    check(Edge::file().config(settings), rows()).await;
}

#[tokio::test]
async fn a_service_lends_its_hosts_and_its_upstream() {
    let origin = echo::named("of the service").await;
    let edge = Edge::file()
        .resource("services", json!({"id": "s", "hosts": ["service.test"], "upstream": origin.upstream()}))
        .route(json!({"id": "r", "uri": "/*", "service_id": "s"}))
        .start()
        .await;
    let answer = edge.send(at("service.test", "/a")).await.expect_status(200);
    assert_eq!(answer.header("x-origin"), Some("of the service"));
    edge.send(at("other.test", "/a")).await.expect_status(404);
}

#[tokio::test]
async fn the_document_separator_and_end_mark_of_apisix_yaml_are_honoured() {
    let origin = echo::start().await;
    let route = |uri: &str| {
        format!(
            "routes:\n  - uri: {uri}\n    upstream:\n      nodes:\n        \"{}\": 1\n      type: roundrobin\n",
            origin.node()
        )
    };
    let edge = Edge::file().text(&format!("{}#END\n", route("/one"))).start().await;
    edge.get("/one").await.expect_status(200);
    // Without the mark the file is still being written: what stands stays.
    edge.write_text(&route("/two"));
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    edge.get("/one").await.expect_status(200);
    edge.get("/two").await.expect_status(404);
    edge.write_text(&format!("{}#END\n", route("/two")));
    edge.until_status("/two", 200).await;
    edge.get("/one").await.expect_status(404);
}

#[tokio::test]
async fn apisix_json_is_read_as_well() {
    let origin = echo::start().await;
    let edge = Edge::json_file().route(route(&origin, "json", &json!({"uri": "/json"}))).start().await;
    edge.get("/json").await.expect_status(200);
    edge.reload(&json!({"routes": [route(&origin, "other", &json!({"uri": "/other"}))]})).await;
    edge.get("/other").await.expect_status(200);
    edge.get("/json").await.expect_status(404);
}

#[tokio::test]
async fn one_bad_item_is_set_aside_and_the_others_serve() {
    let origin = echo::start().await;
    let edge = Edge::file()
        .route(route(&origin, "good", &json!({"uri": "/good"})))
        .route(route(&origin, "typo", &json!({"uri": "/typo", "prioritty": 1})))
        .route(route(&origin, "unknown", &json!({"uri": "/unknown", "plugins": {"no-such-plugin": {}}})))
        .route(route(&origin, "vars", &json!({"uri": "/vars", "vars": [["arg_a", "~~", "(?!x)y"]]})))
        .route(route(&origin, "method", &json!({"uri": "/method", "methods": ["GET", "FETCH"]})))
        .route(route(&origin, "service", &json!({"uri": "/service", "service_id": "typo"})))
        .route(route(&origin, "no-service", &json!({"uri": "/no-service", "service_id": "none"})))
        .resource("services", json!({"id": "typo", "no_such_field": 1, "plugins": {"key-auth": {}}}))
        .route(route(&origin, "no id", &json!({"uri": "/misnamed"})))
        .route(route(&origin, "good", &json!({"uris": ["/good", "/twice"]})))
        .route(route(&origin, "rest", &json!({"uri": "/*"})))
        .start()
        .await;
    edge.get("/good").await.expect_status(200);
    // Its plugin may have been what protects it: no answer from the origin, and no other route in its place.
    edge.get("/unknown").await.expect_status(503);
    // Nor do requests fall through where it is a condition that cannot be read.
    edge.get("/vars").await.expect_status(503);
    edge.get("/method").await.expect_status(503);
    // A service has plugins too, and a route with an upstream of its own does not do without them.
    edge.get("/service").await.expect_status(503);
    edge.get("/no-service").await.expect_status(404);
    assert_eq!(origin.requests(), 1);
    edge.get("/rest").await.expect_status(200);
    assert!(edge.output().contains("prioritty"), "the bad field is named in the log");
    assert!(edge.output().contains("no-such-plugin"), "the unknown plugin is named in the log");
}

#[tokio::test]
async fn environment_variables_are_put_in_their_places() {
    let origin = echo::start().await;
    let text = concat!(
        "routes:\n",
        "  - uri: ${{E2E_URI}}\n",
        "    upstream:\n",
        "      type: ${{E2E_TYPE:=roundrobin}}\n",
        "      nodes:\n",
        "        \"${{E2E_NODE}}\": 1\n",
        "#END\n"
    );
    let edge =
        Edge::file().text(text).env("E2E_URI", "/from-env").env("E2E_NODE", &origin.node()).start().await;
    edge.get("/from-env").await.expect_status(200);
}
