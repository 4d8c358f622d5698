//! What a service in DNS is said to be, answer by answer, by a name server that does as the test says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType::{A, AAAA, SRV};
use tokio::time::timeout;

use super::hostile::{Behaviour, Server};
use super::*;
use crate::source::{Query, Source, Watcher};
use crate::testing::{Able, Conduct, Registry, conduct};

fn settings(server: &Server) -> Settings {
    Settings {
        servers: vec![server.addr],
        min_ttl: Duration::from_millis(20),
        timeout: Duration::from_millis(300),
        attempts: 1,
        hosts: false,
        ..Settings::default()
    }
}

fn open(settings: Settings, service: &str) -> Box<dyn Watcher> {
    open_with(settings, service, &[])
}

fn open_with(settings: Settings, service: &str, args: &[(&str, &str)]) -> Box<dyn Watcher> {
    let args = args.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    Dns::services(settings).open(&Query { service: service.into(), args }).unwrap()
}

/// `host:port weight priority` of each instance.
fn told(listing: &Listing) -> Vec<String> {
    let line = |it: &crate::Instance| format!("{} {} {}", it.id, it.node.weight, it.node.priority);
    listing.instances.iter().map(line).collect()
}

fn pause(listing: &Listing) -> Duration {
    match listing.again {
        Again::After(pause) => pause,
        Again::Now => panic!("an answer of DNS has a time to live"),
    }
}

async fn ask(watcher: &mut dyn Watcher) -> Result<Vec<String>, String> {
    let answer = timeout(Duration::from_secs(10), watcher.next()).await.expect("bounded time");
    answer.map(|listing| told(&listing)).map_err(|error| error.reason.to_string())
}

/// A zone in which each instance is an SRV record with a target of its own.
struct Zone {
    server: Server,
    instances: BTreeMap<String, (SocketAddr, u16)>,
}

impl Zone {
    fn write(&self) {
        let targets: Vec<(u16, u16, u16, &str)> =
            self.instances.iter().map(|(target, (at, weight))| (0, *weight, at.port(), &**target)).collect();
        self.server.services("conduct.test", 0, &targets);
    }
}

impl Registry for Zone {
    fn source(&self) -> Arc<dyn Source> {
        let attempts =
            Settings { min_ttl: Duration::from_millis(100), attempts: 2, ..settings(&self.server) };
        Arc::new(Dns::services(attempts))
    }

    fn service_name(&self, service: &str) -> String {
        format!("{service}.test")
    }

    fn register<'a>(&'a mut self, _: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        let at: SocketAddr = address.parse().unwrap();
        let target = format!("host-{}.test", at.ip().to_string().replace('.', "-"));
        self.server.addresses(&target, 0, [at.ip()]);
        self.instances.insert(target, (at, u16::try_from(weight).unwrap()));
        self.write();
        Box::pin(std::future::ready(()))
    }

    fn deregister<'a>(&'a mut self, _: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        self.instances.retain(|_, (at, _)| at.to_string() != address);
        self.write();
        Box::pin(std::future::ready(()))
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        Box::pin(async move {
            self.server.behave(match how {
                Conduct::Well => Behaviour::Well,
                Conduct::Errors => Behaviour::Code(ResponseCode::ServFail),
                Conduct::SlowBody => Behaviour::HalfTcp,
                Conduct::Silent => Behaviour::Silence,
                Conduct::HalfBody => Behaviour::Half,
                Conduct::Garbage => Behaviour::Garbage,
                Conduct::Restarts => {
                    self.server.behave(Behaviour::Silence);
                    sleep(Duration::from_millis(500)).await;
                    Behaviour::Well
                }
                // The SOA of a zone says that what is missing has been taken out, whoever says it; and there is no index.
                Conduct::RestartsEmpty | Conduct::Rewinds => return Able::No,
            });
            Able::Yes
        })
    }

    fn wrong_name(&self) -> Option<String> {
        Some("conduct.test:http".to_owned())
    }
}

