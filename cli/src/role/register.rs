//! `postern register`: keeps an application in its registry while it runs, and takes it out before it is stopped.
//!
//! The order at the end is the one that loses nothing: the gateways stop choosing the instance, it is taken out of the
//! registry, what is under way ends, and only then is the application told to stop.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use discovery::OwnDrain;
use discovery::consul::register::{Agent, Check, Registered, Registration};
use discovery::http::{Options, SecretFile, Server};
use discovery::own_drain::Ordered;
use http::HeaderName;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::output;
use crate::runtime::{self, Stop};

/// What one answer of the agent may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a gateway is asked whether the instance is drained.
const PACE: Duration = Duration::from_millis(200);

/// Arguments of `postern register`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  postern register --service orders --port 8080 --check-http http://127.0.0.1:8080/health -- ./orders\n  \
                        postern register --service orders --port 8080 --ttl 10 --gateway 10.0.0.1:9090 -- ./orders\n\n\
                        Without a COMMAND it stays registered until SIGTERM.\n\n\
                        Exit codes: that of the command (128 and the signal that ended it); 0 without one; 3 if the agent refuses the \
                        registration."
)]
pub struct Register {
    /// The name of the service.
    #[arg(long, value_name = "NAME")]
    service: String,
    /// The port that it listens on.
    #[arg(long, value_name = "PORT")]
    port: u16,
    /// The address that it is reached at; that of the agent's node if it is not given.
    #[arg(long, value_name = "ADDRESS")]
    address: Option<String>,
    /// Unique on the node; SERVICE-PORT if it is not given.
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// A tag. May be given more than once.
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// Metadata, `zone=a`. May be given more than once.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    meta: Vec<(String, String)>,
    /// Its weight.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    weight: u32,
    /// The agent asks this URL every ten seconds whether it lives.
    #[arg(long, value_name = "URL", conflicts_with = "ttl")]
    check_http: Option<String>,
    /// It is critical when this command has given no sign of life for so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    ttl: Option<u64>,
    /// The agent of Consul on this machine.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8500", env = "CONSUL_HTTP_ADDR")]
    consul: String,
    /// A file with the ACL token, read again when it changes.
    #[arg(long, value_name = "FILE", env = "CONSUL_HTTP_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// The Control API of a gateway: the instance is drained there (and at its peers) before it is stopped. May be given
    /// more than once; the first that answers is asked.
    #[arg(long = "gateway", value_name = "HOST:PORT", requires = "address")]
    gateways: Vec<String>,
    /// How long what is under way may take, in seconds; without --gateway, how long others have to notice.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    patience: u64,
    /// What to run.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl Register {
    /// Runs the role.
    pub fn run(self) -> Result<ExitCode> {
        runtime::block_on(self.serve())
    }

    async fn serve(self) -> Result<ExitCode> {
        let mut stop = Stop::listen()?;
        let registration = self.registration();
        let registered = self.agent()?.keep(registration);
        registered
            .begun()
            .await
            .with_context(|| format!("{} does not take the registration", self.consul))?;
        output::note(&format!("{} is registered", self.id()));
        let mut child = self.start()?;
        let ended = tokio::select! {
            status = ended(&mut child) => Some(status),
            () = stop.told() => None,
            never = self.take_back() => match never {},
        };
        if let Some(status) = ended {
            self.leave(registered).await;
            return Ok(status);
        }
        let drain = self.drain().await;
        self.leave(registered).await;
        self.wait(drain).await;
        let Some(running) = &child else { return Ok(ExitCode::from(output::OK)) };
        if let Some(pid) = running.id().and_then(|pid| i32::try_from(pid).ok()) {
            kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        }
        Ok(ended_now(&mut child).await)
    }

    fn id(&self) -> String {
        self.id.clone().unwrap_or_else(|| format!("{}-{}", self.service, self.port))
    }

