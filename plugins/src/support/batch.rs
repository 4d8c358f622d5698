//! Log entries gathered into batches and sent by the control runtime.
//!
//! A worker hands an entry over by an unbounded channel after it has asked the bounds: entries and bytes that wait are
//! counted, and what is over is dropped and counted, so no worker ever waits. Batches end by size, by idleness or by
//! age; a failed one is tried again with growing pauses. When the last plugin that holds a queue is gone, the queue
//! sends what it has and ends.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use config::error::ConfigError;
use layers::plugin::BuildEnv;
use layers::telemetry::log_shipping::{Loss, Queue, Shipped};
use layers::telemetry::metrics::Metrics;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

/// Entries of one queue that may wait, unless `max_pending_entries` says otherwise.
const ENTRIES: usize = 100_000;
/// Bytes of one queue that may wait.
const BYTES: usize = 64 << 20;
/// A batch is sent though it is not full when its entries take more bytes than this.
const BATCH_BYTES: usize = 4 << 20;
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The pause between attempts when the process ends.
const SHORT_PAUSE: Duration = Duration::from_millis(100);
/// Failures are told in the log this often; the metrics tell of all.
const TELL: Duration = Duration::from_secs(10);

/// How entries are gathered and sent.
#[derive(Clone, Debug)]
pub struct BatchSettings {
    /// What the operator calls the queue.
    pub name: String,
    /// Entries of a full batch.
    pub size: usize,
    /// A batch is sent when no entry came for so long.
    pub idle: Duration,
    /// A batch is sent when its first entry is so old.
    pub age: Duration,
    /// Further attempts after a failed one.
    pub retries: u32,
    /// The pause before the first further attempt; it doubles with each.
    pub pause: Duration,
    /// Entries that may wait.
    pub pending: Option<usize>,
    /// What an attempt may take.
    pub timeout: Duration,
    /// Batches that may be on their way at once. With one, entries keep their order.
    pub at_once: usize,
}

/// Where batches go.
pub trait Sink: Send + Sync + 'static {
    /// One entry.
    type Entry: Send + Sync + 'static;

    /// Sends a batch. Given up after [`BatchSettings::timeout`].
    fn send(&self, batch: &[Self::Entry]) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// A batch, or a part of it, was not taken.
#[derive(Debug)]
pub struct Failure {
    problem: String,
    again: Again,
}

#[derive(Debug)]
enum Again {
    All,
    Nothing,
    /// Places in the batch of entries worth another attempt, and how many are refused for good.
    Some(Vec<usize>, usize),
}

impl Failure {
    /// Nothing was taken; another attempt may help.
    pub fn retryable(problem: impl Into<String>) -> Self {
        Self { problem: problem.into(), again: Again::All }
    }

    /// Nothing was taken, and the same bytes will not be taken another time.
    pub fn permanent(problem: impl Into<String>) -> Self {
        Self { problem: problem.into(), again: Again::Nothing }
    }

    /// Everything was taken but the entries at the places `again`, which may be sent again, and `refused` others.
    pub fn partial(problem: impl Into<String>, again: Vec<usize>, refused: usize) -> Self {
        Self { problem: problem.into(), again: Again::Some(again, refused) }
    }
}

/// A queue of entries for one destination.
pub struct Batch<T> {
    entries: mpsc::UnboundedSender<(T, usize)>,
    state: Arc<State>,
}

/// What the queue and its task share.
struct State {
    plugin: &'static str,
    settings: BatchSettings,
    shipped: Arc<Shipped>,
    metrics: Arc<Metrics>,
    waiting: AtomicUsize,
    bytes: AtomicUsize,
    hurry: watch::Sender<bool>,
    /// The process ends: what is released from now on is already counted as lost.
    abandoned: AtomicBool,
    told: Mutex<Option<Instant>>,
}

impl Queue for State {
    fn name(&self) -> &str {
        &self.settings.name
    }

    fn entries(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    fn hurry(&self) {
        self.hurry.send_replace(true);
    }

    fn abandon(&self) {
        if !self.abandoned.swap(true, Ordering::Relaxed) {
            self.shipped.lost(Loss::Shutdown, self.entries() as u64);
        }
    }
}

impl State {
    /// Room for an entry of that many bytes, or why there is none.
    fn admit(&self, bytes: usize) -> Result<(), Loss> {
        let limit = self.settings.pending.unwrap_or(ENTRIES);
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= limit {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(Loss::Entries);
        }
        let here = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if here.saturating_add(bytes) <= BYTES && self.metrics.logs.reserve(bytes) {
            return Ok(());
        }
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        Err(Loss::Memory)
    }

