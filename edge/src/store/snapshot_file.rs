//! The last configuration that was good, on disk beside the store.
//!
//! Every provider keeps one, so that the process starts and serves while its store is away. A file is
//! written whole beside the old one and renamed over it, readable by the owner alone (it holds keys), and
//! ends with a checksum; one that is damaged, of another format or of another provider is ignored with a
//! warning. Its modification time says when its content was last known to be current.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use config::ResourceKey;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use super::{Stored, prepare_data_dir, warn_if_open};

/// The first line. The number changes with the format.
const MAGIC: &[u8] = b"postern snapshot 1\n";
/// `sha256 `, 64 digits and a line end.
const TRAILER: usize = 7 + 64 + 1;
/// A larger file is not one of ours.
const MAX_FILE: u64 = 4 << 30;
/// How long changes are collected before a write.
const DELAY: Duration = Duration::from_secs(1);
/// How often an unchanged file is marked as current.
const CONFIRM: Duration = Duration::from_secs(30);

/// A set of objects at one revision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Saved {
    /// The store's revision.
    pub revision: u64,
    /// The objects.
    pub items: Vec<Stored>,
    /// What else the provider needs to go on; `null` for most.
    pub extra: Value,
}

#[derive(Serialize, Deserialize)]
struct Header {
    provider: String,
    revision: u64,
    #[serde(default)]
    extra: Value,
}

/// Why there is no snapshot to start from.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The content is damaged or of another version.
    #[error("{0}")]
    Damaged(&'static str),
    /// The content belongs to another store.
    #[error("it was kept for {0}")]
    OtherProvider(String),
}

/// The file of one provider.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    path: PathBuf,
    provider: String,
}

