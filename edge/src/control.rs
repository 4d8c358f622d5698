//! The Control API: what the running gateway knows, for operators and their tools.
//!
//! The paths of APISIX, and ours: what was set aside and why, which configuration is served and how old it
//! is, the revisions of the store, and what would happen to a request. It has no keys, so it listens on
//! loopback; it shows no private keys either.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use certs::acme::Keeper;
use config::{Item, Kind, PluginCatalog, ResourceKey, schema};
use http::header::ACCEPT;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Body;
use hyper::body::Incoming;
use layers::plugin::Definition;
use layers::vars::hostname;
use plugins::server_info::ServerInfo;
use serde_json::{Map, Value, json};

use crate::admin::query::Query;
use crate::admin::reply::{Reply, ReplyBody};
use crate::admin::{self, read, redact, segments};
use crate::drain::{AMONG_GATEWAYS, Board, Order, Refusal};
use crate::endpoint::Handler;
use crate::instance::Instance;
use crate::live::{Checker, LiveState};
use crate::store::{BoxFuture, Store};

/// Largest body, in bytes: of a request to explain.
const MAX_BODY: usize = 1 << 20;
/// Revisions shown unless more are asked for, and at most.
const REVISIONS: (usize, usize) = (50, 1000);

/// How long a question for changed endpoints may wait, and how often they are looked at.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(200);

/// The Control API.
pub struct Control {
    live: Arc<dyn LiveState>,
    store: Arc<dyn Store>,
    catalog: Arc<dyn PluginCatalog>,
    drains: Option<Board>,
    acme: Option<Keeper>,
    prefix: String,
    instance: Instance,
}

impl Control {
    /// A Control API. `prefix` is what keys begin with in answers: `/apisix`.
    #[must_use]
    pub fn new(
        live: Arc<dyn LiveState>,
        store: Arc<dyn Store>,
        catalog: Arc<dyn PluginCatalog>,
        prefix: &str,
        instance: Instance,
    ) -> Control {
        Control { live, store, catalog, drains: None, acme: None, prefix: prefix.to_owned(), instance }
    }

    /// With drains, which a process that serves traffic has.
    #[must_use]
    pub fn with_drains(self, drains: Board) -> Control {
        Control { drains: Some(drains), ..self }
    }

