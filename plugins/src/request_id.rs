//! `request-id`: a name for every request, for the upstream and for the client.
//!
//! Phases: `rewrite`, `header_filter`. A name that the client sent is kept, unless it is empty.

use std::sync::Arc;

use bytes::Bytes;
use config::error::ConfigError;
use config::fields::{Int, WideText};
use http::{HeaderName, HeaderValue};
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, OnResponse, Rewrite};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::headers;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The header field that holds the name.
    #[serde(default = "header_name")]
    header_name: String,
    /// Send the name to the client too.
    #[serde(default = "yes")]
    include_in_response: bool,
    /// How names are made.
    #[serde(default)]
    algorithm: Algorithm,
    /// How names of `range_id` look.
    #[serde(default)]
    range_id: RangeId,
}

fn header_name() -> String {
    "X-Request-Id".into()
}

fn yes() -> bool {
    true
}

/// How names are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// A random UUID, version 4.
    #[default]
    Uuid,
    /// 21 characters that a URL can hold.
    Nanoid,
    /// Characters of a set, see `range_id`.
    RangeId,
    /// 27 characters that sort by the second they were made in.
    Ksuid,
}

/// How names of `range_id` look.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RangeId {
    /// The characters.
    #[serde(default = "char_set")]
    char_set: WideText<6, 4096>,
    /// How many of them.
    #[serde(default)]
    length: Int<6, 1024, 16>,
}

/// APISIX's set, in which `GHIGK` is no slip of ours.
const CHAR_SET: &str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIGKLMNOPQRSTUVWXYZ0123456789";

fn char_set() -> WideText<6, 4096> {
    #[expect(clippy::expect_used, reason = "a constant within its limits")]
    WideText::new(CHAR_SET).expect("6 to 4096 characters")
}

impl Default for RangeId {
    fn default() -> Self {
        Self { char_set: char_set(), length: Int::default() }
    }
}

/// The plugin.
pub struct RequestId {
    header: HeaderName,
    make: Make,
}

enum Make {
    Uuid,
    Nanoid,
    Range { set: Box<[char]>, length: usize },
    Ksuid,
}

impl Definition for RequestId {
    const NAME: &'static str = "request-id";
    const PRIORITY: i32 = 12015;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let name = headers::name(&config.header_name, "").err();
        let name = name.map(|error| ConfigError::new("/header_name", error.kind));
        let visible = config.range_id.char_set.chars().all(|c| c.is_ascii_graphic());
        let set = (!visible).then(|| {
            ConfigError::invalid("/range_id/char_set", "write visible ASCII characters: others get into no header field")
        });
        name.into_iter().chain(set).collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let header = headers::name(&config.header_name, "/header_name")?;
        let make = match config.algorithm {
            Algorithm::Uuid => Make::Uuid,
            Algorithm::Nanoid => Make::Nanoid,
            Algorithm::Ksuid => Make::Ksuid,
            Algorithm::RangeId => Make::Range {
                set: config.range_id.char_set.chars().collect(),
                length: config.range_id.length.get() as usize,
            },
        };
        if config.include_in_response {
            hooks.response(&Arc::new(Told { header: header.clone() }));
        }
        hooks.rewrite(&Arc::new(Self { header, make }));
        Ok(())
    }
}

impl Make {
    fn value(&self) -> Option<HeaderValue> {
        let bytes = match self {
            Make::Uuid => {
                let mut buffer = uuid::Uuid::encode_buffer();
                let text = uuid::Uuid::new_v4().hyphenated().encode_lower(&mut buffer);
                Bytes::copy_from_slice(text.as_bytes())
            }
            Make::Nanoid => nanoid::nanoid!().into(),
            Make::Range { set, length } => {
                let name: String = (0..*length).filter_map(|_| fastrand::choice(set.iter())).collect();
                name.into()
            }
            Make::Ksuid => ksuid(seconds_since_epoch(), random_payload()).into(),
        };
        HeaderValue::from_maybe_shared(bytes).ok()
    }
}

fn seconds_since_epoch() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

fn random_payload() -> u128 {
    u128::from_ne_bytes(*uuid::Uuid::new_v4().as_bytes()) ^ (u128::from(fastrand::u64(..)) << 64)
}

/// Seconds since May 2014 and 16 random bytes, as one number of 27 digits to the base 62.
fn ksuid(seconds: u64, payload: u128) -> Vec<u8> {
    const EPOCH: u64 = 1_400_000_000;
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    // 160 bits as five words, the highest first.
    let timestamp = (seconds.saturating_sub(EPOCH) & u64::from(u32::MAX)) as u32;
    let word = |shift: u32| (payload >> shift) as u32;
    let mut words = [timestamp, word(96), word(64), word(32), word(0)];
    let mut out = vec![b'0'; 27];
    for digit in out.iter_mut().rev() {
        let mut rest = 0_u64;
        for word in &mut words {
            let value = (rest << 32) | u64::from(*word);
            *word = (value / 62) as u32;
            rest = value % 62;
        }
        *digit = DIGITS.get(rest as usize).copied().unwrap_or(b'0');
    }
    out
}

