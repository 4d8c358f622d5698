//! Authorization policies, compiled: who may ask what.
//!
//! Any rule that denies refuses; else, where policies that allow are about the port, one of their rules has to match; else
//! the default decides. Rules that audit decide nothing. On bytes that nobody understands, a rule that asks for what only
//! HTTP has denies as if that held, and allows nothing. One pass, no allocation; rules for single identities are found by
//! the caller's, so a thousand of them cost as much as those of one caller.

use std::net::IpAddr;
use std::sync::Arc;

use config::Expr;
use config::fields::{Cidr, Distinct, Host};
use config::mesh::{
    Action, Authorization, Fallback, IdentityPattern, MethodName, Operation, PathPattern, Policies, Port,
    Segment, Source, namespace,
};
use config::var::Vars;
use hashbrown::HashMap;
use ipnet::IpNet;

/// What is known of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    identity: Option<&'a str>,
    namespace: Option<&'a str>,
    address: IpAddr,
    port: u16,
}

impl<'a> Caller<'a> {
    /// Who has shown `identity`, from `address`, and wants the application's `port`.
    pub fn new(identity: Option<&'a str>, address: IpAddr, port: u16) -> Self {
        let namespace = identity.and_then(namespace);
        Self { identity, namespace, address: address.to_canonical(), port }
    }

    /// The identity.
    pub fn identity(&self) -> Option<&'a str> {
        self.identity
    }
}

/// What is known of a request.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// The method.
    pub method: &'a str,
    /// The path, decoded and normal.
    pub path: &'a str,
    /// The host, in lower case and without port.
    pub host: &'a str,
    /// Its variables; nothing where they are not kept, and a condition on them is unknown.
    pub vars: Option<&'a dyn Vars>,
}

/// What goes over the connection.
#[derive(Clone, Copy)]
pub enum What<'a> {
    /// This request.
    Request(Asked<'a>),
    /// Bytes that nobody understands.
    Bytes,
    /// Requests, each of which will be asked about: what is refused now is refused whatever they are.
    Requests,
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// A rule: the number of the policy, and of the rule in it.
    Rule(usize, usize),
    /// There are policies that allow, and none of their rules matches.
    NoneAllows,
    /// No policy is about it.
    Default,
}

/// Whether it may pass, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// It may.
    pub allowed: bool,
    /// Because of this.
    pub by: By,
    /// It may, and this would have refused it.
    pub audited: Option<By>,
}

/// What is told of a policy.
#[derive(Clone, Debug)]
pub struct Named {
    /// Its name.
    pub name: Arc<str>,
    /// What it does.
    pub action: Action,
    ports: Option<Box<[u16]>>,
}

impl Named {
    fn is_about(&self, port: u16) -> bool {
        self.ports.as_ref().is_none_or(|ports| ports.contains(&port))
    }
}

/// All policies of one sidecar.
#[derive(Debug)]
pub struct Matcher {
    policies: Box<[Named]>,
    deny: Rules,
    allow: Rules,
    audit: Rules,
    default: Fallback,
    reads_claims: bool,
    /// Ports that policies which allow are about; nothing where one is about all.
    allowed_ports: Option<Box<[u16]>>,
}

/// The rules of all policies that do the same, in their order.
#[derive(Debug, Default)]
struct Rules {
    rules: Box<[Rule]>,
    /// Rules that nobody but single identities can match, by these.
    by_identity: HashMap<Box<str>, Vec<u32>>,
    /// The others.
    others: Vec<u32>,
}

#[derive(Debug)]
struct Rule {
    policy: u32,
    number: u32,
    from: Box<[FromTest]>,
    to: Box<[ToTest]>,
    when: Option<Expr>,
}

#[derive(Debug)]
struct FromTest {
    identities: Option<Box<[IdentityPattern]>>,
    not_identities: Box<[IdentityPattern]>,
    namespaces: Option<Box<[Segment]>>,
    not_namespaces: Box<[Segment]>,
    nets: Option<Box<[IpNet]>>,
    not_nets: Box<[IpNet]>,
}

