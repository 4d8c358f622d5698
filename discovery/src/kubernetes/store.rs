//! What is known of a cluster: its slices by service, its services, and whether that can still be believed.
//!
//! Filled by the feeds, read by the watchers. A change wakes the watchers of the one service that it is about; a list
//! that replaces everything wakes those whose service is not the same afterwards.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::name::Key;
use super::objects::{Known, Slice};
use crate::source::SourceError;

/// One cluster's state.
#[derive(Debug)]
pub(super) struct Store {
    inner: Mutex<Inner>,
    status: watch::Sender<Status>,
    /// Counts everything that the API server has said, bookmarks as well.
    heard: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    slices: HashMap<Key, Slices>,
    /// Of which service a slice is, by namespace and name of the slice.
    owners: HashMap<Key, Key>,
    services: HashMap<Key, Arc<Known>>,
    services_known: bool,
    followers: HashMap<Key, watch::Sender<u64>>,
}

/// The slices of one service by their names.
type Slices = BTreeMap<Arc<str>, Arc<[Slice]>>;

/// Whether the slices can be believed.
#[derive(Clone, Debug, Default)]
pub(super) struct Status {
    /// The number of the last list that was complete; 0 before the first.
    pub listed: u64,
    /// The number of the last list that was begun.
    pub begun: u64,
    /// How often the API server could not be asked.
    pub failures: u64,
    /// Why it cannot be asked now.
    pub failing: Option<SourceError>,
    /// How often a list lacked most of what was known.
    pub losses: u64,
}

/// An object as a feed has read it.
#[derive(Debug)]
pub(super) enum Object {
    /// A slice, or an Endpoints object.
    Slices {
        name: Key,
        service: Key,
        slices: Arc<[Slice]>,
    },
    Service {
        name: Key,
        known: Known,
    },
}

/// Which objects a list replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Slices,
    Services,
}

/// All that is known of one service.
#[derive(Debug, Default)]
pub(super) struct Service {
    pub slices: Vec<Arc<[Slice]>>,
    pub known: Option<Arc<Known>>,
    /// Services of the cluster could be read at all.
    pub services_known: bool,
}

/// The right to be told of changes of one service.
#[derive(Debug)]
pub(super) struct Follower {
    store: Arc<Store>,
    key: Key,
    pub changed: watch::Receiver<u64>,
}

impl Store {
    pub(super) fn new() -> Arc<Self> {
        let (status, _) = watch::channel(Status::default());
        Arc::new(Self { inner: Mutex::default(), status, heard: AtomicU64::new(0) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    pub(super) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    pub(super) fn hear(&self) {
        self.heard.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn follow(self: &Arc<Self>, key: &Key) -> Follower {
        let mut inner = self.inner();
        let sender = inner.followers.entry(key.clone()).or_insert_with(|| watch::channel(0).0);
        Follower { changed: sender.subscribe(), store: Arc::clone(self), key: key.clone() }
    }

    pub(super) fn service(&self, key: &Key) -> Service {
        let inner = self.inner();
        Service {
            slices: inner
                .slices
                .get(key)
                .map(|slices| slices.values().map(Arc::clone).collect())
                .unwrap_or_default(),
            known: inner.services.get(key).map(Arc::clone),
            services_known: inner.services_known,
        }
    }

    /// A list of slices is asked for. Gives its number.
    pub(super) fn begin(&self) -> u64 {
        let mut number = 0;
        self.status.send_if_modified(|status| {
            status.begun += 1;
            number = status.begun;
            // Nobody waits for a beginning.
            false
        });
        number
    }

    pub(super) fn fail(&self, error: SourceError) {
        self.status.send_modify(|status| {
            status.failures += 1;
            status.failing = Some(error);
        });
    }

    pub(super) fn recover(&self) {
        self.status.send_if_modified(|status| status.failing.take().is_some());
    }

    /// Everything there is, from the list of this number.
    pub(super) fn replace(&self, table: Table, objects: Vec<Object>, number: u64) {
        let lost = self.inner().replace(table, objects);
        self.hear();
        if table == Table::Slices {
            self.status.send_modify(|status| {
                status.listed = number;
                status.failing = None;
                status.losses += u64::from(lost);
            });
        }
    }

    pub(super) fn put(&self, object: Object) {
        self.inner().put(object);
    }

    pub(super) fn remove(&self, table: Table, name: &Key) {
        self.inner().remove(table, name);
    }
}

impl Inner {
    fn wake(&self, key: &Key) {
        if let Some(follower) = self.followers.get(key) {
            follower.send_modify(|changes| *changes += 1);
        }
    }

    fn put(&mut self, object: Object) {
        match object {
            Object::Service { name, known } => {
                let known = Arc::new(known);
                let before = self.services.insert(name.clone(), Arc::clone(&known));
                if before.is_none_or(|before| before != known) {
                    self.wake(&name);
                }
            }
            Object::Slices { name, service, slices } => {
                let before = self.owners.insert(name.clone(), service.clone());
                if let Some(before) = before.filter(|before| *before != service) {
                    self.take_out(&before, &name);
                }
                let entry = self.slices.entry(service.clone()).or_default();
                let before = entry.insert(name.name, Arc::clone(&slices));
                if before.is_none_or(|before| before != slices) {
                    self.wake(&service);
                }
            }
        }
    }

    fn remove(&mut self, table: Table, name: &Key) {
        match table {
            Table::Services => {
                if self.services.remove(name).is_some() {
                    self.wake(name);
                }
            }
            Table::Slices => {
                if let Some(service) = self.owners.remove(name) {
                    self.take_out(&service, name);
                }
            }
        }
    }

    fn take_out(&mut self, service: &Key, name: &Key) {
        if let Some(entry) = self.slices.get_mut(service) {
            entry.remove(&name.name);
            if entry.is_empty() {
                self.slices.remove(service);
            }
        }
        self.wake(service);
    }

    /// Puts what there is and removes what there is not. True if most of what was known is gone.
    fn replace(&mut self, table: Table, objects: Vec<Object>) -> bool {
        let listed: HashSet<Key> = objects
            .iter()
            .map(|object| match object {
                Object::Slices { name, .. } | Object::Service { name, .. } => name.clone(),
            })
            .collect();
        let known = match table {
            Table::Slices => self.owners.keys().collect::<Vec<_>>(),
            Table::Services => self.services.keys().collect::<Vec<_>>(),
        };
        let count = known.len();
        let gone: Vec<Key> = known.into_iter().filter(|name| !listed.contains(*name)).cloned().collect();
        for object in objects {
            self.put(object);
        }
        for name in &gone {
            self.remove(table, name);
        }
        if table == Table::Services && !self.services_known {
            self.services_known = true;
            for follower in self.followers.values() {
                follower.send_modify(|changes| *changes += 1);
            }
        }
        gone.len() * 2 > count
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut inner = self.store.inner();
        // One of them is this.
        if inner.followers.get(&self.key).is_some_and(|sender| sender.receiver_count() <= 1) {
            inner.followers.remove(&self.key);
        }
    }
}
