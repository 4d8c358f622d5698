//! Upstreams: where requests go, how a node is chosen, how nodes are watched.
//!
//! The fields, defaults and rules are those of APISIX. Fields that APISIX does not have are marked as an
//! extension; without them an upstream behaves as there.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU16;
use std::ops::Deref;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::error::{ConfigError, ErrorKind};
use crate::fields::{
    Desc, Distinct, Host, HttpStatus, Int, Labels, List, Method, Name, OwnId, Seconds, Text, Timeout,
    Timestamp,
};
use crate::id::Id;
use crate::rules::{self, Rule, Rules};
use crate::secret_ref::Literals;
use crate::sensitive::PrivateKey;

pub mod discovery;
pub mod extensions;

use discovery::{DiscoveryArgs, DiscoveryOptions, Failover, Locality};
use extensions::{Breaker, Retry, Sticky};

/// Nodes with the same service behind them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = Rules(RULES))]
pub struct Upstream {
    /// The id, if the object carries it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    pub id: OwnId,
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// A description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desc: Option<Desc>,
    /// Attributes by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Box<Labels>>,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,

    /// The nodes: `{"host:port": weight}`, or a list of `{host, port, weight, priority, metadata}`. Either these
    /// or `service_name` with `discovery_type`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<Nodes>,
    /// The name under which service discovery knows the nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_name: Option<Text<1, 256>>,
    /// Which service discovery is asked: a kind that `discovery` of `config.yaml` configures, such as `consul` or
    /// `kubernetes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discovery_type: Option<Text<1, 256>>,
    /// Details for service discovery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discovery_args: Option<Box<DiscoveryArgs>>,

    /// How a node is chosen.
    #[serde(default, rename = "type")]
    pub algorithm: Algorithm,
    /// What `chash` hashes.
    #[serde(default)]
    pub hash_on: HashOn,
    /// The variable, header or cookie that `chash` hashes; not used when `hash_on` is `consumer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Text<1, 1024>>,
    /// The protocol spoken to the nodes.
    #[serde(default)]
    pub scheme: Scheme,
    /// Which `Host` the nodes see.
    #[serde(default)]
    pub pass_host: PassHost,
    /// The `Host` the nodes see when `pass_host` is `rewrite`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_host: Option<Box<Host>>,

    /// How many more nodes are tried after a failure; 0 for none. The number of nodes less one if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// Time after which no further node is tried, in seconds; 0 for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_timeout: Option<Box<Seconds<true>>>,
    /// Time limits of one attempt. 60 s each if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Box<Timeout>>,
    /// The pool of idle connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive_pool: Option<Box<KeepalivePool>>,
    /// TLS to the nodes, for the schemes `https`, `grpcs` and `tls`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Box<UpstreamTls>>,
    /// Health checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checks: Option<Box<Checks>>,

    /// Extension: who the nodes are in the mesh, as SPIFFE ids: `spiffe://mesh.local/ns/default/sa/orders`, or a beginning
    /// with `/*`. A node's own `metadata.identity` wins. Any of our trust domain if both are absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identities: Option<Box<Distinct<Text<1, 2048>>>>,
    /// Extension: HTTP/2 is spoken to the nodes of an `http` or `https` upstream, without asking first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub http2: bool,
    /// Extension: how much of the load may be retries. May also be written `retry.budget`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_budget: Option<Box<RetryBudget>>,
    /// Extension: what is tried again at another node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Box<Retry>>,
    /// Extension: takes a node out of use for a while after failures of live traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub breaker: Option<Box<Breaker>>,
    /// Extension: sends the requests of one session to one node, known by a cookie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sticky: Option<Box<Sticky>>,
    /// Extension: the time in which the share of a node that is new, or healthy again, grows to its full weight, in
    /// seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_start: Option<Box<Seconds>>,
    /// Extension: what happens when health checks have found every node unhealthy.
    #[serde(default, skip_serializing_if = "AllUnhealthy::is_default")]
    pub all_unhealthy: AllUnhealthy,
    /// Extension: while a smaller percentage of the nodes is healthy, unhealthy ones are used as well; 0 for only when
    /// none is healthy, as in APISIX. Of several priorities, one that falls below is passed over while another stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub panic_threshold: Option<Int<0, 100>>,
    /// Extension: prefers nodes that are near.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locality: Option<Box<Locality>>,
    /// Extension: when traffic returns to nodes of a better priority that were out of use. At once if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<Box<Failover>>,
    /// Extension: several sources of nodes together, and how carefully nodes are let go of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discovery: Option<Box<DiscoveryOptions>>,
    /// Extension: how node names are resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<Box<DnsOptions>>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

impl Upstream {
    /// The port of a node: the one it names, or the usual one of the scheme.
    #[must_use]
    pub fn port_of(&self, node: &Node) -> u16 {
        node.port.map_or_else(|| self.scheme.default_port(), NonZeroU16::get)
    }

