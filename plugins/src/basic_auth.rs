//! `basic-auth`: the caller shows a user name and a password (RFC 7617).
//!
//! Phase: `rewrite`. A password is compared by a digest under a key of the process; for a user that does not exist the
//! same is done, so that neither words nor times tell which names there are. Unlike APISIX, a password may hold colons
//! and white space.

use std::borrow::Cow;
use std::sync::Arc;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use config::error::ConfigError;
use config::sensitive::Sensitive;
use http::header;
use layers::consumer::Consumer;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Extras, Flow, Hooks, Rewrite, Verifier};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::credentials::{self, Fingerprint, Gate, Shown};
use crate::support::reply::Canned;

/// Settings on a route or service.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Take the `Authorization` field out of the request before it is forwarded.
    #[serde(default)]
    hide_credentials: bool,
    /// The consumer that a request without valid credentials belongs to. Without it such a request is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    anonymous_consumer: Option<String>,
    /// The realm in `WWW-Authenticate` of a refusal.
    #[serde(default = "realm")]
    realm: String,
}

fn realm() -> String {
    "basic".into()
}

/// Settings on a consumer or credential.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsumerConfig {
    /// The user name, without a colon.
    username: String,
    /// The password.
    #[schemars(extend("x-encrypted" = true))]
    password: Sensitive,
}

/// The password of a consumer.
struct Password(Fingerprint);

impl Verifier for Password {
    type Settings = ConsumerConfig;

    fn new(settings: ConsumerConfig) -> Result<Self, ConfigError> {
        if settings.username.contains(':') {
            return Err(ConfigError::invalid("/username", "a user name has no colon: the password begins there"));
        }
        Ok(Self(Fingerprint::of(settings.password.reveal().as_bytes())))
    }
}

/// The plugin.
pub struct BasicAuth {
    hide: bool,
    gate: Gate,
    nobody: Fingerprint,
    missing: Canned,
    malformed: Canned,
    wrong: Canned,
}

impl Definition for BasicAuth {
    const NAME: &'static str = "basic-auth";
    const PRIORITY: i32 = 2520;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::NEEDS_CONSUMERS;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.verifier::<Password>(|settings| settings.get("username")?.as_str().map(str::to_owned));
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        credentials::challenge(SCHEME, &config.realm).err().into_iter().collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let challenge = credentials::challenge(SCHEME, &config.realm)?;
        hooks.rewrite(&Arc::new(Self {
            hide: config.hide_credentials,
            gate: Gate::new(env.consumers, config.anonymous_consumer, &challenge),
            nobody: Fingerprint::of_nobody(),
            missing: credentials::refusal(&challenge, "Missing authorization in request"),
            malformed: credentials::refusal(&challenge, "Invalid authorization in request"),
            wrong: credentials::refusal(&challenge, "Invalid user authorization"),
        }));
        Ok(())
    }
}

const SCHEME: &str = "Basic";

impl Rewrite for BasicAuth {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        let found = match credentials::shown(&x.request.headers, &header::AUTHORIZATION) {
            Shown::Nothing => Err(&self.missing),
            Shown::Unusable => Err(&self.malformed),
            Shown::Text(text) => match read(text) {
                Some((user, password)) => self.find(&user, &password).ok_or(&self.wrong),
                None => Err(&self.malformed),
            },
        };
        let flow = self.gate.settle(x, found);
        if self.hide && matches!(flow, Flow::Next) {
            x.request.headers.remove(header::AUTHORIZATION);
        }
        flow
    }
}

impl BasicAuth {
    /// The consumer, if the password is right.
    fn find(&self, user: &str, password: &[u8]) -> Option<Arc<Consumer>> {
        let (user_without, password_without) = (without_space(user.as_bytes()), without_space(password));
        // Both, whether or not the first finds somebody: no name takes less time than another.
        let exact = self.gate.find(Self::NAME, user);
        let without = std::str::from_utf8(&user_without).ok().and_then(|user| self.gate.find(Self::NAME, user));
        let known = exact.or(without);
        let verifier = known.as_ref().and_then(|known| known.verifier::<Password>());
        let fingerprint = verifier.map_or(&self.nobody, |password| &password.0);
        // Both, whatever the first says: APISIX takes white space out before it compares, and clients rely on it.
        let right = fingerprint.matches(password) | fingerprint.matches(&password_without);
        let may_pass = right && verifier.is_some() && !password_without.is_empty();
        known.filter(|_| may_pass)
    }
}

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The user name and the password behind the first colon.
fn read(text: &str) -> Option<(String, Vec<u8>)> {
    let encoded = credentials::after_scheme(text, SCHEME)?;
    let decoded = BASE64.decode(encoded.trim_ascii_end()).ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    let user = String::from_utf8(decoded.get(..colon)?.to_vec()).ok()?;
    Some((user, decoded.get(colon + 1..)?.to_vec()))
}

