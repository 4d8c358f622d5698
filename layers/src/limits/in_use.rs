//! How many requests of a key are at work. An entry lives only while one is, so there are never more than requests.

use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};

use foldhash::quality::RandomState;
use hashbrown::HashMap;

use super::table::SHARDS;
use crate::telemetry::counter::Padded;

/// How many requests of each key.
type Shard = Mutex<HashMap<u64, u64>>;

/// Requests at work, by key.
#[derive(Debug)]
pub struct InUse {
    shards: Box<[Padded<Shard>]>,
    hasher: RandomState,
}

impl Default for InUse {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Padded::default()).collect(), hasher: RandomState::default() }
    }
}

/// One request at work. It stops counting when this is dropped.
#[derive(Debug)]
pub struct Use {
    of: Arc<InUse>,
    key: u64,
    number: u64,
}

impl InUse {
    /// Counts one more of `key`, unless there are `most` already.
    pub fn enter(self: &Arc<Self>, key: impl std::hash::Hash, most: u64) -> Option<Use> {
        let key = self.hasher.hash_one(key);
        let mut shard = self.shard(key)?.lock().unwrap_or_else(PoisonError::into_inner);
        let count = shard.entry(key).or_insert(0);
        if *count >= most {
            if *count == 0 {
                shard.remove(&key);
            }
            return None;
        }
        *count += 1;
        let number = *count;
        Some(Use { of: self.clone(), key, number })
    }

    /// Keys that have a request at work.
    pub fn len(&self) -> usize {
        let sizes = self
            .shards
            .iter()
            .map(|Padded(shard)| shard.lock().unwrap_or_else(PoisonError::into_inner).len());
        sizes.sum()
    }

    /// Whether no request is at work.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, key: u64) -> Option<&Shard> {
        self.shards.get((key >> 58) as usize % SHARDS).map(|Padded(shard)| shard)
    }
}

impl Use {
    /// How many were at work when this one entered, itself included.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let Some(shard) = self.of.shard(self.key) else { return };
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = shard.get_mut(&self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                shard.remove(&self.key);
            }
        }
        // What a flood of keys has left behind is given back.
        if shard.is_empty() && shard.capacity() > 1024 {
            shard.shrink_to(64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_enter_as_may_and_each_that_leaves_makes_room() {
        let table = Arc::new(InUse::default());
        let first = table.enter("a", 2).unwrap();
        let second = table.enter("a", 2).unwrap();
        assert_eq!((first.number(), second.number()), (1, 2));
        assert!(table.enter("a", 2).is_none());
        assert!(table.enter("b", 1).is_some(), "another key has its own count");
        drop(first);
        assert_eq!(table.enter("a", 2).map(|entered| entered.number()), Some(2));
        drop(second);
        assert!(table.is_empty(), "nothing is left behind");
        assert!(table.enter("a", 0).is_none());
        assert!(table.is_empty());
    }

    #[test]
    fn threads_never_exceed_the_limit_together() {
        let table = Arc::new(InUse::default());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let entered: Vec<_> = (0..3).filter_map(|_| table.enter("a", 5)).collect();
                        assert!(entered.iter().all(|entered| entered.number() <= 5));
                    }
                });
            }
        });
        assert!(table.is_empty());
    }
}
