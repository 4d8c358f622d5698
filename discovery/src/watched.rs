//! One target under watch: puts the parts together whenever one of them changes, and publishes what comes of it.
//!
//! The first change is published at once, those that follow closely are collected for a tenth of a second, and for a
//! second at most.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::{BoxFuture, select_all};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::dns::{self, Answer};
use crate::follow::{Follow, Followed, Freshness, Service};
use crate::guard::Guard;
use crate::merge::{Items, Merged, Names, Piece, Resolved, merge};
use crate::probe::Probe;
use crate::source::Health;
use crate::target::Target;
use crate::views::{Change, EndpointView, FromView, Named, PartView, SourceView, TargetView, Verdict};
use crate::{Endpoint, Endpoints, Failure, Node, Receipt, literal};

/// How long changes are collected that follow another one, and at most.
const QUIET: Duration = Duration::from_millis(100);
const BURST: Duration = Duration::from_secs(1);
/// Steps that are remembered.
const HISTORY: usize = 20;

/// What a target is put together from, and what is known about the last time.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) target: Target,
    inputs: Vec<Input>,
    /// Parts that no registry answers for.
    refused: Vec<Failure>,
    out: watch::Sender<Arc<Endpoints>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct Input {
    part: usize,
    from: From,
}

#[derive(Debug)]
enum From {
    Nodes(Vec<Node>),
    Service { name: Arc<str>, service: Arc<Service> },
}

#[derive(Debug, Default)]
struct State {
    guard: Guard,
    names: Names,
    degraded: Vec<Arc<str>>,
    /// Of which generation each service was the last time.
    generations: Vec<Option<u64>>,
    /// Addresses that were refused the last time.
    refused: HashSet<SocketAddr>,
    history: VecDeque<Change>,
}

/// A part as it is handed over.
pub(crate) enum Supply {
    Nodes(Vec<Node>),
    Services(Vec<Follow>),
    Refused(Failure),
}

type Probed = HashSet<SocketAddr>;

/// The work of one target.
pub(crate) struct Work {
    watched: Arc<Watched>,
    probe: Arc<dyn Probe>,
    resolver: dns::Names,
    services: Vec<watch::Receiver<Arc<Followed>>>,
    names: HashMap<Arc<str>, watch::Receiver<Answer>>,
    /// When the next service will have been stale for too long.
    degrades: Option<Instant>,
}

impl Work {
    /// A target whose first list is published.
    pub(crate) fn new(
        target: Target,
        supplies: Vec<Supply>,
        resolver: dns::Names,
        probe: Arc<dyn Probe>,
    ) -> (Self, Arc<Watched>, crate::Watch) {
        let (mut inputs, mut refused, mut services) = (Vec::new(), Vec::new(), Vec::new());
        for (part, supply) in supplies.into_iter().enumerate() {
            match supply {
                Supply::Nodes(nodes) => inputs.push(Input { part, from: From::Nodes(nodes) }),
                Supply::Refused(failure) => refused.push(failure),
                Supply::Services(follows) => {
                    for Follow { service, state } in follows {
                        services.push(state);
                        let name = service.to_string().into();
                        inputs.push(Input { part, from: From::Service { name, service } });
                    }
                }
            }
        }
        let (out, receiver) = watch::channel(Arc::default());
        let watched = Arc::new(Watched { target, inputs, refused, out, state: Mutex::default() });
        let mut work = Self {
            watched: Arc::clone(&watched),
            probe,
            resolver,
            services,
            names: HashMap::new(),
            degrades: None,
        };
        work.settle();
        let mut receiver = receiver;
        receiver.mark_unchanged();
        (work, watched, receiver)
    }

