//! `zipkin`: tells a Zipkin server, or what speaks like one, of requests as spans.
//!
//! Phases: `rewrite`, where the span begins and the upstream is told of it by the fields of B3, and `log`, where it is
//! put together: `apisix.request`, and `apisix.proxy` for each attempt to reach the upstream.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use config::error::ConfigError;
use http::{HeaderValue, StatusCode, Uri, header};
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, OnLog, Rewrite};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::support::batch::{self, Batch, BatchSettings, Failure, Sink};
use crate::support::http_call::url;
use crate::support::log_http::{Call, Post};
use crate::support::trace::{self, AttemptSpan, Clock, Trace};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The URL that spans are posted to: `http://zipkin:9411/api/v2/spans`.
    endpoint: String,
    /// The share of requests that are told of, where the caller has not decided.
    #[schemars(range(min = 0.000_01, max = 1.0))]
    sample_ratio: f64,
    /// What the gateway is called there.
    #[serde(default = "service_name")]
    service_name: String,
    /// The gateway's IPv4 address as it is told; that of the connection without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    server_addr: Option<Ipv4Addr>,
    /// The form of spans. Both are the same here.
    #[serde(default = "second")]
    #[schemars(range(min = 1, max = 2))]
    span_version: u8,
}

fn service_name() -> String {
    "APISIX".into()
}

fn second() -> u8 {
    2
}

/// The plugin.
pub struct Zipkin {
    ratio: f64,
    service: String,
    server: Option<Ipv4Addr>,
    spans: Arc<Batch<Value>>,
}

const TIMEOUT: Duration = Duration::from_secs(5);

impl Definition for Zipkin {
    const NAME: &'static str = "zipkin";
    const PRIORITY: i32 = 12011;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors: Vec<_> = url(&config.endpoint, "/endpoint").err().into_iter().collect();
        if !(0.000_01..=1.0).contains(&config.sample_ratio) {
            errors.push(ConfigError::invalid("/sample_ratio", "write a number from 0.00001 to 1"));
        }
        if !(1..=2).contains(&config.span_version) {
            errors.push(ConfigError::invalid("/span_version", "write 1 or 2"));
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let sink = Server::new(url(&config.endpoint, "/endpoint")?, env)?;
        let settings = BatchSettings {
            name: "zipkin".to_owned(),
            size: 100,
            idle: Duration::from_secs(1),
            age: Duration::from_secs(5),
            retries: 2,
            pause: Duration::from_secs(1),
            pending: None,
            timeout: TIMEOUT + Duration::from_secs(1),
            at_once: 1,
        };
        let spans = batch::shared(env, Self::NAME, &config.endpoint, settings, sink)?;
        let plugin = Arc::new(Self {
            ratio: config.sample_ratio,
            service: config.service_name,
            server: config.server_addr,
            spans,
        });
        hooks.rewrite(&plugin);
        hooks.log(&plugin);
        Ok(())
    }
}

/// What `rewrite` leaves for `log`.
struct Begun(Trace);

impl Rewrite for Zipkin {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        let Ok(caller) = trace::b3(&x.request.headers) else {
            tracing::debug!("the field b3 of a request is not well-formed");
            return Flow::status(StatusCode::BAD_REQUEST);
        };
        if !caller.sampled.unwrap_or_else(|| trace::chance(self.ratio)) {
            Trace::inject_unsampled_b3(&mut x.request.headers);
            return Flow::Next;
        }
        let begun = Trace::new(caller.context.as_ref(), true);
        begun.inject_b3(&mut x.request.headers);
        x.put_slot(Begun(begun));
        Flow::Next
    }
}

impl OnLog for Zipkin {
    fn log(&self, x: &Exchange) {
        let Some(Begun(begun)) = x.slot::<Begun>() else { return };
        let clock = Clock::now();
        let local = self.local(x);
        for attempt in trace::attempts(x, &clock) {
            self.push(proxy_span(begun, &attempt, &local));
        }
        self.push(request_span(x, begun, &clock, &local));
    }
}

impl Zipkin {
    fn push(&self, span: Value) {
        // About what it takes in memory: numbers and short texts in a small tree.
        let bytes = 1024 + span.pointer("/tags/http.url").and_then(Value::as_str).map_or(0, str::len);
        self.spans.push(span, bytes);
    }

    fn local(&self, x: &State) -> Value {
        let address = self.server.map_or_else(|| x.conn.local.ip().to_canonical(), IpAddr::V4);
        endpoint(Some(&self.service), SocketAddr::new(address, x.conn.local.port()))
    }
}

/// An object that is put together member by member.
#[derive(Default)]
struct Object(Map<String, Value>);

impl Object {
    fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.insert(name.to_owned(), value.into());
        self
    }

    fn with_some(self, name: &str, value: Option<impl Into<Value>>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }
}

impl From<Object> for Value {
    fn from(object: Object) -> Self {
        Self::Object(object.0)
    }
}

fn endpoint(service: Option<&str>, address: SocketAddr) -> Value {
    Object::default()
        .with_some("serviceName", service)
        .with(if address.is_ipv4() { "ipv4" } else { "ipv6" }, address.ip().to_string())
        .with("port", address.port())
        .into()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn span(trace: &Trace, id: u64, parent: Option<u64>, start: Duration, end: Duration) -> Object {
    Object::default()
        .with("traceId", format!("{:032x}", trace.trace_id))
        .with("id", format!("{id:016x}"))
        .with_some("parentId", parent.map(|parent| format!("{parent:016x}")))
        .with("timestamp", micros(start))
        // The format has no spans without a length.
        .with("duration", micros(end.saturating_sub(start)).max(1))
}

fn request_span(x: &State, begun: &Trace, clock: &Clock, local: &Value) -> Value {
    let failed = (x.status() >= 500).then(|| x.reason().map_or("true", |reason| reason.code()));
    let tags = Object::default()
        .with("component", "apisix")
        .with("http.method", x.request.method.as_str())
        .with("http.url", x.request_uri())
        .with("http.status_code", x.status().to_string())
        .with_some("error", failed);
    span(begun, begun.span_id, begun.parent, clock.at(x.started), clock.wall())
        .with("name", "apisix.request")
        .with("kind", "SERVER")
        .with("localEndpoint", local.clone())
        .with("remoteEndpoint", endpoint(None, SocketAddr::new(x.remote_addr, x.conn.peer.port())))
        .with("tags", tags)
        .into()
}

fn proxy_span(begun: &Trace, attempt: &AttemptSpan, local: &Value) -> Value {
    let tags = Object::default()
        .with("component", "apisix")
        .with_some("http.status_code", attempt.status.map(|status| status.to_string()))
        .with_some("error", attempt.failed);
    span(begun, trace::new_span_id(), Some(begun.span_id), attempt.start, attempt.end)
        .with("name", "apisix.proxy")
        .with("kind", "CLIENT")
        .with("localEndpoint", local.clone())
        .with("remoteEndpoint", endpoint(None, attempt.address))
        .with("tags", tags)
        .into()
}

struct Server {
    post: Post,
}

impl Server {
    fn new(server: Uri, env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        let post = Post::new(vec![server], Call::within(true, TIMEOUT), env)?
            .field(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(Self { post })
    }
}

impl Sink for Server {
    type Entry = Value;

    async fn send(&self, batch: &[Value]) -> Result<(), Failure> {
        let body = serde_json::to_vec(batch).map_err(|error| Failure::permanent(error.to_string()))?;
        self.post.deliver(body, 300).await
    }
}
