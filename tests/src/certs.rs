//! Certificates for tests: authorities, leaves with RSA or ECDSA keys, client certificates, and the rustls
//! settings made of them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use certs::ca::csr::PublicKey;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, RsaKeySize, SanType,
};
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};

/// The kind of key of a leaf certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    Ecdsa,
    Rsa,
}

/// A certificate authority, self-signed or below another one.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// The certificates from this authority up to, but without, the self-signed one.
    chain: String,
}

/// A certificate with its chain and its key, as PEM.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// The leaf followed by its intermediates.
    pub cert: String,
    pub key: String,
}

impl Authority {
    /// A self-signed authority.
    pub fn new(name: &str) -> Authority {
        let params = authority_params(name);
        let issuer = CertifiedIssuer::self_signed(params, ecdsa()).expect("a self-signed authority");
        Authority { issuer, chain: String::new() }
    }

    /// An authority signed by this one.
    pub fn intermediate(&self, name: &str) -> Authority {
        self.below(name, |_| {})
    }

    /// The same, with something else about it.
    pub fn below(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Authority {
        let mut params = authority_params(name);
        change(&mut params);
        let issuer = CertifiedIssuer::signed_by(params, ecdsa(), &self.issuer).expect("an intermediate");
        let chain = format!("{}{}", issuer.pem(), self.chain);
        Authority { issuer, chain }
    }

    /// A certificate of an authority below this one, for the key of a request in PEM.
    pub fn sign_issuer(&self, request: &str, name: &str, path_length: Option<u8>, life: Duration) -> String {
        let request = CertificateSigningRequestDer::from_pem_slice(request.as_bytes()).expect("a request");
        let key = PublicKey::from_csr(&request).expect("a request with a key that can be used");
        let mut params = authority_params(name);
        params.is_ca =
            IsCa::Ca(path_length.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(30)).into();
        params.not_after = (now + life).into();
        params.use_authority_key_identifier_extension = true;
        params.signed_by(&key, &self.issuer).expect("a signed certificate").pem()
    }

    /// The authority's own certificate as PEM.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// The authority's own certificate.
    pub fn der(&self) -> CertificateDer<'static> {
        self.issuer.der().clone().into_owned()
    }

    /// A server certificate with an ECDSA key for these DNS names or IP addresses.
    pub fn server(&self, names: &[&str]) -> Leaf {
        self.server_with(names, KeyKind::Ecdsa)
    }

    pub fn server_with(&self, names: &[&str], kind: KeyKind) -> Leaf {
        let key = match kind {
            KeyKind::Ecdsa => ecdsa(),
            KeyKind::Rsa => {
                KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).expect("an RSA key")
            }
        };
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names.clone()).expect("names for a certificate");
        params.distinguished_name.push(DnType::CommonName, names.first().map_or("server", String::as_str));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params, &key)
    }

    /// A client certificate with this common name.
    pub fn client(&self, name: &str) -> Leaf {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names =
            vec![SanType::DnsName(name.to_owned().try_into().expect("a name for a client certificate"))];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, &ecdsa())
    }

    /// A certificate of the mesh for this SPIFFE id, for both sides of a connection.
    pub fn svid(&self, id: &str) -> Leaf {
        self.svid_with(id, |_| {})
    }

    /// The same, with something else about it.
    pub fn svid_with(&self, id: &str, change: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let mut params = Authority::svid_params(id);
        change(&mut params);
        self.sign(params, &ecdsa())
    }

    /// What a certificate of the mesh for this SPIFFE id says.
    pub fn svid_params(id: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        let id = id.to_owned().try_into().expect("an id is ASCII");
        params.subject_alt_names = vec![SanType::URI(id)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params
    }

    fn sign(&self, params: CertificateParams, key: &KeyPair) -> Leaf {
        let cert = params.signed_by(key, &self.issuer).expect("a signed certificate");
        Leaf { cert: format!("{}{}", cert.pem(), self.chain), key: key.serialize_pem() }
    }

    /// Client settings that trust this authority alone.
    pub fn client_config(&self) -> ClientBuilder {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("the authority is a usable root");
        ClientBuilder { roots, versions: rustls::ALL_VERSIONS.to_vec(), alpn: Vec::new(), identity: None }
    }
}

fn ecdsa() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("an ECDSA key")
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Leaf {
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(self.cert.as_bytes())
            .collect::<Result<_, _>>()
            .expect("our own PEM can be read")
    }

    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).expect("our own key can be read")
    }

    /// The leaf itself, as a peer sees it.
    pub fn der(&self) -> CertificateDer<'static> {
        self.chain().remove(0)
    }

    /// Server settings that present this certificate; `alpn` in order of preference.
    pub fn server_config(&self, alpn: &[&str]) -> Arc<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("the default versions")
            .with_no_client_auth()
            .with_single_cert(self.chain(), self.private_key())
            .expect("our own certificate and key fit");
        config.alpn_protocols = protocols(alpn);
        Arc::new(config)
    }

    /// Server settings that present this certificate and ask the client for one signed by `clients`.
    pub fn server_config_asking(&self, alpn: &[&str], clients: &Authority) -> Arc<ServerConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(clients.issuer.der().clone()).expect("the authority is a usable root");
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&provider),
        )
        .build()
        .expect("a client verifier");
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the default versions")
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain(), self.private_key())
            .expect("our own certificate and key fit");
        config.alpn_protocols = protocols(alpn);
        Arc::new(config)
    }
}

fn protocols(alpn: &[&str]) -> Vec<Vec<u8>> {
    alpn.iter().map(|name| name.as_bytes().to_vec()).collect()
}

/// Settings of a TLS client, step by step.
pub struct ClientBuilder {
    roots: RootCertStore,
    versions: Vec<&'static SupportedProtocolVersion>,
    alpn: Vec<Vec<u8>>,
    identity: Option<Leaf>,
}

impl ClientBuilder {
    /// Also trusts `authority`.
    pub fn trust(mut self, authority: &Authority) -> Self {
        self.roots.add(authority.issuer.der().clone()).expect("the authority is a usable root");
        self
    }

    pub fn versions(mut self, versions: &[&'static SupportedProtocolVersion]) -> Self {
        self.versions = versions.to_vec();
        self
    }

    pub fn alpn(mut self, alpn: &[&str]) -> Self {
        self.alpn = protocols(alpn);
        self
    }

    pub fn identity(mut self, leaf: &Leaf) -> Self {
        self.identity = Some(leaf.clone());
        self
    }

    /// Settings that can resume sessions: use the same value for both connections.
    pub fn build(self) -> Arc<ClientConfig> {
        self.build_with(aws_lc_rs::default_provider())
    }

    /// Settings that accept only server keys of one kind (TLS 1.2, where the suite names the kind of key).
    pub fn build_for(mut self, kind: KeyKind) -> Arc<ClientConfig> {
        use rustls::crypto::aws_lc_rs::cipher_suite as suite;
        self.versions = vec![&rustls::version::TLS12];
        let mut provider = aws_lc_rs::default_provider();
        provider.cipher_suites = match kind {
            KeyKind::Ecdsa => vec![suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256],
            KeyKind::Rsa => vec![suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256],
        };
        self.build_with(provider)
    }

    fn build_with(self, provider: rustls::crypto::CryptoProvider) -> Arc<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&self.versions)
            .expect("the chosen versions")
            .with_root_certificates(self.roots);
        let mut config = match self.identity {
            Some(leaf) => builder
                .with_client_auth_cert(leaf.chain(), leaf.private_key())
                .expect("our own certificate and key fit"),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn;
        Arc::new(config)
    }
}
