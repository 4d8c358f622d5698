//! Keys that the gateway signs tokens with, and their public halves as a JSON Web Key Set (RFC 7517).
//!
//! A key is for one algorithm. Parsing and checking happen when the configuration is compiled.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Map, Value, json};

use super::jwt::Algorithm;

/// Why a text is no key to sign with.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The text is not a PEM block of a private key.
    #[error("write a private key in PEM, from `-----BEGIN PRIVATE KEY-----` to `-----END PRIVATE KEY-----`")]
    NotPem,
    /// It is a key of another kind, curve or size.
    #[error("{0} needs {1}")]
    NotForAlgorithm(&'static str, &'static str),
    /// The algorithm signs with a shared secret.
    #[error("{0} has no public half: write RS256, PS256, ES256, EdDSA or one of their kind")]
    Symmetric(&'static str),
}

/// A private key, and the one algorithm it is for.
pub struct SigningKey {
    algorithm: Algorithm,
    pair: Pair,
    /// The header of every token, in base64url, with its dot.
    header: Box<str>,
    jwk: Value,
}

enum Pair {
    Rsa(Box<RsaKeyPair>, &'static dyn signature::RsaEncoding),
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

impl SigningKey {
    /// The key `pem`, which tokens call `kid`.
    ///
    /// # Errors
    /// It is no private key, or not for this algorithm. No error holds a part of it.
    pub fn new(kid: &str, algorithm: Algorithm, pem: &str) -> Result<Self, SigningError> {
        let der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| SigningError::NotPem)?;
        let pair = pair(algorithm, &der)?;
        let header = json!({"typ": "JWT", "alg": algorithm.name(), "kid": kid}).to_string();
        let mut jwk = public(&pair);
        for (name, value) in [("use", "sig"), ("alg", algorithm.name()), ("kid", kid)] {
            jwk.insert(name.to_owned(), value.into());
        }
        let header = format!("{}.", URL_SAFE_NO_PAD.encode(header)).into();
        Ok(Self { algorithm, pair, header, jwk: Value::Object(jwk) })
    }

    /// The public half, as a member of a key set.
    pub fn jwk(&self) -> &Value {
        &self.jwk
    }

    /// Whether a signature takes long enough, around 100 µs and more, to hold up other requests of a worker.
    pub fn is_slow(&self) -> bool {
        !matches!(self.algorithm, Algorithm::EdDSA | Algorithm::ES256)
    }

    /// A token that says `claims`; nothing if the library fails.
    pub fn sign(&self, claims: &Value) -> Option<String> {
        let mut token = String::from(&*self.header);
        URL_SAFE_NO_PAD.encode_string(claims.to_string(), &mut token);
        let random = SystemRandom::new();
        let bytes = match &self.pair {
            Pair::Rsa(pair, padding) => {
                let mut bytes = vec![0; pair.public_modulus_len()];
                pair.sign(*padding, &random, token.as_bytes(), &mut bytes).ok()?;
                bytes
            }
            Pair::Ec(pair) => pair.sign(&random, token.as_bytes()).ok()?.as_ref().to_vec(),
            Pair::Ed(pair) => pair.sign(token.as_bytes()).as_ref().to_vec(),
        };
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(bytes, &mut token);
        Some(token)
    }
}

fn pair(algorithm: Algorithm, der: &PrivateKeyDer<'_>) -> Result<Pair, SigningError> {
    let rsa = |padding: &'static dyn signature::RsaEncoding| {
        let pair = match der {
            PrivateKeyDer::Pkcs8(key) => RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()).ok(),
            PrivateKeyDer::Pkcs1(key) => RsaKeyPair::from_der(key.secret_pkcs1_der()).ok(),
            _ => None,
        };
        pair.filter(|pair| (256..=1024).contains(&pair.public_modulus_len()))
            .map(|pair| Pair::Rsa(Box::new(pair), padding))
            .ok_or(SigningError::NotForAlgorithm(algorithm.name(), "an RSA private key of 2048 to 8192 bits"))
    };
    let ec = |kind: &'static signature::EcdsaSigningAlgorithm, wants| {
        let pair = match der {
            PrivateKeyDer::Pkcs8(key) => EcdsaKeyPair::from_pkcs8(kind, key.secret_pkcs8_der()).ok(),
            PrivateKeyDer::Sec1(key) => EcdsaKeyPair::from_private_key_der(kind, key.secret_sec1_der()).ok(),
            _ => None,
        };
        pair.map(Pair::Ec).ok_or(SigningError::NotForAlgorithm(algorithm.name(), wants))
    };
    match algorithm {
        Algorithm::RS256 => rsa(&signature::RSA_PKCS1_SHA256),
        Algorithm::RS384 => rsa(&signature::RSA_PKCS1_SHA384),
        Algorithm::RS512 => rsa(&signature::RSA_PKCS1_SHA512),
        Algorithm::PS256 => rsa(&signature::RSA_PSS_SHA256),
        Algorithm::PS384 => rsa(&signature::RSA_PSS_SHA384),
        Algorithm::PS512 => rsa(&signature::RSA_PSS_SHA512),
        Algorithm::ES256 => {
            ec(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, "a private key on the curve P-256")
        }
        Algorithm::ES384 => {
            ec(&signature::ECDSA_P384_SHA384_FIXED_SIGNING, "a private key on the curve P-384")
        }
        Algorithm::ES512 => {
            ec(&signature::ECDSA_P521_SHA512_FIXED_SIGNING, "a private key on the curve P-521")
        }
        Algorithm::EdDSA => {
            let pair = match der {
                PrivateKeyDer::Pkcs8(key) => Ed25519KeyPair::from_pkcs8(key.secret_pkcs8_der()).ok(),
                _ => None,
            };
            pair.map(Pair::Ed)
                .ok_or(SigningError::NotForAlgorithm(algorithm.name(), "an Ed25519 private key in PKCS #8"))
        }
        Algorithm::HS256 | Algorithm::HS384 | Algorithm::HS512 => {
            Err(SigningError::Symmetric(algorithm.name()))
        }
    }
}

