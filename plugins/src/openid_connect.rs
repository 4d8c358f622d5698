//! `openid-connect`: logs users in at an identity provider, or checks the bearer tokens that it gives out.
//!
//! Phase: `rewrite`; cookies that change in passing go out with the answer. A session is sealed; a login on its way is
//! bound to the browser, the provider, the client and the callback by state and nonce. When the provider cannot be
//! asked, the request is refused.

mod provider;
mod session;
mod settings;

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use config::error::ConfigError;
use config::fields::Int;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Uri, header};
use layers::body::Body;
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, OnResponse, RewriteWaits};
use layers::vars::argument;
use serde_json::{Map, Value, json};

use self::provider::{ClientAuth, Document, Identity, Provider, Trouble, endpoint, form, includes, now, timely};
use self::session::{Login, Session, Sessions};
pub use self::settings::Config;
use self::settings::{AudienceRule, SameSite, SessionConfig, Storage, Unauthenticated};
use crate::support::answers::{self, Answers};
use crate::support::http_call::{self, HttpClient};
use crate::support::consumer::ExternalUser;
use crate::support::identity::User;
use crate::support::jwk::{self, KeySet};
use crate::support::jwt::{Algorithm, Key, Token};
use crate::support::redis::{self, Redis, Servers, Tls};
use crate::support::reply::Canned;
use crate::support::seal::Sealer;
use crate::support::headers;

/// Where the provider sends a browser back to, below the path that was asked for.
const CALLBACK: &str = "/.apisix/redirect";
/// Introspections that are kept.
const INTROSPECTIONS: usize = 10_000;
/// How long a refused token is refused without a question.
const REFUSED: Duration = Duration::from_secs(5);
/// How long new tokens serve requests that still come with the old session.
const RENEWED: Duration = Duration::from_secs(30);
/// The longest bearer token.
const MAX_TOKEN: usize = 16 * 1024;

const X_ACCESS_TOKEN: HeaderName = HeaderName::from_static("x-access-token");
const X_USERINFO: HeaderName = HeaderName::from_static("x-userinfo");
const X_ID_TOKEN: HeaderName = HeaderName::from_static("x-id-token");
const X_REFRESH_TOKEN: HeaderName = HeaderName::from_static("x-refresh-token");
const X_RAW_ID_TOKEN: HeaderName = HeaderName::from_static("x-raw-id-token");

/// The plugin.
pub struct OpenidConnect {
    provider: Arc<Provider>,
    identity: Identity,
    token_auth: ClientAuth,
    sessions: Option<Sessions>,
    bearer: Option<Bearer>,
    bearer_only: bool,
    action: Unauthenticated,
    scope: Box<str>,
    parameters: Box<[(String, String)]>,
    pkce: bool,
    callback: Option<Box<str>>,
    logout: Box<str>,
    after_logout: Option<Box<str>>,
    revoke: bool,
    algorithm: Option<Algorithm>,
    slack: u64,
    renew: bool,
    leeway: u64,
    lasts: Option<u64>,
    renewals: Answers<Result<Arc<Renewed>, Trouble>>,
    scopes: Box<[String]>,
    schema: Option<jsonschema::Validator>,
    realm: Box<str>,
    tell: Tell,
    unavailable: Canned,
    failed: Canned,
    denied: Canned,
    lost: Canned,
}

/// What the upstream is told.
struct Tell {
    access: bool,
    authorization: bool,
    id: bool,
    raw: bool,
    user: bool,
    refresh: bool,
}

/// How bearer tokens are checked.
struct Bearer {
    how: Check,
    issuers: Option<Vec<String>>,
    audience: Option<AudienceRule>,
}

enum Check {
    Key(KeySet),
    Keys,
    Introspection {
        endpoint: Option<Uri>,
        auth: ClientAuth,
        interval: Duration,
        expiry: Box<str>,
        along: Box<[HeaderName]>,
        answers: Answers<Result<Arc<Map<String, Value>>, Trouble>>,
    },
}

/// Tokens that came of a refresh token.
struct Renewed {
    id_token: Option<String>,
    access_token: String,
    refresh_token: Option<String>,
    expires: Option<u64>,
}

/// Cookies that go out with the answer.
#[derive(Default)]
struct Cookies(Vec<HeaderValue>);

/// What an expected algorithm has to be.
fn algorithm(config: &Config) -> Result<Option<Algorithm>, ConfigError> {
    let Some(name) = &config.token_signing_alg_values_expected else { return Ok(None) };
    let pointer = "/token_signing_alg_values_expected";
    let words = "name one of RS256 to RS512, PS256 to PS512, ES256 to ES512, EdDSA: a shared secret signs nothing here";
    jwk::asymmetric(name).map(Some).ok_or_else(|| ConfigError::invalid(pointer, words))
}

fn claim_schema(config: &Config) -> Result<Option<jsonschema::Validator>, ConfigError> {
    let compiled = config.claim_schema.as_ref().map(|schema| {
        jsonschema::validator_for(&Value::Object(schema.clone()))
            .map_err(|error| ConfigError::invalid("/claim_schema", error.to_string()))
    });
    compiled.transpose()
}

fn public_key(config: &Config) -> Result<Option<KeySet>, ConfigError> {
    let Some(pem) = &config.public_key else { return Ok(None) };
    let kinds = match algorithm(config)? {
        Some(one) => vec![one],
        None => {
            let names = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"];
            names.into_iter().filter_map(jwk::asymmetric).collect()
        }
    };
    let keys: Vec<_> = kinds.into_iter().filter_map(|kind| Key::public(kind, pem).ok()).collect();
    let words = "this is no public key in PEM for the algorithm that is expected";
    if keys.is_empty() { Err(ConfigError::invalid("/public_key", words)) } else { Ok(Some(KeySet::of(keys))) }
}

/// Whether an object switches something on.
fn is_on(object: Option<&Map<String, Value>>) -> bool {
    object.is_some_and(|object| object.get("enabled") != Some(&Value::Bool(false)) && !object.is_empty())
}

fn is_target(text: &str) -> bool {
    http_call::url(text, "").is_ok() || (text.starts_with('/') && !text.starts_with("//") && Uri::try_from(text).is_ok())
}

