//! What a signer tells of itself.

use std::fmt::Display;

use certs::signer::Service;
use certs::signer::service::REFUSALS;
use layers::telemetry::exposition::Exposition;
use layers::telemetry::names::{Kind, Metric};
use serde_json::{Value, json};

use crate::observed::Observed;

const KEYS: Metric = Metric {
    name: "postern_signer_node_keys",
    kind: Kind::Gauge,
    help: "Keys of the directory: those that sign, and those whose file cannot be used.",
};
const SIGNATURES: Metric =
    Metric { name: "postern_signer_node_signatures_total", kind: Kind::Counter, help: "Signatures by key." };
const SIGNING: Metric = Metric {
    name: "postern_signer_node_signing_seconds_total",
    kind: Kind::Counter,
    help: "Time that signatures took, without the wait for a place.",
};
const REFUSED: Metric = Metric {
    name: "postern_signer_node_refused_total",
    kind: Kind::Counter,
    help: "Signatures that were refused, by reason.",
};
const WAITING: Metric = Metric {
    name: "postern_signer_node_waiting",
    kind: Kind::Gauge,
    help: "Requests that wait for a place.",
};

/// What is told.
#[derive(Clone)]
pub(super) struct Told(pub(super) Service);

impl Observed for Told {
    fn ready(&self) -> Result<(), String> {
        if self.0.is_stopping() {
            return Err("the signer stops".to_owned());
        }
        if self.0.journal().has_failed() {
            return Err("the audit log cannot be written".to_owned());
        }
        match self.0.keys().offered().is_empty() {
            true => Err("no key signs: look at `keys` in /status".to_owned()),
            false => Ok(()),
        }
    }

    fn status(&self) -> Value {
        let numbers = self.0.numbers();
        let keys = self.0.keys().shown().into_iter().map(|key| {
            json!({
                "name": key.name,
                "file": key.path,
                "public_key": key.public_key.map(|key| format!("sha256/{key}")),
                "signed": key.signed,
                "problem": key.problem,
            })
        });
        let refused =
            REFUSALS.iter().zip(numbers.refused).map(|(reason, count)| ((*reason).to_owned(), json!(count)));
        let head = self.0.journal().audit().head();
        json!({
            "ready": self.ready().is_ok(),
            "keys": keys.collect::<Vec<_>>(),
            "signed": numbers.signed,
            "refused": refused.collect::<serde_json::Map<_, _>>(),
            "waiting": numbers.waiting,
            "audit": {"lines": head.lines, "head": head.hash},
        })
    }

    fn metrics(&self) -> String {
        let (numbers, keys) = (self.0.numbers(), self.0.keys().shown());
        let mut out = Exposition::default();
        let broken = keys.iter().filter(|key| key.problem.is_some()).count();
        let signing = keys.iter().filter(|key| key.public_key.is_some()).count();
        family(&mut out, &KEYS, "state", [("signs", signing), ("broken", broken)]);
        family(&mut out, &SIGNATURES, "key", keys.iter().map(|key| (key.name.as_str(), key.signed)));
        out.single("", &SIGNING, numbers.signing.as_secs_f64());
        family(&mut out, &REFUSED, "reason", REFUSALS.into_iter().zip(numbers.refused));
        out.single("", &WAITING, numbers.waiting);
        out.finish()
    }
}

fn family<'a, V: Display>(
    out: &mut Exposition,
    metric: &Metric,
    label: &'static str,
    values: impl IntoIterator<Item = (&'a str, V)>,
) {
    out.family("", metric);
    for (value, count) in values {
        out.sample("", metric.name, [(label, value)], count);
    }
}
