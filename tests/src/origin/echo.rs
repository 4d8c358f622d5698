//! Answers with a JSON account of the request it got.
//!
//! `{"method", "path", "query", "version", "headers": {name: [value, ..]}, "trailers", "body", "length", "name"}`,
//! status 200. The path `/status/NNN` answers with that status and `/bytes/N` with N times `x`.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use rustls::ServerConfig;
use serde_json::{Map, Value, json};

use super::Origin;

/// An echo over cleartext HTTP/1 and HTTP/2.
pub async fn start() -> Origin {
    named("echo").await
}

/// An echo that says `name` in its answers (`name` in the JSON and header `x-origin`).
pub async fn named(name: &str) -> Origin {
    named_at((Ipv4Addr::LOCALHOST, 0).into(), name).await
}

/// [`named`] at an address.
pub async fn named_at(addr: SocketAddr, name: &str) -> Origin {
    let name: Arc<str> = name.into();
    Origin::http_at(addr, move |request| {
        let name = Arc::clone(&name);
        async move { answer(&name, request) }
    })
    .await
}

/// An echo over TLS.
pub async fn tls(config: Arc<ServerConfig>, name: &str) -> Origin {
    let name: Arc<str> = name.into();
    Origin::https(config, move |request| {
        let name = Arc::clone(&name);
        async move { answer(&name, request) }
    })
    .await
}

/// The account of one request.
pub fn answer(name: &str, request: Request<Bytes>) -> Response<Bytes> {
    let path = request.uri().path();
    let status = path.strip_prefix("/status/").and_then(|code| code.parse().ok());
    let response = Response::builder().status(status.unwrap_or(StatusCode::OK)).header("x-origin", name);
    if let Some(count) = path.strip_prefix("/bytes/").and_then(|count| count.parse().ok()) {
        return response.body(vec![b'x'; count].into()).expect("an answer");
    }
    let account = json!({
        "name": name,
        "method": request.method().as_str(),
        "path": path,
        "query": request.uri().query(),
        "authority": request.uri().authority().map(http::uri::Authority::as_str),
        "version": format!("{:?}", request.version()),
        "headers": fields(request.headers()),
        "trailers": request.extensions().get::<HeaderMap>().map(fields),
        "body": String::from_utf8_lossy(request.body()),
        "length": request.body().len(),
    });
    response.header("content-type", "application/json").body(account.to_string().into()).expect("an answer")
}

fn fields(headers: &HeaderMap) -> Value {
    let mut fields = Map::new();
    for name in headers.keys() {
        let values =
            headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into());
        fields.insert(name.to_string(), Value::Array(values.collect()));
    }
    Value::Object(fields)
}
