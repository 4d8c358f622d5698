//! Waiting for something to become true, with a deadline, instead of sleeping for luck.

use std::future::Future;
use std::panic::Location;
use std::time::{Duration, Instant};

/// How long [`eventually`] waits: generous, because a debug build on a busy machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Calls `check` until it gives `Some`, for at most [`PATIENCE`]; `what` names the promise when it never does.
#[track_caller]
pub fn eventually<T, F>(what: &str, check: impl FnMut() -> F) -> impl Future<Output = T>
where
    F: Future<Output = Option<T>>,
{
    eventually_within(PATIENCE, what, check)
}

/// [`eventually`] with a deadline of its own.
#[track_caller]
pub fn eventually_within<T, F>(
    limit: Duration,
    what: &str,
    mut check: impl FnMut() -> F,
) -> impl Future<Output = T>
where
    F: Future<Output = Option<T>>,
{
    let caller = Location::caller();
    let what = what.to_owned();
    async move {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = check().await {
                return value;
            }
            assert!(Instant::now() < deadline, "{caller}: not within {limit:?}: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
