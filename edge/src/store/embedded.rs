//! The store in the process itself: one redb file in the data directory, nothing else to run.
//!
//! One thread writes. It takes all requests that wait, puts them into one transaction, syncs it to the disk
//! once and only then answers, so a thousand writers at a time cost a few syncs and an answer survives
//! `kill -9`. Reads run beside it on blocking threads. Each change gets a revision of its own and an entry in
//! a bounded log. If the file is damaged, the last-good snapshot is served and writes are refused.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::ops::Bound;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self as queue, RecvTimeoutError};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use config::graph::Change;
use config::{Kind, ResourceKey};
use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table,
    TableDefinition, WriteTransaction,
};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::revision::{Revision, difference};
use super::snapshot_file::{Keeper, Saved, SnapshotFile};
use super::{
    BoxFuture, Condition, DeleteOptions, Feed, Put, PutOptions, Store, StoreError, StoreEvent, StoreStatus,
    Stored, prepare_data_dir,
};

/// Name of the file in the data directory.
pub const FILE: &str = "postern.redb";
/// Largest object, in bytes of JSON. The Admin API takes less.
pub const MAX_OBJECT: usize = 8 << 20;
/// How many revisions the log keeps.
pub const LOG_REVISIONS: u64 = 10_000;
/// How many bytes the log keeps, whatever the number of revisions.
pub const LOG_BYTES: u64 = 32 << 20;

/// Writes put into one transaction at most: bounds how long the first of them waits.
const BATCH: usize = 1024;
/// How long another process may hold the database before that is an error.
const HELD: Duration = Duration::from_secs(2);
/// Pages kept in memory. Reads are rare, the data path does none.
const CACHE: usize = 16 << 20;
/// How often a file that failed is opened again.
const REOPEN: Duration = Duration::from_secs(1);

/// Key as [`ResourceKey`] prints it; value is [`Head`] and JSON.
const ITEMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("items");
/// Milliseconds since 1970 and key, of objects that delete themselves.
const EXPIRY: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("expiry");
/// Revision to JSON of [`Revision`].
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// Single numbers: `revision`, `log_bytes`, `format`.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT: u64 = 1;

/// The embedded store. Dropping it ends its thread after the writes that wait.
pub struct Embedded {
    shared: Arc<Shared>,
    requests: Option<queue::Sender<Request>>,
    writer: Option<thread::JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    /// `None` while the file cannot be used.
    database: RwLock<Option<Database>>,
    /// What is served instead of a damaged file.
    fallback: Option<Fallback>,
    feed: Feed,
    revision: AtomicU64,
    snapshot: SnapshotFile,
    keeper: OnceLock<Keeper>,
}

struct Fallback {
    items: BTreeMap<String, Stored>,
    revision: u64,
    why: String,
}

enum Request {
    Put {
        key: ResourceKey,
        value: Value,
        json: Vec<u8>,
        options: PutOptions,
        answer: oneshot::Sender<Result<Put, StoreError>>,
    },
    Delete {
        key: ResourceKey,
        author: String,
        answer: oneshot::Sender<Result<bool, StoreError>>,
    },
    Id {
        answer: oneshot::Sender<u64>,
    },
    /// Tell the feed everything. In the queue, so that no change is told before or twice.
    Subscribe,
}

impl Embedded {
    /// Open the store in `data_dir`, which is made if it is not there. Blocks.
    ///
    /// # Errors
    /// If the directory cannot be used, another process has the store open, or the file is damaged and
    /// there is no snapshot to serve instead.
    pub fn open(data_dir: &Path) -> Result<Embedded, StoreError> {
        let unusable = |error: io::Error| {
            StoreError::Unavailable(format!("data directory {}: {error}", data_dir.display()))
        };
        prepare_data_dir(data_dir).map_err(unusable)?;
        let path = data_dir.join(FILE);
        let snapshot = SnapshotFile::new(data_dir, "embedded", "");
        let lost = !path.exists();
        let (database, fallback) = match open_when_free(&path) {
            Ok(database) => (Some(database), None),
            Err(OpenError::InUse) => {
                return Err(StoreError::Unavailable(format!(
                    "{} is in use by another process: stop it, or set another data directory",
                    path.display()
                )));
            }
            Err(OpenError::Damaged(why)) => {
                let why = format!(
                    "{} cannot be read ({why}); move it away and restart to rebuild it from {}",
                    path.display(),
                    snapshot.path().display()
                );
                let Some((saved, since)) = snapshot.load() else {
                    return Err(StoreError::Corrupt { what: path.display().to_string(), why });
                };
                (None, Some((saved, since, why)))
            }
        };
        let feed = Feed::new("embedded");
        let fallback = fallback.map(|(saved, since, why)| {
            feed.stale(since, why.clone());
            let items = saved.items.into_iter().map(|item| (item.key.to_string(), item)).collect();
            Fallback { items, revision: saved.revision, why }
        });
        let revision = match &database {
            Some(database) => {
                if lost && let Some((saved, _)) = snapshot.load() {
                    tracing::warn!(
                        objects = saved.items.len(),
                        "store was lost, rebuilt from the last-good snapshot"
                    );
                    restore(database, saved).map_err(unavailable)?;
                }
                revision(database).map_err(unavailable)?
            }
            None => fallback.as_ref().map_or(0, |fallback| fallback.revision),
        };
        let shared = Arc::new(Shared {
            path,
            database: RwLock::new(database),
            fallback,
            feed,
            revision: AtomicU64::new(revision),
            snapshot,
            keeper: OnceLock::new(),
        });
        let (requests, received) = queue::channel();
        let writer = Writer { shared: Arc::clone(&shared), revision, failed: false };
        let writer = thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || writer.run(&received))
            .map_err(unusable)?;
        Ok(Embedded { shared, requests: Some(requests), writer: Some(writer) })
    }

    fn send(&self, request: Request) -> Result<(), StoreError> {
        self.requests
            .as_ref()
            .and_then(|requests| requests.send(request).ok())
            .ok_or_else(|| StoreError::Unavailable("the store is closed".to_owned()))
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> redb::Result<T, redb::Error> + Send + 'static,
        fallback: impl FnOnce(&Fallback) -> T,
    ) -> Result<T, StoreError> {
        if let Some(known) = &self.shared.fallback {
            return Ok(fallback(known));
        }
        let shared = Arc::clone(&self.shared);
        let task = tokio::task::spawn_blocking(move || shared.read(work));
        task.await.map_err(|error| StoreError::Unavailable(error.to_string()))?
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(writer) = self.writer.take() {
            // Its last transaction; a panic in it was reported when it happened.
            let _ = writer.join();
        }
    }
}

