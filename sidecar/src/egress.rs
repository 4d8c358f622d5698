//! Where an application may go outside of the mesh: by the name it asks for and the address it ends at.
//!
//! A rule that denies wins over one that allows, and the default decides what no rule is about. A name is what the
//! application says (`Host`, `CONNECT`, SOCKS, the server name of TLS), so this keeps well-behaved applications on their
//! way; it is no wall against one that lies. Rules with networks as well as names are nearer to that.

use std::net::IpAddr;
use std::sync::Arc;

use config::mesh::{Action, Egress, EgressRule, Fallback};
use ipnet::IpNet;

use crate::matcher::HostTest;

/// Where a connection goes.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'a> {
    /// The name that was asked for, in lower case and without port, if one is known.
    pub name: Option<&'a str>,
    /// The address, where it is known already.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: u16,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EgressDecision {
    /// It may pass.
    pub allowed: bool,
    /// The rule that decided, by its number; the default where there is none.
    pub rule: Option<usize>,
    /// It passes, and would not without an audit: the rule, or the default.
    pub audited: Option<Option<usize>>,
}

#[derive(Debug)]
struct Rule {
    name: Arc<str>,
    action: Action,
    hosts: Option<Box<[HostTest]>>,
    nets: Option<Box<[IpNet]>>,
    ports: Option<Box<[u32]>>,
}

impl Rule {
    fn new(rule: &EgressRule) -> Self {
        Self {
            name: (*rule.name).into(),
            action: rule.action,
            hosts: rule.hosts.as_ref().map(|hosts| hosts.iter().map(HostTest::new).collect()),
            nets: rule.cidrs.as_ref().map(|cidrs| cidrs.iter().map(|cidr| cidr.net()).collect()),
            ports: rule.ports.as_ref().map(|ports| ports.iter().map(|port| port.get()).collect()),
        }
    }

    fn holds(&self, to: &Destination<'_>) -> bool {
        let named =
            |hosts: &[HostTest]| to.name.is_some_and(|name| hosts.iter().any(|host| host.holds(name)));
        let within = |nets: &[IpNet]| {
            to.address.is_some_and(|address| nets.iter().any(|net| net.contains(&address.to_canonical())))
        };
        self.hosts.as_deref().is_none_or(named)
            && self.nets.as_deref().is_none_or(within)
            && self.ports.as_ref().is_none_or(|ports| ports.contains(&to.port.into()))
    }
}

/// The rules of one sidecar.
#[derive(Debug, Default)]
pub struct EgressMatcher {
    rules: Box<[Rule]>,
    default: Fallback,
    by_address: bool,
}

impl EgressMatcher {
    /// Compiles them; everything is allowed without any.
    pub fn new(egress: Option<&Egress>) -> Self {
        let rules: Box<[Rule]> = egress.iter().flat_map(|egress| &egress.rules).map(Rule::new).collect();
        Self {
            by_address: rules.iter().any(|rule| rule.nets.is_some()),
            rules,
            default: egress.map(|egress| egress.default).unwrap_or_default(),
        }
    }

    /// Whether the address has to be known to decide: a name is resolved before it is asked about, and the address
    /// that was judged is the one to connect to.
    pub fn needs_address(&self) -> bool {
        self.by_address
    }

    /// What becomes of what no rule is about.
    pub fn fallback(&self) -> Fallback {
        self.default
    }

    /// Names of the rules, in order.
    pub fn names(&self) -> impl Iterator<Item = (&Arc<str>, Action)> {
        self.rules.iter().map(|rule| (&rule.name, rule.action))
    }

    /// The name of a rule.
    pub fn name(&self, rule: usize) -> Option<&Arc<str>> {
        self.rules.get(rule).map(|rule| &rule.name)
    }

    /// Decides.
    pub fn decide(&self, to: &Destination<'_>) -> EgressDecision {
        let (mut allow, mut audit) = (None, None);
        for (index, rule) in self.rules.iter().enumerate() {
            match rule.action {
                Action::Deny if rule.holds(to) => {
                    return EgressDecision { allowed: false, rule: Some(index), audited: None };
                }
                Action::Allow if allow.is_none() && rule.holds(to) => allow = Some(index),
                Action::Audit if audit.is_none() && rule.holds(to) => audit = Some(Some(index)),
                _ => {}
            }
        }
        if allow.is_some() {
            return EgressDecision { allowed: true, rule: allow, audited: audit };
        }
        match self.default {
            Fallback::Deny => EgressDecision { allowed: false, rule: None, audited: None },
            Fallback::Allow => EgressDecision { allowed: true, rule: None, audited: audit },
            Fallback::Audit => EgressDecision { allowed: true, rule: None, audited: audit.or(Some(None)) },
        }
    }

