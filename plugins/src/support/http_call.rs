//! Calls that plugins make: a small HTTP client, made when the configuration is compiled.
//!
//! A call runs on the control runtime, wherever it is waited for, so that connections belong to no worker; a worker
//! that stops waiting ends its call. Everything is bounded: calls at once, idle connections, the time to connect and
//! the whole time, the head and the body of the answer. Redirects are not followed. Plugins with equal settings share
//! one client and its connections.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use config::error::ConfigError;
use discovery::{Discovery, Endpoints, Node, Watch};
use http::{HeaderValue, Request, Response, Uri, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::TokioTimer;
use layers::plugin::BuildEnv;
use layers::upstream::tls_client::{Offer, TlsClients, TlsSettings};
use rustls::{ClientConfig, RootCertStore};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tower::Service;

/// Hosts whose addresses one client keeps fresh.
const MAX_HOSTS: usize = 64;
/// Idle connections to one server, whatever the settings ask for.
const MAX_POOL: usize = 1024;
/// The head of an answer, in bytes.
const MAX_HEAD: usize = 64 * 1024;
/// Header fields of an answer.
const MAX_FIELDS: usize = 128;

/// How a client behaves. Clients with equal settings are one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// Check the certificate of `https` servers.
    pub verify: bool,
    /// From the beginning of a call to the last byte of its answer.
    pub timeout: Duration,
    /// To a TCP connection.
    pub connect_timeout: Duration,
    /// Idle connections kept for each server; 0 closes a connection after its answer.
    pub pool: usize,
    /// How long a connection may be idle.
    pub idle: Duration,
    /// The largest body of an answer.
    pub max_body: usize,
    /// Calls at once; what is more fails at once.
    pub in_flight: usize,
    /// Speak HTTP/2 without asking first; otherwise only where TLS agrees on it.
    pub http2: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            verify: true,
            timeout: Duration::from_secs(3),
            connect_timeout: Duration::from_secs(3),
            pool: 5,
            idle: Duration::from_secs(60),
            max_body: 1 << 20,
            in_flight: 1024,
            http2: false,
        }
    }
}

impl Settings {
    /// As plugins of APISIX write them: times in milliseconds, and for connections that are kept how many and how
    /// long they may be idle.
    pub fn of(verify: bool, timeout: u32, keep: Option<(u32, u32)>) -> Self {
        let timeout = Duration::from_millis(timeout.into());
        let (pool, idle) = keep.unwrap_or((0, 1_000));
        Self {
            verify,
            timeout,
            connect_timeout: timeout,
            pool: usize::try_from(pool).unwrap_or(usize::MAX).min(MAX_POOL),
            idle: Duration::from_millis(idle.into()),
            ..Self::default()
        }
    }
}

/// Why a call has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// As many calls as the settings allow are on their way.
    #[error("too many calls are waiting for their answers")]
    Busy,
    /// No complete answer in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The body is larger than the settings allow.
    #[error("the body of the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// No connection, or one that broke.
    #[error("{0}")]
    Failed(Arc<str>),
}

impl CallError {
    fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        // The outermost words ("client error (Connect)") say the least.
        let mut words = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            words = format!("{words}: {inner}");
            source = inner.source();
        }
        Self::Failed(words.into())
    }
}

/// A client. Clones share connections.
#[derive(Clone)]
pub struct HttpClient(Arc<Inner>);

struct Inner {
    client: Client<HttpsConnector<HttpConnector<Resolver>>, Full<Bytes>>,
    control: Handle,
    settings: Settings,
    places: Arc<Semaphore>,
}

impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HttpClient").field(&self.0.settings).finish()
    }
}

