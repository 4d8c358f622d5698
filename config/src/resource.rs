//! One object of any kind: read and checked from JSON, written back, asked for what it refers to.
//!
//! Reading is typed and fast. Only when it fails is the JSON Schema asked, so that every error is listed with
//! its pointer. Settings of plugins are checked through the catalog, which knows them; `_meta`, references to
//! secrets, and what APISIX has and this gateway refuses are settled here.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

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
    /// Whether fields that the type does not name belong to the object.
    const OPEN: bool = false;

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
wire!(PluginMetadata, const OPEN: bool = true;);
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
        let object = match T::deserialize(&*value) {
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
        if !T::OPEN {
            refuse_nulls(object, &mut String::new(), errors);
        }
        rules::check(T::RULES, object, "", errors);
        match self.key.kind {
            Kind::Upstream => check_upstream(object, "", errors),
            Kind::Route | Kind::Service | Kind::StreamRoute => {
                if let Some(Value::Object(upstream)) = object.get("upstream") {
                    check_upstream(upstream, "/upstream", errors);
                }
            }
            _ => {}
        }
        if self.key.kind == Kind::Route
            && let Some(vars) = object.get("vars")
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
            && let Err(error) = serde_path_to_error::deserialize::<_, T>(value)
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

/// The rules of an upstream wherever it stands, and what of APISIX it cannot have.
fn check_upstream(upstream: &Map<String, Value>, at: &str, errors: &mut Vec<ConfigError>) {
    rules::check(upstream::RULES, upstream, at, errors);
    for (field, rules) in [("tls", upstream::TLS_RULES), ("checks", upstream::CHECKS_RULES)] {
        if let Some(Value::Object(inner)) = upstream.get(field) {
            rules::check(rules, inner, &format!("{at}/{field}"), errors);
        }
    }
    for (field, value, instead) in [
        ("scheme", "kafka", "use a Kafka client that speaks to the brokers"),
        ("type", "random", "`ewma` and `least_conn` spread load better; `roundrobin` spreads it evenly"),
    ] {
        if upstream.get(field).and_then(Value::as_str) == Some(value) {
            let what = format!("`{field}: {value}`");
            let kind = ErrorKind::Unsupported { what, instead: instead.to_owned() };
            errors.push(ConfigError::new(format!("{at}/{field}"), kind));
        }
    }
}

/// `null` is neither a value nor nothing: an empty key in YAML would open a route to every host.
fn refuse_nulls(object: &Map<String, Value>, at: &mut String, errors: &mut Vec<ConfigError>) {
    let depth = at.len();
    for (field, value) in object {
        // Others decide what these mean.
        if matches!(field.as_str(), "plugins" | "vars" | "metadata" | "conf" | "filter") && !value.is_null() {
            continue;
        }
        if !matches!(value, Value::Null | Value::Object(_) | Value::Array(_)) {
            continue;
        }
        at.push('/');
        at.push_str(&escape(field));
        match value {
            Value::Null => errors.push(ConfigError::new(at.as_str(), ErrorKind::Null)),
            Value::Object(inner) => refuse_nulls(inner, at, errors),
            Value::Array(list) => {
                let depth = at.len();
                for (index, item) in list.iter().enumerate() {
                    if let Value::Object(inner) = item {
                        at.push_str(&format!("/{index}"));
                        refuse_nulls(inner, at, errors);
                        at.truncate(depth);
                    }
                }
            }
            _ => {}
        }
        at.truncate(depth);
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
}
