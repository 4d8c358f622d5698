//! Layers that surround every request.

pub mod forwarded;
pub mod in_flight;
pub mod recover;
