//! `loki-logger`: pushes entries to Grafana Loki.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. Labels are rendered for each request; entries
//! with equal labels of a batch make one stream.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use config::error::{ConfigError, escape};
use config::template::Template;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use serde_json::json;

use crate::support::batch::{self, Failure, Sink};
use crate::support::log_entry::{Fields, Logger, Make, Metadata, Recorder, View, line, weight};
use crate::support::http_call::url;
use crate::support::log_http::{Call, Post, credential, listed, servers};
use crate::support::log_settings::logger_settings;

logger_settings! {
    queue_name: "loki logger";
    /// URLs of Loki, without a path; each batch goes to one of them.
    #[schemars(length(min = 1))]
    endpoint_addrs: Vec<String>,
    /// The path that entries are pushed to.
    #[serde(default = "endpoint_uri")]
    #[schemars(length(min = 1))]
    endpoint_uri: String,
    /// The tenant, sent as `X-Scope-OrgID`.
    #[serde(default = "tenant_id")]
    tenant_id: String,
    /// Further header fields.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    headers: BTreeMap<String, String>,
    /// Labels of the streams: texts with variables.
    #[serde(default = "log_labels")]
    log_labels: BTreeMap<String, String>,
    /// Check the certificate of the server.
    #[serde(default)]
    ssl_verify: bool,
    /// Milliseconds that a call may take.
    #[serde(default = "timeout")]
    #[schemars(range(min = 1, max = 60000))]
    timeout: u32,
    /// Keep connections.
    #[serde(default = "crate::support::log_settings::yes")]
    keepalive: bool,
    /// Milliseconds that a connection is kept idle.
    #[serde(default = "keepalive_timeout")]
    #[schemars(range(min = 1000))]
    keepalive_timeout: u32,
    /// Idle connections that are kept.
    #[serde(default = "keepalive_pool")]
    keepalive_pool: std::num::NonZeroU32,
}

fn endpoint_uri() -> String {
    "/loki/api/v1/push".to_owned()
}

fn tenant_id() -> String {
    "fake".to_owned()
}

fn log_labels() -> BTreeMap<String, String> {
    BTreeMap::from([("job".to_owned(), "apisix".to_owned())])
}

fn timeout() -> u32 {
    3000
}

fn keepalive_timeout() -> u32 {
    60_000
}

fn keepalive_pool() -> std::num::NonZeroU32 {
    std::num::NonZeroU32::MIN.saturating_add(4)
}

/// The plugin.
pub struct LokiLogger;

impl Definition for LokiLogger {
    const NAME: &'static str = "loki-logger";
    const PRIORITY: i32 = 414;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        if config.endpoint_addrs.is_empty() {
            errors.push(ConfigError::invalid("/endpoint_addrs", "write at least one URL"));
        }
        errors.extend(servers(listed("/endpoint_addrs", &config.endpoint_addrs), "").err());
        if !config.endpoint_uri.starts_with('/') {
            errors.push(ConfigError::invalid("/endpoint_uri", "a path begins with `/`"));
        } else if url(&format!("http://a{}", config.endpoint_uri), "").is_err() {
            errors.push(ConfigError::invalid("/endpoint_uri", "this is no path of a URL"));
        }
        errors.extend(fields(&config.headers).err());
        errors.extend(credential(&config.tenant_id, "/tenant_id").err());
        if !(1..=60_000).contains(&config.timeout) {
            errors.push(ConfigError::invalid("/timeout", "write a number from 1 to 60000"));
        }
        if config.keepalive_timeout < 1000 {
            errors.push(ConfigError::invalid("/keepalive_timeout", "write a number from 1000"));
        }
        for (name, value) in &config.log_labels {
            if value.is_empty() {
                let pointer = format!("/log_labels/{}", escape(name));
                errors.push(ConfigError::invalid(pointer, "a label has a value"));
            }
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let idle = Duration::from_millis(config.keepalive_timeout.into());
        let pool = if config.keepalive { config.keepalive_pool.get() as usize } else { 0 };
        let call = Call {
            idle: (idle, pool),
            ..Call::within(config.ssl_verify, Duration::from_millis(config.timeout.into()))
        };
        let servers = servers(listed("/endpoint_addrs", &config.endpoint_addrs), &config.endpoint_uri)?;
        let post = Post::new(servers, call, env)?
            .fields(fields(&config.headers)?)
            .field(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .credential(HeaderName::from_static("x-scope-orgid"), &config.tenant_id, "/tenant_id")?;
        let settings = config.batch_settings(metadata.max_pending_entries, call.attempt());
        let queue = batch::shared(env, Self::NAME, &config, settings, Loki(post))?;
        let labels = config.log_labels.iter().map(|(name, text)| (name.clone(), Template::parse(text)));
        Logger::register(recorder, Streams(labels.collect()), queue, hooks);
        Ok(())
    }
}

/// Further header fields of calls.
fn fields(headers: &BTreeMap<String, String>) -> Result<HeaderMap, ConfigError> {
    let field = |(name, value): (&String, &String)| {
        let wrong = || ConfigError::invalid(format!("/headers/{}", escape(name)), "it is no header field");
        let name = HeaderName::try_from(name.as_str()).map_err(|_| wrong())?;
        Ok((name, HeaderValue::try_from(value.as_str()).map_err(|_| wrong())?))
    };
    headers.iter().map(field).collect()
}

/// The labels of entries.
struct Streams(Vec<(String, Template)>);

/// An entry and its stream.
struct Entry {
    labels: BTreeMap<String, String>,
    /// Nanoseconds since 1970.
    at: u128,
    fields: Fields,
}

impl Make for Streams {
    type Entry = Entry;

