//! Telling registries that instances are about to stop.

use futures_util::future::join_all;
use serde::Serialize;

use crate::follow::Service;
use crate::source::{Instance, Query};
use crate::{Discovery, Node, Retire};

/// What a registry did about one instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Retired {
    /// The registry: its kind, its name where it has one, and the service.
    pub source: String,
    /// As the registry names it.
    pub instance: String,
    /// It is as it was asked for.
    pub done: bool,
    /// Why it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Discovery {
    /// Tells the registries that the instances of followed services for which `is_meant` holds are about to stop, or with
    /// `undo` that they are not. Registries that cannot be told are passed over.
    pub async fn retire(
        &self,
        is_meant: impl Fn(&str, &Node) -> bool,
        how: Retire,
        undo: bool,
    ) -> Vec<Retired> {
        self.retire_where(|_, query, node| is_meant(&query.service, node), how, undo).await
    }

    /// As [`retire`](Self::retire), by kind and query.
    pub(crate) async fn retire_where(
        &self,
        is_meant: impl Fn(&str, &Query, &Node) -> bool,
        how: Retire,
        undo: bool,
    ) -> Vec<Retired> {
        let mut asked = Vec::new();
        for service in self.followed() {
            let Some(source) = self.source_of(&service).filter(|source| source.retires()) else { continue };
            let state = service.state();
            let meant = state
                .instances
                .iter()
                .map(|held| &held.instance)
                .filter(|instance| is_meant(&service.kind, &service.query, &instance.node));
            for instance in meant {
                let (source, service, instance) = (source.clone(), service.clone(), instance.clone());
                asked.push(async move {
                    let answer = source.retire(&service.query, &instance, how, undo).await;
                    if answer.is_ok() && how == Retire::Deregister {
                        service.retired(&instance);
                    }
                    retired(&service, &instance, answer.err().map(|error| error.to_string()))
                });
            }
        }
        join_all(asked).await
    }
}

fn retired(service: &Service, instance: &Instance, why: Option<String>) -> Retired {
    Retired { source: service.to_string(), instance: instance.id.to_string(), done: why.is_none(), why }
}
