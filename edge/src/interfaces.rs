//! The interfaces beside the data path: Admin, Control and status API, and the metrics page.
//!
//! They start before the first configuration is in, so that an operator can ask why the gateway does not serve yet.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use certs::acme::Keeper;
use config::process::{Process, Provider};
use config::{Item, Kind, Rejected, ResourceKey};
use discovery::Discovery;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use layers::plugin::Definition;
use layers::telemetry::exposition::Exposition;
use layers::telemetry::metrics::Metrics;
use layers::telemetry::names::{self, Metric};
use layers::upstream::breaker::Phase;
use layers::upstream::membership::Membership;
use plugins::prometheus::Export;
use plugins::proxy_cache::ProxyCache;
use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use crate::admin::auth::Access;
use crate::admin::reply::{Reply, ReplyBody};
use crate::admin::{Admin, AdminParts};
use crate::app::{Addresses, Opened, StartError};
use crate::control::Control;
use crate::drain::Board;
use crate::endpoint::{Endpoint, Handler, admin_tls};
use crate::explain::{self, Question, Rules};
use crate::instance::Instance;
use crate::inventory;
use crate::live::{Applied, Checker, HealthCounter, Inventory, LiveState, NodeHealth, Readiness};
use crate::lookup_tables::Lookups;
use crate::running::Running;
use crate::settings;
use crate::status::Status;
use crate::store::BoxFuture;

/// The stages of the process, in this order.
const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;

/// Who does what operators ask for, in a process that serves traffic.
#[derive(Default)]
pub(crate) struct Leaders {
    pub(crate) drains: Option<Board>,
    pub(crate) acme: Option<Keeper>,
}

/// The running interfaces.
pub(crate) struct Interfaces {
    state: Arc<State>,
    addresses: Addresses,
    tasks: Vec<JoinHandle<()>>,
}

impl Interfaces {
    /// Binds and serves all interfaces that are switched on.
    ///
    /// # Errors
    /// An address is taken, the admin key cannot be kept, or a certificate cannot be used.
    pub(crate) async fn start(
        process: &Process,
        running: &Running,
        opened: &Opened,
        metrics: &Arc<Metrics>,
        export: &Export,
        instance: Instance,
        leaders: Leaders,
    ) -> Result<Self, StartError> {
        let Leaders { drains, acme } = leaders;
        let prefix = match &process.provider {
            Provider::Etcd(etcd) => etcd.prefix.clone(),
            _ => "/apisix".to_owned(),
        };
        // Asked once: a second guard in the same statement would wait for the first for ever.
        let (lookups, discovery) = {
            let compiler = &running.configuration().compiler;
            (compiler.lookups().clone(), compiler.cluster_env().discovery.clone())
        };
        let state = Arc::new(State {
            stage: AtomicU8::new(STARTING),
            lookups,
            running: running.clone(),
            rules: settings::rules(process),
            provider: provider(process),
            key_prefix: prefix.clone(),
            discovery,
            registries: process.discovery_written.clone(),
            warnings: drains.iter().filter_map(Board::warning).map(str::to_owned).collect(),
        });
        let told = state.clone();
        metrics.collector(move |out| told.collect(out));
        let live: Arc<dyn LiveState> = state.clone();
        let mut started = Self { state, addresses: Addresses::default(), tasks: Vec::new() };
        if let Some(settings) = &process.admin {
            let access = Access::new(settings, &process.data_dir).map_err(StartError::system(
                "the generated admin key cannot be kept in the data directory",
            ))?;
            started.addresses.admin_key = access.generated_key_file().map(PathBuf::from);
            let tls = settings
                .tls
                .as_ref()
                .map(admin_tls)
                .transpose()
                .map_err(StartError::system("deployment.admin.admin_api_mtls"))?;
            let reload = live.clone();
            let admin = Admin::new(AdminParts {
                store: opened.store.clone(),
                catalog: running.catalog().clone(),
                secrets: running.secrets().clone(),
                consumers: running.configuration().compiler.consumers().clone(),
                access,
                prefix: prefix.clone(),
                cors: settings.cors,
                stream: !process.stream.tcp.is_empty() || !process.stream.udp.is_empty(),
                signers: process.signers.iter().map(|pool| pool.name.clone()).collect(),
                standalone: opened.standalone.clone(),
                reload_plugins: Arc::new(move || reload.reload_plugins()),
            });
            let endpoint = bind("deployment.admin.admin_listen", settings.address, tls).await?;
            started.addresses.admin = endpoint.address().ok();
            started.spawn(endpoint, Arc::new(admin));
        }
        if let Some(address) = process.control {
            let control = Control::new(
                live.clone(),
                opened.store.clone(),
                running.catalog().clone(),
                &prefix,
                instance,
            );
            let control = match drains {
                Some(drains) => control.with_drains(drains),
                None => control,
            };
            let control = match acme {
                Some(acme) => control.with_acme(acme),
                None => control,
            };
            let endpoint = bind("apisix.control", address, None).await?;
            started.addresses.control = endpoint.address().ok();
            started.spawn(endpoint, Arc::new(control));
        }
        let endpoint = bind("apisix.status", process.status, None).await?;
        started.addresses.status = endpoint.address().ok();
        started.spawn(endpoint, Arc::new(Status::new(live)));
        if let Some(address) = export.addr {
            let asked =
                process.plugin_attr.get("prometheus").is_some_and(|attr| attr.get("export_addr").is_some());
            match bind("plugin_attr.prometheus.export_addr", address, None).await {
                Ok(endpoint) => {
                    started.addresses.metrics = endpoint.address().ok();
                    let page = MetricsPage { metrics: metrics.clone(), path: export.uri.clone() };
                    started.spawn(endpoint, Arc::new(page));
                }
                Err(error) if asked => return Err(error),
                // A second gateway on this machine; nobody asked for this address.
                Err(error) => tracing::warn!(%error, "metrics are not exported"),
            }
        }
        Ok(started)
    }

