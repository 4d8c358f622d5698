//! The certificate authority of a mesh: what it signs with, whom it believes, and its service.
//!
//! What the authority is at a moment is a [`Current`]: made from the one record by whoever keeps it, published by a watch
//! channel, and read anew at each call. Nothing here writes the record. What workloads say they use goes to [`Acks`].

pub mod admin;
pub mod attest;
pub mod audit;
pub mod authority;
pub mod channel;
pub mod csr;
pub mod export;
pub mod fleet;
pub mod foundry;
pub mod inspect;
pub mod istio;
pub mod keeper;
#[cfg(test)]
mod keeper_tests;
pub mod limits;
pub mod mark;
pub mod operators;
pub mod outside;
pub mod probe;
pub mod record;
pub mod rotation;
pub mod seal;
pub mod server;
pub mod service;
pub mod store;

/// The messages, made from the proto files.
#[allow(
    missing_docs,
    rust_2018_idioms,
    clippy::pedantic,
    clippy::nursery,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::large_enum_variant,
    reason = "made by tonic"
)]
pub mod proto {
    tonic::include_proto!("postern.ca.v1");
}

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rustls::pki_types::CertificateDer;

use crate::identity::{IdentityPattern, SpiffeId, TrustDomain};
use crate::trust::{KeyId, Revoked, Serial, Trust, TrustError};
use authority::Authority;

/// What becomes of a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RootState {
    /// Trusted, and does not sign yet.
    Staged,
    Active,
    /// Trusted, and does not sign any more.
    Retiring,
}

/// A root in the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleRoot {
    pub certificate: CertificateDer<'static>,
    pub state: RootState,
}

/// Whom workloads are to believe.
#[derive(Clone, Debug)]
pub struct Bundle {
    pub trust_domain: TrustDomain,
    /// Grows with every change of this.
    pub generation: u64,
    /// Who has an older one cannot speak with the others.
    pub least_generation: u64,
    /// Connections whose handshake was made under an older generation have to be made anew.
    pub least_connection_generation: u64,
    pub roots: Vec<BundleRoot>,
    pub revoked: Revoked,
    /// Of a rehearsal: looked at like roots, and not trusted.
    pub shadow_roots: Vec<CertificateDer<'static>>,
    pub made: SystemTime,
}

impl Bundle {
    /// The same as what verifies with it.
    ///
    /// # Errors
    /// One of the roots cannot be one.
    pub fn trust(&self) -> Result<Trust, TrustError> {
        let roots = self.roots.iter().map(|root| root.certificate.clone());
        let trust = Trust::new(self.trust_domain.clone(), self.generation);
        let trust = trust.with_roots(&self.trust_domain, roots)?.with_revoked(self.revoked.clone());
        Ok(trust.with_least_connection(self.least_connection_generation))
    }
}

impl Bundle {
    /// Why the roots of a rehearsal could not be trusted, if they were real.
    ///
    /// # Errors
    /// One of them cannot be one.
    pub fn rehearse(&self) -> Result<(), TrustError> {
        let shadow = Trust::new(self.trust_domain.clone(), self.generation);
        shadow.with_roots(&self.trust_domain, self.shadow_roots.iter().cloned()).map(drop)
    }
}

/// A request to workloads to get a new certificate.
#[derive(Clone, Debug)]
pub struct Renew {
    /// Grows with every request.
    pub generation: u64,
    /// Whom it concerns.
    pub who: Vec<IdentityPattern>,
    /// Among them, these processes alone; none means all.
    pub proxies: BTreeSet<String>,
    /// A certificate by this issuer is new enough.
    pub unless_issued_by: Option<KeyId>,
    /// Each does it at a random moment within this.
    pub spread: Duration,
    pub reason: String,
}

impl Renew {
    /// Whether a process has to do something.
    pub fn concerns(&self, identity: &SpiffeId, proxy_id: &str, issuer: &KeyId) -> bool {
        self.who.iter().any(|who| who.matches(identity))
            && (self.proxies.is_empty() || self.proxies.contains(proxy_id))
            && self.unless_issued_by.as_ref() != Some(issuer)
    }

    /// Whether a process has to be told that was `asked` before by a request of this generation when it had that certificate,
    /// and has the certificate `now`: one that was signed just before the issuer changed, or by a replica that did not know
    /// it yet, may come after the request.
    pub fn is_news(&self, (generation, had): &(u64, Serial), now: &Serial) -> bool {
        self.generation > *generation || (self.unless_issued_by.is_some() && had != now)
    }
}

/// Another issuer for a few, before it is everybody's.
#[derive(Clone, Debug)]
pub struct Canary {
    pub issuer: Arc<Authority>,
    /// By [`Ack::proxy_id`].
    pub proxies: BTreeSet<String>,
}

