//! A process of the mesh as the authority knows it: it gets a certificate, keeps it renewed, and follows the trust.
//!
//! Two tasks write into one [`MeshIdentity`] and into a [`Status`]. One renews: at half of a certificate's life, give or
//! take, with a new key each time; it looks at the clocks every 30 seconds, because they are set and machines sleep. An
//! authority that is away changes nothing while the certificate lives. The other keeps a stream of trust open and tells
//! what this process uses. Nothing is taken that peers would not believe.

mod client;
pub mod plan;
pub mod time;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::{debug, info, warn};
use zeroize::Zeroizing;

use crate::ca::channel::Pin;
use crate::ca::proto;
use crate::ca::proto::watch_request::Body as ToAuthority;
use crate::ca::proto::watch_response::Body as FromAuthority;
use crate::ca::service::from_millis;
use crate::ca::{Bundle, authority};
use crate::identity::SpiffeId;
use crate::mesh::MeshIdentity;
use crate::svid::Svid;
use crate::trust::{KeyId, Serial};
use client::{Call, Failure};
use plan::{Backoff, Plan};
use time::MeshTime;

/// How often the clocks are looked at, and how often something is said.
const TICK: Duration = Duration::from_secs(30);
/// Between two messages about connections that ended.
const PACE: Duration = Duration::from_secs(1);
/// One attempt, from the connection to the certificate.
const ATTEMPT: Duration = Duration::from_secs(30);
/// The authority says something at least every 30 seconds.
const SILENCE: Duration = Duration::from_secs(120);
const HELLO: Duration = Duration::from_secs(15);
/// How long a goodbye may take.
const FAREWELL: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// When the certificate is about to end.
const HURRIED_PAUSE: Duration = Duration::from_secs(10);
/// A session is good for five minutes; who waits longer for its signature attests again.
const SESSION: Duration = Duration::from_secs(240);
/// A difference of the clocks that is told.
const JUMP: Duration = Duration::from_secs(5);

/// How a process proves who it is when it has no certificate.
#[derive(Clone)]
pub enum Proof {
    JoinToken(Zeroizing<String>),
    /// A file with a join token, or with the token of a service account of Kubernetes, which is written anew from time to
    /// time and is told by its form.
    TokenFile(PathBuf),
    /// A file with an ACL token of Consul, and the service where it is for several.
    ConsulTokenFile(PathBuf, String),
}

impl std::fmt::Debug for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::JoinToken(_) => "JoinToken(..)",
            Self::TokenFile(_) => "TokenFile(..)",
            Self::ConsulTokenFile(..) => "ConsulTokenFile(..)",
        })
    }
}

/// Where the authority is, and who asks.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `host:port`; those after the first are for when it is away.
    pub servers: Vec<String>,
    /// Hashes of the authority's keys.
    pub pins: Arc<[Pin]>,
    pub proof: Option<Proof>,
    /// Who this wants to be, where the proof allows several.
    pub identity: Option<SpiffeId>,
    /// This process among those of its identity: the same over a restart.
    pub proxy_id: String,
    pub version: String,
    /// Of certificates; none means what the authority gives.
    pub ttl: Option<Duration>,
}

/// How it stands with the certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// There was none yet.
    #[default]
    Waiting,
    Valid,
    /// Less than a quarter of its life is left.
    Late,
    /// Less than a tenth is left.
    Alarm,
    Expired,
}

/// What is known about the identity of this process, for people and metrics.
#[derive(Clone, Debug, Default)]
pub struct Status {
    pub phase: Phase,
    pub identity: Option<SpiffeId>,
    pub serial: Option<Serial>,
    pub issuer: Option<KeyId>,
    pub not_after: Option<SystemTime>,
    pub next_renewal: Option<SystemTime>,
    pub renewals: u64,
    pub failures: u64,
    pub last_success: Option<SystemTime>,
    pub last_error: Option<(SystemTime, String)>,
    /// Whether the stream of trust is open.
    pub following: bool,
    pub bundle_generation: u64,
    /// Connections that were made under an older bundle have to be made anew.
    pub least_connection_generation: u64,
    /// Why the last bundle or certificate was not taken.
    pub refused: Option<String>,
    /// This process's clock against the authority's, in milliseconds.
    pub clock_offset_ms: i64,
    /// How often a clock was found to have jumped.
    pub clock_jumps: u64,
    /// Looks at the clock.
    pub ticks: u64,
}

