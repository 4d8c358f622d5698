//! Where an upstream finds its nodes besides writing them down, and how it chooses among those it finds: several
//! registries together, how carefully nodes are let go of, when all are used, which are near, when traffic returns.
//!
//! `service_name`, `discovery_type` and `discovery_args` are APISIX's. Everything in this file but [`DiscoveryArgs`] is an
//! extension, and an upstream without it behaves as there.

use std::borrow::Cow;
use std::fmt;

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Number;

use super::{Nodes, Upstream};
use crate::error::ErrorKind;
use crate::fields::{Distinct, Int, Seconds, StrVisitor, Text};

/// Details for service discovery, by name. Which ones there are depends on the kind of registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "IndexMap<Box<str>, Arg>", into = "IndexMap<Box<str>, Arg>")]
pub struct DiscoveryArgs(IndexMap<Box<str>, Arg>);

/// What Nacos is asked for is text and nothing else, as in APISIX.
const TEXTS: [&str; 2] = ["namespace_id", "group_name"];

impl TryFrom<IndexMap<Box<str>, Arg>> for DiscoveryArgs {
    type Error = String;

    fn try_from(args: IndexMap<Box<str>, Arg>) -> Result<Self, String> {
        let wrong =
            TEXTS.iter().find(|name| args.get(**name).is_some_and(|arg| !matches!(arg, Arg::Text(_))));
        wrong.map_or(Ok(DiscoveryArgs(args)), |name| Err(format!("`{name}` has to be a string")))
    }
}

impl From<DiscoveryArgs> for IndexMap<Box<str>, Arg> {
    fn from(args: DiscoveryArgs) -> Self {
        args.0
    }
}

/// One detail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Arg {
    Flag(bool),
    Number(Number),
    Text(Box<str>),
    Texts(Vec<Box<str>>),
}

impl fmt::Display for Arg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arg::Flag(flag) => flag.fmt(f),
            Arg::Number(number) => number.fmt(f),
            Arg::Text(text) => text.fmt(f),
            Arg::Texts(texts) => texts.join(",").fmt(f),
        }
    }
}

impl DiscoveryArgs {
    /// Names and values, as text; several values are separated by commas.
    pub fn iter(&self) -> impl Iterator<Item = (&str, String)> {
        self.0.iter().map(|(name, arg)| (&**name, arg.to_string()))
    }
}

impl JsonSchema for DiscoveryArgs {
    fn schema_name() -> Cow<'static, str> {
        "DiscoveryArgs".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "properties": {
                "namespace_id": {"type": "string", "description": "The namespace, for Nacos."},
                "group_name": {"type": "string", "description": "The group, for Nacos."},
            },
            "additionalProperties": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "number"},
                    {"type": "boolean"},
                    {"type": "array", "items": {"type": "string"}},
                ],
            },
        })
    }
}

/// More sources than anybody has, fewer than would hurt.
const MAX_SOURCES: usize = 16;
/// Windows of one upstream.
const MAX_WINDOWS: usize = 64;

/// Several sources of nodes together, and how carefully nodes are let go of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DiscoveryOptions {
    /// How several sources become one list.
    #[serde(skip_serializing_if = "Merge::is_default")]
    pub merge: Merge,
    /// Further sources, after the `nodes` or the `service_name` of the upstream, in the order of preference.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub sources: Option<Vec<NodeSource>>,
    /// The part of the traffic that goes to the `nodes` or the `service_name` of the upstream, where sources have
    /// weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<Int<0, 1000>>,
    /// A registry that has not answered for so long, in seconds, makes the upstream degraded. Never if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_stale: Option<Seconds>,
    /// Whether nodes are taken out once their registry has not answered for `max_stale`. Otherwise they serve on.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub drop_stale: bool,
    /// How long a registry has to go on saying that a service has no node, in seconds, unless it says so twice. 3 s if
    /// it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub empty_confirm: Option<Seconds<true>>,
    /// More than this percentage of the nodes taken away at once is let go of slowly, as far as they still answer; 100
    /// for never. 50 if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_limit: Option<Int<0, 100>>,
}

/// How several sources become one list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Merge {
    /// What any source lists. Of a node that several list the best health counts.
    #[default]
    Union,
    /// As union, but a later source gets requests only when nothing of the earlier ones can be used.
    Prefer,
    /// What every source lists. The worst health counts.
    Intersect,
}

impl Merge {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
    fn is_default(&self) -> bool {
        *self == Merge::Union
    }
}

