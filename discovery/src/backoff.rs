//! Growing, jittered pauses between attempts at something that fails.
//!
//! Jitter is the point: a thousand names that failed together must not be retried together.

use std::time::Duration;

/// Doubles from `base` to `cap`; each pause is drawn from the upper half of the current step.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    step: Duration,
    rng: fastrand::Rng,
}

impl Backoff {
    /// `base` is the first pause at most, `cap` the longest one.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self::with_rng(base, cap, fastrand::Rng::new())
    }

    /// The same with a given source of randomness, for tests that must repeat.
    pub fn with_rng(base: Duration, cap: Duration, rng: fastrand::Rng) -> Self {
        Self { base, cap, step: base, rng }
    }

    /// The pause before the next attempt.
    pub fn pause(&mut self) -> Duration {
        let step = self.step.min(self.cap);
        self.step = step.saturating_mul(2);
        step.mul_f64(0.5 + self.rng.f64() / 2.0)
    }

    /// Something worked: start over from `base`.
    pub fn reset(&mut self) {
        self.step = self.base;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_stay_under_the_cap_and_start_over() {
        let (base, cap) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::with_rng(base, cap, fastrand::Rng::with_seed(7));
        let mut step = base;
        for _ in 0..20 {
            let pause = backoff.pause();
            assert!(pause >= step / 2 && pause <= step, "{pause:?} is outside the upper half of {step:?}");
            step = (step * 2).min(cap);
        }
        backoff.reset();
        assert!(backoff.pause() <= base);
    }
}