fn without_space(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.iter().any(u8::is_ascii_whitespace) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect())
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::STANDARD;
    use layers::consumer::ConsumerTable;
    use layers::testing::{ExchangeBuilder, TestEnv, enrol, exchange, field, text};
    use serde_json::{Value, json};

    use super::*;

    fn env() -> TestEnv {
        let mut table = ConsumerTable::default();
        for (name, user, password) in
            [("jack", "foo", "bar"), ("jill", "u\u{e9}", "a:b c"), ("joe", "spaced out", "x")]
        {
            let settings = json!({"username": user, "password": password});
            enrol::<BasicAuth>(&mut table, Consumer::new(name), &settings).unwrap();
        }
        table.insert_named(Arc::new(Consumer::new("guest")));
        let env = TestEnv::default();
        env.consumers.publish(table);
        env
    }

    async fn run(config: Value, request: ExchangeBuilder) -> Exchange {
        env().chain::<BasicAuth, _>(&config, |_| Ok(())).unwrap().run(request.build()).await
    }

    fn with(authorization: &str) -> ExchangeBuilder {
        exchange("GET", "http://a/").header("authorization", authorization)
    }

    fn basic(pair: &[u8]) -> String {
        format!("Basic {}", STANDARD.encode(pair))
    }

    const MISSING: &str = "Missing authorization in request";
    const MALFORMED: &str = "Invalid authorization in request";
    const WRONG: &str = "Invalid user authorization";

    #[tokio::test]
    async fn a_user_shows_the_right_password() {
        let cases = [
            ("the right one", basic(b"foo:bar"), "jack"),
            ("a line end from echo", basic(b"foo:bar\n"), "jack"),
            ("no padding", "Basic Zm9vOmJhcg".to_owned(), "jack"),
            ("the scheme in lower case", "basic Zm9vOmJhcg==".to_owned(), "jack"),
            ("two spaces", "Basic  Zm9vOmJhcg==".to_owned(), "jack"),
            ("colons, space and more than ASCII", basic("u\u{e9}:a:b c".as_bytes()), "jill"),
            ("a space in the name", basic(b"spaced out:x"), "joe"),
            ("a wrong password", basic(b"foo:baz"), WRONG),
            ("the start of it", basic(b"foo:ba"), WRONG),
            ("more than it", basic(b"foo:bar:"), WRONG),
            ("no password", basic(b"foo:"), WRONG),
            ("space for a password", basic(b"foo: "), WRONG),
            ("nobody", basic(b"nobody:bar"), WRONG),
            ("no user", basic(b":bar"), WRONG),
            ("bytes for a password", basic(b"foo:\xff\x00"), WRONG),
            ("bytes for a user", basic(b"\xff:bar"), MALFORMED),
            ("no colon", basic(b"foo"), MALFORMED),
            ("no base64", "Basic !!".to_owned(), MALFORMED),
            ("nothing behind the scheme", "Basic ".to_owned(), MALFORMED),
            ("the scheme alone", "Basic".to_owned(), MALFORMED),
            ("another scheme", "Bearer Zm9vOmJhcg==".to_owned(), MALFORMED),
            ("nothing", String::new(), MALFORMED),
        ];
        for (name, authorization, expected) in cases {
            let mut x = run(json!({}), with(&authorization)).await;
            match &x.consumer {
                Some(consumer) => assert_eq!(&*consumer.name, expected, "{name}"),
                None => {
                    assert_eq!(x.status(), 401, "{name}");
                    assert_eq!(field(&x, "www-authenticate"), "Basic realm=\"basic\"", "{name}");
                    assert_eq!(text(&mut x).await, format!("{{\"message\":\"{expected}\"}}\n"), "{name}");
                }
            }
        }
        let mut x = run(json!({}), exchange("GET", "http://a/")).await;
        assert_eq!((x.status(), text(&mut x).await), (401, format!("{{\"message\":\"{MISSING}\"}}\n")));
        let twice = with(&basic(b"foo:bar")).header("authorization", "Basic eDp5");
        assert_eq!(run(json!({}), twice).await.status(), 401);
    }

    #[tokio::test]
    async fn credentials_are_hidden_from_the_upstream() {
        let right = || with(&basic(b"foo:bar"));
        let shown = run(json!({}), right()).await;
        assert!(shown.request.headers.contains_key("authorization"));
        let hidden = run(json!({"hide_credentials": true}), right()).await;
        assert!(!hidden.request.headers.contains_key("authorization"));
        assert_eq!(hidden.request.headers["x-consumer-username"], "jack");
    }

    #[tokio::test]
    async fn without_valid_credentials_the_anonymous_consumer_calls() {
        let config = json!({"anonymous_consumer": "guest", "hide_credentials": true});
        let x = run(config, with(&basic(b"foo:wrong"))).await;
        assert_eq!((x.status(), &*x.consumer.as_ref().unwrap().name), (200, "guest"));
        assert!(!x.request.headers.contains_key("authorization"));
        let mut x = run(json!({"anonymous_consumer": "gone"}), exchange("GET", "http://a/")).await;
        assert_eq!((x.status(), text(&mut x).await), (401, format!("{{\"message\":\"{WRONG}\"}}\n")));
        assert_eq!(field(&x, "www-authenticate"), "Basic realm=\"basic\"");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let mut table = ConsumerTable::default();
        let mut enrol = |settings: Value| {
            enrol::<BasicAuth>(&mut table, Consumer::new("a"), &settings).unwrap_err()[0].pointer.clone()
        };
        assert_eq!(enrol(json!({"username": "a", "password": ""})), "/password");
        assert_eq!(enrol(json!({"username": "a:b", "password": "x"})), "/username");
        assert_eq!(enrol(json!({"username": "a"})), "", "a field is missing");
        let errors = env().build::<BasicAuth>(&json!({"realm": "a\"b"})).unwrap_err();
        assert_eq!(errors[0].pointer, "/realm");
        let schema = config::typed::schema_of::<ConsumerConfig>();
        assert_eq!(schema["properties"]["password"]["x-encrypted"], true);
    }
}
