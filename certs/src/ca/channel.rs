//! The way between workloads and the authority: TLS that does not depend on what the authority hands out.
//!
//! The server's certificate is made at its start with a key of its own, and leads to no root of the mesh. Clients know it by
//! the hash of the key, so neither an expired root nor a wrong clock keeps them away. Clients may show a certificate; that
//! they have its key is checked in the handshake, what it is worth is judged when they use it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::constant_time;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, PublicKeyData};
use rustls::client::Resumption;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{CertificateError, ClientConfig, DistinguishedName, Error, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::{AuthorityError, Key, KeyKind};
use super::seal::{SealError, Sealer};
use super::store::{Store, StoreError, SwapError};
use crate::signatures::checks_signatures;
use crate::svid::Svid;
use crate::trust::Fingerprint;

const ALPN: &[u8] = b"h2";
/// The name in the server's certificate, which nobody looks at.
const NAME: &str = "postern-ca";
const LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The hash of a server's key: `sha256/` and 32 bytes in base64.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pin(Fingerprint);

/// Why the key behind the pin is not there.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error(transparent)]
    Key(#[from] AuthorityError),
    #[error("the key of the channel in {0} is none")]
    Content(String),
}

/// What the key is called in a store, and what it is sealed for.
const KEY: &str = "channel.key";

/// The key of an authority's server, which all replicas have in common; made by the first of them.
///
/// # Errors
/// The store cannot be used, or what it has was sealed by another key.
pub async fn key(store: &dyn Store, sealer: &Sealer) -> Result<Key, KeyError> {
    loop {
        if let Some(stored) = store.load(KEY).await? {
            let wrong = || KeyError::Content(store.name().to_owned());
            let opened = sealer.open(KEY, std::str::from_utf8(&stored.value).map_err(|_| wrong())?)?;
            let der = PrivateKeyDer::try_from(opened.as_slice()).map_err(|_| wrong())?;
            return Ok(Key::load(&der)?);
        }
        let made = Key::generate(KeyKind::P256)?;
        let sealed = sealer.seal(KEY, &made.der())?;
        match store.swap(KEY, None, sealed.as_bytes()).await {
            Ok(_) => return Ok(made),
            // Another replica was faster: its key is taken.
            Err(SwapError::Conflict) => {}
            Err(SwapError::Store(error)) => return Err(error.into()),
        }
    }
}

/// Text that is not a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a pin is `sha256/` and the hash of the authority's key in base64, as `postern ca run` prints it")]
pub struct PinError;

impl Pin {
    /// Of a key.
    pub fn of(key: &Key) -> Self {
        Self(Fingerprint::of(&key.subject_public_key_info()))
    }

    fn matches(&self, certificate: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| {
            let hash = Fingerprint::of(parsed.public_key().raw);
            constant_time::verify_slices_are_equal(hash.as_bytes(), self.0.as_bytes()).is_ok()
        })
    }
}

impl FromStr for Pin {
    type Err = PinError;

    fn from_str(text: &str) -> Result<Self, PinError> {
        let bytes = STANDARD.decode(text.strip_prefix("sha256/").ok_or(PinError)?).map_err(|_| PinError)?;
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        digits.parse().map(Self).map_err(|_| PinError)
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256/{}", STANDARD.encode(self.0.as_bytes()))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The server's side, with this key.
///
/// # Errors
/// The library fails.
pub fn server(key: &Key, now: SystemTime) -> Result<Arc<ServerConfig>, AuthorityError> {
    let mut params = CertificateParams::new(vec![NAME.to_owned()]).map_err(|error| failed(&error))?;
    let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since(now - Duration::from_secs(86_400));
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since(now + LIFE);
    let certificate = params.self_signed(key).map_err(|error| failed(&error))?;
    let own = CertifiedKey::from_der(vec![certificate.der().clone()], key.private_key(), &provider());
    door(Arc::new(SingleCertAndKey::from(own.map_err(|error| failed(&error))?)))
}

fn failed(error: &dyn fmt::Display) -> AuthorityError {
    AuthorityError::Signing(error.to_string())
}

/// The same with a certificate that is chosen at each handshake.
///
/// # Errors
/// The library fails.
pub(super) fn door(shown: Arc<dyn ResolvesServerCert>) -> Result<Arc<ServerConfig>, AuthorityError> {
    let provider = provider();
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| failed(&error))?
        .with_client_cert_verifier(Arc::new(Holder(provider)))
        .with_cert_resolver(shown);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The client's side: a server with one of these keys, to which `svid` is shown.
///
/// # Errors
/// rustls cannot do this with its provider, which does not happen with the one that is built in.
pub fn client(pins: Arc<[Pin]>, svid: Option<&Svid>) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { pins, provider }));
    let mut config = match svid {
        None => builder.with_no_client_auth(),
        Some(svid) => {
            let key = svid.certified_key().clone();
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)))
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// Believes a server with a key that is known.
#[derive(Debug)]
struct Pinned {
    pins: Arc<[Pin]>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.pins.iter().any(|pin| pin.matches(end_entity)) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    checks_signatures!(TLS13, |this| this.provider);
}

/// Lets clients show what they like, if they have its key.
#[derive(Debug)]
struct Holder(Arc<CryptoProvider>);

impl ClientCertVerifier for Holder {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    checks_signatures!(TLS13, |this| this.0);
}
