//! Random lives of a registry, in time that only passes here: whatever happens, what has been promised holds.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use crate::probe::Probe;
use crate::source::Query;
use crate::testing::Conduct;
use crate::testing::fake::{FakeRegistry, instance};
use crate::views::Change;
use crate::{Discovery, Guards, Merge, Part, Settings, Target, Watch};

/// Which endpoints answer.
#[derive(Clone, Debug, Default)]
struct Alive(Arc<Mutex<BTreeSet<String>>>);

impl Probe for Alive {
    fn answers(&self, host: Arc<str>, port: u16) -> BoxFuture<'static, bool> {
        let answers = self.0.lock().unwrap().contains(&format!("{host}:{port}"));
        Box::pin(async move { answers })
    }
}

fn address(n: usize) -> String {
    format!("10.0.0.{n}:80")
}

fn query() -> Query {
    Query { service: "s".into(), args: BTreeMap::new() }
}

struct World {
    registry: FakeRegistry,
    alive: Alive,
    discovery: Discovery,
    watch: Watch,
    listed: BTreeSet<usize>,
    /// Everything that was ever published, with the time.
    seen: Vec<(Duration, Vec<String>)>,
    start: Instant,
    generation: u64,
    instances: BTreeSet<String>,
}

impl World {
    fn new(guards: Guards) -> Self {
        let (registry, alive) = (FakeRegistry::default(), Alive::default());
        let sources: Vec<Arc<dyn crate::Source>> = vec![Arc::new(registry.clone())];
        let settings = Settings { sources, probe: Arc::new(alive.clone()), ..Settings::default() };
        let discovery = Discovery::new(Handle::current(), settings);
        let target = Target { guards, ..Target::service("upstreams/1", "fake", query()) };
        let watch = discovery.watch(&target);
        let (listed, seen, start) = (BTreeSet::new(), Vec::new(), Instant::now());
        let (generation, instances) = (0, BTreeSet::new());
        Self { registry, alive, discovery, watch, listed, seen, start, generation, instances }
    }

    fn list(&mut self, listed: impl IntoIterator<Item = usize>) {
        self.listed = listed.into_iter().collect();
        let instances = self.listed.iter().map(|n| instance(&address(*n), 1)).collect();
        self.registry.set("s", instances);
    }

    fn live(&self, n: usize, alive: bool) {
        let mut all = self.alive.0.lock().unwrap();
        if alive {
            all.insert(address(n));
        } else {
            all.remove(&address(n));
        }
    }

    fn published(&self) -> Vec<String> {
        self.watch.borrow().list.iter().map(|endpoint| endpoint.addr.to_string()).collect()
    }

    fn set(&self) -> BTreeSet<String> {
        self.published().into_iter().collect()
    }

    /// Lets time pass; looks at everything that is published meanwhile.
    async fn pass(&mut self, time: Duration, check: impl Fn(&BTreeSet<String>)) {
        let until = Instant::now() + time;
        loop {
            let done = tokio::select! {
                biased;
                changed = self.watch.changed() => { changed.unwrap(); false }
                () = tokio::time::sleep_until(until) => true,
            };
            self.watch.mark_unchanged();
            let list = self.published();
            let set: BTreeSet<String> = list.iter().cloned().collect();
            assert_eq!(set.len(), list.len(), "no address twice: {list:?}");
            check(&set);
            if self.seen.last().is_none_or(|(_, last)| *last != list) {
                self.seen.push((self.start.elapsed(), list));
            }
            self.causes();
            if done {
                return;
            }
        }
    }

    /// Every instance that is not there any more was removed for a reason that is written down.
    fn causes(&mut self) {
        let services = self.discovery.dump("fake").unwrap();
        let service = &services[0];
        let now: BTreeSet<String> = service.instances.iter().map(|one| one.id.to_string()).collect();
        let steps = usize::try_from(service.generation - self.generation).unwrap();
        assert!(steps <= service.history.len(), "looked at often enough");
        let new = &service.history[service.history.len() - steps..];
        for gone in self.instances.difference(&now) {
            // More are removed than are named.
            let names = |step: &&Change| step.removed.some.iter().any(|name| name.starts_with(gone.as_str()));
            let cause = new.iter().find(|step| names(step) || step.removed.count > step.removed.some.len());
            assert!(
                cause.is_some_and(|step| !step.why.is_empty()),
                "{gone} is gone without a cause: {new:?}"
            );
        }
        self.instances = now;
        self.generation = service.generation;
    }
}

