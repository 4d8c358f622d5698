//! Discovery by Kubernetes, over an API server made for tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use config::discovery::Registry;
use config::discovery::kubernetes::Kubernetes;
use discovery::testing::{Able, Conduct, Registry as Conducting, conduct};
use discovery::{Health, Instance, Listing, Query, Source, Standing};
use e2e::busy::Busy;
use e2e::kube::{Kind, KubeApi, Manner, Pod, Slice};
use e2e::{Value, certs, eventually, json};
use futures_util::future::BoxFuture;
use tempfile::TempDir;

/// The sources of `discovery.kubernetes` as it is written.
fn sources(settings: &Value, env: &[(&str, &str)]) -> Vec<Arc<dyn Source>> {
    let settings: Kubernetes = config::typed::parse(settings).expect("settings");
    let mut errors = Vec::new();
    settings.check(&mut errors);
    assert!(errors.is_empty(), "{errors:?}");
    let env: BTreeMap<String, String> =
        env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    discovery::kubernetes::sources(&settings, |name| env.get(name).cloned()).expect("sources")
}

fn source(settings: &Value) -> Arc<dyn Source> {
    sources(settings, &[]).remove(0)
}

fn query(service: &str, args: &[(&str, &str)]) -> Query {
    let args = args.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    Query { service: service.into(), args }
}

/// A watcher that is asked again and again, as the driver of discovery does.
struct Following {
    seen: Arc<Mutex<Seen>>,
    task: tokio::task::JoinHandle<()>,
    restart: Arc<tokio::sync::Notify>,
}

#[derive(Clone, Default)]
struct Seen {
    /// The last list.
    listing: Option<Listing>,
    lists: usize,
    /// The failures since the last list.
    failures: Vec<String>,
    failed: usize,
    /// How often a list said that what is missing may not be known again yet.
    restarted: usize,
    /// How often the list was empty.
    empty: usize,
}

impl Following {
    fn of(source: &Arc<dyn Source>, service: &str) -> Following {
        Self::with(source, service, &[])
    }

    fn with(source: &Arc<dyn Source>, service: &str, args: &[(&str, &str)]) -> Following {
        let mut watcher = source.open(&query(service, args)).expect("a service");
        let (seen, restart) = (Arc::<Mutex<Seen>>::default(), Arc::new(tokio::sync::Notify::new()));
        let (shared, asked) = (Arc::clone(&seen), Arc::clone(&restart));
        let task = tokio::spawn(async move {
            loop {
                let said = tokio::select! {
                    said = watcher.next() => said,
                    () = asked.notified() => {
                        watcher.restart();
                        continue;
                    }
                };
                let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
                match said {
                    Ok(listing) => {
                        seen.lists += 1;
                        seen.failures.clear();
                        seen.restarted += usize::from(listing.standing == Standing::Restarted);
                        seen.empty += usize::from(listing.instances.is_empty());
                        seen.listing = Some(listing);
                    }
                    Err(error) => {
                        seen.failed += 1;
                        seen.failures.push(error.to_string());
                    }
                }
            }
        });
        Following { seen, task, restart }
    }

    fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The instances as text, in order of address.
    fn instances(&self) -> Option<Vec<String>> {
        let mut list: Vec<String> = self.seen().listing?.instances.iter().map(told).collect();
        list.sort();
        Some(list)
    }

    #[track_caller]
    fn until(&self, expected: &[&str]) -> impl Future<Output = ()> {
        let expected: Vec<String> = expected.iter().map(|text| (*text).to_owned()).collect();
        let seen = Arc::clone(&self.seen);
        let what = format!("the instances are {expected:?}");
        async move {
            let shared = Arc::clone(&seen);
            let check = || {
                let (seen, expected) = (Arc::clone(&shared), expected.clone());
                async move {
                    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    let mut list: Vec<String> = seen.listing.as_ref()?.instances.iter().map(told).collect();
                    list.sort();
                    (list == expected && seen.failures.is_empty()).then_some(())
                }
            };
            let found = tokio::time::timeout(Duration::from_secs(55), eventually(&what, check)).await;
            if found.is_err() {
                let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                panic!("{what}: {:?} {:?}", seen.listing, seen.failures);
            }
        }
    }

