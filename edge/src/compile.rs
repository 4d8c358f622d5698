//! From resources to the objects of the data path, change by change.
//!
//! Everything that can fail or cost is done here, on the control thread. What did not change keeps its object: a route
//! among a hundred thousand is replaced alone, an upstream changes inside its [`Cluster`] without touching the routes
//! that use it, and a plugin keeps its state over edits elsewhere.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use config::fields::Plugins;
use config::graph::{Graph, Item, Rejected};
use config::meta::Role;
use config::plugin_catalog::PluginCatalog;
use config::process::Process;
use config::{ConfigError, Kind, Resource, ResourceKey};
use hashbrown::{HashMap, HashSet};
use layers::assembly::{Assembly, Instances};
use layers::carry::Carry;
use layers::chain::{Instance, Plan};
use layers::consumer::{Consumer, ConsumerTable, Consumers};
use layers::endpoint::{Endpoints, Offers};
use layers::error::Reason;
use layers::plugin::{Registration, Upstreams};
use layers::route::{AddrSet, Entry, HostPattern, MethodSet, Mode, Table};
use layers::target::{Destination, Target, Timeouts};
use layers::telemetry::metrics::Metrics;
use layers::upstream::cluster::{Cluster, ClusterEnv};
use layers::upstream::membership::Membership;
use layers::upstream::tls_client::ClientPem;
use layers::worker::turns::Turns;
use serde_json::Value;

use crate::lookup_tables::Lookups;
use crate::registries::BadSetting;
use crate::snapshot::Snapshot;
use crate::{merge, settings};

mod lookup;

/// What compiling needs beside the resources.
pub struct Env {
    /// The plugins on offer, by name.
    pub plugins: HashMap<&'static str, &'static Registration>,
    /// `plugin_attr` of `config.yaml`.
    pub attrs: HashMap<String, Value>,
    /// Which part of a request is looked at first.
    pub mode: Mode,
    /// Says which plugins are enabled, and may offer paths of their own.
    pub catalog: Arc<dyn PluginCatalog>,
    /// The published consumers.
    pub consumers: Consumers,
    /// What plugins offer under paths of their own.
    pub endpoints: Endpoints,
    /// Lookup tables and their lists.
    pub lookups: Lookups,
    /// Shared metrics.
    pub metrics: Arc<Metrics>,
    /// What upstreams are made with.
    pub clusters: ClusterEnv,
    /// The membership in the mesh.
    pub membership: Option<Membership>,
    /// The control runtime.
    pub control: tokio::runtime::Handle,
}

impl Env {
    /// What `config.yaml` says, and the plugins of this binary. `turns` are those of the workers that will run.
    ///
    /// # Errors
    /// The trusted certificates for upstreams, or a file of a registry, cannot be read.
    pub fn new(
        process: &Process,
        catalog: Arc<plugins::Catalog>,
        metrics: Arc<Metrics>,
        control: tokio::runtime::Handle,
        turns: &Turns,
    ) -> Result<Self, BadSetting> {
        let membership = settings::membership(process)?;
        Ok(Self {
            plugins: catalog.all().map(|plugin| (plugin.name, plugin)).collect(),
            attrs: settings::plugin_attrs(process),
            mode: settings::mode(process),
            catalog,
            consumers: Consumers::default(),
            endpoints: Endpoints::default(),
            lookups: Lookups::default(),
            clusters: settings::clusters(process, membership.as_ref(), &control, turns)?,
            membership,
            metrics,
            control,
        })
    }
}

/// Keeps the compiled form of all resources and brings it up to date.
pub struct Compiler {
    env: Env,
    carry: Carry,
    clusters: Clusters,
    /// The plugins of every object that has some.
    plugins: HashMap<ResourceKey, Result<Instances, Vec<ConfigError>>>,
    consumers: BTreeMap<ResourceKey, Vec<Recognised>>,
    routes: Table<Target>,
    body_readers: HashSet<Arc<str>>,
    global: Option<Arc<Plan>>,
    /// A global rule that cannot be used and never could.
    globals_refused: Option<Arc<str>>,
    /// The plugins that were asked what they offer under paths of their own.
    offering: Vec<&'static str>,
    refused: BTreeMap<ResourceKey, Vec<ConfigError>>,
    version: u64,
}

/// A consumer under one authentication plugin and key.
struct Recognised {
    plugin: &'static str,
    key: Option<String>,
    consumer: Arc<Consumer>,
}

/// The clusters that exist, by the key of the object that owns them.
#[derive(Default)]
struct Clusters {
    by_key: RefCell<HashMap<Box<str>, Arc<Cluster>>>,
    /// Inline upstreams of a single address, by how they are written. Routes that write the same one share it, so that
    /// a hundred thousand of them hold one cluster and one set of connections.
    shared: RefCell<HashMap<Box<str>, Weak<Cluster>>>,
}

