//! Drains among the clients of discovery servers, which nobody else knows.
//!
//! A server is told of a drain again and again for as long as it lasts: it offers the nodes as draining until it has not
//! been told for a while. It answers which of its clients have not confirmed that they choose the nodes no more.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use futures_util::future::join_all;

use crate::rpc::proto;
use crate::{Discovery, Query, Retire, Retired};

/// Nodes as registries name them: what is not there is any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Named {
    /// An address or a name.
    pub host: Option<Arc<str>>,
    pub port: Option<u16>,
}

/// What is said of a drain.
#[derive(Clone, Debug)]
pub struct Notice {
    /// The same for as long as the drain lasts.
    pub id: String,
    /// All nodes of the services where there is none.
    pub nodes: Vec<Named>,
    /// What the registries of a server are told now.
    pub retire: Retire,
    /// The nodes are used again.
    pub over: bool,
    /// Clients that confirm by other ways.
    pub except: Vec<String>,
}

/// What a discovery server answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Where it is.
    pub server: String,
    /// It was there to be asked.
    pub answered: bool,
    /// What its registries did.
    pub retired: Vec<Retired>,
    /// Clients that may still use one of the nodes, with the reason.
    pub late: Vec<(String, String)>,
    /// How many there are besides.
    pub more: u64,
    /// Why nothing is certain yet.
    pub problem: Option<String>,
}

impl Notice {
    pub(crate) fn request(&self, services: Vec<proto::Service>) -> proto::DrainRequest {
        let node = |node: &Named| proto::Node {
            host: node.host.as_deref().unwrap_or_default().to_owned(),
            port: node.port.unwrap_or_default().into(),
        };
        proto::DrainRequest {
            id: self.id.clone(),
            services,
            nodes: self.nodes.iter().map(node).collect(),
            retire: proto::Retire::from(self.retire).into(),
            end: self.over,
            except: self.except.clone(),
        }
    }
}

impl Heard {
    pub(crate) fn new(server: &str, answer: Result<proto::DrainResponse, Arc<str>>) -> Self {
        let server = server.to_owned();
        let answer = match answer {
            Ok(answer) => answer,
            Err(reason) => return Self { server, problem: Some(reason.to_string()), ..Self::default() },
        };
        let text = |text: String| (!text.is_empty()).then_some(text);
        let retired = |one: proto::Retired| Retired {
            source: one.source,
            instance: one.instance,
            done: one.why.is_empty(),
            why: text(one.why),
        };
        let late = |one: proto::Late| {
            let name = if one.name.is_empty() { one.address } else { one.name };
            (name, one.why)
        };
        Self {
            server,
            answered: true,
            retired: answer.retired.into_iter().map(retired).collect(),
            late: answer.late.into_iter().map(late).collect(),
            more: answer.more,
            problem: text(answer.problem),
        }
    }
}

impl From<Retire> for proto::Retire {
    fn from(how: Retire) -> Self {
        match how {
            Retire::Keep => Self::Nothing,
            Retire::Deregister => Self::Deregister,
            Retire::Maintenance => Self::Maintenance,
        }
    }
}

impl From<proto::Retire> for Retire {
    fn from(how: proto::Retire) -> Self {
        match how {
            proto::Retire::Nothing => Self::Keep,
            proto::Retire::Deregister => Self::Deregister,
            proto::Retire::Maintenance => Self::Maintenance,
        }
    }
}

impl Discovery {
    /// Passes a notice on to every discovery server that one of the followed `services` is asked for at.
    pub async fn pass_on(&self, notice: &Notice, services: &HashSet<Arc<str>>) -> Vec<Heard> {
        let mut asked: BTreeMap<(Arc<str>, Arc<str>), Vec<Query>> = BTreeMap::new();
        for service in self.followed() {
            if services.contains(&service.query.service) {
                let place = (Arc::clone(&service.kind), Arc::clone(&service.registry));
                let queries = asked.entry(place).or_default();
                // Followed twice, where some are more careful with empty lists than others.
                if !queries.contains(&service.query) {
                    queries.push(service.query.clone());
                }
            }
        }
        let told = self.sources().iter().filter_map(|source| {
            let queries = asked.remove(&(source.kind().into(), source.name().into()))?;
            Some(async move { source.pass_on(notice, &queries).await })
        });
        join_all(told.collect::<Vec<_>>()).await.into_iter().flatten().collect()
    }
}
