//! The identity of this process and whom it believes, as handshakes use them.
//!
//! rustls configurations are made once. The certificate they show and the roots they check against are looked up at the
//! moment of each handshake, so a renewal or a new bundle changes nothing that a listener or a pool holds. TLS 1.3 only;
//! sessions are never resumed, because a ticket would outlive the root it was given under.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DistinguishedName, Error, OtherError, ServerConfig, SignatureScheme,
};
use tokio::sync::watch;

use crate::identity::{IdentityPattern, SpiffeId, TrustDomain};
use crate::signatures::checks_signatures;
use crate::svid::Svid;
use crate::trust::{Peer, Trust, TrustError, Usage, VerifyError};

/// A certificate or a bundle that is not taken; what was there stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    #[error("there is no trust bundle yet to judge the certificate by")]
    NoTrust,
    #[error("the certificate is not taken: {0}")]
    Unverified(#[from] VerifyError),
    #[error("the certificate is for {new}; this process is {own}")]
    Identity { own: SpiffeId, new: SpiffeId },
    #[error("the bundle is not taken: {0}")]
    Trust(#[from] TrustError),
    #[error("the bundle is of the trust domain `{new}`; this process is of `{own}`")]
    Domain { own: TrustDomain, new: TrustDomain },
    #[error("the bundle has generation {new}; {current} is in force")]
    Older { new: u64, current: u64 },
}

/// Whom a client expects at the other end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Expected {
    /// Anybody of this process's trust domain.
    OwnDomain,
    /// One of these.
    AnyOf(Arc<[IdentityPattern]>),
}

impl Expected {
    fn check(&self, id: &SpiffeId, trust: &Trust) -> Result<(), VerifyError> {
        let (expected, text) = match self {
            Self::OwnDomain => {
                (id.trust_domain() == trust.own().as_str(), format!("somebody of {}", trust.own()))
            }
            Self::AnyOf(patterns) => {
                let text: Vec<_> = patterns.iter().map(ToString::to_string).collect();
                (patterns.iter().any(|pattern| pattern.matches(id)), text.join(" or "))
            }
        };
        if expected { Ok(()) } else { Err(VerifyError::Unexpected { found: id.clone(), expected: text }) }
    }
}

impl From<SpiffeId> for Expected {
    fn from(id: SpiffeId) -> Self {
        Self::AnyOf(Arc::from([IdentityPattern::Exact(id)]))
    }
}

/// Whether clients have to have a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Clients {
    /// They have to.
    Required,
    /// They may come without one; one that they show is verified all the same.
    Optional,
}

/// Who a process is, as it is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    pub domain: TrustDomain,
    /// None where it is whoever its first certificate says.
    pub id: Option<SpiffeId>,
}

/// One process in the mesh. Clones are the same.
#[derive(Clone)]
pub struct MeshIdentity(Arc<Inner>);

/// Within this time everybody has heard of a bundle who hears of bundles at all.
pub const HEARD: Duration = Duration::from_secs(10);

struct Inner {
    own: Option<Own>,
    svid: ArcSwapOption<Svid>,
    trust: ArcSwapOption<Trust>,
    changes: watch::Sender<u64>,
    verified: AtomicU64,
    refused: Refusals,
    /// Open connections by the bundle of their handshake.
    open: Mutex<BTreeMap<u64, usize>>,
    oldest: watch::Sender<Option<u64>>,
    /// When a bundle came that wants connections to be made anew.
    moved: Mutex<Option<Instant>>,
    clock: Arc<dyn TimeProvider>,
    provider: Arc<CryptoProvider>,
}

impl Default for MeshIdentity {
    fn default() -> Self {
        Self::new()
    }
}

impl MeshIdentity {
    /// Nobody yet, who believes nobody.
    #[must_use]
    pub fn new() -> Self {
        Self::with_clock(Arc::new(DefaultTimeProvider))
    }

    /// As [`new`](Self::new), by another clock.
    #[must_use]
    pub fn with_clock(clock: Arc<dyn TimeProvider>) -> Self {
        Self::only(None, clock)
    }

    /// A process that takes certificates and bundles for nobody but `own`.
    #[must_use]
    pub fn only(own: Option<Own>, clock: Arc<dyn TimeProvider>) -> Self {
        Self(Arc::new(Inner {
            own,
            svid: ArcSwapOption::empty(),
            trust: ArcSwapOption::empty(),
            changes: watch::Sender::new(0),
            verified: AtomicU64::new(0),
            refused: Refusals::default(),
            open: Mutex::default(),
            oldest: watch::Sender::new(None),
            moved: Mutex::default(),
            clock,
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
        }))
    }