#[derive(Debug)]
struct ToTest {
    /// Asks for what only requests have.
    of_requests: bool,
    methods: Option<Box<[MethodName]>>,
    not_methods: Box<[MethodName]>,
    paths: Option<Box<[PathPattern]>>,
    not_paths: Box<[PathPattern]>,
    hosts: Option<Box<[HostTest]>>,
    not_hosts: Box<[HostTest]>,
    ports: Option<Box<[u16]>>,
    not_ports: Box<[u16]>,
}

/// A host, or all that end so.
#[derive(Clone, Debug)]
pub(crate) enum HostTest {
    Exact(Box<str>),
    Ends(Box<str>),
}

impl HostTest {
    pub(crate) fn new(host: &Host) -> Self {
        let host = host.to_ascii_lowercase();
        let host = host.strip_suffix('.').unwrap_or(&host);
        match host.strip_prefix('*') {
            Some(end) => Self::Ends(end.into()),
            None => Self::Exact(host.into()),
        }
    }

    /// `host` is in lower case.
    pub(crate) fn holds(&self, host: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *host,
            // The star stands for something.
            Self::Ends(end) => host.len() > end.len() && host.ends_with(&**end),
        }
    }
}

fn only<T: Clone, const MIN: usize, U>(
    list: Option<&config::fields::List<T, MIN, true>>,
    compile: impl Fn(&T) -> U,
) -> Option<Box<[U]>> {
    list.map(|list| list.iter().map(compile).collect())
}

fn not<T: Clone, U>(list: Option<&Distinct<T>>, compile: impl Fn(&T) -> U) -> Box<[U]> {
    only(list, compile).unwrap_or_default()
}

#[expect(clippy::cast_possible_truncation, reason = "the type says 1 to 65535")]
fn number(port: &Port) -> u16 {
    port.get() as u16
}

impl FromTest {
    fn new(source: &Source) -> Self {
        let Source { identities, not_identities, namespaces, not_namespaces, cidrs, not_cidrs } = source;
        Self {
            identities: only(identities.as_ref(), Clone::clone),
            not_identities: not(not_identities.as_ref(), Clone::clone),
            namespaces: only(namespaces.as_ref(), Clone::clone),
            not_namespaces: not(not_namespaces.as_ref(), Clone::clone),
            nets: only(cidrs.as_ref(), Cidr::net),
            not_nets: not(not_cidrs.as_ref(), Cidr::net),
        }
    }

    fn holds(&self, caller: &Caller<'_>) -> bool {
        let is = |patterns: &[IdentityPattern]| {
            caller.identity.is_some_and(|own| patterns.iter().any(|pattern| pattern.matches(own)))
        };
        let of =
            |names: &[Segment]| caller.namespace.is_some_and(|own| names.iter().any(|name| **name == *own));
        let within = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&caller.address));
        self.identities.as_deref().is_none_or(is)
            && self.namespaces.as_deref().is_none_or(of)
            && self.nets.as_deref().is_none_or(within)
            && !is(&self.not_identities)
            && !of(&self.not_namespaces)
            && !within(&self.not_nets)
    }

    /// The identities without which it does not hold, where they are single ones.
    fn single(&self) -> Option<&[IdentityPattern]> {
        self.identities.as_deref().filter(|patterns| patterns.iter().all(IdentityPattern::is_exact))
    }
}

impl ToTest {
    fn new(operation: &Operation) -> Self {
        Self {
            of_requests: operation.is_of_requests(),
            methods: only(operation.methods.as_ref(), Clone::clone),
            not_methods: not(operation.not_methods.as_ref(), Clone::clone),
            paths: only(operation.paths.as_ref(), Clone::clone),
            not_paths: not(operation.not_paths.as_ref(), Clone::clone),
            hosts: only(operation.hosts.as_ref(), HostTest::new),
            not_hosts: not(operation.not_hosts.as_ref(), HostTest::new),
            ports: only(operation.ports.as_ref(), number),
            not_ports: not(operation.not_ports.as_ref(), number),
        }
    }

