//! `postern sidecar`: what stands beside one workload.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::cmd::capture::Capture;

/// Arguments of `postern sidecar`.
#[derive(Args)]
pub struct Sidecar {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lead a workload's connections to its sidecar by rules in the kernel.
    Capture(Capture),
}

impl Sidecar {
    /// Runs the role.
    pub fn run(self) -> Result<ExitCode> {
        let Command::Capture(capture) = self.command;
        capture.run()
    }
}
