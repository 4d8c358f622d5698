//! Reading 10,000 routes: `cargo bench -p config --bench files`.
//!
//! A start with 10,000 routes has one second for everything; the text is to take well under 300 ms of it.

use std::collections::BTreeMap;
use std::fmt::Write;

use config::{ApisixYaml, Document};

fn main() {
    divan::main();
}

/// Routes as people write them: names, hosts, two predicates, an upstream, a plugin.
fn yaml() -> String {
    let mut text = String::from("routes:\n");
    for index in 0..10_000 {
        let _ = write!(
            text,
            "  - id: route-{index}
    name: service {index}
    uris: [/api/v1/{index}, /api/v1/{index}/*]
    hosts:
      - host-{index}.example.com
    methods: [GET, POST]
    vars:
      - [arg_name, ==, json]
      - [http_x_version, '~~', '^v[0-9]+$']
    plugins:
      limit-count: {{count: 100, time_window: 60, key: remote_addr, rejected_code: 429}}
    upstream:
      type: roundrobin
      nodes:
        \"10.0.{}.{}:8080\": 1
",
            index / 250,
            index % 250,
        );
    }
    text.push_str("#END\n");
    text
}

fn json() -> String {
    let document = Document::yaml("apisix.yaml", &yaml()).unwrap_or_else(|_| Document::empty("none"));
    document.value().to_string()
}

#[divan::bench]
fn yaml_document(bencher: divan::Bencher<'_, '_>) {
    let text = yaml();
    bencher.counter(divan::counter::BytesCount::of_str(&text)).bench(|| Document::yaml("apisix.yaml", &text));
}

#[divan::bench]
fn json_document(bencher: divan::Bencher<'_, '_>) {
    let text = json();
    bencher.counter(divan::counter::BytesCount::of_str(&text)).bench(|| Document::json("apisix.json", &text));
}

#[divan::bench]
fn apisix_yaml(bencher: divan::Bencher<'_, '_>) {
    let text = yaml();
    let env = BTreeMap::new();
    bencher.bench(|| ApisixYaml::parse("apisix.yaml", &text, &env).map(|file| file.changes(1)));
}
