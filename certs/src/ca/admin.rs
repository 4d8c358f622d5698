//! What people do with an authority: the service `Admin`, on the socket in its data directory.
//!
//! Commands are those of [`Command`]; this turns messages into them, and the record with what is known of the fleet into a
//! status. Every command is written to the audit log with who asked, done or refused.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use tonic::{Code, Request, Response, Status};

use super::audit::{Audit, Entry};
use super::fleet::{Member, View};
use super::keeper::Keeper;
use super::outside;
use super::proto::{self, StatusReply};
use super::record::{IssuerState, Moment, Record, RootState};
use super::rotation::command::{Command, NewRoot, Refusal, Rotate};
use super::rotation::driver::CommandError;
use super::rotation::interlocks::{self, Blocker};
use super::rotation::machine::{self, Waiting};
use super::rotation::plan::{self, Stage};
use super::rotation::{Back, Kind, Policy, Rotation, State};

/// A status is told anew at least so often while somebody watches: workloads confirm without a change of the record.
const PACE: Duration = Duration::from_millis(250);
/// Workloads in a status that was not asked for all.
const MAX_LISTED: usize = 50;
/// The field of a request that says who asks. Whoever may use the socket may say anything; it is for the log.
pub const ACTOR: &str = "postern-actor";

/// The service.
pub struct Operator {
    keeper: Arc<Keeper>,
    audit: Option<Arc<Audit>>,
}

impl Operator {
    /// For an authority, with the log that commands are written to.
    #[must_use]
    pub fn new(keeper: Arc<Keeper>, audit: Option<Arc<Audit>>) -> Self {
        Self { keeper, audit }
    }

    /// To be added to a server.
    #[must_use]
    pub fn server(self) -> proto::admin_server::AdminServer<Self> {
        proto::admin_server::AdminServer::new(self)
    }

    fn status(&self, all: bool) -> StatusReply {
        let driver = self.keeper.driver();
        let (known, waiting) = driver.standing();
        let mut reply = status(&known.record, &driver.view(), &waiting, driver.wall(), all);
        (reply.due, reply.due_kind) = due(&known.record, driver.outside().is_some(), driver.wall());
        reply.overdue = driver.overdue().unwrap_or_default();
        driver.replica().clone_into(&mut reply.replica);
        reply.leads = driver.leads();
        reply.problem = driver.problem().unwrap_or_default();
        reply
    }

    async fn done(&self, command: Command, by: String) -> Result<Response<StatusReply>, Status> {
        let result = self.keeper.driver().command(&command, &by).await;
        let refused = result.as_ref().err().map(ToString::to_string);
        self.note(&command, &by, refused.as_deref())?;
        match result {
            Ok(_) => Ok(Response::new(self.status(false))),
            Err(error) => Err(refusal(&error)),
        }
    }

    fn note(&self, command: &Command, by: &str, refused: Option<&str>) -> Result<(), Status> {
        let Some(audit) = &self.audit else { return Ok(()) };
        let entry = match refused {
            Some(why) => Entry::refused(command.word(), by, why),
            None => Entry::allowed(command.word(), by),
        };
        let entry =
            described(command).into_iter().fold(entry, |entry, (name, value)| entry.with(name, value));
        let now = self.keeper.driver().wall().into();
        audit.write(&entry, now).and_then(|()| audit.sync()).map_err(|error| {
            Status::unavailable(format!("it is done, and the audit log is not written: {error}"))
        })
    }

