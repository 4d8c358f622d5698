//! DNS as a registry: `discovery_type: dns` with a name as the service, and the names of nodes.
//!
//! A service is `name` or `name:port`; without a port, that of its SRV records counts, and without those that of the
//! upstream's scheme. A zone that says with its SOA that there is no such name or record says that the service has no
//! instance. For the name of a node it says nothing: a configured node is not taken out because DNS has lost it, its last
//! good addresses stay. Whatever is no answer is an error for both.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::MAX_ADDRESSES;
use super::lookup::{Memory, Order, Place, RecordKind, lookup};
use super::options::{Limits, NameOptions, Settings};
use super::resolver::{Miss, Resolver};
use crate::source::{
    Again, Details, Health, Instance, Listing, Query, Source, SourceError, Standing, Watcher,
};
use crate::{Node, literal};

/// What names stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Services,
    Nodes,
}

/// Name servers as a registry.
#[derive(Clone, Debug)]
pub struct Dns {
    resolver: Arc<Resolver>,
    kind: Kind,
}

impl Dns {
    /// Services by name (`discovery_type: dns`).
    pub fn services(settings: Settings) -> Self {
        Self { resolver: Arc::new(Resolver::new(settings)), kind: Kind::Services }
    }

    /// The names of configured nodes. Instances have port 0.
    pub fn nodes(settings: Settings) -> Self {
        Self { resolver: Arc::new(Resolver::new(settings)), kind: Kind::Nodes }
    }

    /// Follows a name.
    pub(crate) fn watch(&self, name: Arc<str>, port: Option<u16>, options: &NameOptions) -> Name {
        let settings = self.resolver.settings();
        let order = match self.kind {
            Kind::Services => settings.order.clone(),
            Kind::Nodes => Order::addresses(),
        };
        let order = if settings.ipv6 { order } else { order.without(RecordKind::Aaaa) };
        Name {
            name,
            port,
            kind: self.kind,
            order,
            limits: Limits::new(settings, options),
            resolver: Arc::clone(&self.resolver),
            memory: Memory::default(),
            seen: BTreeMap::new(),
        }
    }
}

impl Source for Dns {
    fn kind(&self) -> &'static str {
        match self.kind {
            Kind::Services => "dns",
            Kind::Nodes => "name",
        }
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        let options = NameOptions::from_args(query.args.iter().map(|(name, value)| (&**name, &**value)))?;
        let (name, port) = parse(&query.service)?;
        Ok(Box::new(self.watch(name.into(), port, &options)))
    }
}

/// `name`, `name:port`, an address, or an address in brackets with a port.
fn parse(service: &str) -> Result<(&str, Option<u16>), String> {
    let wrong = || format!("`{service}` is not `name` or `name:port`");
    if literal(service).is_some() {
        return Ok((service, None));
    }
    let (name, port) = match service.rsplit_once(':') {
        Some((name, port)) => (name, Some(port.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?)),
        None => (service, None),
    };
    let plain = hickory_resolver::proto::rr::Name::from_str_relaxed(name).is_ok();
    if name.is_empty() || !(plain || literal(name).is_some()) {
        return Err(wrong());
    }
    Ok((name, port))
}

/// One name that is followed.
pub(crate) struct Name {
    name: Arc<str>,
    port: Option<u16>,
    kind: Kind,
    order: Order,
    limits: Limits,
    resolver: Arc<Resolver>,
    memory: Memory,
    /// Where answers are added up: every place of late, and when it was last heard of.
    seen: BTreeMap<(IpAddr, Option<u16>), (Place, Instant)>,
}

impl Watcher for Name {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(self.ask())
    }

    fn restart(&mut self) {
        self.memory.forget();
    }
}

impl Name {
    pub async fn ask(&mut self) -> Result<Listing, SourceError> {
        let (places, again) = match self.places().await {
            Ok(found) => found,
            Err(Miss::Absent { ttl, .. }) if self.kind == Kind::Services => {
                self.seen.clear();
                (Vec::new(), self.limits.negative(ttl))
            }
            Err(Miss::Absent { reason, .. } | Miss::Denied { reason } | Miss::Failed { reason }) => {
                return Err(SourceError::new(reason));
            }
        };
        Ok(Listing {
            instances: self.instances(places),
            standing: Standing::Continued,
            again: Again::After(again),
        })
    }

    async fn places(&mut self) -> Result<(Vec<Place>, Duration), Miss> {
        if let Some(ip) = literal(&self.name) {
            let place = Place { ip, port: None, weight: 1, priority: 0, target: None };
            return Ok((vec![place], self.limits.positive(Duration::MAX)));
        }
        let found = {
            let _turn = self.resolver.turn().await;
            let current = self.resolver.current()?;
            lookup(&current, &self.name, &self.order, &mut self.memory).await?
        };
        let again = self.limits.positive(found.ttl);
        Ok((self.add_up(found.places), again))
    }

    /// What was heard of within the window, if there is one.
    fn add_up(&mut self, places: Vec<Place>) -> Vec<Place> {
        let Some(window) = self.limits.accumulate else { return places };
        let now = Instant::now();
        for place in places {
            self.seen.insert((place.ip, place.port), (place, now));
        }
        self.seen.retain(|_, (_, at)| now.saturating_duration_since(*at) <= window);
        if self.seen.len() > MAX_ADDRESSES {
            let mut oldest: Vec<_> = self.seen.iter().map(|(key, (_, at))| (*at, *key)).collect();
            oldest.sort_unstable();
            oldest.truncate(self.seen.len() - MAX_ADDRESSES);
            oldest.iter().for_each(|(_, key)| drop(self.seen.remove(key)));
        }
        self.seen.values().map(|(place, _)| place.clone()).collect()
    }

    fn instances(&self, places: Vec<Place>) -> Vec<Instance> {
        let mut machines: BTreeMap<Arc<str>, Arc<Details>> = BTreeMap::new();
        let instance = |place: Place| {
            let port = self.port.or(place.port).unwrap_or(0);
            let details = place.target.map(|target| {
                let details =
                    || Arc::new(Details { machine: Some(Arc::clone(&target)), ..Details::default() });
                Arc::clone(machines.entry(Arc::clone(&target)).or_insert_with(details))
            });
            Instance {
                id: SocketAddr::new(place.ip, port).to_string().into(),
                node: Node {
                    host: place.ip.to_string().into(),
                    port,
                    weight: place.weight,
                    priority: place.priority,
                },
                health: Health::Healthy,
                details,
            }
        };
        places.into_iter().map(instance).collect()
    }
}
