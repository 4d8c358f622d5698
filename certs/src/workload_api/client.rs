//! Takes the identity of this process from an agent on the same machine, such as SPIRE's.
//!
//! The agent's bundle and those of federated domains are what is believed, not files. A stream that ends is opened again
//! with a growing pause; `InvalidArgument` means that this process calls wrongly and is not repeated, `PermissionDenied`
//! that nobody has registered it yet, which is asked about slowly.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustls::pki_types::{CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};
use zeroize::Zeroize;

use super::proto::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use super::{HEADER, SOCKET_VARIABLE, domain, parted, proto};
use crate::grpc::chain;
use crate::identity::SpiffeId;
use crate::mesh::MeshIdentity;
use crate::source::{Hopeless, Intake, LONGEST_PAUSE, Roots, Source, Told, backoff};
use crate::svid::Svid;
use crate::workload::plan::Backoff;

const CONNECT: Duration = Duration::from_secs(5);
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(10);
/// Between two questions of a process that nobody has registered.
const UNREGISTERED: Duration = Duration::from_secs(15);

/// An agent with a Workload API.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkloadApi {
    /// `unix:` and the path of the socket, or the path alone. What the environment variable `SPIFFE_ENDPOINT_SOCKET` says
    /// where this is not set.
    #[serde(default)]
    pub socket: Option<String>,
    /// Which identity to use, where the agent gives several. The first one where this is not set.
    #[serde(default)]
    pub identity: Option<SpiffeId>,
}

impl WorkloadApi {
    /// The path of the socket.
    ///
    /// # Errors
    /// Nobody says where it is, or not as a path.
    pub fn path(&self) -> Result<PathBuf, String> {
        let variable = || std::env::var(SOCKET_VARIABLE).ok();
        let text = self.socket.clone().or_else(variable).ok_or_else(|| {
            format!("say where the Workload API is: `socket`, or the environment variable {SOCKET_VARIABLE}")
        })?;
        socket_path(&text).map(Path::to_path_buf).ok_or_else(|| {
            format!("`{text}` is not a socket: write unix:///run/spire/agent.sock, or the path alone")
        })
    }
}

/// The path in `unix:///path`, `unix:/path` and `/path`.
fn socket_path(text: &str) -> Option<&Path> {
    let path = text.strip_prefix("unix:").unwrap_or(text);
    let path = path.strip_prefix("//").unwrap_or(path);
    let absolute = path.starts_with('/') && !path.contains(['?', '#', '\0']);
    absolute.then(|| Path::new(path))
}

impl Source for WorkloadApi {
    fn name(&self) -> String {
        match self.path() {
            Ok(path) => format!("workload API {}", path.display()),
            Err(_) => "workload API".to_owned(),
        }
    }

    fn follow(self: Box<Self>, identity: MeshIdentity, told: Told) -> BoxFuture<'static, Hopeless> {
        Box::pin(async move {
            let path = match self.path() {
                Ok(path) => path,
                Err(problem) => return Hopeless(problem),
            };
            let mut intake = Intake::new(identity, told);
            let mut pauses = backoff();
            loop {
                let status = self.stream(&path, &mut intake, &mut pauses).await;
                let reason = format!("{}: {}", path.display(), words(&status));
                let pause = match status.code() {
                    Code::InvalidArgument => return Hopeless(reason),
                    Code::PermissionDenied => UNREGISTERED.mul_f64(0.8 + 0.4 * fastrand::f64()),
                    _ => pauses.pause(LONGEST_PAUSE),
                };
                intake.told().problem(&reason);
                tokio::time::sleep(pause).await;
            }
        })
    }
}

impl WorkloadApi {
    /// Takes what comes, until the stream ends: why it did.
    async fn stream(&self, path: &Path, intake: &mut Intake, pauses: &mut Backoff) -> Status {
        match self.messages(path, intake, pauses).await {
            Ok(()) => Status::unavailable("the agent has ended the stream"),
            Err(status) => status,
        }
    }

