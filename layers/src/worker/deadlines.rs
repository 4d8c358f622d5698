//! Deadlines of clients without a timer per request. Every connection notes in a few atomics what it waits for and
//! since when; one sweep per tick looks only at those whose time may have come, and ends them. Slow handshakes,
//! request lines, headers, bodies and readers, idle connections and forgotten streams all end here.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Waker};
use std::time::Duration;

/// How often a worker looks. Deadlines end up to two ticks late, never early.
pub const TICK: Duration = Duration::from_millis(100);

/// Buckets of the wheel; deadlines further away come by once more.
const BUCKETS: u32 = 1024;
/// A watch that can change what it waits for without a word is looked at this often.
const REVISIT: u32 = 50;
/// An idle connection gives its buffers back after this many ticks, up to twice as many.
const PARK_AFTER: u32 = 10;
const NONE: u32 = u32::MAX;

/// How long a client may take for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From accept to the end of the TLS handshake, a PROXY header included.
    pub handshake: Duration,
    /// From the first byte of a head (or accept) to its end. nginx `client_header_timeout`.
    pub header: Duration,
    /// Between two reads of a body. nginx `client_body_timeout`.
    pub body: Duration,
    /// Between two writes that make progress. nginx `send_timeout`.
    pub send: Duration,
    /// Between two requests. nginx `keepalive_timeout`.
    pub idle: Duration,
    /// After the last answer, for the client to read it and close.
    pub linger: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            header: Duration::from_secs(20),
            body: Duration::from_secs(60),
            send: Duration::from_secs(10),
            idle: Duration::from_secs(60),
            linger: Duration::from_secs(5),
        }
    }
}

/// What a connection or stream waits for from its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Nothing: the gateway or the upstream is at work, or a tunnel is open.
    Busy = 0,
    /// The PROXY header and the TLS handshake.
    Handshake,
    /// The rest of a request head, or the first one.
    Head,
    /// The next piece of a body.
    Body,
    /// The next request.
    Idle,
    /// The end of the connection.
    Linger,
}

impl Phase {
    const ALL: [Self; 6] = [Self::Busy, Self::Handshake, Self::Head, Self::Body, Self::Idle, Self::Linger];

    fn from_u8(value: u8) -> Self {
        Self::ALL.get(usize::from(value)).copied().unwrap_or(Self::Busy)
    }
}

/// Why a connection or stream was ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Ended {
    /// The handshake took too long.
    HandshakeTimeout = 1,
    /// The head took too long.
    HeaderTimeout,
    /// The body stalled.
    BodyTimeout,
    /// The client does not read.
    SendTimeout,
    /// No further request came.
    IdleTimeout,
    /// The client did not close after the last answer.
    LingerTimeout,
    /// The drain's deadline passed.
    Drain,
    /// It idled, and its place was needed for a new connection.
    Evicted,
    /// A policy forbids it, or its peer is no longer trusted.
    Forbidden,
}

impl Ended {
    /// All, for metrics.
    pub const ALL: [Self; 9] = [
        Self::HandshakeTimeout,
        Self::HeaderTimeout,
        Self::BodyTimeout,
        Self::SendTimeout,
        Self::IdleTimeout,
        Self::LingerTimeout,
        Self::Drain,
        Self::Evicted,
        Self::Forbidden,
    ];

    /// A short code for logs and metrics.
    pub fn code(self) -> &'static str {
        match self {
            Self::HandshakeTimeout => "handshake_timeout",
            Self::HeaderTimeout => "header_timeout",
            Self::BodyTimeout => "body_timeout",
            Self::SendTimeout => "send_timeout",
            Self::IdleTimeout => "idle_timeout",
            Self::LingerTimeout => "linger_timeout",
            Self::Drain => "drain",
            Self::Evicted => "evicted",
            Self::Forbidden => "forbidden",
        }
    }

    fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.get(usize::from(value).checked_sub(1)?).copied()
    }

    fn of(phase: Phase) -> Option<Self> {
        match phase {
            Phase::Busy => None,
            Phase::Handshake => Some(Self::HandshakeTimeout),
            Phase::Head => Some(Self::HeaderTimeout),
            Phase::Body => Some(Self::BodyTimeout),
            Phase::Idle => Some(Self::IdleTimeout),
            Phase::Linger => Some(Self::LingerTimeout),
        }
    }
}

