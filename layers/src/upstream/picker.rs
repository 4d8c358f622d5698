//! Which endpoint gets a request.
//!
//! A [`Picker`] is immutable: the control thread builds it from the endpoints that may be used and swaps it in
//! when endpoints or verdicts change. A pick is a few atomic operations and never waits. What an algorithm has
//! to remember (the round-robin position, latencies, active counts) lives outside and survives the swap.

use std::sync::Arc;
use std::time::Instant;

use discovery::{Details, Health};
use smallvec::SmallVec;

use super::chash::Ring;
use super::endpoint::{EndpointState, Picked};
use super::ewma::Ewma;
use super::least_conn::LeastConn;
use super::locality::Nearness;
use super::panic::{self, Tier};
use super::priority::Levels;
use super::random::Random;
use super::round_robin::{CursorCell, RoundRobin};

/// How endpoints are chosen. APISIX `type`, and `random` as an extension.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Algorithm {
    #[default]
    RoundRobin,
    Chash,
    Ewma,
    LeastConn,
    Random,
}

/// One endpoint with its place among the others.
#[derive(Clone, Debug)]
pub struct Peer {
    pub state: Arc<EndpointState>,
    /// Weight of the node; 0 keeps it out while another node has some.
    pub weight: u32,
    /// Addresses that share `weight`; at least 1.
    pub siblings: u32,
    pub priority: i32,
    /// How much of its weight it has, in percent: less than 100 while it starts slowly.
    pub warmth: u8,
    /// What its registries think of it.
    pub health: Health,
    /// What its registries know of it besides the address.
    pub details: Option<Arc<Details>>,
}

impl Peer {
    /// Whether requests may be sent there: neither checks nor registries have found anything against it.
    pub fn usable(&self) -> bool {
        self.health <= Health::Warning && self.state.health.state().usable()
    }

    /// The weight of this one address.
    pub(crate) fn share(&self) -> f64 {
        let share = f64::from(self.weight) / f64::from(self.siblings.max(1));
        if self.warmth >= 100 { share } else { share * f64::from(self.warmth) / 100.0 }
    }
}

/// Endpoints this request was sent to already.
#[derive(Clone, Debug, Default)]
pub struct Tried(SmallVec<[u64; 4]>);

impl Tried {
    pub fn add(&mut self, endpoint: &EndpointState) {
        self.0.push(endpoint.id());
    }

    pub fn contains(&self, endpoint: &EndpointState) -> bool {
        self.0.contains(&endpoint.id())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a pick depends on besides the endpoints.
#[derive(Clone, Copy, Debug)]
pub struct PickKey {
    /// Hash of the value `chash` goes by ([`super::chash::hash`]); the others ignore it.
    pub hash: u64,
    pub now: Instant,
}

/// The chosen algorithm over one list of endpoints of equal priority.
#[derive(Debug)]
pub(crate) enum Balancer {
    /// One endpoint needs no algorithm.
    Single(Peer),
    RoundRobin(RoundRobin),
    Ring(Ring),
    Ewma(Ewma),
    LeastConn(LeastConn),
    Random(Random),
}

impl Balancer {
    /// `peers` must not be empty; weights of 0 have been dealt with. What the `former` one can lend is not made again.
    pub(crate) fn new(
        algorithm: Algorithm,
        peers: Vec<Peer>,
        cursor: &CursorCell,
        former: Option<&Self>,
    ) -> Self {
        match <[Peer; 1]>::try_from(peers) {
            Ok([peer]) => Self::Single(peer),
            Err(peers) => match algorithm {
                Algorithm::RoundRobin => Self::RoundRobin(RoundRobin::new(peers, cursor)),
                Algorithm::Chash => {
                    let former = former.and_then(|former| match former {
                        Self::Ring(ring) => Some(ring),
                        _ => None,
                    });
                    Self::Ring(Ring::new(peers, former))
                }
                Algorithm::Ewma => Self::Ewma(Ewma::new(peers)),
                Algorithm::LeastConn => Self::LeastConn(LeastConn::new(peers)),
                Algorithm::Random => Self::Random(Random::new(peers)),
            },
        }
    }

    pub(crate) fn pick(&self, key: &PickKey, tried: &Tried) -> Option<&Arc<EndpointState>> {
        match self {
            Self::Single(peer) => (!tried.contains(&peer.state)).then_some(&peer.state),
            Self::RoundRobin(balancer) => balancer.pick(tried),
            Self::Ring(balancer) => balancer.pick(key.hash, tried),
            Self::Ewma(balancer) => balancer.pick(key.now, tried),
            Self::LeastConn(balancer) => balancer.pick(tried),
            Self::Random(balancer) => balancer.pick(tried),
        }
    }
}

/// Which endpoints are used before others, and which not at all.
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// Whether all are used when none is healthy.
    pub fail_open: bool,
    /// While a smaller percentage is healthy, all are used; 0 for only when none is.
    pub panic_threshold: u8,
    /// Which ones are near.
    pub nearness: Option<&'a Nearness>,
    /// Priorities that stand again and are held back for a while.
    pub held: &'a [i32],
}

impl Selection<'_> {
    /// Whether all are used where too few are healthy.
    fn uses_all(&self, tiers: &[Tier]) -> bool {
        self.fail_open || tiers.iter().any(|tier| tier.usable > 0)
    }
}

