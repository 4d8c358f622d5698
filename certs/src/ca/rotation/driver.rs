//! Drives rotations: owns the time, the store and who leads.
//!
//! A [`tick`](Driver::tick) reads the record, writes down what this replica heard, and if this replica leads makes the steps
//! that [`machine`] allows, each one swap. A [`command`](Driver::command) is a swap too, and any replica may do it. Nothing is
//! remembered here that is not in the record or cannot be found out again, so a driver may end at any line. Who leads is
//! written in the record itself: whoever acts on a record in which another leads has lost the swap before it began.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use tokio::sync::{Notify, watch};

use super::super::fleet::{Fleet, Member, Sign, Source, View};
use super::super::outside::{self, Elsewhere};
use super::super::probe::{Host, Prober};
use super::super::record::{Der, LEASE, Lease, Moment, Record, RecordError, Root};
use super::super::store::{FLEET, RECORD, Store, StoreError, SwapError, Version};
use super::command::{Command, NewRoot, Refusal, Rotate};
use super::forge::{self, Forge, ForgeError, Material, Wanted};
use super::machine::{self, Decision, Waiting};
use super::{Kind, Rotation, State, interlocks, plan};

/// How long those who were connected before a start have to come back.
const SETTLE: Duration = Duration::from_secs(15);
/// How often a quiet authority looks at its record, and a rotating one.
const PACE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(200));
/// How often this replica shows that it is there, and looks at what others have written.
const SHOW: Duration = Duration::from_secs(5);
/// Steps of one tick: from begin to end there are not more.
const STEPS: usize = 12;
/// How often a command is tried again because somebody else was faster.
const TRIES: usize = 16;
/// Who has not read the record for so long does not sign any more: the others go on without him.
const SIGNS_UNREAD: Duration = Duration::from_secs(300);
/// Between attempts to begin what is due and cannot begin, growing.
const RETRIES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));
/// Visits at a time.
const VISITS: usize = 16;
/// How long a store is asked to wait for a change.
const WATCH: Duration = Duration::from_secs(60);

/// What time it is.
pub trait Clock: Send + Sync + 'static {
    fn wall(&self) -> Moment;

    /// A clock that nobody sets.
    fn steady(&self) -> Duration;
}

impl<C: crate::clock::Clock> Clock for C {
    fn wall(&self) -> Moment {
        self.now().into()
    }

    fn steady(&self) -> Duration {
        self.elapsed()
    }
}

/// A copy of the bundle outside of the store, for those who are not told by the service.
pub trait BundleCopy: Send + Sync + 'static {
    fn name(&self) -> &str;

    /// Writes the roots.
    fn write<'a>(&'a self, roots: &'a [Der]) -> BoxFuture<'a, Result<(), String>>;

    /// Reads back what it has.
    fn read(&self) -> BoxFuture<'_, Result<Vec<Der>, String>>;
}

/// A copy in a file, as PEM.
#[derive(Debug)]
pub struct PemFile {
    path: PathBuf,
    name: String,
}

impl PemFile {
    pub fn new(path: PathBuf) -> Self {
        Self { name: format!("file {}", path.display()), path }
    }
}

impl BundleCopy for PemFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn write<'a>(&'a self, roots: &'a [Der]) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let beside = self.path.with_extension("new");
            tokio::fs::write(&beside, pem(roots)).await.map_err(|error| error.to_string())?;
            tokio::fs::rename(&beside, &self.path).await.map_err(|error| error.to_string())
        })
    }

    fn read(&self) -> BoxFuture<'_, Result<Vec<Der>, String>> {
        use rustls::pki_types::CertificateDer;
        use rustls::pki_types::pem::PemObject;
        Box::pin(async move {
            match tokio::fs::read(&self.path).await {
                Ok(bytes) => CertificateDer::pem_slice_iter(&bytes)
                    .map(|one| one.map(|one| Der(one.to_vec())).map_err(|error| error.to_string()))
                    .collect(),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
                Err(error) => Err(error.to_string()),
            }
        })
    }
}

