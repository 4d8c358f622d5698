//! A trust store of Java in the form JKS, version 2: certificates alone.
//!
//! The password keeps nothing secret: it goes into a checksum (SHA-1), by which Java finds out whether the file is whole.
//! Java opens the store without it, too, and then does not look.

use std::time::SystemTime;

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

use super::super::record::Moment;
use crate::trust::Fingerprint;

/// What Java expects when nobody says otherwise.
pub const PASSWORD: &str = "changeit";
/// Java refuses to make or change a store with a shorter one.
pub const SHORTEST: usize = 6;

const MAGIC: u32 = 0xFEED_FEED;
const VERSION: u32 = 2;
const TRUSTED: u32 = 2;
/// What goes between password and store into the checksum.
const SALT: &[u8] = b"Mighty Aphrodite";

/// A store of roots in DER, each under a name with the beginning of its fingerprint.
///
/// # Errors
/// The password is one that Java would not take, or there is more than the form has room for.
pub fn store(roots: &[Vec<u8>], password: &str, now: SystemTime) -> Result<Vec<u8>, String> {
    if password.chars().count() < SHORTEST {
        return Err(format!("Java takes no password of less than {SHORTEST} characters"));
    }
    let room = |length: usize| u32::try_from(length).map_err(|_| "too much for a trust store".to_owned());
    let mut data = Vec::new();
    for number in [MAGIC, VERSION, room(roots.len())?] {
        data.extend(number.to_be_bytes());
    }
    for root in roots {
        let id = Fingerprint::of(root).to_string();
        data.extend(TRUSTED.to_be_bytes());
        text(&mut data, &format!("postern-{}", id.get(..16).unwrap_or(&id)));
        data.extend(Moment::from(now).0.to_be_bytes());
        text(&mut data, "X.509");
        data.extend(room(root.len())?.to_be_bytes());
        data.extend(root);
    }
    let mut covered: Vec<u8> = password.encode_utf16().flat_map(u16::to_be_bytes).collect();
    covered.extend(SALT);
    covered.extend(&data);
    data.extend(digest(&SHA1_FOR_LEGACY_USE_ONLY, &covered).as_ref());
    Ok(data)
}

/// ASCII as `DataOutput.writeUTF` writes it.
fn text(data: &mut Vec<u8>, text: &str) {
    data.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    data.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn it_is_byte_for_byte_what_is_written_down_of_the_form() {
        let now = UNIX_EPOCH + Duration::from_millis(0x0102_0304_0506);
        let store = store(&[b"root".to_vec()], "changeit", now).unwrap();
        let name = format!("postern-{}", &Fingerprint::of(b"root").to_string()[..16]);
        let mut expected = vec![0xFE, 0xED, 0xFE, 0xED, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0, 24];
        expected.extend(name.as_bytes());
        expected.extend([0, 0, 1, 2, 3, 4, 5, 6, 0, 5]);
        expected.extend(b"X.509\0\0\0\x04root");
        let (data, checksum) = store.split_at(expected.len());
        assert_eq!(data, expected);
        assert_eq!(checksum.len(), 20);
    }

    #[test]
    fn the_password_is_in_the_checksum_alone() {
        let made = |password| store(&[b"root".to_vec()], password, UNIX_EPOCH).unwrap();
        let (one, two) = (made("changeit"), made("gänseblümchen"));
        assert_eq!(one.len(), two.len());
        assert_eq!(one[..one.len() - 20], two[..two.len() - 20]);
        assert_ne!(one[one.len() - 20..], two[two.len() - 20..]);
        assert!(store(&[], "short", UNIX_EPOCH).unwrap_err().contains("6 characters"));
    }
}
