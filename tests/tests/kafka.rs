//! `kafka-logger` against brokers: one that is not ours, and one of ours that asks for users.

use e2e::kafka::Kafka;
use e2e::origin::{echo, kafka};
use e2e::sink::Arrived;
use e2e::{Edge, Value, eventually, json};

fn route(uri: &str, settings: Value, upstream: &Value) -> Value {
    let mut settings = settings;
    settings["log_format"] = json!({"uri": "$uri", "number": "$arg_n"});
    json!({"uri": uri, "plugins": {"kafka-logger": settings}, "upstream": upstream})
}

#[tokio::test]
async fn entries_arrive_at_a_broker_that_is_not_ours() {
    let origin = echo::start().await;
    let broker = Kafka::start().await;
    let mut keyed = broker.settings();
    keyed["key"] = "k".into();
    keyed["batch_max_size"] = 1.into();
    let mut batches = broker.settings();
    batches["batch_max_size"] = 5.into();
    let edge = Edge::file()
        .route(route("/keyed", keyed, &origin.upstream()))
        .route(route("/batches", batches, &origin.upstream()))
        .start()
        .await;
    for number in 0..10 {
        for path in ["/keyed", "/batches"] {
            edge.get(&format!("{path}?n={number}")).await.expect_status(200);
        }
    }
    let entries = |line: &String| serde_json::from_str::<Vec<Value>>(line.trim_start()).unwrap();
    // On a slow machine a batch may be sent by its age before it is full.
    let (keyed, batches) = eventually("every entry is read", || async {
        let messages = broker.messages();
        let (keyed, batches): (Vec<_>, Vec<_>) =
            messages.into_iter().partition(|line| line.starts_with("k "));
        let batched = batches.iter().flat_map(entries).count();
        (keyed.len() == 10 && batched == 10).then_some((keyed, batches))
    })
    .await;
    let numbers = |texts: Vec<Value>| {
        let mut numbers: Vec<_> =
            texts.iter().map(|entry| entry["number"].as_str().unwrap().to_owned()).collect();
        numbers.sort();
        numbers
    };
    let all: Vec<_> = (0..10).map(|number| number.to_string()).collect();
    let keyed = keyed.iter().map(|line| serde_json::from_str(&line[2..]).unwrap()).collect();
    assert_eq!(numbers(keyed), all);
    assert_eq!(numbers(batches.iter().flat_map(entries).collect()), all);
}

#[tokio::test]
async fn users_sign_in_by_each_mechanism_and_only_with_their_password() {
    let origin = echo::start().await;
    let arrived = Arrived::default();
    let broker = kafka::start(arrived.clone(), true).await;
    let (user, password) = kafka::USER;
    let mut edge = Edge::file();
    let mechanisms = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];
    for mechanism in mechanisms {
        for (way, password, timeout) in [("right", password, 50), ("wrong", "guessed", 3)] {
            let sasl = json!({"mechanism": mechanism, "user": user, "password": password});
            let settings = json!({
                "brokers": [{"host": "127.0.0.1", "port": broker.addr.port(), "sasl_config": sasl}],
                "kafka_topic": "logs",
                "batch_max_size": 1,
                "timeout": timeout,
                "name": format!("{way} {mechanism}"),
            });
            edge = edge.route(route(&format!("/{way}/{mechanism}"), settings, &origin.upstream()));
        }
    }
    let edge = edge.start().await;
    for mechanism in mechanisms {
        for way in ["wrong", "right"] {
            edge.get(&format!("/{way}/{mechanism}")).await.expect_status(200);
        }
    }
    eventually("who knows the password is let in, and of the others it is told", || async {
        let (arrived, told) = (arrived.text(), edge.output());
        let done = |mechanism: &&str| {
            arrived.contains(&format!("/right/{mechanism}\""))
                && told.lines().any(|line| line.contains(&format!("wrong {mechanism}")))
        };
        mechanisms.iter().all(done).then_some(())
    })
    .await;
    assert!(!arrived.text().contains("/wrong/"), "{}", arrived.text());
    assert!(!edge.output().contains("guessed"), "a password stands in the log");
}