impl Definition for OpenidConnect {
    const NAME: &'static str = "openid-connect";
    const PRIORITY: i32 = 2599;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let mut refuse = |wrong: bool, pointer: &str, words: &str| {
            if wrong {
                errors.push(ConfigError::invalid(pointer, words));
            }
        };
        refuse(config.proxy_opts.is_some(), "/proxy_opts", "the provider is asked without a proxy; take it out");
        refuse(config.accept_none_alg, "/accept_none_alg", "tokens without a signature are not taken");
        refuse(config.force_reauthorize, "/force_reauthorize", "a login for every request is not offered");
        refuse(
            config.refresh_session_interval.is_some(),
            "/refresh_session_interval",
            "ID tokens are not refreshed in the background; take it out",
        );
        refuse(is_on(config.par.as_ref()), "/par", "pushed authorization requests are not offered; take it out");
        refuse(is_on(config.dpop.as_ref()), "/dpop", "proofs of possession are not offered; take it out");
        refuse(
            config.client_rsa_private_key.is_some(),
            "/client_rsa_private_key",
            "`private_key_jwt` is not offered: use client_secret_basic or client_secret_post",
        );
        refuse(
            !config.bearer_only && config.session.is_none(),
            "/session",
            "`session.secret` is required when `bearer_only` is false",
        );
        let secretless = if config.bearer_only { config.public_key.is_some() || config.use_jwks } else { config.use_pkce };
        refuse(!secretless && config.client_secret.is_none(), "/client_secret", "`client_secret` is required");
        refuse(
            config.realm.contains(['"', '\\']) || HeaderValue::try_from(&config.realm).is_err(),
            "/realm",
            "a realm has neither quotes nor control characters",
        );
        refuse(!config.logout_path.starts_with('/'), "/logout_path", "a path begins with `/`");
        for (target, pointer) in [
            (&config.redirect_uri, "/redirect_uri"),
            (&config.post_logout_redirect_uri, "/post_logout_redirect_uri"),
        ] {
            let wrong = target.as_deref().is_some_and(|target| !is_target(target));
            refuse(wrong, pointer, "write a URL of the form http(s)://host[:port]/path, or a path");
        }
        if let Some(session) = &config.session {
            let token = |text: &str| {
                !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.!#$%&'*+^`|~".contains(&b))
            };
            refuse(!token(&session.cookie_name), "/session/cookie_name", "this is no name of a cookie");
            let plain = |text: &str| text.bytes().all(|b| b.is_ascii_graphic() && b != b';');
            refuse(!plain(&session.cookie_path), "/session/cookie_path", "this is no path of a cookie");
            let domain = session.cookie_domain.as_deref().unwrap_or_default();
            refuse(!plain(domain), "/session/cookie_domain", "this is no domain of a cookie");
            let needs = session.storage == Storage::Redis && session.redis.is_none();
            refuse(needs, "/session/redis", "`redis` is required when `storage` is redis");
            let named = session.redis.as_ref().is_some_and(|redis| redis.server_name.is_some());
            refuse(named, "/session/redis/server_name", "the certificate has to be of `host`; take it out");
        }
        errors.extend(http_call::url(&config.discovery, "/discovery").err());
        let introspection = config.introspection_endpoint.as_deref();
        errors.extend(introspection.and_then(|uri| http_call::url(uri, "/introspection_endpoint").err()));
        errors.extend(algorithm(config).err());
        errors.extend(public_key(config).err());
        errors.extend(claim_schema(config).err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        // Stored configurations may still hold milliseconds, as APISIX once wrote them.
        let timeout = config.timeout.get();
        let timeout = if timeout >= 1_000 && timeout.is_multiple_of(1_000) { timeout } else { timeout.saturating_mul(1_000) };
        let settings = http_call::Settings::of(config.ssl_verify, timeout.min(60_000), Some((16, 60_000)));
        let client = HttpClient::new(&settings, env)?;
        let discovery = http_call::url(&config.discovery, "/discovery")?;
        let ttl = Duration::from_secs(config.jwk_expires_in.get().into());
        let key = format!("openid-connect/{discovery}/{settings:?}/{ttl:?}");
        let provider = env.carry.get_or(&key, || Provider::new(client, discovery, ttl, env.control));
        let identity = Identity {
            id: config.client_id.as_str().into(),
            secret: config.client_secret.as_ref().map(|secret| secret.reveal().into()),
        };
        let sessions = config.session.as_ref().filter(|_| !config.bearer_only);
        let sessions = sessions.map(|session| open_sessions(&config, session, env)).transpose()?;
        let schema = claim_schema(&config)?;
        let parameter = |(name, value): (&String, &Value)| {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            (name.clone(), text)
        };
        let plugin = Arc::new(Self {
            provider,
            identity,
            token_auth: config.token_endpoint_auth_method.auth(),
            sessions,
            bearer: bearer(&config, env)?,
            bearer_only: config.bearer_only,
            action: config.unauth_action,
            parameters: config.authorization_params.iter().map(parameter).collect(),
            pkce: config.use_pkce,
            callback: config.redirect_uri.as_deref().map(Into::into),
            after_logout: config.post_logout_redirect_uri.as_deref().map(Into::into),
            revoke: config.revoke_tokens_on_logout,
            algorithm: algorithm(&config)?,
            slack: config.iat_slack.get().into(),
            renew: config.renew_access_token_on_expiry,
            leeway: config.access_token_expires_leeway.get().into(),
            lasts: config.access_token_expires_in.map(|seconds| seconds.get().into()),
            renewals: Answers::new(INTROSPECTIONS, env.control),
            scopes: config.required_scopes.unwrap_or_default().into(),
            schema,
            tell: Tell {
                access: config.set_access_token_header,
                authorization: config.access_token_in_authorization_header,
                id: config.set_id_token_header,
                raw: config.set_raw_id_token_header,
                user: config.set_userinfo_header,
                refresh: config.set_refresh_token_header,
            },
            scope: config.scope.into(),
            logout: config.logout_path.into(),
            realm: config.realm.into(),
            unavailable: Canned::status(StatusCode::SERVICE_UNAVAILABLE),
            failed: Canned::status(StatusCode::INTERNAL_SERVER_ERROR),
            denied: Canned::status(StatusCode::UNAUTHORIZED),
            lost: Canned::message(StatusCode::BAD_REQUEST, "The login was not begun here, or took too long"),
        });
        hooks.rewrite_waits(&plugin);
        if plugin.sessions.is_some() {
            hooks.response(&plugin);
        }
        Ok(())
    }
}

fn bearer(config: &Config, env: &BuildEnv<'_>) -> Result<Option<Bearer>, ConfigError> {
    let introspected = config.bearer_only || config.introspection_endpoint.is_some();
    let how = match public_key(config)? {
        Some(key) => Check::Key(key),
        None if config.use_jwks => Check::Keys,
        None if !introspected => return Ok(None),
        None => {
            let along = config.introspection_addon_headers.iter().flat_map(|names| names.iter().enumerate());
            let along = along.map(|(index, name)| {
                let pointer = format!("/introspection_addon_headers/{index}");
                headers::name(name, "").map_err(|error| ConfigError::new(pointer, error.kind))
            });
            let endpoint = config.introspection_endpoint.as_deref();
            Check::Introspection {
                endpoint: endpoint.map(|uri| http_call::url(uri, "/introspection_endpoint")).transpose()?,
                auth: config.introspection_endpoint_auth_method.auth(),
                interval: Duration::from_secs(config.introspection_interval.get().into()),
                expiry: config.introspection_expiry_claim.as_str().into(),
                along: along.collect::<Result<_, _>>()?,
                answers: Answers::new(INTROSPECTIONS, env.control),
            }
        }
    };
    let rules = config.claim_validator.clone().unwrap_or_default();
    Ok(Some(Bearer {
        how,
        issuers: rules.issuer.and_then(|issuer| issuer.valid_issuers),
        audience: rules.audience,
    }))
}

