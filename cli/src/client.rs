//! A small HTTP client for the Control API, or the admin interface, of a running process.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// How large an answer may be, in bytes.
const LARGEST: usize = 64 << 20;

/// Sends `body` to `address` + `path` (GET without one) and returns the JSON answer.
///
/// # Errors
/// Nothing listens there, it answers with an error, or not with JSON; the text says what to do.
pub async fn ask(address: &str, path: &str, body: Option<&Value>) -> Result<Value> {
    let method = if body.is_some() { Method::POST } else { Method::GET };
    call(address, path, method, body).await
}

/// Sends DELETE and returns the JSON answer.
///
/// # Errors
/// As [`ask`].
pub async fn delete(address: &str, path: &str) -> Result<Value> {
    call(address, path, Method::DELETE, None).await
}

async fn call(address: &str, path: &str, method: Method, body: Option<&Value>) -> Result<Value> {
    let base = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let uri = format!("{}{path}", base.trim_end_matches('/'));
    let request = Request::builder().method(method).uri(&uri);
    let request = match body {
        Some(body) => {
            request.header("content-type", "application/json").body(Full::new(Bytes::from(body.to_string())))
        }
        None => request.body(Full::default()),
    }
    .with_context(|| format!("{uri} is not a URL: write HOST:PORT of the Control API"))?;
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let answer = tokio::time::timeout(DEADLINE, client.request(request))
        .await
        .with_context(|| format!("{uri} did not answer within {} s", DEADLINE.as_secs()))?
        .with_context(|| {
            format!("{uri} cannot be reached: is the process running, and is this its Control API or admin interface?")
        })?;
    let status = answer.status();
    let bytes = Limited::new(answer.into_body(), LARGEST)
        .collect()
        .await
        .map_err(|error| anyhow::anyhow!("{uri}: the answer broke off: {error}"))?
        .to_bytes();
    if !status.is_success() {
        bail!("{uri} answered {status}: {}", String::from_utf8_lossy(&bytes).trim());
    }
    serde_json::from_slice(&bytes).with_context(|| format!("{uri} did not answer with JSON"))
}
