//! Asks a service of one's own who an application and a user are, by the credentials that a request shows.
//!
//! Verdicts are kept by a digest of the credentials, refusals too and for a shorter time; requests with the same
//! credentials ask once. A service that is away, slow or answers nonsense gives no verdict, and the request is refused.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use config::error::ConfigError;
use config::fields::Int;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use layers::plugin::BuildEnv;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::support::answers::{self, Answers};
use crate::support::headers;
use crate::support::http_call::{self, HttpClient};

/// The longest credential, in bytes. Nobody's token is as long as that.
const MAX_CREDENTIAL: usize = 16 * 1024;

/// The service and the fields that credentials stand in.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The URL of the service. It gets `{"app_code", "app_secret", "user_token"}` by POST.
    uri: String,
    /// Milliseconds to wait for the whole answer.
    #[serde(default)]
    timeout: Int<1, 60_000, 900>,
    /// Check the certificate of the service.
    #[serde(default = "yes")]
    ssl_verify: bool,
    /// The field with the code of the application.
    #[serde(default = "app_code")]
    app_code_header: String,
    /// The field with the secret of the application.
    #[serde(default = "app_secret")]
    app_secret_header: String,
    /// The field with the token of the user.
    #[serde(default = "user_token")]
    user_token_header: String,
    /// The field that holds all of them as JSON: `bk_app_code`, `bk_app_secret`, and `access_token`, `bk_token` or
    /// `bk_ticket`. It goes before the others.
    #[serde(default = "authorization")]
    credentials_header: String,
    /// Take the credentials out of the request before it is forwarded.
    #[serde(default = "yes")]
    hide_credentials: bool,
    /// Seconds that a verdict is kept.
    #[serde(default)]
    ttl: Int<0, 86_400, 60>,
    /// Seconds that a refusal is kept.
    #[serde(default)]
    negative_ttl: Int<0, 86_400, 10>,
    /// Verdicts that are kept at most.
    #[serde(default)]
    cache_size: Int<1, 1_000_000, 10_000>,
}

impl Config {
    /// The URL, and the fields of code, secret, token and of all together.
    ///
    /// # Errors
    /// The first that is none.
    pub fn parsed(&self) -> Result<(Uri, [HeaderName; 4]), ConfigError> {
        let name = |name: &str, field: &str| {
            headers::name(name, "")
                .map_err(|error| ConfigError::new(format!("/auth_service/{field}"), error.kind))
        };
        let names = [
            name(&self.app_code_header, "app_code_header")?,
            name(&self.app_secret_header, "app_secret_header")?,
            name(&self.user_token_header, "user_token_header")?,
            name(&self.credentials_header, "credentials_header")?,
        ];
        Ok((http_call::url(&self.uri, "/auth_service/uri")?, names))
    }
}

fn yes() -> bool {
    true
}

fn app_code() -> String {
    "X-Bk-App-Code".to_owned()
}

fn app_secret() -> String {
    "X-Bk-App-Secret".to_owned()
}

fn user_token() -> String {
    "X-Bk-User-Token".to_owned()
}

fn authorization() -> String {
    "X-Bkapi-Authorization".to_owned()
}

/// What the service says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Whom it has recognised.
    Known { app: Option<Arc<str>>, user: Option<Arc<str>> },
    /// The credentials are nobody's.
    Refused,
    /// Nothing that can be used.
    Nothing,
}

/// Credentials of a request.
#[derive(Default)]
struct Credentials {
    app_code: String,
    app_secret: String,
    user_token: String,
}

/// The service, with what it has said.
pub struct AuthService {
    client: HttpClient,
    uri: Uri,
    code: HeaderName,
    secret: HeaderName,
    token: HeaderName,
    all: HeaderName,
    hide: bool,
    ttl: Duration,
    negative: Duration,
    verdicts: Answers<Verdict>,
}

impl AuthService {
    /// The service of these settings.
    ///
    /// # Errors
    /// The URL or the name of a field is none.
    pub fn new(config: &Config, env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        let settings =
            http_call::Settings::of(config.ssl_verify, config.timeout.get(), Some((32, 60_000)));
        let (uri, [code, secret, token, all]) = config.parsed()?;
        Ok(Self {
            client: HttpClient::new(&settings, env)?,
            uri,
            code,
            secret,
            token,
            all,
            hide: config.hide_credentials,
            ttl: Duration::from_secs(config.ttl.get().into()),
            negative: Duration::from_secs(config.negative_ttl.get().into()),
            verdicts: Answers::new(usize::try_from(config.cache_size.get()).unwrap_or(1), env.control),
        })
    }

