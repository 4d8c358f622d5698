//! What the authority is doing, by HTTP: `/status` for people and programs, `/metrics` for Prometheus, `/readyz`.

use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use certs::ca::audit::Audit;
use certs::ca::channel::Pin;
use certs::ca::keeper::Keeper;
use certs::ca::service::{Numbers, Service};
use certs::ca::{Current, RootState};
use certs::trust::{Fingerprint, Root};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

const CONNECTIONS: usize = 64;
const HEAD: Duration = Duration::from_secs(10);
/// A connection that has said nothing more is closed.
const LIFE: Duration = Duration::from_secs(60);

/// What is told.
#[derive(Clone)]
pub(super) struct Told {
    pub(super) service: Service,
    pub(super) keeper: Arc<Keeper>,
    pub(super) audit: Arc<Audit>,
    pub(super) pin: Pin,
}

/// Serves until it is dropped.
pub(super) async fn serve(listener: TcpListener, told: Told) {
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
                async move { Ok::<_, Infallible>(told.answer(&request)) }
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

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn word(state: RootState) -> &'static str {
    match state {
        RootState::Staged => "staged",
        RootState::Active => "active",
        RootState::Retiring => "retiring",
    }
}

impl Told {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, kind, body) = match (request.method(), request.uri().path()) {
            (&Method::GET, "/status") => {
                let text = serde_json::to_string_pretty(&self.status()).unwrap_or_default() + "\n";
                (StatusCode::OK, "application/json", text)
            }
            (&Method::GET, "/metrics") => (StatusCode::OK, "text/plain; version=0.0.4", self.metrics()),
            (&Method::GET, "/healthz") => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
            (&Method::GET, "/readyz") => match self.ready() {
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

    fn ready(&self) -> Result<(), &'static str> {
        let current = self.service.current();
        match &current.issuer {
            None => Err("there is no issuer that can sign"),
            Some(issuer) if issuer.ends() <= SystemTime::now() => Err("the issuer has expired"),
            Some(_) => Ok(()),
        }
    }

    fn roots(current: &Current) -> Vec<(Fingerprint, &'static str, u64)> {
        let roots = current.bundle().roots.iter();
        roots
            .filter_map(|root| {
                let read = Root::read(root.certificate.clone()).ok()?;
                Some((read.fingerprint, word(root.state), seconds(read.not_after)))
            })
            .collect()
    }

    fn status(&self) -> Value {
        let current = self.service.current();
        let Numbers { signed, waiting, watchers, clock_offset_ms, .. } = self.service.numbers();
        let roots = Self::roots(&current);
        let roots = roots.iter().map(|(fingerprint, state, not_after)| {
            json!({"fingerprint": fingerprint.to_string(), "state": state, "not_after": not_after})
        });
        let head = self.audit.head();
        json!({
            "ready": self.ready().is_ok(),
            "trust_domain": current.bundle().trust_domain.to_string(),
            "pin": self.pin.to_string(),
            "bundle_generation": current.bundle().generation,
            "roots": roots.collect::<Vec<_>>(),
            "issuer": current.issuer.as_ref().map(|issuer| json!({
                "id": issuer.id().to_string(),
                "not_after": seconds(issuer.ends()),
            })),
            "longest_ttl": current.lifetimes.longest.as_secs(),
            "signed": signed,
            "waiting": waiting,
            "workloads": watchers,
            "clock_offset_ms": clock_offset_ms,
            "audit": {"lines": head.lines, "head": head.hash},
        })
    }

    fn metrics(&self) -> String {
        let numbers = self.service.numbers();
        let mut out = String::new();
        let mut say = |name: &str, kind: &str, help: &str, values: Vec<(String, f64)>| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in values {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        #[expect(clippy::cast_precision_loss, reason = "numbers of Prometheus are floats")]
        let float = |number: u64| number as f64;
        let count = |number: usize| float(u64::try_from(number).unwrap_or(u64::MAX));
        let calls = numbers.calls.iter().map(|((call, attestor, code), number)| {
            (format!("{{rpc=\"{call}\",attestor=\"{attestor}\",code=\"{code}\"}}"), float(*number))
        });
        say("mesh_ca_requests_total", "counter", "Calls by proof and gRPC code.", calls.collect());
        let none = String::new;
        say("mesh_ca_signed_total", "counter", "Certificates.", vec![(none(), float(numbers.signed))]);
        let signing = vec![(none(), numbers.signing.as_secs_f64())];
        say("mesh_ca_signing_seconds_total", "counter", "Time that signatures took.", signing);
        say(
            "mesh_ca_queue",
            "gauge",
            "Requests that wait for a signature.",
            vec![(none(), count(numbers.waiting))],
        );
        say("mesh_ca_workloads", "gauge", "Open streams of trust.", vec![(none(), count(numbers.watchers))]);
        #[expect(clippy::cast_precision_loss, reason = "numbers of Prometheus are floats")]
        let offset = numbers.clock_offset_ms as f64 / 1000.0;
        say(
            "mesh_ca_clock_offset_seconds",
            "gauge",
            "The workloads' clocks against this one, median.",
            vec![(none(), offset)],
        );
        say(
            "mesh_ca_audit_lines_total",
            "counter",
            "Lines of the audit log.",
            vec![(none(), float(self.audit.head().lines))],
        );
        let mut last = "";
        for sample in self.keeper.metrics() {
            if sample.name != last {
                let kind = if sample.name.ends_with("_total") { "counter" } else { "gauge" };
                let _ = writeln!(out, "# HELP {0} {1}\n# TYPE {0} {kind}", sample.name, sample.help);
                last = sample.name;
            }
            let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let labels = sample.labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
            let labels = labels.collect::<Vec<_>>().join(",");
            let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
            let _ = writeln!(out, "{}{labels} {}", sample.name, sample.value);
        }
        out
    }
}
