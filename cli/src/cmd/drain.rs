//! `postern drain`: take a node out of use, and wait until nothing uses it any more.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::client;
use crate::output::{self, Colour, Format, line, painted};
use crate::runtime;

/// How often the gateway is asked while a drain is waited for.
const PACE: Duration = Duration::from_millis(200);

/// Arguments of `postern drain`.
#[derive(Args)]
#[command(after_help = "Examples:\n  postern drain orders/10.0.0.3:8080 --wait && systemctl stop orders\n  \
                        postern drain upstreams/7/10.0.0.3:8080 --registry keep\n  \
                        postern drain --list\n  \
                        postern drain --undo orders/10.0.0.3:8080\n\n\
                        The order is the one that loses nothing: no gateway chooses the node any more, its registry is told, \
                        every gateway\nconfirms, what is under way ends.\n\n\
                        Exit codes: 0 done (with --wait: the node may be stopped), 1 not drained in time (who is late is told), \
                        3 nobody to ask,\nor no such service or node.")]
pub struct Drain {
    /// SERVICE or SERVICE/NODE. The service as its registry, or the id of an upstream, names it; the node by its address
    /// or host.
    #[arg(value_name = "SERVICE[/NODE]", required_unless_present = "list")]
    target: Option<String>,
    /// Return when nothing uses the node any more, or say who still does.
    #[arg(short, long)]
    wait: bool,
    /// How long to wait, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "wait")]
    timeout: u64,
    /// What its registry is told.
    #[arg(long, value_enum, default_value_t)]
    registry: Registry,
    /// For whoever reads the list of drains.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Use the node again.
    #[arg(long, conflicts_with_all = ["wait", "registry", "reason", "list"])]
    undo: bool,
    /// Show the drains that are in force.
    #[arg(long, conflicts_with_all = ["target", "wait", "registry", "reason"])]
    list: bool,
    /// The Control API of a running gateway. It tells the others (`postern.peers`).
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9090")]
    control: String,
    /// Text or JSON.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// What the registry of a node is told.
#[derive(Clone, Copy, Default, ValueEnum)]
enum Registry {
    /// It is taken out; the application registers itself again when it starts.
    #[default]
    Deregister,
    /// It stays registered in maintenance, until this drain is undone.
    Maintenance,
    /// Nothing.
    Keep,
}

impl Registry {
    fn as_str(self) -> &'static str {
        match self {
            Self::Deregister => "deregister",
            Self::Maintenance => "maintenance",
            Self::Keep => "keep",
        }
    }
}

impl Drain {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let code = runtime::block_on(async {
            match &self.target {
                None => self.list().await,
                Some(target) if self.undo => self.undo(target).await,
                Some(target) => self.begin(target).await,
            }
        })?;
        Ok(ExitCode::from(code))
    }

    async fn list(&self) -> Result<u8> {
        let drains = client::ask(&self.control, "/v1/drains", None).await?;
        match self.output {
            Format::Json => output::json(&drains),
            Format::Text => {
                let drains = drains.as_array().map(Vec::as_slice).unwrap_or_default();
                if drains.is_empty() {
                    line(format_args!("nothing is drained"));
                }
                for drain in drains {
                    tell(drain);
                }
            }
        }
        Ok(output::OK)
    }

    async fn undo(&self, target: &str) -> Result<u8> {
        let drains = client::ask(&self.control, "/v1/drains", None).await?;
        let is_meant = |drain: &&Value| named(drain) == target || text(drain, "id") == target;
        let Some(drain) = drains.as_array().into_iter().flatten().find(is_meant) else {
            bail!("{target} is not drained: `postern drain --list` shows what is");
        };
        let path = format!("/v1/drains/{}", text(drain, "id"));
        let answer = client::delete(&self.control, &path).await?;
        let problems = answer.get("problems").and_then(Value::as_array).cloned().unwrap_or_default();
        match self.output {
            Format::Json => output::json(&answer),
            Format::Text => {
                line(format_args!("{target} is used again"));
                problems.iter().filter_map(Value::as_str).for_each(output::problem);
            }
        }
        Ok(if problems.is_empty() { output::OK } else { output::FOUND })
    }

    async fn begin(&self, target: &str) -> Result<u8> {
        let (service, node) = split(target);
        let order = json!({ "service": service, "node": node, "registry": self.registry.as_str(), "reason": self.reason });
        let mut drain = client::ask(&self.control, "/v1/drains", Some(&order)).await?;
        let path = format!("/v1/drains/{}", text(&drain, "id"));
        let until = Instant::now() + Duration::from_secs(self.timeout);
        let mut told = String::new();
        while self.wait && text(&drain, "stage") != "drained" {
            let now = progress(&drain);
            if now != told {
                output::note(&now);
                told = now;
            }
            if Instant::now() >= until {
                break;
            }
            tokio::time::sleep(PACE).await;
            drain = client::ask(&self.control, &path, None)
                .await
                .context("the node may still be in use: look at `postern drain --list`")?;
        }
        match self.output {
            Format::Json => output::json(&drain),
            Format::Text => tell(&drain),
        }
        let done = !self.wait || text(&drain, "stage") == "drained";
        Ok(if done { output::OK } else { output::FOUND })
    }
}

