//! What the mesh allows: who may ask what of an application, where an application may go, whose tokens are believed,
//! and how a service is reached.
//!
//! The types are what `policies` and `services` of a sidecar's file hold. A rule that cannot match anything is refused:
//! in a list of refusals it protects nothing, and in a list of permissions it hides a mistake.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::ops::Deref;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::error::{ConfigError, ErrorKind, escape};
use crate::expr::Expr;
use crate::fields::{Cidr, Distinct, Host, Int, Plugins, Seconds, Text, Url};
use crate::meta::{META, Meta, Role};
use crate::plugin_catalog::{PluginCatalog, PluginSchema};
use crate::upstream::Upstream;
use crate::var::Var;

/// The prefix of variables that are claims of a verified token: `jwt_claim_sub`, `jwt_claim_realm_access.roles`.
pub const CLAIM: &str = "jwt_claim_";

/// Variables of the caller, beside those of every request.
pub const PEER_VARIABLES: [&str; 3] = ["peer_identity", "peer_namespace", "peer_service_account"];

/// What is allowed, to the application of a sidecar and by it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Policies {
    /// What becomes of a connection or request that no authorization policy is about.
    #[serde(default)]
    pub default: Fallback,
    /// Who may ask what of the application.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub authorization: Vec<Authorization>,
    /// Where the application may go outside of the mesh. Everywhere if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Box<Egress>>,
    /// Whose tokens are believed, for conditions on claims.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<Issuer>,
}

/// What becomes of what no policy decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Fallback {
    /// It passes.
    #[default]
    Allow,
    /// It is refused.
    Deny,
    /// It passes, and is logged and counted as what `deny` would refuse.
    Audit,
}

/// What a policy does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Action {
    /// It is refused, whatever other policies allow.
    Deny,
    /// It passes unless a policy denies it; what no policy of this kind matches is refused where there is one.
    Allow,
    /// Nothing: it is logged and counted as what `deny` would refuse.
    Audit,
}

impl Action {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Action::Deny => "deny",
            Action::Allow => "allow",
            Action::Audit => "audit",
        }
    }
}

/// Who may, or may not, ask what of an application.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Authorization {
    /// The name under which logs, metrics and refusals tell of it; each once.
    pub name: PolicyName,
    /// What it does with what it matches.
    pub action: Action,
    /// The services it is about. All if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<Distinct<Text<1, 256>>>,
    /// The ports of the application it is about. All if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Distinct<Port>>,
    /// It matches what one of these matches.
    pub rules: Vec<Rule>,
}

/// What one rule matches: one of `from`, and one of `to`, and `when`. What is absent matches everything; not all three
/// can be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Who asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Vec<Source>>,
    /// What is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Vec<Operation>>,
    /// An expression over variables of the request, as `vars` of a route; claims of a verified token are `jwt_claim_NAME`,
    /// the caller is `peer_identity`, `peer_namespace` and `peer_service_account`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Value>>")]
    pub when: Option<Value>,
}

/// Who asks: every field that is there holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The caller is one of these: `spiffe://td/ns/a/sa/b`, everybody below a path as `spiffe://td/ns/a/*`, or `*` for
    /// everybody who has an identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identities: Option<Distinct<IdentityPattern>>,
    /// The caller is none of these. A caller without an identity is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_identities: Option<Distinct<IdentityPattern>>,
    /// The caller is of one of these namespaces: the part after `/ns/` of its identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Distinct<Segment>>,
    /// The caller is of none of these namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_namespaces: Option<Distinct<Segment>>,
    /// The connection comes from one of these networks. What fields of the request say of the client does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cidrs: Option<Distinct<Cidr>>,
    /// The connection comes from none of these networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_cidrs: Option<Distinct<Cidr>>,
}

/// What is asked: every field that is there holds. Methods, paths and hosts are of HTTP requests alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Operation {
    /// The method is one of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub methods: Option<Distinct<MethodName>>,
    /// The method is none of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_methods: Option<Distinct<MethodName>>,
    /// The path, decoded and without dot segments, is one of these: `/exact`, everything below a path as `/a/*`, or `/*`.
    /// gRPC methods are paths: `/package.Service/Method`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paths: Option<Distinct<PathPattern>>,
    /// The path is none of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_paths: Option<Distinct<PathPattern>>,
    /// The host asked for, without its port, is one of these: `a.com`, `*.a.com`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Distinct<Host>>,
    /// The host asked for is none of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_hosts: Option<Distinct<Host>>,
    /// The port of the application is one of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Distinct<Port>>,
    /// The port of the application is none of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ports: Option<Distinct<Port>>,
}

/// A port.
pub type Port = Int<1, 65_535>;

/// Where the application may go outside of the mesh. A rule that denies wins over one that allows; what no rule is about
/// goes by `default`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// What becomes of a connection that no rule is about.
    #[serde(default)]
    pub default: Fallback,
    /// What is known of some destinations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<EgressRule>,
}

