//! The edge as a process: control runtime, store, workers, interfaces, and an orderly end.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use certs::etcd;
use certs::sni::{Protocol, TableSettings};
use config::Graph;
use config::process::{HostPort, Limits, Listener, Process, Provider, TlsVersion};
use discovery::Node;
use layers::http::access_log::AccessLog;
use layers::http::in_flight::InFlightCount;
use layers::plugin::Definition;
use layers::telemetry::log_file::{LogFile, Sink};
use layers::telemetry::metrics::{Door, Metrics};
use layers::transport::framing::HeadLimits;
use layers::transport::listen::{Listen, ListenError};
use layers::transport::tls_server::TlsListen;
use layers::upstream::forward::UpstreamService;
use layers::worker::accept::{ListenOptions, Listening, ProxyProtocol};
use layers::worker::context::Stats;
use layers::worker::deadlines::Timeouts;
use layers::worker::runtime::{WorkerSettings, Workers};
use layers::worker::serve::{Http2, ServeSettings};
use layers::worker::turns::Turns;
use layers::worker::view::{Published, View};
use plugins::node_status::NodeStatus;
use plugins::support::http_call::{self, HttpClient};
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::certificates::Certificates;
use crate::compile::{Compiler, Env};
use crate::drain::{Board, Parts};
use crate::instance::Instance;
use crate::interfaces::{Interfaces, Leaders};
use crate::running::{Configuration, Running};
use crate::secrets::Secrets;
use crate::snapshot::Snapshot;
use crate::store::embedded::Embedded;
use crate::store::etcd::Etcd;
use crate::store::file::FileStore;
use crate::store::standalone::Standalone;
use crate::store::{Store, StoreError};
use crate::{acme, settings, signers, stack};

/// How long the start waits for the first resolution of upstream names. A name that does not resolve by then does not
/// How long the first certificate of the mesh is waited for.
const FIRST_IDENTITY: Duration = Duration::from_secs(10);
/// keep the others from being served.
const FIRST_RESOLUTION: Duration = Duration::from_secs(3);
/// How long the start waits for secret managers.
const FIRST_SECRETS: Duration = Duration::from_secs(5);

/// How long the start waits for the certificates that an ACME authority has given before.
const FIRST_CERTIFICATES: Duration = Duration::from_secs(3);

/// Threads of the control runtime: enough for the interfaces, probes and stores to get on beside each other.
const CONTROL_THREADS: usize = 2;
/// For what control does besides that blocks: files, name services, passwords.
const BLOCKING_THREADS: usize = 512;

/// What cut connections get after the drain's deadline, before the process ends all the same.
const AFTER_DRAIN: Duration = Duration::from_secs(2);

/// What the log entries that still wait get to be sent, when the last request is over.
const LAST_ENTRIES: Duration = Duration::from_secs(5);

/// The gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Operating system resources.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A setting of `config.yaml` cannot work.
    #[error("{setting}: {problem}")]
    Setting {
        /// The key.
        setting: String,
        /// What is wrong and what to write instead.
        problem: String,
    },
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The store cannot be opened.
    #[error("the configuration store cannot be opened")]
    Store(#[from] StoreError),
    /// A worker ended by itself; the process does not go on with less than it was started with.
    #[error("{0}")]
    Worker(String),
}

impl StartError {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }

    pub(crate) fn setting(setting: impl Into<String>, problem: impl ToString) -> Self {
        Self::Setting { setting: setting.into(), problem: problem.to_string() }
    }
}

/// Where a running gateway is reached.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// For clients.
    pub http: Vec<SocketAddr>,
    /// For clients, with TLS.
    pub https: Vec<SocketAddr>,
    /// Admin API.
    pub admin: Option<SocketAddr>,
    /// Control API.
    pub control: Option<SocketAddr>,
    /// Status API.
    pub status: Option<SocketAddr>,
    /// Metrics for Prometheus.
    pub metrics: Option<SocketAddr>,
    /// The file with the generated admin key.
    pub admin_key: Option<PathBuf>,
}

impl Addresses {
    /// Names and addresses, as they are told at start.
    pub fn told(&self) -> Vec<(&'static str, String)> {
        let many =
            |what, list: &[SocketAddr]| list.iter().map(move |at| (what, at.to_string())).collect::<Vec<_>>();
        let one = |what, at: Option<SocketAddr>| at.map(|at| (what, at.to_string()));
        let key = self.admin_key.as_ref().map(|path| ("key", format!("admin key in {}", path.display())));
        let mut told = many("http", &self.http);
        told.extend(many("https", &self.https));
        told.extend(one("admin", self.admin));
        told.extend(key);
        told.extend(one("control", self.control));
        told.extend(one("status", self.status));
        told.extend(one("metrics", self.metrics));
        told
    }
}