impl HttpClient {
    /// The client of these settings.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(settings: &Settings, env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        let tls = client_config(settings, env.tls)?;
        let make = || Inner::new(settings.clone(), tls, env.discovery, env.control);
        Ok(Self(env.carry.get_or(&format!("http-call/{settings:?}"), make)))
    }

    /// A client for a part of the control side that is no plugin. It shares connections with its clones only.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn alone(
        settings: &Settings,
        tls: &TlsClients,
        discovery: &Discovery,
        control: &Handle,
    ) -> Result<Self, ConfigError> {
        let tls = client_config(settings, tls)?;
        Ok(Self(Arc::new(Inner::new(settings.clone(), tls, discovery, control))))
    }

    /// Sends `request`, whose URI is absolute, and returns the whole answer, whatever its status.
    ///
    /// # Errors
    /// There is no complete answer.
    pub async fn call(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, CallError> {
        let inner = self.0.clone();
        let place = inner.places.clone().try_acquire_owned().map_err(|_| CallError::Busy)?;
        request
            .headers_mut()
            .entry(header::USER_AGENT)
            .or_insert(const { HeaderValue::from_static("postern") });
        let limit = inner.settings.timeout;
        let call = async move {
            let _place = place;
            match tokio::time::timeout(limit, inner.exchange(request.map(Full::new))).await {
                Ok(outcome) => outcome,
                Err(_) => Err(CallError::TimedOut(limit)),
            }
        };
        let mut running = Ended(self.0.control.spawn(call));
        (&mut running.0).await.map_err(|error| CallError::Failed(error.to_string().into()))?
    }
}

impl Inner {
    fn new(settings: Settings, tls: ClientConfig, discovery: &Discovery, control: &Handle) -> Self {
        let resolver = Resolver(Arc::new(Names { discovery: discovery.clone(), watched: Mutex::default() }));
        let mut plain = HttpConnector::new_with_resolver(resolver);
        plain.enforce_http(false);
        plain.set_nodelay(true);
        plain.set_connect_timeout(Some(settings.connect_timeout.min(settings.timeout)));
        plain.set_keepalive(Some(Duration::from_secs(30)));
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .enable_http2()
            .wrap_connector(plain);
        let client = Client::builder(OnControl(control.clone()))
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(settings.idle)
            .pool_max_idle_per_host(settings.pool)
            .http1_max_buf_size(MAX_HEAD)
            .http1_max_headers(MAX_FIELDS)
            .http2_max_header_list_size(MAX_HEAD as u32)
            .http2_only(settings.http2)
            .build(connector);
        let places = Arc::new(Semaphore::new(settings.in_flight));
        Self { client, control: control.clone(), settings, places }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, CallError> {
        let response = self.client.request(request).await.map_err(|error| CallError::of(&error))?;
        let (head, body) = response.into_parts();
        match Limited::new(body, self.settings.max_body).collect().await {
            Ok(body) => Ok(Response::from_parts(head, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => Err(CallError::TooLarge(self.settings.max_body)),
            Err(error) => Err(CallError::of(&*error)),
        }
    }
}

fn client_config(settings: &Settings, tls: &TlsClients) -> Result<ClientConfig, ConfigError> {
    let wanted = TlsSettings {
        verify: settings.verify,
        authorities: Vec::new(),
        client: None,
        // The connector says what it offers: h2 and http/1.1.
        offer: Offer::Nothing,
    };
    match tls.config(&wanted) {
        Ok(tls) => Ok((*tls).clone()),
        // A system without authorities: plain calls work, and no certificate is good enough.
        Err(_) => nothing_trusted(),
    }
}

fn nothing_trusted() -> Result<ClientConfig, ConfigError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ConfigError::invalid("", error.to_string()))?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// An absolute `http` or `https` URL, checked when the configuration is compiled.
///
/// # Errors
/// It is something else. The error stands at `pointer`.
pub fn url(text: &str, pointer: &str) -> Result<Uri, ConfigError> {
    let parsed = Uri::try_from(text).ok();
    let fit = |uri: &Uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri
                .authority()
                .is_some_and(|authority| !authority.host().is_empty() && !authority.as_str().contains('@'))
    };
    parsed.filter(fit).ok_or_else(|| {
        ConfigError::invalid(
            pointer,
            format!("`{text}` is not a URL of the form http(s)://host[:port][/path]"),
        )
    })
}

/// Spawns the tasks of connections where they outlive workers.
#[derive(Clone)]
struct OnControl(Handle);

impl<F> hyper::rt::Executor<F> for OnControl
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// A call that ends when nobody waits for it.
struct Ended<T>(JoinHandle<T>);

impl<T> Drop for Ended<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Asks the names that the gateway follows anyway: last good addresses, resolved in the background.
#[derive(Clone)]
struct Resolver(Arc<Names>);

struct Names {
    discovery: Discovery,
    watched: Mutex<HashMap<Box<str>, Watch>>,
}

impl Names {
    fn watch(&self, name: &str) -> Watch {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watch) = watched.get(name) {
            return watch.clone();
        }
        if watched.len() >= MAX_HOSTS {
            watched.clear();
        }
        let watch =
            self.discovery.watch_nodes(&[Node { host: name.into(), port: 0, weight: 1, priority: 0 }], None);
        watched.insert(name.into(), watch.clone());
        watch
    }
}

