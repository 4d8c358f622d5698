//! The connections of one worker that policies or revocations may still forbid.
//!
//! Every inbound connection is admitted here and stays until its guard is dropped. When other policies or another trust
//! come into force, at the next tick of the worker's clock all are judged again, a bounded number per tick: bytes by the
//! policies for bytes, HTTP by whether any request could pass and by those at work. What is forbidden is ended: HTTP/2
//! says GOAWAY first, bytes are cut. Of a request at work method, path and host are kept, not its fields: a condition on
//! those counts as not met by a rule that denies, and as met by one that allows.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use certs::mesh::{Connected, MeshIdentity};
use certs::trust::{Fingerprint, Peer};
use http::{HeaderValue, Method, Uri, header};
use layers::exchange::{Door, Exchange, Finish, State};
use layers::worker::deadlines::{Ended, Watch};
use layers::worker::view::View;
use tokio::sync::Notify;

use crate::authorize::without_encoded_slashes;
use crate::matcher::{Asked, Caller, What};
use crate::policy::Sight;

/// Connections judged in one tick of 100 ms.
const PER_TICK: usize = 4096;

/// What an inbound connection is judged by.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Who has shown an identity of the mesh.
    pub peer: Option<Arc<Peer>>,
    /// The authorities that the peer has shown above it.
    pub authorities: Arc<[Fingerprint]>,
    /// Counts the connection under the bundle that it was made under.
    pub connected: Option<Arc<Connected>>,
    /// The other end.
    pub from: SocketAddr,
    /// The port of the application.
    pub port: u16,
}

impl Arrival {
    /// In the words of the policies.
    pub fn caller(&self) -> Caller<'_> {
        let identity = self.peer.as_ref().map(|peer| peer.id.as_str());
        Caller::new(identity, self.from.ip(), self.port)
    }
}

/// One worker's connections.
pub struct Live {
    view: Rc<View<Sight>>,
    mesh: Option<(MeshIdentity, tokio::sync::watch::Receiver<u64>)>,
    entries: RefCell<Vec<Weak<Entry>>>,
    seen: Cell<(u64, u64)>,
    /// Those not judged yet since the last change, from the front.
    left: Cell<usize>,
    /// Entries after which those that are gone are swept out.
    sweep: Cell<usize>,
}

struct Entry {
    arrival: Arrival,
    live: Weak<Live>,
    bytes: Cell<bool>,
    /// Probes may come by it, of which no policy knows.
    probes: Cell<bool>,
    /// Why it was forbidden.
    ended: Cell<Option<&'static str>>,
    told: Notify,
    watch: RefCell<Option<Arc<Watch>>>,
    at_work: RefCell<Vec<AtWork>>,
}

/// A request at work, as far as it is kept. Everything is shared with the request, and nothing is copied.
struct AtWork {
    key: usize,
    method: Method,
    uri: Uri,
    decoded: Option<Box<str>>,
    host: Option<HeaderValue>,
}

impl Live {
    /// For the worker that sees `view`; the clock's tick calls [`check`](Self::check). Without `mesh` nothing is revoked.
    pub fn new(view: Rc<View<Sight>>, mesh: Option<MeshIdentity>) -> Rc<Self> {
        let mesh = mesh.map(|mesh| {
            let changes = mesh.changes();
            (mesh, changes)
        });
        let live = Self {
            view,
            mesh,
            entries: RefCell::default(),
            seen: Cell::default(),
            left: Cell::default(),
            sweep: Cell::new(64),
        };
        live.seen.set(live.now());
        Rc::new(live)
    }

    /// What is in force.
    pub fn view(&self) -> &Rc<View<Sight>> {
        &self.view
    }

    fn now(&self) -> (u64, u64) {
        let trust = self.mesh.as_ref().map_or(0, |(_, changes)| *changes.borrow());
        (self.view.current().number(), trust)
    }

    /// A connection that may stay as long as nothing forbids it. The guard belongs to it.
    pub fn admit(self: &Rc<Self>, arrival: Arrival) -> Admission {
        let entry = Rc::new(Entry {
            arrival,
            live: Rc::downgrade(self),
            bytes: Cell::new(false),
            probes: Cell::new(false),
            ended: Cell::new(None),
            told: Notify::new(),
            watch: RefCell::default(),
            at_work: RefCell::default(),
        });
        let mut entries = self.entries.borrow_mut();
        if entries.len() >= self.sweep.get() && self.left.get() == 0 {
            entries.retain(|entry| entry.strong_count() > 0);
            self.sweep.set((entries.len() * 2).max(64));
        }
        entries.push(Rc::downgrade(&entry));
        Admission(entry)
    }

    /// Connections that are open.
    pub fn count(&self) -> usize {
        self.entries.borrow().iter().filter(|entry| entry.strong_count() > 0).count()
    }

    /// Judges again what a change may forbid, a bounded number of connections at a time.
    pub fn check(&self) {
        let now = self.now();
        if self.seen.replace(now) != now {
            self.left.set(self.entries.borrow().len());
        }
        let left = self.left.get();
        if left == 0 {
            return;
        }
        let rest = left.saturating_sub(PER_TICK);
        self.left.set(rest);
        // Ending one may run code that admits or drops others.
        let some: Vec<_> =
            self.entries.borrow().get(rest..left).into_iter().flatten().filter_map(Weak::upgrade).collect();
        let sight = self.view.current();
        for entry in some {
            if let Some(why) = self.forbidden(&entry, &sight) {
                entry.end(why);
            }
        }
    }

