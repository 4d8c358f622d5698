//! What a service's slices amount to: one list of instances.
//!
//! All slices are joined; an address that is in two of them, as it may be while it moves, is one instance in its better
//! state. A service of both families of addresses has each pod twice, and one family is taken.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use super::name::Name;
use super::objects::{AddressType, Backend, Known, Port, Readiness, Slice};
use super::store::Service;
use crate::Node;
use crate::source::{Details, Health, Instance, Query, SourceError};

/// Which instances a watcher wants.
#[derive(Debug)]
pub(super) struct Wanted {
    pub name: Name,
    weight: u32,
    family: Family,
    /// The port was found once: that it is not there any more is no mistake of the configuration.
    found: bool,
}

/// Which addresses of a service are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    /// Those that the service prefers.
    Primary,
    Only(AddressType),
    Both,
}

/// The number of a port and its protocol.
type Chosen<'a> = (u16, Option<&'a Arc<str>>);

impl Wanted {
    /// What the name and `discovery_args` say.
    pub(super) fn new(name: Name, query: &Query, weight: u32) -> Result<Self, String> {
        let family = match query.args.get("family").map(|family| &**family) {
            None => Family::Primary,
            Some("ipv4") => Family::Only(AddressType::IPv4),
            Some("ipv6") => Family::Only(AddressType::IPv6),
            Some("any") => Family::Both,
            Some(other) => return Err(format!("`family` is `{other}`: write `ipv4`, `ipv6` or `any`")),
        };
        Ok(Self { name, weight, family, found: false })
    }

    /// The instances: all that may be used, and those that are drained.
    pub(super) fn instances(&mut self, service: &Service) -> Result<Vec<Instance>, SourceError> {
        let known = service.known.as_deref();
        if let Some(name) = known.and_then(|known| known.external.as_ref()) {
            return Ok(vec![self.external(name, known)?]);
        }
        let family = self.family(service);
        let slices = service.slices.iter().flat_map(|slices| slices.iter());
        let mut places: Vec<Place<'_>> = Vec::new();
        let mut offered = false;
        for slice in slices.filter(|slice| slice.family != AddressType::Other) {
            offered |= !slice.ports.is_empty() && !slice.endpoints.is_empty();
            let Some((number, protocol)) = self.port(slice, known)? else { continue };
            self.found = true;
            if family.is_some_and(|family| slice.family != family && slice.family != AddressType::Fqdn) {
                continue;
            }
            places.extend(slice.endpoints.iter().map(|backend| Place { backend, number, protocol }));
        }
        if offered && !self.found {
            return Err(self.no_port(service));
        }
        Ok(self.join(places, known))
    }

    /// The family that is taken; none stands for all.
    fn family(&self, service: &Service) -> Option<AddressType> {
        let has = |family: AddressType| {
            let mut slices = service.slices.iter().flat_map(|slices| slices.iter());
            slices.any(|slice| slice.family == family && !slice.endpoints.is_empty())
        };
        match self.family {
            Family::Both => None,
            Family::Only(family) => Some(family),
            Family::Primary => {
                let preferred = service.known.as_ref().and_then(|known| known.family);
                let order = [preferred.unwrap_or(AddressType::IPv4), AddressType::IPv4, AddressType::IPv6];
                order.into_iter().find(|family| has(*family))
            }
        }
    }

