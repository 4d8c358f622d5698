//! What limits remember under a key: bounded, shared by all workers, and not to be emptied on purpose.
//!
//! A table is cut into shards by the hash of the key, each behind a lock that is held for one look-up; two workers meet
//! only on the same shard at the same instant. Old entries are dropped as new ones come. In a full table a new entry
//! takes the place of one of its own limit, of the one that counts least: who invents keys for one limit pushes out
//! neither the counts of another nor those that are about to refuse somebody.

use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use foldhash::quality::RandomState;
use hashbrown::HashTable;

use crate::telemetry::counter::Padded;

/// Shards of a table; a power of two.
pub(super) const SHARDS: usize = 64;
/// Entries looked at for one to give up when a shard is full.
const SAMPLE: usize = 16;

/// What a table keeps under a key. Times are in milliseconds since the table was made.
pub trait Entry {
    /// Says nothing about a request at `now` any more.
    fn is_over(&self, now: u64) -> bool;

    /// How much would be forgotten without it; the least goes first.
    fn worth(&self) -> (u64, u64);
}

/// Whose entry it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    hash: u64,
    owner: u32,
}

/// The part of a key that is known before a request: the limit.
#[derive(Clone, Copy, Debug)]
pub struct Owner(u64);

struct Kept<E> {
    key: Key,
    entry: E,
}

struct Shard<E> {
    kept: Vec<Kept<E>>,
    /// Places in `kept`, by key.
    places: HashTable<u32>,
    /// The next entry to look at for its age.
    hand: usize,
}

impl<E> Default for Shard<E> {
    fn default() -> Self {
        Self { kept: Vec::new(), places: HashTable::new(), hand: 0 }
    }
}

/// Entries of all limits of a kind.
pub struct Table<E> {
    shards: Box<[Padded<Mutex<Shard<E>>>]>,
    hasher: RandomState,
    pub(super) start: Instant,
    capacity: usize,
}

impl<E> fmt::Debug for Table<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("capacity", &(self.capacity * SHARDS)).finish_non_exhaustive()
    }
}

