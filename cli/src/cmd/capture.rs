//! `postern sidecar capture`: lead a workload's connections to its sidecar, look whether that stands, take it away.

use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use config::Document;
use config::capture::{self as settings, Mark, Ports, Table};
use config::document::LocatedError;
use config::env::ProcessEnv;
use config::error::ConfigError;
use config::sidecar::Sidecar;
use ipnet::IpNet;
use serde_json::json;
use sidecar::capture::probe::{self, By, Outcome};
use sidecar::capture::{self, With};

use crate::output::{self, Colour, Format, line, painted};
use crate::runtime;

/// Arguments of `postern sidecar capture`.
#[derive(Args)]
#[command(after_help = "Examples:\n  postern sidecar capture print\n  \
                        postern sidecar capture install --uid 2102 --skip-inbound-ports 22\n  \
                        postern sidecar capture check -c capture.yaml --probe\n  \
                        postern sidecar capture remove\n\n\
                        All but print need CAP_NET_ADMIN in the workload's network namespace.\n\n\
                        Exit codes: 0 done, or what stands is what should; 1 check found a difference, or the settings are wrong; \
                        3 it could not be done.")]
pub struct Capture {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the rules, or bring those that stand up to date. Twice is the same as once.
    Install(Install),
    /// Take away whatever an installation has put there.
    Remove,
    /// Compare what stands with what should, and name the differences.
    Check(Check),
    /// Print the rules. Needs no privilege.
    Print(Print),
}

#[derive(Args)]
struct Install {
    #[command(flatten)]
    settings: Settings,
    /// By what the rules are written.
    #[arg(long, value_enum, default_value_t)]
    with: Tool,
}

#[derive(Args)]
struct Check {
    #[command(flatten)]
    settings: Settings,
    /// By what the rules were written.
    #[arg(long, value_enum, default_value_t)]
    with: Tool,
    /// Also connect to an address that no network has, which the rules must lead to a sidecar: the one that runs, or this
    /// command if none does.
    #[arg(long)]
    probe: bool,
    /// Only connect; that needs no privilege.
    #[arg(long, conflicts_with = "probe")]
    probe_only: bool,
    /// How long an answer is waited for, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
    /// Text or JSON.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Args)]
struct Print {
    #[command(flatten)]
    settings: Settings,
    /// The rules for iptables, which are used where nft is not to be had.
    #[arg(long)]
    iptables: bool,
}

/// What is captured; options win over the file.
#[derive(Args)]
struct Settings {
    /// The sidecar's file, or one with `capture` alone.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How inbound connections are handed over.
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Capture one direction alone.
    #[arg(long, value_enum)]
    only: Option<Only>,
    /// Where the sidecar takes captured inbound connections (15006).
    #[arg(long, value_name = "PORT")]
    inbound_port: Option<NonZeroU16>,
    /// Where the sidecar takes captured outbound connections (15001).
    #[arg(long, value_name = "PORT")]
    outbound_port: Option<NonZeroU16>,
    /// Other ports of the sidecar (15008,15021).
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    own_ports: Option<Vec<NonZeroU16>>,
    /// The sidecar's own connections are told by this uid (2102, if no mark is given).
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
    /// The sidecar's own connections are told by this mark.
    #[arg(long, value_name = "MARK")]
    mark: Option<Mark>,
    /// Ports of the workload that are left alone: 22,9000-9010.
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    skip_inbound_ports: Option<Vec<Ports>>,
    /// Networks whose connections are left alone.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    skip_inbound_cidrs: Option<Vec<IpNet>>,
    /// Ports to which the workload's connections are left alone.
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    skip_outbound_ports: Option<Vec<Ports>>,
    /// Networks to which the workload's connections are left alone.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    skip_outbound_cidrs: Option<Vec<IpNet>>,
    /// The mark that TPROXY uses (0x506).
    #[arg(long, value_name = "MARK")]
    tproxy_mark: Option<Mark>,
    /// The routing table that TPROXY uses (506).
    #[arg(long, value_name = "NUMBER")]
    tproxy_table: Option<Table>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// The destination is rewritten.
    Redirect,
    /// The destination stays, and the application sees its client's address.
    Tproxy,
}

#[derive(Clone, Copy, ValueEnum)]
enum Only {
    /// What comes to the workload.
    Inbound,
    /// What the workload connects to.
    Outbound,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Tool {
    /// nft if it is there, else iptables.
    #[default]
    Auto,
    /// nft.
    Nft,
    /// iptables.
    Iptables,
}

impl From<Tool> for With {
    fn from(tool: Tool) -> Self {
        match tool {
            Tool::Auto => With::Auto,
            Tool::Nft => With::Nft,
            Tool::Iptables => With::Iptables,
        }
    }
}

impl Capture {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let code = runtime::block_on(async {
            match self.command {
                Command::Install(install) => install.run().await,
                Command::Remove => {
                    capture::remove().await?;
                    output::note("nothing is captured any more");
                    Ok(output::OK)
                }
                Command::Check(check) => check.run().await,
                Command::Print(print) => print.run(),
            }
        })?;
        Ok(ExitCode::from(code))
    }
}

impl Settings {
    /// The settings, or `None` after their errors were told.
    fn read(self) -> Result<Option<settings::Capture>> {
        let mut read = match &self.config {
            None => settings::Capture::default(),
            Some(file) => {
                let text = std::fs::read_to_string(file)
                    .with_context(|| format!("{} cannot be read", file.display()))?;
                match written(file, &text) {
                    Ok(read) => read,
                    Err(errors) => {
                        errors.iter().for_each(|error| output::problem(&error.to_string()));
                        return Ok(None);
                    }
                }
            }
        };
        match self.mode {
            Some(Mode::Redirect) => read.mode = settings::Mode::Redirect,
            Some(Mode::Tproxy) => read.mode = settings::Mode::Tproxy,
            None => {}
        }
        match self.only {
            Some(Only::Inbound) => read.only = Some(settings::Direction::Inbound),
            Some(Only::Outbound) => read.only = Some(settings::Direction::Outbound),
            None => {}
        }
        if self.uid.is_some() || self.mark.is_some() {
            (read.uid, read.mark) = (self.uid, self.mark);
        }
        overlay(&mut read.inbound_port, self.inbound_port);
        overlay(&mut read.outbound_port, self.outbound_port);
        overlay(&mut read.own_ports, self.own_ports);
        overlay(&mut read.skip_inbound_ports, self.skip_inbound_ports);
        overlay(&mut read.skip_inbound_cidrs, self.skip_inbound_cidrs);
        overlay(&mut read.skip_outbound_ports, self.skip_outbound_ports);
        overlay(&mut read.skip_outbound_cidrs, self.skip_outbound_cidrs);
        overlay(&mut read.tproxy_mark, self.tproxy_mark);
        overlay(&mut read.tproxy_table, self.tproxy_table);
        let mut errors = Vec::new();
        read.check(&mut errors);
        errors.iter().for_each(|error| output::problem(&error.to_string()));
        Ok(errors.is_empty().then_some(read))
    }
}

/// What a file says. One of a sidecar is read whole, because all of the sidecar's ports have to be left alone.
fn written(file: &Path, text: &str) -> Result<settings::Capture, Vec<LocatedError>> {
    let mut document =
        Document::parse(&file.display().to_string(), text).map_err(|error| vec![error.into()])?;
    let is_sidecar = document.value().as_object().is_some_and(|all| all.keys().any(|key| key != "capture"));
    if !is_sidecar {
        return settings::Capture::of(&document);
    }
    let dir = file.parent().unwrap_or(Path::new(""));
    let sidecar = Sidecar::read(&mut document, dir, &plugins::Catalog::default(), &ProcessEnv)?;
    if !sidecar.is_transparent() {
        let why = "this sidecar takes nothing that the kernel leads to it: write `inbound.transparent: true`, \
                   `outbound.transparent: true`, or both";
        return Err(vec![document.error(ConfigError::invalid("", why))]);
    }
    Ok(sidecar.captured())
}

fn overlay<T>(setting: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *setting = given;
    }
}