/// What becomes of connections to some destinations: every field that is there holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EgressRule {
    /// The name under which logs, metrics and refusals tell of it; each once.
    pub name: PolicyName,
    /// What it does with what it matches.
    pub action: Action,
    /// The name asked for, by `Host`, `CONNECT`, SOCKS or the server name of TLS, is one of these: `a.com`, `*.a.com`. A
    /// connection without a name matches none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Distinct<Host>>,
    /// The address is in one of these networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cidrs: Option<Distinct<Cidr>>,
    /// The port is one of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Distinct<Port>>,
}

/// Who issues tokens that are believed. Either `jwks` or `jwks_uri`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    /// What `iss` of its tokens says.
    pub issuer: Text<1, 1024>,
    /// `aud` of a token has one of these. Any if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audiences: Option<Distinct<Text<1, 1024>>>,
    /// Its public keys, as a JSON Web Key Set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, Value>>")]
    pub jwks: Option<Value>,
    /// Where its public keys are fetched from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_uri: Option<Url>,
    /// Seconds between two looks at `jwks_uri`.
    #[serde(default = "five_minutes")]
    pub refresh: Seconds,
    /// How far its clock may be off, in seconds.
    #[serde(default)]
    pub leeway: Int<0, 3600, 0>,
}

fn five_minutes() -> Seconds {
    Seconds::whole(300)
}

/// How a service of the mesh is reached: what a sidecar does for the application that calls it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServicePolicy {
    /// Its name: what applications ask for, and listeners refer to.
    pub name: ServiceName,
    /// Other host names under which applications ask for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Distinct<Host>>,
    /// Where it is, and how it is asked: nodes or a registry, time-outs, retries and their budget, breaker, outlier
    /// ejection (`checks.passive`), failover. An APISIX upstream.
    pub upstream: Box<Upstream>,
    /// Who may answer for it. Endpoints of a registry may say so themselves; without either the connection is not of the
    /// mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identities: Option<Distinct<IdentityPattern>>,
    /// What it speaks.
    #[serde(default)]
    pub protocol: Protocol,
    /// What is done with requests for it: the plugins of a route, with the same settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugins: Option<Box<Plugins>>,
}

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Protocol {
    /// The first bytes tell.
    #[default]
    Auto,
    /// HTTP/1.
    Http1,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC: HTTP/2 without TLS.
    Grpc,
    /// Bytes that are carried as they are.
    Tcp,
}

/// Text with a rule of its own.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $rule:literal, $pattern:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(Box<str>);

        impl $name {
            /// Reads it; nothing if it has another form.
            #[must_use]
            pub fn new(text: &str) -> Option<Self> {
                let valid: fn(&str) -> bool = $valid;
                valid(text).then(|| Self(text.into()))
            }
        }

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = Cow::<'de, str>::deserialize(deserializer)?;
                Self::new(&text).ok_or_else(|| serde::de::Error::custom(format!("`{text}` is not {}", $rule)))
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "pattern": $pattern, "x-expected": $rule})
            }
        }
    };
}

fn is_word(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn is_segment(text: &str) -> bool {
    !text.is_empty() && is_word(text) && text != "." && text != ".."
}

text!(
    /// The name of a policy: it stands in logs, metrics and header fields.
    PolicyName,
    "a name of 1 to 128 of a-z A-Z 0-9 . _ -",
    r"^[a-zA-Z0-9._-]{1,128}$",
    |text| !text.is_empty() && text.len() <= 128 && is_word(text)
);
text!(
    /// The name of a service.
    ServiceName,
    "a name of 1 to 253 of a-z A-Z 0-9 . _ -",
    r"^[a-zA-Z0-9._-]{1,253}$",
    |text| !text.is_empty() && text.len() <= 253 && is_word(text)
);
text!(
    /// One segment of the path of an identity.
    Segment,
    "one segment of an identity: a-z A-Z 0-9 . _ -, and no `*`",
    r"^[a-zA-Z0-9._-]{1,253}$",
    |text| is_segment(text) && text.len() <= 253
);
text!(
    /// A request method.
    MethodName,
    "a method as it stands in a request line, in upper case: GET",
    r"^[A-Z][A-Z0-9_-]{0,31}$",
    |text| text.len() <= 32
        && text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
);
text!(
    /// A path, or everything below one.
    PathPattern,
    "a decoded path without query and dot segments: /a/b, or everything below one: /a/*",
    r"^/[^?#*]*\*?$",
    is_path_pattern
);
text!(
    /// Identities: one, those below a path, or all.
    IdentityPattern,
    "a SPIFFE identity: spiffe://trust.domain/ns/a/sa/b, all below a path: spiffe://trust.domain/ns/a/*, or * for all",
    r"^(\*|spiffe://[a-z0-9._-]{1,255}(/[a-zA-Z0-9._-]+)*(/\*)?)$",
    is_identity_pattern
);

fn is_path_pattern(text: &str) -> bool {
    let Some(path) = text.strip_prefix('/') else { return false };
    let path = match path.strip_suffix('*') {
        // A prefix ends where a segment does: `/adm*` would be `/admin` and `/admonish` alike.
        Some(rest) if rest.is_empty() || rest.ends_with('/') => rest,
        Some(_) => return false,
        None => path,
    };
    let inner = path.strip_suffix('/').unwrap_or(path);
    let escaped = path
        .as_bytes()
        .windows(3)
        .any(|window| matches!(window, [b'%', a, b] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit()));
    let dots = inner.split('/').any(|segment| matches!(segment, "." | ".."));
    let slashes = path.starts_with('/') || path.contains("//");
    text.len() <= 4096 && !escaped && !dots && !slashes && !path.contains(['?', '#', '*'])
}

fn is_identity_pattern(text: &str) -> bool {
    if text == "*" {
        return true;
    }
    let Some(rest) = text.strip_prefix("spiffe://") else { return false };
    let (domain, path) = rest.split_once('/').map_or((rest, None), |(domain, path)| (domain, Some(path)));
    let domain_is_good = (1..=255).contains(&domain.len())
        && domain
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'));
    let path_is_good = match path {
        // The trust domain itself is nobody's identity.
        None => false,
        Some("*") => true,
        Some(path) => path.strip_suffix("/*").unwrap_or(path).split('/').all(is_segment),
    };
    text.len() <= 2048 && domain_is_good && path_is_good
}

impl PathPattern {
    /// Whether a decoded path is meant.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => path.starts_with(prefix),
            None => *self.0 == *path,
        }
    }
}

