//! The way from a store to the compile loop: a bounded channel that never loses a change.
//!
//! Stores tell the feed what happened and go on; a task carries it to the receiver. While the receiver is
//! busy, changes are merged by key (the last one counts) and a snapshot replaces everything before it, so a
//! slow receiver costs at most one change for each object and never stops a write.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use config::ResourceKey;
use config::graph::Change;
use indexmap::IndexMap;
use tokio::sync::{Notify, mpsc};

use super::{EVENT_CAPACITY, Objects, StoreEvent, StoreStatus, Stored};

/// The sending end. Cheap to clone.
#[derive(Clone)]
pub struct Feed {
    inner: Arc<Inner>,
}

struct Inner {
    pending: Mutex<Pending>,
    told: Notify,
    provider: &'static str,
}

#[derive(Default)]
struct Pending {
    snapshot: Option<(Objects, u64)>,
    changes: IndexMap<ResourceKey, Change>,
    /// The revision of the changes, and of everything told so far.
    revision: u64,
    stale: Option<(SystemTime, String)>,
    /// `stale` differs from what the receiver was told last.
    staleness_changed: bool,
    /// There was a snapshot; changes before the first one are part of it.
    started: bool,
    /// No more events will come.
    closed: bool,
}

impl Feed {
    /// A feed that reports itself as `provider`.
    #[must_use]
    pub fn new(provider: &'static str) -> Feed {
        Feed { inner: Arc::new(Inner { pending: Mutex::default(), told: Notify::new(), provider }) }
    }

    /// Everything there is now. Forgets what was not delivered yet.
    pub fn snapshot(&self, objects: Vec<Stored>, revision: u64) {
        let mut pending = self.pending();
        pending.started = true;
        pending.changes.clear();
        pending.snapshot = Some((objects.into(), revision));
        pending.revision = revision;
        drop(pending);
        self.inner.told.notify_one();
    }

    /// What changed since. Nothing, before the first snapshot: that will have it.
    pub fn changes(&self, changes: impl IntoIterator<Item = Change>, revision: u64) {
        let mut pending = self.pending();
        if !pending.started {
            return;
        }
        for change in changes {
            let key = change.key().clone();
            // Taken out first: the order of the last writes counts, not that of the first.
            pending.changes.shift_remove(&key);
            pending.changes.insert(key, change);
        }
        pending.revision = revision;
        drop(pending);
        self.inner.told.notify_one();
    }

    /// What was told may be old. The first `since` stays until [`Feed::fresh`].
    pub fn stale(&self, since: SystemTime, why: impl Into<String>) {
        let why = why.into();
        let mut pending = self.pending();
        let since = pending.stale.as_ref().map_or(since, |(first, _)| *first);
        if pending.stale.as_ref().is_some_and(|(_, old)| *old == why) {
            return;
        }
        tracing::warn!(provider = self.inner.provider, why, "configuration may be stale");
        pending.stale = Some((since, why));
        pending.staleness_changed = true;
        drop(pending);
        self.inner.told.notify_one();
    }

    /// What was told is current.
    pub fn fresh(&self) {
        let mut pending = self.pending();
        if pending.stale.take().is_none() {
            return;
        }
        tracing::info!(
            provider = self.inner.provider,
            revision = pending.revision,
            "configuration is current again"
        );
        pending.staleness_changed = true;
        drop(pending);
        self.inner.told.notify_one();
    }

    /// No more events: the receiver sees the end after what is pending.
    pub fn close(&self) {
        self.pending().closed = true;
        self.inner.told.notify_one();
    }

    /// How the store is, as told.
    #[must_use]
    pub fn status(&self) -> StoreStatus {
        let pending = self.pending();
        StoreStatus {
            provider: self.inner.provider,
            revision: pending.revision,
            stale: pending.stale.clone(),
            problems: Vec::new(),
        }
    }

