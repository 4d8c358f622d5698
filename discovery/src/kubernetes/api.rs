//! Speaks to one API server: where it is, who asks, and bounded questions.
//!
//! The client is that of the crate `kube`, which knows kubeconfig files, credentials and certificates. A token file is read
//! for each request, because a pod's token is replaced every hour; the client is made again when credentials were
//! refused or have been in use for a while. Nothing is repeated here but a request whose credentials have just changed.

use certs::grpc::chain;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use config::discovery::kubernetes::{Cluster, Scheme, variable};
use config::sensitive::Sensitive;
use http::header::{ACCEPT, AUTHORIZATION, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::time::timeout;

use super::objects::Status;
use crate::source::SourceError;

/// Where a pod finds what belongs to its service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// How long the same client is used: certificates and kubeconfig files are replaced on disk.
const CLIENT_LIFE: Duration = Duration::from_secs(300);
/// A dead peer is noticed after 30 seconds and three unanswered probes.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
const CONNECT: Duration = Duration::from_secs(5);
/// Of an answer that says what is wrong.
const LONGEST_STATUS: usize = 64 * 1024;

/// One API server.
pub(super) struct Api {
    access: Access,
    /// Until when an answer has to begin, and each further piece of it has to come.
    pub(super) patience: Duration,
    client: Mutex<Option<(kube::Client, Instant)>>,
}

/// How it is found and what it is shown.
#[derive(Debug)]
enum Access {
    Kubeconfig {
        file: PathBuf,
        context: Option<String>,
    },
    Direct {
        uri: Uri,
        token: Token,
        identity: Option<(String, String)>,
        ca_file: Option<PathBuf>,
        verify: bool,
    },
}

#[derive(Debug)]
enum Token {
    None,
    Fixed(Sensitive<1, 16_384>),
    File(PathBuf),
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum ApiError {
    /// What was known of the place in the history of changes is too old, or from another history.
    Expired,
    /// There are no objects of this kind.
    Missing,
    /// Everything else.
    Failed(SourceError),
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("access", &self.access).finish_non_exhaustive()
    }
}

impl Api {
    /// Settles where the API server is; `env` gives variables of the environment.
    pub(super) fn new(cluster: &Cluster, env: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let access = Access::new(cluster, &env)?;
        let patience = Duration::from_secs(cluster.request_timeout_seconds.max(1));
        Ok(Self { access, patience, client: Mutex::new(None) })
    }

    /// What to call it in messages.
    pub(super) fn address(&self) -> String {
        match &self.access {
            Access::Kubeconfig { file, .. } => file.display().to_string(),
            Access::Direct { uri, .. } => uri.authority().map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// A GET, answered with 200; the body has not been read yet.
    pub(super) async fn get(&self, path: &str) -> Result<Body, ApiError> {
        let token = self.token().await?;
        let (status, head, body) = self.ask(path, token.as_ref()).await?;
        if status != StatusCode::UNAUTHORIZED {
            return self.judge(status, &head, body).await;
        }
        // Credentials are replaced on disk before the old ones end, and yet somebody has to be the first to notice.
        self.forget();
        let again = self.token().await?;
        if again == token && !matches!(self.access, Access::Kubeconfig { .. }) {
            return self.judge(status, &head, body).await;
        }
        let (status, head, body) = self.ask(path, again.as_ref()).await?;
        self.judge(status, &head, body).await
    }

    /// Reads a whole body of at most `limit` bytes, each piece of it in time.
    pub(super) async fn read(&self, mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.piece(&mut body, self.patience).await? {
            if bytes.len() + chunk.len() > limit {
                return Err(self.failed(format!("the answer is longer than {limit} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// The next piece of a body; none at its end.
    pub(super) async fn piece(&self, body: &mut Body, patience: Duration) -> Result<Option<Bytes>, ApiError> {
        loop {
            let frame = timeout(patience, body.frame()).await;
            match frame {
                Err(_) => return Err(self.failed(format!("nothing came for {} s", patience.as_secs_f32()))),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => {
                    return Err(self.failed(format!("the answer broke off: {}", chain(&error))));
                }
                Ok(Some(Ok(frame))) => {
                    if let Ok(chunk) = frame.into_data() {
                        return Ok(Some(chunk));
                    }
                }
            }
        }
    }

    pub(super) fn failed(&self, problem: impl fmt::Display) -> ApiError {
        ApiError::Failed(SourceError::new(format!("API server {}: {problem}", self.address())))
    }

    async fn ask(
        &self,
        path: &str,
        token: Option<&Sensitive<1, 16_384>>,
    ) -> Result<(StatusCode, HeaderMap, Body), ApiError> {
        let agent = concat!("postern/", env!("CARGO_PKG_VERSION"));
        let mut request = Request::get(path)
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, agent)
            .body(Body::empty())
            .map_err(|error| self.failed(error))?;
        if let Some(token) = token {
            let value = HeaderValue::try_from(format!("Bearer {}", token.reveal()));
            let mut value = value.map_err(|_| self.failed("the token has characters that no token has"))?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let client = self.client().await?;
        match timeout(self.patience, client.send(request)).await {
            Err(_) => Err(self.failed(format!("no answer within {} s", self.patience.as_secs_f32()))),
            Ok(Err(error)) => Err(self.failed(chain(&error))),
            Ok(Ok(response)) => {
                let (head, body) = response.into_parts();
                Ok((head.status, head.headers, body))
            }
        }
    }

    async fn judge(&self, status: StatusCode, head: &HeaderMap, body: Body) -> Result<Body, ApiError> {
        if status == StatusCode::OK {
            return Ok(body);
        }
        let text = self.read(body, LONGEST_STATUS).await.unwrap_or_default();
        let said: Status = serde_json::from_slice(&text).unwrap_or_default();
        let seconds = head.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        Err(self.refusal(status.as_u16(), &said, seconds))
    }

    /// What a `Status` means, in an answer or in a watch.
    pub(super) fn refusal(&self, code: u16, said: &Status, retry_after: Option<u64>) -> ApiError {
        // A server that was restored from a backup knows less than was read from it before, and says so in this way.
        let ahead = said.message.contains("Too large resource version");
        match code {
            410 => return ApiError::Expired,
            404 => return ApiError::Missing,
            _ if ahead => return ApiError::Expired,
            _ => {}
        }
        let said_of_it = if said.message.is_empty() { &said.reason } else { &said.message };
        let hint = match code {
            401 => ": the token is not accepted",
            403 => {
                ": the rights are missing (get, list and watch, see the documentation of discovery by Kubernetes)"
            }
            _ => "",
        };
        let separator = if said_of_it.is_empty() { "" } else { ": " };
        let reason = format!("API server {}: {code}{hint}{separator}{said_of_it}", self.address());
        let details = said.details.as_ref().and_then(|details| details.retry_after_seconds);
        let retry_after = retry_after.or(details).filter(|seconds| *seconds > 0);
        let retry_after = retry_after.map(|seconds| Duration::from_secs(seconds.min(60)));
        ApiError::Failed(SourceError { reason: reason.into(), retry_after })
    }

    async fn token(&self) -> Result<Option<Sensitive<1, 16_384>>, ApiError> {
        let Access::Direct { token, .. } = &self.access else { return Ok(None) };
        match token {
            Token::None => Ok(None),
            Token::Fixed(token) => Ok(Some(token.clone())),
            Token::File(file) => {
                let text = tokio::fs::read_to_string(file).await;
                let text =
                    text.map_err(|error| self.failed(format!("token file {}: {error}", file.display())))?;
                let token = Sensitive::new(text.trim());
                token
                    .map(Some)
                    .ok_or_else(|| self.failed(format!("token file {}: empty or too long", file.display())))
            }
        }
    }

    /// Gives up its connections and what it has read of credentials.
    pub(super) fn forget(&self) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    async fn client(&self) -> Result<kube::Client, ApiError> {
        if let Some((client, made)) = &*self.client.lock().unwrap_or_else(PoisonError::into_inner)
            && made.elapsed() < CLIENT_LIFE
        {
            return Ok(client.clone());
        }
        let recipe = self.access.recipe();
        let runtime = tokio::runtime::Handle::current();
        // Reads files, and runs the command of a kubeconfig file that gives credentials.
        let made = tokio::task::spawn_blocking(move || runtime.block_on(recipe.client())).await;
        let client = made.map_err(|error| self.failed(error))?.map_err(|problem| self.failed(problem))?;
        let entry = Some((client.clone(), Instant::now()));
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = entry;
        Ok(client)
    }
}

impl Access {
    fn new(cluster: &Cluster, env: &impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let context = cluster.context.clone();
        if let Some(file) = &cluster.kubeconfig {
            return Ok(Self::Kubeconfig { file: file.clone(), context });
        }
        let set = |name: &str| env(name).filter(|value| !value.is_empty());
        let of_pod = cluster.service.is_none();
        if of_pod
            && set("KUBERNETES_SERVICE_HOST").is_none()
            && let Some(file) = set("KUBECONFIG")
        {
            return Ok(Self::Kubeconfig { file: file.into(), context });
        }
        let expand = |text: &str| match variable(text) {
            Some(name) => set(name).ok_or_else(|| {
                format!("the variable {name} is not set: not in a pod? Write `service`, or `kubeconfig`")
            }),
            None => Ok(text.to_owned()),
        };
        let server = cluster.service.clone().unwrap_or_else(|| config::discovery::kubernetes::ApiServer {
            host: "${KUBERNETES_SERVICE_HOST}".to_owned(),
            ..Default::default()
        });
        let (host, port) = (expand(&server.host)?, expand(&server.port.0)?);
        let scheme = match server.schema {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let host = if bare.contains(':') { format!("[{bare}]") } else { bare.to_owned() };
        let uri = format!("{scheme}://{host}:{port}");
        let uri = uri.parse().map_err(|error| format!("{uri}: {error}"))?;

        let client = &cluster.client;
        let identity = client.cert_file.clone().zip(client.key_file.clone());
        let token = match (&client.token, &client.token_file) {
            (Some(token), _) => {
                let token = expand(token.reveal())?;
                Token::Fixed(Sensitive::new(&token).ok_or("client/token: empty or too long")?)
            }
            (None, Some(file)) => Token::File(expand(file)?.into()),
            (None, None) if identity.is_some() => Token::None,
            // A server that speaks HTTP is a local proxy that has the credentials itself.
            (None, None) if server.schema == Scheme::Http => Token::None,
            (None, None) => Token::File(Path::new(SERVICE_ACCOUNT).join("token")),
        };
        let of_account = Path::new(SERVICE_ACCOUNT).join("ca.crt");
        let ca_file = match &client.ca_file {
            Some(file) => Some(expand(file)?.into()),
            None => of_account.exists().then_some(of_account),
        };
        Ok(Self::Direct { uri, token, identity, ca_file, verify: client.ssl_verify })
    }

    fn recipe(&self) -> Recipe {
        match self {
            Self::Kubeconfig { file, context } => {
                Recipe::Kubeconfig { file: file.clone(), context: context.clone() }
            }
            Self::Direct { uri, identity, ca_file, verify, .. } => {
                let mut config = kube::Config::new(uri.clone());
                config.accept_invalid_certs = !verify;
                config.root_cert_file.clone_from(ca_file);
                if let Some((certificate, key)) = identity.clone() {
                    config.auth_info.client_certificate = Some(certificate);
                    config.auth_info.client_key = Some(key);
                }
                Recipe::Direct(Box::new(config))
            }
        }
    }
}

/// What a client is made from.
enum Recipe {
    Kubeconfig { file: PathBuf, context: Option<String> },
    Direct(Box<kube::Config>),
}

impl Recipe {
    async fn client(self) -> Result<kube::Client, String> {
        let config = match self {
            Self::Direct(config) => *config,
            Self::Kubeconfig { file, context } => {
                let read = Kubeconfig::read_from(&file).map_err(|error| chain(&error))?;
                let options = KubeConfigOptions { context, ..KubeConfigOptions::default() };
                kube::Config::from_custom_kubeconfig(read, &options).await.map_err(|error| chain(&error))?
            }
        };
        if config.proxy_url.is_some() {
            return Err("`proxy-url` of a kubeconfig file is not supported: take it out, or ask a discovery server that \
                        reaches the API server without it (`discovery.postern`)"
                .to_owned());
        }
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        tcp.set_keepalive_retries(Some(KEEPALIVE_PROBES));
        let tls = config.rustls_https_connector_with_connector(tcp).map_err(|error| chain(&error))?;
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(1)
            .build::<_, Body>(tls);
        let stack = tower::ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer().map_err(|error| chain(&error))?)
            .layer(config.extra_headers_layer().map_err(|error| chain(&error))?)
            .map_err(tower::BoxError::from)
            .service(client);
        Ok(kube::Client::new(stack, config.default_namespace))
    }
}