    /// With the certificates that an ACME authority gives.
    #[must_use]
    pub fn with_acme(self, acme: Keeper) -> Control {
        Control { acme: Some(acme), ..self }
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
            (&Method::GET, ["discovery", kind, "show_dump_file"]) => match self.live.discovery_file(kind) {
                Some(dump) => ok(&dump),
                None => not_found(&format!("discovery {kind} is not in use")),
            },
            (&Method::GET, ["endpoints", name @ ..]) => self.endpoints(&name.join("/"), &query).await,
            (&Method::POST, ["endpoints", name @ .., "refresh"]) if !name.is_empty() => {
                let name = name.join("/");
                if self.live.refresh_endpoints(&name) {
                    Reply::json(StatusCode::ACCEPTED, &json!({ "asked": name }))
                } else {
                    not_found(&format!("{name} has no endpoints that could be asked for"))
                }
            }
            (&Method::GET, ["server_info"]) if self.catalog.names().contains(&ServerInfo::NAME) => {
                ok(&self.server_info().await)
            }
            (&Method::GET, ["breakers"]) => ok(&self.live.breakers()),
            (&Method::GET, ["mesh"]) => match self.live.mesh() {
                Some(told) => ok(&told),
                None => not_found("this gateway is of no mesh: `postern.mesh` in config.yaml makes it one"),
            },
            (&Method::GET, ["caches"]) => ok(&self.live.caches()),
            (&Method::DELETE, ["caches", zone]) => {
                if self.live.purge_cache(zone) {
                    Reply::empty(StatusCode::OK)
                } else {
                    not_found(&format!("cache zone[{zone}] is not in use"))
                }
            }
            (&Method::GET, ["lookup_tables"]) => ok(&self.live.lookup_tables(None).into()),
            (&Method::GET, ["lookup_tables", id]) => match self.live.lookup_tables(Some(id)).pop() {
                Some(table) => ok(&table),
                None => not_found(&format!("lookup table[{id}] not found")),
            },
            (&Method::GET, ["lookup_tables", id, key]) => match self.live.lookup_entry(id, key) {
                Some(mut entry) => {
                    redact(Kind::LookupEntry, &mut entry);
                    ok(&entry)
                }
                None => not_found(&format!("lookup entry[{key}] not found")),
            },
            (method, ["drains", rest @ ..]) => match &self.drains {
                Some(drains) => drains_of(drains, method, rest, read(body, &parts.headers, MAX_BODY)).await,
                None => not_found("this process serves no traffic, so it drains nothing"),
            },
            (&Method::GET, ["acme"]) => match &self.acme {
                Some(acme) => ok(&json!(acme.status())),
                None => not_found("no ACME authority is configured: `postern.acme` in config.yaml"),
            },
            (&Method::POST, ["acme", "renew"]) => match &self.acme {
                Some(acme) => renew(acme, read(body, &parts.headers, MAX_BODY).await).await,
                None => not_found("no ACME authority is configured: `postern.acme` in config.yaml"),
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

    /// What is known of endpoints; with `since` and `wait`, once it is not what it was.
    async fn endpoints(&self, name: &str, query: &Query) -> Reply {
        let name = (!name.is_empty()).then_some(name);
        if let Some(since) = query.get("since") {
            let wait = query.get("wait").and_then(|wait| wait.parse().ok()).unwrap_or_default();
            let until = Instant::now() + Duration::from_secs(wait).min(LONGEST_WAIT);
            while !self.live.endpoints_changed(name, since) && Instant::now() < until {
                tokio::time::sleep(LOOK).await;
            }
        }
        let inventory = self.live.endpoints(name);
        match (name, inventory.upstreams.as_slice()) {
            (Some(name), []) => not_found(&format!("no upstream has endpoints by the name {name}")),
            _ => ok(&json!(inventory)),
        }
    }

    async fn server_info(&self) -> Value {
        json!({
            "id": self.instance.id,
            "hostname": hostname(),
            "version": env!("CARGO_PKG_VERSION"),
            "boot_time": seconds(self.instance.booted),
            "etcd_version": self.store.etcd_version().await.as_deref().unwrap_or("unknown"),
        })
    }

    fn schema(&self) -> Value {
        let mut main = Map::new();
        for kind in Kind::ALL {
            main.insert(kind.singular().to_owned(), schema::schema_for(kind, &*self.catalog));
        }
        json!({"main": main, "plugins": admin::plugins::all(&*self.catalog), "stream_plugins": {}})
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

/// Orders new certificates for what the body names.
async fn renew(acme: &Keeper, body: Result<Bytes, Reply>) -> Reply {
    let body = match body {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let asked: Option<Value> = serde_json::from_slice(&body).ok();
    let name = asked.as_ref().and_then(|asked| asked.get("name")?.as_str());
    let Some(name) = name else { return Reply::bad_request("write {\"name\": \"ID or server name\"}") };
    match acme.renew(name).await {
        Ok(ordered) if ordered.is_empty() => not_found(&format!(
            "no ssl resource that leaves its certificate to ACME is called {name}, or is for it"
        )),
        Ok(ordered) => Reply::json(StatusCode::ACCEPTED, &json!({ "ordered": ordered })),
        Err(problem) => Reply::error(StatusCode::SERVICE_UNAVAILABLE, problem),
    }
}

/// `/v1/drains`: begin a drain, look at it, undo it.
async fn drains_of(
    drains: &Board,
    method: &Method,
    path: &[&str],
    body: impl Future<Output = Result<Bytes, Reply>>,
) -> Reply {
    let unknown = |id: &str| not_found(&format!("drain[{id}] not found"));
    match (method, path) {
        (&Method::GET, []) => ok(&json!(drains.views())),
        (&Method::POST, []) => match body.await {
            Ok(body) => begin(drains, &body).await,
            Err(refusal) => refusal,
        },
        (&Method::GET, [id]) => match drains.view(id) {
            Some(view) => ok(&json!(view)),
            None if drains.is_undone(id) => {
                Reply::error(StatusCode::GONE, format!("drain[{id}] was undone here"))
            }
            None => unknown(id),
        },
        (&Method::DELETE, [id]) => {
            let among_gateways = body.await.is_ok_and(|body| *body == *AMONG_GATEWAYS);
            match drains.undo(id, among_gateways).await {
                Some(problems) => ok(&json!({ "id": id, "problems": problems })),
                None => unknown(id),
            }
        }
        _ => Reply::method_not_allowed(
            "GET and POST /v1/drains, GET and DELETE /v1/drains/ID",
            "GET, POST, DELETE",
        ),
    }
}

async fn begin(drains: &Board, body: &[u8]) -> Reply {
    let order: Order = match serde_json::from_slice(body) {
        Ok(order) => order,
        Err(error) => {
            let form = json!({"service": "orders", "node": "10.0.0.3:8080"});
            return Reply::bad_request(format!("the order to drain: {error}; write {form}"));
        }
    };
    match drains.begin(order).await {
        Ok(view) => Reply::json(StatusCode::CREATED, &json!(view)),
        Err(refusal @ (Refusal::NoService(_) | Refusal::NoNode { .. })) => not_found(&refusal.to_string()),
        Err(refusal) => Reply::bad_request(refusal.to_string()),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use http_body_util::{BodyExt, Full};

    use super::*;
    use crate::live::fake::Fake;
    use crate::store::PutOptions;
    use crate::store::embedded::Embedded;

    fn instance() -> Instance {
        Instance { id: "me".to_owned(), booted: UNIX_EPOCH + std::time::Duration::from_secs(7) }
    }

    #[tokio::test]
    async fn every_path() {
        let data = tempfile::tempdir().unwrap();
        let store = Arc::new(Embedded::open(data.path()).unwrap());
        let jack = ResourceKey::new(Kind::Consumer, "jack");
        let secret = json!({"username": "jack", "plugins": {"key-auth": {"key": "hush"}}});
        store.put(&jack, secret, PutOptions { author: "ann".into(), ..PutOptions::default() }).await.unwrap();
        let control = Control::new(
            Arc::new(Fake::default()),
            store,
            Arc::new(plugins::Catalog::default()),
            "/apisix",
            instance(),
        );
        for (method, path, body, status, contains) in [
            ("GET", "/v1/routes", "", 200, r#"[{"key":"/apisix/routes/1","value":{"uri":"/a""#),
            ("GET", "/v1/route/1", "", 200, r#""createdIndex":1,"modifiedIndex":2"#),
            ("GET", "/v1/route/9", "", 404, r#"{"error_msg":"route[9] not found"}"#),
            ("GET", "/v1/services", "", 200, "[]"),
            ("GET", "/v1/mesh", "", 200, "spiffe://mesh.local/ns/default/sa/edge"),
            ("GET", "/v1/breakers", "", 200, "route"),
            ("GET", "/v1/caches", "", 200, "memory_cache"),
            ("DELETE", "/v1/caches/memory_cache", "", 200, ""),
            ("DELETE", "/v1/caches/x", "", 404, "cache zone[x] is not in use"),
            ("GET", "/v1/service/9", "", 404, "service[9] not found"),
            ("GET", "/v1/upstreams", "", 200, "127.0.0.1:80"),
            ("GET", "/v1/upstream/1", "", 200, "/apisix/upstreams/1"),
            ("GET", "/v1/plugin_metadatas", "", 200, r#""id":"http-logger""#),
            ("GET", "/v1/plugin_metadata/http-logger", "", 200, r#""log_format""#),
            ("GET", "/v1/plugin_metadata/x", "", 404, "plugin metadata[x] not found"),
            ("GET", "/v1/schema", "", 200, r#"{"main":{"route":"#),
            ("PUT", "/v1/plugins/reload", "", 200, "done"),
            ("POST", "/v1/gc", "", 200, ""),
            ("GET", "/v1/discovery/dns/dump", "", 200, r#"{"services":{}}"#),
            ("GET", "/v1/discovery/nacos/dump", "", 404, "discovery nacos is not in use"),
            ("GET", "/v1/discovery/dns/show_dump_file", "", 200, r#"{"services":{}}"#),
            ("GET", "/v1/endpoints", "", 200, r#"{"version":"v1","upstreams":[{"name":"upstreams/1"}]}"#),
            ("GET", "/v1/endpoints/upstreams/1", "", 200, r#""version":"v1""#),
            ("GET", "/v1/endpoints/upstreams/1?since=v0&wait=60", "", 200, r#""version":"v1""#),
            ("GET", "/v1/endpoints/upstreams/1?since=v1&wait=0", "", 200, r#""version":"v1""#),
            ("GET", "/v1/endpoints/shop", "", 404, "no upstream has endpoints by the name shop"),
            ("POST", "/v1/endpoints/upstreams/1/refresh", "", 202, r#"{"asked":"upstreams/1"}"#),
            ("POST", "/v1/endpoints/shop/refresh", "", 404, "shop has no endpoints that could be asked for"),
            ("GET", "/v1/healthcheck", "", 200, r#""name":"/apisix/upstreams/1""#),
            ("GET", "/v1/healthcheck/upstreams/1", "", 200, r#""http_failure":5"#),
            ("GET", "/v1/healthcheck/routes/1", "", 404, "no checker for routes[1]"),
            ("GET", "/v1/healthcheck/routes/9", "", 404, "routes[9] not found"),
            ("GET", "/v1/healthcheck/routes", "", 404, "missing src id for src type routes"),
            ("GET", "/v1/healthcheck/ssls/1", "", 400, "invalid src type ssls"),
            ("GET", "/v1/lookup_tables", "", 200, r#"[{"id":"t","entries":1}]"#),
            ("GET", "/v1/lookup_tables/t", "", 200, r#"{"id":"t","entries":1}"#),
            ("GET", "/v1/lookup_tables/u", "", 404, "lookup table[u] not found"),
            ("GET", "/v1/lookup_tables/t/k", "", 200, r#""tls":{}"#),
            ("GET", "/v1/lookup_tables/t/l", "", 404, "lookup entry[l] not found"),
            ("GET", "/v1/rejected", "", 200, r#"{"pointer":"/uri","error":"write a path"}"#),
            ("GET", "/v1/config", "", 200, r#""revision":1,"applied_revision":7"#),
            ("GET", "/v1/revisions", "", 200, r#""author":"ann","key":"consumers/jack""#),
            ("POST", "/v1/explain", r#"{"path": "/x"}"#, 200, r#""/x""#),
            ("POST", "/v1/explain", "{}", 400, "`path` is missing"),
            ("POST", "/v1/explain", "{", 400, "invalid request body"),
            ("GET", "/v1/server_info", "", 200, r#""boot_time":7,"etcd_version":"unknown""#),
            ("GET", "/v1/nothing", "", 404, "404 Route Not Found"),
            ("DELETE", "/v1/routes", "", 404, "404 Route Not Found"),
            ("GET", "/", "", 404, "404 Route Not Found"),
        ] {
            let request =
                Request::builder().method(method).uri(path).body(Full::new(Bytes::from(body))).unwrap();
            let response = control.answer(request).await.into_response();
            assert_eq!(response.status().as_u16(), status, "{method} {path}");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let body = String::from_utf8_lossy(&body);
            assert!(body.contains(contains), "{method} {path}: {body}");
            assert!(!body.contains("top secret") && !body.contains("hush"), "{method} {path}: {body}");
        }
    }

    #[tokio::test]
    async fn a_browser_gets_a_page() {
        let data = tempfile::tempdir().unwrap();
        let store = Arc::new(Embedded::open(data.path()).unwrap());
        let control = Control::new(
            Arc::new(Fake::default()),
            store,
            Arc::new(plugins::Catalog::default()),
            "/apisix",
            instance(),
        );
        let request = Request::builder().uri("/v1/healthcheck").header(ACCEPT, "text/html,*/*");
        let response = control.answer(request.body(Full::new(Bytes::new())).unwrap()).await.into_response();
        let kind = response.headers().get("content-type").unwrap().to_str().unwrap().to_owned();
        assert!(kind.starts_with("text/html"), "{kind}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body);
        assert!(body.contains("<td>127.0.0.1:80</td><td>unhealthy</td>"), "{body}");
    }
}
