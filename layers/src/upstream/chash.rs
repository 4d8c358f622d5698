//! Consistent hashing: a ring of points, about 160 per unit of weight, and the first one at or after the key.
//!
//! An endpoint's points depend on nothing but its address and host, so adding or removing one moves only the
//! keys that belong to it, and every gateway with the same configuration sends a key to the same place. A
//! retry goes on around the ring to the next endpoint that was not tried.

use std::sync::Arc;

use super::endpoint::EndpointState;
use super::picker::{Peer, Tried};

/// Points per unit of weight.
const POINTS: f64 = 160.0;
/// Points of a whole ring. Beyond it every endpoint has fewer, halved until they fit.
const MAX_POINTS: f64 = 131_072.0;
/// Spreads consecutive point numbers over the whole range before they are mixed.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

#[derive(Debug)]
pub(crate) struct Ring {
    peers: Box<[Peer]>,
    /// Sorted; `owners` tells whose point is at the same index.
    points: Box<[u64]>,
    owners: Box<[u32]>,
}

impl Ring {
    pub(crate) fn new(peers: Vec<Peer>) -> Self {
        let total: f64 = peers.iter().map(|peer| peer.share() * POINTS).sum();
        // Halving rather than scaling to fit: a small change of the total leaves the other points alone.
        let mut thin = 1.0;
        while total / thin > MAX_POINTS {
            thin *= 2.0;
        }
        let mut ring: Vec<(u64, u32)> = Vec::new();
        for (index, peer) in peers.iter().enumerate() {
            let Ok(index) = u32::try_from(index) else { break };
            let seed = identity(&peer.state);
            let count = (peer.share() * POINTS / thin).ceil().max(1.0) as u64;
            ring.extend((0..count).map(|n| (mix(seed.wrapping_add(n.wrapping_mul(STEP))), index)));
        }
        ring.sort_unstable();
        let (points, owners): (Vec<u64>, Vec<u32>) = ring.into_iter().unzip();
        Self { peers: peers.into(), points: points.into(), owners: owners.into() }
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

    use super::super::picker::tests::peers;
    use super::*;

    const KEYS: u64 = 20_000;

    fn owners(peers: Vec<Peer>) -> Vec<u64> {
        let ring = Ring::new(peers);
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
        let ring = Ring::new(peers(&[1_000_000; 20]));
        assert!(ring.points.len() <= MAX_POINTS as usize + 20);
        let lopsided = peers(&[1_000_000, 1]);
        assert!(Ring::new(lopsided).owners.contains(&1), "no weight is scaled to nothing");
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
