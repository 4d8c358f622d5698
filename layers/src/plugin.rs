//! The plugin interface: one small trait per phase, and a [`Definition`] that registers for the phases it needs.
//!
//! Phases run in APISIX's order: `rewrite` of all plugins, then `access` of all, `before_proxy` once a node is chosen,
//! `response` and `body` on the way back in the same order, `encode` on the finished answer, `log` when all is over.
//! The few plugins that surround the upstream call have [`Around`]. `build` does everything that can fail or cost; a
//! request constructs no regex, parses no JSON and formats no constant.

use std::any::Any;
use std::future::Future;
use std::sync::Arc;

use config::error::ConfigError;
use config::id::ResourceKey;
use http::{Response, StatusCode, header};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use smallvec::SmallVec;

use crate::body::{Body, BodyFilter};
use crate::carry::Carry;
use crate::consumer::Consumers;
use crate::endpoint::{Endpoints, Offers};
use crate::error::Fault;
use crate::exchange::Exchange;
use crate::local::LocalBox;
use crate::upstream::cluster::Cluster;

/// What a plugin says after a request phase.
pub enum Flow {
    /// Go on.
    Next,
    /// Answer now. The upstream is not asked; response and log phases still run.
    Reply(Response<Body>),
}

impl Flow {
    /// Answers with a JSON body, in APISIX's form: one line, and sent as text.
    pub fn json(status: StatusCode, body: &impl Serialize) -> Self {
        let text = serde_json::to_string(body).unwrap_or_default();
        Self::text(status, text + "\n")
    }

    /// Answers with text.
    pub fn text(status: StatusCode, body: impl Into<Body>) -> Self {
        let mut response = Response::new(body.into());
        *response.status_mut() = status;
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
        Self::Reply(response)
    }

    /// Answers with `{"message": ...}`, the form of APISIX's own refusals.
    pub fn message(status: StatusCode, message: &str) -> Self {
        Self::json(status, &serde_json::json!({ "message": message }))
    }

    /// Answers with a status and no body.
    pub fn status(status: StatusCode) -> Self {
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = status;
        Self::Reply(response)
    }
}

/// Runs before the route's upstream is settled: authentication, rewriting.
pub trait Rewrite: Send + Sync + 'static {
    /// May change the request or answer it.
    fn rewrite(&self, x: &mut Exchange) -> Flow;
}

/// As [`Rewrite`], for a plugin that waits for something. It names its own deadline.
pub trait RewriteWaits: Send + Sync + 'static {
    /// May change the request or answer it.
    fn rewrite(&self, x: &mut Exchange) -> impl Future<Output = Flow>;
}

/// Runs after every plugin's `rewrite`: limits, restrictions.
pub trait Access: Send + Sync + 'static {
    /// May change the request or answer it.
    fn access(&self, x: &mut Exchange) -> Flow;
}

/// As [`Access`], for a plugin that waits for something. It names its own deadline.
pub trait AccessWaits: Send + Sync + 'static {
    /// May change the request or answer it.
    fn access(&self, x: &mut Exchange) -> impl Future<Output = Flow>;
}

/// Runs when the first node is chosen, once a request.
pub trait BeforeProxy: Send + Sync + 'static {
    /// May change the request or answer it.
    fn before_proxy(&self, x: &mut Exchange) -> Flow;
}

/// Surrounds the upstream call: answers without it, or takes its answer before any other phase sees it. Rare: it costs
/// the requests of its routes a boxed future. Where several plugins do it, answers pass them in the order of all
/// response phases, so the one with the highest priority is nearest to the upstream.
pub trait Around: Send + Sync + 'static {
    /// Goes on by `next.run(x)`, or not at all. Not called when a plugin has answered before. It names its own
    /// deadlines; those of the upstream call hold within `next`.
    fn around(&self, x: Exchange, next: Next) -> impl Future<Output = Result<Exchange, Fault>>;
}

/// The rest of the way to the upstream and back.
pub struct Next {
    pub(crate) inside: Surrounding,
    pub(crate) forward: Forward,
}

/// Plugins around the upstream call, the innermost first.
pub(crate) type Surrounding = SmallVec<[Arc<dyn Surrounds>; 2]>;

/// The upstream call itself.
pub(crate) type Forward = Box<dyn FnOnce(Exchange) -> LocalBox<'static, Result<Exchange, Fault>>>;