    /// The time by which certificates are judged.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        let since = self.0.clock.current_time().map_or(0, |time| time.as_secs());
        UNIX_EPOCH.checked_add(Duration::from_secs(since)).unwrap_or(UNIX_EPOCH)
    }

    /// What this process shows.
    #[must_use]
    pub fn svid(&self) -> Option<Arc<Svid>> {
        self.0.svid.load_full()
    }

    /// Whom it believes.
    #[must_use]
    pub fn trust(&self) -> Option<Arc<Trust>> {
        self.0.trust.load_full()
    }

    /// Counts changes of either.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// Shows `svid` from the next handshake on.
    ///
    /// # Errors
    /// Peers that believe the same would not believe it, or it is for somebody else. What was shown before stays.
    pub fn install(&self, svid: impl Into<Arc<Svid>>) -> Result<(), InstallError> {
        let svid = svid.into();
        let trust = self.trust().ok_or(InstallError::NoTrust)?;
        trust.verify(svid.chain(), Usage::Server, self.now())?;
        let own = self.0.own.as_ref().and_then(|own| own.id.clone());
        let own = own.or_else(|| self.svid().map(|own| own.id().clone()));
        if let Some(own) = own.filter(|own| own != svid.id()) {
            return Err(InstallError::Identity { own, new: svid.id().clone() });
        }
        self.0.svid.store(Some(svid));
        self.changed();
        Ok(())
    }

    /// Believes `trust` from the next handshake on.
    ///
    /// # Errors
    /// It has no root that can be used, or is older than what is in force, which stays.
    pub fn set_trust(&self, trust: Trust) -> Result<(), InstallError> {
        trust.check(self.now())?;
        if let Some(own) = self.0.own.as_ref().filter(|own| own.domain != *trust.own()) {
            return Err(InstallError::Domain { own: own.domain.clone(), new: trust.own().clone() });
        }
        if let Some(current) = self.trust()
            && trust.generation() < current.generation()
        {
            return Err(InstallError::Older { new: trust.generation(), current: current.generation() });
        }
        let least = trust.least_connection();
        let moved = self.trust().is_some_and(|current| current.least_connection() < least);
        self.0.trust.store(Some(Arc::new(trust)));
        if moved {
            *self.0.moved.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        self.changed();
        Ok(())
    }

    /// Whether a bundle has wanted connections to be made anew less than [`HEARD`] ago. Another end that has not heard of it
    /// yet counts what is made now as old, and goes on counting it when it has.
    #[must_use]
    pub fn is_moving(&self) -> bool {
        let moved = self.0.moved.lock().unwrap_or_else(PoisonError::into_inner);
        moved.is_some_and(|at| at.elapsed() < HEARD)
    }

    fn changed(&self) {
        self.0.changes.send_modify(|count| *count += 1);
    }

    /// Judges what the other end of a connection showed, again or for the first time.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn peer(&self, chain: &[CertificateDer<'_>], usage: Usage) -> Result<Peer, VerifyError> {
        let trust = self.trust().ok_or(VerifyError::NoTrust)?;
        trust.verify(chain, usage, self.now()).map(|verified| verified.peer)
    }

    /// A connection stands, made under the bundle of now; open until what is returned is dropped.
    #[must_use]
    pub fn connected(&self) -> Connected {
        let generation = self.trust().map_or(0, |trust| trust.generation());
        self.count(|open| *open.entry(generation).or_default() += 1);
        Connected { identity: self.clone(), generation }
    }

    fn count(&self, change: impl FnOnce(&mut BTreeMap<u64, usize>)) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut open);
        let oldest = open.keys().next().copied();
        // Under the lock: what is told last is what is.
        self.0.oldest.send_if_modified(|told| std::mem::replace(told, oldest) != oldest);
    }

    /// The generation of the bundle under which the oldest open connection was made; none when there is no connection.
    #[must_use]
    pub fn oldest_connection(&self) -> watch::Receiver<Option<u64>> {
        self.0.oldest.subscribe()
    }

    /// Peers that were verified in handshakes.
    #[must_use]
    pub fn verified(&self) -> u64 {
        self.0.verified.load(Ordering::Relaxed)
    }

    /// Handshakes that were refused, by side and by [`VerifyError::code`].
    #[must_use]
    pub fn refused(&self) -> Vec<(Usage, &'static str, u64)> {
        self.0.refused.read()
    }

    /// For connections to peers. `alpn` in the order of preference.
    ///
    /// # Errors
    /// rustls cannot do this with its provider, which does not happen with the one that is built in.
    pub fn client_config(&self, expected: Expected, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, Error> {
        let ends =
            Arc::new(Ends { identity: self.clone(), expected: Some(expected), clients: Clients::Required });
        let mut config = ClientConfig::builder_with_details(self.0.provider.clone(), self.0.clock.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(ends.clone())
            .with_client_cert_resolver(ends);
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.resumption = Resumption::disabled();
        // Peers go by identity; a name would tell on the wire who is called.
        config.enable_sni = false;
        Ok(Arc::new(config))
    }

    /// For connections from peers.
    ///
    /// # Errors
    /// As for [`client_config`](Self::client_config).
    pub fn server_config(&self, clients: Clients, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, Error> {
        let ends = Arc::new(Ends { identity: self.clone(), expected: None, clients });
        let mut config = ServerConfig::builder_with_details(self.0.provider.clone(), self.0.clock.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(ends.clone())
            .with_cert_resolver(ends);
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

impl fmt::Debug for MeshIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeshIdentity")
            .field("svid", &self.svid())
            .field("trust", &self.trust())
            .finish_non_exhaustive()
    }
}

/// An open connection.
#[derive(Debug)]
pub struct Connected {
    identity: MeshIdentity,
    generation: u64,
}

impl Connected {
    /// Whether it was made under a bundle that the one of now wants no connections from any more.
    #[must_use]
    pub fn is_outdated(&self) -> bool {
        let least = self.identity.0.trust.load().as_ref().map_or(0, |trust| trust.least_connection());
        self.generation < least
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.identity.count(|open| {
            if let Some(count) = open.get_mut(&self.generation) {
                *count -= 1;
                if *count == 0 {
                    open.remove(&self.generation);
                }
            }
        });
    }
}

/// One side of handshakes, as rustls asks it.
#[derive(Debug)]
struct Ends {
    identity: MeshIdentity,
    expected: Option<Expected>,
    clients: Clients,
}

impl Ends {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        usage: Usage,
    ) -> Result<(), Error> {
        let mut chain = Vec::with_capacity(above.len() + 1);
        chain.push(leaf.clone());
        chain.extend_from_slice(above);
        match self.judge(&chain, usage) {
            Ok(()) => {
                self.identity.0.verified.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                self.identity.0.refused.count(usage, error.code());
                Err(tls_error(error))
            }
        }
    }

    fn judge(&self, chain: &[CertificateDer<'_>], usage: Usage) -> Result<(), VerifyError> {
        let trust = self.identity.trust().ok_or(VerifyError::NoTrust)?;
        let verified = trust.verify(chain, usage, self.identity.now())?;
        self.expected.as_ref().map_or(Ok(()), |expected| expected.check(&verified.peer.id, &trust))
    }

    fn shown(&self) -> Option<Arc<CertifiedKey>> {
        self.identity.0.svid.load().as_ref().map(|svid| svid.certified_key().clone())
    }
}

/// What the handshake ends with; the alert tells the peer what it can do something about. [`verify_error`] reads it back.
fn tls_error(error: VerifyError) -> Error {
    let known = match &error {
        VerifyError::NoCertificate => return Error::NoCertificatesPresented,
        VerifyError::Expired => CertificateError::Expired,
        VerifyError::NotYetValid => CertificateError::NotValidYet,
        VerifyError::UnknownIssuer => CertificateError::UnknownIssuer,
        VerifyError::Revoked => CertificateError::Revoked,
        _ => CertificateError::Other(OtherError(Arc::new(error))),
    };
    Error::InvalidCertificate(known)
}

/// What made a handshake of ours fail, if it was the peer's certificate.
#[must_use]
pub fn verify_error(error: &Error) -> Option<VerifyError> {
    match error {
        Error::NoCertificatesPresented => Some(VerifyError::NoCertificate),
        Error::InvalidCertificate(CertificateError::Expired) => Some(VerifyError::Expired),
        Error::InvalidCertificate(CertificateError::NotValidYet) => Some(VerifyError::NotYetValid),
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => Some(VerifyError::UnknownIssuer),
        Error::InvalidCertificate(CertificateError::Revoked) => Some(VerifyError::Revoked),
        Error::InvalidCertificate(CertificateError::Other(other)) => {
            other.0.downcast_ref::<VerifyError>().cloned()
        }
        _ => None,
    }
}

impl ServerCertVerifier for Ends {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, Usage::Server).map(|()| ServerCertVerified::assertion())
    }

    checks_signatures!(TLS13, |this| this.identity.0.provider);
}

impl ClientCertVerifier for Ends {
    fn client_auth_mandatory(&self) -> bool {
        self.clients == Clients::Required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, Usage::Client).map(|()| ClientCertVerified::assertion())
    }

    checks_signatures!(TLS13, |this| this.identity.0.provider);
}

impl ResolvesClientCert for Ends {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.shown()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Ends {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.shown()
    }
}

/// Refused handshakes by side and reason.
#[derive(Default)]
struct Refusals([[AtomicU64; CODES.len()]; 2]);

/// Every [`VerifyError::code`].
const CODES: [&str; 12] = [
    "no_certificate",
    "malformed",
    "identity",
    "trust_domain",
    "unknown_issuer",
    "expired",
    "not_yet_valid",
    "purpose",
    "revoked",
    "distrusted",
    "unexpected_peer",
    "no_trust",
];

impl Refusals {
    fn count(&self, usage: Usage, code: &str) {
        let side = self.0.get(usize::from(usage == Usage::Server));
        let at = CODES.iter().position(|known| *known == code);
        if let Some(count) = side.zip(at).and_then(|(side, at)| side.get(at)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self) -> Vec<(Usage, &'static str, u64)> {
        let sides = [Usage::Client, Usage::Server].into_iter().zip(&self.0);
        sides
            .flat_map(|(usage, side)| {
                CODES
                    .into_iter()
                    .zip(side)
                    .map(move |(code, count)| (usage, code, count.load(Ordering::Relaxed)))
            })
            .collect()
    }
}
