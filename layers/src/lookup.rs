//! Lookup tables on the data path: which upstream and which path belong to a key.
//!
//! Workers find an entry without a lock: a table is cut into parts, each an immutable map, and a change copies one part.
//! Nothing else refers to entries, so a change compiles no route. An entry makes its cluster when the first request asks
//! for it and lets go of it when none has for a while: until then it holds neither connections nor probes nor names.
//! Everything but [`Table::find`] and [`Table::cluster`] is for the control side.

use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use config::error::ConfigError;
use config::lookup_table::LookupEntry;
use config::template::Template;
use config::upstream::Upstream;
use hashbrown::HashMap;

use crate::error::{Error, Reason};
use crate::upstream::cluster::{Cluster, ClusterEnv};
use crate::upstream::tls_client::ClientPem;

/// Parts of a table: a change copies one of them.
const PARTS: usize = 64;

/// How long the first request of an entry waits for the addresses of its nodes.
const WAKE: Duration = Duration::from_secs(5);

/// What times of use count from.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Where an entry comes from; the first that has a key counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An object of its own.
    Object,
    /// Written in the table.
    Table,
    /// The list that is fetched.
    List,
}

/// Whether a table can say that a key is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// There is no such table.
    Missing,
    /// Its list has not been fetched yet, or the table itself is set aside.
    Incomplete,
    /// All that there is is known.
    Complete,
}

/// Where the requests of an entry go.
enum To {
    /// An upstream of its own.
    Own(Box<Own>),
    /// An upstream resource, if there is one.
    Named(Option<Arc<Cluster>>),
    /// Nowhere: what is wrong with the entry.
    Refused(Box<str>),
}

struct Own {
    upstream: Arc<Upstream>,
    certificate: Option<ClientPem>,
    /// There while requests ask for it.
    cluster: ArcSwapOption<Cluster>,
    /// Held while the cluster is made: several first requests make one.
    making: Mutex<()>,
}

/// The path to ask for, and the query behind it.
#[derive(Debug)]
pub struct Target {
    /// The path, decoded.
    pub path: Template,
    /// The query, as it is sent.
    pub query: Option<Template>,
}

impl Target {
    /// From `/path?query` with variables.
    pub fn parse(source: &str) -> Self {
        let mut depth = 0_u32;
        let question = source.bytes().position(|byte| {
            match byte {
                b'{' => depth += 1,
                b'}' => depth = depth.saturating_sub(1),
                // One in braces belongs to a default.
                b'?' => return depth == 0,
                _ => {}
            }
            false
        });
        let (path, query) = match question.and_then(|at| source.split_at_checked(at)) {
            Some((path, query)) => (path, query.strip_prefix('?')),
            None => (source, None),
        };
        Self { path: Template::parse(path), query: query.map(Template::parse) }
    }
}

/// One entry.
pub struct Entry {
    key: Arc<str>,
    /// As it was written, to see whether another one is the same.
    written: Option<Arc<LookupEntry>>,
    to: To,
    target: Option<Box<Target>>,
    /// Seconds since [`EPOCH`] at the last request.
    used: AtomicU32,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("key", &self.key).finish_non_exhaustive()
    }
}

/// What an entry is made of besides what was written.
#[derive(Default)]
pub struct Parts {
    /// The cluster that `upstream_id` names.
    pub named: Option<Arc<Cluster>>,
    /// The certificate that `tls.client_cert_id` names.
    pub certificate: Option<ClientPem>,
}

impl Entry {
    /// An entry that works as it is written.
    pub fn new(key: &Arc<str>, written: &Arc<LookupEntry>, parts: Parts) -> Arc<Self> {
        let to = match &written.upstream {
            Some(upstream) => To::Own(Box::new(Own {
                upstream: upstream.clone(),
                certificate: parts.certificate,
                cluster: ArcSwapOption::empty(),
                making: Mutex::default(),
            })),
            None => To::Named(parts.named),
        };
        let target = written.uri.as_deref().map(|uri| Box::new(Target::parse(uri)));
        Arc::new(Self {
            key: key.clone(),
            written: Some(written.clone()),
            to,
            target,
            used: AtomicU32::new(0),
        })
    }

    /// An entry that cannot work, and why. Its requests are refused instead of being unknown.
    pub fn refused(key: &Arc<str>, why: String) -> Arc<Self> {
        let to = To::Refused(why.into());
        Arc::new(Self { key: key.clone(), written: None, to, target: None, used: AtomicU32::new(0) })
    }

    /// Its key.
    pub fn key(&self) -> &Arc<str> {
        &self.key
    }

