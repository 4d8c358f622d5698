//! Serves local applications: whoever may ask gets the identity of this process, its key, and whom to believe.
//!
//! Who asks is known by the user that the kernel says is at the other end of the socket. What changes is sent at once;
//! who reads slowly gets the latest state, not every one. A call waits while there is no identity yet.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use futures_util::stream::{self, Stream};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::AbortHandle;
use tonic::{Request, Response, Status};

use super::proto::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use super::{HEADER, joined, proto, written};
use crate::grpc::{self, Caller, Door, Limits};
use crate::mesh::MeshIdentity;

/// Connections at once.
const CONNECTIONS: usize = 1024;
/// Calls at once on one connection.
const CALLS: u32 = 16;
/// How long a stale socket may take to say that nobody listens.
const PROBE: Duration = Duration::from_secs(1);
const NO_JWT: &str = "JWT-SVIDs are not issued here: use FetchX509SVID and FetchX509Bundles";

/// Whom the Workload API is served to, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The path of the socket. Its directory has to be there.
    pub socket: PathBuf,
    /// Users, by number, whose processes may ask. The user of this process alone where nobody is named.
    #[serde(default)]
    pub users: BTreeSet<u32>,
}

/// A server at work; ends, and takes its socket away, when dropped.
#[derive(Debug)]
pub struct Serving {
    task: AbortHandle,
    socket: PathBuf,
    /// The file that was made, which another process may have replaced since.
    inode: u64,
}

impl Serving {
    /// Listens on the runtime of the caller.
    ///
    /// # Errors
    /// The socket cannot be made, or somebody else listens there.
    pub async fn start(identity: MeshIdentity, settings: Settings) -> io::Result<Self> {
        let named = |error: io::Error| {
            let text = format!("the socket of the Workload API, {}: {error}", settings.socket.display());
            io::Error::new(error.kind(), text)
        };
        remove_stale(&settings.socket).await.map_err(named)?;
        let listener = UnixListener::bind(&settings.socket).map_err(named)?;
        let own = UnixStream::pair().and_then(|(one, _)| one.peer_cred()).map_err(named)?.uid();
        let users = if settings.users.is_empty() { BTreeSet::from([own]) } else { settings.users.clone() };
        // Who may connect is not yet who may ask: that is decided by credentials.
        let mode = if users.iter().all(|user| *user == own) { 0o600 } else { 0o666 };
        std::fs::set_permissions(&settings.socket, Permissions::from_mode(mode)).map_err(named)?;
        let inode = std::fs::symlink_metadata(&settings.socket).map_err(named)?.ino();
        let service = SpiffeWorkloadApiServer::new(Service { identity, users });
        let limits = Limits { connections: CONNECTIONS, calls: CALLS };
        let task =
            tokio::spawn(grpc::serve_until(Door::Unix(listener), limits, service, std::future::pending()));
        Ok(Self { task: task.abort_handle(), socket: settings.socket, inode })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
        let ours = std::fs::symlink_metadata(&self.socket).is_ok_and(|file| file.ino() == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

/// Removes the socket of a process that is no more.
async fn remove_stale(path: &Path) -> io::Result<()> {
    let kind = match std::fs::symlink_metadata(path) {
        Ok(file) => file.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kind.is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
    }
    match tokio::time::timeout(PROBE, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
    }
}

struct Service {
    identity: MeshIdentity,
    users: BTreeSet<u32>,
}

impl Service {
    /// Whether the caller may ask.
    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        if request.metadata().get(HEADER).is_none_or(|value| value != "true") {
            return Err(Status::invalid_argument(format!("the metadata `{HEADER}: true` is missing")));
        }
        match Caller::of(request).user {
            Some(user) if self.users.contains(&user) => Ok(()),
            Some(user) => Err(Status::permission_denied(format!("user {user} has no identity here"))),
            None => Err(Status::permission_denied("the kernel does not tell who asks")),
        }
    }

    /// What `make` makes of the identity, each time that it is something else.
    fn told<T>(
        &self,
        make: impl Fn(&MeshIdentity) -> Result<Option<T>, Status> + Send + 'static,
    ) -> Messages<T>
    where
        T: Clone + PartialEq + Send + 'static,
    {
        let mut changes = self.identity.changes();
        changes.mark_changed();
        let state = (self.identity.clone(), changes, None::<T>, make);
        Box::pin(stream::unfold(Some(state), |state| async move {
            let (identity, mut changes, last, make) = state?;
            loop {
                // The identity lives as long as this stream does, so this ends with the call.
                changes.changed().await.ok()?;
                match make(&identity) {
                    Ok(message) if message.is_none() || message == last => {}
                    Ok(message) => {
                        let sent = message.clone()?;
                        return Some((Ok(sent), Some((identity, changes, message, make))));
                    }
                    Err(status) => return Some((Err(status), None)),
                }
            }
        }))
    }
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The roots of every domain in the trust, and which domain is the own one.
fn bundles(identity: &MeshIdentity) -> Option<(String, BTreeMap<String, Vec<u8>>)> {
    let trust = identity.trust()?;
    let bundle = |domain| joined(trust.roots(domain).map(|root| &root.certificate));
    let bundles = trust.domains().map(|domain| (written(domain), bundle(domain.as_str()))).collect();
    Some((written(trust.own()), bundles))
}

fn svids(identity: &MeshIdentity) -> Result<Option<proto::X509svidResponse>, Status> {
    let Some((svid, (own, mut bundles))) = identity.svid().zip(bundles(identity)) else { return Ok(None) };
    let key = svid.pkcs8().ok_or_else(|| {
        Status::failed_precondition("the key of the identity is of a kind that is not handed out")
    })?;
    let one = proto::X509svid {
        spiffe_id: svid.id().to_string(),
        x509_svid: joined(svid.chain()),
        x509_svid_key: key.to_vec(),
        bundle: bundles.remove(&own).unwrap_or_default(),
        hint: String::new(),
    };
    Ok(Some(proto::X509svidResponse { svids: vec![one], crl: Vec::new(), federated_bundles: bundles }))
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Service {
    type FetchX509SVIDStream = Messages<proto::X509svidResponse>;
    type FetchX509BundlesStream = Messages<proto::X509BundlesResponse>;
    type FetchJWTBundlesStream = Messages<proto::JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<proto::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.check(&request)?;
        Ok(Response::new(self.told(svids)))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<proto::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.check(&request)?;
        Ok(Response::new(self.told(|identity| {
            Ok(bundles(identity).map(|(_, bundles)| proto::X509BundlesResponse { crl: Vec::new(), bundles }))
        })))
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<proto::JwtsvidRequest>,
    ) -> Result<Response<proto::JwtsvidResponse>, Status> {
        self.check(&request)?;
        Err(Status::unimplemented(NO_JWT))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<proto::JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        self.check(&request)?;
        Err(Status::unimplemented(NO_JWT))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<proto::ValidateJwtsvidRequest>,
    ) -> Result<Response<proto::ValidateJwtsvidResponse>, Status> {
        self.check(&request)?;
        Err(Status::unimplemented(NO_JWT))
    }
}
