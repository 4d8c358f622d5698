//! Discovery by a real Consul, and by one that misbehaves.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use config::discovery::Registry as _;
use config::discovery::consul::Consul as Settings;
use config::discovery::consul_kv::ConsulKv;
use discovery::consul::register::{Agent, Check, Registration, Status};
use discovery::http::{Options, Server};
use discovery::source::Retire;
use discovery::testing::{Able, Conduct, Registry, conduct};
use discovery::{Discovery, Endpoint, Health, Instance, Node, Query, Source, Target, Watch};
use e2e::consul::wire::Wire;
use e2e::consul::{self, Consul};
use e2e::ports::Port;
use e2e::{Value, certs, eventually, json};
use futures_util::future::BoxFuture;
use tokio::runtime::Handle;

/// The sources of `discovery.consul` as it is written.
fn sources(settings: &Value) -> Vec<Arc<dyn Source>> {
    let settings: Settings = config::typed::parse(settings).expect("settings");
    let mut errors = Vec::new();
    settings.check(&mut errors);
    assert!(errors.is_empty(), "{errors:?}");
    discovery::consul::sources(&settings).expect("sources")
}

/// The sources of `discovery.consul_kv`.
fn kv_sources(settings: &Value) -> Vec<Arc<dyn Source>> {
    let settings: ConsulKv = config::typed::parse(settings).expect("settings");
    discovery::consul_kv::sources(&settings).expect("sources")
}

fn query(service: &str) -> Query {
    Query { service: service.into(), args: BTreeMap::new() }
}

/// One service that is watched.
struct Watched {
    discovery: Discovery,
    watch: Watch,
}

impl Watched {
    fn of(sources: Vec<Arc<dyn Source>>, service: &str) -> Watched {
        let kind = sources[0].kind();
        let settings = discovery::Settings { sources, ..discovery::Settings::default() };
        let discovery = Discovery::new(Handle::current(), settings);
        let target = Target::service("upstreams/1", kind, query(service));
        discovery.check(&target).expect("a target");
        let watch = discovery.watch(&target);
        Watched { discovery, watch }
    }

    fn addresses(&self) -> BTreeSet<String> {
        self.watch.borrow().list.iter().map(|endpoint| endpoint.addr.to_string()).collect()
    }

    /// Until the endpoints are at these addresses.
    fn until(&self, addresses: &[&str]) -> impl Future<Output = ()> {
        let wanted: BTreeSet<String> = addresses.iter().map(|addr| (*addr).to_owned()).collect();
        async move {
            let what = format!("endpoints at {wanted:?}");
            eventually(&what, async || (self.addresses() == wanted).then_some(())).await;
        }
    }

    /// Until there is one endpoint for which this holds.
    #[track_caller]
    fn until_one(&self, what: &str, holds: fn(&Endpoint) -> bool) -> impl Future<Output = ()> {
        eventually(what, move || {
            let endpoints = self.watch.borrow();
            let found = endpoints.list.len() == 1 && endpoints.list.iter().all(holds);
            async move { found.then_some(()) }
        })
    }

    /// Until what is known is stale for a reason with these words.
    #[track_caller]
    fn until_stale(&self, words: &str) -> impl Future<Output = ()> {
        let words = words.to_owned();
        eventually("a reason", move || {
            let services = self.discovery.services();
            let found = services
                .iter()
                .any(|service| service.failure.as_ref().is_some_and(|why| why.contains(&words)));
            async move { found.then_some(()) }
        })
    }
}

/// A real Consul at the end of a wire, for the suite of conduct.
struct Wired {
    consul: Consul,
    wire: Wire,
    source: Arc<dyn Source>,
}

impl Wired {
    async fn start(sources: fn(&Value) -> Vec<Arc<dyn Source>>) -> Wired {
        let consul = Consul::start().await;
        let wire = Wire::to(consul.addr()).await;
        let settings = json!({"servers": [wire.url()], "timeout": {"connect": 500, "read": 700}});
        Wired { consul, wire, source: sources(&settings).remove(0) }
    }

    fn keeps_keys(&self) -> bool {
        self.source.kind() == "consul_kv"
    }
}

impl Registry for Wired {
    fn source(&self) -> Arc<dyn Source> {
        Arc::clone(&self.source)
    }

