//! A hundred thousand routes fit into the memory and the time that are promised for them.
//!
//! A test of its own, because it measures the memory of its process.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use config::plugin_catalog::NoPlugins;
use config::{Change, Graph, Kind, ResourceKey};
use serde_json::{Value, json};

const ROUTES: usize = 100_000;

/// Bytes of memory in use by this process.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn build(make: fn(usize) -> Value) -> Graph {
    let mut graph = Graph::new();
    for index in 0..ROUTES {
        let key = ResourceKey::new(Kind::Route, index.to_string());
        let change = Change::Put { key, value: make(index), created_index: 1, modified_index: 1 };
        graph.apply(change, &NoPlugins);
    }
    graph
}

#[test]
fn a_hundred_thousand_routes_are_kept_in_less_than_80_mb() {
    let inline = |index| {
        json!({
            "uri": format!("/api/v1/resource-{index}/*"),
            "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:1980": 1}},
        })
    };
    let shared = |index| json!({"uri": format!("/api/v1/resource-{index}/*"), "upstream_id": format!("u{}", index % 100)});
    for (name, make) in [("inline", inline as fn(usize) -> Value), ("shared", shared)] {
        let (before, start) = (resident(), Instant::now());
        let graph = build(make);
        let (used, took) = (resident().saturating_sub(before), start.elapsed());
        println!("{name}: {} bytes per route, {} MB, {took:?}", used / ROUTES, used / 1_000_000);
        assert_eq!(graph.count(Kind::Route), ROUTES);
        assert!(used < 80_000_000, "{name}: {used}");
        // Without optimisation on a busy machine; the benchmark has the true numbers.
        assert!(took < Duration::from_secs(30), "{name}: {took:?}");
        // Kept to the end, so that its memory is not counted as free for the next.
        std::mem::forget(graph);
    }
}