impl Store for Embedded {
    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let shared = &self.shared;
        if let Some(fallback) = &shared.fallback {
            shared.feed.snapshot(fallback.items.values().cloned().collect(), fallback.revision);
            return shared.feed.subscribe();
        }
        shared.keeper.get_or_init(|| {
            let source = Arc::downgrade(shared);
            Keeper::start(
                shared.snapshot.clone(),
                Arc::new(move |file: &SnapshotFile| Some(source.upgrade()?.save(file))),
            )
        });
        let receiver = shared.feed.subscribe();
        if self.send(Request::Subscribe).is_err() {
            shared.feed.close();
        }
        receiver
    }

    fn get<'a>(&'a self, key: &'a ResourceKey) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let (wanted, path) = (key.clone(), key.to_string());
            let stored = self.read(
                move |transaction| {
                    let items = transaction.open_table(ITEMS)?;
                    let found = items.get(path.as_str())?;
                    Ok(found.and_then(|guard| decode(wanted, guard.value())))
                },
                |fallback| fallback.items.get(&key.to_string()).cloned(),
            );
            stored.await
        })
    }

    fn list(&self, kind: Kind) -> BoxFuture<'_, Result<Vec<Stored>, StoreError>> {
        Box::pin(async move {
            let (from, to) = range(kind);
            let stored = self.read(
                {
                    let (from, to) = (from.clone(), to.clone());
                    move |transaction| {
                        let items = transaction.open_table(ITEMS)?;
                        collect(&items, kind, (from.as_str(), to.as_str()))
                    }
                },
                |fallback| {
                    let range = (Bound::Included(from.clone()), Bound::Excluded(to.clone()));
                    let found = fallback.items.range(range).map(|(_, item)| item);
                    found.filter(|item| item.key.kind == kind).cloned().collect()
                },
            );
            stored.await
        })
    }

    fn put<'a>(
        &'a self,
        key: &'a ResourceKey,
        value: Value,
        options: PutOptions,
    ) -> BoxFuture<'a, Result<Put, StoreError>> {
        Box::pin(async move {
            let json = serde_json::to_vec(&value)
                .map_err(|error| StoreError::Corrupt { what: key.to_string(), why: error.to_string() })?;
            if json.len() > MAX_OBJECT {
                return Err(StoreError::TooLarge { size: json.len(), limit: MAX_OBJECT });
            }
            let (answer, answered) = oneshot::channel();
            self.send(Request::Put { key: key.clone(), value, json, options, answer })?;
            answered.await.unwrap_or_else(|_| Err(closed()))
        })
    }

    fn delete<'a>(
        &'a self,
        key: &'a ResourceKey,
        options: DeleteOptions,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            self.send(Request::Delete { key: key.clone(), author: options.author, answer })?;
            answered.await.unwrap_or_else(|_| Err(closed()))
        })
    }

    fn generate_id(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            self.send(Request::Id { answer })?;
            let revision = answered.await.map_err(|_| closed())?;
            Ok(format!("{revision:020}"))
        })
    }

    fn status(&self) -> StoreStatus {
        let told = self.shared.feed.status();
        StoreStatus { revision: self.shared.revision.load(Ordering::Acquire), ..told }
    }

    fn history(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Revision>, StoreError>> {
        Box::pin(self.read(
            move |transaction| {
                let log = transaction.open_table(LOG)?;
                let mut revisions = Vec::new();
                for entry in log.iter()?.rev().take(limit) {
                    let (_, json) = entry?;
                    revisions.extend(serde_json::from_slice::<Revision>(json.value()).ok());
                }
                Ok(revisions)
            },
            |_| Vec::new(),
        ))
    }
}