    fn forbidden(&self, entry: &Entry, sight: &Sight) -> Option<&'static str> {
        if let (Some((mesh, _)), Some(peer)) = (&self.mesh, &entry.arrival.peer)
            && let Some(trust) = mesh.trust()
            && (trust.is_revoked(peer)
                || trust.distrusts(&entry.arrival.authorities)
                || trust.roots(peer.id.trust_domain()).next().is_none())
        {
            return Some("revoked");
        }
        let caller = entry.arrival.caller();
        let what = if entry.bytes.get() { What::Bytes } else { What::Requests };
        let at_work = || entry.at_work.borrow().iter().all(|request| request.is_allowed(sight, &caller));
        let is_needed = !entry.bytes.get() && entry.probes.get();
        (!(is_needed || sight.allows(&caller, &what)) || !at_work()).then_some("policy")
    }
}

impl AtWork {
    fn new(x: &State) -> Self {
        Self {
            key: std::ptr::from_ref(x) as usize,
            method: x.request.method.clone(),
            uri: x.request.uri.clone(),
            decoded: x.decoded_path.clone(),
            host: x.request.headers.get(header::HOST).cloned(),
        }
    }

    fn is_allowed(&self, sight: &Sight, caller: &Caller<'_>) -> bool {
        let host = self.host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or_default();
        let host = without_port(host).to_ascii_lowercase();
        let asked = Asked {
            method: self.method.as_str(),
            path: self.decoded.as_deref().unwrap_or_else(|| self.uri.path()),
            host: host.strip_suffix('.').unwrap_or(&host),
            vars: None,
        };
        let other = without_encoded_slashes(asked.path);
        let either = other.as_deref().map(|path| Asked { path, ..asked });
        [Some(asked), either].into_iter().flatten().all(|asked| sight.allows(caller, &What::Request(asked)))
    }
}

/// The host of a field that has been found well-formed.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

impl Entry {
    fn end(&self, why: &'static str) {
        if self.ended.get().is_some() {
            return;
        }
        self.ended.set(Some(why));
        let identity = self.arrival.peer.as_ref().map_or("-", |peer| peer.id.as_str());
        tracing::info!(peer = %self.arrival.from, identity, port = self.arrival.port, why, "connection ended");
        if let Some(watch) = &*self.watch.borrow() {
            watch.end(Ended::Forbidden);
        }
        self.told.notify_waiters();
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // What is gone is swept out when the list has doubled; a list that was all short-lived shrinks here.
        if let Some(live) = self.live.upgrade()
            && let Ok(mut entries) = live.entries.try_borrow_mut()
            && live.left.get() == 0
            && entries.last().is_some_and(|last| last.strong_count() == 0)
        {
            entries.pop();
        }
    }
}

/// A connection's leave to be there.
#[derive(Clone)]
pub struct Admission(Rc<Entry>);

impl Admission {
    /// What it is judged by.
    pub fn arrival(&self) -> &Arrival {
        &self.0.arrival
    }

    /// From now on it is bytes that nobody understands.
    pub fn carries_bytes(&self) {
        self.0.bytes.set(true);
    }

    /// It stays while it carries requests, whatever policies say of them: some may be probes.
    pub fn carries_probes(&self) {
        self.0.probes.set(true);
    }

    /// From now on it is served as HTTP, and can be ended by `watch`.
    pub fn watched(&self, watch: &Arc<Watch>) {
        *self.0.watch.borrow_mut() = Some(watch.clone());
        if self.0.ended.get().is_some() {
            watch.end(Ended::Forbidden);
        }
    }

    /// Waits until it is forbidden: by what.
    pub fn revoked(&self) -> impl Future<Output = &'static str> + use<> {
        let entry = self.0.clone();
        async move {
            loop {
                let told = entry.told.notified();
                if let Some(why) = entry.ended.get() {
                    return why;
                }
                told.await;
            }
        }
    }

    /// Whether it is forbidden by now.
    pub fn is_revoked(&self) -> bool {
        self.0.ended.get().is_some()
    }

    /// A request that was allowed is at work until it is over, or the tunnel that it becomes.
    pub(crate) fn works(&self, x: &mut Exchange) {
        let request = AtWork::new(x);
        let key = request.key;
        self.0.at_work.borrow_mut().push(request);
        if x.upgrade.is_some() {
            // What is kept goes with the tunnel.
            x.keep(Working { entry: self.0.clone(), key });
        } else {
            x.on_finish(self.0.clone());
        }
    }
}

impl Door for Admission {
    fn watched(&self, watch: &Arc<Watch>) {
        Self::watched(self, watch);
    }
}

impl Entry {
    fn over(&self, key: usize) {
        let mut at_work = self.at_work.borrow_mut();
        if let Some(index) = at_work.iter().position(|request| request.key == key) {
            at_work.swap_remove(index);
        }
    }
}

impl Finish for Entry {
    fn finish(&self, x: &Exchange) {
        self.over(std::ptr::from_ref::<State>(x) as usize);
    }
}

struct Working {
    entry: Rc<Entry>,
    key: usize,
}

impl Drop for Working {
    fn drop(&mut self) {
        self.entry.over(self.key);
    }
}
