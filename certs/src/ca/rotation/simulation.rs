//! A mesh in virtual time, under the real driver: workloads that hear late, answer late, are cut off from the authority,
//! come back or never do; an authority that is killed at any write. After every step each workload's certificate has to be
//! accepted by every other workload, because then no handshake can fail.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rcgen::PublicKeyData;
use rustls::pki_types::CertificateDer;

use super::super::authority::{self, Authority, Key, KeyKind};
use super::super::csr::PublicKey;
use super::super::fleet::{Fleet, Said, hash};
use super::super::foundry::Foundry;
use super::super::record::{IssuerId, Lifetimes, Moment, Record, RootId};
use super::super::seal::Sealer;
use super::super::store::memory::Memory;
use super::super::store::{RECORD, Store, StoreError, Stored, SwapError, Version};
use super::command::{Command, NewRoot, Rotate};
use super::driver::{Clock, Driver, found};
use super::forge::Forge;
use super::{Kind, Policy, State, model, plan, renewal};
use crate::identity::TrustDomain;
use crate::trust::{Trust, Usage};

/// Time that goes by when it is told to.
#[derive(Default)]
pub(crate) struct Virtual(AtomicU64);

impl Virtual {
    pub(crate) fn at(moment: Moment) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(moment.0)))
    }

    pub(crate) fn pass(&self, span: Duration) {
        self.0.fetch_add(u64::try_from(span.as_millis()).unwrap(), Ordering::Relaxed);
    }
}

impl Clock for Virtual {
    fn wall(&self) -> Moment {
        Moment(self.0.load(Ordering::Relaxed))
    }

    fn steady(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// A store whose user is killed before or after one of its writes of the record.
#[derive(Default)]
pub(crate) struct Killing {
    inner: Memory,
    /// Writes until then; negative: never.
    fuse: AtomicI64,
    after: AtomicBool,
    dead: AtomicBool,
    writes: AtomicU64,
}

impl Killing {
    fn arm(&self, writes: i64, after: bool) {
        self.fuse.store(writes, Ordering::Relaxed);
        self.after.store(after, Ordering::Relaxed);
    }

    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    fn revive(&self) {
        self.dead.store(false, Ordering::Relaxed);
        self.arm(-1, false);
    }

    fn check(&self) -> Result<(), StoreError> {
        match self.is_dead() {
            true => Err(StoreError::Unavailable { store: "memory".into(), reason: "killed".into() }),
            false => Ok(()),
        }
    }
}

impl Store for Killing {
    fn name(&self) -> &str {
        "memory"
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            self.check()?;
            self.inner.load(name).await
        })
    }

    fn list<'a>(&'a self, start: &'a str) -> BoxFuture<'a, Result<Vec<(String, Stored)>, StoreError>> {
        Box::pin(async move {
            self.check()?;
            self.inner.list(start).await
        })
    }

    fn swap<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        value: &'a [u8],
    ) -> BoxFuture<'a, Result<Version, SwapError>> {
        Box::pin(async move {
            self.check()?;
            if name != RECORD {
                return self.inner.swap(name, seen, value).await;
            }
            self.writes.fetch_add(1, Ordering::Relaxed);
            let hit = self.fuse.fetch_sub(1, Ordering::Relaxed) == 0;
            if hit && !self.after.load(Ordering::Relaxed) {
                self.dead.store(true, Ordering::Relaxed);
            }
            self.check()?;
            let done = self.inner.swap(name, seen, value).await;
            if hit {
                self.dead.store(true, Ordering::Relaxed);
            }
            self.check()?;
            done
        })
    }

    fn remove<'a>(&'a self, name: &'a str, seen: Version) -> BoxFuture<'a, Result<(), SwapError>> {
        Box::pin(async move {
            self.check()?;
            self.inner.remove(name, seen).await
        })
    }

    fn changed<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        at_most: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        self.inner.changed(name, seen, at_most)
    }
}

