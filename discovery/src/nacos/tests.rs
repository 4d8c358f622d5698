#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::json;

use super::*;

#[test]
fn instances_are_read_as_they_are_written() {
    let read = |hosts: serde_json::Value| {
        let list: List = serde_json::from_value(json!({"name": "g@@s", "hosts": hosts})).unwrap();
        instances(list, 100)
    };
    let found = read(json!([
        {"ip": "10.0.0.1", "port": 80, "weight": 2.0, "healthy": true, "enabled": true, "clusterName": "c1",
         "instanceId": "10.0.0.1#80#c1#g@@s", "metadata": {"zone": "z", "version": "2"}, "ephemeral": true},
        {"ip": "10.0.0.2", "port": 81, "weight": 0, "healthy": false, "clusterName": "c2"},
        {"ip": "10.0.0.3", "port": 82, "healthy": true, "enabled": false},
    ]));
    let told: Vec<_> =
        found.iter().map(|it| (&*it.node.host, it.node.port, it.node.weight, it.health)).collect();
    assert_eq!(
        told,
        [
            ("10.0.0.1", 80, 2, Health::Healthy),
            ("10.0.0.2", 81, 0, Health::Unhealthy),
            ("10.0.0.3", 82, 100, Health::Draining),
        ]
    );
    let zones: Vec<_> = found.iter().map(|it| it.details.as_ref().unwrap().zone.as_deref()).collect();
    assert_eq!(zones, [Some("z"), Some("c2"), None]);
    assert_eq!(&*found[1].id, "10.0.0.2:81");

    let found = read(json!([{"ip": "a", "port": 80, "weight": 0.5}, {"ip": "b", "port": 80, "weight": 1.0}]));
    let weights: Vec<u32> = found.iter().map(|it| it.node.weight).collect();
    assert_eq!(weights, [50, 100], "fractions do not get lost");
}

#[test]
fn what_cannot_be_asked_for_is_refused() {
    let settings = serde_json::from_value(json!({"host": ["http://127.0.0.1:8848"]})).unwrap();
    let nacos = Nacos::new(&settings).unwrap();
    let open = |service: &str, arg: &str| {
        let args = [(Arc::from(arg), Arc::from("x"))].into();
        nacos.open(&Query { service: service.into(), args }).err().unwrap_or_default()
    };
    assert_eq!(open("s", "group_name"), "");
    assert!(open("s", "group").contains("write one of namespace_id, group_name, clusters"));
    assert!(open("", "group_name").contains("write the name"));
}
