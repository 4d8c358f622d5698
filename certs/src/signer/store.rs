//! The keys of a node, from a directory: `NAME.pem` or `NAME.key` in PEM, or `NAME.sealed` as `postern signer seal` makes it.
//!
//! The directory is looked at every second. A key whose file is gone is gone; one whose new file cannot be used stays as
//! it was, and the problem is shown. Files of other names are left alone.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::{self, PemObject};
use rustls::sign::SigningKey;
use tracing::{info, warn};
use zeroize::{Zeroize, Zeroizing};

use super::is_key_name;
use crate::ca::seal::{SealError, Sealer, read_secret};
use crate::trust::Fingerprint;

/// More files than that are no directory of keys.
const MOST: usize = 10_000;

/// A key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the directory {} cannot be read: {error}", .path.display())]
    Directory { path: PathBuf, error: io::Error },
    #[error("{} has more than {MOST} files", .path.display())]
    Many { path: PathBuf },
    #[error(transparent)]
    File(#[from] SealError),
    #[error("it is sealed, and signer.yaml has no `seal`")]
    NoSealer,
    #[error("it holds no private key in PEM that is not encrypted: seal it by `postern signer seal`")]
    NoKey,
    #[error("it is not valid PEM: {0}")]
    Pem(String),
    #[error("its key cannot be used: {0}")]
    Key(String),
    #[error("another file of the directory has a key of this name")]
    Twice,
}

/// Seals a key, in PEM, for a file `NAME.sealed`.
///
/// # Errors
/// It is no private key that a node can use, or it cannot be sealed.
pub fn seal(sealer: &Sealer, name: &str, pem: &str) -> Result<String, KeyError> {
    Held::load(pem)?;
    Ok(sealer.seal(&purpose(name), pem.as_bytes())?)
}

/// A sealed key cannot be put in the place of another.
fn purpose(name: &str) -> String {
    format!("signer-key:{name}")
}

/// A key that signs.
#[derive(Debug)]
pub struct Held {
    key: Arc<dyn SigningKey>,
    public_key: Fingerprint,
}

impl Held {
    fn load(pem: &str) -> Result<Self, KeyError> {
        let mut der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|error| match error {
            pem::Error::NoItemsFound => KeyError::NoKey,
            error => KeyError::Pem(error.to_string()),
        })?;
        let loaded = any_supported_type(&der);
        der.zeroize();
        let key = loaded.map_err(|error| KeyError::Key(error.to_string()))?;
        let public_key = key.public_key().map(|spki| Fingerprint::of(&spki));
        let public_key =
            public_key.ok_or_else(|| KeyError::Key("it does not tell its public key".to_owned()))?;
        Ok(Self { key, public_key })
    }

    #[must_use]
    pub fn key(&self) -> &Arc<dyn SigningKey> {
        &self.key
    }

    /// The hash of its SubjectPublicKeyInfo.
    #[must_use]
    pub fn public_key(&self) -> Fingerprint {
        self.public_key
    }
}

/// What tells that a file is another one than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp([i64; 4], u64);

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        let times = [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()];
        Self(times, metadata.ino())
    }
}

/// A name, its file, and what became of it.
#[derive(Clone, Debug)]
struct Entry {
    path: PathBuf,
    stamp: Stamp,
    held: Option<Arc<Held>>,
    problem: Option<String>,
    signed: Arc<AtomicU64>,
}

/// What is shown of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    pub name: String,
    pub path: PathBuf,
    /// Of the key that signs; none if none does.
    pub public_key: Option<Fingerprint>,
    /// Why its file cannot be used.
    pub problem: Option<String>,
    /// Signatures since the start.
    pub signed: u64,
}

type Entries = BTreeMap<String, Entry>;

/// The keys of a node.
#[derive(Debug)]
pub struct KeyStore {
    directory: PathBuf,
    sealer: Option<Sealer>,
    entries: ArcSwap<Entries>,
}

