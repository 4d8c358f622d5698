//! `jwt-auth`: the caller shows a JSON Web Token that was signed with a key of one consumer or credential.
//!
//! Phase: `rewrite`. A claim names the consumer; the consumer's settings alone say by which algorithm and key the token
//! must be signed. As in APISIX the header goes before the query and the query before the cookie. Signatures that take
//! long are verified beside the worker.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use config::error::ConfigError;
use config::fields::{Distinct, Int, WideText};
use config::sensitive::Sensitive;
use http::HeaderName;
use layers::consumer::Consumer;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Extras, Flow, Hooks, RewriteWaits, Verifier};
use layers::vars::{OwnVars, argument, cookie};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::runtime::Handle;
use zeroize::Zeroizing;

use crate::support::credentials::{self, Gate, Shown};
use crate::support::headers;
use crate::support::jwt::{Algorithm, Key, TimeClaim, Token};
use crate::support::reply::Canned;

/// Settings on a route or service.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The header field that holds the token, with or without `Bearer` before it.
    #[serde(default = "authorization")]
    header: String,
    /// The query argument that holds the token, where the header field is missing.
    #[serde(default = "jwt")]
    query: String,
    /// The cookie that holds the token, where header field and argument are missing.
    #[serde(default = "jwt")]
    cookie: String,
    /// Take the token out of the request before it is forwarded.
    #[serde(default)]
    hide_credentials: bool,
    /// The claim that names the consumer: its value is the consumer's `key`.
    #[serde(default = "key")]
    key_claim_name: WideText<1, 256>,
    /// Keep what the token says for other plugins, as the variable `$jwt_auth_payload` and for those that ask for it.
    #[serde(default)]
    store_in_ctx: bool,
    /// The realm in `WWW-Authenticate` of a refusal.
    #[serde(default = "jwt")]
    realm: String,
    /// The consumer that a request without a valid token belongs to. Without it such a request is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    anonymous_consumer: Option<String>,
    /// Claims about time that a token must have and that must hold. Without them `exp` and `nbf` must hold where they
    /// are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    claims_to_verify: Option<Distinct<TimeClaim, 0>>,
}

fn authorization() -> String {
    "authorization".into()
}

fn jwt() -> String {
    "jwt".into()
}

fn key() -> WideText<1, 256> {
    #[expect(clippy::expect_used, reason = "a constant within its limits")]
    WideText::new("key").expect("1 to 256 characters")
}

/// Settings on a consumer or credential.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsumerConfig {
    /// What the claim says that names the consumer.
    key: WideText<1, 4096>,
    /// The secret that tokens are signed with, for `HS256`, `HS384` and `HS512`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-encrypted" = true))]
    secret: Option<Sensitive>,
    /// The public key in PEM that tokens are verified with, for all other algorithms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public_key: Option<String>,
    /// Not used: tokens are verified, not made. Older versions of APISIX asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-encrypted" = true))]
    private_key: Option<Sensitive<0>>,
    /// The one algorithm that tokens of this consumer are signed by.
    #[serde(default)]
    algorithm: Algorithm,
    /// Not used: how long tokens would be valid, in seconds, if they were made here.
    #[serde(default)]
    exp: Int<1, { u32::MAX }, 86_400>,
    /// The secret is written in base64.
    #[serde(default)]
    base64_secret: bool,
    /// How far the clock of whoever makes tokens may be off, in seconds.
    #[serde(default)]
    lifetime_grace_period: Int<0, { u32::MAX }>,
}

/// What tokens of a consumer are verified with.
struct TokenVerifier {
    key: Key,
    /// Seconds.
    grace: f64,
}

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

impl Verifier for TokenVerifier {
    type Settings = ConsumerConfig;

