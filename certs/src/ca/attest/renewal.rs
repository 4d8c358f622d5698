//! Proof by the current certificate: the handshake has shown that the caller has its key.
//!
//! It has to lead to a root of the bundle, or to one that was trusted. Below a root that is distrusted, whose key others
//! have, only what this authority itself has signed counts, which it knows by the number. For a recovery from an expired
//! root, the record may allow certificates that have ended not too long ago.

use std::collections::HashSet;
use std::time::Duration;

use super::{Grant, Judging, Refusal};
use crate::ca::Current;
use crate::trust::{Peer, Revoked, Trust, TrustError, Usage, VerifyError};
use crate::verify::{AltName, ClientIdentity};

/// The kind of this proof.
pub const KIND: &str = "renewal";

/// Judges what the caller showed.
///
/// # Errors
/// Why it proves nothing.
pub fn attest(judging: &Judging<'_>) -> Result<Grant, Refusal> {
    let peer = verify(judging).map_err(|error| Refusal::Proof(error.to_string()))?;
    let names = judging.caller.chain.first().and_then(ClientIdentity::parse).map(|parsed| parsed.names);
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
        process: None,
    })
}

/// Who showed a certificate in the handshake.
///
/// # Errors
/// Why nobody knows.
pub fn verify(judging: &Judging<'_>) -> Result<Peer, VerifyError> {
    let Judging { caller, current, now, .. } = *judging;
    let first = match current.trust().verify(&caller.chain, Usage::Client, now) {
        Ok(verified) => return Ok(verified.peer),
        Err(error) => error,
    };
    if !matches!(first, VerifyError::Expired | VerifyError::UnknownIssuer | VerifyError::Distrusted) {
        return Err(first);
    }
    if let Some(own) = own(judging) {
        return Ok(own);
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

/// Who shows a certificate below a distrusted root that this authority has signed.
fn own(judging: &Judging<'_>) -> Option<Peer> {
    let Judging { caller, current, mark, now } = *judging;
    let domain = &current.bundle().trust_domain;
    let roots = current.distrusted_roots.iter().cloned();
    let revoked = Revoked { authorities: HashSet::new(), ..current.bundle().revoked.clone() };
    let distrusted = Trust::new(domain.clone(), 0).with_roots(domain, roots).ok()?.with_revoked(revoked);
    let peer = distrusted.verify(&caller.chain, Usage::Client, now).ok()?.peer;
    mark.is_own(caller.chain.first()?).then_some(peer)
}

/// With roots that are in no bundle any more.
fn everything(current: &Current) -> Result<Trust, TrustError> {
    current.bundle().trust()?.with_roots(&current.bundle().trust_domain, current.former_roots.iter().cloned())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::SystemTime;

    use rcgen::PublicKeyData as _;
    use rustls::pki_types::CertificateDer;

    use super::*;
    use crate::ca::authority::{Authority, Issued, Key, KeyKind, Request};
    use crate::ca::csr::PublicKey;
    use crate::ca::mark::Mark;
    use crate::ca::seal::Sealer;
    use crate::ca::{Bundle, BundleRoot, Lifetimes, RootState};
    use crate::grpc::Caller;
    use crate::identity::TrustDomain;
    use crate::trust::{Fingerprint, Serial};

    const DAY: Duration = Duration::from_secs(86_400);

    fn signed(issuer: &Authority, mark: Option<&Mark>, now: SystemTime) -> Issued {
        let key = Key::generate(KeyKind::P256).unwrap();
        let key = PublicKey::from_spki(&key.subject_public_key_info()).unwrap();
        let identity = "spiffe://mesh.local/ns/shop/sa/orders".parse().unwrap();
        let dns_names = &["orders.test".to_owned()];
        let request = Request { key: &key, identity: &identity, dns_names, ttl: DAY, not_before: None, mark };
        issuer.leaf(&request, &Lifetimes::default(), now).unwrap()
    }

    #[test]
    fn below_a_distrusted_root_only_what_the_authority_signed_itself_counts() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let domain: TrustDomain = "mesh.local".parse().unwrap();
        let root = || Authority::root(&domain, KeyKind::P256, 3650 * DAY, now).unwrap();
        let (old, new) = (root(), root());
        let issuer = old.intermediate(&domain, KeyKind::P256, 365 * DAY, now).unwrap();
        let mark = Mark::new(&Sealer::random().unwrap()).unwrap();
        let other = Mark::new(&Sealer::random().unwrap()).unwrap();
        let own = signed(&issuer, Some(&mark), now);
        let revoked = signed(&issuer, Some(&mark), now);
        let mut bundle = Bundle {
            trust_domain: domain.clone(),
            generation: 2,
            least_generation: 2,
            least_connection_generation: 2,
            roots: vec![BundleRoot { certificate: new.certificate().clone(), state: RootState::Active }],
            revoked: Revoked::default(),
            shadow_roots: Vec::new(),
            made: now,
        };
        bundle.revoked.authorities.insert(Fingerprint::of(old.certificate()));
        bundle.revoked.serials.insert(revoked.serial.clone());
        let mut current = Current::new(bundle).unwrap();
        current.distrusted_roots = vec![old.certificate().clone()];
        let judge = |chain: &[CertificateDer<'static>], at: SystemTime| {
            let caller = Caller { chain: Arc::from(chain), ..Caller::default() };
            let judging = Judging { caller: &caller, current: &current, mark: &mark, now: at };
            attest(&judging).map(|grant| (grant.identity.to_string(), grant.dns_names))
        };
        let granted = ("spiffe://mesh.local/ns/shop/sa/orders".to_owned(), vec!["orders.test".to_owned()]);
        assert_eq!(judge(&own.chain, now), Ok(granted));
        assert_eq!(own.serial, Serial::new(own.serial.as_bytes()));
        let refused = [
            ("whoever has the root's key gives it a number", signed(&issuer, None, now), now),
            ("another authority has marked it", signed(&issuer, Some(&other), now), now),
            ("it was revoked", revoked, now),
            ("it has ended", own, now + 2 * DAY),
        ];
        for (why, issued, at) in refused {
            assert!(judge(&issued.chain, at).is_err(), "{why}");
        }
    }
}
