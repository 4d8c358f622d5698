//! How plugin settings are checked here without knowing a single plugin.
//!
//! The crate that has the plugins implements [`PluginCatalog`]; the model asks it for each plugin block it
//! meets. A name the catalog does not know refuses the object that carries it.

use serde_json::Value;

use crate::error::ConfigError;

/// Which settings of a plugin: they differ by where they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PluginSchema {
    /// On a route, service, global rule, plugin config or consumer group.
    Config,
    /// Of an authentication plugin on a consumer or credential: what the caller must show.
    Consumer,
    /// For the whole gateway, in `plugin_metadata`.
    Metadata,
}

/// The plugins that exist.
pub trait PluginCatalog: Send + Sync {
    /// Check one plugin's settings, `_meta` already taken out, and give them back with defaults filled in.
    /// `name` is one of [`PluginCatalog::names`].
    ///
    /// # Errors
    /// Everything that is wrong, with pointers inside `value`.
    fn check(&self, name: &str, which: PluginSchema, value: &Value) -> Result<Value, Vec<ConfigError>>;

    /// The JSON Schema of one plugin's settings; nothing if the plugin is unknown or has no such settings.
    fn schema(&self, name: &str, which: PluginSchema) -> Option<Value>;

    /// Where the plugin stands in the order of execution, higher first; nothing if it is unknown.
    fn priority(&self, name: &str) -> Option<i32>;

    /// All names, in the order of execution.
    fn names(&self) -> Vec<&'static str>;

    /// Whether the plugin finds out who calls, so that consumers carry settings for it.
    fn is_auth(&self, name: &str) -> bool;

    /// For a name that is not a plugin here: what to use instead, as an order to the operator.
    fn refusal(&self, name: &str) -> Option<String>;

    /// Why a sidecar cannot run the plugin, if it cannot.
    fn edge_alone(&self, name: &str) -> Option<&'static str> {
        let _ = name;
        None
    }

    /// Whether a plugin that does not exist here may be left out without changing what a client sees or
    /// what is protected, because its work is done otherwise or is not needed. Such a block is kept as
    /// it is written and never runs.
    fn is_harmless(&self, name: &str) -> bool {
        let _ = name;
        false
    }
}

/// A catalog without plugins: every plugin name is refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPlugins;

impl PluginCatalog for NoPlugins {
    fn check(&self, _: &str, _: PluginSchema, value: &Value) -> Result<Value, Vec<ConfigError>> {
        Ok(value.clone())
    }

    fn schema(&self, _: &str, _: PluginSchema) -> Option<Value> {
        None
    }

    fn priority(&self, _: &str) -> Option<i32> {
        None
    }

    fn names(&self) -> Vec<&'static str> {
        Vec::new()
    }

    fn is_auth(&self, _: &str) -> bool {
        false
    }

    fn refusal(&self, _: &str) -> Option<String> {
        None
    }
}
