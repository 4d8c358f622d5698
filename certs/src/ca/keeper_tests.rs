//! The parts of an authority as `postern ca run` joins them, with workloads over real sockets and a clock that is moved.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::attest::Attestors;
use super::attest::token::{JoinTokens, NewToken};
use super::audit::Audit;
use super::authority::KeyKind;
use super::channel::{self, Pin};
use super::foundry::Foundry;
use super::keeper::Keeper;
use super::limits::{Limits, Rate};
use super::probe::Visitor;
use super::record::{Der, Lifetimes};
use super::rotation::command::{Command, NewRoot, Rotate};
use super::rotation::driver::{self, Driver};
use super::rotation::{Kind, Policy, State, plan};
use super::seal::Sealer;
use super::server;
use super::service::{Parts, Service};
use super::store::Store;
use super::store::memory::Memory;
use crate::clock::{Clock, ManualClock};
use crate::mesh::{Clients, MeshIdentity};
use crate::trust::{Usage, VerifyError};
use crate::workload::time::MeshTime;
use crate::workload::{Proof, Settings, Workload};

const DAY: Duration = Duration::from_secs(86_400);

/// An authority at work; ends when it is dropped.
struct Authority {
    clock: ManualClock,
    keeper: Arc<Keeper>,
    tokens: Arc<JoinTokens>,
    address: String,
    pin: Pin,
    _dir: tempfile::TempDir,
    _tasks: JoinSet<()>,
}

struct Member {
    workload: Workload,
    identity: MeshIdentity,
}

impl Authority {
    async fn start(lifetimes: Lifetimes) -> Self {
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let now = clock.now();
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(Memory::default());
        let sealer = Arc::new(Sealer::random().unwrap());
        let foundry = Arc::new(Foundry::new(Arc::clone(&sealer), KeyKind::P256));
        let record = foundry.found("mesh.local", lifetimes, now.into()).unwrap();
        driver::found(&*store, &record).await.unwrap();
        let audit = Arc::new(Audit::open(&dir.path().join("audit.log"), now).unwrap());
        let prober = Visitor::new(Arc::clone(&foundry), Arc::clone(&audit), Arc::new(clock.clone()));
        let set_up = |driver: Driver| driver.with_prober(Arc::new(prober));
        let opened = Keeper::open(Arc::clone(&store), foundry, Arc::new(clock.clone()), "ca-1", set_up);
        let keeper = opened.await.unwrap().unwrap();
        let key = channel::key(&*store, &sealer).await.unwrap();
        let tokens = Arc::new(JoinTokens::new(store));
        let often = Rate { per_second: 1000.0, burst: 1000.0 };
        let service = Service::new(Parts {
            current: keeper.current(),
            acks: keeper.clone(),
            attestors: Attestors { tokens: Some(Arc::clone(&tokens)), ..Attestors::default() },
            audit,
            limits: Limits { identity: often, ..Limits::default() },
            sealer,
            clock: Arc::new(clock.clone()),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let tls = channel::server(&key, now).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&keeper).run());
        tasks.spawn(server::workloads(service.unwrap(), listener, tls, std::future::pending()));
        Self { clock, keeper, tokens, address, pin: Pin::of(&key), _dir: dir, _tasks: tasks }
    }

    async fn member(&self, name: &str) -> Member {
        let new = NewToken {
            identity: format!("spiffe://mesh.local/ns/shop/sa/{name}").parse().unwrap(),
            ttl: DAY,
            uses: 1,
            dns_names: Vec::new(),
            longest_ttl: None,
        };
        let domain = "mesh.local".parse().unwrap();
        let (secret, _) = self.tokens.create(new, &domain, self.clock.now()).await.unwrap();
        let settings = Settings {
            servers: vec![self.address.clone()],
            pins: Arc::from([self.pin]),
            proof: Some(Proof::JoinToken(secret)),
            identity: None,
            proxy_id: format!("{name}-1"),
            version: "test".to_owned(),
            ttl: None,
        };
        let time = MeshTime::new(Arc::new(self.clock.clone()));
        let identity = MeshIdentity::with_clock(time.clone());
        let member = Member { workload: Workload::start(settings, identity.clone(), time), identity };
        self.until("a first certificate", || member.workload.status().borrow().following).await;
        member
    }