    /// Until nobody listens.
    pub(crate) async fn run(mut self) {
        let mut settled = Instant::now();
        // Since when changes wait, and until when.
        let mut waiting: Option<(Instant, Instant)> = None;
        let mut probes: Option<BoxFuture<'static, Probed>> = None;
        loop {
            let step = self.watched.state().guard.due();
            let wake = [waiting.map(|(_, until)| until), step, self.degrades].into_iter().flatten().min();
            let watched = Arc::clone(&self.watched);
            tokio::select! {
                biased;
                () = watched.out.closed() => return,
                silent = finished(&mut probes) => {
                    probes = None;
                    self.release(|guard| guard.probed(&silent), "taken away by its registry; it does not answer");
                }
                () = self.changed() => {
                    let now = Instant::now();
                    let since = waiting.map_or(now, |(since, _)| since);
                    // Who waits for the first answers is not made to wait for company.
                    let soon = now.saturating_duration_since(settled) < QUIET && self.watched.out.borrow().settled();
                    let until = if soon || waiting.is_some() { (now + QUIET).min(since + BURST) } else { now };
                    waiting = Some((since, until));
                }
                () = sleep_until(wake.unwrap_or(settled)), if wake.is_some() => {}
            }
            let now = Instant::now();
            if waiting.is_some_and(|(_, until)| now >= until) || self.degrades.is_some_and(|at| now >= at) {
                waiting = None;
                settled = now;
                if self.settle() {
                    // Those that do not answer have to leave now and not with the next step.
                    probes = Some(self.probe());
                }
            }
            if step.is_some_and(|at| now >= at) {
                let why = "taken away by its registry with most of the others; let go of slowly";
                self.release(|guard| guard.step(now), why);
                if probes.is_none() && self.watched.state().guard.due().is_some() {
                    probes = Some(self.probe());
                }
            }
        }
    }

    /// Waits for a change of any service or name.
    async fn changed(&mut self) {
        let services = self.services.iter_mut().map(|service| gone_or(service.changed()));
        let names = self.names.values_mut().map(|name| gone_or(name.changed()));
        let mut changes: Vec<BoxFuture<'_, ()>> = Vec::with_capacity(services.len() + names.len());
        for change in services {
            changes.push(Box::pin(change));
        }
        for change in names {
            changes.push(Box::pin(change));
        }
        if changes.is_empty() {
            std::future::pending::<()>().await;
        }
        select_all(changes).await;
    }

    /// Puts everything together and publishes it. True when the guard began to hold something back.
    fn settle(&mut self) -> bool {
        self.services.iter_mut().for_each(watch::Receiver::mark_unchanged);
        let states = self.watched.states();
        self.subscribe(&states);
        let watched = Arc::clone(&self.watched);
        let mut state = watched.state();
        state.names = self
            .names
            .iter_mut()
            .map(|(name, answer)| {
                let answer = answer.borrow_and_update();
                let failure = answer.failure.as_ref().map(|(why, _)| Arc::clone(why));
                (
                    Arc::clone(name),
                    Resolved { addrs: Arc::clone(&answer.addrs), pending: answer.pending(), failure },
                )
            })
            .collect();
        let now = (Instant::now(), SystemTime::now());
        let mut merged = merge(&watched.target, &watched.pieces(&states), &state.names, now.0);
        self.degrades = merged.degrades_in.map(|left| now.0 + left);
        watched.note_refused(&mut state, &merged, now.1);
        for service in merged.degraded.iter().filter(|name| !state.degraded.contains(name)) {
            tracing::warn!(target = %watched.target.name, %service, "stale for longer than allowed");
        }
        state.degraded = std::mem::take(&mut merged.degraded);
        let mut list = merged.published();
        let before = Arc::clone(&watched.out.borrow());
        let refused = std::mem::take(&mut state.refused);
        let at_once = |addr: &SocketAddr| merged.expired || refused.contains(addr);
        let alarm = state.guard.hold(&watched.target.guards, &before.list, &mut list, at_once, now.0);
        state.refused = refused;
        if let Some(alarm) = alarm {
            tracing::error!(
                target = %watched.target.name, taken = alarm.taken, of = alarm.of,
                "most endpoints were taken away at once; those that still answer are let go of slowly"
            );
            let mut removed = Named::default();
            state.guard.leaving().iter().for_each(|leaving| removed.add(|| leaving.addr.to_string().into()));
            state.remember(Change {
                at: now.1,
                why: format!("{} of {} taken away at once: held back", alarm.taken, alarm.of).into(),
                added: Named::default(),
                changed: removed,
                removed: Named::default(),
            });
        }
        merged.failures.extend(watched.refused.iter().cloned());
        let degraded = !state.degraded.is_empty();
        let (pending, failures) = (merged.pending, merged.failures);
        watched.publish(Endpoints { list, pending, failures, degraded, receipt: Receipt::default() });
        let generation = |followed: &Option<Arc<Followed>>| followed.as_ref().map(|it| it.generation);
        state.generations = states.iter().map(generation).collect();
        alarm.is_some()
    }

