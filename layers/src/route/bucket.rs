//! The routes that share one place in the tree, in the order in which they are tried.
//!
//! One route, the common case, is held inline; a few in a sorted array. Many (a thousand versions of a path told
//! apart by method, header or argument) are spread over lanes, so that a request meets only those it may match:
//! a route lies in the lane of each of its methods, and within it, if its `vars` require a variable to have one
//! of some texts, under each of these texts. A request opens its method's lanes and, for each variable used so,
//! the one under the value it has. What it costs then depends on the number of such variables (at most
//! [`MAX_INDEXED`]) and of routes that are really tried, not on the number of routes.

use std::cmp::Ordering;
use std::sync::Arc;

use config::var::Var;
use smallvec::SmallVec;

use super::Request;
use super::matcher::Route;
use super::radix::{Radix, Values};
use super::uri::Uri;

/// More routes than this at one place are spread over lanes.
const FEW: usize = 12;
/// Variables by which the routes of one place are told apart. Routes that need others are tried one by one.
const MAX_INDEXED: usize = 8;

/// A route under one of its URIs.
#[derive(Debug)]
pub(super) struct Leaf<T> {
    route: Arc<Route<T>>,
    uri: u32,
    /// Told here so that changes need not read the pattern again. It also gives [`Bucket`] room for its tag.
    is_exact: bool,
}

impl<T> Clone for Leaf<T> {
    fn clone(&self) -> Self {
        Leaf { route: Arc::clone(&self.route), uri: self.uri, is_exact: self.is_exact }
    }
}

impl<T> Leaf<T> {
    /// The leaves of a route, one for each of its URIs.
    pub(super) fn all(route: &Arc<Route<T>>) -> impl Iterator<Item = Leaf<T>> {
        (0..).zip(&route.uris).map(|(at, uri)| Leaf {
            route: Arc::clone(route),
            uri: at,
            is_exact: uri.is_exact(),
        })
    }

    pub(super) fn route(&self) -> &Route<T> {
        &self.route
    }

    pub(super) fn uri(&self) -> Option<&Uri> {
        self.route.uris.get(self.uri as usize)
    }

    pub(super) fn is_exact(&self) -> bool {
        self.is_exact
    }

    fn uri_length(&self) -> usize {
        self.uri().map_or(0, |uri| uri.text().len())
    }

    /// The order of trying: higher priority, longer pattern, then as configured.
    fn rank(&self, other: &Self) -> Ordering {
        let by_priority = other.route.priority.cmp(&self.route.priority);
        by_priority
            .then_with(|| other.uri_length().cmp(&self.uri_length()))
            .then_with(|| self.route.order.cmp(&other.route.order))
            .then_with(|| self.route.id.cmp(&other.route.id))
            .then_with(|| self.uri.cmp(&other.uri))
    }

    /// Bytes that order as [`Leaf::rank`] does.
    fn rank_key(&self) -> SmallVec<[u8; 64]> {
        let mut key = SmallVec::new();
        // Flipping the sign bit makes negative numbers order before positive ones; the complement turns round.
        let priority = self.route.priority.cast_unsigned() ^ (1 << 63);
        key.extend_from_slice(&(!priority).to_be_bytes());
        key.extend_from_slice(&(u64::MAX - self.uri_length() as u64).to_be_bytes());
        key.extend_from_slice(&self.route.order.to_be_bytes());
        key.extend_from_slice(self.route.id.as_bytes());
        // Below every byte of an id, so that an id orders before those it begins.
        key.push(0);
        key.extend_from_slice(&self.uri.to_be_bytes());
        key
    }
}

/// The routes at one place.
#[derive(Debug)]
pub(super) enum Bucket<T> {
    None,
    One(Leaf<T>),
    Few(Arc<SmallVec<[Leaf<T>; 4]>>),
    Many(Arc<Group<T>>),
}

impl<T> Clone for Bucket<T> {
    fn clone(&self) -> Self {
        match self {
            Bucket::None => Bucket::None,
            Bucket::One(leaf) => Bucket::One(leaf.clone()),
            Bucket::Few(leaves) => Bucket::Few(Arc::clone(leaves)),
            Bucket::Many(group) => Bucket::Many(Arc::clone(group)),
        }
    }
}

