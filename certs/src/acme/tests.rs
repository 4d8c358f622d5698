//! The keeper with an authority that stands in the same process, and a clock that is moved.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rcgen::{CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::CertificateSigningRequestDer;
use tokio::sync::Semaphore;

use super::*;
use crate::ca::store::memory::Memory;
use crate::ca::store::{Store, StoreError, Stored, SwapError, Version};
use crate::clock::{Clock, ManualClock};
use crate::testing::{DAY, PATIENCE};

const DIRECTORY: &str = "https://acme.test/directory";
const LIFE: Duration = Duration::from_secs(90 * 86_400);

/// Signs whatever it is asked, after it has asked for a challenge, unless it was told to fail.
struct Fake {
    clock: ManualClock,
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// What becomes of the next orders; the others succeed.
    next: Mutex<VecDeque<Failure>>,
    /// The names of each order, and whether it replaces one.
    orders: Mutex<Vec<(Vec<String>, bool)>>,
    /// Permits for orders to go on after their challenges are presented.
    gate: Semaphore,
    hints: Mutex<Option<Hints>>,
}

impl Fake {
    fn new(clock: &ManualClock) -> Arc<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Arc::new(Self {
            clock: clock.clone(),
            issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap(),
            next: Mutex::default(),
            orders: Mutex::default(),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            hints: Mutex::default(),
        })
    }

    /// Orders wait after they have presented their challenges.
    fn hold(&self) {
        self.gate.forget_permits(Semaphore::MAX_PERMITS);
    }

    fn release(&self) {
        self.gate.add_permits(100);
    }

    fn fail(&self, failure: Failure) {
        self.next.lock().unwrap().push_back(failure);
    }

    fn orders(&self) -> usize {
        self.orders.lock().unwrap().len()
    }
}

impl Authority for Fake {
    fn obtain<'a>(
        &'a self,
        ask: Ask<'a>,
        present: &'a dyn Present,
    ) -> BoxFuture<'a, Result<String, Failure>> {
        Box::pin(async move {
            self.orders.lock().unwrap().push((ask.names.to_vec(), ask.replaces.is_some()));
            let challenge = |name: &String| Challenge {
                kind: ask.challenge.unwrap_or(ChallengeKind::Http01),
                name: name.clone(),
                token: format!("token-of-{name}"),
                authorization: format!("token-of-{name}.thumb"),
            };
            present.present(ask.names.iter().map(challenge).collect()).await?;
            self.gate.acquire().await.unwrap().forget();
            if let Some(failure) = self.next.lock().unwrap().pop_front() {
                return Err(failure);
            }
            let csr = CertificateSigningRequestDer::from(ask.csr.to_vec());
            let mut csr = CertificateSigningRequestParams::from_der(&csr).map_err(Failure::refused)?;
            let now = self.clock.now();
            csr.params.not_before = now.into();
            csr.params.not_after = (now + LIFE).into();
            csr.params.serial_number = Some(fastrand::u64(..).into());
            Ok(csr.signed_by(&self.issuer).map_err(Failure::refused)?.pem() + &self.issuer.pem())
        })
    }

    fn hints<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Option<Hints>, Failure>> {
        Box::pin(async move { Ok(*self.hints.lock().unwrap()) })
    }
}

/// A store that can be away.
#[derive(Default)]
struct Shaky {
    memory: Memory,
    away: std::sync::atomic::AtomicBool,
}

impl Shaky {
    fn here(&self) -> Result<(), StoreError> {
        match self.away.load(std::sync::atomic::Ordering::SeqCst) {
            true => Err(StoreError::Unavailable { store: "shaky".to_owned(), reason: "away".to_owned() }),
            false => Ok(()),
        }
    }
}

impl Store for Shaky {
    fn name(&self) -> &str {
        "shaky"
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            self.here()?;
            self.memory.load(name).await
        })
    }

    fn list<'a>(&'a self, start: &'a str) -> BoxFuture<'a, Result<Vec<(String, Stored)>, StoreError>> {
        Box::pin(async move {
            self.here()?;
            self.memory.list(start).await
        })
    }

    fn swap<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        value: &'a [u8],
    ) -> BoxFuture<'a, Result<Version, SwapError>> {
        Box::pin(async move {
            self.here()?;
            self.memory.swap(name, seen, value).await
        })
    }

    fn remove<'a>(&'a self, name: &'a str, seen: Version) -> BoxFuture<'a, Result<(), SwapError>> {
        Box::pin(async move {
            self.here()?;
            self.memory.remove(name, seen).await
        })
    }

    fn changed<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        at_most: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            self.here()?;
            self.memory.changed(name, seen, at_most).await
        })
    }
}

