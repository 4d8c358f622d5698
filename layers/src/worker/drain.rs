//! Leaving in order. Workers stop accepting once their queues are empty, say goodbye on every connection, let what is
//! in flight finish, and at the deadline cut the rest and name each. Readiness is the caller's: turn it false before.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// What the workers are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Serving,
    /// Until this moment, if it is near enough to be one.
    Draining {
        until: Option<Instant>,
    },
}

/// A connection that was cut at the deadline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Casualty {
    /// The worker that served it.
    pub worker: usize,
    /// The client.
    pub peer: SocketAddr,
    /// Requests that were at work on it; 0 for a tunnel or a client that did not close.
    pub in_flight: u32,
}

/// How a drain went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// From the start of the drain to the end of the last worker.
    pub took: Duration,
    /// Connections that were cut.
    pub casualties: Vec<Casualty>,
    /// Workers that had not ended when the caller's patience did.
    pub stuck: Vec<usize>,
}

/// The control side's handle on the drain of all workers.
#[derive(Clone, Debug)]
pub struct Drain(watch::Sender<Stage>);

impl Drain {
    pub(crate) fn new() -> (Self, watch::Receiver<Stage>) {
        let (sender, receiver) = watch::channel(Stage::Serving);
        (Self(sender), receiver)
    }

    /// Begins. What has not finished `within` this time is cut. A later call can only make it shorter.
    pub fn start(&self, within: Duration) {
        let until = Instant::now().checked_add(within);
        self.0.send_modify(|stage| {
            *stage = match *stage {
                Stage::Draining { until: Some(before) } => {
                    Stage::Draining { until: Some(until.map_or(before, |until| until.min(before))) }
                }
                Stage::Draining { until: None } | Stage::Serving => Stage::Draining { until },
            };
        });
    }

    /// Whether it has begun.
    pub fn is_draining(&self) -> bool {
        matches!(*self.0.borrow(), Stage::Draining { .. })
    }
}