impl IdentityPattern {
    /// Whether an identity, as it is written, is meant.
    #[must_use]
    pub fn matches(&self, identity: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => identity.starts_with(prefix),
            None => *self.0 == *identity,
        }
    }

    /// Whether it is one identity alone.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        !self.0.ends_with('*')
    }

    /// Whether everything that `other` means is meant.
    #[must_use]
    pub fn covers(&self, other: &IdentityPattern) -> bool {
        self.0.strip_suffix('*').map_or_else(|| self == other, |prefix| other.0.starts_with(prefix))
    }
}

/// The namespace in an identity: the segment after `/ns/` at the start of its path.
#[must_use]
pub fn namespace(identity: &str) -> Option<&str> {
    segment_after(identity, "ns")
}

/// The service account in an identity: the segment after `/sa/`.
#[must_use]
pub fn service_account(identity: &str) -> Option<&str> {
    segment_after(identity, "sa")
}

fn segment_after<'a>(identity: &'a str, name: &str) -> Option<&'a str> {
    let (_, path) = identity.strip_prefix("spiffe://")?.split_once('/')?;
    // Names and values take turns, so a value `ns` is no name.
    let mut segments = path.split('/');
    while let (Some(key), Some(value)) = (segments.next(), segments.next()) {
        if key == name {
            return Some(value);
        }
    }
    None
}

/// What a sidecar stands before: what policies can be about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scope<'a> {
    /// The names of its services.
    pub services: &'a [&'a str],
    /// The ports of its applications; none where any port can be meant, as with redirected connections.
    pub ports: Option<&'a [u16]>,
}

impl Policies {
    /// Everything that the types do not say and that is wrong, with pointers into the policies.
    #[must_use]
    pub fn check(&self) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let names = self.authorization.iter().map(|policy| &policy.name);
        unique(names, "/authorization", &mut errors);
        for (index, policy) in self.authorization.iter().enumerate() {
            policy.check(&format!("/authorization/{index}"), self, &mut errors);
        }
        if let Some(egress) = &self.egress {
            unique(egress.rules.iter().map(|rule| &rule.name), "/egress/rules", &mut errors);
            for (index, rule) in egress.rules.iter().enumerate() {
                rule.check(&format!("/egress/rules/{index}"), &mut errors);
            }
        }
        let mut issuers = HashSet::new();
        for (index, issuer) in self.tokens.iter().enumerate() {
            let at = format!("/tokens/{index}");
            if !issuers.insert(&*issuer.issuer) {
                errors.push(ConfigError::new(format!("{at}/issuer"), ErrorKind::Duplicate));
            }
            match (&issuer.jwks, &issuer.jwks_uri) {
                (None, None) => {
                    errors.push(ConfigError::new(at, ErrorKind::NoneOf { fields: vec!["jwks", "jwks_uri"] }));
                }
                (Some(_), Some(_)) => {
                    errors
                        .push(ConfigError::new(at, ErrorKind::Exclusive { one: "jwks", other: "jwks_uri" }));
                }
                _ => {}
            }
        }
        errors
    }

    /// Policies that can match nothing of what the sidecar stands before, with pointers into the policies.
    #[must_use]
    pub fn check_scope(&self, scope: Scope<'_>) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        for (index, policy) in self.authorization.iter().enumerate() {
            let at = format!("/authorization/{index}");
            if let Some(services) = &policy.services
                && !services.iter().any(|service| scope.services.contains(&&**service))
            {
                errors.push(nothing(
                    format!("{at}/services"),
                    &format!("this sidecar stands before {}", listed(scope.services.iter())),
                ));
            }
            if let (Some(ports), Some(known)) = (&policy.ports, scope.ports)
                && !ports.iter().any(|port| known.iter().any(|known| u32::from(*known) == port.get()))
            {
                let known = listed(known.iter());
                errors.push(nothing(
                    format!("{at}/ports"),
                    &format!("the ports of the application are {known}"),
                ));
            }
        }
        errors
    }
}

