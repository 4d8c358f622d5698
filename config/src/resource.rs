//! One object of any kind: read and checked from JSON, written back, asked for what it refers to.
//!
//! Reading is typed and fast. Only when it fails is the JSON Schema asked, so that every error is listed with
//! its pointer. Settings of plugins are checked through the catalog, which knows them; `_meta`, references to
//! secrets, and what APISIX has and this gateway refuses are settled here.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use std::sync::Arc;

use schemars::JsonSchema;

use crate::consumer::Consumer;
use crate::consumer_group::ConsumerGroup;
use crate::credential::Credential;
use crate::env::{Env, ProcessEnv};
use crate::error::{ConfigError, ErrorKind, escape, nearest};
use crate::expr::Expr;
use crate::fields::Plugins;
use crate::global_rule::GlobalRule;
use crate::id::{Id, Kind, ResourceKey};
use crate::lookup_table::{self, LookupEntry, LookupTable};
use crate::meta::{META, Meta};
use crate::plugin_catalog::{PluginCatalog, PluginSchema};
use crate::plugin_config::PluginConfig;
use crate::plugin_metadata::PluginMetadata;
use crate::proto::Proto;
use crate::route::{self, Route};
use crate::rules::{self, Rule};
use crate::schema::{self, type_of};
use crate::secret::{self, Aws, Gcp, Manager, Secret, Vault};
use crate::secret_ref::{self, Literals};
use crate::service::Service;
use crate::ssl::{self, Ssl};
use crate::stream_route::StreamRoute;
use crate::strict::Strict;
use crate::typed;
use crate::upstream::{self, Upstream};

/// An object that has been checked.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the kinds are described where they are named")]
pub enum Resource {
    Route(Box<Route>),
    Service(Box<Service>),
    Upstream(Box<Upstream>),
    Consumer(Box<Consumer>),
    Credential(Box<Credential>),
    ConsumerGroup(Box<ConsumerGroup>),
    PluginConfig(Box<PluginConfig>),
    GlobalRule(Box<GlobalRule>),
    PluginMetadata(Box<PluginMetadata>),
    Ssl(Box<Ssl>),
    Proto(Box<Proto>),
    Secret(Secret),
    StreamRoute(Box<StreamRoute>),
    LookupTable(Box<LookupTable>),
    LookupEntry(Arc<LookupEntry>),
}

impl Resource {
    /// Read, check and fill in defaults. References to the environment are looked up in that of the process.
    ///
    /// # Errors
    /// Everything that is wrong with the object, with pointers inside `value`.
    pub fn parse(
        key: &ResourceKey,
        value: &Value,
        catalog: &dyn PluginCatalog,
    ) -> Result<Resource, Vec<ConfigError>> {
        Resource::parse_with(key, value, catalog, &ProcessEnv)
    }

    /// As [`Resource::parse`], with another environment.
    ///
    /// # Errors
    /// As [`Resource::parse`].
    pub fn parse_with(
        key: &ResourceKey,
        value: &Value,
        catalog: &dyn PluginCatalog,
        env: &dyn Env,
    ) -> Result<Resource, Vec<ConfigError>> {
        let read = Read { key, value, catalog, env };
        Ok(match key.kind {
            Kind::Route => Resource::Route(read.object()?),
            Kind::Service => Resource::Service(read.object()?),
            Kind::Upstream => Resource::Upstream(read.object()?),
            Kind::Consumer => Resource::Consumer(read.object()?),
            Kind::Credential => Resource::Credential(read.object()?),
            Kind::ConsumerGroup => Resource::ConsumerGroup(read.object()?),
            Kind::PluginConfig => Resource::PluginConfig(read.object()?),
            Kind::GlobalRule => Resource::GlobalRule(read.object()?),
            Kind::PluginMetadata => Resource::PluginMetadata(read.object()?),
            Kind::Ssl => Resource::Ssl(read.object()?),
            Kind::Proto => Resource::Proto(read.object()?),
            Kind::Secret => match read.manager()? {
                Manager::Vault => Resource::Secret(Secret::Vault(read.object()?)),
                Manager::Aws => Resource::Secret(Secret::Aws(read.object()?)),
                Manager::Gcp => Resource::Secret(Secret::Gcp(read.object()?)),
            },
            Kind::StreamRoute => Resource::StreamRoute(read.object()?),
            Kind::LookupTable => Resource::LookupTable(read.object()?),
            Kind::LookupEntry => Resource::LookupEntry(Arc::from(read.object::<LookupEntry>()?)),
        })
    }

    /// What kind it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Resource::Route(_) => Kind::Route,
            Resource::Service(_) => Kind::Service,
            Resource::Upstream(_) => Kind::Upstream,
            Resource::Consumer(_) => Kind::Consumer,
            Resource::Credential(_) => Kind::Credential,
            Resource::ConsumerGroup(_) => Kind::ConsumerGroup,
            Resource::PluginConfig(_) => Kind::PluginConfig,
            Resource::GlobalRule(_) => Kind::GlobalRule,
            Resource::PluginMetadata(_) => Kind::PluginMetadata,
            Resource::Ssl(_) => Kind::Ssl,
            Resource::Proto(_) => Kind::Proto,
            Resource::Secret(_) => Kind::Secret,
            Resource::StreamRoute(_) => Kind::StreamRoute,
            Resource::LookupTable(_) => Kind::LookupTable,
            Resource::LookupEntry(_) => Kind::LookupEntry,
        }
    }

    /// As JSON, with defaults, and with references to secrets as they were written. The id is part of the key
    /// and not in here: see [`crate::graph::Item::to_value`]. Private keys that were written as such are.
    #[must_use]
    pub fn to_value(&self) -> Value {
        match self {
            Resource::Route(object) => object.written(),
            Resource::Service(object) => object.written(),
            Resource::Upstream(object) => object.written(),
            Resource::Consumer(object) => object.written(),
            Resource::Credential(object) => object.written(),
            Resource::ConsumerGroup(object) => object.written(),
            Resource::PluginConfig(object) => object.written(),
            Resource::GlobalRule(object) => object.written(),
            Resource::PluginMetadata(object) => object.written(),
            Resource::Ssl(object) => object.written(),
            Resource::Proto(object) => object.written(),
            Resource::Secret(Secret::Vault(object)) => object.written(),
            Resource::Secret(Secret::Aws(object)) => object.written(),
            Resource::Secret(Secret::Gcp(object)) => object.written(),
            Resource::StreamRoute(object) => object.written(),
            Resource::LookupTable(object) => object.written(),
            Resource::LookupEntry(object) => object.written(),
        }
    }

    /// The plugins on the object, secrets in place of their references.
    #[must_use]
    pub fn plugins(&self) -> Option<&Plugins> {
        match self {
            Resource::Route(object) => object.plugins.as_deref(),
            Resource::Service(object) => object.plugins.as_deref(),
            Resource::Consumer(object) => object.plugins.as_deref(),
            Resource::StreamRoute(object) => object.plugins.as_deref(),
            Resource::Credential(object) => Some(&object.plugins),
            Resource::ConsumerGroup(object) => Some(&object.plugins),
            Resource::PluginConfig(object) => Some(&object.plugins),
            Resource::GlobalRule(object) => Some(&object.plugins),
            Resource::Upstream(_)
            | Resource::PluginMetadata(_)
            | Resource::Ssl(_)
            | Resource::Proto(_)
            | Resource::LookupTable(_)
            | Resource::LookupEntry(_)
            | Resource::Secret(_) => None,
        }
    }

    /// The objects this one cannot do without, each once. The consumer of a credential is known from the key
    /// alone and not among them: see [`ResourceKey::consumer`].
    #[must_use]
    pub fn references(&self) -> Vec<ResourceKey> {
        let mut found = Vec::new();
        self.visit_references(&mut |_, key| found.push(key));
        if found.len() > 1 {
            found.sort_unstable();
            found.dedup();
        }
        found
    }

    /// As [`Resource::references`], with the pointer of each; one that is written twice comes twice.
    pub fn visit_references(&self, visit: &mut dyn FnMut(&str, ResourceKey)) {
        let mut id = |pointer: &str, id: Option<&Id>, kind: Kind| {
            if let Some(id) = id {
                visit(pointer, id.key(kind));
            }
        };
        match self {
            Resource::Route(object) => {
                id("/service_id", object.service_id.as_ref(), Kind::Service);
                id("/upstream_id", object.upstream_id.as_ref(), Kind::Upstream);
                id("/plugin_config_id", object.plugin_config_id.as_deref(), Kind::PluginConfig);
                id(INLINE_CERTIFICATE, client_certificate(object.upstream.as_deref()), Kind::Ssl);
            }
            Resource::Service(object) => {
                id("/upstream_id", object.upstream_id.as_ref(), Kind::Upstream);
                id(INLINE_CERTIFICATE, client_certificate(object.upstream.as_deref()), Kind::Ssl);
            }
            Resource::Upstream(object) => {
                id("/tls/client_cert_id", client_certificate(Some(object)), Kind::Ssl);
            }
            Resource::Consumer(object) => id("/group_id", object.group_id.as_ref(), Kind::ConsumerGroup),
            Resource::StreamRoute(object) => {
                id("/service_id", object.service_id.as_ref(), Kind::Service);
                id("/upstream_id", object.upstream_id.as_ref(), Kind::Upstream);
                id(INLINE_CERTIFICATE, client_certificate(object.upstream.as_deref()), Kind::Ssl);
                let superior = object.protocol.as_ref().and_then(|protocol| protocol.superior_id.as_ref());
                id("/protocol/superior_id", superior, Kind::StreamRoute);
            }
            Resource::LookupTable(table) => {
                for (key, entry) in table.entries.iter() {
                    let at = |field: &str| format!("/entries/{}{field}", escape(key));
                    id(&at("/upstream_id"), entry.upstream_id.as_ref(), Kind::Upstream);
                    let certificate = client_certificate(entry.upstream.as_deref());
                    id(&at(INLINE_CERTIFICATE), certificate, Kind::Ssl);
                }
            }
            Resource::LookupEntry(entry) => {
                id("/upstream_id", entry.upstream_id.as_ref(), Kind::Upstream);
                id(INLINE_CERTIFICATE, client_certificate(entry.upstream.as_deref()), Kind::Ssl);
            }
            _ => {}
        }
        if let Some(plugins) = self.plugins() {
            visit_references_of_plugins(plugins, visit);
        }
    }

    /// Where references to secrets were written.
    #[must_use]
    pub fn literals(&self) -> &Literals {
        match self {
            Resource::Route(object) => &object.literals,
            Resource::Service(object) => &object.literals,
            Resource::Upstream(object) => &object.literals,
            Resource::Consumer(object) => &object.literals,
            Resource::Credential(object) => &object.literals,
            Resource::ConsumerGroup(object) => &object.literals,
            Resource::PluginConfig(object) => &object.literals,
            Resource::GlobalRule(object) => &object.literals,
            Resource::PluginMetadata(object) => &object.literals,
            Resource::Ssl(object) => &object.literals,
            Resource::Proto(object) => &object.literals,
            Resource::Secret(Secret::Vault(object)) => &object.literals,
            Resource::Secret(Secret::Aws(object)) => &object.literals,
            Resource::Secret(Secret::Gcp(object)) => &object.literals,
            Resource::StreamRoute(object) => &object.literals,
            Resource::LookupTable(object) => &object.literals,
            Resource::LookupEntry(object) => &object.literals,
        }
    }
}

