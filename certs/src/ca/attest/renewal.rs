//! Proof by the current certificate: the handshake has shown that the caller has its key.
//!
//! It has to lead to a root of the bundle, or to one that was trusted and was not distrusted. For a recovery from an expired
//! root, the record may allow certificates that have ended not too long ago.

use std::time::{Duration, SystemTime};

use super::{Caller, Grant, Refusal};
use crate::ca::Current;
use crate::trust::{Peer, Trust, TrustError, Usage, VerifyError};
use crate::verify::{AltName, ClientIdentity};

/// The kind of this proof.
pub const KIND: &str = "renewal";

/// Judges what the caller showed.
///
/// # Errors
/// Why it proves nothing.
pub fn attest(caller: &Caller, current: &Current, now: SystemTime) -> Result<Grant, Refusal> {
    let peer = verify(caller, current, now).map_err(|error| Refusal::Proof(error.to_string()))?;
    let names = caller.chain.first().and_then(ClientIdentity::parse).map(|parsed| parsed.names);
    let dns_names = names.unwrap_or_default().into_iter().filter_map(|name| match name {
        AltName::Dns(name) => Some(name),
        _ => None,
    });
    Ok(Grant {
        identity: peer.id,
        dns_names: dns_names.collect(),
        longest_ttl: None,
        attestor: KIND,
        evidence: format!("certificate {}", peer.serial),
    })
}

/// Who showed a certificate in the handshake.
///
/// # Errors
/// Why nobody knows.
pub fn verify(caller: &Caller, current: &Current, now: SystemTime) -> Result<Peer, VerifyError> {
    let first = match current.trust().verify(&caller.chain, Usage::Client, now) {
        Ok(verified) => return Ok(verified.peer),
        Err(error) => error,
    };
    if !matches!(first, VerifyError::Expired | VerifyError::UnknownIssuer) {
        return Err(first);
    }
    let Ok(wide) = everything(current) else { return Err(first) };
    match wide.verify(&caller.chain, Usage::Client, now) {
        Err(VerifyError::Expired) if !current.renew_expired.is_zero() => {
            // As it was judged at its end.
            let leaf = Peer::read(caller.chain.first().ok_or(VerifyError::NoCertificate)?)?;
            let since = now.duration_since(leaf.not_after).unwrap_or_default();
            if since > current.renew_expired {
                return Err(VerifyError::Expired);
            }
            let end = leaf.not_after - Duration::from_secs(1);
            wide.verify(&caller.chain, Usage::Client, end.min(now)).map(|verified| verified.peer)
        }
        judged => judged.map(|verified| verified.peer),
    }
}

/// With roots that are in no bundle any more.
fn everything(current: &Current) -> Result<Trust, TrustError> {
    current.bundle().trust()?.with_roots(&current.bundle().trust_domain, current.former_roots.iter().cloned())
}
