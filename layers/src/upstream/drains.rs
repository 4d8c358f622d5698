//! Nodes that take no new request because an operator is about to stop them.
//!
//! A mark names a service and a node as operators do. Clusters ask whenever they publish their endpoints; an endpoint
//! that is marked is treated as one that its registry calls draining: it is chosen no more, and what is under way on it
//! ends in peace. Nothing on a worker looks at marks.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use discovery::Endpoint;

/// The marks of one process; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Drains(Arc<ArcSwap<Vec<Mark>>>);

/// One service, or one node of it, that takes no new request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Which drain this belongs to.
    pub id: Arc<str>,
    /// The name of a service in a registry, the id of an upstream (`7`), an object with an upstream of its own
    /// (`routes/7`), or `*`: whatever has the node.
    pub service: Arc<str>,
    /// All nodes of the service if there is none.
    pub node: Option<NodeName>,
}

/// A node as an operator names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeName {
    /// `10.0.0.3:8080`, `[fd00::3]:8080`
    Address(SocketAddr),
    /// `10.0.0.3`: every port.
    Ip(IpAddr),
    /// `orders-3.example.com:8080`, or without the port: the name that a node was configured or registered with.
    Host { name: Arc<str>, port: Option<u16> },
}

impl Drains {
    /// Replaces all marks.
    pub fn set(&self, marks: Vec<Mark>) {
        self.0.store(Arc::new(marks));
    }

    /// The marks of the object at `key` (`upstreams/7`), whose nodes come from `services` of registries.
    pub(crate) fn of<'a>(&self, key: &str, services: impl Iterator<Item = &'a str> + Clone) -> Vec<Mark> {
        let marks = self.0.load();
        marks.iter().filter(|mark| mark.is_for(key, services.clone())).cloned().collect()
    }
}

impl Mark {
    /// Whether the object at `key`, with nodes from these services, is meant.
    pub fn is_for<'a>(&self, key: &str, mut services: impl Iterator<Item = &'a str>) -> bool {
        let id = key.strip_prefix("upstreams/");
        *self.service == *"*"
            || *self.service == *key
            || id == Some(&*self.service)
            || services.any(|name| *self.service == *name)
    }

    /// Whether `endpoint` of that object is meant.
    pub fn covers(&self, endpoint: &Endpoint) -> bool {
        self.names(endpoint.addr, &endpoint.host)
    }

    /// Whether the endpoint of that object at `addr`, known as `host`, is meant.
    pub(crate) fn names(&self, addr: SocketAddr, host: &str) -> bool {
        self.node.as_ref().is_none_or(|node| node.is(addr, host))
    }
}

impl NodeName {
    /// Whether it is the node at `addr`, known as `host`.
    pub fn is(&self, addr: SocketAddr, host: &str) -> bool {
        match self {
            Self::Address(own) => *own == addr,
            Self::Ip(own) => *own == addr.ip(),
            Self::Host { name, port } => {
                name.eq_ignore_ascii_case(host) && port.is_none_or(|port| port == addr.port())
            }
        }
    }
}

/// The name of a node cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` names no node: write its address (10.0.0.3:8080, [fd00::3]:8080), or its host with or without a port"
)]
pub struct BadNodeName(String);

impl FromStr for NodeName {
    type Err = BadNodeName;

    fn from_str(text: &str) -> Result<Self, BadNodeName> {
        if let Ok(addr) = text.parse() {
            return Ok(Self::Address(addr));
        }
        if let Some(ip) = discovery::literal(text) {
            return Ok(Self::Ip(ip));
        }
        let bad = || BadNodeName(text.to_owned());
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port.parse().map_err(|_| bad())?)),
            None => (text, None),
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(bad());
        }
        Ok(Self::Host { name: name.into(), port })
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(f),
            Self::Ip(ip) => ip.fmt(f),
            Self::Host { name, port: Some(port) } => write!(f, "{name}:{port}"),
            Self::Host { name, port: None } => name.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use discovery::Node;

    use super::*;

    fn mark(service: &str, node: Option<&str>) -> Mark {
        let node = node.map(|node| node.parse().unwrap());
        Mark { id: "1".into(), service: service.into(), node }
    }

    #[test]
    fn a_service_is_named_as_its_registry_its_upstream_or_its_object_names_it() {
        let cases = [
            ("upstreams/orders", true),
            ("orders", true),
            ("shop-orders", true),
            ("prod/orders:http", true),
            ("*", true),
            ("order", false),
            ("upstreams/shop-orders", false),
            ("routes/orders", false),
        ];
        let services = ["shop-orders", "prod/orders:http"];
        for (named, meant) in cases {
            assert_eq!(mark(named, None).is_for("upstreams/orders", services.into_iter()), meant, "{named}");
        }
        assert!(mark("routes/7", None).is_for("routes/7", [].into_iter()));
        assert!(!mark("7", None).is_for("routes/7", [].into_iter()), "a bare id is that of an upstream");
    }

    #[test]
    fn a_node_is_named_by_its_address_or_its_host() {
        let nodes = [
            Node { host: "10.0.0.3".into(), port: 8080, weight: 1, priority: 0 },
            Node { host: "::3".into(), port: 80, weight: 1, priority: 0 },
        ];
        let mut list = discovery::fixed::endpoints(&nodes).unwrap().list;
        let mut named = list[0].clone();
        named.host = "Orders-3.example.com".into();
        list.push(named);
        let cases = [
            (None, [true, true, true]),
            (Some("10.0.0.3:8080"), [true, false, true]),
            (Some("10.0.0.3:8081"), [false, false, false]),
            (Some("10.0.0.3"), [true, false, true]),
            (Some("[::3]:80"), [false, true, false]),
            (Some("[::3]"), [false, true, false]),
            (Some("::3"), [false, true, false]),
            (Some("orders-3.example.com"), [false, false, true]),
            (Some("orders-3.example.com:8080"), [false, false, true]),
            (Some("orders-3.example.com:80"), [false, false, false]),
        ];
        for (name, meant) in cases {
            let mark = mark("a", name);
            let covered: Vec<_> = list.iter().map(|endpoint| mark.covers(endpoint)).collect();
            assert_eq!(covered, meant, "{name:?}");
        }
    }

    #[test]
    fn what_names_no_node_is_refused_with_what_to_write() {
        for bad in ["", ":80", "a:b", "a:70000", "a b", "a/b", "[::1"] {
            let error = bad.parse::<NodeName>().unwrap_err().to_string();
            assert!(error.contains("10.0.0.3:8080"), "{bad}: {error}");
        }
    }
}
