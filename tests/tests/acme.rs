//! Certificates from a real ACME authority (pebble): how names are shown to be ours, what is kept, what happens when an order
//! fails, and that of several gateways one orders.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use e2e::client::{Call, Connection, tls};
use e2e::etcd::Etcd;
use e2e::origin::{Origin, echo};
use e2e::pebble::{BOUND, Pebble, Settings};
use e2e::{Edge, EdgeBuilder, Value, eventually, json};
use rustls::ClientConfig;

fn all(origin: &Origin) -> Value {
    json!({"id": "all", "uri": "/*", "upstream": origin.upstream()})
}

fn ssl(id: &str, snis: &[&str]) -> Value {
    json!({"id": id, "snis": snis, "acme": {}})
}

/// A gateway that pebble finds behind every name from its first order on.
async fn start(builder: EdgeBuilder, pebble: &Pebble) -> Edge {
    let edge = builder.config(pebble.config()).launch();
    pebble.http.lead_to(&[edge.http]);
    pebble.https.lead_to(&[edge.https]);
    eventually("the gateway is ready", || async {
        edge.readiness().await.filter(|answer| answer.status == 200)
    })
    .await;
    edge
}

/// The certificate that is shown for a name to a client that believes pebble.
async fn shown(edge: &Edge, config: &Arc<ClientConfig>, name: &str) -> Option<Vec<u8>> {
    let stream = tls(edge.https, config, name).await.ok()?;
    Some(stream.get_ref().1.peer_certificates()?.first()?.to_vec())
}

async fn until_shown(edge: &Edge, config: &Arc<ClientConfig>, name: &str) -> Vec<u8> {
    eventually(&format!("a certificate for {name}"), || shown(edge, config, name)).await
}

