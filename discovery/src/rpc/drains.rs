//! Nodes that a server offers as draining, because somebody says so again and again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::proto;
use crate::Health;

/// How long a drain is in force after it was said last.
const LEASE: Duration = Duration::from_secs(60);
/// Drains at once.
const MOST: usize = 1024;

/// The drains of a server.
#[derive(Debug)]
pub(super) struct Drains(watch::Sender<Arc<Orders>>);

/// What is drained, by the ids of drains.
pub(super) type Orders = BTreeMap<String, Order>;

/// One drain.
#[derive(Clone, Debug)]
pub(super) struct Order {
    services: Vec<proto::Service>,
    nodes: Vec<proto::Node>,
    until: Instant,
    /// It has ended, and what was said before may still come.
    over: bool,
}

impl Default for Drains {
    fn default() -> Self {
        Self(watch::channel(Arc::default()).0)
    }
}

impl Drains {
    pub(super) fn watch(&self) -> watch::Receiver<Arc<Orders>> {
        self.0.subscribe()
    }

    /// Begins, goes on with or ends a drain. False if there are too many.
    pub(super) fn set(&self, id: String, what: Option<(Vec<proto::Service>, Vec<proto::Node>)>) -> bool {
        let mut fits = true;
        self.0.send_if_modified(|orders| {
            let known = orders.get(&id);
            if known.is_some_and(|order| order.over) {
                return false;
            }
            fits = known.is_some() || orders.len() < MOST;
            if !fits {
                return false;
            }
            let over = what.is_none();
            let (services, nodes) = what.unwrap_or_default();
            let same = known.is_some_and(|order| order.services == services && order.nodes == nodes);
            let until = Instant::now() + LEASE;
            Arc::make_mut(orders).insert(id, Order { services, nodes, until, over });
            !same
        });
        fits
    }

    /// Ends what has not been said for too long.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        self.0.send_if_modified(|orders| {
            let is_over = orders.values().any(|order| order.until <= now);
            if is_over {
                Arc::make_mut(orders).retain(|_, order| order.until > now);
            }
            is_over
        });
    }
}

/// The nodes of a service that are drained.
pub(super) fn drained<'a>(orders: &'a Orders, service: &proto::Service) -> Vec<&'a [proto::Node]> {
    let is_meant = |order: &&Order| order.services.contains(service);
    orders.values().filter(is_meant).map(|order| &*order.nodes).collect()
}

/// Whether these nodes are all, or this one is among them.
pub(super) fn covers(nodes: &[proto::Node], host: &str, port: u32) -> bool {
    let bare = |host: &str| host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    let is_it = |node: &proto::Node| {
        (node.port == 0 || node.port == port) && (node.host.is_empty() || bare(&node.host) == bare(host))
    };
    nodes.is_empty() || nodes.iter().any(is_it)
}

/// Whether requests may be sent to it.
pub(super) fn is_used(instance: &proto::Instance) -> bool {
    instance.health() != proto::Health::from(Health::Draining)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn node(host: &str, port: u32) -> proto::Node {
        proto::Node { host: host.to_owned(), port }
    }

    fn service(name: &str) -> proto::Service {
        proto::Service { kind: "file".to_owned(), service: name.to_owned(), ..proto::Service::default() }
    }

    #[test]
    fn a_node_is_meant_by_what_is_said_of_it() {
        let cases = [
            (vec![], true),
            (vec![node("10.0.0.1", 80)], true),
            (vec![node("10.0.0.1", 0)], true),
            (vec![node("", 80)], true),
            (vec![node("10.0.0.1", 81)], false),
            (vec![node("10.0.0.2", 80)], false),
            (vec![node("10.0.0.2", 80), node("10.0.0.1", 80)], true),
        ];
        for (nodes, meant) in cases {
            assert_eq!(covers(&nodes, "10.0.0.1", 80), meant, "{nodes:?}");
        }
        assert!(covers(&[node("[FD00::1]", 80)], "fd00::1", 80), "however it is written");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_lasts_until_it_is_over_or_not_said_any_more() {
        let drains = Drains::default();
        let mut watch = drains.watch();
        let order = || Some((vec![service("shop")], vec![node("10.0.0.1", 80)]));
        let count = |watch: &watch::Receiver<Arc<Orders>>| drained(&watch.borrow(), &service("shop")).len();
        assert!(drains.set("a".to_owned(), order()));
        assert!(watch.has_changed().unwrap());
        watch.mark_unchanged();
        assert_eq!((count(&watch), drained(&watch.borrow(), &service("other")).len()), (1, 0));
        tokio::time::advance(LEASE / 2).await;
        assert!(drains.set("a".to_owned(), order()));
        tokio::time::advance(LEASE / 2).await;
        drains.sweep();
        assert!(!watch.has_changed().unwrap(), "said again, it is the same");
        tokio::time::advance(LEASE).await;
        drains.sweep();
        assert_eq!(count(&watch), 0);

        assert!(drains.set("b".to_owned(), order()));
        assert!(drains.set("b".to_owned(), None));
        assert_eq!(count(&watch), 0);
        assert!(drains.set("b".to_owned(), order()), "what was said before comes late");
        assert_eq!(count(&watch), 0);
    }
}
