//! A running `postern edge` with a folder and ports of its own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::client::{Answer, Call, Connection, DEADLINE};
use crate::ports::Port;
use crate::process::Process;
use crate::{etcd, eventually};

/// The admin key of every edge in tests.
pub const ADMIN_KEY: &str = "e2e-admin-key";

/// The read-only key of every edge in tests.
pub const VIEWER_KEY: &str = "e2e-viewer-key";

/// A start in a debug build beside a compiling workspace may take this long.
const START: Duration = Duration::from_secs(60);

/// No test needs one gateway for longer: what hangs must not hold the others up for ever.
const LIFE: Duration = Duration::from_secs(300);

/// Where the configuration comes from.
#[derive(Clone, Debug)]
enum Provider {
    File,
    JsonFile,
    Embedded,
    Etcd(Value),
    Standalone,
}

/// Describes an edge before it is started.
#[derive(Debug)]
pub struct EdgeBuilder {
    provider: Provider,
    example: Value,
    config: Value,
    resources: Map<String, Value>,
    text: Option<String>,
    env: Vec<(String, String)>,
    proxy_protocol: bool,
}

/// A running gateway; ended with its whole folder when dropped.
#[derive(Debug)]
pub struct Edge {
    /// The proxy's HTTP listener.
    pub http: SocketAddr,
    /// The proxy's HTTPS listener.
    pub https: SocketAddr,
    pub admin: SocketAddr,
    pub control: SocketAddr,
    pub status: SocketAddr,
    /// Where Prometheus reads; only open when the plugin is in use.
    pub metrics: SocketAddr,
    /// The HTTP listener that expects PROXY protocol; only open with [`EdgeBuilder::proxy_protocol`].
    pub proxied: SocketAddr,
    /// `config.yaml`, `apisix.yaml`, the data directory and the output are in here.
    pub folder: PathBuf,
    builder: EdgeBuilder,
    process: Process,
    reloads: AtomicUsize,
    watchdog: tokio::task::JoinHandle<()>,
    _folder: TempDir,
    _ports: Vec<Port>,
}

impl Edge {
    /// Resources in `apisix.yaml`, role `data_plane`.
    pub fn file() -> EdgeBuilder {
        EdgeBuilder::new(Provider::File)
    }

    /// Resources in `apisix.json`, role `data_plane`.
    pub fn json_file() -> EdgeBuilder {
        EdgeBuilder::new(Provider::JsonFile)
    }

    /// The embedded store, written by the Admin API.
    pub fn embedded() -> EdgeBuilder {
        EdgeBuilder::new(Provider::Embedded)
    }

    /// The store of an etcd, under the prefix `/apisix`.
    pub fn etcd(etcd: &etcd::Etcd) -> EdgeBuilder {
        let settings = json!({"host": [etcd.endpoint()], "prefix": etcd::PREFIX, "timeout": 5});
        EdgeBuilder::new(Provider::Etcd(settings))
    }

    /// The whole configuration by `/apisix/admin/configs`.
    pub fn standalone() -> EdgeBuilder {
        EdgeBuilder::new(Provider::Standalone)
    }

    /// A GET through the proxy on a connection of its own.
    #[track_caller]
    pub fn get(&self, path: &str) -> impl Future<Output = Answer> {
        Call::get(path).send_to(self.http)
    }

    /// Any request through the proxy on a connection of its own.
    #[track_caller]
    pub fn send(&self, call: Call) -> impl Future<Output = Answer> {
        call.send_to(self.http)
    }

    /// A keep-alive HTTP/1 connection to the proxy.
    pub async fn connect(&self) -> Connection {
        Connection::http1(self.http).await
    }

    /// One call of the Admin API with the admin key; `path` is what follows `/apisix/admin/`.
    #[track_caller]
    pub fn call_admin(&self, method: &str, path: &str, body: Option<&Value>) -> impl Future<Output = Answer> {
        let call = Call::new(method, &format!("/apisix/admin/{path}")).header("x-api-key", ADMIN_KEY);
        match body {
            Some(body) => call.json(body),
            None => call,
        }
        .send_to(self.admin)
    }

    /// PUT by the Admin API; panics unless it was accepted.
    pub async fn put(&self, path: &str, body: Value) -> Answer {
        let answer = self.call_admin("PUT", path, Some(&body)).await;
        assert!(matches!(answer.status, 200 | 201), "PUT {path}: {} {}", answer.status, answer.text());
        answer
    }

