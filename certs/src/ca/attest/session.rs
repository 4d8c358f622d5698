//! What an attestation gives: a short permission to sign, sealed, so that any replica that has the key takes it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Grant;
use crate::ca::seal::{SealError, Sealer};
use crate::identity::SpiffeId;

/// How long a session is good.
pub const LIFE: Duration = Duration::from_secs(300);
const PURPOSE: &str = "session";
/// Binds the key to its use; replicas have to have the same.
const SALT: [u8; 16] = *b"postern session1";

/// Seals and opens sessions.
#[derive(Debug)]
pub struct Sessions(Sealer);

/// Who somebody was found to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    pub identity: SpiffeId,
    #[serde(default)]
    pub dns_names: Vec<String>,
    /// In seconds.
    pub longest_ttl: Option<u64>,
    pub attestor: String,
    pub evidence: String,
    /// Seconds since 1970.
    pub expires: u64,
}

impl Session {
    /// For who has shown this.
    pub fn of(grant: Grant, now: SystemTime) -> Self {
        let expires = now.duration_since(UNIX_EPOCH).unwrap_or_default() + LIFE;
        Self {
            identity: grant.identity,
            dns_names: grant.dns_names,
            longest_ttl: grant.longest_ttl.map(|ttl| ttl.as_secs()),
            attestor: grant.attestor.to_owned(),
            evidence: grant.evidence,
            expires: expires.as_secs(),
        }
    }
}

impl Sessions {
    /// With a key made of the one that seals everything.
    ///
    /// # Errors
    /// The library fails.
    pub fn new(sealer: &Sealer) -> Result<Self, SealError> {
        sealer.derive("postern session", &SALT).map(Self)
    }

    /// A session for who has shown this.
    ///
    /// # Errors
    /// The library fails.
    pub fn open(&self, grant: Grant, now: SystemTime) -> Result<(String, Session), SealError> {
        let session = Session::of(grant, now);
        let text = serde_json::to_vec(&session).map_err(|_| SealError::Library)?;
        Ok((self.0.seal(PURPOSE, &text)?, session))
    }

    /// The session of a caller, if it is one and has not ended.
    pub fn read(&self, token: &[u8], now: SystemTime) -> Option<Session> {
        let opened = self.0.open(PURPOSE, std::str::from_utf8(token).ok()?).ok()?;
        let session: Session = serde_json::from_slice(&opened).ok()?;
        (now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() < session.expires).then_some(session)
    }
}
