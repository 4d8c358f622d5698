//! An authority and workloads over real sockets, with clocks that are moved by days.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use futures_util::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::*;
use crate::ca::attest::Attestors;
use crate::ca::attest::token::{JoinTokens, NewToken};
use crate::ca::audit::{self, Audit};
use crate::ca::authority::{Authority, KeyKind};
use crate::ca::limits::Limits;
use crate::ca::seal::Sealer;
use crate::ca::service::{Parts, Service};
use crate::ca::store::memory::Memory;
use crate::ca::{Ack, Acks, BundleRoot, Current, Handed, Renew, RootState, channel, server};
use crate::clock::{Clock, ManualClock};
use crate::identity::TrustDomain;
use crate::trust::{Revoked, Serial};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

fn begin() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn domain() -> TrustDomain {
    "mesh.local".parse().unwrap()
}

fn id(name: &str) -> SpiffeId {
    format!("spiffe://mesh.local/ns/default/sa/{name}").parse().unwrap()
}

/// Until it is so; long enough for a machine under load.
async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

#[derive(Debug, Default)]
struct Heard(Mutex<BTreeMap<String, Ack>>);

impl Heard {
    fn ack(&self, proxy_id: &str) -> Option<Ack> {
        self.0.lock().unwrap().get(proxy_id).cloned()
    }
}

impl Acks for Heard {
    fn heard(&self, ack: Ack) {
        self.0.lock().unwrap().insert(ack.proxy_id.clone(), ack);
    }

    fn gone(&self, _: &SpiffeId, _: &str) {}

    fn left(&self, _: &SpiffeId, proxy_id: &str) {
        self.0.lock().unwrap().remove(proxy_id);
    }

    fn signed(&self, _: &SpiffeId, _: &str, _: &KeyId, _: SystemTime) {}

    fn handed(&self, _: Handed<'_>) {}

    fn holder(&self, _: &SpiffeId, _: &Serial) -> Option<String> {
        None
    }

    fn written(&self) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A way to the authority that can be cut.
struct Gate {
    address: SocketAddr,
    open: watch::Sender<bool>,
    _task: Tasks,
}

impl Gate {
    async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let open = watch::Sender::new(true);
        let gate = open.subscribe();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                if !*gate.borrow() {
                    continue;
                }
                let mut gate = gate.clone();
                connections.spawn(async move {
                    let Ok(mut server) = TcpStream::connect(server).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = gate.wait_for(|open| !open) => {}
                    }
                });
            }
        })
        .abort_handle();
        Self { address, open, _task: Tasks([task.clone(), task]) }
    }
}

struct Ca {
    clock: ManualClock,
    root: Authority,
    current: watch::Sender<Arc<Current>>,
    tokens: Arc<JoinTokens>,
    heard: Arc<Heard>,
    service: Service,
    pin: Pin,
    gate: Gate,
    dir: tempfile::TempDir,
    _stop: oneshot::Sender<()>,
}

impl Ca {
    async fn start(clock: ManualClock) -> Self {
        Self::with(clock, Limits::default()).await
    }

    async fn with(clock: ManualClock, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Arc::new(Sealer::random().unwrap());
        let now = clock.now();
        let root = Authority::root(&domain(), KeyKind::P256, 3650 * DAY, now).unwrap();
        let issuer = root.intermediate(&domain(), KeyKind::P256, 365 * DAY, now).unwrap();
        let bundle = Bundle {
            trust_domain: domain(),
            generation: 1,
            least_generation: 0,
            least_connection_generation: 0,
            roots: vec![BundleRoot { certificate: root.certificate().clone(), state: RootState::Active }],
            revoked: Revoked::default(),
            shadow_roots: Vec::new(),
            made: now,
        };
        let current = Current::new(bundle).unwrap().with_issuer(Arc::new(issuer));
        let current = watch::Sender::new(Arc::new(current));
        let store = Arc::new(Memory::default());
        let key = channel::key(&*store, &sealer).await.unwrap();
        let tokens = Arc::new(JoinTokens::new(store));
        let heard = Arc::new(Heard::default());
        let parts = Parts {
            current: current.subscribe(),
            acks: heard.clone(),
            attestors: Attestors { tokens: Some(tokens.clone()), kubernetes: None, consul: None },
            audit: Arc::new(Audit::open(&dir.path().join("audit.log"), now).unwrap()),
            limits,
            sealer,
            clock: Arc::new(clock.clone()),
        };
        let service = Service::new(parts).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gate = Gate::before(listener.local_addr().unwrap()).await;
        let (stop, stopped) = oneshot::channel();
        let tls = channel::server(&key, now).unwrap();
        tokio::spawn(server::workloads(service.clone(), listener, tls, async { drop(stopped.await) }));
        Self { clock, root, current, tokens, heard, service, pin: Pin::of(&key), gate, dir, _stop: stop }
    }

