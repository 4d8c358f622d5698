//! The SPIFFE Workload API over a Unix socket: [`server`] hands this process's identity to local applications, [`client`]
//! takes the identity of this process from an agent such as SPIRE's.
//!
//! X.509-SVIDs and bundles; no JWT-SVIDs. Both ends follow changes by an open stream.

pub mod client;
pub mod server;
#[cfg(test)]
mod tests;

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{IdentityError, TrustDomain};

pub use client::WorkloadApi;
pub use server::{Serving, Settings};

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
pub(crate) mod proto {
    tonic::include_proto!("_");
}

/// The metadata that every call has to carry, with the value `true`.
const HEADER: &str = "workload.spiffe.io";
/// Where a process finds the socket when nobody tells it.
pub const SOCKET_VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";
/// More certificates than any chain or bundle has.
const MAX_CERTIFICATES: usize = 1024;

/// Certificates one behind the other.
fn joined<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> Vec<u8> {
    certificates.into_iter().flat_map(|certificate| certificate.iter().copied()).collect()
}

/// The same taken apart.
fn parted(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        if certificates.len() == MAX_CERTIFICATES {
            return Err(format!("more than {MAX_CERTIFICATES} certificates"));
        }
        let (rest, _) = X509Certificate::from_der(der)
            .map_err(|error| format!("certificate {} is no DER: {error}", certificates.len()))?;
        let length = der.len() - rest.len();
        let one = der.get(..length).unwrap_or_default();
        certificates.push(CertificateDer::from(one.to_vec()));
        der = rest;
    }
    Ok(certificates)
}

/// How a trust domain is written in these messages.
fn written(domain: &TrustDomain) -> String {
    format!("spiffe://{domain}")
}

/// Reads a trust domain with or without its scheme.
fn domain(text: &str) -> Result<TrustDomain, IdentityError> {
    text.strip_prefix("spiffe://").unwrap_or(text).parse()
}
