//! Circuit breakers: what upstreams answered for one route and host, and whether they may be asked.
//!
//! By count, each full number of failures opens the circuit for twice as long as before; by ratio, a share of failures in
//! a window opens it, and a few probes decide whether it closes. Times are in milliseconds of the table.

use std::sync::Arc;

use super::table::{Entry, Key, Table};

/// Circuits that the table may hold: about 15 MB.
const CAPACITY: usize = 1 << 16;
/// Parts of the window of a ratio.
const BUCKETS: usize = 10;
/// How long a circuit that has seen failures is remembered after the last one, at least.
const MEMORY: u64 = 60 * 60 * 1000;

/// When a circuit opens and closes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rules {
    /// By the number of failures and successes.
    Count {
        /// Failures that open it.
        failures: u64,
        /// Successes that close it.
        successes: u64,
    },
    /// By the share of failures.
    Ratio {
        /// The share that opens it.
        failures: f64,
        /// Answers that have to be there before it can open.
        least: u64,
        /// The window, in milliseconds.
        window: u64,
        /// Requests that try whether it can close.
        probes: u64,
        /// The share of successes among them that closes it.
        successes: f64,
    },
}

/// What an upstream's answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Success,
    /// It does not.
    Failure,
    /// Neither.
    Other,
}

/// What a circuit is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Requests pass.
    Closed,
    /// Requests pass, and decide whether it closes.
    HalfOpen,
    /// Requests are refused.
    Open,
}

impl State {
    /// Its name, for people and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::HalfOpen => "half_open",
            Self::Open => "open",
        }
    }
}

/// The circuit of one route and host.
#[derive(Debug)]
pub struct Circuit {
    /// The route.
    pub route: Arc<str>,
    /// The host that was asked for.
    pub host: Box<str>,
    /// How often it has opened.
    pub opened: u64,
    /// Failures since it was closed last.
    pub failures: u64,
    successes: u64,
    /// The end of the time in which it is open; nothing while it is closed.
    open_until: Option<u64>,
    /// Probes on their way or done, and done; by ratio only.
    probes: (u64, u64),
    /// Answers and failures of each part of the window, by the number of the part.
    window: [(u64, u64, u64); BUCKETS],
    forget: u64,
}

impl Entry for Circuit {
    fn is_over(&self, now: u64) -> bool {
        now >= self.forget
    }

    fn worth(&self) -> (u64, u64) {
        (self.open_until.map_or(self.failures, |_| u64::MAX), self.forget)
    }
}

/// All circuits.
pub type BreakerTable = Table<Circuit>;

impl Default for BreakerTable {
    fn default() -> Self {
        Self::with_capacity(CAPACITY)
    }
}

impl BreakerTable {
    /// Whether a request may pass at `now`. `longest` is the longest time a circuit is open.
    pub fn admit(&self, key: Key, rules: &Rules, longest: u64, now: u64) -> bool {
        self.with_known(key, |circuit| circuit.admit(rules, longest, now)).unwrap_or(true)
    }

    /// Notes what an upstream answered. `make` names the route and the host of a circuit that is not known yet.
    pub fn note(
        &self,
        key: Key,
        rules: &Rules,
        longest: u64,
        outcome: Outcome,
        now: u64,
        make: impl FnOnce() -> (Arc<str>, Box<str>),
    ) {
        // Success of what never failed has nothing to tell, except as part of a ratio.
        let needed = outcome == Outcome::Failure || matches!(rules, Rules::Ratio { .. });
        if needed {
            self.with(
                key,
                now,
                || Circuit::new(make()),
                |circuit| circuit.note(rules, longest, outcome, now),
            );
        } else {
            self.with_known(key, |circuit| circuit.note(rules, longest, outcome, now));
        }
    }
}

impl Circuit {
    fn new((route, host): (Arc<str>, Box<str>)) -> Self {
        Self {
            route,
            host,
            opened: 0,
            failures: 0,
            successes: 0,
            open_until: None,
            probes: (0, 0),
            window: [(0, 0, 0); BUCKETS],
            forget: u64::MAX,
        }
    }

    /// What it is doing at `now`.
    pub fn state(&self, now: u64) -> State {
        match self.open_until {
            None => State::Closed,
            Some(until) if now <= until => State::Open,
            Some(_) => State::HalfOpen,
        }
    }

