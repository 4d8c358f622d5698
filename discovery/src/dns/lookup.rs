//! From a name to the addresses behind it: which types of records are asked for, in which order, and what several
//! answers mean together.
//!
//! A and AAAA are asked for at the same time; the one that comes first in the order is used and the other stands in where
//! it is missing. SRV records bring ports, priorities and weights, and their targets are looked up as well, unless the
//! answer had them with it. An answer of one type is worth nothing against the failure of the type that has answered so
//! far: otherwise a hiccup would swap the ports of SRV for the default one, or IPv4 for an IPv6 that leads nowhere.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{self, StreamExt};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

use super::MAX_ADDRESSES;
use super::resolver::{Current, Miss, Records, also};

/// SRV records that are looked at in one answer.
const MAX_TARGETS: usize = 256;
/// Targets that are looked up at the same time.
const TARGETS_AT_ONCE: usize = 8;
/// A target that could not be asked for is asked for again after this long.
const TARGET_AGAIN: Duration = Duration::from_secs(5);
/// After so many failures in a row of the type that used to answer, another one may take its place.
const MISSED: u8 = 3;

/// A type of record that leads to addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordKind {
    Srv,
    A,
    Aaaa,
}

impl RecordKind {
    fn family(self) -> Option<RecordType> {
        match self {
            Self::Srv => None,
            Self::A => Some(RecordType::A),
            Self::Aaaa => Some(RecordType::AAAA),
        }
    }
}

/// Which records are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Order {
    /// The first of these that a name has is used.
    pub kinds: Vec<RecordKind>,
    /// The type that has answered before goes first (`last` of APISIX).
    pub last: bool,
}

impl Order {
    /// Addresses alone, as for the nodes of an upstream.
    pub(crate) fn addresses() -> Self {
        Self { kinds: vec![RecordKind::A, RecordKind::Aaaa], last: false }
    }

    /// The same without a type.
    pub(crate) fn without(mut self, kind: RecordKind) -> Self {
        self.kinds.retain(|other| *other != kind);
        self
    }

    /// The families of addresses, the preferred one first.
    fn families(&self) -> Vec<RecordType> {
        let families: Vec<RecordType> = self.kinds.iter().filter_map(|kind| kind.family()).collect();
        if families.is_empty() { vec![RecordType::A] } else { families }
    }
}

impl Default for Order {
    fn default() -> Self {
        Self { kinds: vec![RecordKind::Srv, RecordKind::A, RecordKind::Aaaa], last: true }
    }
}

/// One address behind a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub ip: IpAddr,
    /// SRV records name one; 0 is none.
    pub port: Option<u16>,
    pub weight: u32,
    pub priority: i32,
    /// The target of the SRV record.
    pub target: Option<Arc<str>>,
}

/// What stands behind a name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub places: Vec<Place>,
    pub ttl: Duration,
}

/// What is remembered between two questions for the same name.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// The type that answered last, and how often it has failed since.
    last: Option<(RecordKind, u8)>,
    /// Targets of SRV records as they were known last.
    targets: HashMap<Name, Vec<IpAddr>>,
}

