//! `kafka-logger`: sends entries to a topic of Kafka.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. A batch is one message. The cluster is waited
//! for, whatever `required_acks` says: all replicas in sync have a message before it counts as sent.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use config::error::{ConfigError, escape};
use config::fields::Int;
use config::var::{Var, Vars};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::batch::{self, Failure, Sink};
use crate::support::kafka::{self, Broker, Producer};
use crate::support::log_entry::{Logger, Make, Metadata, Recorder, View, weight};
use crate::support::log_settings::logger_settings;

logger_settings! {
    queue_name: "kafka logger";
    /// Brokers, port by host; `brokers` is its newer form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    broker_list: Option<BTreeMap<String, u16>>,
    /// Brokers of the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    brokers: Option<Vec<Broker>>,
    /// The topic.
    kafka_topic: String,
    /// Messages with a key go to one partition, without one to all in turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// What an entry is.
    #[serde(default)]
    meta_format: MetaFormat,
    /// Of no use here: all replicas in sync are waited for.
    #[serde(default = "required_acks")]
    #[schemars(extend("enum" = [1, -1]))]
    required_acks: i8,
    /// Of no use here: what the brokers understand is found out.
    #[serde(default)]
    api_version: Int<0, 2, 1>,
    /// Of no use here: a queue sends.
    #[serde(default)]
    producer_type: ProducerType,
    /// Seconds that it may take to send a message.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
    /// Of no use here: each queue has connections of its own.
    #[serde(default = "cluster_name")]
    cluster_name: u32,
    /// Of no use here: a batch is a message.
    #[serde(default = "producer_batch_num")]
    producer_batch_num: NonZeroU32,
    /// Of no use here: a batch is a message.
    #[serde(default = "producer_batch_size")]
    producer_batch_size: u32,
    /// Of no use here: `max_pending_entries` bounds what waits.
    #[serde(default = "producer_max_buffering")]
    producer_max_buffering: NonZeroU32,
    /// Of no use here: `inactive_timeout` says when a batch is sent.
    #[serde(default = "producer_time_linger")]
    producer_time_linger: NonZeroU32,
    /// Of no use here: the cluster is asked again when a message was not taken.
    #[serde(default = "meta_refresh_interval")]
    meta_refresh_interval: NonZeroU32,
}

fn required_acks() -> i8 {
    1
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(2)
}

fn cluster_name() -> u32 {
    1
}

fn producer_batch_num() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(199)
}

fn producer_batch_size() -> u32 {
    1_048_576
}

fn producer_max_buffering() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(49_999)
}

fn producer_time_linger() -> NonZeroU32 {
    NonZeroU32::MIN
}

fn meta_refresh_interval() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(29)
}

/// What an entry is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MetaFormat {
    /// JSON, as of other loggers.
    #[default]
    Default,
    /// The request as HTTP/1.1 writes it.
    Origin,
}

/// How APISIX sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProducerType {
    /// In the background.
    #[default]
    Async,
    /// At once.
    Sync,
}

/// The plugin.
pub struct KafkaLogger;

impl Definition for KafkaLogger {
    const NAME: &'static str = "kafka-logger";
    const PRIORITY: i32 = 403;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        match brokers(config) {
            Ok((pointer, brokers)) => errors.extend(kafka::check(&brokers).into_iter().map(|error| {
                // By host where the list is an object.
                if pointer == "/brokers" { error.under(pointer) } else { ConfigError { pointer: pointer.into(), ..error } }
            })),
            Err(error) => errors.push(error),
        }
        if config.kafka_topic.is_empty() {
            errors.push(ConfigError::invalid("/kafka_topic", "write the name of a topic"));
        }
        if !matches!(config.required_acks, 1 | -1) {
            errors.push(ConfigError::invalid("/required_acks", "write 1 or -1"));
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let (_, brokers) = brokers(&config)?;
        let producer = Producer::new(&brokers, &config.kafka_topic, config.key.as_deref());
        let timeout = Duration::from_secs(config.timeout.get().into());
        let settings = config.batch_settings(metadata.max_pending_entries, timeout);
        let sink = Topic { producer, single: config.batch_max_size == NonZeroU32::MIN };
        let queue = batch::shared(env, Self::NAME, &config, settings, sink)?;
        Logger::register(recorder, config.meta_format, queue, hooks);
        Ok(())
    }
}