    /// What decided, in words.
    pub fn tell(&self, rule: Option<usize>) -> String {
        match rule.and_then(|rule| self.name(rule)) {
            Some(name) => format!("egress rule {name}"),
            None => "the default of egress".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn matcher(egress: Value) -> EgressMatcher {
        EgressMatcher::new(Some(&config::typed::parse::<Egress>(&egress).unwrap()))
    }

    fn to<'a>(name: &'a str, address: &str, port: u16) -> Destination<'a> {
        Destination {
            name: (!name.is_empty()).then_some(name),
            address: (!address.is_empty()).then(|| address.parse().unwrap()),
            port,
        }
    }

    #[test]
    fn names_networks_and_ports_decide_and_denials_win() {
        let matcher = matcher(json!({"default": "deny", "rules": [
            {"name": "web", "action": "allow", "hosts": ["api.example.com", "*.Internal.example"], "ports": [443]},
            {"name": "lan", "action": "allow", "cidrs": ["10.0.0.0/8", "fd00::/8"]},
            {"name": "meta", "action": "deny", "cidrs": ["169.254.0.0/16", "10.9.0.0/16"]},
            {"name": "old", "action": "deny", "hosts": ["old.internal.example"]},
            {"name": "both", "action": "allow", "hosts": ["db.example"], "cidrs": ["192.0.2.0/24"]},
        ]}));
        let cases = [
            ("the name", "api.example.com", "", 443, true, Some(0)),
            ("another port", "api.example.com", "", 80, false, None),
            ("below the star", "a.b.internal.example", "", 443, true, Some(0)),
            ("the star stands for something", "internal.example", "", 443, false, None),
            ("a name that ends alike", "evilinternal.example", "", 443, false, None),
            ("a network", "", "10.1.2.3", 5432, true, Some(1)),
            ("a network of IPv6", "", "fd12::1", 5432, true, Some(1)),
            ("an IPv4 address as IPv6", "", "::ffff:10.1.2.3", 5432, true, Some(1)),
            ("a denied part of it", "", "10.9.1.1", 5432, false, Some(2)),
            (
                "a denied network under an allowed name",
                "api.example.com",
                "169.254.169.254",
                443,
                false,
                Some(2),
            ),
            ("a denied name", "old.internal.example", "10.1.1.1", 443, false, Some(3)),
            ("name and network", "db.example", "192.0.2.7", 1, true, Some(4)),
            ("the name at another address", "db.example", "198.51.100.7", 1, false, None),
            ("the address under another name", "x.example", "192.0.2.7", 1, false, None),
            ("nothing known", "", "", 443, false, None),
        ];
        assert!(matcher.needs_address());
        for (what, name, address, port, allowed, rule) in cases {
            let decision = matcher.decide(&to(name, address, port));
            assert_eq!((decision.allowed, decision.rule), (allowed, rule), "{what}");
        }
    }

    #[test]
    fn audits_decide_nothing() {
        let rules = json!([
            {"name": "watch", "action": "audit", "hosts": ["*.example"]},
            {"name": "ok", "action": "allow", "hosts": ["a.example", "b.test"]},
        ]);
        for (default, name, allowed, audited) in [
            ("allow", "a.example", true, Some(Some(0))),
            ("allow", "b.test", true, None),
            ("allow", "c.test", true, None),
            ("deny", "a.example", true, Some(Some(0))),
            ("deny", "x.example", false, None),
            ("audit", "c.test", true, Some(None)),
            ("audit", "b.test", true, None),
            ("audit", "x.example", true, Some(Some(0))),
        ] {
            let matcher = matcher(json!({"default": default, "rules": rules}));
            let decision = matcher.decide(&to(name, "", 443));
            assert_eq!((decision.allowed, decision.audited), (allowed, audited), "{default} {name}");
        }
    }

    #[test]
    fn without_rules_everything_passes() {
        assert!(EgressMatcher::new(None).decide(&to("a", "1.1.1.1", 1)).allowed);
        assert!(!EgressMatcher::new(None).needs_address());
    }
}
