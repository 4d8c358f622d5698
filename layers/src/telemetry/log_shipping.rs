//! Log entries on their way out of the process: what was sent and what was lost, by plugin, and the memory they take.
//!
//! Plugins keep the queues; this is what they share. Everything that waits, and every body that is kept for an entry,
//! counts against one budget of memory. At the end of the process [`LogShipping::flush`] lets every queue send what it
//! has, within a deadline.

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::counter::Counter;
use super::exposition::Exposition;
use super::names;

/// Bytes that all entries and bodies kept for them may take together.
pub const MEMORY: usize = 256 << 20;

/// How often [`LogShipping::flush`] looks whether all is sent.
const LOOK: Duration = Duration::from_millis(10);

/// Why an entry was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Too many entries waited.
    Entries,
    /// The entries that waited took too much memory.
    Memory,
    /// The other end did not take it, and no attempt was left.
    Refused,
    /// The process ended.
    Shutdown,
}

impl Loss {
    /// All of them, in their order.
    pub const ALL: [Loss; 4] = [Loss::Entries, Loss::Memory, Loss::Refused, Loss::Shutdown];

    /// As in the label `reason`.
    pub const fn code(self) -> &'static str {
        match self {
            Loss::Entries => "queue_full",
            Loss::Memory => "memory",
            Loss::Refused => "send_failed",
            Loss::Shutdown => "shutdown",
        }
    }
}

/// What became of the entries of one plugin.
#[derive(Debug, Default)]
pub struct Shipped {
    /// Taken by the other end.
    pub sent: Counter,
    lost: [Counter; Loss::ALL.len()],
}

impl Shipped {
    /// Counts lost entries.
    pub fn lost(&self, loss: Loss, entries: u64) {
        if let Some(counter) = self.lost.get(loss as usize) {
            counter.add(entries);
        }
    }

    /// Entries lost for this reason.
    pub fn losses(&self, loss: Loss) -> u64 {
        self.lost.get(loss as usize).map_or(0, Counter::value)
    }
}

/// A queue of entries.
pub trait Queue: Send + Sync {
    /// The name that the operator gave it.
    fn name(&self) -> &str;

    /// Entries that wait or are being sent.
    fn entries(&self) -> usize;

    /// From now on sends at once what arrives.
    fn hurry(&self);

    /// Counts what is left as lost.
    fn abandon(&self);
}

/// What all queues share.
#[derive(Default)]
pub struct LogShipping {
    counts: Mutex<Vec<(&'static str, Arc<Shipped>)>>,
    queues: Mutex<Vec<Weak<dyn Queue>>>,
    memory: AtomicUsize,
    reopened: AtomicU64,
}

impl fmt::Debug for LogShipping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogShipping").finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LogShipping {
    /// The counts of a plugin.
    pub fn counts(&self, plugin: &'static str) -> Arc<Shipped> {
        let mut counts = lock(&self.counts);
        if let Some((_, known)) = counts.iter().find(|(name, _)| *name == plugin) {
            return known.clone();
        }
        let made = Arc::<Shipped>::default();
        counts.push((plugin, made.clone()));
        made
    }

    /// Adds a queue that is told of in metrics and flushed at the end.
    pub fn watch(&self, queue: Weak<dyn Queue>) {
        let mut queues = lock(&self.queues);
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(queue);
    }

    /// Takes memory for `bytes`, if there is any left.
    #[must_use]
    pub fn reserve(&self, bytes: usize) -> bool {
        let taken = self.memory.fetch_add(bytes, Ordering::Relaxed);
        if taken.saturating_add(bytes) > MEMORY {
            self.release(bytes);
            return false;
        }
        true
    }

