//! How much time a busy machine has taken away from a test, so that a promise about time can be checked on any machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often it is looked whether this process gets to run.
const PACE: Duration = Duration::from_millis(5);

/// Looks until it is dropped.
pub struct Busy {
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    over: AtomicBool,
    /// Microseconds by which this process was woken late.
    late: AtomicU64,
    looks: AtomicU64,
    /// Over all looks, how many wanted a core for each that there is, in hundredths; 100 where there are enough.
    crowd: AtomicU64,
}

impl Busy {
    /// From now on.
    pub fn start() -> Busy {
        let busy = Busy { seen: Arc::default() };
        let seen = Arc::clone(&busy.seen);
        std::thread::spawn(move || {
            while !seen.over.load(Ordering::Relaxed) {
                let begin = Instant::now();
                // Nothing is waited for: how late a sleeper is woken is what is measured.
                std::thread::park_timeout(PACE);
                let behind = begin.elapsed().saturating_sub(PACE * 2);
                seen.late.fetch_add(u64::try_from(behind.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
                seen.crowd.fetch_add(crowd().unwrap_or(100), Ordering::Relaxed);
                seen.looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        busy
    }

    /// `time`, longer by as much as there were more who wanted a core than cores, and by what this process had to wait for
    /// others since. Each of those who take part may have waited as long: the test, the gateway and whom it asks.
    pub fn allow(&self, time: Duration) -> Duration {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let crowd = read(&self.seen.crowd).checked_div(read(&self.seen.looks)).unwrap_or(100);
        time.mul_f64(crowd as f64 / 100.0) + Duration::from_micros(read(&self.seen.late)) * 3
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.seen.over.store(true, Ordering::Relaxed);
    }
}

/// How many want a core at this moment for each that there is, in hundredths, and 100 at least (proc(5), `loadavg`).
fn crowd() -> Option<u64> {
    let loads = std::fs::read_to_string("/proc/loadavg").ok()?;
    let runnable: u64 = loads.split(' ').nth(3)?.split('/').next()?.parse().ok()?;
    let cores = std::thread::available_parallelism().ok()?;
    Some((runnable * 100 / cores.get() as u64).max(100))
}
