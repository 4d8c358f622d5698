//! Where a matched request goes: the compiled form of a route, its service and its plugin configuration.

use std::sync::Arc;
use std::time::Duration;

use config::graph::Item;

use crate::chain::Plan;
use crate::error::Reason;
use crate::upstream::cluster::Cluster;

/// Time limits of one attempt. APISIX `timeout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// To establish a connection, TLS included.
    pub connect: Duration,
    /// Between two successful writes of the request.
    pub send: Duration,
    /// Between two successful reads of the response.
    pub read: Duration,
}

/// What forwards the request.
#[derive(Clone, Debug)]
pub enum Destination {
    /// This upstream.
    Cluster(Arc<Cluster>),
    /// Nothing can: the answer is the gateway's, for this reason. A plugin may still answer or choose an upstream.
    Nothing(Reason),
}

/// The compiled form of a route.
#[derive(Debug)]
pub struct Target {
    /// The route's id.
    pub route_id: Arc<str>,
    /// The route's name.
    pub route_name: Option<Arc<str>>,
    /// The route as it is stored, for plugins that tell somebody of it.
    pub route: Option<Arc<Item>>,
    /// Its service as it is stored.
    pub service: Option<Arc<Item>>,
    /// The id of its service.
    pub service_id: Option<Arc<str>>,
    /// The name of its service.
    pub service_name: Option<Arc<str>>,
    /// Its plugins, merged with those of its plugin configuration and service; nothing where there are none.
    pub plan: Option<Arc<Plan>>,
    /// Its upstream.
    pub destination: Destination,
    /// Time limits in place of the upstream's. Boxed, as few routes have some.
    pub timeout: Option<Box<Timeouts>>,
    /// Whether a protocol switch to WebSocket is forwarded (`enable_websocket`).
    pub websocket: bool,
    /// The route may not serve: why, in words for the log. It answers 503.
    pub refused: Option<Box<str>>,
}
