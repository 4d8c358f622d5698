//! A certificate authority: its certificate, what is handed out beside it, and the key it signs with.
//!
//! Nothing that is signed here outlives its signer. Times are given by the caller. An authority whose root is kept elsewhere
//! is one that was loaded with the key of the issuer alone.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData,
    RevokedCertParams, SanType, SerialNumber, SigningKey,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::asn1_rs::Tag;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};
use zeroize::{Zeroize, Zeroizing};

use super::Lifetimes;
use super::csr::{CsrError, PublicKey};
use super::mark::{Mark, Said};
use crate::identity::{SpiffeId, TrustDomain};
use crate::trust::{Fingerprint, KeyId, Serial, Trust, Usage, validity};

/// For clocks that are late: a certificate is valid from this long before it was made.
pub const BACKDATE: Duration = Duration::from_secs(5 * 60);
/// What lies between the end of a certificate and the end of its signer.
pub const MARGIN: Duration = Duration::from_secs(60);
/// The last day that a certificate can name.
const LAST: u64 = 253_402_300_799;

/// A time as rcgen takes it, in whole seconds.
macro_rules! date {
    ($time:expr) => {
        rcgen::date_time_ymd(1970, 1, 1) + since_1970($time)
    };
}

/// A key or a certificate that cannot be used, or something that cannot be signed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    #[error("this is not PEM: {0}")]
    Pem(String),
    #[error("there is no PEM block of a {0}")]
    Missing(&'static str),
    #[error("the key cannot be used: {0}")]
    Key(String),
    #[error("certificate {index} of the chain cannot be read: {problem}")]
    Certificate { index: usize, problem: String },
    #[error("the key does not belong to the first certificate")]
    KeyMismatch,
    #[error("certificate {0} of the chain was not issued by the one after it")]
    Chain(usize),
    #[error(
        "a certificate would live until {not_after}, because its signer ends: that is less than {least} s from now"
    )]
    SignerEnds { not_after: u64, least: u64 },
    #[error("the authority may not sign authorities (pathlen 0)")]
    PathLength,
    #[error("the certificate of another authority has another kind of key than can be signed: {0}")]
    Foreign(#[from] CsrError),
    #[error("`{0}` is not a DNS name")]
    DnsName(String),
    #[error("signing failed: {0}")]
    Signing(String),
}

/// Kinds of keys that authorities have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KeyKind {
    #[default]
    P256,
    P384,
    Ed25519,
    Rsa2048,
    Rsa4096,
}

/// A private key, zeroised when it is dropped.
pub struct Key(KeyPair);

impl Key {
    /// A new one.
    ///
    /// # Errors
    /// The library fails.
    pub fn generate(kind: KeyKind) -> Result<Self, AuthorityError> {
        let rsa = |size| KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, size);
        let pair = match kind {
            KeyKind::P256 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256),
            KeyKind::P384 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384),
            KeyKind::Ed25519 => KeyPair::generate_for(&rcgen::PKCS_ED25519),
            KeyKind::Rsa2048 => rsa(rcgen::RsaKeySize::_2048),
            KeyKind::Rsa4096 => rsa(rcgen::RsaKeySize::_4096),
        };
        pair.map(Self).map_err(|error| AuthorityError::Key(error.to_string()))
    }

    /// One in PKCS #8, SEC 1 or PKCS #1.
    ///
    /// # Errors
    /// It is none, or too weak.
    pub fn load(der: &PrivateKeyDer<'_>) -> Result<Self, AuthorityError> {
        let pair = KeyPair::try_from(der).map_err(|_| {
            AuthorityError::Key("use P-256, P-384, Ed25519, or RSA of 2048 to 8192 bits".to_owned())
        })?;
        let key = Self(pair);
        PublicKey::from_spki(&key.subject_public_key_info())
            .map_err(|error| AuthorityError::Key(error.to_string()))?;
        Ok(key)
    }

    /// In the form in which it was made or loaded, to be sealed.
    pub fn der(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.0.serialized_der().to_vec())
    }

    /// For rustls.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.0.serialized_der().to_vec()))
    }

    /// SHA-256 of the public key.
    pub fn hash(&self) -> Fingerprint {
        Fingerprint::of(&self.subject_public_key_info())
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

impl PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.0.algorithm()
    }
}

