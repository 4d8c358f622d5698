//! The store in an etcd cluster, in the key layout APISIX uses, so that an existing one works as it is.
//!
//! A task lists everything, then watches. After any trouble (connection lost, watch compacted) it lists again
//! and tells only the differences: nothing is flushed and nothing dies. What etcd says is believed with two
//! exceptions: an empty list after a full one, and a revision that went back (emptied or restored). Then the
//! objects that are missing are kept, and said to be kept, until they are written again, deleted by name, or
//! the process starts anew with a list that is not empty.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use certs::etcd::Settings;
use config::graph::Change;
use config::process::DataEncryption;
use config::{Kind, ResourceKey};
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, DeleteOptions as DeleteRange, EventType, GetOptions,
    KeyValue, KvClient, PutOptions as PutKey, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchResponse,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::encryption::Encryption;
use super::snapshot_file::{Keeper, Saved, SnapshotFile};
use super::{
    BoxFuture, Condition, DeleteOptions, Feed, Put, PutOptions, Store, StoreError, StoreEvent, StoreStatus,
    Stored,
};

/// Keys of one answer while listing.
const PAGE: i64 = 500;
/// Largest answer. etcd takes requests of 1.5 MiB unless told otherwise, a page has many of them.
const MAX_MESSAGE: usize = 512 << 20;
/// How long a start waits for etcd before it serves the snapshot.
const START: Duration = Duration::from_secs(2);
/// First and longest pause between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How often a silent connection is asked for a sign of life, and how long that may take.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(3));
/// How long the deletes that explain an empty list may take to arrive.
const CONFIRM: Duration = Duration::from_secs(3);

/// The etcd store. Its task ends with it.
pub struct Etcd {
    shared: Arc<Shared>,
    task: OnceLock<JoinHandle<()>>,
}

struct Shared {
    settings: Settings,
    encryption: Encryption,
    feed: Feed,
    mirror: Mutex<Mirror>,
    member: tokio::sync::Mutex<Member>,
    snapshot: SnapshotFile,
    /// When the snapshot that was found at start was last current.
    snapshot_time: Option<SystemTime>,
    keeper: OnceLock<Keeper>,
}

/// The endpoint in use, and its client once connected. The client library would spread requests over all
/// endpoints, those that are down included; one at a time, and the next after a failure, loses none.
#[derive(Default)]
struct Member {
    /// Counts up; the endpoint is this modulo their number.
    turn: usize,
    client: Option<Client>,
}

/// What was told so far.
#[derive(Debug, Default)]
struct Mirror {
    items: BTreeMap<ResourceKey, Stored>,
    /// Of the store, in the history that is followed.
    revision: u64,
    /// Of the cluster's elections; a smaller one is another history.
    term: u64,
    /// Objects that etcd no longer has, but never deleted while we watched.
    kept: BTreeSet<ResourceKey>,
    /// Somebody was told.
    told: bool,
    /// A list of this process was seen.
    listed: bool,
}

/// Everything below the prefix at one revision.
struct Listing {
    items: Vec<Stored>,
    revision: u64,
    term: u64,
}

/// Why following etcd came to an end.
#[derive(Debug)]
enum Trouble {
    /// The revision to go on from is compacted: list again, nothing is lost.
    Compacted,
    /// No contact.
    Lost(String),
}

impl Etcd {
    /// A store that is not connected yet: [`Store::watch`] starts it. `data_dir` holds the snapshot. Reads
    /// the snapshot, so it blocks.
    ///
    /// # Errors
    /// If there is no endpoint, or the TLS files cannot be read.
    pub fn new(settings: Settings, data_dir: &std::path::Path) -> Result<Etcd, StoreError> {
        if settings.endpoints.is_empty() {
            return Err(StoreError::Unavailable("deployment.etcd.host has no endpoint".to_owned()));
        }
        let settings = Settings { prefix: settings.prefix.trim_end_matches('/').to_owned(), ..settings };
        options(&settings)?;
        let snapshot = SnapshotFile::new(data_dir, "etcd", &settings.prefix);
        let (mirror, snapshot_time) = match snapshot.load() {
            Some((saved, since)) => {
                let items = saved.items.into_iter().map(|item| (item.key.clone(), item)).collect();
                let term = saved.extra.get("term").and_then(Value::as_u64).unwrap_or(0);
                (Mirror { items, revision: saved.revision, term, ..Mirror::default() }, Some(since))
            }
            None => (Mirror::default(), None),
        };
        let shared = Arc::new(Shared {
            settings,
            encryption: Encryption::default(),
            feed: Feed::new("etcd"),
            mirror: Mutex::new(mirror),
            member: tokio::sync::Mutex::default(),
            snapshot,
            snapshot_time,
            keeper: OnceLock::new(),
        });
        Ok(Etcd { shared, task: OnceLock::new() })
    }

    /// The same store, keeping secrets as `apisix.data_encryption` says. To be called before it is used; without
    /// it, secrets are written as they are, and read if APISIX wrote them with the key ring it comes with.
    #[must_use]
    pub fn with_encryption(mut self, settings: &DataEncryption) -> Etcd {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.encryption = Encryption::new(settings);
        }
        self
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

impl Store for Etcd {
    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        self.shared.keeper.get_or_init(|| {
            let shared = Arc::downgrade(&self.shared);
            Keeper::start(
                self.shared.snapshot.clone(),
                Arc::new(move |file: &SnapshotFile| {
                    let saved = shared.upgrade()?.mirror().save();
                    Some(file.write(&saved))
                }),
            )
        });
        let receiver = self.shared.feed.subscribe();
        self.task.get_or_init(|| {
            let shared = Arc::clone(&self.shared);
            tokio::spawn(async move {
                loop {
                    // The client library panics on answers it does not know; that must not end the watch.
                    let run = tokio::spawn(run(Arc::clone(&shared)));
                    let _abort = AbortOnDrop(run.abort_handle());
                    if let Err(error) = run.await {
                        shared.feed.stale(SystemTime::now(), format!("etcd: {error}"));
                        tokio::time::sleep(BACKOFF.1).await;
                    }
                }
            })
        });
        receiver
    }

