//! Tables of parts and of what becomes of them.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::time::SystemTime;

use super::*;
use crate::follow::Held;
use crate::source::{Instance, Query};
use crate::target::Part;

/// `1` is an instance at 10.0.0.1; `1*5` has the weight 5, `1/-1` the priority -1, `1!` is unhealthy, `1~` draining,
/// `1@a` says that it is `a`.
fn instance(text: &str) -> Instance {
    let number: String = text.chars().take_while(char::is_ascii_digit).collect();
    let after = |mark: char| {
        let rest = text.split_once(mark)?.1;
        let end = rest.find(['*', '/', '!', '~', '@']).unwrap_or(rest.len());
        Some(rest[..end].to_owned())
    };
    let health = match text {
        _ if text.contains('!') => Health::Unhealthy,
        _ if text.contains('~') => Health::Draining,
        _ => Health::Healthy,
    };
    let identity = after('@').map(|identity| identity.as_str().into());
    Instance {
        id: text.into(),
        node: Node {
            host: format!("10.0.0.{number}").into(),
            port: 80,
            weight: after('*').map_or(1, |weight| weight.parse().unwrap()),
            priority: after('/').map_or(0, |priority| priority.parse().unwrap()),
        },
        health,
        details: identity
            .map(|identity| Arc::new(Details { identity: Some(identity), ..Details::default() })),
    }
}

fn followed(text: &str) -> Followed {
    let held = |text: &str| Held::new(instance(text), SystemTime::UNIX_EPOCH);
    if text == "?" {
        return Followed::default();
    }
    let instances = text.split_whitespace().map(held).collect();
    Followed { instances, freshness: Freshness::Fresh, ..Followed::default() }
}

/// The endpoints in the form of `instance`, refused ones in brackets.
fn shown(merged: &Merged) -> String {
    let one = |(place, endpoint): (usize, &Endpoint)| {
        let last = endpoint.addr.to_string();
        let mut text = last.trim_start_matches("10.0.0.").trim_end_matches(":80").to_owned();
        if endpoint.weight != 1 {
            text.push_str(&format!("*{}", endpoint.weight));
        }
        if endpoint.priority != 0 {
            text.push_str(&format!("/{}", endpoint.priority));
        }
        text.push_str(match endpoint.health {
            Health::Unhealthy => "!",
            Health::Draining => "~",
            _ => "",
        });
        if let Some(identity) = identity(endpoint) {
            text.push_str(&format!("@{identity}"));
        }
        if merged.refused.contains_key(&place) { format!("({text})") } else { text }
    };
    merged.list.iter().enumerate().map(one).collect::<Vec<_>>().join(" ")
}

fn target(merge: Merge, shares: &[Option<u32>]) -> Target {
    let query = Query { service: "s".into(), args: Default::default() };
    let part = |share: &Option<u32>| Part { share: *share, ..Part::service("fake", query.clone()) };
    Target { merge, ..Target::of("upstreams/1", shares.iter().map(part).collect()) }
}

/// One string for each part; registries of one part are apart by `|`.
fn run(merge: Merge, parts: &[&str], shares: &[Option<u32>]) -> String {
    let states: Vec<(usize, Followed)> = parts
        .iter()
        .enumerate()
        .flat_map(|(part, text)| text.split('|').map(move |one| (part, followed(one))))
        .collect();
    let name: Arc<str> = "fake/s".into();
    let pieces: Vec<Piece<'_>> = states
        .iter()
        .map(|(part, followed)| Piece { part: *part, items: Items::Service { name: &name, followed } })
        .collect();
    let shares = if shares.is_empty() { vec![None; parts.len()] } else { shares.to_vec() };
    let merged = self::merge(&target(merge, &shares), &pieces, &Names::new(), Instant::now());
    shown(&merged)
}

