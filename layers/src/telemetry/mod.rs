//! What the gateway tells of itself.

pub mod counter;
pub mod error_log;
pub mod exposition;
pub mod log_file;
pub mod log_shipping;
pub mod metrics;
pub mod names;
pub mod requests;
pub mod time;
