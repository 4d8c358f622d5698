//! The door for clients of Istio: who gets what, who is refused, and rotations that wait for those who say nothing.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::door::{Door, Origin};
use super::*;
use crate::ca::attest::kubernetes::{self, Kubernetes};
use crate::ca::attest::token::{JoinTokens, NewToken};
use crate::ca::audit::Audit;
use crate::ca::authority::{KeyKind, pem_certificates};
use crate::ca::fleet::Fleet;
use crate::ca::foundry::Foundry;
use crate::ca::keeper::Keeper;
use crate::ca::limits::{Limits, Rate};
use crate::ca::record::Lifetimes;
use crate::ca::rotation::command::{Command, NewRoot, Rotate};
use crate::ca::rotation::{Kind, Policy, State, driver, plan};
use crate::ca::seal::Sealer;
use crate::ca::service::Parts;
use crate::ca::store::memory::Memory;
use crate::ca::store::{FLEET, Store};
use crate::ca::{RootState, server};
use crate::clock::{Clock, ManualClock};
use crate::grpc::{self, Dial};
use crate::identity::TrustDomain;
use crate::istio::proto::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::svid::Svid;
use crate::trust::{Trust, Usage};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const ORDERS: &str = "spiffe://mesh.local/ns/shop/sa/orders";

fn domain() -> TrustDomain {
    "mesh.local".parse().unwrap()
}

/// A cluster that knows tokens `NAMESPACE/ACCOUNT/POD`.
async fn cluster(dir: &std::path::Path) -> Kubernetes {
    let token = dir.join("own");
    std::fs::write(&token, "own").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = String::new();
            while !request.ends_with("}}") {
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer).await.unwrap();
                assert!(read > 0);
                request.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
            }
            let asked: serde_json::Value =
                serde_json::from_str(request.split("\r\n\r\n").nth(1).unwrap()).unwrap();
            let token = asked["spec"]["token"].as_str().unwrap().to_owned();
            let parts: Vec<&str> = token.split('/').collect();
            let status = match parts[..] {
                [namespace, account, pod] => json!({
                    "authenticated": true, "audiences": asked["spec"]["audiences"],
                    "user": {"username": format!("system:serviceaccount:{namespace}:{account}"),
                        "extra": {"authentication.kubernetes.io/pod-name": [pod]}},
                }),
                _ => json!({"authenticated": false}),
            };
            let body = json!({"status": status}).to_string();
            let head = format!("HTTP/1.1 201 Created\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(head.as_bytes()).await.unwrap();
        }
    });
    let settings = kubernetes::Settings { server, ca: None, token, audience: "istio-ca".to_owned() };
    Kubernetes::new(settings).unwrap()
}

/// An authority at work, with the door; ends when it is dropped.
struct Ca {
    clock: ManualClock,
    keeper: Arc<Keeper>,
    store: Arc<dyn Store>,
    tokens: Arc<JoinTokens>,
    service: Service,
    front: Arc<Front>,
    dir: tempfile::TempDir,
    _tasks: JoinSet<()>,
}

impl Ca {
    async fn start() -> Self {
        Self::with(Rate { per_second: 1000.0, burst: 1000.0 }).await
    }

