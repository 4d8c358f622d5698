//! The Control API: what the running gateway knows, for operators and their tools.
//!
//! The paths of APISIX, and ours: what was set aside and why, which configuration is served and how old it
//! is, the revisions of the store, and what would happen to a request. It has no keys, so it listens on
//! loopback; it shows no private keys either.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use config::{Item, Kind, PluginCatalog, ResourceKey, schema};
use http::header::ACCEPT;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Body;
use hyper::body::Incoming;
use serde_json::{Map, Value, json};

use crate::admin::query::Query;
use crate::admin::reply::{Reply, ReplyBody};
use crate::admin::{plugins, read, redact, segments};
use crate::endpoint::Handler;
use crate::live::{Checker, LiveState};
use crate::store::{BoxFuture, Store};

/// Largest body, in bytes: of a request to explain.
const MAX_BODY: usize = 1 << 20;
/// Revisions shown unless more are asked for, and at most.
const REVISIONS: (usize, usize) = (50, 1000);

/// The Control API.
pub struct Control {
    live: Arc<dyn LiveState>,
    store: Arc<dyn Store>,
    catalog: Arc<dyn PluginCatalog>,
    prefix: String,
}

impl Control {
    /// A Control API. `prefix` is what keys begin with in answers: `/apisix`.
    #[must_use]
    pub fn new(
        live: Arc<dyn LiveState>,
        store: Arc<dyn Store>,
        catalog: Arc<dyn PluginCatalog>,
        prefix: &str,
    ) -> Control {
        Control { live, store, catalog, prefix: prefix.to_owned() }
    }

