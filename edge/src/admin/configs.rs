//! Whole configurations: `/configs/validate` checks one, `/configs` reads and replaces that of the standalone
//! provider.
//!
//! A check finds all errors, references included, and stores nothing. A replacement is taken whole or not at
//! all; its digest, the versions of its kinds and the indices of its objects decide what it changes.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use config::apisix_yaml::FileItem;
use config::graph::{Change, Graph};
use config::process::AdminRole;
use config::resource::Resource;
use config::{ApisixYaml, ConfigError, Document, ErrorKind, Kind, PluginCatalog, ResourceKey};
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Method, StatusCode, request};
use http_body::Body;
use serde_json::{Map, Value, json};

use super::auth::Identity;
use super::reply::{Reply, invalid_message};
use super::resource::redact;
use super::{Admin, MAX_CONFIGS, read, yaml};
use crate::store::standalone::{Current, NewConfig, Standalone, list_of};

const DIGEST: HeaderName = HeaderName::from_static("x-digest");
const LAST_MODIFIED: HeaderName = HeaderName::from_static("x-last-modified");
const YAML: &str = "application/yaml";

impl Admin {
    pub(super) async fn configs<B>(
        &self,
        parts: &request::Parts,
        path: &[String],
        identity: Identity<'_>,
        body: B,
    ) -> Result<Reply, Reply>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let no_route = || Reply::error(StatusCode::NOT_FOUND, "404 Route Not Found");
        match (&parts.method, path.get(1).map(String::as_str), &self.standalone) {
            (&Method::POST, Some("validate"), _) => {
                let document = document(parts, &read(body, &parts.headers, MAX_CONFIGS).await?)?;
                self.validate_configs(document).await
            }
            (_, Some("validate"), _) => Err(Reply::method_not_allowed("please use POST method", "POST")),
            (_, Some(_), _) | (_, None, None) => Err(no_route()),
            (&Method::GET, None, Some(standalone)) => Ok(show(parts, &standalone.current(), identity)),
            (&Method::HEAD, None, Some(standalone)) => {
                Ok(with_metadata(Reply::empty(StatusCode::OK), &standalone.current()))
            }
            (&Method::PUT, None, Some(standalone)) => {
                let digest = parts.headers.get(DIGEST).and_then(|digest| digest.to_str().ok());
                let digest = digest.ok_or_else(|| Reply::bad_request("missing digest header"))?;
                let body = read(body, &parts.headers, MAX_CONFIGS).await?;
                // One at a time: versions are compared with those that are there.
                let _alone = self.order.write().await;
                let document = document(parts, &body)?;
                self.replace_configs(standalone, digest, document).await
            }
            (_, None, Some(_)) => {
                Err(Reply::method_not_allowed("please use GET, HEAD or PUT method", "GET, HEAD, PUT"))
            }
        }
    }

    async fn validate_configs(&self, document: Document) -> Result<Reply, Reply> {
        let catalog = Arc::clone(&self.catalog);
        let checked = tokio::task::spawn_blocking(move || check(document, &*catalog));
        let Checked { mut findings, missing, .. } = checked.await.map_err(internal)??;
        for (finding, target) in missing {
            // What is not in the configuration may be in the store already.
            let in_store = self.standalone.is_none() && self.store.get(&target).await?.is_some();
            if !in_store {
                findings.push(finding);
            }
        }
        if findings.is_empty() {
            return Ok(Reply::empty(StatusCode::OK));
        }
        findings.sort_by_key(|finding| (finding.list.clone(), finding.index));
        let errors: Vec<Value> = findings.iter().map(Finding::to_value).collect();
        let body = json!({"error_msg": "Configuration validation failed", "errors": errors});
        Err(Reply::json(StatusCode::BAD_REQUEST, &body))
    }

    async fn replace_configs(
        &self,
        standalone: &Standalone,
        digest: &str,
        document: Document,
    ) -> Result<Reply, Reply> {
        if standalone.digest().as_deref() == Some(digest) {
            standalone.confirm();
            return Ok(Reply::empty(StatusCode::NO_CONTENT));
        }
        let mut new = NewConfig {
            digest: digest.to_owned(),
            last_modified: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            ..NewConfig::default()
        };
        for kind in Kind::LISTED {
            let name = format!("{}_conf_version", kind.segment());
            let old = standalone.version(kind);
            let version = match document.value().get(&name) {
                None | Some(Value::Null) => old.saturating_add(1),
                Some(Value::Number(version)) => match version.as_u64() {
                    Some(version) if version >= old => version,
                    _ => {
                        let message = format!("{name} must be greater than or equal to ({old})");
                        return Err(Reply::bad_request(message));
                    }
                },
                Some(_) => return Err(Reply::bad_request(format!("{name} must be a number"))),
            };
            if version > old {
                new.versions.insert(kind, version);
                let list = document
                    .value()
                    .get(kind.segment())
                    .filter(|list| list.as_array().is_some_and(|list| !list.is_empty()));
                if let Some(list) = list {
                    new.lists.insert(kind, Bytes::from(list.to_string()));
                }
            }
        }
        let catalog = Arc::clone(&self.catalog);
        let checked = tokio::task::spawn_blocking(move || check(document, &*catalog));
        let Checked { findings, items, .. } = checked.await.map_err(internal)??;
        // Kinds that stay as they are, are not looked at; a list that is no kind is an error all the same.
        let kept =
            |list: &str| Kind::from_segment(list).is_some_and(|kind| !new.versions.contains_key(&kind));
        let findings: Vec<&Finding> = findings.iter().filter(|finding| !kept(&finding.list)).collect();
        if let Some(first) = findings.first() {
            let errors: Vec<Value> = findings.iter().map(|finding| finding.to_value()).collect();
            let body = json!({"error_msg": first.message, "errors": errors});
            return Err(Reply::json(StatusCode::BAD_REQUEST, &body));
        }
        new.items = items;
        new.items.retain(|item| new.versions.contains_key(&list_of(item.key.kind)));
        standalone.replace(new);
        Ok(Reply::empty(StatusCode::ACCEPTED))
    }
}

