//! `hmac-auth`: the caller signs parts of the request with a secret it shares with the gateway
//! (draft-cavage-http-signatures, as APISIX reads it).
//!
//! Phase: `rewrite`. Signatures are compared in constant time, for unknown keys too. A body is read only behind a valid
//! signature that covers its digest, at most `max_req_body_size` bytes of it. Unlike APISIX, the date that is checked
//! must be the one that is signed, and a signed field stands once.

use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::{constant_time, digest, hmac};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use config::error::ConfigError;
use config::fields::{Int, List, WideText};
use config::sensitive::Sensitive;
use http::{HeaderName, header};
use layers::consumer::Consumer;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Extras, Flow, Hooks, Rewrite, RewriteWaits, Verifier};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::support::credentials::{self, Gate, Shown};
use crate::support::reply::Canned;
use crate::support::request_body;

/// Settings on a route or service.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The algorithms that a caller may sign by.
    #[serde(default = "all_algorithms")]
    allowed_algorithms: List<Algorithm>,
    /// How far the time of a request may be from the gateway's, in seconds.
    #[serde(default)]
    clock_skew: Int<1, { u32::MAX }, 300>,
    /// Fields that a signature must cover. `@request-target` stands for method and target. With an empty list the
    /// caller alone decides what it signs.
    #[serde(default = "date")]
    signed_headers: List<WideText<1, 50>, 0>,
    /// Compare the body with the `Digest` field, which must be signed then.
    #[serde(default)]
    validate_request_body: bool,
    /// The largest body that is read to be compared, in bytes; a larger one is answered with 413.
    #[serde(default)]
    max_req_body_size: Int<1, { u32::MAX }, 67_108_864>,
    /// Take the `Authorization` field out of the request before it is forwarded.
    #[serde(default)]
    hide_credentials: bool,
    /// The realm in `WWW-Authenticate` of a refusal.
    #[serde(default = "realm")]
    realm: String,
    /// The consumer that a request without a valid signature belongs to. Without it such a request is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    anonymous_consumer: Option<String>,
}

/// How a request is signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub enum Algorithm {
    /// With SHA-1.
    #[serde(rename = "hmac-sha1")]
    Sha1,
    /// With SHA-256.
    #[serde(rename = "hmac-sha256")]
    Sha256,
    /// With SHA-512.
    #[serde(rename = "hmac-sha512")]
    Sha512,
}

impl Algorithm {
    const ALL: [Self; 3] = [Self::Sha1, Self::Sha256, Self::Sha512];

    const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "hmac-sha1",
            Self::Sha256 => "hmac-sha256",
            Self::Sha512 => "hmac-sha512",
        }
    }

    fn kind(self) -> hmac::Algorithm {
        match self {
            Self::Sha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => hmac::HMAC_SHA256,
            Self::Sha512 => hmac::HMAC_SHA512,
        }
    }
}

fn all_algorithms() -> List<Algorithm> {
    #[expect(clippy::expect_used, reason = "a constant that is not empty")]
    List::new(Algorithm::ALL.to_vec()).expect("three algorithms")
}

fn date() -> List<WideText<1, 50>, 0> {
    #[expect(clippy::expect_used, reason = "a constant within its limits")]
    List::new(vec![WideText::new("date").expect("4 characters")]).expect("one name")
}

fn realm() -> String {
    "hmac".into()
}

/// Settings on a consumer or credential.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsumerConfig {
    /// What `keyId` of a signature says.
    key_id: WideText<1, 256>,
    /// The secret that requests are signed with.
    #[schemars(extend("x-encrypted" = true))]
    secret_key: Sensitive<1, 256>,
}

/// The secret of a consumer. Keys are made of it for each request: they are a kilobyte each and made in a microsecond.
struct Secret(Sensitive<1, 256>);

impl Verifier for Secret {
    type Settings = ConsumerConfig;

    fn new(settings: ConsumerConfig) -> Result<Self, ConfigError> {
        Ok(Self(settings.secret_key))
    }
}

/// The plugin.
pub struct HmacAuth {
    algorithms: List<Algorithm>,
    skew: u64,
    /// In lower case.
    required: Box<[Box<str>]>,
    body_limit: usize,
    hide: bool,
    gate: Gate,
    nobody: [u8; 32],
    control: Handle,
    missing: Canned,
    unsigned: Canned,
    refused: Canned,
}

