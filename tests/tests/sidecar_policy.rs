//! Policies of a sidecar over real sockets: who may ask what, bytes that nobody understands, live connections after a
//! change, who called, where the application may go, and what would be decided.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use e2e::client::{Call, DEADLINE};
use e2e::edge::binary;
use e2e::origin::{Origin, echo};
use e2e::sidecar::{Mesh, Sidecar, id};
use e2e::{Value, eventually, json};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

const SHOP: &str = "spiffe://mesh.local/ns/shop/sa/web";
const JOBS: &str = "spiffe://mesh.local/ns/jobs/sa/nightly";

/// A sidecar of `orders` before an application at `origin`, with these policies.
async fn sidecar(mesh: &Mesh, origin: SocketAddr, port: Value, policies: Value) -> Sidecar {
    mesh.sidecar("orders").inbound(origin, port).proxies().config(json!({"policies": policies})).start().await
}

/// Sends every byte back.
async fn mirror() -> Origin {
    Origin::tcp(|mut stream, _| async move {
        let mut piece = [0; 1024];
        while let Ok(read @ 1..) = stream.read(&mut piece).await {
            if stream.write_all(&piece[..read]).await.is_err() {
                return;
            }
        }
    })
    .await
}

fn from(identity: &str) -> Value {
    json!([{"identities": [identity]}])
}

#[tokio::test]
async fn requests_pass_or_are_refused_by_who_asks_what() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let policies = json!({"default": "deny", "authorization": [
        {"name": "shop", "action": "allow", "rules": [{"from": [{"namespaces": ["shop"]}]}]},
        {"name": "jobs", "action": "allow", "rules": [
            {"from": from(JOBS), "to": [{"methods": ["GET"], "paths": ["/reports/*"]}]},
        ]},
        {"name": "no-admin", "action": "deny", "rules": [{"to": [{"paths": ["/admin", "/admin/*"]}]}]},
        {"name": "watch", "action": "audit", "rules": [{"to": [{"methods": ["DELETE"]}]}]},
    ]});
    let sidecar = sidecar(&mesh, origin.addr, json!({}), policies).await;
    let to = sidecar.inbound(0);
    let (mut shop, mut jobs) = (mesh.caller(SHOP).http2(to).await, mesh.caller(JOBS).http2(to).await);
    for (who, method, path, status) in [
        ("shop", "GET", "/", 200),
        ("shop", "DELETE", "/", 200),
        ("shop", "GET", "/admin/x", 403),
        ("shop", "GET", "/%61dmin", 403),
        ("shop", "GET", "/x/../admin/", 403),
        ("shop", "GET", "/admin%2Fx", 403),
        ("jobs", "GET", "/reports/1", 200),
        ("jobs", "GET", "/", 403),
        ("jobs", "POST", "/reports/1", 403),
    ] {
        let caller = if who == "shop" { &mut shop } else { &mut jobs };
        let answer = caller.send(Call::new(method, path)).await;
        assert_eq!(answer.status, status, "{who} {method} {path}");
    }
    let refused = shop.send(Call::get("/admin")).await;
    let told = refused.header("proxy-status");
    assert_eq!(told, Some("postern; error=http_request_denied; details=\"policy_denied:no-admin\""));
    let told = sidecar.ask("/v1/policies").await.json();
    let policy = |name: &str| {
        let all = told["authorization"].as_array().expect("a list");
        all.iter().find(|policy| policy["name"] == name).expect("a policy").clone()
    };
    assert_eq!(policy("watch")["audited"], 1, "{told}");
    assert_eq!(policy("no-admin")["denied"], 5, "{told}");
    assert_eq!(policy("jobs")["allowed"], 1, "{told}");
    assert_eq!(origin.requests(), 3, "nothing that was refused has reached the application");
}

#[tokio::test]
async fn the_application_learns_who_called_and_nothing_that_a_caller_says_of_itself() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let sidecar = sidecar(&mesh, origin.addr, json!({}), json!({})).await;
    let mut shop = mesh.caller(SHOP).http2(sidecar.inbound(0)).await;
    let call = Call::get("/")
        .header("x-forwarded-client-cert", "URI=spiffe://mesh.local/root")
        .header("x_forwarded_client_cert", "URI=spiffe://mesh.local/root")
        .header("l5d-client-id", "root")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let seen = shop.send(call).await.expect_status(200).json();
    let told = seen["headers"]["x-forwarded-client-cert"].as_array().expect("the field");
    let [told] = &told[..] else { panic!("{told:?}") };
    let told = told.as_str().expect("text");
    assert!(told.starts_with(&format!("By={};Hash=", id("orders"))), "{told}");
    assert!(told.ends_with(&format!(";Subject=\"\";URI={SHOP}")), "{told}");
    let headers = seen["headers"].as_object().expect("fields");
    assert!(!headers.contains_key("x_forwarded_client_cert") && !headers.contains_key("l5d-client-id"));
    assert!(headers.contains_key("traceparent"));
}

