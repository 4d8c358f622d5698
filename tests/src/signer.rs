//! Running `postern signer` processes, and what a gateway needs to ask them.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::certs::{Authority, Leaf};
use crate::client::{Answer, Call, Connection};
use crate::edge::{binary, merge, write_file};
use crate::ports::Port;
use crate::process::Process;

/// The name in the certificates of all signers.
pub const SIGNER: &str = "signer.test";
/// The name in the certificate of a gateway that signers know.
pub const GATEWAY: &str = "gateway.test";

/// A start in a debug build beside a compiling workspace may take this long.
const START: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(60);

/// A `postern signer run` with a folder of its own; ended when dropped.
pub struct Signer {
    pub addr: SocketAddr,
    pub status: SocketAddr,
    pub folder: PathBuf,
    process: Process,
    _ports: [Port; 2],
    _holder: TempDir,
}

impl Signer {
    /// A signer with these keys, for gateways whose certificates are signed by `authority` and have the name [`GATEWAY`].
    pub async fn start(authority: &Authority, keys: &[(&str, &Leaf)]) -> Signer {
        Signer::start_with(authority, keys, json!({})).await
    }

    /// [`Signer::start`] with more in `signer.yaml` (RFC 7396).
    pub async fn start_with(authority: &Authority, keys: &[(&str, &Leaf)], patch: Value) -> Signer {
        let holder = tempfile::Builder::new().prefix("postern-signer-").tempdir().expect("a folder");
        let folder = holder.path().to_owned();
        std::fs::create_dir(folder.join("keys")).expect("a folder");
        for (name, leaf) in keys {
            write_secret(&folder.join(format!("keys/{name}.pem")), &leaf.key);
        }
        let own = authority.server(&[SIGNER]);
        write_file(&folder.join("signer.pem"), &own.cert);
        write_file(&folder.join("signer.key"), &own.key);
        write_file(&folder.join("gateways.pem"), &authority.pem());
        let ports = [Port::free(), Port::free()];
        let mut config = json!({
            "listen": ports[0].addr().to_string(),
            "status": ports[1].addr().to_string(),
            "tls": {"cert_file": "signer.pem", "key_file": "signer.key", "client_ca_file": "gateways.pem"},
            "clients": [{"name": GATEWAY, "keys": ["*"]}],
        });
        merge(&mut config, patch);
        write_file(&folder.join("signer.yaml"), &config.to_string());
        let (addr, status) = (ports[0].addr(), ports[1].addr());
        let process = launch(&folder);
        let mut signer = Signer { addr, status, folder, process, _ports: ports, _holder: holder };
        signer.until_up().await;
        signer
    }

    /// Starts it anew, after it has ended, where it was.
    pub async fn restart(&mut self) {
        self.process.kill();
        self.process = launch(&self.folder);
        self.until_up().await;
    }

    async fn until_up(&mut self) {
        let deadline = Instant::now() + START;
        while self.ask("/healthz").await.is_none_or(|answer| answer.status != 200) {
            if let Some(status) = self.process.ended() {
                panic!("the signer ended with {status}:\n{}", self.output());
            }
            assert!(Instant::now() < deadline, "not up after {START:?}:\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A GET of its status interface; `None` while nobody listens.
    pub async fn ask(&self, path: &str) -> Option<Answer> {
        let stream = tokio::net::TcpStream::connect(self.status).await.ok()?;
        let mut connection = Connection::http1_over(stream, self.status.to_string(), "http").await;
        connection.try_send(Call::get(path)).await.ok()
    }

    /// How many signatures it has made.
    pub async fn signed(&self) -> u64 {
        let status = self.ask("/status").await.expect("its status").expect_status(200).json();
        status["signed"].as_u64().expect("a number")
    }

    /// Puts a key, or anything, into its directory, where others may not read it.
    pub fn put(&self, file: &str, text: &str) {
        write_secret(&self.folder.join("keys").join(file), text);
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits for the process to end by itself.
    pub async fn wait(&mut self) -> ExitStatus {
        self.process.wait(END).await
    }

    /// Everything the process has written.
    pub fn output(&self) -> String {
        self.process.output()
    }
}

fn launch(folder: &Path) -> Process {
    let args = ["signer", "run", "-c"].map(str::to_owned).into_iter().chain([folder.display().to_string()]);
    Process::start(&binary(), &args.collect::<Vec<_>>(), &[], folder, &folder.join("output"))
}

/// Replaces a file that nobody else may read.
pub fn write_secret(path: &Path, text: &str) {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .expect("a file in our own folder");
    file.write_all(text.as_bytes()).expect("a file in our own folder");
    std::fs::rename(&new, path).expect("a file in our own folder");
}

/// What a gateway shows to signers, in a folder of its own.
pub struct Gateway {
    folder: TempDir,
}

impl Gateway {
    /// With a certificate of this authority, in this name.
    pub fn new(authority: &Authority, name: &str) -> Gateway {
        let folder = tempfile::tempdir().expect("a folder");
        let leaf = authority.client(name);
        write_file(&folder.path().join("gateway.pem"), &leaf.cert);
        write_file(&folder.path().join("gateway.key"), &leaf.key);
        Gateway { folder }
    }

    /// `postern.signers` of config.yaml: the pool `main` with these nodes, whose certificates `authority` has signed.
    pub fn pool(&self, authority: &Authority, nodes: &[SocketAddr], patch: Value) -> Value {
        let file = |name: &str| self.folder.path().join(name);
        write_file(&file("signers.pem"), &authority.pem());
        let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
        let mut pool = json!({
            "name": "main", "nodes": nodes, "server_name": SIGNER,
            "cert_file": file("gateway.pem"), "key_file": file("gateway.key"), "ca_file": file("signers.pem"),
        });
        merge(&mut pool, patch);
        json!({"postern": {"signers": [pool]}})
    }
}
