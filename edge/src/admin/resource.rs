//! Create, read, change and delete one kind of resource.
//!
//! A write is checked whole, references included, before the store sees it. Deletes of objects that others
//! may refer to, and writes that must be alone, exclude other writes, so that a reference that was checked
//! still stands when the answer is given; everything else runs side by side.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use config::graph::Item;
use config::resource::Resource;
use config::{ConfigError, ErrorKind, Kind, ResourceKey, secret_ref};
use http::{Method, StatusCode};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::Admin;
use super::patch;
use super::query::{Filter, Page, Query};
use super::reply::Reply;
use crate::certificates::unreadable;
use crate::store::{Condition, DeleteOptions, PutOptions, StoreError, Stored};

/// How often a PATCH starts again because somebody else wrote in between.
const PATCH_ATTEMPTS: usize = 64;
/// How long a write waits for the secret managers that it refers to.
const SECRETS_WAIT: Duration = Duration::from_secs(4);

/// One request about resources, taken apart.
pub(super) struct Call<'a> {
    pub method: &'a Method,
    pub kind: Kind,
    /// The path after the kind, in segments. For credentials that of the consumer's name is first.
    pub path: &'a [String],
    pub query: &'a Query,
    /// Nothing if there was no body.
    pub body: Option<Value>,
    /// The name of the admin key.
    pub author: &'a str,
}

/// The name of a kind in messages.
pub(super) fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::ConsumerGroup => "consumer group",
        Kind::PluginConfig => "plugin config",
        Kind::GlobalRule => "global rule",
        Kind::StreamRoute => "stream route",
        Kind::LookupTable => "lookup table",
        Kind::LookupEntry => "lookup entry",
        other => other.singular(),
    }
}

/// The methods a kind has, for the `Allow` header.
fn methods(kind: Kind) -> &'static str {
    match kind {
        Kind::Route | Kind::Service | Kind::Upstream | Kind::Ssl | Kind::LookupTable => {
            "GET, PUT, POST, PATCH, DELETE"
        }
        Kind::Consumer | Kind::Credential | Kind::PluginMetadata => "GET, PUT, DELETE",
        Kind::ConsumerGroup | Kind::PluginConfig | Kind::GlobalRule | Kind::Secret | Kind::LookupEntry => {
            "GET, PUT, PATCH, DELETE"
        }
        Kind::Proto | Kind::StreamRoute => "GET, PUT, POST, DELETE",
    }
}

impl Admin {
    pub(super) async fn resource(&self, call: Call<'_>) -> Result<Reply, Reply> {
        let Call { method, kind, .. } = call;
        if !methods(kind).split(", ").any(|known| known == method.as_str()) {
            let message = format!("not supported `{method}` method for {}", title(kind));
            return Err(Reply::method_not_allowed(message, methods(kind)));
        }
        match *method {
            Method::PUT => self.put(call).await,
            Method::POST => self.post(call).await,
            Method::PATCH => self.patch(call).await,
            Method::DELETE => self.delete(call).await,
            _ => self.get(call).await,
        }
    }

    async fn get(&self, call: Call<'_>) -> Result<Reply, Reply> {
        let (id, _) = call.id();
        match id {
            Some(id) => {
                let key = call.key(&id).map_err(|_| Reply::not_found())?;
                let stored = self.store.get(&key).await?.ok_or_else(Reply::not_found)?;
                Ok(Reply::json(StatusCode::OK, &self.shown(&stored)))
            }
            None => self.list(call).await,
        }
    }

