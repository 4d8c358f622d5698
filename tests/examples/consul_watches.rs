//! What it costs to follow many services of a real Consul.
//!
//! ```text
//! consul_watches SERVICES INSTANCES    registers them, follows all, and prints one line of JSON
//! ```
//!
//! `resident_mb` is what the memory of this process grew by, everything included; `change_ms` how long one change took to be
//! seen; `idle_cpu_ms` the time on a CPU of ten quiet seconds. Needs a file-descriptor limit above SERVICES.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use config::discovery::consul::Consul as Settings;
use discovery::{Discovery, Query, Target};
use e2e::client::Call;
use e2e::consul::Consul;
use e2e::{Value, json};
use tokio::runtime::Handle;

/// Operations of one transaction of Consul.
const OPERATIONS: usize = 60;

#[tokio::main(worker_threads = 2)]
async fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>().expect("a number"));
    let (services, instances) = (args.next().unwrap_or(2000), args.next().unwrap_or(3));
    let limits = json!({"http_max_conns_per_client": services + 100});
    let consul = Consul::with(json!({ "limits": limits, "log_level": "err" })).await;
    fill(&consul, services, instances).await;

    let settings = json!({"servers": [consul.url()], "max_watches": services});
    let settings: Settings = config::typed::parse(&settings).expect("settings");
    let sources = discovery::consul::sources(&settings).expect("sources");
    let before = resident();
    let start = Instant::now();
    let settings = discovery::Settings { sources, ..discovery::Settings::default() };
    let discovery = Discovery::new(Handle::current(), settings);
    let mut watches = Vec::with_capacity(services);
    for index in 0..services {
        let query = Query { service: format!("s{index}").into(), args: BTreeMap::new() };
        watches.push(discovery.watch(&Target::service(format!("upstreams/{index}"), "consul", query)));
    }
    for watch in &mut watches {
        let all = |endpoints: &std::sync::Arc<discovery::Endpoints>| endpoints.list.len() == instances;
        tokio::time::timeout(Duration::from_secs(120), watch.wait_for(all))
            .await
            .expect("in time")
            .expect("a list");
    }
    let ready = start.elapsed();
    // The second question, which waits for a change, is on its way for all.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let resident_mb = (resident() - before) as f64 / 1e6;
    let busy = cpu();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let idle_cpu_ms = (cpu() - busy).as_millis();

    let change = Instant::now();
    consul.register("s7", "one-more", SocketAddr::from(([10, 9, 9, 9], 80))).await;
    let more = |endpoints: &std::sync::Arc<discovery::Endpoints>| endpoints.list.len() > instances;
    watches[7].wait_for(more).await.expect("a list");
    let figures = json!({
        "services": services, "instances": services * instances, "resident_mb": (resident_mb * 10.0).round() / 10.0,
        "ready_ms": ready.as_millis() as u64, "idle_cpu_ms": idle_cpu_ms as u64,
        "change_ms": change.elapsed().as_millis() as u64,
    });
    println!("{figures}");
}

/// Registers everything in the catalog, on a node without an agent.
async fn fill(consul: &Consul, services: usize, instances: usize) {
    consul.put("/v1/catalog/register", &json!({"Node": "many", "Address": "10.0.0.1"})).await;
    let mut operations = Vec::new();
    for index in 0..services * instances {
        let (service, instance) = (index / instances, index % instances);
        let host = SocketAddr::from(([10, 1, (index >> 8) as u8, index as u8], 80)).ip().to_string();
        operations.push(json!({"Service": {"Verb": "set", "Node": "many", "Service": {
            "ID": format!("s{service}-{instance}"), "Service": format!("s{service}"), "Address": host, "Port": 8080,
            "Tags": ["v1", "blue"], "Meta": {"zone": "a", "version": "1.2.3"}, "Weights": {"Passing": 10, "Warning": 1},
        }}}));
    }
    for batch in operations.chunks(OPERATIONS) {
        let body = Value::Array(batch.to_vec()).to_string();
        Call::new("PUT", "/v1/txn").body(body).send_to(consul.addr()).await.expect_status(200);
    }
}

/// Resident memory of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("kilobytes") * 1024
}

/// Time of this process on a CPU.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().map(|at| fields[*at].parse::<u64>().expect("ticks")).sum();
    Duration::from_millis(ticks * 10)
}