    /// With this many certificates for a process.
    async fn with(identity: Rate) -> Self {
        let clock = ManualClock::new(SystemTime::now());
        let now = clock.now();
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(Memory::default());
        let sealer = Arc::new(Sealer::random().unwrap());
        let foundry = Arc::new(Foundry::new(Arc::clone(&sealer), KeyKind::P256));
        let record = foundry.found("mesh.local", Lifetimes::default(), now.into()).unwrap();
        driver::found(&*store, &record).await.unwrap();
        let audit = Arc::new(Audit::open(&dir.path().join("audit.log"), now).unwrap());
        let opened = Keeper::open(Arc::clone(&store), foundry, Arc::new(clock.clone()), "ca-1", |driver| {
            // Time goes by hours, and the record is read all the same.
            driver.signing_unread(1000 * DAY)
        });
        let keeper = opened.await.unwrap().unwrap();
        let tokens = Arc::new(JoinTokens::new(Arc::clone(&store)));
        let service = Service::new(Parts {
            current: keeper.current(),
            acks: keeper.clone(),
            attestors: Attestors::default(),
            audit,
            limits: Limits { identity, ..Limits::default() },
            sealer,
            clock: Arc::new(clock.clone()),
        });
        let service = service.unwrap();
        let attestors = Attestors {
            tokens: Some(Arc::clone(&tokens)),
            kubernetes: Some(cluster(dir.path()).await),
            consul: None,
        };
        let accounts = ["istio-system/ztunnel".to_owned()].into();
        let front = Arc::new(Front::new(service.clone(), attestors, accounts));
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&keeper).run());
        Self { clock, keeper, store, tokens, service, front, dir, _tasks: tasks }
    }

    async fn token(&self, identity: &str) -> String {
        let new = NewToken {
            identity: identity.parse().unwrap(),
            ttl: DAY,
            uses: 1,
            dns_names: Vec::new(),
            longest_ttl: None,
        };
        self.tokens.create(new, &domain(), self.clock.now()).await.unwrap().0.to_string()
    }

    /// As a call without its socket.
    async fn call(&self, asked: Asked<'_>) -> Result<Client, Status> {
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        let fields = asked.wanted.map(|said| {
            let value = proto::Value { string_value: said.to_owned() };
            (IMPERSONATED.to_owned(), value)
        });
        let mut request = Request::new(proto::IstioCertificateRequest {
            csr: asked.csr.unwrap_or(csr),
            validity_duration: asked.ttl,
            metadata: Some(proto::Struct { fields: fields.into_iter().collect() }),
        });
        for value in asked.authorization {
            request.metadata_mut().append("authorization", value.parse().unwrap());
        }
        let chain = asked.shows.map(|client| client.chain().into()).unwrap_or_default();
        let address = Some("127.0.0.1:9".parse().unwrap());
        request.extensions_mut().insert(Caller { chain, address, ..Caller::default() });
        let mut answer = self.front.create_certificate(request).await?.into_inner().cert_chain;
        let roots = pem_certificates(answer.pop().unwrap().as_bytes()).unwrap();
        let chain = pem_certificates(answer.concat().as_bytes()).unwrap();
        assert_eq!(chain.len(), answer.len(), "one to an entry");
        Ok(Client {
            svid: Svid::new(chain, &crate::ca::authority::pem_key(key.serialize_pem().as_bytes()).unwrap())
                .unwrap(),
            roots,
        })
    }

    async fn pod(&self, name: &str) -> Client {
        let token = format!("Bearer shop/orders/{name}");
        self.call(Asked { authorization: &[&token], ..Asked::default() }).await.unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("audit.log")).unwrap()
    }

    fn state(&self) -> Option<State> {
        self.keeper.driver().now().record.rotation.as_ref().map(|rotation| rotation.state)
    }

    async fn begin_root(&self) {
        let policy = Policy { soak_ms: 1000, ..plan::policy(&self.keeper.driver().now().record) };
        let rotate = Rotate { kind: Kind::Root, policy, root: NewRoot::Usual, reason: "test".to_owned() };
        self.keeper.driver().command(&Command::Rotate(rotate), "test").await.unwrap();
    }

    /// While time goes on by a minute at a time, for a day and a half at most.
    async fn until(&self, what: &str, mut is: impl FnMut() -> bool) {
        for _ in 0..2160 {
            let _ = self.keeper.driver().tick().await;
            if is() {
                return self.published().await;
            }
            self.clock.advance(Duration::from_secs(60));
        }
        panic!("never: {what}: {:?} {:?}", self.state(), self.keeper.driver().waiting());
    }

    /// Until the service reads what the record says.
    async fn published(&self) {
        let generation = self.keeper.driver().now().record.bundle.generation;
        let mut current = self.keeper.current();
        let same = current.wait_for(|current| current.bundle().generation == generation);
        tokio::time::timeout(Duration::from_secs(30), same).await.unwrap().unwrap();
    }

    /// Whom the rotation waits for.
    fn culprits(&self) -> Vec<String> {
        let blockers = self.keeper.driver().waiting().blockers;
        blockers.iter().flat_map(|one| &one.culprits).map(|one| one.who.clone()).collect()
    }
}

#[derive(Default)]
struct Asked<'a> {
    authorization: &'a [&'a str],
    shows: Option<&'a Client>,
    csr: Option<String>,
    ttl: i64,
    wanted: Option<&'a str>,
}

/// Somebody who was handed a certificate and roots.
#[derive(Debug)]
struct Client {
    svid: Svid,
    roots: Vec<CertificateDer<'static>>,
}

impl Client {
    fn chain(&self) -> &[CertificateDer<'static>] {
        self.svid.chain()
    }

    /// Whether this one accepts the other.
    fn accepts(&self, other: &Client, now: SystemTime) -> bool {
        let trust = Trust::new(domain(), 1).with_roots(&domain(), self.roots.iter().cloned()).unwrap();
        trust.verify(other.chain(), Usage::Server, now).is_ok()
    }
}