impl Authorization {
    /// Whether one of its rules asks for what only an HTTP request has.
    #[must_use]
    pub fn is_of_requests(&self) -> bool {
        let of_requests =
            |rule: &Rule| rule.when.is_some() || rule.to.iter().flatten().any(Operation::is_of_requests);
        self.rules.iter().any(of_requests)
    }
}

fn listed<T: fmt::Display>(words: impl Iterator<Item = T>) -> String {
    let words: Vec<String> = words.map(|word| word.to_string()).collect();
    if words.is_empty() { "none".to_owned() } else { words.join(", ") }
}

fn nothing(pointer: impl Into<String>, why: &str) -> ConfigError {
    ConfigError::invalid(pointer, format!("this matches nothing: {why}"))
}

fn unique<'a>(names: impl Iterator<Item = &'a PolicyName>, at: &str, errors: &mut Vec<ConfigError>) {
    let mut seen = HashSet::new();
    for (index, name) in names.enumerate() {
        if !seen.insert(name) {
            errors.push(ConfigError::new(format!("{at}/{index}/name"), ErrorKind::Duplicate));
        }
    }
}

impl Authorization {
    fn check(&self, at: &str, policies: &Policies, errors: &mut Vec<ConfigError>) {
        if self.rules.is_empty() {
            errors.push(nothing(
                format!("{at}/rules"),
                "it has no rules; write one, such as {\"from\": [{\"identities\": [\"*\"]}]}",
            ));
        }
        for (index, rule) in self.rules.iter().enumerate() {
            rule.check(&format!("{at}/rules/{index}"), self, policies, errors);
        }
    }
}

impl Rule {
    fn check(&self, at: &str, policy: &Authorization, policies: &Policies, errors: &mut Vec<ConfigError>) {
        if self.from.is_none() && self.to.is_none() && self.when.is_none() {
            errors.push(ConfigError::invalid(
                at,
                "the rule has no conditions: for everybody write {\"from\": [{\"cidrs\": [\"0.0.0.0/0\", \"::/0\"]}]}",
            ));
        }
        let empty = |list: &str, errors: &mut Vec<ConfigError>| {
            errors
                .push(nothing(format!("{at}/{list}"), "the list is empty; write an element, or take it out"));
        };
        if self.from.as_ref().is_some_and(Vec::is_empty) {
            empty("from", errors);
        }
        if self.to.as_ref().is_some_and(Vec::is_empty) {
            empty("to", errors);
        }
        for (index, source) in self.from.iter().flatten().enumerate() {
            source.check(&format!("{at}/from/{index}"), errors);
        }
        for (index, operation) in self.to.iter().flatten().enumerate() {
            operation.check(&format!("{at}/to/{index}"), policy, errors);
        }
        if let Some(when) = &self.when {
            check_when(when, &format!("{at}/when"), policies, errors);
        }
    }
}

fn check_when(when: &Value, at: &str, policies: &Policies, errors: &mut Vec<ConfigError>) {
    let expr = match Expr::parse(when) {
        Ok(expr) => expr,
        Err(error) => return errors.push(error.under(at)),
    };
    if expr.is_always() {
        errors.push(ConfigError::invalid(at, "the expression is empty: write a comparison, or take it out"));
    }
    let mut told = HashSet::new();
    for var in expr.vars().into_iter().filter(|var| told.insert((*var).clone())) {
        let problem = if var.is_of_response() {
            "has no value before the answer"
        } else if var.needs_body() {
            "is of the body, which is not read before it is known who asks"
        } else {
            match var {
                Var::Other(name) if name.starts_with(CLAIM) && policies.tokens.is_empty() => {
                    "is a claim of a token, and `tokens` names nobody whose tokens are believed"
                }
                Var::Other(name) if name.starts_with(CLAIM) || PEER_VARIABLES.contains(&&**name) => continue,
                Var::Other(_) => "is no variable of a request",
                _ => continue,
            }
        };
        errors.push(ConfigError::invalid(at, format!("`{var}` {problem}: compare another variable")));
    }
}

fn no_conditions(at: &str, errors: &mut Vec<ConfigError>) {
    errors.push(ConfigError::invalid(at, "it has no conditions: write one, or take it out"));
}

/// `not` takes everything away that `only` lets through.
fn contradicts<T>(
    only: Option<&[T]>,
    not: Option<&[T]>,
    covers: impl Fn(&T, &T) -> bool,
    (at, field): (&str, &str),
    errors: &mut Vec<ConfigError>,
) {
    if let (Some(only), Some(not)) = (only, not)
        && only.iter().all(|one| not.iter().any(|other| covers(other, one)))
    {
        errors.push(nothing(format!("{at}/not_{field}"), &format!("it takes away all of `{field}`")));
    }
}

impl Source {
    fn check(&self, at: &str, errors: &mut Vec<ConfigError>) {
        if *self == Source::default() {
            no_conditions(at, errors);
        }
        contradicts(
            self.identities.as_deref(),
            self.not_identities.as_deref(),
            IdentityPattern::covers,
            (at, "identities"),
            errors,
        );
        contradicts(
            self.namespaces.as_deref(),
            self.not_namespaces.as_deref(),
            |a, b| a == b,
            (at, "namespaces"),
            errors,
        );
        contradicts(
            self.cidrs.as_deref(),
            self.not_cidrs.as_deref(),
            |a, b| a.net().contains(&b.net()),
            (at, "cidrs"),
            errors,
        );
        if let (Some(identities), Some(namespaces)) = (&self.identities, &self.namespaces) {
            let one_of = |pattern: &IdentityPattern| {
                !pattern.is_exact()
                    || namespace(pattern).is_some_and(|own| namespaces.iter().any(|name| &**name == own))
            };
            if !identities.iter().any(one_of) {
                errors.push(nothing(format!("{at}/namespaces"), "none of `identities` is of one of them"));
            }
        }
    }
}