/// Runs the gateway until it is told to stop, and has stopped in order. `ready` is told when it serves.
///
/// # Errors
/// It could not be started, or a worker failed.
pub fn run(process: Process, ready: impl FnOnce(&Addresses)) -> Result<(), StartError> {
    harden();
    // Handshakes that wait for signers have threads of their own, so that nothing else of control waits with them.
    let waiting = process.signers.iter().map(|pool| usize::try_from(pool.in_flight).unwrap_or(usize::MAX));
    let control = Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .max_blocking_threads(waiting.fold(BLOCKING_THREADS, usize::saturating_add))
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(StartError::system("the control runtime cannot be started"))?;
    let result = control.block_on(serve(&process, ready));
    // Tasks that wait for a store or a probe are not waited for.
    control.shutdown_timeout(Duration::from_millis(200));
    result
}

/// No core dump holds keys, and the soft limit of open files is no limit.
pub(crate) fn harden() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::debug!(%error, "core dumps cannot be switched off");
    }
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "the limit of open files cannot be raised");
    }
}

async fn serve(process: &Process, ready: impl FnOnce(&Addresses)) -> Result<(), StartError> {
    let Signals { mut stop, mut reopen } = Signals::listen()?;
    let export = plugins::prometheus::export(process.plugin_attr.get("prometheus")).map_err(|errors| {
        let told: Vec<_> = errors.iter().map(ToString::to_string).collect();
        StartError::setting("plugin_attr.prometheus", told.join("; "))
    })?;
    let metrics = Arc::new(Metrics::new(export.settings.clone()));
    let catalog = Arc::new(settings::catalog(process));
    let unknown: Vec<_> = process.plugins.iter().flat_map(|list| plugins::Catalog::unknown(list)).collect();
    if !unknown.is_empty() {
        tracing::info!(?unknown, "`plugins` names plugins that are not offered");
    }
    let opened = open_store(process, &catalog)?;
    let instance = Instance::starting(process);
    let turns = Turns::default();
    let running = running(process, catalog, &metrics, &instance, &turns)?;
    let in_flight = InFlightCount::default();
    // Sockets are bound first, so that a taken port is told at once, and accept when there is something to serve.
    let mut bound = Addresses::default();
    let listeners =
        if process.serves_traffic() { listen(process, &running, &mut bound)? } else { Vec::new() };
    let drains =
        process.serves_traffic().then(|| drains(process, &running, &instance, &turns)).transpose()?;
    let acme = process.acme.as_ref().filter(|_| process.serves_traffic());
    let acme = acme.map(|acme| acme::start(process, acme, &running, &instance.id, &metrics)).transpose()?;
    let leaders = Leaders { drains, acme: acme.clone() };
    let interfaces =
        Interfaces::start(process, &running, &opened, &metrics, &export, instance, leaders).await?;

    let events = opened.store.watch();
    let follower = running.clone();
    let context = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("compile".to_owned())
        .spawn(move || {
            let _context = context.enter();
            follower.follow(events);
        })
        .map_err(StartError::system("the thread that compiles cannot be started"))?;

    let addresses = Addresses { http: bound.http, https: bound.https, ..interfaces.addresses() };
    if !process.serves_traffic() {
        ready(&addresses);
        interfaces.ready();
        stop.told().await;
        return Ok(());
    }
    tokio::select! {
        () = configured(&running) => {
            running.secrets().settled(FIRST_SECRETS).await;
            if let Some(acme) = &acme
                && tokio::time::timeout(FIRST_CERTIFICATES, acme.looked()).await.is_err()
            {
                tracing::warn!("the store of ACME certificates does not answer yet; the others are served");
            }
        }
        () = stop.told() => return Ok(()),
    }
    let access_log = open_access_log(process)?;
    let mut workers = start_workers(process, &running, listeners, access_log.as_ref(), &in_flight, &metrics)?;
    turns.watch(workers.stats());
    interfaces.ready();
    ready(&addresses);
    loop {
        tokio::select! {
            () = stop.told() => break,
            _ = reopen.recv() => {
                if let Some(log) = &access_log {
                    log.reopen();
                }
                metrics.logs.reopen();
            }
            failure = workers.failed() => return Err(StartError::Worker(failure.to_string())),
        }
    }
    interfaces.draining();
    let within = process.limits.drain_timeout;
    tracing::info!(seconds = within.as_secs(), "stopping: what is in flight may finish");
    workers.drain().start(within);
    let report = tokio::select! {
        report = workers.ended(within + AFTER_DRAIN) => report,
        () = stop.told() => {
            tracing::warn!("told twice to stop: ended at once");
            // Nothing in flight is waited for, and no destructor may hold this up.
            std::process::exit(1);
        }
    };
    for casualty in &report.casualties {
        tracing::warn!(peer = %casualty.peer, in_flight = casualty.in_flight, "cut at the end of the drain");
    }
    let lost = metrics.logs.flush(LAST_ENTRIES).await;
    if lost > 0 {
        tracing::warn!(entries = lost, "log entries could not be sent before the end");
    }
    let membership = running.configuration().compiler.membership().cloned();
    if let Some(membership) = membership {
        membership.leave().await;
    }
    tracing::info!(took = ?report.took, cut = report.casualties.len(), "stopped");
    Ok(())
}