impl Install {
    async fn run(self) -> Result<u8> {
        let Some(settings) = self.settings.read()? else { return Ok(output::FOUND) };
        let by = capture::install(&settings, self.with.into()).await?;
        let directions = [
            (settings::Direction::Inbound, "inbound", settings.inbound_port),
            (settings::Direction::Outbound, "outbound", settings.outbound_port),
        ];
        let taken = directions.into_iter().filter(|(direction, ..)| settings.takes(*direction));
        let taken: Vec<String> = taken.map(|(_, word, port)| format!("{word} to port {port}")).collect();
        output::note(&format!("captured by {by}: {}", taken.join(", ")));
        Ok(output::OK)
    }
}

impl Check {
    async fn run(self) -> Result<u8> {
        let Some(settings) = self.settings.read()? else { return Ok(output::FOUND) };
        let mut differences = Vec::new();
        if !self.probe_only {
            differences = capture::check(&settings, self.with.into()).await?;
        }
        let mut tried = Vec::new();
        if self.probe || self.probe_only {
            let limit = Duration::from_secs(self.timeout);
            for (family, outcome) in probe::probe(settings.outbound_port.get(), By::Anybody, limit).await {
                let told = match outcome {
                    Outcome::Captured => "captured".to_owned(),
                    Outcome::NoRoute => "nothing leaves this machine".to_owned(),
                    Outcome::Missing(why) => {
                        differences.push(format!(
                            "{} is not captured: {why}; `postern sidecar capture check` names what is missing",
                            family.name()
                        ));
                        "not captured".to_owned()
                    }
                };
                tried.push((family.name(), told));
            }
        }
        match self.output {
            Format::Json => output::json(&json!({
                "ok": differences.is_empty(),
                "differences": differences,
                "probes": tried.iter().map(|(family, told)| json!({ "family": family, "result": told })).collect::<Vec<_>>(),
            })),
            Format::Text => {
                for difference in &differences {
                    line(format_args!("{} {difference}", painted("different:", Colour::Red)));
                }
                for (family, told) in &tried {
                    line(format_args!("{family}: {told}"));
                }
                let verdict = match differences.is_empty() {
                    true => painted("the capture stands as it should", Colour::Green),
                    false => painted(&output::count(differences.len(), "difference"), Colour::Red),
                };
                line(format_args!("{verdict}"));
            }
        }
        Ok(if differences.is_empty() { output::OK } else { output::FOUND })
    }
}

impl Print {
    fn run(self) -> Result<u8> {
        let Some(settings) = self.settings.read()? else { return Ok(output::FOUND) };
        let text = match self.iptables {
            true => capture::print_iptables(&settings)?,
            false => capture::print_nft(&settings),
        };
        line(format_args!("{}", text.trim_end()));
        Ok(output::OK)
    }
}
