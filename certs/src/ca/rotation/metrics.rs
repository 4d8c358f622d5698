//! The numbers of an authority and its rotation, for whoever serves metrics.

use std::collections::BTreeMap;

use super::super::fleet::View;
use super::super::record::{IssuerState, Moment, Record};
use super::machine::Waiting;

/// One number.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: &'static str,
    pub help: &'static str,
    pub labels: Vec<(&'static str, String)>,
    pub value: f64,
}

/// Workloads whose generations are told one by one; of more only the numbers.
const MAX_PROXIES: usize = 500;

#[expect(clippy::cast_precision_loss, reason = "times and counts are far below 2^52")]
const fn float(number: u64) -> f64 {
    number as f64
}

/// All numbers.
#[must_use]
pub fn samples(record: &Record, view: &View, waiting: &Waiting, now: Moment) -> Vec<Sample> {
    let mut found = Vec::new();
    let mut add = |name, help, labels, value| found.push(Sample { name, help, labels, value });
    for root in &record.roots {
        add(
            "mesh_root_expiry_timestamp_seconds",
            "When a root ends.",
            vec![("fp", root.id.short().to_owned()), ("state", root.state.as_str().to_owned())],
            float(root.not_after.secs()),
        );
    }
    for issuer in record.issuers.iter().filter(|issuer| issuer.state != IssuerState::Retired) {
        add(
            "mesh_issuer_expiry_timestamp_seconds",
            "When an issuer ends.",
            vec![("id", issuer.id.short().to_owned()), ("state", issuer.state.as_str().to_owned())],
            float(issuer.not_after.secs()),
        );
    }
    add(
        "mesh_bundle_generation_target",
        "The generation of the bundle that everybody should have.",
        Vec::new(),
        float(record.bundle.generation),
    );
    let mut by_generation: BTreeMap<u64, u64> = BTreeMap::new();
    let mut by_issuer: BTreeMap<&str, u64> = BTreeMap::new();
    for member in &view.members {
        *by_generation.entry(member.generation).or_default() += 1;
        *by_issuer.entry(member.issuer.short()).or_default() += 1;
        if view.members.len() <= MAX_PROXIES {
            add(
                "mesh_bundle_generation",
                "The generation of the bundle that a workload has.",
                vec![("proxy", member.id.clone())],
                float(member.generation),
            );
        }
    }
    for (generation, count) in by_generation {
        let labels = vec![("generation", generation.to_string())];
        add(
            "mesh_proxies_by_generation",
            "Workloads by the generation that they have.",
            labels,
            float(count),
        );
    }
    for (issuer, count) in by_issuer {
        let labels = vec![("issuer", issuer.to_owned())];
        add("mesh_leaves_by_issuer", "Workloads by the issuer of their certificate.", labels, float(count));
    }
    let worst = view.members.iter().map(|member| member.clock_offset_ms.unsigned_abs()).max().unwrap_or(0);
    add(
        "mesh_clock_offset_seconds",
        "The largest difference between the clock of a workload and this one.",
        Vec::new(),
        float(worst) / 1000.0,
    );
    let (id, state) =
        record.rotation.as_ref().map_or((String::new(), 0), |one| (one.id.clone(), one.state.number()));
    add(
        "mesh_rotation_state",
        "0 steady, 1 prepared, 2 trusting, 3 cutover, 4 migrating, 5 verifying, 6 retiring, 7 paused, 8 rolling back, 9 emergency.",
        vec![("id", id)],
        f64::from(state),
    );
    let mut by_kind: BTreeMap<&str, usize> = BTreeMap::new();
    for blocker in &waiting.blockers {
        *by_kind.entry(blocker.kind).or_default() += blocker.culprits.len().max(1);
    }
    for (kind, count) in by_kind {
        let labels = vec![("kind", kind.to_owned())];
        let count = float(u64::try_from(count).unwrap_or(u64::MAX));
        add("mesh_rotation_blockers", "Who or what a rotation waits for.", labels, count);
    }
    let since = record.rotation.as_ref().map_or(now, |rotation| rotation.guard_since);
    let (all, bad) = view.handshakes_since(since);
    add(
        "mesh_rotation_handshakes",
        "Handshakes since the present state of the rotation began.",
        vec![("result", "all".to_owned())],
        float(all),
    );
    add(
        "mesh_rotation_handshakes",
        "Handshakes since the present state of the rotation began.",
        vec![("result", "failed".to_owned())],
        float(bad),
    );
    found
}
