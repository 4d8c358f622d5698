//! Whom a sidecar believes, over real sockets: every kind of certificate that is wrong in one way, shown at every way in and
//! by those that are called, with and without redirection.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use e2e::client::{Call, DEADLINE};
use e2e::edge::binary;
use e2e::machine::Machine;
use e2e::malformed::{self, Shown};
use e2e::origin::{Origin, echo};
use e2e::sidecar::{Mesh, Sidecar, id};
use e2e::{eventually, json};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// As many kinds as have to be refused at least.
const KINDS: usize = 37;

async fn failed(sidecar: &Sidecar) -> u64 {
    let metrics = sidecar.ask("/metrics").await.text();
    let name = "postern_mesh_handshakes_total{side=\"inbound\",outcome=\"failed\"} ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.expect("the metric").parse().expect("a number")
}

/// Shows all kinds at `to`: nobody hears anything of the application.
async fn refused(kinds: &[(String, Shown)], to: SocketAddr, alpn: &str) {
    for (what, shown) in kinds {
        let heard = shown.call(to, alpn).await;
        assert_eq!(String::from_utf8_lossy(&heard), "", "{alpn} at {to}: {what}");
    }
}

#[tokio::test]
async fn no_malformed_certificate_gets_in() {
    let (mesh, origin) = (Mesh::new(), echo::start().await);
    let kinds = malformed::kinds(&mesh.authority);
    assert!(kinds.len() >= KINDS, "{}", kinds.len());
    let callee = mesh
        .sidecar("payments")
        .inbound(origin.addr, json!({}))
        .inbound(origin.addr, json!({"mode": "permissive"}))
        .start()
        .await;
    for port in [0, 1] {
        let heard = malformed::good(&mesh.authority).call(callee.inbound(port), "postern-h1").await;
        assert!(heard.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&heard));
    }
    let before = origin.requests();
    refused(&kinds, callee.inbound(0), "postern-h1").await;
    refused(&kinds, callee.inbound(0), "postern-tcp").await;
    // Where others are let in without a certificate, one that is wrong opens nothing all the same.
    refused(&kinds, callee.inbound(1), "postern-h1").await;
    assert_eq!(origin.requests(), before, "the application has heard nothing of it");
    let all = 3 * kinds.len() as u64;
    eventually("every one of them is counted", || async { (failed(&callee).await == all).then_some(()) })
        .await;
}

#[tokio::test]
async fn no_malformed_certificate_gets_in_where_connections_are_redirected() {
    let Some([near, far]) = Machine::pair() else { return };
    let mesh = Mesh::new();
    let kinds = malformed::kinds(&mesh.authority);
    let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
    let origin = far.run(async move { echo::named_at(at("10.9.0.2:8080"), "payments").await }).await;
    let builder = mesh.sidecar("payments").config(json!({
        "inbound": {"transparent": true, "hbone": "10.9.0.2:15008"},
        "outbound": {"transparent": true},
        "capture": {"mark": "0x505"},
    }));
    let mut callee = far.run(async move { builder.launch() }).await;
    let file = callee.folder.join("sidecar.yaml");
    far.namespace.sh(&format!("{} sidecar capture install -c {}", binary().display(), file.display()));
    let callee = far
        .run(async move {
            callee.until_ready().await;
            callee
        })
        .await;
    let good = malformed::good(&mesh.authority);
    let heard = near.run(async move { good.call(at("10.9.0.2:8080"), "postern-h1").await }).await;
    assert!(heard.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&heard));
    let before = origin.connections();
    near.run(async move {
        refused(&kinds, at("10.9.0.2:8080"), "postern-h1").await;
        refused(&kinds, at("10.9.0.2:15008"), "h2").await;
    })
    .await;
    assert_eq!(origin.connections(), before, "the application has heard nothing of it");
    drop(callee);
}

/// What a server shows for the time being.
#[derive(Debug)]
struct Shows(Mutex<Option<Arc<CertifiedKey>>>);

impl ResolvesServerCert for Shows {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.lock().expect("a lock").clone()
    }
}

#[tokio::test]
async fn nobody_is_spoken_to_who_shows_a_malformed_certificate() {
    let mesh = Mesh::new();
    let shows = Arc::new(Shows(Mutex::new(None)));
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_cert_resolver(shows.clone());
    config.alpn_protocols = vec![b"postern-h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let origin = Origin::tcp(move |stream, seen| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let mut read = vec![0; 1024];
            while let Ok(1..) = tokio::io::AsyncReadExt::read(&mut stream, &mut read).await {
                seen.request();
            }
        }
    })
    .await;
    let service = json!({"identities": [id("orders")], "upstream": {"retries": 0}});
    let caller = mesh.sidecar("client").service("orders", origin.addr, service).start().await;
    for (what, shown) in malformed::kinds(&mesh.authority) {
        *shows.0.lock().expect("a lock") = shown.certified();
        let call = Call::get("/secret").send_to(caller.listener(0));
        let answer = timeout(DEADLINE, call).await.expect("an answer in time");
        assert_eq!(answer.status, 502, "{what}: {answer:?}");
    }
    assert_eq!(origin.requests(), 0, "nothing was said to any of them");
    *shows.0.lock().expect("a lock") = malformed::good(&mesh.authority).certified();
    let to = caller.listener(0);
    let call = tokio::spawn(async move { Call::get("/").send_to(to).await });
    eventually("who is as it should be is spoken to", || async { (origin.requests() > 0).then_some(()) })
        .await;
    call.abort();
}
