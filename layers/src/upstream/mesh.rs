//! The way to nodes of the mesh: TLS with the identities of both ends.
//!
//! Requests share HTTP/2 connections whatever their clients speak; upgrades and opaque bytes get connections of their own,
//! told apart by ALPN. What is shown and believed is looked up at each handshake (`certs::mesh`), so a rotation swaps
//! nothing here; connections that were made before one are looked at again and replaced where they would not be made
//! today. A node that is of the mesh is never spoken to in any other way.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use certs::identity::IdentityPattern;
use certs::mesh::{Connected, Expected, HEARD, MeshIdentity, verify_error};
use certs::trust::{KeyId, Peer, Usage, VerifyError};
use discovery::Details;
use http::HeaderName;
use rustls::pki_types::CertificateDer;
use rustls::{AlertDescription, ClientConfig};
use tokio::sync::watch;

use super::hbone::{Hbone, HboneError, Opened};
use super::settings::next_transport;
use crate::error::{Error, Reason};
use crate::transport::hbone::{PORT, Tunnel};

/// Requests of many clients on one connection, HTTP/2.
pub const REQUESTS: &[u8] = b"postern-h2";
/// HTTP/1.1, for switches of protocols.
pub const UPGRADES: &[u8] = b"postern-h1";
/// Bytes that nobody understands.
pub const OPAQUE: &[u8] = b"postern-tcp";

/// Told to the node's sidecar: what the client spoke, where that is not HTTP/2. Taken off requests from anybody else.
pub const SPOKEN: HeaderName = HeaderName::from_static("x-postern-protocol");
/// The value of [`SPOKEN`].
pub const SPOKEN_HTTP1: &str = "http/1.1";

/// What `mesh` of a node's metadata says where it is reached through tunnels.
pub(crate) const HBONE: &str = "hbone";

/// What a connection has to end before its certificate does.
const MARGIN: Duration = Duration::from_secs(60);
/// How much connections of one age may differ from it, in percent.
const SPREAD: u64 = 20;

/// How connections to the mesh are made; one for a process. Clones are the same.
#[derive(Clone)]
pub struct Mesh(Arc<Inner>);

struct Inner {
    /// Unique in the process.
    number: u64,
    identity: MeshIdentity,
    changes: watch::Receiver<u64>,
    /// How old a connection gets, in milliseconds.
    max_age: AtomicU64,
    /// Told when a node does not accept what we show.
    refused: Box<dyn Fn() + Send + Sync>,
    peers: Mutex<HashMap<(Expected, By), Weak<MeshPeer>>>,
    handshakes: Handshakes,
}

/// Handshakes towards nodes of the mesh.
#[derive(Debug, Default)]
struct Handshakes {
    done: AtomicU64,
    failed: Mutex<HashMap<&'static str, u64>>,
}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mesh").field("identity", &self.0.identity).finish_non_exhaustive()
    }
}

impl Mesh {
    /// With the identity of this process. Connections get as old as `max_age`; `refused` is told when a node does not
    /// accept our certificate, which a renewal may mend.
    pub fn new(
        identity: MeshIdentity,
        max_age: Duration,
        refused: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let changes = identity.changes();
        let mesh = Self(Arc::new(Inner {
            number: next_transport(),
            identity,
            changes,
            max_age: AtomicU64::new(0),
            refused: Box::new(refused),
            peers: Mutex::default(),
            handshakes: Handshakes::default(),
        }));
        mesh.set_max_age(max_age);
        mesh
    }

    /// The identity of this process.
    pub fn identity(&self) -> &MeshIdentity {
        &self.0.identity
    }

    /// How old connections that are made from now on get.
    pub fn set_max_age(&self, age: Duration) {
        let age = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        self.0.max_age.store(age, Ordering::Relaxed);
    }

