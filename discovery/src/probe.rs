//! Whether an endpoint still answers: a TCP connection from the control side.
//!
//! Asked only about endpoints whose registry does not vouch for them any more. It is no health check: it says that
//! something listens, which is reason enough not to throw an endpoint away on the word of a registry in trouble.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// Connections under way at once, over all targets.
const MAX_CONCURRENT: usize = 64;

/// Says whether an endpoint answers.
pub trait Probe: fmt::Debug + Send + Sync + 'static {
    /// True when something listens at `host:port`. Bounded in time by itself.
    fn answers(&self, host: Arc<str>, port: u16) -> BoxFuture<'static, bool>;
}

/// By a TCP connection that is closed again.
#[derive(Clone, Debug)]
pub struct TcpProbe(Arc<Semaphore>);

impl Default for TcpProbe {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_CONCURRENT)))
    }
}

impl Probe for TcpProbe {
    fn answers(&self, host: Arc<str>, port: u16) -> BoxFuture<'static, bool> {
        let gate = Arc::clone(&self.0);
        Box::pin(async move {
            // The gate is never closed; without a permit the answer would be unknown, and unknown takes nothing away.
            let Ok(_permit) = gate.acquire().await else { return true };
            let bare = host.trim_start_matches('[').trim_end_matches(']');
            matches!(timeout(PATIENCE, certs::outgoing::connect_to((bare, port))).await, Ok(Ok(_)))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn what_listens_answers_and_what_does_not_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let probe = TcpProbe::default();
        assert!(probe.answers("127.0.0.1".into(), port).await);
        assert!(!probe.answers("[::1]".into(), port).await);
        drop(listener);
        assert!(!probe.answers("127.0.0.1".into(), port).await);
    }
}
