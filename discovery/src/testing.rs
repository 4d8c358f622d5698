//! The suite of conduct: what every source has to do, run over each of them against its own registry.
//!
//! A source's test implements [`Registry`] for the registry it starts (a real one, or a fake where none can be had) and
//! calls [`conduct`]. The deadlines of the source should be a second or less there, so that a silent registry is found
//! out in time. [`fake`] is a source in memory, for tests of what lies above.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use crate::source::{Query, Source};
use crate::target::{Target, TargetError};
use crate::views::Change;
use crate::{Discovery, Endpoints, Settings, Watch};

pub mod fake;
#[cfg(test)]
mod tests;

/// A registry under the control of a test.
pub trait Registry: Send {
    /// A source that speaks to it.
    fn source(&self) -> Arc<dyn Source>;

    /// How `service` is named in `service_name`.
    fn service_name(&self, service: &str) -> String;

    /// Registers `host:port` as an instance of `service`, healthy, or changes its weight.
    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()>;

    /// Takes an instance out, in the registry's own way.
    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()>;

    /// Makes the registry misbehave, or behave again.
    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able>;

    /// `discovery_args` of the service.
    fn args(&self) -> BTreeMap<Arc<str>, Arc<str>> {
        BTreeMap::new()
    }

    /// Whether its instances have weights.
    fn has_weights(&self) -> bool {
        true
    }

    /// A name that is not of the form that the source needs, if it needs one.
    fn wrong_name(&self) -> Option<String> {
        None
    }

    /// Connections of the source to it, if that can be told.
    fn connections(&self) -> Option<usize> {
        None
    }

    /// How long a change may take to be seen.
    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }
}

/// How a registry behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    Well,
    /// Answers with its kind of internal error.
    Errors,
    /// Begins an answer and does not end it.
    SlowBody,
    /// Accepts connections and says nothing.
    Silent,
    /// Ends an answer in the middle.
    HalfBody,
    /// Answers with something that is not its protocol.
    Garbage,
    /// Is gone and comes back with what it knew.
    Restarts,
    /// Is gone and comes back empty, and its index, version or generation begins again.
    RestartsEmpty,
    /// The index, version or generation goes backwards while the contents stay.
    Rewinds,
}

/// Whether a registry of the test can be made to behave so. One that cannot be skips that part of the suite, and the
/// suite says which parts it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Able {
    Yes,
    No,
}

/// Which parts of the suite were run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub ran: Vec<String>,
    pub skipped: Vec<String>,
}

/// A source does not do what it has to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    pub part: String,
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.part, self.what)
    }
}

impl std::error::Error for Broken {}

/// How long it is looked whether something stays as it is.
const STEADY: Duration = Duration::from_millis(500);
/// What the suite calls its service.
const SERVICE: &str = "conduct";
/// The conducts under which the last good endpoints stay.
const MISCONDUCT: [Conduct; 5] =
    [Conduct::Errors, Conduct::SlowBody, Conduct::Silent, Conduct::HalfBody, Conduct::Garbage];

/// Runs the suite over a registry that knows nothing of the service `conduct` yet.
///
/// # Errors
/// The first part in which the source does not do what it has to.
pub async fn conduct(registry: &mut dyn Registry) -> Result<Report, Broken> {
    let mut report = Report::default();
    let bound = bind().await;
    let mut bound = bound.map_err(|error| Broken { part: "set-up".into(), what: error.to_string() })?;
    let mut suite = Suite::new(registry, &bound, &mut report);
    suite.names()?;
    suite.changes().await?;
    for how in MISCONDUCT {
        suite.misconduct(how).await?;
    }
    suite.misconduct(Conduct::Restarts).await?;
    suite.misconduct(Conduct::Rewinds).await?;
    // What does not listen any more cannot be kept.
    bound.truncate(2);
    suite.restarts_empty().await?;
    suite.empties().await?;
    suite.ends().await?;
    Ok(report)
}

/// Three endpoints that answer, at different addresses and one port: there are registries in which a service has one port.
async fn bind() -> std::io::Result<Vec<TcpListener>> {
    let mut failure = None;
    for _ in 0..20 {
        let first = TcpListener::bind("127.0.0.1:0").await?;
        let port = first.local_addr()?.port();
        let second = TcpListener::bind(("127.0.0.2", port)).await;
        let third = TcpListener::bind(("127.0.0.3", port)).await;
        match (second, third) {
            (Ok(second), Ok(third)) => return Ok(vec![first, second, third]),
            (second, third) => failure = second.err().or(third.err()),
        }
    }
    Err(failure.unwrap_or_else(|| std::io::Error::other("no port is free on three addresses")))
}

struct Suite<'a> {
    registry: &'a mut dyn Registry,
    report: &'a mut Report,
    discovery: Discovery,
    target: Target,
    watch: Option<Watch>,
    /// The addresses of those that answer.
    addresses: Vec<String>,
    part: String,
}