fn open_sessions(
    config: &Config,
    session: &SessionConfig,
    env: &BuildEnv<'_>,
) -> Result<Sessions, ConfigError> {
    // A session or login of another provider or client is none of this one's, whoever shares the secret.
    let purpose = format!("{}\n{}", config.discovery, config.client_id);
    let sealer = Sealer::new(session.secret.reveal().as_bytes(), &purpose)
        .ok_or_else(|| ConfigError::invalid("/session/secret", "no key can be made of it"))?;
    let mut attributes = format!("; Path={}", session.cookie_path);
    if let Some(domain) = &session.cookie_domain {
        attributes.push_str("; Domain=");
        attributes.push_str(domain);
    }
    if session.cookie_http_only {
        attributes.push_str("; HttpOnly");
    }
    attributes.push_str(match session.cookie_same_site {
        SameSite::Strict => "; SameSite=Strict",
        SameSite::Lax => "; SameSite=Lax",
        SameSite::None => "; SameSite=None",
        SameSite::Default => "",
    });
    let redis = match (&session.redis, session.storage) {
        (Some(config), Storage::Redis) => {
            let settings = redis::Settings {
                servers: Servers::One(config.host.clone(), u16::try_from(config.port.get()).unwrap_or(6_379)),
                username: config.username.clone(),
                password: config.password.clone(),
                database: config.database.get(),
                timeout: Duration::from_millis(config.read_timeout.get().into()),
                tls: Tls::of(config.ssl, config.ssl_verify),
            };
            let redis = Redis::open(&settings, env).map_err(|error| error.under("/session/redis"))?;
            Some((redis, config.prefix.as_str().into()))
        }
        _ => None,
    };
    let old = session.cookie.as_ref().and_then(|cookie| cookie.lifetime);
    let absolute = session.absolute_timeout.or(old).map_or(86_400, Int::get);
    let limits = [session.idling_timeout.get(), session.rolling_timeout.get()];
    Ok(Sessions {
        sealer,
        name: session.cookie_name.as_str().into(),
        attributes: attributes.into(),
        secure: session.cookie_secure,
        idle: limits.into_iter().filter_map(session::limit).min(),
        absolute: session::limit(absolute),
        redis,
    })
}

/// The scheme that the client speaks, as far as we know and trust.
fn scheme(x: &State) -> &str {
    let told = x.request.headers.get("x-forwarded-proto").and_then(|proto| proto.to_str().ok());
    let told = told.and_then(|proto| proto.split(',').next()).map(str::trim);
    if told.unwrap_or_else(|| x.conn.scheme()).eq_ignore_ascii_case("https") { "https" } else { "http" }
}

fn redirect(to: &str, cookies: Vec<HeaderValue>) -> Option<Flow> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::FOUND;
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, HeaderValue::try_from(to).ok()?);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    for cookie in cookies {
        headers.append(header::SET_COOKIE, cookie);
    }
    Some(Flow::Reply(response))
}

/// A path of this site, whatever the client wrote: no `//host` and no `/\host`.
fn local(target: &str) -> &str {
    let path = target.strip_prefix('/').is_some_and(|rest| !rest.starts_with(['/', '\\']));
    if path { target } else { "/" }
}

fn set(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    match HeaderValue::try_from(text) {
        Ok(value) => {
            headers.insert(name, value);
        }
        Err(_) => tracing::warn!(%name, "openid-connect: a value fits no field and is not sent"),
    }
}

fn json_field(claims: &Map<String, Value>) -> String {
    STANDARD.encode(serde_json::to_string(claims).unwrap_or_default())
}

fn text<'a>(said: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    said.get(name).and_then(Value::as_str).filter(|text| !text.is_empty())
}

impl OnResponse for OpenidConnect {
    fn response(&self, x: &mut Exchange) {
        if x.slot::<Cookies>().is_none() {
            return;
        }
        let cookies = x.slot_mut::<Cookies>().map(std::mem::take).unwrap_or_default();
        for cookie in cookies.0 {
            x.response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }
}

impl RewriteWaits for OpenidConnect {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        let shown = x.request.headers.remove(X_ACCESS_TOKEN);
        for name in [X_USERINFO, X_ID_TOKEN, X_REFRESH_TOKEN, X_RAW_ID_TOKEN] {
            x.request.headers.remove(name);
        }
        if let Some(sessions) = &self.sessions
            && x.request.uri.path() == &*self.logout
        {
            return self.log_out(sessions, x).await;
        }
        if let Some(bearer) = &self.bearer {
            match token(&x.request.headers, shown.as_ref()) {
                Ok(Some(token)) => return self.check(bearer, x, token).await,
                Ok(None) if self.bearer_only => return self.refuse(None),
                Ok(None) => {}
                Err(Malformed) => return Canned::status(StatusCode::BAD_REQUEST).flow(),
            }
        }
        let Some(sessions) = &self.sessions else { return self.refuse(None) };
        match self.of_session(sessions, x).await {
            Ok(flow) => flow,
            Err(Trouble::Provider(why)) => {
                tracing::error!(host = %x.host, %why, "openid-connect: the provider cannot be asked");
                self.unavailable.flow()
            }
            Err(Trouble::Invalid(why)) => {
                tracing::warn!(host = %x.host, %why, "openid-connect: the login failed");
                self.failed.flow()
            }
        }
    }
}

/// An `Authorization` that is not of the form `scheme credentials`.
struct Malformed;

/// The bearer token of a request, as APISIX finds it: `Authorization`, and where that is missing `X-Access-Token`.
fn token(headers: &HeaderMap, shown: Option<&HeaderValue>) -> Result<Option<String>, Malformed> {
    let read = |value: &HeaderValue| value.to_str().map(str::to_owned).map_err(|_| Malformed);
    let Some(field) = headers.get(header::AUTHORIZATION) else { return shown.map(read).transpose() };
    let field = read(field)?;
    let (kind, token) = field.split_once(' ').ok_or(Malformed)?;
    Ok(kind.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned()))
}

impl OpenidConnect {
    fn refuse(&self, error: Option<&str>) -> Flow {
        let realm = &self.realm;
        let challenge = match error {
            None => format!("Bearer realm=\"{realm}\""),
            Some(error) => {
                let error: String = error.chars().filter(|c| c.is_ascii() && !c.is_control() && !"\"\\".contains(*c)).collect();
                format!("Bearer realm=\"{realm}\", error=\"invalid_token\", error_description=\"{error}\"")
            }
        };
        match HeaderValue::try_from(challenge) {
            Ok(challenge) => self.denied.clone().header(header::WWW_AUTHENTICATE, challenge).flow(),
            Err(_) => self.denied.flow(),
        }
    }

