//! One service at one registry, followed for everybody who wants to know it.
//!
//! A driver asks the source's watcher again and again, with pauses after errors that all services of a registry share
//! ([`herd`]), and enters the answers in a ledger that decides what they do to the instances ([`ledger`]). The state is
//! published whole. The driver ends when nobody listens, and it never ends before: a watcher that panics or goes on
//! failing is opened anew.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use crate::probe::Probe;
use crate::snapshot::Snapshots;
use crate::source::{Again, Instance, Listing, Query, Source, SourceError, Watcher};
use crate::views::{ServiceView, seconds};
use crate::{Settings, literal};

mod herd;
mod ledger;

use herd::{Herd, Member};
use ledger::{Key, Ledger, Now};

/// So many answers may come as fast as they like, before they are held to the rate.
const BURST: u32 = 5;
/// How soon an empty list is asked for again.
const CONFIRM: Duration = Duration::from_secs(1);
/// Between probes of what a registry has forgotten: at first, and when they have answered for a while.
const PROBE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// So many rounds of probes come quickly.
const QUICK_PROBES: u32 = 10;
/// A watcher that has only failed for this long is opened anew.
const REOPEN: Duration = Duration::from_secs(600);

/// What is known of a service at a registry.
#[derive(Clone, Debug, PartialEq)]
pub struct Followed {
    /// In order of id and address; shared between states as far as nothing has changed.
    pub instances: Arc<[Held]>,
    pub freshness: Freshness,
    /// Why the last question failed, if it did.
    pub failure: Option<Arc<str>>,
    /// Counts the changes of the instances.
    pub generation: u64,
    /// As in the freshness, by the clock that nobody sets.
    pub(crate) stale_since: Option<Instant>,
}

impl Default for Followed {
    fn default() -> Self {
        Self {
            instances: Arc::new([]),
            freshness: Freshness::Unknown,
            failure: None,
            generation: 0,
            stale_since: None,
        }
    }
}

impl Followed {
    /// Neither answered nor failed yet.
    pub fn is_pending(&self) -> bool {
        self.freshness == Freshness::Unknown && self.failure.is_none()
    }
}

/// An instance and since when it is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    pub instance: Instance,
    /// Its host, where that is an address.
    pub ip: Option<IpAddr>,
    pub first_seen: SystemTime,
    /// The registry does not list it (any more), and yet it is kept.
    pub kept: Option<Arc<Kept>>,
}

impl Held {
    pub(crate) fn new(instance: Instance, first_seen: SystemTime) -> Self {
        Self { ip: literal(&instance.node.host), instance, first_seen, kept: None }
    }

    /// Listed, and as listed now.
    fn is(&self, instance: &Instance) -> bool {
        self.kept.is_none() && self.instance == *instance
    }
}

/// An instance is kept that its registry does not list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Listed until then.
    pub since: SystemTime,
    pub why: KeptBy,
}

/// Why an instance is kept that its registry does not list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptBy {
    /// The registry lost its memory or its place, and the instance answers.
    Forgotten,
}

impl KeptBy {
    pub fn words(self) -> &'static str {
        match self {
            Self::Forgotten => "the registry began anew and does not know it yet; kept while it answers",
        }
    }
}

/// How far what is known of a service can be trusted.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Freshness {
    /// As the registry says.
    Fresh,
    /// As the registry said before it could not be asked any more, or before it said something that has to be confirmed.
    Stale {
        #[serde(serialize_with = "seconds")]
        since: SystemTime,
        why: Arc<str>,
    },
    /// The registry has not answered yet.
    #[default]
    Unknown,
}

impl Freshness {
    pub fn is_fresh(&self) -> bool {
        matches!(self, Self::Fresh)
    }
}

/// One source and what those who follow services there share.
#[derive(Debug)]
struct Registry {
    source: Arc<dyn Source>,
    herd: Arc<Herd>,
}

/// What is followed where. Those who are equally careful with empty lists share a driver.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct FollowKey {
    registry: usize,
    query: Query,
    empty_confirm: Duration,
}

/// One service at one registry.
pub(crate) struct Service {
    pub(crate) kind: Arc<str>,
    pub(crate) registry: Arc<str>,
    pub(crate) query: Query,
    state: watch::Sender<Arc<Followed>>,
    ledger: Mutex<Ledger>,
    refresh: Notify,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.registry {
            "" => write!(f, "{}/{}", self.kind, self.query.service),
            registry => write!(f, "{}@{registry}/{}", self.kind, self.query.service),
        }
    }
}

impl Service {
    /// Nothing that can panic runs under this lock.
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> Arc<Followed> {
        Arc::clone(&self.state.borrow())
    }

