//! Discovery by DNS through the gateway and under load: a name server that misbehaves on purpose, and a real dnsmasq.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use discovery::dns::hostile::{Behaviour, ResponseCode, Server};
use e2e::dnsmasq::Dnsmasq;
use e2e::load::Load;
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, eventually_within, json};

/// Requests a second.
const RATE: u32 = 500;

/// One origin for each name that is given.
async fn origins(names: &[&str]) -> Vec<Origin> {
    let mut origins = Vec::new();
    for name in names {
        origins.push(echo::named(name).await);
    }
    origins
}

/// The service `web.test`, with an SRV record for each of these origins.
fn serve(server: &Server, origins: &[&Origin]) {
    let records: Vec<_> = origins.iter().map(|origin| (0, 1, origin.addr.port(), "host.test")).collect();
    server.addresses("host.test", 0, [IpAddr::from([127, 0, 0, 1])]);
    server.services("web.test", 0, &records);
    server.behave(Behaviour::Well);
}

/// A gateway with a route `/` to an upstream `web`.
async fn edge(servers: &[std::net::SocketAddr], upstream: Value) -> Edge {
    let servers: Vec<String> = servers.iter().map(ToString::to_string).collect();
    let mut upstream = upstream;
    upstream["id"] = json!("web");
    upstream["type"] = json!("roundrobin");
    Edge::file()
        .config(json!({
            "discovery": {"dns": {"servers": servers, "timeout": 0.3}},
            "apisix": {"dns_resolver": servers, "resolver_timeout": 1},
        }))
        .resource("upstreams", upstream)
        .route(json!({"id": "web", "uri": "/*", "upstream_id": "web"}))
        .start()
        .await
}

fn service() -> Value {
    json!({"service_name": "web.test", "discovery_type": "dns"})
}

fn load(edge: &Edge) -> Load {
    Load::start(edge.http, "GET / HTTP/1.1\r\nhost: a.test\r\n\r\n", 200, 20, RATE)
}

/// Waits until `name` serves, or does not serve any more.
async fn until_serving(edge: &Edge, name: &str, serves: bool) {
    eventually(&format!("{name} serves: {serves}"), || async {
        let mut seen = false;
        for _ in 0..6 {
            seen |= edge.get("/").await.header("x-origin") == Some(name);
        }
        (seen == serves).then_some(())
    })
    .await;
}

#[tokio::test]
async fn whatever_the_name_server_does_no_request_fails_and_changes_are_seen_within_the_time_to_live() {
    let server = Server::start().await;
    let origins = origins(&["one", "two", "three"]).await;
    let [one, two, three] = &origins[..] else { panic!("three origins") };
    serve(&server, &[one, two]);
    let edge = edge(&[server.addr], service()).await;
    edge.until_status("/", 200).await;
    let load = load(&edge);
    for behaviour in [
        Behaviour::Code(ResponseCode::NXDomain),
        Behaviour::Code(ResponseCode::ServFail),
        Behaviour::Code(ResponseCode::Refused),
        Behaviour::Bare,
        Behaviour::Foreign,
        Behaviour::Truncated,
        Behaviour::TruncatedNoTcp,
        Behaviour::WrongId,
        Behaviour::WrongQuestion,
        Behaviour::Garbage,
        Behaviour::Half,
        Behaviour::Silence,
    ] {
        let asked = server.questions().len();
        server.behave(behaviour);
        eventually(&format!("it is asked while it does {behaviour:?}"), || async {
            (server.questions().len() > asked + 1).then_some(())
        })
        .await;
    }
    let begin = Instant::now();
    serve(&server, &[two, three]);
    until_serving(&edge, "three", true).await;
    until_serving(&edge, "one", false).await;
    // The floor of the time to live and the pause after a failure are a second each, and the machine may be busy.
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    load.finish().await.expect_no_failure();
}

#[tokio::test]
async fn a_service_is_emptied_by_the_zone_itself_and_by_nobody_else() {
    let server = Server::start().await;
    let origins = origins(&["one", "two"]).await;
    serve(&server, &[&origins[0], &origins[1]]);
    let edge = edge(&[server.addr], service()).await;
    edge.until_status("/", 200).await;
    // Once is not enough.
    server.behave(Behaviour::Gone);
    let load = load(&edge);
    let asked = server.questions().len();
    eventually("it was asked", || async { (server.questions().len() > asked).then_some(()) }).await;
    server.behave(Behaviour::Well);
    until_serving(&edge, "one", true).await;
    load.finish().await.expect_no_failure();

    server.behave(Behaviour::Gone);
    edge.until_status("/", 503).await;
    server.behave(Behaviour::Well);
    edge.until_status("/", 200).await;
    server.services("web.test", 0, &[(0, 0, 0, ".")]);
    edge.until_status("/", 503).await;
}