/// Certificates as PEM.
#[must_use]
pub fn pem(certificates: &[Der]) -> String {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    let mut text = String::new();
    for der in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let base64 = STANDARD.encode(&der.0);
        for line in base64.as_bytes().chunks(64) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// The record, as this replica last read it.
#[derive(Clone, Debug)]
pub struct Known {
    pub record: Record,
    pub version: Version,
}

/// Something that the driver cannot go on without.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the store has no record of an authority; it was there before: restore it, nothing was written")]
    Gone,
    #[error("the store has a record of an authority already")]
    Exists,
}

/// What a rotation would do.
#[derive(Clone, Debug)]
pub struct Planned {
    pub stages: Vec<plan::Stage>,
    pub blockers: Vec<interlocks::Blocker>,
    /// Who would be asked to sign, and what is known of it.
    pub outside: String,
}

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Forge(#[from] ForgeError),
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("others change the record all the time: try again")]
    Contended,
}

/// What this process found out and would find out again.
#[derive(Default)]
struct Local {
    started: Duration,
    started_wall: Moment,
    read_at: Option<Duration>,
    /// The lease of another, and since when it has not moved.
    lease: Option<(Lease, Duration)>,
    renewed: Option<Duration>,
    shown: Option<Duration>,
    leads: bool,
    /// It ends in order.
    stopped: bool,
    /// Versions of own parts of the list of workloads.
    parts: BTreeMap<u8, Version>,
    sources: Vec<Source>,
    problem: Option<String>,
    /// Why what is due by its age is not begun, and when that is tried again.
    overdue: Option<Overdue>,
}

/// Something that is due and cannot begin.
struct Overdue {
    why: String,
    pause: Duration,
    again: Duration,
}

/// Drives one authority on one replica.
pub struct Driver {
    store: Arc<dyn Store>,
    fleet: Arc<Fleet>,
    forge: Arc<dyn Forge>,
    clock: Arc<dyn Clock>,
    replica: String,
    copies: Vec<Arc<dyn BundleCopy>>,
    prober: Option<Arc<dyn Prober>>,
    /// Who has the key of the root, where that is somebody else.
    outside: Option<Elsewhere>,
    /// How visits ended, of the present rotation.
    visits: Mutex<BTreeMap<(String, String), Result<(), String>>>,
    scheduled: bool,
    settle: Duration,
    signs_unread: Duration,
    local: Mutex<Local>,
    known: watch::Sender<Arc<Known>>,
    /// What is waited for, and the sequence of the record in which it was found.
    waiting: Mutex<(u64, Waiting)>,
    wake: Notify,
    /// One tick or command at a time: they would only lose swaps to each other.
    turn: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver")
            .field("store", &self.store.name())
            .field("replica", &self.replica)
            .finish_non_exhaustive()
    }
}

/// Writes the first record of an authority.
///
/// # Errors
/// There is one, or the store cannot be used.
pub async fn found(store: &dyn Store, record: &Record) -> Result<(), DriverError> {
    match store.swap(RECORD, None, &record.encode()?).await {
        Ok(_) => Ok(()),
        Err(SwapError::Conflict) => Err(DriverError::Exists),
        Err(SwapError::Store(error)) => Err(error.into()),
    }
}