    /// Time limits of one attempt.
    #[must_use]
    pub fn timeout(&self) -> Timeout {
        self.timeout.as_deref().copied().unwrap_or_default()
    }

    /// The pool of idle connections.
    #[must_use]
    pub fn keepalive_pool(&self) -> KeepalivePool {
        self.keepalive_pool.as_deref().copied().unwrap_or_default()
    }

    /// Keeps no idle connection of a pool of its own longer than this.
    pub fn bound_idle(&mut self, limit: std::time::Duration) {
        let Some(pool) = &mut self.keepalive_pool else { return };
        let idle = pool.idle_timeout.duration();
        let limit = if idle.is_zero() { limit } else { idle.min(limit) };
        if let Some(limit) = Seconds::new(limit.as_secs_f64()) {
            pool.idle_timeout = IdleTimeout(limit);
        }
    }

    /// How much of the load may be retries.
    #[must_use]
    pub fn retry_budget(&self) -> RetryBudget {
        let inner = self.retry.as_deref().and_then(|retry| retry.budget);
        inner.or(self.retry_budget.as_deref().copied()).unwrap_or_default()
    }

    /// Everything the type alone does not say that is wrong, for an upstream inside the settings of a plugin.
    /// Pointers are inside the upstream.
    #[must_use]
    pub fn errors(&self) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if let Ok(Value::Object(written)) = serde_json::to_value(self) {
            check_fields(&written, "", &mut errors);
        }
        self.check("", &mut errors);
        errors
    }

    /// The rules between values of fields.
    pub(crate) fn check(&self, at: &str, errors: &mut Vec<ConfigError>) {
        let mut error = |pointer: &str, kind| errors.push(ConfigError::new(format!("{at}{pointer}"), kind));
        if let Some(nodes) = &self.nodes {
            self.check_nodes(nodes, "/nodes", &mut error);
        }
        if let Some(discovery) = &self.discovery {
            discovery.check(self.nodes.is_some() || self.service_name.is_some(), &mut error);
            for (index, source) in discovery.sources.iter().flatten().enumerate() {
                if let Some(nodes) = &source.nodes {
                    self.check_nodes(nodes, &format!("/discovery/sources/{index}/nodes"), &mut error);
                }
            }
        }
        if let Some(failover) = &self.failover {
            failover.check(&mut error);
        }
        if self.algorithm == Algorithm::Chash {
            self.check_key(&mut error);
        }
        if let Some(sticky) = &self.sticky {
            sticky.check(&mut error);
        }
        if self.retry_budget.is_some() && self.retry.as_ref().is_some_and(|retry| retry.budget.is_some()) {
            error("", ErrorKind::Exclusive { one: "retry_budget", other: "retry.budget" });
        }
    }

