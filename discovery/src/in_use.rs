//! Knowing that what a registry said has reached those who pick endpoints.
//!
//! A state of a service is in use when nothing is kept in spite of it, every target that the service is a part of has been
//! made with it, and whoever watches the target has signed for what came of that.

use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::follow::Service;
use crate::source::Query;
use crate::watched::Watched;
use crate::{Discovery, Inner};

/// How often it is looked at. Changes are collected for a tenth of a second before they are used.
const PACE: Duration = Duration::from_millis(20);

/// A discovery that may be gone: for what it holds itself.
#[derive(Clone, Debug)]
pub struct WeakDiscovery(Weak<Inner>);

impl WeakDiscovery {
    pub fn upgrade(&self) -> Option<Discovery> {
        self.0.upgrade().map(Discovery)
    }
}

impl Discovery {
    /// A handle that does not keep it.
    pub fn downgrade(&self) -> WeakDiscovery {
        WeakDiscovery(Arc::downgrade(&self.0))
    }

    /// Waits until everything that is known of the service now is used by all who watch it. That may take as long as
    /// something is kept in spite of what its registry says.
    pub async fn used(&self, kind: &str, query: &Query) {
        let services = self.0.followers.named(kind, query);
        let is_plain = |service: &Arc<Service>| service.is_unused() || service.keeps_nothing();
        while !services.iter().all(is_plain) {
            tokio::time::sleep(PACE).await;
        }
        let wanted: Vec<(Arc<Service>, u64)> =
            services.into_iter().map(|service| (Arc::clone(&service), service.state().generation)).collect();
        let is_part = |watched: &Watched, service| watched.services().any(|own| Arc::ptr_eq(own, service));
        for watched in self.targets() {
            for (service, generation) in wanted.iter().filter(|(service, _)| is_part(&watched, service)) {
                while !watched.is_in_use(service, *generation) {
                    tokio::time::sleep(PACE).await;
                }
            }
        }
    }
}