/// One thing that is wrong with a configuration.
struct Finding {
    /// The list it is in: `routes`.
    list: String,
    index: Option<usize>,
    id: Option<String>,
    pointer: String,
    message: String,
}

impl Finding {
    fn to_value(&self) -> Value {
        let mut value = Map::new();
        value.insert("resource_type".to_owned(), json!(self.list));
        if let Some(id) = &self.id {
            value.insert("resource_id".to_owned(), json!(id));
        }
        if let Some(index) = self.index {
            value.insert("index".to_owned(), json!(index));
        }
        value.insert("error".to_owned(), json!(self.message));
        value.insert("pointer".to_owned(), json!(self.pointer));
        Value::Object(value)
    }

    /// An error of the whole document.
    fn of_document(error: &ConfigError) -> Finding {
        let mut tokens = error.pointer.split('/').skip(1);
        let list = tokens.next().unwrap_or_default().to_owned();
        let index = tokens.next().and_then(|token| token.parse().ok());
        // Errors about duplicates and versions are sentences of their own.
        let message = match (&error.kind, index) {
            (ErrorKind::Invalid { problem }, _)
                if problem.starts_with("found duplicate") || problem.contains("_conf_version must") =>
            {
                problem.clone()
            }
            (kind, Some(index)) => format!("invalid {list} at index {index}, err: {kind}"),
            (kind, None) => kind.to_string(),
        };
        let list = list.strip_suffix("_conf_version").map(str::to_owned).unwrap_or(list);
        Finding { list, index, id: None, pointer: error.pointer.clone(), message }
    }

    fn of_item(item: &FileItem, errors: &[ConfigError], message: String) -> Finding {
        let mut tokens = item.pointer.split('/').skip(1);
        let list = tokens.next().unwrap_or_default().to_owned();
        let index: Option<usize> = tokens.next().and_then(|token| token.parse().ok());
        let inside = errors.first().map_or("", |error| error.pointer.as_str());
        Finding {
            message: format!("invalid {list} at index {}, err: {message}", index.unwrap_or(0)),
            list,
            index,
            id: Some(item.key.id.to_string()),
            pointer: format!("{}{inside}", item.pointer),
        }
    }
}

/// What a check found.
struct Checked {
    findings: Vec<Finding>,
    /// References to objects that are not in the configuration.
    missing: Vec<(Finding, ResourceKey)>,
    items: Vec<FileItem>,
}

