//! Where the configuration lives: one trait, and one file for each provider.
//!
//! A store answers the Admin API and feeds the compile loop. It holds JSON as it was accepted and knows
//! nothing of what the objects mean: checks happen before a write, and a bad object that is already there is
//! set aside by the graph. Every store keeps a last-good snapshot on disk, so that the process starts and
//! serves while the store is away. Nothing here runs on a worker.

use std::fs::{self, DirBuilder, OpenOptions};
use std::future::Future;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use config::graph::Change;
use config::{Kind, ResourceKey};
use serde_json::Value;
use tokio::sync::mpsc;

pub mod embedded;
pub mod encryption;
pub mod etcd;
mod feed;
pub mod file;
pub mod revision;
pub mod snapshot_file;
pub mod standalone;

pub use feed::Feed;
pub use revision::Revision;

/// A boxed future that may move between threads of the control runtime.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// How many events may wait for the compile loop. Changes that do not fit are merged by key, never lost.
pub const EVENT_CAPACITY: usize = 16;

/// What a store tells whoever compiles the configuration.
#[derive(Debug)]
pub enum StoreEvent {
    /// Everything there is. Objects that are not in it are gone.
    Snapshot {
        /// One [`Change::Put`] for each object.
        changes: Objects,
        /// The store's revision the set belongs to.
        revision: u64,
    },
    /// What changed since the last event.
    Changes {
        /// In the order of the store; at most one for each key.
        changes: Vec<Change>,
        /// The store's revision after them.
        revision: u64,
    },
    /// What was told so far may be old: the store cannot be reached, or is not believed.
    Stale {
        /// Since when nothing newer was confirmed.
        since: SystemTime,
        /// The reason, for the operator.
        why: String,
    },
    /// The store is reached again and everything told is current.
    Fresh,
}

/// One object as a store holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its address.
    pub key: ResourceKey,
    /// Compact JSON.
    pub value: Bytes,
    /// The revision that created it.
    pub created_index: u64,
    /// The revision that wrote it last.
    pub modified_index: u64,
}

impl Stored {
    /// The JSON as a tree.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if somebody else wrote something that is not JSON.
    pub fn parse(&self) -> Result<Value, StoreError> {
        serde_json::from_slice(&self.value)
            .map_err(|error| StoreError::Corrupt { what: self.key.to_string(), why: error.to_string() })
    }

    /// The object as a change. JSON that cannot be read becomes a text, which no resource is, so that the
    /// graph sets the object aside instead of forgetting it.
    #[must_use]
    pub fn to_change(&self) -> Change {
        let value = self.parse().unwrap_or_else(|error| {
            tracing::warn!(key = %self.key, %error, "object in the store is not JSON");
            Value::String(String::from_utf8_lossy(&self.value).into_owned())
        });
        Change::Put {
            key: self.key.clone(),
            value,
            created_index: self.created_index,
            modified_index: self.modified_index,
        }
    }
}

/// All objects of a store, as changes that are made one at a time: the JSON trees of a hundred thousand routes
/// would take several times the memory of their text.
#[derive(Debug, Default)]
pub struct Objects(Vec<Stored>);

impl Objects {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Vec<Stored>> for Objects {
    fn from(all: Vec<Stored>) -> Objects {
        Objects(all)
    }
}

impl IntoIterator for Objects {
    type Item = Change;
    type IntoIter = std::iter::Map<std::vec::IntoIter<Stored>, fn(Stored) -> Change>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter().map(|stored| stored.to_change())
    }
}

/// What must be true of an object for a write to happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    /// Nothing: create or replace.
    #[default]
    Any,
    /// It is not there yet.
    Absent,
    /// It is there and was last written by this revision.
    Modified(u64),
}

/// How to write.
#[derive(Clone, Debug, Default)]
pub struct PutOptions {
    /// Time to live: the object deletes itself after it, over restarts as well.
    pub ttl: Option<Duration>,
    /// When to refuse the write with [`StoreError::Conflict`].
    pub condition: Condition,
    /// Who writes, for the revision log: the name of the admin key.
    pub author: String,
}