/// Keeps an identity. The last clone that is dropped ends it; the identity stays as it is.
#[derive(Clone, Debug)]
pub struct Workload {
    shared: Arc<Shared>,
    _tasks: Arc<Tasks>,
}

#[derive(Debug)]
struct Tasks([AbortHandle; 2]);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    identity: MeshIdentity,
    time: Arc<MeshTime>,
    status: watch::Sender<Status>,
    /// Somebody wants a new certificate now.
    renew: Notify,
    /// The authority has asked for one.
    hint: Notify,
    /// Until when by the clock that only grows, and the generation of the request, one was asked for by the authority.
    asked: Mutex<Option<(Duration, u64)>>,
    /// Where connections of the mesh are taken.
    mesh_address: OnceLock<SocketAddr>,
    /// The last such request that was done.
    done: AtomicU64,
    /// The process ends.
    leaving: watch::Sender<bool>,
}

impl Workload {
    /// Begins to keep `identity`. It has to judge by `time`: [`MeshIdentity::with_clock`].
    #[must_use]
    pub fn start(settings: Settings, identity: MeshIdentity, time: Arc<MeshTime>) -> Self {
        let shared = Arc::new(Shared {
            settings,
            identity,
            time,
            status: watch::Sender::new(Status::default()),
            renew: Notify::new(),
            hint: Notify::new(),
            asked: Mutex::default(),
            mesh_address: OnceLock::new(),
            done: AtomicU64::new(0),
            leaving: watch::Sender::new(false),
        });
        let renewing = tokio::spawn(Renewal::new(shared.clone()).run()).abort_handle();
        let following = tokio::spawn(follow(shared.clone())).abort_handle();
        Self { shared, _tasks: Arc::new(Tasks([renewing, following])) }
    }

    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Says where this process takes connections of the mesh, so that the authority may see whether it is accepted there after
    /// a rotation has begun. The first word counts.
    pub fn set_mesh_address(&self, address: SocketAddr) {
        let _ = self.shared.mesh_address.set(address);
    }

    /// Tells the authority that this process ends, so that no rotation waits for it: the last thing that is done with the
    /// identity. Where nobody hears it within a second, the certificate is waited for until its end.
    pub async fn leave(&self) {
        self.shared.leaving.send_replace(true);
        let mut status = self.status();
        let _ = timeout(FAREWELL, status.wait_for(|status| !status.following)).await;
    }

    /// Gets a new certificate now, once for all who ask at the same time.
    pub fn renew_now(&self) {
        self.shared.renew.notify_one();
    }
}

