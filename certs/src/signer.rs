//! Keys that are somewhere else: a TLS server whose private key is held by nodes of `postern signer`, which sign its
//! handshakes over mTLS. [`Pool`] and [`RemoteKey`] are the side of the gateway, [`Service`] and [`KeyStore`] that of the
//! node. A node signs what a TLS server signs in a handshake and nothing else ([`transcript`]).

pub mod access;
mod journal;
mod key;
pub mod metrics;
pub mod node;
pub mod pool;
pub mod service;
pub mod store;
pub mod tls;
pub mod transcript;

#[cfg(test)]
mod tests;

/// The messages, made from the proto file.
#[allow(
    missing_docs,
    rust_2018_idioms,
    clippy::pedantic,
    clippy::nursery,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "made by tonic"
)]
pub mod proto {
    tonic::include_proto!("postern.signer.v1");
}

use std::fmt;
use std::sync::Arc;

pub use journal::Journal;
pub use key::{NotOffered, RemoteKey};
pub use pool::{Pool, Pools};
pub use service::Service;
pub use store::KeyStore;

/// Largest message of the protocol: a list of keys.
const LONGEST_MESSAGE: usize = 1 << 20;
/// Largest request for a signature: a handshake is a few hundred bytes.
const LONGEST_REQUEST: usize = 4096;

/// A key at the nodes of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyAddress {
    pub pool: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for KeyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "signer://{}/{}", self.pool, self.name)
    }
}

/// Whether keys may have this name.
#[must_use]
pub fn is_key_name(name: &str) -> bool {
    let clean = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=128).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(clean)
}
