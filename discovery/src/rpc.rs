//! The discovery service: registries are watched once, for thousands of clients.
//!
//! A [`server`] follows services with the sources that it has, and streams their states to its clients: the whole state
//! first, changes afterwards, each answered by the client when it uses it. A [`client`] is a source like any other, so that
//! what lies above does not know whether a registry or a server was asked.

pub mod client;
mod drains;
pub mod server;
mod topic;

/// The messages, made from the proto file.
#[allow(
    missing_docs,
    rust_2018_idioms,
    clippy::pedantic,
    clippy::nursery,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::large_enum_variant,
    reason = "made by tonic"
)]
pub mod proto {
    tonic::include_proto!("postern.discovery.v1");
}

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::Node;
use crate::source::{Details, Health, Instance, Query};

/// What tells an instance from the others of its service in a state.
fn key(registry: &str, instance: &Instance) -> Arc<str> {
    let Node { host, port, .. } = &instance.node;
    format!("{registry}\n{}\n{host}\n{port}", instance.id).into()
}

impl proto::Service {
    fn new(kind: &str, query: &Query) -> Self {
        let args = query.args.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Self { kind: kind.to_owned(), service: query.service.to_string(), args }
    }

    fn query(&self) -> Query {
        let args =
            self.args.iter().map(|(name, value)| (name.as_str().into(), value.as_str().into())).collect();
        Query { service: self.service.as_str().into(), args }
    }
}

impl proto::Instance {
    fn new(key: &str, instance: &Instance) -> Self {
        let Instance { id, node, health, details } = instance;
        Self {
            key: key.to_owned(),
            id: id.to_string(),
            host: node.host.to_string(),
            port: node.port.into(),
            weight: node.weight,
            priority: node.priority,
            health: proto::Health::from(*health).into(),
            details: details.as_deref().map(proto::Details::from),
        }
    }

    /// The instance, if it is one.
    fn read(self) -> Option<Instance> {
        let health = self.health().into();
        Some(Instance {
            id: self.id.into(),
            node: Node {
                port: u16::try_from(self.port).ok()?,
                host: self.host.into(),
                weight: self.weight,
                priority: self.priority,
            },
            health,
            details: self.details.map(|details| Arc::new(Details::from(details))),
        })
    }
}

impl From<Health> for proto::Health {
    fn from(health: Health) -> Self {
        match health {
            Health::Healthy => Self::Healthy,
            Health::Warning => Self::Warning,
            Health::Draining => Self::Draining,
            Health::Unhealthy => Self::Unhealthy,
        }
    }
}

impl From<proto::Health> for Health {
    fn from(health: proto::Health) -> Self {
        match health {
            proto::Health::Healthy => Self::Healthy,
            proto::Health::Warning => Self::Warning,
            proto::Health::Draining => Self::Draining,
            proto::Health::Unhealthy => Self::Unhealthy,
        }
    }
}

impl From<&Details> for proto::Details {
    fn from(details: &Details) -> Self {
        let text = |text: &Option<Arc<str>>| text.as_deref().unwrap_or_default().to_owned();
        Self {
            region: text(&details.region),
            zone: text(&details.zone),
            machine: text(&details.machine),
            for_zones: details.for_zones.iter().map(ToString::to_string).collect(),
            identity: text(&details.identity),
            meta: details.meta.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        }
    }
}

impl From<proto::Details> for Details {
    fn from(details: proto::Details) -> Self {
        let text = |text: String| (!text.is_empty()).then(|| text.into());
        Self {
            region: text(details.region),
            zone: text(details.zone),
            machine: text(details.machine),
            for_zones: details.for_zones.into_iter().map(Into::into).collect(),
            identity: text(details.identity),
            meta: details
                .meta
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect::<BTreeMap<_, _>>(),
        }
    }
}
