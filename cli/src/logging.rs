//! The process's own log: standard error, at the level of `nginx_config.error_log_level` or `POSTERN_LOG`.

use std::io::IsTerminal;

use config::process::{LogLevel, Process};
use tracing_subscriber::EnvFilter;

/// Starts logging. `POSTERN_LOG` (`debug`, `layers=trace,info`) wins over the configuration.
pub fn start(process: &Process) {
    let level = match process.log_level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
    };
    let filter = EnvFilter::try_from_env("POSTERN_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let logger = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A second start in one process (tests) keeps the first logger.
    let _ = logger.try_init();
}
