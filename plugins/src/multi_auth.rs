//! `multi-auth`: the caller may show who it is in one of several ways.
//!
//! Phase: `rewrite`. The plugins it names are asked in the order in which they are written, each as if it were alone;
//! the first that lets the request in decides whose it is. One that refuses leaves nothing behind. When all refuse, the
//! challenge is that of the last.

use std::sync::Arc;

use config::error::{ConfigError, ErrorKind, escape};
use http::{StatusCode, header};
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Registration, RewriteWaits, Rewriting};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::support::reply::Canned;
use crate::{absent, registrations};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The plugins to ask, in order: objects with the settings of a plugin under its name.
    #[schemars(length(min = 2))]
    auth_plugins: Vec<Map<String, Value>>,
}

/// The plugin.
pub struct MultiAuth {
    methods: Vec<Rewriting>,
    refusal: Canned,
}

/// The plugins that are named, with the places of their settings.
fn named(config: &Config) -> impl Iterator<Item = (String, &str, &Value)> {
    config.auth_plugins.iter().enumerate().flat_map(|(index, plugins)| {
        plugins.iter().map(move |(name, settings)| {
            (format!("/auth_plugins/{index}/{}", escape(name)), name.as_str(), settings)
        })
    })
}

/// The plugin of that name, if it authenticates.
fn registration(name: &str, place: &str) -> Result<&'static Registration, ConfigError> {
    let known = registrations().iter().find(|registration| registration.name == name);
    let wrong = |words: String| Err(ConfigError::invalid(place, words));
    match known {
        Some(known) if (known.extras)().authenticates() => Ok(known),
        Some(_) => wrong(format!("`{name}` does not authenticate: write it beside `multi-auth`")),
        None => wrong(match absent::advice(name) {
            Some(advice) => format!("`{name}`: {advice}"),
            None => format!("there is no plugin `{name}`"),
        }),
    }
}

impl Definition for MultiAuth {
    const NAME: &'static str = "multi-auth";
    const PRIORITY: i32 = 2600;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::NEEDS_CONSUMERS;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let count = config.auth_plugins.len();
        let few = (count < 2).then(|| {
            let kind = ErrorKind::OutOfRange {
                what: "the number of plugins",
                found: count.to_string(),
                allowed: "at least 2".to_owned(),
            };
            ConfigError::new("/auth_plugins", kind)
        });
        let empty = config.auth_plugins.iter().enumerate().filter(|(_, plugins)| plugins.is_empty());
        let empty = empty.map(|(index, _)| {
            ConfigError::invalid(format!("/auth_plugins/{index}"), "name a plugin, with its settings")
        });
        let wrong = named(config).flat_map(|(place, name, settings)| match registration(name, &place) {
            Ok(known) => (known.check)(settings).err().unwrap_or_default().into_iter().map(|e| e.under(&place)).collect(),
            Err(error) => vec![error],
        });
        few.into_iter().chain(empty).chain(wrong).collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let env = BuildEnv { metadata: None, attr: None, ..*env };
        let mut methods = Vec::new();
        for (place, name, settings) in named(&config) {
            let mut own = Hooks::default();
            let built = (registration(name, &place)?.build)(settings, &env, &mut own);
            if let Some(error) = built.err().into_iter().flatten().next() {
                return Err(error.under(&place));
            }
            let method = own.into_rewrite().ok_or_else(|| {
                ConfigError::invalid(place, format!("`{name}` does more than to authenticate, and works only alone"))
            })?;
            methods.push(method);
        }
        let refusal = Canned::message(StatusCode::UNAUTHORIZED, "Authorization Failed");
        hooks.rewrite_waits(&Arc::new(Self { methods, refusal }));
        Ok(())
    }
}

impl RewriteWaits for MultiAuth {
    // Each plugin names its own deadlines.
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        let mut challenge = None;
        for method in &self.methods {
            match method.run(x).await {
                Flow::Next => return Flow::Next,
                Flow::Reply(refusal) if refusal.status() == StatusCode::UNAUTHORIZED => {
                    challenge = refusal.headers().get(header::WWW_AUTHENTICATE).cloned().or(challenge);
                }
                // Something else went wrong, a body that could not be read for one: nobody may go on with that.
                answer @ Flow::Reply(_) => return answer,
            }
        }
        let mut refusal = self.refusal.response();
        if let Some(challenge) = challenge {
            refusal.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        Flow::Reply(refusal)
    }
}

#[cfg(test)]
mod tests {
    use layers::consumer::{Consumer, ConsumerTable};
    use layers::testing::{ExchangeBuilder, TestEnv, enrol, exchange, field, text};
    use serde_json::json;

    use super::*;
    use crate::basic_auth::BasicAuth;
    use crate::key_auth::KeyAuth;

    fn env() -> TestEnv {
        let mut table = ConsumerTable::default();
        let basic = json!({"username": "foo", "password": "bar"});
        enrol::<BasicAuth>(&mut table, Consumer::new("jack"), &basic).unwrap();
        enrol::<KeyAuth>(&mut table, Consumer::new("jill"), &json!({"key": "k"})).unwrap();
        table.insert_named(Arc::new(Consumer::new("guest")));
        let env = TestEnv::default();
        env.consumers.publish(table);
        env
    }

