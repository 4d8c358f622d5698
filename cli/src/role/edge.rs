//! `postern edge`: the gateway.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use config::env::ProcessEnv;
use config::process::Process;

use crate::output::{self, Colour};

/// Arguments of `postern edge`.
#[derive(Args)]
#[command(
    after_help = "Signals:\n  SIGTERM, SIGINT  finish what is in flight, then exit 0; a second one ends at once\n  \
                        SIGUSR1          reopen log files\n\n\
                        The configuration is APISIX's: config.yaml, and apisix.yaml beside it where the provider is yaml."
)]
pub struct Edge {
    /// The directory with `config.yaml`, or the file itself. Without the file everything has APISIX's default.
    #[arg(short, long, value_name = "DIR", default_value = ".", env = "POSTERN_CONFIG")]
    config: PathBuf,
}

impl Edge {
    /// Runs the role.
    pub fn run(self) -> Result<ExitCode> {
        match Process::load(&self.config, &ProcessEnv) {
            Ok(process) => serve(process, None),
            Err(errors) => {
                for error in &errors {
                    output::problem(&error.to_string());
                }
                output::problem(&format!(
                    "{} found; nothing was started. `postern check {}` shows them with everything else.",
                    output::count(errors.len(), "error"),
                    self.config.display()
                ));
                Ok(ExitCode::from(output::FOUND))
            }
        }
    }
}

/// What is done once the gateway serves, with the addresses it serves on.
pub type Ready = Box<dyn FnOnce(&edge::app::Addresses) + Send>;

/// Runs the gateway until it is told to stop. `ready` is told once, when it serves.
pub fn serve(process: Process, ready: Option<Ready>) -> Result<ExitCode> {
    crate::logging::start(&process);
    for notice in &process.not_applicable {
        output::note(&format!("not applicable: {notice}"));
    }
    edge::app::run(process, move |addresses| {
        for (what, address) in addresses.told() {
            output::note(&format!("{:<8} {address}", what));
        }
        if let Some(ready) = ready {
            ready(addresses);
        }
    })?;
    output::note(&output::paint("stopped", Colour::Dim, false));
    Ok(ExitCode::from(output::OK))
}
