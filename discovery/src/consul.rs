//! Consul: the instances of a service by the health endpoint, with questions that wait for a change.
//!
//! Every one of `servers` is a cluster and a source of its own. `cluster.rs` has the rules of indexes and stale answers,
//! `entry.rs` what an answer means for an instance, `pulse.rs` how a cluster that is gone is noticed, `register.rs` what a
//! workload says of itself.

pub(crate) mod cluster;
mod entry;
pub(crate) mod known;
mod pulse;
pub mod register;

use std::borrow::Cow;
use std::sync::Arc;

use config::discovery::consul as settings;
use futures_util::future::BoxFuture;

use self::cluster::{Cluster, Poll, escape, manner};
use self::entry::{Entry, Reading};
use self::known::Known;
use self::register::Agent;
use crate::Node;
use crate::source::{Health, Instance, Listing, Query, Retire, Source, SourceError, Watcher};

/// A node that stands in comes after everything else.
pub(crate) const STAND_IN: i32 = -1_000_000;

/// What may follow the URL of a cluster in the name of a service that is meant there alone.
const PATHS: &[&str] = &["/v1/health/service/", "/v1/catalog/service/", "/"];

/// The clusters of `discovery.consul`.
///
/// # Errors
/// What of the settings cannot be used: a file, a token.
pub fn sources(settings: &settings::Consul) -> Result<Vec<Arc<dyn Source>>, String> {
    let settings = Arc::new(settings.clone());
    let manner = manner!(settings);
    let source = |server: &String| -> Result<Arc<dyn Source>, String> {
        Ok(Arc::new(Consul { cluster: Cluster::new(server, &manner)?, settings: Arc::clone(&settings) }))
    };
    settings.servers.iter().map(source).collect()
}

/// One cluster.
#[derive(Debug)]
struct Consul {
    cluster: Arc<Cluster>,
    settings: Arc<settings::Consul>,
}

impl Source for Consul {
    fn kind(&self) -> &'static str {
        "consul"
    }

    fn name(&self) -> &str {
        self.cluster.server.name()
    }

    fn serves(&self, query: &Query) -> bool {
        self.cluster.own(&query.service, PATHS).is_some()
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        let wanted = Wanted::of(query, &self.settings, &self.cluster)?;
        let reading = Reading {
            weight: self.settings.weight.get(),
            passing: wanted.passing,
            critical: self.settings.critical,
            tagged_address: self.settings.tagged_address.clone(),
            meta: self.settings.meta.clone(),
        };
        let stand_in = self.settings.default_service.as_ref().map(|node| stand_in(node, reading.weight));
        let path = format!("/v1/health/service/{}", escape(wanted.service));
        let poll = self.cluster.poll(&path, &wanted.parameters);
        Ok(Box::new(Watch { poll, reading, stand_in, known: Known::default() }))
    }

    fn retires(&self) -> bool {
        true
    }

    fn retire<'a>(
        &'a self,
        query: &'a Query,
        instance: &'a Instance,
        how: Retire,
        undo: bool,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move {
            let wanted = Wanted::of(query, &self.settings, &self.cluster).map_err(SourceError::new)?;
            let agent = Agent::of(Arc::clone(&self.cluster.server), self.cluster.read());
            agent.retire(wanted.service, &wanted.parameters, instance, how, undo).await
        })
    }
}

/// A query in Consul's terms.
struct Wanted<'a> {
    service: &'a str,
    parameters: Vec<(&'static str, Cow<'a, str>)>,
    passing: bool,
}

