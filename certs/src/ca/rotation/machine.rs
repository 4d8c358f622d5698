//! What comes next: a function of the record, the fleet and the time.
//!
//! ```text
//! root     PREPARED > TRUSTING > CUTOVER > MIGRATING > VERIFYING > RETIRING > steady
//! issuer   PREPARED >            CUTOVER > MIGRATING > VERIFYING            > steady
//! leaf                                     MIGRATING                        > steady
//! ```
//!
//! Every step gives a whole new record, to be written in one swap or not at all. What signs and what is trusted follows
//! from the record alone, so whoever reads it after a crash goes on where it says.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::fleet::{View, hash};
use super::super::record::{IssuerState, Moment, Record, RootState};
use super::interlocks::{self, Blocker, SKEW, Situation};
use super::{Back, Baseline, Kind, Rotation, State};

/// The guard compares with so much of the time before a rotation.
const BASELINE: Duration = Duration::from_secs(600);
/// At most this share of the fleet renews first.
const CANARY_SHARE: usize = 20;
/// A rehearsal that everybody has confirmed is shown for so long.
const REHEARSED: Duration = Duration::from_secs(600);

/// What to do.
#[derive(Clone, Debug)]
pub enum Decision {
    /// Nothing is under way.
    Steady,
    /// Something is in the way, or time has to pass.
    Waiting(Waiting),
    /// Write this, and decide again.
    Next(Box<Record>),
}

/// Why a rotation stays where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    pub blockers: Vec<Blocker>,
    /// Nothing is in the way, but it has to stay so until then.
    pub until: Option<Moment>,
    /// A person has to say `advance` or `resume`.
    pub for_whom: Option<String>,
}

/// Decides by the record, the fleet and the time.
#[must_use]
pub fn decide(record: &Record, view: &View, now: Moment) -> Decision {
    let Some(rotation) = &record.rotation else { return steady(record, view, now) };
    let situation = Situation { record, rotation, view, now };
    if rotation.state == State::Paused {
        return Decision::Waiting(Waiting {
            for_whom: Some("paused: `postern certs resume` or `postern certs rollback`".to_owned()),
            ..Waiting::default()
        });
    }
    let going = !matches!(rotation.state, State::RollingBack | State::Emergency | State::Prepared);
    if going
        && let Some(failing) = interlocks::check(8, &situation).first()
        && rotation.force.as_ref().is_none_or(|force| force.state != rotation.state)
    {
        let why = failing.culprits.first().map_or_else(String::new, |one| format!("{} {}", one.who, one.why));
        return Decision::Next(Box::new(guard(record, rotation, &why, now)));
    }
    let blockers = interlocks::blockers(&situation);
    let soaks = matches!(rotation.state, State::Cutover | State::Retiring);
    if !blockers.is_empty() {
        // Whoever has just started knows too little to say that it was not quiet.
        if rotation.quiet_since.is_some() && view.settled {
            return Decision::Next(Box::new(with(record, |rotation| rotation.quiet_since = None)));
        }
        return Decision::Waiting(Waiting { blockers, ..Waiting::default() });
    }
    if soaks {
        let Some(since) = rotation.quiet_since else {
            return Decision::Next(Box::new(with(record, |rotation| rotation.quiet_since = Some(now))));
        };
        let until = since + rotation.policy.soak();
        if until > now {
            return Decision::Waiting(Waiting { until: Some(until), ..Waiting::default() });
        }
    }
    if rotation.state == State::Verifying
        && let Some(until) = hold(rotation, view, now)
    {
        return Decision::Waiting(Waiting { until: Some(until), ..Waiting::default() });
    }
    if !rotation.allowed && !matches!(rotation.state, State::RollingBack | State::Emergency) {
        return Decision::Waiting(Waiting {
            for_whom: Some("nothing is in the way: `postern certs advance`".to_owned()),
            ..Waiting::default()
        });
    }
    Decision::Next(Box::new(advance(record, view, now)))
}

/// Without a rotation there is little to do.
fn steady(record: &Record, view: &View, now: Moment) -> Decision {
    if let Some(rehearsal) = &record.rehearsal {
        let confirmed = view.settled
            && view.members.iter().all(|one| one.is_silent() || one.generation >= rehearsal.generation);
        if confirmed && now.since(rehearsal.started_at) > REHEARSED {
            return Decision::Next(Box::new(Record { rehearsal: None, ..record.clone() }));
        }
    }
    Decision::Steady
}

