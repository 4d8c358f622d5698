//! Every directory under `examples/` is checked, loaded, and does what it says.
//!
//! An example keeps its own settings; only the ports are changed, those of the gateway to free ones and those of its
//! upstreams to origins of the test: 1980 and 1981 echo, 1982 is a WebSocket, 50051 a gRPC service. `requests.txt`
//! holds what must come of its requests, in the format of `tests/compat`. `run.sh` of each is run as it is, on a
//! loopback of its own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use config::document::Document;
use e2e::certs::Authority;
use e2e::client::{Call, Connection, connect};
use e2e::compat::{self, check};
use e2e::consul::{self, Consul};
use e2e::edge::{binary, run};
use e2e::etcd::Etcd;
use e2e::origin::grpc::{WordsClient, word};
use e2e::origin::{Origin, echo, grpc, websocket};
use e2e::pebble::{self, Pebble};
use e2e::{Edge, Value, eventually, eventually_within};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name)
}

fn read(name: &str, file: &str) -> String {
    let path = folder(name).join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn settings(name: &str) -> Value {
    Document::parse("config.yaml", &read(name, "config.yaml")).expect("readable settings").into_value()
}

/// Starts an example with its resources, its ports replaced.
async fn start(name: &str, origins: &[(u16, &Origin)], env: &[(&str, &str)]) -> Edge {
    let mut text = read(name, "apisix.yaml");
    for (port, origin) in origins {
        text = text.replace(&format!("127.0.0.1:{port}"), &origin.node());
    }
    assert!(!text.contains("127.0.0.1:1980"), "{name}: an upstream of the example is not served by the test");
    let mut builder = Edge::file().example(settings(name)).text(&text);
    for (name, value) in env {
        builder = builder.env(name, value);
    }
    builder.start().await
}

/// Every request of `requests.txt`.
async fn requests(name: &str, edge: &Edge) {
    for case in compat::parse(&format!("{name}/requests.txt"), &read(name, "requests.txt")) {
        for step in &case.steps {
            let failures = check(edge.http, step).await;
            assert!(failures.is_empty(), "{} {}: {}", case.place, case.name, failures.join("\n"));
        }
    }
}

/// The directories under `examples/`.
fn all() -> BTreeSet<String> {
    std::fs::read_dir(folder("."))
        .expect("the examples")
        .map(|entry| entry.expect("an example"))
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn every_example_is_tested_and_passes_the_check() {
    let tested = [
        "acme",
        "canary",
        "consul",
        "etcd",
        "grpc",
        "key-auth",
        "lookup",
        "mesh",
        "quickstart",
        "signer",
        "tls-sni",
        "wasm",
        "websocket",
    ];
    assert_eq!(all().iter().map(String::as_str).collect::<Vec<_>>(), tested);
    let ca = Authority::new("ca");
    let leaf = ca.server(&["shop.example.com", "*.internal.example.com"]);
    for name in tested {
        assert!(!read(name, "README.md").is_empty());
        let output = Command::new(binary())
            .args(["check", folder(name).to_str().expect("a text path")])
            .envs([("SHOP_CERT", &leaf.cert), ("SHOP_KEY", &leaf.key), ("CLIENT_CA", &ca.pem())])
            .envs([("INTERNAL_CERT", &leaf.cert), ("INTERNAL_KEY", &leaf.key)])
            .output()
            .expect("postern can be run");
        let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {told}");
    }
    for name in ["orders", "payments-1", "payments-2"] {
        let file = folder("mesh").join(format!("{name}.yaml"));
        let (code, out, err) = run(&["sidecar", "check", "-c", file.to_str().expect("a text path")]);
        assert_eq!(code, 0, "{name}: {out} {err}");
    }
    config::ca::Ca::load(&folder("mesh").join("ca.yaml"), &config::env::ProcessEnv).expect("a good file");
    config::signer::Signer::load(&folder("signer"), &config::env::ProcessEnv).expect("a good file");
    assert_eq!(run(&["--version"]).0, 0);
}

#[tokio::test]
async fn quickstart_balances_and_rewrites() {
    let (one, two) = (echo::named("one").await, echo::named("two").await);
    let edge = start("quickstart", &[(1980, &one), (1981, &two)], &[]).await;
    for _ in 0..8 {
        edge.get("/balance").await.expect_status(200);
    }
    assert_eq!((one.requests(), two.requests()), (6, 2));
    let seen = edge.get("/hello/ann").await.expect_status(200).json();
    assert_eq!((&seen["path"], &seen["query"]), (&"/greet".into(), &"name=ann".into()));
}

#[tokio::test]
async fn canary_splits_by_header_and_by_share() {
    let (one, two) = (echo::named("one").await, echo::named("two").await);
    let edge = start("canary", &[(1980, &one), (1981, &two)], &[]).await;
    requests("canary", &edge).await;
    let before = two.requests();
    let mut connection = edge.connect().await;
    for _ in 0..200 {
        connection.send(Call::get("/")).await.expect_status(200);
    }
    let share = two.requests() - before;
    assert!((9..=11).contains(&share), "{share} of 200 are not five per cent");
}

#[tokio::test]
async fn key_auth_tells_who_it_is_and_limits_partners() {
    let one = echo::named("one").await;
    let edge = start("key-auth", &[(1980, &one)], &[]).await;
    requests("key-auth", &edge).await;
}

#[tokio::test]
async fn lookup_sends_each_id_to_its_place() {
    let (one, two) = (echo::named("one").await, echo::named("two").await);
    let edge = start("lookup", &[(1980, &one), (1981, &two)], &[]).await;
    requests("lookup", &edge).await;
}

#[tokio::test]
async fn wasm_runs_the_module_that_is_made_of_text() {
    let one = echo::named("one").await;
    let made = tempfile::tempdir().expect("a folder");
    let module = made.path().join("mark.wasm");
    let binary = wat::parse_str(read("wasm", "mark.wat")).expect("a module");
    std::fs::write(&module, binary).expect("a file");
    let edge = start("wasm", &[(1980, &one)], &[("MODULE", module.to_str().expect("a text path"))]).await;
    requests("wasm", &edge).await;
}

#[tokio::test]
async fn tls_sni_shows_each_name_its_certificate() {
    let one = echo::named("one").await;
    let ca = Authority::new("ca");
    let (shop, internal) = (ca.server(&["shop.example.com"]), ca.server(&["*.internal.example.com"]));
    let env = [
        ("SHOP_CERT", shop.cert.as_str()),
        ("SHOP_KEY", shop.key.as_str()),
        ("INTERNAL_CERT", internal.cert.as_str()),
        ("INTERNAL_KEY", internal.key.as_str()),
        ("CLIENT_CA", &ca.pem()),
    ];
    let edge = start("tls-sni", &[(1980, &one)], &env).await;
    let anonymous = ca.client_config().build();
    let mut connection =
        Connection::tls(edge.https, &anonymous, "shop.example.com").await.expect("a handshake");
    connection.send(Call::get("/")).await.expect_status(200);
    let misdirected = Call::get("/").header("host", "a.internal.example.com");
    connection.send(misdirected).await.expect_status(421);
    let known = ca.client_config().identity(&ca.client("client.example.com")).build();
    let mut connection =
        Connection::tls(edge.https, &known, "a.internal.example.com").await.expect("a handshake");
    connection.send(Call::get("/")).await.expect_status(200);
}

#[tokio::test]
async fn acme_gives_a_certificate_by_either_challenge() {
    if !Pebble::is_there() {
        return;
    }
    let one = echo::named("one").await;
    let pebble = Pebble::start(pebble::Settings::default()).await;
    let text = read("acme", "apisix.yaml").replace("127.0.0.1:1980", &one.node());
    let edge = Edge::file().example(settings("acme")).config(pebble.config()).text(&text).launch();
    pebble.http.lead_to(&[edge.http]);
    pebble.https.lead_to(&[edge.https]);
    eventually("the gateway is ready", || async {
        edge.readiness().await.filter(|answer| answer.status == 200)
    })
    .await;
    let config = pebble.client_config(&["http/1.1"]).await;
    for name in ["shop.example.test", "www.example.test", "api.example.test"] {
        let mut connection = eventually_within(Duration::from_secs(60), name, || async {
            Connection::tls(edge.https, &config, name).await.ok()
        })
        .await;
        connection.send(Call::get("/")).await.expect_status(200);
    }
}

#[tokio::test]
async fn grpc_calls_pass() {
    let service = grpc::start().await;
    let edge = start("grpc", &[(50051, &service)], &[]).await;
    let mut client = WordsClient::connect(edge.http).await;
    let answer = client.unary(tonic::Request::new(word("hello", 1))).await.expect("a call");
    assert_eq!(answer.get_ref().text, "HELLO");
}

#[tokio::test]
async fn websocket_messages_pass() {
    let service = websocket::start().await;
    let edge = start("websocket", &[(1982, &service)], &[]).await;
    let (mut socket, _) =
        tokio_tungstenite::client_async("ws://a/chat", connect(edge.http).await).await.expect("an upgrade");
    socket.send(Message::text("hello")).await.expect("a message sent");
    assert_eq!(socket.next().await.expect("an answer").expect("a message"), Message::text("hello"));
}

#[tokio::test]
async fn consul_has_the_nodes() {
    if !consul::is_there() {
        return;
    }
    let (one, two) = (echo::named("one").await, echo::named("two").await);
    let consul = Consul::start().await;
    for (file, origin) in [("one.json", &one), ("two.json", &two)] {
        let mut registration: Value = serde_json::from_str(&read("consul", file)).expect("JSON");
        registration["Port"] = origin.addr.port().into();
        consul.put("/v1/agent/service/register", &registration).await;
    }
    let mut own = settings("consul");
    own["discovery"]["consul"]["servers"][0] = consul.url().into();
    let edge = Edge::file().example(own).text(&read("consul", "apisix.yaml")).start().await;
    edge.until_status("/", 200).await;
    requests("consul", &edge).await;
    eventually("both are used", async || {
        edge.get("/").await;
        (one.requests() > 0 && two.requests() > 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn etcd_holds_what_the_admin_api_writes() {
    let one = echo::named("one").await;
    let etcd = Etcd::start().await;
    let edge = Edge::etcd(&etcd).example(settings("etcd")).start().await;
    for (path, file) in [("upstreams/samples", "upstream.json"), ("routes/hello", "route.json")] {
        let text = read("etcd", file).replace("127.0.0.1:1980", &one.node());
        edge.put(path, serde_json::from_str(&text).expect("JSON")).await;
    }
    edge.until_status("/hello", 200).await;
    requests("etcd", &edge).await;
    eventually("etcd has the keys", || async {
        (etcd.get("routes/hello").await.is_some() && etcd.get("upstreams/samples").await.is_some())
            .then_some(())
    })
    .await;
}

/// How to give a command a network of its own, where this is allowed.
fn own_network() -> Option<&'static [&'static str]> {
    const WAYS: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    WAYS.into_iter().find(|way| {
        let tried = Command::new("unshare").args(*way).args(["ip", "link", "set", "lo", "up"]).output();
        tried.is_ok_and(|output| output.status.success())
    })
}

/// The upstreams and clients that `run.sh` needs, built in the folder and profile of this test.
fn peers() -> PathBuf {
    let this = std::env::current_exe().expect("the path of this test");
    let profile = this.ancestors().nth(2).expect("a target folder");
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--package", "e2e", "--example", "peers"]).current_dir(folder(".."));
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().expect("cargo can be run").success(), "the peers do not build");
    profile.join("examples/peers")
}

#[test]
fn run_sh_shows_what_the_page_promises() {
    let Some(way) = own_network() else {
        eprintln!("no network namespaces here: `run.sh` of the examples is not run");
        return;
    };
    let postern = binary();
    let peers = peers();
    std::thread::scope(|scope| {
        for name in all().into_iter().filter(|name| folder(name).join("run.sh").exists()) {
            let (postern, peers) = (&postern, &peers);
            scope.spawn(move || {
                // One that waits for ever fails, and does not hold up those who test.
                let output = Command::new("timeout")
                    .args(["--kill-after", "5", "120", "unshare"])
                    .args(way)
                    .args(["sh", "-c", "ip link set lo up && exec ./run.sh"])
                    .current_dir(folder(&name))
                    .env("POSTERN", postern)
                    .env("PEERS", peers)
                    .output()
                    .expect("a shell");
                let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{name}: {told}");
            });
        }
    });
}