/// One replica, and what it serves.
struct Replica {
    keeper: Keeper,
    served: Arc<Mutex<Arc<Served>>>,
}

impl Replica {
    fn start(name: &str, authority: &Arc<Fake>, store: &Arc<Shaky>, last_good: Option<PathBuf>) -> Self {
        let served = Arc::new(Mutex::new(Arc::new(Served::default())));
        let told = served.clone();
        let keeper = Keeper::start(Parts {
            authority: authority.clone(),
            directory: DIRECTORY.to_owned(),
            store: store.clone(),
            vault: Arc::new(Vault::new(true, ["a key for these tests"]).unwrap()),
            instance: name.to_owned(),
            retry: Duration::from_secs(60),
            visible: Duration::ZERO,
            last_good,
            clock: Arc::new(authority.clock.clone()),
            publish: Arc::new(move |served| *told.lock().unwrap() = served),
        });
        Self { keeper, served }
    }

    fn served(&self) -> Arc<Served> {
        self.served.lock().unwrap().clone()
    }

    /// The chain that is shown for a name.
    fn chain(&self, name: &str) -> Option<String> {
        let served = self.served();
        served.best(&[name.to_owned()], 0).map(|(issued, _)| issued.chain.clone())
    }

    fn state(&self) -> Vec<State> {
        self.keeper.status().certificates.iter().map(|certificate| certificate.state).collect()
    }
}

fn want(id: &str, names: &[&str]) -> Want {
    Want { id: id.to_owned(), names: names.iter().map(|name| (*name).to_owned()).collect(), challenge: None }
}

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("it never came: {what}"))
}

fn setting() -> (ManualClock, Arc<Fake>, Arc<Shaky>) {
    let clock = ManualClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let authority = Fake::new(&clock);
    (clock, authority, Arc::new(Shaky::default()))
}

#[tokio::test]
async fn what_is_wanted_is_ordered_once_and_not_again_after_a_restart() {
    let (_clock, authority, store) = setting();
    let one = Replica::start("a", &authority, &store, None);
    one.keeper.want(vec![want("1", &["a.test", "b.test"]), want("2", &["a.test", "b.test"])]);
    let chain = until("a certificate", || one.chain("b.test")).await;
    assert_eq!(one.state(), [State::Valid], "two resources want the same");
    assert_eq!(one.keeper.status().certificates[0].ssls, ["1", "2"]);
    assert!(one.served().challenges.is_empty());
    drop(one);
    let again = Replica::start("a", &authority, &store, None);
    again.keeper.want(vec![want("1", &["a.test", "b.test"])]);
    assert_eq!(until("the same", || again.chain("a.test")).await, chain);
    assert_eq!(authority.orders(), 1);
    // The key is not in the store.
    for (_, stored) in store.list("").await.unwrap() {
        assert!(!String::from_utf8_lossy(&stored.value).contains("PRIVATE KEY"));
    }
}

#[tokio::test]
async fn of_several_replicas_one_orders_and_all_answer() {
    let (_clock, authority, store) = setting();
    authority.hold();
    let replicas: Vec<Replica> =
        ["a", "b", "c"].map(|name| Replica::start(name, &authority, &store, None)).into();
    for replica in &replicas {
        replica.keeper.want(vec![want("1", &["a.test"])]);
    }
    for replica in &replicas {
        let answer = until("the challenge", || replica.served().challenges.first().cloned()).await;
        assert_eq!(answer.authorization, "token-of-a.test.thumb");
        assert_eq!(replica.state(), [State::Ordering]);
    }
    authority.release();
    let chains: Vec<String> = {
        let mut chains = Vec::new();
        for replica in &replicas {
            chains.push(until("the certificate", || replica.chain("a.test")).await);
        }
        chains
    };
    assert!(chains.iter().all(|chain| *chain == chains[0]));
    assert_eq!(authority.orders(), 1);
    for replica in &replicas {
        until("no more challenges", || replica.served().challenges.is_empty().then_some(())).await;
    }
    assert_eq!(replicas.iter().map(|it| it.keeper.status().orders.issued).sum::<u64>(), 1);
}

