//! What the answers of a registry do to the instances of one service. No time passes in here and nothing is asked.
//!
//! - An error takes nothing away.
//! - An empty list after instances takes them away when it is said twice, or for long enough without an error; at once
//!   where all of them were taken out on our own request.
//! - What a registry does not list after it lost its memory or its place is kept while it answers.
//! - Everything else is as the registry says.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::{Followed, Freshness, Held, Kept, KeptBy};
use crate::source::{Instance, Listing, SourceError, Standing};
use crate::views::{Change, InstanceView, Named};

/// Steps that are remembered.
const HISTORY: usize = 20;
/// So many vain probes in a row, and it is gone.
const PROBES: u8 = 2;
/// So long after the registry knows the service again, what it still does not list is gone.
const GRACE: Duration = Duration::from_secs(600);

/// A moment on both clocks: one to reckon with, one to show.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) at: Instant,
    pub(super) wall: SystemTime,
}

impl Now {
    pub(super) fn get() -> Self {
        Self { at: Instant::now(), wall: SystemTime::now() }
    }
}

/// What tells one instance of a service from the others.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    id: Arc<str>,
    pub(super) host: Arc<str>,
    pub(super) port: u16,
}

impl Key {
    fn of(instance: &Instance) -> Self {
        Self { id: instance.id.clone(), host: instance.node.host.clone(), port: instance.node.port }
    }
}

fn order(a: &Instance, b: &Instance) -> std::cmp::Ordering {
    (&*a.id, &*a.node.host, a.node.port).cmp(&(&*b.id, &*b.node.host, b.node.port))
}

/// The registry says that there is nothing, and is not believed yet.
#[derive(Clone, Copy, Debug)]
struct Emptying {
    since: Instant,
}

#[derive(Debug)]
pub(super) struct Ledger {
    followed: Followed,
    /// How long an empty list has to stand.
    empty_confirm: Duration,
    emptying: Option<Emptying>,
    /// The registry has listed nothing, and that is not believed yet.
    doubted: bool,
    /// The next list may not be a continuation of the last one, whatever it says.
    unsure: bool,
    /// The instances are those of an earlier process; the registry has not answered yet.
    restored: bool,
    /// Taken out on our own request. Where nothing else was left, an empty list says nothing that was not expected.
    retired: HashSet<Key>,
    /// Vain probes of what the registry has forgotten.
    lost: HashMap<Key, u8>,
    /// The registry has forgotten some, and knows others again since.
    knows_again: Option<Instant>,
    answered: Option<SystemTime>,
    errors: u64,
    history: VecDeque<Change>,
}

/// Collects what one step does.
#[derive(Default)]
struct Step {
    added: Named,
    changed: Named,
    removed: Named,
}

impl Step {
    fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }
}

fn name(instance: &Instance) -> Arc<str> {
    let node = &instance.node;
    let host = if node.host.contains(':') && !node.host.starts_with('[') {
        format!("[{}]", node.host)
    } else {
        node.host.to_string()
    };
    format!("{} {host}:{}", instance.id, node.port).into()
}

impl Ledger {
    pub(super) fn new(empty_confirm: Duration) -> Self {
        Self {
            followed: Followed::default(),
            empty_confirm,
            emptying: None,
            doubted: false,
            unsure: false,
            restored: false,
            retired: HashSet::new(),
            lost: HashMap::new(),
            knows_again: None,
            answered: None,
            errors: 0,
            history: VecDeque::new(),
        }
    }

    pub(super) fn followed(&self) -> &Followed {
        &self.followed
    }

    pub(super) fn answered_at(&self) -> Option<SystemTime> {
        self.answered
    }

    pub(super) fn errors(&self) -> u64 {
        self.errors
    }

    pub(super) fn history(&self) -> Vec<Change> {
        self.history.iter().cloned().collect()
    }

    /// What was good before this process started. Only before the first answer.
    pub(super) fn restore(&mut self, instances: Vec<Held>, confirmed: SystemTime, now: Now) -> bool {
        if self.answered.is_some() || instances.is_empty() {
            return false;
        }
        let mut instances = instances;
        instances.sort_by(|a, b| order(&a.instance, &b.instance));
        instances.dedup_by(|a, b| order(&a.instance, &b.instance).is_eq());
        let mut step = Step::default();
        instances.iter().for_each(|held| step.added.add(|| name(&held.instance)));
        self.restored = true;
        let why = "kept from before the start; the registry has not answered yet";
        let age = now.wall.duration_since(confirmed).unwrap_or_default();
        self.stale(why.into(), Now { at: now.at.checked_sub(age).unwrap_or(now.at), wall: confirmed });
        self.replace(instances, step, "read from disk", now);
        true
    }

    /// Continuity is lost: what was asked last and what will be asked next may have nothing to do with each other.
    pub(super) fn doubt(&mut self) {
        self.unsure = true;
    }

    /// The registry was told to take the instance out.
    pub(super) fn retired(&mut self, instance: &Instance) {
        self.retired.insert(Key::of(instance));
    }

