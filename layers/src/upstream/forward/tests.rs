//! Requests through the service to origins on loopback that follow a script.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;

use bytes::Bytes;
use discovery::Discovery;
use http_body::Frame;
use http_body_util::StreamBody;
use rustls::RootCertStore;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::task::{LocalSet, spawn_local};

use super::super::Keepalive;
use super::super::cluster::ClusterEnv;
use super::super::tls_client::TlsClients;
use super::*;
use crate::body::BodyError;
use crate::testing::{ExchangeBuilder, exchange, field, text};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// What an origin does with a request.
#[derive(Clone, Copy)]
enum Act {
    Answer(&'static str),
    /// Answers when this many milliseconds have passed.
    Late(u64, &'static str),
    Close,
    Stall,
}

/// An HTTP/1 origin that counts.
struct Origin {
    addr: SocketAddr,
    connections: Rc<Cell<usize>>,
    open: Rc<Cell<usize>>,
    requests: Rc<RefCell<Vec<String>>>,
}

impl Origin {
    /// `script` is told the number of the connection and of the request on it.
    async fn start(script: impl Fn(usize, usize) -> Act + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = Self {
            addr: listener.local_addr().unwrap(),
            connections: Rc::default(),
            open: Rc::default(),
            requests: Rc::default(),
        };
        let (connections, open, requests) =
            (origin.connections.clone(), origin.open.clone(), origin.requests.clone());
        let script = Rc::new(script);
        spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let connection = connections.replace(connections.get() + 1);
                open.set(open.get() + 1);
                let (open, requests, script) = (open.clone(), requests.clone(), script.clone());
                spawn_local(async move {
                    let mut number = 0;
                    while let Some(request) = read_request(&mut stream).await {
                        requests.borrow_mut().push(request);
                        match script(connection, number) {
                            Act::Answer(answer) => stream.write_all(answer.as_bytes()).await.unwrap(),
                            Act::Late(millis, answer) => {
                                tokio::time::sleep(Duration::from_millis(millis)).await;
                                // Nobody may be waiting any more.
                                let _ = stream.write_all(answer.as_bytes()).await;
                            }
                            Act::Close => break,
                            Act::Stall => std::future::pending().await,
                        }
                        number += 1;
                    }
                    open.set(open.get() - 1);
                });
            }
        });
        origin
    }

    async fn always(act: Act) -> Self {
        Self::start(move |_, _| act).await
    }

    fn requests(&self) -> usize {
        self.requests.borrow().len()
    }
}

/// A request with its body; none at the end of the connection.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                return Some(text.into_owned());
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// An address at which nothing listens, and that nobody else gets.
fn nowhere() -> SocketAddr {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    std::mem::forget(socket);
    address
}

fn local<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, test)
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn env() -> ClusterEnv {
    let control = Handle::current();
    ClusterEnv {
        discovery: Discovery::new(control.clone(), discovery::Settings::default()),
        tls: Arc::new(TlsClients::new(Arc::new(RootCertStore::empty()))),
        checks: true,
        keepalive: Keepalive { size: 320, idle: Some(Duration::from_secs(60)), requests: 1000 },
        session_key: super::super::sticky::own_key(Vec::new),
        drains: crate::upstream::drains::Drains::default(),
        place: Arc::default(),
        mesh: None,
        as_client: None,
        control,
    }
}

/// Round robin over these addresses in this order, with further fields.
fn cluster(nodes: &[SocketAddr], fields: Value) -> Arc<Cluster> {
    let nodes: Vec<Value> =
        nodes.iter().map(|a| json!({"host": a.ip().to_string(), "port": a.port(), "weight": 1})).collect();
    let mut upstream = json!({"type": "roundrobin", "nodes": nodes});
    upstream.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    Cluster::build("upstreams/1", &serde_json::from_value(upstream).unwrap(), None, &env()).unwrap()
}

fn service() -> UpstreamService {
    UpstreamService::new(false, &Arc::default())
}

/// The exchange after the service, and why it failed if it did.
async fn send(
    service: &UpstreamService,
    cluster: &Arc<Cluster>,
    request: ExchangeBuilder,
) -> (Exchange, Option<Reason>) {
    let mut x = request.build();
    x.chosen = Some(cluster.clone());
    match service.clone().call(x).await {
        Ok(x) => (x, None),
        Err(fault) => (fault.exchange, Some(fault.error.reason())),
    }
}