    /// Handshakes that succeeded, and those that failed by reason, since the start.
    pub fn handshakes(&self) -> (u64, Vec<(&'static str, u64)>) {
        let failed = self.0.handshakes.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failed: Vec<_> = failed.iter().map(|(reason, count)| (*reason, *count)).collect();
        failed.sort_unstable();
        (self.0.handshakes.done.load(Ordering::Relaxed), failed)
    }

    /// The way to whoever is `expected`. Nodes with the same expectation share it.
    pub fn peer(&self, expected: Expected, by: By) -> Arc<MeshPeer> {
        let mut peers = self.0.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (expected, by);
        if let Some(peer) = peers.get(&key).and_then(Weak::upgrade) {
            return peer;
        }
        peers.retain(|_, peer| peer.strong_count() > 0);
        let peer = Arc::new(MeshPeer {
            number: next_transport(),
            mesh: self.clone(),
            expected: key.0.clone(),
            by,
            configs: Default::default(),
        });
        peers.insert(key, Arc::downgrade(&peer));
        peer
    }

    /// The tunnels of this thread.
    pub(crate) fn tunnels(&self) -> Hbone {
        Hbone::of_thread(self.0.number, &self.0.identity)
    }

    fn changes(&self) -> u64 {
        *self.0.changes.borrow()
    }

    fn failed(&self, reason: &'static str) {
        let mut failed = self.0.handshakes.failed.lock().unwrap_or_else(PoisonError::into_inner);
        *failed.entry(reason).or_default() += 1;
    }
}

/// How a node of the mesh is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum By {
    /// At its own address, where its sidecar answers as we do.
    #[default]
    Sidecar,
    /// Through a tunnel of HBONE at its host, inside which its application's own protocol is spoken.
    Tunnel,
}

/// What goes over a connection of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// Requests, several at once.
    Requests,
    /// One request at a time, which may switch protocols.
    Upgrades,
    /// Bytes.
    Opaque,
}

impl Carries {
    /// Its name in ALPN.
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::Requests => REQUESTS,
            Self::Upgrades => UPGRADES,
            Self::Opaque => OPAQUE,
        }
    }

    /// What this name in ALPN means.
    pub fn of(alpn: &[u8]) -> Option<Self> {
        [Self::Requests, Self::Upgrades, Self::Opaque].into_iter().find(|carries| carries.alpn() == alpn)
    }
}

/// The way to nodes of which the same is expected.
pub struct MeshPeer {
    number: u64,
    mesh: Mesh,
    expected: Expected,
    by: By,
    configs: [OnceLock<Option<Arc<ClientConfig>>>; 3],
}

impl fmt::Debug for MeshPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeshPeer").field("expected", &self.expected).finish_non_exhaustive()
    }
}

impl MeshPeer {
    /// The number under which connections are shared.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// How it is reached.
    pub fn by(&self) -> By {
        self.by
    }

    /// Opens a tunnel to the node at `address`.
    ///
    /// # Errors
    /// There is none, and nothing has reached the node.
    pub(crate) async fn tunnel(
        self: &Arc<Self>,
        address: SocketAddr,
        limit: Duration,
    ) -> Result<(Tunnel, MeshLink), Error> {
        let host = SocketAddr::new(address.ip(), PORT);
        let opened = self.mesh.tunnels().connect(host, address, &self.expected, limit).await;
        let Opened { tunnel, chain, is_first } = opened.map_err(|error| self.no_tunnel(error))?;
        if is_first {
            self.mesh.0.handshakes.done.fetch_add(1, Ordering::Relaxed);
        }
        Ok((tunnel, self.link(chain.iter().cloned().collect())))
    }

    fn no_tunnel(&self, error: HboneError) -> Error {
        let reason = match &error {
            HboneError::NoIdentity(_) => Reason::NoMeshIdentity,
            HboneError::Tls { error, .. } => {
                let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
                cause.map_or(Reason::TlsFailed, |cause| self.failed(cause))
            }
            HboneError::Protocol(_) => Reason::TlsFailed,
            HboneError::TimedOut { .. } => Reason::ConnectTimeout,
            HboneError::Connect { .. } | HboneError::Http2 { .. } | HboneError::Refused { .. } => {
                Reason::ConnectFailed
            }
        };
        Error::new(reason).because(error).retryable(reason != Reason::NoMeshIdentity)
    }

    /// Who is expected there, in words.
    pub fn expected(&self) -> String {
        match &self.expected {
            Expected::OwnDomain => "anybody of our trust domain".to_owned(),
            Expected::AnyOf(patterns) => {
                patterns.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
            }
        }
    }

    /// How to shake hands there.
    ///
    /// # Errors
    /// This process has nothing to show or believes nobody: without that nothing is said to a node of the mesh.
    pub(crate) fn config(&self, carries: Carries) -> Result<Arc<ClientConfig>, Error> {
        let missing = |what: &'static str| Error::new(Reason::NoMeshIdentity).detail(what);
        let identity = self.mesh.identity();
        if identity.trust().is_none() {
            return Err(missing(
                "no trust bundle has come yet, and a node of the mesh is never spoken to without",
            ));
        }
        if identity.svid().is_none() {
            return Err(missing(
                "no certificate has come yet, and a node of the mesh is never spoken to without",
            ));
        }
        let [requests, upgrades, opaque] = &self.configs;
        let slot = match carries {
            Carries::Requests => requests,
            Carries::Upgrades => upgrades,
            Carries::Opaque => opaque,
        };
        let made = slot.get_or_init(|| {
            let made = identity.client_config(self.expected.clone(), &[carries.alpn()]);
            made.inspect_err(|error| tracing::error!(%error, "no configuration for the mesh")).ok()
        });
        made.clone().ok_or_else(|| Error::new(Reason::Internal).detail("no configuration for the mesh"))
    }