#[tokio::test]
async fn bytes_pass_by_identity_and_are_cut_when_a_change_forbids_them() {
    let (mesh, origin) = (Mesh::new(), mirror().await);
    let port = origin.addr.port();
    let allow = |who: &str| {
        json!({"default": "deny", "authorization": [
            {"name": "db", "action": "allow", "ports": [port], "rules": [{"from": from(who)}]},
        ]})
    };
    let mut sidecar = sidecar(&mesh, origin.addr, json!({"protocol": "tcp"}), allow(SHOP)).await;
    let to = sidecar.inbound(0);
    let (shop, jobs) = (mesh.caller(SHOP), mesh.caller(JOBS));

    let mut refused = jobs.bytes(to).await;
    let _ = refused.write_all(b"hello").await;
    let mut got = Vec::new();
    let _ = timeout(DEADLINE, refused.read_to_end(&mut got)).await.expect("an end");
    assert!(got.is_empty() && origin.connections() == 0, "no byte has reached the application");

    let mut allowed = shop.bytes(to).await;
    allowed.write_all(b"hello").await.expect("a byte that may pass");
    let mut echoed = [0; 5];
    timeout(DEADLINE, allowed.read_exact(&mut echoed)).await.expect("an answer").expect("our bytes");
    assert_eq!(&echoed, b"hello");

    sidecar.reload(json!({"policies": allow(JOBS)})).await;
    let mut rest = Vec::new();
    let _ = timeout(DEADLINE, allowed.read_to_end(&mut rest)).await.expect("an end");
    assert!(rest.is_empty());
    let mut now = jobs.bytes(to).await;
    now.write_all(b"again").await.expect("a byte that may pass now");
    timeout(DEADLINE, now.read_exact(&mut echoed)).await.expect("an answer").expect("our bytes");
}

#[tokio::test]
async fn requests_under_way_are_ended_by_a_change_that_forbids_them_and_others_are_not() {
    let origin = Origin::http(|request| async move {
        if request.uri().path() == "/slow" {
            tokio::time::sleep(Duration::from_secs(600)).await;
        }
        echo::answer("slow", request)
    })
    .await;
    let mesh = Mesh::new();
    let mut sidecar = sidecar(&mesh, origin.addr, json!({}), json!({})).await;
    let to = sidecar.inbound(0);
    let (mut shop, mut jobs) = (mesh.caller(SHOP).http2(to).await, mesh.caller(JOBS).http2(to).await);
    let mut idle = mesh.caller(JOBS).http2(to).await;
    idle.send(Call::get("/")).await.expect_status(200);
    let under_way = tokio::spawn(async move { jobs.try_send(Call::get("/slow")).await.is_err() });
    eventually("the request is at the application", || async { (origin.requests() >= 2).then_some(()) })
        .await;
    let deny = |rule: Value| json!({"policies": {"authorization": [{"name": "no", "action": "deny", "rules": [rule]}]}});
    sidecar.reload(deny(json!({"from": from(JOBS), "to": [{"paths": ["/slow"]}]}))).await;
    assert!(timeout(DEADLINE, under_way).await.expect("an end").expect("no panic"), "it has failed");
    idle.send(Call::get("/")).await.expect_status(200);
    shop.send(Call::get("/")).await.expect_status(200);

    sidecar.reload(deny(json!({"from": from(JOBS)}))).await;
    eventually("the idle connection is closed", || async { idle.is_closed().then_some(()) }).await;
    shop.send(Call::get("/")).await.expect_status(200);
}

#[tokio::test]
async fn a_file_that_is_wrong_changes_nothing() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let allow = json!({"default": "deny", "authorization": [
        {"name": "shop", "action": "allow", "rules": [{"from": from(SHOP)}]},
    ]});
    let sidecar = sidecar(&mesh, origin.addr, json!({}), allow).await;
    let mut wrong = sidecar.config.clone();
    wrong["policies"] = json!({"default": "allow", "authorization": [
        {"name": "nobody", "action": "deny", "services": ["other"], "rules": [{"from": from(SHOP)}]},
    ]});
    sidecar.write(&wrong.to_string());
    eventually("the mistake is told", || async {
        let told = sidecar.ask("/v1/config").await.json()["problem"].to_string();
        told.contains("/policies/authorization/0/services").then_some(())
    })
    .await;
    let mut jobs = mesh.caller(JOBS).http2(sidecar.inbound(0)).await;
    jobs.send(Call::get("/")).await.expect_status(403);
    let mut shop = mesh.caller(SHOP).http2(sidecar.inbound(0)).await;
    shop.send(Call::get("/")).await.expect_status(200);
}