/// What came of a request: its status or the reason of its failure, and the attempts.
async fn outcome(cluster: &Arc<Cluster>, method: &str) -> (Result<u16, Reason>, usize) {
    let request = exchange(method, "http://a.test/").body("order");
    let (x, failed) = send(&service(), cluster, request).await;
    (failed.map_or(Ok(x.response.status().as_u16()), Err), x.attempts.len())
}

#[test]
fn a_request_is_tried_again_only_where_that_is_safe() {
    use Act::*;
    const MALFORMED: &str = "HTTP/1.1 999999 Odd\r\n\r\n";
    local(async {
        let slow = json!({"timeout": {"connect": 1, "send": 1, "read": 0.1}});
        let none = json!({"retries": 0});
        let all = json!({});
        // No act: nothing listens there.
        let cases = [
            (None, "GET", &all, Ok(200), 2, "not established"),
            (None, "POST", &all, Ok(200), 2, "not established: nothing was sent, whatever the method"),
            (None, "POST", &none, Err(Reason::ConnectFailed), 1, "not established, but no retries"),
            (Some(Close), "GET", &all, Ok(200), 2, "idempotent and broken off"),
            (Some(Close), "PUT", &all, Ok(200), 2, "idempotent with a body"),
            (Some(Close), "POST", &all, Err(Reason::UpstreamClosed), 1, "not idempotent and sent"),
            (Some(Close), "PATCH", &all, Err(Reason::UpstreamClosed), 1, "not idempotent and sent"),
            (Some(Close), "GET", &none, Err(Reason::UpstreamClosed), 1, "no retries"),
            (Some(Stall), "GET", &slow, Ok(200), 2, "idempotent and timed out"),
            (Some(Stall), "POST", &slow, Err(Reason::ReadTimeout), 1, "not idempotent and timed out"),
            (Some(Answer(MALFORMED)), "GET", &all, Ok(200), 2, "idempotent and no HTTP"),
            (Some(Answer(MALFORMED)), "POST", &all, Err(Reason::UpstreamProtocol), 1, "no HTTP"),
            (
                Some(Answer("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")),
                "GET",
                &all,
                Ok(503),
                1,
                "an answer",
            ),
        ];
        for (act, method, fields, wanted, attempts, case) in cases {
            let first = match act {
                Some(act) => Origin::always(act).await.addr,
                None => nowhere(),
            };
            let second = Origin::always(Answer(OK)).await;
            let cluster = cluster(&[first, second.addr], fields.clone());
            assert_eq!(outcome(&cluster, method).await, (wanted, attempts), "{method}: {case}");
            let sent = second.requests.borrow().first().cloned();
            assert!(sent.is_none_or(|sent| sent.ends_with("order")), "{method}: the whole body");
        }
    });
}

#[test]
fn the_number_of_tries_is_that_of_the_nodes_or_what_retries_says() {
    local(async {
        for (nodes, retries, attempts) in
            [(3, None, 3), (3, Some(1), 2), (1, None, 1), (1, Some(2), 3), (2, Some(9), 2)]
        {
            let mut addrs = Vec::new();
            for _ in 0..nodes {
                addrs.push(Origin::always(Act::Close).await.addr);
            }
            let fields = retries.map_or(json!({}), |retries: u32| json!({"retries": retries}));
            let got = outcome(&cluster(&addrs, fields), "GET").await;
            assert_eq!(got, (Err(Reason::UpstreamClosed), attempts), "{nodes} nodes, retries {retries:?}");
        }
    });
}

#[test]
fn retry_timeout_ends_the_tries_and_cuts_none_short() {
    local(async {
        let late = Origin::always(Act::Late(150, OK)).await;
        let patient = cluster(&[late.addr], json!({"retry_timeout": 0.05}));
        assert_eq!(outcome(&patient, "GET").await, (Ok(200), 1), "a running try goes on");
        let (stalled, good) = (Origin::always(Act::Stall).await, Origin::always(Act::Answer(OK)).await);
        let fields = json!({"retry_timeout": 0.05, "timeout": {"connect": 1, "send": 1, "read": 0.1}});
        let over = cluster(&[stalled.addr, good.addr], fields);
        assert_eq!(outcome(&over, "GET").await, (Err(Reason::RetryTimeout), 1));
        assert_eq!(good.requests(), 0);
    });
}

