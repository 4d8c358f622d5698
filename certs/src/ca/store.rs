//! Where the record of an authority is kept: values under names, changed by compare-and-swap and by nothing else.
//!
//! A [`Store`] knows nothing of what it keeps. Whoever changes a value says which version he has seen; somebody who was
//! faster makes it a [`SwapError::Conflict`], and nothing was written. An error of a swap leaves open whether it was done:
//! one reads again. Every question has a deadline. [`conduct`] is what every store has to do, as a test.

pub mod consul_kv;
pub mod embedded;
pub mod etcd;
pub mod memory;

#[cfg(any(test, feature = "testing"))]
pub mod conduct;

use std::time::Duration;

use futures_util::future::BoxFuture;

/// The name of the record.
pub const RECORD: &str = "record";
/// What names of lists of workloads begin with.
pub const FLEET: &str = "fleet/";

/// Which writing of a value this is. Only equality means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

/// A value and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub version: Version,
    pub value: Vec<u8>,
}

/// A store that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It does not answer, or not with yes or no.
    #[error("{store}: {reason}")]
    Unavailable { store: String, reason: String },
    /// What it has is not what was written. It is not touched.
    #[error("{store}: {reason}")]
    Damaged { store: String, reason: String },
}

/// Why a value was not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SwapError {
    /// It is another than was seen. Nothing was written.
    #[error("somebody else has changed it")]
    Conflict,
    /// Nobody knows whether it was changed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Keeps values.
pub trait Store: Send + Sync + 'static {
    /// Where it is, for people.
    fn name(&self) -> &str;

    /// Whether other processes may use it at the same time.
    fn is_shared(&self) -> bool;

    /// A value, as it is now: never one that somebody has already replaced.
    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Stored>, StoreError>>;

    /// All whose names begin so.
    fn list<'a>(&'a self, start: &'a str) -> BoxFuture<'a, Result<Vec<(String, Stored)>, StoreError>>;

    /// Puts a value in the place of that version; `None`: where there is none.
    fn swap<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        value: &'a [u8],
    ) -> BoxFuture<'a, Result<Version, SwapError>>;

    /// Removes a value, if it is that version.
    fn remove<'a>(&'a self, name: &'a str, seen: Version) -> BoxFuture<'a, Result<(), SwapError>>;

    /// Waits until a value is another than `seen`, or for `at_most`. May return early.
    fn changed<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        at_most: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>>;
}
