//! What an upstream costs at rest: builds many clusters of one literal node, as inline upstreams of routes make them,
//! and prints resident bytes for each.
//!
//! `cargo run --release -p layers --example clusters [COUNT]`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use config::upstream::Upstream;
use discovery::Discovery;
use layers::upstream::Keepalive;
use layers::upstream::cluster::{Cluster, ClusterEnv};
use layers::upstream::tls_client::TlsClients;
use rustls::RootCertStore;

#[global_allocator]
static ALLOC: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap_or(0) * 1024
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count: usize = std::env::args().nth(1).map_or(Ok(100_000), |count| count.parse())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let control = runtime.handle().clone();
    let env = ClusterEnv {
        discovery: Discovery::new(control.clone(), discovery::Settings::default()),
        tls: Arc::new(TlsClients::new(Arc::new(RootCertStore::empty()))),
        checks: true,
        keepalive: Keepalive { size: 320, idle: Some(Duration::from_secs(60)), requests: 1000 },
        session_key: layers::upstream::sticky::own_key(Vec::new),
        drains: layers::upstream::drains::Drains::default(),
        place: Arc::default(),
        mesh: None,
        as_client: None,
        control,
    };
    let upstream = |n: usize| -> Result<Upstream, serde_json::Error> {
        let node = format!("10.{}.{}.{}:8080", n >> 16 & 255, n >> 8 & 255, n & 255);
        serde_json::from_value(serde_json::json!({"type": "roundrobin", "nodes": {node: 1}}))
    };
    let mut clusters = Vec::with_capacity(count);
    clusters.push(Cluster::build("routes/0", &upstream(0)?, None, &env)?);
    let (before, start) = (resident(), Instant::now());
    for n in 1..count {
        clusters.push(Cluster::build(&format!("routes/{n}"), &upstream(n)?, None, &env)?);
    }
    let (took, after) = (start.elapsed(), resident());
    println!(
        "{count} clusters: {} bytes each, {} tasks, {:.1} us to build one",
        (after.saturating_sub(before)) / count.max(1),
        runtime.metrics().num_alive_tasks(),
        took.as_secs_f64() * 1e6 / count.max(1) as f64,
    );
    Ok(())
}
