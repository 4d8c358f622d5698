//! What workers read of an upstream: its settings, its endpoints and the picker made of them. Immutable.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use discovery::{Endpoint, Endpoints, Health};
use hashbrown::{HashMap, HashSet};
use http::HeaderValue;

use super::GROWTH;
use crate::error::Reason;
use crate::exchange::State as Exchange;
use crate::upstream::breaker::Leave;
use crate::upstream::drains::Mark;
use crate::upstream::endpoint::{EndpointKey, EndpointState, Picked};
use crate::upstream::failover::Tiers;
use crate::upstream::panic::{self, Tier};
use crate::upstream::picker::{Peer, PickKey, Picker, Selection, Tried, eligible};
use crate::upstream::round_robin::CursorCell;
use crate::upstream::settings::Settings;
use crate::upstream::sticky::Sessions;

/// How often endpoints that are gone are looked at while requests are under way on them.
const LEAVING: Duration = Duration::from_millis(250);

/// What workers read.
#[derive(Debug)]
pub struct State {
    /// The compiled settings.
    pub settings: Arc<Settings>,
    /// Counts the states of the process.
    pub(super) number: u64,
    picker: Picker,
    pub(super) peers: Vec<Peer>,
    /// Endpoints that take no new request. They are known still, for what is under way on them.
    pub(super) draining: Box<[Peer]>,
    /// Endpoints that are gone, with requests under way.
    pub(super) leaving: Box<[Peer]>,
    /// Priorities that stand again and are held back for a while.
    held: Box<[i32]>,
    /// Why there may be no endpoint, besides that there is none.
    missing: Missing,
    /// Some that are asked for endpoints have never answered.
    unheard: bool,
    /// Endpoints may be left out because nobody knows them yet, or has vouched for them for too long.
    unsure: bool,
    /// Endpoints that were left out, where it matters that they come back; sorted.
    left_out: Box<[u64]>,
    /// There where sessions stay at their endpoint.
    sessions: Option<Arc<Sessions>>,
}

fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What is known of endpoints that are not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Missing {
    /// There are none.
    #[default]
    None,
    /// Names or registries have not answered yet.
    Unknown,
    /// Names or registries could not be asked.
    Failed,
}

/// What a state is made of.
pub(super) struct Made<'a> {
    pub(super) settings: Arc<Settings>,
    pub(super) endpoints: &'a Endpoints,
    pub(super) marks: &'a [Mark],
    pub(super) before: &'a State,
    pub(super) cursor: &'a CursorCell,
    /// What is remembered of priorities, where somebody comes back to look again.
    pub(super) tiers: Option<&'a mut Tiers>,
}

/// An endpoint for one attempt.
#[derive(Debug)]
pub(crate) struct Choice {
    pub(crate) picked: Picked,
    /// The leave of its breaker, if it has one that is to hear of the outcome.
    pub(crate) leave: Option<Leave>,
}

impl State {
    /// Nothing to pick yet.
    pub(super) fn new(settings: Arc<Settings>) -> Self {
        Self {
            settings,
            number: next_number(),
            picker: Picker::default(),
            peers: Vec::new(),
            draining: Box::default(),
            leaving: Box::default(),
            held: Box::default(),
            missing: Missing::default(),
            unheard: false,
            unsure: true,
            left_out: Box::default(),
            sessions: None,
        }
    }

