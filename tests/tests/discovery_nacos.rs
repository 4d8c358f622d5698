//! Discovery by Nacos. Where `POSTERN_TEST_NACOS` names a real one (`http://[user:password@]host:port`), the suite runs over
//! that as well.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use config::discovery::nacos::Nacos as Settings;
use discovery::testing::{Able, Conduct, Registry, conduct};
use discovery::{Health, Listing, Query, Source, SourceError, Standing, nacos};
use e2e::nacos::Nacos;
use e2e::{Value, json};
use futures_util::future::BoxFuture;
use http::Method;

const GROUP: &str = "DEFAULT_GROUP";

/// A second, the least that settings can say, would be waited for some twenty times by the suite.
const OFTEN: Duration = Duration::from_millis(50);

fn source(settings: Value) -> Arc<dyn Source> {
    let settings: Settings = config::typed::parse(&settings).expect("settings");
    Arc::new(nacos::Nacos::asked_every(OFTEN, &settings).expect("a source"))
}

fn settings(hosts: &[String]) -> Value {
    json!({"host": hosts, "fetch_interval": 1, "timeout": {"connect": 200, "send": 200, "read": 300}})
}

async fn ask(source: &Arc<dyn Source>, service: &str, args: &[(&str, &str)]) -> Result<Listing, SourceError> {
    let args = args.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    source.open(&Query { service: service.into(), args }).expect("a service").next().await
}

struct Fake(Nacos);

impl Registry for Fake {
    fn source(&self) -> Arc<dyn Source> {
        source(settings(&[self.0.host()]))
    }

    fn service_name(&self, service: &str) -> String {
        service.to_owned()
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        self.0.register(GROUP, service, address, &json!({"weight": f64::from(weight)}));
        Box::pin(async {})
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        self.0.deregister(GROUP, service, address);
        Box::pin(async {})
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        if how == Conduct::RestartsEmpty {
            self.0.clear();
        }
        Box::pin(self.0.registry.behave(how))
    }

    fn wrong_name(&self) -> Option<String> {
        Some(String::new())
    }

    fn connections(&self) -> Option<usize> {
        Some(self.0.registry.connections())
    }
}

#[tokio::test]
async fn the_suite_of_conduct() {
    let mut fake = Fake(Nacos::start().await);
    let report = conduct(&mut fake).await.unwrap_or_else(|broken| panic!("{broken}"));
    assert_eq!(report.skipped, ["Rewinds"]);
}

/// A restart between two questions is no failure, and yet what is empty afterwards may only be forgotten.
#[tokio::test]
async fn an_empty_list_over_a_new_connection_may_be_that_of_a_registry_that_began_anew() {
    let nacos = Nacos::start().await;
    nacos.register(GROUP, "orders", "10.0.0.1:80", &json!({}));
    let source = source(settings(&[nacos.host()]));
    let query = Query { service: "orders".into(), args: BTreeMap::new() };
    let mut watcher = source.open(&query).expect("a service");
    let mut look = async || {
        let listing = watcher.next().await.expect("a list");
        (listing.instances.len(), listing.standing)
    };
    assert_eq!(look().await, (1, Standing::Continued));
    nacos.deregister(GROUP, "orders", "10.0.0.1:80");
    assert_eq!(look().await, (0, Standing::Continued), "the same registry says so");
    nacos.register(GROUP, "orders", "10.0.0.1:80", &json!({}));
    assert_eq!(look().await, (1, Standing::Continued));
    nacos.registry.restart_unseen().await;
    assert_eq!(look().await, (1, Standing::Continued), "it has forgotten nothing");
    nacos.deregister(GROUP, "orders", "10.0.0.1:80");
    nacos.registry.restart_unseen().await;
    assert_eq!(look().await, (0, Standing::Restarted));
    assert_eq!(look().await, (0, Standing::Continued));
}

#[tokio::test]
async fn namespaces_groups_clusters_health_and_metadata_are_those_of_nacos() {
    let nacos = Nacos::start().await;
    nacos.register(
        GROUP,
        "a b/c",
        "10.0.0.1:80",
        &json!({"weight": 2.0, "metadata": {"zone": "z1", "v": "2"}}),
    );
    nacos.register(GROUP, "a b/c", "10.0.0.2:80", &json!({"healthy": false, "clusterName": "second"}));
    nacos.register(GROUP, "a b/c", "10.0.0.3:80", &json!({"enabled": false}));
    nacos.register("blue", "a b/c", "10.0.0.4:80", &json!({}));
    let source = source(settings(&[nacos.host()]));
    for (args, expected) in [
        (
            vec![],
            vec![
                ("10.0.0.1", Health::Healthy),
                ("10.0.0.2", Health::Unhealthy),
                ("10.0.0.3", Health::Draining),
            ],
        ),
        (vec![("group_name", "blue")], vec![("10.0.0.4", Health::Healthy)]),
        (vec![("clusters", "second,third")], vec![("10.0.0.2", Health::Unhealthy)]),
        (vec![("namespace_id", "elsewhere")], vec![]),
    ] {
        let listing = ask(&source, "a b/c", &args).await.expect("a list");
        let found: Vec<_> = listing.instances.iter().map(|one| (&*one.node.host, one.health)).collect();
        assert_eq!(found, expected, "{args:?}");
    }
    let listing = ask(&source, "a b/c", &[]).await.expect("a list");
    let details = listing.instances[0].details.clone().expect("details");
    assert_eq!((details.zone.as_deref(), details.meta.get("v").map(|v| &**v)), (Some("z1"), Some("2")));
    assert_eq!(listing.instances[0].node.weight, 2);
}

