//! The file in force: read, checked, compiled, published, and read again when it changes.
//!
//! A file that is wrong changes nothing: what is in force stays and the errors are told. Nothing that a reload does closes a
//! connection, but for what new policies forbid. On the control side.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use config::env::ProcessEnv;
use config::error::ConfigError;
use config::fields::Plugins;
use config::id::{Kind, ResourceKey};
use config::mesh::ServicePolicy;
use config::meta::Role;
use config::sidecar::Sidecar;
use hashbrown::HashMap;
use layers::assembly::Assembly;
use layers::carry::Carry;
use layers::chain::Plan;
use layers::consumer::Consumers;
use layers::endpoint::Endpoints;
use layers::plugin::{Registration, Upstreams};
use layers::telemetry::metrics::Metrics;
use layers::upstream::cluster::{Cluster, ClusterEnv};
use layers::worker::view::Published;
use plugins::support::http_call::{self, HttpClient};
use tokio::task::JoinHandle;

use crate::applications::Applications;
use crate::policy::PolicyTable;
use crate::probes::Probes;
use crate::services::Services;
use crate::snapshot::{Port, Ports, Rest, Snapshot};
use crate::tokens::Issuers;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// The file in force. Clones are the same.
#[derive(Clone)]
pub struct Running(Arc<Inner>);

struct Inner {
    file: PathBuf,
    /// The file as it was at the start.
    started: Sidecar,
    catalog: plugins::Catalog,
    registrations: HashMap<&'static str, &'static Registration>,
    attrs: HashMap<String, serde_json::Value>,
    carry: Carry,
    consumers: Consumers,
    endpoints: Endpoints,
    metrics: Arc<Metrics>,
    clusters: ClusterEnv,
    applications: Arc<Applications>,
    published: Arc<Published<Snapshot>>,
    policies: PolicyTable,
    state: Mutex<State>,
}

struct State {
    config: Sidecar,
    services: Services,
    ports: BTreeMap<SocketAddr, Arc<Port>>,
    /// Fetches the keys of issuers.
    fetching: Option<JoinHandle<()>>,
    problem: Option<String>,
    reloads: u64,
}

/// What the file in force is made with.
pub struct Parts {
    /// Where it is.
    pub file: PathBuf,
    /// The plugins on offer.
    pub catalog: plugins::Catalog,
    /// Shared metrics.
    pub metrics: Arc<Metrics>,
    /// What upstreams are made with.
    pub clusters: ClusterEnv,
    /// Where workers look.
    pub published: Arc<Published<Snapshot>>,
    /// What is allowed.
    pub policies: PolicyTable,
}

impl Running {
    /// With `config` in force.
    ///
    /// # Errors
    /// What cannot work, with pointers into the file.
    pub fn start(config: Sidecar, parts: Parts) -> Result<Self, Vec<ConfigError>> {
        let Parts { file, catalog, metrics, clusters, published, policies } = parts;
        let running = Self(Arc::new(Inner {
            file,
            started: config.clone(),
            registrations: catalog.all().map(|plugin| (plugin.name, plugin)).collect(),
            attrs: HashMap::new(),
            catalog,
            carry: Carry::default(),
            consumers: Consumers::default(),
            endpoints: Endpoints::default(),
            metrics,
            applications: Arc::new(Applications::new(&clusters, &config)),
            clusters,
            published,
            policies,
            state: Mutex::new(State {
                config: config.clone(),
                services: Services::default(),
                ports: BTreeMap::new(),
                fetching: None,
                problem: None,
                reloads: 0,
            }),
        }));
        config.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
        running.apply(config)?;
        Ok(running)
    }

    /// Where the workload listens, as far as the file says it or connections have come for it.
    pub fn workload_addresses(&self) -> BTreeSet<SocketAddr> {
        let mut all = self.0.applications.addresses();
        let state = self.state();
        all.extend(state.ports.values().map(|port| port.forward));
        all.extend(state.config.inbound.ports.iter().map(|port| port.forward.0));
        all
    }

