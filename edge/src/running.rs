//! The running configuration: what the store told, what it was compiled to, and whether it is good enough to serve.
//!
//! One thread of its own takes events from the store, so that compiling a hundred thousand routes delays neither
//! workers nor the control runtime. Readers of the Control API look into the same state between two compilations.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use config::graph::{Change, Graph};
use config::plugin_catalog::PluginCatalog;
use config::{Kind, Resource, ResourceKey, secret_ref};
use layers::telemetry::metrics::Metrics;
use layers::worker::view::Published;
use tokio::sync::{mpsc, watch};

use crate::certificates::{Certificates, State};
use crate::compile::Compiler;
use crate::secrets::Secrets;
use crate::snapshot::Snapshot;
use crate::store::StoreEvent;

/// Changes that arrive within this time are compiled together.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// How long a change waits for the secrets that came with it.
const SECRETS_WAIT: Duration = Duration::from_secs(2);

/// Events taken together at the most, so that a flood of writes is published now and then.
const BATCH: usize = 256;

/// How far the configuration has come.
#[derive(Clone, Debug)]
pub struct Progress {
    /// A first configuration is compiled and published.
    pub configured: bool,
    /// The store's revision that is served.
    pub revision: u64,
    /// When it was published.
    pub at: SystemTime,
    /// Since when what is served may be old, and why.
    pub stale: Option<(SystemTime, String)>,
}

impl Default for Progress {
    fn default() -> Self {
        Self { configured: false, revision: 0, at: SystemTime::UNIX_EPOCH, stale: None }
    }
}

/// The graph and its compiled form. Locked for a compilation, or by a reader of the Control API.
pub struct Configuration {
    /// All resources.
    pub graph: Graph,
    /// Their compiled form.
    pub compiler: Compiler,
    /// Server certificates.
    pub certificates: Certificates,
}

/// The running configuration.
#[derive(Clone)]
pub struct Running {
    configuration: Arc<Mutex<Configuration>>,
    catalog: Arc<dyn PluginCatalog>,
    secrets: Secrets,
    published: Arc<Published<Snapshot>>,
    progress: Arc<watch::Sender<Progress>>,
    metrics: Arc<Metrics>,
}

