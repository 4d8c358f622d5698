//! How commands reach the authority: gRPC on the socket in its data directory.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use certs::ca::admin::ACTOR;
use certs::ca::proto::admin_client::AdminClient;
use clap::Args;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::{BLOCKED, ERROR, IN_PROGRESS};
use crate::output::Format;

/// How long an answer may take: making keys is the longest.
const DEADLINE: Duration = Duration::from_secs(30);

/// The same where somebody outside may have to sign, and may have to be waited for.
const SIGNING: Duration = Duration::from_secs(660);

/// Where the authority is, and the form of what is printed.
#[derive(Args, Clone)]
pub struct Asked {
    /// The socket of the authority: `operators.sock` in its data directory.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "postern-ca/operators.sock",
        env = "POSTERN_CA_SOCKET",
        global = true
    )]
    pub socket: PathBuf,
    /// Text or JSON.
    #[arg(short, long, value_enum, default_value_t, global = true)]
    pub output: Format,
}

/// What the authority says no to.
#[derive(Debug)]
pub struct Refused {
    pub text: String,
    pub code: u8,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Refused {}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        let code = match status.code() {
            Code::FailedPrecondition => BLOCKED,
            Code::Aborted => IN_PROGRESS,
            _ => ERROR,
        };
        let text = if status.message().is_empty() {
            format!("the authority answered {}", status.code())
        } else {
            status.message().to_owned()
        };
        Self { text, code }
    }
}

impl Asked {
    /// A connection to the authority.
    pub async fn client(&self) -> Result<AdminClient<Channel>> {
        let socket = std::path::absolute(&self.socket)?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))?;
        let channel = endpoint.connect_timeout(DEADLINE).connect().await.with_context(|| {
            format!(
                "no authority answers at {}: is `postern ca run` running here, and is this its socket (--socket)?",
                self.socket.display()
            )
        })?;
        Ok(AdminClient::new(channel))
    }
}

/// A request with its deadline and who asks.
pub fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    let user = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_default();
    if let Ok(value) = user.parse() {
        request.metadata_mut().insert(ACTOR, value);
    }
    request
}

/// A request that may need a signature of somebody outside.
pub fn request_to_sign<T>(message: T) -> Request<T> {
    let mut request = request(message);
    request.set_timeout(SIGNING);
    request
}

/// An answer, or what to say and which exit code.
pub fn answer<T>(answer: Result<tonic::Response<T>, Status>) -> Result<T> {
    Ok(answer.map_err(Refused::from)?.into_inner())
}
