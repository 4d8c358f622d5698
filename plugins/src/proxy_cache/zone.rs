//! A zone: kept answers, bounded in bytes, and the requests that wait for one that is being fetched.
//!
//! Shared by all workers and by every object that names it; lives as long as one does. Files are read and written on the
//! control side's blocking pool, and waited for at most [`DISK_WAIT`].

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use config::error::ConfigError;
use layers::carry::Carry;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::disk::{self, Disk};
use super::entry::{Key, Stored, Variants};

/// How long a file may take to be read; then it is a miss.
const DISK_WAIT: Duration = Duration::from_secs(2);
/// How long it is remembered that an answer could not be kept, so that requests for it do not wait for each other.
const PASS_FOR: Duration = Duration::from_secs(10);
/// How many of those are remembered.
const PASSES: u64 = 10_000;
/// Answers to one request that differ by its fields; the oldest goes.
const VARIANTS: usize = 64;
/// The unit in which room for answers on their way is counted.
const UNIT: usize = 1024;

/// `apisix.proxy_cache`, as the plugin gets it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Seconds that an answer on disk is kept that does not say.
    pub ttl: u64,
    /// The zones.
    pub zones: Vec<ZoneSettings>,
}

/// One zone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZoneSettings {
    /// Its name.
    pub name: String,
    /// Bytes in memory.
    pub memory: u64,
    /// Folder and bytes on disk; none for a zone in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<(PathBuf, u64)>,
}

impl Default for Settings {
    fn default() -> Self {
        let zone = |name: &str, disk| ZoneSettings { name: name.into(), memory: 50 << 20, disk };
        let disk = Some((PathBuf::from("/tmp/disk_cache_one"), 1 << 30));
        Self { ttl: 10, zones: vec![zone("disk_cache_one", disk), zone("memory_cache", None)] }
    }
}

/// Kept answers.
pub struct Zone {
    memory: Cache<Key, Arc<Stored>>,
    disk: Option<Arc<Disk>>,
    passes: Cache<Key, ()>,
    /// What is being fetched. A mutex: held for a look-up, and only by requests that are not answered from here.
    flights: Mutex<hashbrown::HashMap<Key, watch::Receiver<()>>>,
    /// Room for answers that are on their way in, so that many at once are bounded too.
    room: Arc<Semaphore>,
    control: Handle,
    limit: u64,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// The first to ask for an answer, until it is dropped.
pub struct Flight {
    zone: Arc<Zone>,
    key: Key,
    /// Dropped with the flight: that is what the others wait for.
    _done: watch::Sender<()>,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.zone.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// How a request goes on that found nothing.
pub enum Joined {
    /// It is the first: it asks the upstream.
    First(Flight),
    /// Another one is at it.
    Waits(watch::Receiver<()>),
    /// It asks the upstream beside others.
    Alone,
}

fn carry_key(name: &str) -> String {
    format!("proxy-cache/{name}")
}

/// A zone that is in use, or why it cannot be. What lives over reloads.
struct Opened(Result<Arc<Zone>, String>);

/// A user of a zone.
pub struct User {
    /// The zone.
    pub zone: Arc<Zone>,
    /// As long as somebody holds it, the same zone is found again.
    _opened: Arc<Opened>,
}

/// The zone of that name, opened if it is not in use yet.
///
/// # Errors
/// Its folder cannot be used.
pub fn open(settings: &ZoneSettings, carry: &Carry, control: &Handle) -> Result<User, ConfigError> {
    let opened = carry.get_or(&carry_key(&settings.name), || Opened(Zone::new(settings, control)));
    match &opened.0 {
        Ok(zone) => Ok(User { zone: zone.clone(), _opened: opened }),
        Err(problem) => {
            let folder = settings.disk.as_ref().map(|(path, _)| disk::told(path)).unwrap_or_default();
            Err(ConfigError::invalid(
                "/cache_zone",
                format!("the folder `{folder}` of zone `{}` cannot be used: {problem}", settings.name),
            ))
        }
    }
}

/// Forgets everything in a zone. False if it is not in use.
pub fn purge(carry: &Carry, name: &str) -> bool {
    let Some(opened) = carry.find::<Opened>(&carry_key(name)) else { return false };
    if let Ok(zone) = &opened.0 {
        zone.clear();
    }
    true
}

/// What is in the zones in use, for people.
pub fn report(carry: &Carry, settings: &Settings) -> Value {
    let zones = settings.zones.iter().filter_map(|settings| {
        let opened = carry.find::<Opened>(&carry_key(&settings.name))?;
        opened.0.as_ref().ok().map(|zone| zone.report(&settings.name))
    });
    zones.collect()
}

impl Zone {
    fn new(settings: &ZoneSettings, control: &Handle) -> Result<Arc<Self>, String> {
        let disk = match &settings.disk {
            Some((folder, limit)) => {
                Some(Disk::open(folder, *limit, control).map_err(|error| error.to_string())?)
            }
            None => None,
        };
        let room = usize::try_from(settings.memory).unwrap_or(usize::MAX) / UNIT;
        Ok(Arc::new(Self {
            memory: Cache::builder()
                .max_capacity(settings.memory)
                .weigher(|_, stored: &Arc<Stored>| stored.size())
                .eviction_policy(EvictionPolicy::lru())
                .build(),
            disk,
            passes: Cache::builder().max_capacity(PASSES).time_to_live(PASS_FOR).build(),
            flights: Mutex::default(),
            room: Arc::new(Semaphore::new(room.min(Semaphore::MAX_PERMITS))),
            control: control.clone(),
            limit: settings.memory,
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }))
    }

