//! Weighted random choice, without memory and without a shared counter. An extension; APISIX has no such type.

use std::sync::Arc;

use super::endpoint::EndpointState;
use super::picker::{Peer, Tried};

#[derive(Debug)]
pub(crate) struct Random {
    peers: Box<[Peer]>,
    /// Sum of the shares up to and including each peer.
    sums: Box<[f64]>,
    total: f64,
}

impl Random {
    pub(crate) fn new(peers: Vec<Peer>) -> Self {
        let mut total = 0.0;
        let sums = peers
            .iter()
            .map(|peer| {
                total += peer.share();
                total
            })
            .collect();
        Self { peers: peers.into(), sums, total }
    }

    pub(crate) fn pick(&self, tried: &Tried) -> Option<&Arc<EndpointState>> {
        let point = fastrand::f64() * self.total;
        let start = self.sums.partition_point(|sum| *sum <= point).min(self.peers.len().saturating_sub(1));
        // A retry goes on from the drawn place to the next one that was not tried.
        let (before, after) = self.peers.split_at_checked(start)?;
        after.iter().chain(before).find(|peer| !tried.contains(&peer.state)).map(|peer| &peer.state)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::super::picker::tests::peers;
    use super::*;

    #[test]
    fn draws_follow_the_weights() {
        let list = peers(&[3, 1]);
        let balancer = Random::new(list.clone());
        let heavy = (0..4000)
            .filter(|_| balancer.pick(&Tried::default()).unwrap().id() == list[0].state.id())
            .count();
        assert!((2800..3200).contains(&heavy), "{heavy} of 4,000");
    }
}
