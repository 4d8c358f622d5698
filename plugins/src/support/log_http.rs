//! Batches of log entries sent by HTTP: one call for a batch, to one of several servers.

use std::time::Duration;

use bytes::Bytes;
use config::error::ConfigError;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use layers::plugin::BuildEnv;

use super::batch::Failure;
use super::http_call::{HttpClient, Settings, url};

/// Characters of an answer that are told of a failure.
const TOLD: usize = 200;
/// The largest answer: that of Elasticsearch tells of each entry.
const ANSWER: usize = 8 << 20;
/// What the queue gives an attempt beyond the time that the call itself has.
const MARGIN: Duration = Duration::from_secs(1);

/// How a logger's server is called.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Check the certificate of an `https` server.
    pub verify: bool,
    /// For the whole call.
    pub timeout: Duration,
    /// How long a connection may be idle, and how many are kept.
    pub idle: (Duration, usize),
}

impl Call {
    /// A call that takes `timeout` at most.
    pub fn within(verify: bool, timeout: Duration) -> Self {
        Self { verify, timeout, idle: (Duration::from_secs(60), 5) }
    }

    /// For [`BatchSettings::timeout`](super::batch::BatchSettings::timeout).
    pub fn attempt(&self) -> Duration {
        self.timeout + MARGIN
    }
}

/// The value of a header field, from a setting at `pointer` that may hold a credential.
///
/// # Errors
/// It cannot stand in a header field.
pub fn credential(value: &str, pointer: &str) -> Result<HeaderValue, ConfigError> {
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| ConfigError::invalid(pointer, "it cannot stand in a header field"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Posts batches.
#[derive(Debug)]
pub struct Post {
    client: HttpClient,
    servers: Vec<Uri>,
    method: Method,
    headers: HeaderMap,
}

impl Post {
    /// Posts to one of `servers`, by chance.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(servers: Vec<Uri>, call: Call, env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        let settings = Settings {
            verify: call.verify,
            timeout: call.timeout,
            connect_timeout: call.timeout,
            pool: call.idle.1,
            idle: call.idle.0,
            max_body: ANSWER,
            ..Settings::default()
        };
        Ok(Self {
            client: HttpClient::new(&settings, env)?,
            servers,
            method: Method::POST,
            headers: HeaderMap::new(),
        })
    }

    /// A field that every call has.
    #[must_use]
    pub fn field(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// As [`field`](Self::field), from a setting at `pointer` that may hold a credential.
    ///
    /// # Errors
    /// The value cannot stand in a header field.
    pub fn credential(self, name: HeaderName, value: &str, pointer: &str) -> Result<Self, ConfigError> {
        Ok(self.field(name, credential(value, pointer)?))
    }

    /// Fields that every call has.
    #[must_use]
    pub fn fields(mut self, fields: HeaderMap) -> Self {
        self.headers.extend(fields);
        self
    }

    /// Another method than `POST`.
    #[must_use]
    pub fn method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    /// Sends `body` to a server and returns its answer, whatever its status.
    ///
    /// # Errors
    /// There was none.
    pub async fn send(&self, body: impl Into<Bytes>) -> Result<Response<Bytes>, Failure> {
        self.send_with(body, []).await
    }

    /// As [`send`](Self::send), with further fields.
    ///
    /// # Errors
    /// There was no answer.
    pub async fn send_with(
        &self,
        body: impl Into<Bytes>,
        fields: impl IntoIterator<Item = (HeaderName, HeaderValue)>,
    ) -> Result<Response<Bytes>, Failure> {
        let chosen = self.servers.get(fastrand::usize(..self.servers.len().max(1)));
        let Some(server) = chosen else { return Err(Failure::permanent("there is no server")) };
        let mut request = Request::new(body.into());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = server.clone();
        *request.headers_mut() = self.headers.clone();
        for (name, value) in fields {
            request.headers_mut().insert(name, value);
        }
        let host = server.host().unwrap_or_default();
        self.client.call(request).await.map_err(|error| Failure::retryable(format!("{host}: {error}")))
    }

    /// Sends `body`; every status from `bad` on is a failure.
    ///
    /// # Errors
    /// There was no answer, or one with such a status.
    pub async fn deliver(&self, body: impl Into<Bytes>, bad: u16) -> Result<(), Failure> {
        let answer = self.send(body).await?;
        if answer.status().as_u16() < bad { Ok(()) } else { Err(refused(&answer)) }
    }
}

/// The failure that an answer tells of. Only what may go away by itself is worth another attempt.
pub fn refused(answer: &Response<Bytes>) -> Failure {
    let status = answer.status();
    let body: String = String::from_utf8_lossy(answer.body()).chars().take(TOLD).collect();
    let problem = format!("status {}: {body}", status.as_u16());
    if is_passing(status) { Failure::retryable(problem) } else { Failure::permanent(problem) }
}

/// Whether a status may be another one in a moment.
pub fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
}

/// The addresses of servers, each with `path` behind it. `pointer` is that of the list.
///
/// # Errors
/// One of them is no URL.
pub fn servers<'a>(
    addresses: impl IntoIterator<Item = (String, &'a str)>,
    path: &str,
) -> Result<Vec<Uri>, ConfigError> {
    addresses.into_iter().map(|(pointer, address)| url(&format!("{address}{path}"), &pointer)).collect()
}

/// The members of a list with their pointers.
pub fn listed<'a>(pointer: &'a str, list: &'a [String]) -> impl Iterator<Item = (String, &'a str)> {
    list.iter().enumerate().map(move |(index, one)| (format!("{pointer}/{index}"), one.as_str()))
}
