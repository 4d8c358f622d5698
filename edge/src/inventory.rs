//! What is known of the endpoints of upstreams: what discovery found, and what the upstream makes of it.
//!
//! Two views are laid upon each other by address and host: discovery knows who lists an endpoint, since when and how
//! sure that is; the upstream knows whether it gets requests and why not. Everything is made when somebody asks.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use discovery::views::{self, FromView, PartView, SourceView, unix};
use discovery::{Discovery, Freshness, Health, NameView, ServiceView, TargetView};
use layers::telemetry::exposition::Exposition;
use layers::telemetry::names;
use layers::upstream::cluster::{Cluster, EndpointView, Verdict};
use serde_json::{Map, Value, json};

/// Label sets of one family at the most. Upstreams and services beyond it are left out of the page, the least stale
/// ones first.
const MAX_SERIES: usize = 2000;

/// An upstream by the key of the object that holds it.
pub(crate) type Named = (Box<str>, Arc<Cluster>);

/// The upstreams that are called so: by the object that holds them (`upstreams/1`, `routes/7`), by the id of the upstream
/// alone, or by a service of a registry or a host that their endpoints come from. All of them for no name.
pub(crate) fn called(mut clusters: Vec<Named>, name: Option<&str>) -> Vec<Named> {
    if let Some(name) = name {
        clusters.retain(|(key, cluster)| {
            **key == *name
                || key.strip_prefix("upstreams/") == Some(name)
                || cluster.services().iter().any(|(_, service)| **service == *name)
                || cluster.endpoints().iter().any(|endpoint| *endpoint.host == *name)
                || cluster.unresolved().iter().any(|(host, _)| host == name)
        });
    }
    clusters.sort_by(|a, b| a.0.cmp(&b.0));
    clusters
}

/// A word that is another one when something about these upstreams has changed.
pub(crate) fn version(clusters: &[Named], discovery: &Discovery) -> String {
    let mut hasher = DefaultHasher::new();
    let mut services = BTreeSet::new();
    for (key, cluster) in clusters {
        (key, cluster.version()).hash(&mut hasher);
        services.extend(cluster.services());
    }
    if !services.is_empty() {
        for view in discovery.services() {
            if services.contains(&(view.kind.clone(), view.service.clone())) {
                (view.generation, view.freshness.is_fresh(), view.failure.is_some()).hash(&mut hasher);
            }
        }
    }
    format!("{:016x}", hasher.finish())
}

/// Every upstream in a few words.
pub(crate) fn summaries(clusters: &[Named], discovery: &Discovery) -> Vec<Value> {
    let found = found(clusters, discovery, None);
    let summary = |(key, cluster): &Named| {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for endpoint in cluster.endpoints() {
            *counts.entry(endpoint.verdict.as_str()).or_default() += 1;
        }
        let mut summary = Map::new();
        summary.insert("name".to_owned(), json!(key));
        summary.insert("sources".to_owned(), sources(cluster, found.get(&**key)));
        summary.insert("endpoints".to_owned(), json!(counts));
        state(&mut summary, cluster, found.get(&**key));
        Value::Object(summary)
    };
    clusters.iter().map(summary).collect()
}

/// These upstreams with everything that is known of their endpoints.
pub(crate) fn details(clusters: &[Named], discovery: &Discovery, name: &str) -> Vec<Value> {
    let found = found(clusters, discovery, Some(name));
    let hosts: BTreeMap<Arc<str>, NameView> =
        discovery.names().into_iter().map(|view| (view.name.clone(), view)).collect();
    let now = SystemTime::now();
    let detail = |(key, cluster): &Named| {
        let of = found.get(&**key);
        let mut detail = Map::new();
        detail.insert("name".to_owned(), json!(key));
        if let Some(target) = of {
            detail.insert("merge".to_owned(), json!(target.merge));
        }
        detail.insert("sources".to_owned(), sources(cluster, of));
        state(&mut detail, cluster, of);
        detail.insert("endpoints".to_owned(), endpoints(cluster, of, &hosts, now));
        if let Some(target) = of {
            let history = |part: &PartView| match &part.from {
                FromView::Service(view) => view.history.clone(),
                FromView::Nodes { .. } => Vec::new(),
            };
            let mut changes: Vec<_> = target.parts.iter().flat_map(history).collect();
            changes.extend(target.history.iter().cloned());
            changes.sort_by_key(|change| change.at);
            detail.insert("history".to_owned(), json!(changes));
        }
        Value::Object(detail)
    };
    clusters.iter().map(detail).collect()
}