#[tokio::test]
async fn a_renewal_comes_in_time_and_its_failure_leaves_the_old_certificate() {
    let (clock, authority, store) = setting();
    let one = Replica::start("a", &authority, &store, None);
    one.keeper.want(vec![want("1", &["a.test"])]);
    let first = until("a certificate", || one.chain("a.test")).await;
    // One hint is asked for, and the authority does not give any.
    clock.advance(DAY);
    clock.advance(LIFE / 2 - DAY);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(authority.orders(), 1, "it is not time yet");

    authority.fail(Failure::refused("no"));
    clock.advance(LIFE / 6);
    let failure = until("a failure", || one.keeper.status().certificates[0].failure.clone()).await;
    assert_eq!((failure.count, failure.reason.as_str()), (1, "no"));
    assert_eq!(one.chain("a.test"), Some(first.clone()));
    assert_eq!(one.state(), [State::Valid]);
    assert!((54..=66).contains(&(failure.next_attempt - failure.at)), "{failure:?}");

    authority.fail(Failure::refused("still no"));
    clock.advance(Duration::from_secs(67));
    let failure = until("another", || {
        one.keeper.status().certificates[0].failure.clone().filter(|failure| failure.count == 2)
    })
    .await;
    assert!((216..=264).contains(&(failure.next_attempt - failure.at)), "{failure:?}");

    clock.advance(Duration::from_secs(265));
    until("a new certificate", || (one.chain("a.test")? != first).then_some(())).await;
    until("no failure", || one.keeper.status().certificates[0].failure.is_none().then_some(())).await;
    assert_eq!(authority.orders(), 4);
}

#[tokio::test]
async fn an_authority_that_says_when_to_come_back_is_obeyed_and_people_are_not_made_to_wait() {
    let (clock, authority, store) = setting();
    let one = Replica::start("a", &authority, &store, None);
    let later = clock.now() + DAY;
    authority.fail(Failure { not_before: Some(later), ..Failure::refused("too many") });
    one.keeper.want(vec![want("1", &["a.test"])]);
    let failure = until("a failure", || one.keeper.status().certificates.first()?.failure.clone()).await;
    assert_eq!(failure.next_attempt, record::seconds(later));
    assert_eq!(one.state(), [State::Failed]);
    assert_eq!(one.keeper.renew("nobody").await.unwrap(), Vec::<Vec<String>>::new());
    assert_eq!(one.keeper.renew("1").await.unwrap(), [["a.test"]]);
    let first = until("a certificate", || one.chain("a.test")).await;
    assert_eq!(one.keeper.renew("a.test").await.unwrap(), [["a.test"]]);
    until("another", || (one.chain("a.test")? != first).then_some(())).await;
    assert_eq!(authority.orders(), 3);
}

#[tokio::test]
async fn the_order_of_a_dead_instance_is_taken_over_when_its_time_is_up() {
    let (clock, authority, store) = setting();
    authority.hold();
    let dead = Replica::start("a", &authority, &store, None);
    dead.keeper.want(vec![want("1", &["a.test"])]);
    until("it orders", || dead.served().challenges.first().cloned()).await;
    drop(dead);
    let other = Replica::start("b", &authority, &store, None);
    other.keeper.want(vec![want("1", &["a.test"])]);
    until("it is seen", || (other.state() == [State::Ordering]).then_some(())).await;
    assert_eq!(authority.orders(), 1);
    authority.release();
    clock.advance(Duration::from_secs(601));
    until("a certificate", || other.chain("a.test")).await;
    assert_eq!(authority.orders(), 2);
}

#[tokio::test]
async fn who_was_taken_for_dead_changes_nothing() {
    let (clock, authority, store) = setting();
    authority.hold();
    let slow = Replica::start("a", &authority, &store, None);
    slow.keeper.want(vec![want("1", &["a.test"])]);
    until("it orders", || slow.served().challenges.first().cloned()).await;
    let other = Replica::start("b", &authority, &store, None);
    other.keeper.want(vec![want("1", &["a.test"])]);
    clock.advance(Duration::from_secs(601));
    until("both order", || (authority.orders() == 2).then_some(())).await;
    authority.release();
    let chain = until("a certificate", || other.chain("a.test")).await;
    assert_eq!(until("the same", || slow.chain("a.test")).await, chain);
    until("it stays", || (slow.state() == [State::Valid]).then_some(())).await;
    assert_eq!(slow.keeper.status().certificates[0].failure, None);
    assert_eq!(authority.orders(), 2);
}

