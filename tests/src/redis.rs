//! A real Redis on loopback, alone, as a cluster or watched by sentinels, that can be stopped, killed and started again.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::eventually_within;
use crate::ports::Port;
use crate::process::Process;

/// A start on a busy machine may take this long.
const START: Duration = Duration::from_secs(30);

/// One server that keeps nothing on disk.
#[derive(Debug)]
pub struct Redis {
    folder: TempDir,
    port: Port,
    options: Vec<String>,
    /// What `redis-cli` needs besides the port.
    client: Vec<String>,
    process: Process,
}

impl Redis {
    /// Starts a server and waits until it answers.
    pub async fn start() -> Redis {
        Redis::with(&[], &[]).await
    }

    /// With these options, and those that `redis-cli` needs to speak to it.
    pub async fn with(options: &[&str], client: &[&str]) -> Redis {
        let folder = tempfile::Builder::new().prefix("postern-redis-").tempdir().expect("a folder");
        let port = Port::free();
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let process = launch(folder.path(), &port, &options);
        let client = client.iter().map(|option| (*option).to_owned()).collect();
        let redis = Redis { folder, port, options, client, process };
        redis.until_ready().await;
        redis
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// The settings of a plugin that keeps its counts here.
    pub fn policy(&self) -> Value {
        json!({"policy": "redis", "redis_host": "127.0.0.1", "redis_port": self.port()})
    }

    /// SIGSTOP: connections stay, nothing is answered.
    pub fn pause(&self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same port, empty.
    pub async fn start_again(&mut self) {
        self.process.kill();
        self.process = launch(self.folder.path(), &self.port, &self.options);
        self.until_ready().await;
    }

    /// What `redis-cli` says to a command.
    pub fn ask(&self, command: &[&str]) -> String {
        let output = Command::new("redis-cli")
            .args(["-h", "127.0.0.1", "-p", &self.port().to_string(), "--no-auth-warning"])
            .args(&self.client)
            .args(command)
            .output()
            .expect("redis-cli");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    async fn until_ready(&self) {
        eventually_within(START, "redis answers", || async { (self.ask(&["PING"]) == "PONG").then_some(()) })
            .await;
    }
}

fn launch(folder: &Path, port: &Port, options: &[String]) -> Process {
    let number = port.number().to_string();
    let mut args: Vec<String> =
        ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", &number]
            .iter()
            .map(|arg| (*arg).to_owned())
            .collect();
    args.extend(options.iter().cloned());
    Process::start(Path::new("redis-server"), &args, &[], folder, &folder.join("output"))
}

/// Three masters without replicas.
#[derive(Debug)]
pub struct Cluster {
    pub nodes: Vec<Redis>,
    _buses: Vec<Port>,
}

impl Cluster {
    /// Starts the nodes, joins them and waits until every slot is served.
    pub async fn start() -> Cluster {
        let buses: Vec<Port> = std::iter::repeat_with(Port::free).take(3).collect();
        let mut nodes = Vec::new();
        for bus in &buses {
            let bus = bus.number().to_string();
            // A node that is down takes down its own slots only.
            let options = [
                "--cluster-enabled",
                "yes",
                "--cluster-port",
                &bus,
                "--cluster-node-timeout",
                "1000",
                "--cluster-require-full-coverage",
                "no",
            ];
            nodes.push(Redis::with(&options, &[]).await);
        }
        let cluster = Cluster { nodes, _buses: buses };
        let created = Command::new("redis-cli")
            .args(["--cluster", "create"])
            .args(cluster.addresses())
            .args(["--cluster-replicas", "0", "--cluster-yes"])
            .output()
            .expect("redis-cli");
        assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stdout));
        eventually_within(START, "all slots of the cluster are served", || async {
            let served = |node: &Redis| {
                let info = node.ask(&["CLUSTER", "INFO"]);
                info.contains("cluster_state:ok") && info.contains("cluster_slots_ok:16384")
            };
            cluster.nodes.iter().all(served).then_some(())
        })
        .await;
        cluster
    }

    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect()
    }

    /// The settings of a plugin that keeps its counts here.
    pub fn policy(&self) -> Value {
        let nodes = self.addresses();
        json!({"policy": "redis-cluster", "redis_cluster_nodes": nodes, "redis_cluster_name": "e2e"})
    }
}

/// A master with a replica, and three sentinels that watch them.
#[derive(Debug)]
pub struct Watched {
    pub servers: Vec<Redis>,
    pub sentinels: Vec<Redis>,
}

impl Watched {
    /// What the sentinels call the master.
    pub const NAME: &str = "counts";
    /// The password of the servers, and that of the sentinels.
    pub const PASSWORDS: [&str; 2] = ["secret-of-servers", "secret-of-sentinels"];

    /// Starts all and waits until every sentinel knows every other and the replica.
    pub async fn start() -> Watched {
        let [password, sentinels_password] = Watched::PASSWORDS;
        let secured =
            ["--requirepass", password, "--masterauth", password, "--repl-diskless-sync-delay", "0"];
        let client = ["-a", password];
        let master = Redis::with(&secured, &client).await;
        let port = master.port().to_string();
        let mut options = secured.to_vec();
        options.extend(["--replicaof", "127.0.0.1", &port]);
        let replica = Redis::with(&options, &client).await;
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            sentinels.push(sentinel(master.port(), password, sentinels_password).await);
        }
        let watched = Watched { servers: vec![master, replica], sentinels };
        eventually_within(START, "the sentinels know each other and the replica", || async {
            let knows = |sentinel: &Redis| {
                let told = sentinel.ask(&["SENTINEL", "MASTER", Watched::NAME]);
                let lines: Vec<_> = told.lines().collect();
                let value =
                    |name: &str| lines.iter().position(|line| *line == name).and_then(|at| lines.get(at + 1));
                value("num-other-sentinels") == Some(&"2") && value("num-slaves") == Some(&"1")
            };
            watched.sentinels.iter().all(knows).then_some(())
        })
        .await;
        watched
    }

    /// The settings of a plugin that keeps its counts here.
    pub fn policy(&self) -> Value {
        let address = |sentinel: &Redis| json!({"host": "127.0.0.1", "port": sentinel.port()});
        json!({
            "policy": "redis-sentinel",
            "redis_sentinels": self.sentinels.iter().map(address).collect::<Vec<_>>(),
            "redis_master_name": Watched::NAME,
            "redis_password": Watched::PASSWORDS[0],
            "sentinel_password": Watched::PASSWORDS[1],
        })
    }
}

async fn sentinel(master: u16, password: &str, own: &str) -> Redis {
    let folder = tempfile::Builder::new().prefix("postern-sentinel-").tempdir().expect("a folder");
    let port = Port::free();
    let name = Watched::NAME;
    let number = port.number();
    // Sentinels write what they find out into their own file.
    let config = format!(
        "port {number}\nbind 127.0.0.1\nrequirepass {own}\nsentinel sentinel-pass {own}\n\
         sentinel monitor {name} 127.0.0.1 {master} 2\nsentinel auth-pass {name} {password}\n\
         sentinel down-after-milliseconds {name} 3000\nsentinel failover-timeout {name} 5000\n"
    );
    std::fs::write(folder.path().join("sentinel.conf"), config).expect("a file");
    let args = ["sentinel.conf", "--sentinel"].map(str::to_owned);
    let process =
        Process::start(Path::new("redis-server"), &args, &[], folder.path(), &folder.path().join("output"));
    let client = vec!["-a".to_owned(), own.to_owned()];
    let sentinel = Redis { folder, port, options: Vec::new(), client, process };
    sentinel.until_ready().await;
    sentinel
}
