//! Answers on disk: a file each, written aside and moved into place, and an index of them in memory.
//!
//! All of it runs on the blocking pool of the control side. Bytes are bounded: the least recently used files go. A start
//! takes over what it finds, without opening it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use tokio::runtime::Handle;

use super::entry::{Key, Stored};

/// Answers on disk.
pub struct Disk {
    folder: Arc<Path>,
    index: Cache<Key, Arc<Placed>>,
    /// Makes the names of files distinct, also from those of an earlier run.
    next: AtomicU64,
    limit: u64,
}

/// Where the file is.
struct Placed {
    name: String,
    bytes: u32,
}

/// The folder in which files are written before they are moved.
const ASIDE: &str = "aside";

impl Disk {
    /// The answers in `folder`, at most `limit` bytes of them. Files found there are indexed in the background.
    ///
    /// # Errors
    /// The folder cannot be made or written, or others may write it too.
    pub fn open(folder: &Path, limit: u64, control: &Handle) -> io::Result<Arc<Self>> {
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(folder)?;
        let found = std::fs::symlink_metadata(folder)?;
        // A folder under /tmp may have been put there by somebody else, to put answers into it.
        if !found.is_dir() || found.mode() & 0o022 != 0 {
            return Err(io::Error::other("it is not a folder that its owner alone may write"));
        }
        let aside = folder.join(ASIDE);
        make(&aside)?;
        if std::fs::symlink_metadata(&aside)?.uid() != found.uid() {
            return Err(io::Error::other("it belongs to another user"));
        }
        let folder: Arc<Path> = folder.into();
        let (files, remover) = (folder.clone(), control.clone());
        let index = Cache::builder()
            .max_capacity(limit)
            .weigher(|_, placed: &Arc<Placed>| placed.bytes)
            .eviction_policy(EvictionPolicy::lru())
            .eviction_listener(move |_, placed: Arc<Placed>, _| {
                let path = files.join(&placed.name);
                remover.spawn_blocking(move || std::fs::remove_file(path));
            })
            .build();
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let next = AtomicU64::new(u64::try_from(started.as_micros()).unwrap_or_default());
        let disk = Arc::new(Self { folder, index, next, limit });
        let scanned = disk.clone();
        control.spawn_blocking(move || scanned.scan());
        Ok(disk)
    }

    /// Takes over what an earlier run has left.
    fn scan(&self) {
        let mut found = Vec::new();
        for folder in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let part = folder.file_name().to_string_lossy().into_owned();
            for file in std::fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                let Ok(about) = file.metadata() else { continue };
                let name = format!("{part}/{}", file.file_name().to_string_lossy());
                match key_of(&name) {
                    Some(key) => found.push((about.modified().unwrap_or(UNIX_EPOCH), key, name, about.len())),
                    // Written by a process that ended meanwhile. One that is being written now is younger than this.
                    None if part == ASIDE && is_old(&about) => {
                        let _ = std::fs::remove_file(file.path());
                    }
                    None => {}
                }
            }
        }
        found.sort();
        for (_, key, name, bytes) in found {
            // What was written since the start is newer.
            if self.index.get(&key).is_none_or(|placed| placed.name < name) {
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                self.index.insert(key, Arc::new(Placed { name, bytes }));
            }
        }
    }

    /// Whether there may be a file for `key`.
    pub fn has(&self, key: &Key) -> bool {
        self.index.contains_key(key)
    }

    /// Reads. Blocks.
    pub fn read(&self, key: &Key) -> Option<Stored> {
        let placed = self.index.get(key)?;
        let stored = std::fs::read(self.folder.join(&placed.name)).ok().and_then(|file| Stored::from_file(&file));
        if stored.is_none() {
            self.index.invalidate(key);
        }
        stored
    }

    /// Writes. Blocks.
    ///
    /// # Errors
    /// The disk is full, or the folder is gone.
    pub fn write(&self, key: &Key, stored: &Stored) -> io::Result<()> {
        let file = stored.to_file();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let hex = hex(key);
        let part = hex.get(..2).unwrap_or_default();
        let name = format!("{part}/{hex}-{number:020}");
        let aside = self.folder.join(ASIDE).join(format!("{hex}-{number:020}"));
        let written = write_new(&aside, &file).and_then(|()| {
            let part = self.folder.join(part);
            match DirBuilder::new().mode(0o700).create(&part) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => std::fs::rename(&aside, self.folder.join(&name)),
            }
        });
        if written.is_err() {
            let _ = std::fs::remove_file(&aside);
        }
        written?;
        let bytes = u32::try_from(file.len()).unwrap_or(u32::MAX);
        self.index.insert(*key, Arc::new(Placed { name, bytes }));
        Ok(())
    }

    /// Forgets an answer; its file goes soon after.
    pub fn remove(&self, key: &Key) {
        self.index.invalidate(key);
    }

    /// Forgets everything. Blocks.
    pub fn clear(&self) {
        self.index.invalidate_all();
        self.index.run_pending_tasks();
        // Files go with their entries, but nothing may come back after a restart.
        for folder in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let part = folder.file_name().to_string_lossy().into_owned();
            for file in std::fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                let name = format!("{part}/{}", file.file_name().to_string_lossy());
                let kept = key_of(&name)
                    .is_none_or(|key| self.index.get(&key).is_some_and(|placed| placed.name == name));
                if !kept {
                    let _ = std::fs::remove_file(file.path());
                }
            }
        }
    }

    /// Files, bytes, and the most bytes.
    pub fn usage(&self) -> (u64, u64, u64) {
        self.index.run_pending_tasks();
        (self.index.entry_count(), self.index.weighted_size(), self.limit)
    }
}

