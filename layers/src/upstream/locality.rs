//! Near nodes first.
//!
//! Endpoints of one priority are put into groups by how near they are; a group gets requests when nothing of the nearer
//! ones is left. A group of which too little is healthy is joined with the next, so that nearness never costs more than
//! it brings. Control side only.

use std::sync::Arc;

use config::process::Place;
use config::upstream::discovery::{Locality, Near};
use discovery::Details;

use super::picker::Peer;

/// What is near, and how much of it has to be healthy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearness {
    place: Arc<Place>,
    near: Near,
    min_local: u8,
}

/// Farther than anything that is compared.
const ELSEWHERE: u8 = 3;

impl Nearness {
    /// None where nothing is preferred, or nothing is known of where this gateway is.
    pub fn compile(wire: &Locality, place: &Arc<Place>) -> Option<Self> {
        let known = match wire.prefer {
            Near::Machine => &place.machine,
            Near::Zone => &place.zone,
            Near::Region => &place.region,
            Near::None => return None,
        };
        known.as_ref()?;
        let min_local = u8::try_from(wire.min_local.get()).unwrap_or(100);
        Some(Self { place: Arc::clone(place), near: wire.prefer, min_local })
    }

    /// How far an endpoint is: less is nearer.
    fn distance(&self, details: Option<&Details>) -> u8 {
        let Some(details) = details else { return ELSEWHERE };
        let same = |own: &Option<String>, of: &Option<Arc<str>>| match (own, of) {
            (Some(own), Some(of)) => **own == **of,
            _ => false,
        };
        // Zones of two regions may have the same name.
        let other_region = match (&self.place.region, &details.region) {
            (Some(own), Some(of)) => **own != **of,
            _ => false,
        };
        let zone = if details.for_zones.is_empty() {
            same(&self.place.zone, &details.zone) && !other_region
        } else {
            self.place.zone.as_deref().is_some_and(|own| details.for_zones.iter().any(|zone| **zone == *own))
        };
        match self.near {
            Near::Machine if same(&self.place.machine, &details.machine) && !other_region => 0,
            Near::Machine | Near::Zone if zone => 1,
            Near::None => ELSEWHERE,
            _ if same(&self.place.region, &details.region) => 2,
            _ => ELSEWHERE,
        }
    }

