//! The ways bytes reach a worker: listening sockets, the PROXY protocol, TLS, what their first bytes tell, and the framing
//! guard in front of the HTTP/1 engine. Nothing here knows a route or a plugin.

pub mod detect;
pub mod frames;
pub mod framing;
pub mod hbone;
pub(crate) mod join;
pub mod listen;
pub mod original_dst;
pub mod proxy_protocol;
pub mod tcp;
mod tls_remote;
pub mod tls_server;
