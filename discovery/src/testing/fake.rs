//! A registry in memory, for tests of what lies above sources, and for the suite's own.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::{Able, Conduct, Registry};
use crate::Node;
use crate::source::{Again, Health, Instance, Listing, Query, Source, SourceError, Standing, Watcher};

/// How long a question waits for a change.
const WAIT: Duration = Duration::from_secs(10);
/// How long it waits for an answer.
const DEADLINE: Duration = Duration::from_millis(200);

/// A way in which a source can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// What it is told is an error it tells as an empty list.
    ErrorsAreEmpty,
    /// A part of an answer it tells as the whole.
    HalvesAreWhole,
    /// After an error it never answers again.
    DiesOfErrors,
    /// It waits for ever for an answer.
    WaitsForEver,
    /// It does not tell that the registry began anew.
    HidesRestarts,
    /// It does not see changes after the index went backwards.
    TrustsTheIndex,
    /// It gives every instance the same weight.
    ForgetsWeights,
    /// It tells of what was there before as if it still were.
    NeverRemoves,
    /// It keeps its connection when nobody wants to know any more.
    LeaksConnections,
    /// Any name will do.
    TakesAnyName,
}

/// A registry whose services are changed by [`FakeRegistry::set`] and by [`Registry`].
#[derive(Clone, Default)]
pub struct FakeRegistry(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    services: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Instance>>,
    /// Counts changes, and begins again when the registry does.
    index: u64,
    /// Counts how often the registry began again.
    epoch: u64,
    conduct: Option<Conduct>,
    connections: usize,
    questions: u64,
    defect: Option<Defect>,
}

impl fmt::Debug for FakeRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeRegistry")
    }
}

impl FakeRegistry {
    /// One whose source is wrong in some way.
    #[must_use]
    pub fn with_defect(defect: Defect) -> Self {
        let registry = Self::default();
        registry.state().defect = Some(defect);
        registry
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, how: impl FnOnce(&mut State)) {
        let mut state = self.state();
        how(&mut state);
        state.index += 1;
        drop(state);
        self.0.changed.notify_waiters();
    }

    /// Makes these the instances of a service.
    pub fn set(&self, service: &str, instances: Vec<Instance>) {
        let instances = instances.into_iter().map(|instance| (instance.id.clone(), instance)).collect();
        self.change(|state| {
            state.services.insert(service.into(), instances);
        });
    }

    /// Makes it behave so, at once.
    pub fn conducts(&self, how: Conduct) {
        match how {
            Conduct::Well => self.state().conduct = None,
            Conduct::Restarts => self.change(|state| state.epoch += 1),
            Conduct::RestartsEmpty => self.change(|state| {
                state.epoch += 1;
                state.index = 0;
                state.services.clear();
            }),
            Conduct::Rewinds => self.change(|state| {
                state.epoch += 1;
                state.index = 0;
            }),
            other => self.state().conduct = Some(other),
        }
        // A question that waits for a change is not answered by a registry that misbehaves.
        if how != Conduct::Well {
            self.0.changed.notify_waiters();
        }
    }

    /// How often it was asked.
    pub fn questions(&self) -> u64 {
        self.state().questions
    }
}

/// An instance at an address, `host:port`, that is its id as well.
pub fn instance(address: &str, weight: u32) -> Instance {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "0"));
    Instance {
        id: address.into(),
        node: Node { host: host.into(), port: port.parse().unwrap_or(0), weight, priority: 0 },
        health: Health::Healthy,
        details: None,
    }
}

impl Registry for FakeRegistry {
    fn source(&self) -> Arc<dyn Source> {
        Arc::new(self.clone())
    }

    fn service_name(&self, service: &str) -> String {
        service.to_owned()
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        self.change(|state| {
            let instances = state.services.entry(service.into()).or_default();
            instances.insert(address.into(), instance(address, weight));
        });
        Box::pin(async {})
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        self.change(|state| {
            state.services.entry(service.into()).or_default().remove(address);
        });
        Box::pin(async {})
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        self.conducts(how);
        Box::pin(async { Able::Yes })
    }

    fn wrong_name(&self) -> Option<String> {
        Some("two words".to_owned())
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(4)
    }

    fn connections(&self) -> Option<usize> {
        Some(self.state().connections)
    }
}

