//! Private keys that the gateway does not have: real signers, a real edge, and clients that shake hands.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use certs::grpc::{Dial, client_tls};
use certs::signer::proto::SignRequest;
use certs::signer::proto::signer_client::SignerClient;
use e2e::certs::{Authority, KeyKind, Leaf};
use e2e::client::{Call, Connection, tls};
use e2e::edge::run;
use e2e::origin::echo;
use e2e::signer::{GATEWAY, Gateway, Signer, write_secret};
use e2e::{Edge, Value, eventually, eventually_within, json, memory};
use nix::sys::signal::Signal;
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::crypto::aws_lc_rs::kx_group;
use rustls::{ClientConfig, HandshakeKind, RootCertStore};
use tokio::task::JoinSet;
use tonic::Code;

/// Handshakes under load on a machine that has much else to do.
const LONG: Duration = Duration::from_secs(60);

fn remote(id: &str, sni: &str, leaf: &Leaf) -> Value {
    json!({"id": id, "snis": [sni], "cert": leaf.cert, "key": format!("signer://main/{id}")})
}

fn local(id: &str, sni: &str, leaf: &Leaf) -> Value {
    json!({"id": id, "snis": [sni], "cert": leaf.cert, "key": leaf.key})
}

/// A client that begins each connection anew.
fn fresh(config: &Arc<ClientConfig>) -> Arc<ClientConfig> {
    let mut config = (**config).clone();
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

/// Handshakes without end in `sni`, until `stop`; how many succeeded, and the errors of those that did not.
fn load(edge: &Edge, config: &Arc<ClientConfig>, sni: &str, stop: &Arc<AtomicBool>) -> Load {
    let done = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let (addr, config, sni) = (edge.https, fresh(config), sni.to_owned());
        let (stop, done) = (Arc::clone(stop), Arc::clone(&done));
        tasks.spawn(async move {
            let mut errors = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                match tls(addr, &config, &sni).await {
                    Ok(_) => drop(done.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => errors.push(error.to_string()),
                }
            }
            errors
        });
    }
    Load { done, tasks }
}

struct Load {
    done: Arc<AtomicUsize>,
    tasks: JoinSet<Vec<String>>,
}

impl Load {
    /// Waits for so many more handshakes.
    async fn more(&self, count: usize) {
        let goal = self.done.load(Ordering::Relaxed) + count;
        eventually_within(LONG, "handshakes go on", || async {
            (self.done.load(Ordering::Relaxed) >= goal).then_some(())
        })
        .await;
    }

    async fn errors(self) -> Vec<String> {
        self.tasks.join_all().await.concat()
    }
}

/// What nobody but a signer may have: pieces of the private half, as it is written and as numbers lie in memory.
fn pieces(leaf: &Leaf) -> Vec<Vec<u8>> {
    let lines: Vec<&str> = leaf.key.lines().filter(|line| !line.starts_with("-----")).collect();
    let der = STANDARD.decode(lines.concat()).expect("our own PEM");
    // PKCS #8 of an elliptic curve: version 1, then 32 bytes of the secret. Of RSA: behind the modulus all is secret.
    let curve = der.windows(5).position(|bytes| bytes == [2, 1, 1, 4, 32]).filter(|_| der.len() < 200);
    let secret = match curve {
        Some(at) => der[at + 5..at + 37].to_vec(),
        None => der[der.len() * 6 / 10..der.len() * 6 / 10 + 32].to_vec(),
    };
    let backwards = secret.iter().rev().copied().collect();
    // The first line of PEM says what kind of key it is, and may be alike in others.
    let text = lines[1].as_bytes()[..32].to_vec();
    vec![secret, backwards, text]
}

