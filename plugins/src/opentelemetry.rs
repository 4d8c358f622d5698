//! `opentelemetry`: tells a collector of requests as spans, by OTLP over HTTP or gRPC.
//!
//! Phases: `rewrite`, where the span begins and the upstream is told of it, and `log`, where it is put together: one
//! span for the request and one for each attempt to reach the upstream. Spans are gathered and sent by the control side.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use config::error::{ConfigError, joined};
use config::var::{Var, Vars};
use http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Extras, Flow, Hooks, OnLog, Rewrite};
use layers::vars::{OwnVars, hostname};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};
use prost::Message;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use crate::support::batch::{self, Batch, BatchSettings, Failure, Sink};
use crate::support::http_call::url;
use crate::support::log_http::{Call, Post};
use crate::support::trace::{self, AttemptSpan, Clock, SpanContext, Trace};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Which requests are told of.
    #[serde(default)]
    sampler: Sampler,
    /// Variables whose values the request's span has as attributes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(inner(length(min = 1)))]
    additional_attributes: Option<Vec<String>>,
    /// Header fields of the request that its span has as attributes; a name that ends in `*` stands for all that begin
    /// like it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(inner(length(min = 1)))]
    additional_header_prefix_attributes: Option<Vec<String>>,
}

/// Which requests are told of.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sampler {
    /// How it is decided.
    #[serde(default)]
    name: SamplerName,
    /// What the decision depends on.
    #[serde(default)]
    options: SamplerOptions,
}

/// How it is decided which requests are told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SamplerName {
    /// All.
    AlwaysOn,
    /// None.
    #[default]
    AlwaysOff,
    /// A share of them, the same in every service of a trace.
    TraceIdRatio,
    /// As the caller decided; where there is none, as `root` says.
    ParentBase,
}

/// What a sampler's decision depends on.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplerOptions {
    /// The share of `trace_id_ratio`.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    fraction: f64,
    /// Decides for `parent_base` where there is no caller.
    #[serde(default)]
    root: RootSampler,
}

/// Decides where there is no caller.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RootSampler {
    /// How.
    #[serde(default)]
    name: RootName,
    /// What the decision depends on.
    #[serde(default)]
    options: RootOptions,
}

/// How it is decided where there is no caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RootName {
    /// All.
    AlwaysOn,
    /// None.
    #[default]
    AlwaysOff,
    /// A share of them.
    TraceIdRatio,
}

/// What the decision depends on where there is no caller.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RootOptions {
    /// The share of `trace_id_ratio`.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    fraction: f64,
}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// Where the id of a new trace comes from.
    #[serde(default)]
    trace_id_source: TraceIdSource,
    /// Attributes of the resource that all spans belong to. `service.name` is `APISIX` without it.
    #[serde(default)]
    resource: BTreeMap<String, Attribute>,
    /// Where spans are sent.
    #[serde(default)]
    collector: Collector,
    /// How spans are gathered.
    #[serde(default)]
    batch_span_processor: Processor,
    /// Set the variables `opentelemetry_context_traceparent`, `opentelemetry_trace_id` and `opentelemetry_span_id`.
    #[serde(default)]
    set_ngx_var: bool,
}

/// Where the id of a new trace comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TraceIdSource {
    /// `X-Request-Id`, where it has 32 hexadecimal digits, dashes aside.
    XRequestId,
    /// Chance.
    #[default]
    Random,
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Attribute {
    /// A truth.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
}

/// Where spans are sent.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Collector {
    /// `host:port`, or a URL.
    #[serde(default = "address")]
    address: String,
    /// Seconds that a call may take.
    #[serde(default = "three")]
    #[schemars(range(min = 1))]
    request_timeout: u32,
    /// Header fields of every call.
    #[serde(default)]
    request_headers: BTreeMap<String, Attribute>,
    /// Extension: how the collector is spoken to.
    #[serde(default)]
    protocol: Protocol,
}

/// How the collector is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Protocol buffers in HTTP requests, to `/v1/traces`. Collectors listen at port 4318.
    #[default]
    Http,
    /// gRPC. Collectors listen at port 4317.
    Grpc,
}