    /// Answer one request. Never fails.
    pub async fn answer<B>(&self, request: Request<B>) -> Reply
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (parts, body) = request.into_parts();
        let no_route = || Reply::error(StatusCode::NOT_FOUND, "404 Route Not Found");
        let Some(path) = segments(parts.uri.path()) else { return no_route() };
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let Some(("v1", path)) = path.split_first().map(|(first, rest)| (*first, rest)) else {
            return no_route();
        };
        let query = Query::parse(parts.uri.query().unwrap_or_default());
        match (&parts.method, path) {
            (&Method::GET, ["schema"]) => ok(&self.schema()),
            (&Method::GET, ["healthcheck"]) => self.health(&parts.headers),
            (&Method::GET, ["healthcheck", kind, rest @ ..]) => {
                self.health_of(kind, rest.first().copied(), &parts.headers)
            }
            (&Method::GET, ["routes"]) => self.objects(Kind::Route),
            (&Method::GET, ["services"]) => self.objects(Kind::Service),
            (&Method::GET, ["upstreams"]) => self.objects(Kind::Upstream),
            (&Method::GET, ["route", id]) => self.object(Kind::Route, id),
            (&Method::GET, ["service", id]) => self.object(Kind::Service, id),
            (&Method::GET, ["upstream", id]) => self.object(Kind::Upstream, id),
            (&Method::GET, ["plugin_metadatas"]) => {
                let all = self.live.objects(Kind::PluginMetadata);
                ok(&all.iter().map(|item| metadata(item)).collect())
            }
            (&Method::GET, ["plugin_metadata", name]) => {
                match self.live.object(&ResourceKey::new(Kind::PluginMetadata, *name)) {
                    Some(item) => ok(&metadata(&item)),
                    None => not_found(&format!("plugin metadata[{name}] not found")),
                }
            }
            (&Method::PUT, ["plugins", "reload"]) => {
                self.live.reload_plugins();
                Reply::with(StatusCode::OK, "text/plain", "done")
            }
            // There is no garbage to collect; scripts go on working.
            (&Method::POST, ["gc"]) => Reply::empty(StatusCode::OK),
            (&Method::GET, ["discovery", kind, "dump"]) => match self.live.discovery(kind) {
                Some(dump) => ok(&dump),
                None => not_found(&format!("discovery {kind} is not in use")),
            },
            (&Method::GET, ["rejected"]) => ok(&self.rejected()),
            (&Method::GET, ["config"]) => ok(&self.config()),
            (&Method::GET, ["revisions"]) => self.revisions(&query).await,
            (&Method::POST, ["explain"]) => match read(body, &parts.headers, MAX_BODY).await {
                Ok(body) => self.explain(&body).await,
                Err(refusal) => refusal,
            },
            _ => no_route(),
        }
    }

    fn schema(&self) -> Value {
        let mut main = Map::new();
        for kind in Kind::ALL {
            main.insert(kind.singular().to_owned(), schema::schema_for(kind, &*self.catalog));
        }
        json!({"main": main, "plugins": plugins::all(&*self.catalog), "stream_plugins": {}})
    }

    fn objects(&self, kind: Kind) -> Reply {
        let all = self.live.objects(kind);
        ok(&all.iter().map(|item| self.shown(item)).collect())
    }

    fn object(&self, kind: Kind, id: &str) -> Reply {
        match self.live.object(&ResourceKey::new(kind, id)) {
            Some(item) => ok(&self.shown(&item)),
            None => not_found(&format!("{kind}[{id}] not found")),
        }
    }

    fn shown(&self, item: &Item) -> Value {
        let mut value = item.to_value();
        redact(item.key.kind, &mut value);
        json!({
            "key": format!("{}/{}", self.prefix, item.key),
            "value": value,
            "createdIndex": item.created_index,
            "modifiedIndex": item.modified_index,
        })
    }

    fn health(&self, headers: &HeaderMap) -> Reply {
        let checkers = self.live.health();
        if wants_html(headers) {
            return Reply::with(StatusCode::OK, "text/html; charset=utf-8", self.health_page(&checkers));
        }
        ok(&checkers.iter().map(|checker| self.checker(checker)).collect())
    }

    fn health_of(&self, kind: &str, id: Option<&str>, headers: &HeaderMap) -> Reply {
        let Some(id) = id else { return not_found(&format!("missing src id for src type {kind}")) };
        let Some(of) = Kind::from_segment(kind)
            .filter(|kind| matches!(kind, Kind::Route | Kind::Service | Kind::Upstream))
        else {
            return Reply::bad_request(format!("invalid src type {kind}"));
        };
        let key = ResourceKey::new(of, id);
        match self.live.health().into_iter().find(|checker| checker.owner == key) {
            Some(checker) if wants_html(headers) => {
                let page = self.health_page(std::slice::from_ref(&checker));
                Reply::with(StatusCode::OK, "text/html; charset=utf-8", page)
            }
            Some(checker) => ok(&self.checker(&checker)),
            None if self.live.object(&key).is_some() => not_found(&format!("no checker for {kind}[{id}]")),
            None => not_found(&format!("{kind}[{id}] not found")),
        }
    }

    fn checker(&self, checker: &Checker) -> Value {
        let mut value = serde_json::to_value(checker).unwrap_or_default();
        if let Some(object) = value.as_object_mut() {
            object.insert("name".to_owned(), json!(format!("{}/{}", self.prefix, checker.owner)));
        }
        value
    }

    fn health_page(&self, checkers: &[Checker]) -> String {
        let mut rows = String::new();
        let nodes = checkers.iter().flat_map(|checker| checker.nodes.iter().map(move |node| (checker, node)));
        for (index, (checker, node)) in nodes.enumerate() {
            let color = if node.status.ends_with("unhealthy") { " bgcolor=\"#FF0000\"" } else { "" };
            let counter = node.counter;
            let cells = [
                (index + 1).to_string(),
                format!("{}/{}", self.prefix, checker.owner),
                checker.kind.to_owned(),
                format!("{}:{}", node.ip, node.port),
                node.status.to_owned(),
                counter.success.to_string(),
                counter.tcp_failure.to_string(),
                counter.http_failure.to_string(),
                counter.timeout_failure.to_string(),
            ];
            let _ = write!(rows, "<tr{color}>");
            for cell in cells {
                let _ = write!(rows, "<td>{}</td>", escape_html(&cell));
            }
            rows.push_str("</tr>\n");
        }
        let heads = [
            "Index",
            "Upstream",
            "Check type",
            "Host",
            "Status",
            "Success counts",
            "TCP Failures",
            "HTTP Failures",
            "TIMEOUT Failures",
        ]
        .map(|head| format!("<th>{head}</th>"))
        .concat();
        format!(
            "<!DOCTYPE html>\n<html>\n<head><title>Upstream check status</title></head>\n<body>\n\
             <h1>Upstream check status</h1>\n<table cellspacing=\"0\" cellpadding=\"3\" border=\"1\">\n\
             <tr bgcolor=\"#C0C0C0\">{heads}</tr>\n{rows}</table>\n</body>\n</html>\n"
        )
    }

    /// What is set aside. The values stay out: they may hold secrets.
    fn rejected(&self) -> Value {
        let rejected = self.live.rejected();
        let one = |rejected: &config::Rejected| {
            let errors: Vec<Value> = rejected
                .errors
                .iter()
                .map(|error| json!({"pointer": error.pointer, "error": error.kind.to_string()}))
                .collect();
            json!({
                "key": format!("{}/{}", self.prefix, rejected.key),
                "kind": rejected.key.kind.singular(),
                "id": &*rejected.key.id,
                "modifiedIndex": rejected.modified_index,
                "errors": errors,
            })
        };
        json!({"total": rejected.len(), "list": rejected.iter().map(one).collect::<Vec<_>>()})
    }

    fn config(&self) -> Value {
        let status = self.store.status();
        let applied = self.live.applied();
        let stale = status.stale.map(|(since, why)| {
            let age = since.elapsed().unwrap_or_default().as_secs();
            json!({"since": seconds(since), "age_seconds": age, "reason": why})
        });
        json!({
            "provider": status.provider,
            "revision": status.revision,
            "applied_revision": applied.revision,
            "applied_at": seconds(applied.at),
            "stale": stale,
            "problems": status.problems,
            "rejected": self.live.rejected().len(),
        })
    }

    async fn revisions(&self, query: &Query) -> Reply {
        let limit = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(REVISIONS.0);
        match self.store.history(limit.min(REVISIONS.1)).await {
            Ok(revisions) => {
                let mut list = serde_json::to_value(&revisions).unwrap_or_default();
                for revision in list.as_array_mut().into_iter().flatten() {
                    redact_revision(revision);
                }
                ok(&json!({"list": list}))
            }
            Err(error) => error.into(),
        }
    }

    async fn explain(&self, body: &Bytes) -> Reply {
        let request = match serde_json::from_slice(body) {
            Ok(request) => request,
            Err(error) => return Reply::bad_request(format!("invalid request body: {error}")),
        };
        match self.live.explain(request).await {
            Ok(told) => ok(&told),
            Err(problem) => Reply::bad_request(problem),
        }
    }
}

