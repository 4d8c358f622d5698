//! `http-logger`: posts entries to an HTTP server.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. Entries are gathered and sent by the control
//! side; a batch is a JSON list, or lines of JSON.

use std::num::NonZeroU32;
use std::time::Duration;

use config::error::ConfigError;
use config::sensitive::Sensitive;
use http::{HeaderValue, header};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::batch::{self, Failure, Sink};
use crate::support::http_call::url;
use crate::support::log_entry::{Fields, Logger, Metadata, Plain, Recorder, json_batch, line};
use crate::support::log_http::{Call, Post, credential};
use crate::support::log_settings::logger_settings;

logger_settings! {
    queue_name: "http logger";
    /// The URL that entries are posted to.
    uri: String,
    /// The value of `Authorization`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-encrypted" = true))]
    auth_header: Option<Sensitive<0>>,
    /// Seconds that a call may take.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
    /// How the entries of a batch are put together.
    #[serde(default)]
    concat_method: ConcatMethod,
    /// Check the certificate of the server.
    #[serde(default)]
    ssl_verify: bool,
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(2)
}

/// How the entries of a batch are put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConcatMethod {
    /// A JSON list.
    #[default]
    Json,
    /// A line for each.
    NewLine,
}

/// The plugin.
pub struct HttpLogger;

impl Definition for HttpLogger {
    const NAME: &'static str = "http-logger";
    const PRIORITY: i32 = 410;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        errors.extend(url(&config.uri, "/uri").err());
        errors.extend(config.auth_header.iter().filter_map(|auth| credential(auth.reveal(), "/auth_header").err()));
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let call = Call::within(config.ssl_verify, Duration::from_secs(config.timeout.get().into()));
        let mut post = Post::new(vec![url(&config.uri, "/uri")?], call, env)?
            .field(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(auth) = config.auth_header.as_ref().filter(|auth| !auth.reveal().is_empty()) {
            post = post.credential(header::AUTHORIZATION, auth.reveal(), "/auth_header")?;
        }
        let single = config.batch_max_size == NonZeroU32::MIN;
        let settings = config.batch_settings(metadata.max_pending_entries, call.attempt());
        let sink = Server { post, single, concat: config.concat_method };
        let queue = batch::shared(env, Self::NAME, &config, settings, sink)?;
        Logger::register(recorder, Plain, queue, hooks);
        Ok(())
    }
}

struct Server {
    post: Post,
    single: bool,
    concat: ConcatMethod,
}

impl Sink for Server {
    type Entry = Fields;

    async fn send(&self, batch: &[Fields]) -> Result<(), Failure> {
        let body = match self.concat {
            ConcatMethod::Json => json_batch(batch, self.single),
            ConcatMethod::NewLine => batch.iter().map(line).collect::<Vec<_>>().join("\n"),
        };
        self.post.deliver(body, 400).await
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::{Value, json};

    use super::*;
    use crate::support::log_sink::{HttpSink, answered};

    async fn log(env: &TestEnv, config: &Value, requests: usize) {
        let mut chain = env.chain::<HttpLogger, _>(config, answered).unwrap();
        for number in 0..requests {
            drop(chain.run(exchange("GET", &format!("http://a.com/{number}?x=1&y")).build()).await);
        }
    }

    #[tokio::test]
    async fn entries_are_posted_one_by_one_or_together() {
        let format = json!({"uri": "$uri"});
        let entry = |number: u32| json!({"uri": format!("/{number}")});
        let cases = [
            (json!({"batch_max_size": 1}), 1, entry(0).to_string()),
            (json!({"batch_max_size": 2}), 2, json!([entry(0), entry(1)]).to_string()),
            (json!({"batch_max_size": 3, "inactive_timeout": 1}), 1, json!([entry(0)]).to_string()),
            (
                json!({"batch_max_size": 2, "concat_method": "new_line"}),
                2,
                format!("{}\n{}", entry(0), entry(1)),
            ),
        ];
        for (mut config, requests, body) in cases {
            let sink = HttpSink::start(200).await;
            config["uri"] = sink.url("/in?k=v").into();
            config["auth_header"] = "Basic abc".into();
            config["log_format"] = format.clone();
            log(&TestEnv::default(), &config, requests).await;
            let got = sink.requests(1).await.remove(0);
            assert_eq!(got.text(), body, "{config}");
            assert_eq!((got.method.as_str(), got.target.as_str()), ("POST", "/in?k=v"));
            assert_eq!(got.field("content-type"), "application/json");
            assert_eq!(got.field("authorization"), "Basic abc");
        }
    }

    #[tokio::test]
    async fn a_format_of_the_whole_gateway_gives_way_to_that_of_the_plugin() {
        let metadata = Some(json!({"log_format": {"from": "metadata"}}));
        let env = TestEnv { metadata, ..TestEnv::default() };
        for (own, expected) in [
            (None, json!({"from": "metadata"})),
            (Some(json!({"from": "plugin"})), json!({"from": "plugin"})),
        ] {
            let sink = HttpSink::start(200).await;
            let mut config = json!({"uri": sink.url("/"), "batch_max_size": 1});
            if let Some(own) = own {
                config["log_format"] = own;
            }
            log(&env, &config, 1).await;
            assert_eq!(sink.requests(1).await[0].json(), expected);
        }
    }

    #[tokio::test]
    async fn a_server_error_is_tried_again_and_a_refusal_is_not() {
        for (status, calls) in [(503, 3), (400, 1)] {
            let sink = HttpSink::start(status).await;
            let env = TestEnv::default();
            let config = json!({"uri": sink.url("/"), "batch_max_size": 1, "max_retry_count": 2, "retry_delay": 0});
            log(&env, &config, 1).await;
            let counts = env.metrics.logs.counts("http-logger");
            sink.until(|| counts.losses(layers::telemetry::log_shipping::Loss::Refused) == 1).await;
            assert_eq!(sink.requests(calls).await.len(), calls, "{status}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"uri": "mockbin.org/bin"}), "/uri"),
            (json!({"uri": "http://a", "timeout": 0}), "/timeout"),
            (json!({"uri": "http://a", "concat_method": "csv"}), "/concat_method"),
            (json!({"uri": "http://a", "auth_header": "a\nb"}), "/auth_header"),
            (json!({"uri": "http://a", "batch_max_size": 0}), "/batch_max_size"),
            (json!({"uri": "http://a", "buffer_duration": 0}), "/buffer_duration"),
            (json!({"uri": "http://a", "inactive_timeout": "1"}), "/inactive_timeout"),
            (json!({"uri": "http://a", "max_retry_count": -1}), "/max_retry_count"),
            (json!({"uri": "http://a", "unknown": 1}), "/unknown"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<HttpLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
