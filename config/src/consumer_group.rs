//! Consumer groups: plugins that several consumers have in common.
//!
//! They are added after authentication and win over those of the route; those of the consumer itself win over them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{Desc, Labels, Name, OwnId, Plugins, Timestamp};
use crate::secret_ref::Literals;

/// Plugins shared by consumers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsumerGroup {
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

    /// Plugins by name.
    pub plugins: Plugins,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}