#[tokio::test]
async fn the_application_goes_where_egress_lets_it() {
    let (mesh, web, other) = (Mesh::new(), echo::start().await, echo::start().await);
    let policies = json!({"egress": {"default": "deny", "rules": [
        {"name": "web", "action": "allow", "cidrs": ["127.0.0.0/8"], "ports": [web.addr.port()]},
    ]}});
    let sidecar = sidecar(&mesh, web.addr, json!({}), policies).await;
    let through = |origin: &Origin| {
        let node = origin.addr.to_string();
        Call::get(&format!("http://{node}/")).header("host", &node).send_to(sidecar.http_proxy())
    };
    through(&web).await.expect_status(200);
    let refused = through(&other).await.expect_status(403);
    let status = refused.header("proxy-status").expect("a reason");
    assert!(status.contains("egress_denied"), "{status}");
    assert_eq!(other.requests(), 0);
    let told = sidecar.ask("/v1/policies").await.json();
    assert_eq!(told["egress"][0]["allowed"], 1, "{told}");
}

/// What a client of the sidecar's HTTP proxy hears when it asks for a way, and the connection.
async fn connect(sidecar: &Sidecar, to: &str) -> (String, TcpStream) {
    let mut stream = e2e::client::connect(sidecar.http_proxy()).await;
    let ask = format!("CONNECT {to} HTTP/1.1\r\nhost: {to}\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.expect("a request");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let byte = timeout(DEADLINE, stream.read_u8()).await.expect("an answer in time");
        answer.push(byte.expect("an answer"));
    }
    (String::from_utf8_lossy(&answer).into_owned(), stream)
}

/// The code that a client of the sidecar's SOCKS5 proxy hears.
async fn socks(sidecar: &Sidecar, host: &str, port: u16) -> u8 {
    let mut stream = e2e::client::connect(sidecar.socks5()).await;
    let mut ask = vec![5, 1, 0, 5, 1, 0, 3, u8::try_from(host.len()).expect("a short name")];
    ask.extend_from_slice(host.as_bytes());
    ask.extend_from_slice(&port.to_be_bytes());
    stream.write_all(&ask).await.expect("a request");
    let mut answer = [0; 12];
    timeout(DEADLINE, stream.read_exact(&mut answer)).await.expect("an answer in time").expect("an answer");
    answer[3]
}

#[tokio::test]
async fn a_name_is_judged_by_where_it_leads() {
    let (mesh, open, shut) = (Mesh::new(), echo::start().await, echo::start().await);
    let [open_port, shut_port] = [&open, &shut].map(|origin| origin.addr.port());
    let deny = json!({"egress": {"default": "allow", "rules": [
        {"name": "inside", "action": "deny", "cidrs": ["127.0.0.0/8"], "ports": [shut_port]},
        {"name": "name", "action": "deny", "hosts": ["shut.test"]},
    ]}});
    let allow = json!({"egress": {"default": "deny", "rules": [
        {"name": "both", "action": "allow", "hosts": ["localhost"], "cidrs": ["127.0.0.0/8"], "ports": [open_port]},
    ]}});
    let mut sidecar = sidecar(&mesh, open.addr, json!({}), deny).await;
    for round in 0..2 {
        if round == 1 {
            sidecar.reload(json!({"policies": allow})).await;
        }
        for (port, status, told, code) in [(open_port, 200, "200", 0), (shut_port, 403, "403", 2)] {
            let node = format!("localhost:{port}");
            let call = Call::get(&format!("http://{node}/")).header("host", &node);
            let answer = call.send_to(sidecar.http_proxy()).await;
            assert_eq!(answer.status, status, "{node}: {}", answer.text());
            assert!(connect(&sidecar, &node).await.0.starts_with(&format!("HTTP/1.1 {told}")), "{node}");
            assert_eq!(socks(&sidecar, "localhost", port).await, code, "{node}");
        }
    }
    assert_eq!(shut.connections(), 0, "nobody was connected");
    assert!(open.requests() >= 2);
}

