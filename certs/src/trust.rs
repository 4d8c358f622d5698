//! Whom the mesh believes: roots by trust domain, what was revoked, and the judgement of a chain that a peer presents.
//!
//! webpki builds and verifies the path; what an X.509-SVID is (standard of that name, sections 2 to 5) is checked here,
//! because webpki knows no URI names. A trust is immutable; a new one replaces it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy, VerifiedPath,
};
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::identity::{IdentityError, SpiffeId, TrustDomain};

/// More certificates than any honest peer sends; a longer list is refused before a path is built.
const MAX_PRESENTED: usize = 8;
/// How far a peer's clock may be from ours when validity is judged.
const SKEW: Duration = Duration::from_secs(20);

/// SHA-256 of something, in lower-case hexadecimal where it is written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of these bytes, as a rule a certificate in DER.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
        Self(hash)
    }

    /// The bytes of the hash.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Fingerprint {
    fn from(hash: [u8; 32]) -> Self {
        Self(hash)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Fingerprint {
    type Err = NotHex;

    /// Reads 64 hexadecimal digits; colons between them are skipped.
    fn from_str(text: &str) -> Result<Self, NotHex> {
        let bytes = unhex(text)?;
        Ok(Self(bytes.try_into().map_err(|_| NotHex)?))
    }
}

/// Text that is no hexadecimal number of the length that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write hexadecimal digits, two for each byte")]
pub struct NotHex;

fn unhex(text: &str) -> Result<Vec<u8>, NotHex> {
    let digits: Vec<u32> = text
        .chars()
        .filter(|char| *char != ':')
        .map(|char| char.to_digit(16))
        .collect::<Option<_>>()
        .ok_or(NotHex)?;
    if digits.is_empty() || !digits.len().is_multiple_of(2) {
        return Err(NotHex);
    }
    let byte =
        |pair: &[u32]| pair.iter().fold(0, |byte, digit| byte << 4 | u8::try_from(*digit).unwrap_or(0));
    Ok(digits.chunks(2).map(byte).collect())
}

/// Bytes that name a serial number or a key, in lower-case hexadecimal.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct HexId(Box<[u8]>);

/// The serial number of a certificate, without leading zeros.
pub type Serial = HexId;
/// The key identifier of an issuer (RFC 5280, 4.2.1.1 and 4.2.1.2).
pub type KeyId = HexId;

impl HexId {
    /// Of these bytes; leading zeros do not count.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        Self(bytes.get(zeros..).unwrap_or_default().into())
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for HexId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for HexId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for HexId {
    type Err = NotHex;

    fn from_str(text: &str) -> Result<Self, NotHex> {
        unhex(text).map(|bytes| Self::new(&bytes))
    }
}

/// Which side of a handshake presented the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Usage {
    Client,
    Server,
}

/// Who a peer is: what its certificate says, of which the judgement is another matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub id: SpiffeId,
    pub serial: Serial,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// The key that signed the certificate.
    pub issuer: KeyId,
    /// Of the certificate.
    pub hash: Fingerprint,
}

/// A peer, and the root that its chain leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub peer: Peer,
    pub root: Fingerprint,
}

/// Why a chain is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    #[error("the peer presented no certificate")]
    NoCertificate,
    #[error("the certificate cannot be read: {0}")]
    Malformed(String),
    #[error("the certificate has {0} URI names and not one")]
    UriNames(usize),
    #[error("the name of the certificate is no identity: {0}")]
    Identity(#[from] IdentityError),
    #[error("no root of the trust domain `{0}` is known")]
    TrustDomain(String),
    #[error("no root signed the chain, or it is not complete")]
    UnknownIssuer,
    #[error("the certificate, or one above it, has expired")]
    Expired,
    #[error("the certificate, or one above it, is not valid yet")]
    NotYetValid,
    #[error("the certificate is not meant for this: {0}")]
    Purpose(&'static str),
    #[error("the certificate was revoked")]
    Revoked,
    #[error("an authority of the chain is distrusted")]
    Distrusted,
    #[error("the peer is {found}, expected was {expected}")]
    Unexpected { found: SpiffeId, expected: String },
    #[error("this process has no trust bundle yet")]
    NoTrust,
}

impl VerifyError {
    /// A word for metrics and logs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Malformed(_) => "malformed",
            Self::UriNames(_) | Self::Identity(_) => "identity",
            Self::TrustDomain(_) => "trust_domain",
            Self::UnknownIssuer => "unknown_issuer",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Purpose(_) => "purpose",
            Self::Revoked => "revoked",
            Self::Distrusted => "distrusted",
            Self::Unexpected { .. } => "unexpected_peer",
            Self::NoTrust => "no_trust",
        }
    }
}