impl Default for Selection<'_> {
    fn default() -> Self {
        Self { fail_open: true, panic_threshold: 0, nearness: None, held: &[] }
    }
}

/// The endpoints of a cluster at one moment, ready to be picked from.
#[derive(Debug, Default)]
pub struct Picker {
    levels: Levels,
    peers: usize,
    panics: bool,
    everybody: bool,
}

/// Those that may be used at all: a node of weight 0 is drained and comes in only where every node has weight 0.
pub fn eligible(peers: &[Peer]) -> impl Iterator<Item = &Peer> {
    let some = peers.iter().any(|peer| peer.weight > 0);
    peers.iter().filter(move |peer| !some || peer.weight > 0)
}

impl Picker {
    /// Build from every endpoint of an upstream that is not draining. Unusable ones are left out, unless too few are
    /// left. Priorities that stand come first, the best of them first, then what is left of the others.
    pub fn new(algorithm: Algorithm, peers: &[Peer], selection: &Selection<'_>, cursor: &CursorCell) -> Self {
        let tiers = panic::tiers(eligible(peers));
        Self::of_tiers(algorithm, peers, &tiers, selection, cursor, &Self::default())
    }

    /// As [`new`](Self::new), where the tiers are known already, and the picker that is replaced.
    pub(crate) fn of_tiers(
        algorithm: Algorithm,
        peers: &[Peer],
        tiers: &[Tier],
        selection: &Selection<'_>,
        cursor: &CursorCell,
        former: &Self,
    ) -> Self {
        let levels = Self::levels(peers, tiers, selection);
        let levels: Vec<Vec<Peer>> =
            levels.into_iter().map(|level| level.into_iter().map(chosen).collect()).collect();
        let panics = panic::panics(tiers, selection.panic_threshold);
        Self {
            peers: levels.iter().map(Vec::len).sum(),
            levels: Levels::new(algorithm, levels, cursor, &former.levels),
            panics,
            everybody: panics && selection.uses_all(tiers),
        }
    }

