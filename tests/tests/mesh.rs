//! An authority, sidecars and an edge as processes: certificates come by themselves, and nothing fails while every one of
//! them is exchanged.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use e2e::ca::Authority;
use e2e::client::{Call, DEADLINE};
use e2e::clock::WallClock;
use e2e::consul::{self, Consul};
use e2e::load::Load;
use e2e::origin::{Origin, echo, grpc, websocket};
use e2e::ports::Port;
use e2e::sidecar::{Mesh, Sidecar, id};
use e2e::{Edge, Value, eventually, eventually_within, json};
use futures_util::{SinkExt, StreamExt};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

async fn authority() -> Authority {
    let limits = json!({"certificates_per_second": 1000, "certificates_burst": 1000});
    Authority::start(json!({"limits": limits})).await
}

/// A gateway with an identity of this authority, and the folder of its token.
async fn edge(authority: &Authority, routes: Value) -> (Edge, TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let mesh = json!({"trust_domain": "mesh.local", "identity": id("edge"), "ca": authority.proof(folder.path(), "edge")});
    let edge = Edge::file()
        .config(json!({"postern": {"mesh": mesh}, "nginx_config": {"http": {"enable_access_log": false}}}))
        .resources(json!({"routes": routes}))
        .start()
        .await;
    (edge, folder)
}

/// A route to a service behind a sidecar.
fn route(uri: &str, node: SocketAddr, identity: &str) -> Value {
    json!({"uri": uri, "enable_websocket": true, "upstream": {"type": "roundrobin", "scheme": "mesh",
        "nodes": {node.to_string(): 1}, "identities": [identity], "retries": 1}})
}

