//! The objects of the Kubernetes API as far as they are looked at, and what becomes of them.
//!
//! Types of our own, because those of the API hold ten times of what is needed here and would be kept for every slice of
//! a cluster. Absent and null are the same everywhere in this API.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Deserializer};

use crate::source::Details;

/// A list of objects.
#[derive(Debug, Deserialize)]
#[serde(bound = "T: Deserialize<'de>")]
pub(super) struct List<T> {
    #[serde(default)]
    pub metadata: ListMeta,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    pub items: Vec<T>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListMeta {
    #[serde(default, deserialize_with = "nullable")]
    pub resource_version: String,
    /// Where the list goes on; empty at its end.
    #[serde(default, rename = "continue", deserialize_with = "nullable")]
    pub proceed: String,
}

/// One line of a watch.
#[derive(Debug, Deserialize)]
pub(super) struct Event<'a> {
    #[serde(rename = "type")]
    pub kind: &'a str,
    #[serde(borrow)]
    pub object: &'a serde_json::value::RawValue,
}

/// What a bookmark says, and the first thing every event is asked for.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Bookmark {
    #[serde(default)]
    pub metadata: Meta,
}

/// `Status`: what went wrong.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Status {
    #[serde(default)]
    pub code: u16,
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub message: String,
    #[serde(default)]
    pub details: Option<StatusDetails>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct StatusDetails {
    pub retry_after_seconds: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Meta {
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub namespace: String,
    #[serde(default)]
    pub resource_version: String,
    #[serde(default, deserialize_with = "nullable")]
    pub labels: Labels,
    #[serde(default, deserialize_with = "nullable")]
    pub annotations: Annotations,
}

/// The labels that mean something here.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Labels {
    #[serde(rename = "kubernetes.io/service-name")]
    pub service_name: Option<String>,
}

/// The annotations that mean something here.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Annotations {
    /// `truncated` where Endpoints leaves some out.
    #[serde(rename = "endpoints.kubernetes.io/over-capacity")]
    pub over_capacity: Option<String>,
}

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointSlice {
    pub metadata: Meta,
    #[serde(default)]
    pub address_type: AddressType,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    endpoints: Vec<SliceEndpoint>,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    ports: Vec<SlicePort>,
}

/// What the addresses of a slice are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub(super) enum AddressType {
    #[default]
    IPv4,
    IPv6,
    #[serde(rename = "FQDN")]
    Fqdn,
    /// One that is younger than this program.
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SliceEndpoint {
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    addresses: Vec<Arc<str>>,
    #[serde(default, deserialize_with = "nullable")]
    conditions: Conditions,
    hostname: Option<Arc<str>>,
    target_ref: Option<TargetRef>,
    node_name: Option<Arc<str>>,
    zone: Option<Arc<str>>,
    #[serde(default, deserialize_with = "nullable")]
    hints: Hints,
}

#[derive(Debug, Default, Deserialize)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct TargetRef {
    name: Option<Arc<str>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Hints {
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    for_zones: Vec<Named>,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    for_nodes: Vec<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: Arc<str>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SlicePort {
    name: Option<Arc<str>>,
    port: Option<u16>,
    app_protocol: Option<Arc<str>>,
}

/// `v1` Endpoints.
#[derive(Debug, Deserialize)]
pub(super) struct Endpoints {
    pub metadata: Meta,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    subsets: Vec<Subset>,
}

#[derive(Debug, Deserialize)]
struct Subset {
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    addresses: Vec<SubsetAddress>,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    ports: Vec<SlicePort>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SubsetAddress {
    ip: Arc<str>,
    hostname: Option<Arc<str>>,
    node_name: Option<Arc<str>>,
    target_ref: Option<TargetRef>,
}

/// `v1` Service.
#[derive(Debug, Deserialize)]
pub(super) struct Service {
    pub metadata: Meta,
    #[serde(default, deserialize_with = "nullable")]
    spec: ServiceSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceSpec {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    external_name: Option<Arc<str>>,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    ports: Vec<ServicePort>,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    ip_families: Vec<AddressType>,
    traffic_distribution: Option<Arc<str>>,
}

#[derive(Debug, Deserialize)]
struct ServicePort {
    name: Option<Arc<str>>,
    port: u16,
}

fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A slice, or a subset of an Endpoints object, as it is kept.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub family: AddressType,
    pub ports: Vec<Port>,
    pub endpoints: Vec<Backend>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub name: Option<Arc<str>>,
    /// None stands for all ports.
    pub number: Option<u16>,
    pub protocol: Option<Arc<str>>,
}

/// An endpoint of a slice.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Backend {
    pub host: Arc<str>,
    /// The object that it is, a pod as a rule.
    pub target: Option<Arc<str>>,
    pub readiness: Readiness,
    pub details: Arc<Details>,
}

/// What the conditions amount to. Better ones come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Readiness {
    Ready,
    /// It ends, and serves as long as it has not ended.
    ServesOn,
    Not,
}

