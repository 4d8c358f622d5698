//! Counters that many workers add to without touching each other's cache lines.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Cells of a counter. More workers than cells share them, which is slower and still right.
pub(crate) const CELLS: usize = 16;

/// A value on a cache line of its own (two of them, because processors fetch pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);

/// The cell of this thread.
pub(crate) fn cell() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<Option<usize>> = const { Cell::new(None) };
    }
    MINE.with(|mine| {
        mine.get().unwrap_or_else(|| {
            let number = NEXT.fetch_add(1, Ordering::Relaxed) % CELLS;
            mine.set(Some(number));
            number
        })
    })
}

/// Only grows.
#[derive(Debug, Default)]
pub struct Counter([Padded<AtomicU64>; CELLS]);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        if let Some(Padded(value)) = self.0.get(cell()) {
            value.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// The sum of all workers.
    pub fn value(&self) -> u64 {
        self.0.iter().map(|Padded(value)| value.load(Ordering::Relaxed)).fold(0, u64::wrapping_add)
    }
}

/// A value that is set as a whole. For the control side.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_count_is_lost_between_threads() {
        let counter = Counter::default();
        std::thread::scope(|scope| {
            for _ in 0..CELLS + 4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        counter.inc();
                    }
                });
            }
        });
        assert_eq!(counter.value(), (CELLS as u64 + 4) * 1000);
    }
}