    fn check_nodes(&self, nodes: &Nodes, at: &str, error: &mut impl FnMut(&str, ErrorKind)) {
        for (index, node) in nodes.iter().enumerate() {
            let place = || match nodes.form {
                NodesForm::List => format!("{at}/{index}"),
                NodesForm::Map => format!("{at}/{}", crate::error::escape(&node.address())),
            };
            if node.port.is_none() && !self.scheme.is_http() {
                let found = node.address();
                let expected = "host:port, for the scheme has no usual port".to_owned();
                error(&place(), ErrorKind::BadFormat { found, expected });
            }
            if node.host.contains('*') {
                let found = node.host.to_string();
                error(
                    &place(),
                    ErrorKind::BadFormat { found, expected: "the host of a single node".to_owned() },
                );
            }
        }
    }

    fn check_key(&self, error: &mut impl FnMut(&str, ErrorKind)) {
        let Some(key) = self.key.as_deref() else { return };
        let word = |text: &str| {
            !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        };
        let (valid, expected) = match self.hash_on {
            HashOn::Vars => (
                HASH_VARS.contains(&key) || key.strip_prefix("arg_").is_some_and(word),
                format!("a variable to hash: write one of {} or arg_NAME", HASH_VARS.join(", ")),
            ),
            HashOn::Header | HashOn::Cookie => (word(key), "a name of a-z A-Z 0-9 - _".to_owned()),
            HashOn::VarsCombinations | HashOn::Consumer => return,
        };
        if !valid {
            error("/key", ErrorKind::BadFormat { found: key.to_owned(), expected });
        }
    }
}

const RULES: &[Rule] = &[
    Rule::AnyOf(&["nodes", "service_name", "discovery"]),
    Rule::AtMostOne("nodes", "service_name"),
    Rule::Needs { field: "service_name", needs: "discovery_type" },
    Rule::When { field: "pass_host", is: "rewrite", needs: "upstream_host", unless: None },
    Rule::When { field: "type", is: "chash", needs: "key", unless: Some(("hash_on", "consumer")) },
];

const CHECKS_RULES: &[Rule] = &[Rule::AnyOf(&["active", "passive"])];

const TLS_RULES: &[Rule] = &[
    Rule::Needs { field: "client_cert", needs: "client_key" },
    Rule::Needs { field: "client_key", needs: "client_cert" },
    Rule::AtMostOne("client_cert_id", "client_cert"),
    Rule::AtMostOne("ca_certs", "ca"),
];

/// The rules between fields of the upstream at `at`, as it is written.
pub(crate) fn check_fields(upstream: &Map<String, Value>, at: &str, errors: &mut Vec<ConfigError>) {
    rules::check(RULES, upstream, at, errors);
    for (field, rules) in [("tls", TLS_RULES), ("checks", CHECKS_RULES)] {
        if let Some(Value::Object(inner)) = upstream.get(field) {
            rules::check(rules, inner, &format!("{at}/{field}"), errors);
        }
    }
    extensions::misplaced(upstream, at, errors);
    if upstream.get("scheme").and_then(Value::as_str) == Some("kafka") {
        let what = "`scheme: kafka`".to_owned();
        let kind = ErrorKind::Unsupported {
            what,
            instead: "use a Kafka client that speaks to the brokers".to_owned(),
        };
        errors.push(ConfigError::new(format!("{at}/scheme"), kind));
    }
}

/// What `chash` can hash when `hash_on` is `vars`, beside `arg_NAME`.
const HASH_VARS: [&str; 10] = [
    "uri",
    "server_name",
    "server_addr",
    "request_uri",
    "remote_port",
    "remote_addr",
    "query_string",
    "host",
    "hostname",
    "mqtt_client_id",
];

/// The nodes of an upstream, written as a map of weights or as a list.
#[derive(Clone, PartialEq, Eq)]
pub struct Nodes {
    list: Box<[Node]>,
    form: NodesForm,
}

/// How nodes were written, and are written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodesForm {
    /// `{"host:port": weight}`.
    Map,
    /// `[{"host": .., "port": .., "weight": ..}]`.
    List,
}

impl Nodes {
    /// Nodes that are written as a list.
    #[must_use]
    pub fn new(list: Vec<Node>) -> Nodes {
        Nodes { list: list.into(), form: NodesForm::List }
    }

