//! Names against a name server that misbehaves on purpose, over real loopback datagrams.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::net::Ipv4Addr;

use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType;
use tokio::time::timeout;

use super::hostile::{Behaviour, Server};
use super::*;
use crate::Discovery;

const NAMES: [&str; 3] = ["api.test", "new.test", "huge.test"];

/// A name server that knows every name of these tests by these addresses.
async fn serving(last: &[u8], ttl: u32) -> Server {
    let server = Server::start().await;
    serve(&server, last, ttl);
    server
}

fn serve(server: &Server, last: &[u8], ttl: u32) {
    server.behave(Behaviour::Well);
    NAMES.iter().for_each(|name| server.numbered(name, ttl, last));
}

fn discovery(server: &Server, change: impl FnOnce(&mut Settings)) -> Discovery {
    let mut settings = Settings {
        servers: vec![server.addr],
        min_ttl: Duration::from_millis(20),
        timeout: Duration::from_millis(100),
        attempts: 1,
        ..Settings::default()
    };
    change(&mut settings);
    Discovery::new(Handle::current(), crate::Settings { dns: settings, ..crate::Settings::default() })
}

fn node(host: &str, weight: u32) -> Node {
    Node { host: host.into(), port: 8080, weight, priority: 0 }
}

fn addrs(endpoints: &Endpoints) -> Vec<String> {
    endpoints.list.iter().map(|endpoint| endpoint.addr.to_string()).collect()
}

/// Wait for the published endpoints to satisfy `wanted`.
async fn eventually(watch: &mut Watch, wanted: impl Fn(&Endpoints) -> bool) -> Arc<Endpoints> {
    timeout(Duration::from_secs(10), watch.wait_for(|endpoints| wanted(endpoints)))
        .await
        .expect("the endpoints never came to the wanted state")
        .expect("discovery went away")
        .clone()
}

#[tokio::test]
async fn names_and_addresses_make_one_list_and_addresses_of_a_name_share_its_weight() {
    let server = serving(&[2, 1], 60).await;
    let discovery = discovery(&server, |_| {});
    let mut watch = discovery.watch_nodes(&[node("api.test", 4), node("192.0.2.9", 2)], None);
    assert_eq!(watch.borrow().pending, 1, "the name was not asked yet");
    assert_eq!(addrs(&watch.borrow()), ["192.0.2.9:8080"]);

    let endpoints = eventually(&mut watch, Endpoints::settled).await;
    assert_eq!(addrs(&endpoints), ["10.0.0.1:8080", "10.0.0.2:8080", "192.0.2.9:8080"]);
    let shares: Vec<_> = endpoints.list.iter().map(|e| (e.weight, e.siblings, &*e.host)).collect();
    assert_eq!(shares, [(4, 2, "api.test"), (4, 2, "api.test"), (2, 1, "192.0.2.9")]);
}

