//! The service of an authority: who somebody is, certificates for him, and what he is to believe.
//!
//! Each call reads the current state anew. What is decided is written to the audit log before it is answered; if that fails
//! it is refused. The service signs nothing while its own clock is in doubt.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::stream::{self, Stream};
use prost::Message as _;
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::{debug, warn};

use super::attest::session::{Session, Sessions};
use super::attest::{self, Attestors, Grant, Refusal, renewal};
use super::audit::{Audit, Entry};
use super::authority::{self, Issued};
use super::csr::PublicKey;
use super::limits::{Buckets, Class, Desk, Full, Limits, Rate};
use super::mark::Mark;
use super::proto;
use super::proto::watch_request::Body as FromWorkload;
use super::proto::watch_response::Body as ToWorkload;
use super::seal::{SealError, Sealer};
use super::{Ack, Acks, Bundle, Current, Handed, RootState};
use crate::clock::Clock;
use crate::grpc::Caller;
use crate::identity::SpiffeId;
use crate::trust::{KeyId, Serial};

/// A proof or a request that takes longer to come is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// A judgement by somebody else and everything around it.
const JUDGEMENT: Duration = Duration::from_secs(15);
/// How long a request waits for its signature.
const QUEUE: Duration = Duration::from_secs(10);
const PROOFS: usize = 4;
/// How often a workload hears the time when nothing changes.
const PULSE: Duration = Duration::from_secs(30);
/// A clock that is off by more signs nothing.
const CLOCK: Duration = Duration::from_secs(60);
/// So many workloads have to say that the clock is off.
const WITNESSES: usize = 3;
/// Offsets that are looked at.
const OFFSETS: usize = 1024;
/// For one address: proofs that may be false are cheap to send.
const ADDRESS: Rate = Rate { per_second: 20.0, burst: 200.0 };
/// For all processes of one identity together.
const TOGETHER: f64 = 50.0;
const LONGEST_NAME: usize = 256;
const MOST_REASONS: usize = 64;

/// What a service is made of.
pub struct Parts {
    pub current: watch::Receiver<Arc<Current>>,
    pub acks: Arc<dyn Acks>,
    pub attestors: Attestors,
    pub audit: Arc<Audit>,
    pub limits: Limits,
    /// Of which the keys of sessions and of serial numbers are made.
    pub sealer: Arc<Sealer>,
    pub clock: Arc<dyn Clock>,
}

/// The service; clones are the same.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

struct Inner {
    parts: Parts,
    sessions: Sessions,
    mark: Mark,
    desk: Desk,
    processes: Buckets<(SpiffeId, String)>,
    identities: Buckets<SpiffeId>,
    attestors: Buckets<&'static str>,
    addresses: Buckets<std::net::IpAddr>,
    watchers: AtomicUsize,
    counts: Mutex<BTreeMap<(&'static str, String, &'static str), u64>>,
    signing_micros: AtomicU64,
    signed: AtomicU64,
    offsets: Mutex<HashMap<String, (i64, Duration)>>,
    /// What the offsets said when they were last looked at, in milliseconds.
    offset: AtomicI64,
    stopping: watch::Sender<bool>,
}

/// How a service is doing.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// Calls by RPC, kind of proof, and gRPC code.
    pub calls: BTreeMap<(&'static str, String, &'static str), u64>,
    pub signed: u64,
    /// Time that signatures took altogether.
    pub signing: Duration,
    pub waiting: usize,
    pub watchers: usize,
    /// What the workloads' clocks say about this one, in milliseconds; zero while too few have said anything.
    pub clock_offset_ms: i64,
}

impl Service {
    /// # Errors
    /// The library fails.
    pub fn new(parts: Parts) -> Result<Self, SealError> {
        let limits = parts.limits;
        let together = Rate {
            per_second: limits.identity.per_second * TOGETHER,
            burst: limits.identity.burst * TOGETHER,
        };
        Ok(Self(Arc::new(Inner {
            sessions: Sessions::new(&parts.sealer)?,
            mark: Mark::new(&parts.sealer)?,
            desk: Desk::new(limits.signers, limits.queue),
            processes: Buckets::new(limits.identity),
            identities: Buckets::new(together),
            attestors: Buckets::new(limits.attestor),
            addresses: Buckets::new(ADDRESS),
            watchers: AtomicUsize::new(0),
            counts: Mutex::default(),
            signing_micros: AtomicU64::new(0),
            signed: AtomicU64::new(0),
            offsets: Mutex::default(),
            offset: AtomicI64::new(0),
            stopping: watch::Sender::new(false),
            parts,
        })))
    }

