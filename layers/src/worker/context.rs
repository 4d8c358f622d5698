//! What the parts of one worker share: its number, its clock and deadlines, whether it drains, its counters, and a
//! place for values that every worker has one of (pools, views). Never leaves its thread, except the counters.

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::sync::{Notify, mpsc};

use crate::worker::deadlines::{Clock, Deadlines, Ended, Timeouts};
use crate::worker::drain::Casualty;

/// A count that one worker writes and others read.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// The count now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Only its worker calls this, so no read-modify-write is needed.
    pub(crate) fn add(&self, more: u64) {
        self.0.store(self.get().wrapping_add(more), Relaxed);
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }
}

/// What a worker has done, for metrics. Totals since it started, except where said.
#[derive(Debug, Default)]
pub struct Stats {
    /// Turns of its clock, each a moment at which nothing of the worker is in the middle of anything.
    pub turns: Count,
    /// Connections accepted.
    pub accepted: Count,
    /// Connections closed at once because the worker has its fill.
    pub rejected: Count,
    /// Idle connections closed to make room for new ones.
    pub evicted: Count,
    /// Times accepting failed for want of file descriptors or memory.
    pub starved: Count,
    /// Connections open now.
    pub open: Count,
    /// Tunnels open now.
    pub tunnels: Count,
    /// Requests that came.
    pub requests: Count,
    /// Requests at work now.
    pub in_flight: Count,
    /// TLS handshakes that succeeded, those resumed included.
    pub handshakes: Count,
    /// TLS handshakes that resumed a session.
    pub resumed: Count,
    /// TLS handshakes that failed.
    pub handshakes_failed: Count,
    /// Connections that began with no acceptable PROXY header.
    pub proxy_refused: Count,
    /// Requests whose bytes were refused.
    pub refused: Count,
    /// HTTP/2 connections ended because they only made work.
    pub floods: Count,
    /// Idle connections that gave their buffers back.
    pub parked: Count,
    /// Connections and streams ended from outside, by [`Ended::ALL`].
    pub ended: [Count; Ended::ALL.len()],
}

/// The worker that a part belongs to.
pub struct WorkerContext {
    index: usize,
    workers: usize,
    deadlines: Rc<Deadlines>,
    stats: Arc<Stats>,
    draining: Cell<bool>,
    connections: Cell<usize>,
    /// Told when the last connection is gone.
    pub(crate) empty: Notify,
    casualties: Option<mpsc::UnboundedSender<Casualty>>,
    slots: RefCell<HashMap<TypeId, Rc<dyn Any>>>,
    ticks: RefCell<Vec<Rc<dyn Fn()>>>,
}

impl WorkerContext {
    /// Worker `index` of `workers`. Tests and tools make one without a worker.
    pub fn new(index: usize, workers: usize, timeouts: &Timeouts, stats: Arc<Stats>) -> Rc<Self> {
        Self::reporting(index, workers, timeouts, stats, None)
    }

    pub(crate) fn reporting(
        index: usize,
        workers: usize,
        timeouts: &Timeouts,
        stats: Arc<Stats>,
        casualties: Option<mpsc::UnboundedSender<Casualty>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            index,
            workers,
            deadlines: Deadlines::new(timeouts),
            stats,
            draining: Cell::new(false),
            connections: Cell::new(0),
            empty: Notify::new(),
            casualties,
            slots: RefCell::default(),
            ticks: RefCell::default(),
        })
    }

    /// Which worker this is, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// The worker's deadlines.
    pub fn deadlines(&self) -> &Rc<Deadlines> {
        &self.deadlines
    }

    /// The worker's coarse clock, in ticks.
    pub fn clock(&self) -> &Clock {
        self.deadlines.clock()
    }

    /// The worker's counters.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Whether the worker takes no new connections and closes those it has.
    pub fn is_draining(&self) -> bool {
        self.draining.get()
    }

    pub(crate) fn start_draining(&self) {
        self.draining.set(true);
    }

    /// Client connections open now.
    pub fn connections(&self) -> usize {
        self.connections.get()
    }

    /// The worker's one value of a type, made at the first call: a pool, a view.
    pub fn slot<T: 'static>(&self, make: impl FnOnce() -> T) -> Rc<T> {
        let id = TypeId::of::<T>();
        let found = self.slots.borrow().get(&id).cloned();
        if let Some(value) = found.and_then(|value| value.downcast::<T>().ok()) {
            return value;
        }
        // Made outside of the borrow: it may ask for other slots.
        let value = Rc::new(make());
        self.slots.borrow_mut().insert(id, value.clone());
        value
    }

    /// The worker's value of a type, if somebody has made it.
    pub fn find_slot<T: 'static>(&self) -> Option<Rc<T>> {
        self.slots.borrow().get(&TypeId::of::<T>()).cloned()?.downcast().ok()
    }

    /// Has `call` called at every tick of the clock, as to let go of a former snapshot.
    pub fn on_tick(&self, call: impl Fn() + 'static) {
        self.ticks.borrow_mut().push(Rc::new(call));
    }

    pub(crate) fn tick(&self) {
        self.stats.turns.add(1);
        self.deadlines.tick();
        let calls = self.ticks.borrow().clone();
        calls.iter().for_each(|call| call());
    }

    /// A connection was cut at the end of the drain; whoever ordered it tells the log.
    pub(crate) fn report_casualty(&self, peer: SocketAddr, in_flight: u32) {
        if let Some(casualties) = &self.casualties {
            // Nobody may be asking any more.
            let _ = casualties.send(Casualty { worker: self.index, peer, in_flight });
        }
    }

    pub(crate) fn count_ended(&self, cause: Ended) {
        if let Some(count) = self.stats.ended.get(cause as usize - 1) {
            count.add(1);
        }
    }
}

/// A client connection while it is open.
pub(crate) struct OpenConnection(Rc<WorkerContext>);

impl OpenConnection {
    pub fn new(context: &Rc<WorkerContext>) -> Self {
        context.connections.set(context.connections.get() + 1);
        context.stats.open.set(context.connections.get() as u64);
        Self(context.clone())
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let left = self.0.connections.get() - 1;
        self.0.connections.set(left);
        self.0.stats.open.set(left as u64);
        if left == 0 {
            self.0.empty.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_made_once_and_may_use_others() {
        let context = WorkerContext::new(0, 1, &Timeouts::default(), Arc::default());
        let text = context.slot(|| format!("{}", context.slot(|| 7u32)));
        assert_eq!(*text, "7");
        assert!(Rc::ptr_eq(&text, &context.slot(String::new)));
    }
}
