//! Eureka as a registry.
//!
//! An application is asked for every `fetch_interval` at one of the hosts, alone and not with all the others there are. An
//! instance that is not `UP` is listed as what it is: `OUT_OF_SERVICE` as draining, anything else as unhealthy. Eureka
//! answers from a cache of its own, so that a change may take half a minute to be seen.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::StatusCode;
use serde::Deserialize;
use serde_json::Value;

use config::discovery::eureka::Eureka as Settings;

use crate::http::{Options, Question, Server, Tls};
use crate::poll::{JSON, Polled, escape};
use crate::source::{Details, Health, Instance, Listing, Query, Source, SourceError, Watcher};
use crate::{Node, literal};

/// The hosts of one Eureka.
#[derive(Clone, Debug)]
pub struct Eureka {
    servers: Vec<Arc<Server>>,
    settings: Arc<Settings>,
    interval: Duration,
}

impl Eureka {
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
        let servers = settings.hosts().map(|host| Server::new(&host, options.clone()));
        let servers = servers.collect::<Result<_, _>>()?;
        Ok(Self { servers, settings: Arc::new(settings.clone()), interval })
    }
}

impl Source for Eureka {
    fn kind(&self) -> &'static str {
        "eureka"
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        if query.service.is_empty() {
            return Err("write the name of the application in Eureka".to_owned());
        }
        if let Some(name) = query.args.keys().next() {
            return Err(format!("`{name}` says nothing to Eureka: take it out of `discovery_args`"));
        }
        // Eureka keeps applications under their names in capitals.
        let target = format!("/apps/{}", escape(&query.service.to_uppercase()));
        let (settings, interval) = (Arc::clone(&self.settings), self.interval);
        Ok(Box::new(Application { settings, interval, polled: Polled::new(&self.servers), target }))
    }
}

/// One application that is followed.
struct Application {
    settings: Arc<Settings>,
    interval: Duration,
    polled: Polled,
    target: String,
}

impl Watcher for Application {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(self.ask())
    }

    fn restart(&mut self) {}
}

impl Application {
    async fn ask(&mut self) -> Result<Listing, SourceError> {
        let fields = [JSON];
        let question =
            Question { headers: &fields, ..Question::get(&self.target, self.settings.timeout.whole()) };
        // The last instance takes the application with it.
        let answer = self.polled.ask(&question, |status| status == StatusCode::NOT_FOUND).await?;
        let mut instances = Vec::new();
        if answer.status != StatusCode::NOT_FOUND {
            let body: Body =
                serde_json::from_slice(&answer.body).map_err(|error| self.polled.wrong(error))?;
            let written = match body.application.instance {
                OneOrMore::More(list) => list,
                OneOrMore::One(one) => vec![*one],
            };
            let weight = self.settings.weight();
            instances = written.into_iter().filter_map(|one| instance(one, weight)).collect();
        }
        Ok(self.polled.listing(instances, self.interval))
    }
}

#[derive(Deserialize)]
struct Body {
    application: Named,
}

#[derive(Deserialize)]
struct Named {
    instance: OneOrMore,
}

/// A list of one may be written without being a list.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    More(Vec<Written>),
    One(Box<Written>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    instance_id: Option<Arc<str>>,
    ip_addr: Arc<str>,
    status: String,
    #[serde(alias = "overriddenstatus")]
    overridden_status: Option<String>,
    port: Option<Port>,
    secure_port: Option<Port>,
    #[serde(default)]
    metadata: BTreeMap<Arc<str>, Value>,
}

#[derive(Deserialize)]
struct Port {
    #[serde(rename = "$")]
    number: Value,
    #[serde(rename = "@enabled")]
    enabled: Value,
}

impl Port {
    fn open(&self) -> Option<u16> {
        let enabled = self.enabled == Value::Bool(true) || self.enabled == "true";
        let number = || text(&self.number).parse().ok().filter(|port| *port > 0);
        enabled.then(number).flatten()
    }
}

/// Numbers may be written as text, and text as numbers.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// What can be connected to. The secure port comes first where both are open, as in APISIX.
fn instance(written: Written, default_weight: u32) -> Option<Instance> {
    let port = [&written.secure_port, &written.port].into_iter().flatten().find_map(Port::open)?;
    literal(&written.ip_addr)?;
    let overridden = written.overridden_status.filter(|status| status != "UNKNOWN");
    let health = match overridden.as_deref().unwrap_or(&written.status) {
        "UP" => Health::Healthy,
        "OUT_OF_SERVICE" => Health::Draining,
        _ => Health::Unhealthy,
    };
    // Beside what was registered stand names of classes: `@class`.
    let meta = written.metadata.iter().filter(|(name, _)| !name.starts_with('@'));
    let meta: BTreeMap<Arc<str>, Arc<str>> = meta.map(|(name, it)| (name.clone(), text(it).into())).collect();
    let weight = meta.get("weight").and_then(|weight| weight.parse().ok()).unwrap_or(default_weight);
    let (region, zone) = (meta.get("region").cloned(), meta.get("zone").cloned());
    Some(Instance {
        id: written.instance_id.unwrap_or_else(|| format!("{}:{port}", written.ip_addr).into()),
        node: Node { host: written.ip_addr, port, weight, priority: 0 },
        health,
        details: Some(Arc::new(Details { region, zone, meta, ..Details::default() })),
    })
}

#[cfg(test)]
mod tests;
