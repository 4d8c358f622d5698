//! What is known, in the form in which the Control API and `postern endpoints` show it.
//!
//! Times are seconds since 1970. Nothing here is made before somebody asks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize, Serializer};

use crate::follow::Freshness;
use crate::source::Health;
use crate::target::Merge;

/// The endpoints of one target, and where each comes from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TargetView {
    /// Whose they are: `upstreams/1`.
    pub name: Arc<str>,
    pub merge: Merge,
    /// Every registry and name was answered or failed at least once.
    pub settled: bool,
    /// Services whose registry has not answered for longer than the target allows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub degraded: Vec<Arc<str>>,
    /// The parts, in order of preference; one that several registries answer is there once for each.
    pub parts: Vec<PartView>,
    /// Parts that no registry answers for, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<Arc<str>>,
    /// Those that are published, and those that are refused.
    pub endpoints: Vec<EndpointView>,
    /// How often more was taken away at once than the target allows.
    pub alarms: u64,
    /// What was held back, let go of and refused, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Change>,
}

/// One part of a target at one registry.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PartView {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<u32>,
    #[serde(flatten)]
    pub from: FromView,
}

/// Nodes or a service.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum FromView {
    Nodes { count: usize },
    Service(Box<ServiceView>),
}

/// What one registry says of one service.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServiceView {
    /// `consul`.
    pub kind: Arc<str>,
    /// Which registry of its kind.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub registry: Arc<str>,
    pub service: Arc<str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<Arc<str>, Arc<str>>,
    pub freshness: Freshness,
    /// Counts the changes.
    pub generation: u64,
    /// When the registry answered last.
    #[serde(serialize_with = "seconds_or_null")]
    pub answered: Option<SystemTime>,
    /// Why the last question failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Arc<str>>,
    /// Questions that failed, since it is followed.
    pub errors: u64,
    /// How many instances it has.
    pub count: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub instances: Vec<InstanceView>,
    /// What changed and why, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Change>,
}

/// One instance as its registry lists it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InstanceView {
    pub id: Arc<str>,
    pub host: Arc<str>,
    pub port: u16,
    pub weight: u32,
    pub priority: i32,
    pub health: Health,
    #[serde(serialize_with = "seconds")]
    pub first_seen: SystemTime,
    /// Why it is kept though the registry does not list it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Arc<str>>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EndpointView {
    pub address: SocketAddr,
    /// The host as its source writes it.
    pub host: Arc<str>,
    pub weight: u32,
    pub priority: i32,
    pub health: Health,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Arc<str>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub meta: BTreeMap<Arc<str>, Arc<str>>,
    pub verdict: Verdict,
    /// Why, in words, unless it simply is in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<Arc<str>>,
    /// Who lists it.
    pub sources: Vec<SourceView>,
}

/// What discovery thinks of an endpoint. What health checks and breakers think is the upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Published, takes requests.
    Used,
    /// Published though nobody vouches for it now: the registry is not heard, has forgotten it, or took too much away.
    Kept,
    /// Published, takes no new requests.
    Draining,
    /// Published, its registry says that it is unhealthy.
    Unhealthy,
    /// Not published.
    Refused,
}

/// One source that lists an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SourceView {
    /// `nodes`, `consul`, `dns`.
    pub kind: Arc<str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub registry: Arc<str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<Arc<str>>,
    /// How the registry calls the instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<Arc<str>>,
    pub health: Health,
    #[serde(serialize_with = "seconds_or_null", skip_serializing_if = "Option::is_none")]
    pub first_seen: Option<SystemTime>,
    /// When the registry listed it last.
    #[serde(serialize_with = "seconds_or_null", skip_serializing_if = "Option::is_none")]
    pub last_confirmed: Option<SystemTime>,
    #[serde(skip_serializing_if = "Freshness::is_fresh")]
    pub freshness: Freshness,
}

/// One step in the life of a service or a target.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    #[serde(serialize_with = "seconds")]
    pub at: SystemTime,
    /// What made it.
    pub why: Arc<str>,
    #[serde(skip_serializing_if = "Named::is_empty")]
    pub added: Named,
    #[serde(skip_serializing_if = "Named::is_empty")]
    pub changed: Named,
    #[serde(skip_serializing_if = "Named::is_empty")]
    pub removed: Named,
}

/// Some of many instances by name, `id host:port`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    pub count: usize,
    /// The first ones.
    pub some: Vec<Arc<str>>,
}

impl Named {
    /// How many are named.
    const LIMIT: usize = 8;

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Counts one more, and names it while there is room.
    pub fn add(&mut self, name: impl FnOnce() -> Arc<str>) {
        self.count += 1;
        if self.some.len() < Self::LIMIT {
            self.some.push(name());
        }
    }
}

/// Seconds since 1970, to the millisecond.
pub fn unix(at: SystemTime) -> f64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (since.as_secs_f64() * 1000.0).round() / 1000.0
}

pub(crate) fn seconds<S: Serializer>(at: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(unix(*at))
}

pub(crate) fn seconds_or_null<S: Serializer>(at: &Option<SystemTime>, to: S) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => seconds(at, to),
        None => to.serialize_none(),
    }
}