#[test]
fn parts_go_together() {
    use Merge::{Intersect, Prefer, Union};
    for (merge, parts, wanted) in [
        (Union, vec!["1 2", "3"], "1 2 3"),
        (Union, vec!["1 2|2 3"], "1 2 3"),
        (Union, vec!["1 2", "2*5 3"], "1 2 3"),
        (Union, vec!["1 1*2"], "1"),
        // The best health counts, and the weight that goes with it.
        (Union, vec!["1!*2 2~", "1*7 2!"], "1*7 2~"),
        (Union, vec!["1/-1", "1"], "1"),
        (Union, vec!["?", "1"], "1"),
        (Prefer, vec!["1 2/-1", "3 1", "4/1"], "1 2/-1 3/-20000 4/-39999"),
        (Prefer, vec!["1!", "1"], "1"),
        (Prefer, vec!["1/99999", "2/99999"], "1/9999 2/-10001"),
        (Intersect, vec!["1 2", "2 3"], "(1) 2 (3)"),
        (Intersect, vec!["1 2!", "1~ 2"], "1~ 2!"),
        // What has not answered takes nothing out; what says that there is nothing does.
        (Intersect, vec!["1 2", "?"], "1 2"),
        (Intersect, vec!["1 2", ""], "(1) (2)"),
        (Intersect, vec!["1|2", "1 2"], "1 2"),
        // Who it is must not be disputed.
        (Union, vec!["1@a 2", "1@a 2@b"], "1@a 2@b"),
        (Union, vec!["1@a 2", "1@b 2"], "(1@a) 2"),
    ] {
        assert_eq!(run(merge, &parts, &[]), wanted, "{merge:?} {parts:?}");
    }
}

#[test]
fn shares_are_shares_whatever_the_weights() {
    for (parts, shares, wanted) in [
        (vec!["1 2", "3"], [Some(50), Some(50)], "1*25000 2*25000 3*50000"),
        (vec!["1*3 2", "3*100"], [Some(80), Some(20)], "1*60000 2*20000 3*20000"),
        (vec!["1", "2"], [Some(100), Some(0)], "1*100000 2*0"),
        // A part without anything that can be used leaves its share to the others.
        (vec!["1", ""], [Some(10), Some(90)], "1*100000"),
        (vec!["1", "2!"], [Some(10), Some(90)], "1*100000 2*0!"),
        // What both list has a share of both.
        (vec!["1 2", "2"], [Some(50), Some(50)], "1*25000 2*75000"),
        (vec!["1", "2"], [Some(25), None], "1*20000 2*80000"),
    ] {
        assert_eq!(run(Merge::Union, &parts, &shares), wanted, "{parts:?} {shares:?}");
    }
}

#[test]
fn names_are_resolved_and_their_addresses_share_a_weight() {
    let node = |host: &str, weight| Node { host: host.into(), port: 80, weight, priority: 0 };
    let nodes = [node("a.test", 4), node("10.0.0.1", 2), node("b.test", 1), node("new.test", 1)];
    let resolved = |addrs: &[&str], failure: Option<&str>| Resolved {
        addrs: addrs.iter().map(|addr| addr.parse().unwrap()).collect(),
        pending: false,
        failure: failure.map(Into::into),
    };
    let names = Names::from([
        ("a.test".into(), resolved(&["10.0.0.2", "10.0.0.1"], None)),
        ("b.test".into(), resolved(&["10.0.0.3"], Some("SERVFAIL"))),
    ]);
    let pieces = [Piece { part: 0, items: Items::Nodes(&nodes) }];
    let target = Target::nodes("upstreams/1", nodes.to_vec());
    let merged = self::merge(&target, &pieces, &names, Instant::now());
    let list: Vec<_> =
        merged.list.iter().map(|one| (one.addr.to_string(), one.weight, one.siblings)).collect();
    assert_eq!(
        list,
        [
            ("10.0.0.2:80".to_owned(), 4, 2),
            ("10.0.0.1:80".to_owned(), 4, 2),
            ("10.0.0.3:80".to_owned(), 1, 1)
        ]
    );
    assert_eq!((merged.pending, merged.failures.len(), merged.failures[0].stale), (1, 1, true));
}
