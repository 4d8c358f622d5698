//! `skywalking`: tells an Apache SkyWalking server of requests as segments, and the upstream by the field `sw8`.
//!
//! Phases: `rewrite`, where the segment begins, and `log`, where it is put together: an entry span for the request and
//! an exit span for each attempt to reach the upstream. Segments go to `/v3/segments`, and with them, once a minute, what
//! this instance is to `/v3/management/reportProperties`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use config::Kind;
use config::error::{ConfigError, joined};
use http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, OnLog, Rewrite};
use layers::vars::hostname;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::batch::{self, Batch, BatchSettings, Failure, Sink};
use crate::support::http_call::url;
use crate::support::log_http::{Call, Post};
use crate::support::trace::{self, AttemptSpan, Clock};

const SW8: HeaderName = HeaderName::from_static("sw8");
/// What SkyWalking calls a gateway made of nginx; its pages know the number.
const NGINX: u32 = 6000;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The share of requests that are told of, where the caller has not decided.
    #[serde(default = "all")]
    #[schemars(range(min = 0.000_01, max = 1.0))]
    sample_ratio: f64,
}

fn all() -> f64 {
    1.0
}

/// `plugin_attr.skywalking`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Attr {
    /// What the gateway is called there.
    #[serde(default = "service_name")]
    service_name: String,
    /// What this process is called there; `$hostname` is the name of the machine.
    #[serde(default = "instance_name")]
    service_instance_name: String,
    /// The URL of the server.
    #[serde(default = "endpoint_addr")]
    endpoint_addr: String,
    /// Seconds between two reports.
    #[serde(default = "three")]
    report_interval: u32,
}

impl Attr {
    fn of(attr: Option<&Value>) -> Result<Self, ConfigError> {
        config::typed::parse(attr.unwrap_or(&json!({}))).map_err(|errors| {
            ConfigError::invalid("", format!("plugin_attr.skywalking: {}", joined(&errors)))
        })
    }

    fn server(&self, path: &str) -> Result<Uri, ConfigError> {
        let server = format!("{}{path}", self.endpoint_addr.trim_end_matches('/'));
        url(&server, "").map_err(|error| {
            ConfigError::invalid("", format!("plugin_attr.skywalking: /endpoint_addr: {}", error.kind))
        })
    }
}

fn service_name() -> String {
    "APISIX".into()
}

fn instance_name() -> String {
    "APISIX Instance Name".into()
}

fn endpoint_addr() -> String {
    "http://127.0.0.1:12800".into()
}

fn three() -> u32 {
    3
}

/// The plugin.
pub struct SkyWalking {
    ratio: f64,
    service: String,
    instance: String,
    /// Held by a global rule: gives way to the same plugin of the route.
    global: bool,
    segments: Arc<Batch<Value>>,
}

const TIMEOUT: Duration = Duration::from_secs(5);

impl Definition for SkyWalking {
    const NAME: &'static str = "skywalking";
    const PRIORITY: i32 = 12010;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let good = (0.000_01..=1.0).contains(&config.sample_ratio);
        let wrong = (!good).then(|| ConfigError::invalid("/sample_ratio", "write a number from 0.00001 to 1"));
        wrong.into_iter().collect()
    }

    fn check_attr(_: &Config, attr: Option<&Value>) -> Vec<ConfigError> {
        Attr::of(attr).and_then(|attr| attr.server("")).err().into_iter().collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let attr = Attr::of(env.attr)?;
        let post = |path| {
            let post = Post::new(vec![attr.server(path)?], Call::within(true, TIMEOUT), env)?;
            Ok::<_, ConfigError>(post.field(header::CONTENT_TYPE, HeaderValue::from_static("application/json")))
        };
        let instance = attr.service_instance_name.replace("$hostname", hostname());
        let server = Server {
            segments: post("/v3/segments")?,
            management: post("/v3/management/reportProperties")?,
            properties: properties(&attr.service_name, &instance).to_string().into(),
            told: Mutex::default(),
        };
        let settings = BatchSettings {
            name: "skywalking".to_owned(),
            size: 100,
            idle: Duration::from_secs(attr.report_interval.max(1).into()),
            age: Duration::from_secs(attr.report_interval.max(1).into()),
            retries: 2,
            pause: Duration::from_secs(1),
            pending: None,
            timeout: TIMEOUT * 2 + Duration::from_secs(1),
            at_once: 1,
        };
        let segments = batch::shared(env, Self::NAME, &attr, settings, server)?;
        let plugin = Arc::new(Self {
            ratio: config.sample_ratio,
            service: attr.service_name,
            instance,
            global: env.owner.kind == Kind::GlobalRule,
            segments,
        });
        hooks.rewrite(&plugin);
        hooks.log(&plugin);
        Ok(())
    }
}