impl Shared {
    fn database(&self) -> RwLockReadGuard<'_, Option<Database>> {
        self.database.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> redb::Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let guard = self.database();
        let database = guard.as_ref().ok_or_else(|| self.closed_file())?;
        let read = || work(&database.begin_read()?);
        read().map_err(unavailable)
    }

    /// Write everything into `file`, object by object.
    fn save(&self, file: &SnapshotFile) -> io::Result<()> {
        let written = self.read(|transaction| {
            let meta = transaction.open_table(META)?;
            let items = transaction.open_table(ITEMS)?;
            let revision = meta.get("revision")?.map_or(0, |guard| guard.value());
            Ok(file.write_with(revision, &Value::Null, |objects| {
                for entry in items.iter().map_err(io::Error::other)? {
                    let (path, value) = entry.map_err(io::Error::other)?;
                    if let Some((head, json)) = Head::decode(value.value()) {
                        objects.add(path.value(), head.created, head.modified, json)?;
                    }
                }
                Ok(())
            }))
        });
        written.map_err(io::Error::other)?
    }

    fn closed_file(&self) -> StoreError {
        match &self.fallback {
            Some(fallback) => StoreError::Unavailable(fallback.why.clone()),
            None => StoreError::Unavailable(format!("{} cannot be used now", self.path.display())),
        }
    }
}

/// The thread that writes.
struct Writer {
    shared: Arc<Shared>,
    /// Of the last change; ids are taken from the same numbers.
    revision: u64,
    /// The last transaction failed: open the file anew before the next.
    failed: bool,
}

/// What a batch did, to be told once it is on the disk.
#[derive(Default)]
struct Outcome {
    changes: Vec<Change>,
    answers: Vec<Answer>,
}

enum Answer {
    Put(oneshot::Sender<Result<Put, StoreError>>, Result<Put, StoreError>),
    Delete(oneshot::Sender<Result<bool, StoreError>>, Result<bool, StoreError>),
}

impl Answer {
    fn send(self) {
        // Whoever asked may have gone away.
        match self {
            Answer::Put(to, result) => drop(to.send(result)),
            Answer::Delete(to, result) => drop(to.send(result)),
        }
    }

    fn fail(self, error: StoreError) {
        match self {
            Answer::Put(to, _) => drop(to.send(Err(error))),
            Answer::Delete(to, _) => drop(to.send(Err(error))),
        }
    }
}

impl Writer {
    fn run(mut self, requests: &queue::Receiver<Request>) {
        let mut batch = Vec::new();
        loop {
            let wait = self.until_expiry();
            match requests.recv_timeout(wait) {
                Ok(request) => batch.push(request),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while batch.len() < BATCH
                && let Ok(request) = requests.try_recv()
            {
                batch.push(request);
            }
            self.serve(std::mem::take(&mut batch));
        }
    }

    /// How long to sleep: until the first object deletes itself, an hour at most.
    fn until_expiry(&self) -> Duration {
        const IDLE: Duration = Duration::from_secs(3600);
        if self.failed {
            return REOPEN;
        }
        let first = self.shared.read(|transaction| {
            let expiry = transaction.open_table(EXPIRY)?;
            Ok(expiry.first()?.map(|(key, _)| key.value().0))
        });
        match first {
            Ok(Some(at)) => Duration::from_millis(at.saturating_sub(now_ms())).min(IDLE),
            _ => IDLE,
        }
    }

    fn serve(&mut self, batch: Vec<Request>) {
        if self.failed {
            self.reopen();
        }
        let mut subscribe = false;
        let mut writes = Vec::with_capacity(batch.len());
        for request in batch {
            match request {
                Request::Subscribe => subscribe = true,
                Request::Id { answer } => {
                    self.revision += 1;
                    // The number is used up even if nobody waits for it any more.
                    let _ = answer.send(self.revision);
                }
                write => writes.push(write),
            }
        }
        let before = self.revision;
        let mut outcome = Outcome::default();
        match self.write(writes, &mut outcome) {
            Ok(()) => {
                let Outcome { changes, answers } = outcome;
                if !changes.is_empty() {
                    self.shared.revision.store(self.revision, Ordering::Release);
                    self.shared.feed.changes(changes, self.revision);
                    if let Some(keeper) = self.shared.keeper.get() {
                        keeper.changed();
                    }
                }
                answers.into_iter().for_each(Answer::send);
            }
            Err(error) => {
                tracing::error!(%error, "store not written");
                self.revision = before;
                self.failed = true;
                for answer in outcome.answers {
                    answer.fail(error.clone());
                }
            }
        }
        if subscribe {
            self.subscribe();
        }
    }

    /// One transaction with all `writes` and everything that expired. `outcome` is to be told only if this
    /// says yes: nothing of it happened otherwise.
    fn write(&mut self, writes: Vec<Request>, outcome: &mut Outcome) -> Result<(), StoreError> {
        let shared = Arc::clone(&self.shared);
        let guard = shared.database();
        let Some(database) = guard.as_ref() else {
            let error = shared.closed_file();
            for write in writes {
                outcome.answers.extend(write.refused(error.clone()));
            }
            return Err(error);
        };
        let now = now_ms();
        // Nothing asked, nothing expired: no transaction.
        if writes.is_empty() && !expired(database, now).map_err(unavailable)? {
            return Ok(());
        }
        let mut waiting = writes.into_iter();
        let mut apply = || -> Result<(), redb::Error> {
            let transaction = begin(database)?;
            {
                let mut tables = Tables::open(&transaction)?;
                let mut batch = Batch { tables: &mut tables, revision: &mut self.revision, now };
                outcome.changes.extend(batch.expire()?);
                for request in waiting.by_ref() {
                    batch.apply(request, outcome)?;
                }
                batch.finish()?;
            }
            transaction.commit()?;
            Ok(())
        };
        apply().map_err(|error| {
            // Whoever was not reached waits for an answer too.
            for write in waiting {
                outcome.answers.extend(write.refused(StoreError::Unavailable(String::new())));
            }
            unavailable(error)
        })
    }

    fn subscribe(&self) {
        match self.shared.read(everything) {
            Ok(objects) => {
                self.shared.feed.snapshot(objects, self.revision);
                if let Some(keeper) = self.shared.keeper.get() {
                    keeper.changed();
                }
            }
            Err(error) => self.shared.feed.stale(SystemTime::now(), error.to_string()),
        }
    }

    /// After an I/O error redb refuses all work until the file is opened anew.
    fn reopen(&mut self) {
        if self.shared.fallback.is_some() {
            self.failed = false;
            return;
        }
        let mut database = self.shared.database.write().unwrap_or_else(PoisonError::into_inner);
        *database = None;
        match open_database(&self.shared.path) {
            Ok(opened) => {
                self.revision = revision(&opened).unwrap_or(self.revision).max(self.revision);
                *database = Some(opened);
                self.failed = false;
                tracing::info!("store opened again");
            }
            Err(error) => tracing::warn!(%error, "store still cannot be opened"),
        }
    }
}

impl Request {
    fn refused(self, error: StoreError) -> Option<Answer> {
        match self {
            Request::Put { answer, .. } => Some(Answer::Put(answer, Err(error))),
            Request::Delete { answer, .. } => Some(Answer::Delete(answer, Err(error))),
            Request::Id { .. } | Request::Subscribe => None,
        }
    }
}

struct Tables<'t> {
    items: Table<'t, &'static str, &'static [u8]>,
    expiry: Table<'t, (u64, &'static str), ()>,
    log: Table<'t, u64, &'static [u8]>,
    meta: Table<'t, &'static str, u64>,
}

