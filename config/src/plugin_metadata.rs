//! Plugin metadata: settings of one plugin that hold for the whole gateway, such as a log format.
//!
//! The id is the name of the plugin, and the fields are those the plugin defines.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::fields::{OwnId, Timestamp};
use crate::secret_ref::Literals;

/// Settings of one plugin that hold for the whole gateway.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PluginMetadata {
    /// The name of the plugin, if the object carries it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    pub id: OwnId,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,
    /// The fields of the plugin.
    #[serde(flatten)]
    pub settings: Map<String, Value>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

impl fmt::Debug for PluginMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names only, as of plugins: settings carry secrets.
        f.debug_set().entries(self.settings.keys()).finish()
    }
}
