//! One service for all clients of a server that follow it.
//!
//! What the registries say is turned into messages once, however many clients there are; an instance that has not changed
//! keeps its message.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::select_all;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::{key, proto};
use crate::follow::{Follow, Followed, Freshness};

/// Changes that are kept, from one version to another: clients are mostly at the same one.
const KEPT_CHANGES: usize = 8;

/// A service that is followed as long as this is held.
#[derive(Debug)]
pub(super) struct Topic {
    pub service: proto::Service,
    states: watch::Receiver<Arc<State>>,
    /// Those that are asked when somebody wants to know now.
    services: Vec<Arc<crate::follow::Service>>,
    changes: Mutex<HashMap<(u64, u64), Arc<Change>>>,
    task: AbortHandle,
}

/// A service at a moment.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Counts the changes of what is below, without the failure.
    pub version: u64,
    /// The registries have answered.
    pub known: bool,
    pub failure: Option<Arc<str>>,
    pub instances: BTreeMap<Arc<str>, Arc<proto::Instance>>,
}

/// What is different in one state from another.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub put: Vec<Arc<proto::Instance>>,
    pub removed: Vec<Arc<str>>,
}

impl Topic {
    pub(super) fn new(service: proto::Service, follows: Vec<Follow>) -> Self {
        let services = follows.iter().map(|follow| Arc::clone(&follow.service)).collect();
        let (sender, states) = watch::channel(Arc::new(State::default()));
        let task = tokio::spawn(run(follows, sender)).abort_handle();
        Self { service, states, services, changes: Mutex::default(), task }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        let mut states = self.states.clone();
        states.mark_changed();
        states
    }

    pub(super) fn version(&self) -> u64 {
        self.states.borrow().version
    }

    pub(super) fn refresh(&self) {
        self.services.iter().for_each(|service| service.refresh());
    }

    /// What leads from one state to another; from nothing, everything.
    pub(super) fn change(&self, from: Option<&State>, to: &State) -> Arc<Change> {
        let versions = (from.map_or(0, |from| from.version), to.version);
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(change) = changes.get(&versions) {
            return Arc::clone(change);
        }
        let change = Arc::new(Change::between(from, to));
        if changes.len() >= KEPT_CHANGES {
            changes.retain(|(_, version), _| *version == to.version);
        }
        if changes.len() < KEPT_CHANGES {
            changes.insert(versions, Arc::clone(&change));
        }
        change
    }
}

impl Drop for Topic {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Change {
    fn between(from: Option<&State>, to: &State) -> Self {
        let Some(from) = from else {
            return Self { put: to.instances.values().cloned().collect(), removed: Vec::new() };
        };
        let differs = |key: &Arc<str>, instance: &Arc<proto::Instance>| {
            from.instances.get(key).is_none_or(|before| !Arc::ptr_eq(before, instance) && before != instance)
        };
        let put = to.instances.iter().filter(|(key, instance)| differs(key, instance));
        let removed = from.instances.keys().filter(|key| !to.instances.contains_key(*key));
        Self {
            put: put.map(|(_, instance)| Arc::clone(instance)).collect(),
            removed: removed.cloned().collect(),
        }
    }
}

/// Follows what the registries say, until nobody wants to know.
async fn run(mut follows: Vec<Follow>, states: watch::Sender<Arc<State>>) {
    loop {
        let before = Arc::clone(&states.borrow());
        let now: Vec<(Arc<str>, Arc<Followed>)> = follows
            .iter_mut()
            .map(|follow| {
                (Arc::clone(&follow.service.registry), Arc::clone(&follow.state.borrow_and_update()))
            })
            .collect();
        if let Some(state) = join(&before, &now) {
            states.send_replace(Arc::new(state));
        }
        let changed = follows.iter_mut().map(|follow| Box::pin(follow.state.changed()));
        if let (Err(_), ..) = select_all(changed).await {
            return;
        }
    }
}

/// The state after these answers, if it is another one.
fn join(before: &State, now: &[(Arc<str>, Arc<Followed>)]) -> Option<State> {
    let known = !now.iter().any(|(_, followed)| followed.is_pending())
        && now.iter().any(|(_, followed)| followed.freshness != Freshness::Unknown);
    let failure = now.iter().find_map(|(_, followed)| followed.failure.clone());
    let mut instances = BTreeMap::new();
    let mut same = known == before.known;
    for (registry, followed) in now {
        for held in followed.instances.iter() {
            let key = key(registry, &held.instance);
            let message = proto::Instance::new(&key, &held.instance);
            let message = match before.instances.get(&key).filter(|before| ***before == message) {
                Some(before) => Arc::clone(before),
                None => {
                    same = false;
                    Arc::new(message)
                }
            };
            instances.insert(key, message);
        }
    }
    same &= instances.len() == before.instances.len();
    if same && failure == before.failure {
        return None;
    }
    Some(State { version: before.version + u64::from(!same), known, failure, instances })
}
