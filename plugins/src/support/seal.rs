//! Data that clients keep and cannot read or change: encrypted and authenticated with a key made of a secret.
//!
//! AES-256-GCM with a random nonce. What a seal is for is bound into it, so that one cannot be used as another.

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::hkdf;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Bytes of a nonce.
const NONCE: usize = 12;

/// Seals and opens.
pub struct Sealer {
    key: RandomizedNonceKey,
    purpose: Box<str>,
}

/// The length of a key.
struct KeyLength;

impl hkdf::KeyType for KeyLength {
    fn len(&self) -> usize {
        32
    }
}

impl Sealer {
    /// A key made of `secret`, for this purpose alone; nothing if the library fails.
    pub fn new(secret: &[u8], purpose: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        let made = hkdf::Salt::new(hkdf::HKDF_SHA256, b"postern seal").extract(secret);
        made.expand(&[b"aes-256-gcm"], KeyLength).ok()?.fill(&mut bytes).ok()?;
        let key = RandomizedNonceKey::new(&AES_256_GCM, &bytes).ok()?;
        Some(Self { key, purpose: purpose.into() })
    }

    fn bound(&self, kind: &str) -> Aad<Vec<u8>> {
        Aad::from([kind.as_bytes(), b"\0", self.purpose.as_bytes()].concat())
    }

    /// Seals `data` of a kind; text of base64url.
    pub fn seal(&self, kind: &str, data: &[u8]) -> Option<String> {
        let mut sealed = data.to_vec();
        let nonce = self.key.seal_in_place_append_tag(self.bound(kind), &mut sealed).ok()?;
        let mut all = nonce.as_ref().to_vec();
        all.append(&mut sealed);
        Some(URL_SAFE_NO_PAD.encode(all))
    }

    /// Opens what was sealed as of this kind; nothing if it is anything else.
    pub fn open(&self, kind: &str, text: &str) -> Option<Vec<u8>> {
        let mut all = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (nonce, sealed) = all.split_at_mut_checked(NONCE)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        Some(self.key.open_in_place(nonce, self.bound(kind), sealed).ok()?.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_is_opened_by_its_own_key_kind_and_purpose() {
        let sealer = Sealer::new(b"0123456789abcdef", "shop").unwrap();
        let sealed = sealer.seal("session", b"data").unwrap();
        assert_eq!(sealer.open("session", &sealed).unwrap(), b"data");
        assert_ne!(sealer.seal("session", b"data").unwrap(), sealed);
        assert!(sealer.open("state", &sealed).is_none());
        for other in [("0123456789abcdeX", "shop"), ("0123456789abcdef", "other")] {
            assert!(Sealer::new(other.0.as_bytes(), other.1).unwrap().open("session", &sealed).is_none());
        }
        for index in 0..sealed.len() {
            let mut changed = sealed.clone().into_bytes();
            changed[index] = if changed[index] == b'A' { b'B' } else { b'A' };
            assert!(sealer.open("session", std::str::from_utf8(&changed).unwrap()).is_none(), "{index}");
        }
        for text in ["", "AAAA", "=", "\u{e9}"] {
            assert!(sealer.open("session", text).is_none());
        }
    }
}
