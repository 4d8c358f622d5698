//! Nodes from Consul under load: how soon they are used and left, and that nothing fails when Consul does.

use std::time::{Duration, Instant};

use discovery::testing::Conduct;
use e2e::busy::Busy;
use e2e::consul::wire::Wire;
use e2e::consul::{self, Consul};
use e2e::load::{Account, Load};
use e2e::origin::{Origin, echo};
use e2e::{Edge, eventually, eventually_within, json};

/// Requests in a second.
const RATE: u32 = 500;
/// A change is seen within this.
const CHANGE: Duration = Duration::from_secs(1);
/// And within this after Consul was away.
const RETURN: Duration = Duration::from_secs(2);

/// A gateway in front of a service in Consul.
struct Setting {
    consul: Consul,
    wire: Wire,
    edge: Edge,
    origins: Vec<Origin>,
}

impl Setting {
    /// With two instances, `o0` and `o1`.
    async fn start() -> Setting {
        let consul = Consul::start().await;
        let wire = Wire::to(consul.addr()).await;
        let upstream = json!({"type": "roundrobin", "service_name": "orders", "discovery_type": "consul"});
        let edge = Edge::file()
            .config(json!({"discovery": {"consul": {"servers": [wire.url()]}}}))
            .route(json!({"id": "r", "uri": "/*", "upstream": upstream}));
        let mut origins = Vec::new();
        for index in 0..2 {
            origins.push(echo::named(&format!("o{index}")).await);
            consul.register("orders", &format!("o{index}"), origins[index].addr).await;
        }
        let setting = Setting { consul, wire, edge: edge.start().await, origins };
        setting.edge.until_status("/", 200).await;
        setting
    }

    fn load(&self) -> Load {
        let request = "GET / HTTP/1.1\r\nhost: a.test\r\n\r\n";
        Load::start(self.edge.http, request, 200, 20, RATE)
    }

    /// Registers one more instance; its number.
    async fn one_more(&mut self) -> usize {
        let index = self.origins.len();
        self.origins.push(echo::named(&format!("o{index}")).await);
        self.consul.register("orders", &format!("o{index}"), self.origins[index].addr).await;
        index
    }

    /// Registers one more instance, which is used in time.
    async fn sees_one_more(&mut self, after: &str) {
        let (busy, since) = (Busy::start(), Instant::now());
        let index = self.one_more().await;
        let origin = &self.origins[index];
        eventually("it is used", async || (origin.requests() > 0).then_some(())).await;
        assert!(since.elapsed() < busy.allow(RETURN), "{after}: it was used after {:?}", since.elapsed());
    }

    /// Takes an instance out, which is left in time.
    async fn sees_one_less(&mut self, after: &str) {
        let origin = self.origins.pop().expect("an origin");
        let (busy, since) = (Busy::start(), Instant::now());
        self.consul.deregister(&format!("o{}", self.origins.len())).await;
        let mut last = (origin.requests(), Instant::now());
        eventually("it is used no more", || {
            if origin.requests() != last.0 {
                last = (origin.requests(), Instant::now());
            }
            let quiet = last.1.elapsed() > CHANGE;
            async move { quiet.then_some(()) }
        })
        .await;
        let left = last.1.duration_since(since);
        assert!(left < busy.allow(RETURN), "{after}: it was used for {left:?}");
    }
}

fn nothing_failed(account: &Account, what: &str) {
    println!("{what}: {} requests, the slowest hundredth took {:?}", account.good, account.latency(0.99));
    account.expect_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_used_and_left_within_a_second() {
    if !consul::is_there() {
        return;
    }
    let mut setting = Setting::start().await;
    let load = setting.load();
    let mut changes = Vec::new();
    for _ in 0..3 {
        let busy = Busy::start();
        let registered = Instant::now();
        let index = setting.one_more().await;
        let origin = &setting.origins[index];
        eventually("it is used", async || (origin.requests() > 0).then_some(())).await;
        let deregistered = Instant::now();
        setting.consul.deregister(&format!("o{index}")).await;
        // It has a second to be left, and must not be used in the next.
        tokio::time::sleep(2 * CHANGE).await;
        changes.push((format!("o{index}"), registered, deregistered, busy.allow(CHANGE)));
    }
    let account = load.finish_after(100).await;
    nothing_failed(&account, "changes");
    for (name, registered, deregistered, allowed) in changes {
        let served = account.of(&name);
        let (used, left) = (served.first - registered, served.last.saturating_duration_since(deregistered));
        println!("{name}: used after {used:?}, left after {left:?}");
        assert!(used < allowed && left < allowed, "{name}: used after {used:?}, left after {left:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_fails_when_consul_is_killed_and_when_it_comes_back_empty() {
    if !consul::is_there() {
        return;
    }
    let mut setting = Setting::start().await;
    let load = setting.load();
    setting.consul.kill();
    tokio::time::sleep(Duration::from_secs(2)).await;
    setting.consul.start_again().await;
    setting.sees_one_more("killed").await;
    setting.sees_one_less("killed").await;
    nothing_failed(&load.finish_after(100).await, "killed");

    let load = setting.load();
    setting.consul.kill();
    setting.consul.wipe();
    setting.consul.start_again().await;
    setting.sees_one_more("restarted empty").await;
    // What it does not know again is used still, for it answers.
    let before = setting.origins[0].requests();
    let origin = &setting.origins[0];
    eventually("the others are used", async || (origin.requests() > before + 100).then_some(())).await;
    nothing_failed(&load.finish_after(100).await, "restarted empty");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_fails_when_consul_hangs_is_out_of_reach_or_goes_back() {
    if !consul::is_there() {
        return;
    }
    let mut setting = Setting::start().await;
    let load = setting.load();
    setting.consul.freeze();
    tokio::time::sleep(Duration::from_secs(3)).await;
    setting.consul.thaw();
    setting.sees_one_more("stopped").await;
    nothing_failed(&load.finish_after(100).await, "stopped");

    let load = setting.load();
    setting.wire.behave(Conduct::Silent);
    let asked = setting.wire.asked();
    // So long that it counts as gone, and is searched for.
    eventually_within(Duration::from_secs(20), "it is searched for", async || {
        (setting.wire.asked() > asked + 6).then_some(())
    })
    .await;
    let index = setting.one_more().await;
    setting.wire.behave(Conduct::Well);
    let (busy, back) = (Busy::start(), Instant::now());
    let origin = &setting.origins[index];
    eventually("it is used", async || (origin.requests() > 0).then_some(())).await;
    assert!(back.elapsed() < busy.allow(RETURN), "out of reach: it was used after {:?}", back.elapsed());
    nothing_failed(&load.finish_after(100).await, "out of reach");

    let load = setting.load();
    setting.wire.behave(Conduct::Rewinds);
    setting.sees_one_more("index backwards").await;
    setting.sees_one_less("index backwards").await;
    nothing_failed(&load.finish_after(100).await, "index backwards");
}