    /// Everything that the registry listed was taken out on request.
    fn is_expected_empty(&self) -> bool {
        let mut listed = self.followed.instances.iter().filter(|held| held.kept.is_none());
        listed.all(|held| self.retired.contains(&Key::of(&held.instance)))
    }

    /// The registry answered. True when anything changed for those who watch.
    pub(super) fn listed(&mut self, listing: Listing, now: Now) -> bool {
        let mut list = listing.instances;
        list.sort_by(order);
        list.dedup_by(|a, b| order(a, b).is_eq());
        let unsure = std::mem::take(&mut self.unsure);
        // After a start, an empty answer may come from a registry that has just been started as well.
        let forgotten = std::mem::take(&mut self.restored) && list.is_empty();
        let restarted = listing.standing == Standing::Restarted || unsure || forgotten;
        let listed_until = self.answered.replace(now.wall).unwrap_or(now.wall);
        self.followed.failure = None;
        let known = self.followed.instances.iter().any(|held| held.kept.is_none());
        if list.is_empty() && known && !restarted {
            match self.emptying {
                None if !self.empty_confirm.is_zero() && !self.is_expected_empty() => {
                    self.emptying = Some(Emptying { since: now.at });
                    self.doubted = true;
                    let why = "the registry lists no instance; believed when it says so again";
                    self.stale(why.into(), now);
                    return true;
                }
                _ => return self.empty(now),
            }
        }
        self.emptying = None;
        self.doubted = false;
        let freshened = !self.followed.freshness.is_fresh();
        self.fresh();
        if !list.is_empty() && !self.lost.is_empty() && !restarted {
            self.knows_again.get_or_insert(now.at);
        }
        let same = self.followed.instances.len() == list.len()
            && self.followed.instances.iter().zip(&list).all(|(old, new)| old.is(new));
        if same {
            return freshened;
        }
        let cause = if restarted { "listed by a registry that began anew" } else { "listed by the registry" };
        self.join(list, restarted, cause, listed_until, now) || freshened
    }

