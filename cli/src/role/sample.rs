//! Small services for `postern up`: they say who they are, what they were asked, and what others said whom they asked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

/// How long another service gets to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than any answer of a sample.
const LONGEST: usize = 64 * 1024;

/// Serves one sample at `address` as long as the runtime lives. It asks whoever listens at `other` before it answers.
///
/// # Errors
/// The address is in use.
pub async fn serve(name: &'static str, address: SocketAddr, other: Option<SocketAddr>) -> Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "the sample {name} cannot listen on {address}: stop what does (`ss -ltnp 'sport = :{}'`)",
            address.port()
        )
    })?;
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors: others have to end first.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            tokio::spawn(async move {
                let service = service_fn(move |request| async move {
                    let told = match other {
                        Some(other) => {
                            Some(asked(other).await.unwrap_or_else(|error| json!(error.to_string())))
                        }
                        None => None,
                    };
                    Ok::<_, Infallible>(answer(name, &request, told))
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "sample");
                }
            });
        }
    });
    Ok(())
}

/// What another service answers.
async fn asked(other: SocketAddr) -> Result<Value> {
    let asking = async {
        let stream = TcpStream::connect(other).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::get("/payments").header("host", "payments").body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), LONGEST).collect().await;
        let body = body.map_err(|error| anyhow!("{error}"))?.to_bytes();
        let told = serde_json::from_slice(&body).unwrap_or_else(|_| json!(String::from_utf8_lossy(&body)));
        Ok(json!({"status": status, "answer": told}))
    };
    tokio::time::timeout(PATIENCE, asking).await.context("no answer in time")?
}

fn answer(name: &str, request: &Request<Incoming>, told: Option<Value>) -> Response<Full<Bytes>> {
    let headers: serde_json::Map<_, _> = request
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()))
        .collect();
    let mut body = json!({
        "upstream": name,
        "method": request.method().as_str(),
        "uri": request.uri().to_string(),
        "headers": headers,
    });
    if let (Value::Object(body), Some(told)) = (&mut body, told) {
        body.insert("payments".to_owned(), told);
    }
    let mut response = Response::new(Full::new(Bytes::from(format!("{body:#}\n"))));
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response.headers_mut().insert(
        "x-sample-upstream",
        http::HeaderValue::try_from(name).unwrap_or_else(|_| http::HeaderValue::from_static("sample")),
    );
    response
}
