//! Consistent hashing: a ring of points, about 160 per unit of weight, and the first one at or after the key.
//!
//! An endpoint's points depend on nothing but its address and host, so adding or removing one moves only the
//! keys that belong to it, and every gateway with the same configuration sends a key to the same place. A
//! retry goes on around the ring to the next endpoint that was not tried.

use std::sync::Arc;

use hashbrown::HashMap;

use super::endpoint::EndpointState;
use super::picker::{Peer, Tried};

/// Points per unit of weight.
const POINTS: f64 = 160.0;
/// Points of a whole ring. Beyond it every endpoint has fewer, halved until they fit.
const MAX_POINTS: f64 = 131_072.0;
/// Spreads consecutive point numbers over the whole range before they are mixed.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

#[derive(Debug, Default)]
pub(crate) struct Ring {
    peers: Box<[Peer]>,
    /// By how much every endpoint's points were thinned out.
    thin: f64,
    /// Sorted; `owners` tells whose point is at the same index.
    points: Box<[u64]>,
    owners: Box<[u32]>,
}

impl Ring {
    /// The ring of these peers. Points that the `former` ring had are taken from it in their order, because sorting is
    /// what a ring costs; whatever it was, the outcome is the same.
    pub(crate) fn new(peers: Vec<Peer>, former: Option<&Self>) -> Self {
        let nothing = Self::default();
        let former = former.unwrap_or(&nothing);
        let thin = thin(&peers);
        // Whose its points are now, by the place of a peer in the former ring. These ascend, so that what is kept stays
        // sorted.
        let mut kept: Vec<Option<u32>> = vec![None; former.peers.len()];
        let mut fresh: Vec<(u64, u32)> = Vec::new();
        let mut places = Places::new(&former.peers);
        for (index, peer) in peers.iter().enumerate() {
            let Ok(index) = u32::try_from(index) else { break };
            let count = count(peer, thin);
            let before = places.find(peer);
            match before.filter(|(_, before)| self::count(before, former.thin) == count) {
                Some((place, _)) => kept.iter_mut().skip(place).take(1).for_each(|kept| *kept = Some(index)),
                None => fresh.extend(points(peer, count).map(|point| (point, index))),
            }
        }
        fresh.sort_unstable();
        let most = former.points.len() + fresh.len();
        let (mut points, mut owners) = (Vec::with_capacity(most), Vec::with_capacity(most));
        let mut add = |(point, owner)| {
            points.push(point);
            owners.push(owner);
        };
        let mut fresh = fresh.into_iter().peekable();
        for (point, owner) in former.points.iter().zip(&former.owners) {
            let owner = usize::try_from(*owner).ok().and_then(|place| kept.get(place).copied().flatten());
            let Some(owner) = owner else { continue };
            while let Some(before) = fresh.next_if(|fresh| *fresh < (*point, owner)) {
                add(before);
            }
            add((*point, owner));
        }
        fresh.for_each(add);
        Self { peers: peers.into(), thin, points: points.into(), owners: owners.into() }
    }

    pub(crate) fn pick(&self, hash: u64, tried: &Tried) -> Option<&Arc<EndpointState>> {
        let start = self.points.partition_point(|point| *point < hash);
        let (before, after) = self.owners.split_at_checked(start)?;
        after.iter().chain(before).find_map(|owner| {
            let peer = self.peers.get(usize::try_from(*owner).ok()?)?;
            (!tried.contains(&peer.state)).then_some(&peer.state)
        })
    }
}

/// By how much the points of these peers have to be thinned out to fit. Halving rather than scaling to fit: a small change
/// of the total leaves the other points alone.
fn thin(peers: &[Peer]) -> f64 {
    let total: f64 = peers.iter().map(|peer| peer.share() * POINTS).sum();
    let mut thin = 1.0;
    while total / thin > MAX_POINTS {
        thin *= 2.0;
    }
    thin
}

/// How many points a peer has.
fn count(peer: &Peer, thin: f64) -> u64 {
    (peer.share() * POINTS / thin).ceil().max(1.0) as u64
}

/// They depend on nothing but the endpoint and how many there are.
fn points(peer: &Peer, count: u64) -> impl Iterator<Item = u64> {
    let seed = identity(&peer.state);
    (0..count).map(move |n| mix(seed.wrapping_add(n.wrapping_mul(STEP))))
}