/// What has to be exchanged because of its age. `asks`: somebody else who has the root's key can be asked for issuers.
#[must_use]
pub fn due(record: &Record, asks: bool, now: Moment) -> Option<Kind> {
    if record.rotation.is_some() {
        return None;
    }
    [Kind::Root, Kind::Issuer]
        .into_iter()
        .find(|kind| due_at(record, *kind, asks).is_some_and(|at| at <= now))
}

/// When something is exchanged because of its age: at half of its life, a root after a year at the latest. None: a person
/// has to do it, who has the root's key.
#[must_use]
pub fn due_at(record: &Record, kind: Kind, asks: bool) -> Option<Moment> {
    const YEAR: Duration = Duration::from_secs(365 * 86_400);
    let issuer = record.signing()?;
    let root = record.root(&issuer.root)?;
    if root.key.is_none() && !(asks && kind == Kind::Issuer) {
        return None;
    }
    let half = |not_before: Moment, not_after: Moment| not_after.since(not_before) / 2;
    match kind {
        Kind::Root => Some(root.not_before + half(root.not_before, root.not_after).min(YEAR)),
        Kind::Issuer => Some(issuer.not_before + half(issuer.not_before, issuer.not_after)),
        Kind::Leaf => None,
    }
}

fn with(record: &Record, change: impl FnOnce(&mut Rotation)) -> Record {
    let mut next = record.clone();
    if let Some(rotation) = &mut next.rotation {
        change(rotation);
    }
    next
}

/// What the eighth interlock does: back if there is a way, else stop.
fn guard(record: &Record, rotation: &Rotation, why: &str, now: Moment) -> Record {
    let note = format!("handshakes fail: {why}");
    if rotation.state < State::Retiring
        && let Ok(next) = roll_back(record, "guard", &note, now)
    {
        return next;
    }
    with(record, |rotation| {
        rotation.paused_in = Some(rotation.state);
        rotation.state = State::Paused;
        rotation.note(now, "guard", note);
    })
}

/// Until when old certificates may be in use that nobody has told of: None if there can be none.
///
/// Everybody who was given a certificate is in the list. When the list was not complete at some time (it was full), the
/// clock decides instead.
fn hold(rotation: &Rotation, view: &View, now: Moment) -> Option<Moment> {
    let until = rotation.old_leaves_end?;
    (rotation.kind == Kind::Root && view.dropped > 0 && until > now).then_some(until)
}

