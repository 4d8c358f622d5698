//! Tells discovery servers when every worker goes by the endpoints that they have sent.

use std::sync::OnceLock;
use std::time::Duration;

use discovery::rpc::client::Gate;
use discovery::{Discovery, Query, WeakDiscovery};
use futures_util::future::BoxFuture;
use layers::worker::turns::Turns;

/// How often workers are looked at. They count their turns about ten times a second.
const PACE: Duration = Duration::from_millis(50);

/// Discovery and the workers of this process.
#[derive(Debug)]
pub struct InUse {
    /// There as soon as it is made: its sources want to know before.
    discovery: OnceLock<WeakDiscovery>,
    turns: Turns,
}

impl InUse {
    pub fn new(turns: Turns) -> Self {
        Self { discovery: OnceLock::new(), turns }
    }

    /// The discovery whose endpoints are used.
    pub fn of(&self, discovery: &Discovery) {
        // There is one for each process.
        let _ = self.discovery.set(discovery.downgrade());
    }
}

impl Gate for InUse {
    fn used<'a>(&'a self, kind: &'a str, query: &'a Query) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            if let Some(discovery) = self.discovery.get().and_then(WeakDiscovery::upgrade) {
                discovery.used(kind, query).await;
            }
            let published = self.turns.now();
            while self.turns.behind(&published) > 0 {
                tokio::time::sleep(PACE).await;
            }
        })
    }
}
