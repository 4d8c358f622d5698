//! Request counts in windows of time, exact across workers. A window takes some 50 bytes.

use std::time::{Duration, Instant};

use super::table::{Entry, Key, Table, millis};

/// Windows that the table may hold: about 30 MB.
const CAPACITY: usize = 1 << 19;

/// How time is cut into windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowKind {
    /// A window starts with its first request and counts from zero.
    Fixed,
    /// Windows follow each other; the one before counts in proportion to its part of the last `window`.
    Sliding,
}

/// A limit: so many in such a time.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// How many.
    pub count: u64,
    /// In which time. Not zero.
    pub window: Duration,
    /// How windows are cut.
    pub kind: WindowKind,
}

/// What was said about one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// It is within the limit, and was counted.
    pub allowed: bool,
    /// How many more are.
    pub remaining: u64,
    /// When there is room again: for a fixed window its end, for a sliding one the next instant that lets one pass.
    pub reset: Duration,
}

/// The requests of one key.
#[derive(Debug)]
pub struct Window {
    /// End of the current window, in milliseconds since the table was made.
    end: u64,
    /// How long it is needed after its end, in milliseconds: a sliding one is the next one's `previous`.
    memory: u64,
    count: u64,
    /// Count of the window before; sliding ones only.
    previous: u64,
}

impl Entry for Window {
    fn is_over(&self, now: u64) -> bool {
        now >= self.end.saturating_add(self.memory)
    }

    fn worth(&self) -> (u64, u64) {
        (self.count.saturating_add(self.previous), self.end)
    }
}

/// Counts of all limits.
pub type WindowTable = Table<Window>;

impl Default for WindowTable {
    fn default() -> Self {
        Self::with_capacity(CAPACITY)
    }
}

impl WindowTable {
    /// Asks whether one more is within `limit`, and counts it if so.
    pub fn take(&self, key: Key, limit: Limit, now: Instant) -> Verdict {
        let now = self.time(now);
        let length = millis(limit.window).max(1);
        let verdict = self.with(
            key,
            now,
            || Window::new(limit.kind, length, now),
            |window| match limit.kind {
                WindowKind::Fixed => window.take_fixed(limit.count, length, now),
                WindowKind::Sliding => window.take_sliding(limit.count, length, now),
            },
        );
        verdict.unwrap_or_else(|| refused(length))
    }
}

fn refused(length: u64) -> Verdict {
    Verdict { allowed: false, remaining: 0, reset: Duration::from_millis(length) }
}

impl Window {
    fn new(kind: WindowKind, length: u64, now: u64) -> Self {
        let (end, memory) = match kind {
            WindowKind::Fixed => (now.saturating_add(length), 0),
            // Sliding windows lie on a grid, as in APISIX.
            WindowKind::Sliding => ((now / length + 1).saturating_mul(length), length),
        };
        Self { end, memory, count: 0, previous: 0 }
    }

    fn take_fixed(&mut self, limit: u64, length: u64, now: u64) -> Verdict {
        if now >= self.end {
            (self.count, self.end) = (0, now.saturating_add(length));
        }
        let reset = Duration::from_millis(self.end - now);
        if self.count >= limit {
            return Verdict { allowed: false, remaining: 0, reset };
        }
        self.count += 1;
        Verdict { allowed: true, remaining: limit - self.count, reset }
    }

