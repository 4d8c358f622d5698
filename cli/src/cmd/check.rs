//! `postern check`: every error of a configuration directory, with file, line and JSON pointer.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use config::env::{Env, ProcessEnv};
use config::process::Process;
use serde_json::json;

use crate::output::{self, Colour, Format, line, painted};

/// Arguments of `postern check`.
#[derive(Args)]
#[command(
    after_help = "Reads config.yaml, and apisix.yaml or apisix.json beside it. References between objects are \
                        checked too.\n\nExit codes: 0 nothing is wrong, 1 something is."
)]
pub struct Check {
    /// The directory, or its config.yaml.
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Text or JSON.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Check {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        anyhow::ensure!(
            self.dir.exists(),
            "{} does not exist: name the directory of config.yaml",
            self.dir.display()
        );
        // With a config.yaml that cannot be read every plugin counts as offered; its own errors are told anyway.
        let process = Process::load(&self.dir, &ProcessEnv).ok();
        let catalog = process.as_ref().map_or_else(plugins::Catalog::default, edge::settings::catalog);
        let env: Arc<dyn Env + Send + Sync> = Arc::new(ProcessEnv);
        let report = config::check_directory(&self.dir, &catalog, &env);
        match self.output {
            Format::Json => output::json(&json!({
                "ok": report.is_clean(),
                "files": report.files,
                "resources": report.resources,
                "errors": report.errors.iter().map(|error| json!({
                    "file": *error.file,
                    "line": error.line,
                    "column": error.column,
                    "pointer": error.error.pointer,
                    "error": error.error.kind.to_string(),
                })).collect::<Vec<_>>(),
                "not_applicable": report.notices.iter().map(|notice| json!({
                    "line": notice.line,
                    "pointer": notice.pointer,
                    "reason": notice.reason,
                })).collect::<Vec<_>>(),
            })),
            Format::Text => {
                for error in &report.errors {
                    line(format_args!("{} {error}", painted("error:", Colour::Red)));
                }
                for notice in &report.notices {
                    line(format_args!("{} config.yaml {notice}", painted("not applicable:", Colour::Dim)));
                }
                let read = output::count(report.resources, "resource");
                let wrong = output::count(report.errors.len(), "error");
                let verdict = if report.is_clean() { Colour::Green } else { Colour::Red };
                line(format_args!("{}: {read}, {}", self.dir.display(), painted(&wrong, verdict)));
            }
        }
        Ok(ExitCode::from(if report.is_clean() { output::OK } else { output::FOUND }))
    }
}
