//! The five plugins that most routes have, one by one and together: time and allocations of a request.
//!
//! `cargo bench -p plugins --bench five`. An allocation must be part of the result: a field that is set, a URI that is
//! made. The log phase counts too; making the exchange does not.

#![expect(clippy::expect_used, reason = "a benchmark")]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use divan::{AllocProfiler, Bencher};
use http::{HeaderValue, Response, header};
use layers::body::Body;
use layers::chain::{Instance, Plan, PluginChain};
use layers::consumer::{Consumer, ConsumerTable};
use layers::error::Reason;
use layers::exchange::Exchange;
use layers::target::{Destination, Target};
use layers::testing::{TestEnv, exchange, service};
use plugins::key_auth::KeyAuth;
use plugins::limit_count::LimitCount;
use plugins::prometheus::Prometheus;
use plugins::proxy_rewrite::ProxyRewrite;
use plugins::request_id::RequestId;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tower::Service;

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

/// What the plugins are built with. The runtime is entered while they are built.
struct Bench {
    env: TestEnv,
    runtime: Runtime,
}

impl Bench {
    fn new() -> Self {
        let mut table = ConsumerTable::default();
        table.insert("key-auth", "bench-key", Arc::new(Consumer::new("bench")));
        let env = TestEnv::default();
        env.consumers.publish(table);
        Self { env, runtime: Builder::new_current_thread().build().expect("a runtime") }
    }

    fn build<D: layers::plugin::Definition>(&self, config: &Value) -> Arc<Instance> {
        let _entered = self.runtime.enter();
        Arc::new(self.env.build::<D>(config).expect("settings that work"))
    }

    fn key_auth(&self) -> Arc<Instance> {
        self.build::<KeyAuth>(&json!({}))
    }

    fn limit_count(&self) -> Arc<Instance> {
        let config =
            json!({"count": 1_000_000_000, "time_window": 3600, "key": "remote_addr", "policy": "local"});
        self.build::<LimitCount>(&config)
    }

    /// Without fields of the answer, which are the only thing that the plugin allocates.
    fn limit_count_silent(&self) -> Arc<Instance> {
        let config = json!({"count": 1_000_000_000, "time_window": 3600, "show_limit_quota_header": false});
        self.build::<LimitCount>(&config)
    }

    fn proxy_rewrite(&self) -> Arc<Instance> {
        let config = json!({
            "regex_uri": ["^/(.*)$", "/v1/$1"],
            "headers": {"set": {"x-route": "bench", "x-client": "$remote_addr"}},
        });
        self.build::<ProxyRewrite>(&config)
    }

    fn request_id(&self) -> Arc<Instance> {
        self.build::<RequestId>(&json!({}))
    }

    fn prometheus(&self) -> Arc<Instance> {
        self.build::<Prometheus>(&json!({}))
    }
}

fn target() -> Arc<Target> {
    Arc::new(Target {
        route_id: "r1".into(),
        route_name: None,
        route: None,
        service: None,
        service_id: None,
        service_name: None,
        plan: None,
        destination: Destination::Nothing(Reason::NoUpstream),
        timeout: None,
        websocket: false,
        refused: None,
    })
}

/// The answer of an upstream, with the fields that most have.
fn answer() -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    let fields = response.headers_mut();
    fields.reserve(16);
    for (name, value) in [
        (header::CONTENT_TYPE, "application/json"),
        (header::CONTENT_LENGTH, "1024"),
        (header::SERVER, "bench"),
        (header::DATE, "Thu, 01 Jan 1970 00:00:00 GMT"),
    ] {
        fields.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn run(bencher: Bencher<'_, '_>, instances: Vec<Arc<Instance>>) {
    let plan = (!instances.is_empty()).then(|| Arc::new(Plan::new(instances)));
    let target = target();
    let uri: Arc<str> = "/*".into();
    let mut chain = PluginChain::new(service(|_| Ok(())));
    let mut cx = Context::from_waker(Waker::noop());
    let input = || {
        let mut x = exchange("GET", "http://example.com/orders/17?full=yes")
            .header("host", "example.com")
            .header("user-agent", "bench")
            .header("accept", "*/*")
            .header("apikey", "bench-key")
            .build();
        // hyper hands the maps of a connection round, so they have long grown.
        x.request.headers.reserve(16);
        x.plan.clone_from(&plan);
        x.response = answer();
        x.target = Some(target.clone());
        x.matched_uri = Some(uri.clone());
        x
    };
    bencher.with_inputs(input).bench_local_values(|x: Exchange| {
        // The exchange is dropped here: its end is part of the work.
        match pin!(chain.call(x)).poll(&mut cx) {
            Poll::Ready(Ok(x)) => x.response.status().as_u16(),
            Poll::Ready(Err(_)) | Poll::Pending => 0,
        }
    });
}

/// For comparison: the chain, and the end of an exchange, with no plugin.
#[divan::bench(sample_size = 16, sample_count = 1000)]
fn none(bencher: Bencher<'_, '_>) {
    run(bencher, Vec::new());
}

#[divan::bench(sample_size = 16, sample_count = 1000)]
fn key_auth(bencher: Bencher<'_, '_>) {
    run(bencher, vec![Bench::new().key_auth()]);
}

#[divan::bench(sample_size = 16, sample_count = 1000)]
fn limit_count(bencher: Bencher<'_, '_>) {
    run(bencher, vec![Bench::new().limit_count()]);
}

#[divan::bench(sample_size = 16, sample_count = 1000)]
fn limit_count_silent(bencher: Bencher<'_, '_>) {
    run(bencher, vec![Bench::new().limit_count_silent()]);
}

#[divan::bench(sample_size = 16, sample_count = 1000)]
fn proxy_rewrite(bencher: Bencher<'_, '_>) {
    run(bencher, vec![Bench::new().proxy_rewrite()]);
}

#[divan::bench(sample_size = 16, sample_count = 1000)]
fn request_id(bencher: Bencher<'_, '_>) {
    run(bencher, vec![Bench::new().request_id()]);
}

#[divan::bench(sample_size = 16, sample_count = 1000)]
fn prometheus(bencher: Bencher<'_, '_>) {
    run(bencher, vec![Bench::new().prometheus()]);
}

#[divan::bench(sample_size = 16, sample_count = 1000)]
fn all_five(bencher: Bencher<'_, '_>) {
    let bench = Bench::new();
    let all = vec![
        bench.key_auth(),
        bench.limit_count(),
        bench.proxy_rewrite(),
        bench.request_id(),
        bench.prometheus(),
    ];
    run(bencher, all);
}