/// Forgotten shared clusters are swept out when the table would have to grow, from this size on.
const SHARED_SWEEP: usize = 1024;

impl Clusters {
    fn of(&self, key: &str) -> Option<Arc<Cluster>> {
        self.by_key.borrow().get(key).cloned()
    }

    /// The cluster of `key` as `upstream` says; the one that is there is changed in place.
    fn settle(
        &self,
        key: &str,
        upstream: &config::upstream::Upstream,
        graph: &Graph,
        env: &ClusterEnv,
    ) -> Result<Arc<Cluster>, ConfigError> {
        let certificate = client_certificate(upstream, graph)?;
        if let Some(cluster) = self.of(key) {
            cluster.update(upstream, certificate, env)?;
            return Ok(cluster);
        }
        let cluster = Cluster::build(key, upstream, certificate, env)?;
        self.by_key.borrow_mut().insert(key.into(), cluster.clone());
        Ok(cluster)
    }

    /// The cluster of an inline upstream that can be shared: it has one address and nothing watches it, so there is no
    /// balance and no health that routes could disturb in each other. None where it cannot.
    fn share(
        &self,
        upstream: &config::upstream::Upstream,
        env: &ClusterEnv,
    ) -> Option<Result<Arc<Cluster>, ConfigError>> {
        let [node] = &**upstream.nodes.as_ref()? else { return None };
        if upstream.checks.is_some()
            || upstream.tls.is_some()
            || upstream.breaker.is_some()
            || upstream.slow_start.is_some()
            || upstream.discovery.is_some()
            || discovery::literal(node.bare_host()).is_none()
        {
            return None;
        }
        let written = serde_json::to_string(upstream).ok()?;
        let mut shared = self.shared.borrow_mut();
        if let Some(cluster) = shared.get(written.as_str()).and_then(Weak::upgrade) {
            return Some(Ok(cluster));
        }
        if shared.len() >= SHARED_SWEEP && shared.len() == shared.capacity() {
            shared.retain(|_, cluster| cluster.strong_count() > 0);
        }
        let built = Cluster::build(&node.address(), upstream, None, env);
        if let Ok(cluster) = &built {
            shared.insert(written.into(), Arc::downgrade(cluster));
        }
        Some(built)
    }

    fn remove(&self, key: &str) -> bool {
        self.by_key.borrow_mut().remove(key).is_some()
    }
}

/// The certificate that `tls.client_cert_id` names.
fn client_certificate(
    upstream: &config::upstream::Upstream,
    graph: &Graph,
) -> Result<Option<ClientPem>, ConfigError> {
    let Some(id) = upstream.tls.as_ref().and_then(|tls| tls.client_cert_id.as_ref()) else { return Ok(None) };
    let key = id.key(Kind::Ssl);
    match graph.get(&key).map(|item| &item.resource) {
        Some(Resource::Ssl(ssl)) => {
            let missing = || ConfigError::invalid("/tls/client_cert_id", format!("{key} has no certificate"));
            let at_signers =
                || ConfigError::invalid("/tls/client_cert_id", "its key is at signers, not in PEM");
            let (cert, key) = ssl.pairs().next().ok_or_else(missing)?;
            let pem = key.pem().ok_or_else(at_signers)?;
            Ok(Some(ClientPem { certificate: cert.as_str().into(), key: pem.reveal().into() }))
        }
        _ => Err(missing_reference("/tls/client_cert_id", &key)),
    }
}

/// Where the plugins of one object find upstreams of their own.
struct UpstreamsOf<'a> {
    owner: &'a ResourceKey,
    clusters: &'a Clusters,
    graph: &'a Graph,
    env: &'a ClusterEnv,
    /// The keys of the inline upstreams that were asked for.
    used: RefCell<Vec<String>>,
}

impl Upstreams for UpstreamsOf<'_> {
    fn by_id(&self, id: &str) -> Result<Arc<Cluster>, ConfigError> {
        let key = ResourceKey::new(Kind::Upstream, id);
        self.clusters
            .of(&key.to_string())
            .ok_or_else(|| ConfigError::new("", config::ErrorKind::MissingReference { target: key }))
    }

    fn inline(&self, name: &str, upstream: &config::upstream::Upstream) -> Result<Arc<Cluster>, ConfigError> {
        let key = format!("{}/{name}", self.owner);
        let cluster = self.clusters.settle(&key, upstream, self.graph, self.env)?;
        self.used.borrow_mut().push(key);
        Ok(cluster)
    }

    fn metadata(&self, plugin: &str) -> Option<Value> {
        metadata_of(self.graph, plugin)
    }

    fn proto(&self, name: &str) -> Option<String> {
        let content = |item: &Item| match &item.resource {
            Resource::Proto(proto) => Some(proto.content.to_string()),
            _ => None,
        };
        if let Some(item) = self.graph.get(&ResourceKey::new(Kind::Proto, name)) {
            return content(item);
        }
        let named = |item: &&Arc<Item>| match &item.resource {
            Resource::Proto(proto) => proto.name.as_deref() == Some(name),
            _ => false,
        };
        self.graph.iter(Kind::Proto).find(named).and_then(|item| content(item))
    }
}