    fn holds(&self, port: u16, what: &What<'_>, unknown: bool) -> bool {
        if self.ports.as_ref().is_some_and(|ports| !ports.contains(&port)) || self.not_ports.contains(&port) {
            return false;
        }
        if !self.of_requests {
            return true;
        }
        let What::Request(asked) = what else { return unknown };
        let method = |methods: &[MethodName]| methods.iter().any(|method| **method == *asked.method);
        let path = |paths: &[PathPattern]| paths.iter().any(|path| path.matches(asked.path));
        let host = |hosts: &[HostTest]| hosts.iter().any(|host| host.holds(asked.host));
        self.methods.as_deref().is_none_or(method)
            && self.paths.as_deref().is_none_or(path)
            && self.hosts.as_deref().is_none_or(host)
            && !method(&self.not_methods)
            && !path(&self.not_paths)
            && !host(&self.not_hosts)
    }
}

impl Rule {
    /// `unknown` stands for conditions that cannot be looked at.
    fn holds(&self, caller: &Caller<'_>, what: &What<'_>, unknown: bool) -> bool {
        (self.from.is_empty() || self.from.iter().any(|from| from.holds(caller)))
            && (self.to.is_empty() || self.to.iter().any(|to| to.holds(caller.port, what, unknown)))
            && self.when.as_ref().is_none_or(|when| match what {
                What::Request(Asked { vars: Some(vars), .. }) => when.eval(*vars),
                // Kept facts of a request say nothing of its fields.
                What::Request(_) | What::Bytes | What::Requests => unknown,
            })
    }
}

impl Rules {
    fn new(rules: Vec<Rule>) -> Self {
        let mut by_identity: HashMap<Box<str>, Vec<u32>> = HashMap::new();
        let mut others = Vec::new();
        for (index, rule) in (0..).zip(&rules) {
            let single: Option<Vec<_>> = rule.from.iter().map(FromTest::single).collect();
            match single.filter(|all| !all.is_empty()) {
                None => others.push(index),
                Some(all) => {
                    for identity in all.into_iter().flatten() {
                        let found = by_identity.entry((**identity).into()).or_default();
                        if found.last() != Some(&index) {
                            found.push(index);
                        }
                    }
                }
            }
        }
        Self { rules: rules.into(), by_identity, others }
    }

    /// The first rule that holds, whichever list it is in.
    fn find(&self, policies: &[Named], caller: &Caller<'_>, what: &What<'_>, unknown: bool) -> Option<By> {
        if self.rules.is_empty() {
            return None;
        }
        let own = caller.identity.and_then(|identity| self.by_identity.get(identity));
        let mut own = own.map_or(&[][..], Vec::as_slice).iter().peekable();
        let mut others = self.others.iter().peekable();
        loop {
            let index = match (own.peek(), others.peek()) {
                (Some(a), Some(b)) if a < b => own.next(),
                (_, Some(_)) => others.next(),
                (Some(_), None) => own.next(),
                (None, None) => return None,
            }?;
            let rule = self.rules.get(*index as usize)?;
            let about = policies.get(rule.policy as usize).is_some_and(|policy| policy.is_about(caller.port));
            if about && rule.holds(caller, what, unknown) {
                return Some(By::Rule(rule.policy as usize, rule.number as usize));
            }
        }
    }
}

