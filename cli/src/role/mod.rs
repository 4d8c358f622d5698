//! Commands that run until they are told to stop.

pub mod ca;
pub mod discovery;
pub mod edge;
pub mod register;
mod sample;
pub mod sidecar;
pub mod signer;
pub mod up;
