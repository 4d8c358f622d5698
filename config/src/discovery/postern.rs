//! `discovery.postern`: discovery servers, which are asked in place of the registries. Not a key of APISIX.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::discovery::{Discovery, Registry};
use crate::error::{ConfigError, ErrorKind, nearest};

/// Discovery servers.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Postern {
    /// `host:port` of each. One of them is used at a time.
    #[schemars(length(min = 1))]
    pub servers: Vec<String>,
    /// Kinds that are asked for at the servers: `discovery_type: consul` with `consul` in this list goes there. Others are
    /// reached by `discovery_type: postern` with their kind in front of `service_name`.
    #[serde(default)]
    pub kinds: Vec<String>,
    /// Without this, nothing is encrypted.
    pub tls: Option<Tls>,
}

/// How a discovery server is spoken to over TLS.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// What the server's certificate may be signed by, in PEM; those of the system where this is not written.
    pub ca_file: Option<PathBuf>,
    /// A certificate to show, in PEM.
    pub cert_file: Option<PathBuf>,
    /// Its key, in PEM.
    pub key_file: Option<PathBuf>,
    /// The name in the server's certificate, where it is not the host in `servers`.
    pub server_name: Option<String>,
}

impl Registry for Postern {
    const KIND: &'static str = "postern";

    fn check(&self, errors: &mut Vec<ConfigError>) {
        if self.servers.is_empty() {
            errors.push(ConfigError::invalid("/servers", "write at least one server, as `host:port`"));
        }
        for (index, server) in self.servers.iter().enumerate() {
            let port = server.rsplit_once(':').filter(|(host, _)| !host.is_empty());
            if !port.is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0)) {
                errors.push(ConfigError::invalid(format!("/servers/{index}"), "write `host:port`"));
            }
        }
        for (index, kind) in self.kinds.iter().enumerate() {
            if Self::kind(kind).is_none() {
                let kinds = || Discovery::KINDS.iter().copied().filter(|kind| *kind != Self::KIND);
                let error = ErrorKind::NotOneOf {
                    found: kind.clone(),
                    allowed: kinds().map(str::to_owned).collect(),
                    nearest: nearest(kind, kinds()).map(str::to_owned),
                };
                errors.push(ConfigError::new(format!("/kinds/{index}"), error));
            }
        }
        if let Some(tls) = &self.tls
            && tls.cert_file.is_some() != tls.key_file.is_some()
        {
            errors.push(ConfigError::invalid("/tls", "`cert_file` and `key_file` are needed together"));
        }
    }
}

impl Postern {
    /// The kind of this name, if a server can be asked for it.
    #[must_use]
    pub fn kind(name: &str) -> Option<&'static str> {
        Discovery::KINDS.iter().copied().find(|kind| *kind == name && *kind != Self::KIND)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;
    use crate::typed;

    #[test]
    fn what_does_not_fit_is_told_with_its_pointer() {
        for (written, pointer) in [
            (json!({"servers": ["a.test:1"], "kinds": ["consul", "kubernetes"]}), None),
            (json!({"servers": ["[::1]:1"], "tls": {}}), None),
            (json!({"servers": ["a.test"]}), Some("/servers/0: ")),
            (json!({"servers": [":80"]}), Some("/servers/0: ")),
            (json!({"servers": ["a:1"], "kinds": ["consl"]}), Some("/kinds/0: ")),
            (json!({"servers": ["a:1"], "kinds": ["postern"]}), Some("/kinds/0: ")),
            (json!({"servers": ["a:1"], "tls": {"cert_file": "/c"}}), Some("/tls: ")),
        ] {
            let mut errors = Vec::new();
            typed::parse::<Postern>(&written).unwrap().check(&mut errors);
            let told = errors.first().map(ToString::to_string);
            match pointer {
                None => assert_eq!(told, None, "{written}"),
                Some(pointer) => {
                    assert!(told.is_some_and(|told| told.starts_with(pointer)), "{written}: {errors:?}")
                }
            }
        }
    }
}