impl Running {
    /// With an empty configuration.
    pub fn new(
        configuration: Configuration,
        catalog: Arc<dyn PluginCatalog>,
        secrets: Secrets,
        published: Arc<Published<Snapshot>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            configuration: Arc::new(Mutex::new(configuration)),
            catalog,
            secrets,
            published,
            progress: Arc::new(watch::Sender::new(Progress::default())),
            metrics,
        }
    }

    /// The configuration, to look into.
    pub fn configuration(&self) -> MutexGuard<'_, Configuration> {
        self.configuration.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far it has come.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// What workers serve from.
    pub fn published(&self) -> &Arc<Published<Snapshot>> {
        &self.published
    }

    /// Shared metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The secrets that objects refer to.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// The plugins on offer.
    pub fn catalog(&self) -> &Arc<dyn PluginCatalog> {
        &self.catalog
    }

    /// Takes events until the store ends. Blocks: to be called on a thread of its own, inside the control runtime's
    /// context.
    pub fn follow(&self, mut events: mpsc::Receiver<StoreEvent>) {
        while let Some(first) = events.blocking_recv() {
            let mut batch = vec![first];
            // A single change is not delayed for company: only what is already on its way is taken along.
            let mut waited = false;
            while batch.len() < BATCH {
                if let Ok(event) = events.try_recv() {
                    batch.push(event);
                } else if batch.len() > 1 && !waited {
                    waited = true;
                    #[expect(clippy::disallowed_methods, reason = "no worker: this thread only compiles")]
                    std::thread::sleep(DEBOUNCE);
                } else {
                    break;
                }
            }
            self.take(batch);
        }
    }

    /// Reads the objects again that refer to a secret for whose path `is_told` holds. Blocks.
    pub fn read_again(&self, mut is_told: impl FnMut(&str) -> bool) {
        let is_told = |text: &str| secret_ref::manager_path(text).is_some_and(&mut is_told);
        let mut configuration = self.configuration();
        let changed = configuration.graph.read_again(is_told, &*self.catalog);
        if !changed.is_empty() {
            self.compile(configuration, changed, None);
        }
    }

    /// Compiles these objects again, because something that is not in the graph has changed. Blocks.
    pub fn again(&self, changed: Vec<ResourceKey>) {
        self.compile(self.configuration(), changed, None);
    }

    fn take(&self, batch: Vec<StoreEvent>) {
        for event in &batch {
            if let StoreEvent::Changes { changes, .. } = event {
                self.ask_for_secrets(changes);
            }
        }
        // One lock until it is published: whoever looks into the configuration sees what is served.
        let mut configuration = self.configuration();
        let catalog = &*self.catalog;
        let (mut changed, mut revision) = (Vec::new(), None);
        for event in batch {
            match event {
                StoreEvent::Snapshot { changes, revision: now } => {
                    changed.extend(configuration.graph.replace_all(changes, catalog));
                    revision = Some(now);
                }
                StoreEvent::Changes { changes, revision: now } => {
                    for change in changes {
                        changed.extend(configuration.graph.apply(change, catalog));
                    }
                    revision = Some(now);
                }
                StoreEvent::Stale { since, why } => {
                    tracing::warn!(why, "the configuration may be old; the last good one is served");
                    self.metrics.configuration.stale(since);
                    self.progress.send_modify(|progress| progress.stale = Some((since, why)));
                }
                StoreEvent::Fresh => {
                    tracing::info!("the configuration is current");
                    self.metrics.configuration.fresh();
                    self.progress.send_modify(|progress| progress.stale = None);
                }
            }
        }
        if revision.is_some() {
            self.compile(configuration, changed, revision);
        }
    }

    /// An object that comes with a secret nobody has asked for would be set aside until the answer is there.
    fn ask_for_secrets(&self, changes: &[Change]) {
        let mut paths = Vec::new();
        for change in changes {
            if let Change::Put { value, .. } = change {
                secret_ref::manager_paths(value, &mut paths);
            }
        }
        if !paths.is_empty() {
            let asked = self.secrets.ask(&paths, SECRETS_WAIT);
            tokio::runtime::Handle::current().block_on(asked);
        }
    }

    /// Publishes what follows from these changes; `revision` is None where the store has not moved.
    fn compile(
        &self,
        mut guard: MutexGuard<'_, Configuration>,
        changed: Vec<ResourceKey>,
        revision: Option<u64>,
    ) {
        let configuration = &mut *guard;
        for rejected in changed.iter().filter_map(|key| configuration.graph.rejected_at(key)) {
            for error in &rejected.errors {
                tracing::error!(object = %rejected.key, %error, "set aside");
            }
        }
        if changed.iter().any(|key| key.kind == Kind::Secret) {
            self.secrets.managers(&configuration.graph);
        }
        let ssls = changed.iter().filter(|key| key.kind == Kind::Ssl);
        configuration.certificates.update(ssls.map(|key| {
            let graph = &configuration.graph;
            let state = match (
                graph.get(key).map(|item| (&item.resource, item.created_index)),
                graph.rejected_at(key),
            ) {
                (Some((Resource::Ssl(ssl), created_index)), _) => State::Read(ssl, created_index),
                (_, Some(rejected)) => State::SetAside(&rejected.value),
                (_, None) => State::Gone,
            };
            (key, state)
        }));
        let snapshot = configuration.compiler.compile(&configuration.graph, changed);
        // Under the lock: of two that compile, the one that came later is published later.
        self.published.publish(Arc::new(snapshot));
        drop(guard);
        let revision = revision.unwrap_or_else(|| self.progress.borrow().revision);
        self.metrics.configuration.revision.set(revision);
        self.metrics.configuration.published.inc();
        self.progress.send_modify(|progress| {
            progress.configured = true;
            progress.revision = revision;
            progress.at = SystemTime::now();
        });
    }
}
