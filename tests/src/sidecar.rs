//! A mesh on loopback: an authority that gives identities, and running `postern sidecar` processes that use them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::certs::Authority;
use crate::client::{Answer, Call, Connection};
use crate::edge::{binary, merge, write_file};
use crate::eventually;
use crate::ports::Port;
use crate::process::Process;

/// The trust domain of every mesh in tests.
pub const DOMAIN: &str = "mesh.local";

/// A start in a debug build beside a compiling workspace may take this long.
const START: Duration = Duration::from_secs(60);
/// An orderly end may take this long.
const END: Duration = Duration::from_secs(120);

/// The id of a workload.
pub fn id(name: &str) -> String {
    format!("spiffe://{DOMAIN}/ns/default/sa/{name}")
}

/// An authority of a mesh.
pub struct Mesh {
    pub authority: Authority,
}

impl Default for Mesh {
    fn default() -> Self {
        Self::new()
    }
}

impl Mesh {
    pub fn new() -> Mesh {
        Mesh { authority: Authority::new("mesh root") }
    }

    /// A sidecar of the workload `name`, to be described further. It takes its identity from files.
    pub fn sidecar(&self, name: &str) -> SidecarBuilder {
        let builder = SidecarBuilder::new(name);
        self.identity(&builder.folder, &id(name));
        builder
            .config(json!({"ca": {"files": {"cert": "svid.pem", "key": "svid.key", "trust": "roots.pem"}}}))
    }

    /// Writes an identity of this mesh into a folder.
    pub fn identity(&self, folder: &Path, id: &str) {
        let leaf = self.authority.svid(id);
        write_file(&folder.join("svid.key"), &leaf.key);
        write_file(&folder.join("svid.pem"), &leaf.cert);
        write_file(&folder.join("roots.pem"), &self.authority.pem());
    }
}

impl crate::ca::Authority {
    /// A sidecar of the workload `name`, to be described further. It takes its identity from this authority.
    pub fn sidecar(&self, name: &str) -> SidecarBuilder {
        let builder = SidecarBuilder::new(name);
        let ca = self.proof(&builder.folder, name);
        builder.config(json!({"ca": ca}))
    }

    /// `ca` of a sidecar or a gateway, and a token for `name` in its folder that is good for a few starts.
    pub fn proof(&self, folder: &Path, name: &str) -> Value {
        let (code, token, err) = self.command(&["token", "create", "--identity", &id(name), "--uses", "10"]);
        assert_eq!(code, 0, "{err}");
        let file = folder.join(format!("{name}.token"));
        write_file(&file, token.trim());
        json!({"address": self.addr.to_string(), "pin_file": self.data().join("pin"), "token_file": file})
    }
}

/// Describes a sidecar before it is started.
pub struct SidecarBuilder {
    folder: PathBuf,
    config: Value,
    admin: SocketAddr,
    ports: Vec<Port>,
    holder: TempDir,
    command: Vec<String>,
    env: Vec<(String, String)>,
}

impl SidecarBuilder {
    fn new(name: &str) -> SidecarBuilder {
        let holder = tempfile::Builder::new().prefix("postern-sidecar-").tempdir().expect("a folder");
        let admin = Port::free();
        let config = json!({
            "trust_domain": DOMAIN,
            "workload": {"service": name},
            "admin": {"listen": admin.addr().to_string()},
            "drain": {"propagation": 0, "grace": 60},
        });
        SidecarBuilder {
            folder: holder.path().to_owned(),
            config,
            admin: admin.addr(),
            ports: vec![admin],
            holder,
            command: Vec::new(),
            env: vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())],
        }
    }

    /// More in the environment of the process.
    pub fn env(mut self, env: Vec<(String, String)>) -> Self {
        self.env.extend(env);
        self
    }

    /// Merges `patch` into the file (RFC 7396).
    pub fn config(mut self, patch: Value) -> Self {
        merge(&mut self.config, patch);
        self
    }

    fn port(&mut self) -> SocketAddr {
        let port = Port::free();
        let address = port.addr();
        self.ports.push(port);
        address
    }

    fn push(&mut self, pointer: &[&str], value: Value) {
        let mut at = &mut self.config;
        for key in pointer {
            at = at.as_object_mut().expect("an object").entry(*key).or_insert(json!({}));
        }
        if at.is_object() {
            *at = json!([]);
        }
        at.as_array_mut().expect("a list").push(value);
    }

    /// The application listens at `forward`; more of the port in `more`.
    pub fn inbound(mut self, forward: SocketAddr, more: Value) -> Self {
        let listen = self.port();
        let mut port = json!({"listen": listen.to_string(), "forward": forward.to_string()});
        merge(&mut port, more);
        self.push(&["inbound", "ports"], port);
        self
    }

    /// A service at `node`, with the identity of `name` unless `more` says otherwise, and a listener for it.
    pub fn service(mut self, name: &str, node: SocketAddr, more: Value) -> Self {
        let listen = self.port();
        let mut service = json!({
            "name": name,
            "upstream": {"type": "roundrobin", "nodes": {node.to_string(): 1}},
            "identities": [id(name)],
        });
        merge(&mut service, more);
        self.push(&["services"], service);
        let listener = json!({"listen": listen.to_string(), "service": name});
        self.push(&["outbound", "listeners"], listener);
        self
    }

    /// Also an HTTP proxy and a SOCKS5 proxy.
    pub fn proxies(mut self) -> Self {
        let (http, socks) = (self.port(), self.port());
        self.config(json!({"outbound": {"http_proxy": http.to_string(), "socks5": socks.to_string()}}))
    }

    /// Runs this application behind the sidecar.
    pub fn exec(mut self, command: &[&str]) -> Self {
        self.command = command.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Starts the process and waits until it is ready.
    pub async fn start(self) -> Sidecar {
        let mut sidecar = self.launch();
        sidecar.until_ready().await;
        sidecar
    }

    /// Starts the process without waiting.
    pub fn launch(self) -> Sidecar {
        let file = self.folder.join("sidecar.yaml");
        write_file(&file, &serde_json::to_string_pretty(&self.config).expect("JSON"));
        let mut args = vec!["sidecar".to_owned()];
        if !self.command.is_empty() {
            args.push("exec".to_owned());
        }
        args.extend(["-c".to_owned(), file.display().to_string()]);
        if !self.command.is_empty() {
            args.push("--".to_owned());
            args.extend(self.command.iter().cloned());
        }
        let process = Process::start(&binary(), &args, &self.env, &self.folder, &self.folder.join("output"));
        Sidecar {
            admin: self.admin,
            folder: self.folder,
            config: self.config,
            process,
            _ports: self.ports,
            _holder: self.holder,
        }
    }
}

