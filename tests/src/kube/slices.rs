//! Services of a cluster in the words of a test: slices, pods in them, and their states.

use serde_json::{Value, json};

use super::{Kind, KubeApi};

/// A slice that is put together.
#[derive(Clone, Debug)]
pub struct Slice {
    namespace: String,
    name: String,
    service: String,
    object: Value,
}

/// An endpoint of a slice.
#[derive(Clone, Debug)]
pub struct Pod(Value);

impl Slice {
    /// A slice of `service`, with one port `http`.
    pub fn new(namespace: &str, service: &str, name: &str, port: u16) -> Slice {
        let object = json!({
            "metadata": {
                "namespace": namespace, "name": name,
                "labels": {
                    "kubernetes.io/service-name": service,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                },
                "managedFields": [{"manager": "kube-controller-manager", "operation": "Update", "fieldsV1": {"f:x": {}}}],
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
            "endpoints": [],
        });
        Slice { namespace: namespace.to_owned(), name: name.to_owned(), service: service.to_owned(), object }
    }

    pub fn pod(mut self, pod: Pod) -> Slice {
        self.object["endpoints"].as_array_mut().expect("a list").push(pod.0);
        self
    }

    pub fn pods(self, pods: impl IntoIterator<Item = Pod>) -> Slice {
        pods.into_iter().fold(self, Slice::pod)
    }

    pub fn family(mut self, family: &str) -> Slice {
        self.object["addressType"] = json!(family);
        self
    }

    pub fn ports(mut self, ports: Value) -> Slice {
        self.object["ports"] = ports;
        self
    }

    pub fn label(mut self, name: &str, value: &str) -> Slice {
        self.object["metadata"]["labels"][name] = json!(value);
        self
    }

    pub fn json(&self) -> Value {
        self.object.clone()
    }

    /// Namespace and name.
    pub fn place(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }

    pub fn put(&self, api: &KubeApi) {
        api.put(Kind::SLICE, self.object.clone());
    }

    pub fn delete(&self, api: &KubeApi) {
        api.delete(Kind::SLICE, &self.namespace, &self.name);
    }

    /// `service_name` of it, for the port `http`.
    pub fn service_name(&self) -> String {
        format!("{}/{}:http", self.namespace, self.service)
    }
}

impl Pod {
    /// A ready one.
    pub fn new(name: &str, address: &str) -> Pod {
        Pod(json!({
            "addresses": [address],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "name": name},
        }))
    }

    /// Of which nothing but the address is said.
    pub fn bare(address: &str) -> Pod {
        Pod(json!({"addresses": [address]}))
    }

    pub fn conditions(mut self, conditions: Value) -> Pod {
        self.0["conditions"] = conditions;
        self
    }

    /// Asked to end, and serving until it does.
    pub fn terminating(self) -> Pod {
        self.conditions(json!({"ready": false, "serving": true, "terminating": true}))
    }

    /// Asked to end, and not serving any more.
    pub fn gone(self) -> Pod {
        self.conditions(json!({"ready": false, "serving": false, "terminating": true}))
    }

    pub fn unready(self) -> Pod {
        self.conditions(json!({"ready": false, "serving": false, "terminating": false}))
    }

    pub fn place(mut self, zone: &str, node: &str) -> Pod {
        self.0["zone"] = json!(zone);
        self.0["nodeName"] = json!(node);
        self
    }

    pub fn hint(mut self, zones: &[&str]) -> Pod {
        let zones: Vec<Value> = zones.iter().map(|zone| json!({"name": zone})).collect();
        self.0["hints"] = json!({"forZones": zones});
        self
    }
}
