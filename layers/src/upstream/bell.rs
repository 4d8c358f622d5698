//! The one waker of a connection that many tasks use in turn.
//!
//! What a connection waits for is registered under its bell once, not anew for each task. The bell wakes the task that
//! has the connection now; while nobody has it, it only remembers that there is something to look at.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Wake, Waker};

use futures_util::task::AtomicWaker;

/// The owner's end of a bell.
#[derive(Debug)]
pub(crate) struct Bell {
    state: Arc<State>,
    waker: Waker,
}

#[derive(Debug)]
struct State {
    rung: AtomicBool,
    muted: AtomicBool,
    task: AtomicWaker,
}

impl Wake for State {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.muted.load(Relaxed) {
            self.rung.store(true, Relaxed);
            self.task.wake();
        }
    }
}

impl Default for Bell {
    fn default() -> Self {
        // What is new has not been looked at.
        let rung = AtomicBool::new(true);
        let state = Arc::new(State { rung, muted: AtomicBool::new(false), task: AtomicWaker::new() });
        Self { waker: Waker::from(state.clone()), state }
    }
}

impl Bell {
    /// Wakes the running task from now on.
    pub(crate) fn attach(&self, cx: &Context<'_>) {
        self.state.task.register(cx.waker());
    }

    /// Wakes nobody.
    pub(crate) fn detach(&self) {
        self.state.task.take();
    }

    /// What to poll with.
    pub(crate) fn context(&self) -> Context<'_> {
        Context::from_waker(&self.waker)
    }

    /// Does what would ring it without need: taking something makes room for more.
    pub(crate) fn unheard<T>(&self, action: impl FnOnce() -> T) -> T {
        self.state.muted.store(true, Relaxed);
        let done = action();
        self.state.muted.store(false, Relaxed);
        done
    }

    /// Whether it was rung since it was last answered.
    pub(crate) fn answer(&self) -> bool {
        self.state.rung.swap(false, Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Relaxed);
        }
    }

    #[test]
    fn it_wakes_who_is_attached_and_remembers_for_the_others() {
        let (bell, woken) = (Bell::default(), Arc::<Woken>::default());
        let was_woken = || woken.0.swap(false, Relaxed);
        assert!(bell.answer() && !bell.answer(), "a new one is to be looked at");
        bell.context().waker().wake_by_ref();
        assert!(bell.answer());
        bell.attach(&Context::from_waker(&Waker::from(woken.clone())));
        bell.context().waker().wake_by_ref();
        assert!(was_woken());
        bell.attach(&Context::from_waker(&Waker::from(woken.clone())));
        bell.detach();
        bell.context().waker().wake_by_ref();
        assert!(!was_woken() && bell.answer());
        bell.unheard(|| bell.context().waker().wake_by_ref());
        assert!(!bell.answer());
    }
}
