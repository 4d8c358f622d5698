//! `proxy-control`: whether a request's body has to be here before the upstream is asked.
//!
//! Phase: `access`, so that nobody's body is kept who is refused. What is kept is bounded: a body that is larger is
//! streamed from there on. The client's own deadlines hold while it is waited for.

use std::sync::Arc;

use config::error::ConfigError;
use http::StatusCode;
use layers::body::TooLarge;
use layers::exchange::Exchange;
use layers::plugin::{AccessWaits, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::reply::Canned;

/// The most of a body that is waited for, in bytes.
const AHEAD: usize = 1 << 20;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Wait for the body, up to 1 MiB of it, before the upstream is asked. Otherwise it is streamed.
    #[serde(default = "yes")]
    request_buffering: bool,
}

fn yes() -> bool {
    true
}

/// The plugin.
pub struct ProxyControl {
    broken: Canned,
    too_large: Canned,
}

impl Definition for ProxyControl {
    const NAME: &'static str = "proxy-control";
    const PRIORITY: i32 = 21990;
    type Config = Config;

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        if config.request_buffering {
            hooks.access_waits(&Arc::new(Self {
                broken: Canned::status(StatusCode::BAD_REQUEST),
                too_large: Canned::status(StatusCode::PAYLOAD_TOO_LARGE),
            }));
        }
        Ok(())
    }
}

impl AccessWaits for ProxyControl {
    async fn access(&self, x: &mut Exchange) -> Flow {
        match x.request_body.read_ahead(AHEAD).await {
            Ok(()) => Flow::Next,
            Err(error) if error.is::<TooLarge>() => self.too_large.flow(),
            Err(_) => self.broken.flow(),
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use layers::body::{Body, BodyFilter};
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;

    struct Same;

    impl BodyFilter for Same {
        fn data(&mut self, piece: bytes::Bytes) -> bytes::Bytes {
            piece
        }
    }

    #[tokio::test]
    async fn the_body_is_here_before_the_upstream_is_asked() {
        for (config, known) in
            [(json!({}), true), (json!({"request_buffering": true}), true), (json!({"request_buffering": false}), false)]
        {
            let mut chain = TestEnv::default()
                .chain::<ProxyControl, _>(&config, move |x| {
                    assert_eq!(x.request_body.size_hint().exact(), known.then_some(3));
                    Ok(())
                })
                .unwrap();
            let body = Body::from("abc").filtered(Box::new(Same));
            let mut x = chain.run(exchange("POST", "http://a/").body(body).build()).await;
            assert_eq!(x.response.status(), 200, "{config}");
            assert_eq!(x.request_body.collect_up_to(10).await.unwrap(), "abc");
        }
    }

    #[tokio::test]
    async fn a_body_that_becomes_too_large_is_refused() {
        let mut chain = TestEnv::default().chain::<ProxyControl, _>(&json!({}), |_| Ok(())).unwrap();
        let body = Body::from("abc").limited(2);
        let x = chain.run(exchange("POST", "http://a/").body(body).build()).await;
        assert_eq!(x.response.status(), 413);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for config in [json!({"request_buffering": 1}), json!({"buffering": true})] {
            assert!(TestEnv::default().build::<ProxyControl>(&config).is_err(), "{config}");
        }
    }
}
