//! One service at one registry, followed for everybody who wants to know it.

use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::source::Instance;
use crate::views::seconds;

/// What is known of a service at a registry.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Followed {
    /// In order of id and address; shared between states as far as nothing has changed.
    pub instances: Arc<[Held]>,
    pub freshness: Freshness,
    /// Why the last question failed, if it did.
    pub failure: Option<Arc<str>>,
    /// Counts the changes of the instances.
    pub generation: u64,
}

/// An instance and since when it is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    pub instance: Instance,
    pub first_seen: SystemTime,
    /// The registry does not list it (any more), and yet it is kept.
    pub kept: Option<Arc<Kept>>,
}

/// Why an instance is kept that its registry does not list.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// Listed until then.
    pub since: SystemTime,
    pub why: Arc<str>,
}

/// How far what is known of a service can be trusted.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Freshness {
    /// As the registry says.
    Fresh,
    /// As the registry said before it could not be asked any more, or before it said something that has to be confirmed.
    Stale {
        #[serde(serialize_with = "seconds")]
        since: SystemTime,
        why: Arc<str>,
    },
    /// The registry has not answered yet.
    #[default]
    Unknown,
}

impl Freshness {
    pub fn is_fresh(&self) -> bool {
        matches!(self, Self::Fresh)
    }
}
