//! Layers that surround every request.

pub mod access_log;
pub mod acme_challenge;
pub mod forwarded;
pub mod in_flight;
pub mod metrics;
pub mod normalize;
pub mod recover;
pub mod sanitize;
