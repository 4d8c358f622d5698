//! `jwt-issue`: tells the upstream who calls by a short-lived token that the gateway signs.
//!
//! Phases: `rewrite`, where an authentication service may be asked about the request's credentials, and `access`,
//! behind all that authenticates, where the verified application and user are signed and permissions are checked.
//! Extension: APISIX has no such plugin. Nothing that a client merely says gets into a token.

mod auth_service;
mod permissions;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use config::error::ConfigError;
use config::fields::{Int, Text};
use config::sensitive::PrivateKey;
use config::template::Template;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, header};
use layers::body::Body;
use layers::endpoint::{Endpoint, Offers};
use layers::exchange::{Exchange, State};
use layers::plugin::{AccessWaits, BuildEnv, Definition, Extras, Flow, Hooks, RewriteWaits};
use layers::vars::OwnVars;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::runtime::Handle;

use self::auth_service::{AuthService, Verdict};
use self::permissions::{Denied, Permissions, Tables};
use crate::support::answers::{self, Answers};
use crate::support::identity::User;
use crate::support::jwt::Algorithm;
use crate::support::reply::Canned;
use crate::support::signing::SigningKey;
use crate::support::{headers, http_call};

/// Where `public-api` finds the key set of the metadata.
const JWKS: &str = "/apisix/plugin/jwt-issue/jwks";
/// Where `public-api` finds how old the tables of permissions are.
const PERMISSIONS: &str = "/apisix/plugin/jwt-issue/permissions";

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The field that the upstream gets the token in. A client's own is taken out.
    #[serde(default = "header_name")]
    header: String,
    /// The keys: the first signs, all are in the key set. Without them those of the plugin's metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    keys: Option<Vec<KeyConfig>>,
    /// The claim `iss`.
    #[serde(default = "issuer")]
    issuer: String,
    /// The claim `aud`, with variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    audience: Option<String>,
    /// Seconds that a token is valid.
    #[serde(default)]
    expires_in: Int<30, 86_400, 600>,
    /// Who has to be verified; other requests are refused with 401.
    #[serde(default)]
    require: Require,
    /// A path whose GET this plugin answers with the key set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    jwks_path: Option<String>,
    /// A service that is asked about the request's credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    auth_service: Option<auth_service::Config>,
    /// Which application may ask for which resource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    permissions: Option<permissions::Config>,
    /// Tokens that are kept at most.
    #[serde(default)]
    cache_size: Int<1, 1_000_000, 10_000>,
}

/// Who has to be verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
enum Require {
    #[default]
    App,
    User,
    Both,
    Nothing,
}

/// A private key.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct KeyConfig {
    /// What tokens and the key set call it.
    kid: Text<1, 256>,
    /// How it signs.
    #[serde(default = "rs256")]
    algorithm: Algorithm,
    /// The key in PEM.
    #[schemars(extend("x-encrypted" = true))]
    private_key: PrivateKey,
}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The keys of objects that have none of their own: the first signs, all are in the key set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    keys: Option<Vec<KeyConfig>>,
}

fn header_name() -> String {
    "X-Bkapi-Jwt".to_owned()
}

fn issuer() -> String {
    "postern".to_owned()
}

fn rs256() -> Algorithm {
    Algorithm::RS256
}

/// The plugin.
pub struct JwtIssue {
    header: HeaderName,
    key: Arc<SigningKey>,
    issuer: Box<str>,
    audience: Option<Template>,
    expires_in: Duration,
    require: Require,
    jwks: Option<(Box<str>, Page)>,
    service: Option<AuthService>,
    permissions: Option<Rule>,
    tokens: Answers<Option<HeaderValue>>,
    control: Handle,
    refused: Canned,
    no_app: Canned,
    no_user: Canned,
    no_verdict: Canned,
    no_table: Canned,
    denied: Canned,
    failed: Canned,
}

/// The table of permissions and how it is asked.
struct Rule {
    table: Arc<Permissions>,
    resource: Template,
    max_age: Option<Duration>,
}

