//! Objects with their versions and history.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind {
    /// What stands before the plural in paths, without namespaces: `/api/v1`.
    pub group: &'static str,
    pub plural: &'static str,
    pub name: &'static str,
}

impl Kind {
    pub const SLICE: Kind =
        Kind { group: "/apis/discovery.k8s.io/v1", plural: "endpointslices", name: "EndpointSlice" };
    pub const ENDPOINTS: Kind = Kind { group: "/api/v1", plural: "endpoints", name: "Endpoints" };
    pub const SERVICE: Kind = Kind { group: "/api/v1", plural: "services", name: "Service" };
    pub const POD: Kind = Kind { group: "/api/v1", plural: "pods", name: "Pod" };
    pub const SECRET: Kind = Kind { group: "/api/v1", plural: "secrets", name: "Secret" };
    pub const CONFIG_MAP: Kind = Kind { group: "/api/v1", plural: "configmaps", name: "ConfigMap" };
    pub const WEBHOOK: Kind = Kind {
        group: "/apis/admissionregistration.k8s.io/v1",
        plural: "mutatingwebhookconfigurations",
        name: "MutatingWebhookConfiguration",
    };

    pub const CERTIFICATE_REQUEST: Kind =
        Kind { group: "/apis/cert-manager.io/v1", plural: "certificaterequests", name: "CertificateRequest" };
    pub const CLUSTER_ISSUER: Kind =
        Kind { group: "/apis/cert-manager.io/v1", plural: "clusterissuers", name: "ClusterIssuer" };
    pub const ISSUER: Kind = Kind { group: "/apis/cert-manager.io/v1", plural: "issuers", name: "Issuer" };

    const ALL: [Kind; 10] = [
        Self::SLICE,
        Self::ENDPOINTS,
        Self::SERVICE,
        Self::POD,
        Self::SECRET,
        Self::CONFIG_MAP,
        Self::WEBHOOK,
        Self::CERTIFICATE_REQUEST,
        Self::CLUSTER_ISSUER,
        Self::ISSUER,
    ];

    pub(super) fn find(group: &str, plural: &str) -> Option<Kind> {
        Self::ALL.into_iter().find(|kind| kind.group == group && kind.plural == plural)
    }

    pub(super) fn api_version(self) -> String {
        self.group.trim_start_matches("/apis/").trim_start_matches("/api/").to_owned()
    }
}

/// What a client wants of a kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    pub namespace: Option<String>,
    pub labels: String,
    pub fields: String,
}

/// What has happened to an object.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub version: u64,
    pub kind: Kind,
    /// Before and after.
    pub before: Option<Value>,
    pub after: Option<Value>,
}

pub(super) struct Objects {
    objects: BTreeMap<(Kind, String, String), Value>,
    pub version: u64,
    /// The history is known after this version.
    pub compacted: u64,
    history: Vec<Event>,
}

impl Objects {
    pub(super) fn new() -> Self {
        Self { objects: BTreeMap::new(), version: 1, compacted: 0, history: Vec::new() }
    }

    pub(super) fn put(&mut self, kind: Kind, mut object: Value) -> Value {
        self.version += 1;
        object["apiVersion"] = json!(kind.api_version());
        object["kind"] = json!(kind.name);
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let (namespace, name) = place(&object);
        let key = (kind, namespace, name);
        let before = self.objects.insert(key, object.clone());
        let after = Some(object.clone());
        self.history.push(Event { version: self.version, kind, before, after });
        object
    }

    pub(super) fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        let mut before = self.objects.remove(&(kind, namespace.to_owned(), name.to_owned()))?;
        self.version += 1;
        before["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.history.push(Event { version: self.version, kind, before: Some(before.clone()), after: None });
        Some(before)
    }

    pub(super) fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        self.objects.get(&(kind, namespace.to_owned(), name.to_owned())).cloned()
    }

    pub(super) fn list(&self, kind: Kind, filter: &Filter) -> Vec<Value> {
        let of_kind = self.objects.iter().filter(|((of, ..), _)| *of == kind);
        of_kind.map(|(_, object)| object).filter(|object| filter.fits(object)).cloned().collect()
    }

    /// What has happened after a version, as a watch tells it; the last version that was looked at is given, too.
    pub(super) fn after(&self, version: u64, kind: Kind, filter: &Filter) -> (Vec<Value>, u64) {
        let events = self.history.iter().filter(|event| event.version > version && event.kind == kind);
        let told = events.filter_map(|event| {
            let fits = |object: &&Value| filter.fits(object);
            let (before, after) = (event.before.as_ref().filter(fits), event.after.as_ref().filter(fits));
            let (kind, object) = match (before, after) {
                (None, None) => return None,
                (None, Some(after)) => ("ADDED", after.clone()),
                (Some(_), Some(after)) => ("MODIFIED", after.clone()),
                // Also of what fits no more.
                (Some(before), None) => {
                    let mut gone = before.clone();
                    gone["metadata"]["resourceVersion"] = json!(event.version.to_string());
                    ("DELETED", gone)
                }
            };
            Some(json!({"type": kind, "object": object}))
        });
        (told.collect(), self.version)
    }

    pub(super) fn compact(&mut self) {
        // A change that nobody sees, so that even the newest version that clients know is too old.
        self.version += 1;
        self.compacted = self.version;
        self.history.clear();
    }

    pub(super) fn rewind(&mut self) {
        self.version = 2;
        self.compacted = 0;
        self.history.clear();
        for object in self.objects.values_mut() {
            object["metadata"]["resourceVersion"] = json!("2");
        }
    }
}

impl Filter {
    pub(super) fn fits(&self, object: &Value) -> bool {
        let (namespace, name) = place(object);
        if self.namespace.as_ref().is_some_and(|wanted| *wanted != namespace) {
            return false;
        }
        let label = |key: &str| object["metadata"]["labels"][key].as_str().map(str::to_owned);
        let field = |key: &str| match key {
            "metadata.name" => Some(name.clone()),
            "metadata.namespace" => Some(namespace.clone()),
            _ => None,
        };
        selects(&self.labels, label) && selects(&self.fields, field)
    }
}

/// The equality-based selectors of Kubernetes: `a=b,c!=d,e,!f`.
fn selects(selector: &str, value: impl Fn(&str) -> Option<String>) -> bool {
    selector.split(',').map(str::trim).filter(|term| !term.is_empty()).all(|term| {
        if let Some((key, wanted)) = term.split_once("!=") {
            value(key.trim()).as_deref() != Some(wanted.trim())
        } else if let Some((key, wanted)) = term.split_once('=') {
            value(key.trim()).as_deref() == Some(wanted.trim_start_matches('=').trim())
        } else if let Some(key) = term.strip_prefix('!') {
            value(key.trim()).is_none()
        } else {
            value(term).is_some()
        }
    })
}

/// Namespace and name of an object.
pub(super) fn place(object: &Value) -> (String, String) {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

/// RFC 7386.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            target.as_object_mut().expect("an object").remove(name);
        } else {
            merge(&mut target[name], value);
        }
    }
}