impl<'t> Tables<'t> {
    fn open(transaction: &'t WriteTransaction) -> Result<Tables<'t>, redb::Error> {
        Ok(Tables {
            items: transaction.open_table(ITEMS)?,
            expiry: transaction.open_table(EXPIRY)?,
            log: transaction.open_table(LOG)?,
            meta: transaction.open_table(META)?,
        })
    }
}

struct Batch<'b, 't> {
    tables: &'b mut Tables<'t>,
    revision: &'b mut u64,
    now: u64,
}

impl Batch<'_, '_> {
    fn apply(&mut self, request: Request, outcome: &mut Outcome) -> Result<(), redb::Error> {
        match request {
            Request::Put { key, value, json, options, answer } => {
                // The answer is noted even if this fails, so that it is given.
                match self.put(&key, value, &json, &options) {
                    Ok(Ok((put, change))) => {
                        outcome.changes.push(change);
                        outcome.answers.push(Answer::Put(answer, Ok(put)));
                    }
                    Ok(Err(refused)) => outcome.answers.push(Answer::Put(answer, Err(refused))),
                    Err(error) => {
                        outcome.answers.push(Answer::Put(answer, Err(closed())));
                        return Err(error);
                    }
                }
            }
            Request::Delete { key, author, answer } => match self.delete_with_children(&key, &author) {
                Ok(changes) => {
                    let was_there = changes.iter().any(
                        |change| matches!(change, Change::Delete { key: deleted, .. } if *deleted == key),
                    );
                    outcome.changes.extend(changes);
                    outcome.answers.push(Answer::Delete(answer, Ok(was_there)));
                }
                Err(error) => {
                    outcome.answers.push(Answer::Delete(answer, Err(closed())));
                    return Err(error);
                }
            },
            Request::Id { .. } | Request::Subscribe => {}
        }
        Ok(())
    }

    fn put(
        &mut self,
        key: &ResourceKey,
        value: Value,
        json: &[u8],
        options: &PutOptions,
    ) -> Result<Result<(Put, Change), StoreError>, redb::Error> {
        let path = key.to_string();
        let before = self.take_expiry(&path)?;
        let stands = match options.condition {
            Condition::Any => true,
            Condition::Absent => before.is_none(),
            Condition::Modified(revision) => {
                before.as_ref().is_some_and(|(head, _)| head.modified == revision)
            }
        };
        if !stands {
            if let Some((head, _)) = &before
                && head.expires != 0
            {
                self.tables.expiry.insert((head.expires, path.as_str()), ())?;
            }
            return Ok(Err(StoreError::Conflict));
        }
        *self.revision += 1;
        let created_index = before.as_ref().map_or(*self.revision, |(head, _)| head.created);
        // A time to live of nothing would mean no time to live.
        let expires = options.ttl.map_or(0, |ttl| {
            self.now.saturating_add(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)).max(1)
        });
        let head = Head { created: created_index, modified: *self.revision, expires };
        self.tables.items.insert(path.as_str(), head.encode(json).as_slice())?;
        if expires != 0 {
            self.tables.expiry.insert((expires, path.as_str()), ())?;
        }
        let old = before.as_ref().and_then(|(_, json)| serde_json::from_slice(json).ok());
        self.log(&options.author, &path, old.as_ref(), Some(&value))?;
        let item = Stored {
            key: key.clone(),
            value: Bytes::copy_from_slice(json),
            created_index,
            modified_index: *self.revision,
        };
        let change =
            Change::Put { key: key.clone(), value, created_index, modified_index: item.modified_index };
        Ok(Ok((Put { created: before.is_none(), item }, change)))
    }