impl KeyStore {
    /// Reads the directory.
    ///
    /// # Errors
    /// It cannot be read. What is wrong with single files is in [`KeyStore::shown`].
    pub fn open(directory: &Path, sealer: Option<Sealer>) -> Result<Self, KeyError> {
        let store = Self { directory: directory.into(), sealer, entries: ArcSwap::default() };
        store.reload()?;
        Ok(store)
    }

    /// The key of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<Held>> {
        self.entries.load().get(name)?.held.clone()
    }

    /// Names and public keys of those that sign.
    #[must_use]
    pub fn offered(&self) -> Vec<(String, Fingerprint)> {
        let entries = self.entries.load();
        let held = entries.iter().filter_map(|(name, entry)| Some((name, entry.held.as_ref()?)));
        held.map(|(name, held)| (name.clone(), held.public_key)).collect()
    }

    /// All names of the directory, with what is wrong.
    #[must_use]
    pub fn shown(&self) -> Vec<Shown> {
        let entries = self.entries.load();
        let shown = entries.iter().map(|(name, entry)| Shown {
            name: name.clone(),
            path: entry.path.clone(),
            public_key: entry.held.as_ref().map(|held| held.public_key),
            problem: entry.problem.clone(),
            signed: entry.signed.load(Ordering::Relaxed),
        });
        shown.collect()
    }

    pub(super) fn count(&self, name: &str) {
        if let Some(entry) = self.entries.load().get(name) {
            entry.signed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Reads what has changed in the directory. Blocks.
    ///
    /// # Errors
    /// It cannot be read; all keys stay as they were.
    pub fn reload(&self) -> Result<(), KeyError> {
        let before = self.entries.load_full();
        let mut after = Entries::new();
        for (name, path, metadata) in self.files()? {
            let stamp = Stamp::of(&metadata);
            let known = before.get(&name);
            let entry = match known {
                _ if after.contains_key(&name) => {
                    if let Some(first) = after.get_mut(&name) {
                        first.problem = Some(KeyError::Twice.to_string());
                    }
                    continue;
                }
                Some(known) if known.stamp == stamp && known.path == path => {
                    let twice = known.problem == Some(KeyError::Twice.to_string());
                    Entry { problem: known.problem.clone().filter(|_| !twice), ..known.clone() }
                }
                known => self.read(&name, path, stamp, known),
            };
            after.insert(name, entry);
        }
        for name in before.keys().filter(|name| !after.contains_key(*name)) {
            info!(key = %name, "the key is gone");
        }
        self.entries.store(Arc::new(after));
        Ok(())
    }

    /// Files that should hold keys, by name.
    fn files(&self) -> Result<Vec<(String, PathBuf, Metadata)>, KeyError> {
        let wrong = |error| KeyError::Directory { path: self.directory.clone(), error };
        let mut files = Vec::new();
        for file in fs::read_dir(&self.directory).map_err(wrong)? {
            let path = file.map_err(wrong)?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).filter(|stem| is_key_name(stem));
            let kind = path.extension().and_then(|kind| kind.to_str());
            let (Some(name), Some("pem" | "key" | "sealed")) = (stem, kind) else { continue };
            // Gone since the directory was read, or no file.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_file() {
                files.push((name.to_owned(), path, metadata));
            }
            if files.len() > MOST {
                return Err(KeyError::Many { path: self.directory.clone() });
            }
        }
        files.sort_by(|a, b| a.1.cmp(&b.1));
        Ok(files)
    }

    fn read(&self, name: &str, path: PathBuf, stamp: Stamp, known: Option<&Entry>) -> Entry {
        let signed = known.map_or_else(Arc::default, |known| Arc::clone(&known.signed));
        match self.load(name, &path) {
            Ok(held) => {
                info!(key = %name, public_key = %held.public_key, "the key signs");
                Entry { path, stamp, held: Some(Arc::new(held)), problem: None, signed }
            }
            Err(error) => {
                warn!(key = %name, path = %path.display(), %error, "the key cannot be used");
                let held = known.and_then(|known| known.held.clone());
                Entry { path, stamp, held, problem: Some(error.to_string()), signed }
            }
        }
    }

    fn load(&self, name: &str, path: &Path) -> Result<Held, KeyError> {
        let text = read_secret(path)?;
        if path.extension().is_none_or(|kind| kind != "sealed") {
            return Held::load(&text);
        }
        let opened = self.sealer.as_ref().ok_or(KeyError::NoSealer)?.open(&purpose(name), &text)?;
        let pem = Zeroizing::new(std::str::from_utf8(&opened).map_err(|_| KeyError::NoKey)?.to_owned());
        Held::load(&pem)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};

    use super::*;

    /// Replaces the file, as those who do it well do.
    fn put(directory: &Path, name: &str, text: &str) {
        let beside = directory.join(".new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        fs::rename(&beside, directory.join(name)).unwrap();
    }

    fn ecdsa() -> KeyPair {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
    }

    fn public(key: &KeyPair) -> Fingerprint {
        use rcgen::PublicKeyData;
        Fingerprint::of(&key.subject_public_key_info())
    }

    #[test]
    fn keys_come_and_go_with_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (ecdsa(), KeyPair::generate_for(&PKCS_ED25519).unwrap());
        put(dir.path(), "shop.pem", &first.serialize_pem());
        put(dir.path(), "README", "nothing to see");
        put(dir.path(), ".hidden.pem", &first.serialize_pem());
        let store = KeyStore::open(dir.path(), None).unwrap();
        assert_eq!(store.offered(), [("shop".to_owned(), public(&first))]);

        put(dir.path(), "shop.pem", &second.serialize_pem());
        put(dir.path(), "other.key", &first.serialize_pem());
        store.reload().unwrap();
        let both = [("other".to_owned(), public(&first)), ("shop".to_owned(), public(&second))];
        assert_eq!(store.offered(), both);

        put(dir.path(), "shop.pem", "not a key");
        fs::remove_file(dir.path().join("other.key")).unwrap();
        store.reload().unwrap();
        assert_eq!(store.offered(), [("shop".to_owned(), public(&second))], "what was good stays");
        assert!(store.shown()[0].problem.as_deref().unwrap().contains("no private key"));

        put(dir.path(), "shop.pem", &first.serialize_pem());
        store.reload().unwrap();
        assert_eq!((store.offered()[0].1, store.shown()[0].problem.clone()), (public(&first), None));

        put(dir.path(), "shop.key", &second.serialize_pem());
        store.reload().unwrap();
        assert_eq!(store.shown().len(), 1);
        assert!(store.shown()[0].problem.as_deref().unwrap().contains("another file"));
        fs::remove_file(dir.path().join("shop.key")).unwrap();
        store.reload().unwrap();
        assert_eq!(store.shown()[0].problem, None);
    }

    #[test]
    fn a_key_that_others_may_read_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "open.pem", &ecdsa().serialize_pem());
        fs::set_permissions(dir.path().join("open.pem"), fs::Permissions::from_mode(0o644)).unwrap();
        let store = KeyStore::open(dir.path(), None).unwrap();
        assert!(store.get("open").is_none());
        assert!(store.shown()[0].problem.as_deref().unwrap().contains("chmod 600"));
    }

    #[test]
    fn a_sealed_key_is_opened_under_its_own_name_alone() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let key = ecdsa();
        let sealer = || Sealer::key_file(&other.path().join("seal")).unwrap();
        let sealed = seal(&sealer(), "shop", &key.serialize_pem()).unwrap();
        assert!(!sealed.contains("PRIVATE"));
        put(dir.path(), "shop.sealed", &sealed);
        put(dir.path(), "bank.sealed", &sealed);
        let store = KeyStore::open(dir.path(), Some(sealer())).unwrap();
        assert_eq!(store.offered(), [("shop".to_owned(), public(&key))]);
        let without = KeyStore::open(dir.path(), None).unwrap();
        assert!(without.shown().iter().all(|shown| shown.problem.as_deref().unwrap().contains("`seal`")));
        assert!(matches!(seal(&sealer(), "shop", "no key"), Err(KeyError::NoKey)));
    }
}
