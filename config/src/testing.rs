//! A catalog of made-up plugins for the tests of this crate.

use serde_json::{Value, json};

use crate::error::{ConfigError, ErrorKind};
use crate::plugin_catalog::{PluginCatalog, PluginSchema};

/// `key-auth` (authentication), `limit-count` (a default, a number), `traffic-split` and `grpc-transcode`
/// (anything), `http-logger` (with metadata), and `gone`, which is harmless.
pub(crate) struct TestCatalog;

impl PluginCatalog for TestCatalog {
    fn check(&self, name: &str, which: PluginSchema, value: &Value) -> Result<Value, Vec<ConfigError>> {
        let mut value = value.clone();
        match (name, which) {
            ("key-auth", PluginSchema::Consumer) if value.get("key").and_then(Value::as_str).is_none() => {
                Err(vec![ConfigError::new("/key", ErrorKind::MissingField { field: "key".into() })])
            }
            ("key-auth", PluginSchema::Config) if value.get("key").is_some() => {
                let kind = ErrorKind::UnknownField { field: "key".into(), nearest: None };
                Err(vec![ConfigError::new("/key", kind)])
            }
            ("limit-count", _) => {
                if !value.get("count").is_some_and(Value::is_u64) {
                    return Err(vec![ConfigError::invalid("/count", "write a number")]);
                }
                value["policy"] = json!("local");
                Ok(value)
            }
            ("http-logger", PluginSchema::Metadata) if value.get("log_format").is_none() => {
                Err(vec![ConfigError::new("", ErrorKind::MissingField { field: "log_format".into() })])
            }
            _ => Ok(value),
        }
    }

    fn schema(&self, name: &str, which: PluginSchema) -> Option<Value> {
        match which {
            PluginSchema::Metadata if name != "http-logger" => None,
            _ if self.priority(name).is_none() => None,
            _ => Some(json!({"type": "object", "title": name})),
        }
    }

    fn priority(&self, name: &str) -> Option<i32> {
        let index = self.names().iter().position(|known| *known == name)?;
        i32::try_from(index).ok().map(|index| 1000 - index)
    }

    fn names(&self) -> Vec<&'static str> {
        vec!["key-auth", "limit-count", "traffic-split", "grpc-transcode", "http-logger"]
    }

    fn is_auth(&self, name: &str) -> bool {
        name == "key-auth"
    }

    fn refusal(&self, name: &str) -> Option<String> {
        (name == "uri-rewrite").then(|| "use `proxy-rewrite`".to_owned())
    }

    fn is_harmless(&self, name: &str) -> bool {
        name == "gone"
    }
}