    /// A handshake failed: the failure in our words. Whether a renewal may help is told to whoever renews.
    pub(crate) fn failed(&self, error: &rustls::Error) -> Reason {
        if let Some(refused) = verify_error(error) {
            self.mesh.failed(refused.code());
            return Reason::MeshPeer;
        }
        match error {
            rustls::Error::AlertReceived(alert) if is_about_us(*alert) => {
                self.refused(*alert);
                Reason::MeshRefused
            }
            _ => {
                self.mesh.failed("protocol");
                Reason::TlsFailed
            }
        }
    }

    /// The node does not accept what we showed.
    pub(crate) fn refused(&self, alert: AlertDescription) {
        self.mesh.failed(match alert {
            AlertDescription::UnknownCA => "alert_unknown_ca",
            AlertDescription::CertificateExpired => "alert_expired",
            AlertDescription::CertificateRevoked => "alert_revoked",
            _ => "alert",
        });
        (self.mesh.0.refused)();
    }

    /// A connection stands: what has to be remembered of it.
    pub(crate) fn connected(self: &Arc<Self>, chain: Option<&[CertificateDer<'_>]>) -> MeshLink {
        self.mesh.0.handshakes.done.fetch_add(1, Ordering::Relaxed);
        self.link(chain.into_iter().flatten().map(|cert| cert.clone().into_owned()).collect())
    }

    fn link(self: &Arc<Self>, chain: Vec<CertificateDer<'static>>) -> MeshLink {
        let inner = &self.mesh.0;
        let age = inner.max_age.load(Ordering::Relaxed);
        // Spread, so that connections made together do not end together.
        let jitter = age / 100 * SPREAD;
        let age = age - jitter + fastrand::u64(0..=jitter.saturating_mul(2));
        let svid = inner.identity.svid();
        let left = svid.as_ref().map_or(Duration::ZERO, |svid| svid.left(inner.identity.now()));
        let age = Duration::from_millis(age).min(left.saturating_sub(MARGIN));
        // The other end may count it as one from before the rotation.
        let age = if inner.identity.is_moving() { age.min(HEARD) } else { age };
        let now = Instant::now();
        MeshLink {
            peer: self.clone(),
            until: now.checked_add(age).unwrap_or(now),
            chain,
            issuer: svid.map(|svid| svid.leaf().issuer.clone()),
            connected: inner.identity.connected(),
            looked: Cell::new(self.mesh.changes()),
        }
    }
}

/// The alerts by which a peer says that it does not accept our certificate.
pub(crate) fn is_about_us(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::UnknownCA
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateRequired
            | AlertDescription::AccessDenied
    )
}

/// What has to be remembered of a connection to a node of the mesh.
#[derive(Debug)]
pub(crate) struct MeshLink {
    peer: Arc<MeshPeer>,
    until: Instant,
    chain: Vec<CertificateDer<'static>>,
    /// Who had signed what we showed.
    issuer: Option<KeyId>,
    connected: Connected,
    /// The change of identity or trust since which it was looked at.
    looked: Cell<u64>,
}

impl MeshLink {
    /// Whether it takes no more requests: too old, or it would not be made like this today.
    pub(crate) fn is_stale(&self, now: Instant) -> bool {
        if self.until <= now {
            return true;
        }
        let changes = self.peer.mesh.changes();
        if self.looked.get() == changes {
            return false;
        }
        let identity = self.peer.mesh.identity();
        let issuer = identity.svid().map(|svid| svid.leaf().issuer.clone());
        if issuer != self.issuer || self.connected.is_outdated() || self.verdict().is_err() {
            return true;
        }
        self.looked.set(changes);
        false
    }

    /// What is thought of the peer's certificate now.
    pub(crate) fn verdict(&self) -> Result<(), VerifyError> {
        self.peer.mesh.identity().peer(&self.chain, Usage::Server).map(drop)
    }

    /// Who has answered.
    pub(crate) fn identity(&self) -> Option<Peer> {
        self.chain.first().and_then(|leaf| Peer::read(leaf).ok())
    }

    /// The way it was made.
    pub(crate) fn peer(&self) -> &Arc<MeshPeer> {
        &self.peer
    }

    /// Counts the changes of identity and trust.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.peer.mesh.identity().changes()
    }
}

