//! Commands that run until they are told to stop.

pub mod ca;
pub mod discovery;
pub mod edge;
pub mod register;
mod sample;
pub mod sidecar;
pub mod signer;
pub mod up;

use anyhow::{Context, Result};
use certs::ca::seal::Sealer;
use config::ca::Seal;

/// What seals keys and opens them, where the settings say it; they name one thing at most.
fn sealer(seal: &Seal) -> Result<Option<Sealer>> {
    if let Some(file) = &seal.key_file {
        return Ok(Some(Sealer::key_file(file)?));
    }
    if let Some(file) = &seal.passphrase_file {
        return Ok(Some(Sealer::passphrase_file(file)?));
    }
    let Some(name) = &seal.passphrase_env else { return Ok(None) };
    let text = std::env::var(name).with_context(|| format!("seal.passphrase_env: {name}"))?;
    Ok(Some(Sealer::passphrase(&text)?))
}