    /// Start the task that carries events. Must be called inside a tokio runtime; the task ends with the
    /// receiver or after [`Feed::close`].
    #[must_use]
    pub fn subscribe(&self) -> mpsc::Receiver<StoreEvent> {
        let (events, receiver) = mpsc::channel(EVENT_CAPACITY);
        let feed = self.clone();
        tokio::spawn(async move {
            loop {
                let (batch, closed) = feed.take();
                for event in batch {
                    if events.send(event).await.is_err() {
                        return;
                    }
                }
                if closed {
                    return;
                }
                tokio::select! {
                    () = feed.inner.told.notified() => {}
                    () = events.closed() => return,
                }
            }
        });
        receiver
    }

    fn take(&self) -> (Vec<StoreEvent>, bool) {
        let mut pending = self.pending();
        let mut events = Vec::new();
        if let Some((changes, revision)) = pending.snapshot.take() {
            events.push(StoreEvent::Snapshot { changes, revision });
        }
        if !pending.changes.is_empty() {
            let changes = std::mem::take(&mut pending.changes).into_values().collect();
            events.push(StoreEvent::Changes { changes, revision: pending.revision });
        }
        if std::mem::take(&mut pending.staleness_changed) {
            events.push(match pending.stale.clone() {
                Some((since, why)) => StoreEvent::Stale { since, why },
                None => StoreEvent::Fresh,
            });
        }
        (events, pending.closed)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        // Nothing that can panic runs under the lock; a poisoned one is as good as any.
        self.inner.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use config::Kind;
    use serde_json::json;

    use super::*;

    fn put(id: &str, modified_index: u64) -> Change {
        Change::Put {
            key: ResourceKey::new(Kind::Route, id),
            value: json!({"uri": "/"}),
            created_index: 1,
            modified_index,
        }
    }

    fn stored(id: &str, modified_index: u64) -> Stored {
        let value = bytes::Bytes::from_static(br#"{"uri":"/"}"#);
        Stored { key: ResourceKey::new(Kind::Route, id), value, created_index: 1, modified_index }
    }

    #[tokio::test]
    async fn a_slow_receiver_gets_the_last_change_of_each_key_in_order() {
        let feed = Feed::new("test");
        feed.snapshot(vec![stored("1", 1)], 1);
        for revision in 2..1000 {
            feed.changes([put("1", revision)], revision);
        }
        feed.changes([put("2", 1000)], 1000);
        feed.changes([put("1", 1001)], 1001);
        let mut events = feed.subscribe();
        let StoreEvent::Snapshot { changes, revision: 1 } = events.recv().await.unwrap() else {
            panic!("snapshot first");
        };
        assert_eq!(changes.len(), 1);
        let StoreEvent::Changes { changes, revision: 1001 } = events.recv().await.unwrap() else {
            panic!("then the changes");
        };
        let seen: Vec<(String, u64)> =
            changes.iter().map(|change| (change.key().to_string(), change.modified_index())).collect();
        assert_eq!(seen, [("routes/2".to_owned(), 1000), ("routes/1".to_owned(), 1001)]);
    }

    #[tokio::test]
    async fn a_snapshot_replaces_what_was_not_delivered() {
        let feed = Feed::new("test");
        feed.snapshot(vec![stored("1", 1)], 1);
        feed.changes([put("2", 2)], 2);
        feed.snapshot(vec![stored("3", 3)], 3);
        let mut events = feed.subscribe();
        let StoreEvent::Snapshot { changes, revision: 3 } = events.recv().await.unwrap() else {
            panic!("one snapshot");
        };
        assert_eq!(changes.len(), 1);
        feed.close();
        assert!(events.recv().await.is_none());
    }

    #[tokio::test]
    async fn staleness_is_told_once_and_keeps_its_beginning() {
        let feed = Feed::new("test");
        let first = SystemTime::UNIX_EPOCH;
        feed.stale(first, "away");
        feed.stale(SystemTime::now(), "away");
        feed.stale(SystemTime::now(), "still away");
        let mut events = feed.subscribe();
        let StoreEvent::Stale { since, why } = events.recv().await.unwrap() else { panic!("stale") };
        assert_eq!((since, why.as_str()), (first, "still away"));
        feed.fresh();
        feed.fresh();
        assert!(matches!(events.recv().await, Some(StoreEvent::Fresh)));
        feed.close();
        assert!(events.recv().await.is_none());
    }
}
