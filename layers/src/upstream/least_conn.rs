//! Least connections: the endpoint with the fewest requests under way for its weight, ties at random.
//!
//! The score is `(active + 1) / weight`. Active requests are counted over all workers. Above a bound a random
//! sample is compared instead of everything, so that a pick costs the same for ten endpoints and ten thousand.

use std::sync::Arc;

use super::endpoint::EndpointState;
use super::picker::{Peer, Tried};

/// Up to so many endpoints are all compared.
const COMPARE_ALL: usize = 64;
/// Endpoints compared where there are more.
const SAMPLE: usize = 8;

#[derive(Debug)]
pub(crate) struct LeastConn {
    peers: Box<[Peer]>,
}

impl LeastConn {
    pub(crate) fn new(peers: Vec<Peer>) -> Self {
        Self { peers: peers.into() }
    }

    pub(crate) fn pick(&self, tried: &Tried) -> Option<&Arc<EndpointState>> {
        let count = self.peers.len();
        if count > COMPARE_ALL {
            let sample = std::iter::repeat_with(|| fastrand::usize(..count)).take(SAMPLE);
            let found = least(sample.filter_map(|index| self.peers.get(index)), tried);
            if found.is_some() {
                return found;
            }
        }
        least(self.peers.iter(), tried)
    }
}

fn least<'a>(peers: impl Iterator<Item = &'a Peer>, tried: &Tried) -> Option<&'a Arc<EndpointState>> {
    let mut best: Option<(f64, &Arc<EndpointState>)> = None;
    let mut ties = 0;
    for peer in peers.filter(|peer| !tried.contains(&peer.state)) {
        let score = (f64::from(peer.state.active()) + 1.0) / peer.share();
        match best {
            Some((least, _)) if score > least => {}
            Some((least, _)) if score == least => {
                // Each of n equals wins with probability 1/n.
                ties += 1;
                if fastrand::u32(..ties) == 0 {
                    best = Some((score, &peer.state));
                }
            }
            _ => {
                best = Some((score, &peer.state));
                ties = 1;
            }
        }
    }
    best.map(|(_, endpoint)| endpoint)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::super::endpoint::Picked;
    use super::super::picker::tests::peers;
    use super::*;

    #[test]
    fn held_requests_are_spread_by_weight() {
        let list = peers(&[2, 1]);
        let balancer = LeastConn::new(list.clone());
        let held: Vec<Picked> =
            (0..30).map(|_| Picked::new(Arc::clone(balancer.pick(&Tried::default()).unwrap()))).collect();
        assert_eq!([list[0].state.active(), list[1].state.active()], [20, 10]);
        drop(held);
        assert_eq!(list[0].state.active(), 0);
    }

    #[test]
    fn a_slow_endpoint_receives_fewer() {
        let list = peers(&[1, 1]);
        let balancer = LeastConn::new(list.clone());
        let stuck: Vec<Picked> = (0..5).map(|_| Picked::new(Arc::clone(&list[0].state))).collect();
        for _ in 0..50 {
            assert_eq!(balancer.pick(&Tried::default()).unwrap().id(), list[1].state.id());
        }
        drop(stuck);
    }

    #[test]
    fn ties_are_broken_at_random() {
        let list = peers(&[1, 1, 1]);
        let balancer = LeastConn::new(list.clone());
        let first = (0..3000)
            .filter(|_| balancer.pick(&Tried::default()).unwrap().id() == list[0].state.id())
            .count();
        assert!((800..1200).contains(&first), "{first} of 3,000");
    }

    #[test]
    fn a_large_upstream_is_sampled_and_idle_endpoints_win() {
        let list = peers(&[1; 200]);
        let busy: Vec<Picked> =
            list.iter().take(100).map(|peer| Picked::new(Arc::clone(&peer.state))).collect();
        let balancer = LeastConn::new(list.clone());
        let idle = (0..1000).filter(|_| balancer.pick(&Tried::default()).unwrap().active() == 0).count();
        assert!(idle > 950, "{idle} of 1,000");
        drop(busy);
    }
}