/// What discovery says of these upstreams, by their names.
fn found(clusters: &[Named], discovery: &Discovery, name: Option<&str>) -> BTreeMap<String, TargetView> {
    // Asked for by the id of an upstream, discovery knows it by another name.
    let name =
        name.filter(|_| clusters.len() > 1).filter(|name| clusters.iter().all(|(key, _)| **key != **name));
    let only = match clusters {
        [(key, _)] => Some(&**key),
        _ => name,
    };
    let views = discovery.views(only);
    views.into_iter().map(|view| (view.name.to_string(), view)).collect()
}

/// Where the endpoints of an upstream come from, and how sure that is.
fn sources(cluster: &Cluster, of: Option<&TargetView>) -> Value {
    let Some(target) = of else { return json!([{ "kind": "nodes", "count": cluster.endpoints().len() }]) };
    let source = |part: &PartView| {
        let mut source = match &part.from {
            FromView::Nodes { count } => json!({ "kind": "nodes", "count": count }),
            FromView::Service(view) => {
                let mut value = json!({
                    "kind": view.kind, "registry": view.registry, "service": view.service, "args": view.args,
                    "freshness": view.freshness, "generation": view.generation, "count": view.count,
                    "answered": view.answered.map(unix), "failure": view.failure, "errors": view.errors,
                });
                if let Some(members) = value.as_object_mut() {
                    members.retain(|_, member| {
                        !(member.is_null() || member == "" || member.as_object().is_some_and(Map::is_empty))
                    });
                }
                value
            }
        };
        if let (Some(share), Some(members)) = (part.share, source.as_object_mut()) {
            members.insert("weight".to_owned(), share.into());
        }
        source
    };
    target.parts.iter().map(source).collect()
}

/// What holds for an upstream as a whole. What is as it should be is left out.
fn state(into: &mut Map<String, Value>, cluster: &Cluster, of: Option<&TargetView>) {
    if cluster.is_degraded() {
        into.insert("panic".to_owned(), true.into());
    }
    let unresolved = cluster.unresolved();
    if !unresolved.is_empty() {
        into.insert(
            "failures".to_owned(),
            unresolved.into_iter().collect::<BTreeMap<_, _>>().into_iter().collect(),
        );
    }
    let Some(target) = of else { return };
    if !target.settled {
        into.insert("settled".to_owned(), false.into());
    }
    if !target.degraded.is_empty() {
        into.insert("stale".to_owned(), json!(target.degraded));
    }
    if !target.refused.is_empty() {
        into.insert("refused".to_owned(), json!(target.refused));
    }
    if target.alarms > 0 {
        into.insert("alarms".to_owned(), target.alarms.into());
    }
}

/// An endpoint by what both sides know it by.
type At = (SocketAddr, Arc<str>);

fn endpoints(
    cluster: &Cluster,
    of: Option<&TargetView>,
    hosts: &BTreeMap<Arc<str>, NameView>,
    now: SystemTime,
) -> Value {
    let mut listed: BTreeMap<At, &views::EndpointView> = of
        .into_iter()
        .flat_map(|target| &target.endpoints)
        .map(|endpoint| ((endpoint.address, endpoint.host.clone()), endpoint))
        .collect();
    let mut told: Vec<Value> = cluster
        .endpoints()
        .iter()
        .map(|endpoint| {
            let from = listed.remove(&(endpoint.address, endpoint.host.clone()));
            told(endpoint, from, hosts, now)
        })
        .collect();
    // What is left is refused, or so new that the upstream has not taken it in.
    told.extend(listed.values().map(|endpoint| {
        let mut value = json!({
            "address": endpoint.address, "host": endpoint.host, "weight": endpoint.weight,
            "priority": endpoint.priority, "verdict": endpoint.verdict, "why": endpoint.why,
        });
        add_sources(&mut value, &endpoint.sources, now);
        value
    }));
    Value::Array(told)
}

/// One endpoint that the upstream has.
fn told(
    endpoint: &EndpointView,
    from: Option<&views::EndpointView>,
    hosts: &BTreeMap<Arc<str>, NameView>,
    now: SystemTime,
) -> Value {
    let kept = from.filter(|from| from.verdict == views::Verdict::Kept && endpoint.verdict == Verdict::Used);
    let mut value = json!({
        "address": endpoint.address,
        "host": endpoint.host,
        "weight": endpoint.weight,
        "priority": endpoint.priority,
        "verdict": if kept.is_some() { "kept" } else { endpoint.verdict.as_str() },
        "status": endpoint.status,
        "in_flight": endpoint.active,
        "requests": endpoint.requests,
        "failures": endpoint.failures,
    });
    let why = match (&endpoint.why, kept.and_then(|kept| kept.why.as_deref())) {
        (_, Some(why)) => Some(why),
        (why, None) => why.as_deref(),
    };
    if let Some(members) = value.as_object_mut() {
        let place = &endpoint.place;
        let optional = [
            ("why", why),
            ("breaker", endpoint.breaker),
            ("region", place.region.as_deref()),
            ("zone", place.zone.as_deref()),
            ("machine", place.machine.as_deref()),
            ("identity", from.and_then(|from| from.identity.as_deref())),
        ];
        let optional = optional.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?.into())));
        members.extend(optional);
        if let Some(from) = from.filter(|from| !from.meta.is_empty()) {
            members.insert("meta".to_owned(), json!(from.meta));
        }
    }
    match from {
        Some(from) => add_sources(&mut value, &from.sources, now),
        None => add_sources(&mut value, &[of_nodes(hosts.get(&endpoint.host), now)], now),
    }
    value
}