/// A certificate that cannot be a root, or a bundle that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    #[error("root {index} of `{domain}` cannot be used: {problem}")]
    Root { domain: TrustDomain, index: usize, problem: String },
    #[error("revocation list {index} cannot be read: {problem}")]
    Crl { index: usize, problem: String },
    #[error("the bundle has no root of its own trust domain `{0}` that can be used now")]
    NoRoot(TrustDomain),
}

/// A certificate at the top.
#[derive(Clone, Debug)]
pub struct Root {
    pub certificate: CertificateDer<'static>,
    pub fingerprint: Fingerprint,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Its key.
    pub key: KeyId,
}

impl Root {
    /// Reads a root.
    ///
    /// # Errors
    /// In words, why it cannot be one.
    pub fn read(certificate: CertificateDer<'static>) -> Result<Self, String> {
        webpki::anchor_from_trusted_cert(&certificate).map_err(|error| error.to_string())?;
        let (rest, parsed) = X509Certificate::from_der(&certificate).map_err(|error| error.to_string())?;
        if !rest.is_empty() {
            return Err("something stands behind the certificate".to_owned());
        }
        if !parsed.is_ca() {
            return Err("it is no authority (basicConstraints lack CA)".to_owned());
        }
        if parsed.key_usage().ok().flatten().is_some_and(|usage| !usage.value.key_cert_sign()) {
            return Err("its key is not meant to sign certificates (keyUsage lacks keyCertSign)".to_owned());
        }
        let key = parsed.iter_extensions().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(KeyId::new(id.0)),
            _ => None,
        });
        let key = key.unwrap_or_else(|| KeyId::new(Fingerprint::of(parsed.public_key().raw).as_bytes()));
        let (not_before, not_after) = validity(&parsed);
        Ok(Self { fingerprint: Fingerprint::of(&certificate), not_before, not_after, key, certificate })
    }

    /// Whether it is valid at `now`, give or take `skew`.
    fn check(&self, now: SystemTime, skew: Duration) -> Result<(), VerifyError> {
        if now > self.not_after + skew {
            Err(VerifyError::Expired)
        } else if now + skew < self.not_before {
            Err(VerifyError::NotYetValid)
        } else {
            Ok(())
        }
    }
}

/// What was taken back before its time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revoked {
    /// Single certificates.
    pub serials: HashSet<Serial>,
    /// Everything an identity was given before a time.
    pub identities: HashMap<SpiffeId, SystemTime>,
    /// Authorities, by the hash of their certificate, that no chain may have in it.
    pub authorities: HashSet<Fingerprint>,
}

/// Whom this process believes.
pub struct Trust {
    own: TrustDomain,
    generation: u64,
    domains: BTreeMap<TrustDomain, Domain>,
    /// Connections made under an older bundle are to be made anew.
    least_connection: u64,
    revoked: Revoked,
    crls: Vec<CertRevocationList<'static>>,
    skew: Duration,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Default)]
struct Domain {
    roots: Vec<Root>,
    /// The same in the same order, as webpki wants them.
    anchors: Vec<TrustAnchor<'static>>,
}

