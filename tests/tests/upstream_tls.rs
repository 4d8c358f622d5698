//! TLS to origins: verified when asked for, with a certificate of our own when asked for.

use e2e::certs::{Authority, Leaf};
use e2e::client::Call;
use e2e::load::Load;
use e2e::origin::{Origin, echo, grpc};
use e2e::{Edge, Value, eventually, json};

fn upstream(origin: &Origin, tls: Value) -> Value {
    json!({"type": "roundrobin", "scheme": "https", "pass_host": "rewrite", "upstream_host": "origin.test",
           "nodes": {origin.node(): 1}, "tls": tls})
}

async fn one_route(upstream: Value) -> Edge {
    Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": upstream})).start().await
}

async fn origin(leaf: &Leaf) -> Origin {
    echo::tls(leaf.server_config(&["http/1.1"]), "secure").await
}

#[tokio::test]
async fn without_verification_any_certificate_will_do() {
    let ca = Authority::new("ca");
    let origin = origin(&ca.server(&["somebody.else.test"])).await;
    let edge = one_route(upstream(&origin, json!({"verify": false}))).await;
    let seen = edge.get("/").await.expect_status(200).json();
    assert_eq!(seen["headers"]["host"], json!(["origin.test"]));
}

#[tokio::test]
async fn verification_really_verifies() {
    let (ca, other) = (Authority::new("ca"), Authority::new("other"));
    let trust = json!({"verify": true, "ca": [ca.pem()]});
    let good = origin(&ca.server(&["origin.test"])).await;
    one_route(upstream(&good, trust.clone())).await.get("/").await.expect_status(200);
    let wrong_name = origin(&ca.server(&["somebody.else.test"])).await;
    let wrong_authority = origin(&other.server(&["origin.test"])).await;
    for origin in [wrong_name, wrong_authority] {
        let answer = one_route(upstream(&origin, trust.clone())).await.get("/").await.expect_status(502);
        assert!(answer.header("proxy-status").is_some(), "{answer:?}");
        assert_eq!(origin.requests(), 0, "no request was sent");
    }
    // Without a list of its own the upstream is held against the system's, which does not know our authority.
    let edge = one_route(upstream(&good, json!({"verify": true}))).await;
    edge.get("/").await.expect_status(502);
}

