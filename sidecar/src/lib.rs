//! The sidecar: what stands beside an application and speaks for it in the mesh.
//!
//! Outbound it takes the application's connections, finds the service they mean, and carries requests and bytes there;
//! inbound it takes those of other sidecars and hands them to the application. Requests pass the very same layers as at the
//! edge; what is here tells them where a connection goes. The two directions have workers of their own, because the
//! outbound ones work longer when the sidecar ends.

pub mod admin;
pub mod app;
pub mod applications;
pub mod authorize;
pub mod capture;
pub mod captured;
pub mod client_cert;
pub mod connect;
pub mod connection_log;
pub mod connections;
#[cfg(test)]
mod documented;
pub mod door;
mod drain;
pub mod egress;
pub mod inbound;
pub mod listeners;
pub mod live;
mod lookup;
pub mod matcher;
pub mod outbound;
pub mod pages;
pub mod policy;
pub mod probes;
mod recent;
pub mod running;
pub mod services;
pub mod snapshot;
pub mod socks5;
pub mod speaks;
mod stack;
#[cfg(test)]
mod testing;
pub mod tokens;
pub mod tunnels;