    fn get<'a>(&'a self, key: &'a ResourceKey) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let name = &self.shared.name(key);
            let answer = self.shared.call(|mut client| async move { client.get(name.as_str(), None).await });
            let answer = answer.await?;
            Ok(answer.kvs().first().map(|found| self.shared.stored(key.clone(), found)))
        })
    }

    fn list(&self, kind: Kind) -> BoxFuture<'_, Result<Vec<Stored>, StoreError>> {
        Box::pin(async move {
            let prefix = &format!("{}/{}/", self.shared.settings.prefix, kind.folder().segment());
            let shared = &*self.shared;
            let listing = shared.call(|client| async move { list(&client, shared, prefix).await });
            let mut items = listing.await?.items;
            items.retain(|item| item.key.kind == kind);
            Ok(items)
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
            let json = self.shared.encryption.seal(key, json);
            let size = json.len();
            let name = &self.shared.name(key);
            let (json, options) = (&json, &options);
            let answer = self.shared.call(|mut client| async move {
                let mut how = PutKey::new().with_prev_key();
                if let Some(ttl) = options.ttl {
                    let seconds = i64::try_from(ttl.as_secs_f64().ceil() as u64).unwrap_or(i64::MAX).max(1);
                    how = how.with_lease(client.lease_grant(seconds, None).await?.id());
                }
                let when = match options.condition {
                    Condition::Any => Vec::new(),
                    Condition::Absent => vec![Compare::create_revision(name.as_str(), CompareOp::Equal, 0)],
                    Condition::Modified(revision) => {
                        let revision = i64::try_from(revision).unwrap_or(i64::MAX);
                        vec![Compare::mod_revision(name.as_str(), CompareOp::Equal, revision)]
                    }
                };
                // Read back in the same transaction: only then the revisions are known.
                let write =
                    [TxnOp::put(name.as_str(), json.clone(), Some(how)), TxnOp::get(name.as_str(), None)];
                client.txn(Txn::new().when(when).and_then(write)).await
            });
            let answer = answer.await.map_err(|error| too_large(error, size))?;
            if !answer.succeeded() {
                return Err(StoreError::Conflict);
            }
            let mut created = true;
            let mut item = None;
            for response in answer.op_responses() {
                match response {
                    TxnOpResponse::Put(put) => created = put.prev_key().is_none(),
                    TxnOpResponse::Get(got) => {
                        item = got.kvs().first().map(|found| self.shared.stored(key.clone(), found))
                    }
                    _ => {}
                }
            }
            let item = item.ok_or_else(|| StoreError::Unavailable("etcd: incomplete answer".to_owned()))?;
            Ok(Put { created, item })
        })
    }

    fn delete<'a>(
        &'a self,
        key: &'a ResourceKey,
        _options: DeleteOptions,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            let name = &self.shared.name(key);
            let answer = self.shared.call(|mut client| async move {
                let mut operations = vec![TxnOp::delete(name.as_str(), None)];
                if let Some((_, word)) = key.kind.children() {
                    let all = DeleteRange::new().with_prefix();
                    operations.push(TxnOp::delete(format!("{name}/{word}/"), Some(all)));
                }
                client.txn(Txn::new().and_then(operations)).await
            });
            let deleted =
                answer.await?.op_responses().first().is_some_and(
                    |first| matches!(first, TxnOpResponse::Delete(delete) if delete.deleted() > 0),
                );
            Ok(self.shared.forget(key) || deleted)
        })
    }

    fn generate_id(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async move {
            let name = &format!("{}/gen_id", self.shared.settings.prefix);
            let answer =
                self.shared.call(|mut client| async move { client.put(name.as_str(), "1", None).await });
            let answer = answer.await?;
            let revision = answer.header().map_or(0, |header| header.revision());
            Ok(format!("{revision:020}"))
        })
    }

    fn status(&self) -> StoreStatus {
        self.shared.feed.status()
    }

    fn etcd_version(&self) -> BoxFuture<'_, Option<String>> {
        Box::pin(async move {
            let status = self.shared.call(|mut client| async move { client.status().await }).await;
            status.ok().map(|status| status.version().to_owned())
        })
    }
}

