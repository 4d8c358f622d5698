//! A store that ends with its process, for tests and for an authority that may be lost.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::{Store, StoreError, Stored, SwapError, Version};

/// Values in memory.
pub struct Memory {
    values: Mutex<Values>,
    changes: watch::Sender<u64>,
}

#[derive(Default)]
struct Values {
    /// Of all changes, so that no version comes twice.
    count: u64,
    stored: BTreeMap<String, Stored>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { values: Mutex::default(), changes: watch::Sender::new(0) }
    }
}

impl Memory {
    fn lock(&self) -> MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn version(&self, name: &str) -> Option<Version> {
        self.lock().stored.get(name).map(|stored| stored.version)
    }

    /// Changes a value, if it is the version that was seen.
    fn change(&self, name: &str, seen: Option<Version>, value: Option<&[u8]>) -> Result<Version, SwapError> {
        let mut values = self.lock();
        if values.stored.get(name).map(|stored| stored.version) != seen {
            return Err(SwapError::Conflict);
        }
        values.count += 1;
        let version = Version(values.count);
        match value {
            Some(value) => {
                values.stored.insert(name.to_owned(), Stored { version, value: value.to_vec() });
            }
            None => {
                values.stored.remove(name);
            }
        }
        self.changes.send_replace(version.0);
        Ok(version)
    }
}

impl Store for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        Box::pin(async move { Ok(self.lock().stored.get(name).cloned()) })
    }

    fn list<'a>(&'a self, start: &'a str) -> BoxFuture<'a, Result<Vec<(String, Stored)>, StoreError>> {
        Box::pin(async move {
            let values = self.lock();
            let found = values.stored.iter().filter(|(name, _)| name.starts_with(start));
            Ok(found.map(|(name, stored)| (name.clone(), stored.clone())).collect())
        })
    }

    fn swap<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        value: &'a [u8],
    ) -> BoxFuture<'a, Result<Version, SwapError>> {
        Box::pin(async move { self.change(name, seen, Some(value)) })
    }

    fn remove<'a>(&'a self, name: &'a str, seen: Version) -> BoxFuture<'a, Result<(), SwapError>> {
        Box::pin(async move { self.change(name, Some(seen), None).map(drop) })
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
                while self.version(name) == seen {
                    if changes.changed().await.is_err() {
                        return;
                    }
                }
            };
            let _ = tokio::time::timeout(at_most, wait).await;
            Ok(())
        })
    }
}
