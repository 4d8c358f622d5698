//! The sidecar as a process: control runtime, identity, workers of both directions, the application it may have started,
//! and an orderly end.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use certs::mesh::{Clients, MeshIdentity};
use certs::workload_api::server::{self as workload_api, Serving};
use config::error::ConfigError;
use config::fields::Text;
use config::process::{Escape, Place};
use config::sidecar::{Mode, Observers, Sidecar};
use config::template::Template;
use discovery::Discovery;
use discovery::rpc::proto;
use layers::http::access_log::AccessLog;
use layers::http::in_flight::InFlightCount;
use layers::telemetry::exposition::Exposition;
use layers::telemetry::log_file::{LogFile, Sink};
use layers::telemetry::metrics::{Door, Metrics};
use layers::telemetry::names;
use layers::transport::hbone::receiver as hbone;
use layers::transport::listen::ListenError;
use layers::upstream::Keepalive;
use layers::upstream::cluster::ClusterEnv;
use layers::upstream::drains::Drains;
use layers::upstream::forward::UpstreamService;
use layers::upstream::membership::{self, Membership};
use layers::upstream::mesh::{Carries, Mesh};
use layers::upstream::sticky::own_key;
use layers::upstream::tls_client::TlsClients;
use layers::vars::hostname;
use layers::worker::context::Stats;
use layers::worker::view::{Published, View};
use layers::worker::{Listening, ServeSettings, Timeouts, WorkerSettings, Workers};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{self, Admin};
use crate::capture::proof::Proof;
use crate::captured::Captures;
use crate::connection_log::{self, ConnectionLog};
use crate::connections::{Connections, Direction};
use crate::door::OwnLive;
use crate::drain::{self, Stage};
use crate::inbound::{Handshakes, Receiver};
use crate::listeners;
use crate::live::Live;
use crate::lookup::LookupLayer;
use crate::outbound::Carrier;
use crate::pages;
use crate::policy::{PolicyTable, Sight};
use crate::running::{Parts, Running};
use crate::snapshot::{Passthrough, Ports, Rest, Snapshot};
use crate::stack;

/// What cut connections get after the drain's deadline.
const AFTER_DRAIN: Duration = Duration::from_secs(2);
/// How often it is looked whether the sidecar is ready, or the application gone.
const PACE: Duration = Duration::from_millis(50);
/// What connections to the application that are still open get when it has gone.
const LAST: Duration = Duration::from_secs(2);

/// A line of the access log where nothing is written.
const LOG_FORMAT: &str = "$remote_addr [$time_local] $mesh_direction $peer_identity $mesh_service \"$request\" $status \
                          $body_bytes_sent $request_time $upstream_addr $upstream_response_time $reason";

/// What a sidecar is started with.
pub struct Options {
    /// The file, which is looked at as long as the process lives.
    pub file: PathBuf,
    /// What it says now.
    pub config: Sidecar,
    /// The application to run.
    pub command: Vec<String>,
}

/// The sidecar cannot start.
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
    /// A setting cannot work.
    #[error("{0}")]
    Setting(String),
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A worker ended by itself.
    #[error("{0}")]
    Worker(String),
}

impl StartError {
    fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }

    fn settings(errors: &[ConfigError]) -> Self {
        let told: Vec<_> = errors.iter().map(ToString::to_string).collect();
        Self::Setting(told.join("\n"))
    }
}

/// Where a running sidecar is reached.
#[derive(Clone, Debug, Default)]
pub struct Addresses(pub Vec<(String, SocketAddr)>);

