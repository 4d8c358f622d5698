//! `client-control`: how large a request's body may be.
//!
//! Phase: `rewrite`. A body that is announced as too large is refused at once; one of unknown length when it has become
//! so. The limit for the whole gateway (`client_max_body_size`) is looked at before any route and stands besides.

use std::sync::Arc;

use config::error::ConfigError;
use http::StatusCode;
use http_body::Body as _;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Rewrite};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::reply::Canned;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The largest body, in bytes; 0 for any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_body_size: Option<u64>,
}

/// The plugin.
pub struct ClientControl {
    limit: u64,
    refusal: Canned,
}

impl Definition for ClientControl {
    const NAME: &'static str = "client-control";
    const PRIORITY: i32 = 22000;
    type Config = Config;

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        if let Some(limit) = config.max_body_size.filter(|limit| *limit > 0) {
            hooks.rewrite(&Arc::new(Self { limit, refusal: Canned::status(StatusCode::PAYLOAD_TOO_LARGE) }));
        }
        Ok(())
    }
}

impl Rewrite for ClientControl {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        let hint = x.request_body.size_hint();
        if hint.lower() > self.limit {
            return self.refusal.flow();
        }
        if hint.upper().is_none_or(|upper| upper > self.limit) {
            x.request_body = std::mem::take(&mut x.request_body).limited(self.limit);
        }
        Flow::Next
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use layers::body::{Body, TooLarge};
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn an_announced_body_is_refused_at_once() {
        for (config, size, status) in [
            (json!({"max_body_size": 5}), 5, 200),
            (json!({"max_body_size": 5}), 6, 413),
            (json!({"max_body_size": 0}), 6, 200),
            (json!({}), 6, 200),
        ] {
            let mut chain = TestEnv::default().chain::<ClientControl, _>(&config, |_| Ok(())).unwrap();
            let body = Body::from(Bytes::from(vec![b'x'; size]));
            let mut x = chain.run(exchange("POST", "http://a/").body(body).build()).await;
            assert_eq!(x.response.status(), status, "{config} {size}");
            assert_eq!(text(&mut x).await.contains("413"), status == 413);
        }
    }

    #[tokio::test]
    async fn a_body_of_unknown_length_ends_at_the_limit() {
        struct Same;
        impl layers::body::BodyFilter for Same {
            fn data(&mut self, piece: Bytes) -> Bytes {
                piece
            }
        }
        for (limit, fits) in [(3, true), (2, false)] {
            let config = json!({ "max_body_size": limit });
            let mut chain = TestEnv::default().chain::<ClientControl, _>(&config, |_| Ok(())).unwrap();
            let body = Body::from("abc").filtered(Box::new(Same));
            let mut x = chain.run(exchange("POST", "http://a/").body(body).build()).await;
            assert_eq!(x.response.status(), 200);
            let read = x.request_body.collect_up_to(100).await;
            assert_eq!(read.is_ok(), fits);
            assert!(read.err().is_none_or(|error| error.is::<TooLarge>()));
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (config, pointer) in [
            (json!({"max_body_size": -1}), "/max_body_size"),
            (json!({"max_body_size": "1m"}), "/max_body_size"),
            (json!({"max_body": 1}), "/max_body"),
        ] {
            let errors = TestEnv::default().build::<ClientControl>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}");
        }
    }
}
