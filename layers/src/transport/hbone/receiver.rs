//! Tunnels that lead to the application beside us: who the peer is, whether an address is ours, whether the peer may, and then
//! bytes. An address that is not ours is refused whoever asks, or the mesh could be walked through from here. A peer whose
//! certificate was taken back is cut; one that has to show a newer one is told so, and keeps the tunnels that it has.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
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
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::ALPN;
use super::server::{Connect, Server, ServerError};
use crate::local::LocalBox;
use crate::transport::original_dst::Own;
use crate::transport::tcp::{self, Traffic};

/// For a handshake, and for HTTP/2 to begin after it.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For the application to take a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Who has come, with everything that was shown.
pub struct Guest {
    /// Who it is.
    pub peer: Arc<Peer>,
    /// The certificate and those above it.
    pub chain: Vec<CertificateDer<'static>>,
}

/// Decides who may reach what through one connection.
pub trait Gate: 'static {
    /// The leave of a tunnel to `target`, an address of ours; `None` if the guest may not have it.
    fn admit(&self, guest: &Guest, target: SocketAddr) -> Option<Rc<dyn Leave>>;
}

/// The leave of one tunnel to be there, as long as it is.
pub trait Leave: 'static {
    /// Where it leads.
    fn application(&self) -> SocketAddr;
    /// How long nothing may move in it.
    fn idle(&self) -> Duration;
    /// What moves in it is counted here.
    fn traffic(&self) -> &Arc<Traffic>;
    /// Waits until the leave is taken back: why.
    fn revoked(&self) -> LocalBox<'static, &'static str>;
    /// It is over, for this reason.
    fn over(&self, why: &'static str);
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
    own: Arc<Own>,
    /// What became of tunnels.
    pub counts: Counts,
}

impl Counts {
    /// By what became of them.
    pub fn read(&self) -> [(&'static str, u64); 5] {
        [
            ("opened", &self.opened),
            ("loop", &self.loops),
            ("foreign", &self.foreign),
            ("denied", &self.denied),
            ("unreachable", &self.unreachable),
        ]
        .map(|(word, count)| (word, count.load(Ordering::Relaxed)))
    }
}

impl Receiver {
    /// For the process that is `identity`, whose listeners are `own`.
    ///
    /// # Errors
    /// As [`MeshIdentity::server_config`].
    pub fn new(identity: MeshIdentity, own: Arc<Own>) -> Result<Self, rustls::Error> {
        let tls = identity.server_config(Clients::Required, &[ALPN])?;
        Ok(Self { identity, tls, own, counts: Counts::default() })
    }

    /// Serves one connection that has come to our port, as far as `gate` lets it in. After `drain` it ends with its last tunnel; dropping this future
    /// cuts all of them.
    ///
    /// # Errors
    /// Why it ended early; nothing has reached the application that the gate did not let through.
    pub async fn serve<T>(
        self: Arc<Self>,
        io: T,
        gate: impl Gate,
        drain: impl Future<Output = ()>,
    ) -> Result<(), ReceiveError>
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
        let visit = Rc::new((Guest { peer, chain: chain.clone() }, gate));
        let server = Server::begin(stream, HANDSHAKE).await?;
        let tunnel = |connect| {
            let (receiver, visit) = (self.clone(), visit.clone());
            async move { receiver.tunnel(connect, &visit.0, &visit.1).await }
        };
        let outdated = Notify::new();
        let drain = async {
            tokio::select! {
                () = drain => {}
                () = outdated.notified() => {}
            }
        };
        let mut serving = pin!(server.run(tunnel, drain));
        loop {
            tokio::select! {
                ended = &mut serving => return Ok(ended?),
                changed = changes.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    match self.identity.peer(&chain, Usage::Client) {
                        Ok(_) => {}
                        Err(why @ (VerifyError::Revoked | VerifyError::Distrusted)) => return Err(why.into()),
                        // It has ended, or its root has gone in order: that is no reason to cut what stands.
                        Err(_) => outdated.notify_one(),
                    }
                }
            }
        }
    }

    async fn tunnel(&self, connect: Connect, guest: &Guest, gate: &impl Gate) {
        let counts = &self.counts;
        let refused = |count: &AtomicU64, connect: Connect, status, why| {
            count.fetch_add(1, Ordering::Relaxed);
            tracing::info!(peer = %guest.peer.id, target = %connect.authority(), why, "tunnel refused");
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
        let Some(leave) = gate.admit(guest, target) else {
            let why = "postern; details=\"a policy forbids it\"";
            return refused(&counts.denied, connect, StatusCode::FORBIDDEN, why);
        };
        let dialled = timeout(CONNECT, certs::outgoing::connect(leave.application())).await;
        let Ok(Ok(application)) = dialled else {
            leave.over("connect_failed");
            let why = "postern; error=connection_refused";
            return refused(&counts.unreachable, connect, StatusCode::SERVICE_UNAVAILABLE, why);
        };
        // Bytes come as they come; waiting for more would only delay them.
        let _ = application.set_nodelay(true);
        // A peer that has gone meanwhile needs nothing.
        let Ok(tunnel) = connect.accept() else { return };
        counts.opened.fetch_add(1, Ordering::Relaxed);
        let copying = tcp::copy(tunnel, application, Bytes::new(), leave.idle(), leave.traffic());
        let why = tokio::select! {
            ended = copying => ended.as_str(),
            why = leave.revoked() => why,
        };
        leave.over(why);
    }
}
