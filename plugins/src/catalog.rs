//! How the configuration model asks about plugins: the list of this crate, cut down to what the operator enables.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use config::error::ConfigError;
use config::plugin_catalog::{PluginCatalog, PluginSchema};
use config::process::WasmPlugin;
use layers::plugin::{Placement, Registration};
use serde_json::Value;

use crate::{absent, registrations, wasm};

/// The plugins that may be used.
pub struct Catalog {
    enabled: RwLock<Enabled>,
    /// Plugins of `wasm.plugins`, which need not be in the list.
    wasm: Vec<&'static Registration>,
    /// `plugin_attr`, by plugin; none where no `config.yaml` was read, and nothing is known of it.
    attrs: Option<Attrs>,
}

/// What plugins are told of `config.yaml`, by their names.
type Attrs = hashbrown::HashMap<String, Value>;

type Enabled = HashMap<&'static str, &'static Registration>;

impl Default for Catalog {
    fn default() -> Self {
        Self::new(None)
    }
}

impl Catalog {
    /// All plugins, or those that `plugins` of `config.yaml` names.
    pub fn new(list: Option<&[String]>) -> Self {
        Self { enabled: RwLock::new(enabled(list)), wasm: Vec::new(), attrs: None }
    }

    /// With the plugins of `wasm.plugins`.
    #[must_use]
    pub fn with_wasm(mut self, plugins: &[WasmPlugin]) -> Self {
        self.wasm = wasm::registrations(plugins);
        self
    }

    /// With what plugins are told of `config.yaml`: settings that do not fit it are refused.
    #[must_use]
    pub fn with_attrs(mut self, attrs: Attrs) -> Self {
        self.attrs = Some(attrs);
        self
    }

    /// Another list takes the place of the one before: `plugins` of `apisix.yaml`. Objects are judged by it the next
    /// time they are read.
    pub fn relist(&self, list: Option<&[String]>) {
        *self.enabled.write().unwrap_or_else(PoisonError::into_inner) = enabled(list);
    }

    /// Every plugin, whether or not the list has it.
    pub fn all(&self) -> impl Iterator<Item = &'static Registration> {
        registrations().iter().chain(self.wasm.iter().copied())
    }

    fn enabled(&self) -> RwLockReadGuard<'_, Enabled> {
        self.enabled.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_config(&self, registration: &Registration, value: &Value) -> Result<Value, Vec<ConfigError>> {
        let checked = (registration.check)(value)?;
        let Some(attrs) = &self.attrs else { return Ok(checked) };
        let errors = (registration.check_attr)(value, attrs.get(registration.name));
        if errors.is_empty() { Ok(checked) } else { Err(errors) }
    }

    fn registration(&self, name: &str) -> Option<&'static Registration> {
        let wasm = self.wasm.iter().find(|registration| registration.name == name).copied();
        wasm.or_else(|| self.enabled().get(name).copied())
    }

    /// The names of a `plugins` list that no plugin here has, for a notice at the start.
    pub fn unknown(list: &[String]) -> impl Iterator<Item = &str> {
        list.iter()
            .map(String::as_str)
            .filter(|name| registrations().iter().all(|registration| registration.name != *name))
            .filter(|name| !absent::is_harmless(name))
    }
}

fn enabled(list: Option<&[String]>) -> Enabled {
    registrations()
        .iter()
        .filter(|registration| list.is_none_or(|list| list.iter().any(|name| name == registration.name)))
        .map(|registration| (registration.name, registration))
        .collect()
}

impl PluginCatalog for Catalog {
    fn check(&self, name: &str, which: PluginSchema, value: &Value) -> Result<Value, Vec<ConfigError>> {
        let Some(registration) = self.registration(name) else { return Ok(value.clone()) };
        let extras = || (registration.extras)();
        let checked = match which {
            PluginSchema::Config => Some(self.check_config(registration, value)),
            PluginSchema::Consumer => extras().check_consumer(value),
            PluginSchema::Metadata => extras().check_metadata(value),
        };
        checked.unwrap_or_else(|| {
            let what = if which == PluginSchema::Metadata { "metadata" } else { "settings of a consumer" };
            Err(vec![ConfigError::invalid("", format!("plugin `{name}` has no {what}: take it out"))])
        })
    }

