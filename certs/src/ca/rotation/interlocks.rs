//! The ten interlocks: what has to be so before a rotation may go on, who stands in the way, and what a person may say to
//! that.
//!
//! Each is a function of a [`Situation`]; [`GATES`] says which are asked where. Nothing here changes anything. The third
//! and the sixth cannot be overridden by anybody: what they prevent could not be undone.

use std::time::Duration;

use super::super::fleet::{Member, View};
use super::super::record::{IssuerId, IssuerState, Moment, Record, RootId, RootState};
use super::{Back, Force, Kind, Rotation, State, plan};

/// What clocks may differ by.
pub const SKEW: Duration = Duration::from_secs(30);
/// With a clock that is wrong by more, nothing goes on.
pub const SKEW_HARD: Duration = Duration::from_secs(300);
/// How many failed handshakes are needed to believe a rate.
const FEW: u64 = 3;

/// Somebody or something in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    pub who: String,
    pub why: String,
}

/// An interlock that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// 1 to 10.
    pub interlock: u8,
    /// Its name, also in metrics.
    pub kind: &'static str,
    pub what: String,
    pub culprits: Vec<Culprit>,
    /// What a person can do about it.
    pub way: String,
}

/// What interlocks look at.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    pub record: &'a Record,
    pub rotation: &'a Rotation,
    pub view: &'a View,
    pub now: Moment,
}

type Check = fn(&Situation<'_>) -> Vec<Blocker>;

/// Name and check, by number.
const TABLE: [(&str, Check); 10] = [
    ("unconfirmed", unconfirmed),
    ("absent", absent),
    ("outlives", outlives),
    ("clock", clock),
    ("too_late", too_late),
    ("disagreement", disagreement),
    ("same_key", same_key),
    ("handshakes", handshakes),
    ("observers", observers),
    ("unreasoned", unreasoned),
];

/// Which interlocks are asked before a state is left.
#[must_use]
pub const fn gate(state: State) -> &'static [u8] {
    match state {
        State::Prepared => &[3, 4, 5, 6, 7, 10],
        State::Trusting => &[1, 2, 4, 6, 8, 9, 10],
        State::Cutover => &[1, 6, 8, 10],
        State::Migrating => &[1, 4, 6, 8, 10],
        State::Verifying => &[1, 2, 6, 8, 9, 10],
        State::Retiring => &[1, 6, 8, 9, 10],
        State::RollingBack => &[1, 2, 6, 10],
        State::Emergency => &[1, 6, 10],
        State::Paused => &[],
    }
}

/// The interlocks that no reason passes.
pub const ABSOLUTE: [u8; 2] = [3, 6];

/// What keeps a rotation where it is.
#[must_use]
pub fn blockers(situation: &Situation<'_>) -> Vec<Blocker> {
    let asked = gate(situation.rotation.doing());
    let mut found: Vec<Blocker> = asked.iter().flat_map(|number| check(*number, situation)).collect();
    if let Some(force) = &situation.rotation.force
        && force.state == situation.rotation.doing()
    {
        found.retain(|blocker| !passes(force, blocker));
    }
    found
}

/// Asks one interlock.
#[must_use]
pub fn check(number: u8, situation: &Situation<'_>) -> Vec<Blocker> {
    let Some((kind, check)) = TABLE.get(usize::from(number).wrapping_sub(1)) else { return Vec::new() };
    let named = |blocker| Blocker { interlock: number, kind, ..blocker };
    check(situation).into_iter().map(named).collect()
}

/// Whether a person's word passes a blocker.
fn passes(force: &Force, blocker: &Blocker) -> bool {
    let hard = blocker.interlock == 4 && blocker.way == HARD;
    !force.reason.trim().is_empty()
        && !ABSOLUTE.contains(&blocker.interlock)
        && !hard
        && blocker.interlock != 10
}

const HARD: &str = "set these clocks right; this is never overridden";

fn blocker(what: impl Into<String>, culprits: Vec<Culprit>, way: impl Into<String>) -> Blocker {
    Blocker { interlock: 0, kind: "", what: what.into(), culprits, way: way.into() }
}

fn named(member: &Member) -> String {
    format!("{} ({})", member.id, member.identity)
}

fn waived(situation: &Situation<'_>, member: &Member) -> bool {
    situation.rotation.policy.waives(&member.id) || situation.rotation.policy.waives(&member.identity)
}

