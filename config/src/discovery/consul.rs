//! `discovery.consul`: clusters of Consul, by their health endpoint.
//!
//! The keys of APISIX mean what they mean there. Each of `servers` is a cluster of its own; what they list for a service is
//! merged. Keys that are ours are marked as extensions.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Registry;
use super::tls::RegistryTls;
use crate::error::{ConfigError, ErrorKind};
use crate::fields::{Int, Seconds};
use crate::sensitive::Sensitive;

/// Clusters of Consul.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Consul {
    /// The clusters: `http(s)://host:port` of a server or agent of each.
    #[schemars(length(min = 1))]
    pub servers: Vec<String>,
    /// The ACL token. It needs `service:read` and `node:read`.
    #[serde(default, skip_serializing)]
    pub token: Option<Sensitive<0, 4096>>,
    /// Extension: a file with the token, which may be written anew at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Services that are never looked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip_services: Vec<String>,
    /// How long is waited for what.
    #[serde(default)]
    pub timeout: Timeout,
    /// What the weights that services are registered with are multiplied by.
    #[serde(default)]
    pub weight: Int<1, 65535>,
    /// Ask questions that wait for a change.
    #[serde(default = "yes")]
    pub keepalive: bool,
    /// Seconds between questions that do not wait: without `keepalive`, and for services beyond `max_watches`.
    #[serde(default)]
    pub fetch_interval: Int<1, 3600, 3>,
    /// The order of nodes in APISIX. Changes nothing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sort_type: Option<SortType>,
    /// A node that stands in for services without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_service: Option<DefaultService>,
    /// The file in which APISIX keeps the last nodes. Changes nothing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dump: Option<Dump>,
    /// Memory for nodes in APISIX. Changes nothing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_size: Option<String>,
    /// Extension: the datacenter that is asked for. That of the agent if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datacenter: Option<String>,
    /// Extension: the namespace, of Consul Enterprise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Extension: the partition, of Consul Enterprise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<String>,
    /// Extension: TLS to `https` servers.
    #[serde(default)]
    pub tls: RegistryTls,
    /// Extension: tags of which an instance has to have all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Extension: an expression in Consul's language for filters that has to hold for an instance:
    /// `Service.Meta.version == "2"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Extension: only instances all of whose checks pass; otherwise those with a warning are used as well, with the weight
    /// they are registered with for that state.
    #[serde(default)]
    pub passing: bool,
    /// Extension: what becomes of instances with a critical check.
    #[serde(default)]
    pub critical: Critical,
    /// Extension: any server may answer, not only the leader.
    #[serde(default = "yes")]
    pub stale: bool,
    /// Extension: how long ago, in seconds, the server that answers may have heard of its leader.
    #[serde(default = "max_stale")]
    pub max_stale: Seconds,
    /// Extension: which of the tagged addresses of an instance is used: `wan`, `lan_ipv6`. An instance without it is used by
    /// its plain address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tagged_address: Option<String>,
    /// Extension: the names of metadata that say where and what an instance is.
    #[serde(default)]
    pub meta: MetaKeys,
    /// Extension: services whose questions wait for a change at the same time, each on a connection of its own; others are
    /// asked every `fetch_interval`. Consul takes `http_max_conns_per_client` connections from one address, 200 unless it is
    /// configured otherwise.
    #[serde(default)]
    pub max_watches: Int<0, 65535, 150>,
}

/// How long is waited for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Timeout {
    /// Milliseconds to a connection.
    pub connect: Int<1, 600_000, 2000>,
    /// Milliseconds to an answer that does not wait.
    pub read: Int<1, 600_000, 2000>,
    /// Seconds that a question waits for a change. 55, so that nothing on the way takes the connection for idle after a
    /// minute; 60 in APISIX.
    pub wait: Int<1, 600, 55>,
}

impl Timeout {
    /// `connect`.
    #[must_use]
    pub fn connect(&self) -> Duration {
        Duration::from_millis(self.connect.get().into())
    }

    /// `read`.
    #[must_use]
    pub fn read(&self) -> Duration {
        Duration::from_millis(self.read.get().into())
    }

    /// `wait`.
    #[must_use]
    pub fn wait(&self) -> Duration {
        Duration::from_secs(self.wait.get().into())
    }
}

/// The order of nodes in APISIX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SortType {
    Origin,
    HostSort,
    PortSort,
    CombineSort,
}

/// A node that stands in for services without any.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DefaultService {
    /// An address or a name.
    #[schemars(length(min = 1))]
    pub host: String,
    /// Its port.
    pub port: Int<1, 65535>,
    /// Read and not used, as in APISIX.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<serde_json::Map<String, serde_json::Value>>,
}

/// The file in which APISIX keeps the last nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dump {
    /// Its path.
    #[schemars(length(min = 1))]
    pub path: String,
    /// Read it at start.
    #[serde(default = "yes")]
    pub load_on_init: bool,
    /// Seconds after which it is not read.
    #[serde(default)]
    pub expire: u64,
}

/// What becomes of instances with a critical check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Critical {
    /// They are left out.
    #[default]
    Drop,
    /// They are known as unhealthy, and used when nothing better is left.
    Keep,
}

/// The names of metadata that say where and what an instance is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MetaKeys {
    /// The region it is in.
    pub region: String,
    /// The zone it is in.
    pub zone: String,
    /// Its SPIFFE id.
    pub identity: String,
}

impl Default for MetaKeys {
    fn default() -> Self {
        Self { region: "region".to_owned(), zone: "zone".to_owned(), identity: "mesh-identity".to_owned() }
    }
}

