//! How long a rotation takes, as far as can be said before.

use std::time::Duration;

use super::super::fleet::View;
use super::super::record::{Moment, Record};
use super::{Kind, Policy, SOAK, SPREAD, State};

/// How long workloads take to confirm.
const CONFIRM: Duration = Duration::from_secs(30);
/// What is left of waits when time is short.
const SHORT_SOAK: Duration = Duration::from_secs(10);
const SHORT_SPREAD: Duration = Duration::from_secs(60);

/// One state of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    pub state: State,
    pub begins: Moment,
    pub ends: Moment,
    /// What it waits for.
    pub what: String,
}

/// How it waits when nobody says otherwise.
#[must_use]
pub fn policy(record: &Record) -> Policy {
    let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    Policy {
        step: false,
        soak_ms: millis(SOAK),
        spread_ms: millis(SPREAD.min(record.lifetimes.leaf() / 4)),
        absent_after_ms: millis(super::ABSENT_AFTER),
        select: Vec::new(),
        waived: Vec::new(),
        same_key: false,
        compressed: false,
    }
}

/// The same with the shortest waits.
#[must_use]
pub fn compressed(policy: &Policy) -> Policy {
    let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    Policy {
        soak_ms: policy.soak_ms.min(millis(SHORT_SOAK)),
        spread_ms: policy.spread_ms.min(millis(SHORT_SPREAD)),
        compressed: true,
        ..policy.clone()
    }
}

/// The states of a rotation that begins now, when nobody is late.
#[must_use]
pub fn stages(kind: Kind, policy: &Policy, view: &View, now: Moment) -> Vec<Stage> {
    let live = view.live(now, policy.absent_after()).count();
    let absent = view.absent(now, policy.absent_after()).filter(|one| !policy.waives(&one.id));
    let last = absent.map(super::super::fleet::Member::last_not_after).max();
    let mut at = now;
    let mut stages = Vec::new();
    let mut stage = |state, length: Duration, what: String| {
        let begins = at;
        at = at + length;
        stages.push(Stage { state, begins, ends: at, what });
    };
    if kind != Kind::Leaf {
        stage(State::Prepared, Duration::ZERO, "make and prove what is new; nobody sees it".to_owned());
    }
    if kind == Kind::Root {
        stage(State::Trusting, CONFIRM, format!("{live} workloads confirm both roots"));
    }
    if kind != Kind::Leaf {
        stage(State::Cutover, CONFIRM + policy.soak(), "a few renew first, then quiet".to_owned());
    }
    stage(State::Migrating, policy.spread() + CONFIRM, format!("{live} workloads renew"));
    if kind == Kind::Root {
        let (wait, what) = match last {
            Some(last) => (
                last.since(now).saturating_sub(at_length(&stages)),
                format!("certificates of absent workloads end by {last}"),
            ),
            None => (Duration::ZERO, "nobody is absent".to_owned()),
        };
        let begins = stages.last().map_or(now, |stage| stage.ends);
        let ends = begins + CONFIRM + wait;
        stages.push(Stage {
            state: State::Verifying,
            begins,
            ends,
            what: format!("connections are made anew; {what}"),
        });
        stages.push(Stage {
            state: State::Retiring,
            begins: ends,
            ends: ends + CONFIRM + policy.soak(),
            what: format!("{live} workloads confirm the bundle without the old root, then quiet"),
        });
    }
    stages
}

fn at_length(stages: &[Stage]) -> Duration {
    match (stages.first(), stages.last()) {
        (Some(first), Some(last)) => last.ends.since(first.begins),
        _ => Duration::ZERO,
    }
}

/// When it would be over.
#[must_use]
pub fn end(kind: Kind, policy: &Policy, view: &View, now: Moment) -> Moment {
    stages(kind, policy, view, now).last().map_or(now, |stage| stage.ends)
}
