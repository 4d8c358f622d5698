//! `file-logger`: writes a line of JSON for each request into a file.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. Lines are written by the control side, in their
//! order; the file is opened again after SIGUSR1, and when it was renamed or removed.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::num::NonZeroU32;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use config::error::ConfigError;
use config::expr::Expr;
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use layers::telemetry::metrics::Metrics;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::batch::{self, BatchSettings, Failure, Sink};
use crate::support::log_entry::{Fields, LogFormat, Logger, MetadataFormats, Plain, Recorder, check_expr, line};
use crate::support::log_settings::logger_settings;

logger_settings! {
    /// The file. A relative path begins where the gateway was started. Without it that of the plugin's metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    /// Write lines only for requests for which this expression over variables holds.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    only: Option<Vec<Value>>,
}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The file, where a plugin has no `path` of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    /// The fields of entries, where a plugin has no `log_format` of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log_format: Option<LogFormat>,
    /// Fields added to the default entry, where a plugin has no `log_format_extra` of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log_format_extra: Option<LogFormat>,
    /// Entries that may wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_pending_entries: Option<NonZeroU32>,
}

/// The plugin.
pub struct FileLogger;

impl Definition for FileLogger {
    const NAME: &'static str = "file-logger";
    const PRIORITY: i32 = 399;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.checked_metadata::<Metadata>(|metadata| empty(metadata.path.as_deref()).into_iter().collect());
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        errors.extend(empty(config.path.as_deref()));
        errors.extend(config.only.as_ref().filter(|only| !only.is_empty()).and_then(|only| check_expr(only, "/match")));
        if config.only.as_ref().is_some_and(|only| only.len() > 20) {
            errors.push(ConfigError::invalid("/match", "write at most 20 conditions"));
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = env.metadata.and_then(|value| Metadata::deserialize(value).ok()).unwrap_or_default();
        let Some(path) = config.path.as_ref().or(metadata.path.as_ref()) else {
            return Err(ConfigError::invalid("/path", "write a path here or into plugin_metadata/file-logger"));
        };
        let formats = MetadataFormats {
            log_format: metadata.log_format.as_ref(),
            log_format_extra: metadata.log_format_extra.as_ref(),
        };
        let mut recorder = Recorder::new(config.entry_settings(), formats, env)?;
        let only = config.only.as_ref().map(|only| Expr::parse(&Value::Array(only.clone()))).transpose();
        recorder.only = only.map_err(|error| error.under("/match"))?;
        let settings = BatchSettings {
            name: Self::NAME.to_owned(),
            size: 1000,
            // Whatever has arrived is written at once.
            idle: Duration::ZERO,
            age: Duration::ZERO,
            // A full disk may have room again in a moment.
            retries: 3,
            pause: Duration::from_secs(1),
            pending: metadata.max_pending_entries.map(|n| n.get() as usize),
            timeout: Duration::from_secs(30),
            at_once: 1,
        };
        let sink = Lines(Arc::new(Place {
            path: PathBuf::from(path),
            open: Mutex::new(None),
            metrics: env.metrics.clone(),
        }));
        // Formats differ, and lines of one file keep their order all the same.
        let queue = batch::shared(env, Self::NAME, path, settings, sink)?;
        Logger::register(recorder, Plain, queue, hooks);
        Ok(())
    }
}

fn empty(path: Option<&str>) -> Option<ConfigError> {
    path.filter(|path| path.is_empty()).map(|_| ConfigError::invalid("/path", "write the path of a file"))
}

/// The file's place.
struct Place {
    path: PathBuf,
    open: Mutex<Option<Open>>,
    metrics: Arc<Metrics>,
}

/// An open file, and how it is known again.
struct Open {
    file: File,
    id: (u64, u64),
    reopened: u64,
}

struct Lines(Arc<Place>);

impl Sink for Lines {
    type Entry = Fields;

    async fn send(&self, batch: &[Fields]) -> Result<(), Failure> {
        let mut text = String::new();
        for fields in batch {
            text.push_str(&line(fields));
            text.push('\n');
        }
        let place = self.0.clone();
        let path = self.0.path.display();
        match tokio::task::spawn_blocking(move || place.write(text.as_bytes())).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::retryable(format!("{path}: {error}"))),
            Err(error) => Err(Failure::permanent(error.to_string())),
        }
    }
}