/// Certificates and bundles: words for large fleets, real ones for small.
pub(crate) trait World {
    type Leaf: Clone;
    type Bundle: Clone;
    fn sign(&mut self, record: &Record, identity: &str, now: Moment) -> Option<Leaf<Self::Leaf>>;
    fn bundle(&mut self, record: &Record) -> Self::Bundle;
    /// What two leaves, or two bundles, have to have in common to be treated alike.
    fn leaf_class(leaf: &Self::Leaf) -> u64;
    fn bundle_class(bundle: &Self::Bundle) -> u64;
    fn accepts(&mut self, bundle: &Self::Bundle, leaf: &Self::Leaf, now: Moment) -> bool;
}

#[derive(Clone)]
pub(crate) struct Leaf<L> {
    issuer: IssuerId,
    serial: String,
    signed_at: Moment,
    not_after: Moment,
    what: L,
}

/// Leaves are the roots that they lead to.
#[derive(Default)]
pub(crate) struct Words {
    serials: u64,
}

impl World for Words {
    type Leaf = Arc<(u64, BTreeSet<RootId>)>;
    type Bundle = Arc<(u64, BTreeSet<RootId>)>;

    fn sign(&mut self, record: &Record, _: &str, now: Moment) -> Option<Leaf<Self::Leaf>> {
        let issuer = record.signing().filter(|issuer| issuer.key.is_some())?;
        let mut roots = BTreeSet::from([issuer.root.clone()]);
        if record.intermediates(issuer).len() > 1 {
            roots.extend(issuer.cross.iter().map(|cross| cross.root.clone()));
        }
        self.serials += 1;
        Some(Leaf {
            issuer: issuer.id.clone(),
            serial: self.serials.to_string(),
            signed_at: now,
            not_after: (now + record.lifetimes.leaf()).min(issuer.not_after),
            what: classed(roots),
        })
    }

    fn bundle(&mut self, record: &Record) -> Self::Bundle {
        classed(record.trusted().map(|root| root.id.clone()).collect())
    }

    fn leaf_class(leaf: &Self::Leaf) -> u64 {
        leaf.0
    }

    fn bundle_class(bundle: &Self::Bundle) -> u64 {
        bundle.0
    }

    fn accepts(&mut self, bundle: &Self::Bundle, leaf: &Self::Leaf, _: Moment) -> bool {
        !bundle.1.is_disjoint(&leaf.1)
    }
}

fn classed(roots: BTreeSet<RootId>) -> Arc<(u64, BTreeSet<RootId>)> {
    let text: Vec<&str> = roots.iter().map(|root| root.0.as_str()).collect();
    Arc::new((hash(text.join(" ").as_bytes()), roots))
}

/// A workload.
struct Proxy<W: World> {
    id: String,
    identity: String,
    generation: u64,
    bundle: W::Bundle,
    leaf: Leaf<W::Leaf>,
    /// Signed, and on its way: arrives then.
    coming: Option<(Moment, Leaf<W::Leaf>)>,
    /// The last request to renew that it knows of, and when it does what it says.
    asked: u64,
    renews_at: Option<Moment>,
    /// Cut off from the authority, not from others.
    cut_until: Moment,
    skew_ms: i64,
    /// It has ended for ever.
    is_over: bool,
}

/// What happens to a mesh.
#[derive(Clone, Copy)]
pub(crate) struct Weather {
    /// In a thousand, for each workload and step: it is cut off.
    pub(crate) cuts: u32,
    /// For at most so long.
    pub(crate) cut: Duration,
    /// In a thousand: an answer is lost.
    pub(crate) loss: u32,
    /// In a thousand, for each step: a new workload comes.
    pub(crate) joins: u32,
    /// In a thousand, for each step: a workload ends without a word.
    pub(crate) ends: u32,
}

pub(crate) const CALM: Weather = Weather { cuts: 0, cut: Duration::ZERO, loss: 0, joins: 0, ends: 0 };
const WINDY: Weather = Weather { cuts: 3, cut: Duration::from_secs(90), loss: 50, joins: 10, ends: 0 };

