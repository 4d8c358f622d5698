//! The store in one file: `apisix.yaml` or `apisix.json` beside `config.yaml`, written by people and tools.
//!
//! The directory is watched, not the file, so that editors that replace the file and Kubernetes, which swaps
//! a symbolic link, are noticed; once a second the file is looked at as well, for file systems that say
//! nothing. A file that is broken or not finished changes nothing: what runs goes on, and the place of the
//! error is told. The Admin API cannot write here.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use config::{ApisixYaml, Env, Kind, LocatedError, ProcessEnv, ResourceKey};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::snapshot_file::{Saved, SnapshotFile};
use super::{
    BoxFuture, DeleteOptions, Feed, Put, PutOptions, Store, StoreError, StoreEvent, StoreStatus, Stored,
};

/// How often the file is looked at, whatever the file system tells.
const POLL: Duration = Duration::from_secs(1);
/// How long a file must be quiet before it is read: writers do not write at once.
const QUIET: Duration = Duration::from_millis(20);
/// How long a directory may go without being quiet before the file is read all the same.
const BURST: Duration = Duration::from_millis(200);
/// How often the snapshot is marked as current.
const CONFIRM: Duration = Duration::from_secs(30);

/// Where the snapshot keeps the list `plugins`.
const PLUGINS: &str = "plugins";

/// The file store. Its task ends with it.
pub struct FileStore {
    shared: Arc<Shared>,
    task: OnceLock<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    env: Arc<dyn Env + Send + Sync>,
    feed: Feed,
    snapshot: SnapshotFile,
    /// Told of the list `plugins` of the file before the objects that it counts for.
    listed: Option<Listed>,
    state: Mutex<State>,
    /// The directory said something.
    touched: Notify,
}

/// Takes the list `plugins` of the file: the names of HTTP plugins, if there is a list.
pub type Listed = Box<dyn Fn(Option<&[String]>) + Send + Sync>;

#[derive(Default)]
struct State {
    items: BTreeMap<ResourceKey, Stored>,
    revision: u64,
    /// Of the content that is served.
    digest: Option<[u8; 32]>,
    /// What of the file could not be read, with its place.
    problems: Vec<LocatedError>,
    told: bool,
}

/// What tells two states of a file apart without reading it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    size: u64,
    inode: u64,
}

impl FileStore {
    /// A store of the file at `path`. `data_dir` holds the snapshot.
    #[must_use]
    pub fn new(path: &Path, data_dir: &Path) -> FileStore {
        FileStore::with_env(path, data_dir, Arc::new(ProcessEnv))
    }

    /// As [`FileStore::new`], variables in the file being looked up in `env`.
    #[must_use]
    pub fn with_env(path: &Path, data_dir: &Path, env: Arc<dyn Env + Send + Sync>) -> FileStore {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let kind =
            if path.extension().is_some_and(|extension| extension == "json") { "json" } else { "yaml" };
        let snapshot = SnapshotFile::new(data_dir, kind, &path.display().to_string());
        let shared = Arc::new(Shared {
            path,
            env,
            feed: Feed::new(kind),
            snapshot,
            listed: None,
            state: Mutex::default(),
            touched: Notify::new(),
        });
        FileStore { shared, task: OnceLock::new() }
    }

    /// What of the file could not be read, with its place; the rest of it serves.
    #[must_use]
    pub fn problems(&self) -> Vec<LocatedError> {
        self.shared.state().problems.clone()
    }

    /// Calls `listed` with the list `plugins` of the file, which replaces that of `config.yaml`. To be called before
    /// [`Store::watch`].
    #[must_use]
    pub fn with_listed(mut self, listed: Listed) -> FileStore {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.listed = Some(listed);
        }
        self
    }

    fn refuse<T: Send + 'static>(&self) -> BoxFuture<'_, Result<T, StoreError>> {
        let provider = self.shared.path.display().to_string();
        Box::pin(async move { Err(StoreError::ReadOnly { provider }) })
    }
}

impl Drop for FileStore {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

impl Store for FileStore {
    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let receiver = self.shared.feed.subscribe();
        self.task.get_or_init(|| tokio::spawn(run(Arc::clone(&self.shared))));
        receiver
    }