#[tokio::test]
async fn the_suite_of_conduct() {
    let mut zone = Zone { server: Server::start().await, instances: BTreeMap::new() };
    zone.write();
    let report = conduct(&mut zone).await.unwrap_or_else(|broken| panic!("{broken}"));
    assert_eq!(report.skipped, ["Rewinds", "RestartsEmpty"]);
}

#[tokio::test]
async fn a_service_without_a_port_has_that_of_the_scheme() {
    let server = Server::start().await;
    server.numbered("a.test", 60, &[1]);
    let sources: Vec<Arc<dyn Source>> = vec![Arc::new(Dns::services(settings(&server)))];
    let all = crate::Settings { sources, ..crate::Settings::default() };
    let discovery = crate::Discovery::new(Handle::current(), all);
    let query = Query { service: "a.test".into(), args: BTreeMap::new() };
    let target = crate::Target { port: 443, ..crate::Target::service("upstreams/1", "dns", query) };
    let mut watch = discovery.watch(&target);
    let endpoints =
        timeout(Duration::from_secs(30), watch.wait_for(|it| !it.list.is_empty())).await.unwrap().unwrap();
    assert_eq!(endpoints.list[0].addr.to_string(), "10.0.0.1:443");
}

#[tokio::test]
async fn records_become_instances() {
    let server = Server::start().await;
    server.numbered("a.test", 60, &[2, 1]);
    server.addresses("six.test", 60, ["2001:db8::1".parse().unwrap()]);
    server.addresses("both.test", 60, ["10.0.0.9".parse().unwrap(), "2001:db8::1".parse().unwrap()]);
    server.alias("alias.test", 60, "a.test");
    server.services("srv.test", 60, &[(10, 60, 1980, "a1.test"), (20, 20, 1981, "b.test")]);
    server.numbered("a1.test", 60, &[1]);
    server.numbered("b.test", 60, &[2, 3]);
    server.services("zero.test", 60, &[(0, 0, 80, "a1.test"), (0, 10, 81, "a1.test")]);
    server.services("noport.test", 60, &[(0, 1, 0, "a1.test")]);
    server.services(
        "_http._tcp.test",
        60,
        &[(0, 1, 80, "b.test"), (1, 1, 80, "a1.test"), (5, 9, 80, "b.test")],
    );
    for (service, expected) in [
        ("a.test", vec!["10.0.0.1:0 1 0", "10.0.0.2:0 1 0"]),
        ("A.Test", vec!["10.0.0.1:0 1 0", "10.0.0.2:0 1 0"]),
        ("a.test.", vec!["10.0.0.1:0 1 0", "10.0.0.2:0 1 0"]),
        ("a.test:8080", vec!["10.0.0.1:8080 1 0", "10.0.0.2:8080 1 0"]),
        ("alias.test:80", vec!["10.0.0.1:80 1 0", "10.0.0.2:80 1 0"]),
        ("six.test:80", vec!["[2001:db8::1]:80 1 0"]),
        // IPv4 where there is any, as in APISIX: IPv6 may lead nowhere.
        ("both.test:80", vec!["10.0.0.9:80 1 0"]),
        ("10.1.2.3:80", vec!["10.1.2.3:80 1 0"]),
        ("[::1]:80", vec!["[::1]:80 1 0"]),
        ("localhost:80", vec!["127.0.0.1:80 1 0"]),
        // The weight of a target is shared; a smaller priority of SRV is a greater one of nodes.
        ("srv.test", vec!["10.0.0.1:1980 120 -10", "10.0.0.2:1981 20 -20", "10.0.0.3:1981 20 -20"]),
        ("srv.test:8848", vec!["10.0.0.1:8848 120 -10", "10.0.0.2:8848 20 -20", "10.0.0.3:8848 20 -20"]),
        ("zero.test", vec!["10.0.0.1:80 1 0", "10.0.0.1:81 10 0"]),
        ("noport.test", vec!["10.0.0.1:0 1 0"]),
        // Written twice, an address counts once, with the better priority.
        ("_http._tcp.test", vec!["10.0.0.2:80 1 0", "10.0.0.3:80 1 0", "10.0.0.1:80 2 -1"]),
    ] {
        for glue in [true, false] {
            server.with_glue(glue);
            let mut watcher = open(settings(&server), service);
            assert_eq!(ask(&mut *watcher).await.unwrap(), expected, "{service}, glue: {glue}");
        }
    }
    let mut watcher = open(settings(&server), "srv.test");
    let listing = watcher.next().await.unwrap();
    let machine = listing.instances[1].details.as_ref().and_then(|details| details.machine.clone());
    assert_eq!(machine.as_deref(), Some("b.test"));
}

