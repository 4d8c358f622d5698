//! Services: what the routes of one API have in common.
//!
//! A change of a service holds for all its routes at once. A route takes the hosts of its service when it has
//! none of its own, the plugins it does not have itself, and the upstream when it names none.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ConfigError;
use crate::fields::{Desc, Distinct, Host, Labels, Name, OwnId, Plugins, Timestamp};
use crate::id::Id;
use crate::secret_ref::Literals;
use crate::upstream::Upstream;

/// Plugins and upstream shared by routes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Service {
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

    /// The hosts of routes that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Box<Distinct<Host>>>,
    /// Plugins by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugins: Option<Box<Plugins>>,
    /// The upstream of routes that name none. It wins over `upstream`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_id: Option<Id>,
    /// An upstream of this service alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<Box<Upstream>>,
    /// Whether a connection may be upgraded to WebSocket, for routes that do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable_websocket: Option<bool>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

impl Service {
    /// The rules between fields.
    pub(crate) fn check(&self, errors: &mut Vec<ConfigError>) {
        if let Some(upstream) = &self.upstream {
            upstream.check("/upstream", errors);
        }
    }
}
