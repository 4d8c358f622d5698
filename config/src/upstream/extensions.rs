//! What upstreams have that APISIX's do not: a breaker for each node, conditions of retries, sessions that stay at
//! their node, and nodes that begin slowly.
//!
//! Each is a block of its own and does nothing where it is absent. Names that users know from other gateways and write
//! at the top of the upstream are refused with the place where they belong.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{RetryBudget, statuses};
use crate::error::{ConfigError, ErrorKind};
use crate::fields::{Distinct, HttpStatus, Int, Seconds, Text};
use crate::sensitive::Sensitive;

/// Takes a node out of use for a while after failures of live traffic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Breaker {
    /// So many failures within `window` open the breaker of a node.
    pub max_failures: Int<1, 1000, 5>,
    /// The time in which failures count, in seconds.
    pub window: Seconds,
    /// How long a node gets no requests once its breaker is open, in seconds.
    pub cool_down: Seconds,
    /// How many requests are let through after that; if all of them succeed the breaker closes, if one fails it is
    /// open again.
    pub half_open: Int<1, 1000, 1>,
    /// Statuses of answers that count as failures, besides failed connections and time-outs; may be empty.
    pub statuses: Distinct<HttpStatus, 0>,
    /// What happens when the breaker of every node is open.
    pub all_open: AllOpen,
}

impl Default for Breaker {
    fn default() -> Breaker {
        Breaker {
            max_failures: Int::default(),
            window: Seconds::whole(10),
            cool_down: Seconds::whole(10),
            half_open: Int::default(),
            statuses: statuses(&[500, 502, 503, 504]),
            all_open: AllOpen::default(),
        }
    }
}

/// What happens when the breaker of every node is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AllOpen {
    /// Requests are answered with 503 at once.
    #[default]
    Refuse,
    /// All nodes are used, as if there were no breaker.
    UseAll,
}

/// What is tried again at another node. How often and how long say `retries` and `retry_timeout`, as in APISIX.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Retry {
    /// The failures after which another node is tried.
    pub on: Distinct<RetryOn, 0>,
    /// Statuses of answers after which another node is tried. The last answer is the client's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statuses: Option<Distinct<HttpStatus>>,
    /// Whether requests that are not idempotent (POST, PATCH) are sent again too, even if the node may have acted upon
    /// them. Without it they are tried elsewhere only when nothing of them was sent.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub non_idempotent: bool,
    /// How much of the load may be retries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<RetryBudget>,
}

impl Default for Retry {
    fn default() -> Retry {
        let on = vec![RetryOn::ConnectFailure, RetryOn::Timeout, RetryOn::Reset];
        Retry { on: Distinct::of_constants(on), statuses: None, non_idempotent: false, budget: None }
    }
}

/// A failure after which another node may be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RetryOn {
    /// No connection: refused, not in time, or TLS failed.
    ConnectFailure,
    /// No connection, no progress of the request or no answer in time.
    Timeout,
    /// The node closed or broke the connection before it answered, or its answer is malformed.
    Reset,
    /// Any answer of 500 to 599.
    #[serde(rename = "http_5xx")]
    Http5xx,
}

/// Sends the requests of one session to one node, known by a cookie that the gateway sets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sticky {
    /// The name of the cookie.
    #[serde(default = "Sticky::cookie")]
    #[schemars(regex(pattern = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"))]
    pub cookie: Text<1, 128>,
    /// How long browsers keep the cookie, in seconds; until they are closed if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Int<1, { u32::MAX }>>,
    /// The paths for which browsers send the cookie.
    #[serde(default = "Sticky::path")]
    #[schemars(regex(pattern = r"^/[^;\x00-\x20\x7f]*$"))]
    pub path: Text<1, 1024>,
    /// Whether browsers send the cookie over TLS only.
    #[serde(default)]
    pub secure: bool,
    /// Whether the cookie is out of reach for scripts.
    #[serde(default = "super::yes")]
    pub http_only: bool,
    /// Whether the cookie is sent with requests that other sites cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_site: Option<SameSite>,
    /// The key of the hash in the cookie. Gateways with the same one agree on a session's node. One that this gateway
    /// has made for itself if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Sensitive<16, 256>>,
}

impl Sticky {
    fn cookie() -> Text<1, 128> {
        Text::of_constant("postern_node")
    }

    fn path() -> Text<1, 1024> {
        Text::of_constant("/")
    }

