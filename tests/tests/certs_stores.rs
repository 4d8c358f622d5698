//! The stores of an authority against the real etcd and the real Consul: the same conduct as in memory and on disk.

use std::sync::Arc;
use std::time::Duration;

use certs::ca::store::conduct::conduct;
use certs::ca::store::{Store, StoreError, consul_kv, etcd};
use e2e::{consul, etcd::Etcd};

const TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_conducts_itself_and_says_so_when_it_is_away() {
    let mut real = Etcd::start().await;
    let settings = |endpoint, timeout| etcd::Settings {
        endpoints: vec![endpoint],
        prefix: "/postern/ca/".to_owned(),
        timeout,
        ..etcd::Settings::default()
    };
    let store = Arc::new(etcd::Etcd::new(settings(real.endpoint(), TIMEOUT)).expect("settings"));
    conduct(store.clone()).await;
    real.kill();
    let short = etcd::Etcd::new(settings(real.endpoint(), Duration::from_millis(500))).expect("settings");
    assert!(matches!(short.load("record").await, Err(StoreError::Unavailable { .. })));
    real.start_again().await;
    // The one that lost its connection finds it again.
    e2e::eventually("etcd is used again", || async {
        store.load("record").await.ok().flatten().filter(|stored| stored.value == b"last")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consul_conducts_itself_and_says_so_when_it_is_away() {
    if !consul::is_there() {
        return;
    }
    let mut real = consul::Consul::start().await;
    let settings = consul_kv::Settings {
        server: real.url(),
        prefix: "postern/ca".to_owned(),
        timeout: TIMEOUT,
        ..consul_kv::Settings::default()
    };
    let store = Arc::new(consul_kv::ConsulKv::new(settings).expect("settings"));
    conduct(store.clone()).await;
    real.kill();
    assert!(matches!(store.load("record").await, Err(StoreError::Unavailable { .. })));
}
