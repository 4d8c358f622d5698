//! WASM plugins: a sample module does what a module can do, and what it must not be able to do. There are two of it, one
//! in Rust and one in the text form of WebAssembly.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use e2e::client::Call;
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};
use tempfile::TempDir;

/// Where the sample comes from.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// Text of WebAssembly, which is always there.
    Text,
    /// Rust, where its target for WebAssembly is installed.
    Rust,
}

/// Both, or the one that can be had: `tests/needs.sh` installs the target where it can.
fn sources() -> Vec<Source> {
    let asked = Command::new("rustc").args(["--print", "sysroot"]).output().expect("rustc");
    let sysroot = String::from_utf8_lossy(&asked.stdout);
    if Path::new(sysroot.trim()).join("lib/rustlib/wasm32-wasip1").is_dir() {
        return vec![Source::Text, Source::Rust];
    }
    eprintln!("Rust's target wasm32-wasip1 is not installed: only the module in text form is tested");
    vec![Source::Text]
}

impl Source {
    /// The sample, which says `version` of itself, as a module.
    fn module(self, version: &'static str) -> Vec<u8> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        match self {
            Self::Text => {
                let text = std::fs::read_to_string(root.join("wasm/sample.wat")).expect("the sample");
                wat::parse_str(text.replace("\"one\"", &format!("\"{version}\""))).expect("a module")
            }
            Self::Rust => std::fs::read(build(version)).expect("the module"),
        }
    }
}

/// Builds the sample in Rust; once for each version.
fn build(version: &'static str) -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = root.join("../target/wasm").join(version);
    let output = Command::new(env!("CARGO"))
        .args(["build", "--release", "--locked", "--quiet", "--target", "wasm32-wasip1", "--manifest-path"])
        .arg(root.join("wasm/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env("SAMPLE_VERSION", version)
        .output()
        .expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target.join("wasm32-wasip1/release/sample.wasm")
}

struct Setting {
    edge: Edge,
    origin: Origin,
    file: PathBuf,
    _folder: TempDir,
}

async fn gateway(source: Source) -> Setting {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("sample.wasm");
    std::fs::write(&file, source.module("one")).expect("a file");
    let origin = echo::start().await;
    let edge = Edge::embedded()
        .config(json!({"wasm": {"plugins": [
            {"name": "sample", "priority": 7999, "file": file, "fuel": 50_000_000, "memory": "16m"},
        ]}}))
        .start()
        .await;
    edge.put(
        "routes/1",
        json!({"uri": "/*", "plugins": {"sample": {"conf": "blue"}}, "upstream": origin.upstream()}),
    )
    .await;
    edge.until_status("/", 200).await;
    Setting { edge, origin, file, _folder: folder }
}

async fn ask(edge: &Edge, name: &str, value: &str) -> (u16, Value) {
    let answer = edge.send(Call::get("/a?b=c").header(name, value)).await;
    (answer.status, serde_json::from_str(answer.text().as_ref()).unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_sees_and_changes_requests_and_answers() {
    for source in sources() {
        sees_and_changes(source).await;
    }
}

async fn sees_and_changes(source: Source) {
    let Setting { edge, origin, .. } = gateway(source).await;
    let answer = edge.get("/a").await;
    assert_eq!(answer.header("x-sample"), Some("one"), "{source:?}");
    let seen = answer.json();
    assert_eq!(seen["headers"]["x-mark"][0], "blue", "its configuration: {seen}");
    assert_eq!(seen["headers"]["x-from"][0], "127.0.0.1", "a variable");

    let blocked = edge.send(Call::get("/a").header("x-block", "1")).await;
    assert_eq!(
        (blocked.status, blocked.header("x-by"), blocked.text().as_str()),
        (403, Some("sample"), "blocked")
    );
    let (status, seen) = ask(&edge, "x-rewrite", "1").await;
    assert_eq!((status, &seen["path"], &seen["query"]), (200, &json!("/rewritten"), &json!("by=wasm")));
    let (status, seen) = ask(&edge, "x-ask", &origin.addr.to_string()).await;
    assert_eq!((status, &seen["headers"]["x-asked"][0]), (200, &json!("200")), "a call was made: {seen}");
    let (status, seen) = ask(&edge, "x-ask", "127.0.0.1:1").await;
    assert_eq!((status, &seen["headers"]["x-asked"][0]), (200, &json!("none")), "a call without an answer");

    let body = edge.send(Call::new("POST", "/a").header("x-body", "1").body("small letters")).await.json();
    assert_eq!(body["body"], "SMALL LETTERS", "{body}");
    eventually("the end of a request is told", async || {
        edge.output().contains("sample saw the end with 403").then_some(())
    })
    .await;

    // The same module with another configuration, and one that it refuses.
    let other =
        json!({"uri": "/other", "plugins": {"sample": {"conf": {"a": 1}}}, "upstream": origin.upstream()});
    edge.put("routes/2", other).await;
    let seen = edge.until_status("/other", 200).await.json();
    assert!(seen["headers"]["x-mark"][0] == "blue" || seen["headers"]["x-mark"][0] == "{\"a\":1}", "{seen}");
    eventually("the new route is in use", async || {
        (edge.get("/other").await.json()["headers"]["x-mark"][0] == "{\"a\":1}").then_some(())
    })
    .await;
    for wrong in
        [json!({}), json!({"conf": ""}), json!({"conf": {}}), json!({"conf": 1}), json!({"cnf": "a"})]
    {
        let route = json!({"uri": "/w", "plugins": {"sample": wrong}, "upstream": origin.upstream()});
        let answer = edge.call_admin("PUT", "routes/w", Some(&route)).await;
        assert_eq!(answer.status, 400, "{wrong}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_that_misbehaves_fails_its_own_request_only() {
    for source in sources() {
        misbehaves(source).await;
    }
}

async fn misbehaves(source: Source) {
    let setting = gateway(source).await;
    let edge = &setting.edge;
    for fault in ["x-spin", "x-panic", "x-eat"] {
        let (status, _) = ask(edge, fault, "1").await;
        assert_eq!(status, 500, "{source:?} {fault}");
        let (status, seen) = ask(edge, "x-fine", "1").await;
        assert_eq!((status, &seen["headers"]["x-mark"][0]), (200, &json!("blue")), "after {fault}: {seen}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_module_takes_effect_and_a_broken_one_does_not() {
    for source in sources() {
        changes(source).await;
    }
}

async fn changes(source: Source) {
    let setting = gateway(source).await;
    let (edge, file) = (&setting.edge, &setting.file);
    std::fs::write(file, "no module").expect("a file");
    eventually("the broken file is told", async || edge.output().contains("the module stays").then_some(()))
        .await;
    assert_eq!(edge.get("/a").await.header("x-sample"), Some("one"));
    std::fs::write(file, source.module("two")).expect("a file");
    eventually("the changed module is used", async || {
        let answer = edge.get("/a").await;
        assert_eq!(answer.status, 200);
        (answer.header("x-sample") == Some("two")).then_some(())
    })
    .await;
}
