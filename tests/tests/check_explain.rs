//! `postern check`, `postern import report` and `postern explain`: what they say, and the exit codes scripts rely on.

use std::path::Path;

use e2e::edge::run;
use e2e::origin::echo;
use e2e::{Edge, Value, json};
use tempfile::TempDir;

const GOOD: &str = "\
routes:
  - id: shop
    uri: /shop/*
    host: shop.test
    methods: [GET]
    upstream:
      type: roundrobin
      nodes:
        \"127.0.0.1:1980\": 1
#END
";

fn folder(apisix: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let config = "deployment:\n  role: data_plane\n  role_data_plane:\n    config_provider: yaml\n";
    std::fs::write(folder.path().join("config.yaml"), config).expect("a file");
    std::fs::write(folder.path().join("apisix.yaml"), apisix).expect("a file");
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a text path")
}

#[test]
fn a_good_folder_passes() {
    let folder = folder(GOOD);
    let (code, out, err) = run(&["check", text(folder.path())]);
    assert_eq!(code, 0, "{out}{err}");
}

#[test]
fn every_error_is_told_with_file_line_and_pointer() {
    let folder = folder(
        "\
routes:
  - id: one
    uri: /one
    prioritty: 5
    upstream: {type: roundrobin, nodes: {\"127.0.0.1:1980\": 1}}
  - id: two
    uri: /two
    methods: [FETCH]
    upstream:
      type: best
      nodes: {\"127.0.0.1:1980\": 1}
  - id: three
    uri: /three
    plugins:
      limit-count: {count: -1, time_window: 60}
      uri-rewrite: {}
    upstream: {type: roundrobin, nodes: {\"127.0.0.1:1980\": 1}}
  - id: four
    uri: /four
    service_id: nowhere
#END
",
    );
    let (code, out, err) = run(&["check", text(folder.path())]);
    assert_eq!(code, 1, "{out}{err}");
    let told = out + &err;
    for (line, what) in [
        (4, "prioritty"),
        (8, "FETCH"),
        (10, "best"),
        (15, "count"),
        (16, "proxy-rewrite"), // the plugin that was meant
        (20, "nowhere"),
    ] {
        let found =
            told.lines().any(|text| text.contains(&format!("apisix.yaml:{line}")) && text.contains(what));
        assert!(found, "{what} at line {line} in:\n{told}");
    }
    for pointer in ["/routes/0/prioritty", "/routes/1/methods/0", "/routes/1/upstream/type"] {
        assert!(told.contains(pointer), "{pointer} in:\n{told}");
    }
}

#[test]
fn what_plugins_find_wrong_is_told_before_it_runs() {
    let folder = folder(
        "\
routes:
  - id: one
    uri: /one
    plugins:
      proxy-cache: {cache_strategy: memory, cache_zone: own}
    upstream: {type: roundrobin, nodes: {\"127.0.0.1:1980\": 1}}
  - id: two
    uri: /two
    plugins:
      proxy-cache: {cache_strategy: memory, cache_zone: nowhere}
      skywalking: {}
      forward-auth: {uri: \"http://127.0.0.1:1\", request_headers: [\"a b\"]}
    upstream: {type: roundrobin, nodes: {\"127.0.0.1:1980\": 1}}
plugin_metadata:
  - id: error-page
    enable: true
    error_502: {content_type: \"a\\nb\"}
  - id: error-log-logger
    level: INFO
#END
",
    );
    let config = "\
apisix:
  proxy_cache:
    zones: [{name: own, memory_size: 1m}]
plugin_attr:
  skywalking: {endpoint_addr: nowhere}
deployment: {role: data_plane, role_data_plane: {config_provider: yaml}}
";
    std::fs::write(folder.path().join("config.yaml"), config).expect("a file");
    let (code, out, err) = run(&["check", text(folder.path())]);
    let told = out + &err;
    assert_eq!(code, 1, "{told}");
    for (pointer, what) in [
        ("/routes/1/plugins/proxy-cache/cache_zone", "has `own`"),
        ("/routes/1/plugins/skywalking", "plugin_attr.skywalking: /endpoint_addr"),
        ("/routes/1/plugins/forward-auth/request_headers/0", "a b"),
        ("/plugin_metadata/0/error_502/content_type", "control characters"),
        ("/plugin_metadata/1", "write one of `tcp`"),
    ] {
        let found = told.lines().any(|line| line.contains(&format!("{pointer}:")) && line.contains(what));
        assert!(found, "{pointer} {what} in:\n{told}");
    }
    assert!(!told.contains("/routes/0"), "{told}");
}

#[test]
fn a_dangling_reference_alone_is_an_error() {
    let folder = folder("routes:\n  - id: one\n    uri: /one\n    upstream_id: missing\n#END\n");
    let (code, out, err) = run(&["check", text(folder.path())]);
    assert_eq!(code, 1, "{out}{err}");
    assert!((out + &err).contains("missing"));
}

#[test]
fn broken_yaml_is_told_with_its_line() {
    let folder = folder("routes:\n  - id: one\n    uri: [\n#END\n");
    let (code, out, err) = run(&["check", text(folder.path())]);
    assert_eq!(code, 1, "{out}{err}");
    assert!((out + &err).contains("apisix.yaml:"));
}

#[test]
fn raw_snippets_are_refused_and_settings_without_meaning_listed() {
    let folder = folder(GOOD);
    let config = "\
nginx_config:
  worker_processes: 2
  http_server_configuration_snippet: |
    proxy_hide_header X-Powered-By;
deployment:
  role: data_plane
  role_data_plane:
    config_provider: yaml
";
    std::fs::write(folder.path().join("config.yaml"), config).expect("a file");
    let (code, out, err) = run(&["check", text(folder.path())]);
    assert_eq!(code, 1, "{out}{err}");
    let told = out + &err;
    assert!(told.contains("config.yaml:3") && told.contains("http_server_configuration_snippet"), "{told}");
}

#[test]
fn wrong_usage_is_two_and_an_absent_folder_is_not_success() {
    assert_eq!(run(&["check", "--no-such-option"]).0, 2);
    assert_eq!(run(&["no-such-command"]).0, 2);
    let (code, out, err) = run(&["check", "/no/such/folder"]);
    assert!(matches!(code, 1 | 3), "{code} {out}{err}");
    assert!((out + &err).contains("/no/such/folder"));
}

/// The JSON of `postern explain` and its exit code.
fn explain(args: &[&str]) -> (i32, Value) {
    let mut all = vec!["explain", "--output", "json"];
    all.extend_from_slice(args);
    let (code, out, err) = run(&all);
    let value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {code} {out}{err}"));
    (code, value)
}

#[test]
fn explain_tells_the_first_predicate_that_failed() {
    let folder = folder(GOOD);
    let dir = text(folder.path());
    let (code, answer) = explain(&["--dir", dir, "http://shop.test/shop/cart"]);
    assert_eq!(code, 0, "{answer}");
    assert_eq!(answer["route"]["id"], "shop");
    assert!(answer["upstream"]["nodes"].to_string().contains("127.0.0.1"), "{answer}");
    let (code, answer) = explain(&["--dir", dir, "-X", "POST", "http://shop.test/shop/cart"]);
    assert_eq!(code, 1, "{answer}");
    assert_eq!(answer["candidates"][0]["route"], "shop");
    assert!(answer["candidates"][0]["failed"].to_string().contains("method"), "{answer}");
    assert_eq!(answer["answer"]["status"], 404);
}

#[tokio::test]
async fn explain_of_a_running_gateway_agrees_with_what_it_does() {
    let origin = echo::start().await;
    let edge = Edge::file()
        .resource("services", json!({"id": "s", "upstream": origin.upstream(),
                                     "plugins": {"proxy-rewrite": {"uri": "/x"}}}))
        .resource("global_rules", json!({"id": "g", "plugins": {"request-id": {}}}))
        .route(json!({"id": "high", "uri": "/a", "priority": 5, "service_id": "s", "vars": [["arg_v", "==", "1"]]}))
        .route(json!({"id": "low", "uri": "/a", "service_id": "s",
                      "plugins": {"proxy-rewrite": {"uri": "/y"}}}))
        .start()
        .await;
    let control = edge.control.to_string();
    for (url, route, path) in [("http://h/a?v=1", "high", "/x"), ("http://h/a", "low", "/y")] {
        let (code, answer) = explain(&["--control", &control, url]);
        assert_eq!((code, &answer["route"]["id"]), (0, &json!(route)), "{answer}");
        let plugins: Vec<&str> = answer["plugins"]
            .as_array()
            .expect("plugins")
            .iter()
            .filter_map(|plugin| plugin["name"].as_str())
            .collect();
        assert_eq!(plugins, ["request-id", "proxy-rewrite"], "{answer}");
        let real = edge.get(url.trim_start_matches("http://h")).await.expect_status(200).json();
        assert_eq!(real["path"], path);
    }
    let (code, answer) = explain(&["--control", &control, "http://h/none"]);
    assert_eq!((code, &answer["answer"]["status"]), (1, &json!(404)), "{answer}");
}

#[test]
fn explain_without_a_gateway_says_so() {
    let nobody = e2e::ports::Port::free();
    let (code, out, err) = run(&["explain", "--control", &nobody.addr().to_string(), "http://h/"]);
    assert_eq!(code, 3, "{out}{err}");
    assert!(err.contains(&nobody.addr().to_string()), "{err}");
}

#[test]
fn an_import_report_classes_every_object() {
    let folder = folder(
        "\
routes:
  - {id: exact, uri: /a, upstream_id: 1}
  - {id: idle, uri: /b, upstream_id: 1, plugins: {ai: {}}}
  - {id: near, uri: /c, upstream_id: 1, plugins: {redirect: {uri: /x, encode_uri: true}}}
  - {id: lua, uri: /d, upstream_id: 1, plugins: {serverless-pre-function: {functions: []}}}
upstreams:
  - {id: 1, type: roundrobin, nodes: {\"127.0.0.1:1980\": 1}}
#END
",
    );
    let (code, out, err) = run(&["import", "report", text(folder.path()), "-o", "json"]);
    assert_eq!(code, 1, "something is refused: {out}{err}");
    let report: Value = serde_json::from_str(&out).expect("JSON");
    let class = |object: &str| {
        let items = report["items"].as_array().expect("items");
        let item = items.iter().find(|item| item["object"] == object).expect("the object");
        (item["class"].as_str().expect("a class"), item["line"].as_u64(), item["reasons"].to_string())
    };
    assert_eq!(class("routes/exact"), ("exact", Some(2), "[]".to_owned()));
    assert_eq!(class("routes/idle").0, "exact");
    let (near, _, reasons) = class("routes/near");
    assert!(near == "approximated" && reasons.contains("encode_uri"), "{reasons}");
    let (lua, line, reasons) = class("routes/lua");
    assert!(lua == "refused" && line == Some(5) && reasons.contains("serverless-pre-function"), "{reasons}");
    assert_eq!(
        (&report["exact"], &report["approximated"], &report["refused"]),
        (&json!(3), &json!(1), &json!(1))
    );

    let (code, out, _) = run(&["import", "report", text(folder.path())]);
    assert!(code == 1 && out.contains("3 exact, 1 approximated, 1 refused"), "{out}");
}
