//! Whether a cluster answers at all: one small question a second, for all who wait on it.
//!
//! A question that waits a minute for a change cannot tell a quiet cluster from one that is gone, and a thousand of them
//! that knock again and again at one that is down are a load for nothing. So one task asks `/v1/status/leader`. Who waits
//! is told when the cluster has gone, and again when it is back, and then asks at once.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::StatusCode;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::http::{Connection, Question, Server};

/// Between questions while all is well.
const CALM: Duration = Duration::from_secs(1);
/// Between questions to a cluster that is gone. They overlap, so that one that is swallowed does not hold up the next.
const SEARCH: Duration = Duration::from_millis(500);
/// Vain questions, one after the other, until a cluster counts as gone: a busy one must not be asked for everything anew
/// because it was slow once. A connection that breaks or is refused says enough: whatever waits may wait for nothing.
const MISSES: u32 = 2;
/// Searching questions at a time.
const SEARCHERS: usize = 4;

/// The pulse of one cluster, felt as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Pulse {
    state: watch::Receiver<State>,
    doubt: Arc<Notify>,
    task: AbortHandle,
}

#[derive(Clone, Debug)]
struct State {
    /// Why it counts as gone.
    gone: Option<Arc<str>>,
    /// How often it went.
    losses: u64,
}

/// Where the pulse of a cluster is found by those who need it.
#[derive(Debug, Default)]
pub(super) struct Shared(Mutex<Weak<Pulse>>);

impl Shared {
    /// The pulse; it begins when nobody holds it yet. `deadline` is for one question.
    pub(super) fn feel(&self, server: &Arc<Server>, deadline: Duration) -> Arc<Pulse> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pulse) = shared.upgrade() {
            return pulse;
        }
        let (tell, state) = watch::channel(State { gone: None, losses: 0 });
        let doubt = Arc::new(Notify::new());
        let task = tokio::spawn(beat(Arc::clone(server), deadline, tell, Arc::clone(&doubt))).abort_handle();
        let pulse = Arc::new(Pulse { state, doubt, task });
        *shared = Arc::downgrade(&pulse);
        pulse
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Pulse {
    /// Somebody's question failed: look now.
    pub(super) fn doubt(&self) {
        self.doubt.notify_one();
    }

    /// How often the cluster went.
    pub(super) fn losses(&self) -> u64 {
        self.state.borrow().losses
    }

    /// Until the cluster has gone more than `losses` times, with the reason if it still is.
    pub(super) async fn lost(&self, losses: u64) -> Arc<str> {
        let mut state = self.state.clone();
        let Ok(state) = state.wait_for(|state| state.losses > losses).await else {
            return std::future::pending().await;
        };
        state.gone.clone().unwrap_or_else(|| "it was gone for a while".into())
    }

    /// Until the cluster is there; at once if it is. Says whether it was waited for.
    pub(super) async fn there(&self) -> bool {
        if self.state.borrow().gone.is_none() {
            return false;
        }
        let mut state = self.state.clone();
        state.wait_for(|state| state.gone.is_none()).await.is_ok()
    }
}

async fn beat(server: Arc<Server>, deadline: Duration, tell: watch::Sender<State>, doubt: Arc<Notify>) {
    let mut connection = server.connection();
    let mut misses = 0;
    loop {
        // Whoever doubts twice in a moment is answered once.
        tokio::select! {
            () = sleep(CALM) => {}
            () = async { doubt.notified().await; sleep(CALM / 20).await } => {}
        }
        match leader(&mut connection, deadline).await {
            Ok(()) => misses = 0,
            Err(Miss { reason, certain }) => {
                misses += 1;
                if certain || misses >= MISSES {
                    tracing::warn!(reason, "Consul does not answer; what it said last stays in use");
                    tell.send_modify(|state| {
                        state.gone = Some(reason.into());
                        state.losses += 1;
                    });
                    search(&server, deadline).await;
                    tracing::info!(server = server.name(), "Consul answers again");
                    tell.send_modify(|state| state.gone = None);
                    misses = 0;
                }
            }
        }
    }
}

/// Until the cluster answers.
async fn search(server: &Arc<Server>, deadline: Duration) {
    let mut questions = FuturesUnordered::new();
    let mut ticks = interval(SEARCH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                if questions.len() < SEARCHERS {
                    let mut connection = server.connection();
                    questions.push(async move { leader(&mut connection, deadline).await });
                }
            }
            Some(Ok(())) = questions.next() => return,
        }
    }
}

/// A question in vain.
struct Miss {
    reason: String,
    /// It is not only slow.
    certain: bool,
}

/// Whether the cluster can answer: it has a leader. An answer that says nothing of it (a proxy that lets nobody ask) is one.
async fn leader(connection: &mut Connection, deadline: Duration) -> Result<(), Miss> {
    let server = Arc::clone(connection.server());
    let answer = connection.ask(&Question::get("/v1/status/leader", deadline)).await;
    let answer = answer.map_err(|error| Miss { reason: error.to_string(), certain: !error.is_timeout() })?;
    let busy = |reason| Err(Miss { reason, certain: false });
    if answer.status.is_server_error() || answer.status == StatusCode::TOO_MANY_REQUESTS {
        return busy(answer.refusal(&server).reason.to_string());
    }
    if answer.status == StatusCode::OK && answer.body.trim_ascii() == b"\"\"" {
        return busy(format!("{}: the cluster has no leader", server.name()));
    }
    Ok(())
}
