//! A gateway and Kubernetes: a deployment is rolled under load.

use std::time::{Duration, Instant};

use e2e::kube::{KubeApi, Pod, Slice};
use e2e::load::Load;
use e2e::origin::{Origin, echo};
use e2e::{Edge, EdgeBuilder, Value, eventually, json};

const PODS: usize = 5;

/// A pod of the deployment, in a slice of its own: all have one address here, and so each has a port.
struct Replica {
    slice: Slice,
    pod: Pod,
    origin: Origin,
}

impl Replica {
    async fn start(api: &KubeApi, generation: u32, place: usize) -> Replica {
        let name = format!("web-{generation}-{place}");
        let origin = echo::named(&name).await;
        let slice = Slice::new("default", "web", &name, origin.addr.port());
        let replica = Replica { slice, pod: Pod::new(&name, "127.0.0.1"), origin };
        replica.slice.clone().pod(replica.pod.clone()).put(api);
        replica
    }

    /// Asked to end, it serves until nobody comes any more, as a pod with a preStop hook does.
    async fn end(self, api: &KubeApi) {
        self.slice.clone().pod(self.pod.clone().terminating()).put(api);
        let mut seen = (self.origin.requests(), Instant::now());
        let origin = &self.origin;
        eventually("nobody comes to a pod that ends", || {
            if origin.requests() != seen.0 {
                seen = (origin.requests(), Instant::now());
            }
            let quiet = seen.1.elapsed() > Duration::from_millis(300);
            async move { quiet.then_some(()) }
        })
        .await;
        self.slice.delete(api);
        self.origin.stop().await;
    }
}

fn gateway(discovery: Value) -> EdgeBuilder {
    Edge::file().config(json!({"discovery": discovery})).route(json!({
        "id": "1", "uri": "/*",
        "upstream": {"type": "roundrobin", "service_name": "default/web:http", "discovery_type": "kubernetes",
                     "retries": 0},
    }))
}

/// Replaces every pod under load, a new one for each old one; then scales to one pod and up again.
async fn roll(edge: &Edge, api: &KubeApi, mut old: Vec<Replica>) {
    edge.until_status("/", 200).await;
    let request = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let load = Load::start(edge.http, request, 200, 20, 500);
    let mut new = Vec::new();
    for (place, replica) in old.drain(..).enumerate() {
        let next = Replica::start(api, 2, place).await;
        eventually("the new pod is used", || async { (next.origin.requests() > 0).then_some(()) }).await;
        new.push(next);
        replica.end(api).await;
    }
    for replica in new.drain(1..) {
        replica.end(api).await;
    }
    let last = Replica::start(api, 3, 0).await;
    eventually("the pod that was added is used", || async { (last.origin.requests() > 0).then_some(()) })
        .await;
    let account = load.finish().await;
    account.expect_no_failure();
    assert!(account.good > 500, "{}", account.good);
}

async fn deployment(api: &KubeApi) -> Vec<Replica> {
    let mut replicas = Vec::new();
    for place in 0..PODS {
        replicas.push(Replica::start(api, 1, place).await);
    }
    replicas
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_is_rolled_without_a_failed_request() {
    let api = KubeApi::start().await;
    let replicas = deployment(&api).await;
    let edge = gateway(json!({"kubernetes": api.settings()})).start().await;
    roll(&edge, &api, replicas).await;
}