fn has_bytes(folder: &Path, needle: &[u8]) -> bool {
    std::fs::read_dir(folder).expect("a folder").any(|entry| {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            return has_bytes(&path, needle);
        }
        let bytes = std::fs::read(&path).unwrap_or_default();
        bytes.windows(needle.len()).any(|window| window == needle)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn handshakes_are_signed_elsewhere_and_the_key_is_nowhere_on_the_gateway() {
    let (ca, internal) = (Authority::new("ca"), Authority::new("internal"));
    let (ecdsa, rsa) = (ca.server(&["ecdsa.test"]), ca.server_with(&["rsa.test"], KeyKind::Rsa));
    let keys = [("ecdsa", &ecdsa), ("rsa", &rsa)];
    let signers = [Signer::start(&internal, &keys).await, Signer::start(&internal, &keys).await];
    let origin = echo::start().await;
    let gateway = Gateway::new(&internal, GATEWAY);
    let edge = Edge::file()
        .config(gateway.pool(&internal, &[signers[0].addr, signers[1].addr], json!({})))
        .resource("ssls", remote("ecdsa", "ecdsa.test", &ecdsa))
        .resource("ssls", remote("rsa", "rsa.test", &rsa))
        .route(json!({"id": "all", "uri": "/*", "upstream": origin.upstream()}))
        .start()
        .await;
    let mut signed = 0;
    for (name, leaf) in [("ecdsa.test", &ecdsa), ("rsa.test", &rsa)] {
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let config = fresh(&ca.client_config().versions(&[version]).build());
            let stream = tls(edge.https, &config, name).await.expect("a handshake");
            let shown = stream.get_ref().1.peer_certificates().and_then(|shown| shown.first()).cloned();
            assert_eq!(shown, Some(leaf.der()));
            let mut connection = Connection::tls(edge.https, &config, name).await.expect("a handshake");
            connection.send(Call::get("/")).await.expect_status(200);
            signed += 2;
        }
        // A client whose first key share the server does not want: what is signed is its second hello.
        let mut roots = RootCertStore::empty();
        roots.add(ca.der()).expect("a root");
        let mut provider = aws_lc_rs::default_provider();
        provider.kx_groups = vec![kx_group::MLKEM768, kx_group::X25519];
        let config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = tls(edge.https, &Arc::new(config), name).await.expect("a handshake");
        let kind = stream.get_ref().1.handshake_kind();
        assert_eq!(kind, Some(HandshakeKind::FullWithHelloRetryRequest));
        signed += 1;
    }
    let by = [signers[0].signed().await, signers[1].signed().await];
    assert_eq!(by[0] + by[1], signed, "every handshake was signed by one of them");

    // A session that is resumed needs no signature.
    let config = ca.client_config().build();
    for _ in 0..2 {
        let mut connection = Connection::tls(edge.https, &config, "ecdsa.test").await.expect("a handshake");
        connection.send(Call::get("/")).await.expect_status(200);
    }
    let by = [signers[0].signed().await, signers[1].signed().await];
    assert_eq!(by[0] + by[1], signed + 1, "the second was resumed");

    for leaf in [&ecdsa, &rsa] {
        for piece in pieces(leaf) {
            assert!(!has_bytes(&edge.folder, &piece), "the key is in the gateway's files");
        }
        let mut needles = pieces(leaf);
        needles.push(leaf.der()[40..80].to_vec());
        match memory::holds(edge.pid(), &needles) {
            Ok(found) => {
                assert_eq!(found, [false, false, false, true], "the certificate alone is in its memory")
            }
            Err(error) => eprintln!("the memory of the gateway is not looked at, which takes root: {error}"),
        }
        if let Ok(found) = memory::holds(signers[0].pid(), &needles) {
            assert!(found[..3].contains(&true), "the signer has it, and so it would have been found");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn signers_that_die_stop_and_come_back_cost_no_handshake() {
    let (ca, internal) = (Authority::new("ca"), Authority::new("internal"));
    let leaf = ca.server(&["shop.test"]);
    let keys = [("shop", &leaf)];
    let mut first = Signer::start(&internal, &keys).await;
    let mut second = Signer::start(&internal, &keys).await;
    let gateway = Gateway::new(&internal, GATEWAY);
    // Times that a machine with much to do keeps.
    let times = json!({"timeout": "5s", "deadline": "10s"});
    let edge = Edge::file()
        .config(gateway.pool(&internal, &[first.addr, second.addr], times))
        .config(json!({"postern": {"limits": {"handshake_timeout": "60s"}}}))
        .resource("ssls", remote("shop", "shop.test", &leaf))
        .start()
        .await;
    let stop = Arc::new(AtomicBool::new(false));
    let load = load(&edge, &ca.client_config().build(), "shop.test", &stop);
    load.more(200).await;
    first.kill();
    load.more(200).await;
    first.restart().await;
    eventually("the first signs again", || async { (first.signed().await > 20).then_some(()) }).await;
    // An orderly stop: what is under way is finished, and the gateway asks the other one.
    second.signal(Signal::SIGTERM);
    assert!(second.wait().await.success(), "{}", second.output());
    load.more(200).await;
    stop.store(true, Ordering::Relaxed);
    assert_eq!(load.errors().await, Vec::<String>::new());
    let (code, told, _) =
        run(&["ca", "audit", "verify", second.folder.join("signer-audit.log").to_str().expect("a path")]);
    assert_eq!(code, 0, "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_signers_their_names_fail_in_time_and_others_are_served() {
    let (ca, internal) = (Authority::new("ca"), Authority::new("internal"));
    let (shop, other) = (ca.server(&["shop.test"]), ca.server(&["other.test"]));
    let mut first = Signer::start(&internal, &[("shop", &shop)]).await;
    let second = Signer::start(&internal, &[("shop", &shop)]).await;
    let gateway = Gateway::new(&internal, GATEWAY);
    let edge = Edge::file()
        .config(gateway.pool(&internal, &[first.addr, second.addr], json!({"in_flight": 4})))
        .config(json!({"postern": {"workers": 1, "limits": {"handshake_timeout": "60s"}}}))
        .resource("ssls", remote("shop", "shop.test", &shop))
        .resource("ssls", local("other", "other.test", &other))
        .start()
        .await;
    let config = fresh(&ca.client_config().build());
    tls(edge.https, &config, "shop.test").await.expect("a handshake");
    // They hang, and then they are gone.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        first.signal(signal);
        second.signal(signal);
        let mut waiting = JoinSet::new();
        for _ in 0..16 {
            let (addr, config) = (edge.https, Arc::clone(&config));
            waiting.spawn(async move { tls(addr, &config, "shop.test").await });
        }
        for _ in 0..20 {
            // The one worker there is has all of them, and waits for none.
            tls(edge.https, &config, "other.test").await.expect("a handshake of another name");
        }
        for end in waiting.join_all().await {
            let error = end.expect_err("nobody signs");
            assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "the gateway ends it itself");
        }
        let metrics = edge.output();
        assert!(!metrics.contains("panicked"), "{metrics}");
    }
    first.restart().await;
    eventually("a signer that is back signs", || async { tls(edge.https, &config, "shop.test").await.ok() })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_cannot_be_signed_is_refused_with_the_reason() {
    let (ca, internal) = (Authority::new("ca"), Authority::new("internal"));
    let (shop, bank) = (ca.server(&["shop.test"]), ca.server(&["bank.test"]));
    let signer = Signer::start(&internal, &[("shop", &shop)]).await;
    let gateway = Gateway::new(&internal, GATEWAY);
    let edge = Edge::embedded().config(gateway.pool(&internal, &[signer.addr], json!({}))).start().await;
    let refused = |object: Value, told: &'static str| {
        let edge = &edge;
        async move {
            let answer = edge.call_admin("PUT", "ssls/bad", Some(&object)).await;
            assert_eq!(answer.status, 400, "{}", answer.text());
            assert!(answer.text().contains(told), "{told}: {}", answer.text());
        }
    };
    let with = |fields: Value| {
        let mut object = json!({"snis": ["bad.test"], "cert": shop.cert, "key": "signer://main/shop"});
        for (name, value) in fields.as_object().expect("fields") {
            object[name] = value.clone();
        }
        object.as_object_mut().expect("fields").retain(|_, value| !value.is_null());
        object
    };
    refused(with(json!({"key": "signer://mian/shop"})), "no pool of signers `mian`").await;
    refused(with(json!({"key": "signer://main"})), "signer://").await;
    refused(with(json!({"type": "client", "snis": null})), "handshakes of servers alone").await;
    refused(with(json!({"certs": [bank.cert], "keys": [bank.key]})), "all keys of an object are at one pool")
        .await;

    edge.put("ssls/shop", with(json!({"snis": ["shop.test"]}))).await;
    let stored = edge.call_admin("GET", "ssls/shop", None).await.expect_status(200).json();
    assert_eq!(stored.pointer("/value/key"), Some(&json!("signer://main/shop")));
    let config = fresh(&ca.client_config().build());
    eventually("the name is served", || async { tls(edge.https, &config, "shop.test").await.ok() }).await;

    // The key of another certificate, and one that there is not yet.
    for key in ["shop", "bank"] {
        let object = json!({"snis": ["bank.test"], "cert": bank.cert, "key": format!("signer://main/{key}")});
        edge.put("ssls/bank", object).await;
        let told = if key == "shop" {
            "the public keys differ"
        } else {
            "no node of the pool `main` offers a key `bank`"
        };
        eventually("the reason is told", || async { edge.output().contains(told).then_some(()) }).await;
        assert!(tls(edge.https, &config, "bank.test").await.is_err());
    }
    signer.put("bank.pem", &bank.key);
    eventually("the key is found", || async { tls(edge.https, &config, "bank.test").await.ok() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn signers_sign_for_those_they_know_and_handshakes_alone() {
    let (ca, internal, foreign) =
        (Authority::new("ca"), Authority::new("internal"), Authority::new("foreign"));
    let shop = ca.server(&["shop.test"]);
    let patch = json!({"clients": [{"name": GATEWAY, "keys": ["shop"]}, {"name": "spiffe://mesh.local/ns/edge/*", "keys": ["none"]}]});
    let signer = Signer::start_with(&internal, &[("shop", &shop)], patch).await;
    let config = fresh(&ca.client_config().build());
    // A name that is not on the list, and a certificate of another authority.
    for (authority, name) in [(&internal, "stranger.test"), (&foreign, GATEWAY)] {
        let gateway = Gateway::new(authority, name);
        let edge = Edge::file()
            .config(gateway.pool(&internal, &[signer.addr], json!({})))
            .resource("ssls", remote("shop", "shop.test", &shop))
            .start()
            .await;
        assert!(tls(edge.https, &config, "shop.test").await.is_err(), "{name}");
        eventually("the gateway says why", || async {
            edge.output().contains("the signer does not answer").then_some(())
        })
        .await;
    }
    assert_eq!(signer.signed().await, 0);

    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        write_secret(&path, text);
        path
    };
    let known = internal.client(GATEWAY);
    let (certificate, key) = (file("gw.pem", &known.cert), file("gw.key", &known.key));
    let tls =
        client_tls(Some(&file("ca.pem", &internal.pem())), Some((&certificate, &key))).expect("settings");
    let dial = Dial {
        server: signer.addr.to_string(),
        tls: Some(tls),
        server_name: Some(e2e::signer::SIGNER.to_owned()),
        patience: None,
    };
    let mut client = SignerClient::new(dial.connect().await.expect("a connection"));
    let offered =
        client.list_keys(certs::signer::proto::ListKeysRequest {}).await.expect("keys").into_inner();
    let public_key = offered.keys[0].public_key.clone();
    let ask = |message: &[u8]| SignRequest {
        key: "shop".to_owned(),
        public_key: public_key.clone(),
        scheme: 0x0403,
        message: message.to_vec(),
    };
    let client_side = [&[b' '; 64][..], b"TLS 1.3, client CertificateVerify\0", &[7; 32]].concat();
    let hash_alone = [7; 32];
    let token = b"eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhZG1pbiJ9";
    for message in [&client_side[..], &hash_alone, token, b""] {
        let refused = client.sign(ask(message)).await.expect_err("no handshake of a server");
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    let server_side = [&[b' '; 64][..], b"TLS 1.3, server CertificateVerify\0", &[7; 32]].concat();
    client.sign(ask(&server_side)).await.expect("a signature");
    assert_eq!(signer.signed().await, 1);
    let status = signer.ask("/status").await.expect("a status").json();
    assert_eq!(status.pointer("/refused/not-a-handshake"), Some(&json!(4)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_sealed_key_signs_and_is_of_use_to_nobody_else() {
    let (ca, internal) = (Authority::new("ca"), Authority::new("internal"));
    let shop = ca.server(&["shop.test"]);
    let signer = Signer::start_with(&internal, &[], json!({"seal": {"key_file": "seal.key"}})).await;
    assert_eq!(signer.ask("/readyz").await.expect("an answer").status, 503, "it has no key");
    let plain = signer.folder.join("shop.key");
    write_secret(&plain, &shop.key);
    let config = signer.folder.to_str().expect("a path").to_owned();
    let args = ["signer", "seal", "shop", "--key", plain.to_str().expect("a path"), "-c", &config];
    let (code, _, told) = run(&args);
    assert_eq!(code, 0, "{told}");
    std::fs::remove_file(plain).expect("the key in PEM");
    for piece in pieces(&shop) {
        assert!(!has_bytes(&signer.folder, &piece), "the key lies there in the open");
    }
    eventually("the signer has it", || async {
        (signer.ask("/readyz").await.is_some_and(|answer| answer.status == 200)).then_some(())
    })
    .await;
    let gateway = Gateway::new(&internal, GATEWAY);
    let edge = Edge::file()
        .config(gateway.pool(&internal, &[signer.addr], json!({})))
        .resource("ssls", remote("shop", "shop.test", &shop))
        .start()
        .await;
    let client = fresh(&ca.client_config().build());
    eventually("handshakes are signed", || async { tls(edge.https, &client, "shop.test").await.ok() }).await;
    let (code, _, told) = run(&["signer", "seal", "../shop", "--key", "-", "-c", &config]);
    assert!(code != 0 && told.contains("no name of a key"), "{told}");
}
