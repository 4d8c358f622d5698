//! How commands and roles run: on one thread until they are done, or on several until they are told to stop.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::output::{self, Colour};

/// What is left when a role has stopped is not waited for longer.
const LEAVE: Duration = Duration::from_millis(200);

/// Runs what a command does, on this thread.
pub fn block_on<T>(what: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.context("the runtime cannot be started")?.block_on(what)
}

/// Runs a role that holds keys, on threads of this name. Its keys do not get into a core dump.
pub fn serve(name: &str, role: impl Future<Output = Result<()>>) -> Result<ExitCode> {
    let _ = nix::sys::prctl::set_dumpable(false);
    let runtime = Builder::new_multi_thread().thread_name(name).enable_all().build();
    let runtime = runtime.context("the runtime cannot be started")?;
    runtime.block_on(role)?;
    runtime.shutdown_timeout(LEAVE);
    output::note(&output::paint("stopped", Colour::Dim, false));
    Ok(ExitCode::from(output::OK))
}

/// The signals by which a process is told to stop.
pub struct Stop {
    term: Signal,
    int: Signal,
}

impl Stop {
    /// From here on they do not end the process.
    pub fn listen() -> Result<Self> {
        let on = |kind| signal(kind).context("signals cannot be listened to");
        Ok(Self { term: on(SignalKind::terminate())?, int: on(SignalKind::interrupt())? })
    }

    /// Waits for one.
    pub async fn told(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
