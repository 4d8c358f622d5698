//! What a registry has to offer to be asked: one trait, implemented in one file each.
//!
//! A [`Source`] opens a [`Watcher`] for each service that somebody wants to know; a watcher says, again and again,
//! which instances the service has now. It says nothing else: pauses after errors, what an error or an empty list may
//! do to endpoints in use, freshness, history, the snapshot on disk and the merging with other sources are the same
//! for every registry and live around it. A watcher never sleeps after an error, never caches and never retries by
//! itself; it returns an error and is asked again.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Node;
use crate::notice::{Heard, Notice};

/// One registry: its addresses, credentials and connections, shared by the services that are followed in it.
pub trait Source: fmt::Debug + Send + Sync + 'static {
    /// The word of `discovery_type`, for example `consul`.
    fn kind(&self) -> &'static str;

    /// Which registry of its kind it is: an address, the name of a cluster. A configuration may name several registries
    /// of one kind (`servers` of Consul are clusters of their own, in APISIX too). Each is a source: it has drivers, a
    /// back-off and a freshness of its own, and what they list for a service is merged.
    fn name(&self) -> &str {
        ""
    }

    /// Whether the service is looked for here. A name that names another registry of the same kind is not.
    fn serves(&self, _query: &Query) -> bool {
        true
    }

    /// Begins to follow a service. Nothing is asked before the first [`Watcher::next`].
    ///
    /// # Errors
    /// The name of the service is not of the form that this registry needs. Says what to write instead.
    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String>;

    /// Whether it can be told that an instance is about to stop. Where it cannot, whoever registered the instance has to.
    fn retires(&self) -> bool {
        false
    }

    /// Takes an instance out of the registry, or tells it that the instance is about to stop, so that nobody else finds it
    /// either; `undo` takes that back where it can be. Bounded in time by itself.
    ///
    /// # Errors
    /// The registry did not do it, or this kind of registry takes nobody out on request.
    fn retire<'a>(
        &'a self,
        query: &'a Query,
        instance: &'a Instance,
        how: Retire,
        undo: bool,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        let _ = (query, instance, how, undo);
        let why = format!("{} takes no instance out on request", self.kind());
        Box::pin(async move { Err(SourceError::new(why)) })
    }

    /// Passes the news of a drain of `services` on to those who serve others with them, and says what these answered. No
    /// registry does: only discovery servers have clients of their own. Bounded in time by itself.
    fn pass_on<'a>(&'a self, notice: &'a Notice, services: &'a [Query]) -> BoxFuture<'a, Vec<Heard>> {
        let _ = (notice, services);
        Box::pin(async { Vec::new() })
    }
}

/// What a registry is told about an instance that is about to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retire {
    /// It is taken out. The application registers itself again when it starts.
    #[default]
    Deregister,
    /// It stays registered and is not to be used, until somebody says otherwise.
    Maintenance,
    /// Nothing: somebody else does, or nobody needs to.
    Keep,
}

/// Which instances are wanted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    /// `service_name` as configured.
    pub service: Arc<str>,
    /// `discovery_args` as configured, by name.
    pub args: BTreeMap<Arc<str>, Arc<str>>,
}

/// Follows one service.
pub trait Watcher: Send {
    /// The whole list: at once when asked for the first time or after [`restart`](Self::restart), later when it may have
    /// changed. The same list twice is no harm. Has to be safe to drop before it is ready; a call after that goes on.
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>>;

    /// The next call asks at once and waits for no change: somebody wants to know now. What tells that the registry began
    /// anew (the last index, a version) is not forgotten.
    fn restart(&mut self);
}

/// The instances of one service, all of them, as the registry has them now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// None is an authoritative empty list: the registry knows of no instance. What a registry cannot tell is a
    /// [`SourceError`].
    pub instances: Vec<Instance>,
    /// What its absence from this list says about an instance.
    pub standing: Standing,
    /// When the next question makes sense.
    pub again: Again,
}

/// Whether a list is a continuation of the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// What is missing has been taken out.
    #[default]
    Continued,
    /// The registry has lost its memory or its place since the last list (its index went backwards, it was restarted or
    /// restored). What is missing may only not be known again yet.
    Restarted,
}

/// When to ask again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// At once: the next question waits for a change by itself, for a bounded time.
    Now,
    /// After this long: a registry that can only be polled, or an answer with a time to live.
    After(Duration),
}

/// One instance of a service as its registry knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// How the registry tells it from the others of its service: an instance id, the name of a pod, `host:port`.
    pub id: Arc<str>,
    /// Where it is. The host may be a name, which is then resolved like that of any node. Port 0, where the registry knows
    /// none, stands for that of the upstream's scheme.
    pub node: Node,
    pub health: Health,
    /// What else is known of it; shared between lists where it does not change.
    pub details: Option<Arc<Details>>,
}

/// What a registry thinks of an instance. Better ones come first.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    #[default]
    Healthy,
    /// Usable, with the weight that the registry gives it in this state.
    Warning,
    /// Takes no new request; those under way end in peace.
    Draining,
    Unhealthy,
}

impl Health {
    /// As it is written in answers of APIs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Warning => "warning",
            Self::Draining => "draining",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// What is known of an instance besides its address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Details {
    pub region: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    /// The machine it runs on.
    pub machine: Option<Arc<str>>,
    /// Zones whose clients it should serve, where the registry says so (Kubernetes `hints.forZones`).
    pub for_zones: Vec<Arc<str>>,
    /// Its SPIFFE id.
    pub identity: Option<Arc<str>>,
    /// Tags and metadata. A tag without a value has an empty one.
    pub meta: BTreeMap<Arc<str>, Arc<str>>,
}

/// The registry did not say what is asked. Endpoints in use stay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct SourceError {
    /// What happened, with the address that was asked, for operators.
    pub reason: Arc<str>,
    /// How long the registry wants to be left alone (`Retry-After`).
    pub retry_after: Option<Duration>,
}

impl SourceError {
    pub fn new(reason: impl Into<Arc<str>>) -> Self {
        Self { reason: reason.into(), retry_after: None }
    }
}