/// A store, and what of it the Admin API needs.
pub(crate) struct Opened {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) standalone: Option<Arc<Standalone>>,
}

fn open_store(process: &Process, catalog: &Arc<plugins::Catalog>) -> Result<Opened, StartError> {
    let data = &process.data_dir;
    let store: Arc<dyn Store> = match &process.provider {
        Provider::Embedded => Arc::new(Embedded::open(data)?),
        Provider::File { path } => {
            let (catalog, own) = (catalog.clone(), process.plugins.clone());
            // A list in the file takes the place of that in config.yaml.
            let listed = move |names: Option<&[String]>| catalog.relist(names.or(own.as_deref()));
            Arc::new(FileStore::new(path, data).with_listed(Box::new(listed)))
        }
        Provider::Etcd(etcd) => {
            if !etcd.tls.verify {
                tracing::warn!(
                    "deployment.etcd.tls.verify: false is not honoured; if etcd's certificate is refused, put its CA \
                     into apisix.ssl.ssl_trusted_certificate"
                );
            }
            let store = Etcd::new(etcd_settings(process, etcd), data)?;
            Arc::new(store.with_encryption(&process.data_encryption))
        }
        Provider::Standalone => {
            let standalone = Arc::new(Standalone::open(data));
            return Ok(Opened { store: standalone.clone(), standalone: Some(standalone) });
        }
    };
    Ok(Opened { store, standalone: None })
}

pub(crate) fn etcd_settings(process: &Process, etcd: &config::process::Etcd) -> etcd::Settings {
    etcd::Settings {
        endpoints: etcd.hosts.clone(),
        prefix: etcd.prefix.clone(),
        user: etcd.user.as_ref().map(|(name, password)| (name.clone(), password.reveal().to_owned())),
        timeout: etcd.timeout,
        tls: etcd::Tls {
            ca: etcd.tls.ca.clone().or_else(|| process.tls.trusted_certificate.clone()),
            identity: etcd.tls.identity.clone(),
            server_name: etcd.tls.sni.clone(),
        },
    }
}

fn running(
    process: &Process,
    catalog: Arc<plugins::Catalog>,
    metrics: &Arc<Metrics>,
    instance: &Instance,
    turns: &Turns,
) -> Result<Running, StartError> {
    let control = tokio::runtime::Handle::current();
    let mut env = Env::new(process, catalog.clone(), metrics.clone(), control, turns)
        .map_err(|bad| StartError::setting(bad.setting, bad.problem))?;
    let (tls, discovery) = (&env.clusters.tls, &env.clusters.discovery);
    let client = HttpClient::alone(&http_call::Settings::default(), tls, discovery, &env.control)
        .map_err(|error| StartError::setting("apisix.ssl.ssl_trusted_certificate", error.to_string()))?;
    env.attrs.insert(NodeStatus::NAME.to_owned(), plugins::node_status::attr(&instance.id));
    let (lookups, clusters) = (env.lookups.clone(), env.clusters.clone());
    let mut compiler = Compiler::new(env);
    let secrets = Secrets::default();
    let graph = Graph::with_env(Arc::new(secrets.clone()));
    let empty = compiler.compile(&graph, []);
    let (published, retired) = Published::new(Arc::new(empty));
    tokio::spawn(retired.run());
    let signers = signers::pools(process, &tokio::runtime::Handle::current());
    let tls = tls_settings(process)?.with_signers(signers.clone());
    let certificates = Certificates::new(tls, process.acme.is_some());
    let configuration = Configuration { graph, compiler, certificates };
    let running = Running::new(configuration, catalog, secrets, published, metrics.clone());
    tokio::spawn(running.secrets().clone().run(client, running.clone()));
    let exposed = signers.clone();
    metrics.collector(move |out| signers::collect(&exposed, out));
    tokio::spawn(signers::follow(signers, running.clone()));
    tokio::spawn(lookups.run(clusters, running.clone(), process.data_dir.join("lookup_tables")));
    Ok(running)
}

