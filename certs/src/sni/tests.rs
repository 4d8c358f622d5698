//! Handshakes in memory against the table, with certificates made on the spot.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    PKCS_RSA_SHA256, RsaKeySize,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::pki_types::{ServerName, UnixTime};
use rustls::server::Acceptor;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, NamedGroup, RootCertStore,
    ServerConnection, SignatureScheme,
};

use super::*;

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

impl Ca {
    fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = ca_params(name);
        let certificate = params.self_signed(&key).unwrap();
        Self { pem: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    fn intermediate(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = ca_params(name);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Self { pem: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    fn server(&self, name: &str) -> CertPem {
        self.leaf_with_key(name, KeyPair::generate().unwrap(), |_| ())
    }

    fn leaf_with_key(
        &self,
        name: &str,
        key: KeyPair,
        change: impl FnOnce(&mut CertificateParams),
    ) -> CertPem {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        CertPem { cert: certificate.pem(), key: key.serialize_pem() }
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn object(id: &str, names: &[&str], pair: CertPem) -> SslObject {
    SslObject {
        id: id.into(),
        order: 0,
        names: names.iter().map(|n| (*n).to_owned()).collect(),
        pairs: vec![pair],
        remote: Vec::new(),
        client: None,
        protocols: Vec::new(),
    }
}

fn with_client(mut object: SslObject, ca: &Ca, depth: u32, skip: &[&str]) -> SslObject {
    object.client = Some(ClientAuth {
        ca: ca.pem.clone(),
        depth,
        skip_uri_regex: skip.iter().map(|s| (*s).to_owned()).collect(),
    });
    object
}

fn table(objects: Vec<SslObject>) -> SniTable {
    let (table, errors) = SniTable::build(TableSettings::default(), objects);
    assert_eq!(errors, []);
    table
}

/// A session store that forgets which server a session came from, as a hostile client would.
#[derive(Debug)]
struct OneName(ClientSessionMemoryCache);

const NAME: &str = "same.test";

impl OneName {
    fn name() -> ServerName<'static> {
        ServerName::try_from(NAME).unwrap()
    }
}

impl ClientSessionStore for OneName {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.0.set_kx_hint(Self::name(), group);
    }
    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.0.kx_hint(&Self::name())
    }
    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.0.set_tls12_session(Self::name(), value);
    }
    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.0.tls12_session(&Self::name())
    }
    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        self.0.remove_tls12_session(&Self::name());
    }
    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.0.insert_tls13_ticket(Self::name(), value);
    }
    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.take_tls13_ticket(&Self::name())
    }
}

fn client(ca: &Ca, version: Protocol, identity: Option<(&CertPem, &[&Ca])>) -> ClientConfig {
    client_with(ca, version, identity, aws_lc_rs::default_provider())
}

fn client_with(
    ca: &Ca,
    version: Protocol,
    identity: Option<(&CertPem, &[&Ca])>,
    provider: CryptoProvider,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der.clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[version.version()])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((pair, chain)) => {
            let mut certificates = vec![CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap()];
            certificates.extend(chain.iter().map(|ca| ca.der.clone()));
            builder
                .with_client_auth_cert(
                    certificates,
                    PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap(),
                )
                .unwrap()
        }
    };
    config.resumption =
        rustls::client::Resumption::store(Arc::new(OneName(ClientSessionMemoryCache::new(64))));
    config
}

struct Done {
    client: ClientConnection,
    server: ServerConnection,
}

/// Runs a whole handshake, the ClientHello cut into pieces of `piece` bytes on the way.
fn handshake(table: &SniTable, config: &ClientConfig, name: &str, piece: usize) -> Result<Done, String> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(config.clone()), name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    let mut acceptor = Acceptor::default();
    let mut pieces = hello.chunks(piece);
    let accepted = loop {
        let mut part = pieces.next().ok_or("hello incomplete")?;
        acceptor.read_tls(&mut part).unwrap();
        if let Some(accepted) = acceptor.accept().map_err(|(e, _)| e.to_string())? {
            break accepted;
        }
    };
    let hello = accepted.client_hello();
    let config = match table.challenge(&hello) {
        Some(config) => config.clone(),
        None => table.find(hello.server_name()).ok_or("no entry")?.config(true).clone(),
    };
    let mut server = accepted.into_connection(config).map_err(|(e, _)| e.to_string())?;
    for _ in 0..6 {
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut from_server = wire.as_slice();
        while !from_server.is_empty() {
            client.read_tls(&mut from_server).unwrap();
            client.process_new_packets().map_err(|e| format!("client: {e}"))?;
        }
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut from_client = wire.as_slice();
        while !from_client.is_empty() {
            server.read_tls(&mut from_client).unwrap();
            server.process_new_packets().map_err(|e| format!("server: {e}"))?;
        }
    }
    if client.is_handshaking() || server.is_handshaking() {
        return Err("unfinished".to_owned());
    }
    Ok(Done { client, server })
}