#[tokio::test]
async fn a_name_of_another_form_is_refused() {
    let server = Server::start().await;
    let dns = Dns::services(settings(&server));
    for service in ["", ":80", "a.test:", "a.test:0", "a.test:70000", "a.test:http", "a..test"] {
        let query = Query { service: service.into(), args: BTreeMap::default() };
        let told = dns.open(&query).err().unwrap_or_default();
        assert!(told.contains("is not `name` or `name:port`"), "`{service}`: {told}");
    }
}

/// What may empty a service, and what may not.
#[tokio::test]
async fn only_the_zone_itself_says_that_a_service_has_no_instance() {
    let nothing = Ok::<(), &str>;
    let cases = [
        ("NXDOMAIN with the SOA", Behaviour::Gone, nothing(())),
        ("no record, with the SOA", Behaviour::Empty, nothing(())),
        ("NXDOMAIN alone", Behaviour::Code(ResponseCode::NXDomain), Err("without the SOA")),
        ("no record and no SOA", Behaviour::Bare, Err("without the SOA")),
        ("the SOA of another zone", Behaviour::Foreign, Err("another one")),
        ("SERVFAIL", Behaviour::Code(ResponseCode::ServFail), Err("Server Failure")),
        ("REFUSED", Behaviour::Code(ResponseCode::Refused), Err("Refused")),
        ("FORMERR", Behaviour::Code(ResponseCode::FormErr), Err("Form Error")),
        ("truncated, and no TCP", Behaviour::TruncatedNoTcp, Err("")),
        ("silence", Behaviour::Silence, Err("timed out")),
        ("garbage", Behaviour::Garbage, Err("")),
        ("half an answer", Behaviour::Half, Err("")),
        ("a wrong id", Behaviour::WrongId, Err("timed out")),
        ("another question", Behaviour::WrongQuestion, Err("timed out")),
    ];
    for service in ["a.test:80", "srv.test"] {
        for (case, behaviour, expected) in &cases {
            let server = Server::start().await;
            server.numbered("a.test", 0, &[1]);
            server.services("srv.test", 0, &[(0, 1, 80, "a.test")]);
            let mut watcher = open(settings(&server), service);
            assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.1:80 1 0"], "{service}, {case}");
            server.behave(*behaviour);
            match (ask(&mut *watcher).await, expected) {
                (Ok(listed), Ok(())) => assert_eq!(listed, Vec::<String>::new(), "{service}, {case}"),
                (Err(reason), Err(part)) => assert!(reason.contains(part), "{service}, {case}: {reason}"),
                (found, _) => panic!("{service}, {case}: {found:?}"),
            }
            server.behave(Behaviour::Well);
            assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.1:80 1 0"], "{service}, after {case}");
        }
    }
}

#[tokio::test]
async fn a_service_that_is_declared_absent_is_empty() {
    let server = Server::start().await;
    server.services("gone.test", 7, &[(0, 0, 0, ".")]);
    server.numbered("gone.test", 7, &[1]);
    let mut watcher = open(settings(&server), "gone.test");
    let listing = watcher.next().await.unwrap();
    assert!(listing.instances.is_empty(), "the addresses of the name itself are not those of the service");
    assert_eq!(pause(&listing), Duration::from_secs(7));
}

