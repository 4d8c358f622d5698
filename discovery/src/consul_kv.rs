//! Nodes in Consul's KV store: `PREFIX/SERVICE/HOST:PORT`, as nginx-upsync-module and APISIX have them.
//!
//! A value is JSON with a `weight`; `check_status: false` takes the node out. The questions are those of `consul.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use config::discovery::consul_kv as settings;
use futures_util::future::BoxFuture;
use http::StatusCode;
use serde::Deserialize;
use serde_json::Value;

use crate::Node;
use crate::consul::cluster::{Cluster, Poll, escape, manner};
use crate::consul::known::Known;
use crate::consul::stand_in;
use crate::source::{Details, Health, Instance, Listing, Query, Source, SourceError, Watcher};

/// What may follow the URL of a cluster in the name of a service.
const PATHS: &[&str] = &["/v1/kv/"];

/// The clusters of `discovery.consul_kv`.
///
/// # Errors
/// What of the settings cannot be used: a file, a token.
pub fn sources(settings: &settings::ConsulKv) -> Result<Vec<Arc<dyn Source>>, String> {
    let settings = Arc::new(settings.clone());
    let manner = manner!(settings);
    let source = |server: &String| -> Result<Arc<dyn Source>, String> {
        Ok(Arc::new(ConsulKv { cluster: Cluster::new(server, &manner)?, settings: Arc::clone(&settings) }))
    };
    settings.servers.iter().map(source).collect()
}

/// The KV store of one cluster.
#[derive(Debug)]
struct ConsulKv {
    cluster: Arc<Cluster>,
    settings: Arc<settings::ConsulKv>,
}

impl ConsulKv {
    /// The folder of a service with a slash at its end. The name is the folder as APISIX has it (with the URL of the
    /// cluster and `/v1/kv/` before it), or what follows the prefix.
    fn folder(&self, service: &str) -> Option<String> {
        let name = self.cluster.own(service, PATHS)?.trim_matches('/');
        let prefix = self.settings.prefix.trim_matches('/');
        let below = name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'));
        Some(if below { format!("{name}/") } else { format!("{prefix}/{name}/") })
    }
}

impl Source for ConsulKv {
    fn kind(&self) -> &'static str {
        "consul_kv"
    }

    fn name(&self) -> &str {
        self.cluster.server.name()
    }

    fn serves(&self, query: &Query) -> bool {
        self.cluster.own(&query.service, PATHS).is_some()
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        let folder = self.folder(&query.service).ok_or("the name is that of another cluster")?;
        if self.settings.skip_keys.iter().any(|key| key.trim_matches('/') == folder.trim_end_matches('/')) {
            return Err(format!("`{folder}` is one of `skip_keys` of `discovery.consul_kv`"));
        }
        let mut parameters = vec![("recurse", "true".into())];
        for (name, value) in &query.args {
            match &**name {
                "datacenter" | "dc" => parameters.push(("dc", value.to_string().into())),
                other => return Err(format!("Consul's KV store has no detail `{other}`: write datacenter")),
            }
        }
        if let (Some(datacenter), 1) = (&self.settings.datacenter, parameters.len()) {
            parameters.push(("dc", datacenter.as_str().into()));
        }
        let escaped: Vec<_> = folder.split('/').map(escape).collect();
        let poll = self.cluster.poll(&format!("/v1/kv/{}", escaped.join("/")), &parameters);
        let weight = self.settings.weight.get();
        let stand_in = self.settings.default_service.as_ref().map(|node| stand_in(node, weight));
        Ok(Box::new(Watch { poll, folder, weight, stand_in, known: Known::default() }))
    }
}

/// Follows one folder.
struct Watch {
    poll: Poll,
    folder: String,
    weight: u32,
    stand_in: Option<Instance>,
    known: Known,
}

/// One element of `/v1/kv/FOLDER?recurse`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Pair {
    key: String,
    #[serde(default)]
    value: Option<String>,
    #[serde(default)]
    create_index: u64,
}