/// The worker's clock: ticks since it started. Ticks are counted, not measured, so a suspended process does not
/// find all its connections expired when it wakes.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicU32>);

impl Clock {
    /// Ticks so far.
    pub fn now(&self) -> u32 {
        self.0.load(Relaxed)
    }
}

/// What a connection or stream waits for. `Send`, because it sits in the transport that an upgrade hands out; all
/// of its users are on one thread, so every access is a plain load or store.
#[derive(Debug)]
pub struct Watch {
    clock: Clock,
    phase: AtomicU8,
    since: AtomicU32,
    /// Tick since which a write makes no progress, plus one; 0 while none is stuck.
    stuck: AtomicU32,
    ended: AtomicU8,
    /// Requests at work.
    in_flight: AtomicU32,
    may_park: AtomicBool,
    park: AtomicBool,
    /// It changes its phase only with [`Watched::unpark`], so nobody has to look before its deadline.
    parked: AtomicBool,
    waker: OnceLock<Waker>,
}

impl Watch {
    fn new(clock: Clock, phase: Phase) -> Self {
        let now = clock.now();
        Self {
            clock,
            phase: AtomicU8::new(phase as u8),
            since: AtomicU32::new(now),
            stuck: AtomicU32::new(0),
            ended: AtomicU8::new(0),
            in_flight: AtomicU32::new(0),
            may_park: AtomicBool::new(false),
            park: AtomicBool::new(false),
            parked: AtomicBool::new(false),
            waker: OnceLock::new(),
        }
    }

    /// From now on it waits for this.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
        self.since.store(self.clock.now(), Relaxed);
    }

    /// It waits for this, and has done so before unless it waited for something else.
    pub fn stay(&self, phase: Phase) {
        if self.phase() != phase {
            self.enter(phase);
        }
    }

    /// It waits for nothing from the client.
    pub fn busy(&self) {
        self.phase.store(Phase::Busy as u8, Relaxed);
    }

    /// What it waits for.
    pub fn phase(&self) -> Phase {
        Phase::from_u8(self.phase.load(Relaxed))
    }

    /// The worker's tick.
    pub fn now(&self) -> u32 {
        self.clock.now()
    }

    /// Ticks since it waits for it.
    pub fn waited(&self) -> u32 {
        self.clock.now().saturating_sub(self.since.load(Relaxed))
    }

    /// A write is stuck; the first call since the last progress counts.
    pub fn stuck(&self) {
        if self.stuck.load(Relaxed) == 0 {
            self.stuck.store(self.clock.now().saturating_add(1), Relaxed);
        }
    }

    /// Bytes went out.
    pub fn unstuck(&self) {
        if self.stuck.load(Relaxed) != 0 {
            self.stuck.store(0, Relaxed);
        }
    }

    /// Requests at work.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// One request more or less at work.
    pub(crate) fn set_in_flight(&self, count: u32) {
        self.in_flight.store(count, Relaxed);
    }

    /// Ends it from outside; the first cause stays.
    pub fn end(&self, cause: Ended) {
        if self.ended.load(Relaxed) == 0 {
            self.ended.store(cause as u8, Relaxed);
        }
        self.wake();
    }

    /// Why it was ended, if it was.
    pub fn ended(&self) -> Option<Ended> {
        Ended::from_u8(self.ended.load(Relaxed))
    }

    /// Gives it one more chance: whoever owns it deals with the cause.
    pub fn pardon(&self) {
        self.ended.store(0, Relaxed);
        self.busy();
    }

    fn allow_parking(&self, allowed: bool) {
        self.may_park.store(allowed, Relaxed);
        self.park.store(false, Relaxed);
    }

    /// Whether nobody looks before its deadline.
    pub(crate) fn is_parked(&self) -> bool {
        self.parked.load(Relaxed)
    }

    /// Whether its buffers are asked back.
    pub fn wants_parking(&self) -> bool {
        self.park.load(Relaxed)
    }

    /// Remembers the task that owns it. A task keeps its waker for life, so the first call is enough.
    pub fn attach(&self, cx: &Context<'_>) {
        self.waker.get_or_init(|| cx.waker().clone());
    }

    /// As [`attach`](Self::attach), for a task that is not the one running.
    pub fn attach_waker(&self, waker: Waker) {
        let _ = self.waker.set(waker);
    }

    /// Lets the owner look.
    pub fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }

    /// The tick at which it is over, and why.
    fn deadline(&self, ticks: &Ticks) -> Option<(u32, Ended)> {
        let phase = self.phase();
        let waiting = Ended::of(phase).map(|cause| {
            let allowed = ticks.of(phase);
            (self.since.load(Relaxed).saturating_add(allowed), cause)
        });
        let stuck = match self.stuck.load(Relaxed) {
            0 => None,
            since => Some((since.saturating_add(ticks.send), Ended::SendTimeout)),
        };
        match (waiting, stuck) {
            (Some(a), Some(b)) => Some(if b.0 < a.0 { b } else { a }),
            (a, b) => a.or(b),
        }
    }
}