/// The order in which kinds are compiled: what is referred to comes first.
const ORDER: [Kind; 12] = [
    Kind::Ssl,
    Kind::Upstream,
    Kind::LookupTable,
    Kind::LookupEntry,
    Kind::PluginMetadata,
    Kind::Service,
    Kind::PluginConfig,
    Kind::ConsumerGroup,
    Kind::Consumer,
    Kind::Credential,
    Kind::GlobalRule,
    Kind::Route,
];

impl Compiler {
    /// The published consumers.
    pub fn consumers(&self) -> &Consumers {
        &self.env.consumers
    }

    /// With nothing compiled yet.
    pub fn new(env: Env) -> Self {
        Self {
            carry: Carry::default(),
            clusters: Clusters::default(),
            plugins: HashMap::new(),
            consumers: BTreeMap::new(),
            routes: Table::new(env.mode),
            body_readers: HashSet::new(),
            global: None,
            globals_refused: None,
            offering: Vec::new(),
            refused: BTreeMap::new(),
            version: 0,
            env,
        }
    }

    /// Objects that passed every check of their own and still cannot work, and why.
    pub fn refused(&self) -> &BTreeMap<ResourceKey, Vec<ConfigError>> {
        &self.refused
    }

    /// What lives over reloads.
    pub fn carry(&self) -> &Carry {
        &self.carry
    }

    /// `plugin_attr` of a plugin.
    pub fn attr(&self, plugin: &str) -> Option<&Value> {
        self.env.attrs.get(plugin)
    }

    /// The membership in the mesh, where there is one.
    pub fn membership(&self) -> Option<&Membership> {
        self.env.membership.as_ref()
    }

    /// What clusters are made with.
    pub fn cluster_env(&self) -> &ClusterEnv {
        &self.env.clusters
    }

    /// Every cluster there is, also those that several objects share.
    pub fn every_cluster(&self) -> Vec<Arc<Cluster>> {
        let by_key = self.clusters.by_key.borrow();
        let shared = self.clusters.shared.borrow();
        let own = by_key.values().cloned().chain(shared.values().filter_map(Weak::upgrade));
        own.chain(self.env.lookups.clusters().into_iter().map(|(_, cluster)| cluster)).collect()
    }

    /// The clusters that exist, by the key of their owner.
    pub fn clusters(&self) -> Vec<(Box<str>, Arc<Cluster>)> {
        let by_key = self.clusters.by_key.borrow();
        let own = by_key.iter().map(|(key, cluster)| (key.clone(), cluster.clone()));
        own.chain(self.env.lookups.clusters()).collect()
    }

    /// Lookup tables and their lists.
    pub fn lookups(&self) -> &Lookups {
        &self.env.lookups
    }

    /// Brings the data plane up to date with `graph`, in which the objects `changed` are new, different or gone.
    pub fn compile(&mut self, graph: &Graph, changed: impl IntoIterator<Item = ResourceKey>) -> Snapshot {
        let affected = self.affected(graph, changed);
        let mut consumers = false;
        let mut globals = false;
        for kind in ORDER {
            for key in affected.iter().filter(|key| key.kind == kind) {
                self.refused.remove(key);
                let item = graph.get(key).cloned();
                match kind {
                    Kind::Upstream => self.upstream(graph, key, item.as_deref()),
                    Kind::LookupTable => self.lookup_table(graph, key, item.as_deref()),
                    Kind::LookupEntry => self.lookup_entry(graph, key, item.as_deref()),
                    Kind::Service => self.service(graph, key, item.as_deref()),
                    Kind::PluginConfig | Kind::ConsumerGroup => self.plugins_of(graph, key, item.as_deref()),
                    Kind::Consumer | Kind::Credential => {
                        self.consumer(graph, key, item.as_deref());
                        consumers = true;
                    }
                    Kind::GlobalRule => {
                        // What a rule keeps out stays out until the rule can be read again, or is gone.
                        if item.is_some() || graph.rejected_at(key).is_none() {
                            self.plugins_of(graph, key, item.as_deref());
                        }
                        globals = true;
                    }
                    Kind::Route => self.route(graph, key, item.as_deref()),
                    _ => {}
                }
            }
        }
        if consumers {
            self.publish_consumers();
        }
        if globals {
            self.merge_globals(graph);
        }
        let enabled = self.env.catalog.names();
        if self.offering != enabled || affected.iter().any(|key| key.kind == Kind::PluginMetadata) {
            self.offering = enabled;
            self.publish_endpoints(graph);
        }
        self.carry.sweep();
        self.version += 1;
        Snapshot {
            version: self.version,
            routes: self.routes.clone(),
            global: self.global.clone(),
            refused: self.globals_refused.clone(),
            reads_body: !self.body_readers.is_empty(),
        }
    }