impl Operation {
    /// Whether it asks for what only an HTTP request has.
    #[must_use]
    pub fn is_of_requests(&self) -> bool {
        self.methods.is_some()
            || self.not_methods.is_some()
            || self.paths.is_some()
            || self.not_paths.is_some()
            || self.hosts.is_some()
            || self.not_hosts.is_some()
    }

    fn check(&self, at: &str, policy: &Authorization, errors: &mut Vec<ConfigError>) {
        if *self == Operation::default() {
            no_conditions(at, errors);
        }
        for (field, hosts) in [("hosts", &self.hosts), ("not_hosts", &self.not_hosts)] {
            check_hosts(hosts.as_ref(), &format!("{at}/{field}"), errors);
        }
        let same = |a: &MethodName, b: &MethodName| a == b;
        contradicts(self.methods.as_deref(), self.not_methods.as_deref(), same, (at, "methods"), errors);
        let covers = |a: &PathPattern, b: &PathPattern| {
            a.strip_suffix('*').map_or_else(|| a == b, |prefix| b.starts_with(prefix))
        };
        contradicts(self.paths.as_deref(), self.not_paths.as_deref(), covers, (at, "paths"), errors);
        let covers = |a: &Host, b: &Host| {
            let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
            a.strip_prefix('*').map_or_else(|| a == b, |suffix| b.ends_with(suffix))
        };
        contradicts(self.hosts.as_deref(), self.not_hosts.as_deref(), covers, (at, "hosts"), errors);
        let same = |a: &Port, b: &Port| a == b;
        contradicts(self.ports.as_deref(), self.not_ports.as_deref(), same, (at, "ports"), errors);
        if let (Some(own), Some(ports)) = (&policy.ports, &self.ports)
            && !ports.iter().any(|port| own.contains(port))
        {
            errors.push(nothing(format!("{at}/ports"), "none of them is one of the `ports` of the policy"));
        }
    }
}

fn check_hosts(hosts: Option<&Distinct<Host>>, at: &str, errors: &mut Vec<ConfigError>) {
    for (index, host) in hosts.into_iter().flatten().enumerate() {
        // An address in brackets has colons of its own.
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            errors.push(nothing(
                format!("{at}/{index}"),
                "hosts are compared without their port; write `ports`",
            ));
        }
    }
}

impl EgressRule {
    fn check(&self, at: &str, errors: &mut Vec<ConfigError>) {
        if self.hosts.is_none() && self.cidrs.is_none() && self.ports.is_none() {
            no_conditions(at, errors);
        }
        check_hosts(self.hosts.as_ref(), &format!("{at}/hosts"), errors);
    }
}

impl ServicePolicy {
    /// Everything that the types do not say and that is wrong, with pointers into the service. Fills in the defaults of
    /// its plugins.
    #[must_use]
    pub fn check(&mut self, catalog: &dyn PluginCatalog) -> Vec<ConfigError> {
        let mut errors: Vec<_> =
            self.upstream.errors().into_iter().map(|error| error.under("/upstream")).collect();
        check_hosts(self.hosts.as_ref(), "/hosts", &mut errors);
        for (name, settings) in self.plugins.iter_mut().flat_map(|plugins| plugins.iter_mut()) {
            let at = format!("/plugins/{}", escape(name));
            if let Err(found) = check_plugin(name, settings, catalog) {
                errors.extend(found.into_iter().map(|error| error.under(&at)));
            }
        }
        errors
    }
}