impl<'a> Suite<'a> {
    fn new(registry: &'a mut dyn Registry, bound: &[TcpListener], report: &'a mut Report) -> Self {
        let source = registry.source();
        let query = Query { service: registry.service_name(SERVICE).into(), args: registry.args() };
        let mut target = Target::service("upstreams/conduct", source.kind(), query);
        target.guards.empty_confirm = Duration::from_millis(300);
        // The suite makes more changes in a minute than a service in a week.
        let interval = Duration::from_millis(50);
        let settings = Settings { sources: vec![source], interval, ..Settings::default() };
        let discovery = Discovery::new(Handle::current(), settings);
        let addresses = bound.iter().filter_map(|listener| listener.local_addr().ok());
        let addresses = addresses.map(|address| address.to_string()).collect();
        Self { registry, report, discovery, target, watch: None, addresses, part: String::new() }
    }

    fn begin(&mut self, part: impl Into<String>) {
        self.part = part.into();
        self.report.ran.push(self.part.clone());
    }

    fn skip(&mut self, part: impl Into<String>) {
        self.report.skipped.push(part.into());
    }

    fn broken<T>(&self, what: impl Into<String>) -> Result<T, Broken> {
        let mut what = what.into();
        for service in self.discovery.dump(self.registry.source().kind()).unwrap_or_default() {
            let _ = write!(what, "\n{:?} {:?}", service.freshness, service.instances);
            for Change { why, added, changed, removed, .. } in service.history {
                let _ = write!(
                    what,
                    "\n  {why}: added {:?}, changed {:?}, removed {:?}",
                    added.some, changed.some, removed.some
                );
            }
        }
        Err(Broken { part: self.part.clone(), what })
    }

    fn address(&self, place: usize) -> String {
        self.addresses.get(place).cloned().unwrap_or_default()
    }

    async fn register(&mut self, place: usize, weight: u32) {
        let address = self.address(place);
        self.registry.register(SERVICE, &address, weight).await;
    }

    async fn deregister(&mut self, place: usize) {
        let address = self.address(place);
        self.registry.deregister(SERVICE, &address).await;
    }

    fn set(&self, places: &[usize]) -> BTreeSet<SocketAddr> {
        places.iter().filter_map(|place| self.address(*place).parse().ok()).collect()
    }

    /// Waits until the endpoints are these.
    async fn becomes(&mut self, places: &[usize], what: &str) -> Result<Arc<Endpoints>, Broken> {
        let wanted = self.set(places);
        self.until(&format!("{what}: the endpoints should be {wanted:?}"), |endpoints| {
            addresses(endpoints) == wanted
        })
        .await
    }

    async fn until(
        &mut self,
        what: &str,
        done: impl Fn(&Endpoints) -> bool,
    ) -> Result<Arc<Endpoints>, Broken> {
        match self.wait(self.registry.patience(), done).await? {
            Some(endpoints) => Ok(endpoints),
            None => {
                let now = self.watch.as_ref().map(|watch| addresses(&watch.borrow()));
                self.broken(format!("{what}, and are {:?}", now.unwrap_or_default()))
            }
        }
    }

    /// The first endpoints that are `done`, if they come within this time.
    async fn wait(
        &mut self,
        time: Duration,
        done: impl Fn(&Endpoints) -> bool,
    ) -> Result<Option<Arc<Endpoints>>, Broken> {
        let deadline = Instant::now() + time;
        let Some(watch) = &mut self.watch else { return self.broken("nothing is watched") };
        let found = match timeout_at(deadline, watch.wait_for(|endpoints| done(endpoints))).await {
            Ok(Ok(endpoints)) => Ok(Some(Arc::clone(&endpoints))),
            Ok(Err(_)) => Err("the watch has ended"),
            Err(_) => Ok(None),
        };
        found.or_else(|what| self.broken(what))
    }

    /// Looks for a while whether the endpoints stay these.
    async fn stays(&mut self, places: &[usize], what: &str) -> Result<(), Broken> {
        let wanted = self.set(places);
        let lost = self.wait(STEADY, |endpoints| addresses(endpoints) != wanted).await?;
        match lost.map(|endpoints| addresses(&endpoints)) {
            Some(lost) => {
                self.broken(format!("{what}: the endpoints should stay {wanted:?} and became {lost:?}"))
            }
            None => Ok(()),
        }
    }

    /// A name of a wrong form is refused with advice.
    fn names(&mut self) -> Result<(), Broken> {
        let Some(name) = self.registry.wrong_name() else {
            self.skip("a wrong name");
            return Ok(());
        };
        self.begin("a wrong name");
        let query = Query { service: name.as_str().into(), args: self.registry.args() };
        let target = Target::service("upstreams/wrong", self.registry.source().kind(), query);
        match self.discovery.check(&target) {
            Err(TargetError::Service { advice, .. }) if advice.len() > 10 => Ok(()),
            Err(TargetError::Registry { .. }) => Ok(()),
            other => self.broken(format!("`{name}` should be refused with advice: {other:?}")),
        }
    }

