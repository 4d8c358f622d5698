//! Two applications that speak through their sidecars, in processes of their own: who is let in, what passes, and how a
//! sidecar ends.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use e2e::client::{Call, Connection, DEADLINE, Raw};
use e2e::eventually;
use e2e::origin::{Origin, echo, grpc, websocket};
use e2e::sidecar::{Mesh, Sidecar, id};
use futures_util::{SinkExt, StreamExt};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The sidecar of an application `payments` at `origin`, and that of one that calls it by its first listener.
async fn pair(mesh: &Mesh, origin: SocketAddr) -> (Sidecar, Sidecar) {
    let callee = mesh.sidecar("payments").inbound(origin, json!({})).start().await;
    let caller =
        mesh.sidecar("orders").service("payments", callee.inbound(0), json!({})).proxies().start().await;
    (callee, caller)
}

#[tokio::test]
async fn requests_pass_and_the_application_hears_who_calls() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let (callee, caller) = pair(&mesh, origin.addr).await;
    let mut http1 = Connection::http1(caller.listener(0)).await;
    for path in ["/a?b=c", "/a%2Fb"] {
        let call = Call::get(path)
            .header("host", "payments")
            .header("x-forwarded-client-cert", "By=spiffe://forged")
            .header("x-postern-protocol", "forged");
        let answer = http1.send(call).await.expect_status(200).json();
        assert_eq!(answer["version"], "HTTP/1.1", "the application hears what the client speaks: {answer}");
        assert_eq!(answer["headers"]["host"], json!(["payments"]));
        let told = answer["headers"]["x-forwarded-client-cert"].to_string();
        assert!(told.contains(&id("orders")) && !told.contains("forged"), "{told}");
        assert!(answer["headers"]["x-postern-protocol"].is_null(), "{answer}");
    }
    let mut http2 = Connection::http2(caller.listener(0)).await;
    let answer = http2.send(Call::get("/")).await.expect_status(200).json();
    assert_eq!(answer["version"], "HTTP/2.0", "{answer}");
    let inward = callee.ask("/v1/connections").await.json();
    let identity = &inward[0]["identity"];
    assert_eq!((identity, &inward[0]["direction"]), (&json!(id("orders")), &json!("inbound")), "{inward}");
    assert_eq!(inward.as_array().map(Vec::len), Some(1), "both share one connection of the mesh: {inward}");
    let metrics = caller.ask("/metrics").await.text();
    assert!(
        metrics.contains("postern_mesh_handshakes_total{side=\"outbound\",outcome=\"done\"} 1\n"),
        "{metrics}"
    );
}

#[tokio::test]
async fn grpc_streams_pass_both_ways() {
    let (mesh, origin) = (Mesh::new(), grpc::start().await);
    let (_callee, caller) = pair(&mesh, origin.addr).await;
    let mut client = grpc::WordsClient::connect(caller.listener(0)).await;
    let (sender, words) = grpc::outgoing();
    sender.send(grpc::word("first", 1)).await.unwrap();
    let mut answers = client.chat(words).await.expect("a stream").into_inner();
    assert!(timeout(DEADLINE, answers.message()).await.unwrap().unwrap().is_some());
    sender.send(grpc::word("second", 2)).await.unwrap();
    assert!(timeout(DEADLINE, answers.message()).await.unwrap().unwrap().is_some(), "while it is open");
    drop(sender);
    while timeout(DEADLINE, answers.message()).await.unwrap().expect("an end in order").is_some() {}
}

