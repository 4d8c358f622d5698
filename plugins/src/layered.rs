//! Every plugin can be a layer of a stack of its own, and does there what it does in the chain.
//!
//! Settings are those of the cases of compatibility. The same request goes through the chain and through the layer, each
//! with a plugin of its own; what a client would see has to be the same, and so has what the upstream is sent.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::HeaderValue;
use layers::body::Body;
use layers::chain::{Instance, Plan, PluginChain, Source, before_proxy};
use layers::exchange::Exchange;
use layers::plugin::{Hooks, Registration};
use layers::plugin_layer::PluginLayer;
use layers::stack::Stack;
use layers::testing::{TestEnv, exchange, service, text};
use serde_json::{Value, json};
use tower::Service;
use tower::layer::layer_fn;

use crate::refusals::Samples;
use crate::registrations;

/// What a request came to: the status, the names of fields, the body, and what reached the upstream.
#[derive(Debug, PartialEq)]
struct Seen {
    status: u16,
    fields: BTreeSet<String>,
    body: String,
    asked: Vec<(String, BTreeSet<String>)>,
}

fn names(headers: &http::HeaderMap) -> BTreeSet<String> {
    headers.keys().map(|name| name.as_str().to_owned()).collect()
}

async fn run(plugin: &Registration, env: &TestEnv, settings: &Value, chained: bool) -> Option<Seen> {
    let mut hooks = Hooks::default();
    env.with(|env| (plugin.build)(settings, env, &mut hooks)).ok()?;
    let instance = Arc::new(Instance {
        name: plugin.name,
        priority: plugin.priority,
        source: Source("routes/1".into()),
        filter: None,
        error_response: None,
        hooks,
    });
    #[expect(clippy::type_complexity, reason = "written once, and read where it stands")]
    let asked: Arc<Mutex<Vec<(String, BTreeSet<String>)>>> = Arc::default();
    let upstream = service({
        let asked = asked.clone();
        move |x: &mut Exchange| {
            if before_proxy(x) {
                return Ok(());
            }
            asked.lock().unwrap().push((x.request.uri.to_string(), names(&x.request.headers)));
            *x.response.body_mut() = Body::from("{\"a\":1}");
            x.response.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
            Ok(())
        }
    });
    let mut x = exchange("POST", "http://a.com/hello?name=x")
        .header("host", "a.com")
        .header("content-type", "application/json")
        .header("accept-encoding", "gzip, br")
        .header("user-agent", "tests")
        .body("{\"a\":1}")
        .build();
    let limit = Duration::from_secs(30);
    let mut x = if chained {
        x.plan = Some(Arc::new(Plan::new(vec![instance])));
        let mut stack = Stack::new().push(layer_fn(PluginChain::new)).around(upstream);
        tokio::time::timeout(limit, stack.call(x)).await
    } else {
        let mut stack = Stack::new().push(PluginLayer::new(instance)).around(upstream);
        tokio::time::timeout(limit, stack.call(x)).await
    }
    .unwrap_or_else(|_| panic!("{} does not end", plugin.name))
    .unwrap();
    let body = text(&mut x).await;
    let fields = names(x.response.headers());
    let asked = asked.lock().unwrap().clone();
    Some(Seen { status: x.status(), fields, body, asked })
}

#[tokio::test]
async fn every_plugin_does_as_a_layer_what_it_does_in_the_chain() {
    let zones =
        json!([{"name": "memory_cache", "memory": 1 << 20}, {"name": "disk_cache_one", "memory": 1 << 20}]);
    let samples = Samples::read();
    let mut tried = 0;
    tokio::task::LocalSet::new()
        .run_until(async {
            for plugin in registrations() {
                let attr = (plugin.name == "proxy-cache").then(|| json!({"ttl": 10, "zones": zones}));
                let env = || TestEnv { attr: attr.clone(), ..TestEnv::default() };
                let settings = samples.settings.get(plugin.name).map(Vec::as_slice).unwrap_or_default();
                let mut runs = 0;
                for settings in settings.iter().filter(|settings| (plugin.check)(settings).is_ok()).take(6) {
                    let Some(chained) = run(plugin, &env(), settings, true).await else { continue };
                    let layered = run(plugin, &env(), settings, false).await.unwrap();
                    let mut chained = chained;
                    if plugin.name == "fault-injection" {
                        // A percentage is drawn for each request.
                        continue;
                    }
                    if matches!(plugin.name, "csrf" | "request-id" | "mocking") {
                        // What they make is another each time.
                        chained.body.clone_from(&layered.body);
                    }
                    assert_eq!(layered, chained, "{} with {settings}", plugin.name);
                    runs += 1;
                }
                tried += usize::from(runs > 0);
            }
        })
        .await;
    assert!(tried + 6 >= registrations().len(), "{tried} of {} plugins were tried", registrations().len());
}