pub(super) fn yes() -> bool {
    true
}

pub(super) fn max_stale() -> Seconds {
    Seconds::whole(30)
}

/// What is wrong with the places of servers and their token, for every kind that asks Consul.
pub(super) fn check_servers(
    servers: &[String],
    token: Option<&Sensitive<0, 4096>>,
    token_file: Option<&PathBuf>,
    errors: &mut Vec<ConfigError>,
) {
    if servers.is_empty() {
        errors.push(ConfigError::invalid("/servers", "write at least one server"));
    }
    for (index, server) in servers.iter().enumerate() {
        let pointer = format!("/servers/{index}");
        let bare = server.strip_prefix("http://").or_else(|| server.strip_prefix("https://"));
        if bare.is_none_or(|bare| bare.is_empty() || bare.contains(['/', '?', '#', ' '])) {
            // It may hold a password.
            let found = server.rsplit_once('@').map_or(server.as_str(), |(_, rest)| rest).to_owned();
            let expected = "a server of the form `http(s)://host:port`, without a path".to_owned();
            errors.push(ConfigError::new(pointer, ErrorKind::BadFormat { found, expected }));
        } else if servers.iter().take(index).any(|other| other == server) {
            errors.push(ConfigError::new(pointer, ErrorKind::Duplicate));
        }
    }
    if token.is_some_and(|token| !token.reveal().is_empty()) && token_file.is_some() {
        let kind = ErrorKind::Exclusive { one: "token", other: "token_file" };
        errors.push(ConfigError::new("/token_file", kind));
    }
}

/// Why the keys of APISIX that concern its own memory and files are read and change nothing.
pub(super) const DUMP: &str = "the last lists of every registry are kept in the data directory by themselves";

impl Registry for Consul {
    const KIND: &'static str = "consul";

    fn check(&self, errors: &mut Vec<ConfigError>) {
        check_servers(&self.servers, self.token.as_ref(), self.token_file.as_ref(), errors);
        self.tls.check("/tls", errors);
    }

    fn not_applicable(&self) -> Vec<(&'static str, &'static str)> {
        let mut keys = Vec::new();
        if self.dump.is_some() {
            keys.push(("/dump", DUMP));
        }
        if self.sort_type.is_some_and(|order| order != SortType::Origin) {
            keys.push((
                "/sort_type",
                "nodes have the same order in every gateway, whatever order they are listed in",
            ));
        }
        if self.shared_size.is_some() {
            keys.push(("/shared_size", "what is known of services is memory of the process"));
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;
    use crate::discovery::Discovery;

    fn read(written: serde_json::Value) -> (Option<Box<Consul>>, Vec<String>) {
        let written = json!({ "consul": written });
        let (discovery, errors) = Discovery::read(written.as_object().unwrap());
        (discovery.consul, errors.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_apisix_documents_is_read() {
        let (consul, errors) = read(json!({
            "servers": ["http://127.0.0.1:8500", "http://127.0.0.1:8600"],
            "token": "secret",
            "skip_services": ["service_a"],
            "timeout": {"connect": 1000, "read": 1000, "wait": 60},
            "weight": 1, "fetch_interval": 5, "keepalive": true, "sort_type": "combine_sort",
            "default_service": {
                "host": "127.0.0.1", "port": 20999,
                "metadata": {"fail_timeout": 1, "weight": 1, "max_fails": 1},
            },
            "dump": {"path": "logs/consul.dump", "expire": 2_592_000},
        }));
        assert!(errors.is_empty(), "{errors:?}");
        let consul = consul.unwrap();
        assert_eq!((consul.timeout.wait.get(), consul.fetch_interval.get()), (60, 5));
        assert!(!format!("{consul:?}").contains("secret"));
        let keys: Vec<_> = consul.not_applicable().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["/dump", "/sort_type"]);
    }

    #[test]
    fn defaults_are_those_of_apisix_but_the_wait() {
        let consul = read(json!({"servers": ["http://consul"]})).0.unwrap();
        assert_eq!(consul.timeout, Timeout::default());
        assert_eq!(consul.timeout.wait.get(), 55);
        assert!(consul.keepalive && consul.stale && !consul.passing);
        assert_eq!(consul.weight.get(), 1);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let server = "http://127.0.0.1:8500";
        for (written, expected) in [
            (json!({}), "servers"),
            (json!({"servers": []}), "/discovery/consul/servers"),
            (
                json!({"servers": ["127.0.0.1:8500"]}),
                "/discovery/consul/servers/0: `127.0.0.1:8500` is not a server",
            ),
            (json!({"servers": ["http://a:8500/v1"]}), "/discovery/consul/servers/0"),
            (json!({"servers": ["http://u:p@a:8500/"]}), "`a:8500/` is not"),
            (json!({"servers": [server, server]}), "/discovery/consul/servers/1"),
            (json!({"servers": [server], "token": "t", "token_file": "f"}), "/discovery/consul/token_file"),
            (json!({"servers": [server], "tls": {"cert_file": "c"}}), "/discovery/consul/tls/cert_file"),
            (json!({"servers": [server], "timeout": {"wait": 601}}), "/discovery/consul/timeout/wait"),
            (json!({"servers": [server], "wieght": 1}), "did you mean `weight`"),
        ] {
            let (consul, errors) = read(written.clone());
            assert!(consul.is_none(), "{written}");
            assert!(errors.iter().any(|error| error.contains(expected)), "{written}: {errors:?}");
        }
    }
}