    async fn token(&self, name: &str, uses: u32) -> Proof {
        let new = NewToken {
            identity: id(name).into(),
            ttl: 300 * DAY,
            uses,
            dns_names: vec![format!("{name}.test")],
            longest_ttl: None,
        };
        Proof::JoinToken(self.tokens.create(new, &domain(), self.clock.now()).await.unwrap().0)
    }

    fn settings(&self, proof: Proof, proxy_id: &str) -> Settings {
        Settings {
            servers: vec![self.gate.address.to_string()],
            pins: Arc::from([self.pin]),
            proof: Some(proof),
            identity: None,
            proxy_id: proxy_id.to_owned(),
            version: "test".to_owned(),
            ttl: None,
        }
    }

    fn workload(&self, proof: Proof, proxy_id: &str) -> Member {
        Member::start(self.settings(proof, proxy_id), self.clock.clone())
    }

    fn publish(&self, change: impl FnOnce(&mut Bundle)) {
        let before = self.current.borrow().clone();
        let mut bundle = before.bundle().clone();
        bundle.generation += 1;
        change(&mut bundle);
        self.replace(&before, bundle, |_| {});
    }

    fn change(&self, change: impl FnOnce(&mut Current)) {
        let before = self.current.borrow().clone();
        self.replace(&before, before.bundle().clone(), change);
    }

    /// What is not changed stays as it was `before`.
    fn replace(&self, before: &Current, bundle: Bundle, change: impl FnOnce(&mut Current)) {
        let mut current = Current::new(bundle).unwrap();
        current.issuer = before.issuer.clone();
        current.former_roots = before.former_roots.clone();
        current.renew = before.renew.clone();
        current.renew_expired = before.renew_expired;
        change(&mut current);
        self.current.send_replace(Arc::new(current));
    }

    /// A call without a workload, by a session of this proof.
    async fn call(&self, proof: &Proof, svid: Option<&Svid>) -> Result<(Call, proto::Session), Failure> {
        let address = self.gate.address.to_string();
        let mut call = Call::connect(&address, Arc::from([self.pin]), svid).await?;
        let session = call.attest(read_proof(proof).await.unwrap(), None).await?;
        Ok((call, session))
    }
}

/// A workload with its identity.
struct Member {
    workload: Workload,
    identity: MeshIdentity,
    status: watch::Receiver<Status>,
    time: Arc<MeshTime>,
}

impl Member {
    fn start(settings: Settings, clock: ManualClock) -> Self {
        let time = MeshTime::new(Arc::new(clock));
        let identity = MeshIdentity::with_clock(time.clone());
        let workload = Workload::start(settings, identity.clone(), time.clone());
        Self { status: workload.status(), workload, identity, time }
    }

    fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    async fn joined(self) -> Self {
        eventually("a first certificate", || self.status().renewals >= 1).await;
        eventually("the trust is followed", || self.status().following).await;
        self
    }

    fn serial(&self) -> Serial {
        self.identity.svid().unwrap().leaf().serial.clone()
    }

    fn left(&self) -> Duration {
        self.identity.svid().unwrap().left(self.time.now())
    }
}

fn request() -> (Vec<u8>, authority::Key) {
    let key = authority::Key::generate(KeyKind::P256).unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    (csr.der().to_vec(), key)
}

fn sign(session: &proto::Session, csr_der: Vec<u8>) -> proto::SignRequest {
    proto::SignRequest {
        session: session.token.clone(),
        csr_der,
        proxy_id: "p".to_owned(),
        ..proto::SignRequest::default()
    }
}

