//! Processes and files around discovery by Kubernetes: a discovery server over TLS, and kubeconfig files.

use std::sync::Arc;
use std::time::Duration;

use ::certs::grpc;
use config::discovery::kubernetes::Kubernetes;
use discovery::Query;
use discovery::rpc::{client, proto};
use e2e::discovery_server::DiscoveryServer;
use e2e::kube::{KubeApi, Pod, Slice};
use e2e::{certs, json};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tempfile::TempDir;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_discovery_server_over_tls_wants_certificates_of_its_clients() {
    let folder = TempDir::new().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    };
    let authority = certs::Authority::new("discovery");
    let (server, client) = (authority.server(&["127.0.0.1"]), authority.client("edge-1"));
    let ca = write("ca.pem", &authority.pem());
    let (cert, key) = (write("server.pem", &server.cert), write("server.key", &server.key));
    let own = (write("client.pem", &client.cert), write("client.key", &client.key));
    let api = KubeApi::start().await;
    Slice::new("default", "web", "web", 80).pod(Pod::new("web-1", "127.0.0.9")).put(&api);
    let tls_settings = json!({"tls": {"cert_file": cert, "key_file": key, "client_ca_file": ca}});
    let server = DiscoveryServer::start(json!({"kubernetes": api.settings()}), tls_settings).await;
    let ask = |identity: Option<(&std::path::Path, &std::path::Path)>| {
        let settings = client::Settings {
            servers: vec![server.addr.to_string()],
            tls: Some(grpc::client_tls(Some(&ca), identity).expect("TLS")),
            hello: proto::Hello { name: "edge-1".into(), ..proto::Hello::default() },
            ..client::Settings::default()
        };
        let source = client::sources(settings).remove(0);
        let query = Query { service: "kubernetes/default/web:http".into(), args: Default::default() };
        source.open(&query).expect("a service")
    };
    let mut with = ask(Some((&own.0, &own.1)));
    let listing = with.next().await.expect("a list");
    assert_eq!(listing.instances.len(), 1);
    let mut without = ask(None);
    let refused = without.next().await.expect_err("no list").to_string();
    assert!(refused.contains("discovery server"), "{refused}");
    assert!(server.output().contains("gRPC"), "{}", server.output());
}

/// A cluster that is written to with a kubeconfig file, as a controller would.
struct ByKubeconfig {
    client: kube::Client,
    source: Arc<dyn discovery::Source>,
}

impl ByKubeconfig {
    async fn new(file: &str) -> ByKubeconfig {
        let read = Kubeconfig::read_from(file).expect("a kubeconfig file");
        let config = kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
            .await
            .expect("a cluster");
        let client = kube::Client::try_from(config).expect("a client");
        let settings: Kubernetes = config::typed::parse(&json!({"kubeconfig": file})).expect("settings");
        let source = discovery::kubernetes::sources(&settings, |_| None).expect("a source").remove(0);
        ByKubeconfig { client, source }
    }

    async fn send(&self, method: &str, slice: &Slice, body: bool) {
        let (namespace, name) = slice.place();
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
        let path = if method == "POST" { path } else { format!("{path}/{name}") };
        let mut object = slice.json();
        object["apiVersion"] = json!("discovery.k8s.io/v1");
        object["kind"] = json!("EndpointSlice");
        object["metadata"].as_object_mut().expect("metadata").remove("managedFields");
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let text = if body { object.to_string().into_bytes() } else { Vec::new() };
        let request = http::Request::builder().method(method).uri(path).header("content-type", kind);
        let response =
            self.client.send(request.body(Body::from(text)).expect("a request")).await.expect("an answer");
        assert!(response.status().is_success(), "{method}: {}", response.status());
    }

    /// A service without a selector lives: its slices are made, changed and removed by hand.
    async fn life(&self) {
        let service = format!("postern-test-{:08x}", fastrand::u32(..));
        let slice = Slice::new("default", &service, &service, 8080)
            .label("endpointslice.kubernetes.io/managed-by", "postern-tests");
        let query = Query { service: format!("default/{service}:http").into(), args: Default::default() };
        let mut watcher = self.source.open(&query).expect("a service");
        let mut until = async |expected: &[&str]| {
            let found = async {
                loop {
                    let listing = watcher.next().await.expect("a list");
                    let mut hosts: Vec<_> =
                        listing.instances.iter().map(|it| it.node.host.to_string()).collect();
                    hosts.sort();
                    if hosts == expected {
                        return;
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(20), found)
                .await
                .unwrap_or_else(|_| panic!("{expected:?}"));
        };
        until(&[]).await;
        self.send("POST", &slice.clone().pod(Pod::new("a", "192.0.2.1")), true).await;
        until(&["192.0.2.1"]).await;
        let two = slice.clone().pods([Pod::new("a", "192.0.2.1"), Pod::new("b", "192.0.2.2")]);
        self.send("PATCH", &two, true).await;
        until(&["192.0.2.1", "192.0.2.2"]).await;
        let leaving = slice.clone().pods([Pod::new("a", "192.0.2.1").unready(), Pod::new("b", "192.0.2.2")]);
        self.send("PATCH", &leaving, true).await;
        until(&["192.0.2.2"]).await;
        self.send("DELETE", &slice, false).await;
        until(&[]).await;
    }
}

/// Over the API server made for tests, and over a real one where `POSTERN_TEST_KUBECONFIG` names a kubeconfig file. In its
/// namespace `default` a slice of addresses that do not exist is made and removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_lives_in_a_cluster() {
    let api = KubeApi::start().await;
    let folder = TempDir::new().expect("a folder");
    let file = folder.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: one\nclusters: [{{name: c, cluster: {{server: 'http://{}'}}}}]\n\
         users: [{{name: u, user: {{token: secret}}}}]\ncontexts: [{{name: one, context: {{cluster: c, user: u}}}}]\n",
        api.addr
    );
    std::fs::write(&file, text).expect("a kubeconfig file");
    api.accept_tokens(&["secret"]);
    ByKubeconfig::new(file.to_str().expect("a path")).await.life().await;
    if let Ok(real) = std::env::var("POSTERN_TEST_KUBECONFIG") {
        ByKubeconfig::new(&real).await.life().await;
    }
}
