//! What several plugins need: texts with captures, header rules, the consumer's marks on a request, URIs, Redis.
//! What several plugins need: texts with captures, header rules, the consumer's marks on a request, URIs, content
//! codings.

pub mod captures;
pub mod consumer;
pub mod encoding;
pub mod headers;
pub mod http_call;
pub mod json_path;
pub mod lists;
pub mod numbers;
#[cfg(test)]
pub(crate) mod peer;
pub mod redis;
pub mod reply;
pub mod request_body;
pub mod uri;
