//! Whom the mesh trusts, for others; and who gets it.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use certs::ca::export::{self, jks};
use certs::ca::proto::{ExportBundleRequest, ForgetRequest, ObserveRequest, RehearseRequest};
use certs::ca::record::Der;
use certs::ca::rotation::driver::pem;
use clap::{Args, ValueEnum};
use serde_json::json;

use super::ask::{Asked, answer, request};
use super::{BLOCKED, OK, show, status};
use crate::output::{self, Colour, Format, line, painted};

/// Arguments of `postern certs export-bundle`.
#[derive(Args)]
#[command(after_help = "Examples:\n  postern certs export-bundle > roots.pem\n  \
                        postern certs export-bundle --format jks --file truststore.jks\n  \
                        keytool -list -keystore truststore.jks -storepass changeit")]
pub struct ExportBundle {
    /// PEM, a SPIFFE bundle (JWK set), a trust store of Java, or a ConfigMap for Kubernetes.
    #[arg(long, value_enum, default_value_t)]
    format: Form,
    /// Where to write it; what was there is replaced. To where output goes if it is absent.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The password of a trust store of Java; it protects against accidents, not against readers.
    #[arg(long, value_name = "TEXT", default_value = jks::PASSWORD)]
    password: String,
    /// The name of the ConfigMap.
    #[arg(long, value_name = "NAME", default_value = "postern-ca-bundle")]
    name: String,
    #[command(flatten)]
    asked: Asked,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Form {
    #[default]
    Pem,
    Spiffe,
    Jks,
    Cm,
}

impl ExportBundle {
    pub async fn run(self) -> Result<u8> {
        let bundle = answer(self.asked.client().await?.export_bundle(request(ExportBundleRequest {})).await)?;
        let text = pem(&bundle.roots.iter().map(|root| Der(root.clone())).collect::<Vec<_>>());
        let made = match self.format {
            Form::Pem if matches!(self.asked.output, Format::Json) => {
                let one = |root: &Vec<u8>| pem(&[Der(root.clone())]);
                let made = json!({
                    "trust_domain": bundle.trust_domain,
                    "generation": bundle.generation,
                    "roots": bundle.roots.iter().map(one).collect::<Vec<_>>(),
                });
                serde_json::to_vec_pretty(&made)?.into_iter().chain(*b"\n").collect()
            }
            Form::Pem => text.into_bytes(),
            Form::Spiffe => {
                let made =
                    export::spiffe(&bundle.roots, bundle.generation).map_err(|error| anyhow!(error))?;
                serde_json::to_vec_pretty(&made)?.into_iter().chain(*b"\n").collect()
            }
            Form::Jks => jks::store(&bundle.roots, &self.password, SystemTime::now())
                .map_err(|error| anyhow!(error))?,
            Form::Cm => export::config_map(&self.name, &text).into_bytes(),
        };
        match &self.file {
            Some(file) => write(file, &made)?,
            None if self.format == Form::Jks && std::io::stdout().is_terminal() => {
                bail!("a trust store is not text: write it into a file with --file truststore.jks")
            }
            None => output::bytes(&made),
        }
        Ok(OK)
    }
}

/// In one piece: whoever reads the file meanwhile has the old one or the new one.
fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    let beside = file.with_extension("new");
    std::fs::write(&beside, bytes).with_context(|| format!("{} cannot be written", beside.display()))?;
    std::fs::rename(&beside, file).with_context(|| format!("{} cannot be written", file.display()))
}

/// Arguments of `postern certs rehearse`.
#[derive(Args)]
#[command(
    after_help = "A new generation of the bundle goes out with a throw-away root, which workloads look at and do not trust. Who confirms it\nwould confirm a real one.\n\n\
                        Exit codes: 0 everybody has confirmed, 3 not everybody in time (who has not is told)."
)]
pub struct Rehearse {
    /// How long to wait.
    #[arg(long, value_name = "SPAN", default_value = "60s", value_parser = super::status::seconds)]
    timeout: u64,
    #[command(flatten)]
    asked: Asked,
}

impl Rehearse {
    pub async fn run(self) -> Result<u8> {
        let mut client = self.asked.client().await?;
        let begun = Instant::now();
        let mut status = answer(client.rehearse(request(RehearseRequest { end: false })).await)?;
        let until = begun + Duration::from_secs(self.timeout);
        loop {
            let rehearsal = status.rehearsal.clone().unwrap_or_default();
            let is_over = rehearsal.missing.is_empty();
            if is_over || Instant::now() >= until {
                let ended = answer(client.rehearse(request(RehearseRequest { end: true })).await)?;
                match self.asked.output {
                    Format::Json => output::json(&status),
                    Format::Text => {
                        let colour = if is_over { Colour::Green } else { Colour::Red };
                        let told = format!(
                            "{} of {} workloads have generation {} after {} ms",
                            rehearsal.confirmed,
                            rehearsal.of,
                            rehearsal.generation,
                            begun.elapsed().as_millis()
                        );
                        line(format_args!("{}", painted(&told, colour)));
                        for one in &rehearsal.missing {
                            line(format_args!("  {}  {}", one.who, one.why));
                        }
                    }
                }
                drop(ended);
                return Ok(if is_over { OK } else { BLOCKED });
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            status = status::fetch(&self.asked, false).await?;
        }
    }
}

/// Arguments of `postern certs observe`.
#[derive(Args)]
pub struct Observe {
    /// The name of its process, or its identity.
    #[arg(value_name = "NAME")]
    name: String,
    /// What it is.
    #[arg(long, value_name = "KIND", default_value = "edge", value_parser = ["edge", "gateway", "federated"])]
    kind: String,
    /// It has to confirm no more.
    #[arg(long)]
    remove: bool,
    #[command(flatten)]
    asked: Asked,
}

impl Observe {
    pub async fn run(self) -> Result<u8> {
        let Self { name, kind, remove, asked } = self;
        let status =
            answer(asked.client().await?.observe(request(ObserveRequest { name, kind, remove })).await)?;
        match asked.output {
            Format::Json => output::json(&status),
            Format::Text => show::status(&status),
        }
        Ok(OK)
    }
}

/// Arguments of `postern certs forget`.
#[derive(Args)]
pub struct Forget {
    /// The name of its process.
    #[arg(value_name = "NAME")]
    id: String,
    #[command(flatten)]
    asked: Asked,
}

impl Forget {
    pub async fn run(self) -> Result<u8> {
        let status =
            answer(self.asked.client().await?.forget(request(ForgetRequest { id: self.id.clone() })).await)?;
        match self.asked.output {
            Format::Json => output::json(&status),
            Format::Text => line(format_args!("{} is not waited for any more", self.id)),
        }
        Ok(OK)
    }
}