/// Runs `postern certs` without holding up the clients of this process.
async fn certs(authority: &Authority, args: &[&str]) -> (i32, String, String) {
    let socket = authority.data().join("operators.sock").display().to_string();
    let all: Vec<_> = ["certs"]
        .into_iter()
        .chain(args.iter().copied())
        .chain(["--socket", &socket])
        .map(str::to_owned)
        .collect();
    let run = move || e2e::edge::run(&all.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::spawn_blocking(run).await.expect("the command runs")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_edge_reaches_services_by_identity_without_a_certificate_in_its_configuration() {
    let (authority, origin) = (authority().await, echo::start().await);
    let payments = authority.sidecar("payments").inbound(origin.addr, json!({})).start().await;
    let node = payments.inbound(0);
    let routes = json!([route("/good", node, &id("payments")), route("/other", node, &id("orders"))]);
    let (edge, _folder) = edge(&authority, routes).await;
    let answer = edge.get("/good").await.expect_status(200).json();
    let told = answer["headers"]["x-forwarded-client-cert"].to_string();
    assert!(told.contains(&id("edge")) && told.contains(&id("payments")), "{told}");
    edge.get("/other").await.expect_status(502);

    let mesh = edge.call_control("/v1/mesh").await.expect_status(200).json();
    assert_eq!((&mesh["svid"]["id"], &mesh["following"]), (&json!(id("edge")), &json!(true)), "{mesh}");
    assert!(!mesh.to_string().contains("PRIVATE"), "{mesh}");
    eventually("the authority knows both", || async {
        let (_, out, _) = certs(&authority, &["status", "-o", "json"]).await;
        let status: Value = serde_json::from_str(&out).ok()?;
        (status["fleet"]["current"] == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_sidecar_drains_until_gateways_confirm_and_is_used_again_when_it_is_back() {
    let (authority, origin) = (authority().await, echo::start().await);
    let port = Port::free();
    let node = port.addr();
    let (edge, _folder) = edge(&authority, json!([route("/*", node, &id("payments"))])).await;
    // Without a word from them an hour would be waited for.
    let observers = json!({"gateways": [edge.control.to_string()], "node": node.to_string()});
    let describe = |forward: SocketAddr| {
        let inbound = json!({"ports": [{"listen": node.to_string(), "forward": forward.to_string()}]});
        authority
            .sidecar("payments")
            .config(json!({"drain": {"propagation": 3600, "observers": observers}}))
            .config(json!({"inbound": inbound}))
    };
    let mut sidecar = describe(origin.addr).start().await;
    eventually("it is reached", || async { (edge.get("/").await.status == 200).then_some(()) }).await;
    sidecar.signal(Signal::SIGTERM);
    eventually_within(Duration::from_secs(30), "the gateway has confirmed", || async {
        sidecar.output().contains("everybody has confirmed").then_some(())
    })
    .await;
    let drains = edge.call_control("/v1/drains").await.expect_status(200).json();
    assert!(drains.to_string().contains("its sidecar drains"), "{drains}");
    let addr = origin.stop().await;
    assert!(sidecar.wait().await.success(), "{}", sidecar.output());

    let sidecar = describe(addr).start().await;
    edge.get("/").await.expect_status(503);
    // Only when the application is there, too.
    let _origin = echo::named_at(addr, "again").await;
    eventually_within(Duration::from_secs(60), "it is used again", || async {
        (edge.get("/").await.status == 200).then_some(())
    })
    .await;
    let drains = edge.call_control("/v1/drains").await.expect_status(200).json();
    assert_eq!(drains, json!([]), "{}", sidecar.output());
}

#[tokio::test]
async fn who_stops_in_order_is_waited_for_by_no_rotation() {
    let authority = authority().await;
    let origin = echo::start().await;
    let mut sidecar = authority.sidecar("payments").inbound(origin.addr, json!({})).start().await;
    let mut edge = edge(&authority, json!([route("/*", sidecar.inbound(0), "payments")])).await;
    let fleet = async |what: &str, count: u64| {
        eventually_within(Duration::from_secs(30), what, || async {
            let fleet = &authority.certs_status().await["fleet"];
            (fleet["workloads"] == count && fleet["current"] == count).then_some(())
        })
        .await;
    };
    fleet("both are known", 2).await;
    sidecar.signal(Signal::SIGTERM);
    drop(origin);
    assert!(sidecar.wait().await.success(), "{}", sidecar.output());
    fleet("the gateway alone is known", 1).await;
    edge.0.signal(Signal::SIGTERM);
    assert!(edge.0.wait().await.success(), "{}", edge.0.output());
    fleet("nobody is known", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_without_its_authority_serves_what_is_not_of_the_mesh() {
    let origin = echo::start().await;
    let folder = tempfile::tempdir().unwrap();
    let nobody = e2e::ports::Port::free();
    std::fs::write(folder.path().join("token"), "pjt_x").unwrap();
    let mesh = json!({"trust_domain": "mesh.local", "ca": {"address": nobody.addr().to_string(),
        "pin": "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "token_file": folder.path().join("token")}});
    let routes =
        json!([route("/mesh", origin.addr, &id("a")), {"uri": "/plain", "upstream": origin.upstream()}]);
    let edge = Edge::file()
        .config(json!({"postern": {"mesh": mesh}}))
        .resources(json!({"routes": routes}))
        .start()
        .await;
    edge.get("/plain").await.expect_status(200);
    edge.get("/mesh").await.expect_status(503);
    let told = edge.call_control("/v1/mesh").await.json();
    assert!(told["svid"].is_null() && told["problem"].is_string(), "{told}");
    assert_eq!(origin.requests(), 1, "a node of the mesh is never spoken to in the plain");
}

/// Clients that speak all the time; what they found wrong is told at the end.
struct Streams {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    tasks: Vec<JoinHandle<Result<(), String>>>,
}

impl Streams {
    fn start() -> Streams {
        Streams { stop: Arc::default(), done: Arc::default(), tasks: Vec::new() }
    }

    /// gRPC streams of a second or two, one after the other.
    fn grpc(&mut self, addr: SocketAddr) {
        let (stop, done) = (self.stop.clone(), self.done.clone());
        self.tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let failed = |what: &str, why: &dyn std::fmt::Display| format!("gRPC: {what}: {why}");
                let mut client = grpc::WordsClient::connect(addr).await;
                let (sender, words) = grpc::outgoing();
                sender.send(grpc::word("word", 0)).await.map_err(|error| failed("send", &error))?;
                let opened = client.chat(words).await.map_err(|error| failed("open", &error))?;
                let mut answers = opened.into_inner();
                for number in 1..10 {
                    let answer =
                        timeout(DEADLINE, answers.message()).await.map_err(|error| failed("wait", &error))?;
                    answer.map_err(|error| failed("cut", &error))?.ok_or("gRPC: an early end")?;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    sender.send(grpc::word("word", number)).await.map_err(|error| failed("send", &error))?;
                }
                drop(sender);
                while answers.message().await.map_err(|error| failed("end", &error))?.is_some() {}
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }));
    }

    /// A WebSocket that stays open for `turns` messages, one after the other.
    fn websocket(&mut self, addr: SocketAddr, path: &'static str, turns: usize) {
        let (stop, done) = (self.stop.clone(), self.done.clone());
        self.tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let failed = |why: &dyn std::fmt::Display| format!("WebSocket: {why}");
                let stream = TcpStream::connect(addr).await.map_err(|error| failed(&error))?;
                let asked = tokio_tungstenite::client_async(format!("ws://mesh{path}"), stream);
                let (mut socket, _) = asked.await.map_err(|error| failed(&error))?;
                for number in 0..turns {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let text = number.to_string();
                    socket.send(text.clone().into()).await.map_err(|error| failed(&error))?;
                    let answer = timeout(DEADLINE, socket.next()).await.map_err(|error| failed(&error))?;
                    let answer = answer.ok_or("WebSocket: cut")?.map_err(|error| failed(&error))?;
                    if answer.to_text().ok() != Some(&*text) {
                        return Err(format!("WebSocket: {answer} for {text}"));
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                socket.close(None).await.map_err(|error| failed(&error))?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }));
    }

    /// How many streams ended in order, when all have.
    async fn finish(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("a client does not panic").unwrap_or_else(|error| panic!("{error}"));
        }
        self.done.load(Ordering::Relaxed)
    }
}

/// How many rotations of leafs, issuers and roots; fewer by `POSTERN_ROTATIONS=5,2,1`.
fn rotations() -> [usize; 3] {
    let given = std::env::var("POSTERN_ROTATIONS").unwrap_or_else(|_| "100,20,10".to_owned());
    let given: Vec<usize> = given.split(',').map(|count| count.parse().expect("a number")).collect();
    given.try_into().expect("three numbers")
}

/// The parts of a mesh under load: an edge and a workload that call a service, and streams that pass.
struct Busy {
    edge_load: Load,
    mesh_load: Load,
    streams: Streams,
    _origins: [Origin; 3],
    _sidecars: Vec<Sidecar>,
    _edge: (Edge, TempDir),
}

/// A rotation of a root has fewer writes than this.
const WRITES: usize = 40;
const REQUEST: &str = "GET /http HTTP/1.1\r\nhost: payments\r\n\r\n";

impl Busy {
    async fn start(authority: &Authority) -> Busy {
        let (http, words, socket) = (echo::start().await, grpc::start().await, websocket::start().await);
        let callee = authority
            .sidecar("payments")
            .inbound(http.addr, json!({}))
            .inbound(words.addr, json!({}))
            .inbound(socket.addr, json!({}))
            .start()
            .await;
        let caller = authority
            .sidecar("orders")
            .service("payments", callee.inbound(0), json!({}))
            .service("words", callee.inbound(1), json!({"identities": [id("payments")]}))
            .service("socket", callee.inbound(2), json!({"identities": [id("payments")], "protocol": "tcp"}))
            .start()
            .await;
        let routes = json!([
            route("/http", callee.inbound(0), &id("payments")),
            route("/socket", callee.inbound(2), &id("payments")),
        ]);
        let edge = edge(authority, routes).await;
        edge.0.get("/http").await.expect_status(200);
        let mut streams = Streams::start();
        streams.grpc(caller.listener(1));
        streams.websocket(caller.listener(2), "/socket", 10);
        streams.websocket(edge.0.http, "/socket", 15);
        Busy {
            edge_load: Load::start(edge.0.http, REQUEST, 200, 10, 200),
            mesh_load: Load::start(caller.listener(0), REQUEST, 200, 10, 200),
            streams,
            _origins: [http, words, socket],
            _sidecars: vec![callee, caller],
            _edge: edge,
        }
    }

    async fn finish(self) {
        let mut good = 0;
        for load in [self.edge_load, self.mesh_load] {
            let account = load.finish_after(100).await;
            account.expect_no_failure();
            assert_eq!(account.died, 0);
            good += account.good;
        }
        let streams = self.streams.finish().await;
        assert!(streams > 0, "{good} requests, no stream");
        println!("{good} requests and {streams} streams, none of them failed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn nothing_fails_while_leafs_issuers_and_roots_are_rotated_under_load() {
    let authority = authority().await;
    let busy = Busy::start(&authority).await;
    for (kind, count) in ["leaf", "issuer", "root"].into_iter().zip(rotations()) {
        let begun = std::time::Instant::now();
        for number in 0..count {
            let args = ["rotate", kind, "--soak", "200ms", "--spread", "300ms", "--timeout", "120s"];
            let (code, out, err) = certs(&authority, &args).await;
            assert_eq!(code, 0, "{kind} {number}: {out} {err}");
        }
        println!("{count} rotations ({kind}) in {:?}", begun.elapsed());
    }
    busy.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn an_authority_that_is_killed_at_every_write_of_a_rotation_fails_nothing_and_goes_on() {
    let mut authority = authority().await;
    let busy = Busy::start(&authority).await;
    let begin = ["rotate", "root", "--soak", "300ms", "--spread", "1s", "--no-wait"];
    assert_eq!(certs(&authority, &begin).await.0, 4);
    let (mut kills, mut seen) = (0, authority.sequence().expect("a record"));
    while let Some(next) = authority.next_write(seen).await {
        authority.kill();
        kills += 1;
        assert!(kills < WRITES, "{kills} writes and no end");
        seen = authority.sequence().unwrap_or(next);
        authority.run().await;
    }
    assert!(kills >= 5, "{kills} writes are too few for a rotation");
    let (code, out, err) = certs(&authority, &["watch", "--timeout", "120s"]).await;
    assert_eq!(code, 0, "{out} {err}");
    eventually_within(Duration::from_secs(60), "one root is left", || async {
        let (_, out, _) = certs(&authority, &["status", "-o", "json"]).await;
        let status: Value = serde_json::from_str(&out).ok()?;
        (status["rotation"].is_null() && status["past"][0]["ended"] == "done").then_some(())
    })
    .await;
    busy.finish().await;
}

/// Waits until calls of `caller` at its first listener are answered with `status`, and gives the answer.
async fn until_answered(caller: &Sidecar, status: u16) {
    let what = format!("calls are answered with {status}");
    eventually_within(Duration::from_secs(90), &what, || async {
        let answer = Call::get("/http").send_to(caller.listener(0)).await;
        (answer.status == status).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_that_has_expired_is_replaced_without_a_restart() {
    let Some(clock) = WallClock::new() else {
        eprintln!("faketime is not installed: no clock to move");
        return;
    };
    let limits = json!({"certificates_per_second": 1000, "certificates_burst": 1000});
    let authority = Authority::start_with(json!({"limits": limits}), clock.env()).await;
    let origin = echo::start().await;
    let callee = authority.sidecar("payments").inbound(origin.addr, json!({})).env(clock.env()).start().await;
    let service = json!({"identities": [id("payments")]});
    let caller = authority
        .sidecar("orders")
        .service("payments", callee.inbound(0), service)
        // Connections that stand go on; these do not stand for long.
        .config(json!({"limits": {"connection_age": 1}}))
        .env(clock.env())
        .start()
        .await;
    until_answered(&caller, 200).await;

    // Everybody was asleep for eleven years.
    clock.set("+4015d");
    until_answered(&caller, 502).await;
    // Each process sees the new time when it next looks.
    eventually("the authority tells that its root has ended", || async {
        (certs(&authority, &["status"]).await.0 == 2).then_some(())
    })
    .await;
    eventually("the caller is not ready", || async {
        let ready = caller.readiness().await.expect("the admin interface answers");
        (ready.status == 503 && ready.text().contains("expired")).then_some(())
    })
    .await;

    // Their tokens have ended too, and are replaced where they stand.
    for (sidecar, name) in [(&callee, "payments"), (&caller, "orders")] {
        authority.proof(&sidecar.folder, name);
    }
    let (code, out, err) =
        certs(&authority, &["recover", "--new-root", "--reason", "it has ended", "--timeout", "90s"]).await;
    assert_eq!(code, 0, "{out} {err}");
    until_answered(&caller, 200).await;
    assert_eq!(callee.ask("/status/ready").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_that_is_away_when_certificates_are_to_be_renewed_fails_nothing() {
    // What takes half a day by default is past after a minute and a half.
    let mut authority = Authority::start(json!({"longest_ttl": 150})).await;
    let origin = echo::start().await;
    let callee = authority.sidecar("payments").inbound(origin.addr, json!({})).start().await;
    let caller = authority
        .sidecar("orders")
        .service("payments", callee.inbound(0), json!({"identities": [id("payments")]}))
        // New handshakes each second.
        .config(json!({"limits": {"connection_age": 1}}))
        .start()
        .await;
    until_answered(&caller, 200).await;
    let load = Load::start(caller.listener(0), REQUEST, 200, 10, 200);
    authority.kill();
    let told = async |sidecar: &Sidecar, what: &str| sidecar.ask("/v1/identity").await.json()[what].as_u64();
    let before = [told(&callee, "renewals").await, told(&caller, "renewals").await];
    for sidecar in [&callee, &caller] {
        eventually_within(
            Duration::from_secs(100),
            "it asks for a new certificate and gets none",
            || async { (told(sidecar, "failures").await > Some(0)).then_some(()) },
        )
        .await;
        assert_eq!(sidecar.ask("/status/ready").await.status, 200);
    }
    authority.run().await;
    for (sidecar, before) in [&callee, &caller].into_iter().zip(before) {
        eventually_within(Duration::from_secs(60), "it has a new certificate", || async {
            (told(sidecar, "renewals").await > before).then_some(())
        })
        .await;
    }
    let account = load.finish_after(1000).await;
    account.expect_no_failure();
    assert_eq!(account.died, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_set_by_a_day_fails_nothing() {
    let Some(clock) = WallClock::new() else {
        eprintln!("faketime is not installed: no clock to move");
        return;
    };
    let (authority, origin) = (authority().await, echo::start().await);
    let callee = authority.sidecar("payments").inbound(origin.addr, json!({})).start().await;
    let service = json!({"identities": [id("payments")]});
    let caller = authority
        .sidecar("orders")
        .service("payments", callee.inbound(0), service)
        .env(clock.env())
        .start()
        .await;
    until_answered(&caller, 200).await;
    for offset in ["+1d", "-1d", "+0d"] {
        clock.set(offset);
        // A new connection each time: nothing is left to one that stands.
        let renewals = caller.ask("/v1/identity").await.json()["renewals"].as_u64().unwrap_or_default();
        let (code, out, err) =
            certs(&authority, &["rotate", "leaf", "--soak", "0s", "--spread", "0s", "--timeout", "60s"])
                .await;
        assert!(code == 0 || out.contains("clocks"), "{offset}: {code} {out} {err}");
        let _ = certs(&authority, &["rollback", "--reason", "clocks"]).await;
        for _ in 0..20 {
            let answer = Call::get("/http").send_to(caller.listener(0)).await;
            assert_eq!(answer.status, 200, "{offset}: {}", answer.text());
        }
        let now = caller.ask("/v1/identity").await.json();
        assert!(now["renewals"].as_u64() >= Some(renewals), "{offset}: {now}");
        assert_eq!(caller.ask("/status/ready").await.status, 200, "{offset}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sidecars_with_identities_of_consul_live_through_a_change_of_its_authority() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::with(json!({"connect": {"enabled": true}})).await;
    let roots = eventually_within(Duration::from_secs(30), "Consul has roots", || async {
        let roots = consul.get("/v1/agent/connect/ca/roots").await.json();
        roots["Roots"].is_array().then_some(roots)
    })
    .await;
    let domain = roots["TrustDomain"].as_str().expect("a domain").to_owned();
    let config = json!({"trust_domain": domain, "ca": {"consul": consul.url()}});
    let origin = echo::start().await;
    let named = |name: &str| format!("spiffe://{domain}/ns/default/dc/dc1/svc/{name}");
    let mesh = Mesh::new();
    let bare = json!({"ca": {"files": null}});
    let start = |name: &str| mesh.sidecar(name).config(bare.clone()).config(config.clone());
    let callee = start("payments").inbound(origin.addr, json!({})).start().await;
    let service = json!({"identities": [named("payments")]});
    let caller = start("orders").service("payments", callee.inbound(0), service).start().await;
    let answer = Call::get("/http").send_to(caller.listener(0)).await.expect_status(200).json();
    let told = answer["headers"]["x-forwarded-client-cert"].to_string();
    assert!(told.contains(&named("orders")), "{told}");

    let load = Load::start(caller.listener(0), REQUEST, 200, 10, 200);
    let issuer = async |sidecar: &Sidecar| sidecar.ask("/v1/identity").await.json()["svid"]["issuer"].clone();
    let before = [issuer(&callee).await, issuer(&caller).await];
    let key = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    let changed = json!({"Provider": "consul", "Config": {"PrivateKey": key, "RootCert": ""}});
    consul.put("/v1/connect/ca/configuration", &changed).await;
    // Agents spread the renewal of leaves over half a minute.
    eventually_within(Duration::from_secs(90), "both have certificates below the new root", || async {
        let now = [issuer(&callee).await, issuer(&caller).await];
        (now[0] != before[0] && now[1] != before[1]).then_some(())
    })
    .await;
    load.finish_after(100).await.expect_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_gives_its_identity_by_the_workload_api_and_another_one_takes_it() {
    let (authority, origin) = (authority().await, echo::start().await);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let giver = authority.sidecar("orders").config(json!({"workload_api": {"socket": socket}})).start().await;
    let callee = authority.sidecar("payments").inbound(origin.addr, json!({})).start().await;
    let taken = json!({"ca": {"files": null, "workload_api": format!("unix:{}", socket.display())}});
    let service = json!({"identities": [id("payments")]});
    let mesh = Mesh::new();
    let taker =
        mesh.sidecar("orders").config(taken).service("payments", callee.inbound(0), service).start().await;
    let answer = Call::get("/").send_to(taker.listener(0)).await.expect_status(200).json();
    let told = answer["headers"]["x-forwarded-client-cert"].to_string();
    assert!(told.contains(&id("orders")), "{told}");
    let serial = async |sidecar: &Sidecar| sidecar.ask("/v1/identity").await.json()["svid"]["serial"].clone();
    assert_eq!(serial(&giver).await, serial(&taker).await);
}