/// Runs the sidecar until it is told to stop, or its application has ended, and has stopped in order. The exit code of
/// the application, or 0.
///
/// # Errors
/// It could not be started, or a worker failed.
pub fn run(options: Options, told: impl FnOnce(&Addresses)) -> Result<u8, StartError> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(StartError::system("the control runtime cannot be started"))?;
    let result = runtime.block_on(serve(options, told));
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> Result<Self, StartError> {
        Ok(Self { term: on(SignalKind::terminate())?, int: on(SignalKind::interrupt())? })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

fn on(kind: SignalKind) -> Result<tokio::signal::unix::Signal, StartError> {
    signal(kind).map_err(StartError::system("signals cannot be listened to"))
}

async fn serve(options: Options, told: impl FnOnce(&Addresses)) -> Result<u8, StartError> {
    let Options { file, config, command } = options;
    let mut signals = Signals::listen()?;
    let mut reopen = on(SignalKind::user_defined1())?;
    let metrics = Arc::new(Metrics::default());
    listeners::be_known(&config)?;
    let membership = membership(&config)?;
    let identity = membership.identity().clone();
    let clusters = clusters(&config, membership.mesh())?;
    let _workload_api = serve_identity(&config, &identity).await?;
    let (policies, retired) = PolicyTable::new();
    tokio::spawn(retired.run());
    let sights = policies.published().clone();
    let nothing = Snapshot::new(Vec::new(), Ports::default(), Rest::default());
    let (published, retired) = Published::new(Arc::new(nothing));
    tokio::spawn(retired.run());
    // Sockets are bound first, so that a taken port is told at once.
    let log = open_log(&config)?;
    let connections =
        Connections::new(log.as_ref().map(|log| ConnectionLog::new(log.bytes(), identity.clone())));
    let captures = Captures::new(&config);
    let carrier = Arc::new(Carrier {
        snapshot: published.clone(),
        passthrough: Passthrough::new(&clusters),
        captures: captures.clone(),
        connections: connections.clone(),
        policies: sights.clone(),
        metrics: metrics.clone(),
    });
    let alpn = [Carries::Requests.alpn(), Carries::Upgrades.alpn(), Carries::Opaque.alpn()];
    let tls = identity
        .server_config(Clients::Required, &alpn)
        .map_err(|error| StartError::Setting(error.to_string()))?;
    let tunnels = hbone::Receiver::new(identity.clone(), captures.own.clone());
    let tunnels = Arc::new(tunnels.map_err(|error| StartError::Setting(error.to_string()))?);
    let receiver = Arc::new(Receiver {
        snapshot: published.clone(),
        policies: sights.clone(),
        identity: identity.clone(),
        captures,
        tls,
        connections: connections.clone(),
        metrics: metrics.clone(),
        handshakes: Handshakes::default(),
    });
    let mut addresses = Addresses::default();
    let inward = listeners::inward(&config, &receiver, &tunnels, &mut addresses)?;
    let outward = listeners::outward(&config, &carrier, &mut addresses)?;
    let listener = admin::bind(config.admin.listen.0).await.map_err(StartError::system(format!(
        "admin.listen: cannot listen on {}; stop what does, or write another address",
        config.admin.listen
    )))?;
    if let Ok(address) = listener.local_addr() {
        addresses.0.push(("admin".to_owned(), address));
    }
    let parts = Parts {
        file,
        catalog: plugins::Catalog::default(),
        metrics: metrics.clone(),
        clusters,
        published: published.clone(),
        policies,
    };
    let running = Running::start(config.clone(), parts).map_err(|errors| StartError::settings(&errors))?;
    tokio::spawn(running.clone().follow());
    let settings = stack::Settings {
        access_log: log.as_ref().map(Log::requests),
        in_flight: InFlightCount::default(),
        in_flight_limit: config.limits.requests.get() as usize,
        metrics: metrics.clone(),
    };
    let mut inbound = start_inbound(&config, &settings, &published, &sights, &identity, inward)?;
    let mut outbound = start_outbound(&config, &settings, &published, &carrier, outward)?;
    let stage = Stage::default();
    watch(&metrics, &settings, [&inbound, &outbound]);
    let collected = Collected {
        membership: membership.clone(),
        receiver: receiver.clone(),
        tunnels,
        connections: connections.clone(),
        running: running.clone(),
    };
    metrics.collector(move |out| collected.collect(out));
    let admin = Arc::new(Admin {
        running: running.clone(),
        membership: membership.clone(),
        captured: match config.outbound.transparent {
            true => Proof::seek(config.capture.outbound_port.get()),
            false => Proof::default(),
        },
        connections: connections.clone(),
        metrics,
        stage: stage.clone(),
    });
    tokio::spawn(admin::serve(listener, admin.clone()));
    stage.serve();
    told(&addresses);

    if let Some(observers) = config.drain.observers.clone() {
        tokio::spawn(take_back(observers, running.clone(), admin.clone(), stage.clone()));
    }

    let mut child = None;
    if !command.is_empty() {
        // An application that calls before there is an identity would fail for no reason of its own.
        let ready = async {
            while admin.not_ready().is_some() {
                tokio::time::sleep(PACE).await;
            }
        };
        tokio::select! {
            () = ready => child = Some(start(&command)?),
            () = signals.stop() => return Ok(0),
        }
    }
    let why = loop {
        tokio::select! {
            () = signals.stop() => break Why::Told,
            () = stage.draining() => break Why::Asked,
            status = ended(&mut child) => break Why::Ended(status),
            failure = inbound.failed() => return Err(StartError::Worker(failure.to_string())),
            failure = outbound.failed() => return Err(StartError::Worker(failure.to_string())),
            _ = reopen.recv() => {
                if let Some(log) = &log {
                    log.file.reopen();
                }
            }
        }
    };
    let config = running.config();
    let end = End { config: &config, running: &running, stage: &stage, connections: &connections, why };
    let code = end.run(inbound, outbound, child, &mut signals).await;
    membership.leave().await;
    Ok(code)
}

/// Why a sidecar ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// By a signal.
    Told,
    /// By the admin interface: the signal is to come.
    Asked,
    /// Its application has ended.
    Ended(u8),
}