    /// What the registry says is what is seen.
    async fn changes(&mut self) -> Result<(), Broken> {
        self.begin("the initial state");
        self.register(0, 3).await;
        self.watch = Some(self.discovery.watch(&self.target));
        let endpoints = self.becomes(&[0], "one was registered before").await?;
        if !endpoints.settled() || !endpoints.failures.is_empty() {
            return self.broken(format!("it should be settled and without failures: {endpoints:?}"));
        }
        self.begin("an instance more");
        self.register(1, 3).await;
        self.becomes(&[0, 1], "one more was registered").await?;
        if self.registry.has_weights() {
            self.begin("another weight");
            self.register(0, 7).await;
            let wanted: Option<SocketAddr> = self.address(0).parse().ok();
            let has = |weight| {
                move |endpoints: &Endpoints| {
                    endpoints.list.iter().any(|one| Some(one.addr) == wanted && one.weight == weight)
                }
            };
            self.until("one should have the weight 7", has(7)).await?;
            self.register(0, 3).await;
            self.until("one should have the weight 3 again", has(3)).await?;
        } else {
            self.skip("another weight");
        }
        self.begin("an instance less");
        self.deregister(1).await;
        self.becomes(&[0], "one was deregistered").await?;
        self.begin("on demand");
        self.register(1, 3).await;
        let name = Arc::clone(&self.target.name);
        if !self.discovery.refresh(Some(&name)) {
            return self.broken("the target should be known to a refresh");
        }
        self.becomes(&[0, 1], "one was registered and it was asked for").await?;
        Ok(())
    }

    /// Whatever the registry does short of saying so, no endpoint is lost; and when it behaves again, that is seen.
    async fn misconduct(&mut self, how: Conduct) -> Result<(), Broken> {
        let part = format!("{how:?}");
        if self.registry.behave(how).await == Able::No {
            self.skip(part);
            return Ok(());
        }
        self.begin(part);
        if MISCONDUCT.contains(&how) {
            // So that it is asked now, and not when the question under way is over.
            self.discovery.refresh(None);
        }
        self.stays(&[0, 1], "the registry misbehaves").await?;
        self.registry.behave(Conduct::Well).await;
        self.register(2, 3).await;
        self.becomes(&[0, 1, 2], "the registry behaves again and has one more").await?;
        self.deregister(2).await;
        self.becomes(&[0, 1], "and one less again").await?;
        Ok(())
    }

    /// What a registry has forgotten is kept while it answers.
    async fn restarts_empty(&mut self) -> Result<(), Broken> {
        let part = format!("{:?}", Conduct::RestartsEmpty);
        self.register(2, 3).await;
        self.becomes(&[0, 1, 2], "one more").await?;
        if self.registry.behave(Conduct::RestartsEmpty).await == Able::No {
            self.deregister(2).await;
            self.becomes(&[0, 1], "one less").await?;
            self.skip(part);
            return Ok(());
        }
        self.begin(part);
        self.registry.behave(Conduct::Well).await;
        self.becomes(&[0, 1], "one does not answer, and the registry does not know it").await?;
        self.stays(&[0, 1], "the registry has forgotten them and they answer").await?;
        self.register(0, 3).await;
        self.stays(&[0, 1], "the registry knows one again").await?;
        self.register(1, 3).await;
        self.stays(&[0, 1], "the registry knows both again").await?;
        self.vouched().await?;
        self.deregister(1).await;
        self.becomes(&[0], "one was known again and then deregistered").await?;
        self.register(1, 3).await;
        self.becomes(&[0, 1], "and registered again").await?;
        Ok(())
    }

    /// Waits until the registry is seen to list everything again.
    async fn vouched(&mut self) -> Result<(), Broken> {
        let deadline = Instant::now() + self.registry.patience();
        loop {
            let services = self.discovery.dump(self.registry.source().kind()).unwrap_or_default();
            if services.iter().all(|service| service.instances.iter().all(|instance| instance.kept.is_none()))
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                return self.broken("the registry lists all again, and that is not seen");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// An empty list is believed when it is meant.
    async fn empties(&mut self) -> Result<(), Broken> {
        self.begin("an empty list");
        self.deregister(0).await;
        self.deregister(1).await;
        self.becomes(&[], "all were deregistered").await?;
        self.register(1, 3).await;
        self.becomes(&[1], "one was registered again").await?;
        Ok(())
    }

    /// When nobody wants to know any more, nothing goes on.
    async fn ends(&mut self) -> Result<(), Broken> {
        self.begin("the end");
        self.watch = None;
        let deadline = Instant::now() + self.registry.patience();
        loop {
            let followed = self.discovery.services().len();
            let connections = self.registry.connections();
            if followed == 0 && connections.unwrap_or(0) == 0 {
                break;
            }
            if Instant::now() > deadline {
                let what = format!("{followed} services are followed, {connections:?} connections are open");
                return self.broken(what);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

fn addresses(endpoints: &Endpoints) -> BTreeSet<SocketAddr> {
    endpoints.list.iter().map(|endpoint| endpoint.addr).collect()
}