    /// PATCH by the Admin API; panics unless it was accepted.
    pub async fn patch(&self, path: &str, body: Value) -> Answer {
        self.call_admin("PATCH", path, Some(&body)).await.expect_status(200)
    }

    /// DELETE by the Admin API; panics unless it was accepted.
    pub async fn delete(&self, path: &str) -> Answer {
        self.call_admin("DELETE", path, None).await.expect_status(200)
    }

    /// A GET of the Control API.
    #[track_caller]
    pub fn call_control(&self, path: &str) -> impl Future<Output = Answer> {
        Call::get(path).send_to(self.control)
    }

    /// Writes the resource file without waiting for it to be read.
    pub fn write(&self, resources: &Value) {
        let json = matches!(self.builder.provider, Provider::JsonFile);
        write_resources(&self.folder, json, resources.as_object().expect("resources by kind"));
    }

    /// Writes `text` as it is to `apisix.yaml` without waiting for it to be read.
    pub fn write_text(&self, text: &str) {
        write_file(&self.folder.join("apisix.yaml"), text);
    }

    /// Writes the resource file and waits until the gateway uses it.
    pub async fn reload(&self, resources: &Value) {
        let marker = format!("e2e-reload-{}", self.reloads.fetch_add(1, Ordering::Relaxed));
        let mut resources = resources.clone();
        let routes =
            resources.as_object_mut().expect("resources by kind").entry("routes").or_insert(json!([]));
        let route = json!({"id": marker, "uri": format!("/{marker}"), "status": 1,
                           "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:9": 1}}});
        routes.as_array_mut().expect("a list of routes").push(route);
        self.write(&resources);
        eventually(&format!("the reload marked {marker} is in use"), || async {
            (self.call_control(&format!("/v1/route/{marker}")).await.status == 200).then_some(())
        })
        .await;
    }

    /// Waits until GET `path` gives `status`, and gives that answer.
    pub async fn until_status(&self, path: &str, status: u16) -> Answer {
        eventually(&format!("GET {path} gives {status}"), || async {
            let answer = self.get(path).await;
            (answer.status == status).then_some(answer)
        })
        .await
    }

    /// `postern COMMAND` with these arguments, asked of this gateway's Control API: the exit code, the JSON it prints, and
    /// what it tells beside.
    pub async fn command(&self, name: &str, args: &[&str]) -> (i32, Value, String) {
        let control = self.control.to_string();
        let fixed = [name, "--control", &control, "-o", "json"];
        let args: Vec<String> = fixed.into_iter().chain(args.iter().copied()).map(str::to_owned).collect();
        let run = move || run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let (code, out, err) = tokio::task::spawn_blocking(run).await.expect("the command runs");
        (code, serde_json::from_str(&out).unwrap_or_default(), err)
    }

    /// Everything the process has written to its output.
    pub fn output(&self) -> String {
        self.process.output()
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// The exit status if the process has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.ended()
    }

    /// Waits for the process to end by itself.
    pub async fn wait(&mut self) -> ExitStatus {
        self.process.wait(DEADLINE).await
    }

    /// SIGTERM, and waits for the end.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait().await
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts the process again in the same folder and on the same ports, and waits until it is ready.
    pub async fn start_again(&mut self) {
        self.launch_again();
        self.until_ready().await;
    }

    /// Starts the process again without waiting for it to become ready.
    pub fn launch_again(&mut self) {
        self.process.kill();
        self.process = launch(&self.folder, &self.builder.env);
    }

    /// What `/status/ready` says: the status, or `None` while nobody listens.
    pub async fn readiness(&self) -> Option<Answer> {
        let stream = tokio::net::TcpStream::connect(self.status).await.ok()?;
        let mut connection = Connection::http1_over(stream, self.status.to_string(), "http").await;
        connection.try_send(Call::get("/status/ready")).await.ok()
    }

    async fn until_ready(&mut self) {
        let deadline = Instant::now() + START;
        loop {
            if self.readiness().await.is_some_and(|answer| answer.status == 200) {
                return;
            }
            if let Some(status) = self.process.ended() {
                panic!("postern ended with {status} instead of becoming ready");
            }
            assert!(Instant::now() < deadline, "postern is not ready after {START:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Resident memory in KiB.
    pub fn resident(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("a running process");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS in /proc");
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number of KiB")
    }

    /// How many file descriptors are open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("a running process").count()
    }
}

/// Ends the whole test program when a test hangs: there is no way to end a single one.
async fn watchdog(test: String) {
    tokio::time::sleep(LIFE).await;
    eprintln!("{test} hangs: its gateway is {LIFE:?} old");
    std::process::exit(101);
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.watchdog.abort();
        if std::thread::panicking() {
            let config = std::fs::read_to_string(self.folder.join("config.yaml")).unwrap_or_default();
            let resources = std::fs::read_to_string(self.folder.join("apisix.yaml")).unwrap_or_default();
            let output = self.output();
            let tail: Vec<&str> = output.lines().rev().take(200).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            eprintln!(
                "--- config.yaml\n{config}\n--- apisix.yaml\n{resources}\n--- output\n{}",
                tail.join("\n")
            );
        }
    }
}