impl SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

/// What a certificate of an authority says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub subject: String,
    pub is_ca: bool,
    pub path_length: Option<u32>,
    pub signs_certificates: bool,
    /// The identifier of its key, where it has one.
    pub key_id: Option<KeyId>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub serial: Serial,
    /// SHA-256 of its public key.
    pub key_hash: Fingerprint,
    pub self_signed: bool,
    names: (Vec<u8>, Vec<u8>),
}

impl Facts {
    /// Reads a certificate.
    ///
    /// # Errors
    /// In words, why it is none.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
        if !rest.is_empty() {
            return Err("something stands behind it".to_owned());
        }
        let constraints = parsed.basic_constraints().map_err(|error| error.to_string())?;
        let usage = parsed.key_usage().map_err(|error| error.to_string())?;
        let key_id = parsed.iter_extensions().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(KeyId::new(id.0)),
            _ => None,
        });
        let (not_before, not_after) = validity(&parsed);
        Ok(Self {
            subject: parsed.subject().to_string(),
            is_ca: parsed.is_ca(),
            path_length: constraints.and_then(|constraints| constraints.value.path_len_constraint),
            signs_certificates: usage.is_some_and(|usage| usage.value.key_cert_sign()),
            key_id,
            not_before,
            not_after,
            serial: Serial::new(parsed.raw_serial()),
            key_hash: Fingerprint::of(parsed.public_key().raw),
            self_signed: parsed.subject() == parsed.issuer(),
            names: (parsed.subject().as_raw().to_vec(), parsed.issuer().as_raw().to_vec()),
        })
    }

    /// Whether this may have been issued by `signer`, going by names.
    fn is_below(&self, signer: &Self) -> bool {
        self.names.1 == signer.names.0
    }
}

/// What a certificate of a workload is to say.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    pub key: &'a PublicKey,
    pub identity: &'a SpiffeId,
    /// Names besides the identity.
    pub dns_names: &'a [String],
    /// Zero means the longest that is given.
    pub ttl: Duration,
    /// The certificate is not valid before this, where everything older was revoked.
    pub not_before: Option<SystemTime>,
    /// What makes its number; without it that is random.
    pub mark: Option<&'a Mark>,
}

/// A certificate that was signed.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate, and those between it and a root.
    pub chain: Vec<CertificateDer<'static>>,
    pub serial: Serial,
    pub issuer: KeyId,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

/// A certificate authority.
pub struct Authority {
    certificate: CertificateDer<'static>,
    /// Between it and its root.
    above: Vec<CertificateDer<'static>>,
    /// Its root, signed by another one: handed out last.
    cross: Vec<CertificateDer<'static>>,
    issuer: Issuer<'static, Key>,
    facts: Facts,
    /// Its own end, or that of one above it.
    ends: SystemTime,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("subject", &self.facts.subject)
            .field("id", &self.id())
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// A new root that signs itself.
    ///
    /// # Errors
    /// The library fails.
    pub fn root(
        domain: &TrustDomain,
        kind: KeyKind,
        life: Duration,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        Self::root_of(domain, Key::generate(kind)?, life, now)
    }

    /// The same with a key that was made before: a root that is renewed.
    ///
    /// # Errors
    /// The library fails.
    pub fn root_of(
        domain: &TrustDomain,
        key: Key,
        life: Duration,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let params = authority_params(domain, "root", &key, None, (now, now + life))?;
        let certificate =
            params.self_signed(&key).map_err(|error| AuthorityError::Signing(error.to_string()))?;
        Self::load(vec![certificate.der().clone()], Vec::new(), key)
    }