    /// Gives memory back.
    pub fn release(&self, bytes: usize) {
        self.memory.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Files of log entries were moved: they are to be opened again under their names.
    pub fn reopen(&self) {
        self.reopened.fetch_add(1, Ordering::Relaxed);
    }

    /// How often [`reopen`](Self::reopen) was called.
    pub fn reopened(&self) -> u64 {
        self.reopened.load(Ordering::Relaxed)
    }

    fn queues(&self) -> Vec<Arc<dyn Queue>> {
        lock(&self.queues).iter().filter_map(Weak::upgrade).collect()
    }

    /// Lets every queue send what it has. What is left after `within` counts as lost; tells how many entries that are.
    pub async fn flush(&self, within: Duration) -> usize {
        let queues = self.queues();
        queues.iter().for_each(|queue| queue.hurry());
        let left = || queues.iter().map(|queue| queue.entries()).sum::<usize>();
        let emptied = async {
            while left() > 0 {
                tokio::time::sleep(LOOK).await;
            }
        };
        // Whatever the time-out says, the count below tells what is left.
        let _ = tokio::time::timeout(within, emptied).await;
        let lost = left();
        queues.iter().for_each(|queue| queue.abandon());
        lost
    }

    /// Writes the families of the queues; `prefix` stands before the names of APISIX.
    pub(crate) fn expose(&self, out: &mut Exposition, prefix: &str) {
        let mut waiting = std::collections::BTreeMap::<String, usize>::new();
        for queue in self.queues() {
            *waiting.entry(queue.name().to_owned()).or_default() += queue.entries();
        }
        if !waiting.is_empty() {
            out.family(prefix, &names::BATCH_PROCESS_ENTRIES);
        }
        for (name, entries) in &waiting {
            out.sample(prefix, names::BATCH_PROCESS_ENTRIES.name, [("name", name.as_str())], entries);
        }
        let counts = lock(&self.counts).clone();
        out.family("", &names::LOG_ENTRIES_SENT_TOTAL);
        for (plugin, shipped) in &counts {
            out.sample("", names::LOG_ENTRIES_SENT_TOTAL.name, [("plugin", *plugin)], shipped.sent.value());
        }
        out.family("", &names::LOG_ENTRIES_DROPPED_TOTAL);
        for (plugin, shipped) in &counts {
            for loss in Loss::ALL {
                let labels = [("plugin", *plugin), ("reason", loss.code())];
                out.sample("", names::LOG_ENTRIES_DROPPED_TOTAL.name, labels, shipped.losses(loss));
            }
        }
        out.single("", &names::LOG_MEMORY_BYTES, self.memory.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Full(AtomicUsize);

    impl Queue for Full {
        fn name(&self) -> &str {
            "q"
        }

        fn entries(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }

        fn hurry(&self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }

        fn abandon(&self) {
            self.0.store(0, Ordering::Relaxed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_flush_ends_when_all_is_sent_or_its_time_is_up() {
        let shipping = LogShipping::default();
        let queue = Arc::new(Full(AtomicUsize::new(1)));
        let watched: Arc<dyn Queue> = queue.clone();
        shipping.watch(Arc::downgrade(&watched));
        let start = tokio::time::Instant::now();
        assert_eq!(shipping.flush(Duration::from_secs(5)).await, 0);
        assert!(start.elapsed() < Duration::from_secs(1));
        queue.0.store(3, Ordering::Relaxed);
        assert_eq!(shipping.flush(Duration::from_secs(5)).await, 2);
        assert!(start.elapsed() >= Duration::from_secs(5));
        assert_eq!(queue.entries(), 0);
    }

    #[test]
    fn memory_has_an_end_and_comes_back() {
        let shipping = LogShipping::default();
        assert!(shipping.reserve(MEMORY));
        assert!(!shipping.reserve(1));
        shipping.release(MEMORY);
        assert!(shipping.reserve(1));
    }

    #[test]
    fn what_was_sent_and_lost_is_told_by_plugin() {
        let shipping = LogShipping::default();
        let queue: Arc<dyn Queue> = Arc::new(Full(AtomicUsize::new(7)));
        shipping.watch(Arc::downgrade(&queue));
        shipping.counts("http-logger").sent.add(5);
        shipping.counts("http-logger").lost(Loss::Memory, 2);
        let mut out = Exposition::default();
        shipping.expose(&mut out, "apisix_");
        let text = out.finish();
        for line in [
            "apisix_batch_process_entries{name=\"q\"} 7",
            "postern_log_entries_sent_total{plugin=\"http-logger\"} 5",
            "postern_log_entries_dropped_total{plugin=\"http-logger\",reason=\"memory\"} 2",
            "postern_log_entries_dropped_total{plugin=\"http-logger\",reason=\"send_failed\"} 0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
    }
}
