//! Keys of authorities at rest: encrypted by a key in a file of its own, or by a passphrase.
//!
//! AES-256-GCM with a random nonce. What a seal is for is bound into it, so that one cannot be put in the place of another.
//! Secrets are zeroised when they are dropped.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::num::NonZeroU32;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::{hkdf, pbkdf2, rand};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

const NONCE: usize = 12;
const SALT: usize = 16;
/// As recommended for PBKDF2 with SHA-256; a fifth of a second, once for each salt.
const ITERATIONS: NonZeroU32 = NonZeroU32::new(600_000).unwrap();
const SHORTEST_PASSPHRASE: usize = 12;

/// Why something cannot be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("cannot use the key file {}: {error}", .path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("the key file {} can be read by others (mode {mode:o}): chmod 600 it", .path.display())]
    Mode { path: PathBuf, mode: u32 },
    #[error("the key file {} does not hold 64 hexadecimal digits", .path.display())]
    Content { path: PathBuf },
    #[error("the passphrase has fewer than {SHORTEST_PASSPHRASE} characters")]
    Short,
    #[error("it was sealed by {0}")]
    Kind(&'static str),
    #[error("it was not sealed by this key or passphrase, or it was changed since")]
    Wrong,
    #[error("the cryptographic library fails")]
    Library,
}

type Bytes = Zeroizing<[u8; 32]>;

enum Secret {
    Key(Bytes),
    /// With the salts that were used, and what they make of it.
    Passphrase(Zeroizing<String>, Mutex<Vec<([u8; SALT], Bytes)>>),
}

/// Seals and opens.
pub struct Sealer(Secret);

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(..)")
    }
}

struct Length;

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        32
    }
}

