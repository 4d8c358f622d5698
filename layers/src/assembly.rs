//! From the `plugins` object of a resource to plugins that run.
//!
//! Edge and sidecar build them here, so one JSON means one thing in both. `_meta` is settled at this place: what is
//! disabled or placed in the other role takes part in no phase.

use std::sync::Arc;

use config::error::{ConfigError, ErrorKind, escape};
use config::fields::Plugins;
use config::id::ResourceKey;
use config::meta::{META, Meta, Role};
use hashbrown::HashMap;
use serde_json::Value;
use tokio::runtime::Handle;

use crate::carry::Carry;
use crate::chain::{ErrorResponse, Instance, Source};
use crate::consumer::Consumers;
use crate::endpoint::Endpoints;
use crate::plugin::{BuildEnv, Hooks, Placement, Registration, Upstreams};
use crate::telemetry::metrics::Metrics;
use crate::upstream::cluster::ClusterEnv;

/// The plugins of one object, built.
pub type Instances = Arc<[Arc<Instance>]>;

/// What plugins of one role are built with.
#[derive(Clone, Copy)]
pub struct Assembly<'a> {
    /// Who runs them.
    pub role: Role,
    /// The plugins on offer, by name.
    pub plugins: &'a HashMap<&'static str, &'static Registration>,
    /// `plugin_attr` of `config.yaml`.
    pub attrs: &'a HashMap<String, Value>,
    /// Keeps state over reloads.
    pub carry: &'a Carry,
    /// The published consumers.
    pub consumers: &'a Consumers,
    /// What plugins offer under paths of their own.
    pub endpoints: &'a Endpoints,
    /// Shared metrics.
    pub metrics: &'a Arc<Metrics>,
    /// What upstreams, and calls of services, are made with.
    pub clusters: &'a ClusterEnv,
    /// The control runtime.
    pub control: &'a Handle,
}

impl<'a> Assembly<'a> {
    /// What one plugin of `owner` is built with.
    pub fn env(
        &self,
        owner: &'a ResourceKey,
        plugin: &str,
        metadata: Option<&'a Value>,
        upstreams: &'a dyn Upstreams,
    ) -> BuildEnv<'a> {
        BuildEnv {
            owner,
            metadata,
            attr: self.attrs.get(plugin),
            carry: self.carry,
            consumers: self.consumers,
            endpoints: self.endpoints,
            upstreams,
            metrics: self.metrics,
            control: self.control,
            discovery: &self.clusters.discovery,
            tls: &self.clusters.tls,
        }
    }

    /// Builds the plugins of `owner` in the order of their names; [`Plan::new`](crate::chain::Plan::new) puts them into
    /// the order in which they run. Needs the control runtime around it.
    ///
    /// # Errors
    /// All of them, with pointers into the object.
    pub fn build(
        &self,
        owner: &ResourceKey,
        plugins: &Plugins,
        upstreams: &dyn Upstreams,
    ) -> Result<Instances, Vec<ConfigError>> {
        let source = Source(owner.to_string().into());
        let mut built = Vec::with_capacity(plugins.len());
        let mut errors = Vec::new();
        for (name, settings) in plugins.iter() {
            match self.one(owner, &source, name, settings, upstreams) {
                Ok(instance) => built.extend(instance),
                Err(found) => {
                    let under = format!("/plugins/{}", escape(name));
                    errors.extend(found.into_iter().map(|error| error.under(&under)));
                }
            }
        }
        if errors.is_empty() { Ok(built.into()) } else { Err(errors) }
    }

    /// Builds one plugin. Nothing where the name is one of those that are harmless to leave out; they have passed the
    /// check of the object and have no registration.
    ///
    /// # Errors
    /// Why it cannot work, with pointers into the settings.
    pub fn one(
        &self,
        owner: &ResourceKey,
        source: &Source,
        name: &str,
        settings: &Value,
        upstreams: &dyn Upstreams,
    ) -> Result<Option<Arc<Instance>>, Vec<ConfigError>> {
        let Some(registration) = self.plugins.get(name) else { return Ok(None) };
        let meta = Meta::of(settings);
        let instance = Instance {
            name: registration.name,
            priority: registration.priority,
            source: source.clone(),
            filter: None,
            error_response: None,
            hooks: Hooks::default(),
        };
        if meta.is_disabled() || !meta.runs_in(self.role) {
            // It takes part in no phase, and its place from the same plugin of a weaker object.
            return Ok(Some(Arc::new(instance)));
        }
        if let (Role::Sidecar, Placement::Edge(reason)) = (self.role, registration.placement) {
            let kind = ErrorKind::MisplacedPlugin { name: name.to_owned(), reason };
            return Err(vec![ConfigError::new("", kind)]);
        }
        let mut settings = settings.clone();
        if let Some(fields) = settings.as_object_mut() {
            fields.remove(META);
        }
        let metadata = upstreams.metadata(name);
        let mut hooks = Hooks::default();
        let shorter: Assembly<'_> = *self;
        let env = shorter.env(owner, name, metadata.as_ref(), upstreams);
        (registration.build)(&settings, &env, &mut hooks)?;
        let filter = meta.filter.as_ref().map(config::Expr::parse).transpose();
        let filter = filter.map_err(|error| vec![error.under(&format!("/{META}/filter"))])?;
        Ok(Some(Arc::new(Instance {
            priority: meta.priority.unwrap_or(registration.priority),
            filter,
            error_response: meta.error_response.as_ref().map(ErrorResponse::from),
            hooks,
            ..instance
        })))
    }
}