/// [`Timeouts`] in ticks, rounded up and one more, because a watch may begin late in a tick.
#[derive(Clone, Copy, Debug)]
struct Ticks {
    handshake: u32,
    header: u32,
    body: u32,
    send: u32,
    idle: u32,
    linger: u32,
    /// No watch is looked at less often than its shortest deadline, so that none ends late.
    revisit: u32,
}

impl Ticks {
    fn new(timeouts: &Timeouts) -> Self {
        let Timeouts { handshake, header, body, send, idle, linger } = *timeouts;
        let all = [handshake, header, body, send, idle, linger].map(ticks);
        let [handshake, header, body, send, idle, linger] = all;
        let revisit = all.into_iter().fold(REVISIT, u32::min);
        Self { handshake, header, body, send, idle, linger, revisit }
    }

    fn of(&self, phase: Phase) -> u32 {
        match phase {
            Phase::Busy => NONE,
            Phase::Handshake => self.handshake,
            Phase::Head => self.header,
            Phase::Body => self.body,
            Phase::Idle => self.idle,
            Phase::Linger => self.linger,
        }
    }
}

fn ticks(duration: Duration) -> u32 {
    let ticks = duration.as_millis().div_ceil(TICK.as_millis());
    u32::try_from(ticks).unwrap_or(NONE / 2).saturating_add(1)
}

struct Node {
    watch: Option<Arc<Watch>>,
    previous: u32,
    next: u32,
    bucket: u32,
}

/// Lists by the tick at which somebody looks again; adding, moving and removing cost the same for any number.
struct Wheel {
    nodes: Vec<Node>,
    /// First of the list of unused nodes.
    free: u32,
    buckets: Vec<u32>,
    count: usize,
}

impl Wheel {
    fn node(&mut self, index: u32) -> Option<&mut Node> {
        self.nodes.get_mut(index as usize)
    }

    fn insert(&mut self, watch: Arc<Watch>, due: u32) -> u32 {
        let node = Node { watch: Some(watch), previous: NONE, next: NONE, bucket: 0 };
        let free = self.free;
        let index = match self.node(free) {
            Some(slot) => {
                let next_free = std::mem::replace(slot, node).next;
                self.free = next_free;
                free
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as u32
            }
        };
        self.count += 1;
        self.link(index, due);
        index
    }

    fn link(&mut self, index: u32, due: u32) {
        let bucket = due % BUCKETS;
        let Some(head) = self.buckets.get_mut(bucket as usize) else { return };
        let next = std::mem::replace(head, index);
        if let Some(node) = self.node(next) {
            node.previous = index;
        }
        if let Some(node) = self.node(index) {
            (node.previous, node.next, node.bucket) = (NONE, next, bucket);
        }
    }

    fn unlink(&mut self, index: u32) {
        let Some(node) = self.node(index) else { return };
        let (previous, next, bucket) = (node.previous, node.next, node.bucket);
        match self.node(previous) {
            Some(before) => before.next = next,
            None => {
                if let Some(head) = self.buckets.get_mut(bucket as usize) {
                    *head = next;
                }
            }
        }
        if let Some(after) = self.node(next) {
            after.previous = previous;
        }
    }