    async fn messages(&self, path: &Path, intake: &mut Intake, pauses: &mut Backoff) -> Result<(), Status> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", path.display()))
            .map_err(|error| Status::unavailable(chain(&error)))?
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PONG);
        let channel = endpoint.connect().await.map_err(|error| Status::unavailable(chain(&error)))?;
        let mut request = Request::new(proto::X509svidRequest {});
        request.metadata_mut().insert(HEADER, MetadataValue::from_static("true"));
        let mut messages = SpiffeWorkloadApiClient::new(channel).fetch_x509svid(request).await?.into_inner();
        while let Some(message) = messages.message().await? {
            *pauses = backoff();
            match self.read(message) {
                Ok((roots, svid)) => match intake.take(Some(&roots), Some(svid)) {
                    Ok(_) => intake.told().well(),
                    // The next message may be better.
                    Err(error) => intake.told().problem(&error),
                },
                Err(problem) => {
                    let problem = format!("{}: what the agent sent is not taken: {problem}", path.display());
                    intake.told().problem(&problem);
                }
            }
        }
        Ok(())
    }

    fn read(&self, message: proto::X509svidResponse) -> Result<(Roots, Svid), String> {
        let wanted = |svid: &proto::X509svid| match &self.identity {
            Some(identity) => svid.spiffe_id == identity.as_str(),
            None => true,
        };
        let mut found = None;
        for mut svid in message.svids {
            if found.is_none() && wanted(&svid) {
                found = Some(svid);
            } else {
                svid.x509_svid_key.zeroize();
            }
        }
        let svid = found.ok_or_else(|| match &self.identity {
            Some(identity) => format!("there is no {identity} in it"),
            None => "there is no identity in it".to_owned(),
        })?;
        let id: SpiffeId = svid.spiffe_id.parse().map_err(|error| format!("{}: {error}", svid.spiffe_id))?;
        let chain = parted(&svid.x509_svid)?;
        let mut key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(svid.x509_svid_key));
        let own = Svid::new(chain, &key);
        key.zeroize();
        let own = own.map_err(|error| error.to_string())?;
        if *own.id() != id {
            return Err(format!("the certificate is for {} and the message says {id}", own.id()));
        }
        let domain_of = |text: &str| domain(text).map_err(|error| format!("{text}: {error}"));
        let mut roots = Roots::of(domain_of(id.trust_domain())?, parted(&svid.bundle)?);
        for (name, bundle) in message.federated_bundles {
            // A federation that cannot be read is not to take the own domain away.
            match domain_of(&name).and_then(|domain| Ok((domain, parted(&bundle)?))) {
                Ok((domain, bundle)) if domain != roots.own => drop(roots.domains.insert(domain, bundle)),
                Ok(_) => {}
                Err(problem) => tracing::warn!(name, problem, "the bundle of a federated domain is left out"),
            }
        }
        roots.crls = message.crl.into_iter().map(CertificateRevocationListDer::from).collect();
        Ok((roots, own))
    }
}

/// What a call ended with.
fn words(status: &Status) -> String {
    match status.code() {
        Code::PermissionDenied => {
            format!("the agent has no identity for this process (registered?): {}", status.message())
        }
        Code::InvalidArgument => format!("the agent does not understand the call: {}", status.message()),
        _ if status.message().is_empty() => status.code().description().to_owned(),
        _ => status.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_written_as_the_standard_says_or_as_a_path() {
        let cases = [
            ("unix:///run/spire/agent.sock", Some("/run/spire/agent.sock")),
            ("unix:/run/a.sock", Some("/run/a.sock")),
            ("/run/a.sock", Some("/run/a.sock")),
            ("unix://run/a.sock", None),
            ("run/a.sock", None),
            ("tcp://127.0.0.1:8000", None),
            ("unix:///run/a.sock?x", None),
            ("", None),
        ];
        for (text, path) in cases {
            assert_eq!(socket_path(text), path.map(Path::new), "{text}");
        }
    }
}