    /// How they were written.
    #[must_use]
    pub fn form(&self) -> NodesForm {
        self.form
    }
}

impl Deref for Nodes {
    type Target = [Node];

    fn deref(&self) -> &[Node] {
        &self.list
    }
}

impl<'a> IntoIterator for &'a Nodes {
    type Item = &'a Node;
    type IntoIter = std::slice::Iter<'a, Node>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.iter()
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.list, f)
    }
}

/// One node of an upstream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// An address or a name to resolve. IPv6 may stand in brackets.
    pub host: Host,
    /// The port, 1 to 65535. The usual port of the scheme if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
    /// The share of requests relative to the other nodes; 0 for none.
    pub weight: u32,
    /// Nodes of a lower priority get requests only when those of a higher one are out of use.
    #[serde(default)]
    pub priority: i32,
    /// Whatever people want to say about the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Box<Map<String, Value>>>,
}

impl Node {
    /// The host without the brackets of IPv6: what can be parsed as an address or resolved.
    #[must_use]
    pub fn bare_host(&self) -> &str {
        self.host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&self.host)
    }

    /// `host:port` with brackets around IPv6, or the host alone: the key of the map form.
    #[must_use]
    pub fn address(&self) -> String {
        let Some(port) = self.port else { return self.host.to_string() };
        if self.host.contains(':') && !self.host.starts_with('[') {
            return format!("[{}]:{port}", &*self.host);
        }
        format!("{}:{port}", &*self.host)
    }

    /// A node from the key of the map form.
    fn parse(address: &str, weight: u32) -> Option<Node> {
        let (host, port) = match address.strip_prefix('[') {
            Some(rest) => {
                let (v6, after) = rest.split_once(']')?;
                v6.parse::<std::net::Ipv6Addr>().ok()?;
                let port = if after.is_empty() { None } else { Some(after.strip_prefix(':')?) };
                (address.get(..v6.len() + 2)?, port)
            }
            None => match address.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            },
        };
        let port = match port {
            // A further colon would be an IPv6 address without brackets, which has no certain port.
            Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => Some(port.parse().ok()?),
            Some(_) => return None,
            None => None,
        };
        Some(Node { host: Host::new(host)?, port, weight, priority: 0, metadata: None })
    }
}

const ADDRESS_RULE: &str = "host:port as the name of a node, with IPv6 in brackets";

impl Serialize for Nodes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.form {
            NodesForm::Map => {
                let mut map = serializer.serialize_map(Some(self.list.len()))?;
                for node in &self.list {
                    map.serialize_entry(&node.address(), &node.weight)?;
                }
                map.end()
            }
            NodesForm::List => {
                let mut list = serializer.serialize_seq(Some(self.list.len()))?;
                for node in &self.list {
                    list.serialize_element(node)?;
                }
                list.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Nodes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Nodes, D::Error> {
        struct NodesVisitor;

        impl<'de> Visitor<'de> for NodesVisitor {
            type Value = Nodes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("{\"host:port\": weight}, or a list of {host, port, weight}")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Nodes, A::Error> {
                let mut list = Vec::with_capacity(map.size_hint().unwrap_or(0).min(1024));
                while let Some((address, weight)) = map.next_entry::<Cow<'de, str>, u32>()? {
                    let node = Node::parse(&address, weight).ok_or_else(|| {
                        de::Error::custom(format_args!("`{address}` is not {ADDRESS_RULE}"))
                    })?;
                    list.push(node);
                }
                Ok(Nodes { list: list.into(), form: NodesForm::Map })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Nodes, A::Error> {
                let mut list = Vec::with_capacity(seq.size_hint().unwrap_or(0).min(1024));
                while let Some(node) = seq.next_element()? {
                    list.push(node);
                }
                Ok(Nodes { list: list.into(), form: NodesForm::List })
            }
        }

        deserializer.deserialize_any(NodesVisitor)
    }
}

impl JsonSchema for Nodes {
    fn schema_name() -> Cow<'static, str> {
        "Nodes".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {
                        "pattern": r"^(\[[0-9a-fA-F:.]+\]|[0-9a-zA-Z_.-]+)(:\d{1,5})?$",
                        "x-expected": ADDRESS_RULE,
                    },
                    "additionalProperties": {"type": "integer", "minimum": 0, "description": "The weight of the node."},
                },
                {"type": "array", "items": generator.subschema_for::<Node>()},
            ],
        })
    }
}