    fn delete_with_children(&mut self, key: &ResourceKey, author: &str) -> Result<Vec<Change>, redb::Error> {
        let mut changes = Vec::new();
        if let Some((kind, word)) = key.kind.children() {
            let (from, to) = (format!("{key}/{word}/"), format!("{key}/{word}0"));
            let children = collect(&self.tables.items, kind, (from.as_str(), to.as_str()))?;
            for child in children {
                changes.extend(self.delete(&child.key, author)?);
            }
        }
        changes.extend(self.delete(key, author)?);
        Ok(changes)
    }

    fn delete(&mut self, key: &ResourceKey, author: &str) -> Result<Option<Change>, redb::Error> {
        let path = key.to_string();
        let Some((_, json)) = self.take_expiry(&path)? else { return Ok(None) };
        self.tables.items.remove(path.as_str())?;
        *self.revision += 1;
        let old = serde_json::from_slice(&json).ok();
        self.log(author, &path, old.as_ref(), None)?;
        Ok(Some(Change::Delete { key: key.clone(), modified_index: *self.revision }))
    }

    /// Delete what has outlived its time.
    fn expire(&mut self) -> Result<Vec<Change>, redb::Error> {
        let mut due = Vec::new();
        for entry in self.tables.expiry.range(..(self.now.saturating_add(1), ""))? {
            let (entry, _) = entry?;
            let (at, path) = entry.value();
            due.push((at, path.to_owned()));
        }
        let mut changes = Vec::new();
        for (at, path) in due {
            self.tables.expiry.remove((at, path.as_str()))?;
            if let Some(key) = ResourceKey::from_path(&path) {
                changes.extend(self.delete_with_children(&key, "ttl")?);
            }
        }
        Ok(changes)
    }

    /// What is stored under `path`, its expiry being taken back.
    fn take_expiry(&mut self, path: &str) -> Result<Option<(Head, Vec<u8>)>, redb::Error> {
        let Some(found) = self.tables.items.get(path)?.and_then(|guard| {
            let (head, json) = Head::decode(guard.value())?;
            Some((head, json.to_vec()))
        }) else {
            return Ok(None);
        };
        if found.0.expires != 0 {
            self.tables.expiry.remove((found.0.expires, path))?;
        }
        Ok(Some(found))
    }

    fn log(
        &mut self,
        author: &str,
        path: &str,
        before: Option<&Value>,
        after: Option<&Value>,
    ) -> Result<(), redb::Error> {
        let entry = Revision {
            revision: *self.revision,
            time_ms: self.now,
            author: author.to_owned(),
            key: path.to_owned(),
            diff: difference(before, after),
        };
        let json = serde_json::to_vec(&entry).unwrap_or_default();
        self.tables.log.insert(*self.revision, json.as_slice())?;
        let bytes = self.tables.meta.get("log_bytes")?.map_or(0, |guard| guard.value());
        self.tables.meta.insert("log_bytes", bytes + json.len() as u64)?;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), redb::Error> {
        let mut bytes = self.tables.meta.get("log_bytes")?.map_or(0, |guard| guard.value());
        let mut revisions = self.tables.log.len()?;
        while revisions > 1 && (revisions > LOG_REVISIONS || bytes > LOG_BYTES) {
            let Some((_, json)) = self.tables.log.pop_first()? else { break };
            bytes = bytes.saturating_sub(json.value().len() as u64);
            revisions -= 1;
        }
        self.tables.meta.insert("log_bytes", bytes)?;
        self.tables.meta.insert("revision", *self.revision)?;
        Ok(())
    }
}

/// What stands before the JSON of an object: three numbers of 8 bytes, little endian.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Head {
    created: u64,
    modified: u64,
    /// Milliseconds since 1970, or 0: never.
    expires: u64,
}

impl Head {
    const SIZE: usize = 24;

    fn encode(self, json: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Head::SIZE + json.len());
        for number in [self.created, self.modified, self.expires] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(json);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<(Head, &[u8])> {
        let (created, rest) = bytes.split_first_chunk()?;
        let (modified, rest) = rest.split_first_chunk()?;
        let (expires, json) = rest.split_first_chunk()?;
        let head = Head {
            created: u64::from_le_bytes(*created),
            modified: u64::from_le_bytes(*modified),
            expires: u64::from_le_bytes(*expires),
        };
        Some((head, json))
    }
}

fn decode(key: ResourceKey, bytes: &[u8]) -> Option<Stored> {
    let (head, json) = Head::decode(bytes)?;
    Some(Stored {
        key,
        value: Bytes::copy_from_slice(json),
        created_index: head.created,
        modified_index: head.modified,
    })
}

/// The keys of a kind: from the segment of its folder and `/` to that and the character after `/`.
fn range(kind: Kind) -> (String, String) {
    let kind = kind.folder();
    (format!("{}/", kind.segment()), format!("{}0", kind.segment()))
}

fn collect(
    items: &impl ReadableTable<&'static str, &'static [u8]>,
    kind: Kind,
    (from, to): (&str, &str),
) -> Result<Vec<Stored>, redb::Error> {
    let mut found = Vec::new();
    for entry in items.range::<&str>(from..to)? {
        let (path, value) = entry?;
        if let Some(key) = ResourceKey::from_path(path.value())
            && key.kind == kind
        {
            found.extend(decode(key, value.value()));
        }
    }
    Ok(found)
}