#[tokio::test]
async fn a_name_does_not_lead_back_to_the_sidecar_nor_past_a_rule_by_its_last_dot() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let policies = json!({"egress": {"default": "allow", "rules": [
        {"name": "name", "action": "deny", "hosts": ["localhost"], "ports": [origin.addr.port()]},
    ]}});
    let sidecar = sidecar(&mesh, origin.addr, json!({}), policies).await;
    let own = format!("localhost:{}", sidecar.http_proxy().port());
    let call = Call::get(&format!("http://{own}/")).header("host", &own);
    let answer = call.send_to(sidecar.http_proxy()).await;
    assert_eq!(answer.status, 508, "{}", answer.text());
    for name in ["localhost", "localhost.", "LocalHost."] {
        let told = connect(&sidecar, &format!("{name}:{}", origin.addr.port())).await.0;
        assert!(told.starts_with("HTTP/1.1 403"), "{name}: {told}");
    }
    assert_eq!(origin.connections(), 0);
}

#[tokio::test]
async fn the_server_name_of_tls_is_asked_about() {
    let mesh = Mesh::new();
    let public = e2e::certs::Authority::new("public");
    let leaf = public.server(&["good.test", "evil.test"]);
    let origin = Origin::https(leaf.server_config(&["http/1.1"]), |request| async move {
        echo::answer("outside", request)
    })
    .await;
    let policies = json!({"egress": {"default": "allow", "rules": [
        {"name": "evil", "action": "deny", "hosts": ["evil.test"]},
    ]}});
    let sidecar = sidecar(&mesh, origin.addr, json!({}), policies).await;
    let config = public.client_config().alpn(&["http/1.1"]).build();
    for (name, passes) in [("good.test", true), ("evil.test", false), ("Evil.Test", false)] {
        let (told, stream) = connect(&sidecar, &origin.addr.to_string()).await;
        assert!(told.starts_with("HTTP/1.1 200"), "{told}");
        let server = ServerName::try_from(name).expect("a name");
        let shaken = TlsConnector::from(config.clone()).connect(server, stream);
        let shaken = timeout(DEADLINE, shaken).await.expect("an end in time");
        assert_eq!(shaken.is_ok(), passes, "{name}: {:?}", shaken.err());
    }
    let told = sidecar.ask("/v1/policies").await.json();
    assert_eq!(told["egress"][0]["denied"], 2, "{told}");
}

/// A signed token with these claims.
fn token(key: &Ed25519KeyPair, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(&json!({"alg": "EdDSA", "typ": "JWT", "kid": "one"})), part(claims));
    let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
    format!("Bearer {signed}.{signature}")
}