    fn get<'a>(&'a self, key: &'a ResourceKey) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        let found = self.shared.state().items.get(key).cloned();
        Box::pin(async move { Ok(found) })
    }

    fn list(&self, kind: Kind) -> BoxFuture<'_, Result<Vec<Stored>, StoreError>> {
        let state = self.shared.state();
        let found: Vec<Stored> = state.items.values().filter(|item| item.key.kind == kind).cloned().collect();
        drop(state);
        Box::pin(async move { Ok(found) })
    }

    fn put<'a>(
        &'a self,
        _: &'a ResourceKey,
        _: Value,
        _: PutOptions,
    ) -> BoxFuture<'a, Result<Put, StoreError>> {
        self.refuse()
    }

    fn delete<'a>(&'a self, _: &'a ResourceKey, _: DeleteOptions) -> BoxFuture<'a, Result<bool, StoreError>> {
        self.refuse()
    }

    fn generate_id(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        self.refuse()
    }

    fn status(&self) -> StoreStatus {
        let problems = self.shared.state().problems.iter().map(ToString::to_string).collect();
        StoreStatus { problems, ..self.shared.feed.status() }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stamp(&self) -> Option<Stamp> {
        let metadata = fs::metadata(&self.path).ok()?;
        Some(Stamp {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            size: metadata.size(),
            inode: metadata.ino(),
        })
    }

    /// Read the file and tell what it says. Blocks. An error leaves what was told.
    fn load(&self) -> Result<(), String> {
        let content = fs::read(&self.path)
            .map_err(|error| format!("{}: cannot be read: {error}", self.path.display()))?;
        let digest: [u8; 32] = Sha256::digest(&content).into();
        if self.state().digest == Some(digest) {
            return Ok(());
        }
        let name = self.path.display().to_string();
        let file = ApisixYaml::parse_bytes(&name, &content, &*self.env).map_err(|errors| {
            let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
            lines.join("; ")
        })?;
        drop(content);
        for problem in &file.errors {
            tracing::error!(%problem, "left out of the configuration");
        }
        let revision = self.state().revision + 1;
        let stored = |key: &ResourceKey, value: &Value, modified_index| Stored {
            key: key.clone(),
            value: Bytes::from(value.to_string()),
            created_index: modified_index,
            modified_index,
        };
        let items: BTreeMap<ResourceKey, Stored> = file
            .items()
            .iter()
            .map(|item| {
                let modified = item.modified_index.unwrap_or(revision);
                (item.key.clone(), stored(&item.key, &item.value(), modified))
            })
            .collect();
        let names: Option<Vec<String>> = file
            .plugins
            .as_ref()
            .map(|list| list.iter().filter(|p| !p.stream).map(|p| p.name.clone()).collect());
        let extra = names.as_ref().map_or(Value::Null, |names| json!({ PLUGINS: names }));
        let saved = Saved { revision, items: items.values().cloned().collect(), extra };
        if let Err(error) = self.snapshot.write(&saved) {
            tracing::warn!(path = %self.snapshot.path().display(), %error, "last-good snapshot not written");
        }
        let objects = saved.items;
        {
            let mut state = self.state();
            state.items = items;
            state.revision = revision;
            state.digest = Some(digest);
            state.problems = file.errors;
            state.told = true;
        }
        self.list(names.as_deref());
        self.feed.snapshot(objects, revision);
        Ok(())
    }

    fn list(&self, names: Option<&[String]>) {
        if let Some(listed) = &self.listed {
            listed(names);
        }
    }

    /// Serve what was good before this process started, if the file is not. Blocks.
    fn serve_snapshot(&self) -> Option<SystemTime> {
        if self.state().told {
            return None;
        }
        let (saved, since) = self.snapshot.load()?;
        let (objects, revision) = (saved.items.clone(), saved.revision);
        let names = saved.extra.get(PLUGINS).and_then(|names| Vec::deserialize(names).ok());
        self.list(names.as_deref());
        {
            let mut state = self.state();
            state.items = saved.items.into_iter().map(|item| (item.key.clone(), item)).collect();
            state.revision = revision;
            state.told = true;
        }
        self.feed.snapshot(objects, revision);
        Some(since)
    }
}