impl Shared {
    fn asked(&self) -> MutexGuard<'_, Option<(Duration, u64)>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    fn generation(&self) -> u64 {
        self.identity.trust().map_or(0, |trust| trust.generation())
    }

    /// Believes a bundle of the authority, which is known by its key.
    fn take_bundle(&self, told: proto::TrustBundle) -> Result<(), String> {
        let taken = Bundle::try_from(told).map_err(|error| error.to_string()).and_then(|bundle| {
            let trust = bundle.trust().map_err(|error| error.to_string())?;
            self.identity.set_trust(trust).map_err(|error| error.to_string())?;
            Ok(bundle)
        });
        match taken {
            Ok(bundle) => {
                let rehearsed = bundle.rehearse().err().map(|error| format!("rehearsal: {error}"));
                info!(
                    generation = bundle.generation,
                    roots = bundle.roots.len(),
                    "a trust bundle is in force"
                );
                self.update(|status| {
                    status.bundle_generation = bundle.generation;
                    status.least_connection_generation = bundle.least_connection_generation;
                    status.refused = rehearsed;
                });
                Ok(())
            }
            Err(problem) => {
                warn!(%problem, "a trust bundle is refused, the one before stays");
                self.update(|status| status.refused = Some(problem.clone()));
                Err(problem)
            }
        }
    }

    fn hear_time(&self, server_ms: i64) {
        self.time.hear(from_millis(server_ms));
        let offset = self.time.offset_ms();
        self.status
            .send_if_modified(|status| std::mem::replace(&mut status.clock_offset_ms, offset) != offset);
    }

    fn ack(&self) -> proto::ProxyAck {
        let settings = &self.settings;
        let mut ack = proto::ProxyAck {
            proxy_id: settings.proxy_id.clone(),
            bundle_generation: self.generation(),
            oldest_connection_generation: self.identity.oldest_connection().borrow().unwrap_or(0),
            clock_offset_ms: self.time.offset_ms(),
            version: settings.version.clone(),
            refused: self.status.borrow().refused.clone().unwrap_or_default(),
            handshakes: self.identity.verified(),
            mesh_address: self.mesh_address.get().map(ToString::to_string).unwrap_or_default(),
            ..proto::ProxyAck::default()
        };
        for (_, reason, count) in self.identity.refused() {
            *ack.handshake_failures.entry(reason.to_owned()).or_default() += count;
        }
        if let Some(svid) = self.identity.svid() {
            let leaf = svid.leaf();
            ack.identity = svid.id().to_string();
            ack.leaf_serial = leaf.serial.as_bytes().to_vec();
            ack.leaf_issuer_id = leaf.issuer.to_string();
            let since = leaf.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            ack.leaf_not_after_ms = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
        }
        ack
    }
}

/// The task that renews.
struct Renewal {
    shared: Arc<Shared>,
    plan: Option<Plan>,
    backoff: Backoff,
    /// When the next attempt may be, by the clock that only grows, after one that failed.
    not_before: Option<Duration>,
    /// A session that has no certificate yet.
    session: Option<(proto::Session, Duration)>,
    server: usize,
    looked: (SystemTime, Duration),
}

impl Renewal {
    fn new(shared: Arc<Shared>) -> Self {
        let looked = (shared.time.wall(), shared.time.elapsed());
        let backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        Self { shared, plan: None, backoff, not_before: None, session: None, server: 0, looked }
    }

    async fn run(mut self) {
        loop {
            self.look();
            let wait = self.wait();
            if wait.is_zero() {
                self.attempt().await;
                continue;
            }
            let pause = self.shared.time.pause(wait.min(TICK));
            tokio::select! {
                () = pause => {}
                () = self.shared.renew.notified() => {
                    // A pause after an attempt that failed stands.
                    let mut asked = self.shared.asked();
                    let generation = asked.map_or(0, |(_, generation)| generation);
                    *asked = Some((self.shared.time.elapsed(), generation));
                }
                () = self.shared.hint.notified() => {}
            }
        }
    }

    /// Looks at the clocks, and says how it stands.
    fn look(&mut self) {
        let time = &self.shared.time;
        let now = (time.wall(), time.elapsed());
        let passed = now.1.saturating_sub(self.looked.1);
        let expected = self.looked.0 + passed;
        let jump = now.0.duration_since(expected).unwrap_or_else(|error| error.duration());
        self.looked = now;
        if jump > JUMP {
            warn!(seconds = jump.as_secs(), "the clock was set, or the machine has slept");
        }
        let at = time.now();
        let plan = self.plan.as_ref();
        let phase = plan.map_or(Phase::Waiting, |plan| plan.phase(at));
        self.shared.update(|status| {
            status.ticks += 1;
            status.clock_jumps += u64::from(jump > JUMP);
            status.phase = phase;
            status.next_renewal = plan.map(|plan| plan.renew);
        });
    }

