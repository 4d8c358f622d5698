//! What a workload shows: a chain with its identity, and the key for it, in memory only.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1_SIGNING,
    EcdsaKeyPair,
};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys};
use zeroize::{Zeroize, Zeroizing};

use crate::identity::SpiffeId;
use crate::trust::{Peer, VerifyError};

/// A chain and a key that are no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SvidError {
    #[error(transparent)]
    Certificate(#[from] VerifyError),
    #[error("the private key cannot be used: {0}")]
    Key(String),
    #[error("the private key belongs to another certificate")]
    Mismatch,
}

/// An X.509-SVID with its key.
pub struct Svid {
    /// What the certificate says.
    peer: Peer,
    key: Arc<CertifiedKey>,
    secret: Secret,
}

/// The key as it came, for applications of this identity.
struct Secret(PrivateKeyDer<'static>);

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Svid {
    /// Of a chain, leaf first, and the key of the leaf. Who signed it is not looked at here.
    ///
    /// # Errors
    /// The leaf is no SVID, or the key is not its key.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: &PrivateKeyDer<'static>) -> Result<Self, SvidError> {
        let peer = Peer::read(chain.first().ok_or(VerifyError::NoCertificate)?)?;
        let secret = Secret(key.clone_key());
        let key = any_supported_type(key).map_err(|error| SvidError::Key(error.to_string()))?;
        let key = CertifiedKey::new(chain, key);
        match key.keys_match() {
            Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            Err(Error::InconsistentKeys(_)) => return Err(SvidError::Mismatch),
            Err(error) => return Err(SvidError::Key(error.to_string())),
        }
        Ok(Self { peer, key: Arc::new(key), secret })
    }

    /// Whose it is.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.peer.id
    }

    /// What its peers see.
    #[must_use]
    pub fn leaf(&self) -> &Peer {
        &self.peer
    }

    /// The chain, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// As rustls shows and signs with it.
    #[must_use]
    pub fn certified_key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }

    /// The key in PKCS #8, for an application that is to show the same. None where the key cannot be written so.
    #[must_use]
    pub fn pkcs8(&self) -> Option<Zeroizing<Vec<u8>>> {
        let der = match &self.secret.0 {
            PrivateKeyDer::Pkcs8(key) => key.secret_pkcs8_der().to_vec(),
            PrivateKeyDer::Sec1(key) => [
                &ECDSA_P256_SHA256_ASN1_SIGNING,
                &ECDSA_P384_SHA384_ASN1_SIGNING,
                &ECDSA_P521_SHA512_ASN1_SIGNING,
            ]
            .into_iter()
            .find_map(|kind| EcdsaKeyPair::from_private_key_der(kind, key.secret_sec1_der()).ok())?
            .to_pkcs8v1()
            .ok()?
            .as_ref()
            .to_vec(),
            PrivateKeyDer::Pkcs1(key) => {
                let pair = rsa::KeyPair::from_der(key.secret_pkcs1_der()).ok()?;
                AsDer::<Pkcs8V1Der<'_>>::as_der(&pair).ok()?.as_ref().to_vec()
            }
            _ => return None,
        };
        Some(Zeroizing::new(der))
    }

    /// From its first to its last moment.
    #[must_use]
    pub fn lifetime(&self) -> Duration {
        self.peer.not_after.duration_since(self.peer.not_before).unwrap_or_default()
    }

    /// How long it is still valid.
    #[must_use]
    pub fn left(&self, now: SystemTime) -> Duration {
        self.peer.not_after.duration_since(now).unwrap_or_default()
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid").field("peer", &self.peer).finish_non_exhaustive()
    }
}
