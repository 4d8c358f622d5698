//! `key-auth`: the caller shows a key that one consumer or credential has.
//!
//! Phase: `rewrite`. As in APISIX the header goes before the query. A key in a query stands in access logs; with
//! `hide_credentials` it does not, nor does the upstream get it.

use std::sync::Arc;

use config::error::ConfigError;
use config::sensitive::Sensitive;
use http::{HeaderName, HeaderValue};
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Extras, Flow, Hooks, Rewrite};
use layers::vars::argument;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::credentials::{self, Gate, hide_argument};
use crate::support::headers;
use crate::support::reply::Canned;

/// Settings on a route or service.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The header field that holds the key.
    #[serde(default = "apikey")]
    header: String,
    /// The query argument that holds the key, where the header field is missing.
    #[serde(default = "apikey")]
    query: String,
    /// Take the key out of the request before it is forwarded.
    #[serde(default)]
    hide_credentials: bool,
    /// The consumer that a request without a valid key belongs to. Without it such a request is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    anonymous_consumer: Option<String>,
    /// The realm in `WWW-Authenticate` of a refusal.
    #[serde(default = "realm")]
    realm: String,
}

fn apikey() -> String {
    "apikey".into()
}

fn realm() -> String {
    "key".into()
}

/// Settings on a consumer or credential.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsumerConfig {
    /// The key.
    #[schemars(extend("x-encrypted" = true))]
    key: Sensitive<0>,
}

/// The plugin.
pub struct KeyAuth {
    header: HeaderName,
    query: Box<str>,
    hide: bool,
    gate: Gate,
    missing: Canned,
    invalid: Canned,
}

impl Definition for KeyAuth {
    const NAME: &'static str = "key-auth";
    const PRIORITY: i32 = 2500;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::NEEDS_CONSUMERS;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.consumer::<ConsumerConfig>(|settings| settings.get("key")?.as_str().map(str::to_owned));
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        [headers::name(&config.header, "").err().map(|error| ConfigError::new("/header", error.kind))]
            .into_iter()
            .flatten()
            .chain(credentials::challenge(SCHEME, &config.realm).err())
            .collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let challenge = credentials::challenge(SCHEME, &config.realm)?;
        hooks.rewrite(&Arc::new(Self {
            header: headers::name(&config.header, "/header")?,
            missing: credentials::refusal(&challenge, "Missing API key in request"),
            invalid: credentials::refusal(&challenge, "Invalid API key in request"),
            query: config.query.into(),
            hide: config.hide_credentials,
            gate: Gate::new(env.consumers, config.anonymous_consumer, &challenge),
        }));
        Ok(())
    }
}

const SCHEME: &str = "apikey";

impl Rewrite for KeyAuth {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        let find = |key: &str| self.gate.find(Self::NAME, key).ok_or(&self.invalid);
        let shown = x.request.headers.get(&self.header).map(HeaderValue::as_bytes);
        let in_header = shown.is_some();
        let found = match shown {
            // A key is text; other bytes are the key of nobody.
            Some(key) => std::str::from_utf8(key).map_err(|_| &self.invalid).and_then(find),
            None => match x.request.uri.query().and_then(|query| argument(query, &self.query)) {
                Some(key) => find(&key),
                None => Err(&self.missing),
            },
        };
        let is_known = found.is_ok();
        let flow = self.gate.settle(x, found);
        if self.hide && matches!(flow, Flow::Next) {
            // What is nobody's key may be somebody's elsewhere: it goes from wherever it stands.
            if in_header || !is_known {
                x.request.headers.remove(&self.header);
            }
            if !in_header || !is_known {
                hide_argument(x, &self.query);
            }
        }
        flow
    }
}

#[cfg(test)]
mod tests {
    use layers::consumer::{Consumer, ConsumerTable};
    use layers::testing::{ExchangeBuilder, TestEnv, exchange, field, text};
    use serde_json::{Value, json};

    use super::*;

    fn env() -> TestEnv {
        let consumer = |name: &str, credential: Option<&str>| {
            Arc::new(Consumer {
                custom_id: credential.map(|_| "id-7".into()),
                credential_id: credential.map(Into::into),
                ..Consumer::new(name)
            })
        };
        let mut table = ConsumerTable::default();
        table.insert("key-auth", "secret", consumer("jack", Some("c1")));
        table.insert("other-auth", "elsewhere", consumer("jill", None));
        table.insert_named(consumer("nobody", None));
        let env = TestEnv::default();
        env.consumers.publish(table);
        env
    }

    async fn run(config: Value, request: ExchangeBuilder) -> Exchange {
        env().chain::<KeyAuth, _>(&config, |_| Ok(())).unwrap().run(request.build()).await
    }