#[test]
fn a_budget_ends_a_storm_of_retries() {
    local(async {
        let (one, two) = (Origin::always(Act::Close).await, Origin::always(Act::Close).await);
        let fields = json!({"retry_budget": {"percent": 20, "min_per_second": 3}});
        let cluster = cluster(&[one.addr, two.addr], fields);
        let began = Instant::now();
        let mut attempts = 0;
        for _ in 0..50 {
            attempts += outcome(&cluster, "GET").await.1;
        }
        let seconds = began.elapsed().as_secs() as usize + 1;
        assert!((60..=60 + 3 * seconds).contains(&attempts), "{attempts} attempts of 50 requests");
    });
}

#[test]
fn what_is_tried_again_can_be_chosen() {
    use Act::*;
    const BUSY: &str = "HTTP/1.1 429 No\r\ncontent-length: 0\r\n\r\n";
    const ERROR: &str = "HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno";
    local(async {
        let retry =
            |fields: Value| json!({"retry": fields, "timeout": {"connect": 1, "send": 1, "read": 0.1}});
        let cases = [
            (None, "GET", json!({}), Ok(200), 2, "the block alone changes nothing"),
            (Some(Answer(ERROR)), "GET", json!({}), Ok(500), 1, "nor for statuses"),
            (Some(Answer(ERROR)), "GET", json!({"on": ["http_5xx"]}), Ok(200), 2, "any status from 500"),
            (Some(Answer(BUSY)), "GET", json!({"on": ["http_5xx"]}), Ok(429), 1, "no other"),
            (Some(Answer(BUSY)), "GET", json!({"statuses": [429]}), Ok(200), 2, "a listed one"),
            (Some(Answer(ERROR)), "POST", json!({"on": ["http_5xx"]}), Ok(500), 1, "not idempotent"),
            (
                Some(Answer(ERROR)),
                "POST",
                json!({"on": ["http_5xx"], "non_idempotent": true}),
                Ok(200),
                2,
                "not idempotent, and allowed",
            ),
            (Some(Close), "POST", json!({"non_idempotent": true}), Ok(200), 2, "broken off, and allowed"),
            (
                Some(Close),
                "GET",
                json!({"on": ["connect_failure", "timeout"]}),
                Err(Reason::UpstreamClosed),
                1,
                "no reset",
            ),
            (Some(Stall), "GET", json!({"on": ["reset"]}), Err(Reason::ReadTimeout), 1, "no timeout"),
            (Some(Stall), "GET", json!({"on": ["timeout"]}), Ok(200), 2, "timeout"),
            (None, "GET", json!({"on": ["timeout", "reset"]}), Err(Reason::ConnectFailed), 1, "no connect"),
            (None, "POST", json!({"on": ["connect_failure"]}), Ok(200), 2, "connect"),
            (None, "GET", json!({"on": []}), Err(Reason::ConnectFailed), 1, "nothing at all"),
        ];
        for (act, method, fields, wanted, attempts, case) in cases {
            let good = Origin::always(Act::Answer(OK)).await;
            let bad = match act {
                Some(act) => Origin::always(act).await.addr,
                None => nowhere(),
            };
            let cluster = cluster(&[bad, good.addr], retry(fields.clone()));
            assert_eq!(outcome(&cluster, method).await, (wanted, attempts), "{case} {method} {fields}");
        }
    });
}

#[test]
fn the_last_answer_is_the_clients_when_all_are_bad() {
    const ONE: &str = "HTTP/1.1 503 No\r\ncontent-length: 3\r\n\r\none";
    const TWO: &str = "HTTP/1.1 502 No\r\ncontent-length: 3\r\n\r\ntwo";
    local(async {
        let (one, two) = (Origin::always(Act::Answer(ONE)).await, Origin::always(Act::Answer(TWO)).await);
        let service = service();
        for (fields, wanted, attempts) in [
            (json!({"retry": {"on": ["http_5xx"]}}), (502, "two"), 2),
            (json!({"retry": {"on": ["http_5xx"]}, "retries": 0}), (503, "one"), 1),
            (
                json!({"retry": {"on": ["http_5xx"], "budget": {"percent": 0, "min_per_second": 0}}}),
                (503, "one"),
                1,
            ),
        ] {
            let cluster = cluster(&[one.addr, two.addr], fields.clone());
            let (mut x, failed) = send(&service, &cluster, exchange("GET", "http://a.test/")).await;
            let body = text(&mut x).await;
            assert_eq!(failed, None);
            assert_eq!((x.response.status().as_u16(), body.as_str()), wanted, "{fields}");
            assert_eq!(x.attempts.len(), attempts, "{fields}");
        }
    });
}

