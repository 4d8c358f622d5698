//! `postern register`: an application is in its registry while it runs, and out of it before it is stopped.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::consul::{self, Consul};
use e2e::edge::binary;
use e2e::load::Load;
use e2e::origin::{Origin, echo};
use e2e::{Edge, eventually, json};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The command, for the application that answers at `origin`. It runs `program`.
struct Registered(Child);

impl Registered {
    fn start(consul: &Consul, origin: &Origin, more: &[&str], program: &[&str]) -> Registered {
        let port = origin.addr.port().to_string();
        let url = consul.url();
        let child = Command::new(binary())
            .args(["register", "--service", "orders", "--address", "127.0.0.1", "--port", &port])
            .args(["--consul", &url, "--ttl", "10", "--meta", "version=2"])
            .args(more)
            .arg("--")
            .args(program)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("postern can be run");
        Registered(child)
    }

    fn terminate(&self) {
        let pid = i32::try_from(self.0.id()).expect("a pid fits i32");
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it runs");
    }

    async fn ended(&mut self) -> i32 {
        eventually("the command ends", || {
            let ended = self.0.try_wait().expect("a child");
            async move { ended.map(|status| status.code().unwrap_or(-1)) }
        })
        .await
    }
}

impl Registered {
    /// What it said until its end.
    fn said(&mut self) -> String {
        let mut text = String::new();
        self.0.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
        text
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn known(consul: &Consul, origin: &Origin) -> bool {
    let services = consul.get("/v1/agent/services").await.expect_status(200).json();
    services.get(format!("orders-{}", origin.addr.port())).is_some()
}

#[tokio::test]
async fn what_ends_by_itself_leaves_the_registry_and_gives_its_code() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let origin = echo::start().await;
    let mut command =
        Registered::start(&consul, &origin, &[], &["sh", "-c", "read line < /dev/null; sleep 2; exit 7"]);
    eventually("it is registered", || async { known(&consul, &origin).await.then_some(()) }).await;
    assert_eq!(command.ended().await, 7);
    assert!(!known(&consul, &origin).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_nothing_is_lost_when_it_is_told_to_stop() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let (stays, goes) = (echo::named("stays").await, echo::named("goes").await);
    consul.register("orders", "stays", stays.addr).await;
    let upstream = json!({"type": "roundrobin", "service_name": "orders", "discovery_type": "consul"});
    let edge = Edge::file()
        .config(json!({"discovery": {"consul": {"servers": [consul.url()]}}}))
        .route(json!({"id": "r", "uri": "/*", "upstream": upstream}))
        .start()
        .await;
    edge.until_status("/", 200).await;
    let gateway = edge.control.to_string();
    let more = ["--gateway", &gateway, "--patience", "20"];
    let mut command = Registered::start(&consul, &goes, &more, &["sleep", "300"]);
    let load = Load::start(edge.http, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, 10, 200);
    eventually("it is used", || async { (goes.requests() > 10).then_some(()) }).await;
    command.terminate();
    assert_eq!(command.ended().await, 143, "the code of what was run");
    assert!(!known(&consul, &goes).await);
    let served = goes.requests();
    // It may be stopped as soon as the command has ended.
    goes.stop().await;
    let before = stays.requests();
    eventually("the other one serves on", || async { (stays.requests() > before + 50).then_some(()) }).await;
    load.finish().await.expect_no_failure();
    assert!(served > 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_started_again_is_used_again_by_who_has_not_seen_it_leave() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let (stays, goes) = (echo::start().await, echo::start().await);
    // This gateway knows the nodes by heart.
    let upstream = json!({"id": "orders", "type": "roundrobin", "nodes": {stays.node(): 1, goes.node(): 1}});
    let edge = Edge::file()
        .resource("upstreams", upstream)
        .route(json!({"id": "r", "uri": "/*", "upstream_id": "orders"}))
        .start()
        .await;
    edge.until_status("/", 200).await;
    let gateway = edge.control.to_string();
    let more = ["--gateway", &gateway, "--patience", "20"];
    let drains = async || edge.call_control("/v1/drains").await.expect_status(200).json();
    let mut command = Registered::start(&consul, &goes, &more, &["sleep", "300"]);
    eventually("it is registered", || async { known(&consul, &goes).await.then_some(()) }).await;
    command.terminate();
    assert_eq!(command.ended().await, 143);
    assert_eq!(drains().await[0]["node"], goes.node());
    let _command = Registered::start(&consul, &goes, &more, &["sleep", "300"]);
    eventually("it is used again", || async { (drains().await == json!([])).then_some(()) }).await;
}

#[tokio::test]
async fn where_no_gateway_answers_others_have_time_to_notice() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let origin = echo::start().await;
    let away = e2e::ports::Port::free();
    let gateway = away.addr().to_string();
    let more = ["--gateway", &gateway, "--patience", "3"];
    let mut command = Registered::start(&consul, &origin, &more, &["sleep", "300"]);
    eventually("it is registered", || async { known(&consul, &origin).await.then_some(()) }).await;
    let told = Instant::now();
    command.terminate();
    assert_eq!(command.ended().await, 143);
    assert!(told.elapsed() >= Duration::from_secs(3), "it ran on for {:?}", told.elapsed());
    assert!(!known(&consul, &origin).await);
    let said = command.said();
    assert!(said.contains(&format!("http://{gateway}: not connected")), "{said}");
    assert!(said.contains("is the Control API of a gateway"), "{said}");
}

#[test]
fn what_cannot_be_registered_is_told() {
    let (code, _, err) = e2e::edge::run(&[
        "register",
        "--service",
        "orders",
        "--port",
        "80",
        "--consul",
        "http://127.0.0.1:1",
        "--",
        "true",
    ]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("http://127.0.0.1:1"), "{err}");
}
