//! A small Vault: the reading half of its KV engine, versions 1 and 2, over HTTP.
//!
//! No package registry holds the real one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use serde_json::{Value, json};

use crate::origin::Origin;

/// The token that may read.
pub const TOKEN: &str = "root-of-tests";

/// The engine of version 1 is at `kv`, that of version 2 at `secret`.
pub struct Vault {
    origin: Origin,
    kept: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    /// By path, with `/v1/` in front.
    secrets: BTreeMap<String, Value>,
    sealed: bool,
}

impl Vault {
    pub async fn start() -> Vault {
        let kept = Arc::new(Mutex::new(Kept::default()));
        let shared = Arc::clone(&kept);
        let origin = Origin::http(move |request| {
            let answer = answer(&shared.lock().unwrap_or_else(PoisonError::into_inner), &request);
            async move { answer }
        })
        .await;
        Vault { origin, kept }
    }

    /// Where it listens.
    pub fn uri(&self) -> String {
        format!("http://{}", self.origin.addr)
    }

    /// Keeps `fields` at `path`: `kv/apisix/jack`, `secret/data/apisix/jack`.
    pub fn write(&self, path: &str, fields: Value) {
        self.kept().secrets.insert(format!("/v1/{path}"), fields);
    }

    /// Every request is answered 503 from now on, or not any more.
    pub fn seal(&self, sealed: bool) {
        self.kept().sealed = sealed;
    }

    /// How often it was asked.
    pub fn requests(&self) -> usize {
        self.origin.requests()
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn answer(kept: &Kept, request: &Request<Bytes>) -> Response<Bytes> {
    let path = request.uri().path();
    let token = request.headers().get("x-vault-token").and_then(|token| token.to_str().ok());
    let (status, body) = match kept.secrets.get(path) {
        _ if kept.sealed => (StatusCode::SERVICE_UNAVAILABLE, json!({"errors": ["Vault is sealed"]})),
        _ if token != Some(TOKEN) => (StatusCode::FORBIDDEN, json!({"errors": ["permission denied"]})),
        None => (StatusCode::NOT_FOUND, json!({"errors": []})),
        Some(fields) if path.starts_with("/v1/secret/data/") => {
            (StatusCode::OK, json!({"data": {"data": fields, "metadata": {"version": 1}}}))
        }
        Some(fields) => (StatusCode::OK, json!({"data": fields})),
    };
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(body.to_string().into()).expect("an answer")
}
