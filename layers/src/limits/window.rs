//! Request counts in windows of time, exact across workers.
//!
//! One table serves every limit of the process. It is cut into shards by the hash of the key, each behind a lock that is
//! held for one look-up; two workers meet only on the same shard at the same instant. A window takes some 50 bytes; old
//! ones are dropped as new ones come, and a full table gives up those that would end soonest.

use std::hash::{BuildHasher, Hash};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use foldhash::quality::RandomState;
use hashbrown::HashTable;

use crate::telemetry::counter::Padded;

/// Shards of the table; a power of two.
const SHARDS: usize = 64;
/// Windows that the table may hold: about 25 MB.
const CAPACITY: usize = 1 << 19;
/// Windows looked at for one to give up when a shard is full.
const SAMPLE: usize = 16;

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

/// Whose count it is, in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

/// The part of a key that is known before a request.
#[derive(Clone, Copy, Debug)]
pub struct Owner(u64);

#[derive(Debug)]
struct Window {
    key: u64,
    /// End of the current window, in milliseconds since the table was made.
    end: u64,
    /// How long it is needed after its end, in milliseconds: a sliding one is the next one's `previous`.
    memory: u64,
    count: u64,
    /// Count of the window before; sliding ones only.
    previous: u64,
}

impl Window {
    /// Says nothing about a request at `now` any more.
    fn is_over(&self, now: u64) -> bool {
        now >= self.end.saturating_add(self.memory)
    }
}

#[derive(Debug, Default)]
struct Shard {
    windows: Vec<Window>,
    /// Places in `windows`, by key.
    places: HashTable<u32>,
    /// The next window to look at for its age.
    hand: usize,
}

/// Counts of all limits.
#[derive(Debug)]
pub struct WindowTable {
    shards: Box<[Padded<Mutex<Shard>>]>,
    hasher: RandomState,
    start: Instant,
    capacity: usize,
}

impl Default for WindowTable {
    fn default() -> Self {
        Self::with_capacity(CAPACITY)
    }
}

impl WindowTable {
    /// A table of at most `capacity` windows.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Padded::default()).collect(),
            hasher: RandomState::default(),
            start: Instant::now(),
            capacity: capacity.div_ceil(SHARDS).max(1),
        }
    }

    /// Names the limit whose counts are meant. The same name is the same limit, also after a reload.
    pub fn owner(&self, name: impl Hash) -> Owner {
        Owner(self.hasher.hash_one(name))
    }

    /// The counter of `owner` for `key`.
    pub fn key(&self, owner: Owner, key: impl Hash) -> Key {
        // 64 bits of a seeded hash stand for the key: a million keys meet by chance once in 30 million tables.
        Key(self.hasher.hash_one((owner.0, key)))
    }

    /// Asks whether one more is within `limit`, and counts it if so.
    pub fn take(&self, key: Key, limit: Limit, now: Instant) -> Verdict {
        let key = key.0;
        let now = millis(now.saturating_duration_since(self.start));
        let length = millis(limit.window).max(1);
        // The high bits choose the shard; the table inside uses the others.
        let index = (key >> 58) as usize % SHARDS;
        let Some(Padded(shard)) = self.shards.get(index) else { return refused(length) };
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(window) = shard.window(key, length, now, limit.kind, self.capacity) else {
            return refused(length);
        };
        match limit.kind {
            WindowKind::Fixed => window.take_fixed(limit.count, length, now),
            WindowKind::Sliding => window.take_sliding(limit.count, length, now),
        }
    }

    /// Windows in the table.
    pub fn len(&self) -> usize {
        let sizes = self
            .shards
            .iter()
            .map(|Padded(shard)| shard.lock().unwrap_or_else(PoisonError::into_inner).windows.len());
        sizes.sum()
    }

    /// Whether nothing is counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn refused(length: u64) -> Verdict {
    Verdict { allowed: false, remaining: 0, reset: Duration::from_millis(length) }
}

impl Window {
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

impl Shard {
    /// The window of `key`, made if there is none.
    fn window(
        &mut self,
        key: u64,
        length: u64,
        now: u64,
        kind: WindowKind,
        capacity: usize,
    ) -> Option<&mut Window> {
        let found = self.places.find(key, |place| self.key_at(*place) == Some(key)).copied();
        let place = match found {
            Some(place) => place,
            None => self.add(key, length, now, kind, capacity),
        };
        self.windows.get_mut(place as usize)
    }

    fn key_at(&self, place: u32) -> Option<u64> {
        self.windows.get(place as usize).map(|window| window.key)
    }

    fn add(&mut self, key: u64, length: u64, now: u64, kind: WindowKind, capacity: usize) -> u32 {
        // Two old ones for a new one: the table shrinks faster than it grows, without ever stopping to clean up.
        for _ in 0..2 {
            self.drop_next_if_over(now);
        }
        if self.windows.len() >= capacity {
            self.give_one_up();
        }
        let (end, memory) = match kind {
            WindowKind::Fixed => (now.saturating_add(length), 0),
            // Sliding windows lie on a grid, as in APISIX.
            WindowKind::Sliding => ((now / length + 1).saturating_mul(length), length),
        };
        let place = u32::try_from(self.windows.len()).unwrap_or(u32::MAX);
        self.windows.push(Window { key, end, memory, count: 0, previous: 0 });
        let windows = &self.windows;
        self.places
            .insert_unique(key, place, |place| windows.get(*place as usize).map_or(0, |window| window.key));
        place
    }

    fn drop_next_if_over(&mut self, now: u64) {
        if self.hand >= self.windows.len() {
            self.hand = 0;
        }
        match self.windows.get(self.hand) {
            Some(window) if window.is_over(now) => self.remove(self.hand),
            _ => self.hand += 1,
        }
    }

    /// Removes the window that ends soonest of a few.
    fn give_one_up(&mut self) {
        let len = self.windows.len();
        let start = fastrand::usize(..len.max(1));
        let soonest = (0..SAMPLE)
            .map(|step| (start + step) % len.max(1))
            .min_by_key(|place| self.windows.get(*place).map_or(u64::MAX, |window| window.end));
        if let Some(place) = soonest {
            self.remove(place);
        }
    }

    fn remove(&mut self, place: usize) {
        let Some(key) = self.windows.get(place).map(|window| window.key) else { return };
        if let Ok(entry) = self.places.find_entry(key, |at| *at as usize == place) {
            entry.remove();
        }
        let last = self.windows.len() - 1;
        self.windows.swap_remove(place);
        // The last one has taken the place.
        if let Some(moved) = self.windows.get(place).map(|window| window.key)
            && let Some(at) = self.places.find_mut(moved, |at| *at as usize == last)
        {
            *at = u32::try_from(place).unwrap_or(u32::MAX);
        }
        if self.windows.capacity() > 1024 && self.windows.len() < self.windows.capacity() / 4 {
            self.windows.shrink_to(self.windows.len() * 2);
            let windows = &self.windows;
            self.places.shrink_to(windows.len() * 2, |place| {
                windows.get(*place as usize).map_or(0, |window| window.key)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

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