fn is_old(about: &std::fs::Metadata) -> bool {
    about.modified().ok().and_then(|at| at.elapsed().ok()).is_some_and(|age| age.as_secs() > 60)
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)
}

fn hex(key: &Key) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(64);
    for byte in key {
        let _ = write!(out, "{byte:02x}");
    }
    out
}

/// The key in the name of a file, `ab/abcd...-NUMBER`.
fn key_of(name: &str) -> Option<Key> {
    let (part, file) = name.split_once('/')?;
    let (hex, number) = file.split_once('-')?;
    if !hex.starts_with(part) || hex.len() != 64 || number.len() != 20 {
        return None;
    }
    let mut key = Key::default();
    for (byte, at) in key.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()?;
    }
    Some(key)
}

/// Where the files of a zone are, for messages.
pub fn told(path: &Path) -> String {
    PathBuf::from(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use http::{HeaderMap, StatusCode};

    use super::super::entry::Entry;
    use super::*;

    fn answer(length: usize) -> Stored {
        Stored::Answer(Entry {
            status: StatusCode::OK,
            headers: HeaderMap::new(),
            body: Bytes::from(vec![b'x'; length]),
            stored: SystemTime::now(),
            ttl: Duration::from_secs(60),
        })
    }

    fn files(folder: &Path) -> usize {
        std::fs::read_dir(folder)
            .unwrap()
            .flat_map(|part| std::fs::read_dir(part.unwrap().path()).unwrap())
            .count()
    }

    async fn until(what: &str, holds: impl Fn() -> bool) {
        let since = std::time::Instant::now();
        while !holds() {
            assert!(since.elapsed() < Duration::from_secs(20), "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn answers_are_there_after_a_restart_and_gone_after_a_purge() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("zone");
        let disk = Disk::open(&path, 1 << 20, &Handle::current()).unwrap();
        for n in 0..4 {
            disk.write(&[n; 32], &answer(100)).unwrap();
        }
        disk.write(&[0; 32], &answer(200)).unwrap();
        let again = Disk::open(&path, 1 << 20, &Handle::current()).unwrap();
        until("the files are found", || again.has(&[0; 32]) && again.has(&[3; 32])).await;
        let Some(Stored::Answer(entry)) = again.read(&[0; 32]) else { panic!("an answer") };
        assert_eq!(entry.body.len(), 200, "the newest counts");
        again.remove(&[1; 32]);
        assert!(again.read(&[1; 32]).is_none());
        again.clear();
        assert!(!again.has(&[0; 32]));
        until("no file is left", || files(&path) == 0).await;
        let mode = std::fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[tokio::test]
    async fn files_take_no_more_room_than_they_may() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::open(folder.path(), 50_000, &Handle::current()).unwrap();
        for n in 0..100_u8 {
            disk.write(&[n; 32], &answer(5_000)).unwrap();
        }
        disk.index.run_pending_tasks();
        assert!(disk.usage().1 <= 50_000);
        until("the files of old answers are gone", || files(folder.path()) <= 10).await;
        assert!(disk.read(&[99; 32]).is_some(), "the newest is there");
    }

    #[tokio::test]
    async fn a_folder_that_others_may_write_is_refused_and_damaged_files_are_misses() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("open");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Disk::open(&path, 1000, &Handle::current()).is_err());
        std::os::unix::fs::symlink(folder.path(), folder.path().join("link")).unwrap();
        assert!(Disk::open(&folder.path().join("link"), 1000, &Handle::current()).is_err());

        let disk = Disk::open(&folder.path().join("own"), 1 << 20, &Handle::current()).unwrap();
        disk.write(&[1; 32], &answer(10)).unwrap();
        let name = disk.index.get(&[1; 32]).unwrap().name.clone();
        std::fs::write(folder.path().join("own").join(name), b"damaged").unwrap();
        assert!(disk.read(&[1; 32]).is_none());
        assert!(!disk.has(&[1; 32]));
    }
}
