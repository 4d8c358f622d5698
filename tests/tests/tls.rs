//! TLS from clients: which certificate is shown, which versions are spoken, and who must show one of their own.

use std::sync::Arc;

use e2e::certs::{Authority, KeyKind, Leaf};
use e2e::client::{Call, Connection, tls};
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};
use rustls::{ClientConfig, HandshakeKind, ProtocolVersion};

fn ssl(id: &str, snis: &[&str], leaf: &Leaf) -> Value {
    json!({"id": id, "snis": snis, "cert": leaf.cert, "key": leaf.key})
}

fn with(mut object: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().expect("fields") {
        object[name] = value.clone();
    }
    object
}

fn all(origin: &Origin) -> Value {
    json!({"id": "all", "uri": "/*", "upstream": origin.upstream()})
}

/// The certificate shown for `sni`, or `None` when the handshake fails.
async fn shown(edge: &Edge, config: &Arc<ClientConfig>, sni: &str) -> Option<Vec<u8>> {
    let stream = tls(edge.https, config, sni).await.ok()?;
    let certificates = stream.get_ref().1.peer_certificates()?;
    certificates.first().map(|certificate| certificate.to_vec())
}

#[tokio::test]
async fn the_server_name_chooses_the_certificate() {
    let ca = Authority::new("ca");
    let exact = ca.server(&["a.names.test"]);
    // Valid for more than its wildcard covers, so that only the choice can be wrong.
    let wild = ca.server(&["*.names.test", "x.y.names.test"]);
    let origin = echo::start().await;
    let edge = Edge::file()
        .resource("ssls", ssl("exact", &["a.names.test"], &exact))
        .resource("ssls", ssl("wild", &["*.names.test"], &wild))
        .route(all(&origin))
        .start()
        .await;
    let config = ca.client_config().build();
    assert_eq!(shown(&edge, &config, "a.names.test").await, Some(exact.der().to_vec()));
    assert_eq!(shown(&edge, &config, "A.NAMES.test").await, Some(exact.der().to_vec()));
    assert_eq!(shown(&edge, &config, "b.names.test").await, Some(wild.der().to_vec()));
    // A wildcard covers one label.
    assert_eq!(shown(&edge, &config, "x.y.names.test").await, None);
    assert_eq!(shown(&edge, &config, "other.test").await, None);
    let mut connection = Connection::tls(edge.https, &config, "a.names.test").await.expect("a handshake");
    let seen = connection.send(Call::get("/")).await.expect_status(200).json();
    assert_eq!(seen["headers"]["x-forwarded-proto"], json!(["https"]));
}

#[tokio::test]
async fn one_name_has_certificates_of_both_kinds() {
    let ca = Authority::new("ca");
    let (ecdsa, rsa) = (ca.server(&["both.test"]), ca.server_with(&["both.test"], KeyKind::Rsa));
    let object = with(ssl("both", &["both.test"], &rsa), json!({"certs": [ecdsa.cert], "keys": [ecdsa.key]}));
    let edge = Edge::file().resource("ssls", object).start().await;
    for (kind, leaf) in [(KeyKind::Ecdsa, &ecdsa), (KeyKind::Rsa, &rsa)] {
        let config = ca.client_config().build_for(kind);
        assert_eq!(shown(&edge, &config, "both.test").await, Some(leaf.der().to_vec()), "{kind:?}");
    }
}

#[tokio::test]
async fn a_client_without_a_server_name_gets_the_fallback() {
    let ca = Authority::new("ca");
    let leaf = ca.server(&["fallback.test", "127.0.0.1"]);
    let origin = echo::start().await;
    let start = |config: Value| {
        Edge::file()
            .config(config)
            .resource("ssls", ssl("f", &["fallback.test"], &leaf))
            .route(all(&origin))
            .start()
    };
    let config = ca.client_config().build();
    let edge = start(json!({"apisix": {"ssl": {"fallback_sni": "fallback.test"}}})).await;
    assert_eq!(shown(&edge, &config, "127.0.0.1").await, Some(leaf.der().to_vec()));
    let edge = start(json!({})).await;
    assert_eq!(shown(&edge, &config, "127.0.0.1").await, None);
}