    /// How it is doing.
    pub fn numbers(&self) -> Numbers {
        let inner = &self.0;
        Numbers {
            calls: inner.counts.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            signed: inner.signed.load(Ordering::Relaxed),
            signing: Duration::from_micros(inner.signing_micros.load(Ordering::Relaxed)),
            waiting: inner.desk.waiting(),
            watchers: inner.watchers.load(Ordering::Relaxed),
            clock_offset_ms: inner.offset.load(Ordering::Relaxed),
        }
    }

    /// What there is now.
    pub fn current(&self) -> Arc<Current> {
        self.0.parts.current.borrow().clone()
    }

    /// Ends the streams; calls that are under way are finished.
    pub fn stop(&self) {
        self.0.stopping.send_replace(true);
    }

    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.parts.clock
    }

    /// Follows what there is.
    pub(super) fn follow(&self) -> watch::Receiver<Arc<Current>> {
        self.0.parts.current.clone()
    }

    pub(super) fn acks(&self) -> &Arc<dyn Acks> {
        &self.0.parts.acks
    }

    pub(super) fn limits(&self) -> Limits {
        self.0.parts.limits
    }

    pub(super) fn now(&self) -> SystemTime {
        self.0.parts.clock.now()
    }

    pub(super) fn count(&self, call: &'static str, kind: &str, code: Code) {
        let mut counts = self.0.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((call, kind.to_owned(), code_name(code))).or_default() += 1;
    }

    pub(super) fn write(&self, entry: &Entry<'_>) -> Result<(), Status> {
        self.0.parts.audit.write(entry, self.now()).map_err(|error| {
            warn!(%error, "nothing is signed, because the audit log cannot be written");
            Status::unavailable("the audit log cannot be written")
        })
    }

    /// Whether this process's clock can be right.
    fn check_clock(&self, current: &Current) -> Result<(), Status> {
        let offset = Duration::from_millis(self.0.offset.load(Ordering::Relaxed).unsigned_abs());
        if offset > CLOCK {
            let words = format!("the authority's clock is off by {} s, say the workloads", offset.as_secs());
            return Err(Status::failed_precondition(words));
        }
        if self.now() + CLOCK < current.bundle().made {
            return Err(Status::failed_precondition("the authority's clock is before its own last change"));
        }
        Ok(())
    }

    /// The median of what workloads say. Positive: they are ahead.
    fn witness(&self, proxy_id: &str, offset_ms: i64) {
        let now = self.0.parts.clock.elapsed();
        let mut offsets = self.0.offsets.lock().unwrap_or_else(PoisonError::into_inner);
        offsets.retain(|_, (_, at)| now.saturating_sub(*at) < PULSE * 4);
        if offsets.len() < OFFSETS || offsets.contains_key(proxy_id) {
            offsets.insert(proxy_id.to_owned(), (offset_ms, now));
        }
        let mut all: Vec<i64> = offsets.values().map(|(offset, _)| *offset).collect();
        all.sort_unstable();
        let median = if all.len() < WITNESSES { 0 } else { all.get(all.len() / 2).copied().unwrap_or(0) };
        self.0.offset.store(median, Ordering::Relaxed);
    }

    /// Counts a proof against the limits.
    pub(super) fn admit(&self, caller: &Caller, kind: &'static str) -> Result<(), Status> {
        let elapsed = self.0.parts.clock.elapsed();
        if let Some(address) = caller.address {
            self.0.addresses.take(address.ip(), elapsed).map_err(exhausted)?;
        }
        self.0.attestors.take(kind, elapsed).map_err(exhausted)
    }

    /// Waits for the judgement of a proof. A refusal is in the log.
    pub(super) async fn prove(
        &self,
        caller: &Caller,
        kind: &'static str,
        wanted: Option<&SpiffeId>,
        judging: impl Future<Output = Result<Grant, Refusal>>,
    ) -> Result<Grant, Status> {
        let judged = timeout(JUDGEMENT, judging).await;
        let judged = judged.unwrap_or_else(|_| Err(Refusal::Unavailable("no judgement in time".to_owned())));
        judged.map_err(|refusal| {
            let actor = caller.address.map_or_else(String::new, |address| address.to_string());
            let entry = Entry::refused("attest", &actor, &refusal.to_string()).with("attestor", kind);
            let written = self.write(&entry.with("wanted", wanted.map_or("", SpiffeId::as_str)));
            written.err().unwrap_or_else(|| refused(&refusal))
        })
    }

    pub(super) fn judging<'a>(&'a self, caller: &'a Caller, current: &'a Current) -> attest::Judging<'a> {
        attest::Judging { caller, current, mark: &self.0.mark, now: self.now() }
    }

    /// Writes down who somebody was found to be.
    pub(super) fn found(&self, caller: &Caller, grant: &Grant) -> Result<(), Status> {
        let entry = Entry::allowed("attest", grant.identity.as_str())
            .with("attestor", grant.attestor)
            .with("evidence", grant.evidence.as_str())
            .with("address", caller.address.map_or(Value::Null, |address| address.to_string().into()));
        self.write(&entry)
    }

    async fn judge(
        &self,
        caller: &Caller,
        mut proofs: Streaming<proto::AttestRequest>,
    ) -> Result<(proto::Session, &'static str), (Status, &'static str)> {
        let none = "none";
        let mut found: Option<Grant> = None;
        for _ in 0..PROOFS {
            let next = timeout(PATIENCE, proofs.message()).await;
            let next = next.map_err(|_| (Status::deadline_exceeded("no proof within 10 s"), none))?;
            let Some(said) = next.map_err(|status| (status, none))? else { break };
            let Some(proof) = said.proof else {
                return Err((Status::invalid_argument("a proof of a kind that is not known here"), none));
            };
            let kind = attest::kind(&proof);
            let failed = |status: Status| (status, kind);
            self.admit(caller, kind).map_err(failed)?;
            let wanted = match said.identity.as_str() {
                "" => None,
                text => Some(text.parse::<SpiffeId>().map_err(|error| {
                    failed(Status::invalid_argument(format!("the identity that is asked for: {error}")))
                })?),
            };
            let current = self.current();
            let judging = self.judging(caller, &current);
            let judged = self.0.parts.attestors.attest(&proof, wanted.as_ref(), &judging);
            let grant = self.prove(caller, kind, wanted.as_ref(), judged).await.map_err(failed)?;
            match &mut found {
                None => found = Some(grant),
                Some(before) if before.identity == grant.identity => {
                    before.evidence = format!("{}, {}", before.evidence, grant.evidence);
                    before.longest_ttl = before.longest_ttl.into_iter().chain(grant.longest_ttl).min();
                    before.dns_names.retain(|name| grant.dns_names.contains(name));
                }
                Some(_) => {
                    return Err(failed(Status::permission_denied("the proofs name two identities")));
                }
            }
        }
        let Some(grant) = found else { return Err((Status::unauthenticated("no proof"), none)) };
        let kind = grant.attestor;
        let now = self.now();
        let current = self.current();
        self.found(caller, &grant).map_err(|status| (status, kind))?;
        let (token, session) =
            self.0.sessions.open(grant, now).map_err(|_| (Status::internal("no session"), kind))?;
        let longest = current.lifetimes.longest.as_secs();
        let answer = proto::Session {
            token: token.into_bytes(),
            expires_ms: i64::try_from(session.expires.saturating_mul(1000)).unwrap_or(i64::MAX),
            identity: session.identity.to_string(),
            dns_names: session.dns_names,
            longest_ttl_s: session.longest_ttl.map_or(longest, |ttl| ttl.min(longest)),
            server_time_ms: millis(now),
            trust_domain: current.bundle().trust_domain.to_string(),
        };
        Ok((answer, kind))
    }

    fn session(&self, token: &[u8]) -> Result<Session, Status> {
        let session = self.0.sessions.read(token, self.now());
        session.ok_or_else(|| Status::unauthenticated("the session is not known or has ended: attest again"))
    }

    /// A certificate for somebody who says on a stream what he uses.
    async fn certificate(
        &self,
        asked: proto::SignRequest,
        session: Session,
    ) -> Result<proto::SignResponse, Status> {
        let proto::SignRequest { csr_der, ttl_s, bundle_generation, proxy_id, .. } = asked;
        check_name(&proxy_id)?;
        let signed = self.sign(Wish { csr_der, ttl_s, proxy_id, session, hearing: Hearing::Stream }).await?;
        let Signed { issued, current, at } = signed;
        let life = issued.not_after.duration_since(at).unwrap_or_default();
        let bundle = current.bundle();
        Ok(proto::SignResponse {
            chain_der: issued.chain.iter().map(|certificate| certificate.to_vec()).collect(),
            issuer_id: issued.issuer.to_string(),
            server_time_ms: millis(at),
            renew_after_ms: millis(at + life / 2),
            not_after_ms: millis(issued.not_after),
            bundle: (bundle.generation != bundle_generation).then(|| bundle.into()),
        })
    }

    /// Signs for who was attested, in his turn and within the limits.
    pub(super) async fn sign(&self, wish: Wish) -> Result<Signed, Status> {
        let (identity, elapsed) = (wish.session.identity.clone(), self.0.parts.clock.elapsed());
        let process = (identity.clone(), wish.proxy_id.clone());
        self.0.processes.take(process, elapsed).map_err(exhausted)?;
        self.0.identities.take(identity, elapsed).map_err(exhausted)?;
        let class = if wish.session.attestor == renewal::KIND { Class::Renewal } else { Class::First };
        let place = timeout(QUEUE, self.0.desk.place(class)).await.unwrap_or(Err(Full));
        let place = place.map_err(|Full| exhausted(Duration::from_secs(1)))?;
        let service = self.clone();
        // A signature is a fraction of a millisecond, with RSA a few.
        let signed = tokio::task::spawn_blocking(move || {
            let _place = place;
            service.sign_now(&wish)
        });
        signed.await.map_err(|_| Status::internal("signing failed"))?
    }

    fn sign_now(&self, wish: &Wish) -> Result<Signed, Status> {
        let started = self.0.parts.clock.elapsed();
        let (now, current) = (self.now(), self.current());
        let Wish { csr_der, ttl_s, proxy_id, session, hearing } = wish;
        let identity = &session.identity;
        let actor = identity.as_str();
        let refuse = |status: Status| {
            let entry =
                Entry::refused("sign", actor, status.message()).with("attestor", session.attestor.as_str());
            self.write(&entry.with("proxy_id", proxy_id.as_str())).err().unwrap_or(status)
        };
        self.check_clock(&current).map_err(refuse)?;
        let key = PublicKey::from_csr(csr_der)
            .map_err(|error| refuse(Status::invalid_argument(error.to_string())))?;
        // What was revoked until a time that is still to come is revoked for good.
        let until = current.bundle().revoked.identities.get(identity).copied();
        if until.is_some_and(|until| until > now) {
            return Err(refuse(Status::permission_denied(format!("{identity} is revoked"))));
        }
        let issuer = current.issuer_for(proxy_id).cloned();
        let issuer =
            issuer.ok_or_else(|| refuse(Status::failed_precondition("there is no issuer that can sign")))?;
        let allowed = session.longest_ttl.map_or(current.lifetimes.longest, Duration::from_secs);
        let asked = Duration::from_secs(*ttl_s);
        let request = authority::Request {
            key: &key,
            identity,
            dns_names: &session.dns_names,
            ttl: if asked.is_zero() { allowed } else { asked.min(allowed) },
            // What comes after a revocation is not meant by it.
            not_before: until.map(|until| until + Duration::from_secs(1)),
            mark: Some(&self.0.mark),
        };
        let issued = issuer
            .leaf(&request, &current.lifetimes, now)
            .map_err(|error| refuse(Status::failed_precondition(error.to_string())))?;
        let entry = Entry::allowed("sign", actor)
            .with("attestor", session.attestor.as_str())
            .with("evidence", session.evidence.as_str())
            .with("proxy_id", proxy_id.as_str())
            .with("serial", issued.serial.to_string())
            .with("issuer", issued.issuer.to_string())
            .with("key", key.hash().to_string())
            .with("not_after", super::audit::rfc3339(issued.not_after));
        self.write(&entry)?;
        match hearing {
            Hearing::Stream => self.0.parts.acks.signed(identity, proxy_id, &issued.issuer, issued.not_after),
            Hearing::Nothing { shown } => self.0.parts.acks.handed(Handed {
                identity,
                proxy_id,
                serial: &issued.serial,
                issuer: &issued.issuer,
                not_after: issued.not_after,
                generation: current.bundle().generation,
                shown: shown.as_ref(),
            }),
        }
        self.0.signed.fetch_add(1, Ordering::Relaxed);
        let took = self.0.parts.clock.elapsed().saturating_sub(started).as_micros();
        self.0.signing_micros.fetch_add(u64::try_from(took).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(Signed { issued, current, at: now })
    }
}