#[tokio::test]
async fn one_login_serves_all_and_a_token_that_is_refused_is_replaced() {
    let nacos = Nacos::start().await;
    let source = source(settings(&[nacos.host()]));
    let logins = || nacos.registry.questions().iter().filter(|one| one.path.ends_with("/auth/login")).count();
    for service in ["a", "b", "c"] {
        ask(&source, service, &[]).await.expect("a list");
    }
    assert_eq!(logins(), 1);
    nacos.expire();
    let refused = ask(&source, "a", &[]).await.expect_err("the token is not valid any more");
    assert!(refused.reason.contains("403") && refused.reason.contains("token invalid"), "{}", refused.reason);
    ask(&source, "a", &[]).await.expect("a list, after a login");
    assert_eq!(logins(), 2);

    let wrong = nacos.host().replace("secret", "guess");
    let refused = ask(&self::source(settings(&[wrong])), "a", &[]).await.expect_err("no login");
    assert!(refused.reason.contains("403") && !refused.reason.contains("guess"), "{}", refused.reason);
}

#[tokio::test]
async fn questions_are_signed_where_there_is_a_key() {
    let nacos = Nacos::start().await;
    let mut settings = settings(&[nacos.host()]);
    settings["access_key"] = json!("ak");
    settings["secret_key"] = json!("sk");
    ask(&source(settings), "orders", &[]).await.expect("a list");
    let question = nacos.registry.questions().pop().expect("a question");
    let data = question.value("data");
    let (time, rest) = data.split_once("@@").expect("the time comes first");
    assert!(time.parse::<u64>().is_ok_and(|time| time > 1_700_000_000_000), "{data}");
    assert_eq!(rest, "DEFAULT_GROUP@@orders");
    assert_eq!((question.value("ak"), question.value("signature").len()), ("ak", 28), "SHA-1 in base64");
}

#[tokio::test]
async fn a_host_that_is_gone_is_the_next_ones_turn() {
    let nacos = Nacos::start().await;
    nacos.register(GROUP, "a", "10.0.0.1:80", &json!({}));
    let gone = e2e::ports::Port::free();
    let hosts = [format!("http://nacos:secret@{}", gone.addr()), nacos.host()];
    let source = source(settings(&hosts));
    for _ in 0..8 {
        let query = Query { service: "a".into(), args: BTreeMap::new() };
        let mut watcher = source.open(&query).expect("a service");
        let first = watcher.next().await;
        let listing = match first {
            Ok(listing) => listing,
            Err(_) => watcher.next().await.expect("the other host answers"),
        };
        assert_eq!(listing.instances.len(), 1);
    }
}

/// A real Nacos, which cannot be made to misbehave.
struct Real(String);

impl Real {
    async fn write(&self, method: Method, service: &str, address: &str, weight: u32) {
        let (ip, port) = address.rsplit_once(':').expect("an address with a port");
        let target = format!(
            "/nacos/v1/ns/instance?serviceName={service}&ip={ip}&port={port}&weight={weight}&ephemeral=false"
        );
        let (_, host) = self.0.rsplit_once('@').unwrap_or(("", self.0.trim_start_matches("http://")));
        let addr = tokio::net::lookup_host(host).await.expect("an address").next().expect("an address");
        let answer = e2e::client::Call::new(method.as_str(), &target).send_to(addr).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

impl Registry for Real {
    fn source(&self) -> Arc<dyn Source> {
        source(settings(std::slice::from_ref(&self.0)))
    }

    fn service_name(&self, service: &str) -> String {
        service.to_owned()
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        Box::pin(self.write(Method::PUT, service, address, weight))
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(self.write(Method::DELETE, service, address, 1))
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        Box::pin(async move { if how == Conduct::Well { Able::Yes } else { Able::No } })
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(20)
    }
}

#[tokio::test]
async fn the_suite_of_conduct_over_a_real_one() {
    let Ok(host) = std::env::var("POSTERN_TEST_NACOS") else { return };
    conduct(&mut Real(host)).await.unwrap_or_else(|broken| panic!("{broken}"));
}
