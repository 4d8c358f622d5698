//! Several parts become one list: a pure function of what the parts say now.
//!
//! An address is one endpoint however many parts, registries and instances list it. The best health counts (the worst, where
//! health is intersected); who it is must not be disputed, or it is refused.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::follow::{Followed, Freshness};
use crate::source::{Details, Health};
use crate::target::{Merge, Target};
use crate::{Endpoint, Failure, Node, literal};

/// Priorities of nodes that keep their meaning inside a part of an order of preference.
const TIER: i32 = 20_000;
/// What the weights of a target whose parts have shares add up to, about.
const SCALE: f64 = 100_000.0;

/// What one node list or one registry contributes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    /// Which part of the target it belongs to.
    pub(crate) part: usize,
    pub(crate) items: Items<'a>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Items<'a> {
    Nodes(&'a [Node]),
    Service { name: &'a Arc<str>, followed: &'a Followed },
}

/// What is known of a host that is a name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resolved {
    pub(crate) addrs: Arc<[IpAddr]>,
    pub(crate) pending: bool,
    pub(crate) failure: Option<Arc<str>>,
}

pub(crate) type Names = HashMap<Arc<str>, Resolved>;

/// Who lists an endpoint: the place in the list of pieces, and in that piece.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Listed {
    pub(crate) endpoint: usize,
    pub(crate) piece: usize,
    pub(crate) item: usize,
    /// The part of the item's weight that this address has.
    weight: f64,
}

/// What comes of it.
#[derive(Debug, Default)]
pub(crate) struct Merged {
    /// In order of first mention, the refused ones among them.
    pub(crate) list: Vec<Endpoint>,
    /// Places in `list` that must not be published, and why.
    pub(crate) refused: HashMap<usize, Arc<str>>,
    pub(crate) listed: Vec<Listed>,
    /// Services whose registry has not been heard for longer than the target allows.
    pub(crate) degraded: Vec<Arc<str>>,
    /// When the next service comes to that.
    pub(crate) degrades_in: Option<Duration>,
    /// Its endpoints were taken out because nobody has vouched for them for too long.
    pub(crate) expired: bool,
    pub(crate) pending: usize,
    pub(crate) failures: Vec<Failure>,
}

/// One mention of an endpoint.
struct Mention {
    endpoint: Endpoint,
    piece: usize,
    item: usize,
}

/// The endpoint that was found first at an address, and what else was said of it.
struct Groups {
    by_addr: hashbrown::HashMap<SocketAddr, usize, foldhash::fast::RandomState>,
    /// Which parts list it, for intersections.
    parts: Vec<u64>,
}

