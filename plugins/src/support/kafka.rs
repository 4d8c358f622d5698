//! Messages to a topic of Kafka. Connections are made when the first message is sent, and again after a failure.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use config::error::ConfigError;
use config::sensitive::Sensitive;
use rskafka::chrono::{DateTime, Utc};
use rskafka::client::partition::{Compression, PartitionClient, UnknownTopicHandling};
use rskafka::client::{ClientBuilder, Credentials, SaslConfig};
use rskafka::record::Record;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::batch::Failure;
use super::log_settings::is_host;

/// The largest answer of a broker.
const ANSWER: usize = 16 << 20;
/// Partitions of a topic that are used.
const PARTITIONS: usize = 10_000;

/// A broker of the cluster. Any one that can be reached tells of the others.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Broker {
    /// Its name or address.
    host: String,
    /// Its port.
    port: u16,
    /// How to sign in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sasl_config: Option<Sasl>,
}

impl Broker {
    /// A broker that takes everybody.
    pub fn new(host: &str, port: u16) -> Self {
        Self { host: host.to_owned(), port, sasl_config: None }
    }
}

/// How to sign in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sasl {
    /// The mechanism.
    #[serde(default)]
    mechanism: Mechanism,
    /// The user.
    user: String,
    /// The password.
    #[schemars(extend("x-encrypted" = true))]
    password: Sensitive,
}

/// A mechanism of SASL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mechanism {
    /// The password as it is.
    #[default]
    #[serde(rename = "PLAIN")]
    Plain,
    /// A proof that the password is known.
    #[serde(rename = "SCRAM-SHA-256")]
    ScramSha256,
    /// As before, with a longer sum.
    #[serde(rename = "SCRAM-SHA-512")]
    ScramSha512,
}

/// What the types cannot say of brokers. Pointers are inside their list.
pub fn check(brokers: &[Broker]) -> Vec<ConfigError> {
    let mut errors = Vec::new();
    if brokers.is_empty() {
        errors.push(ConfigError::invalid("", "write at least one broker"));
    }
    let first = brokers.first().map(|broker| &broker.sasl_config);
    for (index, broker) in brokers.iter().enumerate() {
        errors.extend(is_host(&broker.host, &format!("/{index}/host")).err());
        if first.is_some_and(|first| *first != broker.sasl_config) {
            let problem = "brokers of one cluster are signed in to in the same way";
            errors.push(ConfigError::invalid(format!("/{index}/sasl_config"), problem));
        }
    }
    errors
}

/// Sends to one topic.
pub struct Producer {
    brokers: Vec<String>,
    sasl: Option<Sasl>,
    topic: String,
    key: Option<String>,
    live: Mutex<Option<Arc<Live>>>,
    next: AtomicUsize,
}

/// Connections, and the partitions there are.
struct Live {
    partitions: Vec<PartitionClient>,
}

impl Producer {
    /// To `topic`. Messages with the same key go to the same partition; without one they go to all in turn.
    pub fn new(brokers: &[Broker], topic: &str, key: Option<&str>) -> Self {
        let address = |Broker { host, port, .. }: &Broker| match host.contains(':') {
            true => format!("[{}]:{port}", host.trim_matches(['[', ']'])),
            false => format!("{host}:{port}"),
        };
        Self {
            brokers: brokers.iter().map(address).collect(),
            sasl: brokers.first().and_then(|broker| broker.sasl_config.clone()),
            topic: topic.to_owned(),
            key: key.map(str::to_owned),
            live: Mutex::default(),
            next: AtomicUsize::new(fastrand::usize(..PARTITIONS)),
        }
    }