async fn addresses(mut watch: Watch) -> Result<std::vec::IntoIter<SocketAddr>, io::Error> {
    let found = watch
        .wait_for(|endpoints: &Arc<Endpoints>| endpoints.settled())
        .await
        .map_err(|_| io::Error::other("names are not resolved any more"))?
        .clone();
    if found.list.is_empty() {
        let reason = found.failures.first().map_or("no address", |failure| &failure.reason);
        return Err(io::Error::new(io::ErrorKind::NotFound, reason.to_owned()));
    }
    let mut list: Vec<_> = found.list.iter().map(|endpoint| endpoint.addr).collect();
    // The list is sorted; each call begins elsewhere.
    let start = fastrand::usize(..list.len());
    list.rotate_left(start);
    Ok(list.into_iter())
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(addresses(self.0.watch(name.as_str())))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use layers::testing::TestEnv;

    use super::*;
    use crate::support::peer::{self, Peer};

    /// A client of these settings, by way of a plugin's build.
    fn client(env: &TestEnv, settings: &Settings) -> HttpClient {
        env.with(|env| HttpClient::new(settings, env)).unwrap()
    }

    fn get(uri: &str) -> Request<Bytes> {
        Request::get(uri).body(Bytes::new()).unwrap()
    }

    #[tokio::test]
    async fn connections_are_kept_unless_the_settings_say_otherwise() {
        for (pool, connections) in [(5, 1), (0, 3)] {
            let peer = Peer::start(|request| {
                Response::new(format!("{} {}", request.method(), request.uri().path()).into())
            })
            .await;
            let client = client(&TestEnv::default(), &Settings { pool, ..Settings::default() });
            for _ in 0..3 {
                let answer = client.call(get(&peer.url("/a"))).await.unwrap();
                assert_eq!(&**answer.body(), b"GET /a");
            }
            assert_eq!(peer.connections(), connections, "pool of {pool}");
        }
    }

    #[tokio::test]
    async fn a_name_is_resolved_and_a_name_that_is_none_fails() {
        let peer = Peer::start(|_| Response::default()).await;
        let client = client(&TestEnv::default(), &Settings::default());
        let url = format!("http://localhost:{}/", peer.address.port());
        assert_eq!(client.call(get(&url)).await.unwrap().status(), 200);
        let error = client.call(get("http://nowhere.invalid/")).await.unwrap_err();
        assert!(matches!(error, CallError::Failed(_)), "{error:?}");
    }

    #[tokio::test]
    async fn what_takes_too_long_or_is_too_large_fails() {
        let slow = Settings { timeout: Duration::from_millis(50), ..Settings::default() };
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", silent.local_addr().unwrap());
        let error = client(&TestEnv::default(), &slow).call(get(&url)).await.unwrap_err();
        assert!(matches!(error, CallError::TimedOut(_)), "{error:?}");

        let peer = Peer::start(|_| Response::new("x".repeat(11).into())).await;
        for (max_body, fits) in [(11, true), (10, false)] {
            let small = Settings { max_body, ..Settings::default() };
            let outcome = client(&TestEnv::default(), &small).call(get(&peer.url("/"))).await;
            match outcome {
                Ok(_) => assert!(fits),
                Err(error) => assert!(!fits && matches!(error, CallError::TooLarge(10)), "{error:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_call_beyond_the_bound_fails_at_once_and_one_that_is_given_up_frees_its_place() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", silent.local_addr().unwrap());
        let one = Settings { in_flight: 1, timeout: Duration::from_secs(60), ..Settings::default() };
        let client = client(&TestEnv::default(), &one);
        let mut first = Box::pin(client.call(get(&url)));
        assert!(futures_poll(&mut first).await.is_none());
        assert!(matches!(client.call(get(&url)).await, Err(CallError::Busy)));
        drop(first);
        let freed = async {
            while client.0.places.available_permits() == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), freed).await.unwrap();
    }

    /// Polls once.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        std::future::poll_fn(|cx| match Pin::new(&mut *future).poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }

    #[tokio::test]
    async fn certificates_are_checked_unless_the_settings_say_otherwise() {
        let peer = Peer::start_tls(|request| Response::new(format!("{:?}", request.version()).into())).await;
        let trusting = TestEnv { roots: peer.roots(), ..TestEnv::default() };
        let unverified = Settings { verify: false, ..Settings::default() };
        let url = format!("https://localhost:{}/", peer.address.port());
        let answer = client(&trusting, &Settings::default()).call(get(&url)).await.unwrap();
        assert_eq!(&**answer.body(), b"HTTP/2.0");
        let answer = client(&TestEnv::default(), &unverified).call(get(&url)).await.unwrap();
        assert_eq!(answer.status(), 200);
        let by_address = peer.url("/");
        for (env, url) in [(&TestEnv::default(), &url), (&trusting, &by_address)] {
            let error = client(env, &Settings::default()).call(get(url)).await.unwrap_err();
            assert!(error.to_string().contains("certificate"), "{error}");
        }
    }

    #[test]
    fn a_connection_belongs_to_no_worker() {
        let control = peer::runtime();
        let count = Arc::new(AtomicUsize::new(0));
        let seen = count.clone();
        let peer = control.block_on(Peer::start(move |_| {
            seen.fetch_add(1, Ordering::SeqCst);
            Response::default()
        }));
        let guard = control.enter();
        let client = client(&TestEnv::default(), &Settings::default());
        drop(guard);
        for _ in 0..2 {
            // A worker that comes and goes.
            let worker = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            worker.block_on(client.call(get(&peer.url("/")))).unwrap();
        }
        assert_eq!((count.load(Ordering::SeqCst), peer.connections()), (2, 1));
    }

    #[tokio::test]
    async fn equal_settings_are_one_client() {
        let env = TestEnv::default();
        let [a, b] = [(); 2].map(|()| client(&env, &Settings::default()));
        assert!(Arc::ptr_eq(&a.0, &b.0));
        let other = client(&env, &Settings { pool: 1, ..Settings::default() });
        assert!(!Arc::ptr_eq(&a.0, &other.0));
    }

    #[test]
    fn urls_are_absolute() {
        for (text, fit) in [
            ("http://a", true),
            ("https://a:1/b?c", true),
            ("http://[::1]:1/", true),
            ("a", false),
            ("/a", false),
            ("ftp://a/", false),
            ("http://", false),
            ("http://u:p@a/", false),
        ] {
            assert_eq!(url(text, "/uri").is_ok(), fit, "{text}");
        }
        assert_eq!(url("", "/uri").unwrap_err().pointer, "/uri");
    }
}
