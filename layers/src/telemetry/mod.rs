//! What the gateway tells of itself.

pub mod log_file;
pub mod metrics;
pub mod time;