    fn rotate(&self, asked: &proto::RotateRequest) -> Result<Rotate, Status> {
        let kind = match asked.kind.as_str() {
            "leaf" => Kind::Leaf,
            "issuer" => Kind::Issuer,
            "root" => Kind::Root,
            other => {
                return Err(Status::invalid_argument(format!("`{other}` is none of leaf, issuer and root")));
            }
        };
        if kind == Kind::Leaf && !asked.import.trim().is_empty() {
            return Err(Status::invalid_argument("leaves come from nowhere else"));
        }
        if kind != Kind::Leaf && !asked.select.is_empty() {
            return Err(Status::invalid_argument("only leaves can be selected"));
        }
        for pattern in &asked.select {
            pattern
                .parse::<crate::identity::IdentityPattern>()
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
        }
        let usual = plan::policy(&self.keeper.driver().now().record);
        let policy = Policy {
            step: asked.step,
            soak_ms: asked.soak_ms.unwrap_or(usual.soak_ms),
            spread_ms: asked.spread_ms.unwrap_or(usual.spread_ms),
            absent_after_ms: asked.absent_after_ms.unwrap_or(usual.absent_after_ms),
            select: asked.select.clone(),
            same_key: asked.same_key,
            ..usual
        };
        let policy = if asked.compress { plan::compressed(&policy) } else { policy };
        let root = match asked.source.as_str() {
            "" if asked.import.trim().is_empty() => NewRoot::Usual,
            "" => NewRoot::Pem(asked.import.clone()),
            "own" => NewRoot::Own,
            source => self.source(source).map(|()| NewRoot::Outside)?,
        };
        Ok(Rotate { kind, policy, root, reason: asked.reason.clone() })
    }

    /// Whether somebody of that kind can be asked.
    fn source(&self, wanted: &str) -> Result<(), Status> {
        let configured = self.keeper.driver().outside().map(outside::Elsewhere::kind);
        if configured.is_some_and(|kind| kind.as_str() == wanted) {
            return Ok(());
        }
        let there = configured.map_or("nothing of the kind", outside::Kind::as_str);
        Err(Status::invalid_argument(format!(
            "`root` in ca.yaml has no `{wanted}`, it has {there}: write root: {{{wanted}: {{...}}}} and start the authority again"
        )))
    }
}

/// What a log has of a command besides its name. No key is among it.
fn described(command: &Command) -> Vec<(&'static str, String)> {
    match command {
        Command::Rotate(rotate) => {
            let root = match &rotate.root {
                NewRoot::Usual => "as before",
                NewRoot::Own => "own",
                NewRoot::Pem(_) => "a file",
                NewRoot::Outside => "outside",
            };
            vec![
                ("kind", rotate.kind.as_str().to_owned()),
                ("root", root.to_owned()),
                ("because", rotate.reason.clone()),
            ]
        }
        Command::Advance { force, waive, compress, reason } => vec![
            ("force", force.to_string()),
            ("waive", waive.join(", ")),
            ("compress", compress.to_string()),
            ("because", reason.clone()),
        ],
        Command::Pause { reason } | Command::Resume { reason } | Command::Rollback { reason } => {
            vec![("because", reason.clone())]
        }
        Command::Distrust { root, reason } => vec![("root", root.clone()), ("because", reason.clone())],
        Command::Revoke { what, reason } => vec![("what", what.clone()), ("because", reason.clone())],
        Command::Allow { what } => vec![("what", what.clone())],
        Command::Recover { reason, .. } => vec![("because", reason.clone())],
        Command::Rehearse | Command::EndRehearsal => Vec::new(),
        Command::Observe { name, kind } => vec![("name", name.clone()), ("kind", kind.clone())],
        Command::Unobserve { name } => vec![("name", name.clone())],
        Command::Forget { id } => vec![("id", id.clone())],
    }
}

fn refusal(error: &CommandError) -> Status {
    let code = match error {
        CommandError::Refused(Refusal::Blocked(_)) => Code::FailedPrecondition,
        CommandError::Refused(Refusal::Busy(_)) => Code::Aborted,
        CommandError::Refused(Refusal::Invalid(_)) | CommandError::Forge(_) => Code::InvalidArgument,
        CommandError::Driver(_) | CommandError::Contended => Code::Unavailable,
    };
    Status::new(code, error.to_string())
}

/// Who asks.
fn actor<T>(request: &Request<T>) -> String {
    let said = request.metadata().get(ACTOR).and_then(|value| value.to_str().ok());
    let said: String =
        said.unwrap_or("operator").chars().filter(|letter| !letter.is_control()).take(100).collect();
    if said.is_empty() { "operator".to_owned() } else { said }
}

type Statuses = Pin<Box<dyn Stream<Item = Result<StatusReply, Status>> + Send>>;

#[tonic::async_trait]
impl proto::admin_server::Admin for Operator {
    type WatchStream = Statuses;