/// A node that is written down, and the name behind it.
fn of_nodes(host: Option<&NameView>, now: SystemTime) -> SourceView {
    let ago = |time: Duration| now.checked_sub(time).unwrap_or(SystemTime::UNIX_EPOCH);
    SourceView {
        kind: "nodes".into(),
        registry: "".into(),
        service: None,
        instance: None,
        health: Health::Healthy,
        first_seen: None,
        last_confirmed: host.and_then(|host| host.age).map(ago),
        freshness: match host.and_then(|host| host.failure.as_ref()) {
            Some((why, since)) => Freshness::Stale { since: ago(*since), why: why.clone() },
            None => Freshness::Fresh,
        },
    }
}

/// Who lists an endpoint, since when, and how long ago that was heard last.
fn add_sources(endpoint: &mut Value, sources: &[SourceView], now: SystemTime) {
    let Some(members) = endpoint.as_object_mut() else { return };
    let earliest = sources.iter().filter_map(|source| source.first_seen).min();
    let latest = sources.iter().filter_map(|source| source.last_confirmed).max();
    members.extend(earliest.map(|at| ("first_seen".to_owned(), unix(at).into())));
    if let Some(at) = latest {
        members.insert("last_confirmed".to_owned(), unix(at).into());
    }
    let stale = |source: &SourceView| match &source.freshness {
        Freshness::Stale { since, .. } => now.duration_since(*since).ok(),
        Freshness::Fresh | Freshness::Unknown => None,
    };
    // One source that is sure is enough.
    let sure = sources.iter().any(|source| source.freshness.is_fresh());
    let staleness = sources.iter().filter_map(stale).min().filter(|_| !sure).unwrap_or_default();
    members.insert("staleness".to_owned(), ((staleness.as_secs_f64() * 1000.0).round() / 1000.0).into());
    members.insert("sources".to_owned(), json!(sources));
}

/// The services of a kind of registry in APISIX's words. None: it is not in use.
pub(crate) fn dump(discovery: &Discovery, kind: &str, config: Option<&Value>) -> Option<Value> {
    let services = discovery.dump(kind)?;
    let mut config = config.cloned().unwrap_or(Value::Null);
    hide(&mut config);
    if kind == "kubernetes" {
        return Some(json!({ "config": config, "endpoints": kubernetes(&services) }));
    }
    let mut by_name: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for view in &services {
        by_name.entry(&view.service).or_default().extend(nodes(view));
    }
    let mut dump = json!({ "config": config, "services": by_name });
    if let Some(members) = dump.as_object_mut().filter(|_| kind == "dns") {
        members.insert("names".to_owned(), names_of(discovery));
    }
    Some(dump)
}

/// What APISIX would have in its dump file.
pub(crate) fn dump_file(discovery: &Discovery, kind: &str) -> Option<Value> {
    let services = discovery.dump(kind)?;
    let latest = services.iter().filter_map(|view| view.answered).max().unwrap_or(SystemTime::UNIX_EPOCH);
    let mut by_name: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for view in &services {
        by_name.entry(&view.service).or_default().extend(nodes(view));
    }
    Some(json!({ "services": by_name, "expire": 0, "last_update": unix(latest) as u64 }))
}

/// The instances that get requests, as nodes of an upstream.
fn nodes(view: &ServiceView) -> impl Iterator<Item = Value> {
    let usable = view.instances.iter().filter(|instance| instance.health <= Health::Warning);
    usable.map(|instance| {
        let mut node = json!({ "host": instance.host, "port": instance.port, "weight": instance.weight });
        if let Some(members) = node.as_object_mut().filter(|_| instance.priority != 0) {
            members.insert("priority".to_owned(), instance.priority.into());
        }
        node
    })
}

