//! Upstreams: which node, which connection, how often.

pub mod cluster;
