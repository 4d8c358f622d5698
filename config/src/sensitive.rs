//! Text that must not be seen: private keys, tokens, passwords.
//!
//! It prints as a row of stars, is compared without a shortcut and overwrites its memory when it is dropped.
//! Writing it into JSON gives the text: stores need it, and the Admin API leaves it out itself.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::fields::StrVisitor;

/// A secret of `MIN` to `MAX` bytes.
#[derive(Clone)]
pub struct Sensitive<const MIN: usize = 1, const MAX: usize = { 64 * 1024 }>(Zeroizing<Box<str>>);

/// A private key in PEM: 64 bytes to 64 KiB.
pub type PrivateKey = Sensitive<64>;

impl<const MIN: usize, const MAX: usize> Sensitive<MIN, MAX> {
    /// The secret; nothing if its length is outside the limits.
    #[must_use]
    pub fn new(secret: &str) -> Option<Self> {
        (MIN..=MAX).contains(&secret.len()).then(|| Sensitive(Zeroizing::new(secret.into())))
    }

    /// The secret itself, for the one place that uses it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl<const MIN: usize, const MAX: usize> PartialEq for Sensitive<MIN, MAX> {
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.0.as_bytes(), other.0.as_bytes());
        a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (x, y)| difference | (x ^ y)) == 0
    }
}

impl<const MIN: usize, const MAX: usize> Eq for Sensitive<MIN, MAX> {}

impl<const MIN: usize, const MAX: usize> fmt::Debug for Sensitive<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"***\"")
    }
}

impl<const MIN: usize, const MAX: usize> Serialize for Sensitive<MIN, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de, const MIN: usize, const MAX: usize> Deserialize<'de> for Sensitive<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = format_args!("text of {MIN} to {MAX} characters");
        let visitor = StrVisitor { expected, parse: |text: &str| Some(text.to_owned()) };
        let secret = Zeroizing::new(deserializer.deserialize_str(visitor)?);
        // The error must not quote the text, as those of other fields do.
        Sensitive::new(&secret).ok_or_else(|| {
            serde::de::Error::invalid_length(secret.len(), &expected_length::<MIN, MAX>().as_str())
        })
    }
}

fn expected_length<const MIN: usize, const MAX: usize>() -> String {
    format!("{MIN} to {MAX} characters")
}

impl<const MIN: usize, const MAX: usize> JsonSchema for Sensitive<MIN, MAX> {
    fn schema_name() -> Cow<'static, str> {
        format!("Sensitive{MIN}To{MAX}").into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "minLength": MIN, "maxLength": MAX, "writeOnly": true})
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn a_secret_is_never_printed() {
        let secret: Sensitive = serde_json::from_value(json!("hunter2")).unwrap();
        assert_eq!(format!("{secret:?}"), "\"***\"");
        assert_eq!(serde_json::to_value(&secret).unwrap(), json!("hunter2"));
        let error = serde_json::from_value::<PrivateKey>(json!("short secret")).unwrap_err();
        assert!(!error.to_string().contains("short secret"), "{error}");
    }

    #[test]
    fn secrets_are_equal_by_text() {
        let secret = |text| Sensitive::<1, 10>::new(text).unwrap();
        assert_eq!(secret("a"), secret("a"));
        assert_ne!(secret("a"), secret("b"));
        assert_ne!(secret("a"), secret("aa"));
    }
}
