//! Rotation: how roots, issuers and leaves are exchanged under traffic.
//!
//! [`machine`] is a function of the record, of what workloads have confirmed and of the time; it says what comes next or
//! who stands in the way ([`interlocks`]). [`command`] is what people ask for, also as functions of the record. The
//! [`driver`] owns time and the store: it makes every change one compare-and-swap, so that it can be killed anywhere.
//! Whatever has to be done besides follows from the record and may be done twice.

pub mod command;
pub mod driver;
pub mod forge;
pub mod interlocks;
pub mod machine;
pub mod metrics;
#[cfg(test)]
pub(crate) mod model;
pub mod plan;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::record::{IssuerId, Moment, Record, RootId};

/// What is exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Certificates of workloads.
    Leaf,
    /// The authority that signs leaves, below the same root.
    Issuer,
    /// The root, with a new issuer below it.
    Root,
}

impl Kind {
    /// The word in JSON and on screens.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Leaf => "leaf",
            Self::Issuer => "issuer",
            Self::Root => "root",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How far a rotation is. Where there is none, the authority is steady.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum State {
    /// What is new is made, proven, and shown to nobody.
    Prepared,
    /// Both roots are trusted, the old one signs.
    Trusting,
    /// The new issuer signs; a few renew first.
    Cutover,
    /// Everybody renews, spread over time.
    Migrating,
    /// Nobody uses the old any more; connections are made anew, and who may come back is waited for.
    Verifying,
    /// The old root is taken out of the bundle.
    Retiring,
    /// Stopped by somebody, or by the guard.
    Paused,
    /// On the way back.
    RollingBack,
    /// A root was taken out at once; everybody renews.
    Emergency,
}

impl State {
    /// The word in JSON and on screens.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prepared => "PREPARED",
            Self::Trusting => "TRUSTING",
            Self::Cutover => "CUTOVER",
            Self::Migrating => "MIGRATING",
            Self::Verifying => "VERIFYING",
            Self::Retiring => "RETIRING",
            Self::Paused => "PAUSED",
            Self::RollingBack => "ROLLING_BACK",
            Self::Emergency => "EMERGENCY",
        }
    }

    /// The number of a state in metrics; 0 is steady.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Prepared => 1,
            Self::Trusting => 2,
            Self::Cutover => 3,
            Self::Migrating => 4,
            Self::Verifying => 5,
            Self::Retiring => 6,
            Self::Paused => 7,
            Self::RollingBack => 8,
            Self::Emergency => 9,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One end of a rotation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    pub root: RootId,
    pub issuer: IssuerId,
}

/// How a rotation waits and what it forgives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Stop after each state until somebody says `advance`.
    pub step: bool,
    /// How long things have to be quiet before the next state, in milliseconds.
    pub soak_ms: u64,
    /// Over how long workloads spread their renewals, in milliseconds.
    pub spread_ms: u64,
    /// Who was not seen for so long does not count as live, in milliseconds.
    pub absent_after_ms: u64,
    /// For which workloads; none means all. Patterns of identities, only for leaf rotations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub select: Vec<String>,
    /// Names of who need not be waited for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waived: Vec<Waiver>,
    /// The new key may be the old one (`--rekey=false`).
    #[serde(default)]
    pub same_key: bool,
    /// Shortened because the old root ends soon.
    #[serde(default)]
    pub compressed: bool,
}

impl Policy {
    /// How long quiet is.
    #[must_use]
    pub const fn soak(&self) -> Duration {
        Duration::from_millis(self.soak_ms)
    }

    /// Over how long renewals spread.
    #[must_use]
    pub const fn spread(&self) -> Duration {
        Duration::from_millis(self.spread_ms)
    }

    /// When somebody does not count as live.
    #[must_use]
    pub const fn absent_after(&self) -> Duration {
        Duration::from_millis(self.absent_after_ms)
    }

    /// Whether somebody need not be waited for.
    #[must_use]
    pub fn waives(&self, name: &str) -> bool {
        self.waived.iter().any(|waiver| waiver.who == name)
    }
}

/// 10 minutes without a sign of life.
pub const ABSENT_AFTER: Duration = Duration::from_secs(600);
/// 2 minutes of quiet.
pub const SOAK: Duration = Duration::from_secs(120);
/// The longest default for [`Policy::spread`].
pub const SPREAD: Duration = Duration::from_secs(1800);

/// Somebody who need not be waited for, because a person said so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Waiver {
    pub who: String,
    pub by: String,
    pub reason: String,
    pub at: Moment,
}

/// One thing that happened to a rotation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    pub at: Moment,
    /// The state from then on; `STEADY` at the end.
    pub state: String,
    pub by: String,
    pub note: String,
}

/// What a rotation that goes back is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Back {
    /// The old root is in the bundle again; everybody has to have it before it signs.
    Trusting,
    /// The old issuer signs again; everybody renews.
    Migrating,
}

