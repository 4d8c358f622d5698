//! JSON Web Key Sets (RFC 7517): the public keys that somebody else signs tokens with.
//!
//! Only asymmetric keys are taken. A key that names an algorithm is for that one; others are for those of their kind.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::Value;

use super::jwt::{Algorithm, Key, Token};

/// Keys of one set. Nobody rotates more at a time.
const MAX_KEYS: usize = 64;

/// A set of keys.
#[derive(Default)]
pub struct KeySet(Vec<(Option<Box<str>>, Vec<Key>)>);

impl KeySet {
    /// The keys of a set that can be used; members that are no such keys are passed over.
    pub fn new(set: &Value) -> Self {
        let members = set.get("keys").and_then(Value::as_array).into_iter().flatten().take(MAX_KEYS);
        Self(members.filter_map(member).collect())
    }

    /// One key in PEM, without a name.
    pub fn of(keys: Vec<Key>) -> Self {
        Self(vec![(None, keys)])
    }

    /// Whether there is a key of that name.
    pub fn names(&self, kid: &str) -> bool {
        self.0.iter().any(|(name, _)| name.as_deref() == Some(kid))
    }

    /// Whether no key can be used.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of the keys signed the token: the one that it names, if it names one, and with `only`, if that is
    /// given.
    pub fn signed(&self, token: &Token<'_>, only: Option<Algorithm>) -> bool {
        let fits = |name: &Option<Box<str>>| match (token.key_id(), name) {
            (Some(kid), Some(name)) => kid == &**name,
            _ => true,
        };
        let keys = self.0.iter().filter(|(name, _)| fits(name)).flat_map(|(_, keys)| keys);
        keys.filter(|key| only.is_none_or(|only| key.algorithm() == only)).any(|key| token.is_signed_by(key))
    }
}

/// The algorithm of that name, if the holder of a public key can verify it.
pub fn asymmetric(name: &str) -> Option<Algorithm> {
    let algorithm: Algorithm = serde_json::from_value(name.into()).ok()?;
    (!algorithm.is_symmetric()).then_some(algorithm)
}

fn member(jwk: &Value) -> Option<(Option<Box<str>>, Vec<Key>)> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str);
    if text("use").is_some_and(|usage| usage != "sig") {
        return None;
    }
    let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
    let (pem, kinds) = match text("kty")? {
        "RSA" => {
            let numbers = [integer(&bytes("n")?), integer(&bytes("e")?)].concat();
            let kinds = [
                Algorithm::RS256,
                Algorithm::RS384,
                Algorithm::RS512,
                Algorithm::PS256,
                Algorithm::PS384,
                Algorithm::PS512,
            ];
            (pem("RSA PUBLIC KEY", &element(0x30, &numbers)), kinds.to_vec())
        }
        "EC" => {
            let (kind, curve): (_, &[u8]) = match text("crv")? {
                "P-256" => (Algorithm::ES256, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7]),
                "P-384" => (Algorithm::ES384, &[0x2b, 0x81, 0x04, 0, 0x22]),
                "P-521" => (Algorithm::ES512, &[0x2b, 0x81, 0x04, 0, 0x23]),
                _ => return None,
            };
            let (x, y) = (bytes("x")?, bytes("y")?);
            if x.len() != y.len() {
                return None;
            }
            let ec = element(6, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1]);
            let algorithm = element(0x30, &[ec, element(6, curve)].concat());
            // No unused bits, and an uncompressed point.
            let point = element(3, &[&[0, 4], &*x, &*y].concat());
            (pem("PUBLIC KEY", &element(0x30, &[algorithm, point].concat())), vec![kind])
        }
        "OKP" if text("crv") == Some("Ed25519") => {
            let algorithm = element(0x30, &element(6, &[0x2b, 0x65, 0x70]));
            let point = element(3, &[&[0], &*bytes("x")?].concat());
            (pem("PUBLIC KEY", &element(0x30, &[algorithm, point].concat())), vec![Algorithm::EdDSA])
        }
        _ => return None,
    };
    let named = text("alg");
    let keys: Vec<_> = kinds
        .into_iter()
        .filter(|kind| named.is_none_or(|named| named == kind.name()))
        .filter_map(|kind| Key::public(kind, &pem).ok())
        .collect();
    (!keys.is_empty()).then(|| (text("kid").map(Into::into), keys))
}

