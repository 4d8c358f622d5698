//! Sees to it that what is wanted is there: looks what the store says, serves it, and orders what is due.
//!
//! One task, and one more for each order, of which there are four at most. The right to order is taken in the record of the
//! names, so of several replicas one orders. It is looked again whenever somebody has changed something, and every 30
//! seconds in any case.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::last_good::LastGood;
use super::lease::{self, Lease, NEWS};
use super::record::{Failed, seconds};
use super::schedule::{self, Due};
use super::{
    Ask, Authority, CERTIFICATES, Certificate, CertificateStatus, Challenge, Counts, Failure, FailureStatus,
    Issued, Present, Record, Seconds, Served, State, Status, Vault, Want, listed, record_name,
};
use crate::ca::authority::pem_certificates;
use crate::ca::store::{Store, StoreError, Version};
use crate::clock::Clock;
use crate::sni::{CertPem, certified_key};
use crate::verify::ClientIdentity;

/// The longest that nobody looks.
const TICK: Duration = Duration::from_secs(30);
/// Until a store that failed is asked again.
const STORE_PAUSE: Duration = Duration::from_secs(2);
/// Orders at once.
const ORDERS: usize = 4;
/// One order, from the first word to the certificate.
const ORDER: Duration = Duration::from_secs(8 * 60);
/// When an instance that orders is taken for dead: a little longer, because clocks differ.
const LEASE: Duration = Duration::from_secs(10 * 60);
/// How often it is tried to keep a certificate that was issued.
const KEEP_ATTEMPTS: usize = 10;
/// When the authority is first asked for hints about a new certificate, and again when it did not answer.
const FIRST_HINTS: Duration = Duration::from_secs(3600);
const HINTS_AGAIN: Duration = Duration::from_secs(6 * 3600);
/// How long records that nobody wants are left alone: another replica may not know yet.
const UNWANTED: Seconds = 24 * 3600;

/// Whoever serves. Called on a thread that may block, one call after the other.
pub type Publish = Arc<dyn Fn(Arc<Served>) + Send + Sync>;

/// What a keeper works with.
pub struct Parts {
    pub authority: Arc<dyn Authority>,
    /// What the authority is called in records.
    pub directory: String,
    pub store: Arc<dyn Store>,
    pub vault: Arc<Vault>,
    /// What this instance is called among those that share the store, over restarts too.
    pub instance: String,
    /// The pause after the first failure.
    pub retry: Duration,
    /// How long it may take until all replicas answer what one has written.
    pub visible: Duration,
    /// Where what was read last is kept, for a store that may be away at the next start.
    pub last_good: Option<PathBuf>,
    pub clock: Arc<dyn Clock>,
    pub publish: Publish,
}

/// Keeps certificates. Its task ends with the last clone.
#[derive(Clone)]
pub struct Keeper {
    inner: Arc<Inner>,
    _task: Arc<Ending>,
}

struct Ending(AbortHandle);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Inner {
    parts: Parts,
    wanted: watch::Sender<Arc<Vec<Want>>>,
    poked: Notify,
    looked: watch::Sender<bool>,
    view: Mutex<View>,
    /// What was published last; held while the store is read, so that an older view never follows a newer one.
    published: tokio::sync::Mutex<Option<Arc<Served>>>,
    issued: AtomicU64,
    failed: AtomicU64,
}

/// The store as it was read last.
#[derive(Default)]
struct View {
    news: Option<Version>,
    records: BTreeMap<String, (Version, Record)>,
    /// Records that cannot be served, and why.
    unusable: BTreeMap<String, String>,
    problem: Option<String>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("directory", &self.inner.parts.directory).finish_non_exhaustive()
    }
}

