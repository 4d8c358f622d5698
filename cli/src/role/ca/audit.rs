//! `postern ca audit verify`: whether the log of decisions is as it was written.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use certs::ca::audit::{self, AuditError};
use clap::{Args, Subcommand};
use serde_json::json;

use super::{AUDIT, Place, settings};
use crate::output::{self, Format};

/// Arguments of `postern ca audit`.
#[derive(Args)]
pub(super) struct Audit {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check each line of the log against the one before it.
    Verify(Verify),
}

#[derive(Args)]
struct Verify {
    /// The log; that of the authority in the settings if it is left out.
    file: Option<PathBuf>,
    /// The last hash that was written down elsewhere: lines that were cut off after it are missed.
    #[arg(long, value_name = "HASH")]
    head: Option<String>,
    #[command(flatten)]
    place: Place,
    /// The form of the output.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Audit {
    pub(super) fn run(self) -> Result<ExitCode> {
        let Command::Verify(Verify { file, head, place, output }) = self.command;
        let file = match file {
            Some(file) => file,
            None => match settings(&place.config) {
                Ok(settings) => settings.data_dir.join(AUDIT),
                Err(code) => return Ok(code),
            },
        };
        let verified = audit::verify(&file, head.as_deref());
        if let Err(error @ AuditError::File { .. }) = verified {
            return Err(error.into());
        }
        match (output, &verified) {
            (Format::Json, Ok(head)) => {
                output::json(&json!({"whole": true, "lines": head.lines, "head": head.hash}))
            }
            (Format::Json, Err(error)) => {
                output::json(&json!({"whole": false, "problem": error.to_string()}))
            }
            (Format::Text, Ok(head)) => {
                output::line(format_args!("{} are whole; the last hash is {}", lines(head.lines), head.hash));
            }
            (Format::Text, Err(error)) => output::problem(&error.to_string()),
        }
        Ok(ExitCode::from(if verified.is_ok() { output::OK } else { output::FOUND }))
    }
}

fn lines(number: u64) -> String {
    if number == 1 { "1 line".to_owned() } else { format!("{number} lines") }
}
