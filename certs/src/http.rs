//! The client that issuers are asked with over HTTP: Consul, Vault and the like.
//!
//! One deadline covers a whole question: name, connection, TLS, head and body. Answers are bounded, redirects are not
//! followed, and nothing is sent twice.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::codegen::Service;

use crate::grpc::chain;
use crate::outgoing;

/// Certificates and a few words; never more.
const MAX_BODY: usize = 1 << 20;
const CONNECT: Duration = Duration::from_secs(5);
/// Shorter than what servers and those between wait before they close.
const IDLE: Duration = Duration::from_secs(30);
/// How much of a refusal is told.
const MAX_WORDS: usize = 200;

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a URL of the form http(s)://host[:port][/path]")]
pub struct NoUrl(String);

/// There is no answer that can be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AskError {
    #[error("{server}: {problem}")]
    Failed { server: String, problem: String },
    #[error("{server}: no answer within {limit:?}")]
    TimedOut { server: String, limit: Duration },
    #[error("{server} answered {status}{words}")]
    Refused { server: String, status: StatusCode, words: String, retry_after: Option<Duration> },
}

impl AskError {
    /// How long the server wants to be left alone.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What the server answered, if it did.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// A server and the connections to it. Clones share them.
#[derive(Clone)]
pub struct Server {
    url: Arc<str>,
    client: Client<HttpsConnector<Tcp>, Full<Bytes>>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Server").field(&self.url).finish()
    }
}

impl Server {
    /// At `url`; what is asked stands below its path. `roots` are who its certificate may be from, where it is `https`.
    ///
    /// # Errors
    /// The URL is none.
    pub fn new(url: &str, roots: Arc<RootCertStore>) -> Result<Self, NoUrl> {
        let wrong = || NoUrl(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().map(http::uri::Authority::as_str).unwrap_or_default();
        let known = matches!(uri.scheme_str(), Some("http" | "https"));
        if !known || authority.is_empty() || authority.contains('@') || uri.query().is_some() {
            return Err(wrong());
        }
        let client = client(roots).map_err(|_| wrong())?;
        Ok(Self { url: url.trim_end_matches('/').into(), client })
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Asks and waits for the whole answer, which is a success.
    ///
    /// # Errors
    /// There is none in time, or another one.
    pub async fn ask(&self, question: Question<'_>) -> Result<Response<Bytes>, AskError> {
        let limit = question.deadline;
        match timeout(limit, self.exchange(question)).await {
            Ok(Ok(answer)) if answer.status().is_success() => Ok(answer),
            Ok(Ok(answer)) => Err(self.refused(&answer)),
            Ok(Err(problem)) => Err(AskError::Failed { server: self.url.to_string(), problem }),
            Err(_) => Err(AskError::TimedOut { server: self.url.to_string(), limit }),
        }
    }

    async fn exchange(&self, question: Question<'_>) -> Result<Response<Bytes>, String> {
        let mut request = Request::builder()
            .method(question.method)
            .uri(format!("{}{}", self.url, question.target))
            .body(Full::new(question.body))
            .map_err(|_| format!("`{}` is not a path", question.target))?;
        for (name, value) in question.headers {
            request.headers_mut().insert(name, value);
        }
        let answer = self.client.request(request).await.map_err(|error| chain(&error))?;
        let (head, body) = answer.into_parts();
        match Limited::new(body, MAX_BODY).collect().await {
            Ok(body) => Ok(Response::from_parts(head, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => {
                Err(format!("the answer is larger than {MAX_BODY} bytes"))
            }
            Err(error) => Err(chain(&*error)),
        }
    }

    fn refused(&self, answer: &Response<Bytes>) -> AskError {
        let text = String::from_utf8_lossy(answer.body().get(..MAX_WORDS).unwrap_or(answer.body()));
        let words: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let words = if words.trim().is_empty() { String::new() } else { format!(": {}", words.trim()) };
        let retry_after =
            answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        AskError::Refused {
            server: self.url.to_string(),
            status: answer.status(),
            words,
            retry_after: retry_after.map(Duration::from_secs),
        }
    }
}

/// A client that connects as everything of this process does and believes `roots`.
///
/// # Errors
/// The cryptographic library fails.
pub(crate) fn client<B>(roots: Arc<RootCertStore>) -> Result<Client<HttpsConnector<Tcp>, B>, rustls::Error>
where
    B: hyper::body::Body + Send,
    B::Data: Send,
{
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .wrap_connector(Tcp);
    Ok(Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(4)
        .retry_canceled_requests(true)
        .build(connector))
}

/// Connects as everything of this process does.
#[derive(Clone, Debug)]
pub(crate) struct Tcp;

impl Tcp {
    /// To the host and port of a URL.
    async fn connect(uri: &Uri) -> io::Result<TcpStream> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let stream = timeout(CONNECT, outgoing::connect_to((host, port))).await??;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Service<Uri> for Tcp {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(async move { Self::connect(&uri).await.map(TokioIo::new) })
    }
}

/// What is asked.
#[derive(Debug)]
pub struct Question<'a> {
    pub method: Method,
    /// Path and query, escaped.
    pub target: &'a str,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Bytes,
    /// For everything, from the connection to the last byte of the answer.
    pub deadline: Duration,
}

impl<'a> Question<'a> {
    /// A GET.
    #[must_use]
    pub fn get(target: &'a str, deadline: Duration) -> Self {
        Self { method: Method::GET, target, headers: Vec::new(), body: Bytes::new(), deadline }
    }

    /// A POST of JSON.
    #[must_use]
    pub fn post(target: &'a str, body: &serde_json::Value, deadline: Duration) -> Self {
        let headers = vec![(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        Self { method: Method::POST, target, headers, body: body.to_string().into(), deadline }
    }

    /// With one more header field.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: Option<HeaderValue>) -> Self {
        self.headers.extend(value.map(|value| (HeaderName::from_static(name), value)));
        self
    }
}