pub(crate) struct Mesh<W: World> {
    world: W,
    pub(crate) clock: Arc<Virtual>,
    store: Arc<Killing>,
    forge: Arc<dyn Forge>,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) driver: Option<Driver>,
    proxies: Vec<Proxy<W>>,
    random: fastrand::Rng,
    weather: Weather,
    down_until: Moment,
    kills: u64,
    joined: u64,
    checked: u64,
}

const STEP: Duration = Duration::from_secs(1);

fn policy(record: &Record) -> Policy {
    Policy { soak_ms: 10_000, spread_ms: 40_000, ..plan::policy(record) }
}

impl<W: World> Mesh<W> {
    pub(crate) async fn new(
        world: W,
        forge: Arc<dyn Forge>,
        record: Record,
        start: Moment,
        size: usize,
        seed: u64,
        weather: Weather,
    ) -> Self {
        let clock = Virtual::at(start);
        let store = Arc::new(Killing::default());
        store.arm(-1, false);
        found(&*store, &record).await.unwrap();
        let mut mesh = Self {
            world,
            clock,
            store,
            forge,
            fleet: Arc::default(),
            driver: None,
            proxies: Vec::new(),
            random: fastrand::Rng::with_seed(seed),
            weather,
            down_until: Moment::default(),
            kills: 0,
            joined: 0,
            checked: 0,
        };
        mesh.open().await;
        for _ in 0..size {
            mesh.join();
        }
        mesh
    }

    async fn open(&mut self) {
        self.fleet = Arc::default();
        let store: Arc<dyn Store> = self.store.clone();
        let clock: Arc<dyn Clock> = self.clock.clone();
        let driver = Driver::open(store, Arc::clone(&self.fleet), Arc::clone(&self.forge), clock, "ca").await;
        self.driver = Some(driver.unwrap().unwrap().settling(Duration::from_secs(8)));
    }

    fn now(&self) -> Moment {
        self.clock.wall()
    }

    pub(crate) fn record(&self) -> Option<Record> {
        self.driver.as_ref().map(|driver| driver.now().record.clone())
    }

    /// A workload starts: it gets the bundle and a certificate before it does anything.
    fn join(&mut self) {
        let (Some(record), now) = (self.record(), self.now()) else { return };
        self.joined += 1;
        let id = format!("p{}", self.joined);
        let identity = format!("spiffe://mesh.local/ns/n{}/sa/s{}", self.joined % 3, self.joined % 7);
        let Some(leaf) = self.world.sign(&record, &identity, now) else { return };
        self.fleet.signed(&identity, &id, &leaf.issuer, leaf.not_after, now);
        let bundle = self.world.bundle(&record);
        let skew_ms = self.random.i64(-20_000..=20_000);
        self.proxies.push(Proxy {
            id,
            identity,
            generation: record.bundle.generation,
            bundle,
            leaf,
            coming: None,
            asked: 0,
            renews_at: None,
            cut_until: Moment::default(),
            skew_ms,
            is_over: false,
        });
    }

    /// One second.
    pub(crate) async fn step(&mut self) {
        self.clock.pass(STEP);
        let now = self.now();
        if self.store.is_dead() {
            // kill -9: nothing of the process is left.
            self.driver = None;
            self.kills += 1;
            self.store.revive();
            self.down_until = now + Duration::from_secs(self.random.u64(0..6));
        }
        if self.driver.is_none() && now >= self.down_until {
            self.open().await;
        }
        if self.random.u32(0..1000) < self.weather.joins && self.proxies.len() < 60 {
            self.join();
        }
        if self.random.u32(0..1000) < self.weather.ends && self.proxies.len() > 3 {
            let which = self.random.usize(0..self.proxies.len());
            self.proxies.get_mut(which).unwrap().is_over = true;
        }
        self.proxies.retain(|proxy| !proxy.is_over);
        for index in 0..self.proxies.len() {
            self.live(index, now);
        }
        self.check(now);
        if let Some(driver) = &self.driver {
            let _ = driver.tick().await;
        }
    }

