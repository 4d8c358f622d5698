//! `postern signer`: holds private keys of certificates, and signs handshakes of gateways with them.

mod run;
mod seal;
mod status;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use certs::ca::seal::Sealer;
use clap::{Args, Subcommand};
use config::env::ProcessEnv;
use config::signer::Signer as Settings;

use crate::{output, role};

/// Arguments of `postern signer`.
#[derive(Args)]
pub struct Signer {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sign handshakes of gateways until told to stop.
    Run(run::Run),
    /// Encrypt a private key for the directory of keys.
    Seal(seal::Seal),
}

/// Where the settings are.
#[derive(Args)]
struct Place {
    /// `signer.yaml`, or the directory that it is in.
    #[arg(short, long, value_name = "FILE", default_value = ".", env = "POSTERN_SIGNER_CONFIG")]
    config: PathBuf,
}

impl Signer {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Run(command) => command.run(),
            Command::Seal(command) => command.run(),
        }
    }
}

/// The settings, or the exit code after everything that is wrong was told.
fn settings(config: &Path) -> Result<Settings, ExitCode> {
    Settings::load(config, &ProcessEnv).map_err(|errors| {
        errors.iter().for_each(|error| output::problem(&error.to_string()));
        let errors = output::count(errors.len(), "error");
        output::problem(&format!(
            "{errors} found; nothing was done. `postern signer run --help` has an example"
        ));
        ExitCode::from(output::FOUND)
    })
}

/// What opens sealed keys, if that is configured.
fn sealer(settings: &Settings) -> Result<Option<Sealer>> {
    settings.seal.as_ref().map_or(Ok(None), role::sealer)
}