impl Driver {
    /// Reads the record and what this replica wrote down before. None: the store is empty, see [`found`].
    ///
    /// # Errors
    /// The store cannot be used, or what it has is damaged.
    pub async fn open(
        store: Arc<dyn Store>,
        fleet: Arc<Fleet>,
        forge: Arc<dyn Forge>,
        clock: Arc<dyn Clock>,
        replica: &str,
    ) -> Result<Option<Self>, DriverError> {
        let Some(stored) = store.load(RECORD).await? else { return Ok(None) };
        let record = Record::decode(&stored.value)?;
        let mut local = Local {
            started: clock.steady(),
            started_wall: clock.wall(),
            read_at: Some(clock.steady()),
            ..Local::default()
        };
        let own = format!("{FLEET}{replica}/");
        for (name, part) in store.list(&own).await? {
            if let Some(number) = name.strip_prefix(&own).and_then(|number| number.parse().ok()) {
                fleet.restore(&part.value);
                local.parts.insert(number, part.version);
            }
        }
        Ok(Some(Self {
            store,
            fleet,
            forge,
            clock,
            replica: replica.to_owned(),
            copies: Vec::new(),
            prober: None,
            outside: None,
            visits: Mutex::default(),
            scheduled: false,
            settle: SETTLE,
            signs_unread: SIGNS_UNREAD,
            local: Mutex::new(local),
            known: watch::Sender::new(Arc::new(Known { record, version: stored.version })),
            waiting: Mutex::default(),
            wake: Notify::new(),
            turn: tokio::sync::Mutex::default(),
        }))
    }

    /// Begins rotations by itself when roots and issuers are old.
    #[must_use]
    pub fn scheduled(mut self, scheduled: bool) -> Self {
        self.scheduled = scheduled;
        self
    }

    /// Keeps copies of the bundle.
    #[must_use]
    pub fn with_copies(mut self, copies: Vec<Arc<dyn BundleCopy>>) -> Self {
        self.copies = copies;
        self
    }

    /// Visits those who renew first.
    #[must_use]
    pub fn with_prober(mut self, prober: Arc<dyn Prober>) -> Self {
        self.prober = Some(prober);
        self
    }

    /// Asks somebody else for issuers, who has the key of the root.
    #[must_use]
    pub fn with_outside(mut self, outside: Option<Elsewhere>) -> Self {
        self.outside = outside;
        self
    }

    /// How long those who were connected before a start have to come back.
    #[must_use]
    pub fn settling(mut self, settle: Duration) -> Self {
        self.settle = settle;
        self
    }

    /// How long this replica goes on signing when it cannot read the record.
    #[must_use]
    pub fn signing_unread(mut self, signs_unread: Duration) -> Self {
        self.signs_unread = signs_unread;
        self
    }

    /// The record as it was last read; changes are told.
    #[must_use]
    pub fn known(&self) -> watch::Receiver<Arc<Known>> {
        self.known.subscribe()
    }

    /// The same, now.
    #[must_use]
    pub fn now(&self) -> Arc<Known> {
        self.known.borrow().clone()
    }

    /// What the present rotation waits for, as the last tick found it.
    #[must_use]
    pub fn waiting(&self) -> Waiting {
        self.standing().1
    }

    /// The record, and what it was found to wait for; nothing while nobody has looked since it was changed.
    #[must_use]
    pub fn standing(&self) -> (Arc<Known>, Waiting) {
        let (sequence, waiting) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let known = self.now();
        let waiting = if sequence == known.record.sequence { waiting } else { Waiting::default() };
        (known, waiting)
    }

