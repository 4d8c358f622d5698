//! `syslog`: sends entries as messages of RFC 5424, over TCP or UDP.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. A TCP connection is kept from batch to batch,
//! and each message ends with a line feed; a datagram holds one message.

use std::num::NonZeroU32;
use std::time::{Duration, SystemTime};

use config::error::ConfigError;
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;

use crate::support::batch::{self, Failure, Sink};
use crate::support::log_entry::{Fields, Logger, Make, Metadata, Recorder, View, line, weight};
use crate::support::log_settings::{is_host, logger_settings};
use crate::support::log_socket::{DATAGRAM, Dialer, Remote, Stream, Tls};
use crate::support::rfc5424;

/// Facility `syslog` and severity `info`, as APISIX has it.
const PRIORITY: u8 = 5 * 8 + 6;

logger_settings! {
    queue_name: "sys logger";
    /// The server's name or address.
    host: String,
    /// Its port.
    port: u16,
    /// How messages travel.
    #[serde(default)]
    sock_type: Transport,
    /// Speak TLS over TCP.
    #[serde(default)]
    tls: bool,
    /// Extension: check the certificate of the server.
    #[serde(default = "crate::support::log_settings::yes")]
    ssl_verify: bool,
    /// Milliseconds that it may take to send a batch.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
    /// Of no use here: a batch is sent when it is full.
    #[serde(default = "flush_limit")]
    flush_limit: NonZeroU32,
    /// Of no use here: `max_pending_entries` bounds what waits.
    #[serde(default = "drop_limit")]
    drop_limit: i64,
    /// Of no use here: there is one connection.
    #[serde(default = "pool_size")]
    #[schemars(range(min = 5))]
    pool_size: u32,
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(2999)
}

fn flush_limit() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(4095)
}

fn drop_limit() -> i64 {
    1_048_576
}

fn pool_size() -> u32 {
    5
}

/// How messages travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// In a stream.
    #[default]
    Tcp,
    /// In datagrams.
    Udp,
}

/// The plugin.
pub struct Syslog;

impl Definition for Syslog {
    const NAME: &'static str = "syslog";
    const PRIORITY: i32 = 401;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        errors.extend(is_host(&config.host, "/host").err());
        if config.pool_size < 5 {
            errors.push(ConfigError::invalid("/pool_size", "write a number from 5"));
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let remote = Remote::new(&config.host, config.port);
        let tls = Tls { verify: config.ssl_verify, name: None, pointer: "/tls" };
        let way = match config.sock_type {
            Transport::Tcp => {
                Way::Tcp(Dialer::new(remote, config.tls.then_some(tls), env)?, Mutex::default())
            }
            Transport::Udp => Way::Udp(remote),
        };
        let timeout = Duration::from_millis(config.timeout.get().into());
        let mut settings = config.batch_settings(metadata.max_pending_entries, timeout);
        settings.at_once = 1;
        let queue = batch::shared(env, Self::NAME, &config, settings, Server(way))?;
        Logger::register(recorder, Messages, queue, hooks);
        Ok(())
    }
}

/// An entry, and what its message says besides.
struct Entry {
    at: SystemTime,
    host: String,
    fields: Fields,
}

struct Messages;

impl Make for Messages {
    type Entry = Entry;

    fn make(&self, recorder: &Recorder, view: &View<'_>) -> (Entry, usize) {
        let (host, fields) = (view.exchange().host.to_string(), recorder.fields(view));
        let bytes = weight(&fields) + host.len();
        (Entry { at: SystemTime::now(), host, fields }, bytes)
    }
}

struct Server(Way);

enum Way {
    /// The connection is taken while a batch is written, and put back when all of it was.
    Tcp(Dialer, Mutex<Option<Stream>>),
    Udp(Remote),
}

impl Sink for Server {
    type Entry = Entry;

