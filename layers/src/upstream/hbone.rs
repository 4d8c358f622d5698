//! Tunnels to peers of the mesh (see `transport::hbone`), over connections that they share. A worker's connections are
//! found by the peer's address, our identity and the expected one, and never carry a tunnel of another. A renewed
//! certificate or bundle retires a connection: tunnels on it go on, new ones get a new connection. A peer that is no longer
//! believed is cut.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use certs::identity::SpiffeId;
use certs::mesh::{Expected, MeshIdentity, verify_error};
use certs::svid::Svid;
use certs::trust::{Usage, VerifyError};
use h2::client::{Connection, SendRequest};
use h2::{PingPong, Reason as H2Reason};
use hashbrown::HashMap;
use http::{Method, Request, StatusCode};
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::transport::hbone::server::Connect;
use crate::transport::hbone::{
    ALPN, CONNECTION_WINDOW, FRAME, HEAD, Lease, MAX_STREAMS, Open, SEND_BUFFER, STREAM_WINDOW, Tunnel,
};

/// A connection without tunnels is kept this long.
const IDLE: Duration = Duration::from_secs(300);

/// While there are tunnels, the peer is asked whether it is there.
const PING: Duration = Duration::from_secs(10);
/// How long an answer may take.
const PONG: Duration = Duration::from_secs(10);

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum HboneError {
    /// This process has no certificate yet.
    #[error("there is no identity yet to show to {0}")]
    NoIdentity(SocketAddr),
    /// The peer cannot be reached.
    #[error("{peer} cannot be reached: {error}")]
    Connect {
        /// Its address.
        peer: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// It is not whom we expected, or does not believe us.
    #[error("no handshake with {peer}: {error}")]
    Tls {
        /// Its address.
        peer: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// It does not speak HTTP/2 inside.
    #[error("{0} does not speak HBONE: the handshake did not agree on h2")]
    Protocol(SocketAddr),
    /// It broke off.
    #[error("{peer} broke off: {error}")]
    Http2 {
        /// Its address.
        peer: SocketAddr,
        /// Why.
        error: h2::Error,
    },
    /// It does not let us through.
    #[error("{peer} refused the tunnel to {target} with {status}")]
    Refused {
        /// Its address.
        peer: SocketAddr,
        /// Where the tunnel was to lead.
        target: SocketAddr,
        /// Its answer.
        status: StatusCode,
    },
    /// It took too long.
    #[error("no tunnel through {peer} within {limit:?}")]
    TimedOut {
        /// Its address.
        peer: SocketAddr,
        /// How long it had.
        limit: Duration,
    },
}

impl HboneError {
    /// Why the peer's certificate was not taken, if that was it.
    #[must_use]
    pub fn verify_error(&self) -> Option<VerifyError> {
        let Self::Tls { error, .. } = self else { return None };
        verify_error(error.get_ref()?.downcast_ref()?)
    }
}

/// What connections are told apart by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    peer: SocketAddr,
    own: SpiffeId,
    expected: Expected,
}

/// The connections of one worker. Clones are the same.
#[derive(Clone)]
pub struct Hbone(Rc<Inner>);

struct Inner {
    identity: MeshIdentity,
    links: RefCell<HashMap<Key, Vec<Rc<Link>>>>,
}

/// A tunnel that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The tunnel.
    pub tunnel: Tunnel,
    /// What its peer has shown.
    pub chain: Arc<[CertificateDer<'static>]>,
    /// Its connection was made for it.
    pub is_first: bool,
}

/// A connection that stands.
struct Made {
    sender: SendRequest<Bytes>,
    chain: Arc<[CertificateDer<'static>]>,
}

/// One connection, or one that is being made.
struct Link {
    /// Whoever needs it first makes it; if he gives up, the next.
    made: OnceCell<Made>,
    open: Rc<Open>,
    /// What we showed.
    svid: Arc<Svid>,
}

impl Link {
    fn has_room(&self) -> bool {
        let most = MAX_STREAMS as usize;
        let most = self.made.get().map_or(most, |made| most.min(made.sender.current_max_send_streams()));
        self.open.count() < most
    }
}

impl Hbone {
    /// No connections yet.
    #[must_use]
    pub fn new(identity: MeshIdentity) -> Self {
        Self(Rc::new(Inner { identity, links: RefCell::default() }))
    }

    /// Those of this thread; `number` is that of whoever shows `identity`.
    pub(crate) fn of_thread(number: u64, identity: &MeshIdentity) -> Self {
        thread_local! {
            static OWN: RefCell<HashMap<u64, Hbone>> = RefCell::default();
        }
        OWN.with_borrow_mut(|own| own.entry(number).or_insert_with(|| Self::new(identity.clone())).clone())
    }

    /// Opens a tunnel through `peer`, which is expected to be `expected`, to `target`, within `limit`.
    ///
    /// # Errors
    /// There is none, and nothing was sent to the target.
    pub async fn connect(
        &self,
        peer: SocketAddr,
        target: SocketAddr,
        expected: &Expected,
        limit: Duration,
    ) -> Result<Opened, HboneError> {
        let opened = timeout(limit, self.0.clone().open(peer, target, expected)).await;
        opened.unwrap_or(Err(HboneError::TimedOut { peer, limit }))
    }

    /// How many connections there are, also those that are being made.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.links.borrow().values().map(Vec::len).sum()
    }
}

impl Inner {
    async fn open(
        self: Rc<Self>,
        peer: SocketAddr,
        target: SocketAddr,
        expected: &Expected,
    ) -> Result<Opened, HboneError> {
        loop {
            let svid = self.identity.svid().ok_or(HboneError::NoIdentity(peer))?;
            let key = Key { peer, own: svid.id().clone(), expected: expected.clone() };
            let (link, lease) = self.checkout(&key, svid);
            let known = link.made.initialized();
            let made = link.made.get_or_try_init(|| self.dial(&key, &link)).await;
            let Made { sender, chain } = match made {
                Ok(made) => made,
                Err(error) => {
                    self.retire(&key, &link);
                    return Err(error);
                }
            };
            match ask(sender.clone(), target, lease).await {
                Ok((StatusCode::OK, tunnel)) => {
                    return Ok(Opened { tunnel, chain: chain.clone(), is_first: !known });
                }
                Ok((status, _)) => return Err(HboneError::Refused { peer, target, status }),
                // The connection has ended under our hands, before the peer looked at this: another one then.
                Err(error) if is_unseen(&error) && known => self.retire(&key, &link),
                Err(error) => {
                    if error.reason().is_none() || error.is_go_away() || error.is_io() {
                        self.retire(&key, &link);
                    }
                    return Err(HboneError::Http2 { peer, error });
                }
            }
        }
    }

    /// A connection with room, with a place taken on it, or a new one.
    fn checkout(&self, key: &Key, svid: Arc<Svid>) -> (Rc<Link>, Lease) {
        let mut links = self.links.borrow_mut();
        let all = links.entry(key.clone()).or_default();
        // Whoever rotates certificates wants to see the new ones.
        all.retain(|link| Arc::ptr_eq(&link.svid, &svid));
        // The first with room: those behind get to rest, and are let go.
        let link = match all.iter().find(|link| link.has_room()) {
            Some(link) => link.clone(),
            None => {
                let link = Rc::new(Link { made: OnceCell::new(), open: Rc::default(), svid });
                all.push(link.clone());
                link
            }
        };
        let lease = link.open.lease();
        (link, lease)
    }

    /// Nobody gets a tunnel on it any more. It ends with the last one that it has.
    fn retire(&self, key: &Key, link: &Rc<Link>) {
        let mut links = self.links.borrow_mut();
        if let Some(all) = links.get_mut(key) {
            all.retain(|other| !Rc::ptr_eq(other, link));
            if all.is_empty() {
                links.remove(key);
            }
        }
    }

    async fn dial(self: &Rc<Self>, key: &Key, link: &Rc<Link>) -> Result<Made, HboneError> {
        let peer = key.peer;
        let tls = |error| HboneError::Tls { peer, error };
        let config = self.identity.client_config(key.expected.clone(), &[ALPN]);
        let config = config.map_err(|error| tls(io::Error::other(error)))?;
        let tcp = certs::outgoing::connect(peer).await;
        let tcp = tcp.map_err(|error| HboneError::Connect { peer, error })?;
        tcp.set_nodelay(true).map_err(|error| HboneError::Connect { peer, error })?;
        let stream = TlsConnector::from(config).connect(peer.ip().into(), tcp).await.map_err(tls)?;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(ALPN) {
            return Err(HboneError::Protocol(peer));
        }
        let chain: Arc<[CertificateDer<'static>]> = session.peer_certificates().unwrap_or_default().into();
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_header_list_size(HEAD)
            .max_send_buffer_size(SEND_BUFFER)
            .initial_max_send_streams(MAX_STREAMS as usize);
        let (sender, connection) =
            builder.handshake(stream).await.map_err(|error| HboneError::Http2 { peer, error })?;
        let keeper = Keeper {
            pool: Rc::downgrade(self),
            key: key.clone(),
            link: Rc::downgrade(link),
            open: link.open.clone(),
            identity: self.identity.clone(),
            chain: chain.clone(),
        };
        tokio::task::spawn_local(keeper.keep(connection));
        Ok(Made { sender, chain })
    }
}

/// Whether the peer has certainly not looked at what failed.
fn is_unseen(error: &h2::Error) -> bool {
    error.is_go_away() || error.reason() == Some(H2Reason::REFUSED_STREAM) || error.is_io()
}

async fn ask(
    mut sender: SendRequest<Bytes>,
    target: SocketAddr,
    lease: Lease,
) -> Result<(StatusCode, Tunnel), h2::Error> {
    poll_fn(|cx| sender.poll_ready(cx)).await?;
    let (response, send) = sender.send_request(Connect::request(target), false)?;
    let response = response.await?;
    let status = response.status();
    Ok((status, Tunnel::new(send, response.into_body(), lease)))
}

impl Connect {
    /// What asks for a tunnel to `target`.
    fn request(target: SocketAddr) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        let authority = http::uri::Authority::try_from(target.to_string());
        let uri = authority.ok().and_then(|authority| http::Uri::builder().authority(authority).build().ok());
        *request.uri_mut() = uri.unwrap_or_default();
        request
    }
}

/// Drives one connection, and knows when it has to end.
struct Keeper {
    pool: Weak<Inner>,
    key: Key,
    link: Weak<Link>,
    open: Rc<Open>,
    identity: MeshIdentity,
    chain: Arc<[CertificateDer<'static>]>,
}

impl Keeper {
    async fn keep(self, mut connection: Connection<TlsStream<TcpStream>, Bytes>) {
        let mut changes = self.identity.changes();
        let pings = connection.ping_pong();
        let mut connection = pin!(connection);
        let mut silence = pin!(silence(pings, self.open.clone()));
        let mut idle = pin!(sleep_until(self.open.since() + IDLE));
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(peer = %self.key.peer, %error, "a connection of tunnels ended");
                    }
                    break;
                }
                changed = changes.changed() => {
                    // Without a sender the process is ending.
                    if changed.is_err() {
                        break;
                    }
                    match self.identity.peer(&self.chain, Usage::Server) {
                        Ok(_) => self.follow(),
                        Err(error @ (VerifyError::Revoked | VerifyError::Distrusted)) => {
                            tracing::warn!(peer = %self.key.peer, %error, "a peer's tunnels are cut");
                            break;
                        }
                        // What it has shown has ended, or its root has gone in order: what stands is not cut for that.
                        Err(_) => self.let_go(),
                    }
                }
                () = &mut silence => {
                    tracing::info!(peer = %self.key.peer, "a peer does not answer: its tunnels are cut");
                    break;
                }
                () = &mut idle => {
                    if self.open.count() == 0 && self.open.since().elapsed() >= IDLE {
                        break;
                    }
                    let last = if self.open.count() == 0 { self.open.since() } else { Instant::now() };
                    idle.as_mut().reset(last + IDLE);
                }
            }
        }
        self.let_go();
    }

    /// A connection that shows what we no longer show gets no more tunnels.
    fn follow(&self) {
        let Some(link) = self.link.upgrade() else { return };
        let current = self.identity.svid();
        if !current.is_some_and(|current| Arc::ptr_eq(&current, &link.svid)) {
            self.let_go();
        }
    }

    fn let_go(&self) {
        if let (Some(pool), Some(link)) = (self.pool.upgrade(), self.link.upgrade()) {
            pool.retire(&self.key, &link);
        }
    }
}

/// Ends when the peer does not answer.
async fn silence(pings: Option<PingPong>, open: Rc<Open>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(PING).await;
        if open.count() == 0 {
            continue;
        }
        match timeout(PONG, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection's own end says more.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests;
