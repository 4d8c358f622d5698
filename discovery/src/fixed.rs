//! Nodes that are addresses already: one list, published once.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;

use crate::source::Health;
use crate::{Endpoint, Endpoints, Node, Watch, literal};

/// The endpoint of a node whose host is an address.
pub(crate) fn endpoint(node: &Node) -> Option<Endpoint> {
    let addr = SocketAddr::new(literal(&node.host)?, node.port);
    Some(Endpoint {
        addr,
        host: Arc::clone(&node.host),
        weight: node.weight,
        siblings: 1,
        priority: node.priority,
        health: Health::Healthy,
        details: None,
    })
}

/// The endpoints of `nodes` where all of them are addresses; none where one is a name and must be watched.
pub fn endpoints(nodes: &[Node]) -> Option<Endpoints> {
    let list = nodes.iter().map(endpoint).collect::<Option<_>>()?;
    Some(Endpoints { list, ..Endpoints::default() })
}

/// A receiver that already holds all there will ever be; its `changed()` reports a closed channel.
pub(crate) fn watch(endpoints: Endpoints) -> Watch {
    watch::channel(Arc::new(endpoints)).1
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn node(host: &str, weight: u32) -> Node {
        Node { host: host.into(), port: 80, weight, priority: 0 }
    }

    #[test]
    fn addresses_are_published_at_once_in_order() {
        let endpoints = endpoints(&[node("10.0.0.1", 3), node("[::1]", 1), node("fe80::1", 0)]).unwrap();
        let addrs: Vec<_> = endpoints.list.iter().map(|e| (e.addr.to_string(), e.weight)).collect();
        assert_eq!(addrs, [("10.0.0.1:80".into(), 3), ("[::1]:80".into(), 1), ("[fe80::1]:80".into(), 0)]);
        assert!(endpoints.settled());
    }

    #[test]
    fn a_name_among_them_must_be_watched() {
        assert_eq!(endpoints(&[node("10.0.0.1", 1), node("a.test", 1)]), None);
    }
}