    /// What one workload does in a second.
    fn live(&mut self, index: usize, now: Moment) {
        let Self { world, random, proxies, weather, fleet, .. } = self;
        let proxy = proxies.get_mut(index).unwrap();
        if random.u32(0..1000) < weather.cuts {
            proxy.cut_until = now + weather.cut.mul_f64(random.f64());
        }
        if let Some((_, leaf)) = proxy.coming.take_if(|(at, _)| *at <= now) {
            // It takes only what it would accept of others.
            if world.accepts(&proxy.bundle, &leaf.what, now) {
                proxy.leaf = leaf;
                proxy.renews_at = None;
            }
        }
        let Some(driver) = self.driver.as_ref().filter(|_| now >= proxy.cut_until) else { return };
        let known = driver.now();
        let record = &known.record;
        if record.bundle.generation != proxy.generation && random.u8(0..4) == 0 {
            proxy.generation = record.bundle.generation;
            proxy.bundle = world.bundle(record);
        }
        if let Some(request) = renewal(record)
            && request.generation != proxy.asked
            && random.u8(0..4) == 0
        {
            let meant = (request.proxies.is_empty() || request.proxies.contains(&proxy.id))
                && request.unless_issued_by.as_ref() != Some(&proxy.leaf.issuer)
                && request.signed_before.is_none_or(|at| proxy.leaf.signed_at < at);
            proxy.asked = request.generation;
            if meant {
                proxy.renews_at = Some(now + request.spread.mul_f64(random.f64()));
            }
        }
        let half = proxy.leaf.signed_at + proxy.leaf.not_after.since(proxy.leaf.signed_at) / 2;
        let due = proxy.renews_at.is_some_and(|at| at <= now) || half <= now;
        if due
            && proxy.coming.is_none()
            && random.bool()
            && let Some(leaf) = world.sign(record, &proxy.identity, now)
        {
            fleet.signed(&proxy.identity, &proxy.id, &leaf.issuer, leaf.not_after, now);
            if random.u32(0..1000) >= weather.loss {
                proxy.coming = Some((now + Duration::from_secs(random.u64(0..5)), leaf));
            }
        }
        if random.u8(0..3) == 0 {
            fleet.heard(
                Said {
                    id: proxy.id.clone(),
                    identity: proxy.identity.clone(),
                    version: "1".to_owned(),
                    generation: proxy.generation,
                    issuer: proxy.leaf.issuer.clone(),
                    serial: proxy.leaf.serial.clone(),
                    not_after: proxy.leaf.not_after,
                    clock_offset_ms: proxy.skew_ms,
                    handshakes: now.secs(),
                    ..Said::default()
                },
                now,
            );
        }
    }

    /// Everybody accepts everybody.
    fn check(&mut self, now: Moment) {
        let mut leaves = BTreeMap::new();
        let mut bundles = BTreeMap::new();
        for proxy in &self.proxies {
            // Whose certificate has ended speaks with nobody, whatever it believes.
            if proxy.leaf.not_after <= now {
                continue;
            }
            leaves.entry(W::leaf_class(&proxy.leaf.what)).or_insert((&proxy.id, &proxy.leaf.what));
            bundles.entry(W::bundle_class(&proxy.bundle)).or_insert((&proxy.id, &proxy.bundle));
        }
        for (shows, leaf) in leaves.values() {
            for (looks, bundle) in bundles.values() {
                self.checked += 1;
                if !self.world.accepts(bundle, leaf, now) {
                    let rotation = self.driver.as_ref().and_then(|one| one.now().record.rotation.clone());
                    panic!("{looks} refuses {shows} at {now}; {rotation:#?}");
                }
            }
        }
    }

    pub(crate) async fn command(&mut self, command: Command) {
        for _ in 0..200 {
            if let Some(driver) = &self.driver
                && (driver.command(&command, "sre").await.is_ok() || driver.now().record.rotation.is_some())
            {
                return;
            }
            self.step().await;
        }
        panic!("the command was never done");
    }