    /// The file that was taken over last.
    pub fn config(&self) -> Sidecar {
        self.state().config.clone()
    }

    /// The keys of the file that wait for a new start.
    pub fn waits(&self) -> Vec<&'static str> {
        self.0.started.needs_restart(&self.state().config)
    }

    /// Why a newer file is not in force.
    pub fn problem(&self) -> Option<String> {
        self.state().problem.clone()
    }

    /// How often the file was taken over, the first time included.
    pub fn reloads(&self) -> u64 {
        self.state().reloads
    }

    /// What is allowed.
    pub fn policies(&self) -> &PolicyTable {
        &self.0.policies
    }

    /// Where workers look.
    pub fn published(&self) -> &Arc<Published<Snapshot>> {
        &self.0.published
    }

    /// What upstreams are made with.
    pub fn clusters(&self) -> &ClusterEnv {
        &self.0.clusters
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the file for ever, and takes over what changes.
    pub async fn follow(self) {
        let mut before = std::fs::read(&self.0.file).unwrap_or_default();
        loop {
            tokio::time::sleep(LOOK).await;
            let running = self.clone();
            let read = move || std::fs::read(&running.0.file).ok();
            let Ok(Some(now)) = tokio::task::spawn_blocking(read).await else { continue };
            if now == before {
                continue;
            }
            before = now;
            let running = self.clone();
            let reloading = tokio::task::spawn_blocking(move || running.reload());
            if reloading.await.is_err() {
                tracing::error!("a reload panicked; what is in force stays");
            }
        }
    }

    /// Reads the file again.
    fn reload(&self) {
        let told = |errors: Vec<String>| {
            for error in &errors {
                tracing::error!(error, "the file is not taken over; what is in force stays");
            }
            self.state().problem = Some(errors.join("\n"));
        };
        let config = match Sidecar::load(&self.0.file, &self.0.catalog, &ProcessEnv) {
            Ok(config) => config,
            Err(errors) => return told(errors.iter().map(ToString::to_string).collect()),
        };
        let waits = self.0.started.needs_restart(&config);
        if !waits.is_empty() {
            tracing::warn!(keys = ?waits, "these keys have changed and wait for a new start; the others are in force");
        }
        let warnings = config.warnings();
        match self.apply(config) {
            Ok(()) => {
                tracing::info!("the file is taken over");
                warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            }
            Err(errors) => told(errors.iter().map(ToString::to_string).collect()),
        }
    }

    fn apply(&self, config: Sidecar) -> Result<(), Vec<ConfigError>> {
        let inner = &self.0;
        let issuers = Issuers::new(&config.policies.tokens)
            .map_err(|errors| errors.into_iter().map(|error| error.under("/policies")).collect::<Vec<_>>())?;
        let before = inner.policies.published().load();
        let issuers = match before.in_force() {
            Some(before) => Arc::new(issuers.knowing(before.issuers())),
            None => Arc::new(issuers),
        };
        let client = if issuers.are_fetched() {
            let (tls, discovery) = (&inner.clusters.tls, &inner.clusters.discovery);
            let client =
                HttpClient::alone(&http_call::Settings::default(), tls, discovery, &inner.clusters.control);
            Some(client.map_err(|error| vec![error.under("/policies/tokens")])?)
        } else {
            None
        };
        let mut guard = self.state();
        let state = &mut *guard;
        let (ports, named) = self.ports(&config, &state.ports)?;
        let built = |policy: &ServicePolicy| self.plan(policy);
        let services = state.services.settle(&config.services, &inner.clusters, &built)?;
        let rest = Rest {
            workload: config.workload.service.to_string().into(),
            opaque: config.opaque_ports(),
            detect: config.limits.detect.duration(),
            idle: config.limits.idle.duration(),
        };
        // Listeners stay in the order in which they were bound.
        let order = inner.started.inbound.ports.iter().filter_map(|port| port.listen);
        let all = Ports {
            listening: order.filter_map(|listen| ports.get(&listen.0).cloned()).collect(),
            named,
            mode: config.inbound.mode,
            others: Some(inner.applications.clone()),
            probes: Probes::new(config.inbound.probes.as_ref()),
        };
        inner.published.publish(Arc::new(Snapshot::new(services, all, rest)));
        inner.policies.publish(&config.policies, &[&config.workload.service], issuers.clone());
        if let Some(former) = state.fetching.take() {
            former.abort();
        }
        if let Some(client) = client {
            state.fetching = Some(inner.clusters.control.spawn(async move { issuers.follow(client).await }));
        }
        if let Some(mesh) = &inner.clusters.mesh {
            mesh.set_max_age(config.limits.connection_age.duration());
        }
        state.ports = ports;
        state.reloads += 1;
        state.problem = None;
        state.config = config;
        inner.carry.sweep();
        Ok(())
    }

    /// The ports of the workload by their listeners, those included that are listened on still; and what the file says of
    /// connections that come in another way.
    #[expect(clippy::type_complexity, reason = "written once, and read where it stands")]
    fn ports(
        &self,
        config: &Sidecar,
        before: &BTreeMap<SocketAddr, Arc<Port>>,
    ) -> Result<(BTreeMap<SocketAddr, Arc<Port>>, Vec<Arc<Port>>), Vec<ConfigError>> {
        let (mut listening, mut named, mut others) = (before.clone(), Vec::new(), Vec::new());
        for (index, port) in config.inbound.ports.iter().enumerate() {
            let forward = port.forward.0;
            let wrong = |error: ConfigError| vec![error.under(&format!("/inbound/ports/{index}/forward"))];
            let application = self.0.applications.at(forward, None).map_err(wrong)?;
            let mode = port.mode.unwrap_or(config.inbound.mode);
            let made = Arc::new(Port { forward, mode, protocol: port.protocol, application });
            match port.listen {
                Some(listen) => {
                    listening.insert(listen.0, made.clone());
                    others.push(made);
                }
                None => named.push(made),
            }
        }
        named.append(&mut others);
        Ok((listening, named))
    }

    /// The plugins of a service.
    fn plan(&self, policy: &ServicePolicy) -> Result<Option<Arc<Plan>>, Vec<ConfigError>> {
        let Some(plugins) = policy.plugins.as_deref().filter(|plugins: &&Plugins| !plugins.is_empty()) else {
            return Ok(None);
        };
        let inner = &self.0;
        let owner = ResourceKey::new(Kind::Service, &*policy.name);
        let assembly = Assembly {
            role: Role::Sidecar,
            plugins: &inner.registrations,
            attrs: &inner.attrs,
            carry: &inner.carry,
            consumers: &inner.consumers,
            endpoints: &inner.endpoints,
            metrics: &inner.metrics,
            clusters: &inner.clusters,
            control: &inner.clusters.control,
        };
        let _context = inner.clusters.control.enter();
        let built = assembly.build(&owner, plugins, &Inline { owner: &owner, env: &inner.clusters })?;
        Ok(Some(Arc::new(Plan::new(built.to_vec()))))
    }
}

/// Upstreams that plugins of a service write down.
struct Inline<'a> {
    owner: &'a ResourceKey,
    env: &'a ClusterEnv,
}

impl Upstreams for Inline<'_> {
    fn by_id(&self, id: &str) -> Result<Arc<Cluster>, ConfigError> {
        Err(ConfigError::invalid("", format!("a sidecar has no upstreams with ids: write `{id}` inline")))
    }

    fn inline(&self, name: &str, upstream: &config::upstream::Upstream) -> Result<Arc<Cluster>, ConfigError> {
        Cluster::build(&format!("{}/{name}", self.owner), upstream, None, self.env)
    }
}