#[tokio::test]
async fn an_instance_that_comes_back_goes_on_with_its_own_order() {
    let (_clock, authority, store) = setting();
    authority.hold();
    let one = Replica::start("a", &authority, &store, None);
    one.keeper.want(vec![want("1", &["a.test"])]);
    until("it orders", || one.served().challenges.first().cloned()).await;
    drop(one);
    authority.release();
    let again = Replica::start("a", &authority, &store, None);
    again.keeper.want(vec![want("1", &["a.test"])]);
    until("a certificate", || again.chain("a.test")).await;
}

#[tokio::test]
async fn what_was_read_last_is_served_while_the_store_is_away() {
    let (_clock, authority, store) = setting();
    let folder = tempfile::tempdir().unwrap();
    let file = Some(folder.path().join("acme.json"));
    let one = Replica::start("a", &authority, &store, file.clone());
    one.keeper.want(vec![want("1", &["a.test"])]);
    let chain = until("a certificate", || one.chain("a.test")).await;
    drop(one);
    store.away.store(true, std::sync::atomic::Ordering::SeqCst);
    let again = Replica::start("a", &authority, &store, file);
    again.keeper.want(vec![want("1", &["a.test"])]);
    assert_eq!(until("the same", || again.chain("a.test")).await, chain);
    until("it says so", || again.keeper.status().problem).await;
    assert_eq!(authority.orders(), 1);
    store.away.store(false, std::sync::atomic::Ordering::SeqCst);
    until("it is read again", || again.keeper.status().problem.is_none().then_some(())).await;
    assert_eq!((authority.orders(), again.state()), (1, vec![State::Valid]));
}

#[tokio::test]
async fn the_authority_may_say_when_to_renew() {
    let (clock, authority, store) = setting();
    let one = Replica::start("a", &authority, &store, None);
    one.keeper.want(vec![want("1", &["a.test"])]);
    let first = until("a certificate", || one.chain("a.test")).await;
    // The authority has to revoke many, and wants them renewed tomorrow.
    let now = clock.now();
    let hints = Hints { start: now + DAY, end: now + DAY * 2, again: now + DAY * 3 };
    *authority.hints.lock().unwrap() = Some(hints);
    clock.advance(Duration::from_secs(3601));
    let window = record::seconds(hints.start)..=record::seconds(hints.end);
    until("the hint is taken", || {
        window.contains(&one.keeper.status().certificates[0].renew_at?).then_some(())
    })
    .await;
    clock.advance(DAY * 2);
    until("a new certificate", || (one.chain("a.test")? != first).then_some(())).await;
    let orders = authority.orders.lock().unwrap().clone();
    assert_eq!(orders.iter().map(|(_, replaces)| *replaces).collect::<Vec<_>>(), [false, true]);
}

#[tokio::test]
async fn names_that_nobody_wants_are_forgotten_when_their_certificate_has_ended() {
    let (clock, authority, store) = setting();
    let one = Replica::start("a", &authority, &store, None);
    one.keeper.want(vec![want("1", &["a.test"])]);
    until("a certificate", || one.chain("a.test")).await;
    one.keeper.want(vec![want("1", &["b.test"])]);
    until("another", || one.chain("b.test")).await;
    assert!(one.chain("a.test").is_some(), "it may be wanted again");
    one.keeper.want(Vec::new());
    clock.advance(LIFE + DAY);
    until("both are gone", || one.served().certificates.is_empty().then_some(())).await;
    assert_eq!(authority.orders(), 2);
}

#[test]
fn a_chain_is_looked_at_before_it_is_used() {
    let (_clock, authority, _) = setting();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["a.test".to_owned()]).unwrap();
    let chain = params.signed_by(&key, &authority.issuer).unwrap().pem();
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let look = |chain: &str, key: &KeyPair, wanted: &[&str]| {
        keeper::validity(chain, &key.serialize_pem(), &names(wanted))
    };
    assert!(look(&chain, &key, &["a.test"]).is_ok());
    for (what, result) in [
        ("another name", look(&chain, &key, &["a.test", "b.test"])),
        ("another key", look(&chain, &KeyPair::generate().unwrap(), &["a.test"])),
        ("nothing", look("", &key, &["a.test"])),
    ] {
        assert!(result.is_err(), "{what}");
    }
}