    /// How long until something is to be done.
    fn wait(&mut self) -> Duration {
        let time = &self.shared.time;
        let (now, elapsed) = (time.now(), time.elapsed());
        let planned = self.plan.as_ref().map_or(Duration::ZERO, |plan| plan.due(now, elapsed));
        let asked = self.shared.asked().map(|(at, _)| at.saturating_sub(elapsed));
        let due = asked.map_or(planned, |asked| asked.min(planned));
        let held = self.not_before.map_or(Duration::ZERO, |at| at.saturating_sub(elapsed));
        due.max(held)
    }

    async fn attempt(&mut self) {
        let asked = self.shared.asked().take();
        let outcome = match timeout(ATTEMPT, self.obtain()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::new(format!("no certificate within {} s", ATTEMPT.as_secs()))),
        };
        let time = self.shared.time.clone();
        match outcome {
            Ok(()) => {
                self.backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
                self.not_before = None;
                self.session = None;
                let Some(svid) = self.shared.identity.svid() else { return };
                let leaf = svid.leaf();
                let plan = Plan::new(time.now(), leaf.not_after, time.elapsed(), &mut fastrand::Rng::new());
                info!(identity = %svid.id(), serial = %leaf.serial, "a new certificate is in use");
                self.shared.update(|status| {
                    status.renewals += 1;
                    status.identity = Some(svid.id().clone());
                    status.serial = Some(leaf.serial.clone());
                    status.issuer = Some(leaf.issuer.clone());
                    status.not_after = Some(leaf.not_after);
                    status.last_success = Some(time.wall());
                    status.last_error = None;
                    status.refused = None;
                });
                self.plan = Some(plan);
                if let Some((_, generation)) = asked {
                    self.shared.done.fetch_max(generation, Ordering::Relaxed);
                }
            }
            Err(failure) => {
                let late = self.plan.as_ref().is_some_and(|plan| plan.phase(time.now()) != Phase::Valid);
                let pause = self.backoff.pause(if late { HURRIED_PAUSE } else { LONGEST_PAUSE });
                let pause =
                    failure.retry_after.map_or(pause, |wait| wait + pause.min(Duration::from_secs(5)));
                self.not_before = Some(time.elapsed() + pause);
                self.server = self.server.wrapping_add(1);
                if failure.denied {
                    self.session = None;
                }
                if let Some(asked) = asked {
                    let mut slot = self.shared.asked();
                    slot.get_or_insert(asked);
                }
                let (reason, again) = (&failure.reason, pause.as_secs_f64());
                if late || self.plan.is_none() {
                    warn!(%reason, again, "no new certificate");
                } else {
                    info!(%reason, again, "no new certificate; the one in use is still good");
                }
                self.shared.update(|status| {
                    status.failures += 1;
                    status.last_error = Some((time.wall(), failure.reason.clone()));
                    if failure.refused {
                        status.refused = Some(failure.reason);
                    }
                });
            }
        }
    }

    /// A certificate, installed.
    async fn obtain(&mut self) -> Result<(), Failure> {
        let shared = self.shared.clone();
        let settings = &shared.settings;
        let count = settings.servers.len().max(1);
        let server = settings.servers.get(self.server % count).cloned().unwrap_or_default();
        let svid = shared.identity.svid();
        let mut call = Call::connect(&server, settings.pins.clone(), svid.as_deref()).await?;
        let elapsed = shared.time.elapsed();
        let session = match self.session.take().filter(|(_, until)| elapsed < *until) {
            Some((session, _)) => session,
            None => attest(&mut call, settings, svid.is_some()).await?,
        };
        shared.hear_time(session.server_time_ms);
        let token = session.token.clone();
        // A join token is used up by now: whatever fails from here on does not take the session.
        self.session = Some((session, elapsed + SESSION));
        let key = authority::Key::generate(authority::KeyKind::P256);
        let key = key.map_err(|error| Failure::new(error.to_string()))?;
        let csr = rcgen::CertificateParams::default().serialize_request(&key);
        let csr = csr.map_err(|error| Failure::new(error.to_string()))?;
        let purpose = if svid.is_some() { proto::Purpose::Renewal } else { proto::Purpose::First };
        let asked = proto::SignRequest {
            session: token,
            csr_der: csr.der().to_vec(),
            ttl_s: settings.ttl.map_or(0, |ttl| ttl.as_secs()),
            purpose: purpose.into(),
            bundle_generation: shared.generation(),
            proxy_id: settings.proxy_id.clone(),
        };
        let signed = call.sign(asked).await?;
        shared.hear_time(signed.server_time_ms);
        if let Some(bundle) = signed.bundle {
            // A bundle that cannot be used does not keep a certificate from being judged by the one before.
            let _ = shared.take_bundle(bundle);
        }
        let chain = signed.chain_der.into_iter().map(Into::into).collect();
        let svid =
            Svid::new(chain, &key.private_key()).map_err(|error| Failure::refused(error.to_string()))?;
        shared.identity.install(svid).map_err(|error| Failure::refused(error.to_string()))
    }
}