impl Memory {
    /// Every type is asked for in its turn again.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

/// Everything behind `name`, which need not be full.
pub(crate) async fn lookup(
    current: &Current,
    name: &str,
    order: &Order,
    memory: &mut Memory,
) -> Result<Found, Miss> {
    let mut missed: Option<Miss> = None;
    for candidate in current.candidates(name)? {
        match kinds(current, &candidate, order, memory).await {
            Ok(found) => return Ok(found),
            // The next name may belong to somebody else.
            Err(miss) if miss.is_failed() => return Err(miss),
            Err(miss) => missed = Some(also(missed, miss)),
        }
    }
    Err(missed.unwrap_or_else(|| Miss::failed(format!("`{name}` is not a name"))))
}

async fn kinds(current: &Current, name: &Name, order: &Order, memory: &mut Memory) -> Result<Found, Miss> {
    let families = order.families();
    let mut missed: Option<Miss> = None;
    let mut addresses_asked = false;
    for kind in in_order(order, memory) {
        let (kind, outcome) = match kind {
            RecordKind::Srv => match current.ask(name, RecordType::SRV).await {
                // Where there are such records, nothing else is looked for.
                Ok(records) => {
                    memory.last = Some((kind, 0));
                    return targets(current, records, &families, memory).await;
                }
                Err(miss) => (kind, Err(miss)),
            },
            _ if addresses_asked => continue,
            _ => {
                addresses_asked = true;
                addresses(current, name, kind, &families, memory.last).await
            }
        };
        match outcome {
            Ok(found) => {
                // Behind a failure, this type may only be second best.
                let clean = !missed.as_ref().is_some_and(Miss::is_failed);
                memory.last = clean.then_some((kind, 0));
                return Ok(found);
            }
            Err(miss) => {
                if let Some((last, failures)) = &mut memory.last
                    && !miss.is_absent()
                    && *last == kind
                    && *failures < MISSED
                {
                    *failures += 1;
                    return Err(miss);
                }
                missed = Some(also(missed, miss));
            }
        }
    }
    Err(missed.unwrap_or_else(|| Miss::failed("no type of record is asked for")))
}

/// The types in the order in which they are asked for now.
fn in_order(order: &Order, memory: &Memory) -> Vec<RecordKind> {
    let mut kinds = order.kinds.clone();
    if let (true, Some((last, _))) = (order.last, memory.last) {
        kinds.sort_by_key(|kind| kind.family().is_some() != last.family().is_some());
    }
    kinds
}

/// The addresses of a name, all families at once. Says which one is used.
async fn addresses(
    current: &Current,
    name: &Name,
    first: RecordKind,
    families: &[RecordType],
    last: Option<(RecordKind, u8)>,
) -> (RecordKind, Result<Found, Miss>) {
    let mut missed: Option<Miss> = None;
    let outcomes = join_all(families.iter().map(|family| current.ask(name, *family))).await;
    for (family, outcome) in families.iter().zip(outcomes) {
        let kind = if *family == RecordType::A { RecordKind::A } else { RecordKind::Aaaa };
        match outcome.and_then(|records| usable(name, *family, &records)) {
            Ok((ips, ttl)) => {
                let place = |ip| Place { ip, port: None, weight: 1, priority: 0, target: None };
                return (kind, Ok(Found { places: ips.into_iter().map(place).collect(), ttl }));
            }
            Err(miss) => {
                let used = matches!(last, Some((last, failures)) if last == kind && failures < MISSED);
                if used && !miss.is_absent() {
                    return (kind, Err(miss));
                }
                missed = Some(also(missed, miss));
            }
        }
    }
    (first, Err(missed.unwrap_or_else(|| Miss::failed(format!("{name}: no family is asked for")))))
}

/// Addresses that can be connected to, sorted: servers rotate their answers, and a rotation is no change.
fn usable(name: &Name, family: RecordType, records: &Records) -> Result<(Vec<IpAddr>, Duration), Miss> {
    let ips = sorted(records.list.iter().filter_map(RData::ip_addr));
    if ips.is_empty() {
        return Err(Miss::failed(format!("{name} {family}: the answer holds no usable address")));
    }
    Ok((ips, records.ttl))
}

fn sorted(ips: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut ips: Vec<IpAddr> = ips.filter(|ip| !ip.is_unspecified() && !ip.is_multicast()).collect();
    ips.sort_unstable();
    ips.dedup();
    ips.truncate(MAX_ADDRESSES);
    ips
}

/// One SRV record, in the order in which they are read: the best priority first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Service {
    priority: u16,
    target: Name,
    port: u16,
    weight: u16,
}

