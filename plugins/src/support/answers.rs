//! Answers of somebody who is asked over the network, kept for a while and within a bound.
//!
//! Who asks for the same thing while the question is on its way waits for that answer: a thousand requests with one
//! credential are one question. The question runs on the control runtime and is finished even if everybody leaves.
//! One table for all workers, locked for a look-up only: a table each would ask once per worker.

use std::collections::HashMap;
use std::future::Future;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

/// What a question is found by: a digest, so that no credential is kept.
pub type Key = [u8; 32];

/// The key of a question with these parts.
pub fn key(parts: &[&[u8]]) -> Key {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    digest.finalize().into()
}

/// A table of answers.
pub struct Answers<V> {
    table: Arc<Table<V>>,
    control: Handle,
}

impl<V> Clone for Answers<V> {
    fn clone(&self) -> Self {
        Self { table: self.table.clone(), control: self.control.clone() }
    }
}

struct Table<V> {
    state: Mutex<State<V>>,
    limit: usize,
}

struct State<V> {
    /// Two generations: when the young one is half of the limit, the old one goes. Nothing has to be searched.
    young: HashMap<Key, (V, Instant)>,
    old: HashMap<Key, (V, Instant)>,
    asking: HashMap<Key, watch::Receiver<Option<V>>>,
}

impl<V> Table<V> {
    fn lock(&self) -> MutexGuard<'_, State<V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V: Clone> State<V> {
    fn known(&self, key: &Key, now: Instant) -> Option<V> {
        let (value, until) = self.young.get(key).or_else(|| self.old.get(key))?;
        (now < *until).then(|| value.clone())
    }

    fn keep(&mut self, key: Key, value: V, until: Instant, limit: usize) {
        if self.young.len() >= (limit / 2).max(1) {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(key, (value, until));
    }
}

/// Takes the question off the list, however it ends.
struct Asked<V> {
    table: Arc<Table<V>>,
    key: Key,
}

impl<V> Drop for Asked<V> {
    fn drop(&mut self) {
        self.table.lock().asking.remove(&self.key);
    }
}

impl<V: Clone + Send + Sync + 'static> Answers<V> {
    /// A table of at most `limit` answers, and as many questions on their way.
    pub fn new(limit: usize, control: &Handle) -> Self {
        let state = State { young: HashMap::new(), old: HashMap::new(), asking: HashMap::new() };
        Self { table: Arc::new(Table { state: Mutex::new(state), limit }), control: control.clone() }
    }

    /// The answer that is known, or what `ask` gives, with how long that is good for; with nothing it is not kept.
    /// Nothing when too many questions are on their way, or the question came to no end.
    pub async fn get<F>(&self, key: Key, ask: impl FnOnce() -> F) -> Option<V>
    where
        F: Future<Output = (V, Option<Duration>)> + Send + 'static,
    {
        let mut receiver = {
            let mut state = self.table.lock();
            if let Some(known) = state.known(&key, Instant::now()) {
                return Some(known);
            }
            match state.asking.get(&key) {
                Some(asking) => asking.clone(),
                None if state.asking.len() >= self.table.limit => return None,
                None => {
                    let (sender, receiver) = watch::channel(None);
                    state.asking.insert(key, receiver.clone());
                    let asked = Asked { table: self.table.clone(), key };
                    let question = ask();
                    self.control.spawn(async move {
                        let (value, good) = question.await;
                        if let Some(good) = good {
                            let table = &asked.table;
                            table.lock().keep(key, value.clone(), Instant::now() + good, table.limit);
                        }
                        drop(asked);
                        let _ = sender.send(Some(value));
                    });
                    receiver
                }
            }
        };
        receiver.wait_for(Option::is_some).await.ok()?.clone()
    }

    /// Forgets an answer.
    pub fn forget(&self, key: &Key) {
        let mut state = self.table.lock();
        state.young.remove(key);
        state.old.remove(key);
    }

    /// How many answers are kept.
    #[cfg(test)]
    fn len(&self) -> usize {
        let state = self.table.lock();
        state.young.len() + state.old.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn asks(
        count: &Arc<AtomicUsize>,
        good: Option<u64>,
    ) -> impl Future<Output = (usize, Option<Duration>)> + Send + use<> {
        let count = count.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            (count.fetch_add(1, Ordering::SeqCst), good.map(Duration::from_secs))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn equal_questions_are_one_and_the_answer_is_kept_for_its_time() {
        let answers = Answers::new(10, &Handle::current());
        let count = Arc::default();
        let (a, b) = tokio::join!(
            answers.get(key(&[b"a"]), || asks(&count, Some(60))),
            answers.get(key(&[b"a"]), || asks(&count, Some(60))),
        );
        assert_eq!((a, b), (Some(0), Some(0)));
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(answers.get(key(&[b"a"]), || asks(&count, None)).await, Some(0));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(answers.get(key(&[b"a"]), || asks(&count, None)).await, Some(1), "too old");
        assert_eq!(answers.get(key(&[b"a"]), || asks(&count, Some(60))).await, Some(2), "not kept");
        answers.forget(&key(&[b"a"]));
        assert_eq!(answers.get(key(&[b"a"]), || asks(&count, None)).await, Some(3), "forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_does_not_end_the_question_of_the_others() {
        let answers = Answers::new(10, &Handle::current());
        let count = Arc::default();
        let first = answers.get(key(&[b"a"]), || asks(&count, Some(60)));
        assert!(tokio::time::timeout(Duration::from_millis(1), first).await.is_err());
        assert_eq!(answers.get(key(&[b"a"]), || asks(&count, None)).await, Some(0));
        let gone = answers.get(key(&[b"b"]), || async { panic!("asked badly") });
        assert_eq!(gone.await, None);
        assert_eq!(answers.get(key(&[b"b"]), || asks(&count, None)).await, Some(1), "and can be asked again");
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded() {
        let answers = Answers::new(10, &Handle::current());
        let count = Arc::default();
        for n in 0..1_000_u32 {
            answers.get(key(&[&n.to_be_bytes()]), || asks(&count, Some(60))).await;
            assert!(answers.len() <= 10);
        }
        let mut waiting = Vec::new();
        for n in 0..11_u8 {
            let mut one = Box::pin(answers.get(key(&[&[n]]), || asks(&count, None)));
            let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(one.as_mut().poll(cx))).await;
            assert_eq!(polled.is_ready(), n == 10, "{n}");
            waiting.push(one);
        }
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
    }
}
