//! The policies in force: compiled by the control side, published to workers, counted, told.
//!
//! Until policies have come everything is refused: a sidecar that does not know yet what is forbidden forbids it. What
//! they decide is counted under their names, and goes on to be counted there over changes.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use config::mesh::{Action, Fallback, Policies};
use config::var::{Var, Vars};
use hashbrown::HashMap;
use layers::telemetry::exposition::Exposition;
use layers::telemetry::names;
use layers::worker::view::{Published, Retired};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::egress::{Destination, EgressDecision, EgressMatcher};
use crate::matcher::{Asked, By, Caller, Decision, Matcher, What};
use crate::tokens::Issuers;

/// How often something was decided.
#[derive(Debug, Default)]
pub struct Counts {
    allowed: AtomicU64,
    denied: AtomicU64,
    audited: AtomicU64,
}

impl Counts {
    fn read(&self) -> [(&'static str, u64); 3] {
        [
            ("allowed", self.allowed.load(Relaxed)),
            ("denied", self.denied.load(Relaxed)),
            ("audited", self.audited.load(Relaxed)),
        ]
    }
}

/// The counts of what decides that has no name in the configuration.
const DEFAULT: &str = "(default)";
const NONE_ALLOWS: &str = "(none allows)";
const PENDING: &str = "(pending)";

/// Everything that is decided by one set of policies.
#[derive(Debug)]
pub struct InForce {
    matcher: Matcher,
    egress: EgressMatcher,
    issuers: Arc<Issuers>,
    counts: Box<[Arc<Counts>]>,
    egress_counts: Box<[Arc<Counts>]>,
    default: Arc<Counts>,
    none_allows: Arc<Counts>,
    egress_default: Arc<Counts>,
    words: Words,
}

/// What stands in place of the name of a policy, ready to be handed out.
#[derive(Clone, Debug)]
struct Words {
    default: Arc<str>,
    none_allows: Arc<str>,
}

/// What workers see.
#[derive(Debug)]
pub struct Sight {
    /// Nothing before the first policies have come.
    in_force: Option<InForce>,
    pending: Arc<Counts>,
    /// Counts publications.
    number: u64,
}

/// A decision with everything that is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// It may pass.
    pub allowed: bool,
    /// The policy that decided, for the access log; a word in brackets where none did.
    pub policy: Arc<str>,
    /// What decided, in words. Only where it is told: of refusals and audits.
    pub why: Option<Cow<'static, str>>,
    /// It passes, and what is named there would have refused it.
    pub audited: bool,
}

impl Sight {
    fn pending(counts: &Arc<Counts>) -> Self {
        Self { in_force: None, pending: counts.clone(), number: 0 }
    }

    /// The policies, once there are some.
    pub fn in_force(&self) -> Option<&InForce> {
        self.in_force.as_ref()
    }

    /// Counts publications.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether something is allowed, without counting it: nothing is before the policies have come.
    pub fn allows(&self, caller: &Caller<'_>, what: &What<'_>) -> bool {
        self.in_force.as_ref().is_some_and(|in_force| in_force.matcher.decide(caller, what).allowed)
    }

    /// Decides about a connection or request, and counts it.
    pub fn decide(&self, caller: &Caller<'_>, what: &What<'_>) -> Verdict {
        let Some(in_force) = &self.in_force else { return self.not_yet() };
        let decision = in_force.matcher.decide(caller, what);
        in_force.count(&decision);
        in_force.verdict(&decision)
    }

    /// Decides about a connection that leaves the mesh, and counts it.
    pub fn egress(&self, to: &Destination<'_>) -> Verdict {
        let Some(in_force) = &self.in_force else { return self.not_yet() };
        let decision = in_force.egress.decide(to);
        in_force.count_egress(&decision);
        let rule = decision.audited.unwrap_or(decision.rule);
        let told = !decision.allowed || decision.audited.is_some();
        Verdict {
            allowed: decision.allowed,
            policy: rule
                .and_then(|rule| in_force.egress.name(rule))
                .unwrap_or(&in_force.words.default)
                .clone(),
            why: told.then(|| in_force.egress.tell(rule).into()),
            audited: decision.audited.is_some(),
        }
    }

    /// Whether a connection may leave the mesh, without counting it.
    pub fn would_leave(&self, to: &Destination<'_>) -> bool {
        self.in_force.as_ref().is_some_and(|in_force| in_force.egress.decide(to).allowed)
    }

