//! The upstream connections of one worker, ready to be used again.
//!
//! HTTP/1 connections are taken last in, first out, so that what is not needed grows old and is closed; HTTP/2
//! connections are shared, one for each worker and endpoint while that has room. A connection is kept only when
//! both messages on it were finished; its key holds everything that makes a peer another peer. Nothing here
//! crosses threads, and a configuration change closes nothing that is in use.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::task::unconstrained;

use super::endpoint::EndpointState;
use super::http1::connection::Http1;
use super::send::{Http2, Http2Stream};
use crate::error::Reason;

/// How often idle connections are looked at while there are any.
const SWEEP: Duration = Duration::from_secs(1);

/// How many idle connections are kept and for how long. APISIX `keepalive_pool`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle connections of one worker to one endpoint.
    pub size: usize,
    /// How long one may be idle; none for ever.
    pub idle: Option<Duration>,
    /// Requests one serves.
    pub requests: u32,
}

/// What makes connections interchangeable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key<'a> {
    /// The endpoint's id.
    pub(crate) endpoint: u64,
    /// Number of the scheme and TLS identity; edits of an upstream that change them change it.
    pub(crate) transport: u64,
    /// TLS name, where there is TLS. Often the client chooses it, so it does not open a pool of its own: limits hold for
    /// all names together.
    pub(crate) name: Option<&'a str>,
}

/// A key without its name.
type Place = (u64, u64);

impl Key<'_> {
    fn place(&self) -> Place {
        (self.endpoint, self.transport)
    }
}

/// The connections of one worker. Clones are the same pool.
#[derive(Clone, Debug, Default)]
pub struct Pool(Rc<RefCell<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    idle: HashMap<Place, Resting>,
    shared: HashMap<Place, Shared>,
    sweeping: bool,
}

/// The idle connections of one place.
#[derive(Debug)]
struct Resting {
    endpoint: Arc<EndpointState>,
    list: Vec<Idle>,
}

#[derive(Debug)]
struct Idle {
    name: Option<Box<str>>,
    connection: Http1,
    since: Instant,
    expires: Option<Instant>,
}

#[derive(Debug)]
struct Shared {
    endpoint: Arc<EndpointState>,
    connections: SmallVec<[Open; 1]>,
    dialing: SmallVec<[Dialled; 1]>,
}

/// A connection in the making, and the name it is made under.
type Dialled = (Option<Box<str>>, Rc<Dial>);

#[derive(Debug)]
struct Open {
    name: Option<Box<str>>,
    connection: Http2,
    keepalive: Keepalive,
}

impl Shared {
    fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.dialing.is_empty()
    }

    /// Let go of the connections that have been idle the longest while there are more than `size`.
    fn trim(&mut self, size: usize) {
        loop {
            let idle = self.connections.iter().enumerate();
            let idle = idle.filter_map(|(index, open)| Some((open.connection.idle_since()?, index)));
            let count = idle.clone().count();
            match idle.min() {
                Some((_, oldest)) if count > size => drop(self.connections.swap_remove(oldest)),
                _ => return,
            }
        }
    }
}

/// An HTTP/2 connection that is being made; others wait for it instead of making their own.
#[derive(Debug, Default)]
pub(crate) struct Dial {
    done: Notify,
    failed: RefCell<Option<Reason>>,
}

impl Dial {
    /// Wait until it is over. Says why it failed if it did.
    pub(crate) async fn wait(&self) -> Option<Reason> {
        self.done.notified().await;
        *self.failed.borrow()
    }
}

/// What a request for a stream gets.
pub(crate) enum Claim {
    Stream(Http2Stream),
    /// Make a connection, and tell the others by the guard.
    Dial(Dialing),
    /// Another request makes one.
    Wait(Rc<Dial>),
}

/// The duty to connect. Dropped without an outcome, the others try for themselves.
pub(crate) struct Dialing {
    pool: Weak<RefCell<Inner>>,
    place: Place,
    name: Option<Box<str>>,
    dial: Rc<Dial>,
}

impl Dialing {
    /// The connection stands: share it, and take the first stream.
    pub(crate) fn connected(mut self, connection: &Http2, keepalive: Keepalive) -> Http2Stream {
        let stream = connection.stream();
        if let Some(pool) = self.pool.upgrade() {
            let mut inner = pool.borrow_mut();
            if let Some(shared) = inner.shared.get_mut(&self.place) {
                let (name, connection) = (self.name.take(), connection.clone());
                shared.connections.push(Open { name, connection, keepalive });
                shared.trim(keepalive.size);
            }
            drop(inner);
            Pool(pool).sweep();
        }
        stream
    }

    /// It did not come about; everybody who waits fails alike.
    pub(crate) fn failed(self, reason: Reason) {
        self.dial.failed.replace(Some(reason));
    }
}

impl Drop for Dialing {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            let mut inner = pool.borrow_mut();
            if let Some(shared) = inner.shared.get_mut(&self.place) {
                shared.dialing.retain(|(_, dial)| !Rc::ptr_eq(dial, &self.dial));
                if shared.is_empty() {
                    inner.shared.remove(&self.place);
                }
            }
        }
        self.dial.done.notify_waiters();
    }
}

