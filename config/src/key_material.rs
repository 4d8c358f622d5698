//! The private key of a certificate: in PEM, or the name of one that nodes of `postern signer` hold.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::fields::StrVisitor;
use crate::sensitive::PrivateKey;

const SCHEME: &str = "signer://";
/// What may stand behind the scheme. Names of pools are shorter than those of keys.
const PATTERN: &str = "^signer://[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$";
const EXPECTED: &str = "a private key in PEM of 64 to 65536 characters, or signer://POOL/KEY";

/// A private key, or where it is.
#[derive(Clone, PartialEq, Eq)]
pub enum KeyMaterial {
    /// The key itself.
    Pem(PrivateKey),
    /// The key is at signers.
    Remote(SignerKey),
}

/// `signer://POOL/KEY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignerKey {
    /// One of `postern.signers` in config.yaml.
    pub pool: Box<str>,
    /// The name that the signers have for it.
    pub name: Box<str>,
}

impl KeyMaterial {
    /// The key in PEM, if it is here.
    #[must_use]
    pub fn pem(&self) -> Option<&PrivateKey> {
        match self {
            Self::Pem(key) => Some(key),
            Self::Remote(_) => None,
        }
    }

    /// Where it is, if it is at signers.
    #[must_use]
    pub fn remote(&self) -> Option<&SignerKey> {
        match self {
            Self::Pem(_) => None,
            Self::Remote(key) => Some(key),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        if text.starts_with(SCHEME) {
            return SignerKey::parse(text).map(Self::Remote);
        }
        PrivateKey::new(text).map(Self::Pem)
    }
}

impl SignerKey {
    /// Whether pools may have this name.
    #[must_use]
    pub fn is_pool_name(name: &str) -> bool {
        name.starts_with(|first: char| first.is_ascii_alphanumeric()) && is_name(name, 64)
    }

    fn parse(text: &str) -> Option<Self> {
        let (pool, name) = text.strip_prefix(SCHEME)?.split_once('/')?;
        let fits = Self::is_pool_name(pool) && !name.starts_with('.') && is_name(name, 128);
        fits.then(|| Self { pool: pool.into(), name: name.into() })
    }
}

fn is_name(text: &str, longest: usize) -> bool {
    let clean = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=longest).contains(&text.len()) && text.bytes().all(clean)
}

impl fmt::Display for SignerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.pool, self.name)
    }
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pem(key) => key.fmt(f),
            Self::Remote(key) => write!(f, "{key}"),
        }
    }
}

impl Serialize for KeyMaterial {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Pem(key) => key.serialize(serializer),
            Self::Remote(key) => serializer.collect_str(key),
        }
    }
}

impl<'de> Deserialize<'de> for KeyMaterial {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let visitor = StrVisitor { expected: EXPECTED, parse: |text: &str| Some(text.to_owned()) };
        let text = Zeroizing::new(deserializer.deserialize_str(visitor)?);
        // The error must not quote the text, as those of other fields do.
        Self::parse(&text).ok_or_else(|| serde::de::Error::invalid_length(text.len(), &EXPECTED))
    }
}

impl JsonSchema for KeyMaterial {
    fn schema_name() -> Cow<'static, str> {
        "KeyMaterial".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "if": {"pattern": "^signer://"},
            "then": {"pattern": PATTERN},
            "else": {"minLength": 64, "maxLength": 65536},
            "writeOnly": true
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_is_pem_or_the_name_of_one() {
        let longest = format!("signer://p/{}", "k".repeat(128));
        for (text, pool, name) in [
            ("signer://main/shop", "main", "shop"),
            ("signer://eu-1.a/shop.example.com-2026", "eu-1.a", "shop.example.com-2026"),
            (longest.as_str(), "p", &longest[11..]),
        ] {
            let key: KeyMaterial = serde_json::from_value(json!(text)).unwrap();
            let remote = key.remote().unwrap();
            assert_eq!((&*remote.pool, &*remote.name), (pool, name), "{text}");
            assert_eq!(serde_json::to_value(&key).unwrap(), json!(text));
            assert_eq!(format!("{key:?}"), text);
        }
        let too_long = format!("{longest}k");
        for text in [
            "signer://",
            "signer://main",
            "signer://main/",
            "signer:///shop",
            "signer://main/a/b",
            "signer://main/../shop",
            "signer://main/.shop",
            "signer://-main/shop",
            "signer://ma in/shop",
            "signer:/main/shop",
            "SIGNER://main/shop",
            too_long.as_str(),
            "short",
        ] {
            let error = serde_json::from_value::<KeyMaterial>(json!(text)).unwrap_err().to_string();
            assert!(error.contains("signer://POOL/KEY"), "{text}: {error}");
        }
        let pem = "k".repeat(64);
        let key: KeyMaterial = serde_json::from_value(json!(pem)).unwrap();
        assert_eq!((key.pem().unwrap().reveal(), key.remote()), (pem.as_str(), None));
        assert!(!format!("{key:?}").contains("kk"));
    }
}