impl Default for Collector {
    fn default() -> Self {
        Self {
            address: address(),
            request_timeout: three(),
            request_headers: BTreeMap::new(),
            protocol: Protocol::default(),
        }
    }
}

fn address() -> String {
    "127.0.0.1:4318".into()
}

fn three() -> u32 {
    3
}

/// How spans are gathered.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    /// Taken for compatibility: what does not fit is dropped and counted in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drop_on_queue_full: Option<bool>,
    /// Spans that may wait; 2048 without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    max_queue_size: Option<usize>,
    /// Seconds after which spans are sent though they are few; 5 without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 3600.0))]
    batch_timeout: Option<f64>,
    /// Seconds without a new span after which spans are sent; 2 without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 3600.0))]
    inactive_timeout: Option<f64>,
    /// Spans that are sent together; 256 without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    max_export_batch_size: Option<usize>,
}

impl Metadata {
    /// `plugin_metadata`, or what older configurations have in `plugin_attr`.
    fn of(env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        let Some(written) = env.metadata.or(env.attr) else { return Ok(Self::default()) };
        config::typed::parse::<Self>(written).map_err(|errors| {
            ConfigError::invalid("", format!("plugin_metadata/opentelemetry: {}", joined(&errors)))
        })
    }

    fn batch_settings(&self) -> BatchSettings {
        let processor = &self.batch_span_processor;
        let seconds = |given: Option<f64>, default: f64| {
            Duration::try_from_secs_f64(given.unwrap_or(default)).unwrap_or_default()
        };
        BatchSettings {
            name: "opentelemetry".to_owned(),
            size: processor.max_export_batch_size.unwrap_or(256),
            idle: seconds(processor.inactive_timeout, 2.0),
            age: seconds(processor.batch_timeout, 5.0),
            retries: 3,
            pause: Duration::from_secs(1),
            pending: Some(processor.max_queue_size.unwrap_or(2048)),
            timeout: self.timeout() + Duration::from_secs(1),
            at_once: 1,
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.collector.request_timeout.max(1).into())
    }

    /// What all spans belong to.
    fn resource(&self) -> Resource {
        let mut attributes = vec![text("hostname", hostname().to_owned())];
        if !self.resource.contains_key("service.name") {
            attributes.push(text("service.name", "APISIX".to_owned()));
        }
        attributes.extend(self.resource.iter().map(|(key, value)| {
            let value = match value {
                Attribute::Bool(truth) => Any::BoolValue(*truth),
                Attribute::Number(number) => Any::DoubleValue(*number),
                Attribute::Text(text) => Any::StringValue(text.clone()),
            };
            attribute(key, value)
        }));
        Resource { attributes, ..Resource::default() }
    }
}

fn attribute(key: &str, value: Any) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn text(key: &str, value: String) -> KeyValue {
    attribute(key, Any::StringValue(value))
}

fn number(key: &str, value: i64) -> KeyValue {
    attribute(key, Any::IntValue(value))
}

/// The plugin.
pub struct OpenTelemetry {
    sampler: Sampler,
    trace_id_source: TraceIdSource,
    set_vars: bool,
    attributes: Vec<(String, Var)>,
    headers: Vec<HeaderPattern>,
    spans: Arc<Batch<Span>>,
}

/// Names of header fields.
enum HeaderPattern {
    One(HeaderName),
    Prefix(String),
}