/// Service and node. The service may hold slashes itself (`routes/7`, `prod/orders:http`), so the node is what stands
/// behind the last one if it looks like a node.
fn split(target: &str) -> (&str, Option<&str>) {
    let is_node = |text: &str| {
        let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        bare.parse::<std::net::IpAddr>().is_ok() || host.contains('.')
    };
    match target.rsplit_once('/') {
        Some((service, node)) if is_node(node) => (service, Some(node)),
        // `SERVICE//NODE` says that it is one, whatever it looks like.
        Some((service, node)) if service.ends_with('/') => (service.trim_end_matches('/'), Some(node)),
        _ => (target, None),
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn named(drain: &Value) -> String {
    match text(drain, "node") {
        "" => text(drain, "service").to_owned(),
        node => format!("{}/{node}", text(drain, "service")),
    }
}

fn observers(drain: &Value) -> impl Iterator<Item = &Value> {
    drain.get("observers").and_then(Value::as_array).into_iter().flatten()
}

/// One line about who is waited for.
fn progress(drain: &Value) -> String {
    let confirmed = |one: &&Value| one.get("confirmed").and_then(Value::as_bool).unwrap_or_default();
    let in_flight = |one: &Value| one.get("in_flight").and_then(Value::as_u64).unwrap_or_default();
    let all = observers(drain).count();
    let flying: u64 = observers(drain).map(in_flight).sum();
    format!(
        "{}: {} of {all} gateways confirmed, {} under way",
        named(drain),
        observers(drain).filter(confirmed).count(),
        output::count(usize::try_from(flying).unwrap_or(usize::MAX), "request"),
    )
}

/// A drain for people.
fn tell(drain: &Value) {
    let stage = match text(drain, "stage") {
        "drained" => painted("drained: it may be stopped", Colour::Green),
        "in_flight" => painted("not chosen any more, requests are under way", Colour::Dim),
        _ => painted("not confirmed by everybody", Colour::Red),
    };
    line(format_args!("{}  {stage}", named(drain)));
    for one in drain.get("registries").and_then(Value::as_array).into_iter().flatten() {
        let (source, instance) = (text(one, "source"), text(one, "instance"));
        match text(one, "why") {
            "" => line(format_args!("  {source}  {instance}: done")),
            why => line(format_args!("  {source}  {instance}: {}", painted(why, Colour::Red))),
        }
    }
    for one in observers(drain) {
        let flying = one.get("in_flight").and_then(Value::as_u64).unwrap_or_default();
        let name = text(one, "name");
        match (text(one, "problem"), flying) {
            ("", flying) => line(format_args!("  {name}  {flying} under way")),
            // What is under way there is not known.
            (why, 0) => line(format_args!("  {name}  {}", painted(why, Colour::Red))),
            (why, flying) => {
                line(format_args!("  {name}  {flying} under way  {}", painted(why, Colour::Red)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_what_looks_like_one_behind_the_last_slash() {
        let cases = [
            ("orders", ("orders", None)),
            ("orders/10.0.0.3:8080", ("orders", Some("10.0.0.3:8080"))),
            ("orders/10.0.0.3", ("orders", Some("10.0.0.3"))),
            ("orders/[fd00::3]:80", ("orders", Some("[fd00::3]:80"))),
            ("orders/n3.example.com:80", ("orders", Some("n3.example.com:80"))),
            ("routes/7", ("routes/7", None)),
            ("routes/7/10.0.0.3:80", ("routes/7", Some("10.0.0.3:80"))),
            ("prod/orders:http", ("prod/orders:http", None)),
            ("prod/orders:http/10.0.0.3:80", ("prod/orders:http", Some("10.0.0.3:80"))),
            ("orders//n3:80", ("orders", Some("n3:80"))),
        ];
        for (target, parts) in cases {
            assert_eq!(split(target), parts, "{target}");
        }
    }
}
