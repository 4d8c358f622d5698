//! Who gives certificates, and how it is asked. [`Directory`](super::Directory) is the real one.

use std::fmt;
use std::time::SystemTime;

use futures_util::future::BoxFuture;

use super::{Challenge, ChallengeKind};

/// Gives certificates for names that are shown to be ours.
pub trait Authority: Send + Sync + 'static {
    /// A certificate chain in PEM for a request. What has to be answered meanwhile goes to `present`, and is answered when
    /// that is done.
    fn obtain<'a>(&'a self, ask: Ask<'a>, present: &'a dyn Present)
    -> BoxFuture<'a, Result<String, Failure>>;

    /// When the authority wants a certificate renewed (RFC 9773); none if it does not tell.
    fn hints<'a>(&'a self, chain: &'a str) -> BoxFuture<'a, Result<Option<Hints>, Failure>>;
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    pub names: &'a [String],
    /// PKCS #10 in DER.
    pub csr: &'a [u8],
    pub challenge: Option<ChallengeKind>,
    /// The chain in PEM of the certificate that this one is to replace.
    pub replaces: Option<&'a str>,
}

/// Sees to it that every replica answers.
pub trait Present: Send + Sync {
    fn present(&self, challenges: Vec<Challenge>) -> BoxFuture<'_, Result<(), Failure>>;
}

/// When a certificate is to be renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hints {
    pub start: SystemTime,
    pub end: SystemTime,
    /// When to ask again.
    pub again: SystemTime,
}

/// There is no certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub reason: String,
    /// Whether the authority has seen the order and counts it.
    pub counts: bool,
    /// Not before this, says the authority.
    pub not_before: Option<SystemTime>,
    /// Somebody else orders now.
    pub lost: bool,
}

impl Failure {
    /// The authority did not hear of it, or did not think about it.
    #[must_use]
    pub fn unreached(reason: impl fmt::Display) -> Self {
        Self { reason: reason.to_string(), counts: false, not_before: None, lost: false }
    }

    /// The authority refuses.
    #[must_use]
    pub fn refused(reason: impl fmt::Display) -> Self {
        Self { counts: true, ..Self::unreached(reason) }
    }

    /// The order is somebody else's by now.
    #[must_use]
    pub fn lost() -> Self {
        Self { lost: true, ..Self::unreached("another instance has taken the order over") }
    }
}
