//! Why the gateway itself answers a request, in one place.
//!
//! Every answer that does not come from an upstream has a [`Reason`]: its code stands in the access log, in the
//! metrics and in the `Proxy-Status` field (RFC 9209) of the response. Only `rescue.rs` turns errors into responses.

use std::borrow::Cow;
use std::fmt;

use http::StatusCode;

use crate::body::BodyError;
use crate::exchange::Exchange;

/// Who has to act for the failure to go away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The request is wrong, or the client went away.
    Client,
    /// The gateway's configuration, limits or code.
    Gateway,
    /// The upstream or the way to it.
    Upstream,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident $code:literal $status:literal $blame:ident $proxy_status:literal),* $(,)?) => {
        /// Why the gateway answered by itself.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $name),* }

        impl Reason {
            /// All reasons, for documentation and metrics.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The short code in the access log and in `Proxy-Status` details.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code),* }
            }

            /// The status that is sent unless the configuration says otherwise.
            pub fn status(self) -> StatusCode {
                let code: u16 = match self { $(Self::$name => $status),* };
                StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
            }

            /// Who has to act.
            pub const fn blame(self) -> Blame {
                match self { $(Self::$name => Blame::$blame),* }
            }

            /// The `error` parameter of `Proxy-Status`: a registered type of RFC 9209, section 2.3.
            pub const fn proxy_status(self) -> &'static str {
                match self { $(Self::$name => $proxy_status),* }
            }
        }
    };
}

