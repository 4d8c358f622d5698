//! Nacos as a registry, by version 1 of its HTTP API, which its versions 1 and 2 have.
//!
//! A service is asked for every `fetch_interval` at one of the hosts. All its instances are listed: those that Nacos finds
//! unhealthy as such, those that are disabled as draining. The token of a login is shared by everybody who asks.
//! `discovery_args`: `namespace_id`, `group_name` as in APISIX, and `clusters`, several of them separated by commas.

mod access;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use access::Access;
use config::discovery::nacos::Nacos as Settings;
use futures_util::future::BoxFuture;
use http::StatusCode;
use serde::Deserialize;

use crate::Node;
use crate::http::{Options, Question, Server, Tls};
use crate::poll::{JSON, Polled, escape};
use crate::source::{Details, Health, Instance, Listing, Query, Source, SourceError, Watcher};

/// The arguments there are.
const ARGS: [&str; 3] = ["namespace_id", "group_name", "clusters"];

/// The hosts of one Nacos.
#[derive(Clone, Debug)]
pub struct Nacos(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    servers: Vec<Arc<Server>>,
    settings: Settings,
    interval: Duration,
    access: Access,
}

impl Nacos {
    /// # Errors
    /// A host is not a URL, or a file of TLS cannot be used. Says which.
    pub fn new(settings: &Settings) -> Result<Self, String> {
        Self::asked_every(settings.interval(), settings)
    }

    /// As [`new`](Self::new), with another time between two questions: tests have less patience than settings can say.
    ///
    /// # Errors
    /// The same.
    pub fn asked_every(interval: Duration, settings: &Settings) -> Result<Self, String> {
        let (connect, tls) = (settings.timeout.connect(), Tls::from(&settings.tls));
        let options = Options { connect, tls, ..Options::default() };
        let hosts = || settings.hosts();
        let servers: Result<_, _> = hosts().map(|host| Server::new(&host.url, options.clone())).collect();
        let access = Access::new(hosts().map(|host| host.credentials).collect(), settings.key());
        let (servers, settings) = (servers?, settings.clone());
        Ok(Self(Arc::new(Shared { servers, settings, interval, access })))
    }
}

impl Source for Nacos {
    fn kind(&self) -> &'static str {
        "nacos"
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        if query.service.is_empty() {
            return Err("write the name of the service in Nacos".to_owned());
        }
        if let Some(name) = query.args.keys().find(|name| !ARGS.contains(&&***name)) {
            return Err(format!("`{name}` says nothing to Nacos; write one of {}", ARGS.join(", ")));
        }
        let arg = |name: &str, default: &str| -> Arc<str> {
            query.args.get(name).filter(|value| !value.is_empty()).map_or_else(|| default.into(), Arc::clone)
        };
        let (namespace, group) = (arg("namespace_id", "public"), arg("group_name", "DEFAULT_GROUP"));
        let mut target = format!(
            "/ns/instance/list?healthyOnly=false&serviceName={}&namespaceId={}&groupName={}",
            escape(&query.service),
            escape(&namespace),
            escape(&group),
        );
        if let Some(clusters) = query.args.get("clusters") {
            target.push_str(&format!("&clusters={}", escape(clusters)));
        }
        let signed = format!("{group}@@{}", query.service);
        Ok(Box::new(Service { nacos: self.clone(), polled: Polled::new(&self.0.servers), target, signed }))
    }
}

/// One service that is followed.
struct Service {
    nacos: Nacos,
    polled: Polled,
    target: String,
    /// What is signed behind the time.
    signed: String,
}

impl Watcher for Service {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(self.ask())
    }

    fn restart(&mut self) {}
}

impl Service {
    async fn ask(&mut self) -> Result<Listing, SourceError> {
        let shared = Arc::clone(&self.nacos.0);
        let limit = shared.settings.timeout.whole();
        let mut target = self.target.clone();
        shared.access.add(&mut target, &self.signed, &mut self.polled, limit).await?;
        let fields = [JSON];
        let question = Question { headers: &fields, ..Question::get(&target, limit) };
        let refused = |status| matches!(status, StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED);
        let answer = self.polled.ask(&question, refused).await?;
        if refused(answer.status) {
            shared.access.forget().await;
            return Err(self.polled.refuse(&answer));
        }
        let list: List = serde_json::from_slice(&answer.body).map_err(|error| self.polled.wrong(error))?;
        let instances = instances(list, shared.settings.weight.get());
        Ok(self.polled.listing(instances, shared.interval))
    }
}

#[derive(Deserialize)]
struct List {
    hosts: Vec<Host>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Host {
    ip: Arc<str>,
    port: u16,
    weight: Option<f64>,
    #[serde(default = "yes")]
    healthy: bool,
    #[serde(default = "yes")]
    enabled: bool,
    instance_id: Option<Arc<str>>,
    cluster_name: Option<Arc<str>>,
    #[serde(default)]
    metadata: BTreeMap<Arc<str>, Arc<str>>,
}

fn yes() -> bool {
    true
}

/// Weights of Nacos may have fractions. Where there is one, all of them grow a hundredfold.
fn instances(list: List, default_weight: u32) -> Vec<Instance> {
    let whole = list.hosts.iter().filter_map(|host| host.weight).all(|weight| weight.fract() == 0.0);
    let factor = if whole { 1.0 } else { 100.0 };
    let instance = |host: Host| {
        let weight = host.weight.unwrap_or(f64::from(default_weight)) * factor;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to what fits")]
        let weight = weight.round().clamp(0.0, 1e6) as u32;
        let id = host.instance_id.unwrap_or_else(|| format!("{}:{}", host.ip, host.port).into());
        let zone = host.metadata.get("zone").cloned().or(host.cluster_name);
        let (region, meta) = (host.metadata.get("region").cloned(), host.metadata);
        Instance {
            id,
            node: Node { host: host.ip, port: host.port, weight, priority: 0 },
            health: match (host.enabled, host.healthy) {
                (false, _) => Health::Draining,
                (true, false) => Health::Unhealthy,
                (true, true) => Health::Healthy,
            },
            details: Some(Arc::new(Details { region, zone, meta, ..Details::default() })),
        }
    };
    list.hosts.into_iter().map(instance).collect()
}

#[cfg(test)]
mod tests;