/// Whom somebody has verified. Set in `rewrite` by the authentication service.
#[derive(Default)]
struct Verified {
    app: Option<Arc<str>>,
    user: Option<Arc<str>>,
}

impl Definition for JwtIssue {
    const NAME: &'static str = "jwt-issue";
    const PRIORITY: i32 = 1999;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::Placement::Edge("it answers under paths of the gateway, and a sidecar has none");
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.checked_metadata::<Metadata>(|metadata| {
            metadata.keys.as_ref().and_then(|keys| parse(keys).err()).into_iter().collect()
        });
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let path = config.jwks_path.as_ref().is_some_and(|path| !path.starts_with('/'));
        let path = path.then(|| ConfigError::invalid("/jwks_path", "a path begins with `/`"));
        let service = config.permissions.as_ref().and_then(|table| {
            http_call::url(&table.uri, "/permissions/uri").err()
        });
        let keys = config.keys.as_ref().and_then(|keys| parse(keys).err());
        let asked = config.auth_service.as_ref().and_then(|service| service.parsed().err());
        let header = headers::name(&config.header, "").err();
        let header = header.map(|error| ConfigError::new("/header", error.kind));
        [path, service, keys, asked, header].into_iter().flatten().collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let keys = match (&config.keys, metadata(env)?.keys) {
            (Some(keys), _) => parse(keys)?,
            (None, Some(keys)) => parse(&keys).map_err(|error| {
                ConfigError::invalid("/keys", format!("plugin_metadata/jwt-issue: {error}"))
            })?,
            (None, None) => Vec::new(),
        };
        let page = Page(jwks(&keys));
        let Some(key) = keys.into_iter().next() else {
            let missing = "write keys here or into plugin_metadata/jwt-issue";
            return Err(ConfigError::invalid("/keys", missing));
        };
        let permissions = config.permissions.as_ref().map(|config| {
            Ok::<_, ConfigError>(Rule {
                table: Permissions::follow(config, env)?,
                resource: Template::parse(&config.resource),
                max_age: config.max_age.map(|age| Duration::from_secs(age.get().into())),
            })
        });
        let refusal = |status, message| Canned::message(status, message);
        let plugin = Arc::new(Self {
            header: headers::name(&config.header, "/header")?,
            key: Arc::new(key),
            issuer: config.issuer.into(),
            audience: config.audience.map(|audience| Template::parse(&audience)),
            expires_in: Duration::from_secs(config.expires_in.get().into()),
            require: config.require,
            jwks: config.jwks_path.map(|path| (path.into(), page)),
            service: config.auth_service.map(|config| AuthService::new(&config, env)).transpose()?,
            permissions: permissions.transpose()?,
            tokens: Answers::new(usize::try_from(config.cache_size.get()).unwrap_or(1), env.control),
            control: env.control.clone(),
            refused: refusal(StatusCode::UNAUTHORIZED, "The credentials are not valid"),
            no_app: refusal(StatusCode::UNAUTHORIZED, "The application is not verified"),
            no_user: refusal(StatusCode::UNAUTHORIZED, "The user is not verified"),
            no_verdict: refusal(StatusCode::SERVICE_UNAVAILABLE, "The credentials cannot be verified now"),
            no_table: refusal(StatusCode::SERVICE_UNAVAILABLE, "Permissions cannot be checked now"),
            denied: refusal(StatusCode::FORBIDDEN, "The application may not use this resource"),
            failed: refusal(StatusCode::INTERNAL_SERVER_ERROR, "The token cannot be signed"),
        });
        if plugin.service.is_some() || plugin.jwks.is_some() {
            hooks.rewrite_waits(&plugin);
        }
        hooks.access_waits(&plugin);
        Ok(())
    }

    fn offer(env: &BuildEnv<'_>, offers: &mut Offers) -> Result<(), ConfigError> {
        if let Some(keys) = metadata(env)?.keys {
            offers.serve(Method::GET, JWKS, &Arc::new(Page(jwks(&parse(&keys)?))));
        }
        offers.serve(Method::GET, PERMISSIONS, &Arc::new(Ages(Tables::of(env))));
        Ok(())
    }
}