#[test]
fn a_breaker_opens_by_node_and_probes_bring_it_back() {
    const ERROR: &str = "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n";
    local(async {
        let broken = Rc::new(Cell::new(true));
        let state = broken.clone();
        let script = move |_, _| Act::Answer(if state.get() { ERROR } else { OK });
        let (bad, good) = (Origin::start(script).await, Origin::always(Act::Answer(OK)).await);
        let fields = json!({"breaker": {"max_failures": 2, "cool_down": 0.2}, "retries": 0});
        let both = cluster(&[bad.addr, good.addr], fields.clone());
        for _ in 0..20 {
            outcome(&both, "GET").await.0.unwrap();
        }
        assert_eq!((bad.requests(), good.requests()), (2, 18), "two failures, and no request more");
        let breakers = || both.endpoints().iter().map(|node| node.breaker.unwrap()).collect::<Vec<_>>();
        assert_eq!(breakers(), ["open", "closed"]);

        broken.set(false);
        until("it has cooled down", || {
            both.state().peers().first().unwrap().state.breaker().unwrap().enter(Instant::now()).is_some()
        })
        .await;
        for _ in 0..4 {
            assert_eq!(outcome(&both, "GET").await.0, Ok(200));
        }
        assert_eq!(breakers(), ["closed", "closed"]);
        assert_eq!(bad.requests(), 4);
    });
}

#[test]
fn when_every_breaker_is_open_requests_are_refused_or_all_nodes_used() {
    local(async {
        for (all_open, wanted) in
            [("refuse", Err(Reason::BreakerOpen)), ("use_all", Err(Reason::UpstreamClosed))]
        {
            let bad = Origin::always(Act::Close).await;
            let breaker = json!({"max_failures": 1, "cool_down": 60, "all_open": all_open});
            let cluster = cluster(&[bad.addr], json!({"breaker": breaker, "retries": 0}));
            assert_eq!(outcome(&cluster, "GET").await, (Err(Reason::UpstreamClosed), 1));
            assert_eq!(outcome(&cluster, "GET").await.0, wanted, "{all_open}");
            let asked = if all_open == "refuse" { 1 } else { 2 };
            assert_eq!(bad.requests(), asked);
        }
    });
}

#[test]
fn a_client_that_goes_away_says_nothing_about_the_node() {
    local(async {
        let slow = Origin::always(Act::Stall).await;
        let cluster = cluster(&[slow.addr], json!({"breaker": {"max_failures": 1}, "retries": 0}));
        let call = outcome(&cluster, "GET");
        assert!(tokio::time::timeout(Duration::from_millis(50), call).await.is_err());
        assert_eq!(cluster.endpoints().first().unwrap().breaker, Some("closed"));
    });
}

#[test]
fn a_session_stays_at_its_node_until_that_is_gone() {
    local(async {
        let (one, two) = (Origin::always(Act::Answer(OK)).await, Origin::always(Act::Answer(OK)).await);
        for algorithm in ["roundrobin", "least_conn", "ewma", "random"] {
            let fields = json!({"sticky": {"cookie": "sid"}, "type": algorithm});
            let cluster = cluster(&[one.addr, two.addr], fields.clone());
            let service = service();
            let (x, _) = send(&service, &cluster, exchange("GET", "http://a.test/")).await;
            let (node, cookie) = (x.balancer.unwrap(), field(&x, "set-cookie").to_owned());
            let cookie = cookie.split(';').next().unwrap().to_owned();
            assert!(!cookie.contains("127") && !cookie.contains(&node.port().to_string()), "{cookie}");
            let again = || exchange("GET", "http://a.test/").header("cookie", &cookie);
            for _ in 0..10 {
                let (x, _) = send(&service, &cluster, again()).await;
                assert_eq!((x.balancer, field(&x, "set-cookie")), (Some(node), ""), "{algorithm}");
            }
            let other = if node == one.addr { two.addr } else { one.addr };
            let nodes = json!([{"host": other.ip().to_string(), "port": other.port(), "weight": 1}]);
            let mut upstream = json!({"nodes": nodes});
            upstream.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            cluster.update(&serde_json::from_value(upstream).unwrap(), None, &env()).unwrap();
            let (x, _) = send(&service, &cluster, again()).await;
            assert_eq!(x.balancer, Some(other), "{algorithm}: the node is gone");
            assert!(field(&x, "set-cookie").starts_with("sid="), "and a new cookie says so");
        }
    });
}