/// The peers of a former ring, to be found again in their order.
struct Places<'a> {
    peers: &'a [Peer],
    next: usize,
    /// Made when one is not where it is expected.
    by_id: Option<HashMap<u64, usize>>,
}

impl<'a> Places<'a> {
    fn new(peers: &'a [Peer]) -> Self {
        Self { peers, next: 0, by_id: None }
    }

    /// The same endpoint, if it comes after those that were found.
    fn find(&mut self, peer: &Peer) -> Option<(usize, &'a Peer)> {
        let id = peer.state.id();
        // The next one; or the one after it, where one was taken out.
        let mut near = self.peers.iter().enumerate().skip(self.next).take(2);
        let found = near.find(|(_, before)| before.state.id() == id).map(|(place, _)| place);
        let peers = self.peers;
        let place = found.or_else(|| {
            let by_id = self.by_id.get_or_insert_with(|| {
                peers.iter().enumerate().map(|(place, peer)| (peer.state.id(), place)).collect()
            });
            by_id.get(&id).copied().filter(|place| *place >= self.next)
        })?;
        self.next = place + 1;
        self.peers.get(place).map(|before| (place, before))
    }
}

fn identity(endpoint: &EndpointState) -> u64 {
    let port = endpoint.addr().port().to_be_bytes();
    let host = hash(endpoint.host().as_bytes());
    match endpoint.addr().ip() {
        std::net::IpAddr::V4(ip) => hash(&[&ip.octets()[..], &port].concat()) ^ host,
        std::net::IpAddr::V6(ip) => hash(&[&ip.octets()[..], &port].concat()) ^ host,
    }
}

/// The hash of a key. Fixed for ever: gateways of different versions must agree on where a key belongs.
pub fn hash(key: &[u8]) -> u64 {
    let mut state = 0x2545_f491_4f6c_dd1d ^ key.len() as u64;
    let mut chunks = key.chunks_exact(8);
    for chunk in &mut chunks {
        let word = chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        state = mix(state ^ word);
    }
    let rest = chunks.remainder().iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    mix(state ^ rest)
}