    fn release(&self, entries: usize, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.metrics.logs.release(bytes);
        self.waiting.fetch_sub(entries, Ordering::AcqRel);
    }

    fn hurries(&self) -> bool {
        *self.hurry.borrow()
    }

    /// Entries are lost for good.
    fn lost(&self, entries: usize, problem: &str) {
        if entries == 0 || self.abandoned.load(Ordering::Relaxed) {
            return;
        }
        self.shipped.lost(Loss::Refused, entries as u64);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|at| at.elapsed() >= TELL) {
            *told = Some(Instant::now());
            let State { plugin, settings: BatchSettings { name, .. }, .. } = self;
            // Its own target, so that a logger of the error log does not feed on its own failures.
            tracing::warn!(target: FAILURES, plugin, name, entries, problem, "log entries lost");
        }
    }

    /// The pause before further attempt number `attempt`: it doubles, and varies so that many do not come at once.
    fn pause(&self, attempt: u32) -> Duration {
        if self.hurries() {
            return SHORT_PAUSE;
        }
        let doubled = self.settings.pause.saturating_mul(1 << attempt.saturating_sub(1).min(16));
        doubled.min(LONGEST_PAUSE).mul_f64(0.75 + fastrand::f64() * 0.5)
    }
}

/// The target of messages about entries that could not be sent.
pub const FAILURES: &str = "postern::log_shipping";

impl<T: Send + Sync + 'static> Batch<T> {
    /// Starts a queue whose batches go to `sink`.
    pub fn start<S: Sink<Entry = T>>(
        env: &BuildEnv<'_>,
        plugin: &'static str,
        settings: BatchSettings,
        sink: S,
    ) -> Self {
        let (entries, incoming) = mpsc::unbounded_channel();
        let state = Arc::new(State {
            plugin,
            settings,
            shipped: env.metrics.logs.counts(plugin),
            metrics: env.metrics.clone(),
            waiting: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            hurry: watch::Sender::new(false),
            abandoned: AtomicBool::new(false),
            told: Mutex::new(None),
        });
        let queue: Arc<dyn Queue> = state.clone();
        env.metrics.logs.watch(Arc::downgrade(&queue));
        env.control.spawn(gather(incoming, state.clone(), Arc::new(sink)));
        Self { entries, state }
    }

    /// Hands an entry over that takes about `bytes`. Dropped and counted where too much waits.
    pub fn push(&self, entry: T, bytes: usize) {
        if let Err(loss) = self.state.admit(bytes) {
            self.state.shipped.lost(loss, 1);
        } else if self.entries.send((entry, bytes)).is_err() {
            // The control runtime is gone.
            self.state.release(1, bytes);
            self.state.shipped.lost(Loss::Shutdown, 1);
        }
    }
}

/// The queue of a plugin with these settings, kept over reloads and shared by all objects that have the same.
///
/// # Errors
/// The settings cannot be written as JSON; a defect of their type.
pub fn shared<S: Sink>(
    env: &BuildEnv<'_>,
    plugin: &'static str,
    config: &impl Serialize,
    settings: BatchSettings,
    sink: S,
) -> Result<Arc<Batch<S::Entry>>, ConfigError> {
    let config = config::typed::to_value(config)?;
    // The settings may hold credentials, and a key stays in memory.
    let digest = Sha256::digest(format!("{config} {:?}", env.metadata));
    let key = digest.iter().fold(format!("{plugin}/queue/"), |key, byte| format!("{key}{byte:02x}"));
    Ok(env.carry.get_or(&key, || Batch::start(env, plugin, settings, sink)))
}

