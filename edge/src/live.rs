//! What the control plane may ask the running gateway.
//!
//! One trait stands between the Control and status APIs and whoever compiles and publishes snapshots: they show
//! what is served, never what is stored. Everything is answered from memory, and nothing on a worker waits for
//! an answer.

#[cfg(test)]
pub(crate) mod fake;

use std::sync::Arc;
use std::time::SystemTime;

use config::{Item, Kind, Rejected, ResourceKey};
use serde::Serialize;
use serde_json::Value;

use crate::store::BoxFuture;

/// The gateway as it serves now. Answers come from memory and at once.
pub trait LiveState: Send + Sync + 'static {
    /// The objects of a kind that are served, in the order of their ids.
    fn objects(&self, kind: Kind) -> Vec<Arc<Item>>;

    /// One of them.
    fn object(&self, key: &ResourceKey) -> Option<Arc<Item>>;

    /// The objects that are set aside, with their errors.
    fn rejected(&self) -> Vec<Rejected>;

    /// The health of the nodes of every upstream that has checks or breakers.
    fn health(&self) -> Vec<Checker>;

    /// Whether requests should be sent here.
    fn readiness(&self) -> Readiness;

    /// What somebody should look at, though requests are served.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// What was compiled last.
    fn applied(&self) -> Applied;

    /// What would happen to a request, told in words. `request` is what the caller sent.
    ///
    /// # Errors
    /// What is wrong with `request`.
    fn explain(&self, request: Value) -> BoxFuture<'_, Result<Value, String>>;

    /// The endpoints one kind of discovery knows, in APISIX's words; nothing if it is not in use.
    fn discovery(&self, kind: &str) -> Option<Value>;

    /// The same as APISIX keeps it in a file.
    fn discovery_file(&self, kind: &str) -> Option<Value>;

    /// What is known of the endpoints of upstreams: of all in a few words, or everything about those that are called so.
    /// `version` is another word when something has changed.
    fn endpoints(&self, name: Option<&str>) -> Inventory;

    /// Whether the word is another one by now.
    fn endpoints_changed(&self, name: Option<&str>, since: &str) -> bool;

    /// Asks for what the endpoints of the upstreams of this name come from, now. False if there is nothing to ask.
    fn refresh_endpoints(&self, name: &str) -> bool;

    /// How this gateway is of the mesh; none if it is of none.
    fn mesh(&self) -> Option<Value>;

    /// Circuits of `api-breaker` that have seen failures.
    fn breakers(&self) -> Value;

    /// The zones of `proxy-cache` that are in use: what is in them, hits and misses.
    fn caches(&self) -> Value;

    /// Forget everything in such a zone. False if it is not in use.
    fn purge_cache(&self, zone: &str) -> bool;

    /// Lookup tables, or the one of this id, with their lists.
    fn lookup_tables(&self, id: Option<&str>) -> Vec<Value>;

    /// What a request with this key would meet in a lookup table; nothing if it is unknown.
    fn lookup_entry(&self, id: &str, key: &str) -> Option<Value>;

    /// Read the list of plugins again.
    fn reload_plugins(&self);
}

/// What is known of the endpoints of upstreams.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inventory {
    /// Another word when something has changed.
    pub version: String,
    /// The upstreams, in the order of their names.
    pub upstreams: Vec<Value>,
}

/// Whether requests should be sent here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// They should.
    Ready,
    /// Not yet, or not any more, for this reason.
    NotReady(String),
    /// Not any more: the process is about to end.
    Draining,
}

/// What was compiled last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The store's revision it belongs to.
    pub revision: u64,
    /// When it was published.
    pub at: SystemTime,
}

/// The health checks of one object.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Checker {
    /// The object that has them.
    #[serde(skip)]
    pub owner: ResourceKey,
    /// `http`, `https` or `tcp`; `passive` where only live traffic judges, `breaker` where there are breakers alone.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The nodes that are checked.
    pub nodes: Vec<NodeHealth>,
}

/// The health of one node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeHealth {
    /// The address.
    pub ip: String,
    /// The port.
    pub port: u16,
    /// The name it was configured with, if it is not the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// `healthy`, `mostly_healthy`, `mostly_unhealthy` or `unhealthy`.
    pub status: &'static str,
    /// What led there.
    pub counter: HealthCounter,
    /// `closed`, `half_open` or `open`, where the upstream has breakers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<&'static str>,
    /// How often the breaker has opened.
    #[serde(skip)]
    pub breaker_opened: u64,
}

/// Results in a row that led to the status of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct HealthCounter {
    pub success: u32,
    pub tcp_failure: u32,
    pub http_failure: u32,
    pub timeout_failure: u32,
}