/// By the certificate that was shown, and by the other proof where that is not enough.
async fn attest(call: &mut Call, settings: &Settings, shown: bool) -> Result<proto::Session, Failure> {
    let mut problem = None;
    if shown {
        let renewal = proto::attest_request::Proof::Renewal(proto::Renewal {});
        match call.attest(renewal, settings.identity.as_ref()).await {
            Ok(session) => return Ok(session),
            Err(failure) if !failure.denied || settings.proof.is_none() => return Err(failure),
            Err(failure) => problem = Some(failure),
        }
    }
    let Some(proof) = &settings.proof else {
        return Err(Failure::new("there is no certificate and no other proof".to_owned()));
    };
    let proof = read_proof(proof).await.map_err(Failure::new)?;
    call.attest(proof, settings.identity.as_ref()).await.map_err(|mut failure| {
        if let Some(first) = problem {
            failure.reason = format!("{} (by the certificate: {})", failure.reason, first.reason);
        }
        failure
    })
}

async fn read_proof(proof: &Proof) -> Result<proto::attest_request::Proof, String> {
    use proto::attest_request::Proof as Wire;
    let read = async |path: &PathBuf| {
        let text = tokio::fs::read_to_string(path).await;
        text.map(|text| text.trim().to_owned()).map_err(|error| format!("{}: {error}", path.display()))
    };
    Ok(match proof {
        Proof::JoinToken(secret) => Wire::JoinToken(proto::JoinToken { secret: secret.to_string() }),
        Proof::TokenFile(path) => match read(path).await? {
            // A JWT has three parts; a join token has no dots.
            token if token.split('.').count() == 3 => Wire::Kubernetes(proto::KubernetesToken { token }),
            secret => Wire::JoinToken(proto::JoinToken { secret }),
        },
        Proof::ConsulTokenFile(path, service) => {
            Wire::Consul(proto::ConsulToken { token: read(path).await?, service: service.clone() })
        }
    })
}

/// Keeps a stream of trust open, for ever.
async fn follow(shared: Arc<Shared>) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut server = fastrand::usize(0..shared.settings.servers.len().max(1));
    let mut changes = shared.identity.changes();
    loop {
        // Before the first certificate nobody would listen.
        while shared.identity.svid().is_none() {
            if changes.changed().await.is_err() {
                return;
            }
        }
        let address = shared.settings.servers.get(server % shared.settings.servers.len().max(1));
        let failure = match stream(&shared, address.map_or("", String::as_str), &mut backoff).await {
            Ok(()) => Failure::new("the authority has ended the stream".to_owned()),
            Err(failure) => failure,
        };
        shared.update(|status| status.following = false);
        if *shared.leaving.borrow() {
            return;
        }
        debug!(reason = failure.reason, "the trust is not followed");
        if failure.denied {
            // The certificate is no proof any more.
            shared.renew.notify_one();
        }
        server = server.wrapping_add(1);
        let pause = backoff.pause(LONGEST_PAUSE);
        shared.time.pause(failure.retry_after.map_or(pause, |wait| wait + pause)).await;
    }
}

