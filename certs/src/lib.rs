//! Certificates of the gateway: which one a server name gets, whom a client certificate is trusted
//! from, and the PEM files both come from. Nothing here knows HTTP, tower or a socket: the control
//! side builds immutable tables, the workers read them at each handshake.

mod error;
pub mod files;
pub mod sni;
pub mod unverified;
pub mod verify;

pub use error::{CertError, Problem};
pub use sni::{SniTable, SslEntry, SslObject};
