//! What an upstream wants to know the endpoints of: configured nodes, services of registries, and how they go together.

use std::sync::Arc;
use std::time::Duration;

use config::discovery::not_configured;
use serde::Serialize;

use crate::source::Query;
use crate::{NameOptions, Node};

/// Everything that decides which endpoints an upstream has. Two targets that are equal have the same ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Whose endpoints they are, for those who ask: `upstreams/1`, `routes/7`.
    pub name: Arc<str>,
    /// Where they come from, in order of preference.
    pub parts: Vec<Part>,
    /// How several parts become one list.
    pub merge: Merge,
    /// What may be taken away, and when.
    pub guards: Guards,
    /// How names among the nodes are asked for, where it is not as the settings say.
    pub names: NameOptions,
    /// The port of instances whose registry knows none: that of the upstream's scheme.
    pub port: u16,
}

impl Target {
    /// Configured nodes alone.
    pub fn nodes(name: impl Into<Arc<str>>, nodes: Vec<Node>) -> Self {
        Self::of(name, vec![Part::nodes(nodes)])
    }

    /// One service of one kind of registry.
    pub fn service(name: impl Into<Arc<str>>, kind: impl Into<Arc<str>>, query: Query) -> Self {
        Self::of(name, vec![Part::service(kind, query)])
    }

    /// Several parts, with the defaults for everything else.
    pub fn of(name: impl Into<Arc<str>>, parts: Vec<Part>) -> Self {
        Self {
            name: name.into(),
            parts,
            merge: Merge::default(),
            guards: Guards::default(),
            names: NameOptions::default(),
            port: 80,
        }
    }
}

/// One place where endpoints come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub origin: Origin,
    /// How much of the traffic goes here, in percent of the sum over all parts, whatever the weights of the endpoints
    /// say between parts: the slider by which traffic moves from one registry to another. Without one, the weights
    /// of the endpoints stand as they are.
    pub share: Option<u32>,
}

impl Part {
    pub fn nodes(nodes: Vec<Node>) -> Self {
        Self { origin: Origin::Nodes(nodes), share: None }
    }

    pub fn service(kind: impl Into<Arc<str>>, query: Query) -> Self {
        Self { origin: Origin::Service { kind: kind.into(), query }, share: None }
    }

    /// The same with a share of the traffic.
    #[must_use]
    pub fn with_share(self, percent: u32) -> Self {
        Self { share: Some(percent), ..self }
    }
}

/// Nodes as configured, or a service that registries know.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    Nodes(Vec<Node>),
    /// `discovery_type` with what is asked. Every registry of the kind that serves the service is asked, and what they
    /// list is joined.
    Service {
        kind: Arc<str>,
        query: Query,
    },
}

/// How the parts of a target become one list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Merge {
    /// What any part lists; of an endpoint that several list, the best health counts.
    #[default]
    Union,
    /// As union, but the order of the parts is an order of preference: a later part takes traffic where nothing of the
    /// earlier ones is left. Priorities inside a part stay.
    Prefer,
    /// What every part lists that has answered; the worst health counts.
    Intersect,
}

/// How carefully endpoints are let go of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guards {
    /// A registry that has not answered for this long makes the target degraded. None: never.
    pub max_stale: Option<Duration>,
    /// After `max_stale` its endpoints are taken out. Otherwise they are only marked.
    pub drop_stale: bool,
    /// How long a registry has to go on saying that a service has no instance, unless it says so twice.
    pub empty_confirm: Duration,
    /// More than this percentage taken away at once is let go of slowly, as far as it still answers. 100: never.
    pub drop_limit: u8,
    /// Fewer endpoints than this are let go of at once.
    pub drop_floor: usize,
    /// How many percent of what was there are let go of in a second.
    pub drop_rate: u8,
}

impl Default for Guards {
    fn default() -> Self {
        Self {
            max_stale: None,
            drop_stale: false,
            empty_confirm: Duration::from_secs(3),
            drop_limit: 50,
            drop_floor: 3,
            drop_rate: 10,
        }
    }
}

/// Why a target cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// No registry of the kind is configured.
    #[error("{}", not_configured(kind))]
    Kind { part: usize, kind: Arc<str> },
    /// No registry of the kind has services of this name.
    #[error("none of the registries of the kind `{kind}` is the one that `{service}` names")]
    Registry { part: usize, kind: Arc<str>, service: Arc<str> },
    /// The name of the service is not of the form that the registry needs.
    #[error("{advice}")]
    Service { part: usize, advice: String },
}

impl TargetError {
    /// Which part is meant.
    pub fn part(&self) -> usize {
        let (Self::Kind { part, .. } | Self::Registry { part, .. } | Self::Service { part, .. }) = self;
        *part
    }
}
