//! What is remembered of one set of names, by all replicas together.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Challenge, Seconds};

/// One set of names at one authority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The authority's directory.
    pub directory: String,
    /// Sorted.
    pub names: Vec<String>,
    /// The last good one. It stays until there is a better one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Certificate>,
    /// Who orders now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<Work>,
    /// What went wrong since the last certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failed>,
    /// Somebody asked for a new one.
    #[serde(default)]
    pub asked: bool,
    /// When this was written.
    pub changed: Seconds,
}

/// A certificate and its key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// PEM, leaf first.
    pub chain: String,
    /// As [`Vault`](super::Vault) keeps it.
    pub key: String,
    pub not_before: Seconds,
    pub not_after: Seconds,
    /// When it came.
    pub obtained: Seconds,
    /// When the next one is to be ordered.
    pub renew: Seconds,
    /// When to ask the authority again when that should be; none if it does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hints: Option<Seconds>,
    /// Whether it has told, so that it knows the certificate.
    #[serde(default)]
    pub hinted: bool,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key may not be sealed.
        f.debug_struct("Certificate")
            .field("not_after", &self.not_after)
            .field("renew", &self.renew)
            .finish_non_exhaustive()
    }
}

/// An order that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// The instance that orders.
    pub by: String,
    /// After this it is taken for dead.
    pub until: Seconds,
    /// What all replicas have to answer meanwhile.
    #[serde(default)]
    pub challenges: Vec<Challenge>,
}

/// Orders that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// How many, one after another.
    pub count: u32,
    /// When the last one did.
    pub at: Seconds,
    /// When the next one is tried.
    pub next: Seconds,
    pub reason: String,
}

impl Record {
    /// For names that have nothing yet.
    pub fn new(directory: &str, names: &[String], now: Seconds) -> Self {
        Self {
            directory: directory.to_owned(),
            names: names.to_vec(),
            certificate: None,
            work: None,
            failed: None,
            asked: false,
            changed: now,
        }
    }

    /// The order that is under way and not given up.
    pub fn at_work(&self, now: Seconds) -> Option<&Work> {
        self.work.as_ref().filter(|work| work.until > now)
    }
}

/// Seconds since 1970; none for what is before.
pub(super) fn seconds(time: SystemTime) -> Seconds {
    time.duration_since(SystemTime::UNIX_EPOCH).as_ref().map_or(0, Duration::as_secs)
}
