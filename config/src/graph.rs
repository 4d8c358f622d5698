//! All objects by key, what refers to what, and what was set aside because it is wrong.
//!
//! The graph is the last word on configuration: stores feed it changes, whoever compiles reads it. A change
//! costs as much as the object it is about, however many there are. An object that is wrong is set aside with
//! its errors and its place stays known, so that a route can be refused instead of forgotten.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use crate::env::{Env, ProcessEnv};
use crate::error::{ConfigError, ErrorKind, escape};
use crate::id::{Kind, ResourceKey};
use crate::plugin_catalog::PluginCatalog;
use crate::resource::Resource;
use crate::ssl::SslType;

/// An object with its place and history.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Where it is stored.
    pub key: ResourceKey,
    /// What it says.
    pub resource: Resource,
    /// The revision of the store that created it.
    pub created_index: u64,
    /// The revision of the store that last changed it.
    pub modified_index: u64,
}

impl Item {
    /// As JSON with the id, as the Admin API shows it: with defaults, and with references to secrets as they
    /// were written. Private keys are in it.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut value = self.resource.to_value();
        let id = match self.key.kind {
            // The name is in the object, or is the key alone.
            Kind::Consumer | Kind::PluginMetadata => return value,
            Kind::Secret => &self.key.id,
            _ => self.key.own_id(),
        };
        if let Some(object) = value.as_object_mut() {
            object.insert("id".to_owned(), Value::String(id.to_owned()));
        }
        value
    }
}

/// An object that is wrong.
#[derive(Clone, PartialEq)]
pub struct Rejected {
    /// Where it is stored.
    pub key: ResourceKey,
    /// Everything that is wrong with it.
    pub errors: Vec<ConfigError>,
    /// As it was written: the conditions of a route, so that it can be refused where it would have matched.
    pub value: Value,
    /// The revision of the store that created it.
    pub created_index: u64,
    /// The revision of the store that last changed it.
    pub modified_index: u64,
}

impl fmt::Debug for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The value may hold secrets.
        f.debug_struct("Rejected")
            .field("key", &self.key)
            .field("errors", &self.errors)
            .finish_non_exhaustive()
    }
}

/// What happened in a store.
#[derive(Clone, PartialEq)]
pub enum Change {
    /// An object was written.
    Put {
        /// Where it is stored.
        key: ResourceKey,
        /// As it was written.
        value: Value,
        /// The revision that created it.
        created_index: u64,
        /// The revision that wrote it.
        modified_index: u64,
    },
    /// An object was removed.
    Delete {
        /// Where it was stored.
        key: ResourceKey,
        /// The revision that removed it.
        modified_index: u64,
    },
}

impl Change {
    /// The object it is about.
    #[must_use]
    pub fn key(&self) -> &ResourceKey {
        match self {
            Change::Put { key, .. } | Change::Delete { key, .. } => key,
        }
    }

    /// The revision that made it.
    #[must_use]
    pub fn modified_index(&self) -> u64 {
        match self {
            Change::Put { modified_index, .. } | Change::Delete { modified_index, .. } => *modified_index,
        }
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Change::Put { .. } => "Put",
            Change::Delete { .. } => "Delete",
        };
        write!(f, "{word}({} at {})", self.key(), self.modified_index())
    }
}

/// All objects.
pub struct Graph {
    kinds: [BTreeSet<ById>; Kind::ALL.len()],
    /// Pairs of an object that is referred to, which may not exist, and one that refers to it.
    links: BTreeSet<(ResourceKey, ResourceKey)>,
    rejected: BTreeMap<ResourceKey, Rejected>,
    revision: u64,
    env: Arc<dyn Env + Send + Sync>,
}