impl Next {
    /// Asks the upstream. An answer has its head, and its body still to be read.
    ///
    /// # Errors
    /// No node answered, with the exchange as far as it came.
    pub fn run(mut self, x: Exchange) -> LocalBox<'static, Result<Exchange, Fault>> {
        match self.inside.pop() {
            Some(next) => next.run(x, self),
            None => (self.forward)(x),
        }
    }
}

/// Runs on the head of every answer, the upstream's or our own.
pub trait OnResponse: Send + Sync + 'static {
    /// May change status and fields of `x.response`.
    fn response(&self, x: &mut Exchange);
}

/// Filters the answer's body.
pub trait OnBody: Send + Sync + 'static {
    /// Returns a filter for this answer, or nothing to let it pass. Called after every plugin's `response`.
    fn body(&self, x: &mut Exchange) -> Option<Box<dyn BodyFilter>>;
}

/// Runs on the finished answer, after every `response` and `body`: how it is written for the client, such as its
/// content coding.
pub trait Encode: Send + Sync + 'static {
    /// May wrap the body of `x.response` and change the fields that tell of its form. Where it changes the length it
    /// removes `Content-Length`.
    fn encode(&self, x: &mut Exchange);
}

/// Takes out of the request what no log may tell. Runs when all is over, before anybody's `log` and the access log.
pub trait Hide: Send + Sync + 'static {
    /// May change the request's target and fields; nothing acts on them any more.
    fn hide(&self, x: &mut Exchange);
}

/// Runs when all is over.
pub trait OnLog: Send + Sync + 'static {
    /// Must not wait; sends what it has to tell by a bounded channel.
    fn log(&self, x: &Exchange);

    /// Whether `log` reads the fields of the response; they are kept for it then.
    fn reads_head(&self) -> bool {
        false
    }
}

/// Which roles can run a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// The edge and sidecars.
    Both,
    /// The edge alone, and why.
    Edge(&'static str),
}

/// Why plugins that ask for consumers run at the edge alone.
pub const NEEDS_CONSUMERS: Placement = Placement::Edge(
    "a sidecar knows no consumers; write `from: [{identities: ...}]` in an authorization policy",
);

/// What a plugin is: its name, place in the order, settings, and how an object of it is made.
pub trait Definition: Sized + 'static {
    /// APISIX's name.
    const NAME: &'static str;
    /// APISIX's default priority; the highest runs first.
    const PRIORITY: i32;
    /// The settings. Their schema and documentation are the plugin's.
    type Config: DeserializeOwned + Serialize + JsonSchema;

    /// Which roles can run it. One that needs what a sidecar has not (consumers, definitions, paths of the gateway's
    /// own) says so, and why.
    const PLACEMENT: Placement = Placement::Both;

    /// What the plugin has besides its settings: consumer settings, metadata.
    fn extend(_extras: &mut Extras) {}

    /// Checks what the types cannot say. All errors, with pointers into the settings.
    fn check(_config: &Self::Config) -> Vec<ConfigError> {
        Vec::new()
    }

    /// Checks what depends on the plugin's `plugin_attr` of `config.yaml`. Like [`check`](Self::check), it runs before
    /// the object is stored, and starts nothing.
    fn check_attr(_config: &Self::Config, _attr: Option<&Value>) -> Vec<ConfigError> {
        Vec::new()
    }

    /// Compiles the settings and registers for phases. What can be told from the settings alone, [`check`](Self::check)
    /// has told before: by now the object is stored, and can only be set aside.
    ///
    /// # Errors
    /// The setting that cannot work, by its JSON pointer; the object that holds the plugin is refused.
    fn build(config: Self::Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError>;

    /// Offers paths that `public-api` can expose on routes. Asked once for the whole gateway, and again when the
    /// plugin's metadata changes; `env.owner` is then that metadata, whether there is any or not.
    ///
    /// # Errors
    /// What of `env` cannot work; the plugin then offers nothing.
    fn offer(_env: &BuildEnv<'_>, _offers: &mut Offers) -> Result<(), ConfigError> {
        Ok(())
    }
}

/// A typed check that returns the settings with their defaults.
pub type Check = fn(&Value) -> Result<Value, Vec<ConfigError>>;

/// Makes the JSON schema of settings.
pub type MakeSchema = fn() -> Value;

