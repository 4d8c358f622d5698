//! What a plugin refuses, it refuses before an object is stored: whatever its checks let pass, `build` takes.
//!
//! Settings and metadata are those of the cases of compatibility, with one text or one name at a time replaced by an
//! odd one. What only `build` refused would be stored, and the objects with the plugin set aside.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use config::document::Document;
use config::error::{ConfigError, escape};
use layers::plugin::{Hooks, Registration};
use layers::testing::TestEnv;
use regex::Regex;
use serde_json::{Value, json};

use crate::registrations;

/// Texts that are wrong for something.
const ODD: [&str; 7] = ["(", "a b\n", "{{ a", "", "ü", "$.[", "http://["];

/// What `build` needs of other objects, which may come later than the one that is checked.
const OF_OTHERS: [(&str, &str); 3] = [
    ("grpc-transcode", "/proto_id"),
    // In this test there are no upstreams at all.
    ("traffic-split", ""),
    // They may stand in the metadata.
    ("jwt-issue", "/keys"),
];

/// What the cases write about plugins, by their names.
#[derive(Default)]
pub(crate) struct Samples {
    pub(crate) settings: BTreeMap<String, Vec<Value>>,
    metadata: BTreeMap<String, Vec<Value>>,
}

impl Samples {
    pub(crate) fn read() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/compat");
        let [address, port] = ["@(one|two|self|http)@", "@[a-z-]+@"].map(|place| Regex::new(place).unwrap());
        let mut samples = Self::default();
        for entry in std::fs::read_dir(folder).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            for config in text.split("--- config\n").skip(1) {
                let config = config.split("\n--- ").next().unwrap();
                let config = address.replace_all(config, "127.0.0.1:9");
                let document = Document::yaml("case", &port.replace_all(&config, "9"));
                samples.gather(document.unwrap().value());
            }
        }
        samples
    }

    fn gather(&mut self, value: &Value) {
        match value {
            Value::Object(members) => {
                for (name, settings) in
                    members.get("plugins").and_then(Value::as_object).into_iter().flatten()
                {
                    self.settings.entry(name.clone()).or_default().push(without(settings, "_meta"));
                }
                for metadata in members.get("plugin_metadata").and_then(Value::as_array).into_iter().flatten()
                {
                    let name = metadata["id"].as_str().unwrap().to_owned();
                    self.metadata.entry(name).or_default().push(without(metadata, "id"));
                }
                members.values().for_each(|member| self.gather(member));
            }
            Value::Array(list) => list.iter().for_each(|member| self.gather(member)),
            _ => {}
        }
    }
}

fn without(value: &Value, name: &str) -> Value {
    let mut value = value.clone();
    if let Some(members) = value.as_object_mut() {
        members.remove(name);
    }
    value
}

/// `value` with one text or one name replaced, for each of them, and where that is.
fn odd(value: &Value, at: &str) -> Vec<(String, Value)> {
    match value {
        Value::String(_) => ODD.iter().map(|odd| (format!("{at} = {odd:?}"), json!(odd))).collect(),
        Value::Array(list) => {
            let each = list.iter().enumerate().flat_map(|(index, member)| {
                odd(member, &format!("{at}/{index}")).into_iter().map(move |(place, member)| {
                    let mut list = list.clone();
                    list[index] = member;
                    (place, Value::Array(list))
                })
            });
            each.collect()
        }
        Value::Object(members) => {
            let each = members.iter().flat_map(|(name, member)| {
                let named = ODD.map(|odd| {
                    let mut members = members.clone();
                    members.remove(name);
                    members.insert(odd.to_owned(), member.clone());
                    (format!("{at} has {odd:?}"), Value::Object(members))
                });
                let changed =
                    odd(member, &format!("{at}/{}", escape(name))).into_iter().map(|(place, member)| {
                        let mut members = members.clone();
                        members.insert(name.clone(), member);
                        (place, Value::Object(members))
                    });
                named.into_iter().chain(changed)
            });
            each.collect()
        }
        _ => Vec::new(),
    }
}

/// What `build` refuses of settings that pass the checks.
fn late(plugin: &Registration, env: &TestEnv, settings: &Value) -> Vec<ConfigError> {
    if (plugin.check)(settings).is_err() || !(plugin.check_attr)(settings, env.attr.as_ref()).is_empty() {
        return Vec::new();
    }
    let built = env.with(|env| (plugin.build)(settings, env, &mut Hooks::default()));
    let mut errors = built.err().unwrap_or_default();
    errors.retain(|error| {
        !OF_OTHERS.iter().any(|(of, at)| *of == plugin.name && error.pointer.starts_with(at))
    });
    errors
}

#[tokio::test]
async fn what_checks_let_pass_is_built() {
    let folder = tempfile::tempdir().unwrap();
    let zones = json!([
        {"name": "disk_cache_one", "memory": 1 << 20, "disk": [folder.path(), 1 << 20]},
        {"name": "memory_cache", "memory": 1 << 20},
    ]);
    let Samples { settings, metadata } = Samples::read();
    let mut tried = BTreeSet::new();
    let mut found = Vec::new();
    for plugin in registrations() {
        let attr = (plugin.name == "proxy-cache").then(|| json!({"ttl": 10, "zones": zones}));
        let mut env = TestEnv { attr, ..TestEnv::default() };
        let samples = settings.get(plugin.name).map(Vec::as_slice).unwrap_or_default();
        for sample in samples {
            for (place, settings) in odd(sample, "").into_iter().chain([("".to_owned(), sample.clone())]) {
                if place.is_empty() || tried.insert((plugin.name, place.clone())) {
                    let late = late(plugin, &env, &settings);
                    found.extend(late.iter().map(|error| format!("{}{place}: {error}", plugin.name)));
                }
            }
        }
        let Some(sample) = samples.first() else { continue };
        for one in metadata.get(plugin.name).into_iter().flatten() {
            for (place, one) in odd(one, "") {
                if (plugin.extras)().check_metadata(&one).is_some_and(|checked| checked.is_ok()) {
                    env.metadata = Some(one);
                    let late = late(plugin, &env, sample);
                    found.extend(
                        late.iter().map(|error| format!("{}, metadata{place}: {error}", plugin.name)),
                    );
                }
            }
        }
    }
    assert!(tried.len() > 2000, "{} settings tried", tried.len());
    assert!(found.is_empty(), "{}", found.join("\n"));
}
