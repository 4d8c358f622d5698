//! Values that were made when they were first needed, and are kept while there is room: the one that was used the longest ago
//! goes. Somebody who holds one keeps it alive.

use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use hashbrown::HashMap;

/// Values by key, at most so many.
pub struct Recent<K, V> {
    most: usize,
    known: Mutex<HashMap<K, (V, Instant)>>,
}

impl<K: Eq + Hash + Clone, V: Clone> Recent<K, V> {
    /// Room for `most`.
    pub fn new(most: usize) -> Self {
        Self { most, known: Mutex::default() }
    }

    /// What there are values of.
    pub fn keys(&self) -> Vec<K> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// The value of `key`, made by `make` if there is none.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn find<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((value, used)) = known.get_mut(&key) {
            *used = now;
            return Ok(value.clone());
        }
        let value = make()?;
        if known.len() >= self.most
            && let Some(oldest) = known.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone())
        {
            known.remove(&oldest);
        }
        known.insert(key, (value.clone(), now));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_the_longest_ago_goes() {
        let recent = Recent::new(2);
        let made = |key: u8| recent.find(key, || Ok::<_, ()>(Instant::now()));
        let (one, two) = (made(1), made(2));
        assert_eq!(made(1), one, "it is kept");
        let three = made(3);
        assert_eq!((made(1), made(3)), (one, three));
        assert_ne!(made(2), two, "it had gone");
        assert_eq!(Recent::<u8, u8>::new(1).find(1, || Err("no")), Err("no"));
    }
}