#[tokio::test]
async fn versions_are_limited_for_all_and_for_one_name() {
    let ca = Authority::new("ca");
    let leaf = ca.server(&["new.test", "any.test"]);
    let edge = Edge::file()
        .resource("ssls", with(ssl("new", &["new.test"], &leaf), json!({"ssl_protocols": ["TLSv1.3"]})))
        .resource("ssls", ssl("any", &["any.test"], &leaf))
        .start()
        .await;
    let old = ca.client_config().versions(&[&rustls::version::TLS12]).build();
    let new = ca.client_config().versions(&[&rustls::version::TLS13]).build();
    assert!(shown(&edge, &old, "any.test").await.is_some());
    assert!(shown(&edge, &new, "any.test").await.is_some());
    assert!(shown(&edge, &new, "new.test").await.is_some());
    assert!(shown(&edge, &old, "new.test").await.is_none());

    let strict = Edge::file()
        .config(json!({"apisix": {"ssl": {"ssl_protocols": "TLSv1.3"}}}))
        .resource("ssls", ssl("any", &["any.test"], &leaf))
        .start()
        .await;
    assert!(shown(&strict, &old, "any.test").await.is_none());
    let stream = tls(strict.https, &new, "any.test").await.expect("a handshake");
    assert_eq!(stream.get_ref().1.protocol_version(), Some(ProtocolVersion::TLSv1_3));
}

#[tokio::test]
async fn a_changed_certificate_is_shown_at_the_next_handshake_and_old_connections_live() {
    let ca = Authority::new("ca");
    let (old, new) = (ca.server(&["a.test"]), ca.server(&["a.test"]));
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    edge.put("routes/all", all(&origin)).await;
    edge.put("ssls/1", json!({"snis": ["a.test"], "cert": old.cert, "key": old.key})).await;
    let config = ca.client_config().build();
    eventually("the certificate is shown", || async { shown(&edge, &config, "a.test").await }).await;
    let mut connection = Connection::tls(edge.https, &config, "a.test").await.expect("a handshake");
    connection.send(Call::get("/")).await.expect_status(200);
    edge.put("ssls/1", json!({"snis": ["a.test"], "cert": new.cert, "key": new.key})).await;
    eventually("the new certificate is shown", || async {
        (shown(&edge, &ca.client_config().build(), "a.test").await? == new.der().to_vec()).then_some(())
    })
    .await;
    connection.send(Call::get("/")).await.expect_status(200);
    edge.call_admin("DELETE", "ssls/1", None).await.expect_status(200);
    eventually("no certificate is left", || async {
        shown(&edge, &ca.client_config().build(), "a.test").await.is_none().then_some(())
    })
    .await;
    connection.send(Call::get("/")).await.expect_status(200);
}

/// Whether a request over TLS succeeds; an alert of TLS 1.3 comes only after the handshake.
async fn status(edge: &Edge, config: &Arc<ClientConfig>, sni: &str, call: Call) -> Option<u16> {
    let mut connection = Connection::tls(edge.https, config, sni).await.ok()?;
    connection.try_send(call).await.ok().map(|answer| answer.status)
}

#[tokio::test]
async fn a_client_certificate_is_required_where_the_name_asks_for_it() {
    let (ca, clients, strangers) =
        (Authority::new("ca"), Authority::new("clients"), Authority::new("strangers"));
    let leaf = ca.server(&["mutual.test", "open.test"]);
    let origin = echo::start().await;
    let mutual =
        with(ssl("m", &["mutual.test"], &leaf), json!({"client": {"ca": clients.pem(), "depth": 1}}));
    let edge = Edge::file()
        .resource("ssls", mutual)
        .resource("ssls", ssl("o", &["open.test"], &leaf))
        .route(all(&origin))
        .start()
        .await;
    let anonymous = ca.client_config().build();
    let known = ca.client_config().identity(&clients.client("ann.test")).build();
    let unknown = ca.client_config().identity(&strangers.client("eve.test")).build();
    let get = || Call::get("/");
    assert_eq!(status(&edge, &known, "mutual.test", get()).await, Some(200));
    assert!(matches!(status(&edge, &anonymous, "mutual.test", get()).await, None | Some(400)));
    assert!(matches!(status(&edge, &unknown, "mutual.test", get()).await, None | Some(400)));
    assert_eq!(status(&edge, &anonymous, "open.test", get()).await, Some(200));
    assert_eq!(origin.requests(), 2);
}