/// Makes the step out of the present state. What it needs is there.
fn advance(record: &Record, view: &View, now: Moment) -> Record {
    let mut next = record.clone();
    let Some(mut rotation) = next.rotation.take() else { return next };
    let by = "authority";
    let forced = rotation
        .force
        .as_ref()
        .map_or_else(String::new, |force| format!(" (forced by {}: {})", force.by, force.reason));
    rotation.guard_since = now;
    match (rotation.state, rotation.kind) {
        (State::Prepared, Kind::Root) => {
            if let Some(root) = next.root_mut(&rotation.to.root) {
                root.become_(RootState::Active, now, "new");
            }
            rotation.generation = next.bump(now);
            rotation.trusted_from = rotation.generation;
            let note = format!("both roots are trusted from generation {} on{forced}", rotation.generation);
            rotation.enter(State::Trusting, now, by, note);
        }
        (State::Prepared | State::Trusting, _) => {
            sign_with(&mut next, &rotation.from.issuer.clone(), &rotation.to.issuer.clone(), now);
            if rotation.kind == Kind::Root
                && let Some(root) = next.root_mut(&rotation.from.root)
            {
                root.become_(RootState::Retiring, now, "until nothing depends on it");
            }
            rotation.cutover_at = Some(now);
            rotation.old_leaves_end = Some(now + next.lifetimes.leaf() + SKEW);
            rotation.canaries = canaries(&rotation, view, now);
            rotation.renewals += 1;
            let first = rotation.canaries.len();
            let note = format!("issuer {} signs; {first} renew first{forced}", rotation.to.issuer.short());
            rotation.enter(State::Cutover, now, by, note);
        }
        (State::Cutover, _) => {
            rotation.renewals += 1;
            let over = interlocks::ago(rotation.policy.spread());
            rotation.enter(State::Migrating, now, by, format!("everybody renews within {over}{forced}"));
        }
        (State::Migrating, Kind::Leaf) => {
            return finish(next, rotation, "done", now, &format!("everybody has renewed{forced}"));
        }
        (State::Migrating, _) => {
            rotation.generation = next.bump(now);
            next.bundle.reconnect_below = rotation.generation;
            rotation.enter(State::Verifying, now, by, format!("nobody uses the old issuer{forced}"));
        }
        (State::Verifying, Kind::Root) => {
            if let Some(root) = next.root_mut(&rotation.from.root) {
                root.become_(RootState::Retired, now, format!("by rotation {}", rotation.id));
            }
            rotation.generation = next.bump(now);
            let note = format!("the old root is out of generation {}{forced}", rotation.generation);
            rotation.enter(State::Retiring, now, by, note);
        }
        (State::Verifying | State::Retiring, _) => {
            let note = format!("the old keys are destroyed{forced}");
            return finish(next, rotation, "done", now, &note);
        }
        (State::RollingBack, _) if rotation.back == Some(Back::Trusting) => {
            sign_with(&mut next, &rotation.to.issuer.clone(), &rotation.from.issuer.clone(), now);
            retire_root(&mut next, &rotation, now);
            rotation.renewals += 1;
            rotation.back = Some(Back::Migrating);
            let note = format!("issuer {} signs again{forced}", rotation.from.issuer.short());
            rotation.enter(State::RollingBack, now, by, note);
        }
        (State::RollingBack, _) => {
            return finish(next, rotation, "rolled back", now, &format!("everybody is back{forced}"));
        }
        (State::Emergency, _) => {
            return finish(next, rotation, "done", now, &format!("everybody has the new root{forced}"));
        }
        (State::Paused, _) => {}
    }
    next.rotation = Some(rotation);
    next
}

/// The new root of a rotation that goes back is on its way out.
fn retire_root(record: &mut Record, rotation: &Rotation, now: Moment) {
    if rotation.kind != Kind::Root {
        return;
    }
    if let Some(root) = record.root_mut(&rotation.to.root) {
        root.become_(RootState::Retiring, now, "the rotation goes back");
    }
    if let Some(root) = record.root_mut(&rotation.from.root) {
        root.become_(RootState::Active, now, "the rotation goes back");
    }
}

fn sign_with(
    record: &mut Record,
    old: &super::super::record::IssuerId,
    new: &super::super::record::IssuerId,
    now: Moment,
) {
    for (id, state) in [(old, IssuerState::Standby), (new, IssuerState::Signing)] {
        if let Some(issuer) = record.issuer_mut(id) {
            issuer.state = state;
            issuer.changed_at = now;
        }
    }
}

/// One of each namespace, and no more than a twentieth of all.
fn canaries(rotation: &Rotation, view: &View, now: Moment) -> Vec<String> {
    let mut live: Vec<_> = view.live(now, rotation.policy.absent_after()).collect();
    let most = (live.len() / CANARY_SHARE).max(1);
    live.sort_by_key(|member| hash(format!("{}/{}/{}", rotation.id, member.identity, member.id).as_bytes()));
    let mut namespaces = BTreeSet::new();
    live.into_iter()
        .filter(|member| {
            !rotation.policy.waives(&member.id) && namespaces.insert(namespace(&member.identity))
        })
        .take(most)
        .map(|member| member.id.clone())
        .collect()
}

/// What follows `/ns/` in an identity.
fn namespace(identity: &str) -> String {
    identity.split_once("/ns/").and_then(|(_, rest)| rest.split('/').next()).unwrap_or_default().to_owned()
}

/// How handshakes were lately.
pub(crate) fn baseline(view: &View, now: Moment) -> Baseline {
    let (handshakes, failures) = view.handshakes_since(now - BASELINE);
    Baseline { handshakes, failures }
}

