//! Consumers: who a request belongs to once an authentication plugin has recognised its credential.
//!
//! The table is published as a whole by the control side; plugins hold [`Consumers`] and look up by the plugin's name
//! and the credential's key. A change of a consumer recompiles no route.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use serde_json::Value;

use crate::chain::Instance;

/// A consumer as the data path knows it.
pub struct Consumer {
    /// APISIX `username`.
    pub name: Arc<str>,
    /// APISIX `group_id`.
    pub group_id: Option<Arc<str>>,
    /// The consumer's labels.
    pub labels: Arc<[(Box<str>, Box<str>)]>,
    /// `custom_id` label, sent as `X-Consumer-Custom-Id`.
    pub custom_id: Option<Arc<str>>,
    /// The plugins of the consumer and its group, already merged and in order.
    pub plugins: Arc<[Arc<Instance>]>,
    /// The credential that was recognised; absent when the consumer itself holds the key.
    pub credential_id: Option<Arc<str>>,
    /// The settings of the authentication plugin on the consumer or the credential.
    pub auth: Arc<Value>,
    /// What the plugin's [`Verifier`](crate::plugin::Verifier) made of them.
    pub verifier: Option<Arc<dyn Any + Send + Sync>>,
    /// Why the consumer may not act: its group is missing, or a plugin of it or its group is refused. Its requests
    /// are answered 503 (APISIX 2.4, step 4).
    pub refused: Option<Box<str>>,
}

impl Consumer {
    /// A consumer of which only the name is known.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            group_id: None,
            labels: Arc::default(),
            custom_id: None,
            plugins: Arc::default(),
            credential_id: None,
            auth: Arc::new(Value::Null),
            verifier: None,
            refused: None,
        }
    }

    /// What credentials are checked against, as the plugin's settings on this consumer say.
    pub fn verifier<V: Any>(&self) -> Option<&V> {
        self.verifier.as_ref()?.downcast_ref()
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `auth` holds secrets.
        f.debug_struct("Consumer")
            .field("name", &self.name)
            .field("credential_id", &self.credential_id)
            .finish()
    }
}

/// All consumers, by authentication plugin and key.
#[derive(Default)]
pub struct ConsumerTable {
    by_key: HashMap<&'static str, HashMap<Box<str>, Arc<Consumer>>>,
    by_name: HashMap<Arc<str>, Arc<Consumer>>,
}

impl ConsumerTable {
    /// Adds what `plugin` recognises by `key`. The first of two equal keys wins; returns whether it was added.
    pub fn insert(&mut self, plugin: &'static str, key: &str, consumer: Arc<Consumer>) -> bool {
        let keys = self.by_key.entry(plugin).or_default();
        if keys.contains_key(key) {
            return false;
        }
        keys.insert(key.into(), consumer);
        true
    }

    /// Adds a consumer by name, for `anonymous_consumer`.
    pub fn insert_named(&mut self, consumer: Arc<Consumer>) {
        self.by_name.insert(consumer.name.clone(), consumer);
    }
}

/// A handle to the published consumers.
#[derive(Clone, Default)]
pub struct Consumers(Arc<ArcSwap<ConsumerTable>>);

impl Consumers {
    /// Publishes a new table.
    pub fn publish(&self, table: ConsumerTable) {
        self.0.store(Arc::new(table));
    }

    /// The consumer that `plugin` recognises by `key`.
    pub fn find(&self, plugin: &str, key: &str) -> Option<Arc<Consumer>> {
        self.0.load().by_key.get(plugin)?.get(key).cloned()
    }

    /// The consumer of that name.
    pub fn named(&self, name: &str) -> Option<Arc<Consumer>> {
        self.0.load().by_name.get(name).cloned()
    }
}
