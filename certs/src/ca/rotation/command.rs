//! What people ask for, as functions of the record: a new record, or a refusal with words.

use std::time::Duration;

use super::super::fleet::View;
use super::super::record::{
    Forgotten, Issuer, IssuerState, MAX_FORGOTTEN, MAX_REVOCATIONS, MAX_ROOTS, Moment, Observer, Record,
    Rehearsal, Revocation, Root, RootState,
};
use super::forge::{Material, Wanted};
use super::interlocks::{Blocker, Situation};
use super::machine::{baseline, roll_back};
use super::{Baseline, End, Force, Kind, Policy, Rotation, State, Waiver, interlocks, plan};

/// Renewals after an emergency spread over this.
const EMERGENCY_SPREAD: Duration = Duration::from_secs(5);

/// Something to be done.
#[derive(Clone, Debug)]
pub enum Command {
    Rotate(Rotate),
    /// On with the rotation: one state where each has to be allowed, or past what is in the way.
    Advance {
        force: bool,
        waive: Vec<String>,
        compress: bool,
        reason: String,
    },
    Pause {
        reason: String,
    },
    Resume {
        reason: String,
    },
    Rollback {
        reason: String,
    },
    /// Take a root out now.
    Distrust {
        root: String,
        reason: String,
    },
    /// Refuse a serial or an identity.
    Revoke {
        what: String,
        reason: String,
    },
    /// Refuse it no more.
    Allow {
        what: String,
    },
    /// A new root in place of one that has ended.
    Recover {
        import: Option<String>,
        reason: String,
    },
    Rehearse,
    EndRehearsal,
    Observe {
        name: String,
        kind: String,
    },
    Unobserve {
        name: String,
    },
    /// A process is over: nobody waits for it.
    Forget {
        id: String,
    },
}

/// A rotation to be begun.
#[derive(Clone, Debug)]
pub struct Rotate {
    pub kind: Kind,
    pub policy: Policy,
    /// Where a new root comes from.
    pub root: NewRoot,
    pub reason: String,
}

/// Where a new root comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NewRoot {
    /// From where the present one is from.
    #[default]
    Usual,
    /// It is made here.
    Own,
    /// PEM of a root and its key, or of an issuer, its key and the root.
    Pem(String),
    /// Somebody else has its key, and signs an issuer.
    Outside,
}

/// Why a command does nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An interlock.
    #[error("{}", told(.0))]
    Blocked(Vec<Blocker>),
    /// It makes no sense here.
    #[error("{0}")]
    Invalid(String),
    /// Something else is under way.
    #[error("{0}")]
    Busy(String),
}

fn told(blockers: &[Blocker]) -> String {
    let lines = blockers.iter().map(|blocker| {
        let who: Vec<String> =
            blocker.culprits.iter().map(|one| format!("{} {}", one.who, one.why)).collect();
        format!("{}: {} [{}]", blocker.what, who.join("; "), blocker.way)
    });
    lines.collect::<Vec<_>>().join(" / ")
}

impl Command {
    /// What has to be made before it can be done.
    ///
    /// # Errors
    /// It cannot be done at all.
    pub fn wanted(&self, record: &Record) -> Result<Wanted, Refusal> {
        Ok(match self {
            Self::Rotate(rotate) => {
                idle(record)?;
                match rotate.kind {
                    Kind::Leaf => Wanted::Nothing,
                    Kind::Issuer if let NewRoot::Pem(pem) = &rotate.root => Wanted::IssuerFrom(pem.clone()),
                    Kind::Issuer if is_elsewhere(record) => Wanted::Outside { new_root: false },
                    Kind::Issuer => Wanted::Issuer,
                    Kind::Root => {
                        let same_key = rotate.policy.same_key;
                        match &rotate.root {
                            NewRoot::Outside => Wanted::Outside { new_root: true },
                            NewRoot::Usual if is_elsewhere(record) => Wanted::Outside { new_root: true },
                            NewRoot::Pem(pem) => {
                                Wanted::Root { same_key, import: Some(pem.clone()), cross: true }
                            }
                            NewRoot::Own | NewRoot::Usual => {
                                Wanted::Root { same_key, import: None, cross: true }
                            }
                        }
                    }
                }
            }
            Self::Distrust { root, .. } => {
                let root = find_root(record, root)?;
                match root.in_bundle() && fallback(record, root).is_none() {
                    true => Wanted::Root { same_key: false, import: None, cross: false },
                    false => Wanted::Nothing,
                }
            }
            Self::Recover { import, .. } => {
                Wanted::Root { same_key: false, import: import.clone(), cross: true }
            }
            Self::Rehearse => Wanted::Rehearsal,
            _ => Wanted::Nothing,
        })
    }

