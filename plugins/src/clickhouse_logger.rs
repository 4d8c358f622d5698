//! `clickhouse-logger`: inserts entries into a table of ClickHouse.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. A batch is one `INSERT` in the format
//! `JSONEachRow`.

use std::num::NonZeroU32;
use std::time::Duration;

use config::error::ConfigError;
use config::sensitive::Sensitive;
use http::{HeaderName, HeaderValue, header};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};

use crate::support::batch::{self, Failure, Sink};
use crate::support::log_entry::{Fields, Logger, Metadata, Plain, Recorder, line};
use crate::support::log_http::{Call, Post, credential, listed, servers};
use crate::support::log_settings::logger_settings;

logger_settings! {
    queue_name: "clickhouse logger";
    /// The URL of the server; `endpoint_addrs` is its newer form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    endpoint_addr: Option<String>,
    /// URLs of the servers; each batch goes to one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    endpoint_addrs: Option<Vec<String>>,
    /// The user.
    user: String,
    /// The password.
    #[schemars(extend("x-encrypted" = true))]
    password: Sensitive<0>,
    /// The database.
    database: String,
    /// The table.
    logtable: String,
    /// Seconds that a call may take.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
    /// Check the certificate of the server.
    #[serde(default = "crate::support::log_settings::yes")]
    ssl_verify: bool,
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(2)
}

/// The plugin.
pub struct ClickhouseLogger;

impl Definition for ClickhouseLogger {
    const NAME: &'static str = "clickhouse-logger";
    const PRIORITY: i32 = 398;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        errors.extend(addresses(config).and_then(|list| servers(list, "")).err());
        errors.extend(check_table(&config.logtable, "/logtable").err());
        errors.extend(Table::check_access(access(config)).err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let call = Call::within(config.ssl_verify, Duration::from_secs(config.timeout.get().into()));
        let table = Table::new(
            Post::new(servers(addresses(&config)?, "")?, call, env)?,
            &config.logtable,
            access(&config),
        )?;
        let settings = config.batch_settings(metadata.max_pending_entries, call.attempt());
        let queue = batch::shared(env, Self::NAME, &config, settings, Entries(table))?;
        Logger::register(recorder, Plain, queue, hooks);
        Ok(())
    }
}

fn access(config: &Config) -> [(&str, &str); 3] {
    [(&config.user, "/user"), (config.password.reveal(), "/password"), (&config.database, "/database")]
}

fn addresses(config: &Config) -> Result<Vec<(String, &str)>, ConfigError> {
    match (&config.endpoint_addr, &config.endpoint_addrs) {
        (Some(one), None) => Ok(vec![("/endpoint_addr".to_owned(), one.as_str())]),
        (None, Some(list)) if !list.is_empty() => Ok(listed("/endpoint_addrs", list).collect()),
        (None, Some(_)) => Err(ConfigError::invalid("/endpoint_addrs", "write at least one URL")),
        (None, None) => Err(ConfigError::invalid("", "write `endpoint_addrs`")),
        (Some(_), Some(_)) => {
            Err(ConfigError::invalid("", "write one of `endpoint_addr` and `endpoint_addrs`"))
        }
    }
}

/// Refuses what would be more than the name of a table.
pub(crate) fn check_table(table: &str, pointer: &str) -> Result<(), ConfigError> {
    let fits = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '`' | '"');
    if table.is_empty() || !table.chars().all(fits) {
        return Err(ConfigError::invalid(pointer, "write the name of a table"));
    }
    Ok(())
}

/// A table that rows are inserted into.
pub(crate) struct Table {
    post: Post,
    insert: String,
}

impl Table {
    /// The table of that name, for the user, with the password, in the database of `access`.
    pub(crate) fn new(post: Post, table: &str, access: [(&str, &str); 3]) -> Result<Self, ConfigError> {
        let names = ["x-clickhouse-user", "x-clickhouse-key", "x-clickhouse-database"];
        let mut post = post.field(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, (value, pointer)) in names.into_iter().zip(access) {
            post = post.credential(HeaderName::from_static(name), value, pointer)?;
        }
        Ok(Self { post, insert: format!("INSERT INTO {table} FORMAT JSONEachRow ") })
    }

    /// Refuses a user, a password or a database that cannot be sent.
    pub(crate) fn check_access(access: [(&str, &str); 3]) -> Result<(), ConfigError> {
        access.into_iter().try_for_each(|(value, pointer)| credential(value, pointer).map(drop))
    }

    /// Inserts rows that are JSON.
    pub(crate) async fn insert(&self, rows: impl Iterator<Item = String>) -> Result<(), Failure> {
        let rows: Vec<_> = rows.collect();
        self.post.deliver(self.insert.clone() + &rows.join(" "), 400).await
    }
}

struct Entries(Table);

impl Sink for Entries {
    type Entry = Fields;

    async fn send(&self, batch: &[Fields]) -> Result<(), Failure> {
        self.0.insert(batch.iter().map(line)).await
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;
    use crate::support::log_sink::{HttpSink, answered};

    #[tokio::test]
    async fn a_batch_is_an_insert() {
        let sink = HttpSink::start(200).await;
        let config = json!({
            "endpoint_addrs": [sink.url("/?a=1")], "user": "u", "password": "p", "database": "d", "logtable": "t",
            "batch_max_size": 2, "log_format": {"uri": "$uri"},
        });
        let mut chain = TestEnv::default().chain::<ClickhouseLogger, _>(&config, answered).unwrap();
        for uri in ["http://a/1", "http://a/2"] {
            drop(chain.run(exchange("GET", uri).build()).await);
        }
        let got = sink.requests(1).await.remove(0);
        assert_eq!(got.text(), "INSERT INTO t FORMAT JSONEachRow {\"uri\":\"/1\"} {\"uri\":\"/2\"}");
        assert_eq!(got.target, "/?a=1");
        for (field, value) in [("user", "u"), ("key", "p"), ("database", "d")] {
            assert_eq!(got.field(&format!("x-clickhouse-{field}")), value);
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"endpoint_addr": "http://a", "endpoint_addrs": ["http://a"]}), ""),
            (json!({"endpoint_addr": "a"}), "/endpoint_addr"),
            (json!({"endpoint_addrs": []}), "/endpoint_addrs"),
            (json!({"endpoint_addr": "http://a", "logtable": "t; DROP TABLE t"}), "/logtable"),
            (json!({"endpoint_addr": "http://a", "user": "a\nb"}), "/user"),
        ];
        for (mut config, pointer) in cases {
            for name in ["user", "password", "database", "logtable"] {
                let settings = config.as_object_mut().unwrap();
                settings.entry(name).or_insert_with(|| name.into());
            }
            let errors = TestEnv::default().build::<ClickhouseLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