/// The inside of the first element of a DER, and what is behind the element.
fn element(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (_tag, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match usize::from(*first) {
        short @ 0..=127 => (short, rest),
        long => {
            let (digits, rest) = rest.split_at_checked(long - 128).filter(|(digits, _)| digits.len() <= 3)?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
    };
    rest.split_at_checked(length)
}

fn public(pair: &Pair) -> Map<String, Value> {
    let encode = |bytes: &[u8]| Value::String(URL_SAFE_NO_PAD.encode(bytes));
    let mut jwk = Map::new();
    let mut set = |name: &str, value: Value| jwk.insert(name.to_owned(), value);
    match pair {
        Pair::Rsa(pair, _) => {
            set("kty", "RSA".into());
            // A sequence of two integers: modulus, exponent.
            let sequence = element(pair.public_key().as_ref()).map_or(&[][..], |(inside, _)| inside);
            let (modulus, rest) = element(sequence).unwrap_or_default();
            let (exponent, _) = element(rest).unwrap_or_default();
            let positive = |number: &[u8]| encode(number.strip_prefix(&[0]).unwrap_or(number));
            set("n", positive(modulus));
            set("e", positive(exponent));
        }
        Pair::Ec(pair) => {
            // An uncompressed point: 4, x, y.
            let point = pair.public_key().as_ref().get(1..).unwrap_or_default();
            let (x, y) = point.split_at(point.len() / 2);
            let curve = match x.len() {
                32 => "P-256",
                48 => "P-384",
                _ => "P-521",
            };
            set("kty", "EC".into());
            set("crv", curve.into());
            set("x", encode(x));
            set("y", encode(y));
        }
        Pair::Ed(pair) => {
            set("kty", "OKP".into());
            set("crv", "Ed25519".into());
            set("x", encode(pair.public_key().as_ref()));
        }
    }
    jwk
}

/// Private keys for tests, in PEM.
#[cfg(test)]
pub(crate) mod keys {
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256};

    use super::*;

    /// A new key for this algorithm: private and public half.
    pub fn make(algorithm: Algorithm) -> (String, String) {
        let kind = match algorithm {
            Algorithm::ES256 => &PKCS_ECDSA_P256_SHA256,
            Algorithm::ES384 => &PKCS_ECDSA_P384_SHA384,
            Algorithm::EdDSA => &PKCS_ED25519,
            _ => &PKCS_RSA_SHA256,
        };
        let pair = KeyPair::generate_for(kind).unwrap();
        (pair.serialize_pem(), pair.public_key_pem())
    }
}

#[cfg(test)]
mod tests {
    use super::super::jwt::{Key, Token};
    use super::*;

    #[test]
    fn what_is_signed_is_verified_by_the_public_half_alone() {
        let kinds = [
            (Algorithm::RS256, "RSA"),
            (Algorithm::RS512, "RSA"),
            (Algorithm::PS256, "RSA"),
            (Algorithm::ES256, "EC"),
            (Algorithm::ES384, "EC"),
            (Algorithm::EdDSA, "OKP"),
        ];
        for (algorithm, kty) in kinds {
            let (private, public) = keys::make(algorithm);
            let key = SigningKey::new("k1", algorithm, &private).unwrap();
            let token = key.sign(&json!({"iss": "a"})).unwrap();
            let parsed = Token::parse(&token).unwrap();
            assert!(parsed.is_signed_by(&Key::public(algorithm, &public).unwrap()), "{algorithm:?}");
            assert_eq!(parsed.claims()["iss"], "a");
            let header = URL_SAFE_NO_PAD.decode(token.split('.').next().unwrap()).unwrap();
            let header: Value = serde_json::from_slice(&header).unwrap();
            assert_eq!(header, json!({"typ": "JWT", "alg": algorithm.name(), "kid": "k1"}));
            let jwk = key.jwk();
            if kty == "RSA" {
                assert_eq!((jwk["e"].as_str(), jwk["n"].as_str().map(str::len)), (Some("AQAB"), Some(342)));
            }
            assert_eq!((&jwk["kty"], &jwk["kid"], &jwk["use"]), (&json!(kty), &json!("k1"), &json!("sig")));
            for secret in ["d", "p", "q", "k"] {
                assert!(jwk.get(secret).is_none(), "{algorithm:?} {secret}");
            }
        }
    }

    #[test]
    fn a_key_is_for_one_kind_of_algorithm() {
        let (p256, public) = keys::make(Algorithm::ES256);
        for other in
            [Algorithm::ES384, Algorithm::RS256, Algorithm::PS512, Algorithm::EdDSA, Algorithm::HS256]
        {
            assert!(SigningKey::new("k", other, &p256).is_err(), "{other:?}");
        }
        for text in ["", "secret", &public] {
            assert!(matches!(SigningKey::new("k", Algorithm::ES256, text), Err(SigningError::NotPem)));
        }
    }
}