    /// Who is named in notes of what was done.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Rotate(_) => "rotate",
            Self::Advance { .. } => "advance",
            Self::Pause { .. } => "pause",
            Self::Resume { .. } => "resume",
            Self::Rollback { .. } => "rollback",
            Self::Distrust { .. } => "distrust",
            Self::Revoke { .. } => "revoke",
            Self::Allow { .. } => "allow",
            Self::Recover { .. } => "recover",
            Self::Rehearse | Self::EndRehearsal => "rehearse",
            Self::Observe { .. } | Self::Unobserve { .. } => "observe",
            Self::Forget { .. } => "forget",
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// It cannot be done, or something is in the way; nothing has changed.
    pub fn apply(
        &self,
        record: &Record,
        material: Material,
        view: &View,
        now: Moment,
        by: &str,
    ) -> Result<Record, Refusal> {
        match self {
            Self::Rotate(rotate) => begin(record, rotate, material, view, now, by),
            Self::Advance { force, waive, compress, reason } => {
                advance(record, *force, waive, *compress, reason, now, by)
            }
            Self::Pause { reason } => change(record, |rotation| {
                if rotation.state == State::Paused {
                    return Err(Refusal::Invalid(
                        "it is paused already: `postern certs resume` or `postern certs rollback`".to_owned(),
                    ));
                }
                rotation.paused_in = Some(rotation.state);
                rotation.state = State::Paused;
                rotation.note(now, by, or(reason, "paused"));
                Ok(())
            }),
            Self::Resume { reason } => change(record, |rotation| {
                let Some(state) = rotation.paused_in.take() else {
                    return Err(Refusal::Invalid(
                        "it is not paused: `postern certs watch` shows what it waits for".to_owned(),
                    ));
                };
                rotation.state = state;
                rotation.guard_since = now;
                rotation.quiet_since = None;
                rotation.baseline = baseline(view, now);
                rotation.note(now, by, or(reason, "resumed"));
                Ok(())
            }),
            Self::Rollback { reason } => roll_back(record, by, &or(reason, "rolled back"), now),
            Self::Distrust { root, reason } => distrust(record, root, reason, material, now, by),
            Self::Revoke { what, reason } => revoke(record, what, reason, now, by),
            Self::Allow { what } => allow(record, what, now),
            Self::Recover { reason, .. } => recover(record, reason, material, now, by),
            Self::Rehearse => rehearse(record, material, now, by),
            Self::EndRehearsal => Ok(Record { rehearsal: None, ..record.clone() }),
            Self::Observe { name, kind } => {
                let mut next = record.clone();
                next.observers.retain(|one| one.name != *name);
                next.observers.push(Observer { name: name.clone(), kind: kind.clone() });
                Ok(next)
            }
            Self::Unobserve { name } => {
                let mut next = record.clone();
                next.observers.retain(|one| one.name != *name);
                if next.observers.len() == record.observers.len() {
                    return Err(Refusal::Invalid(format!("nobody called {name} has to confirm anything")));
                }
                Ok(next)
            }
            Self::Forget { id } => forget(record, id, view, now, by),
        }
    }
}