#[tokio::test]
async fn the_depth_of_client_certificates_is_limited() {
    let (ca, root) = (Authority::new("ca"), Authority::new("root"));
    let leaf = ca.server(&["one.test", "two.test"]);
    // As OpenSSL counts: certificates between the client's own and the authority that is trusted.
    let below = root.intermediate("below");
    let deeper = below.intermediate("deeper");
    let origin = echo::start().await;
    let mutual = |id: &str, depth: u8| {
        let sni = format!("{id}.test");
        with(ssl(id, &[&sni], &leaf), json!({"client": {"ca": root.pem(), "depth": depth}}))
    };
    let edge = Edge::file()
        .resource("ssls", mutual("one", 1))
        .resource("ssls", mutual("two", 2))
        .route(all(&origin))
        .start()
        .await;
    let served = async |client: &Leaf, sni: &str| {
        let config = ca.client_config().identity(client).build();
        status(&edge, &config, sni, Call::get("/")).await == Some(200)
    };
    let clients = [root.client("a.test"), below.client("a.test"), deeper.client("a.test")];
    for (sni, expected) in [("one.test", [true, true, false]), ("two.test", [true, true, true])] {
        for (depth, client) in clients.iter().enumerate() {
            assert_eq!(served(client, sni).await, expected[depth], "{depth} authorities between, {sni}");
        }
    }
}

#[tokio::test]
async fn some_paths_can_be_left_open_without_a_client_certificate() {
    let (ca, clients) = (Authority::new("ca"), Authority::new("clients"));
    let leaf = ca.server(&["mutual.test"]);
    let origin = echo::start().await;
    let client = json!({"ca": clients.pem(), "depth": 1, "skip_mtls_uri_regex": ["^/open.*"]});
    let edge = Edge::file()
        .resource("ssls", with(ssl("m", &["mutual.test"], &leaf), json!({"client": client})))
        .route(all(&origin))
        .start()
        .await;
    let anonymous = ca.client_config().build();
    let known = ca.client_config().identity(&clients.client("ann.test")).build();
    assert_eq!(status(&edge, &anonymous, "mutual.test", Call::get("/open/a")).await, Some(200));
    assert_eq!(status(&edge, &anonymous, "mutual.test", Call::get("/closed")).await, Some(400));
    assert_eq!(status(&edge, &anonymous, "mutual.test", Call::get("/open/../closed")).await, Some(400));
    assert_eq!(status(&edge, &known, "mutual.test", Call::get("/closed")).await, Some(200));
    assert_eq!(origin.requests(), 2);
}

#[tokio::test]
async fn a_host_that_asks_for_a_certificate_is_not_reached_by_another_name() {
    let (ca, clients) = (Authority::new("ca"), Authority::new("clients"));
    let leaf = ca.server(&["mutual.test", "open.test"]);
    let origin = echo::start().await;
    let mutual = with(ssl("m", &["mutual.test"], &leaf), json!({"client": {"ca": clients.pem()}}));
    let edge = Edge::file()
        .resource("ssls", mutual)
        .resource("ssls", ssl("o", &["open.test"], &leaf))
        .route(all(&origin))
        .start()
        .await;
    for alpn in [&["http/1.1"][..], &["h2"][..]] {
        let anonymous = ca.client_config().alpn(alpn).build();
        for host in ["mutual.test", "MUTUAL.test", "mutual.test:9443", "mutual.test."] {
            let call = Call::get("/").header("host", host);
            let got = status(&edge, &anonymous, "open.test", call).await;
            assert_eq!(got, Some(421), "host {host} over {alpn:?}");
        }
        let call = Call::get("/").header("host", "third.test");
        assert_eq!(status(&edge, &anonymous, "open.test", call).await, Some(200), "over {alpn:?}");
    }
}

