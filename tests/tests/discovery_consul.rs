//! Discovery by a real Consul, and by one that misbehaves.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use config::discovery::Registry as _;
use config::discovery::consul::Consul as Settings;
use discovery::Source;
use discovery::testing::{Able, Conduct, Registry, conduct};
use e2e::consul::wire::Wire;
use e2e::consul::{self, Consul};
use e2e::{Value, json};
use futures_util::future::BoxFuture;

/// The sources of `discovery.consul` as it is written.
fn sources(settings: &Value) -> Vec<Arc<dyn Source>> {
    let settings: Settings = config::typed::parse(settings).expect("settings");
    let mut errors = Vec::new();
    settings.check(&mut errors);
    assert!(errors.is_empty(), "{errors:?}");
    discovery::consul::sources(&settings).expect("sources")
}

/// A real Consul at the end of a wire, for the suite of conduct.
struct Wired {
    consul: Consul,
    wire: Wire,
    source: Arc<dyn Source>,
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
        let weights = json!({"Weights": {"Passing": weight, "Warning": 1}});
        Box::pin(async move { self.consul.register_with(service, address, addr, weights).await })
    }

    fn deregister<'a>(&'a mut self, _: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(self.consul.deregister(address))
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

#[tokio::test]
async fn a_real_consul_is_followed_whatever_it_does() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    let wire = Wire::to(consul.addr()).await;
    let settings = json!({"servers": [wire.url()], "timeout": {"connect": 500, "read": 700}});
    let source = sources(&settings).remove(0);
    let report = conduct(&mut Wired { consul, wire, source }).await;
    let report = report.unwrap_or_else(|broken| panic!("{broken}"));
    println!("{report:#?}");
    assert_eq!(report.skipped, ["a wrong name"]);
}