fn or(reason: &str, other: &str) -> String {
    if reason.trim().is_empty() { other.to_owned() } else { reason.trim().to_owned() }
}

fn idle(record: &Record) -> Result<(), Refusal> {
    match &record.rotation {
        None => Ok(()),
        Some(rotation) => Err(Refusal::Busy(format!(
            "{} rotation {} is {}: `postern certs watch` shows it, `postern certs rollback` ends it",
            rotation.kind, rotation.id, rotation.state
        ))),
    }
}

/// Whether somebody else has the key of the root in use.
fn is_elsewhere(record: &Record) -> bool {
    record.current_root().is_some_and(|root| root.key.is_none())
}

fn find_root<'a>(record: &'a Record, start: &str) -> Result<&'a Root, Refusal> {
    let wanted = start.to_ascii_lowercase().replace(':', "");
    let mut found = record.roots.iter().filter(|root| !wanted.is_empty() && root.id.0.starts_with(&wanted));
    match (found.next(), found.next()) {
        (Some(root), None) => Ok(root),
        (None, _) => Err(Refusal::Invalid(format!(
            "no root begins with `{start}`: `postern certs status` lists their fingerprints"
        ))),
        _ => Err(Refusal::Invalid(format!(
            "several roots begin with `{start}`: write more of the fingerprint"
        ))),
    }
}

fn change(
    record: &Record,
    change: impl FnOnce(&mut Rotation) -> Result<(), Refusal>,
) -> Result<Record, Refusal> {
    let mut next = record.clone();
    let Some(rotation) = &mut next.rotation else {
        return Err(Refusal::Invalid(
            "no rotation is under way: `postern certs rotate root --plan` tells what one would do".to_owned(),
        ));
    };
    change(rotation)?;
    Ok(next)
}

fn add_root(record: &mut Record, root: Root, now: Moment) -> Result<(), Refusal> {
    if let Some(known) = record.root(&root.id) {
        return Err(Refusal::Invalid(format!(
            "root {} is known already, as {}: a root that was trusted once does not come back",
            known.id.short(),
            known.state.as_str()
        )));
    }
    if record.roots.len() >= MAX_ROOTS {
        // The oldest of those that ended by themselves; what was distrusted is never forgotten.
        let oldest = record
            .roots
            .iter()
            .position(|root| root.state == RootState::Retired && root.not_after < now)
            .or_else(|| record.roots.iter().position(|root| root.state == RootState::Retired));
        match oldest {
            Some(oldest) => {
                let gone = record.roots.remove(oldest);
                record.issuers.retain(|issuer| issuer.root != gone.id);
            }
            None => return Err(Refusal::Invalid(format!("the authority lists {MAX_ROOTS} roots already"))),
        }
    }
    record.roots.push(root);
    Ok(())
}

fn short_of(what: &str) -> Refusal {
    Refusal::Invalid(format!("{what} was not made"))
}

