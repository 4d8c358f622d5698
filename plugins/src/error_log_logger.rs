//! `error-log-logger`: ships the gateway's own error log.
//!
//! No phase: it is switched on by its `plugin_metadata`, for the whole gateway, and reads along with the log. What it
//! tells of its own failures stays in the log, so that it does not feed on them.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use config::error::ConfigError;
use config::sensitive::Sensitive;
use http::{HeaderValue, header};
use layers::endpoint::Offers;
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use layers::telemetry::error_log::{self, Listener};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tracing::Level;

use crate::clickhouse_logger::{Table, check_table};
use crate::skywalking_logger::{instance, service_instance_name, service_name};
use crate::support::batch::{self, Batch, BatchSettings, FAILURES, Failure, Sink};
use crate::support::http_call::url;
use crate::support::kafka::{self, Broker, Producer};
use crate::support::log_http::{Call, Post};
use crate::support::log_settings::is_host;
use crate::support::log_socket::{Dialer, Remote, Tls};

/// Parts of the program that talk while a batch is sent.
const SENDERS: [&str; 4] = [FAILURES, "rskafka", "hyper", "rustls"];

/// Settings: there are none; what is shipped where stands in `plugin_metadata`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

/// Settings for the whole gateway. One of `tcp`, `skywalking`, `clickhouse` and `kafka`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// A server that takes lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tcp: Option<Tcp>,
    /// A collector of Apache SkyWalking.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    skywalking: Option<Skywalking>,
    /// A table of ClickHouse with a column `data`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    clickhouse: Option<Clickhouse>,
    /// A topic of Kafka.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kafka: Option<Kafka>,
    /// What the queue is called in metrics.
    #[serde(default = "name")]
    name: String,
    /// Lines of this level and of graver ones are sent, as far as they are in the log.
    #[serde(default)]
    level: LogLevel,
    /// Seconds that it may take to send a batch.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
    /// Seconds that a connection is kept idle.
    #[serde(default = "keepalive")]
    keepalive: NonZeroU32,
    /// Lines that are sent together.
    #[serde(default = "crate::support::log_settings::batch_max_size")]
    batch_max_size: NonZeroU32,
    /// Lines are sent when none came for so many seconds.
    #[serde(default = "inactive_timeout")]
    inactive_timeout: NonZeroU32,
    /// Lines are sent when the oldest has waited for so many seconds.
    #[serde(default = "crate::support::log_settings::buffer_duration")]
    buffer_duration: NonZeroU32,
    /// Further attempts to send a batch.
    #[serde(default)]
    max_retry_count: u32,
    /// Seconds before the first further attempt; they double with each.
    #[serde(default = "crate::support::log_settings::retry_delay")]
    retry_delay: u32,
}

fn name() -> String {
    "error-log-logger".to_owned()
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(2)
}

fn keepalive() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(29)
}

fn inactive_timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(2)
}

/// A server that takes lines.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tcp {
    /// Its name or address.
    host: String,
    /// Its port.
    port: u16,
    /// Speak TLS; the certificate is checked.
    #[serde(default)]
    tls: bool,
    /// The name that the certificate is checked for, in place of `host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tls_server_name: Option<String>,
}

/// A collector of Apache SkyWalking.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Skywalking {
    /// The URL that logs are posted to.
    #[serde(default = "skywalking_address")]
    endpoint_addr: String,
    /// The service.
    #[serde(default = "service_name")]
    service_name: String,
    /// Its instance; `$hostname` is the name of this machine.
    #[serde(default = "service_instance_name")]
    service_instance_name: String,
}

fn skywalking_address() -> String {
    "http://127.0.0.1:12900/v3/logs".to_owned()
}

/// A table of ClickHouse.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Clickhouse {
    /// The URL of the server.
    #[serde(default = "clickhouse_address")]
    endpoint_addr: String,
    /// The user.
    #[serde(default = "clickhouse_user")]
    user: String,
    /// The password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-encrypted" = true))]
    password: Option<Sensitive<0>>,
    /// The database.
    #[serde(default)]
    database: String,
    /// The table.
    logtable: String,
}