    fn schema(&self, name: &str, which: PluginSchema) -> Option<Value> {
        let registration = self.registration(name)?;
        match which {
            PluginSchema::Config => Some((registration.schema)()),
            PluginSchema::Consumer => (registration.extras)().consumer_schema(),
            PluginSchema::Metadata => (registration.extras)().metadata_schema(),
        }
    }

    fn priority(&self, name: &str) -> Option<i32> {
        self.registration(name).map(|registration| registration.priority)
    }

    fn names(&self) -> Vec<&'static str> {
        let enabled = self.enabled();
        let offered = registrations().iter().filter(|registration| enabled.contains_key(registration.name));
        let mut all: Vec<_> = offered.chain(self.wasm.iter().copied()).collect();
        all.sort_by_key(|registration| std::cmp::Reverse(registration.priority));
        all.into_iter().map(|registration| registration.name).collect()
    }

    fn is_auth(&self, name: &str) -> bool {
        self.registration(name).is_some_and(|registration| (registration.extras)().authenticates())
    }

    fn edge_alone(&self, name: &str) -> Option<&'static str> {
        match self.registration(name)?.placement {
            Placement::Both => None,
            Placement::Edge(why) => Some(why),
        }
    }

    fn refusal(&self, name: &str) -> Option<String> {
        if registrations().iter().any(|registration| registration.name == name) {
            let disabled = self.registration(name).is_none();
            return disabled.then(|| "it is disabled; add it to the list `plugins`".to_owned());
        }
        absent::advice(name)
    }

    fn is_harmless(&self, name: &str) -> bool {
        absent::is_harmless(name)
    }
}

#[cfg(test)]
mod tests {
    use config::{Kind, Resource, ResourceKey};
    use serde_json::json;

    use super::*;