/// A certificate that somebody wants who was attested.
pub(super) struct Wish {
    /// PKCS #10.
    pub csr_der: Vec<u8>,
    /// What is allowed where it is 0.
    pub ttl_s: u64,
    pub proxy_id: String,
    pub session: Session,
    pub hearing: Hearing,
}

/// What is heard of a certificate later.
pub(super) enum Hearing {
    /// Its holder says on a stream what he uses.
    Stream,
    /// Nothing; what counts is what he is handed. `shown` is the certificate that he asked by.
    Nothing { shown: Option<Serial> },
}

/// A certificate, and what the authority was when it was made.
pub(super) struct Signed {
    pub issued: Issued,
    pub current: Arc<Current>,
    pub at: SystemTime,
}

/// A name in a log, a map and a metric.
fn check_name(name: &str) -> Result<(), Status> {
    if name.is_empty() || name.len() > LONGEST_NAME || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Status::invalid_argument("a proxy_id has 1 to 256 visible characters"));
    }
    Ok(())
}

fn millis(time: SystemTime) -> i64 {
    i64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(i64::MAX)
}

/// A time from milliseconds since 1970.
pub(crate) fn from_millis(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

fn refused(refusal: &Refusal) -> Status {
    let words = refusal.to_string();
    match refusal {
        Refusal::Proof(_) => Status::unauthenticated(words),
        Refusal::Identity(_) => Status::permission_denied(words),
        Refusal::Malformed(_) => Status::invalid_argument(words),
        Refusal::Unavailable(_) => Status::unavailable(words),
    }
}

/// `google.rpc.Status` with a `google.rpc.RetryInfo`, as clients of gRPC know them.
#[derive(Clone, PartialEq, prost::Message)]
struct Detailed {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Detail>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Detail {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<Delay>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Delay {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

const RETRY_INFO: &str = "type.googleapis.com/google.rpc.RetryInfo";

/// Come back after this time.
fn exhausted(wait: Duration) -> Status {
    let message = "too many certificates are asked for".to_owned();
    let delay = Delay {
        seconds: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(wait.subsec_nanos()).unwrap_or(0),
    };
    let info = RetryInfo { retry_delay: Some(delay) }.encode_to_vec();
    let details = vec![Detail { type_url: RETRY_INFO.to_owned(), value: info }];
    let detailed = Detailed { code: Code::ResourceExhausted.into(), message: message.clone(), details };
    let mut metadata = MetadataMap::new();
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    if let Ok(value) = MetadataValue::try_from(seconds.to_string()) {
        metadata.insert("retry-after", value);
    }
    Status::with_details_and_metadata(
        Code::ResourceExhausted,
        message,
        detailed.encode_to_vec().into(),
        metadata,
    )
}

/// How long the server wants to be left alone.
pub fn retry_after(status: &Status) -> Option<Duration> {
    if let Ok(detailed) = Detailed::decode(status.details()) {
        let info = detailed.details.iter().find(|detail| detail.type_url == RETRY_INFO);
        let delay = info.and_then(|detail| RetryInfo::decode(detail.value.as_slice()).ok()?.retry_delay);
        if let Some(delay) = delay {
            let seconds = u64::try_from(delay.seconds).unwrap_or(0);
            return Some(Duration::new(seconds, u32::try_from(delay.nanos).unwrap_or(0).min(999_999_999)));
        }
    }
    status.metadata().get("retry-after")?.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::InvalidArgument => "invalid_argument",
        Code::Unauthenticated => "unauthenticated",
        Code::PermissionDenied => "permission_denied",
        Code::FailedPrecondition => "failed_precondition",
        Code::ResourceExhausted => "resource_exhausted",
        Code::Unavailable => "unavailable",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::Cancelled => "cancelled",
        _ => "other",
    }
}

impl From<&Bundle> for proto::TrustBundle {
    fn from(bundle: &Bundle) -> Self {
        let state = |state| match state {
            RootState::Staged => proto::RootState::Staged,
            RootState::Active => proto::RootState::Active,
            RootState::Retiring => proto::RootState::Retiring,
        };
        let roots = bundle.roots.iter().map(|root| proto::Root {
            certificate_der: root.certificate.to_vec(),
            state: state(root.state).into(),
        });
        let revoked = &bundle.revoked;
        let mut serials: Vec<_> = revoked.serials.iter().map(|serial| serial.as_bytes().to_vec()).collect();
        serials.sort_unstable();
        let mut identities: Vec<_> = revoked.identities.iter().collect();
        identities.sort_unstable();
        let identities = identities.into_iter().map(|(identity, until)| proto::RevokedIdentity {
            identity: identity.to_string(),
            until_ms: millis(*until),
        });
        let authorities = revoked.authorities.iter().map(|authority| authority.as_bytes().to_vec());
        Self {
            generation: bundle.generation,
            least_generation: bundle.least_generation,
            trust_domain: bundle.trust_domain.to_string(),
            roots: roots.collect(),
            revoked_serials: serials,
            revoked_identities: identities.collect(),
            made_ms: millis(bundle.made),
            least_connection_generation: bundle.least_connection_generation,
            distrusted_authorities: authorities.collect(),
            shadow_roots: bundle.shadow_roots.iter().map(|root| root.to_vec()).collect(),
        }
    }
}

/// Why somebody's bundle or acknowledgement is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WireError(String);

impl TryFrom<proto::TrustBundle> for Bundle {
    type Error = WireError;

    fn try_from(told: proto::TrustBundle) -> Result<Self, WireError> {
        let wrong = |what: &str, problem: String| WireError(format!("the bundle's {what}: {problem}"));
        let mut revoked = crate::trust::Revoked {
            serials: told.revoked_serials.iter().map(|serial| Serial::new(serial)).collect(),
            ..crate::trust::Revoked::default()
        };
        for taken in told.revoked_identities {
            let identity = taken.identity.parse().map_err(|error: crate::identity::IdentityError| {
                wrong("revoked identities", error.to_string())
            })?;
            revoked.identities.insert(identity, from_millis(taken.until_ms));
        }
        for authority in told.distrusted_authorities {
            let digits: String = authority.iter().map(|byte| format!("{byte:02x}")).collect();
            let hash =
                digits.parse().map_err(|_| wrong("distrusted authorities", "no SHA-256".to_owned()))?;
            revoked.authorities.insert(hash);
        }
        let roots = told.roots.into_iter().map(|root| super::BundleRoot {
            state: match root.state() {
                proto::RootState::Staged => RootState::Staged,
                proto::RootState::Retiring => RootState::Retiring,
                proto::RootState::Active | proto::RootState::Unspecified => RootState::Active,
            },
            certificate: root.certificate_der.into(),
        });
        Ok(Self {
            trust_domain: told
                .trust_domain
                .parse()
                .map_err(|error: crate::identity::IdentityError| wrong("trust domain", error.to_string()))?,
            generation: told.generation,
            least_generation: told.least_generation,
            least_connection_generation: told.least_connection_generation,
            roots: roots.collect(),
            revoked,
            shadow_roots: told.shadow_roots.into_iter().map(Into::into).collect(),
            made: from_millis(told.made_ms),
        })
    }
}

/// What a workload says it uses, if it is who it was found to be.
fn read_ack(told: proto::ProxyAck, watcher: &Watcher) -> Result<Ack, Status> {
    if told.proxy_id != watcher.proxy_id {
        return Err(Status::invalid_argument("the acknowledgement is of another proxy_id than the hello"));
    }
    if told.identity != watcher.identity.as_str() {
        return Err(Status::permission_denied("the acknowledgement is of another identity"));
    }
    let short = |text: String| text.chars().take(LONGEST_NAME).collect::<String>();
    let leaf_issuer = match told.leaf_issuer_id.as_str() {
        "" => KeyId::default(),
        text => text.parse().map_err(|_| Status::invalid_argument("leaf_issuer_id is not hexadecimal"))?,
    };
    let failures = told.handshake_failures.into_iter().take(MOST_REASONS);
    let mesh_address = match told.mesh_address.as_str() {
        "" => None,
        text => Some(
            text.parse::<SocketAddr>()
                .map_err(|_| Status::invalid_argument("mesh_address is not an address with a port"))?,
        ),
    };
    let here = |address: SocketAddr| match watcher.address.map(|from| from.ip()) {
        // Whoever takes connections on all his addresses is reached at the one he calls from.
        Some(from) if address.ip().is_unspecified() => Some(SocketAddr::new(from, address.port())),
        // His loopback is not that of this machine.
        Some(from) if address.ip().is_loopback() && !from.is_loopback() => None,
        _ => Some(address),
    };
    Ok(Ack {
        proxy_id: told.proxy_id,
        identity: watcher.identity.clone(),
        bundle_generation: told.bundle_generation,
        leaf_serial: Serial::new(told.leaf_serial.get(..20).unwrap_or(&told.leaf_serial)),
        leaf_issuer,
        leaf_not_after: from_millis(told.leaf_not_after_ms),
        oldest_connection_generation: Some(told.oldest_connection_generation).filter(|oldest| *oldest > 0),
        clock_offset_ms: told.clock_offset_ms,
        version: short(told.version),
        refused: Some(short(told.refused)).filter(|refused| !refused.is_empty()),
        handshakes: told.handshakes,
        handshake_failures: failures.map(|(reason, count)| (short(reason), count)).collect(),
        mesh_address: mesh_address.and_then(here),
    })
}

/// Who follows the trust.
struct Watcher {
    service: Service,
    identity: SpiffeId,
    /// Where it calls from.
    address: Option<SocketAddr>,
    proxy_id: String,
    /// What signed the certificate that it uses, as it says itself.
    issuer: KeyId,
    /// That certificate.
    serial: Serial,
    /// The bundle it was sent last.
    generation: u64,
    /// The request to renew it was sent last, and which certificate it had then.
    asked: Option<(u64, Serial)>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.service.0.watchers.fetch_sub(1, Ordering::Relaxed);
        self.service.0.parts.acks.gone(&self.identity, &self.proxy_id);
    }
}

impl Watcher {
    /// What it does not have yet.
    fn news(&mut self, current: &Current) -> VecDeque<ToWorkload> {
        let mut news = VecDeque::new();
        let bundle = current.bundle();
        if bundle.generation != self.generation {
            self.generation = bundle.generation;
            news.push_back(ToWorkload::Bundle(bundle.into()));
        }
        if let Some(renew) = &current.renew
            // Before its first acknowledgement nobody knows by whom its certificate is.
            && self.issuer != KeyId::default()
            && renew.concerns(&self.identity, &self.proxy_id, &self.issuer)
            && self.asked.as_ref().is_none_or(|asked| renew.is_news(asked, &self.serial))
        {
            self.asked = Some((renew.generation, self.serial.clone()));
            news.push_back(ToWorkload::Renew(proto::RenewNow {
                generation: renew.generation,
                spread_ms: u64::try_from(renew.spread.as_millis()).unwrap_or(u64::MAX),
                reason: renew.reason.clone(),
                unless_issued_by: renew
                    .unless_issued_by
                    .as_ref()
                    .map(ToString::to_string)
                    .unwrap_or_default(),
            }));
        }
        news
    }

    async fn run(
        mut self,
        mut messages: Streaming<proto::WatchRequest>,
        sender: &mpsc::Sender<Result<proto::WatchResponse, Status>>,
    ) -> Result<(), Status> {
        let mut current = self.service.0.parts.current.clone();
        let mut stopping = self.service.0.stopping.subscribe();
        let mut news = VecDeque::from([self.pulse()]);
        loop {
            let now = current.borrow_and_update().clone();
            news.append(&mut self.news(&now));
            tokio::select! {
                said = messages.message() => match said? {
                    Some(proto::WatchRequest { body: Some(FromWorkload::Ack(told)) }) => {
                        let ack = read_ack(told, &self)?;
                        (self.issuer, self.serial) = (ack.leaf_issuer.clone(), ack.leaf_serial.clone());
                        self.service.witness(&ack.proxy_id, ack.clock_offset_ms);
                        self.service.0.parts.acks.heard(ack);
                        if news.is_empty() {
                            news.push_back(self.pulse());
                        }
                    }
                    Some(proto::WatchRequest { body: Some(FromWorkload::Hello(_)) }) => {
                        return Err(Status::invalid_argument("a second hello"));
                    }
                    Some(proto::WatchRequest { body: Some(FromWorkload::Goodbye(_)) }) => {
                        self.service.0.parts.acks.left(&self.identity, &self.proxy_id);
                        return Ok(());
                    }
                    // A message of a later version of this.
                    Some(proto::WatchRequest { body: None }) => {}
                    None => return Ok(()),
                },
                changed = current.changed() => if changed.is_err() {
                    return Err(Status::unavailable("the authority stops"));
                },
                place = sender.reserve(), if !news.is_empty() => {
                    let Ok(place) = place else { return Ok(()) };
                    if let Some(body) = news.pop_front() {
                        place.send(Ok(proto::WatchResponse { body: Some(body) }));
                    }
                }
                () = self.service.0.parts.clock.pause(PULSE), if news.is_empty() => news.push_back(self.pulse()),
                () = sender.closed() => return Ok(()),
                _ = stopping.wait_for(|stopping| *stopping) => {
                    return Err(Status::unavailable("the authority stops"));
                }
            }
        }
    }

    fn pulse(&self) -> ToWorkload {
        ToWorkload::Pulse(proto::Pulse { server_time_ms: millis(self.service.now()) })
    }
}

type Messages = Pin<Box<dyn Stream<Item = Result<proto::WatchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl proto::certificate_authority_server::CertificateAuthority for Service {
    type WatchTrustStream = Messages;

    async fn attest(
        &self,
        request: Request<Streaming<proto::AttestRequest>>,
    ) -> Result<Response<proto::Session>, Status> {
        let caller = Caller::of(&request);
        match self.judge(&caller, request.into_inner()).await {
            Ok((session, kind)) => {
                self.count("attest", kind, Code::Ok);
                Ok(Response::new(session))
            }
            Err((status, kind)) => {
                debug!(code = ?status.code(), reason = status.message(), kind, "an attestation is refused");
                self.count("attest", kind, status.code());
                Err(status)
            }
        }
    }

    async fn sign(
        &self,
        request: Request<proto::SignRequest>,
    ) -> Result<Response<proto::SignResponse>, Status> {
        let asked = request.into_inner();
        let (signed, kind) = match self.session(&asked.session) {
            Ok(session) => {
                let kind = session.attestor.clone();
                (self.certificate(asked, session).await, kind)
            }
            Err(status) => (Err(status), "none".to_owned()),
        };
        self.count("sign", &kind, signed.as_ref().map_or_else(Status::code, |_| Code::Ok));
        signed.map(Response::new)
    }

    async fn watch_trust(
        &self,
        request: Request<Streaming<proto::WatchRequest>>,
    ) -> Result<Response<Messages>, Status> {
        let caller = Caller::of(&request);
        let mut messages = request.into_inner();
        let hello = timeout(PATIENCE, messages.message()).await;
        let hello = match hello.map_err(|_| Status::deadline_exceeded("no hello within 10 s"))?? {
            Some(proto::WatchRequest { body: Some(FromWorkload::Hello(hello)) }) => hello,
            _ => return Err(Status::invalid_argument("the first message has to be a hello")),
        };
        check_name(&hello.proxy_id)?;
        let identity = if hello.session.is_empty() {
            let shown = renewal::verify(&attest::Judging {
                caller: &caller,
                current: &self.current(),
                mark: &self.0.mark,
                now: self.now(),
            });
            shown.map_err(|error| Status::unauthenticated(error.to_string()))?.id
        } else {
            self.session(&hello.session)?.identity
        };
        if self.0.watchers.fetch_add(1, Ordering::Relaxed) >= self.0.parts.limits.watchers {
            self.0.watchers.fetch_sub(1, Ordering::Relaxed);
            return Err(exhausted(Duration::from_secs(5)));
        }
        let watcher = Watcher {
            service: self.clone(),
            identity,
            address: caller.address,
            proxy_id: hello.proxy_id,
            issuer: KeyId::default(),
            serial: Serial::default(),
            generation: hello.bundle_generation,
            asked: None,
        };
        // One message waits here, one is on its way; what a workload has not taken yet is not made.
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(status) = watcher.run(messages, &sender).await {
                // Who is gone does not hear it.
                let _ = timeout(PATIENCE, sender.send(Err(status))).await;
            }
        });
        let stream =
            stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
        Ok(Response::new(Box::pin(stream)))
    }
}
