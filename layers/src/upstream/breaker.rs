//! A circuit breaker for one node: after too many failures of live traffic it gets no requests for a while.
//!
//! Closed, failures are counted exactly: the breaker remembers when the last ones were and opens when as many as allowed
//! lie within the window. Open, nothing is sent until the cool-down is over. Half-open, a number of requests is let
//! through; when all of them have succeeded it closes, and one failure opens it again. The state is one atomic word; a
//! request whose outcome says nothing about the node gives its place back.

use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use config::upstream::extensions::{AllOpen, Breaker as Wire};

use super::settings::Statuses;

/// What stored times count from.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// When a breaker opens and closes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    max_failures: usize,
    window: u64,
    cool_down: u64,
    half_open: u64,
    statuses: Statuses,
    /// All nodes are used when every breaker is open.
    pub(crate) use_all: bool,
}

impl Rule {
    /// The rule as it was written.
    pub fn new(wire: &Wire) -> Self {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
        Self {
            max_failures: usize::try_from(wire.max_failures.get()).unwrap_or(1),
            window: millis(wire.window.duration()),
            cool_down: millis(wire.cool_down.duration()),
            half_open: wire.half_open.get().into(),
            statuses: Statuses::new(wire.statuses.iter().map(|status| status.get())),
            use_all: wire.all_open == AllOpen::UseAll,
        }
    }

    /// Whether an answer with this status is a failure.
    pub fn fails(&self, status: u16) -> bool {
        self.statuses.contains(status)
    }
}

/// The state of a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Requests pass.
    Closed,
    /// A few requests pass.
    HalfOpen,
    /// None passes.
    Open,
}

impl Phase {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Closed, Self::HalfOpen, Self::Open];

    /// The word of the Control API and of metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::HalfOpen => "half_open",
            Self::Open => "open",
        }
    }
}

/// The state word taken apart. `stamp` is the time at which the cool-down ends; it also tells one round of probes from
/// another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Closed,
    Open { stamp: u64 },
    HalfOpen { stamp: u64, under_way: u64, succeeded: u64 },
}

// Layout: phase in bits 0-1, probes under way in bits 2-12, those that succeeded in bits 13-23, stamp from bit 24.
const COUNT: u64 = 0x7ff;

impl Word {
    fn read(word: u64) -> Self {
        let stamp = word >> 24;
        match word & 3 {
            0 => Self::Closed,
            1 => Self::Open { stamp },
            _ => Self::HalfOpen { stamp, under_way: word >> 2 & COUNT, succeeded: word >> 13 & COUNT },
        }
    }

    fn write(self) -> u64 {
        match self {
            Self::Closed => 0,
            Self::Open { stamp } => 1 | stamp << 24,
            Self::HalfOpen { stamp, under_way, succeeded } => {
                2 | (under_way & COUNT) << 2 | (succeeded & COUNT) << 13 | stamp << 24
            }
        }
    }
}

/// The breaker of one node.
#[derive(Debug)]
pub struct Breaker {
    rule: Arc<Rule>,
    word: AtomicU64,
    /// When the last failures were, one fewer than open the breaker. 0 for none.
    failures: Box<[AtomicU64]>,
    next: AtomicUsize,
    opened: AtomicU64,
}

impl Breaker {
    /// A closed one.
    pub fn new(rule: &Arc<Rule>) -> Self {
        let slots = rule.max_failures.saturating_sub(1);
        Self {
            rule: Arc::clone(rule),
            word: AtomicU64::new(0),
            failures: std::iter::repeat_with(AtomicU64::default).take(slots).collect(),
            next: AtomicUsize::new(0),
            opened: AtomicU64::new(0),
        }
    }