#[tokio::test]
async fn a_workload_joins_by_a_token_and_is_renewed_for_days_with_a_new_key_each_time() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let member = ca.workload(ca.token("orders", 1).await, "orders-1").joined().await;
    let svid = member.identity.svid().unwrap();
    assert_eq!(svid.id(), &id("orders"));
    assert_eq!(member.left(), DAY);
    let (mut serials, mut keys) = (Vec::new(), Vec::new());
    for hour in 0..(5 * 24) {
        ca.clock.advance(HOUR);
        // An attempt that was under way when the hour was over may have failed, and is made again soon.
        eventually("a renewal at half of the life", || {
            let renewed = member.left() >= DAY * 4 / 10 - HOUR * 2;
            if !renewed {
                ca.clock.advance(Duration::from_secs(1));
            }
            renewed
        })
        .await;
        let svid = member.identity.svid().unwrap();
        if serials.last() != Some(&svid.leaf().serial) {
            serials.push(svid.leaf().serial.clone());
            keys.push(authority::Facts::read(&svid.chain()[0]).unwrap().key_hash);
        }
        assert_ne!(member.status().phase, Phase::Expired, "hour {hour}");
    }
    // Between 0.4 and 0.6 of a day, found an hour late at most.
    assert!((7..=13).contains(&serials.len()), "{} certificates in five days", serials.len());
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), serials.len(), "a key is never used again");
    let names =
        crate::verify::ClientIdentity::parse(&member.identity.svid().unwrap().chain()[0]).unwrap().names;
    assert!(
        names.contains(&crate::verify::AltName::Dns("orders.test".to_owned())),
        "names are kept over renewals"
    );
    eventually("what it uses is heard", || {
        ca.heard.ack("orders-1").is_some_and(|ack| ack.leaf_serial == member.serial())
    })
    .await;
    let log = audit::verify(&ca.dir.path().join("audit.log"), None).unwrap();
    assert!(log.lines >= 2 * u64::try_from(serials.len()).unwrap());
}

#[tokio::test]
async fn an_authority_that_is_away_for_an_hour_changes_nothing() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let member = ca.workload(ca.token("orders", 1).await, "orders-1").joined().await;
    let serial = member.serial();
    ca.clock.advance(DAY * 39 / 100);
    ca.gate.open.send_replace(false);
    // Past the latest moment of the renewal, and an hour more.
    ca.clock.advance(DAY * 22 / 100);
    for _ in 0..60 {
        let ticks = member.status().ticks;
        ca.clock.advance(Duration::from_secs(60));
        eventually("the clock is looked at", || member.status().ticks > ticks).await;
    }
    assert!(member.status().failures >= 1);
    assert_eq!((member.serial(), member.status().phase), (serial.clone(), Phase::Valid));
    ca.gate.open.send_replace(true);
    eventually("a new certificate", || {
        ca.clock.advance(Duration::from_secs(1));
        member.serial() != serial
    })
    .await;
    assert!(member.status().last_error.is_none());
    eventually("the trust is followed again", || {
        ca.clock.advance(Duration::from_secs(1));
        member.status().following
    })
    .await;
}

#[tokio::test]
async fn a_workload_that_has_expired_comes_back_by_its_first_proof() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let member = ca.workload(ca.token("orders", 2).await, "orders-1").joined().await;
    let serial = member.serial();
    ca.gate.open.send_replace(false);
    ca.clock.advance(DAY * 2);
    // What the authority said before may be heard after, and counts for a while.
    eventually("it has expired", || {
        ca.clock.advance(Duration::from_secs(60));
        member.status().phase == Phase::Expired
    })
    .await;
    ca.gate.open.send_replace(true);
    eventually("a new certificate", || {
        ca.clock.advance(Duration::from_secs(1));
        member.serial() != serial
    })
    .await;
    assert_eq!(ca.tokens.list(ca.clock.now()).await.unwrap().values().next().unwrap().uses_left, 0);
}

#[tokio::test]
async fn an_expired_certificate_is_a_proof_only_when_the_record_says_so() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let member = ca.workload(ca.token("orders", 1).await, "orders-1").joined().await;
    let svid = member.identity.svid().unwrap();
    drop(member);
    let renewal = async |what: &str| {
        let mut call =
            Call::connect(&ca.gate.address.to_string(), Arc::from([ca.pin]), Some(&svid)).await.unwrap();
        let proof = proto::attest_request::Proof::Renewal(proto::Renewal {});
        call.attest(proof, None)
            .await
            .map(|session| session.identity)
            .map_err(|failure| (what.to_owned(), failure.denied))
    };
    assert_eq!(renewal("valid").await, Ok(id("orders").to_string()));
    ca.clock.advance(DAY * 3);
    assert!(matches!(renewal("expired").await, Err((_, true))));
    ca.change(|current| current.renew_expired = DAY);
    assert!(matches!(renewal("two days ago").await, Err((_, true))));
    ca.change(|current| current.renew_expired = 3 * DAY);
    assert_eq!(renewal("within what is allowed").await, Ok(id("orders").to_string()));
}