#[tokio::test]
async fn a_pod_gets_its_own_identity_and_all_roots_whatever_it_asks_for() {
    let ca = Ca::start().await;
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        vec![rcgen::SanType::URI("spiffe://mesh.local/ns/shop/sa/admin".try_into().unwrap())];
    let csr = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
    let mut request = Request::new(proto::IstioCertificateRequest {
        csr,
        validity_duration: 1_000_000_000,
        metadata: None,
    });
    request.metadata_mut().insert("authorization", "bearer shop/orders/a".parse().unwrap());
    let answer = ca.front.create_certificate(request).await.unwrap().into_inner();
    assert!(answer.root_cert.is_none());
    let leaf = Peer::read(&pem_certificates(answer.cert_chain[0].as_bytes()).unwrap()[0]).unwrap();
    assert_eq!(leaf.id.as_str(), ORDERS);
    let left = leaf.not_after.duration_since(ca.clock.now()).unwrap();
    assert!(left <= DAY && left > DAY - HOUR, "{left:?}");

    let client = ca.pod("a").await;
    assert_eq!(client.chain().len(), 2);
    assert_eq!(client.roots, [ca.service.current().bundle().roots[0].certificate.clone()]);
    assert!(client.accepts(&client, ca.clock.now()));
    let asked = Asked { authorization: &["Bearer shop/orders/a"], ttl: 600, ..Asked::default() };
    let short = ca.call(asked).await.unwrap();
    assert!(short.svid.left(ca.clock.now()) <= Duration::from_secs(600));
    let log = ca.log();
    assert!(log.contains("\"proxy_id\":\"istio:shop/a\"") && log.contains("pod shop/a"), "{log}");
    let calls = ca.service.numbers().calls;
    assert_eq!(calls.get(&(CALL, "kubernetes".to_owned(), "ok")), Some(&3));
}

#[tokio::test]
async fn who_shows_nothing_good_is_refused_with_the_reason() {
    let ca = Ca::start().await;
    let used = format!("Bearer {}", ca.token(ORDERS).await);
    ca.call(Asked { authorization: &[&used], ..Asked::default() }).await.unwrap();
    let of_many = format!("Bearer {}", ca.token("spiffe://mesh.local/ns/shop/*").await);
    let weak = format!(
        "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
        include_str!("../csr/rsa1024.b64").trim()
    );
    let (used, of_many) = ([used.as_str()], [of_many.as_str()]);
    let good = ["Bearer shop/orders/a"];
    let with = |authorization| Asked { authorization, ..Asked::default() };
    let cases: Vec<(Asked<'_>, Code, &str)> = vec![
        (with(&[]), Code::Unauthenticated, "show a token"),
        (with(&["Bearer wrong"]), Code::Unauthenticated, "does not know the token"),
        (with(&["Basic eDp5"]), Code::Unauthenticated, "`Bearer TOKEN`"),
        (with(&["Bearer "]), Code::Unauthenticated, "`Bearer TOKEN`"),
        (with(&["Bearer shop/orders/a", "Bearer shop/admin/a"]), Code::InvalidArgument, "several"),
        (with(&["Bearer pjt_unknown"]), Code::Unauthenticated, "is not known"),
        (with(&used), Code::Unauthenticated, "used already"),
        (with(&of_many), Code::PermissionDenied, "say which identity"),
        (Asked { ttl: -1, ..with(&good) }, Code::InvalidArgument, "validity_duration"),
        (Asked { csr: Some(String::new()), ..with(&good) }, Code::InvalidArgument, "CERTIFICATE REQUEST"),
        (Asked { csr: Some("-----BEGIN X".to_owned()), ..with(&good) }, Code::InvalidArgument, "the csr"),
        (Asked { csr: Some(weak), ..with(&good) }, Code::InvalidArgument, "RSA of 1024 bits"),
        (Asked { wanted: Some(ORDERS), ..with(&good) }, Code::PermissionDenied, "`istio.node_accounts`"),
        (Asked { wanted: Some(ORDERS), ..with(&[]) }, Code::Unauthenticated, "has to show its token"),
        (Asked { wanted: Some("orders"), ..with(&good) }, Code::InvalidArgument, "ImpersonatedIdentity"),
    ];
    for (asked, code, words) in cases {
        let status = ca.call(asked).await.unwrap_err();
        assert_eq!(status.code(), code, "{words}: {status}");
        assert!(status.message().contains(words), "{words}: {status}");
    }
    let revoke = Command::Revoke { what: ORDERS.to_owned(), reason: "test".to_owned() };
    ca.keeper.driver().command(&revoke, "test").await.unwrap();
    ca.published().await;
    let status = ca.call(with(&good)).await.unwrap_err();
    assert_eq!((status.code(), status.message().contains("is revoked")), (Code::PermissionDenied, true));
    assert!(ca.log().contains("used already"));
}