    fn spawn(&mut self, endpoint: Endpoint, handler: Arc<dyn Handler>) {
        // They answer until the process ends, also while it drains.
        self.tasks.push(tokio::spawn(endpoint.serve(handler, std::future::pending())));
    }

    /// Where they are reached.
    pub(crate) fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    /// The data path serves.
    pub(crate) fn ready(&self) {
        self.state.stage.store(READY, Ordering::Release);
    }

    /// The process is about to end.
    pub(crate) fn draining(&self) {
        self.state.stage.store(DRAINING, Ordering::Release);
    }
}

impl Drop for Interfaces {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn bind(
    setting: &'static str,
    address: SocketAddr,
    tls: Option<Arc<rustls::ServerConfig>>,
) -> Result<Endpoint, StartError> {
    let what = format!("{setting}: cannot listen on {address}; stop what does, or write another address");
    Endpoint::bind(address, tls).await.map_err(StartError::system(what))
}

fn provider(process: &Process) -> &'static str {
    match &process.provider {
        Provider::Embedded => "embedded",
        Provider::File { .. } => "file",
        Provider::Standalone => "standalone",
        Provider::Etcd(_) => "etcd",
    }
}

/// The page that Prometheus scrapes.
struct MetricsPage {
    metrics: Arc<Metrics>,
    path: String,
}

impl Handler for MetricsPage {
    fn handle(&self, _: SocketAddr, request: Request<Incoming>) -> BoxFuture<'_, Response<ReplyBody>> {
        let reply = if request.uri().path() == self.path {
            Reply::with(StatusCode::OK, plugins::prometheus::TEXT, self.metrics.render())
        } else {
            Reply::error(StatusCode::NOT_FOUND, format!("the metrics are at {}", self.path))
        };
        Box::pin(async move { reply.into_response() })
    }
}

/// The kind of a checker where there are breakers and no checks.
const BREAKER: &str = "breaker";