    fn new(settings: ConsumerConfig) -> Result<Self, ConfigError> {
        let algorithm = settings.algorithm;
        let missing = |field: &str| {
            let kind = config::ErrorKind::MissingField { field: field.to_owned() };
            ConfigError::new("", kind)
        };
        let key = if algorithm.is_symmetric() {
            let secret = settings.secret.ok_or_else(|| missing("secret"))?;
            let decoded = Zeroizing::new(if settings.base64_secret {
                let decoded = BASE64.decode(secret.reveal()).ok().filter(|secret| !secret.is_empty());
                decoded.ok_or_else(|| {
                    ConfigError::invalid("/secret", "this is not base64: write it so, or take `base64_secret` out")
                })?
            } else {
                secret.reveal().as_bytes().to_vec()
            });
            Key::secret(algorithm, &decoded).map_err(|error| ConfigError::invalid("/algorithm", error.to_string()))?
        } else {
            let pem = settings.public_key.ok_or_else(|| missing("public_key"))?;
            Key::public(algorithm, &pem).map_err(|error| ConfigError::invalid("/public_key", error.to_string()))?
        };
        Ok(Self { key, grace: f64::from(settings.lifetime_grace_period.get()) })
    }
}

/// What the token of a request says, where `store_in_ctx` asks to keep it.
pub struct Payload(pub Map<String, Value>);

/// The variable that holds the payload.
const PAYLOAD_VARIABLE: &str = "jwt_auth_payload";

/// The plugin.
pub struct JwtAuth {
    header: HeaderName,
    query: Box<str>,
    cookie: Box<str>,
    hide: bool,
    claim: Box<str>,
    store: bool,
    times: Times,
    gate: Gate,
    control: Handle,
    missing: Canned,
    malformed: Canned,
    no_key: Canned,
    unknown_key: Canned,
    unverified: Canned,
}

/// Which claims about time must hold.
enum Times {
    /// Those that there are.
    Present,
    /// These, and they must be there.
    Required(Vec<TimeClaim>),
}

impl Definition for JwtAuth {
    const NAME: &'static str = "jwt-auth";
    const PRIORITY: i32 = 2510;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::NEEDS_CONSUMERS;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.verifier::<TokenVerifier>(|settings| settings.get("key")?.as_str().map(str::to_owned));
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let header = headers::name(&config.header, "").err();
        header
            .map(|error| ConfigError::new("/header", error.kind))
            .into_iter()
            .chain(credentials::challenge(SCHEME, &config.realm).err())
            .collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let challenge = credentials::challenge(SCHEME, &config.realm)?;
        let refusal = |message| credentials::refusal(&challenge, message);
        let named = config.claims_to_verify.map(|claims| claims.to_vec());
        hooks.rewrite_waits(&Arc::new(Self {
            header: headers::name(&config.header, "/header")?,
            query: config.query.into(),
            cookie: config.cookie.into(),
            hide: config.hide_credentials,
            claim: (&*config.key_claim_name).into(),
            store: config.store_in_ctx,
            times: named.filter(|claims| !claims.is_empty()).map_or(Times::Present, Times::Required),
            gate: Gate::new(env.consumers, config.anonymous_consumer, &challenge),
            control: env.control.clone(),
            missing: refusal("Missing JWT token in request"),
            malformed: refusal("JWT token invalid"),
            no_key: refusal("missing user key in JWT token"),
            unknown_key: refusal("Invalid user key in JWT token"),
            unverified: refusal("failed to verify jwt"),
        }));
        Ok(())
    }
}

const SCHEME: &str = "Bearer";

/// Where a token stands.
#[derive(Clone, Copy)]
enum Place {
    Header,
    Query,
    Cookie,
}

impl RewriteWaits for JwtAuth {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        let token = self.token(x);
        let place = token.as_ref().map(|(place, _)| *place);
        let found = match token {
            None => Err(&self.missing),
            Some((_, None)) => Err(&self.malformed),
            Some((_, Some(token))) => self.recognise(&token).await,
        };
        let (found, claims) = match found {
            Ok((known, claims)) => (Ok(known), Some(claims)),
            Err(refusal) => (Err(refusal), None),
        };
        let flow = self.gate.settle(x, found);
        if matches!(flow, Flow::Next) {
            if self.hide {
                self.hide(x, place);
            }
            if let Some(claims) = claims.filter(|_| self.store) {
                store(x, claims);
            }
        }
        flow
    }
}

