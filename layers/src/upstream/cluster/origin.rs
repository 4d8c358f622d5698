//! Where the endpoints of an upstream come from: what is written in it, as discovery wants it.

use std::collections::BTreeMap;
use std::sync::Arc;

use config::error::ConfigError;
use config::upstream::discovery::{Merge as WireMerge, Origin as WireOrigin, Part as WirePart};
use config::upstream::{Nodes, Upstream};
use discovery::{
    Details, Discovery, Endpoints, Guards, Merge, NameOptions, Node, Part, Query, Target, TargetError,
};
use hashbrown::HashMap;
use serde_json::Value;

use crate::upstream::mesh::HBONE;

/// Where endpoints come from.
pub(super) enum Origin {
    /// Addresses that are written down: all there will ever be.
    Literal(Endpoints),
    /// Names and services, which have to be followed.
    Followed(Target),
}

impl Origin {
    /// # Errors
    /// A registry is not configured, or a service not named as its registry wants it; with a pointer into the upstream.
    pub(super) fn of(key: &str, upstream: &Upstream, discovery: &Discovery) -> Result<Self, ConfigError> {
        let parts = upstream.parts();
        if let [WirePart { origin: WireOrigin::Nodes(written), .. }] = &*parts
            && let Some(endpoints) = discovery::fixed::endpoints(&nodes(upstream, written))
        {
            return Ok(Self::Literal(endpoints));
        }
        let target = target(key, upstream, &parts);
        discovery.check(&target).map_err(|error| {
            let place = parts.get(error.part()).map(|part| part.place);
            let pointer = place.map(|place| match &error {
                TargetError::Kind { .. } => place.of_kind(),
                _ => place.of_service(),
            });
            ConfigError::invalid(pointer.unwrap_or_default(), error.to_string())
        })?;
        Ok(Self::Followed(target))
    }
}

/// The services of registries among `parts`.
pub(super) fn services(parts: &[Part]) -> impl Iterator<Item = &Arc<str>> + Clone {
    parts.iter().filter_map(|part| match &part.origin {
        discovery::Origin::Service { query, .. } => Some(&query.service),
        discovery::Origin::Nodes(_) => None,
    })
}

fn target(key: &str, upstream: &Upstream, parts: &[WirePart<'_>]) -> Target {
    let names: NameOptions = upstream.dns.as_deref().map(Into::into).unwrap_or_default();
    let parts = parts.iter().map(|part| {
        let origin = match part.origin {
            WireOrigin::Nodes(written) => discovery::Origin::Nodes(nodes(upstream, written)),
            WireOrigin::Service { kind, service, args } => {
                let args = args.into_iter().flat_map(|args| args.iter());
                let mut args: BTreeMap<Arc<str>, Arc<str>> =
                    args.map(|(name, value)| (name.into(), value.into())).collect();
                if kind == "dns" {
                    for (name, value) in names.to_args() {
                        args.entry(name).or_insert(value);
                    }
                }
                discovery::Origin::Service {
                    kind: kind.into(),
                    query: Query { service: service.into(), args },
                }
            }
        };
        Part { origin, share: part.weight }
    });
    let options = upstream.discovery.as_deref();
    let mut target = Target::of(key, parts.collect());
    target.merge = match options.map(|options| options.merge).unwrap_or_default() {
        WireMerge::Union => Merge::Union,
        WireMerge::Prefer => Merge::Prefer,
        WireMerge::Intersect => Merge::Intersect,
    };
    target.names = names;
    target.port = upstream.scheme.default_port();
    if let Some(options) = options {
        let guards = Guards::default();
        target.guards = Guards {
            max_stale: options.max_stale.map(|time| time.duration()),
            drop_stale: options.drop_stale,
            empty_confirm: options.empty_confirm.map_or(guards.empty_confirm, |time| time.duration()),
            drop_limit: options
                .drop_limit
                .and_then(|limit| u8::try_from(limit.get()).ok())
                .unwrap_or(guards.drop_limit),
            ..guards
        };
    }
    target
}

/// Nodes as discovery knows them.
fn nodes(upstream: &Upstream, written: &Nodes) -> Vec<Node> {
    let node = |node: &config::upstream::Node| Node {
        host: node.bare_host().into(),
        port: upstream.port_of(node),
        weight: node.weight,
        priority: node.priority,
    };
    written.iter().map(node).collect()
}

/// Host and port of a node that is written down.
type NodeAt = (Arc<str>, u16);

/// Where and who nodes are whose `metadata` says so: `region`, `zone`, `machine`, `identity`, `mesh`.
#[derive(Debug, Default)]
pub(crate) struct Places(HashMap<NodeAt, Arc<Details>>);

impl Places {
    pub(crate) fn of(upstream: &Upstream) -> Option<Box<Self>> {
        let mut places = HashMap::new();
        for part in upstream.parts() {
            let WireOrigin::Nodes(written) = part.origin else { continue };
            for node in written {
                let Some(metadata) = node.metadata.as_deref() else { continue };
                let name = |key| metadata.get(key).and_then(Value::as_str).map(Arc::from);
                let mut details = Details {
                    region: name("region"),
                    zone: name("zone"),
                    machine: name("machine"),
                    identity: name("identity"),
                    ..Details::default()
                };
                match metadata.get("mesh") {
                    Some(way) if *way == HBONE => drop(details.meta.insert("mesh".into(), HBONE.into())),
                    Some(way) if *way == Value::Bool(true) || way == "true" => {
                        details.meta.insert("mesh".into(), "true".into());
                    }
                    _ => {}
                }
                if details != Details::default() {
                    places.insert((node.bare_host().into(), upstream.port_of(node)), Arc::new(details));
                }
            }
        }
        (!places.is_empty()).then(|| Box::new(Self(places)))
    }

    pub(super) fn find(&self, host: &Arc<str>, port: u16) -> Option<Arc<Details>> {
        self.0.get(&(host.clone(), port)).cloned()
    }
}