struct End<'a> {
    config: &'a Sidecar,
    running: &'a Running,
    stage: &'a Stage,
    connections: &'a Connections,
    why: Why,
}

impl End<'_> {
    async fn run(
        &self,
        inbound: Workers,
        outbound: Workers,
        mut child: Option<Child>,
        signals: &mut Signals,
    ) -> u8 {
        self.stage.drain();
        let mut told = self.why == Why::Told;
        let grace = self.config.drain.grace.duration();
        if let Some(consul) = &self.config.drain.consul {
            match drain::deregister(consul).await {
                Ok(()) => tracing::info!(id = %&*consul.id, "the registry was told"),
                Err(error) => tracing::error!(error, "the registry could not be told"),
            }
        }
        if !matches!(self.why, Why::Ended(_)) {
            tracing::info!(
                seconds = self.config.drain.propagation.as_f64(),
                "draining: callers get to hear of it"
            );
            until(self.heard(), signals, &mut told).await;
        }
        inbound.drain().start(grace);
        let report = until(inbound.ended(grace + AFTER_DRAIN), signals, &mut told).await;
        for casualty in &report.casualties {
            tracing::warn!(peer = %casualty.peer, in_flight = casualty.in_flight, "cut at the end of the drain");
        }
        tracing::info!(took = ?report.took, "nothing comes in any more; the application can still call others");
        let code = match (self.why, &mut child) {
            (Why::Ended(code), _) => code,
            (_, Some(_)) => {
                terminate(&child);
                let ended = tokio::time::timeout(grace, ended(&mut child));
                match until(ended, signals, &mut told).await {
                    Ok(code) => code,
                    Err(_) => {
                        tracing::warn!("the application did not end in time and is killed");
                        if let Some(child) = &mut child {
                            let _ = child.start_kill();
                        }
                        ended_now(&mut child).await
                    }
                }
            }
            (why, None) => {
                self.application_gone(why, grace, signals, &mut told).await;
                0
            }
        };
        outbound.drain().start(LAST.min(grace));
        let report = until(outbound.ended(LAST + AFTER_DRAIN), signals, &mut told).await;
        tracing::info!(took = ?report.took, "stopped");
        code
    }

    /// Callers have heard that nothing should be sent here: they have said so, or had time for it.
    async fn heard(&self) {
        let confirmed = async {
            let Some(observers) = &self.config.drain.observers else { return std::future::pending().await };
            match drain::confirmed(observers).await {
                Ok(()) => tracing::info!("everybody has confirmed that nothing is sent here any more"),
                Err(problem) => {
                    tracing::warn!(problem, "nobody confirms; callers get their time");
                    std::future::pending().await
                }
            }
        };
        tokio::select! {
            () = confirmed => {}
            () = tokio::time::sleep(self.config.drain.propagation.duration()) => {}
        }
    }

    /// Waits until an application that somebody else runs has gone. As long as nobody has sent a signal, its end is not in
    /// sight, and it is waited for without a limit.
    async fn application_gone(&self, why: Why, grace: Duration, signals: &mut Signals, told: &mut bool) {
        let gone = async {
            while !self.is_gone().await {
                tokio::time::sleep(PACE).await;
            }
        };
        tokio::pin!(gone);
        if why == Why::Asked && !*told {
            tokio::select! {
                () = &mut gone => return,
                () = signals.stop() => *told = true,
            }
        }
        if until(tokio::time::timeout(grace, gone), signals, told).await.is_err() {
            tracing::warn!("the application has not gone in time; what it has open outwards is closed");
        }
    }

    /// Nobody listens at the ports of the application; or, where none are known, nothing of it is open.
    async fn is_gone(&self) -> bool {
        let ports = self.running.workload_addresses();
        if ports.is_empty() {
            return self.connections.count(Direction::Outbound) == 0;
        }
        for port in ports {
            let connecting = certs::outgoing::connect(port);
            if !matches!(tokio::time::timeout(Duration::from_secs(1), connecting).await, Ok(Err(_))) {
                return false;
            }
        }
        true
    }
}

