//! `discovery` of `config.yaml`: the registries in which upstreams find their nodes, one file for each kind.
//!
//! A kind is a type that says by itself what fits (serde, its JSON Schema for the list of all errors, [`Registry::check`]
//! for the rest) and one line in `registries!`. APISIX's keys mean what they mean there; ours stand beside them. A kind
//! that is not listed is an error that names those that are, and so is a key that a kind does not have.

pub mod consul;
pub mod consul_kv;
pub mod dns;
pub mod eureka;
pub mod file;
pub mod kubernetes;
pub mod nacos;
pub mod polled;
pub mod postern;
pub mod tls;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{ConfigError, ErrorKind, escape, nearest};
use crate::typed;

/// The settings of one kind of registry.
pub trait Registry: DeserializeOwned + JsonSchema + 'static {
    /// Its key under `discovery`, and the word of `discovery_type` in upstreams.
    const KIND: &'static str;

    /// What the type cannot say. Pointers begin at these settings.
    fn check(&self, _errors: &mut Vec<ConfigError>) {}

    /// Keys that are read for APISIX's sake and change nothing here, by their pointers, with the reason.
    fn not_applicable(&self) -> Vec<(&'static str, &'static str)> {
        Vec::new()
    }
}

/// Lists the kinds: the name of the key, and the type of its settings.
macro_rules! registries {
    ($($(#[$doc:meta])* $key:ident: $settings:ty,)*) => {
        /// The registries that are configured.
        #[derive(Clone, Debug, Default)]
        pub struct Discovery {
            $($(#[$doc])* pub $key: Option<Box<$settings>>,)*
        }

        impl Discovery {
            /// The kinds there are, in the order of their names.
            pub const KINDS: &'static [&'static str] = &[$(<$settings as Registry>::KIND),*];

            /// The kinds that are configured.
            #[must_use]
            pub fn configured(&self) -> Vec<&'static str> {
                let kinds: &[Option<&'static str>] =
                    &[$(self.$key.as_ref().map(|_| <$settings as Registry>::KIND)),*];
                kinds.iter().copied().flatten().collect()
            }

            /// Keys that change nothing here: the pointer into the file, and the reason.
            #[must_use]
            pub fn not_applicable(&self) -> Vec<(String, &'static str)> {
                let mut keys = Vec::new();
                $(if let Some(settings) = &self.$key {
                    let found = settings.not_applicable().into_iter();
                    let kind = <$settings as Registry>::KIND;
                    keys.extend(found.map(|(key, why)| (format!("/discovery/{kind}{key}"), why)));
                })*
                keys
            }

            /// Reads the object at `discovery`. What does not fit is told with its pointer into the file, and left out.
            pub fn read(written: &Map<String, Value>) -> (Self, Vec<ConfigError>) {
                let (mut discovery, mut errors) = (Self::default(), Vec::new());
                for (kind, settings) in written.iter().filter(|(_, settings)| !settings.is_null()) {
                    match kind.as_str() {
                        $(<$settings as Registry>::KIND => discovery.$key = registry(settings, &mut errors),)*
                        _ => errors.push(unknown(kind)),
                    }
                }
                (discovery, errors)
            }
        }
    };
}

// One line a kind, for example `consul: consul::Consul,` with its documentation above it.
registries! {
    /// Clusters of Consul.
    consul: consul::Consul,
    /// Nodes in Consul's KV store.
    consul_kv: consul_kv::ConsulKv,
    /// Services by their name in DNS.
    dns: dns::Dns,
    /// Eureka.
    eureka: eureka::Eureka,
    /// A file or a folder of services.
    file: file::File,
    /// The clusters of Kubernetes.
    kubernetes: kubernetes::Kubernetes,
    /// Nacos.
    nacos: nacos::Nacos,
    /// Discovery servers.
    postern: postern::Postern,
}

impl Discovery {
    /// The kinds that can be asked: those that are configured, those that discovery servers are asked for, and DNS.
    #[must_use]
    pub fn asked(&self) -> Vec<&'static str> {
        let servers = self.postern.iter().flat_map(|servers| &servers.kinds);
        let mut kinds = self.configured();
        kinds.extend(servers.filter_map(|kind| postern::Postern::kind(kind)));
        kinds.push(dns::Dns::KIND);
        kinds
    }
}

/// What is said of a kind that cannot be asked.
#[must_use]
pub fn not_configured(kind: &str) -> String {
    format!("no registry of the kind `{kind}` is configured: add `discovery.{kind}` to config.yaml")
}

/// The settings of a registry, unless they are wrong.
fn registry<R: Registry>(written: &Value, errors: &mut Vec<ConfigError>) -> Option<Box<R>> {
    let mut written = written.clone();
    drop_nulls(&mut written);
    let mut found = Vec::new();
    let settings = match typed::parse::<R>(&written) {
        Ok(settings) => {
            settings.check(&mut found);
            found.is_empty().then(|| Box::new(settings))
        }
        Err(wrong) => {
            found = wrong;
            None
        }
    };
    let under = format!("/discovery/{}", R::KIND);
    errors.extend(found.into_iter().map(|error| error.under(&under)));
    settings
}

/// A key without a value is as good as absent, as everywhere in `config.yaml`.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn unknown(kind: &str) -> ConfigError {
    let kinds = Discovery::KINDS;
    let known = || kinds.iter().map(|kind| (*kind).to_owned()).collect();
    let error = match kind {
        "tars" => ErrorKind::Unsupported {
            what: "`discovery.tars`".to_owned(),
            instead: format!("write one of {}", kinds.join(", ")),
        },
        _ => ErrorKind::NotOneOf {
            found: kind.to_owned(),
            allowed: known(),
            nearest: nearest(kind, kinds.iter().copied()).map(str::to_owned),
        },
    };
    ConfigError::new(format!("/discovery/{}", escape(kind)), error)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Sample {
        servers: Vec<String>,
        wait: u32,
    }

    impl Default for Sample {
        fn default() -> Self {
            Self { servers: Vec::new(), wait: 60 }
        }
    }

    impl Registry for Sample {
        const KIND: &'static str = "sample";

        fn check(&self, errors: &mut Vec<ConfigError>) {
            if self.servers.is_empty() {
                errors.push(ConfigError::invalid("/servers", "write at least one server"));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_told_with_its_pointer() {
        for (written, wrong) in [
            (json!({"servers": ["a"]}), ""),
            (json!({"servers": ["a"], "wait": null}), ""),
            (json!({}), "/discovery/sample/servers: write at least one server"),
            (json!({"servers": ["a"], "wiat": 1}), "/discovery/sample/wiat: unknown field `wiat`"),
            (json!({"servers": [1]}), "/discovery/sample/servers/0: found a number"),
            (json!([]), "/discovery/sample: found a list"),
        ] {
            let mut errors = Vec::new();
            let settings = registry::<Sample>(&written, &mut errors);
            assert_eq!(settings.is_some(), wrong.is_empty(), "{written}: {errors:?}");
            assert!(settings.is_none_or(|settings| settings.wait == 60), "{written}");
            match errors.as_slice() {
                [] => assert_eq!(wrong, "", "{written}"),
                errors => {
                    assert!(errors.iter().any(|error| error.to_string().starts_with(wrong)), "{errors:?}")
                }
            }
        }
    }

    #[test]
    fn a_kind_that_is_not_there_is_refused() {
        for (kind, text) in
            [("tars", "`discovery.tars` is not supported"), ("zoo", "`zoo` is not known here")]
        {
            let text = format!("/discovery/{kind}: {text}");
            assert!(unknown(kind).to_string().starts_with(&text), "{}", unknown(kind));
        }
    }
}