#[test]
fn a_session_whose_node_fails_moves_to_the_one_that_answers() {
    local(async {
        let (bad, good) = (nowhere(), Origin::always(Act::Answer(OK)).await);
        let fields = json!({"sticky": {}});
        let cluster = cluster(&[bad, good.addr], fields);
        let state = cluster.state();
        let first = &state.peers().first().unwrap().state;
        let x = exchange("GET", "http://a.test/").build();
        let cookie = state.cookie(&x, first).unwrap().to_str().unwrap().split(';').next().unwrap().to_owned();
        let request = exchange("GET", "http://a.test/").header("cookie", &cookie);
        let (x, failed) = send(&service(), &cluster, request).await;
        assert_eq!((failed, x.attempts.len(), x.balancer), (None, 2, Some(good.addr)));
        assert!(
            field(&x, "set-cookie").starts_with("postern_node=")
                && !field(&x, "set-cookie").contains(&cookie)
        );
    });
}

#[test]
fn a_reused_connection_that_is_dead_is_replaced_by_a_fresh_one_even_without_retries() {
    local(async {
        // Each connection serves one request and dies of the second.
        let script = |_, request| if request == 0 { Act::Answer(OK) } else { Act::Close };
        let origin = Origin::start(script).await;
        let cluster = cluster(&[origin.addr], json!({"retries": 0}));
        let service = service();
        for connections in 1..5 {
            let (mut x, failed) = send(&service, &cluster, exchange("GET", "http://a.test/")).await;
            assert_eq!((failed, text(&mut x).await.as_str()), (None, "ok"));
            assert_eq!(origin.connections.get(), connections);
            assert_eq!(x.attempts.len(), 1, "the dead connection is no attempt");
        }
        assert_eq!(cluster.endpoints().first().unwrap().failures, 0, "nor a failure of the endpoint");
        let (x, failed) = send(&service, &cluster, exchange("POST", "http://a.test/").body("x")).await;
        assert_eq!(
            (failed, x.attempts.len()),
            (Some(Reason::UpstreamClosed), 1),
            "it may have been carried out"
        );
        let sent = origin.requests.borrow().iter().filter(|request| request.starts_with("POST")).count();
        assert_eq!(sent, 1, "a POST is sent once");
    });
}

#[test]
fn an_origin_that_dies_of_every_request_is_asked_twice_at_most() {
    local(async {
        let first = |connection, request| (connection, request) == (0, 0);
        let script = move |connection, request| {
            if first(connection, request) { Act::Answer(OK) } else { Act::Close }
        };
        let origin = Origin::start(script).await;
        let cluster = cluster(&[origin.addr], json!({"retries": 0}));
        let service = service();
        let (mut x, _) = send(&service, &cluster, exchange("GET", "http://a.test/")).await;
        assert_eq!(text(&mut x).await, "ok");
        let (_, failed) = send(&service, &cluster, exchange("GET", "http://a.test/")).await;
        assert_eq!(failed, Some(Reason::UpstreamClosed));
        assert_eq!(origin.requests(), 3, "the reused connection, then one fresh one");
    });
}

