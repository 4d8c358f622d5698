//! Pools of signers: begun from `config.yaml`, shown in metrics, and followed, because a certificate that was refused for
//! the sake of its key can be used when the nodes offer it.

use std::sync::Arc;
use std::time::Duration;

use certs::signer::metrics::BUCKETS_MS;
use certs::signer::node::{Credentials, Node};
use certs::signer::pool::Settings;
use certs::signer::{Pool, Pools};
use config::process::Process;
use config::{Kind, Resource, ResourceKey};
use layers::telemetry::exposition::Exposition;
use layers::telemetry::names;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use crate::running::Running;

/// What changes together is looked at together.
const PAUSE: Duration = Duration::from_millis(200);

/// Begins to connect to all of them.
pub(crate) fn pools(process: &Process, control: &Handle) -> Pools {
    Pools::new(process.signers.iter().map(|pool| {
        let settings = Settings {
            name: pool.name.as_str().into(),
            nodes: pool.nodes.clone(),
            server_name: pool.server_name.clone(),
            credentials: Credentials::Files {
                certificate: pool.certificate.clone(),
                key: pool.key.clone(),
                ca: pool.ca.clone(),
            },
            timeout: pool.timeout,
            deadline: pool.deadline,
            in_flight: usize::try_from(pool.in_flight).unwrap_or(usize::MAX),
        };
        Pool::start(&settings, control)
    }))
}

/// Has certificates that were refused looked at again whenever a node offers other keys. Ends with the process.
pub(crate) async fn follow(pools: Pools, running: Running) {
    let mut following = JoinSet::new();
    for pool in pools.iter() {
        following.spawn(follow_one(Arc::clone(pool), running.clone()));
    }
    while following.join_next().await.is_some() {}
}

async fn follow_one(pool: Arc<Pool>, running: Running) {
    let mut changes = pool.changes();
    while changes.changed().await.is_ok() {
        tokio::time::sleep(PAUSE).await;
        changes.borrow_and_update();
        let (name, running) = (Arc::clone(pool.name()), running.clone());
        let again = move || {
            let refused = refused(&running, &name);
            if !refused.is_empty() {
                running.again(refused);
            }
        };
        let _ = tokio::task::spawn_blocking(again).await;
    }
}

/// Certificates with keys at this pool that cannot be used.
fn refused(running: &Running, pool: &str) -> Vec<ResourceKey> {
    let configuration = running.configuration();
    let is_of_pool = |key: &&ResourceKey| {
        let resource = configuration.graph.get(key).map(|item| &item.resource);
        matches!(resource, Some(Resource::Ssl(ssl)) if ssl.signers() == Some(pool))
    };
    let refused = configuration.certificates.refused().keys();
    refused.filter(|key| key.kind == Kind::Ssl).filter(is_of_pool).cloned().collect()
}

/// Writes the metrics of all pools.
pub(crate) fn collect(pools: &Pools, out: &mut Exposition) {
    if pools.iter().next().is_none() {
        return;
    }
    out.family("", &names::SIGNER_UP);
    each_node(pools, |labels, node| {
        out.sample_of("", names::SIGNER_UP.name, labels, u8::from(node.is_up()));
    });
    out.family("", &names::SIGNER_SIGNATURE_SECONDS);
    each_node(pools, |labels, node| times(out, labels, node));
    out.family("", &names::SIGNER_ERRORS_TOTAL);
    each_node(pools, |labels, node| {
        for (reason, count) in node.metrics().failures() {
            let mut labels = labels.to_owned();
            Exposition::label(&mut labels, "reason", reason.as_str());
            out.sample_of("", names::SIGNER_ERRORS_TOTAL.name, &labels, count);
        }
    });
    out.family("", &names::SIGNER_HANDSHAKES_TOTAL);
    for pool in pools.iter() {
        let totals = pool.totals();
        let outcomes = [("signed", totals.signed), ("failed", totals.failed), ("crowded", totals.crowded)];
        for (outcome, count) in outcomes {
            let labels = [("pool", &**pool.name()), ("outcome", outcome)];
            out.sample("", names::SIGNER_HANDSHAKES_TOTAL.name, labels, count);
        }
    }
    out.family("", &names::SIGNER_FAILOVERS_TOTAL);
    for pool in pools.iter() {
        let labels = [("pool", &**pool.name())];
        out.sample("", names::SIGNER_FAILOVERS_TOTAL.name, labels, pool.totals().failovers);
    }
}

fn each_node(pools: &Pools, mut each: impl FnMut(&str, &Node)) {
    for pool in pools.iter() {
        for node in pool.nodes() {
            let mut labels = String::new();
            Exposition::label(&mut labels, "pool", pool.name());
            Exposition::label(&mut labels, "node", node.address());
            each(&labels, node);
        }
    }
}

fn times(out: &mut Exposition, labels: &str, node: &Node) {
    let times = node.metrics().times();
    let name = names::SIGNER_SIGNATURE_SECONDS.name;
    let mut bucket = |end: &str, count: u64| {
        let mut labels = labels.to_owned();
        Exposition::label(&mut labels, "le", end);
        out.sample_of("", &format!("{name}_bucket"), &labels, count);
    };
    for (end, count) in BUCKETS_MS.into_iter().zip(times.buckets) {
        bucket(&Duration::from_millis(end).as_secs_f64().to_string(), count);
    }
    bucket("+Inf", times.count);
    out.sample_of("", &format!("{name}_sum"), labels, times.sum.as_secs_f64());
    out.sample_of("", &format!("{name}_count"), labels, times.count);
}