impl Keeper {
    /// Starts to keep certificates, of which none is wanted yet. To be called inside a runtime.
    #[must_use]
    pub fn start(parts: Parts) -> Self {
        let inner = Arc::new(Inner {
            parts,
            wanted: watch::Sender::default(),
            poked: Notify::new(),
            looked: watch::Sender::new(false),
            view: Mutex::default(),
            published: tokio::sync::Mutex::default(),
            issued: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        let task = tokio::spawn(inner.clone().run());
        Self { inner, _task: Arc::new(Ending(task.abort_handle())) }
    }

    /// What is wanted from now on.
    pub fn want(&self, wanted: Vec<Want>) {
        self.inner.wanted.send_if_modified(|before| {
            let differs = **before != wanted;
            if differs {
                *before = Arc::new(wanted);
            }
            differs
        });
    }

    /// Waits until the store was looked at once, whether it could be read or not.
    pub async fn looked(&self) {
        // The sender lives as long as this does.
        let _ = self.inner.looked.subscribe().wait_for(|looked| *looked).await;
    }

    /// How everything stands.
    #[must_use]
    pub fn status(&self) -> Status {
        self.inner.status()
    }

    /// Orders new certificates for the names of a resource, or for those that have this one among them, at once and whatever
    /// went wrong before. Gives the names.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn renew(&self, what: &str) -> Result<Vec<Vec<String>>, String> {
        self.inner.renew(what).await
    }
}

impl Inner {
    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Seconds {
        seconds(self.parts.clock.now())
    }

    /// The names that are wanted, each set once, by its record.
    fn wants(&self) -> BTreeMap<String, Want> {
        let wanted = self.wanted.borrow().clone();
        let named = |want: &Want| (record_name(&self.parts.directory, &want.names), want.clone());
        // Of several that want the same, the first says how.
        wanted.iter().rev().map(named).collect()
    }

    async fn run(self: Arc<Self>) {
        let mut wanted = self.wanted.subscribe();
        let mut orders = JoinSet::new();
        let mut busy = BTreeSet::new();
        self.serve_last_good().await;
        loop {
            let read = self.refresh().await;
            self.looked.send_replace(true);
            let wait = match &read {
                Ok(()) => self.begin(&mut orders, &mut busy).await.min(TICK),
                Err(_) => STORE_PAUSE,
            };
            let seen = self.view().news;
            let news = async {
                if read.is_err() || self.parts.store.changed(NEWS, seen, TICK).await.is_err() {
                    tokio::time::sleep(STORE_PAUSE).await;
                }
            };
            tokio::select! {
                Some(done) = orders.join_next(), if !orders.is_empty() => match done {
                    Ok(name) => {
                        busy.remove(&name);
                    }
                    // Nobody aborts them, so one has panicked: which one is not known, and the others will be seen to be at work.
                    Err(error) => {
                        tracing::error!(%error, "an order of a certificate broke off");
                        if orders.is_empty() {
                            busy.clear();
                        }
                    }
                },
                _ = wanted.changed() => {}
                () = self.poked.notified() => {}
                () = news => {}
                () = self.parts.clock.pause(wait) => {}
            }
        }
    }

    /// Begins what is due, and says how long until something else is.
    async fn begin(self: &Arc<Self>, orders: &mut JoinSet<String>, busy: &mut BTreeSet<String>) -> Duration {
        let (now, wants) = (self.now(), self.wants());
        let mut next = now + TICK.as_secs();
        for (name, want) in &wants {
            if busy.contains(name) {
                continue;
            }
            let seen = self.view().records.get(name).cloned();
            let due = schedule::due(seen.as_ref().map(|(_, record)| record), &self.parts.instance, now);
            if let Due::At(at) = due {
                next = next.min(at);
                continue;
            }
            if orders.len() >= ORDERS {
                // The end of one is waited for.
                continue;
            }
            busy.insert(name.clone());
            let (inner, want, name) = (self.clone(), want.clone(), name.clone());
            orders.spawn(async move {
                let new = || Record::new(&inner.parts.directory, &want.names, now);
                let lease = Lease::of(inner.parts.store.clone(), name.clone(), seen.as_ref(), new);
                match due {
                    Due::Hints => inner.ask_for_hints(&lease).await,
                    _ => inner.order(&want, &lease).await,
                }
                name
            });
        }
        self.forget(&wants, now).await;
        Duration::from_secs(next.saturating_sub(now)).max(Duration::from_millis(200))
    }

