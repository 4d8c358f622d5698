//! The store in memory that is put as a whole by `PUT /apisix/admin/configs`: for controllers that know
//! everything and send all of it.
//!
//! Each kind has a version. A put with a greater one (or none) replaces the kind, with the same one leaves it,
//! with a smaller one is refused. An object that comes again with the `modifiedIndex` it had is the object
//! that is there, whatever it says. What was put last is kept on disk: a restart serves it until the next put.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use config::apisix_yaml::FileItem;
use config::graph::Change;
use config::{Kind, ResourceKey};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::snapshot_file::{Keeper, Saved, SnapshotFile};
use super::{
    BoxFuture, DeleteOptions, Feed, Put, PutOptions, Store, StoreError, StoreEvent, StoreStatus, Stored,
};

/// The standalone store.
pub struct Standalone {
    shared: Arc<Shared>,
    keeper: OnceLock<Keeper>,
}

struct Shared {
    feed: Feed,
    snapshot: SnapshotFile,
    state: Mutex<State>,
}

#[derive(Clone, Default)]
struct State {
    current: Current,
    items: BTreeMap<ResourceKey, Served>,
    revision: u64,
    restored: Option<SystemTime>,
}

/// An object as it is served, and the index it was sent with.
#[derive(Clone)]
struct Served {
    stored: Stored,
    sent_index: Option<u64>,
}

/// The configuration as it was put.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Current {
    /// The list of each kind, as JSON. A kind that has none is not there.
    pub lists: BTreeMap<Kind, Bytes>,
    /// The version of each kind; 0 where it is not there.
    pub versions: BTreeMap<Kind, u64>,
    /// What the client calls this configuration.
    pub digest: Option<String>,
    /// When it was put: seconds since 1970.
    pub last_modified: u64,
}

/// A configuration to take, all of it checked.
#[derive(Clone, Debug, Default)]
pub struct NewConfig {
    /// The kinds to replace, with their new versions. Others stay.
    pub versions: BTreeMap<Kind, u64>,
    /// The list of each kind, as JSON.
    pub lists: BTreeMap<Kind, Bytes>,
    /// The objects of the kinds to replace.
    pub items: Vec<FileItem>,
    /// What the client calls it.
    pub digest: String,
    /// Seconds since 1970.
    pub last_modified: u64,
}

impl Standalone {
    /// The store as it was put last, or an empty one. Reads the snapshot in `data_dir`, so it blocks.
    #[must_use]
    pub fn open(data_dir: &Path) -> Standalone {
        let snapshot = SnapshotFile::new(data_dir, "standalone", "");
        let state =
            snapshot.load().map_or_else(State::default, |(saved, since)| State::restore(saved, since));
        let shared = Shared { feed: Feed::new("standalone"), snapshot, state: Mutex::new(state) };
        Standalone { shared: Arc::new(shared), keeper: OnceLock::new() }
    }

    /// What was put last.
    #[must_use]
    pub fn current(&self) -> Current {
        self.shared.state().current.clone()
    }

    /// The version of a kind: 0 before the first put.
    #[must_use]
    pub fn version(&self, kind: Kind) -> u64 {
        self.shared.state().current.versions.get(&kind).copied().unwrap_or(0)
    }

    /// What the client calls what was put last.
    #[must_use]
    pub fn digest(&self) -> Option<String> {
        self.shared.state().current.digest.clone()
    }

    /// What is there was put, also if it was put before a restart.
    pub fn confirm(&self) {
        self.shared.state().restored = None;
        self.shared.feed.fresh();
    }

    /// Take a configuration.
    pub fn replace(&self, new: NewConfig) {
        let mut state = self.shared.state();
        let changes = state.take(new);
        let revision = state.revision;
        drop(state);
        self.shared.feed.changes(changes, revision);
        self.shared.feed.fresh();
        if let Some(keeper) = self.keeper.get() {
            keeper.changed();
        }
    }

    fn refuse<T: Send + 'static>() -> BoxFuture<'static, Result<T, StoreError>> {
        let provider = "PUT /apisix/admin/configs".to_owned();
        Box::pin(async move { Err(StoreError::ReadOnly { provider }) })
    }
}