impl Default for Graph {
    fn default() -> Graph {
        Graph::new()
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph")
            .field("items", &self.len())
            .field("rejected", &self.rejected.len())
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

impl Graph {
    /// No objects. References to the environment are looked up in that of the process.
    #[must_use]
    pub fn new() -> Graph {
        Graph::with_env(Arc::new(ProcessEnv))
    }

    /// As [`Graph::new`], with another environment.
    #[must_use]
    pub fn with_env(env: Arc<dyn Env + Send + Sync>) -> Graph {
        Graph {
            kinds: Default::default(),
            links: BTreeSet::new(),
            rejected: BTreeMap::new(),
            revision: 0,
            env,
        }
    }

    /// Take one change in. The keys that are now different: that of the change, or none if the object is what
    /// it was.
    pub fn apply(&mut self, change: Change, catalog: &dyn PluginCatalog) -> Vec<ResourceKey> {
        self.revision = self.revision.max(change.modified_index());
        let key = change.key().clone();
        let changed = match change {
            Change::Put { key, value, created_index, modified_index } => {
                self.put(key, value, created_index, modified_index, true, catalog)
            }
            Change::Delete { key, .. } => self.remove(&key),
        };
        if changed { vec![key] } else { Vec::new() }
    }

    /// Make the graph hold what `changes` put and nothing else. Objects that stay as they are keep their `Arc`.
    /// The keys that are now different, removed ones among them. Changes are taken one at a time, so that the JSON
    /// of all objects need not be there at once.
    pub fn replace_all(
        &mut self,
        changes: impl IntoIterator<Item = Change>,
        catalog: &dyn PluginCatalog,
    ) -> Vec<ResourceKey> {
        let changes = changes.into_iter();
        let mut kept = HashSet::with_capacity(changes.size_hint().0);
        let mut changed = Vec::new();
        self.revision = 0;
        for change in changes {
            self.revision = self.revision.max(change.modified_index());
            let Change::Put { key, value, created_index, modified_index } = change else { continue };
            kept.insert(key.clone());
            if self.put(key.clone(), value, created_index, modified_index, false, catalog) {
                changed.push(key);
            }
        }
        let items = self.kinds.iter().flatten().map(|item| &item.0.key);
        let gone: Vec<ResourceKey> =
            items.chain(self.rejected.keys()).filter(|key| !kept.contains(*key)).cloned().collect();
        for key in gone {
            self.remove(&key);
            changed.push(key);
        }
        changed
    }

    /// Read those objects again that refer to a secret for which `is_told` holds: it is known now, or another one. The
    /// keys that are now different.
    pub fn read_again(
        &mut self,
        mut is_told: impl FnMut(&str) -> bool,
        catalog: &dyn PluginCatalog,
    ) -> Vec<ResourceKey> {
        let mut stale = Vec::new();
        for ById(item) in self.kinds.iter().flatten() {
            if item.resource.literals().texts().any(&mut is_told) {
                let value = item.resource.to_value();
                stale.push((item.key.clone(), value, item.created_index, item.modified_index));
            }
        }
        for rejected in self.rejected.values() {
            let mut paths = Vec::new();
            strings(&rejected.value, &mut |text| paths.push(is_told(text)));
            if paths.contains(&true) {
                let Rejected { key, value, created_index, modified_index, .. } = rejected;
                stale.push((key.clone(), value.clone(), *created_index, *modified_index));
            }
        }
        let mut changed = Vec::new();
        for (key, value, created_index, modified_index) in stale {
            if self.put(key.clone(), value, created_index, modified_index, false, catalog) {
                changed.push(key);
            }
        }
        changed
    }

    /// Every reference to a secret in every object, as it was written, and other text that may be none.
    pub fn visit_secret_references(&self, visit: &mut dyn FnMut(&str)) {
        for ById(item) in self.kinds.iter().flatten() {
            item.resource.literals().texts().for_each(&mut *visit);
        }
        for rejected in self.rejected.values() {
            strings(&rejected.value, visit);
        }
    }

    /// Whether anything but the indices is now different. `reindex` says whether those of an object that
    /// stays as it is are taken over.
    fn put(
        &mut self,
        key: ResourceKey,
        value: Value,
        created_index: u64,
        modified_index: u64,
        reindex: bool,
        catalog: &dyn PluginCatalog,
    ) -> bool {
        let resource = match Resource::parse_with(&key, &value, catalog, &*self.env) {
            Ok(resource) => resource,
            Err(errors) => {
                return self.set_aside(Rejected { key, errors, value, created_index, modified_index });
            }
        };
        let same = self.get(&key).is_some_and(|item| item.resource == resource);
        if same && !reindex {
            return false;
        }
        if !same {
            self.remove(&key);
            self.link(&key, &resource);
        }
        if let Some(items) = self.kinds.get_mut(key.kind.index()) {
            items.replace(ById(Arc::new(Item { key, resource, created_index, modified_index })));
        }
        !same
    }

    fn set_aside(&mut self, rejected: Rejected) -> bool {
        let same = self
            .rejected
            .get(&rejected.key)
            .is_some_and(|earlier| earlier.errors == rejected.errors && earlier.value == rejected.value);
        if !same {
            self.remove(&rejected.key);
        }
        self.rejected.insert(rejected.key.clone(), rejected);
        !same
    }

    /// Whether there was such an object.
    fn remove(&mut self, key: &ResourceKey) -> bool {
        let rejected = self.rejected.remove(key).is_some();
        let Some(ById(item)) = self.kinds.get_mut(key.kind.index()).and_then(|items| items.take(&*key.id))
        else {
            return rejected;
        };
        for target in references(key, &item.resource) {
            self.links.remove(&(target, key.clone()));
        }
        true
    }

    fn link(&mut self, key: &ResourceKey, resource: &Resource) {
        for target in references(key, resource) {
            self.links.insert((target, key.clone()));
        }
    }

    /// The object of a key.
    #[must_use]
    pub fn get(&self, key: &ResourceKey) -> Option<&Arc<Item>> {
        self.find(key.kind, &key.id)
    }

    /// The object of a kind with an id.
    #[must_use]
    pub fn find(&self, kind: Kind, id: &str) -> Option<&Arc<Item>> {
        self.kinds.get(kind.index())?.get(id).map(|item| &item.0)
    }

    /// All objects of a kind, by id.
    pub fn iter(&self, kind: Kind) -> impl Iterator<Item = &Arc<Item>> {
        self.kinds.get(kind.index()).into_iter().flatten().map(|item| &item.0)
    }

    /// How many objects of a kind there are.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.kinds.get(kind.index()).map_or(0, BTreeSet::len)
    }

    /// How many objects there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kinds.iter().map(BTreeSet::len).sum()
    }