/// `[{id, endpoints: [{name: "namespace/name", value: "{\"port\": [nodes]}"}]}]`
fn kubernetes(services: &[ServiceView]) -> Value {
    type Ports<'a> = BTreeMap<&'a str, Vec<Value>>;
    let mut clusters: BTreeMap<&str, BTreeMap<&str, Ports<'_>>> = BTreeMap::new();
    for view in services {
        let (name, port) = view.service.rsplit_once(':').unwrap_or((&view.service, ""));
        let name = name.strip_prefix(&*view.registry).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name);
        let ports = clusters.entry(&view.registry).or_default().entry(name).or_default();
        ports.entry(port).or_default().extend(nodes(view));
    }
    let cluster = |(id, endpoints): (&str, BTreeMap<&str, Ports<'_>>)| {
        let endpoints: Vec<Value> = endpoints
            .into_iter()
            .map(|(name, ports)| json!({ "name": name, "value": json!(ports).to_string() }))
            .collect();
        json!({ "id": id, "endpoints": endpoints })
    };
    clusters.into_iter().map(cluster).collect()
}

/// The hosts of nodes that are resolved.
fn names_of(discovery: &Discovery) -> Value {
    let name = |view: NameView| {
        json!({
            "name": view.name, "addresses": view.addresses, "age": view.age.map(|age| age.as_secs_f64()),
            "next": view.next.as_secs_f64(),
            "failure": view.failure.map(|(why, since)| json!({"why": why, "seconds": since.as_secs_f64()})),
        })
    };
    discovery.names().into_iter().map(name).collect()
}

/// Hides what opens doors: tokens and passwords, and those inside of URLs.
fn hide(value: &mut Value) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let secret = ["token", "password", "passwd", "secret", "access_key", "secret_key", "key"];
                if member.is_string() && secret.contains(&name.as_str()) {
                    *member = "***".into();
                } else {
                    hide(member);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(hide),
        Value::String(text) => {
            if let Some((scheme, rest)) = text.split_once("://")
                && let Some((_, host)) = rest.split_once('@')
            {
                *text = format!("{scheme}://***@{host}");
            }
        }
        _ => {}
    }
}

/// What of it is worth a metric.
pub(crate) fn collect(clusters: &[Named], discovery: &Discovery, out: &mut Exposition) {
    let discovered =
        || clusters.iter().filter(|(_, cluster)| !cluster.services().is_empty()).take(MAX_SERIES);
    if discovered().next().is_none() {
        return;
    }
    let now = SystemTime::now();
    let stale = |view: &ServiceView| match &view.freshness {
        Freshness::Stale { since, .. } => now.duration_since(*since).unwrap_or_default(),
        Freshness::Fresh | Freshness::Unknown => Duration::ZERO,
    };
    let mut services = discovery.services();
    services.sort_by_cached_key(|view| std::cmp::Reverse(stale(view)));
    services.truncate(MAX_SERIES);
    services.sort_by(|a, b| (&a.kind, &a.registry, &a.service).cmp(&(&b.kind, &b.registry, &b.service)));
    let labels = |view: &ServiceView| {
        [
            ("kind", view.kind.to_string()),
            ("registry", view.registry.to_string()),
            ("service", view.service.to_string()),
        ]
    };
    let mut family = |metric: &names::Metric, value: &dyn Fn(&ServiceView) -> f64| {
        out.family("", metric);
        let mut last = None;
        for view in &services {
            let labels = labels(view);
            // The same service with other arguments is told once.
            if last.replace(labels.clone()).is_some_and(|last| last == labels) {
                continue;
            }
            out.sample("", metric.name, labels.iter().map(|(name, text)| (*name, &**text)), value(view));
        }
    };
    family(&names::DISCOVERY_STALENESS, &|view| stale(view).as_secs_f64());
    family(&names::DISCOVERY_UPDATES_TOTAL, &|view| view.generation as f64);
    family(&names::DISCOVERY_ERRORS_TOTAL, &|view| view.errors as f64);
    out.family("", &names::DISCOVERY_ENDPOINTS);
    for (key, cluster) in discovered() {
        let endpoints = cluster.endpoints();
        for verdict in Verdict::ALL {
            let count = endpoints.iter().filter(|endpoint| endpoint.verdict == verdict).count();
            let labels = [("upstream", &**key), ("verdict", verdict.as_str())];
            out.sample("", names::DISCOVERY_ENDPOINTS.name, labels, count);
        }
    }
    out.family("", &names::DISCOVERY_ALARMS_TOTAL);
    for (name, alarms) in discovery.alarms().into_iter().take(MAX_SERIES) {
        out.sample("", names::DISCOVERY_ALARMS_TOTAL.name, [("upstream", &*name)], alarms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_opens_doors_is_hidden() {
        let mut config = json!({
            "servers": ["http://127.0.0.1:8500", "https://me:pass@consul:8501"], "token": "t",
            "client": {"token": "x", "token_file": "/run/token"}, "list": [{"password": "y", "weight": 1}],
        });
        hide(&mut config);
        assert_eq!(
            config,
            json!({
                "servers": ["http://127.0.0.1:8500", "https://***@consul:8501"], "token": "***",
                "client": {"token": "***", "token_file": "/run/token"}, "list": [{"password": "***", "weight": 1}],
            })
        );
    }
}
