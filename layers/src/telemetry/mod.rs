//! What the gateway tells of itself.

pub mod metrics;
pub mod time;
