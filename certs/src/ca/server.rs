//! The sockets of an authority: the one that workloads call, and the one in its data directory for operators.
//!
//! A handshake that is slow holds up nobody; connections are counted and those beyond the limit closed at once. A stop ends
//! the streams, lets calls finish, and closes.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tracing::{debug, info};

use super::attest::Caller;
use super::proto::certificate_authority_server::CertificateAuthorityServer;
use super::service::Service;

const HANDSHAKE: Duration = Duration::from_secs(10);
/// A client that is gone without a word is noticed by this.
const PING: Duration = Duration::from_secs(20);
const PONG: Duration = Duration::from_secs(20);
/// A request for a certificate is a few kilobytes, an acknowledgement less.
const LONGEST_MESSAGE: usize = 64 * 1024;
const CALLS: u32 = 16;
/// What calls under way get after a stop.
const LAST: Duration = Duration::from_secs(10);

/// A connection and who is at its other end.
struct Client {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    _place: OwnedSemaphorePermit,
}

impl Connected for Client {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

async fn shake(
    stream: TcpStream,
    address: std::net::SocketAddr,
    tls: TlsAcceptor,
    place: OwnedSemaphorePermit,
) -> Result<Client, String> {
    let _ = stream.set_nodelay(true);
    let stream = match timeout(HANDSHAKE, tls.accept(stream)).await {
        Ok(shaken) => shaken.map_err(|error| error.to_string())?,
        Err(_) => return Err("no TLS handshake within 10 s".to_owned()),
    };
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
    Ok(Client { stream, caller: Caller { address: Some(address), chain }, _place: place })
}

/// Serves workloads until `stop`.
///
/// # Errors
/// The server cannot go on.
pub async fn workloads(
    service: Service,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let places = Arc::new(Semaphore::new(service.limits().connections));
    let (sender, receiver) = mpsc::channel::<io::Result<Client>>(16);
    let tls = TlsAcceptor::from(tls);
    let accepting = async move {
        // Handshakes end with the server.
        let mut handshakes = tokio::task::JoinSet::new();
        loop {
            let (stream, address) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of descriptors, as a rule: they come back, and not in this instant.
                        debug!(%error, "no connection was accepted");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                Some(_) = handshakes.join_next() => continue,
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                info!(%address, "a workload is turned away: there are too many connections");
                continue;
            };
            let (tls, sender) = (tls.clone(), sender.clone());
            handshakes.spawn(async move {
                match shake(stream, address, tls, place).await {
                    Ok(client) => drop(sender.send(Ok(client)).await),
                    Err(error) => debug!(%address, %error, "a handshake has failed"),
                }
            });
        }
    };
    let incoming =
        stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
    let rpc = CertificateAuthorityServer::new(service.clone()).max_decoding_message_size(LONGEST_MESSAGE);
    let (stopping, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = Server::builder()
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PONG))
        .max_concurrent_streams(CALLS)
        .add_service(rpc)
        .serve_with_incoming_shutdown(incoming, async { drop(stopped.await) });
    tokio::pin!(serving, accepting, stop);
    tokio::select! {
        end = &mut serving => return end,
        () = &mut accepting => {}
        () = stop => {}
    }
    service.stop();
    drop(stopping);
    timeout(LAST, serving).await.unwrap_or(Ok(()))
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
///
/// # Errors
/// The server cannot go on.
pub async fn operators(
    routes: Routes,
    listener: UnixListener,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let incoming = stream::unfold(listener, |listener| async move {
        let accepted: io::Result<UnixStream> = listener.accept().await.map(|(stream, _)| stream);
        if accepted.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Some((accepted, listener))
    });
    Server::builder().add_routes(routes).serve_with_incoming_shutdown(Box::pin(incoming), stop).await
}
