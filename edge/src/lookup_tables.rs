//! Lookup tables on the control side: which there are, the lists that are fetched for them, and the letting go of
//! entries that nobody uses.
//!
//! A list is asked for again and again, with its `ETag`. What was good last stays in use, over restarts as well, while
//! the server cannot be asked or answers nonsense; since when it is old is shown. Nothing here runs on a worker.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use config::lookup_table::{LookupEntry, Source};
use config::plugin_catalog::NoPlugins;
use config::{Env, Kind, Resource, ResourceKey};
use http::{HeaderName, HeaderValue, Request, StatusCode, header};
use layers::lookup::{Entry, Standing, Table};
use layers::upstream::cluster::Cluster;
use layers::upstream::cluster::ClusterEnv;
use plugins::support::http_call::{HttpClient, Settings};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::running::Running;
use crate::store::keep;

/// How often entries are looked at for whether they are used.
const SWEEP: Duration = Duration::from_secs(1);
/// Refused entries of a list that are shown.
const SHOWN: usize = 20;

/// The entries of a list by their keys; of one that is wrong, why.
pub type Fetched = Vec<(Arc<str>, Result<Arc<LookupEntry>, Arc<str>>)>;

/// The lookup tables of the process. Clones are the same.
#[derive(Clone)]
pub struct Lookups(Arc<Shared>);

struct Shared {
    tables: Mutex<BTreeMap<Box<str>, Arc<Table>>>,
    wanted: watch::Sender<BTreeMap<Box<str>, Arc<Source>>>,
    lists: Mutex<HashMap<Box<str>, List>>,
}

/// What is known of a list.
#[derive(Default)]
struct List {
    entries: Option<Arc<Fetched>>,
    /// When the server last said what the list is, or that it is the same.
    confirmed: Option<SystemTime>,
    /// Since when it has not, and why.
    stale: Option<(SystemTime, String)>,
    refused: Vec<(Arc<str>, String)>,
    good: u64,
    failed: u64,
}

impl Default for Lookups {
    fn default() -> Self {
        let wanted = watch::Sender::default();
        Self(Arc::new(Shared { tables: Mutex::default(), wanted, lists: Mutex::default() }))
    }
}

/// What lists say of a lookup table for the Control API and metrics.
pub struct TableView {
    /// The table.
    pub table: Arc<Table>,
    /// How many entries there are, and how many of them have a cluster.
    pub counts: (usize, usize),
    /// Of a table with a list: since when it is old, if it is.
    pub stale_since: Option<Option<SystemTime>>,
    /// How often the list was fetched, and how often that failed.
    pub fetches: (u64, u64),
}

impl Lookups {
    fn tables(&self) -> MutexGuard<'_, BTreeMap<Box<str>, Arc<Table>>> {
        self.0.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lists(&self) -> MutexGuard<'_, HashMap<Box<str>, List>> {
        self.0.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is such a table.
    pub(crate) fn keep(&self, table: &Arc<Table>) {
        self.tables().entry(table.id().into()).or_insert_with(|| table.clone());
    }

    /// Lets go of a table that is not there any more and has no entries left.
    pub(crate) fn forget_empty(&self, table: &Table) {
        if table.standing() == Standing::Missing && table.counts().0 == 0 {
            self.tables().remove(table.id());
        }
    }

    /// Which list is to be fetched for a table.
    pub(crate) fn follow(&self, id: &str, source: Option<&Source>) {
        self.0.wanted.send_if_modified(|wanted| {
            if wanted.get(id).map(|former| &**former) == source {
                return false;
            }
            match source {
                Some(source) => {
                    wanted.insert(id.into(), Arc::new(source.clone()));
                }
                None => {
                    wanted.remove(id);
                    self.lists().remove(id);
                }
            }
            true
        });
    }

    /// The entries of the list of a table, if there is a list yet.
    pub(crate) fn fetched(&self, id: &str) -> Option<Arc<Fetched>> {
        self.lists().get(id)?.entries.clone()
    }

    /// Entries of the list that are not used because they are wrong.
    pub(crate) fn refused(&self, id: &str, entries: Vec<(Arc<str>, String)>) {
        for (key, why) in entries.iter().take(SHOWN) {
            tracing::error!(table = id, key = %key, why, "entry of a list set aside");
        }
        if let Some(list) = self.lists().get_mut(id) {
            list.refused = entries;
        }
    }

