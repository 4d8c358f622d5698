//! Whether the workload's connections come to this very sidecar, tried from its start until they do: one that is passed by is
//! not ready.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::time::sleep;

use super::probe::{By, Outcome, probe};

/// How long one try may take.
const TRY: Duration = Duration::from_secs(5);
/// Between two of them.
const PACE: Duration = Duration::from_millis(500);

/// What is known of it. Clones are the same.
#[derive(Clone, Default)]
pub struct Proof(Arc<ArcSwapOption<String>>);

impl Proof {
    /// Tries whether connections are led to `outbound_port`, until they are.
    pub fn seek(outbound_port: u16) -> Self {
        let proof = Self::default();
        proof.tell("it was not tried yet");
        let told = proof.clone();
        tokio::spawn(async move {
            loop {
                let tried = probe(outbound_port, By::Ourselves, TRY).await;
                let missing = tried.into_iter().find_map(|(family, outcome)| match outcome {
                    Outcome::Captured | Outcome::NoRoute => None,
                    Outcome::Missing(why) => Some(format!("{}: {why}", family.name())),
                });
                match missing {
                    Some(why) => told.tell(&why),
                    None => break told.0.store(None),
                }
                sleep(PACE).await;
            }
        });
        proof
    }

    fn tell(&self, why: &str) {
        let words = format!(
            "the workload's connections do not come here ({why}): run `postern sidecar capture install -c sidecar.yaml`"
        );
        self.0.store(Some(Arc::new(words)));
    }

    /// Why the workload's connections do not come here; none if they do, or need not.
    pub fn missing(&self) -> Option<String> {
        self.0.load().as_deref().cloned()
    }
}
