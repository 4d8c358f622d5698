//! `skywalking-logger`: reports entries as logs of Apache SkyWalking.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. A request that carries the trace of SkyWalking
//! (`sw8`) is told as a part of it.

use std::num::NonZeroU32;
use std::time::Duration;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use config::error::ConfigError;
use http::{HeaderValue, header};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use layers::vars::hostname;
use serde_json::{Value, json};

use crate::support::batch::{self, Failure, Sink};
use crate::support::log_entry::{Fields, Logger, Make, Metadata, Recorder, View, line, weight};
use crate::support::log_http::{Call, Post, servers};
use crate::support::log_settings::logger_settings;

logger_settings! {
    queue_name: "skywalking logger";
    /// The URL of the collector.
    endpoint_addr: String,
    /// The service.
    #[serde(default = "service_name")]
    service_name: String,
    /// Its instance; `$hostname` is the name of this machine.
    #[serde(default = "service_instance_name")]
    service_instance_name: String,
    /// Seconds that a call may take.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
}

pub(crate) fn service_name() -> String {
    "APISIX".to_owned()
}

pub(crate) fn service_instance_name() -> String {
    "APISIX Instance Name".to_owned()
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(2)
}

/// The plugin.
pub struct SkywalkingLogger;

impl Definition for SkywalkingLogger {
    const NAME: &'static str = "skywalking-logger";
    const PRIORITY: i32 = 408;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        errors.extend(address(config).err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let call = Call::within(true, Duration::from_secs(config.timeout.get().into()));
        let post = Post::new(address(&config)?, call, env)?
            .field(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let reports = Reports {
            service: config.service_name.clone(),
            instance: instance(&config.service_instance_name),
        };
        let settings = config.batch_settings(metadata.max_pending_entries, call.attempt());
        let queue = batch::shared(env, Self::NAME, &config, settings, Collector(post))?;
        Logger::register(recorder, reports, queue, hooks);
        Ok(())
    }
}

fn address(config: &Config) -> Result<Vec<http::Uri>, ConfigError> {
    let address = config.endpoint_addr.trim_end_matches('/');
    servers([("/endpoint_addr".to_owned(), address)], "/v3/logs")
}

/// `$hostname` is the name of this machine.
pub(crate) fn instance(name: &str) -> String {
    if name == "$hostname" { hostname().to_owned() } else { name.to_owned() }
}

/// Whose logs they are.
struct Reports {
    service: String,
    instance: String,
}

/// An entry, and what is reported beside it.
struct Entry {
    report: Fields,
    fields: Fields,
}

impl Make for Reports {
    type Entry = Entry;

    fn make(&self, recorder: &Recorder, view: &View<'_>) -> (Entry, usize) {
        let mut report = Fields::new();
        let trace = view.headers().get("sw8").and_then(|value| trace(value.to_str().ok()?));
        report.extend(trace.map(|trace| ("traceContext".to_owned(), trace)));
        report.insert("service".into(), self.service.as_str().into());
        report.insert("serviceInstance".into(), self.instance.as_str().into());
        report.insert("endpoint".into(), view.exchange().path().into());
        let fields = recorder.fields(view);
        let bytes = weight(&report) + weight(&fields);
        (Entry { report, fields }, bytes)
    }
}

/// The trace that `sw8` tells of: `1-TRACE-SEGMENT-SPAN-SERVICE-INSTANCE-ENDPOINT-ADDRESS`, names in base 64.
fn trace(sw8: &str) -> Option<Value> {
    let parts: Vec<_> = sw8.split('-').collect();
    let [_, trace, segment, span, _, _, _, _] = parts[..] else { return None };
    let engine = GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let name = |text: &str| String::from_utf8(engine.decode(text).ok()?).ok();
    let span: u32 = span.parse().ok()?;
    Some(json!({"traceId": name(trace)?, "traceSegmentId": name(segment)?, "spanId": span}))
}

struct Collector(Post);

impl Sink for Collector {
    type Entry = Entry;

    async fn send(&self, batch: &[Entry]) -> Result<(), Failure> {
        let reports: Vec<_> = batch
            .iter()
            .map(|Entry { report, fields }| {
                let mut report = report.clone();
                report.insert("body".into(), json!({"json": {"json": line(fields)}}));
                report
            })
            .collect();
        self.0.deliver(serde_json::to_string(&reports).unwrap_or_default(), 400).await
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};

    use super::*;
    use crate::support::log_sink::{HttpSink, answered};

    #[tokio::test]
    async fn an_entry_is_reported_with_its_trace() {
        let sink = HttpSink::start(200).await;
        let config = json!({
            "endpoint_addr": sink.url(""), "service_instance_name": "$hostname", "batch_max_size": 2,
            "log_format": {"uri": "$uri"},
        });
        let mut chain = TestEnv::default().chain::<SkywalkingLogger, _>(&config, answered).unwrap();
        let traced = exchange("GET", "http://a/1").header("sw8", "1-dHJhY2U=-c2VnbWVudA==-3-a-b-c-d");
        for request in [traced, exchange("GET", "http://a/2").header("sw8", "nonsense")] {
            drop(chain.run(request.build()).await);
        }
        let got = sink.requests(1).await.remove(0);
        assert_eq!(got.target, "/v3/logs");
        let report = |uri: &str| {
            json!({
                "service": "APISIX", "serviceInstance": hostname(), "endpoint": uri,
                "body": {"json": {"json": json!({"uri": uri}).to_string()}},
            })
        };
        let mut first = report("/1");
        first["traceContext"] = json!({"traceId": "trace", "traceSegmentId": "segment", "spanId": 3});
        assert_eq!(got.json(), json!([first, report("/2")]));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (config, pointer) in [
            (json!({}), ""),
            (json!({"endpoint_addr": "a"}), "/endpoint_addr"),
            (json!({"endpoint_addr": "http://a", "timeout": 0}), "/timeout"),
        ] {
            let errors = TestEnv::default().build::<SkywalkingLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