/// What a caller says by `sw8`.
struct Caller {
    sampled: bool,
    trace_id: String,
    segment_id: String,
    span_id: i64,
    service: String,
    instance: String,
    endpoint: String,
    address: String,
}

/// The field as version 3 of the protocol has it: eight parts, all but the first and the fourth in base64.
fn caller(headers: &HeaderMap) -> Option<Caller> {
    let field = headers.get(SW8)?.to_str().ok().filter(|field| field.len() <= 2048)?;
    let mut parts = field.split('-');
    let sampled = match parts.next()? {
        "0" => false,
        "1" => true,
        _ => return None,
    };
    let text = |part: Option<&str>| String::from_utf8(STANDARD.decode(part?).ok()?).ok();
    let caller = Caller {
        sampled,
        trace_id: text(parts.next())?,
        segment_id: text(parts.next())?,
        span_id: parts.next()?.parse().ok()?,
        service: text(parts.next())?,
        instance: text(parts.next())?,
        endpoint: text(parts.next())?,
        address: text(parts.next())?,
    };
    parts.next().is_none().then_some(caller)
}

/// What `rewrite` leaves for `log`.
struct Begun {
    trace_id: String,
    segment_id: String,
    caller: Option<Caller>,
}

impl Rewrite for SkyWalking {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        if self.global && x.route_runs(Self::NAME) {
            return Flow::Next;
        }
        let caller = caller(&x.request.headers);
        x.request.headers.remove(SW8);
        let sampled = caller.as_ref().map_or_else(|| trace::chance(self.ratio), |caller| caller.sampled);
        if !sampled {
            return Flow::Next;
        }
        let trace_id = caller.as_ref().map_or_else(|| Uuid::new_v4().to_string(), |caller| caller.trace_id.clone());
        let segment_id = Uuid::new_v4().to_string();
        let endpoint = endpoint_name(x);
        // Which node gets it is not settled yet; the host is what a client would call.
        let address = x.forward.host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or(&x.host).to_owned();
        let parts = [&trace_id, &segment_id].map(|part| STANDARD.encode(part));
        let place = [&self.service, &self.instance, &endpoint, &address].map(|part| STANDARD.encode(part));
        let field = format!("1-{}-{EXIT}-{}", parts.join("-"), place.join("-"));
        if let Ok(value) = HeaderValue::try_from(field) {
            x.request.headers.insert(SW8, value);
        }
        x.put_slot(Begun { trace_id, segment_id, caller });
        Flow::Next
    }
}

fn endpoint_name(x: &State) -> String {
    x.path().to_owned()
}

/// The number of the entry span, and of the first exit span: the caller is told before there is one.
const ENTRY: usize = 0;
const EXIT: usize = 1;

