//! What a request pays to see the current snapshot, and what a tick costs with many idle connections.
//!
//! `cargo bench -p layers --bench view`. A view must cost a few nanoseconds; a tick must not grow with the number of
//! idle connections.

use std::sync::Arc;

use divan::{AllocProfiler, Bencher};
use layers::worker::deadlines::{Deadlines, Phase, Timeouts};
use layers::worker::{Published, View};

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

#[divan::bench]
fn view(bencher: Bencher<'_, '_>) {
    let (published, _retired) = Published::new(Arc::new(7u64));
    let view = View::new(published);
    bencher.bench_local(|| **view.current());
}

/// For comparison: a clone of the shared `Arc`.
#[divan::bench]
fn shared(bencher: Bencher<'_, '_>) {
    let (published, _retired) = Published::new(Arc::new(7u64));
    bencher.bench_local(|| *published.load());
}

#[divan::bench]
fn watch_and_forget(bencher: Bencher<'_, '_>) {
    let deadlines = Deadlines::new(&Timeouts::default());
    bencher.bench_local(|| deadlines.watch(Phase::Head).now());
}

#[divan::bench(args = [100, 10_000, 100_000])]
fn tick_with_parked(bencher: Bencher<'_, '_>, connections: usize) {
    let timeouts = Timeouts { idle: std::time::Duration::from_secs(1_000_000), ..Timeouts::default() };
    let deadlines = Deadlines::new(&timeouts);
    let parked: Vec<_> = (0..connections)
        .map(|n| {
            if n % (connections / 100).max(1) == 0 {
                deadlines.tick();
            }
            let watched = deadlines.watch(Phase::Idle);
            watched.park(Phase::Idle);
            watched
        })
        .collect();
    bencher.bench_local(|| deadlines.tick());
    drop(parked);
}
