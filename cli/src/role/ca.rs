//! `postern ca`: the certificate authority of a mesh, and its join tokens.

mod audit;
mod outside;
mod run;
mod status;
mod store;
mod token;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use config::ca::Ca as Settings;
use config::env::ProcessEnv;

use crate::output;

/// The socket for operators, in the data directory.
const SOCKET: &str = "operators.sock";
/// The log of what was decided, in the data directory.
const AUDIT: &str = "audit.log";

/// Arguments of `postern ca`.
#[derive(Args)]
pub struct Ca {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the certificate authority of a mesh.
    Run(run::Run),
    /// Make, list and delete join tokens, by which workloads get their first certificate.
    Token(token::Token),
    /// Look after the log of what the authority decided.
    Audit(audit::Audit),
}

/// Where the settings are.
#[derive(Args)]
struct Place {
    /// The directory with `ca.yaml`, or the file itself; without one everything has its default.
    #[arg(short, long, value_name = "DIR", default_value = ".", env = "POSTERN_CA_CONFIG")]
    config: PathBuf,
}

impl Ca {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Run(command) => command.run(),
            Command::Token(command) => command.run(),
            Command::Audit(command) => command.run(),
        }
    }
}

/// The settings, or the exit code after everything that is wrong was told.
fn settings(config: &Path) -> Result<Settings, ExitCode> {
    Settings::load(config, &ProcessEnv).map_err(|errors| {
        errors.iter().for_each(|error| output::problem(&error.to_string()));
        output::problem(&format!("{} found; nothing was done", output::count(errors.len(), "error")));
        ExitCode::from(output::FOUND)
    })
}