impl Store for Standalone {
    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        self.keeper.get_or_init(|| {
            let shared = Arc::downgrade(&self.shared);
            Keeper::start(
                self.shared.snapshot.clone(),
                Arc::new(move |file: &SnapshotFile| {
                    let saved = shared.upgrade()?.state().save();
                    Some(file.write(&saved))
                }),
            )
        });
        let state = self.shared.state();
        let objects = state.items.values().map(|served| served.stored.clone()).collect();
        self.shared.feed.snapshot(objects, state.revision);
        if let Some(since) = state.restored {
            self.shared.feed.stale(since, "restored from disk; nothing was put since the start");
        }
        self.shared.feed.subscribe()
    }

    fn get<'a>(&'a self, key: &'a ResourceKey) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        let found = self.shared.state().items.get(key).map(|served| served.stored.clone());
        Box::pin(async move { Ok(found) })
    }

    fn list(&self, kind: Kind) -> BoxFuture<'_, Result<Vec<Stored>, StoreError>> {
        let state = self.shared.state();
        let all = state.items.values().map(|served| &served.stored);
        let found: Vec<Stored> = all.filter(|item| item.key.kind == kind).cloned().collect();
        drop(state);
        Box::pin(async move { Ok(found) })
    }

    fn put<'a>(
        &'a self,
        _: &'a ResourceKey,
        _: Value,
        _: PutOptions,
    ) -> BoxFuture<'a, Result<Put, StoreError>> {
        Standalone::refuse()
    }

    fn delete<'a>(&'a self, _: &'a ResourceKey, _: DeleteOptions) -> BoxFuture<'a, Result<bool, StoreError>> {
        Standalone::refuse()
    }

    fn generate_id(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Standalone::refuse()
    }

    fn status(&self) -> StoreStatus {
        self.shared.feed.status()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kind whose list an object stands in.
#[must_use]
pub fn list_of(kind: Kind) -> Kind {
    kind.folder()
}

impl State {
    fn take(&mut self, new: NewConfig) -> Vec<Change> {
        self.revision += 1;
        let revision = self.revision;
        let mut old = std::mem::take(&mut self.items);
        let mut changes = Vec::new();
        for item in new.items {
            if !new.versions.contains_key(&list_of(item.key.kind)) {
                continue;
            }
            let before = old.remove(&item.key);
            let served = match before {
                // The same index means the same object.
                Some(before) if item.modified_index.is_some() && before.sent_index == item.modified_index => {
                    before
                }
                before => {
                    let modified_index = item.modified_index.unwrap_or(revision);
                    let created_index = before.map_or(modified_index, |before| before.stored.created_index);
                    let value = Bytes::from(item.value().to_string());
                    let stored = Stored { key: item.key.clone(), value, created_index, modified_index };
                    changes.push(stored.to_change());
                    Served { stored, sent_index: item.modified_index }
                }
            };
            self.items.insert(item.key, served);
        }
        for (key, served) in old {
            if new.versions.contains_key(&list_of(key.kind)) {
                changes.push(Change::Delete { key, modified_index: revision });
            } else {
                self.items.insert(key, served);
            }
        }
        for (kind, version) in new.versions {
            self.current.versions.insert(kind, version);
            self.current.lists.remove(&kind);
        }
        self.current.lists.extend(new.lists);
        self.current.digest = Some(new.digest);
        self.current.last_modified = new.last_modified;
        self.restored = None;
        changes
    }

    fn save(&self) -> Saved {
        let by_name = |(kind, number): (&Kind, &u64)| (kind.segment().to_owned(), json!(number));
        let versions: Map<String, Value> = self.current.versions.iter().map(by_name).collect();
        let list = |(kind, list): (&Kind, &Bytes)| {
            (kind.segment().to_owned(), Value::String(String::from_utf8_lossy(list).into_owned()))
        };
        let lists: Map<String, Value> = self.current.lists.iter().map(list).collect();
        let sent = self
            .items
            .values()
            .filter_map(|served| Some((served.stored.key.to_string(), json!(served.sent_index?))));
        let sent: Map<String, Value> = sent.collect();
        Saved {
            revision: self.revision,
            items: self.items.values().map(|served| served.stored.clone()).collect(),
            extra: json!({
                "versions": versions,
                "lists": lists,
                "sent": sent,
                "digest": self.current.digest,
                "last_modified": self.current.last_modified,
            }),
        }
    }

    fn restore(saved: Saved, since: SystemTime) -> State {
        let Saved { revision, items, extra } = saved;
        let member = |name: &str| extra.get(name).and_then(Value::as_object).into_iter().flatten();
        let mut state = State { revision, restored: Some(since), ..State::default() };
        for (kind, version) in member("versions") {
            if let (Some(kind), Some(version)) = (Kind::from_segment(kind), version.as_u64()) {
                state.current.versions.insert(kind, version);
            }
        }
        for (kind, list) in member("lists") {
            if let (Some(kind), Some(list)) = (Kind::from_segment(kind), list.as_str()) {
                state.current.lists.insert(kind, Bytes::from(list.to_owned()));
            }
        }
        state.current.digest = extra.get("digest").and_then(Value::as_str).map(str::to_owned);
        state.current.last_modified = extra.get("last_modified").and_then(Value::as_u64).unwrap_or(0);
        let sent = extra.get("sent");
        for stored in items {
            let sent_index = sent.and_then(|sent| sent.get(stored.key.to_string())?.as_u64());
            state.items.insert(stored.key.clone(), Served { stored, sent_index });
        }
        state
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use config::{ApisixYaml, Document};

    use super::*;

    /// A configuration as the Admin API would hand it on.
    fn new(digest: &str, version: u64, json: &str) -> NewConfig {
        let document = Document::json("body", json).unwrap();
        let mut new = NewConfig { digest: digest.to_owned(), last_modified: 7, ..NewConfig::default() };
        for kind in Kind::LISTED {
            if let Some(list) = document.value().get(kind.segment()) {
                new.versions.insert(kind, version);
                new.lists.insert(kind, Bytes::from(list.to_string()));
            }
        }
        new.items = ApisixYaml::read(document).unwrap().items().to_vec();
        new
    }

    async fn next(events: &mut mpsc::Receiver<StoreEvent>) -> Vec<String> {
        let changes: Vec<Change> = match events.recv().await.unwrap() {
            StoreEvent::Snapshot { changes, .. } => changes.into_iter().collect(),
            StoreEvent::Changes { changes, .. } => changes,
            other => panic!("{other:?}"),
        };
        let told = |change: Change| match change {
            Change::Put { key, value, modified_index, .. } => {
                format!("{key} {} at {modified_index}", value.get("uri").unwrap_or(&Value::Null))
            }
            Change::Delete { key, .. } => format!("{key} gone"),
        };
        changes.into_iter().map(told).collect()
    }

    #[tokio::test]
    async fn an_object_with_the_same_index_is_the_same_object() {
        let data = tempfile::tempdir().unwrap();
        let store = Standalone::open(data.path());
        let mut events = store.watch();
        assert_eq!(next(&mut events).await, Vec::<String>::new());
        store.replace(new(
            "1",
            1,
            r#"{"routes": [{"id": "a", "uri": "/1", "modifiedIndex": 5}, {"id": "b", "uri": "/1"}]}"#,
        ));
        assert_eq!(next(&mut events).await, [r#"routes/a "/1" at 5"#, r#"routes/b "/1" at 1"#]);
        store.replace(new(
            "2",
            2,
            r#"{"routes": [{"id": "a", "uri": "/2", "modifiedIndex": 5}, {"id": "b", "uri": "/2"}]}"#,
        ));
        assert_eq!(next(&mut events).await, [r#"routes/b "/2" at 2"#]);
        store.replace(new("3", 3, r#"{"routes": [{"id": "a", "uri": "/3", "modifiedIndex": 6}]}"#));
        assert_eq!(next(&mut events).await, [r#"routes/a "/3" at 6"#, "routes/b gone"]);
        // A kind that is not replaced stays.
        store.replace(new("4", 1, r#"{"services": [{"id": "s"}]}"#));
        assert_eq!(next(&mut events).await, ["services/s null at 4"]);
        assert_eq!(store.version(Kind::Route), 3);
        assert_eq!(store.list(Kind::Route).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_restart_serves_what_was_put_last_and_says_so() {
        let data = tempfile::tempdir().unwrap();
        let store = Standalone::open(data.path());
        let _events = store.watch();
        store.replace(new(
            "one",
            3,
            r#"{"routes": [{"id": "a", "uri": "/1", "modifiedIndex": 5}], "consumers": []}"#,
        ));
        let saved = store.shared.state().save();
        store.shared.snapshot.write(&saved).unwrap();
        let current = store.current();
        drop(store);
        let store = Standalone::open(data.path());
        assert_eq!(store.current(), current);
        let mut events = store.watch();
        assert_eq!(next(&mut events).await, [r#"routes/a "/1" at 5"#]);
        assert!(matches!(events.recv().await, Some(StoreEvent::Stale { .. })));
        store.confirm();
        assert!(matches!(events.recv().await, Some(StoreEvent::Fresh)));
        // The index is remembered too.
        store.replace(new("two", 4, r#"{"routes": [{"id": "a", "uri": "/2", "modifiedIndex": 5}]}"#));
        assert!(
            store
                .get(&ResourceKey::new(Kind::Route, "a"))
                .await
                .unwrap()
                .unwrap()
                .value
                .ends_with(b"\"/1\"}")
        );
    }
}
