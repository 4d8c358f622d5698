//! The admin interface of a sidecar, on loopback: status, metrics, what is known, and the order to drain.
//!
//! It answers from the moment the process has bound its sockets to its very end, on the control runtime.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use layers::telemetry::metrics::Metrics;
use layers::upstream::membership::Membership;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::capture::proof::Proof;
use crate::connections::Connections;
use crate::drain::Stage;
use crate::policy::Question;
use crate::running::Running;

/// Connections at a time.
const MAX_CONNECTIONS: usize = 128;
/// Time for the head of a request, and between two of them.
const HEAD: Duration = Duration::from_secs(30);

/// What the interface tells of.
pub struct Admin {
    /// The file in force.
    pub running: Running,
    /// The identity, and what is wrong with it.
    pub membership: Membership,
    /// Whether the workload's connections come here.
    pub captured: Proof,
    /// Open connections.
    pub connections: Connections,
    /// Shared metrics.
    pub metrics: Arc<Metrics>,
    /// How far the process has come.
    pub stage: Stage,
}

impl Admin {
    /// Why nothing should be sent here; none if something should.
    pub fn not_ready(&self) -> Option<String> {
        if let Some(stage) = self.stage.not_serving() {
            return Some(stage.to_owned());
        }
        if let Some(missing) = self.membership.missing() {
            return Some(missing);
        }
        if let Some(missing) = self.captured.missing() {
            return Some(missing);
        }
        if !self.running.policies().is_ready() {
            return Some("the policies have not come yet".to_owned());
        }
        let snapshot = self.running.published().load();
        let waits = snapshot.services().iter().find(|service| service.cluster.is_pending());
        waits.map(|service| format!("the endpoints of {} are not known yet", service.name))
    }

    fn answer(&self, method: &Method, path: &str, query: &str) -> Response<Full<Bytes>> {
        let is_get = matches!(*method, Method::GET | Method::HEAD);
        if path == "/v1/drain" && *method == Method::POST {
            self.stage.drain();
            return reply(StatusCode::ACCEPTED, &json!({"status": "draining"}));
        }
        if !is_get {
            return reply(StatusCode::METHOD_NOT_ALLOWED, &json!({"error_msg": "GET, or POST /v1/drain"}));
        }
        match path {
            "/status" => reply(StatusCode::OK, &json!({"status": "ok"})),
            "/status/ready" => match self.not_ready() {
                None => reply(StatusCode::OK, &json!({"status": "ok"})),
                Some(why) => {
                    reply(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": "error", "error": why}))
                }
            },
            "/metrics" => {
                let mut response = Response::new(Full::from(self.metrics.render()));
                let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            "/v1/config" => reply(StatusCode::OK, &self.config()),
            "/v1/endpoints" => reply(StatusCode::OK, &self.endpoints()),
            "/v1/connections" => reply(StatusCode::OK, &self.connections.told()),
            "/v1/identity" => reply(StatusCode::OK, &self.membership.told()),
            "/v1/policies" => {
                let status = serde_json::to_value(self.running.policies().status()).unwrap_or_default();
                reply(StatusCode::OK, &status)
            }
            "/v1/policies/explain" => match Question::read(query) {
                Ok(question) => {
                    let answer = self.running.policies().explain(&question);
                    reply(StatusCode::OK, &serde_json::to_value(answer).unwrap_or_default())
                }
                Err(wrong) => reply(StatusCode::BAD_REQUEST, &json!({"error_msg": wrong})),
            },
            _ => reply(
                StatusCode::NOT_FOUND,
                &json!({"error_msg": "there are /status, /status/ready, /metrics, /v1/config, /v1/endpoints, \
                    /v1/connections, /v1/identity, /v1/policies, /v1/policies/explain, and POST /v1/drain"}),
            ),
        }
    }

    /// The file in force. Settings of plugins may hold secrets and are left out.
    fn config(&self) -> Value {
        let mut config = serde_json::to_value(self.running.config()).unwrap_or_default();
        for service in config.get_mut("services").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(Value::Object(plugins)) = service.get_mut("plugins") {
                plugins.values_mut().for_each(|settings| *settings = Value::from("..."));
            }
            if let Some(Value::Object(tls)) = service.pointer_mut("/upstream/tls") {
                tls.remove("client_key");
            }
        }
        let running = &self.running;
        json!({"config": config, "taken_over": running.reloads(), "waits_for_restart": running.waits(),
            "problem": running.problem()})
    }

    fn endpoints(&self) -> Value {
        let snapshot = self.running.published().load();
        let service = |service: &Arc<crate::snapshot::Service>| {
            json!({
                "service": &*service.name,
                "hosts": service.hosts,
                "endpoints": service.cluster.endpoints(),
                "mesh": service.cluster.mesh_peers(),
                "unresolved": service.cluster.unresolved(),
            })
        };
        snapshot.services().iter().map(service).collect()
    }
}

fn reply(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{value}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Binds the interface.
///
/// # Errors
/// The address is taken or not ours.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves it for ever.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors: others have to end first.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let admin = admin.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let uri = request.uri();
                let answer = admin.answer(request.method(), uri.path(), uri.query().unwrap_or_default());
                async { Ok::<_, Infallible>(answer) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "admin connection ended");
            }
            drop(slot);
        });
    }
}
