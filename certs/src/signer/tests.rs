//! A pool and its nodes over real connections.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_ED25519, PKCS_RSA_SHA256,
    RsaKeySize, SanType,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
    SupportedProtocolVersion,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tonic::Code;

use super::access::{Clients, Rule};
use super::metrics::Reason;
use super::node::Credentials;
use super::pool::{Settings, SignError};
use super::proto::SignRequest;
use super::proto::signer_client::SignerClient;
use super::service::Limits;
use super::*;
use crate::ca::audit::Audit;
use crate::ca::limits::Rate;
use crate::grpc::{self, Dial};
use crate::testing::PATIENCE;
use crate::trust::Fingerprint;

const PLENTY: Limits = Limits { signers: 4, queue: 1024, rate: Rate { per_second: 1e9, burst: 1e9 } };

/// An authority for gateways and nodes.
struct Authority(CertifiedIssuer<'static, KeyPair>);

struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, name: &str, key: KeyPair) -> Identity {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity { chain: vec![certificate.der().clone()], key }
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        Arc::new(roots)
    }

    /// A gateway of this name.
    fn gateway(&self, name: &str) -> Credentials {
        let gateway = self.issue(name, KeyPair::generate().unwrap());
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots())
            .with_client_auth_cert(gateway.chain, der(&gateway.key))
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Credentials::Made(Arc::new(config))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn der(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::try_from(key.serialize_der()).unwrap()
}