    /// The endpoints that can be picked, those first that are used first. No level is empty.
    pub(crate) fn levels<'a>(
        peers: &'a [Peer],
        tiers: &[Tier],
        selection: &Selection<'_>,
    ) -> Vec<Vec<&'a Peer>> {
        let threshold = selection.panic_threshold;
        let everybody = panic::panics(tiers, threshold) && selection.uses_all(tiers);
        let comes_later =
            |tier: &Tier| !everybody && (selection.held.contains(&tier.priority) || !tier.stands(threshold));
        let mut order: Vec<(bool, i32)> =
            tiers.iter().map(|tier| (comes_later(tier), tier.priority)).collect();
        order.sort_by_key(|(later, priority)| (*later, std::cmp::Reverse(*priority)));
        let mut levels = Vec::with_capacity(order.len());
        for (_, priority) in order {
            let tier = eligible(peers).filter(|peer| peer.priority == priority);
            match selection.nearness.filter(|_| !everybody) {
                Some(nearness) => levels.extend(nearness.groups(&tier.collect::<Vec<_>>())),
                None => levels.push(tier.filter(|peer| everybody || peer.usable()).collect()),
            }
        }
        levels.retain(|level| !level.is_empty());
        levels
    }

    /// The next endpoint that was not tried; none when there is none left.
    pub fn pick(&self, key: &PickKey, tried: &Tried) -> Option<Picked> {
        self.peek(key, tried).map(|endpoint| Picked::new(Arc::clone(endpoint)))
    }

    /// As [`pick`](Self::pick), without counting a request there.
    pub fn peek(&self, key: &PickKey, tried: &Tried) -> Option<&Arc<EndpointState>> {
        self.levels.pick(key, tried)
    }

    /// How many endpoints can be picked.
    pub fn len(&self) -> usize {
        self.peers
    }

    pub fn is_empty(&self) -> bool {
        self.peers == 0
    }

    /// Too few endpoints are healthy, or none.
    pub fn degraded(&self) -> bool {
        self.panics
    }

    /// Unhealthy endpoints are picked as well, for too few are healthy.
    pub fn uses_all(&self) -> bool {
        self.everybody
    }
}