#[test]
fn ill_formed_answers_are_502_and_end_their_connection() {
    const BAD: [&str; 11] = [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\nok",
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        "HTTP/1.1 000 Odd\r\n\r\n",
        "HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        "hello\r\n",
        "HTTP/1.1 200 OK\r\nbad name: 1\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\na: b\0c\r\ncontent-length: 2\r\n\r\nok",
    ];
    local(async {
        for answer in BAD {
            let origin = Origin::always(Act::Answer(answer)).await;
            let cluster = cluster(&[origin.addr], json!({}));
            let (x, failed) = send(&service(), &cluster, exchange("GET", "http://a.test/")).await;
            assert_eq!(failed, Some(Reason::UpstreamProtocol), "{answer:?}");
            assert_eq!(x.attempts.first().unwrap().failed, Some(Reason::UpstreamProtocol), "{answer:?}");
            assert_eq!(cluster.endpoints().first().unwrap().failures, 1, "{answer:?}");
            until("the connection is closed", || origin.open.get() == 0).await;
        }
    });
}

#[test]
fn bytes_behind_an_answer_are_never_taken_for_the_next_one() {
    local(async {
        let answer =
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
        let origin = Origin::always(Act::Answer(answer)).await;
        let cluster = cluster(&[origin.addr], json!({}));
        let service = service();
        for connections in 1..5 {
            let (mut x, failed) = send(&service, &cluster, exchange("GET", "http://a.test/")).await;
            assert_eq!((failed, text(&mut x).await.as_str()), (None, "ok"));
            assert_eq!(origin.connections.get(), connections, "the connection is not used again");
        }
    });
}

#[test]
fn connections_are_kept_within_the_limits_of_the_pool() {
    async fn get(service: &UpstreamService, cluster: &Arc<Cluster>) {
        let (mut x, failed) = send(service, cluster, exchange("GET", "http://a.test/")).await;
        assert_eq!((failed, text(&mut x).await.as_str()), (None, "ok"));
    }
    local(async {
        let pool = |size, idle, requests| json!({"keepalive_pool": {"size": size, "idle_timeout": idle, "requests": requests}});
        let service = service();

        let origin = Origin::always(Act::Answer(OK)).await;
        let two = cluster(&[origin.addr], pool(5, json!(60), 2));
        for connections in [1, 1, 2, 2, 3] {
            get(&service, &two).await;
            assert_eq!(origin.connections.get(), connections, "two requests for each connection");
        }

        let origin = Origin::always(Act::Late(50, OK)).await;
        let one = cluster(&[origin.addr], pool(1, json!(60), 100));
        for connections in [2, 3] {
            tokio::join!(get(&service, &one), get(&service, &one));
            assert_eq!(origin.connections.get(), connections);
            until("only one is kept", || origin.open.get() == 1).await;
        }

        let origin = Origin::always(Act::Answer(OK)).await;
        let brief = cluster(&[origin.addr], pool(5, json!(0.1), 100));
        get(&service, &brief).await;
        assert_eq!(origin.open.get(), 1);
        until("the idle connection is closed", || origin.open.get() == 0).await;
    });
}

#[test]
fn an_answer_that_is_not_read_to_its_end_takes_its_connection_along() {
    local(async {
        let long = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf";
        let origin = Origin::always(Act::Answer(long)).await;
        let cluster = cluster(&[origin.addr], json!({}));
        let (x, failed) = send(&service(), &cluster, exchange("GET", "http://a.test/")).await;
        assert_eq!(failed, None);
        assert_eq!(cluster.endpoints().first().unwrap().active, 1);
        drop(x);
        assert_eq!(cluster.endpoints().first().unwrap().active, 0);
        until("the connection is closed", || origin.open.get() == 0).await;
    });
}

#[test]
fn a_request_goes_on_while_its_early_answer_is_not_read() {
    local(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let got = Rc::new(Cell::new(0));
        let seen = got.clone();
        spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut bytes = vec![0; 4096];
            assert!(stream.read(&mut bytes).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await.unwrap();
            loop {
                seen.set(seen.get() + stream.read(&mut bytes).await.unwrap());
            }
        });
        let (pieces, receiver) = tokio::sync::mpsc::unbounded_channel::<Bytes>();
        let body = futures_util::stream::unfold(receiver, |mut receiver| async move {
            let piece = receiver.recv().await?;
            Some((Ok::<_, BodyError>(Frame::data(piece)), receiver))
        });
        let request = exchange("POST", "http://a.test/").body(Body::boxed(StreamBody::new(body)));
        let (x, failed) = send(&service(), &cluster(&[addr], json!({})), request).await;
        assert_eq!((failed, x.response.status().as_u16()), (None, 200));
        pieces.send(Bytes::from(vec![b'a'; 100_000])).unwrap();
        until("the body has come", || got.get() >= 100_000).await;
    });
}

