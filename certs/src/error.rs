//! Why an `ssl` resource cannot be used: always with the id and the field, never with key material.

use std::fmt;
use std::sync::Arc;

use crate::signer::NotOffered;

/// One field of one `ssl` resource that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertError {
    /// The id of the `ssl` resource.
    pub id: Arc<str>,
    /// JSON pointer of the field inside the resource, as `/keys/0`.
    pub field: String,
    /// What is wrong with it.
    pub problem: Problem,
}

impl CertError {
    pub(crate) fn new(id: &Arc<str>, field: impl Into<String>, problem: Problem) -> Self {
        Self { id: id.clone(), field: field.into(), problem }
    }
}

impl fmt::Display for CertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ssl {}: {}: {}", self.id, self.field, self.problem)
    }
}

impl std::error::Error for CertError {}

/// What is wrong with a certificate, key or setting, and what is expected instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("no certificate and key are given; add `cert` and `key`")]
    NoCertificate,
    #[error("holds no PEM block `-----BEGIN CERTIFICATE-----`")]
    NoCertificateBlock,
    #[error("holds no PEM block of a private key (PKCS#8, PKCS#1 or SEC1, not encrypted)")]
    NoKeyBlock,
    #[error("is not valid PEM: {0}")]
    Pem(String),
    #[error("is not a usable certificate: {0}")]
    Certificate(String),
    #[error("is not a usable private key: {0}")]
    Key(String),
    #[error("does not belong to the certificate `{0}`: the public keys differ")]
    KeyMismatch(String),
    #[error("names the pool of signers `{pool}`, which is not configured; `postern.signers` has {known}")]
    UnknownPool { pool: String, known: String },
    #[error(transparent)]
    NotOffered(NotOffered),
    #[error("is no server name; write a host name, `*.example.com` or `*`")]
    ServerName,
    #[error("no server name is given; add `sni` or `snis`")]
    NoServerName,
    #[error("is not a usable certificate authority: {0}")]
    Authority(String),
    #[error("is not a regular expression that can be used here: {0}")]
    Regex(String),
    #[error("leaves no TLS version; use `TLSv1.2` or `TLSv1.3`")]
    NoProtocol,
    #[error("is no TLS version served here; use `TLSv1.2` or `TLSv1.3`")]
    UnknownProtocol,
    #[error("the cipher list leaves no suite for the TLS versions asked for: {0}")]
    NoSuite(String),
}