    /// The state of `endpoints`, and when to make another one; those that were there before keep what is known of them.
    /// The ones that `marks` cover take no new request.
    pub(super) fn of(made: Made<'_>) -> (Self, Option<Duration>) {
        let Made { settings, endpoints, marks, before, cursor, tiers: memory } = made;
        let mut known = Known::new(before);
        let (mut peers, mut draining) = (Vec::new(), Vec::new());
        if endpoints.list.is_empty() && endpoints.pending > 0 {
            // New names are still asked for: until they answer, the former addresses serve.
            let is_marked =
                |peer: &Peer| marks.iter().any(|mark| mark.names(peer.state.addr(), peer.state.host()));
            (draining, peers) = before.peers.iter().cloned().partition(is_marked);
            draining.extend(before.draining.iter().cloned());
            known.keep_all();
        } else {
            peers.reserve_exact(endpoints.list.len());
            for endpoint in &endpoints.list {
                let peer = known.peer(endpoint, endpoints.list.len() == 1, &settings);
                if endpoint.health == Health::Draining || marks.iter().any(|mark| mark.covers(endpoint)) {
                    draining.push(peer);
                } else {
                    peers.push(peer);
                }
            }
        }
        let followed = memory.is_some();
        let leaving = known.gone(followed);
        draining.iter().for_each(|peer| peer.state.leave());
        let mut again: Option<Duration> = (!leaving.is_empty()).then_some(LEAVING);
        let mut look = |after: Duration| again = Some(again.map_or(after, |again| again.min(after)));
        let now = Instant::now();
        let mut left_out = Vec::new();
        if let Some(time) = settings.slow_start {
            before.chill(&peers, &known, now);
            left_out.extend(peers.iter().filter(|peer| !peer.usable()).map(|peer| peer.state.id()));
            left_out.sort_unstable();
            for peer in &mut peers {
                peer.warmth = peer.state.warmth(Some(time), now);
            }
            if peers.iter().any(|peer| peer.warmth < 100) {
                look((time / 20).clamp(GROWTH.0, GROWTH.1));
            }
        }
        if settings.breaker.is_some() || before.settings.breaker.is_some() {
            peers.iter().for_each(|peer| peer.state.settle_breaker(settings.breaker.as_ref()));
        }
        let tiers = panic::tiers(eligible(&peers));
        let mut held = Vec::new();
        if let (Some(rule), Some(memory)) = (&settings.failover, memory) {
            let stand = |tier: &Tier| (tier.priority, tier.stands(settings.panic_threshold));
            let stand: Vec<_> = tiers.iter().map(stand).collect();
            let verdict = memory.settle(rule, &stand, now, std::time::SystemTime::now());
            verdict.again.into_iter().for_each(look);
            held = verdict.priorities;
        }
        let selection = selection(&settings, &held);
        let picker = Picker::of_tiers(settings.algorithm, &peers, &tiers, &selection, cursor, &before.picker);
        let sessions = settings.sticky.as_ref().map(|rule| {
            let usable = |peer: &&Peer| peer.health <= Health::Warning || picker.uses_all();
            Sessions::settle(before.sessions.as_ref(), rule, peers.iter().filter(usable))
        });
        let missing = match (endpoints.pending, endpoints.failures.as_slice()) {
            (0, []) => Missing::None,
            (0, _) => Missing::Failed,
            _ => Missing::Unknown,
        };
        let state = Self {
            number: next_number(),
            picker,
            peers,
            draining: draining.into(),
            leaving: leaving.into(),
            held: held.into(),
            missing,
            unheard: endpoints.failures.iter().any(|failure| !failure.stale),
            unsure: endpoints.pending > 0 || endpoints.degraded,
            left_out: left_out.into(),
            sessions,
            settings,
        };
        (state, again)
    }

    /// Those of the next peers that are not among these, or were left out and are not any more, start cold. The first
    /// ones of all do not: there is nobody to take their part.
    fn chill(&self, next: &[Peer], known: &Known<'_>, now: Instant) {
        if self.peers.is_empty() {
            return;
        }
        for peer in next {
            let id = peer.state.id();
            let is_back = self.left_out.binary_search(&id).is_ok() && peer.usable();
            if is_back || known.is_new(id) {
                peer.state.start_cold(now);
            }
        }
    }

    /// The endpoints it was made of, where all of them are addresses.
    pub(super) fn endpoints(&self) -> Endpoints {
        let endpoint = |peer: &Peer| Endpoint {
            addr: peer.state.addr(),
            host: peer.state.host().clone(),
            weight: peer.weight,
            siblings: peer.siblings,
            priority: peer.priority,
            health: Health::Healthy,
            details: None,
        };
        let list = self.peers.iter().chain(&self.draining).map(endpoint).collect();
        Endpoints { list, ..Endpoints::default() }
    }

