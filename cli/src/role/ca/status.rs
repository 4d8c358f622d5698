//! What the authority tells of itself.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use certs::ca::audit::Audit;
use certs::ca::channel::Pin;
use certs::ca::keeper::Keeper;
use certs::ca::service::{Numbers, Service};
use certs::ca::{Current, RootState};
use certs::trust::{Fingerprint, Root};
use serde_json::{Value, json};

use crate::observed::Observed;

/// What is told.
#[derive(Clone)]
pub(super) struct Told {
    pub(super) service: Service,
    pub(super) keeper: Arc<Keeper>,
    pub(super) audit: Arc<Audit>,
    pub(super) pin: Pin,
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn word(state: RootState) -> &'static str {
    match state {
        RootState::Staged => "staged",
        RootState::Active => "active",
        RootState::Retiring => "retiring",
    }
}

impl Told {
    fn roots(current: &Current) -> Vec<(Fingerprint, &'static str, u64)> {
        let roots = current.bundle().roots.iter();
        roots
            .filter_map(|root| {
                let read = Root::read(root.certificate.clone()).ok()?;
                Some((read.fingerprint, word(root.state), seconds(read.not_after)))
            })
            .collect()
    }
}

impl Observed for Told {
    fn ready(&self) -> Result<(), String> {
        let current = self.service.current();
        match &current.issuer {
            None => Err("there is no issuer that can sign".to_owned()),
            Some(issuer) if issuer.ends() <= SystemTime::now() => Err("the issuer has expired".to_owned()),
            Some(_) => Ok(()),
        }
    }

    fn status(&self) -> Value {
        let current = self.service.current();
        let Numbers { signed, waiting, watchers, clock_offset_ms, .. } = self.service.numbers();
        let roots = Self::roots(&current);
        let roots = roots.iter().map(|(fingerprint, state, not_after)| {
            json!({"fingerprint": fingerprint.to_string(), "state": state, "not_after": not_after})
        });
        let head = self.audit.head();
        json!({
            "ready": self.ready().is_ok(),
            "trust_domain": current.bundle().trust_domain.to_string(),
            "pin": self.pin.to_string(),
            "bundle_generation": current.bundle().generation,
            "roots": roots.collect::<Vec<_>>(),
            "issuer": current.issuer.as_ref().map(|issuer| json!({
                "id": issuer.id().to_string(),
                "not_after": seconds(issuer.ends()),
            })),
            "longest_ttl": current.lifetimes.longest.as_secs(),
            "signed": signed,
            "waiting": waiting,
            "workloads": watchers,
            "clock_offset_ms": clock_offset_ms,
            "audit": {"lines": head.lines, "head": head.hash},
        })
    }

    fn metrics(&self) -> String {
        let numbers = self.service.numbers();
        let mut out = String::new();
        let mut say = |name: &str, kind: &str, help: &str, values: Vec<(String, f64)>| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in values {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        #[expect(clippy::cast_precision_loss, reason = "numbers of Prometheus are floats")]
        let float = |number: u64| number as f64;
        let count = |number: usize| float(u64::try_from(number).unwrap_or(u64::MAX));
        let calls = numbers.calls.iter().map(|((call, attestor, code), number)| {
            (format!("{{rpc=\"{call}\",attestor=\"{attestor}\",code=\"{code}\"}}"), float(*number))
        });
        say("mesh_ca_requests_total", "counter", "Calls by proof and gRPC code.", calls.collect());
        let none = String::new;
        say("mesh_ca_signed_total", "counter", "Certificates.", vec![(none(), float(numbers.signed))]);
        let signing = vec![(none(), numbers.signing.as_secs_f64())];
        say("mesh_ca_signing_seconds_total", "counter", "Time that signatures took.", signing);
        say(
            "mesh_ca_queue",
            "gauge",
            "Requests that wait for a signature.",
            vec![(none(), count(numbers.waiting))],
        );
        say("mesh_ca_workloads", "gauge", "Open streams of trust.", vec![(none(), count(numbers.watchers))]);
        #[expect(clippy::cast_precision_loss, reason = "numbers of Prometheus are floats")]
        let offset = numbers.clock_offset_ms as f64 / 1000.0;
        say(
            "mesh_ca_clock_offset_seconds",
            "gauge",
            "The workloads' clocks against this one, median.",
            vec![(none(), offset)],
        );
        say(
            "mesh_ca_audit_lines_total",
            "counter",
            "Lines of the audit log.",
            vec![(none(), float(self.audit.head().lines))],
        );
        let mut last = "";
        for sample in self.keeper.metrics() {
            if sample.name != last {
                let kind = if sample.name.ends_with("_total") { "counter" } else { "gauge" };
                let _ = writeln!(out, "# HELP {0} {1}\n# TYPE {0} {kind}", sample.name, sample.help);
                last = sample.name;
            }
            let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let labels = sample.labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
            let labels = labels.collect::<Vec<_>>().join(",");
            let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
            let _ = writeln!(out, "{}{labels} {}", sample.name, sample.value);
        }
        out
    }
}
