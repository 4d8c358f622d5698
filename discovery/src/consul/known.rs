//! The instances of the last list of a service.

use std::collections::HashMap;

use super::cluster::Told;
use crate::source::{Instance, Listing, Standing};

/// What a registry listed last, by id: the index at which it was created, and what it was taken for.
#[derive(Debug, Default)]
pub(crate) struct Known(HashMap<Box<str>, (u64, Option<Instance>)>);

impl Known {
    /// The list of an answer. An instance that has not changed is the one of the list before, memory and all, for thousands
    /// of answers tell nothing new.
    ///
    /// A registry that was away and in which nothing stands that stood before has lost its memory, even if its index has
    /// overtaken the one before in the meantime.
    pub(crate) fn listing(
        &mut self,
        told: &Told,
        found: impl IntoIterator<Item = (String, u64, Option<Instance>)>,
        stand_in: Option<&Instance>,
    ) -> Listing {
        let mut survivors = self.0.is_empty();
        let mut known = HashMap::new();
        let mut instances = Vec::new();
        for (id, created, now) in found {
            let before = self.0.remove(&*id);
            survivors |= before.as_ref().is_some_and(|(then, _)| *then == created);
            let now = match before.and_then(|(_, before)| before) {
                Some(before) if now.as_ref() == Some(&before) => Some(before),
                _ => now,
            };
            instances.extend(now.clone());
            known.insert(id.into(), (created, now));
        }
        self.0 = known;
        instances.extend(stand_in.cloned());
        let lost = told.after_failure && !survivors;
        let standing = if lost { Standing::Restarted } else { told.standing };
        Listing { instances, standing, again: told.again }
    }
}