impl JwtAuth {
    /// The first token of the request and where it stands; no text if what stands there cannot be one.
    fn token(&self, x: &Exchange) -> Option<(Place, Option<String>)> {
        match credentials::shown(&x.request.headers, &self.header) {
            Shown::Text(text) => {
                let token = credentials::after_scheme(text, SCHEME).unwrap_or(text);
                return Some((Place::Header, Some(token.to_owned())));
            }
            Shown::Unusable => return Some((Place::Header, None)),
            Shown::Nothing => {}
        }
        if let Some(token) = x.request.uri.query().and_then(|query| argument(query, &self.query)) {
            return Some((Place::Query, Some(token.into_owned())));
        }
        let token = cookie(&x.request.headers, &self.cookie)?;
        Some((Place::Cookie, Some(token.to_owned())))
    }

    /// Whose the token is, and what it says.
    async fn recognise(&self, text: &str) -> Result<(Arc<Consumer>, Map<String, Value>), &Canned> {
        let token = Token::parse(text).ok_or(&self.malformed)?;
        let key = token.claims().get(&*self.claim).ok_or(&self.no_key)?;
        let known = key.as_str().and_then(|key| self.gate.find(Self::NAME, key)).ok_or(&self.unknown_key)?;
        let verifier = known.verifier::<TokenVerifier>().ok_or(&self.unverified)?;
        let is_signed = if verifier.key.is_slow() {
            self.is_signed_beside(known.clone(), text.to_owned()).await
        } else {
            token.is_signed_by(&verifier.key)
        };
        if !is_signed || !self.is_timely(token.claims(), now(), verifier.grace) {
            return Err(&self.unverified);
        }
        Ok((known, token.into_claims()))
    }

    /// Verifies a signature on the pool for what blocks. It is computed to its end; nothing else is waited for.
    async fn is_signed_beside(&self, known: Arc<Consumer>, text: String) -> bool {
        let verified = self.control.spawn_blocking(move || {
            let token = Token::parse(&text);
            token.zip(known.verifier::<TokenVerifier>()).is_some_and(|(token, verifier)| token.is_signed_by(&verifier.key))
        });
        verified.await.unwrap_or(false)
    }

    fn is_timely(&self, claims: &Map<String, Value>, now: f64, grace: f64) -> bool {
        match &self.times {
            Times::Present => {
                [TimeClaim::Exp, TimeClaim::Nbf].iter().all(|claim| claim.holds(claims, now, grace) != Some(false))
            }
            Times::Required(required) => {
                required.iter().all(|claim| claim.holds(claims, now, grace) == Some(true))
            }
        }
    }

    fn hide(&self, x: &mut Exchange, place: Option<Place>) {
        match place {
            Some(Place::Header) => {
                x.request.headers.remove(&self.header);
            }
            Some(Place::Query) => credentials::hide_argument(x, &self.query),
            Some(Place::Cookie) => credentials::hide_cookie(&mut x.request.headers, &self.cookie),
            None => {}
        }
    }
}

