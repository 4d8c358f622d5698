//! The time, given from outside: the wall clock that certificates are judged by, and one that only runs forward.
//!
//! Whoever waits for a moment of the wall clock pauses for a while and looks again, because it may be set and machines may
//! sleep. A [`ManualClock`] moves when it is told to, by days if need be.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::BoxFuture;
use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;
use tokio::sync::Notify;

/// Tells the time.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The wall clock, which may be set.
    fn now(&self) -> SystemTime;

    /// Time since any moment, which only grows. It may stand still while the machine sleeps.
    fn elapsed(&self) -> Duration;

    /// Waits so long by [`elapsed`](Self::elapsed).
    fn pause(&self, time: Duration) -> BoxFuture<'static, ()>;
}

/// The clocks of the machine.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl SystemClock {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Instant::now()))
    }
}

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    fn pause(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(time))
    }
}

/// A clock that stands until it is moved. Clones are the same.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Manual>);

#[derive(Debug)]
struct Manual {
    state: Mutex<(SystemTime, Duration)>,
    moved: Notify,
}

impl ManualClock {
    pub fn new(now: SystemTime) -> Self {
        Self(Arc::new(Manual { state: Mutex::new((now, Duration::ZERO)), moved: Notify::new() }))
    }

    fn state(&self) -> MutexGuard<'_, (SystemTime, Duration)> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time passes.
    pub fn advance(&self, by: Duration) {
        {
            let mut state = self.state();
            state.0 += by;
            state.1 += by;
        }
        self.0.moved.notify_waiters();
    }

    /// Somebody sets the wall clock.
    pub fn set(&self, now: SystemTime) {
        self.state().0 = now;
        self.0.moved.notify_waiters();
    }
}

impl Clock for ManualClock {
    fn now(&self) -> SystemTime {
        self.state().0
    }

    fn elapsed(&self) -> Duration {
        self.state().1
    }

    fn pause(&self, time: Duration) -> BoxFuture<'static, ()> {
        let clock = self.clone();
        let until = clock.elapsed() + time;
        Box::pin(async move {
            loop {
                let moved = clock.0.moved.notified();
                tokio::pin!(moved);
                // From here on no move is missed.
                moved.as_mut().enable();
                if clock.elapsed() >= until {
                    return;
                }
                moved.await;
            }
        })
    }
}

/// A clock as rustls asks it.
#[derive(Debug)]
pub struct Seconds(pub Arc<dyn Clock>);

impl TimeProvider for Seconds {
    fn current_time(&self) -> Option<UnixTime> {
        let since = self.0.now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}
