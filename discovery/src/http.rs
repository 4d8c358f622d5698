//! The HTTP/1 client that registries are asked with.
//!
//! A [`Server`] is where a registry is and how it is spoken to. Everybody who asks it has a [`Connection`] of his own, so
//! that a question that waits a minute for a change holds up nobody else; a connection that waits costs a few kilobytes,
//! for there may be thousands. One deadline covers a whole question: name, connection, TLS, head and body. Redirects are
//! not followed, and nothing is repeated except what was never sent because a kept connection had ended.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use certs::files;
use certs::unverified::Unverified;
use config::discovery::tls::RegistryTls;
use http::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST, RETRY_AFTER, USER_AGENT};
use http::response::Parts;
use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use crate::SourceError;

/// What a connection reads at once, and the longest head of an answer.
const READ: usize = 8 * 1024;
/// Header fields of an answer.
const MAX_FIELDS: usize = 100;
/// How much of the body of a refusal is told.
const MAX_WORDS: usize = 200;
/// Connections that are opened at the same time share the look-up of a name and the reading of a file this long.
const SHARED: Duration = Duration::from_secs(1);
/// How old a TLS configuration may be before its files are read again for a new connection.
const TLS_AGE: Duration = Duration::from_secs(10);

/// How a server is spoken to.
#[derive(Clone, Debug)]
pub struct Options {
    /// To a connection, its TLS handshake included.
    pub connect: Duration,
    /// The largest body of an answer.
    pub max_body: usize,
    /// Fields of every question.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// A field whose value stands in a file, which may be written anew at any time.
    pub secret: Option<SecretFile>,
    /// For `https`.
    pub tls: Tls,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(2),
            max_body: 16 << 20,
            headers: Vec::new(),
            secret: None,
            tls: Tls::default(),
        }
    }
}

/// A field whose value is read from a file.
#[derive(Clone, Debug)]
pub struct SecretFile {
    pub field: HeaderName,
    /// What stands before the value: `Bearer `.
    pub scheme: &'static str,
    pub path: PathBuf,
}

/// TLS to a server. The files are read again for new connections.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Authorities in PEM; none means those of the system.
    pub ca: Option<PathBuf>,
    /// The client's certificate and its key in PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in the server's certificate, where it is not the host.
    pub server_name: Option<String>,
    /// Check the server's certificate.
    pub verify: bool,
}

impl From<&RegistryTls> for Tls {
    fn from(written: &RegistryTls) -> Self {
        Self {
            ca: written.ca_file.clone(),
            identity: written.cert_file.clone().zip(written.key_file.clone()),
            server_name: written.server_name.clone(),
            verify: written.verify,
        }
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self { ca: None, identity: None, server_name: None, verify: true }
    }
}

/// One server and how it is spoken to.
pub struct Server {
    name: Box<str>,
    host: Box<str>,
    port: u16,
    /// The path of the URL, without a slash at its end.
    path: Box<str>,
    authority: HeaderValue,
    options: Options,
    tls: Option<Encryption>,
    addresses: Mutex<Option<(Instant, Arc<[SocketAddr]>)>>,
    secret: Mutex<Option<(Instant, HeaderValue)>>,
}

struct Encryption {
    name: ServerName<'static>,
    config: Mutex<(Instant, Arc<ClientConfig>)>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Server").field(&self.name).finish()
    }
}

impl Server {
    /// The server at `url`: `http(s)://[user:password@]host[:port][/path]`. Reads the files of TLS.
    ///
    /// # Errors
    /// The URL is of another form, or a file does not hold what it should. No credential is told.
    pub fn new(url: &str, mut options: Options) -> Result<Arc<Server>, String> {
        let form = || {
            let shown = url.rsplit_once('@').map_or(url, |(_, rest)| rest);
            format!("`{shown}` is not a URL of the form http(s)://host[:port]")
        };
        let uri: Uri = url.parse().map_err(|_| form())?;
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else { return Err(form()) };
        let https = *scheme == Scheme::HTTPS;
        if !(https || *scheme == Scheme::HTTP) || uri.query().is_some() || authority.host().is_empty() {
            return Err(form());
        }
        if let Some(credentials) = credentials(authority) {
            options.headers.push((AUTHORIZATION, credentials));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = authority.port_u16().unwrap_or(if https { 443 } else { 80 });
        let bare = authority.as_str().rsplit_once('@').map_or(authority.as_str(), |(_, rest)| rest);
        let tls = match https {
            false => None,
            true => {
                let name = options.tls.server_name.as_deref().unwrap_or(host);
                let name = ServerName::try_from(name.to_owned())
                    .map_err(|_| format!("`{name}` is not a name that a certificate can have"))?;
                Some(Encryption { name, config: Mutex::new((Instant::now(), client_config(&options.tls)?)) })
            }
        };
        Ok(Arc::new(Server {
            name: format!("{scheme}://{bare}").into(),
            host: host.into(),
            port,
            path: uri.path().trim_end_matches('/').into(),
            authority: HeaderValue::from_str(bare).map_err(|_| form())?,
            options,
            tls,
            addresses: Mutex::default(),
            secret: Mutex::default(),
        }))
    }

    /// `scheme://host:port` as it is configured, without credentials.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The same service on another machine: same scheme, port, path and credentials.
    ///
    /// # Errors
    /// `host` is no host.
    pub fn beside(&self, host: &str) -> Result<Arc<Server>, String> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let brackets = if host.contains(':') { ("[", "]") } else { ("", "") };
        let url = format!("{scheme}://{}{host}{}:{}{}", brackets.0, brackets.1, self.port, self.path);
        Server::new(&url, self.options.clone())
    }

