//! What a hundred thousand routes cost to read and to keep, and what one change costs among them.
//!
//! `cargo bench --package config`. The allocation profile says how much memory is kept: see `max alloc`.

use std::hint::black_box;

use config::plugin_catalog::NoPlugins;
use config::{Change, Graph, Kind, Resource, ResourceKey};
use divan::{AllocProfiler, Bencher};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

const ROUTES: usize = 100_000;

fn main() {
    divan::main();
}

fn key(index: usize) -> ResourceKey {
    ResourceKey::new(Kind::Route, index.to_string())
}

/// A route with an upstream of its own.
fn inline(index: usize) -> Value {
    json!({
        "uri": format!("/api/v1/resource-{index}/*"),
        "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:1980": 1}},
    })
}

/// A route that refers to one of a hundred upstreams.
fn shared(index: usize) -> Value {
    json!({"uri": format!("/api/v1/resource-{index}/*"), "upstream_id": format!("u{}", index % 100)})
}

/// Which routes.
#[derive(Clone, Copy, Debug)]
enum Form {
    Inline,
    Shared,
}

impl Form {
    fn route(self, index: usize) -> Value {
        match self {
            Form::Inline => inline(index),
            Form::Shared => shared(index),
        }
    }
}

fn put(index: usize, value: Value) -> Change {
    Change::Put { key: key(index), value, created_index: 1, modified_index: index as u64 }
}

fn graph() -> Graph {
    let mut graph = Graph::new();
    for index in 0..ROUTES {
        graph.apply(put(index, shared(index)), &NoPlugins);
    }
    graph
}

/// Reading alone: time for all routes.
#[divan::bench(args = [Form::Inline, Form::Shared], sample_count = 5, sample_size = 1)]
fn parse(bencher: Bencher<'_, '_>, form: Form) {
    let values: Vec<(ResourceKey, Value)> =
        (0..ROUTES).map(|index| (key(index), form.route(index))).collect();
    bencher.bench_local(|| {
        for (key, value) in &values {
            black_box(Resource::parse(key, value, &NoPlugins).ok());
        }
    });
}

/// Reading and keeping, the JSON of one route in memory at a time: the greatest allocation is the graph's.
#[divan::bench(args = [Form::Inline, Form::Shared], sample_count = 3, sample_size = 1)]
fn build(bencher: Bencher<'_, '_>, form: Form) {
    bencher.bench_local(|| {
        let mut graph = Graph::new();
        for index in 0..ROUTES {
            graph.apply(put(index, form.route(index)), &NoPlugins);
        }
        graph
    });
}

/// One route changes among all the others.
#[divan::bench]
fn change_one(bencher: Bencher<'_, '_>) {
    let mut graph = graph();
    let mut turn = 0;
    bencher.bench_local(|| {
        turn += 1;
        let value = json!({"uri": format!("/changed/{turn}"), "upstream_id": "u1"});
        graph.apply(put(ROUTES / 2, value), &NoPlugins)
    });
}

/// Who uses an upstream that few use.
#[divan::bench]
fn referrers(bencher: Bencher<'_, '_>) {
    let mut graph = graph();
    graph.apply(put(0, json!({"uri": "/", "upstream_id": "rare"})), &NoPlugins);
    let target = ResourceKey::new(Kind::Upstream, "rare");
    bencher.bench_local(|| graph.referrers(black_box(&target)));
}