impl Pool {
    /// The most recently used idle connection that is still open. What comes over it wakes the task of `cx`.
    pub(crate) fn take(&self, key: Key<'_>, now: Instant, cx: &mut Context<'_>) -> Option<Http1> {
        let mut inner = self.0.borrow_mut();
        let idle = &mut inner.idle.get_mut(&key.place())?.list;
        while let Some(youngest) = idle.iter().rposition(|idle| idle.name.as_deref() == key.name) {
            let mut candidate = idle.remove(youngest);
            let expired = candidate.expires.is_some_and(|at| at <= now);
            if !expired && candidate.connection.is_still_ready(cx) {
                return Some(candidate.connection);
            }
        }
        None
    }

    /// Keep a connection whose request and response are finished `now`. It is closed instead when it is not ready for
    /// another request, has served its share, the pool is full of younger ones, or its endpoint takes no more requests.
    pub(crate) fn put(
        &self,
        endpoint: &Arc<EndpointState>,
        key: Key<'_>,
        connection: Http1,
        keepalive: Keepalive,
        now: Instant,
    ) {
        if endpoint.has_left()
            || connection.is_stale()
            || !connection.is_ready()
            || connection.served() >= keepalive.requests
            || keepalive.size == 0
        {
            return connection.part();
        }
        let limit = [keepalive.idle, connection.idle_limit()].into_iter().flatten().min();
        let idle = Idle {
            name: key.name.map(Into::into),
            connection,
            since: now,
            expires: limit.map(|limit| now + limit),
        };
        let mut inner = self.0.borrow_mut();
        let resting = inner.idle.entry(key.place());
        let resting = resting.or_insert_with(|| Resting { endpoint: Arc::clone(endpoint), list: Vec::new() });
        let list = &mut resting.list;
        if list.len() >= keepalive.size {
            let cx = &mut Context::from_waker(Waker::noop());
            list.retain_mut(|idle| idle.connection.is_still_ready(cx));
        }
        if list.len() >= keepalive.size {
            // The oldest are the least likely to be needed. An edit may have made the pool smaller.
            list.drain(..list.len() - keepalive.size + 1);
        }
        list.push(idle);
        drop(inner);
        self.sweep();
    }

    /// A stream on a shared connection, or what to do to get one.
    pub(crate) fn claim(&self, endpoint: &Arc<EndpointState>, key: Key<'_>) -> Claim {
        let mut inner = self.0.borrow_mut();
        let shared = inner.shared.entry(key.place()).or_insert_with(|| Shared {
            endpoint: Arc::clone(endpoint),
            connections: SmallVec::new(),
            dialing: SmallVec::new(),
        });
        shared.connections.retain(|open| {
            !open.connection.is_retired() && open.connection.served() < open.keepalive.requests
        });
        let mut connections = shared.connections.iter().filter(|open| open.name.as_deref() == key.name);
        if let Some(open) = connections.find(|open| open.connection.has_room()) {
            return Claim::Stream(open.connection.stream());
        }
        if let Some((_, dial)) = shared.dialing.iter().find(|(name, _)| name.as_deref() == key.name) {
            return Claim::Wait(Rc::clone(dial));
        }
        let (dial, name) = (Rc::<Dial>::default(), key.name.map(Box::<str>::from));
        shared.dialing.push((name.clone(), Rc::clone(&dial)));
        Claim::Dial(Dialing { pool: Rc::downgrade(&self.0), place: key.place(), name, dial })
    }

    /// See that idle connections are looked at; the task ends when there are none.
    fn sweep(&self) {
        if std::mem::replace(&mut self.0.borrow_mut().sweeping, true) {
            return;
        }
        let pool = Rc::downgrade(&self.0);
        // Without a budget: when many have closed at once, it would be used up before the last one is looked at.
        tokio::task::spawn_local(unconstrained(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                let Some(pool) = pool.upgrade() else { return };
                let mut inner = pool.borrow_mut();
                inner.expire(Instant::now());
                if inner.idle.is_empty() && inner.shared.is_empty() {
                    inner.sweeping = false;
                    return;
                }
            }
        }));
    }
}

