//! What is needed when a key is known to others, or a root has ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use certs::ca::authority::KeyKind;
use certs::ca::foundry::Foundry;
use certs::ca::proto::{DistrustRequest, RecoverRequest, RevokeRequest};
use certs::ca::rotation::command::Command;
use certs::ca::rotation::driver::Driver;
use certs::ca::seal::Sealer;
use certs::ca::store::Store;
use certs::ca::store::embedded::Embedded;
use certs::clock::SystemClock;
use clap::Args;

use super::ask::{Asked, answer, request};
use super::steer::follow;
use super::{OK, rotate};
use crate::output::{self, Format, line};

/// Arguments of `postern certs distrust`.
#[derive(Args)]
#[command(
    after_help = "The bundle without this root goes out at once; whoever was handshaken with it is drained or cut. If it is the \
                        root in use, a\nnew one is made and everybody renews: handshakes fail until both sides have it, a few \
                        seconds. To exchange a root\nwithout a failed request, use `postern certs rotate root`."
)]
pub struct Distrust {
    /// The beginning of its fingerprint.
    #[arg(value_name = "FINGERPRINT")]
    root: String,
    /// For the log and for whoever looks.
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Return after so long; it goes on.
    #[arg(long, value_name = "SPAN", value_parser = super::status::seconds)]
    timeout: Option<u64>,
    #[command(flatten)]
    asked: Asked,
}

impl Distrust {
    pub async fn run(self) -> Result<u8> {
        let mut client = self.asked.client().await?;
        let message = DistrustRequest { root: self.root, reason: self.reason };
        let status = answer(client.distrust(request(message)).await)?;
        if status.rotation.is_none() {
            line(format_args!("it is distrusted; nobody used it"));
            return Ok(OK);
        }
        follow(&self.asked, client, self.timeout.map(Duration::from_secs)).await
    }
}

/// Arguments of `postern certs revoke`.
#[derive(Args)]
#[command(after_help = "Examples:\n  postern certs revoke 4f:0c:11:... --reason 'laptop lost'\n  \
                        postern certs revoke spiffe://mesh.local/ns/shop/sa/orders --reason 'broken into'\n  \
                        postern certs revoke --undo spiffe://mesh.local/ns/shop/sa/orders\n\n\
                        A revoked identity gets no certificate and is refused by everybody, live connections too, until it is undone.")]
pub struct Revoke {
    /// A serial in hexadecimal digits, or an identity.
    #[arg(value_name = "SERIAL|IDENTITY")]
    what: String,
    /// For the log and for whoever looks.
    #[arg(long, value_name = "TEXT", required_unless_present = "undo", default_value = "")]
    reason: String,
    /// Revoke it no more.
    #[arg(long)]
    undo: bool,
    #[command(flatten)]
    asked: Asked,
}

impl Revoke {
    pub async fn run(self) -> Result<u8> {
        let Self { what, reason, undo, asked } = self;
        let message = RevokeRequest { what: what.clone(), reason, undo };
        let status = answer(asked.client().await?.revoke(request(message)).await)?;
        match asked.output {
            Format::Json => output::json(&status),
            Format::Text => {
                let done = if undo { "is revoked no more" } else { "is revoked" };
                line(format_args!("{what} {done} from generation {} on", status.generation));
            }
        }
        Ok(OK)
    }
}

/// Arguments of `postern certs recover`.
#[derive(Args)]
#[command(
    after_help = "A root that has ended: a new one is made, and workloads that ask over the channel of the authority (which does not \
                        depend\non the root) get it and a certificate. No workload is restarted.\n\n\
                        --offline does it in the folder of an authority that is not running; start it afterwards."
)]
pub struct Recover {
    /// Said on purpose, because it replaces whom everybody trusts.
    #[arg(long, required = true)]
    new_root: bool,
    /// For the log and for whoever looks.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// A root from elsewhere: a file with its certificate and its key in PEM.
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
    /// In the folder of an authority that is not running.
    #[arg(long, requires = "data")]
    offline: bool,
    /// The data directory of the authority, or the folder with its record.
    #[arg(long, value_name = "DIR", requires = "offline")]
    data: Option<PathBuf>,
    /// The key file that its keys are sealed with.
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
    key_file: Option<PathBuf>,
    /// The passphrase that its keys are sealed with, in a file.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// Return after so long; it goes on.
    #[arg(long, value_name = "SPAN", value_parser = super::status::seconds)]
    timeout: Option<u64>,
    #[command(flatten)]
    asked: Asked,
}

impl Recover {
    pub async fn run(self) -> Result<u8> {
        let import = rotate::read(self.from_file.as_ref())?;
        if self.offline {
            return self.offline(import).await;
        }
        let mut client = self.asked.client().await?;
        answer(client.recover(request(RecoverRequest { reason: self.reason, import })).await)?;
        follow(&self.asked, client, self.timeout.map(Duration::from_secs)).await
    }

    async fn offline(self, import: String) -> Result<u8> {
        let data = self.data.context("--data DIR says where the record is")?;
        let sealer = match (&self.key_file, &self.passphrase_file) {
            (Some(path), _) if path.exists() => Sealer::key_file(path)?,
            (Some(path), _) => bail!("there is no key file {}", path.display()),
            (None, Some(path)) => Sealer::passphrase_file(path)?,
            (None, None) => bail!("--key-file or --passphrase-file says what its keys are sealed with"),
        };
        if !data.is_dir() {
            bail!("there is no folder {}", data.display());
        }
        // The folder of an authority has the record in a folder of its own.
        let inner = data.join("store");
        let folder = if inner.is_dir() { &inner } else { &data };
        let store: Arc<dyn Store> = Arc::new(Embedded::open(folder)?);
        let forge = Arc::new(Foundry::new(Arc::new(sealer), KeyKind::P256));
        let clock = SystemClock::new();
        let driver = Driver::open(store, Arc::default(), forge, clock, "offline").await?;
        let driver = driver.with_context(|| format!("{} has no record of an authority", data.display()))?;
        let import = (!import.is_empty()).then_some(import);
        let known = driver.command(&Command::Recover { import, reason: self.reason }, "offline").await?;
        let root = known.record.current_root().map(|root| root.id.0.clone()).unwrap_or_default();
        line(format_args!("root {root} is in place; start the authority, and workloads come for it"));
        Ok(OK)
    }
}