    /// Removes what nobody has wanted for a day and what could not be served any more.
    async fn forget(&self, wants: &BTreeMap<String, Want>, now: Seconds) {
        let old: Vec<(String, Version)> = {
            let view = self.view();
            let is_old = |name: &str, record: &Record| {
                let ended =
                    record.certificate.as_ref().is_none_or(|certificate| certificate.not_after <= now);
                let left = record.changed + UNWANTED <= now && record.at_work(now).is_none();
                !wants.contains_key(name) && left && ended
            };
            let old = view.records.iter().filter(|(name, (_, record))| is_old(name, record));
            old.map(|(name, (version, _))| (name.clone(), *version)).collect()
        };
        if old.is_empty() {
            return;
        }
        for (name, version) in old {
            match self.parts.store.remove(&name, version).await {
                Ok(()) => {
                    tracing::info!(
                        record = name,
                        "nobody wants this certificate, and it has ended: forgotten"
                    );
                }
                Err(error) => tracing::debug!(record = name, %error, "a record is not removed"),
            }
        }
        // Nobody would look before the next tick.
        lease::tell(&*self.parts.store).await;
    }

    /// Reads the store and serves what it says.
    async fn refresh(&self) -> Result<(), StoreError> {
        let mut published = self.published.lock().await;
        let read = async {
            // First, so that what is changed while the rest is read is looked at again.
            let news = self.parts.store.load(NEWS).await?.map(|stored| stored.version);
            Ok((news, self.parts.store.list(CERTIFICATES).await?))
        };
        let (news, stored) = match read.await {
            Ok(read) => read,
            Err(error) => {
                let error: StoreError = error;
                let problem = error.to_string();
                let mut view = self.view();
                if view.problem.as_ref() != Some(&problem) {
                    tracing::warn!(%error, "the certificates of ACME cannot be read; what was read last is served");
                }
                view.problem = Some(problem);
                return Err(error);
            }
        };
        let mut records = BTreeMap::new();
        for (name, stored) in stored {
            match serde_json::from_slice(&stored.value) {
                Ok(record) => {
                    records.insert(name, (stored.version, record));
                }
                Err(error) => {
                    tracing::warn!(record = name, %error, "what is remembered of a certificate cannot be read")
                }
            }
        }
        let served = self.served(records.iter().map(|(name, (_, record))| (name.as_str(), record)));
        let changed = {
            let mut view = self.view();
            let changed = view.records != records;
            view.news = news;
            view.records = records;
            view.problem = None;
            changed
        };
        if changed && let Some(path) = &self.parts.last_good {
            let all: Vec<Record> = self.view().records.values().map(|(_, record)| record.clone()).collect();
            let file = LastGood(path.clone());
            if let Ok(Err(error)) = tokio::task::spawn_blocking(move || file.write(&all)).await {
                tracing::warn!(%error, path = %path.display(), "certificates cannot be kept for the next start");
            }
        }
        self.publish(&mut published, served).await;
        Ok(())
    }

    /// What was kept by the process before, until the store is read.
    async fn serve_last_good(&self) {
        let Some(path) = self.parts.last_good.clone() else { return };
        let mut published = self.published.lock().await;
        let file = LastGood(path.clone());
        match tokio::task::spawn_blocking(move || file.read()).await {
            Ok(Ok(records)) if !records.is_empty() => {
                let served = self.served(records.iter().map(|record| ("", record)));
                self.publish(&mut published, served).await;
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, path = %path.display(), "certificates of the last start cannot be read");
            }
            _ => {}
        }
    }

