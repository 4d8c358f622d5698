//! Knowing that every worker has seen a change.
//!
//! A worker never looks at anything in the middle of a poll: once it has gone round after a change was published, each
//! request that it begins to send goes by the change. Every worker counts its turns with its clock, so that a quiet one
//! goes round too.

use std::sync::{Arc, OnceLock};

use crate::worker::context::Stats;

/// The turns of all workers. Empty until they run, and then nobody is waited for.
#[derive(Clone, Debug, Default)]
pub struct Turns(Arc<OnceLock<Vec<Arc<Stats>>>>);

/// Where each worker was at a moment.
#[derive(Clone, Debug)]
pub struct Moment(Vec<u64>);

impl Turns {
    /// These are the workers, from now on.
    pub fn watch(&self, workers: &[Arc<Stats>]) {
        // Workers start once in a process.
        let _ = self.0.set(workers.to_vec());
    }

    /// Where they are now. Call it after the change was published.
    pub fn now(&self) -> Moment {
        Moment(self.counts().collect())
    }

    /// The workers that have not gone round since that moment.
    pub fn behind(&self, moment: &Moment) -> usize {
        // Two turns: the first may have been counted by a worker that was still in it.
        let is_behind = |(now, then): &(u64, u64)| now.saturating_sub(*then) < 2;
        self.counts().zip(moment.0.iter().copied()).filter(is_behind).count()
    }

    fn counts(&self) -> impl Iterator<Item = u64> {
        self.0.get().into_iter().flatten().map(|stats| stats.turns.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_has_to_go_round() {
        let turns = Turns::default();
        assert_eq!(turns.behind(&turns.now()), 0, "no worker, nobody to wait for");
        let workers: Vec<Arc<Stats>> = vec![Arc::default(), Arc::default()];
        turns.watch(&workers);
        let before = turns.now();
        assert_eq!(turns.behind(&before), 2);
        workers.iter().for_each(|worker| worker.turns.add(1));
        assert_eq!(turns.behind(&before), 2, "one turn may have begun before");
        workers.iter().take(1).for_each(|worker| worker.turns.add(5));
        assert_eq!(turns.behind(&before), 1);
        workers.iter().for_each(|worker| worker.turns.add(1));
        assert_eq!(turns.behind(&before), 0);
    }
}
