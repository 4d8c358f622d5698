//! `postern docs`: the tables in the documentation that follow from the code: settings of plugins, metrics.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::output;

/// Arguments of `postern docs`.
#[derive(Args)]
pub struct Docs {
    /// The folder of the plugin pages.
    #[arg(default_value = "docs/plugins")]
    folder: PathBuf,
}

impl Docs {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        plugins::docs::write(&self.folder)
            .with_context(|| format!("the pages in {} cannot be written", self.folder.display()))?;
        Ok(ExitCode::from(output::OK))
    }
}