    /// The endpoint for the first attempt: that of the request's session, or one that the algorithm chooses.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn first(&self, key: &PickKey, x: &Exchange) -> Result<Choice, Reason> {
        self.of_session(key, x).map_or_else(|| self.choose(key, &Tried::default()), Ok)
    }

    /// The endpoint for another attempt: one that was not tried. An upstream of one endpoint is asked there again, as
    /// often as `retries` says.
    pub(crate) fn again(&self, key: &PickKey, tried: &Tried) -> Option<Choice> {
        match &*self.peers {
            [_] => self.choose(key, &Tried::default()).ok(),
            _ => self.choose(key, tried).ok(),
        }
    }

    /// The next endpoint that was not tried and whose breaker lets the request pass.
    pub(crate) fn choose(&self, key: &PickKey, tried: &Tried) -> Result<Choice, Reason> {
        let Some(rule) = &self.settings.breaker else {
            let picked = self.picker.pick(key, tried).ok_or_else(|| self.nothing())?;
            return Ok(Choice { picked, leave: None });
        };
        let mut passed = tried.clone();
        let mut first: Option<&Arc<EndpointState>> = None;
        while let Some(endpoint) = self.picker.peek(key, &passed) {
            if let Some(choice) = admitted(endpoint, key.now) {
                return Ok(choice);
            }
            passed.add(endpoint);
            first = first.or(Some(endpoint));
        }
        match first {
            // Its outcome counts for no breaker: they have to cool down as they are.
            Some(endpoint) if rule.use_all => {
                Ok(Choice { picked: Picked::new(Arc::clone(endpoint)), leave: None })
            }
            Some(_) => Err(Reason::BreakerOpen),
            None => Err(self.nothing()),
        }
    }

    /// The endpoint at this address, whatever is thought of it: somebody has asked for this one.
    pub(crate) fn at(&self, address: SocketAddr) -> Option<Choice> {
        let peer = self.peers.iter().chain(&self.draining).find(|peer| peer.state.addr() == address)?;
        Some(Choice { picked: Picked::new(peer.state.clone()), leave: None })
    }

    /// The endpoint of the request's session, if it can be used.
    fn of_session(&self, key: &PickKey, x: &Exchange) -> Option<Choice> {
        let endpoint = self.sessions.as_ref()?.endpoint(x)?;
        let usable = endpoint.health.state().usable() || self.picker.uses_all();
        usable.then(|| admitted(endpoint, key.now)).flatten()
    }

    /// The cookie that an answer of this endpoint carries, unless the request has it already.
    pub(crate) fn cookie(&self, x: &Exchange, endpoint: &EndpointState) -> Option<&HeaderValue> {
        let sessions = self.sessions.as_ref()?;
        let is_known = sessions.endpoint(x).is_some_and(|known| known.id() == endpoint.id());
        if is_known { None } else { sessions.cookie(endpoint) }
    }

    #[cfg(test)]
    pub(crate) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// How many further attempts a request may make.
    pub(crate) fn retries(&self) -> u32 {
        let others = u32::try_from(self.peers.len().saturating_sub(1)).unwrap_or(u32::MAX);
        self.settings.retries.unwrap_or(others)
    }

    /// Whether there may be endpoints in a moment: nothing is known of them yet.
    pub(crate) fn is_unknown(&self) -> bool {
        self.missing == Missing::Unknown && self.peers.is_empty() && self.draining.is_empty()
    }

    /// Whether an endpoint that is not among these has left, `seen` if it was among them before.
    pub(super) fn is_sure(&self, seen: bool) -> bool {
        !self.unsure && (seen || !self.unheard)
    }

    /// Why nothing could be picked by a request that has tried nothing yet.
    pub(crate) fn nothing(&self) -> Reason {
        let registry = self.settings.is_discovered;
        match self.missing {
            _ if !self.peers.is_empty() => Reason::NoHealthyNode,
            _ if !self.draining.is_empty() => Reason::NoNodes,
            Missing::None => Reason::NoNodes,
            Missing::Unknown if registry => Reason::DiscoveryPending,
            Missing::Failed if registry => Reason::DiscoveryFailed,
            Missing::Unknown | Missing::Failed => Reason::DnsFailed,
        }
    }

    /// Too few endpoints are healthy, or none.
    pub(super) fn is_degraded(&self) -> bool {
        self.picker.degraded()
    }

    /// Unhealthy endpoints are used as well.
    pub(super) fn uses_all(&self) -> bool {
        self.picker.uses_all()
    }

    /// The turn in which each endpoint gets requests: 0 for the first.
    pub(super) fn turns(&self) -> HashMap<u64, usize> {
        let tiers = panic::tiers(eligible(&self.peers));
        let levels = Picker::levels(&self.peers, &tiers, &selection(&self.settings, &self.held));
        let turns = levels.iter().enumerate();
        turns.flat_map(|(turn, level)| level.iter().map(move |peer| (peer.state.id(), turn))).collect()
    }

    /// Whether a priority stands again and is held back.
    pub(super) fn is_held(&self, priority: i32) -> bool {
        self.held.contains(&priority)
    }
}

fn selection<'a>(settings: &'a Settings, held: &'a [i32]) -> Selection<'a> {
    Selection {
        fail_open: settings.fail_open,
        panic_threshold: settings.panic_threshold,
        nearness: settings.nearness.as_deref(),
        held,
    }
}

/// The endpoint, if its breaker lets a request pass.
fn admitted(endpoint: &Arc<EndpointState>, now: Instant) -> Option<Choice> {
    let leave = match endpoint.breaker() {
        Some(breaker) => Some(breaker.enter(now)?),
        None => None,
    };
    Some(Choice { picked: Picked::new(Arc::clone(endpoint)), leave })
}