#[test]
fn the_most_specific_name_wins() {
    let ca = Ca::new("root");
    let pair = ca.server("x.test");
    let table = table(vec![
        object("any", &["*"], pair.clone()),
        object("wild", &["*.a.test"], pair.clone()),
        object("exact", &["b.a.test", "A.test."], pair),
    ]);
    for (name, expected) in [
        ("b.a.test", "exact"),
        ("B.A.TEST", "exact"),
        ("b.a.test.", "exact"),
        ("a.test", "exact"),
        ("c.a.test", "wild"),
        ("d.c.a.test", "any"),
        ("other", "any"),
    ] {
        assert_eq!(&**table.find(Some(name)).unwrap().id(), expected, "{name}");
    }
    assert!(table.find(None).is_none(), "no fallback is configured");
}

#[test]
fn a_client_without_a_name_gets_the_fallback() {
    let ca = Ca::new("root");
    let settings = TableSettings::build(&[], None, true, Some("A.test")).unwrap();
    let (table, _) = SniTable::build(settings, [object("1", &["a.test"], ca.server("a.test"))]);
    assert_eq!(&**table.find(None).unwrap().id(), "1");
    assert!(table.find(Some("unknown.test")).is_none());
}

#[test]
fn two_resources_of_one_name_are_served_oldest_first() {
    let ca = Ca::new("root");
    let mut newer = object("1", &["a.test"], ca.server("a.test"));
    newer.order = 9;
    let older = object("2", &["a.test"], ca.server("a.test"));
    let table = table(vec![newer, older]);
    assert_eq!(&**table.find(Some("a.test")).unwrap().id(), "2");
    let (table, _) = table.apply([Change::Remove("2".into())]);
    assert_eq!(&**table.find(Some("a.test")).unwrap().id(), "1");
    let (table, _) = table.apply([Change::Remove("1".into())]);
    assert!(table.find(Some("a.test")).is_none() && table.is_empty());
}

#[test]
fn what_cannot_be_used_names_the_resource_and_the_field() {
    let ca = Ca::new("root");
    let good = ca.server("a.test");
    let other = ca.server("a.test");
    let base = object("7", &["a.test"], good.clone());
    let pair = |cert: &str, key: &str| CertPem { cert: cert.to_owned(), key: key.to_owned() };
    let cases: Vec<(&str, SslObject, &str)> = vec![
        ("empty certificate", SslObject { pairs: vec![pair("", &good.key)], ..base.clone() }, "/cert"),
        (
            "key in place of certificate",
            SslObject { pairs: vec![pair(&good.key, &good.key)], ..base.clone() },
            "/cert",
        ),
        (
            "garbage in a block",
            SslObject {
                pairs: vec![pair(
                    "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                    &good.key,
                )],
                ..base.clone()
            },
            "/cert",
        ),
        ("no key", SslObject { pairs: vec![pair(&good.cert, "x")], ..base.clone() }, "/key"),
        ("foreign key", SslObject { pairs: vec![pair(&good.cert, &other.key)], ..base.clone() }, "/key"),
        (
            "foreign second key",
            SslObject { pairs: vec![good.clone(), pair(&good.cert, &other.key)], ..base.clone() },
            "/keys/0",
        ),
        (
            "bad name",
            SslObject { names: vec!["a.test".to_owned(), "a b".to_owned()], ..base.clone() },
            "/snis/1",
        ),
        ("no name", SslObject { names: Vec::new(), ..base.clone() }, "/snis"),
        (
            "bad client authority",
            SslObject {
                client: Some(ClientAuth { ca: "x".to_owned(), depth: 1, skip_uri_regex: Vec::new() }),
                ..base.clone()
            },
            "/client/ca",
        ),
        ("bad pattern", with_client(base.clone(), &ca, 1, &["ok", "("]), "/client/skip_mtls_uri_regex/1"),
    ];
    for (what, bad, field) in cases {
        let (table, errors) = SniTable::build(TableSettings::default(), [bad]);
        assert_eq!(errors.len(), 1, "{what}: {errors:?}");
        assert_eq!((&*errors[0].id, errors[0].field.as_str()), ("7", field), "{what}");
        assert!(!errors[0].to_string().contains("PRIVATE"), "{what}");
        assert!(table.is_empty(), "{what}");
    }
}

