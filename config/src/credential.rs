//! Credentials: one way for a consumer to show who it is.
//!
//! A consumer has as many as it needs, so that keys can be changed one after the other.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{ConfigError, ErrorKind};
use crate::fields::{Desc, Labels, Name, OwnId, Plugins, Timestamp};
use crate::secret_ref::Literals;

/// One set of credentials of a consumer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    /// The id, if the object carries it, with or without `USERNAME/credentials/` before it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    #[schemars(schema_with = "own_id")]
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

    /// One authentication plugin with what the caller must show.
    #[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
    pub plugins: Plugins,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

impl Credential {
    /// The rules between fields.
    pub(crate) fn check(&self, errors: &mut Vec<ConfigError>) {
        if self.plugins.len() != 1 {
            let kind = ErrorKind::OutOfRange {
                what: "the number of plugins",
                found: self.plugins.len().to_string(),
                allowed: "exactly one authentication plugin".to_owned(),
            };
            errors.push(ConfigError::new("/plugins", kind));
        }
    }
}

fn own_id(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "anyOf": [
            {
                "type": "string", "minLength": 1, "maxLength": 400,
                "pattern": "^([a-zA-Z0-9_-]+/credentials/)?[a-zA-Z0-9_.-]+$",
            },
            {"type": "integer", "minimum": 1},
        ],
    })
}