    async fn status(&self, request: Request<proto::StatusRequest>) -> Result<Response<StatusReply>, Status> {
        Ok(Response::new(Self::status(self, request.into_inner().all)))
    }

    async fn watch(&self, _: Request<proto::WatchStatusRequest>) -> Result<Response<Statuses>, Status> {
        let watcher = Self::new(Arc::clone(&self.keeper), None);
        let told = stream::unfold((watcher, None::<StatusReply>), |(watcher, last)| async move {
            loop {
                let now = watcher.status(false);
                let same =
                    last.as_ref().is_some_and(|last| StatusReply { now: last.now, ..now.clone() } == *last);
                if !same {
                    return Some((Ok(now.clone()), (watcher, Some(now))));
                }
                let mut known = watcher.keeper.driver().known();
                known.mark_unchanged();
                let _ = tokio::time::timeout(PACE, known.changed()).await;
            }
        });
        Ok(Response::new(Box::pin(told)))
    }

    async fn plan(
        &self,
        request: Request<proto::RotateRequest>,
    ) -> Result<Response<proto::PlanReply>, Status> {
        let rotate = self.rotate(request.get_ref())?;
        let planned = self.keeper.driver().plan(&rotate).await.map_err(|error| refusal(&error))?;
        Ok(Response::new(proto::PlanReply {
            stages: planned.stages.iter().map(proto::Stage::from).collect(),
            blockers: planned.blockers.iter().map(proto::Blocker::from).collect(),
            outside: planned.outside,
        }))
    }

    async fn rotate(&self, request: Request<proto::RotateRequest>) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        let rotate = Self::rotate(self, request.get_ref())?;
        self.done(Command::Rotate(rotate), by).await
    }

    async fn advance(
        &self,
        request: Request<proto::AdvanceRequest>,
    ) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        let proto::AdvanceRequest { reason, force, waive, compress } = request.into_inner();
        self.done(Command::Advance { force, waive, compress, reason }, by).await
    }

    async fn pause(&self, request: Request<proto::ReasonRequest>) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        self.done(Command::Pause { reason: request.into_inner().reason }, by).await
    }

    async fn resume(&self, request: Request<proto::ReasonRequest>) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        self.done(Command::Resume { reason: request.into_inner().reason }, by).await
    }

    async fn rollback(
        &self,
        request: Request<proto::ReasonRequest>,
    ) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        self.done(Command::Rollback { reason: request.into_inner().reason }, by).await
    }

    async fn distrust(
        &self,
        request: Request<proto::DistrustRequest>,
    ) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        let proto::DistrustRequest { root, reason } = request.into_inner();
        self.done(Command::Distrust { root, reason }, by).await
    }

    async fn revoke(&self, request: Request<proto::RevokeRequest>) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        let proto::RevokeRequest { what, reason, undo } = request.into_inner();
        if what.starts_with("spiffe://") {
            what.parse::<crate::identity::SpiffeId>()
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
        }
        let command = if undo { Command::Allow { what } } else { Command::Revoke { what, reason } };
        self.done(command, by).await
    }

    async fn recover(
        &self,
        request: Request<proto::RecoverRequest>,
    ) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        let proto::RecoverRequest { reason, import } = request.into_inner();
        let import = (!import.trim().is_empty()).then_some(import);
        self.done(Command::Recover { import, reason }, by).await
    }

    async fn rehearse(
        &self,
        request: Request<proto::RehearseRequest>,
    ) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        let end = request.into_inner().end;
        self.done(if end { Command::EndRehearsal } else { Command::Rehearse }, by).await
    }

    async fn observe(
        &self,
        request: Request<proto::ObserveRequest>,
    ) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        let proto::ObserveRequest { name, kind, remove } = request.into_inner();
        if name.trim().is_empty() {
            return Err(Status::invalid_argument("somebody has a name: that of a workload, or its identity"));
        }
        self.done(if remove { Command::Unobserve { name } } else { Command::Observe { name, kind } }, by)
            .await
    }

    async fn forget(&self, request: Request<proto::ForgetRequest>) -> Result<Response<StatusReply>, Status> {
        let by = actor(&request);
        self.done(Command::Forget { id: request.into_inner().id }, by).await
    }

    async fn export_bundle(
        &self,
        _: Request<proto::ExportBundleRequest>,
    ) -> Result<Response<proto::ExportBundleReply>, Status> {
        let known = self.keeper.driver().now();
        let current = self.keeper.current().borrow().clone();
        Ok(Response::new(proto::ExportBundleReply {
            bundle: Some(current.bundle().into()),
            trust_domain: known.record.trust_domain.clone(),
            generation: known.record.bundle.generation,
            roots: known.record.trusted().map(|root| root.certificate.0.clone()).collect(),
        }))
    }
}