impl Matcher {
    /// Compiles what is about these services. Policies have been checked; one whose expression cannot be read all the
    /// same refuses everything it could be about.
    pub fn new(policies: &Policies, services: &[&str]) -> Self {
        let about = |policy: &&Authorization| {
            let named = |own: &Distinct<_>| {
                own.iter().any(|name: &config::fields::Text<1, 256>| services.contains(&&**name))
            };
            policy.services.as_ref().is_none_or(named)
        };
        let mut named = Vec::new();
        let mut lists: [Vec<Rule>; 3] = Default::default();
        let mut reads_claims = false;
        for (index, policy) in (0..).zip(policies.authorization.iter().filter(about)) {
            let ports = only(policy.ports.as_ref(), number);
            named.push(Named { name: (*policy.name).into(), action: policy.action, ports });
            let [deny, allow, audit] = &mut lists;
            let list = match policy.action {
                Action::Deny => deny,
                Action::Allow => allow,
                Action::Audit => audit,
            };
            for (number, rule) in (0..).zip(&policy.rules) {
                let when = match rule.when.as_ref().map(Expr::parse).transpose() {
                    Ok(when) => when,
                    Err(error) => {
                        tracing::error!(policy = %policy.name, rule = number, %error, "left out");
                        // A condition that is not understood may not open anything, nor keep a refusal from refusing.
                        if policy.action == Action::Allow {
                            continue;
                        }
                        None
                    }
                };
                reads_claims |= when.as_ref().is_some_and(|when| {
                    when.vars().iter().any(|var| var.to_string().starts_with(config::mesh::CLAIM))
                });
                list.push(Rule {
                    policy: index,
                    number,
                    from: rule.from.iter().flatten().map(FromTest::new).collect(),
                    to: rule.to.iter().flatten().map(ToTest::new).collect(),
                    when,
                });
            }
        }
        let [deny, allow, audit] = lists.map(Rules::new);
        let allowing = named.iter().filter(|policy| policy.action == Action::Allow);
        let allowed_ports: Option<Vec<Box<[u16]>>> = allowing.map(|policy| policy.ports.clone()).collect();
        let allowed_ports = allowed_ports.map(|all| {
            let mut ports = all.concat();
            ports.sort_unstable();
            ports.dedup();
            ports.into()
        });
        Self {
            policies: named.into(),
            deny,
            allow,
            audit,
            default: policies.default,
            reads_claims,
            allowed_ports,
        }
    }

    /// What is told of the policies.
    pub fn policies(&self) -> &[Named] {
        &self.policies
    }

    /// What becomes of what no policy is about.
    pub fn fallback(&self) -> Fallback {
        self.default
    }

    /// Whether a rule looks at claims of tokens.
    pub fn reads_claims(&self) -> bool {
        self.reads_claims
    }

    /// Decides.
    pub fn decide(&self, caller: &Caller<'_>, what: &What<'_>) -> Decision {
        let deny = |by| Decision { allowed: false, by, audited: None };
        // Of what cannot be looked at, bytes are taken for the worst; requests to come, and conditions on fields that
        // were not kept, for what lets them pass until they are looked at.
        let bytes = matches!(what, What::Bytes);
        if let Some(by) = self.deny.find(&self.policies, caller, what, bytes) {
            return deny(by);
        }
        let listed = self.allowed_ports.as_ref().is_none_or(|ports| ports.contains(&caller.port));
        let (by, mut audited) = if listed {
            match self.allow.find(&self.policies, caller, what, !bytes) {
                Some(by) => (by, None),
                None => return deny(By::NoneAllows),
            }
        } else {
            match self.default {
                Fallback::Deny => return deny(By::Default),
                Fallback::Allow => (By::Default, None),
                Fallback::Audit => (By::Default, Some(By::Default)),
            }
        };
        if let Some(by) = self.audit.find(&self.policies, caller, what, bytes) {
            audited = Some(by);
        }
        Decision { allowed: true, by, audited }
    }

    /// What decided, in words: `policy deny-admin, rule 1`.
    pub fn tell(&self, by: By) -> String {
        match by {
            By::Rule(policy, rule) => {
                let name = self.policies.get(policy).map_or("?", |policy| &policy.name);
                format!("policy {name}, rule {}", rule + 1)
            }
            By::NoneAllows => "no policy allows it".to_owned(),
            By::Default => "the default".to_owned(),
        }
    }

    /// The name of the policy that decided.
    pub fn name(&self, by: By) -> Option<&Arc<str>> {
        match by {
            By::Rule(policy, _) => self.policies.get(policy).map(|policy| &policy.name),
            By::NoneAllows | By::Default => None,
        }
    }
}

#[cfg(test)]
mod tests;