    /// The path it wants to be asked for.
    pub fn target(&self) -> Option<&Target> {
        self.target.as_deref()
    }

    /// Its cluster, if it has one now.
    pub fn active(&self) -> Option<Arc<Cluster>> {
        match &self.to {
            To::Own(own) => own.cluster.load_full(),
            To::Named(_) | To::Refused(_) => None,
        }
    }

    /// Why it is refused, if it is.
    pub fn problem(&self) -> Option<&str> {
        match &self.to {
            To::Refused(why) => Some(why),
            To::Own(_) | To::Named(_) => None,
        }
    }

    /// As it was written, if it works.
    pub fn written(&self) -> Option<&Arc<LookupEntry>> {
        self.written.as_ref()
    }

    /// How long no request has asked for it; none if none ever has.
    pub fn idle(&self) -> Option<Duration> {
        let used = self.used.load(Ordering::Relaxed);
        (used != 0).then(|| Duration::from_secs(seconds().saturating_sub(used).into()))
    }

    /// Whether `other` does the same as this one.
    fn same(&self, other: &Self) -> bool {
        let (Some(own), Some(others)) = (&self.written, &other.written) else { return false };
        if !Arc::ptr_eq(own, others) && own != others {
            return false;
        }
        match (&self.to, &other.to) {
            (To::Own(a), To::Own(b)) => a.certificate == b.certificate,
            (To::Named(Some(a)), To::Named(Some(b))) => Arc::ptr_eq(a, b),
            (To::Named(None), To::Named(None)) => true,
            _ => false,
        }
    }

