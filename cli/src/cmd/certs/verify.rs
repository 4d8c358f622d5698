//! Whether the mesh would accept what a process shows.

use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow};
use certs::ca::Bundle;
use certs::ca::inspect::inspect;
use certs::ca::proto::ExportBundleRequest;
use certs::identity::IdentityPattern;
use clap::Args;

use super::ask::{Asked, answer, request};
use super::{ATTENTION, ERROR, OK, show, status};
use crate::output::{self, Colour, Format, line, painted};

/// Arguments of `postern certs verify`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  postern certs verify 10.0.0.3:18080 --expect spiffe://mesh.local/ns/shop/sa/orders\n  \
                        postern certs verify                  the issuer in use against the bundle\n\n\
                        What is looked at is what is served, not what the authority believes to be served."
)]
pub struct Verify {
    /// The mesh port of a workload.
    #[arg(value_name = "HOST:PORT")]
    address: Option<String>,
    /// Who it has to be: an identity, or a pattern as spiffe://mesh.local/ns/shop/*.
    #[arg(long, value_name = "IDENTITY", requires = "address")]
    expect: Option<IdentityPattern>,
    #[command(flatten)]
    asked: Asked,
}

impl Verify {
    pub async fn run(self) -> Result<u8> {
        let Some(address) = &self.address else { return self.own().await };
        let told = answer(self.asked.client().await?.export_bundle(request(ExportBundleRequest {})).await)?;
        let bundle = told.bundle.ok_or_else(|| anyhow!("the authority is older than this command"))?;
        let trust = Bundle::try_from(bundle)?.trust()?;
        let (alpn, now) = (["postern-h2", "h2"], SystemTime::now());
        let found = inspect(address, &trust, self.expect.as_ref(), &alpn, now, Duration::from_secs(5)).await;
        let found = found.map_err(|error| anyhow!(error))?;
        match self.asked.output {
            Format::Json => output::json(&found),
            Format::Text => {
                let now = certs::ca::record::Moment::from(now).secs();
                for (index, one) in found.chain.iter().enumerate() {
                    let what = if index == 0 {
                        found.identity.as_deref().unwrap_or("(no identity)")
                    } else {
                        &one.subject
                    };
                    line(format_args!(
                        "  {}  {what}  {}",
                        show::short(&one.fingerprint),
                        show::left(one.not_after, now)
                    ));
                }
                match &found.root {
                    Some(root) => line(format_args!(
                        "  leads to root {} of generation {}",
                        show::short(root),
                        trust.generation()
                    )),
                    None => line(format_args!("  leads to no root of generation {}", trust.generation())),
                }
                match found.problem.as_str() {
                    "" => line(format_args!("{}", painted("the mesh accepts it", Colour::Green))),
                    why => line(format_args!("{}", painted(&format!("{}: {why}", found.code), Colour::Red))),
                }
            }
        }
        Ok(if found.problem.is_empty() { OK } else { ERROR })
    }

    /// Without an address: is what the authority signs accepted by whom it tells?
    async fn own(&self) -> Result<u8> {
        let status = status::fetch(&self.asked, false).await?;
        let fleet = status.fleet.clone().unwrap_or_default();
        match self.asked.output {
            Format::Json => output::json(&status),
            Format::Text => show::status(&status),
        }
        Ok(if fleet.current == fleet.live && fleet.failures == 0 { OK } else { ATTENTION })
    }
}