    fn remove(&mut self, index: u32) {
        self.unlink(index);
        let free = self.free;
        if let Some(node) = self.node(index) {
            node.watch = None;
            node.next = free;
            self.free = index;
            self.count -= 1;
        }
    }
}

/// The deadlines of one worker.
pub struct Deadlines {
    clock: Clock,
    ticks: Ticks,
    wheel: RefCell<Wheel>,
}

impl Deadlines {
    /// With these time-outs for every watch.
    pub fn new(timeouts: &Timeouts) -> Rc<Self> {
        let wheel = Wheel { nodes: Vec::new(), free: NONE, buckets: vec![NONE; BUCKETS as usize], count: 0 };
        Rc::new(Self { clock: Clock::default(), ticks: Ticks::new(timeouts), wheel: RefCell::new(wheel) })
    }

    /// The worker's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Watches something new; it is forgotten when the [`Watched`] is dropped.
    pub fn watch(self: &Rc<Self>, phase: Phase) -> Watched {
        let watch = Arc::new(Watch::new(self.clock.clone(), phase));
        let due = self.due(&watch);
        let index = self.wheel.borrow_mut().insert(watch.clone(), due);
        Watched { deadlines: self.clone(), watch, index }
    }

    /// How many are watched.
    pub fn len(&self) -> usize {
        self.wheel.borrow().count
    }

    /// Whether none is watched.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shows all that are watched, in no order.
    pub fn each(&self, mut show: impl FnMut(&Arc<Watch>)) {
        // Copied out, because a woken or ended one may change the wheel.
        let all: Vec<_> = self.wheel.borrow().nodes.iter().filter_map(|node| node.watch.clone()).collect();
        all.iter().for_each(&mut show);
    }

    /// Ends the connection that has idled longest, of those that hold no buffers. False if none was found near.
    pub fn evict(&self) -> bool {
        const LOOK_AT: usize = 8192;
        let wheel = self.wheel.borrow();
        let now = self.clock.now();
        let mut looked = 0;
        // The longest idle is the one whose deadline comes first.
        for ahead in 1..BUCKETS {
            let bucket = now.wrapping_add(ahead) % BUCKETS;
            let mut index = wheel.buckets.get(bucket as usize).copied().unwrap_or(NONE);
            while let Some(node) = wheel.nodes.get(index as usize) {
                if let Some(watch) = &node.watch
                    && watch.parked.load(Relaxed)
                    && watch.phase() == Phase::Idle
                    && watch.ended().is_none()
                {
                    watch.end(Ended::Evicted);
                    return true;
                }
                looked += 1;
                if looked >= LOOK_AT {
                    return false;
                }
                index = node.next;
            }
        }
        false
    }

    /// Goes one tick on and ends whose time is over. Call it once a [`TICK`].
    pub fn tick(&self) {
        let now = self.clock.now().saturating_add(1);
        self.clock.0.store(now, Relaxed);
        let wheel = &mut *self.wheel.borrow_mut();
        let Some(head) = wheel.buckets.get_mut((now % BUCKETS) as usize) else { return };
        let mut index = std::mem::replace(head, NONE);
        while let Some(node) = wheel.node(index) {
            let next = node.next;
            if let Some(watch) = node.watch.clone() {
                self.look(&watch, now);
                let due = self.due(&watch);
                wheel.link(index, due);
            }
            index = next;
        }
    }

    fn look(&self, watch: &Watch, now: u32) {
        match watch.deadline(&self.ticks) {
            Some((deadline, cause)) if deadline <= now => watch.end(cause),
            _ if watch.phase() == Phase::Idle
                && watch.may_park.load(Relaxed)
                && watch.waited() >= PARK_AFTER
                && !watch.park.swap(true, Relaxed) =>
            {
                watch.wake();
            }
            _ => {}
        }
    }