    /// A connection that is opened by its first question.
    pub fn connection(self: &Arc<Self>) -> Connection {
        Connection { server: Arc::clone(self), kept: None, was_ended: false }
    }

    fn error(&self, problem: &Problem) -> AskError {
        let timed_out = matches!(problem, Problem::Silent(_) | Problem::Slow(_));
        AskError { server: self.name.clone(), reason: problem.to_string().into(), timed_out }
    }

    async fn request(&self, question: &Question<'_>) -> Result<Request<Full<Bytes>>, Problem> {
        let target = format!("{}{}", self.path, question.target);
        let target = Uri::try_from(target).map_err(|_| Problem::Target(question.target.into()))?;
        let mut request = Request::new(Full::new(question.body.clone()));
        *request.method_mut() = question.method.clone();
        *request.uri_mut() = target;
        let fields = request.headers_mut();
        fields.insert(HOST, self.authority.clone());
        fields.insert(USER_AGENT, const { HeaderValue::from_static("postern") });
        for (name, value) in self.options.headers.iter().chain(question.headers) {
            fields.insert(name, value.clone());
        }
        if let Some(secret) = &self.options.secret {
            fields.insert(&secret.field, self.secret(secret).await?);
        }
        Ok(request)
    }

    /// The value in the file; the one before while the file cannot be read, for it may still be good. An empty one is being
    /// written: without a token registries answer as well, that there is nothing.
    async fn secret(&self, file: &SecretFile) -> Result<HeaderValue, Problem> {
        let mut known = self.secret.lock().await;
        if let Some((since, value)) = &*known
            && since.elapsed() < SHARED
        {
            return Ok(value.clone());
        }
        let read = match tokio::fs::read_to_string(&file.path).await {
            Ok(text) if text.trim().is_empty() => Err("is empty".into()),
            Ok(text) => Ok(text),
            Err(error) => Err(error.to_string().into()),
        };
        let value = match read {
            Ok(text) => {
                let mut value =
                    HeaderValue::try_from(format!("{}{}", file.scheme, text.trim())).map_err(|_| {
                        Problem::Secret(file.path.clone(), "holds what no header can carry".into())
                    })?;
                value.set_sensitive(true);
                value
            }
            Err(why) => match known.take() {
                Some((_, value)) => value,
                None => return Err(Problem::Secret(file.path.clone(), why)),
            },
        };
        *known = Some((Instant::now(), value.clone()));
        Ok(value)
    }

    async fn addresses(&self) -> Result<Arc<[SocketAddr]>, Problem> {
        let mut known = self.addresses.lock().await;
        if let Some((since, addresses)) = &*known
            && since.elapsed() < SHARED
        {
            return Ok(Arc::clone(addresses));
        }
        let found = tokio::net::lookup_host((&*self.host, self.port)).await;
        let addresses: Arc<[_]> = found.map_err(Problem::Name)?.collect();
        *known = Some((Instant::now(), Arc::clone(&addresses)));
        Ok(addresses)
    }

    async fn connect(&self) -> Result<Kept, Problem> {
        let limit = self.options.connect;
        timeout(limit, self.open()).await.unwrap_or(Err(Problem::Slow(limit)))
    }

