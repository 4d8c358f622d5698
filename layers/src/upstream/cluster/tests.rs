//! Clusters that are edited, resolved and judged.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use rustls::RootCertStore;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};

use super::*;
use crate::error::Reason;
use crate::upstream::picker::{PickKey, Tried};

fn env(servers: Vec<SocketAddr>) -> ClusterEnv {
    let control = Handle::current();
    let dns = discovery::dns::Settings {
        servers,
        min_ttl: Duration::from_millis(20),
        search: false,
        ..discovery::dns::Settings::default()
    };
    let names = discovery::Settings { dns, ..discovery::Settings::default() };
    ClusterEnv {
        discovery: Discovery::new(control.clone(), names),
        tls: Arc::new(TlsClients::new(Arc::new(RootCertStore::empty()))),
        checks: true,
        keepalive: Keepalive { size: 320, idle: None, requests: 1000 },
        session_key: super::super::sticky::own_key(Vec::new),
        drains: crate::upstream::drains::Drains::default(),
        place: Arc::default(),
        mesh: None,
        as_client: None,
        control,
    }
}

fn upstream(nodes: Value, fields: Value) -> Upstream {
    let mut upstream = json!({"type": "roundrobin", "nodes": nodes});
    upstream.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    serde_json::from_value(upstream).unwrap()
}

