//! Tokens of requests: whose are believed, and their claims as variables of policies.
//!
//! Only requests of sidecars whose policies ask for claims are looked at. A token that is shown has to be good: signed by
//! a key of its issuer, for us, and of now; another is refused, whatever policies say. A request without a token has no
//! claims. Keys are given, or fetched by the control side and kept while they cannot be fetched again.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use config::error::ConfigError;
use config::mesh::{self, CLAIM, Issuer};
use http::{HeaderMap, Request, StatusCode, Uri, header};
use layers::vars::json_path;
use plugins::support::http_call::HttpClient;
use plugins::support::jwk::KeySet;
use plugins::support::jwt::{TimeClaim, Token};
use serde_json::{Map, Value};

/// The pause after keys could not be fetched.
const AGAIN: Duration = Duration::from_secs(5);

/// Those whose tokens are believed.
#[derive(Default)]
pub struct Issuers(Box<[Believed]>);

struct Believed {
    issuer: Box<str>,
    audiences: Option<Box<[Box<str>]>>,
    keys: ArcSwapOption<KeySet>,
    fetched: Option<(Uri, Duration)>,
    leeway: f64,
}

impl fmt::Debug for Issuers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|believed| &believed.issuer)).finish()
    }
}

/// Why a token is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// `Authorization` is there twice, or is no text.
    #[error("Authorization is ambiguous")]
    Ambiguous,
    /// It is no signed token.
    #[error("it is no signed token")]
    Malformed,
    /// `iss` is nobody who is believed.
    #[error("its issuer is not believed")]
    Issuer,
    /// The keys of the issuer have not been fetched yet.
    #[error("the keys of its issuer are not known yet")]
    NoKeys,
    /// No key of the issuer has signed it.
    #[error("its issuer has not signed it")]
    Signature,
    /// `aud` is somebody else.
    #[error("it is for somebody else")]
    Audience,
    /// `exp` is missing or past, or `nbf` to come.
    #[error("it is not valid now")]
    Time,
}

impl Issuers {
    /// Reads the keys that are given.
    ///
    /// # Errors
    /// Sets without a key that can be used, with pointers into `policies`.
    pub fn new(tokens: &[Issuer]) -> Result<Self, Vec<ConfigError>> {
        let mut errors = Vec::new();
        let mut believed = Vec::with_capacity(tokens.len());
        for (index, issuer) in tokens.iter().enumerate() {
            let keys = issuer.jwks.as_ref().map(KeySet::new);
            if keys.as_ref().is_some_and(KeySet::is_empty) {
                let problem =
                    "no key of the set can be used: write public keys (RSA, EC, Ed25519) with `kty`";
                errors.push(ConfigError::invalid(format!("/tokens/{index}/jwks"), problem));
            }
            let uri = issuer.jwks_uri.as_ref().map(|url| url.parse::<Uri>());
            let fetched = match uri.transpose() {
                Ok(uri) => uri.map(|uri| (uri, issuer.refresh.duration())),
                Err(error) => {
                    errors.push(ConfigError::invalid(format!("/tokens/{index}/jwks_uri"), error.to_string()));
                    None
                }
            };
            believed.push(Believed {
                issuer: (*issuer.issuer).into(),
                audiences: issuer
                    .audiences
                    .as_ref()
                    .map(|all| all.iter().map(|audience| (**audience).into()).collect()),
                keys: ArcSwapOption::new(keys.map(Arc::new)),
                fetched,
                leeway: f64::from(issuer.leeway.get()),
            });
        }
        if errors.is_empty() { Ok(Self(believed.into())) } else { Err(errors) }
    }

    /// The same, with the keys that `before` has fetched from the same places: a change of the file forgets none.
    #[must_use]
    pub fn knowing(self, before: &Self) -> Self {
        for believed in &self.0 {
            let same = |other: &&Believed| {
                believed.fetched.is_some()
                    && other.issuer == believed.issuer
                    && other.fetched.as_ref().map(|(uri, _)| uri)
                        == believed.fetched.as_ref().map(|(uri, _)| uri)
            };
            if let Some(same) = before.0.iter().find(same) {
                believed.keys.store(same.keys.load_full());
            }
        }
        self
    }

    /// Whether keys have to be fetched.
    pub fn are_fetched(&self) -> bool {
        self.0.iter().any(|believed| believed.fetched.is_some())
    }

