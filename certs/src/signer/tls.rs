//! The TLS of a node: its certificate and the authorities of gateways, from files that may change while it runs. A change
//! counts from the next handshake on; files that cannot be used leave the former ones in force.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme};
use tracing::{info, warn};

use crate::files;
use crate::trust::Fingerprint;

/// Where the files are.
#[derive(Clone, Debug)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// What certificates of gateways have to be signed by.
    pub client_ca: PathBuf,
}

#[derive(Debug)]
struct Loaded {
    identity: Arc<CertifiedKey>,
    clients: Arc<dyn ClientCertVerifier>,
    /// Of the three files, to see that they have changed.
    content: Fingerprint,
}

/// The TLS of a node.
#[derive(Debug)]
pub struct NodeTls {
    files: Files,
    loaded: ArcSwap<Loaded>,
    /// The content of files that could not be used, so that this is told once.
    refused: ArcSwap<Option<Fingerprint>>,
}

impl NodeTls {
    /// Reads the files.
    ///
    /// # Errors
    /// They cannot be read, or cannot be used.
    pub fn open(files: Files) -> Result<Arc<Self>, String> {
        let content = content(&files)?;
        let loaded = ArcSwap::from_pointee(load(&files, content)?);
        Ok(Arc::new(Self { files, loaded, refused: ArcSwap::default() }))
    }

    /// Looks whether the files have changed. Blocks.
    pub fn reload(&self) {
        let content = match content(&self.files) {
            Ok(content) if content == self.loaded.load().content => return,
            Ok(content) => content,
            Err(error) => return self.refuse(None, &error),
        };
        match load(&self.files, content) {
            Ok(loaded) => {
                self.loaded.store(Arc::new(loaded));
                self.refused.store(Arc::new(None));
                info!("the certificate of the signer was read again");
            }
            Err(error) => self.refuse(Some(content), &error),
        }
    }

    fn refuse(&self, content: Option<Fingerprint>, error: &str) {
        let told = content.or(Some(Fingerprint::of(error.as_bytes())));
        if **self.refused.load() != told {
            self.refused.store(Arc::new(told));
            warn!(%error, "the certificate of the signer stays as it was");
        }
    }

    /// For handshakes. Each looks at what is in force then; sessions are not resumed.
    ///
    /// # Errors
    /// The library has no TLS 1.3.
    pub fn config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, String> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(Arc::clone(self) as _)
            .with_cert_resolver(Arc::clone(self) as _);
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn content(files: &Files) -> Result<Fingerprint, String> {
    let mut hashes = Vec::new();
    for path in [&files.certificate, &files.key, &files.client_ca] {
        let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        hashes.extend_from_slice(Fingerprint::of(&zeroize::Zeroizing::new(bytes)).as_bytes());
    }
    Ok(Fingerprint::of(&hashes))
}

fn load(files: &Files, content: Fingerprint) -> Result<Loaded, String> {
    let chain = files::certificates(&files.certificate).map_err(|error| error.to_string())?;
    let key = files::private_key(&files.key).map_err(|error| error.to_string())?;
    let identity = CertifiedKey::from_der(chain, key, &provider())
        .map_err(|error| format!("{} and {}: {error}", files.certificate.display(), files.key.display()))?;
    let roots = files::trusted_roots(&files.client_ca).map_err(|error| error.to_string())?;
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| format!("{}: {error}", files.client_ca.display()))?;
    Ok(Loaded { identity: Arc::new(identity), clients, content })
}

impl ResolvesServerCert for NodeTls {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.loaded.load().identity))
    }
}

impl ClientCertVerifier for NodeTls {
    /// Gateways have one certificate and need no hint.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.loaded.load().clients.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.loaded.load().clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.loaded.load().clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.loaded.load().clients.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn made() -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(["signer.test".to_owned()]).unwrap().self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn a_change_counts_and_files_that_do_not_fit_leave_the_former_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let files = Files { certificate: path("cert"), key: path("key"), client_ca: path("ca") };
        let error = NodeTls::open(files.clone()).unwrap_err();
        assert!(error.contains("cert"), "{error}");
        let [first, second, third] = [made(), made(), made()];
        let write = |(certificate, key): (&str, &str), ca: &str| {
            fs::write(path("cert"), certificate).unwrap();
            fs::write(path("key"), key).unwrap();
            fs::write(path("ca"), ca).unwrap();
        };
        write((&first.0, &first.1), &first.0);
        let tls = NodeTls::open(files).unwrap();
        let shown = || tls.loaded.load().identity.cert.clone();
        let of_first = shown();

        for (pair, ca) in [
            ((&*second.0, &*first.1), &*first.0),
            ((&*second.0, "no key"), &*first.0),
            ((&*second.0, &*second.1), "no authority"),
        ] {
            write(pair, ca);
            tls.reload();
            assert_eq!(shown(), of_first);
        }
        fs::remove_file(path("cert")).unwrap();
        tls.reload();
        assert_eq!(shown(), of_first);

        write((&second.0, &second.1), &first.0);
        tls.reload();
        let (of_second, clients) = (shown(), Arc::clone(&tls.loaded.load().clients));
        assert_ne!(of_second, of_first);
        write((&second.0, &second.1), &third.0);
        tls.reload();
        assert!(!Arc::ptr_eq(&clients, &tls.loaded.load().clients), "other authorities count too");
        assert_eq!(shown(), of_second);
    }
}
