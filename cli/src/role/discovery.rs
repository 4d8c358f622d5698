//! `postern discovery serve`: watches registries for many clients.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use config::env::ProcessEnv;
use config::process::Process;

use crate::output::{self, Colour};

/// Arguments of `postern discovery`.
#[derive(Args)]
pub struct Discovery {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Watch the registries of a configuration, for gateways that ask this process instead of them.
    Serve(Serve),
}

/// Arguments of `postern discovery serve`.
#[derive(Args)]
struct Serve {
    /// The directory with `config.yaml`, or the file itself: `discovery` and `postern.discovery_server` are read.
    #[arg(short, long, value_name = "DIR", default_value = ".", env = "POSTERN_CONFIG")]
    config: PathBuf,
}

impl Discovery {
    /// Runs the role.
    pub fn run(self) -> Result<ExitCode> {
        let Command::Serve(Serve { config }) = self.command;
        let process = match Process::load(&config, &ProcessEnv) {
            Ok(process) => process,
            Err(errors) => {
                errors.iter().for_each(|error| output::problem(&error.to_string()));
                output::problem(&format!(
                    "{} found; nothing was started",
                    output::count(errors.len(), "error")
                ));
                return Ok(ExitCode::from(output::FOUND));
            }
        };
        crate::logging::start(&process);
        edge::discovery_server::run(process, |address| {
            output::note(&format!("{:<8} {address}", "gRPC"));
        })?;
        output::note(&output::paint("stopped", Colour::Dim, false));
        Ok(ExitCode::from(output::OK))
    }
}
