//! Smooth weighted round robin, exact over all workers.
//!
//! The order is computed once: within a cycle each endpoint appears as often as its weight says, evenly spread.
//! A pick takes the next place of the cycle from one shared counter, so 3:1 gives 75/25 in every window of 4
//! however many threads pick.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::endpoint::EndpointState;
use super::picker::{Peer, Tried};

/// Longest cycle. Weights that need a longer one are scaled down, none of them to nothing.
const MAX_CYCLE: u64 = 1 << 14;

/// The position in the cycle. It outlives the balancer, so that a rebuild does not start over at the first
/// endpoint every time.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Cursor(AtomicUsize);

/// Where a cluster keeps its cursor, made when there is something to take turns between: most small upstreams have one
/// node and need none.
#[derive(Debug, Default)]
pub struct CursorCell(OnceLock<Arc<Cursor>>);

impl CursorCell {
    fn cursor(&self) -> Arc<Cursor> {
        Arc::clone(self.0.get_or_init(Arc::default))
    }
}

#[derive(Debug)]
pub(crate) struct RoundRobin {
    peers: Box<[Peer]>,
    cycle: Box<[u32]>,
    cursor: Arc<Cursor>,
}

impl RoundRobin {
    pub(crate) fn new(peers: Vec<Peer>, cursor: &CursorCell) -> Self {
        let cycle = cycle(&whole_weights(&peers));
        Self { peers: peers.into(), cycle, cursor: cursor.cursor() }
    }

    pub(crate) fn pick(&self, tried: &Tried) -> Option<&Arc<EndpointState>> {
        let length = self.cycle.len();
        let start = self.cursor.0.fetch_add(1, Ordering::Relaxed).checked_rem(length)?;
        // The first place is free unless this is a retry.
        (start..length).chain(0..start).find_map(|place| {
            let peer = self.peers.get(usize::try_from(*self.cycle.get(place)?).ok()?)?;
            (!tried.contains(&peer.state)).then_some(&peer.state)
        })
    }
}

/// Whole numbers in the proportion of the peers' shares, as small as they can be.
fn whole_weights(peers: &[Peer]) -> Vec<u64> {
    // A common multiple of the sibling counts makes every share whole; past the bound it is only close.
    let multiple = peers.iter().fold(1, |multiple: u64, peer| {
        let siblings = u64::from(peer.siblings.max(1));
        let next = multiple / gcd(multiple, siblings) * siblings;
        if next > MAX_CYCLE { multiple } else { next }
    });
    let cold = peers.iter().any(|peer| peer.warmth < 100);
    let mut weights: Vec<u64> = peers
        .iter()
        .map(|peer| {
            let whole = u64::from(peer.weight) * multiple / u64::from(peer.siblings.max(1));
            if cold { (whole * u64::from(peer.warmth)).max(1) } else { whole.max(1) }
        })
        .collect();
    let divisor = weights.iter().fold(0, |divisor, weight| gcd(divisor, *weight)).max(1);
    weights.iter_mut().for_each(|weight| *weight /= divisor);
    let total: u64 = weights.iter().sum();
    if total > MAX_CYCLE {
        weights.iter_mut().for_each(|weight| *weight = (*weight * MAX_CYCLE / total).max(1));
    }
    weights
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The order of one cycle: the k-th of w turns falls due at (k + offset) / w of the cycle, where endpoints of
/// the same weight are offset against each other instead of falling due together.
fn cycle(weights: &[u64]) -> Box<[u32]> {
    let mut order: Vec<(usize, u64)> = weights.iter().copied().enumerate().collect();
    order.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
    let mut turns: Vec<(f64, u32)> = Vec::new();
    for group in order.chunk_by(|a, b| a.1 == b.1) {
        for (place, (index, weight)) in group.iter().enumerate() {
            let offset = (place as f64 + 0.5) / group.len() as f64;
            let index = u32::try_from(*index).unwrap_or(u32::MAX);
            turns.extend((0..*weight).map(|turn| ((turn as f64 + offset) / *weight as f64, index)));
        }
    }
    // Stable: turns that fall due together stay in order of weight.
    turns.sort_by(|a, b| a.0.total_cmp(&b.0));
    turns.into_iter().map(|(_, index)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::super::picker::tests::peers;
    use super::*;

    #[test]
    fn turns_are_spread_evenly() {
        let cases: [(&[u64], &str); 7] = [
            (&[1], "a"),
            (&[1, 1, 1], "abc"),
            (&[3, 1], "aaba"),
            (&[1, 3], "bbab"),
            (&[2, 2], "abab"),
            (&[5, 1, 1], "abaaaca"),
            (&[4, 2, 2], "abacabac"),
        ];
        for (weights, wanted) in cases {
            let letter = |n: &u32| char::from(b'a' + u8::try_from(*n).unwrap_or(25));
            let order: String = cycle(weights).iter().map(letter).collect();
            assert_eq!(order, wanted, "{weights:?}");
        }
    }

    #[test]
    fn weights_become_the_smallest_whole_numbers_and_stay_bounded() {
        // Weight and siblings of each address, and what becomes of them.
        type Case<'a> = (&'a [(u32, u32)], &'a [u64]);
        let cases: [Case<'_>; 5] = [
            (&[(100, 1), (50, 1)], &[2, 1]),
            (&[(1, 2), (1, 2), (1, 1)], &[1, 1, 2]),
            (&[(1, 3), (1, 3), (1, 3), (1, 1)], &[1, 1, 1, 3]),
            (&[(2, 2), (2, 2), (3, 1)], &[1, 1, 3]),
            (&[(1_000_000, 1), (1, 1)], &[16383, 1]),
        ];
        for (nodes, wanted) in cases {
            let mut list = peers(&nodes.iter().map(|node| node.0).collect::<Vec<_>>());
            list.iter_mut().zip(nodes).for_each(|(peer, node)| peer.siblings = node.1);
            assert_eq!(whole_weights(&list), wanted, "{nodes:?}");
        }
    }

    #[test]
    fn threads_share_one_cycle() {
        let list = peers(&[3, 1]);
        let balancer = RoundRobin::new(list.clone(), &CursorCell::default());
        let heavy = list.first().map_or(0, |peer| peer.state.id());
        let picks = |_| {
            (0..1000)
                .filter(|_| balancer.pick(&Tried::default()).is_some_and(|picked| picked.id() == heavy))
                .count()
        };
        let picks = &picks;
        let total: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || picks(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
        });
        assert_eq!(total, 3000, "4,000 picks at 3:1 over four threads");
    }
}
