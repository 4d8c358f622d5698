//! Two small upstreams for `postern up`: they say who they are and what they were asked.

use std::convert::Infallible;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;

/// Serves one sample upstream at `address` as long as the runtime lives.
///
/// # Errors
/// The address is in use.
pub async fn serve(name: &'static str, address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "the sample upstream cannot listen on {address}: stop what does (`ss -ltnp 'sport = :{}'`)",
            address.port()
        )
    })?;
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors: others have to end first.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            };
            tokio::spawn(async move {
                let service =
                    service_fn(move |request| async move { Ok::<_, Infallible>(answer(name, &request)) });
                let served = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "sample upstream");
                }
            });
        }
    });
    Ok(())
}

fn answer(name: &str, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let headers: serde_json::Map<_, _> = request
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()))
        .collect();
    let body = json!({
        "upstream": name,
        "method": request.method().as_str(),
        "uri": request.uri().to_string(),
        "headers": headers,
    });
    let mut response = Response::new(Full::new(Bytes::from(format!("{body:#}\n"))));
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response.headers_mut().insert(
        "x-sample-upstream",
        http::HeaderValue::try_from(name).unwrap_or_else(|_| http::HeaderValue::from_static("sample")),
    );
    response
}