/// One more source of nodes: a service of a registry, or nodes that are written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeSource {
    /// Which service discovery is asked: a kind that `discovery` of `config.yaml` configures.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<Text<1, 256>>,
    /// The name of the service, in the form that the kind needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Text<1, 256>>,
    /// Details, as `discovery_args`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args: Option<Box<DiscoveryArgs>>,
    /// Nodes, in place of `type` and `service`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<Nodes>,
    /// The part of the traffic that goes here, relative to the other sources, whatever the weights of their nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Int<0, 1000>>,
}

/// A source of nodes of an upstream, wherever in it it is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part<'a> {
    /// Where it is written, as a pointer into the upstream.
    pub place: Place,
    /// What it is.
    pub origin: Origin<'a>,
    /// Its part of the traffic.
    pub weight: Option<u32>,
}

/// Where a source of nodes is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At the top of the upstream.
    Top,
    /// In `discovery.sources`.
    Source(usize),
}

impl Place {
    /// The pointer to the name of the kind.
    #[must_use]
    pub fn of_kind(self) -> String {
        match self {
            Place::Top => "/discovery_type".to_owned(),
            Place::Source(index) => format!("/discovery/sources/{index}/type"),
        }
    }

    /// The pointer to the name of the service.
    #[must_use]
    pub fn of_service(self) -> String {
        match self {
            Place::Top => "/service_name".to_owned(),
            Place::Source(index) => format!("/discovery/sources/{index}/service"),
        }
    }
}

/// Nodes, or the service of a registry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Origin<'a> {
    /// Nodes that are written down.
    Nodes(&'a Nodes),
    /// A service of a registry.
    Service {
        /// `discovery_type`.
        kind: &'a str,
        /// `service_name`.
        service: &'a str,
        /// `discovery_args`.
        args: Option<&'a DiscoveryArgs>,
    },
}

impl Upstream {
    /// Its sources of nodes, in the order of preference.
    #[must_use]
    pub fn parts(&self) -> Vec<Part<'_>> {
        let options = self.discovery.as_deref();
        let weight = |weight: Option<Int<0, 1000>>| weight.map(Int::get);
        let top = match (&self.nodes, &self.service_name, &self.discovery_type) {
            (Some(nodes), _, _) => Some(Origin::Nodes(nodes)),
            (None, Some(service), Some(kind)) => {
                Some(Origin::Service { kind, service, args: self.discovery_args.as_deref() })
            }
            _ => None,
        };
        let top = top.map(|origin| Part {
            place: Place::Top,
            origin,
            weight: weight(options.and_then(|options| options.weight)),
        });
        let sources = options.and_then(|options| options.sources.as_deref()).unwrap_or_default();
        let sources = sources.iter().enumerate().filter_map(|(index, source)| {
            let origin = match (&source.nodes, &source.service, &source.kind) {
                (Some(nodes), _, _) => Origin::Nodes(nodes),
                (None, Some(service), Some(kind)) => {
                    Origin::Service { kind, service, args: source.args.as_deref() }
                }
                _ => return None,
            };
            Some(Part { place: Place::Source(index), origin, weight: weight(source.weight) })
        });
        top.into_iter().chain(sources).collect()
    }
}

impl DiscoveryOptions {
    /// What the types do not say. `has_own` tells whether the upstream has nodes or a service at its top.
    pub(super) fn check(&self, has_own: bool, error: &mut impl FnMut(&str, ErrorKind)) {
        if !has_own && self.sources.is_none() {
            error("/discovery", ErrorKind::MissingField { field: "sources".to_owned() });
        }
        if let Some(count) =
            self.sources.as_ref().map(Vec::len).filter(|count| !(1..=MAX_SOURCES).contains(count))
        {
            let allowed = format!("1 to {MAX_SOURCES} sources");
            error(
                "/discovery/sources",
                ErrorKind::OutOfRange { what: "length", found: count.to_string(), allowed },
            );
        }
        if self.drop_stale && self.max_stale.is_none() {
            let field = "drop_stale".to_owned();
            error("/discovery", ErrorKind::Needs { field, needs: "max_stale" });
        }
        for (index, source) in self.sources.iter().flatten().enumerate() {
            let at = format!("/discovery/sources/{index}");
            match (&source.nodes, &source.kind, &source.service) {
                (Some(_), None, None) if source.args.is_some() => {
                    error(&at, ErrorKind::Exclusive { one: "nodes", other: "args" });
                }
                (Some(_), None, None) | (None, Some(_), Some(_)) => {}
                (Some(_), _, _) => error(&at, ErrorKind::Exclusive { one: "nodes", other: "type" }),
                (None, Some(_), None) => {
                    error(&at, ErrorKind::Needs { field: "type".to_owned(), needs: "service" });
                }
                (None, None, Some(_)) => {
                    error(&at, ErrorKind::Needs { field: "service".to_owned(), needs: "type" });
                }
                (None, None, None) => error(&at, ErrorKind::NoneOf { fields: vec!["type", "nodes"] }),
            }
        }
    }
}