fn metadata(env: &BuildEnv<'_>) -> Result<Metadata, ConfigError> {
    let Some(metadata) = env.metadata else { return Ok(Metadata::default()) };
    config::typed::parse(metadata).map_err(|errors: Vec<ConfigError>| {
        errors.into_iter().next().unwrap_or_else(|| ConfigError::invalid("", "the metadata is wrong"))
    })
}

fn parse(keys: &[KeyConfig]) -> Result<Vec<SigningKey>, ConfigError> {
    let mut parsed = Vec::with_capacity(keys.len());
    for (index, key) in keys.iter().enumerate() {
        if keys.iter().take(index).any(|other| other.kid == key.kid) {
            return Err(ConfigError::invalid(format!("/keys/{index}/kid"), "another key has this name"));
        }
        let one = SigningKey::new(key.kid.as_str(), key.algorithm, key.private_key.reveal()).map_err(|error| {
            ConfigError::invalid(format!("/keys/{index}/private_key"), error.to_string())
        })?;
        parsed.push(one);
    }
    Ok(parsed)
}

fn jwks(keys: &[SigningKey]) -> Canned {
    let keys: Vec<_> = keys.iter().map(SigningKey::jwk).collect();
    Canned::json(StatusCode::OK, &json!({ "keys": keys }))
        .header(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))
        // Longer than a look-up costs, shorter than a rotation lets the old key stand.
        .header(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=60"))
}

/// A key set.
struct Page(Canned);

impl Endpoint for Page {
    async fn answer(&self, _: &mut Exchange) -> Response<Body> {
        self.0.response()
    }
}

/// The state of the tables of permissions.
struct Ages(Arc<Tables>);

impl Endpoint for Ages {
    async fn answer(&self, _: &mut Exchange) -> Response<Body> {
        Canned::json(StatusCode::OK, &json!({ "tables": self.0.view() })).response()
    }
}

impl RewriteWaits for JwtIssue {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        if let Some((path, page)) = &self.jwks
            && x.path() == &**path
            && (x.request.method == Method::GET || x.request.method == Method::HEAD)
        {
            return page.0.flow();
        }
        let Some(service) = &self.service else { return Flow::Next };
        match service.ask(&mut x.request.headers).await {
            None => {}
            Some(Verdict::Known { app, user }) => {
                x.put_slot(Verified { app, user });
            }
            Some(Verdict::Refused) => return self.refused.flow(),
            Some(Verdict::Nothing) => return self.no_verdict.flow(),
        }
        Flow::Next
    }
}

impl AccessWaits for JwtIssue {
    async fn access(&self, x: &mut Exchange) -> Flow {
        x.request.headers.remove(&self.header);
        let (app, user) = verified(x);
        let needs = |which| self.require == which || self.require == Require::Both;
        if app.is_none() && needs(Require::App) {
            return self.no_app.flow();
        }
        if user.is_none() && needs(Require::User) {
            return self.no_user.flow();
        }
        if let Some(rule) = &self.permissions {
            let Some(app) = &app else { return self.no_app.flow() };
            match rule.table.check(app, &rule.resource.to_text(&**x), rule.max_age) {
                Ok(()) => {}
                Err(Denied::NotAllowed) => return self.denied.flow(),
                Err(Denied::NoTable) => return self.no_table.flow(),
            }
        }
        let audience = self.audience.as_ref().map(|audience| audience.to_text(&**x).into_owned());
        let Some(token) = self.token(app.as_deref(), user.as_deref(), audience).await else {
            return self.failed.flow();
        };
        x.request.headers.insert(self.header.clone(), token);
        if let Some(own) = x.slot_mut::<OwnVars>() {
            own.0.extend(app.map(|app| ("jwt_issue_app", app.to_string())));
            own.0.extend(user.map(|user| ("jwt_issue_user", user.to_string())));
        }
        Flow::Next
    }
}