#[tokio::test]
async fn a_token_is_not_used_twice_and_another_authority_is_not_believed() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let token = ca.token("orders", 1).await;
    let _first = ca.workload(token.clone(), "orders-1").joined().await;
    let second = ca.workload(token, "orders-2");
    eventually("the second use is refused", || {
        second.status().last_error.is_some_and(|(_, reason)| reason.contains("used already"))
    })
    .await;
    assert!(second.identity.svid().is_none());

    let mut settings = ca.settings(ca.token("billing", 1).await, "billing-1");
    settings.pins = Arc::from([Pin::of(&authority::Key::generate(KeyKind::P256).unwrap())]);
    let stranger = Member::start(settings, ca.clock.clone());
    eventually("it talks to nobody with another key", || stranger.status().failures >= 1).await;
    assert!(stranger.identity.svid().is_none());
    assert_eq!(
        ca.tokens.list(ca.clock.now()).await.unwrap().values().filter(|token| token.uses_left == 1).count(),
        1
    );
}

#[tokio::test]
async fn a_flood_is_limited_and_told_when_to_come_back() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let (mut call, session) = ca.call(&ca.token("orders", 1).await, None).await.unwrap();
    for _ in 0..5 {
        call.sign(sign(&session, request().0)).await.unwrap();
    }
    let refused = call.sign(sign(&session, request().0)).await.unwrap_err();
    assert_eq!(refused.retry_after, Some(Duration::from_secs(10)), "{}", refused.reason);
    ca.clock.advance(Duration::from_secs(10));
    call.sign(sign(&session, request().0)).await.unwrap();
    assert!(call.sign(sign(&session, request().0)).await.is_err());
    let numbers = ca.service.numbers();
    assert_eq!(numbers.calls[&("sign", "join_token".to_owned(), "resource_exhausted")], 2);
    assert_eq!(numbers.signed, 6);
}

#[tokio::test]
async fn weak_keys_wrong_sessions_and_other_identities_are_refused_with_the_reason() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let token = ca.token("orders", 1).await;
    let (mut call, session) = ca.call(&token, None).await.unwrap();
    let weak = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
    let weak = rcgen::CertificateParams::default().serialize_request(&weak).unwrap().der().to_vec();
    let refused = call.sign(sign(&session, weak)).await.unwrap_err();
    assert!(refused.reason.contains("use P-256"), "{}", refused.reason);
    let log = std::fs::read_to_string(ca.dir.path().join("audit.log")).unwrap();
    assert!(log.contains("\"action\":\"sign\"") && log.contains("\"decision\":\"refused\""), "{log}");

    let mut other = session.clone();
    other.token[10] ^= 1;
    assert!(call.sign(sign(&other, request().0)).await.unwrap_err().denied);
    assert!(call.sign(sign(&proto::Session::default(), request().0)).await.unwrap_err().denied);
    ca.clock.advance(Duration::from_secs(300));
    assert!(
        call.sign(sign(&session, request().0)).await.unwrap_err().denied,
        "a session ends after five minutes"
    );

    // What it shows is a proof of this identity and of no other.
    let member = ca.workload(ca.token("billing", 1).await, "billing-1").joined().await;
    let svid = member.identity.svid().unwrap();
    let mut call =
        Call::connect(&ca.gate.address.to_string(), Arc::from([ca.pin]), Some(&svid)).await.unwrap();
    let renewal = || proto::attest_request::Proof::Renewal(proto::Renewal {});
    assert!(call.attest(renewal(), Some(&id("admin"))).await.unwrap_err().denied);
    let session = call.attest(renewal(), Some(&id("billing"))).await.unwrap();
    assert_eq!(session.identity, id("billing").to_string());
    let mut nobody = Call::connect(&ca.gate.address.to_string(), Arc::from([ca.pin]), None).await.unwrap();
    assert!(nobody.attest(renewal(), None).await.unwrap_err().denied);
}

