//! One service for all clients of a server that follow it.
//!
//! What the registries say is turned into messages once, however many clients there are; an instance that has not changed
//! keeps its message.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::select_all;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::drains::{Orders, covers, drained, is_used};
use super::{key, proto};
use crate::follow::{Follow, Followed, Freshness};

/// Changes that are kept, from one version to another: clients are mostly at the same one.
const KEPT_CHANGES: usize = 8;
/// Nodes of a service that were used once and are remembered; beyond, the newer half.
const REMEMBERED: usize = 1024;

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
    /// Nodes that are not used any more, and since which version.
    left: Arc<Left>,
}

/// Nodes that were used once.
#[derive(Clone, Debug, Default)]
struct Left {
    since: HashMap<(String, u32), u64>,
    /// The last version of those that are not remembered any more.
    forgotten: u64,
}

/// What is different in one state from another.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub put: Vec<Arc<proto::Instance>>,
    pub removed: Vec<Arc<str>>,
}

impl Topic {
    pub(super) fn new(
        service: proto::Service,
        follows: Vec<Follow>,
        drains: watch::Receiver<Arc<Orders>>,
    ) -> Self {
        let services = follows.iter().map(|follow| Arc::clone(&follow.service)).collect();
        let (sender, states) = watch::channel(Arc::new(State::default()));
        let task = tokio::spawn(run(service.clone(), follows, drains, sender)).abort_handle();
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

    /// From which version on none of these nodes is offered for use. None while one is, or while nothing is known.
    pub(super) fn unused_since(&self, nodes: &[proto::Node]) -> Option<u64> {
        self.states.borrow().unused_since(nodes)
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

impl State {
    fn unused_since(&self, nodes: &[proto::Node]) -> Option<u64> {
        let mut all = self.instances.values();
        let offered = all.any(|it| is_used(it) && covers(nodes, &it.host, it.port));
        if offered || !self.known {
            return None;
        }
        let left = self.left.since.iter().filter(|((host, port), _)| covers(nodes, host, *port));
        let since = left.map(|(_, version)| *version).max();
        // Whoever has confirmed nothing yet may use what another server has told.
        Some(since.unwrap_or_default().max(self.left.forgotten).max(1))
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
async fn run(
    service: proto::Service,
    mut follows: Vec<Follow>,
    mut drains: watch::Receiver<Arc<Orders>>,
    states: watch::Sender<Arc<State>>,
) {
    loop {
        let orders = Arc::clone(&drains.borrow_and_update());
        let before = Arc::clone(&states.borrow());
        let now: Vec<(Arc<str>, Arc<Followed>)> = follows
            .iter_mut()
            .map(|follow| {
                (Arc::clone(&follow.service.registry), Arc::clone(&follow.state.borrow_and_update()))
            })
            .collect();
        if let Some(state) = join(&before, &now, &drained(&orders, &service)) {
            states.send_replace(Arc::new(state));
        }
        drop(orders);
        let changed = follows.iter_mut().map(|follow| Box::pin(follow.state.changed()));
        tokio::select! {
            changed = select_all(changed) => if changed.0.is_err() { return },
            changed = drains.changed() => if changed.is_err() { return },
        }
    }
}

/// The state after these answers, if it is another one.
fn join(before: &State, now: &[(Arc<str>, Arc<Followed>)], drained: &[&[proto::Node]]) -> Option<State> {
    let known = !now.iter().any(|(_, followed)| followed.is_pending())
        && now.iter().any(|(_, followed)| followed.freshness != Freshness::Unknown);
    let failure = now.iter().find_map(|(_, followed)| followed.failure.clone());
    let mut instances = BTreeMap::new();
    let mut same = known == before.known;
    for (registry, followed) in now {
        for held in followed.instances.iter() {
            let key = key(registry, &held.instance);
            let mut message = proto::Instance::new(&key, &held.instance);
            if drained.iter().any(|nodes| covers(nodes, &message.host, message.port)) {
                message.set_health(proto::Health::Draining);
            }
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
    let version = before.version + u64::from(!same);
    let left = if same { Arc::clone(&before.left) } else { left(before, &instances, version) };
    Some(State { version, known, failure, instances, left })
}

/// Brings the nodes up to date that are not used any more.
fn left(before: &State, instances: &BTreeMap<Arc<str>, Arc<proto::Instance>>, version: u64) -> Arc<Left> {
    let place = |instance: &proto::Instance| (instance.host.clone(), instance.port);
    let changed = |of: &BTreeMap<Arc<str>, Arc<proto::Instance>>, key: &Arc<str>, instance: &Arc<_>| {
        !of.get(key).is_some_and(|other| Arc::ptr_eq(other, instance))
    };
    let came = instances.iter().filter(|(key, it)| is_used(it) && changed(&before.instances, key, it));
    let came: Vec<_> = came.map(|(_, it)| place(it)).collect();
    let went = before.instances.iter().filter(|(key, it)| is_used(it) && changed(instances, key, it));
    let mut went: Vec<_> = went.map(|(_, it)| place(it)).collect();
    if came.is_empty() && went.is_empty() {
        return Arc::clone(&before.left);
    }
    if !went.is_empty() {
        // Another registry may list the same node.
        let used: HashSet<_> = instances.values().filter(|it| is_used(it)).map(|it| place(it)).collect();
        went.retain(|place| !used.contains(place));
    }
    let mut left = Left::clone(&before.left);
    left.since.extend(went.into_iter().map(|place| (place, version)));
    came.iter().for_each(|place| _ = left.since.remove(place));
    if left.since.len() > REMEMBERED {
        let mut versions: Vec<u64> = left.since.values().copied().collect();
        versions.sort_unstable();
        let forgotten = versions.get(versions.len() - REMEMBERED / 2).copied().unwrap_or(version);
        left.since.retain(|_, since| *since > forgotten);
        left.forgotten = forgotten;
    }
    Arc::new(left)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::follow::Held;
    use crate::testing::fake::instance;

    fn registry(ports: std::ops::Range<u16>) -> Vec<(Arc<str>, Arc<Followed>)> {
        let held = |port| Held::new(instance(&format!("10.0.0.1:{port}"), 1), SystemTime::UNIX_EPOCH);
        let followed = Followed {
            instances: ports.map(held).collect(),
            freshness: Freshness::Fresh,
            ..Followed::default()
        };
        vec![("".into(), Arc::new(followed))]
    }

    #[test]
    fn it_is_known_since_when_a_node_is_not_offered_any_more() {
        let node = |port| vec![proto::Node { host: "10.0.0.1".to_owned(), port }];
        let (one, two) = (node(1), node(2));
        let mut state = State::default();
        assert_eq!(state.unused_since(&one), None, "nothing is known yet");
        let drained: &[&[proto::Node]] = &[&two];
        // The ports that the registry lists, what is drained, and since when the second node is not used.
        #[expect(clippy::type_complexity, reason = "written once, and read where it stands")]
        let steps: &[(std::ops::Range<u16>, &[&[proto::Node]], Option<u64>)] = &[
            (1..3, &[], None),
            (1..3, drained, Some(2)),
            (1..2, drained, Some(2)),
            (1..4, drained, Some(2)),
            (1..4, &[], None),
            (1..2, &[], Some(6)),
        ];
        for (step, (ports, drained, since)) in steps.iter().enumerate() {
            let Some(next) = join(&state, &registry(ports.clone()), drained) else {
                panic!("step {step} changes something")
            };
            state = next;
            assert_eq!(state.unused_since(&two), *since, "step {step}");
            assert_eq!(state.unused_since(&one), None, "step {step}");
        }
        assert_eq!(state.unused_since(&node(9)), Some(1), "never seen");
        assert_eq!(state.unused_since(&[]), None, "of all");
    }

    #[test]
    fn what_is_not_remembered_any_more_counts_as_left_late() {
        let Some(all) = join(&State::default(), &registry(1..3000), &[]) else { panic!("a state") };
        let Some(none) = join(&all, &registry(1..1), &[]) else { panic!("a state") };
        assert!(none.left.since.len() <= REMEMBERED);
        let node = [proto::Node { host: "10.0.0.1".to_owned(), port: 7 }];
        assert_eq!(none.unused_since(&node), Some(2));
    }
}
