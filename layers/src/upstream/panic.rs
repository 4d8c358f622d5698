//! When too few nodes are healthy to carry the load of all.
//!
//! Endpoints of one priority are a tier. A tier stands while enough of it can be used; one that does not is passed over
//! for another that does. Where none stands, the few healthy nodes are spared the load of all the others: everything
//! that is not draining gets its part again, as if there were no checks. Control side only.

use super::picker::Peer;

/// How the endpoints of one priority are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tier {
    pub priority: i32,
    /// How many can be used.
    pub usable: usize,
    /// Out of how many.
    pub all: usize,
}

impl Tier {
    /// Whether enough of it can be used: one, and `threshold` percent.
    pub fn stands(&self, threshold: u8) -> bool {
        self.usable > 0 && self.usable * 100 >= self.all * usize::from(threshold)
    }
}

/// The tiers of these endpoints, best first.
pub fn tiers<'a>(peers: impl Iterator<Item = &'a Peer>) -> Vec<Tier> {
    let mut tiers: Vec<Tier> = Vec::new();
    for peer in peers {
        // There are few, and endpoints of one stand together.
        let place = tiers.iter().rposition(|tier| tier.priority == peer.priority).unwrap_or_else(|| {
            tiers.push(Tier { priority: peer.priority, usable: 0, all: 0 });
            tiers.len() - 1
        });
        if let Some(tier) = tiers.get_mut(place) {
            tier.all += 1;
            tier.usable += usize::from(peer.usable());
        }
    }
    tiers.sort_by_key(|tier| std::cmp::Reverse(tier.priority));
    tiers
}

/// Whether no tier stands, though there are some.
pub fn panics(tiers: &[Tier], threshold: u8) -> bool {
    !tiers.is_empty() && !tiers.iter().any(|tier| tier.stands(threshold))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_stands_while_enough_of_it_can_be_used() {
        for (usable, all, threshold, stands) in [
            (1, 100, 0, true),
            (0, 100, 0, false),
            (0, 0, 0, false),
            (5, 10, 50, true),
            (4, 10, 50, false),
            (2, 3, 66, true),
            (2, 3, 67, false),
            (9, 10, 100, false),
            (10, 10, 100, true),
        ] {
            let tier = Tier { priority: 0, usable, all };
            assert_eq!(tier.stands(threshold), stands, "{usable} of {all} at {threshold} %");
        }
    }

    #[test]
    fn there_is_panic_only_where_no_tier_stands() {
        let tier = |(usable, all)| Tier { priority: 0, usable, all };
        for (tiers, threshold, panic) in [
            (vec![], 50, false),
            (vec![(4, 10)], 50, true),
            (vec![(4, 10)], 0, false),
            (vec![(0, 10)], 0, true),
            (vec![(4, 10), (2, 2)], 50, false),
            (vec![(4, 10), (0, 2)], 50, true),
        ] {
            let list: Vec<_> = tiers.iter().copied().map(tier).collect();
            assert_eq!(panics(&list, threshold), panic, "{tiers:?} at {threshold} %");
        }
    }
}
