//! JSON Web Tokens, compact and signed (RFC 7515, 7518, 7519, 8725).
//!
//! A key belongs to one algorithm, and a token that names another is not signed by it: what the token says is compared,
//! never obeyed. Strict: no padding in base64url, no `crit`, no `b64`, one value for each field of the header.

use aws_lc_rs::hmac;
use aws_lc_rs::signature::{self, ParsedPublicKey, VerificationAlgorithm};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// How tokens are signed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
#[expect(missing_docs, reason = "the names of RFC 7518")]
pub enum Algorithm {
    #[default]
    HS256,
    HS384,
    HS512,
    RS256,
    RS384,
    RS512,
    ES256,
    ES384,
    ES512,
    PS256,
    PS384,
    PS512,
    EdDSA,
}

impl Algorithm {
    /// As a token's header names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HS256 => "HS256",
            Self::HS384 => "HS384",
            Self::HS512 => "HS512",
            Self::RS256 => "RS256",
            Self::RS384 => "RS384",
            Self::RS512 => "RS512",
            Self::ES256 => "ES256",
            Self::ES384 => "ES384",
            Self::ES512 => "ES512",
            Self::PS256 => "PS256",
            Self::PS384 => "PS384",
            Self::PS512 => "PS512",
            Self::EdDSA => "EdDSA",
        }
    }

    /// Whether the same secret signs and verifies.
    pub const fn is_symmetric(self) -> bool {
        matches!(self, Self::HS256 | Self::HS384 | Self::HS512)
    }

    fn shared(self) -> Option<hmac::Algorithm> {
        match self {
            Self::HS256 => Some(hmac::HMAC_SHA256),
            Self::HS384 => Some(hmac::HMAC_SHA384),
            Self::HS512 => Some(hmac::HMAC_SHA512),
            _ => None,
        }
    }

    fn public(self) -> Option<&'static dyn VerificationAlgorithm> {
        Some(match self {
            Self::HS256 | Self::HS384 | Self::HS512 => return None,
            Self::RS256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Self::RS384 => &signature::RSA_PKCS1_2048_8192_SHA384,
            Self::RS512 => &signature::RSA_PKCS1_2048_8192_SHA512,
            Self::ES256 => &signature::ECDSA_P256_SHA256_FIXED,
            Self::ES384 => &signature::ECDSA_P384_SHA384_FIXED,
            Self::ES512 => &signature::ECDSA_P521_SHA512_FIXED,
            Self::PS256 => &signature::RSA_PSS_2048_8192_SHA256,
            Self::PS384 => &signature::RSA_PSS_2048_8192_SHA384,
            Self::PS512 => &signature::RSA_PSS_2048_8192_SHA512,
            Self::EdDSA => &signature::ED25519,
        })
    }

    /// What a public key has to be.
    const fn wants(self) -> &'static str {
        match self {
            Self::ES256 => "a public key on the curve P-256",
            Self::ES384 => "a public key on the curve P-384",
            Self::ES512 => "a public key on the curve P-521",
            Self::EdDSA => "an Ed25519 public key",
            _ => "an RSA public key of 2048 to 8192 bits",
        }
    }
}

/// Why a text is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The text is not a PEM block of a public key.
    #[error("write a public key in PEM, from `-----BEGIN PUBLIC KEY-----` to `-----END PUBLIC KEY-----`")]
    NotPem,
    /// It is a key of another kind, curve or size.
    #[error("{name} needs {}", .0.wants(), name = .0.name())]
    NotForAlgorithm(Algorithm),
}

/// A key that tokens are verified with, and the one algorithm it is for.
pub struct Key {
    algorithm: Algorithm,
    material: Material,
}

enum Material {
    Shared(Box<hmac::Key>),
    Public(ParsedPublicKey),
}

/// From this many bytes of a DER on an RSA key has more than 4096 bits.
const LONG_RSA: usize = 600;

impl Key {
    /// A shared secret.
    ///
    /// # Errors
    /// The algorithm takes no secret.
    pub fn secret(algorithm: Algorithm, secret: &[u8]) -> Result<Self, KeyError> {
        let kind = algorithm.shared().ok_or(KeyError::NotForAlgorithm(algorithm))?;
        Ok(Self { algorithm, material: Material::Shared(Box::new(hmac::Key::new(kind, secret))) })
    }