    /// A new issuer below this one. It ends before this one does.
    ///
    /// # Errors
    /// This may not sign authorities, or ends within the hour.
    pub fn intermediate(
        &self,
        domain: &TrustDomain,
        kind: KeyKind,
        life: Duration,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        if self.facts.path_length == Some(0) {
            return Err(AuthorityError::PathLength);
        }
        let key = Key::generate(kind)?;
        let not_after = self.clamp(now, life, Duration::from_secs(2))?;
        let params = authority_params(domain, "issuer", &key, Some(0), (now, not_after))?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(|error| AuthorityError::Signing(error.to_string()))?
            .der()
            .clone();
        // A root is known to everybody and not handed out.
        let mut chain = vec![certificate];
        if !self.facts.self_signed {
            chain.push(self.certificate.clone());
        }
        chain.extend(self.above.iter().cloned());
        let mut made = Self::load(chain, self.cross.clone(), key)?;
        made.ends = made.ends.min(self.ends);
        Ok(made)
    }

    /// An authority with a key that was made before. The chain begins with its own certificate; `cross` are other
    /// certificates for an authority above it, by roots that workloads may still have to rely on.
    ///
    /// # Errors
    /// They do not belong together.
    pub fn load(
        chain: Vec<CertificateDer<'static>>,
        cross: Vec<CertificateDer<'static>>,
        key: Key,
    ) -> Result<Self, AuthorityError> {
        let mut facts = Vec::new();
        for (index, certificate) in chain.iter().chain(&cross).enumerate() {
            let read = Facts::read(certificate);
            facts.push(read.map_err(|problem| AuthorityError::Certificate { index, problem })?);
        }
        facts.truncate(chain.len());
        for (index, pair) in facts.windows(2).enumerate() {
            if let [lower, upper] = pair
                && !lower.is_below(upper)
            {
                return Err(AuthorityError::Chain(index));
            }
        }
        let ends = facts.iter().map(|facts| facts.not_after).min();
        let mut chain = chain.into_iter();
        let (Some(certificate), Some(own), Some(ends)) = (chain.next(), facts.into_iter().next(), ends)
        else {
            return Err(AuthorityError::Missing("certificate"));
        };
        if own.key_hash != key.hash() {
            return Err(AuthorityError::KeyMismatch);
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| AuthorityError::Certificate { index: 0, problem: error.to_string() })?;
        // A root at the end of a chain that somebody wrote down is not handed out.
        let above = chain.filter(|above| !Facts::read(above).is_ok_and(|facts| facts.self_signed)).collect();
        Ok(Self { certificate, above, cross, issuer, facts: own, ends })
    }

    /// From PEM: certificates, its own one first, and a private key. Spaces, indentation and line ends are forgiven.
    ///
    /// # Errors
    /// They are not PEM, or do not belong together.
    pub fn from_pem(certificates: &[u8], key: &[u8]) -> Result<Self, AuthorityError> {
        Self::load(pem_certificates(certificates)?, Vec::new(), Key::load(&pem_key(key)?)?)
    }

    /// The same, with its root signed by another one too.
    #[must_use]
    pub fn with_cross(mut self, cross: Vec<CertificateDer<'static>>) -> Self {
        self.cross = cross;
        self
    }

    /// The same, signing nothing that lives longer than its root does.
    #[must_use]
    pub fn ending_with(mut self, root: SystemTime) -> Self {
        self.ends = self.ends.min(root);
        self
    }