#[tokio::test]
async fn one_family_is_enough_and_none_replaces_the_one_in_use_for_a_hiccup() {
    let server = Server::start().await;
    server.addresses("both.test", 0, ["10.0.0.9".parse().unwrap(), "2001:db8::1".parse().unwrap()]);
    let broken = Behaviour::Code(ResponseCode::ServFail);
    server.behave_for(AAAA, broken);
    let mut watcher = open(settings(&server), "both.test:80");
    assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.9:80 1 0"]);

    server.behave_for(AAAA, Behaviour::Well);
    server.behave_for(A, broken);
    for _ in 0..3 {
        assert!(ask(&mut *watcher).await.is_err(), "IPv4 was in use, and nobody said that it is gone");
    }
    assert_eq!(ask(&mut *watcher).await.unwrap(), ["[2001:db8::1]:80 1 0"], "it does not come back");
    server.behave_for(A, Behaviour::Well);
    assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.9:80 1 0"]);
    server.behave_for(A, Behaviour::Empty);
    assert_eq!(ask(&mut *watcher).await.unwrap(), ["[2001:db8::1]:80 1 0"], "the zone says it is gone");

    server.behave_for(A, broken);
    let mut fresh = open(settings(&server), "both.test:80");
    assert_eq!(ask(&mut *fresh).await.unwrap(), ["[2001:db8::1]:80 1 0"], "better than nothing at the start");
    let without = Settings { ipv6: false, ..settings(&server) };
    assert!(ask(&mut *open(without, "both.test:80")).await.is_err(), "IPv6 is not asked for");
}

#[tokio::test]
async fn ports_of_srv_are_not_swapped_for_the_default_one_by_a_failure() {
    let server = Server::start().await;
    server.numbered("svc.test", 0, &[1]);
    server.services("svc.test", 0, &[(0, 1, 9000, "svc.test")]);
    server.behave_for(SRV, Behaviour::Code(ResponseCode::ServFail));
    let mut watcher = open(settings(&server), "svc.test");
    assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.1:0 1 0"], "all there is at the start");
    server.behave_for(SRV, Behaviour::Well);
    assert_eq!(
        ask(&mut *watcher).await.unwrap(),
        ["10.0.0.1:9000 1 0"],
        "A did not become the type to stay with"
    );
    server.behave_for(SRV, Behaviour::Code(ResponseCode::ServFail));
    assert!(ask(&mut *watcher).await.is_err());
    server.behave_for(SRV, Behaviour::Empty);
    assert_eq!(
        ask(&mut *watcher).await.unwrap(),
        ["10.0.0.1:0 1 0"],
        "the zone says there are none any more"
    );
}

#[tokio::test]
async fn the_type_that_answered_goes_first_until_somebody_asks_for_a_fresh_look() {
    let server = Server::start().await;
    server.numbered("svc.test", 0, &[1]);
    let mut watcher = open(settings(&server), "svc.test");
    ask(&mut *watcher).await.unwrap();
    assert_eq!(server.asked(SRV), 1);
    server.services("svc.test", 0, &[(0, 1, 9000, "svc.test")]);
    assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.1:0 1 0"], "`last`, as in APISIX");
    assert_eq!(server.asked(SRV), 1);
    watcher.restart();
    assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.1:9000 1 0"]);

    let order = Order { kinds: vec![RecordKind::A], last: false };
    let mut alone = open(Settings { order, ..settings(&server) }, "svc.test");
    let asked = server.asked(SRV);
    assert_eq!(ask(&mut *alone).await.unwrap(), ["10.0.0.1:0 1 0"]);
    assert_eq!((server.asked(SRV), server.asked(AAAA)), (asked, 2), "only what the order names");
}

