//! The stacks of both directions, outermost layer first: the layers of the edge, with the lookup and the authorization of a
//! sidecar.

use std::rc::Rc;
use std::sync::Arc;

use certs::mesh::MeshIdentity;
use ipnet::IpNet;
use layers::HttpService;
use layers::chain::PluginChain;
use layers::http::access_log::{AccessLog, AccessLogLayer};
use layers::http::forwarded::{ForwardedLayer, Forwarding};
use layers::http::in_flight::{InFlightCount, InFlightLayer};
use layers::http::metrics::MetricsLayer;
use layers::http::normalize::Options;
use layers::http::recover::RecoverLayer;
use layers::http::sanitize::{Limits, SanitizeLayer};
use layers::stack::Stack;
use layers::telemetry::metrics::Metrics;
use tokio::runtime::Handle;
use tower::layer::layer_fn;

use crate::authorize::AuthorizeLayer;
use crate::client_cert::ClientCertLayer;
use crate::door::SideDoor;
use crate::live::Live;
use crate::lookup::LookupLayer;

/// What the stacks of all workers are made with.
#[derive(Clone)]
pub struct Settings {
    /// Access log, if there is one.
    pub access_log: Option<AccessLog>,
    /// Requests at work.
    pub in_flight: InFlightCount,
    /// The most of them, in all workers of one direction.
    pub in_flight_limit: usize,
    /// Shared metrics.
    pub metrics: Arc<Metrics>,
}

/// Applications have limits of their own; these only keep the sidecar from harm.
const LIMITS: Limits = Limits { uri: 16 * 1024, header_count: 256, header_bytes: 64 * 1024, body: None };

/// Paths are what they are to the application, but for what two readers could understand differently.
const PATHS: Options = Options { keep_encoded_slash: true, servlet: false, delete_tail_slash: false };

/// The stack of one worker around `upstream`, for requests to the application.
pub fn inbound<S: HttpService>(
    settings: &Settings,
    live: &Rc<Live>,
    mesh: &MeshIdentity,
    control: Handle,
    lookup: LookupLayer,
    upstream: S,
) -> impl HttpService + use<S> {
    // Callers of the mesh say truly whom they ask for, and a plain caller could do so before there was a sidecar.
    let everybody: Vec<IpNet> = ["0.0.0.0/0", "::/0"].iter().filter_map(|net| net.parse().ok()).collect();
    let forwarding = Forwarding { trusted: everybody, real_ip: None, underscores: true };
    Stack::new()
        // A panic or an unanswered failure anywhere below becomes an answer.
        .push(RecoverLayer::new(None, settings.metrics.clone()))
        // Above everything that may refuse, so that refusals are logged too.
        .push(AccessLogLayer::new(settings.access_log.clone()))
        // Likewise for the count of refusals.
        .push(MetricsLayer::new(settings.metrics.clone()))
        // Before any work is spent on a request that there is no room for.
        .push(InFlightLayer::new(settings.in_flight.clone(), settings.in_flight_limit))
        // One form of host and path, before anything reads them.
        .push(SanitizeLayer::new(LIMITS, PATHS))
        // Whom the request has passed.
        .push(ForwardedLayer::new(forwarding))
        // The port decides where it goes, and the log hears of it also where it is refused.
        .push(lookup)
        // Who calls, by the certificate and by nothing that the request says.
        .push(ClientCertLayer::new(mesh.clone(), SideDoor::admission))
        // Nothing of the application is asked before the policies are.
        .push(AuthorizeLayer::new(live.clone(), SideDoor::admission, control))
        .push(layer_fn(PluginChain::new))
        .around(upstream)
}

/// The stack of one worker around `upstream`, for requests of the application.
pub fn outbound<S: HttpService>(
    settings: &Settings,
    lookup: LookupLayer,
    upstream: S,
) -> impl HttpService + use<S> {
    Stack::new()
        // A panic or an unanswered failure anywhere below becomes an answer.
        .push(RecoverLayer::new(None, settings.metrics.clone()))
        // Above everything that may refuse, so that refusals are logged too.
        .push(AccessLogLayer::new(settings.access_log.clone()))
        // Likewise for the count of refusals.
        .push(MetricsLayer::new(settings.metrics.clone()))
        // Before any work is spent on a request that there is no room for.
        .push(InFlightLayer::new(settings.in_flight.clone(), settings.in_flight_limit))
        // One form of host and path, before anything reads them. What the application says of its own clients stays.
        .push(SanitizeLayer::new(LIMITS, PATHS))
        // The service decides which plugins run.
        .push(lookup)
        .push(layer_fn(PluginChain::new))
        .around(upstream)
}
