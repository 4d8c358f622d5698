//! Applications that know nothing of their sidecars: on machines of their own, with connections that the kernel redirects.

use std::net::SocketAddr;

use e2e::client::{Call, Connection, DEADLINE, Raw};
use e2e::edge::binary;
use e2e::machine::Machine;
use e2e::origin::{Origin, echo, grpc, read_head, write_answer};
use e2e::sidecar::{Mesh, Sidecar, SidecarBuilder, id};
use e2e::{Answer, Value, eventually, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Of the sidecars' own packets.
const MARK: &str = "0x505";

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Starts a sidecar on a machine, in transparent mode, and has the machine's connections redirected to it.
async fn transparent(machine: &Machine, builder: SidecarBuilder, patch: Value) -> Sidecar {
    let transparent = json!({
        "inbound": {"transparent": true},
        "outbound": {"transparent": true},
        "capture": {"mark": MARK},
    });
    let mut sidecar = machine.run(async move { builder.config(transparent).config(patch).launch() }).await;
    let file = sidecar.folder.join("sidecar.yaml");
    machine.namespace.sh(&format!("{} sidecar capture install -c {}", binary().display(), file.display()));
    machine
        .run(async move {
            sidecar.until_ready().await;
            sidecar
        })
        .await
}

/// A service at these nodes, which are those of `payments`.
fn service(name: &str, nodes: &[&str], more: Value) -> Value {
    let nodes: Vec<Value> = nodes
        .iter()
        .map(|node| {
            let node = addr(node);
            let mut member = json!({"host": node.ip().to_string(), "port": node.port(), "weight": 1});
            member.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
            member
        })
        .collect();
    json!({"name": name, "upstream": {"type": "roundrobin", "nodes": nodes}, "identities": [id("payments")]})
}

/// An echo at an address of this machine.
async fn echo_at(machine: &Machine, at: &'static str) -> Origin {
    machine.run(async move { echo::named_at(addr(at), "payments").await }).await
}

/// A server that speaks first, or one that waits; both send back what comes.
async fn talker(machine: &Machine, at: &'static str, first: bool) -> Origin {
    machine
        .run(Origin::tcp_at(addr(at), move |mut stream, _| async move {
            if first && stream.write_all(b"220 ready\r\n").await.is_err() {
                return;
            }
            let mut read = vec![0; 1024];
            while let Ok(count @ 1..) = stream.read(&mut read).await {
                if stream.write_all(&read[..count]).await.is_err() {
                    return;
                }
            }
        }))
        .await
}

/// What a talker says: its greeting if it speaks first, and an echo.
async fn talk(to: &'static str, first: bool) -> String {
    let talking = async {
        let mut stream = TcpStream::connect(addr(to)).await?;
        let mut said = vec![0; 11];
        if first {
            stream.read_exact(&mut said).await?;
        }
        stream.write_all(b"hello there").await?;
        stream.read_exact(&mut said).await?;
        std::io::Result::Ok(String::from_utf8_lossy(&said).into_owned())
    };
    timeout(DEADLINE, talking).await.expect("an answer in time").unwrap_or_else(|error| error.to_string())
}

/// Who called, as the application was told.
fn caller(answer: &Answer) -> String {
    answer.json()["headers"]["x-forwarded-client-cert"].to_string()
}

#[tokio::test]
async fn everything_passes_by_the_sidecars_of_applications_that_know_nothing_of_them() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let http = [echo_at(&far, "0.0.0.0:8080").await, echo_at(&far, "[fd09::2]:8080").await];
    let _calls = far.run(async { grpc::start_at(addr("0.0.0.0:50051")).await }).await;
    let _talkers = [talker(&far, "0.0.0.0:9001", true).await, talker(&far, "0.0.0.0:9002", false).await];
    let _callee = transparent(&far, mesh.sidecar("payments"), json!({})).await;
    let services = json!([
        service("web", &["10.9.0.2:8080", "[fd09::2]:8080"], json!({})),
        service("calls", &["10.9.0.2:50051"], json!({})),
        service("mail", &["10.9.0.2:9001"], json!({})),
        service("lines", &["10.9.0.2:9002"], json!({})),
    ]);
    let log = json!({"access_log": {"path": "access.log"}, "services": services});
    let sidecar = transparent(&near, mesh.sidecar("orders"), log).await;

    for to in ["10.9.0.2:8080", "[fd09::2]:8080"] {
        let answer = near.run(async move { Call::get("/a?b=c").send_to(addr(to)).await }).await;
        assert_eq!(answer.clone().expect_status(200).json()["version"], "HTTP/1.1", "{to}");
        assert!(caller(&answer).contains(&id("orders")), "{to}: {}", answer.text());
        let answer =
            near.run(async move { Connection::http2(addr(to)).await.send(Call::get("/")).await }).await;
        assert_eq!(answer.expect_status(200).json()["version"], "HTTP/2.0", "{to}");
    }
    assert!(http.iter().all(|origin| origin.connections() > 0));

    near.run(async {
        let mut client = grpc::WordsClient::connect(addr("10.9.0.2:50051")).await;
        let (sender, words) = grpc::outgoing();
        sender.send(grpc::word("first", 1)).await.unwrap();
        let mut answers = client.chat(words).await.expect("a stream").into_inner();
        assert!(timeout(DEADLINE, answers.message()).await.unwrap().unwrap().is_some());
        sender.send(grpc::word("second", 2)).await.unwrap();
        assert!(timeout(DEADLINE, answers.message()).await.unwrap().unwrap().is_some(), "while it is open");
        drop(sender);
        while timeout(DEADLINE, answers.message()).await.unwrap().expect("an end in order").is_some() {}
    })
    .await;

    assert_eq!(near.run(talk("10.9.0.2:9001", true)).await, "hello there", "the server speaks first");
    assert_eq!(near.run(talk("10.9.0.2:9002", false)).await, "hello there", "the client speaks first");
    let file = sidecar.folder.join("access.log");
    eventually("connections of bytes are logged", || async {
        let log = std::fs::read_to_string(&file).unwrap_or_default();
        let told = |service: &str, port: u16, received: u32, sent: u32| {
            let begins = format!("outbound tcp {} {service} {port} {received} {sent} ", id("payments"));
            let ends = format!(" 10.9.0.2:{port} finished");
            log.lines().any(|line| line.contains(&begins) && line.ends_with(&ends))
        };
        (told("mail", 9001, 11, 22) && told("lines", 9002, 11, 11)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_strict_port_takes_the_mesh_alone_and_modes_go_by_the_port_of_the_application() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let _open = echo_at(&far, "0.0.0.0:8080").await;
    let shut = echo_at(&far, "10.9.0.2:8081").await;
    let _local = echo_at(&far, "127.0.0.1:8082").await;
    let _skipped = echo_at(&far, "0.0.0.0:9005").await;
    let ports = json!({
        "inbound": {"ports": [
            {"forward": "10.9.0.2:8080", "mode": "permissive"},
            {"forward": "127.0.0.1:8082", "mode": "permissive"},
        ]},
        "capture": {"skip_inbound_ports": ["9000-9010"]},
    });
    let callee = transparent(&far, mesh.sidecar("payments"), ports).await;
    for (to, status) in [
        ("10.9.0.2:8080", Some(200)),
        ("10.9.0.2:8081", None),
        ("10.9.0.2:8082", Some(200)),
        ("10.9.0.2:9005", Some(200)),
        ("10.9.0.2:15006", None),
    ] {
        let outcome = near
            .run(async move {
                let mut raw = Raw::connect(addr(to)).await;
                raw.write("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
                raw.read_to_end(DEADLINE).await
            })
            .await;
        assert_eq!(outcome.status(), status, "{to}: {}", outcome.text());
    }
    assert_eq!(shut.connections(), 0, "the application hears nothing of what is refused");
    let caller = mesh.caller(&id("orders"));
    let answer =
        near.run(async move { caller.http2(addr("10.9.0.2:8081")).await.send(Call::get("/")).await }).await;
    assert!(self::caller(&answer.expect_status(200)).contains(&id("orders")), "the mesh is let in");
    let admin = callee.admin;
    let metrics = far.run(async move { Call::get("/metrics").send_to(admin).await.text() }).await;
    assert!(metrics.contains("side=\"inbound\",outcome=\"plain\"} 1\n"), "{metrics}");
}

#[tokio::test]
async fn what_is_no_service_goes_out_as_policy_says_and_nothing_runs_in_circles() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let named = echo_at(&far, "0.0.0.0:8080").await;
    let _talkers = [talker(&far, "0.0.0.0:9001", true).await, talker(&far, "0.0.0.0:9003", false).await];
    let _skipped = talker(&far, "0.0.0.0:9005", true).await;
    let rules = json!({
        "policies": {"egress": {"default": "deny", "rules": [
            {"name": "web", "action": "allow", "hosts": ["web.example"], "ports": [8080]},
            {"name": "mail", "action": "allow", "cidrs": ["10.9.0.2/32"], "ports": [9001]},
        ]}},
        "capture": {"skip_outbound_ports": [9005]},
        "services": [{
            "name": "billing",
            "hosts": ["billing.internal"],
            "upstream": {"type": "roundrobin", "nodes": {"10.9.0.2:8080": 1}, "scheme": "http"},
        }],
    });
    let sidecar = transparent(&near, mesh.sidecar("orders"), rules).await;
    let ask = |to: &'static str, host: &'static str| async move {
        Call::get("/").header("host", host).send_to(addr(to)).await
    };
    // Nobody is at 10.9.0.9; the name says which service is meant.
    near.run(ask("10.9.0.9:80", "billing.internal")).await.expect_status(200);
    let refused = near.run(ask("10.9.0.9:80", "other.example")).await.expect_status(403);
    assert!(refused.header("proxy-status").unwrap_or_default().contains("egress_denied"), "{refused:?}");
    near.run(ask("10.9.0.2:8080", "10.9.0.2:8080")).await.expect_status(200);
    assert_eq!(named.requests(), 2);
    assert_eq!(near.run(talk("10.9.0.2:9001", true)).await, "hello there", "allowed by its address");
    assert_eq!(near.run(talk("10.9.0.2:9005", true)).await, "hello there", "it is not captured at all");
    assert_ne!(near.run(talk("10.9.0.2:9003", false)).await, "hello there", "no rule allows it");

    // Straight to the sidecar's own ports: refused, and no connection of its own making.
    for to in ["127.0.0.1:15001", "10.9.0.1:15006", "[::1]:15001"] {
        let heard = near
            .run(async move {
                let mut raw = Raw::connect(addr(to)).await;
                raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
                raw.read_to_end(DEADLINE).await.text()
            })
            .await;
        assert_eq!(heard, "", "{to}");
    }
    let admin = sidecar.admin;
    let metrics = near.run(async move { Call::get("/metrics").send_to(admin).await.text() }).await;
    let accepted =
        metrics.lines().find(|line| line.starts_with("postern_connections_total{outcome=\"accepted\"}"));
    let accepted = accepted.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    assert!(accepted.is_some_and(|accepted| accepted < 30.0), "{metrics}");
}

#[tokio::test]
async fn an_application_of_unknown_ports_can_call_others_to_the_last() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let _web = echo_at(&far, "10.9.0.2:8080").await;
    let inward = json!({"outbound": {"transparent": false}});
    let _callee = transparent(&far, mesh.sidecar("payments"), inward).await;
    let application = echo_at(&near, "0.0.0.0:8090").await;
    let services = json!({"services": [service("web", &["10.9.0.2:8080"], json!({}))]});
    let mut sidecar = transparent(&near, mesh.sidecar("orders"), services).await;
    let caller = mesh.caller(&id("client"));
    let called =
        far.run(async move { caller.http2(addr("10.9.0.1:8090")).await.send(Call::get("/")).await }).await;
    called.expect_status(200);
    sidecar.signal(nix::sys::signal::Signal::SIGTERM);
    far.run(async {
        eventually("nothing new comes in", || async {
            TcpStream::connect(addr("10.9.0.1:8090")).await.is_err().then_some(())
        })
        .await;
    })
    .await;
    // Nothing of the application is open at this moment.
    for _ in 0..20 {
        near.run(async { Call::get("/").send_to(addr("10.9.0.2:8080")).await }).await.expect_status(200);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(sidecar.ended().is_none(), "{}", sidecar.output());
    drop(application);
    assert!(sidecar.wait().await.success(), "{}", sidecar.output());
}

#[tokio::test]
async fn one_direction_is_captured_without_the_other() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let at_near = echo_at(&near, "10.9.0.1:8090").await;
    let at_far = echo_at(&far, "10.9.0.2:8080").await;
    // Whatever comes to the one, or leaves the other, would be refused.
    let only = |direction: &str| {
        json!({
            direction: {"transparent": true},
            "capture": {"mark": MARK},
            "policies": {"default": "deny", "egress": {"default": "deny"}},
        })
    };
    let mut running = Vec::new();
    for (machine, direction) in [(&near, "outbound"), (&far, "inbound")] {
        let builder = mesh.sidecar("payments").config(only(direction));
        let mut sidecar = machine.run(async move { builder.launch() }).await;
        let (binary, file) = (binary(), sidecar.folder.join("sidecar.yaml"));
        for action in ["install", "check"] {
            machine.namespace.sh(&format!(
                "{} sidecar capture {action} -c {}",
                binary.display(),
                file.display()
            ));
        }
        running.push(
            machine
                .run(async move {
                    sidecar.until_ready().await;
                    sidecar
                })
                .await,
        );
    }
    let ask = |to: &'static str| async move { Call::get("/").header("host", to).send_to(addr(to)).await };
    near.run(ask("10.9.0.2:8080")).await.expect_status(403);
    far.run(ask("10.9.0.1:8090")).await.expect_status(200);
    assert_eq!((at_far.connections(), at_near.connections()), (0, 1));
    drop(running.remove(0));
    near.namespace.sh(&format!("{} sidecar capture remove", binary().display()));
    let heard = near
        .run(async {
            e2e::client::exchange(addr("10.9.0.2:8080"), "GET / HTTP/1.1\r\nhost: a\r\n\r\n", DEADLINE).await
        })
        .await;
    assert_eq!(heard.text(), "", "a strict port");
    assert_eq!(at_far.connections(), 0);
}

#[tokio::test]
async fn what_asks_for_requests_lets_no_tunnel_pass() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let lines = talker(&far, "10.9.0.2:9002", false).await;
    let from = json!([{"identities": [id("orders")]}]);
    let policies = |rules: &[(&str, Value)]| {
        let policy = |(index, (action, rule)): (usize, &(&str, Value))| {
            let mut rule = rule.clone();
            rule["from"] = from.clone();
            json!({"name": format!("p{index}"), "action": action, "rules": [rule]})
        };
        json!({"default": "deny", "authorization": rules.iter().enumerate().map(policy).collect::<Vec<_>>()})
    };
    let plain = || ("allow", json!({}));
    let patch = json!({"inbound": {"hbone": "10.9.0.2:15008"}, "policies": policies(&[])});
    let builder = mesh.sidecar("payments").config(patch);
    let mut callee = far.run(async move { builder.start().await }).await;
    let services =
        json!({"services": [service("lines", &["10.9.0.2:9002"], json!({"metadata": {"mesh": "hbone"}}))]});
    let caller = transparent(&near, mesh.sidecar("orders"), services).await;
    let requests = json!([{"paths": ["/a"]}]);
    for (what, rules, passes) in [
        ("who alone", vec![plain()], true),
        ("a path that is allowed", vec![("allow", json!({"to": requests}))], false),
        ("a condition that allows", vec![("allow", json!({"when": [["uri", "==", "/a"]]}))], false),
        ("a path that is denied", vec![plain(), ("deny", json!({"to": requests}))], false),
        ("a condition that denies", vec![plain(), ("deny", json!({"when": [["uri", "==", "/a"]]}))], false),
        (
            "a path at another port",
            vec![plain(), ("deny", json!({"to": [{"paths": ["/a"], "ports": [1]}]}))],
            true,
        ),
        ("a path that would be denied", vec![plain(), ("audit", json!({"to": requests}))], true),
    ] {
        callee = {
            let changed = json!({"policies": policies(&rules)});
            far.run(async move {
                callee.reload(changed).await;
                callee
            })
            .await
        };
        let heard = near.run(talk("10.9.0.2:9002", false)).await;
        assert_eq!(heard == "hello there", passes, "{what}: {heard}");
    }
    assert!(callee.output().contains("nobody looks into tunnels"), "{}", callee.output());
    assert_eq!(lines.connections(), 3);
    drop(caller);
}

#[tokio::test]
async fn tunnels_of_hbone_are_opened_and_taken() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let _web = echo_at(&far, "10.9.0.2:8080").await;
    let _calls = far.run(async { grpc::start_at(addr("10.9.0.2:50051")).await }).await;
    let mail = talker(&far, "10.9.0.2:9001", true).await;
    let shut = talker(&far, "10.9.0.2:9002", false).await;
    let allow = |who: &str| {
        json!({"default": "deny", "authorization": [{
            "name": "callers", "action": "allow", "ports": [8080, 50051, 9001],
            "rules": [{"from": [{"identities": [id(who)]}]}],
        }]})
    };
    let patch = json!({
        "inbound": {"hbone": "10.9.0.2:15008"},
        "access_log": {"path": "access.log"},
        "policies": allow("orders"),
    });
    let builder = mesh.sidecar("payments").config(patch);
    let callee = far.run(async move { builder.start().await }).await;
    let tunnel = json!({"metadata": {"mesh": "hbone"}});
    let services = json!({"services": [
        service("web", &["10.9.0.2:8080"], tunnel.clone()),
        service("calls", &["10.9.0.2:50051"], tunnel.clone()),
        service("mail", &["10.9.0.2:9001"], tunnel.clone()),
        service("lines", &["10.9.0.2:9002"], tunnel),
    ]});
    let caller = transparent(&near, mesh.sidecar("orders"), services).await;
    let (http1, http2) = near
        .run(async {
            let to = addr("10.9.0.2:8080");
            let mut shared = Connection::http2(to).await;
            (Call::get("/").send_to(to).await, shared.send(Call::get("/")).await)
        })
        .await;
    assert_eq!(http1.expect_status(200).json()["version"], "HTTP/1.1");
    assert_eq!(http2.expect_status(200).json()["version"], "HTTP/2.0", "nobody translates");
    near.run(async {
        let mut client = grpc::WordsClient::connect(addr("10.9.0.2:50051")).await;
        let (sender, words) = grpc::outgoing();
        sender.send(grpc::word("first", 1)).await.unwrap();
        let mut answers = client.chat(words).await.expect("a stream").into_inner();
        assert!(timeout(DEADLINE, answers.message()).await.unwrap().unwrap().is_some());
        drop(sender);
        while timeout(DEADLINE, answers.message()).await.unwrap().expect("an end in order").is_some() {}
    })
    .await;
    assert_eq!(near.run(talk("10.9.0.2:9001", true)).await, "hello there");
    assert_ne!(near.run(talk("10.9.0.2:9002", false)).await, "hello there", "no policy allows this port");
    assert_eq!(shut.connections(), 0, "and the application has heard nothing of it");
    let log = callee.folder.join("access.log");
    eventually("tunnels are logged with who came", || async {
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        let told = |begins: String, ends: &str| {
            log.lines().any(|line| line.contains(&begins) && line.ends_with(ends))
        };
        let from = format!("inbound hbone {} payments", id("orders"));
        let carried = told(format!("{from} 9001 11 22 "), " 10.9.0.2:9001 finished");
        (carried && told(format!("{from} 9002 0 0 "), " - policy_denied")).then_some(())
    })
    .await;

    // A tunnel that a change forbids is cut.
    let mut open = near
        .run(async {
            let mut stream = TcpStream::connect(addr("10.9.0.2:9001")).await.expect("a connection");
            let mut greeting = [0; 11];
            timeout(DEADLINE, stream.read_exact(&mut greeting)).await.expect("in time").expect("a greeting");
            stream
        })
        .await;
    let mut changed = callee.config.clone();
    changed["policies"] = allow("billing");
    callee.write(&changed.to_string());
    near.run(async move {
        let mut rest = Vec::new();
        let _ = timeout(DEADLINE, open.read_to_end(&mut rest)).await.expect("an end");
    })
    .await;
    eventually("the application sees the end of it", || async {
        (mail.open_connections() == 0).then_some(())
    })
    .await;
    drop(caller);
}

