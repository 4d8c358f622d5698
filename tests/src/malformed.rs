//! Certificates that nobody of a mesh may be believed with, each wrong in one way, and somebody who shows them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ::certs::unverified::Unverified;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::certs::{Authority, Leaf};
use crate::client::{DEADLINE, connect};

const DAY: Duration = Duration::from_secs(86_400);
const GOOD: &str = "spiffe://mesh.local/ns/default/sa/orders";
/// The object identifier of the names of a certificate.
const NAMES: &[u64] = &[2, 5, 29, 17];

const URI: u8 = 0x86;
const DNS: u8 = 0x82;
const MAIL: u8 = 0x81;

/// What is shown in a handshake; nothing where it is empty.
#[derive(Clone, Debug)]
pub struct Shown {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn rustls::sign::SigningKey>,
}

impl Shown {
    fn new(chain: Vec<CertificateDer<'static>>, key: &PrivateKeyDer<'static>) -> Shown {
        let key = aws_lc_rs::sign::any_supported_type(key).expect("a key of our own making");
        Shown { chain, key }
    }

    fn leaf(leaf: &Leaf) -> Shown {
        Shown::new(leaf.chain(), &leaf.private_key())
    }

    /// As rustls takes it, whatever it is.
    pub fn certified(&self) -> Option<Arc<CertifiedKey>> {
        let shown = CertifiedKey::new(self.chain.clone(), self.key.clone());
        (!self.chain.is_empty()).then(|| Arc::new(shown))
    }

    /// Shakes hands with the sidecar at `to` by this ALPN, asks for something, and gives what was heard.
    pub async fn call(&self, to: SocketAddr, alpn: &str) -> Vec<u8> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Unverified(provider)))
            .with_client_cert_resolver(Arc::new(self.clone()));
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let mut heard = Vec::new();
        let calling = async {
            let name = ServerName::IpAddress(to.ip().into());
            let mut stream = TlsConnector::from(Arc::new(config)).connect(name, connect(to).await).await?;
            // Who is refused hears of it when it believes to be through.
            stream.write_all(b"GET / HTTP/1.1\r\nhost: payments\r\nconnection: close\r\n\r\n").await?;
            stream.read_to_end(&mut heard).await
        };
        let _ = timeout(DEADLINE, calling).await.expect("an answer or an end in time");
        heard
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// DER of something, short or long.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match u8::try_from(content.len()) {
        Ok(short) if short < 0x80 => out.push(short),
        _ => {
            out.push(0x82);
            out.extend_from_slice(&u16::try_from(content.len()).expect("a short name").to_be_bytes());
        }
    }
    out.extend_from_slice(content);
    out
}

/// Names as they are given, whatever they are.
fn names(params: &mut CertificateParams, names: &[(u8, &[u8])]) {
    params.subject_alt_names.clear();
    let content = names.iter().flat_map(|(tag, name)| der(*tag, name)).collect::<Vec<_>>();
    params.custom_extensions.push(CustomExtension::from_oid_content(NAMES, der(0x30, &content)));
}

fn now() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock after 1970")
}

macro_rules! at {
    ($time:expr) => {
        rcgen::date_time_ymd(1970, 1, 1) + $time
    };
}

type Change = fn(&mut CertificateParams);

/// What is as it should be; everything below differs from it in one thing.
pub fn good(authority: &Authority) -> Shown {
    Shown::leaf(&authority.intermediate("issuer").svid(GOOD))
}

