//! The key of a certificate request. Everything else that a request says is ignored: names, usages and lifetimes come from
//! the attestation, not from who asks. The signature of the request is the proof that the caller has the key.

use std::fmt;

use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey as Parsed;
use x509_parser::x509::SubjectPublicKeyInfo as Spki;

use crate::trust::Fingerprint;

/// A request is a key and a name; one that is larger is none.
const LARGEST: usize = 16 * 1024;
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

const RSA: &str = "1.2.840.113549.1.1.1";
const EC: &str = "1.2.840.10045.2.1";
const ED25519: &str = "1.3.101.112";
const P256: &str = "1.2.840.10045.3.1.7";
const P384: &str = "1.3.132.0.34";
/// Signatures of requests whose hash is broken.
const SHA1: [&str; 3] = ["1.2.840.113549.1.1.5", "1.3.14.3.2.29", "1.2.840.10045.4.1"];

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    #[error("the request has more than {LARGEST} bytes")]
    TooLarge,
    #[error("the request is not PKCS #10 in DER: {0}")]
    Malformed(String),
    #[error("the key is RSA of {0} bits; use P-256, P-384, Ed25519, or RSA of 2048 to 8192 bits")]
    Rsa(usize),
    #[error("the key is on the curve {0}; use P-256, P-384, Ed25519, or RSA of 2048 to 8192 bits")]
    Curve(String),
    #[error("the kind of the key is not known ({0}); use P-256, P-384, Ed25519, or RSA of 2048 to 8192 bits")]
    Kind(String),
    #[error("the key cannot be read")]
    Key,
    #[error("the request is signed with SHA-1")]
    Sha1,
    #[error("the request is not signed by its key, so the caller has not shown that the key is his")]
    Possession,
}

/// A public key that may stand in a certificate.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    info: SubjectPublicKeyInfo,
    hash: Fingerprint,
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PublicKey").field(&self.hash).finish()
    }
}

impl PublicKey {
    /// Reads a SubjectPublicKeyInfo in DER.
    ///
    /// # Errors
    /// It is none, or of a kind or strength that is not signed.
    pub fn from_spki(der: &[u8]) -> Result<Self, CsrError> {
        let (rest, parsed) = Spki::from_der(der).map_err(|error| CsrError::Malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed("something stands behind the key".to_owned()));
        }
        strength(&parsed)?;
        let info = SubjectPublicKeyInfo::from_der(der).map_err(|_| CsrError::Key)?;
        Ok(Self { info, hash: Fingerprint::of(der) })
    }

    /// Reads the key of a request and checks that the request is signed by it.
    ///
    /// # Errors
    /// Why the request is refused.
    pub fn from_csr(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > LARGEST {
            return Err(CsrError::TooLarge);
        }
        let (rest, request) = X509CertificationRequest::from_der(der)
            .map_err(|error| CsrError::Malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed("something stands behind the request".to_owned()));
        }
        // The weakness of a key is told before its signature is, which may fail because of it.
        let key = Self::from_spki(request.certification_request_info.subject_pki.raw)?;
        if SHA1.contains(&request.signature_algorithm.algorithm.to_id_string().as_str()) {
            return Err(CsrError::Sha1);
        }
        request.verify_signature().map_err(|_| CsrError::Possession)?;
        Ok(key)
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    pub fn hash(&self) -> Fingerprint {
        self.hash
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        self.info.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.info.algorithm()
    }
}