async fn stream(shared: &Arc<Shared>, server: &str, backoff: &mut Backoff) -> Result<(), Failure> {
    let svid = shared.identity.svid();
    let opening = async {
        let mut call = Call::connect(server, shared.settings.pins.clone(), svid.as_deref()).await?;
        let hello = proto::WatchHello {
            session: Vec::new(),
            proxy_id: shared.settings.proxy_id.clone(),
            version: shared.settings.version.clone(),
            bundle_generation: shared.generation(),
        };
        call.watch(hello).await
    };
    let opened = timeout(HELLO, opening).await;
    let (requests, mut messages) =
        opened.unwrap_or_else(|_| Err(Failure::new("no stream within 15 s".to_owned())))?;
    let mut changes = shared.identity.changes();
    let mut oldest = shared.identity.oldest_connection();
    let mut leaving = shared.leaving.subscribe();
    let (mut due, mut moved) = (true, false);
    loop {
        tokio::select! {
            () = async { drop(leaving.wait_for(|leaving| *leaving).await) } => {
                let goodbye = ToAuthority::Goodbye(proto::Goodbye {});
                if requests.send(proto::WatchRequest { body: Some(goodbye) }).await.is_ok() {
                    while let Ok(Some(_)) = messages.message().await {}
                }
                return Ok(());
            }
            place = requests.reserve(), if due => {
                let Ok(place) = place else { return Ok(()) };
                place.send(proto::WatchRequest { body: Some(ToAuthority::Ack(shared.ack())) });
                (due, moved) = (false, false);
            }
            message = timeout(SILENCE, messages.message()) => {
                let silent = || Failure::new("the authority has said nothing for two minutes".to_owned());
                let Some(message) = message.map_err(|_| silent())?.map_err(|status| Failure::of(&status))? else {
                    return Ok(());
                };
                *backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
                shared.status.send_if_modified(|status| !std::mem::replace(&mut status.following, true));
                match message.body {
                    Some(FromAuthority::Bundle(bundle)) => {
                        let _ = shared.take_bundle(bundle);
                        due = true;
                    }
                    Some(FromAuthority::Renew(renew)) => ask(shared, &renew),
                    Some(FromAuthority::Pulse(pulse)) => shared.hear_time(pulse.server_time_ms),
                    // A message of a later version of this.
                    None => {}
                }
            }
            changed = changes.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                due = true;
            }
            // Connections may come and go by the thousand; the authority waits for the last old one to go.
            Ok(()) = oldest.changed(), if !moved => moved = true,
            () = shared.time.pause(PACE), if moved && !due => due = true,
            () = shared.time.pause(TICK), if !moved && !due => due = true,
        }
    }
}

/// The authority wants a new certificate to be asked for, at a random moment within a time.
fn ask(shared: &Shared, renew: &proto::RenewNow) {
    let is_done = if renew.unless_issued_by.is_empty() {
        renew.generation <= shared.done.load(Ordering::Relaxed)
    } else {
        let svid = shared.identity.svid();
        svid.is_some_and(|svid| svid.leaf().issuer.to_string() == renew.unless_issued_by)
    };
    if is_done {
        return;
    }
    let spread = Duration::from_millis(renew.spread_ms).mul_f64(fastrand::f64());
    info!(reason = renew.reason, seconds = spread.as_secs(), "the authority asks for a renewal");
    {
        let mut asked = shared.asked();
        let at = shared.time.elapsed() + spread;
        let sooner = asked.map_or(at, |(before, _)| before.min(at));
        *asked = Some((sooner, renew.generation));
    }
    shared.hint.notify_one();
}

#[cfg(test)]
mod tests;