impl OnLog for SkyWalking {
    fn log(&self, x: &Exchange) {
        if self.global && x.route_runs(Self::NAME) {
            return;
        }
        let Some(begun) = x.slot::<Begun>() else { return };
        let segment = self.segment(x, begun, &Clock::now());
        let bytes = 2048 + 512 * x.attempts.len() + 2 * x.request_uri().len();
        self.segments.push(segment, bytes);
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl SkyWalking {
    fn segment(&self, x: &State, begun: &Begun, clock: &Clock) -> Value {
        let refs: Vec<Value> = begun
            .caller
            .iter()
            .map(|caller| {
                json!({
                    "refType": "CrossProcess",
                    "traceId": caller.trace_id,
                    "parentTraceSegmentId": caller.segment_id,
                    "parentSpanId": caller.span_id,
                    "parentService": caller.service,
                    "parentServiceInstance": caller.instance,
                    "parentEndpoint": caller.endpoint,
                    "networkAddressUsedAtPeer": caller.address,
                })
            })
            .collect();
        let url = format!("{}://{}{}", x.conn.scheme(), x.host, x.request_uri());
        let mut spans = vec![json!({
            "operationName": endpoint_name(x),
            "startTime": millis(clock.at(x.started)),
            "endTime": millis(clock.wall()),
            "spanType": "Entry",
            "spanId": ENTRY,
            "parentSpanId": -1,
            "isError": x.status() >= 500,
            "spanLayer": "Http",
            "componentId": NGINX,
            "peer": "",
            "skipAnalysis": false,
            "refs": refs,
            "tags": [
                {"key": "http.method", "value": x.request.method.as_str()},
                {"key": "http.params", "value": url},
                {"key": "http.status", "value": x.status().to_string()},
            ],
        })];
        let exits = trace::attempts(x, clock).enumerate();
        spans.extend(exits.map(|(number, attempt)| exit_span(&endpoint_name(x), EXIT + number, &attempt)));
        json!({
            "traceId": begun.trace_id,
            "traceSegmentId": begun.segment_id,
            "service": self.service,
            "serviceInstance": self.instance,
            "isSizeLimited": false,
            "spans": spans,
        })
    }
}

fn exit_span(name: &str, number: usize, attempt: &AttemptSpan) -> Value {
    let mut tags = Vec::new();
    if let Some(status) = attempt.status {
        tags.push(json!({"key": "http.status", "value": status.to_string()}));
    }
    if let Some(reason) = attempt.failed {
        tags.push(json!({"key": "error.kind", "value": reason}));
    }
    json!({
        "operationName": name,
        "startTime": millis(attempt.start),
        "endTime": millis(attempt.end),
        "spanType": "Exit",
        "spanId": number,
        "parentSpanId": ENTRY,
        "isError": attempt.failed.is_some() || attempt.status.is_some_and(|status| status >= 500),
        "spanLayer": "Http",
        "componentId": NGINX,
        "peer": attempt.address.to_string(),
        "skipAnalysis": false,
        "refs": [],
        "tags": tags,
    })
}

/// What is told of this instance.
fn properties(service: &str, instance: &str) -> Value {
    let property = |key: &str, value: &str| json!({"key": key, "value": value});
    json!({
        "service": service,
        "serviceInstance": instance,
        "properties": [
            property("language", "rust"),
            property("host", hostname()),
            property("OS Name", std::env::consts::OS),
            property("Process No.", &std::process::id().to_string()),
        ],
    })
}

/// How often what this instance is, is told anew: SkyWalking forgets it.
const TELL: Duration = Duration::from_secs(60);

struct Server {
    segments: Post,
    management: Post,
    properties: Bytes,
    /// When this instance was told of.
    told: Mutex<Option<Instant>>,
}

impl Server {
    /// Tells what this instance is, if it is time. Segments do not depend on it.
    async fn tell(&self) {
        let is_due = |told: &Option<Instant>| told.is_none_or(|told| told.elapsed() >= TELL);
        if !is_due(&self.told.lock().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        match self.management.deliver(self.properties.clone(), 300).await {
            Ok(()) => *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now()),
            Err(failure) => tracing::debug!(?failure, "SkyWalking was not told of this instance"),
        }
    }
}

impl Sink for Server {
    type Entry = Value;

    async fn send(&self, batch: &[Value]) -> Result<(), Failure> {
        let body = serde_json::to_vec(batch).map_err(|error| Failure::permanent(error.to_string()))?;
        self.tell().await;
        self.segments.deliver(body, 300).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_of_a_caller_is_read_or_is_none() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(SW8, HeaderValue::from_str(text).unwrap());
            caller(&headers)
        };
        let part = |text: &str| STANDARD.encode(text);
        let ids = format!("{}-{}-3", part("trace"), part("segment"));
        let place = [part("shop"), part("one"), part("/cart"), part("10.0.0.1:80")].join("-");
        let found = read(&format!("1-{ids}-{place}")).unwrap();
        assert!(found.sampled);
        assert_eq!((found.trace_id.as_str(), found.segment_id.as_str(), found.span_id), ("trace", "segment", 3));
        assert_eq!((found.endpoint.as_str(), found.address.as_str()), ("/cart", "10.0.0.1:80"));
        assert!(!read(&format!("0-{ids}-{place}")).unwrap().sampled);
        for wrong in ["", "1", "2-a-b-0-c-d-e-f", &format!("1-{ids}"), &format!("1-{ids}-{place}-more"), "1-!-!-x-!-!-!-!"] {
            assert!(read(wrong).is_none(), "{wrong}");
        }
    }
}