    /// Checks a bearer token and tells the upstream what it says.
    async fn check(&self, bearer: &Bearer, x: &mut Exchange, token: String) -> Flow {
        let claims = match self.claims(bearer, x, &token).await {
            Ok(claims) => claims,
            Err(Trouble::Invalid(why)) => {
                tracing::warn!(host = %x.host, %why, "openid-connect: a bearer token is refused");
                return self.refuse(Some(&why));
            }
            Err(Trouble::Provider(why)) => {
                tracing::error!(host = %x.host, %why, "openid-connect: the provider cannot be asked");
                return self.unavailable.flow();
            }
        };
        if let Some(flow) = self.lacks_scopes(text(&claims, "scope")) {
            return flow;
        }
        if let Some(rule) = &bearer.audience {
            let audience = claims.get(&rule.claim);
            // A token for nobody in particular is not for this client.
            let error = if (rule.required || rule.match_with_client_id) && audience.is_none() {
                Some("required audience claim not present")
            } else if rule.match_with_client_id && !includes(audience, &self.identity.id) {
                Some("mismatched audience")
            } else {
                None
            };
            if let Some(error) = error {
                return Canned::json(StatusCode::FORBIDDEN, &json!({ "error": error })).flow();
            }
        }
        if let Some(schema) = &self.schema
            && let Err(error) = schema.validate(&Value::Object((*claims).clone()))
        {
            return self.refuse(Some(&error.to_string()));
        }
        self.tell_access(x, &token);
        if self.tell.user {
            set(&mut x.request.headers, X_USERINFO, &json_field(&claims));
        }
        if let Some(user) = text(&claims, "sub").or_else(|| text(&claims, "username")) {
            x.put_slot(User(user.into()));
        }
        x.put_slot(ExternalUser(claims));
        Flow::Next
    }

    fn tell_access(&self, x: &mut State, token: &str) {
        if self.tell.access && self.tell.authorization {
            set(&mut x.request.headers, header::AUTHORIZATION, &format!("Bearer {token}"));
        } else if self.tell.access {
            set(&mut x.request.headers, X_ACCESS_TOKEN, token);
        }
    }

    /// The refusal of a token that lacks a scope.
    fn lacks_scopes(&self, granted: Option<&str>) -> Option<Flow> {
        let has = |scope: &str| granted.is_some_and(|all| all.split_ascii_whitespace().any(|one| one == scope));
        if self.scopes.iter().all(|scope| has(scope)) {
            return None;
        }
        let error = format!("required scopes {} not present", self.scopes.join(", "));
        Some(Canned::json(StatusCode::FORBIDDEN, &json!({ "error": error })).flow())
    }

    async fn claims(&self, bearer: &Bearer, x: &State, token: &str) -> Result<Arc<Map<String, Value>>, Trouble> {
        if token.len() > MAX_TOKEN {
            return Err(Trouble::invalid("the token is too long"));
        }
        let claims = match &bearer.how {
            Check::Introspection { endpoint, auth, interval, expiry, along, answers } => {
                let more = provider::along(&x.request.headers, along);
                let mut parts = vec![token.as_bytes()];
                parts.extend(more.values().map(HeaderValue::as_bytes));
                let key = answers::key(&parts);
                let (provider, identity) = (self.provider.clone(), self.identity.clone());
                let (endpoint, auth, interval, expiry) = (endpoint.clone(), *auth, *interval, expiry.clone());
                let asked = token.to_owned();
                let ask = move || async move {
                    let said = introspect(&provider, endpoint, &asked, &identity, auth, &more).await;
                    let good = match &said {
                        Ok(said) => kept_for(said, &expiry, interval),
                        Err(Trouble::Invalid(_)) => Some(REFUSED),
                        Err(Trouble::Provider(_)) => None,
                    };
                    (said.map(Arc::new), good)
                };
                let said = answers.get(key, ask).await;
                let said = said.unwrap_or_else(|| Err(Trouble::provider("too many introspections on their way")))?;
                let issuer = text(&said, "iss");
                let known = |issuers: &Vec<String>| issuers.iter().any(|one| Some(one.as_str()) == issuer);
                // Without a list, whoever is asked vouches for the token.
                if !bearer.issuers.as_ref().is_none_or(known) {
                    return Err(Trouble::invalid("Claim 'iss' returned failure"));
                }
                return Ok(said);
            }
            Check::Key(key) => {
                let token = Token::parse(token).ok_or_else(|| Trouble::invalid("invalid jwt"))?;
                if !key.signed(&token, self.algorithm) {
                    return Err(Trouble::invalid("jwt signature verification failed"));
                }
                token.into_claims()
            }
            Check::Keys => self.provider.signed(token, self.algorithm).await?,
        };
        match &bearer.issuers {
            Some(issuers) => timely(&claims, &issuers.iter().map(String::as_str).collect::<Vec<_>>())?,
            None => timely(&claims, &[&self.provider.document().await?.issuer])?,
        }
        Ok(Arc::new(claims))
    }

    /// What becomes of a request that shows no bearer token.
    async fn of_session(&self, sessions: &Sessions, x: &mut Exchange) -> Result<Flow, Trouble> {
        let tls = scheme(x) == "https";
        let callback = self.callback(x);
        let path = callback.1;
        if x.request.uri.path() == path {
            return self.finish(sessions, x, &callback.0, tls).await;
        }
        let Some(mut session) = sessions.read(&x.request.headers).await? else {
            return self.nobody(sessions, x, &callback.0, tls).await;
        };
        let ends = session.expires.is_some_and(|at| now().saturating_add(self.leeway) >= at);
        let mut changed = sessions.is_due(&session);
        if ends && self.renew && session.refresh_token.is_some() {
            match self.renewed(&session).await {
                Ok(tokens) => {
                    session.access_token = Some(tokens.access_token.clone());
                    session.expires = tokens.expires;
                    if let Some(id_token) = &tokens.id_token {
                        session.id_token.clone_from(id_token);
                    }
                    if tokens.refresh_token.is_some() {
                        session.refresh_token.clone_from(&tokens.refresh_token);
                    }
                    changed = true;
                }
                Err(Trouble::Invalid(why)) => {
                    tracing::info!(host = %x.host, %why, "openid-connect: a session cannot be renewed");
                    return self.nobody(sessions, x, &callback.0, tls).await;
                }
                Err(trouble) => return Err(trouble),
            }
        } else if ends {
            return self.nobody(sessions, x, &callback.0, tls).await;
        }
        let token = Token::parse(&session.id_token).ok_or_else(|| Trouble::invalid("a session without an ID token"))?;
        let claims = token.into_claims();
        if let Some(flow) = self.unfit(&session, &claims) {
            return Ok(flow);
        }
        if changed {
            let cookies = sessions.write(&mut session, &x.request.headers, tls).await?;
            x.put_slot(Cookies(cookies));
        }
        self.tell(x, &session, &claims);
        x.put_slot(ExternalUser(session.user.unwrap_or(claims).into()));
        Ok(Flow::Next)
    }

