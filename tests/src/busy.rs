//! How much time a busy machine has taken away from a test, so that a promise about time can be checked on any machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often it is looked whether this process gets to run.
const PACE: Duration = Duration::from_millis(5);

/// Looks until it is dropped.
pub struct Busy {
    late: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Busy {
    /// From now on.
    pub fn start() -> Busy {
        let busy = Busy { late: Arc::default(), over: Arc::default() };
        let (late, over) = (Arc::clone(&busy.late), Arc::clone(&busy.over));
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let begin = Instant::now();
                // Nothing is waited for: how late a sleeper is woken is what is measured.
                std::thread::park_timeout(PACE);
                let behind = begin.elapsed().saturating_sub(PACE * 2);
                late.fetch_add(u64::try_from(behind.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
            }
        });
        busy
    }

    /// `time`, and what this process had to wait for others since. Each of those who take part may have waited as long: the
    /// test, the gateway and whom it asks.
    pub fn allow(&self, time: Duration) -> Duration {
        time + Duration::from_micros(self.late.load(Ordering::Relaxed)) * 3
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