    async fn open(&self) -> Result<Kept, Problem> {
        let mut failure = None;
        for address in self.addresses().await?.iter() {
            match certs::outgoing::connect(*address).await {
                Ok(stream) => return self.shake(stream).await,
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.map_or(Problem::Nowhere, Problem::Refused))
    }

    async fn shake(&self, stream: TcpStream) -> Result<Kept, Problem> {
        let _ = stream.set_nodelay(true);
        // A peer that is gone without a word is noticed before the deadline of a question that waits.
        let probes =
            TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(5));
        let _ = SockRef::from(&stream).set_tcp_keepalive(&probes.with_retries(3));
        let Some(tls) = &self.tls else { return Kept::new(stream).await };
        let config = tls.config(&self.options.tls).await;
        let stream = TlsConnector::from(config).connect(tls.name.clone(), stream).await;
        Kept::new(stream.map_err(Problem::Tls)?).await
    }
}

impl Encryption {
    /// Made again from its files from time to time, for certificates are renewed. While they cannot be read the one before
    /// is as good as it was.
    async fn config(&self, tls: &Tls) -> Arc<ClientConfig> {
        let mut known = self.config.lock().await;
        if known.0.elapsed() >= TLS_AGE {
            let tls = tls.clone();
            match tokio::task::spawn_blocking(move || client_config(&tls)).await {
                Ok(Ok(config)) => known.1 = config,
                Ok(Err(reason)) => {
                    tracing::warn!(reason, "the certificates for a registry were not read again")
                }
                Err(_) => {}
            }
            known.0 = Instant::now();
        }
        Arc::clone(&known.1)
    }
}

fn client_config(tls: &Tls) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = if tls.verify {
        let roots: Result<Arc<RootCertStore>, _> =
            tls.ca.as_deref().map_or_else(files::system_roots, files::trusted_roots);
        let roots = roots.map_err(|error| error.to_string())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider).build();
        builder.with_webpki_verifier(verifier.map_err(|error| error.to_string())?)
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified(provider)))
    };
    let mut config = match &tls.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = files::certificates(certificate).map_err(|error| error.to_string())?;
            let key = files::private_key(key).map_err(|error| error.to_string())?;
            builder.with_client_auth_cert(chain, key).map_err(|error| error.to_string())?
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// `user:password@` of a URL as a header field.
fn credentials(authority: &Authority) -> Option<HeaderValue> {
    let (pair, _) = authority.as_str().rsplit_once('@')?;
    let pair: Vec<u8> = percent_decode_str(pair).collect();
    let mut value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(pair))).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    pub method: Method,
    /// Path and query, escaped; below the path of the server's URL.
    pub target: &'a str,
    pub headers: &'a [(HeaderName, HeaderValue)],
    pub body: Bytes,
    /// For everything, from the connection to the last byte of the answer.
    pub deadline: Duration,
}

impl<'a> Question<'a> {
    pub fn get(target: &'a str, deadline: Duration) -> Self {
        Self { method: Method::GET, target, headers: &[], body: Bytes::new(), deadline }
    }

    pub fn put(target: &'a str, body: impl Into<Bytes>, deadline: Duration) -> Self {
        Self { method: Method::PUT, body: body.into(), ..Self::get(target, deadline) }
    }
}

/// A whole answer, whatever its status.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// The value of a field, where it is text.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// How long the server wants to be left alone: `Retry-After` in seconds or as a date.
    pub fn retry_after(&self) -> Option<Duration> {
        let text = self.headers.get(RETRY_AFTER)?.to_str().ok()?;
        match text.trim().parse() {
            Ok(seconds) => Some(Duration::from_secs(seconds)),
            Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).ok(),
        }
    }

    /// This answer as the reason why something is not known: the status and the first words of the body.
    pub fn refusal(&self, server: &Server) -> SourceError {
        let text = String::from_utf8_lossy(self.body.get(..MAX_WORDS).unwrap_or(&self.body));
        let words: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let reason = match words.trim() {
            "" => format!("{} answered {}", server.name, self.status),
            words => format!("{} answered {}: {words}", server.name, self.status),
        };
        SourceError { retry_after: self.retry_after(), ..SourceError::new(reason) }
    }
}

/// There is no whole answer.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{server}: {reason}")]
pub struct AskError {
    server: Box<str>,
    reason: Box<str>,
    timed_out: bool,
}

impl AskError {
    /// Whether nothing is known but that it took too long.
    pub fn is_timeout(&self) -> bool {
        self.timed_out
    }
}

impl From<AskError> for SourceError {
    fn from(error: AskError) -> Self {
        SourceError::new(error.to_string())
    }
}

