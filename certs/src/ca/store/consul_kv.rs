//! The store in Consul's KV store: keys below a prefix, compared by their `ModifyIndex` (`?cas=`).
//!
//! Values are read with `?consistent`, because a follower that is behind would give the value before the last change.
//! Consul takes values of 512 KiB, which is why a record is never larger. A question is a connection of its own: they are
//! few, and a wait of a minute holds up nobody.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{Store, StoreError, Stored, SwapError, Version};
use crate::files;

/// The largest answer: a list of sixteen parts for each of some replicas.
const MAX_ANSWER: usize = 64 << 20;

/// Where Consul is.
#[derive(Clone, Default)]
pub struct Settings {
    /// `http(s)://HOST:PORT`
    pub server: String,
    /// What all keys begin with, without slashes at its ends.
    pub prefix: String,
    pub token: Option<String>,
    pub datacenter: Option<String>,
    /// For one question.
    pub timeout: Duration,
    /// Whom to trust instead of the system's roots.
    pub ca: Option<PathBuf>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token stays out.
        f.debug_struct("Settings")
            .field("server", &self.server)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// Keys in Consul.
pub struct ConsulKv {
    settings: Settings,
    name: String,
    host: String,
    port: u16,
    tls: Option<(ServerName<'static>, TlsConnector)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Pair {
    key: String,
    #[serde(default)]
    value: Option<String>,
    modify_index: u64,
}

impl Pair {
    fn stored(&self) -> Result<Stored, String> {
        let value = STANDARD.decode(self.value.as_deref().unwrap_or_default());
        let value = value.map_err(|error| format!("a value is no base64: {error}"))?;
        Ok(Stored { version: Version(self.modify_index), value })
    }
}

impl ConsulKv {
    /// A store that connects when it is asked. Reads the file of authorities.
    ///
    /// # Errors
    /// The URL is of another form, or the file cannot be read.
    pub fn new(settings: Settings) -> Result<Self, StoreError> {
        let name = format!("Consul {}", settings.server);
        let unusable =
            |reason: &str| StoreError::Unavailable { store: name.clone(), reason: reason.to_owned() };
        let form = || unusable("the server is not of the form http(s)://HOST:PORT");
        let uri: Uri = settings.server.parse().map_err(|_| form())?;
        let https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(form()),
        };
        let host = uri.host().ok_or_else(form)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(8500);
        let tls = match https {
            false => None,
            true => {
                let server = ServerName::try_from(host.clone()).map_err(|_| form())?;
                let roots: Arc<RootCertStore> = settings
                    .ca
                    .as_deref()
                    .map_or_else(files::system_roots, files::trusted_roots)
                    .map_err(|error| unusable(&error.to_string()))?;
                let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
                let config = ClientConfig::builder_with_provider(provider)
                    .with_safe_default_protocol_versions()
                    .map_err(|error| unusable(&error.to_string()))?
                    .with_root_certificates(roots)
                    .with_no_client_auth();
                Some((server, TlsConnector::from(Arc::new(config))))
            }
        };
        let prefix = settings.prefix.trim_matches('/').to_owned();
        Ok(Self { settings: Settings { prefix, ..settings }, name, host, port, tls })
    }

    fn unavailable(&self, reason: impl ToString) -> StoreError {
        StoreError::Unavailable { store: self.name.clone(), reason: reason.to_string() }
    }

    fn target(&self, name: &str, query: &str) -> String {
        let datacenter = self.settings.datacenter.as_ref().map_or_else(String::new, |dc| format!("&dc={dc}"));
        format!("/v1/kv/{}/{name}?{query}{datacenter}", self.settings.prefix)
    }

    async fn ask(
        &self,
        method: Method,
        target: String,
        body: &[u8],
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), StoreError> {
        let mut request = Request::builder()
            .method(method)
            .uri(target)
            .header("host", format!("{}:{}", self.host, self.port))
            .header("user-agent", "postern");
        if let Some(token) = &self.settings.token {
            request = request.header("x-consul-token", token);
        }
        let request =
            request.body(Full::new(Bytes::copy_from_slice(body))).map_err(|error| self.unavailable(error))?;
        let question = async {
            let stream =
                TcpStream::connect((self.host.as_str(), self.port)).await.map_err(|e| e.to_string())?;
            let _ = stream.set_nodelay(true);
            match &self.tls {
                None => send(stream, request).await,
                Some((server, tls)) => {
                    let stream =
                        tls.connect(server.clone(), stream).await.map_err(|error| error.to_string())?;
                    send(stream, request).await
                }
            }
        };
        match timeout(limit, question).await {
            Ok(answer) => answer.map_err(|error| self.unavailable(error)),
            Err(_) => Err(self.unavailable(format!("no answer within {} ms", limit.as_millis()))),
        }
    }