    /// A public key in PEM: `PUBLIC KEY`, or `RSA PUBLIC KEY`.
    ///
    /// # Errors
    /// The text is no such key, or the key is not for this algorithm.
    pub fn public(algorithm: Algorithm, pem: &str) -> Result<Self, KeyError> {
        let der = der(pem).ok_or(KeyError::NotPem)?;
        let kind = algorithm.public().ok_or(KeyError::NotForAlgorithm(algorithm))?;
        let key = ParsedPublicKey::new(kind, der).map_err(|_| KeyError::NotForAlgorithm(algorithm))?;
        Ok(Self { algorithm, material: Material::Public(key) })
    }

    /// What it is for.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Whether a verification takes long enough, around 100 µs and more, to hold up other requests of a worker.
    pub fn is_slow(&self) -> bool {
        match (&self.material, self.algorithm) {
            (Material::Shared(_), _) => false,
            (Material::Public(_), Algorithm::ES384 | Algorithm::ES512) => true,
            (Material::Public(key), _) => key.as_ref().len() > LONG_RSA,
        }
    }
}

/// The bytes of the first PEM block that is a public key.
fn der(pem: &str) -> Option<Vec<u8>> {
    ["PUBLIC KEY", "RSA PUBLIC KEY"].into_iter().find_map(|label| {
        let (_, after) = pem.split_once(&format!("-----BEGIN {label}-----"))?;
        let (body, _) = after.split_once(&format!("-----END {label}-----"))?;
        let text: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        STANDARD.decode(text).ok()
    })
}

/// The header of a token, as far as it matters. A field that stands twice is an error.
#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
    b64: Option<Value>,
}

/// A token that was taken apart. Nothing in it is to be believed before it [is signed](Self::is_signed_by).
pub struct Token<'a> {
    algorithm: String,
    key: Option<String>,
    signed: &'a str,
    signature: Vec<u8>,
    claims: Map<String, Value>,
}

impl<'a> Token<'a> {
    /// Takes a token apart; nothing if it is none.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (signed, signature) = text.rsplit_once('.')?;
        let (header, payload) = signed.split_once('.')?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).ok();
        let header: Header = serde_json::from_slice(&decode(header)?).ok()?;
        // Extensions that must be understood are not; among them `b64`, which changes what is signed.
        if header.crit.is_some() || header.b64.is_some_and(|b64| b64 != Value::Bool(true)) {
            return None;
        }
        Some(Self {
            algorithm: header.alg,
            key: header.kid,
            signed,
            signature: decode(signature)?,
            claims: serde_json::from_slice(&decode(payload)?).ok()?,
        })
    }

    /// Whether the holder of this key signed the token.
    pub fn is_signed_by(&self, key: &Key) -> bool {
        if self.algorithm != key.algorithm.name() {
            return false;
        }
        let signed = self.signed.as_bytes();
        match &key.material {
            Material::Shared(key) => hmac::verify(key, signed, &self.signature).is_ok(),
            Material::Public(key) => key.verify_sig(signed, &self.signature).is_ok(),
        }
    }

    /// Which key of a set the token names (`kid`).
    pub fn key_id(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// What the token says.
    pub fn claims(&self) -> &Map<String, Value> {
        &self.claims
    }

    /// What the token says, by value.
    pub fn into_claims(self) -> Map<String, Value> {
        self.claims
    }
}

/// A claim about the time in which a token is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum TimeClaim {
    /// The token is not valid any more from then on.
    Exp,
    /// The token is not valid before.
    Nbf,
}

