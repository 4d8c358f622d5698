//! `postern explain`: what the gateway does with a request, and why.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::Args;
use edge::explain::Question;
use serde_json::Value;

use crate::client;
use crate::output::{self, Colour, Format, line, painted};
use crate::runtime;

/// Arguments of `postern explain`.
#[derive(Args)]
#[command(after_help = "Examples:\n  postern explain http://shop.example.com/cart\n  \
                        postern explain -X POST -H 'apikey: k' --dir /etc/apisix https://shop.example.com/cart\n\n\
                        Exit codes: 0 a route takes it, 1 the gateway would answer by itself, 3 nobody to ask.")]
pub struct Explain {
    /// The request: scheme, host, path, query.
    url: String,
    /// Method.
    #[arg(short = 'X', long, default_value = "GET")]
    method: String,
    /// Header field, `Name: value`. May be given more than once.
    #[arg(short = 'H', long = "header", value_name = "FIELD")]
    headers: Vec<String>,
    /// Body, for routes that look into it.
    #[arg(short, long)]
    data: Option<String>,
    /// The client's address.
    #[arg(long, value_name = "IP")]
    remote_addr: Option<IpAddr>,
    /// The Control API of a running gateway.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9090", conflicts_with = "dir")]
    control: String,
    /// A configuration directory, in place of a running gateway.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Text or JSON.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Explain {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let question = self.question()?;
        let answer = match &self.dir {
            Some(dir) => {
                let explanation =
                    edge::offline::explain(dir, &question).map_err(|problems| anyhow!(problems))?;
                serde_json::to_value(explanation)?
            }
            None => {
                let question = serde_json::to_value(&question)?;
                runtime::block_on(client::ask(&self.control, "/v1/explain", Some(&question)))?
            }
        };
        match self.output {
            Format::Json => output::json(&answer),
            Format::Text => tell(&answer),
        }
        let served = answer.get("upstream").is_some_and(|upstream| !upstream.is_null());
        Ok(ExitCode::from(if served { output::OK } else { output::FOUND }))
    }

    fn question(&self) -> Result<Question> {
        let headers = self
            .headers
            .iter()
            .map(|field| {
                let (name, value) = field
                    .split_once(':')
                    .ok_or_else(|| anyhow!("-H {field:?} has no colon: write it as 'Name: value'"))?;
                Ok((name.trim().to_owned(), value.trim().to_owned()))
            })
            .collect::<Result<_>>()?;
        Ok(Question {
            method: self.method.clone(),
            url: self.url.clone(),
            headers,
            remote_addr: self.remote_addr,
            body: self.data.clone(),
        })
    }
}

/// Tells an explanation, which may have come over the wire from another version, in words.
fn tell(answer: &Value) {
    let text = |value: &Value, name: &str| match value.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(other) if !other.is_null() => other.to_string(),
        _ => String::new(),
    };
    let list = |name: &str| answer.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let request = answer.get("request").cloned().unwrap_or_default();
    line(format_args!(
        "{} {}{} from {}",
        text(&request, "method"),
        text(&request, "host"),
        text(&request, "path"),
        text(&request, "remote_addr")
    ));
    let candidates = list("candidates");
    line(format_args!("\nroutes tried, in order:"));
    for candidate in &candidates {
        let name =
            format!("{} {}{}", text(candidate, "route"), text(candidate, "host"), text(candidate, "uri"));
        match candidate.get("failed").filter(|failed| !failed.is_null()) {
            None => line(format_args!("  {} {name}", painted("takes it", Colour::Green))),
            Some(_) => line(format_args!(
                "  {} {name}: {}: {}",
                painted("passes  ", Colour::Dim),
                text(candidate, "failed"),
                text(candidate, "because")
            )),
        }
    }
    if candidates.is_empty() {
        line(format_args!("  none has this host and path"));
    }
    let plugins = list("plugins");
    if !plugins.is_empty() {
        line(format_args!("\nplugins, in order:"));
    }
    for plugin in &plugins {
        let phases: Vec<_> = plugin
            .get("phases")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let filter = match plugin.get("filter") {
            Some(Value::Bool(false)) => ", left out by its filter",
            _ => "",
        };
        line(format_args!(
            "  {:>6} {:<20} {} of {}{filter}",
            text(plugin, "priority"),
            text(plugin, "name"),
            phases.join(", "),
            text(plugin, "source")
        ));
    }
    if let Some(upstream) = answer.get("upstream").filter(|upstream| !upstream.is_null()) {
        line(format_args!("\nupstream {} ({}):", text(upstream, "upstream"), text(upstream, "scheme")));
        for node in upstream.get("nodes").and_then(Value::as_array).into_iter().flatten() {
            line(format_args!("  {node}"));
        }
    }
    for name in ["refused", "answer"] {
        if let Some(answer) = answer.get(name).filter(|answer| !answer.is_null()) {
            let reason = format!("{} {}", text(answer, "status"), text(answer, "reason"));
            line(format_args!(
                "\nthe gateway answers {}  {}",
                painted(&reason, Colour::Red),
                text(answer, "detail")
            ));
        }
    }
}
