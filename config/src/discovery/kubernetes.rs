//! `discovery.kubernetes`: the Kubernetes API servers that are watched.
//!
//! One cluster is an object, several are a list of objects with an `id` each, as in APISIX. Without `service` the cluster
//! is the one that this process runs in. Host, port and token may be `${NAME}`, a variable of the environment that is
//! read at the start.

use std::borrow::Cow;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Serialize};

use crate::discovery::Registry;
use crate::error::ConfigError;
use crate::pattern;
use crate::sensitive::Sensitive;

/// The clusters, in the order in which they are written.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Kubernetes {
    pub clusters: Vec<Cluster>,
}

impl Registry for Kubernetes {
    const KIND: &'static str = "kubernetes";

    fn check(&self, errors: &mut Vec<ConfigError>) {
        for (index, cluster) in self.clusters.iter().enumerate() {
            let mut found = Vec::new();
            cluster.check(self.clusters.len() > 1, &mut found);
            if cluster.id.is_some() && self.clusters.iter().take(index).any(|other| other.id == cluster.id) {
                found.push(ConfigError::invalid("/id", "another cluster has this id: write a different one"));
            }
            // The pointer of the only cluster is that of the object itself where it was written as one; with an id it
            // was an element of a list.
            let under = match self.clusters.len() {
                1 if cluster.id.is_none() => String::new(),
                _ => format!("/{index}"),
            };
            errors.extend(found.into_iter().map(|error| error.under(&under)));
        }
        if self.clusters.is_empty() {
            errors.push(ConfigError::invalid(
                "",
                "the list is empty: write a cluster, or an object without keys",
            ));
        }
    }
}

/// One cluster.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Its name in `service_name`, in front of the namespace. Needed where there are several.
    pub id: Option<String>,
    /// Where its API server is.
    pub service: Option<ApiServer>,
    /// Who asks.
    #[serde(default)]
    pub client: Client,
    /// A kubeconfig file that says both, in place of `service` and `client`. Where neither is written and this process
    /// does not run in a pod, the file named by the variable `KUBECONFIG` is used. Extension.
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig file; its current one where this is not written. Extension.
    pub context: Option<String>,
    /// Which namespaces are watched.
    #[serde(default)]
    pub namespace_selector: NamespaceSelector,
    /// Only objects with these labels are watched, in the syntax of Kubernetes.
    pub label_selector: Option<String>,
    /// The weight of each endpoint.
    #[serde(default = "default_weight")]
    pub default_weight: u32,
    /// Size of a shared memory zone. Nothing here.
    pub shared_size: Option<String>,
    /// `true`: EndpointSlices; `false`: the older Endpoints objects. Not written: EndpointSlices where the cluster has
    /// them, else Endpoints.
    #[serde(alias = "watch_endpoint_slices_schema")]
    pub watch_endpoint_slices: Option<bool>,
    /// After how long the API server is to end a watch, in seconds.
    #[serde(default = "watch_timeout")]
    #[schemars(range(min = 5, max = 86_400))]
    pub watch_timeout_seconds: u64,
    /// Up to this much is added at random, in seconds.
    #[serde(default)]
    #[schemars(range(max = 86_400))]
    pub watch_jitter_seconds: u64,
    /// The first pause after a failure, in seconds; 0 is a tenth of one.
    #[serde(default)]
    #[schemars(range(max = 3_600))]
    pub watch_retry_interval_seconds: u64,
    /// The longest pause after failures, in seconds.
    #[serde(default = "watch_retry_max")]
    #[schemars(range(max = 3_600))]
    pub watch_retry_max_seconds: u64,
    /// How often everything is listed again even though nothing failed, in seconds, give or take a third. Extension.
    #[serde(default = "relist")]
    #[schemars(range(min = 10, max = 86_400))]
    pub relist_seconds: u64,
    /// How long the API server may take to begin an answer, and to continue a list that it has begun, in seconds.
    /// Extension.
    #[serde(default = "request_timeout")]
    #[schemars(range(min = 1, max = 300))]
    pub request_timeout_seconds: u64,
}

/// Where an API server is.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApiServer {
    /// `http` or `https`.
    #[serde(default)]
    pub schema: Scheme,
    /// A name, an address, or `${NAME}`.
    #[serde(default = "service_host")]
    pub host: String,
    /// A number, or `${NAME}`.
    #[serde(default)]
    pub port: Port,
}

/// How the API server is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    Http,
    #[default]
    Https,
}

/// A port as it is written: APISIX wants text, a number is taken too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Port(pub String);