    /// What the types do not say.
    pub(crate) fn check(&self, error: &mut impl FnMut(&str, ErrorKind)) {
        let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+.^_`|~-".contains(&byte);
        if !self.cookie.bytes().all(token) {
            let expected = "the name of a cookie: letters, digits and -_. without blanks".to_owned();
            error("/sticky/cookie", ErrorKind::BadFormat { found: self.cookie.to_string(), expected });
        }
        let inside = |byte: u8| byte.is_ascii_graphic() && byte != b';';
        if !self.path.starts_with('/') || !self.path.bytes().all(inside) {
            let expected = "a path from / without blanks and `;`".to_owned();
            error("/sticky/path", ErrorKind::BadFormat { found: self.path.to_string(), expected });
        }
        if self.same_site == Some(SameSite::None) && !self.secure {
            let kind = ErrorKind::Needs { field: "same_site: none".to_owned(), needs: "secure: true" };
            error("/sticky", kind);
        }
    }
}

/// Whether a cookie is sent with requests that other sites cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SameSite {
    /// Never.
    Strict,
    /// When a link is followed.
    Lax,
    /// Always; browsers want `secure` with it.
    None,
}

/// Names from elsewhere, and where what they mean is written here.
const ELSEWHERE: [(&[&str], &str); 7] = [
    (
        &[
            "max_failures",
            "max_fails",
            "fail_timeout",
            "window",
            "cool_down",
            "cooldown",
            "half_open",
            "circuit_breaker",
            "all_open",
            "breaker_statuses",
            "unhealthy",
            "outlier_detection",
        ],
        "write a breaker of nodes as `\"breaker\": {\"max_failures\": 5, \"window\": 10, \"cool_down\": 10, \
         \"half_open\": 1}`; when health checks find a node unhealthy is in `checks.active.unhealthy` and \
         `checks.passive.unhealthy`",
    ),
    (
        &[
            "retry_on",
            "retry_conditions",
            "retry_statuses",
            "retry_policy",
            "http_5xx",
            "proxy_next_upstream",
        ],
        "write the conditions of retries as `\"retry\": {\"on\": [\"connect_failure\", \"timeout\", \"reset\", \
         \"http_5xx\"], \"statuses\": [503]}`; how often and how long stay in `retries` and `retry_timeout`",
    ),
    (
        &["budget", "retry_percent", "min_per_second"],
        "write it as `\"retry\": {\"budget\": {\"percent\": 20, \"min_per_second\": 10}}`",
    ),
    (
        &["sticky_cookie", "sticky_session", "session_affinity", "session_sticky", "cookie", "affinity"],
        "write sessions that stay at their node as `\"sticky\": {\"cookie\": \"postern_node\"}`",
    ),
    (
        &["slow_start_seconds", "slow_start_window", "slowstart", "warm_up", "warmup"],
        "write the seconds in which a new node gets its full share as `\"slow_start\": 30`",
    ),
    (
        &["sources", "merge", "max_stale", "drop_stale", "empty_confirm", "drop_limit"],
        "write it as `\"discovery\": {\"merge\": \"prefer\", \"sources\": [{\"type\": \"consul\", \"service\": \"NAME\"}], \
         \"max_stale\": 3600, \"empty_confirm\": 3, \"drop_limit\": 50}`",
    ),
    (
        &[
            "prefer_zone",
            "zone_aware",
            "zone_awareness",
            "locality_lb",
            "locality_weighted",
            "topology",
            "min_local",
        ],
        "write nearness as `\"locality\": {\"prefer\": \"zone\", \"min_local\": 50}`, and where this gateway is as \
         `postern: {locality: {zone: NAME}}` in config.yaml",
    ),
];

/// Names that belong into one of the blocks, at the top of the upstream or among its health checks.
pub(super) fn misplaced(upstream: &Map<String, Value>, at: &str, errors: &mut Vec<ConfigError>) {
    let places = [
        (Some(upstream), "", "at the top of an upstream"),
        (member(upstream, &["checks", "active"]), "/checks/active", "in `checks.active`"),
        (member(upstream, &["checks", "passive"]), "/checks/passive", "in `checks.passive`"),
    ];
    for (members, under, place) in places {
        let Some(members) = members else { continue };
        for (names, instead) in ELSEWHERE {
            for name in names.iter().filter(|name| members.contains_key(**name)) {
                // There it is at home.
                if *name == "unhealthy" && !under.is_empty() {
                    continue;
                }
                let what = format!("`{name}` {place}");
                let kind = ErrorKind::Unsupported { what, instead: instead.to_owned() };
                errors.push(ConfigError::new(format!("{at}{under}/{name}"), kind));
            }
        }
    }
}

/// The object at a path of members.
fn member<'a>(of: &'a Map<String, Value>, path: &[&str]) -> Option<&'a Map<String, Value>> {
    path.iter().try_fold(of, |of, name| of.get(*name)?.as_object())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::super::Upstream;
    use super::*;

    #[test]
    fn a_block_without_fields_has_its_defaults() {
        let upstream: Upstream =
            serde_json::from_value(json!({"nodes": {}, "breaker": {}, "retry": {}, "sticky": {}})).unwrap();
        assert!(upstream.errors().is_empty());
        let breaker = upstream.breaker.as_deref().unwrap();
        assert_eq!((breaker.max_failures.get(), breaker.half_open.get()), (5, 1));
        assert_eq!((breaker.window.as_f64(), breaker.cool_down.as_f64()), (10.0, 10.0));
        assert_eq!(breaker.all_open, AllOpen::Refuse);
        let retry = upstream.retry.as_deref().unwrap();
        assert_eq!(&retry.on[..], [RetryOn::ConnectFailure, RetryOn::Timeout, RetryOn::Reset]);
        assert!(!retry.non_idempotent);
        let sticky = upstream.sticky.as_deref().unwrap();
        assert_eq!((&*sticky.cookie, &*sticky.path, sticky.http_only), ("postern_node", "/", true));
    }

    #[test]
    fn what_the_schema_does_not_say_is_checked() {
        for (sticky, places) in [
            (json!({"cookie": "a b"}), vec!["/sticky/cookie"]),
            (json!({"path": "/;x", "cookie": "ok"}), vec!["/sticky/path"]),
            (json!({"path": "x"}), vec!["/sticky/path"]),
            (json!({"same_site": "none"}), vec!["/sticky"]),
            (json!({"same_site": "none", "secure": true}), vec![]),
        ] {
            let upstream: Upstream =
                serde_json::from_value(json!({"nodes": {}, "sticky": sticky.clone()})).unwrap();
            let errors = upstream.errors();
            let found: Vec<_> = errors.iter().map(|error| error.pointer.as_str()).collect();
            assert_eq!(found, places, "{sticky}");
        }
    }
}