impl<T> Bucket<T> {
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Bucket::None)
    }

    pub(super) fn insert(&mut self, leaf: Leaf<T>) {
        match self {
            Bucket::None => *self = Bucket::One(leaf),
            Bucket::One(only) => {
                let mut leaves = SmallVec::new();
                leaves.push(only.clone());
                insert_ranked(&mut leaves, leaf);
                *self = Bucket::Few(Arc::new(leaves));
            }
            Bucket::Few(leaves) if leaves.len() < FEW => insert_ranked(Arc::make_mut(leaves), leaf),
            Bucket::Few(leaves) => {
                let mut group = Group::default();
                for leaf in leaves.iter().cloned().chain([leaf]) {
                    group.insert(leaf);
                }
                *self = Bucket::Many(Arc::new(group));
            }
            Bucket::Many(group) => Arc::make_mut(group).insert(leaf),
        }
    }

    pub(super) fn remove(&mut self, leaf: &Leaf<T>) {
        match self {
            Bucket::None => {}
            Bucket::One(only) => {
                if only.rank(leaf).is_eq() {
                    *self = Bucket::None;
                }
            }
            Bucket::Few(leaves) => {
                let Ok(at) = leaves.binary_search_by(|known| known.rank(leaf)) else { return };
                let leaves = Arc::make_mut(leaves);
                leaves.remove(at);
                if let [only] = leaves.as_slice() {
                    *self = Bucket::One(only.clone());
                }
            }
            Bucket::Many(group) => {
                Arc::make_mut(group).remove(leaf);
                // Well below the limit, so that one route coming and going does not rebuild each time.
                if group.length <= FEW / 2 {
                    *self = Bucket::Few(Arc::new(group.leaves().into_iter().cloned().collect()));
                }
            }
        }
    }

    /// Tries the routes that may match, in order; gives the first thing `attempt` makes of one.
    pub(super) fn first<'t, R>(
        &'t self,
        request: &Request<'_>,
        mut attempt: impl FnMut(&'t Leaf<T>) -> Option<R>,
    ) -> Option<R> {
        match self {
            Bucket::None => None,
            Bucket::One(leaf) => attempt(leaf),
            Bucket::Few(leaves) => leaves.iter().find_map(attempt),
            Bucket::Many(group) => group.first(request, attempt),
        }
    }

    /// Every route, in the order of trying.
    pub(super) fn leaves(&self) -> Vec<&Leaf<T>> {
        match self {
            Bucket::None => Vec::new(),
            Bucket::One(leaf) => vec![leaf],
            Bucket::Few(leaves) => leaves.iter().collect(),
            Bucket::Many(group) => group.leaves(),
        }
    }
}

fn insert_ranked<T>(leaves: &mut SmallVec<[Leaf<T>; 4]>, leaf: Leaf<T>) {
    let at = leaves.partition_point(|known| known.rank(&leaf).is_lt());
    leaves.insert(at, leaf);
}

/// Leaves by [`Leaf::rank_key`].
type Lane<T> = Radix<Leaf<T>>;

/// Many routes at one place.
pub(super) struct Group<T> {
    length: usize,
    /// By [`lane_key`].
    lanes: Radix<Lane<T>>,
    indexed: SmallVec<[Indexed; 2]>,
}

/// A variable by whose text routes are told apart.
#[derive(Clone)]
struct Indexed {
    var: Var,
    /// Its number in [`lane_key`], from 1.
    slot: u8,
    /// Routes filed under it; at none it gives its slot free.
    routes: usize,
}

/// The lane of every method.
const ANY_METHOD: u8 = 0;
/// The part of a lane for routes that no variable is known to rule out.
const NO_SLOT: u8 = 0;

/// A method's position plus one, a variable's slot, its text.
fn lane_key(method: u8, slot: u8, text: &str) -> SmallVec<[u8; 64]> {
    let mut key = SmallVec::new();
    key.extend_from_slice(&[method, slot]);
    key.extend_from_slice(text.as_bytes());
    key
}

impl<T> Clone for Group<T> {
    fn clone(&self) -> Self {
        Group { length: self.length, lanes: self.lanes.clone(), indexed: self.indexed.clone() }
    }
}

impl<T> Default for Group<T> {
    fn default() -> Self {
        Group { length: 0, lanes: Radix::default(), indexed: SmallVec::new() }
    }
}

impl<T> std::fmt::Debug for Group<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("length", &self.length).finish_non_exhaustive()
    }
}

impl<T> Group<T> {
    fn insert(&mut self, leaf: Leaf<T>) {
        let route = Arc::clone(&leaf.route);
        let required = required(&route);
        let (slot, texts) = self.file_under(&required);
        let rank = leaf.rank_key();
        for_each_lane(&route, slot, texts, |key| {
            self.lanes.modify(key, |lane| {
                lane.get_or_insert_default().insert(&rank, leaf.clone());
            });
        });
        self.length += 1;
    }