/// Keeps what the token says.
fn store(x: &mut Exchange, claims: Map<String, Value>) {
    let payload = Value::Object(claims);
    if let Some(own) = x.slot_mut::<OwnVars>() {
        own.0.retain(|(name, _)| *name != PAYLOAD_VARIABLE);
        own.0.push((PAYLOAD_VARIABLE, payload.to_string()));
    }
    if let Value::Object(claims) = payload {
        x.put_slot(Payload(claims));
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(f64::MAX, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::hmac;
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{self, KeyPair};
    use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
    use config::var::{Var, Vars};
    use layers::consumer::ConsumerTable;
    use layers::testing::{ExchangeBuilder, TestEnv, enrol, exchange, field, text};
    use serde_json::json;

    use super::*;

    fn part(value: &Value) -> String {
        URL_SAFE_NO_PAD.encode(value.to_string())
    }

    fn hs256(secret: &[u8], claims: &Value) -> String {
        let signed = format!("{}.{}", part(&json!({"typ": "JWT", "alg": "HS256"})), part(claims));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag))
    }

    fn env() -> TestEnv {
        let mut table = ConsumerTable::default();
        for (name, settings) in [
            ("jack", json!({"key": "user-key", "secret": "my-secret-key"})),
            ("jill", json!({"key": "b64", "secret": STANDARD.encode(b"\xff\x00raw"), "base64_secret": true})),
            ("late", json!({"key": "late", "secret": "my-secret-key", "lifetime_grace_period": 3600})),
        ] {
            enrol::<JwtAuth>(&mut table, Consumer::new(name), &settings).unwrap();
        }
        table.insert_named(Arc::new(Consumer::new("guest")));
        let env = TestEnv::default();
        env.consumers.publish(table);
        env
    }

    async fn run(config: Value, request: ExchangeBuilder) -> Exchange {
        env().chain::<JwtAuth, _>(&config, |_| Ok(())).unwrap().run(request.build()).await
    }

    fn get(uri: &str) -> ExchangeBuilder {
        exchange("GET", uri)
    }

    fn token(claims: &Value) -> String {
        hs256(b"my-secret-key", claims)
    }

    fn good() -> String {
        token(&json!({"key": "user-key", "exp": 4_000_000_000_u64}))
    }

    #[tokio::test]
    async fn a_token_is_taken_from_the_header_then_the_query_then_the_cookie() {
        let (good, bad) = (good(), token(&json!({"key": "nobody"})));
        let cases = [
            ("the header", json!({}), get("http://a/").header("authorization", &good), ""),
            ("Bearer", json!({}), get("http://a/").header("authorization", &format!("Bearer {good}")), ""),
            ("bearer", json!({}), get("http://a/").header("authorization", &format!("bearer {good}")), ""),
            ("the argument", json!({}), get(&format!("http://a/?jwt={good}")), ""),
            ("the cookie", json!({}), get("http://a/").header("cookie", &format!("a=b; jwt={good}")), ""),
            (
                "other names",
                json!({"header": "X-Token", "query": "t", "cookie": "c"}),
                get(&format!("http://a/?t={good}")).header("authorization", "x"),
                "",
            ),
            (
                "the header goes before the argument",
                json!({}),
                get(&format!("http://a/?jwt={good}")).header("authorization", &bad),
                "Invalid user key in JWT token",
            ),
            (
                "the argument goes before the cookie",
                json!({}),
                get(&format!("http://a/?jwt={bad}")).header("cookie", &format!("jwt={good}")),
                "Invalid user key in JWT token",
            ),
            ("none", json!({}), get("http://a/"), "Missing JWT token in request"),
            ("no token", json!({}), get("http://a/?jwt=abc"), "JWT token invalid"),
            ("an empty one", json!({}), get("http://a/").header("authorization", ""), "JWT token invalid"),
            (
                "two of them",
                json!({}),
                get("http://a/").header("authorization", &good).header("authorization", &good),
                "JWT token invalid",
            ),
        ];
        for (name, config, request, message) in cases {
            let mut x = run(config, request).await;
            if message.is_empty() {
                assert_eq!(&*x.consumer.as_ref().expect(name).name, "jack", "{name}");
                assert_eq!(x.request.headers["x-consumer-username"], "jack", "{name}");
            } else {
                assert_eq!(x.status(), 401, "{name}");
                assert_eq!(text(&mut x).await, format!("{{\"message\":\"{message}\"}}\n"), "{name}");
                assert_eq!(field(&x, "www-authenticate"), "Bearer realm=\"jwt\"", "{name}");
            }
        }
    }

    #[tokio::test]
    async fn claims_decide_who_calls_and_when() {
        const FAILED: &str = "failed to verify jwt";
        let far = 4_000_000_000_u64;
        let hour_ago = now() - 1800.0;
        let (none, exp) = (json!({}), json!({"claims_to_verify": ["exp"]}));
        let nbf = json!({"claims_to_verify": ["nbf"]});
        let cases = [
            ("no times", none.clone(), json!({"key": "user-key"}), ""),
            ("a future end", none.clone(), json!({"key": "user-key", "exp": far}), ""),
            ("a past end", none.clone(), json!({"key": "user-key", "exp": 1}), FAILED),
            ("an end of zero", none.clone(), json!({"key": "user-key", "exp": 0}), FAILED),
            ("an end that is text", none.clone(), json!({"key": "user-key", "exp": "4000000000"}), FAILED),
            ("a future start", none.clone(), json!({"key": "user-key", "nbf": far}), FAILED),
            ("a past start", none.clone(), json!({"key": "user-key", "nbf": 1}), ""),
            ("a little late, with grace", none.clone(), json!({"key": "late", "exp": hour_ago}), ""),
            ("a little early, with grace", none.clone(), json!({"key": "late", "nbf": now() + 1800.0}), ""),
            ("an end is asked for", exp.clone(), json!({"key": "user-key"}), FAILED),
            ("an end is there", exp.clone(), json!({"key": "user-key", "exp": far, "nbf": far}), ""),
            ("a start is asked for", nbf.clone(), json!({"key": "user-key", "nbf": 1, "exp": 1}), ""),
            ("no claims asked for is the default", json!({"claims_to_verify": []}),
             json!({"key": "user-key", "exp": 1}), FAILED),
            ("no consumer", none.clone(), json!({"exp": far}), "missing user key in JWT token"),
            ("a consumer that is not there", none.clone(), json!({"key": "x"}), "Invalid user key in JWT token"),
            ("a number for a consumer", none.clone(), json!({"key": 7}), "Invalid user key in JWT token"),
            ("another claim", json!({"key_claim_name": "iss"}), json!({"iss": "user-key"}), ""),
            ("another claim, missing", json!({"key_claim_name": "iss"}), json!({"key": "user-key"}),
             "missing user key in JWT token"),
        ];
        for (name, config, claims, message) in cases {
            let mut x = run(config, get("http://a/").header("authorization", &token(&claims))).await;
            let got = if x.consumer.is_some() { String::new() } else { text(&mut x).await };
            let expected =
                if message.is_empty() { String::new() } else { format!("{{\"message\":\"{message}\"}}\n") };
            assert_eq!(got, expected, "{name}");
        }
    }

    #[tokio::test]
    async fn a_token_is_signed_with_the_key_of_its_own_consumer() {
        for (secret, key, status) in [
            (&b"my-secret-key"[..], "user-key", 200),
            (b"other", "user-key", 401),
            (b"", "user-key", 401),
            (b"\xff\x00raw", "b64", 200),
            (STANDARD.encode(b"\xff\x00raw").as_bytes(), "b64", 401),
            (b"my-secret-key", "b64", 401),
        ] {
            let token = hs256(secret, &json!({"key": key}));
            let x = run(json!({}), get("http://a/").header("authorization", &token)).await;
            assert_eq!(x.status(), status, "{key}");
        }
    }

    #[tokio::test]
    async fn a_slow_signature_is_verified_all_the_same() {
        let pair = signature::EcdsaKeyPair::generate(&signature::ECDSA_P384_SHA384_FIXED_SIGNING).unwrap();
        let der = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::PublicKeyX509Der<'_>>::as_der(pair.public_key());
        let pem = format!(
            "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----",
            STANDARD.encode(der.unwrap().as_ref())
        );
        let mut table = ConsumerTable::default();
        let settings = json!({"key": "slow", "algorithm": "ES384", "public_key": pem});
        enrol::<JwtAuth>(&mut table, Consumer::new("slow"), &settings).unwrap();
        let env = TestEnv::default();
        env.consumers.publish(table);
        let mut chain = env.chain::<JwtAuth, _>(&json!({}), |_| Ok(())).unwrap();
        let signed = format!("{}.{}", part(&json!({"alg": "ES384"})), part(&json!({"key": "slow"})));
        let good = pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        let other = pair.sign(&SystemRandom::new(), b"else").unwrap();
        for (signature, status) in [(good, 200), (other, 401)] {
            let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature));
            let x = chain.run(get("http://a/").header("authorization", &token).build()).await;
            assert_eq!(x.status(), status);
        }
    }

    #[tokio::test]
    async fn a_token_is_hidden_where_it_stands() {
        let (good, hide) = (good(), json!({"hide_credentials": true}));
        let x = run(hide.clone(), get("http://a/").header("authorization", &good)).await;
        assert!(!x.request.headers.contains_key("authorization"));
        let x = run(hide.clone(), get(&format!("http://a/p?a=1&jwt={good}"))).await;
        assert_eq!(x.request.uri.query(), Some("a=1"));
        let x = run(hide.clone(), get("http://a/").header("cookie", &format!("a=b; jwt={good}; c=d"))).await;
        assert_eq!(x.request.headers["cookie"], "a=b; c=d");
        let x = run(json!({}), get("http://a/").header("authorization", &good)).await;
        assert_eq!(x.request.headers["authorization"], good.as_str());
        // A refused request stays as it was, for the next plugin of `multi-auth`.
        let x = run(hide, get("http://a/").header("authorization", "Basic Zm9vOmJhcg==")).await;
        assert!(x.request.headers.contains_key("authorization"));
    }

    #[tokio::test]
    async fn without_a_valid_token_the_anonymous_consumer_calls() {
        let config = json!({"anonymous_consumer": "guest", "hide_credentials": true});
        let x = run(config, get("http://a/").header("authorization", "Bearer x.y.z")).await;
        assert_eq!((x.status(), &*x.consumer.as_ref().unwrap().name), (200, "guest"));
        assert!(!x.request.headers.contains_key("authorization"));
        let mut x = run(json!({"anonymous_consumer": "gone"}), get("http://a/")).await;
        assert_eq!((x.status(), field(&x, "www-authenticate")), (401, "Bearer realm=\"jwt\""));
        assert_eq!(text(&mut x).await, "{\"message\":\"Invalid user authorization\"}\n");
    }

    #[tokio::test]
    async fn what_a_token_says_is_kept_when_asked_for() {
        let variable = Var::parse(PAYLOAD_VARIABLE);
        let stored = run(json!({"store_in_ctx": true}), get("http://a/").header("authorization", &good())).await;
        assert_eq!(stored.slot::<Payload>().unwrap().0["key"], "user-key");
        let variable_value: Value = serde_json::from_str(&stored.get(&variable).unwrap()).unwrap();
        assert_eq!(variable_value, json!({"key": "user-key", "exp": 4_000_000_000_u64}));
        let not = run(json!({}), get("http://a/").header("authorization", &good())).await;
        assert!(not.slot::<Payload>().is_none() && not.get(&variable).is_none());
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let pair = signature::Ed25519KeyPair::generate().unwrap();
        let raw = STANDARD.encode(pair.public_key());
        let not_spki = format!("-----BEGIN PUBLIC KEY-----\n{raw}\n-----END PUBLIC KEY-----");
        let cases = [
            (json!({"key": ""}), "/key"),
            (json!({"secret": "x"}), ""),
            (json!({"key": "a"}), ""),
            (json!({"key": "a", "secret": ""}), "/secret"),
            (json!({"key": "a", "secret": "no base64!", "base64_secret": true}), "/secret"),
            (json!({"key": "a", "algorithm": "RS256", "secret": "x"}), ""),
            (json!({"key": "a", "algorithm": "RS256", "public_key": "x"}), "/public_key"),
            (json!({"key": "a", "algorithm": "ES256", "public_key": not_spki}), "/public_key"),
            (json!({"key": "a", "algorithm": "none"}), "/algorithm"),
            (json!({"key": "a", "secret": "x", "exp": 0}), "/exp"),
            (json!({"key": "a", "secret": "x", "lifetime_grace_period": -1}), "/lifetime_grace_period"),
        ];
        let mut table = ConsumerTable::default();
        for (settings, pointer) in cases {
            let errors = enrol::<JwtAuth>(&mut table, Consumer::new("a"), &settings).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{settings}: {errors:?}");
        }
        for (settings, pointer) in [
            (json!({"header": "a b"}), "/header"),
            (json!({"realm": "\""}), "/realm"),
            (json!({"claims_to_verify": ["iat"]}), "/claims_to_verify/0"),
            (json!({"claims_to_verify": ["exp", "exp"]}), "/claims_to_verify"),
            (json!({"key_claim_name": ""}), "/key_claim_name"),
        ] {
            let errors = env().build::<JwtAuth>(&settings).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{settings}: {errors:?}");
        }
        let schema = config::typed::schema_of::<ConsumerConfig>();
        for secret in ["secret", "private_key"] {
            assert_eq!(schema["properties"][secret]["x-encrypted"], true);
        }
    }
}