    /// Until nothing is under way any more.
    pub(crate) async fn until_steady(&mut self, at_most: u64) {
        for _ in 0..at_most {
            self.step().await;
            if self.record().is_some_and(|record| record.rotation.is_none()) {
                return;
            }
        }
        let waiting = self.driver.as_ref().map(Driver::waiting);
        panic!("{waiting:#?} {:#?}", self.record().map(|record| record.rotation));
    }

    async fn until(&mut self, state: State) {
        for _ in 0..2000 {
            if self.record().and_then(|record| record.rotation).is_some_and(|one| one.doing() == state) {
                return;
            }
            self.step().await;
        }
        panic!("it never came to {state}: {:#?}", self.driver.as_ref().map(Driver::waiting));
    }

    pub(crate) fn rotate(&self, kind: Kind) -> Command {
        let policy = policy(&self.record().unwrap());
        Command::Rotate(Rotate { kind, policy, root: NewRoot::Usual, reason: "test".to_owned() })
    }

    async fn rotation(&mut self, kind: Kind) {
        let before = self.record().map(|record| record.past.len() as u64 + record.rotations);
        self.command(self.rotate(kind)).await;
        self.until_steady(6000).await;
        assert_ne!(self.record().map(|record| record.past.len() as u64 + record.rotations), before);
    }
}

fn lifetimes() -> Lifetimes {
    Lifetimes { leaf_s: 3600, ..Lifetimes::default() }
}

async fn words(size: usize, seed: u64, weather: Weather) -> Mesh<Words> {
    let forge = Arc::new(model::Words::default());
    let start = Moment::from_secs(1_795_000_000);
    let record = model::founded(&*forge, start, lifetimes());
    Mesh::new(Words::default(), forge, record, start, size, seed, weather).await
}

#[tokio::test]
async fn a_hundred_leaf_twenty_issuer_and_ten_root_rotations_refuse_nobody() {
    let mut mesh = words(20, 7, WINDY).await;
    for number in 0..130 {
        let kind = match number % 13 {
            0 => Kind::Root,
            1 | 2 => Kind::Issuer,
            _ => Kind::Leaf,
        };
        mesh.rotation(kind).await;
    }
    let record = mesh.record().unwrap();
    assert_eq!(record.rotations, 130);
    assert_eq!(record.roots.len(), 11, "every root is remembered");
    assert!(record.past.iter().all(|rotation| rotation.ended.as_deref() == Some("done")));
    assert_eq!(record.trusted().count(), 1);
    // What is not needed has no key any more.
    assert_eq!(record.roots.iter().filter(|root| root.key.is_some()).count(), 1);
    assert_eq!(record.issuers.iter().filter(|issuer| issuer.key.is_some()).count(), 1);
    assert!(mesh.checked > 10_000);
}

#[tokio::test]
async fn an_authority_that_is_killed_at_any_write_goes_on_where_it_was() {
    for kind in [Kind::Root, Kind::Issuer, Kind::Leaf] {
        let mut write = 0;
        loop {
            let mut hit = false;
            for after in [false, true] {
                let mut mesh = words(6, 100 + write, CALM).await;
                for _ in 0..20 {
                    mesh.step().await;
                }
                mesh.store.arm(i64::try_from(write).unwrap(), after);
                mesh.rotation(kind).await;
                hit |= mesh.kills > 0;
                let record = mesh.record().unwrap();
                assert_eq!(record.rotations, 1, "{kind} {write} {after}");
                assert_eq!(record.past.first().unwrap().ended.as_deref(), Some("done"));
            }
            if !hit {
                break;
            }
            write += 1;
        }
        // PREPARED to steady, and quiet twice.
        let least = match kind {
            Kind::Root => 9,
            Kind::Issuer => 6,
            Kind::Leaf => 2,
        };
        assert!(write >= least, "{kind}: killed at {write} writes only");
    }
}