    /// When to look next: at the deadline, or sooner if the watch may enter another phase unseen.
    fn due(&self, watch: &Watch) -> u32 {
        let now = self.clock.now();
        let deadline = watch.deadline(&self.ticks).map_or(NONE, |(deadline, _)| deadline);
        let far = if watch.parked.load(Relaxed) {
            BUCKETS - 1
        } else if watch.may_park.load(Relaxed) {
            PARK_AFTER.min(self.ticks.revisit)
        } else {
            self.ticks.revisit
        };
        deadline.min(now.saturating_add(far)).max(now.saturating_add(1))
    }
}

/// A watch and its place in the wheel.
pub struct Watched {
    deadlines: Rc<Deadlines>,
    watch: Arc<Watch>,
    index: u32,
}

impl Watched {
    /// What is watched.
    pub fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    /// Whether its buffers may be asked back when it idles.
    pub fn allow_parking(&self, allowed: bool) {
        self.watch.allow_parking(allowed);
        self.reschedule();
    }

    /// It waits in this phase and enters no other without [`unpark`](Self::unpark).
    pub fn park(&self, phase: Phase) {
        self.watch.parked.store(true, Relaxed);
        self.watch.allow_parking(false);
        self.watch.stay(phase);
        self.reschedule();
    }

    /// It may enter other phases unseen from now on.
    pub fn unpark(&self) {
        self.watch.parked.store(false, Relaxed);
        self.reschedule();
    }

    /// It has entered a phase with a nearer deadline while it was parked.
    pub fn reschedule(&self) {
        let due = self.deadlines.due(&self.watch);
        let mut wheel = self.deadlines.wheel.borrow_mut();
        wheel.unlink(self.index);
        wheel.link(self.index, due);
    }
}

impl std::ops::Deref for Watched {
    type Target = Watch;

