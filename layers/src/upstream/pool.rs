//! The upstream connections of one worker, ready to be used again.
//!
//! HTTP/1 connections are taken last in, first out, so that what is not needed grows old and is closed; HTTP/2
//! connections are shared, one for each worker and endpoint while that has room. A connection is kept only when
//! both messages on it were finished; its key holds everything that makes a peer another peer. Nothing here
//! crosses threads, and a configuration change closes nothing that is in use.

use std::cell::RefCell;
use std::hash::{Hash, Hasher};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use hashbrown::{Equivalent, HashMap};
use smallvec::SmallVec;
use tokio::sync::Notify;

use super::send::{Http1, Http2, Http2Stream};
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
    /// TLS name, where there is TLS.
    pub(crate) name: Option<&'a str>,
}

#[derive(Debug, PartialEq, Eq)]
struct OwnedKey {
    endpoint: u64,
    transport: u64,
    name: Option<Box<str>>,
}

impl Hash for Key<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.endpoint, self.transport, self.name).hash(state);
    }
}

impl Hash for OwnedKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.endpoint, self.transport, self.name.as_deref()).hash(state);
    }
}

impl Equivalent<OwnedKey> for Key<'_> {
    fn equivalent(&self, key: &OwnedKey) -> bool {
        self.endpoint == key.endpoint && self.transport == key.transport && self.name == key.name.as_deref()
    }
}

impl From<Key<'_>> for OwnedKey {
    fn from(key: Key<'_>) -> Self {
        Self { endpoint: key.endpoint, transport: key.transport, name: key.name.map(Into::into) }
    }
}

/// The connections of one worker. Clones are the same pool.
#[derive(Clone, Debug, Default)]
pub struct Pool(Rc<RefCell<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    idle: HashMap<OwnedKey, Vec<Idle>>,
    shared: HashMap<OwnedKey, Shared>,
    sweeping: bool,
}

#[derive(Debug)]
struct Idle {
    connection: Http1,
    since: Instant,
    expires: Option<Instant>,
}

#[derive(Debug, Default)]
struct Shared {
    connections: SmallVec<[(Http2, Keepalive); 1]>,
    dialing: Option<Rc<Dial>>,
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
    key: OwnedKey,
    dial: Rc<Dial>,
}

impl Dialing {
    /// The connection stands: share it, and take the first stream.
    pub(crate) fn connected(self, connection: &Http2, keepalive: Keepalive) -> Http2Stream {
        let stream = connection.stream();
        if let Some(pool) = self.pool.upgrade() {
            let mut inner = pool.borrow_mut();
            if let Some(shared) = inner.shared.get_mut(&self.key) {
                shared.connections.push((connection.clone(), keepalive));
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
        if let Some(pool) = self.pool.upgrade()
            && let Some(shared) = pool.borrow_mut().shared.get_mut(&self.key)
        {
            shared.dialing = None;
        }
        self.dial.done.notify_waiters();
    }
}

impl Pool {
    /// The most recently used idle connection that is still open.
    pub(crate) fn take(&self, key: Key<'_>) -> Option<Http1> {
        let mut inner = self.0.borrow_mut();
        let idle = inner.idle.get_mut(&key)?;
        let now = Instant::now();
        while let Some(candidate) = idle.pop() {
            let expired = candidate.expires.is_some_and(|at| at <= now);
            if !expired && candidate.connection.is_ready() {
                return Some(candidate.connection);
            }
        }
        None
    }

    /// Keep a connection whose request and response are finished. It is closed instead when it is not ready for
    /// another request, has served its share, or the pool is full of younger ones.
    pub(crate) fn put(&self, key: Key<'_>, connection: Http1, keepalive: Keepalive) {
        if !connection.is_ready() || connection.served() >= keepalive.requests {
            return;
        }
        let now = Instant::now();
        let limit = [keepalive.idle, connection.idle_limit()].into_iter().flatten().min();
        let idle = Idle { connection, since: now, expires: limit.map(|limit| now + limit) };
        let mut inner = self.0.borrow_mut();
        match inner.idle.get_mut(&key) {
            Some(list) => {
                if list.len() >= keepalive.size {
                    list.retain(|idle| !idle.connection.is_closed());
                }
                if list.len() >= keepalive.size {
                    // The oldest is the least likely to be needed.
                    list.remove(0);
                }
                list.push(idle);
            }
            None => {
                inner.idle.insert(key.into(), vec![idle]);
            }
        }
        drop(inner);
        self.sweep();
    }

    /// A stream on a shared connection, or what to do to get one.
    pub(crate) fn claim(&self, key: Key<'_>) -> Claim {
        let mut inner = self.0.borrow_mut();
        if !inner.shared.contains_key(&key) {
            inner.shared.insert(key.into(), Shared::default());
        }
        let dial = match inner.shared.get_mut(&key) {
            None => Rc::default(),
            Some(shared) => {
                shared.connections.retain(|(connection, keepalive)| {
                    !connection.is_retired() && connection.served() < keepalive.requests
                });
                if let Some((connection, _)) = shared.connections.iter().find(|(open, _)| open.has_room()) {
                    return Claim::Stream(connection.stream());
                }
                if let Some(dial) = &shared.dialing {
                    return Claim::Wait(Rc::clone(dial));
                }
                let dial = Rc::<Dial>::default();
                shared.dialing = Some(Rc::clone(&dial));
                dial
            }
        };
        Claim::Dial(Dialing { pool: Rc::downgrade(&self.0), key: key.into(), dial })
    }

    /// See that idle connections are looked at; the task ends when there are none.
    fn sweep(&self) {
        if std::mem::replace(&mut self.0.borrow_mut().sweeping, true) {
            return;
        }
        let pool = Rc::downgrade(&self.0);
        tokio::task::spawn_local(async move {
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
        });
    }
}

impl Inner {
    fn expire(&mut self, now: Instant) {
        self.idle.retain(|_, list| {
            list.retain(|idle| {
                !idle.connection.is_closed() && idle.expires.is_none_or(|expires| expires > now)
            });
            debug_assert!(list.is_sorted_by_key(|idle| idle.since), "the oldest is first");
            !list.is_empty()
        });
        self.shared.retain(|_, shared| {
            shared.connections.retain(|(connection, keepalive)| {
                let idle = connection.idle_since().map(|since| now.saturating_duration_since(since));
                let expired = idle.zip(keepalive.idle).is_some_and(|(idle, limit)| idle >= limit);
                !connection.is_retired() && !expired
            });
            !shared.connections.is_empty() || shared.dialing.is_some()
        });
    }
}