const ERRORS: [Conduct; 5] =
    [Conduct::Errors, Conduct::SlowBody, Conduct::Silent, Conduct::HalfBody, Conduct::Garbage];

/// One life. What was published when.
async fn life(seed: u64) -> Vec<(Duration, Vec<String>)> {
    fastrand::seed(seed);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut world = World::new(Guards::default());
    (0..8).for_each(|n| world.live(n, true));
    let first: Vec<usize> = (0..rng.usize(1..7)).collect();
    world.list(first);
    world.pass(Duration::from_secs(15), |_| {}).await;
    for _ in 0..30 {
        let pause = Duration::from_millis(rng.u64(0..4000));
        match rng.u8(0..10) {
            // One comes or goes.
            0..=3 => {
                let (n, mut listed) = (rng.usize(0..8), world.listed.clone());
                if !listed.remove(&n) {
                    listed.insert(n);
                }
                world.list(listed);
                world.pass(pause, |_| {}).await;
            }
            // A life or death that the registry does not know of.
            4 => {
                let n = rng.usize(0..8);
                world.live(n, rng.bool());
                world.pass(pause, |_| {}).await;
            }
            // Nothing but errors: nothing at all changes.
            5..=7 => {
                world.pass(Duration::from_secs(45), |_| {}).await;
                let good = world.set();
                world.registry.conducts(ERRORS[rng.usize(0..5)]);
                if rng.bool() {
                    world.discovery.refresh(None);
                }
                let outage = Duration::from_secs(rng.u64(0..120));
                world.pass(outage, |now| assert_eq!(*now, good, "seed {seed}: the registry only errs")).await;
                world.registry.conducts(Conduct::Well);
                // It is back: seen within two seconds.
                let listed: BTreeSet<usize> = world.listed.iter().copied().chain([rng.usize(0..8)]).collect();
                world.list(listed);
                world.pass(Duration::from_secs(2), |_| {}).await;
                let wanted: BTreeSet<String> = world.listed.iter().map(|n| address(*n)).collect();
                assert!(wanted.is_subset(&world.set()), "seed {seed}: {wanted:?} {:?}", world.set());
            }
            // It begins anew, knowing nothing: who answers stays.
            8 => {
                world.pass(Duration::from_secs(45), |_| {}).await;
                let alive = world.alive.0.lock().unwrap().clone();
                let good: BTreeSet<String> = world.set().intersection(&alive).cloned().collect();
                world.registry.conducts(Conduct::RestartsEmpty);
                world.listed.clear();
                let kept =
                    |now: &BTreeSet<String>| assert!(good.is_subset(now), "seed {seed}: {good:?} {now:?}");
                world.pass(Duration::from_secs(20), kept).await;
                assert_eq!(world.set(), good, "seed {seed}: who does not answer is gone");
            }
            _ => {
                world.registry.conducts(Conduct::Rewinds);
                world.pass(pause, |_| {}).await;
            }
        }
    }
    // In the end everything is as the registry says, apart from what it has forgotten and what answers.
    world.pass(Duration::from_secs(1000), |_| {}).await;
    let wanted: BTreeSet<String> = world.listed.iter().map(|n| address(*n)).collect();
    let alive = world.alive.0.lock().unwrap().clone();
    let now = world.set();
    assert!(wanted.is_subset(&now), "seed {seed}: {wanted:?} {now:?}");
    assert!(now.difference(&wanted).all(|kept| alive.contains(kept)), "seed {seed}: {wanted:?} {now:?}");
    if !wanted.is_empty() {
        assert_eq!(now, wanted, "seed {seed}: the registry has had time to learn of all");
    }
    world.seen
}