impl Sealer {
    /// The key in a file, which is made where there is none.
    ///
    /// # Errors
    /// The file cannot be read or made, others may read it, or it holds something else.
    pub fn key_file(path: &Path) -> Result<Self, SealError> {
        let wrong = |error| SealError::File { path: path.into(), error };
        match read_secret(path) {
            Ok(text) => {
                let key: crate::trust::Fingerprint =
                    text.trim().parse().map_err(|_| SealError::Content { path: path.into() })?;
                Ok(Self(Secret::Key(Zeroizing::new(*key.as_bytes()))))
            }
            Err(SealError::File { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                let mut key = Zeroizing::new([0; 32]);
                rand::fill(&mut *key).map_err(|_| SealError::Library)?;
                let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
                let text = Zeroizing::new(digits + "\n");
                // Made whole beside its place and put there, so that nobody ever reads half a key; never over another one.
                let beside = path.with_extension(format!("{}.new", std::process::id()));
                let made = write_secret(&beside, text.as_bytes()).and_then(|()| fs::hard_link(&beside, path));
                let _ = fs::remove_file(&beside);
                match made {
                    Ok(()) => Ok(Self(Secret::Key(key))),
                    // Another process was faster.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Self::key_file(path),
                    Err(error) => Err(wrong(error)),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// A passphrase; surrounding white space does not count.
    ///
    /// # Errors
    /// It is too short.
    pub fn passphrase(text: &str) -> Result<Self, SealError> {
        let text = text.trim();
        if text.chars().count() < SHORTEST_PASSPHRASE {
            return Err(SealError::Short);
        }
        Ok(Self(Secret::Passphrase(Zeroizing::new(text.to_owned()), Mutex::default())))
    }

    /// A passphrase in a file.
    ///
    /// # Errors
    /// The file cannot be read, others may read it, or the passphrase is too short.
    pub fn passphrase_file(path: &Path) -> Result<Self, SealError> {
        Self::passphrase(&read_secret(path)?)
    }

    /// A key made of a secret that nobody guesses, such as one of a key ring: it is not stretched.
    ///
    /// # Errors
    /// The library fails.
    pub fn secret(secret: &[u8]) -> Result<Self, SealError> {
        let made = hkdf::Salt::new(hkdf::HKDF_SHA256, b"postern secret").extract(secret);
        let mut key = Zeroizing::new([0; 32]);
        let filled = made.expand(&[], Length).and_then(|made| made.fill(&mut *key));
        filled.map_err(|_| SealError::Library)?;
        Ok(Self(Secret::Key(key)))
    }

    /// A key for this process alone.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn random() -> Result<Self, SealError> {
        let mut key = Zeroizing::new([0; 32]);
        rand::fill(&mut *key).map_err(|_| SealError::Library)?;
        Ok(Self(Secret::Key(key)))
    }

    /// Another sealer made of this, for something else. With a passphrase it is the same for all who use `salt`.
    ///
    /// # Errors
    /// The library fails.
    pub fn derive(&self, purpose: &str, salt: &[u8; SALT]) -> Result<Self, SealError> {
        self.key_for(purpose, salt).map(|key| Self(Secret::Key(key)))
    }

    /// The key of such a sealer, for what is no sealing.
    ///
    /// # Errors
    /// The library fails.
    pub fn key_for(&self, purpose: &str, salt: &[u8; SALT]) -> Result<Zeroizing<[u8; 32]>, SealError> {
        let key = match &self.0 {
            Secret::Key(key) => key.clone(),
            Secret::Passphrase(text, known) => stretched(text, known, salt),
        };
        let made = hkdf::Salt::new(hkdf::HKDF_SHA256, b"postern ca").extract(&*key);
        let mut out = Zeroizing::new([0; 32]);
        let filled = made.expand(&[purpose.as_bytes()], Length).and_then(|made| made.fill(&mut *out));
        filled.map_err(|_| SealError::Library)?;
        Ok(out)
    }

    /// Seals `data` as `purpose`; text without spaces.
    ///
    /// # Errors
    /// The library fails.
    pub fn seal(&self, purpose: &str, data: &[u8]) -> Result<String, SealError> {
        let (prefix, salt, key) = match &self.0 {
            Secret::Key(key) => ("k1", None, key.clone()),
            Secret::Passphrase(text, known) => {
                let used = known.lock().unwrap_or_else(PoisonError::into_inner).last().map(|(salt, _)| *salt);
                let salt = match used {
                    Some(salt) => salt,
                    None => {
                        let mut salt = [0; SALT];
                        rand::fill(&mut salt).map_err(|_| SealError::Library)?;
                        salt
                    }
                };
                ("p1", Some(salt), stretched(text, known, &salt))
            }
        };
        let cipher = RandomizedNonceKey::new(&AES_256_GCM, &*key).map_err(|_| SealError::Library)?;
        let mut sealed = data.to_vec();
        let nonce = cipher.seal_in_place_append_tag(Aad::from(purpose.as_bytes()), &mut sealed);
        let nonce = nonce.map_err(|_| SealError::Library)?;
        let salt = salt.map_or_else(String::new, |salt| URL_SAFE_NO_PAD.encode(salt) + ".");
        let body = URL_SAFE_NO_PAD.encode([nonce.as_ref().as_slice(), &sealed].concat());
        Ok(format!("{prefix}.{salt}{body}"))
    }

    /// Opens what was sealed as `purpose`.
    ///
    /// # Errors
    /// It is something else, or was sealed by another key.
    pub fn open(&self, purpose: &str, text: &str) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (kind, rest) = text.trim().split_once('.').ok_or(SealError::Wrong)?;
        let (key, body) = match (kind, &self.0) {
            ("k1", Secret::Key(key)) => (key.clone(), rest),
            ("p1", Secret::Passphrase(text, known)) => {
                let (salt, body) = rest.split_once('.').ok_or(SealError::Wrong)?;
                let salt = URL_SAFE_NO_PAD.decode(salt).map_err(|_| SealError::Wrong)?;
                let salt = salt.try_into().map_err(|_| SealError::Wrong)?;
                (stretched(text, known, &salt), body)
            }
            ("k1", _) => return Err(SealError::Kind("a key file and not by a passphrase")),
            ("p1", _) => return Err(SealError::Kind("a passphrase and not by a key file")),
            _ => return Err(SealError::Wrong),
        };
        let mut all = Zeroizing::new(URL_SAFE_NO_PAD.decode(body).map_err(|_| SealError::Wrong)?);
        let (nonce, sealed) = all.split_at_mut_checked(NONCE).ok_or(SealError::Wrong)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError::Wrong)?;
        let cipher = RandomizedNonceKey::new(&AES_256_GCM, &*key).map_err(|_| SealError::Library)?;
        let opened = cipher.open_in_place(nonce, Aad::from(purpose.as_bytes()), sealed);
        Ok(Zeroizing::new(opened.map_err(|_| SealError::Wrong)?.to_vec()))
    }
}

/// The key that a passphrase makes with a salt; known ones are kept, because making one takes long on purpose.
fn stretched(text: &str, known: &Mutex<Vec<([u8; SALT], Bytes)>>, salt: &[u8; SALT]) -> Bytes {
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, key)) = known.iter().find(|(known, _)| known == salt) {
        return key.clone();
    }
    let mut key = Zeroizing::new([0; 32]);
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ITERATIONS, salt, text.as_bytes(), &mut *key);
    // A record has a few; somebody who makes up salts does not fill the memory.
    if known.len() >= 16 {
        known.remove(0);
    }
    known.push((*salt, key.clone()));
    key
}

