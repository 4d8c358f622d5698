//! Tunnels that lead to the application beside us: who the peer is, whether an address is ours, whether the peer may, and then
//! bytes. An address that is not ours is refused whoever asks, or the mesh could be walked through from here. A peer that is
//! no longer believed is cut.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use certs::mesh::{Clients, MeshIdentity};
use certs::trust::{Peer, Usage, VerifyError};
use http::StatusCode;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::ALPN;
use super::server::{Connect, Server, ServerError};
use crate::transport::original_dst::Own;
use crate::transport::tcp::{self, Traffic};

/// For a handshake, and for HTTP/2 to begin after it.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For the application to take a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// A tunnel in which nothing moves is ended.
const IDLE: Duration = Duration::from_secs(3600);

/// Decides who may reach what.
pub trait Gate: Send + Sync + 'static {
    /// Where a tunnel to `target`, an address of ours, leads; `None` if `peer` may not have it.
    fn admit(&self, peer: &Peer, target: SocketAddr) -> Option<SocketAddr>;
}

/// What became of tunnels.
#[derive(Debug, Default)]
pub struct Counts {
    /// They were opened.
    pub opened: AtomicU64,
    /// They would have led to the proxy itself.
    pub loops: AtomicU64,
    /// They would have led to somebody else, or to no address.
    pub foreign: AtomicU64,
    /// The gate did not let them in.
    pub denied: AtomicU64,
    /// The application did not take them.
    pub unreachable: AtomicU64,
}

/// Why a connection of tunnels ended before its peer closed it.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The peer is not of the mesh.
    #[error("no handshake: {0}")]
    Handshake(#[from] io::Error),
    /// It did not come to an end.
    #[error("no handshake within {HANDSHAKE:?}")]
    Slow,
    /// The peer does not want HTTP/2.
    #[error("the handshake did not agree on h2")]
    Protocol,
    /// The peer is not, or no longer, believed.
    #[error("the peer is not believed: {0}")]
    Peer(#[from] VerifyError),
    /// HTTP/2.
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// Takes connections of tunnels; shared by all workers.
pub struct Receiver {
    identity: MeshIdentity,
    tls: Arc<ServerConfig>,
    own: Own,
    gate: Box<dyn Gate>,
    /// What became of tunnels.
    pub counts: Counts,
}

impl Receiver {
    /// For the process that is `identity`, whose listeners are `own`.
    ///
    /// # Errors
    /// As [`MeshIdentity::server_config`].
    pub fn new(identity: MeshIdentity, own: Own, gate: impl Gate) -> Result<Self, rustls::Error> {
        let tls = identity.server_config(Clients::Required, &[ALPN])?;
        Ok(Self { identity, tls, own, gate: Box::new(gate), counts: Counts::default() })
    }

    /// Serves one connection that has come to our port. After `drain` it ends with its last tunnel; dropping this future
    /// cuts all of them.
    ///
    /// # Errors
    /// Why it ended early; nothing has reached the application that the gate did not let through.
    pub async fn serve<T>(self: Arc<Self>, io: T, drain: impl Future<Output = ()>) -> Result<(), ReceiveError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let mut changes = self.identity.changes();
        let shaking = timeout(HANDSHAKE, TlsAcceptor::from(self.tls.clone()).accept(io));
        let stream = shaking.await.map_err(|_| ReceiveError::Slow)??;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(ALPN) {
            return Err(ReceiveError::Protocol);
        }
        let chain: Vec<CertificateDer<'static>> = session.peer_certificates().unwrap_or_default().to_vec();
        let peer = Arc::new(self.identity.peer(&chain, Usage::Client)?);
        let server = Server::begin(stream, HANDSHAKE).await?;
        let tunnel = |connect| self.clone().tunnel(connect, peer.clone());
        let mut serving = pin!(server.run(tunnel, drain));
        loop {
            tokio::select! {
                ended = &mut serving => return Ok(ended?),
                changed = changes.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.identity.peer(&chain, Usage::Client)?;
                }
            }
        }
    }

    async fn tunnel(self: Arc<Self>, connect: Connect, peer: Arc<Peer>) {
        let counts = &self.counts;
        let refused = |count: &AtomicU64, connect: Connect, status, why| {
            count.fetch_add(1, Ordering::Relaxed);
            tracing::info!(peer = %peer.id, target = %connect.authority(), why, "tunnel refused");
            connect.refuse(status, why);
        };
        let Some(target) = connect.target() else {
            let why = "postern; details=\"a tunnel leads to an address and a port\"";
            return refused(&counts.foreign, connect, StatusCode::BAD_REQUEST, why);
        };
        if self.own.is_loop(target) {
            let why = "postern; details=\"it would lead to the proxy itself\"";
            return refused(&counts.loops, connect, StatusCode::LOOP_DETECTED, why);
        }
        if !self.own.is_ours(target.ip()) {
            let why = "postern; details=\"the address is not here\"";
            return refused(&counts.foreign, connect, StatusCode::FORBIDDEN, why);
        }
        let Some(application) = self.gate.admit(&peer, target) else {
            let why = "postern; details=\"a policy forbids it\"";
            return refused(&counts.denied, connect, StatusCode::FORBIDDEN, why);
        };
        let dialled = timeout(CONNECT, certs::outgoing::connect(application)).await;
        let Ok(Ok(application)) = dialled else {
            let why = "postern; error=connection_refused";
            return refused(&counts.unreachable, connect, StatusCode::SERVICE_UNAVAILABLE, why);
        };
        // Bytes come as they come; waiting for more would only delay them.
        let _ = application.set_nodelay(true);
        // A peer that has gone meanwhile needs nothing.
        let Ok(tunnel) = connect.accept() else { return };
        counts.opened.fetch_add(1, Ordering::Relaxed);
        tcp::copy(tunnel, application, Bytes::new(), IDLE, &Arc::<Traffic>::default()).await;
    }
}