    /// All tables.
    pub fn views(&self) -> Vec<TableView> {
        let tables: Vec<Arc<Table>> = self.tables().values().cloned().collect();
        let lists = self.lists();
        let wanted = self.0.wanted.borrow();
        let view = |table: Arc<Table>| {
            let list = lists.get(table.id());
            let stale = list.and_then(|list| list.stale.as_ref().map(|(since, _)| *since));
            TableView {
                counts: table.counts(),
                stale_since: wanted.contains_key(table.id()).then_some(stale),
                fetches: list.map_or((0, 0), |list| (list.good, list.failed)),
                table,
            }
        };
        tables.into_iter().map(view).collect()
    }

    /// The clusters that entries have now, by their keys.
    pub fn clusters(&self) -> Vec<(Box<str>, Arc<Cluster>)> {
        let tables: Vec<Arc<Table>> = self.tables().values().cloned().collect();
        let active = tables.iter().flat_map(|table| table.entries()).filter_map(|entry| entry.active());
        active.map(|cluster| (cluster.key().into(), cluster)).collect()
    }

    /// One table, or all, as the Control API shows them.
    pub fn shown(&self, id: Option<&str>) -> Vec<Value> {
        let views = self.views().into_iter().filter(|view| id.is_none_or(|id| id == view.table.id()));
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        views
            .map(|view| {
                let (entries, active) = view.counts;
                let mut shown = json!({
                    "id": view.table.id(),
                    "entries": entries,
                    "active": active,
                    "complete": view.table.standing() == Standing::Complete,
                });
                let wanted = self.0.wanted.borrow().get(view.table.id()).cloned();
                let lists = self.lists();
                if let (Some(source), Some(object)) = (wanted, shown.as_object_mut()) {
                    let list = lists.get(view.table.id());
                    let refused: Vec<Value> = (list.into_iter().flat_map(|list| &list.refused).take(SHOWN))
                        .map(|(key, why)| json!({"key": &**key, "error": why}))
                        .collect();
                    let stale = list.and_then(|list| list.stale.as_ref());
                    let source = json!({
                        "url": &*source.url,
                        "confirmed_at": list.and_then(|list| list.confirmed).map(seconds),
                        "stale": stale.map(|(since, why)| json!({
                            "since": seconds(*since),
                            "age_seconds": since.elapsed().unwrap_or_default().as_secs(),
                            "reason": why,
                        })),
                        "fetched": view.fetches.0,
                        "failed": view.fetches.1,
                        "refused": list.map_or(0, |list| list.refused.len()),
                        "problems": refused,
                    });
                    object.insert("source".to_owned(), source);
                }
                shown
            })
            .collect()
    }

    /// One entry, as the Control API shows it: what a request with its key would meet.
    pub fn shown_entry(&self, id: &str, key: &str) -> Option<Value> {
        let table = self.tables().get(id).cloned()?;
        let entry: Arc<Entry> = table.find(key).ok()?;
        let written = entry.written().map(|written| serde_json::to_value(&**written).unwrap_or_default());
        Some(json!({
            "table": id,
            "key": key,
            "entry": written,
            "refused": entry.problem(),
            "idle_seconds": entry.idle().map(|idle| idle.as_secs()),
            "nodes": entry.active().map(|cluster| cluster.endpoints()),
        }))
    }

    /// Fetches lists and sweeps tables for as long as the process lives. The last good lists are kept in `folder`.
    pub async fn run(self, env: ClusterEnv, running: Running, folder: PathBuf) {
        let mut wanted = self.0.wanted.subscribe();
        let mut running_lists: HashMap<Box<str>, (Arc<Source>, Following)> = HashMap::new();
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                _ = sweep.tick() => {
                    let tables: Vec<Arc<Table>> = self.tables().values().cloned().collect();
                    tables.iter().for_each(|table| {
                        table.sweep();
                    });
                    continue;
                }
                changed = wanted.changed() => if changed.is_err() { return },
            }
            let now = wanted.borrow_and_update().clone();
            running_lists.retain(|id, (source, _)| now.get(id) == Some(source));
            for (id, source) in now {
                if running_lists.contains_key(&id) {
                    continue;
                }
                let follower = Follower {
                    id: id.clone(),
                    file: folder.join(format!("{id}.json")),
                    source: source.clone(),
                    lookups: self.clone(),
                    running: running.clone(),
                };
                let task = Following(tokio::spawn(follower.run(env.clone())));
                running_lists.insert(id, (source, task));
            }
        }
    }
}

