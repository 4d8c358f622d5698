//! What tests of layers, plugins and roles need: exchanges, an inner service that answers at once, and the run of one
//! plugin around it.

#![allow(clippy::expect_used, reason = "tests")]

use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use config::error::ConfigError;
use config::id::{Kind, ResourceKey};
use discovery::Discovery;
use http::{HeaderValue, Request};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use serde_json::Value;
use tower::Service;

use crate::body::Body;
use crate::carry::Carry;
use crate::chain::{Instance, Plan, PluginChain, Source};
use crate::consumer::{Consumer, ConsumerTable, Consumers};
use crate::endpoint::{Endpoints, Offers};
use crate::error::{Error, Fault};
use crate::exchange::{Answered, Conn, Exchange, OwnDoor, OwnStack};
use crate::plugin::{BuildEnv, Definition, Extras, Hooks, Registration, Upstreams};
use crate::stack::Requests;
use crate::upstream::cluster::Cluster;
use crate::upstream::tls_client::TlsClients;

/// Starts an exchange for a test.
pub fn exchange(method: &str, uri: &str) -> ExchangeBuilder {
    let peer = SocketAddr::from(([127, 0, 0, 1], 40_000));
    ExchangeBuilder {
        request: Request::builder().method(method).uri(uri),
        body: Body::Empty,
        conn: Conn::plain(peer, SocketAddr::from(([127, 0, 0, 1], 9_080))),
    }
}

/// Builds an exchange for a test.
pub struct ExchangeBuilder {
    request: http::request::Builder,
    body: Body,
    conn: Conn,
}

impl ExchangeBuilder {
    /// Adds a header field.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.request = self.request.header(name, value);
        self
    }

    /// Sets the body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Body>) -> Self {
        self.body = body.into();
        self
    }

    /// Sets the client's address.
    #[must_use]
    pub fn peer(mut self, address: &str) -> Self {
        let ip = address.parse().expect("an IP address");
        self.conn = Conn::plain(SocketAddr::new(ip, 40_000), self.conn.local);
        self
    }

    /// Sets the stack that requests of plugins go through.
    #[must_use]
    pub fn stack(mut self, stack: Rc<dyn Requests>) -> Self {
        self.conn.stack = OwnStack(Some(stack));
        self
    }

    /// Sets what a role knows of the connection.
    #[must_use]
    pub fn door(mut self, door: OwnDoor) -> Self {
        self.conn.door = Some(door);
        self
    }

    /// Sets the version.
    #[must_use]
    pub fn version(mut self, version: http::Version) -> Self {
        self.request = self.request.version(version);
        self
    }

    /// The exchange as it comes from the connection: nothing is settled.
    pub fn raw(self) -> Exchange {
        let request = self.request.body(self.body).expect("a well-formed request");
        Exchange::new(request, Rc::new(self.conn))
    }

    /// The exchange, as the route look-up sees it: host and path are settled.
    pub fn build(self) -> Exchange {
        let request = self.request.body(self.body).expect("a well-formed request");
        let mut x = Exchange::new(request, Rc::new(self.conn));
        x.host = x.request.uri.host().unwrap_or("localhost").to_ascii_lowercase().into();
        x.port = x.request.uri.port_u16();
        x
    }
}

/// A service that answers at once by a function.
#[derive(Clone)]
pub struct ServiceFn<F>(F);

/// An inner service made of `answer`. It marks the exchange as answered by the upstream.
pub fn service<F>(answer: F) -> ServiceFn<F>
where
    F: Fn(&mut Exchange) -> Result<(), Error> + Clone + 'static,
{
    ServiceFn(answer)
}

impl<F> Service<Exchange> for ServiceFn<F>
where
    F: Fn(&mut Exchange) -> Result<(), Error> + Clone + 'static,
{
    type Response = Exchange;
    type Error = Fault;
    type Future = Ready<Result<Exchange, Fault>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        match (self.0)(&mut x) {
            Ok(()) => {
                x.answered = Answered::Upstream;
                ready(Ok(x))
            }
            Err(error) => ready(Err(Fault { exchange: x, error })),
        }
    }
}

/// Upstreams of a test: none by id; inline ones cannot be made.
struct NoUpstreams<'a>(&'a [(&'static str, &'static str)]);

impl Upstreams for NoUpstreams<'_> {
    fn by_id(&self, id: &str) -> Result<Arc<Cluster>, ConfigError> {
        Err(ConfigError::invalid("", format!("there is no upstream {id} in this test")))
    }

    fn inline(&self, name: &str, _: &config::upstream::Upstream) -> Result<Arc<Cluster>, ConfigError> {
        Err(ConfigError::invalid("", format!("{name}: there are no upstreams in this test")))
    }

    fn proto(&self, name: &str) -> Option<String> {
        self.0.iter().find(|(id, _)| *id == name).map(|(_, content)| (*content).to_owned())
    }
}