    fn registration(&self) -> Registration {
        let check = match (&self.check_http, self.ttl) {
            (Some(url), _) => {
                Check::Http { url: url.clone(), interval: Duration::from_secs(10), timeout: DEADLINE }
            }
            (None, Some(ttl)) => Check::Ttl(Duration::from_secs(ttl)),
            (None, None) => Check::None,
        };
        Registration {
            id: self.id(),
            name: self.service.clone(),
            address: self.address.clone(),
            port: self.port,
            tags: self.tags.clone(),
            meta: self.meta.iter().cloned().collect::<BTreeMap<_, _>>(),
            weights: (self.weight, 1),
            check,
            forget_after: None,
        }
    }

    fn agent(&self) -> Result<Agent> {
        let url =
            if self.consul.contains("://") { self.consul.clone() } else { format!("http://{}", self.consul) };
        let secret = self.token_file.clone().map(|path| SecretFile {
            field: HeaderName::from_static("x-consul-token"),
            scheme: "",
            path,
        });
        let server =
            Server::new(&url, Options { secret, ..Options::default() }).map_err(|why| anyhow!(why))?;
        Ok(Agent::of(server, DEADLINE))
    }

    fn start(&self) -> Result<Option<Child>> {
        let Some((program, args)) = self.command.split_first() else { return Ok(None) };
        let child = Command::new(program).args(args).kill_on_drop(true).spawn();
        child.map(Some).with_context(|| format!("{program} cannot be started"))
    }

    async fn leave(&self, registered: Registered) {
        match registered.leave().await {
            Ok(()) => output::note(&format!("{} is out of the registry", self.id())),
            Err(error) => output::problem(&format!("{} is still in the registry: {error}", self.id())),
        }
    }

    /// The instance, as gateways know it.
    fn node(&self) -> Option<String> {
        let address = self.address.as_deref()?;
        Some(match address.parse() {
            Ok(ip) => SocketAddr::new(ip, self.port).to_string(),
            Err(_) => format!("{address}:{}", self.port),
        })
    }

    /// The drains of this instance, where its address is known.
    fn own_drain(&self) -> Option<OwnDrain> {
        Some(OwnDrain { service: self.service.clone(), node: self.node()?, reason: "it is being stopped" })
    }

    /// Has the gateways choose this instance again that were told by an earlier process not to.
    async fn take_back(&self) -> Infallible {
        let told = |_: &str, outcome: Result<usize, String>| {
            if let Err(problem) = outcome {
                unheard(&problem);
            }
        };
        if let Some(own) = self.own_drain() {
            own.take_back(self.gateways.iter().map(|gateway| &**gateway), told).await;
        }
        std::future::pending().await
    }

    /// Has the gateways stop choosing this instance: the drain at the one that leads.
    async fn drain(&self) -> Option<Ordered> {
        let own = self.own_drain()?;
        for gateway in &self.gateways {
            match own.order(gateway).await {
                Ok(drain) => return Some(drain),
                Err(problem) => unheard(&problem),
            }
        }
        None
    }

    /// Until nothing uses this instance any more, or patience ends.
    async fn wait(&self, drain: Option<Ordered>) {
        let patience = Duration::from_secs(self.patience);
        let Some(mut drain) = drain else { return tokio::time::sleep(patience).await };
        let drained = async {
            let mut told = false;
            while drain.stage() != "drained" {
                tokio::time::sleep(PACE).await;
                // What is under way is not known then: it gets its time.
                if let Err(problem) = drain.look().await
                    && !std::mem::replace(&mut told, true)
                {
                    unheard(&problem);
                }
            }
        };
        match tokio::time::timeout(patience, drained).await {
            Ok(()) => output::note("nothing uses it any more"),
            Err(_) => output::problem(&format!("still in use after {} s", self.patience)),
        }
    }
}

fn unheard(problem: &str) {
    output::problem(&format!("{problem} (--gateway is the Control API of a gateway, HOST:9090 by default)"));
}

/// The exit code of the command; for ever if there is none.
async fn ended(child: &mut Option<Child>) -> ExitCode {
    match child {
        Some(_) => ended_now(child).await,
        None => std::future::pending().await,
    }
}

async fn ended_now(child: &mut Option<Child>) -> ExitCode {
    let Some(child) = child else { return ExitCode::from(output::OK) };
    let Ok(status) = child.wait().await else { return ExitCode::from(output::FAILED) };
    // As shells have it.
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(output::FAILED))
}
