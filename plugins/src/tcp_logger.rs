//! `tcp-logger`: writes entries to a TCP server, with TLS where asked.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. A connection is made for each batch, because
//! its end is all that tells one batch from the next.

use std::num::NonZeroU32;
use std::time::Duration;

use config::error::ConfigError;
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use tokio::io::AsyncWriteExt;

use crate::support::batch::{self, Failure, Sink};
use crate::support::log_entry::{Fields, Logger, Metadata, Plain, Recorder, json_batch};
use crate::support::log_settings::{is_host, logger_settings};
use crate::support::log_socket::{Dialer, Remote, Tls};

logger_settings! {
    queue_name: "tcp logger";
    /// The server's name or address.
    host: String,
    /// Its port.
    port: u16,
    /// Speak TLS.
    #[serde(default)]
    tls: bool,
    /// The name that the server's certificate is checked for, in place of `host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tls_options: Option<String>,
    /// Extension: check the certificate of the server.
    #[serde(default = "crate::support::log_settings::yes")]
    ssl_verify: bool,
    /// Milliseconds that it may take to send a batch.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(999)
}

/// The plugin.
pub struct TcpLogger;

impl Definition for TcpLogger {
    const NAME: &'static str = "tcp-logger";
    const PRIORITY: i32 = 405;
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
        let tls =
            Tls { verify: config.ssl_verify, name: config.tls_options.as_deref(), pointer: "/tls" };
        let dialer = Dialer::new(Remote::new(&config.host, config.port), config.tls.then_some(tls), env)?;
        let settings = config.batch_settings(
            metadata.max_pending_entries,
            Duration::from_millis(config.timeout.get().into()),
        );
        let sink = Server { dialer, single: config.batch_max_size == NonZeroU32::MIN };
        let queue = batch::shared(env, Self::NAME, &config, settings, sink)?;
        Logger::register(recorder, Plain, queue, hooks);
        Ok(())
    }
}

struct Server {
    dialer: Dialer,
    single: bool,
}

impl Sink for Server {
    type Entry = Fields;

    async fn send(&self, batch: &[Fields]) -> Result<(), Failure> {
        let text = json_batch(batch, self.single);
        let sent = async {
            let mut stream = self.dialer.dial().await?;
            stream.write_all(text.as_bytes()).await?;
            stream.shutdown().await
        };
        sent.await.map_err(|error: std::io::Error| Failure::retryable(format!("{}: {error}", self.dialer.told())))
    }
}

#[cfg(test)]
mod tests {
    use layers::telemetry::log_shipping::Loss;
    use layers::testing::{TestEnv, exchange};
    use serde_json::{Value, json};
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;
    use crate::support::log_sink::{HttpSink, answered};

    async fn log(env: &TestEnv, config: &Value, requests: usize) {
        let mut chain = env.chain::<TcpLogger, _>(config, answered).unwrap();
        for number in 0..requests {
            drop(chain.run(exchange("GET", &format!("http://a.com/{number}")).build()).await);
        }
    }

    #[tokio::test]
    async fn a_batch_is_a_connection() {
        let format = json!({"uri": "$uri"});
        for (size, expected) in [(1, json!({"uri": "/0"})), (2, json!([{"uri": "/0"}, {"uri": "/1"}]))] {
            let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = server.local_addr().unwrap().port();
            let config =
                json!({"host": "localhost", "port": port, "batch_max_size": size, "log_format": format});
            log(&TestEnv::default(), &config, size).await;
            let (mut stream, _) = server.accept().await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn the_certificate_is_checked_unless_the_settings_say_otherwise() {
        let (server, port, certificate) = crate::support::log_sink::tls_listener().await;
        let server = std::sync::Arc::new(server);
        // Each case: is the authority known, is the certificate checked, does it arrive.
        for (known, verify, arrives) in [(true, true, true), (false, true, false), (false, false, true)] {
            let roots = if known { vec![certificate.clone()] } else { Vec::new() };
            let env = TestEnv { roots, ..TestEnv::default() };
            let config = json!({
                "host": "127.0.0.1", "port": port, "tls": true, "tls_options": "localhost", "ssl_verify": verify,
                "batch_max_size": 1, "log_format": {"a": "b"},
            });
            if !known && verify {
                // Nothing is trusted: such a setting cannot work at all.
                assert_eq!(env.build::<TcpLogger>(&config).unwrap_err()[0].pointer, "/tls");
                continue;
            }
            let accepting = tokio::spawn({
                let server = server.clone();
                async move { server.text().await }
            });
            log(&env, &config, 1).await;
            let text = tokio::time::timeout(Duration::from_secs(10), accepting).await.unwrap().unwrap();
            assert_eq!(text, "{\"a\":\"b\"}", "{known} {verify}");
            assert!(arrives);
        }
    }

    #[tokio::test]
    async fn nobody_there_loses_the_batch() {
        let env = TestEnv::default();
        // Bound, so that nobody else gets the port.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = socket.local_addr().unwrap().port();
        log(&env, &json!({"host": "127.0.0.1", "port": port, "batch_max_size": 1}), 1).await;
        let counts = env.metrics.logs.counts("tcp-logger");
        HttpSink::start(200).await.until(|| counts.losses(Loss::Refused) == 1).await;
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"host": "a"}), ""),
            (json!({"host": "", "port": 1}), "/host"),
            (json!({"host": "a b", "port": 1}), "/host"),
            (json!({"host": "a", "port": 65_536}), "/port"),
            (json!({"host": "a", "port": 1, "timeout": 0}), "/timeout"),
            (json!({"host": "a", "port": 1, "tls": true, "ssl_verify": false, "tls_options": "-"}), "/tls"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<TcpLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
