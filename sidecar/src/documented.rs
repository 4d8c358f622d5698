//! What `docs/policy.md` shows is read, and decides as the page says.

use config::document::Document;
use config::mesh::Policies;
use serde_json::{Value, json};

use crate::egress::{Destination, EgressMatcher};
use crate::policy::{PolicyTable, Question};
use crate::testing::peer;
use crate::tokens::Issuers;

fn blocks() -> Vec<Policies> {
    let page = include_str!("../../docs/policy.md");
    let blocks = page.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks
        .map(|block| {
            let value = Document::yaml("policy.md", block).unwrap().into_value();
            let policies: Policies = config::typed::parse(&value["policies"]).unwrap();
            assert_eq!(policies.check(), []);
            policies
        })
        .collect()
}

fn ask(policies: &Policies, question: Value) -> (bool, String) {
    let (table, _) = PolicyTable::new();
    table.publish(policies, &["orders"], Issuers::new(&policies.tokens).unwrap().into());
    let answer = table.explain(&serde_json::from_value::<Question>(question).unwrap());
    (answer.allowed, answer.why)
}

#[test]
fn the_page_decides_as_it_says() {
    let blocks = blocks();
    let [first, claims, egress] = &blocks[..] else { panic!("three blocks") };
    let shop = "spiffe://mesh.local/ns/shop/sa/web";
    let invoices = "spiffe://mesh.local/ns/billing/sa/invoices";
    let http = |who: &str, method: &str, path: &str| json!({"identity": who, "port": 8080, "method": method, "path": path, "host": "orders"});
    let cases = [
        (http(shop, "GET", "/orders/1"), true, "policy shop-asks-for-orders, rule 1"),
        (http(shop, "POST", "/orders"), true, "policy shop-asks-for-orders, rule 1"),
        (http(shop, "POST", "/orders/1"), false, "no policy allows it"),
        (http(shop, "GET", "/admin/x"), false, "policy nobody-asks-for-admin, rule 1"),
        (http(invoices, "GET", "/orders"), false, "no policy allows it"),
        (json!({"identity": invoices, "port": 5432}), true, "policy invoices-read-the-database, rule 1"),
        (json!({"identity": shop, "port": 5432}), false, "no policy allows it"),
        // Bytes may be what the denial of a path is about.
        (json!({"identity": shop, "port": 8080}), false, "policy nobody-asks-for-admin, rule 1"),
        (json!({"identity": shop, "port": 9}), false, "the default"),
    ];
    for (question, allowed, why) in cases {
        assert_eq!(ask(first, question.clone()), (allowed, why.to_owned()), "{question}");
    }
    for (roles, method, allowed) in
        [("admin", "DELETE", true), ("user", "DELETE", false), ("user", "GET", true)]
    {
        let mut question = http(shop, method, "/");
        question["claims"] = json!({"realm_access": {"roles": [roles]}});
        assert_eq!(ask(claims, question).0, allowed, "{roles} {method}");
    }
    let matcher = EgressMatcher::new(egress.egress.as_deref());
    for (name, address, port, allowed) in [
        ("api.payments.example", "192.0.2.1", 443, true),
        ("api.payments.example", "169.254.169.254", 443, false),
        ("example.com", "192.0.2.1", 443, false),
        ("db", "10.1.1.1", 5432, true),
    ] {
        let to = Destination { name: Some(name), address: Some(address.parse().unwrap()), port };
        assert_eq!(matcher.decide(&to).allowed, allowed, "{name} {address}");
    }
}

#[test]
fn who_called_is_told_as_the_page_says() {
    let caller = peer("spiffe://mesh.local/ns/shop/sa/web");
    let value = crate::client_cert::value("spiffe://mesh.local/ns/default/sa/orders", &caller).unwrap();
    let value = value.to_str().unwrap();
    assert!(value.starts_with("By=spiffe://mesh.local/ns/default/sa/orders;Hash="), "{value}");
    assert!(value.ends_with(";Subject=\"\";URI=spiffe://mesh.local/ns/shop/sa/web"), "{value}");
}