    /// What a refusal says, short.
    fn refused(&self, status: StatusCode, body: &[u8]) -> StoreError {
        let words: String = String::from_utf8_lossy(body).trim().chars().take(200).collect();
        self.unavailable(format!("{status}: {words}"))
    }

    async fn pairs(&self, name: &str, query: &str, limit: Duration) -> Result<Vec<Pair>, StoreError> {
        let (status, body) = self.ask(Method::GET, self.target(name, query), &[], limit).await?;
        match status {
            // There is no such key. A proxy in between would say it without a word of JSON too, but Consul's is empty.
            StatusCode::NOT_FOUND if body.is_empty() => Ok(Vec::new()),
            StatusCode::OK => serde_json::from_slice(&body).map_err(|error| self.unavailable(error)),
            _ => Err(self.refused(status, &body)),
        }
    }

    /// A change that Consul answers with `true` or `false`.
    async fn change(&self, method: Method, target: String, body: &[u8]) -> Result<(), SwapError> {
        let (status, body) = self.ask(method, target, body, self.settings.timeout).await?;
        match (status, body.trim_ascii()) {
            (StatusCode::OK, b"true") => Ok(()),
            (StatusCode::OK, b"false") => Err(SwapError::Conflict),
            _ => Err(self.refused(status, &body).into()),
        }
    }
}

/// Sends one request over a new connection.
async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), String> {
    let (mut sender, driver) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let question = async {
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
    };
    // Both in one task, so that nothing is left behind when the deadline ends it.
    tokio::pin!(question, driver);
    let mut ended = false;
    loop {
        tokio::select! {
            answer = &mut question => return answer,
            _ = &mut driver, if !ended => ended = true,
        }
    }
}

impl Store for ConsulKv {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let pairs = self.pairs(name, "consistent", self.settings.timeout).await?;
            let stored = pairs.first().map(Pair::stored).transpose();
            stored.map_err(|reason| self.unavailable(reason))
        })
    }

    fn list<'a>(&'a self, start: &'a str) -> BoxFuture<'a, Result<Vec<(String, Stored)>, StoreError>> {
        Box::pin(async move {
            let own = format!("{}/", self.settings.prefix);
            let mut found = Vec::new();
            for pair in self.pairs(start, "consistent&recurse", self.settings.timeout).await? {
                if let Some(name) = pair.key.strip_prefix(&own) {
                    let stored = pair.stored().map_err(|reason| self.unavailable(reason))?;
                    found.push((name.to_owned(), stored));
                }
            }
            found.sort_by(|one, other| one.0.cmp(&other.0));
            Ok(found)
        })
    }

    fn swap<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        value: &'a [u8],
    ) -> BoxFuture<'a, Result<Version, SwapError>> {
        Box::pin(async move {
            let index = seen.map_or(0, |seen| seen.0);
            self.change(Method::PUT, self.target(name, &format!("cas={index}")), value).await?;
            // Consul does not say which version it was; whoever wrote meanwhile has another value.
            match self.load(name).await? {
                Some(stored) if stored.value == value => Ok(stored.version),
                _ => Err(SwapError::Conflict),
            }
        })
    }

    fn remove<'a>(&'a self, name: &'a str, seen: Version) -> BoxFuture<'a, Result<(), SwapError>> {
        Box::pin(async move {
            // Consul does not say whether there was such a version: what is still there was another.
            self.change(Method::DELETE, self.target(name, &format!("cas={}", seen.0)), &[]).await?;
            match self.load(name).await? {
                Some(_) => Err(SwapError::Conflict),
                None => Ok(()),
            }
        })
    }

    fn changed<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        at_most: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            if self.load(name).await?.map(|stored| stored.version) != seen {
                return Ok(());
            }
            // A wait of zero would mean Consul's own default.
            let wait = at_most.as_millis().max(1);
            let index = seen.map_or(1, |seen| seen.0);
            let query = format!("index={index}&wait={wait}ms");
            self.pairs(name, &query, at_most + at_most / 16 + self.settings.timeout).await.map(drop)
        })
    }
}