    /// Whether there is no object.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The objects that refer to `key`, whether or not there is such an object.
    #[must_use]
    pub fn referrers(&self, key: &ResourceKey) -> Vec<ResourceKey> {
        // The least key there is: the first kind and the empty id.
        let least = ResourceKey::new(Kind::Route, "");
        let links = self.links.range((key.clone(), least)..);
        links.take_while(|(target, _)| target == key).map(|(_, user)| user.clone()).collect()
    }

    /// Objects that were set aside, by key.
    pub fn rejected(&self) -> impl Iterator<Item = &Rejected> {
        self.rejected.values()
    }

    /// The object that was set aside under `key`.
    #[must_use]
    pub fn rejected_at(&self, key: &ResourceKey) -> Option<&Rejected> {
        self.rejected.get(key)
    }

    /// The revision of the store that the graph shows.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Tell the revision, where the store knows it better than the changes do.
    pub fn set_revision(&mut self, revision: u64) {
        self.revision = revision;
    }

    /// What is wrong with an object in view of the others: objects it refers to that do not exist or are of no
    /// use to it, and plugins of a global rule that another one has. Nothing here sets an object aside, because
    /// stores deliver in any order; whoever takes a single object from a person asks first.
    #[must_use]
    pub fn check_references(&self, key: &ResourceKey, resource: &Resource) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        resource.visit_references(&mut |pointer, target| {
            let kind = match self.get(&target).map(|item| &item.resource) {
                None => ErrorKind::MissingReference { target },
                Some(Resource::Ssl(ssl)) if ssl.kind != SslType::Client => ErrorKind::Invalid {
                    problem: format!("{target} is shown to clients: refer to one of `type: client`"),
                },
                Some(_) => return,
            };
            errors.push(ConfigError::new(pointer, kind));
        });
        if let Some(consumer) = key.consumer()
            && self.get(&consumer).is_none()
        {
            errors.push(ConfigError::new("", ErrorKind::MissingReference { target: consumer }));
        }
        if let Resource::GlobalRule(rule) = resource {
            for name in rule.plugins.keys() {
                if let Some(other) = self.global_rule_with(name, key) {
                    let problem =
                        format!("the plugin is in {other} already: write it in one global rule only");
                    errors.push(ConfigError::invalid(format!("/plugins/{}", escape(name)), problem));
                }
            }
        }
        errors
    }

    fn global_rule_with(&self, plugin: &str, except: &ResourceKey) -> Option<&ResourceKey> {
        let has =
            |item: &&Arc<Item>| item.resource.plugins().is_some_and(|plugins| plugins.contains_key(plugin));
        let mut rules = self.iter(Kind::GlobalRule).filter(|item| item.key != *except);
        rules.find(has).map(|item| &item.key)
    }
}

