//! The kit for the tests that speak to a running `postern` over real sockets.
//!
//! [`Edge`] writes a configuration into a directory of its own, starts the binary, waits until it is ready
//! and ends it when dropped. [`origin`] holds the upstreams, one oddity per file; [`client`] the clients, from
//! raw bytes to HTTP/2; [`certs`], [`consul`], [`etcd`] and [`nginx`] what the tests need besides. Everything listens on
//! ports of its own (see [`ports`]), so that tests run side by side.

pub mod busy;
pub mod ca;
pub mod caller;
pub mod certs;
pub mod client;
pub mod clock;
pub mod compat;
pub mod consul;
pub mod discovery_server;
pub mod dnsmasq;
pub mod edge;
pub mod etcd;
pub mod eureka;
pub mod eventually;
pub mod frames;
pub mod golden;
pub mod kafka;
pub mod kube;
pub mod load;
pub mod machine;
pub mod malformed;
pub mod memory;
pub mod nacos;
pub mod namespace;
pub mod nginx;
pub mod node;
pub mod oidc;
pub mod origin;
pub mod pebble;
pub mod ports;
mod process;
pub mod redis;
pub mod registry;
pub mod sidecar;
pub mod signer;
pub mod sink;
pub mod vault;

pub use client::{Answer, Outcome};
pub use edge::{ADMIN_KEY, Edge, EdgeBuilder};
pub use eventually::{eventually, eventually_within};
pub use serde_json::{Value, json};
