//! What tests of sources share: an authority, and waiting for what has to happen.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::time::{Duration, SystemTime};

use rcgen::PublicKeyData;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use crate::ca::Lifetimes;
use crate::ca::authority::{Authority, Issued, Key, KeyKind, Request};
use crate::ca::csr::PublicKey;
use crate::identity::{SpiffeId, TrustDomain};
use crate::mesh::MeshIdentity;
use crate::svid::Svid;
use crate::trust::Trust;

pub(crate) const DAY: Duration = Duration::from_secs(86_400);

/// Much longer than anything takes that is waited for here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A root and an issuer below it.
#[derive(Debug)]
pub(crate) struct Ca {
    pub domain: TrustDomain,
    pub root: Authority,
    pub issuer: Authority,
}

impl Ca {
    pub(crate) fn new(domain: &str) -> Self {
        let domain: TrustDomain = domain.parse().unwrap();
        let now = SystemTime::now();
        let root = Authority::root(&domain, KeyKind::P256, 3650 * DAY, now).unwrap();
        let issuer = root.intermediate(&domain, KeyKind::P256, 365 * DAY, now).unwrap();
        Self { domain, root, issuer }
    }

    pub(crate) fn id(&self, name: &str) -> SpiffeId {
        SpiffeId::new(&self.domain, &format!("/ns/default/sa/{name}")).unwrap()
    }

    pub(crate) fn root_der(&self) -> CertificateDer<'static> {
        self.root.certificate().clone()
    }

    pub(crate) fn sign(&self, key: &PublicKey, identity: &SpiffeId, ttl: Duration) -> Issued {
        self.sign_at(key, identity, ttl, SystemTime::now())
    }

    pub(crate) fn sign_at(
        &self,
        key: &PublicKey,
        identity: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Issued {
        let request = Request { key, identity, dns_names: &[], ttl, not_before: None, mark: None };
        self.issuer.leaf(&request, &Lifetimes::default(), now).unwrap()
    }

    pub(crate) fn svid(&self, name: &str) -> Svid {
        let key = Key::generate(KeyKind::P256).unwrap();
        let public = PublicKey::from_spki(&key.subject_public_key_info()).unwrap();
        Svid::new(self.sign(&public, &self.id(name), DAY).chain, &key.private_key()).unwrap()
    }

    /// A process of this domain that also believes `others`.
    pub(crate) fn process(&self, name: &str, others: &[&Ca]) -> MeshIdentity {
        let identity = MeshIdentity::new();
        identity.set_trust(trust(1, &self.domain, self, others)).unwrap();
        identity.install(self.svid(name)).unwrap();
        identity
    }
}

pub(crate) fn trust(generation: u64, own: &TrustDomain, ca: &Ca, others: &[&Ca]) -> Trust {
    let mut trust = Trust::new(own.clone(), generation).with_roots(&ca.domain, [ca.root_der()]).unwrap();
    for other in others {
        trust = trust.with_roots(&other.domain, [other.root_der()]).unwrap();
    }
    trust
}

/// Until what is watched makes something of it.
pub(crate) async fn until<T, R>(
    watched: &mut watch::Receiver<T>,
    what: &str,
    mut done: impl FnMut(&T) -> Option<R>,
) -> R {
    let wait = async {
        loop {
            if let Some(result) = done(&watched.borrow_and_update()) {
                return result;
            }
            watched.changed().await.unwrap();
        }
    };
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(result) => result,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Until an identity is as it should be.
pub(crate) async fn until_is(identity: &MeshIdentity, what: &str, done: impl Fn(&MeshIdentity) -> bool) {
    until(&mut identity.changes(), what, |_| done(identity).then_some(())).await;
}

/// Until something is so that nobody tells of.
pub(crate) async fn poll(what: &str, mut done: impl FnMut() -> bool) {
    let wait = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "not within {PATIENCE:?}: {what}");
}
