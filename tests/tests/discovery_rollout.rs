//! Gateways and Kubernetes: deployments are rolled under load, with and without a discovery server between the two.

use std::time::{Duration, Instant};

use e2e::discovery_server::DiscoveryServer;
use e2e::kube::{KubeApi, Manner, Pod, Slice};
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
    load.finish_after(500).await.expect_no_failure();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn and_so_it_is_with_a_discovery_server_in_between() {
    let api = KubeApi::start().await;
    let replicas = deployment(&api).await;
    let server = DiscoveryServer::start(json!({"kubernetes": api.settings()}), json!({})).await;
    let between = json!({"postern": {"servers": [server.addr.to_string()], "kinds": ["kubernetes"]}});
    let edge = gateway(between).start().await;
    roll(&edge, &api, replicas).await;
    assert_eq!(api.asked("endpointslices").1, 1, "one watch, and not one for each gateway");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_and_a_discovery_server_may_be_gone_for_a_while() {
    let mut api = KubeApi::start().await;
    let replica = Replica::start(&api, 1, 0).await;
    let mut server = DiscoveryServer::start(json!({"kubernetes": api.settings()}), json!({})).await;
    let between = json!({"postern": {"servers": [server.addr.to_string()], "kinds": ["kubernetes"]}});
    let edges =
        [gateway(json!({"kubernetes": api.settings()})).start().await, gateway(between).start().await];
    let mut loads = Vec::new();
    for edge in &edges {
        edge.until_status("/", 200).await;
        loads.push(Load::start(edge.http, "GET / HTTP/1.1\r\nhost: a\r\n\r\n", 200, 5, 200));
    }
    for manner in [Manner::Errors, Manner::Silent, Manner::HalfBody] {
        api.behave(manner);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    server.kill();
    api.stop().await;
    api.behave(Manner::Well);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let other = Replica::start(&api, 2, 0).await;
    api.resume().await;
    server.run().await;
    // Each gateway finds the new pod: all requests of one of them would be half of these.
    let before = replica.origin.requests();
    eventually("the pod that came meanwhile is used", || async {
        (other.origin.requests() > 0).then_some(())
    })
    .await;
    replica.slice.clone().pod(replica.pod.clone().terminating()).put(&api);
    let mut seen = (before, Instant::now());
    eventually("both gateways leave the other", || {
        if replica.origin.requests() != seen.0 {
            seen = (replica.origin.requests(), Instant::now());
        }
        let quiet = seen.1.elapsed() > Duration::from_millis(500);
        async move { quiet.then_some(()) }
    })
    .await;
    for load in loads {
        load.finish().await.expect_no_failure();
    }
}
