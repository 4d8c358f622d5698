//! A record while this instance works on it. Every change goes by compare-and-swap from the last one, so whoever was taken
//! for dead learns of it at his next change, and has changed nothing.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::record::Work;
use super::{Failure, Record, Seconds};
use crate::ca::store::{Store, Stored, SwapError, Version};

/// A name whose version says whether anything was changed.
pub(super) const NEWS: &str = "news";

/// The right to change one record.
pub(super) struct Lease {
    store: Arc<dyn Store>,
    name: String,
    held: Mutex<(Option<Version>, Record)>,
}

impl Lease {
    /// A record as it was seen.
    pub(super) fn of(
        store: Arc<dyn Store>,
        name: String,
        seen: Option<&(Version, Record)>,
        new: impl FnOnce() -> Record,
    ) -> Self {
        let held = match seen {
            Some((version, record)) => (Some(*version), record.clone()),
            None => (None, new()),
        };
        Self { store, name, held: Mutex::new(held) }
    }

    /// Takes the order until then.
    pub(super) async fn claim(&self, by: &str, until: Seconds, now: Seconds) -> Result<(), Failure> {
        let work = Work { by: by.to_owned(), until, challenges: Vec::new() };
        self.change(now, |record| {
            record.work = Some(work);
            record.asked = false;
        })
        .await
    }

    /// The record as this instance has written it last.
    pub(super) async fn record(&self) -> Record {
        self.held.lock().await.1.clone()
    }

    /// Changes the record, and lets the other instances know.
    pub(super) async fn change(&self, now: Seconds, edit: impl FnOnce(&mut Record)) -> Result<(), Failure> {
        let mut held = self.held.lock().await;
        let mut next = held.1.clone();
        edit(&mut next);
        next.changed = now;
        let version = write(&*self.store, &self.name, held.0, &next).await?;
        *held = (Some(version), next);
        drop(held);
        tell(&*self.store).await;
        Ok(())
    }
}

async fn write(
    store: &dyn Store,
    name: &str,
    seen: Option<Version>,
    record: &Record,
) -> Result<Version, Failure> {
    let value = serde_json::to_vec(record).map_err(Failure::unreached)?;
    match store.swap(name, seen, &value).await {
        Ok(version) => Ok(version),
        Err(SwapError::Conflict) => Err(Failure::lost()),
        Err(SwapError::Store(error)) => {
            // Nobody knows whether it was written: it was, if it is there now.
            match store.load(name).await {
                Ok(Some(Stored { version, value: there })) if there == value => Ok(version),
                _ => Err(Failure::unreached(error)),
            }
        }
    }
}

/// Lets the other instances know that something was changed. If somebody else did so at the same moment it is done; if the
/// store is away they look by themselves before long.
pub(super) async fn tell(store: &dyn Store) {
    let Ok(seen) = store.load(NEWS).await else { return };
    if let Err(SwapError::Store(error)) = store.swap(NEWS, seen.map(|seen| seen.version), b"").await {
        tracing::debug!(%error, "others learn of a change later");
    }
}
