//! `proxy-buffering`: whether answers are collected before they are sent. They never are.
//!
//! No phase. Answers are streamed with back-pressure, as APISIX does with `disable_proxy_buffering: true`; a slow client
//! holds up its own answer and keeps 64 KiB of it in memory, not a file.

use config::error::ConfigError;
use layers::plugin::{BuildEnv, Definition, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Taken and without effect: answers are streamed in any case.
    #[serde(default)]
    disable_proxy_buffering: bool,
}

/// The plugin.
pub struct ProxyBuffering;

impl Definition for ProxyBuffering {
    const NAME: &'static str = "proxy-buffering";
    const PRIORITY: i32 = 21991;
    type Config = Config;

    fn build(_: Config, _: &BuildEnv<'_>, _: &mut Hooks) -> Result<(), ConfigError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::TestEnv;
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn it_is_taken_and_takes_part_in_nothing() {
        for config in [json!({}), json!({"disable_proxy_buffering": true})] {
            let built = TestEnv::default().build::<ProxyBuffering>(&config).unwrap();
            assert!(built.hooks.phases().is_empty());
        }
        for config in [json!({"disable_proxy_buffering": 1}), json!({"x": 1})] {
            assert!(TestEnv::default().build::<ProxyBuffering>(&config).is_err(), "{config}");
        }
    }
}