    /// The root of another authority, signed by this one: who believes this one believes that one.
    ///
    /// # Errors
    /// The other is no authority, or this one ends.
    pub fn cross_sign(
        &self,
        other: &CertificateDer<'_>,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let wrong = |problem: String| AuthorityError::Certificate { index: 0, problem };
        let facts = Facts::read(other).map_err(wrong)?;
        if !facts.is_ca {
            return Err(wrong("it is no authority".to_owned()));
        }
        if self.facts.path_length.is_some_and(|most| most < 2) {
            return Err(AuthorityError::PathLength);
        }
        let (_, parsed) = X509Certificate::from_der(other).map_err(|error| wrong(error.to_string()))?;
        let key = PublicKey::from_spki(parsed.public_key().raw)?;
        // Name and identifier of the key have to be those of the other, or nobody finds the way.
        let mut params = CertificateParams::default();
        params.distinguished_name = same_name(parsed.subject()).map_err(wrong)?;
        let key_id = parsed.iter_extensions().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        });
        if let Some(key_id) = key_id {
            params.key_identifier_method = KeyIdMethod::PreSpecified(key_id);
        }
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial()?);
        params.use_authority_key_identifier_extension = true;
        params.not_before = date!(now - BACKDATE);
        let life = facts.not_after.duration_since(now).unwrap_or_default();
        params.not_after = date!(self.clamp(now, life, Duration::from_secs(2))?);
        let signed = params.signed_by(&key, &self.issuer);
        let signed = signed.map_err(|error| AuthorityError::Signing(error.to_string()))?.der().clone();
        if Facts::read(&signed).map_err(wrong)?.names.0 != facts.names.0 {
            return Err(wrong(format!("its name cannot be written the same way: {}", facts.subject)));
        }
        Ok(signed)
    }

    /// A certificate for a workload.
    ///
    /// # Errors
    /// A name is none, or the authority ends too soon.
    pub fn leaf(
        &self,
        request: &Request<'_>,
        lifetimes: &Lifetimes,
        now: SystemTime,
    ) -> Result<Issued, AuthorityError> {
        let ttl = if request.ttl.is_zero() { lifetimes.longest } else { request.ttl.min(lifetimes.longest) };
        let not_after = whole(self.clamp(now, ttl, lifetimes.renewal.saturating_mul(2))?);
        let not_before = whole(request.not_before.map_or(now - BACKDATE, |since| since.max(now - BACKDATE)));
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uri = request.identity.as_str().try_into();
        params.subject_alt_names = vec![SanType::URI(
            uri.map_err(|_| AuthorityError::Signing("the identity is not ASCII".to_owned()))?,
        )];
        for name in request.dns_names {
            let wrong = || AuthorityError::DnsName(name.clone());
            if !is_dns_name(name) {
                return Err(wrong());
            }
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into().map_err(|_| wrong())?));
        }
        let serial = match request.mark {
            None => serial()?,
            Some(mark) => SerialNumber::from_slice(&mark.serial(&Said {
                identity: request.identity,
                dns_names: request.dns_names,
                key: request.key.hash(),
                not_before,
                not_after,
            })),
        };
        params.serial_number = Some(serial.clone());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = date!(not_before);
        params.not_after = date!(not_after);
        let signed = params
            .signed_by(request.key, &self.issuer)
            .map_err(|error| AuthorityError::Signing(error.to_string()))?;
        let chain = std::iter::once(signed.der().clone()).chain(self.presented()).collect();
        let serial = Serial::new(serial.as_ref());
        Ok(Issued { chain, serial, issuer: self.id(), not_before, not_after })
    }

    /// A list of certificates of this authority that are taken back.
    ///
    /// # Errors
    /// The authority may not sign lists.
    pub fn crl(
        &self,
        revoked: impl IntoIterator<Item = (Serial, SystemTime)>,
        number: u64,
        now: SystemTime,
        life: Duration,
    ) -> Result<CertificateRevocationListDer<'static>, AuthorityError> {
        let revoked = revoked.into_iter().map(|(serial, at)| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial.as_bytes()),
            revocation_time: date!(at),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date!(now - BACKDATE),
            next_update: date!(now + life),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer);
        Ok(list.map_err(|error| AuthorityError::Signing(error.to_string()))?.der().clone())
    }

    /// The identifier of its key.
    pub fn id(&self) -> KeyId {
        self.facts
            .key_id
            .clone()
            .unwrap_or_else(|| KeyId::new(&CertificateParams::default().key_identifier(self.issuer.key())))
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The certificates between it and its root.
    pub fn above(&self) -> &[CertificateDer<'static>] {
        &self.above
    }

    /// Its certificate and those that are handed out beside it.
    pub fn presented(&self) -> impl Iterator<Item = CertificateDer<'static>> {
        let root = self.facts.self_signed;
        std::iter::once(&self.certificate)
            .filter(move |_| !root)
            .chain(&self.above)
            .chain(&self.cross)
            .cloned()
    }

    pub fn key(&self) -> &Key {
        self.issuer.key()
    }

    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Its own end, or that of one above it.
    pub fn ends(&self) -> SystemTime {
        self.ends
    }

    /// The end of something that is signed now and is to live for `life`.
    fn clamp(&self, now: SystemTime, life: Duration, least: Duration) -> Result<SystemTime, AuthorityError> {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let latest = self.ends.checked_sub(MARGIN).unwrap_or(UNIX_EPOCH);
        let wanted = now.checked_add(life).unwrap_or(latest);
        if wanted <= latest {
            return Ok(wanted);
        }
        if latest.duration_since(now).unwrap_or_default() < least.max(Duration::from_secs(1)) {
            return Err(AuthorityError::SignerEnds { not_after: seconds(latest), least: least.as_secs() });
        }
        Ok(latest)
    }
}