/// How a node is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// In turn, by weight.
    #[default]
    #[serde(rename = "roundrobin")]
    RoundRobin,
    /// By a hash: the same key goes to the same node, and few keys move when nodes change.
    Chash,
    /// The node that answered fastest lately.
    Ewma,
    /// The node with the fewest requests under way, relative to its weight.
    LeastConn,
    /// Extension: at random, by weight.
    Random,
}

/// What `chash` hashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HashOn {
    /// The variable that `key` names.
    #[default]
    Vars,
    /// The header that `key` names.
    Header,
    /// The cookie that `key` names.
    Cookie,
    /// The name of the consumer.
    Consumer,
    /// The text of `key` with its `$variables` filled in.
    VarsCombinations,
}

/// The protocol spoken to the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    /// HTTP/1.1 without TLS.
    #[default]
    Http,
    /// HTTP with TLS.
    Https,
    /// gRPC over HTTP/2 without TLS.
    Grpc,
    /// gRPC over HTTP/2 with TLS.
    Grpcs,
    /// HTTP or gRPC over the mesh: TLS with the identities of both ends, several requests on one connection.
    Mesh,
    /// TCP, for stream routes.
    Tcp,
    /// TLS over TCP, for stream routes.
    Tls,
    /// UDP, for stream routes.
    Udp,
}

impl Scheme {
    /// Whether it carries HTTP.
    #[must_use]
    pub fn is_http(self) -> bool {
        matches!(self, Scheme::Http | Scheme::Https | Scheme::Grpc | Scheme::Grpcs | Scheme::Mesh)
    }

    /// Whether it is encrypted with what the upstream's `tls` says.
    #[must_use]
    pub fn is_tls(self) -> bool {
        matches!(self, Scheme::Https | Scheme::Grpcs | Scheme::Tls)
    }

    /// The port of a node that names none.
    #[must_use]
    pub fn default_port(self) -> u16 {
        if self.is_tls() { 443 } else { 80 }
    }
}

/// Which `Host` the nodes see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PassHost {
    /// That of the client.
    #[default]
    Pass,
    /// That of the node.
    Node,
    /// `upstream_host`.
    Rewrite,
}

/// The pool of idle connections to the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KeepalivePool {
    /// How many idle connections are kept.
    pub size: Int<1, { u32::MAX }, 320>,
    /// How long an idle connection is kept, in seconds; 0 for as long as it lives.
    pub idle_timeout: IdleTimeout,
    /// How many requests a connection serves before it is closed.
    pub requests: Int<1, { u32::MAX }, 1000>,
}

/// How long an idle connection is kept: 60 s if nothing is written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct IdleTimeout(Seconds<true>);

impl Default for IdleTimeout {
    fn default() -> IdleTimeout {
        IdleTimeout(Seconds::whole(60))
    }
}

impl Deref for IdleTimeout {
    type Target = Seconds<true>;

    fn deref(&self) -> &Seconds<true> {
        &self.0
    }
}

/// TLS to the nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = describe_tls)]
pub struct UpstreamTls {
    /// The `ssl` object of type `client` whose certificate is shown to the nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert_id: Option<Id>,
    /// The certificate shown to the nodes, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert: Option<Text<128, 65536>>,
    /// The private key of `client_cert`, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_key: Option<Box<PrivateKey>>,
    /// Whether the certificates of the nodes are verified. Not verified if it is absent, as in APISIX.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<bool>,
    /// The authorities that certificates of the nodes are verified against, in PEM; those of the system if it
    /// is absent. May also be written `ca`.
    #[serde(default, alias = "ca", skip_serializing_if = "Option::is_none")]
    pub ca_certs: Option<List<Text<128, 65536>>>,
}