    /// Its rule.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.rule
    }

    /// Its state. One that is open stays so until a request asks for leave after the cool-down.
    pub fn phase(&self) -> Phase {
        match Word::read(self.word.load(Ordering::Relaxed)) {
            Word::Closed => Phase::Closed,
            Word::Open { .. } => Phase::Open,
            Word::HalfOpen { .. } => Phase::HalfOpen,
        }
    }

    /// How often it has opened.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Leave to send a request, if there is any now.
    pub fn enter(self: &Arc<Self>, now: Instant) -> Option<Leave> {
        let probe = self.change(|word| match word {
            Word::Closed => Some((word, None)),
            Word::Open { stamp } if millis(now) < stamp => None,
            Word::Open { stamp } => Some((Word::HalfOpen { stamp, under_way: 1, succeeded: 0 }, Some(stamp))),
            Word::HalfOpen { stamp, under_way, succeeded } => (under_way + succeeded < self.rule.half_open)
                .then_some((Word::HalfOpen { stamp, under_way: under_way + 1, succeeded }, Some(stamp))),
        })?;
        Some(Leave { breaker: Arc::clone(self), probe })
    }

    /// Puts what `next` makes of the state in its place, and gives what else it says; nothing leaves it as it is.
    fn change<T>(&self, next: impl Fn(Word) -> Option<(Word, T)>) -> Option<T> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let (to, told) = next(Word::read(word))?;
            let to = to.write();
            // The usual case, a closed breaker, ends here without a write.
            if to == word {
                return Some(told);
            }
            match self.word.compare_exchange_weak(word, to, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(told),
                Err(current) => word = current,
            }
        }
    }

    /// Counts a failure. Whether there are too many of them now.
    fn count(&self, now: u64) -> bool {
        let place = self.next.fetch_add(1, Ordering::Relaxed).checked_rem(self.failures.len());
        // Without a place to remember one, the first is too many.
        let Some(slot) = place.and_then(|place| self.failures.get(place)) else { return true };
        let earlier = slot.swap(now, Ordering::Relaxed);
        earlier != 0 && now.saturating_sub(earlier) <= self.rule.window
    }

    fn forget(&self) {
        self.failures.iter().for_each(|slot| slot.store(0, Ordering::Relaxed));
    }
}

/// Leave to send one request. Dropped without a word it says nothing about the node.
#[derive(Debug)]
pub struct Leave {
    breaker: Arc<Breaker>,
    /// Of a probe: the round it belongs to.
    probe: Option<u64>,
}

impl Leave {
    /// The rule by which the outcome is judged.
    pub fn rule(&self) -> &Rule {
        &self.breaker.rule
    }

    /// The node did its work. Whether the breaker has closed by it.
    pub fn succeeded(mut self) -> bool {
        let Some(round) = self.probe.take() else { return false };
        let breaker = &self.breaker;
        let closed = breaker.change(|word| match word {
            Word::HalfOpen { stamp, succeeded, .. }
                if stamp == round && succeeded + 1 >= breaker.rule.half_open =>
            {
                Some((Word::Closed, true))
            }
            Word::HalfOpen { stamp, under_way, succeeded } if stamp == round => {
                let under_way = under_way.saturating_sub(1);
                Some((Word::HalfOpen { stamp, under_way, succeeded: succeeded + 1 }, false))
            }
            _ => None,
        });
        if closed == Some(true) {
            breaker.forget();
        }
        closed == Some(true)
    }

    /// The node failed. Whether the breaker has opened by it.
    pub fn failed(mut self, now: Instant) -> bool {
        let round = self.probe.take();
        let (breaker, now) = (&self.breaker, millis(now));
        if round.is_none() && !breaker.count(now) {
            return false;
        }
        let until = Word::Open { stamp: now.saturating_add(breaker.rule.cool_down) };
        let opened = breaker.change(|word| match (word, round) {
            (Word::Closed, None) => Some((until, ())),
            (Word::HalfOpen { stamp, .. }, Some(round)) if stamp == round => Some((until, ())),
            // Others have opened it, or this request began long ago.
            _ => None,
        });
        if opened.is_some() {
            breaker.opened.fetch_add(1, Ordering::Relaxed);
        }
        opened.is_some()
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        let Some(round) = self.probe.take() else { return };
        let _ = self.breaker.change(|word| match word {
            Word::HalfOpen { stamp, under_way, succeeded } if stamp == round => {
                Some((Word::HalfOpen { stamp, under_way: under_way.saturating_sub(1), succeeded }, ()))
            }
            _ => None,
        });
    }
}