/// The finaliser of MurmurHash3: every input bit reaches every output bit.
fn mix(mut word: u64) -> u64 {
    word ^= word >> 33;
    word = word.wrapping_mul(0xff51_afd7_ed55_8ccd);
    word ^= word >> 33;
    word = word.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    word ^ word >> 33
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::picker::tests::peers;
    use super::*;

    const KEYS: u64 = 20_000;

    fn owners(peers: Vec<Peer>) -> Vec<u64> {
        let ring = Ring::new(peers, None);
        (0..KEYS)
            .map(|n| ring.pick(hash(format!("user-{n}").as_bytes()), &Tried::default()).unwrap().id())
            .collect()
    }

    #[test]
    fn removing_one_of_ten_moves_only_its_own_tenth() {
        let list = peers(&[1; 10]);
        let before = owners(list.clone());
        for gone in 0..list.len() {
            let mut rest = list.clone();
            let gone = rest.remove(gone).state.id();
            let after = owners(rest);
            let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
            let own = before.iter().filter(|id| **id == gone).count();
            assert_eq!(moved, own, "keys of other endpoints stay");
            let share = moved as f64 / KEYS as f64;
            assert!((0.07..0.13).contains(&share), "{share} of the keys moved");
        }
    }

    #[test]
    fn keys_follow_the_weights() {
        let mut list = peers(&[1, 2, 4, 3]);
        list[3].siblings = 3;
        let mut counts: HashMap<u64, f64> = HashMap::new();
        owners(list.clone()).iter().for_each(|id| *counts.entry(*id).or_default() += 1.0 / KEYS as f64);
        for (peer, share) in list.iter().zip([1.0, 2.0, 4.0, 1.0]) {
            let got = counts[&peer.state.id()] * 8.0;
            assert!((got / share - 1.0).abs() < 0.25, "weight {share} got {got}");
        }
    }

    #[test]
    fn the_order_of_nodes_means_nothing() {
        let list = peers(&[1, 2, 3]);
        let mut reversed = list.clone();
        reversed.reverse();
        assert_eq!(owners(list), owners(reversed));
    }

    #[test]
    fn huge_weights_make_a_bounded_ring() {
        let ring = Ring::new(peers(&[1_000_000; 20]), None);
        assert!(ring.points.len() <= MAX_POINTS as usize + 20);
        let lopsided = peers(&[1_000_000, 1]);
        assert!(Ring::new(lopsided, None).owners.contains(&1), "no weight is scaled to nothing");
    }

    /// One step of an upstream's life.
    #[derive(Clone, Debug)]
    enum Step {
        /// One that was never there, at this place.
        Add(usize, u32),
        Remove(usize),
        Reweigh(usize, u32),
        Warm(usize, u8),
        /// To another place.
        Move(usize, usize),
        /// A second node of the same key.
        Repeat(usize),
        /// Many at once leave.
        Keep(usize),
        /// Everybody gets this weight: the points of all are thinned out, or not any more.
        All(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        let at = || any::<prop::sample::Index>().prop_map(|index| index.index(1000));
        prop_oneof![
            3 => (at(), 1u32..4).prop_map(|(at, weight)| Step::Add(at, weight)),
            3 => at().prop_map(Step::Remove),
            2 => (at(), 1u32..300).prop_map(|(at, weight)| Step::Reweigh(at, weight)),
            1 => (at(), 10u8..=100).prop_map(|(at, warmth)| Step::Warm(at, warmth)),
            1 => (at(), at()).prop_map(|(from, to)| Step::Move(from, to)),
            1 => at().prop_map(Step::Repeat),
            1 => at().prop_map(Step::Keep),
            1 => (1u32..500).prop_map(Step::All),
        ]
    }

    fn apply(step: &Step, list: &mut Vec<Peer>, unused: &mut Vec<Peer>) {
        let count = list.len();
        let place = |at: usize| at % count.max(1);
        match *step {
            Step::Add(at, weight) => {
                let Some(mut peer) = unused.pop() else { return };
                peer.weight = weight;
                list.insert(at % (count + 1), peer);
            }
            _ if count == 0 => {}
            Step::Remove(at) => drop(list.remove(place(at))),
            Step::Reweigh(at, weight) => list[place(at)].weight = weight,
            Step::Warm(at, warmth) => list[place(at)].warmth = warmth,
            Step::Move(from, to) => {
                let peer = list.remove(place(from));
                list.insert(place(to).min(list.len()), peer);
            }
            Step::Repeat(at) => list.push(list[place(at)].clone()),
            Step::Keep(at) => list.truncate(place(at)),
            Step::All(weight) => list.iter_mut().for_each(|peer| peer.weight = weight),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever was before, a ring is that of its peers.
        #[test]
        fn a_ring_made_from_the_former_one_is_the_one_made_from_nothing(
            weights in prop::collection::vec(1u32..60, 0..30),
            steps in prop::collection::vec(prop::collection::vec(step(), 1..4), 1..12),
        ) {
            let mut list = peers(&vec![1; weights.len() + 40]);
            let mut unused = list.split_off(weights.len());
            list.iter_mut().zip(&weights).for_each(|(peer, weight)| peer.weight = *weight);
            let mut ring = Ring::new(list.clone(), None);
            for steps in &steps {
                steps.iter().for_each(|step| apply(step, &mut list, &mut unused));
                ring = Ring::new(list.clone(), Some(&ring));
                let whole = Ring::new(list.clone(), None);
                prop_assert_eq!(&ring.points, &whole.points, "{:?}", steps);
                prop_assert_eq!(&ring.owners, &whole.owners, "{:?}", steps);
                let ids = |ring: &Ring| ring.peers.iter().map(|peer| peer.state.id()).collect::<Vec<_>>();
                prop_assert_eq!(ids(&ring), ids(&whole));
            }
        }
    }

    #[test]
    fn the_hash_never_changes() {
        let cases: [(&[u8], u64); 4] = [
            (b"", 0xb800_bd6c_0247_2607),
            (b"a", 0xfcac_1dd3_9ce6_5057),
            (b"12345678", 0xa693_88bb_ec9f_eabe),
            (b"user-12345", 0x0f44_60fa_4542_5d8e),
        ];
        for (key, wanted) in cases {
            assert_eq!(hash(key), wanted, "{}", String::from_utf8_lossy(key));
        }
    }
}
