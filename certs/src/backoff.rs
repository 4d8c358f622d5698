//! How long to wait before a server that failed is asked again.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(60);

/// Doubles with every failure up to a minute; what is waited is anything between nothing and that, so that many who
/// failed together do not come back together.
#[derive(Clone, Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// The wait after one more failure, at least what the server asked for.
    pub fn failed(&mut self, asked: Option<Duration>) -> Duration {
        let most = self.next;
        self.next = (most * 2).min(LONGEST);
        most.mul_f64(fastrand::f64()).max(asked.unwrap_or_default().min(LONGEST))
    }

    /// It answered.
    pub fn answered(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_minute_and_begin_anew_after_an_answer() {
        let mut backoff = Backoff::default();
        let mut most = FIRST;
        for _ in 0..20 {
            assert!(backoff.failed(None) <= most);
            most = (most * 2).min(LONGEST);
        }
        assert_eq!(most, LONGEST);
        let asked = Duration::from_secs(30);
        assert!(backoff.failed(Some(asked)) >= asked);
        assert!(
            backoff.failed(Some(Duration::from_secs(86_400))) <= LONGEST,
            "nobody sends us away for a day"
        );
        backoff.answered();
        assert!(backoff.failed(None) <= FIRST);
    }
}
