//! TLS to upstreams: what is verified, what is shown, and one shared configuration per identity.
//!
//! Configurations are built on the control thread. Upstreams with the same settings share one, so that sessions
//! are resumed between them and ten thousand upstreams do not hold ten thousand session caches; upstreams that
//! differ in anything never share.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use certs::unverified::Unverified;
use config::error::ConfigError;
use hashbrown::HashMap;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

/// A client certificate with its key, in PEM.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ClientPem {
    pub certificate: Arc<str>,
    pub key: Arc<str>,
}

impl fmt::Debug for ClientPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientPem(***)")
    }
}

/// Which protocols are offered by ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Offer {
    /// `http/1.1`.
    Http1,
    /// `h2` alone.
    Http2,
    /// Nothing: TLS under something that is not HTTP, or a probe.
    Nothing,
}

/// Everything that makes two TLS identities differ.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TlsSettings {
    /// Check the peer's certificate and its name.
    pub verify: bool,
    /// Authorities to check against, in PEM; none means those of the system.
    pub authorities: Vec<Arc<str>>,
    pub client: Option<ClientPem>,
    pub offer: Offer,
}

/// Builds client configurations and shares them while somebody uses them.
#[derive(Debug)]
pub struct TlsClients {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    shared: Mutex<HashMap<TlsSettings, Weak<ClientConfig>>>,
}

impl TlsClients {
    /// `roots` are the authorities of the system.
    pub fn new(roots: Arc<RootCertStore>) -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        Self { provider, roots, shared: Mutex::default() }
    }

    /// The configuration for `settings`.
    ///
    /// # Errors
    /// A certificate or key is not what it says it is. Pointers are relative to the `tls` object.
    pub fn config(&self, settings: &TlsSettings) -> Result<Arc<ClientConfig>, ConfigError> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = shared.get(settings).and_then(Weak::upgrade) {
            return Ok(config);
        }
        shared.retain(|_, config| config.strong_count() > 0);
        let config = Arc::new(self.build(settings)?);
        shared.insert(settings.clone(), Arc::downgrade(&config));
        Ok(config)
    }

    fn build(&self, settings: &TlsSettings) -> Result<ClientConfig, ConfigError> {
        let builder = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| ConfigError::invalid("", error.to_string()))?;
        let verifier: Arc<dyn ServerCertVerifier> = if settings.verify {
            let roots = self.authorities(settings)?;
            WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider))
                .build()
                .map_err(|error| ConfigError::invalid("/ca_certs", error.to_string()))?
        } else {
            Arc::new(Unverified(Arc::clone(&self.provider)))
        };
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let mut config = match &settings.client {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let chain = certificates(&pem.certificate, "/client_cert")?;
                let key = PrivateKeyDer::from_pem_slice(pem.key.as_bytes())
                    .map_err(|_| ConfigError::invalid("/client_key", "found no private key in PEM"))?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| ConfigError::invalid("/client_cert", error.to_string()))?
            }
        };
        config.alpn_protocols = match settings.offer {
            Offer::Http1 => vec![b"http/1.1".to_vec()],
            Offer::Http2 => vec![b"h2".to_vec()],
            Offer::Nothing => Vec::new(),
        };
        Ok(config)
    }

    fn authorities(&self, settings: &TlsSettings) -> Result<Arc<RootCertStore>, ConfigError> {
        if settings.authorities.is_empty() {
            return Ok(Arc::clone(&self.roots));
        }
        let mut roots = RootCertStore::empty();
        for (index, pem) in settings.authorities.iter().enumerate() {
            let pointer = format!("/ca_certs/{index}");
            for certificate in certificates(pem, &pointer)? {
                roots.add(certificate).map_err(|error| ConfigError::invalid(&*pointer, error.to_string()))?;
            }
        }
        Ok(Arc::new(roots))
    }
}

fn certificates(pem: &str, pointer: &str) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let invalid = || ConfigError::invalid(pointer, "found no certificate in PEM");
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    chain.ok().filter(|chain| !chain.is_empty()).ok_or_else(invalid)
}

/// The TLS name for the host that is sent upstream: without its port, an address when it is one.
pub(crate) fn server_name(authority: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(host_of(authority).to_owned()).ok()
}

/// The host of `host:port`, `[v6]:port`, or either without port; brackets are taken off.
pub(crate) fn host_of(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split_once(']').map_or(rest, |(host, _)| host);
    }
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !host.contains(':') => host,
        _ => authority,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn settings(verify: bool) -> TlsSettings {
        TlsSettings { verify, authorities: Vec::new(), client: None, offer: Offer::Http1 }
    }

    #[test]
    fn equal_settings_share_one_configuration_and_others_do_not() {
        let clients = TlsClients::new(Arc::new(RootCertStore::empty()));
        let first = clients.config(&settings(false)).unwrap();
        assert!(Arc::ptr_eq(&first, &clients.config(&settings(false)).unwrap()));
        let h2 = TlsSettings { offer: Offer::Http2, ..settings(false) };
        assert!(!Arc::ptr_eq(&first, &clients.config(&h2).unwrap()));
        let gone = Arc::downgrade(&first);
        drop(first);
        clients.config(&h2).unwrap();
        assert!(gone.upgrade().is_none(), "nothing is kept that nobody uses");
    }

    #[test]
    fn broken_pem_is_refused_at_its_place() {
        let clients = TlsClients::new(Arc::new(RootCertStore::empty()));
        let client = ClientPem { certificate: "nonsense".into(), key: "secret nonsense".into() };
        let error = clients.config(&TlsSettings { client: Some(client), ..settings(false) }).unwrap_err();
        assert_eq!(error.pointer, "/client_cert");
        assert!(!format!("{error} {error:?}").contains("secret"));
        let authorities = vec!["nonsense".into()];
        let error = clients.config(&TlsSettings { authorities, ..settings(true) }).unwrap_err();
        assert_eq!(error.pointer, "/ca_certs/0");
    }

    #[test]
    fn the_name_of_an_authority_has_no_port() {
        let cases = [
            ("api.test", "api.test"),
            ("api.test:8443", "api.test"),
            ("10.0.0.1:443", "10.0.0.1"),
            ("[::1]:443", "::1"),
            ("[::1]", "::1"),
            ("::1", "::1"),
            ("api.test:", "api.test"),
        ];
        for (authority, host) in cases {
            assert_eq!(host_of(authority), host, "{authority}");
        }
        assert!(matches!(server_name("10.0.0.1:443"), Some(ServerName::IpAddress(_))));
        assert!(matches!(server_name("a_b.test"), Some(ServerName::DnsName(_))), "names people use");
        assert!(server_name("not a name").is_none());
    }
}