#[test]
fn whatever_happens_what_was_promised_holds() {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    for seed in 0..60 {
        let once = runtime().block_on(life(seed));
        if seed % 10 == 0 {
            assert_eq!(once, runtime().block_on(life(seed)), "seed {seed}: the same happens again");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_sudden_loss_is_slow_for_those_that_answer() {
    let mut world = World::new(Guards::default());
    (0..10).for_each(|n| world.live(n, true));
    world.list(0..10);
    world.pass(Duration::from_secs(10), |_| {}).await;
    world.live(9, false);
    // Seven of ten at once; one of them does not answer.
    world.list(0..3);
    world.pass(Duration::from_millis(500), |_| {}).await;
    assert_eq!(world.set().len(), 9, "the silent one has left: {:?}", world.set());
    assert_eq!(world.discovery.alarms(), [("upstreams/1".into(), 1)]);
    for left in (3..9).rev() {
        world.pass(Duration::from_secs(1), |_| {}).await;
        assert_eq!(world.set().len(), left, "one a second");
    }
    let view = &world.discovery.views(Some("upstreams/1"))[0];
    assert!(view.history.iter().any(|step| step.why.contains("7 of 10")), "{:?}", view.history);
    // Half of what is left is not sudden, and neither is a deployment that replaces everything.
    world.list([0, 4, 5, 6]);
    world.pass(Duration::from_secs(3), |_| {}).await;
    world.list([1, 7, 8, 9]);
    world.pass(Duration::from_millis(1500), |_| {}).await;
    assert_eq!(world.set(), [1, 7, 8, 9].map(address).into());
    assert_eq!(world.discovery.alarms(), [("upstreams/1".into(), 1)]);
}

#[tokio::test(start_paused = true)]
async fn what_comes_back_while_it_is_let_go_of_stays() {
    let mut world = World::new(Guards::default());
    (0..10).for_each(|n| world.live(n, true));
    world.list(0..10);
    world.pass(Duration::from_secs(10), |_| {}).await;
    world.list(0..2);
    world.pass(Duration::from_millis(2500), |_| {}).await;
    let kept = world.set();
    assert_eq!(kept.len(), 8, "{kept:?}");
    world.list(0..10);
    world.pass(Duration::from_secs(30), |now| assert!(now.is_superset(&kept), "{now:?}")).await;
    assert_eq!(world.set().len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_a_hundred_is_none() {
    let mut world = World::new(Guards { drop_limit: 100, ..Guards::default() });
    (0..10).for_each(|n| world.live(n, true));
    world.list(0..10);
    world.pass(Duration::from_secs(10), |_| {}).await;
    world.list(0..1);
    world.pass(Duration::from_millis(500), |_| {}).await;
    assert_eq!(world.set().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn stale_for_too_long_is_marked_and_only_dropped_where_that_is_asked_for() {
    for drop_stale in [false, true] {
        let max_stale = Some(Duration::from_secs(60));
        let mut world = World::new(Guards { max_stale, drop_stale, ..Guards::default() });
        world.list(0..4);
        world.pass(Duration::from_secs(5), |_| {}).await;
        world.registry.conducts(Conduct::Errors);
        world.pass(Duration::from_secs(58), |_| {}).await;
        assert!(!world.watch.borrow().degraded && world.set().len() == 4, "{drop_stale}");
        world.pass(Duration::from_secs(15), |_| {}).await;
        assert!(world.watch.borrow().degraded, "{drop_stale}");
        assert_eq!(world.set().len(), if drop_stale { 0 } else { 4 });
        world.registry.conducts(Conduct::Well);
        // Nothing has changed, so the first answer after the outage comes when the question has waited for long enough.
        world.pass(Duration::from_secs(12), |_| {}).await;
        assert!(!world.watch.borrow().degraded && world.set().len() == 4, "{drop_stale}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_change_is_published_at_once_and_a_storm_in_pieces() {
    let mut world = World::new(Guards::default());
    world.list(0..1);
    world.pass(Duration::from_secs(20), |_| {}).await;
    assert!(world.seen[0].0 < Duration::from_millis(50), "{:?}", world.seen);
    let before = world.seen.len();
    for n in 2..200 {
        world.list(0..n % 50 + 1);
        world.pass(Duration::from_millis(20), |_| {}).await;
    }
    let pieces = world.seen.len() - before;
    assert!((3..=12).contains(&pieces), "{pieces} in four seconds");
}

#[tokio::test(start_paused = true)]
async fn two_thousand_services_do_not_storm_a_registry_that_is_down_and_see_it_return() {
    let registry = FakeRegistry::default();
    let sources: Vec<Arc<dyn crate::Source>> = vec![Arc::new(registry.clone())];
    let discovery = Discovery::new(Handle::current(), Settings { sources, ..Settings::default() });
    let name = |n: usize| format!("s{n}");
    let watches: Vec<Watch> = (0..2000)
        .map(|n| {
            registry.set(&name(n), vec![instance(&address(1), 1)]);
            let query = Query { service: name(n).into(), args: BTreeMap::new() };
            discovery.watch(&Target::service(format!("upstreams/{n}"), "fake", query))
        })
        .collect();
    sleep(Duration::from_secs(5)).await;
    assert!(watches.iter().all(|watch| watch.borrow().list.len() == 1));
    registry.conducts(Conduct::Errors);
    discovery.refresh(None);
    sleep(Duration::from_secs(60)).await;
    let before = registry.questions();
    sleep(Duration::from_secs(60)).await;
    let asked = (registry.questions() - before) / 60;
    assert!(asked < 250, "{asked} questions a second");
    assert!(watches.iter().all(|watch| watch.borrow().list.len() == 1));
    (0..2000).for_each(|n| registry.set(&name(n), vec![instance(&address(2), 1), instance(&address(3), 1)]));
    registry.conducts(Conduct::Well);
    sleep(Duration::from_secs(2)).await;
    let converged = watches.iter().filter(|watch| watch.borrow().list.len() == 2).count();
    assert_eq!(converged, 2000, "two seconds after its return");
    drop(watches);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(discovery.services().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_panics_is_asked_again() {
    let registry = FakeRegistry::default();
    registry.set("s", vec![instance(&address(1), 1)]);
    let sources: Vec<Arc<dyn crate::Source>> = vec![Arc::new(Panics(registry.clone()))];
    let discovery = Discovery::new(Handle::current(), Settings { sources, ..Settings::default() });
    let mut watch = discovery.watch(&Target::service("upstreams/1", "fake", query()));
    watch.wait_for(|endpoints| endpoints.list.len() == 1).await.unwrap();
    registry.set("s", vec![instance(&address(1), 1), instance(&address(2), 1)]);
    let seen = tokio::time::timeout(Duration::from_secs(60), watch.wait_for(|now| now.list.len() == 2));
    assert!(seen.await.is_ok_and(|seen| seen.is_ok()));
    assert!(discovery.services()[0].errors > 0);
}

/// Every second question panics.
#[derive(Debug)]
struct Panics(FakeRegistry);

struct PanicsSometimes(Box<dyn crate::Watcher>, bool);

impl crate::Source for Panics {
    fn kind(&self) -> &'static str {
        "fake"
    }

    fn open(&self, query: &Query) -> Result<Box<dyn crate::Watcher>, String> {
        Ok(Box::new(PanicsSometimes(self.0.open(query)?, false)))
    }
}

impl crate::Watcher for PanicsSometimes {
    fn next(&mut self) -> BoxFuture<'_, Result<crate::Listing, crate::SourceError>> {
        self.1 = !self.1;
        assert!(self.1, "a planted panic");
        self.0.next()
    }

    fn restart(&mut self) {
        self.0.restart();
    }
}

#[tokio::test(start_paused = true)]
async fn parts_are_asked_for_themselves_and_merged() {
    let (registry, alive) = (FakeRegistry::default(), Alive::default());
    registry.set("a", vec![instance(&address(1), 1), instance(&address(2), 1)]);
    registry.set("b", vec![instance(&address(2), 1), instance(&address(3), 1)]);
    let sources: Vec<Arc<dyn crate::Source>> = vec![Arc::new(registry.clone())];
    let settings = Settings { sources, probe: Arc::new(alive), ..Settings::default() };
    let discovery = Discovery::new(Handle::current(), settings);
    let part = |service: &str| Part::service("fake", Query { service: service.into(), ..query() });
    let mut target = Target::of("upstreams/1", vec![part("a"), part("b"), part("a b")]);
    target.merge = Merge::Prefer;
    let mut watch = discovery.watch(&target);
    let endpoints = watch.wait_for(|endpoints| endpoints.list.len() == 3).await.unwrap().clone();
    assert!(endpoints.failures[0].reason.contains("without spaces"), "{:?}", endpoints.failures);
    let view = &discovery.views(Some("b"))[0];
    let second = &view.endpoints[1];
    assert_eq!((second.sources.len(), second.sources[1].service.as_deref()), (2, Some("b")));
    assert_eq!(discovery.views(Some("c")), []);
    let json = serde_json::to_value(view).unwrap();
    assert_eq!(json["endpoints"][1]["verdict"], "used");
    assert_eq!(json["parts"][0]["from"], "service");
    assert_eq!(json["parts"][0]["freshness"]["state"], "fresh");
}
