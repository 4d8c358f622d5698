//! `loggly`: sends entries to SolarWinds Loggly, as messages of syslog or by its bulk interface.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. Where they are sent to stands in
//! `plugin_metadata`.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::{Duration, SystemTime};

use config::error::{ConfigError, escape};
use config::sensitive::Sensitive;
use http::{HeaderName, HeaderValue, header};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::batch::{self, Failure, Sink};
use crate::support::log_entry::{
    Fields, LogFormat, Logger, Make, MetadataFormats, Recorder, View, line, weight,
};
use crate::support::log_http::{Call, Post, refused, servers};
use crate::support::log_settings::logger_settings;
use crate::support::log_socket::{DATAGRAM, Remote};
use crate::support::rfc5424;

/// Facility `user`.
const FACILITY: u8 = 8;
/// Loggly's number among private enterprises.
const ENTERPRISE: u32 = 41_058;

logger_settings! {
    queue_name: "loggly";
    /// The token of the customer.
    #[schemars(extend("x-encrypted" = true))]
    customer_token: Sensitive,
    /// The severity of messages.
    #[serde(default)]
    severity: Severity,
    /// The severity by the status of the answer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    severity_map: BTreeMap<String, Severity>,
    /// Tags of the messages.
    #[serde(default = "tags")]
    #[schemars(length(min = 1))]
    tags: Vec<String>,
    /// Check the certificate of the server.
    #[serde(default = "crate::support::log_settings::yes")]
    ssl_verify: bool,
}

fn tags() -> Vec<String> {
    vec!["apisix".to_owned()]
}

/// A severity of syslog, in APISIX's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Severity {
    #[serde(alias = "emegr")]
    Emegr,
    #[serde(alias = "alert")]
    Alert,
    #[serde(alias = "crit")]
    Crit,
    #[serde(alias = "err")]
    Err,
    #[serde(alias = "warning")]
    Warning,
    #[serde(alias = "notice")]
    Notice,
    #[default]
    #[serde(alias = "info")]
    Info,
    #[serde(alias = "debug")]
    Debug,
}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The server's name.
    #[serde(default = "host")]
    host: String,
    /// Its port, for `syslog`.
    #[serde(default = "port")]
    port: u16,
    /// How entries travel.
    #[serde(default)]
    protocol: Protocol,
    /// Milliseconds that it may take to send a batch.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
    /// The fields of entries, where a plugin has no `log_format` of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log_format: Option<LogFormat>,
    /// Fields added to the default entry, where a plugin has no `log_format_extra` of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log_format_extra: Option<LogFormat>,
    /// Entries that may wait, where a plugin does not say it itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_pending_entries: Option<NonZeroU32>,
}

fn host() -> String {
    "logs-01.loggly.com".to_owned()
}

fn port() -> u16 {
    514
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(4999)
}

impl Default for Metadata {
    fn default() -> Self {
        Self {
            host: host(),
            port: port(),
            protocol: Protocol::default(),
            timeout: timeout(),
            log_format: None,
            log_format_extra: None,
            max_pending_entries: None,
        }
    }
}

/// How entries travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// As messages of syslog, in datagrams.
    #[default]
    Syslog,
    /// By the bulk interface.
    Http,
    /// By the bulk interface, with TLS.
    Https,
}

/// The plugin.
pub struct Loggly;

impl Definition for Loggly {
    const NAME: &'static str = "loggly";
    const PRIORITY: i32 = 411;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        let token = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if !config.customer_token.reveal().chars().all(token) {
            errors.push(ConfigError::invalid("/customer_token", "a token has letters, digits and `-`"));
        }
        if config.tags.is_empty() {
            errors.push(ConfigError::invalid("/tags", "write at least one tag"));
        }
        for (index, tag) in config.tags.iter().enumerate() {
            let odd = |c: char| !(' '..='~').contains(&c) || matches!(c, '"' | '\\' | ']' | ',');
            if tag.starts_with("tag=") || tag.contains(odd) {
                let problem = "write printable ASCII without `\"`, `\\`, `]` and `,`, not beginning with `tag=`";
                errors.push(ConfigError::invalid(format!("/tags/{index}"), problem));
            }
        }
        for status in config.severity_map.keys() {
            if !status.parse::<u16>().is_ok_and(|status| (100..600).contains(&status)) {
                let pointer = format!("/severity_map/{}", escape(status));
                errors.push(ConfigError::invalid(pointer, "a status is a number from 100 to 599"));
            }
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = env.metadata.and_then(|value| Metadata::deserialize(value).ok()).unwrap_or_default();
        let formats = MetadataFormats {
            log_format: metadata.log_format.as_ref(),
            log_format_extra: metadata.log_format_extra.as_ref(),
        };
        let recorder = Recorder::new(config.entry_settings(), formats, env)?;
        let timeout = Duration::from_millis(metadata.timeout.get().into());
        let token = config.customer_token.reveal();
        let way = match metadata.protocol {
            Protocol::Syslog => {
                let tags: Vec<_> = config.tags.iter().map(|tag| format!("tag=\"{tag}\"")).collect();
                let data = format!("[{token}@{ENTERPRISE} {}]", tags.join(" "));
                Way::Syslog(Remote::new(&metadata.host, metadata.port), data)
            }
            Protocol::Http | Protocol::Https => {
                let scheme = if metadata.protocol == Protocol::Http { "http" } else { "https" };
                let host = match metadata.host.starts_with("http") {
                    true => metadata.host.trim_end_matches('/').to_owned(),
                    false => format!("{scheme}://{}", metadata.host),
                };
                let servers = servers([(String::new(), &*host)], &format!("/bulk/{token}/tag/bulk"))?;
                let post = Post::new(servers, Call::within(config.ssl_verify, timeout), env)?
                    .field(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))
                    .credential(HeaderName::from_static("x-loggly-tag"), &config.tags.join(","), "/tags")?;
                Way::Bulk(post)
            }
        };
        let severities = config
            .severity_map
            .iter()
            .filter_map(|(status, severity)| Some((status.parse().ok()?, *severity)))
            .collect();
        let messages = Messages { severity: config.severity, by_status: severities };
        let call = Call::within(true, timeout);
        let settings = config.batch_settings(metadata.max_pending_entries, call.attempt());
        let queue = batch::shared(env, Self::NAME, &config, settings, Server(way))?;
        Logger::register(recorder, messages, queue, hooks);
        Ok(())
    }
}

