//! An issuer in memory, and clocks that are moved.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;
use std::sync::Mutex;

use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;

use super::*;
use crate::ca::csr::PublicKey;
use crate::clock::{Clock, ManualClock};
use crate::source::Following;
use crate::testing::{Ca, DAY, until, until_is};

const HOUR: Duration = Duration::from_secs(3600);

/// What an issuer does next; signs for an hour when nothing was said.
#[derive(Debug)]
enum Does {
    Sign(Arc<Ca>, Duration),
    Fail(Failure),
}

#[derive(Clone, Debug)]
struct Issuer {
    next: Arc<Mutex<VecDeque<Does>>>,
    otherwise: Arc<Mutex<Arc<Ca>>>,
    asked: Arc<Mutex<Vec<SystemTime>>>,
    clock: ManualClock,
}

impl Signer for Issuer {
    fn name(&self) -> String {
        "issuer of the tests".to_owned()
    }

    fn ttl(&self) -> Option<Duration> {
        Some(HOUR)
    }

    fn sign<'a>(&'a mut self, csr: &'a Csr, now: SystemTime) -> BoxFuture<'a, Result<Signed, Failure>> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(now);
            let (ca, ttl) = match self.next.lock().unwrap().pop_front() {
                Some(Does::Fail(failure)) => return Err(failure),
                Some(Does::Sign(ca, ttl)) => (ca, ttl),
                None => (self.otherwise.lock().unwrap().clone(), HOUR),
            };
            let der = CertificateSigningRequestDer::from_pem_slice(csr.pem.as_bytes()).unwrap();
            let key = PublicKey::from_csr(&der).unwrap();
            let issued = ca.sign_at(&key, &ca.id("web"), ttl, self.clock.now());
            Ok(Signed { chain: issued.chain, roots: vec![ca.root_der()] })
        })
    }
}

struct Process {
    issuer: Issuer,
    clock: ManualClock,
    identity: MeshIdentity,
    following: Following,
}

fn process(ca: &Arc<Ca>, identity: Option<SpiffeId>, next: Vec<Does>) -> Process {
    let clock = ManualClock::new(SystemTime::now());
    let time = MeshTime::new(Arc::new(clock.clone()));
    let issuer = Issuer {
        next: Arc::new(Mutex::new(next.into())),
        otherwise: Arc::new(Mutex::new(ca.clone())),
        asked: Arc::default(),
        clock: clock.clone(),
    };
    let kept = MeshIdentity::with_clock(time.clone());
    let source = Renewing::new(issuer.clone(), identity, time);
    let following = Following::start(Box::new(source), kept.clone());
    Process { issuer, clock, identity: kept, following }
}

impl Process {
    /// Lets time pass in steps of half a minute until there have been so many certificates: how long it took.
    async fn until_certificates(&self, count: u64) -> Duration {
        let mut standing = self.following.standing();
        let began = self.clock.elapsed();
        for _ in 0..100_000 {
            if standing.borrow_and_update().certificates >= count {
                return self.clock.elapsed() - began;
            }
            self.clock.advance(TICK);
            // What the clock has woken runs now.
            for _ in 0..50 {
                tokio::task::yield_now().await;
            }
        }
        unreachable!("never {count} certificates: {:?}", standing.borrow())
    }
}

#[tokio::test]
async fn a_certificate_is_renewed_at_half_of_its_life_with_a_new_key() {
    let ca = Arc::new(Ca::new("mesh.test"));
    let process = process(&ca, Some(ca.id("web")), Vec::new());
    until_is(&process.identity, "a certificate", |it| it.svid().is_some()).await;
    let first = process.identity.svid().unwrap();
    let took = process.until_certificates(2).await;
    assert!(took >= HOUR.mul_f64(0.39) && took <= HOUR.mul_f64(0.62), "{took:?}");
    let second = process.identity.svid().unwrap();
    assert_ne!(first.pkcs8(), second.pkcs8(), "a new key each time");
    assert_eq!(process.identity.trust().unwrap().generation(), 1, "the same roots are not put there again");

    // The machine sleeps for a day: it is seen at once when it wakes.
    process.clock.set(process.clock.now() + DAY);
    let took = process.until_certificates(3).await;
    assert!(took <= TICK * 2, "{took:?}");
}

#[tokio::test]
async fn failures_take_nothing_away_and_are_repeated_with_pauses() {
    let ca = Arc::new(Ca::new("mesh.test"));
    let retry = Failure { retry_after: Some(Duration::from_secs(45)), ..Failure::new("slowly") };
    let other = Arc::new(Ca::new("other.test"));
    let next = vec![
        Does::Sign(ca.clone(), HOUR),
        Does::Fail(Failure::new("away")),
        Does::Fail(retry),
        // For somebody else: not taken.
        Does::Sign(other, HOUR),
    ];
    let process = process(&ca, Some(ca.id("web")), next);
    until_is(&process.identity, "a certificate", |it| it.svid().is_some()).await;
    let first = process.identity.svid().unwrap();
    process.until_certificates(2).await;
    assert_ne!(first.leaf(), process.identity.svid().unwrap().leaf());
    let asked = process.issuer.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 5);
    assert!(asked[3].duration_since(asked[2]).unwrap() >= Duration::from_secs(45), "as the issuer asked");
    until(&mut process.following.standing(), "well", |it| it.problem.is_none().then_some(())).await;
}

#[tokio::test]
async fn a_root_is_believed_for_as_long_as_certificates_below_it_live() {
    let (old, new) = (Arc::new(Ca::new("mesh.test")), Arc::new(Ca::new("mesh.test")));
    let process = process(&old, None, Vec::new());
    until_is(&process.identity, "a certificate", |it| it.svid().is_some()).await;
    let roots = || process.identity.trust().unwrap().roots("mesh.test").count();
    assert_eq!(roots(), 1);
    *process.issuer.otherwise.lock().unwrap() = new.clone();
    process.until_certificates(2).await;
    assert_eq!(roots(), 2, "peers still show certificates of the old one");
    // The last one below the old root ends after half an hour.
    process.until_certificates(4).await;
    assert_eq!(roots(), 1);
    let left = process.identity.trust().unwrap().roots("mesh.test").next().unwrap().certificate.clone();
    assert_eq!(left, new.root_der());
}

#[tokio::test]
async fn shorter_lives_than_asked_for_are_told_and_what_cannot_work_ends() {
    let ca = Arc::new(Ca::new("mesh.test"));
    let short = process(&ca, None, vec![Does::Sign(ca.clone(), HOUR / 2)]);
    let notice = until(&mut short.following.standing(), "told", |it| it.notice.clone()).await;
    assert!(notice.contains("asked for were 3600 s"), "{notice}");
    // The next one is as asked.
    short.until_certificates(2).await;
    until(&mut short.following.standing(), "taken back", |it| it.notice.is_none().then_some(())).await;

    let hopeless = Failure { hopeless: true, ..Failure::new("never") };
    let process = process(&ca, None, vec![Does::Fail(hopeless)]);
    until(&mut process.following.standing(), "given up", |it| it.hopeless.then_some(())).await;
    assert_eq!(process.following.standing().borrow().problem.as_deref(), Some("never"));
}