impl Trust {
    /// A trust of generation `generation` for a process of the domain `own`, without roots yet.
    #[must_use]
    pub fn new(own: TrustDomain, generation: u64) -> Self {
        Self {
            own,
            generation,
            domains: BTreeMap::new(),
            least_connection: 0,
            revoked: Revoked::default(),
            crls: Vec::new(),
            skew: SKEW,
            algorithms: rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms,
        }
    }

    /// Adds the roots of a domain, the own or one that is federated.
    ///
    /// # Errors
    /// One of them cannot be a root.
    pub fn with_roots(
        mut self,
        domain: &TrustDomain,
        roots: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<Self, TrustError> {
        let known = self.domains.entry(domain.clone()).or_default();
        for (index, certificate) in roots.into_iter().enumerate() {
            let wrong = |problem| TrustError::Root { domain: domain.clone(), index, problem };
            let root = Root::read(certificate).map_err(wrong)?;
            if known.roots.iter().any(|other| other.fingerprint == root.fingerprint) {
                continue;
            }
            let anchor = webpki::anchor_from_trusted_cert(&root.certificate)
                .map_err(|error| wrong(error.to_string()))?
                .to_owned();
            known.anchors.push(anchor);
            known.roots.push(root);
        }
        Ok(self)
    }

    /// Connections made under a bundle before `generation` are to be made anew.
    #[must_use]
    pub fn with_least_connection(mut self, generation: u64) -> Self {
        self.least_connection = generation;
        self
    }

    /// With what was taken back.
    #[must_use]
    pub fn with_revoked(mut self, revoked: Revoked) -> Self {
        self.revoked = revoked;
        self
    }

    /// With revocation lists (RFC 5280, section 5) in DER. They count for the certificates of their issuers.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn with_crls<'a>(
        mut self,
        crls: impl IntoIterator<Item = &'a CertificateRevocationListDer<'a>>,
    ) -> Result<Self, TrustError> {
        for (index, crl) in crls.into_iter().enumerate() {
            let crl = OwnedCertRevocationList::from_der(crl)
                .map_err(|error| TrustError::Crl { index, problem: error.to_string() })?;
            self.crls.push(crl.into());
        }
        Ok(self)
    }

    /// Validity is judged give or take `skew`. 20 seconds otherwise.
    #[must_use]
    pub fn with_skew(mut self, skew: Duration) -> Self {
        self.skew = skew;
        self
    }

    /// The domain of this process.
    #[must_use]
    pub fn own(&self) -> &TrustDomain {
        &self.own
    }

    /// The number of the bundle.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The oldest bundle under which connections may have been made that go on.
    #[must_use]
    pub fn least_connection(&self) -> u64 {
        self.least_connection
    }

    /// What was taken back.
    #[must_use]
    pub fn revoked(&self) -> &Revoked {
        &self.revoked
    }

    /// The roots of a domain.
    pub fn roots(&self, domain: &str) -> impl Iterator<Item = &Root> {
        self.domains.get(domain).into_iter().flat_map(|domain| &domain.roots)
    }

    /// The domains with roots.
    pub fn domains(&self) -> impl Iterator<Item = &TrustDomain> {
        self.domains.keys()
    }