/// Prefers nodes that are near.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Locality {
    /// How near nodes have to be to be preferred. Where this gateway is, is in `postern.locality` of `config.yaml`; where a
    /// node is, says its registry or `region`, `zone` and `machine` in its `metadata`.
    pub prefer: Near,
    /// While a smaller percentage of the near nodes is healthy, nearness is passed over.
    pub min_local: Int<0, 100, 50>,
}

impl Default for Locality {
    fn default() -> Locality {
        Locality { prefer: Near::Zone, min_local: Int::default() }
    }
}

/// How near nodes have to be to be preferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Near {
    /// On the same machine; then those of the zone, then those of the region.
    Machine,
    /// In the same zone; then those of the region.
    #[default]
    Zone,
    /// In the same region.
    Region,
    /// All nodes are as good.
    None,
}

/// When traffic returns to nodes of a better priority that were out of use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Failover {
    /// How long the better nodes must have been usable again, in seconds.
    pub delay: FailoverDelay,
    /// Only at these times. At any time if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub windows: Option<Vec<Window>>,
}

impl Failover {
    /// What the types do not say.
    pub(super) fn check(&self, error: &mut impl FnMut(&str, ErrorKind)) {
        if let Some(count) =
            self.windows.as_ref().map(Vec::len).filter(|count| !(1..=MAX_WINDOWS).contains(count))
        {
            let allowed = format!("1 to {MAX_WINDOWS} windows");
            error(
                "/failover/windows",
                ErrorKind::OutOfRange { what: "length", found: count.to_string(), allowed },
            );
        }
    }
}

/// 30 s if nothing is written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct FailoverDelay(pub Seconds<true>);

impl Default for FailoverDelay {
    fn default() -> FailoverDelay {
        FailoverDelay(Seconds::whole(30))
    }
}

/// A time of the day on some days of the week.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// When it begins, `HH:MM`.
    pub from: TimeOfDay,
    /// When it ends, `HH:MM`; 24:00 is midnight. On the next day if that is not after `from`.
    pub to: TimeOfDay,
    /// The days on which it begins. Every day if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub days: Option<Distinct<Day>>,
    /// How far its clock is ahead of UTC, `+HH:MM` or `-HH:MM`. UTC if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utc_offset: Option<UtcOffset>,
}

/// A day of the week.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

/// A time of the day, in minutes since its beginning; 1440 is its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeOfDay(u16);

const TIME_RULE: &str = "a time of the day, as HH:MM from 00:00 to 24:00";

impl TimeOfDay {
    /// The time; nothing if `text` is none.
    #[must_use]
    pub fn new(text: &str) -> Option<TimeOfDay> {
        let minutes = minutes(text)?;
        (minutes <= 24 * 60).then_some(TimeOfDay(minutes))
    }

    /// Minutes since the beginning of the day.
    #[must_use]
    pub fn minutes(self) -> u16 {
        self.0
    }
}

/// The minutes of `HH:MM`.
fn minutes(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |digits: &str| {
        let valid = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit());
        valid.then(|| digits.parse::<u16>().ok()).flatten()
    };
    let minutes = number(minutes).filter(|minutes| *minutes < 60)?;
    Some(number(hours)? * 60 + minutes)
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

/// How far a clock is ahead of UTC, in minutes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UtcOffset(i16);

const OFFSET_RULE: &str = "an offset from UTC, as +HH:MM or -HH:MM";

impl UtcOffset {
    /// The offset; nothing if `text` is none.
    #[must_use]
    pub fn new(text: &str) -> Option<UtcOffset> {
        if text == "Z" {
            return Some(UtcOffset(0));
        }
        let (sign, rest) = match text.split_at_checked(1)? {
            ("+", rest) => (1, rest),
            ("-", rest) => (-1, rest),
            _ => return None,
        };
        let minutes = i16::try_from(minutes(rest)?).ok().filter(|minutes| *minutes <= 15 * 60)?;
        Some(UtcOffset(sign * minutes))
    }

    /// Minutes ahead of UTC.
    #[must_use]
    pub fn minutes(self) -> i16 {
        self.0
    }
}

impl fmt::Display for UtcOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { '-' } else { '+' };
        let ahead = self.0.unsigned_abs();
        write!(f, "{sign}{:02}:{:02}", ahead / 60, ahead % 60)
    }
}