/// How a consumer's settings name the consumer: the key under which a request's credential finds it.
pub type ConsumerKey = fn(&Value) -> Option<String>;

/// What the credentials of one consumer are checked against: a parsed key, a digest. Made when the consumer changes.
pub trait Verifier: Sized + Send + Sync + 'static {
    /// The plugin's settings on a consumer or credential.
    type Settings: DeserializeOwned + Serialize + JsonSchema + 'static;

    /// Makes it.
    ///
    /// # Errors
    /// The setting that cannot work, by its JSON pointer; it names no secret. The object is refused.
    fn new(settings: Self::Settings) -> Result<Self, ConfigError>;
}

/// Makes a verifier of settings that were checked.
type MakeVerifier = fn(&Value) -> Option<Arc<dyn Any + Send + Sync>>;

/// How a plugin recognises consumers.
pub(crate) struct Recognition {
    check: Check,
    schema: MakeSchema,
    key: ConsumerKey,
    verifier: MakeVerifier,
}

/// What a plugin has besides its settings.
#[derive(Default)]
pub struct Extras {
    pub(crate) consumer: Option<Recognition>,
    pub(crate) metadata: Option<(CheckMetadata, MakeSchema)>,
    pub(crate) reads: Vec<&'static str>,
}

/// A typed check of metadata.
type CheckMetadata = Box<dyn Fn(&Value) -> Result<Value, Vec<ConfigError>> + Send + Sync>;

impl Extras {
    /// The plugin authenticates: consumers and credentials carry settings of type `C`, found by `key`.
    pub fn consumer<C: DeserializeOwned + Serialize + JsonSchema + 'static>(&mut self, key: ConsumerKey) {
        self.consumer =
            Some(Recognition { check: check_type::<C>, schema: schema_of::<C>, key, verifier: |_| None });
    }

    /// As [`consumer`](Self::consumer); what `V` makes of the settings goes with the consumer.
    pub fn verifier<V: Verifier>(&mut self, key: ConsumerKey) {
        self.consumer = Some(Recognition {
            check: check_verifier::<V>,
            schema: schema_of::<V::Settings>,
            key,
            verifier: make_verifier::<V>,
        });
    }

    /// The plugin has settings for the whole gateway (`plugin_metadata`).
    pub fn metadata<M: DeserializeOwned + Serialize + JsonSchema + 'static>(&mut self) {
        self.checked_metadata::<M>(|_| Vec::new());
    }

    /// As [`metadata`](Self::metadata); `check` tells what the types cannot say, with pointers into the metadata.
    pub fn checked_metadata<M: DeserializeOwned + Serialize + JsonSchema + 'static>(
        &mut self,
        check: fn(&M) -> Vec<ConfigError>,
    ) {
        let checked = move |value: &Value| {
            let metadata = config::typed::parse::<M>(value)?;
            let errors = check(&metadata);
            if errors.is_empty() {
                config::typed::to_value(&metadata).map_err(|error| vec![error])
            } else {
                Err(errors)
            }
        };
        self.metadata = Some((Box::new(checked), schema_of::<M>));
    }
}

impl Extras {
    /// The plugin reads the metadata of another: its objects are built again when that changes.
    pub fn reads_metadata(&mut self, plugin: &'static str) {
        self.reads.push(plugin);
    }

    /// The plugins whose metadata this one reads besides its own.
    pub fn read_metadata(&self) -> &[&'static str] {
        &self.reads
    }

    /// Whether the plugin recognises consumers.
    pub fn authenticates(&self) -> bool {
        self.consumer.is_some()
    }

    /// The key under which these settings of a consumer are found, if the plugin authenticates.
    pub fn consumer_key(&self, settings: &Value) -> Option<String> {
        (self.consumer.as_ref()?.key)(settings)
    }

    /// What credentials of a consumer with these settings are checked against, if the plugin makes such a thing.
    pub fn consumer_verifier(&self, settings: &Value) -> Option<Arc<dyn Any + Send + Sync>> {
        (self.consumer.as_ref()?.verifier)(settings)
    }

    /// Checks settings of a consumer, if the plugin authenticates.
    pub fn check_consumer(&self, settings: &Value) -> Option<Result<Value, Vec<ConfigError>>> {
        self.consumer.as_ref().map(|recognition| (recognition.check)(settings))
    }