impl TimeClaim {
    /// Whether the claim holds at `now`, in seconds since 1970, give or take `grace`. Nothing if it is not there.
    pub fn holds(self, claims: &Map<String, Value>, now: f64, grace: f64) -> Option<bool> {
        let claim = claims.get(match self {
            Self::Exp => "exp",
            Self::Nbf => "nbf",
        })?;
        // A claim that is no number holds at no time.
        Some(claim.as_f64().is_some_and(|time| match self {
            Self::Exp => now < time + grace,
            Self::Nbf => time <= now + grace,
        }))
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::KeyPair;
    use serde_json::json;

    use super::*;

    fn encode(value: &Value) -> String {
        URL_SAFE_NO_PAD.encode(value.to_string())
    }

    fn hs256(header: &Value, claims: &Value, secret: &[u8]) -> String {
        let signed = format!("{}.{}", encode(header), encode(claims));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag))
    }

    fn is_valid(token: &str, key: &Key) -> bool {
        Token::parse(token).is_some_and(|token| token.is_signed_by(key))
    }

    #[test]
    fn the_example_of_rfc_7515_is_valid() {
        let secret = URL_SAFE_NO_PAD
            .decode("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
            .unwrap();
        let token = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0\
                     dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
        assert!(is_valid(token, &Key::secret(Algorithm::HS256, &secret).unwrap()));
        assert!(!is_valid(token, &Key::secret(Algorithm::HS384, &secret).unwrap()));
        assert!(!is_valid(token, &Key::secret(Algorithm::HS256, b"other").unwrap()));
    }

    #[test]
    fn the_algorithm_is_that_of_the_key() {
        let pair = signature::Ed25519KeyPair::generate().unwrap();
        let mut der = vec![0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
        der.extend_from_slice(pair.public_key().as_ref());
        let pem =
            format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(&der));
        let key = Key::public(Algorithm::EdDSA, &pem).unwrap();
        let claims = json!({"key": "a"});
        let signed = format!("{}.{}", encode(&json!({"alg": "EdDSA"})), encode(&claims));
        let good = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(pair.sign(signed.as_bytes())));
        assert!(is_valid(&good, &key));
        // The public key as a secret, in every form somebody might try.
        for secret in [pem.as_bytes(), pem.trim().as_bytes(), &der, pair.public_key().as_ref()] {
            assert!(!is_valid(&hs256(&json!({"alg": "HS256"}), &claims, secret), &key));
            assert!(!is_valid(&hs256(&json!({"alg": "EdDSA"}), &claims, secret), &key));
        }
        for alg in ["none", "None", "NONE", "", "eddsa", "Ed25519"] {
            for signature in ["", &URL_SAFE_NO_PAD.encode([0; 64])] {
                let token = format!("{}.{}.{signature}", encode(&json!({"alg": alg})), encode(&claims));
                assert!(!is_valid(&token, &key), "{alg}");
            }
        }
        let empty = format!("{}.{}.", encode(&json!({"alg": "EdDSA"})), encode(&claims));
        assert!(!is_valid(&empty, &key));
    }

    #[test]
    fn what_is_not_a_plain_signed_token_is_none() {
        let (claims, secret) = (json!({"key": "a"}), b"secret");
        let key = Key::secret(Algorithm::HS256, secret).unwrap();
        let good = hs256(&json!({"alg": "HS256", "typ": "JWT", "kid": "../../x"}), &claims, secret);
        assert!(is_valid(&good, &key));
        assert!(is_valid(&hs256(&json!({"alg": "HS256", "b64": true}), &claims, secret), &key));
        let parts: Vec<&str> = good.split('.').collect();
        let [header, payload, signature] = parts[..] else { panic!() };
        let cases = [
            ("nothing", String::new()),
            ("one part", header.to_owned()),
            ("two parts", format!("{header}.{payload}")),
            ("four parts", format!("{good}.{signature}")),
            ("five parts, as if encrypted", format!("{header}.{payload}.{payload}.{payload}.{signature}")),
            ("padding", format!("{header}.{payload}.{signature}=")),
            ("the other base64", good.replace(['-', '_'], "+")),
            ("a space", format!("{good} ")),
            ("another payload", format!("{header}.{}.{signature}", encode(&json!({"key": "b"})))),
            ("crit", hs256(&json!({"alg": "HS256", "crit": ["exp"]}), &claims, secret)),
            ("an empty crit", hs256(&json!({"alg": "HS256", "crit": []}), &claims, secret)),
            ("b64", hs256(&json!({"alg": "HS256", "b64": false}), &claims, secret)),
            ("no algorithm", hs256(&json!({"typ": "JWT"}), &claims, secret)),
            ("an algorithm that is no text", hs256(&json!({"alg": ["HS256"]}), &claims, secret)),
            ("a header that is a list", hs256(&json!(["HS256"]), &claims, secret)),
            ("claims that are a list", hs256(&json!({"alg": "HS256"}), &json!([1]), secret)),
            ("claims that are text", hs256(&json!({"alg": "HS256"}), &json!("a"), secret)),
        ];
        for (name, token) in cases {
            if token != good {
                assert!(!is_valid(&token, &key), "{name}");
            }
        }
        let twice = r#"{"alg":"HS256","alg":"none"}"#;
        assert!(Token::parse(&format!("{}.{payload}.{signature}", URL_SAFE_NO_PAD.encode(twice))).is_none());
    }

    #[test]
    fn no_change_of_a_token_is_signed_and_none_breaks_the_reader() {
        let secret = b"secret";
        let key = Key::secret(Algorithm::HS256, secret).unwrap();
        let good = hs256(&json!({"alg": "HS256", "typ": "JWT"}), &json!({"key": "a", "exp": 1}), secret);
        for at in 0..good.len() {
            assert!(!is_valid(&good[..at], &key) && !is_valid(&good[at + 1..], &key), "cut at {at}");
            for other in ["A", "z", "-", "_", ".", "=", "+", " ", "\0", "\u{e9}"] {
                let changed = format!("{}{other}{}", &good[..at], &good[at + 1..]);
                assert!(changed == good || !is_valid(&changed, &key), "{other:?} at {at}");
                let longer = format!("{}{other}{}", &good[..at], &good[at..]);
                assert!(!is_valid(&longer, &key), "{other:?} before {at}");
            }
        }
    }

    #[test]
    fn a_key_is_for_one_kind_of_algorithm() {
        let p256 = signature::EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let der = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::PublicKeyX509Der<'_>>::as_der(
            p256.public_key(),
        );
        let pem = |label: &str, der: &[u8]| {
            format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
        };
        let public = pem("PUBLIC KEY", der.unwrap().as_ref());
        let key = Key::public(Algorithm::ES256, &public).unwrap();
        assert!(!key.is_slow());
        for other in
            [Algorithm::ES384, Algorithm::ES512, Algorithm::RS256, Algorithm::PS256, Algorithm::EdDSA]
        {
            assert!(Key::public(other, &public).is_err(), "{other:?}");
        }
        assert!(Key::public(Algorithm::HS256, &public).is_err());
        assert!(Key::secret(Algorithm::ES256, b"x").is_err());
        for text in ["", "x", "-----BEGIN PUBLIC KEY-----", &pem("PRIVATE KEY", b"abc")] {
            assert!(matches!(Key::public(Algorithm::ES256, text), Err(KeyError::NotPem)), "{text}");
        }
        let words = Key::public(Algorithm::ES384, &public).err().unwrap().to_string();
        assert_eq!(words, "ES384 needs a public key on the curve P-384");

        let claims = json!({});
        let signed = format!("{}.{}", encode(&json!({"alg": "ES256"})), encode(&claims));
        let signature = p256.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        assert!(is_valid(&format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)), &key));
        // A signature of zeros, CVE-2022-21449.
        assert!(!is_valid(&format!("{signed}.{}", URL_SAFE_NO_PAD.encode([0; 64])), &key));
    }

    #[test]
    fn claims_hold_for_their_time() {
        use TimeClaim::{Exp, Nbf};
        let now = 1_000.0;
        let cases = [
            (Exp, json!({"exp": 1001}), 0.0, Some(true)),
            (Exp, json!({"exp": 1000}), 0.0, Some(false)),
            (Exp, json!({"exp": 1000.5}), 0.0, Some(true)),
            (Exp, json!({"exp": 991}), 10.0, Some(true)),
            (Exp, json!({"exp": 990}), 10.0, Some(false)),
            (Exp, json!({"exp": 0}), 0.0, Some(false)),
            (Exp, json!({"exp": -1}), 0.0, Some(false)),
            (Exp, json!({"exp": 1e300}), 0.0, Some(true)),
            (Exp, json!({"exp": "2000"}), 0.0, Some(false)),
            (Exp, json!({"exp": null}), 0.0, Some(false)),
            (Exp, json!({}), 0.0, None),
            (Nbf, json!({"nbf": 1000}), 0.0, Some(true)),
            (Nbf, json!({"nbf": 1001}), 0.0, Some(false)),
            (Nbf, json!({"nbf": 1010}), 10.0, Some(true)),
            (Nbf, json!({"nbf": 1011}), 10.0, Some(false)),
            (Nbf, json!({"nbf": true}), 0.0, Some(false)),
            (Nbf, json!({"exp": 1}), 0.0, None),
        ];
        for (claim, claims, grace, expected) in cases {
            let map = claims.as_object().unwrap();
            assert_eq!(claim.holds(map, now, grace), expected, "{claim:?} {claims}");
        }
    }
}