    fn admit(&mut self, rules: &Rules, longest: u64, now: u64) -> bool {
        match (self.state(now), rules) {
            (State::Closed, _) | (State::HalfOpen, Rules::Count { .. }) => true,
            (State::Open, _) => false,
            (State::HalfOpen, Rules::Ratio { probes, .. }) => {
                // Probes that never told how they ended must not close the door for ever.
                if self.open_until.is_some_and(|until| now > until.saturating_add(longest))
                    && self.probes.0 >= *probes
                {
                    self.open_until = Some(now.saturating_sub(1));
                    self.probes = (0, 0);
                    self.successes = 0;
                }
                self.probes.0 += 1;
                self.probes.0 <= *probes
            }
        }
    }

    fn note(&mut self, rules: &Rules, longest: u64, outcome: Outcome, now: u64) {
        match *rules {
            Rules::Count { failures, successes } => self.count(failures, successes, longest, outcome, now),
            Rules::Ratio { .. } => self.weigh(rules, longest, outcome, now),
        }
        self.forget = now.saturating_add(longest.saturating_mul(4).max(MEMORY));
        if self.state(now) == State::Closed && self.failures == 0 && matches!(rules, Rules::Count { .. }) {
            self.forget = now;
        }
    }

    fn count(&mut self, failures: u64, successes: u64, longest: u64, outcome: Outcome, now: u64) {
        match outcome {
            Outcome::Failure => {
                self.failures += 1;
                self.successes = 0;
                if self.failures.is_multiple_of(failures.max(1)) {
                    // 2 s, 4 s, 8 s, ...
                    let times = u32::try_from(self.failures / failures.max(1)).unwrap_or(u32::MAX);
                    let wait = 2_u64.checked_pow(times).and_then(|seconds| seconds.checked_mul(1000));
                    self.open(now, wait.unwrap_or(u64::MAX).min(longest));
                }
            }
            Outcome::Success if self.failures > 0 => {
                self.successes += 1;
                if self.successes >= successes {
                    self.close();
                }
            }
            Outcome::Success | Outcome::Other => {}
        }
    }

    fn weigh(&mut self, rules: &Rules, longest: u64, outcome: Outcome, now: u64) {
        let Rules::Ratio { failures, least, window, probes, successes } = *rules else { return };
        match self.state(now) {
            // An answer to a request from before.
            State::Open => {}
            State::HalfOpen if outcome == Outcome::Failure => {
                self.failures += 1;
                self.open(now, longest);
            }
            State::HalfOpen => {
                self.probes.1 += 1;
                self.successes += u64::from(outcome == Outcome::Success);
                if self.probes.1 >= probes {
                    if self.successes as f64 / self.probes.1 as f64 >= successes {
                        self.close();
                    } else {
                        self.open(now, longest);
                    }
                }
            }
            State::Closed => {
                let length = (window / BUCKETS as u64).max(1);
                let number = now / length;
                let failed = u64::from(outcome == Outcome::Failure);
                self.failures += failed;
                if let Some(part) = self.window.get_mut((number % BUCKETS as u64) as usize) {
                    if part.0 != number {
                        *part = (number, 0, 0);
                    }
                    part.1 += 1;
                    part.2 += failed;
                }
                let recent = self.window.iter().filter(|part| part.0 + BUCKETS as u64 > number);
                let (all, bad) = recent.fold((0, 0), |(all, bad), part| (all + part.1, bad + part.2));
                if all >= least && bad as f64 / all as f64 >= failures {
                    self.open(now, longest);
                }
            }
        }
    }

    fn open(&mut self, now: u64, wait: u64) {
        self.opened += 1;
        self.successes = 0;
        self.probes = (0, 0);
        self.open_until = Some(now.saturating_add(wait));
    }