    /// The schema of a consumer's settings, if the plugin authenticates.
    pub fn consumer_schema(&self) -> Option<Value> {
        self.consumer.as_ref().map(|recognition| (recognition.schema)())
    }

    /// Checks the plugin's metadata, if it has any.
    pub fn check_metadata(&self, settings: &Value) -> Option<Result<Value, Vec<ConfigError>>> {
        self.metadata.as_ref().map(|(check, _)| check(settings))
    }

    /// The schema of the plugin's metadata, if it has any.
    pub fn metadata_schema(&self) -> Option<Value> {
        self.metadata.as_ref().map(|(_, schema)| schema())
    }
}

fn check_type<T: DeserializeOwned + Serialize + JsonSchema + 'static>(
    value: &Value,
) -> Result<Value, Vec<ConfigError>> {
    config::typed::parse::<T>(value).and_then(|typed| config::typed::to_value(&typed).map_err(|e| vec![e]))
}

fn check_verifier<V: Verifier>(value: &Value) -> Result<Value, Vec<ConfigError>> {
    let settings = config::typed::parse::<V::Settings>(value)?;
    let checked = config::typed::to_value(&settings).map_err(|error| vec![error])?;
    V::new(settings).map_err(|error| vec![error])?;
    Ok(checked)
}

fn make_verifier<V: Verifier>(value: &Value) -> Option<Arc<dyn Any + Send + Sync>> {
    let settings = config::typed::parse::<V::Settings>(value).ok()?;
    Some(Arc::new(V::new(settings).ok()?))
}

fn schema_of<T: JsonSchema>() -> Value {
    config::typed::schema_of::<T>()
}