/// What the interfaces tell of the running gateway.
struct State {
    stage: AtomicU8,
    running: Running,
    lookups: Lookups,
    rules: Rules,
    provider: &'static str,
    /// Stands before the keys of objects: `/apisix`.
    key_prefix: String,
    discovery: Discovery,
    /// `discovery` of config.yaml, as written.
    registries: Map<String, Value>,
    /// What somebody should look at.
    warnings: Vec<String>,
}

impl State {
    /// What of the configuration is worth a metric.
    fn collect(&self, out: &mut Exposition) {
        let configuration = self.running.configuration();
        out.family("", &names::CONFIG_ITEMS);
        for kind in Kind::ALL {
            let count = configuration.graph.count(kind);
            out.sample("", names::CONFIG_ITEMS.name, [("kind", kind.segment())], count);
        }
        let rejected = configuration.graph.rejected().map(|rejected| rejected.key.kind);
        let late = configuration.compiler.refused().keys().chain(configuration.certificates.refused().keys());
        let rejected: Vec<_> = rejected.chain(late.map(|key| key.kind)).collect();
        if let Some(membership) = configuration.compiler.membership() {
            out.family("", &names::MESH_HANDSHAKES_TOTAL);
            membership.expose_handshakes(out);
            membership.expose(out);
        }
        let prefix = self.running.metrics().prefix();
        if self.provider == "etcd" {
            let reachable = self.running.progress().borrow().stale.is_none();
            out.single(prefix, &names::ETCD_REACHABLE, u8::from(reachable));
            out.family(prefix, &names::ETCD_MODIFY_INDEXES);
            let indexes = Kind::ALL.map(|kind| {
                let items = configuration.graph.iter(kind);
                (kind.segment(), items.map(|item| item.modified_index).max().unwrap_or_default())
            });
            let highest =
                ("max_modify_index", indexes.iter().map(|(_, index)| *index).max().unwrap_or_default());
            for (key, index) in indexes.into_iter().chain([highest]) {
                out.sample(prefix, names::ETCD_MODIFY_INDEXES.name, [("key", key)], index);
            }
        }
        out.single("", &names::WARNINGS, self.warnings.len());
        plugins::api_breaker::expose(configuration.compiler.carry(), out);
        drop(configuration);
        self.collect_nodes(prefix, out);
        inventory::collect(&self.clusters(None), &self.discovery, out);
        self.collect_lookups(out);
        out.family("", &names::CONFIG_REJECTED_ITEMS);
        for kind in Kind::ALL {
            let count = rejected.iter().filter(|other| **other == kind).count();
            out.sample("", names::CONFIG_REJECTED_ITEMS.name, [("kind", kind.segment())], count);
        }
    }
}

impl State {
    /// The upstreams that are called so, or all of them.
    fn clusters(&self, name: Option<&str>) -> Vec<inventory::Named> {
        let clusters = self.running.configuration().compiler.clusters();
        inventory::called(clusters, name)
    }

    /// Lookup tables and their lists.
    fn collect_lookups(&self, out: &mut Exposition) {
        let views = self.lookups.views();
        if views.is_empty() {
            return;
        }
        out.family("", &names::LOOKUP_ENTRIES);
        for view in &views {
            out.sample("", names::LOOKUP_ENTRIES.name, [("table", view.table.id())], view.counts.0);
        }
        out.family("", &names::LOOKUP_ACTIVE_ENTRIES);
        for view in &views {
            out.sample("", names::LOOKUP_ACTIVE_ENTRIES.name, [("table", view.table.id())], view.counts.1);
        }
        let listed = || views.iter().filter_map(|view| Some((view, view.stale_since?)));
        if listed().next().is_none() {
            return;
        }
        out.family("", &names::LOOKUP_LIST_STALE_SINCE);
        for (view, stale) in listed() {
            let since = stale.map_or(0, |since| {
                since.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs().max(1)
            });
            out.sample("", names::LOOKUP_LIST_STALE_SINCE.name, [("table", view.table.id())], since);
        }
        out.family("", &names::LOOKUP_FETCHES_TOTAL);
        for (view, _) in listed() {
            for (outcome, count) in [("good", view.fetches.0), ("failed", view.fetches.1)] {
                let labels = [("table", view.table.id()), ("outcome", outcome)];
                out.sample("", names::LOOKUP_FETCHES_TOTAL.name, labels, count);
            }
        }
    }