    async fn until_failure(&self, part: &str) {
        eventually(&format!("a failure with `{part}`"), || async {
            self.seen().failures.iter().any(|failure| failure.contains(part)).then_some(())
        })
        .await;
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn told(instance: &Instance) -> String {
    let node = &instance.node;
    match instance.health {
        Health::Healthy => format!("{}:{}", node.host, node.port),
        health => format!("{}:{} {}", node.host, node.port, health.as_str()),
    }
}

fn web() -> Slice {
    Slice::new("default", "web", "web-a", 8080)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_are_listed_and_followed_over_all_slices() {
    let api = KubeApi::start().await;
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    let source = source(&api.settings());
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&["10.0.0.1:8080"]).await;

    // A second slice, and an address that is in both while it moves.
    let b = Slice::new("default", "web", "web-b", 8081);
    b.clone().pods([Pod::new("web-2", "10.0.0.2"), Pod::new("web-3", "10.0.0.3")]).put(&api);
    web_service.until(&["10.0.0.1:8080", "10.0.0.2:8081", "10.0.0.3:8081"]).await;
    let twice = web().pods([Pod::new("web-1", "10.0.0.1"), Pod::new("web-2", "10.0.0.2")]);
    twice.ports(json!([{"name": "http", "port": 8081}])).put(&api);
    web_service.until(&["10.0.0.1:8081", "10.0.0.2:8081", "10.0.0.3:8081"]).await;

    // The slice of another service, and one that changes its service.
    Slice::new("default", "other", "other-a", 9000).pod(Pod::new("x", "10.0.0.9")).put(&api);
    b.delete(&api);
    web_service.until(&["10.0.0.1:8081", "10.0.0.2:8081"]).await;
    Slice::new("default", "other", "web-a", 8081).pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    web_service.until(&[]).await;
    let other = Following::of(&source, "default/other:http");
    other.until(&["10.0.0.1:8081", "10.0.0.9:9000"]).await;

    // Two services, and yet one list and one watch.
    assert_eq!(api.asked("endpointslices"), (1, 1), "{:?}", api.requests());
    assert!(source.open(&query("web", &[])).is_err_and(|advice| advice.contains("namespace/name:port")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_not_there_is_an_empty_list_and_not_an_error() {
    let api = KubeApi::start().await;
    let source = source(&api.settings());
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&[]).await;
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    web_service.until(&["10.0.0.1:8080"]).await;
    web().delete(&api);
    web_service.until(&[]).await;
    assert_eq!(web_service.seen().failed, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_follow_the_rule_of_kube_proxy() {
    let api = KubeApi::start().await;
    web()
        .pods([
            Pod::new("ready", "10.0.0.1"),
            Pod::bare("10.0.0.2"),
            Pod::new("leaving", "10.0.0.3").terminating(),
            Pod::new("left", "10.0.0.4").gone(),
            Pod::new("starting", "10.0.0.5").unready(),
            Pod::new("published", "10.0.0.6")
                .conditions(json!({"ready": true, "serving": false, "terminating": true})),
            Pod::new("unknown", "10.0.0.7").conditions(json!({"ready": null})),
        ])
        .put(&api);
    let source = source(&api.settings());
    let web_service = Following::of(&source, "default/web:http");
    web_service
        .until(&[
            "10.0.0.1:8080",
            "10.0.0.2:8080",
            "10.0.0.3:8080 draining",
            "10.0.0.6:8080",
            "10.0.0.7:8080",
        ])
        .await;
    // With nothing else left, those that end are used.
    web()
        .pods([
            Pod::new("leaving", "10.0.0.3").terminating(),
            Pod::new("left", "10.0.0.4").gone(),
            Pod::new("starting", "10.0.0.5").unready(),
        ])
        .put(&api);
    web_service.until(&["10.0.0.3:8080 warning"]).await;
    web().pods([Pod::new("left", "10.0.0.4").gone(), Pod::new("starting", "10.0.0.5").unready()]).put(&api);
    web_service.until(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_has_its_name_zone_node_and_hints() {
    let api = KubeApi::start().await;
    let pods = [
        Pod::new("web-1", "10.0.0.1").place("a", "node-1").hint(&["a"]),
        Pod::new("web-2", "10.0.0.2").place("b", "node-2").hint(&["b", "c"]),
    ];
    web().pods(pods.clone()).put(&api);
    api.put(
        Kind::SERVICE,
        json!({"metadata": {"namespace": "default", "name": "web"},
               "spec": {"trafficDistribution": "PreferSameZone", "ports": [{"name": "http", "port": 80}]}}),
    );
    let source = source(&api.settings());
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&["10.0.0.1:8080", "10.0.0.2:8080"]).await;
    let instance = |id: &str| {
        let listing = web_service.seen().listing.expect("a list");
        listing.instances.into_iter().find(|instance| &*instance.id == id).expect("an instance")
    };
    eventually("the service is known", || async {
        let details = instance("web-2").details?;
        details.meta.contains_key("traffic_distribution").then_some(())
    })
    .await;
    let details = instance("web-2").details.expect("details");
    assert_eq!((details.zone.as_deref(), details.machine.as_deref()), (Some("b"), Some("node-2")));
    assert_eq!(details.for_zones.iter().map(|zone| &**zone).collect::<Vec<_>>(), ["b", "c"]);
    assert_eq!(instance("web-1").node.weight, 50);

    // One without hints: the zones are not divided any more.
    web().pods(pods).pod(Pod::new("web-3", "10.0.0.3").place("c", "node-3")).put(&api);
    web_service.until(&["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"]).await;
    assert!(instance("web-1").details.is_some_and(|details| details.for_zones.is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_is_a_name_a_number_of_the_service_or_of_the_endpoints() {
    let api = KubeApi::start().await;
    let two = json!([{"name": "http", "port": 8080, "appProtocol": "kubernetes.io/h2c"}, {"name": "metrics", "port": 9102}]);
    web().ports(two).pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    let unnamed = Slice::new("default", "plain", "plain-a", 7000).ports(json!([{"port": 7000}]));
    unnamed.pod(Pod::new("plain-1", "10.0.0.2")).put(&api);
    let spec = json!({"ports": [{"name": "http", "port": 80}, {"name": "metrics", "port": 8080}]});
    api.put(Kind::SERVICE, json!({"metadata": {"namespace": "default", "name": "web"}, "spec": spec}));
    let source = source(&api.settings());
    for (service, expected) in [
        ("default/web:http", "10.0.0.1:8080"),
        ("default/web:metrics", "10.0.0.1:9102"),
        ("default/web:80", "10.0.0.1:8080"),
        // A number of the service comes before one of its endpoints.
        ("default/web:8080", "10.0.0.1:9102"),
        ("default/web:9102", "10.0.0.1:9102"),
        ("default/plain:7000", "10.0.0.2:7000"),
        ("default/plain", "10.0.0.2:7000"),
    ] {
        Following::of(&source, service).until(&[expected]).await;
    }
    Following::of(&source, "default/web").until_failure("`http` (8080), `metrics` (9102)").await;
    Following::of(&source, "default/web:grpc").until_failure("has no port `grpc`").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_service_with_both_families_one_is_taken() {
    let api = KubeApi::start().await;
    let (v4, v6) = (web(), Slice::new("default", "web", "web-v6", 8080).family("IPv6"));
    v4.clone().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    v6.clone().pod(Pod::new("web-1", "fd00::1")).put(&api);
    let source = source(&api.settings());
    let primary = Following::of(&source, "default/web:http");
    primary.until(&["10.0.0.1:8080"]).await;
    Following::with(&source, "default/web:http", &[("family", "ipv6")]).until(&["fd00::1:8080"]).await;
    Following::with(&source, "default/web:http", &[("family", "any")])
        .until(&["10.0.0.1:8080", "fd00::1:8080"])
        .await;
    assert!(source.open(&query("default/web:http", &[("family", "ipv5")])).is_err());

    // The service prefers the other; and of that there is none any more.
    let service = json!({"metadata": {"namespace": "default", "name": "web"}, "spec": {"ipFamilies": ["IPv6", "IPv4"]}});
    api.put(Kind::SERVICE, service);
    primary.until(&["fd00::1:8080"]).await;
    v6.delete(&api);
    primary.until(&["10.0.0.1:8080"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_without_pods_are_names_and_addresses_as_written() {
    let api = KubeApi::start().await;
    let spec = json!({"type": "ExternalName", "externalName": "db.example.test", "ports": [{"name": "pg", "port": 5432}]});
    api.put(Kind::SERVICE, json!({"metadata": {"namespace": "default", "name": "db"}, "spec": spec}));
    // Made by hand: no selector, no pods, and a name among the addresses.
    let by_hand = Slice::new("default", "manual", "manual-1", 443).pod(Pod::bare("192.0.2.7"));
    by_hand.put(&api);
    let names = Slice::new("default", "manual", "manual-2", 443).family("FQDN");
    names.pod(Pod::bare("backup.example.test")).put(&api);
    Slice::new("default", "manual", "manual-3", 443).family("Later").pod(Pod::bare("?")).put(&api);
    let source = source(&api.settings());
    Following::of(&source, "default/db:pg").until(&["db.example.test:5432"]).await;
    Following::of(&source, "default/db:6432").until(&["db.example.test:6432"]).await;
    let manual = Following::of(&source, "default/manual:http");
    manual.until(&["192.0.2.7:443", "backup.example.test:443"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_watch_is_listed_again_in_both_forms_and_nothing_is_lost_meanwhile() {
    for in_stream in [false, true] {
        let api = KubeApi::start().await;
        web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
        let source = source(&api.settings());
        let web_service = Following::of(&source, "default/web:http");
        web_service.until(&["10.0.0.1:8080"]).await;
        eventually("the watch runs", || async { (api.asked("endpointslices").1 == 1).then_some(()) }).await;

        api.expire(in_stream);
        web().pods([Pod::new("web-1", "10.0.0.1"), Pod::new("web-2", "10.0.0.2")]).put(&api);
        web_service.until(&["10.0.0.1:8080", "10.0.0.2:8080"]).await;
        let seen = web_service.seen();
        assert_eq!((seen.failed, seen.empty, seen.restarted), (0, 0, 0), "in the stream: {in_stream}");
        assert_eq!(api.asked("endpointslices").0, 2, "in the stream: {in_stream}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_goes_on_at_the_last_bookmark() {
    let api = KubeApi::start().await;
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    api.bookmark_every(Duration::from_millis(50));
    let source = source(&api.settings());
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&["10.0.0.1:8080"]).await;
    // Changes of other kinds make the version of the list old; bookmarks carry the watch along.
    let before = api.requests().len();
    for n in 0..5 {
        api.put(
            Kind::CONFIG_MAP,
            json!({"metadata": {"namespace": "default", "name": "noise"}, "data": {"n": n.to_string()}}),
        );
    }
    let ended = std::cell::Cell::new(Instant::now());
    eventually("a watch begins at the version of a bookmark", || async {
        if ended.get().elapsed() > Duration::from_millis(300) {
            api.end_watches();
            ended.set(Instant::now());
        }
        let requests = api.requests();
        let version =
            |line: &String| line.split("resourceVersion=").nth(1)?.split('&').next()?.parse::<u64>().ok();
        let mut begun = requests.iter().skip(before).filter(|line| line.contains("endpointslices?watch"));
        begun.any(|line| version(line).is_some_and(|version| version >= 7)).then_some(())
    })
    .await;
    assert_eq!(api.asked("endpointslices").0, 1, "no list again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_keep_the_list_and_are_told() {
    for (manner, part) in [
        (Manner::Errors, "etcdserver: no leader"),
        (Manner::SlowBody, "nothing came for 1 s"),
        (Manner::HalfBody, ""),
        (Manner::Garbage, ""),
    ] {
        let api = KubeApi::start().await;
        web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
        let source = source(&api.settings());
        let web_service = Following::of(&source, "default/web:http");
        web_service.until(&["10.0.0.1:8080"]).await;
        api.behave(manner);
        web_service.until_failure(part).await;
        web().pods([Pod::new("web-1", "10.0.0.1"), Pod::new("web-2", "10.0.0.2")]).put(&api);
        api.behave(Manner::Well);
        let (busy, begun) = (Busy::start(), Instant::now());
        web_service.until(&["10.0.0.1:8080", "10.0.0.2:8080"]).await;
        let allowed = busy.allow(Duration::from_secs(4));
        assert!(begun.elapsed() < allowed, "{manner:?}: {:?}", begun.elapsed());
        assert_eq!(web_service.seen().empty, 0, "{manner:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_said_before_the_first_list_is_complete() {
    let api = KubeApi::start().await;
    for manner in [Manner::SlowBody, Manner::HalfBody, Manner::Silent, Manner::Garbage, Manner::Errors] {
        api.behave(manner);
        let source = source(&api.settings());
        let web_service = Following::of(&source, "default/web:http");
        eventually("a failure", || async { (web_service.seen().failed > 0).then_some(()) }).await;
        assert_eq!(web_service.seen().lists, 0, "{manner:?}");
    }
    api.behave(Manner::Well);
    // More slices than fit into one answer of the list.
    for n in 0..1_100_u32 {
        let address = format!("10.1.{}.{}", n / 250, n % 250);
        Slice::new("default", "many", &format!("many-{n}"), 80)
            .pod(Pod::new(&format!("p{n}"), &address))
            .put(&api);
    }
    api.behave(Manner::FirstPages);
    let source = source(&api.settings());
    let many = Following::of(&source, "default/many:http");
    many.until_failure("request timed out").await;
    assert_eq!(many.seen().lists, 0, "a list that breaks off is none");
    api.behave(Manner::Well);
    eventually("all of them", || async {
        many.instances().map(|instances| assert_eq!(instances.len(), 1_100, "never a part of them"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_comes_back_is_found_within_two_seconds() {
    let mut api = KubeApi::start().await;
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    let source = source(&api.settings());
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&["10.0.0.1:8080"]).await;
    api.stop().await;
    web_service.until_failure("refused").await;
    web().pods([Pod::new("web-1", "10.0.0.1"), Pod::new("web-2", "10.0.0.2")]).put(&api);
    api.resume().await;
    let (busy, begun) = (Busy::start(), Instant::now());
    web_service.until(&["10.0.0.1:8080", "10.0.0.2:8080"]).await;
    assert!(begun.elapsed() < busy.allow(Duration::from_secs(2)), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_its_memory_is_said_to_have_been_restarted() {
    let mut api = KubeApi::start().await;
    for n in 0..10 {
        let name = format!("s{n}");
        Slice::new("default", &name, &name, 80).pod(Pod::new(&name, "10.0.0.1")).put(&api);
    }
    let source = source(&api.settings());
    let service = Following::of(&source, "default/s0:http");
    service.until(&["10.0.0.1:80"]).await;
    api.stop().await;
    api.forget();
    api.resume().await;
    service.until(&[]).await;
    assert_eq!(service.seen().restarted, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_that_go_backwards_are_no_obstacle() {
    let api = KubeApi::start().await;
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    for n in 0..20 {
        api.put(
            Kind::CONFIG_MAP,
            json!({"metadata": {"namespace": "default", "name": "n"}, "data": {"n": n.to_string()}}),
        );
    }
    let source = source(&api.settings());
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&["10.0.0.1:8080"]).await;
    api.rewind();
    web().pods([Pod::new("web-1", "10.0.0.1"), Pod::new("web-2", "10.0.0.2")]).put(&api);
    web_service.until(&["10.0.0.1:8080", "10.0.0.2:8080"]).await;
    web().pod(Pod::new("web-2", "10.0.0.2")).put(&api);
    web_service.until(&["10.0.0.2:8080"]).await;
    assert_eq!((web_service.seen().empty, web_service.seen().restarted), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_is_half_open_is_given_up() {
    let api = KubeApi::start().await;
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    let mut settings = api.settings();
    // The shortest there is. The server does not keep to it, so the grace of 10 seconds is added.
    settings["watch_timeout_seconds"] = json!(5);
    api.deafen_watches(true);
    let source = source(&settings);
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&["10.0.0.1:8080"]).await;
    eventually("the watch runs", || async { (api.asked("endpointslices").1 == 1).then_some(()) }).await;
    web().pods([Pod::new("web-1", "10.0.0.1"), Pod::new("web-2", "10.0.0.2")]).put(&api);
    // Somebody who wants to know now does not have to wait for that.
    web_service.restart.notify_one();
    web_service.until(&["10.0.0.1:8080", "10.0.0.2:8080"]).await;

    let watches = api.asked("endpointslices").1;
    let lists = api.asked("endpointslices").0;
    e2e::eventually::eventually_within(Duration::from_secs(18), "the watch is begun again", || async {
        (api.asked("endpointslices").1 > watches).then_some(())
    })
    .await;
    assert_eq!(api.asked("endpointslices").0, lists, "and not listed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_listed_again_from_time_to_time() {
    let api = KubeApi::start().await;
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    let mut settings = api.settings();
    settings["relist_seconds"] = json!(10);
    api.deafen_watches(true);
    let source = source(&settings);
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&["10.0.0.1:8080"]).await;
    web().pod(Pod::new("web-2", "10.0.0.2")).put(&api);
    // Between two and four thirds of ten seconds.
    web_service.until(&["10.0.0.2:8080"]).await;
    assert_eq!(api.asked("endpointslices").0, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_read_again_when_it_was_replaced() {
    let folder = TempDir::new().expect("a folder");
    let file = folder.path().join("token");
    std::fs::write(&file, "first\n").expect("the token");
    let api = KubeApi::start().await;
    api.accept_tokens(&["first"]);
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    let mut settings = api.settings();
    settings["client"] = json!({"token_file": file});
    let source = source(&settings);
    let web_service = Following::of(&source, "default/web:http");
    web_service.until(&["10.0.0.1:8080"]).await;

    // Replaced in time, as the kubelet does.
    api.accept_tokens(&["first", "second"]);
    std::fs::write(&file, "second\n").expect("the token");
    api.accept_tokens(&["second"]);
    api.end_watches();
    web().pod(Pod::new("web-2", "10.0.0.2")).put(&api);
    web_service.until(&["10.0.0.2:8080"]).await;
    assert_eq!(web_service.seen().failed, 0);

    // Replaced too late: it is told, and forgotten as soon as there is a good one.
    api.accept_tokens(&["third"]);
    api.end_watches();
    web_service.until_failure("401").await;
    assert_eq!(web_service.instances().expect("a list"), ["10.0.0.2:8080"], "what was known stays");
    std::fs::write(&file, "third\n").expect("the token");
    web_service.until(&["10.0.0.2:8080"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rights_that_are_missing_are_named() {
    let api = KubeApi::start().await;
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    api.forbids("services");
    let cluster = source(&api.settings());
    Following::of(&cluster, "default/web:http").until(&["10.0.0.1:8080"]).await;
    Following::of(&cluster, "default/web:80").until_failure("need the right to read Services").await;

    api.forbids("endpointslices");
    let cluster = source(&api.settings());
    Following::of(&cluster, "default/web:http").until_failure("403: the rights are missing").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_objects_are_read_where_there_are_no_slices_or_the_settings_say_so() {
    let api = KubeApi::start().await;
    let subset = |ready: &[&str], starting: &[&str]| {
        let list = |addresses: &[&str]| -> Vec<Value> {
            addresses
                .iter()
                .map(|ip| json!({"ip": ip, "nodeName": "node-1", "targetRef": {"name": format!("pod-{ip}")}}))
                .collect()
        };
        json!({"metadata": {"namespace": "default", "name": "web"},
               "subsets": [{"addresses": list(ready), "notReadyAddresses": list(starting), "ports": [{"name": "http", "port": 8080}]}]})
    };
    api.put(Kind::ENDPOINTS, subset(&["10.0.0.1"], &["10.0.0.2"]));
    web().pod(Pod::new("web-9", "10.0.0.9")).put(&api);
    let mut settings = api.settings();
    settings["watch_endpoint_slices"] = json!(false);
    let old = Following::of(&source(&settings), "default/web:http");
    old.until(&["10.0.0.1:8080"]).await;
    assert_eq!(api.asked("endpointslices"), (0, 0));

    api.lacks("endpointslices");
    let fallen_back = Following::of(&source(&api.settings()), "default/web:http");
    fallen_back.until(&["10.0.0.1:8080"]).await;
    api.put(Kind::ENDPOINTS, subset(&["10.0.0.1", "10.0.0.2"], &[]));
    fallen_back.until(&["10.0.0.1:8080", "10.0.0.2:8080"]).await;
    old.until(&["10.0.0.1:8080", "10.0.0.2:8080"]).await;
    api.delete(Kind::ENDPOINTS, "default", "web");
    old.until(&[]).await;

    let mut settings = api.settings();
    settings["watch_endpoint_slices"] = json!(true);
    Following::of(&source(&settings), "default/web:http").until_failure("404").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn selectors_choose_namespaces_and_labels() {
    let api = KubeApi::start().await;
    for (n, namespace) in ["default", "my-app", "my-app2", "kube-system"].into_iter().enumerate() {
        let slice = Slice::new(namespace, "web", "web-a", 80)
            .label("tier", if n % 2 == 0 { "front" } else { "back" });
        slice.pod(Pod::new("p", &format!("10.0.{n}.1"))).put(&api);
    }
    let namespaces = ["default", "my-app", "my-app2", "kube-system"];
    for (selector, labels, expected) in [
        (json!({}), None, vec![true, true, true, true]),
        (json!({"equal": "my-app"}), None, vec![false, true, false, false]),
        (json!({"not_equal": "my-app"}), None, vec![true, false, true, true]),
        (json!({"match": ["default", "^my-[a-z]+$"]}), None, vec![true, true, false, false]),
        (json!({"not_match": ["my-.*"]}), None, vec![true, false, false, true]),
    ] {
        let mut settings = api.settings();
        settings["namespace_selector"] = selector.clone();
        if let Some(labels) = labels {
            settings["label_selector"] = labels;
        }
        let source = source(&settings);
        for ((n, namespace), expected) in namespaces.iter().enumerate().zip(expected) {
            let service = format!("{namespace}/web:http");
            if expected {
                Following::of(&source, &service).until(&[&format!("10.0.{n}.1:80")]).await;
            } else {
                assert!(source.open(&query(&service, &[])).is_err(), "{service} {selector}");
            }
        }
    }
    // Rights in one namespace are enough where one is selected.
    assert!(api.requests().iter().any(|line| line.contains("/namespaces/my-app/endpointslices?")));

    let mut settings = api.settings();
    settings["label_selector"] = json!("tier=\"front\"");
    let source = source(&settings);
    Following::of(&source, "default/web:http").until(&["10.0.0.1:80"]).await;
    let relabelled = Following::of(&source, "my-app/web:http");
    relabelled.until(&[]).await;
    let slice = Slice::new("my-app", "web", "web-a", 80).pod(Pod::new("p", "10.0.1.1"));
    slice.clone().label("tier", "front").put(&api);
    relabelled.until(&["10.0.1.1:80"]).await;
    slice.label("tier", "back").put(&api);
    relabelled.until(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_clusters_are_told_apart_by_their_ids() {
    let (east, west) = (KubeApi::start().await, KubeApi::start().await);
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&east);
    web().pod(Pod::new("web-1", "10.9.0.1")).put(&west);
    let mut settings = vec![east.settings(), west.settings()];
    for (cluster, id) in settings.iter_mut().zip(["east", "west"]) {
        cluster["id"] = json!(id);
        cluster["client"] = json!({"token": "${CLUSTER_TOKEN}"});
    }
    east.accept_tokens(&["secret"]);
    let sources = sources(&Value::from(settings), &[("CLUSTER_TOKEN", "secret")]);
    let of = |service: &str| -> Vec<&str> {
        sources
            .iter()
            .filter(|source| source.serves(&query(service, &[])))
            .map(|source| source.name())
            .collect()
    };
    assert_eq!(of("east/default/web:http"), ["east"]);
    assert_eq!(of("west/default/web:http"), ["west"]);
    assert_eq!(of("default/web:http"), [""; 0]);
    let (one, other) = (&sources[0], &sources[1]);
    Following::of(one, "east/default/web:http").until(&["10.0.0.1:8080"]).await;
    Following::of(other, "west/default/web:http").until(&["10.9.0.1:8080"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_checked_and_kubeconfig_files_are_read() {
    let folder = TempDir::new().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    };
    let (authority, stranger) = (certs::Authority::new("kubernetes"), certs::Authority::new("stranger"));
    let api = KubeApi::start_tls(authority.server(&["127.0.0.1", "localhost"]).server_config(&[])).await;
    api.accept_tokens(&["secret"]);
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    let ca = write("ca.crt", &authority.pem());
    let with = |client: Value| {
        let mut settings = api.settings();
        settings["client"] = client;
        Following::of(&source(&settings), "default/web:http")
    };
    with(json!({"token": "secret", "ca_file": ca})).until(&["10.0.0.1:8080"]).await;
    with(json!({"token": "secret", "ssl_verify": false})).until(&["10.0.0.1:8080"]).await;
    let other = write("other.crt", &stranger.pem());
    with(json!({"token": "secret", "ca_file": other})).until_failure("certificate").await;

    let kubeconfig = write(
        "kubeconfig",
        &format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: one\n\
             clusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:{}', certificate-authority: ca.crt}}}}]\n\
             users: [{{name: u, user: {{token: secret}}}}]\ncontexts: [{{name: one, context: {{cluster: c, user: u}}}}]\n",
            api.addr.port()
        ),
    );
    let by_file = source(&json!({"kubeconfig": kubeconfig}));
    Following::of(&by_file, "default/web:http").until(&["10.0.0.1:8080"]).await;
    let path = kubeconfig.to_str().expect("a path");
    let by_variable = sources(&json!({}), &[("KUBECONFIG", path)]).remove(0);
    Following::of(&by_variable, "default/web:http").until(&["10.0.0.1:8080"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn feeds_end_with_the_last_service_that_is_followed() {
    let api = KubeApi::start().await;
    let source = source(&api.settings());
    assert_eq!(api.requests().len(), 0, "nothing is asked before somebody wants to know");
    let one = Following::of(&source, "default/web:http");
    let other = Following::of(&source, "default/other:http");
    one.until(&[]).await;
    other.until(&[]).await;
    drop(one);
    web().pod(Pod::new("web-1", "10.0.0.1")).put(&api);
    let again = Following::of(&source, "default/web:http");
    again.until(&["10.0.0.1:8080"]).await;
    assert_eq!(api.asked("endpointslices"), (1, 1));
    drop((again, other));
    eventually("the watch has ended and is not begun again", || async {
        let before = api.requests().len();
        api.end_watches();
        tokio::time::sleep(Duration::from_millis(300)).await;
        (api.requests().len() == before).then_some(())
    })
    .await;
}

/// The registry of the suite of conduct: pods at these addresses.
struct Cluster {
    api: KubeApi,
    pods: BTreeMap<String, BTreeMap<String, u16>>,
    stopped: bool,
}

impl Cluster {
    fn put(&self, service: &str) {
        let pods = self.pods.get(service).cloned().unwrap_or_default();
        let port = pods.values().next().copied().unwrap_or(1);
        let pods = pods.keys().map(|address| Pod::new(&format!("pod-{address}"), address));
        Slice::new("default", service, service, port).pods(pods).put(&self.api);
    }

    fn change(&mut self, service: &str, address: &str, there: bool) {
        let (host, port) = address.rsplit_once(':').expect("an address");
        let pods = self.pods.entry(service.to_owned()).or_default();
        match there {
            true => pods.insert(host.to_owned(), port.parse().expect("a port")),
            false => pods.remove(host),
        };
        self.put(service);
    }
}

impl Conducting for Cluster {
    fn source(&self) -> Arc<dyn Source> {
        source(&self.api.settings())
    }

    fn service_name(&self, service: &str) -> String {
        format!("default/{service}:http")
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, _: u32) -> BoxFuture<'a, ()> {
        Box::pin(async move { self.change(service, address, true) })
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async move { self.change(service, address, false) })
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        Box::pin(async move {
            match how {
                Conduct::Well if self.stopped => {
                    self.stopped = false;
                    self.api.resume().await;
                }
                Conduct::Well => self.api.behave(Manner::Well),
                Conduct::Errors => self.api.behave(Manner::Errors),
                Conduct::SlowBody => self.api.behave(Manner::SlowBody),
                Conduct::Silent => self.api.behave(Manner::Silent),
                Conduct::HalfBody => self.api.behave(Manner::HalfBody),
                Conduct::Garbage => self.api.behave(Manner::Garbage),
                Conduct::Rewinds => self.api.rewind(),
                Conduct::Restarts | Conduct::RestartsEmpty => {
                    self.api.stop().await;
                    self.stopped = true;
                    if how == Conduct::RestartsEmpty {
                        self.api.forget();
                        self.pods.clear();
                    }
                }
            }
            Able::Yes
        })
    }

    fn has_weights(&self) -> bool {
        false
    }

    fn wrong_name(&self) -> Option<String> {
        Some("web".to_owned())
    }

    fn connections(&self) -> Option<usize> {
        Some(self.api.connections())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_conducts_itself_as_every_source_has_to() {
    let mut cluster = Cluster { api: KubeApi::start().await, pods: BTreeMap::new(), stopped: false };
    let report = conduct(&mut cluster).await.unwrap_or_else(|broken| panic!("{broken}"));
    assert_eq!(report.skipped, ["another weight"]);
}
