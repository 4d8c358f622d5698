//! What a task has found out about servers, and those who wait for it.

use std::sync::Arc;

use tokio::sync::watch;

use super::Failure;

/// What is known so far.
#[derive(Clone)]
pub(super) enum Found<T> {
    /// Nobody was asked yet.
    Asking,
    Known(T),
    /// Nobody told anything yet.
    Unknown(Arc<str>),
}

impl<T: Clone> Found<T> {
    fn settled(&self) -> Option<Result<T, Failure>> {
        match self {
            Self::Asking => None,
            Self::Known(found) => Some(Ok(found.clone())),
            Self::Unknown(why) => Some(Err(Failure::Unreachable(why.clone()))),
        }
    }
}

/// What is known, as soon as somebody was asked.
pub(super) async fn settled<T: Clone>(state: &watch::Receiver<Found<T>>) -> Result<T, Failure> {
    if let Some(found) = state.borrow().settled() {
        return found;
    }
    let mut state = state.clone();
    let state = state.wait_for(|state| state.settled().is_some()).await;
    let found = state.ok().and_then(|state| state.settled());
    found.unwrap_or_else(|| Err(Failure::Unreachable("the gateway stops".into())))
}