impl Definition for OpenTelemetry {
    const NAME: &'static str = "opentelemetry";
    const PRIORITY: i32 = 12009;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.checked_metadata::<Metadata>(|metadata| {
            let address = collector_url(&metadata.collector.address, "").err();
            address.into_iter().chain(request_headers(&metadata.collector).err()).collect()
        });
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let fractions = [
            ("/sampler/options/fraction", config.sampler.options.fraction),
            ("/sampler/options/root/options/fraction", config.sampler.options.root.options.fraction),
        ];
        let wrong = fractions.into_iter().filter(|(_, fraction)| !(0.0..=1.0).contains(fraction));
        let wrong = wrong.map(|(pointer, _)| ConfigError::invalid(pointer, "write a number from 0 to 1"));
        wrong.chain(header_patterns(config).filter_map(Result::err)).collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env)?;
        let headers = header_patterns(&config).collect::<Result<_, _>>()?;
        let spans = match metadata.collector.protocol {
            Protocol::Http => {
                let sink = HttpCollector::new(&metadata, env)?;
                batch::shared(env, Self::NAME, &metadata, metadata.batch_settings(), sink)?
            }
            Protocol::Grpc => {
                let sink = GrpcCollector::new(&metadata, env)?;
                batch::shared(env, Self::NAME, &metadata, metadata.batch_settings(), sink)?
            }
        };
        let plugin = Arc::new(Self {
            sampler: config.sampler,
            trace_id_source: metadata.trace_id_source,
            set_vars: metadata.set_ngx_var,
            attributes: config
                .additional_attributes
                .into_iter()
                .flatten()
                .map(|name| (name.clone(), Var::parse(&name)))
                .collect(),
            headers,
            spans,
        });
        hooks.rewrite(&plugin);
        hooks.log(&plugin);
        Ok(())
    }
}

fn header_patterns(config: &Config) -> impl Iterator<Item = Result<HeaderPattern, ConfigError>> {
    let patterns = config.additional_header_prefix_attributes.iter().flatten().enumerate();
    patterns.map(|(index, pattern)| header_pattern(pattern, index))
}

fn header_pattern(pattern: &str, index: usize) -> Result<HeaderPattern, ConfigError> {
    let wrong = |_| {
        let pointer = format!("/additional_header_prefix_attributes/{index}");
        ConfigError::invalid(pointer, format!("`{pattern}` is not the name of a header field"))
    };
    match pattern.strip_suffix('*') {
        Some(prefix) if !prefix.is_empty() => Ok(HeaderPattern::Prefix(prefix.to_ascii_lowercase())),
        _ => HeaderName::from_bytes(pattern.as_bytes()).map(HeaderPattern::One).map_err(wrong),
    }
}

/// What `rewrite` leaves for `log`.
struct Begun(Trace);

impl Rewrite for OpenTelemetry {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        let headers = &x.request.headers;
        let b3 = trace::b3(headers).unwrap_or_default();
        let by_w3c = trace::w3c(headers);
        let parent = by_w3c.or(b3.context);
        let mut begun = Trace::new(parent.as_ref(), false);
        if parent.is_none()
            && self.trace_id_source == TraceIdSource::XRequestId
            && let Some(id) = request_id(headers)
        {
            begun.trace_id = id;
        }
        begun.sampled = self.sampler.takes(begun.trace_id, parent.as_ref());
        begun.inject_w3c(&mut x.request.headers);
        // A caller that speaks B3 has an upstream that may know nothing else.
        if by_w3c.is_none() && b3.context.is_some() {
            begun.inject_b3(&mut x.request.headers);
        }
        if self.set_vars
            && let Some(vars) = x.slot_mut::<OwnVars>()
        {
            vars.0.push(("opentelemetry_context_traceparent", begun.traceparent()));
            vars.0.push(("opentelemetry_trace_id", format!("{:032x}", begun.trace_id)));
            vars.0.push(("opentelemetry_span_id", format!("{:016x}", begun.span_id)));
        }
        x.put_slot(Begun(begun));
        Flow::Next
    }
}

/// The id of a request as that of a trace.
fn request_id(headers: &HeaderMap) -> Option<u128> {
    let digits: String =
        headers.get("x-request-id")?.to_str().ok()?.chars().filter(|c| *c != '-').take(33).collect();
    let hex = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    hex.then(|| u128::from_str_radix(&digits, 16).ok())?.filter(|id| *id != 0)
}

impl Sampler {
    fn takes(&self, trace_id: u128, parent: Option<&SpanContext>) -> bool {
        match self.name {
            SamplerName::AlwaysOn => true,
            SamplerName::AlwaysOff => false,
            SamplerName::TraceIdRatio => in_share(trace_id, self.options.fraction),
            SamplerName::ParentBase => parent.and_then(|parent| parent.sampled).unwrap_or_else(|| {
                let root = &self.options.root;
                match root.name {
                    RootName::AlwaysOn => true,
                    RootName::AlwaysOff => false,
                    RootName::TraceIdRatio => in_share(trace_id, root.options.fraction),
                }
            }),
        }
    }
}