    /// Where a new route goes: under a variable that others use already, else under a new one if there is room.
    fn file_under<'r>(&mut self, required: &'r [Required<'r>]) -> (u8, &'r [&'r str]) {
        for (var, texts) in required {
            if let Some(known) = self.indexed.iter_mut().find(|known| known.var == **var) {
                known.routes += 1;
                return (known.slot, texts);
            }
        }
        let free = (1..=MAX_INDEXED as u8).find(|slot| self.indexed.iter().all(|known| known.slot != *slot));
        match (required.first(), free) {
            (Some((var, texts)), Some(slot)) => {
                self.indexed.push(Indexed { var: (*var).clone(), slot, routes: 1 });
                (slot, texts)
            }
            _ => (NO_SLOT, &[""]),
        }
    }

    fn remove(&mut self, leaf: &Leaf<T>) {
        let route = &leaf.route;
        let required = required(route);
        let rank = leaf.rank_key();
        // Which variables were known when the route came is not remembered, so each place it may be in is asked.
        let places = required.iter().filter_map(|(var, texts)| {
            let position = self.indexed.iter().position(|known| known.var == **var)?;
            Some((Some(position), texts.as_slice()))
        });
        let holds = |&(position, texts): &(Option<usize>, &[&str])| {
            let mut held = false;
            for_each_lane(route, self.slot(position), texts, |key| {
                held |= self.lanes.get(key).is_some_and(|lane| lane.get(&rank).is_some());
            });
            held
        };
        let Some((position, texts)) = places.chain([(None, &[""][..])]).find(holds) else { return };
        for_each_lane(route, self.slot(position), texts, |key| {
            self.lanes.modify(key, |place| {
                if let Some(lane) = place {
                    lane.remove(&rank);
                    if lane.is_empty() {
                        *place = None;
                    }
                }
            });
        });
        self.length -= 1;
        if let Some(position) = position
            && let Some(known) = self.indexed.get_mut(position)
        {
            known.routes -= 1;
            if known.routes == 0 {
                self.indexed.remove(position);
            }
        }
    }

    fn slot(&self, position: Option<usize>) -> u8 {
        position.and_then(|position| self.indexed.get(position)).map_or(NO_SLOT, |known| known.slot)
    }

    fn first<'t, R>(
        &'t self,
        request: &Request<'_>,
        mut attempt: impl FnMut(&'t Leaf<T>) -> Option<R>,
    ) -> Option<R> {
        let mut heads: SmallVec<[Head<'t, T>; 4]> = SmallVec::new();
        let mut open = |slot: u8, text: &str| {
            let of_method = request.method.positions().map(|position| position + 1);
            for method in of_method.chain([ANY_METHOD]) {
                let lane = self.lanes.get(&lane_key(method, slot, text));
                heads.extend(lane.and_then(|lane| Head::of(lane.values())));
            }
        };
        open(NO_SLOT, "");
        for known in &self.indexed {
            if let Some(text) = request.vars.get(&known.var) {
                open(known.slot, &text);
            }
        }
        // Each lane is in order; the next to try is the least of their heads.
        loop {
            let least = heads.iter_mut().min_by(|one, other| one.leaf.rank(other.leaf))?;
            let leaf = least.leaf;
            if let Some(found) = attempt(leaf) {
                return Some(found);
            }
            match least.behind.next() {
                Some(next) => least.leaf = next,
                None => heads.retain(|head| !std::ptr::eq(head.leaf, leaf)),
            }
        }
    }

    fn leaves(&self) -> Vec<&Leaf<T>> {
        let mut leaves: Vec<_> = self.lanes.values().flat_map(Radix::values).collect();
        leaves.sort_unstable_by(|one, other| one.rank(other));
        leaves.dedup_by(|one, other| one.rank(other).is_eq());
        leaves
    }
}

/// A lane being walked: the leaf to try next and those behind it.
struct Head<'t, T> {
    leaf: &'t Leaf<T>,
    behind: Values<'t, Leaf<T>>,
}

impl<'t, T> Head<'t, T> {
    fn of(mut lane: Values<'t, Leaf<T>>) -> Option<Self> {
        let leaf = lane.next()?;
        Some(Head { leaf, behind: lane })
    }
}

/// A variable and the texts of which it must have one.
type Required<'r> = (&'r Var, Vec<&'r str>);

/// What rules a route out by text alone. Variables of the body are left out: asking for one makes the gateway
/// wait for the body, which only a route that is really tried may do. So are parameters of the URI, which only a
/// route that is tried captures.
fn required<T>(route: &Route<T>) -> Vec<Required<'_>> {
    let vars = route.vars.as_ref().map(|vars| vars.required()).unwrap_or_default();
    let settled = |var: &Var| !var.is_typed() && !var.needs_body() && !matches!(var, Var::UriParam(_));
    vars.into_iter().filter(|(var, _)| settled(var)).collect()
}

fn for_each_lane<T>(route: &Route<T>, slot: u8, texts: &[&str], mut visit: impl FnMut(&[u8])) {
    let any = route.methods.is_empty().then_some(ANY_METHOD);
    for method in route.methods.positions().map(|position| position + 1).chain(any) {
        for text in texts {
            visit(&lane_key(method, slot, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_without_a_crowd_is_two_words() {
        assert_eq!(size_of::<Bucket<()>>(), 16);
    }
}