    pub(crate) fn refresh(&self) {
        self.refresh.notify_one();
    }

    /// The registry has been told to take the instance out: it is asked at once whether it has.
    pub(crate) fn retired(&self, instance: &Instance) {
        self.ledger().retired(instance);
        self.refresh();
    }

    /// Nothing is kept of what the registry does not list: neither until it says again that there is nothing, nor because
    /// it may have forgotten.
    pub(crate) fn keeps_nothing(&self) -> bool {
        !self.ledger().keeps()
    }

    /// Nobody listens any more.
    pub(crate) fn is_unused(&self) -> bool {
        self.state.receiver_count() == 0
    }

    pub(crate) fn answered_at(&self) -> Option<SystemTime> {
        self.ledger().answered_at()
    }

    pub(crate) fn view(&self, whole: bool) -> ServiceView {
        let ledger = self.ledger();
        let followed = ledger.followed();
        ServiceView {
            kind: self.kind.clone(),
            registry: self.registry.clone(),
            service: self.query.service.clone(),
            args: self.query.args.clone(),
            freshness: followed.freshness.clone(),
            generation: followed.generation,
            answered: ledger.answered_at(),
            failure: followed.failure.clone(),
            errors: ledger.errors(),
            count: followed.instances.len(),
            instances: if whole { ledger.views() } else { Vec::new() },
            history: if whole { ledger.history() } else { Vec::new() },
        }
    }
}

/// A service that is followed as long as this is held.
#[derive(Debug)]
pub(crate) struct Follow {
    pub(crate) service: Arc<Service>,
    pub(crate) state: watch::Receiver<Arc<Followed>>,
}

/// Everything that is followed.
#[derive(Debug)]
pub(crate) struct Followers {
    runtime: Handle,
    registries: Vec<Registry>,
    interval: Duration,
    probe: Arc<dyn Probe>,
    snapshots: Option<Arc<Snapshots>>,
    table: Mutex<HashMap<FollowKey, Arc<Service>>>,
}

