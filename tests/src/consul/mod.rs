//! A real Consul, one server on loopback, that can be killed, stopped, emptied and asked anything.
//!
//! [`wire`] stands between it and whoever asks, and does what a real one cannot be made to do.

pub mod wire;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::client::{Answer, Call, Connection};
use crate::eventually_within;
use crate::ports::Port;
use crate::process::Process;

/// The name of the one node.
pub const NODE: &str = "n1";

/// Where Consul is: unpacked by `tests/needs.sh`, or installed.
fn program() -> Option<PathBuf> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/bin/consul");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::iter::once(ours).chain(std::env::split_paths(&path).map(|folder| folder.join("consul")));
    found.into_iter().find(|program| program.is_file())
}

/// Whether there is a Consul here; says so if there is none.
pub fn is_there() -> bool {
    let found = program().is_some();
    if !found {
        eprintln!("there is no Consul (tests/needs.sh unpacks one): not tested");
    }
    found
}

#[derive(Debug)]
pub struct Consul {
    folder: TempDir,
    http: Port,
    /// The token of everything that this asks.
    token: Option<String>,
    process: Process,
    _others: Vec<Port>,
}

impl Consul {
    /// Starts an empty one and waits until it has a leader.
    pub async fn start() -> Consul {
        Self::with(json!({})).await
    }

    /// The same with more settings, in the words of its configuration file.
    pub async fn with(settings: Value) -> Consul {
        let folder = tempfile::Builder::new().prefix("postern-consul-").tempdir().expect("a folder");
        let (http, server, serf) = (Port::free(), Port::free(), Port::free());
        let mut all = json!({
            "node_name": NODE, "server": true, "bootstrap_expect": 1,
            "bind_addr": "127.0.0.1", "client_addr": "127.0.0.1",
            "data_dir": folder.path().join("data"),
            "ports": {"http": http.number(), "server": server.number(), "serf_lan": serf.number(),
                      "serf_wan": -1, "dns": -1, "grpc": -1},
            "performance": {"raft_multiplier": 1},
            "disable_update_check": true, "log_level": "warn",
        });
        for (name, value) in settings.as_object().expect("an object") {
            match (&mut all[name], value) {
                (Value::Object(ours), Value::Object(more)) => ours.extend(more.clone()),
                (place, value) => *place = value.clone(),
            }
        }
        std::fs::write(folder.path().join("consul.json"), all.to_string()).expect("a configuration file");
        let process = launch(folder.path());
        let token = settings.pointer("/acl/tokens/master").and_then(Value::as_str).map(str::to_owned);
        let consul = Consul { folder, http, token, process, _others: vec![server, serf] };
        consul.until_ready().await;
        consul
    }

    pub fn addr(&self) -> SocketAddr {
        self.http.addr()
    }

    /// `http://127.0.0.1:port`
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// kill -9; data stays on disk.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Stops it without ending it: connections stay, nothing is answered.
    pub fn freeze(&self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// Removes all data; only after [`Consul::kill`].
    pub fn wipe(&self) {
        let _ = std::fs::remove_dir_all(self.folder.path().join("data"));
    }

    /// Starts it again on the same ports with its data.
    pub fn launch_again(&mut self) {
        self.process = launch(self.folder.path());
    }

    /// [`Consul::launch_again`], and waits until it answers.
    pub async fn start_again(&mut self) {
        self.launch_again();
        self.until_ready().await;
    }

    /// Until it knows itself: it has a leader, and its node is in the catalog.
    pub async fn until_ready(&self) {
        eventually_within(Duration::from_secs(60), "Consul answers", || async {
            let stream = TcpStream::connect(self.addr()).await.ok()?;
            let mut connection = Connection::http1_over(stream, self.addr().to_string(), "http").await;
            let call = self.call("GET", &format!("/v1/health/node/{NODE}"));
            let answer = connection.try_send(call).await.ok()?;
            (answer.status == 200 && !answer.json().as_array()?.is_empty()).then_some(())
        })
        .await;
    }

    /// Registers `addr` as an instance of a service, without a check.
    pub async fn register(&self, service: &str, id: &str, addr: SocketAddr) {
        self.register_with(service, id, addr, json!({})).await;
    }

    /// The same with more, in the words of `/v1/agent/service/register`.
    pub async fn register_with(&self, service: &str, id: &str, addr: SocketAddr, more: Value) {
        let mut body = json!({"ID": id, "Name": service, "Address": addr.ip(), "Port": addr.port()});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        self.put("/v1/agent/service/register?replace-existing-checks=true", &body).await;
    }

    pub async fn deregister(&self, id: &str) {
        self.put(&format!("/v1/agent/service/deregister/{id}"), &Value::Null).await;
    }

    pub async fn maintenance(&self, id: &str, on: bool) {
        self.put(&format!("/v1/agent/service/maintenance/{id}?enable={on}"), &Value::Null).await;
    }

    /// A PUT that has to succeed.
    pub async fn put(&self, path: &str, body: &Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.call("PUT", path).body(body).send_to(self.addr()).await.expect_status(200);
    }

    /// A DELETE that has to succeed.
    pub async fn delete(&self, path: &str) {
        self.call("DELETE", path).send_to(self.addr()).await.expect_status(200);
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call("GET", path).send_to(self.addr()).await
    }

    fn call(&self, method: &str, path: &str) -> Call {
        let call = Call::new(method, path);
        match &self.token {
            Some(token) => call.header("x-consul-token", token),
            None => call,
        }
    }

    /// What the process wrote.
    pub fn output(&self) -> String {
        self.process.output()
    }
}

fn launch(folder: &Path) -> Process {
    let program = program().expect("a Consul: run tests/needs.sh");
    let args = ["agent".to_owned(), format!("-config-file={}", folder.join("consul.json").display())];
    Process::start(&program, &args, &[], folder, &folder.join("output"))
}