impl From<&Stage> for proto::Stage {
    fn from(stage: &Stage) -> Self {
        Self {
            state: stage.state.as_str().to_owned(),
            begins: stage.begins.secs(),
            ends: stage.ends.secs(),
            what: stage.what.clone(),
        }
    }
}

impl From<&Blocker> for proto::Blocker {
    fn from(blocker: &Blocker) -> Self {
        let culprits = blocker.culprits.iter();
        Self {
            interlock: blocker.interlock.into(),
            kind: blocker.kind.to_owned(),
            what: blocker.what.clone(),
            culprits: culprits
                .map(|one| proto::Culprit { who: one.who.clone(), why: one.why.clone() })
                .collect(),
            way: blocker.way.clone(),
        }
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// The whole status.
#[must_use]
pub fn status(record: &Record, view: &View, waiting: &Waiting, now: Moment, all: bool) -> StatusReply {
    let mut leaves: BTreeMap<&str, u64> = BTreeMap::new();
    for member in view.members.iter().filter(|member| member.may_come_back(now)) {
        *leaves.entry(&member.issuer.0).or_default() += 1;
    }
    let roots = record.roots.iter().map(|root| proto::RootStatus {
        fingerprint: root.id.0.clone(),
        state: root.state.as_str().to_owned(),
        not_before: root.not_before.secs(),
        not_after: root.not_after.secs(),
        key: root.key.is_some(),
        note: root.note.clone(),
        kept: root.kept.clone(),
    });
    let issuers = record.issuers.iter().map(|issuer| proto::IssuerStatus {
        id: issuer.id.0.clone(),
        state: issuer.state.as_str().to_owned(),
        root: issuer.root.0.clone(),
        not_before: issuer.not_before.secs(),
        not_after: issuer.not_after.secs(),
        leaves: leaves.get(issuer.id.0.as_str()).copied().unwrap_or_default(),
    });
    let revocations = record.revocations.serials.iter().chain(&record.revocations.identities);
    let (due, due_kind) = due(record, false, now);
    StatusReply {
        trust_domain: record.trust_domain.clone(),
        now: now.secs(),
        generation: record.bundle.generation,
        min_supported_generation: record.bundle.min_supported_generation,
        roots: roots.collect(),
        issuers: issuers.collect(),
        rotation: record.rotation.as_ref().map(|rotation| rotation_status(rotation, view, waiting, now)),
        past: record.past.iter().map(|one| rotation_status(one, view, &Waiting::default(), now)).collect(),
        fleet: Some(fleet_status(record, view, now, all)),
        revocations: revocations
            .map(|one| proto::RevocationStatus {
                what: one.what.clone(),
                at: one.at.secs(),
                by: one.by.clone(),
                reason: one.reason.clone(),
                until: one.until.map_or(0, Moment::secs),
            })
            .collect(),
        rehearsal: record.rehearsal.as_ref().map(|rehearsal| {
            let live: Vec<&Member> = view.live(now, super::rotation::ABSENT_AFTER).collect();
            let lacks = |one: &Member| match &one.refused {
                _ if one.generation < rehearsal.generation => {
                    Some(format!("has generation {} of {}", one.generation, rehearsal.generation))
                }
                Some(why) => Some(format!("says: {why}")),
                None => None,
            };
            let missing: Vec<_> =
                live.iter().filter_map(|one| lacks(one).map(|why| (one.id.clone(), why))).collect();
            proto::RehearsalStatus {
                id: rehearsal.id.clone(),
                generation: rehearsal.generation,
                started: rehearsal.started_at.secs(),
                confirmed: count(live.len() - missing.len()),
                of: count(live.len()),
                missing: missing
                    .iter()
                    .take(MAX_LISTED)
                    .map(|(who, why)| proto::Culprit { who: who.clone(), why: why.clone() })
                    .collect(),
            }
        }),
        observers: record
            .observers
            .iter()
            .map(|one| proto::ObserverStatus {
                name: one.name.clone(),
                kind: one.kind.clone(),
                generation: view
                    .members
                    .iter()
                    .filter(|member| member.id == one.name || member.identity == one.name)
                    .map(|member| member.generation)
                    .max()
                    .unwrap_or(0),
            })
            .collect(),
        leaf_s: record.lifetimes.leaf_s,
        replicas: view
            .replicas
            .iter()
            .map(|one| proto::ReplicaStatus {
                name: one.name.clone(),
                seen: one.seen_at.secs(),
                ahead: i64::try_from(one.sequence).unwrap_or(i64::MAX)
                    - i64::try_from(record.sequence).unwrap_or(i64::MAX),
            })
            .collect(),
        due,
        due_kind,
        ..StatusReply::default()
    }
}

/// When what is in use has reached the age at which it is exchanged.
fn due(record: &Record, asks: bool, now: Moment) -> (u64, String) {
    let found = [Kind::Root, Kind::Issuer].into_iter().filter_map(|kind| {
        let at = machine::due_at(record, kind, asks)?;
        Some((at.max(now).secs(), kind.as_str().to_owned()))
    });
    found.min().unwrap_or_default()
}

fn rotation_status(
    rotation: &Rotation,
    view: &View,
    waiting: &Waiting,
    now: Moment,
) -> proto::RotationStatus {
    let (done, of) = if rotation.ended.is_some() { (0, 0) } else { progress(rotation, view, now) };
    let or_none = |state: Option<State>| state.map_or_else(String::new, |state| state.as_str().to_owned());
    proto::RotationStatus {
        id: rotation.id.clone(),
        kind: rotation.kind.as_str().to_owned(),
        state: if rotation.ended.is_some() {
            "STEADY".to_owned()
        } else {
            rotation.state.as_str().to_owned()
        },
        paused_in: or_none(rotation.paused_in),
        started_by: rotation.started_by.clone(),
        reason: rotation.reason.clone(),
        started: rotation.started_at.secs(),
        entered: rotation.entered_at.secs(),
        from_root: rotation.from.root.0.clone(),
        to_root: rotation.to.root.0.clone(),
        from_issuer: rotation.from.issuer.0.clone(),
        to_issuer: rotation.to.issuer.0.clone(),
        generation: rotation.generation,
        blockers: waiting.blockers.iter().map(proto::Blocker::from).collect(),
        quiet_until: waiting.until.map_or(0, Moment::secs),
        for_whom: waiting.for_whom.clone().unwrap_or_default(),
        done,
        of,
        events: rotation
            .history
            .iter()
            .map(|event| proto::EventStatus {
                at: event.at.secs(),
                state: event.state.clone(),
                by: event.by.clone(),
                note: event.note.clone(),
            })
            .collect(),
        ended: rotation.ended.clone().unwrap_or_default(),
        waived: rotation.policy.waived.iter().map(|one| one.who.clone()).collect(),
    }
}

/// Of the live workloads, how many have done what the present state is for.
fn progress(rotation: &Rotation, view: &View, now: Moment) -> (u64, u64) {
    let live: Vec<&Member> = view.live(now, rotation.policy.absent_after()).collect();
    let done = |member: &&&Member| match (rotation.doing(), rotation.kind) {
        (State::Migrating, Kind::Leaf) => {
            !interlocks::selected(rotation, member) || member.signed_at >= rotation.started_at
        }
        (State::Cutover, _) => !rotation.canaries.contains(&member.id) || member.issuer == rotation.to.issuer,
        (State::Migrating | State::Verifying, _) => member.issuer == rotation.to.issuer,
        (State::RollingBack, _) if rotation.back == Some(Back::Migrating) => {
            member.issuer == rotation.from.issuer
        }
        (State::Emergency, _) => {
            member.issuer == rotation.to.issuer && member.generation >= rotation.generation
        }
        _ => member.generation >= rotation.generation,
    };
    (count(live.iter().filter(done).count()), count(live.len()))
}

fn fleet_status(record: &Record, view: &View, now: Moment, all: bool) -> proto::FleetStatus {
    let absent_after =
        record.rotation.as_ref().map_or(super::rotation::ABSENT_AFTER, |one| one.policy.absent_after());
    let live: Vec<&Member> = view.live(now, absent_after).collect();
    let mut by_age = vec![0_u64; 4];
    for member in &live {
        let left = member.not_after.since(now).as_secs().min(record.lifetimes.leaf_s);
        let over = record.lifetimes.leaf_s - left;
        let quarter = (over * 4 / record.lifetimes.leaf_s.max(1)).min(3);
        if let Some(place) = usize::try_from(quarter).ok().and_then(|quarter| by_age.get_mut(quarter)) {
            *place += 1;
        }
    }
    let lags = |member: &&Member| {
        member.may_come_back(now)
            && (member.generation < record.bundle.generation || member.refused.is_some())
    };
    let listed = view.members.iter().filter(|member| all || lags(member));
    let (handshakes, failures) = view.handshakes_since(now - Duration::from_secs(600));
    proto::FleetStatus {
        workloads: count(view.members.len()),
        live: count(live.len()),
        absent: count(view.absent(now, absent_after).count()),
        silent: count(view.absent(now, absent_after).filter(|one| one.is_silent()).count()),
        current: count(live.iter().filter(|one| one.generation >= record.bundle.generation).count()),
        first_end: live.iter().map(|one| one.not_after.secs()).filter(|end| *end > 0).min().unwrap_or(0),
        listed: listed
            .take(if all { usize::MAX } else { MAX_LISTED })
            .map(|one| proto::WorkloadStatus {
                id: one.id.clone(),
                identity: one.identity.clone(),
                version: one.version.clone(),
                generation: one.generation,
                issuer: one.issuer.0.clone(),
                serial: one.serial.clone(),
                not_after: one.not_after.secs(),
                seen: one.seen_at.secs(),
                clock_offset_ms: one.clock_offset_ms,
                refused: one.refused.clone().unwrap_or_default(),
                live: one.is_live(now, absent_after),
                silent: one.is_silent(),
            })
            .collect(),
        by_age,
        handshakes,
        failures,
    }
}

/// Whether something ends within a span that is in use: what `postern certs check` says. Lines for people.
#[must_use]
pub fn ending(status: &StatusReply, within: u64) -> Vec<String> {
    let soon = status.now.saturating_add(within);
    let at = |seconds| Moment::from_secs(seconds);
    let mut found = Vec::new();
    if !status.overdue.is_empty() {
        found.push(status.overdue.clone());
    }
    let signing = status.issuers.iter().find(|issuer| issuer.state == IssuerState::Signing.as_str());
    // What counts is the chain in use: an old root in the bundle that ends harms nobody.
    let root = signing.and_then(|issuer| status.roots.iter().find(|root| root.fingerprint == issuer.root));
    if let Some(root) = root.filter(|root| root.not_after < soon) {
        found.push(format!(
            "root {} ends {}",
            root.fingerprint.get(..12).unwrap_or(&root.fingerprint),
            at(root.not_after)
        ));
    }
    if let Some(issuer) = signing.filter(|issuer| issuer.not_after < soon) {
        found.push(format!(
            "issuer {} ends {}",
            issuer.id.get(..12).unwrap_or(&issuer.id),
            at(issuer.not_after)
        ));
    }
    // Leaves renew at half of their life: one that has less than a tenth left does not.
    let tenth = status.now + status.leaf_s / 10;
    for one in status.fleet.iter().flat_map(|fleet| &fleet.listed) {
        if one.live && one.not_after > 0 && one.not_after < tenth {
            found.push(format!("{} ({}) does not renew: ends {}", one.id, one.identity, at(one.not_after)));
        }
    }
    for root in status.roots.iter().filter(|root| root.state == RootState::Retiring.as_str()) {
        if root.not_after < status.now && status.rotation.is_some() {
            let id = root.fingerprint.get(..12).unwrap_or(&root.fingerprint);
            found.push(format!("root {id} has ended while it is exchanged"));
        }
    }
    found
}