/// Who asks.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// A token, or `${NAME}`.
    #[schemars(extend("x-encrypted" = true))]
    pub token: Option<Sensitive<1, 16_384>>,
    /// A file with the token, read again for each request. That of the pod's service account where nothing is written.
    pub token_file: Option<String>,
    /// A certificate to show, in PEM.
    pub cert_file: Option<String>,
    /// Its key, in PEM.
    pub key_file: Option<String>,
    /// Whether the API server's certificate is checked.
    #[serde(default = "yes")]
    pub ssl_verify: bool,
    /// The certificates that the API server's may be signed by, in PEM. Those of the pod's service account where there is
    /// one, else those of the system. Extension.
    pub ca_file: Option<String>,
}

impl Default for Client {
    fn default() -> Self {
        Self {
            token: None,
            token_file: None,
            cert_file: None,
            key_file: None,
            ssl_verify: true,
            ca_file: None,
        }
    }
}

/// Which namespaces are watched; one of the four at most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NamespaceSelector {
    /// This one. Rights in this namespace are enough.
    pub equal: Option<String>,
    /// All but this one.
    pub not_equal: Option<String>,
    /// Those that one of these patterns fits as a whole.
    #[schemars(length(min = 1))]
    pub r#match: Option<Vec<String>>,
    /// Those that none of these patterns fits as a whole.
    #[schemars(length(min = 1))]
    pub not_match: Option<Vec<String>>,
}

fn default_weight() -> u32 {
    50
}

fn watch_timeout() -> u64 {
    290
}

fn watch_retry_max() -> u64 {
    5
}

fn relist() -> u64 {
    900
}

fn request_timeout() -> u64 {
    10
}

fn service_host() -> String {
    "${KUBERNETES_SERVICE_HOST}".to_owned()
}

fn yes() -> bool {
    true
}

impl Cluster {
    /// A cluster with every default.
    #[must_use]
    pub fn new() -> Self {
        Self {
            default_weight: default_weight(),
            watch_timeout_seconds: watch_timeout(),
            watch_retry_max_seconds: watch_retry_max(),
            relist_seconds: relist(),
            request_timeout_seconds: request_timeout(),
            ..Self::default()
        }
    }

    fn check(&self, several: bool, errors: &mut Vec<ConfigError>) {
        let mut wrong = |pointer: &str, problem: String| errors.push(ConfigError::invalid(pointer, problem));
        match &self.id {
            Some(id) if !is_id(id) => {
                wrong("/id", "1 to 8 small letters and digits are allowed".to_owned());
            }
            None if several => wrong("/id", "missing: each of several clusters needs one".to_owned()),
            _ => {}
        }
        let client = &self.client;
        if client.cert_file.is_some() != client.key_file.is_some() {
            wrong("/client", "`cert_file` and `key_file` are needed together".to_owned());
        }
        if self.kubeconfig.is_some() && self.service.is_some() {
            wrong("/service", "`kubeconfig` says where the API server is: write one of them".to_owned());
        }
        if let Some(port) = self.service.as_ref().map(|service| &service.port)
            && variable(&port.0).is_none()
            && !port.0.parse::<u16>().is_ok_and(|port| port > 0)
        {
            wrong("/service/port", "not a port: write a number from 1 to 65535, or ${NAME}".to_owned());
        }
        self.namespace_selector.check(errors);
    }
}

impl NamespaceSelector {
    fn check(&self, errors: &mut Vec<ConfigError>) {
        let written = [
            self.equal.is_some(),
            self.not_equal.is_some(),
            self.r#match.is_some(),
            self.not_match.is_some(),
        ];
        if written.iter().filter(|written| **written).count() > 1 {
            let problem =
                "`equal`, `not_equal`, `match` and `not_match` exclude each other: write one of them";
            errors.push(ConfigError::invalid("/namespace_selector", problem));
        }
        for (name, patterns) in [("match", &self.r#match), ("not_match", &self.not_match)] {
            for (index, pattern) in patterns.iter().flatten().enumerate() {
                if let Err(error) = pattern::compile(pattern, false) {
                    let pointer = format!("/namespace_selector/{name}/{index}");
                    errors.push(ConfigError::invalid(pointer, error.to_string()));
                }
            }
        }
    }
}

fn is_id(id: &str) -> bool {
    (1..=8).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// The name of the variable that `text` stands for: `${NAME}` as a whole.
#[must_use]
pub fn variable(text: &str) -> Option<&str> {
    let name = text.strip_prefix("${")?.strip_suffix('}')?;
    let fits = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    fits.then_some(name)
}

impl Default for Port {
    fn default() -> Self {
        Self("${KUBERNETES_SERVICE_PORT}".to_owned())
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortVisitor;

        impl Visitor<'_> for PortVisitor {
            type Value = Port;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a port, as text or number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Port, E> {
                Ok(Port(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Port, E> {
                Ok(Port(number.to_string()))
            }
        }

        deserializer.deserialize_any(PortVisitor)
    }
}

impl JsonSchema for Port {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Port".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["string", "integer"]})
    }
}

impl<'de> Deserialize<'de> for Kubernetes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Clusters;

        impl<'de> Visitor<'de> for Clusters {
            type Value = Kubernetes;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object for one cluster, or a list of them")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Kubernetes, A::Error> {
                Cluster::deserialize(MapAccessDeserializer::new(map))
                    .map(|cluster| Kubernetes { clusters: vec![cluster] })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Kubernetes, A::Error> {
                let mut clusters = Vec::new();
                while let Some(cluster) = list.next_element()? {
                    clusters.push(cluster);
                }
                Ok(Kubernetes { clusters })
            }
        }

        deserializer.deserialize_any(Clusters)
    }
}

impl JsonSchema for Kubernetes {
    fn schema_name() -> Cow<'static, str> {
        "Kubernetes".into()
    }