/// Whom the authentication service, or another plugin, has verified.
fn verified(x: &State) -> (Option<Arc<str>>, Option<Arc<str>>) {
    let asked = x.slot::<Verified>();
    let app = asked.and_then(|asked| asked.app.clone());
    let user = asked.and_then(|asked| asked.user.clone());
    (
        app.or_else(|| Some(x.consumer.as_ref()?.name.clone())),
        user.or_else(|| Some(Arc::from(&*x.slot::<User>()?.0))),
    )
}

impl JwtIssue {
    /// The token for these, kept until shortly before it ends.
    async fn token(&self, app: Option<&str>, user: Option<&str>, audience: Option<String>) -> Option<HeaderValue> {
        // A name that is missing is no empty name.
        let part = |text: Option<&str>| [&[u8::from(text.is_some())], text.unwrap_or_default().as_bytes()].concat();
        let key = answers::key(&[&part(app), &part(user), &part(audience.as_deref())]);
        let sign = || {
            let claims = self.claims(app, user, audience);
            let (key, control) = (self.key.clone(), self.control.clone());
            // What is left of a token when it is taken from the table is enough for a slow upstream.
            let margin = (self.expires_in / 2).min(Duration::from_secs(60));
            let good = self.expires_in.saturating_sub(margin);
            async move {
                let token = if key.is_slow() {
                    control.spawn_blocking(move || key.sign(&claims)).await.ok().flatten()
                } else {
                    key.sign(&claims)
                };
                let value = token.and_then(|token| HeaderValue::try_from(token).ok()).map(|mut value| {
                    value.set_sensitive(true);
                    value
                });
                let good = value.is_some().then_some(good);
                (value, good)
            }
        };
        self.tokens.get(key, sign).await.flatten()
    }

    fn claims(&self, app: Option<&str>, user: Option<&str>, audience: Option<String>) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut claims = Map::new();
        let mut claim = |name: &str, value: Value| claims.insert(name.to_owned(), value);
        claim("iss", (*self.issuer).into());
        claim("iat", now.into());
        // For upstreams whose clocks are behind.
        claim("nbf", now.saturating_sub(30).into());
        claim("exp", (now + self.expires_in.as_secs()).into());
        if let Some(audience) = audience {
            claim("aud", audience.into());
        }
        let name = |text: Option<&str>| text.unwrap_or_default().to_owned();
        claim("app", json!({"version": 1, "app_code": name(app), "verified": app.is_some()}));
        claim("user", json!({"version": 1, "username": name(user), "verified": user.is_some()}));
        Value::Object(claims)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use bytes::Bytes;
    use layers::consumer::Consumer;
    use layers::testing::{TestEnv, exchange, text};

    use super::*;
    use crate::support::jwt::{Key, Token};
    use crate::support::peer::Peer;
    use crate::support::signing::keys;

    /// Settings with one key, and what verifies its tokens.
    fn settings(more: Value) -> (Value, Key) {
        let (private, public) = keys::make(Algorithm::ES256);
        let mut config = json!({"keys": [{"kid": "k1", "algorithm": "ES256", "private_key": private}]});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        (config, Key::public(Algorithm::ES256, &public).unwrap())
    }

    fn get(consumer: Option<&str>) -> Exchange {
        let mut x = exchange("GET", "http://a/r").header("x-bkapi-jwt", "forged").build();
        x.consumer = consumer.map(|name| Arc::new(Consumer::new(name)));
        x
    }

    fn claims(x: &Exchange, key: &Key) -> Value {
        let token = Token::parse(x.request.headers["x-bkapi-jwt"].to_str().unwrap()).unwrap();
        assert!(token.is_signed_by(key));
        Value::Object(token.into_claims())
    }

    /// Sends one exchange through a plugin of these settings.
    async fn run(env: &TestEnv, config: &Value, x: Exchange) -> Exchange {
        env.chain::<JwtIssue, _>(config, |_| Ok(())).unwrap().run(x).await
    }