    /// The changed objects, and those that are built from them.
    fn affected(
        &self,
        graph: &Graph,
        changed: impl IntoIterator<Item = ResourceKey>,
    ) -> HashSet<ResourceKey> {
        let mut affected = HashSet::new();
        let mut waiting: Vec<ResourceKey> = changed.into_iter().collect();
        while let Some(key) = waiting.pop() {
            let spreads = match key.kind {
                // An upstream changes inside its cluster; only its coming and going concerns others.
                Kind::Upstream => self.clusters.of(&key.to_string()).is_some() != graph.get(&key).is_some(),
                Kind::PluginMetadata => {
                    waiting.extend(self.holders(graph, &key.id));
                    let reads =
                        |plugin: &&Registration| (plugin.extras)().read_metadata().contains(&&*key.id);
                    for plugin in self.env.plugins.values().copied().filter(reads) {
                        waiting.extend(self.holders(graph, plugin.name));
                    }
                    false
                }
                // Routes hold the table and see its entries change.
                Kind::LookupTable | Kind::LookupEntry => false,
                // One definition may import another, which only compiling tells.
                Kind::Proto => {
                    waiting.extend(self.holders(graph, "grpc-transcode"));
                    true
                }
                _ => true,
            };
            if !affected.insert(key.clone()) {
                continue;
            }
            if spreads {
                waiting.extend(graph.referrers(&key));
                if key.kind == Kind::Upstream {
                    // Fetched lists are not in the graph and may refer to it.
                    let listed = |item: &&Arc<Item>| matches!(&item.resource, Resource::LookupTable(table) if table.source.is_some());
                    waiting.extend(graph.iter(Kind::LookupTable).filter(listed).map(|item| item.key.clone()));
                }
            }
        }
        affected
    }

    /// The objects that hold a plugin.
    fn holders(&self, graph: &Graph, plugin: &str) -> Vec<ResourceKey> {
        let kinds = [
            Kind::Route,
            Kind::Service,
            Kind::PluginConfig,
            Kind::ConsumerGroup,
            Kind::Consumer,
            Kind::Credential,
            Kind::GlobalRule,
        ];
        kinds
            .into_iter()
            .flat_map(|kind| graph.iter(kind))
            .filter(|item| item.resource.plugins().is_some_and(|plugins| plugins.contains_key(plugin)))
            .map(|item| item.key.clone())
            .collect()
    }

    fn refuse(&mut self, key: &ResourceKey, errors: Vec<ConfigError>) {
        for error in &errors {
            tracing::error!(object = %key, %error, "set aside");
        }
        self.refused.insert(key.clone(), errors);
    }

    fn upstream(&mut self, graph: &Graph, key: &ResourceKey, item: Option<&Item>) {
        let name = key.to_string();
        match item.map(|item| &item.resource) {
            Some(Resource::Upstream(upstream)) => {
                if let Err(error) = self.clusters.settle(&name, upstream, graph, &self.env.clusters) {
                    self.refuse(key, vec![error]);
                }
            }
            _ => {
                self.clusters.remove(&name);
            }
        }
    }

    fn service(&mut self, graph: &Graph, key: &ResourceKey, item: Option<&Item>) {
        self.plugins_of(graph, key, item);
        let name = key.to_string();
        let Some(Resource::Service(service)) = item.map(|item| &item.resource) else {
            self.clusters.remove(&name);
            return;
        };
        match &service.upstream {
            Some(upstream) => {
                if let Err(error) = self.clusters.settle(&name, upstream, graph, &self.env.clusters) {
                    self.refuse(key, vec![error.under("/upstream")]);
                }
            }
            None => {
                self.clusters.remove(&name);
            }
        }
    }

    /// Builds the plugins of an object that has some, and forgets those of one that has none.
    fn plugins_of(&mut self, graph: &Graph, key: &ResourceKey, item: Option<&Item>) {
        match item.and_then(|item| item.resource.plugins()) {
            Some(plugins) if !plugins.is_empty() => {
                let built = self.build(graph, key, plugins);
                if let Err(errors) = &built {
                    self.refuse(key, errors.clone());
                }
                self.plugins.insert(key.clone(), built);
            }
            _ => {
                self.plugins.remove(key);
            }
        }
    }