    /// Takes over the running cluster of the entry that this one replaces, edited in place.
    fn succeed(&self, former: &Self, env: &ClusterEnv, idle: Duration) {
        let (To::Own(own), Some(cluster)) = (&self.to, former.active()) else { return };
        let (upstream, env) = bounded(&own.upstream, idle, env);
        // If the edit cannot work, the next request says so.
        if cluster.update(&upstream, own.certificate.clone(), &env).is_ok() {
            own.cluster.store(Some(cluster));
            self.used.store(former.used.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

/// One part of a table.
type Part = HashMap<Arc<str>, Arc<Entry>>;

/// What the control side keeps: the entries by where they come from, and what clusters are made with.
#[derive(Default)]
struct Control {
    layers: [Part; 3],
}

/// A lookup table. It is there for plugins before and after the resource is.
pub struct Table {
    id: Box<str>,
    parts: Box<[ArcSwap<Part>]>,
    hasher: BuildHasherDefault<DefaultHasher>,
    standing: AtomicU8,
    /// Seconds after which an entry that is not used lets go.
    idle: AtomicU32,
    env: OnceLock<ClusterEnv>,
    control: Mutex<Control>,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Table {
    /// The key under which a table is carried: whoever asks for it gets the same one.
    pub fn carried(id: &str) -> String {
        format!("lookup_tables/{id}")
    }

    /// A table without entries, that is missing.
    pub fn new(id: &str) -> Self {
        Self {
            id: id.into(),
            parts: std::iter::repeat_with(ArcSwap::default).take(PARTS).collect(),
            hasher: BuildHasherDefault::default(),
            standing: AtomicU8::new(0),
            idle: AtomicU32::new(300),
            env: OnceLock::new(),
            control: Mutex::default(),
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn part(&self, key: &str) -> Option<&ArcSwap<Part>> {
        let place = usize::try_from(self.hasher.hash_one(key)).unwrap_or(usize::MAX);
        self.parts.get(place % PARTS)
    }

    /// The entry of a key.
    ///
    /// # Errors
    /// There is none, or it is not known yet whether there is one.
    pub fn find(&self, key: &str) -> Result<Arc<Entry>, Error> {
        let found = self.part(key).and_then(|part| part.load().get(key).cloned());
        found.ok_or_else(|| match self.standing() {
            Standing::Complete => Error::new(Reason::LookupUnknown),
            Standing::Incomplete => Error::new(Reason::LookupNotReady).detail("the table is not complete"),
            Standing::Missing => Error::new(Reason::LookupNotReady).detail("there is no such lookup table"),
        })
    }

    /// The upstream of an entry. The first request that asks for it makes it, off the worker, and waits until its nodes
    /// have addresses, at most [`WAKE`].
    ///
    /// # Errors
    /// The entry is refused, or names an upstream that is not there.
    pub async fn cluster(&self, entry: &Arc<Entry>) -> Result<Arc<Cluster>, Error> {
        let now = seconds();
        // Written once a second: requests of one entry on several workers must not fight for it.
        if entry.used.load(Ordering::Relaxed) != now {
            entry.used.store(now, Ordering::Relaxed);
        }
        let own = match &entry.to {
            To::Named(Some(cluster)) => return Ok(cluster.clone()),
            To::Named(None) => return Err(Error::new(Reason::UpstreamMissing)),
            To::Refused(why) => return Err(Error::new(Reason::LookupRefused).detail(why.to_string())),
            To::Own(own) => own,
        };
        if let Some(cluster) = own.cluster.load_full() {
            return Ok(cluster);
        }
        let not_ready = |why: String| Error::new(Reason::LookupNotReady).detail(why);
        let env =
            self.env.get().ok_or_else(|| not_ready("there is no such lookup table".to_owned()))?.clone();
        let (entry, key) = (entry.clone(), format!("{}/entries/{}", Self::carried(&self.id), entry.key));
        let idle = self.idle();
        let made = env.control.clone().spawn_blocking(move || entry.make(&key, idle, &env));
        let cluster = made.await.map_err(|error| not_ready(error.to_string()))?;
        let cluster = cluster.map_err(|error| Error::new(Reason::LookupRefused).detail(error.to_string()))?;
        // Without addresses the request fails with the words of the resolver.
        let _ = tokio::time::timeout(WAKE, cluster.resolved()).await;
        Ok(cluster)
    }

    fn idle(&self) -> Duration {
        Duration::from_secs(self.idle.load(Ordering::Relaxed).into())
    }

    /// Whether it can say that a key is unknown.
    pub fn standing(&self) -> Standing {
        match self.standing.load(Ordering::Relaxed) {
            0 => Standing::Missing,
            1 => Standing::Incomplete,
            _ => Standing::Complete,
        }
    }

    /// Says whether it can tell unknown keys, and how long entries may be idle.
    pub fn stand(&self, standing: Standing, idle: u32, env: &ClusterEnv) {
        let _ = self.env.set(env.clone());
        self.idle.store(idle, Ordering::Relaxed);
        self.standing.store(standing as u8, Ordering::Relaxed);
    }

    /// The entry of `key` from `origin`.
    pub fn at(&self, origin: Origin, key: &str) -> Option<Arc<Entry>> {
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        control.layers.get(origin as usize)?.get(key).cloned()
    }

    /// Makes the entry of `key` from `origin` this one, or takes it away.
    pub fn put(&self, origin: Origin, key: &Arc<str>, entry: Option<Arc<Entry>>) {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let [objects, table, list] = &mut control.layers;
        let layer = match origin {
            Origin::Object => objects,
            Origin::Table => table,
            Origin::List => list,
        };
        match entry {
            Some(entry) => layer.insert(key.clone(), entry),
            None => layer.remove(&**key),
        };
        self.publish(&control, std::slice::from_ref(key));
    }

    /// Makes the entries from `origin` these and no others. Those that say the same stay as they are.
    pub fn replace(&self, origin: Origin, entries: Vec<Arc<Entry>>) {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let [objects, table, list] = &mut control.layers;
        let layer = match origin {
            Origin::Object => objects,
            Origin::Table => table,
            Origin::List => list,
        };
        let mut next = Part::with_capacity(entries.len());
        let mut changed = Vec::new();
        for entry in entries {
            match layer.remove(&*entry.key) {
                Some(former) if former.same(&entry) => {
                    next.insert(former.key.clone(), former);
                }
                _ => {
                    changed.push(entry.key.clone());
                    next.insert(entry.key.clone(), entry);
                }
            }
        }
        changed.extend(layer.drain().map(|(key, _)| key));
        *layer = next;
        self.publish(&control, &changed);
    }

    /// Brings the parts up to date with the layers, for these keys.
    fn publish(&self, control: &Control, keys: &[Arc<str>]) {
        let mut by_part: HashMap<usize, Vec<&Arc<str>>> = HashMap::new();
        for key in keys {
            let place = usize::try_from(self.hasher.hash_one(&**key)).unwrap_or(usize::MAX) % PARTS;
            by_part.entry(place).or_default().push(key);
        }
        for (place, keys) in by_part {
            let Some(part) = self.parts.get(place) else { continue };
            let mut next = Part::clone(&part.load());
            for key in keys {
                let entry = control.layers.iter().find_map(|layer| layer.get(&**key)).cloned();
                let former = match entry {
                    Some(entry) => {
                        let former = next.insert(key.clone(), entry.clone());
                        former.map(|former| (former, Some(entry)))
                    }
                    None => next.remove(&**key).map(|former| (former, None)),
                };
                if let (Some((former, Some(entry))), Some(env)) = (former, self.env.get())
                    && !Arc::ptr_eq(&former, &entry)
                {
                    entry.succeed(&former, env, self.idle());
                }
            }
            part.store(Arc::new(next));
        }
    }

    /// Takes the clusters away from entries that no request has asked for as long as is allowed. How many are left.
    pub fn sweep(&self) -> usize {
        let idle = self.idle();
        let mut active = 0;
        for part in &self.parts {
            for entry in part.load().values() {
                let To::Own(own) = &entry.to else { continue };
                if own.cluster.load().is_none() {
                    continue;
                }
                if entry.idle().is_none_or(|unused| unused > idle) {
                    own.cluster.store(None);
                } else {
                    active += 1;
                }
            }
        }
        active
    }

    /// All entries, in no order.
    pub fn entries(&self) -> Vec<Arc<Entry>> {
        self.parts.iter().flat_map(|part| part.load().values().cloned().collect::<Vec<_>>()).collect()
    }

    /// How many entries there are, and how many of them have a cluster now.
    pub fn counts(&self) -> (usize, usize) {
        self.parts.iter().fold((0, 0), |(all, active), part| {
            let part = part.load();
            let running = part.values().filter(|entry| entry.active().is_some()).count();
            (all + part.len(), active + running)
        })
    }
}

impl Entry {
    /// Makes the cluster, unless somebody else has.
    fn make(&self, key: &str, idle: Duration, env: &ClusterEnv) -> Result<Arc<Cluster>, ConfigError> {
        let To::Own(own) = &self.to else { return Err(ConfigError::invalid("", "it has no upstream")) };
        let _alone = own.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cluster) = own.cluster.load_full() {
            return Ok(cluster);
        }
        let (upstream, env) = bounded(&own.upstream, idle, env);
        let cluster = Cluster::build(key, &upstream, own.certificate.clone(), &env)?;
        own.cluster.store(Some(cluster.clone()));
        Ok(cluster)
    }
}

/// The upstream and the environment with idle connections that do not outlive the use of the entry.
fn bounded(upstream: &Arc<Upstream>, idle: Duration, env: &ClusterEnv) -> (Upstream, ClusterEnv) {
    let (mut upstream, mut env) = (Upstream::clone(upstream), env.clone());
    upstream.bound_idle(idle);
    env.keepalive.idle = Some(env.keepalive.idle.map_or(idle, |own| own.min(idle)));
    (upstream, env)
}

/// Seconds since the first look at the clock; never 0, which is "not used".
fn seconds() -> u32 {
    u32::try_from(EPOCH.elapsed().as_secs()).unwrap_or(u32::MAX - 1) + 1
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use discovery::Discovery;
    use rustls::RootCertStore;
    use serde_json::{Value, json};
    use tokio::runtime::Handle;

    use super::*;
    use crate::upstream::Keepalive;
    use crate::upstream::sticky::own_key;
    use crate::upstream::tls_client::TlsClients;

    fn env() -> ClusterEnv {
        let control = Handle::current();
        ClusterEnv {
            discovery: Discovery::new(control.clone(), discovery::Settings::default()),
            tls: Arc::new(TlsClients::new(Arc::new(RootCertStore::empty()))),
            checks: true,
            keepalive: Keepalive { size: 320, idle: None, requests: 1000 },
            session_key: own_key(Vec::new),
            drains: crate::upstream::drains::Drains::default(),
            place: Arc::default(),
            mesh: None,
            as_client: None,
            control,
        }
    }

    fn table() -> Table {
        let table = Table::new("t");
        table.stand(Standing::Complete, 300, &env());
        table
    }

    fn entry(key: &str, fields: Value) -> Arc<Entry> {
        let written: LookupEntry = serde_json::from_value(fields).unwrap();
        Entry::new(&Arc::from(key), &Arc::new(written), Parts::default())
    }

    fn node(address: &str) -> Value {
        json!({"upstream": {"nodes": {address: 1}, "type": "roundrobin"}})
    }

    fn reason(table: &Table, key: &str) -> Reason {
        table.find(key).unwrap_err().reason()
    }

    async fn address(table: &Table, key: &str) -> String {
        let cluster = table.cluster(&table.find(key).unwrap()).await.unwrap();
        cluster.endpoints().first().unwrap().address.to_string()
    }

    #[tokio::test]
    async fn what_is_unknown_depends_on_what_the_table_knows() {
        let table = Table::new("t");
        assert_eq!(reason(&table, "a"), Reason::LookupNotReady);
        table.stand(Standing::Incomplete, 300, &env());
        assert_eq!(reason(&table, "a"), Reason::LookupNotReady);
        table.replace(Origin::Table, vec![entry("a", node("10.0.0.1:80"))]);
        assert!(table.find("a").is_ok(), "what is there is served");
        table.stand(Standing::Complete, 300, &env());
        assert_eq!(reason(&table, "b"), Reason::LookupUnknown);
        table.put(Origin::Object, &"c".into(), Some(Entry::refused(&"c".into(), "wrong".to_owned())));
        let refused = table.cluster(&table.find("c").unwrap()).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::LookupRefused);
    }

    #[tokio::test]
    async fn objects_win_over_the_table_and_that_over_the_list() {
        let table = table();
        let key: Arc<str> = "a".into();
        table.replace(Origin::List, vec![entry("a", node("10.0.0.3:80")), entry("b", node("10.0.0.9:80"))]);
        assert_eq!(address(&table, "a").await, "10.0.0.3:80");
        table.replace(Origin::Table, vec![entry("a", node("10.0.0.2:80"))]);
        table.put(Origin::Object, &key, Some(entry("a", node("10.0.0.1:80"))));
        assert_eq!(address(&table, "a").await, "10.0.0.1:80");
        table.put(Origin::Object, &key, None);
        assert_eq!(address(&table, "a").await, "10.0.0.2:80");
        table.replace(Origin::Table, Vec::new());
        assert_eq!(address(&table, "a").await, "10.0.0.3:80");
        table.replace(Origin::List, Vec::new());
        assert_eq!(reason(&table, "a"), Reason::LookupUnknown);
        assert_eq!(table.counts(), (0, 0));
    }

    #[tokio::test]
    async fn an_edit_changes_the_running_cluster_and_the_same_again_changes_nothing() {
        let table = table();
        table.replace(Origin::List, vec![entry("a", node("10.0.0.1:80"))]);
        let before = table.find("a").unwrap();
        let cluster = table.cluster(&before).await.unwrap();
        table.replace(Origin::List, vec![entry("a", node("10.0.0.1:80"))]);
        assert!(Arc::ptr_eq(&before, &table.find("a").unwrap()), "nothing was said that is new");
        table.replace(Origin::List, vec![entry("a", node("10.0.0.2:80"))]);
        let after = table.cluster(&table.find("a").unwrap()).await.unwrap();
        assert!(Arc::ptr_eq(&cluster, &after));
        assert_eq!(address(&table, "a").await, "10.0.0.2:80");
    }

    #[tokio::test]
    async fn an_entry_has_a_cluster_only_while_it_is_used() {
        let table = table();
        let checks = json!({"active": {"http_path": "/"}});
        let fields =
            json!({"upstream": {"nodes": {"127.0.0.1:9": 1}, "type": "roundrobin", "checks": checks}});
        table.replace(Origin::Table, vec![entry("a", fields), entry("b", node("10.0.0.1:80"))]);
        let tasks = || Handle::current().metrics().num_alive_tasks();
        let quiet = tasks();
        assert_eq!(table.counts(), (2, 0));
        let found = table.find("a").unwrap();
        let cluster = table.cluster(&found).await.unwrap();
        assert_eq!((table.counts(), cluster.key()), ((2, 1), "lookup_tables/t/entries/a"));
        assert!(tasks() > quiet, "it is probed");
        assert_eq!(table.sweep(), 1, "it was just used");
        found.used.store(0, Ordering::Relaxed);
        drop(cluster);
        assert_eq!((table.sweep(), table.counts()), (0, (2, 0)));
        let deadline = Instant::now() + Duration::from_secs(10);
        while tasks() > quiet {
            assert!(Instant::now() < deadline, "probes go on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn first_requests_that_come_together_share_one_cluster() {
        let table = table();
        table.replace(Origin::Table, vec![entry("a", node("10.0.0.1:80"))]);
        let found = table.find("a").unwrap();
        let clusters = futures_util::future::join_all((0..20).map(|_| table.cluster(&found))).await;
        let first = clusters.first().unwrap().as_ref().unwrap();
        assert!(clusters.iter().all(|cluster| Arc::ptr_eq(first, cluster.as_ref().unwrap())));
    }

    #[test]
    fn a_question_mark_in_braces_begins_no_query() {
        for (source, path, query) in [
            ("/a", "/a", None),
            ("/a?b=1", "/a", Some("b=1")),
            ("/a?", "/a", Some("")),
            ("/${x ?? y}?b=${z ?? 1}", "/${x ?? y}", Some("b=${z ?? 1}")),
        ] {
            let target = Target::parse(source);
            assert_eq!(target.path, Template::parse(path), "{source}");
            assert_eq!(target.query, query.map(Template::parse), "{source}");
        }
    }
}