/// A task that ends when it is let go of.
struct Following(JoinHandle<()>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Fetches one list.
struct Follower {
    id: Box<str>,
    /// Where the last good list is kept.
    file: PathBuf,
    source: Arc<Source>,
    lookups: Lookups,
    running: Running,
}

/// What the server said.
enum Answer {
    Same,
    List(Bytes, Option<HeaderValue>),
}

impl Follower {
    async fn run(self, env: ClusterEnv) {
        let settings = Settings {
            verify: self.source.ssl_verify,
            timeout: self.source.timeout.duration(),
            connect_timeout: self.source.timeout.duration(),
            max_body: usize::try_from(self.source.max_bytes.get()).unwrap_or(usize::MAX),
            pool: 1,
            in_flight: 1,
            ..Settings::default()
        };
        let client = match HttpClient::alone(&settings, &env.tls, &env.discovery, &env.control) {
            Ok(client) => client,
            Err(error) => return self.failed(error.to_string()),
        };
        if self.lookups.fetched(&self.id).is_none() {
            self.last_good().await;
        }
        let mut tag = None;
        let mut current = None;
        loop {
            match self.fetch(&client, tag.as_ref()).await {
                Ok(Answer::Same) => self.confirmed(),
                // Without an `ETag` the same bytes come again.
                Ok(Answer::List(bytes, _)) if current.as_ref() == Some(&bytes) => self.confirmed(),
                Ok(Answer::List(bytes, new)) => match read(&self.id, bytes.clone()).await {
                    Ok(entries) => {
                        self.take(entries);
                        self.confirmed();
                        self.compile().await;
                        self.keep(&bytes).await;
                        (tag, current) = (new, Some(bytes));
                    }
                    Err(why) => self.failed(why),
                },
                Err(why) => self.failed(why),
            }
            tokio::time::sleep(self.source.interval.duration()).await;
        }
    }

    async fn fetch(&self, client: &HttpClient, tag: Option<&HeaderValue>) -> Result<Answer, String> {
        let mut request = Request::get(&*self.source.url).header(header::ACCEPT, "application/json");
        for (name, value) in &self.source.headers {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|error| error.to_string())?;
            let mut value = HeaderValue::from_str(value).map_err(|error| error.to_string())?;
            value.set_sensitive(true);
            request = request.header(name, value);
        }
        if let Some(tag) = tag {
            request = request.header(header::IF_NONE_MATCH, tag);
        }
        let request = request.body(Bytes::new()).map_err(|error| error.to_string())?;
        let response = client.call(request).await.map_err(|error| error.to_string())?;
        match response.status() {
            StatusCode::OK => {
                let tag = response.headers().get(header::ETAG).cloned();
                Ok(Answer::List(response.into_body(), tag))
            }
            StatusCode::NOT_MODIFIED if tag.is_some() => Ok(Answer::Same),
            status => Err(format!("the answer has status {}", status.as_u16())),
        }
    }

    /// Begins with the list that was good before the process started.
    async fn last_good(&self) {
        let Ok(bytes) = tokio::fs::read(&self.file).await else { return };
        let written = tokio::fs::metadata(&self.file).await.and_then(|metadata| metadata.modified());
        match read(&self.id, bytes.into()).await {
            Ok(entries) => {
                self.take(entries);
                let since = written.unwrap_or(UNIX_EPOCH);
                self.list(|list| list.stale = Some((since, "not asked for since the start".to_owned())));
                self.compile().await;
            }
            Err(why) => tracing::warn!(file = %self.file.display(), why, "a kept list cannot be used"),
        }
    }

    async fn keep(&self, bytes: &Bytes) {
        let (file, bytes) = (self.file.clone(), bytes.clone());
        let kept = tokio::task::spawn_blocking(move || keep(&file, &bytes)).await;
        if let Ok(Err(error)) = kept {
            tracing::warn!(file = %self.file.display(), %error, "the list cannot be kept for the next start");
        }
    }

    fn list(&self, change: impl FnOnce(&mut List)) {
        change(self.lookups.lists().entry(self.id.clone()).or_default());
    }

    fn take(&self, entries: Fetched) {
        self.list(|list| list.entries = Some(Arc::new(entries)));
    }

    fn confirmed(&self) {
        self.list(|list| {
            list.good += 1;
            list.confirmed = Some(SystemTime::now());
            if list.stale.take().is_some() {
                tracing::info!(table = %self.id, "the list is current");
            }
        });
    }

    fn failed(&self, why: String) {
        self.list(|list| {
            list.failed += 1;
            match &mut list.stale {
                Some((_, told)) => *told = why,
                stale => {
                    tracing::warn!(table = %self.id, url = &*self.source.url, why, "the list may be old; the last good one is used");
                    *stale = Some((list.confirmed.unwrap_or_else(SystemTime::now), why));
                }
            }
        });
    }

    async fn compile(&self) {
        let (running, key) = (self.running.clone(), ResourceKey::new(Kind::LookupTable, &*self.id));
        // It waits for other compilations, and looks at every entry.
        let _ = tokio::task::spawn_blocking(move || running.again(vec![key])).await;
    }
}