    /// Whether anything of the own domain can be verified at `now`.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(&self, now: SystemTime) -> Result<(), TrustError> {
        let usable = self.roots(self.own.as_str()).any(|root| root.check(now, self.skew).is_ok());
        if usable { Ok(()) } else { Err(TrustError::NoRoot(self.own.clone())) }
    }

    /// Judges a chain, leaf first.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: SystemTime,
    ) -> Result<Verified, VerifyError> {
        let (leaf, above) = chain.split_first().ok_or(VerifyError::NoCertificate)?;
        if chain.len() > MAX_PRESENTED {
            return Err(VerifyError::Malformed(format!("more than {MAX_PRESENTED} certificates")));
        }
        let peer = Peer::read(leaf)?;
        let domain = self
            .domains
            .get(peer.id.trust_domain())
            .filter(|domain| !domain.roots.is_empty())
            .ok_or_else(|| VerifyError::TrustDomain(peer.id.trust_domain().to_owned()))?;
        let root = self.path(domain, leaf, above, usage, now)?;
        if self.is_revoked(&peer) {
            return Err(VerifyError::Revoked);
        }
        Ok(Verified { root, peer })
    }

    /// Whether what `peer` showed has been taken back since. Cheap: for every live connection after a change.
    #[must_use]
    pub fn is_revoked(&self, peer: &Peer) -> bool {
        self.revoked.serials.contains(&peer.serial)
            || self.revoked.identities.get(&peer.id).is_some_and(|until| peer.not_before <= *until)
    }

    /// Whether one of these authorities, those of a chain that was shown, is distrusted by name.
    #[must_use]
    pub fn distrusts(&self, authorities: &[Fingerprint]) -> bool {
        authorities.iter().any(|authority| self.revoked.authorities.contains(authority))
    }

    fn path(
        &self,
        domain: &Domain,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        usage: Usage,
        now: SystemTime,
    ) -> Result<Fingerprint, VerifyError> {
        // A certificate that has just expired or is not valid yet may still be valid by the clock of who made it.
        match self.path_at(domain, leaf, above, usage, now, now) {
            Err(VerifyError::Expired) => self.path_at(domain, leaf, above, usage, now - self.skew, now),
            Err(VerifyError::NotYetValid) => self.path_at(domain, leaf, above, usage, now + self.skew, now),
            judged => judged,
        }
    }

    fn path_at(
        &self,
        domain: &Domain,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        usage: Usage,
        at: SystemTime,
        now: SystemTime,
    ) -> Result<Fingerprint, VerifyError> {
        let entity = EndEntityCert::try_from(leaf).map_err(|error| judged(&error))?;
        let since = at.duration_since(UNIX_EPOCH).map_err(|_| VerifyError::NotYetValid)?;
        let usage = match usage {
            Usage::Client => KeyUsage::client_auth(),
            Usage::Server => KeyUsage::server_auth(),
        };
        let crls: Vec<_> = self.crls.iter().collect();
        let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|builder| {
            builder
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Allow)
                .build()
        });
        // What webpki does not look at: whether the root itself is valid, and who is distrusted by name.
        let problem = std::cell::Cell::new(None);
        let acceptable = |path: &VerifiedPath<'_>| {
            self.acceptable(domain, path, now).map(|_| ()).map_err(|error| {
                problem.set(Some(error));
                webpki::Error::UnknownIssuer
            })
        };
        let path = entity.verify_for_usage(
            self.algorithms.all,
            &domain.anchors,
            above,
            UnixTime::since_unix_epoch(since),
            usage,
            revocation,
            Some(&acceptable),
        );
        match path {
            Ok(path) => self.acceptable(domain, &path, now),
            Err(error) => Err(problem.take().unwrap_or_else(|| judged(&error))),
        }
    }

    /// The root of a path whose signatures are right.
    fn acceptable(
        &self,
        domain: &Domain,
        path: &VerifiedPath<'_>,
        now: SystemTime,
    ) -> Result<Fingerprint, VerifyError> {
        let at = domain.anchors.iter().position(|anchor| std::ptr::eq(anchor, path.anchor()));
        let root = at.and_then(|at| domain.roots.get(at)).ok_or(VerifyError::UnknownIssuer)?;
        root.check(now, self.skew)?;
        let distrusted = &self.revoked.authorities;
        let above = path.intermediate_certificates().map(|certificate| Fingerprint::of(&certificate.der()));
        if !distrusted.is_empty() && above.chain([root.fingerprint]).any(|hash| distrusted.contains(&hash)) {
            return Err(VerifyError::Distrusted);
        }
        Ok(root.fingerprint)
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roots: Vec<_> = self.domains.values().flat_map(|domain| &domain.roots).collect();
        f.debug_struct("Trust")
            .field("own", &self.own)
            .field("generation", &self.generation)
            .field("roots", &roots.iter().map(|root| root.fingerprint).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

fn judged(error: &webpki::Error) -> VerifyError {
    use webpki::Error as E;
    match error {
        E::CertExpired { .. } => VerifyError::Expired,
        E::CertNotValidYet { .. } => VerifyError::NotYetValid,
        E::CertRevoked => VerifyError::Revoked,
        E::CertDistrusted => VerifyError::Distrusted,
        E::CaUsedAsEndEntity => VerifyError::Purpose("it is an authority and not a workload"),
        E::RequiredEkuNotFoundContext(_) | E::EmptyEkuExtension => {
            VerifyError::Purpose("its extended key usage does not allow this side of a handshake")
        }
        E::UnknownIssuer
        | E::InvalidSignatureForPublicKey
        | E::UnsupportedSignatureAlgorithmContext(_)
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_)
        | E::EndEntityUsedAsCa
        | E::PathLenConstraintViolated
        | E::NameConstraintViolation
        | E::MaximumPathDepthExceeded
        | E::MaximumPathBuildCallsExceeded
        | E::MaximumSignatureChecksExceeded => VerifyError::UnknownIssuer,
        other => VerifyError::Malformed(other.to_string()),
    }
}

impl Peer {
    /// Reads a leaf: an X.509-SVID, whoever signed it.
    ///
    /// # Errors
    /// It is none.
    pub fn read(leaf: &CertificateDer<'_>) -> Result<Self, VerifyError> {
        let malformed = |error: &dyn fmt::Display| VerifyError::Malformed(error.to_string());
        let (rest, parsed) = X509Certificate::from_der(leaf).map_err(|error| malformed(&error))?;
        if !rest.is_empty() {
            return Err(VerifyError::Malformed("something stands behind the certificate".to_owned()));
        }
        if parsed.is_ca() {
            return Err(VerifyError::Purpose("it is an authority and not a workload"));
        }
        let id = identity(&parsed)?;
        check_usage(&parsed)?;
        let issuer = parsed.iter_extensions().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                id.key_identifier.as_ref().map(|id| KeyId::new(id.0))
            }
            _ => None,
        });
        let (not_before, not_after) = validity(&parsed);
        Ok(Self {
            id,
            serial: Serial::new(parsed.raw_serial()),
            not_before,
            not_after,
            issuer: issuer.unwrap_or_default(),
            hash: Fingerprint::of(leaf),
        })
    }
}