    /// Whether an address has to be known before [`egress`](Self::egress) can decide.
    pub fn egress_needs_address(&self) -> bool {
        self.in_force.as_ref().is_some_and(|in_force| in_force.egress.needs_address())
    }

    fn not_yet(&self) -> Verdict {
        self.pending.denied.fetch_add(1, Relaxed);
        let why = Some("the policies have not come yet".into());
        Verdict { allowed: false, policy: PENDING.into(), why, audited: false }
    }
}

impl InForce {
    /// Whose tokens are believed.
    pub fn issuers(&self) -> &Arc<Issuers> {
        &self.issuers
    }

    /// Whether a rule looks at claims of tokens.
    pub fn reads_claims(&self) -> bool {
        self.matcher.reads_claims()
    }

    fn counts_of(&self, by: By) -> Option<&Arc<Counts>> {
        match by {
            By::Rule(policy, _) => self.counts.get(policy),
            By::NoneAllows => Some(&self.none_allows),
            By::Default => Some(&self.default),
        }
    }

    fn count(&self, decision: &Decision) {
        if let Some(counts) = self.counts_of(decision.by) {
            let count = if decision.allowed { &counts.allowed } else { &counts.denied };
            count.fetch_add(1, Relaxed);
        }
        if let Some(counts) = decision.audited.and_then(|by| self.counts_of(by)) {
            counts.audited.fetch_add(1, Relaxed);
        }
    }

    fn count_egress(&self, decision: &EgressDecision) {
        let of = |rule: Option<usize>| {
            rule.map_or(Some(&self.egress_default), |rule| self.egress_counts.get(rule))
        };
        if let Some(counts) = of(decision.rule) {
            let count = if decision.allowed { &counts.allowed } else { &counts.denied };
            count.fetch_add(1, Relaxed);
        }
        if let Some(counts) = decision.audited.and_then(of) {
            counts.audited.fetch_add(1, Relaxed);
        }
    }

    fn verdict(&self, decision: &Decision) -> Verdict {
        let told = decision.audited.or((!decision.allowed).then_some(decision.by));
        let by = decision.audited.unwrap_or(decision.by);
        let policy = match by {
            By::Rule(..) => self.matcher.name(by),
            By::NoneAllows => Some(&self.words.none_allows),
            By::Default => None,
        };
        Verdict {
            allowed: decision.allowed,
            policy: policy.unwrap_or(&self.words.default).clone(),
            why: told.map(|by| self.matcher.tell(by).into()),
            audited: decision.audited.is_some(),
        }
    }
}

/// The policies of one sidecar, for the control side.
pub struct PolicyTable {
    published: Arc<Published<Sight>>,
    pending: Arc<Counts>,
    kept: Mutex<Kept>,
}

/// What outlives a set of policies.
#[derive(Default)]
struct Kept {
    number: u64,
    counts: HashMap<(Scope, Arc<str>), Arc<Counts>>,
}

/// What a count is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Scope {
    Authorization,
    Egress,
}

impl Scope {
    fn as_str(self) -> &'static str {
        match self {
            Self::Authorization => "authorization",
            Self::Egress => "egress",
        }
    }
}

impl Kept {
    fn counts(&mut self, scope: Scope, name: &str) -> Arc<Counts> {
        self.counts.entry((scope, name.into())).or_default().clone()
    }
}

impl PolicyTable {
    /// Without policies: everything is refused until [`publish`](Self::publish). Former policies come to the second
    /// value to be freed.
    pub fn new() -> (Self, Retired<Sight>) {
        let pending = Arc::<Counts>::default();
        let (published, retired) = Published::new(Arc::new(Sight::pending(&pending)));
        (Self { published, pending, kept: Mutex::default() }, retired)
    }

    /// Where workers look.
    pub fn published(&self) -> &Arc<Published<Sight>> {
        &self.published
    }

    /// Whether policies have come.
    pub fn is_ready(&self) -> bool {
        self.published.load().in_force.is_some()
    }