impl Place {
    /// Appends whole lines. Runs where it may block.
    fn write(&self, text: &[u8]) -> io::Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let reopened = self.metrics.logs.reopened();
        let same = |open: &Open| open.reopened == reopened && id(&self.path).is_ok_and(|id| id == open.id);
        let mut current = match open.take().filter(same) {
            Some(current) => current,
            None => {
                let file = OpenOptions::new().create(true).append(true).open(&self.path)?;
                let metadata = file.metadata()?;
                Open { file, id: (metadata.dev(), metadata.ino()), reopened }
            }
        };
        current.file.write_all(text)?;
        *open = Some(current);
        Ok(())
    }
}

fn id(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::json;

    use super::*;

    /// A file of this test, and a way to wait for its lines.
    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        async fn lines(&self, name: &str, count: usize) -> Vec<Value> {
            let read = async {
                loop {
                    let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
                    if text.lines().count() >= count && text.ends_with('\n') {
                        return text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), read).await.unwrap()
        }
    }

    #[tokio::test]
    async fn a_line_for_each_request_that_fits() {
        let folder = Folder::new();
        let config = json!({
            "path": folder.path("a.log"),
            "match": [["arg_name", "==", "jack"]],
            "log_format": {"host": "$host", "who": "$arg_name", "fixed": "x"},
        });
        let mut chain = TestEnv::default().chain::<FileLogger, _>(&config, |_| Ok(())).unwrap();
        for uri in ["http://a.com/?name=jack", "http://a.com/?name=rose", "http://b.com/?name=jack"] {
            drop(chain.run(exchange("GET", uri).build()).await);
        }
        let lines = folder.lines("a.log", 2).await;
        let line = |host: &str| json!({"host": host, "who": "jack", "fixed": "x"});
        assert_eq!(lines, [line("a.com"), line("b.com")]);
    }

    #[tokio::test]
    async fn the_file_may_stand_in_the_metadata() {
        let folder = Folder::new();
        let metadata = json!({"path": folder.path("shared.log"), "log_format": {"host": "$host"}});
        let env = TestEnv { metadata: Some(metadata), ..TestEnv::default() };
        for config in [json!({}), json!({"path": folder.path("own.log")})] {
            let mut chain = env.chain::<FileLogger, _>(&config, |_| Ok(())).unwrap();
            drop(chain.run(exchange("GET", "http://a.com/").build()).await);
        }
        for name in ["shared.log", "own.log"] {
            assert_eq!(folder.lines(name, 1).await, [json!({"host": "a.com"})], "{name}");
        }
        let errors = TestEnv::default().build::<FileLogger>(&json!({})).unwrap_err();
        assert_eq!(errors[0].pointer, "/path");
    }

    #[tokio::test]
    async fn bodies_are_told_as_they_passed() {
        let folder = Folder::new();
        let config = json!({
            "path": folder.path("a.log"), "include_req_body": true, "include_resp_body": true, "max_resp_body_bytes": 3,
        });
        let mut chain = TestEnv::default()
            .chain::<FileLogger, _>(&config, |x| {
                *x.response.body_mut() = "answer".into();
                Ok(())
            })
            .unwrap();
        let mut x = chain.run(exchange("POST", "http://a/").body("asked").build()).await;
        assert_eq!(text(&mut x).await, "answer");
        drop(x);
        let line = &folder.lines("a.log", 1).await[0];
        assert_eq!((&line["request"]["body"], &line["response"]["body"]), (&json!("asked"), &json!("ans")));
    }

    #[tokio::test]
    async fn a_file_that_was_renamed_or_is_to_be_reopened_is_left() {
        let folder = Folder::new();
        let env = TestEnv::default();
        let config = json!({"path": folder.path("a.log"), "log_format": {"uri": "$uri"}});
        let mut chain = env.chain::<FileLogger, _>(&config, |_| Ok(())).unwrap();
        let mut line = async |uri: &str| drop(chain.run(exchange("GET", &format!("http://a{uri}")).build()).await);
        line("/1").await;
        folder.lines("a.log", 1).await;
        std::fs::rename(folder.path("a.log"), folder.path("b.log")).unwrap();
        line("/2").await;
        assert_eq!(folder.lines("a.log", 1).await, [json!({"uri": "/2"})]);
        env.metrics.logs.reopen();
        line("/3").await;
        assert_eq!(folder.lines("a.log", 2).await[1], json!({"uri": "/3"}));
        assert_eq!(folder.lines("b.log", 1).await, [json!({"uri": "/1"})]);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), "/path"),
            (json!({"path": ""}), "/path"),
            (json!({"path": "a", "match": [["a"]]}), "/match/0"),
            (json!({"path": "a", "include_req_body_expr": []}), "/include_req_body_expr"),
            (json!({"path": "a", "max_req_body_bytes": 0}), "/max_req_body_bytes"),
            (json!({"path": "a", "log_format": {"a": {"b": "$"}}}), "/log_format/a/b"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<FileLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
