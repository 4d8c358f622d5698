//! The identity provider: its discovery document, its keys, and the endpoints that are asked.
//!
//! Documents are fetched when first needed, kept for their time and shared by all objects with equal settings. A token
//! with a key that is not known has the keys fetched again, though not more often than every ten seconds.

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::support::answers::{self, Answers};
use crate::support::http_call::{self, HttpClient};
use crate::support::jwk::KeySet;
use crate::support::jwt::{Algorithm, TimeClaim, Token};

/// How long the discovery document is kept.
const DOCUMENT: Duration = Duration::from_secs(24 * 3600);
/// How long a failure to fetch one is kept, so that a provider that is down is not asked by each request.
const FAILURE: Duration = Duration::from_secs(1);
/// The shortest time between two fetches of the keys because of a key that is not known.
const AGAIN: Duration = Duration::from_secs(10);

/// Everything but letters, digits and `-_.~`.
const FORM: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// `name=value&...`, escaped.
pub fn form(fields: &[(&str, &str)]) -> String {
    let mut form = String::new();
    for (name, value) in fields {
        let separator = if form.is_empty() { "" } else { "&" };
        let (name, value) = (utf8_percent_encode(name, FORM), utf8_percent_encode(value, FORM));
        let _ = write!(form, "{separator}{name}={value}");
    }
    form
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Why something could not be done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Trouble {
    /// The provider cannot be asked, or answers nonsense.
    #[error("{0}")]
    Provider(Arc<str>),
    /// What was shown is not good.
    #[error("{0}")]
    Invalid(Arc<str>),
}

impl Trouble {
    /// The provider cannot be asked.
    pub fn provider(words: impl Into<Arc<str>>) -> Self {
        Self::Provider(words.into())
    }

    /// What was shown is not good.
    pub fn invalid(words: impl Into<Arc<str>>) -> Self {
        Self::Invalid(words.into())
    }
}

/// The discovery document, as far as it is used.
#[derive(Debug, Deserialize)]
pub struct Document {
    pub issuer: String,
    pub authorization_endpoint: Option<String>,
    pub token_endpoint: Option<String>,
    pub jwks_uri: Option<String>,
    pub userinfo_endpoint: Option<String>,
    pub end_session_endpoint: Option<String>,
    pub introspection_endpoint: Option<String>,
    pub revocation_endpoint: Option<String>,
    #[serde(default)]
    pub authorization_response_iss_parameter_supported: bool,
}

/// How the client proves who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    Basic,
    Post,
}

/// The client, as the provider knows it.
#[derive(Clone)]
pub struct Identity {
    pub id: Arc<str>,
    pub secret: Option<Arc<str>>,
}

type Fetched<T> = Result<Arc<T>, Trouble>;

/// The provider.
pub struct Provider {
    client: HttpClient,
    discovery: Uri,
    documents: Answers<Fetched<Document>>,
    keys: Answers<Fetched<KeySet>>,
    keys_ttl: Duration,
    fetched_again: Mutex<Option<Instant>>,
}

impl Provider {
    /// The provider whose document is at `discovery`.
    pub fn new(client: HttpClient, discovery: Uri, keys_ttl: Duration, control: &Handle) -> Self {
        Self {
            client,
            discovery,
            documents: Answers::new(2, control),
            keys: Answers::new(2, control),
            keys_ttl,
            fetched_again: Mutex::default(),
        }
    }

    /// The discovery document.
    ///
    /// # Errors
    /// It cannot be had.
    pub async fn document(&self) -> Fetched<Document> {
        let fetch = || {
            let (client, uri) = (self.client.clone(), self.discovery.clone());
            async move {
                let document = fetch(&client, uri).await.and_then(|body| {
                    serde_json::from_slice::<Document>(&body)
                        .map(Arc::new)
                        .map_err(|error| Trouble::provider(format!("the discovery document: {error}")))
                });
                let good = if document.is_ok() { DOCUMENT } else { FAILURE };
                (document, Some(good))
            }
        };
        self.documents.get(answers::key(&[]), fetch).await.unwrap_or_else(|| Err(Trouble::provider("too busy")))
    }

    async fn keys(&self, document: &Document) -> Fetched<KeySet> {
        let uri = endpoint(document.jwks_uri.as_deref(), "jwks_uri")?;
        let fetch = || {
            let (client, ttl) = (self.client.clone(), self.keys_ttl);
            async move {
                let keys = fetch(&client, uri).await.and_then(|body| {
                    let set: Value = serde_json::from_slice(&body)
                        .map_err(|error| Trouble::provider(format!("the key set: {error}")))?;
                    Ok(Arc::new(KeySet::new(&set)))
                });
                let good = if keys.is_ok() { ttl } else { FAILURE };
                (keys, Some(good))
            }
        };
        self.keys.get(answers::key(&[]), fetch).await.unwrap_or_else(|| Err(Trouble::provider("too busy")))
    }

    /// The claims of a token that the provider signed.
    ///
    /// # Errors
    /// It did not, or its keys cannot be had.
    pub async fn signed(&self, text: &str, only: Option<Algorithm>) -> Result<Map<String, Value>, Trouble> {
        let token = Token::parse(text).ok_or_else(|| Trouble::invalid("invalid jwt"))?;
        let document = self.document().await?;
        let mut keys = self.keys(&document).await?;
        let unknown = token.key_id().is_some_and(|kid| !keys.names(kid));
        if unknown && self.may_fetch_again() {
            self.keys.forget(&answers::key(&[]));
            keys = self.keys(&document).await?;
        }
        if !keys.signed(&token, only) {
            return Err(Trouble::invalid("jwt signature verification failed"));
        }
        Ok(token.into_claims())
    }