impl Definition for HmacAuth {
    const NAME: &'static str = "hmac-auth";
    const PRIORITY: i32 = 2530;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::NEEDS_CONSUMERS;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.verifier::<Secret>(|settings| settings.get("key_id")?.as_str().map(str::to_owned));
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let names = config.signed_headers.iter().enumerate().filter_map(|(index, name)| {
            let is_name = &**name == TARGET || HeaderName::from_bytes(name.as_bytes()).is_ok();
            let words = format!("`{}` is not the name of a header field, nor `{TARGET}`", &**name);
            (!is_name).then(|| ConfigError::invalid(format!("/signed_headers/{index}"), words))
        });
        names.chain(credentials::challenge(CHALLENGE, &config.realm).err()).collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let challenge = credentials::challenge(CHALLENGE, &config.realm)?;
        let mut required: Vec<Box<str>> =
            config.signed_headers.iter().map(|name| name.to_ascii_lowercase().into()).collect();
        // A digest that nobody signed says only that the body is the one that was sent.
        if config.validate_request_body && required.iter().all(|name| &**name != DIGEST.as_str()) {
            required.push(DIGEST.as_str().into());
        }
        const REFUSED: &str = "client request can't be validated";
        let plugin = Arc::new(Self {
            algorithms: config.allowed_algorithms,
            skew: config.clock_skew.get().into(),
            required: required.into(),
            body_limit: usize::try_from(config.max_req_body_size.get()).unwrap_or(usize::MAX),
            hide: config.hide_credentials,
            gate: Gate::new(env.consumers, config.anonymous_consumer, &challenge),
            nobody: credentials::random(),
            control: env.control.clone(),
            missing: credentials::refusal(&challenge, &format!("{REFUSED}: missing Authorization header")),
            unsigned: credentials::refusal(
                &challenge,
                &format!("{REFUSED}: Authorization header does not start with 'Signature'"),
            ),
            refused: credentials::refusal(&challenge, REFUSED),
        });
        if config.validate_request_body {
            hooks.rewrite_waits(&plugin);
        } else {
            hooks.rewrite(&plugin);
        }
        Ok(())
    }
}

const SCHEME: &str = "Signature";
const CHALLENGE: &str = "hmac";
const TARGET: &str = "@request-target";
const DATE: &str = "date";
const X_DATE: &str = "x-date";
const DIGEST: HeaderName = HeaderName::from_static("digest");
/// So many fields may be signed. Each costs a look at the ones before it.
const MAX_SIGNED: usize = 64;
/// Bodies up to this size are hashed on the worker, in bytes.
const HASHED_AT_ONCE: usize = 64 * 1024;

impl Rewrite for HmacAuth {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        let found = self.recognise(x);
        self.settle(x, found)
    }
}

impl RewriteWaits for HmacAuth {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        let found = match self.recognise(x) {
            Ok(known) => match self.check_body(x).await {
                Digest::Same => Ok(known),
                Digest::Differs => Err(&self.refused),
                // The body is gone, or part of it: no other plugin may let this request in.
                Digest::Unknown(answer) => return answer,
            },
            Err(refusal) => Err(refusal),
        };
        self.settle(x, found)
    }
}

/// What became of the comparison of a body.
enum Digest {
    Same,
    Differs,
    /// The body could not be read; the answer to give.
    Unknown(Flow),
}

impl HmacAuth {
    fn settle(&self, x: &mut Exchange, found: Result<Arc<Consumer>, &Canned>) -> Flow {
        let flow = self.gate.settle(x, found);
        if self.hide && matches!(flow, Flow::Next) {
            x.request.headers.remove(header::AUTHORIZATION);
        }
        flow
    }

    /// Whose signature it is.
    fn recognise(&self, x: &Exchange) -> Result<Arc<Consumer>, &Canned> {
        let text = match credentials::shown(&x.request.headers, &header::AUTHORIZATION) {
            Shown::Nothing => return Err(&self.missing),
            Shown::Unusable => return Err(&self.refused),
            Shown::Text(text) => credentials::after_scheme(text, SCHEME).ok_or(&self.unsigned)?,
        };
        self.find(x, text).ok_or(&self.refused)
    }