/// How long ago, in few letters.
pub(crate) fn ago(span: Duration) -> String {
    match span.as_secs() {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

fn seen(member: &Member, now: Moment) -> String {
    if member.is_silent() {
        let (generation, since) = (member.generation, ago(now.since(member.seen_at)));
        return format!("never confirms (Istio's API), has generation {generation}, renewed {since} ago");
    }
    let version =
        if member.version.is_empty() { String::new() } else { format!(", version {}", member.version) };
    let refused = member.refused.as_ref().map_or_else(String::new, |why| format!(", says: {why}"));
    format!("seen {} ago{version}{refused}", ago(now.since(member.seen_at)))
}

/// 1. Everybody who is live has what the state gives.
fn unconfirmed(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { rotation, view, now, .. } = *situation;
    let mut found = Vec::new();
    if !view.settled {
        found.push(blocker(
            "the authority has just started, and not everybody who was connected before has reported",
            Vec::new(),
            "wait a few seconds",
        ));
    }
    if view.dropped > 0 {
        found.push(blocker(
            format!("{} workloads found no place in the list, so nobody knows what they use", view.dropped),
            Vec::new(),
            "run fewer workloads for each authority, or `postern certs advance --force --reason TEXT`",
        ));
    }
    let live = view.live(now, rotation.policy.absent_after()).filter(|member| !waived(situation, member));
    let wants_generation = |member: &Member| {
        (member.generation < rotation.generation).then(|| {
            format!("has generation {} of {}, {}", member.generation, rotation.generation, seen(member, now))
        })
    };
    let wants_issuer = |member: &Member, issuer: &IssuerId| {
        (member.issuer != *issuer)
            .then(|| format!("has a certificate of issuer {}, {}", member.issuer.short(), seen(member, now)))
    };
    let wants_visit = |member: &Member| {
        let visits = view.visits.as_ref().filter(|_| member.mesh_address.is_some())?;
        match visits.get(&(member.id.clone(), member.serial.clone())) {
            // It was, before it became quiet: whoever leads now was not there.
            None if rotation.quiet_since.is_some() => None,
            None => Some("has not been visited yet".to_owned()),
            Some(Err(problem)) => Some(format!("is not accepted, or does not accept: {problem}")),
            Some(Ok(())) => None,
        }
    };
    // From here on nothing leads to the old root: who lacks the other would refuse everybody.
    let lacks_root = |member: &Member| {
        (member.generation < rotation.trusted_from).then(|| {
            format!(
                "has generation {} of {}, {}",
                member.generation,
                rotation.trusted_from,
                seen(member, now)
            )
        })
    };
    let why = |member: &Member| -> Option<String> {
        match (rotation.doing(), rotation.kind, rotation.back) {
            (State::Migrating, Kind::Leaf, _) => (selected(rotation, member)
                && member.signed_at < rotation.started_at)
                .then(|| format!("has not renewed, {}", seen(member, now))),
            (State::Cutover, ..) => rotation
                .canaries
                .contains(&member.id)
                .then(|| wants_issuer(member, &rotation.to.issuer).or_else(|| wants_visit(member)))
                .flatten()
                .map(|why| format!("renews first and {why}")),
            (State::Migrating, ..) => wants_issuer(member, &rotation.to.issuer),
            (State::Verifying, ..) => {
                lacks_root(member).or_else(|| wants_issuer(member, &rotation.to.issuer)).or_else(|| {
                    let oldest = member.oldest_connection.filter(|oldest| *oldest < rotation.generation)?;
                    Some(format!("has a connection from generation {oldest} of {}", rotation.generation))
                })
            }
            (State::RollingBack, _, Some(Back::Migrating)) => {
                lacks_root(member).or_else(|| wants_issuer(member, &rotation.from.issuer))
            }
            (State::Emergency, ..) => {
                wants_generation(member).or_else(|| wants_issuer(member, &rotation.to.issuer))
            }
            _ => wants_generation(member),
        }
    };
    let culprits: Vec<Culprit> =
        live.filter_map(|member| Some(Culprit { who: named(member), why: why(member)? })).collect();
    if !culprits.is_empty() {
        let what = match rotation.doing() {
            State::Cutover => "who renews first has not",
            State::Migrating => "not everybody has renewed",
            State::Verifying => "the old certificates are still in use",
            State::RollingBack if rotation.back == Some(Back::Migrating) => "not everybody is back",
            _ => "not everybody has confirmed the bundle",
        };
        found.push(blocker(
            what,
            culprits,
            "look at these workloads; `postern certs advance --waive NAME --reason TEXT` goes on without one",
        ));
    }
    found
}

/// Whether a leaf rotation is about somebody.
pub(crate) fn selected(rotation: &Rotation, member: &Member) -> bool {
    let matches = |pattern: &String| match pattern.strip_suffix('*') {
        Some(start) => member.identity.starts_with(start),
        None => member.identity == *pattern || member.id == *pattern,
    };
    rotation.policy.select.is_empty() || rotation.policy.select.iter().any(matches)
}

/// 2. Nobody can come back with a certificate that nobody would accept.
fn absent(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { record, rotation, view, now } = *situation;
    if rotation.kind != Kind::Root {
        return Vec::new();
    }
    let absent_after = rotation.policy.absent_after();
    let below = |root: &RootId, member: &Member| {
        record.issuers.iter().any(|issuer| issuer.root == *root && member.may_hold(&issuer.id, now))
            || (record.issuer(&member.issuer).is_none() && member.not_after > now)
    };
    let (what, culprits): (_, Vec<&Member>) = match rotation.doing() {
        // With a chain to the old root, whoever knows only that goes on undisturbed.
        State::Trusting => {
            if record.issuer(&rotation.to.issuer).is_some_and(|issuer| issuer.cross.is_some()) {
                return Vec::new();
            }
            let lacks = |member: &&Member| member.generation < rotation.generation;
            (
                "the new issuer is not signed over by the old root, and absent workloads do not know the new one",
                view.absent(now, absent_after).filter(lacks).collect(),
            )
        }
        State::Verifying => (
            "absent workloads may come back with certificates of the old root, or without the new one",
            view.absent(now, absent_after)
                .filter(|member| {
                    below(&rotation.from.root, member) || member.generation < rotation.trusted_from
                })
                .collect(),
        ),
        // Others are told the root when they come back; these learn of it when they renew.
        State::RollingBack if rotation.back == Some(Back::Trusting) => (
            "workloads that never confirm do not have the old root again",
            view.absent(now, absent_after)
                .filter(|member| member.is_silent() && member.generation < rotation.generation)
                .collect(),
        ),
        State::RollingBack if rotation.back == Some(Back::Migrating) => (
            "absent workloads may come back with certificates of the root that is taken back",
            view.absent(now, absent_after)
                .filter(|member| {
                    below(&rotation.to.root, member) || member.generation < rotation.trusted_from
                })
                .collect(),
        ),
        _ => return Vec::new(),
    };
    let culprits: Vec<Culprit> = culprits
        .into_iter()
        .filter(|member| !waived(situation, member))
        .map(|member| Culprit {
            who: named(member),
            why: format!("{}, its certificate ends {}", seen(member, now), member.last_not_after()),
        })
        .collect();
    if culprits.is_empty() {
        return Vec::new();
    }
    vec![blocker(
        what,
        culprits,
        "wait until they renew or these certificates end, or `postern certs advance --waive NAME --reason TEXT`",
    )]
}

/// 3. Nothing outlives who signed it, and leaves have time to renew.
fn outlives(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { record, rotation, now, .. } = *situation;
    let least = now + record.lifetimes.leaf() + record.lifetimes.leaf();
    let mut culprits = Vec::new();
    let end = match rotation.doing() {
        State::RollingBack => &rotation.from,
        _ => &rotation.to,
    };
    let (Some(issuer), Some(root)) = (record.issuer(&end.issuer), record.root(&end.root)) else {
        return Vec::new();
    };
    if issuer.not_after > root.not_after {
        let why = format!("ends {}, after its root ({})", issuer.not_after, root.not_after);
        culprits.push(Culprit { who: format!("issuer {}", issuer.id.short()), why });
    }
    for (who, until) in [
        (format!("issuer {}", issuer.id.short()), issuer.not_after),
        (format!("root {}", root.id.short()), root.not_after),
    ] {
        if until < least {
            let life = ago(record.lifetimes.leaf());
            culprits
                .push(Culprit { who, why: format!("ends {until}; leaves live {life} and need twice that") });
        }
    }
    if culprits.is_empty() {
        return Vec::new();
    }
    vec![blocker(
        "certificates would outlive who signed them, or end before they are renewed",
        culprits,
        "give a signer that lives longer, or leaves that live shorter; this is never overridden",
    )]
}

/// 4. Clocks agree.
fn clock(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { rotation, view, now, .. } = *situation;
    let mut found = Vec::new();
    if view.clock_step_ms.unsigned_abs() > 60_000 {
        found.push(blocker(
            format!("the clock of this authority was set by {} s since it started", view.clock_step_ms / 1000),
            Vec::new(),
            "see that it is right and start the authority again, or `postern certs advance --force --reason TEXT`",
        ));
    }
    let off = |least: Duration, most: Duration| -> Vec<Culprit> {
        let range = least.as_millis()..most.as_millis();
        view.live(now, rotation.policy.absent_after())
            .filter(|member| !waived(situation, member))
            .filter(|member| range.contains(&u128::from(member.clock_offset_ms.unsigned_abs())))
            .map(|member| Culprit {
                who: named(member),
                why: format!("its clock is {} s off", member.clock_offset_ms / 1000),
            })
            .collect()
    };
    let soft = off(SKEW, SKEW_HARD);
    if !soft.is_empty() {
        found.push(blocker(
            format!("clocks differ by more than {} s", SKEW.as_secs()),
            soft,
            "set these clocks right, or `postern certs advance --force --reason TEXT`",
        ));
    }
    let hard = off(SKEW_HARD, Duration::MAX);
    if !hard.is_empty() {
        found.push(blocker(format!("clocks differ by more than {} s", SKEW_HARD.as_secs()), hard, HARD));
    }
    found
}

/// 5. The old root lives long enough.
fn too_late(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { record, rotation, view, now } = *situation;
    let Some(old) = record.root(&rotation.from.root).filter(|_| rotation.kind == Kind::Root) else {
        return Vec::new();
    };
    let end = plan::end(rotation.kind, &rotation.policy, view, now);
    if old.not_after >= end {
        return Vec::new();
    }
    let way = if old.not_after <= now {
        "it has ended: `postern certs recover --new-root --reason TEXT`"
    } else if rotation.policy.compressed {
        "waive who is absent, or `postern certs advance --force --reason TEXT`; when it has ended, `postern certs recover`"
    } else {
        "`postern certs advance --compress` (shorter waits), or `--force --reason TEXT`"
    };
    let why = format!("ends {}; the rotation ends about {end}", old.not_after);
    let culprit = Culprit { who: format!("root {}", old.id.short()), why };
    vec![blocker("the old root ends before the rotation does", vec![culprit], way)]
}

/// 6. Nobody else works by something else.
fn disagreement(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { view, now, .. } = *situation;
    let mut culprits: Vec<Culprit> = view
        .replicas
        .iter()
        .filter(|replica| {
            replica.sequence < view.sequence && now.since(replica.seen_at) < replica.signs_unread * 2
        })
        .map(|replica| Culprit {
            who: format!("replica {}", replica.name),
            why: format!(
                "works by change {} of {}, seen {} ago",
                replica.sequence,
                view.sequence,
                ago(now.since(replica.seen_at))
            ),
        })
        .collect();
    culprits.extend(
        view.sources
            .iter()
            .filter(|source| !source.problem.is_empty())
            .map(|source| Culprit { who: source.name.clone(), why: source.problem.clone() }),
    );
    if culprits.is_empty() {
        return Vec::new();
    }
    vec![blocker(
        "not every replica and every copy of the bundle is where this one is",
        culprits,
        "see that they reach the store, or stop them (one that is silent for twice its `signs_unread`, 10 min if nothing is set, does not sign any more); this is never overridden",
    )]
}

/// 7. A new key is new, unless somebody wants the old one.
fn same_key(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { record, rotation, .. } = *situation;
    if rotation.kind != Kind::Root {
        return Vec::new();
    }
    let Some(new) = record.root(&rotation.to.root) else { return Vec::new() };
    let mut found = Vec::new();
    let distrusted =
        record.roots.iter().find(|root| root.state == RootState::Distrusted && root.spki == new.spki);
    if let Some(old) = distrusted {
        let why = format!("has the key of root {}, which is distrusted: {}", old.id.short(), old.note);
        found.push(blocker(
            "the key of the new root was taken out in an emergency",
            vec![Culprit { who: format!("root {}", new.id.short()), why }],
            "make a root with a new key",
        ));
    }
    let same = record.root(&rotation.from.root).is_some_and(|old| old.spki == new.spki);
    if same && !rotation.policy.same_key {
        let why = "has the key of the old one: this is no remedy for a key that others know".to_owned();
        found.push(blocker(
            "the new root has the old key",
            vec![Culprit { who: format!("root {}", new.id.short()), why }],
            "make a root with a new key, or start again with `--rekey=false`",
        ));
    }
    found
}

/// 8. Handshakes do not fail for want of trust.
fn handshakes(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { rotation, view, .. } = *situation;
    let (all, bad) = view.handshakes_since(rotation.guard_since);
    let all = all.max(bad);
    let before = rotation.baseline;
    // bad / all > before + 1/1000, without fractions.
    let allowed = |parts: u64| {
        let base = before.failures.saturating_mul(1_000_000) / before.handshakes.max(before.failures).max(1);
        parts.saturating_mul(base + 1000) / 1_000_000
    };
    if bad < FEW || bad <= allowed(all) {
        return Vec::new();
    }
    let culprits = vec![Culprit {
        who: format!("{bad} of {all} handshakes"),
        why: format!(
            "failed as unknown_issuer, expired or not_yet_valid since {}; before the rotation {} of {}",
            rotation.guard_since, before.failures, before.handshakes
        ),
    }];
    vec![blocker(
        "handshakes fail more often than before",
        culprits,
        "find out why; `postern certs resume --reason TEXT` counts anew, `postern certs rollback` goes back",
    )]
}

/// 9. Those who were named have confirmed, seen lately or not.
fn observers(situation: &Situation<'_>) -> Vec<Blocker> {
    let Situation { record, rotation, view, now } = *situation;
    let culprits: Vec<Culprit> = record
        .observers
        .iter()
        .filter(|observer| !rotation.policy.waives(&observer.name))
        .filter_map(|observer| {
            let known =
                view.members.iter().filter(|one| one.id == observer.name || one.identity == observer.name);
            let why = match known.max_by_key(|one| one.seen_at) {
                Some(one) if one.generation >= rotation.generation => return None,
                Some(one) => {
                    let (has, of) = (one.generation, rotation.generation);
                    format!("has generation {has} of {of}, {}", seen(one, now))
                }
                None => "was never seen".to_owned(),
            };
            Some(Culprit { who: format!("{} {}", observer.kind, observer.name), why })
        })
        .collect();
    if culprits.is_empty() {
        return Vec::new();
    }
    vec![blocker(
        "edges or peers that have to confirm have not",
        culprits,
        "give them the bundle (`postern certs export-bundle`); `postern certs advance --waive NAME --reason TEXT` goes on without one",
    )]
}

/// 10. Whoever forces says why.
fn unreasoned(situation: &Situation<'_>) -> Vec<Blocker> {
    let forced = situation.rotation.force.iter().filter(|force| force.reason.trim().is_empty());
    forced
        .map(|force| {
            let culprit = Culprit { who: force.by.clone(), why: "forces without a reason".to_owned() };
            blocker("forcing needs a reason", vec![culprit], "`--force --reason TEXT`")
        })
        .collect()
}

/// Whether the old issuer may sign again: what the third interlock asks of a way back.
pub(crate) fn can_go_back(record: &Record, rotation: &Rotation, now: Moment) -> Result<(), Vec<Blocker>> {
    let issuer = record.issuer(&rotation.from.issuer);
    let why = match issuer {
        Some(issuer) if issuer.key.is_none() || issuer.state == IssuerState::Retired => {
            "its key is gone".to_owned()
        }
        Some(issuer) if issuer.not_after < now + record.lifetimes.leaf() => {
            format!("ends {}, before the leaves that it would sign", issuer.not_after)
        }
        Some(_) => return Ok(()),
        None => "is not listed any more".to_owned(),
    };
    let culprit = Culprit { who: format!("issuer {}", rotation.from.issuer.short()), why };
    let way = "go forward, or begin a rotation to a new root";
    let blocker =
        Blocker { interlock: 3, kind: "outlives", ..blocker("there is no way back", vec![culprit], way) };
    Err(vec![blocker])
}
