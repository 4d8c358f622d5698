//! The health of one endpoint: four counters and a verdict, in one atomic word.
//!
//! The rules are those of lua-resty-healthcheck. A success clears the failure counters and a failure the
//! success counter; reports that agree with a settled verdict are not counted; a verdict flips when a counter
//! reaches its limit, and a limit of 0 switches its counter off. Active probes and live traffic (passive
//! checks) feed the same counters with limits of their own.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is thought of an endpoint. The two outer states are settled; the inner ones are on probation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Healthy,
    /// Usable, with failures counted.
    MostlyHealthy,
    /// Not usable, with successes counted.
    MostlyUnhealthy,
    Unhealthy,
}

impl State {
    /// Whether requests may be sent there.
    pub fn usable(self) -> bool {
        matches!(self, Self::Healthy | Self::MostlyHealthy)
    }

    /// The word of the Control API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::MostlyHealthy => "mostly_healthy",
            Self::MostlyUnhealthy => "mostly_unhealthy",
            Self::Unhealthy => "unhealthy",
        }
    }

    fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Healthy,
            1 => Self::MostlyHealthy,
            2 => Self::MostlyUnhealthy,
            _ => Self::Unhealthy,
        }
    }
}

/// Who saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A probe.
    Active,
    /// A request.
    Passive,
}

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// A good status, or a connection where that is all that is asked. 0 means no status.
    Success(u16),
    /// A bad status; 0 means the answer was no HTTP.
    HttpFailure(u16),
    /// The connection failed or broke.
    TcpFailure,
    /// No connection or no answer in time.
    Timeout,
}

/// How many reports of a kind it takes; 0 means the kind does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub successes: u8,
    pub http_failures: u8,
    pub tcp_failures: u8,
    pub timeouts: u8,
}

/// Counters as they stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub success: u8,
    pub http_failure: u8,
    pub tcp_failure: u8,
    pub timeout_failure: u8,
}

/// The last report that was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason {
    pub source: Source,
    pub report: Report,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = match self.source {
            Source::Active => "active check",
            Source::Passive => "live traffic",
        };
        match self.report {
            Report::Success(0) => write!(f, "{source}: connected"),
            Report::Success(status) => write!(f, "{source}: status {status}"),
            Report::HttpFailure(0) => write!(f, "{source}: the answer is not HTTP"),
            Report::HttpFailure(status) => write!(f, "{source}: status {status}"),
            Report::TcpFailure => write!(f, "{source}: connection failed"),
            Report::Timeout => write!(f, "{source}: timed out"),
        }
    }
}

/// A verdict that began to differ in whether the endpoint may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flip {
    pub from: State,
    pub to: State,
}

// Layout: state in bits 0-1, then one byte each for success, http, tcp and timeout from bit 8,
// then the reason: present bit 40, source bit 41, kind bits 42-43, status from bit 48.
const SUCCESS: u32 = 8;
const HTTP: u32 = 16;
const TCP: u32 = 24;
const TIMEOUT: u32 = 32;
const COUNTERS: u64 = 0xffff_ffff << SUCCESS;

/// Health of one endpoint; starts healthy.
#[derive(Debug, Default)]
pub struct Health(AtomicU64);

impl Health {
    pub fn state(&self) -> State {
        State::from_bits(self.0.load(Ordering::Relaxed))
    }

    pub fn counts(&self) -> Counts {
        let word = self.0.load(Ordering::Relaxed);
        Counts {
            success: byte(word, SUCCESS),
            http_failure: byte(word, HTTP),
            tcp_failure: byte(word, TCP),
            timeout_failure: byte(word, TIMEOUT),
        }
    }

    /// What the last counted report was; none for an endpoint nothing happened to.
    pub fn reason(&self) -> Option<Reason> {
        let word = self.0.load(Ordering::Relaxed);
        if word & (1 << 40) == 0 {
            return None;
        }
        let source = if word & (1 << 41) == 0 { Source::Active } else { Source::Passive };
        let status = u16::try_from(word >> 48).unwrap_or(0);
        let report = match (word >> 42) & 3 {
            0 => Report::Success(status),
            1 => Report::HttpFailure(status),
            2 => Report::TcpFailure,
            _ => Report::Timeout,
        };
        Some(Reason { source, report })
    }

