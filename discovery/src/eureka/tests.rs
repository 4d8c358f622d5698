#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::json;

use super::*;

#[test]
fn an_instance_is_read_as_it_is_written() {
    let port = |number: Value, enabled: Value| json!({"$": number, "@enabled": enabled});
    let none = || port(json!(443), json!("false"));
    for (port, secure, status, overridden, metadata, expected) in [
        (
            port(json!(80), json!("true")),
            none(),
            "UP",
            "UNKNOWN",
            json!({}),
            Some((80, 100, Health::Healthy)),
        ),
        (
            port(json!("80"), json!(true)),
            none(),
            "UP",
            "UNKNOWN",
            json!({}),
            Some((80, 100, Health::Healthy)),
        ),
        (
            port(json!(80), json!("true")),
            port(json!(8443), json!("true")),
            "UP",
            "UNKNOWN",
            json!({"weight": "7"}),
            Some((8443, 7, Health::Healthy)),
        ),
        (
            port(json!(80), json!("true")),
            none(),
            "UP",
            "OUT_OF_SERVICE",
            json!({"weight": 9}),
            Some((80, 9, Health::Draining)),
        ),
        (
            port(json!(80), json!("true")),
            none(),
            "DOWN",
            "UNKNOWN",
            json!({"@class": "x"}),
            Some((80, 100, Health::Unhealthy)),
        ),
        (
            port(json!(80), json!("true")),
            none(),
            "STARTING",
            "UP",
            json!({}),
            Some((80, 100, Health::Healthy)),
        ),
        (none(), none(), "UP", "UNKNOWN", json!({}), None),
        (port(json!(70000), json!("true")), none(), "UP", "UNKNOWN", json!({}), None),
    ] {
        let written = json!({
            "instanceId": "i", "ipAddr": "10.0.0.1", "status": status, "overriddenstatus": overridden,
            "port": port, "securePort": secure, "metadata": metadata, "hostName": "h", "leaseInfo": {},
        });
        let found = instance(serde_json::from_value(written.clone()).unwrap(), 100);
        let found = found.map(|it| (it.node.port, it.node.weight, it.health));
        assert_eq!(found, expected, "{written}");
    }
}

#[test]
fn a_list_of_one_may_be_no_list() {
    let one = json!({"ipAddr": "10.0.0.1", "status": "UP", "port": {"$": 80, "@enabled": "true"}});
    for (written, count) in [(json!([one, one]), 2), (one.clone(), 1), (json!([]), 0)] {
        let body: Body =
            serde_json::from_value(json!({"application": {"name": "A", "instance": written}})).unwrap();
        let found = match body.application.instance {
            OneOrMore::More(list) => list.len(),
            OneOrMore::One(_) => 1,
        };
        assert_eq!(found, count);
    }
}
