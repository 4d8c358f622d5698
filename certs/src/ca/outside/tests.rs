//! With an authority in this process that signs what it is asked, or something else.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Mutex;
use std::time::SystemTime;

use rcgen::{ExtendedKeyUsagePurpose, Issuer as Signer};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;

use super::*;
use crate::ca::authority::Request as Leaf;
use crate::ca::csr::PublicKey;
use crate::ca::rotation::command::{Command, NewRoot, Rotate};
use crate::ca::rotation::driver::{self, Driver};
use crate::ca::rotation::{Kind as What, plan};
use crate::ca::store::memory::Memory;
use crate::clock::{Clock as _, ManualClock};
use crate::trust::{Trust, Usage};

const DAY: Duration = Duration::from_secs(86_400);

/// A certificate with its key, which signs others.
struct Ca {
    certificate: CertificateDer<'static>,
    signer: Signer<'static, Key>,
}

type Change = fn(&mut CertificateParams);

impl Ca {
    fn root(name: &str, change: Change) -> Self {
        let key = Key::generate(KeyKind::P256).unwrap();
        let certificate = params(name, 3650 * DAY, change).self_signed(&key).unwrap().der().clone();
        Self { signer: Signer::from_ca_cert_der(&certificate, key).unwrap(), certificate }
    }

    fn below(&self, name: &str) -> Self {
        let key = Key::generate(KeyKind::P256).unwrap();
        let signed = params(name, 1000 * DAY, |_| {}).signed_by(&key, &self.signer).unwrap();
        let certificate = signed.der().clone();
        Self { signer: Signer::from_ca_cert_der(&certificate, key).unwrap(), certificate }
    }
}

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn params(name: &str, life: Duration, change: Change) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.use_authority_key_identifier_extension = true;
    params.not_before = (start() - DAY).into();
    params.not_after = (start() + life).into();
    change(&mut params);
    params
}

/// What the authority outside is like at present.
struct Manner {
    refuses: Option<NotSigned>,
    /// From what signs up to the root.
    ways: Vec<Arc<Ca>>,
    change: Change,
    other_key: bool,
    asked: Vec<Question>,
}

struct Fake(Mutex<Manner>);

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fake")
    }
}

impl Fake {
    fn new(root: Ca) -> Arc<Self> {
        let limited: Change = |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        Arc::new(Self(Mutex::new(Manner {
            refuses: None,
            ways: vec![Arc::new(root)],
            change: limited,
            other_key: false,
            asked: Vec::new(),
        })))
    }

    fn with<R>(&self, change: impl FnOnce(&mut Manner) -> R) -> R {
        change(&mut self.0.lock().unwrap())
    }

    fn answer(&self, question: &Question) -> Result<Signed, NotSigned> {
        self.with(|manner| {
            manner.asked.push(question.clone());
            if let Some(not) = &manner.refuses {
                return Err(not.clone());
            }
            let csr = CertificateSigningRequestDer::from_pem_slice(question.csr.as_bytes()).unwrap();
            let key = PublicKey::from_csr(&csr).unwrap();
            let mut params = params(&question.common_name, question.life, manner.change);
            params.not_after = params.not_after.min((SystemTime::from(question.now) + question.life).into());
            let signer = &manner.ways.first().unwrap().signer;
            let signed = match manner.other_key {
                true => params.signed_by(&Key::generate(KeyKind::P256).unwrap(), signer),
                false => params.signed_by(&key, signer),
            };
            let (top, between) = manner.ways.split_last().unwrap();
            let between = between.iter().map(|ca| ca.certificate.clone());
            let chain = std::iter::once(signed.unwrap().der().clone()).chain(between).collect();
            Ok(Signed { chain, roots: vec![top.certificate.clone()] })
        })
    }
}

impl Outside for Fake {
    fn kind(&self) -> Kind {
        Kind::Vault
    }

    fn name(&self) -> String {
        "vault in this test".to_owned()
    }