fn check_plugin(
    name: &str,
    settings: &mut Value,
    catalog: &dyn PluginCatalog,
) -> Result<(), Vec<ConfigError>> {
    let Some(fields) = settings.as_object_mut() else {
        let expected = "an object with the settings of the plugin, {} for none".to_owned();
        let kind = ErrorKind::WrongType { found: crate::schema::type_of(settings), expected };
        return Err(vec![ConfigError::new("", kind)]);
    };
    if catalog.priority(name).is_none() {
        if catalog.is_harmless(name) {
            return Ok(());
        }
        let advice = catalog.refusal(name).or_else(|| {
            let nearest = crate::error::nearest(name, catalog.names())?;
            Some(format!("did you mean `{nearest}`?"))
        });
        return Err(vec![ConfigError::new("", ErrorKind::UnknownPlugin { name: name.to_owned(), advice })]);
    }
    let meta = fields.shift_remove(META);
    let mut errors = Vec::new();
    let runs = match meta.as_ref().map(Meta::parse) {
        Some(Err(found)) => {
            errors.extend(found.into_iter().map(|error| error.under("/_meta")));
            false
        }
        Some(Ok(meta)) => !meta.is_disabled() && meta.runs_in(Role::Sidecar),
        None => true,
    };
    if let Some(reason) = catalog.edge_alone(name).filter(|_| runs) {
        errors.push(ConfigError::new("", ErrorKind::MisplacedPlugin { name: name.to_owned(), reason }));
    }
    match catalog.check(name, PluginSchema::Config, settings) {
        Ok(filled) => *settings = filled,
        Err(found) => errors.extend(found),
    }
    if let (Some(meta), Some(fields)) = (meta, settings.as_object_mut()) {
        fields.insert(META.to_owned(), meta);
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::TestCatalog;
    use crate::typed;

    fn errors(policies: Value) -> Vec<String> {
        match typed::parse::<Policies>(&policies) {
            Ok(policies) => policies.check(),
            Err(errors) => errors,
        }
        .iter()
        .map(ToString::to_string)
        .collect()
    }

    fn policy(fields: Value) -> Value {
        let mut policy =
            json!({"name": "p", "action": "allow", "rules": [{"from": [{"namespaces": ["a"]}]}]});
        for (name, value) in fields.as_object().unwrap() {
            policy[name] = value.clone();
        }
        json!({"authorization": [policy]})
    }

    fn rule(rule: Value) -> Value {
        policy(json!({"rules": [rule]}))
    }

    fn from(source: Value) -> Value {
        rule(json!({"from": [source]}))
    }

    fn to(operation: Value) -> Value {
        rule(json!({"to": [operation]}))
    }

    #[test]
    fn what_can_be_written_is_taken() {
        let policies = json!({
            "default": "deny",
            "authorization": [
                {
                    "name": "orders", "action": "allow", "services": ["orders"], "ports": [8080],
                    "rules": [{
                        "from": [{
                            "identities": ["spiffe://a.b/ns/x/sa/y", "spiffe://a.b/ns/*", "spiffe://a.b/*", "*"],
                            "not_identities": ["spiffe://a.b/ns/z/*"],
                            "cidrs": ["10.0.0.0/8", "::1", "fd00::/8"], "not_cidrs": ["10.1.1.1"],
                        }],
                        "to": [{
                            "methods": ["GET", "PROPFIND"], "paths": ["/", "/*", "/a/*", "/a/b", "/100%"],
                            "not_paths": ["/a/b/*"], "hosts": ["a.com", "*.A.com", "[::1]"], "not_ports": [1],
                        }],
                        "when": [["jwt_claim_sub", "==", "x"], ["peer_namespace", "~=", "y"], ["http_x", "==", "1"]],
                    }],
                },
                {"name": "watch", "action": "audit", "rules": [{"to": [{"not_methods": ["GET"]}]}]},
            ],
            "egress": {"default": "audit", "rules": [{"name": "web", "action": "allow", "hosts": ["*.a.com"], "ports": [443]}]},
            "tokens": [{"issuer": "https://i", "audiences": ["a"], "jwks_uri": "https://i/keys"}],
        });
        assert_eq!(errors(policies.clone()), Vec::<String>::new());
        let read = typed::parse::<Policies>(&policies).unwrap();
        let written = serde_json::to_value(&read).unwrap();
        assert_eq!(typed::parse::<Policies>(&written).unwrap(), read, "what is written is read again");
        assert_eq!(errors(json!({})), Vec::<String>::new());
        assert!(jsonschema::meta::is_valid(&typed::schema_of::<Policies>()));
    }

    #[test]
    fn what_is_wrong_is_refused_with_its_place() {
        let cases = [
            (json!({"defualt": "deny"}), "/defualt", "did you mean `default`?"),
            (json!({"default": "refuse"}), "/default", "`allow`, `deny`, `audit`"),
            (policy(json!({"action": "permit"})), "/authorization/0/action", "`deny`, `allow`, `audit`"),
            (policy(json!({"name": "a b"})), "/authorization/0/name", "1 to 128"),
            (policy(json!({"rules": []})), "/authorization/0/rules", "it has no rules"),
            (policy(json!({"rules": [{}]})), "/authorization/0/rules/0", "no conditions"),
            (policy(json!({"ports": [0]})), "/authorization/0/ports/0", "1 to 65535"),
            (policy(json!({"services": []})), "/authorization/0/services", "at least 1"),
            (rule(json!({"from": []})), "/authorization/0/rules/0/from", "the list is empty"),
            (rule(json!({"to": []})), "/authorization/0/rules/0/to", "the list is empty"),
            (rule(json!({"form": []})), "/authorization/0/rules/0/form", "did you mean `from`?"),
            (from(json!({})), "/authorization/0/rules/0/from/0", "no conditions"),
            (from(json!({"identities": []})), "/authorization/0/rules/0/from/0/identities", "at least 1"),
            (from(json!({"identities": ["a"]})), "/authorization/0/rules/0/from/0/identities/0", "spiffe://"),
            (
                from(json!({"cidrs": ["10.0.0.0/33"]})),
                "/authorization/0/rules/0/from/0/cidrs/0",
                "an IPv4 or IPv6",
            ),
            (from(json!({"cidrs": ["all"]})), "/authorization/0/rules/0/from/0/cidrs/0", "an IPv4 or IPv6"),
            (
                from(json!({"namespaces": ["a/b"]})),
                "/authorization/0/rules/0/from/0/namespaces/0",
                "one segment",
            ),
            (to(json!({})), "/authorization/0/rules/0/to/0", "no conditions"),
            (to(json!({"methods": ["get"]})), "/authorization/0/rules/0/to/0/methods/0", "upper case"),
            (to(json!({"paths": ["a"]})), "/authorization/0/rules/0/to/0/paths/0", "decoded path"),
            (to(json!({"hosts": ["a.com:80"]})), "/authorization/0/rules/0/to/0/hosts/0", "write `ports`"),
            (
                from(json!({"identities": ["spiffe://t/a"], "not_identities": ["spiffe://t/*"]})),
                "/authorization/0/rules/0/from/0/not_identities",
                "takes away all",
            ),
            (
                from(json!({"identities": ["spiffe://t/ns/a/sa/b"], "namespaces": ["c"]})),
                "/authorization/0/rules/0/from/0/namespaces",
                "matches nothing",
            ),
            (
                from(json!({"cidrs": ["10.1.0.0/16"], "not_cidrs": ["10.0.0.0/8"]})),
                "/authorization/0/rules/0/from/0/not_cidrs",
                "takes away all",
            ),
            (
                to(json!({"paths": ["/a/b"], "not_paths": ["/a/*"]})),
                "/authorization/0/rules/0/to/0/not_paths",
                "takes away all",
            ),
            (
                to(json!({"hosts": ["x.a.com"], "not_hosts": ["*.A.com"]})),
                "/authorization/0/rules/0/to/0/not_hosts",
                "takes away all",
            ),
            (
                policy(json!({"ports": [80], "rules": [{"to": [{"ports": [81]}]}]})),
                "/authorization/0/rules/0/to/0/ports",
                "none of them",
            ),
            (rule(json!({"when": ["a", "==", "b"]})), "/authorization/0/rules/0/when", "brackets"),
            (rule(json!({"when": []})), "/authorization/0/rules/0/when", "empty"),
            (
                rule(json!({"when": [["status", "==", 200]]})),
                "/authorization/0/rules/0/when",
                "before the answer",
            ),
            (rule(json!({"when": [["post_arg_a", "==", "1"]]})), "/authorization/0/rules/0/when", "body"),
            (
                rule(json!({"when": [["jwt_claim_a", "==", "1"]]})),
                "/authorization/0/rules/0/when",
                "`tokens`",
            ),
            (rule(json!({"when": [["claim_a", "==", "1"]]})), "/authorization/0/rules/0/when", "no variable"),
            (
                json!({"egress": {"rules": [{"name": "a", "action": "deny"}]}}),
                "/egress/rules/0",
                "no conditions",
            ),
            (
                json!({"egress": {"rules": [{"name": "a", "action": "deny", "hosts": ["a:443"]}]}}),
                "/egress/rules/0/hosts/0",
                "write `ports`",
            ),
            (json!({"tokens": [{"issuer": "i"}]}), "/tokens/0", "`jwks`"),
            (
                json!({"tokens": [{"issuer": "i", "jwks": {}, "jwks_uri": "http://a/"}]}),
                "/tokens/0",
                "exclude",
            ),
        ];
        for (policies, pointer, words) in cases {
            let errors = errors(policies.clone());
            let found = errors.iter().any(|error| {
                error.split_once(": ").is_some_and(|(at, text)| at == pointer && text.contains(words))
            });
            assert!(found, "{policies}: {errors:?} has no {pointer} with {words:?}");
        }
        let twice = json!({"authorization": [
            {"name": "p", "action": "deny", "rules": [{"from": [{"identities": ["*"]}]}]},
            {"name": "p", "action": "allow", "rules": [{"from": [{"identities": ["*"]}]}]},
        ]});
        assert!(errors(twice)[0].starts_with("/authorization/1/name: "));
    }

    #[test]
    fn a_policy_that_is_about_nothing_here_is_refused() {
        let policies: Policies =
            typed::parse(&policy(json!({"services": ["orders"], "ports": [8080]}))).unwrap();
        let told = |services: &[&str], ports: Option<&[u16]>| {
            let errors = policies.check_scope(Scope { services, ports });
            errors.into_iter().map(|error| error.pointer).collect::<Vec<_>>()
        };
        assert_eq!(told(&["orders"], Some(&[8080])), Vec::<String>::new());
        assert_eq!(told(&["orders"], None), Vec::<String>::new());
        assert_eq!(told(&["order"], Some(&[8080])), ["/authorization/0/services"]);
        assert_eq!(told(&["orders", "x"], Some(&[80])), ["/authorization/0/ports"]);
    }

    #[test]
    fn forms_of_identities_and_paths() {
        let identities = [
            ("*", true),
            ("spiffe://mesh.local/ns/default/sa/orders", true),
            ("spiffe://mesh.local/ns/default/*", true),
            ("spiffe://mesh.local/*", true),
            ("spiffe://mesh.local/service", true),
            ("spiffe://mesh.local", false),
            ("spiffe://mesh.local/", false),
            ("spiffe://mesh.local/ns/def*", false),
            ("spiffe://mesh.local/ns/*/sa/x", false),
            ("spiffe://Mesh.local/a", false),
            ("spiffe://mesh.local:80/a", false),
            ("spiffe://u@mesh.local/a", false),
            ("spiffe://mesh.local/a//b", false),
            ("spiffe://mesh.local/a/../b", false),
            ("spiffe://mesh.local/a/./b", false),
            ("spiffe://mesh.local/a/", false),
            ("spiffe://mesh.local/a%2Fb", false),
            ("spiffe://mesh.local/a?b", false),
            ("spiffe:///a", false),
            ("SPIFFE://mesh.local/a", false),
            ("https://mesh.local/a", false),
            ("**", false),
            ("", false),
        ];
        for (text, valid) in identities {
            assert_eq!(IdentityPattern::new(text).is_some(), valid, "{text}");
        }
        let paths = [
            ("/", true),
            ("/*", true),
            ("/a", true),
            ("/a/", true),
            ("/a/*", true),
            ("/a b/\u{e9}", true),
            ("/100%", true),
            ("a", false),
            ("*", false),
            ("", false),
            ("/a*", false),
            ("/*/b", false),
            ("/a/../b", false),
            ("/a/.", false),
            ("//a", false),
            ("/a//b", false),
            ("/a//*", false),
            ("/a%2fb", false),
            ("/a?b=c", false),
            ("/a#b", false),
        ];
        for (text, valid) in paths {
            assert_eq!(PathPattern::new(text).is_some(), valid, "{text}");
        }
    }

    #[test]
    fn patterns_end_at_borders() {
        let identities = [
            ("spiffe://t/ns/a/*", "spiffe://t/ns/a/sa/b", true),
            ("spiffe://t/ns/a/*", "spiffe://t/ns/ab/sa/b", false),
            ("spiffe://t/ns/a/*", "spiffe://t/ns/a", false),
            ("spiffe://t/*", "spiffe://t/ns/a", true),
            ("spiffe://t/*", "spiffe://t.evil/ns/a", false),
            ("spiffe://t/ns/a", "spiffe://t/ns/a", true),
            ("spiffe://t/ns/a", "spiffe://t/ns/ab", false),
            ("*", "spiffe://any/thing", true),
        ];
        for (pattern, identity, expected) in identities {
            assert_eq!(
                IdentityPattern::new(pattern).unwrap().matches(identity),
                expected,
                "{pattern} {identity}"
            );
        }
        let paths = [
            ("/a/*", "/a/b", true),
            ("/a/*", "/a/b/c", true),
            ("/a/*", "/a/", true),
            ("/a/*", "/a", false),
            ("/a/*", "/ab", false),
            ("/a", "/a", true),
            ("/a", "/a/", false),
            ("/a", "/A", false),
            ("/*", "/", true),
            ("/*", "/x", true),
        ];
        for (pattern, path, expected) in paths {
            assert_eq!(PathPattern::new(pattern).unwrap().matches(path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn namespaces_and_accounts_are_read_from_identities() {
        let cases = [
            ("spiffe://t/ns/a/sa/b", Some("a"), Some("b")),
            ("spiffe://t/ns/a", Some("a"), None),
            ("spiffe://t/dc/d/ns/a/svc/b", Some("a"), None),
            ("spiffe://t/sa/ns/ns/sa", Some("sa"), Some("ns")),
            ("spiffe://t/service", None, None),
            ("nonsense", None, None),
        ];
        for (identity, ns, sa) in cases {
            assert_eq!((namespace(identity), service_account(identity)), (ns, sa), "{identity}");
        }
    }

    #[test]
    fn a_service_has_an_upstream_and_plugins_like_a_route() {
        let service = |more: Value| {
            let mut service = json!({"name": "orders", "upstream": {"nodes": {"127.0.0.1:80": 1}}});
            for (name, value) in more.as_object().unwrap() {
                service[name] = value.clone();
            }
            let mut service = typed::parse::<ServicePolicy>(&service)?;
            let errors = service.check(&TestCatalog);
            if errors.is_empty() { Ok(service) } else { Err(errors) }
        };
        let full = json!({"protocol": "grpc", "identities": ["spiffe://t/a"], "hosts": ["orders.local"],
            "plugins": {"limit-count": {"count": 1, "time_window": 1, "_meta": {"placement": "sidecar"}}}});
        assert!(service(full).is_ok());
        for (more, pointer) in [
            (json!({"upstream": {}}), "/upstream"),
            (json!({"upstream": {"nodes": {"a:80": 1}, "retry": 1}}), "/upstream/retry"),
            (json!({"protocol": "udp"}), "/protocol"),
            (json!({"plugins": {"nonsense": {}}}), "/plugins/nonsense"),
            (json!({"plugins": {"limit-count": 1}}), "/plugins/limit-count"),
            (
                json!({"plugins": {"limit-count": {"count": 1, "time_window": 1, "_meta": {"placement": "mesh"}}}}),
                "/plugins/limit-count/_meta/placement",
            ),
            (json!({"hosts": ["orders:80"]}), "/hosts/0"),
        ] {
            let errors = service(more.clone()).unwrap_err();
            assert!(errors.iter().any(|error| error.pointer == pointer), "{more}: {errors:?}");
        }
    }
}
