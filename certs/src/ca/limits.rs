//! How much is signed, and for whom first.
//!
//! Each identity may ask every ten seconds, and five times at once; each kind of attestation fifty times a second. What is
//! to be signed waits for a place in a bounded queue: renewals before first certificates, because a renewal that comes too
//! late ends something that works. Every eighth place goes to a first certificate all the same, so that none waits for ever.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// How fast something may be asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    pub per_second: f64,
    pub burst: f64,
}

/// The limits of a service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    pub identity: Rate,
    pub attestor: Rate,
    /// Signatures at a time.
    pub signers: usize,
    /// Requests that wait for one.
    pub queue: usize,
    pub connections: usize,
    /// Streams of trust.
    pub watchers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            identity: Rate { per_second: 0.1, burst: 5.0 },
            attestor: Rate { per_second: 50.0, burst: 50.0 },
            signers: std::thread::available_parallelism().map_or(2, usize::from),
            queue: 1024,
            connections: 20_000,
            watchers: 20_000,
        }
    }
}

/// Keys that are remembered. Those that have not asked for long are like those that never did.
const KEYS: usize = 100_000;

/// A token bucket for each key. Time is given by the caller and counts from any moment.
#[derive(Debug)]
pub struct Buckets<K> {
    rate: Rate,
    state: Mutex<HashMap<K, Bucket>>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    level: f64,
    at: Duration,
}

impl<K: Eq + Hash> Buckets<K> {
    pub fn new(rate: Rate) -> Self {
        Self { rate, state: Mutex::default() }
    }

    /// Takes one, or says when there will be one.
    ///
    /// # Errors
    /// There is none: the time until there is.
    pub fn take(&self, key: K, now: Duration) -> Result<(), Duration> {
        let Rate { per_second, burst } = self.rate;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let level = |bucket: &Bucket| {
            (bucket.level + now.saturating_sub(bucket.at).as_secs_f64() * per_second).min(burst)
        };
        if state.len() >= KEYS && !state.contains_key(&key) {
            state.retain(|_, bucket| level(bucket) < burst);
            if state.len() >= KEYS {
                return Err(Duration::from_secs(1));
            }
        }
        let bucket = state.entry(key).or_insert(Bucket { level: burst, at: now });
        let now_level = level(bucket);
        if now_level < 1.0 {
            let missing = (1.0 - now_level) / per_second.max(f64::MIN_POSITIVE);
            return Err(Duration::try_from_secs_f64(missing)
                .unwrap_or(Duration::MAX)
                .max(Duration::from_millis(1)));
        }
        *bucket = Bucket { level: now_level - 1.0, at: now.max(bucket.at) };
        Ok(())
    }
}

/// What a request for a signature is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    Renewal,
    First,
}

/// There is no place, and somebody is to come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many certificates are asked for")]
pub struct Full;

/// The places at which is signed, and the queue before them.
#[derive(Clone, Debug)]
pub struct Desk(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    free: usize,
    queue: usize,
    renewals: VecDeque<oneshot::Sender<()>>,
    firsts: VecDeque<oneshot::Sender<()>>,
    /// Renewals that were let in since the last first certificate.
    in_a_row: u32,
}

/// After so many renewals comes a first certificate, if one waits.
const IN_A_ROW: u32 = 7;

impl Desk {
    pub fn new(signers: usize, queue: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            free: signers.max(1),
            queue,
            renewals: VecDeque::new(),
            firsts: VecDeque::new(),
            in_a_row: 0,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place; it is given back when it is dropped.
    ///
    /// # Errors
    /// The queue is full, or this request had to make room for a renewal.
    pub async fn place(&self, class: Class) -> Result<Place, Full> {
        let called = {
            let mut state = self.state();
            if state.free > 0 {
                state.free -= 1;
                return Ok(Place(self.clone()));
            }
            state.renewals.retain(|waiting| !waiting.is_closed());
            state.firsts.retain(|waiting| !waiting.is_closed());
            if state.renewals.len() + state.firsts.len() >= state.queue {
                // The last that came without a certificate makes room for one that would lose his.
                if class == Class::First || state.firsts.pop_back().is_none() {
                    return Err(Full);
                }
            }
            let (call, called) = oneshot::channel();
            match class {
                Class::Renewal => state.renewals.push_back(call),
                Class::First => state.firsts.push_back(call),
            }
            called
        };
        let mut waiting = Waiting { desk: self, called: Some(called) };
        let called = match &mut waiting.called {
            Some(called) => called.await,
            None => return Err(Full),
        };
        waiting.called = None;
        called.map(|()| Place(self.clone())).map_err(|_| Full)
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        let state = self.state();
        state.renewals.len() + state.firsts.len()
    }

    fn give_back(&self) {
        let mut state = self.state();
        loop {
            let first = state.renewals.is_empty() || (state.in_a_row >= IN_A_ROW && !state.firsts.is_empty());
            let next = if first { state.firsts.pop_front() } else { state.renewals.pop_front() };
            let Some(next) = next else {
                state.free += 1;
                return;
            };
            if next.send(()).is_ok() {
                state.in_a_row = if first { 0 } else { state.in_a_row + 1 };
                return;
            }
        }
    }
}

/// Somebody in the queue. If he is called and leaves at that moment, the place goes to the next one.
struct Waiting<'a> {
    desk: &'a Desk,
    called: Option<oneshot::Receiver<()>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(mut called) = self.called.take() {
            called.close();
            if called.try_recv().is_ok() {
                self.desk.give_back();
            }
        }
    }
}