    /// Puts policies in force that have been checked, for a sidecar of these services.
    pub fn publish(&self, policies: &Policies, services: &[&str], issuers: Arc<Issuers>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let matcher = Matcher::new(policies, services);
        let egress = EgressMatcher::new(policies.egress.as_deref());
        let counts = matcher.policies().iter().map(|policy| kept.counts(Scope::Authorization, &policy.name));
        let counts: Box<[_]> = counts.collect();
        let egress_counts = egress.names().map(|(name, _)| kept.counts(Scope::Egress, name)).collect();
        let default = kept.counts(Scope::Authorization, DEFAULT);
        let none_allows = kept.counts(Scope::Authorization, NONE_ALLOWS);
        let egress_default = kept.counts(Scope::Egress, DEFAULT);
        // What nobody holds but this table is of a policy that is gone.
        kept.counts.retain(|_, counts| Arc::strong_count(counts) > 1);
        kept.number += 1;
        let in_force = InForce {
            matcher,
            egress,
            issuers,
            counts,
            egress_counts,
            default,
            none_allows,
            egress_default,
            words: Words { default: DEFAULT.into(), none_allows: NONE_ALLOWS.into() },
        };
        let pending = self.pending.clone();
        self.published.publish(Arc::new(Sight { in_force: Some(in_force), pending, number: kept.number }));
    }

    /// Writes what was decided for Prometheus.
    pub fn expose(&self, out: &mut Exposition) {
        let metric = &names::POLICY_DECISIONS_TOTAL;
        out.family("", metric);
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = kept.counts.iter().collect();
        all.sort_by_key(|(scope, _)| *scope);
        let pending = (Scope::Authorization, Arc::from(PENDING));
        for ((scope, name), counts) in all.into_iter().chain([(&pending, &self.pending)]) {
            for (verdict, count) in counts.read() {
                let labels = [("kind", scope.as_str()), ("policy", &**name), ("verdict", verdict)];
                out.sample("", metric.name, labels, count);
            }
        }
    }

    /// What is in force, and what it has decided.
    pub fn status(&self) -> Status {
        let sight = self.published.load();
        let Some(in_force) = &sight.in_force else {
            return Status {
                ready: false,
                number: 0,
                default: "deny",
                authorization: Vec::new(),
                egress: None,
            };
        };
        let told = |name: &str, action: &'static str, counts: &Counts| {
            let [(_, allowed), (_, denied), (_, audited)] = counts.read();
            PolicyStatus { name: name.to_owned(), action, allowed, denied, audited }
        };
        let default = word(in_force.matcher.fallback());
        let named = in_force.matcher.policies().iter().zip(&in_force.counts);
        let mut authorization: Vec<_> =
            named.map(|(policy, counts)| told(&policy.name, policy.action.as_str(), counts)).collect();
        authorization.push(told(NONE_ALLOWS, Action::Deny.as_str(), &in_force.none_allows));
        authorization.push(told(DEFAULT, default, &in_force.default));
        let named = in_force.egress.names().zip(&in_force.egress_counts);
        let mut egress: Vec<_> =
            named.map(|((name, action), counts)| told(name, action.as_str(), counts)).collect();
        egress.push(told(DEFAULT, word(in_force.egress.fallback()), &in_force.egress_default));
        Status { ready: true, number: sight.number, default, authorization, egress: Some(egress) }
    }

    /// What would be decided, and why. Nothing is counted.
    pub fn explain(&self, question: &Question) -> Answer {
        let sight = self.published.load();
        let Some(in_force) = &sight.in_force else {
            let why = "the policies have not come yet".to_owned();
            return Answer { allowed: false, why, audited: None };
        };
        let caller = Caller::new(question.identity.as_deref(), question.address, question.port);
        let vars = QuestionVars(question);
        let asked = question.method.as_deref().map(|method| Asked {
            method,
            path: question.path.as_deref().unwrap_or("/"),
            host: question.host.as_deref().unwrap_or_default(),
            vars: Some(&vars),
        });
        let decision = in_force.matcher.decide(&caller, &asked.map_or(What::Bytes, What::Request));
        Answer {
            allowed: decision.allowed,
            why: in_force.matcher.tell(decision.by),
            audited: decision.audited.map(|by| in_force.matcher.tell(by)),
        }
    }
}

fn word(default: Fallback) -> &'static str {
    match default {
        Fallback::Allow => "allow",
        Fallback::Deny => "deny",
        Fallback::Audit => "audit",
    }
}

/// What is in force, as `/v1/policies` tells it.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Policies have come.
    pub ready: bool,
    /// Counts publications.
    pub number: u64,
    /// What becomes of what no policy is about.
    pub default: &'static str,
    /// Authorization policies.
    pub authorization: Vec<PolicyStatus>,
    /// Egress rules.
    pub egress: Option<Vec<PolicyStatus>>,
}

/// A policy, and what it has decided.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyStatus {
    /// Its name.
    pub name: String,
    /// What it does.
    pub action: &'static str,
    /// What passed because of it.
    pub allowed: u64,
    /// What was refused because of it.
    pub denied: u64,
    /// What it would have refused.
    pub audited: u64,
}