fn everything(transaction: &ReadTransaction) -> Result<Vec<Stored>, redb::Error> {
    let items = transaction.open_table(ITEMS)?;
    let mut objects = Vec::with_capacity(usize::try_from(items.len()?).unwrap_or(0));
    for entry in items.iter()? {
        let (path, value) = entry?;
        objects.extend(ResourceKey::from_path(path.value()).and_then(|key| decode(key, value.value())));
    }
    Ok(objects)
}

/// Fill an empty store.
fn restore(database: &Database, saved: Saved) -> Result<(), redb::Error> {
    let transaction = begin(database)?;
    {
        let mut tables = Tables::open(&transaction)?;
        for item in &saved.items {
            let head = Head { created: item.created_index, modified: item.modified_index, expires: 0 };
            tables.items.insert(item.key.to_string().as_str(), head.encode(&item.value).as_slice())?;
        }
        tables.meta.insert("revision", saved.revision)?;
    }
    transaction.commit()?;
    Ok(())
}

fn revision(database: &Database) -> Result<u64, redb::Error> {
    let transaction = database.begin_read()?;
    let meta = transaction.open_table(META)?;
    Ok(meta.get("revision")?.map_or(0, |guard| guard.value()))
}

fn expired(database: &Database, now: u64) -> Result<bool, redb::Error> {
    let transaction = database.begin_read()?;
    let expiry = transaction.open_table(EXPIRY)?;
    Ok(expiry.first()?.is_some_and(|(key, _)| key.value().0 <= now))
}

fn begin(database: &Database) -> Result<WriteTransaction, redb::Error> {
    Ok(database.begin_write()?)
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("another process uses it")]
    InUse,
    #[error("{0}")]
    Damaged(String),
}

/// Open or create the file, readable by the owner alone, with all tables there.
/// Opens the database. A process that is about to end may hold it for a moment yet.
#[expect(clippy::disallowed_methods, reason = "at start, off the workers; there is no event to wait for")]
fn open_when_free(path: &Path) -> Result<Database, OpenError> {
    let until = Instant::now() + HELD;
    loop {
        match open_database(path) {
            Err(OpenError::InUse) if Instant::now() < until => thread::sleep(HELD / 40),
            opened => return opened,
        }
    }
}