/// Check every object and every reference. Takes a while for a large configuration: not for an async thread.
fn check(document: Document, catalog: &dyn PluginCatalog) -> Result<Checked, Reply> {
    let file = ApisixYaml::read(document).map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(|error| error.error.to_string()).collect();
        Reply::bad_request(format!("invalid request body: {}", lines.join("; ")))
    })?;
    let mut findings: Vec<Finding> =
        file.errors.iter().map(|error| Finding::of_document(&error.error)).collect();
    let mut graph = Graph::new();
    let mut good = Vec::new();
    let mut unasked = HashSet::new();
    for item in file.items() {
        let value = item.value();
        match Resource::parse(&item.key, &value, catalog) {
            Ok(resource) => {
                graph.apply(
                    Change::Put { key: item.key.clone(), value, created_index: 1, modified_index: 1 },
                    catalog,
                );
                good.push((item, resource));
            }
            // One finding for each error; the sentence of each is about that one. Secret managers are asked when the
            // configuration is taken over: they may be part of it.
            Err(errors) => {
                if errors.iter().any(ConfigError::is_unasked_secret) {
                    unasked.insert(item.key.clone());
                }
                let told =
                    |error: &ConfigError| error.is_unasked_secret() || error.is_told_by_file(&item.key);
                let wrong = errors.chunks(1).filter(|error| !error.iter().all(told));
                findings.extend(
                    wrong.map(|error| Finding::of_item(item, error, invalid_message(item.key.kind, error))),
                );
            }
        }
    }
    let mut missing = Vec::new();
    for (item, resource) in good {
        for error in graph.check_references(&item.key, &resource) {
            let error = [error];
            let finding =
                Finding::of_item(item, &error, error.first().map_or_else(String::new, ToString::to_string));
            match &error {
                [ConfigError { kind: ErrorKind::MissingReference { target }, .. }] => {
                    if unasked.contains(target) {
                        continue;
                    }
                    missing.push((finding, target.clone()));
                }
                _ => findings.push(finding),
            }
        }
    }
    Ok(Checked { findings, missing, items: file.items().to_vec() })
}

fn document(parts: &request::Parts, body: &Bytes) -> Result<Document, Reply> {
    if body.is_empty() {
        return Err(Reply::bad_request("invalid request body: empty request body"));
    }
    let text =
        std::str::from_utf8(body).map_err(|_| Reply::bad_request("invalid request body: it is not UTF-8"))?;
    let content_type = parts.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_yaml = content_type.is_some_and(|value| value.starts_with(YAML));
    let parsed = if is_yaml { Document::yaml("body", text) } else { Document::json("body", text) };
    match parsed {
        Ok(document) if document.value().is_object() => Ok(document),
        Ok(_) if is_yaml => Err(Reply::bad_request("invalid request body: invalid yaml request body")),
        Ok(_) => Err(Reply::bad_request("invalid request body: write an object")),
        Err(error) => Err(Reply::bad_request(format!("invalid request body: {error}"))),
    }
}

fn show(parts: &request::Parts, current: &Current, identity: Identity<'_>) -> Reply {
    let mut body = Map::new();
    for kind in Kind::LISTED {
        if let Some(list) = current.lists.get(&kind) {
            let mut list: Value = serde_json::from_slice(list).unwrap_or_default();
            // Whoever may write the configuration must be able to read all of it back; nobody else sees keys.
            if identity.role == AdminRole::Viewer {
                let elements = list.as_array_mut().into_iter().flatten();
                elements.for_each(|element| redact(kind, element));
            }
            body.insert(kind.segment().to_owned(), list);
        }
        let version = current.versions.get(&kind).copied().unwrap_or(0);
        body.insert(format!("{}_conf_version", kind.segment()), json!(version));
    }
    if let Some(digest) = &current.digest {
        body.insert("X-Digest".to_owned(), json!(digest));
        body.insert("X-Last-Modified".to_owned(), json!(current.last_modified));
    }
    let body = Value::Object(body);
    let accepts_yaml =
        parts.headers.get(ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(YAML.as_bytes()));
    let reply = if accepts_yaml {
        Reply::with(StatusCode::OK, YAML, yaml::to_string(&body))
    } else {
        Reply::json(StatusCode::OK, &body)
    };
    with_metadata(reply, current)
}

fn with_metadata(reply: Reply, current: &Current) -> Reply {
    let Some(digest) = current.digest.as_ref().and_then(|digest| HeaderValue::from_str(digest).ok()) else {
        return reply;
    };
    reply.header(DIGEST, digest).header(LAST_MODIFIED, HeaderValue::from(current.last_modified))
}

fn internal(error: tokio::task::JoinError) -> Reply {
    Reply::error(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}