    fn sign<'a>(&'a self, question: &'a Question) -> BoxFuture<'a, Result<Signed, NotSigned>> {
        Box::pin(std::future::ready(self.answer(question)))
    }

    fn look(&self) -> BoxFuture<'_, Result<Seen, NotSigned>> {
        let root = self.with(|manner| manner.ways.last().map(|ca| ca.certificate.clone()));
        Box::pin(std::future::ready(Ok(Seen { root, ends: None, told: "it may be asked".to_owned() })))
    }

    fn lacks_path_length(&self) -> bool {
        false
    }
}

struct Bench {
    store: Arc<Memory>,
    foundry: Arc<Foundry>,
    clock: ManualClock,
    fake: Arc<Fake>,
}

impl Bench {
    fn new(root: Ca) -> Self {
        Self {
            store: Arc::new(Memory::default()),
            foundry: Arc::new(Foundry::new(Arc::new(Sealer::random().unwrap()), KeyKind::P256)),
            clock: ManualClock::new(start()),
            fake: Fake::new(root),
        }
    }

    fn elsewhere(&self) -> Elsewhere {
        Elsewhere::new(Arc::clone(&self.foundry), Arc::clone(&self.fake) as Arc<dyn Outside>)
    }

    /// An authority with a root of its own.
    async fn own(&self) -> Driver {
        let record = self.foundry.found("mesh.local", Lifetimes::default(), self.clock.now().into()).unwrap();
        driver::found(&*self.store, &record).await.unwrap();
        self.open().await
    }

    /// As after a crash.
    async fn open(&self) -> Driver {
        let (store, foundry) = (Arc::clone(&self.store), Arc::clone(&self.foundry));
        let clock = Arc::new(self.clock.clone());
        let driver = Driver::open(store, Arc::default(), foundry, clock, "ca-1").await.unwrap().unwrap();
        driver.scheduled(true).settling(Duration::ZERO).with_outside(Some(self.elsewhere()))
    }

    async fn is_asking(&self) -> bool {
        self.store.load(ASKED).await.unwrap().is_some()
    }

    async fn finish(&self, driver: &Driver) {
        for _ in 0..50 {
            driver.tick().await.unwrap();
            if driver.now().record.rotation.is_none() {
                return;
            }
            self.clock.advance(Duration::from_secs(3600));
        }
        panic!("it is not over: {:?}", driver.waiting());
    }
}

fn rotate(driver: &Driver, kind: What) -> Command {
    let policy = plan::policy(&driver.now().record);
    Command::Rotate(Rotate { kind, policy, root: NewRoot::Outside, reason: String::new() })
}