    #[tokio::test]
    async fn a_key_is_looked_for_in_the_header_then_in_the_query() {
        let get = |uri: &str| exchange("GET", uri);
        let cases = [
            ("the default field", json!({}), get("http://a/").header("apikey", "secret"), 200, ""),
            ("the default argument", json!({}), get("http://a/?apikey=secret"), 200, ""),
            ("an encoded argument", json!({}), get("http://a/?apikey=sec%72et"), 200, ""),
            ("none", json!({}), get("http://a/"), 401, "Missing API key in request"),
            ("a wrong one", json!({}), get("http://a/").header("apikey", "x"), 401, "Invalid API key in request"),
            ("an empty one", json!({}), get("http://a/").header("apikey", ""), 401, "Invalid API key in request"),
            (
                "the header goes first",
                json!({}),
                get("http://a/?apikey=secret").header("apikey", "x"),
                401,
                "Invalid API key in request",
            ),
            ("another field", json!({"header": "X-Key"}), get("http://a/").header("x-key", "secret"), 200, ""),
            ("another argument", json!({"query": "k"}), get("http://a/?k=secret"), 200, ""),
            (
                "a key of another plugin",
                json!({}),
                get("http://a/").header("apikey", "elsewhere"),
                401,
                "Invalid API key in request",
            ),
        ];
        for (name, config, request, status, message) in cases {
            let mut x = run(config, request).await;
            assert_eq!(x.response.status(), status, "{name}");
            if status == 401 {
                assert_eq!(text(&mut x).await, format!("{{\"message\":\"{message}\"}}\n"), "{name}");
                assert_eq!(field(&x, "www-authenticate"), "apikey realm=\"key\"", "{name}");
            } else {
                assert_eq!(&*x.consumer.as_ref().unwrap().name, "jack", "{name}");
                assert_eq!(x.request.headers["x-consumer-username"], "jack", "{name}");
                assert_eq!(x.request.headers["x-credential-identifier"], "c1", "{name}");
                assert_eq!(x.request.headers["x-consumer-custom-id"], "id-7", "{name}");
            }
        }
    }

    #[tokio::test]
    async fn the_realm_can_be_chosen() {
        let x = run(json!({"realm": "shop"}), exchange("GET", "http://a/")).await;
        assert_eq!(field(&x, "www-authenticate"), "apikey realm=\"shop\"");
        let errors = env().build::<KeyAuth>(&json!({"realm": "a\"b"})).unwrap_err();
        assert_eq!(errors[0].pointer, "/realm");
    }

    #[tokio::test]
    async fn hidden_credentials_reach_neither_the_upstream_nor_the_log() {
        let hide = json!({"hide_credentials": true});
        let x = run(hide.clone(), exchange("GET", "http://a/").header("apikey", "secret")).await;
        assert!(!x.request.headers.contains_key("apikey"));
        let mut x = exchange("GET", "http://a/p?a=1&apikey=secret&b=2").build();
        x.original_uri = Some(Box::new("/p?a=1&%61pikey=secret&b=2".parse().unwrap()));
        let mut chain = env().chain::<KeyAuth, _>(&hide, |_| Ok(())).unwrap();
        let x = chain.run(x).await;
        assert_eq!(x.request.uri.query(), Some("a=1&b=2"));
        assert_eq!(x.request_uri(), "/p?a=1&b=2");
        let x = run(json!({}), exchange("GET", "http://a/?apikey=secret")).await;
        assert_eq!(x.request.uri.query(), Some("apikey=secret"));
        let x = run(hide, exchange("GET", "http://a/p?apikey=secret")).await;
        assert_eq!(x.request.uri.to_string(), "http://a/p");
    }

    #[tokio::test]
    async fn a_request_without_a_key_may_belong_to_the_anonymous_consumer() {
        let config = json!({"anonymous_consumer": "nobody"});
        let spoofed = exchange("GET", "http://a/").header("x-credential-identifier", "c1");
        let x = run(config, spoofed).await;
        assert_eq!(x.response.status(), 200);
        assert_eq!(x.request.headers["x-consumer-username"], "nobody");
        assert!(!x.request.headers.contains_key("x-credential-identifier"));
        let mut x = run(json!({"anonymous_consumer": "gone"}), exchange("GET", "http://a/")).await;
        assert_eq!(x.response.status(), 401);
        assert_eq!(text(&mut x).await, "{\"message\":\"Invalid user authorization\"}\n");
    }

    #[tokio::test]
    async fn a_wrong_key_is_hidden_too_when_the_anonymous_consumer_stands_in() {
        let config = json!({"anonymous_consumer": "nobody", "hide_credentials": true});
        let wrong = exchange("GET", "http://a/?apikey=wrong&b=1").header("apikey", "wrong");
        let x = run(config, wrong).await;
        assert_eq!(x.request.headers["x-consumer-username"], "nobody");
        assert!(!x.request.headers.contains_key("apikey"));
        assert_eq!(x.request.uri.query(), Some("b=1"));
    }

    #[test]
    fn the_key_of_a_consumer_is_never_shown() {
        let config: ConsumerConfig = serde_json::from_value(json!({"key": "secret"})).unwrap();
        assert!(!format!("{config:?}").contains("secret"));
        let schema = config::typed::schema_of::<ConsumerConfig>();
        assert_eq!(schema["properties"]["key"]["x-encrypted"], true);
    }
}