fn begin(
    record: &Record,
    rotate: &Rotate,
    material: Material,
    view: &View,
    now: Moment,
    by: &str,
) -> Result<Record, Refusal> {
    idle(record)?;
    let mut next = record.clone();
    next.tidy(now);
    let signing = record.signing().ok_or_else(|| short_of("an issuer"))?;
    let from = End { root: signing.root.clone(), issuer: signing.id.clone() };
    let mut notes = Vec::new();
    let to = match rotate.kind {
        Kind::Leaf => from.clone(),
        Kind::Issuer => {
            let issuer = material.issuer.ok_or_else(|| short_of("an issuer"))?;
            if issuer.root != from.root {
                return Err(Refusal::Busy("the root was exchanged meanwhile: try again".to_owned()));
            }
            stage(&mut next, issuer, from.root.clone())
        }
        Kind::Root => {
            let root = material.root.ok_or_else(|| short_of("a root"))?;
            let issuer = material.issuer.ok_or_else(|| short_of("an issuer"))?;
            let id = root.id.clone();
            if root.spki == record.current_root().map(|old| old.spki.clone()).unwrap_or_default() {
                notes.push(
                    "the key is the old one, so this is no remedy for a key that others know".to_owned(),
                );
            }
            add_root(&mut next, Root { state: RootState::Staged, changed_at: now, ..root }, now)?;
            if let Some(issuer) = next.issuer_mut(&from.issuer) {
                issuer.cross = material.back;
            }
            if !material.no_cross.is_empty() {
                notes.push(format!("not signed over by the old root ({})", material.no_cross));
            }
            stage(&mut next, issuer, id)
        }
    };
    next.rotations += 1;
    let number = next.rotations;
    let mut rotation = Rotation {
        id: format!("r{number}"),
        number,
        kind: rotate.kind,
        state: State::Prepared,
        paused_in: None,
        back: None,
        started_by: by.to_owned(),
        reason: rotate.reason.clone(),
        started_at: now,
        entered_at: now,
        from,
        to,
        policy: rotate.policy.clone(),
        generation: record.bundle.generation,
        trusted_from: record.bundle.min_supported_generation,
        cutover_at: None,
        old_leaves_end: None,
        canaries: Vec::new(),
        quiet_since: None,
        baseline: baseline(view, now),
        guard_since: now,
        renewals: 0,
        allowed: false,
        force: None,
        history: Vec::new(),
        ended: None,
    };
    notes.insert(0, or(&rotate.reason, &format!("{} rotation", rotate.kind)));
    let state = if rotate.kind == Kind::Leaf { State::Migrating } else { State::Prepared };
    if rotate.kind == Kind::Leaf {
        rotation.renewals = 1;
    }
    rotation.enter(state, now, by, notes.join("; "));
    next.rotation = Some(rotation);
    // What no reason passes is not even begun.
    let current = next.rotation.as_ref();
    let situation = current.map(|rotation| Situation { record: &next, rotation, view, now });
    let gate: &[u8] = if rotate.kind == Kind::Leaf { &[] } else { &[3, 7] };
    let blockers: Vec<Blocker> = situation
        .iter()
        .flat_map(|at| gate.iter().flat_map(|number| interlocks::check(*number, at)))
        .collect();
    if blockers.is_empty() { Ok(next) } else { Err(Refusal::Blocked(blockers)) }
}

/// What a rotation that is not begun would run into, and its way.
///
/// # Errors
/// As for beginning it.
pub fn plan(
    record: &Record,
    rotate: &Rotate,
    material: Material,
    view: &View,
    now: Moment,
) -> Result<(Vec<plan::Stage>, Vec<Blocker>), Refusal> {
    let stages = plan::stages(rotate.kind, &rotate.policy, view, now);
    match begin(record, rotate, material, view, now, "plan") {
        Ok(next) => {
            let blockers = next
                .rotation
                .as_ref()
                .map(|rotation| interlocks::blockers(&Situation { record: &next, rotation, view, now }));
            let absent = view.absent(now, rotate.policy.absent_after());
            let mut blockers = blockers.unwrap_or_default();
            let late: Vec<_> = absent
                .filter(|member| rotate.kind == Kind::Root && !rotate.policy.waives(&member.id))
                .map(|member| interlocks::Culprit {
                    who: format!("{} ({})", member.id, member.identity),
                    why: format!("is absent, and its certificate ends {}", member.last_not_after()),
                })
                .collect();
            if !late.is_empty() {
                blockers.push(Blocker {
                    interlock: 2,
                    kind: "absent",
                    what: "VERIFYING would wait for workloads that are absent".to_owned(),
                    culprits: late,
                    way: "wait until these certificates end, or waive them by name".to_owned(),
                });
            }
            Ok((stages, blockers))
        }
        Err(Refusal::Blocked(blockers)) => Ok((stages, blockers)),
        Err(other) => Err(other),
    }
}