/// Whether somebody who believes these roots alone believes what the issuer that signs signs.
fn is_believed(bench: &Bench, driver: &Driver, root: &CertificateDer<'static>) -> Result<(), String> {
    let record = driver.now().record.clone();
    let authority = bench.foundry.open(&record, record.signing().unwrap()).unwrap();
    let domain: TrustDomain = "mesh.local".parse().unwrap();
    let trust = Trust::new(domain.clone(), 1).with_roots(&domain, [root.clone()]).unwrap();
    let key = Key::generate(KeyKind::P256).unwrap();
    let key = PublicKey::from_spki(&rcgen::PublicKeyData::subject_public_key_info(&key)).unwrap();
    let identity = "spiffe://mesh.local/ns/shop/sa/orders".parse().unwrap();
    let request =
        Leaf { key: &key, identity: &identity, dns_names: &[], ttl: DAY, not_before: None, mark: None };
    let now = bench.clock.now();
    let issued = authority.leaf(&request, &crate::ca::Lifetimes::default(), now).unwrap();
    trust.verify(&issued.chain, Usage::Server, now).map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn the_same_key_is_asked_for_until_there_is_an_answer_whoever_crashes_meanwhile() {
    let bench = Bench::new(Ca::root("outside", |_| {}));
    let driver = bench.own().await;
    let before = driver.now().record.clone();
    let away = NotSigned { reason: "it is away".to_owned(), spent: false };
    bench.fake.with(|manner| manner.refuses = Some(away));
    for driver in [&driver, &bench.open().await] {
        let error = driver.command(&rotate(driver, What::Root), "sre").await.unwrap_err();
        assert_eq!(error.to_string(), "it is away");
    }
    assert_eq!(driver.now().record, before, "nothing is written");
    assert!(bench.is_asking().await);
    bench.fake.with(|manner| manner.refuses = None);
    let driver = bench.open().await;
    driver.command(&rotate(&driver, What::Root), "sre").await.unwrap();
    let keys = bench.fake.with(|manner| manner.asked.iter().map(|asked| asked.key).collect::<Vec<_>>());
    assert_eq!((keys.len(), keys.iter().all(|key| *key == keys[0])), (3, true));
    assert!(!bench.is_asking().await, "its key is in the record now");
    bench.finish(&driver).await;
    let record = driver.now().record.clone();
    let facts = Facts::read(&CertificateDer::from(record.signing().unwrap().certificate.0.clone())).unwrap();
    assert_eq!(facts.key_hash, keys[0]);

    // The next issuer has another key; one that was denied or is a day old is not asked for again.
    let spent = NotSigned { reason: "denied".to_owned(), spent: true };
    bench.fake.with(|manner| manner.refuses = Some(spent));
    let issuer = rotate(&driver, What::Issuer);
    driver.command(&issuer, "sre").await.unwrap_err();
    assert!(!bench.is_asking().await);
    bench.fake.with(|manner| manner.refuses.as_mut().unwrap().spent = false);
    driver.command(&issuer, "sre").await.unwrap_err();
    bench.clock.advance(DAY);
    driver.command(&issuer, "sre").await.unwrap_err();
    let keys =
        bench.fake.with(|manner| manner.asked.iter().skip(2).map(|asked| asked.key).collect::<Vec<_>>());
    for (index, key) in keys.iter().enumerate() {
        assert!(!keys[..index].contains(key), "{index}");
    }
}

#[tokio::test]
async fn what_comes_back_is_looked_at_like_that_of_a_stranger() {
    let limited = |params: &mut CertificateParams| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let cases: [(&str, Change, &str); 6] = [
        ("no authority", |params| params.is_ca = IsCa::ExplicitNoCa, "path length"),
        ("no path length", |_| {}, "path length"),
        (
            "no key usage",
            |params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
                params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            },
            "keyCertSign",
        ),
        (
            "for servers alone",
            |params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            },
            "trial",
        ),
        (
            "not valid yet",
            |params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
                params.not_before = (start() + DAY).into();
            },
            "not valid yet",
        ),
        (
            "too short",
            |params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
                params.not_after = (start() + DAY).into();
            },
            "need twice that",
        ),
    ];
    let bench = Bench::new(Ca::root("outside", |_| {}));
    let driver = bench.own().await;
    let before = driver.now().record.clone();
    let refused = async |what: &str, words: &str| {
        let error = driver.command(&rotate(&driver, What::Root), "sre").await.unwrap_err().to_string();
        assert!(error.contains(words), "{what}: {error}");
        assert_eq!(driver.now().record, before, "{what}: nothing is written");
    };
    for (what, change, words) in cases {
        bench.fake.with(|manner| manner.change = change);
        refused(what, words).await;
    }
    bench.fake.with(|manner| (manner.change, manner.other_key) = (limited, true));
    refused("another key", "does not belong").await;
    let middle = Arc::new(Ca::root("unknown", |_| {}).below("middle"));
    bench.fake.with(|manner| (manner.other_key, manner.ways) = (false, vec![middle]));
    refused("no root", "roots_file").await;
    let weak: Change = |params| params.is_ca = IsCa::NoCa;
    bench.fake.with(|manner| manner.ways = vec![Arc::new(Ca::root("no authority", weak))]);
    refused("a root that is none", "is no root").await;
    // A root that is distrusted does not come back.
    let root = Arc::new(Ca::root("outside", |_| {}));
    bench.fake.with(|manner| manner.ways = vec![Arc::clone(&root)]);
    driver.command(&rotate(&driver, What::Root), "sre").await.unwrap();
    bench.finish(&driver).await;
    let id = driver.now().record.current_root().unwrap().id.0.clone();
    let distrust = Command::Distrust { root: id, reason: "stolen".to_owned() };
    driver.command(&distrust, "sre").await.unwrap();
    bench.finish(&driver).await;
    let error = driver.command(&rotate(&driver, What::Root), "sre").await.unwrap_err().to_string();
    assert!(error.contains("which is distrusted (stolen)"), "{error}");
}

