//! The ways bytes reach a worker: listening sockets, the PROXY protocol, TLS, and the framing guard in front of the
//! HTTP/1 engine. Nothing here knows a route or a plugin.

pub mod frames;
pub mod framing;
pub(crate) mod join;
pub mod listen;
pub mod proxy_protocol;
pub mod tls_server;