const INLINE_CERTIFICATE: &str = "/upstream/tls/client_cert_id";

fn client_certificate(upstream: Option<&Upstream>) -> Option<&Id> {
    upstream?.tls.as_ref()?.client_cert_id.as_ref()
}

/// What plugins refer to: `traffic-split` to upstreams, `grpc-transcode` to a protobuf definition.
fn visit_references_of_plugins(plugins: &Plugins, visit: &mut dyn FnMut(&str, ResourceKey)) {
    let mut id = |pointer: String, value: Option<&Value>, kind: Kind| {
        if let Some(id) = value.and_then(|value| Id::deserialize(value).ok()) {
            visit(&pointer, id.key(kind));
        }
    };
    if let Some(rules) = plugins.get("traffic-split").and_then(|settings| settings.get("rules")) {
        for (at, rule) in rules.as_array().into_iter().flatten().enumerate() {
            let targets = rule.get("weighted_upstreams").and_then(Value::as_array).into_iter().flatten();
            for (to, target) in targets.enumerate() {
                let place = format!("/plugins/traffic-split/rules/{at}/weighted_upstreams/{to}");
                id(format!("{place}/upstream_id"), target.get("upstream_id"), Kind::Upstream);
                let certificate = target.pointer("/upstream/tls/client_cert_id");
                id(format!("{place}/upstream/tls/client_cert_id"), certificate, Kind::Ssl);
            }
        }
    }
    if let Some(settings) = plugins.get("upstream-lookup") {
        id("/plugins/upstream-lookup/table".to_owned(), settings.get("table"), Kind::LookupTable);
    }
    if let Some(settings) = plugins.get("grpc-transcode") {
        id("/plugins/grpc-transcode/proto_id".to_owned(), settings.get("proto_id"), Kind::Proto);
    }
}

/// What reading needs to know of a kind.
trait Wire: DeserializeOwned + Serialize + JsonSchema + 'static {
    /// Which fields go together.
    const RULES: &'static [Rule] = &[];
    /// Fields of APISIX that are refused: name, and what to do instead.
    const REFUSED: &'static [(&'static str, &'static str)] = &[];

    /// The rules between values of fields.
    fn check(&self, _key: &ResourceKey, _errors: &mut Vec<ConfigError>) {}

    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        None
    }

    fn literals(&self) -> &Literals;

    fn literals_mut(&mut self) -> &mut Literals;

    /// As JSON, references to secrets as they were written.
    fn written(&self) -> Value {
        // Only a map with keys that are not text fails, and there is none.
        let mut value = serde_json::to_value(self).unwrap_or_default();
        self.literals().restore(&mut value);
        value
    }
}

const LUA: &str = "Lua is not run here; use `vars` for conditions and plugins for the rest";
const SCRIPT: (&str, &str) = ("script", LUA);

macro_rules! wire {
    ($type:ty $(, $item:item)*) => {
        impl Wire for $type {
            $($item)*

            fn literals(&self) -> &Literals {
                &self.literals
            }

            fn literals_mut(&mut self) -> &mut Literals {
                &mut self.literals
            }
        }
    };
}

wire!(
    Route,
    const RULES: &'static [Rule] = route::RULES;,
    const REFUSED: &'static [(&'static str, &'static str)] = &[
        SCRIPT,
        ("script_id", LUA),
        ("filter_func", "Lua is not run here; write the condition as `vars`"),
        ("service_protocol", "write `scheme: grpc` on the upstream"),
    ];,
    fn check(&self, _: &ResourceKey, errors: &mut Vec<ConfigError>) {
        Route::check(self, errors);
    },
    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        self.plugins.as_deref_mut()
    }
);
wire!(
    Service,
    const REFUSED: &'static [(&'static str, &'static str)] = &[SCRIPT];,
    fn check(&self, _: &ResourceKey, errors: &mut Vec<ConfigError>) {
        Service::check(self, errors);
    },
    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        self.plugins.as_deref_mut()
    }
);
wire!(
    LookupTable,
    fn check(&self, _: &ResourceKey, errors: &mut Vec<ConfigError>) {
        LookupTable::check(self, errors);
    }
);
wire!(
    LookupEntry,
    fn check(&self, _: &ResourceKey, errors: &mut Vec<ConfigError>) {
        LookupEntry::check(self, "", errors);
    }
);
wire!(
    Upstream,
    fn check(&self, _: &ResourceKey, errors: &mut Vec<ConfigError>) {
        Upstream::check(self, "", errors);
    }
);
wire!(
    Consumer,
    fn check(&self, key: &ResourceKey, errors: &mut Vec<ConfigError>) {
        if self.username.as_str() != &*key.id {
            let kind = ErrorKind::OtherId { found: self.username.to_string(), key: key.clone() };
            errors.push(ConfigError::new("/username", kind));
        }
    },
    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        self.plugins.as_deref_mut()
    }
);
wire!(
    Credential,
    fn check(&self, _: &ResourceKey, errors: &mut Vec<ConfigError>) {
        Credential::check(self, errors);
    },
    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        Some(&mut self.plugins)
    }
);
wire!(
    ConsumerGroup,
    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        Some(&mut self.plugins)
    }
);
wire!(
    PluginConfig,
    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        Some(&mut self.plugins)
    }
);
wire!(
    GlobalRule,
    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        Some(&mut self.plugins)
    }
);
wire!(PluginMetadata);
wire!(
    Ssl,
    const RULES: &'static [Rule] = ssl::RULES;,
    fn check(&self, _: &ResourceKey, errors: &mut Vec<ConfigError>) {
        Ssl::check(self, errors);
    }
);
wire!(Proto);
wire!(Vault);
wire!(Aws);
wire!(Gcp, const RULES: &'static [Rule] = secret::GCP_RULES;);
wire!(
    StreamRoute,
    fn check(&self, _: &ResourceKey, errors: &mut Vec<ConfigError>) {
        StreamRoute::check(self, errors);
    },
    fn plugins_mut(&mut self) -> Option<&mut Plugins> {
        self.plugins.as_deref_mut()
    }
);

/// The reading of one object.
struct Read<'a> {
    key: &'a ResourceKey,
    value: &'a Value,
    catalog: &'a dyn PluginCatalog,
    env: &'a dyn Env,
}

