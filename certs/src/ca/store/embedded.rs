//! The store in a folder of the authority's own machine: a file for each value.
//!
//! Files and not a database: there are a few small values, a person can look at them, copy them and see that they are whole,
//! and a damaged one does not take the others with it. A change is written beside its place, synced, and renamed under a
//! lock that all processes of the machine share; the value before it is kept as `NAME.value.before`. The first line of a
//! file has its version and the SHA-256 of the rest: what does not fit is refused and left alone.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::{Store, StoreError, Stored, SwapError, Version};
use crate::trust::Fingerprint;

/// What the first line begins with.
const MAGIC: &str = "postern-ca-store 1";
/// How often a file is looked at that another process may change.
const PACE: Duration = Duration::from_millis(500);
/// Held while something is changed.
const LOCK: &str = "store.lock";

/// A folder of values.
pub struct Embedded {
    inner: Arc<Inner>,
    changes: watch::Sender<u64>,
}

struct Inner {
    folder: PathBuf,
    name: String,
}

impl Embedded {
    /// The store in that folder, which is made where there is none; only its owner may look into it. Blocks.
    ///
    /// # Errors
    /// The folder cannot be made or written.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let inner = Inner { folder: folder.to_owned(), name: folder.display().to_string() };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|error| inner.unavailable("the folder", &error))?;
        drop(inner.lock()?);
        Ok(Self { inner: Arc::new(inner), changes: watch::Sender::new(0) })
    }

    async fn blocking<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&inner)).await.unwrap_or_else(|_| {
            let (store, reason) = (self.inner.name.clone(), "its thread has ended".to_owned());
            Err(StoreError::Unavailable { store, reason }.into())
        })
    }

    fn told(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Inner {
    fn unavailable(&self, what: &str, error: &io::Error) -> StoreError {
        StoreError::Unavailable { store: self.name.clone(), reason: format!("{what}: {error}") }
    }

    /// The lock ends with the process that holds it.
    fn lock(&self) -> Result<File, StoreError> {
        let lock = || {
            let path = self.folder.join(LOCK);
            let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
            file.lock()?;
            Ok(file)
        };
        lock().map_err(|error| self.unavailable(LOCK, &error))
    }

    /// Slashes are in names and not in those of files.
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}.value", name.replace('%', "%25").replace('/', "%2f")))
    }

    fn name_of(file: &str) -> Option<String> {
        Some(file.strip_suffix(".value")?.replace("%2f", "/").replace("%25", "%"))
    }

    fn read(&self, path: &Path) -> Result<Option<Stored>, StoreError> {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        match fs::read(path) {
            Ok(bytes) => parse(&bytes).map(Some).map_err(|reason| StoreError::Damaged {
                store: self.name.clone(),
                reason: format!(
                    "{file} is damaged ({reason}) and was left as it is: copy {file}.before over it, which is \
                     the value before the last change, or restore a copy of the folder"
                ),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.unavailable(&file, &error)),
        }
    }

    fn write(&self, path: &Path, version: Version, value: &[u8]) -> io::Result<()> {
        let new = path.with_extension("new");
        absent(fs::remove_file(&new))?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        writeln!(file, "{MAGIC} {} {}", version.0, Fingerprint::of(value))?;
        file.write_all(value)?;
        file.sync_all()?;
        if path.exists() {
            let link = path.with_extension("link");
            absent(fs::remove_file(&link))?;
            // The place is never empty, not even for a moment.
            fs::hard_link(path, &link)?;
            fs::rename(&link, path.with_extension("value.before"))?;
        }
        fs::rename(&new, path)?;
        File::open(&self.folder)?.sync_all()
    }

    fn swap(&self, name: &str, seen: Option<Version>, value: &[u8]) -> Result<Version, SwapError> {
        let _lock = self.lock()?;
        let path = self.file(name);
        if self.read(&path)?.map(|stored| stored.version) != seen {
            return Err(SwapError::Conflict);
        }
        let version = Version(seen.map_or(1, |seen| seen.0 + 1));
        self.write(&path, version, value).map_err(|error| self.unavailable(name, &error))?;
        Ok(version)
    }

    fn remove(&self, name: &str, seen: Version) -> Result<(), SwapError> {
        let _lock = self.lock()?;
        let path = self.file(name);
        if self.read(&path)?.map(|stored| stored.version) != Some(seen) {
            return Err(SwapError::Conflict);
        }
        let removed = fs::remove_file(&path)
            .and_then(|()| absent(fs::remove_file(path.with_extension("value.before"))))
            .and_then(|()| File::open(&self.folder)?.sync_all());
        Ok(removed.map_err(|error| self.unavailable(name, &error))?)
    }

    fn list(&self, start: &str) -> Result<Vec<(String, Stored)>, StoreError> {
        let unreadable = |error: io::Error| self.unavailable("the folder", &error);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let Some(name) = entry.file_name().to_str().and_then(Self::name_of) else { continue };
            if name.starts_with(start)
                && let Some(stored) = self.read(&entry.path())?
            {
                found.push((name, stored));
            }
        }
        found.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(found)
    }
}

