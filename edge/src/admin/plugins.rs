//! What plugins there are: their names in the order of execution, their schemas and priorities.
//!
//! Nothing is written here. What the catalog does not list does not exist, whatever the binary has; stream plugins
//! there are none.

use config::{PluginSchema, schema};
use http::{Method, StatusCode};
use serde_json::{Map, Value, json};

use super::Admin;
use super::query::Query;
use super::reply::Reply;

impl Admin {
    pub(super) fn plugins(&self, method: &Method, name: Option<&str>, query: &Query) -> Result<Reply, Reply> {
        if *method != Method::GET {
            return Err(Reply::error(StatusCode::NOT_FOUND, "not found"));
        }
        let subsystem = query.get("subsystem").unwrap_or("http");
        let stream = match (subsystem, name) {
            ("http", _) => false,
            ("stream", _) => true,
            (_, Some("list")) => {
                return Err(Reply::with(StatusCode::BAD_REQUEST, "text/plain", "invalid subsystem passed"));
            }
            _ => return Err(Reply::bad_request(format!("unsupported subsystem: {subsystem}"))),
        };
        if name == Some("list") {
            let names = if stream { Vec::new() } else { self.catalog.names() };
            return Ok(Reply::json(StatusCode::OK, &json!(names)));
        }
        if query.is_true("all") {
            let plugins = if stream { Value::Object(Map::new()) } else { all(&*self.catalog) };
            return Ok(Reply::json(StatusCode::OK, &plugins));
        }
        let which = match query.get("schema_type") {
            Some("consumer") => PluginSchema::Consumer,
            Some("metadata") => PluginSchema::Metadata,
            _ => PluginSchema::Config,
        };
        let name = name.filter(|name| !stream && self.catalog.priority(name).is_some());
        let name = name.ok_or_else(|| Reply::error(StatusCode::NOT_FOUND, "plugin not found"))?;
        match schema::schema_for_plugin(name, which, &*self.catalog) {
            Some(schema) => Ok(Reply::json(StatusCode::OK, &schema)),
            None => Err(Reply::bad_request("not found schema")),
        }
    }
}

/// Every plugin with its schemas.
pub(crate) fn all(catalog: &dyn config::PluginCatalog) -> Value {
    let mut plugins = Map::new();
    for name in catalog.names() {
        let mut plugin = Map::new();
        plugin.insert("priority".to_owned(), json!(catalog.priority(name)));
        if catalog.is_auth(name) {
            plugin.insert("type".to_owned(), json!("auth"));
        }
        for (field, which) in [
            ("schema", PluginSchema::Config),
            ("consumer_schema", PluginSchema::Consumer),
            ("metadata_schema", PluginSchema::Metadata),
        ] {
            if let Some(schema) = schema::schema_for_plugin(name, which, catalog) {
                plugin.insert(field.to_owned(), schema);
            }
        }
        plugins.insert(name.to_owned(), Value::Object(plugin));
    }
    Value::Object(plugins)
}