#[tokio::test]
async fn a_target_that_cannot_be_asked_for_is_where_it_was() {
    let server = Server::start().await;
    server.with_glue(false);
    server.services("srv.test", 60, &[(0, 1, 80, "a.test"), (0, 1, 80, "b.test")]);
    server.numbered("a.test", 60, &[1]);
    server.numbered("b.test", 60, &[2]);
    let mut watcher = open(settings(&server), "srv.test");
    let both = ["10.0.0.1:80 1 0", "10.0.0.2:80 1 0"];
    assert_eq!(ask(&mut *watcher).await.unwrap(), both);
    server.behave_for(A, Behaviour::Code(ResponseCode::ServFail));
    server.behave_for(AAAA, Behaviour::Code(ResponseCode::ServFail));
    let listing = watcher.next().await.unwrap();
    assert_eq!(told(&listing), both);
    assert!(pause(&listing) < Duration::from_secs(6), "and is asked for again soon");
    server.behave_for(A, Behaviour::Well);
    server.behave_for(AAAA, Behaviour::Well);
    server.numbered("b.test", 60, &[]);
    assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.1:80 1 0"], "the zone says it has none");
}

#[tokio::test]
async fn aliases_are_followed_as_far_as_they_lead_somewhere() {
    let server = Server::start().await;
    for step in 0..6 {
        server.alias(&format!("c{step}.test"), 60 - step, &format!("c{}.test", step + 1));
    }
    server.numbered("c6.test", 90, &[6]);
    server.alias("round.test", 60, "about.test");
    server.alias("about.test", 60, "round.test");
    server.alias("self.test", 60, "self.test");
    server.alias("dangling.test", 60, "nowhere.test");
    server.alias("srv-alias.test", 60, "srv.test");
    server.services("srv.test", 60, &[(0, 1, 80, "c6.test")]);
    let mut watcher = open(settings(&server), "c0.test:80");
    let listing = watcher.next().await.unwrap();
    assert_eq!(told(&listing), ["10.0.0.6:80 1 0"]);
    let asked = pause(&listing);
    assert!(
        asked >= Duration::from_secs(55) && asked < Duration::from_secs(61),
        "the shortest on the way: {asked:?}"
    );
    for name in ["round.test", "self.test"] {
        let reason = ask(&mut *open(settings(&server), name)).await.unwrap_err();
        assert!(reason.contains("circle"), "{reason}");
    }
    let dangling = ask(&mut *open(settings(&server), "dangling.test")).await;
    assert_eq!(dangling.unwrap(), Vec::<String>::new(), "the zone says that the target does not exist");
    assert_eq!(ask(&mut *open(settings(&server), "srv-alias.test")).await.unwrap(), ["10.0.0.6:80 1 0"]);
}

#[tokio::test]
async fn what_udp_cannot_carry_or_does_not_answer_is_asked_for_over_tcp() {
    let server = Server::start().await;
    server.numbered("small.test", 60, &[1]);
    server.numbered("large.test", 60, &(0..200).collect::<Vec<u8>>());
    let retrying = || Settings { attempts: 2, ..settings(&server) };
    assert_eq!(ask(&mut *open(settings(&server), "large.test")).await.unwrap().len(), 200);
    for behaviour in [Behaviour::Truncated, Behaviour::SilentUdp] {
        server.behave(behaviour);
        let listed = ask(&mut *open(retrying(), "small.test:80")).await.unwrap();
        assert_eq!(listed, ["10.0.0.1:80 1 0"], "{behaviour:?}");
        assert!(server.questions().iter().any(|(_, _, tcp)| *tcp), "{behaviour:?}");
    }
}