impl Shared {
    fn mirror(&self) -> MutexGuard<'_, Mirror> {
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self, key: &ResourceKey) -> String {
        format!("{}/{key}", self.settings.prefix)
    }

    /// A client of the endpoint in use, and whose turn it is. All share its connection.
    async fn client(&self) -> Result<(Client, usize), etcd_client::Error> {
        let mut member = self.member.lock().await;
        if let Some(client) = &member.client {
            return Ok((client.clone(), member.turn));
        }
        let connect = async {
            let options = options(&self.settings)
                .map_err(|error| etcd_client::Error::InvalidArgs(error.to_string()))?;
            let endpoints = &self.settings.endpoints;
            let endpoint = endpoints.iter().cycle().nth(member.turn % endpoints.len().max(1));
            Client::connect(endpoint.as_slice(), Some(options)).await
        };
        match connect.await {
            Ok(client) => {
                member.client = Some(client.clone());
                Ok((client, member.turn))
            }
            Err(error) => {
                member.turn = member.turn.wrapping_add(1);
                Err(error)
            }
        }
    }

    /// The endpoint of `turn` failed: use the next.
    async fn next_member(&self, turn: usize) {
        let mut member = self.member.lock().await;
        // Somebody else may have noticed before.
        if member.turn == turn {
            *member = Member { turn: turn.wrapping_add(1), client: None };
        }
    }

    async fn call<T, F>(&self, work: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let calls = async {
            let mut left = self.settings.endpoints.len();
            loop {
                left = left.saturating_sub(1);
                let error = match self.client().await {
                    Ok((client, turn)) => match work(client).await {
                        Ok(result) => return Ok(result),
                        Err(error) if is_lost(&error) => {
                            self.next_member(turn).await;
                            error
                        }
                        Err(error) => return Err(error),
                    },
                    Err(error) => error,
                };
                // Whatever was sent may have been done; what found no connection was not.
                if left == 0 || !is_unsent(&error) {
                    return Err(error);
                }
            }
        };
        match timeout(self.settings.timeout, calls).await {
            Ok(result) => {
                result.map_err(|error| StoreError::Unavailable(format!("etcd: {}", reason(&error))))
            }
            Err(_) => Err(StoreError::Unavailable(format!(
                "etcd: no answer within {} ms",
                self.settings.timeout.as_millis()
            ))),
        }
    }

    /// An object that was only kept is deleted by name.
    fn forget(&self, key: &ResourceKey) -> bool {
        let mut mirror = self.mirror();
        if !mirror.kept.contains(key) {
            return false;
        }
        let mut gone = vec![key.clone()];
        let children = mirror.kept.iter().filter(|kept| kept.owner().as_ref() == Some(key));
        gone.extend(children.cloned());
        let modified_index = mirror.revision;
        for key in &gone {
            mirror.kept.remove(key);
            mirror.items.remove(key);
        }
        let changes = gone.into_iter().map(|key| Change::Delete { key, modified_index });
        self.feed.changes(changes, modified_index);
        self.tell_staleness(&mirror);
        true
    }

    fn tell_staleness(&self, mirror: &Mirror) {
        if let Some(keeper) = self.keeper.get() {
            keeper.set_stale(!mirror.kept.is_empty());
        }
        if mirror.kept.is_empty() {
            self.feed.fresh();
            return;
        }
        let mut names: Vec<String> = mirror.kept.iter().take(5).map(ToString::to_string).collect();
        if mirror.kept.len() > names.len() {
            names.push("...".to_owned());
        }
        self.feed.stale(
            SystemTime::now(),
            format!(
                "etcd was emptied or set back; {} objects it no longer has are kept ({}): write them again, \
                 delete them by the Admin API, or restart to drop them",
                mirror.kept.len(),
                names.join(", ")
            ),
        );
    }

    /// Tell what the list has that was not told.
    fn reconcile(&self, listing: Listing, trust: Trust) {
        let mut mirror = self.mirror();
        let first = !std::mem::replace(&mut mirror.told, true);
        let revision = listing.revision;
        let changes = mirror.take(listing, trust);
        if first {
            self.feed.snapshot(mirror.items.values().cloned().collect(), revision);
        } else if !changes.is_empty() {
            self.feed.changes(changes, revision);
        }
        if let Some(keeper) = self.keeper.get() {
            keeper.changed();
        }
        self.tell_staleness(&mirror);
    }

    /// Tell what a watch says.
    fn apply(&self, response: &WatchResponse) {
        let mut mirror = self.mirror();
        let mut changes = Vec::new();
        for event in response.events() {
            let Some(found) = event.kv() else { continue };
            let Some(key) = self.key(found.key()) else { continue };
            mirror.kept.remove(&key);
            if event.event_type() == EventType::Put {
                let item = self.stored(key.clone(), found);
                changes.push(item.to_change());
                mirror.items.insert(key, item);
            } else if mirror.items.remove(&key).is_some() {
                changes.push(Change::Delete { key, modified_index: number(found.mod_revision()) });
            }
        }
        if let Some(header) = response.header() {
            mirror.revision = mirror.revision.max(number(header.revision()));
            mirror.term = mirror.term.max(header.raft_term());
        }
        if changes.is_empty() {
            return;
        }
        self.feed.changes(changes, mirror.revision);
        if let Some(keeper) = self.keeper.get() {
            keeper.changed();
        }
        self.tell_staleness(&mirror);
    }

    fn stored(&self, key: ResourceKey, found: &KeyValue) -> Stored {
        Stored {
            value: self.encryption.open(&key, found.value()),
            key,
            created_index: number(found.create_revision()),
            modified_index: number(found.mod_revision()),
        }
    }

    fn key(&self, name: &[u8]) -> Option<ResourceKey> {
        key(&self.settings.prefix, name)
    }

    /// Serve the snapshot, if nothing better was told yet.
    fn serve_snapshot(&self) {
        let mut mirror = self.mirror();
        if mirror.told || self.snapshot_time.is_none() {
            return;
        }
        mirror.told = true;
        self.feed.snapshot(mirror.items.values().cloned().collect(), mirror.revision);
    }
}

/// How far a list is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    /// What is missing was deleted.
    Full,
    /// What is missing is kept.
    NoDeletes,
}

impl Mirror {
    fn save(&self) -> Saved {
        Saved {
            revision: self.revision,
            items: self.items.values().cloned().collect(),
            extra: json!({"term": self.term}),
        }
    }

    /// Whether the list can only be of another history than the one that was followed.
    fn went_back(&self, listing: &Listing) -> bool {
        listing.revision < self.revision
            || listing.term < self.term
            || listing.items.iter().any(|item| {
                self.items.get(&item.key).is_some_and(|known| item.modified_index < known.modified_index)
            })
    }

    /// Whether the list has nothing where there was something that etcd should still have.
    fn emptied(&self, listing: &Listing) -> bool {
        listing.items.is_empty() && self.items.len() > self.kept.len()
    }

    /// Become the list. Gives the changes that lead there.
    fn take(&mut self, listing: Listing, trust: Trust) -> Vec<Change> {
        self.listed = true;
        let mut changes = Vec::new();
        let mut missing: BTreeSet<ResourceKey> = self.items.keys().cloned().collect();
        for item in listing.items {
            missing.remove(&item.key);
            self.kept.remove(&item.key);
            if self.items.get(&item.key) != Some(&item) {
                changes.push(item.to_change());
                self.items.insert(item.key.clone(), item);
            }
        }
        for key in missing {
            if trust == Trust::NoDeletes {
                self.kept.insert(key);
            } else if !self.kept.contains(&key) {
                self.items.remove(&key);
                changes.push(Change::Delete { key, modified_index: listing.revision });
            }
        }
        self.revision = listing.revision;
        self.term = listing.term;
        changes
    }
}

/// Follow etcd for ever.
async fn run(shared: Arc<Shared>) {
    let mut contact = shared.snapshot_time.unwrap_or_else(SystemTime::now);
    let mut pause = BACKOFF.0;
    let late = Instant::now() + START;
    loop {
        let started = Instant::now();
        let trouble = {
            let followed = follow(&shared, &mut contact);
            tokio::pin!(followed);
            tokio::select! {
                trouble = &mut followed => trouble,
                () = tokio::time::sleep_until(late), if !shared.mirror().told => {
                    // Asked again: etcd may have answered since the wait began.
                    if !shared.mirror().told {
                        shared.serve_snapshot();
                        // Whoever has tried knows better why.
                        if shared.feed.status().stale.is_none() {
                            let since = shared.snapshot_time.unwrap_or_else(SystemTime::now);
                            shared.feed.stale(since, "etcd: not reached yet");
                        }
                    }
                    followed.await
                }
            }
        };
        match trouble {
            Trouble::Compacted => tracing::info!("etcd compacted what was to be watched, listing again"),
            Trouble::Lost(why) => {
                if let Some(keeper) = shared.keeper.get() {
                    keeper.set_stale(true);
                }
                shared.serve_snapshot();
                shared.feed.stale(contact, format!("etcd: {why}"));
            }
        }
        pause = if started.elapsed() > BACKOFF.1 { BACKOFF.0 } else { (pause * 2).min(BACKOFF.1) };
        // Jitter, so that a thousand gateways do not come back at once.
        tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
    }
}

