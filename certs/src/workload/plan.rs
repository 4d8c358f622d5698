//! When a certificate is renewed: at half of its life, give or take a tenth, so that those that began together do not come
//! back together; and how long is waited after an attempt that failed.

use std::time::{Duration, SystemTime};

use super::Phase;

/// Moments in the life of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub renew: SystemTime,
    /// A quarter is left.
    pub late: SystemTime,
    /// A tenth is left.
    pub alarm: SystemTime,
    pub end: SystemTime,
    /// The first of these by the clock that only grows, which counts when the wall clock is set back.
    elapsed: Duration,
}

impl Plan {
    /// For a certificate that was made `now` and ends at `end`.
    pub fn new(now: SystemTime, end: SystemTime, elapsed: Duration, rng: &mut fastrand::Rng) -> Self {
        let life = end.duration_since(now).unwrap_or_default();
        let half = life.mul_f64(0.5 + (rng.f64() * 2.0 - 1.0) * 0.1);
        let at = |share: f64| now + life.mul_f64(share);
        Self { renew: now + half, late: at(0.75), alarm: at(0.9), end, elapsed: elapsed + half }
    }

    /// How long until it is to be renewed, by whichever clock comes first.
    pub fn due(&self, now: SystemTime, elapsed: Duration) -> Duration {
        let wall = self.renew.duration_since(now).unwrap_or_default();
        wall.min(self.elapsed.saturating_sub(elapsed))
    }

    /// How it stands.
    pub fn phase(&self, now: SystemTime) -> Phase {
        match now {
            now if now >= self.end => Phase::Expired,
            now if now >= self.alarm => Phase::Alarm,
            now if now >= self.late => Phase::Late,
            _ => Phase::Valid,
        }
    }
}

/// Pauses that grow, each drawn from all up to the step, so that thousands that failed together spread.
#[derive(Clone, Debug)]
pub struct Backoff {
    step: Duration,
    most: Duration,
}

impl Backoff {
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { step: first, most }
    }

    /// The next pause, `at_most` so long.
    pub fn pause(&mut self, at_most: Duration) -> Duration {
        let step = self.step.min(self.most);
        self.step = step.saturating_mul(2);
        step.min(at_most).mul_f64(fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_renewed_around_half_of_its_life_by_either_clock() {
        let mut rng = fastrand::Rng::new();
        for _ in 0..200 {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
            let life = Duration::from_secs(rng.u64(10..10 * 86_400));
            let begun = Duration::from_secs(rng.u64(0..1000));
            let plan = Plan::new(now, now + life, begun, &mut rng);
            let due = plan.due(now, begun);
            assert!(due >= life.mul_f64(0.4) && due <= life.mul_f64(0.6), "{due:?} of {life:?}");
            assert_eq!(plan.due(now + due, begun), Duration::ZERO);
            assert_eq!(plan.due(now, begun + due), Duration::ZERO, "the machine's clock was set back");
            assert_eq!(plan.due(now + life * 2, begun), Duration::ZERO, "it was set forward, or has slept");
            assert!(plan.renew < plan.late && plan.late < plan.alarm && plan.alarm < plan.end);
            let phases = [0.5, 0.76, 0.91, 1.0].map(|share| plan.phase(now + life.mul_f64(share)));
            assert_eq!(phases, [Phase::Valid, Phase::Late, Phase::Alarm, Phase::Expired]);
        }
    }

    #[test]
    fn pauses_grow_to_their_limit_and_no_further() {
        for _ in 0..50 {
            let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));
            let mut step = Duration::from_millis(500);
            for _ in 0..12 {
                assert!(backoff.pause(Duration::from_secs(60)) <= step);
                step = (step * 2).min(Duration::from_secs(60));
            }
            assert!(backoff.pause(Duration::from_secs(10)) <= Duration::from_secs(10));
        }
    }
}