    fn served<'a>(&self, records: impl Iterator<Item = (&'a str, &'a Record)>) -> Served {
        let now = self.now();
        let mut served = Served::default();
        let mut unusable = BTreeMap::new();
        for (name, record) in records {
            if let Some(work) = record.at_work(now) {
                served.challenges.extend(work.challenges.iter().cloned());
            }
            let Some(certificate) = &record.certificate else { continue };
            match self.parts.vault.open(&purpose(&record.names), &certificate.key) {
                Ok(key) => served.certificates.push(Issued {
                    names: record.names.clone(),
                    chain: certificate.chain.clone(),
                    key,
                    not_after: certificate.not_after,
                    current: record.directory == self.parts.directory,
                }),
                Err(error) => {
                    let problem = format!("the key cannot be used: {error}");
                    unusable.insert(name.to_owned(), problem);
                }
            }
        }
        let mut view = self.view();
        if view.unusable != unusable {
            for (name, problem) in &unusable {
                tracing::error!(record = name, problem, "a certificate of ACME is not served");
            }
            view.unusable = unusable;
        }
        served
    }

    async fn publish(&self, published: &mut Option<Arc<Served>>, served: Served) {
        if published.as_ref().is_some_and(|before| **before == served) {
            return;
        }
        let served = Arc::new(served);
        let (publish, told) = (self.parts.publish.clone(), served.clone());
        match tokio::task::spawn_blocking(move || publish(told)).await {
            Ok(()) => *published = Some(served),
            Err(error) => tracing::error!(%error, "certificates of ACME could not be put to use"),
        }
    }

    /// One order, from the claim to the certificate or the failure.
    async fn order(&self, want: &Want, lease: &Lease) {
        let now = self.now();
        let names = listed(&want.names).to_string();
        match lease.claim(&self.parts.instance, now + LEASE.as_secs(), now).await {
            Ok(()) => {}
            Err(failure) if failure.lost => return tracing::debug!(names, "another instance orders"),
            Err(failure) => {
                return tracing::warn!(names, reason = failure.reason, "a certificate cannot be ordered");
            }
        }
        tracing::info!(names, authority = self.parts.directory, "a certificate is ordered");
        let obtained = match timeout(ORDER, self.obtain(want, lease)).await {
            Ok(obtained) => obtained,
            Err(_) => Err(Failure::unreached(format!("no certificate within {} s", ORDER.as_secs()))),
        };
        match obtained {
            Ok(certificate) => {
                self.issued.fetch_add(1, Ordering::Relaxed);
                self.keep(&names, certificate, lease).await;
            }
            Err(failure) if failure.lost => {
                tracing::warn!(names, reason = failure.reason, "an order was given up")
            }
            Err(failure) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                self.note(&names, &failure, lease).await;
            }
        }
        // A failure is told by the next look of the task itself.
        let _ = self.refresh().await;
    }

    async fn obtain(&self, want: &Want, lease: &Lease) -> Result<Certificate, Failure> {
        let before = lease.record().await;
        let key = KeyPair::generate().map_err(Failure::unreached)?;
        let csr = request(&want.names, &key)?;
        // An authority that refuses the order because of this is asked without it the next time.
        let replaces = before.certificate.as_ref().filter(|it| it.hinted && before.failed.is_none());
        let ask = Ask {
            names: &want.names,
            csr: &csr,
            challenge: want.challenge,
            replaces: replaces.map(|it| it.chain.as_str()),
        };
        let chain = self.parts.authority.obtain(ask, &Presenter { inner: self, lease }).await?;
        let key = Zeroizing::new(key.serialize_pem());
        let (not_before, not_after) = validity(&chain, &key, &want.names).map_err(|reason| {
            Failure::refused(format!("what the authority has issued cannot be used: {reason}"))
        })?;
        let now = self.now();
        if not_after <= now {
            return Err(Failure::refused(
                "what the authority has issued has ended already: is the clock right?",
            ));
        }
        Ok(Certificate {
            chain,
            key: self.parts.vault.close(&purpose(&want.names), &key).map_err(Failure::unreached)?,
            not_before,
            not_after,
            obtained: now,
            renew: schedule::renewal(not_before, not_after, fastrand::f64()),
            hints: Some(now + FIRST_HINTS.as_secs()),
            hinted: false,
        })
    }

    /// What was issued is not thrown away because the store does not answer at this moment.
    async fn keep(&self, names: &str, certificate: Certificate, lease: &Lease) {
        let (renew, end) = (certificate.renew, certificate.not_after);
        for _ in 0..KEEP_ATTEMPTS {
            let certificate = certificate.clone();
            let kept = lease
                .change(self.now(), |record| {
                    record.certificate = Some(certificate);
                    record.work = None;
                    record.failed = None;
                })
                .await;
            match kept {
                Ok(()) => {
                    return tracing::info!(
                        names,
                        not_after = end,
                        renew_at = renew,
                        "a certificate was issued"
                    );
                }
                Err(failure) if failure.lost => {
                    return tracing::warn!(
                        names,
                        reason = failure.reason,
                        "a certificate that was issued is not kept"
                    );
                }
                Err(failure) => {
                    tracing::warn!(
                        names,
                        reason = failure.reason,
                        "a certificate that was issued waits to be kept"
                    );
                    tokio::time::sleep(STORE_PAUSE).await;
                }
            }
        }
        tracing::error!(names, "a certificate that was issued could not be kept");
    }

    /// Remembers a failure, which says when the next order is tried.
    async fn note(&self, names: &str, failure: &Failure, lease: &Lease) {
        let now = self.now();
        let longest = if failure.counts { schedule::LONGEST_REFUSED } else { schedule::LONGEST_UNREACHED };
        let asked = failure.not_before.map(seconds).unwrap_or_default();
        let (first, random) = (self.parts.retry, fastrand::f64());
        let noted = lease.change(now, |record| {
            let count = record.failed.as_ref().map_or(0, |failed| failed.count).saturating_add(1);
            let pause = schedule::pause(count, first, longest, random);
            let next = (now + pause.as_secs().max(1)).max(asked);
            record.failed = Some(Failed { count, at: now, next, reason: failure.reason.clone() });
            record.work = None;
        });
        let noted = noted.await;
        let next = lease.record().await.failed.map(|failed| failed.next);
        tracing::warn!(names, reason = failure.reason, next_attempt = next, "there is no new certificate");
        if let Err(error) = noted {
            tracing::warn!(names, reason = error.reason, "the failure cannot be kept");
        }
    }

    /// Asks the authority when a certificate is to be renewed.
    async fn ask_for_hints(&self, lease: &Lease) {
        let Some(certificate) = lease.record().await.certificate else { return };
        let hints = match timeout(TICK, self.parts.authority.hints(&certificate.chain)).await {
            Ok(hints) => hints,
            Err(_) => Err(Failure::unreached("no answer")),
        };
        let now = self.now();
        let next = match hints {
            Ok(Some(hints)) => {
                let window = |time: SystemTime| seconds(time).max(now);
                let (start, end) = (window(hints.start), window(hints.end).max(window(hints.start)));
                // However late the window is, there is time left for attempts that fail.
                let life = certificate.not_after.saturating_sub(certificate.not_before);
                let latest = certificate.not_after.saturating_sub(life / 10);
                let renew = fastrand::u64(start..=end).min(latest);
                Certificate {
                    renew,
                    hints: Some(seconds(hints.again).max(now + 60)),
                    hinted: true,
                    ..certificate
                }
            }
            Ok(None) => Certificate { hints: None, hinted: false, ..certificate },
            Err(failure) => {
                tracing::debug!(reason = failure.reason, "the authority does not tell when to renew");
                Certificate { hints: Some(now + HINTS_AGAIN.as_secs()), ..certificate }
            }
        };
        if let Err(failure) = lease.change(now, |record| record.certificate = Some(next)).await {
            tracing::debug!(reason = failure.reason, "a hint is not kept");
        }
    }

    async fn renew(&self, what: &str) -> Result<Vec<Vec<String>>, String> {
        let store = &*self.parts.store;
        let mut asked = Vec::new();
        for (name, want) in self.wants() {
            let named = self.wanted.borrow().iter().any(|it| it.id == what && it.names == want.names);
            if !named && !want.names.iter().any(|name| name == what) {
                continue;
            }
            // One that was never ordered is ordered anyway.
            if let Some(stored) = store.load(&name).await.map_err(|error| error.to_string())? {
                let mut record: Record =
                    serde_json::from_slice(&stored.value).map_err(|error| error.to_string())?;
                record.asked = true;
                let value = serde_json::to_vec(&record).map_err(|error| error.to_string())?;
                // Somebody who has changed it at this moment is at work on it.
                store.swap(&name, Some(stored.version), &value).await.map_err(|error| error.to_string())?;
            }
            asked.push(want.names);
        }
        if !asked.is_empty() {
            lease::tell(store).await;
            self.poked.notify_one();
        }
        Ok(asked)
    }

    fn status(&self) -> Status {
        let now = self.now();
        let wanted = self.wanted.borrow().clone();
        let view = self.view();
        let mut certificates: Vec<CertificateStatus> = self
            .wants()
            .into_iter()
            .map(|(name, want)| {
                let record = view.records.get(&name).map(|(_, record)| record);
                let ids = wanted.iter().filter(|it| it.names == want.names).map(|it| it.id.clone());
                let problem = view.unusable.get(&name).cloned();
                describe(want.names.clone(), ids.collect(), record, problem, now)
            })
            .collect();
        certificates.sort_by(|one, other| one.names.cmp(&other.names));
        Status {
            directory: self.parts.directory.clone(),
            instance: self.parts.instance.clone(),
            store: self.parts.store.name().to_owned(),
            problem: view.problem.clone(),
            orders: Counts {
                issued: self.issued.load(Ordering::Relaxed),
                failed: self.failed.load(Ordering::Relaxed),
            },
            certificates,
        }
    }
}

