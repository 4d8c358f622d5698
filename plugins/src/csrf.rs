//! `csrf`: a request that changes something shows in a header field the token that it got in a cookie.
//!
//! Phases: `access` checks, `header_filter` gives every answer a fresh token. Tokens look as APISIX's do and those of
//! APISIX are taken; our own are signed by HMAC-SHA256 where APISIX hashes key and content together.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{constant_time, digest, hmac};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use config::error::ConfigError;
use config::fields::Int;
use config::sensitive::Sensitive;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use layers::exchange::Exchange;
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks, OnResponse};
use layers::vars::cookie;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use serde_json::value::RawValue;

use crate::support::credentials::{self, Shown};
use crate::support::headers;
use crate::support::reply::Canned;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The secret that tokens are signed with. All gateways that serve the same site have the same.
    #[schemars(extend("x-encrypted" = true))]
    key: Sensitive,
    /// How long a token is good, in seconds; 0 for ever.
    #[serde(default)]
    expires: Int<0, { u32::MAX }, 7200>,
    /// The name of the cookie and of the header field.
    #[serde(default = "name")]
    name: String,
}

fn name() -> String {
    "apisix-csrf-token".into()
}

/// The plugin.
pub struct Csrf {
    key: Sensitive,
    mac: hmac::Key,
    expires: u32,
    name: HeaderName,
    /// As it was written: names of cookies have a case.
    cookie: Box<str>,
    no_header: Canned,
    no_cookie: Canned,
    mismatch: Canned,
    invalid: Canned,
}

impl Definition for Csrf {
    const NAME: &'static str = "csrf";
    const PRIORITY: i32 = 2980;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let name = headers::name(&config.name, "").err();
        name.map(|error| ConfigError::new("/name", error.kind)).into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let refusal =
            |words: &str| Canned::json(StatusCode::UNAUTHORIZED, &json!({ "error_msg": words }));
        let plugin = Arc::new(Self {
            mac: hmac::Key::new(hmac::HMAC_SHA256, config.key.reveal().as_bytes()),
            key: config.key,
            expires: config.expires.get(),
            name: headers::name(&config.name, "/name")?,
            cookie: config.name.trim().into(),
            no_header: refusal("no csrf token in headers"),
            no_cookie: refusal("no csrf cookie"),
            mismatch: refusal("csrf token mismatch"),
            invalid: refusal("Failed to verify the csrf token signature"),
        });
        hooks.access(&plugin);
        hooks.response(&plugin);
        Ok(())
    }
}

/// A token as it stands in the cookie, in base64 and JSON. The numbers are signed as they are written.
#[derive(Deserialize)]
struct Token<'a> {
    #[serde(borrow)]
    random: &'a RawValue,
    /// When it was made, in seconds since 1970.
    #[serde(borrow)]
    expires: &'a RawValue,
    sign: String,
}

impl Access for Csrf {
    fn access(&self, x: &mut Exchange) -> Flow {
        if matches!(x.request.method, Method::GET | Method::HEAD | Method::OPTIONS) {
            return Flow::Next;
        }
        let token = match credentials::shown(&x.request.headers, &self.name) {
            Shown::Nothing | Shown::Text("") => return self.no_header.flow(),
            Shown::Unusable => return self.mismatch.flow(),
            Shown::Text(token) => token,
        };
        let Some(kept) = cookie(&x.request.headers, &self.cookie) else { return self.no_cookie.flow() };
        if constant_time::verify_slices_are_equal(token.as_bytes(), kept.as_bytes()).is_err() {
            return self.mismatch.flow();
        }
        if self.is_valid(token, now()) { Flow::Next } else { self.invalid.flow() }
    }
}

impl OnResponse for Csrf {
    fn response(&self, x: &mut Exchange) {
        let now = now();
        let until = cookie_time(now.saturating_add(self.expires.into()));
        let cookie = format!("{}={};path=/;SameSite=Lax;Expires={until}", self.cookie, self.token(now));
        if let Ok(cookie) = HeaderValue::try_from(cookie) {
            x.response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }
}

impl Csrf {
    /// A new token.
    fn token(&self, now: u64) -> String {
        let [a, b, c, d, e, f, g, h, ..] = credentials::random();
        let digits = u64::from_le_bytes([a, b, c, d, e, f, g, h]) % 100_000_000_000_000;
        let random = format!("0.{digits:014}");
        let sign = hex(hmac::sign(&self.mac, signed(&random, &now.to_string()).as_bytes()).as_ref());
        STANDARD.encode(format!("{{\"random\":{random},\"sign\":\"{sign}\",\"expires\":{now}}}"))
    }