/// Has gateways use this node again, as soon as it serves.
async fn take_back(observers: Observers, running: Running, admin: Arc<Admin>, stage: Stage) {
    let back = async {
        while admin.not_ready().is_some() || !is_served(running.workload_addresses()).await {
            tokio::time::sleep(PACE).await;
        }
        drain::take_back(&observers).await;
    };
    tokio::select! {
        () = stage.draining() => {}
        () = back => {}
    }
}

/// Somebody listens at a port of the application; or none is known.
async fn is_served(ports: BTreeSet<SocketAddr>) -> bool {
    for port in &ports {
        let connecting = certs::outgoing::connect(*port);
        if matches!(tokio::time::timeout(Duration::from_secs(1), connecting).await, Ok(Ok(_))) {
            return true;
        }
    }
    ports.is_empty()
}

/// Waits, and ends the process at once when it is told to a second time.
async fn until<F: Future>(future: F, signals: &mut Signals, told: &mut bool) -> F::Output {
    tokio::pin!(future);
    loop {
        tokio::select! {
            output = &mut future => return output,
            () = signals.stop() => {
                if std::mem::replace(told, true) {
                    tracing::warn!("told twice to stop: ended at once");
                    std::process::exit(1);
                }
            }
        }
    }
}

fn start(command: &[String]) -> Result<Child, StartError> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| StartError::Setting("no command: write it behind `--`".to_owned()))?;
    let child = pages::start(|| Command::new(program).args(arguments).kill_on_drop(true).spawn());
    child.map_err(StartError::system(format!("{program} cannot be started")))
}

fn terminate(child: &Option<Child>) {
    let pid = child.as_ref().and_then(Child::id).and_then(|pid| i32::try_from(pid).ok());
    if let Some(pid) = pid
        && let Err(error) = kill(Pid::from_raw(pid), Signal::SIGTERM)
    {
        tracing::warn!(%error, "the application cannot be told to end");
    }
}

/// The exit code of the application; for ever if there is none.
async fn ended(child: &mut Option<Child>) -> u8 {
    match child {
        Some(_) => ended_now(child).await,
        None => std::future::pending().await,
    }
}

async fn ended_now(child: &mut Option<Child>) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let Some(child) = child else { return 0 };
    let code = |status: ExitStatus| {
        // As shells have it.
        let code = status.code().or(status.signal().map(|signal| 128 + signal));
        code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
    };
    child.wait().await.map_or(1, code)
}

/// Begins to keep the identity.
fn membership(config: &Sidecar) -> Result<Membership, StartError> {
    let settings = membership::Settings {
        trust_domain: &config.trust_domain,
        identity: config.workload.identity.as_deref(),
        service: &config.workload.service,
        ca: &config.ca,
        connection_age: config.limits.connection_age.duration(),
    };
    let membership = Membership::start(settings).map_err(|error| StartError::Setting(error.to_string()))?;
    let inbound = &config.inbound;
    let taken = inbound.ports.iter().filter(|port| port.mode.unwrap_or(inbound.mode) != Mode::Disabled);
    // A port that the kernel chooses is nobody's to know.
    let mut taken = taken.filter_map(|port| port.listen.as_ref()).map(|listen| listen.0);
    if let Some(address) = taken.find(|address| address.port() != 0) {
        membership.announce(address);
    }
    Ok(membership)
}