    /// What the service says of a request; nothing if the request shows no credentials.
    pub async fn ask(&self, headers: &mut HeaderMap) -> Option<Verdict> {
        let shown = self.credentials(headers);
        if self.hide {
            for name in [&self.all, &self.code, &self.secret, &self.token] {
                headers.remove(name);
            }
        }
        let shown = match shown {
            Ok(shown) => shown?,
            Err(Unreadable) => return Some(Verdict::Refused),
        };
        let key = answers::key(&[
            shown.app_code.as_bytes(),
            shown.app_secret.as_bytes(),
            shown.user_token.as_bytes(),
        ]);
        let ask = || {
            let (client, uri) = (self.client.clone(), self.uri.clone());
            let (ttl, negative) = (self.ttl, self.negative);
            async move {
                let (verdict, limit) = question(&client, uri, &shown).await;
                let good = match &verdict {
                    Verdict::Known { .. } => Some(limit.map_or(ttl, |limit| limit.min(ttl))),
                    Verdict::Refused => Some(negative),
                    Verdict::Nothing => None,
                };
                (verdict, good.filter(|good| !good.is_zero()))
            }
        };
        Some(self.verdicts.get(key, ask).await.unwrap_or(Verdict::Nothing))
    }

    fn credentials(&self, headers: &HeaderMap) -> Result<Option<Credentials>, Unreadable> {
        let text = |name: &HeaderName| match headers.get(name) {
            None => Ok(None),
            Some(value) if value.len() > MAX_CREDENTIAL => Err(Unreadable),
            Some(value) => std::str::from_utf8(value.as_bytes()).map(Some).map_err(|_| Unreadable),
        };
        if let Some(all) = text(&self.all)? {
            let all: Value = serde_json::from_str(all).map_err(|_| Unreadable)?;
            let member = |name: &str| all.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let token = ["access_token", "bk_token", "bk_ticket"].map(member);
            return Ok(Some(Credentials {
                app_code: member("bk_app_code"),
                app_secret: member("bk_app_secret"),
                user_token: token.into_iter().find(|token| !token.is_empty()).unwrap_or_default(),
            }));
        }
        let [code, secret, token] =
            [text(&self.code)?, text(&self.secret)?, text(&self.token)?].map(Option::unwrap_or_default);
        if code.is_empty() && secret.is_empty() && token.is_empty() {
            return Ok(None);
        }
        Ok(Some(Credentials {
            app_code: code.to_owned(),
            app_secret: secret.to_owned(),
            user_token: token.to_owned(),
        }))
    }
}

/// Credentials that cannot be anybody's.
struct Unreadable;

/// Asks, and says for how long the service itself lets the verdict stand.
async fn question(client: &HttpClient, uri: Uri, shown: &Credentials) -> (Verdict, Option<Duration>) {
    let body = json!({
        "app_code": shown.app_code, "app_secret": shown.app_secret, "user_token": shown.user_token,
    });
    let mut question = Request::new(Bytes::from(body.to_string()));
    *question.method_mut() = http::Method::POST;
    *question.uri_mut() = uri;
    question.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let answer = match client.call(question).await {
        Ok(answer) => answer,
        Err(error) => {
            tracing::warn!(%error, "jwt-issue: the authentication service gives no answer");
            return (Verdict::Nothing, None);
        }
    };
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return (Verdict::Refused, None),
        status => {
            tracing::warn!(%status, "jwt-issue: the authentication service gives no verdict");
            return (Verdict::Nothing, None);
        }
    }
    let Ok(said) = serde_json::from_slice::<Value>(answer.body()) else {
        tracing::warn!("jwt-issue: the authentication service answers something that is no JSON");
        return (Verdict::Nothing, None);
    };
    let name = |of: &str, name: &str| {
        let of = said.get(of)?;
        let verified = of.get("verified").is_none_or(|verified| verified == &Value::Bool(true));
        of.get(name)?.as_str().filter(|text| verified && !text.is_empty()).map(Arc::from)
    };
    let verdict = match (name("app", "app_code"), name("user", "username")) {
        (None, None) => Verdict::Refused,
        (app, user) => Verdict::Known { app, user },
    };
    let limit = said.get("expires_in").and_then(Value::as_u64).map(Duration::from_secs);
    (verdict, limit)
}