    fn is_valid(&self, token: &str, now: u64) -> bool {
        let Ok(decoded) = STANDARD.decode(token) else { return false };
        let Ok(token) = serde_json::from_slice::<Token<'_>>(&decoded) else { return false };
        let (random, made) = (token.random.get(), token.expires.get());
        // Nothing but numbers: other text could move the borders of what is signed.
        let (Ok(_), Ok(time)) = (random.parse::<f64>(), made.parse::<f64>()) else { return false };
        if self.expires > 0 && now as f64 - time > f64::from(self.expires) {
            return false;
        }
        let ours = hex(hmac::sign(&self.mac, signed(random, made).as_bytes()).as_ref());
        let text = format!("{{expires:{made},random:{random},key:{}}}", self.key.reveal());
        let of_apisix = hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
        let is = |sign: &str| {
            constant_time::verify_slices_are_equal(sign.as_bytes(), token.sign.as_bytes()).is_ok()
        };
        is(&ours) | is(&of_apisix)
    }
}

/// What our own signature covers.
fn signed(random: &str, made: &str) -> String {
    format!("{{expires:{made},random:{random}}}")
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().map_or('0', char::from);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A time as nginx writes it into cookies: `Thu, 18-Nov-10 11:27:35 GMT`, and the whole year from 2038 on.
fn cookie_time(seconds: u64) -> String {
    // The last second of 9999: no calendar goes beyond.
    let time = UNIX_EPOCH + Duration::from_secs(seconds.min(253_402_300_799));
    let text = httpdate::fmt_http_date(time);
    let mut words = text.split(' ');
    let mut word = || words.next().unwrap_or_default();
    let (weekday, day, month, year, clock) = (word(), word(), word(), word(), word());
    let year = if year < "2038" { year.get(2..).unwrap_or(year) } else { year };
    format!("{weekday} {day}-{month}-{year} {clock} GMT")
}

#[cfg(test)]
mod tests {
    use layers::testing::{ExchangeBuilder, TestEnv, exchange, field, text};
    use serde_json::Value;

    use super::*;

    /// Made by APISIX with the key `userkey`, good until 2053.
    const OF_APISIX: &str = "eyJyYW5kb20iOjAuNDI5ODYzMTk3MTYxMzksInNpZ24iOiI0ODRlMDY4NTkxMWQ5NmJhMDc5YzQ1ZGI0OTE2NmZk\
                             YjQ0ODhjODVkNWQ0NmE1Y2FhM2UwMmFhZDliNjE5OTQ2IiwiZXhwaXJlcyI6MjY0MzExOTYyNH0=";

    fn settings() -> Value {
        json!({"key": "userkey", "expires": 1_000_000_000})
    }

    async fn run(settings: &Value, request: ExchangeBuilder) -> Exchange {
        TestEnv::default().chain::<Csrf, _>(settings, |_| Ok(())).unwrap().run(request.build()).await
    }

    fn post(token: &str, cookie: &str) -> ExchangeBuilder {
        let mut request = exchange("POST", "http://a/");
        if !token.is_empty() {
            request = request.header("apisix-csrf-token", token);
        }
        if !cookie.is_empty() {
            request = request.header("cookie", &format!("a=b; apisix-csrf-token={cookie}"));
        }
        request
    }

    /// The token of a fresh answer.
    async fn fresh(settings: &Value) -> String {
        let x = run(settings, exchange("GET", "http://a/")).await;
        let (pair, _) = field(&x, "set-cookie").split_once(';').unwrap();
        pair.strip_prefix("apisix-csrf-token=").unwrap().to_owned()
    }

    #[tokio::test]
    async fn only_requests_that_change_something_need_a_token() {
        for (method, status) in
            [("GET", 200), ("HEAD", 200), ("OPTIONS", 200), ("POST", 401), ("PUT", 401), ("get", 401), ("X", 401)]
        {
            let x = run(&settings(), exchange(method, "http://a/")).await;
            assert_eq!(x.status(), status, "{method}");
            assert!(field(&x, "set-cookie").starts_with("apisix-csrf-token="), "{method}");
        }
    }

    #[tokio::test]
    async fn the_field_repeats_the_cookie_and_both_are_signed() {
        let (ours, other) = (fresh(&settings()).await, fresh(&json!({"key": "other"})).await);
        let edited = |from: &str, to: &str| {
            let text = String::from_utf8(STANDARD.decode(&ours).unwrap()).unwrap();
            let changed = text.replacen(from, to, 1);
            assert_ne!(text, changed);
            STANDARD.encode(changed)
        };
        let again = edited("\"random\":0.", "\"random\":1.");
        let textual = edited("\"random\":", "\"random\":\"0\",\"random\":");
        const INVALID: &str = "Failed to verify the csrf token signature";
        let cases = [
            ("our own", ours.as_str(), ours.as_str(), ""),
            ("one of APISIX", OF_APISIX, OF_APISIX, ""),
            ("none", "", ours.as_str(), "no csrf token in headers"),
            ("no cookie", ours.as_str(), "", "no csrf cookie"),
            ("another cookie", ours.as_str(), OF_APISIX, "csrf token mismatch"),
            ("another key", other.as_str(), other.as_str(), INVALID),
            ("another number", again.as_str(), again.as_str(), INVALID),
            ("a number twice", textual.as_str(), textual.as_str(), INVALID),
            ("no base64", "!!", "!!", INVALID),
            ("no JSON", "AAAA", "AAAA", INVALID),
        ];
        for (name, token, cookie, message) in cases {
            let mut x = run(&settings(), post(token, cookie)).await;
            let got = if x.status() == 200 { String::new() } else { text(&mut x).await };
            let expected =
                if message.is_empty() { String::new() } else { format!("{{\"error_msg\":\"{message}\"}}\n") };
            assert_eq!(got, expected, "{name}");
        }
        let twice = post(&ours, &ours).header("apisix-csrf-token", &ours);
        assert_eq!(run(&settings(), twice).await.status(), 401);
    }

    #[tokio::test]
    async fn a_token_ends() {
        let plugin = |expires: u32| Csrf {
            mac: hmac::Key::new(hmac::HMAC_SHA256, b"k"),
            key: Sensitive::new("k").unwrap(),
            expires,
            name: HeaderName::from_static("t"),
            cookie: "t".into(),
            no_header: Canned::status(StatusCode::UNAUTHORIZED),
            no_cookie: Canned::status(StatusCode::UNAUTHORIZED),
            mismatch: Canned::status(StatusCode::UNAUTHORIZED),
            invalid: Canned::status(StatusCode::UNAUTHORIZED),
        };
        let token = plugin(10).token(1_000);
        assert!(plugin(10).is_valid(&token, 1_010));
        assert!(!plugin(10).is_valid(&token, 1_011));
        assert!(plugin(0).is_valid(&token, 1_000_000));
        assert_ne!(token, plugin(10).token(1_000));
    }

    #[test]
    fn cookies_tell_the_time_as_nginx_does() {
        assert_eq!(cookie_time(1_290_079_655), "Thu, 18-Nov-10 11:27:35 GMT");
        assert_eq!(cookie_time(2_643_119_624), "Fri, 03-Oct-2053 15:53:44 GMT");
        assert_eq!(cookie_time(u64::MAX), "Fri, 31-Dec-9999 23:59:59 GMT");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (settings, pointer) in [
            (json!({}), ""),
            (json!({"key": ""}), "/key"),
            (json!({"key": "a", "expires": -1}), "/expires"),
            (json!({"key": "a", "name": "a b"}), "/name"),
        ] {
            let errors = TestEnv::default().build::<Csrf>(&settings).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{settings}: {errors:?}");
        }
        let schema = config::typed::schema_of::<Config>();
        assert_eq!(schema["properties"]["key"]["x-encrypted"], true);
    }
}