fn stage(record: &mut Record, issuer: Issuer, root: super::super::record::RootId) -> End {
    let end = End { root: root.clone(), issuer: issuer.id.clone() };
    record.issuers.push(Issuer { state: IssuerState::Staged, root, ..issuer });
    end
}

fn advance(
    record: &Record,
    force: bool,
    waive: &[String],
    compress: bool,
    reason: &str,
    now: Moment,
    by: &str,
) -> Result<Record, Refusal> {
    let reason = reason.trim();
    if (force || !waive.is_empty()) && reason.is_empty() {
        let blocker = Blocker {
            interlock: 10,
            kind: "unreasoned",
            what: "forcing and waiving need a reason".to_owned(),
            culprits: vec![interlocks::Culprit { who: by.to_owned(), why: "gave none".to_owned() }],
            way: "`--reason TEXT`".to_owned(),
        };
        return Err(Refusal::Blocked(vec![blocker]));
    }
    change(record, |rotation| {
        if rotation.state == State::Paused {
            return Err(Refusal::Invalid("it is paused: `postern certs resume` first".to_owned()));
        }
        for who in waive {
            rotation.policy.waived.retain(|one| one.who != *who);
            let waiver = Waiver { who: who.clone(), by: by.to_owned(), reason: reason.to_owned(), at: now };
            rotation.policy.waived.push(waiver);
            rotation.note(now, by, format!("{who} is not waited for: {reason}"));
        }
        if compress {
            rotation.policy = plan::compressed(&rotation.policy);
            rotation.note(now, by, "waits are shortened");
        }
        if force {
            rotation.force =
                Some(Force { state: rotation.state, by: by.to_owned(), reason: reason.to_owned() });
            rotation.note(now, by, format!("forced: {reason}"));
        }
        if waive.is_empty() && !compress {
            rotation.allowed = true;
            if !force {
                rotation.note(now, by, or(reason, "allowed to go on"));
            }
        }
        Ok(())
    })
}

/// The other end of a rotation, where its root is not the one that goes.
fn fallback(record: &Record, root: &Root) -> Option<End> {
    let rotation = record.rotation.as_ref()?;
    let ends = [&rotation.to, &rotation.from];
    let usable = |end: &&End| {
        end.root != root.id
            && record.root(&end.root).is_some_and(|root| root.state != RootState::Distrusted)
            && record.issuer(&end.issuer).is_some_and(|issuer| issuer.key.is_some())
    };
    ends.into_iter().find(usable).cloned()
}

fn distrust(
    record: &Record,
    root: &str,
    reason: &str,
    material: Material,
    now: Moment,
    by: &str,
) -> Result<Record, Refusal> {
    if reason.trim().is_empty() {
        return Err(Refusal::Invalid("a root is distrusted with a reason: --reason TEXT".to_owned()));
    }
    let root = find_root(record, root)?.clone();
    if root.state == RootState::Distrusted {
        return Err(Refusal::Invalid(format!(
            "root {} is distrusted already: `postern certs watch` shows who still has it",
            root.id.short()
        )));
    }
    let mut next = record.clone();
    if !root.in_bundle() {
        if record.rotation.as_ref().is_some_and(|one| one.to.root == root.id) {
            return Err(Refusal::Busy(
                "the root is that of a rotation nobody has seen yet: `postern certs rollback` first"
                    .to_owned(),
            ));
        }
        if let Some(root) = next.root_mut(&root.id) {
            root.become_(RootState::Distrusted, now, reason.trim());
            root.key = None;
        }
        return Ok(next);
    }
    let note = format!("root {} is distrusted: {}", root.id.short(), reason.trim());
    let to = match fallback(record, &root) {
        Some(end) => end,
        None => {
            let new = material.root.ok_or_else(|| short_of("a root"))?;
            let issuer = material.issuer.ok_or_else(|| short_of("an issuer"))?;
            let id = new.id.clone();
            add_root(&mut next, Root { state: RootState::Active, changed_at: now, ..new }, now)?;
            stage(&mut next, issuer, id)
        }
    };
    let next = replace_root(next, &root, RootState::Distrusted, reason.trim(), to, now, by, &note)?;
    Ok(next)
}

