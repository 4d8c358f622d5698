//! A private key that is held elsewhere, as rustls sees it. rustls wants the signature before it goes on, so a handshake
//! with such a key has to be run on a thread that may wait: see [`Pool::handle`](super::Pool::handle).

use std::fmt;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer};
use rustls::server::ParsedCertificate;
use rustls::sign::{Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_NIST_EC_P521, OID_PKCS1_RSAENCRYPTION,
    OID_SIG_ED25519,
};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::pool::Ask;
use super::{KeyAddress, Pool};
use crate::trust::Fingerprint;

/// The schemes of a key, best first, as rustls has them for a key that it holds itself.
const RSA: &[SignatureScheme] = &[
    SignatureScheme::RSA_PSS_SHA512,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PKCS1_SHA512,
    SignatureScheme::RSA_PKCS1_SHA384,
    SignatureScheme::RSA_PKCS1_SHA256,
];
const P256: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP256_SHA256];
const P384: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP384_SHA384];
const P521: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP521_SHA512];
const ED25519: &[SignatureScheme] = &[SignatureScheme::ED25519];

/// Why the nodes of a pool do not sign for a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotOffered {
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    #[error("the certificate has a key that is neither RSA, nor ECDSA (P-256, P-384, P-521), nor Ed25519")]
    Algorithm,
    #[error("no node of the pool `{}` offers a key `{}` to this gateway; {held}", .address.pool, .address.name)]
    Missing { address: KeyAddress, held: String },
    #[error(
        "the key `{}` of the pool `{}` does not belong to the certificate: the public keys differ",
        .address.name, .address.pool
    )]
    Mismatch { address: KeyAddress },
}

/// The key of a certificate, held by the nodes of a pool.
pub struct RemoteKey {
    pool: Arc<Pool>,
    ask: Arc<Ask>,
    spki: SubjectPublicKeyInfoDer<'static>,
    schemes: &'static [SignatureScheme],
    algorithm: SignatureAlgorithm,
}

impl RemoteKey {
    /// The key of `leaf`, at `pool` under this name.
    ///
    /// # Errors
    /// The certificate cannot be used, or the nodes have said that they have not its key. Nodes that have not been reached
    /// yet have said nothing: they are told with each signature for which public key it has to be.
    pub fn of(leaf: &CertificateDer<'_>, pool: &Arc<Pool>, name: &Arc<str>) -> Result<Self, NotOffered> {
        let unread = |error: Error| NotOffered::Certificate(error.to_string());
        let spki = ParsedCertificate::try_from(leaf).map_err(unread)?.subject_public_key_info().into_owned();
        let (schemes, algorithm) = schemes(&spki).ok_or(NotOffered::Algorithm)?;
        let ask = Arc::new(Ask { name: Arc::clone(name), public_key: Fingerprint::of(&spki) });
        pool.offers(&ask)?;
        Ok(Self { pool: Arc::clone(pool), ask, spki, schemes, algorithm })
    }

    /// Where it is held.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

fn schemes(spki: &[u8]) -> Option<(&'static [SignatureScheme], SignatureAlgorithm)> {
    let (_, parsed) = SubjectPublicKeyInfo::from_der(spki).ok()?;
    let algorithm = parsed.algorithm;
    if algorithm.algorithm == OID_PKCS1_RSAENCRYPTION {
        return Some((RSA, SignatureAlgorithm::RSA));
    }
    if algorithm.algorithm == OID_SIG_ED25519 {
        return Some((ED25519, SignatureAlgorithm::ED25519));
    }
    if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY {
        return None;
    }
    let parameters = algorithm.parameters?;
    let curve = parameters.as_oid().ok()?;
    let curves = [(OID_EC_P256, P256), (OID_NIST_EC_P384, P384), (OID_NIST_EC_P521, P521)];
    let (_, schemes) = curves.into_iter().find(|(oid, _)| *oid == curve)?;
    Some((schemes, SignatureAlgorithm::ECDSA))
}

impl SigningKey for RemoteKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = *self.schemes.iter().find(|scheme| offered.contains(scheme))?;
        let (pool, ask) = (Arc::clone(&self.pool), Arc::clone(&self.ask));
        Some(Box::new(RemoteSigner { pool, ask, scheme }))
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(self.spki.clone())
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }
}

impl fmt::Debug for RemoteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteKey({} at {})", self.ask.name, self.pool.name())
    }
}

struct RemoteSigner {
    pool: Arc<Pool>,
    ask: Arc<Ask>,
    scheme: SignatureScheme,
}

impl Signer for RemoteSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signing = self.pool.sign(&self.ask, self.scheme, message);
        self.pool.handle().block_on(signing).map_err(|error| Error::General(error.to_string()))
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}

impl fmt::Debug for RemoteSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteSigner({} at {})", self.ask.name, self.pool.name())
    }
}