#[tokio::test]
async fn a_way_back_from_every_state_refuses_nobody() {
    let states = [
        State::Prepared,
        State::Trusting,
        State::Cutover,
        State::Migrating,
        State::Verifying,
        State::Retiring,
    ];
    for (kind, states) in [(Kind::Root, &states[..]), (Kind::Issuer, &states[2..4])] {
        for state in states {
            for kill in [-1, 0, 1, 2] {
                let mut mesh = words(12, 40, WINDY).await;
                for _ in 0..20 {
                    mesh.step().await;
                }
                let before = mesh.record().unwrap().signing().unwrap().id.clone();
                let mut rotate = mesh.rotate(kind);
                if let Command::Rotate(rotate) = &mut rotate {
                    rotate.policy.step = true;
                }
                mesh.command(rotate).await;
                while mesh.record().and_then(|record| record.rotation).unwrap().doing() != *state {
                    let allow = Command::Advance {
                        force: false,
                        waive: vec![],
                        compress: false,
                        reason: String::new(),
                    };
                    mesh.command(allow).await;
                    mesh.step().await;
                }
                // Some have heard of it by now and some have not.
                for _ in 0..3 {
                    mesh.step().await;
                }
                mesh.store.arm(kill, kill == 1);
                let back = Command::Rollback { reason: "not today".to_owned() };
                for _ in 0..100 {
                    if let Some(driver) = &mesh.driver {
                        let _ = driver.command(&back, "sre").await;
                        let record = driver.now().record.clone();
                        if record.rotation.is_none_or(|one| one.state == State::RollingBack) {
                            break;
                        }
                    }
                    mesh.step().await;
                }
                mesh.until_steady(6000).await;
                let record = mesh.record().unwrap();
                assert_eq!(
                    record.past.last().unwrap().ended.as_deref(),
                    Some("rolled back"),
                    "{kind} {state}"
                );
                assert_eq!(record.signing().unwrap().id, before, "{kind} {state}");
                assert_eq!(record.trusted().count(), 1);
            }
        }
    }
}

#[tokio::test]
async fn whoever_is_cut_off_for_long_is_waited_for_and_refused_by_nobody() {
    // Longer than the ten minutes after which somebody counts as absent, and than a certificate lives.
    let weather = Weather { cuts: 1, cut: Duration::from_secs(5000), ..WINDY };
    for seed in 0..4 {
        let mut mesh = words(10, seed, weather).await;
        mesh.rotation(Kind::Root).await;
        mesh.rotation(Kind::Issuer).await;
    }
}

#[tokio::test]
async fn somebody_who_ended_without_a_word_holds_up_a_root_until_his_certificate_ends() {
    let mut mesh = words(6, 3, CALM).await;
    for _ in 0..20 {
        mesh.step().await;
    }
    mesh.proxies.pop();
    mesh.command(mesh.rotate(Kind::Root)).await;
    let began = mesh.now();
    mesh.until(State::Verifying).await;
    mesh.until_steady(6000).await;
    let took = mesh.now().since(began);
    assert!(took > Duration::from_secs(3000), "{took:?}");
}

#[tokio::test]
async fn a_distrusted_root_is_gone_from_everywhere_at_once_and_everybody_comes_back() {
    let mut mesh = words(10, 5, CALM).await;
    for _ in 0..20 {
        mesh.step().await;
    }
    let old = mesh.record().unwrap().current_root().unwrap().id.clone();
    let distrust = Command::Distrust { root: old.short().to_owned(), reason: "its key is known".to_owned() };
    mesh.driver.as_ref().unwrap().command(&distrust, "sre").await.unwrap();
    let record = mesh.record().unwrap();
    assert!(record.trusted().all(|root| root.id != old));
    assert_eq!(record.rotation.as_ref().unwrap().state, State::Emergency);
    // In an emergency handshakes fail until both sides have heard of it: that is what was asked for. It is over soon.
    let random = &mut fastrand::Rng::with_seed(9);
    for _ in 0..60 {
        mesh.clock.pass(STEP);
        let now = mesh.now();
        for index in 0..mesh.proxies.len() {
            mesh.live(index, now);
            // What it holds is refused by itself; it takes the new one when it has the bundle.
            let _ = random.bool();
        }
        mesh.driver.as_ref().unwrap().tick().await.unwrap();
    }
    let record = mesh.record().unwrap();
    assert!(record.rotation.is_none(), "{:#?}", mesh.driver.as_ref().unwrap().waiting());
    mesh.check(mesh.now());
    assert_eq!(record.root(&old).unwrap().key, None);
}

