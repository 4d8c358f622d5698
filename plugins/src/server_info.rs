//! `server-info`: tells at `/v1/server_info` of the Control API which instance this is and since when it runs.
//!
//! No phase; what it tells is told by the Control API where the plugin is enabled. Nothing is written to etcd.

use config::error::ConfigError;
use layers::plugin::{BuildEnv, Definition, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings: none.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

/// The plugin.
pub struct ServerInfo;

impl Definition for ServerInfo {
    const NAME: &'static str = "server-info";
    const PRIORITY: i32 = 990;
    const PLACEMENT: layers::plugin::Placement =
        layers::plugin::Placement::Edge("its answer is part of the Control API, which is the edge's");
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
    async fn it_has_no_settings() {
        assert!(TestEnv::default().build::<ServerInfo>(&json!({})).is_ok());
        assert!(TestEnv::default().build::<ServerInfo>(&json!({"report_ttl": 60})).is_err());
    }
}