#[tokio::test]
async fn a_changed_answer_is_followed_and_a_rotated_one_is_no_change() {
    let server = serving(&[1, 2], 0).await;
    let discovery = discovery(&server, |_| {});
    let mut watch = discovery.watch_nodes(&[node("api.test", 1)], None);
    eventually(&mut watch, Endpoints::settled).await;

    watch.mark_unchanged();
    serve(&server, &[2, 1], 0);
    let asked = server.asked(RecordType::A);
    while server.asked(RecordType::A) < asked + 4 {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(!watch.has_changed().unwrap(), "the order of an answer means nothing");

    serve(&server, &[3], 0);
    let endpoints = eventually(&mut watch, |e| addrs(e) == ["10.0.0.3:8080"]).await;
    assert!(endpoints.failures.is_empty());
}

#[tokio::test]
async fn last_good_addresses_survive_every_failure_and_the_name_recovers_by_itself() {
    let cases = [
        ("NXDOMAIN", Behaviour::Code(ResponseCode::NXDomain)),
        ("SERVFAIL", Behaviour::Code(ResponseCode::ServFail)),
        ("REFUSED", Behaviour::Code(ResponseCode::Refused)),
        ("NXDOMAIN of the zone", Behaviour::Gone),
        ("no records", Behaviour::Bare),
        ("no records, says the zone", Behaviour::Empty),
        ("a truncated answer", Behaviour::TruncatedNoTcp),
        ("half an answer", Behaviour::Half),
        ("the answer to another question", Behaviour::WrongQuestion),
        ("an unspecified address", Behaviour::Well),
        ("silence", Behaviour::Silence),
        ("garbage", Behaviour::Garbage),
        ("a wrong id", Behaviour::WrongId),
    ];
    for (case, behaviour) in cases {
        let server = serving(&[1], 0).await;
        let discovery = discovery(&server, |_| {});
        let mut watch = discovery.watch_nodes(&[node("api.test", 1)], None);
        eventually(&mut watch, |e| addrs(e) == ["10.0.0.1:8080"]).await;

        server.behave(behaviour);
        server.addresses("api.test", 0, [Ipv4Addr::UNSPECIFIED.into()]);
        let endpoints = eventually(&mut watch, |e| !e.failures.is_empty()).await;
        assert_eq!(addrs(&endpoints), ["10.0.0.1:8080"], "{case}: stale is better than nothing");
        assert!(endpoints.failures[0].stale, "{case}");
        let view = discovery.names().remove(0);
        assert!(view.failure.is_some_and(|(why, _)| !why.is_empty()), "{case}: the reason is shown");

        serve(&server, &[2], 0);
        let endpoints = eventually(&mut watch, |e| addrs(e) == ["10.0.0.2:8080"]).await;
        assert!(endpoints.failures.is_empty(), "{case}: recovered without help");
    }
}

#[tokio::test]
async fn a_name_that_never_existed_settles_empty_and_appears_later() {
    let server = Server::start().await;
    server.behave(Behaviour::Code(ResponseCode::NXDomain));
    let discovery = discovery(&server, |_| {});
    let mut watch = discovery.watch_nodes(&[node("new.test", 1)], None);
    let endpoints = eventually(&mut watch, Endpoints::settled).await;
    assert!(endpoints.list.is_empty());
    assert!(!endpoints.failures[0].stale);
    serve(&server, &[7], 60);
    eventually(&mut watch, |e| addrs(e) == ["10.0.0.7:8080"]).await;
}

#[tokio::test]
async fn a_time_to_live_of_zero_is_no_storm() {
    let server = serving(&[1], 0).await;
    let discovery = discovery(&server, |settings| settings.min_ttl = Duration::from_secs(60));
    let mut first = discovery.watch_nodes(&[node("api.test", 1)], None);
    eventually(&mut first, Endpoints::settled).await;
    let mut others: Vec<Watch> =
        (0..50).map(|_| discovery.watch_nodes(&[node("API.test", 1)], None)).collect();
    for watch in &mut others {
        eventually(watch, Endpoints::settled).await;
    }
    assert_eq!(server.asked(RecordType::A), 1, "one task per name, and the floor holds");
    assert!(discovery.names()[0].next > Duration::from_secs(50));

    assert!(discovery.refresh(Some("API.test")));
    assert!(!discovery.refresh(Some("other.test")));
    timeout(Duration::from_secs(30), async {
        while server.asked(RecordType::A) < 2 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("a refresh by hand does not wait for the time to live");
}

#[tokio::test]
async fn an_upstream_may_have_a_floor_of_its_own() {
    let server = serving(&[1], 0).await;
    let discovery = discovery(&server, |_| {});
    let mut quick = discovery.watch_nodes(&[node("api.test", 1)], None);
    let mut slow = discovery.watch_nodes(&[node("api.test", 1)], Some(Duration::from_secs(60)));
    eventually(&mut quick, Endpoints::settled).await;
    eventually(&mut slow, Endpoints::settled).await;
    serve(&server, &[2], 0);
    eventually(&mut quick, |e| addrs(e) == ["10.0.0.2:8080"]).await;
    assert_eq!(addrs(&slow.borrow()), ["10.0.0.1:8080"]);
}

#[tokio::test]
async fn a_configured_validity_replaces_the_time_to_live() {
    let server = serving(&[1], 3600).await;
    let discovery = discovery(&server, |settings| settings.valid = Some(Duration::from_millis(20)));
    let mut watch = discovery.watch_nodes(&[node("api.test", 1)], None);
    eventually(&mut watch, Endpoints::settled).await;
    serve(&server, &[2], 3600);
    eventually(&mut watch, |e| addrs(e) == ["10.0.0.2:8080"]).await;
}

#[tokio::test]
async fn stale_addresses_are_dropped_when_a_limit_is_set() {
    let server = serving(&[1], 0).await;
    let discovery = discovery(&server, |settings| settings.stale_limit = Some(Duration::from_millis(300)));
    let mut watch = discovery.watch_nodes(&[node("api.test", 1)], None);
    eventually(&mut watch, |e| !e.list.is_empty()).await;
    server.behave(Behaviour::Code(ResponseCode::ServFail));
    let endpoints = eventually(&mut watch, |e| e.list.is_empty()).await;
    assert!(!endpoints.failures[0].stale);
}

#[tokio::test]
async fn a_huge_answer_is_bounded_and_does_no_lasting_harm() {
    for count in [300, 1000, 2000] {
        let many = (0..count).map(|n: u32| Ipv4Addr::from_bits(0x0a01_0000 + n).into());
        let server = Server::start().await;
        server.addresses("huge.test", 0, many);
        let discovery = discovery(&server, |settings| settings.timeout = Duration::from_secs(5));
        let mut watch = discovery.watch_nodes(&[node("huge.test", 1)], None);
        let endpoints = eventually(&mut watch, Endpoints::settled).await;
        assert_eq!(endpoints.list.len(), MAX_ADDRESSES.min(count as usize), "{:?}", endpoints.failures);
        serve(&server, &[1], 0);
        eventually(&mut watch, |e| addrs(e) == ["10.0.0.1:8080"]).await;
    }
}

#[tokio::test]
async fn the_work_ends_with_the_last_receiver() {
    let server = serving(&[1], 0).await;
    let discovery = discovery(&server, |_| {});
    let mut watch = discovery.watch_nodes(&[node("api.test", 1)], None);
    let second = discovery.watch_nodes(&[node("api.test", 1)], None);
    eventually(&mut watch, Endpoints::settled).await;
    drop(watch);
    assert_eq!(discovery.names().len(), 1, "somebody still listens");
    drop(second);
    timeout(Duration::from_secs(30), async {
        while !discovery.names().is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("a name nobody watches is not asked any more");
}