/// A write that happened.
#[derive(Clone, Debug)]
pub struct Put {
    /// Whether the object was not there before.
    pub created: bool,
    /// As it is stored now.
    pub item: Stored,
}

/// How to delete.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    /// Who deletes, for the revision log.
    pub author: String,
}

/// The state of a store, for the Control API and for start-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreStatus {
    /// `embedded`, `yaml`, `json`, `etcd` or `standalone`.
    pub provider: &'static str,
    /// The revision that was told last.
    pub revision: u64,
    /// Since when what is served may be old, and why. `None`: current.
    pub stale: Option<(SystemTime, String)>,
    /// What the provider could not read, with file and line; the rest serves.
    pub problems: Vec<String>,
}

/// Why a store did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or cannot write. Trying again later may help.
    #[error("{0}")]
    Unavailable(String),
    /// The condition of the write does not hold: somebody else was faster.
    #[error("value changed before overwritten")]
    Conflict,
    /// The object is larger than the store takes.
    #[error("the object is {size} bytes, the store takes {limit}")]
    TooLarge {
        /// Size of the JSON in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The provider takes its configuration from elsewhere.
    #[error("the configuration comes from {provider}: change it there")]
    ReadOnly {
        /// In words: `apisix.yaml`.
        provider: String,
    },
    /// Something in the store cannot be read.
    #[error("{what} in the store cannot be read: {why}")]
    Corrupt {
        /// Which object or file.
        what: String,
        /// The reason.
        why: String,
    },
}

/// A place that holds the configuration.
pub trait Store: Send + Sync {
    /// The events from now on; the first is a [`StoreEvent::Snapshot`]. To be called once, inside a tokio
    /// runtime. A store that is away sends its last-good snapshot, followed by [`StoreEvent::Stale`]; without
    /// one it sends `Stale` alone and the snapshot as soon as there is one.
    fn watch(&self) -> mpsc::Receiver<StoreEvent>;

    /// One object.
    fn get<'a>(&'a self, key: &'a ResourceKey) -> BoxFuture<'a, Result<Option<Stored>, StoreError>>;

    /// All objects of one kind, in the order of their ids.
    fn list(&self, kind: Kind) -> BoxFuture<'_, Result<Vec<Stored>, StoreError>>;

    /// Write one object. It is durable when the future is ready.
    fn put<'a>(
        &'a self,
        key: &'a ResourceKey,
        value: Value,
        options: PutOptions,
    ) -> BoxFuture<'a, Result<Put, StoreError>>;

    /// Delete one object, and with a consumer its credentials. Says whether it was there.
    fn delete<'a>(
        &'a self,
        key: &'a ResourceKey,
        options: DeleteOptions,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;

    /// An id for an object that is created without one: 20 digits, growing, never given twice.
    fn generate_id(&self) -> BoxFuture<'_, Result<String, StoreError>>;

    /// How the store is.
    fn status(&self) -> StoreStatus;

    /// The version of the etcd cluster behind it, if there is one and it answers.
    fn etcd_version(&self) -> BoxFuture<'_, Option<String>> {
        Box::pin(async { None })
    }

    /// The last `limit` revisions, newest first. A store without a log has none.
    fn history(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Revision>, StoreError>> {
        let _ = limit;
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// Make the data directory, for the owner alone, unless it is there.
pub(crate) fn prepare_data_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file for the owner alone, whole beside the old one and renamed over it. Blocks.
pub(crate) fn keep(file: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = file.parent() {
        prepare_data_dir(folder)?;
    }
    let new = file.with_extension("new");
    let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    out.write_all(bytes)?;
    out.sync_all()?;
    fs::rename(new, file)
}

/// The data directory holds keys. One that others may read keeps its mode, because somebody gave it that mode.
fn warn_if_open(path: &Path) {
    if fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0) {
        tracing::warn!(path = %path.display(), "data directory is open to other users: chmod 700 it");
    }
}