    /// Checks scopes and claims of a session.
    fn unfit(&self, session: &Session, claims: &Map<String, Value>) -> Option<Flow> {
        if !self.scopes.is_empty() {
            let access = session.access_token.as_deref().and_then(Token::parse).map(Token::into_claims);
            let granted = access.as_ref().and_then(|claims| text(claims, "scope")).or_else(|| text(claims, "scope"));
            if let Some(flow) = self.lacks_scopes(granted) {
                return Some(flow);
            }
        }
        let schema = self.schema.as_ref()?;
        let whole = json!({"user": session.user, "access_token": session.access_token, "id_token": claims});
        schema.validate(&whole).err().map(|error| self.refuse(Some(&error.to_string())))
    }

    fn tell(&self, x: &mut Exchange, session: &Session, claims: &Map<String, Value>) {
        if let Some(token) = &session.access_token {
            self.tell_access(x, token);
        }
        let headers = &mut x.request.headers;
        if self.tell.id {
            set(headers, X_ID_TOKEN, &json_field(claims));
        }
        if let Some(user) = session.user.as_ref().filter(|_| self.tell.user) {
            set(headers, X_USERINFO, &json_field(user));
        }
        if let Some(token) = session.refresh_token.as_ref().filter(|_| self.tell.refresh) {
            set(headers, X_REFRESH_TOKEN, token);
        }
        if self.tell.raw {
            set(headers, X_RAW_ID_TOKEN, &session.id_token);
        }
        if let Some(user) = text(claims, "sub") {
            x.put_slot(User(user.into()));
        }
    }

    /// Where the provider sends the browser back to: as a URL, and its path.
    fn callback(&self, x: &State) -> (String, String) {
        let path = match &self.callback {
            Some(target) if !target.starts_with('/') => {
                let path = Uri::try_from(&**target).map(|uri| uri.path().to_owned()).unwrap_or_default();
                return (target.to_string(), path);
            }
            Some(path) => path.to_string(),
            None => {
                let path = x.request.uri.path();
                if path.ends_with(CALLBACK) { path.to_owned() } else { format!("{}{CALLBACK}", path.trim_end_matches('/')) }
            }
        };
        let told = x.request.headers.get("x-forwarded-host").and_then(|host| host.to_str().ok());
        let host = told.map_or_else(|| x.authority().unwrap_or_default().into_owned(), str::to_owned);
        (format!("{}://{host}{path}", scheme(x)), path)
    }

