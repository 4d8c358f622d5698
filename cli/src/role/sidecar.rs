//! `postern sidecar`: what stands beside an application in the mesh; and the small commands around it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use config::env::ProcessEnv;
use config::sidecar::Sidecar as Settings;
use sidecar::app::{self, Options};

use crate::cmd::capture::Capture;
use crate::cmd::policy::Explain;
use crate::output::{self, Colour};

/// Arguments of `postern sidecar`.
#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Signals:\n  SIGTERM, SIGINT  nothing new comes in, what is in flight ends, the application goes on calling others until it \
                  has gone; a second one ends at once\n  SIGUSR1          reopen the access log\n\n\
                  The file is read again when it changes."
)]
pub struct Sidecar {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    file: File,
}

#[derive(Args)]
struct File {
    /// The file, or the directory with `sidecar.yaml`.
    #[arg(short, long, value_name = "FILE", default_value = "sidecar.yaml", env = "POSTERN_SIDECAR")]
    config: PathBuf,
}

#[derive(Subcommand)]
enum Action {
    /// Wait until the sidecar is ready.
    Await(Await),
    /// Run an application behind the sidecar: start it when the sidecar is ready, end when it ends, with its exit code.
    Exec(Exec),
    /// Find every error in the file, without starting anything.
    Check(File),
    /// Ask a running sidecar what its policies decide, and why.
    Explain(Explain),
    /// Lead a workload's connections to its sidecar by rules in the kernel.
    Capture(Capture),
}

#[derive(Args)]
struct Await {
    /// The sidecar's admin interface.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15021")]
    admin: SocketAddr,
    /// How long to wait, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
}

#[derive(Args)]
struct Exec {
    #[command(flatten)]
    file: File,
    /// The application, and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Sidecar {
    /// Runs the role.
    pub fn run(self) -> Result<ExitCode> {
        match self.action {
            None => serve(self.file.config, Vec::new()),
            Some(Action::Exec(Exec { file, command })) => serve(file.config, command),
            Some(Action::Await(wait)) => wait.run(),
            Some(Action::Capture(capture)) => capture.run(),
            Some(Action::Explain(explain)) => explain.run(),
            Some(Action::Check(file)) => {
                let Some(settings) = load(&file.config)? else { return Ok(ExitCode::from(output::FOUND)) };
                for warning in settings.warnings() {
                    output::note(&format!("warning: {warning}"));
                }
                output::note(&format!(
                    "{}: {}, {}",
                    file.config.display(),
                    output::count(settings.inbound.ports.len(), "port"),
                    output::count(settings.services.len(), "service"),
                ));
                Ok(ExitCode::from(output::OK))
            }
        }
    }
}

fn load(file: &std::path::Path) -> Result<Option<Settings>> {
    match Settings::load(file, &plugins::Catalog::default(), &ProcessEnv) {
        Ok(settings) => Ok(Some(settings)),
        Err(errors) => {
            for error in &errors {
                output::problem(&error.to_string());
            }
            output::problem(&format!("{} found", output::count(errors.len(), "error")));
            Ok(None)
        }
    }
}

fn serve(file: PathBuf, command: Vec<String>) -> Result<ExitCode> {
    sidecar::pages::be_small();
    let file = if file.is_dir() { file.join(config::sidecar::SIDECAR_FILE) } else { file };
    let Some(config) = load(&file)? else {
        output::problem("nothing was started");
        return Ok(ExitCode::from(output::FOUND));
    };
    crate::logging::start_at("info");
    let code = app::run(Options { file, config, command }, |addresses| {
        for (key, address) in &addresses.0 {
            output::note(&format!("{key:<32} {address}"));
        }
    })?;
    output::note(&output::paint("stopped", Colour::Dim, false));
    Ok(ExitCode::from(code))
}

impl Await {
    fn run(self) -> Result<ExitCode> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        match runtime.block_on(app::ready_at(self.admin, Duration::from_secs(self.timeout))) {
            Ok(()) => Ok(ExitCode::from(output::OK)),
            Err(why) => {
                output::problem(&format!("not ready: {why}"));
                Ok(ExitCode::from(output::FOUND))
            }
        }
    }
}
