//! `postern certs`: look at the certificates of a mesh, exchange them under traffic, and get out of trouble.

mod ask;
mod bundle;
mod emergency;
mod rotate;
mod show;
mod status;
mod steer;
mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::output;

/// All is well.
const OK: u8 = 0;
/// The command could not do its work, or makes no sense here.
const ERROR: u8 = 1;
/// Something needs a person: it ends soon, or it has failed.
const ATTENTION: u8 = 2;
/// An interlock is in the way.
const BLOCKED: u8 = 3;
/// Something is under way.
const IN_PROGRESS: u8 = 4;

/// Arguments of `postern certs`.
#[derive(Args)]
#[command(
    after_help = "At three in the morning:\n  postern certs status                      what there is, what is under way, who is late\n  \
                  postern certs rotate root --plan          how long it takes and what is in the way; writes nothing\n  \
                  postern certs rotate root --reason yearly exchange the root; nothing is cut, it may be interrupted\n  \
                  postern certs watch                       where it is\n  \
                  postern certs rollback --reason TEXT      the way back, until the old root is gone from everywhere\n  \
                  postern certs check --fail-before 30d     for CI: exit code 2 when something in use ends sooner\n\n\
                  Exit codes: 0 ok, 1 error, 2 something needs a person, 3 an interlock is in the way (who is told, and \
                  what to do),\n4 under way."
)]
pub struct Certs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One screen: roots, issuers, certificates by issuer and age, who lacks what, what comes next.
    Status(status::Status),
    /// Fail when something in use ends soon: for CI and cron.
    Check(status::Check),
    /// Exchange certificates, their issuer or the root, without a failed request.
    Rotate(rotate::Rotate),
    /// Let a rotation go on: the next state with --step, or past who is in the way.
    Advance(steer::Advance),
    /// Stop a rotation where it is.
    Pause(steer::Pause),
    /// Let a rotation that was stopped go on.
    Resume(steer::Resume),
    /// Go back to what was before a rotation.
    Rollback(steer::Rollback),
    /// Follow what is under way.
    Watch(steer::Watch),
    /// Shake hands with a workload and tell whether the mesh would accept what it shows.
    Verify(verify::Verify),
    /// Take a root out at once, because its key is not secret any more.
    Distrust(emergency::Distrust),
    /// Refuse one certificate, or an identity.
    Revoke(emergency::Revoke),
    /// A new root in place of one that has ended.
    Recover(emergency::Recover),
    /// Print whom the mesh trusts.
    ExportBundle(bundle::ExportBundle),
    /// Push a bundle that changes nothing, to see who gets it.
    Rehearse(bundle::Rehearse),
    /// Name an edge or a peer that has to confirm every bundle, seen lately or not.
    Observe(bundle::Observe),
    /// Wait no more for a workload that is over.
    Forget(bundle::Forget),
}

impl Certs {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(async {
            match self.command {
                Command::Status(command) => command.run().await,
                Command::Check(command) => command.run().await,
                Command::Rotate(command) => command.run().await,
                Command::Advance(command) => command.run().await,
                Command::Pause(command) => command.run().await,
                Command::Resume(command) => command.run().await,
                Command::Rollback(command) => command.run().await,
                Command::Watch(command) => command.run().await,
                Command::Verify(command) => command.run().await,
                Command::Distrust(command) => command.run().await,
                Command::Revoke(command) => command.run().await,
                Command::Recover(command) => command.run().await,
                Command::ExportBundle(command) => command.run().await,
                Command::Rehearse(command) => command.run().await,
                Command::Observe(command) => command.run().await,
                Command::Forget(command) => command.run().await,
            }
        });
        // The codes of these commands are their own: 3 is an interlock here.
        Ok(ExitCode::from(result.unwrap_or_else(|error| match error.downcast::<ask::Refused>() {
            Ok(refused) => {
                output::problem(&refused.text);
                refused.code
            }
            Err(error) => {
                output::problem(&error.to_string());
                error.chain().skip(1).for_each(|cause| output::note(&format!("because: {cause}")));
                ERROR
            }
        })))
    }
}