    /// Why the store cannot be used, if it cannot.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.local().problem.clone()
    }

    /// Who else has the key of a root, if anybody can be asked.
    #[must_use]
    pub fn outside(&self) -> Option<&Elsewhere> {
        self.outside.as_ref()
    }

    /// Why what is due by its age is not exchanged, if it should have been.
    #[must_use]
    pub fn overdue(&self) -> Option<String> {
        self.local().overdue.as_ref().map(|overdue| overdue.why.clone())
    }

    /// Whether this replica leads.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.local().leads
    }

    /// Whether this replica may sign: it has read the record lately, so that nobody goes on without it.
    #[must_use]
    pub fn may_sign(&self) -> bool {
        let read_at = self.local().read_at;
        read_at.is_some_and(|at| self.clock.steady().saturating_sub(at) < self.signs_unread)
    }

    /// The name of this replica.
    #[must_use]
    pub fn replica(&self) -> &str {
        &self.replica
    }

    /// What time it is here.
    #[must_use]
    pub fn wall(&self) -> Moment {
        self.clock.wall()
    }

    /// The fleet as this replica knows it.
    #[must_use]
    pub fn view(&self) -> View {
        let record = self.now();
        let now = self.clock.wall();
        let mut view = self.fleet.view();
        view.settle(now);
        view.forget(&record.record.forgotten);
        let local = self.local();
        let up = self.clock.steady().saturating_sub(local.started);
        let wall = i64::try_from(now.0).unwrap_or(i64::MAX);
        let began = i64::try_from(local.started_wall.0).unwrap_or(i64::MAX);
        view.clock_step_ms = wall - began - i64::try_from(up.as_millis()).unwrap_or(i64::MAX);
        view.settled = up >= self.settle || self.fleet.is_complete(now);
        view.sequence = record.record.sequence;
        view.replicas.retain(|replica| replica.name != self.replica);
        view.sources.clone_from(&local.sources);
        view.visits = self.prober.as_ref().map(|_| self.visits().clone());
        view
    }

    fn local(&self) -> MutexGuard<'_, Local> {
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ticks until it is dropped.
    pub async fn run(self: Arc<Self>) {
        tokio::join!(self.keep_ticking(), self.watch(), self.keep_visiting(), self.keep_asking());
    }

    /// Exchanges what is due and has to be asked for elsewhere. That may take its time, so it holds up nothing else.
    async fn keep_asking(&self) {
        while self.outside.is_some() {
            self.ask_for_what_is_due().await;
            tokio::time::sleep(PACE.0).await;
        }
    }

    /// Asks once, if something is due and its time has come. Gives whether a rotation has begun.
    pub async fn ask_for_what_is_due(&self) -> bool {
        let record = self.now().record.clone();
        let due = machine::due(&record, true, self.clock.wall());
        let elsewhere = record.current_root().is_some_and(|root| root.key.is_none());
        match due {
            None => {
                self.local().overdue = None;
                false
            }
            Some(kind) if elsewhere && self.scheduled && self.leads() => self.on_schedule(kind).await,
            // That is made here, at a tick, or by who leads.
            Some(_) => false,
        }
    }

    /// Visits those who renew first, as long as a rotation waits for them.
    async fn keep_visiting(&self) {
        let Some(prober) = &self.prober else { return };
        loop {
            let record = self.now().record.clone();
            match record.rotation.as_ref().filter(|one| one.doing() == State::Cutover && self.leads()) {
                Some(rotation) => self.visit(&**prober, &record, rotation).await,
                None => self.visits().clear(),
            }
            tokio::time::sleep(PACE.1).await;
        }
    }

    fn visits(&self) -> MutexGuard<'_, BTreeMap<(String, String), Result<(), String>>> {
        self.visits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn visit(&self, prober: &dyn Prober, record: &Record, rotation: &Rotation) {
        let (old, new) = (&rotation.from.issuer, &rotation.to.issuer);
        let view = self.view();
        let host =
            |member: &Member| Some(Host { identity: member.identity.clone(), address: member.mesh_address? });
        let live: Vec<&Member> = view.live(self.clock.wall(), rotation.policy.absent_after()).collect();
        // Somebody who has not renewed, to be called at in the name of those who have.
        let late = live.iter().filter(|member| member.issuer == *old).find_map(|member| host(member));
        let first = live.iter().filter(|one| rotation.canaries.contains(&one.id) && one.issuer == *new);
        let due = first.filter_map(|member| {
            let key = (member.id.clone(), member.serial.clone());
            let done = self.visits().get(&key).is_some_and(Result::is_ok);
            host(member).filter(|_| !done).map(|host| (key, host))
        });
        let due: Vec<_> = due.collect();
        let visiting = futures_util::stream::iter(due).map(|(key, host)| {
            let late = late.as_ref();
            async move {
                let mut ended = prober.visit(record, old, &host).await;
                if let (Ok(()), Some(late)) = (&ended, late) {
                    ended = prober.visit(record, new, late).await;
                }
                (key, ended)
            }
        });
        let ended: Vec<_> = visiting.buffer_unordered(VISITS).collect().await;
        if ended.is_empty() {
            return;
        }
        self.visits().extend(ended);
        self.wake.notify_one();
    }

    /// What another replica writes is read at once, and not at the next tick.
    async fn watch(&self) {
        let mut known = self.known();
        while self.store.is_shared() {
            let seen = known.borrow_and_update().version;
            if self.store.changed(RECORD, Some(seen), WATCH).await.is_ok() {
                self.wake.notify_one();
            }
            // The tick reads it. A store that is away is told there.
            let _ = tokio::time::timeout(PACE.0, known.changed()).await;
        }
    }

    /// Ends in order: another may lead at once, and nobody waits for what this one might still sign.
    ///
    /// # Errors
    /// The store cannot be used; then the others wait as for one that was killed.
    pub async fn leave(&self) -> Result<(), DriverError> {
        if !self.store.is_shared() {
            return Ok(());
        }
        let _turn = self.turn.lock().await;
        self.read().await?;
        let known = self.now();
        if known.record.lease.as_ref().is_some_and(|lease| lease.holder == self.replica) {
            let without = Record { lease: None, ..known.record.clone() };
            if let Err(SwapError::Store(error)) = self.put(&known, without).await {
                return Err(error.into());
            }
        }
        {
            let mut local = self.local();
            (local.stopped, local.leads, local.shown) = (true, false, None);
        }
        self.write_fleet().await
    }

    /// Writes down at once what this replica heard, for those who cannot be asked again.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn keep_fleet(&self) -> Result<(), DriverError> {
        let _turn = self.turn.lock().await;
        self.write_fleet().await
    }

    async fn keep_ticking(&self) {
        loop {
            let problem = self.tick().await.err().map(|error| error.to_string());
            if let Some(problem) = &problem {
                tracing::warn!(problem, "the record of the authority cannot be used now");
            }
            self.local().problem = problem;
            let pace = if self.now().record.rotation.is_some() { PACE.1 } else { PACE.0 };
            let _ = tokio::time::timeout(pace, self.wake.notified()).await;
        }
    }

    /// Looks once at everything. Gives whether the record was changed.
    ///
    /// # Errors
    /// The store cannot be used, or what it has is damaged; the last good record stays in use.
    pub async fn tick(&self) -> Result<bool, DriverError> {
        let _turn = self.turn.lock().await;
        self.read().await?;
        self.write_fleet().await?;
        self.look_after_copies().await;
        if !self.lead().await? {
            // Who asks here is told what is in the way, too.
            let known = self.now();
            let waiting = match machine::decide(&known.record, &self.view(), self.clock.wall()) {
                Decision::Waiting(waiting) => waiting,
                Decision::Steady | Decision::Next(_) => Waiting::default(),
            };
            self.wait_for(&known, waiting);
            return Ok(false);
        }
        let mut changed = false;
        for _ in 0..STEPS {
            let now = self.clock.wall();
            let known = self.now();
            match machine::decide(&known.record, &self.view(), now) {
                Decision::Steady => {
                    self.wait_for(&known, Waiting::default());
                    break;
                }
                Decision::Waiting(waiting) => {
                    self.wait_for(&known, waiting);
                    break;
                }
                Decision::Next(next) => {
                    match self.swap(&known, *next).await {
                        Ok(()) => changed = true,
                        Err(SwapError::Conflict) => self.read().await?,
                        Err(SwapError::Store(error)) => return Err(error.into()),
                    }
                    // What outside sees follows at once.
                    self.write_fleet().await?;
                    self.look_after_copies().await;
                }
            }
        }
        drop(_turn);
        if self.scheduled {
            // What has to be asked for elsewhere is not waited for here.
            match machine::due(&self.now().record, false, self.clock.wall()) {
                Some(kind) => changed |= self.on_schedule(kind).await,
                None if self.outside.is_none() => self.local().overdue = None,
                None => {}
            }
        }
        Ok(changed)
    }

    fn wait_for(&self, known: &Known, waiting: Waiting) {
        let found = (known.record.sequence, waiting);
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = found;
    }

    async fn on_schedule(&self, kind: Kind) -> bool {
        let now = self.clock.steady();
        let last = self.local().overdue.as_ref().map(|overdue| (overdue.pause, overdue.again));
        if last.is_some_and(|(_, again)| now < again) {
            return false;
        }
        let policy = plan::policy(&self.now().record);
        let reason = "half of its life is over".to_owned();
        let rotate = Command::Rotate(Rotate { kind, policy, root: NewRoot::Usual, reason });
        let begun = self.command(&rotate, "schedule").await;
        let (now, mut local) = (self.clock.steady(), self.local());
        match begun {
            Ok(_) => local.overdue = None,
            Err(error) => {
                tracing::warn!(%error, %kind, "a rotation is due and cannot begin");
                let pause = last.map_or(RETRIES.0, |(pause, _)| (pause * 2).min(RETRIES.1));
                let why = format!("the {kind} is due to be exchanged, and that cannot begin: {error}");
                local.overdue = Some(Overdue { why, pause, again: now + pause });
            }
        }
        local.overdue.is_none()
    }

    /// Does what somebody asks for, and gives the record after it.
    ///
    /// # Errors
    /// It is refused, nothing could be made for it, or the store cannot be used.
    pub async fn command(&self, command: &Command, by: &str) -> Result<Arc<Known>, CommandError> {
        let mut made = self.asked_for(command).await?;
        let is_from_outside = made.is_some();
        let _turn = self.turn.lock().await;
        for _ in 0..TRIES {
            self.read().await?;
            let known = self.now();
            let now = self.clock.wall();
            let wanted = command.wanted(&known.record)?;
            let material = match &made {
                Some((for_what, material)) if *for_what == wanted => material.clone(),
                _ => {
                    let material = self.make(&known.record, &wanted, now).await?;
                    made = Some((wanted, material.clone()));
                    material
                }
            };
            let next = command.apply(&known.record, material, &self.view(), now, by)?;
            match self.swap(&known, next).await {
                Ok(()) => {
                    tracing::info!(command = command.word(), by, "done");
                    if is_from_outside {
                        outside::forget(&*self.store).await;
                    }
                    self.wake.notify_one();
                    return Ok(self.now());
                }
                Err(SwapError::Conflict) => {}
                Err(SwapError::Store(error)) => return Err(DriverError::from(error).into()),
            }
        }
        Err(CommandError::Contended)
    }

    /// What somebody else has to sign for a command. The record stays as it is and everything goes on meanwhile.
    async fn asked_for(&self, command: &Command) -> Result<Option<(Wanted, Material)>, CommandError> {
        {
            let _turn = self.turn.lock().await;
            self.read().await?;
        }
        let known = self.now();
        let wanted = command.wanted(&known.record)?;
        let Wanted::Outside { new_root } = wanted else { return Ok(None) };
        let outside = self.elsewhere()?;
        let material = outside.make(&*self.store, &known.record, new_root, self.clock.wall()).await?;
        Ok(Some((wanted, material)))
    }

    fn elsewhere(&self) -> Result<&Elsewhere, ForgeError> {
        let problem = "the root's key is not here, and nobody is named who has it: write `root` in ca.yaml, \
                       give an issuer that was signed there with --from-file, or make a root here with `postern certs rotate root --own`";
        self.outside.as_ref().ok_or_else(|| ForgeError(problem.to_owned()))
    }

    /// What a rotation would do and run into, without writing anything or having anything signed.
    ///
    /// # Errors
    /// As for beginning it.
    pub async fn plan(&self, rotate: &Rotate) -> Result<Planned, CommandError> {
        let known = self.now();
        let now = self.clock.wall();
        let (material, outside) = match Command::Rotate(rotate.clone()).wanted(&known.record)? {
            Wanted::Outside { new_root } => self.elsewhere()?.plan(&known.record, new_root, now).await?,
            wanted => (self.make(&known.record, &wanted, now).await?, String::new()),
        };
        let (stages, blockers) = super::command::plan(&known.record, rotate, material, &self.view(), now)?;
        Ok(Planned { stages, blockers, outside })
    }

    async fn make(&self, record: &Record, wanted: &Wanted, now: Moment) -> Result<Material, ForgeError> {
        if *wanted == Wanted::Nothing {
            return Ok(Material::default());
        }
        let (forge, record, wanted) = (Arc::clone(&self.forge), record.clone(), wanted.clone());
        tokio::task::spawn_blocking(move || forge::make(&*forge, &record, &wanted, now))
            .await
            .unwrap_or_else(|_| Err(ForgeError("its thread has ended".to_owned())))
    }

    /// Reads the record, if it is another than before.
    async fn read(&self) -> Result<(), DriverError> {
        let stored = self.store.load(RECORD).await?.ok_or(DriverError::Gone)?;
        if stored.version != self.now().version {
            let record = Record::decode(&stored.value)?;
            self.known.send_replace(Arc::new(Known { record, version: stored.version }));
        }
        self.local().read_at = Some(self.clock.steady());
        Ok(())
    }

    /// Writes a record in the place of the one that it was made from, and shows it.
    async fn swap(&self, seen: &Known, next: Record) -> Result<(), SwapError> {
        let next = Record { sequence: seen.record.sequence + 1, ..next };
        self.put(seen, next).await
    }

    async fn put(&self, seen: &Known, next: Record) -> Result<(), SwapError> {
        let bytes = next.encode().map_err(|error| {
            SwapError::Store(StoreError::Damaged {
                store: self.store.name().to_owned(),
                reason: error.to_string(),
            })
        })?;
        let version = match self.store.swap(RECORD, Some(seen.version), &bytes).await {
            Ok(version) => version,
            Err(SwapError::Conflict) => return Err(SwapError::Conflict),
            // It may have been written all the same.
            Err(SwapError::Store(error)) => match self.store.load(RECORD).await? {
                Some(stored) if stored.value == bytes => stored.version,
                _ => return Err(SwapError::Store(error)),
            },
        };
        self.known.send_replace(Arc::new(Known { record: next, version }));
        Ok(())
    }

    /// Whether this replica leads; takes or keeps the lease.
    async fn lead(&self) -> Result<bool, DriverError> {
        if !self.store.is_shared() {
            self.local().leads = true;
            return Ok(true);
        }
        let steady = self.clock.steady();
        let known = self.now();
        let (mine, write) = {
            let mut local = self.local();
            match &known.record.lease {
                None => (true, true),
                Some(lease) if lease.holder == self.replica => {
                    let fresh = local.renewed.is_some_and(|at| steady.saturating_sub(at) < LEASE / 3);
                    (true, !fresh)
                }
                Some(lease) => match &local.lease {
                    Some((seen, since)) if seen == lease => {
                        let over = steady.saturating_sub(*since) > LEASE;
                        (over, over)
                    }
                    _ => {
                        local.lease = Some((lease.clone(), steady));
                        (false, false)
                    }
                },
            }
        };
        let mut leads = mine;
        if write {
            let beat = known.record.lease.as_ref().map_or(0, |lease| lease.beat) + 1;
            let lease = Some(Lease { holder: self.replica.clone(), beat });
            match self.put(&known, Record { lease, ..known.record.clone() }).await {
                Ok(()) => self.local().renewed = Some(steady),
                Err(SwapError::Conflict) => {
                    leads = false;
                    self.read().await?;
                }
                Err(SwapError::Store(error)) => return Err(error.into()),
            }
        }
        self.local().leads = leads;
        Ok(leads)
    }

    /// Writes down what this replica heard, and reads what others have.
    async fn write_fleet(&self) -> Result<(), DriverError> {
        let (now, steady) = (self.clock.wall(), self.clock.steady());
        let (show, stopped) = {
            let local = self.local();
            (local.shown.is_none_or(|at| steady.saturating_sub(at) >= SHOW), local.stopped)
        };
        let sequence = self.now().record.sequence;
        let sign = Sign { replica: &self.replica, sequence, signs_unread: self.signs_unread, stopped };
        let mut changes = self.fleet.changes(&sign, show && self.store.is_shared(), now).into_iter();
        while let Some((part, bytes)) = changes.next() {
            if let Err(error) = self.write_part(part, &bytes).await {
                // What comes after it is not written either.
                changes.for_each(|(part, _)| self.fleet.unwritten(part));
                return Err(error);
            }
        }
        if show {
            self.local().shown = Some(steady);
            if self.store.is_shared() {
                self.follow(now).await?;
            }
        }
        Ok(())
    }

    async fn write_part(&self, part: u8, bytes: &[u8]) -> Result<(), DriverError> {
        let name = format!("{FLEET}{}/{part}", self.replica);
        let seen = self.local().parts.get(&part).copied();
        match self.store.swap(&name, seen, bytes).await {
            Ok(version) => {
                self.local().parts.insert(part, version);
                Ok(())
            }
            Err(error) => {
                self.fleet.unwritten(part);
                // Whatever is there was written by this replica before.
                let stored = self.store.load(&name).await?;
                let mut local = self.local();
                match stored {
                    Some(stored) => local.parts.insert(part, stored.version),
                    None => local.parts.remove(&part),
                };
                if let SwapError::Store(error) = error { Err(error.into()) } else { Ok(()) }
            }
        }
    }

    async fn follow(&self, now: Moment) -> Result<(), DriverError> {
        for (name, part) in self.store.list(FLEET).await? {
            let Some((replica, number)) = name.strip_prefix(FLEET).and_then(|rest| rest.rsplit_once('/'))
            else {
                continue;
            };
            let Ok(number) = number.parse() else { continue };
            if replica != self.replica && self.fleet.follow(replica, number, &part.value, now) {
                // Somebody else may have removed it.
                let _ = self.store.remove(&name, part.version).await;
            }
        }
        Ok(())
    }

    /// Writes the bundle to its copies, and believes only what is read back.
    async fn look_after_copies(&self) {
        if self.copies.is_empty() {
            return;
        }
        let known = self.now();
        let roots: Vec<Der> = known.record.trusted().map(|root: &Root| root.certificate.clone()).collect();
        let wanted: BTreeSet<&[u8]> = roots.iter().map(|root| root.0.as_slice()).collect();
        let is_right =
            |found: &[Der]| found.iter().map(|root| root.0.as_slice()).collect::<BTreeSet<_>>() == wanted;
        let mut sources = Vec::new();
        for copy in &self.copies {
            let problem = match copy.read().await {
                Ok(found) if is_right(&found) => String::new(),
                _ => match copy.write(&roots).await {
                    Err(why) => format!("cannot be written: {why}"),
                    Ok(()) => match copy.read().await {
                        Ok(found) if is_right(&found) => String::new(),
                        Ok(_) => "has other roots than were written".to_owned(),
                        Err(why) => format!("cannot be read: {why}"),
                    },
                },
            };
            sources.push(Source { name: copy.name().to_owned(), problem });
        }
        self.local().sources = sources;
    }
}