    /// Count one report. Says so when the endpoint became usable or unusable by it.
    pub fn report(&self, source: Source, report: Report, limits: &Limits) -> Option<Flip> {
        let (shift, limit, kind, status) = match report {
            Report::Success(status) => (SUCCESS, limits.successes, 0, status),
            Report::HttpFailure(status) => (HTTP, limits.http_failures, 1, status),
            Report::TcpFailure => (TCP, limits.tcp_failures, 2, 0),
            Report::Timeout => (TIMEOUT, limits.timeouts, 3, 0),
        };
        if limit == 0 {
            return None;
        }
        let good = shift == SUCCESS;
        let settled = if good { State::Healthy } else { State::Unhealthy };
        let because =
            1 << 40 | u64::from(source == Source::Passive) << 41 | kind << 42 | u64::from(status) << 48;
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let from = State::from_bits(word);
            // The usual case, a success at a healthy endpoint, ends here without a write.
            if from == settled {
                return None;
            }
            let count = byte(word, shift).saturating_add(1);
            let kept = if good { 0 } else { word & COUNTERS & !(0xff << SUCCESS) };
            let counters = kept & !(0xff << shift) | u64::from(count) << shift;
            let to = match from {
                _ if count >= limit => settled,
                State::Healthy => State::MostlyHealthy,
                State::Unhealthy => State::MostlyUnhealthy,
                probation => probation,
            };
            let next = counters | because | to as u64;
            match self.0.compare_exchange_weak(word, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return (from.usable() != to.usable()).then_some(Flip { from, to }),
                Err(current) => word = current,
            }
        }
    }

    /// Give an unhealthy endpoint another chance: usable, but one more failure of a kind that counts ends it.
    /// For endpoints that nothing probes and that get no traffic, so that nothing else could bring them back.
    pub fn parole(&self, limits: &Limits) -> Option<Flip> {
        let from = self.state();
        if from.usable() {
            return None;
        }
        let last = |limit: u8, shift: u32| u64::from(limit.saturating_sub(1)) << shift;
        let counters = last(limits.http_failures, HTTP)
            | last(limits.tcp_failures, TCP)
            | last(limits.timeouts, TIMEOUT);
        let reason = self.0.load(Ordering::Relaxed) & !COUNTERS & !3;
        self.0.store(reason | counters | State::MostlyHealthy as u64, Ordering::Relaxed);
        Some(Flip { from, to: State::MostlyHealthy })
    }

    /// Forget everything: checks were switched off.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