    fn service_name(&self, service: &str) -> String {
        service.to_owned()
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        let addr: SocketAddr = address.parse().expect("an address");
        Box::pin(async move {
            if self.keeps_keys() {
                let key = format!("/v1/kv/upstreams/{service}/{address}");
                return self.consul.put(&key, &json!({"weight": weight})).await;
            }
            let weights = json!({"Weights": {"Passing": weight, "Warning": 1}});
            self.consul.register_with(service, address, addr, weights).await;
        })
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            if self.keeps_keys() {
                return self.consul.delete(&format!("/v1/kv/upstreams/{service}/{address}")).await;
            }
            self.consul.deregister(address).await;
        })
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        Box::pin(async move {
            match how {
                Conduct::Restarts => {
                    self.consul.kill();
                    self.consul.start_again().await;
                }
                Conduct::RestartsEmpty => {
                    self.consul.kill();
                    self.consul.wipe();
                    self.consul.start_again().await;
                }
                how => self.wire.behave(how),
            }
            Able::Yes
        })
    }

    fn connections(&self) -> Option<usize> {
        Some(self.wire.open())
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }
}

async fn conducts_well(mut registry: Wired) {
    let report = conduct(&mut registry).await;
    let report = report.unwrap_or_else(|broken| panic!("{broken}"));
    assert_eq!(report.skipped, ["a wrong name"], "{report:#?}");
}

#[tokio::test]
async fn a_real_consul_is_followed_whatever_it_does() {
    if consul::is_there() {
        conducts_well(Wired::start(sources).await).await;
    }
}

#[tokio::test]
async fn its_kv_store_is_followed_whatever_it_does() {
    if consul::is_there() {
        conducts_well(Wired::start(kv_sources).await).await;
    }
}