    fn may_fetch_again(&self) -> bool {
        let mut last = self.fetched_again.lock().unwrap_or_else(PoisonError::into_inner);
        let may = last.is_none_or(|last| last.elapsed() >= AGAIN);
        if may {
            *last = Some(Instant::now());
        }
        may
    }

    /// Sends a form to an endpoint, as this client. The answer is a JSON object.
    ///
    /// # Errors
    /// `Invalid` when the provider refuses (400 or 401), with its own `error`.
    pub async fn ask(
        &self,
        endpoint: Uri,
        fields: &[(&str, &str)],
        identity: &Identity,
        auth: ClientAuth,
        more: &HeaderMap,
    ) -> Result<Map<String, Value>, Trouble> {
        let mut fields = fields.to_vec();
        let mut headers = more.clone();
        match (&identity.secret, auth) {
            (Some(secret), ClientAuth::Basic) => {
                let pair = format!(
                    "{}:{}",
                    utf8_percent_encode(&identity.id, FORM),
                    utf8_percent_encode(secret, FORM)
                );
                let value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(pair)));
                let value = value.map_err(|error| Trouble::provider(error.to_string()))?;
                headers.insert(header::AUTHORIZATION, value);
            }
            (Some(secret), ClientAuth::Post) => {
                fields.extend([("client_id", &*identity.id), ("client_secret", &**secret)]);
            }
            (None, _) => fields.push(("client_id", &identity.id)),
        }
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/x-www-form-urlencoded"),
        );
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        let mut question = Request::new(Bytes::from(form(&fields)));
        *question.method_mut() = Method::POST;
        *question.uri_mut() = endpoint;
        *question.headers_mut() = headers;
        let answer = self.client.call(question).await.map_err(|error| Trouble::provider(error.to_string()))?;
        let said: Map<String, Value> = serde_json::from_slice(answer.body()).unwrap_or_default();
        match answer.status() {
            StatusCode::OK => Ok(said),
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED => {
                let error = said.get("error").and_then(Value::as_str).unwrap_or("refused by the provider");
                Err(Trouble::invalid(error))
            }
            status => Err(Trouble::provider(format!("the provider answers {status}"))),
        }
    }

    /// What the provider tells of the user that an access token belongs to.
    ///
    /// # Errors
    /// It cannot be had.
    pub async fn userinfo(&self, endpoint: Uri, access_token: &str) -> Result<Map<String, Value>, Trouble> {
        let mut question = Request::new(Bytes::new());
        *question.uri_mut() = endpoint;
        let bearer = HeaderValue::try_from(format!("Bearer {access_token}"));
        let bearer = bearer.map_err(|_| Trouble::invalid("an access token that fits no field"))?;
        question.headers_mut().insert(header::AUTHORIZATION, bearer);
        question.headers_mut().insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        let answer = self.client.call(question).await.map_err(|error| Trouble::provider(error.to_string()))?;
        if answer.status() != StatusCode::OK {
            return Err(Trouble::provider(format!("the userinfo endpoint answers {}", answer.status())));
        }
        serde_json::from_slice(answer.body()).map_err(|error| Trouble::provider(format!("userinfo: {error}")))
    }
}

/// Fields of a request that go along with an introspection.
pub fn along(headers: &HeaderMap, names: &[HeaderName]) -> HeaderMap {
    let mut more = HeaderMap::new();
    for name in names {
        if let Some(value) = headers.get(name) {
            more.insert(name.clone(), value.clone());
        }
    }
    more
}

/// An endpoint of the document.
///
/// # Errors
/// The document does not have it.
pub fn endpoint(uri: Option<&str>, name: &str) -> Result<Uri, Trouble> {
    let uri = uri.ok_or_else(|| Trouble::provider(format!("the discovery document has no `{name}`")))?;
    http_call::url(uri, name).map_err(|error| Trouble::provider(error.to_string()))
}

async fn fetch(client: &HttpClient, uri: Uri) -> Result<Bytes, Trouble> {
    let mut question = Request::new(Bytes::new());
    *question.uri_mut() = uri.clone();
    let answer = client.call(question).await.map_err(|error| Trouble::provider(format!("{uri}: {error}")))?;
    if answer.status() != StatusCode::OK {
        return Err(Trouble::provider(format!("{uri} answers {}", answer.status())));
    }
    Ok(answer.into_body())
}

/// Checks issuer and time of a token's claims.
///
/// # Errors
/// One of them does not hold.
pub fn timely(claims: &Map<String, Value>, issuers: &[&str]) -> Result<(), Trouble> {
    let issuer = claims.get("iss").and_then(Value::as_str).unwrap_or_default();
    if !issuers.contains(&issuer) {
        return Err(Trouble::invalid("Claim 'iss' returned failure"));
    }
    let now = now() as f64;
    if TimeClaim::Exp.holds(claims, now, 0.0) != Some(true) {
        return Err(Trouble::invalid("'exp' claim expired or missing"));
    }
    if TimeClaim::Nbf.holds(claims, now, 0.0) == Some(false) {
        return Err(Trouble::invalid("'nbf' claim not valid yet"));
    }
    Ok(())
}

/// Whether a claim is this text, or a list with it.
pub fn includes(claim: Option<&Value>, text: &str) -> bool {
    match claim {
        Some(Value::String(one)) => one == text,
        Some(Value::Array(all)) => all.iter().any(|one| one == text),
        _ => false,
    }
}