    fn find(&self, x: &Exchange, text: &str) -> Option<Arc<Consumer>> {
        let signature = Signature::parse(text)?;
        let algorithm = *self.algorithms.iter().find(|allowed| allowed.name() == signature.algorithm)?;
        let clock = self.clock(x)?;
        let covered = |name: &str| signature.headers.iter().any(|signed| signed.eq_ignore_ascii_case(name));
        // A date that is signed protects only if it is the one whose age is checked.
        if !self.required.iter().all(|name| covered(if &**name == DATE { clock } else { name })) {
            return None;
        }
        let known = self.gate.find(Self::NAME, signature.key_id);
        let secret = known.as_ref().and_then(|known| known.verifier::<Secret>());
        let bytes = secret.map_or(&self.nobody[..], |secret| secret.0.reveal().as_bytes());
        let expected = signature.made_with(&hmac::Key::new(algorithm.kind(), bytes), x)?;
        let shown = STANDARD.decode(signature.value).unwrap_or_default();
        let may_pass =
            constant_time::verify_slices_are_equal(expected.as_ref(), &shown).is_ok() && secret.is_some();
        known.filter(|_| may_pass)
    }

    /// The name of the field that tells the time of the request, if that time is near enough.
    fn clock(&self, x: &Exchange) -> Option<&'static str> {
        let headers = &x.request.headers;
        let (name, shown) = match credentials::shown(headers, &header::DATE) {
            Shown::Nothing => (X_DATE, credentials::shown(headers, &HeaderName::from_static(X_DATE))),
            shown => (DATE, shown),
        };
        let Shown::Text(text) = shown else { return None };
        let (time, now) = (httpdate::parse_http_date(text).ok()?, SystemTime::now());
        let apart = now.duration_since(time).or_else(|_| time.duration_since(now)).ok()?;
        (apart.as_secs() <= self.skew).then_some(name)
    }

    /// Compares the body with `Digest`. It is there to be forwarded afterwards. How long a client may take for its
    /// body is watched by the connection.
    async fn check_body(&self, x: &mut Exchange) -> Digest {
        let Shown::Text(shown) = credentials::shown(&x.request.headers, &DIGEST) else { return Digest::Differs };
        let Some(shown) = shown.strip_prefix("SHA-256=").map(str::to_owned) else { return Digest::Differs };
        let body = match request_body::read(x, self.body_limit).await {
            Ok(body) => body,
            Err(answer) => return Digest::Unknown(answer),
        };
        let made = if body.len() <= HASHED_AT_ONCE {
            sha256(&body)
        } else {
            match self.control.spawn_blocking(move || sha256(&body)).await {
                Ok(made) => made,
                Err(_) => return Digest::Differs,
            }
        };
        if made == shown { Digest::Same } else { Digest::Differs }
    }
}

fn sha256(body: &Bytes) -> String {
    STANDARD.encode(digest::digest(&digest::SHA256, body))
}

/// A signature as `Authorization` says it.
struct Signature<'a> {
    key_id: &'a str,
    algorithm: &'a str,
    headers: Vec<&'a str>,
    value: &'a str,
}

impl<'a> Signature<'a> {
    /// Reads `keyId="...",algorithm="...",headers="...",signature="..."`, in any order; others are passed over.
    fn parse(mut text: &'a str) -> Option<Self> {
        let [mut key_id, mut algorithm, mut headers, mut value] = [None; 4];
        loop {
            text = text.trim_start_matches([' ', ',']);
            if text.is_empty() {
                break;
            }
            let (name, rest) = text.split_once("=\"")?;
            let (content, rest) = rest.split_once('"')?;
            let place = match name.trim() {
                "keyId" => &mut key_id,
                "algorithm" => &mut algorithm,
                "headers" => &mut headers,
                "signature" => &mut value,
                _ => {
                    text = rest;
                    continue;
                }
            };
            // Of two, somebody else could believe the other.
            if place.replace(content).is_some() {
                return None;
            }
            text = rest;
        }
        let headers: Vec<&str> =
            headers.unwrap_or_default().split(' ').filter(|name| !name.is_empty()).collect();
        let is_repeated = |(index, name): (usize, &&str)| {
            headers.iter().take(index).any(|before| before.eq_ignore_ascii_case(name))
        };
        if headers.len() > MAX_SIGNED || headers.iter().enumerate().any(is_repeated) {
            return None;
        }
        Some(Self { key_id: key_id?, algorithm: algorithm?, headers, value: value? })
    }