/// References to secrets are for the administrator: a list that asks for them is refused, whoever writes it.
struct NoSecrets;

impl Env for NoSecrets {
    fn var(&self, _: &str) -> Option<String> {
        None
    }

    fn secret(&self, _: &str) -> Result<String, String> {
        Err("a list may not refer to secrets".to_owned())
    }
}

/// Reads `{"entries": {"KEY": {..}}}`, off the runtime's threads.
async fn read(id: &str, bytes: Bytes) -> Result<Fetched, String> {
    let id = id.to_owned();
    let read = tokio::task::spawn_blocking(move || parse(&id, &bytes)).await;
    read.map_err(|error| error.to_string())?
}

fn parse(id: &str, bytes: &[u8]) -> Result<Fetched, String> {
    let mut body: Value = serde_json::from_slice(bytes).map_err(|error| format!("no JSON: {error}"))?;
    let entries = match body.get_mut("entries").map(Value::take) {
        Some(Value::Object(entries)) => entries,
        _ => return Err("it has no `entries`: write {\"entries\": {\"KEY\": {..}}}".to_owned()),
    };
    let one = |(name, value): (String, Value)| {
        let entry = ResourceKey::parse(Kind::LookupEntry, &format!("{id}/entries/{name}"))
            .map_err(|error| vec![error])
            .and_then(|key| Resource::parse_with(&key, &value, &NoPlugins, &NoSecrets));
        let entry = match entry {
            Ok(Resource::LookupEntry(entry)) => Ok(entry),
            Ok(_) => Err(Arc::from("it is no entry")),
            Err(errors) => {
                let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
                Err(Arc::from(told.join("; ")))
            }
        };
        (Arc::from(name), entry)
    };
    Ok(entries.into_iter().map(one).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_entry_by_entry() {
        let text = json!({"entries": {
            "good": {"upstream": {"nodes": {"10.0.0.1:80": 1}, "type": "roundrobin"}},
            "named": {"upstream_id": "manager", "uri": "/x"},
            "bad": {"upstream": {"nodes": {"10.0.0.1:80": -1}}},
            "a/b": {"upstream_id": "manager"},
            "nosy": {"upstream": {"nodes": {"a:1": 1}, "pass_host": "rewrite", "upstream_host": "$env://PATH"}},
        }});
        let mut read = parse("t", text.to_string().as_bytes()).unwrap();
        read.sort_by(|a, b| a.0.cmp(&b.0));
        let told: Vec<_> = read.iter().map(|(key, entry)| (&**key, entry.is_ok())).collect();
        assert_eq!(told, [("a/b", false), ("bad", false), ("good", true), ("named", true), ("nosy", false)]);
    }

    #[test]
    fn what_is_no_list_is_told() {
        for (text, says) in
            [("<html>", "no JSON"), ("[]", "no `entries`"), ("{\"entries\": []}", "no `entries`")]
        {
            assert!(parse("t", text.as_bytes()).unwrap_err().contains(says), "{text}");
        }
        assert!(parse("t", b"{\"entries\": {}}").unwrap().is_empty());
    }
}
