//! Upstreams: which node, over which connection, how often.

pub mod breaker;
pub mod budget;
pub mod chash;
pub mod cluster;
pub(crate) mod connect;
pub mod drains;
pub mod endpoint;
pub mod ewma;
pub mod failover;
pub mod fields;
pub mod forward;
pub mod hbone;
pub mod health;
pub mod http1;
pub mod least_conn;
pub mod locality;
pub mod membership;
pub mod mesh;
pub mod opaque;
pub mod panic;
pub mod picker;
pub(crate) mod pool;
pub mod priority;
pub(crate) mod probe;
pub mod random;
pub(crate) mod request_body;
pub(crate) mod response_body;
pub mod round_robin;
pub(crate) mod send;
pub mod settings;
pub mod sticky;
pub mod tls_client;
pub(crate) mod tunnel;

pub use pool::Keepalive;