/// Reads and writes as text that obeys a rule.
macro_rules! as_text {
    ($type:ident, $rule:ident, $pattern:literal) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str(StrVisitor { expected: $rule, parse: $type::new })
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
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

as_text!(TimeOfDay, TIME_RULE, r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$");
as_text!(UtcOffset, OFFSET_RULE, r"^(Z|[+-](0\d|1[0-4]):[0-5]\d|[+-]15:00)$");

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::*;

    fn upstream(value: &Value) -> Upstream {
        Upstream::deserialize(value).unwrap()
    }

    #[test]
    fn sources_are_told_in_the_order_of_preference() {
        let written = json!({
            "service_name": "shop", "discovery_type": "consul", "discovery_args": {"tag": "v2", "near": true},
            "discovery": {"merge": "prefer", "weight": 90, "sources": [
                {"type": "dns", "service": "shop.test", "args": {"order": ["SRV", "A"], "limit": 5}, "weight": 10},
                {"nodes": {"10.0.0.1:80": 1}},
            ]},
        });
        let upstream = upstream(&written);
        assert_eq!(upstream.errors(), []);
        assert_eq!(serde_json::to_value(&upstream.discovery).unwrap(), written["discovery"]);
        let told: Vec<_> = upstream
            .parts()
            .iter()
            .map(|part| match part.origin {
                Origin::Nodes(nodes) => format!("{} nodes", nodes.len()),
                Origin::Service { kind, service, args } => {
                    let args: Vec<_> = args
                        .into_iter()
                        .flat_map(DiscoveryArgs::iter)
                        .map(|(n, v)| format!("{n}={v}"))
                        .collect();
                    format!("{kind} {service} {} {:?}", args.join(" "), part.weight)
                }
            })
            .collect();
        assert_eq!(
            told,
            [
                "consul shop tag=v2 near=true Some(90)",
                "dns shop.test order=SRV,A limit=5 Some(10)",
                "1 nodes"
            ]
        );
    }

    #[test]
    fn what_goes_together_is_checked() {
        for (fields, places) in [
            (json!({"discovery": {}}), vec!["/discovery"]),
            (json!({"nodes": {}, "discovery": {}}), vec![]),
            (json!({"discovery": {"sources": [{"nodes": {}}]}}), vec![]),
            (json!({"nodes": {}, "discovery": {"drop_stale": true}}), vec!["/discovery"]),
            (json!({"discovery": {"sources": []}}), vec!["/discovery/sources"]),
            (json!({"nodes": {}, "failover": {"windows": []}}), vec!["/failover/windows"]),
            (json!({"discovery": {"sources": [{}]}}), vec!["/discovery/sources/0"]),
            (json!({"discovery": {"sources": [{"type": "dns"}]}}), vec!["/discovery/sources/0"]),
            (json!({"discovery": {"sources": [{"service": "a"}]}}), vec!["/discovery/sources/0"]),
            (
                json!({"discovery": {"sources": [{"nodes": {}, "type": "dns", "service": "a"}]}}),
                vec!["/discovery/sources/0"],
            ),
            (json!({"discovery": {"sources": [{"nodes": {}, "args": {}}]}}), vec!["/discovery/sources/0"]),
            (json!({"discovery": {"sources": [{"nodes": {"*": 1}}]}}), vec!["/discovery/sources/0/nodes/*"]),
        ] {
            let found: Vec<_> = upstream(&fields).errors().into_iter().map(|error| error.pointer).collect();
            assert_eq!(found, places, "{fields}");
        }
    }

    #[test]
    fn times_and_offsets_are_what_people_write() {
        for (text, minutes) in [
            ("00:00", Some(0)),
            ("23:59", Some(1439)),
            ("24:00", Some(1440)),
            ("24:01", None),
            ("7:00", None),
            ("07:60", None),
            ("+7:00", None),
            ("0700", None),
        ] {
            let time = TimeOfDay::new(text);
            assert_eq!(time.map(TimeOfDay::minutes), minutes, "{text}");
            assert!(time.is_none_or(|time| time.to_string() == text));
        }
        for (text, minutes) in [
            ("+08:00", Some(480)),
            ("-03:30", Some(-210)),
            ("Z", Some(0)),
            ("+15:01", None),
            ("08:00", None),
            ("", None),
            ("é", None),
        ] {
            let offset = UtcOffset::new(text);
            assert_eq!(offset.map(UtcOffset::minutes), minutes, "{text}");
            assert!(offset.is_none_or(|offset| text == "Z" || offset.to_string() == text));
        }
    }
}