impl Followers {
    pub(crate) fn new(runtime: Handle, settings: &Settings, snapshots: Option<Arc<Snapshots>>) -> Self {
        let (interval, probe) = (settings.interval, Arc::clone(&settings.probe));
        let registry =
            |source: &Arc<dyn Source>| Registry { source: Arc::clone(source), herd: Arc::default() };
        let registries = settings.sources.iter().map(registry).collect();
        Self { runtime, registries, interval, probe, snapshots, table: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<FollowKey, Arc<Service>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a service at every registry of the kind that serves it. The first one who wants to know begins to ask,
    /// the last one to leave ends it.
    pub(crate) fn follow(
        self: &Arc<Self>,
        kind: &str,
        query: &Query,
        empty_confirm: Duration,
    ) -> Vec<Follow> {
        let serving = self
            .registries
            .iter()
            .enumerate()
            .filter(|(_, registry)| registry.source.kind() == kind && registry.source.serves(query));
        let mut table = self.table();
        let mut follows = Vec::new();
        for (index, registry) in serving {
            let key = FollowKey { registry: index, query: query.clone(), empty_confirm };
            if let Some(service) = table.get(&key) {
                follows.push(Follow { service: Arc::clone(service), state: service.state.subscribe() });
                continue;
            }
            let (sender, state) = watch::channel(Arc::new(Followed::default()));
            let service = Arc::new(Service {
                kind: kind.into(),
                registry: registry.source.name().into(),
                query: query.clone(),
                state: sender,
                ledger: Mutex::new(Ledger::new(empty_confirm)),
                refresh: Notify::new(),
            });
            table.insert(key.clone(), Arc::clone(&service));
            let driver = Driver {
                followers: Arc::clone(self),
                member: Member::of(&registry.herd),
                source: Arc::clone(&registry.source),
                key,
                service: Arc::clone(&service),
                rate: Rate::new(self.interval, Instant::now()),
                failing: None,
                written: None,
                probes: None,
                probe_at: Instant::now(),
                rounds: 0,
            };
            self.runtime.spawn(driver.run());
            follows.push(Follow { service, state });
        }
        follows
    }

    /// The service, as it is followed at each registry.
    pub(crate) fn named(&self, kind: &str, query: &Query) -> Vec<Arc<Service>> {
        let is_it = |service: &&Arc<Service>| *service.kind == *kind && service.query == *query;
        self.table().values().filter(is_it).cloned().collect()
    }

    /// Every service that is followed.
    pub(crate) fn services(&self) -> Vec<Arc<Service>> {
        let mut services: Vec<_> = self.table().values().cloned().collect();
        services.sort_by(|a, b| {
            (&a.kind, &a.query.service, &a.registry).cmp(&(&b.kind, &b.query.service, &b.registry))
        });
        services
    }

    /// True when nobody listens any more; then the service is gone from the table.
    fn release(&self, key: &FollowKey, service: &Service) -> bool {
        // Subscriptions happen under this lock, so none can slip in between the look and the removal.
        let mut table = self.table();
        let unused = service.state.receiver_count() == 0;
        if unused {
            table.remove(key);
        }
        unused
    }
}

/// How often a watcher may answer.
#[derive(Debug)]
struct Rate {
    interval: Duration,
    /// When the bucket was, or will be, empty by this reckoning.
    empty_at: Instant,
}

impl Rate {
    fn new(interval: Duration, now: Instant) -> Self {
        Self { interval, empty_at: now }
    }

    /// An answer has come: when the next may be asked for.
    fn next(&mut self, now: Instant) -> Instant {
        self.empty_at = self.empty_at.max(now) + self.interval;
        let full = now + self.interval * BURST;
        if self.empty_at <= full { now } else { now + (self.empty_at - full) }
    }
}

type Probed = Vec<(Key, bool)>;

/// Follows one service.
struct Driver {
    followers: Arc<Followers>,
    source: Arc<dyn Source>,
    member: Member,
    key: FollowKey,
    service: Arc<Service>,
    rate: Rate,
    /// Since when nothing but errors came, or since the watcher was last opened among them.
    failing: Option<Instant>,
    /// When the instances were last given to the disk.
    written: Option<Instant>,
    /// A round of probes that is under way, when the next one is due, and how many there were.
    probes: Option<BoxFuture<'static, Probed>>,
    probe_at: Instant,
    rounds: u32,
}

/// What a driver waits for.
enum Event {
    Answer(Result<Listing, Failed>),
    /// Nobody listens.
    Unused,
    /// Somebody wants to know now.
    Wanted,
    Probed(Probed),
    /// Another service of the registry is answered again: ask after this long.
    Returned(Duration),
    Time,
}

/// What happens to the watcher before it is asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    GoesOn,
    /// It answers at once and waits for no change.
    StartsOver,
    /// It is opened anew.
    Ends,
}

impl Driver {
    async fn run(mut self) {
        if let Some(snapshots) = self.followers.snapshots.clone() {
            let kept = snapshots.read(Arc::clone(&self.service)).await;
            if let Some((instances, confirmed)) = kept {
                self.enter(|ledger, now| ledger.restore(instances, confirmed, now));
            }
        }
        let (source, service) = (Arc::clone(&self.source), Arc::clone(&self.service));
        let mut watcher: Option<Box<dyn Watcher>> = None;
        let mut at = Instant::now();
        loop {
            let event = if Instant::now() < at {
                self.event(Some(at)).await
            } else {
                let mut question = pin!(ask(&*source, &service.query, &mut watcher));
                // A question waits for long. It is not put again because something else happens meanwhile.
                loop {
                    let event = tokio::select! {
                        biased;
                        event = self.event(None) => event,
                        answer = &mut question => Event::Answer(answer),
                    };
                    match event {
                        Event::Answer(_) | Event::Unused | Event::Wanted => break event,
                        other => self.note(other),
                    }
                }
            };
            let fate = match event {
                Event::Unused if self.followers.release(&self.key, &self.service) => return,
                Event::Wanted => {
                    at = Instant::now();
                    Fate::StartsOver
                }
                Event::Answer(answer) => {
                    let (next, fate) = self.answer(answer);
                    at = next;
                    fate
                }
                Event::Returned(pause) => {
                    at = at.min(Instant::now() + pause);
                    Fate::GoesOn
                }
                other => {
                    self.note(other);
                    Fate::GoesOn
                }
            };
            match (fate, &mut watcher) {
                (Fate::StartsOver, Some(watcher)) => watcher.restart(),
                (Fate::Ends, _) => watcher = None,
                _ => {}
            }
        }
    }

    /// Whatever happens besides an answer. While a question is paused for, its time is `at`.
    async fn event(&mut self, at: Option<Instant>) -> Event {
        let (due, lost) = {
            let ledger = self.service.ledger();
            (ledger.due(), ledger.has_lost())
        };
        if !lost {
            self.rounds = 0;
        } else if self.probes.is_none() && Instant::now() >= self.probe_at {
            self.probes = Some(self.probe());
        }
        let probe_at = (lost && self.probes.is_none()).then_some(self.probe_at);
        let wake = [at, due, probe_at].into_iter().flatten().min();
        tokio::select! {
            biased;
            () = self.service.state.closed() => Event::Unused,
            () = self.service.refresh.notified() => Event::Wanted,
            found = finished(&mut self.probes) => {
                self.probes = None;
                Event::Probed(found)
            }
            pause = self.member.returned(), if at.is_some() && self.member.fails() => Event::Returned(pause),
            () = sleep_until(wake.unwrap_or(self.probe_at)), if wake.is_some() => Event::Time,
        }
    }