/// The only URI name of a certificate.
fn identity(certificate: &X509Certificate<'_>) -> Result<SpiffeId, VerifyError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| VerifyError::Malformed(error.to_string()))?
        .map(|extension| &extension.value.general_names);
    let uris: Vec<_> = names
        .into_iter()
        .flatten()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris.as_slice() {
        [uri] => Ok(uri.parse()?),
        uris => Err(VerifyError::UriNames(uris.len())),
    }
}

/// A key that signs handshakes, for both sides of them, and no certificates.
fn check_usage(certificate: &X509Certificate<'_>) -> Result<(), VerifyError> {
    let malformed = |error: x509_parser::error::X509Error| VerifyError::Malformed(error.to_string());
    let usage = certificate.key_usage().map_err(malformed)?;
    let usage = usage.ok_or(VerifyError::Purpose("it has no key usage"))?.value;
    if !usage.digital_signature() {
        return Err(VerifyError::Purpose("its key is not meant to sign (keyUsage lacks digitalSignature)"));
    }
    if usage.key_cert_sign() || usage.crl_sign() {
        return Err(VerifyError::Purpose("its key is meant to sign certificates, as an authority's"));
    }
    let extended = certificate.extended_key_usage().map_err(malformed)?;
    let extended = extended.ok_or(VerifyError::Purpose("it has no extended key usage"))?.value;
    if !(extended.client_auth && extended.server_auth) {
        return Err(VerifyError::Purpose("its extended key usage lacks serverAuth or clientAuth"));
    }
    Ok(())
}

/// When a certificate is valid, both ends included.
pub(crate) fn validity(certificate: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let validity = certificate.validity();
    (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()))
}

/// A time from seconds since 1970, which may be before that.
fn time(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(UNIX_EPOCH)
}