/// Makes batches until nobody can add to them.
async fn gather<S: Sink>(
    mut incoming: mpsc::UnboundedReceiver<(S::Entry, usize)>,
    state: Arc<State>,
    sink: Arc<S>,
) {
    let slots = Arc::new(Semaphore::new(state.settings.at_once.max(1)));
    let mut hurry = state.hurry.subscribe();
    let mut open = true;
    while open {
        let Some((first, bytes)) = incoming.recv().await else { break };
        let began = Instant::now();
        let mut last = began;
        let (mut batch, mut taken) = (vec![first], bytes);
        while batch.len() < state.settings.size && taken < BATCH_BYTES {
            let next = match incoming.try_recv() {
                Ok(next) => Some(next),
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    let until = (last + state.settings.idle).min(began + state.settings.age);
                    tokio::select! {
                        biased;
                        next = incoming.recv() => next,
                        _ = hurry.wait_for(|hurry| *hurry) => break,
                        () = tokio::time::sleep_until(until) => break,
                    }
                }
            };
            let Some((entry, bytes)) = next else {
                open = false;
                break;
            };
            last = Instant::now();
            batch.push(entry);
            taken += bytes;
        }
        // Closed only by its owner, which is this function.
        let Ok(slot) = slots.clone().acquire_owned().await else { break };
        let (state, sink) = (state.clone(), sink.clone());
        tokio::spawn(async move {
            deliver(batch, taken, &state, &*sink).await;
            drop(slot);
        });
    }
}

/// Sends a batch, again if that helps, and gives its room back.
async fn deliver<S: Sink>(mut batch: Vec<S::Entry>, bytes: usize, state: &State, sink: &S) {
    let all = batch.len();
    let mut attempt = 0;
    loop {
        let sent = tokio::time::timeout(state.settings.timeout, sink.send(&batch)).await;
        let failure = match sent {
            Ok(Ok(())) => {
                state.shipped.sent.add(batch.len() as u64);
                break;
            }
            Ok(Err(failure)) => failure,
            Err(_) => Failure::retryable(format!("not sent within {:?}", state.settings.timeout)),
        };
        let Failure { problem, again } = failure;
        match again {
            Again::All => {}
            Again::Nothing => {
                state.lost(batch.len(), &problem);
                break;
            }
            Again::Some(places, refused) => {
                state.shipped.sent.add((batch.len().saturating_sub(places.len() + refused)) as u64);
                state.lost(refused, &problem);
                let mut place = 0;
                batch.retain(|_| {
                    place += 1;
                    places.contains(&(place - 1))
                });
                if batch.is_empty() {
                    break;
                }
            }
        }
        if attempt >= state.settings.retries {
            state.lost(batch.len(), &problem);
            break;
        }
        attempt += 1;
        tracing::debug!(plugin = state.plugin, name = state.settings.name, attempt, problem, "sending again");
        let mut hurry = state.hurry.subscribe();
        let pause = state.pause(attempt);
        if state.hurries() {
            tokio::time::sleep(pause).await;
        } else {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = hurry.wait_for(|hurry| *hurry) => {}
            }
        }
    }
    state.release(all, bytes);
}

#[cfg(test)]
mod tests {
    use layers::testing::TestEnv;

    use super::*;

    /// Keeps batches, and fails as it is told.
    #[derive(Clone, Default)]
    struct Kept {
        batches: Arc<Mutex<Vec<Vec<u32>>>>,
        failures: Arc<Mutex<Vec<Failure>>>,
        stuck: Arc<AtomicBool>,
    }

    impl Sink for Kept {
        type Entry = u32;

        async fn send(&self, batch: &[u32]) -> Result<(), Failure> {
            self.batches.lock().unwrap().push(batch.to_vec());
            if self.stuck.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
            match self.failures.lock().unwrap().pop() {
                Some(failure) => Err(failure),
                None => Ok(()),
            }
        }
    }

    impl Kept {
        fn batches(&self) -> Vec<Vec<u32>> {
            self.batches.lock().unwrap().clone()
        }

        fn fails(&self, failures: Vec<Failure>) {
            *self.failures.lock().unwrap() = failures;
        }
    }

    fn settings() -> BatchSettings {
        BatchSettings {
            name: "test".into(),
            size: 3,
            idle: Duration::from_secs(5),
            age: Duration::from_secs(12),
            retries: 0,
            pause: Duration::from_secs(1),
            pending: None,
            timeout: Duration::from_secs(3),
            at_once: 1,
        }
    }

    fn start(env: &TestEnv, settings: BatchSettings) -> (Batch<u32>, Kept) {
        let kept = Kept::default();
        let batch = env.with(|env| Batch::start(env, "test", settings, kept.clone()));
        (batch, kept)
    }