    /// Builds the plugins of an object. All errors, with pointers into it.
    fn build(
        &self,
        graph: &Graph,
        owner: &ResourceKey,
        plugins: &Plugins,
    ) -> Result<Instances, Vec<ConfigError>> {
        let upstreams = UpstreamsOf {
            owner,
            clusters: &self.clusters,
            graph,
            env: &self.env.clusters,
            used: RefCell::default(),
        };
        self.assembly().build(owner, plugins, &upstreams)
    }

    /// What plugins are built with.
    fn assembly(&self) -> Assembly<'_> {
        Assembly {
            role: Role::Edge,
            plugins: &self.env.plugins,
            attrs: &self.env.attrs,
            carry: &self.carry,
            consumers: &self.env.consumers,
            endpoints: &self.env.endpoints,
            metrics: &self.env.metrics,
            clusters: &self.env.clusters,
            control: &self.env.control,
        }
    }

    /// Asks all plugins what they offer under paths of their own.
    fn publish_endpoints(&mut self, graph: &Graph) {
        let mut offers = Offers::default();
        let mut refused = Vec::new();
        for registration in self.offering.iter().filter_map(|name| self.env.plugins.get(name)) {
            let owner = ResourceKey::new(Kind::PluginMetadata, registration.name);
            let upstreams = UpstreamsOf {
                owner: &owner,
                clusters: &self.clusters,
                graph,
                env: &self.env.clusters,
                used: RefCell::default(),
            };
            let metadata = metadata_of(graph, registration.name);
            let env = self.assembly().env(&owner, registration.name, metadata.as_ref(), &upstreams);
            if let Err(error) = (registration.offer)(&env, &mut offers) {
                refused.push((owner, error));
            }
        }
        for (owner, error) in refused {
            self.refuse(&owner, vec![error]);
        }
        self.env.endpoints.publish(offers);
    }

    fn route(&mut self, graph: &Graph, key: &ResourceKey, item: Option<&Item>) {
        self.body_readers.remove(&key.id);
        let entry = match item.map(|item| (item, &item.resource)) {
            Some((item, Resource::Route(route))) => {
                self.plugins_of(graph, key, Some(item));
                if !route.status.is_on() {
                    None
                } else {
                    match self.target(graph, key, route) {
                        Ok(target) => entry(graph, key, item, route, target),
                        Err(errors) => {
                            self.refuse(key, errors);
                            refused_entry(graph, key, item, route, self.refused.get(key))
                        }
                    }
                }
            }
            _ => {
                self.plugins.remove(key);
                self.clusters.remove(&key.to_string());
                graph.rejected_at(key).and_then(|rejected| rejected_entry(graph, rejected))
            }
        };
        match entry {
            Some(entry) => {
                if entry.vars.as_ref().is_some_and(config::Expr::needs_body) {
                    self.body_readers.insert(key.id.clone());
                }
                self.routes.insert(entry);
            }
            None => {
                self.routes.remove(&key.id);
            }
        }
    }

    /// What a route does with a request.
    fn target(
        &self,
        graph: &Graph,
        key: &ResourceKey,
        route: &config::route::Route,
    ) -> Result<Target, Vec<ConfigError>> {
        let service_key = route.service_id.as_ref().map(|id| id.key(Kind::Service));
        let service = service_key.as_ref().and_then(|key| match &graph.get(key)?.resource {
            Resource::Service(service) => Some(&**service),
            _ => None,
        });
        let config_key = route.plugin_config_id.as_ref().map(|id| id.key(Kind::PluginConfig));
        let mut owners: Vec<&[Arc<Instance>]> = Vec::with_capacity(3);
        for owner in [Some(key), config_key.as_ref(), service_key.as_ref()].into_iter().flatten() {
            match self.plugins.get(owner) {
                Some(Ok(instances)) => owners.push(instances),
                // Without one of its plugins the route could let in what the plugin keeps out.
                Some(Err(errors)) if owner == key => return Err(errors.clone()),
                Some(Err(_)) => return Err(vec![unusable(owner)]),
                None => {}
            }
        }
        if let Some(missing) = config_key.as_ref().filter(|key| graph.get(key).is_none()) {
            return Err(vec![missing_reference("/plugin_config_id", missing)]);
        }
        if let Some(owner) = service_key.as_ref().filter(|key| graph.rejected_at(key).is_some()) {
            return Err(vec![unusable(owner)]);
        }
        let destination = self.destination(graph, key, route, service_key.as_ref(), service)?;
        let plan = (!owners.is_empty()).then(|| Arc::new(merge::merge(owners)));
        Ok(Target {
            route_id: key.id.clone(),
            route_name: route.name.as_ref().map(|name| name.as_str().into()),
            route: graph.get(key).cloned(),
            service: service_key.as_ref().and_then(|key| graph.get(key)).cloned(),
            service_id: service_key.as_ref().map(|key| key.id.clone()),
            service_name: service.and_then(|service| service.name.as_ref()).map(|name| name.as_str().into()),
            plan,
            destination,
            timeout: route.timeout.as_ref().map(|timeout| {
                Box::new(Timeouts {
                    connect: timeout.connect.duration(),
                    send: timeout.send.duration(),
                    read: timeout.read.duration(),
                })
            }),
            websocket: route
                .enable_websocket
                .or_else(|| service.and_then(|service| service.enable_websocket))
                .unwrap_or(false),
            refused: None,
        })
    }

    /// The upstream of a route: its own, else its service's. APISIX 2.4, steps 4 and 10.
    fn destination(
        &self,
        graph: &Graph,
        key: &ResourceKey,
        route: &config::route::Route,
        service_key: Option<&ResourceKey>,
        service: Option<&config::service::Service>,
    ) -> Result<Destination, Vec<ConfigError>> {
        let named = |id: &config::Id| match self.clusters.of(&id.key(Kind::Upstream).to_string()) {
            Some(cluster) => Destination::Cluster(cluster),
            None => Destination::Nothing(Reason::UpstreamMissing),
        };
        let own = key.to_string();
        if service_key.is_some() && service.is_none() {
            // Whatever else the route has: the service's plugins may be what protects it.
            self.clusters.remove(&own);
            return Ok(Destination::Nothing(Reason::ServiceNotFound));
        }
        if let Some(upstream) = &route.upstream {
            let cluster = match self.clusters.share(upstream, &self.env.clusters) {
                Some(shared) => {
                    self.clusters.remove(&own);
                    shared
                }
                None => self.clusters.settle(&own, upstream, graph, &self.env.clusters),
            };
            return cluster.map(Destination::Cluster).map_err(|error| vec![error.under("/upstream")]);
        }
        self.clusters.remove(&own);
        if let Some(id) = &route.upstream_id {
            return Ok(named(id));
        }
        match (service_key, service) {
            (Some(key), Some(service)) if service.upstream.is_some() => {
                match self.clusters.of(&key.to_string()) {
                    Some(cluster) => Ok(Destination::Cluster(cluster)),
                    None => Err(vec![unusable(key)]),
                }
            }
            (Some(_), Some(service)) => {
                Ok(service.upstream_id.as_ref().map_or(Destination::Nothing(Reason::NoUpstream), named))
            }
            _ => Ok(Destination::Nothing(Reason::NoUpstream)),
        }
    }

    fn consumer(&mut self, graph: &Graph, key: &ResourceKey, item: Option<&Item>) {
        self.consumers.remove(key);
        let Some(item) = item else { return };
        let owner = match key.kind {
            Kind::Credential => key.consumer(),
            _ => Some(key.clone()),
        };
        let Some(consumer_item) = owner.as_ref().and_then(|owner| graph.get(owner)) else {
            return;
        };
        let Resource::Consumer(consumer) = &consumer_item.resource else { return };
        let (plugins, refused) = match self.plugins_of_consumer(graph, consumer, &consumer_item.key) {
            Ok(plugins) => (plugins, None),
            Err(errors) => {
                let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
                self.refuse(key, errors);
                (Arc::default(), Some(told.join("; ").into_boxed_str()))
            }
        };
        let labels: Arc<[(Box<str>, Box<str>)]> = consumer
            .labels
            .iter()
            .flat_map(|labels| labels.iter())
            .map(|(name, value)| (Box::from(name.as_ref()), Box::from(value.as_ref())))
            .collect();
        let custom_id =
            labels.iter().find(|(name, _)| &**name == "custom_id").map(|(_, value)| Arc::from(&**value));
        let credential_id = (key.kind == Kind::Credential).then(|| Arc::from(key.own_id()));
        let consumer = || Consumer {
            group_id: consumer.group_id.as_ref().map(|id| id.as_str().into()),
            labels: labels.clone(),
            custom_id: custom_id.clone(),
            plugins: plugins.clone(),
            credential_id: credential_id.clone(),
            refused: refused.clone(),
            ..Consumer::new(consumer.username.as_str())
        };
        let mut found = Vec::new();
        if key.kind == Kind::Consumer {
            // Under no plugin: `anonymous_consumer` finds it by name.
            found.push(Recognised { plugin: "", key: None, consumer: Arc::new(consumer()) });
        }
        for (name, settings) in item.resource.plugins().into_iter().flat_map(|plugins| plugins.iter()) {
            let Some(registration) = self.env.plugins.get(name.as_str()) else { continue };
            let extras = (registration.extras)();
            if let Some(settings_key) = extras.consumer_key(settings) {
                let consumer = Consumer {
                    auth: Arc::new(settings.clone()),
                    verifier: extras.consumer_verifier(settings),
                    ..consumer()
                };
                let consumer = Arc::new(consumer);
                found.push(Recognised { plugin: registration.name, key: Some(settings_key), consumer });
            }
        }
        self.consumers.insert(key.clone(), found);
    }

    /// The consumer's own plugins merged with its group's; those that authenticate only say who it is.
    fn plugins_of_consumer(
        &self,
        graph: &Graph,
        consumer: &config::consumer::Consumer,
        owner: &ResourceKey,
    ) -> Result<Instances, Vec<ConfigError>> {
        let group = consumer.group_id.as_ref().map(|id| id.key(Kind::ConsumerGroup));
        if let Some(missing) = group.as_ref().filter(|key| graph.get(key).is_none()) {
            return Err(vec![missing_reference("/group_id", missing)]);
        }
        let is_auth = |name: &str| {
            self.env.plugins.get(name).is_some_and(|registration| (registration.extras)().authenticates())
        };
        let mut acting = Plugins::default();
        for (name, settings) in consumer.plugins.iter().flat_map(|plugins| plugins.iter()) {
            if !is_auth(name) {
                acting.insert(name.clone(), settings.clone());
            }
        }
        let own = self.build(graph, owner, &acting)?;
        let of_group: &[Arc<Instance>] = match group.as_ref().and_then(|key| self.plugins.get(key)) {
            None => &[],
            Some(Ok(instances)) => instances,
            Some(Err(_)) => return Err(vec![unusable(group.as_ref().unwrap_or(owner))]),
        };
        Ok(merge::instances([&own[..], of_group]).into())
    }

    fn publish_consumers(&self) {
        let mut table = ConsumerTable::default();
        for (owner, found) in &self.consumers {
            for recognised in found {
                match &recognised.key {
                    None => table.insert_named(recognised.consumer.clone()),
                    Some(key) => {
                        if !table.insert(recognised.plugin, key, recognised.consumer.clone()) {
                            tracing::error!(
                                object = %owner,
                                plugin = recognised.plugin,
                                "another consumer has the same key; this one is not recognised by it"
                            );
                        }
                    }
                }
            }
        }
        self.env.consumers.publish(table);
    }

    /// One plan of all global rules, in the order of their ids; the first of two equal plugins wins. One that was set
    /// aside stays as it was.
    fn merge_globals(&mut self, graph: &Graph) {
        let set_aside =
            graph.rejected().map(|rejected| &rejected.key).filter(|key| key.kind == Kind::GlobalRule);
        let mut keys: Vec<_> =
            graph.iter(Kind::GlobalRule).map(|item| &item.key).chain(set_aside).cloned().collect();
        keys.sort();
        let cannot_run = |key: &&ResourceKey| match self.plugins.get(*key) {
            Some(built) => built.is_err(),
            None => graph.rejected_at(key).is_some(),
        };
        self.globals_refused = keys.iter().find(cannot_run).map(|key| unusable(key).to_string().into());
        let owners: Vec<&[Arc<Instance>]> = keys
            .iter()
            .filter_map(|key| self.plugins.get(key)?.as_ref().ok())
            .map(|instances| &**instances)
            .collect();
        let merged = merge::instances(owners);
        self.global = (!merged.is_empty()).then(|| Arc::new(Plan::new(merged)));
    }
}