    fn make(&self, recorder: &Recorder, view: &View<'_>) -> (Entry, usize) {
        let mut fields = recorder.fields(view);
        fields.entry("route_id").or_insert_with(|| "no-matched".into());
        let labels: BTreeMap<_, _> =
            self.0.iter().map(|(name, text)| (name.clone(), text.to_text(view).into_owned())).collect();
        let bytes =
            weight(&fields) + labels.iter().map(|(name, value)| 80 + name.len() + value.len()).sum::<usize>();
        let at = view.started().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        (Entry { labels, at, fields }, bytes)
    }
}

struct Loki(Post);

impl Sink for Loki {
    type Entry = Entry;

    async fn send(&self, batch: &[Entry]) -> Result<(), Failure> {
        let mut streams: BTreeMap<&BTreeMap<String, String>, Vec<(String, String)>> = BTreeMap::new();
        for Entry { labels, at, fields } in batch {
            streams.entry(labels).or_default().push((at.to_string(), line(fields)));
        }
        let streams: Vec<_> = streams
            .into_iter()
            .map(|(labels, values)| json!({"stream": labels, "values": values}))
            .collect();
        self.0.deliver(json!({ "streams": streams }).to_string(), 300).await
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::Value;

    use super::*;
    use crate::support::log_sink::{HttpSink, answered};

    async fn log(config: &Value, uris: &[&str]) {
        let mut chain = TestEnv::default().chain::<LokiLogger, _>(config, answered).unwrap();
        for uri in uris {
            drop(chain.run(exchange("GET", &format!("http://a.com{uri}")).build()).await);
        }
    }

    #[tokio::test]
    async fn entries_with_equal_labels_are_a_stream() {
        let sink = HttpSink::start(204).await;
        let config = json!({
            "endpoint_addrs": [sink.url("")], "tenant_id": "t", "headers": {"X-A": "1"}, "batch_max_size": 3,
            "log_labels": {"job": "edge", "who": "$arg_n"}, "log_format": {"uri": "$uri"},
        });
        log(&config, &["/a?n=1", "/b?n=2", "/c?n=1"]).await;
        let got = sink.requests(1).await.remove(0);
        assert_eq!(got.target, "/loki/api/v1/push");
        assert_eq!((got.field("x-scope-orgid"), got.field("x-a")), ("t", "1"));
        let body = got.json();
        let streams: Vec<_> = body["streams"]
            .as_array()
            .unwrap()
            .iter()
            .map(|stream| {
                let values = stream["values"].as_array().unwrap().iter();
                let lines: Vec<_> = values
                    .map(|value| {
                        assert_eq!(value[0].as_str().unwrap().len(), 19, "nanoseconds");
                        value[1].as_str().unwrap().to_owned()
                    })
                    .collect();
                (stream["stream"].clone(), lines)
            })
            .collect();
        let line = |uri: &str| json!({"uri": uri, "route_id": "no-matched"}).to_string();
        let labels = |who: &str| json!({"job": "edge", "who": who});
        assert_eq!(streams, [(labels("1"), vec![line("/a"), line("/c")]), (labels("2"), vec![line("/b")])]);
    }

    #[tokio::test]
    async fn the_defaults_are_those_of_apisix() {
        let sink = HttpSink::start(204).await;
        log(&json!({"endpoint_addrs": [sink.url("")], "batch_max_size": 1}), &["/"]).await;
        let got = sink.requests(1).await.remove(0);
        assert_eq!(got.field("x-scope-orgid"), "fake");
        assert_eq!(got.json()["streams"][0]["stream"], json!({"job": "apisix"}));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let good = json!({"endpoint_addrs": ["http://a"]});
        let cases = [
            ("endpoint_addrs", json!([]), "/endpoint_addrs"),
            ("endpoint_addrs", json!(["a"]), "/endpoint_addrs/0"),
            ("endpoint_uri", json!("push"), "/endpoint_uri"),
            ("timeout", json!(60_001), "/timeout"),
            ("timeout", json!(0), "/timeout"),
            ("keepalive_timeout", json!(999), "/keepalive_timeout"),
            ("keepalive_pool", json!(0), "/keepalive_pool"),
            ("log_labels", json!({"a": ""}), "/log_labels/a"),
            ("headers", json!({"a b": ""}), "/headers/a b"),
            ("tenant_id", json!("a\n"), "/tenant_id"),
        ];
        for (name, value, pointer) in cases {
            let mut config = good.clone();
            config[name] = value;
            let errors = TestEnv::default().build::<LokiLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
