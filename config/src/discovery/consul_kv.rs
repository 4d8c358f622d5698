//! `discovery.consul_kv`: nodes as keys of Consul's KV store, `PREFIX/SERVICE/HOST:PORT`, as nginx-upsync-module writes them.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Registry;
use super::consul::{self, DefaultService, Dump, Timeout};
use super::tls::RegistryTls;
use crate::error::ConfigError;
use crate::fields::{Int, Seconds};
use crate::sensitive::Sensitive;

/// Nodes in the KV stores of clusters of Consul.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsulKv {
    /// The clusters: `http(s)://host:port` of a server or agent of each.
    #[schemars(length(min = 1))]
    pub servers: Vec<String>,
    /// The ACL token. It needs `key:read` below `prefix`.
    #[serde(default, skip_serializing)]
    pub token: Option<Sensitive<0, 4096>>,
    /// Extension: a file with the token, which may be written anew at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// What stands before every service.
    #[serde(default = "upstreams")]
    #[schemars(length(min = 1))]
    pub prefix: String,
    /// Services that are never looked for: `upstreams/unused_api/`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip_keys: Vec<String>,
    /// How long is waited for what.
    #[serde(default)]
    pub timeout: Timeout,
    /// The weight of nodes whose value names none.
    #[serde(default)]
    pub weight: Int<1, 65535>,
    /// Ask questions that wait for a change.
    #[serde(default = "consul::yes")]
    pub keepalive: bool,
    /// Seconds between questions that do not wait: without `keepalive`, and for services beyond `max_watches`.
    #[serde(default)]
    pub fetch_interval: Int<1, 3600, 3>,
    /// A node that stands in for services without any. APISIX's page calls it `default_server`, its schema
    /// `default_service`.
    #[serde(default, alias = "default_server", skip_serializing_if = "Option::is_none")]
    pub default_service: Option<DefaultService>,
    /// The file in which APISIX keeps the last nodes. Changes nothing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dump: Option<Dump>,
    /// Extension: the datacenter that is asked for. That of the agent if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datacenter: Option<String>,
    /// Extension: TLS to `https` servers.
    #[serde(default)]
    pub tls: RegistryTls,
    /// Extension: any server may answer, not only the leader.
    #[serde(default = "consul::yes")]
    pub stale: bool,
    /// Extension: how long ago, in seconds, the server that answers may have heard of its leader.
    #[serde(default = "consul::max_stale")]
    pub max_stale: Seconds,
    /// Extension: services whose questions wait for a change at the same time.
    #[serde(default)]
    pub max_watches: Int<0, 65535, 150>,
}

fn upstreams() -> String {
    "upstreams".to_owned()
}

impl Registry for ConsulKv {
    const KIND: &'static str = "consul_kv";

    fn check(&self, errors: &mut Vec<ConfigError>) {
        consul::check_servers(&self.servers, self.token.as_ref(), self.token_file.as_ref(), errors);
        self.tls.check("/tls", errors);
    }

    fn not_applicable(&self) -> Vec<(&'static str, &'static str)> {
        self.dump.iter().map(|_| ("/dump", consul::DUMP)).collect()
    }
}
