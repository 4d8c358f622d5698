//! The plugins. One file each, registered by one word in the list below; nothing else in the workspace names them.

pub mod absent;
pub mod catalog;
pub mod docs;
#[cfg(test)]
mod layered;
pub mod pages;
#[cfg(test)]
mod refusals;
pub mod support;
pub mod wasm;

use std::sync::OnceLock;

pub use catalog::Catalog;
use layers::plugin::Registration;

/// Declares the module of every plugin and lists its registration.
macro_rules! plugins {
    ($($module:ident::$plugin:ident),* $(,)?) => {
        $(pub mod $module;)*

        fn all() -> Vec<Registration> {
            vec![$(Registration::of::<$module::$plugin>()),*]
        }
    };
}

plugins! {
    api_breaker::ApiBreaker,
    acl::Acl,
    attach_consumer_label::AttachConsumerLabel,
    basic_auth::BasicAuth,
    batch_requests::BatchRequests,
    body_transformer::BodyTransformer,
    brotli::Brotli,
    clickhouse_logger::ClickhouseLogger,
    client_control::ClientControl,
    consumer_restriction::ConsumerRestriction,
    cors::Cors,
    csrf::Csrf,
    data_mask::DataMask,
    echo::Echo,
    elasticsearch_logger::ElasticsearchLogger,
    error_log_logger::ErrorLogLogger,
    error_page::ErrorPage,
    fault_injection::FaultInjection,
    file_logger::FileLogger,
    forward_auth::ForwardAuth,
    grpc_transcode::GrpcTranscode,
    grpc_web::GrpcWeb,
    gzip::Gzip,
    hmac_auth::HmacAuth,
    http_logger::HttpLogger,
    ip_restriction::IpRestriction,
    jwt_auth::JwtAuth,
    jwt_issue::JwtIssue,
    kafka_logger::KafkaLogger,
    key_auth::KeyAuth,
    limit_conn::LimitConn,
    limit_count::LimitCount,
    limit_req::LimitReq,
    loggly::Loggly,
    loki_logger::LokiLogger,
    mocking::Mocking,
    multi_auth::MultiAuth,
    node_status::NodeStatus,
    opa::Opa,
    openid_connect::OpenidConnect,
    opentelemetry::OpenTelemetry,
    prometheus::Prometheus,
    proxy_buffering::ProxyBuffering,
    proxy_cache::ProxyCache,
    proxy_control::ProxyControl,
    proxy_mirror::ProxyMirror,
    proxy_rewrite::ProxyRewrite,
    public_api::PublicApi,
    real_ip::RealIp,
    redirect::Redirect,
    referer_restriction::RefererRestriction,
    request_id::RequestId,
    request_validation::RequestValidation,
    response_rewrite::ResponseRewrite,
    server_info::ServerInfo,
    skywalking::SkyWalking,
    skywalking_logger::SkywalkingLogger,
    splunk_hec_logging::SplunkHecLogging,
    syslog::Syslog,
    tcp_logger::TcpLogger,
    traffic_label::TrafficLabel,
    traffic_split::TrafficSplit,
    ua_restriction::UaRestriction,
    udp_logger::UdpLogger,
    upstream_lookup::UpstreamLookup,
    uri_blocker::UriBlocker,
    workflow::Workflow,
    zipkin::Zipkin,
}

/// Every plugin, by priority, the highest first, as they run.
pub fn registrations() -> &'static [Registration] {
    static ALL: OnceLock<Vec<Registration>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all = all();
        all.sort_by(|a, b| b.priority.cmp(&a.priority).then(a.name.cmp(b.name)));
        all
    })
}

/// The plugin in CONTRIBUTING.md compiles.
#[cfg(doctest)]
#[doc = include_str!("../../CONTRIBUTING.md")]
pub struct Contributing;