#[test]
fn a_refused_update_leaves_the_former_certificate_in_service() {
    let ca = Ca::new("root");
    let table = table(vec![object("1", &["a.test"], ca.server("a.test"))]);
    let broken = object("1", &["a.test"], CertPem { cert: String::new(), key: String::new() });
    let (after, errors) = table.apply([Change::Put(broken)]);
    assert_eq!(errors.len(), 1);
    assert!(Arc::ptr_eq(table.find(Some("a.test")).unwrap(), after.find(Some("a.test")).unwrap()));
}

#[test]
fn an_unchanged_resource_keeps_its_entry() {
    let ca = Ca::new("root");
    let (a, b) =
        (object("a", &["a.test"], ca.server("a.test")), object("b", &["b.test"], ca.server("b.test")));
    let first = table(vec![a.clone(), b]);
    let b2 = object("b", &["b.test", "c.test"], ca.server("b.test"));
    let (second, errors) = first.apply([Change::Put(a), Change::Put(b2)]);
    assert_eq!(errors, []);
    assert!(Arc::ptr_eq(first.entry("a").unwrap(), second.entry("a").unwrap()));
    assert!(!Arc::ptr_eq(first.entry("b").unwrap(), second.entry("b").unwrap()));
    assert!(first.find(Some("c.test")).is_none() && second.find(Some("c.test")).is_some());
}

#[test]
fn the_client_decides_between_rsa_and_ecdsa() {
    let ca = Ca::new("root");
    let rsa = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
    let mut both = object("1", &["a.test"], ca.leaf_with_key("a.test", rsa, |_| ()));
    both.pairs.push(ca.server("a.test"));
    let table = table(vec![both]);

    let modern = handshake(&table, &client(&ca, Protocol::Tls13, None), "a.test", 4096).unwrap();
    assert_eq!(leaf_algorithm(&modern), "1.2.840.10045.2.1", "ECDSA is preferred");

    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.retain(|suite| format!("{suite:?}").contains("ECDHE_RSA"));
    let config = client_with(&ca, Protocol::Tls12, None, provider);
    let old = handshake(&table, &config, "a.test", 4096).unwrap();
    assert_eq!(leaf_algorithm(&old), "1.2.840.113549.1.1.1", "RSA for those who know nothing else");
}

fn leaf_algorithm(done: &Done) -> String {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let leaf = &done.client.peer_certificates().unwrap()[0];
    let (_, parsed) = X509Certificate::from_der(leaf).unwrap();
    parsed.public_key().algorithm.algorithm.to_id_string()
}

#[test]
fn versions_belong_to_the_name() {
    let ca = Ca::new("root");
    let mut old = object("old", &["old.test"], ca.server("old.test"));
    old.protocols = vec![Protocol::Tls12];
    let mut new = object("new", &["new.test"], ca.server("new.test"));
    new.protocols = vec![Protocol::Tls13];
    let table = table(vec![old, new]);
    for (name, version, works) in [
        ("old.test", Protocol::Tls12, true),
        ("old.test", Protocol::Tls13, false),
        ("new.test", Protocol::Tls12, false),
        ("new.test", Protocol::Tls13, true),
    ] {
        let result = handshake(&table, &client(&ca, version, None), name, 4096);
        assert_eq!(result.is_ok(), works, "{name} {version:?}");
    }
}

#[test]
fn ciphers_are_mapped_and_an_empty_result_is_an_error() {
    let apisix = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:DHE-RSA-AES128-GCM-SHA256";
    let settings = TableSettings::build(&[], Some(apisix), true, None).unwrap();
    assert_eq!(settings.provider.cipher_suites.len(), 3 + 2);
    assert!(TableSettings::build(&[], Some("DHE-RSA-AES128-GCM-SHA256"), true, None).is_err());
    assert!(TableSettings::build(&[Protocol::Tls13], Some("none"), true, None).is_ok());
}