#[tokio::test]
async fn a_server_that_is_dead_or_broken_costs_little_beside_one_that_is_not() {
    let good = Server::start().await;
    good.numbered("a.test", 0, &[1]);
    for behaviour in [
        Behaviour::Silence,
        Behaviour::Code(ResponseCode::ServFail),
        Behaviour::Code(ResponseCode::Refused),
        Behaviour::Garbage,
        Behaviour::Slow(Duration::from_secs(3)),
    ] {
        let bad = Server::start().await;
        bad.behave(behaviour);
        let settings = Settings {
            servers: vec![bad.addr, good.addr],
            timeout: Duration::from_secs(5),
            ..settings(&good)
        };
        let mut watcher = open(settings, "a.test:80");
        let begin = Instant::now();
        assert_eq!(ask(&mut *watcher).await.unwrap(), ["10.0.0.1:80 1 0"], "{behaviour:?}");
        assert!(
            begin.elapsed() < Duration::from_secs(4),
            "{behaviour:?}: not its time-out: {:?}",
            begin.elapsed()
        );
        let begin = Instant::now();
        ask(&mut *watcher).await.unwrap();
        assert!(begin.elapsed() < Duration::from_secs(4), "{behaviour:?}: it is asked last for a while");
    }
}

#[tokio::test]
async fn answers_are_added_up_where_that_is_wanted() {
    let server = Server::start().await;
    server.numbered("part.test", 0, &[1, 2]);
    let mut replaced = open(settings(&server), "part.test");
    let mut added = open_with(settings(&server), "part.test", &[("accumulate", "0.5")]);
    assert_eq!(ask(&mut *replaced).await.unwrap().len(), 2);
    assert_eq!(ask(&mut *added).await.unwrap().len(), 2);
    let begin = Instant::now();
    server.numbered("part.test", 0, &[2, 3]);
    assert_eq!(ask(&mut *replaced).await.unwrap(), ["10.0.0.2:0 1 0", "10.0.0.3:0 1 0"]);
    let sum = ask(&mut *added).await.unwrap();
    if begin.elapsed() < Duration::from_millis(400) {
        assert_eq!(sum, ["10.0.0.1:0 1 0", "10.0.0.2:0 1 0", "10.0.0.3:0 1 0"]);
    }
    timeout(Duration::from_secs(30), async {
        while ask(&mut *added).await.unwrap().len() > 2 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("what was not heard of for the window goes");
    server.behave(Behaviour::Gone);
    assert_eq!(ask(&mut *added).await.unwrap(), Vec::<String>::new(), "gone is gone at once");
}

#[tokio::test]
async fn the_search_list_belongs_to_names_that_are_not_full() {
    let server = Server::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    std::fs::write(&file, "nameserver 192.0.2.1\nsearch one.test two.test\noptions ndots:1\n").unwrap();
    let settings = Settings { servers: Vec::new(), resolv_conf: Some(file), ..settings(&server) };
    let current = |search| {
        let settings = Settings { search, ..settings.clone() };
        resolver::Resolver::new(settings).current().unwrap()
    };
    let candidates = |search, name: &str| -> Vec<String> {
        current(search).candidates(name).unwrap().iter().map(ToString::to_string).collect()
    };
    assert_eq!(candidates(true, "api"), ["api.one.test.", "api.two.test.", "api."]);
    assert_eq!(candidates(true, "a.b.test"), ["a.b.test.", "a.b.test.one.test.", "a.b.test.two.test."]);
    assert_eq!(candidates(true, "api."), ["api."]);
    assert_eq!(candidates(false, "api"), ["api."]);
}

#[tokio::test]
async fn the_file_of_name_servers_is_read_again_when_it_changes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    std::fs::write(&file, "nameserver 192.0.2.1\nsearch one.test\n").unwrap();
    let settings = Settings { resolv_conf: Some(file.clone()), ..Settings::default() };
    let resolver = resolver::Resolver::new(settings);
    let searched =
        |resolver: &resolver::Resolver| resolver.current().unwrap().candidates("api").unwrap()[0].to_string();
    assert_eq!(searched(&resolver), "api.one.test.");
    std::fs::write(&file, "").unwrap();
    assert_eq!(searched(&resolver), "api.one.test.", "a file that is being written");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(searched(&resolver), "api.one.test.", "or that is missing for a moment");
    std::fs::write(&file, "nameserver 192.0.2.1\nsearch another.test\n").unwrap();
    assert_eq!(searched(&resolver), "api.another.test.");
}