    fn take_sliding(&mut self, limit: u64, length: u64, now: u64) -> Verdict {
        if now >= self.end {
            let passed = (now - self.end) / length;
            self.previous = if passed == 0 { self.count.min(limit) } else { 0 };
            self.count = 0;
            self.end = self.end.saturating_add((passed + 1).saturating_mul(length));
        }
        let left = self.end.saturating_sub(now).min(length);
        // Thousandths of a request would do; 128 bits cannot overflow.
        let before = u128::from(self.previous) * u128::from(left);
        let weighed = |count: u64| before + u128::from(count) * u128::from(length);
        let allowed = u128::from(limit) * u128::from(length);
        if weighed(self.count) >= allowed || self.count >= limit {
            // The previous window fades until one more has room; a full current one has to end first.
            let reset = if self.count >= limit || self.previous == 0 {
                left
            } else {
                let room =
                    (allowed - u128::from(self.count) * u128::from(length)) / u128::from(self.previous);
                left.saturating_sub(u64::try_from(room).unwrap_or(u64::MAX))
            };
            return Verdict { allowed: false, remaining: 0, reset: Duration::from_millis(reset) };
        }
        self.count += 1;
        let remaining = allowed.saturating_sub(weighed(self.count)) / u128::from(length);
        Verdict {
            allowed: true,
            remaining: u64::try_from(remaining).unwrap_or(u64::MAX),
            reset: Duration::from_millis(left),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::table::SHARDS;
    use super::*;

    fn limit(count: u64, seconds: u64, kind: WindowKind) -> Limit {
        Limit { count, window: Duration::from_secs(seconds), kind }
    }

    fn key(table: &WindowTable, name: &str) -> Key {
        table.key(table.owner("routes/1"), name)
    }

    #[test]
    fn a_fixed_window_starts_with_its_first_request() {
        let table = WindowTable::default();
        let (key, limit) = (key(&table, "a"), limit(2, 60, WindowKind::Fixed));
        let at = |millis| table.take(key, limit, table.start + Duration::from_millis(millis));
        let verdict =
            |allowed, remaining, millis| Verdict { allowed, remaining, reset: Duration::from_millis(millis) };
        assert_eq!(at(5_000), verdict(true, 1, 60_000));
        assert_eq!(at(35_000), verdict(true, 0, 30_000));
        assert_eq!(at(64_999), verdict(false, 0, 1));
        assert_eq!(at(65_000), verdict(true, 1, 60_000));
    }

    #[test]
    fn a_sliding_window_weighs_the_one_before() {
        let table = WindowTable::default();
        let (key, limit) = (key(&table, "a"), limit(10, 10, WindowKind::Sliding));
        let at = |millis| table.take(key, limit, table.start + Duration::from_millis(millis));
        for n in 1..=10 {
            assert_eq!(at(5_000).remaining, 10 - n);
        }
        assert!(!at(9_999).allowed);
        // Half of the next window is over: half of the ten before still count.
        assert_eq!((0..10).filter(|_| at(15_000).allowed).count(), 5);
        assert!(!at(15_000).allowed);
        assert_eq!(at(15_000).reset, Duration::from_millis(0), "the next instant has room");
        assert!(at(16_000).allowed);
        // A whole window without requests forgets everything.
        assert_eq!(at(40_000).remaining, 9);
    }

    #[test]
    fn exactly_as_many_pass_as_allowed_however_many_threads_ask() {
        let table = WindowTable::default();
        let passed = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let verdict = table.take(
                            key(&table, "a"),
                            limit(1_000, 3_600, WindowKind::Fixed),
                            Instant::now(),
                        );
                        passed.fetch_add(u64::from(verdict.allowed), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(passed.into_inner(), 1_000);
    }

    #[test]
    fn keys_and_owners_do_not_share_counts() {
        let table = WindowTable::default();
        let one = limit(1, 60, WindowKind::Fixed);
        for owner in ["routes/1", "routes/2"] {
            for name in ["a", "b"] {
                let key = table.key(table.owner(owner), name);
                assert!(table.take(key, one, table.start).allowed);
                assert!(!table.take(key, one, table.start).allowed);
            }
        }
        let again = table.key(table.owner("routes/1"), "a");
        assert!(!table.take(again, one, table.start).allowed, "the same name is the same count");
    }

    #[test]
    fn old_windows_make_room_for_new_ones() {
        let table = WindowTable::default();
        let second = limit(1, 1, WindowKind::Fixed);
        for round in 0..20_u64 {
            for n in 0..2_000 {
                let key = key(&table, &format!("{round}/{n}"));
                table.take(key, second, table.start + Duration::from_secs(round * 3));
            }
        }
        assert!(table.len() <= 2 * 2_000, "{} windows are left", table.len());
    }

    #[test]
    fn a_full_table_stays_full_and_keeps_counting() {
        let table = WindowTable::with_capacity(SHARDS * 4);
        let one = limit(1, 60, WindowKind::Fixed);
        for n in 0..10_000 {
            assert!(table.take(key(&table, &n.to_string()), one, table.start).allowed);
        }
        assert!(table.len() <= SHARDS * 4);
        let last = key(&table, "9999");
        assert!(!table.take(last, one, table.start).allowed);
    }

    #[test]
    fn a_time_as_long_as_can_be_does_not_overflow() {
        let table = WindowTable::default();
        for kind in [WindowKind::Fixed, WindowKind::Sliding] {
            let longest = Limit { count: u64::MAX, window: Duration::from_secs(u64::MAX), kind };
            let key = key(&table, &format!("{kind:?}"));
            assert!(table.take(key, longest, table.start).allowed);
            assert!(table.take(key, longest, table.start + Duration::from_secs(1)).allowed);
        }
    }
}