#[tokio::test]
async fn checks_and_options_say_which_instances_are_used() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let addr = |last: u8| SocketAddr::from(([10, 0, 0, last], 80));
    let check = |status: &str| json!({"Check": {"TTL": "1h", "Status": status}, "Weights": {"Passing": 9, "Warning": 2}});
    consul.register_with("orders", "a", addr(1), check("passing")).await;
    consul.register_with("orders", "b", addr(2), check("warning")).await;
    consul.register_with("orders", "c", addr(3), check("critical")).await;
    let tagged = json!({"Tags": ["blue"], "Meta": {"version": "2 & more"}, "Check": {"TTL": "1h", "Status": "passing"}});
    consul.register_with("orders", "d", addr(4), tagged).await;
    let server = consul.url();
    let stand_in = json!({"host": "10.9.9.9", "port": 1});
    for (settings, args, expected) in [
        (json!({}), vec![], vec!["10.0.0.1:80", "10.0.0.2:80", "10.0.0.4:80"]),
        (json!({"passing": true}), vec![], vec!["10.0.0.1:80", "10.0.0.4:80"]),
        (
            json!({"critical": "keep"}),
            vec![],
            vec!["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"],
        ),
        (json!({"tags": ["blue"]}), vec![], vec!["10.0.0.4:80"]),
        (json!({}), vec![("tags", "blue")], vec!["10.0.0.4:80"]),
        (json!({}), vec![("filter", r#"Service.Meta.version == "2 & more""#)], vec!["10.0.0.4:80"]),
        (json!({"tags": ["red"], "default_service": stand_in}), vec![], vec!["10.9.9.9:1"]),
        (
            json!({"keepalive": false, "fetch_interval": 1, "passing": true}),
            vec![],
            vec!["10.0.0.1:80", "10.0.0.4:80"],
        ),
    ] {
        let mut settings = settings;
        settings["servers"] = json!([server]);
        let source = sources(&settings).remove(0);
        let args = args.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let mut watcher = source.open(&Query { service: "orders".into(), args }).expect("a service");
        let listing = watcher.next().await.expect("a list");
        let mut found: Vec<_> =
            listing.instances.iter().map(|it| format!("{}:{}", it.node.host, it.node.port)).collect();
        found.sort();
        assert_eq!(found, expected, "{settings}");
    }
    let skipping = sources(&json!({"servers": [server], "skip_services": ["orders"]})).remove(0);
    let advice = skipping.open(&query("orders")).err().expect("advice");
    assert!(advice.contains("skip_services"), "{advice}");
}

#[tokio::test]
async fn clusters_are_merged_and_fail_one_by_one() {
    if !consul::is_there() {
        return;
    }
    // Nobody answers at these addresses: what a restarted registry has forgotten is kept only while it answers.
    let (mut first, second) = tokio::join!(Consul::start(), Consul::start());
    first.register("orders", "a", "127.0.0.11:9".parse().expect("an address")).await;
    second.register("orders", "b", "127.0.0.12:9".parse().expect("an address")).await;
    let settings = json!({"servers": [first.url(), second.url()]});
    let watched = Watched::of(sources(&settings), "orders");
    watched.until(&["127.0.0.11:9", "127.0.0.12:9"]).await;
    let only = Watched::of(sources(&settings), &format!("{}/v1/health/service/orders", second.url()));
    only.until(&["127.0.0.12:9"]).await;
    first.kill();
    watched.until_stale(&first.url()).await;
    second.register("orders", "c", "127.0.0.13:9".parse().expect("an address")).await;
    watched.until(&["127.0.0.11:9", "127.0.0.12:9", "127.0.0.13:9"]).await;
    first.start_again().await;
    first.deregister("a").await;
    watched.until(&["127.0.0.12:9", "127.0.0.13:9"]).await;
}

#[tokio::test]
async fn a_token_is_read_from_its_file_and_one_that_is_refused_takes_nothing_away() {
    if !consul::is_there() {
        return;
    }
    let token = "11111111-2222-3333-4444-555555555555";
    let acl = json!({"enabled": true, "default_policy": "deny", "tokens": {"master": token, "agent": token}});
    let consul = Consul::with(json!({ "acl": acl })).await;
    consul
        .register_with("orders", "a", "10.0.0.1:80".parse().expect("an address"), json!({"Token": token}))
        .await;
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    writeln!(file, "{token}").expect("a token");
    let wire = Wire::to(consul.addr()).await;
    let settings = json!({"servers": [wire.url()], "token_file": file.path(), "timeout": {"wait": 1}});
    let watched = Watched::of(sources(&settings), "orders");
    watched.until(&["10.0.0.1:80"]).await;
    std::fs::write(file.path(), "99999999-2222-3333-4444-555555555555").expect("another token");
    watched.until_stale("403 Forbidden").await;
    assert_eq!(watched.addresses().len(), 1, "what is known stays");
    std::fs::write(file.path(), token).expect("the first token");
    consul
        .register_with("orders", "b", "10.0.0.2:80".parse().expect("an address"), json!({"Token": token}))
        .await;
    watched.until(&["10.0.0.1:80", "10.0.0.2:80"]).await;
}

#[tokio::test]
async fn a_server_is_asked_by_tls_with_a_certificate_of_ones_own() {
    if !consul::is_there() {
        return;
    }
    let authority = certs::Authority::new("registries");
    let (server, client) = (authority.server(&["consul.test"]), authority.client("gateway"));
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    };
    let (ca, cert, key) =
        (file("ca.pem", &authority.pem()), file("server.pem", &server.cert), file("server.key", &server.key));
    let https = Port::free();
    let tls = json!({
        "ports": {"https": https.number()}, "verify_incoming_https": true,
        "ca_file": ca, "cert_file": cert, "key_file": key,
    });
    let consul = Consul::with(tls).await;
    consul.register("orders", "a", "10.0.0.1:80".parse().expect("an address")).await;
    let (cert, key) = (file("client.pem", &client.cert), file("client.key", &client.key));
    let url = format!("https://{}", https.addr());
    let whole = json!({"ca_file": ca, "cert_file": cert, "key_file": key, "server_name": "consul.test"});
    let watched = Watched::of(sources(&json!({"servers": [url], "tls": whole})), "orders");
    watched.until(&["10.0.0.1:80"]).await;
    for missing in ["ca_file", "server_name"] {
        let mut tls = whole.clone();
        tls.as_object_mut().expect("an object").remove(missing);
        let source = sources(&json!({"servers": [url], "tls": tls})).remove(0);
        let error = source.open(&query("orders")).expect("a service").next().await.expect_err(missing);
        assert!(error.reason.contains("no TLS"), "{error}");
    }
}

fn registration(check: Check) -> Registration {
    Registration {
        id: "orders-1".to_owned(),
        name: "orders".to_owned(),
        address: Some("10.0.0.1".to_owned()),
        port: 80,
        tags: vec!["blue".to_owned()],
        meta: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
        weights: (7, 2),
        check,
        forget_after: None,
    }
}

fn agent(consul: &Consul) -> Agent {
    let server = Server::new(&consul.url(), Options::default()).expect("a server");
    Agent::of(server, Duration::from_secs(2))
}

#[tokio::test]
async fn a_workload_stays_registered_until_it_leaves() {
    if !consul::is_there() {
        return;
    }
    let mut consul = Consul::start().await;
    let watched = Watched::of(sources(&json!({"servers": [consul.url()]})), "orders");
    let registered = agent(&consul).keep(registration(Check::Ttl(Duration::from_secs(2))));
    registered.begun().await.expect("a registration");
    let healthy = |endpoint: &Endpoint| endpoint.health == Health::Healthy && endpoint.weight == 7;
    watched.until_one("it is registered", healthy).await;
    let zone = watched.watch.borrow().list[0].details.as_ref().and_then(|details| details.zone.clone());
    assert_eq!(zone.as_deref(), Some("a"));

    registered.tell(Status::Warning, "slow");
    watched
        .until_one("it warns", |endpoint| endpoint.health == Health::Warning && endpoint.weight == 2)
        .await;
    registered.tell(Status::Passing, "");
    watched.until_one("it is well", healthy).await;
    registered.maintenance(true, "for a while").await.expect("maintenance");
    watched.until_one("it drains", |endpoint| endpoint.health == Health::Draining).await;

    // Somebody takes it out: it comes back, and is in maintenance still.
    consul.deregister("orders-1").await;
    let found = async || consul.get("/v1/health/service/orders").await.text();
    eventually("it is there again", async || found().await.contains("_service_maintenance").then_some(()))
        .await;
    registered.maintenance(false, "").await.expect("no maintenance");
    watched.until_one("it is used again", healthy).await;

    consul.kill();
    consul.wipe();
    consul.start_again().await;
    let found = async || consul.get("/v1/health/service/orders?passing").await.text();
    eventually("a Consul without memory learns of it", async || {
        found().await.contains("orders-1").then_some(())
    })
    .await;
    registered.leave().await.expect("the end");
    assert_eq!(consul.get("/v1/agent/services").await.json(), json!({}));
}

#[tokio::test]
async fn a_workload_that_is_asked_by_its_agent_is_registered_again_too() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let origin = e2e::origin::echo::start().await;
    let check = Check::Http {
        url: format!("http://{}/", origin.addr),
        interval: Duration::from_millis(200),
        timeout: Duration::from_secs(1),
    };
    let registered = agent(&consul).keep(registration(check));
    let passing = async || {
        let found = consul.get("/v1/health/service/orders?passing").await.text();
        found.contains("orders-1").then_some(())
    };
    eventually("its check passes", passing).await;
    consul.deregister("orders-1").await;
    eventually("it is registered again", passing).await;
    drop(registered);
    drop(origin);
    eventually("nobody answers the check", async || passing().await.is_none().then_some(())).await;
}