impl Clickhouse {
    fn access(&self) -> [(&str, &str); 3] {
        [
            (self.user.as_str(), "/clickhouse/user"),
            (self.password.as_ref().map_or("", Sensitive::reveal), "/clickhouse/password"),
            (&self.database, "/clickhouse/database"),
        ]
    }
}

fn clickhouse_address() -> String {
    "http://127.0.0.1:8213".to_owned()
}

fn clickhouse_user() -> String {
    "default".to_owned()
}

/// A topic of Kafka.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// Brokers of the cluster.
    #[schemars(length(min = 1))]
    brokers: Vec<Broker>,
    /// The topic.
    kafka_topic: String,
    /// Messages with a key go to one partition, without one to all in turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// Of no use here: a queue sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    producer_type: Option<String>,
    /// Of no use here: all replicas in sync are waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    required_acks: Option<i8>,
    /// Of no use here: the queue has connections of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster_name: Option<u32>,
    /// Of no use here: the cluster is asked again when a message was not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    meta_refresh_interval: Option<NonZeroU32>,
}

/// A level, in nginx's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Stderr,
    Emerg,
    Alert,
    Crit,
    Err,
    Error,
    #[default]
    Warn,
    Notice,
    Info,
    Debug,
}

impl LogLevel {
    /// There is nothing graver than an error here.
    fn level(self) -> Level {
        match self {
            Self::Stderr | Self::Emerg | Self::Alert | Self::Crit | Self::Err | Self::Error => Level::ERROR,
            Self::Warn => Level::WARN,
            Self::Notice | Self::Info => Level::INFO,
            Self::Debug => Level::DEBUG,
        }
    }
}

/// The plugin.
pub struct ErrorLogLogger;

impl Definition for ErrorLogLogger {
    const NAME: &'static str = "error-log-logger";
    const PRIORITY: i32 = 1091;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.checked_metadata::<Metadata>(|metadata| metadata.check().err().into_iter().collect());
    }

    fn build(_: Config, _: &BuildEnv<'_>, _: &mut Hooks) -> Result<(), ConfigError> {
        Ok(())
    }

    fn offer(env: &BuildEnv<'_>, _: &mut Offers) -> Result<(), ConfigError> {
        let Some(metadata) = env.metadata else {
            error_log::listen(None);
            return Ok(());
        };
        let metadata = Metadata::deserialize(metadata)
            .map_err(|error| ConfigError::invalid("", error.to_string()))?;
        let destination = Destination::new(&metadata, env)?;
        let queue = batch::shared(env, Self::NAME, &metadata, metadata.batch_settings(), destination)?;
        error_log::listen(Some(Box::new(Shipper { level: metadata.level.level(), queue })));
        Ok(())
    }
}

impl Metadata {
    /// What the types do not say.
    fn check(&self) -> Result<(), ConfigError> {
        let Self { tcp, skywalking, clickhouse, kafka, .. } = self;
        match (tcp, skywalking, clickhouse, kafka) {
            (Some(tcp), None, None, None) => is_host(&tcp.host, "/tcp/host"),
            (None, Some(skywalking), None, None) => {
                url(&skywalking.endpoint_addr, "/skywalking/endpoint_addr").map(drop)
            }
            (None, None, Some(clickhouse), None) => {
                check_table(&clickhouse.logtable, "/clickhouse/logtable")?;
                url(&clickhouse.endpoint_addr, "/clickhouse/endpoint_addr")?;
                Table::check_access(clickhouse.access())
            }
            (None, None, None, Some(kafka)) => {
                let wrong = kafka::check(&kafka.brokers).into_iter().next();
                wrong.map_or(Ok(()), |error| Err(error.under("/kafka/brokers")))
            }
            _ => Err(ConfigError::invalid("", "write one of `tcp`, `skywalking`, `clickhouse` and `kafka`")),
        }
    }