/// Lets all replicas answer, and waits until they do.
struct Presenter<'a> {
    inner: &'a Inner,
    lease: &'a Lease,
}

impl Present for Presenter<'_> {
    fn present(&self, challenges: Vec<Challenge>) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async move {
            let inner = self.inner;
            let edit = |record: &mut Record| {
                if let Some(work) = &mut record.work {
                    work.challenges = challenges;
                }
            };
            self.lease.change(inner.now(), edit).await?;
            inner.refresh().await.map_err(Failure::unreached)?;
            if !inner.parts.visible.is_zero() {
                inner.parts.clock.pause(inner.parts.visible).await;
            }
            Ok(())
        })
    }
}

/// What the key of a certificate is sealed for.
fn purpose(names: &[String]) -> String {
    format!("acme certificate {}", names.join(","))
}

fn request(names: &[String], key: &KeyPair) -> Result<Vec<u8>, Failure> {
    let mut params = CertificateParams::new(names).map_err(Failure::unreached)?;
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(key).map_err(Failure::unreached)?;
    Ok(csr.der().to_vec())
}

/// From when and until when a chain may be served with this key for these names.
pub(super) fn validity(chain: &str, key: &str, names: &[String]) -> Result<(Seconds, Seconds), String> {
    let pair = CertPem { cert: chain.to_owned(), key: key.to_owned() };
    certified_key(&pair, &rustls::crypto::aws_lc_rs::default_provider())
        .map_err(|(_, problem)| problem.to_string())?;
    let certificates: Vec<CertificateDer<'static>> =
        pem_certificates(chain.as_bytes()).map_err(|error| error.to_string())?;
    let leaf = certificates.first().ok_or("it is empty")?;
    let parsed = webpki::EndEntityCert::try_from(leaf).map_err(|error| error.to_string())?;
    for name in names {
        let server = ServerName::try_from(name.as_str()).map_err(|error| format!("{name}: {error}"))?;
        parsed.verify_is_valid_for_subject_name(&server).map_err(|_| format!("it is not for {name}"))?;
    }
    let facts = ClientIdentity::parse(leaf).ok_or("it is not valid X.509")?;
    let at = |time: i64| Seconds::try_from(time).map_err(|_| "its dates are before 1970".to_owned());
    Ok((at(facts.not_before)?, at(facts.not_after)?))
}

fn describe(
    names: Vec<String>,
    ssls: Vec<String>,
    record: Option<&Record>,
    problem: Option<String>,
    now: Seconds,
) -> CertificateStatus {
    let certificate = record.and_then(|record| record.certificate.as_ref());
    let work = record.and_then(|record| record.at_work(now));
    let failed = record.and_then(|record| record.failed.as_ref());
    let state = match certificate {
        Some(certificate) if certificate.not_after > now => State::Valid,
        Some(_) => State::Expired,
        None if work.is_some() => State::Ordering,
        None if failed.is_some() => State::Failed,
        None => State::Waiting,
    };
    CertificateStatus {
        names,
        ssls,
        state,
        ordered_by: work.map(|work| work.by.clone()),
        not_before: certificate.map(|it| it.not_before),
        not_after: certificate.map(|it| it.not_after),
        obtained_at: certificate.map(|it| it.obtained),
        renew_at: certificate.map(|it| it.renew),
        failure: failed.map(|failed| FailureStatus {
            count: failed.count,
            at: failed.at,
            next_attempt: failed.next,
            reason: failed.reason.clone(),
        }),
        problem,
    }
}