/// Gives the identity to applications by the Workload API, until what is returned is dropped.
async fn serve_identity(config: &Sidecar, identity: &MeshIdentity) -> Result<Option<Serving>, StartError> {
    let Some(api) = &config.workload_api else { return Ok(None) };
    let settings =
        workload_api::Settings { socket: api.socket.clone(), users: api.users.iter().copied().collect() };
    let serving = Serving::start(identity.clone(), settings).await;
    serving.map(Some).map_err(StartError::system("workload_api.socket cannot be listened on"))
}

fn clusters(config: &Sidecar, mesh: &Mesh) -> Result<ClusterEnv, StartError> {
    let control = Handle::current();
    let names = discovery::dns::Settings {
        servers: config.dns.servers.iter().map(|server| server.0).collect(),
        ipv6: config.dns.ipv6,
        ..discovery::dns::Settings::default()
    };
    let hello = || proto::Hello {
        name: format!("{}-{}", &*config.workload.service, std::process::id()),
        node: hostname().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let sources = discovery::registries::sources(&config.registries(), &names, hello, None)
        .map_err(|error| StartError::Setting(error.to_string()))?;
    let settings = discovery::Settings {
        dns: names,
        sources,
        data_dir: config.data_dir.clone(),
        ..discovery::Settings::default()
    };
    let roots = certs::files::system_roots().map_err(|error| StartError::Setting(error.to_string()))?;
    let place = &config.workload.locality;
    let text = |text: &Option<Text<1, 256>>| text.as_ref().map(|text| text.as_str().to_owned());
    Ok(ClusterEnv {
        discovery: Discovery::new(control.clone(), settings),
        tls: Arc::new(TlsClients::new(roots)),
        checks: true,
        keepalive: Keepalive { size: 320, idle: Some(Duration::from_secs(60)), requests: u32::MAX },
        session_key: own_key(|| std::iter::repeat_with(|| fastrand::u8(..)).take(32).collect()),
        drains: Drains::default(),
        place: Arc::new(Place {
            region: text(&place.region),
            zone: text(&place.zone),
            machine: text(&place.machine),
        }),
        mesh: Some(mesh.clone()),
        as_client: None,
        control,
    })
}

/// The access log, and what its lines look like.
struct Log {
    file: LogFile,
    requests: Template,
    bytes: Template,
}

impl Log {
    fn requests(&self) -> AccessLog {
        AccessLog::new(self.requests.clone(), Escape::Default, self.file.handle())
    }

    fn bytes(&self) -> AccessLog {
        AccessLog::new(self.bytes.clone(), Escape::Default, self.file.handle())
    }
}

fn open_log(config: &Sidecar) -> Result<Option<Log>, StartError> {
    let Some(log) = &config.access_log else { return Ok(None) };
    let sink = log.path.as_deref().map_or(Sink::Stdout, Sink::at);
    let what = format!("access_log: {sink:?} cannot be opened");
    let format = |written: &Option<Text<1, 4096>>, default| {
        Template::parse_log_format(written.as_ref().map_or(default, |format| format.as_str()))
    };
    Ok(Some(Log {
        file: LogFile::start(sink).map_err(StartError::system(what))?,
        requests: format(&log.format, LOG_FORMAT),
        bytes: format(&log.connection_format, connection_log::FORMAT),
    }))
}

fn worker_settings(config: &Sidecar) -> WorkerSettings {
    // Applications have time-outs of their own: a stream may be quiet for long.
    let quiet = config.limits.idle.duration();
    WorkerSettings {
        workers: config.workers.get() as usize,
        connections: config.limits.connections.get() as usize,
        timeouts: Timeouts { body: quiet, send: quiet, idle: quiet, ..Timeouts::default() },
        serve: ServeSettings::default(),
    }
}

fn start_inbound(
    config: &Sidecar,
    settings: &stack::Settings,
    published: &Arc<Published<Snapshot>>,
    sights: &Arc<Published<Sight>>,
    identity: &MeshIdentity,
    listeners: Vec<Listening>,
) -> Result<Workers, StartError> {
    let (settings, published, sights) = (settings.clone(), published.clone(), sights.clone());
    let (identity, control) = (identity.clone(), Handle::current());
    let logs = settings.access_log.is_some();
    let workers = Workers::start(&worker_settings(config), listeners, move |context| {
        let view = Rc::new(View::new(published.clone()));
        let live = Live::new(Rc::new(View::new(sights.clone())), Some(identity.clone()));
        context.slot(|| OwnLive(live.clone()));
        let (idle, judged) = (view.clone(), live.clone());
        context.on_tick(move || {
            idle.refresh();
            judged.view().refresh();
            judged.check();
        });
        let upstream = UpstreamService::new(false, &settings.metrics);
        let lookup = LookupLayer::new(view, None, logs);
        stack::inbound(&settings, &live, &identity, control.clone(), lookup, upstream)
    });
    workers.map_err(StartError::system("the workers cannot be started"))
}

fn start_outbound(
    config: &Sidecar,
    settings: &stack::Settings,
    published: &Arc<Published<Snapshot>>,
    carrier: &Arc<Carrier>,
    listeners: Vec<Listening>,
) -> Result<Workers, StartError> {
    let (settings, published, carrier) = (settings.clone(), published.clone(), carrier.clone());
    let logs = settings.access_log.is_some();
    let workers = Workers::start(&worker_settings(config), listeners, move |context| {
        let view = Rc::new(View::new(published.clone()));
        let idle = view.clone();
        context.on_tick(move || idle.refresh());
        let upstream = UpstreamService::new(false, &settings.metrics);
        stack::outbound(&settings, LookupLayer::new(view, Some(carrier.clone()), logs), upstream)
    });
    workers.map_err(StartError::system("the workers cannot be started"))
}

fn watch(metrics: &Arc<Metrics>, settings: &stack::Settings, workers: [&Workers; 2]) {
    let stats: Vec<Arc<Stats>> = workers.iter().flat_map(|workers| workers.stats()).cloned().collect();
    let at_work = settings.in_flight.clone();
    metrics.in_flight_limit.set(settings.in_flight_limit as u64);
    metrics.watch_door(move || {
        let sum = |part: fn(&Stats) -> u64| stats.iter().map(|worker| part(worker)).sum();
        Door {
            accepted: sum(|worker| worker.accepted.get()),
            refused: sum(|worker| worker.rejected.get()),
            failed: sum(|worker| worker.handshakes_failed.get()),
            active: sum(|worker| worker.open.get()),
            received: sum(|worker| worker.requests.get()),
            in_flight: at_work.now() as u64,
        }
    });
}

/// What of the mesh is worth a metric.
struct Collected {
    membership: Membership,
    receiver: Arc<Receiver>,
    tunnels: Arc<hbone::Receiver>,
    connections: Connections,
    running: Running,
}

impl Collected {
    fn collect(&self, out: &mut Exposition) {
        let metric = &names::MESH_HANDSHAKES_TOTAL;
        out.family("", metric);
        for (outcome, count) in self.receiver.handshakes.read() {
            out.sample("", metric.name, [("side", "inbound"), ("outcome", outcome)], count);
        }
        self.membership.expose_handshakes(out);
        let metric = &names::MESH_CONNECTIONS;
        out.family("", metric);
        for direction in [Direction::Inbound, Direction::Outbound] {
            let count = self.connections.count(direction) as u64;
            out.sample("", metric.name, [("direction", direction.as_str())], count);
        }
        let metric = &names::MESH_TUNNELS_TOTAL;
        out.family("", metric);
        for (outcome, count) in self.tunnels.counts.read() {
            out.sample("", metric.name, [("outcome", outcome)], count);
        }
        self.membership.expose(out);
        self.running.policies().expose(out);
    }
}

/// Waits until the sidecar whose admin interface is at `address` is ready.
///
/// # Errors
/// Why it was not in this time: what it said last, or that nobody answers.
pub async fn ready_at(address: SocketAddr, patience: Duration) -> Result<(), String> {
    let until = Instant::now() + patience;
    loop {
        let last = match tokio::time::timeout(Duration::from_secs(5), ask(address)).await {
            Ok(Ok((200, _))) => return Ok(()),
            Ok(Ok((_, text))) => text,
            Ok(Err(error)) => format!("{address}: {error}"),
            Err(_) => format!("{address} does not answer"),
        };
        if Instant::now() >= until {
            return Err(last);
        }
        tokio::time::sleep(PACE).await;
    }
}

async fn ask(address: SocketAddr) -> io::Result<(u16, String)> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET /status/ready HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(64 * 1024).read_to_string(&mut answer).await?;
    let status = answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status, body.trim().to_owned()))
}