    fn batch_settings(&self) -> BatchSettings {
        let seconds = |n: u32| Duration::from_secs(n.into());
        BatchSettings {
            name: self.name.clone(),
            size: self.batch_max_size.get() as usize,
            idle: seconds(self.inactive_timeout.get()),
            age: seconds(self.buffer_duration.get()),
            retries: self.max_retry_count,
            pause: seconds(self.retry_delay),
            pending: None,
            timeout: seconds(self.timeout.get()) + Duration::from_secs(1),
            // Lines keep their order.
            at_once: 1,
        }
    }
}

/// Hands lines over.
struct Shipper {
    level: Level,
    queue: Arc<Batch<String>>,
}

impl Listener for Shipper {
    fn wants(&self, level: Level, target: &str) -> bool {
        let part = |sender: &str| {
            target.strip_prefix(sender).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        level <= self.level && !SENDERS.iter().any(|sender| part(sender))
    }

    fn line(&self, line: String) {
        let bytes = line.len() + 32;
        self.queue.push(line, bytes);
    }
}

/// Where lines go.
enum Destination {
    Tcp(Dialer),
    Skywalking { post: Post, service: String, instance: String },
    Clickhouse(Table),
    Kafka(Producer),
}

impl Destination {
    fn new(metadata: &Metadata, env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        metadata.check()?;
        let Metadata { tcp, skywalking, clickhouse, kafka, timeout, keepalive, .. } = metadata;
        let call = Call {
            idle: (Duration::from_secs(keepalive.get().into()), 1),
            ..Call::within(true, Duration::from_secs(timeout.get().into()))
        };
        let post = |address: &str, pointer: &str| {
            let post = Post::new(vec![url(address, pointer)?], call, env)?;
            Ok(post.field(header::CONTENT_TYPE, HeaderValue::from_static("application/json")))
        };
        match (tcp, skywalking, clickhouse, kafka) {
            (Some(tcp), None, None, None) => {
                let tls = Tls { verify: true, name: tcp.tls_server_name.as_deref(), pointer: "/tcp/tls" };
                let remote = Remote::new(&tcp.host, tcp.port);
                Ok(Self::Tcp(Dialer::new(remote, tcp.tls.then_some(tls), env)?))
            }
            (None, Some(skywalking), None, None) => Ok(Self::Skywalking {
                post: post(&skywalking.endpoint_addr, "/skywalking/endpoint_addr")?,
                service: skywalking.service_name.clone(),
                instance: instance(&skywalking.service_instance_name),
            }),
            (None, None, Some(clickhouse), None) => {
                let post = post(&clickhouse.endpoint_addr, "/clickhouse/endpoint_addr")?;
                Ok(Self::Clickhouse(Table::new(post, &clickhouse.logtable, clickhouse.access())?))
            }
            (None, None, None, Some(kafka)) => {
                Ok(Self::Kafka(Producer::new(&kafka.brokers, &kafka.kafka_topic, kafka.key.as_deref())))
            }
            _ => Err(ConfigError::invalid("", "write one of `tcp`, `skywalking`, `clickhouse` and `kafka`")),
        }
    }
}

impl Sink for Destination {
    type Entry = String;