#[tokio::test]
async fn claims_of_tokens_decide() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let pair = || {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
        Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("our own key")
    };
    let (key, other) = (pair(), pair());
    let x = URL_SAFE_NO_PAD.encode(key.public_key().as_ref());
    let keys = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "one", "x": x}]}).to_string();
    let mut jwks = Some(
        Origin::http(move |_| {
            let keys = keys.clone();
            async move { http::Response::new(keys.into()) }
        })
        .await,
    );
    let uri = format!("http://{}/keys", jwks.as_ref().expect("a server").addr);
    let rules = json!([
        {"name": "administrators-delete", "action": "allow", "rules": [
            {"to": [{"methods": ["DELETE"]}], "when": [["jwt_claim_realm_access.roles", "has", "admin"]]},
            {"to": [{"not_methods": ["DELETE"]}]},
        ]},
        {"name": "not-mallory", "action": "deny", "rules": [{"when": [["jwt_claim_sub", "==", "mallory"]]}]},
    ]);
    let issuer = "https://login.example.com";
    let given = json!({"issuer": issuer, "audiences": ["orders"], "jwks": {"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "one", "x": x}]}});
    let fetched = json!({"issuer": issuer, "audiences": ["orders"], "jwks_uri": uri});
    for issuers in [given, fetched] {
        let policies = json!({"tokens": [issuers], "authorization": rules});
        let mut sidecar = sidecar(&mesh, origin.addr, json!({}), policies).await;
        let mut shop = mesh.caller(SHOP).http2(sidecar.inbound(0)).await;
        let exp = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs() + 600;
        let claims = |sub: &str, roles: Value| json!({"iss": issuer, "aud": "orders", "sub": sub, "exp": exp, "realm_access": {"roles": roles}});
        let with = |patch: Value| {
            let mut claims = claims("alice", json!(["admin"]));
            claims.as_object_mut().expect("an object").extend(patch.as_object().cloned().expect("an object"));
            claims
        };
        eventually("the keys are known", || async {
            let mut shop = mesh.caller(SHOP).http2(sidecar.inbound(0)).await;
            let call = Call::get("/").header("authorization", &token(&key, &with(json!({}))));
            (shop.send(call).await.status == 200).then_some(())
        })
        .await;
        for (what, method, token, status) in [
            ("an administrator deletes", "DELETE", token(&key, &with(json!({}))), 200),
            ("another does not", "DELETE", token(&key, &claims("bob", json!(["user"]))), 403),
            ("another reads", "GET", token(&key, &claims("bob", json!(["user"]))), 200),
            ("somebody who is denied", "GET", token(&key, &claims("mallory", json!(["admin"]))), 403),
            ("no token, and a claim is asked for", "DELETE", String::new(), 403),
            ("no token, and none is", "GET", String::new(), 200),
            ("signed by another", "GET", token(&other, &with(json!({}))), 401),
            ("for another", "GET", token(&key, &with(json!({"aud": "billing"}))), 401),
            ("of another", "GET", token(&key, &with(json!({"iss": "https://evil.test"}))), 401),
            ("ended", "GET", token(&key, &with(json!({"exp": 1_000}))), 401),
            ("without an end", "GET", token(&key, &with(json!({"exp": null}))), 401),
            ("no token at all", "GET", "Bearer x.y".to_owned(), 401),
        ] {
            let call = Call::new(method, "/");
            let call = if token.is_empty() { call } else { call.header("authorization", &token) };
            let answer = shop.send(call).await;
            assert_eq!(answer.status, status, "{what}: {}", answer.text());
        }
        if sidecar.config.pointer("/policies/tokens/0/jwks_uri").is_some() {
            jwks.take().expect("a server").stop().await;
        }
        sidecar.reload(json!({"limits": {"detect": 0.2}})).await;
        let call = Call::get("/").header("authorization", &token(&key, &with(json!({}))));
        assert_eq!(shop.send(call).await.status, 200, "what was fetched outlives a change of the file");
    }
}

#[tokio::test]
async fn probes_pass_without_an_identity_and_nothing_else_passes_with_them() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let probes = json!({"inbound": {"probes": {"from": ["127.0.0.0/8"], "paths": ["/healthz"]}}});
    let builder = mesh.sidecar("orders").inbound(origin.addr, json!({})).config(probes);
    let mut sidecar = builder.config(json!({"policies": {"default": "deny"}})).start().await;
    let to = sidecar.inbound(0);
    for (method, path, status) in
        [("GET", "/healthz", 200), ("HEAD", "/healthz", 200), ("POST", "/healthz", 403), ("GET", "/", 403)]
    {
        let answer = Call::new(method, path).send_to(to).await;
        assert_eq!(answer.status, status, "{method} {path}");
    }
    assert_eq!(origin.requests(), 2);
    let heard = |bytes: &'static str| e2e::client::exchange(to, bytes, DEADLINE);
    assert_eq!(heard("no HTTP at all\r\n\r\n").await.text(), "", "bytes are no probe");
    sidecar.reload(json!({"inbound": {"probes": {"from": ["192.0.2.0/24"]}}})).await;
    let outcome = heard("GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(outcome.text(), "", "it is not who probes any more");
}

#[tokio::test]
async fn it_is_told_what_would_be_decided_and_why() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let port = origin.addr.port();
    let policies = json!({"default": "deny", "authorization": [
        {"name": "shop", "action": "allow", "rules": [{"from": from(SHOP), "to": [{"methods": ["GET"]}]}]},
    ]});
    let sidecar = sidecar(&mesh, origin.addr, json!({}), policies).await;
    let explain = |line: String| {
        let mut command = std::process::Command::new(binary());
        command.args(["sidecar", "explain", "--admin", &sidecar.admin.to_string()]);
        let output = command.args(line.split_whitespace()).output().expect("the binary");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).expect("text"))
    };
    for (line, code, told) in [
        (
            format!("--port {port} --identity {SHOP} -X GET --path /a&b=c"),
            0,
            "allowed by policy shop, rule 1\n",
        ),
        (format!("--port {port} --identity {JOBS} -X GET"), 1, "refused by "),
        (format!("--port {port} --identity {SHOP}"), 1, "refused by "),
        ("--port 0".to_owned(), 3, "`port` is missing"),
    ] {
        let (ended, said) = explain(line.clone());
        assert!(ended == Some(code) && said.contains(told), "{line}: {ended:?} {said}");
    }
    let counts = sidecar.ask("/v1/policies").await.json();
    assert_eq!(counts["authorization"][0]["allowed"], 0, "nothing is counted: {counts}");
}