#[tokio::test]
async fn verification_is_by_the_trusted_certificates_of_the_process_too() {
    let ca = Authority::new("ca");
    let good = origin(&ca.server(&["origin.test"])).await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("ca.pem");
    std::fs::write(&file, ca.pem()).expect("a file");
    let edge = Edge::file()
        .config(json!({"apisix": {"ssl": {"ssl_trusted_certificate": file}}}))
        .route(json!({"id": "r", "uri": "/*", "upstream": upstream(&good, json!({"verify": true}))}))
        .start()
        .await;
    edge.get("/").await.expect_status(200);
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_the_origin() {
    let (ca, clients) = (Authority::new("ca"), Authority::new("clients"));
    let leaf = ca.server(&["origin.test"]);
    let origin = echo::tls(leaf.server_config_asking(&["http/1.1"], &clients), "asking").await;
    let client = clients.client("gateway.test");
    let edge = Edge::file()
        .route(json!({"id": "1", "uri": "/inline", "upstream":
                      upstream(&origin, json!({"client_cert": client.cert, "client_key": client.key}))}))
        .route(json!({"id": "2", "uri": "/by-id", "upstream":
                      upstream(&origin, json!({"client_cert_id": "c"}))}))
        .route(json!({"id": "3", "uri": "/without", "upstream": upstream(&origin, json!({}))}))
        .resource("ssls", json!({"id": "c", "type": "client", "cert": client.cert, "key": client.key}))
        .start()
        .await;
    edge.get("/inline").await.expect_status(200);
    edge.get("/by-id").await.expect_status(200);
    edge.get("/without").await.expect_status(502);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_certificate_is_exchanged_under_load_and_others_do_not_notice() {
    let (ca, clients) = (Authority::new("ca"), Authority::new("clients"));
    let renewed = clients.intermediate("renewed");
    let leaf = ca.server(&["origin.test"]);
    let asking = |of: &Authority, name: &'static str| {
        let config = leaf.server_config_asking(&["http/1.1"], of);
        async move { echo::tls(config, name).await }
    };
    let (shop, bank) = (asking(&clients, "shop").await, asking(&clients, "bank").await);
    // It takes the certificate that comes, and not the one that goes.
    let strict = asking(&renewed, "strict").await;
    let certificate = |leaf: &Leaf| json!({"type": "client", "cert": leaf.cert, "key": leaf.key});
    let edge = Edge::embedded().start().await;
    for name in ["shop", "bank"] {
        edge.put(&format!("ssls/{name}"), certificate(&clients.client(&format!("{name}.gateway.test"))))
            .await;
    }
    for (path, certificate, origin) in
        [("shop", "shop", &shop), ("bank", "bank", &bank), ("strict", "shop", &strict)]
    {
        let upstream = upstream(origin, json!({"client_cert_id": certificate}));
        edge.put(&format!("routes/{path}"), json!({"uri": format!("/{path}"), "upstream": upstream})).await;
    }
    edge.until_status("/shop", 200).await;
    edge.until_status("/bank", 200).await;
    edge.until_status("/strict", 502).await;

    let load = |path: &str| {
        Load::start(edge.http, &format!("GET /{path} HTTP/1.1\r\nhost: a.test\r\n\r\n"), 200, 4, 400)
    };
    let loads = [load("shop"), load("bank")];
    let begun = bank.requests();
    eventually("requests flow", || async { (bank.requests() > begun + 100).then_some(()) }).await;
    edge.put("ssls/shop", certificate(&renewed.client("shop.gateway.test"))).await;
    edge.until_status("/strict", 200).await;
    let begun = [shop.requests(), bank.requests()];
    eventually("requests go on", || async {
        (shop.requests() > begun[0] + 100 && bank.requests() > begun[1] + 100).then_some(())
    })
    .await;
    assert_eq!(
        bank.open_connections(),
        bank.connections(),
        "no connection with another certificate was closed"
    );
    for load in loads {
        load.finish().await.expect_no_failure();
    }
}

#[tokio::test]
async fn the_name_sent_to_the_origin_is_the_host_that_is_passed() {
    let ca = Authority::new("ca");
    let good = origin(&ca.server(&["outer.test"])).await;
    let mut upstream = upstream(&good, json!({"verify": true, "ca": [ca.pem()]}));
    upstream["pass_host"] = json!("pass");
    upstream.as_object_mut().expect("an upstream").remove("upstream_host");
    let edge = one_route(upstream).await;
    edge.send(Call::get("/").header("host", "outer.test")).await.expect_status(200);
    edge.send(Call::get("/").header("host", "third.test")).await.expect_status(502);
}

#[tokio::test]
async fn an_origin_without_tls_is_a_502() {
    let plain = echo::start().await;
    let edge = one_route(upstream(&plain, json!({}))).await;
    edge.get("/").await.expect_status(502);
}

#[tokio::test]
async fn grpcs_reaches_a_grpc_service_over_tls() {
    let ca = Authority::new("ca");
    let leaf = ca.server(&["origin.test"]);
    let service = grpc::tls(leaf.server_config(&["h2"])).await;
    let mut upstream = upstream(&service, json!({"verify": true, "ca": [ca.pem()]}));
    upstream["scheme"] = json!("grpcs");
    let edge = one_route(upstream).await;
    let mut client = grpc::WordsClient::connect(edge.http).await;
    let answer = client.unary(tonic::Request::new(grpc::word("hello", 1))).await.expect("a call");
    assert_eq!(answer.get_ref().text, "HELLO");
}