/// The settings of a plugin for the whole gateway.
fn metadata_of(graph: &Graph, plugin: &str) -> Option<Value> {
    match &graph.get(&ResourceKey::new(Kind::PluginMetadata, plugin))?.resource {
        Resource::PluginMetadata(metadata) => Some(Value::Object(metadata.settings.clone())),
        _ => None,
    }
}

fn missing_reference(pointer: &str, target: &ResourceKey) -> ConfigError {
    ConfigError::new(pointer, config::ErrorKind::MissingReference { target: target.clone() })
}

/// An object that this one is built from was set aside.
fn unusable(key: &ResourceKey) -> ConfigError {
    ConfigError::invalid("", format!("{key}, which this object uses, is set aside: mend that one first"))
}

/// The table entry of a route that serves.
fn entry(
    graph: &Graph,
    key: &ResourceKey,
    item: &Item,
    route: &config::route::Route,
    target: Target,
) -> Option<Entry<Target>> {
    let of_service = || {
        let service = route.service_id.as_ref()?.key(Kind::Service);
        match &graph.get(&service)?.resource {
            Resource::Service(service) => service.hosts.as_deref(),
            _ => None,
        }
    };
    let mut hosts: Vec<_> = route.hosts().map(|host| HostPattern::new(host)).collect();
    if hosts.is_empty() {
        hosts = of_service()
            .into_iter()
            .flat_map(|hosts| hosts.iter())
            .map(|host| HostPattern::new(host))
            .collect();
    }
    let methods = route.methods();
    let methods = (!methods.is_empty()).then(|| {
        methods.iter().fold(MethodSet::default(), |set, method| set.union(MethodSet::named(method.as_str())))
    });
    let nets: Vec<_> = route.remote_addrs().map(|net| net.net()).collect();
    let vars = match route.vars.as_deref().map(config::Expr::parse).transpose() {
        Ok(vars) => vars,
        // The object's own check has parsed them before.
        Err(error) => {
            tracing::error!(object = %key, %error, "vars");
            return None;
        }
    };
    Some(Entry {
        id: key.id.clone(),
        hosts,
        uris: route.uris().map(str::to_owned).collect(),
        methods,
        remote_addrs: (!nets.is_empty()).then(|| nets.into_iter().collect::<AddrSet>()),
        vars,
        priority: i64::from(route.priority),
        order: item.created_index,
        value: Arc::new(target),
    })
}