fn byte(word: u64, shift: u32) -> u8 {
    u8::try_from(word >> shift & 0xff).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const LIMITS: Limits = Limits { successes: 2, http_failures: 3, tcp_failures: 2, timeouts: 3 };

    fn run(limits: &Limits, reports: &str) -> (State, Counts, usize) {
        let health = Health::default();
        let flips = reports
            .chars()
            .filter_map(|letter| {
                let report = match letter {
                    's' => Report::Success(200),
                    'h' => Report::HttpFailure(500),
                    't' => Report::TcpFailure,
                    _ => Report::Timeout,
                };
                health.report(Source::Active, report, limits)
            })
            .count();
        (health.state(), health.counts(), flips)
    }

    fn counts(success: u8, http_failure: u8, tcp_failure: u8, timeout_failure: u8) -> Counts {
        Counts { success, http_failure, tcp_failure, timeout_failure }
    }

    #[test]
    fn verdicts_and_counters_follow_the_reports() {
        use State::*;
        // s success, h http failure, t tcp failure, o time-out; limits 2, 3, 2, 3.
        let cases = [
            ("", Healthy, counts(0, 0, 0, 0), 0, "an endpoint starts healthy"),
            ("sss", Healthy, counts(0, 0, 0, 0), 0, "successes of a healthy endpoint are not counted"),
            ("h", MostlyHealthy, counts(0, 1, 0, 0), 0, "the first failure puts it on probation"),
            ("hs", MostlyHealthy, counts(1, 0, 0, 0), 0, "a success clears the failures"),
            ("hss", Healthy, counts(2, 0, 0, 0), 0, "successes settle it again"),
            ("hsh", MostlyHealthy, counts(0, 1, 0, 0), 0, "a failure clears the successes"),
            ("hhh", Unhealthy, counts(0, 3, 0, 0), 1, "failures of one kind reach their limit"),
            ("hhtoo", MostlyHealthy, counts(0, 2, 1, 2), 0, "kinds are counted apart"),
            ("tt", Unhealthy, counts(0, 0, 2, 0), 1, "each kind has its limit"),
            ("ooo", Unhealthy, counts(0, 0, 0, 3), 1, "time-outs too"),
            ("hhhh", Unhealthy, counts(0, 3, 0, 0), 1, "failures of an unhealthy endpoint are not counted"),
            ("hhhs", MostlyUnhealthy, counts(1, 0, 0, 0), 1, "the first success puts it on probation"),
            ("hhhsh", MostlyUnhealthy, counts(0, 1, 0, 0), 1, "a failure on probation starts over"),
            ("hhhshhh", Unhealthy, counts(0, 3, 0, 0), 1, "and settles it again"),
            ("hhhss", Healthy, counts(2, 0, 0, 0), 2, "successes bring it back"),
            ("hhhssh", MostlyHealthy, counts(0, 1, 0, 0), 2, "where it starts from zero"),
        ];
        for (reports, state, counts, flips, case) in cases {
            assert_eq!(run(&LIMITS, reports), (state, counts, flips), "{case} ({reports})");
        }
    }

    #[test]
    fn a_limit_of_zero_switches_a_kind_off() {
        let limits = Limits { successes: 0, http_failures: 0, tcp_failures: 1, timeouts: 0 };
        assert_eq!(run(&limits, "hhhhooooo").0, State::Healthy);
        assert_eq!(run(&limits, "tsssss").0, State::Unhealthy, "without successes nothing brings it back");
    }

    #[test]
    fn the_reason_is_the_last_counted_report() {
        let health = Health::default();
        assert_eq!(health.reason(), None);
        health.report(Source::Passive, Report::HttpFailure(503), &LIMITS);
        let reason = health.reason().unwrap();
        assert_eq!(reason, Reason { source: Source::Passive, report: Report::HttpFailure(503) });
        assert_eq!(reason.to_string(), "live traffic: status 503");
        health.report(Source::Active, Report::Timeout, &LIMITS);
        assert_eq!(health.reason().unwrap().to_string(), "active check: timed out");
    }

    #[test]
    fn an_endpoint_on_parole_falls_at_the_next_failure() {
        let health = Health::default();
        (0..3).for_each(|_| {
            let _ = health.report(Source::Passive, Report::HttpFailure(500), &LIMITS);
        });
        assert_eq!(health.parole(&LIMITS), Some(Flip { from: State::Unhealthy, to: State::MostlyHealthy }));
        assert_eq!(health.parole(&LIMITS), None, "it is usable now");
        assert!(health.report(Source::Passive, Report::HttpFailure(500), &LIMITS).is_some());
        health.parole(&LIMITS);
        health.report(Source::Passive, Report::Success(200), &LIMITS);
        health.report(Source::Passive, Report::Success(200), &LIMITS);
        assert_eq!(health.state(), State::Healthy);
    }

    #[test]
    fn the_largest_limits_are_reached() {
        let limits = Limits { successes: 254, http_failures: 254, tcp_failures: 254, timeouts: 254 };
        assert_eq!(run(&limits, &"h".repeat(253)).0, State::MostlyHealthy);
        assert_eq!(run(&limits, &"h".repeat(254)).0, State::Unhealthy);
    }
}