/// Puts another root in the place of one that is no good, at once.
#[expect(clippy::too_many_arguments, reason = "two callers, and every argument is another thing")]
fn replace_root(
    mut next: Record,
    old: &Root,
    state: RootState,
    old_note: &str,
    to: End,
    now: Moment,
    by: &str,
    note: &str,
) -> Result<Record, Refusal> {
    let signing = next.signing().ok_or_else(|| short_of("an issuer"))?;
    let from = next
        .rotation
        .as_ref()
        .map(
            |rotation| if rotation.from.root == old.id { rotation.from.clone() } else { rotation.to.clone() },
        )
        .unwrap_or(End { root: signing.root.clone(), issuer: signing.id.clone() });
    // Whatever was under way ends here.
    if let Some(mut rotation) = next.rotation.take() {
        rotation.ended = Some("replaced".to_owned());
        rotation.note(now, by, note);
        next.past.push(rotation);
    }
    for issuer in &mut next.issuers {
        if issuer.id == to.issuer {
            issuer.state = IssuerState::Signing;
        } else if issuer.state != IssuerState::Retired {
            issuer.state = IssuerState::Retired;
            issuer.key = None;
        } else {
            continue;
        }
        issuer.changed_at = now;
    }
    for issuer in &mut next.issuers {
        if issuer.cross.as_ref().is_some_and(|cross| cross.root == old.id) {
            issuer.cross = None;
        }
    }
    if let Some(root) = next.root_mut(&old.id) {
        root.become_(state, now, old_note);
        root.key = None;
    }
    if let Some(root) = next.root_mut(&to.root) {
        root.become_(RootState::Active, now, "");
    }
    next.rehearsal = None;
    let generation = next.bump(now);
    next.bundle.min_supported_generation = generation;
    next.bundle.reconnect_below = generation;
    next.rotations += 1;
    let number = next.rotations;
    let millis = u64::try_from(EMERGENCY_SPREAD.as_millis()).unwrap_or_default();
    let policy = Policy { spread_ms: millis, ..plan::policy(&next) };
    let mut rotation = Rotation {
        id: format!("r{number}"),
        number,
        kind: Kind::Root,
        state: State::Emergency,
        paused_in: None,
        back: None,
        started_by: by.to_owned(),
        reason: note.to_owned(),
        started_at: now,
        entered_at: now,
        from,
        to,
        policy,
        generation,
        trusted_from: generation,
        cutover_at: Some(now),
        old_leaves_end: None,
        canaries: Vec::new(),
        quiet_since: None,
        baseline: Baseline::default(),
        guard_since: now,
        renewals: 1,
        allowed: true,
        force: None,
        history: Vec::new(),
        ended: None,
    };
    rotation.enter(State::Emergency, now, by, note);
    next.rotation = Some(rotation);
    Ok(next)
}

fn recover(
    record: &Record,
    reason: &str,
    material: Material,
    now: Moment,
    by: &str,
) -> Result<Record, Refusal> {
    let old = record.current_root().ok_or_else(|| short_of("a root"))?.clone();
    let signer = record.signing().map_or(old.not_after, |issuer| issuer.not_after);
    if old.not_after > now && signer > now {
        return Err(Refusal::Invalid(format!(
            "the root is good until {} and its issuer until {signer}: `postern certs rotate root` exchanges them without a failed request",
            old.not_after
        )));
    }
    let mut next = record.clone();
    let new = material.root.ok_or_else(|| short_of("a root"))?;
    let issuer = material.issuer.ok_or_else(|| short_of("an issuer"))?;
    let id = new.id.clone();
    add_root(&mut next, Root { state: RootState::Active, changed_at: now, ..new }, now)?;
    let to = stage(&mut next, issuer, id);
    let note = format!("root {} has ended: {}", old.id.short(), or(reason, "recovered"));
    replace_root(next, &old, RootState::Retired, "ended", to, now, by, &note)
}

