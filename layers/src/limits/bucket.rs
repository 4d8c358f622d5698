//! Leaky buckets: each request of a key pours in one, and they leak at a steady rate.
//!
//! What is in a bucket above one request tells how long that request has to wait for its turn.

use std::time::{Duration, Instant};

use super::table::{Entry, Key, Table};

/// Buckets that the table may hold: about 25 MB.
const CAPACITY: usize = 1 << 19;

/// How much leaks, and how much more fits.
#[derive(Clone, Copy, Debug)]
pub struct Leak {
    /// Requests in a second. More than zero.
    pub rate: f64,
    /// Requests above the rate that may wait.
    pub burst: f64,
}

/// The requests of one key.
#[derive(Debug)]
pub struct Bucket {
    /// Requests that were above the rate, at `last`.
    excess: f64,
    /// When the last one came.
    last: u64,
    /// When it will have leaked out, for one that comes then to find it as if new.
    empty: u64,
}

impl Entry for Bucket {
    fn is_over(&self, now: u64) -> bool {
        now >= self.empty
    }

    fn worth(&self) -> (u64, u64) {
        // What takes long to leak out says most.
        (self.empty, self.last)
    }
}

/// Buckets of all limits.
pub type BucketTable = Table<Bucket>;

impl Default for BucketTable {
    fn default() -> Self {
        Self::with_capacity(CAPACITY)
    }
}

impl BucketTable {
    /// Pours in one request: how long it has to wait, or nothing if it does not fit.
    pub fn pour(&self, key: Key, leak: Leak, now: Instant) -> Option<Duration> {
        let now = self.time(now);
        self.with(
            key,
            now,
            || Bucket { excess: -1.0, last: now, empty: now },
            |bucket| bucket.pour(leak, now),
        )?
    }
}

impl Bucket {
    fn pour(&mut self, leak: Leak, now: u64) -> Option<Duration> {
        let leaked = leak.rate * now.saturating_sub(self.last) as f64 / 1000.0;
        let excess = (self.excess - leaked + 1.0).max(0.0);
        if excess > leak.burst {
            return None;
        }
        self.excess = excess;
        self.last = self.last.max(now);
        let millis = |requests: f64| (requests / leak.rate * 1000.0).ceil();
        // Floats become the nearest whole number that fits.
        self.empty = self.last.saturating_add(millis(excess + 1.0) as u64);
        Some(Duration::try_from_secs_f64(excess / leak.rate).unwrap_or(Duration::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds each of the requests at these times has to wait.
    fn waits(rate: f64, burst: f64, times: &[u64]) -> Vec<Option<u64>> {
        let table = BucketTable::default();
        let key = table.key(table.owner("routes/1"), "a");
        times
            .iter()
            .map(|at| {
                let waits =
                    table.pour(key, Leak { rate, burst }, table.start + Duration::from_millis(*at))?;
                Some(u64::try_from(waits.as_millis()).unwrap())
            })
            .collect()
    }

    #[test]
    fn requests_above_the_rate_wait_and_those_above_the_burst_do_not_fit() {
        let cases = [
            ("one at a time", 1.0, 0.0, vec![0, 999, 1_000, 2_000], vec![Some(0), None, Some(0), Some(0)]),
            (
                "a burst waits for its turn",
                10.0,
                2.0,
                vec![0, 0, 0, 0],
                vec![Some(0), Some(100), Some(200), None],
            ),
            (
                "it leaks steadily",
                10.0,
                2.0,
                vec![0, 0, 0, 150],
                vec![Some(0), Some(100), Some(200), Some(150)],
            ),
            ("a slow rate", 0.1, 0.0, vec![0, 9_999, 10_000], vec![Some(0), None, Some(0)]),
            ("part of a request", 1.0, 0.5, vec![0, 500, 500], vec![Some(0), Some(500), None]),
            (
                "rest saves nothing up",
                1.0,
                1.0,
                vec![0, 60_000, 60_000, 60_000],
                vec![Some(0), Some(0), Some(1_000), None],
            ),
        ];
        for (name, rate, burst, times, expected) in cases {
            assert_eq!(waits(rate, burst, &times), expected, "{name}");
        }
    }

    #[test]
    fn the_slowest_rate_does_not_overflow() {
        let table = BucketTable::default();
        let key = table.key(table.owner("routes/1"), "a");
        let leak = Leak { rate: f64::MIN_POSITIVE, burst: f64::MAX };
        for _ in 0..3 {
            assert!(table.pour(key, leak, table.start).is_some());
        }
    }

    #[test]
    fn a_bucket_that_has_leaked_out_is_forgotten() {
        let table = BucketTable::default();
        let owner = table.owner("routes/1");
        for n in 0..100_000_u64 {
            let now = table.start + Duration::from_millis(n * 10);
            table.pour(table.key(owner, n), Leak { rate: 100.0, burst: 1.0 }, now);
        }
        assert!(table.len() < 1_000, "{}", table.len());
    }
}
