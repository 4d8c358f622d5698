//! What tests of this crate need.

use std::time::{Duration, SystemTime};

use certs::trust::{Fingerprint, HexId, Peer};

/// A caller of that identity.
pub(crate) fn peer(identity: &str) -> Peer {
    let now = SystemTime::now();
    Peer {
        id: identity.parse().unwrap(),
        serial: HexId::new(identity.as_bytes()),
        not_before: now,
        not_after: now + Duration::from_secs(3600),
        issuer: HexId::new(b"issuer"),
        hash: Fingerprint::of(identity.as_bytes()),
    }
}
