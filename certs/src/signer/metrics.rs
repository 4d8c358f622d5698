//! What signatures by the nodes of a pool took, and why some were not given. Counted in atomics, read by whoever writes
//! metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper ends of the buckets, in milliseconds.
pub const BUCKETS_MS: [u64; 11] = [1, 2, 4, 8, 16, 32, 64, 125, 250, 500, 1000];

/// Why a node gave no signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Reason {
    /// No connection, a broken one, or the node stops.
    Lost,
    /// No answer in time.
    Timeout,
    /// The node does not let this gateway use the key, or has none of the name.
    Denied,
    /// The node's key of this name is another one.
    Mismatch,
    /// The node has more to do than it can or allows.
    Full,
    /// The node does not take the message or the scheme.
    Invalid,
    /// Anything else.
    Failed,
}

impl Reason {
    pub const ALL: [Reason; 7] = [
        Reason::Lost,
        Reason::Timeout,
        Reason::Denied,
        Reason::Mismatch,
        Reason::Full,
        Reason::Invalid,
        Reason::Failed,
    ];

    /// For metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Lost => "lost",
            Reason::Timeout => "timeout",
            Reason::Denied => "denied",
            Reason::Mismatch => "mismatch",
            Reason::Full => "full",
            Reason::Invalid => "invalid",
            Reason::Failed => "failed",
        }
    }
}

/// Of one node.
#[derive(Debug, Default)]
pub struct NodeMetrics {
    /// Signatures by the bucket of their time; the last is for those that took longest.
    buckets: [AtomicU64; BUCKETS_MS.len() + 1],
    micros: AtomicU64,
    failures: [AtomicU64; Reason::ALL.len()],
}

/// The times of signatures, as Prometheus wants them: each bucket with all that are faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    pub buckets: [u64; BUCKETS_MS.len()],
    pub count: u64,
    pub sum: Duration,
}

impl NodeMetrics {
    pub(super) fn signed(&self, took: Duration) {
        let at = BUCKETS_MS.iter().position(|end| took <= Duration::from_millis(*end));
        if let Some(bucket) = self.buckets.get(at.unwrap_or(BUCKETS_MS.len())) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn failed(&self, reason: Reason) {
        if let Some(failures) = self.failures.get(reason as usize) {
            failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How long signatures took.
    #[must_use]
    pub fn times(&self) -> Times {
        let mut count = 0;
        let mut buckets = [0; BUCKETS_MS.len()];
        for (index, bucket) in self.buckets.iter().enumerate() {
            count += bucket.load(Ordering::Relaxed);
            if let Some(sum) = buckets.get_mut(index) {
                *sum = count;
            }
        }
        Times { buckets, count, sum: Duration::from_micros(self.micros.load(Ordering::Relaxed)) }
    }

    /// How often a signature was not given.
    pub fn failures(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        let counts = self.failures.iter().map(|count| count.load(Ordering::Relaxed));
        Reason::ALL.into_iter().zip(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_all_that_are_faster() {
        let metrics = NodeMetrics::default();
        for micros in [10, 1000, 1001, 600_000, 5_000_000] {
            metrics.signed(Duration::from_micros(micros));
        }
        let times = metrics.times();
        assert_eq!(times.buckets, [2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4]);
        assert_eq!((times.count, times.sum), (5, Duration::from_micros(5_602_011)));
        for (index, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index, "the place of a reason is its number");
            metrics.failed(reason);
        }
        assert!(metrics.failures().all(|(_, count)| count == 1));
    }
}