    fn deref(&self) -> &Watch {
        &self.watch
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.deadlines.wheel.borrow_mut().remove(self.index);
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn seconds(handshake: u64, header: u64, body: u64, send: u64, idle: u64) -> Timeouts {
        let seconds = Duration::from_secs;
        Timeouts {
            handshake: seconds(handshake),
            header: seconds(header),
            body: seconds(body),
            send: seconds(send),
            idle: seconds(idle),
            linger: seconds(5),
        }
    }

    /// Ticks until it is ended, at most `limit`.
    fn ends_after(deadlines: &Deadlines, watch: &Watch, limit: u32) -> Option<(u32, Ended)> {
        (1..=limit).find_map(|n| {
            deadlines.tick();
            watch.ended().map(|cause| (n, cause))
        })
    }

    #[test]
    fn every_phase_ends_at_its_time() {
        for (phase, tick, cause) in [
            (Phase::Handshake, 101, Ended::HandshakeTimeout),
            (Phase::Head, 201, Ended::HeaderTimeout),
            (Phase::Body, 301, Ended::BodyTimeout),
            (Phase::Idle, 1201, Ended::IdleTimeout),
            (Phase::Linger, 51, Ended::LingerTimeout),
        ] {
            let deadlines = Deadlines::new(&seconds(10, 20, 30, 10, 120));
            let watched = deadlines.watch(phase);
            assert_eq!(ends_after(&deadlines, &watched, 2000), Some((tick, cause)), "{phase:?}");
        }
    }

    #[test]
    fn a_phase_entered_unseen_ends_in_time() {
        let deadlines = Deadlines::new(&seconds(10, 20, 60, 10, 60));
        for idle_ticks in 0..130 {
            let watched = deadlines.watch(Phase::Idle);
            for _ in 0..idle_ticks {
                deadlines.tick();
            }
            watched.enter(Phase::Head);
            assert_eq!(
                ends_after(&deadlines, &watched, 400),
                Some((201, Ended::HeaderTimeout)),
                "{idle_ticks}"
            );
        }
    }

    #[test]
    fn a_parked_one_is_rescheduled_when_it_wakes() {
        let deadlines = Deadlines::new(&seconds(10, 20, 60, 10, 60));
        let watched = deadlines.watch(Phase::Idle);
        watched.park(Phase::Idle);
        (0..100).for_each(|_| deadlines.tick());
        watched.enter(Phase::Head);
        watched.unpark();
        assert_eq!(ends_after(&deadlines, &watched, 400), Some((201, Ended::HeaderTimeout)));
    }

    #[test]
    fn progress_moves_the_deadline() {
        let deadlines = Deadlines::new(&seconds(10, 20, 3, 10, 60));
        let watched = deadlines.watch(Phase::Body);
        for _ in 0..100 {
            deadlines.tick();
            watched.enter(Phase::Body);
        }
        assert_eq!(watched.ended(), None);
        assert_eq!(ends_after(&deadlines, &watched, 100), Some((31, Ended::BodyTimeout)));
    }

    #[test]
    fn a_client_that_does_not_read_is_ended_while_the_gateway_is_busy() {
        let deadlines = Deadlines::new(&seconds(10, 20, 30, 2, 60));
        let watched = deadlines.watch(Phase::Busy);
        assert_eq!(ends_after(&deadlines, &watched, 500), None, "busy has no deadline");
        watched.stuck();
        deadlines.tick();
        watched.stuck();
        let (tick, cause) = ends_after(&deadlines, &watched, 100).unwrap();
        assert!(tick <= 22 && cause == Ended::SendTimeout, "{tick}");
        let other = deadlines.watch(Phase::Busy);
        for _ in 0..100 {
            other.stuck();
            deadlines.tick();
            other.unstuck();
        }
        assert_eq!(other.ended(), None);
    }

    #[test]
    fn an_idle_connection_is_asked_once_for_its_buffers() {
        let deadlines = Deadlines::new(&Timeouts::default());
        let watched = deadlines.watch(Phase::Idle);
        watched.allow_parking(true);
        let asked = (1..100u32).find(|_| {
            deadlines.tick();
            watched.wants_parking()
        });
        assert_eq!(asked, Some(PARK_AFTER));
        watched.park(Phase::Idle);
        (0..100).for_each(|_| deadlines.tick());
        assert!(!watched.wants_parking());
    }

    #[test]
    fn the_longest_idle_makes_room() {
        let deadlines = Deadlines::new(&Timeouts::default());
        let _busy = deadlines.watch(Phase::Busy);
        let first = deadlines.watch(Phase::Idle);
        first.park(Phase::Idle);
        deadlines.tick();
        let second = deadlines.watch(Phase::Idle);
        second.park(Phase::Idle);
        for expected in [(Some(Ended::Evicted), None), (Some(Ended::Evicted), Some(Ended::Evicted))] {
            assert!(deadlines.evict());
            assert_eq!((first.ended(), second.ended()), expected);
        }
        assert!(!deadlines.evict());
    }

    #[test]
    fn many_come_and_go_and_only_the_due_are_looked_at() {
        let deadlines = Deadlines::new(&seconds(10, 20, 30, 10, 60));
        let mut kept = Vec::new();
        for n in 0..3000u32 {
            let watched = deadlines.watch(if n % 2 == 0 { Phase::Idle } else { Phase::Handshake });
            if n % 3 == 0 {
                kept.push((deadlines.clock().now(), watched));
            }
            if n % 5 == 0 {
                deadlines.tick();
                kept.retain(|(_, watched)| watched.ended().is_none());
            }
            if n % 7 == 0 && !kept.is_empty() {
                kept.swap_remove(fastrand::usize(..kept.len()));
            }
        }
        assert_eq!(deadlines.len(), kept.len());
        let mut linked = 0;
        {
            let wheel = deadlines.wheel.borrow();
            for head in &wheel.buckets {
                let mut index = *head;
                while index != NONE {
                    linked += 1;
                    index = wheel.nodes[index as usize].next;
                }
            }
        }
        assert_eq!(linked, kept.len(), "lists and nodes agree");
        kept.clear();
        assert!(deadlines.is_empty());
    }

    #[test]
    fn a_short_time_out_shortens_the_look() {
        let deadlines = Deadlines::new(&seconds(1, 1, 1, 1, 60));
        let watched = deadlines.watch(Phase::Busy);
        (0..37).for_each(|_| deadlines.tick());
        watched.enter(Phase::Head);
        let (tick, _) = ends_after(&deadlines, &watched, 100).unwrap();
        assert_eq!(tick, 11);
    }
}