/// A running sidecar; ended with its whole folder when dropped.
pub struct Sidecar {
    pub admin: SocketAddr,
    pub folder: PathBuf,
    /// What its file says.
    pub config: Value,
    process: Process,
    _ports: Vec<Port>,
    _holder: TempDir,
}

impl Sidecar {
    fn address(&self, pointer: &str) -> SocketAddr {
        let text = self.config.pointer(pointer).and_then(Value::as_str);
        text.unwrap_or_else(|| panic!("{pointer} in the file")).parse().expect("an address")
    }

    /// The listener of the application's port of this number.
    pub fn inbound(&self, number: usize) -> SocketAddr {
        self.address(&format!("/inbound/ports/{number}/listen"))
    }

    /// The listener of the service of this number.
    pub fn listener(&self, number: usize) -> SocketAddr {
        self.address(&format!("/outbound/listeners/{number}/listen"))
    }

    pub fn http_proxy(&self) -> SocketAddr {
        self.address("/outbound/http_proxy")
    }

    pub fn socks5(&self) -> SocketAddr {
        self.address("/outbound/socks5")
    }

    /// A GET of the admin interface.
    #[track_caller]
    pub fn ask(&self, path: &str) -> impl Future<Output = Answer> {
        Call::get(path).send_to(self.admin)
    }

    /// Changes the file, and waits until it is taken over.
    pub async fn reload(&mut self, patch: Value) {
        let before = self.ask("/v1/config").await.json()["taken_over"].as_u64();
        merge(&mut self.config, patch);
        let text = serde_json::to_string_pretty(&self.config).expect("JSON");
        write_file(&self.folder.join("sidecar.yaml"), &text);
        eventually("the file is taken over", || async {
            (self.ask("/v1/config").await.json()["taken_over"].as_u64() > before).then_some(())
        })
        .await;
    }

    /// Writes the file without waiting for anything.
    pub fn write(&self, text: &str) {
        write_file(&self.folder.join("sidecar.yaml"), text);
    }

    /// What `/status/ready` says, or `None` while nobody listens.
    pub async fn readiness(&self) -> Option<Answer> {
        let stream = tokio::net::TcpStream::connect(self.admin).await.ok()?;
        let mut connection = Connection::http1_over(stream, self.admin.to_string(), "http").await;
        connection.try_send(Call::get("/status/ready")).await.ok()
    }

    pub async fn until_ready(&mut self) {
        let deadline = Instant::now() + START;
        let mut last = None;
        loop {
            let answer = self.readiness().await;
            if answer.as_ref().is_some_and(|answer| answer.status == 200) {
                return;
            }
            last = answer.map(|answer| answer.text()).or(last);
            if let Some(status) = self.process.ended() {
                panic!("the sidecar ended with {status} instead of becoming ready:\n{}", self.output());
            }
            assert!(Instant::now() < deadline, "not ready after {START:?}: {last:?}\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Everything the process has written.
    pub fn output(&self) -> String {
        self.process.output()
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for the process to end by itself.
    pub async fn wait(&mut self) -> ExitStatus {
        self.process.wait(END).await
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.ended()
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.config, self.output());
        }
    }
}