    #[tokio::test]
    async fn the_verified_application_and_user_are_signed() {
        let (config, key) = settings(json!({"audience": "of $host", "issuer": "gw", "expires_in": 120}));
        let mut x = get(Some("shop"));
        x.put_slot(User("ann".into()));
        let x = run(&TestEnv::default(), &config, x).await;
        assert_eq!(x.response.status(), 200);
        let claims = claims(&x, &key);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert_eq!((&claims["iss"], &claims["aud"]), (&json!("gw"), &json!("of a")));
        assert_eq!(claims["app"], json!({"version": 1, "app_code": "shop", "verified": true}));
        assert_eq!(claims["user"], json!({"version": 1, "username": "ann", "verified": true}));
        let times = ["iat", "nbf", "exp"].map(|name| claims[name].as_u64().unwrap());
        assert!(times[1] < times[0] && times[0] <= now && times[2] == times[0] + 120 && times[2] > now);
    }

    #[tokio::test]
    async fn who_has_to_be_verified_can_be_chosen_and_nothing_forged_gets_through() {
        let cases = [
            ("app", None, None, 401),
            ("app", Some("shop"), None, 200),
            ("user", Some("shop"), None, 401),
            ("user", None, Some("ann"), 200),
            ("both", Some("shop"), None, 401),
            ("both", Some("shop"), Some("ann"), 200),
            ("nothing", None, None, 200),
        ];
        for (require, app, user, status) in cases {
            let (config, key) = settings(json!({"require": require}));
            let mut x = get(app);
            if let Some(user) = user {
                x.put_slot(User(user.into()));
            }
            let x = run(&TestEnv::default(), &config, x).await;
            assert_eq!(x.response.status(), status, "{require} {app:?} {user:?}");
            if status == 200 {
                let claims = claims(&x, &key);
                assert_eq!(claims["app"]["verified"], json!(app.is_some()));
                assert_eq!(claims["user"]["verified"], json!(user.is_some()));
            } else {
                assert!(!x.request.headers.contains_key("x-bkapi-jwt"));
            }
        }
    }

    #[tokio::test]
    async fn a_token_is_signed_once_for_each_caller() {
        let (config, _) = settings(json!({}));
        let mut chain = TestEnv::default().chain::<JwtIssue, _>(&config, |_| Ok(())).unwrap();
        let mut tokens = Vec::new();
        for consumer in ["a", "b", "a"] {
            tokens.push(chain.run(get(Some(consumer))).await.request.headers["x-bkapi-jwt"].clone());
        }
        // A signature of ES256 is never twice the same.
        assert_eq!(tokens[0], tokens[2]);
        assert_ne!(tokens[0], tokens[1]);
    }

    #[tokio::test]
    async fn all_keys_are_in_the_set_and_the_first_signs() {
        let [(new, new_public), (old, _)] = [Algorithm::EdDSA, Algorithm::ES256].map(keys::make);
        let keys = json!([{"kid": "new", "algorithm": "EdDSA", "private_key": new},
                          {"kid": "old", "algorithm": "ES256", "private_key": old}]);
        let env = TestEnv { metadata: Some(json!({"keys": keys})), ..TestEnv::default() };
        let config = json!({"jwks_path": "/keys"});
        let x = run(&env, &config, get(Some("a"))).await;
        claims(&x, &Key::public(Algorithm::EdDSA, &new_public).unwrap());
        let mut x = run(&env, &config, exchange("GET", "http://a/keys").build()).await;
        assert_eq!(x.response.headers()["content-type"], "application/json");
        let shown = text(&mut x).await;
        let set: Value = serde_json::from_str(&shown).unwrap();
        assert_eq!((&set["keys"][0]["kid"], &set["keys"][1]["kid"]), (&json!("new"), &json!("old")));
        let mut offers = Offers::default();
        env.with(|env| JwtIssue::offer(env, &mut offers)).unwrap();
        env.endpoints.publish(offers);
        let page = env.endpoints.find(&Method::GET, JWKS).unwrap();
        let mut answer = page.answer(&mut exchange("GET", "http://a/").build()).await;
        assert_eq!(answer.body_mut().collect_up_to(10_000).await.unwrap(), shown);
    }

