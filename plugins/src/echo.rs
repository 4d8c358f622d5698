//! `echo`: puts text before, after or in place of a body. For trying things out.
//!
//! Phases: `header_filter`, `body_filter`.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use config::error::{ConfigError, ErrorKind};
use http::HeaderName;
use layers::body::BodyFilter;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Hooks, OnBody, OnResponse};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::headers::{self, Fields, Value};

/// Settings. At least one of the three texts has to be there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Text before the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before_body: Option<String>,
    /// Text in place of the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    /// Text behind the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after_body: Option<String>,
    /// Header fields to set.
    #[serde(default, skip_serializing_if = "Fields::is_empty")]
    headers: Fields,
}

/// The plugin.
pub struct Echo {
    texts: Texts,
    headers: Box<[(HeaderName, Value)]>,
}

#[derive(Clone)]
struct Texts {
    before: Option<Bytes>,
    body: Option<Bytes>,
    after: Option<Bytes>,
}

impl Definition for Echo {
    const NAME: &'static str = "echo";
    const PRIORITY: i32 = 412;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let fields = vec!["before_body", "body", "after_body"];
        let empty = config.before_body.is_none() && config.body.is_none() && config.after_body.is_none();
        let none = empty.then(|| ConfigError::new("", ErrorKind::NoneOf { fields }));
        none.into_iter().chain(headers::compile(&config.headers, "/headers").err()).collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let plugin = Arc::new(Self {
            headers: headers::compile(&config.headers, "/headers")?.into(),
            texts: Texts {
                before: config.before_body.map(Bytes::from),
                body: config.body.map(Bytes::from),
                after: config.after_body.map(Bytes::from),
            },
        });
        hooks.response(&plugin);
        hooks.body(&plugin);
        Ok(())
    }
}

impl OnResponse for Echo {
    fn response(&self, x: &mut Exchange) {
        headers::body_changes(x.response.headers_mut());
        for (name, value) in &self.headers {
            let value = value.render(&**x, None);
            headers::set(x.response.headers_mut(), name, value);
        }
    }
}

impl OnBody for Echo {
    fn body(&self, _: &mut Exchange) -> Option<Box<dyn BodyFilter>> {
        Some(Box::new(Around { replaced: self.texts.body.is_some(), texts: self.texts.clone() }))
    }
}

/// The texts that are still to be sent.
struct Around {
    texts: Texts,
    replaced: bool,
}

impl BodyFilter for Around {
    fn data(&mut self, piece: Bytes) -> Bytes {
        let piece = if self.replaced { self.texts.body.take().unwrap_or_default() } else { piece };
        joined(self.texts.before.take(), piece)
    }

    fn end(&mut self) -> Bytes {
        let rest = joined(self.texts.before.take(), self.texts.body.take().unwrap_or_default());
        joined(Some(rest), self.texts.after.take().unwrap_or_default())
    }
}

fn joined(first: Option<Bytes>, second: Bytes) -> Bytes {
    match first {
        None => second,
        Some(first) if second.is_empty() => first,
        Some(first) if first.is_empty() => second,
        Some(first) => {
            let mut both = BytesMut::with_capacity(first.len() + second.len());
            both.extend_from_slice(&first);
            both.extend_from_slice(&second);
            both.freeze()
        }
    }
}

#[cfg(test)]
mod tests {
    use layers::body::Body;
    use layers::testing::{TestEnv, exchange, field, text};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn texts_stand_around_the_body() {
        let cases = [
            (json!({"before_body": "<"}), "body", "<body"),
            (json!({"after_body": ">"}), "body", "body>"),
            (json!({"before_body": "<", "body": "b", "after_body": ">"}), "body", "<b>"),
            (json!({"before_body": "<", "after_body": ">"}), "", "<>"),
            (json!({"body": "b"}), "", "b"),
        ];
        for (config, body, expected) in cases {
            let answer = move |x: &mut Exchange| {
                *x.response.body_mut() = Body::from(body);
                Ok(())
            };
            let mut chain = TestEnv::default().chain::<Echo, _>(&config, answer).unwrap();
            let mut x = chain.run(exchange("GET", "http://a/").build()).await;
            assert_eq!(text(&mut x).await, expected, "{config}");
        }
    }

    #[tokio::test]
    async fn fields_are_set() {
        let config = json!({"body": "b", "headers": {"x-a": "$host", "x-n": 1}});
        let mut chain = TestEnv::default().chain::<Echo, _>(&config, |_| Ok(())).unwrap();
        let x = chain.run(exchange("GET", "http://a.com/").build()).await;
        assert_eq!(["x-a", "x-n"].map(|name| field(&x, name)), ["a.com", "1"]);
    }

    #[tokio::test]
    async fn one_text_has_to_be_there() {
        let errors = TestEnv::default().build::<Echo>(&json!({"headers": {"a": "b"}})).unwrap_err();
        assert!(errors[0].to_string().contains("none of"), "{errors:?}");
    }
}