#[tokio::test]
async fn bundles_are_pushed_taken_and_acknowledged() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let member = ca.workload(ca.token("orders", 1).await, "orders-1").joined().await;
    eventually("the first bundle", || ca.heard.ack("orders-1").is_some_and(|ack| ack.bundle_generation == 1))
        .await;
    let second = Authority::root(&domain(), KeyKind::P384, 3650 * DAY, ca.clock.now()).unwrap();
    ca.publish(|bundle| {
        let certificate = second.certificate().clone();
        bundle.roots.push(crate::ca::BundleRoot { certificate, state: crate::ca::RootState::Staged });
        bundle.least_connection_generation = 2;
    });
    eventually("the second bundle", || {
        ca.heard.ack("orders-1").is_some_and(|ack| ack.bundle_generation == 2)
    })
    .await;
    assert_eq!(member.identity.trust().unwrap().roots("mesh.local").count(), 2);
    assert_eq!(member.status().least_connection_generation, 2);

    // A bundle that nobody can use is not taken, and that is told.
    ca.publish(|bundle| bundle.roots.clear());
    eventually("it is refused", || {
        ca.heard.ack("orders-1").is_some_and(|ack| ack.refused.is_some() && ack.bundle_generation == 2)
    })
    .await;
    assert_eq!(member.identity.trust().unwrap().generation(), 2);
    let root = ca.root.certificate().clone();
    ca.publish(|bundle| {
        bundle.roots.push(crate::ca::BundleRoot { certificate: root, state: crate::ca::RootState::Active });
    });
    eventually("the fourth bundle", || {
        ca.heard.ack("orders-1").is_some_and(|ack| ack.refused.is_none() && ack.bundle_generation == 4)
    })
    .await;
}

#[tokio::test]
async fn a_renewal_is_asked_for_and_a_new_issuer_is_used() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let member = ca.workload(ca.token("orders", 1).await, "orders-1").joined().await;
    let before = member.serial();
    let issuer = ca.root.intermediate(&domain(), KeyKind::P256, 365 * DAY, ca.clock.now()).unwrap();
    let new = issuer.id();
    ca.change(|current| {
        current.issuer = Some(Arc::new(issuer));
        current.renew = Some(Renew {
            generation: 1,
            who: vec!["spiffe://mesh.local/*".parse().unwrap()],
            proxies: std::collections::BTreeSet::new(),
            unless_issued_by: Some(new.clone()),
            spread: Duration::ZERO,
            reason: "a test".to_owned(),
        });
    });
    eventually("a certificate by the new issuer", || {
        ca.heard.ack("orders-1").is_some_and(|ack| ack.leaf_issuer == new)
    })
    .await;
    assert_ne!(member.serial(), before);
    let serial = member.serial();
    // On demand: one for all who ask.
    for _ in 0..10 {
        member.workload.renew_now();
    }
    eventually("another one", || member.serial() != serial).await;
}

#[tokio::test]
async fn a_certificate_that_the_former_issuer_signed_meanwhile_is_renewed_too() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let member = ca.workload(ca.token("orders", 1).await, "orders-1").joined().await;
    let make =
        || Arc::new(ca.root.intermediate(&domain(), KeyKind::P256, 365 * DAY, ca.clock.now()).unwrap());
    let (former, wanted) = (make(), make());
    let uses =
        |issuer: &Arc<Authority>| ca.heard.ack("orders-1").is_some_and(|ack| ack.leaf_issuer == issuer.id());
    let request = |generation| Renew {
        generation,
        who: vec!["spiffe://mesh.local/*".parse().unwrap()],
        proxies: std::collections::BTreeSet::new(),
        unless_issued_by: Some(wanted.id()),
        spread: Duration::ZERO,
        reason: "a test".to_owned(),
    };
    // It has what is wanted when that is asked for, and comes with another one that was on its way.
    for issuer in [&wanted, &former] {
        ca.change(|current| current.issuer = Some(issuer.clone()));
        if Arc::ptr_eq(issuer, &former) {
            ca.change(|current| current.renew = Some(request(1)));
        }
        member.workload.renew_now();
        eventually("a certificate by it", || uses(issuer)).await;
    }
    // It is asked again, and gets the wrong one again where a replica does not know better.
    eventually("it renews", || member.status().renewals > 3).await;
    ca.change(|current| current.issuer = Some(wanted.clone()));
    eventually("a certificate by the wanted one", || {
        ca.clock.advance(Duration::from_secs(1));
        uses(&wanted)
    })
    .await;
}