    /// The usable ones of these endpoints in groups, the nearest first.
    pub(crate) fn groups<'a>(&self, peers: &[&'a Peer]) -> Vec<Vec<&'a Peer>> {
        let mut by_distance: [Vec<&'a Peer>; ELSEWHERE as usize + 1] = Default::default();
        for peer in peers {
            let distance = usize::from(self.distance(peer.details.as_deref()));
            if let Some(group) = by_distance.get_mut(distance) {
                group.push(peer);
            }
        }
        let mut groups: Vec<Vec<&'a Peer>> = Vec::new();
        let (mut group, mut all) = (Vec::new(), 0);
        for near in by_distance {
            all += near.len();
            group.extend(near.into_iter().filter(|peer| peer.usable()));
            if !group.is_empty() && group.len() * 100 >= all * usize::from(self.min_local) {
                groups.push(std::mem::take(&mut group));
                all = 0;
            }
        }
        // What is left is too unhealthy for a group of its own, and still the last resort.
        if !group.is_empty() {
            groups.push(group);
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::super::health::{Limits, Report, Source};
    use super::super::picker::tests::peers;
    use super::*;

    fn place(region: &str, zone: &str, machine: &str) -> Arc<Place> {
        let some = |name: &str| (!name.is_empty()).then(|| name.to_owned());
        Arc::new(Place { region: some(region), zone: some(zone), machine: some(machine) })
    }

    fn nearness(place: &Arc<Place>, near: Near, min_local: u32) -> Option<Nearness> {
        let wire = serde_json::json!({"prefer": near, "min_local": min_local});
        Nearness::compile(&serde_json::from_value(wire).unwrap(), place)
    }

    /// `region/zone/machine`, with `!` before one that is sick, `@zone` for one that serves a zone.
    fn peer(written: &str) -> Peer {
        let mut peer = peers(&[1]).remove(0);
        let (sick, written) = written.strip_prefix('!').map_or((false, written), |rest| (true, rest));
        if sick {
            let limits = Limits { successes: 1, http_failures: 1, tcp_failures: 1, timeouts: 1 };
            peer.state.health.report(Source::Active, Report::TcpFailure, &limits);
        }
        let mut details = Details::default();
        if let Some(zone) = written.strip_prefix('@') {
            details.for_zones.push(zone.into());
        } else {
            let mut parts = written.split('/').map(|part| (!part.is_empty()).then(|| Arc::from(part)));
            details.region = parts.next().flatten();
            details.zone = parts.next().flatten();
            details.machine = parts.next().flatten();
        }
        peer.details = Some(Arc::new(details));
        peer
    }

    #[test]
    fn near_ones_come_first_while_enough_of_them_is_healthy() {
        use Near::{Machine, Region, Zone};
        let here = place("eu", "a", "m1");
        let cases: &[(Near, u32, &str, &str, &str)] = &[
            (Zone, 50, "eu/a/m1 eu/b/m2 us/a/m3", "0 | 1 | 2", "zone, region, the rest"),
            (Machine, 50, "eu/b/m2 eu/a/m9 eu/a/m1 us/c/m3", "2 | 1 | 0 | 3", "the machine before the zone"),
            (Region, 50, "us/a/m1 eu/b/m2 eu/a/m1", "1 2 | 0", "within the region all are as good"),
            (Zone, 50, "us/b/x us/c/y", "0 1", "nothing is near"),
            (
                Zone,
                50,
                "eu/a/x !eu/a/y !eu/a/z eu/b/x us/c/x",
                "0 3 | 4",
                "a third of the zone is too little",
            ),
            (Zone, 30, "eu/a/x !eu/a/y !eu/a/z eu/b/x us/c/x", "0 | 3 | 4", "unless a third will do"),
            (Zone, 50, "!eu/a/x eu/b/x", "1", "nothing usable is near"),
            (Zone, 0, "!eu/a/x eu/b/x", "1", "and then a limit of nothing does not help"),
            (Zone, 100, "eu/a/x !eu/b/x us/c/x !us/c/y", "0 | 2", "the last ones need not be enough"),
            (Zone, 50, "@a @b eu/a/x", "0 2 | 1", "the registry says which zones are served"),
            (Zone, 50, "/a/x eu/a/y", "0 1", "a zone without a region is a zone"),
        ];
        for (near, min_local, written, groups, case) in cases {
            let peers: Vec<_> = written.split(' ').map(peer).collect();
            let list: Vec<&Peer> = peers.iter().collect();
            let found = nearness(&here, *near, *min_local).unwrap().groups(&list);
            let index =
                |peer: &Peer| peers.iter().position(|other| other.state.id() == peer.state.id()).unwrap();
            let found: Vec<_> = found
                .iter()
                .map(|group| group.iter().map(|peer| index(peer).to_string()).collect::<Vec<_>>().join(" "))
                .collect();
            assert_eq!(found.join(" | "), *groups, "{case}");
        }
    }

    #[test]
    fn where_nothing_is_known_of_this_gateway_nothing_is_near() {
        for (place, near, prefers) in [
            (place("", "a", ""), Near::Zone, true),
            (place("eu", "", ""), Near::Zone, false),
            (place("eu", "", ""), Near::Region, true),
            (place("eu", "a", ""), Near::Machine, false),
            (place("eu", "a", "m"), Near::None, false),
        ] {
            assert_eq!(nearness(&place, near, 50).is_some(), prefers, "{place:?} {near:?}");
        }
    }
}
