//! As much of Nacos as discovery asks for: the list of instances, logins, and its way of weights and health.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::registry::{Question, Registry};

/// Instances by group, service and address.
type Instances = BTreeMap<(String, String), BTreeMap<String, Value>>;

/// A Nacos of one namespace, `public`, that wants a login as `nacos` with `secret`.
pub struct Nacos {
    pub registry: Registry,
    instances: Arc<Mutex<Instances>>,
    tokens: Arc<Mutex<u64>>,
}

impl Nacos {
    pub async fn start() -> Nacos {
        let (instances, tokens) = (Arc::<Mutex<Instances>>::default(), Arc::<Mutex<u64>>::default());
        let (known, token) = (Arc::clone(&instances), Arc::clone(&tokens));
        let registry = Registry::start(move |question| answer(question, &known, &token)).await;
        Nacos { registry, instances, tokens }
    }

    /// Where it is, with credentials.
    pub fn host(&self) -> String {
        format!("http://nacos:secret@{}", self.registry.addr)
    }

    /// Registers an instance, or changes it: `more` is merged into what is usual.
    pub fn register(&self, group: &str, service: &str, address: &str, more: &Value) {
        let (ip, port) = address.rsplit_once(':').expect("an address with a port");
        let mut instance = json!({
            "instanceId": format!("{ip}#{port}#DEFAULT#{group}@@{service}"), "ip": ip,
            "port": port.parse::<u16>().expect("a port"), "weight": 1.0, "healthy": true, "enabled": true,
            "ephemeral": true, "clusterName": "DEFAULT", "serviceName": format!("{group}@@{service}"), "metadata": {},
        });
        for (name, value) in more.as_object().expect("an object") {
            instance[name] = value.clone();
        }
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        let service = instances.entry((group.to_owned(), service.to_owned())).or_default();
        service.insert(address.to_owned(), instance);
    }

    pub fn deregister(&self, group: &str, service: &str, address: &str) {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(service) = instances.get_mut(&(group.to_owned(), service.to_owned())) {
            service.remove(address);
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Tokens of earlier logins are refused from now on.
    pub fn expire(&self) {
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }
}

fn answer(question: &Question, instances: &Mutex<Instances>, tokens: &Mutex<u64>) -> (u16, Value) {
    let token = format!("token-{}", tokens.lock().unwrap_or_else(PoisonError::into_inner));
    match (&*question.method, &*question.path) {
        ("POST", "/nacos/v1/auth/login") => match (question.value("username"), question.value("password")) {
            ("nacos", "secret") => {
                (200, json!({"accessToken": token, "tokenTtl": 18000, "globalAdmin": true}))
            }
            _ => (403, json!("unknown user!")),
        },
        ("GET", "/nacos/v1/ns/instance/list") if question.value("accessToken") != token => {
            (403, json!({"status": 403, "error": "Forbidden", "message": "token invalid!"}))
        }
        ("GET", "/nacos/v1/ns/instance/list") if question.value("namespaceId") == "public" => {
            let (group, service) = (question.value("groupName"), question.value("serviceName"));
            let instances = instances.lock().unwrap_or_else(PoisonError::into_inner);
            let known = instances.get(&(group.to_owned(), service.to_owned()));
            let clusters: Vec<&str> =
                question.value("clusters").split(',').filter(|cluster| !cluster.is_empty()).collect();
            let wanted = |instance: &&Value| {
                let cluster = instance["clusterName"].as_str().unwrap_or_default();
                clusters.is_empty() || clusters.contains(&cluster)
            };
            let hosts: Vec<&Value> = known.into_iter().flat_map(BTreeMap::values).filter(wanted).collect();
            (
                200,
                json!({"name": format!("{group}@@{service}"), "hosts": hosts, "cacheMillis": 10000, "valid": true}),
            )
        }
        ("GET", "/nacos/v1/ns/instance/list") => (200, json!({"hosts": []})),
        _ => (404, json!("no such thing")),
    }
}
