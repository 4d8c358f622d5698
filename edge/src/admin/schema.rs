//! JSON Schemas of the resources, and the check of one object without storing it.
//!
//! A check reads the object as a write would, settings of plugins included; only what it refers to is not looked
//! up. Kinds go by the names APISIX has for schemas (`route`) and by those of paths (`routes`).

use config::resource::Resource;
use config::{ConfigError, Kind, ResourceKey, schema};
use http::{Method, StatusCode};
use serde_json::Value;

use super::Admin;
use super::query::Query;
use super::reply::Reply;

impl Admin {
    /// `/schema/{kind}` and `/schema/plugins/{name}`.
    pub(super) fn schema(&self, method: &Method, path: &[String], query: &Query) -> Result<Reply, Reply> {
        if *method != Method::GET {
            return Err(Reply::error(StatusCode::NOT_FOUND, "not found"));
        }
        let name = path.first().map_or("", String::as_str);
        if name == "plugins" {
            return self.plugins(method, path.get(1).map(String::as_str), query);
        }
        match kind_named(name) {
            Some(kind) => Ok(Reply::json(StatusCode::OK, &schema::schema_for(kind, &*self.catalog))),
            None => Err(Reply::bad_request(format!("not found schema: {name}"))),
        }
    }

    /// `/schema/validate/{kind}`: whether the object would be taken, references aside.
    pub(super) fn validate(
        &self,
        method: &Method,
        path: &[String],
        body: Option<Value>,
    ) -> Result<Reply, Reply> {
        if *method != Method::POST {
            return Err(Reply::error(StatusCode::NOT_FOUND, "not found"));
        }
        let name = path.first().map_or("", String::as_str);
        let kind = kind_named(name).ok_or_else(|| {
            Reply::error(StatusCode::NOT_FOUND, format!("Unsupported resource type: {name}"))
        })?;
        let body = body.ok_or_else(|| Reply::bad_request("missing configurations"))?;
        let id = path.get(1).map_or_else(|| id_of(kind, &body), Clone::clone);
        let key = ResourceKey::parse(kind, &id).map_err(|error| Reply::invalid(kind, &[error]))?;
        match Resource::parse(&key, &body, &*self.catalog) {
            Ok(_) => Ok(Reply::empty(StatusCode::OK)),
            // A secret manager is asked when the object is written.
            Err(errors) if errors.iter().all(ConfigError::is_unasked_secret) => {
                Ok(Reply::empty(StatusCode::OK))
            }
            Err(errors) => Err(Reply::invalid(kind, &errors)),
        }
    }
}

/// A kind by either of its names.
fn kind_named(name: &str) -> Option<Kind> {
    Kind::from_singular(name).or_else(|| Kind::from_segment(name))
}

/// The id an object says it has; any that is allowed, where it says none.
fn id_of(kind: Kind, body: &Value) -> String {
    let text = |field: &str| body.get(field).and_then(Value::as_str).map(str::to_owned);
    match kind {
        Kind::Consumer => text("username").unwrap_or_else(|| "unnamed".to_owned()),
        Kind::Credential => {
            text("id").filter(|id| id.contains('/')).unwrap_or("user/credentials/id".to_owned())
        }
        Kind::LookupEntry => {
            text("id").filter(|id| id.contains('/')).unwrap_or("table/entries/key".to_owned())
        }
        Kind::Secret => text("id").filter(|id| id.contains('/')).unwrap_or_else(|| manager_of(body)),
        _ => text("id").unwrap_or_else(|| "unnamed".to_owned()),
    }
}

/// The manager whose fields the object has.
fn manager_of(body: &Value) -> String {
    let has = |field: &str| body.get(field).is_some();
    let manager = if has("access_key_id") || has("secret_access_key") {
        "aws"
    } else if has("auth_config") || has("auth_file") {
        "gcp"
    } else {
        "vault"
    };
    format!("{manager}/id")
}