fn build(nodes: Value, fields: Value, env: &ClusterEnv) -> Arc<Cluster> {
    Cluster::build("upstreams/1", &upstream(nodes, fields), None, env).unwrap()
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn addrs(cluster: &Cluster) -> Vec<String> {
    cluster.endpoints().iter().map(|endpoint| endpoint.address.to_string()).collect()
}

/// The addresses that are picked, each once.
fn picked(cluster: &Cluster) -> Vec<String> {
    let (state, mut tried) = (cluster.state(), Tried::default());
    let key = PickKey { hash: 0, now: std::time::Instant::now() };
    let mut addrs = Vec::new();
    while let Ok(Choice { picked, .. }) = state.choose(&key, &tried) {
        tried.add(picked.endpoint());
        addrs.push(picked.addr().to_string());
    }
    addrs.sort();
    addrs
}

fn fail(cluster: &Cluster, index: usize) {
    let state = cluster.state();
    cluster.report(&state, &state.peers[index].state, Report::TcpFailure);
}

fn passive() -> Value {
    json!({"checks": {"passive": {"unhealthy": {"tcp_failures": 1}}}})
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

#[tokio::test]
async fn endpoints_that_stay_keep_what_is_known_of_them() {
    let env = env(Vec::new());
    let cluster = build(json!({"10.0.0.1:80": 1, "10.0.0.2:80": 1}), passive(), &env);
    let before: Vec<_> = cluster.state().peers.iter().map(|peer| peer.state.clone()).collect();
    fail(&cluster, 0);
    let nodes = json!({"10.0.0.1:80": 5, "10.0.0.2:80": 1, "10.0.0.3:80": 1});
    cluster.update(&upstream(nodes, passive()), None, &env).unwrap();
    let after = cluster.state();
    assert!(before.iter().all(|old| after.peers.iter().any(|peer| Arc::ptr_eq(&peer.state, old))));
    assert_eq!(addrs(&cluster).len(), 3);
    assert_eq!(picked(&cluster), ["10.0.0.2:80", "10.0.0.3:80"], "the verdict holds over the edit");

    cluster.update(&upstream(json!({"10.0.0.1:80": 1}), json!({})), None, &env).unwrap();
    assert_eq!(cluster.endpoints()[0].status, "healthy", "without checks nothing is held against it");
    assert!(Arc::ptr_eq(&cluster.state().peers[0].state, &before[0]));
}

#[tokio::test]
async fn an_edit_that_cannot_work_changes_nothing() {
    let env = env(Vec::new());
    let cluster = build(json!({"10.0.0.1:80": 1}), json!({}), &env);
    let bad = json!({"checks": {"active": {"http_path": "no path"}}});
    assert!(cluster.update(&upstream(json!({"10.0.0.2:80": 1}), bad), None, &env).is_err());
    assert_eq!(addrs(&cluster), ["10.0.0.1:80"]);
}

#[tokio::test]
async fn a_verdict_reaches_the_picker_and_all_are_used_when_none_is_left() {
    let env = env(Vec::new());
    let cluster = build(json!({"10.0.0.1:80": 1, "10.0.0.2:80": 1}), passive(), &env);
    fail(&cluster, 0);
    until("one is left", || picked(&cluster) == ["10.0.0.2:80"]).await;
    assert!(!cluster.is_degraded());
    fail(&cluster, 1);
    until("all are used", || cluster.is_degraded() && picked(&cluster).len() == 2).await;
}

#[tokio::test]
async fn a_verdict_during_an_edit_is_not_lost() {
    let env = env(Vec::new());
    let cluster = build(json!({"10.0.0.1:80": 1, "10.0.0.2:80": 1}), passive(), &env);
    for round in 0..50_u32 {
        // Before the follower had its turn, an edit replaces it.
        fail(&cluster, 0);
        let nodes = json!({"10.0.0.1:80": round + 2, "10.0.0.2:80": 1});
        cluster.update(&upstream(nodes, passive()), None, &env).unwrap();
        until("one is left", || picked(&cluster) == ["10.0.0.2:80"]).await;
        cluster.state().peers.iter().for_each(|peer| peer.state.health.reset());
        cluster.flipped();
        until("both are back", || picked(&cluster).len() == 2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_nothing_probes_gets_another_chance() {
    let env = env(Vec::new());
    let cluster = build(json!({"10.0.0.1:80": 1, "10.0.0.2:80": 1}), passive(), &env);
    tokio::task::yield_now().await;
    fail(&cluster, 0);
    tokio::time::sleep(PAROLE / 2).await;
    assert_eq!(picked(&cluster).len(), 1);
    tokio::time::sleep(PAROLE).await;
    assert_eq!(picked(&cluster).len(), 2);
    fail(&cluster, 0);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(picked(&cluster).len(), 1, "one more failure is enough");
}

#[tokio::test]
async fn tasks_end_with_what_they_are_for() {
    let env = env(Vec::new());
    let active = json!({"checks": {"active": {"http_path": "/", "healthy": {"interval": 1}}}});
    let literal = build(json!({"10.0.0.1:80": 1}), json!({}), &env);
    assert_eq!(tasks(), 0, "an address without checks needs none");
    let nodes = json!([
        {"host": "127.0.0.1", "port": 9, "weight": 1},
        {"host": "127.0.0.1", "port": 9, "weight": 2},
        {"host": "127.0.0.2", "port": 9, "weight": 1},
    ]);
    let cluster = build(nodes, active.clone(), &env);
    until("a follower and a probe for each address", || tasks() == 3).await;
    cluster.update(&upstream(json!({"127.0.0.2:9": 1}), active.clone()), None, &env).unwrap();
    until("the probe ends with its node", || tasks() == 2).await;
    let other = json!({"checks": {"active": {"http_path": "/other", "concurrency": 1}}});
    cluster.update(&upstream(json!({"127.0.0.2:9": 1}), other), None, &env).unwrap();
    until("the old way of probing ends", || tasks() == 2).await;
    cluster.update(&upstream(json!({"127.0.0.2:9": 1}), json!({})), None, &env).unwrap();
    until("without checks there is none", || tasks() == 0).await;
    cluster.update(&upstream(json!({"127.0.0.2:9": 1}), active), None, &env).unwrap();
    until("and with checks again", || tasks() == 2).await;
    drop(cluster);
    until("the cluster takes them along", || tasks() == 0).await;
    drop(literal);
}

#[tokio::test]
async fn probes_find_a_dead_endpoint_and_one_that_is_back() {
    let env = env(Vec::new());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let alive = listener.local_addr().unwrap();
    // Bound, so that nobody else gets the port, and listening only later.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let dead = socket.local_addr().unwrap();
    let checks = json!({"checks": {"active": {"type": "tcp", "timeout": 1,
        "healthy": {"interval": 1, "successes": 1}, "unhealthy": {"interval": 1, "tcp_failures": 1}}}});
    let nodes = json!({alive.to_string(): 1, dead.to_string(): 1});
    let cluster = build(nodes, checks, &env);
    until("the dead one is out", || picked(&cluster) == [alive.to_string()]).await;
    let _back = socket.listen(16).unwrap();
    until("it is back", || picked(&cluster).len() == 2).await;
    assert_eq!(cluster.check_kind(), Some("tcp"));
}

/// A name server that answers every question of type A with `addrs`, and nothing while there are none.
async fn name_server(addrs: Arc<Mutex<Vec<Ipv4Addr>>>) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let server = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        loop {
            let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { return };
            let addrs = addrs.lock().unwrap().clone();
            let question_end = 12 + buffer[12..length].iter().position(|byte| *byte == 0).unwrap() + 5;
            let is_a = buffer[question_end - 4..question_end - 2] == [0, 1];
            if addrs.is_empty() || !is_a {
                continue;
            }
            let mut answer = buffer[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, u8::try_from(addrs.len()).unwrap(), 0, 0, 0, 0]);
            answer.extend(&buffer[12..question_end]);
            for addr in addrs {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
                answer.extend(addr.octets());
            }
            socket.send_to(&answer, peer).await.unwrap();
        }
    });
    server
}

#[tokio::test]
async fn a_name_is_followed_and_an_edit_keeps_its_addresses() {
    let answers = Arc::new(Mutex::new(vec![Ipv4Addr::new(10, 0, 0, 1)]));
    let env = env(vec![name_server(answers.clone()).await]);
    let cluster = build(json!({"a.test:80": 1}), passive(), &env);
    assert_eq!(cluster.state().nothing(), Reason::DnsFailed);
    cluster.resolved().await;
    until("the first answer", || addrs(&cluster) == ["10.0.0.1:80"]).await;
    let first = cluster.state().peers[0].state.clone();

    *answers.lock().unwrap() = vec![Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
    until("the second address", || addrs(&cluster) == ["10.0.0.1:80", "10.0.0.2:80"]).await;
    assert!(Arc::ptr_eq(&cluster.state().peers[0].state, &first), "the first one is the same still");

    cluster.update(&upstream(json!({"a.test:80": 7}), passive()), None, &env).unwrap();
    assert_eq!(addrs(&cluster).len(), 2, "there is no moment without addresses");
    cluster.update(&upstream(json!({"a.test:80": 7, "10.9.9.9:80": 1}), passive()), None, &env).unwrap();
    assert!(addrs(&cluster).contains(&"10.9.9.9:80".to_owned()));
    *answers.lock().unwrap() = vec![Ipv4Addr::new(10, 0, 0, 3)];
    until("it is followed after the edit too", || addrs(&cluster).contains(&"10.0.0.3:80".to_owned())).await;
}

#[tokio::test]
async fn the_former_nodes_serve_until_a_new_name_has_answered() {
    let answers = Arc::new(Mutex::new(Vec::new()));
    let env = env(vec![name_server(answers.clone()).await]);
    let cluster = build(json!({"10.0.0.1:80": 1}), json!({}), &env);
    cluster.update(&upstream(json!({"a.test:80": 1}), json!({})), None, &env).unwrap();
    assert_eq!(addrs(&cluster), ["10.0.0.1:80"]);
    *answers.lock().unwrap() = vec![Ipv4Addr::new(10, 0, 0, 2)];
    until("the new ones", || addrs(&cluster) == ["10.0.0.2:80"]).await;
    assert_eq!(cluster.endpoints()[0].address.ip(), IpAddr::from([10, 0, 0, 2]));
}

fn warmth(cluster: &Cluster) -> Vec<u8> {
    cluster.state().peers.iter().map(|peer| peer.warmth).collect()
}

#[tokio::test]
async fn an_endpoint_that_is_new_or_healthy_again_starts_with_a_small_share() {
    let env = env(Vec::new());
    let fields = json!({"slow_start": 0.5, "checks": {"passive": {"unhealthy": {"tcp_failures": 1}}}});
    let cluster = build(json!({"10.0.0.1:80": 1, "10.0.0.2:80": 1}), fields.clone(), &env);
    assert_eq!(warmth(&cluster), [100, 100], "the first ones have nobody to take their part");
    let nodes = json!({"10.0.0.1:80": 1, "10.0.0.2:80": 1, "10.0.0.3:80": 1});
    cluster.update(&upstream(nodes, fields), None, &env).unwrap();
    let cold = warmth(&cluster);
    assert_eq!(cold[..2], [100, 100]);
    assert!(cold[2] < 50, "{cold:?}");
    until("its share has grown", || warmth(&cluster) == [100, 100, 100]).await;

    fail(&cluster, 1);
    until("one is left out", || picked(&cluster).len() == 2).await;
    cluster.state().peers[1].state.health.reset();
    cluster.flipped();
    until("it is back", || picked(&cluster).len() == 3).await;
    assert!(warmth(&cluster)[1] < 100, "{:?}", warmth(&cluster));
    until("its share has grown again", || warmth(&cluster) == [100, 100, 100]).await;
}

#[tokio::test]
async fn a_node_that_is_drained_is_not_chosen_and_not_forgotten() {
    let env = env(Vec::new());
    let nodes = json!({"10.0.0.1:80": 1, "10.0.0.2:80": 1});
    let cluster = build(nodes.clone(), json!({}), &env);
    let first = cluster.state().peers[0].state.clone();
    let mark = Mark { id: "d".into(), service: "1".into(), node: Some("10.0.0.1:80".parse().unwrap()) };
    env.drains.set(vec![mark.clone()]);
    assert_eq!(picked(&cluster).len(), 2, "marks are looked at when the endpoints are published");
    cluster.refresh(&env.control);
    assert_eq!(picked(&cluster), ["10.0.0.2:80"]);
    let under_way = cluster.covered(&mark);
    assert!(under_way.len() == 1 && Arc::ptr_eq(&under_way[0], &first));
    assert_eq!(cluster.endpoints().iter().filter(|endpoint| endpoint.draining).count(), 1);
    assert_eq!(cluster.state().retries(), 0, "there is no other node to try");

    cluster.update(&upstream(nodes.clone(), json!({"retries": 1})), None, &env).unwrap();
    assert_eq!(picked(&cluster), ["10.0.0.2:80"], "an edit does not bring it back");
    let later = build(nodes, json!({}), &env);
    assert_eq!(picked(&later), ["10.0.0.2:80"], "an upstream that comes later goes by the mark");

    env.drains.set(vec![Mark { node: None, ..mark }]);
    cluster.refresh(&env.control);
    assert_eq!((picked(&cluster), cluster.state().nothing()), (Vec::new(), Reason::NoNodes));
    env.drains.set(Vec::new());
    cluster.refresh(&env.control);
    assert_eq!(picked(&cluster).len(), 2);
    assert!(
        cluster.state().peers.iter().any(|peer| Arc::ptr_eq(&peer.state, &first)),
        "it is the same still"
    );
}

#[tokio::test]
async fn a_mark_holds_while_the_names_of_an_edit_are_asked_for() {
    // Nobody answers there.
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let env = env(vec![silent.local_addr().unwrap()]);
    let cluster = build(json!({"10.0.0.1:80": 1, "10.0.0.2:80": 1}), json!({}), &env);
    cluster.update(&upstream(json!({"name.test:80": 1}), json!({})), None, &env).unwrap();
    assert_eq!(picked(&cluster), ["10.0.0.1:80", "10.0.0.2:80"], "the former ones serve");
    let mark = crate::upstream::drains::Mark {
        id: "1".into(),
        service: "1".into(),
        node: Some("10.0.0.1:80".parse().unwrap()),
    };
    env.drains.set(vec![mark.clone()]);
    cluster.refresh(&env.control);
    assert_eq!(picked(&cluster), ["10.0.0.2:80"]);
    assert_eq!(cluster.covered(&mark).len(), 1, "it is known still");
    assert!(!cluster.is_sure(true), "nothing has left as long as names are asked for");
}