/// The entry of a route that may not serve: it keeps its place in the table and answers 503, so that its requests do
/// not fall through to another route.
fn refused_entry(
    graph: &Graph,
    key: &ResourceKey,
    item: &Item,
    route: &config::route::Route,
    errors: Option<&Vec<ConfigError>>,
) -> Option<Entry<Target>> {
    let why: Vec<_> = errors.into_iter().flatten().map(ConfigError::to_string).collect();
    let target = Target {
        route_id: key.id.clone(),
        route_name: None,
        route: None,
        service: None,
        service_id: None,
        service_name: None,
        plan: None,
        destination: Destination::Nothing(Reason::RouteRefused),
        timeout: None,
        websocket: false,
        refused: Some(why.join("; ").into()),
    };
    entry(graph, key, item, route, target)
}

/// The entry of a route whose object did not pass its check, from those of its fields that say which requests it means.
fn rejected_entry(graph: &Graph, rejected: &Rejected) -> Option<Entry<Target>> {
    const LISTS: [(&str, &[&str]); 4] = [
        ("uris", &["uri", "uris"]),
        ("hosts", &["host", "hosts"]),
        ("remote_addrs", &["remote_addr", "remote_addrs"]),
        ("methods", &["methods"]),
    ];
    let fields = rejected.value.as_object()?;
    if fields.get("status").is_some_and(|status| status == 0) {
        return None;
    }
    let mut meaning = serde_json::Map::new();
    for (list, names) in LISTS {
        let mut values = Vec::new();
        for value in names.iter().filter_map(|name| fields.get(*name)) {
            let written = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            values
                .extend(written.iter().filter(|value| !values.contains(*value)).cloned().collect::<Vec<_>>());
        }
        if !values.is_empty() {
            meaning.insert(list.to_owned(), values.into());
        }
    }
    // A route has to go somewhere to be one.
    meaning.insert("service_id".to_owned(), "none".into());
    for name in ["vars", "priority", "service_id"] {
        if let Some(value) = fields.get(name) {
            meaning.insert(name.to_owned(), value.clone());
        }
    }
    let route = loop {
        match Resource::parse(
            &rejected.key,
            &Value::Object(meaning.clone()),
            &config::plugin_catalog::NoPlugins,
        ) {
            Ok(Resource::Route(route)) => break route,
            Ok(_) => return None,
            Err(errors) => {
                if !widen(&mut meaning, &errors) {
                    return None;
                }
            }
        }
    };
    let item = Item {
        key: rejected.key.clone(),
        resource: Resource::Route(route.clone()),
        created_index: rejected.modified_index,
        modified_index: rejected.modified_index,
    };
    refused_entry(graph, &rejected.key, &item, &route, Some(&rejected.errors))
}

