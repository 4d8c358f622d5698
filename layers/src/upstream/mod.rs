//! Upstreams: which node, over which connection, how often.

pub mod budget;
pub mod chash;
pub mod cluster;
pub mod endpoint;
pub mod ewma;
pub mod health;
pub mod least_conn;
pub mod picker;
pub mod priority;
pub mod random;
pub mod round_robin;
