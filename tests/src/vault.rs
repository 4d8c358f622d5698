//! A small Vault: the reading half of its KV engine, versions 1 and 2, and of its PKI engine what signs authorities, over HTTP.
//!
//! No package registry holds the real one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};

use crate::certs::Authority;
use crate::origin::Origin;

/// The token that may do everything.
pub const TOKEN: &str = "root-of-tests";
/// The token that may do nothing.
pub const POOR_TOKEN: &str = "poor-of-tests";

/// KV of version 1 is at `kv`, that of version 2 at `secret`, and PKI at `pki`.
pub struct Vault {
    origin: Origin,
    kept: Arc<Mutex<Kept>>,
}

struct Kept {
    /// By path, with `/v1/` in front.
    secrets: BTreeMap<String, Value>,
    sealed: bool,
    root: Authority,
    signed: usize,
}

impl Vault {
    pub async fn start() -> Vault {
        let root = Authority::new("root 1");
        let kept = Kept { secrets: BTreeMap::new(), sealed: false, root, signed: 0 };
        let kept = Arc::new(Mutex::new(kept));
        let shared = Arc::clone(&kept);
        let origin = Origin::http(move |request| {
            let answer = answer(&mut shared.lock().unwrap_or_else(PoisonError::into_inner), &request);
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

    /// The PKI engine has a new root from now on.
    pub fn replace_root(&self, name: &str) {
        self.kept().root = Authority::new(name);
    }

    /// How many authorities it has signed.
    pub fn signed(&self) -> usize {
        self.kept().signed
    }

    /// How often it was asked.
    pub fn requests(&self) -> usize {
        self.origin.requests()
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn answer(kept: &mut Kept, request: &Request<Bytes>) -> Response<Bytes> {
    let path = request.uri().path();
    let field = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let (status, body) = match (path, field("x-vault-token")) {
        _ if kept.sealed => (StatusCode::SERVICE_UNAVAILABLE, json!({"errors": ["Vault is sealed"]})),
        // Whom to believe is no secret.
        ("/v1/pki/cert/ca_chain", _) => {
            let root = kept.root.pem();
            (StatusCode::OK, json!({"data": {"certificate": root, "ca_chain": root}}))
        }
        ("/v1/pki/issuer/default/json", _) => {
            let root = kept.root.pem();
            (StatusCode::OK, json!({"data": {"certificate": root, "ca_chain": [root]}}))
        }
        ("/v1/sys/capabilities-self", Some(token)) => {
            let sent: Value = serde_json::from_slice(request.body()).unwrap_or_default();
            let path = sent["paths"][0].as_str().unwrap_or_default();
            let may = if token == TOKEN { "root" } else { "deny" };
            (StatusCode::OK, json!({"data": {path: [may], "capabilities": [may]}}))
        }
        (_, token) if token != Some(TOKEN) => {
            (StatusCode::FORBIDDEN, json!({"errors": ["permission denied"]}))
        }
        ("/v1/pki/root/sign-intermediate" | "/v1/pki/issuer/default/sign-intermediate", _)
            if request.method() == Method::POST =>
        {
            sign(kept, request.body())
        }
        (path, _) => match kept.secrets.get(path) {
            None => (StatusCode::NOT_FOUND, json!({"errors": []})),
            Some(fields) if path.starts_with("/v1/secret/data/") => {
                (StatusCode::OK, json!({"data": {"data": fields, "metadata": {"version": 1}}}))
            }
            Some(fields) => (StatusCode::OK, json!({"data": fields})),
        },
    };
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(body.to_string().into()).expect("an answer")
}

fn sign(kept: &mut Kept, body: &[u8]) -> (StatusCode, Value) {
    let sent: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |name: &str| sent[name].as_str().unwrap_or_default();
    let path_length = sent["max_path_length"].as_u64().and_then(|length| u8::try_from(length).ok());
    let Ok(seconds) = text("ttl").trim_end_matches('s').parse() else {
        return (StatusCode::BAD_REQUEST, json!({"errors": ["no ttl"]}));
    };
    let (name, life) = (text("common_name"), Duration::from_secs(seconds));
    let certificate = kept.root.sign_issuer(text("csr"), name, path_length, life);
    kept.signed += 1;
    let root = kept.root.pem();
    let data = json!({"certificate": certificate, "issuing_ca": root, "ca_chain": [certificate, root]});
    (StatusCode::OK, json!({"data": data}))
}