    /// Follows the names among the hosts, and no others.
    fn subscribe(&mut self, states: &[Option<Arc<Followed>>]) {
        let mut wanted: HashSet<&Arc<str>> = HashSet::new();
        for (input, state) in self.watched.inputs.iter().zip(states) {
            match (&input.from, state) {
                (From::Nodes(nodes), _) => {
                    wanted.extend(nodes.iter().map(|node| &node.host).filter(|host| literal(host).is_none()));
                }
                (From::Service { .. }, Some(followed)) => {
                    let names = followed.instances.iter().filter(|held| held.ip.is_none());
                    wanted.extend(names.map(|held| &held.instance.node.host));
                }
                (From::Service { .. }, None) => {}
            }
        }
        self.names.retain(|name, _| wanted.contains(name));
        for name in wanted {
            if !self.names.contains_key(name) {
                let answer = self.resolver.subscribe(name, self.watched.target.names);
                self.names.insert(Arc::clone(name), answer);
            }
        }
    }

    /// Takes out what the guard has let go of.
    fn release(&self, let_go: impl FnOnce(&mut Guard) -> Vec<Endpoint>, why: &str) {
        // What is held back no more is published no more before anybody else looks.
        let mut state = self.watched.state();
        let left = let_go(&mut state.guard);
        if left.is_empty() {
            return;
        }
        let gone: HashSet<SocketAddr> = left.iter().map(|endpoint| endpoint.addr).collect();
        let mut removed = Named::default();
        left.iter().for_each(|endpoint| removed.add(|| endpoint.addr.to_string().into()));
        let none = Named::default();
        let change =
            Change { at: SystemTime::now(), why: why.into(), added: none.clone(), changed: none, removed };
        state.remember(change);
        self.watched.out.send_modify(|current| {
            let mut endpoints = Endpoints::clone(current);
            endpoints.list.retain(|endpoint| !gone.contains(&endpoint.addr));
            endpoints.receipt = Receipt::default();
            *current = Arc::new(endpoints);
        });
    }

    /// One round of probes of what is held back: those that do not answer.
    fn probe(&self) -> BoxFuture<'static, Probed> {
        let held: Vec<SocketAddr> =
            self.watched.state().guard.leaving().iter().map(|leaving| leaving.addr).collect();
        let probe = Arc::clone(&self.probe);
        Box::pin(async move {
            let one = |addr: SocketAddr| {
                let answers = probe.answers(addr.ip().to_string().into(), addr.port());
                async move { (!answers.await).then_some(addr) }
            };
            let mut all: FuturesUnordered<_> = held.into_iter().map(one).collect();
            let mut silent = HashSet::new();
            while let Some(found) = all.next().await {
                silent.extend(found);
            }
            silent
        })
    }
}

