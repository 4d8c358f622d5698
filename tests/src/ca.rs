//! A running `postern ca run` with a folder and ports of its own, and workloads that join it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use certs::clock::SystemClock;
use certs::mesh::MeshIdentity;
use certs::trust::Usage;
use certs::workload::time::MeshTime;
use certs::workload::{Proof, Settings, Status, Workload};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::Call;
use crate::edge::binary;
use crate::eventually_within;
use crate::ports::Port;
use crate::process::Process;

/// Ended when dropped.
pub struct Authority {
    pub addr: SocketAddr,
    pub status: SocketAddr,
    process: Option<Process>,
    env: Vec<(String, String)>,
    folder: TempDir,
    _ports: [Port; 2],
}

impl Authority {
    /// With the settings of `more` besides its own addresses.
    pub async fn start(more: Value) -> Authority {
        Authority::start_with(more, Vec::new()).await
    }

    /// The same with more in its environment.
    pub async fn start_with(more: Value, env: Vec<(String, String)>) -> Authority {
        let mut authority = Authority::prepare(more, env);
        authority.run().await;
        authority
    }

    /// With settings that need to know its folder.
    pub async fn found(more: Value, settings: impl FnOnce(&Authority) -> Value) -> Authority {
        let mut authority = Authority::prepare(more, Vec::new());
        for (key, value) in settings(&authority).as_object().into_iter().flatten() {
            authority.configure(key, value.clone());
        }
        authority.run().await;
        authority
    }

    fn prepare(more: Value, env: Vec<(String, String)>) -> Authority {
        let folder = tempfile::Builder::new().prefix("postern-ca-").tempdir().expect("a folder");
        let ports = [Port::free(), Port::free()];
        let mut settings =
            json!({"listen": ports[0].addr().to_string(), "status": ports[1].addr().to_string()});
        for (key, value) in more.as_object().into_iter().flatten() {
            settings[key] = value.clone();
        }
        std::fs::write(folder.path().join("ca.yaml"), settings.to_string()).expect("ca.yaml");
        let [addr, status] = [ports[0].addr(), ports[1].addr()];
        Authority { addr, status, process: None, env, folder, _ports: ports }
    }

    /// Sets a key of its file, for the next start.
    pub fn configure(&self, key: &str, value: Value) {
        let file = self.folder.path().join("ca.yaml");
        let text = std::fs::read_to_string(&file).expect("ca.yaml");
        let mut settings: Value = serde_json::from_str(&text).expect("JSON");
        settings[key] = value;
        std::fs::write(file, settings.to_string()).expect("ca.yaml");
    }