reasons! {
    /// No route matches.
    RouteNotFound "route_not_found" 404 Client "destination_not_found",
    /// The matched route names a service that does not exist.
    ServiceNotFound "service_not_found" 404 Gateway "proxy_configuration_error",
    /// The matched route was set aside because a part of its configuration is refused.
    RouteRefused "route_refused" 503 Gateway "proxy_configuration_error",
    /// The recognised consumer was set aside because its group or a plugin of it is missing or refused.
    ConsumerRefused "consumer_refused" 503 Gateway "proxy_configuration_error",
    /// The answer to an ACME authority that gives a certificate.
    AcmeChallenge "acme_challenge" 200 Gateway "http_request_denied",
    /// A plugin answered.
    Plugin "plugin" 403 Gateway "http_request_denied",
    /// An authorization policy of the sidecar does not allow the request.
    PolicyDenied "policy_denied" 403 Client "http_request_denied",
    /// The sidecar's policies have not come yet, and until then nothing is allowed.
    PolicyPending "policy_pending" 403 Gateway "http_request_denied",
    /// The token that the request shows is not good.
    TokenRefused "token_refused" 401 Client "http_request_denied",
    /// The sidecar's egress policy does not allow the destination.
    EgressDenied "egress_denied" 403 Client "destination_ip_prohibited",
    /// A plugin failed where it may not let the request pass.
    PluginFailed "plugin_failed" 500 Gateway "proxy_internal_error",
    /// The destination is the sidecar itself: what is sent there would come back for ever.
    Loop "loop" 508 Client "proxy_loop_detected",
    /// The URI cannot be normalised, or has bytes that are never forwarded.
    BadUri "bad_uri" 400 Client "http_request_error",
    /// The request has no valid host, or two that disagree.
    BadHost "bad_host" 400 Client "http_request_error",
    /// The framing of the request is ambiguous or broken.
    BadRequest "bad_request" 400 Client "http_request_error",
    /// The URI is longer than allowed.
    UriTooLong "uri_too_long" 414 Client "http_request_error",
    /// The header section is larger than allowed.
    HeadersTooLarge "headers_too_large" 431 Client "http_request_error",
    /// The body is larger than allowed.
    BodyTooLarge "body_too_large" 413 Client "http_request_error",
    /// The method is never forwarded.
    MethodNotAllowed "method_not_allowed" 405 Client "http_request_denied",
    /// The method or protocol switch is not offered.
    NotImplemented "not_implemented" 501 Client "http_request_error",
    /// The host belongs to another TLS server name that asks for a client certificate.
    Misdirected "misdirected" 421 Client "http_request_denied",
    /// A client certificate is required.
    ClientCertificateRequired "client_certificate_required" 400 Client "http_request_denied",
    /// The request took the client too long to send.
    RequestTimeout "request_timeout" 408 Client "http_request_error",
    /// The client closed the connection before the answer was complete.
    ClientClosed "client_closed" 499 Client "connection_terminated",
    /// More requests are in flight than allowed.
    Overloaded "overloaded" 503 Gateway "connection_limit_reached",
    /// The matched route has no upstream.
    NoUpstream "no_upstream" 503 Gateway "proxy_configuration_error",
    /// The lookup table has no entry for the request's key.
    LookupUnknown "lookup_unknown" 404 Client "destination_not_found",
    /// The lookup table is not there, or its list has not been fetched yet, and no entry of it fits.
    LookupNotReady "lookup_not_ready" 503 Gateway "destination_unavailable",
    /// The entry of the lookup table was set aside because it is wrong.
    LookupRefused "lookup_refused" 503 Gateway "proxy_configuration_error",
    /// The upstream that the route names does not exist.
    UpstreamMissing "upstream_missing" 502 Gateway "proxy_configuration_error",
    /// The upstream has no nodes.
    NoNodes "no_nodes" 503 Gateway "destination_unavailable",
    /// Every node was tried or is unhealthy, and the upstream does not use unhealthy nodes.
    NoHealthyNode "no_healthy_node" 502 Upstream "destination_unavailable",
    /// The breaker of every node that could be tried is open.
    BreakerOpen "breaker_open" 503 Upstream "destination_unavailable",
    /// No node's name could be resolved.
    DnsFailed "dns_failed" 503 Upstream "dns_error",
    /// The registry of the upstream's service has not answered yet.
    DiscoveryPending "discovery_pending" 503 Upstream "destination_unavailable",
    /// The registry of the upstream's service cannot be asked, and nothing is known of the service from before.
    DiscoveryFailed "discovery_failed" 503 Upstream "destination_unavailable",
    /// The connection was refused or the host is unreachable.
    ConnectFailed "connect_failed" 502 Upstream "connection_refused",
    /// The connection was not established in time.
    ConnectTimeout "connect_timeout" 504 Upstream "connection_timeout",
    /// TLS to the upstream failed.
    TlsFailed "tls_failed" 502 Upstream "tls_protocol_error",
    /// The upstream's certificate was not accepted.
    TlsCertificate "tls_certificate" 502 Upstream "tls_certificate_error",
    /// The upstream is of the mesh, and this process has no identity or trusts nobody yet.
    NoMeshIdentity "no_mesh_identity" 503 Gateway "proxy_configuration_error",
    /// The node of the mesh is not who is expected there, or its certificate was not accepted.
    MeshPeer "mesh_peer" 502 Upstream "tls_certificate_error",
    /// The node of the mesh does not accept our certificate.
    MeshRefused "mesh_refused" 502 Upstream "tls_certificate_error",
    /// The upstream closed the connection before it answered.
    UpstreamClosed "upstream_closed" 502 Upstream "connection_terminated",
    /// The upstream's answer is malformed.
    UpstreamProtocol "upstream_protocol" 502 Upstream "http_protocol_error",
    /// The upstream did not take the request in time.
    SendTimeout "send_timeout" 504 Upstream "connection_write_timeout",
    /// The upstream did not answer in time.
    ReadTimeout "read_timeout" 504 Upstream "http_response_timeout",
    /// `retry_timeout` ended before a node answered.
    RetryTimeout "retry_timeout" 504 Upstream "http_response_timeout",
    /// The client's body failed while it was forwarded.
    RequestBody "request_body" 400 Client "http_request_error",
    /// A defect of the gateway, caught.
    Internal "internal" 500 Gateway "proxy_internal_error",
}

/// A failure on the request path.
#[derive(Debug)]
pub struct Error {
    reason: Reason,
    retryable: bool,
    detail: Option<Cow<'static, str>>,
    source: Option<BodyError>,
}

impl Error {
    /// A failure that may not be tried again on another node.
    pub fn new(reason: Reason) -> Self {
        Self { reason, retryable: false, detail: None, source: None }
    }

    /// The failure may be tried again: nothing that is unsafe to repeat has reached the upstream.
    #[must_use]
    pub fn retryable(mut self, retryable: bool) -> Self {
        self.retryable = retryable;
        self
    }

    /// Adds words for the log. They are never sent to the client.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<BodyError>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The words for the log.
    pub fn detail_text(&self) -> Option<&str> {
        self.detail.as_deref()
    }

    /// Whether another node may be tried.
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.code())?;
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        let mut cause: Option<&dyn std::error::Error> = self.source.as_ref().map(|s| &**s as _);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<Reason> for Error {
    fn from(reason: Reason) -> Self {
        Self::new(reason)
    }
}

/// The error of every layer: the failure, and the exchange it belongs to, so that it can still be answered and
/// logged.
pub struct Fault {
    /// The exchange as far as it came.
    pub exchange: Exchange,
    /// What failed.
    pub error: Error,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.error, f)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for Fault {}