    async fn send(&self, batch: &[Entry]) -> Result<(), Failure> {
        let messages = batch.iter().map(|Entry { at, host, fields }| {
            rfc5424::message(PRIORITY, *at, host, "-", &line(fields)) + "\n"
        });
        match &self.0 {
            Way::Tcp(dialer, kept) => {
                let text: String = messages.collect();
                let sent = async {
                    let mut kept = kept.lock().await;
                    let mut stream = match kept.take().filter(Stream::is_open) {
                        Some(stream) => stream,
                        None => dialer.dial().await?,
                    };
                    stream.write_all(text.as_bytes()).await?;
                    stream.flush().await?;
                    *kept = Some(stream);
                    Ok(())
                };
                sent.await
                    .map_err(|error: std::io::Error| Failure::retryable(format!("{}: {error}", dialer.told())))
            }
            Way::Udp(remote) => {
                let failed =
                    |error: std::io::Error| Failure::retryable(format!("{}: {error}", remote.told()));
                let socket = remote.udp().await.map_err(failed)?;
                let mut refused = 0;
                for message in messages {
                    if message.len() > DATAGRAM {
                        refused += 1;
                        continue;
                    }
                    socket.send(message.as_bytes()).await.map_err(failed)?;
                }
                if refused > 0 {
                    let problem = format!("larger than {DATAGRAM} bytes");
                    return Err(Failure::partial(problem, Vec::new(), refused));
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::{Value, json};
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::{TcpListener, UdpSocket};

    use super::*;
    use crate::support::log_sink::answered;

    async fn log(env: &TestEnv, config: &Value, numbers: std::ops::Range<u32>) {
        let mut chain = env.chain::<Syslog, _>(config, answered).unwrap();
        for number in numbers {
            drop(chain.run(exchange("GET", &format!("http://a.com/{number}")).build()).await);
        }
    }

    fn check(message: &str, number: u32) {
        let (head, body) = message.split_at(message.find('{').unwrap());
        assert!(head.starts_with("<46>1 20"), "{head}");
        assert!(head.ends_with(&format!("Z a.com apisix {} - - ", std::process::id())), "{head}");
        assert_eq!(serde_json::from_str::<Value>(body).unwrap(), json!({"uri": format!("/{number}")}));
    }

    #[tokio::test]
    async fn messages_are_lines_of_one_connection_until_it_breaks() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let config =
            json!({"host": "127.0.0.1", "port": port, "batch_max_size": 1, "log_format": {"uri": "$uri"}});
        let env = TestEnv::default();
        // Holds the queue over the reload that every chain of this test is.
        let _held = env.build::<Syslog>(&config).unwrap();
        log(&env, &config, 0..2).await;
        let (stream, _) = server.accept().await.unwrap();
        let mut lines = BufReader::new(stream).lines();
        for number in 0..2 {
            check(&lines.next_line().await.unwrap().unwrap(), number);
        }
        log(&env, &config, 2..3).await;
        check(&lines.next_line().await.unwrap().unwrap(), 2);
        drop(lines);
        log(&env, &config, 3..4).await;
        let again = tokio::time::timeout(Duration::from_secs(10), server.accept()).await.unwrap();
        let (stream, _) = again.unwrap();
        check(&BufReader::new(stream).lines().next_line().await.unwrap().unwrap(), 3);
    }

    #[tokio::test]
    async fn a_datagram_is_a_message() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let config = json!({
            "host": "127.0.0.1", "port": port, "sock_type": "udp", "batch_max_size": 2, "log_format": {"uri": "$uri"},
        });
        log(&TestEnv::default(), &config, 0..2).await;
        for number in 0..2 {
            let mut datagram = [0; 4096];
            let receive = server.recv(&mut datagram);
            let length = tokio::time::timeout(Duration::from_secs(10), receive).await.unwrap().unwrap();
            check(std::str::from_utf8(&datagram[..length]).unwrap(), number);
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"host": "a"}), ""),
            (json!({"host": "a", "port": 1, "sock_type": "unix"}), "/sock_type"),
            (json!({"host": "a", "port": 1, "pool_size": 4}), "/pool_size"),
            (json!({"host": "a", "port": 1, "flush_limit": 0}), "/flush_limit"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<Syslog>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