/// The brokers, and where they are written.
fn brokers(config: &Config) -> Result<(&'static str, Vec<Broker>), ConfigError> {
    match (&config.brokers, &config.broker_list) {
        (Some(brokers), None) => Ok(("/brokers", brokers.clone())),
        (None, Some(list)) => {
            for host in list.keys() {
                let pointer = format!("/broker_list/{}", escape(host));
                crate::support::log_settings::is_host(host, &pointer)?;
            }
            Ok(("/broker_list", list.iter().map(|(host, port)| Broker::new(host, *port)).collect()))
        }
        (None, None) => Err(ConfigError::invalid("", "write `brokers`")),
        (Some(_), Some(_)) => Err(ConfigError::invalid("", "write one of `brokers` and `broker_list`")),
    }
}

impl Make for MetaFormat {
    type Entry = Value;

    fn make(&self, recorder: &Recorder, view: &View<'_>) -> (Value, usize) {
        match self {
            Self::Default => {
                let fields = recorder.fields(view);
                let bytes = weight(&fields);
                (Value::Object(fields), bytes)
            }
            Self::Origin => {
                let text = origin(view);
                let bytes = text.len();
                (Value::String(text), bytes)
            }
        }
    }
}

/// The request as HTTP/1.1 writes it, with its body where that was kept.
fn origin(view: &View<'_>) -> String {
    let mut text = view.get(&Var::Request).unwrap_or_default().into_owned() + "\r\n";
    for (name, value) in view.headers() {
        text.push_str(&format!("{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes())));
    }
    text.push_str("\r\n");
    text.push_str(&view.get(&Var::RequestBody).unwrap_or_default());
    text
}

struct Topic {
    producer: Producer,
    single: bool,
}

impl Sink for Topic {
    type Entry = Value;

    async fn send(&self, batch: &[Value]) -> Result<(), Failure> {
        self.producer.send(message(batch, self.single)).await
    }
}

/// A batch as one message: the entry itself where batches have one, else a list.
fn message(batch: &[Value], single: bool) -> String {
    match batch {
        [Value::String(text)] if single => text.clone(),
        [one] if single => one.to_string(),
        all => serde_json::to_string(all).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_message_is_an_entry_or_a_list() {
        let (object, text) = (json!({"a": 1}), json!("GET / HTTP/1.1\r\n\r\n"));
        let cases = [
            (vec![object.clone()], true, "{\"a\":1}"),
            (vec![text.clone()], true, "GET / HTTP/1.1\r\n\r\n"),
            (vec![object.clone()], false, "[{\"a\":1}]"),
            (vec![object, text], false, "[{\"a\":1},\"GET / HTTP/1.1\\r\\n\\r\\n\"]"),
        ];
        for (batch, single, expected) in cases {
            assert_eq!(message(&batch, single), expected);
        }
    }

    #[tokio::test]
    async fn the_origin_of_an_entry_is_the_request() {
        let config: Config =
            serde_json::from_value(json!({"broker_list": {"a": 1}, "kafka_topic": "t"})).unwrap();
        let recorder = TestEnv::default()
            .with(|env| Recorder::new(config.entry_settings(), Metadata::default().formats(), env))
            .unwrap();
        let x = exchange("GET", "http://a.com/b?c=d").header("x-a", "1").build();
        let (entry, _) = MetaFormat::Origin.make(&recorder, &recorder.view(0, &x));
        assert_eq!(entry, json!("GET /b?c=d HTTP/1.1\r\nx-a: 1\r\n\r\n"));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"kafka_topic": "t"}), ""),
            (json!({"kafka_topic": "t", "brokers": [], "broker_list": {"a": 1}}), ""),
            (json!({"kafka_topic": "t", "brokers": []}), "/brokers"),
            (json!({"kafka_topic": "t", "broker_list": {}}), "/broker_list"),
            (json!({"kafka_topic": "t", "broker_list": {"a": 65_536}}), "/broker_list/a"),
            (json!({"kafka_topic": "", "broker_list": {"a": 1}}), "/kafka_topic"),
            (json!({"kafka_topic": "t", "broker_list": {"a": 1}, "required_acks": 0}), "/required_acks"),
            (json!({"kafka_topic": "t", "broker_list": {"a": 1}, "meta_format": "raw"}), "/meta_format"),
            (
                json!({"kafka_topic": "t", "brokers": [{"host": "a", "port": 1, "sasl_config": {
                    "mechanism": "GSSAPI", "user": "u", "password": "p"}}]}),
                "/brokers/0/sasl_config/mechanism",
            ),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<KafkaLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
