//! The doors of an authority: the one that workloads call at, the one for clients of Istio, and the socket in its data
//! directory for operators.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::{TcpListener, UnixListener};
use tokio::time::timeout;
use tonic::Status;
use tonic::codegen::Service as _;
use tonic::service::Routes;

use super::istio::Front;
use super::proto::certificate_authority_server::CertificateAuthorityServer;
use super::service::Service;
use crate::grpc::{self, Door, Limits};
use crate::istio::proto::istio_certificate_service_server::IstioCertificateServiceServer;

/// A request for a certificate is a few kilobytes, an acknowledgement less.
const LONGEST_MESSAGE: usize = 64 * 1024;
const CALLS: u32 = 16;
/// One call from its first byte to its answer, where there are no streams.
const CALL: Duration = Duration::from_secs(60);
/// Commands at a time.
const OPERATORS: usize = 64;

/// Serves workloads until `stop`; then their streams are ended, and they call again elsewhere.
pub async fn workloads(
    service: Service,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    stop: impl Future<Output = ()>,
) {
    let limits = Limits { connections: service.limits().connections, calls: CALLS };
    let rpc = CertificateAuthorityServer::new(service.clone()).max_decoding_message_size(LONGEST_MESSAGE);
    let stop = async {
        stop.await;
        service.stop();
    };
    grpc::serve_until(Door::Tcp(listener, Some(tls)), limits, rpc, stop).await;
}

/// Serves clients of Istio until `stop`.
pub async fn istio(
    front: Front,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    stop: impl Future<Output = ()>,
) {
    let limits = Limits { connections: front.service().limits().connections, calls: CALLS };
    let rpc = IstioCertificateServiceServer::new(front).max_decoding_message_size(LONGEST_MESSAGE);
    // There is nothing that stays open here.
    let rpc = tower::service_fn(move |request| {
        let mut rpc = rpc.clone();
        async move {
            let late = || Status::deadline_exceeded("the call took too long").into_http();
            timeout(CALL, rpc.call(request)).await.unwrap_or_else(|_| Ok::<_, Infallible>(late()))
        }
    });
    grpc::serve_until(Door::Tcp(listener, Some(tls)), limits, rpc, stop).await;
}

/// A socket for operators that nobody else of the machine may use. What an earlier process left is replaced.
///
/// # Errors
/// It cannot be made.
pub fn socket(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves operators until `stop`.
pub async fn operators(routes: Routes, listener: UnixListener, stop: impl Future<Output = ()>) {
    grpc::serve_until(Door::Unix(listener), Limits { connections: OPERATORS, calls: CALLS }, routes, stop)
        .await;
}