/// How long certificates live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// The longest that is given, and what is given to who asks for nothing.
    pub longest: Duration,
    /// No certificate is made that lives shorter than two of these because its signer ends.
    pub renewal: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self { longest: Duration::from_secs(24 * 3600), renewal: Duration::from_secs(5 * 60) }
    }
}

/// What the authority is at a moment.
#[derive(Debug)]
pub struct Current {
    bundle: Bundle,
    trust: Trust,
    /// Who signs; nobody while the issuer cannot be used.
    pub issuer: Option<Arc<Authority>>,
    pub canary: Option<Canary>,
    pub renew: Option<Renew>,
    pub lifetimes: Lifetimes,
    /// Roots that are in no bundle any more and are not distrusted: a certificate below them still proves who somebody is
    /// when he asks for a new one.
    pub former_roots: Vec<CertificateDer<'static>>,
    /// Roots that others have the key of: of the certificates below them, those that this authority has signed prove it.
    pub distrusted_roots: Vec<CertificateDer<'static>>,
    /// For so long after its end a certificate still proves who somebody is when he asks for a new one. Zero but for a
    /// recovery from an expired root.
    pub renew_expired: Duration,
}

impl Current {
    /// With nobody who signs.
    ///
    /// # Errors
    /// A root of the bundle cannot be one.
    pub fn new(bundle: Bundle) -> Result<Self, TrustError> {
        Ok(Self {
            trust: bundle.trust()?,
            bundle,
            issuer: None,
            canary: None,
            renew: None,
            lifetimes: Lifetimes::default(),
            former_roots: Vec::new(),
            distrusted_roots: Vec::new(),
            renew_expired: Duration::ZERO,
        })
    }

    /// Signed by this one.
    #[must_use]
    pub fn with_issuer(mut self, issuer: Arc<Authority>) -> Self {
        self.issuer = Some(issuer);
        self
    }

    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Who signs for a process.
    pub fn issuer_for(&self, proxy_id: &str) -> Option<&Arc<Authority>> {
        match &self.canary {
            Some(canary) if canary.proxies.contains(proxy_id) => Some(&canary.issuer),
            _ => self.issuer.as_ref(),
        }
    }
}

/// What a workload uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    pub proxy_id: String,
    pub identity: SpiffeId,
    pub bundle_generation: u64,
    pub leaf_serial: Serial,
    pub leaf_issuer: KeyId,
    pub leaf_not_after: SystemTime,
    /// The bundle under which its oldest connection was made; none when there is no connection.
    pub oldest_connection_generation: Option<u64>,
    /// Its clock against ours.
    pub clock_offset_ms: i64,
    pub version: String,
    /// Why it has not taken the last bundle or certificate.
    pub refused: Option<String>,
    /// Handshakes since its start, and those that failed, by reason.
    pub handshakes: u64,
    pub handshake_failures: std::collections::BTreeMap<String, u64>,
    /// Where it takes connections of the mesh.
    pub mesh_address: Option<SocketAddr>,
}

/// A certificate, and the roots of a bundle with it, for somebody who never says what he uses.
#[derive(Clone, Copy, Debug)]
pub struct Handed<'a> {
    pub identity: &'a SpiffeId,
    pub proxy_id: &'a str,
    pub serial: &'a Serial,
    pub issuer: &'a KeyId,
    pub not_after: SystemTime,
    /// The bundle of the roots.
    pub generation: u64,
    /// The certificate that he showed when he asked.
    pub shown: Option<&'a Serial>,
}

/// Hears what workloads use. Called on the service's tasks: it must not wait.
pub trait Acks: Send + Sync + 'static {
    /// A workload that has shown who it is says this.
    fn heard(&self, ack: Ack);

    /// Its stream has ended. It may come back, and its certificate may still be valid.
    fn gone(&self, identity: &SpiffeId, proxy_id: &str);

    /// It has ended and said so: its key is gone, so nobody uses its certificate any more.
    fn left(&self, identity: &SpiffeId, proxy_id: &str);

    /// A certificate was signed for it. It may never say so.
    fn signed(&self, identity: &SpiffeId, proxy_id: &str, issuer: &KeyId, not_after: SystemTime);

    /// The same for somebody who will never say so.
    fn handed(&self, handed: Handed<'_>);

    /// The process that was handed this certificate.
    fn holder(&self, identity: &SpiffeId, serial: &Serial) -> Option<String>;

    /// Until everything that was handed is written down. This one may wait.
    fn written(&self) -> BoxFuture<'_, Result<(), String>>;
}