#[test]
fn the_statuses_of_all_attempts_are_told() {
    const ERROR: &str = "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n";
    const NAME: &str = "x-apisix-upstream-status";
    local(async {
        let (bad, good, none) =
            (Origin::always(Act::Answer(ERROR)).await, Origin::always(Act::Answer(OK)).await, nowhere());
        let get = || exchange("GET", "http://a.test/");
        let (x, _) = send(&service(), &cluster(&[good.addr], json!({})), get()).await;
        assert_eq!(field(&x, NAME), "");
        let (x, _) = send(&service(), &cluster(&[bad.addr], json!({})), get()).await;
        assert_eq!(field(&x, NAME), "500");
        let (x, _) = send(&service(), &cluster(&[none, bad.addr], json!({})), get()).await;
        assert_eq!(field(&x, NAME), "502, 500");
        let (x, _) = send(&service(), &cluster(&[none, good.addr], json!({})), get()).await;
        assert_eq!(field(&x, NAME), "", "the last one is no error");
        let always = UpstreamService::new(true, &Arc::default());
        let (x, _) = send(&always, &cluster(&[none, good.addr], json!({})), get()).await;
        assert_eq!(field(&x, NAME), "502, 200");
        let (x, failed) = send(&service(), &cluster(&[none], json!({})), get()).await;
        assert_eq!(failed, Some(Reason::ConnectFailed));
        let told = x.response_headers.iter().find(|(name, _)| name == NAME).unwrap();
        assert_eq!(told.1, "502", "an answer of the gateway has it too");
    });
}

#[test]
fn live_traffic_takes_an_endpoint_out() {
    const ERROR: &str = "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n";
    local(async {
        for act in [Act::Answer(ERROR), Act::Close, Act::Stall] {
            let (bad, good) = (Origin::always(act).await, Origin::always(Act::Answer(OK)).await);
            let passive = json!({"unhealthy": {"http_failures": 2, "tcp_failures": 2, "timeouts": 2}});
            let fields = json!({"checks": {"passive": passive}, "retries": 0,
                                "timeout": {"connect": 1, "send": 1, "read": 0.05}});
            let cluster = cluster(&[bad.addr, good.addr], fields);
            for _ in 0..4 {
                let _ = outcome(&cluster, "GET").await;
            }
            assert_eq!(bad.requests(), 2);
            let status = |n: usize| cluster.endpoints().get(n).unwrap().status;
            assert_eq!((status(0), status(1)), ("unhealthy", "healthy"));
            // The picker follows in the background.
            let key = PickKey { hash: 0, now: Instant::now() };
            let next = || cluster.state().again(&key, &Tried::default()).unwrap().picked.addr();
            until("only the good one is left", || next() == good.addr && next() == good.addr).await;
            for _ in 0..6 {
                assert_eq!(outcome(&cluster, "GET").await.0, Ok(200));
            }
            assert_eq!(bad.requests(), 2);
        }
    });
}

#[test]
fn a_host_that_is_no_tls_name_is_the_clients_fault() {
    local(async {
        let origin = Origin::always(Act::Answer(OK)).await;
        let fields = json!({"scheme": "https", "checks": {"passive": {"unhealthy": {"tcp_failures": 1}}}});
        let cluster = cluster(&[origin.addr, nowhere()], fields);
        let request = exchange("GET", "http://a.test/").header("host", "a..test");
        let (x, failed) = send(&service(), &cluster, request).await;
        assert_eq!((failed, x.attempts.len()), (Some(Reason::BadHost), 1));
        assert_eq!(cluster.endpoints().first().unwrap().status, "healthy");
    });
}

#[test]
fn a_switch_that_was_asked_for_becomes_a_tunnel_and_others_do_not() {
    local(async {
        let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
        let origin = Origin::always(Act::Answer(answer)).await;
        let cluster = cluster(&[origin.addr], json!({}));
        let request =
            exchange("GET", "http://a.test/").header("connection", "upgrade").header("upgrade", "websocket");
        let (x, failed) = send(&service(), &cluster, request).await;
        assert_eq!((failed, x.response.status().as_u16()), (None, 101));
        assert_eq!((field(&x, "upgrade"), field(&x, "connection")), ("websocket", "upgrade"));
        assert!(origin.requests.borrow().first().unwrap().contains("upgrade: websocket"));
        drop(x);
        until("nobody is there to carry it", || origin.open.get() == 0).await;
    });
}