    /// While time goes on: pauses between attempts are by the clock that is moved.
    async fn until(&self, what: &str, mut is: impl FnMut() -> bool) {
        for _ in 0..3000 {
            if is() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            self.clock.advance(Duration::from_millis(100));
        }
        panic!("never: {what}");
    }
}

fn judge(shows: &Member, sees: &Member, now: SystemTime) -> Result<(), VerifyError> {
    let svid = shows.identity.svid().unwrap();
    sees.identity.trust().unwrap().verify(svid.chain(), Usage::Server, now).map(drop)
}

#[tokio::test]
async fn a_root_that_has_ended_is_replaced_and_no_workload_is_started_anew() {
    let lifetimes =
        Lifetimes { root_s: 10 * DAY.as_secs(), issuer_s: 8 * DAY.as_secs(), leaf_s: DAY.as_secs() };
    let ca = Authority::start(lifetimes).await;
    let (one, two) = (ca.member("orders").await, ca.member("billing").await);
    assert_eq!(judge(&one, &two, ca.clock.now()), Ok(()));
    let root = ca.keeper.driver().now().record.current_root().unwrap().id.clone();
    let early = Command::Recover { import: None, reason: String::new() };
    assert!(ca.keeper.driver().command(&early, "sre").await.is_err(), "nothing has ended");

    // Nobody looked for two weeks: everything has ended, and nobody signs.
    ca.clock.advance(14 * DAY);
    let failures = || one.workload.status().borrow().failures;
    let before = failures();
    ca.until("it is refused", || failures() > before).await;
    assert_eq!(judge(&one, &two, ca.clock.now()), Err(VerifyError::Expired));

    let recover = Command::Recover { import: None, reason: "nobody looked".to_owned() };
    ca.keeper.driver().command(&recover, "sre").await.unwrap();
    let back = || judge(&one, &two, ca.clock.now()).is_ok() && judge(&two, &one, ca.clock.now()).is_ok();
    ca.until("both are back by the channel that does not depend on the root", back).await;
    let over = || ca.keeper.driver().now().record.rotation.is_none();
    ca.until("the authority knows it", over).await;
    let record = ca.keeper.driver().now().record.clone();
    assert_ne!(record.current_root().unwrap().id, root);
    for member in [&one, &two] {
        let roots: Vec<_> = member.identity.trust().unwrap().roots("mesh.local").cloned().collect();
        assert_eq!(roots.len(), 1, "the old one is gone from everybody");
    }
}

/// Takes connections of the mesh as a sidecar does, and tells who came.
async fn door(member: &Member) -> (std::net::SocketAddr, Arc<Mutex<Vec<String>>>, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = member.identity.server_config(Clients::Required, &[b"postern-h2"]).unwrap();
    let (guests, identity) = (Arc::new(Mutex::new(Vec::new())), member.identity.clone());
    let seen = Arc::clone(&guests);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(stream) = TlsAcceptor::from(config.clone()).accept(stream).await else { continue };
            let peer = identity.peer(stream.get_ref().1.peer_certificates().unwrap(), Usage::Client).unwrap();
            seen.lock().unwrap().push(format!("{} by {}", peer.id, peer.issuer));
        }
    });
    (address, guests, tasks)
}

#[tokio::test]
async fn what_is_waited_for_is_that_of_the_state_that_is_shown() {
    let ca = Authority::start(Lifetimes::default()).await;
    let driver = Arc::clone(ca.keeper.driver());
    let policy = Policy { step: true, ..plan::policy(&driver.now().record) };
    let rotate = Rotate { kind: Kind::Root, policy, root: NewRoot::Usual, reason: "a test".to_owned() };
    driver.command(&Command::Rotate(rotate), "sre").await.unwrap();
    ca.until("it waits for a person", || driver.waiting().for_whom.is_some()).await;
    driver.command(&Command::Rollback { reason: "not today".to_owned() }, "sre").await.unwrap();
    assert_eq!(driver.waiting().for_whom, None, "nobody has to advance what is rolled back");
}