/// List, tell, watch. `contact` is when etcd last said something.
async fn follow(shared: &Shared, contact: &mut SystemTime) -> Trouble {
    let late = |_| etcd_client::Error::Internal("no answer to the connection".to_owned());
    let client = timeout(shared.settings.timeout, shared.client()).await.map_err(late);
    let (client, turn) = match client.flatten() {
        Ok(connected) => connected,
        Err(error) => return Trouble::Lost(reason(&error)),
    };
    let trouble = match try_follow(shared, client, contact).await {
        Ok(trouble) => trouble,
        Err(error) => Trouble::Lost(reason(&error)),
    };
    if matches!(trouble, Trouble::Lost(_)) {
        shared.next_member(turn).await;
    }
    trouble
}

async fn try_follow(
    shared: &Shared,
    client: Client,
    contact: &mut SystemTime,
) -> Result<Trouble, etcd_client::Error> {
    let settings = &shared.settings;
    let patience = settings.timeout;
    let listing = list(&client, shared, &format!("{}/", settings.prefix)).await?;
    *contact = SystemTime::now();
    let (start, listed, went_back, emptied) = {
        let mirror = shared.mirror();
        (mirror.revision + 1, mirror.listed, mirror.went_back(&listing), mirror.emptied(&listing))
    };
    let trust = if emptied {
        if !went_back && deletes_are_seen(shared, &client, start).await {
            Trust::Full
        } else {
            Trust::NoDeletes
        }
    } else if went_back && listed {
        Trust::NoDeletes
    } else {
        Trust::Full
    };
    let next = i64::try_from(listing.revision).unwrap_or(i64::MAX).saturating_add(1);
    shared.reconcile(listing, trust);
    let mut watch = open_watch(&client, settings, next, patience).await?;
    while let Some(response) = watch.message().await? {
        *contact = SystemTime::now();
        if response.canceled() {
            if response.compact_revision() > 0 {
                return Ok(Trouble::Compacted);
            }
            return Ok(Trouble::Lost(format!("watch cancelled: {}", response.cancel_reason())));
        }
        shared.apply(&response);
    }
    Ok(Trouble::Lost("the watch ended".to_owned()))
}

/// Whether the history from `start` on has a delete for everything that was there, so that an empty list is
/// meant. It has not if the history is compacted.
async fn deletes_are_seen(shared: &Shared, client: &Client, start: u64) -> bool {
    let mut there: BTreeSet<ResourceKey> = shared.mirror().items.keys().cloned().collect();
    let replay = async {
        let start = i64::try_from(start).unwrap_or(i64::MAX);
        let mut watch = open_watch(client, &shared.settings, start, CONFIRM).await.ok()?;
        while !there.is_empty() {
            let response = watch.message().await.ok()??;
            if response.canceled() {
                return None;
            }
            for event in response.events() {
                let Some(key) = event.kv().and_then(|found| shared.key(found.key())) else { continue };
                if event.event_type() == EventType::Put {
                    there.insert(key);
                } else {
                    there.remove(&key);
                }
            }
        }
        Some(())
    };
    matches!(timeout(CONFIRM, replay).await, Ok(Some(())))
}

async fn open_watch(
    client: &Client,
    settings: &Settings,
    start: i64,
    patience: Duration,
) -> Result<etcd_client::WatchStream, etcd_client::Error> {
    let options = WatchOptions::new().with_prefix().with_start_revision(start).with_progress_notify();
    let mut watcher = client.watch_client().max_decoding_message_size(MAX_MESSAGE);
    match timeout(patience, watcher.watch(format!("{}/", settings.prefix), Some(options))).await {
        Ok(watch) => watch,
        Err(_) => Err(etcd_client::Error::WatchError("no answer to the watch".to_owned())),
    }
}

/// All objects below `prefix` at one revision, page by page.
async fn list(client: &Client, shared: &Shared, prefix: &str) -> Result<Listing, etcd_client::Error> {
    let mut kv: KvClient = client.kv_client().max_decoding_message_size(MAX_MESSAGE);
    let end = after(prefix.as_bytes());
    let mut from = prefix.as_bytes().to_vec();
    let mut listing = Listing { items: Vec::new(), revision: 0, term: 0 };
    loop {
        let mut page = GetOptions::new().with_range(end.clone()).with_limit(PAGE);
        if listing.revision > 0 {
            page = page.with_revision(i64::try_from(listing.revision).unwrap_or(i64::MAX));
        }
        let answer = timeout(shared.settings.timeout, kv.get(from, Some(page))).await;
        let answer =
            answer.map_err(|_| etcd_client::Error::Internal("no answer to the list".to_owned()))??;
        if let Some(header) = answer.header()
            && listing.revision == 0
        {
            listing.revision = number(header.revision());
            listing.term = header.raft_term();
        }
        let found = answer.kvs();
        let items = found.iter().filter_map(|item| Some(shared.stored(shared.key(item.key())?, item)));
        listing.items.extend(items);
        let Some(last) = found.last().filter(|_| answer.more()) else { return Ok(listing) };
        from = last.key().to_vec();
        from.push(0);
    }
}

/// The first key that does not begin with `prefix`, which ends with a slash.
fn after(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}

/// The object a key of etcd is about; none for what other parts of APISIX keep there, and for directories.
fn key(prefix: &str, name: &[u8]) -> Option<ResourceKey> {
    let path = std::str::from_utf8(name).ok()?.strip_prefix(prefix)?.strip_prefix('/')?;
    ResourceKey::from_path(path)
}