impl Rewrite for RequestId {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        let sent = x.request.headers.get(&self.header).is_some_and(|value| !value.is_empty());
        if !sent && let Some(value) = self.make.value() {
            x.request.headers.insert(&self.header, value);
        }
        Flow::Next
    }
}

/// Sends the name to the client.
struct Told {
    header: HeaderName,
}

impl OnResponse for Told {
    fn response(&self, x: &mut Exchange) {
        // An upstream that names the request itself is not contradicted.
        if !x.response.headers().contains_key(&self.header)
            && let Some(value) = x.request.headers.get(&self.header).cloned()
        {
            x.response.headers_mut().insert(&self.header, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, field};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn every_algorithm_makes_names_of_its_form() {
        let uuid = r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$";
        let cases = [
            (json!({}), uuid),
            (json!({"algorithm": "nanoid"}), r"^[A-Za-z0-9_-]{21}$"),
            (json!({"algorithm": "range_id"}), r"^[A-Za-z0-9]{16}$"),
            (json!({"algorithm": "range_id", "range_id": {"char_set": "ABCDEF", "length": 20}}), r"^[A-F]{20}$"),
            (json!({"algorithm": "ksuid"}), r"^[0-9A-Za-z]{27}$"),
        ];
        for (config, pattern) in cases {
            let mut chain = TestEnv::default().chain::<RequestId, _>(&config, |_| Ok(())).unwrap();
            let mut seen = std::collections::HashSet::new();
            for _ in 0..100 {
                let x = chain.run(exchange("GET", "http://a/").build()).await;
                let sent = x.request.headers["x-request-id"].to_str().unwrap().to_owned();
                assert!(regex::Regex::new(pattern).unwrap().is_match(&sent), "{config}: {sent}");
                assert_eq!(field(&x, "x-request-id"), sent);
                assert!(seen.insert(sent), "{config}: a name came twice");
            }
        }
    }

    #[tokio::test]
    async fn a_name_that_is_there_is_kept() {
        let mut chain = TestEnv::default().chain::<RequestId, _>(&json!({}), |_| Ok(())).unwrap();
        let x = chain.run(exchange("GET", "http://a/").header("x-request-id", "mine").build()).await;
        assert_eq!((&x.request.headers["x-request-id"], field(&x, "x-request-id")), (&"mine".parse().unwrap(), "mine"));
        let x = chain.run(exchange("GET", "http://a/").header("x-request-id", "").build()).await;
        assert_eq!(field(&x, "x-request-id").len(), 36);
    }

    #[tokio::test]
    async fn field_and_response_can_be_chosen() {
        let config = json!({"header_name": "X-Trace", "include_in_response": false});
        let mut chain = TestEnv::default().chain::<RequestId, _>(&config, |_| Ok(())).unwrap();
        let x = chain.run(exchange("GET", "http://a/").build()).await;
        assert!(x.request.headers.contains_key("x-trace"));
        assert_eq!(field(&x, "x-trace"), "");
    }

    #[tokio::test]
    async fn the_upstreams_own_name_is_not_contradicted() {
        let mut chain = TestEnv::default()
            .chain::<RequestId, _>(&json!({}), |x| {
                x.response.headers_mut().insert("x-request-id", "theirs".parse().unwrap());
                Ok(())
            })
            .unwrap();
        let x = chain.run(exchange("GET", "http://a/").build()).await;
        assert_eq!(field(&x, "x-request-id"), "theirs");
    }

    #[test]
    fn a_ksuid_is_the_number_of_its_definition() {
        // The examples of the ksuid project and of APISIX's documentation.
        let payload = 0xB5A1_CD34_B5F9_9D11_54FB_6853_345C_9735;
        assert_eq!(ksuid(1_400_000_000 + 107_608_047, payload), b"0ujtsYcgvSTl8PAuAdqWYSMnLOv");
        let payload = 0xD7F6_8AD7_CA0A_E277_772A_B36D_DB1A_3C13;
        assert_eq!(ksuid(1_400_000_000 + 356_715_963, payload), b"325ghCANEKjw6Jsfejg5p6QrLYB");
        assert_eq!(ksuid(1_400_000_000 + u64::from(u32::MAX), u128::MAX), b"aWgEPTl1tmebfsQzFP4bxwgy80V");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"algorithm": "snowflake"}), "/algorithm"),
            (json!({"range_id": {"char_set": "abc"}}), "/range_id/char_set"),
            (json!({"range_id": {"length": 5}}), "/range_id/length"),
            (json!({"range_id": {"char_set": "abc def"}}), "/range_id/char_set"),
            (json!({"header_name": "a b"}), "/header_name"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<RequestId>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
