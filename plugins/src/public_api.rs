//! `public-api`: exposes on a route a path that another plugin serves, such as the metrics.
//!
//! Phase: `access`, behind all that authenticates and limits. A path that no plugin serves, or not by this method, is
//! answered 404.

use std::sync::Arc;

use config::error::ConfigError;
use http::StatusCode;
use layers::endpoint::Endpoints;
use layers::exchange::Exchange;
use layers::plugin::{AccessWaits, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::reply::Canned;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The path that a plugin serves; without it the path of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
}

/// The plugin.
pub struct PublicApi {
    uri: Option<Box<str>>,
    endpoints: Endpoints,
    missing: Canned,
}

impl Definition for PublicApi {
    const NAME: &'static str = "public-api";
    const PRIORITY: i32 = 501;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::Placement::Edge("it answers under paths of the gateway, and a sidecar has none");
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let wrong = config.uri.as_ref().is_some_and(|uri| !uri.starts_with('/'));
        wrong.then(|| ConfigError::invalid("/uri", "a path begins with `/`")).into_iter().collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        hooks.access_waits(&Arc::new(Self {
            uri: config.uri.map(Into::into),
            endpoints: env.endpoints.clone(),
            missing: Canned::status(StatusCode::NOT_FOUND),
        }));
        Ok(())
    }
}

impl AccessWaits for PublicApi {
    async fn access(&self, x: &mut Exchange) -> Flow {
        let path = self.uri.as_deref().unwrap_or_else(|| x.path());
        match self.endpoints.find(&x.request.method, path) {
            Some(endpoint) => Flow::Reply(endpoint.answer(x).await),
            None => self.missing.flow(),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{Method, Response};
    use layers::body::Body;
    use layers::endpoint::{Endpoint, Offers};
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::json;

    use super::*;

    struct Tells;

    impl Endpoint for Tells {
        async fn answer(&self, x: &mut Exchange) -> Response<Body> {
            Response::new(Body::from(x.request.uri.query().unwrap_or_default().to_owned()))
        }
    }

    #[tokio::test]
    async fn what_a_plugin_serves_is_reached_and_nothing_else() {
        let env = TestEnv::default();
        let mut offers = Offers::default();
        offers.serve(Method::GET, "/apisix/told", &Arc::new(Tells));
        env.endpoints.publish(offers);
        let cases = [
            (json!({}), "GET", "/apisix/told?a=1", 200),
            (json!({}), "POST", "/apisix/told?a=1", 404),
            (json!({}), "GET", "/apisix/other", 404),
            (json!({}), "GET", "/apisix/told/", 404),
            (json!({"uri": "/apisix/told"}), "GET", "/public?a=1", 200),
            (json!({"uri": "/apisix/other"}), "GET", "/apisix/told", 404),
        ];
        for (config, method, uri, status) in cases {
            let mut chain = env.chain::<PublicApi, _>(&config, |_| Ok(())).unwrap();
            let mut x = chain.run(exchange(method, &format!("http://a{uri}")).build()).await;
            assert_eq!((x.response.status().as_u16(), x.answered_by_plugin()), (status, Some("public-api")));
            assert_eq!(text(&mut x).await == "a=1", status == 200, "{config} {method} {uri}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (config, pointer) in [(json!({"uri": "x"}), "/uri"), (json!({"uri": 1}), "/uri"), (json!({"url": "/"}), "/url")] {
            let errors = TestEnv::default().build::<PublicApi>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}");
        }
    }
}
