//! The name, kind and meaning of every metric, in one place.
//!
//! Names of APISIX stand without their prefix, which `plugin_attr.prometheus.metric_prefix` may change; ours begin
//! with `postern_`. Labels come from the configuration, never from what clients send.

/// What a metric measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// As in a `# TYPE` line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it measures.
    pub kind: Kind,
    /// One sentence for people.
    pub help: &'static str,
}

macro_rules! metrics {
    ($(#[$doc:meta])* $list:ident: $($id:ident $kind:ident $name:literal $help:literal),* $(,)?) => {
        $(
            #[doc = $help]
            pub const $id: Metric = Metric { name: $name, kind: Kind::$kind, help: $help };
        )*
        $(#[$doc])*
        pub const $list: &[Metric] = &[$($id),*];
    };
}

metrics! {
    /// APISIX's metrics, without their prefix.
    APISIX:
    HTTP_STATUS Counter "http_status" "Answers by status code, route, service and consumer.",
    HTTP_LATENCY Histogram "http_latency" "Time of requests in milliseconds: the whole, the upstream's part and the gateway's.",
    BANDWIDTH Counter "bandwidth" "Bytes received from clients (ingress) and sent to them (egress).",
    HTTP_REQUESTS_TOTAL Counter "http_requests_total" "Requests received since the start.",
    CONNECTIONS Gauge "nginx_http_current_connections" "Client connections by state.",
    METRIC_ERRORS_TOTAL Counter "nginx_metric_errors_total" "Requests counted under the label value other because the limit on series was reached.",
    NODE_INFO Gauge "node_info" "Always 1; the labels tell the machine.",
    ETCD_REACHABLE Gauge "etcd_reachable" "Whether etcd answered last time: 1 or 0.",
    ETCD_MODIFY_INDEXES Gauge "etcd_modify_indexes" "Highest modification index in use, by kind of resource.",
    BATCH_PROCESS_ENTRIES Gauge "batch_process_entries" "Log entries that wait to be sent, by the name of their logger.",
    UPSTREAM_STATUS Gauge "upstream_status" "Whether health checks call a node healthy: 1 or 0.",
}

metrics! {
    /// Our own metrics.
    POSTERN:
    BUILD_INFO Gauge "postern_build_info" "Always 1; the labels tell the version.",
    CLIENT_CONNECTIONS Gauge "postern_connections" "Client connections by state.",
    CLIENT_CONNECTIONS_TOTAL Counter "postern_connections_total" "Client connections by what became of them at the door.",
    REQUESTS_IN_FLIGHT Gauge "postern_requests_in_flight" "Requests at work, until their answer has left.",
    REQUESTS_IN_FLIGHT_LIMIT Gauge "postern_requests_in_flight_limit" "Requests that may be at work at once; more are refused.",
    POLICY_DECISIONS_TOTAL Counter "postern_policy_decisions_total" "Decisions of a sidecar's policies by policy and verdict; audited ones have passed.",
    ANSWERS_TOTAL Counter "postern_gateway_answers_total" "Answers that the gateway itself gave, by reason.",
    PANICS_TOTAL Counter "postern_panics_total" "Panics that were caught while a request was handled.",
    MESH_HANDSHAKES_TOTAL Counter "postern_mesh_handshakes_total" "Handshakes with other sidecars, and connections that were refused before, by side and outcome.",
    MESH_PEERS_REFUSED_TOTAL Counter "postern_mesh_peers_refused_total" "Certificates of peers that were refused, by side and reason.",
    MESH_CONNECTIONS Gauge "postern_mesh_connections" "Connections of the application that are open, by direction.",
    MESH_TUNNELS_TOTAL Counter "postern_mesh_tunnels_total" "Tunnels to the application that were asked for, by what became of them.",
    MESH_CERTIFICATE_ENDS Gauge "postern_mesh_certificate_not_after_seconds" "When the certificate of this process ends, in seconds since 1970; 0 without one.",
    MESH_TRUST_GENERATION Gauge "postern_mesh_trust_generation" "Generation of the trust bundle in force; 0 without one.",
    MESH_RENEWALS_TOTAL Counter "postern_mesh_renewals_total" "Certificates that this process got from the authority of the mesh.",
    MESH_RENEWAL_FAILURES_TOTAL Counter "postern_mesh_renewal_failures_total" "Attempts to get a certificate that failed.",
    MESH_TRUST_FOLLOWED Gauge "postern_mesh_trust_followed" "Whether the stream of trust from the authority of the mesh is open: 0 or 1.",
    RETRIES_TOTAL Counter "postern_upstream_retries_total" "Further attempts to reach an upstream after a failed one.",
    RETRY_BUDGET_EXHAUSTED_TOTAL Counter "postern_retry_budget_exhausted_total" "Retries not made because the retry budget was used up.",
    BREAKER_HOSTS Gauge "postern_breaker_hosts" "Hosts of a route whose api-breaker is open or half-open.",
    NODE_BREAKER_STATE Gauge "postern_node_breaker_state" "State of a node's circuit breaker: 0 closed, 1 half-open, 2 open.",
    NODE_BREAKER_OPENED_TOTAL Counter "postern_node_breaker_opened_total" "How often a node's circuit breaker has opened.",
    MIRRORED_TOTAL Counter "postern_mirrored_requests_total" "Copies of requests made by proxy-mirror, by what became of them.",
    LOOKUP_ENTRIES Gauge "postern_lookup_entries" "Entries of a lookup table.",
    LOOKUP_ACTIVE_ENTRIES Gauge "postern_lookup_active_entries" "Entries of a lookup table that are in use and hold connections and probes.",
    LOOKUP_LIST_STALE_SINCE Gauge "postern_lookup_list_stale_since_seconds" "Since when the fetched list of a lookup table is not confirmed, in seconds since 1970; 0 while it is current.",
    LOOKUP_FETCHES_TOTAL Counter "postern_lookup_fetches_total" "Requests for the list of a lookup table, by outcome.",
    DISCOVERY_STALENESS Gauge "postern_discovery_staleness_seconds" "How long a registry has not confirmed what is known of a service; 0 while it does.",
    DISCOVERY_UPDATES_TOTAL Counter "postern_discovery_updates_total" "Changes of the instances of a service.",
    DISCOVERY_ERRORS_TOTAL Counter "postern_discovery_errors_total" "Questions about a service that a registry did not answer.",
    DISCOVERY_ENDPOINTS Gauge "postern_discovery_endpoints" "Endpoints of an upstream with services of registries, by whether they get requests.",
    DISCOVERY_ALARMS_TOTAL Counter "postern_discovery_alarms_total" "How often more endpoints of an upstream were taken away at once than its drop_limit allows.",
    UPSTREAM_PANIC Gauge "postern_upstream_panic" "Upstreams of which too few nodes are healthy: 1 while all of them are used, or none.",
    SIGNER_UP Gauge "postern_signer_up" "Whether a node of a pool of signers answers: 1 or 0.",
    SIGNER_SIGNATURE_SECONDS Histogram "postern_signer_signature_seconds" "Time until a node of a pool of signers has signed a handshake.",
    SIGNER_ERRORS_TOTAL Counter "postern_signer_errors_total" "Signatures that a node of a pool of signers did not give, by reason.",
    SIGNER_HANDSHAKES_TOTAL Counter "postern_signer_handshakes_total" "Handshakes that needed a signature of a pool of signers: signed, failed, or refused because too many waited.",
    SIGNER_FAILOVERS_TOTAL Counter "postern_signer_failovers_total" "How often another node of a pool of signers was asked because one had failed.",
    ACME_CERTIFICATES Gauge "postern_acme_certificates" "Certificates that an ACME authority gives, by state: valid, expired, ordering, failed, waiting.",
    ACME_CERTIFICATE_ENDS Gauge "postern_acme_certificate_not_after_seconds" "When a certificate of an ACME authority ends, in seconds since 1970, by its first name.",
    ACME_FAILURES Gauge "postern_acme_failures" "Orders that failed since the last certificate, by its first name.",
    ACME_ORDERS_TOTAL Counter "postern_acme_orders_total" "Orders of this process at an ACME authority, by result.",
    WARNINGS Gauge "postern_warnings" "What somebody should look at, as `/status/ready` tells it.",
    CONFIG_REVISION Gauge "postern_config_revision" "Revision of the configuration in use.",
    CONFIG_ITEMS Gauge "postern_config_items" "Resources in use, by kind.",
    CONFIG_REJECTED_ITEMS Gauge "postern_config_rejected_items" "Resources set aside because they are wrong, by kind.",
    CONFIG_STALE_SINCE Gauge "postern_config_stale_since_seconds" "When the contact to the configuration store was lost, in seconds since 1970; 0 while there is contact.",
    CONFIG_RELOADS_TOTAL Counter "postern_config_reloads_total" "Publications of a changed configuration.",
    LOG_ENTRIES_SENT_TOTAL Counter "postern_log_entries_sent_total" "Log entries that were sent, by plugin.",
    LOG_ENTRIES_DROPPED_TOTAL Counter "postern_log_entries_dropped_total" "Log entries that were lost, by plugin and reason.",
    LOG_MEMORY_BYTES Gauge "postern_log_memory_bytes" "Memory taken by log entries that wait and by bodies kept for them.",
    SERIES Gauge "postern_metric_series" "Label sets of the request metrics.",
    SERIES_LIMIT Gauge "postern_metric_series_limit" "Label sets that the request metrics may have.",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rules_of_prometheus() {
        for metric in POSTERN {
            assert!(metric.name.starts_with("postern_"), "{}", metric.name);
            let total = metric.name.ends_with("_total");
            assert_eq!(total, metric.kind == Kind::Counter, "{}: counters end in _total", metric.name);
        }
        for metric in APISIX.iter().chain(POSTERN) {
            assert!(metric.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{}", metric.name);
            assert!(metric.help.ends_with('.') && !metric.help.contains('\n'), "{}", metric.name);
        }
    }
}
