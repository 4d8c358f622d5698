//! What the authority asks for at the names, to see that they are ours.

use std::sync::Arc;

use ::aws_lc_rs::digest::{SHA256, digest};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use serde::{Deserialize, Serialize};

use crate::sni::ACME_TLS;

/// How a name is shown to be ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChallengeKind {
    /// A file at `http://NAME:80/.well-known/acme-challenge/`.
    #[serde(rename = "http-01")]
    Http01,
    /// A certificate in a handshake of its own at `NAME:443`.
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn01,
}

impl ChallengeKind {
    /// As RFC 8555 and RFC 8737 call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http01 => "http-01",
            Self::TlsAlpn01 => "tls-alpn-01",
        }
    }
}

/// One thing to be answered, for one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    pub kind: ChallengeKind,
    pub name: String,
    /// What is asked for by HTTP.
    pub token: String,
    /// The token with the account's thumbprint. It is no secret: it is what is answered to whoever asks.
    pub authorization: String,
}

/// The handshake that answers a challenge of the kind TLS-ALPN-01 (RFC 8737).
///
/// # Errors
/// The certificate cannot be made; in words.
pub fn alpn_config(challenge: &Challenge) -> Result<Arc<ServerConfig>, String> {
    let key = KeyPair::generate().map_err(|error| error.to_string())?;
    let mut params =
        CertificateParams::new(vec![challenge.name.clone()]).map_err(|error| error.to_string())?;
    params.distinguished_name = DistinguishedName::new();
    let shown = digest(&SHA256, challenge.authorization.as_bytes());
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(shown.as_ref())];
    let certificate = params.self_signed(&key).map_err(|error| error.to_string())?;
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialized_der().to_vec()));
    let provider = Arc::new(aws_lc_rs::default_provider());
    let signing = provider.key_provider.load_private_key(private).map_err(|error| error.to_string())?;
    // Not checked against the key: webpki does not read a certificate with this extension.
    let shown = CertifiedKey::new(vec![certificate.der().clone()], signing);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    config.alpn_protocols = vec![ACME_TLS.to_vec()];
    // A session of this handshake is nothing that anybody may come back to.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