/// A service as it is kept.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// Its ports by number, with their names.
    pub ports: Vec<(u16, Option<Arc<str>>)>,
    /// The name that the service stands for.
    pub external: Option<Arc<str>>,
    /// The family of addresses that it prefers.
    pub family: Option<AddressType>,
    pub traffic_distribution: Option<Arc<str>>,
}

impl Conditions {
    /// Ready is what is not said to be unready, and serving is what is ready where nothing is said of it.
    fn readiness(&self) -> Readiness {
        let ready = self.ready.unwrap_or(true);
        match (ready, self.serving.unwrap_or(ready), self.terminating.unwrap_or(false)) {
            (true, ..) => Readiness::Ready,
            (false, true, true) => Readiness::ServesOn,
            _ => Readiness::Not,
        }
    }
}

impl From<SlicePort> for Port {
    fn from(port: SlicePort) -> Self {
        Self {
            name: port.name.filter(|name| !name.is_empty()),
            number: port.port,
            protocol: port.app_protocol,
        }
    }
}

impl EndpointSlice {
    pub(super) fn keep(self) -> Slice {
        let endpoints = self.endpoints.into_iter().filter_map(|endpoint| {
            // Several addresses of one endpoint are the same endpoint; kube-proxy takes the first, too.
            let host = endpoint.addresses.into_iter().next()?;
            let mut meta = BTreeMap::new();
            if let Some(hostname) = endpoint.hostname {
                meta.insert("hostname".into(), hostname);
            }
            if !endpoint.hints.for_nodes.is_empty() {
                let nodes: Vec<&str> = endpoint.hints.for_nodes.iter().map(|node| &*node.name).collect();
                meta.insert("for_nodes".into(), nodes.join(",").into());
            }
            Some(Backend {
                host,
                target: endpoint.target_ref.and_then(|target| target.name),
                readiness: endpoint.conditions.readiness(),
                details: Arc::new(Details {
                    zone: endpoint.zone,
                    machine: endpoint.node_name,
                    for_zones: endpoint.hints.for_zones.into_iter().map(|zone| zone.name).collect(),
                    meta,
                    ..Details::default()
                }),
            })
        });
        Slice {
            family: self.address_type,
            endpoints: endpoints.collect(),
            ports: self.ports.into_iter().map(Port::from).collect(),
        }
    }
}

impl Endpoints {
    pub(super) fn keep(self) -> Vec<Slice> {
        let mut slices = Vec::new();
        for subset in self.subsets {
            let ports: Vec<Port> = subset.ports.into_iter().map(Port::from).collect();
            let backends = subset.addresses.into_iter().map(SubsetAddress::keep);
            // A subset does not say of which family it is, and one that was made by hand may have both.
            let (v6, v4): (Vec<_>, Vec<_>) = backends.partition(|backend| backend.host.contains(':'));
            for (family, endpoints) in [(AddressType::IPv4, v4), (AddressType::IPv6, v6)] {
                if !endpoints.is_empty() {
                    slices.push(Slice { family, endpoints, ports: ports.clone() });
                }
            }
        }
        slices
    }
}

impl SubsetAddress {
    fn keep(self) -> Backend {
        Backend {
            host: self.ip,
            target: self.target_ref.and_then(|target| target.name),
            readiness: Readiness::Ready,
            details: Arc::new(Details {
                machine: self.node_name,
                meta: self.hostname.into_iter().map(|name| ("hostname".into(), name)).collect(),
                ..Details::default()
            }),
        }
    }
}

impl Service {
    pub(super) fn keep(self) -> Known {
        let external = self.spec.kind.as_deref() == Some("ExternalName");
        Known {
            ports: self.spec.ports.into_iter().map(|port| (port.port, port.name)).collect(),
            external: self.spec.external_name.filter(|name| external && !name.is_empty()),
            family: self.spec.ip_families.first().copied(),
            traffic_distribution: self.spec.traffic_distribution,
        }
    }
}
