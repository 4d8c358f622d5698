//! The Admin API, version 3: configuration by HTTP, compatible with that of APISIX.
//!
//! [`Admin::handle`] answers one request on top of any store. It checks address, key and role before it reads
//! a body, refuses what is wrong with pointer and advice, and answers a write only when the store says that
//! it is durable. It runs on the control runtime, on a listener of its own: never behind a proxy port.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use config::{Kind, PluginCatalog};
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, CONTENT_LENGTH,
};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Limited};
use layers::consumer::Consumers;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use crate::secrets::Secrets;
use crate::store::Store;
use crate::store::standalone::Standalone;

pub mod auth;
pub mod configs;
mod lookup;
pub mod patch;
pub(crate) mod plugins;
pub mod query;
pub mod reply;
mod resource;
mod schema;
mod yaml;

use auth::{Access, Identity};
use query::Query;
use reply::{Reply, ReplyBody};
use resource::Call;
pub(crate) use resource::redact;

/// Largest body of a request about one resource, in bytes: that of APISIX.
pub const MAX_BODY: usize = 3 << 19;
/// Largest body of a request about many entries of a lookup table, in bytes.
pub const MAX_MANY: usize = 64 << 20;
/// Largest body of a request about a whole configuration, in bytes.
pub const MAX_CONFIGS: usize = 256 << 20;
/// How much of a body that is not JSON goes back into the error.
const MAX_ECHO: usize = 4096;

const API_VERSION: HeaderName = HeaderName::from_static("x-api-version");

/// Called by `PUT /apisix/admin/plugins/reload`.
pub type ReloadPlugins = Arc<dyn Fn() + Send + Sync>;

/// What the Admin API works with.
pub struct AdminParts {
    /// Where resources live.
    pub store: Arc<dyn Store>,
    /// The plugins there are.
    pub catalog: Arc<dyn PluginCatalog>,
    /// What references to secrets are looked up in.
    pub secrets: Secrets,
    /// The consumers that requests are recognised as now.
    pub consumers: Consumers,
    /// Who may use it.
    pub access: Access,
    /// What keys begin with in answers, without a slash at the end: `/apisix`.
    pub prefix: String,
    /// Whether browsers of any origin may use it.
    pub cors: bool,
    /// Whether TCP and UDP are served at all; otherwise stream routes are refused.
    pub stream: bool,
    /// The pools of signers that certificates may name.
    pub signers: Vec<String>,
    /// The standalone store, if it is the provider: then there is `/configs` and no single resource.
    pub standalone: Option<Arc<Standalone>>,
    /// What a reload of plugins does.
    pub reload_plugins: ReloadPlugins,
}

/// The Admin API.
pub struct Admin {
    store: Arc<dyn Store>,
    catalog: Arc<dyn PluginCatalog>,
    secrets: Secrets,
    consumers: Consumers,
    access: Access,
    prefix: String,
    cors: bool,
    stream: bool,
    signers: Vec<String>,
    standalone: Option<Arc<Standalone>>,
    reload_plugins: ReloadPlugins,
    /// Shared by writes, taken alone by those that must not run beside others.
    order: tokio::sync::RwLock<()>,
}

impl Admin {
    /// An Admin API on top of its parts.
    #[must_use]
    pub fn new(parts: AdminParts) -> Admin {
        let AdminParts {
            store,
            catalog,
            secrets,
            consumers,
            access,
            prefix,
            cors,
            stream,
            signers,
            standalone,
            reload_plugins,
        } = parts;
        let order = tokio::sync::RwLock::new(());
        Admin {
            store,
            catalog,
            secrets,
            consumers,
            access,
            prefix,
            cors,
            stream,
            signers,
            standalone,
            reload_plugins,
            order,
        }
    }

    /// Answer one request of `peer`. Never fails: whatever goes wrong is an answer.
    pub async fn handle<B>(&self, peer: IpAddr, request: Request<B>) -> Response<ReplyBody>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let reply = self.answer(peer, request).await.unwrap_or_else(|refusal| refusal);
        let mut response = reply.into_response();
        response.headers_mut().insert(API_VERSION, HeaderValue::from_static("v3"));
        if self.cors {
            let headers = response.headers_mut();
            for (name, value) in [
                (ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
                (ACCESS_CONTROL_ALLOW_CREDENTIALS, "true"),
                (ACCESS_CONTROL_EXPOSE_HEADERS, "*"),
                (ACCESS_CONTROL_MAX_AGE, "3600"),
            ] {
                headers.insert(name, HeaderValue::from_static(value));
            }
        }
        response
    }

