//! What a process shows when somebody shakes hands with it, and whether the mesh would accept it.
//!
//! No certificate is shown in return: in TLS 1.3 a server shows its own before it looks at the client's. What is inspected is
//! what is served, and not what an authority believes to be served.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, Error};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::authority::Facts;
use crate::identity::IdentityPattern;
use crate::signatures::checks_signatures;
use crate::trust::{Fingerprint, Peer, Trust, Usage};

/// One certificate of a chain.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Shown {
    pub subject: String,
    pub fingerprint: String,
    /// Seconds since 1970.
    pub not_before: u64,
    pub not_after: u64,
}

/// What was found.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Inspected {
    pub chain: Vec<Shown>,
    pub identity: Option<String>,
    pub serial: Option<String>,
    pub issuer: Option<String>,
    /// The root that it leads to, among those of the bundle.
    pub root: Option<String>,
    /// Empty: the mesh accepts it.
    pub problem: String,
    /// The word of the problem, as metrics have it.
    pub code: String,
}

/// Shakes hands with `address` and looks at what it shows.
///
/// # Errors
/// Nobody listens there, or no certificate is shown; in words.
pub async fn inspect(
    address: &str,
    trust: &Trust,
    expected: Option<&IdentityPattern>,
    alpn: &[&str],
    now: SystemTime,
    deadline: Duration,
) -> Result<Inspected, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let seen = Arc::new(Watcher { chain: Mutex::default(), provider: Arc::clone(&provider) });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::<Watcher>::clone(&seen))
        .with_no_client_auth();
    config.enable_sni = false;
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let shake = async {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| format!("{address} cannot be reached: {error}"))?;
        let name = ServerName::try_from("mesh.invalid").map_err(|error| error.to_string())?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| error.to_string())
    };
    let ended = match tokio::time::timeout(deadline, shake).await {
        Ok(ended) => ended.map(drop),
        Err(_) => Err(format!("{address} does not answer within {} s", deadline.as_secs())),
    };
    let chain = seen.chain.lock().unwrap_or_else(PoisonError::into_inner).clone();
    // Whoever asks for a certificate of ours ends the connection; it has shown its own before.
    if chain.is_empty() {
        return Err(ended.err().unwrap_or_else(|| format!("{address} shows no certificate")));
    }
    Ok(judge(&chain, trust, expected, now))
}

/// Looks at a chain as a peer would.
#[must_use]
pub fn judge(
    chain: &[CertificateDer<'static>],
    trust: &Trust,
    expected: Option<&IdentityPattern>,
    now: SystemTime,
) -> Inspected {
    let secs = |time: SystemTime| super::record::Moment::from(time).secs();
    let shown = chain.iter().map(|certificate| {
        let facts = Facts::read(certificate);
        Shown {
            subject: facts.as_ref().map_or_else(
                |error| format!("cannot be read: {error}"),
                |facts| {
                    if facts.subject.is_empty() { "(none)".to_owned() } else { facts.subject.clone() }
                },
            ),
            fingerprint: Fingerprint::of(certificate).to_string(),
            not_before: facts.as_ref().map_or(0, |facts| secs(facts.not_before)),
            not_after: facts.as_ref().map_or(0, |facts| secs(facts.not_after)),
        }
    });
    let peer = chain.first().and_then(|leaf| Peer::read(leaf).ok());
    let verdict = trust.verify(chain, Usage::Server, now);
    let (mut problem, mut code) = verdict
        .as_ref()
        .err()
        .map_or_else(Default::default, |error| (error.to_string(), error.code().to_owned()));
    if let (Ok(verified), Some(expected)) = (&verdict, expected)
        && !expected.matches(&verified.peer.id)
    {
        problem = format!("the peer is {}, expected was {expected}", verified.peer.id);
        code = "unexpected_peer".to_owned();
    }
    Inspected {
        chain: shown.collect(),
        identity: peer.as_ref().map(|peer| peer.id.to_string()),
        serial: peer.as_ref().map(|peer| peer.serial.to_string()),
        issuer: peer.as_ref().map(|peer| peer.issuer.to_string()),
        root: verdict.ok().map(|verified| verified.root.to_string()),
        problem,
        code,
    }
}

/// Takes every chain and remembers it. Nothing is sent over what it accepts.
#[derive(Debug)]
struct Watcher {
    chain: Mutex<Vec<CertificateDer<'static>>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Watcher {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = std::iter::once(leaf).chain(above).map(|one| one.clone().into_owned()).collect();
        *self.chain.lock().unwrap_or_else(PoisonError::into_inner) = chain;
        Ok(ServerCertVerified::assertion())
    }

    checks_signatures!(|this| this.provider);
}
