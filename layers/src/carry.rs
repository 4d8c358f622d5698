//! What lives over a reload: counters, pools, tokens.
//!
//! A plugin or cluster asks for its state under a key; while anybody still holds the state of that key, the same one
//! comes back, so an edit elsewhere in the configuration resets nothing. Used on the control thread only.

use std::any::{Any, TypeId};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hashbrown::HashMap;

type Kept = Weak<dyn Any + Send + Sync>;

/// State kept over reloads, by type and key.
#[derive(Default)]
pub struct Carry {
    kept: Mutex<HashMap<(TypeId, Box<str>), Kept>>,
}

impl Carry {
    /// The state under `key`, made now if nobody holds one. The key has to name the owner (`routes/1/limit-count`)
    /// and whatever of its settings makes old state useless.
    pub fn get_or<T: Send + Sync + 'static>(&self, key: &str, make: impl FnOnce() -> T) -> Arc<T> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let id = (TypeId::of::<T>(), Box::from(key));
        if let Some(state) =
            kept.get(&id).and_then(Weak::upgrade).and_then(|state| state.downcast::<T>().ok())
        {
            return state;
        }
        let state = Arc::new(make());
        let erased: Arc<dyn Any + Send + Sync> = state.clone();
        kept.insert(id, Arc::downgrade(&erased));
        state
    }

    /// The state under `key`, if somebody holds one.
    pub fn find<T: Send + Sync + 'static>(&self, key: &str) -> Option<Arc<T>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(&(TypeId::of::<T>(), Box::from(key)))?.upgrade()?.downcast().ok()
    }

    /// Forgets keys whose state nobody holds any more.
    pub fn sweep(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|_, state| state.strong_count() > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_lives_as_long_as_somebody_holds_it() {
        let carry = Carry::default();
        let first = carry.get_or("routes/1", || 1_u32);
        assert_eq!(*carry.get_or("routes/1", || 2_u32), 1);
        drop(first);
        assert_eq!(*carry.get_or("routes/1", || 3_u32), 3);
    }
}