    /// The wanted port in a slice; ports of the same name may have different numbers in different slices.
    fn port<'a>(&self, slice: &'a Slice, known: Option<&Known>) -> Result<Option<Chosen<'a>>, SourceError> {
        let ports = slice.ports.as_slice();
        let Some(wanted) = self.name.port.as_deref() else {
            return match ports {
                [] => Ok(None),
                [Port { number: Some(number), protocol, .. }] => Ok(Some((*number, protocol.as_ref()))),
                ports => Err(self.ambiguous(ports)),
            };
        };
        let number: Option<u16> = wanted.parse().ok();
        let named = |name: Option<&str>| ports.iter().find(|port| port.name.as_deref() == name);
        let of_service = || {
            let known = known?.ports.iter().find(|(port, _)| Some(*port) == number)?;
            named(known.1.as_deref())
        };
        let found = named(Some(wanted))
            .or_else(of_service)
            .or_else(|| ports.iter().find(|port| port.number.is_some() && port.number == number))
            // A port without a number stands for all of them.
            .or_else(|| ports.iter().find(|port| port.number.is_none() && number.is_some()));
        Ok(found.and_then(|port| Some((port.number.or(number)?, port.protocol.as_ref()))))
    }

    fn join(&self, places: Vec<Place<'_>>, known: Option<&Known>) -> Vec<Instance> {
        let is_ready = |place: &&Place<'_>| place.backend.readiness == Readiness::Ready;
        let some_ready = places.iter().any(|place| is_ready(&place));
        let health = |readiness: Readiness| match readiness {
            Readiness::Ready => Some(Health::Healthy),
            Readiness::ServesOn if some_ready => Some(Health::Draining),
            Readiness::ServesOn => Some(Health::Warning),
            Readiness::Not => None,
        };
        // Hints divide the endpoints among the zones. With one that has none, the division is not complete.
        let hinted = places.iter().filter(is_ready).all(|place| !place.backend.details.for_zones.is_empty());
        let distribution = known.and_then(|known| known.traffic_distribution.as_ref());

        let mut seen: HashMap<(&str, u16), usize> = HashMap::with_capacity(places.len());
        let mut ids: HashMap<Arc<str>, usize> = HashMap::with_capacity(places.len());
        let mut instances: Vec<Instance> = Vec::with_capacity(places.len());
        for place in places {
            let Some(health) = health(place.backend.readiness) else { continue };
            let host = &place.backend.host;
            let mut instance = Instance {
                id: place.id(),
                node: Node { host: Arc::clone(host), port: place.number, weight: self.weight, priority: 0 },
                health,
                details: Some(place.details(hinted, distribution)),
            };
            match seen.entry((&**host, place.number)) {
                Entry::Occupied(at) => {
                    let other = instances.get_mut(*at.get());
                    if let Some(other) = other.filter(|other| instance.health < other.health) {
                        *other = instance;
                    }
                }
                Entry::Vacant(at) => {
                    // A pod with an address of each family is two instances where both are wanted.
                    let count = ids.entry(Arc::clone(&instance.id)).or_default();
                    *count += 1;
                    if *count > 1 {
                        instance.id = format!("{}@{host}", instance.id).into();
                    }
                    at.insert(instances.len());
                    instances.push(instance);
                }
            }
        }
        instances
    }

    /// A service that is another name for something outside.
    fn external(&self, name: &Arc<str>, known: Option<&Known>) -> Result<Instance, SourceError> {
        let ports = known.map(|known| known.ports.as_slice()).unwrap_or_default();
        let port = match self.name.port.as_deref() {
            Some(wanted) => {
                let named =
                    ports.iter().find(|(_, name)| name.as_deref() == Some(wanted)).map(|(port, _)| *port);
                named.or_else(|| wanted.parse().ok())
            }
            None => match ports {
                [(port, _)] => Some(*port),
                _ => None,
            },
        };
        let Some(port) = port else {
            return Err(SourceError::new(format!(
                "{} stands for the name {name}, and has no such port: write its number after `:`",
                self.service()
            )));
        };
        Ok(Instance {
            id: format!("{name}:{port}").into(),
            node: Node { host: Arc::clone(name), port, weight: self.weight, priority: 0 },
            health: Health::Healthy,
            details: None,
        })
    }

    fn service(&self) -> String {
        format!("{}/{}", self.name.service.namespace, self.name.service.name)
    }

    fn ambiguous(&self, ports: &[Port]) -> SourceError {
        SourceError::new(format!(
            "{} has the ports {}: write one of them after `:`",
            self.service(),
            names(ports)
        ))
    }

    fn no_port(&self, service: &Service) -> SourceError {
        let mut slices = service.slices.iter().flat_map(|slices| slices.iter());
        let ports =
            slices.find(|slice| !slice.ports.is_empty()).map(|slice| names(&slice.ports)).unwrap_or_default();
        let wanted = self.name.port.as_deref().unwrap_or_default();
        let hint = match service.services_known {
            false if wanted.parse::<u16>().is_ok() => {
                "; the numbers of a service's own ports need the right to read Services"
            }
            _ => "",
        };
        SourceError::new(format!("{} has no port `{wanted}`, but {ports}{hint}", self.service()))
    }
}

fn names(ports: &[Port]) -> String {
    let name = |port: &Port| match (&port.name, port.number) {
        (Some(name), Some(number)) => format!("`{name}` ({number})"),
        (Some(name), None) => format!("`{name}`"),
        (None, Some(number)) => format!("`{number}`"),
        (None, None) => "any".to_owned(),
    };
    ports.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// An endpoint and its port.
struct Place<'a> {
    backend: &'a Backend,
    number: u16,
    protocol: Option<&'a Arc<str>>,
}

impl Place<'_> {
    fn id(&self) -> Arc<str> {
        match &self.backend.target {
            Some(target) => Arc::clone(target),
            None => format!("{}:{}", self.backend.host, self.number).into(),
        }
    }

    /// Shared with the slice unless something is to be added or left out.
    fn details(&self, hinted: bool, distribution: Option<&Arc<str>>) -> Arc<Details> {
        let plain = &self.backend.details;
        if self.protocol.is_none() && distribution.is_none() && (hinted || plain.for_zones.is_empty()) {
            return Arc::clone(plain);
        }
        let mut details = Details::clone(plain);
        if !hinted {
            details.for_zones.clear();
        }
        for (name, value) in [("app_protocol", self.protocol), ("traffic_distribution", distribution)] {
            if let Some(value) = value {
                details.meta.insert(name.into(), Arc::clone(value));
            }
        }
        Arc::new(details)
    }
}
