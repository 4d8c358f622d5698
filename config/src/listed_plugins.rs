//! The plugins that may be used, where `plugins` in `config.yaml` or `apisix.yaml` lists them.
//!
//! As in APISIX, a plugin that exists and is not listed is refused like one that does not exist. Names in the list that
//! exist nowhere are no error: the list APISIX ships has many.

use serde_json::Value;

use crate::error::ConfigError;
use crate::plugin_catalog::{PluginCatalog, PluginSchema};

/// A catalog cut down to a list of names.
pub struct ListedPlugins<'a> {
    catalog: &'a dyn PluginCatalog,
    names: Option<&'a [String]>,
}

impl<'a> ListedPlugins<'a> {
    /// The catalog itself, if there is no list.
    pub fn new(catalog: &'a dyn PluginCatalog, names: Option<&'a [String]>) -> Self {
        ListedPlugins { catalog, names }
    }

    fn is_listed(&self, name: &str) -> bool {
        self.names.is_none_or(|names| names.iter().any(|listed| listed == name))
    }
}

impl PluginCatalog for ListedPlugins<'_> {
    fn check(&self, name: &str, which: PluginSchema, value: &Value) -> Result<Value, Vec<ConfigError>> {
        self.catalog.check(name, which, value)
    }

    fn schema(&self, name: &str, which: PluginSchema) -> Option<Value> {
        self.is_listed(name).then(|| self.catalog.schema(name, which))?
    }

    fn priority(&self, name: &str) -> Option<i32> {
        self.is_listed(name).then(|| self.catalog.priority(name))?
    }

    fn names(&self) -> Vec<&'static str> {
        self.catalog.names().into_iter().filter(|name| self.is_listed(name)).collect()
    }

    fn is_auth(&self, name: &str) -> bool {
        self.is_listed(name) && self.catalog.is_auth(name)
    }

    fn refusal(&self, name: &str) -> Option<String> {
        if !self.is_listed(name) && self.catalog.priority(name).is_some() {
            return Some("it is not in the list `plugins` of the configuration; add it there".to_owned());
        }
        self.catalog.refusal(name)
    }

    fn is_harmless(&self, name: &str) -> bool {
        self.catalog.is_harmless(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestCatalog;

    #[test]
    fn a_plugin_that_is_not_listed_does_not_exist() {
        let names = ["key-auth".to_owned(), "example-plugin".to_owned()];
        let listed = ListedPlugins::new(&TestCatalog, Some(&names));
        assert_eq!(listed.names(), ["key-auth"]);
        assert!(listed.priority("key-auth").is_some());
        assert_eq!(listed.priority("limit-count"), None);
        assert_eq!(listed.schema("limit-count", PluginSchema::Config), None);
        assert!(listed.refusal("limit-count").is_some_and(|advice| advice.contains("add it there")));
        assert_eq!(listed.refusal("uri-rewrite").as_deref(), Some("use `proxy-rewrite`"));
        assert!(listed.is_harmless("gone"));
        let all = ListedPlugins::new(&TestCatalog, None);
        assert_eq!(all.names(), TestCatalog.names());
    }
}