impl SnapshotFile {
    /// The file in `data_dir` for a provider: `kind` names the file, `source` (a path, a prefix) tells two
    /// stores of the kind apart.
    #[must_use]
    pub fn new(data_dir: &Path, kind: &str, source: &str) -> SnapshotFile {
        warn_if_open(data_dir);
        SnapshotFile {
            path: data_dir.join(format!("last-good.{kind}")),
            provider: format!("{kind} {source}"),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Write `saved` in place of what was there. Blocks; the old file stays whole until the new one is.
    ///
    /// # Errors
    /// If the directory cannot be written. The old file is still there.
    pub fn write(&self, saved: &Saved) -> io::Result<()> {
        self.write_with(saved.revision, &saved.extra, |objects| {
            for Stored { key, value, created_index, modified_index } in &saved.items {
                objects.add(key, *created_index, *modified_index, value)?;
            }
            Ok(())
        })
    }

    /// As [`SnapshotFile::write`], the objects being handed over one by one by `fill`.
    ///
    /// # Errors
    /// As [`SnapshotFile::write`], and those of `fill`.
    pub fn write_with(
        &self,
        revision: u64,
        extra: &Value,
        fill: impl FnOnce(&mut Sink) -> io::Result<()>,
    ) -> io::Result<()> {
        if let Some(directory) = self.path.parent() {
            prepare_data_dir(directory)?;
        }
        // A name of its own for each writer: one of them must not move away what another still writes.
        static WRITERS: AtomicU64 = AtomicU64::new(0);
        let new = self.path.with_extension(format!("new{}", WRITERS.fetch_add(1, Ordering::Relaxed) % 8));
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        let mut objects = Sink { out: BufWriter::with_capacity(1 << 18, file), sum: Sha256::new() };
        objects.write_all(MAGIC)?;
        let header = Header { provider: self.provider.clone(), revision, extra: extra.clone() };
        serde_json::to_writer(&mut objects, &header)?;
        objects.write_all(b"\n")?;
        fill(&mut objects)?;
        let Sink { out, sum } = objects;
        let mut file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.write_all(trailer(&sum.finalize()).as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        if let Some(directory) = self.path.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    }

    /// What was kept, and when it was last current. `None`: nothing was ever kept. Blocks.
    ///
    /// # Errors
    /// If there is a file that cannot be used.
    pub fn read(&self) -> Result<Option<(Saved, SystemTime)>, SnapshotError> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let metadata = file.metadata()?;
        if metadata.len() > MAX_FILE {
            return Err(SnapshotError::Damaged("it is too large to be a snapshot"));
        }
        let mut content = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
        file.read_to_end(&mut content)?;
        let saved = self.parse(Bytes::from(content))?;
        Ok(Some((saved, metadata.modified()?)))
    }

    /// As [`SnapshotFile::read`], a file that cannot be used being logged and ignored.
    #[must_use]
    pub fn load(&self) -> Option<(Saved, SystemTime)> {
        self.read().unwrap_or_else(|error| {
            tracing::warn!(path = %self.path.display(), %error, "last-good snapshot ignored");
            None
        })
    }

    /// Say that the content is current now, without writing it again. Blocks.
    pub fn confirm(&self) {
        let now =
            OpenOptions::new().write(true).open(&self.path).and_then(|f| f.set_modified(SystemTime::now()));
        if let Err(error) = now {
            tracing::debug!(path = %self.path.display(), %error, "snapshot not marked as current");
        }
    }

    fn parse(&self, content: Bytes) -> Result<Saved, SnapshotError> {
        const SHORT: SnapshotError = SnapshotError::Damaged("it ends too early");
        if !content.starts_with(MAGIC) {
            return Err(SnapshotError::Damaged("it is not a snapshot of this format"));
        }
        let end = content.len().checked_sub(TRAILER).ok_or(SHORT)?;
        let (body, sum) = content.split_at_checked(end).ok_or(SHORT)?;
        if trailer(&Sha256::digest(body)).as_bytes() != sum {
            return Err(SnapshotError::Damaged("the checksum does not fit"));
        }
        let mut rest = content.slice(MAGIC.len()..end);
        let header: Header = serde_json::from_slice(&line(&mut rest).ok_or(SHORT)?)
            .map_err(|_| SnapshotError::Damaged("the header cannot be read"))?;
        if header.provider != self.provider {
            return Err(SnapshotError::OtherProvider(header.provider));
        }
        let mut items = Vec::new();
        while !rest.is_empty() {
            const BAD: SnapshotError = SnapshotError::Damaged("an object cannot be read");
            let head = line(&mut rest).ok_or(BAD)?;
            let mut words = std::str::from_utf8(&head).map_err(|_| BAD)?.split(' ');
            let key = words.next().and_then(ResourceKey::from_path).ok_or(BAD)?;
            let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).ok_or(BAD);
            let (created_index, modified_index, size) = (number()?, number()?, number()?);
            let size = usize::try_from(size).map_err(|_| BAD)?;
            if rest.len() <= size {
                return Err(BAD);
            }
            let value = rest.split_to(size);
            rest = rest.slice(1..);
            items.push(Stored { key, value, created_index, modified_index });
        }
        Ok(Saved { revision: header.revision, items, extra: header.extra })
    }
}

/// Takes one line off the front, without its end.
fn line(rest: &mut Bytes) -> Option<Bytes> {
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    let line = rest.split_to(end);
    *rest = rest.slice(1..);
    Some(line)
}

fn trailer(sum: &[u8]) -> String {
    let mut text = String::with_capacity(TRAILER);
    text.push_str("sha256 ");
    for byte in sum {
        text.push_str(&format!("{byte:02x}"));
    }
    text.push('\n');
    text
}

/// The objects of a snapshot that is being written.
pub struct Sink {
    out: BufWriter<File>,
    sum: Sha256,
}

impl Sink {
    /// Add one: its key as it prints, its indices and its JSON.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn add(
        &mut self,
        key: impl std::fmt::Display,
        created_index: u64,
        modified_index: u64,
        value: &[u8],
    ) -> io::Result<()> {
        writeln!(self, "{key} {created_index} {modified_index} {}", value.len())?;
        self.write_all(value)?;
        self.write_all(b"\n")
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write_all(bytes)?;
        self.sum.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes the current set into the file. Called on a blocking thread; `None`: nothing to keep yet.
pub type Source = Arc<dyn Fn(&SnapshotFile) -> Option<io::Result<()>> + Send + Sync>;

/// Keeps a snapshot file up to date: at once after a change, but not more than once a second, and less often when
/// writing takes long.
pub struct Keeper {
    wake: Arc<Wake>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Wake {
    changed: Notify,
    stale: std::sync::atomic::AtomicBool,
}

impl Keeper {
    /// Start to keep `file`. Must be called inside a tokio runtime; the task ends with the keeper.
    #[must_use]
    pub fn start(file: SnapshotFile, source: Source) -> Keeper {
        let wake = Arc::new(Wake::default());
        let task = tokio::spawn(keep(file, source, Arc::clone(&wake)));
        Keeper { wake, task }
    }

    /// There is something new to keep.
    pub fn changed(&self) {
        self.wake.changed.notify_one();
    }

    /// Whether the store is believed now: while it is not, the file is not marked as current.
    pub fn set_stale(&self, stale: bool) {
        self.wake.stale.store(stale, std::sync::atomic::Ordering::Relaxed);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(file: SnapshotFile, source: Source, wake: Arc<Wake>) {
    let mut next = tokio::time::Instant::now();
    let mut kept = false;
    loop {
        if tokio::time::timeout(CONFIRM, wake.changed.notified()).await.is_err() {
            if kept && !wake.stale.load(std::sync::atomic::Ordering::Relaxed) {
                let file = file.clone();
                let _ = tokio::task::spawn_blocking(move || file.confirm()).await;
            }
            continue;
        }
        tokio::time::sleep_until(next).await;
        let started = Instant::now();
        let written = {
            let (file, source) = (file.clone(), Arc::clone(&source));
            tokio::task::spawn_blocking(move || source(&file)).await
        };
        match written {
            Ok(Some(Ok(()))) => kept = true,
            Ok(Some(Err(error))) => {
                tracing::warn!(path = %file.path.display(), %error, "last-good snapshot not written");
                // What did not get to the disk is still to be kept.
                wake.changed.notify_one();
            }
            Ok(None) | Err(_) => {}
        }
        // At most a twentieth of the time goes into snapshots.
        next = tokio::time::Instant::now() + (started.elapsed() * 20).max(DELAY);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use std::os::unix::fs::PermissionsExt;

    use config::Kind;
    use serde_json::json;

    use super::*;

    fn saved() -> Saved {
        let item = |kind, id: &str, value: &str| Stored {
            key: ResourceKey::new(kind, id),
            value: Bytes::copy_from_slice(value.as_bytes()),
            created_index: 3,
            modified_index: 4,
        };
        Saved {
            revision: 17,
            items: vec![
                item(Kind::Route, "1", "{\"uri\": \"/\",\n \"desc\": \"two lines\"}"),
                item(Kind::Credential, "jack/credentials/a", "{}"),
                item(Kind::Proto, "p", ""),
            ],
            extra: json!({"digest": "x"}),
        }
    }

    #[test]
    fn what_is_written_reads_back_and_only_the_owner_may_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(directory.path(), "etcd", "/apisix");
        assert!(file.read().unwrap().is_none());
        file.write(&Saved::default()).unwrap();
        file.write(&saved()).unwrap();
        let (read, when) = file.read().unwrap().unwrap();
        assert_eq!(read, saved());
        assert!(when.elapsed().unwrap() < Duration::from_secs(60));
        assert_eq!(file.path().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn any_damage_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(directory.path(), "etcd", "/apisix");
        file.write(&saved()).unwrap();
        let good = fs::read(file.path()).unwrap();
        for length in 0..good.len() {
            fs::write(file.path(), &good[..length]).unwrap();
            assert!(file.read().is_err(), "cut to {length}");
        }
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 0x20;
            fs::write(file.path(), bad).unwrap();
            assert!(file.read().is_err(), "flipped at {position}");
        }
        assert!(file.load().is_none());
    }

    #[test]
    fn the_snapshot_of_another_store_is_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        SnapshotFile::new(directory.path(), "etcd", "/apisix").write(&saved()).unwrap();
        let other = SnapshotFile::new(directory.path(), "etcd", "/other");
        assert!(matches!(other.read(), Err(SnapshotError::OtherProvider(_))));
    }

    #[tokio::test]
    async fn a_keeper_writes_after_a_change() {
        let directory = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(directory.path(), "etcd", "/apisix");
        let keeper = Keeper::start(file.clone(), Arc::new(|file: &SnapshotFile| Some(file.write(&saved()))));
        keeper.changed();
        let deadline = Instant::now() + Duration::from_secs(20);
        while file.read().unwrap().is_none() {
            assert!(Instant::now() < deadline, "not written");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