/// A sender is gone only when the runtime is; then there is nothing to wait for.
async fn gone_or(change: impl Future<Output = Result<(), watch::error::RecvError>>) {
    if change.await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn finished(probes: &mut Option<BoxFuture<'static, Probed>>) -> Probed {
    match probes {
        Some(probes) => probes.await,
        None => std::future::pending().await,
    }
}

impl State {
    fn remember(&mut self, change: Change) {
        if self.history.len() >= HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(change);
    }
}

impl Watched {
    /// Nothing that can panic runs under this lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each input says now.
    fn states(&self) -> Vec<Option<Arc<Followed>>> {
        let state = |input: &Input| match &input.from {
            From::Nodes(_) => None,
            From::Service { service, .. } => Some(service.state()),
        };
        self.inputs.iter().map(state).collect()
    }

    fn pieces<'a>(&'a self, states: &'a [Option<Arc<Followed>>]) -> Vec<Piece<'a>> {
        let piece = |(input, state): (&'a Input, &'a Option<Arc<Followed>>)| {
            let items = match (&input.from, state) {
                (From::Service { name, .. }, Some(followed)) => Items::Service { name, followed },
                (From::Nodes(nodes), _) => Items::Nodes(nodes),
                (From::Service { .. }, None) => return None,
            };
            Some(Piece { part: input.part, items })
        };
        self.inputs.iter().zip(states).filter_map(piece).collect()
    }

    fn publish(&self, endpoints: Endpoints) {
        self.out.send_if_modified(|current| {
            let changed = **current != endpoints;
            if changed {
                *current = Arc::new(endpoints);
            }
            changed
        });
    }

    /// Says once of each endpoint that it is refused.
    fn note_refused(&self, state: &mut State, merged: &Merged, at: SystemTime) {
        let refused = |(place, why): (&usize, &Arc<str>)| {
            merged.list.get(*place).map(|endpoint| (endpoint.addr, Arc::clone(why)))
        };
        let refused: Vec<(SocketAddr, Arc<str>)> = merged.refused.iter().filter_map(refused).collect();
        for (addr, why) in &refused {
            if state.refused.contains(addr) {
                continue;
            }
            let mut removed = Named::default();
            removed.add(|| addr.to_string().into());
            let none = Named::default();
            tracing::warn!(target = %self.target.name, endpoint = %addr, %why, "endpoint refused");
            let why = Arc::clone(why);
            state.remember(Change { at, why, added: none.clone(), changed: none, removed });
        }
        state.refused = refused.into_iter().map(|(addr, _)| addr).collect();
    }

    /// The services that are asked.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.inputs.iter().filter_map(|input| match &input.from {
            From::Nodes(_) => None,
            From::Service { service, .. } => Some(service),
        })
    }

    /// Whether whoever listens picks from endpoints that are made of the service as of `generation`, or later, and nothing
    /// is held back of what registries have taken away since.
    pub(crate) fn is_in_use(&self, service: &Arc<Service>, generation: u64) -> bool {
        if self.out.is_closed() {
            return true;
        }
        let state = self.state();
        let is_old = |(input, made): (&Input, &Option<u64>)| match &input.from {
            From::Service { service: own, .. } => Arc::ptr_eq(own, service) && *made < Some(generation),
            From::Nodes(_) => false,
        };
        let made = !self.inputs.iter().zip(&state.generations).any(is_old);
        made && state.guard.leaving().is_empty() && self.out.borrow().receipt.is_signed()
    }

    /// Whether somebody who says `name` means this.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        *self.target.name == *name || self.services().any(|service| *service.query.service == *name)
    }

    /// Everything that is known, as it is shown.
    pub(crate) fn view(&self) -> TargetView {
        let states = self.states();
        let pieces = self.pieces(&states);
        let state = self.state();
        let merged = merge(&self.target, &pieces, &state.names, Instant::now());
        let published = Arc::clone(&self.out.borrow());
        let mut sources: Vec<Vec<SourceView>> = merged.list.iter().map(|_| Vec::new()).collect();
        let mut doubted: Vec<Option<Arc<str>>> = vec![None; merged.list.len()];
        let answered: Vec<Option<SystemTime>> = self
            .inputs
            .iter()
            .map(|input| match &input.from {
                From::Nodes(_) => None,
                From::Service { service, .. } => service.answered_at(),
            })
            .collect();
        for listed in &merged.listed {
            let (Some(input), Some(views)) =
                (self.inputs.get(listed.piece), sources.get_mut(listed.endpoint))
            else {
                continue;
            };
            let answered = answered.get(listed.piece).copied().flatten();
            let held = states.get(listed.piece).and_then(Option::as_ref);
            let view = source_view(&input.from, held.map(|followed| (&**followed, listed.item)), answered);
            if let (Freshness::Stale { why, .. }, Some(doubt)) =
                (&view.freshness, doubted.get_mut(listed.endpoint))
            {
                *doubt = Some(Arc::clone(why));
            }
            views.push(view);
        }
        let mut endpoints: Vec<EndpointView> = Vec::with_capacity(merged.list.len());
        for (place, (endpoint, sources)) in merged.list.iter().zip(sources).enumerate() {
            let vouched = sources.iter().any(|source| source.freshness.is_fresh());
            let doubt = doubted.get(place).cloned().flatten().filter(|_| !vouched);
            let (verdict, why) = match (merged.refused.get(&place), endpoint.health, doubt) {
                (Some(why), ..) => (Verdict::Refused, Some(Arc::clone(why))),
                (None, Health::Draining, doubt) => (Verdict::Draining, doubt),
                (None, Health::Unhealthy, doubt) => (Verdict::Unhealthy, doubt),
                (None, _, Some(why)) => (Verdict::Kept, Some(why)),
                (None, _, None) => (Verdict::Used, None),
            };
            endpoints.push(endpoint_view(endpoint, verdict, why, sources));
        }
        for leaving in state.guard.leaving() {
            let why = "taken away by its registry with most of the others; let go of slowly";
            if !merged.list.iter().any(|endpoint| endpoint.addr == leaving.addr) {
                endpoints.push(endpoint_view(leaving, Verdict::Kept, Some(why.into()), Vec::new()));
            }
        }
        TargetView {
            name: Arc::clone(&self.target.name),
            merge: self.target.merge,
            settled: published.settled(),
            degraded: state.degraded.clone(),
            parts: self.inputs.iter().map(|input| self.part_view(input)).collect(),
            refused: self.refused.iter().map(|failure| Arc::clone(&failure.reason)).collect(),
            endpoints,
            alarms: state.guard.alarms(),
            history: state.history.iter().cloned().collect(),
        }
    }

    fn part_view(&self, input: &Input) -> PartView {
        let from = match &input.from {
            From::Nodes(nodes) => FromView::Nodes { count: nodes.len() },
            From::Service { service, .. } => FromView::Service(Box::new(service.view(true))),
        };
        PartView { share: self.target.parts.get(input.part).and_then(|part| part.share), from }
    }

    /// How often the guard has been alarmed.
    pub(crate) fn alarms(&self) -> u64 {
        self.state().guard.alarms()
    }
}

