//! Begin a rotation, or tell what it would do.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use certs::ca::proto::RotateRequest;
use clap::{Args, Subcommand};

use super::ask::{Asked, answer, request_to_sign};
use super::steer::follow;
use super::{BLOCKED, IN_PROGRESS, OK, show};
use crate::output::{self, Format, line};

/// Arguments of `postern certs rotate`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  postern certs rotate root --plan\n  postern certs rotate root --reason 'yearly' --soak 2m --spread 30m\n  \
                        postern certs rotate root --step          then `postern certs advance` after each state\n  \
                        postern certs rotate root --vault --plan  who would sign, and whether it could be asked\n  \
                        postern certs rotate issuer\n  \
                        postern certs rotate leaf 'spiffe://mesh.local/ns/shop/*'\n\n\
                        The command shows how far it is and may be interrupted: the rotation goes on in the authority.\n\n\
                        Exit codes: 0 done, 1 error, 2 it went back or was paused, 3 an interlock is in the way, 4 under way."
)]
pub struct Rotate {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Certificates of workloads: everybody renews.
    Leaf(Leaf),
    /// The authority that signs them, below the same root.
    Issuer(Issuer),
    /// The root, with a new issuer below it.
    Root(Root),
}

#[derive(Args)]
struct Leaf {
    /// For these alone: identities, or patterns as spiffe://mesh.local/ns/shop/*.
    #[arg(value_name = "IDENTITY")]
    select: Vec<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Issuer {
    /// An issuer that was signed elsewhere, where the root's key stays away: a file with its certificate, those above it, the
    /// root's, and its key in PEM.
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Root {
    /// A root from elsewhere: a file with its certificate and its key in PEM; or with an issuer below it, the root's
    /// certificate, and the issuer's key.
    #[arg(long, value_name = "FILE", group = "source")]
    from_file: Option<PathBuf>,
    /// A root whose key Vault or OpenBao has, which signs an issuer: `root.vault` in ca.yaml.
    #[arg(long, group = "source")]
    vault: bool,
    /// A root whose key an issuer of cert-manager has, which signs an issuer: `root.cert_manager` in ca.yaml.
    #[arg(long, group = "source")]
    cert_manager: bool,
    /// A root that is made here, where the key of the present one is elsewhere.
    #[arg(long, group = "source")]
    own: bool,
    /// `--rekey=false` keeps the key of the old root: no remedy for a key that others know.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    rekey: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Common {
    /// For the log and for whoever looks.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Print the timeline and what is in the way; write nothing.
    #[arg(long)]
    plan: bool,
    /// Go on by itself as far as interlocks allow (that is so without it too).
    #[arg(long, conflicts_with = "step")]
    auto: bool,
    /// Stop after each state until `postern certs advance`.
    #[arg(long)]
    step: bool,
    /// How long it has to be quiet before the next state.
    #[arg(long, value_name = "SPAN", value_parser = super::status::millis)]
    soak: Option<u64>,
    /// Over how long workloads spread their renewals.
    #[arg(long, value_name = "SPAN", value_parser = super::status::millis)]
    spread: Option<u64>,
    /// Who was not seen for so long does not count as live.
    #[arg(long, value_name = "SPAN", value_parser = super::status::millis)]
    absent_after: Option<u64>,
    /// The shortest waits.
    #[arg(long)]
    compress: bool,
    /// Begin it and return.
    #[arg(long)]
    no_wait: bool,
    /// Return after so long; the rotation goes on.
    #[arg(long, value_name = "SPAN", value_parser = super::status::seconds)]
    timeout: Option<u64>,
    #[command(flatten)]
    asked: Asked,
}

impl Rotate {
    pub async fn run(self) -> Result<u8> {
        let mut message = RotateRequest::default();
        let common = match self.what {
            What::Leaf(Leaf { select, common }) => {
                message.kind = "leaf".to_owned();
                message.select = select;
                common
            }
            What::Issuer(Issuer { from_file, common }) => {
                message.kind = "issuer".to_owned();
                message.import = read(from_file.as_ref())?;
                common
            }
            What::Root(Root { from_file, vault, cert_manager, own, rekey, common }) => {
                message.kind = "root".to_owned();
                message.same_key = !rekey;
                message.import = read(from_file.as_ref())?;
                let sources = [("vault", vault), ("cert_manager", cert_manager), ("own", own)];
                let source = sources.iter().find(|(_, asked)| *asked);
                message.source = source.map_or_else(String::new, |(name, _)| (*name).to_owned());
                common
            }
        };
        message.reason = common.reason;
        message.step = common.step;
        message.soak_ms = common.soak;
        message.spread_ms = common.spread;
        message.absent_after_ms = common.absent_after;
        message.compress = common.compress;
        let mut client = common.asked.client().await?;
        if common.plan {
            let plan = answer(client.plan(request_to_sign(message)).await)?;
            match common.asked.output {
                Format::Json => output::json(&plan),
                Format::Text => {
                    if !plan.outside.is_empty() {
                        line(format_args!("  {}", plan.outside));
                    }
                    let begins = plan.stages.first().map_or(0, |stage| stage.begins);
                    for stage in &plan.stages {
                        let (from, to) = (stage.begins - begins, stage.ends - begins);
                        line(format_args!(
                            "  {:<10}  +{:<7} to +{:<7}  {}",
                            stage.state,
                            show::span(from),
                            show::span(to),
                            stage.what
                        ));
                    }
                    show::blockers(&plan.blockers);
                    if plan.blockers.is_empty() {
                        line(format_args!("  nothing is in the way; nothing was written"));
                    }
                }
            }
            return Ok(if plan.blockers.is_empty() { OK } else { BLOCKED });
        }
        let status = answer(client.rotate(request_to_sign(message)).await)?;
        if common.no_wait {
            match common.asked.output {
                Format::Json => output::json(&status),
                Format::Text => status.rotation.iter().for_each(|one| show::rotation(one, status.now)),
            }
            return Ok(if status.rotation.is_some() { IN_PROGRESS } else { OK });
        }
        follow(&common.asked, client, common.timeout.map(Duration::from_secs)).await
    }
}

/// The text of a file with a key.
pub fn read(path: Option<&PathBuf>) -> Result<String> {
    match path {
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))
        }
        None => Ok(String::new()),
    }
}