/// What is looked at before an authority signs.
#[derive(Clone, Debug)]
pub struct Rules {
    pub longest_leaf: Duration,
    /// Hashes of keys that were distrusted.
    pub distrusted: Vec<Fingerprint>,
    /// It was signed by somebody who cannot limit the length of paths.
    pub unlimited: bool,
}

/// What is wrong with an authority.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    #[error("it is no authority (basicConstraints lack CA)")]
    NotAnAuthority,
    #[error("its key is not meant to sign certificates (keyUsage lacks keyCertSign)")]
    KeyUsage,
    #[error("it has no identifier of its key (subjectKeyIdentifier)")]
    NoKeyId,
    #[error("it may sign authorities; an issuer has pathlen 0")]
    PathLength,
    #[error("it is not valid yet")]
    NotYetValid,
    #[error(
        "it ends in {left} s; it has to live for {needed} s, twice as long as the longest certificate of a workload"
    )]
    Ends { left: u64, needed: u64 },
    #[error("its key was distrusted")]
    Distrusted,
    #[error("a certificate that it signed for a trial is refused: {0}")]
    Trial(String),
}

impl Authority {
    /// What is wrong with this as an issuer whose roots are those of `trust`. Nothing, if it may sign.
    pub fn lint(&self, trust: &Trust, rules: &Rules, now: SystemTime) -> Vec<Finding> {
        let facts = &self.facts;
        let mut found = Vec::new();
        if !facts.is_ca {
            found.push(Finding::NotAnAuthority);
        }
        if !facts.signs_certificates {
            found.push(Finding::KeyUsage);
        }
        if facts.key_id.is_none() {
            found.push(Finding::NoKeyId);
        }
        let limited = facts.path_length == Some(0) || (rules.unlimited && facts.path_length.is_none());
        if !facts.self_signed && !limited {
            found.push(Finding::PathLength);
        }
        if facts.not_before > now {
            found.push(Finding::NotYetValid);
        }
        let left = self.ends.duration_since(now).unwrap_or_default();
        let needed = rules.longest_leaf.saturating_mul(2);
        if left < needed {
            found.push(Finding::Ends { left: left.as_secs(), needed: needed.as_secs() });
        }
        if rules.distrusted.contains(&facts.key_hash) {
            found.push(Finding::Distrusted);
        }
        if let Err(problem) = self.trial(trust, now) {
            found.push(Finding::Trial(problem));
        }
        found
    }

    /// Signs a certificate for nobody and verifies it as a peer would.
    fn trial(&self, trust: &Trust, now: SystemTime) -> Result<(), String> {
        let key = Key::generate(KeyKind::P256).map_err(|error| error.to_string())?;
        let key = PublicKey::from_spki(&key.subject_public_key_info()).map_err(|error| error.to_string())?;
        let identity = SpiffeId::new(trust.own(), "/postern/trial").map_err(|error| error.to_string())?;
        let ttl = Duration::from_secs(60);
        let request =
            Request { key: &key, identity: &identity, dns_names: &[], ttl, not_before: None, mark: None };
        let lifetimes = Lifetimes { longest: ttl, renewal: Duration::ZERO };
        let issued = self.leaf(&request, &lifetimes, now).map_err(|error| error.to_string())?;
        for usage in [Usage::Client, Usage::Server] {
            trust.verify(&issued.chain, usage, now).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

fn authority_params(
    domain: &TrustDomain,
    role: &str,
    key: &Key,
    path_length: Option<u8>,
    (now, not_after): (SystemTime, SystemTime),
) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    // The key is in the name, so that no two authorities have the same one.
    let id: String = key.hash().to_string().chars().take(8).collect();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, domain.as_str());
    params.distinguished_name.push(DnType::CommonName, format!("{role} {id}"));
    params.is_ca =
        IsCa::Ca(path_length.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial()?);
    params.use_authority_key_identifier_extension = true;
    params.not_before = date!(now - BACKDATE);
    params.not_after = date!(not_after);
    Ok(params)
}

/// 128 random bits. The first byte is not zero, so that the number is written the same everywhere.
fn serial() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = [0; 16];
    while bytes.first() == Some(&0) {
        rand::fill(&mut bytes).map_err(|_| AuthorityError::Signing("there is no randomness".to_owned()))?;
    }
    Ok(SerialNumber::from_slice(&bytes))
}