/// Which nodes of an upstream are of the mesh, and who they are.
#[derive(Clone, Debug)]
pub struct MeshRule {
    mesh: Mesh,
    /// All of them are.
    all: bool,
    /// Who they are where they do not say.
    expected: Expected,
}

impl MeshRule {
    /// For an upstream whose nodes are these; `all` of them are of the mesh, or those that say so.
    pub fn new(mesh: &Mesh, all: bool, identities: Vec<IdentityPattern>) -> Self {
        let expected =
            if identities.is_empty() { Expected::OwnDomain } else { Expected::AnyOf(identities.into()) };
        Self { mesh: mesh.clone(), all, expected }
    }

    /// The way to a node of which this is known; none where it is not of the mesh.
    pub(crate) fn peer(&self, details: Option<&Details>) -> Option<Arc<MeshPeer>> {
        let told = details.and_then(|details| details.identity.as_deref());
        let way = details.and_then(|details| details.meta.get("mesh")).map(|way| &**way);
        let by = if way == Some(HBONE) { By::Tunnel } else { By::Sidecar };
        if let Some(told) = told {
            return Some(match IdentityPattern::from_str(told) {
                Ok(pattern) => self.mesh.peer(Expected::AnyOf([pattern].into()), by),
                Err(error) => {
                    // Of the mesh, and nobody can be it: better no connection than one to anybody.
                    tracing::error!(identity = told, %error, "the identity of a node cannot be read; it is not spoken to");
                    self.mesh.peer(Expected::AnyOf([].into()), by)
                }
            });
        }
        let is_meshed = self.all || matches!(way, Some("true" | HBONE));
        is_meshed.then(|| self.mesh.peer(self.expected.clone(), by))
    }
}

impl PartialEq for MeshRule {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mesh.0, &other.mesh.0) && (self.all, &self.expected) == (other.all, &other.expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn details(identity: Option<&str>, meta: &[(&str, &str)]) -> Details {
        Details {
            identity: identity.map(Into::into),
            meta: meta.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
            ..Details::default()
        }
    }

    #[test]
    fn a_node_is_of_the_mesh_when_it_or_its_upstream_says_so() {
        let mesh = Mesh::new(MeshIdentity::new(), Duration::from_secs(60), || {});
        let orders = "spiffe://mesh.local/ns/default/sa/orders";
        let named = MeshRule::new(&mesh, true, vec![orders.parse().unwrap()]);
        let some = MeshRule::new(&mesh, false, Vec::new());
        let own = "spiffe://mesh.local/ns/default/sa/own";
        let cases = [
            (&named, None, Some(orders), "the upstream says who"),
            (&named, Some(details(Some(own), &[])), Some(own), "the node knows better"),
            (&some, None, None, "nobody says anything"),
            (&some, Some(details(None, &[("mesh", "false")])), None, "it is not"),
            (
                &some,
                Some(details(None, &[("mesh", "true")])),
                Some("anybody of our trust domain"),
                "only that",
            ),
            (&some, Some(details(Some(own), &[])), Some(own), "it says who"),
            (&named, Some(details(Some("orders"), &[])), Some(""), "nobody at all: never anybody"),
            (
                &some,
                Some(details(None, &[("mesh", "hbone")])),
                Some("anybody of our trust domain"),
                "through tunnels",
            ),
        ];
        for (rule, details, expected, case) in cases {
            let peer = rule.peer(details.as_ref());
            assert_eq!(peer.map(|peer| peer.expected()).as_deref(), expected, "{case}");
        }
    }

    #[test]
    fn who_is_expected_to_be_another_never_shares_a_connection() {
        let mesh = Mesh::new(MeshIdentity::new(), Duration::from_secs(60), || {});
        let expected = |text: &str| Expected::AnyOf([text.parse().unwrap()].into());
        let first = mesh.peer(expected("spiffe://a/b"), By::Sidecar);
        assert!(Arc::ptr_eq(&first, &mesh.peer(expected("spiffe://a/b"), By::Sidecar)));
        assert_ne!(first.number(), mesh.peer(expected("spiffe://a/c"), By::Sidecar).number());
        assert_ne!(
            first.number(),
            mesh.peer(expected("spiffe://a/b"), By::Tunnel).number(),
            "nor who is elsewhere"
        );
    }

    #[test]
    fn without_an_identity_nothing_is_said() {
        let mesh = Mesh::new(MeshIdentity::new(), Duration::from_secs(60), || {});
        let error = mesh.peer(Expected::OwnDomain, By::Sidecar).config(Carries::Requests).unwrap_err();
        assert_eq!(error.reason(), Reason::NoMeshIdentity);
        assert!(error.to_string().contains("no trust bundle"), "{error}");
    }
}
