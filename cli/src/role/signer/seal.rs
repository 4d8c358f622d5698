//! `postern signer seal`: a private key in PEM becomes a file of the directory of keys.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use certs::ca::seal::{read_secret, write_secret};
use certs::signer::{is_key_name, store};
use clap::Args;

use super::{Place, sealer, settings};
use crate::output;

/// A key is a few kilobytes.
const LARGEST: u64 = 64 * 1024;

/// Arguments of `postern signer seal`.
#[derive(Args)]
#[command(
    after_help = "The file can be used under its name alone, and with the `seal` of signer.yaml alone.\n\n\
                  Try it:\n  postern signer seal shop --key shop.key -c signer.yaml\n  \
                  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 | postern signer seal shop --key - -c signer.yaml"
)]
pub(super) struct Seal {
    /// The name of the key, as in `signer://POOL/NAME`.
    name: String,
    /// The private key in PEM, in a file that nobody else may read; `-` is the standard input.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Where the sealed key is written; into `keys_dir` if it is left out.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

impl Seal {
    pub(super) fn run(self) -> Result<ExitCode> {
        let settings = match settings(&self.place.config) {
            Ok(settings) => settings,
            Err(code) => return Ok(code),
        };
        let name = &self.name;
        if !is_key_name(name) {
            return Err(anyhow!("`{name}` is no name of a key: letters, digits, `.`, `_` and `-`"));
        }
        let sealer = sealer(&settings)?
            .context("signer.yaml has no `seal`: write `seal: {key_file: seal.key}` into it")?;
        let pem = if self.key.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().take(LARGEST).read_to_string(&mut text).context("the standard input")?;
            text.into()
        } else {
            read_secret(&self.key)?
        };
        let sealed = store::seal(&sealer, name, &pem).with_context(|| format!("{}", self.key.display()))?;
        let out = self.out.unwrap_or_else(|| settings.keys_dir.join(format!("{name}.sealed")));
        write_secret(&out, sealed.as_bytes())
            .with_context(|| format!("{} cannot be written", out.display()))?;
        output::note(&format!("{} is written; a signer that runs uses it within a second", out.display()));
        if self.key.as_os_str() != "-" {
            output::note(&format!("{} is still there, in PEM: `shred -u` it", self.key.display()));
        }
        Ok(ExitCode::from(output::OK))
    }
}