#[tokio::test]
async fn an_instance_is_retired_where_it_is_registered() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    consul.register("orders", "a", "10.0.0.1:80".parse().expect("an address")).await;
    let external = json!({
        "Node": "legacy", "Address": "10.0.0.2", "NodeMeta": {"external-node": "true"},
        "Service": {"ID": "b", "Service": "orders", "Port": 80},
    });
    consul.put("/v1/catalog/register", &external).await;
    let settings = json!({"servers": [consul.url()]});
    let source = sources(&settings).remove(0);
    let watched = Watched::of(sources(&settings), "orders");
    watched.until(&["10.0.0.1:80", "10.0.0.2:80"]).await;
    let instance = |id: &str| Instance {
        id: id.into(),
        node: Node { host: "10.0.0.1".into(), port: 80, weight: 1, priority: 0 },
        health: Health::Healthy,
        details: None,
    };
    let (orders, a, b) = (query("orders"), instance("n1/a"), instance("legacy/b"));
    source.retire(&orders, &b, Retire::Deregister, false).await.expect("one that has no agent");
    watched.until(&["10.0.0.1:80"]).await;
    source.retire(&orders, &a, Retire::Maintenance, false).await.expect("maintenance");
    watched.until_one("it drains", |endpoint| endpoint.health == Health::Draining).await;
    source.retire(&orders, &a, Retire::Maintenance, true).await.expect("no maintenance");
    watched.until_one("it is used", |endpoint| endpoint.health == Health::Healthy).await;
    source.retire(&orders, &a, Retire::Keep, false).await.expect("nothing to do");
    source.retire(&orders, &a, Retire::Deregister, false).await.expect("out");
    watched.until(&[]).await;
    source.retire(&orders, &a, Retire::Deregister, false).await.expect("out is out");
    let refused = [(&a, Retire::Deregister, true), (&a, Retire::Maintenance, false)];
    for (instance, how, undo) in refused {
        source.retire(&orders, instance, how, undo).await.expect_err("nothing to do it with");
    }
}