/// Ends a rotation: what is not used any more loses its key.
pub(crate) fn finish(
    mut record: Record,
    mut rotation: Rotation,
    how: &str,
    now: Moment,
    note: &str,
) -> Record {
    let back = how != "done";
    let (keep, drop) = if back { (&rotation.from, &rotation.to) } else { (&rotation.to, &rotation.from) };
    if rotation.kind != Kind::Leaf {
        if let Some(issuer) = record.issuer_mut(&drop.issuer) {
            issuer.state = IssuerState::Retired;
            issuer.key = None;
            issuer.changed_at = now;
        }
        if let Some(issuer) = record.issuer_mut(&keep.issuer) {
            issuer.state = IssuerState::Signing;
            issuer.cross = None;
            issuer.changed_at = now;
        }
    }
    if rotation.kind == Kind::Root {
        let mut seen = false;
        if let Some(root) = record.root_mut(&drop.root) {
            seen = root.in_bundle();
            if root.state != RootState::Distrusted {
                root.become_(RootState::Retired, now, format!("by rotation {}, {how}", rotation.id));
            }
            root.key = None;
        }
        if let Some(root) = record.root_mut(&keep.root)
            && root.state != RootState::Active
        {
            root.become_(RootState::Active, now, "");
        }
        if seen {
            record.bump(now);
        }
        // Nobody can take part who does not know the one root that is left.
        if !back {
            record.bundle.min_supported_generation = record
                .bundle
                .min_supported_generation
                .max(rotation.trusted_from)
                .min(record.bundle.generation);
        }
    }
    rotation.ended = Some(how.to_owned());
    rotation.paused_in = None;
    rotation.force = None;
    rotation.note(now, "authority", note);
    record.past.push(rotation);
    record.rotation = None;
    record.tidy(now);
    record
}

/// Turns a rotation round.
///
/// # Errors
/// There is nothing to turn round, or no way back; the text or the blockers say why.
pub fn roll_back(
    record: &Record,
    by: &str,
    why: &str,
    now: Moment,
) -> Result<Record, super::command::Refusal> {
    use super::command::Refusal;
    let mut next = record.clone();
    let Some(mut rotation) = next.rotation.take() else {
        return Err(Refusal::Invalid("nothing is under way that could go back: what is over is exchanged anew, `postern certs rotate root`".to_owned()));
    };
    let doing = rotation.doing();
    match (doing, rotation.kind) {
        (State::RollingBack, _) if rotation.state != State::Paused => {
            return Err(Refusal::Invalid("it is going back already".to_owned()));
        }
        (State::Emergency, _) => {
            return Err(Refusal::Invalid(
                "a root was taken out in an emergency; there is no way back to it".to_owned(),
            ));
        }
        (State::Migrating, Kind::Leaf) => {
            return Ok(finish(next, rotation, "rolled back", now, &format!("{by}: {why}")));
        }
        // Nobody has anything of the new yet: it goes away.
        (State::Prepared | State::Trusting, _) => {
            rotation.note(now, by, why);
            return Ok(finish(next, rotation, "rolled back", now, "nobody used what was new"));
        }
        _ => {}
    }
    interlocks::can_go_back(record, &rotation, now).map_err(Refusal::Blocked)?;
    rotation.guard_since = now;
    rotation.baseline = Baseline::default();
    if doing == State::Retiring || (doing == State::RollingBack && rotation.back == Some(Back::Trusting)) {
        // Some know only the new root by now: the old one has to be with everybody before it signs.
        if let Some(root) = next.root_mut(&rotation.from.root) {
            root.become_(RootState::Retiring, now, "the rotation goes back");
        }
        rotation.generation = next.bump(now);
        rotation.trusted_from = rotation.generation;
        rotation.back = Some(Back::Trusting);
    } else {
        // Everybody has the old root.
        if rotation.back.is_none() {
            rotation.trusted_from = 0;
        }
        sign_with(&mut next, &rotation.to.issuer.clone(), &rotation.from.issuer.clone(), now);
        retire_root(&mut next, &rotation, now);
        rotation.old_leaves_end = Some(now + next.lifetimes.leaf() + SKEW);
        rotation.renewals += 1;
        rotation.back = Some(Back::Migrating);
    }
    rotation.enter(State::RollingBack, now, by, why);
    next.rotation = Some(rotation);
    Ok(next)
}