    /// Knows the application `shop` with the secret `s`, and says how often it was asked.
    async fn service() -> (Peer, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let asked = count.clone();
        let peer = Peer::start(move |request| {
            asked.fetch_add(1, Ordering::SeqCst);
            let shown: Value = serde_json::from_slice(request.body()).unwrap();
            let told = match (shown["app_code"].as_str(), shown["app_secret"].as_str()) {
                (Some("shop"), Some("s")) => json!({
                    "app": {"app_code": "shop", "verified": true},
                    "user": {"username": shown["user_token"], "verified": shown["user_token"] != "bad"},
                }),
                (Some("broken"), _) => return Response::new("<html>".into()),
                (Some("down"), _) => return Response::builder().status(500).body(Bytes::new()).unwrap(),
                (Some("unverified"), _) => json!({"app": {"app_code": "unverified", "verified": false}}),
                _ => return Response::builder().status(401).body(Bytes::new()).unwrap(),
            };
            Response::new(told.to_string().into())
        })
        .await;
        (peer, count)
    }

    #[tokio::test]
    async fn an_authentication_service_is_asked_once_for_each_credential() {
        let (peer, count) = service().await;
        let (config, key) = settings(json!({"auth_service": {"uri": peer.url("/verify")}}));
        let env = TestEnv::default();
        let mut chain = env.chain::<JwtIssue, _>(&config, |_| Ok(())).unwrap();
        let request = |code: &str, secret: &str, token: &str| {
            exchange("GET", "http://a/")
                .header("x-bk-app-code", code)
                .header("x-bk-app-secret", secret)
                .header("x-bk-user-token", token)
        };
        let json = |text: &str| exchange("GET", "http://a/").header("x-bkapi-authorization", text);
        let all = r#"{"bk_app_code": "shop", "bk_app_secret": "s", "bk_token": "ann"}"#;
        let cases = [
            ("the right secret", request("shop", "s", "ann"), 200, "ann", 1),
            ("once more", request("shop", "s", "ann"), 200, "ann", 1),
            ("as one field", json(all), 200, "ann", 1),
            ("a user who is not verified", request("shop", "s", "bad"), 200, "", 2),
            ("the wrong secret", request("shop", "x", "ann"), 401, "", 3),
            ("the wrong secret once more", request("shop", "x", "ann"), 401, "", 3),
            ("an application that is not verified", request("unverified", "s", ""), 401, "", 4),
            ("an answer that is no JSON", request("broken", "s", ""), 503, "", 5),
            ("no verdict is not kept", request("broken", "s", ""), 503, "", 6),
            ("an error", request("down", "s", ""), 503, "", 7),
            ("a field that is no JSON", json("{"), 401, "", 7),
            ("a credential that is too long", request("shop", &"s".repeat(20_000), ""), 401, "", 7),
            ("no credential", exchange("GET", "http://a/"), 401, "", 7),
        ];
        for (name, request, status, user, asked) in cases {
            let x = chain.run(request.build()).await;
            assert_eq!((x.response.status().as_u16(), count.load(Ordering::SeqCst)), (status, asked), "{name}");
            for field in ["x-bk-app-code", "x-bk-app-secret", "x-bk-user-token", "x-bkapi-authorization"] {
                assert!(!x.request.headers.contains_key(field), "{name}: {field}");
            }
            if status == 200 {
                let claims = claims(&x, &key);
                assert_eq!((&claims["app"]["app_code"], &claims["user"]["username"]), (&json!("shop"), &json!(user)));
            }
        }
    }