impl Watcher for Watch {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(async move {
            // There is no folder without a key in it: Consul says "not found".
            let told =
                self.poll.next(|status| status.is_success() || status == StatusCode::NOT_FOUND).await?;
            let pairs: Vec<Pair> = match told.answer.status {
                StatusCode::NOT_FOUND if !told.answer.headers.contains_key("x-consul-index") => {
                    return Err(self.poll.unreadable(&"not found"));
                }
                StatusCode::NOT_FOUND => Vec::new(),
                _ => {
                    serde_json::from_slice(&told.answer.body).map_err(|error| self.poll.unreadable(&error))?
                }
            };
            let (folder, weight) = (&self.folder, self.weight);
            let found = pairs.into_iter().filter_map(|pair| {
                // What lies deeper is another service.
                let name =
                    pair.key.strip_prefix(folder.as_str()).filter(|name| !name.contains('/'))?.to_owned();
                let instance = instance(&name, pair.value.as_deref(), weight);
                Some((name, pair.create_index, instance))
            });
            Ok(self.known.listing(&told, found, self.stand_in.as_ref()))
        })
    }

    fn restart(&mut self) {
        self.poll.restart();
    }
}

/// The node that a key and its value describe. None: it is out, or they describe none.
fn instance(name: &str, value: Option<&str>, weight: u32) -> Option<Instance> {
    let (host, port) = name.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let value = STANDARD.decode(value?).ok()?;
    let value: BTreeMap<String, Value> = serde_json::from_slice(&value).ok()?;
    let status = value.get("check_status");
    if host.is_empty() || status.is_some_and(|status| *status == false || *status == "false") {
        return None;
    }
    let weight = match value.get("weight") {
        Some(weight) => u32::try_from(weight.as_u64()?).unwrap_or(u32::MAX),
        None => weight,
    };
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let said = |name: &str| Some(Arc::from(text(value.get(name)?)));
    let details = Details {
        region: said("region"),
        zone: said("zone"),
        meta: value.iter().map(|(name, value)| (Arc::from(&**name), Arc::from(text(value)))).collect(),
        ..Details::default()
    };
    Some(Instance {
        id: name.into(),
        node: Node { host: host.into(), port, weight, priority: 0 },
        health: if weight == 0 { Health::Draining } else { Health::Healthy },
        details: Some(Arc::new(details)),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn keys_and_values_as_apisix_has_them() {
        for (name, value, expected) in [
            ("10.0.0.1:80", r#"{"weight": 7, "max_fails": 2}"#, Some(("10.0.0.1", 80, 7, Health::Healthy))),
            ("web.test:8080", "{}", Some(("web.test", 8080, 1, Health::Healthy))),
            ("[fd00::1]:80", "{}", Some(("fd00::1", 80, 1, Health::Healthy))),
            ("10.0.0.1:80", r#"{"weight": 0}"#, Some(("10.0.0.1", 80, 0, Health::Draining))),
            ("10.0.0.1:80", r#"{"check_status": false}"#, None),
            ("10.0.0.1:80", r#"{"check_status": "false"}"#, None),
            ("10.0.0.1:80", r#"{"weight": "many"}"#, None),
            ("10.0.0.1:80", "not JSON", None),
            ("10.0.0.1", "{}", None),
            ("10.0.0.1:0", "{}", None),
            ("10.0.0.1:70000", "{}", None),
            (":80", "{}", None),
        ] {
            let found = instance(name, Some(&STANDARD.encode(value)), 1);
            let found = found.as_ref().map(|it| (&*it.node.host, it.node.port, it.node.weight, it.health));
            assert_eq!(found, expected, "{name} {value}");
        }
        assert_eq!(instance("10.0.0.1:80", None, 1), None, "as APISIX: no value, no node");
    }

    #[test]
    fn a_service_is_a_folder() {
        let settings =
            json!({"servers": ["http://a:8500", "http://b:8500"], "skip_keys": ["upstreams/unused/"]});
        let sources = sources(&serde_json::from_value(settings).unwrap()).unwrap();
        let query = |service: &str| Query { service: service.into(), args: BTreeMap::new() };
        for (service, first, second) in [
            ("webpages", true, true),
            ("upstreams/webpages/", true, true),
            ("http://a:8500/v1/kv/upstreams/webpages/", true, false),
            ("http://b:8500/v1/kv/upstreams/webpages/", false, true),
            ("http://c:8500/v1/kv/upstreams/webpages/", false, false),
        ] {
            let served: Vec<_> = sources.iter().map(|source| source.serves(&query(service))).collect();
            assert_eq!(served, [first, second], "{service}");
        }
        assert!(sources[0].open(&query("http://a:8500/v1/kv/upstreams/unused/")).is_err());
        assert!(sources[0].open(&query("unused")).is_err());
        assert!(sources[0].open(&query("webpages")).is_ok());
    }
}