impl Read<'_> {
    fn object<T: Wire>(&self) -> Result<Box<T>, Vec<ConfigError>> {
        if !self.value.is_object() {
            let kind = ErrorKind::WrongType { found: type_of(self.value), expected: "an object".to_owned() };
            return Err(vec![ConfigError::new("", kind)]);
        }
        let (value, literals, mut errors) = secret_ref::resolve_all(self.value, self.env);
        let unresolved = errors.len();
        self.check_fields::<T>(&value, &mut errors);
        let object = match T::deserialize(Strict(&value)) {
            Ok(mut object) => {
                object.check(self.key, &mut errors);
                if let Some(plugins) = object.plugins_mut() {
                    self.check_plugins(plugins, &mut errors);
                }
                Some(object)
            }
            Err(_) => {
                self.list_errors::<T>(&value, &mut errors);
                None
            }
        };
        match object {
            Some(mut object) if errors.is_empty() => {
                *object.literals_mut() = literals;
                let mut object = Box::new(object);
                self.check_metadata(&mut *object)?;
                Ok(object)
            }
            _ => Err(distinct(errors, unresolved)),
        }
    }

    /// What is seen in the JSON itself, whether or not the type can be read.
    fn check_fields<T: Wire>(&self, value: &Value, errors: &mut Vec<ConfigError>) {
        let Some(object) = value.as_object() else { return };
        for (field, instead) in T::REFUSED {
            if object.contains_key(*field) {
                let kind =
                    ErrorKind::Unsupported { what: format!("`{field}`"), instead: (*instead).to_owned() };
                errors.push(ConfigError::new(format!("/{field}"), kind));
            }
        }
        self.check_id(object, errors);
        rules::check(T::RULES, object, "", errors);
        match self.key.kind {
            Kind::Upstream => upstream::check_fields(object, "", errors),
            Kind::LookupTable => lookup_table::check_table_fields(object, errors),
            Kind::LookupEntry => lookup_table::check_entry_fields(object, "", errors),
            Kind::Route | Kind::Service | Kind::StreamRoute => {
                if let Some(Value::Object(upstream)) = object.get("upstream") {
                    upstream::check_fields(upstream, "/upstream", errors);
                }
            }
            _ => {}
        }
        if self.key.kind == Kind::Route
            && let Some(vars) = object.get("vars").filter(|vars| !vars.is_null())
            && let Err(error) = Expr::parse(vars)
        {
            errors.push(error.under("/vars"));
        }
    }

    /// An id in the object has to be the one it is stored under.
    fn check_id(&self, object: &Map<String, Value>, errors: &mut Vec<ConfigError>) {
        let found = match object.get("id") {
            Some(Value::String(id)) => id.clone(),
            Some(Value::Number(id)) => id.to_string(),
            _ => return,
        };
        if found != *self.key.id && found != self.key.own_id() {
            let kind = ErrorKind::OtherId { found, key: self.key.clone() };
            errors.push(ConfigError::new("/id", kind));
        }
    }

    /// The typed reading has failed: everything the schema finds, and everything the plugins find.
    fn list_errors<T: Wire>(&self, value: &Value, errors: &mut Vec<ConfigError>) {
        let before = errors.len();
        let found = schema::errors::<T>(value);
        errors.extend(found.into_iter().filter(|error| !is_refused::<T>(error)));
        if errors.len() == before
            && let Err(error) = serde_path_to_error::deserialize::<_, T>(Strict(value))
        {
            let refused = T::REFUSED.iter().any(|(field, _)| value.get(*field).is_some());
            if !refused {
                let pointer = typed::pointer(error.path());
                errors.push(ConfigError::invalid(pointer, error.inner().to_string()));
            }
        }
        if let Some(Value::Object(plugins)) = value.get("plugins") {
            let mut plugins: Plugins = plugins.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            self.check_plugins(&mut plugins, errors);
        }
    }

    fn check_plugins(&self, plugins: &mut Plugins, errors: &mut Vec<ConfigError>) {
        for (name, settings) in plugins.iter_mut() {
            let place = || format!("/plugins/{}", escape(name));
            if !settings.is_object() {
                let expected = "an object with the settings of the plugin, {} for none".to_owned();
                let kind = ErrorKind::WrongType { found: type_of(settings), expected };
                errors.push(ConfigError::new(place(), kind));
                continue;
            }
            if let Err(found) = self.check_plugin(name, settings) {
                let place = place();
                errors.extend(found.into_iter().map(|error| error.under(&place)));
            }
        }
    }

    /// Check one plugin's settings and fill in its defaults.
    fn check_plugin(&self, name: &str, settings: &mut Value) -> Result<(), Vec<ConfigError>> {
        if self.catalog.priority(name).is_none() {
            return self.unknown_plugin(name);
        }
        let auth = self.catalog.is_auth(name);
        let which = match self.key.kind {
            Kind::Credential if !auth => {
                let reason = "a credential holds one authentication plugin; write this one on the consumer";
                let kind = ErrorKind::MisplacedPlugin { name: name.to_owned(), reason };
                return Err(vec![ConfigError::new("", kind)]);
            }
            Kind::Consumer | Kind::Credential if auth => PluginSchema::Consumer,
            _ => PluginSchema::Config,
        };
        let mut errors = Vec::new();
        let meta = settings.as_object_mut().and_then(|settings| settings.shift_remove(META));
        if let Some(meta) = &meta
            && let Err(found) = Meta::parse(meta)
        {
            errors.extend(found.into_iter().map(|error| error.under("/_meta")));
        }
        match self.catalog.check(name, which, settings) {
            Ok(filled) => *settings = filled,
            Err(found) => errors.extend(found),
        }
        if let (Some(meta), Some(settings)) = (meta, settings.as_object_mut()) {
            settings.insert(META.to_owned(), meta);
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn unknown_plugin(&self, name: &str) -> Result<(), Vec<ConfigError>> {
        if self.catalog.is_harmless(name) {
            return Ok(());
        }
        let advice = self.catalog.refusal(name).or_else(|| {
            let nearest = nearest(name, self.catalog.names())?;
            Some(format!("did you mean `{nearest}`?"))
        });
        let kind = ErrorKind::UnknownPlugin { name: name.to_owned(), advice };
        Err(vec![ConfigError::new("", kind)])
    }

    /// The settings of plugin metadata are the object itself.
    fn check_metadata<T: Wire>(&self, object: &mut T) -> Result<(), Vec<ConfigError>> {
        let Some(metadata) = (object as &mut dyn std::any::Any).downcast_mut::<PluginMetadata>() else {
            return Ok(());
        };
        let name = &*self.key.id;
        if self.catalog.priority(name).is_none() {
            return self.unknown_plugin(name);
        }
        if self.catalog.schema(name, PluginSchema::Metadata).is_none() {
            let reason = "it has no settings for the whole gateway; write them where the plugin is used";
            let kind = ErrorKind::MisplacedPlugin { name: name.to_owned(), reason };
            return Err(vec![ConfigError::new("", kind)]);
        }
        let settings = Value::Object(std::mem::take(&mut metadata.settings));
        if let Value::Object(filled) = self.catalog.check(name, PluginSchema::Metadata, &settings)? {
            metadata.settings = filled;
        }
        Ok(())
    }

    fn manager(&self) -> Result<Manager, Vec<ConfigError>> {
        let name = self.key.id.split_once('/').map_or(&*self.key.id, |(name, _)| name);
        Manager::from_name(name).ok_or_else(|| {
            let allowed: Vec<String> = Manager::ALL.iter().map(|manager| manager.name().to_owned()).collect();
            let kind = ErrorKind::NotOneOf { found: name.to_owned(), allowed, nearest: None };
            vec![ConfigError::new("/id", kind)]
        })
    }
}

/// Whether the schema complains of a field that was refused with better words.
fn is_refused<T: Wire>(error: &ConfigError) -> bool {
    matches!(error.kind, ErrorKind::UnknownField { .. })
        && T::REFUSED.iter().any(|(field, _)| error.pointer.strip_prefix('/') == Some(field))
}

/// Each error once, and nothing about the text of a reference that could not be replaced.
fn distinct(errors: Vec<ConfigError>, unresolved: usize) -> Vec<ConfigError> {
    let mut kept: Vec<ConfigError> = Vec::with_capacity(errors.len());
    for (index, error) in errors.into_iter().enumerate() {
        let known = kept.iter().enumerate().any(|(at, earlier)| {
            earlier.pointer == error.pointer
                && (earlier.kind == error.kind
                    || (at < unresolved && index >= unresolved)
                    || matches!(earlier.kind, ErrorKind::Unsupported { .. }))
        });
        if !known {
            kept.push(error);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::testing::TestCatalog;

    fn env() -> BTreeMap<String, String> {
        BTreeMap::from([("KEY".to_owned(), "s3cret".to_owned())])
    }

    fn parse(kind: Kind, id: &str, value: &Value) -> Result<Resource, Vec<ConfigError>> {
        Resource::parse_with(&ResourceKey::new(kind, id), value, &TestCatalog, &env())
    }

    fn route(extra: Value) -> Value {
        let mut route = json!({"uri": "/a", "upstream_id": 1});
        merge(&mut route, extra);
        route
    }

    fn upstream(extra: Value) -> Value {
        let mut upstream = json!({"nodes": {"127.0.0.1:80": 1}});
        merge(&mut upstream, extra);
        upstream
    }

    fn ssl(extra: Value) -> Value {
        let mut ssl = json!({"sni": "foo.com", "cert": "c".repeat(128), "key": "k".repeat(64)});
        merge(&mut ssl, extra);
        ssl
    }

    /// Members of `extra` win; `null` takes a member out.
    fn merge(value: &mut Value, extra: Value) {
        for (field, member) in extra.as_object().unwrap() {
            if member.is_null() {
                value.as_object_mut().unwrap().shift_remove(field);
            } else {
                value[field] = member.clone();
            }
        }
    }

    #[test]
    fn defaults_are_those_of_apisix() {
        let parsed =
            parse(Kind::Route, "1", &json!({"uri": "/a", "upstream": {"nodes": {"a:80": 1}}})).unwrap();
        assert_eq!(
            parsed.to_value(),
            json!({
                "uri": "/a",
                "priority": 0,
                "status": 1,
                "upstream": {
                    "nodes": {"a:80": 1}, "type": "roundrobin", "hash_on": "vars", "scheme": "http", "pass_host": "pass",
                },
            })
        );
        let checks = json!({"nodes": [{"host": "a", "weight": 1}], "checks": {
            "active": {"healthy": {}, "unhealthy": {}}, "passive": {"healthy": {}, "unhealthy": {}},
        }, "keepalive_pool": {}});
        assert_eq!(
            parse(Kind::Upstream, "1", &checks).unwrap().to_value(),
            json!({
                "nodes": [{"host": "a", "weight": 1, "priority": 0}],
                "type": "roundrobin", "hash_on": "vars", "scheme": "http", "pass_host": "pass",
                "keepalive_pool": {"size": 320, "idle_timeout": 60, "requests": 1000},
                "checks": {
                    "active": {
                        "type": "http", "timeout": 1, "concurrency": 10, "http_method": "GET", "http_path": "/",
                        "http_req_body": "", "https_verify_certificate": true,
                        "healthy": {"interval": 1, "http_statuses": [200, 302], "successes": 2},
                        "unhealthy": {
                            "interval": 1, "http_statuses": [429, 404, 500, 501, 502, 503, 504, 505],
                            "http_failures": 5, "tcp_failures": 2, "timeouts": 3,
                        },
                    },
                    "passive": {
                        "type": "http",
                        "healthy": {
                            "http_statuses": [
                                200, 201, 202, 203, 204, 205, 206, 207, 208, 226,
                                300, 301, 302, 303, 304, 305, 306, 307, 308,
                            ],
                            "successes": 5,
                        },
                        "unhealthy": {
                            "http_statuses": [429, 500, 503], "http_failures": 5, "tcp_failures": 2, "timeouts": 7,
                        },
                    },
                },
            })
        );
    }

    /// Objects that are right, of every kind and with every field.
    fn accepted() -> Vec<(Kind, &'static str, Value)> {
        let timeout = json!({"connect": 0.5, "send": 6, "read": 60});
        let meta = json!({
            "name": "n", "desc": "", "labels": {"team": "a/b", "env": "prod"},
            "create_time": 1_700_000_000, "update_time": 1_700_000_001,
        });
        let mut objects = vec![
            (Kind::Route, "1", json!({"uri": "/a", "plugins": {}})),
            (Kind::Route, "1", json!({"id": 1, "uris": ["/a", "/b*"], "service_id": "s"})),
            (Kind::Route, "1", json!({"id": "1", "uri": "*", "upstream": upstream(json!({}))})),
            (
                Kind::Route,
                "r.x",
                route(json!({
                    "host": "*.foo.com", "remote_addr": "10.0.0.0/8", "methods": ["GET", "PURGE"], "priority": -3,
                    "vars": [["arg_a", "==", "1"], ["arg_b", "==", null]], "plugin_config_id": 3, "timeout": timeout,
                    "enable_websocket": true, "status": 0,
                })),
            ),
            (
                Kind::Route,
                "1",
                route(json!({
                    "hosts": ["foo.com", "*", "[::1]"], "remote_addrs": ["127.0.0.1", "::1", "fd00::/8", "10.1.2.3/8"],
                    "methods": [], "vars": [],
                })),
            ),
            (Kind::Service, "1", json!({})),
            (
                Kind::Service,
                "1",
                json!({
                    "hosts": ["a"], "plugins": {}, "upstream_id": 1, "enable_websocket": false,
                    "upstream": upstream(json!({})),
                }),
            ),
            (Kind::Upstream, "1", upstream(json!({"nodes": {}}))),
            (Kind::Upstream, "1", upstream(json!({"nodes": []}))),
            (
                Kind::Upstream,
                "1",
                upstream(json!({"nodes": {"[::1]:80": 1, "foo": 0, "[::2]": 5, "10.0.0.1:65535": 1}})),
            ),
            (
                Kind::Upstream,
                "1",
                upstream(json!({"nodes": [
                    {"host": "[::1]", "port": 80, "weight": 1, "priority": -1, "metadata": {"zone": null}},
                    {"host": "::1", "weight": 0},
                ]})),
            ),
            (
                Kind::Upstream,
                "1",
                upstream(json!({
                    "nodes": null, "service_name": "s", "discovery_type": "dns",
                    "discovery_args": {"namespace_id": "a", "group_name": "b"},
                })),
            ),
            (Kind::Upstream, "1", upstream(json!({"type": "chash", "key": "arg_x"}))),
            (
                Kind::Upstream,
                "1",
                upstream(json!({"type": "chash", "key": "remote_addr", "hash_on": "vars"})),
            ),
            (Kind::Upstream, "1", upstream(json!({"type": "chash", "key": "X-User", "hash_on": "header"}))),
            (Kind::Upstream, "1", upstream(json!({"type": "chash", "key": "session", "hash_on": "cookie"}))),
            (Kind::Upstream, "1", upstream(json!({"type": "chash", "hash_on": "consumer"}))),
            (
                Kind::Upstream,
                "1",
                upstream(json!({
                    "type": "chash", "hash_on": "vars_combinations", "key": "$request_uri$remote_addr",
                })),
            ),
            (
                Kind::Upstream,
                "1",
                upstream(json!({
                    "type": "least_conn", "scheme": "grpcs", "pass_host": "rewrite", "upstream_host": "foo.com",
                    "retries": 0, "retry_timeout": 0, "timeout": timeout,
                    "keepalive_pool": {"size": 1, "idle_timeout": 0, "requests": 1},
                    "tls": {"client_cert_id": 1, "verify": true, "ca_certs": ["c".repeat(128)]},
                    "retry_budget": {"percent": 0}, "all_unhealthy": "refuse", "dns": {"min_ttl": 30},
                })),
            ),
            (
                Kind::Upstream,
                "1",
                upstream(json!({
                    "breaker": {
                        "max_failures": 3, "window": 0.5, "cool_down": 2, "half_open": 2, "statuses": [],
                        "all_open": "use_all",
                    },
                    "retry": {
                        "on": ["http_5xx"], "statuses": [429], "non_idempotent": true,
                        "budget": {"percent": 10, "min_per_second": 1},
                    },
                    "sticky": {
                        "cookie": "sid", "max_age": 60, "path": "/a", "secure": true, "http_only": false,
                        "same_site": "none", "key": "k".repeat(16),
                    },
                    "slow_start": 30,
                })),
            ),
            (
                Kind::Upstream,
                "1",
                upstream(json!({
                    "type": "ewma", "scheme": "https",
                    "tls": {"client_cert": "c".repeat(128), "client_key": "k".repeat(64), "ca": ["c".repeat(128)]},
                    "checks": {"active": {
                        "type": "https", "timeout": 0.5, "concurrency": 1, "host": "foo.com", "port": 1,
                        "http_method": "HEAD", "http_path": "/ping", "http_req_body": "x",
                        "https_verify_certificate": false, "req_headers": ["A: b"],
                        "healthy": {"interval": 2, "http_statuses": [200], "successes": 254},
                        "unhealthy": {"timeouts": 1},
                    }},
                })),
            ),
            (
                Kind::Upstream,
                "1",
                upstream(json!({"checks": {"passive": {"unhealthy": {"http_failures": 0}}}})),
            ),
            (Kind::Consumer, "jack", json!({"username": "jack", "group_id": "g"})),
            (
                Kind::Consumer,
                "jack",
                json!({"username": "jack", "id": "jack", "plugins": {"key-auth": {"key": "k"}}}),
            ),
            (Kind::Credential, "jack/credentials/a", json!({"plugins": {"key-auth": {"key": "k"}}})),
            (
                Kind::Credential,
                "jack/credentials/a",
                json!({
                    "id": "jack/credentials/a", "name": "n", "plugins": {"key-auth": {"key": "k"}},
                }),
            ),
            (Kind::ConsumerGroup, "g", json!({"id": "g", "plugins": {}})),
            (Kind::PluginConfig, "1", json!({"plugins": {"limit-count": {"count": 1}}})),
            (Kind::GlobalRule, "1", json!({"id": 1, "plugins": {}, "create_time": 1})),
            (Kind::PluginMetadata, "http-logger", json!({"id": "http-logger", "log_format": {"a": "$b"}})),
            (Kind::Ssl, "1", ssl(json!({}))),
            (
                Kind::Ssl,
                "1",
                ssl(json!({
                    "sni": null, "snis": ["*.foo.com", "*"], "certs": ["c".repeat(128)], "keys": ["k".repeat(64)],
                    "client": {"ca": "c".repeat(128), "depth": 0, "skip_mtls_uri_regex": ["^/open/.*$"]},
                    "ssl_protocols": ["TLSv1.1", "TLSv1.2", "TLSv1.3"], "status": 0, "desc": "d",
                })),
            ),
            (Kind::Ssl, "1", ssl(json!({"sni": null, "type": "client"}))),
            (
                Kind::Ssl,
                "1",
                ssl(
                    json!({"key": "signer://main/shop", "certs": ["c".repeat(128)], "keys": ["signer://main/rsa"]}),
                ),
            ),
            (Kind::Ssl, "1", json!({"snis": ["a.test", "B.Test."], "acme": {}})),
            (Kind::Ssl, "1", json!({"sni": "a.test", "acme": {"challenge": "tls-alpn-01"}})),
            (Kind::Proto, "1", json!({"content": "syntax = \"proto3\";"})),
            (
                Kind::Secret,
                "vault/1",
                json!({
                    "id": "vault/1", "uri": "https://127.0.0.1:8200", "prefix": "kv", "token": "t", "namespace": "n",
                }),
            ),
            (Kind::Secret, "aws/1", json!({"id": 1, "access_key_id": "a", "secret_access_key": "b"})),
            (Kind::Secret, "gcp/1", json!({"auth_file": "/a.json", "ssl_verify": false})),
            (
                Kind::Secret,
                "gcp/1",
                json!({
                    "auth_config": {"client_email": "a@b", "private_key": "k", "project_id": "p"},
                }),
            ),
            (Kind::StreamRoute, "1", json!({})),
            (
                Kind::StreamRoute,
                "1",
                json!({
                    "remote_addr": "10.0.0.1", "server_addr": "10.0.0.2/32", "server_port": 9100, "sni": "a.com",
                    "upstream": upstream(json!({"scheme": "tcp"})), "plugins": {},
                    "protocol": {"name": "redis", "superior_id": 1, "conf": {}, "logger": [
                        {"name": "syslog", "filter": [["rpc_time", ">", 1]], "conf": {}},
                    ]},
                }),
            ),
        ];
        for (kind, id, mut object) in [
            (Kind::Route, "1", route(json!({}))),
            (Kind::Service, "1", json!({})),
            (Kind::Upstream, "1", upstream(json!({}))),
            (Kind::ConsumerGroup, "1", json!({"plugins": {}})),
            (Kind::PluginConfig, "1", json!({"plugins": {}})),
            (Kind::Proto, "1", json!({"content": "x"})),
            (Kind::StreamRoute, "1", json!({})),
        ] {
            merge(&mut object, meta.clone());
            objects.push((kind, id, object));
        }
        objects
    }

    /// The validator of the published schema of a kind.
    fn published(kind: Kind, id: &str) -> jsonschema::Validator {
        let schema = match kind {
            Kind::Secret => {
                schema::schema_for_manager(Manager::from_name(id.split_once('/').unwrap().0).unwrap())
            }
            _ => schema::schema_for(kind, &TestCatalog),
        };
        jsonschema::options().should_validate_formats(true).build(&schema).unwrap()
    }

    #[test]
    fn every_field_of_apisix_is_read_and_fits_the_published_schema() {
        for (kind, id, value) in accepted() {
            let parsed =
                parse(kind, id, &value).unwrap_or_else(|errors| panic!("{kind} {value}: {errors:?}"));
            let errors: Vec<String> =
                published(kind, id).iter_errors(&value).map(|e| e.to_string()).collect();
            assert!(errors.is_empty(), "{kind} {value}: {errors:?}");
            // What is answered can be sent back, and means the same.
            let written = parsed.to_value();
            let again =
                parse(kind, id, &written).unwrap_or_else(|errors| panic!("{kind} {written}: {errors:?}"));
            assert_eq!(again, parsed, "{kind} {written}");
            for (field, member) in value.as_object().unwrap() {
                // Numbers written as ids become text, and `ca` is written under its first name.
                if field != "id" && !field.ends_with("_id") && field != "tls" && member.is_string() {
                    assert_eq!(&written[field], member, "{kind} {field}");
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_is_refused_at_its_place_with_what_to_write() {
        let up = |extra: Value| route(json!({"upstream_id": null, "upstream": upstream(extra)}));
        let cases = [
            // Routes.
            (Kind::Route, json!([]), "", "found a list, write an object"),
            (Kind::Route, route(json!({"uri": null})), "", "none of `uri`, `uris` is there"),
            (Kind::Route, route(json!({"uris": ["/b"]})), "", "`uri` and `uris` exclude each other"),
            (Kind::Route, route(json!({"uri": null, "uris": []})), "/uris", "at least 1 elements"),
            (Kind::Route, route(json!({"uri": null, "uris": ["/a", "/a"]})), "/uris", "written twice"),
            (Kind::Route, route(json!({"uri": ""})), "/uri", "the length 0 is out of range: write 1 to 4096"),
            (Kind::Route, route(json!({"uri": 5})), "/uri", "found a number, write text"),
            (Kind::Route, route(json!({"host": "a", "hosts": ["b"]})), "", "`host` and `hosts` exclude"),
            (Kind::Route, route(json!({"host": "a b"})), "/host", "`a b` is not a host name"),
            (Kind::Route, route(json!({"hosts": ["a", "b*"]})), "/hosts/1", "`b*` is not a host name"),
            (
                Kind::Route,
                route(json!({"remote_addr": "1.1.1.1", "remote_addrs": ["1.1.1.1"]})),
                "",
                "exclude each other",
            ),
            (
                Kind::Route,
                route(json!({"remote_addr": "1.1.1.256"})),
                "/remote_addr",
                "is not an IPv4 or IPv6 address",
            ),
            (
                Kind::Route,
                route(json!({"remote_addrs": ["10.0.0.0/33"]})),
                "/remote_addrs/0",
                "is not an IPv4 or IPv6",
            ),
            (Kind::Route, route(json!({"methods": ["GRAB"]})), "/methods/0", "write one of `GET`, `POST`"),
            (Kind::Route, route(json!({"methods": ["get"]})), "/methods/0", "did you mean `GET`?"),
            (Kind::Route, route(json!({"priority": "1"})), "/priority", "found text, write a whole number"),
            (Kind::Route, route(json!({"status": 2})), "/status", "write one of `1`, `0`"),
            (Kind::Route, route(json!({"upstream_id": null})), "", "none of `upstream`, `upstream_id`"),
            (
                Kind::Route,
                route(json!({"upstream_id": 0})),
                "/upstream_id",
                "0 is out of range: write 1 or more",
            ),
            (Kind::Route, route(json!({"upstream_id": "a b"})), "/upstream_id", "is not 1 to 64 of a-z"),
            (Kind::Route, route(json!({"upstraem": {}})), "/upstraem", "did you mean `upstream`?"),
            (Kind::Route, route(json!({"id": "2"})), "/id", "the id is `2`, but the object is routes/1"),
            (
                Kind::Route,
                route(json!({"timeout": {"connect": 1, "send": 1}})),
                "/timeout",
                "`read` is missing",
            ),
            (
                Kind::Route,
                route(json!({"timeout": {"connect": 0, "send": 1, "read": 1}})),
                "/timeout/connect",
                "more than 0",
            ),
            (Kind::Route, route(json!({"name": ""})), "/name", "the length 0"),
            (Kind::Route, route(json!({"desc": "é".repeat(257)})), "/desc", "the length 257 is out of range"),
            (Kind::Route, route(json!({"labels": {"a": "b c"}})), "/labels/a", "is not a label value"),
            (Kind::Route, route(json!({"labels": {"a": 1}})), "/labels/a", "found a number"),
            (
                Kind::Route,
                route(json!({"script": "return 1 + 1"})),
                "/script",
                "`script` is not supported: Lua",
            ),
            (
                Kind::Route,
                route(json!({"filter_func": "function(vars) end"})),
                "/filter_func",
                "write the condition as `vars`",
            ),
            (Kind::Route, route(json!({"vars": [["arg_a", "=", 1]]})), "/vars/0/1", "invalid operator '='"),
            (Kind::Route, route(json!({"vars": "arg_a == 1"})), "/vars", "an array like"),
            // Upstreams, on their own and inside a route.
            (Kind::Upstream, upstream(json!({"nodes": null})), "", "none of `nodes`, `service_name`"),
            (
                Kind::Upstream,
                upstream(json!({"service_name": "a", "discovery_type": "dns"})),
                "",
                "exclude each other",
            ),
            (Kind::Upstream, json!({"service_name": "a"}), "", "`service_name` needs `discovery_type`"),
            (
                Kind::Upstream,
                upstream(json!({"nodes": 5})),
                "/nodes",
                "found a number, write an object or a list",
            ),
            (
                Kind::Upstream,
                upstream(json!({"nodes": {"::1:80": 1}})),
                "/nodes/::1:80",
                "with IPv6 in brackets",
            ),
            (
                Kind::Upstream,
                upstream(json!({"nodes": {"a:99999": 1}})),
                "/nodes",
                "`a:99999` is not host:port",
            ),
            (
                Kind::Upstream,
                upstream(json!({"nodes": {"a:80": -1}})),
                "/nodes/a:80",
                "-1 is out of range: write 0 or more",
            ),
            (Kind::Upstream, upstream(json!({"nodes": {"a/b:80": 1}})), "/nodes/a~1b:80", "is not host:port"),
            (Kind::Upstream, upstream(json!({"nodes": [{"host": "a"}]})), "/nodes/0", "`weight` is missing"),
            (
                Kind::Upstream,
                upstream(json!({"nodes": [{"host": "a", "weight": 1, "port": 0}]})),
                "/nodes/0/port",
                "1 to 65535",
            ),
            (
                Kind::Upstream,
                upstream(json!({"nodes": [{"host": "a", "weight": 1, "prot": 1}]})),
                "/nodes/0/prot",
                "did you mean `port`?",
            ),
            (
                Kind::Upstream,
                upstream(json!({"nodes": [{"host": "*", "weight": 1}]})),
                "/nodes/0",
                "the host of a single node",
            ),
            (
                Kind::Upstream,
                upstream(json!({"nodes": {"a": 1}, "scheme": "tcp"})),
                "/nodes/a",
                "host:port, for the scheme",
            ),
            (
                Kind::Upstream,
                upstream(json!({"type": "fastest"})),
                "/type",
                "write one of `roundrobin`, `chash`, `ewma`",
            ),
            (
                Kind::Upstream,
                upstream(json!({"scheme": "kafka"})),
                "/scheme",
                "`scheme: kafka` is not supported",
            ),
            (Kind::Upstream, upstream(json!({"type": "chash"})), "", "`type: chash` needs `key`"),
            (
                Kind::Upstream,
                upstream(json!({"type": "chash", "key": "body"})),
                "/key",
                "write one of uri, server_name",
            ),
            (
                Kind::Upstream,
                upstream(json!({"type": "chash", "hash_on": "header", "key": "a b"})),
                "/key",
                "a name of a-z",
            ),
            (
                Kind::Upstream,
                upstream(json!({"pass_host": "rewrite"})),
                "",
                "`pass_host: rewrite` needs `upstream_host`",
            ),
            (Kind::Upstream, upstream(json!({"retries": -1})), "/retries", "0 or more"),
            (
                Kind::Upstream,
                upstream(json!({"keepalive_pool": {"size": 0}})),
                "/keepalive_pool/size",
                "1 or more",
            ),
            (Kind::Upstream, upstream(json!({"checks": {}})), "/checks", "none of `active`, `passive`"),
            (
                Kind::Upstream,
                upstream(json!({"checks": {"active": {"type": "redis"}}})),
                "/checks/active/type",
                "write one of `http`, `https`, `tcp`",
            ),
            (
                Kind::Upstream,
                upstream(json!({"checks": {"active": {"healthy": {"http_statuses": [100]}}}})),
                "/checks/active/healthy/http_statuses/0",
                "200 to 599",
            ),
            (
                Kind::Upstream,
                upstream(json!({"checks": {"active": {"healthy": {"successes": 255}}}})),
                "/checks/active/healthy/successes",
                "1 to 254",
            ),
            (
                Kind::Upstream,
                upstream(json!({"tls": {"client_cert": "c".repeat(128)}})),
                "/tls",
                "`client_cert` needs `client_key`",
            ),
            (
                Kind::Upstream,
                upstream(
                    json!({"tls": {"client_cert_id": 1, "client_cert": "c".repeat(128), "client_key": "k".repeat(64)}}),
                ),
                "/tls",
                "exclude each other",
            ),
            (
                Kind::Upstream,
                upstream(json!({"tls": {"client_cert": "short", "client_key": "k".repeat(64)}})),
                "/tls/client_cert",
                "the length 5",
            ),
            (
                Kind::Upstream,
                upstream(json!({"all_unhealthy": "panic"})),
                "/all_unhealthy",
                "`use_all`, `refuse`",
            ),
            (Kind::Upstream, upstream(json!({"slow_start": {}})), "/slow_start", "write a number"),
            (Kind::Upstream, upstream(json!({"slow_start": 0})), "/slow_start", "more than 0"),
            (Kind::Upstream, upstream(json!({"slow_strat": 1})), "/slow_strat", "unknown field"),
            // What users write at the top, because they know it from elsewhere.
            (Kind::Upstream, upstream(json!({"max_failures": 3})), "/max_failures", "`\"breaker\": {"),
            (Kind::Upstream, upstream(json!({"half_open": {}})), "/half_open", "`\"breaker\": {"),
            (Kind::Upstream, upstream(json!({"unhealthy": {"interval": 5}})), "/unhealthy", "checks.passive"),
            (Kind::Upstream, upstream(json!({"retry_on": ["http_5xx"]})), "/retry_on", "`\"retry\": {"),
            (Kind::Route, up(json!({"cool_down": 3})), "/upstream/cool_down", "`\"breaker\": {"),
            (Kind::Upstream, upstream(json!({"sticky_cookie": "a"})), "/sticky_cookie", "`\"sticky\": {"),
            (
                Kind::Upstream,
                upstream(json!({"breaker": {"max_failures": 0}})),
                "/breaker/max_failures",
                "1 to 1000",
            ),
            (
                Kind::Upstream,
                upstream(json!({"breaker": {"max_fails": 1}})),
                "/breaker/max_fails",
                "unknown field",
            ),
            (
                Kind::Upstream,
                upstream(json!({"retry": {"on": ["5xx"]}})),
                "/retry/on/0",
                "`connect_failure`, `timeout`, `reset`, `http_5xx`",
            ),
            (
                Kind::Upstream,
                upstream(json!({"retry": {"budget": {}}, "retry_budget": {}})),
                "",
                "`retry_budget` and `retry.budget` exclude each other",
            ),
            (Kind::Upstream, upstream(json!({"sticky": {"cookie": "a b"}})), "/sticky/cookie", "of a cookie"),
            (Kind::Upstream, upstream(json!({"sticky": {"key": "short"}})), "/sticky/key", "the length 5"),
            (Kind::Route, up(json!({"type": "chash"})), "/upstream", "needs `key`"),
            (Kind::Route, up(json!({"checks": {}})), "/upstream/checks", "none of"),
            (Kind::Route, up(json!({"nodes": {"a": 1}, "scheme": "udp"})), "/upstream/nodes/a", "host:port"),
            (Kind::Service, json!({"script": "return 1 + 1"}), "/script", "not supported"),
            (Kind::Service, json!({"upstream": {}}), "/upstream", "none of `nodes`"),
            (Kind::Service, json!({"uri": "/a"}), "/uri", "unknown field"),
            // Nothing is not a value.
            (
                Kind::Route,
                json!({"uri": "/a", "upstream_id": 1, "hosts": null}),
                "/hosts",
                "the value is null",
            ),
            (
                Kind::Route,
                up(json!({"tls": {"verify": Value::Null}})),
                "/upstream/tls/verify",
                "the value is null",
            ),
            // Certificates.
            (Kind::Ssl, ssl(json!({"sni": null})), "", "none of `sni`, `snis`"),
            (Kind::Ssl, ssl(json!({"snis": ["a"]})), "", "exclude each other"),
            (Kind::Ssl, ssl(json!({"key": null})), "", "`cert` needs `key`"),
            (Kind::Ssl, ssl(json!({"cert": null})), "", "none of `cert`, `acme`"),
            (
                Kind::Ssl,
                json!({"sni": "a.test", "acme": {"chalenge": "http-01"}}),
                "/acme/chalenge",
                "`challenge`",
            ),
            (
                Kind::Ssl,
                json!({"sni": "a.test", "acme": {"challenge": "dns-01"}}),
                "/acme/challenge",
                "`http-01`",
            ),
            (Kind::Ssl, json!({"sni": "*.a.test", "acme": {}}), "/sni", "DNS-01"),
            (Kind::Ssl, json!({"snis": ["a.test", "*"], "acme": {}}), "/snis/1", "DNS-01"),
            (Kind::Ssl, json!({"snis": ["localhost"], "acme": {}}), "/snis/0", "no DNS name"),
            (Kind::Ssl, json!({"snis": ["10.0.0.1"], "acme": {}}), "/snis/0", "no DNS name"),
            (Kind::Ssl, json!({"snis": ["a_b.test"], "acme": {}}), "/snis/0", "no DNS name"),
            (Kind::Ssl, json!({"snis": ["a.test:443"], "acme": {}}), "/snis/0", "no DNS name"),
            (Kind::Ssl, json!({"type": "client", "acme": {}}), "/acme", "client certificates"),
            (
                Kind::Ssl,
                json!({"sni": "a.test", "acme": {}, "key": "k".repeat(64)}),
                "",
                "exclude each other",
            ),
            (Kind::Ssl, ssl(json!({"key": "short"})), "/key", "the length 5"),
            (Kind::Ssl, ssl(json!({"key": "signer://main"})), "/key", "signer://"),
            (
                Kind::Ssl,
                ssl(json!({"key": "signer://main/shop", "sni": null, "type": "client"})),
                "/key",
                "handshakes of servers alone",
            ),
            (
                Kind::Ssl,
                ssl(json!({"certs": ["c".repeat(128)], "keys": ["signer://main/shop"]})),
                "/keys/0",
                "all at one pool",
            ),
            (
                Kind::Ssl,
                ssl(
                    json!({"key": "signer://main/a", "certs": ["c".repeat(128)], "keys": ["signer://other/b"]}),
                ),
                "/keys/0",
                "all keys of an object are at one pool",
            ),
            (Kind::Ssl, ssl(json!({"certs": ["c".repeat(128)]})), "/keys", "one key for each"),
            (Kind::Ssl, ssl(json!({"ssl_protocols": ["TLSv1.1"]})), "/ssl_protocols", "TLS 1.1 alone"),
            (Kind::Ssl, ssl(json!({"ssl_protocols": ["SSLv3"]})), "/ssl_protocols/0", "`TLSv1.2`, `TLSv1.3`"),
            (Kind::Ssl, ssl(json!({"client": {}})), "/client", "`ca` is missing"),
            (
                Kind::Ssl,
                ssl(json!({"client": {"ca": "c".repeat(128), "skip_mtls_uri_regex": ["("]}})),
                "/client/skip_mtls_uri_regex/0",
                "unclosed group",
            ),
            // The rest.
            (Kind::GlobalRule, json!({}), "", "`plugins` is missing"),
            (Kind::GlobalRule, json!({"plugins": {}, "name": "n"}), "/name", "unknown field"),
            (Kind::Proto, json!({"content": ""}), "/content", "the length 0"),
            (Kind::StreamRoute, json!({"server_port": 70000}), "/server_port", "1 to 65535"),
            (Kind::StreamRoute, json!({"protocol": {}}), "/protocol", "`name` is missing"),
        ];
        for (kind, value, pointer, says) in cases {
            let Err(errors) = parse(kind, "1", &value) else { panic!("accepted: {kind} {value}") };
            let hit = errors.iter().any(|e| e.pointer == pointer && e.kind.to_string().contains(says));
            assert!(hit, "{kind} {value}: expected {pointer}: {says}\n{errors:#?}");
            assert_eq!(errors.len(), 1, "{kind} {value}: {errors:#?}");
        }
    }

    #[test]
    fn secret_managers_are_told_apart_by_their_id() {
        for (id, value, pointer, says) in [
            (
                "vault/1",
                json!({"uri": "127.0.0.1:8200", "prefix": "p", "token": "t"}),
                "/uri",
                "begins with http://",
            ),
            ("vault/1", json!({"uri": "http://a", "prefix": "p"}), "", "`token` is missing"),
            (
                "vault/1",
                json!({"uri": "http://a", "prefix": "p", "token": "t", "region": "r"}),
                "/region",
                "unknown field",
            ),
            ("aws/1", json!({"access_key_id": "a"}), "", "`secret_access_key` is missing"),
            ("gcp/1", json!({}), "", "none of `auth_config`, `auth_file`"),
            (
                "gcp/1",
                json!({"auth_file": "f", "auth_config": {"client_email": "a", "private_key": "k", "project_id": "p"}}),
                "",
                "exclude",
            ),
            ("redis/1", json!({}), "/id", "write one of `vault`, `aws`, `gcp`"),
        ] {
            let errors = parse(Kind::Secret, id, &value).unwrap_err();
            let [error] = errors.as_slice() else { panic!("{id} {value}: {errors:#?}") };
            assert_eq!(error.pointer, pointer, "{error}");
            assert!(error.kind.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn all_errors_are_listed_at_once() {
        let value = json!({
            "id": 7, "uri": "/a", "uris": ["/a"], "host": "a b", "methods": ["GRAB"], "desc": 1, "nam": "x",
            "script": "return 1 + 1", "vars": [["arg_a", "=", 1]], "labels": null,
            "upstream": {"type": "chash", "nodes": {"a": "x"}, "checks": {}, "retries": -1},
            "plugins": {"uri-rewrite": {}, "limit-count": {"count": "x"}, "key-auth": 1},
        });
        let errors = parse(Kind::Route, "1", &value).unwrap_err();
        let mut pointers: Vec<&str> = errors.iter().map(|error| error.pointer.as_str()).collect();
        pointers.sort_unstable();
        let expected = [
            "",
            "/desc",
            "/host",
            "/id",
            "/labels",
            "/methods/0",
            "/nam",
            "/plugins/key-auth",
            "/plugins/limit-count/count",
            "/plugins/uri-rewrite",
            "/script",
            "/upstream",
            "/upstream/checks",
            "/upstream/nodes/a",
            "/upstream/retries",
            "/vars/0/1",
        ];
        assert_eq!(pointers, expected, "{errors:#?}");
    }

    #[test]
    fn plugins_are_checked_by_the_catalog_and_get_their_defaults() {
        let with = |plugins: Value| route(json!({"plugins": plugins}));
        let parsed =
            parse(Kind::Route, "1", &with(json!({"limit-count": {"count": 2, "_meta": {"priority": 5}}})))
                .unwrap();
        let expected = json!({"count": 2, "policy": "local", "_meta": {"priority": 5}});
        assert_eq!(parsed.to_value()["plugins"]["limit-count"], expected);
        assert_eq!(parsed.plugins().unwrap()["limit-count"], expected);
        for (kind, id, value, pointer, says) in [
            (
                Kind::Route,
                "1",
                with(json!({"limit-count": {}})),
                "/plugins/limit-count/count",
                "write a number",
            ),
            (Kind::Route, "1", with(json!({"limit-count": []})), "/plugins/limit-count", "{} for none"),
            (
                Kind::Route,
                "1",
                with(json!({"limit-cont": {}})),
                "/plugins/limit-cont",
                "did you mean `limit-count`?",
            ),
            (
                Kind::Route,
                "1",
                with(json!({"uri-rewrite": {}})),
                "/plugins/uri-rewrite",
                "use `proxy-rewrite`",
            ),
            (Kind::Route, "1", with(json!({"a/b": {}})), "/plugins/a~1b", "does not exist here: take it out"),
            (
                Kind::Route,
                "1",
                with(json!({"key-auth": {"key": "x"}})),
                "/plugins/key-auth/key",
                "unknown field",
            ),
            (
                Kind::Route,
                "1",
                with(json!({"key-auth": {"_meta": {"disabled": true}}})),
                "/plugins/key-auth/_meta/disabled",
                "did you mean `disable`?",
            ),
            (
                Kind::Route,
                "1",
                with(json!({"key-auth": {"_meta": {"filter": [["arg_a", "=", "b"]]}}})),
                "/plugins/key-auth/_meta/filter/0/1",
                "invalid operator",
            ),
            (
                Kind::Route,
                "1",
                with(json!({"key-auth": {"_meta": {"pre_function": "return function() end"}}})),
                "/plugins/key-auth/_meta/pre_function",
                "Lua",
            ),
            (
                Kind::Route,
                "1",
                with(json!({"key-auth": {"_meta": {"error_response": 5}}})),
                "/plugins/key-auth/_meta/error_response",
                "found a number",
            ),
            (
                Kind::Consumer,
                "jack",
                json!({"username": "jack", "plugins": {"key-auth": {}}}),
                "/plugins/key-auth/key",
                "`key` is missing",
            ),
            (
                Kind::Credential,
                "jack/credentials/a",
                json!({"plugins": {"limit-count": {"count": 1}}}),
                "/plugins/limit-count",
                "one authentication plugin",
            ),
            (Kind::Credential, "jack/credentials/a", json!({"plugins": {}}), "/plugins", "exactly one"),
            (Kind::PluginMetadata, "http-logger", json!({}), "", "`log_format` is missing"),
            (Kind::PluginMetadata, "key-auth", json!({}), "", "no settings for the whole gateway"),
            (Kind::PluginMetadata, "http-loger", json!({}), "", "did you mean `http-logger`?"),
            (
                Kind::Consumer,
                "jack",
                json!({"username": "joe"}),
                "/username",
                "the id is `joe`, but the object is consumers/jack",
            ),
        ] {
            let errors = parse(kind, id, &value).unwrap_err();
            let [error] = errors.as_slice() else { panic!("{kind} {value}: {errors:#?}") };
            assert_eq!(error.pointer, pointer, "{error}");
            assert!(error.kind.to_string().contains(says), "{error}");
        }
        let harmless = parse(Kind::Route, "1", &with(json!({"gone": {"anything": 1}}))).unwrap();
        assert_eq!(harmless.to_value()["plugins"]["gone"], json!({"anything": 1}));
    }

    #[test]
    fn meta_is_read_as_written() {
        for (settings, expected) in [
            (json!({}), Meta::default()),
            (json!({"_meta": {}}), Meta::default()),
            (
                json!({"_meta": {"disable": true, "priority": -1}}),
                Meta { disable: Some(true), priority: Some(-1), ..Meta::default() },
            ),
        ] {
            assert_eq!(Meta::of(&settings), expected);
        }
        let meta = json!({"filter": [["arg_a", "==", "b"]], "error_response": {"message": "no"}});
        assert_eq!(serde_json::to_value(Meta::parse(&meta).unwrap()).unwrap(), meta);
    }

    #[test]
    fn references_to_the_environment_are_used_resolved_and_shown_as_written() {
        let value = json!({"username": "jack", "plugins": {"key-auth": {"key": "$env://KEY"}}});
        let parsed = parse(Kind::Consumer, "jack", &value).unwrap();
        assert_eq!(parsed.plugins().unwrap()["key-auth"]["key"], "s3cret");
        assert_eq!(parsed.to_value()["plugins"]["key-auth"]["key"], "$env://KEY");
        assert!(!format!("{parsed:?}").contains("s3cret"), "{parsed:?}");
        for reference in ["$secret://vault/1/jack/key", "$env://OTHER"] {
            let value = json!({"username": "jack", "plugins": {"key-auth": {"key": reference}}});
            let errors = parse(Kind::Consumer, "jack", &value).unwrap_err();
            let [error] = errors.as_slice() else { panic!("{errors:#?}") };
            assert_eq!(error.pointer, "/plugins/key-auth/key");
            assert!(matches!(error.kind, ErrorKind::UnresolvedSecret { .. }), "{error}");
        }
        // The length of a reference is not that of the key.
        let errors = parse(Kind::Ssl, "1", &ssl(json!({"key": "$env://OTHER"}))).unwrap_err();
        assert_eq!(errors.len(), 1, "{errors:#?}");
    }

    #[test]
    fn private_keys_are_never_printed() {
        let parsed = parse(Kind::Ssl, "1", &ssl(json!({"key": "K".repeat(64)}))).unwrap();
        assert!(!format!("{parsed:?}").contains("KKK"));
        assert_eq!(parsed.to_value()["key"], "K".repeat(64));
        let errors = parse(Kind::Ssl, "1", &ssl(json!({"key": "KKK"}))).unwrap_err();
        assert!(!format!("{errors:?}").contains("KKK"), "{errors:?}");
    }

    #[test]
    fn references_of_every_kind_are_found() {
        let tls = json!({"scheme": "https", "tls": {"client_cert_id": "c"}});
        let split = json!({"traffic-split": {"rules": [
            {"weighted_upstreams": [{"upstream_id": 8}, {"weight": 1}, {"upstream": upstream(tls.clone())}]},
            {"weighted_upstreams": [{"upstream_id": 8}]},
        ]}, "grpc-transcode": {"proto_id": "p"}});
        for (kind, value, expected) in [
            (
                Kind::Route,
                route(json!({"service_id": 2, "plugin_config_id": 3})),
                vec!["plugin_configs/3", "services/2", "upstreams/1"],
            ),
            (
                Kind::Route,
                route(json!({"upstream_id": null, "upstream": upstream(tls.clone())})),
                vec!["ssls/c"],
            ),
            (
                Kind::Route,
                route(json!({"plugins": split})),
                vec!["protos/p", "ssls/c", "upstreams/1", "upstreams/8"],
            ),
            (Kind::Service, json!({"upstream_id": 1}), vec!["upstreams/1"]),
            (Kind::Upstream, upstream(tls.clone()), vec!["ssls/c"]),
            (Kind::Consumer, json!({"username": "1", "group_id": "g"}), vec!["consumer_groups/g"]),
            (
                Kind::StreamRoute,
                json!({"upstream_id": 1, "service_id": 2}),
                vec!["services/2", "upstreams/1"],
            ),
            (Kind::PluginConfig, json!({"plugins": split}), vec!["protos/p", "ssls/c", "upstreams/8"]),
            (Kind::Proto, json!({"content": "x"}), vec![]),
        ] {
            let mut found: Vec<String> =
                parse(kind, "1", &value).unwrap().references().iter().map(ToString::to_string).collect();
            found.sort_unstable();
            assert_eq!(found, expected, "{kind} {value}");
        }
    }

    /// Any JSON, small.
    fn any_json() -> impl proptest::strategy::Strategy<Value = Value> {
        use proptest::prelude::*;
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-2..600_i64).prop_map(Value::from),
            (-1.0..100.0_f64).prop_map(Value::from),
            "[a-z*./:$0-9 ]{0,8}".prop_map(Value::from),
            Just(json!("TLSv1.2")),
            Just(json!("chash")),
            Just(json!("$env://KEY")),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::vec(("[a-z_]{1,8}", inner), 0..3)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    /// Every pointer into `value`.
    fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Object(object) => {
                for (field, member) in object {
                    pointers(member, &format!("{at}/{}", escape(field)), found);
                }
            }
            Value::Array(list) => {
                for (index, item) in list.iter().enumerate() {
                    pointers(item, &format!("{at}/{index}"), found);
                }
            }
            _ => {}
        }
    }

    proptest::proptest! {
        #[test]
        fn the_types_and_the_schema_agree_about_any_object(
            object in proptest::sample::select(accepted()),
            place in proptest::prelude::any::<proptest::sample::Index>(),
            change in any_json(),
        ) {
            let (kind, id, mut value) = object;
            let mut places = Vec::new();
            pointers(&value, "", &mut places);
            let place: &String = place.get(&places);
            *value.pointer_mut(place).unwrap() = change;
            match parse(kind, id, &value) {
                Ok(parsed) => {
                    // A reference has no need to fit: what it stands for does.
                    if parsed.literals().is_empty() && value.get("vars").is_none_or(Value::is_array) {
                        let errors: Vec<String> =
                            published(kind, id).iter_errors(&value).map(|e| format!("{e} {}", e.instance_path())).collect();
                        assert!(errors.is_empty(), "{kind} {value} {errors:?}");
                    }
                    assert_eq!(parse(kind, id, &parsed.to_value()), Ok(parsed));
                }
                Err(errors) => {
                    assert!(!errors.is_empty());
                    for error in &errors {
                        let holder = error.pointer.rsplit_once('/').map_or("", |(holder, _)| holder);
                        assert!(value.pointer(holder).is_some(), "{kind} {value} {error}");
                        assert!(!error.kind.to_string().is_empty());
                    }
                }
            }
        }
    }
}
