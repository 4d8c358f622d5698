//! How many retries an upstream may cause, so that a failing upstream is not hit harder than a healthy one.
//!
//! Over any second, retries may be a share of the requests (20 % by default) plus a few (10), over all workers.
//! The window slides: the previous second counts by the part of it that is still inside.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What an upstream allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Retries for every hundred requests.
    pub percent: u64,
    /// Retries in any second besides.
    pub floor: u64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { percent: 20, floor: 10 }
    }
}

/// The counters of one upstream, on a cache line of their own: every request writes here, and what stands beside them
/// in a cluster is only read.
#[derive(Debug)]
#[repr(align(64))]
pub struct Budget {
    epoch: Instant,
    requests: Window,
    retries: Window,
}

impl Budget {
    pub fn new() -> Self {
        Self { epoch: Instant::now(), requests: Window::default(), retries: Window::default() }
    }

    /// Count a request; not an attempt.
    pub fn request(&self, now: Instant) {
        self.requests.add(self.since(now).as_secs());
    }

    /// Take one retry if there is one left.
    pub fn retry(&self, now: Instant, allowance: Allowance) -> bool {
        let now = self.since(now);
        let allowed = self.requests.sum(now) * allowance.percent / 100 + allowance.floor;
        if self.retries.sum(now) >= allowed {
            return false;
        }
        self.retries.add(now.as_secs());
        true
    }

    fn since(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.epoch)
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::new()
    }
}

/// Events of this second and the one before, each as `second << 32 | count`.
#[derive(Debug, Default)]
struct Window([AtomicU64; 2]);

impl Window {
    fn slot(&self, second: u64) -> &AtomicU64 {
        let [even, odd] = &self.0;
        if second.is_multiple_of(2) { even } else { odd }
    }

    fn add(&self, second: u64) {
        let slot = self.slot(second);
        let mut word = slot.load(Ordering::Relaxed);
        loop {
            let next = if word >> 32 == second & 0xffff_ffff { word + 1 } else { second << 32 | 1 };
            match slot.compare_exchange_weak(word, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return,
                Err(current) => word = current,
            }
        }
    }

    /// Events of the last second, the older part estimated.
    fn sum(&self, now: Duration) -> u64 {
        let count = |second: u64| {
            let word = self.slot(second).load(Ordering::Relaxed);
            if word >> 32 == second & 0xffff_ffff { word & 0xffff_ffff } else { 0 }
        };
        let second = now.as_secs();
        let left = u64::from(1000 - now.subsec_millis());
        let before = second.checked_sub(1).map_or(0, count);
        count(second) + before * left / 1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retries(budget: &Budget, at: Instant, wanted: usize) -> usize {
        (0..wanted).filter(|_| budget.retry(at, Allowance::default())).count()
    }

    #[test]
    fn a_quiet_upstream_has_the_floor() {
        let budget = Budget::new();
        let start = budget.epoch;
        assert_eq!(retries(&budget, start, 100), 10);
        assert_eq!(retries(&budget, start + Duration::from_millis(900), 100), 0, "still the same second");
        assert_eq!(retries(&budget, start + Duration::from_millis(1500), 100), 5, "half of them are past");
        assert_eq!(retries(&budget, start + Duration::from_secs(60), 100), 10, "and later all");
    }

    #[test]
    fn a_busy_upstream_has_its_share_besides() {
        let budget = Budget::new();
        let start = budget.epoch;
        for _ in 0..1000 {
            budget.request(start);
        }
        assert_eq!(retries(&budget, start, 1000), 210);
    }

    #[test]
    fn a_storm_never_exceeds_the_share_in_any_second() {
        let budget = Budget::new();
        let mut granted = Vec::new();
        for ms in 0..10_000_u64 {
            let now = budget.epoch + Duration::from_millis(ms);
            // 1,000 requests a second, all of which fail and want three retries.
            budget.request(now);
            granted.push(retries(&budget, now, 3));
        }
        for window in granted.windows(1000).skip(1000) {
            let sum: usize = window.iter().sum();
            assert!(sum <= 235, "{sum} retries for 1,000 requests");
        }
    }
}
