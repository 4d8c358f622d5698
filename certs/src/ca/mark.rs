//! How an authority knows its own work again when others have the key of a root: the number of a leaf is a keyed hash of
//! what the leaf says.
//!
//! Who has the key of a root can make certificates of anybody, and with any number, but none whose number is this hash.
//! The key is made of the one that seals everything, so all replicas have the same, and nothing has to be kept.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::{constant_time, hmac};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::seal::{SealError, Sealer};
use crate::identity::SpiffeId;
use crate::trust::{Fingerprint, Peer};
use crate::verify::{AltName, ClientIdentity};

/// Binds the key to its use; replicas have to have the same.
const SALT: [u8; 16] = *b"postern marks 1 ";
/// Bytes of a serial number.
const LENGTH: usize = 16;

/// The key.
pub struct Mark(hmac::Key);

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mark(..)")
    }
}

/// What a leaf says.
#[derive(Clone, Copy, Debug)]
pub struct Said<'a> {
    pub identity: &'a SpiffeId,
    pub dns_names: &'a [String],
    /// SHA-256 of the public key.
    pub key: Fingerprint,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Mark {
    /// # Errors
    /// The library fails.
    pub fn new(sealer: &Sealer) -> Result<Self, SealError> {
        let key = sealer.key_for("postern marks", &SALT)?;
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &*key)))
    }

    /// The number of a leaf: 128 bits, of which the first eight are not all zero, so that it is written the same
    /// everywhere.
    #[must_use]
    pub fn serial(&self, said: &Said<'_>) -> [u8; LENGTH] {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut hash = hmac::Context::with_key(&self.0);
        hash.update(said.key.as_bytes());
        hash.update(&seconds(said.not_before).to_be_bytes());
        hash.update(&seconds(said.not_after).to_be_bytes());
        // Neither identities nor names have a zero in them.
        for name in std::iter::once(said.identity.as_str()).chain(said.dns_names.iter().map(String::as_str)) {
            hash.update(name.as_bytes());
            hash.update(&[0]);
        }
        let mut serial = [0; LENGTH];
        for (to, from) in serial.iter_mut().zip(hash.sign().as_ref()) {
            *to = *from;
        }
        if let Some(first) = serial.first_mut() {
            *first = (*first).max(1);
        }
        serial
    }

    /// Whether a leaf has the number that this authority would have given it.
    #[must_use]
    pub fn is_own(&self, leaf: &CertificateDer<'_>) -> bool {
        let (Ok(peer), Ok((_, parsed))) = (Peer::read(leaf), X509Certificate::from_der(leaf)) else {
            return false;
        };
        let names = ClientIdentity::parse(leaf).map(|identity| identity.names).unwrap_or_default();
        let dns_names: Vec<String> = names
            .into_iter()
            .filter_map(|name| match name {
                AltName::Dns(name) => Some(name),
                _ => None,
            })
            .collect();
        let said = Said {
            identity: &peer.id,
            dns_names: &dns_names,
            key: Fingerprint::of(parsed.public_key().raw),
            not_before: peer.not_before,
            not_after: peer.not_after,
        };
        constant_time::verify_slices_are_equal(&self.serial(&said), peer.serial.as_bytes()).is_ok()
    }
}