    async fn send(&self, batch: &[String]) -> Result<(), Failure> {
        match self {
            Self::Tcp(dialer) => {
                let mut text = batch.join("\n");
                text.push('\n');
                let sent = async {
                    let mut stream = dialer.dial().await?;
                    stream.write_all(text.as_bytes()).await?;
                    stream.shutdown().await
                };
                sent.await.map_err(|error: std::io::Error| {
                    Failure::retryable(format!("{}: {error}", dialer.told()))
                })
            }
            Self::Skywalking { post, service, instance } => {
                let reports: Vec<_> = batch
                    .iter()
                    .map(|line| {
                        json!({
                            "body": {"text": {"text": line}}, "service": service, "serviceInstance": instance,
                        })
                    })
                    .collect();
                post.deliver(serde_json::to_string(&reports).unwrap_or_default(), 400).await
            }
            Self::Clickhouse(table) => {
                table.insert(batch.iter().map(|line| json!({ "data": line }).to_string())).await
            }
            Self::Kafka(producer) => producer.send(serde_json::to_string(batch).unwrap_or_default()).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::TestEnv;
    use serde_json::Value;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::support::log_sink::HttpSink;

    fn offer(env: &TestEnv) -> Result<(), ConfigError> {
        env.with(|env| ErrorLogLogger::offer(env, &mut Offers::default()))
    }

    fn tell(level: Level, target: &str, line: &str) {
        error_log::tell(level, target, || line.to_owned());
    }

    /// One test, because there is one log in a process.
    #[tokio::test]
    async fn lines_go_to_each_kind_of_server() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let with = |metadata: Value| TestEnv { metadata: Some(metadata), ..TestEnv::default() };
        let tcp = with(json!({"tcp": {"host": "127.0.0.1", "port": port}, "batch_max_size": 2}));
        offer(&tcp).unwrap();
        tell(Level::INFO, "edge", "not grave enough");
        tell(Level::WARN, "edge", "first");
        tell(Level::ERROR, FAILURES, "of a logger itself");
        tell(Level::ERROR, "hyper::client", "of a sender");
        tell(Level::ERROR, "hyperbole", "second");
        let (mut stream, _) =
            tokio::time::timeout(Duration::from_secs(10), server.accept()).await.unwrap().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "first\nsecond\n");

        let sink = HttpSink::start(200).await;
        let skywalking = with(json!({
            "skywalking": {"endpoint_addr": sink.url("/v3/logs")}, "level": "INFO", "batch_max_size": 1,
        }));
        offer(&skywalking).unwrap();
        tell(Level::INFO, "edge", "line");
        let expected = json!([{
            "body": {"text": {"text": "line"}}, "service": "APISIX", "serviceInstance": "APISIX Instance Name",
        }]);
        assert_eq!(sink.requests(1).await[0].json(), expected);

        let clickhouse = with(json!({
            "clickhouse": {"endpoint_addr": sink.url("/"), "database": "d", "logtable": "t"}, "batch_max_size": 1,
        }));
        offer(&clickhouse).unwrap();
        tell(Level::WARN, "edge", "line");
        let got = sink.requests(2).await.remove(1);
        assert_eq!(got.text(), "INSERT INTO t FORMAT JSONEachRow {\"data\":\"line\"}");
        assert_eq!((got.field("x-clickhouse-user"), got.field("x-clickhouse-key")), ("default", ""));

        // The server has it before its answer is here.
        let counts = clickhouse.metrics.logs.counts("error-log-logger");
        let counted = async {
            while counts.sent.value() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), counted).await.unwrap();
        offer(&TestEnv::default()).unwrap();
        tell(Level::ERROR, "edge", "nobody reads along");
        assert_eq!(counts.sent.value(), 1);
    }

    #[tokio::test]
    async fn metadata_is_checked_before_it_is_stored() {
        let mut extras = Extras::default();
        ErrorLogLogger::extend(&mut extras);
        let tcp = json!({"host": "a", "port": 1});
        let cases = [
            (json!({}), ""),
            (json!({"tcp": tcp, "kafka": {"brokers": [], "kafka_topic": "t"}}), ""),
            (json!({"tcp": {"host": "", "port": 1}}), "/tcp/host"),
            (json!({"skywalking": {"endpoint_addr": "a"}}), "/skywalking/endpoint_addr"),
            (json!({"clickhouse": {"logtable": "a b"}}), "/clickhouse/logtable"),
            (json!({"clickhouse": {"logtable": "a", "user": "a\nb"}}), "/clickhouse/user"),
            (json!({"kafka": {"brokers": [], "kafka_topic": "t"}}), "/kafka/brokers"),
        ];
        for (metadata, pointer) in cases {
            let errors = extras.check_metadata(&metadata).unwrap().unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{metadata}: {errors:?}");
        }
    }
}
