//! `splunk-hec-logging`: sends entries to the HTTP Event Collector of Splunk.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. Without a format an event tells what APISIX's
//! does, under its names.

use std::num::NonZeroU32;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use config::error::ConfigError;
use config::sensitive::Sensitive;
use http::{HeaderName, HeaderValue, header};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use layers::vars::hostname;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::batch::{self, Failure, Sink};
use crate::support::http_call::url;
use crate::support::log_entry::{Fields, Logger, Make, Metadata, Recorder, View, line, weight};
use crate::support::log_http::{Call, Post, credential, refused};
use crate::support::log_settings::logger_settings;

logger_settings! {
    queue_name: "splunk-hec-logging";
    /// The collector.
    endpoint: Collector,
    /// Check the certificate of the server.
    #[serde(default = "crate::support::log_settings::yes")]
    ssl_verify: bool,
}

/// The collector.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Collector {
    /// Its URL.
    uri: String,
    /// The token.
    #[schemars(extend("x-encrypted" = true))]
    token: Sensitive<0>,
    /// The channel, sent as `X-Splunk-Request-Channel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    channel: Option<String>,
    /// Seconds that a call may take.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
    /// Milliseconds that a connection is kept idle.
    #[serde(default = "keepalive_timeout")]
    #[schemars(range(min = 1000))]
    keepalive_timeout: u32,
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(9)
}

fn keepalive_timeout() -> u32 {
    60_000
}

/// The plugin.
pub struct SplunkHecLogging;

impl Definition for SplunkHecLogging {
    const NAME: &'static str = "splunk-hec-logging";
    const PRIORITY: i32 = 409;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        errors.extend(url(&config.endpoint.uri, "/endpoint/uri").err());
        if config.endpoint.keepalive_timeout < 1000 {
            errors.push(ConfigError::invalid("/endpoint/keepalive_timeout", "write a number from 1000"));
        }
        errors.extend(credential(config.endpoint.token.reveal(), "/endpoint/token").err());
        errors.extend(config.endpoint.channel.iter().filter_map(|channel| credential(channel, "/endpoint/channel").err()));
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let Collector { uri, token, channel, timeout, keepalive_timeout } = &config.endpoint;
        let call = Call {
            idle: (Duration::from_millis((*keepalive_timeout).into()), 5),
            ..Call::within(config.ssl_verify, Duration::from_secs(timeout.get().into()))
        };
        let token = format!("Splunk {}", token.reveal());
        let mut post = Post::new(vec![url(uri, "/endpoint/uri")?], call, env)?
            .field(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .credential(header::AUTHORIZATION, &token, "/endpoint/token")?;
        if let Some(channel) = channel {
            let name = HeaderName::from_static("x-splunk-request-channel");
            post = post.credential(name, channel, "/endpoint/channel")?;
        }
        let settings = config.batch_settings(metadata.max_pending_entries, call.attempt());
        let queue = batch::shared(env, Self::NAME, &config, settings, Splunk(post))?;
        Logger::register(recorder, Events, queue, hooks);
        Ok(())
    }
}

struct Events;

impl Make for Events {
    type Entry = Fields;

    fn make(&self, recorder: &Recorder, view: &View<'_>) -> (Fields, usize) {
        let fields = recorder.fields(view);
        let event = if recorder.is_custom() { fields } else { event(fields) };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut entry = Fields::new();
        entry.insert("time".into(), (since.as_millis() as f64 / 1e3).into());
        entry.insert("host".into(), hostname().into());
        entry.insert("source".into(), "apache-apisix-splunk-hec-logging".into());
        entry.insert("sourcetype".into(), "_json".into());
        entry.insert("event".into(), Value::Object(event));
        let bytes = weight(&entry);
        (entry, bytes)
    }
}

/// The default entry under the names that APISIX gives it here. What was added to it stays.
fn event(mut fields: Fields) -> Fields {
    let mut event = Fields::new();
    let parts = [
        ("request", ["url", "method", "headers", "querystring", "size", "body"].as_slice()),
        ("response", &["status", "headers", "size", "body"]),
    ];
    for (part, names) in parts {
        let Some(Value::Object(mut members)) = fields.remove(part) else { continue };
        for name in names {
            if let Some(value) = members.remove(*name) {
                let name = if *name == "querystring" { "query" } else { name };
                event.insert(format!("{part}_{name}"), value);
            }
        }
    }
    let left_out = [
        "server", "service_id", "route_id", "consumer", "client_ip", "start_time", "upstream_latency", "apisix_latency",
    ];
    event.extend(fields.into_iter().filter(|(name, _)| !left_out.contains(&name.as_str())));
    event
}

struct Splunk(Post);

impl Sink for Splunk {
    type Entry = Fields;

    async fn send(&self, batch: &[Fields]) -> Result<(), Failure> {
        let body: String = batch.iter().map(line).collect();
        let answer = self.0.send(body).await?;
        if answer.status() == http::StatusCode::OK { Ok(()) } else { Err(refused(&answer)) }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;
    use crate::support::log_sink::{HttpSink, answered};

    async fn sent(mut config: Value) -> Vec<Value> {
        let sink = HttpSink::start(200).await;
        config["endpoint"] = json!({"uri": sink.url("/services/collector"), "token": "t", "channel": "c"});
        config["batch_max_size"] = 2.into();
        let mut chain = TestEnv::default().chain::<SplunkHecLogging, _>(&config, answered).unwrap();
        for uri in ["http://a/1", "http://a/2"] {
            drop(chain.run(exchange("GET", uri).build()).await);
        }
        let got = sink.requests(1).await.remove(0);
        assert_eq!((got.field("authorization"), got.field("x-splunk-request-channel")), ("Splunk t", "c"));
        let text = got.text();
        serde_json::Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect()
    }

    #[tokio::test]
    async fn an_event_has_the_names_of_apisix() {
        let events = sent(json!({"log_format_extra": {"m": "$request_method"}})).await;
        assert_eq!(events.len(), 2);
        let expected = [
            "latency", "m", "request_headers", "request_method", "request_query", "request_size", "request_url",
            "response_headers", "response_size", "response_status",
        ];
        let mut names: Vec<_> = events[0]["event"].as_object().unwrap().keys().collect();
        names.sort_unstable();
        assert_eq!(names, expected);
        assert_eq!(events[0]["source"], "apache-apisix-splunk-hec-logging");
        assert_eq!((&events[0]["sourcetype"], &events[0]["host"]), (&json!("_json"), &json!(hostname())));
        assert!(events[0]["time"].as_f64().unwrap() > 1.6e9);
    }

    #[tokio::test]
    async fn a_format_is_the_event() {
        let events = sent(json!({"log_format": {"uri": "$uri"}})).await;
        assert_eq!(events[1]["event"], json!({"uri": "/2"}));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (endpoint, pointer) in [
            (json!({"uri": "http://a"}), "/endpoint"),
            (json!({"uri": "a", "token": "t"}), "/endpoint/uri"),
            (json!({"uri": "http://a", "token": "t", "timeout": 0}), "/endpoint/timeout"),
            (json!({"uri": "http://a", "token": "t", "keepalive_timeout": 1}), "/endpoint/keepalive_timeout"),
            (json!({"uri": "http://a", "token": "\n"}), "/endpoint/token"),
        ] {
            let config = json!({ "endpoint": endpoint });
            let errors = TestEnv::default().build::<SplunkHecLogging>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