#[tokio::test]
async fn a_certificate_that_holds_is_proof_enough_and_renews_the_same_process() {
    let ca = Ca::start().await;
    let token = format!("Bearer {}", ca.token(ORDERS).await);
    let client = ca.call(Asked { authorization: &[&token], ..Asked::default() }).await.unwrap();
    ca.clock.advance(12 * HOUR);
    // The token is used up; it is not looked at.
    let asked = Asked { authorization: &[&token], shows: Some(&client), ..Asked::default() };
    let renewed = ca.call(asked).await.unwrap();
    assert_eq!(renewed.svid.id().as_str(), ORDERS);
    let members = ca.keeper.driver().view().members;
    assert_eq!(members.len(), 1, "{members:?}");
    assert!(members[0].id.starts_with("istio:request/"), "{}", members[0].id);
    // One that has ended proves nothing; a token does, and so it is somebody new.
    ca.clock.advance(DAY + Duration::from_secs(60));
    let status = ca.call(Asked { shows: Some(&renewed), ..Asked::default() }).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let asked = Asked { authorization: &["Bearer shop/orders/a"], shows: Some(&renewed), ..Asked::default() };
    ca.call(asked).await.unwrap();
    assert_eq!(ca.keeper.driver().view().members.len(), 2);
}

#[tokio::test]
async fn who_asks_too_often_is_told_when_to_come_back() {
    let ca = Ca::with(Rate { per_second: 0.1, burst: 2.0 }).await;
    ca.pod("a").await;
    ca.pod("a").await;
    let asked = || Asked { authorization: &["Bearer shop/orders/a"], ..Asked::default() };
    let status = ca.call(asked()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let wait = crate::ca::service::retry_after(&status).unwrap();
    assert!(wait > Duration::ZERO && wait <= Duration::from_secs(10), "{wait:?}");
    ca.pod("b").await;
    ca.clock.advance(wait);
    ca.call(asked()).await.unwrap();
}

#[tokio::test]
async fn an_answer_is_written_down_before_it_goes_out() {
    let ca = Ca::start().await;
    let client = ca.pod("a").await;
    // As a process that starts after this one was killed.
    let after = Fleet::default();
    for (_, part) in ca.store.list(FLEET).await.unwrap() {
        after.restore(&part.value);
    }
    let serial = client.svid.leaf().serial.to_string();
    assert_eq!(after.holder(ORDERS, &serial).as_deref(), Some("istio:shop/a"));
}

#[tokio::test]
async fn a_root_stays_until_those_who_say_nothing_have_the_new_one_and_use_it() {
    let ca = Ca::start().await;
    let (first, second) = (ca.pod("a").await, ca.pod("b").await);
    ca.begin_root().await;
    ca.until("it waits for both", || ca.state() == Some(State::Verifying)).await;
    ca.until("it says so", || ca.culprits().len() == 2).await;
    let who = ca.culprits();
    assert!(who.iter().all(|one| one.starts_with("istio:shop/")), "{who:?}");
    let both = ca.service.current().bundle().roots.len();
    assert_eq!(both, 2, "the old root is trusted");

    // One renews: it has both roots and is believed by who has the old one alone.
    let renewed = ca.pod("a").await;
    assert_eq!(renewed.roots.len(), 2);
    assert_eq!(renewed.roots[1], first.roots[0], "the root that signs comes first");
    let now = ca.clock.now();
    assert!(second.accepts(&renewed, now) && renewed.accepts(&second, now));
    ca.until("the answer has arrived", || ca.culprits().len() == 1).await;
    assert_eq!(ca.culprits(), [format!("istio:shop/b ({ORDERS})")]);
    assert_eq!(ca.state(), Some(State::Verifying));

    // The other one never comes again: its certificate has to end.
    ca.until("it is over", || ca.state().is_none()).await;
    assert!(second.svid.left(ca.clock.now()).is_zero());
    let current = ca.service.current();
    assert_eq!(current.bundle().roots.len(), 1);
    assert_eq!(current.bundle().roots[0].certificate, renewed.roots[0]);
    assert_eq!(current.bundle().roots[0].state, RootState::Active);
}

#[tokio::test]
async fn an_answer_that_is_asked_for_again_does_not_count() {
    let ca = Ca::start().await;
    let _first = ca.pod("a").await;
    ca.begin_root().await;
    ca.until("it waits", || ca.culprits().len() == 1 && ca.state() == Some(State::Verifying)).await;
    // Nothing of what it is sent arrives: it asks every two minutes.
    for _ in 0..60 {
        ca.pod("a").await;
        ca.clock.advance(Duration::from_secs(120));
        ca.keeper.driver().tick().await.unwrap();
        assert_eq!((ca.state(), ca.culprits().len()), (Some(State::Verifying), 1));
    }
    ca.until("it is quiet", || ca.state().is_none()).await;
}

async fn served(ca: &Ca, origin: Origin) -> (SocketAddr, JoinSet<()>) {
    let door = Door::open(origin, ca.service.clone()).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    let (tls, front) =
        (door.config().unwrap(), Front::new(ca.service.clone(), Attestors::default(), Accounts::new()));
    tasks.spawn(server::istio(front, listener, tls, std::future::pending()));
    tasks.spawn(door.keep());
    (address, tasks)
}

/// What the door says to who believes these roots and expects this name.
async fn knock(
    ca: &Ca,
    address: SocketAddr,
    roots: &[CertificateDer<'static>],
    name: &str,
) -> Result<Status, String> {
    let file = ca.dir.path().join("believed.pem");
    std::fs::write(&file, roots.iter().map(authority::pem).collect::<String>()).unwrap();
    let dial = Dial {
        server: address.to_string(),
        tls: Some(grpc::client_tls(Some(&file), None).unwrap()),
        server_name: Some(name.to_owned()),
        patience: None,
    };
    let mut client = IstioCertificateServiceClient::new(dial.connect().await?);
    Ok(client.create_certificate(proto::IstioCertificateRequest::default()).await.unwrap_err())
}

fn roots(ca: &Ca) -> Vec<CertificateDer<'static>> {
    ca.service.current().bundle().roots.iter().map(|root| root.certificate.clone()).collect()
}

#[tokio::test]
async fn the_door_is_known_by_its_name_and_the_roots_and_follows_rotations() {
    let ca = Ca::start().await;
    let names = vec!["istiod.istio-system.svc".to_owned(), "ca.test".to_owned()];
    let (address, _tasks) = served(&ca, Origin::Names(names)).await;
    let old = roots(&ca);
    for name in ["istiod.istio-system.svc", "ca.test"] {
        assert_eq!(knock(&ca, address, &old, name).await.unwrap().code(), Code::InvalidArgument);
    }
    let wrong = knock(&ca, address, &old, "other.test").await.unwrap_err();
    assert!(wrong.contains("not valid for"), "{wrong}");

    ca.begin_root().await;
    ca.until("the new root signs", || ca.state() == Some(State::Retiring)).await;
    let new: Vec<_> = roots(&ca).into_iter().filter(|root| !old.contains(root)).collect();
    let mut told = Err(String::new());
    for _ in 0..1000 {
        told = knock(&ca, address, &new, "ca.test").await;
        if told.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(told.unwrap().code(), Code::InvalidArgument);
    assert!(
        knock(&ca, address, &old, "ca.test").await.is_ok(),
        "over the old root too, as long as it is there"
    );
}

#[tokio::test]
async fn a_certificate_from_files_is_read_again_and_a_wrong_one_does_not_replace_it() {
    let ca = Ca::start().await;
    let (certificate, key) = (ca.dir.path().join("door.pem"), ca.dir.path().join("door.key"));
    let write = |name: &str| {
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        vec![made.cert.der().clone()]
    };
    let origin = Origin::Files { certificate: certificate.clone(), key: key.clone() };
    let missing = Door::open(origin.clone(), ca.service.clone()).await.unwrap_err();
    assert!(missing.contains("door.pem"), "{missing}");
    let first = write("one.test");
    let (address, _tasks) = served(&ca, origin).await;
    assert!(knock(&ca, address, &first, "one.test").await.is_ok());
    std::fs::write(&certificate, "half").unwrap();
    ca.clock.advance(Duration::from_secs(60));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(knock(&ca, address, &first, "one.test").await.is_ok());
    let second = write("two.test");
    for _ in 0..1000 {
        ca.clock.advance(Duration::from_secs(60));
        if knock(&ca, address, &second, "two.test").await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the new certificate is never shown");
}