    #[tokio::test]
    async fn a_service_that_is_silent_costs_its_time_out() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}/", silent.local_addr().unwrap());
        let (config, _) = settings(json!({"auth_service": {"uri": uri, "timeout": 50}}));
        let x = exchange("GET", "http://a/").header("x-bk-app-code", "shop").build();
        assert_eq!(run(&TestEnv::default(), &config, x).await.response.status(), 503);
    }

    /// Waits for the status to come about.
    async fn until(env: &TestEnv, config: &Value, status: u16) -> Exchange {
        let wait = async {
            loop {
                let x = run(env, config, get(Some("shop"))).await;
                if x.response.status() == status {
                    return x;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap()
    }

    #[tokio::test]
    async fn permissions_follow_their_source_and_stay_when_it_is_away() {
        let answer = Arc::new(Mutex::new((200_u16, json!({"version": 1, "apps": {"shop": ["/r"], "other": ["*"]}}))));
        let (told, asked) = (answer.clone(), Arc::new(Mutex::new(Vec::new())));
        let questions = asked.clone();
        let peer = Peer::start(move |request| {
            questions.lock().unwrap().push(request.uri().to_string());
            let (status, body) = told.lock().unwrap().clone();
            Response::builder().status(status).body(body.to_string().into()).unwrap()
        })
        .await;
        let (config, _) = settings(json!({
            "permissions": {"uri": peer.url("/table"), "interval": 1, "resource": "$uri"},
        }));
        let env = TestEnv::default();
        // Something holds the table between requests, as the plugin's object does in a gateway.
        let held = env.build::<JwtIssue>(&config).unwrap();
        until(&env, &config, 200).await;
        *answer.lock().unwrap() = (200, json!({"version": 2, "base": 1, "removed": ["shop"]}));
        let mut x = until(&env, &config, 403).await;
        assert_eq!(text(&mut x).await, "{\"message\":\"The application may not use this resource\"}\n");
        // Away: what was known stays, and people can see why.
        *answer.lock().unwrap() = (500, json!({}));
        let seen = asked.lock().unwrap().len();
        let wait = async {
            while asked.lock().unwrap().len() == seen {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
        assert_eq!(run(&env, &config, get(Some("other"))).await.response.status(), 200);
        // Changes of another version than the one that is known: asked again for the whole table.
        *answer.lock().unwrap() = (200, json!({"version": 9, "apps": {"shop": ["/r"]}}));
        until(&env, &config, 200).await;
        let view = env.with(Tables::of).view();
        assert_eq!((&view[0]["version"], &view[0]["apps"], &view[0]["error"]), (&json!("9"), &json!(1), &Value::Null));
        let asked = asked.lock().unwrap().clone();
        assert_eq!(&asked[..2], ["/table", "/table?since=1"]);
        drop(held);
    }

    #[tokio::test]
    async fn without_a_table_nothing_is_allowed() {
        let peer = Peer::start(|_| Response::builder().status(500).body(Bytes::new()).unwrap()).await;
        let (config, _) = settings(json!({"permissions": {"uri": peer.url("/")}}));
        let x = run(&TestEnv::default(), &config, get(Some("shop"))).await;
        assert_eq!(x.response.status(), 503);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let (good, public) = keys::make(Algorithm::ES256);
        let key = |algorithm: &str, pem: &str| json!({"kid": "k", "algorithm": algorithm, "private_key": pem});
        let keys = |keys: Value| json!({"keys": keys});
        for (config, place) in [
            (json!({}), "/keys"),
            (keys(json!([])), "/keys"),
            (keys(json!([key("RS256", &good)])), "/keys/0/private_key"),
            (keys(json!([key("HS256", &good)])), "/keys/0/private_key"),
            (keys(json!([key("ES256", &public)])), "/keys/0/private_key"),
            (keys(json!([key("ES256", &good), key("ES256", &good)])), "/keys/1/kid"),
            (settings(json!({"header": "a b"})).0, "/header"),
            (settings(json!({"expires_in": 29})).0, "/expires_in"),
            (settings(json!({"jwks_path": "keys"})).0, "/jwks_path"),
            (settings(json!({"auth_service": {"uri": "x"}})).0, "/auth_service/uri"),
            (settings(json!({"permissions": {"uri": "x"}})).0, "/permissions/uri"),
            (settings(json!({"permissions": {"uri": "http://a", "interval": 0}})).0, "/permissions/interval"),
        ] {
            let errors = TestEnv::default().build::<JwtIssue>(&config).unwrap_err();
            assert!(errors.iter().any(|error| error.pointer == place), "{place}: {errors:?}");
            assert!(!format!("{errors:?}").contains(good.lines().nth(1).unwrap()), "{place}");
        }
    }
}