    /// What becomes of a request of nobody.
    async fn nobody(&self, sessions: &Sessions, x: &Exchange, callback: &str, tls: bool) -> Result<Flow, Trouble> {
        match self.action {
            Unauthenticated::Pass => return Ok(Flow::Next),
            Unauthenticated::Deny => return Ok(self.denied.flow()),
            Unauthenticated::Auth => {}
        }
        let document = self.provider.document().await?;
        let endpoint = endpoint(document.authorization_endpoint.as_deref(), "authorization_endpoint")?;
        let login = Login {
            state: session::random()?,
            nonce: session::random()?,
            verifier: if self.pkce { Some(session::random()?) } else { None },
            target: local(x.request_uri()).to_owned(),
            redirect_uri: callback.to_owned(),
            begun: now(),
        };
        let challenge = login.verifier.as_ref().map(|verifier| {
            URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, verifier.as_bytes()))
        });
        let mut fields = vec![
            ("response_type", "code"),
            ("client_id", &*self.identity.id),
            ("scope", &*self.scope),
            ("redirect_uri", callback),
            ("state", &login.state),
            ("nonce", &login.nonce),
        ];
        if let Some(challenge) = &challenge {
            fields.extend([("code_challenge", challenge.as_str()), ("code_challenge_method", "S256")]);
        }
        fields.extend(self.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let separator = if endpoint.query().is_some() { '&' } else { '?' };
        let cookies = sessions.begin(&login, &x.request.headers, tls)?;
        redirect(&format!("{endpoint}{separator}{}", form(&fields)), cookies)
            .ok_or_else(|| Trouble::provider("the authorization endpoint fits no field"))
    }

    /// The browser comes back from the provider.
    async fn finish(&self, sessions: &Sessions, x: &mut Exchange, callback: &str, tls: bool) -> Result<Flow, Trouble> {
        let query = x.request.uri.query().unwrap_or_default().to_owned();
        let shown = |name: &str| argument(&query, name).map(std::borrow::Cow::into_owned);
        let state = shown("state").unwrap_or_default();
        let Some((login, forget)) = sessions.finish(&state, &x.request.headers, tls) else {
            return Ok(self.lost.flow());
        };
        // A login of one callback is not finished at another.
        if login.redirect_uri != callback {
            return Ok(self.lost.flow());
        }
        let document = self.provider.document().await?;
        // RFC 9207: the answer says whose it is.
        let issuer = shown("iss");
        let wrong = issuer.as_ref().is_some_and(|issuer| *issuer != document.issuer);
        if wrong || (issuer.is_none() && document.authorization_response_iss_parameter_supported) {
            return Err(Trouble::invalid("the answer is of another issuer"));
        }
        if let Some(error) = shown("error") {
            let what: String = error.chars().filter(|c| c.is_ascii_graphic()).take(64).collect();
            tracing::warn!(host = %x.host, error = what, "openid-connect: the provider refuses the login");
            let status = match &*what {
                "access_denied" => StatusCode::FORBIDDEN,
                "temporarily_unavailable" => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            let mut response = Canned::status(status).response();
            response.headers_mut().extend(forget.map(|cookie| (header::SET_COOKIE, cookie)));
            return Ok(Flow::Reply(response));
        }
        let code = shown("code").ok_or_else(|| Trouble::invalid("the provider gives no code"))?;
        let mut fields = vec![
            ("grant_type", "authorization_code"),
            ("code", &*code),
            ("redirect_uri", &*login.redirect_uri),
        ];
        fields.extend(login.verifier.as_deref().map(|verifier| ("code_verifier", verifier)));
        let target = endpoint(document.token_endpoint.as_deref(), "token_endpoint")?;
        let none = HeaderMap::new();
        let said = self.provider.ask(target, &fields, &self.identity, self.token_auth, &none).await?;
        let id_token = text(&said, "id_token").ok_or_else(|| Trouble::invalid("the provider gives no ID token"))?;
        let claims =
            verified(&self.provider, &document, id_token, &self.identity.id, self.algorithm, self.slack).await?;
        if text(&claims, "nonce") != Some(&*login.nonce) {
            return Err(Trouble::invalid("the ID token is of another login"));
        }
        let access_token = text(&said, "access_token").map(str::to_owned);
        let user = self.user(&document, access_token.as_deref(), &claims).await?;
        let mut session = Session {
            id_token: id_token.to_owned(),
            access_token,
            refresh_token: text(&said, "refresh_token").map(str::to_owned),
            user,
            expires: ends(&said, self.lasts),
            created: now(),
            used: now(),
            id: None,
        };
        let mut cookies = sessions.write(&mut session, &x.request.headers, tls).await?;
        cookies.extend(forget);
        redirect(local(&login.target), cookies).ok_or_else(|| Trouble::invalid("a target that fits no field"))
    }

    async fn user(
        &self,
        document: &Document,
        access_token: Option<&str>,
        claims: &Map<String, Value>,
    ) -> Result<Option<Map<String, Value>>, Trouble> {
        let (Some(uri), Some(token)) = (&document.userinfo_endpoint, access_token) else { return Ok(None) };
        if !self.tell.user && self.schema.is_none() {
            return Ok(None);
        }
        let user = self.provider.userinfo(endpoint(Some(uri), "userinfo_endpoint")?, token).await?;
        // Otherwise the answer may be of another user, OpenID Connect Core 5.3.2.
        if text(&user, "sub") == text(claims, "sub") {
            Ok(Some(user))
        } else {
            Err(Trouble::invalid("userinfo is of another user"))
        }
    }

    /// New tokens for a session. Requests that come at once with the same session ask once.
    async fn renewed(&self, session: &Session) -> Result<Arc<Renewed>, Trouble> {
        let refresh_token = session.refresh_token.clone().unwrap_or_default();
        let subject = Token::parse(&session.id_token).and_then(|token| text(token.claims(), "sub").map(str::to_owned));
        let key = answers::key(&[refresh_token.as_bytes()]);
        let (provider, identity) = (self.provider.clone(), self.identity.clone());
        let (auth, algorithm, slack, lasts) = (self.token_auth, self.algorithm, self.slack, self.lasts);
        let ask = move || async move {
            let renew = async {
                let document = provider.document().await?;
                let target = endpoint(document.token_endpoint.as_deref(), "token_endpoint")?;
                let fields = [("grant_type", "refresh_token"), ("refresh_token", refresh_token.as_str())];
                let said = provider.ask(target, &fields, &identity, auth, &HeaderMap::new()).await?;
                let id_token = text(&said, "id_token").map(str::to_owned);
                if let Some(token) = &id_token {
                    let claims = verified(&provider, &document, token, &identity.id, algorithm, slack).await?;
                    if text(&claims, "sub") != subject.as_deref() {
                        return Err(Trouble::invalid("the new ID token is of another user"));
                    }
                }
                let access_token = text(&said, "access_token")
                    .ok_or_else(|| Trouble::invalid("the provider gives no access token"))?;
                Ok(Arc::new(Renewed {
                    id_token,
                    access_token: access_token.to_owned(),
                    refresh_token: text(&said, "refresh_token").map(str::to_owned),
                    expires: ends(&said, lasts),
                }))
            };
            let tokens = renew.await;
            let good = tokens.is_ok().then_some(RENEWED);
            (tokens, good)
        };
        self.renewals.get(key, ask).await.unwrap_or_else(|| Err(Trouble::provider("too many renewals on their way")))
    }

    /// Ends the session.
    async fn log_out(&self, sessions: &Sessions, x: &mut Exchange) -> Flow {
        let tls = scheme(x) == "https";
        let session = sessions.read(&x.request.headers).await.ok().flatten();
        let cookies = sessions.end(session.as_ref(), &x.request.headers, tls).await;
        let document = match self.provider.document().await {
            Ok(document) => document,
            Err(error) => {
                tracing::error!(%error, "openid-connect: the provider cannot be asked at a logout");
                let mut response = self.unavailable.response();
                response.headers_mut().extend(cookies.into_iter().map(|cookie| (header::SET_COOKIE, cookie)));
                return Flow::Reply(response);
            }
        };
        if let Some(session) = session.as_ref().filter(|_| self.revoke) {
            self.revoke(&document, session).await;
        }
        let after = self.after_logout.as_deref();
        let target = match &document.end_session_endpoint {
            Some(endpoint) => {
                let mut fields = vec![("client_id", &*self.identity.id)];
                if let Some(session) = &session {
                    fields.push(("id_token_hint", &session.id_token));
                }
                fields.extend(after.map(|after| ("post_logout_redirect_uri", after)));
                let separator = if endpoint.contains('?') { '&' } else { '?' };
                Some(format!("{endpoint}{separator}{}", form(&fields)))
            }
            None => after.map(str::to_owned),
        };
        if let Some(flow) = target.and_then(|target| redirect(&target, cookies.clone())) {
            return flow;
        }
        let mut response = Response::new(Body::from("<html><body>Logged Out</body></html>"));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        headers.extend(cookies.into_iter().map(|cookie| (header::SET_COOKIE, cookie)));
        Flow::Reply(response)
    }

    async fn revoke(&self, document: &Document, session: &Session) {
        let Ok(target) = endpoint(document.revocation_endpoint.as_deref(), "revocation_endpoint") else { return };
        for (token, kind) in [(&session.refresh_token, "refresh_token"), (&session.access_token, "access_token")] {
            let Some(token) = token else { continue };
            let fields = [("token", token.as_str()), ("token_type_hint", kind)];
            let none = HeaderMap::new();
            let asked = self.provider.ask(target.clone(), &fields, &self.identity, self.token_auth, &none).await;
            if let Err(error) = asked {
                tracing::warn!(%error, kind, "openid-connect: a token is not revoked");
            }
        }
    }
}

/// When the access token of an answer ends.
fn ends(said: &Map<String, Value>, lasts: Option<u64>) -> Option<u64> {
    let seconds = said.get("expires_in").and_then(Value::as_u64).or(lasts)?;
    Some(now().saturating_add(seconds))
}

/// The claims of an ID token for this client.
async fn verified(
    provider: &Provider,
    document: &Document,
    token: &str,
    client: &str,
    only: Option<Algorithm>,
    slack: u64,
) -> Result<Map<String, Value>, Trouble> {
    let claims = provider.signed(token, only).await?;
    timely(&claims, &[&document.issuer])?;
    let audience = claims.get("aud");
    let party = text(&claims, "azp");
    let several = audience.and_then(Value::as_array).is_some_and(|all| all.len() > 1);
    let other = party.is_some_and(|party| party != client) || (several && party.is_none());
    if !includes(audience, client) || other {
        return Err(Trouble::invalid("the ID token is for another client"));
    }
    let issued = claims.get("iat").and_then(Value::as_f64);
    if issued.is_none_or(|at| at > (now().saturating_add(slack)) as f64) {
        return Err(Trouble::invalid("the ID token is of the future"));
    }
    Ok(claims)
}

async fn introspect(
    provider: &Provider,
    endpoint_set: Option<Uri>,
    token: &str,
    identity: &Identity,
    auth: ClientAuth,
    more: &HeaderMap,
) -> Result<Map<String, Value>, Trouble> {
    let target = match endpoint_set {
        Some(target) => target,
        None => {
            let document = provider.document().await?;
            endpoint(document.introspection_endpoint.as_deref(), "introspection_endpoint")?
        }
    };
    let fields = [("token", token), ("token_type_hint", "access_token")];
    // A refusal here is of this client, not of the token.
    let said = provider.ask(target, &fields, identity, auth, more).await.map_err(|trouble| match trouble {
        Trouble::Invalid(why) => Trouble::Provider(why),
        other => other,
    })?;
    if said.get("active").and_then(Value::as_bool) != Some(true) {
        return Err(Trouble::invalid("invalid token"));
    }
    let ended = said.get("exp").and_then(Value::as_f64).is_some_and(|at| at <= now() as f64);
    if ended { Err(Trouble::invalid("'exp' claim expired")) } else { Ok(said) }
}