/// The other name of `ca_certs`, and the rules.
fn describe_tls(schema: &mut Schema) {
    if let Some(Value::Object(properties)) = schema.get_mut("properties")
        && let Some(ca_certs) = properties.get("ca_certs").cloned()
    {
        properties.insert("ca".to_owned(), ca_certs);
    }
    rules::describe(schema, TLS_RULES);
}

/// Health checks of nodes. APISIX wants active ones for passive ones to work; here either works alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = Rules(CHECKS_RULES))]
pub struct Checks {
    /// Probes that are sent to the nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active: Option<Box<ActiveCheck>>,
    /// What the answers to requests tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passive: Option<Box<PassiveCheck>>,
}

/// The protocol of a health check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckType {
    /// An HTTP request.
    #[default]
    Http,
    /// An HTTP request over TLS.
    Https,
    /// A TCP connection.
    Tcp,
}

/// Probes that are sent to the nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ActiveCheck {
    /// The protocol of the probe.
    #[serde(default, rename = "type")]
    pub kind: CheckType,
    /// Time limit of one probe, in seconds.
    #[serde(default = "one_second")]
    pub timeout: Seconds,
    /// How many nodes are probed at the same time.
    #[serde(default)]
    pub concurrency: Int<1, { u32::MAX }, 10>,
    /// The `Host` of the probe. That of the node if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    /// The port of the probe, 1 to 65535. That of the node if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
    /// The method of the probe.
    #[serde(default = "get")]
    pub http_method: Method,
    /// The path and query of the probe.
    #[serde(default = "root")]
    pub http_path: Box<str>,
    /// The body of the probe.
    #[serde(default)]
    pub http_req_body: Box<str>,
    /// Whether the certificate of the node is verified when `type` is `https`.
    #[serde(default = "yes")]
    pub https_verify_certificate: bool,
    /// Headers of the probe, as `Name: value`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub req_headers: Option<List<Box<str>>>,
    /// When a node is healthy again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthy: Option<ActiveHealthy>,
    /// When a node is unhealthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy: Option<ActiveUnhealthy>,
}

impl ActiveCheck {
    /// When a node is healthy again, defaults filled in.
    #[must_use]
    pub fn healthy(&self) -> ActiveHealthy {
        self.healthy.clone().unwrap_or_default()
    }

    /// When a node is unhealthy, defaults filled in.
    #[must_use]
    pub fn unhealthy(&self) -> ActiveUnhealthy {
        self.unhealthy.clone().unwrap_or_default()
    }
}

fn one_second() -> Seconds {
    Seconds::whole(1)
}

fn get() -> Method {
    Method::Get
}

fn root() -> Box<str> {
    "/".into()
}

fn yes() -> bool {
    true
}

/// When probes find a node healthy again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ActiveHealthy {
    /// Time between two probes of a healthy node, in seconds.
    pub interval: Int<1, { u32::MAX }, 1>,
    /// The statuses of a healthy node.
    pub http_statuses: Distinct<HttpStatus>,
    /// How many probes in a row must succeed.
    pub successes: Int<1, 254, 2>,
}

impl Default for ActiveHealthy {
    fn default() -> ActiveHealthy {
        ActiveHealthy {
            interval: Int::default(),
            http_statuses: statuses(&[200, 302]),
            successes: Int::default(),
        }
    }
}

/// When probes find a node unhealthy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ActiveUnhealthy {
    /// Time between two probes of an unhealthy node, in seconds.
    pub interval: Int<1, { u32::MAX }, 1>,
    /// The statuses of an unhealthy node.
    pub http_statuses: Distinct<HttpStatus>,
    /// How many such statuses in a row it takes.
    pub http_failures: Int<1, 254, 5>,
    /// How many failures to connect in a row it takes.
    pub tcp_failures: Int<1, 254, 2>,
    /// How many time-outs in a row it takes.
    pub timeouts: Int<1, 254, 3>,
}