#[test]
fn a_fragmented_hello_changes_nothing() {
    let ca = Ca::new("root");
    let table = table(vec![
        with_client(object("mtls", &["m.test"], ca.server("m.test")), &ca, 1, &[]),
        object("open", &["*"], ca.server("open.test")),
    ]);
    let config = client(&ca, Protocol::Tls13, None);
    for piece in [1, 7, 100, 4096] {
        let result = handshake(&table, &config, "m.test", piece);
        assert!(result.is_err(), "{piece}: the certificate is asked for");
    }
}

#[test]
fn client_certificates_are_checked_in_the_handshake() {
    let ca = Ca::new("clients");
    let stranger = Ca::new("stranger");
    let middle = ca.intermediate("middle");
    let lower = middle.intermediate("lower");
    let server_ca = Ca::new("servers");
    let table = table(vec![with_client(object("1", &["m.test"], server_ca.server("m.test")), &ca, 1, &[])]);
    let leaf = |ca: &Ca, change: fn(&mut CertificateParams)| {
        ca.leaf_with_key("client", KeyPair::generate().unwrap(), change)
    };
    let cases: Vec<(&str, CertPem, Vec<&Ca>, bool)> = vec![
        ("signed by the authority", leaf(&ca, |_| ()), vec![], true),
        ("one intermediate", leaf(&middle, |_| ()), vec![&middle], true),
        ("two intermediates, depth 1", leaf(&lower, |_| ()), vec![&lower, &middle], false),
        ("another authority", leaf(&stranger, |_| ()), vec![], false),
        ("expired", leaf(&ca, |p| p.not_after = rcgen::date_time_ymd(2001, 1, 1)), vec![], false),
        ("not yet valid", leaf(&ca, |p| p.not_before = rcgen::date_time_ymd(2090, 1, 1)), vec![], false),
        (
            "for servers only",
            leaf(&ca, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
            vec![],
            false,
        ),
        (
            "an authority as client",
            leaf(&ca, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            vec![],
            false,
        ),
    ];
    for version in [Protocol::Tls12, Protocol::Tls13] {
        for (what, pair, chain, works) in &cases {
            let config = client(&server_ca, version, Some((pair, chain)));
            let result = handshake(&table, &config, "m.test", 4096);
            assert_eq!(result.is_ok(), *works, "{what} {version:?}: {:?}", result.err());
        }
        assert!(
            handshake(&table, &client(&server_ca, version, None), "m.test", 4096).is_err(),
            "none at all"
        );
    }
}

#[test]
fn with_uri_exceptions_the_handshake_records_instead_of_refusing() {
    let ca = Ca::new("clients");
    let stranger = Ca::new("stranger");
    let table = table(vec![with_client(object("1", &["m.test"], ca.server("m.test")), &ca, 1, &["^/open"])]);
    let policy = table.find(Some("m.test")).unwrap().client().unwrap().clone();
    assert!(policy.is_optional() && policy.skips("/open/x") && !policy.skips("/x/open"));
    for (what, issuer, verified) in
        [("none", None, false), ("good", Some(&ca), true), ("foreign", Some(&stranger), false)]
    {
        let pair = issuer.map(|issuer| issuer.server("client"));
        let config = client(&ca, Protocol::Tls13, pair.as_ref().map(|p| (p, [].as_slice())));
        let done = handshake(&table, &config, "m.test", 4096).unwrap();
        let chain = done.server.peer_certificates().unwrap_or_default();
        assert_eq!(policy.verify(chain, rustls::pki_types::UnixTime::now()).is_ok(), verified, "{what}");
    }
}

#[test]
fn resumption_never_crosses_client_certificate_settings() {
    let ca = Ca::new("root");
    let pair = ca.server("client");
    for version in [Protocol::Tls12, Protocol::Tls13] {
        for tickets in [true, false] {
            let open = object("open", &["open.test"], ca.server("open.test"));
            let strict = with_client(object("strict", &["m.test"], ca.server("m.test")), &ca, 1, &[]);
            let settings = TableSettings::build(&[], None, tickets, None).unwrap();
            let (table, errors) = SniTable::build(settings, [open.clone(), strict]);
            assert_eq!(errors, []);

            let config = client(&ca, version, Some((&pair, &[])));
            assert_eq!(kind(&table, &config, "open.test"), HandshakeKind::Full, "{version:?} {tickets}");
            assert_eq!(kind(&table, &config, "open.test"), HandshakeKind::Resumed, "{version:?} {tickets}");
            // The same session offered to the host that asks for a certificate.
            assert_eq!(kind(&table, &config, "m.test"), HandshakeKind::Full, "{version:?} {tickets}");

            // The same host, when it starts to ask for one.
            let config = client(&ca, version, None);
            assert_eq!(kind(&table, &config, "open.test"), HandshakeKind::Full);
            assert_eq!(kind(&table, &config, "open.test"), HandshakeKind::Resumed);
            let (table, errors) = table.apply([Change::Put(with_client(open, &ca, 1, &[]))]);
            assert_eq!(errors, []);
            assert!(handshake(&table, &config, "open.test", 4096).is_err(), "{version:?} {tickets}");
        }
    }
}

#[test]
fn a_session_survives_the_change_of_another_resource() {
    let ca = Ca::new("root");
    let table = table(vec![object("a", &["a.test"], ca.server("a.test"))]);
    let config = client(&ca, Protocol::Tls13, None);
    assert_eq!(kind(&table, &config, "a.test"), HandshakeKind::Full);
    let (table, _) = table.apply([Change::Put(object("b", &["b.test"], ca.server("b.test")))]);
    assert_eq!(kind(&table, &config, "a.test"), HandshakeKind::Resumed);
}

fn kind(table: &SniTable, config: &ClientConfig, name: &str) -> HandshakeKind {
    handshake(table, config, name, 4096).unwrap().server.handshake_kind().unwrap()
}

/// An authority looks at the certificate by itself; webpki refuses the extension that it looks for.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[test]
fn a_pending_challenge_is_shown_to_whoever_asks_for_it_and_to_nobody_else() {
    use crate::acme::{Challenge, ChallengeKind, alpn_config};
    use ::aws_lc_rs::digest::{SHA256, digest};

    let ca = Ca::new("root");
    let object = SslObject {
        id: "1".into(),
        order: 1,
        names: vec!["a.test".to_owned(), "b.test".to_owned()],
        pairs: vec![ca.server("a.test")],
        remote: Vec::new(),
        client: None,
        protocols: Vec::new(),
    };
    let (table, errors) = SniTable::build(TableSettings::default(), [object]);
    assert!(errors.is_empty());
    let challenge = Challenge {
        kind: ChallengeKind::TlsAlpn01,
        name: "a.test".to_owned(),
        token: "token".to_owned(),
        authorization: "token.thumb".to_owned(),
    };
    let pending = table.with_challenges([("a.test".into(), alpn_config(&challenge).unwrap())]);
    let provider = Arc::new(aws_lc_rs::default_provider());
    let client = |protocols: &[&[u8]]| {
        let mut config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody))
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        config
    };
    // critical, acmeIdentifier, and the hash in an octet string (RFC 8737, section 3).
    let mut extension = vec![0x04, 0x22, 0x04, 0x20];
    extension.extend_from_slice(digest(&SHA256, b"token.thumb").as_ref());
    let shown = |done: &Done| {
        let certificate = done.client.peer_certificates().unwrap()[0].to_vec();
        certificate.windows(extension.len()).any(|window| window == extension)
    };
    let acme = client(&[ACME_TLS]);
    let done = handshake(&pending, &acme, "A.test", 1 << 14).unwrap();
    assert!(shown(&done));
    assert_eq!(done.server.alpn_protocol(), Some(ACME_TLS));
    let usual = client(&[b"h2", b"http/1.1"]);
    assert!(!shown(&handshake(&pending, &usual, "a.test", 1 << 14).unwrap()), "a browser");
    let both = client(&[ACME_TLS, b"http/1.1"]);
    assert!(!shown(&handshake(&pending, &both, "a.test", 1 << 14).unwrap()), "no authority asks so");
    assert!(handshake(&pending, &acme, "b.test", 1 << 14).is_err(), "another name");
    assert!(handshake(&table, &acme, "a.test", 1 << 14).is_err(), "nothing is pending");
}