/// What a balancer needs of an endpoint that may be picked.
fn chosen(peer: &Peer) -> Peer {
    Peer {
        state: Arc::clone(&peer.state),
        // Only where every node has weight 0, and then all are alike.
        weight: peer.weight.max(1),
        details: None,
        ..*peer
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::endpoint::EndpointKey;
    use super::super::health::{Limits, Report, Source};
    use super::*;

    /// Endpoints 10.0.0.1, 10.0.0.2, ... of the given weights.
    pub(crate) fn peers(weights: &[u32]) -> Vec<Peer> {
        let peer = |(n, weight): (usize, &u32)| {
            let addr = std::net::SocketAddr::from((
                [10, 0, u8::try_from(n / 250).unwrap(), u8::try_from(n % 250 + 1).unwrap()],
                80,
            ));
            let key = EndpointKey { addr, host: addr.ip().to_string().into() };
            let state = Arc::new(EndpointState::new(key));
            Peer {
                state,
                weight: *weight,
                siblings: 1,
                priority: 0,
                warmth: 100,
                health: Health::Healthy,
                details: None,
            }
        };
        weights.iter().enumerate().map(peer).collect()
    }

    pub(crate) fn key(hash: u64) -> PickKey {
        PickKey { hash, now: Instant::now() }
    }

    fn sick(peer: &Peer) {
        let limits = Limits { successes: 1, http_failures: 1, tcp_failures: 1, timeouts: 1 };
        peer.state.health.report(Source::Active, Report::TcpFailure, &limits);
    }

    fn picker(algorithm: Algorithm, peers: &[Peer]) -> Picker {
        Picker::new(algorithm, peers, &Selection::default(), &CursorCell::default())
    }

    const ALL: [Algorithm; 5] =
        [Algorithm::RoundRobin, Algorithm::Chash, Algorithm::Ewma, Algorithm::LeastConn, Algorithm::Random];

    #[test]
    fn an_upstream_without_endpoints_gives_none() {
        for algorithm in ALL {
            let picker = picker(algorithm, &[]);
            assert!(picker.pick(&key(1), &Tried::default()).is_none(), "{algorithm:?}");
            assert!(picker.is_empty() && !picker.degraded());
        }
    }

    #[test]
    fn weight_zero_is_drained_unless_every_node_has_it() {
        for algorithm in ALL {
            let some = peers(&[0, 2, 0]);
            let picked = picker(algorithm, &some);
            for n in 0..100 {
                let picked = picked.pick(&key(n), &Tried::default()).unwrap();
                assert_eq!(picked.id(), some[1].state.id(), "{algorithm:?}");
            }
            let all = picker(algorithm, &peers(&[0, 0]));
            assert_eq!(all.len(), 2, "{algorithm:?}");
            assert!(all.pick(&key(1), &Tried::default()).is_some(), "{algorithm:?}");
        }
    }

    #[test]
    fn unhealthy_endpoints_are_left_out_and_all_of_them_used_when_none_is_healthy() {
        for algorithm in ALL {
            let peers = peers(&[1, 1, 1]);
            sick(&peers[0]);
            sick(&peers[2]);
            let one = picker(algorithm, &peers);
            assert_eq!((one.len(), one.degraded()), (1, false), "{algorithm:?}");
            assert_eq!(one.pick(&key(7), &Tried::default()).unwrap().id(), peers[1].state.id());
            sick(&peers[1]);
            let open = picker(algorithm, &peers);
            assert_eq!((open.len(), open.degraded()), (3, true), "{algorithm:?}");
            let selection = Selection { fail_open: false, ..Selection::default() };
            let closed = Picker::new(algorithm, &peers, &selection, &CursorCell::default());
            assert_eq!((closed.len(), closed.degraded()), (0, true), "{algorithm:?}");
        }
    }

    /// The order in which a request that is refused everywhere visits endpoints, as places in the list; those of one
    /// level in the order of the list.
    fn order(peers: &[Peer], selection: &Selection<'_>) -> Vec<usize> {
        let picker = Picker::new(Algorithm::RoundRobin, peers, selection, &CursorCell::default());
        let mut tried = Tried::default();
        let mut order = Vec::new();
        while let Some(picked) = picker.pick(&key(0), &tried) {
            tried.add(&picked);
            order.push(peers.iter().position(|peer| peer.state.id() == picked.id()).unwrap());
        }
        order
    }

    #[test]
    fn tiers_that_stand_come_first_and_all_are_used_where_none_stands() {
        // Priority and health of each endpoint: healthy, sick by checks, unhealthy or warned of by its registry.
        type Case<'a> = (&'a [(i32, char)], u8, bool, &'a [i32], &'a [usize], &'a str);
        let cases: &[Case<'_>] = &[
            (&[(0, 'h'), (1, 'h')], 0, true, &[], &[1, 0], "the better priority"),
            (&[(0, 'h'), (1, 'h')], 0, true, &[1], &[0, 1], "is the last resort while it is held back"),
            (&[(0, 'h'), (1, 's')], 0, true, &[], &[0], "one that failed is left out"),
            (&[(0, 'h'), (0, 'u'), (0, 'w')], 0, true, &[], &[0, 2], "by its registry too"),
            (&[(0, 's'), (0, 'u')], 0, true, &[], &[0, 1], "none is healthy: all are used"),
            (&[(0, 's'), (0, 'u')], 0, false, &[], &[], "unless they shall not be"),
            (&[(0, 'h'), (0, 's'), (0, 's')], 50, true, &[], &[0, 1, 2], "a third is less than half"),
            (&[(0, 'h'), (0, 's'), (0, 's')], 50, false, &[], &[0, 1, 2], "as long as there is one"),
            (&[(0, 'h'), (0, 's'), (0, 's')], 33, true, &[], &[0], "and more than a third of it"),
            (
                &[(1, 'h'), (1, 's'), (1, 's'), (0, 'h')],
                50,
                true,
                &[],
                &[3, 0],
                "a tier that fell below is passed over for one that stands",
            ),
            (
                &[(1, 'h'), (1, 's'), (1, 's'), (0, 's')],
                50,
                true,
                &[],
                &[0, 1, 2, 3],
                "no tier stands: all in the order of priority",
            ),
        ];
        for (written, panic_threshold, fail_open, held, wanted, case) in cases {
            let mut list = peers(&vec![1; written.len()]);
            for (peer, (priority, health)) in list.iter_mut().zip(*written) {
                peer.priority = *priority;
                match health {
                    's' => sick(peer),
                    'u' => peer.health = Health::Unhealthy,
                    'w' => peer.health = Health::Warning,
                    _ => {}
                }
            }
            let selection =
                Selection { fail_open: *fail_open, panic_threshold: *panic_threshold, nearness: None, held };
            assert_eq!(order(&list, &selection), *wanted, "{case}: {written:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the weights and priorities: every usable endpoint is picked exactly once when each pick
        /// is told what was tried, higher priorities first, and then there is none left.
        #[test]
        fn retries_visit_each_endpoint_once_by_priority(
            nodes in prop::collection::vec((0u32..5, -2i32..3, any::<bool>(), 1u32..4), 1..12),
            hash in any::<u64>(),
            which in 0usize..5,
        ) {
            let mut list = peers(&nodes.iter().map(|node| node.0).collect::<Vec<_>>());
            for (peer, node) in list.iter_mut().zip(&nodes) {
                peer.priority = node.1;
                peer.siblings = node.3;
                if node.2 { sick(peer); }
            }
            let picker = picker(ALL[which], &list);
            let mut tried = Tried::default();
            let mut priorities = Vec::new();
            while let Some(picked) = picker.pick(&key(hash), &tried) {
                prop_assert!(!tried.contains(&picked));
                tried.add(&picked);
                priorities.push(list.iter().find(|peer| peer.state.id() == picked.id()).unwrap().priority);
            }
            prop_assert_eq!(priorities.len(), picker.len());
            prop_assert!(priorities.is_sorted_by(|a, b| a >= b), "{:?}", priorities);
        }

        /// A cold endpoint gets less than a warm one of the same weight and not nothing.
        #[test]
        fn a_cold_endpoint_gets_its_part(warmth in 10u8..60, which in 0usize..5) {
            let mut list = peers(&[2, 2, 2]);
            list[1].warmth = warmth;
            let picker = picker(ALL[which], &list);
            let picks = 4000;
            let cold = (0..picks)
                .filter(|n| {
                    let hash = super::super::chash::hash(n.to_string().as_bytes());
                    // Held requests would even out the choice of `least_conn`; a ring is not that exact.
                    picker.pick(&key(hash), &Tried::default()).unwrap().id() == list[1].state.id()
                })
                .count();
            let fair = f64::from(warmth) / (200.0 + f64::from(warmth));
            let got = cold as f64 / f64::from(picks);
            if ALL[which] == Algorithm::LeastConn {
                prop_assert_eq!(cold, 0, "idle as they are, the others are less loaded for their weight");
            } else {
                prop_assert!(got > fair * 0.4 && got < fair * 1.7, "{} of {} at {warmth} %", got, fair);
            }
        }

        /// Traffic follows the weights for the algorithms that promise it.
        #[test]
        fn round_robin_is_exact_in_every_window(weights in prop::collection::vec(0u32..20, 1..8)) {
            let list = peers(&weights);
            let picker = picker(Algorithm::RoundRobin, &list);
            let total: u32 = weights.iter().sum();
            prop_assume!(total > 0);
            let window = usize::try_from(total).unwrap();
            let picks: Vec<u64> = (0..window * 3)
                .map(|_| picker.pick(&key(0), &Tried::default()).unwrap().id())
                .collect();
            for picks in picks.windows(window) {
                let mut counts: HashMap<u64, u32> = HashMap::new();
                picks.iter().for_each(|id| *counts.entry(*id).or_default() += 1);
                for peer in &list {
                    prop_assert_eq!(counts.get(&peer.state.id()).copied().unwrap_or(0), peer.weight);
                }
            }
        }
    }
}