impl Source for FakeRegistry {
    fn kind(&self) -> &'static str {
        "fake"
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        if query.service.contains(' ') && self.state().defect != Some(Defect::TakesAnyName) {
            return Err(format!("`{}` is not the name of a service: write it without spaces", query.service));
        }
        Ok(Box::new(FakeWatcher {
            registry: self.clone(),
            service: query.service.clone(),
            seen: None,
            epoch: None,
            connected: false,
            told: Vec::new(),
            dead: false,
        }))
    }
}

struct FakeWatcher {
    registry: FakeRegistry,
    service: Arc<str>,
    /// The index of the last answer.
    seen: Option<u64>,
    /// What tells that the registry began anew; not forgotten by a restart.
    epoch: Option<u64>,
    connected: bool,
    told: Vec<Instance>,
    dead: bool,
}

impl Drop for FakeWatcher {
    fn drop(&mut self) {
        let mut state = self.registry.state();
        if self.connected && state.defect != Some(Defect::LeaksConnections) {
            state.connections -= 1;
        }
    }
}

impl Watcher for FakeWatcher {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(self.ask())
    }

    fn restart(&mut self) {
        self.seen = None;
    }
}

impl FakeWatcher {
    async fn ask(&mut self) -> Result<Listing, SourceError> {
        let defect = {
            let mut state = self.registry.state();
            state.questions += 1;
            state.connections += usize::from(!std::mem::replace(&mut self.connected, true));
            state.defect
        };
        if self.dead {
            std::future::pending::<()>().await;
        }
        let registry = self.registry.clone();
        // A change between the look and the wait has to end the wait.
        let changed = registry.0.changed.notified();
        let is_news = {
            let state = registry.state();
            let seen = if defect == Some(Defect::TrustsTheIndex) {
                self.seen.is_some_and(|seen| state.index <= seen)
            } else {
                self.seen == Some(state.index) && self.epoch == Some(state.epoch)
            };
            !seen || state.conduct.is_some()
        };
        if !is_news {
            let _ = timeout(WAIT, changed).await;
        }
        let conduct = registry.state().conduct;
        match conduct {
            None => Ok(self.listing(defect)),
            Some(conduct) => self.misconduct(conduct, defect).await,
        }
    }

    async fn misconduct(&mut self, how: Conduct, defect: Option<Defect>) -> Result<Listing, SourceError> {
        match (how, defect) {
            (Conduct::Errors, Some(Defect::ErrorsAreEmpty)) => {
                return Ok(Listing {
                    instances: Vec::new(),
                    standing: Standing::Continued,
                    again: Again::Now,
                });
            }
            (Conduct::HalfBody, Some(Defect::HalvesAreWhole)) => {
                let mut listing = self.listing(defect);
                listing.instances.truncate(1);
                self.seen = None;
                return Ok(listing);
            }
            (_, Some(Defect::DiesOfErrors)) => self.dead = true,
            (Conduct::Silent, Some(Defect::WaitsForEver)) => std::future::pending().await,
            (Conduct::Silent | Conduct::SlowBody, _) => tokio::time::sleep(DEADLINE).await,
            _ => {}
        }
        Err(SourceError::new(format!("fake: {how:?}")))
    }

    fn listing(&mut self, defect: Option<Defect>) -> Listing {
        let state = self.registry.state();
        let began_anew = self.epoch.is_some_and(|epoch| epoch != state.epoch);
        if defect != Some(Defect::TrustsTheIndex) || self.seen.is_none_or(|seen| seen < state.index) {
            let found = state.services.get(&self.service);
            let mut instances: Vec<Instance> =
                found.into_iter().flatten().map(|(_, one)| one.clone()).collect();
            if defect == Some(Defect::ForgetsWeights) {
                instances.iter_mut().for_each(|instance| instance.node.weight = 1);
            }
            if defect == Some(Defect::NeverRemoves) {
                let listed = |id| instances.iter().any(|instance: &Instance| instance.id == id);
                let gone: Vec<Instance> =
                    self.told.iter().filter(|one| !listed(one.id.clone())).cloned().collect();
                instances.extend(gone);
            }
            self.told = instances;
            self.seen = Some(state.index);
            self.epoch = Some(state.epoch);
        }
        let standing = match began_anew && defect != Some(Defect::HidesRestarts) {
            true => Standing::Restarted,
            false => Standing::Continued,
        };
        Listing { instances: self.told.clone(), standing, again: Again::Now }
    }
}
