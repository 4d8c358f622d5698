//! As much of Eureka as discovery asks for: one application at a time, which is gone with its last instance.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::registry::{Question, Registry};

type Instances = BTreeMap<String, BTreeMap<String, Value>>;

/// A Eureka below `/eureka`.
pub struct Eureka {
    pub registry: Registry,
    instances: Arc<Mutex<Instances>>,
}

impl Eureka {
    pub async fn start() -> Eureka {
        let instances = Arc::<Mutex<Instances>>::default();
        let known = Arc::clone(&instances);
        let registry = Registry::start(move |question| answer(question, &known)).await;
        Eureka { registry, instances }
    }

    /// Registers an instance, or changes it.
    pub fn register(&self, application: &str, address: &str, status: &str, metadata: &Value) {
        let (ip, port) = address.rsplit_once(':').expect("an address with a port");
        let instance = json!({
            "instanceId": address, "hostName": ip, "app": application.to_uppercase(), "ipAddr": ip, "status": status,
            "overriddenstatus": "UNKNOWN", "port": {"$": port.parse::<u16>().expect("a port"), "@enabled": "true"},
            "securePort": {"$": 443, "@enabled": "false"}, "countryId": 1, "metadata": metadata,
            "dataCenterInfo": {"name": "MyOwn"},
        });
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        instances.entry(application.to_uppercase()).or_default().insert(address.to_owned(), instance);
    }

    pub fn deregister(&self, application: &str, address: &str) {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        let application = application.to_uppercase();
        if let Some(known) = instances.get_mut(&application) {
            known.remove(address);
            if known.is_empty() {
                instances.remove(&application);
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn answer(question: &Question, instances: &Mutex<Instances>) -> (u16, Value) {
    let name = match question.path.strip_prefix("/eureka/apps/") {
        Some(name) if question.method == "GET" => name,
        _ => return (404, json!("no such thing")),
    };
    match instances.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
        Some(known) => {
            let instances: Vec<&Value> = known.values().collect();
            (200, json!({"application": {"name": name, "instance": instances}}))
        }
        None => (404, json!("")),
    }
}