/// Leave to pass interlocks of one state, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Force {
    pub state: State,
    pub by: String,
    pub reason: String,
}

/// Handshakes and failures before a rotation, for comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    pub handshakes: u64,
    pub failures: u64,
}

/// An exchange that is under way, or was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotation {
    pub id: String,
    /// The number in `id`.
    pub number: u64,
    pub kind: Kind,
    pub state: State,
    /// What it was doing when it was paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_in: Option<State>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back: Option<Back>,
    pub started_by: String,
    pub reason: String,
    pub started_at: Moment,
    /// When the present state began.
    pub entered_at: Moment,
    pub from: End,
    pub to: End,
    pub policy: Policy,
    /// The generation that has to be confirmed to leave the present state.
    pub generation: u64,
    /// The generation that first had the root that is gone to: whoever has less must not be left behind.
    #[serde(default)]
    pub trusted_from: u64,
    /// When the new issuer began to sign.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cutover_at: Option<Moment>,
    /// When the last leaf of the old issuer was signed at the latest, and so when all of them are over at the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_leaves_end: Option<Moment>,
    /// Who renews first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub canaries: Vec<String>,
    /// Since when everything that the state waits for is there. What has to be quiet is quiet since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiet_since: Option<Moment>,
    pub baseline: Baseline,
    /// The guard looks at what happened since.
    pub guard_since: Moment,
    /// Counts requests to renew, so that workloads know a new one.
    #[serde(default)]
    pub renewals: u64,
    /// Leave for one more state, where each has to be allowed.
    #[serde(default)]
    pub allowed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<Force>,
    pub history: Vec<Event>,
    /// How it ended: `done`, `rolled back`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
}

/// Events that one rotation keeps.
const MAX_EVENTS: usize = 200;

impl Rotation {
    /// What it is doing, or was when it was paused.
    #[must_use]
    pub fn doing(&self) -> State {
        self.paused_in.unwrap_or(self.state)
    }

    /// Notes what happened.
    pub(crate) fn note(&mut self, at: Moment, by: &str, note: impl Into<String>) {
        if self.history.len() >= MAX_EVENTS {
            self.history.remove(0);
        }
        let state = if self.ended.is_some() { "STEADY" } else { self.state.as_str() };
        self.history.push(Event { at, state: state.to_owned(), by: by.to_owned(), note: note.into() });
    }

    /// Begins a state.
    pub(crate) fn enter(&mut self, state: State, at: Moment, by: &str, note: impl Into<String>) {
        self.state = state;
        self.paused_in = None;
        self.entered_at = at;
        self.quiet_since = None;
        self.force = None;
        self.allowed = !self.policy.step;
        self.note(at, by, note);
    }
}

/// A request to workloads to renew, as it follows from the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenewRequest {
    /// Grows with every request.
    pub generation: u64,
    /// Patterns of identities; none means all.
    pub who: Vec<String>,
    /// These alone; none means all.
    pub proxies: Vec<String>,
    /// A leaf of this issuer is new enough.
    pub unless_issued_by: Option<IssuerId>,
    /// Among leaves, those signed before are old.
    pub signed_before: Option<Moment>,
    /// When it began.
    pub since: Moment,
    pub spread: Duration,
    pub reason: String,
}

/// Who shall renew now.
#[must_use]
pub fn renewal(record: &Record) -> Option<RenewRequest> {
    let rotation = record.rotation.as_ref()?;
    let policy = &rotation.policy;
    let request = |proxies: &[String], issuer: Option<&IssuerId>, spread, what: &str| RenewRequest {
        generation: rotation.number * 16 + rotation.renewals,
        who: policy.select.clone(),
        proxies: proxies.to_vec(),
        unless_issued_by: issuer.cloned(),
        signed_before: None,
        since: rotation.entered_at,
        spread,
        reason: format!("{} rotation {}{what}", rotation.kind, rotation.id),
    };
    // A rotation that is paused asks nobody for more, but those who come anew are not refused.
    if rotation.state == State::Paused {
        return None;
    }
    match (rotation.kind, rotation.state) {
        (Kind::Leaf, State::Migrating) => Some(RenewRequest {
            signed_before: Some(rotation.started_at),
            ..request(&[], None, policy.spread(), "")
        }),
        (_, State::Cutover) => {
            Some(request(&rotation.canaries, Some(&rotation.to.issuer), Duration::ZERO, ", first"))
        }
        (_, State::Migrating | State::Verifying | State::Retiring) => {
            Some(request(&[], Some(&rotation.to.issuer), policy.spread(), ""))
        }
        (_, State::RollingBack) if rotation.back == Some(Back::Migrating) => {
            Some(request(&[], Some(&rotation.from.issuer), policy.spread(), ", back"))
        }
        (_, State::Emergency) => {
            Some(request(&[], Some(&rotation.to.issuer), policy.spread(), ", emergency"))
        }
        _ => None,
    }
}