    /// What is kept under `key`.
    pub async fn get(&self, key: &Key) -> Option<Arc<Stored>> {
        if let Some(stored) = self.memory.get(key) {
            return Some(stored);
        }
        let disk = self.disk.as_ref().filter(|disk| disk.has(key))?.clone();
        let wanted = *key;
        let read = self.control.spawn_blocking(move || disk.read(&wanted));
        let stored = Arc::new(tokio::time::timeout(DISK_WAIT, read).await.ok()?.ok()??);
        self.memory.insert(*key, stored.clone());
        Some(stored)
    }

    /// Keeps `stored` under `key`; `room` is given back when it is written.
    pub fn put(&self, key: Key, stored: Arc<Stored>, room: Option<OwnedSemaphorePermit>) {
        self.memory.insert(key, stored.clone());
        if let Some(disk) = self.disk.clone() {
            self.control.spawn_blocking(move || {
                let _room = room;
                if let Err(error) = disk.write(&key, &stored) {
                    tracing::warn!(%error, "an answer cannot be kept on disk");
                }
            });
        }
    }

    /// Keeps an answer to `primary` that differs by the fields `names`: its key, and that it is there.
    pub async fn put_variant(&self, primary: Key, variant: Key, names: Box<[http::HeaderName]>) {
        let known = self.get(&primary).await;
        let mut keys = match known.as_deref() {
            Some(Stored::Vary(known)) if known.names == names => known.keys.clone(),
            // Told apart by other fields before: those answers are not found any more.
            Some(Stored::Vary(known)) => {
                known.keys.iter().for_each(|key| self.remove(key));
                Vec::new()
            }
            _ => Vec::new(),
        };
        if keys.last() == Some(&variant) {
            return;
        }
        keys.retain(|key| *key != variant);
        keys.push(variant);
        if keys.len() > VARIANTS {
            self.remove(&keys.remove(0));
        }
        self.put(primary, Arc::new(Stored::Vary(Variants { names, keys })), None);
    }

    fn remove(&self, key: &Key) {
        self.memory.invalidate(key);
        if let Some(disk) = &self.disk {
            disk.remove(key);
        }
    }

    /// Forgets the answers to a request. False if there was none.
    pub async fn purge(&self, key: &Key) -> bool {
        let Some(stored) = self.get(key).await else { return false };
        if let Stored::Vary(variants) = &*stored {
            variants.keys.iter().for_each(|key| self.remove(key));
        }
        self.remove(key);
        true
    }

    fn clear(&self) {
        self.memory.invalidate_all();
        if let Some(disk) = self.disk.clone() {
            self.control.spawn_blocking(move || disk.clear());
        }
    }

    /// Takes part in the fetching of `key`.
    pub fn join(self: &Arc<Self>, key: Key) -> Joined {
        if self.passes.contains_key(&key) {
            return Joined::Alone;
        }
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(&key) {
            return Joined::Waits(flight.clone());
        }
        let (done, waits) = watch::channel(());
        flights.insert(key, waits);
        Joined::First(Flight { zone: self.clone(), key, _done: done })
    }

    /// Remembers that the answer under `key` is none to keep: requests for it do not wait for each other.
    pub fn pass(&self, key: Key) {
        self.passes.insert(key, ());
    }

    /// As [`pass`](Self::pass) had never been.
    pub fn no_pass(&self, key: &Key) {
        self.passes.invalidate(key);
    }

    /// Room for so many bytes more of answers on their way; nothing if there is none.
    pub fn room(&self, bytes: usize, held: &mut Option<OwnedSemaphorePermit>) -> bool {
        let have = held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let Some(more) = (bytes / UNIT + 1).checked_sub(have).filter(|more| *more > 0) else { return true };
        let Ok(more) = u32::try_from(more) else { return false };
        match self.room.clone().try_acquire_many_owned(more) {
            Ok(permit) => {
                match held {
                    Some(held) => held.merge(permit),
                    None => *held = Some(permit),
                }
                true
            }
            Err(_) => false,
        }
    }

    /// The control runtime.
    pub fn control(&self) -> &Handle {
        &self.control
    }

    /// The longest body that is kept, in bytes: one answer must not push out all others.
    pub fn longest(&self) -> usize {
        usize::try_from(self.limit / 2).unwrap_or(usize::MAX)
    }

    /// Counts an answer from here, or from the upstream.
    pub fn count(&self, hit: bool) {
        if hit { &self.hits } else { &self.misses }.fetch_add(1, Ordering::Relaxed);
    }

    fn report(&self, name: &str) -> Value {
        // Counts are brought up to date in passing only.
        self.memory.run_pending_tasks();
        let mut report = json!({
            "name": name,
            "memory": {
                "entries": self.memory.entry_count(),
                "bytes": self.memory.weighted_size(),
                "limit": self.limit,
            },
            "hits": self.hits.load(Ordering::Relaxed),
            "misses": self.misses.load(Ordering::Relaxed),
        });
        if let (Some(disk), Some(report)) = (&self.disk, report.as_object_mut()) {
            let (entries, bytes, limit) = disk.usage();
            report.insert("disk".into(), json!({"entries": entries, "bytes": bytes, "limit": limit}));
        }
        report
    }
}