/// "Would this be allowed?"
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// Who asks.
    #[serde(default)]
    pub identity: Option<String>,
    /// From where.
    #[serde(default = "nowhere")]
    pub address: IpAddr,
    /// For which port of the application.
    pub port: u16,
    /// The method; a connection of bytes that nobody understands without it.
    #[serde(default)]
    pub method: Option<String>,
    /// The path, decoded.
    #[serde(default)]
    pub path: Option<String>,
    /// The host.
    #[serde(default)]
    pub host: Option<String>,
    /// Fields of the request, by their names in lower case.
    #[serde(default)]
    pub headers: std::collections::BTreeMap<String, String>,
    /// Claims of the token.
    #[serde(default)]
    pub claims: Map<String, Value>,
}

impl Question {
    /// Reads one of the query of a URL: `port=8080&identity=spiffe://...&method=GET&path=/x&header.x-a=1&claim.sub=a`.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn read(query: &str) -> Result<Self, String> {
        let mut question = Self {
            identity: None,
            address: nowhere(),
            port: 0,
            method: None,
            path: None,
            host: None,
            headers: std::collections::BTreeMap::new(),
            claims: Map::new(),
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decoded = percent_encoding::percent_decode_str(value).decode_utf8();
            let value = decoded.map_err(|_| format!("{name} is no text"))?.into_owned();
            match name {
                "identity" => question.identity = Some(value),
                "address" => {
                    question.address = value.parse().map_err(|_| format!("`{value}` is no address"))?
                }
                "port" => question.port = value.parse().map_err(|_| format!("`{value}` is no port"))?,
                "method" => question.method = Some(value),
                "path" => question.path = Some(value),
                "host" => question.host = Some(value.to_ascii_lowercase()),
                _ => match (name.strip_prefix("header."), name.strip_prefix("claim.")) {
                    (Some(header), _) => drop(question.headers.insert(header.to_ascii_lowercase(), value)),
                    (_, Some(claim)) => {
                        // What is no JSON is text.
                        let value = serde_json::from_str(&value).unwrap_or(Value::String(value));
                        question.claims.insert(claim.to_owned(), value);
                    }
                    (None, None) => {
                        return Err(format!(
                            "`{name}` is not known: write identity, address, port, method, path, host, header.NAME, claim.NAME"
                        ));
                    }
                },
            }
        }
        if question.port == 0 {
            Err("`port` is missing: the port of the application".to_owned())
        } else {
            Ok(question)
        }
    }

    /// As [`read`](Self::read) reads it.
    pub fn query(&self) -> String {
        let Self { identity, address, port, method, path, host, headers, claims } = self;
        let mut query = format!("address={address}&port={port}");
        let mut add = |name: &str, value: &str| {
            let value = percent_encoding::utf8_percent_encode(value, percent_encoding::NON_ALPHANUMERIC);
            query.push_str(&format!("&{name}={value}"));
        };
        for (name, value) in [("identity", identity), ("method", method), ("path", path), ("host", host)] {
            value.iter().for_each(|value| add(name, value));
        }
        headers.iter().for_each(|(name, value)| add(&format!("header.{name}"), value));
        claims.iter().for_each(|(name, value)| add(&format!("claim.{name}"), &value.to_string()));
        query
    }
}

fn nowhere() -> IpAddr {
    IpAddr::from([0, 0, 0, 0])
}

/// What would be decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// It may pass.
    pub allowed: bool,
    /// What decides.
    pub why: String,
    /// What would have refused it if it did more than audit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audited: Option<String>,
}

struct QuestionVars<'a>(&'a Question);

impl Vars for QuestionVars<'_> {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        let question = self.0;
        let text = |text: &'a Option<String>| text.as_deref().map(Cow::Borrowed);
        match var {
            Var::Uri | Var::RequestUri => text(&question.path),
            Var::Host => text(&question.host),
            Var::RequestMethod => text(&question.method),
            Var::RemoteAddr => Some(Cow::Owned(question.address.to_string())),
            Var::Http(name) => question.headers.get(name.as_str()).map(|value| Cow::Borrowed(value.as_str())),
            Var::Other(name) => crate::tokens::peer_variable(question.identity.as_deref(), name)
                .map(Cow::Borrowed)
                .or_else(|| crate::tokens::claim_text(&question.claims, name)),
            _ => None,
        }
    }

    fn value(&self, var: &Var) -> Option<Value> {
        match var {
            Var::Other(name) => crate::tokens::claim(&self.0.claims, name),
            _ => None,
        }
    }
}
