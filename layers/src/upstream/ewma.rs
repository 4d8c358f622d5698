//! Latency-aware choice: of two random endpoints the one that has answered faster lately.
//!
//! The average decays over ten seconds, in both directions: an endpoint that is not used is forgiven. Its
//! value and its time are one atomic word, so workers update it without a lock.

use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::endpoint::EndpointState;
use super::picker::{Peer, Tried};

/// Time constant of the decay, in seconds.
const DECAY: f32 = 10.0;
/// Ticks of the stored time; 1/64 s lasts two years in 32 bits.
const TICKS_PER_SECOND: u32 = 64;

/// What stored times count from. Only differences matter.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Exponentially weighted moving average of the time to a response head.
#[derive(Debug, Default)]
pub struct Latency(AtomicU64);

impl Latency {
    /// Take in one observation.
    pub fn observe(&self, took: Duration, now: Instant) {
        let tick = ticks(now);
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let (value, weight) = decayed(word, tick);
            let value = value + took.as_secs_f32() * (1.0 - weight);
            let next = u64::from(tick) << 32 | u64::from(value.to_bits());
            match self.0.compare_exchange_weak(word, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return,
                Err(current) => word = current,
            }
        }
    }

    /// The average now, in seconds.
    pub fn score(&self, now: Instant) -> f32 {
        decayed(self.0.load(Ordering::Relaxed), ticks(now)).0
    }
}

fn ticks(now: Instant) -> u32 {
    let since = now.saturating_duration_since(*EPOCH);
    // Never 0, which is "no observation yet".
    let ticks = since.as_millis() * u128::from(TICKS_PER_SECOND) / 1000 + 1;
    u32::try_from(ticks).unwrap_or(u32::MAX)
}

/// The stored value as it has decayed until `tick`, and the factor by which it did.
fn decayed(word: u64, tick: u32) -> (f32, f32) {
    let value = f32::from_bits(u32::try_from(word & 0xffff_ffff).unwrap_or(0));
    let then = u32::try_from(word >> 32).unwrap_or(0);
    if then == 0 {
        return (0.0, 0.0);
    }
    let seconds = tick.saturating_sub(then) as f32 / TICKS_PER_SECOND as f32;
    let weight = (-seconds / DECAY).exp();
    (value * weight, weight)
}

#[derive(Debug)]
pub(crate) struct Ewma {
    peers: Box<[Peer]>,
    /// Some endpoint has less than its whole share.
    cold: bool,
}

impl Ewma {
    pub(crate) fn new(peers: Vec<Peer>) -> Self {
        Self { cold: peers.iter().any(|peer| peer.warmth < 100), peers: peers.into() }
    }

    /// Whether it is not this cold endpoint's turn.
    fn passes_over(&self, endpoint: &Arc<EndpointState>) -> bool {
        let peer = self.peers.iter().find(|peer| Arc::ptr_eq(&peer.state, endpoint));
        peer.is_some_and(|peer| fastrand::u8(..100) >= peer.warmth)
    }

    pub(crate) fn pick(&self, now: Instant, tried: &Tried) -> Option<&Arc<EndpointState>> {
        let untried = |index: usize| {
            let peer = self.peers.get(index)?;
            (!tried.contains(&peer.state)).then_some(&peer.state)
        };
        // A retry counts what is left first; usually nothing was tried and nothing is counted.
        let count = if tried.is_empty() {
            self.peers.len()
        } else {
            (0..self.peers.len()).filter_map(untried).count()
        };
        let nth = |n: usize| {
            if tried.is_empty() { untried(n) } else { (0..self.peers.len()).filter_map(untried).nth(n) }
        };
        match count {
            0 => None,
            1 => nth(0),
            _ => {
                let first = fastrand::usize(..count);
                let second = fastrand::usize(..count - 1);
                let (first, second) = (nth(first)?, nth(second + usize::from(second >= first))?);
                let slower = first.latency.score(now) > second.latency.score(now);
                let (best, other) = if slower { (second, first) } else { (first, second) };
                // Nothing is known of a cold endpoint, and that must not make it the best.
                Some(if self.cold && self.passes_over(best) { other } else { best })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::super::picker::tests::peers;
    use super::*;

    #[test]
    fn the_average_rises_decays_and_forgives() {
        let start = *EPOCH + Duration::from_secs(1);
        let latency = Latency::default();
        assert_eq!(latency.score(start), 0.0);
        latency.observe(Duration::from_millis(100), start);
        let first = latency.score(start);
        assert!((first - 0.1).abs() < 0.001, "the first observation counts whole, got {first}");
        let later = latency.score(start + Duration::from_secs(10));
        assert!((later - 0.0368).abs() < 0.001, "1/e after ten seconds, got {later}");
        latency.observe(Duration::from_millis(300), start + Duration::from_secs(10));
        let mixed = latency.score(start + Duration::from_secs(10));
        assert!((mixed - 0.2264).abs() < 0.002, "old and new mixed by age, got {mixed}");
    }

    #[test]
    fn the_fast_endpoint_is_preferred_and_the_slow_one_still_seen() {
        let list = peers(&[1, 1, 1]);
        let now = *EPOCH + Duration::from_secs(5);
        for (peer, millis) in list.iter().zip([5, 50, 500]) {
            peer.state.latency.observe(Duration::from_millis(millis), now);
        }
        let balancer = Ewma::new(list.clone());
        let mut counts = [0; 3];
        for _ in 0..3000 {
            let picked = balancer.pick(now, &Tried::default()).unwrap();
            counts[list.iter().position(|peer| peer.state.id() == picked.id()).unwrap()] += 1;
        }
        assert!(counts[0] > 1800, "best of every pair it is in: {counts:?}");
        assert!(counts[1] > 700, "{counts:?}");
        assert_eq!(counts[2], 0, "never better than its rival");
        let later = now + Duration::from_secs(120);
        list[0].state.latency.observe(Duration::from_secs(1), later);
        assert!(
            (0..100).any(|_| { balancer.pick(later, &Tried::default()).unwrap().id() == list[2].state.id() })
        );
    }
}