#[tokio::test]
async fn a_name_that_asks_for_a_certificate_stays_closed_when_its_resource_is_set_aside() {
    let (ca, clients) = (Authority::new("ca"), Authority::new("clients"));
    let leaf = ca.server(&["*.wild.test", "mutual.wild.test"]);
    let origin = echo::start().await;
    let mutual = with(ssl("m", &["mutual.wild.test"], &leaf), json!({"client": {"ca": clients.pem()}}));
    let edge = Edge::file()
        .resource("ssls", with(mutual, json!({"no_such_field": 1})))
        .resource("ssls", ssl("w", &["*.wild.test"], &leaf))
        .route(all(&origin))
        .start()
        .await;
    let anonymous = ca.client_config().build();
    assert_eq!(status(&edge, &anonymous, "other.wild.test", Call::get("/")).await, Some(200));
    assert_eq!(
        status(&edge, &anonymous, "mutual.wild.test", Call::get("/")).await,
        None,
        "not by the wildcard"
    );
    let host = Call::get("/").header("host", "mutual.wild.test");
    assert_eq!(status(&edge, &anonymous, "other.wild.test", host).await, Some(421), "nor by another name");
    assert_eq!(origin.requests(), 1);
}

#[tokio::test]
async fn sessions_are_resumed_but_never_across_client_certificate_settings() {
    let (ca, clients) = (Authority::new("ca"), Authority::new("clients"));
    let leaf = ca.server(&["open.test"]);
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    edge.put("routes/all", all(&origin)).await;
    let open = json!({"snis": ["open.test"], "cert": leaf.cert, "key": leaf.key});
    edge.put("ssls/1", open.clone()).await;
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        // One value for all connections: it keeps the sessions.
        let config = ca.client_config().versions(&[version]).build();
        let handshake = async || -> Option<HandshakeKind> {
            let mut stream = tls(edge.https, &config, "open.test").await.ok()?;
            let kind = stream.get_ref().1.handshake_kind();
            // The session comes with the first data of the server.
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let request = b"GET / HTTP/1.1\r\nhost: open.test\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await.ok()?;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            answer.starts_with(b"HTTP/1.1 200").then_some(kind).flatten()
        };
        eventually("the first handshake", || async { handshake().await }).await;
        assert_eq!(handshake().await, Some(HandshakeKind::Resumed), "{version:?}");
        // From now on the name asks for a certificate: what was agreed before counts for nothing.
        edge.put("ssls/1", with(open.clone(), json!({"client": {"ca": clients.pem()}}))).await;
        eventually("a client without a certificate is refused", || async {
            handshake().await.is_none().then_some(())
        })
        .await;
        edge.put("ssls/1", open.clone()).await;
        eventually("the name is open again", || async { handshake().await.map(drop) }).await;
    }
}

#[tokio::test]
async fn plain_http_on_the_tls_port_is_refused() {
    let ca = Authority::new("ca");
    let leaf = ca.server(&["a.test"]);
    let edge = Edge::file().resource("ssls", ssl("a", &["a.test"], &leaf)).start().await;
    let limit = std::time::Duration::from_secs(10);
    let outcome = e2e::client::exchange(edge.https, "GET / HTTP/1.1\r\nhost: a.test\r\n\r\n", limit).await;
    assert_ne!(outcome.end, e2e::client::End::Open);
    assert_ne!(outcome.status(), Some(200));
}

#[tokio::test]
async fn a_client_hello_in_pieces_changes_nothing() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let ca = Authority::new("ca");
    let leaf = ca.server(&["a.test"]);
    let origin = echo::start().await;
    let edge = Edge::file().resource("ssls", ssl("a", &["a.test"], &leaf)).route(all(&origin)).start().await;
    let (near, far) = tokio::io::duplex(64 * 1024);
    let mut outside = e2e::client::connect(edge.https).await;
    // Between client and gateway every byte travels alone.
    let relay = tokio::spawn(async move {
        let (mut from_client, mut to_client) = tokio::io::split(far);
        let (mut from_edge, mut to_edge) = outside.split();
        let up = async {
            let mut byte = [0];
            while from_client.read_exact(&mut byte).await.is_ok() && to_edge.write_all(&byte).await.is_ok() {}
        };
        tokio::join!(up, tokio::io::copy(&mut from_edge, &mut to_client))
    });
    let name = rustls_pki_types::ServerName::try_from("a.test").expect("a name");
    let stream = tokio_rustls::TlsConnector::from(ca.client_config().build())
        .connect(name, near)
        .await
        .expect("a handshake byte by byte");
    let mut connection = Connection::http1_over(stream, "a.test".to_owned(), "https").await;
    connection.send(Call::get("/")).await.expect_status(200);
    relay.abort();
}
