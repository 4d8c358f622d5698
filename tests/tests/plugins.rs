//! Plugins over real sockets: what their pages promise, limits that hold for all workers, the metrics page.
//!
//! What single plugins do with a request is told by the cases of `tests/compat`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use e2e::client::Call;
use e2e::edge::binary;
use e2e::origin::echo;
use e2e::ports::Port;
use e2e::{Edge, Value, json};
use tokio::task::JoinSet;

/// Statuses of `count` requests to `path` by each of `clients` connections.
async fn storm(edge: &Edge, path: &'static str, clients: usize, count: usize) -> Vec<u16> {
    let mut running = JoinSet::new();
    for _ in 0..clients {
        let mut connection = edge.connect().await;
        running.spawn(async move {
            let mut statuses = Vec::new();
            for _ in 0..count {
                statuses.push(connection.send(Call::get(path)).await.status);
            }
            statuses
        });
    }
    running.join_all().await.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_holds_for_all_workers_and_over_a_reload() {
    let origin = echo::start().await;
    let edge = Edge::embedded().config(json!({"nginx_config": {"worker_processes": 4}})).start().await;
    let limit = json!({"count": 100, "time_window": 3600, "rejected_code": 429});
    let route = json!({"uri": "/limited", "plugins": {"limit-count": limit}, "upstream": origin.upstream()});
    edge.put("routes/limited", route.clone()).await;
    edge.put("routes/other", json!({"uri": "/other", "upstream": origin.upstream()})).await;
    edge.until_status("/other", 200).await;
    let statuses = storm(&edge, "/limited", 16, 25).await;
    let passed = statuses.iter().filter(|status| **status == 200).count();
    assert_eq!((passed, statuses.len()), (100, 400), "exactly as many as allowed");

    let mut changed = route.clone();
    changed["desc"] = "another word".into();
    edge.put("routes/limited", changed).await;
    edge.put("routes/new", json!({"uri": "/new", "upstream": origin.upstream()})).await;
    edge.until_status("/new", 200).await;
    assert!(storm(&edge, "/limited", 4, 5).await.iter().all(|status| *status == 429), "counts stay");

    let mut raised = route;
    raised["plugins"]["limit-count"]["count"] = 101.into();
    edge.put("routes/limited", raised).await;
    edge.until_status("/limited", 200).await;
}

/// The value of the one sample that begins with `start`.
fn sample(text: &str, start: &str) -> f64 {
    let found: Vec<&str> = text.lines().filter(|line| line.starts_with(start)).collect();
    let [line] = found[..] else { panic!("{} lines begin with {start}:\n{text}", found.len()) };
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("a number: {line}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_in_the_metrics() {
    let origin = echo::start().await;
    let metrics = Port::free();
    let attr = json!({"prometheus": {
        "export_addr": {"ip": "127.0.0.1", "port": metrics.number()},
        "metrics": {"http_status": {"extra_labels": [{"agent": "$http_x_agent"}]}},
    }});
    let mut checked = origin.upstream();
    checked["id"] = "u".into();
    checked["checks"] = json!({"active": {"type": "tcp"}});
    let edge = Edge::file()
        .config(json!({"plugin_attr": attr, "nginx_config": {"worker_processes": 3}}))
        .resource("global_rules", json!({"id": "1", "plugins": {"prometheus": {}}}))
        .resource("services", json!({"id": "s", "name": "shop", "upstream_id": "u"}))
        .resource("upstreams", checked)
        .route(json!({"id": "r", "uri": "/counted/*", "service_id": "s"}))
        .route(json!({"id": "n", "name": "named", "uri": "/named", "service_id": "s",
                      "plugins": {"prometheus": {"prefer_name": true}}}))
        .start()
        .await;
    let mut statuses = storm(&edge, "/counted/status/204", 8, 25).await;
    statuses.extend(storm(&edge, "/named", 2, 5).await);
    statuses.extend(storm(&edge, "/nothing", 2, 5).await);
    assert_eq!(statuses.iter().filter(|status| **status == 404).count(), 10);

    let answer = Call::get("/apisix/prometheus/metrics").send_to(metrics.addr()).await.expect_status(200);
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = answer.text();
    let labels = |route: &str, uri: &str, service: &str| {
        format!(
            r#"route="{route}",matched_uri="{uri}",matched_host="",service="{service}",consumer="",node="""#
        )
    };
    let status =
        |code: u16, labels: String| sample(&text, &format!(r#"apisix_http_status{{code="{code}",{labels}"#));
    // The origin answers 200 to everything but the path that asks for a status.
    let counted = if text.contains(r#"code="204""#) { 204 } else { 200 };
    assert_eq!(status(counted, labels("r", "/counted/*", "s")), 200.0);
    assert_eq!(status(200, labels("named", "/named", "shop")), 10.0, "the route's own plugin counts, once");
    assert_eq!(status(404, labels("", "", "")), 10.0);
    let latency = |kind: &str, route: &str| {
        sample(&text, &format!(r#"apisix_http_latency_count{{type="{kind}",route="{route}""#))
    };
    assert_eq!(
        (latency("request", "r"), latency("upstream", "r"), latency("apisix", "r")),
        (200.0, 200.0, 200.0)
    );
    assert!(sample(&text, r#"apisix_bandwidth{type="egress",route="r""#) > 200.0 * 50.0);
    assert!(sample(&text, "apisix_http_requests_total ") >= 220.0);
    assert_eq!(sample(&text, r#"postern_gateway_answers_total{reason="route_not_found"}"#), 10.0);
    assert_eq!(sample(&text, r#"postern_config_items{kind="routes"}"#), 2.0);
    assert_eq!(sample(&text, r#"postern_config_rejected_items{kind="routes"}"#), 0.0);
    let (ip, port) =
        origin.node().rsplit_once(':').map(|(ip, port)| (ip.to_owned(), port.to_owned())).expect("ip:port");
    let node = format!(r#"apisix_upstream_status{{name="/apisix/upstreams/u",ip="{ip}",port="{port}"}}"#);
    assert_eq!(sample(&text, &node), 1.0);
    assert_eq!(sample(&text, "postern_config_stale_since_seconds "), 0.0);
    assert!(sample(&text, r#"apisix_nginx_http_current_connections{state="accepted"}"#) >= 12.0);
    Call::get("/").send_to(metrics.addr()).await.expect_status(404);
    check_with_promtool(&text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_cannot_make_series_without_end() {
    let origin = echo::start().await;
    let port = Port::free();
    let attr = json!({"prometheus": {
        "export_addr": {"ip": "127.0.0.1", "port": port.number()}, "series_limit": 50,
        "metrics": {"http_status": {"extra_labels": [{"who": "$http_x_who"}]}},
    }});
    let route = json!({"uri": "/*", "plugins": {"prometheus": {}}, "upstream": origin.upstream()});
    let edge = Edge::file().config(json!({"plugin_attr": attr})).route(route).start().await;
    let mut connection = edge.connect().await;
    for n in 0..500 {
        let call = Call::get("/a").header("x-who", &format!("{n}-{}", "w".repeat(300)));
        connection.send(call).await.expect_status(200);
    }
    let text = Call::get("/apisix/prometheus/metrics").send_to(port.addr()).await.text();
    let series: Vec<&str> = text.lines().filter(|line| line.starts_with("apisix_http_status{")).collect();
    assert_eq!(series.len(), 51);
    assert!(series.iter().all(|line| line.len() < 500), "values of clients are cut");
    assert_eq!(sample(&text, "apisix_nginx_metric_errors_total "), 450.0);
    assert_eq!(sample(&text, r#"apisix_http_status{code="200",route="other""#), 450.0);
}

/// The only remarks are about names that APISIX chose.
fn check_with_promtool(text: &str) {
    let spawned = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = spawned else {
        eprintln!("promtool is not installed: the text is not checked by it");
        return;
    };
    promtool.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("promtool reads");
    let output = promtool.wait_with_output().expect("promtool ends");
    let remarks = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let known = ["apisix_http_status ", "apisix_bandwidth "];
    let ours: Vec<_> = remarks
        .lines()
        .filter(|line| !line.is_empty() && !known.iter().any(|n| line.starts_with(n)))
        .collect();
    assert!(ours.is_empty(), "{ours:?}");
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The block behind three backquotes and `kind`.
fn block<'a>(page: &'a str, kind: &str) -> Option<&'a str> {
    let (_, rest) = page.split_once(&format!("```{kind}\n"))?;
    rest.split_once("```").map(|(block, _)| block)
}

/// The examples of all pages, run against `postern up` on a loopback of its own, as a reader would.
#[test]
fn the_examples_of_the_pages_show_what_they_promise() {
    let ways: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let own_network = ways.into_iter().find(|way| {
        let tried = Command::new("unshare").args(*way).args(["ip", "link", "set", "lo", "up"]).output();
        tried.is_ok_and(|output| output.status.success())
    });
    let Some(own_network) = own_network else {
        eprintln!("no network namespaces here: the examples of the plugin pages are not run");
        return;
    };
    let work = tempfile::tempdir().expect("a folder");
    let mut pages = Vec::new();
    for entry in std::fs::read_dir(root().join("docs/plugins")).expect("the pages") {
        let path = entry.expect("a page").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let page = std::fs::read_to_string(&path).expect("a readable page");
        let (Some(script), Some(promised)) = (block(&page, "sh"), block(&page, "text")) else {
            assert_eq!(name, "README", "a page without an example");
            continue;
        };
        std::fs::write(work.path().join(format!("{name}.sh")), script).expect("a file");
        pages.push((name, promised.to_owned()));
    }
    // A change of the configuration is in use within milliseconds, not before the answer: hence the wait after a PUT.
    let driver = r#"
        ip link set lo up
        "$POSTERN" up -c "$EXAMPLES" > log 2>&1 &
        gateway=$!
        trap 'kill $gateway' EXIT
        curl -s -o /dev/null --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:9080/ || exit 1
        field() { command curl -s http://127.0.0.1:9090/v1/config | sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p"; }
        applied() {
            for _ in $(seq 200); do [ "$(field applied_revision)" = "$(field revision)" ] && return; sleep 0.02; done
            echo "what was written is not in use"; exit 3
        }
        curl() { command curl "$@"; case "$*" in *PUT*) applied;; esac; }
        KEY=$(cat data/admin.key)
        for script in *.sh; do . "./$script" > "${script%.sh}.out" 2>&1 || exit 2; done
    "#;
    // An example that waits for ever fails, and does not hold up those who test.
    let output = Command::new("timeout")
        .args(["--kill-after", "5", "300", "unshare"])
        .args(own_network)
        .args(["sh", "-c", driver])
        .current_dir(work.path())
        .env("POSTERN", binary())
        .env("EXAMPLES", root().join("examples/quickstart").canonicalize().expect("the sample"))
        .env("POSTERN_DATA_DIR", work.path().join("data"))
        .output()
        .expect("a shell");
    let read = |name: &str| std::fs::read_to_string(work.path().join(name)).unwrap_or_default();
    assert!(output.status.success(), "{output:?}\n{}", read("log"));
    for (name, promised) in pages {
        let told = read(&format!("{name}.out"));
        let mut rest = told.as_str();
        for line in promised.lines() {
            let found = rest.find(line);
            assert!(found.is_some(), "{name}: `{line}` does not come, or not in this order:\n{told}");
            rest = &rest[found.map_or(0, |at| at + line.len())..];
        }
    }
}

/// What the Admin API tells of a plugin is what its page says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plugins_are_listed_with_their_schemas() {
    let edge = Edge::embedded().start().await;
    let list = edge.call_admin("GET", "plugins/list", None).await.expect_status(200).json();
    let names: Vec<&str> = list.as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    for name in &names {
        let schema =
            edge.call_admin("GET", &format!("schema/plugins/{name}"), None).await.expect_status(200).json();
        assert_eq!(schema["type"], "object", "{name}");
        assert!(root().join(format!("docs/plugins/{name}.md")).exists(), "{name} has a page");
    }
    assert!(names.len() >= 13, "{names:?}");
}
