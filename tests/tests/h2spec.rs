//! Every case of h2spec, over TLS and in cleartext; h2spec is a Go program that `make test` installs.

use std::path::PathBuf;

use e2e::certs::Authority;
use e2e::origin::Origin;
use e2e::{Edge, json};

fn program() -> PathBuf {
    let ours = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.cache/bin/h2spec"));
    if ours.exists() { ours } else { PathBuf::from("h2spec") }
}

/// Runs all sections against a port and gives the summary; panics with the failed cases.
async fn all_pass(port: u16, more: &'static [&'static str]) {
    let output = tokio::task::spawn_blocking(move || {
        std::process::Command::new(program())
            .args(["generic", "http2", "hpack", "-h", "localhost", "-o", "5", "-p"])
            .arg(port.to_string())
            .args(more)
            .output()
            .expect("h2spec can be run: tests/needs.sh installs it")
    })
    .await
    .expect("the thread of h2spec");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let summary = text.lines().rev().find(|line| line.contains(" tests, ")).unwrap_or("no summary");
    let failures: Vec<&str> = text.lines().skip_while(|line| !line.contains("Failures:")).collect();
    assert!(output.status.success(), "{summary}\n{}", failures.join("\n"));
    let passed: usize = summary
        .split(", ")
        .find_map(|part| part.strip_suffix(" passed")?.trim().parse().ok())
        .unwrap_or_else(|| panic!("{summary}"));
    assert!(passed >= 140 && summary.contains(" 0 failed"), "{summary}");
}

async fn edge() -> (Edge, Origin) {
    // Some cases need a body that does not end before they are through.
    let origin =
        Origin::http(|_| async { http::Response::new(bytes::Bytes::from(vec![b'x'; 20_000])) }).await;
    let leaf = Authority::new("ca").server(&["localhost"]);
    let edge = Edge::file()
        .resource("ssls", json!({"id": "a", "snis": ["localhost"], "cert": leaf.cert, "key": leaf.key}))
        .route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()}))
        .start()
        .await;
    (edge, origin)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes_in_cleartext() {
    let (edge, _origin) = edge().await;
    all_pass(edge.http.port(), &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes_over_tls() {
    let (edge, _origin) = edge().await;
    all_pass(edge.https.port(), &["-t", "-k"]).await;
}