impl Default for ActiveUnhealthy {
    fn default() -> ActiveUnhealthy {
        ActiveUnhealthy {
            interval: Int::default(),
            http_statuses: statuses(&[429, 404, 500, 501, 502, 503, 504, 505]),
            http_failures: Int::default(),
            tcp_failures: Int::default(),
            timeouts: Int::default(),
        }
    }
}

/// What the answers to requests tell about a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PassiveCheck {
    /// What counts: statuses of answers, or for `tcp` connections only.
    #[serde(default, rename = "type")]
    pub kind: CheckType,
    /// When a node is healthy again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthy: Option<PassiveHealthy>,
    /// When a node is unhealthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy: Option<PassiveUnhealthy>,
}

impl PassiveCheck {
    /// When a node is healthy again, defaults filled in.
    #[must_use]
    pub fn healthy(&self) -> PassiveHealthy {
        self.healthy.clone().unwrap_or_default()
    }

    /// When a node is unhealthy, defaults filled in.
    #[must_use]
    pub fn unhealthy(&self) -> PassiveUnhealthy {
        self.unhealthy.clone().unwrap_or_default()
    }
}

/// When answers show a node healthy again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PassiveHealthy {
    /// The statuses of a healthy node.
    pub http_statuses: Distinct<HttpStatus>,
    /// How many such answers in a row it takes; 0 for never.
    pub successes: Int<0, 254, 5>,
}

impl Default for PassiveHealthy {
    fn default() -> PassiveHealthy {
        PassiveHealthy {
            http_statuses: statuses(&[
                200, 201, 202, 203, 204, 205, 206, 207, 208, 226, 300, 301, 302, 303, 304, 305, 306, 307, 308,
            ]),
            successes: Int::default(),
        }
    }
}

/// When answers show a node unhealthy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PassiveUnhealthy {
    /// The statuses of an unhealthy node.
    pub http_statuses: Distinct<HttpStatus>,
    /// How many such statuses in a row it takes; 0 for never.
    pub http_failures: Int<0, 254, 5>,
    /// How many failures to connect in a row it takes; 0 for never.
    pub tcp_failures: Int<0, 254, 2>,
    /// How many time-outs in a row it takes; 0 for never.
    pub timeouts: Int<0, 254, 7>,
}

impl Default for PassiveUnhealthy {
    fn default() -> PassiveUnhealthy {
        PassiveUnhealthy {
            http_statuses: statuses(&[429, 500, 503]),
            http_failures: Int::default(),
            tcp_failures: Int::default(),
            timeouts: Int::default(),
        }
    }
}

fn statuses<const MIN: usize>(list: &[u32]) -> Distinct<HttpStatus, MIN> {
    let list: Vec<HttpStatus> = list.iter().filter_map(|status| Int::new(*status)).collect();
    Distinct::of_constants(list)
}

/// How much of the load may be retries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RetryBudget {
    /// Retries per hundred requests.
    pub percent: Int<0, 1000, 20>,
    /// Retries each second that are allowed in any case.
    pub min_per_second: Int<0, 1_000_000, 10>,
}

/// What happens when health checks have found every node unhealthy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AllUnhealthy {
    /// All nodes are used, as if none were checked.
    #[default]
    UseAll,
    /// Requests are answered with 503.
    Refuse,
}

impl AllUnhealthy {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
    fn is_default(&self) -> bool {
        *self == AllUnhealthy::UseAll
    }
}

