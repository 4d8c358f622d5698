//! What several plugins need: texts with captures, header rules, credentials, the consumer's marks on a request, URIs,
//! calls of services, tokens, limits, Redis, content codings, log entries.

pub mod answers;
pub mod batch;
pub mod captures;
pub mod consumer;
pub mod credentials;
pub mod doubles;
pub mod encoding;
pub mod grpc;
pub mod headers;
pub mod http_call;
pub mod identity;
pub mod json_path;
pub mod jwk;
pub mod jwt;
pub mod kafka;
pub mod limiting;
pub mod lists;
pub mod log_entry;
pub mod log_http;
pub mod log_settings;
#[cfg(test)]
pub(crate) mod log_sink;
pub mod log_socket;
pub mod numbers;
#[cfg(test)]
pub(crate) mod peer;
pub mod redis;
pub mod reply;
pub mod request_body;
pub mod rfc5424;
pub mod seal;
pub mod signing;
pub mod trace;
pub mod uri;