    /// What is thought of nodes.
    fn collect_nodes(&self, prefix: &str, out: &mut Exposition) {
        let checkers = self.health();
        let nodes =
            || checkers.iter().flat_map(|checker| checker.nodes.iter().map(move |node| (checker, node)));
        let sample = |out: &mut Exposition,
                      prefix: &str,
                      metric: &Metric,
                      (checker, node): (&Checker, &NodeHealth),
                      value: u64| {
            let (name, port) = (format!("{}/{}", self.key_prefix, checker.owner), node.port.to_string());
            out.sample(prefix, metric.name, [("name", &*name), ("ip", &node.ip), ("port", &port)], value);
        };
        out.family(prefix, &names::UPSTREAM_STATUS);
        for node in nodes().filter(|(checker, _)| checker.kind != BREAKER) {
            let healthy = matches!(node.1.status, "healthy" | "mostly_healthy");
            sample(out, prefix, &names::UPSTREAM_STATUS, node, healthy.into());
        }
        let with_breaker = || nodes().filter(|(_, node)| node.breaker.is_some());
        if with_breaker().next().is_none() {
            return;
        }
        out.family("", &names::NODE_BREAKER_STATE);
        for node in with_breaker() {
            let state = Phase::ALL.iter().position(|phase| Some(phase.as_str()) == node.1.breaker);
            sample(out, "", &names::NODE_BREAKER_STATE, node, state.unwrap_or_default() as u64);
        }
        out.family("", &names::NODE_BREAKER_OPENED_TOTAL);
        for node in with_breaker() {
            sample(out, "", &names::NODE_BREAKER_OPENED_TOTAL, node, node.1.breaker_opened);
        }
    }
}

impl LiveState for State {
    fn objects(&self, kind: Kind) -> Vec<Arc<Item>> {
        let configuration = self.running.configuration();
        let mut items: Vec<_> = configuration.graph.iter(kind).cloned().collect();
        items.sort_by(|a, b| a.key.cmp(&b.key));
        items
    }

    fn object(&self, key: &ResourceKey) -> Option<Arc<Item>> {
        self.running.configuration().graph.get(key).cloned()
    }

    fn rejected(&self) -> Vec<Rejected> {
        let configuration = self.running.configuration();
        let graph = &configuration.graph;
        // What did not pass its own check, and what passed it and still cannot work.
        let late = configuration.compiler.refused().iter().chain(configuration.certificates.refused());
        let late = late.filter_map(|(key, errors)| {
            let item = graph.get(key)?;
            Some(Rejected {
                key: key.clone(),
                errors: errors.clone(),
                value: item.to_value(),
                created_index: item.created_index,
                modified_index: item.modified_index,
            })
        });
        graph.rejected().cloned().chain(late).collect()
    }

    fn health(&self) -> Vec<Checker> {
        let clusters = self.running.configuration().compiler.clusters();
        let mut checkers: Vec<_> = clusters
            .iter()
            .filter_map(|(owner, cluster)| {
                let kind = cluster.check_kind().or_else(|| cluster.has_breakers().then_some(BREAKER))?;
                let owner = ResourceKey::from_path(owner)?;
                let nodes = cluster
                    .endpoints()
                    .into_iter()
                    .map(|node| NodeHealth {
                        ip: node.address.ip().to_string(),
                        port: node.address.port(),
                        hostname: (node.host.parse::<std::net::IpAddr>().is_err())
                            .then(|| node.host.to_string()),
                        status: node.status,
                        counter: HealthCounter {
                            success: node.counts.success.into(),
                            tcp_failure: node.counts.tcp_failure.into(),
                            http_failure: node.counts.http_failure.into(),
                            timeout_failure: node.counts.timeout_failure.into(),
                        },
                        breaker: node.breaker,
                        breaker_opened: node.breaker_opened,
                    })
                    .collect();
                Some(Checker { owner, kind, nodes })
            })
            .collect();
        checkers.sort_by(|a, b| a.owner.cmp(&b.owner));
        checkers
    }

