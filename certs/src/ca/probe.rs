//! Handshakes with those who renew first, before everybody follows them.
//!
//! A workload that says where its mesh port is gets two visitors: one with a certificate of the issuer before, for those who have
//! not renewed, who judges its new certificate; and one with a certificate of the new issuer, for itself, who calls
//! at somebody who has not renewed. What counts is that both ends accept what they see. Nothing is asked over
//! the connections.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use rcgen::PublicKeyData as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::Lifetimes;
use super::audit::{Audit, Entry};
use super::authority::{Key, KeyKind, Request};
use super::csr::PublicKey;
use super::foundry::Foundry;
use super::record::{IssuerId, Record};
use crate::clock::Clock;
use crate::grpc::chain;
use crate::identity::{IdentityError, IdentityPattern, SpiffeId, TrustDomain};
use crate::mesh::{Expected, MeshIdentity};
use crate::outgoing;
use crate::svid::Svid;
use crate::trust::Trust;
use crate::workload::time::MeshTime;

/// How long a visit may take.
const VISIT: Duration = Duration::from_secs(5);
/// A server that minds the certificate says so at once; one that does not says nothing, or greets.
const MIND: Duration = Duration::from_millis(500);
/// The certificate of a visitor is of use for a visit.
const LIFE: Duration = Duration::from_secs(600);
/// What visitors are called below the trust domain.
const NAME: &str = "postern/canary";
const ALPN: &[&[u8]] = &[b"postern-h2"];

type Problem = Box<dyn std::error::Error + Send + Sync>;

/// Somebody to be visited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Whose certificate is expected.
    pub identity: String,
    pub address: SocketAddr,
}

/// Visits.
pub trait Prober: Send + Sync + 'static {
    /// Shakes hands with `host` with a new certificate of `issuer`.
    fn visit<'a>(
        &'a self,
        record: &'a Record,
        issuer: &'a IssuerId,
        host: &'a Host,
    ) -> BoxFuture<'a, Result<(), String>>;
}

/// Visits over the network, with certificates that are in the log of decisions like all others.
pub struct Visitor {
    foundry: Arc<Foundry>,
    audit: Arc<Audit>,
    clock: Arc<dyn Clock>,
}

impl Visitor {
    pub fn new(foundry: Arc<Foundry>, audit: Arc<Audit>, clock: Arc<dyn Clock>) -> Self {
        Self { foundry, audit, clock }
    }
}

/// The identity of a visitor, which judges by the bundle of the record. Takes a moment: keys are unsealed.
fn dress(
    foundry: &Foundry,
    audit: &Audit,
    record: &Record,
    issuer: &IssuerId,
    time: Arc<MeshTime>,
) -> Result<MeshIdentity, Problem> {
    let now = time.now();
    let domain: TrustDomain = record.trust_domain.parse()?;
    let roots = record.trusted().map(|root| CertificateDer::from(root.certificate.0.clone()));
    let trust = Trust::new(domain.clone(), record.bundle.generation).with_roots(&domain, roots)?;
    let issuer = record.issuer(issuer).ok_or("the issuer is not listed")?;
    let authority = foundry.open(record, issuer)?;
    let identity: SpiffeId = format!("spiffe://{domain}/{NAME}").parse()?;
    let key = Key::generate(KeyKind::P256)?;
    let public = PublicKey::from_spki(&key.subject_public_key_info())?;
    let request = Request {
        key: &public,
        identity: &identity,
        dns_names: &[],
        ttl: LIFE,
        not_before: None,
        mark: None,
    };
    let lifetimes = Lifetimes { longest: LIFE, renewal: Duration::ZERO };
    let issued = authority.leaf(&request, &lifetimes, now)?;
    let entry = Entry::allowed("sign", identity.as_str())
        .with("attestor", "rotation")
        .with("serial", issued.serial.to_string())
        .with("issuer", issued.issuer.to_string());
    audit.write(&entry, now)?;
    let mesh = MeshIdentity::with_clock(time);
    mesh.set_trust(trust)?;
    mesh.install(Svid::new(issued.chain, &key.private_key())?)?;
    Ok(mesh)
}

impl Prober for Visitor {
    fn visit<'a>(
        &'a self,
        record: &'a Record,
        issuer: &'a IssuerId,
        host: &'a Host,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let expected: SpiffeId =
                host.identity.parse().map_err(|error: IdentityError| error.to_string())?;
            let expected = Expected::AnyOf(Arc::from([IdentityPattern::Exact(expected)]));
            let (foundry, audit) = (Arc::clone(&self.foundry), Arc::clone(&self.audit));
            let (record, issuer) = (record.clone(), issuer.clone());
            let time = MeshTime::new(Arc::clone(&self.clock));
            let dressed = tokio::task::spawn_blocking(move || {
                dress(&foundry, &audit, &record, &issuer, time).map_err(|error| error.to_string())
            });
            let mesh = dressed.await.map_err(|error| error.to_string())??;
            let call = timeout(VISIT, call(&mesh, expected, host.address)).await;
            let call = call.unwrap_or_else(|_| Err(format!("no handshake within {} s", VISIT.as_secs())));
            call.map_err(|problem| format!("{}: {problem}", host.address))
        })
    }
}

/// A handshake in which both ends have accepted what they saw.
async fn call(mesh: &MeshIdentity, expected: Expected, address: SocketAddr) -> Result<(), String> {
    let config = mesh.client_config(expected, ALPN).map_err(|error| chain(&error))?;
    let stream = outgoing::connect(address).await.map_err(|error| error.to_string())?;
    let name = ServerName::try_from("mesh.invalid").map_err(|error| error.to_string())?;
    let connected = TlsConnector::from(config).connect(name, stream).await;
    let mut stream = connected.map_err(|error| chain(&error))?;
    // In TLS 1.3 the handshake is over here before the server has looked at our certificate.
    let mut first = [0; 1];
    match timeout(MIND, stream.read(&mut first)).await {
        // It greets, says nothing, or has nothing for a visitor.
        Ok(Ok(_)) | Err(_) => Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
            Err(format!("it refuses the certificate: {error}"))
        }
        Ok(Err(_)) => Ok(()),
    }
}