/// The drains of the process before are in force again before anything is compiled.
fn drains(
    process: &Process,
    running: &Running,
    instance: &Instance,
    turns: &Turns,
) -> Result<Board, StartError> {
    let node =
        |peer: &HostPort| Node { host: peer.host.as_str().into(), port: peer.port, weight: 1, priority: 0 };
    let parts = Parts {
        name: instance.id.clone(),
        clusters: running.configuration().compiler.cluster_env().clone(),
        running: running.clone(),
        turns: turns.clone(),
        peers: process.peers.iter().map(node).collect(),
        file: process.in_data_dir("drains.json"),
    };
    Board::new(parts)
        .map_err(|error| StartError::setting("apisix.ssl.ssl_trusted_certificate", error.to_string()))
}

fn tls_settings(process: &Process) -> Result<TableSettings, StartError> {
    let tls = &process.tls;
    let protocols: Vec<_> = tls
        .protocols
        .iter()
        .map(|version| match version {
            TlsVersion::Tls12 => Protocol::Tls12,
            TlsVersion::Tls13 => Protocol::Tls13,
        })
        .collect();
    let ciphers = (!tls.ciphers.is_empty()).then(|| tls.ciphers.join(":"));
    TableSettings::build(&protocols, ciphers.as_deref(), tls.session_tickets, tls.fallback_sni.as_deref())
        .map_err(|problem| StartError::setting("apisix.ssl.ssl_ciphers", problem))
}