/// An element of a DER.
fn element(tag: u8, inside: &[u8]) -> Vec<u8> {
    let length = inside.len();
    let mut out = vec![tag];
    let digits = length.to_be_bytes();
    let digits: Vec<u8> = digits.into_iter().skip_while(|digit| *digit == 0).collect();
    match u8::try_from(length) {
        Ok(short @ 0..=127) => out.push(short),
        // At most eight digits.
        _ => out.push(0x80 | u8::try_from(digits.len()).unwrap_or(8)),
    }
    if length > 127 {
        out.extend(digits);
    }
    out.extend_from_slice(inside);
    out
}

/// A number that is not negative.
fn integer(number: &[u8]) -> Vec<u8> {
    let digits: Vec<u8> = number.iter().copied().skip_while(|digit| *digit == 0).collect();
    let sign: &[u8] = if digits.first().is_none_or(|first| *first > 127) { &[0] } else { &[] };
    element(2, &[sign, &digits].concat())
}

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::signing::{SigningKey, keys};
    use super::*;

    #[test]
    fn what_is_signed_is_verified_with_the_set() {
        for algorithm in
            [Algorithm::RS256, Algorithm::PS384, Algorithm::ES256, Algorithm::ES384, Algorithm::EdDSA]
        {
            let [one, two] =
                ["one", "two"].map(|kid| SigningKey::new(kid, algorithm, &keys::make(algorithm).0).unwrap());
            let set = |with_alg: bool, keys: &[&SigningKey]| {
                let members: Vec<Value> = keys
                    .iter()
                    .map(|key| {
                        let mut jwk = key.jwk().clone();
                        if !with_alg {
                            jwk.as_object_mut().unwrap().remove("alg");
                        }
                        jwk
                    })
                    .collect();
                KeySet::new(&json!({ "keys": members }))
            };
            let signed = one.sign(&json!({"a": 1})).unwrap();
            let token = Token::parse(&signed).unwrap();
            for with_alg in [true, false] {
                assert!(set(with_alg, &[&two, &one]).signed(&token, None), "{algorithm:?}");
                assert!(set(with_alg, &[&one]).signed(&token, Some(algorithm)), "{algorithm:?}");
                assert!(!set(with_alg, &[&two]).signed(&token, None), "{algorithm:?}");
                assert!(!set(with_alg, &[&one]).signed(&token, Some(Algorithm::RS512)), "{algorithm:?}");
            }
            assert!(set(true, &[&one]).names("one") && !set(true, &[&one]).names("two"));
        }
    }

    #[test]
    fn what_cannot_be_used_is_passed_over() {
        let good = SigningKey::new("k", Algorithm::ES256, &keys::make(Algorithm::ES256).0).unwrap();
        let with = |name: &str, value: Value| {
            let mut jwk = good.jwk().clone();
            jwk[name] = value;
            jwk
        };
        for jwk in [
            json!({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}),
            with("use", json!("enc")),
            with("alg", json!("ES384")),
            with("alg", json!("none")),
            with("crv", json!("P-384")),
            with("x", json!("AAAA")),
            with("x", json!("=")),
            json!(1),
            json!({"kty": "RSA", "n": "", "e": ""}),
        ] {
            assert!(KeySet::new(&json!({ "keys": [jwk] })).is_empty(), "{jwk}");
        }
        assert!(KeySet::new(&json!([])).is_empty());
        assert!(!KeySet::new(&json!({"keys": [1, good.jwk()]})).is_empty());
    }
}
