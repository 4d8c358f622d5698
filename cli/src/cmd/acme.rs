//! `postern acme`: the certificates that an ACME authority gives, and ordering them anew.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::client;
use crate::output::{self, Colour, Format, line, painted};
use crate::runtime;

/// Arguments of `postern acme`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  postern acme status             every certificate, when it ends, and what went wrong\n  \
                        postern acme renew shop.example.com   order a new one now, whatever is waited for\n\n\
                        Exit codes: 0 every certificate is valid, 1 one is not, or the last order of one failed, 3 nobody to ask, \
                        or nothing\nof this name."
)]
pub struct Acme {
    #[command(subcommand)]
    what: What,
    /// The Control API of a running gateway.
    #[arg(long, global = true, value_name = "HOST:PORT", default_value = "127.0.0.1:9090")]
    control: String,
    /// Text or JSON.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    output: Format,
}

#[derive(Subcommand)]
enum What {
    /// Show the certificates.
    Status,
    /// Order a new certificate now.
    Renew {
        /// The id of an `ssl` resource, or a server name.
        name: String,
    },
}

impl Acme {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let code = runtime::block_on(async {
            match &self.what {
                What::Status => self.status().await,
                What::Renew { name } => self.renew(name).await,
            }
        })?;
        Ok(ExitCode::from(code))
    }

    async fn status(&self) -> Result<u8> {
        let status = client::ask(&self.control, "/v1/acme", None).await?;
        let certificates = list(&status, "certificates");
        match self.output {
            Format::Json => output::json(&status),
            Format::Text => {
                line(format_args!("{}, kept in {}", text(&status, "directory"), text(&status, "store")));
                if let Some(problem) = status.get("problem").and_then(Value::as_str) {
                    line(format_args!(
                        "{}",
                        painted(&format!("the store cannot be used: {problem}"), Colour::Red)
                    ));
                }
                if certificates.is_empty() {
                    line(format_args!("no ssl resource leaves its certificate to ACME"));
                }
                certificates.iter().for_each(tell);
            }
        }
        let well = certificates.iter().all(is_well) && status.get("problem").is_none_or(Value::is_null);
        Ok(if well { output::OK } else { output::FOUND })
    }

    async fn renew(&self, name: &str) -> Result<u8> {
        let answer = client::ask(&self.control, "/v1/acme/renew", Some(&json!({ "name": name }))).await?;
        match self.output {
            Format::Json => output::json(&answer),
            Format::Text => {
                for names in list(&answer, "ordered") {
                    let names: Vec<&str> =
                        names.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                    line(format_args!(
                        "ordered for {}: `postern acme status` shows what comes of it",
                        names.join(", ")
                    ));
                }
            }
        }
        Ok(output::OK)
    }
}

fn is_well(certificate: &Value) -> bool {
    let none = |key| certificate.get(key).is_none_or(Value::is_null);
    text(certificate, "state") == "valid" && none("failure") && none("problem")
}

/// One certificate, in a line for each thing that is worth one.
fn tell(certificate: &Value) {
    let names: Vec<&str> = list(certificate, "names").iter().filter_map(Value::as_str).collect();
    let ssls: Vec<&str> = list(certificate, "ssls").iter().filter_map(Value::as_str).collect();
    let state = text(certificate, "state");
    let colour = if is_well(certificate) { Colour::Green } else { Colour::Red };
    line(format_args!("{}  {}  (ssls/{})", painted(state, colour), names.join(", "), ssls.join(", ssls/")));
    if let Some(end) = number(certificate, "not_after") {
        let renew =
            number(certificate, "renew_at").map(|at| format!(", renewed {}", moment(at))).unwrap_or_default();
        line(format_args!("  ends {}{renew}", moment(end)));
    }
    if let Some(by) = certificate.get("ordered_by").and_then(Value::as_str) {
        line(format_args!("  ordered now by {by}"));
    }
    if let Some(problem) = certificate.get("problem").and_then(Value::as_str) {
        line(format_args!("  not served: {problem}"));
    }
    if let Some(failure) = certificate.get("failure").filter(|failure| failure.is_object()) {
        let count = number(failure, "count").unwrap_or_default();
        let next = number(failure, "next_attempt").unwrap_or_default();
        line(format_args!("  {count} failed in a row, again {}: {}", moment(next), text(failure, "reason")));
    }
}

/// A moment against now: `in 59 d`, `12 min ago`.
fn moment(at: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let span = |seconds: u64| match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    };
    if at >= now { format!("in {}", span(at - now)) } else { format!("{} ago", span(now - at)) }
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn number(value: &Value, key: &str) -> Option<u64> {
    value.get(key).and_then(Value::as_u64)
}
