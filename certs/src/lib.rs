//! Certificates. Of the edge: which one a server name gets, whom a client certificate is trusted from, and the PEM
//! files both come from. Of the mesh: SPIFFE identities, what a process shows and whom it believes. Nothing here knows
//! tower or requests: the control side builds immutable values, the workers read them at each handshake.

pub mod acme;
pub mod ca;
pub mod clock;
pub mod consul_connect;
mod error;
pub mod etcd;
pub mod files;
pub mod grpc;
pub mod http;
pub mod identity;
pub mod identity_files;
pub mod istio;
pub mod mesh;
pub mod outgoing;
pub mod renewing;
mod signatures;
pub mod signer;
pub mod sni;
pub mod source;
pub mod svid;
pub mod token;
pub mod trust;
pub mod unverified;
pub mod vault;
pub mod vault_pki;
pub mod verify;
pub mod workload;
pub mod workload_api;

pub use error::{CertError, Problem};
pub use sni::{SniTable, SslEntry, SslObject};

#[cfg(test)]
mod malformed_tests;
#[cfg(test)]
mod mesh_tests;
#[cfg(test)]
mod testing;
