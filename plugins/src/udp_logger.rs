//! `udp-logger`: sends entries as datagrams.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. A batch is a JSON list in one datagram, or in
//! several where it does not fit; an entry that fits into none is lost.

use std::num::NonZeroU32;
use std::time::Duration;

use config::error::ConfigError;
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};

use crate::support::batch::{self, Failure, Sink};
use crate::support::log_entry::{Fields, Logger, Metadata, Plain, Recorder, line};
use crate::support::log_settings::{is_host, logger_settings};
use crate::support::log_socket::{DATAGRAM, Remote};

logger_settings! {
    queue_name: "udp logger";
    /// The server's name or address.
    host: String,
    /// Its port.
    port: u16,
    /// Seconds that it may take to send a batch.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(2)
}

/// The plugin.
pub struct UdpLogger;

impl Definition for UdpLogger {
    const NAME: &'static str = "udp-logger";
    const PRIORITY: i32 = 400;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        errors.extend(is_host(&config.host, "/host").err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let timeout = Duration::from_secs(config.timeout.get().into());
        let settings = config.batch_settings(metadata.max_pending_entries, timeout);
        let single = config.batch_max_size == NonZeroU32::MIN;
        let sink = Server { remote: Remote::new(&config.host, config.port), single };
        let queue = batch::shared(env, Self::NAME, &config, settings, sink)?;
        Logger::register(recorder, Plain, queue, hooks);
        Ok(())
    }
}

struct Server {
    remote: Remote,
    single: bool,
}

impl Sink for Server {
    type Entry = Fields;

    async fn send(&self, batch: &[Fields]) -> Result<(), Failure> {
        let (datagrams, refused) = datagrams(batch.iter().map(line), self.single, DATAGRAM);
        let sent = async {
            let socket = self.remote.udp().await?;
            for datagram in &datagrams {
                socket.send(datagram.as_bytes()).await?;
            }
            Ok(())
        };
        sent.await.map_err(|error: std::io::Error| Failure::retryable(format!("{}: {error}", self.remote.told())))?;
        if refused > 0 {
            return Err(Failure::partial(format!("larger than {DATAGRAM} bytes"), Vec::new(), refused));
        }
        Ok(())
    }
}

/// Lists of lines that are at most `limit` bytes long each, and how many lines fit into none.
fn datagrams(lines: impl Iterator<Item = String>, single: bool, limit: usize) -> (Vec<String>, usize) {
    let (mut datagrams, mut refused) = (Vec::<String>::new(), 0);
    // The list at hand lacks its end.
    let mut open = false;
    for line in lines {
        if line.len() + if single { 0 } else { 2 } > limit {
            refused += 1;
            continue;
        }
        match datagrams.last_mut() {
            _ if single => datagrams.push(line),
            Some(list) if open && list.len() + line.len() + 2 <= limit => {
                list.push(',');
                list.push_str(&line);
            }
            last => {
                if let Some(list) = last {
                    list.push(']');
                }
                datagrams.push(format!("[{line}"));
                open = true;
            }
        }
    }
    if let Some(list) = datagrams.last_mut().filter(|_| open) {
        list.push(']');
    }
    (datagrams, refused)
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::{Value, json};
    use tokio::net::UdpSocket;

    use super::*;
    use crate::support::log_sink::answered;

    #[test]
    fn a_batch_is_cut_where_a_datagram_ends() {
        type Case<'a> = (&'a [&'a str], bool, usize, &'a [&'a str], usize);
        let cases: [Case<'_>; 5] = [
            (&["{1}", "{2}"], false, 100, &["[{1},{2}]"], 0),
            (&["{1}", "{2}", "{3}"], false, 9, &["[{1},{2}]", "[{3}]"], 0),
            (&["{1}", "{2}"], false, 8, &["[{1}]", "[{2}]"], 0),
            (&["{1234}", "{2}"], false, 6, &["[{2}]"], 1),
            (&["{1}"], true, 3, &["{1}"], 0),
        ];
        for (lines, single, limit, expected, lost) in cases {
            let (datagrams, refused) =
                datagrams(lines.iter().map(|line| (*line).to_owned()), single, limit);
            assert_eq!((datagrams, refused), (expected.iter().map(|d| (*d).to_owned()).collect(), lost));
        }
    }

    #[tokio::test]
    async fn a_batch_is_a_datagram() {
        for (size, expected) in [(1, json!({"uri": "/0"})), (2, json!([{"uri": "/0"}, {"uri": "/1"}]))] {
            let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let port = server.local_addr().unwrap().port();
            let config = json!({
                "host": "127.0.0.1", "port": port, "batch_max_size": size, "log_format": {"uri": "$uri"},
            });
            let mut chain = TestEnv::default().chain::<UdpLogger, _>(&config, answered).unwrap();
            for number in 0..size {
                drop(chain.run(exchange("GET", &format!("http://a.com/{number}")).build()).await);
            }
            let mut datagram = [0; 4096];
            let receive = server.recv(&mut datagram);
            let length = tokio::time::timeout(Duration::from_secs(10), receive).await.unwrap().unwrap();
            assert_eq!(serde_json::from_slice::<Value>(&datagram[..length]).unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"port": 1}), ""),
            (json!({"host": "a", "port": -1}), "/port"),
            (json!({"host": "a", "port": 1, "timeout": 0}), "/timeout"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<UdpLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
