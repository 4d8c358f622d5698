//! Endpoints as the Control API and `postern explain` show them.

use std::net::SocketAddr;
use std::sync::Arc;

use discovery::Health;
use serde::Serialize;

use super::state::State;
use crate::upstream::breaker::Phase;
use crate::upstream::health::Counts;
use crate::upstream::picker::Peer;

/// One endpoint.
#[derive(Clone, Debug, Serialize)]
pub struct EndpointView {
    /// Where it is.
    pub address: SocketAddr,
    /// The host it was configured as.
    pub host: Arc<str>,
    /// The weight of its node.
    pub weight: u32,
    /// The priority of its node.
    pub priority: i32,
    /// `healthy`, `mostly_healthy`, `mostly_unhealthy` or `unhealthy`.
    pub status: &'static str,
    /// It takes no new request.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Why, if anything happened to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
    /// `closed`, `half_open` or `open`, where the upstream has breakers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<&'static str>,
    /// How often the breaker has opened.
    #[serde(skip_serializing_if = "is_zero")]
    pub breaker_opened: u64,
    /// Requests under way.
    pub active: u32,
    /// Attempts since it appeared.
    pub requests: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Health counters.
    #[serde(skip)]
    pub counts: Counts,
    /// Whether it gets requests.
    #[serde(skip)]
    pub verdict: Verdict,
    /// Why, in words, unless it simply is in use.
    #[serde(skip)]
    pub why: Option<String>,
    /// Where it is, as far as that is known.
    #[serde(skip)]
    pub place: Place,
}

/// Region, zone and machine of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Place {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Arc<str>>,
}

/// Whether an endpoint gets requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It does.
    Used,
    /// When those that are preferred are out of use, or have been tried.
    Standby,
    /// Something was found against it.
    Unhealthy,
    /// Its breaker is open.
    BreakerOpen,
    /// Its weight is 0.
    Unused,
    /// No new ones.
    Draining,
    /// It is not there any more, and requests are under way.
    Gone,
}

impl Verdict {
    pub const ALL: [Self; 7] = [
        Self::Used,
        Self::Standby,
        Self::Unhealthy,
        Self::BreakerOpen,
        Self::Unused,
        Self::Draining,
        Self::Gone,
    ];

    /// As it is written in answers and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Used => "used",
            Self::Standby => "standby",
            Self::Unhealthy => "unhealthy",
            Self::BreakerOpen => "breaker_open",
            Self::Unused => "unused",
            Self::Draining => "draining",
            Self::Gone => "gone",
        }
    }
}

/// Why endpoints of a registry that says so are unhealthy.
const REGISTRY: &str = "its registry says so";

/// All endpoints of `state`.
pub(super) fn of(state: &State) -> Vec<EndpointView> {
    let turns = state.turns();
    let used = state.peers.iter().map(|peer| {
        let (verdict, why) = judge(state, peer, turns.get(&peer.state.id()).copied());
        view(peer, verdict, why)
    });
    let draining = state.draining.iter().map(|peer| {
        let by = if peer.health == Health::Draining { "its registry" } else { "an operator" };
        view(peer, Verdict::Draining, Some(format!("taken out of use by {by}")))
    });
    let gone = state.leaving.iter().map(|peer| {
        let why = format!("not listed any more, {} requests under way", peer.state.active());
        view(peer, Verdict::Gone, Some(why))
    });
    used.chain(draining).chain(gone).collect()
}

/// What becomes of an endpoint that is not draining, and why.
fn judge(state: &State, peer: &Peer, turn: Option<usize>) -> (Verdict, Option<String>) {
    let against = if peer.health == Health::Unhealthy {
        Some(REGISTRY.to_owned())
    } else if !peer.state.health.state().usable() {
        Some(peer.state.health.reason().map(|reason| reason.to_string()).unwrap_or_default())
    } else {
        None
    };
    if peer.state.breaker().is_some_and(|breaker| breaker.phase() == Phase::Open) {
        return (Verdict::BreakerOpen, Some("its breaker is open".to_owned()));
    }
    match (turn, against) {
        (Some(_), Some(against)) => {
            (Verdict::Used, Some(format!("too few are healthy, so all are used; this one: {against}")))
        }
        (None, Some(against)) => (Verdict::Unhealthy, Some(against)),
        (None, None) => (Verdict::Unused, Some("its weight is 0".to_owned())),
        (Some(0), None) => {
            let warned = peer.health == Health::Warning;
            (Verdict::Used, warned.then(|| "its registry warns of it".to_owned()))
        }
        (Some(_), None) if state.is_held(peer.priority) => {
            (Verdict::Standby, Some(format!("priority {} is held back after it had failed", peer.priority)))
        }
        (Some(_), None) => {
            (Verdict::Standby, Some("others are preferred: nearer, or of a better priority".to_owned()))
        }
    }
}

fn view(peer: &Peer, verdict: Verdict, why: Option<String>) -> EndpointView {
    let breaker = peer.state.breaker();
    let details = peer.details.as_deref();
    let refused = peer.health == Health::Unhealthy;
    EndpointView {
        address: peer.state.addr(),
        host: peer.state.host().clone(),
        weight: peer.weight,
        priority: peer.priority,
        status: if refused { "unhealthy" } else { peer.state.health.state().as_str() },
        draining: matches!(verdict, Verdict::Draining | Verdict::Gone),
        because: if refused {
            Some(REGISTRY.to_owned())
        } else {
            peer.state.health.reason().map(|reason| reason.to_string())
        },
        breaker: breaker.as_ref().map(|breaker| breaker.phase().as_str()),
        breaker_opened: breaker.map_or(0, |breaker| breaker.opened()),
        active: peer.state.active(),
        requests: peer.state.requests(),
        failures: peer.state.failures(),
        counts: peer.state.health.counts(),
        verdict,
        why,
        place: Place {
            region: details.and_then(|details| details.region.clone()),
            zone: details.and_then(|details| details.zone.clone()),
            machine: details.and_then(|details| details.machine.clone()),
        },
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}