    fn close(&mut self) {
        self.failures = 0;
        self.successes = 0;
        self.probes = (0, 0);
        self.window = [(0, 0, 0); BUCKETS];
        self.open_until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A circuit with its rules; times in milliseconds.
    struct Run {
        table: BreakerTable,
        rules: Rules,
        longest: u64,
    }

    impl Run {
        fn key(&self) -> Key {
            self.table.key(self.table.owner("routes/1"), "host")
        }

        fn admits(&self, now: u64) -> bool {
            self.table.admit(self.key(), &self.rules, self.longest, now)
        }

        fn note(&self, outcome: Outcome, now: u64) {
            let make = || ("1".into(), "host".into());
            self.table.note(self.key(), &self.rules, self.longest, outcome, now, make);
        }

        fn state(&self, now: u64) -> State {
            self.table.with_known(self.key(), |circuit| circuit.state(now)).unwrap_or(State::Closed)
        }
    }

    fn by_count() -> Run {
        let rules = Rules::Count { failures: 3, successes: 2 };
        Run { table: BreakerTable::default(), rules, longest: 5_000 }
    }

    fn by_ratio() -> Run {
        let rules = Rules::Ratio { failures: 0.5, least: 4, window: 10_000, probes: 2, successes: 0.6 };
        Run { table: BreakerTable::default(), rules, longest: 5_000 }
    }

    #[test]
    fn each_full_number_of_failures_opens_it_for_twice_as_long_up_to_the_longest() {
        let run = by_count();
        let mut now = 0;
        for (round, wait) in [2_000, 4_000, 5_000, 5_000].into_iter().enumerate() {
            for failure in 0..3 {
                assert!(run.admits(now), "round {round}, failure {failure}");
                run.note(Outcome::Failure, now);
            }
            assert_eq!(run.state(now), State::Open);
            assert!(!run.admits(now + wait));
            now += wait + 1;
            assert_eq!(run.state(now), State::HalfOpen);
        }
    }

    #[test]
    fn successes_close_it_and_it_begins_anew() {
        let run = by_count();
        (0..3).for_each(|_| run.note(Outcome::Failure, 0));
        run.note(Outcome::Success, 3_000);
        run.note(Outcome::Other, 3_000);
        assert_eq!(run.state(3_000), State::HalfOpen);
        run.note(Outcome::Success, 3_000);
        assert_eq!(run.state(3_000), State::Closed);
        (0..2).for_each(|_| run.note(Outcome::Failure, 3_000));
        assert!(run.admits(3_000), "counts from zero");
        run.note(Outcome::Failure, 3_000);
        assert!(run.admits(5_001), "two seconds again");
    }

    #[test]
    fn what_never_fails_is_not_remembered() {
        let run = by_count();
        (0..100).for_each(|now| run.note(Outcome::Success, now));
        assert!(run.table.is_empty());
    }

    #[test]
    fn a_share_of_failures_opens_it_and_probes_decide() {
        let run = by_ratio();
        for (outcome, open) in [
            (Outcome::Failure, false),
            (Outcome::Failure, false),
            (Outcome::Success, false),
            (Outcome::Other, true),
        ] {
            run.note(outcome, 0);
            assert_eq!(run.state(0) == State::Open, open, "{outcome:?}");
        }
        assert!(!run.admits(5_000));
        assert_eq!(
            [run.admits(5_001), run.admits(5_001), run.admits(5_001)],
            [true, true, false],
            "two probes"
        );
        run.note(Outcome::Failure, 5_002);
        assert_eq!(run.state(5_003), State::Open, "one that fails is enough");
        assert_eq!([run.admits(10_003), run.admits(10_003)], [true, true]);
        run.note(Outcome::Success, 10_004);
        run.note(Outcome::Success, 10_004);
        assert_eq!(run.state(10_004), State::Closed);
        run.note(Outcome::Failure, 10_004);
        assert_eq!(run.state(10_004), State::Closed, "old answers do not count any more");
    }

    #[test]
    fn answers_outside_the_window_do_not_count() {
        let run = by_ratio();
        (0..3).for_each(|_| run.note(Outcome::Failure, 0));
        run.note(Outcome::Failure, 11_000);
        assert_eq!(run.state(11_000), State::Closed);
    }

    #[test]
    fn probes_that_never_end_do_not_hold_it_half_open_for_ever() {
        let run = by_ratio();
        (0..4).for_each(|_| run.note(Outcome::Failure, 0));
        assert_eq!([run.admits(6_000), run.admits(6_000), run.admits(6_000)], [true, true, false]);
        assert!(!run.admits(9_000));
        assert!(run.admits(20_000));
    }

    #[test]
    fn times_do_not_overflow() {
        let rules = Rules::Count { failures: 1, successes: 1 };
        let run = Run { table: BreakerTable::default(), rules, longest: u64::MAX };
        (0..200).for_each(|_| run.note(Outcome::Failure, u64::MAX - 1));
        assert_eq!(run.state(u64::MAX), State::Open);
    }
}