/// Merges. `now` is for what has been stale for too long.
pub(crate) fn merge(target: &Target, pieces: &[Piece<'_>], names: &Names, now: Instant) -> Merged {
    let mut merged = Merged::default();
    let mut groups = Groups { by_addr: Default::default(), parts: Vec::new() };
    let expected = pieces.iter().map(|piece| match piece.items {
        Items::Nodes(nodes) => nodes.len(),
        Items::Service { followed, .. } => followed.instances.len(),
    });
    let expected = expected.sum();
    groups.by_addr.reserve(expected);
    merged.list.reserve(expected);
    merged.listed.reserve(expected);
    // Parts of which something is known.
    let mut known = 0_u64;
    for (place, piece) in pieces.iter().enumerate() {
        let bit = 1_u64 << piece.part.min(63);
        let tier = match target.merge {
            Merge::Prefer => i32::try_from(piece.part).unwrap_or(i32::MAX).saturating_mul(-TIER),
            Merge::Union | Merge::Intersect => 0,
        };
        let priority = |own: i32| match target.merge {
            Merge::Prefer => tier.saturating_add(own.clamp(1 - TIER / 2, TIER / 2 - 1)),
            Merge::Union | Merge::Intersect => own,
        };
        let mut mention = |merged: &mut Merged, mention: Mention| {
            groups.add(merged, mention, bit, target.merge);
        };
        match piece.items {
            Items::Nodes(nodes) => {
                known |= bit;
                for (item, node) in nodes.iter().enumerate() {
                    each(
                        node,
                        target.port,
                        literal(&node.host),
                        Health::Healthy,
                        None,
                        names,
                        &mut merged,
                        &mut |merged, mut endpoint| {
                            endpoint.priority = priority(node.priority);
                            mention(merged, Mention { endpoint, piece: place, item });
                        },
                    );
                }
            }
            Items::Service { name, followed } => {
                merged.pending += usize::from(followed.is_pending());
                if let Some(reason) = &followed.failure {
                    let stale = !followed.instances.is_empty();
                    merged.failures.push(Failure {
                        name: Arc::clone(name),
                        reason: Arc::clone(reason),
                        stale,
                    });
                }
                if let (Some(since), Some(limit)) = (followed.stale_since, target.guards.max_stale) {
                    let age = now.saturating_duration_since(since);
                    match limit.checked_sub(age) {
                        Some(left) if !left.is_zero() => {
                            merged.degrades_in =
                                Some(merged.degrades_in.map_or(left, |other| other.min(left)));
                        }
                        _ => {
                            merged.degraded.push(Arc::clone(name));
                            if target.guards.drop_stale {
                                merged.expired = true;
                                continue;
                            }
                        }
                    }
                }
                if followed.freshness != Freshness::Unknown {
                    known |= bit;
                }
                for (item, held) in followed.instances.iter().enumerate() {
                    let instance = &held.instance;
                    let (node, details) = (&instance.node, instance.details.as_ref());
                    each(
                        node,
                        target.port,
                        held.ip,
                        instance.health,
                        details,
                        names,
                        &mut merged,
                        &mut |merged, mut endpoint| {
                            endpoint.priority = priority(node.priority);
                            mention(merged, Mention { endpoint, piece: place, item });
                        },
                    );
                }
            }
        }
    }
    if target.merge == Merge::Intersect {
        let missing = groups.parts.iter().enumerate().filter(|(_, parts)| **parts & known != known);
        for (place, _) in missing {
            merged.refused.entry(place).or_insert_with(|| "not every source lists it".into());
        }
    }
    if target.parts.iter().any(|part| part.share.is_some()) {
        share(target, pieces, &mut merged);
    }
    merged
}

/// The endpoints of one node: one if its host is an address, else one for each address behind the name.
#[expect(clippy::too_many_arguments, reason = "what a node and an instance have in common")]
fn each(
    node: &Node,
    default_port: u16,
    ip: Option<IpAddr>,
    health: Health,
    details: Option<&Arc<Details>>,
    names: &Names,
    merged: &mut Merged,
    found: &mut dyn FnMut(&mut Merged, Endpoint),
) {
    let endpoint = |ip: IpAddr, siblings: u32| Endpoint {
        addr: SocketAddr::new(ip, if node.port == 0 { default_port } else { node.port }),
        host: Arc::clone(&node.host),
        weight: node.weight,
        siblings,
        priority: node.priority,
        health,
        details: details.cloned(),
    };
    if let Some(ip) = ip {
        found(merged, endpoint(ip, 1));
        return;
    }
    let Some(resolved) = names.get(&node.host) else {
        merged.pending += 1;
        return;
    };
    merged.pending += usize::from(resolved.pending);
    if let Some(reason) = &resolved.failure {
        let stale = !resolved.addrs.is_empty();
        merged.failures.push(Failure { name: Arc::clone(&node.host), reason: Arc::clone(reason), stale });
    }
    let siblings = u32::try_from(resolved.addrs.len()).unwrap_or(u32::MAX);
    for ip in resolved.addrs.iter() {
        found(merged, endpoint(*ip, siblings));
    }
}

impl Groups {
    fn add(
        &mut self,
        merged: &mut Merged,
        Mention { endpoint, piece, item }: Mention,
        bit: u64,
        merge: Merge,
    ) {
        let weight = f64::from(endpoint.weight) / f64::from(endpoint.siblings.max(1));
        let next = merged.list.len();
        let place = *self.by_addr.entry(endpoint.addr).or_insert(next);
        merged.listed.push(Listed { endpoint: place, piece, item, weight });
        let (Some(known), Some(parts)) = (merged.list.get_mut(place), self.parts.get_mut(place)) else {
            merged.list.push(endpoint);
            self.parts.push(bit);
            return;
        };
        *parts |= bit;
        if let (Some(one), Some(other)) = (identity(known), identity(&endpoint))
            && one != other
        {
            let why = format!("its sources do not agree who it is: {one} or {other}");
            merged.refused.insert(place, why.into());
        }
        // A source that knows who it is tells more than one that does not.
        if identity(known).is_none() && (known.details.is_none() || identity(&endpoint).is_some()) {
            known.details = endpoint.details.clone().or_else(|| known.details.take());
        }
        match merge {
            Merge::Intersect => known.health = known.health.max(endpoint.health),
            Merge::Union | Merge::Prefer if endpoint.health < known.health => {
                // What it may carry goes with the state it is in.
                known.health = endpoint.health;
                known.weight = endpoint.weight;
                known.siblings = endpoint.siblings;
            }
            Merge::Union | Merge::Prefer => {}
        }
        known.priority = known.priority.max(endpoint.priority);
    }
}

fn identity(endpoint: &Endpoint) -> Option<&str> {
    endpoint.details.as_ref()?.identity.as_deref()
}

/// Gives each part its share, divided among what it lists by the weights that it gives them.
fn share(target: &Target, pieces: &[Piece<'_>], merged: &mut Merged) {
    let part = |listed: &Listed| pieces.get(listed.piece).map_or(0, |piece| piece.part);
    let share = |part: usize| target.parts.get(part).map_or(0.0, |part| f64::from(part.share.unwrap_or(100)));
    let usable = |place: usize| {
        let health = merged.list.get(place).map(|endpoint| endpoint.health);
        health.is_some_and(|health| health <= Health::Warning) && !merged.refused.contains_key(&place)
    };
    let mut sums = vec![0.0; target.parts.len()];
    for listed in merged.listed.iter().filter(|listed| usable(listed.endpoint)) {
        if let Some(sum) = sums.get_mut(part(listed)) {
            *sum += listed.weight;
        }
    }
    let total: f64 =
        (0..sums.len()).filter(|part| sums.get(*part).is_some_and(|sum| *sum > 0.0)).map(share).sum();
    let mut weights = vec![0.0; merged.list.len()];
    for listed in &merged.listed {
        let part = part(listed);
        let sum = sums.get(part).copied().unwrap_or(0.0);
        if let Some(weight) = weights.get_mut(listed.endpoint)
            && sum > 0.0
            && total > 0.0
        {
            *weight += share(part) / total * listed.weight / sum * SCALE;
        }
    }
    for (endpoint, weight) in merged.list.iter_mut().zip(weights) {
        endpoint.siblings = 1;
        // What has a share at all does not lose it by rounding.
        endpoint.weight = if weight > 0.0 { (weight.round() as u32).max(1) } else { 0 };
    }
}

impl Merged {
    /// What is published.
    pub(crate) fn published(&mut self) -> Vec<Endpoint> {
        let list = std::mem::take(&mut self.list);
        if self.refused.is_empty() {
            return list;
        }
        let kept = list.into_iter().enumerate().filter(|(place, _)| !self.refused.contains_key(place));
        kept.map(|(_, endpoint)| endpoint).collect()
    }
}

#[cfg(test)]
mod tests;
