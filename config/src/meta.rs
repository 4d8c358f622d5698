//! `_meta`: what any plugin block may say about how the plugin is run, beside the plugin's own settings.
//!
//! It is read and checked with the object that carries it; whoever builds the list of plugins of a request
//! reads it again from the stored settings with [`Meta::of`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{ConfigError, ErrorKind};
use crate::expr::Expr;
use crate::typed;

/// The name of the block in a plugin's settings.
pub const META: &str = "_meta";

/// How a plugin is run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// The plugin is not run, nor is the one of the same name of an object that it goes before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disable: Option<bool>,
    /// An expression over variables of the request: the plugin is left out where it does not hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Value>>")]
    pub filter: Option<Value>,
    /// Where the plugin stands in the order of this object alone, higher first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// The body of the answer when the plugin refuses a request: text, or an object that is sent as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_response: Option<ErrorResponse>,
    /// Where the plugin is run, so that one object can serve an edge and a sidecar: `edge`, `sidecar`, or `both`, which is
    /// the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
}

/// Which role of the binary runs a plugin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Placement {
    /// The edge alone.
    Edge,
    /// Sidecars alone.
    Sidecar,
    /// Both.
    #[default]
    Both,
}

/// The role that builds plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The gateway at the edge.
    Edge,
    /// A sidecar.
    Sidecar,
}

/// The body of an answer in place of that of the plugin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum ErrorResponse {
    /// As it is.
    Text(String),
    /// As JSON.
    Json(Map<String, Value>),
}

impl Meta {
    /// Read a `_meta` block.
    ///
    /// # Errors
    /// Everything that is wrong, with pointers inside `value`.
    pub fn parse(value: &Value) -> Result<Meta, Vec<ConfigError>> {
        if value.get("pre_function").is_some() {
            let kind = ErrorKind::Unsupported {
                what: "`pre_function` (Lua)".to_owned(),
                instead: "take it out; what it decides can often be written as `filter`".to_owned(),
            };
            return Err(vec![ConfigError::new("/pre_function", kind)]);
        }
        let meta: Meta = typed::parse(value)?;
        if let Some(filter) = &meta.filter {
            Expr::parse(filter).map_err(|error| vec![error.under("/filter")])?;
        }
        Ok(meta)
    }

    /// The `_meta` of settings that were checked; the default one if there is none.
    #[must_use]
    pub fn of(settings: &Value) -> Meta {
        settings.get(META).and_then(|meta| Meta::deserialize(meta).ok()).unwrap_or_default()
    }

    /// Whether this role runs the plugin.
    #[must_use]
    pub fn runs_in(&self, role: Role) -> bool {
        match self.placement.unwrap_or_default() {
            Placement::Both => true,
            Placement::Edge => role == Role::Edge,
            Placement::Sidecar => role == Role::Sidecar,
        }
    }

    /// Whether the plugin is switched off.
    #[must_use]
    pub fn is_disabled(&self) -> bool {
        self.disable == Some(true)
    }
}