#[tokio::test]
async fn tiers_weights_and_a_dead_server_are_as_the_records_say() {
    let (dead, server) = (Server::start().await, Server::start().await);
    dead.behave(Behaviour::Silence);
    let origins = origins(&["one", "two", "spare"]).await;
    let port = |place: usize| origins[place].addr.port();
    server.addresses("host.test", 60, [IpAddr::from([127, 0, 0, 1])]);
    server.services(
        "web.test",
        60,
        &[(10, 3, port(0), "host.test"), (10, 1, port(1), "host.test"), (20, 9, port(2), "host.test")],
    );
    let edge = edge(&[dead.addr, server.addr], service()).await;
    let begin = Instant::now();
    edge.until_status("/", 200).await;
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    for _ in 0..40 {
        let answer = edge.get("/").await;
        *counts.entry(answer.header("x-origin").expect("a name").to_owned()).or_default() += 1;
    }
    assert_eq!(counts, [("one".to_owned(), 30), ("two".to_owned(), 10)].into());

    // A change behind a long time to live is seen at once by those who ask for it.
    server.services("web.test", 60, &[(20, 9, port(2), "host.test")]);
    let refresh = e2e::client::Call::new("POST", "/v1/endpoints/upstreams/web/refresh");
    let answer = refresh.send_to(edge.control).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
    eventually_within(Duration::from_secs(15), "the spare one serves", || async {
        (edge.get("/").await.header("x-origin") == Some("spare")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_name_of_a_node_is_resolved_as_its_upstream_wants_and_outlives_its_name_server() {
    let server = Server::start().await;
    let origin = echo::named("one").await;
    server.addresses("node.test", 300, [IpAddr::from([127, 0, 0, 9])]);
    let nodes = json!({format!("node.test:{}", origin.addr.port()): 1});
    let upstream =
        json!({"nodes": nodes, "dns": {"refresh": 1}, "timeout": {"connect": 1, "send": 1, "read": 1}});
    let edge = edge(&[server.addr], upstream).await;
    edge.until_status("/", 502).await;
    server.addresses("node.test", 300, [IpAddr::from([127, 0, 0, 1])]);
    let begin = Instant::now();
    edge.until_status("/", 200).await;
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "every second, not every five minutes: {:?}",
        begin.elapsed()
    );
    let load = load(&edge);
    for behaviour in
        [Behaviour::Gone, Behaviour::Empty, Behaviour::Code(ResponseCode::ServFail), Behaviour::Silence]
    {
        let asked = server.questions().len();
        server.behave(behaviour);
        eventually("it is asked", || async { (server.questions().len() > asked + 2).then_some(()) }).await;
    }
    load.finish().await.expect_no_failure();
}

#[tokio::test]
async fn a_real_dnsmasq_is_followed_and_its_silence_is_no_answer() {
    if !Dnsmasq::is_there() {
        return;
    }
    let origins = origins(&["one", "two"]).await;
    let port = |place: usize| origins[place].addr.port();
    let _second = echo::named_at((IpAddr::from([127, 0, 0, 7]), port(1)).into(), "seven").await;
    for authoritative in [false, true] {
        let records = [
            format!("--srv-host=_one._tcp.test,host.test,{},10,60", port(0)),
            format!("--srv-host=_both._tcp.test,host.test,{},10,60", port(0)),
            format!("--srv-host=_both._tcp.test,host.test,{},10,60", port(1)),
        ];
        let hosts = [("127.0.0.1", "host.test"), ("127.0.0.1", "plain.test")];
        let dnsmasq = Dnsmasq::start(&hosts, authoritative, &records).await;
        let plain = json!({"service_name": format!("plain.test:{}", port(1)), "discovery_type": "dns"});
        let edge = edge(&[dnsmasq.addr()], plain).await;
        edge.until_status("/", 200).await;
        let load = load(&edge);
        dnsmasq.freeze(true);
        tokio::time::sleep(Duration::from_secs(2)).await;
        dnsmasq.freeze(false);
        dnsmasq.write(&[
            ("127.0.0.1", "host.test"),
            ("127.0.0.1", "plain.test"),
            ("127.0.0.7", "plain.test"),
        ]);
        eventually("the second address is known", || async {
            let endpoints = edge.call_control("/v1/endpoints/upstreams/web").await.text();
            endpoints.contains("127.0.0.7").then_some(())
        })
        .await;
        dnsmasq.write(&hosts);
        eventually("and is gone again", || async {
            let endpoints = edge.call_control("/v1/discovery/dns/dump").await.text();
            (!endpoints.contains("127.0.0.7")).then_some(())
        })
        .await;
        // Only a server that shows that it is that of the zone can say that there is nothing.
        dnsmasq.write(&[("127.0.0.1", "host.test")]);
        if authoritative {
            load.finish().await.expect_no_failure();
            edge.until_status("/", 503).await;
        } else {
            eventually("the denial is known", || async {
                edge.call_control("/v1/endpoints/upstreams/web")
                    .await
                    .text()
                    .contains("without the SOA")
                    .then_some(())
            })
            .await;
            load.finish().await.expect_no_failure();
        }
        for (name, expected) in [("_one._tcp.test", 1), ("_both._tcp.test", 2)] {
            let upstream =
                json!({"id": "web", "type": "roundrobin", "service_name": name, "discovery_type": "dns"});
            edge.reload(&json!({
                "upstreams": [upstream], "routes": [{"id": "web", "uri": "/*", "upstream_id": "web"}],
            }))
            .await;
            edge.until_status("/", 200).await;
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..8 {
                seen.insert(edge.get("/").await.header("x-origin").expect("a name").to_owned());
            }
            assert_eq!(seen.len(), expected, "{name}, authoritative: {authoritative}");
        }
    }
}