/// Whether the lower half of a trace's id, which is random, is in the share. Every service decides the same.
fn in_share(trace_id: u128, fraction: f64) -> bool {
    let low = (trace_id as u64) >> 1;
    fraction >= 1.0 || (low as f64) < fraction * (1u64 << 63) as f64
}

impl OnLog for OpenTelemetry {
    fn log(&self, x: &Exchange) {
        let Some(Begun(begun)) = x.slot::<Begun>().filter(|begun| begun.0.sampled) else { return };
        let clock = Clock::now();
        for attempt in trace::attempts(x, &clock) {
            let span = attempt_span(begun, &attempt);
            let bytes = span.encoded_len();
            self.spans.push(span, bytes);
        }
        let span = self.request_span(x, begun, &clock);
        let bytes = span.encoded_len();
        self.spans.push(span, bytes);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn attempt_span(begun: &Trace, attempt: &AttemptSpan) -> Span {
    let mut attributes = vec![
        text("server.address", attempt.address.ip().to_string()),
        number("server.port", attempt.address.port().into()),
    ];
    attributes.extend(attempt.status.map(|status| number("http.response.status_code", status.into())));
    attributes.extend(attempt.failed.map(|reason| text("error.type", reason.to_owned())));
    Span {
        trace_id: begun.trace_id.to_be_bytes().into(),
        span_id: trace::new_span_id().to_be_bytes().into(),
        parent_span_id: begun.span_id.to_be_bytes().into(),
        name: "upstream".to_owned(),
        kind: SpanKind::Client.into(),
        start_time_unix_nano: nanos(attempt.start),
        end_time_unix_nano: nanos(attempt.end),
        attributes,
        status: attempt.failed.map(failed),
        ..Span::default()
    }
}

fn failed(reason: &str) -> Status {
    Status { code: SpanStatus::Error.into(), message: reason.to_owned() }
}

impl OpenTelemetry {
    fn request_span(&self, x: &State, begun: &Trace, clock: &Clock) -> Span {
        let method = x.request.method.as_str();
        let mut attributes = vec![
            text("net.host.name", x.host.to_string()),
            text("http.method", method.to_owned()),
            text("http.scheme", x.conn.scheme().to_owned()),
            text("http.target", x.request_uri().to_owned()),
        ];
        if let Some(agent) = x.request.headers.get(header::USER_AGENT) {
            attributes.push(text("http.user_agent", String::from_utf8_lossy(agent.as_bytes()).into_owned()));
        }
        if let Some(target) = &x.target {
            let own = [
                ("apisix.route_id", Some(&target.route_id)),
                ("apisix.route_name", target.route_name.as_ref()),
                ("http.route", x.matched_uri.as_ref()),
                ("apisix.service_id", target.service_id.as_ref()),
                ("apisix.service_name", target.service_name.as_ref()),
            ];
            attributes.extend(own.into_iter().filter_map(|(key, value)| Some(text(key, value?.to_string()))));
        }
        for (name, var) in &self.attributes {
            attributes.extend(x.get(var).map(|value| text(name, value.into_owned())));
        }
        for pattern in &self.headers {
            let fields = x.request.headers.iter().filter(|(name, _)| match pattern {
                HeaderPattern::One(one) => *name == one,
                HeaderPattern::Prefix(prefix) => name.as_str().starts_with(prefix.as_str()),
            });
            attributes.extend(fields.map(|(name, value)| {
                text(name.as_str(), String::from_utf8_lossy(value.as_bytes()).into_owned())
            }));
        }
        let status = x.status();
        attributes.push(number("http.status_code", status.into()));
        attributes.push(number("http.response.status_code", status.into()));
        Span {
            trace_id: begun.trace_id.to_be_bytes().into(),
            span_id: begun.span_id.to_be_bytes().into(),
            parent_span_id: begun.parent.map_or_else(Vec::new, |parent| parent.to_be_bytes().into()),
            name: match &x.matched_uri {
                Some(pattern) => format!("{method} {pattern}"),
                None => method.to_owned(),
            },
            kind: SpanKind::Server.into(),
            start_time_unix_nano: nanos(clock.at(x.started)),
            end_time_unix_nano: nanos(clock.wall()),
            attributes,
            status: (status >= 500).then(|| failed(x.reason().map_or("", |reason| reason.code()))),
            ..Span::default()
        }
    }
}

fn export(resource: &Resource, batch: &[Span]) -> ExportTraceServiceRequest {
    let scope = InstrumentationScope {
        name: "postern".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource.clone()),
            scope_spans: vec![ScopeSpans {
                scope: Some(scope),
                spans: batch.to_vec(),
                ..ScopeSpans::default()
            }],
            ..ResourceSpans::default()
        }],
    }
}