/// An HTTP/2 origin whose first connection answers one request and breaks when `last` more are there.
async fn breaking_http2(last: usize) -> (SocketAddr, Rc<Cell<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let connections = Rc::<Cell<usize>>::default();
    let count = connections.clone();
    spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let first = count.replace(count.get() + 1) == 0;
            spawn_local(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                let mut waiting = Vec::new();
                let mut answered = 0;
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    if first && answered == 1 {
                        waiting.push(respond);
                        if waiting.len() == last {
                            return;
                        }
                        continue;
                    }
                    answered += 1;
                    respond.send_response(Response::new(()), true).unwrap();
                }
            });
        }
    });
    (addr, connections)
}

#[test]
fn streams_of_an_http2_connection_that_dies_share_one_new_connection() {
    local(async {
        let (addr, connections) = breaking_http2(30).await;
        let cluster = cluster(&[addr], json!({"scheme": "grpc", "retries": 0}));
        let service = service();
        let get = || async {
            let (x, failed) =
                send(&service, &cluster, exchange("GET", "http://a.test/").header("host", "a.test")).await;
            (failed, x.response.status().as_u16(), x.attempts.len())
        };
        assert_eq!(get().await, (None, 200, 1));
        let all = futures_util::future::join_all((0..30).map(|_| get())).await;
        assert!(all.iter().all(|got| *got == (None, 200, 1)), "{all:?}");
        assert_eq!(connections.get(), 2, "thirty streams, one new connection");
    });
}

#[test]
fn requests_that_come_together_share_an_http2_connection_or_its_failure() {
    local(async {
        let (addr, connections) = breaking_http2(1000).await;
        let request = || exchange("GET", "http://a.test/").header("host", "a.test");
        let service = service();
        let one = cluster(&[nowhere()], json!({"scheme": "grpc"}));
        let sends = (0..20).map(|_| send(&service, &one, request()));
        for (_, failed) in futures_util::future::join_all(sends).await {
            assert_eq!(failed, Some(Reason::ConnectFailed));
        }
        let good = cluster(&[addr], json!({"scheme": "grpc"}));
        assert_eq!(send(&service, &good, request()).await.1, None);
        assert_eq!(connections.get(), 1);
        let bad_host = exchange("GET", "http://a.test/").header("host", "a b");
        assert_eq!(send(&service, &good, bad_host).await.1, Some(Reason::BadHost));
    });
}

/// Maps of fields are used again, by whichever request or answer is next.
#[test]
fn no_field_of_a_request_or_an_answer_is_in_another_answer() {
    const COOKIES: &str =
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n\r\nok";
    const CUT: &str = "HTTP/1.1 200 OK\r\nset-cookie: c=3\r\nx y: z\r\n\r\n";
    local(async {
        let origin = Origin::start(|_, number| Act::Answer([COOKIES, OK, CUT][number % 3])).await;
        let cluster = cluster(&[origin.addr], json!({"retries": 0}));
        let service = service();
        for round in 0..9 {
            let request = exchange("GET", "http://a.test/").header("authorization", "secret");
            let (x, failed) = send(&service, &cluster, request).await;
            let mut names: Vec<_> = x.response.headers().iter().map(|(name, _)| name.as_str()).collect();
            names.sort_unstable();
            match round % 3 {
                0 => assert_eq!((names, failed), (vec!["content-length", "set-cookie", "set-cookie"], None)),
                1 => assert_eq!((names, failed), (vec!["content-length"], None)),
                _ => assert_eq!((names, failed), (vec![], Some(Reason::UpstreamProtocol))),
            }
        }
    });
}

#[test]
fn what_every_request_allocates_is_small() {
    let x = exchange("GET", "http://a/").build();
    let state = size_of::<crate::exchange::State>();
    let future = UpstreamService::new(false, &Arc::default()).call(x);
    assert!(state <= 1024, "{state}: above it the allocator is slow");
    let future = size_of_val(&*future);
    assert!(future <= 1408, "{future}: it is moved once for each request");
}