async fn run(shared: Arc<Shared>) {
    let _watcher = watch_directory(&shared);
    let mut seen = None;
    let mut good_since = SystemTime::now();
    let mut confirmed = Instant::now();
    loop {
        // Taken before the file is read: a change while it is read is seen the next time.
        let stamp = shared.stamp();
        if stamp != seen || stamp.is_none() {
            let work = Arc::clone(&shared);
            let loaded =
                tokio::task::spawn_blocking(move || work.load().map_err(|why| (why, work.serve_snapshot())));
            match loaded.await {
                Ok(Ok(())) => {
                    shared.feed.fresh();
                    good_since = SystemTime::now();
                }
                Ok(Err((why, since))) => {
                    good_since = since.unwrap_or(good_since);
                    shared.feed.stale(good_since, why);
                }
                Err(error) => shared.feed.stale(good_since, error.to_string()),
            }
            seen = stamp;
        } else if shared.feed.status().stale.is_none() {
            good_since = SystemTime::now();
            if confirmed.elapsed() > CONFIRM {
                confirmed = Instant::now();
                let snapshot = shared.snapshot.clone();
                // Only the time on the file is late if this fails.
                let _ = tokio::task::spawn_blocking(move || snapshot.confirm()).await;
            }
        }
        if timeout(POLL, shared.touched.notified()).await.is_ok() {
            // Wait for the last of a burst, not for a directory where something else is written all the time.
            let end = Instant::now() + BURST;
            while Instant::now() < end && timeout(QUIET, shared.touched.notified()).await.is_ok() {}
        }
    }
}