#[tokio::test]
async fn websockets_pass_both_ways() {
    let (mesh, origin) = (Mesh::new(), websocket::start().await);
    let (_callee, caller) = pair(&mesh, origin.addr).await;
    let stream = TcpStream::connect(caller.listener(0)).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("ws://payments/", stream).await.expect("a switch");
    socket.send("hello".into()).await.unwrap();
    let answer = timeout(DEADLINE, socket.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(answer.to_text().unwrap(), "hello");
}

/// A server that speaks first and one that waits, both by lines.
async fn talker(first: bool) -> Origin {
    Origin::tcp(move |mut stream, seen| async move {
        if first && stream.write_all(b"220 ready\r\n").await.is_err() {
            return;
        }
        let mut read = vec![0; 1024];
        while let Ok(count @ 1..) = stream.read(&mut read).await {
            seen.request();
            if stream.write_all(&read[..count]).await.is_err() {
                return;
            }
        }
        let _ = stream.write_all(b"bye").await;
    })
    .await
}

#[tokio::test]
async fn bytes_pass_whoever_speaks_first() {
    let mesh = Mesh::new();
    for (first, case) in [(true, "the server"), (false, "the client")] {
        let origin = talker(first).await;
        let (_callee, caller) = pair(&mesh, origin.addr).await;
        let mut stream = TcpStream::connect(caller.listener(0)).await.unwrap();
        if first {
            let mut greeting = [0; 11];
            timeout(DEADLINE, stream.read_exact(&mut greeting)).await.expect(case).unwrap();
            assert_eq!(&greeting, b"220 ready\r\n");
        }
        stream.write_all(b"EHLO me\r\n").await.unwrap();
        let mut answer = [0; 9];
        timeout(DEADLINE, stream.read_exact(&mut answer)).await.expect(case).unwrap();
        assert_eq!(&answer, b"EHLO me\r\n", "{case}");
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        timeout(DEADLINE, stream.read_to_end(&mut rest)).await.expect(case).unwrap();
        assert_eq!(rest, b"bye", "{case}: the answer to a half-close");
    }
}

#[tokio::test]
async fn connect_and_socks_lead_to_services_and_out_of_the_mesh() {
    let (mesh, origin, outside) = (Mesh::new(), echo::named("inside").await, echo::named("outside").await);
    let (_callee, caller) = pair(&mesh, origin.addr).await;
    let name = |answer: e2e::Answer| answer.expect_status(200).json()["name"].as_str().unwrap().to_owned();
    for (host, port, expected) in [("payments", 80, "inside"), ("127.0.0.1", outside.addr.port(), "outside")]
    {
        let authority = format!("{host}:{port}");
        let mut raw = Raw::connect(caller.http_proxy()).await;
        raw.write(format!("GET http://{authority}/ HTTP/1.1\r\nhost: {authority}\r\n\r\n")).await;
        assert_eq!(name(raw.answer().await.expect("an answer")), expected, "a whole target");

        let mut stream = TcpStream::connect(caller.http_proxy()).await.unwrap();
        let ask = format!("CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.unwrap();
        let mut answer = [0; 39];
        timeout(DEADLINE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        let mut inner = Connection::http1_over(stream, authority.clone(), "http").await;
        assert_eq!(name(inner.send(Call::get("/")).await), expected, "CONNECT");

        let mut stream = TcpStream::connect(caller.socks5()).await.unwrap();
        let mut ask = vec![5, 1, 0, 5, 1, 0, 3, host.len() as u8];
        ask.extend_from_slice(host.as_bytes());
        ask.extend_from_slice(&port.to_be_bytes());
        stream.write_all(&ask).await.unwrap();
        let mut answer = [0; 12];
        timeout(DEADLINE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(answer[..4], [5, 0, 5, 0]);
        let mut inner = Connection::http1_over(stream, authority.clone(), "http").await;
        assert_eq!(name(inner.send(Call::get("/")).await), expected, "SOCKS5");
    }
}

#[tokio::test]
async fn only_who_is_expected_is_spoken_to() {
    let (mesh, stranger, origin) = (Mesh::new(), Mesh::new(), echo::start().await);
    let callee = mesh.sidecar("payments").inbound(origin.addr, json!({})).start().await;
    for (mesh, expected, status, case) in [
        (&mesh, id("payments"), 200, "it is who is expected"),
        (&mesh, "spiffe://mesh.local/ns/default/*".to_owned(), 200, "it is among those who are"),
        (&mesh, id("billing"), 502, "it is another"),
        (&stranger, id("payments"), 502, "an authority that nobody knows"),
    ] {
        let service = json!({"identities": [expected], "upstream": {"retries": 0}});
        let caller = mesh.sidecar("orders").service("payments", callee.inbound(0), service).start().await;
        let answer = Call::get("/").send_to(caller.listener(0)).await;
        assert_eq!(answer.status, status, "{case}: {}", answer.text());
        if status != 200 {
            assert!(
                answer.header("proxy-status").unwrap_or_default().contains("mesh_peer"),
                "{case}: {answer:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_strict_port_takes_the_mesh_alone_and_a_permissive_one_also_others() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let builder = mesh.sidecar("payments").inbound(origin.addr, json!({}));
    let callee = builder.inbound(origin.addr, json!({"mode": "permissive"})).start().await;
    let (strict, permissive) = (callee.inbound(0), callee.inbound(1));
    let mut raw = Raw::connect(strict).await;
    raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let outcome = raw.read_to_end(DEADLINE).await;
    assert_eq!(outcome.text(), "", "no answer of anybody");
    assert_eq!(origin.connections(), 0, "the application hears nothing of it");
    Call::get("/").send_to(permissive).await.expect_status(200);
    let service = json!({"identities": [id("payments")]});
    let caller = mesh.sidecar("orders").service("payments", permissive, service).start().await;
    let answer = Call::get("/").send_to(caller.listener(0)).await.expect_status(200).json();
    assert!(answer["headers"]["x-forwarded-client-cert"].to_string().contains(&id("orders")), "{answer}");
    let metrics = callee.ask("/metrics").await.text();
    assert!(
        metrics.contains("postern_mesh_handshakes_total{side=\"inbound\",outcome=\"plain\"} 1\n"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_node_of_the_mesh_is_never_spoken_to_in_the_plain() {
    let mesh = Mesh::new();
    // Whoever listens there is no sidecar: it notes what comes first, and closes.
    let seen = Arc::<Mutex<Vec<Vec<u8>>>>::default();
    let notes = seen.clone();
    let origin = Origin::tcp(move |mut stream, _| {
        let notes = notes.clone();
        async move {
            let mut bytes = vec![0; 4096];
            let count = stream.read(&mut bytes).await.unwrap_or(0);
            bytes.truncate(count);
            notes.lock().unwrap().push(bytes);
        }
    })
    .await;
    let caller = mesh.sidecar("orders").service("payments", origin.addr, json!({})).start().await;
    let answer = Call::get("/secret").send_to(caller.listener(0)).await;
    assert_eq!(answer.status, 502, "{answer:?}");
    let mut stream = TcpStream::connect(caller.listener(0)).await.unwrap();
    stream.write_all(b"secret bytes\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut rest)).await.expect("an end");
    let seen = seen.lock().unwrap().clone();
    assert!(seen.len() >= 2, "one for the request, one for the bytes");
    for bytes in seen.iter().filter(|bytes| !bytes.is_empty()) {
        assert_eq!(bytes[0], 0x16, "a handshake and nothing else");
        assert!(!String::from_utf8_lossy(bytes).contains("secret"));
    }
}

#[tokio::test]
async fn policies_decide_and_a_changed_one_ends_what_it_forbids() {
    let (mesh, origin) = (Mesh::new(), talker(true).await);
    let rule =
        json!({"name": "callers", "action": "allow", "rules": [{"from": [{"identities": [id("orders")]}]}]});
    let mut callee = mesh
        .sidecar("payments")
        .inbound(origin.addr, json!({"protocol": "tcp"}))
        .config(json!({"policies": {"default": "deny", "authorization": [rule]}}))
        .start()
        .await;
    let tcp = json!({"protocol": "tcp"});
    let friend = mesh.sidecar("orders").service("payments", callee.inbound(0), tcp.clone()).start().await;
    let other = mesh.sidecar("billing").service("payments", callee.inbound(0), tcp).start().await;
    let mut refused = TcpStream::connect(other.listener(0)).await.unwrap();
    let mut nothing = Vec::new();
    timeout(DEADLINE, refused.read_to_end(&mut nothing)).await.expect("an end").ok();
    assert!(nothing.is_empty());
    let mut open = TcpStream::connect(friend.listener(0)).await.unwrap();
    let mut greeting = [0; 11];
    timeout(DEADLINE, open.read_exact(&mut greeting)).await.unwrap().unwrap();
    let rule =
        json!({"name": "callers", "action": "allow", "rules": [{"from": [{"identities": [id("billing")]}]}]});
    callee.reload(json!({"policies": {"authorization": [rule]}})).await;
    let ended = timeout(DEADLINE, open.read(&mut greeting)).await.expect("what is forbidden now ends");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}

#[tokio::test]
async fn a_changed_file_is_taken_over_and_a_wrong_one_is_not() {
    let (mesh, one, two) = (Mesh::new(), echo::named("one").await, echo::named("two").await);
    let first = mesh.sidecar("payments").inbound(one.addr, json!({})).start().await;
    let second = mesh.sidecar("payments").inbound(two.addr, json!({})).start().await;
    let mut caller = mesh.sidecar("orders").service("payments", first.inbound(0), json!({})).start().await;
    let mut connection = Connection::http1(caller.listener(0)).await;
    let name = |answer: e2e::Answer| answer.expect_status(200).json()["name"].clone();
    assert_eq!(name(connection.send(Call::get("/")).await), "one");
    let mut services = caller.config["services"].clone();
    services[0]["upstream"]["nodes"] = json!({second.inbound(0).to_string(): 1});
    caller.reload(json!({"services": services})).await;
    assert_eq!(name(connection.send(Call::get("/")).await), "two", "on the same connection");
    assert_eq!(caller.ask("/v1/config").await.json()["waits_for_restart"], json!([]));
    for limits in [json!({"requests": 7}), json!({"requests": 7, "detect": 1})] {
        caller.reload(json!({"limits": limits})).await;
        let waits = caller.ask("/v1/config").await.json()["waits_for_restart"].clone();
        assert_eq!(waits, json!(["limits.requests"]), "until the start, whatever comes after it");
    }
    caller.write("trust_domain: mesh.local\nworkload: {service: orders}\nca: {}\n");
    eventually("the error is told", || async {
        let told = caller.ask("/v1/config").await.json()["problem"].to_string();
        told.contains("sidecar.yaml").then_some(())
    })
    .await;
    assert_eq!(name(connection.send(Call::get("/")).await), "two", "what was in force stays");
}

#[tokio::test]
async fn a_renewed_certificate_serves_the_next_handshake_and_cuts_nothing() {
    let (mesh, origin) = (Mesh::new(), talker(true).await);
    let (callee, caller) = pair(&mesh, origin.addr).await;
    let mut open = TcpStream::connect(caller.listener(0)).await.unwrap();
    let mut greeting = [0; 11];
    timeout(DEADLINE, open.read_exact(&mut greeting)).await.unwrap().unwrap();
    let serial = || async { callee.ask("/v1/identity").await.json()["svid"]["serial"].clone() };
    let before = serial().await;
    mesh.identity(&callee.folder, &id("payments"));
    eventually("the certificate is taken over", || async { (serial().await != before).then_some(()) }).await;
    open.write_all(b"still\r\n").await.unwrap();
    let mut answer = [0; 7];
    timeout(DEADLINE, open.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"still\r\n");
    let mut next = TcpStream::connect(caller.listener(0)).await.unwrap();
    timeout(DEADLINE, next.read_exact(&mut greeting)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_sidecar_without_an_identity_is_not_ready_and_says_nothing_to_the_mesh() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let files = json!({"ca": {"files": {"cert": "gone.pem", "key": "gone.key", "trust": "gone.pem"}}});
    let caller = mesh.sidecar("orders").config(files).service("payments", origin.addr, json!({})).launch();
    eventually("the sidecar says what it lacks", || async {
        let told = caller.readiness().await?;
        (told.status == 503 && told.text().contains("no trust bundle yet")).then_some(())
    })
    .await;
    let answer = Call::get("/").send_to(caller.listener(0)).await;
    assert_eq!(answer.status, 503);
    assert!(answer.header("proxy-status").unwrap_or_default().contains("no_mesh_identity"), "{answer:?}");
    assert_eq!(origin.connections(), 0);
}

#[tokio::test]
async fn a_drain_lets_requests_end_and_the_application_call_others_to_the_last() {
    let (mesh, other) = (Mesh::new(), echo::named("other").await);
    let callee = mesh.sidecar("payments").inbound(other.addr, json!({})).start().await;
    // An application that answers when it is told to, and can be made to go away.
    let (release, waiting) = tokio::sync::watch::channel(false);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let application = Origin::http(move |_| {
        let (mut waiting, count) = (waiting.clone(), count.clone());
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            let _ = waiting.wait_for(|released| *released).await;
            http::Response::new("done".into())
        }
    })
    .await;
    let mut sidecar = mesh
        .sidecar("orders")
        .inbound(application.addr, json!({}))
        .service("payments", callee.inbound(0), json!({}))
        .start()
        .await;
    let client = mesh.sidecar("client").service("orders", sidecar.inbound(0), json!({})).start().await;
    let request = tokio::spawn(Call::get("/").send_to(client.listener(0)));
    eventually("the request is at work", || async { (asked.load(Ordering::SeqCst) == 1).then_some(()) })
        .await;
    sidecar.signal(Signal::SIGTERM);
    eventually("nothing new comes in", || async {
        TcpStream::connect(sidecar.inbound(0)).await.is_err().then_some(())
    })
    .await;
    assert_eq!(sidecar.readiness().await.map(|answer| answer.status), Some(503));
    Call::get("/").send_to(sidecar.listener(0)).await.expect_status(200);
    release.send_replace(true);
    assert_eq!(request.await.unwrap().expect_status(200).text(), "done", "what was at work ends in order");
    Call::get("/").send_to(sidecar.listener(0)).await.expect_status(200);
    assert!(sidecar.ended().is_none(), "the application is still there");
    drop(application);
    assert!(sidecar.wait().await.success());
}

#[tokio::test]
async fn a_sidecar_does_without_huge_pages_and_its_application_does_not() {
    let mesh = Mesh::new();
    let script = "for pid in $$ $PPID; do echo pages $(grep THP_enabled: /proc/$pid/status); done";
    let mut sidecar = mesh.sidecar("job").exec(&["sh", "-c", script]).launch();
    assert!(sidecar.wait().await.success(), "{}", sidecar.output());
    let output = sidecar.output();
    let told: Vec<_> = output.lines().filter_map(|line| line.strip_prefix("pages THP_enabled: ")).collect();
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("THP_enabled:\t")).unwrap();
    assert_eq!(told, [own, "0"]);
}

#[tokio::test]
async fn an_application_runs_behind_its_sidecar_and_its_end_is_the_end() {
    let mesh = Mesh::new();
    let mut sidecar = mesh.sidecar("job").exec(&["sh", "-c", "echo at work; exit 7"]).launch();
    assert_eq!(sidecar.wait().await.code(), Some(7), "{}", sidecar.output());
    assert!(sidecar.output().contains("at work"));
    let script = "trap 'exit 3' TERM; echo has begun; while :; do sleep 0.05; done";
    let mut sidecar = mesh.sidecar("job").exec(&["sh", "-c", script]).launch();
    eventually("the application runs", || async { sidecar.output().contains("has begun").then_some(()) })
        .await;
    sidecar.signal(Signal::SIGTERM);
    assert_eq!(sidecar.wait().await.code(), Some(3), "{}", sidecar.output());
}
