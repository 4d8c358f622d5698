//! Keys at rest. Where the configuration encrypts its secrets these are sealed, by keys made of the same key ring; elsewhere
//! they stand as they are, in a store that only its owner may read.

use std::fmt;

use zeroize::Zeroizing;

use crate::ca::seal::{SealError, Sealer};

/// The same in every replica, so that each makes the same key of a ring's, and another one than for anything else.
const SALT: &[u8; 16] = b"postern-acme-1.0";

/// A key ring that cannot be used, or a secret that it does not open.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error("a key of the key ring cannot be used: {0}")]
    Ring(SealError),
    #[error("it cannot be sealed: {0}")]
    Seal(SealError),
    #[error("no key of the key ring opens it")]
    Closed,
    #[error("it is not text")]
    Text,
}

/// Seals and opens the keys of certificates and accounts.
pub struct Vault {
    seals: bool,
    ring: Vec<Sealer>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("seals", &self.seals).finish_non_exhaustive()
    }
}

impl Vault {
    /// With the keys of a ring, of which the first seals, if `seals`, and all open.
    ///
    /// # Errors
    /// The cryptographic library fails.
    pub fn new<'a>(seals: bool, ring: impl IntoIterator<Item = &'a str>) -> Result<Self, VaultError> {
        let sealer = |key: &str| {
            Sealer::secret(key.as_bytes()).and_then(|key| key.derive("acme", SALT)).map_err(VaultError::Ring)
        };
        let ring = ring.into_iter().map(sealer).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { seals, ring })
    }

    /// What is kept in the place of a secret that is for `purpose`.
    ///
    /// # Errors
    /// The cryptographic library fails.
    pub fn close(&self, purpose: &str, secret: &str) -> Result<String, VaultError> {
        match self.ring.first().filter(|_| self.seals) {
            Some(sealer) => sealer.seal(purpose, secret.as_bytes()).map_err(VaultError::Seal),
            None => Ok(secret.to_owned()),
        }
    }

    /// The secret again, whether it was sealed or not.
    ///
    /// # Errors
    /// It was sealed by another key, or for another purpose.
    pub fn open(&self, purpose: &str, kept: &str) -> Result<Zeroizing<String>, VaultError> {
        // PEM and JSON begin otherwise.
        if !kept.starts_with("k1.") {
            return Ok(Zeroizing::new(kept.to_owned()));
        }
        let opened = self.ring.iter().find_map(|sealer| sealer.open(purpose, kept).ok());
        let opened = opened.ok_or(VaultError::Closed)?;
        std::str::from_utf8(&opened).map(|text| Zeroizing::new(text.to_owned())).map_err(|_| VaultError::Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_with_one_ring_open_what_the_others_sealed() {
        let (old, new) = ("an old key of the ring", "a new key of the ring");
        let one = Vault::new(true, [old]).unwrap();
        let two = Vault::new(true, [new, old]).unwrap();
        let kept = one.close("k", "secret").unwrap();
        assert!(!kept.contains("secret"));
        assert_eq!(*two.open("k", &kept).unwrap(), "secret");
        assert!(two.open("other", &kept).is_err(), "it is for something else");
        assert!(one.open("k", &two.close("k", "secret").unwrap()).is_err(), "the new key seals");
        let open = Vault::new(false, [old]).unwrap();
        assert_eq!(open.close("k", "secret").unwrap(), "secret");
        assert_eq!(*open.open("k", &kept).unwrap(), "secret", "sealing was switched off");
        assert_eq!(*one.open("k", "-----BEGIN PRIVATE KEY-----").unwrap(), "-----BEGIN PRIVATE KEY-----");
    }
}
