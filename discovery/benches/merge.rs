//! What a change of one endpoint among many costs the control thread, and what following a service costs in memory.
//!
//! `cargo bench -p discovery --features testing --bench merge`. One change among 10,000 endpoints has to stay under 5 ms, from
//! the answer of the registry to what is published; a service that is followed, without its connection, at a few KiB.

#![allow(clippy::expect_used, reason = "a bench that cannot be set up has nothing to measure")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use discovery::testing::fake::{FakeRegistry, instance};
use discovery::{Discovery, Instance, Query, Settings, Source, Target, Watch};
use divan::{AllocProfiler, Bencher};
use tokio::runtime::{Builder, Runtime};

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime of one thread")
}

fn instances(count: usize) -> Vec<Instance> {
    let address = |n: usize| format!("10.{}.{}.{}:80", n / 65_536, n / 256 % 256, n % 256);
    (0..count).map(|n| instance(&address(n), 1)).collect()
}

fn watch(registry: &FakeRegistry, runtime: &Runtime, services: usize) -> (Discovery, Vec<Watch>) {
    let sources: Vec<Arc<dyn Source>> = vec![Arc::new(registry.clone())];
    // Nothing waits for its turn: what is measured is work.
    let settings = Settings { sources, interval: Duration::ZERO, ..Settings::default() };
    let discovery = Discovery::new(runtime.handle().clone(), settings);
    let target = |n: usize| {
        let query = Query { service: format!("s{n}").into(), args: BTreeMap::new() };
        Target::service(format!("upstreams/{n}"), "fake", query)
    };
    let watches = (0..services).map(|n| discovery.watch(&target(n))).collect();
    (discovery, watches)
}

/// From a new list of the registry to what is published; the pause between two changes that follow closely is not counted
/// as work, so each change comes after a pause.
#[divan::bench(args = [100, 1_000, 10_000], sample_count = 20, sample_size = 1)]
fn one_of_many_changes(bencher: Bencher<'_, '_>, count: usize) {
    let (runtime, registry) = (runtime(), FakeRegistry::default());
    let mut list = instances(count);
    registry.set("s0", list.clone());
    let (_discovery, mut watches) = watch(&registry, &runtime, 1);
    let mut watch = watches.remove(0);
    runtime.block_on(async {
        let _ = watch.wait_for(|endpoints| endpoints.list.len() == count).await;
    });
    let mut weight = 1;
    bencher
        .with_inputs(|| {
            runtime.block_on(async { tokio::time::sleep(Duration::from_millis(120)).await });
            weight += 1;
            if let Some(one) = list.get_mut(count / 2) {
                one.node.weight = weight;
            }
            registry.set("s0", list.clone());
        })
        .bench_local_values(|()| runtime.block_on(async { drop(watch.changed().await) }));
}

/// How much memory 2,000 services of five endpoints take: the bytes that are allocated and stay.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn two_thousand_services(bencher: Bencher<'_, '_>) {
    let (runtime, registry) = (runtime(), FakeRegistry::default());
    (0..2000).for_each(|n| registry.set(&format!("s{n}"), instances(5)));
    bencher.bench_local(|| {
        let (discovery, watches) = watch(&registry, &runtime, 2000);
        runtime.block_on(async {
            for mut watch in watches.iter().cloned() {
                let _ = watch.wait_for(|endpoints| endpoints.list.len() == 5).await;
            }
        });
        (discovery, watches)
    });
}