/// A plugin of the catalogue, without its type.
#[derive(Clone, Copy)]
pub struct Registration {
    /// APISIX's name.
    pub name: &'static str,
    /// Default priority.
    pub priority: i32,
    /// Which roles can run it.
    pub placement: Placement,
    /// Checks settings and fills in defaults.
    pub check: Check,
    /// Checks settings against the plugin's `plugin_attr`.
    pub check_attr: fn(&Value, Option<&Value>) -> Vec<ConfigError>,
    /// The JSON Schema of the settings.
    pub schema: fn() -> Value,
    /// Makes the phases of one object.
    pub build: fn(&Value, &BuildEnv<'_>, &mut Hooks) -> Result<(), Vec<ConfigError>>,
    /// Offers paths of the plugin's own.
    pub offer: fn(&BuildEnv<'_>, &mut Offers) -> Result<(), ConfigError>,
    /// What else the plugin has.
    pub extras: fn() -> Extras,
}

impl Registration {
    /// The entry of `D`.
    pub fn of<D: Definition>() -> Self {
        Self {
            name: D::NAME,
            priority: D::PRIORITY,
            placement: D::PLACEMENT,
            check: check_plugin::<D>,
            check_attr: check_plugin_attr::<D>,
            schema: schema_of::<D::Config>,
            build: build_plugin::<D>,
            offer: D::offer,
            extras: || {
                let mut extras = Extras::default();
                D::extend(&mut extras);
                extras
            },
        }
    }
}

fn parse_plugin<D: Definition>(value: &Value) -> Result<D::Config, Vec<ConfigError>> {
    let config = config::typed::parse::<D::Config>(value)?;
    let errors = D::check(&config);
    if errors.is_empty() { Ok(config) } else { Err(errors) }
}

fn check_plugin<D: Definition>(value: &Value) -> Result<Value, Vec<ConfigError>> {
    config::typed::to_value(&parse_plugin::<D>(value)?).map_err(|error| vec![error])
}

fn check_plugin_attr<D: Definition>(value: &Value, attr: Option<&Value>) -> Vec<ConfigError> {
    config::typed::parse::<D::Config>(value)
        .map_or_else(|errors| errors, |config| D::check_attr(&config, attr))
}

fn build_plugin<D: Definition>(
    value: &Value,
    env: &BuildEnv<'_>,
    hooks: &mut Hooks,
) -> Result<(), Vec<ConfigError>> {
    D::build(parse_plugin::<D>(value)?, env, hooks).map_err(|error| vec![error])
}

/// Where plugins find other resources: upstreams of their own (`traffic-split`), definitions of services.
pub trait Upstreams {
    /// The upstream resource of that id; it lives on through its edits.
    ///
    /// # Errors
    /// There is none.
    fn by_id(&self, id: &str) -> Result<Arc<Cluster>, ConfigError>;

    /// An upstream written inline, kept over reloads under `name` while its owner keeps it.
    ///
    /// # Errors
    /// It cannot work as it is written.
    fn inline(&self, name: &str, upstream: &config::upstream::Upstream) -> Result<Arc<Cluster>, ConfigError>;

    /// The `plugin_metadata` of another plugin. Who reads it says so by [`Extras::reads_metadata`].
    fn metadata(&self, _plugin: &str) -> Option<Value> {
        None
    }

    /// The content of the proto resource with that id or name, if there is one.
    fn proto(&self, _name: &str) -> Option<String> {
        None
    }
}

/// What a plugin may use while it is built.
pub struct BuildEnv<'a> {
    /// The resource that holds the plugin.
    pub owner: &'a ResourceKey,
    /// The plugin's `plugin_metadata`, if there is any.
    pub metadata: Option<&'a Value>,
    /// The plugin's `plugin_attr` of `config.yaml`, if there is any.
    pub attr: Option<&'a Value>,
    /// Keeps state over reloads.
    pub carry: &'a Carry,
    /// The published consumers.
    pub consumers: &'a Consumers,
    /// What plugins offer under paths of their own.
    pub endpoints: &'a Endpoints,
    /// Upstreams.
    pub upstreams: &'a dyn Upstreams,
    /// Shared metrics.
    pub metrics: &'a Arc<crate::telemetry::metrics::Metrics>,
    /// The control runtime, for work that is not a request's.
    pub control: &'a tokio::runtime::Handle,
    /// Resolves names of services that the plugin asks.
    pub discovery: &'a discovery::Discovery,
    /// TLS to services that the plugin asks: the authorities of `ssl_trusted_certificate` or the system's.
    pub tls: &'a Arc<crate::upstream::tls_client::TlsClients>,
}

/// A phase step that may wait.
pub(crate) trait Waits: Send + Sync {
    fn run<'a>(&'a self, x: &'a mut Exchange) -> LocalBox<'a, Flow>;
}

struct RewriteErased<P>(Arc<P>);

impl<P: RewriteWaits> Waits for RewriteErased<P> {
    fn run<'a>(&'a self, x: &'a mut Exchange) -> LocalBox<'a, Flow> {
        Box::pin(self.0.rewrite(x))
    }
}

struct AccessErased<P>(Arc<P>);

impl<P: AccessWaits> Waits for AccessErased<P> {
    fn run<'a>(&'a self, x: &'a mut Exchange) -> LocalBox<'a, Flow> {
        Box::pin(self.0.access(x))
    }
}

struct RewriteNow<P>(Arc<P>);
struct AccessNow<P>(Arc<P>);

/// A phase step that never waits.
pub(crate) trait Now: Send + Sync {
    fn run(&self, x: &mut Exchange) -> Flow;
}

impl<P: Rewrite> Now for RewriteNow<P> {
    fn run(&self, x: &mut Exchange) -> Flow {
        self.0.rewrite(x)
    }
}

impl<P: Access> Now for AccessNow<P> {
    fn run(&self, x: &mut Exchange) -> Flow {
        self.0.access(x)
    }
}

/// A part around the upstream call, without its type.
pub(crate) trait Surrounds: Send + Sync {
    fn run(&self, x: Exchange, next: Next) -> LocalBox<'static, Result<Exchange, Fault>>;
}

struct AroundErased<P>(Arc<P>);

impl<P: Around> Surrounds for AroundErased<P> {
    fn run(&self, x: Exchange, next: Next) -> LocalBox<'static, Result<Exchange, Fault>> {
        let plugin = self.0.clone();
        Box::pin(async move { plugin.around(x, next).await })
    }
}

/// One plugin's part in `rewrite` or `access`.
#[derive(Clone)]
pub(crate) enum Step {
    Now(Arc<dyn Now>),
    Waits(Arc<dyn Waits>),
}

/// The `rewrite` of a plugin that another plugin runs.
pub struct Rewriting(Vec<Step>);

