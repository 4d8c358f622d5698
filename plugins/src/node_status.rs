//! `node-status`: tells at `/apisix/status` how many connections and requests there are, where `public-api` exposes it.
//!
//! No phase. The numbers are those of nginx's status page, as text.

use std::sync::Arc;

use config::error::ConfigError;
use http::{Method, Response, StatusCode};
use layers::body::Body;
use layers::endpoint::{Endpoint, Offers};
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Hooks};
use layers::telemetry::metrics::{Door, Metrics};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::support::reply::Canned;

/// Settings: none.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

/// `plugin_attr.node-status` with the id of this instance.
pub fn attr(id: &str) -> Value {
    json!({ "id": id })
}

/// The plugin.
pub struct NodeStatus;

impl Definition for NodeStatus {
    const NAME: &'static str = "node-status";
    const PRIORITY: i32 = 1000;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::Placement::Edge("it answers under paths of the gateway, and a sidecar has none");
    type Config = Config;

    fn build(_: Config, _: &BuildEnv<'_>, _: &mut Hooks) -> Result<(), ConfigError> {
        Ok(())
    }

    fn offer(env: &BuildEnv<'_>, offers: &mut Offers) -> Result<(), ConfigError> {
        let id = env.attr.and_then(|attr| attr.get("id")).and_then(Value::as_str).unwrap_or_default();
        let page = Page { id: id.into(), metrics: env.metrics.clone() };
        offers.serve(Method::GET, "/apisix/status", &Arc::new(page));
        Ok(())
    }
}

struct Page {
    id: Box<str>,
    metrics: Arc<Metrics>,
}

impl Endpoint for Page {
    async fn answer(&self, _: &mut Exchange) -> Response<Body> {
        let Door { accepted, refused, active, received, in_flight, .. } = self.metrics.door();
        let busy = in_flight.min(active);
        // Heads are read between two polls, so nothing is ever seen reading.
        let status = json!({
            "active": active.to_string(),
            "accepted": accepted.to_string(),
            "handled": accepted.saturating_sub(refused).to_string(),
            "total": received.to_string(),
            "reading": "0",
            "writing": busy.to_string(),
            "waiting": (active - busy).to_string(),
        });
        Canned::json(StatusCode::OK, &json!({"id": self.id, "status": status})).response()
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};

    use super::*;

    #[tokio::test]
    async fn the_numbers_of_the_door_are_told() {
        let env = TestEnv { attr: Some(attr("me")), ..TestEnv::default() };
        let door = Door { accepted: 9, refused: 1, active: 4, received: 20, in_flight: 3, failed: 0 };
        env.metrics.watch_door(move || door);
        env.offer::<NodeStatus>().unwrap();
        assert!(env.endpoints.find(&Method::POST, "/apisix/status").is_none());
        let page = env.endpoints.find(&Method::GET, "/apisix/status").unwrap();
        let mut response = page.answer(&mut exchange("GET", "http://a/").build()).await;
        let body = response.body_mut().collect_up_to(1 << 10).await.unwrap();
        let expected = json!({"id": "me", "status": {
            "active": "4", "accepted": "9", "handled": "8", "total": "20", "reading": "0", "writing": "3", "waiting": "1",
        }});
        assert_eq!(serde_json::from_slice::<Value>(&body).unwrap(), expected);
        assert!(env.build::<NodeStatus>(&json!({})).is_ok());
        assert!(env.build::<NodeStatus>(&json!({"a": 1})).is_err());
    }
}