/// A place at which is signed.
#[derive(Debug)]
pub struct Place(Desk);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.give_back();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures_util::future::{FutureExt, poll_immediate};

    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let buckets = Buckets::new(Rate { per_second: 0.1, burst: 5.0 });
        let at = Duration::from_secs;
        for _ in 0..5 {
            assert_eq!(buckets.take("a", at(100)), Ok(()));
        }
        assert_eq!(buckets.take("a", at(100)), Err(at(10)));
        assert_eq!(buckets.take("b", at(100)), Ok(()), "others are not concerned");
        assert_eq!(buckets.take("a", at(109)), Err(at(1)));
        assert_eq!(buckets.take("a", at(110)), Ok(()));
        assert!(buckets.take("a", at(110)).is_err());
        assert!(buckets.take("a", at(50)).is_err(), "a clock that goes back gives nothing");
        for _ in 0..5 {
            assert_eq!(buckets.take("a", at(10_000)), Ok(()));
        }
        assert!(buckets.take("a", at(10_000)).is_err());
    }

    #[test]
    fn no_more_is_given_than_the_rate_whenever_it_is_asked() {
        let mut rng = fastrand::Rng::new();
        for _ in 0..50 {
            let rate = Rate { per_second: rng.f64() * 10.0 + 0.01, burst: f64::from(rng.u32(1..20)) };
            let buckets = Buckets::new(rate);
            let (mut now, mut given) = (Duration::from_secs(1), 0.0);
            for _ in 0..500 {
                now += Duration::from_millis(rng.u64(0..400));
                match buckets.take((), now) {
                    Ok(()) => given += 1.0,
                    Err(wait) => {
                        let wait = wait + Duration::from_millis(1);
                        // Who waits as he was told is served.
                        if rng.bool() {
                            now += wait;
                            assert_eq!(buckets.take((), now), Ok(()), "{rate:?} {wait:?}");
                            given += 1.0;
                        }
                    }
                }
                let most = rate.burst + (now - Duration::from_secs(1)).as_secs_f64() * rate.per_second;
                assert!(given <= most + 1e-6, "{given} of {most}");
            }
        }
    }

    #[tokio::test]
    async fn renewals_are_served_before_first_certificates_and_do_not_starve_them() {
        let desk = Desk::new(1, 100);
        let place = desk.place(Class::First).await.unwrap();
        let mut waiting: Vec<_> = (0..2)
            .map(|_| Class::First)
            .chain((0..10).map(|_| Class::Renewal))
            .map(|class| {
                let desk = desk.clone();
                let mut future = async move { desk.place(class).await.map(|place| (class, place)) }.boxed();
                assert!(poll_immediate(&mut future).now_or_never().unwrap().is_none());
                future
            })
            .collect();
        let mut order = Vec::new();
        drop(place);
        while !waiting.is_empty() {
            let mut served = None;
            for (index, future) in waiting.iter_mut().enumerate() {
                if let Some(Ok(place)) = poll_immediate(future).await {
                    served = Some((index, place));
                    break;
                }
            }
            let (index, (class, place)) = served.expect("one of them has the place");
            drop(waiting.remove(index));
            order.push(class);
            drop(place);
        }
        assert!(order[..7].iter().all(|class| *class == Class::Renewal), "{order:?}");
        assert_eq!(order[7], Class::First, "{order:?}");
    }

    #[tokio::test]
    async fn a_full_queue_refuses_and_a_renewal_takes_the_place_of_a_first_one() {
        let desk = Desk::new(1, 1);
        let place = desk.place(Class::Renewal).await.unwrap();
        let mut first = Box::pin(desk.place(Class::First));
        assert!(poll_immediate(&mut first).await.is_none());
        assert_eq!(desk.place(Class::First).await.unwrap_err(), Full);
        let mut renewal = Box::pin(desk.place(Class::Renewal));
        assert!(poll_immediate(&mut renewal).await.is_none());
        assert_eq!(first.await.unwrap_err(), Full);
        assert_eq!(desk.place(Class::Renewal).await.unwrap_err(), Full);
        drop(place);
        drop(renewal.await.unwrap());
        assert_eq!(desk.waiting(), 0);
    }

    #[tokio::test]
    async fn who_leaves_the_queue_takes_no_place_with_him() {
        for called in [false, true] {
            let desk = Desk::new(1, 10);
            let place = desk.place(Class::First).await.unwrap();
            let mut gone = Box::pin(desk.place(Class::First));
            assert!(poll_immediate(&mut gone).await.is_none());
            if called {
                drop(place);
                drop(gone);
            } else {
                drop(gone);
                drop(place);
            }
            let again = desk.place(Class::First).now_or_never();
            assert!(matches!(again.map_or(Poll::Pending, Poll::Ready), Poll::Ready(Ok(_))));
        }
    }
}