    fn readiness(&self) -> Readiness {
        match self.stage.load(Ordering::Acquire) {
            READY => Readiness::Ready,
            DRAINING => Readiness::Draining,
            _ => {
                let progress = self.running.progress().borrow().clone();
                let reason = match (progress.configured, progress.stale) {
                    (true, _) => "the first addresses of upstreams are looked up".to_owned(),
                    (false, Some((_, why))) => format!("no configuration yet from {}: {why}", self.provider),
                    (false, None) => format!("no configuration yet from {}", self.provider),
                };
                Readiness::NotReady(reason)
            }
        }
    }

    fn warnings(&self) -> Vec<String> {
        self.warnings.clone()
    }

    fn applied(&self) -> Applied {
        let progress = self.running.progress().borrow().clone();
        Applied { revision: progress.revision, at: progress.at }
    }

    fn explain(&self, request: Value) -> BoxFuture<'_, Result<Value, String>> {
        let answer = serde_json::from_value::<Question>(request)
            .map_err(|error| format!("the question: {error}; write {}", json!({"url": "http://host/path"})))
            .and_then(|question| explain::explain(&question, &self.rules, &self.running.published().load()))
            .and_then(|explanation| serde_json::to_value(explanation).map_err(|error| error.to_string()));
        Box::pin(async move { answer })
    }

    fn discovery(&self, kind: &str) -> Option<Value> {
        let config = self.registries.get(kind);
        inventory::dump(&self.discovery, kind, config)
    }

    fn discovery_file(&self, kind: &str) -> Option<Value> {
        inventory::dump_file(&self.discovery, kind)
    }

    fn endpoints(&self, name: Option<&str>) -> Inventory {
        let clusters = self.clusters(name);
        let version = inventory::version(&clusters, &self.discovery);
        let upstreams = match name {
            None => inventory::summaries(&clusters, &self.discovery),
            Some(name) => inventory::details(&clusters, &self.discovery, name),
        };
        Inventory { version, upstreams }
    }

    fn endpoints_changed(&self, name: Option<&str>, since: &str) -> bool {
        inventory::version(&self.clusters(name), &self.discovery) != since
    }

    fn refresh_endpoints(&self, name: &str) -> bool {
        // Under the name of an upstream, discovery knows its services, and its hosts under theirs.
        let mut names: BTreeSet<String> = [name.to_owned()].into();
        for (key, cluster) in self.clusters(Some(name)) {
            names.insert(key.to_string());
            names.extend(cluster.endpoints().iter().map(|endpoint| endpoint.host.to_string()));
            names.extend(cluster.unresolved().into_iter().map(|(host, _)| host));
        }
        names.iter().filter(|name| self.discovery.refresh(Some(name))).count() > 0
    }

    fn mesh(&self) -> Option<Value> {
        self.running.configuration().compiler.membership().map(Membership::told)
    }

    fn breakers(&self) -> Value {
        plugins::api_breaker::report(self.running.configuration().compiler.carry())
    }

    fn caches(&self) -> Value {
        let compiler = &self.running.configuration().compiler;
        plugins::proxy_cache::report(compiler.carry(), compiler.attr(ProxyCache::NAME))
    }

    fn purge_cache(&self, zone: &str) -> bool {
        let purged = plugins::proxy_cache::purge_zone(self.running.configuration().compiler.carry(), zone);
        if purged {
            tracing::info!(zone, "a zone of the cache was emptied");
        }
        purged
    }

    fn lookup_tables(&self, id: Option<&str>) -> Vec<Value> {
        self.lookups.shown(id)
    }

    fn lookup_entry(&self, id: &str, key: &str) -> Option<Value> {
        self.lookups.shown_entry(id, key)
    }

    fn reload_plugins(&self) {
        // The list of plugins belongs to config.yaml, which is read at start.
        tracing::info!("plugins are part of the binary; their list is read at start");
    }
}