/// What plugins of a test are built with, and what they share.
#[derive(Default)]
pub struct TestEnv {
    /// Kept over "reloads" of one test.
    pub carry: Carry,
    /// Known consumers.
    pub consumers: Consumers,
    /// Endpoints of plugins.
    pub endpoints: Endpoints,
    /// The plugin's metadata.
    pub metadata: Option<Value>,
    /// Proto resources: id and content.
    pub protos: Vec<(&'static str, &'static str)>,
    /// The plugin's `plugin_attr`.
    pub attr: Option<Value>,
    /// Metrics.
    pub metrics: Arc<crate::telemetry::metrics::Metrics>,
    /// Authorities that servers are checked against.
    pub roots: Vec<CertificateDer<'static>>,
}

impl TestEnv {
    /// Gives `make` what a plugin of routes/1 is built with. Needs a tokio runtime.
    pub fn with<T>(&self, make: impl FnOnce(&BuildEnv<'_>) -> T) -> T {
        self.owned_by(&ResourceKey::new(Kind::Route, "1"), make)
    }

    fn owned_by<T>(&self, owner: &ResourceKey, make: impl FnOnce(&BuildEnv<'_>) -> T) -> T {
        let control = tokio::runtime::Handle::current();
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.roots.iter().cloned());
        make(&BuildEnv {
            owner,
            metadata: self.metadata.as_ref(),
            attr: self.attr.as_ref(),
            carry: &self.carry,
            consumers: &self.consumers,
            endpoints: &self.endpoints,
            upstreams: &NoUpstreams(&self.protos),
            metrics: &self.metrics,
            control: &control,
            discovery: &Discovery::new(control.clone(), discovery::Settings::default()),
            tls: &Arc::new(TlsClients::new(Arc::new(roots))),
        })
    }

    /// Builds `D` with these settings, as if routes/1 held it. Needs a tokio runtime.
    ///
    /// # Errors
    /// As the plugin says.
    pub fn build<D: Definition>(&self, config: &Value) -> Result<Instance, Vec<ConfigError>> {
        let mut hooks = Hooks::default();
        self.with(|env| (Registration::of::<D>().build)(config, env, &mut hooks))?;
        Ok(Instance {
            name: D::NAME,
            priority: D::PRIORITY,
            source: Source("routes/1".into()),
            filter: None,
            error_response: None,
            hooks,
        })
    }

    /// Publishes what `D` offers under paths of its own, as the only offers. Needs a tokio runtime.
    ///
    /// # Errors
    /// As the plugin says.
    pub fn offer<D: Definition>(&self) -> Result<(), ConfigError> {
        let owner = ResourceKey::new(Kind::PluginMetadata, D::NAME);
        let mut offers = Offers::default();
        self.owned_by(&owner, |env| D::offer(env, &mut offers))?;
        self.endpoints.publish(offers);
        Ok(())
    }

    /// A plugin chain of `D` around an upstream that answers 200 with the fields and body that `answer` sets.
    ///
    /// # Errors
    /// As the plugin says.
    pub fn chain<D: Definition, F>(&self, config: &Value, answer: F) -> Result<TestChain<F>, Vec<ConfigError>>
    where
        F: Fn(&mut Exchange) -> Result<(), Error> + Clone + 'static,
    {
        let plan = Arc::new(Plan::new(vec![Arc::new(self.build::<D>(config)?)]));
        Ok(TestChain { plan, chain: PluginChain::new(service(answer)) })
    }
}

/// One plugin around an upstream of a test.
pub struct TestChain<F> {
    plan: Arc<Plan>,
    chain: PluginChain<ServiceFn<F>>,
}

impl<F> TestChain<F>
where
    F: Fn(&mut Exchange) -> Result<(), Error> + Clone + 'static,
{
    /// Sends one exchange through the plugin. `before_proxy` runs too, as if a node had been chosen.
    pub async fn run(&mut self, mut x: Exchange) -> Exchange {
        x.plan = Some(self.plan.clone());
        match self.chain.call(x).await {
            Ok(x) => x,
            Err(fault) => fault.exchange,
        }
    }
}

/// Adds `consumer` to `table` with these settings of `D`, as the control side does.
///
/// # Errors
/// The settings are not right.
pub fn enrol<D: Definition>(
    table: &mut ConsumerTable,
    consumer: Consumer,
    settings: &Value,
) -> Result<(), Vec<ConfigError>> {
    let mut extras = Extras::default();
    D::extend(&mut extras);
    let settings = extras.check_consumer(settings).expect("a plugin that authenticates")?;
    let key = extras.consumer_key(&settings).expect("settings with a key");
    let verifier = extras.consumer_verifier(&settings);
    table.insert(D::NAME, &key, Arc::new(Consumer { auth: Arc::new(settings), verifier, ..consumer }));
    Ok(())
}

/// The text of a header field of the answer, empty where there is none.
pub fn field<'a>(x: &'a Exchange, name: &str) -> &'a str {
    x.response.headers().get(name).map(HeaderValue::to_str).and_then(Result::ok).unwrap_or_default()
}

/// The whole body of the answer.
pub async fn text(x: &mut Exchange) -> String {
    let bytes = x.response.body_mut().collect_up_to(1 << 20).await.expect("a readable body");
    String::from_utf8_lossy(&bytes).into_owned()
}