    async fn run(plugins: Value, request: ExchangeBuilder) -> Exchange {
        let config = json!({"auth_plugins": plugins});
        env().chain::<MultiAuth, _>(&config, |_| Ok(())).unwrap().run(request.build()).await
    }

    #[tokio::test]
    async fn the_first_that_lets_in_decides() {
        let both = json!([{"basic-auth": {"hide_credentials": true}}, {"key-auth": {"hide_credentials": true}}]);
        let basic = |value: &str| exchange("GET", "http://a/").header("authorization", value);
        const FOO_BAR: &str = "Basic Zm9vOmJhcg==";
        let cases = [
            ("basic", basic(FOO_BAR), "jack", [false, false]),
            ("key", exchange("GET", "http://a/").header("apikey", "k"), "jill", [false, false]),
            ("both, in order", basic(FOO_BAR).header("apikey", "k"), "jack", [false, true]),
            ("one wrong", basic("Basic eDp5").header("apikey", "k"), "jill", [true, false]),
            ("both wrong", basic("Basic eDp5").header("apikey", "x"), "", [true, true]),
            ("none", exchange("GET", "http://a/"), "", [false, false]),
        ];
        for (name, request, consumer, left) in cases {
            let mut x = run(both.clone(), request).await;
            assert_eq!(x.consumer.as_ref().map_or("", |consumer| &*consumer.name), consumer, "{name}");
            let headers = &x.request.headers;
            assert_eq!([headers.contains_key("authorization"), headers.contains_key("apikey")], left, "{name}");
            if consumer.is_empty() {
                assert_eq!((x.status(), field(&x, "www-authenticate")), (401, "apikey realm=\"key\""), "{name}");
                assert_eq!(text(&mut x).await, "{\"message\":\"Authorization Failed\"}\n", "{name}");
            } else {
                assert_eq!((x.status(), field(&x, "www-authenticate")), (200, ""), "{name}");
            }
        }
    }

    #[tokio::test]
    async fn plugins_under_one_object_and_anonymous_consumers_are_asked_too() {
        let one = json!([{"basic-auth": {}, "key-auth": {}}, {"key-auth": {"anonymous_consumer": "guest"}}]);
        let x = run(one.clone(), exchange("GET", "http://a/").header("apikey", "k")).await;
        assert_eq!(&*x.consumer.as_ref().unwrap().name, "jill");
        let x = run(one, exchange("GET", "http://a/")).await;
        assert_eq!(&*x.consumer.as_ref().unwrap().name, "guest");
    }

    #[tokio::test]
    async fn a_body_that_was_used_up_stops_the_search() {
        let mut table = ConsumerTable::default();
        let settings = json!({"key_id": "id", "secret_key": "secret"});
        enrol::<crate::hmac_auth::HmacAuth>(&mut table, Consumer::new("joe"), &settings).unwrap();
        table.insert_named(Arc::new(Consumer::new("guest")));
        let env = TestEnv::default();
        env.consumers.publish(table);
        let hmac = json!({"validate_request_body": true, "max_req_body_size": 4});
        let config = json!({"auth_plugins": [{"hmac-auth": hmac}, {"key-auth": {"anonymous_consumer": "guest"}}]});
        let mut chain = env.chain::<MultiAuth, _>(&config, |_| Ok(())).unwrap();
        let date = httpdate::fmt_http_date(std::time::SystemTime::now());
        let signed = format!("id\ndate: {date}\ndigest: SHA-256=x\n");
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, b"secret");
        let tag = base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            aws_lc_rs::hmac::sign(&key, signed.as_bytes()),
        );
        let authorization = format!(
            "Signature keyId=\"id\",algorithm=\"hmac-sha256\",headers=\"date digest\",signature=\"{tag}\""
        );
        let request = exchange("POST", "http://a/")
            .header("date", &date)
            .header("digest", "SHA-256=x")
            .header("authorization", &authorization)
            .body("12345".to_owned());
        let x = chain.run(request.build()).await;
        assert_eq!((x.status(), x.consumer.is_none()), (413, true));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (plugins, pointer) in [
            (json!([]), "/auth_plugins"),
            (json!([{"key-auth": {}}]), "/auth_plugins"),
            (json!([{"key-auth": {}}, {}]), "/auth_plugins/1"),
            (json!([{"key-auth": {}}, {"cors": {}}]), "/auth_plugins/1/cors"),
            (json!([{"key-auth": {}}, {"multi-auth": {}}]), "/auth_plugins/1/multi-auth"),
            (json!([{"key-auth": {}}, {"ldap-auth": {}}]), "/auth_plugins/1/ldap-auth"),
            (json!([{"key-auth": {}}, {"basic-auth": {"realm": "\""}}]), "/auth_plugins/1/basic-auth/realm"),
            (json!([{"key-auth": {"headr": "x"}}, {"basic-auth": {}}]), "/auth_plugins/0/key-auth/headr"),
        ] {
            let errors = env().build::<MultiAuth>(&json!({"auth_plugins": plugins})).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{plugins}: {errors:?}");
        }
    }
}