fn source_view(from: &From, held: Option<(&Followed, usize)>, answered: Option<SystemTime>) -> SourceView {
    let nodes = SourceView {
        kind: "nodes".into(),
        registry: "".into(),
        service: None,
        instance: None,
        health: Health::Healthy,
        first_seen: None,
        last_confirmed: None,
        freshness: Freshness::Fresh,
    };
    let (From::Service { service, .. }, Some((followed, item))) = (from, held) else { return nodes };
    let Some(held) = followed.instances.get(item) else { return nodes };
    let (freshness, last_confirmed) = match &held.kept {
        Some(kept) => {
            let why = kept.why.words().into();
            (Freshness::Stale { since: kept.since, why }, Some(kept.since))
        }
        None => (followed.freshness.clone(), answered),
    };
    SourceView {
        kind: Arc::clone(&service.kind),
        registry: Arc::clone(&service.registry),
        service: Some(Arc::clone(&service.query.service)),
        instance: Some(Arc::clone(&held.instance.id)),
        health: held.instance.health,
        first_seen: Some(held.first_seen),
        last_confirmed,
        freshness,
    }
}

fn endpoint_view(
    endpoint: &Endpoint,
    verdict: Verdict,
    why: Option<Arc<str>>,
    sources: Vec<SourceView>,
) -> EndpointView {
    let details = endpoint.details.as_deref();
    EndpointView {
        address: endpoint.addr,
        host: Arc::clone(&endpoint.host),
        weight: endpoint.weight,
        priority: endpoint.priority,
        health: endpoint.health,
        zone: details.and_then(|details| details.zone.clone()),
        identity: details.and_then(|details| details.identity.clone()),
        meta: details.map(|details| details.meta.clone()).unwrap_or_default(),
        verdict,
        why,
        sources,
    }
}