fn open_database(path: &Path) -> Result<Database, OpenError> {
    let damaged = |error: &dyn std::fmt::Display| OpenError::Damaged(error.to_string());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| damaged(&error))?;
    let started = Instant::now();
    // A page that survived its checksum by chance may still make the library panic.
    let opened = std::panic::catch_unwind(move || {
        let database = Database::builder().set_cache_size(CACHE).create_file(file)?;
        let transaction = database.begin_write()?;
        let format = {
            let tables = Tables::open(&transaction)?;
            let mut meta = tables.meta;
            let format = meta.get("format")?.map(|guard| guard.value());
            if format.is_none() {
                meta.insert("format", FORMAT)?;
            }
            format
        };
        transaction.commit()?;
        Ok::<_, redb::Error>((database, format))
    });
    match opened {
        Ok(Ok((_, Some(format)))) if format != FORMAT => {
            Err(OpenError::Damaged(format!("it has format {format}, this version reads {FORMAT}")))
        }
        Ok(Ok((database, _))) => {
            tracing::debug!(path = %path.display(), elapsed = ?started.elapsed(), "store opened");
            Ok(database)
        }
        Ok(Err(redb::Error::DatabaseAlreadyOpen)) => Err(OpenError::InUse),
        Ok(Err(error)) => Err(damaged(&error)),
        Err(_) => Err(damaged(&"its content makes no sense")),
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn unavailable(error: redb::Error) -> StoreError {
    StoreError::Unavailable(format!("embedded store: {error}"))
}

fn closed() -> StoreError {
    StoreError::Unavailable("the store is closed".to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};

    use futures_util::future::join_all;
    use serde_json::json;

    use super::*;

    fn route(id: impl ToString) -> ResourceKey {
        ResourceKey::new(Kind::Route, id.to_string())
    }

    async fn put(store: &Embedded, key: &ResourceKey, value: Value) -> Put {
        store.put(key, value, PutOptions::default()).await.unwrap()
    }

    async fn snapshot(store: &Embedded) -> (super::super::Objects, u64) {
        match store.watch().recv().await.unwrap() {
            StoreEvent::Snapshot { changes, revision } => (changes, revision),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn what_is_written_is_read_listed_told_and_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = directory.path().join("postern-data");
        let store = Embedded::open(&data_dir).unwrap();
        let mut events = store.watch();
        assert!(
            matches!(events.recv().await, Some(StoreEvent::Snapshot { changes, revision: 0 }) if changes.is_empty())
        );
        let first = put(&store, &route(1), json!({"uri": "/a"})).await;
        assert!(first.created);
        assert_eq!((first.item.created_index, first.item.modified_index), (1, 1));
        let second = put(&store, &route(1), json!({"uri": "/b"})).await;
        assert!(!second.created);
        assert_eq!((second.item.created_index, second.item.modified_index), (1, 2));
        assert_eq!(store.get(&route(1)).await.unwrap().unwrap(), second.item);
        assert_eq!(store.get(&route(2)).await.unwrap(), None);
        let mut told = 0;
        while told < 2 {
            let Some(StoreEvent::Changes { revision, .. }) = events.recv().await else { panic!("no change") };
            told = revision;
        }
        assert_eq!(fs::metadata(&data_dir).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(data_dir.join(FILE)).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(
            matches!(Embedded::open(&data_dir), Err(StoreError::Unavailable(why)) if why.contains("another process"))
        );
        drop(store);
        let store = Embedded::open(&data_dir).unwrap();
        let (changes, revision) = snapshot(&store).await;
        assert_eq!((changes.len(), revision), (1, 2));
        assert!(!put(&store, &route(1), json!({"uri": "/c"})).await.created);
        assert_eq!(store.status().revision, 3);
    }

    #[tokio::test]
    async fn conditions_hold_or_the_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        let with = |condition| PutOptions { condition, ..PutOptions::default() };
        for (condition, works) in [
            (Condition::Modified(1), false),
            (Condition::Absent, true),
            (Condition::Absent, false),
            (Condition::Modified(7), false),
            (Condition::Modified(1), true),
            (Condition::Any, true),
        ] {
            let result = store.put(&route(1), json!({}), with(condition)).await;
            assert_eq!(result.is_ok(), works, "{condition:?}");
            assert!(works || matches!(result, Err(StoreError::Conflict)));
        }
        let huge = json!({"desc": "x".repeat(MAX_OBJECT)});
        assert!(matches!(
            store.put(&route(2), huge, with(Condition::Any)).await,
            Err(StoreError::TooLarge { .. })
        ));
    }

    #[tokio::test]
    async fn credentials_are_listed_apart_and_go_with_their_consumer() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        let jack = ResourceKey::new(Kind::Consumer, "jack");
        for key in [
            jack.clone(),
            ResourceKey::credential("jack", "a"),
            ResourceKey::credential("jack", "b"),
            ResourceKey::new(Kind::Consumer, "jacko"),
            ResourceKey::credential("jacko", "a"),
            ResourceKey::new(Kind::ConsumerGroup, "g"),
        ] {
            put(&store, &key, json!({})).await;
        }
        assert_eq!(store.list(Kind::Consumer).await.unwrap().len(), 2);
        assert_eq!(store.list(Kind::Credential).await.unwrap().len(), 3);
        assert_eq!(store.list(Kind::ConsumerGroup).await.unwrap().len(), 1);
        assert!(store.delete(&jack, DeleteOptions::default()).await.unwrap());
        assert!(!store.delete(&jack, DeleteOptions::default()).await.unwrap());
        let left = store.list(Kind::Credential).await.unwrap();
        assert_eq!(
            left.iter().map(|item| item.key.to_string()).collect::<Vec<_>>(),
            ["consumers/jacko/credentials/a"]
        );
    }

    #[tokio::test]
    async fn an_object_deletes_itself_also_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        let ttl = |ms| PutOptions { ttl: Some(Duration::from_millis(ms)), ..PutOptions::default() };
        let mut events = store.watch();
        store.put(&route("short"), json!({}), ttl(50)).await.unwrap();
        store.put(&route("kept"), json!({}), ttl(100)).await.unwrap();
        // Written again without a time to live: stays.
        put(&store, &route("kept"), json!({})).await;
        store.put(&route("later"), json!({}), ttl(300)).await.unwrap();
        let gone =
            async {
                loop {
                    match events.recv().await.unwrap() {
                    StoreEvent::Changes { changes, .. } if changes.iter().any(|change| {
                        matches!(change, Change::Delete { key, .. } if *key == route("short"))
                    }) => return,
                    _ => {}
                }
                }
            };
        tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
        drop(store);
        let store = Embedded::open(directory.path()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while store.get(&route("later")).await.unwrap().is_some() {
            assert!(Instant::now() < deadline, "it stays");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (changes, _) = snapshot(&store).await;
        assert_eq!(changes.len(), 1, "{changes:?}");
        assert!(store.get(&route("kept")).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn the_log_tells_who_changed_what_and_stays_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        let by = |author: &str| PutOptions { author: author.to_owned(), ..PutOptions::default() };
        store.put(&route(1), json!({"uri": "/a"}), by("ann")).await.unwrap();
        store.put(&route(1), json!({"uri": "/b"}), by("bob")).await.unwrap();
        store.delete(&route(1), DeleteOptions { author: "eve".to_owned() }).await.unwrap();
        let history = store.history(10).await.unwrap();
        let authors: Vec<_> = history.iter().map(|r| (r.revision, r.author.as_str())).collect();
        assert_eq!(authors, [(3, "eve"), (2, "bob"), (1, "ann")]);
        let edit = history.get(1).unwrap();
        assert_eq!(
            serde_json::to_value(&edit.diff).unwrap(),
            json!([
                {"pointer": "/uri", "before": "/a", "after": "/b"}
            ])
        );
        // 12 revisions of 4 MiB do not all fit.
        for n in 10..22 {
            let value = json!({"desc": n.to_string().repeat(1 << 20)});
            put(&store, &route(2), value).await;
        }
        let history = store.history(1000).await.unwrap();
        assert!(history.len() < 12, "{}", history.len());
        assert_eq!(history.first().unwrap().revision, 15);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_thousand_writers_share_a_few_syncs() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        let keys: Vec<_> = (0..1000).map(route).collect();
        let started = Instant::now();
        let puts = join_all(keys.iter().map(|key| put(&store, key, json!({"uri": "/"})))).await;
        let elapsed = started.elapsed();
        let mut revisions: Vec<_> = puts.iter().map(|put| put.item.modified_index).collect();
        revisions.sort_unstable();
        assert_eq!(revisions, (1..=1000).collect::<Vec<_>>());
        assert!(elapsed < Duration::from_secs(15), "{elapsed:?}");
        assert_eq!(store.generate_id().await.unwrap(), format!("{:020}", 1001));
        assert_eq!(put(&store, &route(1), json!({})).await.item.modified_index, 1002);
    }

    #[tokio::test]
    async fn a_damaged_file_serves_the_snapshot_and_refuses_writes() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        put(&store, &route(1), json!({"uri": "/a"})).await;
        store.shared.save(&store.shared.snapshot).unwrap();
        drop(store);
        let file = directory.path().join(FILE);
        fs::write(&file, "this is no database, whatever its name says").unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        let mut events = store.watch();
        assert!(
            matches!(events.recv().await, Some(StoreEvent::Snapshot { changes, revision: 1 }) if changes.len() == 1)
        );
        let Some(StoreEvent::Stale { since, why }) = events.recv().await else { panic!("not stale") };
        assert!(since.elapsed().unwrap() < Duration::from_secs(60));
        assert!(why.contains("cannot be read"), "{why}");
        assert!(store.get(&route(1)).await.unwrap().is_some());
        assert_eq!(store.list(Kind::Route).await.unwrap().len(), 1);
        let refused = store.put(&route(2), json!({}), PutOptions::default()).await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
        drop(store);
        // Moved away: rebuilt from the snapshot.
        fs::remove_file(&file).unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        assert_eq!(put(&store, &route(2), json!({})).await.item.modified_index, 2);
        drop(store);
        // Without a snapshot there is nothing to serve, and nothing is overwritten.
        fs::remove_file(directory.path().join("last-good.embedded")).unwrap();
        fs::write(&file, "damaged").unwrap();
        assert!(matches!(Embedded::open(directory.path()), Err(StoreError::Corrupt { .. })));
        assert_eq!(fs::read(&file).unwrap(), b"damaged");
    }

    /// The child of the next test: writes without end and says what was acknowledged.
    #[tokio::test]
    async fn child_that_is_killed() {
        let Ok(directory) = std::env::var("POSTERN_TEST_STORE_CHILD") else { return };
        let store = Arc::new(Embedded::open(Path::new(&directory)).unwrap());
        let start = store.status().revision;
        let writers = (0..8).map(|writer| {
            let store = Arc::clone(&store);
            async move {
                for n in 0u64.. {
                    let key = route(format!("{start}-{writer}-{n}"));
                    put(&store, &key, json!({"uri": format!("/{n}"), "desc": "x".repeat(200)})).await;
                    println!("ACK {}", key.id);
                }
            }
        });
        join_all(writers).await;
    }

    #[tokio::test]
    async fn nothing_acknowledged_is_lost_by_kill_9() {
        let directory = tempfile::tempdir().unwrap();
        let mut acknowledged = Vec::new();
        for round in 1..=5 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store::embedded::tests::child_that_is_killed", "--nocapture"])
                .env("POSTERN_TEST_STORE_CHILD", directory.path())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let mut wanted = 50 * round;
            while wanted > 0 {
                let line = lines.next().unwrap().unwrap();
                if let Some(id) = line.strip_prefix("ACK ") {
                    acknowledged.push(id.to_owned());
                    wanted -= 1;
                }
            }
            // SIGKILL, in the middle of whatever it does.
            child.kill().unwrap();
            child.wait().unwrap();
            acknowledged
                .extend(lines.map_while(Result::ok).filter_map(|l| Some(l.strip_prefix("ACK ")?.to_owned())));
            let store = Embedded::open(directory.path()).unwrap();
            let (changes, revision) = snapshot(&store).await;
            assert!(revision >= changes.len() as u64);
            for id in &acknowledged {
                assert!(store.get(&route(id)).await.unwrap().is_some(), "round {round}: {id} is lost");
            }
        }
    }

    #[tokio::test]
    #[ignore = "a measurement: cargo test --release -p edge -- --ignored --nocapture hundred_thousand"]
    async fn hundred_thousand_routes_load_within_a_second() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path()).unwrap();
        let keys: Vec<_> = (0..100_000).map(route).collect();
        let value = |n: usize| {
            json!({"id": n.to_string(), "uri": format!("/path/{n}/*"), "methods": ["GET"], "priority": 0,
                "status": 1, "create_time": 1_700_000_000, "update_time": 1_700_000_000, "host": "example.com",
                "upstream": {"type": "roundrobin", "scheme": "http", "pass_host": "pass", "hash_on": "vars",
                    "nodes": {"127.0.0.1:8080": 1}}})
        };
        let started = Instant::now();
        for (chunk, keys) in keys.chunks(1000).enumerate() {
            join_all(keys.iter().enumerate().map(|(n, key)| put(&store, key, value(chunk * 1000 + n)))).await;
        }
        println!("written in {:?}", started.elapsed());
        drop(store);
        for killed in [false, true] {
            let started = Instant::now();
            let store = Embedded::open(directory.path()).unwrap();
            let opened = started.elapsed();
            let (changes, _) = snapshot(&store).await;
            let elapsed = started.elapsed();
            println!("opened in {opened:?}, told in {elapsed:?}, after kill: {killed}");
            assert_eq!(changes.len(), 100_000);
            put(&store, &route(1), value(1)).await;
            if !killed {
                // A copy of the file while it is open is what a kill leaves behind.
                let copy = fs::read(directory.path().join(FILE)).unwrap();
                drop(store);
                fs::write(directory.path().join(FILE), copy).unwrap();
            }
        }
    }
}
