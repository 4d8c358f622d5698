//! TLS to a registry, the same for every kind that is asked by HTTP.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{ConfigError, ErrorKind};

/// How `https` servers are checked, and what is shown to them. The files are read again when connections are opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryTls {
    /// File with the authorities in PEM. Those of the system if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// File with the client's certificate in PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_file: Option<PathBuf>,
    /// File with the key of the client's certificate in PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// The name in the server's certificate, where it is not the host of the URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// Check the server's certificate.
    pub verify: bool,
}

impl Default for RegistryTls {
    fn default() -> Self {
        Self { ca_file: None, cert_file: None, key_file: None, server_name: None, verify: true }
    }
}

impl RegistryTls {
    /// `at` is where it stands in the settings of its registry.
    pub(super) fn check(&self, at: &str, errors: &mut Vec<ConfigError>) {
        let mut pair = |field: &str, needs, missing: bool| {
            if missing {
                let kind = ErrorKind::Needs { field: field.to_owned(), needs };
                errors.push(ConfigError::new(format!("{at}/{field}"), kind));
            }
        };
        pair("cert_file", "key_file", self.cert_file.is_some() && self.key_file.is_none());
        pair("key_file", "cert_file", self.key_file.is_some() && self.cert_file.is_none());
    }
}