/// What went wrong, before the address is put to it.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("`{0}` is not a path")]
    Target(Box<str>),
    #[error("{}: {}", .0.display(), .1)]
    Secret(PathBuf, Box<str>),
    #[error("the name was not resolved: {0}")]
    Name(std::io::Error),
    #[error("the name has no address")]
    Nowhere,
    #[error("not connected: {0}")]
    Refused(std::io::Error),
    #[error("not connected within {0:?}")]
    Slow(Duration),
    #[error("no TLS: {0}")]
    Tls(std::io::Error),
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    #[error("{}", words(.0))]
    Broken(hyper::Error),
}

/// hyper's words with those of the cause, which say more.
fn words(error: &hyper::Error) -> String {
    use std::error::Error;
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// A connection that belongs to whoever asks. Dropping it, or a question before its answer, closes it.
#[derive(Debug)]
pub struct Connection {
    server: Arc<Server>,
    kept: Option<Kept>,
    was_ended: bool,
}

impl Connection {
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// Whether the server had ended the connection between the last answer and the one before, without having said so.
    pub fn was_ended(&self) -> bool {
        self.was_ended
    }

    /// Closes what is open; the next question connects again.
    pub fn close(&mut self) {
        self.kept = None;
    }

    /// Asks, and waits for the whole answer.
    ///
    /// # Errors
    /// There is none in time. What went wrong, with the address.
    pub async fn ask(&mut self, question: &Question<'_>) -> Result<Answer, AskError> {
        // Taken out for as long as the question is open: what is dropped half way cannot be used again.
        let kept = self.kept.take();
        let was_kept = kept.is_some();
        let server = Arc::clone(&self.server);
        match timeout(question.deadline, exchange(&server, kept, question)).await {
            Ok(Ok(told)) => {
                self.kept = told.kept;
                self.was_ended = was_kept && told.opened;
                Ok(told.answer)
            }
            Ok(Err(problem)) => Err(server.error(&problem)),
            Err(_) => Err(server.error(&Problem::Silent(question.deadline))),
        }
    }
}

/// What came of a question.
struct Told {
    answer: Answer,
    /// The connection, if it can be used again.
    kept: Option<Kept>,
    /// It was opened for this question.
    opened: bool,
}

async fn exchange(server: &Server, kept: Option<Kept>, question: &Question<'_>) -> Result<Told, Problem> {
    let mut request = server.request(question).await?;
    if let Some(mut kept) = kept.filter(|kept| !kept.sender.is_closed()) {
        match kept.sender.try_send_request(request).await {
            Ok(head) => return receive(server, kept, head, false).await,
            Err(mut failure) => match failure.take_message() {
                // Nothing of it was sent: the connection had ended.
                Some(unsent) => request = unsent,
                None => return Err(Problem::Broken(failure.into_error())),
            },
        }
    }
    // Apart, for it is large and over before the long wait begins.
    let mut kept = Box::pin(server.connect()).await?;
    let head = kept.sender.send_request(request).await.map_err(Problem::Broken)?;
    receive(server, kept, head, true).await
}

async fn receive(
    server: &Server,
    kept: Kept,
    head: Response<Incoming>,
    opened: bool,
) -> Result<Told, Problem> {
    let most = server.options.max_body;
    let (head, mut incoming) = head.into_parts();
    let announced =
        head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > most) {
        return Err(Problem::TooLarge(most));
    }
    let mut body = BytesMut::new();
    while let Some(frame) = incoming.frame().await {
        let Ok(data) = frame.map_err(Problem::Broken)?.into_data() else { continue };
        if body.len() + data.len() > most {
            return Err(Problem::TooLarge(most));
        }
        body.extend_from_slice(&data);
    }
    let kept = (!is_last(&head) && !kept.sender.is_closed()).then_some(kept);
    let answer = Answer { status: head.status, headers: head.headers, body: body.freeze() };
    Ok(Told { answer, kept, opened })
}

/// Whether the server ends the connection after this answer (RFC 9112 §9.3).
fn is_last(head: &Parts) -> bool {
    let mut options = head.headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    head.version < Version::HTTP_11
        || options.any(|list| list.split(',').any(|option| option.trim().eq_ignore_ascii_case("close")))
}

/// An open connection and the task that drives it.
#[derive(Debug)]
struct Kept {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: AbortHandle,
}

impl Kept {
    async fn new(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Self, Problem> {
        let mut builder = http1::Builder::new();
        builder.read_buf_exact_size(Some(READ)).max_headers(MAX_FIELDS);
        let (sender, driver) = builder.handshake(TokioIo::new(stream)).await.map_err(Problem::Broken)?;
        // How it ends is told to whoever asks.
        let driver = tokio::spawn(async move { drop(driver.await) }).abort_handle();
        Ok(Self { sender, driver })
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

#[cfg(test)]
mod tests;
