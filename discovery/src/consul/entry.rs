//! What Consul answers about the health of a service, and what it means for an instance.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use config::discovery::consul::{Critical, MetaKeys};
use serde::Deserialize;

use crate::Node;
use crate::source::{Details, Health, Instance};

/// One element of `/v1/health/service/NAME`. Consul writes null for what is empty.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Entry<'a> {
    #[serde(borrow)]
    pub(super) node: NodeEntry<'a>,
    #[serde(borrow)]
    pub(super) service: ServiceEntry<'a>,
    #[serde(borrow, default)]
    checks: Option<Vec<Check<'a>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NodeEntry<'a> {
    #[serde(borrow)]
    pub(super) node: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(super) address: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    datacenter: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    tagged_addresses: Option<BTreeMap<Cow<'a, str>, Cow<'a, str>>>,
    #[serde(borrow, default)]
    meta: Option<BTreeMap<Cow<'a, str>, Cow<'a, str>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ServiceEntry<'a> {
    #[serde(borrow, rename = "ID")]
    pub(super) id: Cow<'a, str>,
    #[serde(borrow, default)]
    tags: Option<Vec<Cow<'a, str>>>,
    #[serde(borrow, default)]
    address: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    tagged_addresses: Option<BTreeMap<Cow<'a, str>, TaggedAddress<'a>>>,
    #[serde(borrow, default)]
    meta: Option<BTreeMap<Cow<'a, str>, Cow<'a, str>>>,
    #[serde(default)]
    port: Option<i64>,
    #[serde(default)]
    weights: Option<Weights>,
    /// When it was registered for the first time, in the counting of this registry's life.
    #[serde(default)]
    pub(super) create_index: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TaggedAddress<'a> {
    #[serde(borrow, default)]
    address: Option<Cow<'a, str>>,
    #[serde(default)]
    port: Option<i64>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Weights {
    passing: u32,
    warning: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check<'a> {
    #[serde(borrow, rename = "CheckID")]
    id: Cow<'a, str>,
    #[serde(borrow)]
    status: Cow<'a, str>,
}

/// How entries become instances.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) weight: u32,
    pub(super) passing: bool,
    pub(super) critical: Critical,
    pub(super) tagged_address: Option<String>,
    pub(super) meta: MetaKeys,
}

/// As APISIX: a service that is registered without a port is an HTTP server.
const NO_PORT: u16 = 80;