fn number(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

fn options(settings: &Settings) -> Result<ConnectOptions, StoreError> {
    let options = settings.options().map_err(StoreError::Unavailable)?;
    Ok(options
        .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
        .with_connect_timeout(settings.timeout.min(Duration::from_secs(5)))
        .with_require_leader(true)
        .with_auto_token_refresh(true))
}

/// What the operator should read: the message of etcd without the wrapping.
fn reason(error: &etcd_client::Error) -> String {
    match error {
        etcd_client::Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    }
}

/// Whether the endpoint is to blame, so that another one may do better.
fn is_lost(error: &etcd_client::Error) -> bool {
    match error {
        // Unavailable, deadline exceeded, unknown: the connection, or a member without a leader.
        etcd_client::Error::GRpcStatus(status) => matches!(i32::from(status.code()), 14 | 4 | 2),
        _ => true,
    }
}

/// Whether the request did not even get a connection.
fn is_unsent(error: &etcd_client::Error) -> bool {
    reason(error).contains("connect error")
}

fn too_large(error: StoreError, size: usize) -> StoreError {
    match error {
        StoreError::Unavailable(why)
            if why.contains("request is too large") || why.contains("message larger than max") =>
        {
            StoreError::TooLarge { size, limit: 3 << 19 }
        }
        other => other,
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use std::net::{SocketAddr, TcpListener as StdListener};
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::sync::atomic::{AtomicU16, Ordering};

    use certs::etcd::Tls;
    use etcd_client::CompactionOptions;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::watch;

    use super::*;

    /// A real etcd with a data directory of its own. Killed when dropped.
    struct Server {
        child: Option<Child>,
        directory: tempfile::TempDir,
        address: SocketAddr,
        arguments: Vec<String>,
        scheme: &'static str,
    }

    impl Server {
        async fn start() -> Server {
            Server::with("http", Vec::new()).await
        }

        async fn with(scheme: &'static str, arguments: Vec<String>) -> Server {
            let mut server = Server {
                child: None,
                directory: tempfile::tempdir().unwrap(),
                address: free_address(),
                arguments,
                scheme,
            };
            server.run().await;
            server
        }

        async fn run(&mut self) {
            let (client, peer) = (format!("{}://{}", self.scheme, self.address), free_address());
            let child = Command::new("etcd")
                .args(["--data-dir", self.directory.path().join("data").to_str().unwrap()])
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args([format!("--listen-peer-urls=http://{peer}")])
                .args([format!("--initial-advertise-peer-urls=http://{peer}")])
                .args([format!("--initial-cluster=default=http://{peer}")])
                .args(["--unsafe-no-fsync", "--log-level", "error"])
                .args(&self.arguments)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("etcd is installed (Debian: etcd-server)");
            self.child = Some(child);
            let deadline = Instant::now() + Duration::from_secs(30);
            while TcpStream::connect(self.address).await.is_err() {
                assert!(Instant::now() < deadline, "etcd does not start");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }

        fn kill(&mut self) {
            if let Some(mut child) = self.child.take() {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }

        fn empty(&self) {
            std::fs::remove_dir_all(self.directory.path().join("data")).unwrap();
        }

        fn settings(&self) -> Settings {
            settings(&format!("{}://{}", self.scheme, self.address))
        }

        async fn client(&self) -> Client {
            let deadline = Instant::now() + Duration::from_secs(30);
            loop {
                let mut client = Client::connect([format!("http://{}", self.address)], None).await.unwrap();
                if matches!(timeout(Duration::from_secs(5), client.get("x", None)).await, Ok(Ok(_))) {
                    return client;
                }
                assert!(Instant::now() < deadline, "etcd does not answer");
            }
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            self.kill();
        }
    }

    /// Below those that the kernel gives to connections and above those of the end-to-end tests, and each once.
    fn free_address() -> SocketAddr {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let start = u16::try_from(std::process::id() % 700).unwrap();
        let address = || {
            let number = 32_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % 768;
            SocketAddr::from(([127, 0, 0, 1], number))
        };
        (0..768).map(|_| address()).find(|address| StdListener::bind(address).is_ok()).unwrap()
    }

    fn settings(endpoint: &str) -> Settings {
        Settings {
            endpoints: vec![endpoint.to_owned()],
            prefix: "/apisix".to_owned(),
            timeout: Duration::from_secs(5),
            ..Settings::default()
        }
    }

    /// What a compile loop would know.
    struct Seen {
        events: mpsc::Receiver<StoreEvent>,
        items: BTreeMap<String, Value>,
        stale: Option<(SystemTime, String)>,
        revision: u64,
        snapshots: usize,
    }

    impl Seen {
        fn by(store: &Etcd) -> Seen {
            Seen { events: store.watch(), items: BTreeMap::new(), stale: None, revision: 0, snapshots: 0 }
        }

        fn ids(&self) -> Vec<&str> {
            self.items.keys().map(String::as_str).collect()
        }

        async fn until(&mut self, what: &str, done: impl Fn(&Seen) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(30);
            while !done(self) {
                let event = tokio::time::timeout_at(deadline, self.events.recv()).await;
                let event =
                    event.unwrap_or_else(|_| panic!("{what}: only {:?}, {:?}", self.items, self.stale));
                match event.unwrap() {
                    StoreEvent::Snapshot { changes, revision } => {
                        self.items.clear();
                        self.snapshots += 1;
                        self.apply(changes, revision);
                    }
                    StoreEvent::Changes { changes, revision } => self.apply(changes, revision),
                    StoreEvent::Stale { since, why } => self.stale = Some((since, why)),
                    StoreEvent::Fresh => self.stale = None,
                }
            }
        }

        fn apply(&mut self, changes: impl IntoIterator<Item = Change>, revision: u64) {
            self.revision = revision;
            for change in changes {
                match change {
                    Change::Put { key, value, .. } => drop(self.items.insert(key.to_string(), value)),
                    Change::Delete { key, .. } => drop(self.items.remove(&key.to_string())),
                }
            }
        }
    }

    fn route(id: &str) -> ResourceKey {
        ResourceKey::new(Kind::Route, id)
    }

    fn store(settings: Settings, data_dir: &Path) -> Etcd {
        Etcd::new(settings, data_dir).unwrap()
    }

    async fn put(client: &mut Client, key: &str, value: &str) {
        client.put(key, value, None).await.unwrap();
    }

    #[tokio::test]
    async fn the_layout_is_that_of_apisix() {
        let server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        let mut client = server.client().await;
        for (key, value) in [
            ("/apisix/routes/", "init_dir"),
            ("/apisix/routes/1", r#"{"uri":"/a"}"#),
            ("/apisix/consumers/jack", "{}"),
            ("/apisix/consumers/jack/credentials/c", "{}"),
            ("/apisix/plugin_metadata/http-logger", "{}"),
            ("/apisix/ssls/1", "{}"),
            ("/apisix/secrets/vault/1", "{}"),
            ("/apisix/plugins", "[]"),
            ("/apisix/data_plane/server_info/x", "{}"),
            ("/apisix/gen_id", "1"),
            ("/apisix2/routes/9", "{}"),
            ("/other", "{}"),
        ] {
            put(&mut client, key, value).await;
        }
        let store = store(server.settings(), data.path());
        let mut seen = Seen::by(&store);
        seen.until("the list", |seen| seen.snapshots == 1).await;
        assert_eq!(
            seen.ids(),
            [
                "consumers/jack",
                "consumers/jack/credentials/c",
                "plugin_metadata/http-logger",
                "routes/1",
                "secrets/vault/1",
                "ssls/1",
            ]
        );
        // Something that is no JSON is handed on, so that it is set aside and shown.
        put(&mut client, "/apisix/routes/bad", "{oops").await;
        seen.until("the bad one", |seen| seen.items.get("routes/bad").is_some_and(Value::is_string)).await;

        let written = store.put(&route("2"), json!({"uri": "/2"}), PutOptions::default()).await.unwrap();
        assert!(written.created);
        assert_eq!(written.item.created_index, written.item.modified_index);
        let raw = client.get("/apisix/routes/2", None).await.unwrap();
        let raw = raw.kvs().first().unwrap();
        assert_eq!(raw.value_str().unwrap(), r#"{"uri":"/2"}"#);
        assert_eq!(number(raw.mod_revision()), written.item.modified_index);
        let again = store.put(&route("2"), json!({"uri": "/3"}), PutOptions::default()).await.unwrap();
        assert!(!again.created);
        assert_eq!(again.item.created_index, written.item.created_index);
        assert_eq!(store.get(&route("2")).await.unwrap().unwrap(), again.item);
        for (condition, works) in [
            (Condition::Absent, false),
            (Condition::Modified(1), false),
            (Condition::Modified(again.item.modified_index), true),
        ] {
            let options = PutOptions { condition, ..PutOptions::default() };
            let result = store.put(&route("2"), json!({"uri": "/4"}), options).await;
            assert_eq!(result.is_ok(), works, "{condition:?} {result:?}");
        }
        assert_eq!(store.list(Kind::Consumer).await.unwrap().len(), 1);
        assert_eq!(store.list(Kind::Credential).await.unwrap().len(), 1);
        assert_eq!(store.list(Kind::Route).await.unwrap().len(), 3);
        let id = store.generate_id().await.unwrap();
        assert!(id.len() == 20 && id > format!("{:020}", again.item.modified_index), "{id}");
        let jack = ResourceKey::new(Kind::Consumer, "jack");
        assert!(store.delete(&jack, DeleteOptions::default()).await.unwrap());
        assert!(!store.delete(&jack, DeleteOptions::default()).await.unwrap());
        seen.until("consumer and credential are gone", |seen| {
            !seen.items.keys().any(|key| key.starts_with("consumers/"))
        })
        .await;
        // What APISIX encrypted is read.
        let sealed = r#"{"username":"jill","plugins":{"key-auth":{"key":"RjeV6km+KxQJN2rfu8Y7aA=="}}}"#;
        put(&mut client, "/apisix/consumers/jill", sealed).await;
        seen.until("decrypted", |seen| {
            let jill = seen.items.get("consumers/jill");
            jill.and_then(|jill| jill.pointer("/plugins/key-auth/key")).is_some_and(|key| key == "auth-one")
        })
        .await;
        let huge = json!({"desc": "x".repeat(2 << 20)});
        let refused = store.put(&route("3"), huge, PutOptions::default()).await;
        assert!(matches!(refused, Err(StoreError::TooLarge { .. })), "{refused:?}");
        let ttl = PutOptions { ttl: Some(Duration::from_millis(900)), ..PutOptions::default() };
        store.put(&route("ttl"), json!({"uri": "/"}), ttl).await.unwrap();
        seen.until("it is there", |seen| seen.items.contains_key("routes/ttl")).await;
        seen.until("it deleted itself", |seen| !seen.items.contains_key("routes/ttl")).await;
        assert_eq!(seen.snapshots, 1);
    }

    #[tokio::test]
    async fn more_than_a_page_is_listed() {
        let server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        let mut client = server.client().await;
        let count = usize::try_from(PAGE).unwrap() * 2 + 1;
        for chunk in (0..count).collect::<Vec<_>>().chunks(100) {
            let puts: Vec<_> = chunk
                .iter()
                .map(|n| TxnOp::put(format!("/apisix/routes/{n}"), r#"{"uri":"/"}"#, None))
                .collect();
            client.txn(Txn::new().and_then(puts)).await.unwrap();
        }
        let store = store(server.settings(), data.path());
        let mut seen = Seen::by(&store);
        seen.until("all", |seen| seen.items.len() == count).await;
    }

    #[tokio::test]
    async fn etcd_killed_and_back() {
        let mut server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        put(&mut server.client().await, "/apisix/routes/1", r#"{"uri":"/a"}"#).await;
        let first = store(server.settings(), data.path());
        let mut seen = Seen::by(&first);
        seen.until("the list", |seen| seen.items.len() == 1).await;
        let before = SystemTime::now();
        server.kill();
        seen.until("stale", |seen| seen.stale.is_some()).await;
        assert!(seen.stale.as_ref().unwrap().0 <= before + Duration::from_secs(10));
        assert_eq!(seen.ids(), ["routes/1"]);
        let refused = first.put(&route("2"), json!({}), PutOptions::default()).await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");

        // Started while etcd is away: the snapshot serves.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !data.path().join("last-good.etcd").exists() {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let second = store(server.settings(), data.path());
        let mut started = Seen::by(&second);
        started.until("snapshot, stale", |seen| seen.snapshots == 1 && seen.stale.is_some()).await;
        assert_eq!(started.ids(), ["routes/1"]);
        assert_eq!(started.items.get("routes/1").unwrap(), &json!({"uri": "/a"}));

        server.run().await;
        put(&mut server.client().await, "/apisix/routes/2", r#"{"uri":"/b"}"#).await;
        for seen in [&mut seen, &mut started] {
            seen.until("current", |seen| seen.stale.is_none() && seen.items.len() == 2).await;
        }
    }

    #[tokio::test]
    async fn etcd_that_hangs_is_noticed_and_followed_again() {
        use nix::sys::signal::{Signal, kill};

        let server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        let mut client = server.client().await;
        put(&mut client, "/apisix/routes/1", "{}").await;
        let store = store(Settings { timeout: Duration::from_secs(1), ..server.settings() }, data.path());
        let mut seen = Seen::by(&store);
        seen.until("the list", |seen| seen.items.len() == 1).await;
        let process = nix::unistd::Pid::from_raw(server.child.as_ref().unwrap().id().try_into().unwrap());
        kill(process, Signal::SIGSTOP).unwrap();
        seen.until("stale", |seen| seen.stale.is_some()).await;
        let refused = store.get(&route("1")).await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
        kill(process, Signal::SIGCONT).unwrap();
        seen.until("current", |seen| seen.stale.is_none()).await;
        put(&mut server.client().await, "/apisix/routes/2", "{}").await;
        seen.until("followed", |seen| seen.items.len() == 2).await;
    }

    #[tokio::test]
    async fn etcd_restarted_empty_keeps_what_was_there_until_it_is_said_otherwise() {
        let mut server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        let mut client = server.client().await;
        for id in 1..=4 {
            put(&mut client, &format!("/apisix/routes/{id}"), r#"{"uri":"/a"}"#).await;
        }
        let store = store(server.settings(), data.path());
        let mut seen = Seen::by(&store);
        seen.until("the list", |seen| seen.items.len() == 4).await;
        server.kill();
        server.empty();
        server.run().await;
        let kept = |seen: &Seen| seen.stale.as_ref().is_some_and(|(_, why)| why.contains("are kept"));
        seen.until("said", kept).await;
        assert_eq!(seen.items.len(), 4);
        // Somebody writes things again, one by one: nothing else goes away.
        let mut client = server.client().await;
        put(&mut client, "/apisix/routes/1", r#"{"uri":"/new"}"#).await;
        seen.until("the new one", |seen| seen.items.get("routes/1") == Some(&json!({"uri": "/new"}))).await;
        assert_eq!(seen.items.len(), 4);
        // Not even by another loss of contact.
        server.kill();
        seen.until("away", |seen| !kept(seen)).await;
        server.run().await;
        seen.until("said again", kept).await;
        assert_eq!(seen.items.len(), 4);
        assert!(store.delete(&route("2"), DeleteOptions::default()).await.unwrap());
        seen.until("deleted by name", |seen| !seen.items.contains_key("routes/2")).await;
        store.put(&route("3"), json!({"uri": "/3"}), PutOptions::default()).await.unwrap();
        assert!(seen.stale.is_some());
        assert!(store.delete(&route("4"), DeleteOptions::default()).await.unwrap());
        seen.until("all said", |seen| seen.stale.is_none()).await;
        assert_eq!(seen.ids(), ["routes/1", "routes/3"]);
        assert_eq!(seen.snapshots, 1);
    }

    #[tokio::test]
    async fn an_empty_etcd_at_start_does_not_empty_the_snapshot() {
        let mut server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        put(&mut server.client().await, "/apisix/routes/1", "{}").await;
        let first = store(server.settings(), data.path());
        let mut seen = Seen::by(&first);
        seen.until("the list", |seen| seen.items.len() == 1).await;
        let saved = first.shared.mirror().save();
        first.shared.snapshot.write(&saved).unwrap();
        drop(first);
        server.kill();
        server.empty();
        server.run().await;
        let second = store(server.settings(), data.path());
        let mut seen = Seen::by(&second);
        seen.until("kept", |seen| seen.items.len() == 1 && seen.stale.is_some()).await;
        drop(second);
        // A list that is not empty is taken at start, whatever its revision.
        put(&mut server.client().await, "/apisix/routes/9", "{}").await;
        let third = store(server.settings(), data.path());
        let mut seen = Seen::by(&third);
        seen.until("the new list", |seen| seen.ids() == ["routes/9"] && seen.stale.is_none()).await;
    }

    /// A wire that can be cut.
    struct Wire {
        address: SocketAddr,
        up: watch::Sender<bool>,
        task: JoinHandle<()>,
    }

    impl Wire {
        async fn to(target: SocketAddr) -> Wire {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (up, is_up) = watch::channel(true);
            let task = tokio::spawn(async move {
                loop {
                    let (mut near, _) = listener.accept().await.unwrap();
                    let mut is_up = is_up.clone();
                    if !*is_up.borrow() {
                        continue;
                    }
                    tokio::spawn(async move {
                        let Ok(mut far) = TcpStream::connect(target).await else { return };
                        tokio::select! {
                            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                            _ = is_up.wait_for(|up| !up) => {}
                        }
                    });
                }
            });
            Wire { address, up, task }
        }
    }

    impl Drop for Wire {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    #[tokio::test]
    async fn a_compacted_watch_lists_and_tells_the_differences() {
        let server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        let mut client = server.client().await;
        for id in ["1", "2", "3"] {
            put(&mut client, &format!("/apisix/routes/{id}"), r#"{"uri":"/a"}"#).await;
        }
        let wire = Wire::to(server.address).await;
        let store = store(settings(&format!("http://{}", wire.address)), data.path());
        let mut seen = Seen::by(&store);
        seen.until("the list", |seen| seen.items.len() == 3).await;
        wire.up.send_replace(false);
        seen.until("stale", |seen| seen.stale.is_some()).await;
        put(&mut client, "/apisix/routes/1", r#"{"uri":"/b"}"#).await;
        client.delete("/apisix/routes/2", None).await.unwrap();
        put(&mut client, "/apisix/routes/4", r#"{"uri":"/d"}"#).await;
        let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
        client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
        wire.up.send_replace(true);
        seen.until("current", |seen| seen.stale.is_none()).await;
        assert_eq!(seen.ids(), ["routes/1", "routes/3", "routes/4"]);
        assert_eq!(seen.items.get("routes/1").unwrap(), &json!({"uri": "/b"}));
        assert_eq!(seen.snapshots, 1, "differences, no second snapshot");

        // Emptied behind our back, and the history is gone: not believed.
        wire.up.send_replace(false);
        seen.until("stale", |seen| seen.stale.is_some()).await;
        for id in ["1", "3", "4"] {
            client.delete(format!("/apisix/routes/{id}"), None).await.unwrap();
        }
        let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
        client.compact(revision, None).await.unwrap();
        wire.up.send_replace(true);
        let kept = |seen: &Seen| seen.stale.as_ref().is_some_and(|(_, why)| why.contains("are kept"));
        seen.until("kept", kept).await;
        assert_eq!(seen.items.len(), 3);
    }

    #[tokio::test]
    async fn deletes_that_are_seen_may_empty_everything() {
        let server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        let mut client = server.client().await;
        let wire = Wire::to(server.address).await;
        let store = store(settings(&format!("http://{}", wire.address)), data.path());
        let mut seen = Seen::by(&store);
        seen.until("an empty list at first", |seen| seen.snapshots == 1).await;
        put(&mut client, "/apisix/routes/1", "{}").await;
        seen.until("one", |seen| seen.items.len() == 1).await;
        client.delete("/apisix/routes/1", None).await.unwrap();
        seen.until("none", |seen| seen.items.is_empty()).await;
        // While the wire is cut the history still has the deletes.
        put(&mut client, "/apisix/routes/1", "{}").await;
        put(&mut client, "/apisix/routes/2", "{}").await;
        seen.until("two", |seen| seen.items.len() == 2).await;
        wire.up.send_replace(false);
        seen.until("stale", |seen| seen.stale.is_some()).await;
        put(&mut client, "/apisix/routes/3", "{}").await;
        for id in ["1", "2", "3"] {
            client.delete(format!("/apisix/routes/{id}"), None).await.unwrap();
        }
        wire.up.send_replace(true);
        seen.until("empty and current", |seen| seen.items.is_empty() && seen.stale.is_none()).await;
    }

    #[tokio::test]
    async fn several_endpoints_one_of_them_dead() {
        let server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        put(&mut server.client().await, "/apisix/routes/1", "{}").await;
        let mut settings = server.settings();
        settings.endpoints.insert(0, format!("http://{}", free_address()));
        let store = store(settings, data.path());
        let mut seen = Seen::by(&store);
        seen.until("the list", |seen| seen.items.len() == 1).await;
        for _ in 0..5 {
            assert!(store.get(&route("1")).await.unwrap().is_some());
        }
    }

    #[tokio::test]
    async fn an_etcd_that_was_never_there_is_told_once() {
        let data = tempfile::tempdir().unwrap();
        let store = store(settings(&format!("http://{}", free_address())), data.path());
        let mut events = store.watch();
        let mut told = Vec::new();
        let all = async {
            while let Some(event) = events.recv().await {
                if let StoreEvent::Stale { why, .. } = event {
                    told.push(why);
                }
            }
        };
        // Longer than it takes to be asked again after the first wait for it.
        assert!(timeout(START + BACKOFF.1 * 2, all).await.is_err(), "the store goes on");
        assert_eq!(told.len(), 1, "{told:?}");
    }

    #[tokio::test]
    async fn user_and_password() {
        let server = Server::start().await;
        let data = tempfile::tempdir().unwrap();
        let mut client = server.client().await;
        put(&mut client, "/apisix/routes/1", "{}").await;
        client.user_add("root", "let-me-in", None).await.unwrap();
        client.user_grant_role("root", "root").await.unwrap();
        client.auth_enable().await.unwrap();
        let mut settings = server.settings();
        settings.user = Some(("root".to_owned(), "wrong".to_owned()));
        let refused = store(settings.clone(), data.path());
        let mut seen = Seen::by(&refused);
        seen.until("refused", |seen| seen.stale.is_some()).await;
        assert!(!format!("{:?} {:?}", seen.stale, refused.shared.settings).contains("wrong\""));
        settings.user = Some(("root".to_owned(), "let-me-in".to_owned()));
        let store = store(settings, data.path());
        let mut seen = Seen::by(&store);
        seen.until("the list", |seen| seen.items.len() == 1).await;
        store.put(&route("2"), json!({}), PutOptions::default()).await.unwrap();
        seen.until("the write", |seen| seen.items.len() == 2).await;
    }

    #[tokio::test]
    async fn tls_with_a_client_certificate() {
        let files = tempfile::tempdir().unwrap();
        let path = |name: &str| files.path().join(name);
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let issuer = rcgen::Issuer::new(ca, ca_key);
        std::fs::write(path("ca.pem"), ca_certificate.pem()).unwrap();
        for name in ["server", "client"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let names = vec!["127.0.0.1".to_owned(), format!("{name}.test")];
            let mut params = rcgen::CertificateParams::new(names).unwrap();
            params.extended_key_usages =
                vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
            let certificate = params.signed_by(&key, &issuer).unwrap();
            std::fs::write(path(&format!("{name}.pem")), certificate.pem()).unwrap();
            std::fs::write(path(&format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        let file = |name: &str| path(name).to_str().unwrap().to_owned();
        let arguments = vec![
            format!("--cert-file={}", file("server.pem")),
            format!("--key-file={}", file("server.key")),
            format!("--trusted-ca-file={}", file("ca.pem")),
            "--client-cert-auth".to_owned(),
        ];
        let server = Server::with("https", arguments).await;
        let data = tempfile::tempdir().unwrap();
        let mut settings = server.settings();
        settings.tls = Tls {
            ca: Some(path("ca.pem")),
            identity: Some((path("client.pem"), path("client.key"))),
            server_name: Some("server.test".to_owned()),
        };
        let trusted = store(settings.clone(), data.path());
        let mut seen = Seen::by(&trusted);
        seen.until("the list", |seen| seen.snapshots == 1).await;
        trusted.put(&route("1"), json!({}), PutOptions::default()).await.unwrap();
        seen.until("the write", |seen| seen.items.len() == 1).await;
        settings.tls.ca = Some(path("client.pem"));
        settings.timeout = Duration::from_secs(1);
        let stranger = store(settings.clone(), tempfile::tempdir().unwrap().path());
        assert!(stranger.get(&route("1")).await.is_err());
        settings.tls.ca = Some(path("missing.pem"));
        assert!(matches!(Etcd::new(settings, data.path()), Err(StoreError::Unavailable(_))));
    }
}
