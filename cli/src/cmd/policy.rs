//! `postern sidecar explain`: what the policies of a running sidecar decide about a request or connection, and why.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::Args;
use serde_json::{Map, Value};
use sidecar::policy::Question;

use crate::client;
use crate::output::{self, Colour, Format, line, painted};
use crate::runtime;

/// Arguments of `postern sidecar explain`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  postern sidecar explain --port 5432 --identity spiffe://mesh.local/ns/shop/sa/web\n  \
                        postern sidecar explain --port 8080 -X DELETE --path /orders/7 --claim 'roles=[\"admin\"]'\n\n\
                        Nothing is counted. Exit codes: 0 it would be allowed, 1 it would be refused, 3 nobody to ask."
)]
pub struct Explain {
    /// The port of the application.
    #[arg(short, long)]
    port: u16,
    /// The SPIFFE id of who asks; nobody in particular without it.
    #[arg(short, long)]
    identity: Option<String>,
    /// The address of who asks.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    address: IpAddr,
    /// The method of a request. Without it, it is asked about a connection of bytes.
    #[arg(short = 'X', long)]
    method: Option<String>,
    /// The path of a request, decoded.
    #[arg(long, requires = "method")]
    path: Option<String>,
    /// The host of a request.
    #[arg(long, requires = "method")]
    host: Option<String>,
    /// Header field, `Name: value`. May be given more than once.
    #[arg(short = 'H', long = "header", value_name = "FIELD", requires = "method")]
    headers: Vec<String>,
    /// Claim of the token, `name=value`; a value that is no JSON is text. May be given more than once.
    #[arg(long = "claim", value_name = "CLAIM", requires = "method")]
    claims: Vec<String>,
    /// The sidecar's admin interface.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15021")]
    admin: String,
    /// Text or JSON.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Explain {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let (admin, output) = (self.admin.clone(), self.output);
        let path = format!("/v1/policies/explain?{}", self.question()?.query());
        let answer = runtime::block_on(client::ask(&admin, &path, None))?;
        let allowed = answer.get("allowed").and_then(Value::as_bool).unwrap_or(false);
        match output {
            Format::Json => output::json(&answer),
            Format::Text => tell(allowed, &answer),
        }
        Ok(ExitCode::from(if allowed { output::OK } else { output::FOUND }))
    }

    fn question(self) -> Result<Question> {
        let headers = self.headers.iter().map(|field| {
            let (name, value) = field
                .split_once(':')
                .ok_or_else(|| anyhow!("-H {field:?} has no colon: write it as 'Name: value'"))?;
            Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
        });
        let claims = self.claims.iter().map(|claim| {
            let (name, value) = claim
                .split_once('=')
                .ok_or_else(|| anyhow!("--claim {claim:?} has no `=`: write it as name=value"))?;
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
            Ok((name.to_owned(), value))
        });
        Ok(Question {
            headers: headers.collect::<Result<_>>()?,
            claims: claims.collect::<Result<Map<_, _>>>()?,
            identity: self.identity,
            address: self.address,
            port: self.port,
            method: self.method,
            path: self.path,
            host: self.host.map(|host| host.to_ascii_lowercase()),
        })
    }
}

fn tell(allowed: bool, answer: &Value) {
    let text = |name: &str| answer.get(name).and_then(Value::as_str);
    let verdict = match allowed {
        true => painted("allowed", Colour::Green),
        false => painted("refused", Colour::Red),
    };
    line(format_args!("{verdict} by {}", text("why").unwrap_or("what this version does not know")));
    if let Some(audited) = text("audited") {
        line(format_args!("would be refused by {audited}, if it did more than audit"));
    }
}
