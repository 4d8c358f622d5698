//! Upstreams: which node, over which connection, how often.

pub mod budget;
pub mod chash;
pub mod cluster;
pub(crate) mod connect;
pub mod endpoint;
pub mod ewma;
pub(crate) mod fields;
pub mod health;
pub mod least_conn;
pub mod picker;
pub mod priority;
pub mod random;
pub(crate) mod request_body;
pub mod round_robin;
pub mod tls_client;
pub mod tunnel;