#[tokio::test]
async fn issuers_are_renewed_by_themselves_and_it_is_told_when_they_cannot_be() {
    let bench = Bench::new(Ca::root("outside", |_| {}));
    let now = bench.clock.now().into();
    let domain = "mesh.local".parse().unwrap();
    let founded = bench.elsewhere().found(&*bench.store, &domain, Lifetimes::default(), now).await.unwrap();
    driver::found(&*bench.store, &founded).await.unwrap();
    assert!(founded.current_root().unwrap().key.is_none());
    let driver = bench.open().await;
    driver.tick().await.unwrap();
    assert!(!driver.ask_for_what_is_due().await, "nothing is due");
    let first = driver.now().record.signing().unwrap().id.clone();

    // Half of its life is over, and the other root is somewhere else.
    bench.clock.advance(183 * DAY);
    let own = bench.fake.with(|manner| std::mem::take(&mut manner.ways));
    bench.fake.with(|manner| manner.ways = vec![Arc::new(Ca::root("another", |_| {}))]);
    assert!(!driver.tick().await.unwrap());
    assert!(!driver.ask_for_what_is_due().await);
    let told = driver.overdue().unwrap();
    assert!(told.contains("the issuer is due") && told.contains("rotate root --vault"), "{told}");
    let asked = |bench: &Bench| bench.fake.with(|manner| manner.asked.len());
    let before = asked(&bench);
    driver.ask_for_what_is_due().await;
    assert_eq!(asked(&bench), before, "not again at once");
    bench.clock.advance(Duration::from_secs(11));
    driver.ask_for_what_is_due().await;
    bench.clock.advance(Duration::from_secs(11));
    driver.ask_for_what_is_due().await;
    assert_eq!(asked(&bench), before + 1, "the pauses grow");

    bench.fake.with(|manner| manner.ways = own);
    bench.clock.advance(Duration::from_secs(60));
    assert!(driver.ask_for_what_is_due().await);
    assert_eq!(driver.overdue(), None);
    bench.finish(&driver).await;
    let record = driver.now().record.clone();
    assert_ne!(record.signing().unwrap().id, first);
    assert_eq!(record.current_root().unwrap().id, founded.current_root().unwrap().id);
}

#[tokio::test]
async fn authorities_between_issuer_and_root_are_handed_out_with_every_certificate() {
    let root = Ca::root("outside", |_| {});
    let middle = Arc::new(root.below("middle"));
    let top = root.certificate.clone();
    let bench = Bench::new(Ca::root("unused", |_| {}));
    bench.fake.with(|manner| manner.ways = vec![middle, Arc::new(root)]);
    let driver = bench.own().await;
    let old = CertificateDer::from(driver.now().record.current_root().unwrap().certificate.0.clone());
    driver.command(&rotate(&driver, What::Root), "sre").await.unwrap();
    let notes = driver.now().record.rotation.as_ref().unwrap().history[0].note.clone();
    assert!(notes.contains("not signed over by the old root"), "two stand below it: {notes}");
    bench.finish(&driver).await;
    let record = driver.now().record.clone();
    assert_eq!(record.signing().unwrap().above.len(), 1);
    // The one in the middle ends first, and so does everything below it.
    assert!(record.signing().unwrap().not_after <= Moment::from(start() + 1000 * DAY));
    is_believed(&bench, &bench.open().await, &top).unwrap();
    is_believed(&bench, &driver, &old).unwrap_err();
}