/// The endpoints of a former state, to be found again by those of the next.
///
/// Lists keep their order, so the next endpoint is nearly always the next of before; only where they differ is a map
/// made. So one change among ten thousand endpoints is found by walking along them.
struct Known<'a> {
    before: Vec<&'a Peer>,
    /// How many of them took requests.
    in_use: usize,
    next: usize,
    taken: Vec<bool>,
    by_key: Option<HashMap<(std::net::SocketAddr, &'a str), usize>>,
    /// Endpoints that were not known, each once.
    fresh: HashMap<EndpointKey, Arc<EndpointState>>,
    /// Their ids, and of those that took no requests before.
    new: HashSet<u64>,
}

impl<'a> Known<'a> {
    fn new(state: &'a State) -> Self {
        let before: Vec<&Peer> = state.peers.iter().chain(&state.draining).chain(&state.leaving).collect();
        Self {
            taken: vec![false; before.len()],
            in_use: state.peers.len(),
            before,
            next: 0,
            by_key: None,
            fresh: HashMap::new(),
            new: HashSet::new(),
        }
    }

    fn keep_all(&mut self) {
        self.taken.fill(true);
    }

    /// The endpoint with its state of before, or a fresh one; two of one key are one.
    fn peer(&mut self, endpoint: &Endpoint, alone: bool, settings: &Settings) -> Peer {
        let place = self.find(endpoint);
        let state = match place.and_then(|place| self.before.get(place)) {
            Some(peer) => peer.state.clone(),
            None => {
                let key = EndpointKey { addr: endpoint.addr, host: endpoint.host.clone() };
                // Among very many small upstreams, the first endpoint of all needs no maps.
                if alone && self.before.is_empty() {
                    return self.made(Arc::new(EndpointState::new(key)), endpoint, settings);
                }
                let state = self.fresh.entry(key).or_insert_with_key(|key| {
                    let state = Arc::new(EndpointState::new(key.clone()));
                    self.new.insert(state.id());
                    state
                });
                state.clone()
            }
        };
        if let Some(place) = place {
            self.next = place + 1;
            self.taken.iter_mut().skip(place).take(1).for_each(|taken| *taken = true);
            if place >= self.in_use {
                state.stay();
                self.new.insert(state.id());
            }
        }
        self.made(state, endpoint, settings)
    }

    fn made(&self, state: Arc<EndpointState>, endpoint: &Endpoint, settings: &Settings) -> Peer {
        let details = endpoint.details.clone().or_else(|| {
            settings.places.as_ref().and_then(|places| places.find(&endpoint.host, endpoint.addr.port()))
        });
        state.settle_mesh(settings.mesh.as_ref().and_then(|rule| rule.peer(details.as_deref())));
        Peer {
            state,
            weight: endpoint.weight,
            siblings: endpoint.siblings,
            priority: endpoint.priority,
            warmth: 100,
            health: endpoint.health,
            details,
        }
    }

    fn find(&mut self, endpoint: &Endpoint) -> Option<usize> {
        let is_same = |peer: &&Peer| {
            let host = peer.state.host();
            peer.state.addr() == endpoint.addr
                && (Arc::ptr_eq(host, &endpoint.host) || *host == endpoint.host)
        };
        // The next one; or the one after it, where one was taken out.
        let near = (self.next..self.next + 2).find(|place| self.before.get(*place).is_some_and(is_same));
        if near.is_some() || self.before.len() <= 2 {
            return near.or_else(|| self.before.iter().position(is_same));
        }
        let by_key = self.by_key.get_or_insert_with(|| {
            let places = self.before.iter().enumerate();
            places.rev().map(|(place, peer)| ((peer.state.addr(), &**peer.state.host()), place)).collect()
        });
        by_key.get(&(endpoint.addr, &*endpoint.host)).copied()
    }

    /// Whether an endpoint took no requests before.
    fn is_new(&self, id: u64) -> bool {
        self.new.contains(&id)
    }

    /// The endpoints that are not there any more. They are told so; those with requests under way are given back, if
    /// somebody comes back to look.
    fn gone(&self, followed: bool) -> Vec<Peer> {
        let of = |which: bool| {
            let places = self.before.iter().zip(&self.taken).filter(move |(_, taken)| **taken == which);
            places.map(|(peer, _)| *peer)
        };
        if of(false).next().is_none() {
            return Vec::new();
        }
        // Two nodes of one key share their state, of which only one may have gone.
        let kept: HashSet<u64> = of(true).map(|peer| peer.state.id()).collect();
        of(false)
            .filter(|peer| !kept.contains(&peer.state.id()))
            .inspect(|peer| peer.state.leave())
            .filter(|peer| followed && peer.state.active() > 0)
            .cloned()
            .collect()
    }
}