fn listen(
    process: &Process,
    running: &Running,
    addresses: &mut Addresses,
) -> Result<Vec<Listening>, StartError> {
    let workers = settings::workers(process);
    let table = running.configuration().certificates.table().clone();
    let trusted = process.real_ip.from.clone();
    let mut listening = Vec::new();
    for listener in &process.listeners {
        let Listener { address, tls, http2, proxy_protocol, optional } = *listener;
        let key = if tls { "apisix.ssl.listen" } else { "apisix.node_listen" };
        let sockets = match (Listen { address, key: key.to_owned() }).bind(workers) {
            Ok(sockets) => sockets,
            Err(error) if optional => {
                tracing::info!(%address, %error, "not listening");
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let bound = sockets.first().and_then(|socket| socket.local_addr().ok()).unwrap_or(address);
        if tls { &mut addresses.https } else { &mut addresses.http }.push(bound);
        listening.push(Listening {
            sockets,
            options: ListenOptions {
                tls: tls.then(|| TlsListen { table: table.clone(), http2 }),
                http2: http2 && !tls,
                proxy_protocol: proxy_protocol.then(|| ProxyProtocol { trusted: trusted.clone() }),
                doorman: None,
            },
        });
    }
    Ok(listening)
}

/// Waits for the first configuration, and a while for the first addresses of its upstreams.
async fn configured(running: &Running) {
    let mut progress = running.progress();
    // The sender lives as long as `running`.
    let _ = progress.wait_for(|progress| progress.configured).await;
    let clusters = running.configuration().compiler.clusters();
    let resolved = async {
        for (_, cluster) in &clusters {
            cluster.resolved().await;
        }
    };
    if tokio::time::timeout(FIRST_RESOLUTION, resolved).await.is_err() {
        tracing::warn!("some upstream names do not resolve yet; the others are served");
    }
    let membership = running.configuration().compiler.membership().cloned();
    let Some(membership) = membership else { return };
    let mut changes = membership.identity().changes();
    let identified = async {
        // The sender lives as long as the membership.
        while membership.missing().is_some() && changes.changed().await.is_ok() {}
    };
    if tokio::time::timeout(FIRST_IDENTITY, identified).await.is_err() {
        let why = membership.missing().unwrap_or_default();
        tracing::warn!(why, "upstreams of the mesh cannot be reached yet; the others are served");
    }
}

fn open_access_log(process: &Process) -> Result<Option<LogFile>, StartError> {
    let Some(log) = &process.access_log else { return Ok(None) };
    let sink = log.path.as_deref().map_or(Sink::Stdout, Sink::at);
    if sink == Sink::File("/dev/null".into()) {
        return Ok(None);
    }
    let what = format!("nginx_config.http.access_log {sink:?} cannot be opened");
    LogFile::start(sink).map(Some).map_err(StartError::system(what))
}

fn start_workers(
    process: &Process,
    running: &Running,
    listeners: Vec<Listening>,
    access_log: Option<&LogFile>,
    in_flight: &InFlightCount,
    metrics: &Arc<Metrics>,
) -> Result<Workers, StartError> {
    let limits = &process.limits;
    // Asked once: a second guard in the same statement would wait for the first for ever.
    let (certificates, challenges) = {
        let certificates = &running.configuration().certificates;
        (certificates.table().clone(), certificates.managed().tokens().clone())
    };
    let stack_settings = stack::Settings {
        server: Some(settings::server(process)),
        access_log: access_log
            .zip(process.access_log.as_ref())
            .map(|(file, log)| AccessLog::new(log.format.clone(), log.escape, file.handle())),
        metrics: metrics.clone(),
        in_flight: in_flight.clone(),
        in_flight_limit: settings::in_flight_limit(process),
        rules: settings::rules(process),
        readable_body: settings::readable_body(process),
        certificates,
        challenges,
    };
    let published = running.published().clone();
    let show_status = process.show_upstream_status;
    let shared = metrics.clone();
    let workers = Workers::start(&worker_settings(process, limits), listeners, move |context| {
        let view = Rc::new(View::<Snapshot>::new(published.clone()));
        // A worker without requests lets go of former snapshots all the same.
        let idle = view.clone();
        context.on_tick(move || idle.refresh());
        let upstream = UpstreamService::new(show_status, &shared);
        stack::build(&stack_settings, view, upstream)
    });
    let workers = workers.map_err(StartError::system("the workers cannot be started"))?;
    metrics.in_flight_limit.set(settings::in_flight_limit(process) as u64);
    let (stats, at_work) = (workers.stats().to_vec(), in_flight.clone());
    metrics.watch_door(move || {
        let sum = |part: fn(&Stats) -> u64| stats.iter().map(|worker| part(worker)).sum();
        Door {
            accepted: sum(|worker| worker.accepted.get()),
            refused: sum(|worker| worker.rejected.get()),
            failed: sum(|worker| worker.handshakes_failed.get() + worker.proxy_refused.get()),
            active: sum(|worker| worker.open.get()),
            received: sum(|worker| worker.requests.get()),
            in_flight: at_work.now() as u64,
        }
    });
    Ok(workers)
}

fn worker_settings(process: &Process, limits: &Limits) -> WorkerSettings {
    let workers = settings::workers(process);
    let share = limits.connections.map(|all| (all as usize).div_ceil(workers));
    WorkerSettings {
        workers,
        connections: share.unwrap_or(limits.connections_per_worker as usize),
        timeouts: Timeouts {
            handshake: limits.handshake_timeout,
            header: limits.header_timeout,
            body: limits.body_timeout,
            send: limits.send_timeout,
            idle: limits.idle_timeout,
            ..Timeouts::default()
        },
        serve: ServeSettings {
            head: HeadLimits {
                line: limits.uri_length as usize,
                head: limits.header_bytes as usize,
                fields: limits.header_count as usize,
            },
            http2: Http2 { streams: limits.concurrent_streams, ..Http2::default() },
            // As in APISIX: whoever closes is gone, and no upstream works on for nobody.
            half_close: false,
        },
    }
}

/// What the process is told from outside.
struct Signals {
    stop: Stop,
    reopen: Signal,
}

/// SIGTERM, SIGINT and SIGQUIT.
pub(crate) struct Stop {
    term: Signal,
    int: Signal,
    quit: Signal,
}

impl Signals {
    fn listen() -> Result<Self, StartError> {
        Ok(Self { stop: Stop::listen()?, reopen: on(SignalKind::user_defined1())? })
    }
}

fn on(kind: SignalKind) -> Result<Signal, StartError> {
    signal(kind).map_err(StartError::system("signals cannot be listened to"))
}

impl Stop {
    pub(crate) fn listen() -> Result<Self, StartError> {
        Ok(Self {
            term: on(SignalKind::terminate())?,
            int: on(SignalKind::interrupt())?,
            quit: on(SignalKind::quit())?,
        })
    }

    pub(crate) async fn told(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
            _ = self.quit.recv() => {}
        }
    }
}