/// How long an introspection is kept.
fn kept_for(said: &Map<String, Value>, expiry: &str, interval: Duration) -> Option<Duration> {
    let ends = said.get(expiry).and_then(Value::as_f64).filter(|at| at.is_finite() && *at > 0.0);
    let left = ends.map(|at| Duration::try_from_secs_f64(at).unwrap_or_default().saturating_sub(Duration::from_secs(now())));
    let interval = (!interval.is_zero()).then_some(interval);
    match (left, interval) {
        (Some(left), Some(interval)) => Some(left.min(interval)),
        (left, interval) => left.or(interval),
    }
    .filter(|kept| !kept.is_zero())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use bytes::Bytes;
    use layers::testing::{TestEnv, exchange, field, text as body};

    use super::*;
    use crate::support::peer::Peer;
    use crate::support::signing::{SigningKey, keys};

    /// A provider with these keys, which can be exchanged, and how often its key set was fetched.
    struct Fake {
        peer: Peer,
        keys: Arc<Mutex<Value>>,
        fetched: Arc<AtomicUsize>,
    }

    async fn fake(keys: &[&SigningKey]) -> Fake {
        let set = |keys: &[&SigningKey]| json!({"keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>()});
        let (keys, fetched) = (Arc::new(Mutex::new(set(keys))), Arc::new(AtomicUsize::new(0)));
        let (shown, count) = (keys.clone(), fetched.clone());
        let peer = Peer::start(move |request| {
            let host = request.headers()["host"].to_str().unwrap().to_owned();
            let answer = match request.uri().path() {
                "/doc" => json!({
                    "issuer": "https://issuer", "jwks_uri": format!("http://{host}/keys"),
                    "introspection_endpoint": format!("http://{host}/ask"),
                    "authorization_endpoint": format!("http://{host}/login?tenant=1"),
                }),
                "/keys" => {
                    count.fetch_add(1, Ordering::SeqCst);
                    shown.lock().unwrap().clone()
                }
                "/ask" => {
                    count.fetch_add(1, Ordering::SeqCst);
                    let form = String::from_utf8_lossy(request.body()).into_owned();
                    let token = argument(&form, "token").unwrap();
                    match &*token {
                        "good" => json!({"active": true, "sub": "ann", "exp": now() + 60}),
                        "issued" => json!({"active": true, "sub": "ann", "iss": "https://issuer", "exp": now() + 60}),
                        "old" => json!({"active": true, "exp": now() - 1}),
                        "odd" => return Response::new("<html>".into()),
                        "down" => return Response::builder().status(500).body(Bytes::new()).unwrap(),
                        _ => json!({"active": false}),
                    }
                }
                _ => return Response::builder().status(404).body(Bytes::new()).unwrap(),
            };
            Response::new(answer.to_string().into())
        })
        .await;
        Fake { peer, keys, fetched }
    }

    fn settings(fake: &Fake, more: Value) -> Value {
        let mut config = json!({"client_id": "shop", "client_secret": "s", "discovery": fake.peer.url("/doc"),
                                "bearer_only": true});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    fn with(token: &str) -> Exchange {
        exchange("GET", "http://a/p").header("authorization", &format!("Bearer {token}")).build()
    }

    fn claims(more: Value) -> Value {
        let mut claims = json!({"iss": "https://issuer", "sub": "ann", "aud": "shop", "exp": now() + 60});
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        claims
    }

    #[tokio::test]
    async fn a_signed_token_has_to_be_of_the_issuer_and_of_now() {
        let key = SigningKey::new("k1", Algorithm::ES256, &keys::make(Algorithm::ES256).0).unwrap();
        let fake = fake(&[&key]).await;
        let env = TestEnv::default();
        let mut chain = env.chain::<OpenidConnect, _>(&settings(&fake, json!({"use_jwks": true})), |_| Ok(())).unwrap();
        for (name, changed, status) in [
            ("good", json!({}), 200),
            ("of another issuer", json!({"iss": "https://other"}), 401),
            ("of no issuer", json!({"iss": null}), 401),
            ("expired", json!({"exp": now() - 1}), 401),
            ("zero", json!({"exp": 0}), 401),
            ("without an end", json!({"exp": null}), 401),
            ("of the future", json!({"nbf": now() + 60}), 401),
        ] {
            let x = chain.run(with(&key.sign(&claims(changed)).unwrap())).await;
            assert_eq!(x.response.status(), status, "{name}");
            assert_eq!(x.slot::<User>().is_some(), status == 200, "{name}");
            assert_eq!(field(&x, "www-authenticate").contains("invalid_token"), status == 401, "{name}");
        }
        assert_eq!(fake.fetched.load(Ordering::SeqCst), 1);
        let good = key.sign(&claims(json!({}))).unwrap();
        let x = chain.run(exchange("GET", "http://a/").header("x-access-token", &good).build()).await;
        assert_eq!(x.response.status(), 200, "APISIX takes it from here too");
        assert_eq!(x.request.headers["x-access-token"], &*good);
    }

    #[tokio::test]
    async fn keys_that_are_new_are_fetched_and_keys_that_are_none_are_not_fetched_for_ever() {
        let [old, new] = ["old", "new"]
            .map(|kid| SigningKey::new(kid, Algorithm::EdDSA, &keys::make(Algorithm::EdDSA).0).unwrap());
        let fake = fake(&[&old]).await;
        let env = TestEnv::default();
        let mut chain = env.chain::<OpenidConnect, _>(&settings(&fake, json!({"use_jwks": true})), |_| Ok(())).unwrap();
        let token = |key: &SigningKey| key.sign(&claims(json!({}))).unwrap();
        assert_eq!(chain.run(with(&token(&old))).await.response.status(), 200);
        *fake.keys.lock().unwrap() = json!({"keys": [new.jwk()]});
        assert_eq!(chain.run(with(&token(&new))).await.response.status(), 200);
        assert_eq!(chain.run(with(&token(&old))).await.response.status(), 401);
        for _ in 0..20 {
            assert_eq!(chain.run(with(&token(&old))).await.response.status(), 401);
        }
        assert_eq!(fake.fetched.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn introspections_are_kept_and_no_verdict_is_a_refusal() {
        let fake = fake(&[]).await;
        let env = TestEnv::default();
        let mut chain = env.chain::<OpenidConnect, _>(&settings(&fake, json!({})), |_| Ok(())).unwrap();
        for (token, status, asked) in [
            ("good", 200, 1),
            ("good", 200, 1),
            ("bad", 401, 2),
            ("bad", 401, 2),
            ("old", 401, 3),
            ("odd", 401, 4),
            ("down", 503, 5),
            ("down", 503, 6),
        ] {
            let x = chain.run(with(token)).await;
            assert_eq!((x.response.status().as_u16(), fake.fetched.load(Ordering::SeqCst)), (status, asked), "{token}");
        }
        let x = chain.run(exchange("GET", "http://a/").build()).await;
        assert_eq!((x.response.status().as_u16(), field(&x, "www-authenticate")), (401, "Bearer realm=\"apisix\""));
        assert_eq!(chain.run(with(&"x".repeat(MAX_TOKEN + 1))).await.response.status(), 401);
        let mut x = exchange("GET", "http://a/").build();
        x.request.headers.insert("authorization", HeaderValue::from_bytes(b"Bearer \xff").unwrap());
        assert_eq!(chain.run(x).await.response.status(), 400);
    }

    #[tokio::test]
    async fn the_issuers_that_are_named_hold_for_introspected_tokens_too() {
        let fake = fake(&[]).await;
        for (issuers, status) in [(json!(["https://other"]), 401), (json!([]), 401), (json!(["https://issuer"]), 200)] {
            let config = settings(&fake, json!({"claim_validator": {"issuer": {"valid_issuers": issuers}}}));
            let mut chain = TestEnv::default().chain::<OpenidConnect, _>(&config, |_| Ok(())).unwrap();
            assert_eq!(chain.run(with("issued")).await.response.status(), status, "{issuers}");
            assert_eq!(chain.run(with("good")).await.response.status(), 401, "no issuer is told");
        }
    }

    #[tokio::test]
    async fn what_a_token_lacks_is_told() {
        let key = SigningKey::new("k1", Algorithm::ES256, &keys::make(Algorithm::ES256).0).unwrap();
        let fake = fake(&[&key]).await;
        let token = key.sign(&claims(json!({"scope": "read"}))).unwrap();
        let audience = |rule: Value| json!({"use_jwks": true, "claim_validator": {"audience": rule}});
        for (more, told) in [
            (json!({"use_jwks": true, "required_scopes": ["read", "write"]}), "{\"error\":\"required scopes read, write not present\"}\n"),
            (audience(json!({"claim": "tenant", "required": true})), "{\"error\":\"required audience claim not present\"}\n"),
            (audience(json!({"claim": "sub", "match_with_client_id": true})), "{\"error\":\"mismatched audience\"}\n"),
            (audience(json!({"claim": "tenant", "match_with_client_id": true})), "{\"error\":\"required audience claim not present\"}\n"),
        ] {
            let config = settings(&fake, more);
            let mut x = TestEnv::default().chain::<OpenidConnect, _>(&config, |_| Ok(())).unwrap().run(with(&token)).await;
            assert_eq!((x.response.status().as_u16(), &*body(&mut x).await), (403, told));
        }
    }

    #[tokio::test]
    async fn a_login_leads_to_the_provider_and_back_to_this_site() {
        let fake = fake(&[]).await;
        let config = settings(&fake, json!({"bearer_only": false, "session": {"secret": "0123456789abcdef"}}));
        let mut chain = TestEnv::default().chain::<OpenidConnect, _>(&config, |_| Ok(())).unwrap();
        let request = exchange("GET", "http://shop.example/p/").header("host", "shop.example:8080").header("x-forwarded-proto", "https");
        let x = chain.run(request.build()).await;
        assert_eq!((x.response.status().as_u16(), field(&x, "cache-control")), (302, "no-store"));
        let to = field(&x, "location");
        assert!(to.starts_with(&fake.peer.url("/login?tenant=1&response_type=code&client_id=shop&scope=openid&")), "{to}");
        assert!(to.contains("redirect_uri=https%3A%2F%2Fshop.example%3A8080%2Fp%2F.apisix%2Fredirect&"), "{to}");
        let cookie = field(&x, "set-cookie");
        assert!(cookie.starts_with("session_login_") && cookie.contains("; HttpOnly; SameSite=Lax; Secure; Max-Age=600"), "{cookie}");
        for (target, expected) in [("/a?b", "/a?b"), ("//evil", "/"), ("/\\evil", "/"), ("http://evil", "/"), ("", "/")] {
            assert_eq!(local(target), expected, "{target}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let good = json!({"client_id": "c", "client_secret": "s", "discovery": "http://a/", "session": {"secret": "0123456789abcdef"}});
        let config = |more: Value| {
            let mut config = good.clone();
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
            config
        };
        // As APISIX stores it, defaults filled in.
        let stored = json!({"accept_unsupported_alg": true, "accept_none_alg": false, "force_reauthorize": false, "timeout": 3000,
                            "client_jwt_assertion_expires_in": 60, "use_nonce": false, "dpop": {"enabled": false}});
        TestEnv::default().build::<OpenidConnect>(&config(stored)).unwrap();
        let session = |more: Value| {
            let mut session = json!({"secret": "0123456789abcdef"});
            session.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({ "session": session })
        };
        for (more, place) in [
            (json!({"client_id": null}), ""),
            (json!({"discovery": "x"}), "/discovery"),
            (json!({"session": null}), "/session"),
            (json!({"client_secret": null}), "/client_secret"),
            (json!({"session": {"secret": "short"}}), "/session/secret"),
            (session(json!({"storage": "redis"})), "/session/redis"),
            (session(json!({"storage": "disk"})), "/session/storage"),
            (session(json!({"cookie_name": "a b"})), "/session/cookie_name"),
            (session(json!({"cookie_path": "/;x"})), "/session/cookie_path"),
            (json!({"proxy_opts": {"http_proxy": "http://p"}}), "/proxy_opts"),
            (json!({"accept_none_alg": true}), "/accept_none_alg"),
            (json!({"force_reauthorize": true}), "/force_reauthorize"),
            (json!({"refresh_session_interval": 1}), "/refresh_session_interval"),
            (json!({"par": {"enabled": true}}), "/par"),
            (json!({"dpop": {"enabled": true}}), "/dpop"),
            (json!({"token_endpoint_auth_method": "private_key_jwt"}), "/token_endpoint_auth_method"),
            (json!({"token_signing_alg_values_expected": "HS256"}), "/token_signing_alg_values_expected"),
            (json!({"token_signing_alg_values_expected": "none"}), "/token_signing_alg_values_expected"),
            (json!({"public_key": "x"}), "/public_key"),
            (json!({"unauth_action": "allow"}), "/unauth_action"),
            (json!({"redirect_uri": "//evil/cb"}), "/redirect_uri"),
            (json!({"post_logout_redirect_uri": "javascript:x"}), "/post_logout_redirect_uri"),
            (json!({"logout_path": "logout"}), "/logout_path"),
            (json!({"realm": "a\"b"}), "/realm"),
            (json!({"timeout": 0}), "/timeout"),
            (json!({"claim_schema": {"type": 1}}), "/claim_schema"),
            (json!({"use_par": true}), "/use_par"),
        ] {
            let errors = TestEnv::default().build::<OpenidConnect>(&config(more.clone())).unwrap_err();
            assert!(errors.iter().any(|error| error.pointer == place), "{more}: {errors:?}");
        }
    }
}