impl Inner {
    fn expire(&mut self, now: Instant) {
        let cx = &mut Context::from_waker(Waker::noop());
        self.idle.retain(|_, Resting { endpoint, list }| {
            if endpoint.has_left() {
                return false;
            }
            list.retain_mut(|idle| {
                idle.connection.is_still_ready(cx) && idle.expires.is_none_or(|expires| expires > now)
            });
            debug_assert!(list.is_sorted_by_key(|idle| idle.since), "the oldest is first");
            !list.is_empty()
        });
        self.shared.retain(|_, shared| {
            let has_left = shared.endpoint.has_left();
            shared.connections.retain(|open| {
                if has_left {
                    // Streams that are open end in peace.
                    open.connection.retire();
                }
                let idle = open.connection.idle_since().map(|since| now.saturating_duration_since(since));
                let expired = idle.zip(open.keepalive.idle).is_some_and(|(idle, limit)| idle >= limit);
                !open.connection.is_retired() && !expired
            });
            if let Some(size) = shared.connections.iter().map(|open| open.keepalive.size).max() {
                shared.trim(size);
            }
            !shared.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use tokio::net::TcpListener;
    use tokio::task::LocalSet;

    use super::super::connect;
    use super::super::endpoint::EndpointKey;
    use super::*;

    fn endpoint() -> Arc<EndpointState> {
        let key = EndpointKey { addr: "10.0.0.1:80".parse().unwrap(), host: "a".into() };
        Arc::new(EndpointState::new(key))
    }

    fn quiet() -> Context<'static> {
        Context::from_waker(Waker::noop())
    }

    async fn connection(listener: &TcpListener) -> Http1 {
        let addr = listener.local_addr().unwrap();
        let io = connect::connect(addr, None, None, Duration::from_secs(5)).await.unwrap();
        let mut connection = Http1::new(io);
        assert!(connection.is_still_ready(&mut quiet()));
        connection
    }

    #[tokio::test]
    async fn names_that_clients_choose_do_not_open_pools_of_their_own() {
        let test = async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let pool = Pool::default();
            let (now, cx) = (Instant::now(), &mut quiet());
            let keepalive = Keepalive { size: 2, idle: None, requests: 10 };
            let key = |name| Key { endpoint: 1, transport: 1, name: Some(name) };
            for name in ["a", "b", "c"] {
                pool.put(&endpoint(), key(name), connection(&listener).await, keepalive, Instant::now());
            }
            assert!(pool.take(key("a"), now, cx).is_none(), "the oldest had to go");
            assert!(
                pool.take(Key { name: None, ..key("b") }, now, cx).is_none(),
                "a name is never another's"
            );
            assert!(pool.take(Key { transport: 2, ..key("b") }, now, cx).is_none(), "nor is an identity");
            assert!(pool.take(Key { endpoint: 2, ..key("b") }, now, cx).is_none(), "nor is an endpoint");
            assert!(pool.take(key("b"), now, cx).is_some() && pool.take(key("c"), now, cx).is_some());
            assert!(pool.take(key("b"), now, cx).is_none(), "one is taken once");
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_sweep_lets_go_of_what_the_peer_has_closed() {
        let test = async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let pool = Pool::default();
            let keepalive = Keepalive { size: 400, idle: None, requests: 10 };
            let key = Key { endpoint: 1, transport: 1, name: None };
            let kept = || pool.0.borrow().idle.values().map(|resting| resting.list.len()).sum::<usize>();
            let mut peers = Vec::new();
            for _ in 0..300 {
                pool.put(&endpoint(), key, connection(&listener).await, keepalive, Instant::now());
                peers.push(listener.accept().await.unwrap());
            }
            pool.0.borrow_mut().expire(Instant::now());
            assert_eq!(kept(), 300, "all are open");
            peers.truncate(1);
            let deadline = Instant::now() + Duration::from_secs(10);
            while kept() > 1 {
                assert!(Instant::now() < deadline, "{} are kept", kept());
                tokio::time::sleep(Duration::from_millis(1)).await;
                pool.0.borrow_mut().expire(Instant::now());
            }
        };
        LocalSet::new().run_until(unconstrained(test)).await;
    }

    #[tokio::test]
    async fn nothing_is_kept_for_an_endpoint_that_takes_no_more_requests() {
        let test = async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let pool = Pool::default();
            let keepalive = Keepalive { size: 4, idle: None, requests: 10 };
            let key = Key { endpoint: 1, transport: 1, name: None };
            let endpoint = endpoint();
            pool.put(&endpoint, key, connection(&listener).await, keepalive, Instant::now());
            endpoint.leave();
            pool.put(&endpoint, key, connection(&listener).await, keepalive, Instant::now());
            assert_eq!(pool.0.borrow().idle.values().map(|resting| resting.list.len()).sum::<usize>(), 1);
            pool.0.borrow_mut().expire(Instant::now());
            assert!(pool.0.borrow().idle.is_empty(), "the one that idled is closed too");
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_connection_that_was_never_made_leaves_nothing_behind() {
        let pool = Pool::default();
        let key = Key { endpoint: 1, transport: 1, name: Some("a") };
        let Claim::Dial(dialing) = pool.claim(&endpoint(), key) else { unreachable!("nothing is there yet") };
        let Claim::Wait(dial) = pool.claim(&endpoint(), key) else { unreachable!("somebody dials") };
        let (outcome, ()) = tokio::join!(dial.wait(), async { dialing.failed(Reason::ConnectFailed) });
        assert_eq!(outcome, Some(Reason::ConnectFailed));
        assert!(pool.0.borrow().shared.is_empty());
        assert!(matches!(pool.claim(&endpoint(), key), Claim::Dial(_)));
        assert!(pool.0.borrow().shared.is_empty(), "given up without an outcome, others may try");
    }
}