    /// Makes `list` the instances. Both are in order, so one pass is enough.
    fn join(
        &mut self,
        list: Vec<Instance>,
        restarted: bool,
        cause: &str,
        listed_until: SystemTime,
        now: Now,
    ) -> bool {
        let mut step = Step::default();
        let mut next = Vec::with_capacity(list.len().max(self.followed.instances.len()));
        let former = Arc::clone(&self.followed.instances);
        let mut old = former.iter().peekable();
        let mut new = list.into_iter().peekable();
        let kept = Arc::new(Kept { since: listed_until, why: KeptBy::Forgotten });
        loop {
            let which = match (old.peek(), new.peek()) {
                (None, None) => break,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(old), Some(new)) => order(&old.instance, new),
            };
            match which {
                // Known, not listed.
                std::cmp::Ordering::Less => {
                    let Some(held) = old.next() else { break };
                    if held.kept.is_some() {
                        next.push(held.clone());
                    } else if restarted {
                        self.lost.insert(Key::of(&held.instance), 0);
                        step.changed.add(|| name(&held.instance));
                        next.push(Held { kept: Some(Arc::clone(&kept)), ..held.clone() });
                    } else {
                        step.removed.add(|| name(&held.instance));
                    }
                }
                // Listed, not known.
                std::cmp::Ordering::Greater => {
                    let Some(instance) = new.next() else { break };
                    step.added.add(|| name(&instance));
                    next.push(Held::new(instance, now.wall));
                }
                std::cmp::Ordering::Equal => {
                    let (Some(held), Some(instance)) = (old.next(), new.next()) else { break };
                    if held.is(&instance) {
                        next.push(held.clone());
                        continue;
                    }
                    if held.kept.is_some() {
                        self.lost.remove(&Key::of(&instance));
                    }
                    step.changed.add(|| name(&instance));
                    next.push(Held { first_seen: held.first_seen, ..Held::new(instance, now.wall) });
                }
            }
        }
        if restarted {
            self.knows_again = None;
        }
        // What is kept and not listed makes a list look different that is not.
        let changed = !step.is_empty();
        if changed {
            self.replace(next, step, cause, now);
        }
        changed
    }

    /// The registry could not be asked.
    pub(super) fn failed(&mut self, error: &SourceError, now: Now) -> bool {
        self.errors += 1;
        // It has to be said without a doubt: what the registry said before it failed may have been part of the failure.
        self.emptying = None;
        let changed = self.followed.failure.as_ref() != Some(&error.reason);
        self.followed.failure = Some(Arc::clone(&error.reason));
        if self.answered.is_none() && !self.restored {
            return changed;
        }
        match &mut self.followed.freshness {
            Freshness::Stale { why, .. } => {
                if changed {
                    *why = Arc::clone(&error.reason);
                }
                changed
            }
            Freshness::Fresh | Freshness::Unknown => {
                self.stale(Arc::clone(&error.reason), now);
                true
            }
        }
    }

    fn fresh(&mut self) {
        self.followed.freshness = Freshness::Fresh;
        self.followed.stale_since = None;
    }

    fn stale(&mut self, why: Arc<str>, since: Now) {
        self.followed.freshness = Freshness::Stale { since: since.wall, why };
        self.followed.stale_since = Some(since.at);
    }

    /// What has to happen by itself, and when.
    pub(super) fn due(&self) -> Option<Instant> {
        let confirmed = self.emptying.map(|emptying| emptying.since + self.empty_confirm);
        let forgotten =
            self.knows_again.filter(|_| self.followed.freshness.is_fresh()).map(|since| since + GRACE);
        [confirmed, forgotten].into_iter().flatten().min()
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: Now) -> bool {
        let mut changed = false;
        if self.emptying.is_some_and(|emptying| now.at >= emptying.since + self.empty_confirm) {
            changed |= self.empty(now);
        }
        // Not while the registry cannot be asked: it may know by now.
        let fresh = self.followed.freshness.is_fresh();
        if fresh && self.knows_again.is_some_and(|since| now.at >= since + GRACE) {
            self.knows_again = None;
            self.lost.clear();
            let why = "the registry has had time to learn of it again and does not list it";
            changed |= self.remove(|held| held.kept.is_some(), why, now);
        }
        changed
    }

    /// The registry is to be asked once more whether there really is nothing.
    pub(super) fn wants_confirmation(&self) -> bool {
        self.emptying.is_some()
    }

    /// Something is kept that the registry did not list when it was asked last.
    pub(super) fn keeps(&self) -> bool {
        self.doubted || self.followed.instances.iter().any(|held| held.kept.is_some())
    }

    /// What has to be probed.
    pub(super) fn lost(&self) -> Vec<Key> {
        self.lost.keys().cloned().collect()
    }

    pub(super) fn has_lost(&self) -> bool {
        !self.lost.is_empty()
    }

    /// What the probes found.
    pub(super) fn probed(&mut self, results: &[(Key, bool)], now: Now) -> bool {
        let mut gone = false;
        for (key, answers) in results {
            // It may be listed again by now.
            let Some(vain) = self.lost.get_mut(key) else { continue };
            *vain = if *answers { 0 } else { vain.saturating_add(1) };
            gone |= *vain >= PROBES;
        }
        if !gone {
            return false;
        }
        let lost = std::mem::take(&mut self.lost);
        let is_gone = |held: &Held| {
            held.kept.is_some() && lost.get(&Key::of(&held.instance)).is_some_and(|vain| *vain >= PROBES)
        };
        let why = "the registry has forgotten it and it does not answer";
        let changed = self.remove(is_gone, why, now);
        self.lost = lost.into_iter().filter(|(_, vain)| *vain < PROBES).collect();
        if self.lost.is_empty() {
            self.knows_again = None;
        }
        changed
    }

    /// Believes that there is no instance. What a registry had forgotten before is not what it speaks of.
    fn empty(&mut self, now: Now) -> bool {
        self.emptying = None;
        self.doubted = false;
        self.fresh();
        let why = match self.is_expected_empty() {
            true => "the registry lists no instance: they were taken out on request",
            false => "the registry lists no instance, and said so again",
        };
        self.remove(|held| held.kept.is_none(), why, now);
        true
    }

    fn remove(&mut self, is_gone: impl Fn(&Held) -> bool, why: &str, now: Now) -> bool {
        let mut step = Step::default();
        let mut next = Vec::with_capacity(self.followed.instances.len());
        for held in self.followed.instances.iter() {
            if is_gone(held) {
                step.removed.add(|| name(&held.instance));
            } else {
                next.push(held.clone());
            }
        }
        if step.is_empty() {
            return false;
        }
        self.replace(next, step, why, now);
        true
    }

    fn replace(&mut self, instances: Vec<Held>, step: Step, why: &str, now: Now) {
        if !self.retired.is_empty() {
            // What comes back is another one.
            let there: HashSet<Key> = instances.iter().map(|held| Key::of(&held.instance)).collect();
            self.retired.retain(|key| there.contains(key));
        }
        self.followed.instances = instances.into();
        self.followed.generation += 1;
        if self.history.len() >= HISTORY {
            self.history.pop_front();
        }
        let Step { added, changed, removed } = step;
        self.history.push_back(Change { at: now.wall, why: why.into(), added, changed, removed });
    }

    /// The instances as they are shown.
    pub(super) fn views(&self) -> Vec<InstanceView> {
        let view = |held: &Held| InstanceView {
            id: held.instance.id.clone(),
            host: held.instance.node.host.clone(),
            port: held.instance.node.port,
            weight: held.instance.node.weight,
            priority: held.instance.node.priority,
            health: held.instance.health,
            first_seen: held.first_seen,
            kept: held.kept.as_ref().map(|kept| kept.why.words().into()),
        };
        self.followed.instances.iter().map(view).collect()
    }
}

#[cfg(test)]
mod tests;
