//! Limits over real sockets: counts that gateways share in a real Redis, alone, as a cluster and watched by
//! sentinels, and what becomes of requests when Redis is stopped, killed, or never answers.

use std::time::{Duration, Instant};

use e2e::certs::Authority;
use e2e::client::{Call, connect};
use e2e::origin::{Origin, echo, slow_body, stall, websocket};
use e2e::redis::{Cluster, Redis, Watched};
use e2e::{Edge, Value, eventually, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

/// The time-out of Redis in these tests, and what an answer may take besides on a busy machine.
const TIMEOUT: Duration = Duration::from_millis(400);
/// Less than what eight who wait one after the other take together.
const SLACK: Duration = Duration::from_millis(2500);

/// `settings` and where counts are kept.
fn joined(settings: Value, policy: &Value) -> Value {
    let mut settings = settings;
    settings.as_object_mut().unwrap().extend(policy.as_object().unwrap().clone());
    let timeout = if policy["policy"] == "redis-sentinel" { "redis_read_timeout" } else { "redis_timeout" };
    settings[timeout] = 400.into();
    settings
}

fn route(uri: &str, plugin: &str, settings: Value, origin: &Origin) -> Value {
    json!({"id": uri.trim_matches('/'), "uri": uri, "plugins": {plugin: settings}, "upstream": origin.upstream()})
}

/// Statuses of `count` requests, one after the other.
async fn statuses(edge: &Edge, path: &str, count: usize) -> Vec<u16> {
    let mut connection = edge.connect().await;
    let mut statuses = Vec::new();
    for _ in 0..count {
        statuses.push(connection.send(Call::get(path)).await.status);
    }
    statuses
}

/// How many of `count` requests by each of eight connections, half to each gateway, pass.
async fn passed(edges: [&Edge; 2], path: &'static str, count: usize) -> usize {
    let mut running = JoinSet::new();
    for client in 0..8 {
        let mut connection = edges[client % 2].connect().await;
        running.spawn(async move {
            let mut passed = 0;
            for _ in 0..count {
                passed += usize::from(connection.send(Call::get(path)).await.status == 200);
            }
            passed
        });
    }
    running.join_all().await.into_iter().sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_share_counts_in_redis() {
    let origin = echo::start().await;
    let redis = Redis::with(&["--requirepass", "secret"], &["-a", "secret"]).await;
    let mut policy = redis.policy();
    policy["redis_password"] = "secret".into();
    policy["redis_database"] = 3.into();
    let count = |more: Value| {
        let mut settings = joined(json!({"count": 50, "time_window": 3600, "rejected_code": 429}), &policy);
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        settings
    };
    let start = || {
        Edge::file()
            .config(json!({"nginx_config": {"worker_processes": 2}}))
            .route(route("/fixed", "limit-count", count(json!({})), &origin))
            .route(route("/sliding", "limit-count", count(json!({"window_type": "sliding"})), &origin))
            .route(route("/req", "limit-req", joined(
                json!({"rate": 0.001, "burst": 9, "nodelay": true, "key": "remote_addr", "rejected_code": 429}), &policy), &origin))
            .route(route("/wrong", "limit-count", count(json!({"redis_password": "wrong"})), &origin))
            .start()
    };
    let (one, two) = tokio::join!(start(), start());
    assert_eq!(passed([&one, &two], "/fixed", 20).await, 50, "exactly as many as allowed");
    assert_eq!(passed([&one, &two], "/sliding", 20).await, 50);
    assert_eq!(passed([&one, &two], "/req", 5).await, 10, "one and the burst");

    let refused = two.get("/fixed").await.expect_status(429);
    assert_eq!(
        (refused.header("x-ratelimit-limit"), refused.header("x-ratelimit-remaining")),
        (Some("50"), Some("0"))
    );
    let reset: f64 = refused.header("x-ratelimit-reset").unwrap().parse().unwrap();
    assert!((1.0..=3600.0).contains(&reset), "{reset}");

    // Nothing stays in Redis for ever.
    let keys = redis.ask(&["-n", "3", "KEYS", "postern:*"]);
    assert_eq!(keys.lines().count(), 3, "{keys}");
    for key in keys.lines() {
        let ttl: i64 = redis.ask(&["-n", "3", "TTL", key]).parse().unwrap();
        assert!(ttl > 0, "{key}: {ttl}");
    }

    let wrong = one.get("/wrong").await.expect_status(500);
    assert_eq!(wrong.text(), "{\"error_msg\":\"failed to limit count\"}\n");
    assert!(!one.output().contains("secret"), "a password is in the log");
}

/// Every plugin with and without `allow_degradation`, at a policy.
fn degrading(origin: &Origin, policy: &Value) -> Value {
    let settings = |plugin: &str| match plugin {
        "limit-count" => json!({"count": 1000, "time_window": 3600}),
        "limit-req" => json!({"rate": 1000, "burst": 0, "key": "remote_addr"}),
        _ => json!({"conn": 1000, "burst": 0, "default_conn_delay": 0.1, "key": "remote_addr"}),
    };
    let mut routes = vec![json!({"id": "plain", "uri": "/plain", "upstream": origin.upstream()})];
    for plugin in ["limit-count", "limit-req", "limit-conn"] {
        for (uri, allowed) in [("closed", false), ("open", true)] {
            let mut settings = joined(settings(plugin), policy);
            settings["allow_degradation"] = allowed.into();
            let mut route = route(&format!("/{uri}-{plugin}"), plugin, settings, origin);
            route["uri"] = format!("/{uri}/{plugin}").into();
            routes.push(route);
        }
    }
    json!({"routes": routes})
}

/// While Redis does not work: the rule of `allow_degradation` holds, within the time-out, and nobody else waits.
async fn degrades(edge: &Edge, how: &str) {
    for plugin in ["limit-count", "limit-req", "limit-conn"] {
        for (uri, status) in [("closed", 500), ("open", 200)] {
            let start = Instant::now();
            let answer = edge.get(&format!("/{uri}/{plugin}")).await;
            let took = start.elapsed();
            assert_eq!(answer.status, status, "{how}: {uri} {plugin}");
            assert!(took < TIMEOUT + SLACK, "{how}: {uri} {plugin} took {took:?}");
        }
    }
    // Eight requests wait at once, on the one worker that also serves this one.
    let mut waiting = JoinSet::new();
    for _ in 0..8 {
        waiting.spawn(Call::get("/open/limit-count").send_to(edge.http));
    }
    let start = Instant::now();
    edge.get("/plain").await.expect_status(200);
    assert!(start.elapsed() < SLACK, "{how}: a request without a limit took {:?}", start.elapsed());
    assert!(waiting.join_all().await.iter().all(|answer| answer.status == 200), "{how}");
}

async fn works(edge: &Edge) {
    for plugin in ["limit-count", "limit-req", "limit-conn"] {
        edge.until_status(&format!("/closed/{plugin}"), 200).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_is_stopped_or_killed_degrades_within_the_time_out_and_is_found_again() {
    let origin = echo::start().await;
    let mut redis = Redis::start().await;
    let edge = Edge::file().resources(degrading(&origin, &redis.policy())).start().await;
    works(&edge).await;
    redis.pause();
    degrades(&edge, "stopped").await;
    redis.resume();
    works(&edge).await;
    redis.kill();
    degrades(&edge, "killed").await;
    redis.start_again().await;
    works(&edge).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_never_answers_or_talks_garbage_degrades_within_the_time_out() {
    let origin = echo::start().await;
    let silent = stall::start().await;
    let garbage = Origin::tcp(|mut stream, _| async move {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    })
    .await;
    let at = |host: &str, port: u16| json!({"policy": "redis", "redis_host": host, "redis_port": port});
    let cases = [
        ("silent", at("127.0.0.1", silent.addr.port())),
        ("garbage", at("127.0.0.1", garbage.addr.port())),
        // No route leads to a network for documentation: no answer at all, or at once an error.
        ("a black hole", at("192.0.2.1", 6379)),
        ("no such name", at("redis.invalid", 6379)),
        (
            "a silent cluster",
            json!({"policy": "redis-cluster", "redis_cluster_name": "c", "redis_cluster_nodes": [silent.addr.to_string()]}),
        ),
    ];
    for (how, policy) in cases {
        let edge = Edge::file().resources(degrading(&origin, &policy)).start().await;
        degrades(&edge, how).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_share_counts_of_a_master_that_sentinels_replace() {
    let origin = echo::start().await;
    let mut watched = Watched::start().await;
    let policy = watched.policy();
    let count = json!({"count": 30, "time_window": 3600, "rejected_code": 429});
    let routes = |name: &str| {
        let mut unknown = policy.clone();
        unknown["redis_master_name"] = "nobody".into();
        let mut routes = degrading(&origin, &policy);
        let list = routes["routes"].as_array_mut().unwrap();
        list.push(route(&format!("/{name}"), "limit-count", joined(count.clone(), &policy), &origin));
        list.push(route("/unknown", "limit-count", joined(count.clone(), &unknown), &origin));
        routes
    };
    let edges = [
        Edge::file().resources(routes("shared")).start().await,
        Edge::file().resources(routes("shared")).start().await,
    ];
    for edge in &edges {
        works(edge).await;
    }
    assert_eq!(passed([&edges[0], &edges[1]], "/shared", 10).await, 30);
    edges[0].get("/unknown").await.expect_status(500);
    watched.servers[0].kill();
    let start = Instant::now();
    degrades(&edges[0], "without a master").await;
    // The sentinels agree within seconds, and nobody has to tell the gateways.
    for edge in &edges {
        works(edge).await;
    }
    assert_eq!(watched.servers[1].ask(&["ROLE"]).lines().next(), Some("master"), "{:?}", start.elapsed());
    let told = edges[0].output();
    assert!(Watched::PASSWORDS.iter().all(|password| !told.contains(password)), "a password is in the log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_share_counts_in_a_cluster_that_may_lose_a_node() {
    let origin = echo::start().await;
    let mut cluster = Cluster::start().await;
    let count = json!({"count": 30, "time_window": 3600, "rejected_code": 429, "key": "http_x_key"});
    let policy = cluster.policy();
    let start = || {
        Edge::file()
            .route(route("/c", "limit-count", joined(count.clone(), &policy), &origin))
            .route(route(
                "/conn",
                "limit-conn",
                joined(json!({"conn": 1, "burst": 0, "default_conn_delay": 1, "key": "http_x_key"}), &policy),
                &origin,
            ))
            .start()
    };
    let (one, two) = tokio::join!(start(), start());
    let ask = |edge: &Edge, key: usize| Call::get("/c").header("x-key", &key.to_string()).send_to(edge.http);
    let mut keys = [0; 24];
    for _ in 0..3 {
        for (key, seen) in keys.iter_mut().enumerate() {
            for edge in [&one, &two] {
                let answer = ask(edge, key).await.expect_status(200);
                *seen += 1;
                let left = (30 - *seen).to_string();
                assert_eq!(answer.header("x-ratelimit-remaining"), Some(&*left), "key {key}");
            }
        }
    }
    let counts: Vec<usize> = cluster
        .nodes
        .iter()
        .map(|node| node.ask(&["KEYS", "postern:limit-count:*"]).lines().count())
        .collect();
    assert_eq!(counts.iter().sum::<usize>(), 24, "{counts:?}");
    assert!(counts.iter().all(|count| *count > 0), "keys are spread: {counts:?}");
    one.send(Call::get("/conn").header("x-key", "a")).await.expect_status(200);

    // The keys of the two other nodes are still counted, those of the dead one follow `allow_degradation`.
    for how in ["stopped", "killed"] {
        if how == "stopped" {
            cluster.nodes[0].pause();
        } else {
            cluster.nodes[0].resume();
            cluster.nodes[0].kill();
        }
        let lost = counts[0];
        eventually(&format!("a node is {how}: the others serve"), || async {
            let mut answers = [0, 0];
            for key in 0..24 {
                let start = Instant::now();
                let status = ask(&two, key).await.status;
                assert!(start.elapsed() < TIMEOUT + SLACK, "{how}: {:?}", start.elapsed());
                match status {
                    200 | 429 => answers[0] += 1,
                    500 => answers[1] += 1,
                    other => panic!("{how}: {other}"),
                }
            }
            (answers == [24 - lost, lost]).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_to_redis_verifies_the_certificate_where_it_is_told_to() {
    let origin = echo::start().await;
    let authority = Authority::new("redis");
    let leaf = authority.server(&["localhost", "127.0.0.1"]);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (cert, key, ca) =
        (file("cert.pem", &leaf.cert), file("key.pem", &leaf.key), file("ca.pem", &authority.pem()));
    let tls_port = e2e::ports::Port::free();
    let number = tls_port.number().to_string();
    let options = [
        "--tls-port",
        &number,
        "--tls-cert-file",
        &cert,
        "--tls-key-file",
        &key,
        "--tls-ca-cert-file",
        &ca,
        "--tls-auth-clients",
        "no",
    ];
    let _redis = Redis::with(&options, &[]).await;
    let at = |verify: bool| {
        json!({"policy": "redis", "redis_host": "localhost", "redis_port": tls_port.number(),
            "redis_ssl": true, "redis_ssl_verify": verify})
    };
    let limit = |verify| {
        let mut settings = joined(json!({"count": 9, "time_window": 60}), &at(verify));
        settings["redis_timeout"] = 5000.into();
        settings
    };
    let edge = || {
        Edge::file().route(route("/any", "limit-count", limit(false), &origin)).route(route(
            "/verified",
            "limit-count",
            limit(true),
            &origin,
        ))
    };
    let untrusting = edge().start().await;
    untrusting.until_status("/any", 200).await;
    untrusting.get("/verified").await.expect_status(500);
    let trusting = edge().env("SSL_CERT_FILE", &ca).start().await;
    trusting.until_status("/verified", 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delayed_counts_reach_redis_and_the_other_gateway() {
    let origin = echo::start().await;
    let redis = Redis::start().await;
    let limit = joined(
        json!({"count": 20, "time_window": 3600, "rejected_code": 429, "sync_interval": 0.1}),
        &redis.policy(),
    );
    let start = || Edge::file().route(route("/d", "limit-count", limit.clone(), &origin)).start();
    let (one, two) = tokio::join!(start(), start());
    assert_eq!(statuses(&one, "/d", 8).await, [200; 8]);
    assert_eq!(two.get("/d").await.expect_status(200).header("x-ratelimit-limit"), Some("20"));
    let count = || {
        let key = redis.ask(&["KEYS", "postern:limit-count:*"]);
        redis.ask(&["GET", &key])
    };
    eventually("all nine are told", || async { (count() == "9").then_some(()) }).await;
    // The other one hears of them with its next words.
    eventually("the two agree on the limit", || async {
        (one.get("/d").await.status == 429 && two.get("/d").await.status == 429).then_some(())
    })
    .await;
    let told: u64 = count().parse().unwrap();
    assert!((20..=40).contains(&told), "{told}: between the limit and what two may let through at once");
    // What it was told last holds while Redis is away.
    redis.pause();
    assert_eq!(one.get("/d").await.status, 429);
    redis.resume();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_is_given_back_when_the_client_goes_away_and_when_a_tunnel_ends() {
    // An answer without an end: the client goes away in the midst of it.
    let slow = slow_body::start(1_000_000, 100, Duration::from_millis(5)).await;
    let (echo, socket) = (echo::start().await, websocket::start().await);
    let redis = Redis::start().await;
    let limit = json!({"conn": 1, "burst": 0, "default_conn_delay": 0.1, "rejected_code": 429, "key_type": "var_combination",
        "key": "$http_x_key"});
    // Two routes with one limit: what the slow origin holds, the echo asks for.
    let resources = |limit: &Value| {
        let mut upgrade = route("/ws", "limit-conn", limit.clone(), &socket);
        upgrade["enable_websocket"] = true.into();
        json!({"routes": [
            {"id": "r", "uri": "/*", "service_id": "s", "priority": 1, "vars": [["arg_slow", "==", "1"]], "upstream": slow.upstream()},
            {"id": "e", "uri": "/*", "service_id": "s", "upstream": echo.upstream()},
            upgrade,
        ], "services": [{"id": "s", "plugins": {"limit-conn": limit}}]})
    };
    for policy in [json!({}), redis.policy()] {
        let edge = Edge::file().resources(resources(&joined(limit.clone(), &policy))).start().await;
        let mut leaving = connect(edge.http).await;
        leaving.write_all(b"GET /a?slow=1 HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        // It has the place as soon as its answer begins; before that, another one may have it.
        let mut begun = [0; 12];
        leaving.read_exact(&mut begun).await.unwrap();
        assert_eq!(&begun, b"HTTP/1.1 200");
        edge.get("/b").await.expect_status(429);
        edge.send(Call::get("/b").header("x-key", "other")).await.expect_status(200);
        drop(leaving);
        edge.until_status("/b", 200).await;

        let (tunnel, _) = tokio_tungstenite::connect_async(format!("ws://{}/ws", edge.http)).await.unwrap();
        edge.get("/ws").await.expect_status(429);
        drop(tunnel);
        eventually("the tunnel's place is free", || async {
            (edge.get("/ws").await.status != 429).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_circuit_stays_over_a_reload_and_is_told_until_the_upstream_works_again() {
    let free = e2e::ports::Port::free();
    let settings = json!({"break_response_code": 599, "unhealthy": {"http_statuses": [502], "failures": 2},
        "healthy": {"http_statuses": [200], "successes": 1}});
    let upstream = json!({"type": "roundrobin", "retries": 0, "nodes": {free.addr().to_string(): 1}});
    let resources = |desc: &str| {
        json!({"routes": [{"id": "shop", "desc": desc, "uri": "/shop", "plugins": {"api-breaker": settings}, "upstream": upstream}],
            "global_rules": [{"id": "1", "plugins": {"prometheus": {}}}]})
    };
    let edge = Edge::file()
        .config(json!({"nginx_config": {"worker_processes": 2}}))
        .resources(resources("one"))
        .start()
        .await;
    assert_eq!(statuses(&edge, "/shop", 3).await, [502, 502, 599]);
    let circuit = || async { edge.call_control("/v1/breakers").await.json()[0].clone() };
    assert_eq!(
        circuit().await,
        json!({"route": "shop", "host": "127.0.0.1", "state": "open", "failures": 2, "opened": 1})
    );
    let page = Call::get("/apisix/prometheus/metrics").send_to(edge.metrics).await.text();
    assert!(page.contains("postern_breaker_hosts{route=\"shop\",state=\"open\"} 1\n"), "{page}");
    edge.reload(&resources("two")).await;
    let opened = Instant::now();
    assert!(
        edge.get("/shop").await.status == 599 || opened.elapsed() > Duration::from_secs(2),
        "a change of the configuration has closed the circuit"
    );
    let _origin = echo::named_at(free.addr(), "shop").await;
    edge.until_status("/shop", 200).await;
    assert_eq!(circuit().await["state"], "closed");
}