/// A node, with a directory for its keys.
struct TestNode {
    address: String,
    keys: TempDir,
    service: Service,
    task: AbortHandle,
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TestNode {
    async fn start(authority: &Authority, limits: Limits, held: &[(&str, &KeyPair)]) -> Self {
        let keys = tempfile::tempdir().unwrap();
        held.iter().for_each(|(name, key)| put(keys.path(), name, key));
        let store = Arc::new(KeyStore::open(keys.path(), None).unwrap());
        let clients = Clients::new(vec![Rule::new("gw.test", ["*"]).unwrap()]);
        let audit = Audit::open(&keys.path().join("audit.log"), SystemTime::now()).unwrap();
        let service = Service::new(store, clients, Arc::new(Journal::new(audit)), limits);
        let node = authority.issue("signer.test", KeyPair::generate().unwrap());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(authority.roots(), provider()).build().unwrap();
        let mut tls = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(node.chain, der(&node.key))
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let limits = grpc::Limits { connections: 16, calls: 1024 };
        let serving = grpc::serve(listener, Some(Arc::new(tls)), limits, service.server());
        let task = tokio::spawn(serving).abort_handle();
        Self { address, keys, service, task }
    }
}

fn put(directory: &Path, name: &str, key: &KeyPair) {
    let path = directory.join(format!("{name}.pem"));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    file.write_all(key.serialize_pem().as_bytes()).unwrap();
}

fn settings(credentials: Credentials, nodes: &[&TestNode]) -> Settings {
    Settings {
        name: "main".into(),
        nodes: nodes.iter().map(|node| node.address.clone()).collect(),
        server_name: Some("signer.test".to_owned()),
        credentials,
        // Nothing here is slow but what is meant to be, and not even a machine with much to do fails by these.
        timeout: PATIENCE,
        deadline: 2 * PATIENCE,
        in_flight: 64,
    }
}

/// A pool all of whose nodes have been heard from.
async fn pool(settings: &Settings) -> Arc<Pool> {
    let pool = Pool::start(settings, &Handle::current());
    until(&pool, |pool| pool.nodes().iter().all(|node| node.is_up())).await;
    pool
}

async fn until(pool: &Pool, holds: impl Fn(&Pool) -> bool) {
    let mut changes = pool.changes();
    let held = async {
        while !holds(pool) {
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, held).await.expect("the pool gets there");
}

fn remote(leaf: &CertificateDer<'_>, pool: &Arc<Pool>, name: &str) -> Result<RemoteKey, NotOffered> {
    RemoteKey::of(leaf, pool, &name.into())
}

/// A handshake of TLS 1.3 that waits for its signature.
fn transcript() -> Vec<u8> {
    [&[b' '; 64][..], b"TLS 1.3, server CertificateVerify\0", &[7; 32]].concat()
}

async fn sign(key: &RemoteKey) -> Result<Vec<u8>, rustls::Error> {
    let schemes = [SignatureScheme::ECDSA_NISTP256_SHA256];
    let signer = key.choose_scheme(&schemes).unwrap();
    tokio::task::spawn_blocking(move || signer.sign(&transcript())).await.unwrap()
}

#[derive(Debug)]
struct One(Arc<CertifiedKey>);

impl ResolvesServerCert for One {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

/// A handshake in memory. Blocks.
fn shake(key: Arc<CertifiedKey>, roots: Arc<RootCertStore>, version: &'static SupportedProtocolVersion) {
    let client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(One(key)));
    let name = ServerName::try_from("shop.test").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut from = bytes.as_slice();
        while !from.is_empty() {
            server.read_tls(&mut from).unwrap();
            server.process_new_packets().unwrap();
        }
        bytes.clear();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut from = bytes.as_slice();
        while !from.is_empty() {
            client.read_tls(&mut from).unwrap();
            client.process_new_packets().unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_every_kind_sign_handshakes_of_both_versions() {
    let (authority, public) = (Authority::new(), Authority::new());
    let keys = [
        ("p256", KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()),
        ("p384", KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap()),
        ("p521", KeyPair::generate_for(&PKCS_ECDSA_P521_SHA512).unwrap()),
        ("ed25519", KeyPair::generate_for(&PKCS_ED25519).unwrap()),
        ("rsa", KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap()),
    ];
    let held: Vec<_> = keys.iter().map(|(name, key)| (*name, key)).collect();
    let node = TestNode::start(&authority, PLENTY, &held).await;
    let pool = pool(&settings(authority.gateway("gw.test"), &[&node])).await;
    for (name, key) in keys {
        let leaf = public.issue("shop.test", key);
        let remote = remote(&leaf.chain[0], &pool, name).unwrap();
        let certified = Arc::new(CertifiedKey::new(leaf.chain, Arc::new(remote)));
        certified.keys_match().unwrap();
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let (certified, roots) = (Arc::clone(&certified), public.roots());
            tokio::task::spawn_blocking(move || shake(certified, roots, version)).await.unwrap();
        }
    }
    assert_eq!(pool.totals().signed, 10);
    assert_eq!(node.service.numbers().signed, 10);
    assert_eq!(pool.nodes()[0].metrics().times().count, 10);
    node.service.journal().write(SystemTime::now()).unwrap();
    let log = std::fs::read_to_string(node.keys.path().join("audit.log")).unwrap();
    assert_eq!(log.lines().count(), 5, "{log}");
    assert!(log.contains("\"key\":\"rsa\"") && log.contains("\"count\":2"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_under_load_costs_no_signature() {
    let authority = Authority::new();
    let key = KeyPair::generate().unwrap();
    let first = TestNode::start(&authority, PLENTY, &[("shop", &key)]).await;
    let second = TestNode::start(&authority, PLENTY, &[("shop", &key)]).await;
    let pool = pool(&settings(authority.gateway("gw.test"), &[&first, &second])).await;
    let leaf = authority.issue("shop.test", key);
    let remote = Arc::new(remote(&leaf.chain[0], &pool, "shop").unwrap());
    let done = Arc::new(AtomicUsize::new(0));
    let mut load = JoinSet::new();
    for _ in 0..8 {
        let (remote, done) = (Arc::clone(&remote), Arc::clone(&done));
        load.spawn(async move {
            while done.fetch_add(1, Ordering::Relaxed) < 2000 {
                sign(&remote).await.unwrap();
            }
        });
    }
    let by_first = || first.service.numbers().signed > 50;
    tokio::time::timeout(PATIENCE, async {
        while !by_first() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    first.task.abort();
    load.join_all().await;
    assert_eq!(pool.totals().failed, 0);
    assert!(second.service.numbers().signed > 0);
    until(&pool, |pool| !pool.nodes()[0].is_up()).await;
    sign(&remote).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_finishes_and_sends_others_away() {
    let authority = Authority::new();
    let key = KeyPair::generate().unwrap();
    let first = TestNode::start(&authority, PLENTY, &[("shop", &key)]).await;
    let second = TestNode::start(&authority, PLENTY, &[("shop", &key)]).await;
    let pool = pool(&settings(authority.gateway("gw.test"), &[&first, &second])).await;
    let leaf = authority.issue("shop.test", key);
    let remote = remote(&leaf.chain[0], &pool, "shop").unwrap();
    first.service.stop(PATIENCE).await;
    for _ in 0..20 {
        sign(&remote).await.unwrap();
    }
    assert_eq!((pool.totals().failed, second.service.numbers().signed), (0, 20));
    pool.look_again(PATIENCE).await;
    assert!(!pool.nodes()[0].is_up() && pool.nodes()[1].is_up());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_says_nothing_is_left_after_the_time_for_one_call() {
    let authority = Authority::new();
    let key = KeyPair::generate().unwrap();
    let silent = TestNode::start(&authority, Limits { signers: 1, ..PLENTY }, &[("shop", &key)]).await;
    let mut settings = settings(authority.gateway("gw.test"), &[&silent]);
    settings.timeout = Duration::from_millis(300);
    let pool = Pool::start(&settings, &Handle::current());
    until(&pool, |pool| pool.nodes()[0].is_up()).await;
    let leaf = authority.issue("shop.test", key);
    let remote = remote(&leaf.chain[0], &pool, "shop").unwrap();
    // All places are taken by somebody who does not give them back.
    let _place = silent.service.take_all_places();
    let error = sign(&remote).await.unwrap_err().to_string();
    assert!(error.contains("no signature within 300 ms"), "{error}");
    let failures: Vec<_> = pool.nodes()[0].metrics().failures().collect();
    assert!(failures.contains(&(Reason::Timeout, 1)), "{failures:?}");
    assert_eq!((pool.totals().failed, pool.nodes()[0].in_flight()), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_node_signatures_are_refused_and_wait_for_one_only_so_long() {
    let authority = Authority::new();
    let key = KeyPair::generate().unwrap();
    let mut settings = settings(authority.gateway("gw.test"), &[]);
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    settings.nodes.push(gone.local_addr().unwrap().to_string());
    drop(gone);
    settings.timeout = Duration::from_millis(200);
    settings.in_flight = 1;
    let pool = Pool::start(&settings, &Handle::current());
    let leaf = authority.issue("shop.test", key);
    // Nobody has said anything of its keys: it may well be there.
    let remote = remote(&leaf.chain[0], &pool, "shop").unwrap();
    let place = pool.place().await.unwrap();
    assert!(pool.place().await.is_err(), "there is one place");
    assert_eq!(pool.totals().crowded, 1);
    drop(place);
    let error = sign(&remote).await.unwrap_err().to_string();
    assert!(error.contains("none of them answers"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_and_a_key_that_do_not_belong_together_are_told() {
    let authority = Authority::new();
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let node = TestNode::start(&authority, PLENTY, &[("shop", &key)]).await;
    let pool = pool(&settings(authority.gateway("gw.test"), &[&node])).await;
    let leaf = authority.issue("shop.test", other);
    assert!(matches!(remote(&leaf.chain[0], &pool, "shop"), Err(NotOffered::Mismatch { .. })));
    let error = remote(&leaf.chain[0], &pool, "bank").unwrap_err().to_string();
    assert!(error.contains("`bank`") && error.contains("it offers: shop"), "{error}");

    // A key that is put there is found when the pool looks again.
    put(node.keys.path(), "bank", &leaf.key);
    node.service.keys().reload().unwrap();
    pool.look_again(PATIENCE).await;
    let bank = remote(&leaf.chain[0], &pool, "bank").unwrap();
    sign(&bank).await.unwrap();
    // And one that was exchanged on the node does not sign for the certificate of the former.
    std::fs::remove_file(node.keys.path().join("bank.pem")).unwrap();
    put(node.keys.path(), "bank", &KeyPair::generate().unwrap());
    node.service.keys().reload().unwrap();
    let error = sign(&bank).await.unwrap_err().to_string();
    assert!(error.contains("the key `bank` of this signer is"), "{error}");
    let unread = remote(&CertificateDer::from(vec![1]), &pool, "shop");
    assert!(matches!(unread, Err(NotOffered::Certificate(_))));
}

/// Leads to a node. What that one says waits while it is held; whether something does is told.
async fn pipe(to: String) -> (String, watch::Sender<bool>, watch::Receiver<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (hold, waits) = (watch::Sender::new(false), watch::Sender::new(false));
    let (held, waiting) = (hold.subscribe(), waits.subscribe());
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let node = TcpStream::connect(to).await.unwrap();
        let ((mut from_client, mut to_client), (mut from_node, mut to_node)) =
            (client.into_split(), node.into_split());
        tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_node).await });
        let (mut held, mut buffer) = (held, vec![0; 16 * 1024]);
        while let Ok(count @ 1..) = from_node.read(&mut buffer).await {
            if *held.borrow() {
                waits.send_replace(true);
            }
            if held.wait_for(|held| !held).await.is_err()
                || to_client.write_all(&buffer[..count]).await.is_err()
            {
                return;
            }
        }
    });
    (address, hold, waiting)
}

#[tokio::test]
async fn an_answer_that_was_on_its_way_is_not_what_is_looked_for() {
    let authority = Authority::new();
    let node = TestNode::start(&authority, PLENTY, &[("shop", &KeyPair::generate().unwrap())]).await;
    let (address, hold, mut waiting) = pipe(node.address.clone()).await;
    let settings = Settings { nodes: vec![address], ..settings(authority.gateway("gw.test"), &[]) };
    let pool = pool(&settings).await;
    hold.send_replace(true);
    pool.look_again(Duration::from_millis(1)).await;
    waiting.wait_for(|waits| *waits).await.unwrap();
    let leaf = authority.issue("bank.test", KeyPair::generate().unwrap());
    put(node.keys.path(), "bank", &leaf.key);
    node.service.keys().reload().unwrap();
    tokio::join!(pool.look_again(PATIENCE), async { hold.send_replace(false) });
    remote(&leaf.chain[0], &pool, "bank").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_other_messages_are_refused() {
    let authority = Authority::new();
    let key = KeyPair::generate().unwrap();
    let limits = Limits { rate: Rate { per_second: 1e-9, burst: 3.0 }, ..PLENTY };
    let node = TestNode::start(&authority, limits, &[("shop", &key)]).await;
    let connect = |credentials: Credentials| {
        let Credentials::Made(tls) = credentials else { panic!() };
        let server = node.address.clone();
        async move {
            let dial =
                Dial { server, tls: Some(tls), server_name: Some("signer.test".into()), patience: None };
            dial.connect().await.map(SignerClient::new)
        }
    };
    let leaf = authority.issue("shop.test", key);
    let public_key = {
        use rcgen::PublicKeyData;
        Fingerprint::of(&leaf.key.subject_public_key_info()).as_bytes().to_vec()
    };
    let good = SignRequest { key: "shop".into(), public_key, scheme: 0x0403, message: transcript() };

    // A certificate of another authority: no handshake, whichever side finds out first.
    let Credentials::Made(foreign) = Authority::new().gateway("gw.test") else { panic!() };
    let mut foreign = (*foreign).clone();
    foreign.dangerous().set_certificate_verifier(Arc::new(crate::unverified::Unverified(provider())));
    let refused = match connect(Credentials::Made(Arc::new(foreign))).await {
        Err(_) => true,
        Ok(mut client) => client.sign(good.clone()).await.is_err(),
    };
    assert!(refused);
    assert_eq!(node.service.numbers().signed, 0);

    let mut stranger = connect(authority.gateway("other.test")).await.unwrap();
    assert_eq!(stranger.sign(good.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    let mut client = connect(authority.gateway("gw.test")).await.unwrap();
    let oracle = SignRequest { message: b"eyJhbGciOiJFUzI1NiJ9.e30".to_vec(), ..good.clone() };
    assert_eq!(client.sign(oracle).await.unwrap_err().code(), Code::InvalidArgument);
    let other = SignRequest { scheme: 0x0804, ..good.clone() };
    assert_eq!(client.sign(other).await.unwrap_err().code(), Code::InvalidArgument);
    client.sign(good.clone()).await.unwrap();
    assert_eq!(client.sign(good).await.unwrap_err().code(), Code::ResourceExhausted);
    assert_eq!(node.service.numbers().refused, [1, 0, 0, 1, 1, 1, 0, 0]);
}

#[test]
fn a_pool_says_what_went_wrong_in_one_line() {
    let failure = |node: &str, reason, problem: &str| node::Failure {
        node: node.into(),
        reason,
        problem: problem.to_owned(),
    };
    let failures = vec![
        failure("10.0.0.1:7443", Reason::Timeout, "no signature within 500 ms"),
        failure("10.0.0.2:7443", Reason::Lost, "connection refused"),
    ];
    let error = SignError::All { pool: "main".into(), failures }.to_string();
    assert_eq!(
        error,
        "the signers of the pool `main` do not sign: 10.0.0.1:7443: no signature within 500 ms; \
         10.0.0.2:7443: connection refused"
    );
}
