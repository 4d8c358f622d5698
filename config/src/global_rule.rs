//! Global rules: plugins of every request, before those of the route.
//!
//! They also run when no route matches. Names and descriptions, which APISIX does not allow here, are refused.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{OwnId, Plugins, Timestamp};
use crate::secret_ref::Literals;

/// Plugins of every request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GlobalRule {
    /// The id, if the object carries it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    pub id: OwnId,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,

    /// Plugins by name.
    pub plugins: Plugins,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}