    /// What concerns no question.
    fn note(&mut self, event: Event) {
        if let Event::Probed(found) = event {
            self.rounds += 1;
            self.probe_at = Instant::now() + if self.rounds < QUICK_PROBES { PROBE.0 } else { PROBE.1 };
            self.enter(|ledger, now| ledger.probed(&found, now));
        }
        self.enter(Ledger::tick);
    }

    /// Enters something in the ledger, and publishes what comes of it.
    fn enter(&self, entry: impl FnOnce(&mut Ledger, Now) -> bool) -> bool {
        let mut ledger = self.service.ledger();
        let changed = entry(&mut ledger, Now::get());
        if changed {
            self.service.state.send_replace(Arc::new(ledger.followed().clone()));
        }
        changed
    }

    /// What came of a question, and when to ask the next one.
    fn answer(&mut self, outcome: Result<Listing, Failed>) -> (Instant, Fate) {
        let now = Instant::now();
        match outcome {
            Ok(listing) => {
                let again = listing.again;
                if self.member.fails() {
                    tracing::info!(service = %self.service, failures = self.member.streak(), "registry answers again");
                }
                self.member.answered();
                self.failing = None;
                let changed = self.enter(|ledger, now| ledger.listed(listing, now));
                self.keep(changed, now);
                if self.service.ledger().wants_confirmation() {
                    return (now + CONFIRM.min(self.key.empty_confirm), Fate::StartsOver);
                }
                let next = self.rate.next(now);
                let next = match again {
                    Again::Now => next,
                    Again::After(pause) => next.max(now + pause),
                };
                (next, Fate::GoesOn)
            }
            Err(Failed { error, broken }) => {
                if !self.member.fails() {
                    tracing::warn!(service = %self.service, reason = %error, "registry does not answer; last good endpoints stay");
                }
                let pause = self.member.failed(error.retry_after);
                self.enter(|ledger, now| ledger.failed(&error, now));
                let failing = *self.failing.get_or_insert(now);
                if !broken && now.duration_since(failing) < REOPEN {
                    return (now + pause, Fate::GoesOn);
                }
                self.failing = Some(now);
                self.service.ledger().doubt();
                (now + pause, Fate::Ends)
            }
        }
    }

    /// Has the instances written to disk: when they changed, and now and then so that the time of the file says something.
    fn keep(&mut self, changed: bool, now: Instant) {
        let Some(snapshots) = &self.followers.snapshots else { return };
        if changed || self.written.is_none_or(|at| now.duration_since(at) > REOPEN) {
            self.written = Some(now);
            snapshots.write(&self.service, self.service.ledger().followed().instances.clone());
        }
    }

    /// One round of probes.
    fn probe(&self) -> BoxFuture<'static, Probed> {
        let lost = self.service.ledger().lost();
        let probe = Arc::clone(&self.followers.probe);
        Box::pin(async move {
            let one = |key: Key| {
                let answers = probe.answers(Arc::clone(&key.host), key.port);
                async move { (key, answers.await) }
            };
            lost.into_iter().map(one).collect::<FuturesUnordered<_>>().collect().await
        })
    }
}

async fn finished(probes: &mut Option<BoxFuture<'static, Probed>>) -> Probed {
    match probes {
        Some(probes) => probes.await,
        None => std::future::pending().await,
    }
}

/// A question failed.
struct Failed {
    error: SourceError,
    /// The watcher cannot be asked again.
    broken: bool,
}

/// Asks one question. What panics in a source ends that watcher and nothing else.
async fn ask(
    source: &dyn Source,
    query: &Query,
    watcher: &mut Option<Box<dyn Watcher>>,
) -> Result<Listing, Failed> {
    let question = async {
        let watcher = match watcher {
            Some(watcher) => watcher,
            None => watcher.insert(source.open(query).map_err(SourceError::new)?),
        };
        watcher.next().await
    };
    match AssertUnwindSafe(question).catch_unwind().await {
        Ok(answer) => answer.map_err(|error| Failed { error, broken: false }),
        Err(_) => {
            tracing::error!(kind = source.kind(), service = %query.service, "the source panicked; it is opened anew");
            Err(Failed {
                error: SourceError::new("the source failed (panic); it is opened anew"),
                broken: true,
            })
        }
    }
}