impl<'a> Wanted<'a> {
    fn of(query: &'a Query, settings: &'a settings::Consul, cluster: &Cluster) -> Result<Self, String> {
        let service = cluster.own(&query.service, PATHS).ok_or("the name is that of another cluster")?;
        if settings.skip_services.iter().any(|skipped| skipped == service) {
            return Err(format!("`{service}` is one of `skip_services` of `discovery.consul`"));
        }
        let (mut datacenter, mut namespace) = (settings.datacenter.as_deref(), settings.namespace.as_deref());
        let mut partition = settings.partition.as_deref();
        let mut filter = settings.filter.as_deref().map(Cow::Borrowed);
        let mut tags: Vec<&str> = settings.tags.iter().map(String::as_str).collect();
        let mut passing = settings.passing;
        for (name, value) in &query.args {
            match (&**name, &**value) {
                ("datacenter" | "dc", value) => datacenter = Some(value),
                ("namespace" | "ns", value) => namespace = Some(value),
                ("partition", value) => partition = Some(value),
                ("tag" | "tags", value) => tags.extend(value.split(',').filter(|tag| !tag.is_empty())),
                ("filter", value) => {
                    filter = Some(match filter {
                        Some(everywhere) => format!("({everywhere}) and ({value})").into(),
                        None => value.into(),
                    });
                }
                ("passing", "true") => passing = true,
                ("passing", "false") => passing = false,
                ("passing", other) => return Err(format!("`passing` is `{other}`: write true or false")),
                (other, _) => {
                    return Err(format!(
                        "Consul has no detail `{other}`: write datacenter, namespace, partition, tags, filter or passing"
                    ));
                }
            }
        }
        let mut parameters = Vec::new();
        parameters.extend(datacenter.map(|value| ("dc", value.into())));
        parameters.extend(namespace.map(|value| ("ns", value.into())));
        parameters.extend(partition.map(|value| ("partition", value.into())));
        parameters.extend(tags.into_iter().map(|tag| ("tag", tag.into())));
        parameters.extend(filter.map(|value| ("filter", value)));
        Ok(Self { service, parameters, passing })
    }
}

/// `default_service`, as an instance of every service.
pub(crate) fn stand_in(node: &settings::DefaultService, weight: u32) -> Instance {
    let port = u16::try_from(node.port.get()).unwrap_or_default();
    let node = Node { host: node.host.as_str().into(), port, weight, priority: STAND_IN };
    Instance { id: "default_service".into(), node, health: Health::Healthy, details: None }
}

/// Follows one service.
struct Watch {
    poll: Poll,
    reading: Reading,
    stand_in: Option<Instance>,
    known: Known,
}

impl Watcher for Watch {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(async move {
            let told = self.poll.next(|status| status.is_success()).await?;
            let entries: Vec<Entry<'_>> =
                serde_json::from_slice(&told.answer.body).map_err(|error| self.poll.unreadable(&error))?;
            let found = entries
                .iter()
                .map(|entry| (entry.id(), entry.service.create_index, entry.instance(&self.reading)));
            Ok(self.known.listing(&told, found, self.stand_in.as_ref()))
        })
    }

    fn restart(&mut self) {
        self.poll.restart();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn a_question_that_waits_is_small() {
        let settings: settings::Consul = config::typed::parse(&json!({"servers": ["http://a"]})).unwrap();
        let source = sources(&settings).unwrap().remove(0);
        let query = Query { service: "orders".into(), args: Default::default() };
        let mut watcher = source.open(&query).unwrap();
        let size = size_of_val(&*watcher.next());
        assert!(size <= 2048, "{size} bytes for each service that is followed");
    }

    #[test]
    fn details_that_consul_does_not_have_are_refused_with_advice() {
        let settings = json!({"servers": ["http://a"], "filter": "a == b", "skip_services": ["internal"]});
        let settings: settings::Consul = config::typed::parse(&settings).unwrap();
        let source = sources(&settings).unwrap().remove(0);
        for (service, name, value, advice) in [
            ("orders", "tags", "a,b", None),
            ("orders", "filter", "c == d", None),
            ("orders", "passing", "yes", Some("write true or false")),
            ("orders", "group_name", "g", Some("write datacenter,")),
            ("internal", "tags", "a", Some("skip_services")),
            ("http://a/v1/health/service/orders", "tags", "a", None),
            ("http://b/v1/health/service/orders", "tags", "a", Some("another cluster")),
        ] {
            let args = [(name.into(), value.into())].into();
            let refused = source.open(&Query { service: service.into(), args }).err();
            let fits = refused
                .as_deref()
                .map_or(advice.is_none(), |text| advice.is_some_and(|it| text.contains(it)));
            assert!(fits, "{service} {name}: {refused:?}");
        }
    }
}
