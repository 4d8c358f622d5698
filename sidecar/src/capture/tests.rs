#![allow(clippy::unwrap_used, reason = "tests")]

use config::capture::Capture;
use serde_json::{Value, json};

use super::*;

fn capture(settings: Value) -> Capture {
    serde_json::from_value(settings).unwrap()
}

#[test]
fn the_ruleset_for_redirection() {
    let all = capture(json!({
        "uid": 2102, "mark": "0x505",
        "skip_inbound_ports": [22, "9000-9005", "9006-9010"], "skip_inbound_cidrs": ["10.1.0.0/16", "fd01::/16"],
        "skip_outbound_ports": [5432, 25], "skip_outbound_cidrs": ["10.0.0.0/9", "10.128.0.0/9", "fd00::/8", "192.0.2.7/32"],
    }));
    assert_eq!(print_nft(&all), include_str!("golden/redirect.nft"));
    assert_eq!(print_iptables(&all).unwrap(), include_str!("golden/redirect.iptables"));
}

#[test]
fn the_ruleset_when_nothing_is_said() {
    assert_eq!(print_nft(&Capture::default()), include_str!("golden/default.nft"));
}

#[test]
fn the_ruleset_for_tproxy() {
    let tproxy = capture(json!({ "mode": "tproxy", "mark": "0x505" }));
    assert_eq!(print_nft(&tproxy), include_str!("golden/tproxy.nft"));
    assert!(matches!(print_iptables(&tproxy), Err(CaptureError::OnlyNft)));
}

#[test]
fn more_ports_than_a_rule_of_iptables_takes_are_several_rules() {
    let ports: Vec<u16> = (0..20).map(|number| 1000 + 2 * number).collect();
    let many = capture(json!({ "skip_outbound_ports": ports }));
    let text = print_iptables(&many).unwrap();
    let rules: Vec<usize> = text
        .lines()
        .filter_map(|line| line.split_once("--dports "))
        .map(|(_, ports)| ports.split(',').count())
        .collect();
    assert!(rules.iter().all(|count| *count <= 15), "{text}");
    assert_eq!(text.matches("1038").count(), 2, "{text}");
}

#[test]
fn all_addresses_are_no_condition_to_iptables() {
    let all = capture(json!({ "skip_outbound_cidrs": ["0.0.0.0/0"] }));
    let text = print_iptables(&all).unwrap();
    let (v4, v6) = text.split_once("# ip6tables").unwrap();
    assert!(v4.contains("-A POSTERN_OUTBOUND -j RETURN\n"), "{v4}");
    assert!(!v6.contains("-A POSTERN_OUTBOUND -j RETURN\n"), "{v6}");
}

#[test]
fn what_is_missing_too_much_or_moved_is_named() {
    let lines = |all: &[&str]| all.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    for (should, stands, told) in [
        (vec!["a", "b"], vec!["a", "b"], vec![]),
        (vec!["a", "b"], vec!["a"], vec!["here: `b` is missing"]),
        (vec!["a"], vec!["a", "a"], vec!["here: `a` does not belong there"]),
        (vec!["a", "b"], vec!["b", "a"], vec!["here: the rules are in another order"]),
        (vec!["a"], vec!["c"], vec!["here: `a` is missing", "here: `c` does not belong there"]),
    ] {
        assert_eq!(
            compare_lines("here", &lines(&should), &lines(&stands)),
            lines(&told),
            "{should:?} {stands:?}"
        );
    }
}