    async fn pass(seconds: f64) {
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_ends_by_size_by_idleness_and_by_age() {
        let (batch, kept) = start(&TestEnv::default(), settings());
        (1..=4).for_each(|n| batch.push(n, 1));
        pass(0.1).await;
        assert_eq!(kept.batches(), [vec![1, 2, 3]]);
        pass(4.8).await;
        assert_eq!(kept.batches().len(), 1, "the fourth waits");
        pass(0.2).await;
        assert_eq!(kept.batches().last(), Some(&vec![4]));
        for n in 5..7 {
            batch.push(n, 1);
            pass(4.5).await;
        }
        assert_eq!(kept.batches().len(), 2);
        pass(3.1).await;
        assert_eq!(kept.batches().last(), Some(&vec![5, 6]), "12 seconds after the first");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_over_the_bounds_is_dropped_and_counted() {
        let env = TestEnv::default();
        let (batch, kept) = start(&env, BatchSettings { pending: Some(4), ..settings() });
        kept.stuck.store(true, Ordering::Relaxed);
        (0..6).for_each(|n| batch.push(n, 1));
        let shipped = env.metrics.logs.counts("test");
        assert_eq!((shipped.losses(Loss::Entries), shipped.losses(Loss::Memory)), (2, 0));
        let (batch, _) = start(&env, settings());
        batch.push(1, BYTES);
        batch.push(2, 1);
        assert_eq!(shipped.losses(Loss::Memory), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_comes_back_when_a_batch_is_over() {
        let env = TestEnv::default();
        let (batch, kept) = start(&env, settings());
        batch.push(1, BYTES);
        pass(6.0).await;
        batch.push(2, BYTES);
        pass(6.0).await;
        assert_eq!(kept.batches(), [vec![1], vec![2]]);
        assert_eq!(env.metrics.logs.counts("test").sent.value(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_batch_is_sent_again_later_and_later_until_it_is_lost() {
        let env = TestEnv::default();
        let (batch, kept) = start(&env, BatchSettings { retries: 2, ..settings() });
        kept.fails((0..3).map(|_| Failure::retryable("away")).collect());
        let began = Instant::now();
        (0..3).for_each(|n| batch.push(n, 1));
        while kept.batches().len() < 3 {
            pass(0.01).await;
        }
        let took = began.elapsed().as_secs_f64();
        assert!(
            (2.2..=3.8).contains(&took),
            "a pause of 1 s and one of 2 s, each a quarter more or less: {took}"
        );
        pass(0.1).await;
        let shipped = env.metrics.logs.counts("test");
        assert_eq!((shipped.sent.value(), shipped.losses(Loss::Refused)), (0, 3));
        kept.fails(vec![Failure::permanent("nonsense")]);
        (0..3).for_each(|n| batch.push(n, 1));
        pass(10.0).await;
        assert_eq!((kept.batches().len(), shipped.losses(Loss::Refused)), (4, 6));
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_was_not_taken_is_sent_again() {
        let env = TestEnv::default();
        let (batch, kept) = start(&env, BatchSettings { retries: 1, ..settings() });
        kept.fails(vec![Failure::partial("busy", vec![2], 1)]);
        (0..3).for_each(|n| batch.push(n, 1));
        pass(5.0).await;
        assert_eq!(kept.batches(), [vec![0, 1, 2], vec![2]]);
        let shipped = env.metrics.logs.counts("test");
        assert_eq!((shipped.sent.value(), shipped.losses(Loss::Refused)), (2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_has_its_time() {
        let env = TestEnv::default();
        let (batch, kept) = start(&env, settings());
        kept.stuck.store(true, Ordering::Relaxed);
        (0..3).for_each(|n| batch.push(n, 1));
        pass(3.1).await;
        assert_eq!(env.metrics.logs.counts("test").losses(Loss::Refused), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_nobody_holds_sends_the_rest() {
        let (batch, kept) = start(&TestEnv::default(), settings());
        batch.push(1, 1);
        drop(batch);
        pass(0.1).await;
        assert_eq!(kept.batches(), [vec![1]]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_process_sends_at_once_and_counts_the_rest() {
        let env = TestEnv::default();
        let (batch, kept) = start(&env, settings());
        batch.push(1, 1);
        assert_eq!(env.metrics.logs.flush(Duration::from_secs(5)).await, 0);
        assert_eq!(kept.batches(), [vec![1]]);
        let (batch, kept) = start(&env, settings());
        kept.stuck.store(true, Ordering::Relaxed);
        batch.push(2, 1);
        assert_eq!(env.metrics.logs.flush(Duration::from_secs(1)).await, 1);
        assert_eq!(env.metrics.logs.counts("test").losses(Loss::Shutdown), 1);
    }
}
