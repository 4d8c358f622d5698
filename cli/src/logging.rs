//! The process's own log: standard error, at the level of `nginx_config.error_log_level` or `POSTERN_LOG`.

use std::fmt::{Debug, Write};
use std::io::{self, IsTerminal};
use std::time::SystemTime;

use config::process::{LogLevel, Process};
use layers::telemetry::{error_log, time};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Starts logging. `POSTERN_LOG` (`debug`, `layers=trace,info`) wins over the configuration.
pub fn start(process: &Process) {
    let level = match process.log_level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
    };
    start_at(level);
}

/// As [`start`], at this level.
pub fn start_at(level: &str) {
    let filter = EnvFilter::try_from_env("POSTERN_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let written =
        tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    // A second start in one process (tests) keeps the first logger.
    let _ = tracing_subscriber::registry().with(filter).with(written).with(ReadAlong).try_init();
}

/// Hands every line that is written to who reads along, in the form of nginx's error log.
struct ReadAlong;

impl<S: Subscriber> Layer<S> for ReadAlong {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let about = event.metadata();
        error_log::tell(*about.level(), about.target(), || {
            let mut words = Words { message: String::new(), fields: String::new() };
            event.record(&mut words);
            let at = time::strftime(SystemTime::now(), "%Y/%m/%d %H:%M:%S").unwrap_or_default();
            let level = about.level().as_str().to_ascii_lowercase();
            let (process, target) = (std::process::id(), about.target());
            format!("{at} [{level}] {process}#0: {target}: {}{}", words.message, words.fields)
        });
    }
}

/// The message of an event, and its other fields behind it.
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