impl EdgeBuilder {
    fn new(provider: Provider) -> EdgeBuilder {
        EdgeBuilder {
            provider,
            example: json!({}),
            config: json!({}),
            resources: Map::new(),
            text: None,
            env: Vec::new(),
            proxy_protocol: false,
        }
    }

    /// Begins with these settings; provider, ports and data directory of the test are merged into them.
    pub fn example(mut self, settings: Value) -> Self {
        self.example = settings;
        self
    }

    /// Merges `patch` into `config.yaml` (RFC 7396: objects are merged, `null` removes).
    pub fn config(mut self, patch: Value) -> Self {
        merge(&mut self.config, patch);
        self
    }

    /// Adds an object to the resource file, under its kind (`routes`, `ssls`, ...).
    pub fn resource(mut self, kind: &str, object: Value) -> Self {
        let list = self.resources.entry(kind).or_insert_with(|| json!([]));
        list.as_array_mut().expect("a list of resources").push(object);
        self
    }

    pub fn route(self, object: Value) -> Self {
        self.resource("routes", object)
    }

    /// Adds every object of `{"routes": [..], "upstreams": [..]}`.
    pub fn resources(mut self, resources: Value) -> Self {
        let Value::Object(kinds) = resources else { panic!("resources by kind, not {resources}") };
        for (kind, objects) in kinds {
            let Value::Array(objects) = objects else { panic!("a list of {kind}, not {objects}") };
            for object in objects {
                self = self.resource(&kind, object);
            }
        }
        self
    }