/// The collector's URL, by its address: `host:port` is plain text.
fn collector_url(address: &str, path: &str) -> Result<Uri, ConfigError> {
    let base = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    url(&format!("{}{path}", base.trim_end_matches('/')), "/collector/address")
}

/// The fields of every call.
fn request_headers(collector: &Collector) -> Result<HeaderMap, ConfigError> {
    let mut headers = HeaderMap::new();
    for (name, value) in &collector.request_headers {
        let value = match value {
            Attribute::Bool(truth) => truth.to_string(),
            Attribute::Number(number) => number.to_string(),
            Attribute::Text(text) => text.clone(),
        };
        let wrong = || {
            let pointer = format!("/collector/request_headers/{}", config::error::escape(name));
            ConfigError::invalid(pointer, "it cannot stand in a header field")
        };
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?;
        let mut value = HeaderValue::from_str(&value).map_err(|_| wrong())?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

/// OTLP over HTTP.
struct HttpCollector {
    post: Post,
    resource: Resource,
}

impl HttpCollector {
    fn new(metadata: &Metadata, env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        let server = collector_url(&metadata.collector.address, "/v1/traces")?;
        let mut post = Post::new(vec![server], Call::within(true, metadata.timeout()), env)?;
        for (name, value) in &request_headers(&metadata.collector)? {
            post = post.field(name.clone(), value.clone());
        }
        post = post.field(header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        Ok(Self { post, resource: metadata.resource() })
    }
}

impl Sink for HttpCollector {
    type Entry = Span;

    async fn send(&self, batch: &[Span]) -> Result<(), Failure> {
        let body = Bytes::from(export(&self.resource, batch).encode_to_vec());
        self.post.deliver(body, 300).await
    }
}

/// OTLP over gRPC.
struct GrpcCollector {
    channel: Channel,
    headers: MetadataMap,
    resource: Resource,
}

impl GrpcCollector {
    fn new(metadata: &Metadata, env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        let server = collector_url(&metadata.collector.address, "")?;
        let wrong = |error: tonic::transport::Error| ConfigError::invalid("/collector/address", error.to_string());
        let secure = server.scheme_str() == Some("https");
        let mut endpoint =
            Endpoint::from(server).timeout(metadata.timeout()).connect_timeout(metadata.timeout());
        if secure {
            endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots()).map_err(wrong)?;
        }
        // The channel's task lives on the control side.
        let _control = env.control.enter();
        Ok(Self {
            channel: endpoint.connect_lazy(),
            headers: MetadataMap::from_headers(request_headers(&metadata.collector)?),
            resource: metadata.resource(),
        })
    }
}

impl Sink for GrpcCollector {
    type Entry = Span;

    async fn send(&self, batch: &[Span]) -> Result<(), Failure> {
        let mut request = tonic::Request::new(export(&self.resource, batch));
        *request.metadata_mut() = self.headers.clone();
        match TraceServiceClient::new(self.channel.clone()).export(request).await {
            Ok(_) => Ok(()),
            Err(status) => {
                let problem = format!("{:?}: {}", status.code(), status.message());
                Err(if passes(status.code()) { Failure::retryable(problem) } else { Failure::permanent(problem) })
            }
        }
    }
}

/// Whether the protocol allows another attempt after that.
fn passes(code: tonic::Code) -> bool {
    use tonic::Code;
    matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss
    )
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::{Value, json};

    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    async fn told(metadata: Option<Value>, config: Value, fields: &[(&str, &str)]) -> Exchange {
        let env = TestEnv { metadata, ..TestEnv::default() };
        let mut chain = env.chain::<OpenTelemetry, _>(&config, |_| Ok(())).unwrap();
        let request = fields.iter().fold(exchange("GET", "http://a/"), |request, (name, value)| request.header(name, value));
        chain.run(request.build()).await
    }

    fn parent(x: &Exchange) -> &str {
        x.request.headers["traceparent"].to_str().unwrap()
    }

    #[tokio::test]
    async fn a_sampler_decides_and_the_upstream_hears_of_it() {
        let (on, off) = (format!("00-{TRACE}-b7ad6b7169203331-01"), format!("00-{TRACE}-b7ad6b7169203331-00"));
        for (sampler, caller, flags) in [
            (json!({}), Some(&on), "00"),
            (json!({"name": "always_on"}), None, "01"),
            (json!({"name": "always_on"}), Some(&off), "01"),
            (json!({"name": "parent_base"}), Some(&on), "01"),
            (json!({"name": "parent_base", "options": {"root": {"name": "always_on"}}}), Some(&off), "00"),
            (json!({"name": "parent_base", "options": {"root": {"name": "always_on"}}}), None, "01"),
            (json!({"name": "trace_id_ratio", "options": {"fraction": 1}}), None, "01"),
            (json!({"name": "trace_id_ratio"}), None, "00"),
        ] {
            let fields: Vec<_> = caller.iter().map(|caller| ("traceparent", caller.as_str())).collect();
            let x = told(None, json!({"sampler": sampler}), &fields).await;
            assert!(parent(&x).ends_with(&format!("-{flags}")), "{sampler} {caller:?}: {}", parent(&x));
            assert_eq!(parent(&x).contains(TRACE), caller.is_some());
        }
    }

    #[tokio::test]
    async fn a_request_id_may_name_the_trace_and_variables_tell_it() {
        let metadata = Some(json!({"trace_id_source": "x-request-id", "set_ngx_var": true}));
        let id = "0af76519-16cd-43dd-8448-eb211c80319c";
        let x = told(metadata.clone(), json!({}), &[("x-request-id", id)]).await;
        assert!(parent(&x).starts_with(&format!("00-{TRACE}-")), "{}", parent(&x));
        assert_eq!(x.get(&Var::parse("opentelemetry_trace_id")).as_deref(), Some(TRACE));
        assert_eq!(x.get(&Var::parse("opentelemetry_context_traceparent")).as_deref(), Some(parent(&x)));
        let other = told(metadata, json!({}), &[("x-request-id", "not an id")]).await;
        assert!(!parent(&other).contains(TRACE));
    }

    #[test]
    fn a_share_is_a_share() {
        let taken = (0..10_000).filter(|_| in_share(trace::new_trace_id(), 0.25)).count();
        assert!((2_000..3_000).contains(&taken), "{taken}");
    }

    #[tokio::test]
    async fn settings_that_cannot_work_are_refused() {
        for (metadata, config, words) in [
            (json!({}), json!({"sampler": {"name": "sometimes"}}), "sometimes"),
            (json!({}), json!({"sampler": {"name": "trace_id_ratio", "options": {"fraction": 2}}}), "0 to 1"),
            (json!({}), json!({"additional_header_prefix_attributes": ["a b"]}), "not the name of a header field"),
            (json!({"collector": {"address": "ftp://a"}}), json!({}), "http"),
            (json!({"collector": {"request_headers": {"a b": "c"}}}), json!({}), "header field"),
        ] {
            let env = TestEnv { metadata: Some(metadata), ..TestEnv::default() };
            let errors = env.build::<OpenTelemetry>(&config).err().unwrap();
            assert!(errors.iter().any(|error| error.to_string().contains(words)), "{words}: {errors:?}");
        }
    }
}
