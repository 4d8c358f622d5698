//! `postern docs`: the generated parts of the plugin pages, from the plugins' schemas.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::output;

/// Arguments of `postern docs`.
#[derive(Args)]
pub struct Docs {
    /// The folder of the documentation; the plugin pages are in its `plugins`.
    #[arg(default_value = "docs")]
    folder: PathBuf,
}

impl Docs {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let pages = self.folder.join("plugins");
        plugins::docs::write(&pages)
            .with_context(|| format!("the pages in {} cannot be written", pages.display()))?;
        Ok(ExitCode::from(output::OK))
    }
}