#[tokio::test]
async fn what_was_revoked_renews_nothing_and_a_new_proof_does() {
    let ca = Ca::start(ManualClock::new(begin())).await;
    let member = ca.workload(ca.token("orders", 2).await, "orders-1").joined().await;
    let serial = member.serial();
    ca.clock.advance(Duration::from_secs(60));
    let until = ca.clock.now();
    ca.publish(|bundle| {
        bundle.revoked.identities.insert(id("orders"), until);
    });
    eventually("the revocation is known", || member.identity.trust().unwrap().generation() == 2).await;
    ca.clock.advance(Duration::from_secs(60));
    member.workload.renew_now();
    eventually("a certificate by the token", || member.serial() != serial).await;
    assert_eq!(ca.tokens.list(ca.clock.now()).await.unwrap().values().next().unwrap().uses_left, 0);
    let svid = member.identity.svid().unwrap();
    assert!(member.identity.peer(svid.chain(), crate::trust::Usage::Client).is_ok(), "it is not revoked");
}

#[tokio::test]
async fn a_workload_whose_clock_is_wrong_by_a_day_gets_its_certificate_and_says_so() {
    for (what, ahead) in [("ahead", true), ("behind", false)] {
        let ca = Ca::start(ManualClock::new(begin())).await;
        let wrong = ManualClock::new(if ahead { begin() + DAY } else { begin() - DAY });
        let member =
            Member::start(ca.settings(ca.token("orders", 1).await, "orders-1"), wrong.clone()).joined().await;
        let offset = if ahead { 86_400_000 } else { -86_400_000 };
        eventually(what, || {
            ca.heard.ack("orders-1").is_some_and(|ack| (ack.clock_offset_ms - offset).abs() < 5_000)
        })
        .await;
        assert_eq!(member.left(), DAY, "it is judged by the authority's time");
        // Set right, it goes on with what it has.
        wrong.set(begin());
        assert_eq!(member.left(), DAY);
        wrong.advance(Duration::from_secs(31));
        eventually("the jump is noticed", || member.status().clock_jumps >= 1).await;
    }
}

#[tokio::test]
async fn an_authority_whose_clock_is_wrong_signs_nothing() {
    let ca = Ca::start(ManualClock::new(begin() + Duration::from_secs(120))).await;
    let right = ManualClock::new(begin());
    let mut members = Vec::new();
    for number in 0..3 {
        let name = format!("w{number}");
        let proof = ca.token(&name, 1).await;
        members.push(Member::start(ca.settings(proof, &name), right.clone()).joined().await);
    }
    eventually("three say so", || ca.service.numbers().clock_offset_ms <= -60_000).await;
    let (mut call, session) = ca.call(&ca.token("orders", 1).await, None).await.unwrap();
    let refused = call.sign(sign(&session, request().0)).await.unwrap_err();
    assert!(refused.reason.contains("clock"), "{}", refused.reason);
    drop((call, session));
    ca.clock.set(begin());
    // What they said while the clocks were moved may be heard after.
    let billing = ca.token("billing", 6000).await;
    let signs_again = async {
        loop {
            right.advance(Duration::from_secs(31));
            ca.clock.advance(Duration::from_secs(31));
            tokio::time::sleep(Duration::from_millis(10)).await;
            let (mut call, session) = ca.call(&billing, None).await.unwrap();
            match call.sign(sign(&session, request().0)).await {
                Ok(_) => return (call, session),
                Err(refused) => assert!(refused.reason.contains("clock"), "{}", refused.reason),
            }
        }
    };
    let signs_again = timeout(Duration::from_secs(60), signs_again).await;
    let (mut call, session) = signs_again.expect("they say that it is right again");
    drop(members);

    // A clock that is before the last change of its own record.
    let later = ca.clock.now() + HOUR;
    ca.publish(|bundle| bundle.made = later);
    let refused = call.sign(sign(&session, request().0)).await.unwrap_err();
    assert!(refused.reason.contains("before its own last change"), "{}", refused.reason);
}

#[tokio::test]
async fn two_workloads_speak_with_each_other_and_with_nobody_else() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let ca = Ca::start(ManualClock::new(begin())).await;
    let one = ca.workload(ca.token("one", 1).await, "one").joined().await;
    let two = ca.workload(ca.token("two", 1).await, "two").joined().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = two.identity.server_config(crate::mesh::Clients::Required, &[b"x"]).unwrap();
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = tokio_rustls::TlsAcceptor::from(config).accept(stream).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let config = one.identity.client_config(id("two").into(), &[b"x"]).unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("two").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.unwrap();
    assert_eq!(said, b"hello");
    serving.await.unwrap();
}
