//! A running `postern discovery serve` with a folder and a port of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::edge::binary;
use crate::eventually_within;
use crate::ports::Port;
use crate::process::Process;

/// Ended when dropped.
pub struct DiscoveryServer {
    pub addr: SocketAddr,
    process: Option<Process>,
    folder: TempDir,
    _port: Port,
}

impl DiscoveryServer {
    /// Asks the registries of `discovery` as it is in `config.yaml`; `more` is merged into its own settings.
    pub async fn start(discovery: Value, more: Value) -> DiscoveryServer {
        let folder = tempfile::Builder::new().prefix("postern-e2e-").tempdir().expect("a folder");
        let port = Port::free();
        let mut own = json!({"listen": port.addr().to_string()});
        for (key, value) in more.as_object().into_iter().flatten() {
            own[key] = value.clone();
        }
        let config = json!({
            "discovery": discovery,
            "postern": {"data_dir": folder.path().join("data"), "discovery_server": own},
        });
        std::fs::write(folder.path().join("config.yaml"), config.to_string()).expect("config.yaml");
        let mut server = DiscoveryServer { addr: port.addr(), process: None, folder, _port: port };
        server.run().await;
        server
    }

    /// Starts it again, after [`kill`](Self::kill).
    pub async fn run(&mut self) {
        let folder = self.folder.path();
        let args = ["discovery", "serve", "-c", "config.yaml"].map(str::to_owned);
        self.process = Some(Process::start(&binary(), &args, &[], folder, &folder.join("output")));
        let addr = self.addr;
        let output = folder.join("output");
        let told = move || std::fs::read_to_string(Path::new(&output)).unwrap_or_default();
        eventually_within(Duration::from_secs(60), "the discovery server listens", || {
            let told = told();
            async move {
                assert!(!told.contains("error:"), "{told}");
                tokio::net::TcpStream::connect(addr).await.ok().map(drop)
            }
        })
        .await;
    }

    /// kill -9.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    pub fn output(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("output")).unwrap_or_default()
    }
}