/// A file that was not there is as good as one that was removed.
fn absent(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// What a file holds.
fn parse(bytes: &[u8]) -> Result<Stored, String> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no first line")?;
    let (head, value) = bytes.split_at(end);
    let value = value.get(1..).unwrap_or_default();
    let head = std::str::from_utf8(head).map_err(|_| "its first line is no text")?;
    let rest = head.strip_prefix(MAGIC).ok_or_else(|| format!("its first line is not `{MAGIC} ...`"))?;
    let (version, hash) = rest.trim().split_once(' ').ok_or("its first line is cut off")?;
    let version = version.parse().map_err(|_| "its version is no number")?;
    if Fingerprint::of(value).to_string() != hash {
        return Err("its content is not what was written".to_owned());
    }
    Ok(Stored { version: Version(version), value: value.to_vec() })
}

impl Store for Embedded {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        let name = name.to_owned();
        Box::pin(self.blocking(move |inner| inner.read(&inner.file(&name))))
    }

    fn list<'a>(&'a self, start: &'a str) -> BoxFuture<'a, Result<Vec<(String, Stored)>, StoreError>> {
        let start = start.to_owned();
        Box::pin(self.blocking(move |inner| inner.list(&start)))
    }

    fn swap<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        value: &'a [u8],
    ) -> BoxFuture<'a, Result<Version, SwapError>> {
        let (name, value) = (name.to_owned(), value.to_vec());
        Box::pin(async move {
            let version = self.blocking(move |inner| inner.swap(&name, seen, &value)).await?;
            self.told();
            Ok(version)
        })
    }

    fn remove<'a>(&'a self, name: &'a str, seen: Version) -> BoxFuture<'a, Result<(), SwapError>> {
        let name = name.to_owned();
        Box::pin(async move {
            self.blocking(move |inner| inner.remove(&name, seen)).await?;
            self.told();
            Ok(())
        })
    }

    fn changed<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        at_most: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let mut changes = self.changes.subscribe();
            let wait = async {
                loop {
                    let now = self.load(name).await?;
                    if now.map(|stored| stored.version) != seen {
                        return Ok(());
                    }
                    let _ = tokio::time::timeout(PACE, changes.changed()).await;
                }
            };
            tokio::time::timeout(at_most, wait).await.unwrap_or(Ok(()))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[tokio::test]
    async fn a_damaged_file_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(folder.path()).unwrap();
        let first = store.swap("record", None, b"one").await.unwrap();
        let second = store.swap("record", Some(first), b"two").await.unwrap();
        let path = folder.path().join("record.value");
        for damage in [&b"postern-ca-store 1 2 00\ntwo"[..], b"", b"{}", b"postern-ca-store 1\n", b"\xff\n"] {
            fs::write(&path, damage).unwrap();
            let error = store.load("record").await.unwrap_err();
            assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
            assert!(error.to_string().contains("record.value.before"), "{error}");
            assert!(store.swap("record", Some(second), b"three").await.is_err());
            assert_eq!(fs::read(&path).unwrap(), damage);
        }
        fs::copy(folder.path().join("record.value.before"), &path).unwrap();
        let stored = store.load("record").await.unwrap().unwrap();
        assert_eq!(stored, Stored { version: first, value: b"one".to_vec() });
    }

    #[tokio::test]
    async fn nobody_else_may_read_it() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("ca");
        let store = Embedded::open(&inside).unwrap();
        store.swap("record", None, b"one").await.unwrap();
        assert_eq!(fs::metadata(&inside).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(inside.join("record.value")).unwrap().mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn what_a_crash_left_beside_does_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(folder.path()).unwrap();
        let first = store.swap("record", None, b"one").await.unwrap();
        fs::write(folder.path().join("record.new"), b"half").unwrap();
        fs::write(folder.path().join("record.link"), b"half").unwrap();
        store.swap("record", Some(first), b"two").await.unwrap();
        assert_eq!(store.load("record").await.unwrap().unwrap().value, b"two");
        assert_eq!(store.list("").await.unwrap().len(), 1);
    }
}