/// Refuses what is too weak, and what nobody here can verify.
pub(crate) fn strength(key: &Spki<'_>) -> Result<(), CsrError> {
    match key.algorithm.algorithm.to_id_string().as_str() {
        RSA => match key.parsed() {
            Ok(Parsed::RSA(rsa)) => {
                let bits = rsa.key_size();
                if RSA_BITS.contains(&bits) { Ok(()) } else { Err(CsrError::Rsa(bits)) }
            }
            _ => Err(CsrError::Key),
        },
        EC => {
            let curve = key.algorithm.parameters.as_ref().and_then(|curve| curve.as_oid().ok());
            let curve = curve.map(|curve| curve.to_id_string());
            match curve.as_deref() {
                Some(P256 | P384) => Ok(()),
                Some(other) => Err(CsrError::Curve(other.to_owned())),
                None => Err(CsrError::Curve("without a name".to_owned())),
            }
        }
        ED25519 => Ok(()),
        other => Err(CsrError::Kind(other.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, RsaKeySize, SanType};

    use super::*;

    fn request(key: &KeyPair, change: fn(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        change(&mut params);
        params.serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn everything_but_the_key_of_a_request_is_ignored() {
        let key = KeyPair::generate().unwrap();
        let plain = PublicKey::from_csr(&request(&key, |_| {})).unwrap();
        let greedy = PublicKey::from_csr(&request(&key, |params| {
            params.distinguished_name.push(DnType::CommonName, "admin");
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.subject_alt_names = vec![SanType::URI("spiffe://mesh.local/admin".try_into().unwrap())];
        }));
        assert_eq!(plain, greedy.unwrap());
        assert_eq!(plain.hash(), Fingerprint::of(&key.subject_public_key_info()));
    }

    #[test]
    fn usual_keys_are_taken_and_weak_ones_are_not() {
        let rsa = |size| KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, size).unwrap();
        let keys = [
            KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(),
            KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(),
            KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap(),
            rsa(RsaKeySize::_2048),
        ];
        for key in &keys {
            assert!(PublicKey::from_csr(&request(key, |_| {})).is_ok(), "{:?}", key.algorithm());
        }
        let p521 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
        assert_eq!(
            PublicKey::from_csr(&request(&p521, |_| {})),
            Err(CsrError::Curve("1.3.132.0.35".to_owned()))
        );
    }

    /// Requests by OpenSSL with keys that no library here makes: RSA of 1024 bits, P-192 and secp256k1, DSA.
    #[test]
    fn keys_that_no_library_here_makes_are_refused_with_the_reason() {
        let read = |text: &str| {
            use base64::Engine as _;
            base64::engine::general_purpose::STANDARD.decode(text.replace('\n', "")).unwrap()
        };
        let cases = [
            (include_str!("csr/rsa1024.b64"), CsrError::Rsa(1024)),
            (include_str!("csr/prime192v1.b64"), CsrError::Curve("1.2.840.10045.3.1.1".to_owned())),
            (include_str!("csr/secp256k1.b64"), CsrError::Curve("1.3.132.0.10".to_owned())),
            (include_str!("csr/dsa2048.b64"), CsrError::Kind("1.2.840.10040.4.1".to_owned())),
            (include_str!("csr/rsa2048sha1.b64"), CsrError::Sha1),
        ];
        for (text, expected) in cases {
            assert_eq!(PublicKey::from_csr(&read(text)), Err(expected));
        }
    }

    #[test]
    fn a_request_is_signed_by_its_own_key_and_is_nothing_else() {
        let key = KeyPair::generate().unwrap();
        let der = request(&key, |_| {});
        for at in 0..der.len() {
            for bit in [1, 0x80] {
                let mut changed = der.clone();
                changed[at] ^= bit;
                // Never a key other than the one that signed it.
                if let Ok(read) = PublicKey::from_csr(&changed) {
                    assert_eq!(read.hash(), Fingerprint::of(&key.subject_public_key_info()), "byte {at}");
                }
            }
            assert!(PublicKey::from_csr(&der[..at]).is_err(), "cut at {at}");
        }
        assert!(PublicKey::from_csr(&[der.as_slice(), &[0]].concat()).is_err());
        assert_eq!(PublicKey::from_csr(&vec![0x30; LARGEST + 1]), Err(CsrError::TooLarge));
    }
}
