//! The whole HTTP stack of a worker, outermost layer first.

use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwap;
use certs::SniTable;
use http::HeaderValue;
use layers::HttpService;
use layers::chain::PluginChain;
use layers::http::access_log::{AccessLog, AccessLogLayer};
use layers::http::acme_challenge::{AcmeChallengeLayer, Pending};
use layers::http::forwarded::ForwardedLayer;
use layers::http::in_flight::{InFlightCount, InFlightLayer};
use layers::http::metrics::MetricsLayer;
use layers::http::recover::RecoverLayer;
use layers::http::sanitize::SanitizeLayer;
use layers::stack::Stack;
use layers::telemetry::metrics::Metrics;
use layers::worker::view::View;
use tower::layer::layer_fn;

use crate::explain::Rules;
use crate::lookup::LookupLayer;
use crate::snapshot::Snapshot;

/// What the stacks of all workers are made with.
#[derive(Clone)]
pub struct Settings {
    /// The `Server` field; none leaves the upstream's.
    pub server: Option<HeaderValue>,
    /// Access log, if it is on.
    pub access_log: Option<AccessLog>,
    /// Requests at work.
    pub in_flight: InFlightCount,
    /// The most of them, in all workers together.
    pub in_flight_limit: usize,
    /// Limits, the form of paths, and who is trusted.
    pub rules: Rules,
    /// The most of a body that routes look into, in bytes.
    pub readable_body: usize,
    /// Shared metrics.
    pub metrics: Arc<Metrics>,
    /// Server certificates, which say for which hosts a client certificate is asked.
    pub certificates: Arc<ArcSwap<SniTable>>,
    /// What ACME authorities ask for by HTTP at this moment.
    pub challenges: Pending,
}

/// The stack of one worker around `upstream`.
pub fn build<S: HttpService>(
    settings: &Settings,
    view: Rc<View<Snapshot>>,
    upstream: S,
) -> impl HttpService + use<S> {
    Stack::new()
        // A panic or an unanswered failure anywhere below becomes an answer.
        .push(RecoverLayer::new(settings.server.clone(), settings.metrics.clone()))
        // Above everything that may refuse, so that refusals are logged too.
        .push(AccessLogLayer::new(settings.access_log.clone()))
        // Likewise for the count of refusals.
        .push(MetricsLayer::new(settings.metrics.clone()))
        // Before any work is spent on a request that there is no room for.
        .push(InFlightLayer::new(settings.in_flight.clone(), settings.in_flight_limit))
        // One form of host and path, before anything reads them.
        .push(SanitizeLayer::new(settings.rules.limits, settings.rules.paths))
        // Before any route or plugin, which may redirect or refuse; the authority that asks has no account here.
        .push(AcmeChallengeLayer::new(settings.challenges.clone()))
        // Who the client is, before routes and plugins ask.
        .push(ForwardedLayer::new(settings.rules.forwarding.clone()))
        // The route decides which plugins run.
        .push(LookupLayer::new(view, settings.certificates.clone(), settings.readable_body))
        .push(layer_fn(PluginChain::new))
        .around(upstream)
}