    async fn list(&self, call: Call<'_>) -> Result<Reply, Reply> {
        let by_field = matches!(call.kind, Kind::Route | Kind::StreamRoute);
        let filter = Filter::parse(call.query, by_field)?;
        let page = Page::parse(call.query)?;
        let mut list = self.store.list(call.kind).await?;
        match (call.kind, call.path.first()) {
            (Kind::Credential | Kind::LookupEntry, Some(owner)) => {
                let owner = ResourceKey::new(call.kind.folder(), owner.as_str());
                list.retain(|item| item.key.owner().as_ref() == Some(&owner));
                if list.is_empty() && self.store.get(&owner).await?.is_none() {
                    return Err(Reply::not_found());
                }
            }
            (Kind::Secret, Some(manager)) => {
                list.retain(|item| item.key.id.split_once('/').is_some_and(|(of, _)| of == manager));
            }
            _ => {}
        }
        let prefix = self.prefix.clone();
        // Many objects are much work: not on a thread that others wait for.
        let body = tokio::task::spawn_blocking(move || {
            if !filter.is_empty() {
                list.retain(|item| item.parse().is_ok_and(|value| filter.passes(&value)));
            }
            let total = list.len();
            if let Some(page) = page {
                list.sort_by_key(|item| item.created_index);
                list = page.of(list);
            }
            let list: Vec<Listed<'_>> = list.iter().map(|item| Listed::new(&prefix, item)).collect();
            let mut body = serde_json::to_vec(&List { list, total })?;
            body.push(b'\n');
            Ok::<_, serde_json::Error>(body)
        });
        match body.await {
            Ok(Ok(body)) => Ok(Reply::raw_json(StatusCode::OK, body)),
            Ok(Err(error)) => Err(Reply::error(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
            Err(error) => Err(Reply::error(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
        }
    }

    async fn put(&self, mut call: Call<'_>) -> Result<Reply, Reply> {
        let (id, _) = call.id();
        let body = call.configuration()?;
        let id = put_id(call.kind, id, &body)?;
        let key = call.key(&id).map_err(|error| Reply::invalid(call.kind, &[error]))?;
        refuse_times(&body)?;
        let _order = if call.kind == Kind::GlobalRule {
            Order::Alone(self.order.write().await)
        } else {
            Order::Beside(self.order.read().await)
        };
        let (key, resource) = self.check(key, &body).await?;
        let before = self.store.get(&key).await?;
        let mut value = value_of(&key, resource);
        if key.kind != Kind::PluginMetadata {
            let created = before.and_then(|before| before.parse().ok()?.get("create_time")?.as_u64());
            set_times(&mut value, created, None);
        }
        let put = self.store.put(&key, value.clone(), call.options(Condition::Any)?).await?;
        let status = if put.created { StatusCode::CREATED } else { StatusCode::OK };
        Ok(Reply::json(status, &self.written(&key, value)))
    }

    async fn post(&self, mut call: Call<'_>) -> Result<Reply, Reply> {
        let body = call.configuration()?;
        let (id, _) = call.id();
        if id.is_some() || body.get("id").is_some() {
            return Err(Reply::bad_request(format!("wrong {} id, do not need it", title(call.kind))));
        }
        refuse_times(&body)?;
        let options = call.options(Condition::Absent)?;
        let _order = self.order.read().await;
        // Checked before an id is used up.
        let (_, resource) = self.check(ResourceKey::new(call.kind, "new"), &body).await?;
        let key = ResourceKey::new(call.kind, self.store.generate_id().await?);
        let mut value = value_of(&key, resource);
        set_times(&mut value, None, None);
        self.store.put(&key, value.clone(), options).await?;
        Ok(Reply::json(StatusCode::CREATED, &self.written(&key, value)))
    }

    async fn patch(&self, mut call: Call<'_>) -> Result<Reply, Reply> {
        let (id, sub_path) = call.id();
        let missing = if call.kind == Kind::Secret {
            "no secret id".to_owned()
        } else {
            format!("missing {} id", title(call.kind))
        };
        let id = id.ok_or_else(|| Reply::bad_request(missing))?;
        let key = call.key(&id).map_err(|_| Reply::not_found())?;
        let patch = call.body.take().ok_or_else(|| Reply::bad_request("missing new configuration"))?;
        if sub_path.is_empty() && !patch.is_object() {
            return Err(Reply::bad_request("invalid configuration"));
        }
        let given_time = patch.get("update_time").filter(|_| sub_path.is_empty()).and_then(Value::as_u64);
        for _ in 0..PATCH_ATTEMPTS {
            let _order = if call.kind == Kind::GlobalRule {
                Order::Alone(self.order.write().await)
            } else {
                Order::Beside(self.order.read().await)
            };
            let before = self.store.get(&key).await?.ok_or_else(Reply::not_found)?;
            let mut value = before.parse()?;
            if sub_path.is_empty() {
                patch::merge(&mut value, patch.clone());
            } else {
                patch::set(&mut value, &sub_path, patch.clone())
                    .map_err(|error| Reply::bad_request(error.to_string()))?;
            }
            if value.get("id").is_some_and(|now| !same_id(now, &id) && !same_id(now, &key.id)) {
                return Err(Reply::bad_request(format!("wrong {} id", title(call.kind))));
            }
            let created = value.get("create_time").and_then(Value::as_u64);
            let (key, resource) = self.check(key.clone(), &value).await?;
            let mut value = value_of(&key, resource);
            set_times(&mut value, created, given_time);
            let options = call.options(Condition::Modified(before.modified_index))?;
            match self.store.put(&key, value.clone(), options).await {
                Ok(_) => return Ok(Reply::json(StatusCode::OK, &self.written(&key, value))),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(StoreError::Conflict.into())
    }

    async fn delete(&self, call: Call<'_>) -> Result<Reply, Reply> {
        let (id, _) = call.id();
        let id = id.ok_or_else(|| Reply::bad_request(format!("missing {} id", title(call.kind))))?;
        let key = call.key(&id).map_err(|_| Reply::not_found())?;
        let referred = matches!(
            call.kind,
            Kind::Service
                | Kind::Upstream
                | Kind::ConsumerGroup
                | Kind::PluginConfig
                | Kind::Proto
                | Kind::StreamRoute
                | Kind::Consumer
                | Kind::LookupTable
        );
        let _order = if referred {
            Order::Alone(self.order.write().await)
        } else {
            Order::Beside(self.order.read().await)
        };
        if referred
            && !call.query.is_true("force")
            && let Some(user) = self.user_of(&key).await?
        {
            return Err(Reply::bad_request(user));
        }
        let options = DeleteOptions { author: call.author.to_owned() };
        if !self.store.delete(&key, options).await? {
            return Err(Reply::not_found());
        }
        Ok(Reply::json(StatusCode::OK, &json!({"deleted": "1", "key": format!("{}/{key}", self.prefix)})))
    }

    /// Parse, and see that everything referred to is there.
    async fn check(&self, key: ResourceKey, body: &Value) -> Result<(ResourceKey, Resource), Reply> {
        if key.kind == Kind::PluginMetadata && self.catalog.priority(&key.id).is_none() {
            let advice =
                self.catalog.refusal(&key.id).map_or_else(String::new, |advice| format!(": {advice}"));
            return Err(Reply::bad_request(format!("invalid plugin name [{}]{advice}", key.id)));
        }
        let mut paths = Vec::new();
        secret_ref::manager_paths(body, &mut paths);
        self.secrets.ask(&paths, SECRETS_WAIT).await;
        let resource = Resource::parse_with(&key, body, &*self.catalog, &self.secrets)
            .map_err(|errors| Reply::invalid(key.kind, &errors))?;
        if let Resource::Ssl(ssl) = &resource {
            let unknown = ssl.check_signers(self.signers.iter().map(String::as_str));
            let errors = unknown.map_or_else(|| unreadable(&key, ssl), |error| vec![error]);
            if !errors.is_empty() {
                return Err(Reply::invalid(key.kind, &errors));
            }
        }
        let mut references = Vec::new();
        resource.visit_references(&mut |pointer, target| references.push((pointer.to_owned(), target)));
        for (pointer, target) in references {
            // As APISIX: what plugins refer to may come later.
            if !pointer.starts_with("/plugins/") {
                self.check_reference(key.kind, &pointer, &target).await?;
            }
        }
        if let Some(consumer) = key.consumer()
            && self.store.get(&consumer).await?.is_none()
        {
            return Err(Reply::error(StatusCode::NOT_FOUND, "consumer not found"));
        }
        if let Some(table) = key.lookup_table()
            && self.store.get(&table).await?.is_none()
        {
            return Err(Reply::error(StatusCode::NOT_FOUND, "lookup table not found"));
        }
        if let Some(other) = self.other_with_its_key(&key, &resource).await? {
            return Err(Reply::bad_request(format!("duplicate key found with consumer: {other}")));
        }
        if let Resource::GlobalRule(rule) = &resource {
            for other in self.store.list(Kind::GlobalRule).await? {
                let plugins = other.parse().ok().and_then(|mut value| Some(value.get_mut("plugins")?.take()));
                let shared = rule.plugins.keys().find(|name| {
                    other.key != key
                        && plugins.as_ref().is_some_and(|plugins| plugins.get(name.as_str()).is_some())
                });
                if let Some(name) = shared {
                    return Err(Reply::bad_request(format!(
                        "plugin '{name}' already exists in global rule with id '{}'",
                        other.key.id
                    )));
                }
            }
        }
        Ok((key, resource))
    }

    /// The consumer that a key of this consumer or credential already belongs to. As in APISIX it is looked up among
    /// those in use, so of two writes at the same time both may get through; requests are then recognised as the first
    /// in the order of their ids.
    async fn other_with_its_key(
        &self,
        key: &ResourceKey,
        resource: &Resource,
    ) -> Result<Option<Arc<str>>, StoreError> {
        if !matches!(key.kind, Kind::Consumer | Kind::Credential) {
            return Ok(None);
        }
        for (plugin, settings) in resource.plugins().into_iter().flat_map(|plugins| plugins.iter()) {
            let registration = plugins::registrations().iter().find(|known| known.name == plugin);
            let Some((extras, name)) = registration.map(|known| ((known.extras)(), known.name)) else {
                continue;
            };
            let Some(own) = extras.consumer_key(settings) else { continue };
            let Some(known) = self.consumers.find(name, &own) else { continue };
            let owner = match &known.credential_id {
                Some(id) => ResourceKey::new(Kind::Credential, format!("{}/credentials/{id}", known.name)),
                None => ResourceKey::new(Kind::Consumer, &*known.name),
            };
            // What was written a moment ago is in use a moment later: only what is still stored counts.
            let stored = match self.store.get(&owner).await? {
                Some(stored) if owner != *key => stored.parse()?,
                _ => continue,
            };
            let stored = Resource::parse_with(&owner, &stored, &*self.catalog, &self.secrets).ok();
            let theirs = stored.and_then(|stored| extras.consumer_key(stored.plugins()?.get(plugin)?));
            if theirs.is_some_and(|theirs| theirs == own) {
                return Ok(Some(known.name.clone()));
            }
        }
        Ok(None)
    }

    pub(super) async fn check_reference(
        &self,
        kind: Kind,
        pointer: &str,
        target: &ResourceKey,
    ) -> Result<(), Reply> {
        let what = title(target.kind);
        let failed = |why: &str| {
            let message = format!("failed to fetch {what} info by {what} id [{}], {why}", target.id);
            let error = ConfigError::new(pointer, ErrorKind::MissingReference { target: target.clone() });
            Reply::json(
                StatusCode::BAD_REQUEST,
                &json!({
                    "error_msg": message,
                    "errors": [{"pointer": error.pointer, "error": error.kind.to_string()}],
                }),
            )
        };
        let found = self.store.get(target).await?.ok_or_else(|| failed("response code: 404"))?;
        if target.kind == Kind::Ssl && kind != Kind::Ssl {
            let is_client = found.parse().is_ok_and(|ssl| ssl.get("type").is_some_and(|is| is == "client"));
            if !is_client {
                return Err(failed("wrong ssl type: it must be `client`"));
            }
        }
        Ok(())
    }

    /// The sentence that names an object that still refers to `target`.
    async fn user_of(&self, target: &ResourceKey) -> Result<Option<String>, StoreError> {
        let what = match target.kind {
            Kind::Upstream => "this upstream, ",
            Kind::Service => "this service directly, ",
            Kind::PluginConfig => "this plugin config, ",
            Kind::ConsumerGroup => "this consumer group, ",
            // As APISIX writes it, without a space.
            Kind::Proto => "this proto,",
            Kind::StreamRoute => "this stream route directly, ",
            Kind::LookupTable => "this lookup table, ",
            _ => return Ok(None),
        };
        for (kind, name) in users(target.kind) {
            for item in self.store.list(*kind).await? {
                if let Some(by) = refers(&item, target) {
                    let by =
                        if by == By::Plugin && target.kind == Kind::Upstream { "plugin in " } else { "" };
                    return Ok(Some(format!(
                        "can not delete {what}{by}{name} [{}] is still using it now",
                        item.key.own_id()
                    )));
                }
            }
        }
        Ok(None)
    }

    /// An object as GET shows it.
    fn shown(&self, item: &Stored) -> Value {
        let value = item.parse().map_or_else(
            |_| Value::String(String::from_utf8_lossy(&item.value).into_owned()),
            |mut value| {
                redact(item.key.kind, &mut value);
                value
            },
        );
        json!({
            "key": format!("{}/{}", self.prefix, item.key),
            "value": value,
            "createdIndex": item.created_index,
            "modifiedIndex": item.modified_index,
        })
    }

    /// An object as the answer to a write shows it: as APISIX, without indices.
    fn written(&self, key: &ResourceKey, mut value: Value) -> Value {
        redact(key.kind, &mut value);
        json!({"key": format!("{}/{key}", self.prefix), "value": value})
    }
}

impl Call<'_> {
    /// The id in the path, and what follows it.
    fn id(&self) -> (Option<String>, String) {
        let named = match self.kind {
            // The consumer's name, the manager or the table comes first.
            Kind::Credential | Kind::Secret | Kind::LookupEntry => 2,
            _ => 1,
        };
        let id = self.path.get(named - 1).cloned();
        let rest = self.path.get(named..).unwrap_or_default().join("/");
        (id, rest)
    }

    fn configuration(&mut self) -> Result<Value, Reply> {
        let body = self.body.take().filter(|body| !body.is_null());
        body.ok_or_else(|| Reply::bad_request("missing configurations"))
    }

    fn key(&self, id: &str) -> Result<ResourceKey, ConfigError> {
        let first = self.path.first().map_or("", String::as_str);
        match self.kind {
            Kind::Credential => ResourceKey::parse(self.kind, &format!("{first}/credentials/{id}")),
            Kind::LookupEntry => ResourceKey::parse(self.kind, &format!("{first}/entries/{id}")),
            Kind::Secret => ResourceKey::parse(self.kind, &format!("{first}/{id}")),
            kind => ResourceKey::parse(kind, id),
        }
    }

    fn options(&self, condition: Condition) -> Result<PutOptions, Reply> {
        let ttl = match self.query.get("ttl") {
            None => None,
            Some(ttl) => Some(
                ttl.parse::<f64>()
                    .ok()
                    .filter(|seconds| *seconds > 0.0)
                    .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
                    .ok_or_else(|| Reply::bad_request("invalid argument ttl: should be a number"))?,
            ),
        };
        Ok(PutOptions { ttl, condition, author: self.author.to_owned() })
    }
}

/// Which guard a write holds until its answer stands.
enum Order<'a> {
    Beside(#[expect(dead_code, reason = "held, not read")] tokio::sync::RwLockReadGuard<'a, ()>),
    Alone(#[expect(dead_code, reason = "held, not read")] tokio::sync::RwLockWriteGuard<'a, ()>),
}

/// The id of a PUT: that of the path, or that of the body.
fn put_id(kind: Kind, in_path: Option<String>, body: &Value) -> Result<String, Reply> {
    let field = if kind == Kind::Consumer { "username" } else { "id" };
    let in_body = match body.get(field) {
        Some(Value::String(id)) => Some(id.clone()),
        Some(Value::Number(id)) => Some(id.to_string()),
        _ => None,
    };
    match (kind, in_path, in_body) {
        (Kind::Consumer, Some(path), Some(body)) if path != body => Err(Reply::bad_request("wrong username")),
        // The name comes from the path; an id that names another one is refused when it is read.
        (Kind::PluginMetadata, Some(path), _) => Ok(path),
        (Kind::PluginMetadata, None, _) => Err(Reply::bad_request("missing plugin name")),
        (Kind::Secret, Some(path), Some(body)) if body.ends_with(&format!("/{path}")) => Ok(path),
        (_, Some(path), Some(body)) if path != body => {
            Err(Reply::bad_request(format!("wrong {} id", title(kind))))
        }
        (_, Some(id), _) | (_, None, Some(id)) => Ok(id),
        // Read on, so that the answer says what is missing.
        (Kind::Consumer, None, None) => Ok("unnamed".to_owned()),
        (_, None, None) => Err(Reply::bad_request(format!("missing {} id", title(kind)))),
    }
}

fn same_id(value: &Value, id: &str) -> bool {
    match value {
        Value::String(text) => text == id,
        Value::Number(number) => number.to_string() == id,
        _ => false,
    }
}

/// The server sets the times; whoever sends them is told, as APISIX does.
fn refuse_times(body: &Value) -> Result<(), Reply> {
    for (place, shown) in [("", ""), ("/upstream", "upstream."), ("/plugins", "plugins.")] {
        let Some(object) = body.pointer(place).and_then(Value::as_object) else { continue };
        for field in ["create_time", "update_time"] {
            if object.contains_key(field) {
                return Err(Reply::bad_request(format!("the property is forbidden:  {shown}{field}")));
            }
        }
    }
    Ok(())
}

/// As it is stored: with defaults and the id.
fn value_of(key: &ResourceKey, resource: Resource) -> Value {
    let mut value = Item { key: key.clone(), resource, created_index: 0, modified_index: 0 }.to_value();
    if key.kind == Kind::PluginMetadata
        && let Some(object) = value.as_object_mut()
    {
        object.insert("id".to_owned(), json!(&*key.id));
    }
    value
}

/// As it is stored when it is written now.
pub(super) fn stored_value(key: &ResourceKey, resource: Resource) -> Value {
    let mut value = value_of(key, resource);
    set_times(&mut value, None, None);
    value
}

fn set_times(value: &mut Value, created: Option<u64>, updated: Option<u64>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    if let Some(object) = value.as_object_mut() {
        object.insert("create_time".to_owned(), created.unwrap_or(now).into());
        object.insert("update_time".to_owned(), updated.unwrap_or(now).into());
    }
}

/// How one object refers to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Field,
    Plugin,
}

/// The kinds that may refer to a kind, in the order APISIX looks, with the names it gives them.
fn users(target: Kind) -> &'static [(Kind, &'static str)] {
    match target {
        Kind::Upstream => &[
            (Kind::Route, "route"),
            (Kind::Service, "service"),
            (Kind::PluginConfig, "plugin_config"),
            (Kind::Consumer, "consumer"),
            (Kind::ConsumerGroup, "consumer_group"),
            (Kind::GlobalRule, "global_rules"),
            (Kind::StreamRoute, "stream_route"),
            (Kind::LookupTable, "lookup_table"),
            (Kind::LookupEntry, "lookup_entry"),
        ],
        Kind::LookupTable => &[
            (Kind::Route, "route"),
            (Kind::Service, "service"),
            (Kind::PluginConfig, "plugin_config"),
            (Kind::GlobalRule, "global_rule"),
            (Kind::Consumer, "consumer"),
            (Kind::ConsumerGroup, "consumer_group"),
        ],
        Kind::Service => &[(Kind::Route, "route"), (Kind::StreamRoute, "stream_route")],
        Kind::PluginConfig => &[(Kind::Route, "route")],
        Kind::ConsumerGroup => &[(Kind::Consumer, "consumer")],
        Kind::Proto => &[
            (Kind::Route, "route"),
            (Kind::Service, "service"),
            (Kind::PluginConfig, "plugin_config"),
            (Kind::GlobalRule, "global_rule"),
        ],
        Kind::StreamRoute => &[(Kind::StreamRoute, "subordinate route")],
        _ => &[],
    }
}

/// Whether the object refers to `target`. Most do not even have the name of the field in them; only those
/// that do are read.
fn refers(item: &Stored, target: &ResourceKey) -> Option<By> {
    let field = match target.kind {
        Kind::Upstream => "upstream_id",
        Kind::Service => "service_id",
        Kind::PluginConfig => "plugin_config_id",
        Kind::ConsumerGroup => "group_id",
        Kind::Proto => "proto_id",
        Kind::StreamRoute => "superior_id",
        Kind::LookupTable => "table",
        _ => return None,
    };
    let contains = |text: &str| memchr::memmem::find(&item.value, text.as_bytes()).is_some();
    if item.key == *target || !contains(field) || !contains(&target.id) {
        return None;
    }
    let value = item.parse().ok()?;
    let is_target = |id: Option<&Value>| id.is_some_and(|id| same_id(id, &target.id));
    if is_target(value.get(field)) || is_target(value.pointer("/protocol").and_then(|is| is.get(field))) {
        return Some(By::Field);
    }
    let entries = value.get("entries").and_then(Value::as_object);
    if entries.is_some_and(|entries| entries.values().any(|entry| is_target(entry.get(field)))) {
        return Some(By::Field);
    }
    let plugins = value.get("plugins")?;
    let split = || {
        let rules = plugins.pointer("/traffic-split/rules").and_then(Value::as_array).into_iter().flatten();
        let mut targets =
            rules.filter_map(|rule| rule.get("weighted_upstreams").and_then(Value::as_array)).flatten();
        target.kind == Kind::Upstream && targets.any(|upstream| is_target(upstream.get(field)))
    };
    let transcode = || {
        target.kind == Kind::Proto
            && is_target(plugins.pointer("/grpc-transcode").and_then(|is| is.get(field)))
    };
    let lookup = || {
        target.kind == Kind::LookupTable
            && is_target(plugins.pointer("/upstream-lookup").and_then(|is| is.get(field)))
    };
    (split() || transcode() || lookup()).then_some(By::Plugin)
}

/// Take out what nobody may read back: private keys. The name of one that signers hold is none.
pub(crate) fn redact(kind: Kind, value: &mut Value) {
    if kind == Kind::Ssl
        && let Some(object) = value.as_object_mut()
    {
        let is_name = |key: &Value| key.as_str().is_some_and(|key| key.starts_with("signer://"));
        let are_names = |keys: &Value| keys.as_array().is_some_and(|keys| keys.iter().all(is_name));
        if !object.get("key").is_some_and(is_name) {
            object.shift_remove("key");
        }
        if !object.get("keys").is_some_and(are_names) {
            object.shift_remove("keys");
        }
    }
    redact_client_keys(value, 0);
}

/// `client_key` of any `tls` block, wherever an upstream may stand: in a route, a service, a plugin.
fn redact_client_keys(value: &mut Value, depth: usize) {
    // Deeper than JSON is read.
    if depth > 128 {
        return;
    }
    match value {
        Value::Object(object) => {
            if let Some(Value::Object(tls)) = object.get_mut("tls") {
                tls.shift_remove("client_key");
            }
            object.values_mut().for_each(|member| redact_client_keys(member, depth + 1));
        }
        Value::Array(elements) => {
            elements.iter_mut().for_each(|element| redact_client_keys(element, depth + 1))
        }
        _ => {}
    }
}

#[derive(Serialize)]
struct List<'a> {
    list: Vec<Listed<'a>>,
    total: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed<'a> {
    key: String,
    value: ListedValue<'a>,
    created_index: u64,
    modified_index: u64,
}

/// The JSON as it is stored where nothing has to be taken out of it.
#[derive(Serialize)]
#[serde(untagged)]
enum ListedValue<'a> {
    Raw(&'a RawValue),
    Tree(Value),
}

impl<'a> Listed<'a> {
    fn new(prefix: &str, item: &'a Stored) -> Listed<'a> {
        let as_it_is =
            item.key.kind != Kind::Ssl && memchr::memmem::find(&item.value, b"client_key").is_none();
        let raw = as_it_is.then(|| serde_json::from_slice(&item.value).ok()).flatten();
        let value = raw.map_or_else(
            || match item.parse() {
                Ok(mut value) => {
                    redact(item.key.kind, &mut value);
                    ListedValue::Tree(value)
                }
                Err(_) => ListedValue::Tree(Value::String(String::from_utf8_lossy(&item.value).into_owned())),
            },
            ListedValue::Raw,
        );
        Listed {
            key: format!("{prefix}/{}", item.key),
            value,
            created_index: item.created_index,
            modified_index: item.modified_index,
        }
    }
}
