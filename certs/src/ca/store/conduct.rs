//! What every store has to do, as one test of many.

use std::sync::Arc;
use std::time::Duration;

use super::{Store, Stored, SwapError};

/// Everything, at a store that is empty.
///
/// # Panics
/// The store does something else.
#[allow(clippy::unwrap_used, clippy::panic, clippy::missing_panics_doc, reason = "a test")]
pub async fn conduct(store: Arc<dyn Store>) {
    assert_eq!(store.load("record").await.unwrap(), None);
    let first = store.swap("record", None, b"one").await.unwrap();
    let stored = store.load("record").await.unwrap().unwrap();
    assert_eq!((stored.version, stored.value.as_slice()), (first, &b"one"[..]));

    // Who has not seen the present value changes nothing.
    assert_eq!(store.swap("record", None, b"x").await, Err(SwapError::Conflict));
    let second = store.swap("record", Some(first), b"two").await.unwrap();
    assert_ne!(first, second);
    assert_eq!(store.swap("record", Some(first), b"x").await, Err(SwapError::Conflict));
    assert_eq!(store.swap("other", Some(second), b"x").await, Err(SwapError::Conflict));
    assert_eq!(store.load("record").await.unwrap().unwrap().value, b"two");
    assert_eq!(store.load("other").await.unwrap(), None);

    // Of many that want the same version one gets it.
    let writers: Vec<_> = (0..8_u8)
        .map(|i| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.swap("record", Some(second), &[i]).await.map(|_| i) })
        })
        .collect();
    let mut winners = Vec::new();
    for writer in writers {
        match writer.await.unwrap() {
            Ok(i) => winners.push(i),
            Err(error) => assert_eq!(error, SwapError::Conflict),
        }
    }
    let stored = store.load("record").await.unwrap().unwrap();
    assert_eq!(winners, stored.value);

    // Lists are of their names alone, bytes are kept as they are, removal is compared too.
    let bytes: Vec<u8> = (0..=255).cycle().take(200_000).collect();
    let large = store.swap("fleet/ca-1/0", None, &bytes).await.unwrap();
    store.swap("fleet/ca-2/11", None, b"b").await.unwrap();
    let names = |found: &[(String, Stored)]| found.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let found = store.list("fleet/").await.unwrap();
    assert_eq!(names(&found), ["fleet/ca-1/0", "fleet/ca-2/11"]);
    assert!(found.first().unwrap().1.value == bytes, "200,000 bytes come back as they were");
    assert_eq!(store.remove("fleet/ca-1/0", stored.version).await, Err(SwapError::Conflict));
    store.remove("fleet/ca-1/0", large).await.unwrap();
    assert_eq!(names(&store.list("fleet/").await.unwrap()), ["fleet/ca-2/11"]);

    // Who waits hears of a change, and waits no longer than he said.
    let wait = store.changed("record", Some(stored.version), Duration::from_millis(50));
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap().unwrap();
    let waiter = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            let mut now = store.load("record").await.unwrap().unwrap();
            while now.value != b"last" {
                store.changed("record", Some(now.version), Duration::from_secs(30)).await.unwrap();
                now = store.load("record").await.unwrap().unwrap();
            }
        })
    };
    store.swap("record", Some(stored.version), b"last").await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), waiter).await.unwrap().unwrap();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::super::embedded::Embedded;
    use super::super::memory::Memory;
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn memory_conducts_itself() {
        conduct(Arc::new(Memory::default())).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_folder_conducts_itself() {
        let folder = tempfile::tempdir().unwrap();
        conduct(Arc::new(Embedded::open(&folder.path().join("ca")).unwrap())).await;
    }
}