impl<E: Entry> Table<E> {
    /// A table of at most `capacity` entries.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Padded(Mutex::default())).collect(),
            hasher: RandomState::default(),
            start: Instant::now(),
            capacity: capacity.div_ceil(SHARDS).max(1),
        }
    }

    /// Names the limit whose entries are meant. The same name is the same limit, also after a reload.
    pub fn owner(&self, name: impl Hash) -> Owner {
        Owner(self.hasher.hash_one(name))
    }

    /// The key of `owner` for what a request shows.
    pub fn key(&self, owner: Owner, key: impl Hash) -> Key {
        // 64 bits of a seeded hash stand for the key: a million keys meet by chance once in 30 million tables.
        Key { hash: self.hasher.hash_one((owner.0, key)), owner: owner.0 as u32 }
    }

    /// The time of `instant` as entries count it.
    pub fn time(&self, instant: Instant) -> u64 {
        millis(instant.saturating_duration_since(self.start))
    }

    /// Works on the entry of `key`, made if there is none.
    pub fn with<R>(
        &self,
        key: Key,
        now: u64,
        make: impl FnOnce() -> E,
        work: impl FnOnce(&mut E) -> R,
    ) -> Option<R> {
        let mut shard = self.shard(key)?.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match shard.find(key) {
            Some(place) => place,
            None => shard.add(key, make(), now, self.capacity),
        };
        shard.kept.get_mut(place as usize).map(|kept| work(&mut kept.entry))
    }

    /// Works on the entry of `key`, if there is one.
    pub fn with_known<R>(&self, key: Key, work: impl FnOnce(&mut E) -> R) -> Option<R> {
        let mut shard = self.shard(key)?.lock().unwrap_or_else(PoisonError::into_inner);
        let place = shard.find(key)?;
        shard.kept.get_mut(place as usize).map(|kept| work(&mut kept.entry))
    }

    /// Looks at every entry. For the control side.
    pub fn each(&self, mut look: impl FnMut(&mut E)) {
        for Padded(shard) in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.kept.iter_mut().for_each(|kept| look(&mut kept.entry));
        }
    }

    // The high bits choose the shard; the table inside uses the others.
    fn shard(&self, key: Key) -> Option<&Mutex<Shard<E>>> {
        self.shards.get((key.hash >> 58) as usize % SHARDS).map(|Padded(shard)| shard)
    }

    /// Entries in the table.
    pub fn len(&self) -> usize {
        let sizes = self
            .shards
            .iter()
            .map(|Padded(shard)| shard.lock().unwrap_or_else(PoisonError::into_inner).kept.len());
        sizes.sum()
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A time as entries count it.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl<E: Entry> Shard<E> {
    fn find(&self, key: Key) -> Option<u32> {
        self.places.find(key.hash, |place| self.key_at(*place) == Some(key)).copied()
    }

    fn key_at(&self, place: u32) -> Option<Key> {
        self.kept.get(place as usize).map(|kept| kept.key)
    }

    fn add(&mut self, key: Key, entry: E, now: u64, capacity: usize) -> u32 {
        // Two old ones for a new one: the table shrinks faster than it grows, without ever stopping to clean up.
        for _ in 0..2 {
            self.drop_next_if_over(now);
        }
        if self.kept.len() >= capacity {
            self.give_one_up(key.owner);
        }
        let place = u32::try_from(self.kept.len()).unwrap_or(u32::MAX);
        self.kept.push(Kept { key, entry });
        let kept = &self.kept;
        self.places.insert_unique(key.hash, place, |place| {
            kept.get(*place as usize).map_or(0, |kept| kept.key.hash)
        });
        place
    }

    fn drop_next_if_over(&mut self, now: u64) {
        if self.hand >= self.kept.len() {
            self.hand = 0;
        }
        match self.kept.get(self.hand) {
            Some(kept) if kept.entry.is_over(now) => self.remove(self.hand),
            _ => self.hand += 1,
        }
    }

    /// Removes one of a few: of the same limit if there is one, then the one that counts least. They are spread over the
    /// shard, because the entries of one limit may stand side by side.
    fn give_one_up(&mut self, owner: u32) {
        let len = self.kept.len().max(1);
        let start = fastrand::usize(..len);
        let stride = (len / SAMPLE).max(1);
        let least = (0..SAMPLE).map(|step| (start + step * stride) % len).min_by_key(|place| {
            self.kept.get(*place).map(|kept| (kept.key.owner != owner, kept.entry.worth()))
        });
        if let Some(place) = least {
            self.remove(place);
        }
    }

    fn remove(&mut self, place: usize) {
        let Some(hash) = self.kept.get(place).map(|kept| kept.key.hash) else { return };
        if let Ok(entry) = self.places.find_entry(hash, |at| *at as usize == place) {
            entry.remove();
        }
        let last = self.kept.len() - 1;
        self.kept.swap_remove(place);
        // The last one has taken the place.
        if let Some(moved) = self.kept.get(place).map(|kept| kept.key.hash)
            && let Some(at) = self.places.find_mut(moved, |at| *at as usize == last)
        {
            *at = u32::try_from(place).unwrap_or(u32::MAX);
        }
        if self.kept.capacity() > 1024 && self.kept.len() < self.kept.capacity() / 4 {
            self.kept.shrink_to(self.kept.len() * 2);
            let kept = &self.kept;
            self.places
                .shrink_to(kept.len() * 2, |place| kept.get(*place as usize).map_or(0, |kept| kept.key.hash));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts `worth` until `end`.
    struct Note {
        worth: u64,
        end: u64,
    }

    impl Entry for Note {
        fn is_over(&self, now: u64) -> bool {
            now >= self.end
        }

        fn worth(&self) -> (u64, u64) {
            (self.worth, self.end)
        }
    }

    fn put(table: &Table<Note>, owner: &str, name: u64, worth: u64) {
        let key = table.key(table.owner(owner), name);
        table.with(key, 0, || Note { worth, end: 10 }, |_| ());
    }

    fn known(table: &Table<Note>, owner: &str, names: std::ops::Range<u64>) -> usize {
        let owner = table.owner(owner);
        names.filter(|name| table.with_known(table.key(owner, *name), |_| ()).is_some()).count()
    }

    #[test]
    fn who_floods_one_limit_pushes_out_nothing_of_another() {
        let table = Table::with_capacity(SHARDS * 64);
        for name in 0..500 {
            put(&table, "victim", name, 1);
        }
        for name in 0..100_000 {
            put(&table, "flooded", name, 9);
        }
        assert_eq!(known(&table, "victim", 0..500), 500);
        assert!(table.len() <= SHARDS * 64);
    }

    #[test]
    fn what_has_been_counted_most_is_kept_longest() {
        let table = Table::with_capacity(SHARDS * 64);
        for name in 0..200 {
            put(&table, "limit", name, 100);
        }
        for name in 1_000..50_000 {
            put(&table, "limit", name, 1);
        }
        assert_eq!(known(&table, "limit", 0..200), 200);
    }

    #[test]
    fn entries_are_found_after_others_went() {
        let table = Table::with_capacity(SHARDS * 1_000);
        for name in 0..20_000 {
            put(&table, "limit", name, 1);
        }
        assert_eq!(known(&table, "limit", 0..20_000), 20_000);
        // Each new one looks at two that are over.
        for name in 20_000..60_000 {
            let key = table.key(table.owner("limit"), name);
            table.with(key, 10, || Note { worth: 1, end: 20 }, |_| ());
        }
        assert_eq!((known(&table, "limit", 0..20_000), known(&table, "limit", 20_000..60_000)), (0, 40_000));
        assert_eq!(table.len(), 40_000);
    }
}