    fn route(plugins: Value, catalog: &Catalog) -> Result<Value, String> {
        let route = json!({"uri": "/", "plugins": plugins});
        Resource::parse(&ResourceKey::new(Kind::Route, "1"), &route, catalog)
            .map(|resource| resource.to_value())
            .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn names_come_in_the_order_in_which_plugins_run() {
        let names = Catalog::default().names();
        let priorities: Vec<_> =
            names.iter().map(|name| Catalog::default().priority(name).unwrap()).collect();
        assert!(priorities.is_sorted_by(|a, b| a >= b), "{names:?}");
        assert!(names.contains(&"key-auth"));
    }

    #[test]
    fn a_plugin_that_is_not_here_refuses_its_object_with_advice() {
        let some = ["key-auth".to_owned()];
        let (all, few) = (Catalog::default(), Catalog::new(Some(&some)));
        let cases = [
            (&all, "uri-rewrite", "use `proxy-rewrite`"),
            (&all, "ldap-auth", "it exists in APISIX and is replaced here; use `forward-auth`"),
            (&all, "dubbo-proxy", "it exists in APISIX and is not planned here"),
            (&all, "key_auth", "did you mean `key-auth`?"),
            (&all, "nonsense", "take it out"),
            (&few, "request-id", "it is disabled; add it to the list `plugins`"),
        ];
        for (catalog, name, words) in cases {
            let error = route(json!({name: {}}), catalog).unwrap_err();
            assert!(error.contains(words) && error.contains(&format!("/plugins/{name}")), "{name}: {error}");
        }
        assert!(route(json!({"key-auth": {}}), &few).is_ok());
        few.relist(None);
        assert!(route(json!({"request-id": {}}), &few).is_ok());
    }

    #[test]
    fn names_that_texts_about_apisix_use_are_answered_with_what_is_meant() {
        let catalog = Catalog::default();
        let upstream = |fields: Value| {
            let mut upstream = json!({"nodes": {"127.0.0.1:80": 1}});
            upstream.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            (Kind::Upstream, upstream)
        };
        let plugin = |name: &str| (Kind::Route, json!({"uri": "/", "plugins": {name: {}}}));
        let cases = [
            (plugin("uri-rewrite"), "/plugins/uri-rewrite", "use `proxy-rewrite`"),
            (plugin("request-rewrite"), "/plugins/request-rewrite", "use `proxy-rewrite`"),
            (plugin("coraza"), "/plugins/coraza", "no web application firewall"),
            (plugin("debug-logger"), "/plugins/debug-logger", "`postern explain`"),
            (plugin("chash"), "/plugins/chash", "`type: chash`"),
            (plugin("oauth"), "/plugins/oauth", "`openid-connect`"),
            (
                upstream(json!({"checks": {"active": {"type": "redis"}}})),
                "/checks/active/type",
                "write one of `http`, `https`, `tcp`",
            ),
            (upstream(json!({"max_failures": 3})), "/max_failures", "`\"breaker\": {"),
            (
                upstream(json!({"checks": {"active": {"max_failures": 3}}})),
                "/checks/active/max_failures",
                "`\"breaker\": {",
            ),
            (
                upstream(json!({"checks": {"active": {"half_open": 3}}})),
                "/checks/active/half_open",
                "`\"breaker\": {",
            ),
            (upstream(json!({"retry_conditions": ["timeout"]})), "/retry_conditions", "`\"retry\": {"),
            (upstream(json!({"http_5xx": true})), "/http_5xx", "`\"retry\": {"),
            (upstream(json!({"type": "rondom"})), "/type", "`random`"),
        ];
        for ((kind, value), pointer, words) in cases {
            let errors = Resource::parse(&ResourceKey::new(kind, "1"), &value, &catalog).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
            let here = errors.iter().find(|error| error.pointer == pointer);
            assert!(here.is_some_and(|error| error.to_string().contains(words)), "{value}: {told}");
        }
        let (kind, random) = upstream(json!({"type": "random"}));
        assert!(Resource::parse(&ResourceKey::new(kind, "1"), &random, &catalog).is_ok());
    }

    #[test]
    fn a_harmless_plugin_is_kept_as_it_is_written() {
        let plugins = json!({"proxy-buffering": {"disable_proxy_buffering": true}, "ai": {}});
        assert_eq!(route(plugins.clone(), &Catalog::default()).unwrap()["plugins"], plugins);
    }

    #[test]
    fn settings_are_checked_and_filled_in() {
        let plugins = route(json!({"key-auth": {"hide_credentials": true}}), &Catalog::default()).unwrap();
        let expected =
            json!({"header": "apikey", "query": "apikey", "hide_credentials": true, "realm": "key"});
        assert_eq!(plugins["plugins"]["key-auth"], expected);
        let error = route(json!({"key-auth": {"headr": "x"}}), &Catalog::default()).unwrap_err();
        assert!(
            error.contains("/plugins/key-auth/headr") && error.contains("did you mean `header`?"),
            "{error}"
        );
    }

    #[test]
    fn consumers_and_metadata_have_their_own_settings() {
        let catalog = Catalog::default();
        assert!(catalog.check("key-auth", PluginSchema::Consumer, &json!({"key": "a"})).is_ok());
        let errors = catalog.check("key-auth", PluginSchema::Consumer, &json!({})).unwrap_err();
        assert!(errors[0].to_string().contains("`key` is missing"), "{errors:?}");
        assert!(catalog.check("request-id", PluginSchema::Metadata, &json!({})).is_err());
        assert!(catalog.is_auth("key-auth") && !catalog.is_auth("request-id"));
        assert!(catalog.schema("request-id", PluginSchema::Consumer).is_none());
    }

    #[test]
    fn names_of_a_list_that_are_not_here_are_told() {
        let list = ["cors", "key-auth", "dubbo-proxy", "proxy-control"].map(str::to_owned);
        let unknown: Vec<_> = Catalog::unknown(&list).collect();
        assert!(unknown.contains(&"dubbo-proxy") && !unknown.contains(&"key-auth"));
        assert!(!unknown.contains(&"proxy-control"));
    }
}