/// Milliseconds since the first look at a clock; never 0, which is "none".
fn millis(now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(*EPOCH).as_millis()).unwrap_or(u64::MAX - 1) + 1
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::*;

    fn breaker(fields: Value) -> Arc<Breaker> {
        let wire: Wire = serde_json::from_value(fields).unwrap();
        Arc::new(Breaker::new(&Arc::new(Rule::new(&wire))))
    }

    fn at(millis: u64) -> Instant {
        *EPOCH + Duration::from_secs(1000) + Duration::from_millis(millis)
    }

    #[test]
    fn it_opens_when_so_many_failures_lie_within_the_window() {
        // Times of failures in milliseconds, and after which of them it is open.
        for (failures, opens) in [
            (vec![0, 100, 200], Some(2)),
            (vec![0, 900, 1000], Some(2)),
            (vec![0, 500, 1001], None),
            (vec![0, 900, 1500, 1899], Some(3)),
            (vec![0, 600, 1200, 1800, 2400, 3000], None),
            (vec![0, 600, 1200, 1500], Some(3)),
        ] {
            let breaker = breaker(json!({"max_failures": 3, "window": 1, "cool_down": 10}));
            let found = failures.iter().position(|time| breaker.enter(at(*time)).unwrap().failed(at(*time)));
            assert_eq!(found, opens, "{failures:?}");
            assert_eq!(breaker.opened(), u64::from(opens.is_some()));
        }
    }

    #[test]
    fn successes_between_failures_do_not_hide_them() {
        let breaker = breaker(json!({"max_failures": 2, "window": 1}));
        assert!(!breaker.enter(at(0)).unwrap().failed(at(0)));
        for n in 1..100 {
            assert!(!breaker.enter(at(n)).unwrap().succeeded());
        }
        assert!(breaker.enter(at(100)).unwrap().failed(at(100)));
    }

    #[test]
    fn after_the_cool_down_probes_decide() {
        let breaker = breaker(json!({"max_failures": 1, "cool_down": 2, "half_open": 2}));
        assert!(breaker.enter(at(0)).unwrap().failed(at(0)));
        assert_eq!(breaker.phase(), Phase::Open);
        assert!(breaker.enter(at(1999)).is_none(), "it cools down");
        let (one, two) = (breaker.enter(at(2000)).unwrap(), breaker.enter(at(2000)).unwrap());
        assert_eq!(breaker.phase(), Phase::HalfOpen);
        assert!(breaker.enter(at(2000)).is_none(), "no more than two at once");
        assert!(!one.succeeded());
        assert!(breaker.enter(at(2000)).is_none(), "one succeeded and one is under way");
        assert!(two.succeeded());
        assert_eq!(breaker.phase(), Phase::Closed);
        assert!(breaker.enter(at(3000)).unwrap().failed(at(3000)));
        let probe = breaker.enter(at(5000)).unwrap();
        assert!(probe.failed(at(5100)));
        assert!(breaker.enter(at(7099)).is_none(), "the cool-down begins anew");
        assert!(breaker.enter(at(7100)).is_some());
        assert_eq!(breaker.opened(), 3);
    }

    #[test]
    fn a_probe_without_an_outcome_gives_its_place_back() {
        let breaker = breaker(json!({"max_failures": 1, "cool_down": 1}));
        breaker.enter(at(0)).unwrap().failed(at(0));
        let probe = breaker.enter(at(1000)).unwrap();
        assert!(breaker.enter(at(1000)).is_none());
        drop(probe);
        let next = breaker.enter(at(1000)).unwrap();
        assert!(next.succeeded());
    }

    #[test]
    fn late_outcomes_of_an_earlier_time_change_nothing() {
        let breaker = breaker(json!({"max_failures": 1, "cool_down": 1, "half_open": 2}));
        let (early, late) = (breaker.enter(at(0)).unwrap(), breaker.enter(at(0)).unwrap());
        assert!(early.failed(at(0)));
        assert!(!late.failed(at(500)), "it is open already");
        let (first, second) = (breaker.enter(at(1000)).unwrap(), breaker.enter(at(1000)).unwrap());
        assert!(first.failed(at(1000)));
        let third = breaker.enter(at(2000)).unwrap();
        assert!(!second.failed(at(2000)), "the probe of another round does not count");
        assert!(!third.succeeded());
        assert!(breaker.enter(at(2000)).unwrap().succeeded());
    }

    #[test]
    fn what_closed_has_forgotten_its_failures() {
        let breaker = breaker(json!({"max_failures": 2, "window": 100, "cool_down": 1}));
        assert!(!breaker.enter(at(0)).unwrap().failed(at(0)));
        assert!(breaker.enter(at(1)).unwrap().failed(at(1)));
        assert!(breaker.enter(at(1001)).unwrap().succeeded());
        assert!(!breaker.enter(at(1002)).unwrap().failed(at(1002)));
    }

    #[test]
    fn threads_let_through_no_more_probes_than_allowed() {
        let breaker = breaker(json!({"max_failures": 1, "cool_down": 1, "half_open": 3}));
        breaker.enter(at(0)).unwrap().failed(at(0));
        let leaves: Vec<Leave> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| breaker.enter(at(1000)))).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(leaves.len(), 3);
    }
}