/// How names are resolved, those of nodes and that of a service of `discovery_type: dns`. What is absent is as
/// `config.yaml` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DnsOptions {
    /// An answer is kept at least so long, in seconds, whatever its own time to live.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_ttl: Option<Int<1, 86_400>>,
    /// An answer is kept at most so long, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_ttl: Option<Int<1, 86_400>>,
    /// Seconds between two questions, whatever the answers say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refresh: Option<Int<1, 86_400>>,
    /// Addresses that an answer leaves out stay for so long, in seconds: for servers that give a part of the set at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<Int<1, 86_400>>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn upstream(value: Value) -> Upstream {
        Upstream::deserialize(value).unwrap()
    }

    #[test]
    fn nodes_are_read_in_both_forms_and_written_as_they_were() {
        for (written, expected) in [
            (json!({"a:80": 1}), vec![("a", "a", 80, 1, 0)]),
            (json!({"a": 2}), vec![("a", "a", 443, 2, 0)]),
            (
                json!({"[::1]:8080": 1, "[::2]": 0}),
                vec![("[::1]", "::1", 8080, 1, 0), ("[::2]", "::2", 443, 0, 0)],
            ),
            (
                json!([{"host": "[::1]", "port": 1, "weight": 1, "priority": -1}]),
                vec![("[::1]", "::1", 1, 1, -1)],
            ),
            (json!([{"host": "::1", "port": 1, "weight": 1, "priority": 0}]), vec![("::1", "::1", 1, 1, 0)]),
        ] {
            let upstream = upstream(json!({"nodes": written, "scheme": "https"}));
            let nodes = upstream.nodes.as_ref().unwrap();
            let found: Vec<_> = nodes
                .iter()
                .map(|n| (&*n.host, n.bare_host(), upstream.port_of(n), n.weight, n.priority))
                .collect();
            assert_eq!(found, expected, "{written}");
            assert_eq!(serde_json::to_value(nodes).unwrap(), written);
        }
    }

    #[test]
    fn addresses_without_a_certain_port_are_refused() {
        for address in [
            "", ":80", "a:", "a:0", "a:65536", "a:+1", "::1", "[::1", "[a]:80", "[::1]80", "[::1]:", "a b:1",
            "*:80x",
        ] {
            let read = Nodes::deserialize(json!({address: 1}));
            assert!(read.is_err(), "{address} {read:?}");
        }
    }

    #[test]
    fn the_usual_port_is_that_of_the_scheme() {
        for (scheme, port) in [("http", 80), ("grpc", 80), ("https", 443), ("grpcs", 443)] {
            let upstream = upstream(json!({"nodes": {"a": 1}, "scheme": scheme}));
            assert_eq!(upstream.port_of(&upstream.nodes.as_ref().unwrap()[0]), port, "{scheme}");
        }
    }

    #[test]
    fn an_address_reads_back_as_the_node() {
        for address in ["a:80", "a", "[::1]:80", "[::1]", "10.0.0.1:1"] {
            assert_eq!(Node::parse(address, 1).unwrap().address(), address);
        }
        let bare = Node { host: Host::new("::1").unwrap(), ..Node::parse("a:80", 1).unwrap() };
        assert_eq!(bare.address(), "[::1]:80");
    }

    #[test]
    fn an_upstream_in_a_plugin_obeys_the_same_rules() {
        for (value, expected) in [
            (json!({"nodes": {"a:80": 1}}), vec![]),
            (json!({}), vec![""]),
            (
                json!({"nodes": {"a": 1}, "type": "chash", "checks": {}, "scheme": "tcp"}),
                vec!["", "/checks", "/nodes/a"],
            ),
            (json!({"nodes": {}, "type": "chash", "key": "x"}), vec!["/key"]),
        ] {
            let errors = upstream(value.clone()).errors();
            let places: Vec<&str> = errors.iter().map(|error| error.pointer.as_str()).collect();
            assert_eq!(places, expected, "{value} {errors:?}");
        }
    }

    #[test]
    fn what_is_absent_has_its_default() {
        let upstream = upstream(json!({"nodes": {}}));
        assert_eq!(upstream.timeout().read.as_f64(), 60.0);
        assert_eq!(upstream.keepalive_pool().size.get(), 320);
        assert_eq!(
            (upstream.retry_budget().percent.get(), upstream.retry_budget().min_per_second.get()),
            (20, 10)
        );
        assert_eq!(upstream.all_unhealthy, AllUnhealthy::UseAll);
    }
}