    /// One schema for both forms, so that an error names the key that is wrong and not the form that was not meant.
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = Cluster::json_schema(generator);
        schema.insert("type".to_owned(), serde_json::json!(["object", "array"]));
        schema.insert("items".to_owned(), generator.subschema_for::<Cluster>().to_value());
        schema
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::*;
    use crate::typed;

    fn problems(written: &Value) -> Vec<String> {
        let errors = match typed::parse::<Kubernetes>(written) {
            Ok(settings) => {
                let mut errors = Vec::new();
                settings.check(&mut errors);
                errors
            }
            Err(errors) => errors,
        };
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn both_forms_are_read_with_apisix_defaults() {
        let one: Kubernetes = typed::parse(&json!({})).unwrap();
        let [cluster] = one.clusters.as_slice() else { panic!("one cluster") };
        assert_eq!((cluster.default_weight, cluster.watch_endpoint_slices), (50, None));
        assert!(cluster.service.is_none() && cluster.client.ssl_verify);

        let written = json!([
            {"id": "a", "service": {"host": "a.test", "port": "6443"}, "client": {"token": "${TOKEN}"},
             "namespace_selector": {"match": ["default", "^my-[a-z]+$"]}, "shared_size": "1m"},
            {"id": "b", "service": {"schema": "http", "host": "10.0.0.1", "port": 8080},
             "client": {"token_file": "/t"}, "label_selector": "first=\"a\"", "watch_endpoint_slices": true},
        ]);
        let several: Kubernetes = typed::parse(&written).unwrap();
        assert_eq!(problems(&written), [""; 0]);
        let ports: Vec<_> =
            several.clusters.iter().filter_map(|it| it.service.as_ref()).map(|it| &*it.port.0).collect();
        assert_eq!(ports, ["6443", "8080"]);
    }

    #[test]
    fn what_does_not_fit_is_told_with_its_pointer() {
        for (written, pointer) in [
            (json!({"namespace_selector": {"equal": "a", "not_equal": "b"}}), "/namespace_selector: "),
            (json!({"namespace_selector": {"match": ["("]}}), "/namespace_selector/match/0: "),
            (json!({"service": {"host": "a", "port": "x"}}), "/service/port: "),
            (json!({"service": {"host": "a", "port": 0}}), "/service/port: "),
            (json!({"client": {"cert_file": "/c"}}), "/client: "),
            (json!({"clint": {}}), "/clint: "),
            (json!({"watch_timeout_seconds": "x"}), "/watch_timeout_seconds: "),
            (json!({"kubeconfig": "/k", "service": {"host": "a", "port": "1"}}), "/service: "),
            (json!([{"id": "a"}, {"service": {}}]), "/1/id: "),
            (json!([{"id": "a"}, {"id": "a"}]), "/1/id: "),
            (json!([{"id": "Long-one-here"}]), "/0/id: "),
            (json!([{"id": "a", "servce": {}}]), "/0/servce: "),
            (json!([]), ""),
            (json!("x"), ""),
        ] {
            let problems = problems(&written);
            assert!(problems.iter().any(|problem| problem.starts_with(pointer)), "{written}: {problems:?}");
        }
    }

    #[test]
    fn a_variable_is_the_whole_text() {
        for (text, name) in [
            ("${A_1}", Some("A_1")),
            ("${}", None),
            ("x${A}", None),
            ("${A}x", None),
            ("${a-b}", None),
            ("A", None),
        ] {
            assert_eq!(variable(text), name, "{text}");
        }
    }
}