    /// The exact text of `apisix.yaml`, instead of resources; `@self@` stands for the proxy's own `host:port`.
    pub fn text(mut self, text: &str) -> Self {
        self.text = Some(text.to_owned());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Also opens a listener that expects PROXY protocol ([`Edge::proxied`]).
    pub fn proxy_protocol(mut self) -> Self {
        self.proxy_protocol = true;
        self
    }

    /// Starts the process and waits until it is ready.
    pub async fn start(self) -> Edge {
        let mut edge = self.launch();
        edge.until_ready().await;
        edge
    }

    /// Starts the process without waiting.
    pub fn launch(self) -> Edge {
        let holder = tempfile::Builder::new().prefix("postern-e2e-").tempdir().expect("a folder");
        let folder = holder.path().to_owned();
        let ports: Vec<Port> = std::iter::repeat_with(Port::free).take(7).collect();
        let [http, https, admin, control, status, proxied, metrics] = &ports[..] else {
            unreachable!("seven ports")
        };
        let mut config = self.example.clone();
        merge(&mut config, self.process_config(&ports, &folder));
        merge(&mut config, self.config.clone());
        // JSON is YAML: what is tested of the YAML reader has tests of its own.
        let config = serde_json::to_string_pretty(&config).expect("JSON");
        write_file(&folder.join("config.yaml"), &config);
        match (&self.provider, &self.text) {
            (_, Some(text)) => {
                let text = text.replace("@self@", &http.addr().to_string());
                write_file(&folder.join("apisix.yaml"), &text);
            }
            (Provider::File, None) => write_resources(&folder, false, &self.resources),
            (Provider::JsonFile, None) => write_resources(&folder, true, &self.resources),
            _ => assert!(self.resources.is_empty(), "this provider takes resources by its API"),
        }
        let process = launch(&folder, &self.env);
        Edge {
            http: http.addr(),
            https: https.addr(),
            admin: admin.addr(),
            control: control.addr(),
            status: status.addr(),
            metrics: metrics.addr(),
            proxied: proxied.addr(),
            folder,
            builder: self,
            process,
            reloads: AtomicUsize::new(0),
            watchdog: tokio::spawn(watchdog(std::thread::current().name().unwrap_or("?").to_owned())),
            _folder: holder,
            _ports: ports,
        }
    }

    fn process_config(&self, ports: &[Port], folder: &Path) -> Value {
        let [http, https, admin, control, status, proxied, metrics] = ports else {
            unreachable!("seven ports")
        };
        let listen = |port: &Port| json!({"ip": "127.0.0.1", "port": port.number()});
        let mut config = json!({
            "apisix": {
                "node_listen": [listen(http)],
                "ssl": {"enable": true, "listen": [listen(https)]},
                "enable_control": true,
                "control": listen(control),
                "status": listen(status),
            },
            "nginx_config": {"worker_processes": 1},
            "plugin_attr": {"prometheus": {"export_addr": listen(metrics)}},
            "postern": {"data_dir": folder.join("data")},
        });
        if self.proxy_protocol {
            let patch = json!({"apisix": {"proxy_protocol": {"listen_http_port": proxied.number()}}});
            merge(&mut config, patch);
        }
        let keys = json!([{"name": "admin", "key": ADMIN_KEY, "role": "admin"},
                          {"name": "viewer", "key": VIEWER_KEY, "role": "viewer"}]);
        let admin =
            json!({"admin_key": keys, "admin_listen": listen(admin), "allow_admin": ["127.0.0.0/24"]});
        let deployment = match &self.provider {
            Provider::File => {
                json!({"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}})
            }
            Provider::JsonFile => {
                json!({"role": "data_plane", "role_data_plane": {"config_provider": "json"}})
            }
            Provider::Embedded => json!({"role": "traditional", "admin": admin}),
            Provider::Etcd(etcd) => json!({"role": "traditional", "admin": admin, "etcd": etcd,
                                           "role_traditional": {"config_provider": "etcd"}}),
            Provider::Standalone => json!({"role": "traditional", "admin": admin,
                                           "role_traditional": {"config_provider": "yaml"}}),
        };
        merge(&mut config, json!({"deployment": deployment}));
        config
    }
}

fn launch(folder: &Path, env: &[(String, String)]) -> Process {
    let config = folder.join("config.yaml").display().to_string();
    let args = ["edge".to_owned(), "-c".to_owned(), config];
    let mut all = vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())];
    all.extend_from_slice(env);
    Process::start(&binary(), &args, &all, folder, &folder.join("output"))
}

/// The `postern` binary: `POSTERN_BIN`, or the one of this workspace and profile, built when it is not current.
pub fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY
        .get_or_init(|| {
            if let Some(path) = std::env::var_os("POSTERN_BIN") {
                return PathBuf::from(path);
            }
            // target/<profile>/deps/<this test>
            let this = std::env::current_exe().expect("the path of this test");
            let folder = this.ancestors().nth(2).expect("a target folder");
            let release = folder.ends_with("release");
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--quiet", "--package", "postern", "--bin", "postern"]);
            build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
            if release {
                build.arg("--release");
            }
            assert!(build.status().expect("cargo can be run").success(), "postern does not build");
            folder.join("postern")
        })
        .clone()
}

/// Runs the binary to its end with these arguments; gives the exit code, standard output and standard error.
pub fn run(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(binary()).args(args).output().expect("postern can be run");
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn write_resources(folder: &Path, json: bool, resources: &Map<String, Value>) {
    let text = serde_json::to_string_pretty(resources).expect("JSON");
    if json {
        write_file(&folder.join("apisix.json"), &text);
    } else {
        write_file(&folder.join("apisix.yaml"), &format!("{text}\n#END\n"));
    }
}

/// Replaces a file at once, so that nobody reads half of it.
pub(crate) fn write_file(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).expect("a file in our own folder");
    std::fs::rename(&new, path).expect("a file in our own folder");
}

pub(crate) fn merge(target: &mut Value, patch: Value) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (name, value) in patch {
                if value.is_null() {
                    target.remove(&name);
                } else {
                    merge(target.entry(name).or_insert(Value::Null), value);
                }
            }
        }
        (target, patch) => *target = patch,
    }
}
