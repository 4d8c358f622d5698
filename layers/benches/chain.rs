//! What the plugins of a request cost before they do anything of their own.
//!
//! `cargo bench -p layers --features testing --bench chain`. A request without plugins pays next to nothing; plugins
//! that do not wait allocate nothing, however many there are. Making the exchange is not measured.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use divan::{AllocProfiler, Bencher, black_box};
use http::{HeaderName, StatusCode};
use layers::chain::{Instance, Plan, PluginChain, Source};
use layers::consumer::Consumer;
use layers::error::Fault;
use layers::exchange::Exchange;
use layers::plugin::{Access, Around, Flow, Hooks, Next, OnResponse, RewriteWaits};
use layers::testing::{exchange, service};
use tower::Service;

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

/// Looks at one field of the request and one of the answer.
struct Looks {
    field: HeaderName,
}

impl Access for Looks {
    fn access(&self, x: &mut Exchange) -> Flow {
        if black_box(x.request.headers.contains_key(&self.field)) {
            return Flow::status(StatusCode::FORBIDDEN);
        }
        Flow::Next
    }
}

impl OnResponse for Looks {
    fn response(&self, x: &mut Exchange) {
        black_box(x.response.headers().contains_key(&self.field));
    }
}

impl RewriteWaits for Looks {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        black_box(x.request.headers.contains_key(&self.field));
        Flow::Next
    }
}

impl Around for Looks {
    async fn around(&self, x: Exchange, next: Next) -> Result<Exchange, Fault> {
        black_box(x.request.headers.contains_key(&self.field));
        next.run(x).await
    }
}

/// The phases a plugin of the benchmark registers for.
#[derive(Clone, Copy)]
enum Phases {
    Access,
    AccessAndResponse,
    Waits,
    Around,
}

fn plugin(n: usize, phases: Phases) -> Arc<Instance> {
    let plugin = Arc::new(Looks { field: HeaderName::from_static("x-not-there") });
    let mut hooks = Hooks::default();
    match phases {
        Phases::Access => hooks.access(&plugin),
        Phases::AccessAndResponse => {
            hooks.access(&plugin);
            hooks.response(&plugin);
        }
        Phases::Waits => hooks.rewrite_waits(&plugin),
        Phases::Around => hooks.around(&plugin),
    }
    Arc::new(Instance {
        name: Box::leak(format!("plugin-{n}").into_boxed_str()),
        priority: i32::try_from(n).unwrap_or_default(),
        source: Source("routes/1".into()),
        filter: None,
        error_response: None,
        hooks,
    })
}

fn plan(plugins: usize, phases: Phases) -> Option<Arc<Plan>> {
    let instances: Vec<_> = (0..plugins).map(|n| plugin(n, phases)).collect();
    (!instances.is_empty()).then(|| Arc::new(Plan::new(instances)))
}

fn request() -> Exchange {
    exchange("GET", "http://example.com/a/b?c=d")
        .header("host", "example.com")
        .header("user-agent", "bench")
        .header("accept", "*/*")
        .build()
}

/// Runs exchanges made by `input` through the chain. Nothing waits for anything real, so one poll is enough.
fn run(bencher: Bencher<'_, '_>, input: impl Fn() -> Exchange) {
    let mut chain = PluginChain::new(service(|_| Ok(())));
    let mut cx = Context::from_waker(Waker::noop());
    bencher.with_inputs(input).bench_local_values(|x| match pin!(chain.call(x)).poll(&mut cx) {
        Poll::Ready(result) => result.ok(),
        Poll::Pending => None,
    });
}

/// For comparison: what each of the plugins does in `access`.
#[divan::bench(sample_size = 256)]
fn look_up(bencher: Bencher<'_, '_>) {
    let field = HeaderName::from_static("x-not-there");
    bencher.with_inputs(request).bench_local_refs(|x| x.request.headers.contains_key(black_box(&field)));
}

/// For comparison: the inner service without a chain.
#[divan::bench(sample_size = 256)]
fn no_chain(bencher: Bencher<'_, '_>) {
    let mut inner = service(|_| Ok(()));
    let mut cx = Context::from_waker(Waker::noop());
    bencher.with_inputs(request).bench_local_values(|x| match pin!(inner.call(x)).poll(&mut cx) {
        Poll::Ready(result) => result.ok(),
        Poll::Pending => None,
    });
}

#[divan::bench(sample_size = 256, args = [0, 5, 20])]
fn access(bencher: Bencher<'_, '_>, plugins: usize) {
    let plan = plan(plugins, Phases::Access);
    run(bencher, || {
        let mut x = request();
        x.plan.clone_from(&plan);
        x
    });
}

#[divan::bench(sample_size = 256, args = [5, 20])]
fn access_and_response(bencher: Bencher<'_, '_>, plugins: usize) {
    let plan = plan(plugins, Phases::AccessAndResponse);
    run(bencher, || {
        let mut x = request();
        x.plan.clone_from(&plan);
        x
    });
}

/// Five plugins of a global rule and five of the route.
#[divan::bench(sample_size = 256)]
fn global_and_route(bencher: Bencher<'_, '_>) {
    let (global, route) = (plan(5, Phases::Access), plan(5, Phases::Access));
    run(bencher, || {
        let mut x = request();
        x.global_plan.clone_from(&global);
        x.plan.clone_from(&route);
        x
    });
}

/// Five plugins of the route and two of a consumer, whose merged plan is kept by the worker.
#[divan::bench(sample_size = 256)]
fn with_consumer(bencher: Bencher<'_, '_>) {
    let route = plan(5, Phases::Access);
    let consumer = Arc::new(Consumer {
        plugins: (5..7).map(|n| plugin(n, Phases::Access)).collect(),
        ..Consumer::new("jack")
    });
    run(bencher, || {
        let mut x = request();
        x.plan.clone_from(&route);
        x.consumer = Some(consumer.clone());
        x
    });
}

/// Plugins that could wait: one boxed future for the request and one for each of them.
#[divan::bench(sample_size = 256, args = [1, 5])]
fn waiting(bencher: Bencher<'_, '_>, plugins: usize) {
    let plan = plan(plugins, Phases::Waits);
    run(bencher, || {
        let mut x = request();
        x.plan.clone_from(&plan);
        x
    });
}

/// Plugins around the upstream call: two boxes for the request and one for each of them. Nobody else pays.
#[divan::bench(sample_size = 256, args = [1, 2])]
fn around(bencher: Bencher<'_, '_>, plugins: usize) {
    let plan = plan(plugins, Phases::Around);
    run(bencher, || {
        let mut x = request();
        x.plan.clone_from(&plan);
        x
    });
}