/// Tells its clients, over HTTP or without, which address they have.
async fn mirror(machine: &Machine, at: &'static str, over_http: bool) -> Origin {
    machine
        .run(Origin::tcp_at(addr(at), move |mut stream, _| async move {
            let told = stream.peer_addr().map(|peer| peer.ip().to_string()).unwrap_or_default();
            if !over_http {
                let _ = stream.write_all(told.as_bytes()).await;
                return;
            }
            while read_head(&mut stream).await.is_some() {
                if write_answer(&mut stream, 200, &told).await.is_err() {
                    return;
                }
            }
        }))
        .await
}

#[tokio::test]
async fn with_tproxy_the_application_sees_who_its_client_is() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let _web = [mirror(&far, "10.9.0.2:8080", true).await, mirror(&far, "[fd09::2]:8080", true).await];
    let _bytes = mirror(&far, "10.9.0.2:9001", false).await;
    let patch = json!({"inbound": {"mode": "permissive"}, "capture": {"mode": "tproxy"}});
    let _callee = transparent(&far, mesh.sidecar("payments"), patch).await;
    for (to, client) in [("10.9.0.2:8080", "10.9.0.1"), ("[fd09::2]:8080", "fd09::1")] {
        let answer = near.run(async move { Call::get("/").send_to(addr(to)).await }).await;
        assert_eq!(answer.expect_status(200).text(), client);
    }
    let heard = near
        .run(async {
            let mut heard = String::new();
            let mut stream = TcpStream::connect(addr("10.9.0.2:9001")).await.expect("a connection");
            timeout(DEADLINE, stream.read_to_string(&mut heard)).await.expect("in time").expect("an address");
            heard
        })
        .await;
    assert_eq!(heard, "10.9.0.1", "the server speaks first");
    let caller = mesh.caller(&id("orders"));
    let answer = near
        .run(async move {
            let stream = caller.shake(addr("10.9.0.2:8080"), "postern-h1").await.expect("a handshake");
            Connection::http1_over(stream, "a".to_owned(), "http").await.send(Call::get("/")).await
        })
        .await;
    assert_eq!(answer.expect_status(200).text(), "10.9.0.1", "from the mesh as well");
}

#[tokio::test]
async fn a_sidecar_whose_connections_would_come_back_to_it_does_not_start() {
    let patch = json!({"outbound": {"transparent": true}, "capture": {"uid": 4_000_000}});
    let mut sidecar = Mesh::new().sidecar("orders").config(patch).launch();
    assert!(!sidecar.wait().await.success());
    assert!(sidecar.output().contains("capture.uid"), "{}", sidecar.output());
}