/// Reads a file that nobody else may read.
///
/// # Errors
/// It cannot be read, or others may.
pub fn read_secret(path: &Path) -> Result<Zeroizing<String>, SealError> {
    let wrong = |error| SealError::File { path: path.into(), error };
    let mut file = fs::File::open(path).map_err(wrong)?;
    let mode = file.metadata().map_err(wrong)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(SealError::Mode { path: path.into(), mode });
    }
    let mut text = Zeroizing::new(String::new());
    Read::by_ref(&mut file).take(64 * 1024).read_to_string(&mut text).map_err(wrong)?;
    Ok(text)
}

/// Writes a new file that nobody else may read, and waits until it is on the disk.
///
/// # Errors
/// There is such a file, or it cannot be written.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_is_opened_by_its_own_key_and_for_its_own_purpose() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let sealer = Sealer::key_file(&path).unwrap();
        let sealed = sealer.seal("issuer-key", b"secret").unwrap();
        assert!(!sealed.contains("secret"));
        assert_eq!(*Sealer::key_file(&path).unwrap().open("issuer-key", &sealed).unwrap(), b"secret");
        assert!(matches!(sealer.open("root-key", &sealed), Err(SealError::Wrong)));
        assert!(matches!(Sealer::random().unwrap().open("issuer-key", &sealed), Err(SealError::Wrong)));
        assert_ne!(sealer.seal("issuer-key", b"secret").unwrap(), sealed);
        for index in 3..sealed.len() {
            let mut changed = sealed.clone().into_bytes();
            changed[index] = if changed[index] == b'A' { b'B' } else { b'A' };
            // The last character has bits that mean nothing; a text with others than zeros there is refused as well.
            assert!(sealer.open("issuer-key", std::str::from_utf8(&changed).unwrap()).is_err(), "{index}");
        }
    }

    #[test]
    fn a_key_file_is_made_once_and_is_nobody_elses() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        Sealer::key_file(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        let before = fs::read(&path).unwrap();
        Sealer::key_file(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Sealer::key_file(&path), Err(SealError::Mode { mode: 0o640, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "not a key").unwrap();
        assert!(matches!(Sealer::key_file(&path), Err(SealError::Content { .. })));
    }

    #[test]
    fn a_passphrase_opens_what_it_sealed_in_another_process() {
        assert!(matches!(Sealer::passphrase(" short "), Err(SealError::Short)));
        let sealed = Sealer::passphrase("correct horse battery").unwrap().seal("key", b"secret").unwrap();
        let other = Sealer::passphrase(" correct horse battery\n").unwrap();
        assert_eq!(*other.open("key", &sealed).unwrap(), b"secret");
        assert!(Sealer::passphrase("correct horse batterx").unwrap().open("key", &sealed).is_err());
        assert!(matches!(Sealer::random().unwrap().open("key", &sealed), Err(SealError::Kind(_))));
        for text in ["", ".", "k1", "p1.", "p1.AAAA.", "x1.AAAA"] {
            assert!(other.open("key", text).is_err(), "{text}");
        }
    }

    #[test]
    fn derived_sealers_differ_by_purpose_and_are_the_same_everywhere() {
        let one = Sealer::passphrase("correct horse battery").unwrap();
        let other = Sealer::passphrase("correct horse battery").unwrap();
        let sealed = one.derive("session", &[7; 16]).unwrap().seal("s", b"x").unwrap();
        assert!(other.derive("session", &[7; 16]).unwrap().open("s", &sealed).is_ok());
        assert!(other.derive("tokens", &[7; 16]).unwrap().open("s", &sealed).is_err());
        assert!(other.derive("session", &[8; 16]).unwrap().open("s", &sealed).is_err());
    }
}
