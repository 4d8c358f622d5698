//! `echo`: puts text before, after or in place of the response body, and sets header fields. For tests.
//!
//! Phases: header_filter, body_filter. As in APISIX, except that a field cannot be taken out with an empty name.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use config::ConfigError;
use http::{HeaderMap, HeaderName, HeaderValue};
use indexmap::IndexMap;
use layers::body::BodyFilter;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Hooks, OnBody, OnResponse};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of `echo`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Text before the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before_body: Option<String>,
    /// Text in place of the upstream's body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Text after the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_body: Option<String>,
    /// Header fields to set on the response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headers: Option<IndexMap<String, String>>,
}

/// Writes text around or in place of the body.
pub struct Echo {
    before: Bytes,
    body: Option<Bytes>,
    after: Bytes,
    headers: HeaderMap,
}

impl Definition for Echo {
    const NAME: &'static str = "echo";
    const PRIORITY: i32 = 412;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if config.before_body.is_none() && config.body.is_none() && config.after_body.is_none() {
            let fields = vec!["before_body", "body", "after_body"];
            errors.push(ConfigError::new("", config::ErrorKind::NoneOf { fields }));
        }
        errors.extend(fields(config).err());
        errors
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let headers = fields(&config)?;
        let bytes = |text: Option<String>| Bytes::from(text.unwrap_or_default());
        let echo = Arc::new(Self {
            before: bytes(config.before_body),
            body: config.body.map(Bytes::from),
            after: bytes(config.after_body),
            headers,
        });
        if !echo.headers.is_empty() {
            hooks.response(&echo);
        }
        hooks.body(&echo);
        Ok(())
    }
}

fn fields(config: &Config) -> Result<HeaderMap, ConfigError> {
    let mut headers = HeaderMap::new();
    for (name, value) in config.headers.iter().flatten() {
        let at = || format!("/headers/{}", config::error::escape(name));
        let field = HeaderName::try_from(name.as_str())
            .map_err(|_| ConfigError::invalid(at(), "no header field can have this name"))?;
        let value = HeaderValue::from_str(value).map_err(|_| {
            ConfigError::invalid(at(), "no header field can have this value: write visible characters")
        })?;
        headers.insert(field, value);
    }
    Ok(headers)
}

impl OnResponse for Echo {
    fn response(&self, x: &mut Exchange) {
        for (name, value) in &self.headers {
            x.response.headers_mut().insert(name.clone(), value.clone());
        }
    }
}

impl OnBody for Echo {
    fn body(&self, _: &mut Exchange) -> Option<Box<dyn BodyFilter>> {
        Some(Box::new(Around {
            before: Some(self.before.clone()),
            body: self.body.clone(),
            after: self.after.clone(),
        }))
    }
}

/// The filter of one response.
struct Around {
    /// Taken with the first piece.
    before: Option<Bytes>,
    body: Option<Bytes>,
    after: Bytes,
}

impl BodyFilter for Around {
    fn data(&mut self, piece: Bytes) -> Bytes {
        // With a body of its own, everything is written at the end of the upstream's.
        if self.body.is_some() {
            return Bytes::new();
        }
        match self.before.take() {
            Some(before) if !before.is_empty() => join(&[&before, &piece]),
            _ => piece,
        }
    }

    fn end(&mut self) -> Bytes {
        let before = self.before.take().unwrap_or_default();
        let body = self.body.take().unwrap_or_default();
        join(&[&before, &body, &self.after])
    }
}

fn join(parts: &[&[u8]]) -> Bytes {
    let mut joined = BytesMut::with_capacity(parts.iter().map(|part| part.len()).sum());
    for part in parts {
        joined.put_slice(part);
    }
    joined.freeze()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use layers::body::Body;
    use layers::testing::{TestEnv, exchange, field, text};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn text_stands_before_after_or_in_place_of_the_body() {
        let cases = [
            (json!({"before_body": "<"}), "<hello"),
            (json!({"after_body": ">"}), "hello>"),
            (json!({"body": "mine"}), "mine"),
            (json!({"before_body": "<", "body": "mine", "after_body": ">"}), "<mine>"),
        ];
        for (settings, expected) in cases {
            let mut chain = TestEnv::default()
                .chain::<Echo, _>(&settings, |x| {
                    *x.response.body_mut() = Body::from("hello");
                    Ok(())
                })
                .unwrap();
            let mut x = chain.run(exchange("GET", "http://a/").build()).await;
            assert_eq!(text(&mut x).await, expected, "{settings}");
        }
    }

    #[tokio::test]
    async fn header_fields_are_set() {
        let settings = json!({"body": "x", "headers": {"X-Echo": "yes"}});
        let mut chain = TestEnv::default().chain::<Echo, _>(&settings, |_| Ok(())).unwrap();
        let x = chain.run(exchange("GET", "http://a/").build()).await;
        assert_eq!(field(&x, "x-echo"), "yes");
    }

    #[tokio::test]
    async fn settings_that_say_nothing_are_refused() {
        assert!(TestEnv::default().build::<Echo>(&json!({})).is_err());
        assert!(TestEnv::default().build::<Echo>(&json!({"body": "x", "headers": {"a b": "c"}})).is_err());
    }
}