    /// All that it has written down: its store and its audit log.
    pub fn written(&self) -> String {
        let mut folders = vec![self.data()];
        let mut written = String::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
                match entry.file_type().expect("a kind of file") {
                    kind if kind.is_dir() => folders.push(entry.path()),
                    kind if kind.is_file() => {
                        let bytes = std::fs::read(entry.path()).unwrap_or_default();
                        written.push_str(&String::from_utf8_lossy(&bytes));
                    }
                    _ => {}
                }
            }
        }
        written
    }

    /// Starts it again, after [`kill`](Self::kill) or [`stop`](Self::stop).
    pub async fn run(&mut self) {
        let folder = self.folder.path();
        let args = ["ca", "run"].map(str::to_owned);
        self.process = Some(Process::start(&binary(), &args, &self.env, folder, &folder.join("output")));
        let (status, output) = (self.status, folder.join("output"));
        eventually_within(Duration::from_secs(60), "the authority is ready", || {
            let told = std::fs::read_to_string(&output).unwrap_or_default();
            async move {
                assert!(!told.contains("error:"), "{told}");
                tokio::net::TcpStream::connect(status).await.ok()?;
                (Call::get("/readyz").send_to(status).await.status == 200).then_some(())
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

    /// As an operator stops it; gives the exit code.
    pub async fn stop(&mut self) -> Option<i32> {
        let mut process = self.process.take().expect("it runs");
        process.signal(Signal::SIGTERM);
        process.wait(Duration::from_secs(30)).await.code()
    }

    /// Where it keeps everything.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("postern-ca")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn output(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("output")).unwrap_or_default()
    }

    /// How it says it is doing.
    pub async fn told(&self) -> Value {
        Call::get("/status").send_to(self.status).await.json()
    }

    /// How many changes its record on the disk has seen.
    pub fn sequence(&self) -> Option<u64> {
        sequence(&self.record())
    }

    /// The number of the next write of a rotation after `seen`, the moment it is on the disk; none once it has ended.
    pub async fn next_write(&self, seen: u64) -> Option<u64> {
        let record = self.record();
        tokio::task::spawn_blocking(move || next_write(&record, seen)).await.expect("a look")
    }

    fn record(&self) -> PathBuf {
        self.data().join("store/record.value")
    }

    /// Runs `postern ca` with these arguments at this authority.
    pub fn command(&self, args: &[&str]) -> (i32, String, String) {
        let mut all = vec!["ca"];
        all.extend(args);
        let folder = self.folder.path().display().to_string();
        all.extend(["-c", &folder]);
        crate::edge::run(&all)
    }

    /// A token for this identity.
    pub fn token(&self, identity: &str) -> String {
        let (code, out, err) = self.command(&["token", "create", "--identity", identity]);
        assert_eq!(code, 0, "{err}");
        out.trim().to_owned()
    }

    /// Runs `postern certs` with these arguments without holding up the workloads of this process.
    pub async fn certs(&self, args: &[&str]) -> (i32, String, String) {
        let socket = self.data().join("operators.sock").display().to_string();
        let mut all = vec!["certs".to_owned()];
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        all.extend(["--socket".to_owned(), socket]);
        let run = move || crate::edge::run(&all.iter().map(String::as_str).collect::<Vec<_>>());
        tokio::task::spawn_blocking(run).await.expect("the command runs")
    }

    /// What `postern certs status` says.
    pub async fn certs_status(&self) -> Value {
        let (_, out, err) = self.certs(&["status", "-o", "json", "--all"]).await;
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out} {err}"))
    }

    /// Somebody who joins by this proof.
    pub fn join(&self, proof: Proof, proxy_id: &str) -> Member {
        self.join_at(&[self.addr], proof, proxy_id)
    }

    /// The same where the authority has several addresses.
    pub fn join_at(&self, servers: &[SocketAddr], proof: Proof, proxy_id: &str) -> Member {
        let pin = std::fs::read_to_string(self.data().join("pin")).expect("the pin");
        let settings = Settings {
            servers: servers.iter().map(ToString::to_string).collect(),
            pins: Arc::from([pin.trim().parse().expect("a pin")]),
            proof: Some(proof),
            identity: None,
            proxy_id: proxy_id.to_owned(),
            version: "test".to_owned(),
            ttl: None,
        };
        let time = MeshTime::new(SystemClock::new());
        let identity = MeshIdentity::with_clock(time.clone());
        Member { workload: Workload::start(settings, identity.clone(), time), identity }
    }
}

fn sequence(record: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(record).ok()?;
    let (_, value) = text.split_once('\n')?;
    serde_json::from_str::<Value>(value).ok()?["sequence"].as_u64()
}

fn next_write(record: &Path, seen: u64) -> Option<u64> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        match sequence(record) {
            Some(next) if next != seen => return Some(next),
            _ if is_over(record) => return None,
            _ => {}
        }
        assert!(Instant::now() < until, "nothing is written any more after {seen}");
        #[expect(
            clippy::disallowed_methods,
            reason = "no worker: this thread watches a file as closely as it can"
        )]
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Whether the record on the disk has a rotation that ended.
fn is_over(record: &Path) -> bool {
    let text = std::fs::read_to_string(record).unwrap_or_default();
    let value = text.split_once('\n').and_then(|(_, value)| serde_json::from_str::<Value>(value).ok());
    value.is_some_and(|value| value["rotation"].is_null() && value["past"][0]["ended"] == "done")
}

/// A workload in this process.
pub struct Member {
    pub workload: Workload,
    pub identity: MeshIdentity,
}

impl Member {
    pub fn status(&self) -> Status {
        self.workload.status().borrow().clone()
    }

    /// Until it has had that many certificates.
    pub async fn until(&self, renewals: u64) {
        eventually_within(Duration::from_secs(30), "a certificate", || {
            let status = self.status();
            async move { (status.renewals >= renewals).then_some(()) }
        })
        .await;
    }
}

/// Looks all the time whether everybody accepts everybody.
pub struct Watcher {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

impl Watcher {
    pub fn start(members: &[Member]) -> Watcher {
        let identities: Vec<MeshIdentity> = members.iter().map(|member| member.identity.clone()).collect();
        let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, looked) = (Arc::clone(&stop), Arc::clone(&looks));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for shows in &identities {
                    let svid = shows.svid().ok_or("a certificate is gone")?;
                    for sees in &identities {
                        let trust = sees.trust().ok_or("a bundle is gone")?;
                        // This thread may have stood still meanwhile: what counts is what both have at one moment.
                        if !shows.svid().is_some_and(|now| Arc::ptr_eq(&now, &svid)) {
                            break;
                        }
                        trust
                            .verify(svid.chain(), Usage::Server, SystemTime::now())
                            .map_err(|error| format!("{} is refused: {error}", svid.id()))?;
                    }
                }
                looked.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
            }
            Ok(())
        });
        Watcher { stop, looks, thread: Some(thread) }
    }

    /// Nobody was refused.
    pub fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.take().expect("it runs").join().expect("it does not panic");
        assert_eq!(result, Ok(()));
        assert!(self.looks.load(Ordering::Relaxed) > 0);
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
