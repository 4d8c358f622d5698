//! `postern ca token`: join tokens, by the socket in the authority's data directory.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use certs::ca::proto;
use certs::ca::proto::join_tokens_client::JoinTokensClient;
use clap::{Args, Subcommand};
use serde_json::json;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::{Place, SOCKET, settings};
use crate::output::{self, Format};
use crate::runtime;

const DEADLINE: Duration = Duration::from_secs(10);

/// Arguments of `postern ca token`.
#[derive(Args)]
pub(super) struct Token {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a token, and print it. It is told once.
    Create(Create),
    /// Show the tokens that are still good.
    List(Common),
    /// Take a token away before its end.
    Delete(Delete),
}

#[derive(Args)]
struct Common {
    #[command(flatten)]
    place: Place,
    /// The socket of the authority; that in the data directory of the settings if it is left out.
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// The form of the output.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Args)]
struct Create {
    /// Who may use it: `spiffe://mesh.local/ns/default/sa/orders`, or all under a path: `spiffe://mesh.local/ns/default/*`.
    #[arg(long, value_name = "ID")]
    identity: String,
    /// How long it is good: `90s`, `15m`, `1h`, `30d`.
    #[arg(long, default_value = "1h", value_parser = duration)]
    ttl: Duration,
    /// How often it may be used.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    uses: u32,
    /// A DNS name that certificates have besides; may be repeated.
    #[arg(long = "dns", value_name = "NAME")]
    dns_names: Vec<String>,
    /// The longest life of the first certificate by it.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    longest_ttl: Option<Duration>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Delete {
    /// The id of the token, as `list` shows it.
    id: String,
    #[command(flatten)]
    common: Common,
}

/// `90s`, `15m`, `1h`, `30d`, or seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let form = || format!("`{text}` is not a time: write 90s, 15m, 1h or 30d");
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        None => (text, 1),
        Some(at) => {
            let (number, unit) = text.split_at(at);
            let unit = match unit {
                "s" => 1,
                "m" => 60,
                "h" => 3600,
                "d" => 86_400,
                _ => return Err(form()),
            };
            (number, unit)
        }
    };
    let number: u64 = number.parse().map_err(|_| form())?;
    number.checked_mul(unit).filter(|seconds| *seconds > 0).map(Duration::from_secs).ok_or_else(form)
}

type Client = JoinTokensClient<Channel>;

async fn connect(socket: &PathBuf) -> Result<Client> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", std::path::absolute(socket)?.display()))?;
    let channel = endpoint.connect_timeout(DEADLINE).timeout(DEADLINE).connect().await;
    let channel = channel.with_context(|| {
        format!("the authority does not answer at {}; is `postern ca run` running?", socket.display())
    })?;
    Ok(JoinTokensClient::new(channel))
}

/// Who asks, for the log, which has the number of the user by the socket besides.
fn actor() -> String {
    format!("operator {}", std::env::var("USER").unwrap_or_default()).trim_end().to_owned()
}

impl Token {
    pub(super) fn run(self) -> Result<ExitCode> {
        let common = match &self.command {
            Command::Create(create) => &create.common,
            Command::List(common) => common,
            Command::Delete(delete) => &delete.common,
        };
        let socket = match &common.socket {
            Some(socket) => socket.clone(),
            None => match settings(&common.place.config) {
                Ok(settings) => settings.data_dir.join(SOCKET),
                Err(code) => return Ok(code),
            },
        };
        let done = runtime::block_on(async {
            let client = connect(&socket).await?;
            let done: Result<_> = Ok(match self.command {
                Command::Create(create) => create.run(client).await,
                Command::List(common) => list(common, client).await,
                Command::Delete(delete) => delete.run(client).await,
            });
            done
        })?;
        match done {
            Ok(()) => Ok(ExitCode::from(output::OK)),
            // What was asked for cannot be; it is no failure of the command.
            Err(status) if matches!(status.code(), Code::InvalidArgument | Code::NotFound) => {
                output::problem(status.message());
                Ok(ExitCode::from(output::FOUND))
            }
            Err(status) => Err(anyhow!("the authority answered {}: {}", status.code(), status.message())),
        }
    }
}

impl Create {
    async fn run(self, mut client: Client) -> Result<(), Status> {
        let asked = proto::CreateTokenRequest {
            identity: self.identity.clone(),
            ttl_s: self.ttl.as_secs(),
            uses: self.uses,
            longest_ttl_s: self.longest_ttl.map_or(0, |ttl| ttl.as_secs()),
            dns_names: self.dns_names,
            actor: actor(),
        };
        let made = client.create_token(asked).await?.into_inner();
        match self.common.output {
            Format::Json => output::json(&json!({
                "token": made.secret,
                "id": made.id,
                "identity": self.identity,
                "uses": self.uses,
                "expires_ms": made.expires_ms,
            })),
            // The token alone, so that it can be sent into a file.
            Format::Text => output::line(format_args!("{}", made.secret)),
        }
        Ok(())
    }
}

async fn list(common: Common, mut client: Client) -> Result<(), Status> {
    let tokens = client.list_tokens(proto::ListTokensRequest {}).await?.into_inner().tokens;
    match common.output {
        Format::Json => {
            let tokens: Vec<_> = tokens
                .iter()
                .map(|token| {
                    json!({
                        "id": token.id,
                        "identity": token.identity,
                        "uses_left": token.uses_left,
                        "expires_ms": token.expires_ms,
                        "dns_names": token.dns_names,
                    })
                })
                .collect();
            output::json(&json!({"tokens": tokens}));
        }
        Format::Text => {
            output::line(format_args!("{:<16}  {:>5}  {:>8}  IDENTITY", "ID", "USES", "LEFT"));
            for token in tokens {
                let left = std::time::UNIX_EPOCH
                    + Duration::from_millis(u64::try_from(token.expires_ms).unwrap_or(0));
                let left = left.duration_since(std::time::SystemTime::now()).unwrap_or_default().as_secs();
                let left = match left {
                    0..120 => format!("{left}s"),
                    120..7200 => format!("{}m", left / 60),
                    7200..172_800 => format!("{}h", left / 3600),
                    _ => format!("{}d", left / 86_400),
                };
                output::line(format_args!(
                    "{:<16}  {:>5}  {left:>8}  {}",
                    token.id, token.uses_left, token.identity
                ));
            }
        }
    }
    Ok(())
}

impl Delete {
    async fn run(self, mut client: Client) -> Result<(), Status> {
        let asked = proto::DeleteTokenRequest { id: self.id.clone(), actor: actor() };
        client.delete_token(asked).await?;
        match self.common.output {
            Format::Json => output::json(&json!({"deleted": self.id})),
            Format::Text => output::line(format_args!("deleted {}", self.id)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_numbers_with_a_unit() {
        let cases = [
            ("90s", Some(90)),
            ("15m", Some(900)),
            ("1h", Some(3600)),
            ("30d", Some(2_592_000)),
            ("60", Some(60)),
            ("0s", None),
            ("", None),
            ("h", None),
            ("1w", None),
            ("-1h", None),
            ("99999999999999999999d", None),
            ("9999999999999999999d", None),
        ];
        for (text, seconds) in cases {
            assert_eq!(duration(text).ok(), seconds.map(Duration::from_secs), "{text}");
        }
    }
}