/// Every kind, with what is wrong about it.
pub fn kinds(root: &Authority) -> Vec<(String, Shown)> {
    let issuer = root.intermediate("issuer");
    let mut all = Vec::new();
    let mut add = |what: &str, shown: Shown| all.push((what.to_owned(), shown));

    let long = format!("spiffe://mesh.local/{}", "a".repeat(2048));
    let uris: [(&str, &[u8]); 18] = [
        ("another scheme", b"https://mesh.local/ns/default/sa/orders"),
        ("no scheme", b"mesh.local/ns/default/sa/orders"),
        ("the scheme in capitals", b"SPIFFE://mesh.local/ns/default/sa/orders"),
        ("the trust domain in capitals", b"spiffe://Mesh.Local/ns/default/sa/orders"),
        ("another trust domain", b"spiffe://other.test/ns/default/sa/orders"),
        ("a query", b"spiffe://mesh.local/ns/default/sa/orders?a=b"),
        ("a fragment", b"spiffe://mesh.local/ns/default/sa/orders#b"),
        ("a user", b"spiffe://admin@mesh.local/ns/default/sa/orders"),
        ("a port", b"spiffe://mesh.local:443/ns/default/sa/orders"),
        ("an empty segment", b"spiffe://mesh.local/ns//sa/orders"),
        ("a slash at the end", b"spiffe://mesh.local/ns/default/sa/orders/"),
        ("no path", b"spiffe://mesh.local"),
        ("dots", b"spiffe://mesh.local/ns/default/../admin"),
        ("escaped letters", b"spiffe://mesh.local/ns/default/sa/%6frders"),
        ("no trust domain", b"spiffe:///ns/default/sa/orders"),
        ("a wildcard", b"spiffe://mesh.local/ns/default/sa/*"),
        ("a NUL", b"spiffe://mesh.local/ns/default/sa/orders\0.evil"),
        ("too long", long.as_bytes()),
    ];
    for (what, uri) in uris {
        add(what, Shown::leaf(&issuer.svid_with(GOOD, |it| names(it, &[(URI, uri)]))));
    }
    #[expect(clippy::type_complexity, reason = "written once, and read where it stands")]
    let lists: [(&str, &[(u8, &[u8])]); 6] = [
        ("no names", &[]),
        ("two identities", &[(URI, GOOD.as_bytes()), (URI, b"spiffe://mesh.local/admin")]),
        ("an identity and another URI", &[(URI, GOOD.as_bytes()), (URI, b"https://mesh.local")]),
        ("an identity as a DNS name", &[(DNS, GOOD.as_bytes())]),
        ("an identity as a mail address", &[(MAIL, GOOD.as_bytes())]),
        ("an empty URI", &[(URI, b"")]),
    ];
    for (what, list) in lists {
        add(what, Shown::leaf(&issuer.svid_with(GOOD, |it| names(it, list))));
    }
    let changes: [(&str, Change); 14] = [
        ("an identity as a common name", |it| {
            it.subject_alt_names.clear();
            it.distinguished_name.push(DnType::CommonName, GOOD);
        }),
        ("two lists of names", |it| {
            let content = der(0x30, &der(URI, b"spiffe://mesh.local/admin"));
            it.custom_extensions.push(CustomExtension::from_oid_content(NAMES, content));
        }),
        ("no extended key usage", |it| it.extended_key_usages.clear()),
        ("for servers alone", |it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
        ("for anything", |it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any]),
        ("for code", |it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
        ("no key usage", |it| it.key_usages.clear()),
        ("a key that signs certificates", |it| it.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        ("an authority", |it| it.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
        ("something critical that nobody knows", |it| {
            let mut extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![5, 0]);
            extension.set_criticality(true);
            it.custom_extensions.push(extension);
        }),
        ("ended", |it| {
            it.not_before = at!(now() - 2 * DAY);
            it.not_after = at!(now() - DAY);
        }),
        ("not begun", |it| {
            it.not_before = at!(now() + DAY);
            it.not_after = at!(now() + 2 * DAY);
        }),
        ("ended before it began", |it| {
            it.not_before = at!(now() - DAY);
            it.not_after = at!(now() - 2 * DAY);
        }),
        ("a SAN that is no list", |it| {
            it.subject_alt_names.clear();
            it.custom_extensions.push(CustomExtension::from_oid_content(NAMES, vec![0x30, 0x7f, URI]));
        }),
    ];
    for (what, change) in changes {
        add(what, Shown::leaf(&issuer.svid_with(GOOD, change)));
    }

    let stranger = Authority::new("mesh root");
    let whole = issuer.svid(GOOD);
    let (chain, key) = (whole.chain(), whole.private_key());
    add("nothing at all", Shown::new(Vec::new(), &key));
    add("of another root of the same name", Shown::leaf(&stranger.svid(GOOD)));
    add("without its issuer", Shown::new(chain[..1].to_vec(), &key));
    let other = root.intermediate("issuer").svid(GOOD).chain().remove(1);
    add("with another issuer of the same name", Shown::new(vec![chain[0].clone(), other], &key));
    add("the issuer itself", Shown::new(chain[1..].to_vec(), &key));
    let self_signed = {
        let own = KeyPair::generate().expect("a key");
        let certificate = Authority::svid_params(GOOD).self_signed(&own).expect("a certificate");
        let key = PrivateKeyDer::try_from(own.serialize_der()).expect("PKCS #8");
        Shown::new(vec![certificate.der().clone()], &key)
    };
    add("signed by itself", self_signed);
    let ended = root.below("ended", |it| {
        it.not_before = at!(now() - 2 * DAY);
        it.not_after = at!(now() - DAY);
    });
    add("of an issuer that has ended", Shown::leaf(&ended.svid(GOOD)));
    let no_authority = root.below("no authority", |it| it.is_ca = IsCa::NoCa);
    add("below what is no authority", Shown::leaf(&no_authority.svid(GOOD)));
    let closed = root.below("closed", |it| it.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    add("deeper than its issuer may sign", Shown::leaf(&closed.intermediate("deeper").svid(GOOD)));
    let mut many = chain.clone();
    many.extend(std::iter::repeat_n(chain[1].clone(), 20));
    add("more certificates than anybody needs", Shown::new(many, &key));
    add(
        "another's certificate, without its key",
        Shown::new(chain.clone(), &issuer.svid(GOOD).private_key()),
    );
    let garbage = CertificateDer::from(vec![0x30, 3, 1, 2, 3]);
    add("no certificate at all", Shown::new(vec![garbage, chain[1].clone()], &key));
    let behind = CertificateDer::from([chain[0].to_vec(), vec![0]].concat());
    add("a byte behind it", Shown::new(vec![behind, chain[1].clone()], &key));
    let cut = CertificateDer::from(chain[0][..chain[0].len() - 1].to_vec());
    add("cut", Shown::new(vec![cut, chain[1].clone()], &key));
    let mut changed = chain[0].to_vec();
    if let Some(last) = changed.last_mut() {
        *last ^= 1;
    }
    add("a signature that is wrong", Shown::new(vec![CertificateDer::from(changed), chain[1].clone()], &key));
    all
}