    async fn connect(&self) -> Result<Live, rskafka::client::error::Error> {
        let mut builder =
            ClientBuilder::new(self.brokers.clone()).client_id("postern").max_message_size(ANSWER);
        if let Some(Sasl { mechanism, user, password }) = &self.sasl {
            let credentials = Credentials::new(user.clone(), password.reveal().to_owned());
            builder = builder.sasl_config(match mechanism {
                Mechanism::Plain => SaslConfig::Plain(credentials),
                Mechanism::ScramSha256 => SaslConfig::ScramSha256(credentials),
                Mechanism::ScramSha512 => SaslConfig::ScramSha512(credentials),
            });
        }
        let client = builder.build().await?;
        // Asking for a partition lets a broker that makes topics by itself make this one.
        let first = client.partition_client(&self.topic, 0, UnknownTopicHandling::Retry).await?;
        let topics = client.list_topics().await?;
        let mut partitions = vec![first];
        let others = topics.into_iter().find(|topic| topic.name == self.topic);
        for id in others.iter().flat_map(|topic| &topic.partitions).filter(|id| **id != 0).take(PARTITIONS) {
            partitions.push(client.partition_client(&self.topic, *id, UnknownTopicHandling::Error).await?);
        }
        Ok(Live { partitions })
    }

    async fn live(&self) -> Result<Arc<Live>, rskafka::client::error::Error> {
        let mut live = self.live.lock().await;
        if let Some(live) = &*live {
            return Ok(live.clone());
        }
        let made = Arc::new(self.connect().await?);
        *live = Some(made.clone());
        Ok(made)
    }

    /// Sends one message, and waits until the cluster has it.
    ///
    /// # Errors
    /// It has not. May wait for ever: the queue's time-out ends that.
    pub async fn send(&self, text: String) -> Result<(), Failure> {
        let sent = async {
            let live = self.live().await?;
            let place = match &self.key {
                Some(key) => crc32(key.as_bytes()) as usize,
                None => self.next.fetch_add(1, Ordering::Relaxed),
            };
            // There is at least the first.
            let Some(partition) = live.partitions.get(place % live.partitions.len().max(1)) else {
                return Ok(());
            };
            let record = Record {
                key: self.key.as_ref().map(|key| key.clone().into_bytes()),
                value: Some(text.into_bytes()),
                headers: Default::default(),
                timestamp: now(),
            };
            partition.produce(vec![record], Compression::NoCompression).await.map(drop)
        };
        let outcome: Result<(), rskafka::client::error::Error> = sent.await;
        if let Err(error) = outcome {
            self.forget().await;
            return Err(Failure::retryable(error.to_string()));
        }
        Ok(())
    }

    /// Connects anew next time.
    async fn forget(&self) {
        *self.live.lock().await = None;
    }
}

fn now() -> DateTime<Utc> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    DateTime::from_timestamp_millis(i64::try_from(since.as_millis()).unwrap_or_default()).unwrap_or_default()
}

/// The checksum that lua-resty-kafka spreads keys by, so that keys stay in their partitions.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum: u32, byte| {
        (0..8).fold(
            sum ^ u32::from(*byte),
            |sum, _| if sum & 1 == 1 { (sum >> 1) ^ 0xEDB8_8320 } else { sum >> 1 },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_spread_as_in_apisix() {
        for (key, sum) in [("", 0), ("a", 0xE8B7_BE43), ("123456789", 0xCBF4_3926)] {
            assert_eq!(crc32(key.as_bytes()), sum);
        }
    }

    #[test]
    fn brokers_are_checked() {
        let sasl =
            Sasl { mechanism: Mechanism::Plain, user: "u".into(), password: Sensitive::new("p").unwrap() };
        let with = |host: &str, sasl: Option<&Sasl>| Broker {
            sasl_config: sasl.cloned(),
            ..Broker::new(host, 9092)
        };
        let cases = [
            (vec![], vec![""]),
            (vec![with("a", None), with("", None)], vec!["/1/host"]),
            (vec![with("a", Some(&sasl)), with("b", None)], vec!["/1/sasl_config"]),
            (vec![with("a", Some(&sasl)), with("b", Some(&sasl))], vec![]),
        ];
        for (brokers, pointers) in cases {
            let errors = check(&brokers);
            assert_eq!(errors.iter().map(|error| &*error.pointer).collect::<Vec<_>>(), pointers);
        }
    }
}