impl Entry<'_> {
    /// The name of the instance: service ids are unique on a node only.
    pub(super) fn id(&self) -> String {
        format!("{}/{}", self.node.node, self.service.id)
    }

    /// Whether its node has no agent: it was written into the catalog for what cannot speak for itself.
    pub(super) fn is_external(&self) -> bool {
        self.node
            .meta
            .as_ref()
            .and_then(|meta| meta.get("external-node"))
            .is_some_and(|value| value == "true")
    }

    /// None: it is not to be known of, or has no address that can be used.
    pub(super) fn instance(&self, reading: &Reading) -> Option<Instance> {
        let weights = self.service.weights.unwrap_or(Weights { passing: 1, warning: 1 });
        let (health, weight) = match self.verdict() {
            // Registered with nothing to do: the way to drain in Consul where maintenance is not used.
            Health::Healthy if weights.passing == 0 => (Health::Draining, 0),
            Health::Healthy => (Health::Healthy, weights.passing),
            Health::Warning if reading.passing => return None,
            Health::Warning if weights.warning == 0 => (Health::Draining, 0),
            Health::Warning => (Health::Warning, weights.warning),
            Health::Draining => (Health::Draining, weights.passing),
            Health::Unhealthy if reading.critical == Critical::Drop => return None,
            Health::Unhealthy => (Health::Unhealthy, weights.passing),
        };
        let Some((host, port)) = self.address(reading) else {
            tracing::debug!(
                instance = self.id(),
                "an instance without an address that can be used is left out"
            );
            return None;
        };
        let weight = weight.saturating_mul(reading.weight);
        Some(Instance {
            id: self.id().into(),
            node: Node { host: host.into(), port, weight, priority: 0 },
            health,
            details: Some(Arc::new(self.details(reading))),
        })
    }

    /// The worst of the checks of the instance and of its node, `serfHealth` among them. Maintenance is said by a critical
    /// check with a name of its own.
    fn verdict(&self) -> Health {
        let mut worst = Health::Healthy;
        for check in self.checks.iter().flatten() {
            let health = match &*check.status {
                "passing" => Health::Healthy,
                "warning" => Health::Warning,
                _ if check.id == "_node_maintenance" || check.id.starts_with("_service_maintenance:") => {
                    return Health::Draining;
                }
                _ => Health::Unhealthy,
            };
            worst = worst.max(health);
        }
        worst
    }

    fn address(&self, reading: &Reading) -> Option<(&str, u16)> {
        fn some<'a>(text: Option<&'a Cow<'_, str>>) -> Option<&'a str> {
            text.map(|text| &**text).filter(|text| !text.is_empty())
        }
        let (node, service) = (&self.node, &self.service);
        let own = some(service.address.as_ref());
        let mut found = None;
        if let Some(tag) = reading.tagged_address.as_deref() {
            let tagged = service.tagged_addresses.as_ref().and_then(|tagged| tagged.get(tag));
            found = tagged.and_then(|tagged| Some((some(tagged.address.as_ref())?, tagged.port)));
            if found.is_none() && own.is_none() {
                let tagged = node.tagged_addresses.as_ref().and_then(|tagged| tagged.get(tag));
                found = some(tagged).map(|host| (host, None));
            }
        }
        let (host, port) = match found {
            Some((host, port)) => (host, port.filter(|port| *port != 0).or(service.port)),
            None => (own.or_else(|| some(node.address.as_ref()))?, service.port),
        };
        let port = match port {
            None | Some(0) => NO_PORT,
            Some(port) => u16::try_from(port).ok()?,
        };
        Some((host, port))
    }

    fn details(&self, reading: &Reading) -> Details {
        let (node, service) = (&self.node, &self.service);
        let mut meta = BTreeMap::new();
        for tag in service.tags.iter().flatten() {
            let (name, value) = tag.split_once('=').unwrap_or((tag, ""));
            meta.insert(Arc::from(name), Arc::from(value));
        }
        for (name, value) in service.meta.iter().flatten() {
            meta.insert(Arc::from(&**name), Arc::from(&**value));
        }
        let said = |name: &str| {
            let of = |meta: &Option<BTreeMap<Cow<'_, str>, Cow<'_, str>>>| {
                meta.as_ref()?.get(name).filter(|value| !value.is_empty()).map(|value| Arc::from(&**value))
            };
            of(&service.meta).or_else(|| of(&node.meta))
        };
        Details {
            region: said(&reading.meta.region).or_else(|| node.datacenter.as_deref().map(Arc::from)),
            zone: said(&reading.meta.zone),
            machine: Some(Arc::from(&*node.node)),
            for_zones: Vec::new(),
            identity: said(&reading.meta.identity),
            meta,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::*;

    fn reading() -> Reading {
        Reading {
            weight: 1,
            passing: false,
            critical: Critical::Drop,
            tagged_address: None,
            meta: MetaKeys::default(),
        }
    }

    fn entry(change: impl FnOnce(&mut Value)) -> Value {
        let mut entry = json!({
            "Node": {"Node": "n1", "Address": "10.0.0.1", "Datacenter": "dc1",
                     "TaggedAddresses": {"lan": "10.0.0.1", "wan": "198.51.100.1"}, "Meta": {"zone": "a"}},
            "Service": {"ID": "orders-1", "Service": "orders", "Tags": ["v2", "tier=gold"], "Address": "10.0.0.7",
                        "TaggedAddresses": {"wan": {"Address": "198.51.100.7", "Port": 443}},
                        "Meta": {"version": "2", "mesh-identity": "spiffe://td/orders"}, "Port": 8080,
                        "Weights": {"Passing": 10, "Warning": 3}, "CreateIndex": 14},
            "Checks": [{"CheckID": "serfHealth", "Status": "passing"}],
        });
        change(&mut entry);
        entry
    }

    fn read(value: &Value, reading: &Reading) -> Option<Instance> {
        let text = value.to_string();
        serde_json::from_str::<Entry<'_>>(&text).unwrap().instance(reading)
    }

    #[test]
    fn the_checks_say_how_an_instance_is_used() {
        let check = |id: &str, status: &str| json!({"CheckID": id, "Status": status});
        let cases = [
            (vec![], Some((Health::Healthy, 10))),
            (vec![check("service:x", "warning")], Some((Health::Warning, 3))),
            (vec![check("service:x", "critical")], None),
            (vec![check("service:x", "critical"), check("y", "warning")], None),
            (vec![check("service:x", "something new")], None),
            (vec![check("_service_maintenance:orders-1", "critical")], Some((Health::Draining, 10))),
            (
                vec![check("service:x", "critical"), check("_node_maintenance", "critical")],
                Some((Health::Draining, 10)),
            ),
        ];
        for (checks, expected) in cases {
            let value = entry(|entry| entry["Checks"].as_array_mut().unwrap().extend(checks.clone()));
            let found = read(&value, &reading()).map(|instance| (instance.health, instance.node.weight));
            assert_eq!(found, expected, "{checks:?}");
        }
        let gone = entry(|entry| entry["Checks"][0]["Status"] = "critical".into());
        assert_eq!(read(&gone, &reading()), None, "serfHealth counts");
    }

    #[test]
    fn options_change_what_is_used() {
        let with = |status: &str| entry(|entry| entry["Checks"][0]["Status"] = status.into());
        let passing = Reading { passing: true, ..reading() };
        assert_eq!(read(&with("warning"), &passing), None);
        let keep = Reading { critical: Critical::Keep, weight: 5, ..reading() };
        let kept = read(&with("critical"), &keep).unwrap();
        assert_eq!((kept.health, kept.node.weight), (Health::Unhealthy, 50));
        for (weights, status, health) in [
            (json!({"Passing": 0, "Warning": 1}), "passing", Health::Draining),
            (json!({"Passing": 1, "Warning": 0}), "warning", Health::Draining),
            (json!(null), "passing", Health::Healthy),
        ] {
            let mut value = with(status);
            value["Service"]["Weights"] = weights;
            assert_eq!(read(&value, &reading()).unwrap().health, health, "{value}");
        }
    }

    #[test]
    fn where_an_instance_is() {
        let tagged = |tag: &str| Reading { tagged_address: Some(tag.to_owned()), ..reading() };
        let no_service = |entry: &mut Value| entry["Service"]["Address"] = "".into();
        let no_port = |entry: &mut Value| entry["Service"]["Port"] = 0.into();
        let plain = |_: &mut Value| {};
        let v6 = |entry: &mut Value| entry["Service"]["Address"] = "fd00::7".into();
        let null = |entry: &mut Value| {
            for field in ["Port", "Address", "TaggedAddresses", "Meta", "Tags"] {
                entry["Service"][field] = Value::Null;
            }
        };
        type Case<'a> = (&'a dyn Fn(&mut Value), Reading, &'a str, u16);
        let cases: [Case<'_>; 8] = [
            (&plain, reading(), "10.0.0.7", 8080),
            (&no_service, reading(), "10.0.0.1", 8080),
            (&no_port, reading(), "10.0.0.7", 80),
            (&null, reading(), "10.0.0.1", 80),
            (&v6, reading(), "fd00::7", 8080),
            (&plain, tagged("wan"), "198.51.100.7", 443),
            (&plain, tagged("lan_ipv6"), "10.0.0.7", 8080),
            (&null, tagged("wan"), "198.51.100.1", 80),
        ];
        for (change, reading, host, port) in cases {
            let value = entry(|value| change(value));
            let node = read(&value, &reading).unwrap().node;
            assert_eq!((&*node.host, node.port), (host, port), "{value} {reading:?}");
        }
        assert_eq!(read(&entry(|entry| entry["Service"]["Port"] = 70_000.into()), &reading()), None);
    }

    #[test]
    fn what_is_known_besides() {
        let instance = read(&entry(|_| {}), &reading()).unwrap();
        assert_eq!(&*instance.id, "n1/orders-1");
        let details = instance.details.unwrap();
        assert_eq!(details.region.as_deref(), Some("dc1"));
        assert_eq!(details.zone.as_deref(), Some("a"));
        assert_eq!(details.machine.as_deref(), Some("n1"));
        assert_eq!(details.identity.as_deref(), Some("spiffe://td/orders"));
        let meta: Vec<_> = details.meta.iter().map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!(
            meta,
            [("mesh-identity", "spiffe://td/orders"), ("tier", "gold"), ("v2", ""), ("version", "2")]
        );
    }
}