/// Real certificates, verified as peers verify them.
struct Real {
    foundry: Arc<Foundry>,
    opened: BTreeMap<(IssuerId, bool), Arc<Authority>>,
    key: PublicKey,
    known: BTreeMap<(u64, u64), bool>,
}

type Chain = Vec<CertificateDer<'static>>;

impl World for Real {
    type Leaf = Arc<(u64, Chain)>;
    type Bundle = Arc<(u64, Trust)>;

    fn sign(&mut self, record: &Record, identity: &str, now: Moment) -> Option<Leaf<Self::Leaf>> {
        let issuer = record.signing().filter(|issuer| issuer.key.is_some())?;
        let crossed = record.intermediates(issuer).len() > 1;
        let foundry = &self.foundry;
        let open = || Arc::new(foundry.open(record, issuer).unwrap());
        let authority = self.opened.entry((issuer.id.clone(), crossed)).or_insert_with(open);
        let longest = record.lifetimes.leaf();
        let request = authority::Request {
            key: &self.key,
            identity: &identity.parse().unwrap(),
            dns_names: &[],
            ttl: Duration::ZERO,
            not_before: None,
            mark: None,
        };
        let lifetimes = crate::ca::Lifetimes { longest, renewal: Duration::from_secs(60) };
        let issued = authority.leaf(&request, &lifetimes, now.into()).unwrap();
        assert_eq!(issued.issuer.to_string(), issuer.id.0);
        Some(Leaf {
            issuer: issuer.id.clone(),
            serial: issued.serial.to_string(),
            signed_at: now,
            not_after: issued.not_after.into(),
            what: Arc::new((hash(issued.serial.to_string().as_bytes()), issued.chain)),
        })
    }

    fn bundle(&mut self, record: &Record) -> Self::Bundle {
        let domain: TrustDomain = record.trust_domain.parse().unwrap();
        let roots = record.trusted().map(|root| CertificateDer::from(root.certificate.0.clone()));
        let trust = Trust::new(domain.clone(), record.bundle.generation).with_roots(&domain, roots).unwrap();
        Arc::new((record.bundle.generation, trust))
    }

    fn leaf_class(leaf: &Self::Leaf) -> u64 {
        leaf.0
    }

    fn bundle_class(bundle: &Self::Bundle) -> u64 {
        bundle.0
    }

    fn accepts(&mut self, bundle: &Self::Bundle, leaf: &Self::Leaf, now: Moment) -> bool {
        *self.known.entry((bundle.0, leaf.0)).or_insert_with(|| {
            [Usage::Client, Usage::Server].into_iter().all(|usage| {
                bundle.1.verify(&leaf.1, usage, now.into()).inspect_err(|error| eprintln!("{error}")).is_ok()
            })
        })
    }
}

#[tokio::test]
async fn real_certificates_are_accepted_by_everybody_at_every_moment() {
    let foundry = Arc::new(Foundry::new(Arc::new(Sealer::random().unwrap()), KeyKind::P256));
    let start = Moment::from_secs(1_795_000_000);
    let record = foundry.found("mesh.local", lifetimes(), start).unwrap();
    let key = PublicKey::from_spki(&Key::generate(KeyKind::P256).unwrap().subject_public_key_info()).unwrap();
    let world = Real { foundry: foundry.clone(), opened: BTreeMap::new(), key, known: BTreeMap::new() };
    let weather = Weather { joins: 5, ..WINDY };
    let mut mesh = Mesh::new(world, foundry, record, start, 5, 11, weather).await;
    for (number, kind) in [Kind::Root, Kind::Issuer, Kind::Leaf, Kind::Root].into_iter().enumerate() {
        mesh.store.arm(2 + i64::try_from(number).unwrap(), number % 2 == 0);
        mesh.rotation(kind).await;
    }
    // And the way back from where it is longest: some know only the new root.
    mesh.command(mesh.rotate(Kind::Root)).await;
    mesh.until(State::Retiring).await;
    mesh.step().await;
    let back = Command::Rollback { reason: "not today".to_owned() };
    mesh.driver.as_ref().unwrap().command(&back, "sre").await.unwrap();
    mesh.until_steady(6000).await;
    let record = mesh.record().unwrap();
    assert_eq!(record.past.last().unwrap().ended.as_deref(), Some("rolled back"));
    assert!(mesh.kills > 0 && mesh.checked > 1000);
}