impl Handler for Control {
    fn handle(&self, _: SocketAddr, request: Request<Incoming>) -> BoxFuture<'_, Response<ReplyBody>> {
        Box::pin(async move { self.answer(request).await.into_response() })
    }
}

fn ok(value: &Value) -> Reply {
    Reply::json(StatusCode::OK, value)
}

fn not_found(message: &str) -> Reply {
    Reply::error(StatusCode::NOT_FOUND, message)
}

fn metadata(item: &Item) -> Value {
    let mut value = item.to_value();
    if let Some(object) = value.as_object_mut() {
        object.insert("id".to_owned(), json!(&*item.key.id));
    }
    value
}

/// A log of changes holds what was written, keys of certificates included: they are not shown.
fn redact_revision(revision: &mut Value) {
    let key = revision.get("key").and_then(Value::as_str).unwrap_or_default();
    let kind = ResourceKey::from_path(key).map_or(Kind::Route, |key| key.kind);
    let person = matches!(kind, Kind::Consumer | Kind::Credential | Kind::Secret);
    for difference in revision.get_mut("diff").and_then(Value::as_array_mut).into_iter().flatten() {
        let pointer = difference.get("pointer").and_then(Value::as_str).unwrap_or_default();
        let is_key = pointer.ends_with("/client_key")
            || (kind == Kind::Ssl && (pointer == "/key" || pointer == "/keys"))
            || (person && !pointer.is_empty());
        let is_whole = pointer.is_empty();
        for side in ["before", "after"] {
            let Some(value) = difference.get_mut(side) else { continue };
            if is_key || (person && is_whole) {
                *value = json!("(not shown)");
            } else if is_whole {
                redact(kind, value);
            } else {
                redact(Kind::Route, value);
            }
        }
    }
}

fn wants_html(headers: &HeaderMap) -> bool {
    headers
        .get(ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/html"))
}

fn escape_html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