/// Takes what is wrong out of the conditions of a route that is refused. A path or a host that cannot be read means no
/// request; every other condition counts as met, because the route may be what keeps requests from another one.
/// Whether there is something left to read.
fn widen(meaning: &mut serde_json::Map<String, Value>, errors: &[ConfigError]) -> bool {
    let places: BTreeSet<(&str, Option<usize>)> = errors
        .iter()
        .map(|error| {
            let mut steps = error.pointer.split('/').skip(1);
            (steps.next().unwrap_or_default(), steps.next().and_then(|step| step.parse().ok()))
        })
        .collect();
    // The last of a list first: those before it keep their place.
    for (field, place) in places.into_iter().rev() {
        if field == "service_id" {
            if meaning.insert(field.to_owned(), "none".into()).is_some_and(|before| before == "none") {
                return false;
            }
            continue;
        }
        match (meaning.get_mut(field), place) {
            // Of what is joined by `OR` or negated, less would mean fewer requests.
            (Some(Value::Array(values)), Some(place))
                if values.len() > 1
                    && place < values.len()
                    && (field != "vars"
                        || values.first().is_some_and(|form| form.is_array() || form == "AND")) =>
            {
                values.remove(place);
            }
            (Some(_), _) if field != "hosts" => {
                meaning.remove(field);
            }
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests;