/// The severities of messages.
struct Messages {
    severity: Severity,
    by_status: BTreeMap<u16, Severity>,
}

/// An entry, and what its message says besides.
struct Entry {
    at: SystemTime,
    host: String,
    severity: Severity,
    fields: Fields,
}

impl Make for Messages {
    type Entry = Entry;

    fn make(&self, recorder: &Recorder, view: &View<'_>) -> (Entry, usize) {
        let x = view.exchange();
        let (host, fields) = (x.host.to_string(), recorder.fields(view));
        let severity = self.by_status.get(&x.status()).copied().unwrap_or(self.severity);
        let bytes = weight(&fields) + host.len();
        (Entry { at: SystemTime::now(), host, severity, fields }, bytes)
    }
}

struct Server(Way);

enum Way {
    /// Where to, and the structured data of each message.
    Syslog(Remote, String),
    Bulk(Post),
}

impl Sink for Server {
    type Entry = Entry;

    async fn send(&self, batch: &[Entry]) -> Result<(), Failure> {
        match &self.0 {
            Way::Syslog(remote, data) => {
                let failed =
                    |error: std::io::Error| Failure::retryable(format!("{}: {error}", remote.told()));
                let socket = remote.udp().await.map_err(failed)?;
                let mut refused = 0;
                for Entry { at, host, severity, fields } in batch {
                    let message = rfc5424::message(FACILITY + *severity as u8, *at, host, data, &line(fields));
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
            Way::Bulk(post) => {
                let lines: Vec<_> = batch.iter().map(|entry| line(&entry.fields)).collect();
                let answer = post.send(lines.join("\n")).await?;
                if answer.status() == http::StatusCode::OK { Ok(()) } else { Err(refused(&answer)) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;
    use tokio::net::UdpSocket;

    use super::*;
    use crate::support::log_sink::{HttpSink, answered};

    #[tokio::test]
    async fn a_message_has_token_tags_and_the_severity_of_its_status() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let metadata = Some(json!({"host": "127.0.0.1", "port": port}));
        let env = TestEnv { metadata, ..TestEnv::default() };
        let config = json!({
            "customer_token": "abc-1", "tags": ["x", "y"], "severity": "err", "severity_map": {"200": "DEBUG"},
            "batch_max_size": 1, "log_format": {"uri": "$uri"},
        });
        let mut chain = env.chain::<Loggly, _>(&config, answered).unwrap();
        drop(chain.run(exchange("GET", "http://a.com/1").build()).await);
        let mut datagram = [0; 4096];
        let receive = server.recv(&mut datagram);
        let length = tokio::time::timeout(Duration::from_secs(10), receive).await.unwrap().unwrap();
        let text = std::str::from_utf8(&datagram[..length]).unwrap();
        assert!(text.starts_with("<15>1 20"), "{text}");
        let process = std::process::id();
        let end = format!("Z a.com apisix {process} - [abc-1@41058 tag=\"x\" tag=\"y\"] {{\"uri\":\"/1\"}}");
        assert!(text.ends_with(&end), "{text}");
    }

    #[tokio::test]
    async fn the_bulk_interface_takes_lines() {
        let sink = HttpSink::start(200).await;
        let metadata = Some(json!({"host": sink.url(""), "protocol": "http"}));
        let env = TestEnv { metadata, ..TestEnv::default() };
        let config = json!({"customer_token": "abc", "batch_max_size": 2, "log_format": {"uri": "$uri"}});
        let mut chain = env.chain::<Loggly, _>(&config, answered).unwrap();
        for uri in ["http://a/1", "http://a/2"] {
            drop(chain.run(exchange("GET", uri).build()).await);
        }
        let got = sink.requests(1).await.remove(0);
        assert_eq!((got.target.as_str(), got.field("x-loggly-tag")), ("/bulk/abc/tag/bulk", "apisix"));
        assert_eq!(got.text(), "{\"uri\":\"/1\"}\n{\"uri\":\"/2\"}");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (config, pointer) in [
            (json!({}), ""),
            (json!({"customer_token": "a]b"}), "/customer_token"),
            (json!({"customer_token": "a", "tags": []}), "/tags"),
            (json!({"customer_token": "a", "tags": ["tag=a"]}), "/tags/0"),
            (json!({"customer_token": "a", "severity": "loud"}), "/severity"),
            (json!({"customer_token": "a", "severity_map": {"600": "ERR"}}), "/severity_map/600"),
        ] {
            let errors = TestEnv::default().build::<Loggly>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