    async fn answer<B>(&self, peer: IpAddr, request: Request<B>) -> Result<Reply, Reply>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let no_route = || Reply::error(StatusCode::NOT_FOUND, "404 Route Not Found");
        if !self.access.allows(peer) {
            return Err(Reply::error(StatusCode::FORBIDDEN, "access denied by deployment.admin.allow_admin"));
        }
        let (parts, body) = request.into_parts();
        let path = segments(parts.uri.path()).ok_or_else(no_route)?;
        let Some(("apisix", rest)) = path.split_first().map(|(first, rest)| (first.as_str(), rest)) else {
            return Err(no_route());
        };
        let Some(("admin", path)) = rest.split_first().map(|(first, rest)| (first.as_str(), rest)) else {
            return Err(no_route());
        };
        let method = &parts.method;
        if self.cors && *method == Method::OPTIONS {
            return Ok(preflight());
        }
        if path.is_empty() {
            return if *method == Method::HEAD { Ok(Reply::empty(StatusCode::OK)) } else { Err(no_route()) };
        }
        let query = Query::parse(parts.uri.query().unwrap_or_default());
        let identity = self.access.authenticate(method, &parts.headers, &query).map_err(|refusal| {
            let body = json!({"error_msg": "failed to check token", "description": refusal.to_string()});
            Reply::json(StatusCode::UNAUTHORIZED, &body)
        })?;
        let first = path.first().map_or("", String::as_str);
        if first == "configs" {
            return self.configs(&parts, path, identity, body).await;
        }
        if !matches!(*method, Method::GET | Method::PUT | Method::POST | Method::DELETE | Method::PATCH) {
            return Err(no_route());
        }
        let is_write = matches!(*method, Method::PUT | Method::POST | Method::PATCH);
        let limit = if is_many(path) { MAX_MANY } else { MAX_BODY };
        let content = if is_write { read(body, &parts.headers, limit).await? } else { Bytes::new() };
        if let ("plugins", Some("reload")) = (first, path.get(1).map(String::as_str)) {
            return self.reload(method);
        }
        let body = parse(&content)?;
        if let ("schema", Some("validate")) = (first, path.get(1).map(String::as_str)) {
            return self.validate(method, path.get(2..).unwrap_or_default(), body);
        }
        match first {
            "plugins" => self.plugins(method, path.get(1).map(String::as_str), &query),
            "schema" => self.schema(method, path.get(1..).unwrap_or_default(), &query),
            _ => self.dispatch(method, path, &query, body, identity).await,
        }
    }

    async fn dispatch(
        &self,
        method: &Method,
        path: &[String],
        query: &Query,
        body: Option<Value>,
        identity: Identity<'_>,
    ) -> Result<Reply, Reply> {
        let Some((first, rest)) = path.split_first() else { return Err(Reply::not_found()) };
        let unsupported =
            || Reply::error(StatusCode::NOT_FOUND, format!("Unsupported resource type: {first}"));
        let kind = Kind::from_segment(first).filter(|kind| kind.folder() == *kind).ok_or_else(unsupported)?;
        if self.standalone.is_some() {
            let message =
                "the provider is yaml: read and write the whole configuration by /apisix/admin/configs";
            return Err(Reply::error(StatusCode::NOT_FOUND, message));
        }
        if kind == Kind::StreamRoute && !self.stream {
            return Err(Reply::bad_request("stream mode is disabled, can not add stream routes"));
        }
        let in_owner: Vec<String>;
        let (kind, path) = match (kind, rest) {
            (Kind::Consumer, [username, child, tail @ ..]) if child == "credentials" => {
                in_owner = [std::slice::from_ref(username), tail].concat();
                (Kind::Credential, in_owner.as_slice())
            }
            (Kind::LookupTable, [table, child]) if child == "entries" && *method == Method::PATCH => {
                return self.lookup_entries(table, body, identity).await;
            }
            (Kind::LookupTable, [table, child, tail @ ..]) if child == "entries" => {
                in_owner = [std::slice::from_ref(table), tail].concat();
                (Kind::LookupEntry, in_owner.as_slice())
            }
            (Kind::Consumer, [_, child, ..]) => {
                return Err(Reply::error(
                    StatusCode::NOT_FOUND,
                    format!("Unsupported resource type: {child}"),
                ));
            }
            _ => (kind, rest),
        };
        self.resource(Call { method, kind, path, query, body, author: identity.name }).await
    }

    fn reload(&self, method: &Method) -> Result<Reply, Reply> {
        if *method != Method::PUT {
            let message =
                format!("please use PUT method to reload the plugins, {method} method is not allowed.");
            return Err(Reply::method_not_allowed(message, "PUT"));
        }
        (self.reload_plugins)();
        Ok(Reply::with(StatusCode::OK, "text/plain", "done"))
    }
}

/// Whether the path is that of all entries of a lookup table.
fn is_many(path: &[String]) -> bool {
    matches!(path, [kind, _, child] if kind == Kind::LookupTable.segment() && child == "entries")
}

/// The segments of a path, decoded one by one, so that an encoded slash separates nothing. Empty ones at the
/// end are left out. `None` if a segment is not text.
pub(crate) fn segments(path: &str) -> Option<Vec<String>> {
    let trimmed = path.trim_end_matches('/');
    let segments = trimmed.strip_prefix('/').unwrap_or(trimmed).split('/');
    segments.map(|segment| Some(percent_decode_str(segment).decode_utf8().ok()?.into_owned())).collect()
}

/// The whole body, if it is not larger than `limit`.
pub(crate) async fn read<B>(body: B, headers: &http::HeaderMap, limit: usize) -> Result<Bytes, Reply>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let too_large = |size: &str| {
        let message = format!(
            "invalid request body: request size {size} is greater than the maximum size {limit} allowed"
        );
        Reply::bad_request(message)
    };
    let announced = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if let Some(length) = announced.filter(|length| *length > limit as u64) {
        return Err(too_large(&length.to_string()));
    }
    match Limited::new(Box::pin(body), limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(too_large("of the body")),
        Err(error) => Err(Reply::bad_request(format!("invalid request body: {error}"))),
    }
}

/// The body as JSON; nothing if it is empty.
fn parse(content: &Bytes) -> Result<Option<Value>, Reply> {
    if content.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(content).map(Some).map_err(|error| {
        let text = String::from_utf8_lossy(content.get(..MAX_ECHO).unwrap_or(content));
        let body = json!({"error_msg": format!("invalid request body: {error}"), "req_body": text});
        Reply::json(StatusCode::BAD_REQUEST, &body)
    })
}

fn preflight() -> Reply {
    Reply::with(StatusCode::OK, "text/plain", "")
        .header(
            ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("POST, GET, PUT, OPTIONS, DELETE, PATCH"),
        )
        .header(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("*"))
}