#[tokio::test]
async fn of_two_replicas_one_leads_and_the_other_takes_over_when_it_is_silent() {
    let clock = Virtual::at(Moment::from_secs(1_795_000_000));
    let forge = Arc::new(model::Words::default());
    let store: Arc<dyn Store> = Arc::new(Memory::default());
    found(&*store, &model::founded(&*forge, clock.wall(), lifetimes())).await.unwrap();
    let open = async |name: &'static str| {
        let fleet = Arc::new(Fleet::default());
        let driver = Driver::open(store.clone(), fleet, forge.clone(), clock.clone(), name).await;
        driver.unwrap().unwrap().settling(Duration::ZERO)
    };
    let (one, two) = (open("ca-1").await, open("ca-2").await);
    for _ in 0..60 {
        clock.pass(STEP);
        one.tick().await.unwrap();
        two.tick().await.unwrap();
        assert!(one.leads() && !two.leads());
    }
    // Whoever is asked does it; who leads drives it. The other is where the record is.
    let rotate = Rotate {
        kind: Kind::Issuer,
        policy: policy(&one.now().record),
        root: NewRoot::Usual,
        reason: String::new(),
    };
    two.command(&Command::Rotate(rotate), "sre").await.unwrap();
    for _ in 0..12 {
        clock.pass(STEP);
        one.tick().await.unwrap();
        two.tick().await.unwrap();
    }
    assert_eq!(two.now().record.rotation.as_ref().map(|one| one.state), Some(State::Cutover));
    // The one that leads is gone: nobody else acts until its lease is over, and then one does.
    let mut took = 0;
    while !two.leads() {
        clock.pass(STEP);
        two.tick().await.unwrap();
        took += 1;
        assert!(took < 60);
    }
    assert!(took >= 14, "{took} s");
    for _ in 0..700 {
        clock.pass(STEP);
        two.tick().await.unwrap();
    }
    // The silent one was waited for as long as it may still sign.
    assert!(two.now().record.rotation.is_none(), "{:#?}", two.waiting());
    one.tick().await.unwrap();
    assert!(!one.leads(), "it comes back and follows");
    assert!(one.may_sign());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 12, ..Default::default() })]

    #[test]
    fn nobody_is_ever_refused(
        seed in 0_u64..1_000_000,
        size in 1_usize..14,
        cuts in 0_u32..8,
        cut in 1_u64..4000,
        loss in 0_u32..200,
        joins in 0_u32..30,
        ends in 0_u32..4,
        kinds in proptest::collection::vec(0_u8..3, 1..4),
        kill in proptest::collection::vec((0_i64..12, proptest::bool::ANY), 0..3),
        back in proptest::option::of(1_u64..120),
    ) {
        let weather = Weather { cuts, cut: Duration::from_secs(cut), loss, joins, ends };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut mesh = words(size, seed, weather).await;
            let mut kill = kill.into_iter();
            for kind in kinds {
                if let Some((write, after)) = kill.next() {
                    mesh.store.arm(write, after);
                }
                let kind = match kind { 0 => Kind::Root, 1 => Kind::Issuer, _ => Kind::Leaf };
                mesh.command(mesh.rotate(kind)).await;
                if let Some(steps) = back {
                    for _ in 0..steps {
                        mesh.step().await;
                    }
                    if let Some(driver) = &mesh.driver {
                        let _ = driver.command(&Command::Rollback { reason: String::new() }, "sre").await;
                    }
                }
                mesh.until_steady(12_000).await;
            }
        });
    }
}
