//! A real etcd, one member on loopback, that can be killed, emptied and compacted.

use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, DeleteOptions, GetOptions};
use serde_json::Value;
use tempfile::TempDir;

use crate::eventually_within;
use crate::ports::Port;
use crate::process::Process;

/// APISIX's own prefix.
pub const PREFIX: &str = "/apisix";

#[derive(Debug)]
pub struct Etcd {
    folder: TempDir,
    client: Port,
    peer: Port,
    process: Process,
}

impl Etcd {
    /// Starts an empty etcd and waits until it answers.
    pub async fn start() -> Etcd {
        let folder = tempfile::Builder::new().prefix("postern-etcd-").tempdir().expect("a folder");
        let (client, peer) = (Port::free(), Port::free());
        let process = launch(folder.path(), &client, &peer);
        let etcd = Etcd { folder, client, peer, process };
        etcd.until_ready().await;
        etcd
    }

    /// `http://127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.client.addr())
    }

    /// kill -9; data stays on disk.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same port with its data.
    pub async fn start_again(&mut self) {
        self.process = launch(self.folder.path(), &self.client, &self.peer);
        self.until_ready().await;
    }

    /// Removes all data; only after [`Etcd::kill`].
    pub fn wipe(&self) {
        std::fs::remove_dir_all(data(self.folder.path())).expect("the data of etcd");
    }

    /// Writes a resource in APISIX's layout: `put("routes/1", ..)`.
    pub async fn put(&self, key: &str, value: &Value) {
        self.put_raw(&format!("{PREFIX}/{key}"), &value.to_string()).await;
    }

    /// Writes any key.
    pub async fn put_raw(&self, key: &str, value: &str) {
        self.connect().await.expect("etcd answers").put(key, value, None).await.expect("etcd takes a key");
    }

    /// The resource under a key.
    pub async fn get(&self, key: &str) -> Option<Value> {
        let mut client = self.connect().await.expect("etcd answers");
        let found = client.get(format!("{PREFIX}/{key}"), None).await.expect("etcd gives a key");
        let value = found.kvs().first()?.value();
        Some(serde_json::from_slice(value).expect("JSON in etcd"))
    }

    /// All keys under the prefix.
    pub async fn keys(&self) -> Vec<String> {
        let mut client = self.connect().await.expect("etcd answers");
        let options = GetOptions::new().with_prefix().with_keys_only();
        let found = client.get(PREFIX, Some(options)).await.expect("etcd gives keys");
        found.kvs().iter().map(|pair| pair.key_str().expect("a text key").to_owned()).collect()
    }

    pub async fn delete(&self, key: &str) {
        let mut client = self.connect().await.expect("etcd answers");
        client.delete(format!("{PREFIX}/{key}"), None).await.expect("etcd deletes a key");
    }

    /// Deletes everything under the prefix.
    pub async fn clear(&self) {
        let mut client = self.connect().await.expect("etcd answers");
        let options = DeleteOptions::new().with_prefix();
        client.delete(PREFIX, Some(options)).await.expect("etcd deletes keys");
    }

    /// Forgets all history up to the present revision.
    pub async fn compact(&self) {
        let mut client = self.connect().await.expect("etcd answers");
        let now = client.get("revision", None).await.expect("etcd gives a header");
        let revision = now.header().expect("a header").revision();
        client.compact(revision, None).await.expect("etcd compacts");
    }

    async fn connect(&self) -> Result<Client, etcd_client::Error> {
        let options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(5))
            .with_timeout(Duration::from_secs(5));
        Client::connect([self.endpoint()], Some(options)).await
    }

    async fn until_ready(&self) {
        eventually_within(Duration::from_secs(60), "etcd answers", || async {
            let mut client = self.connect().await.ok()?;
            client.get("ready", None).await.ok().map(drop)
        })
        .await;
    }

    /// What the process wrote.
    pub fn output(&self) -> String {
        self.process.output()
    }
}

fn data(folder: &Path) -> PathBuf {
    folder.join("data")
}

fn launch(folder: &Path, client: &Port, peer: &Port) -> Process {
    let (client, peer) = (format!("http://{}", client.addr()), format!("http://{}", peer.addr()));
    let args = [
        "--name=e2e".to_owned(),
        format!("--data-dir={}", data(folder).display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=e2e={peer}"),
    ];
    // Debian builds etcd for every architecture and lets it start on some only when asked.
    let env = [("ETCD_UNSUPPORTED_ARCH".to_owned(), std::env::consts::ARCH.replace("aarch64", "arm64"))];
    let env = if cfg!(target_arch = "x86_64") { &[][..] } else { &env[..] };
    Process::start(Path::new("etcd"), &args, env, folder, &folder.join("output"))
}