/// The places that SRV records name.
async fn targets(
    current: &Current,
    records: Records,
    families: &[RecordType],
    memory: &mut Memory,
) -> Result<Found, Miss> {
    let mut ttl = records.ttl;
    let mut services: Vec<Service> = records
        .list
        .iter()
        .filter_map(|data| match data {
            RData::SRV(srv) if !srv.target.is_root() => Some(Service {
                priority: srv.priority,
                target: srv.target.to_lowercase(),
                port: srv.port,
                weight: srv.weight,
            }),
            _ => None,
        })
        .collect();
    if services.is_empty() {
        return Err(Miss::Absent { ttl, reason: "the SRV record says that there is no such service".into() });
    }
    services.sort_unstable();
    services.truncate(MAX_TARGETS);

    let mut known: BTreeMap<Name, Result<Vec<IpAddr>, Miss>> = BTreeMap::new();
    for service in &services {
        if !known.contains_key(&service.target)
            && let Some((ips, holds)) = glue(&records.additionals, &service.target, families)
        {
            ttl = ttl.min(holds);
            known.insert(service.target.clone(), Ok(ips));
        }
    }
    let mut unknown: Vec<&Name> =
        services.iter().map(|it| &it.target).filter(|it| !known.contains_key(*it)).collect();
    unknown.sort_unstable();
    unknown.dedup();
    let mut questions: Vec<BoxFuture<'_, (Name, Result<Found, Miss>)>> = Vec::with_capacity(unknown.len());
    for target in unknown {
        questions.push(Box::pin(async move {
            let (_, outcome) = addresses(current, target, RecordKind::A, families, None).await;
            (target.clone(), outcome)
        }));
    }
    let answers: Vec<_> = stream::iter(questions).buffer_unordered(TARGETS_AT_ONCE).collect().await;
    for (target, outcome) in answers {
        let ips = match outcome {
            Ok(found) => {
                ttl = ttl.min(found.ttl);
                Ok(found.places.into_iter().map(|place| place.ip).collect())
            }
            Err(Miss::Absent { ttl: holds, .. }) => {
                ttl = ttl.min(holds);
                Ok(Vec::new())
            }
            // What cannot be asked for is where it was.
            Err(miss) => {
                ttl = ttl.min(TARGET_AGAIN);
                memory.targets.get(&target).cloned().ok_or(miss)
            }
        };
        known.insert(target, ips);
    }
    memory.targets = known.iter().filter_map(|(name, ips)| Some((name.clone(), ips.clone().ok()?))).collect();
    let places = places(&services, &memory.targets);
    match known.into_values().find_map(Result::err) {
        Some(miss) if places.is_empty() => Err(miss),
        None if places.is_empty() => {
            Err(Miss::Absent { ttl, reason: "none of the targets of the SRV records has an address".into() })
        }
        _ => Ok(Found { places, ttl }),
    }
}

/// The addresses that came along for a target.
fn glue(additionals: &[Record], target: &Name, families: &[RecordType]) -> Option<(Vec<IpAddr>, Duration)> {
    families.iter().find_map(|family| {
        let own = || additionals.iter().filter(|it| it.name == *target && it.record_type() == *family);
        let ips = sorted(own().filter_map(|record| record.data.ip_addr()));
        let ttl = own().map(|record| record.ttl).min()?;
        (!ips.is_empty()).then(|| (ips, Duration::from_secs(ttl.into())))
    })
}

/// Every address of every target, once. The weight of a target is shared by its addresses; so that it stays whole, all
/// weights grow by the same factor. A lower priority of SRV is a higher one of nodes.
fn places(services: &[Service], targets: &HashMap<Name, Vec<IpAddr>>) -> Vec<Place> {
    let none = Vec::new();
    let addresses = |service: &Service| targets.get(&service.target).unwrap_or(&none).clone();
    let factor = services.iter().map(|service| addresses(service).len() as u64).filter(|count| *count > 0);
    let factor = factor.fold(1, shared_multiple);
    let mut places: Vec<Place> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for service in services {
        let ips = addresses(service);
        let share = u64::from(service.weight.max(1)) * factor / (ips.len() as u64).max(1);
        let host: Arc<str> = service.target.to_string().trim_end_matches('.').into();
        for ip in ips {
            if places.len() < MAX_ADDRESSES && seen.insert((ip, service.port)) {
                places.push(Place {
                    ip,
                    port: Some(service.port),
                    weight: u32::try_from(share.max(1)).unwrap_or(u32::MAX),
                    priority: -i32::from(service.priority),
                    target: Some(Arc::clone(&host)),
                });
            }
        }
    }
    places
}

/// The least common multiple, as long as it is small enough to multiply weights with; beyond that shares are rounded.
fn shared_multiple(a: u64, b: u64) -> u64 {
    /// The largest weight of SRV times this is still a weight of nodes.
    const LIMIT: u64 = u32::MAX as u64 / u16::MAX as u64;
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    let multiple = a / x.max(1) * b;
    multiple.min(LIMIT)
}