/// The watch of the directory; without one the file is still looked at once a second.
fn watch_directory(shared: &Arc<Shared>) -> Option<RecommendedWatcher> {
    let weak = Arc::downgrade(shared);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading makes events too; they must not lead to reading.
        if event.is_ok_and(|event| !event.kind.is_access())
            && let Some(shared) = weak.upgrade()
        {
            shared.touched.notify_one();
        }
    })
    .inspect_err(|error| tracing::info!(%error, "files are polled once a second"))
    .ok()?;
    let directory = shared.path.parent()?;
    watcher
        .watch(directory, RecursiveMode::NonRecursive)
        .inspect_err(
            |error| tracing::info!(%error, path = %directory.display(), "file is polled once a second"),
        )
        .ok()?;
    Some(watcher)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use std::os::unix::fs::symlink;

    use config::graph::Change;

    use super::*;

    struct Seen {
        events: mpsc::Receiver<StoreEvent>,
        uris: BTreeMap<String, String>,
        stale: Option<(SystemTime, String)>,
        snapshots: usize,
    }

    impl Seen {
        fn by(store: &FileStore) -> Seen {
            Seen { events: store.watch(), uris: BTreeMap::new(), stale: None, snapshots: 0 }
        }

        async fn until(&mut self, what: &str, done: impl Fn(&Seen) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !done(self) {
                let event = tokio::time::timeout_at(deadline, self.events.recv()).await;
                match event.unwrap_or_else(|_| panic!("{what}: {:?} {:?}", self.uris, self.stale)).unwrap() {
                    StoreEvent::Snapshot { changes, .. } => {
                        self.snapshots += 1;
                        let put = |change| match change {
                            Change::Put { key, value, .. } => {
                                (key.to_string(), value.get("uri").unwrap().as_str().unwrap().to_owned())
                            }
                            Change::Delete { key, .. } => panic!("{key} in a snapshot"),
                        };
                        self.uris = changes.into_iter().map(put).collect();
                    }
                    StoreEvent::Changes { .. } => panic!("a file is told whole"),
                    StoreEvent::Stale { since, why } => self.stale = Some((since, why)),
                    StoreEvent::Fresh => self.stale = None,
                }
            }
        }

        async fn until_uri(&mut self, uri: &str) {
            self.until(uri, |seen| seen.uris.get("routes/1").is_some_and(|is| is == uri)).await;
        }
    }

    fn yaml(uri: &str) -> String {
        format!("routes:\n  - id: 1\n    uri: {uri}\n    plugins: {{}}\n#END\n")
    }

    fn directories() -> (tempfile::TempDir, tempfile::TempDir) {
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap())
    }

    #[tokio::test]
    async fn a_change_is_seen_however_it_is_made() {
        let (conf, data) = directories();
        let path = conf.path().join("apisix.yaml");
        fs::write(&path, yaml("/a")).unwrap();
        let store = FileStore::new(&path, data.path());
        let mut seen = Seen::by(&store);
        seen.until_uri("/a").await;
        // In place.
        fs::write(&path, yaml("/b")).unwrap();
        seen.until_uri("/b").await;
        // Replaced, as editors do.
        fs::write(conf.path().join("new"), yaml("/c")).unwrap();
        fs::rename(conf.path().join("new"), &path).unwrap();
        seen.until_uri("/c").await;
        // Swapped behind a symbolic link, as Kubernetes does.
        for (version, uri) in [("v1", "/d"), ("v2", "/e")] {
            fs::create_dir(conf.path().join(version)).unwrap();
            fs::write(conf.path().join(version).join("apisix.yaml"), yaml(uri)).unwrap();
            symlink(version, conf.path().join("..data_tmp")).unwrap();
            fs::rename(conf.path().join("..data_tmp"), conf.path().join("..data")).unwrap();
            if version == "v1" {
                symlink("..data/apisix.yaml", conf.path().join("link")).unwrap();
                fs::rename(conf.path().join("link"), &path).unwrap();
            }
            seen.until_uri(uri).await;
        }
        assert_eq!(seen.stale, None);
        assert!(matches!(
            store.put(&ResourceKey::new(Kind::Route, "2"), Value::Null, PutOptions::default()).await,
            Err(StoreError::ReadOnly { .. })
        ));
        assert_eq!(store.list(Kind::Route).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_broken_file_changes_nothing_and_its_place_is_told() {
        let (conf, data) = directories();
        let path = conf.path().join("apisix.yaml");
        fs::write(&path, yaml("/a")).unwrap();
        let store = FileStore::new(&path, data.path());
        let mut seen = Seen::by(&store);
        seen.until_uri("/a").await;
        for (text, place) in [
            ("routes:\n  - id: 1\n    uri: [\n#END\n", "apisix.yaml:"),
            ("routes:\n  - id: 1\n    uri: /unfinished\n", "#END"),
            ("routes: [{id: 1, uri: \"${{POSTERN_TEST_NOT_SET}}\"}]\n#END\n", "POSTERN_TEST_NOT_SET"),
        ] {
            fs::write(&path, text).unwrap();
            seen.until(place, |seen| seen.stale.as_ref().is_some_and(|(_, why)| why.contains(place))).await;
            assert_eq!(seen.uris.get("routes/1").unwrap(), "/a");
        }
        fs::remove_file(&path).unwrap();
        let gone = |seen: &Seen| seen.stale.as_ref().is_some_and(|(_, why)| why.contains("cannot be read"));
        seen.until("the file is gone", gone).await;
        fs::write(&path, yaml("/b")).unwrap();
        seen.until("it is back", |seen| seen.stale.is_none()).await;
        seen.until_uri("/b").await;
        assert_eq!(seen.snapshots, 2);
    }

    #[tokio::test]
    async fn a_start_with_a_broken_file_serves_what_was_good() {
        let (conf, data) = directories();
        let path = conf.path().join("apisix.json");
        fs::write(&path, r#"{"routes": [{"id": 1, "uri": "/a", "plugins": {}}]}"#).unwrap();
        let before = FileStore::new(&path, data.path());
        Seen::by(&before).until_uri("/a").await;
        drop(before);
        fs::write(&path, "{").unwrap();
        let store = FileStore::new(&path, data.path());
        let mut seen = Seen::by(&store);
        seen.until("the good one, and stale", |seen| seen.snapshots == 1 && seen.stale.is_some()).await;
        assert_eq!(seen.uris.get("routes/1").unwrap(), "/a");
        assert!(seen.stale.as_ref().unwrap().0.elapsed().unwrap() < Duration::from_secs(60));
        // Another file is another store.
        let other = FileStore::new(&conf.path().join("other.json"), data.path());
        let mut seen = Seen::by(&other);
        seen.until("nothing", |seen| seen.stale.is_some()).await;
        assert_eq!(seen.snapshots, 0);
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_left_out_and_told() {
        let (conf, data) = directories();
        let path = conf.path().join("apisix.yaml");
        fs::write(&path, "routes:\n  - {id: 1, uri: /a}\n  - {id: 'a b', uri: /b}\nnonsense: 1\n#END\n")
            .unwrap();
        let store = FileStore::new(&path, data.path());
        Seen::by(&store).until_uri("/a").await;
        let problems = store.status().problems;
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems.iter().any(|problem| problem.contains("apisix.yaml:3:")), "{problems:?}");
    }
}
