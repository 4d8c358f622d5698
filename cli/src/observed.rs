//! What a process is doing, by HTTP: `/status` for people and programs, `/metrics` for Prometheus, `/healthz`, `/readyz`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

const CONNECTIONS: usize = 64;
const HEAD: Duration = Duration::from_secs(10);
/// A connection that has said nothing more is closed.
const LIFE: Duration = Duration::from_secs(60);

/// What is told.
pub(crate) trait Observed: Clone + Send + Sync + 'static {
    /// One document with everything.
    fn status(&self) -> Value;

    /// The text that Prometheus reads.
    fn metrics(&self) -> String;

    /// Whether the process can do its work, or why not.
    fn ready(&self) -> Result<(), String>;
}

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, told: impl Observed) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let told = told.clone();
        connections.spawn(async move {
            let answer = service_fn(move |request| {
                let told = told.clone();
                async move { Ok::<_, Infallible>(answer(&told, &request)) }
            });
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEAD).max_headers(64);
            let connection = server.serve_connection(TokioIo::new(stream), answer);
            // How a connection ends is the client's affair.
            let _ = tokio::time::timeout(LIFE, connection).await;
            drop(place);
        });
    }
}

fn answer(told: &impl Observed, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/status") => {
            let text = serde_json::to_string_pretty(&told.status()).unwrap_or_default() + "\n";
            (StatusCode::OK, "application/json", text)
        }
        (&Method::GET, "/metrics") => (StatusCode::OK, "text/plain; version=0.0.4", told.metrics()),
        (&Method::GET, "/healthz") => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
        (&Method::GET, "/readyz") => match told.ready() {
            Ok(()) => (StatusCode::OK, "text/plain", "ready\n".to_owned()),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{reason}\n")),
        },
        (&Method::GET, _) => (
            StatusCode::NOT_FOUND,
            "text/plain",
            "there is /status, /metrics, /healthz and /readyz\n".to_owned(),
        ),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET alone\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