#[tokio::test]
async fn who_renews_first_is_visited_before_everybody_follows() {
    let ca = Authority::start(Lifetimes::default()).await;
    let (one, two) = (ca.member("orders").await, ca.member("billing").await);
    let doors = [door(&one).await, door(&two).await];
    let driver = Arc::clone(ca.keeper.driver());
    let rotate = |reason: &str| {
        let policy = Policy { soak_ms: 1, spread_ms: 1, ..plan::policy(&driver.now().record) };
        Command::Rotate(Rotate {
            kind: Kind::Issuer,
            policy,
            root: NewRoot::Usual,
            reason: reason.to_owned(),
        })
    };
    let old = driver.now().record.signing().unwrap().id.clone();

    // One stands at the other's door: whoever is visited there is not who is expected.
    one.workload.set_mesh_address(doors[1].0);
    two.workload.set_mesh_address(doors[0].0);
    let told = || driver.view().members.iter().all(|member| member.mesh_address.is_some());
    ca.until("they have said where they are", told).await;
    driver.command(&rotate("crossed"), "sre").await.unwrap();
    let crossed = || {
        let blockers = driver.waiting().blockers;
        let mut why = blockers.iter().flat_map(|blocker| &blocker.culprits).map(|culprit| &culprit.why);
        why.any(|why| why.contains("is not accepted") && why.contains("spiffe://mesh.local/ns/shop/sa/"))
    };
    ca.until("the visit fails, and it is told where", crossed).await;
    assert_eq!(driver.now().record.rotation.as_ref().map(|one| one.state), Some(State::Cutover));
    driver.command(&Command::Rollback { reason: "wrong doors".to_owned() }, "sre").await.unwrap();
    let over = || driver.now().record.rotation.is_none();
    ca.until("it is over", over).await;
    assert_eq!(driver.now().record.signing().unwrap().id, old);

    // Two more, at their own doors.
    let (three, four) = (ca.member("carts").await, ca.member("mails").await);
    let doors = [door(&three).await, door(&four).await];
    three.workload.set_mesh_address(doors[0].0);
    four.workload.set_mesh_address(doors[1].0);
    for gone in ["orders-1", "billing-1"] {
        driver.command(&Command::Forget { id: gone.to_owned() }, "sre").await.unwrap();
    }
    drop((one, two));
    ca.until("the others have gone", || driver.view().members.len() == 2 && told()).await;
    driver.command(&rotate("straight"), "sre").await.unwrap();
    ca.until("it is done", over).await;
    let new = driver.now().record.signing().unwrap().id.clone();
    assert_ne!(new, old);
    let mut guests: Vec<String> =
        doors.iter().flat_map(|(_, guests, _)| guests.lock().unwrap().clone()).collect();
    guests.sort();
    guests.dedup();
    let mut expected = [old, new].map(|issuer| format!("spiffe://mesh.local/postern/canary by {issuer}"));
    expected.sort();
    assert_eq!(guests, expected, "in the name of those who have renewed, and of those who have not");
}

#[tokio::test]
async fn an_issuer_hands_out_what_the_present_rotation_gave_it_and_not_what_a_former_one_did() {
    let ca = Authority::start(Lifetimes::default()).await;
    let driver = Arc::clone(ca.keeper.driver());
    let rotate = || {
        let policy = Policy { soak_ms: 1, spread_ms: 1, step: true, ..plan::policy(&driver.now().record) };
        Command::Rotate(Rotate { kind: Kind::Root, policy, root: NewRoot::Usual, reason: String::new() })
    };
    let on_to = async |state: Option<State>| {
        let reason = String::new();
        let advance = Command::Advance { force: false, waive: Vec::new(), compress: false, reason };
        for _ in 0..3000 {
            let rotation = driver.now().record.rotation.clone();
            if rotation.as_ref().map(|rotation| rotation.state) == state {
                return;
            }
            if rotation.is_some_and(|rotation| !rotation.allowed) {
                // It may have gone on meanwhile.
                let _ = driver.command(&advance, "sre").await;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            ca.clock.advance(Duration::from_millis(100));
        }
        panic!("never: {state:?}");
    };
    let handed = || {
        let current = ca.keeper.current().borrow().clone();
        current
            .issuer
            .as_ref()
            .map(|issuer| issuer.presented().skip(1).map(|one| Der(one.to_vec())).collect())
    };
    let given = || {
        let record = driver.now().record.clone();
        record.signing().and_then(|issuer| Some(vec![issuer.cross.as_ref()?.certificate.clone()]))
    };
    driver.command(&rotate(), "sre").await.unwrap();
    on_to(Some(State::Cutover)).await;
    ca.until("the new issuer is signed over", || given().is_some() && handed() == given()).await;
    on_to(None).await;
    driver.command(&rotate(), "sre").await.unwrap();
    ca.until("it is signed over for the way back", || given().is_some() && handed() == given()).await;
}