    /// Fetches keys again and again, for ever. For the control side.
    pub async fn follow(&self, client: HttpClient) {
        let each = self.0.iter().map(|believed| believed.follow(&client));
        futures_util::future::join_all(each).await;
    }

    /// What a token says, if it is good at `now`.
    ///
    /// # Errors
    /// Why it is not.
    pub fn verify(&self, text: &str, now: SystemTime) -> Result<Map<String, Value>, TokenError> {
        let token = Token::parse(text).ok_or(TokenError::Malformed)?;
        let issuer = token.claims().get("iss").and_then(Value::as_str).unwrap_or_default();
        let believed =
            self.0.iter().find(|believed| *believed.issuer == *issuer).ok_or(TokenError::Issuer)?;
        let keys = believed.keys.load();
        let keys = keys.as_ref().ok_or(TokenError::NoKeys)?;
        if !keys.signed(&token, None) {
            return Err(TokenError::Signature);
        }
        let claims = token.into_claims();
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        if TimeClaim::Exp.holds(&claims, now, believed.leeway) != Some(true)
            || TimeClaim::Nbf.holds(&claims, now, believed.leeway) == Some(false)
        {
            return Err(TokenError::Time);
        }
        if let Some(audiences) = &believed.audiences {
            let ours = |value: &Value| {
                value.as_str().is_some_and(|text| audiences.iter().any(|audience| **audience == *text))
            };
            let for_us = match claims.get("aud") {
                Some(Value::Array(all)) => all.iter().any(ours),
                Some(one) => ours(one),
                None => false,
            };
            if !for_us {
                return Err(TokenError::Audience);
            }
        }
        Ok(claims)
    }
}

impl Believed {
    async fn follow(&self, client: &HttpClient) {
        let Some((uri, refresh)) = &self.fetched else { return };
        loop {
            let pause = match fetch(client, uri).await {
                Ok(keys) => {
                    self.keys.store(Some(Arc::new(keys)));
                    *refresh
                }
                Err(error) => {
                    tracing::warn!(issuer = %self.issuer, %uri, error, "keys of tokens were not fetched");
                    AGAIN.min(*refresh)
                }
            };
            tokio::time::sleep(pause).await;
        }
    }
}

async fn fetch(client: &HttpClient, uri: &Uri) -> Result<KeySet, String> {
    let mut question = Request::new(Bytes::new());
    *question.uri_mut() = uri.clone();
    let answer = client.call(question).await.map_err(|error| error.to_string())?;
    if answer.status() != StatusCode::OK {
        return Err(format!("the answer is {}", answer.status()));
    }
    let set: Value = serde_json::from_slice(answer.body()).map_err(|error| error.to_string())?;
    let keys = KeySet::new(&set);
    if keys.is_empty() { Err("no key of the set can be used".to_owned()) } else { Ok(keys) }
}

/// The token of a request, if it shows one.
///
/// # Errors
/// It is ambiguous which.
pub fn bearer(headers: &HeaderMap) -> Result<Option<&str>, TokenError> {
    let mut fields = headers.get_all(header::AUTHORIZATION).iter();
    let Some(field) = fields.next() else { return Ok(None) };
    if fields.next().is_some() {
        return Err(TokenError::Ambiguous);
    }
    let text = field.to_str().map_err(|_| TokenError::Ambiguous)?;
    let Some((scheme, token)) = text.split_once(' ') else { return Ok(None) };
    Ok(scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_matches(' ')))
}

/// The value of the variable `jwt_claim_NAME`; dots lead into objects.
pub fn claim(claims: &Map<String, Value>, variable: &str) -> Option<Value> {
    let name = variable.strip_prefix(CLAIM)?;
    if let Some(value) = claims.get(name) {
        return Some(value.clone());
    }
    let (first, rest) = name.split_once('.')?;
    json_path(claims.get(first)?, rest)
}

/// As [`claim`], as text.
pub fn claim_text(claims: &Map<String, Value>, variable: &str) -> Option<Cow<'static, str>> {
    match claim(claims, variable)? {
        Value::Null => None,
        Value::String(text) => Some(Cow::Owned(text)),
        other => Some(Cow::Owned(other.to_string())),
    }
}

/// The value of a variable of the caller.
pub fn peer_variable<'a>(identity: Option<&'a str>, variable: &str) -> Option<&'a str> {
    match variable {
        "peer_identity" => identity,
        "peer_namespace" => mesh::namespace(identity?),
        "peer_service_account" => mesh::service_account(identity?),
        _ => None,
    }
}