fn since_1970(time: SystemTime) -> Duration {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::from_secs(since.as_secs().min(LAST))
}

/// Without what is smaller than a second, which no certificate can say.
fn whole(time: SystemTime) -> SystemTime {
    UNIX_EPOCH + since_1970(time)
}

fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// A name for a new certificate that is written with the same bytes.
fn same_name(name: &X509Name<'_>) -> Result<DistinguishedName, String> {
    let mut made = DistinguishedName::new();
    for part in name.iter_rdn() {
        let mut attributes = part.iter();
        let (Some(attribute), None) = (attributes.next(), attributes.next()) else {
            return Err("its name has a part with several values".to_owned());
        };
        let oid: Vec<u64> = attribute.attr_type().iter().map(Iterator::collect).unwrap_or_default();
        let text = attribute.as_str().map_err(|error| error.to_string())?;
        let value = match attribute.attr_value().tag() {
            Tag::Utf8String => DnValue::Utf8String(text.to_owned()),
            Tag::PrintableString => {
                DnValue::PrintableString(text.try_into().map_err(|_| "a bad name".to_owned())?)
            }
            Tag::Ia5String => DnValue::Ia5String(text.try_into().map_err(|_| "a bad name".to_owned())?),
            other => return Err(format!("its name has text of an old kind ({other})")),
        };
        made.push(DnType::from_oid(&oid), value);
    }
    Ok(made)
}

/// All certificates of a PEM text, at least one.
///
/// # Errors
/// It is not PEM, or holds none.
pub fn pem_certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&tidy(text)).collect();
    let found = found.map_err(|error| AuthorityError::Pem(error.to_string()))?;
    if found.is_empty() { Err(AuthorityError::Missing("certificate")) } else { Ok(found) }
}

/// The first private key of a PEM text.
///
/// # Errors
/// It is not PEM, or holds none.
pub fn pem_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, AuthorityError> {
    use rustls::pki_types::pem::Error;
    let tidy = Zeroizing::new(tidy(text));
    PrivateKeyDer::from_pem_slice(&tidy).map_err(|error| match error {
        Error::NoItemsFound => AuthorityError::Missing("private key"),
        error => AuthorityError::Pem(error.to_string()),
    })
}

/// PEM as it should have been: what YAML, editors and environment variables do to it is undone.
fn tidy(text: &[u8]) -> Vec<u8> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut out = Vec::with_capacity(text.len());
    // Line ends that were written as two characters.
    let mut bytes = text.iter().peekable();
    while let Some(byte) = bytes.next() {
        match (byte, bytes.peek()) {
            (b'\\', Some(b'n')) => {
                bytes.next();
                out.push(b'\n');
            }
            (b'\\', Some(b'r')) => {
                bytes.next();
            }
            (b'\r', _) => out.push(b'\n'),
            (byte, _) => out.push(*byte),
        }
    }
    let out = Zeroizing::new(out);
    let mut lines = Vec::with_capacity(out.len());
    for line in out.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty()) {
        lines.extend_from_slice(line);
        lines.push(b'\n');
    }
    lines
}

/// A certificate in PEM.
pub fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while let Some((line, after)) = rest.split_at_checked(64) {
        out.push_str(line);
        out.push('\n');
        rest = after;
    }
    if !rest.is_empty() {
        out.push_str(rest);
        out.push('\n');
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

#[cfg(test)]
mod tests;
