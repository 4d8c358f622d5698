//! Consumers: who calls, and what holds for them wherever they call.
//!
//! Settings of an authentication plugin on a consumer say what the caller must show; those of any other plugin
//! are added to the route when the consumer has been recognised.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{Desc, Labels, OwnId, Plugins, Timestamp};
use crate::id::{Id, Username};
use crate::secret_ref::Literals;

/// Somebody who calls, known by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Consumer {
    /// The id, if the object carries it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    pub id: OwnId,
    /// The name, which is the id: letters, digits, `-` and `_`.
    pub username: Username,
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

    /// The group whose plugins are added. The consumer's own win.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_id: Option<Id>,
    /// Plugins by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugins: Option<Box<Plugins>>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}