    /// The signature that the holder of `key` would make of this request: of the key's id and, a line each, the fields
    /// that are there. Nothing if a signed field stands more than once: the upstream could take the other one.
    fn made_with(&self, key: &hmac::Key, x: &Exchange) -> Option<hmac::Tag> {
        let mut lines = hmac::Context::with_key(key);
        let mut line = |parts: &[&[u8]]| {
            parts.iter().for_each(|part| lines.update(part));
            lines.update(b"\n");
        };
        line(&[self.key_id.as_bytes()]);
        for name in &self.headers {
            if *name == TARGET {
                line(&[x.request.method.as_str().as_bytes(), b" ", x.request_uri().as_bytes()]);
                continue;
            }
            if name.eq_ignore_ascii_case(header::HOST.as_str())
                && let Some(host) = x.authority()
            {
                line(&[name.as_bytes(), b": ", host.as_bytes()]);
                continue;
            }
            let Ok(field) = HeaderName::from_bytes(name.as_bytes()) else { continue };
            let mut values = x.request.headers.get_all(&field).iter();
            match (values.next(), values.next()) {
                (None, _) => {}
                (Some(value), None) => line(&[name.as_bytes(), b": ", value.as_bytes()]),
                (Some(_), Some(_)) => return None,
            }
        }
        Some(lines.sign())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use http::HeaderValue;
    use layers::consumer::ConsumerTable;
    use layers::testing::{ExchangeBuilder, TestEnv, enrol, exchange, field, text};
    use serde_json::{Value, json};

    use super::*;

    fn env() -> TestEnv {
        let mut table = ConsumerTable::default();
        let settings = json!({"key_id": "my-access-key", "secret_key": "my-secret-key"});
        enrol::<HmacAuth>(&mut table, Consumer::new("jack"), &settings).unwrap();
        table.insert_named(Arc::new(Consumer::new("guest")));
        let env = TestEnv::default();
        env.consumers.publish(table);
        env
    }

    async fn run(config: Value, request: ExchangeBuilder) -> Exchange {
        env().chain::<HmacAuth, _>(&config, |_| Ok(())).unwrap().run(request.build()).await
    }

    fn time(seconds_from_now: i64) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(now.saturating_add_signed(seconds_from_now)))
    }

    /// The field that signs `lines` by HMAC-SHA256.
    fn signed(headers: &str, lines: &str) -> String {
        signed_by("my-access-key", "hmac-sha256", headers, lines)
    }

    fn signed_by(key_id: &str, algorithm: &str, headers: &str, lines: &str) -> String {
        let kind = match algorithm {
            "hmac-sha1" => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
            "hmac-sha512" => hmac::HMAC_SHA512,
            _ => hmac::HMAC_SHA256,
        };
        let text = format!("{key_id}\n{lines}");
        let tag = STANDARD.encode(hmac::sign(&hmac::Key::new(kind, b"my-secret-key"), text.as_bytes()));
        format!(
            "Signature keyId=\"{key_id}\",algorithm=\"{algorithm}\",headers=\"{headers}\",signature=\"{tag}\""
        )
    }

    fn get(uri: &str) -> ExchangeBuilder {
        exchange("GET", uri)
    }

    const REFUSED: &str = "client request can't be validated";

    #[tokio::test]
    async fn a_signature_covers_what_it_says() {
        let date = time(0);
        let dated = |headers: &str, lines: &str| {
            get("http://a/p?b=1").header("date", &date).header("authorization", &signed(headers, lines))
        };
        let line = format!("date: {date}\n");
        let all = format!("GET /p?b=1\n{line}x-a: 1\nhost: a\n");
        let cases = [
            ("the date", dated("date", &line), true),
            ("target, date, fields and host",
             dated("@request-target date x-a host", &all).header("x-a", "1").header("host", "a"), true),
            ("names as they are written", dated("Date", &format!("Date: {date}\n")), true),
            ("a field that is not there", dated("date x-b", &line), true),
            ("a field that came later", dated("date x-b", &line).header("x-b", "1"), false),
            ("another value", dated("date x-a", &format!("{line}x-a: 1\n")).header("x-a", "2"), false),
            ("a field twice", dated("date x-a", &format!("{line}x-a: 1\n")).header("x-a", "1").header("x-a", "2"),
             false),
            ("a name twice", dated("date date", &format!("{line}{line}")), false),
            ("another target", dated("@request-target date", &format!("GET /p?b=2\n{line}")), false),
            ("another method", dated("@request-target date", &format!("POST /p?b=1\n{line}")), false),
            ("no date signed", dated("@request-target", "GET /p?b=1\n"), false),
            ("nothing signed", dated("", ""), false),
        ];
        for (name, request, passes) in cases {
            let mut x = run(json!({}), request).await;
            assert_eq!(x.consumer.is_some(), passes, "{name}");
            if !passes {
                assert_eq!((x.status(), field(&x, "www-authenticate")), (401, "hmac realm=\"hmac\""), "{name}");
                assert_eq!(text(&mut x).await, format!("{{\"message\":\"{REFUSED}\"}}\n"), "{name}");
            }
        }
    }

    #[tokio::test]
    async fn keys_and_algorithms_are_checked() {
        let (date, some) = (time(0), json!({"allowed_algorithms": ["hmac-sha512"]}));
        let line = format!("date: {date}\n");
        let by = |key: &str, algorithm: &str| signed_by(key, algorithm, "date", &line);
        let cases = [
            ("SHA-1", json!({}), by("my-access-key", "hmac-sha1"), true),
            ("SHA-512", json!({}), by("my-access-key", "hmac-sha512"), true),
            ("one that is allowed", some.clone(), by("my-access-key", "hmac-sha512"), true),
            ("one that is not allowed", some, by("my-access-key", "hmac-sha256"), false),
            ("one that there is not", json!({}), by("my-access-key", "hmac-md5"), false),
            ("a key that there is not", json!({}), by("other-key", "hmac-sha256"), false),
            ("no signature", json!({}), "Signature keyId=\"my-access-key\",algorithm=\"hmac-sha256\"".into(), false),
            ("an empty one", json!({}), "Signature keyId=\"my-access-key\",algorithm=\"hmac-sha256\",\
                headers=\"date\",signature=\"\"".into(), false),
            ("two keys", json!({}), by("my-access-key", "hmac-sha256") + ",keyId=\"x\"", false),
            ("a parameter of others", json!({}), by("my-access-key", "hmac-sha256") + ", created=\"1\"", true),
            ("an open quote", json!({}), by("my-access-key", "hmac-sha256") + ",x=\"", false),
        ];
        for (name, config, authorization, passes) in cases {
            let request = get("http://a/").header("date", &date).header("authorization", &authorization);
            assert_eq!(run(config, request).await.consumer.is_some(), passes, "{name}");
        }
        for (authorization, message) in [
            (None, format!("{REFUSED}: missing Authorization header")),
            (Some("Basic x"), format!("{REFUSED}: Authorization header does not start with 'Signature'")),
        ] {
            let request = get("http://a/");
            let request = match authorization {
                Some(text) => request.header("authorization", text),
                None => request,
            };
            let mut x = run(json!({}), request).await;
            assert_eq!(text(&mut x).await, format!("{{\"message\":\"{message}\"}}\n"));
        }
    }

    #[tokio::test]
    async fn the_time_that_is_checked_is_the_one_that_is_signed() {
        let (now, old) = (time(0), time(-400));
        let one = |name: &str, time: &str| {
            get("http://a/").header(name, time).header("authorization", &signed(name, &format!("{name}: {time}\n")))
        };
        let listed = get("http://a/").header("x-date", &now).header("authorization", &signed("date", ""));
        let unsigned = one("x-date", &old).header("date", &now);
        let cases = [
            ("now", json!({}), one("date", &now), true),
            ("a little ahead", json!({}), one("date", &time(200)), true),
            ("old", json!({}), one("date", &old), false),
            ("far ahead", json!({}), one("date", &time(400)), false),
            ("old, and allowed to be", json!({"clock_skew": 1000}), one("date", &old), true),
            ("in X-Date", json!({}), one("x-date", &now), true),
            ("old in X-Date", json!({}), one("x-date", &old), false),
            ("no time", json!({}), one("date", "yesterday"), false),
            ("a fresh Date beside an old X-Date that is signed", json!({}), unsigned, false),
            ("X-Date that is not signed, while the list says date", json!({}), listed, false),
            ("the caller decides what it signs", json!({"signed_headers": []}),
             get("http://a/").header("date", &now).header("authorization", &signed("", "")), true),
            ("no time at all", json!({"signed_headers": []}),
             get("http://a/").header("authorization", &signed("", "")), false),
        ];
        for (name, config, request, passes) in cases {
            assert_eq!(run(config, request).await.consumer.is_some(), passes, "{name}");
        }
    }

    #[tokio::test]
    async fn a_body_is_compared_with_a_digest_that_is_signed() {
        let date = time(0);
        let config = json!({"validate_request_body": true, "max_req_body_size": 100_000});
        let post = |digest: &str, headers: &str, body: String| {
            let lines: String = headers
                .split(' ')
                .map(|name| format!("{name}: {}\n", if name == "date" { &date } else { digest }))
                .collect();
            exchange("POST", "http://a/")
                .header("date", &date)
                .header("digest", digest)
                .header("authorization", &signed(headers, &lines))
                .body(body)
        };
        let of = |body: &str| format!("SHA-256={}", sha256(&Bytes::from(body.to_owned())));
        let long = "x".repeat(90_000);
        let cases = [
            ("the right one", post(&of("hello"), "date digest", "hello".into()), 200),
            ("of no body", post(&of(""), "date digest", String::new()), 200),
            ("of a long body", post(&of(&long), "date digest", long.clone()), 200),
            ("another body", post(&of("hello"), "date digest", "hallo".into()), 401),
            ("a digest that is not signed", post(&of("hello"), "date", "hello".into()), 401),
            ("another hash", post("SHA-512=abc", "date digest", "hello".into()), 401),
            ("too large", post(&of("hello"), "date digest", "x".repeat(100_001)), 413),
        ];
        for (name, request, status) in cases {
            let mut x = run(config.clone(), request).await;
            assert_eq!(x.status(), status, "{name}");
            if status == 200 {
                let kept = x.request_body.collect_up_to(200_000).await.unwrap();
                assert_eq!(of(std::str::from_utf8(&kept).unwrap()), x.request.headers["digest"], "{name}");
            }
        }
        // Nobody's body is read before its signature is found right.
        let forged = post(&of("hello"), "date digest", "x".repeat(100_001)).header("x", "y");
        let mut x = forged.build();
        x.request.headers.insert("authorization", HeaderValue::from_static("Signature keyId=\"a\""));
        let mut chain = env().chain::<HmacAuth, _>(&config, |_| Ok(())).unwrap();
        assert_eq!(chain.run(x).await.status(), 401);
    }

    #[tokio::test]
    async fn credentials_are_hidden_and_the_anonymous_consumer_stands_in() {
        let date = time(0);
        let good = || {
            let authorization = signed("date", &format!("date: {date}\n"));
            get("http://a/").header("date", &date).header("authorization", &authorization)
        };
        let x = run(json!({}), good()).await;
        assert!(x.request.headers.contains_key("authorization"));
        let x = run(json!({"hide_credentials": true}), good()).await;
        assert!(!x.request.headers.contains_key("authorization"));
        let x = run(json!({"anonymous_consumer": "guest"}), get("http://a/")).await;
        assert_eq!((x.status(), &*x.consumer.as_ref().unwrap().name), (200, "guest"));
        let mut x = run(json!({"anonymous_consumer": "gone"}), get("http://a/")).await;
        assert_eq!(text(&mut x).await, "{\"message\":\"Invalid user authorization\"}\n");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (settings, pointer) in [
            (json!({"allowed_algorithms": []}), "/allowed_algorithms"),
            (json!({"allowed_algorithms": ["hmac-md5"]}), "/allowed_algorithms/0"),
            (json!({"clock_skew": 0}), "/clock_skew"),
            (json!({"signed_headers": [""]}), "/signed_headers/0"),
            (json!({"signed_headers": ["date", "a b"]}), "/signed_headers/1"),
            (json!({"max_req_body_size": 0}), "/max_req_body_size"),
            (json!({"realm": "\""}), "/realm"),
        ] {
            let errors = env().build::<HmacAuth>(&settings).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{settings}: {errors:?}");
        }
        let mut table = ConsumerTable::default();
        for (settings, pointer) in [
            (json!({"key_id": "a", "secret_key": ""}), "/secret_key"),
            (json!({"key_id": "", "secret_key": "a"}), "/key_id"),
            (json!({"access_key": "a", "secret_key": "a"}), ""),
        ] {
            let errors = enrol::<HmacAuth>(&mut table, Consumer::new("a"), &settings).unwrap_err();
            assert!(errors.iter().any(|error| error.pointer == pointer), "{settings}: {errors:?}");
        }
        let schema = config::typed::schema_of::<ConsumerConfig>();
        assert_eq!(schema["properties"]["secret_key"]["x-encrypted"], true);
    }
}