#[tokio::test]
async fn who_knows_the_old_root_alone_is_led_by_its_signature_and_a_plan_asks_for_nothing() {
    let root = Ca::root("outside", |_| {});
    let top = root.certificate.clone();
    let bench = Bench::new(root);
    let driver = bench.own().await;
    let old = CertificateDer::from(driver.now().record.current_root().unwrap().certificate.0.clone());
    let policy = plan::policy(&driver.now().record);
    let planned = Rotate { kind: What::Root, policy, root: NewRoot::Outside, reason: String::new() };
    let plan = driver.plan(&planned).await.unwrap();
    assert!(plan.blockers.is_empty() && plan.stages.len() == 6, "{plan:?}");
    assert!(plan.outside.starts_with("it may be asked; its root is "), "{}", plan.outside);
    assert_eq!(bench.fake.with(|manner| manner.asked.len()), 0);
    driver.command(&rotate(&driver, What::Root), "sre").await.unwrap();
    for _ in 0..3 {
        driver.tick().await.unwrap();
    }
    let state = driver.now().record.rotation.as_ref().unwrap().state;
    assert_eq!(state, crate::ca::rotation::State::Cutover, "the new one signs");
    for root in [&old, &top] {
        is_believed(&bench, &driver, root).unwrap();
    }
    bench.finish(&driver).await;
    let error = driver.plan(&planned).await.unwrap_err().to_string();
    assert!(error.contains("is in use already"), "{error}");
    let text = format!("{:?}", driver.now().record);
    assert!(text.contains("vault in this test") && !text.contains("BEGIN"), "who has the key is written");
}

#[tokio::test]
async fn an_issuer_that_was_signed_by_hand_is_taken_with_its_key_and_its_root() {
    let limited: Change = |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let by_hand = |root: &Ca| {
        let key = Key::generate(KeyKind::P256).unwrap();
        let signed = params("by hand", 365 * DAY, limited).signed_by(&key, &root.signer).unwrap();
        let chain = [Der(signed.der().to_vec()), Der(root.certificate.to_vec())];
        driver::pem(&chain) + &driver::pem(&[Der(key.der().to_vec())]).replace("CERTIFICATE", "PRIVATE KEY")
    };
    let (root, other) = (Ca::root("offline", |_| {}), Ca::root("another", |_| {}));
    let bench = Bench::new(Ca::root("unused", |_| {}));
    let driver = bench.own().await;
    let rotate = |kind, pem: String| {
        let policy = plan::policy(&driver.now().record);
        Command::Rotate(Rotate { kind, policy, root: NewRoot::Pem(pem), reason: String::new() })
    };
    driver.command(&rotate(What::Root, by_hand(&root)), "sre").await.unwrap();
    bench.finish(&driver).await;
    let first = driver.now().record.clone();
    let held = first.current_root().unwrap();
    assert_eq!((held.key.as_ref(), held.kept.as_str()), (None, "elsewhere"));
    is_believed(&bench, &driver, &root.certificate).unwrap();

    driver.command(&rotate(What::Issuer, by_hand(&root)), "sre").await.unwrap();
    bench.finish(&driver).await;
    let record = driver.now().record.clone();
    assert_ne!(record.signing().unwrap().id, first.signing().unwrap().id);
    is_believed(&bench, &bench.open().await, &root.certificate).unwrap();
    let key = Key::generate(KeyKind::P256).unwrap();
    let own = params("own", 365 * DAY, |_| {}).self_signed(&key).unwrap();
    let own = driver::pem(&[Der(own.der().to_vec())])
        + &driver::pem(&[Der(key.der().to_vec())]).replace("CERTIFICATE", "PRIVATE KEY");
    for (pem, words) in [(by_hand(&other), "exchanges both"), (own, "this is a root")] {
        let error = driver.command(&rotate(What::Issuer, pem), "sre").await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(bench.fake.with(|manner| manner.asked.len()), 0);
}
