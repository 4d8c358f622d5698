//! Discovery by Eureka. Where `POSTERN_TEST_EUREKA` names a real one (`http://[user:password@]host:port`), the suite runs
//! over that as well.

use std::sync::Arc;
use std::time::Duration;

use config::discovery::eureka::Eureka as Settings;
use discovery::testing::{Able, Conduct, Registry, conduct};
use discovery::{Health, Query, Source, Standing, eureka};
use e2e::eureka::Eureka;
use e2e::{Value, json};
use futures_util::future::BoxFuture;

/// A second, the least that settings can say, would be waited for some twenty times by the suite.
const OFTEN: Duration = Duration::from_millis(50);

fn source(host: &str) -> Arc<dyn Source> {
    let settings = json!({"host": [host], "prefix": "/eureka/", "fetch_interval": 1, "weight": 3,
                          "timeout": {"connect": 200, "send": 200, "read": 300}});
    let settings: Settings = config::typed::parse(&settings).expect("settings");
    Arc::new(eureka::Eureka::asked_every(OFTEN, &settings).expect("a source"))
}

struct Fake(Eureka);

impl Registry for Fake {
    fn source(&self) -> Arc<dyn Source> {
        source(&format!("http://{}", self.0.registry.addr))
    }

    fn service_name(&self, service: &str) -> String {
        service.to_owned()
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        self.0.register(service, address, "UP", &json!({"weight": weight.to_string()}));
        Box::pin(async {})
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        self.0.deregister(service, address);
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
    let mut fake = Fake(Eureka::start().await);
    let report = conduct(&mut fake).await.unwrap_or_else(|broken| panic!("{broken}"));
    assert_eq!(report.skipped, ["Rewinds"]);
}

/// A restart between two questions is no failure, and yet what is empty afterwards may only be forgotten.
#[tokio::test]
async fn an_empty_list_over_a_new_connection_may_be_that_of_a_registry_that_began_anew() {
    let eureka = Eureka::start().await;
    eureka.register("orders", "10.0.0.1:80", "UP", &json!({}));
    let source = source(&format!("http://{}", eureka.registry.addr));
    let query = Query { service: "orders".into(), args: std::collections::BTreeMap::new() };
    let mut watcher = source.open(&query).expect("a service");
    let mut look = async || {
        let listing = watcher.next().await.expect("a list");
        (listing.instances.len(), listing.standing)
    };
    assert_eq!(look().await, (1, Standing::Continued));
    eureka.deregister("orders", "10.0.0.1:80");
    assert_eq!(look().await, (0, Standing::Continued), "the same registry says so");
    eureka.register("orders", "10.0.0.1:80", "UP", &json!({}));
    assert_eq!(look().await, (1, Standing::Continued));
    eureka.registry.restart_unseen().await;
    assert_eq!(look().await, (1, Standing::Continued), "it has forgotten nothing");
    eureka.deregister("orders", "10.0.0.1:80");
    eureka.registry.restart_unseen().await;
    assert_eq!(look().await, (0, Standing::Restarted));
    assert_eq!(look().await, (0, Standing::Continued));
}

#[tokio::test]
async fn what_an_application_is_said_to_be() {
    let eureka = Eureka::start().await;
    eureka.register("orders", "10.0.0.1:80", "UP", &json!({"zone": "z1", "weight": "9"}));
    eureka.register(
        "orders",
        "10.0.0.2:80",
        "OUT_OF_SERVICE",
        &json!({"@class": "java.util.Collections$EmptyMap"}),
    );
    eureka.register("orders", "10.0.0.3:80", "DOWN", &json!({}));
    let host = format!("http://user:word@{}", eureka.registry.addr);
    let query = Query { service: "orders".into(), args: std::collections::BTreeMap::new() };
    let listing = source(&host).open(&query).expect("a service").next().await.expect("a list");
    let found: Vec<_> =
        listing.instances.iter().map(|one| (&*one.node.host, one.node.weight, one.health)).collect();
    assert_eq!(
        found,
        [
            ("10.0.0.1", 9, Health::Healthy),
            ("10.0.0.2", 3, Health::Draining),
            ("10.0.0.3", 3, Health::Unhealthy)
        ]
    );
    let details = listing.instances.iter().map(|one| one.details.clone().expect("details"));
    let told: Vec<_> = details.map(|it| (it.zone.clone(), it.meta.len())).collect();
    assert_eq!(told, [(Some("z1".into()), 2), (None, 0), (None, 0)]);
    let question = eureka.registry.questions().pop().expect("a question");
    assert_eq!(question.path, "/eureka/apps/ORDERS", "alone, and in capitals");
    assert_eq!(question.fields.get("authorization").map(String::as_str), Some("Basic dXNlcjp3b3Jk"));
}

/// A real Eureka, which cannot be made to misbehave.
struct Real(String);

impl Real {
    async fn write(&self, method: &str, target: &str, body: Option<Value>) {
        let (_, host) = self.0.rsplit_once('@').unwrap_or(("", self.0.trim_start_matches("http://")));
        let addr = tokio::net::lookup_host(host).await.expect("an address").next().expect("an address");
        let call = e2e::client::Call::new(method, target);
        let call = body.iter().fold(call, |call, body| call.json(body));
        let answer = call.send_to(addr).await;
        assert!((200..300).contains(&answer.status), "{} {}", answer.status, answer.text());
    }
}

impl Registry for Real {
    fn source(&self) -> Arc<dyn Source> {
        source(&self.0)
    }

    fn service_name(&self, service: &str) -> String {
        service.to_owned()
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        let (ip, port) = address.rsplit_once(':').expect("an address with a port");
        let instance = json!({"instance": {
            "instanceId": address, "hostName": ip, "app": service.to_uppercase(), "ipAddr": ip, "status": "UP",
            "port": {"$": port, "@enabled": "true"}, "securePort": {"$": 443, "@enabled": "false"},
            "metadata": {"weight": weight.to_string()},
            "dataCenterInfo": {"@class": "com.netflix.appinfo.InstanceInfo$DefaultDataCenterInfo", "name": "MyOwn"},
        }});
        let target = format!("/eureka/apps/{}", service.to_uppercase());
        Box::pin(async move { self.write("POST", &target, Some(instance)).await })
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        let target = format!("/eureka/apps/{}/{address}", service.to_uppercase());
        Box::pin(async move { self.write("DELETE", &target, None).await })
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        Box::pin(async move { if how == Conduct::Well { Able::Yes } else { Able::No } })
    }

    fn patience(&self) -> Duration {
        // Eureka answers from a cache that is half a minute old.
        Duration::from_secs(70)
    }
}

#[tokio::test]
async fn the_suite_of_conduct_over_a_real_one() {
    let Ok(host) = std::env::var("POSTERN_TEST_EUREKA") else { return };
    conduct(&mut Real(host)).await.unwrap_or_else(|broken| panic!("{broken}"));
}