/// Every text in `value` that begins like a reference to a secret.
fn strings(value: &Value, visit: &mut dyn FnMut(&str)) {
    match value {
        Value::String(text) if text.starts_with('$') => visit(text),
        Value::Array(list) => list.iter().for_each(|item| strings(item, visit)),
        Value::Object(map) => map.values().for_each(|item| strings(item, visit)),
        _ => {}
    }
}

/// What an object refers to, by what it says and by where it is.
fn references(key: &ResourceKey, resource: &Resource) -> Vec<ResourceKey> {
    let mut references = resource.references();
    references.extend(key.consumer());
    references
}

/// An item that is found by its id.
#[derive(Clone)]
struct ById(Arc<Item>);

impl Borrow<str> for ById {
    fn borrow(&self) -> &str {
        &self.0.key.id
    }
}

impl PartialEq for ById {
    fn eq(&self, other: &ById) -> bool {
        self.0.key.id == other.0.key.id
    }
}

impl Eq for ById {}

impl PartialOrd for ById {
    fn partial_cmp(&self, other: &ById) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ById {
    fn cmp(&self, other: &ById) -> Ordering {
        self.0.key.id.cmp(&other.0.key.id)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap as Model;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::testing::TestCatalog;

    fn key(path: &str) -> ResourceKey {
        ResourceKey::from_path(path).unwrap()
    }

    fn put(path: &str, value: Value, index: u64) -> Change {
        Change::Put { key: key(path), value, created_index: index, modified_index: index }
    }

    fn route(upstream: &str) -> Value {
        json!({"uri": "/a", "upstream_id": upstream})
    }

    fn paths(keys: &[ResourceKey]) -> Vec<String> {
        let mut paths: Vec<String> = keys.iter().map(ToString::to_string).collect();
        paths.sort_unstable();
        paths
    }

    fn graph(changes: Vec<Change>) -> Graph {
        let mut graph = Graph::new();
        for change in changes {
            graph.apply(change, &TestCatalog);
        }
        graph
    }

    #[test]
    fn a_change_is_told_only_if_something_is_different() {
        let mut graph = Graph::new();
        assert_eq!(paths(&graph.apply(put("routes/1", route("u"), 5), &TestCatalog)), ["routes/1"]);
        assert!(graph.apply(put("routes/1", route("u"), 6), &TestCatalog).is_empty());
        let item = graph.get(&key("routes/1")).unwrap();
        assert_eq!((item.modified_index, graph.revision()), (6, 6));
        assert_eq!(paths(&graph.apply(put("routes/1", route("v"), 7), &TestCatalog)), ["routes/1"]);
        let delete = || Change::Delete { key: key("routes/1"), modified_index: 8 };
        assert_eq!(paths(&graph.apply(delete(), &TestCatalog)), ["routes/1"]);
        assert!(graph.apply(delete(), &TestCatalog).is_empty());
        assert!(graph.is_empty());
        assert_eq!(graph.revision(), 8);
    }

    #[test]
    fn what_is_wrong_is_set_aside_and_takes_the_place_of_what_was_right() {
        let mut graph = graph(vec![put("routes/1", route("u"), 1)]);
        let wrong = || put("routes/1", json!({"uri": "/a", "upstream_id": "u", "nam": 1}), 2);
        assert_eq!(paths(&graph.apply(wrong(), &TestCatalog)), ["routes/1"]);
        assert!(graph.apply(wrong(), &TestCatalog).is_empty());
        assert!(graph.get(&key("routes/1")).is_none());
        let rejected = graph.rejected_at(&key("routes/1")).unwrap();
        assert_eq!((rejected.errors.len(), &rejected.value["uri"]), (1, &json!("/a")));
        assert!(graph.referrers(&key("upstreams/u")).is_empty());
        assert_eq!(paths(&graph.apply(put("routes/1", route("u"), 3), &TestCatalog)), ["routes/1"]);
        assert_eq!(graph.rejected().count(), 0);
        assert_eq!(paths(&graph.referrers(&key("upstreams/u"))), ["routes/1"]);
    }

    #[test]
    fn replacing_everything_keeps_what_is_the_same() {
        let mut graph = graph(vec![
            put("routes/1", route("u"), 1),
            put("routes/2", route("u"), 2),
            put("services/3", json!({}), 3),
            put("routes/4", json!({"uri": 1}), 4),
            put("routes/5", json!({"uri": 1}), 5),
        ]);
        let before = Arc::clone(graph.get(&key("routes/1")).unwrap());
        let changed = graph.replace_all(
            vec![
                put("routes/1", route("u"), 10),
                put("routes/2", route("v"), 11),
                put("routes/4", json!({"uri": 1}), 12),
                put("upstreams/u", json!({"nodes": {"a": 1}}), 13),
            ],
            &TestCatalog,
        );
        assert_eq!(paths(&changed), ["routes/2", "routes/5", "services/3", "upstreams/u"]);
        assert!(Arc::ptr_eq(&before, graph.get(&key("routes/1")).unwrap()));
        assert_eq!(graph.revision(), 13);
        assert_eq!(
            graph.rejected().map(|rejected| rejected.key.to_string()).collect::<Vec<_>>(),
            ["routes/4"]
        );
        // A store that was emptied and filled anew counts from the beginning.
        graph.replace_all(vec![put("routes/1", route("u"), 2)], &TestCatalog);
        assert_eq!(graph.revision(), 2);
    }

    #[test]
    fn referrers_are_known_whether_or_not_the_object_exists() {
        let graph = graph(vec![
            put("routes/1", route("u"), 1),
            put("routes/2", json!({"uri": "/a", "service_id": "u"}), 2),
            put("services/u", json!({"upstream_id": "u"}), 3),
            put("routes/3", route("u2"), 4),
            put("consumers/jack", json!({"username": "jack", "group_id": "g"}), 5),
            put("consumers/jack/credentials/a", json!({"plugins": {"key-auth": {"key": "k"}}}), 6),
            put("upstreams/u", json!({"nodes": {}, "tls": {"client_cert_id": "c"}}), 7),
            put("stream_routes/1", json!({"upstream_id": "u"}), 8),
            put(
                "global_rules/1",
                json!({"plugins": {"traffic-split": {
                    "rules": [{"weighted_upstreams": [{"upstream_id": "u"}]}],
                }}}),
                9,
            ),
        ]);
        assert_eq!(graph.rejected().count(), 0);
        for (target, expected) in [
            ("upstreams/u", vec!["global_rules/1", "routes/1", "services/u", "stream_routes/1"]),
            ("upstreams/u2", vec!["routes/3"]),
            ("services/u", vec!["routes/2"]),
            ("consumer_groups/g", vec!["consumers/jack"]),
            ("consumers/jack", vec!["consumers/jack/credentials/a"]),
            ("ssls/c", vec!["upstreams/u"]),
            ("routes/1", vec![]),
        ] {
            assert_eq!(paths(&graph.referrers(&key(target))), expected, "{target}");
        }
    }

    #[test]
    fn references_are_checked_in_view_of_the_others() {
        let ssl =
            |kind: &str| json!({"type": kind, "sni": "a", "cert": "c".repeat(128), "key": "k".repeat(64)});
        let graph = graph(vec![
            put("upstreams/u", json!({"nodes": {}}), 1),
            put("ssls/client", ssl("client"), 2),
            put("ssls/server", ssl("server"), 3),
            put("consumers/jack", json!({"username": "jack"}), 4),
            put("global_rules/1", json!({"plugins": {"limit-count": {"count": 1}}}), 5),
        ]);
        let tls = |id: &str| json!({"nodes": {}, "tls": {"client_cert_id": id}});
        let credential = json!({"plugins": {"key-auth": {"key": "k"}}});
        let rule = json!({"plugins": {"limit-count": {"count": 1}, "key-auth": {}}});
        for (path, value, expected) in [
            ("routes/1", route("u"), None),
            ("routes/1", route("v"), Some(("/upstream_id", "upstreams/v does not exist"))),
            (
                "services/1",
                json!({"upstream": tls("no")}),
                Some(("/upstream/tls/client_cert_id", "ssls/no does not")),
            ),
            ("upstreams/1", tls("client"), None),
            ("upstreams/1", tls("server"), Some(("/tls/client_cert_id", "refer to one of `type: client`"))),
            ("consumers/jack/credentials/a", credential.clone(), None),
            ("consumers/joe/credentials/a", credential, Some(("", "consumers/joe does not exist"))),
            ("global_rules/1", rule.clone(), None),
            ("global_rules/2", rule, Some(("/plugins/limit-count", "in global_rules/1 already"))),
        ] {
            let resource = Resource::parse(&key(path), &value, &TestCatalog).unwrap();
            let errors = graph.check_references(&key(path), &resource);
            let told: Vec<_> = errors.iter().map(|e| (e.pointer.as_str(), e.kind.to_string())).collect();
            match expected {
                None => assert!(told.is_empty(), "{path} {value}: {told:?}"),
                Some((pointer, says)) => {
                    assert!(
                        told.len() == 1 && told[0].0 == pointer && told[0].1.contains(says),
                        "{path} {value}: {told:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn an_item_is_answered_with_its_id() {
        let graph = graph(vec![
            put("routes/7", json!({"id": 7, "uri": "/a", "upstream_id": 1}), 1),
            put("consumers/jack", json!({"username": "jack"}), 2),
            put("consumers/jack/credentials/a", json!({"plugins": {"key-auth": {"key": "k"}}}), 3),
            put("secrets/vault/1", json!({"uri": "http://a", "prefix": "p", "token": "t"}), 4),
            put("plugin_metadata/http-logger", json!({"log_format": {}}), 5),
        ]);
        for (path, id) in [
            ("routes/7", Some("7")),
            ("consumers/jack", None),
            ("consumers/jack/credentials/a", Some("a")),
            ("secrets/vault/1", Some("vault/1")),
            ("plugin_metadata/http-logger", None),
        ] {
            let value = graph.get(&key(path)).unwrap().to_value();
            assert_eq!(value.get("id").and_then(Value::as_str), id, "{path}");
        }
    }

    #[test]
    fn objects_come_by_id() {
        let graph =
            graph(["b", "a", "10", "9"].map(|id| put(&format!("services/{id}"), json!({}), 1)).to_vec());
        let ids: Vec<&str> = graph.iter(Kind::Service).map(|item| &*item.key.id).collect();
        assert_eq!(ids, ["10", "9", "a", "b"]);
        assert_eq!((graph.count(Kind::Service), graph.count(Kind::Route), graph.len()), (4, 0, 4));
    }

    proptest! {
        /// However changes come, one by one or all at once, the graph is what the last of each key says.
        #[test]
        fn the_graph_is_what_the_last_changes_say(
            steps in proptest::collection::vec((0..6_u8, 0..4_u8, any::<bool>()), 1..40),
        ) {
            let mut graph = Graph::new();
            let mut model: Model<String, Value> = Model::new();
            for (index, (id, form, whole)) in steps.into_iter().enumerate() {
                let index = index as u64 + 1;
                let path = format!("routes/{}", id + 1);
                let value = match form {
                    0 => None,
                    1 => Some(route("u")),
                    2 => Some(route("v")),
                    _ => Some(json!({"uri": 1})),
                };
                match &value {
                    Some(value) => model.insert(path.clone(), value.clone()),
                    None => model.remove(&path),
                };
                if whole {
                    let changes = model.iter().map(|(path, value)| put(path, value.clone(), index));
                    graph.replace_all(changes, &TestCatalog);
                } else {
                    let change = match value {
                        Some(value) => put(&path, value, index),
                        None => Change::Delete { key: key(&path), modified_index: index },
                    };
                    graph.apply(change, &TestCatalog);
                }
                let is = |value: &Value, wanted: &str| value["upstream_id"] == *wanted;
                for target in ["u", "v"] {
                    let expected: Vec<&String> =
                        model.iter().filter(|(_, value)| is(value, target)).map(|(path, _)| path).collect();
                    let found = paths(&graph.referrers(&key(&format!("upstreams/{target}"))));
                    prop_assert_eq!(found.iter().collect::<Vec<_>>(), expected);
                }
                let wrong = model.values().filter(|value| value["uri"] == 1).count();
                prop_assert_eq!(graph.rejected().count(), wrong);
                prop_assert_eq!(graph.len(), model.len() - wrong);
            }
        }
    }
}