/// A serial is told from an identity by its scheme.
fn is_identity(what: &str) -> bool {
    what.starts_with("spiffe://")
}

fn serial(what: &str) -> Result<String, Refusal> {
    let digits = what.trim().trim_start_matches("0x").replace(':', "").to_ascii_lowercase();
    let digits = digits.trim_start_matches('0').to_owned();
    if digits.is_empty() || digits.len() > 40 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Refusal::Invalid(format!(
            "`{what}` is neither a serial in hexadecimal digits nor an identity spiffe://DOMAIN/PATH"
        )));
    }
    Ok(digits)
}

fn revoke(record: &Record, what: &str, reason: &str, now: Moment, by: &str) -> Result<Record, Refusal> {
    if reason.trim().is_empty() {
        return Err(Refusal::Invalid("something is revoked with a reason: --reason TEXT".to_owned()));
    }
    let mut next = record.clone();
    next.tidy(now);
    if next.revocations.serials.len() + next.revocations.identities.len() >= MAX_REVOCATIONS {
        return Err(Refusal::Invalid(format!(
            "{MAX_REVOCATIONS} revocations are in force: a rotation of all leaves makes those of serials needless"
        )));
    }
    let (list, what, until) = if is_identity(what) {
        let id = what.trim().to_owned();
        if !id.starts_with(&format!("spiffe://{}/", record.trust_domain)) {
            return Err(Refusal::Invalid(format!(
                "`{id}` is not an identity of spiffe://{}/",
                record.trust_domain
            )));
        }
        (&mut next.revocations.identities, id, None)
    } else {
        let until = now + record.lifetimes.leaf() + interlocks::SKEW_HARD;
        (&mut next.revocations.serials, serial(what)?, Some(until))
    };
    if list.iter().any(|one| one.what == what) {
        return Err(Refusal::Invalid(format!("{what} is revoked already")));
    }
    list.push(Revocation { what, at: now, by: by.to_owned(), reason: reason.trim().to_owned(), until });
    next.bump(now);
    Ok(next)
}

fn allow(record: &Record, what: &str, now: Moment) -> Result<Record, Refusal> {
    let mut next = record.clone();
    let what = if is_identity(what) { what.trim().to_owned() } else { serial(what)? };
    next.revocations.serials.retain(|one| one.what != what);
    next.revocations.identities.retain(|one| one.what != what);
    if next.revocations == record.revocations {
        return Err(Refusal::Invalid(format!("{what} is not revoked")));
    }
    next.bump(now);
    Ok(next)
}

fn forget(record: &Record, id: &str, view: &View, now: Moment, by: &str) -> Result<Record, Refusal> {
    if !view.members.iter().any(|member| member.id == id) {
        return Err(Refusal::Invalid(format!(
            "no workload is called `{id}`: `postern certs status --all` lists them"
        )));
    }
    let mut next = record.clone();
    next.tidy(now);
    next.forgotten.retain(|one| one.id != id);
    if next.forgotten.len() >= MAX_FORGOTTEN {
        return Err(Refusal::Invalid(format!(
            "{MAX_FORGOTTEN} workloads are forgotten already: wait until their certificates end"
        )));
    }
    next.forgotten.push(Forgotten { id: id.to_owned(), at: now, by: by.to_owned() });
    Ok(next)
}

fn rehearse(record: &Record, material: Material, now: Moment, by: &str) -> Result<Record, Refusal> {
    idle(record)?;
    let root = material.root.ok_or_else(|| short_of("a root"))?;
    let mut next = record.clone();
    let generation = next.bump(now);
    next.rehearsal = Some(Rehearsal {
        id: format!("rehearsal-{generation}"),
        root: root.id,
        certificate: root.certificate,
        generation,
        started_at: now,
        by: by.to_owned(),
    });
    Ok(next)
}
