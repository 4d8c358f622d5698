//! A running gateway for the tests of those who tell of it.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

use config::graph::Rejected;
use config::plugin_catalog::NoPlugins;
use config::{ConfigError, Item, Kind, Resource, ResourceKey};
use serde_json::{Value, json};

use super::{Applied, Checker, HealthCounter, Inventory, LiveState, NodeHealth, Readiness};
use crate::store::BoxFuture;

/// A gateway with one route, one upstream that is checked, and one object set aside.
pub(crate) struct Fake {
    pub(crate) readiness: Mutex<Readiness>,
    pub(crate) warnings: Mutex<Vec<String>>,
}

impl Default for Fake {
    fn default() -> Self {
        Self { readiness: Mutex::new(Readiness::Ready), warnings: Mutex::default() }
    }
}

fn item(key: ResourceKey, value: Value) -> Arc<Item> {
    let resource = Resource::parse(&key, &value, &NoPlugins).unwrap();
    Arc::new(Item { key, resource, created_index: 1, modified_index: 2 })
}

impl LiveState for Fake {
    fn objects(&self, kind: Kind) -> Vec<Arc<Item>> {
        let key = ResourceKey::new(kind, "1");
        match kind {
            Kind::Route => vec![item(key, json!({"uri": "/a", "upstream_id": "1"}))],
            Kind::Upstream => {
                vec![item(key, json!({"nodes": {"127.0.0.1:80": 1}, "type": "roundrobin"}))]
            }
            Kind::PluginMetadata => {
                let metadata = serde_json::from_value(json!({"log_format": {}})).unwrap();
                vec![Arc::new(Item {
                    key: ResourceKey::new(kind, "http-logger"),
                    resource: Resource::PluginMetadata(metadata),
                    created_index: 1,
                    modified_index: 1,
                })]
            }
            _ => Vec::new(),
        }
    }

    fn object(&self, key: &ResourceKey) -> Option<Arc<Item>> {
        self.objects(key.kind).into_iter().find(|item| item.key == *key)
    }

    fn rejected(&self) -> Vec<Rejected> {
        vec![Rejected {
            key: ResourceKey::new(Kind::Route, "bad"),
            errors: vec![ConfigError::invalid("/uri", "write a path")],
            value: json!({"uri": "top secret"}),
            created_index: 9,
            modified_index: 9,
        }]
    }

    fn health(&self) -> Vec<Checker> {
        let node = NodeHealth {
            ip: "127.0.0.1".to_owned(),
            port: 80,
            hostname: Some("<b>".to_owned()),
            status: "unhealthy",
            counter: HealthCounter { http_failure: 5, ..HealthCounter::default() },
            breaker: None,
            breaker_opened: 0,
        };
        vec![Checker { owner: ResourceKey::new(Kind::Upstream, "1"), kind: "http", nodes: vec![node] }]
    }

    fn readiness(&self) -> Readiness {
        self.readiness.lock().unwrap().clone()
    }

    fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap().clone()
    }

    fn applied(&self) -> Applied {
        Applied { revision: 7, at: UNIX_EPOCH }
    }

    fn explain(&self, request: Value) -> BoxFuture<'_, Result<Value, String>> {
        Box::pin(
            async move { request.get("path").cloned().ok_or_else(|| "`path` is missing: add it".to_owned()) },
        )
    }

    fn discovery(&self, kind: &str) -> Option<Value> {
        (kind == "dns").then(|| json!({"services": {}}))
    }

    fn discovery_file(&self, kind: &str) -> Option<Value> {
        self.discovery(kind)
    }

    fn endpoints(&self, name: Option<&str>) -> Inventory {
        let upstreams = match name {
            None | Some("upstreams/1") => vec![json!({"name": "upstreams/1"})],
            Some(_) => Vec::new(),
        };
        Inventory { version: "v1".to_owned(), upstreams }
    }

    fn endpoints_changed(&self, _: Option<&str>, since: &str) -> bool {
        since != "v1"
    }

    fn refresh_endpoints(&self, name: &str) -> bool {
        name == "upstreams/1"
    }

    fn mesh(&self) -> Option<Value> {
        Some(json!({"svid": {"id": "spiffe://mesh.local/ns/default/sa/edge"}}))
    }

    fn breakers(&self) -> Value {
        json!([{"route": "1"}])
    }

    fn caches(&self) -> Value {
        json!([{"name": "memory_cache"}])
    }

    fn purge_cache(&self, zone: &str) -> bool {
        zone == "memory_cache"
    }

    fn lookup_tables(&self, id: Option<&str>) -> Vec<Value> {
        let table = json!({"id": "t", "entries": 1});
        if id.is_none_or(|id| id == "t") { vec![table] } else { Vec::new() }
    }

    fn lookup_entry(&self, id: &str, key: &str) -> Option<Value> {
        ((id, key) == ("t", "k")).then(|| json!({"key": "k", "entry": {"tls": {"client_key": "hidden"}}}))
    }

    fn reload_plugins(&self) {}
}
