//! When a registry suddenly takes away most of what still answers, it is more likely that the registry is wrong.
//!
//! What it takes away is then held back: what does not answer leaves at once, the rest leaves slowly, and somebody is told.
//! What was draining or unhealthy is not held back, and neither is anything when no less is left than there was: that
//! is a deployment.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::Endpoint;
use crate::source::Health;
use crate::target::Guards;

/// Between two steps of what leaves slowly.
const STEP: Duration = Duration::from_secs(1);

/// What is held back of one target.
#[derive(Debug, Default)]
pub(crate) struct Guard {
    /// Taken away by its registry.
    leaving: Vec<Endpoint>,
    /// How many leave in a step.
    batch: usize,
    /// When the next ones leave, and are probed again.
    next: Option<Instant>,
    alarms: u64,
}

/// More was taken away at once than the target allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alarm {
    pub(crate) taken: usize,
    pub(crate) of: usize,
}

impl Guard {
    pub(crate) fn leaving(&self) -> &[Endpoint] {
        &self.leaving
    }

    pub(crate) fn alarms(&self) -> u64 {
        self.alarms
    }

    /// When something has to happen.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.next
    }

    /// `after` is what the sources say, `before` what is published. Adds what is held back.
    pub(crate) fn hold(
        &mut self,
        guards: &Guards,
        before: &[Endpoint],
        after: &mut Vec<Endpoint>,
        leaves_at_once: impl Fn(&SocketAddr) -> bool,
        now: Instant,
    ) -> Option<Alarm> {
        let held = self.leaving.len();
        let total = before.len().saturating_sub(held);
        if held == 0 && after.len() >= total {
            return None;
        }
        let listed: HashSet<SocketAddr> = after.iter().map(|endpoint| endpoint.addr).collect();
        let gone = |addr: &SocketAddr| listed.contains(addr) || leaves_at_once(addr);
        let already: HashSet<SocketAddr> = self.leaving.iter().map(|leaving| leaving.addr).collect();
        self.leaving.retain(|leaving| !gone(&leaving.addr));
        let taken: Vec<&Endpoint> = before
            .iter()
            .filter(|endpoint| endpoint.health <= Health::Warning && endpoint.weight > 0)
            .filter(|endpoint| !gone(&endpoint.addr) && !already.contains(&endpoint.addr))
            .collect();
        let limit = usize::from(guards.drop_limit);
        let too_many = limit < 100 && taken.len() * 100 > total * limit;
        let mut alarm = None;
        if too_many && taken.len() >= guards.drop_floor.max(1) && after.len() < total {
            alarm = Some(Alarm { taken: taken.len(), of: total });
            self.alarms += 1;
            let rate = usize::from(guards.drop_rate.clamp(1, 100));
            self.batch = (total * rate).div_ceil(100).max(1);
            self.next = Some(now + STEP);
            let leaving = taken.into_iter().cloned();
            self.leaving.extend(leaving);
        }
        if self.leaving.is_empty() {
            self.next = None;
        }
        after.extend(self.leaving.iter().cloned());
        alarm
    }

    /// Those that do not answer leave.
    pub(crate) fn probed(&mut self, silent: &HashSet<SocketAddr>) -> Vec<Endpoint> {
        self.release(|leaving, _| silent.contains(&leaving.addr))
    }

    /// The next ones leave if it is time.
    pub(crate) fn step(&mut self, now: Instant) -> Vec<Endpoint> {
        if self.next.is_none_or(|next| now < next) {
            return Vec::new();
        }
        self.next = Some(now + STEP);
        let batch = self.batch;
        self.release(|_, place| place < batch)
    }

    fn release(&mut self, leaves: impl Fn(&Endpoint, usize) -> bool) -> Vec<Endpoint> {
        let mut released = Vec::new();
        let mut place = 0;
        self.leaving.retain(|leaving| {
            let gone = leaves(leaving, place);
            place += 1;
            if gone {
                released.push(leaving.clone());
            }
            !gone
        });
        if self.leaving.is_empty() {
            self.next = None;
        }
        released
    }
}