impl Rewriting {
    /// Runs it. It answers, or the request may go on.
    pub async fn run(&self, x: &mut Exchange) -> Flow {
        for step in &self.0 {
            let flow = match step {
                Step::Now(step) => step.run(x),
                Step::Waits(step) => step.run(x).await,
            };
            if let Flow::Reply(_) = flow {
                return flow;
            }
        }
        Flow::Next
    }
}

/// The phases that one plugin object takes part in. Filled by [`Definition::build`].
#[derive(Default)]
pub struct Hooks {
    pub(crate) rewrite: Vec<Step>,
    pub(crate) access: Vec<Step>,
    pub(crate) around: Vec<Arc<dyn Surrounds>>,
    pub(crate) before_proxy: Vec<Arc<dyn BeforeProxy>>,
    pub(crate) response: Vec<Arc<dyn OnResponse>>,
    pub(crate) body: Vec<Arc<dyn OnBody>>,
    pub(crate) encode: Vec<Arc<dyn Encode>>,
    pub(crate) hide: Vec<Arc<dyn Hide>>,
    pub(crate) log: Vec<Arc<dyn OnLog>>,
}

impl Hooks {
    /// Takes part in `rewrite`.
    pub fn rewrite<P: Rewrite>(&mut self, plugin: &Arc<P>) {
        self.rewrite.push(Step::Now(Arc::new(RewriteNow(plugin.clone()))));
    }

    /// Takes part in `rewrite` and may wait there.
    pub fn rewrite_waits<P: RewriteWaits>(&mut self, plugin: &Arc<P>) {
        self.rewrite.push(Step::Waits(Arc::new(RewriteErased(plugin.clone()))));
    }

    /// Takes part in `access`.
    pub fn access<P: Access>(&mut self, plugin: &Arc<P>) {
        self.access.push(Step::Now(Arc::new(AccessNow(plugin.clone()))));
    }

    /// Takes part in `access` and may wait there.
    pub fn access_waits<P: AccessWaits>(&mut self, plugin: &Arc<P>) {
        self.access.push(Step::Waits(Arc::new(AccessErased(plugin.clone()))));
    }

    /// Surrounds the upstream call.
    pub fn around<P: Around>(&mut self, plugin: &Arc<P>) {
        self.around.push(Arc::new(AroundErased(plugin.clone())));
    }

    /// Takes part in `before_proxy`.
    pub fn before_proxy<P: BeforeProxy>(&mut self, plugin: &Arc<P>) {
        self.before_proxy.push(plugin.clone());
    }

    /// Sees the head of every answer.
    pub fn response<P: OnResponse>(&mut self, plugin: &Arc<P>) {
        self.response.push(plugin.clone());
    }

    /// May filter the answer's body.
    pub fn body<P: OnBody>(&mut self, plugin: &Arc<P>) {
        self.body.push(plugin.clone());
    }

    /// Writes the finished answer for the client.
    pub fn encode<P: Encode>(&mut self, plugin: &Arc<P>) {
        self.encode.push(plugin.clone());
    }

    /// Takes out of the request what no log may tell.
    pub fn hide<P: Hide>(&mut self, plugin: &Arc<P>) {
        self.hide.push(plugin.clone());
    }

    /// Is told when all is over.
    pub fn log<P: OnLog>(&mut self, plugin: &Arc<P>) {
        self.log.push(plugin.clone());
    }

    /// The `rewrite` of a plugin, for another that runs it inside its own; nothing if it takes part in more.
    pub fn into_rewrite(self) -> Option<Rewriting> {
        (self.phases() == ["rewrite"]).then_some(Rewriting(self.rewrite))
    }

    /// Whether the plugin takes part in no phase, as one that is disabled.
    pub fn is_empty(&self) -> bool {
        self.phases().is_empty()
    }

    /// The phases, as `postern explain` and the plugin documentation name them.
    pub fn phases(&self) -> Vec<&'static str> {
        [
            ("rewrite", self.rewrite.is_empty()),
            ("access", self.access.is_empty()),
            ("around", self.around.is_empty()),
            ("before_proxy", self.before_proxy.is_empty()),
            ("header_filter", self.response.is_empty()),
            ("body_filter", self.body.is_empty()),
            ("encode", self.encode.is_empty()),
            ("log", self.log.is_empty() && self.hide.is_empty()),
        ]
        .into_iter()
        .filter_map(|(name, empty)| (!empty).then_some(name))
        .collect()
    }
}
