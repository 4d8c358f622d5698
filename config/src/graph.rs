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
    /// The keys that are now different, removed ones among them.
    pub fn replace_all(&mut self, changes: Vec<Change>, catalog: &dyn PluginCatalog) -> Vec<ResourceKey> {
        let mut kept = HashSet::with_capacity(changes.len());
        let mut changed = Vec::new();
        self.revision = changes.iter().map(Change::modified_index).max().unwrap_or(0);
        for change in changes {
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
            Err(errors) => return self.set_aside(Rejected { key, errors, value, modified_index }),
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