/// The answer of the Control API about the only certificate, once it is as asked for.
async fn status(edge: &Edge, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    eventually(what, || async {
        let status = edge.call_control("/v1/acme").await.expect_status(200).json();
        let certificate = status["certificates"][0].clone();
        is(&certificate).then_some(certificate)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_shown_by_http_and_what_was_given_is_kept_over_restarts() {
    if !Pebble::is_there() {
        return eprintln!("skipped: pebble is not installed (tests/needs.sh)");
    }
    // Some nonces are refused although they are good, as any authority may; four in a row would be an attempt in vain.
    let mut pebble = Pebble::start(Settings { refused_nonces: 5, ..Settings::default() }).await;
    let origin = echo::start().await;
    let away = json!({"redirect": {"http_to_https": true}});
    let builder = Edge::file()
        .resource("ssls", ssl("shop", &["shop.acme.test", "www.acme.test"]))
        .route(json!({"id": "away", "uri": "/*", "plugins": away, "upstream": origin.upstream()}));
    let mut edge = start(builder, &pebble).await;
    let config = pebble.client_config(&["http/1.1"]).await;
    let first = until_shown(&edge, &config, "shop.acme.test").await;
    assert_eq!(shown(&edge, &config, "www.acme.test").await.as_ref(), Some(&first), "both names are on it");
    let mut connection = Connection::tls(edge.https, &config, "www.acme.test").await.expect("a handshake");
    connection.send(Call::get("/")).await.expect_status(200);

    let answer = edge.get("/.well-known/acme-challenge/nobody-asked-for-this").await;
    assert_eq!(answer.status, 301, "what is not pending is routed");
    let (code, told, _) = edge.command("acme", &["status"]).await;
    assert_eq!(code, 0, "{told}");
    let told = &told["certificates"][0];
    assert_eq!((told["state"].as_str(), &told["ssls"]), (Some("valid"), &json!(["shop"])));
    assert!(told["renew_at"].as_u64() < told["not_after"].as_u64(), "{told}");
    let metrics = e2e::client::Call::get("/apisix/prometheus/metrics").send_to(edge.metrics).await.text();
    assert!(metrics.contains("postern_acme_certificates{state=\"valid\"} 1"), "{metrics}");

    // At rest: for the owner alone, and no key in the open.
    let folder = edge.folder.join("data/acme");
    assert_eq!(std::fs::metadata(&folder).expect("a folder").permissions().mode() & 0o077, 0);
    for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
        let text = std::fs::read_to_string(entry.path()).expect("text");
        assert!(!text.contains("PRIVATE KEY") && !text.contains("key_pkcs8"), "{:?}", entry.path());
        assert_eq!(entry.metadata().expect("a file").permissions().mode() & 0o077, 0, "{:?}", entry.path());
    }

    // Without the authority, too.
    let issued = pebble.issued();
    pebble.kill();
    edge.terminate().await;
    edge.start_again().await;
    assert_eq!(
        shown(&edge, &config, "shop.acme.test").await,
        Some(first),
        "at the first handshake after the start"
    );
    assert_eq!((issued, pebble.issued()), (1, 1));
    assert!(!edge.output().contains("PRIVATE KEY"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_shown_in_handshakes_to_an_authority_that_wants_an_account_at_its_operator() {
    if !Pebble::is_there() {
        return eprintln!("skipped: pebble is not installed (tests/needs.sh)");
    }
    let pebble = Pebble::start(Settings { bound: true, ..Settings::default() }).await;
    let origin = echo::start().await;
    let bound = json!({"postern": {"acme": {"challenge": "tls-alpn-01",
                       "external_account": {"kid": BOUND.0, "hmac_key": BOUND.1}}}});
    let edge = start(Edge::embedded().config(bound), &pebble).await;
    let config = pebble.client_config(&["http/1.1"]).await;
    edge.put("routes/all", all(&origin)).await;
    for (body, what) in [
        (json!({"snis": ["*.acme.test"], "acme": {}}), "DNS-01"),
        (json!({"snis": ["a.acme.test"], "acme": {"chalenge": "http-01"}}), "chalenge"),
        (json!({"snis": ["a.acme.test"]}), "cert"),
    ] {
        let answer = edge.call_admin("PUT", "ssls/1", Some(&body)).await;
        assert!(answer.status == 400 && answer.text().contains(what), "{body}: {}", answer.text());
    }
    edge.put("ssls/1", ssl("1", &["a.acme.test"])).await;
    let first = until_shown(&edge, &config, "a.acme.test").await;
    // Nobody asks any more, so nobody is answered so.
    let acme = pebble.client_config(&["acme-tls/1"]).await;
    assert_eq!(shown(&edge, &acme, "a.acme.test").await, None);

    // One name more: the old certificate is shown until the new one is there, and then for both.
    edge.put("ssls/1", ssl("1", &["a.acme.test", "b.acme.test"])).await;
    assert!(shown(&edge, &config, "a.acme.test").await.is_some());
    let second = until_shown(&edge, &config, "b.acme.test").await;
    assert_eq!(shown(&edge, &config, "a.acme.test").await.as_ref(), Some(&second));
    assert_ne!(first, second);
    // And back: the first one is still there, and nothing is ordered.
    edge.put("ssls/1", ssl("1", &["a.acme.test"])).await;
    e2e::eventually("the first one is shown again", || async {
        (shown(&edge, &config, "a.acme.test").await.as_ref() == Some(&first)).then_some(())
    })
    .await;
    assert_eq!(pebble.issued(), 2);
    edge.delete("ssls/1").await;
    e2e::eventually("the name is gone", || async {
        shown(&edge, &config, "a.acme.test").await.is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewals_under_load_fail_no_handshake_and_no_request() {
    if !Pebble::is_there() {
        return eprintln!("skipped: pebble is not installed (tests/needs.sh)");
    }
    let pebble = Pebble::start(Settings::default()).await;
    let origin = echo::start().await;
    let builder = Edge::file().resource("ssls", ssl("shop", &["shop.acme.test"])).route(all(&origin));
    let edge = start(builder, &pebble).await;
    let config = pebble.client_config(&["http/1.1"]).await;
    let mut serving = until_shown(&edge, &config, "shop.acme.test").await;
    let (stop, good) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load: Vec<_> = (0..4)
        .map(|_| {
            let (stop, good, config, https) = (stop.clone(), good.clone(), config.clone(), edge.https);
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // A handshake for each request.
                    let mut connection = Connection::tls(https, &config, "shop.acme.test").await?;
                    let answer = connection.try_send(Call::get("/")).await.map_err(std::io::Error::other)?;
                    if answer.status != 200 {
                        return Err(std::io::Error::other(format!("status {}", answer.status)));
                    }
                    good.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        })
        .collect();
    for _ in 0..3 {
        let (code, told, err) = edge.command("acme", &["renew", "shop.acme.test"]).await;
        assert_eq!(code, 0, "{told} {err}");
        serving = eventually("another certificate", || async {
            shown(&edge, &config, "shop.acme.test").await.filter(|next| *next != serving)
        })
        .await;
    }
    let before = good.load(Ordering::Relaxed);
    e2e::eventually("the load goes on", || async {
        (good.load(Ordering::Relaxed) > before + 20).then_some(())
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    for task in load {
        task.await.expect("a client").expect("no request fails");
    }
    assert_eq!(pebble.issued(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_fails_leaves_the_old_certificate_and_says_why() {
    if !Pebble::is_there() {
        return eprintln!("skipped: pebble is not installed (tests/needs.sh)");
    }
    let pebble = Pebble::start(Settings::default()).await;
    // Long enough that only a command orders again.
    let patient = json!({"postern": {"acme": {"retry": "1h"}}});
    let edge = Edge::file()
        .config(pebble.config())
        .config(patient)
        .resource("ssls", ssl("shop", &["shop.acme.test"]))
        .start()
        .await;
    let config = pebble.client_config(&["http/1.1"]).await;
    // Nothing answers at the name, and no certificate is made up.
    status(&edge, "the first order has failed", |certificate| certificate["state"] == "failed").await;
    assert_eq!(shown(&edge, &config, "shop.acme.test").await, None);
    pebble.http.lead_to(&[edge.http]);
    assert_eq!(edge.command("acme", &["renew", "shop"]).await.0, 0);
    let first = until_shown(&edge, &config, "shop.acme.test").await;
    // The name leads elsewhere, as after a mistake in DNS.
    let elsewhere = echo::start().await;
    pebble.http.lead_to(&[elsewhere.addr]);
    assert_eq!(edge.command("acme", &["renew", "shop"]).await.0, 0);
    let told = status(&edge, "the failure is told", |certificate| certificate["failure"].is_object()).await;
    let reason = told["failure"]["reason"].as_str().unwrap_or_default().to_owned();
    assert!(reason.contains("shop.acme.test"), "{reason}");
    assert_eq!((told["failure"]["count"].as_u64(), told["state"].as_str()), (Some(1), Some("valid")));
    let pause = told["failure"]["next_attempt"].as_u64().unwrap_or_default()
        - told["failure"]["at"].as_u64().unwrap_or_default();
    assert!((3200..=4000).contains(&pause), "{pause}");
    assert_eq!(shown(&edge, &config, "shop.acme.test").await.as_ref(), Some(&first));
    assert_eq!(edge.command("acme", &["status"]).await.0, 1);
    assert_eq!(edge.command("acme", &["renew", "nobody"]).await.0, 3);
    pebble.http.lead_to(&[edge.http]);
    assert_eq!(edge.command("acme", &["renew", "shop"]).await.0, 0);
    eventually("another certificate", || async {
        shown(&edge, &config, "shop.acme.test").await.filter(|next| *next != first)
    })
    .await;
    status(&edge, "no failure any more", |certificate| certificate["failure"].is_null()).await;
    assert_eq!(edge.command("acme", &["status"]).await.0, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_gateways_over_one_etcd_one_orders_and_both_answer_and_serve() {
    if !Pebble::is_there() {
        return eprintln!("skipped: pebble is not installed (tests/needs.sh)");
    }
    let pebble = Pebble::start(Settings::default()).await;
    let mut etcd = Etcd::start().await;
    let one = Edge::etcd(&etcd).config(pebble.config()).start().await;
    let mut two = Edge::etcd(&etcd).config(pebble.config()).start().await;
    // Pebble looks several times at once, and every other look is at the other gateway.
    pebble.http.lead_to(&[one.http, two.http]);
    pebble.https.lead_to(&[one.https, two.https]);
    let config = pebble.client_config(&["http/1.1"]).await;
    one.put("ssls/http", json!({"snis": ["http.acme.test"], "acme": {"challenge": "http-01"}})).await;
    one.put("ssls/tls", json!({"snis": ["tls.acme.test"], "acme": {"challenge": "tls-alpn-01"}})).await;
    for name in ["http.acme.test", "tls.acme.test"] {
        let (first, second) =
            (until_shown(&one, &config, name).await, until_shown(&two, &config, name).await);
        assert_eq!(first, second);
    }
    assert_eq!(pebble.issued(), 2);
    for edge in [&one, &two] {
        let told = status(edge, "it is valid", |certificate| certificate["state"] == "valid").await;
        assert!(told["failure"].is_null(), "{told}");
    }
    // APISIX's keys are its own: what is not a resource is elsewhere.
    let keys = etcd.keys().await;
    assert!(keys.iter().any(|key| key.starts_with("/apisix-acme/certificate/")), "{keys:?}");
    assert!(
        keys.iter().filter(|key| key.starts_with("/apisix/")).all(|key| !key.contains("acme")),
        "{keys:?}"
    );

    // A gateway that starts while etcd is away serves what it had.
    let before = shown(&two, &config, "tls.acme.test").await;
    // A change is on disk a second later.
    let kept = two.folder.join("data/last-good.etcd");
    eventually("the configuration is kept", || async {
        let kept = std::fs::read(&kept).unwrap_or_default();
        kept.windows(13).any(|name| name == b"tls.acme.test").then_some(())
    })
    .await;
    etcd.kill();
    two.kill();
    two.start_again().await;
    assert_eq!(shown(&two, &config, "tls.acme.test").await, before);
    assert_eq!(pebble.issued(), 2);
}
