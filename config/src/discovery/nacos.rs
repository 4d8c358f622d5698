//! `discovery.nacos`: Nacos by its HTTP API.
//!
//! The keys of APISIX mean what they mean there.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Registry;
use super::polled::{Host, Timeout, check_hosts};
use super::tls::RegistryTls;
use crate::error::{ConfigError, ErrorKind};
use crate::fields::Int;
use crate::sensitive::Sensitive;

pub use super::polled::{Credentials, HostUrl};

/// The hosts of one Nacos, and how they are asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nacos {
    /// `http(s)://[user:password@]host[:port]`. All know the same; one of them is asked.
    #[serde(skip_serializing)]
    #[schemars(length(min = 1, max = 64))]
    pub host: Vec<HostUrl>,
    /// Where the API is.
    #[serde(default = "prefix")]
    pub prefix: String,
    /// Seconds between two questions for a service.
    #[serde(default)]
    pub fetch_interval: Int<1, 86_400, 30>,
    /// The weight of instances that are registered without one.
    #[serde(default)]
    pub weight: Int<1, 65_535, 100>,
    /// How long is waited for what.
    #[serde(default)]
    pub timeout: Timeout,
    /// Extension: TLS to `https` hosts.
    #[serde(default)]
    pub tls: RegistryTls,
    /// The id of a key with which questions are signed (MSE of Alibaba Cloud).
    #[serde(default)]
    pub access_key: String,
    /// The secret of that key.
    #[serde(default, skip_serializing)]
    pub secret_key: Option<Sensitive<0, 4096>>,
}

/// A key with which questions are signed.
#[derive(Clone, Copy, Debug)]
pub struct Key<'a> {
    /// `access_key`.
    pub id: &'a str,
    /// `secret_key`.
    pub secret: &'a str,
}

fn prefix() -> String {
    "/nacos/v1/".to_owned()
}

impl Nacos {
    /// The hosts with the prefix.
    pub fn hosts(&self) -> impl Iterator<Item = Host> {
        self.host.iter().map(|host| Host::parse(host.reveal(), &self.prefix))
    }

    /// `fetch_interval`.
    #[must_use]
    pub fn interval(&self) -> Duration {
        Duration::from_secs(self.fetch_interval.get().into())
    }

    /// The key with which questions are signed, if they are.
    #[must_use]
    pub fn key(&self) -> Option<Key<'_>> {
        let secret = self.secret_key.as_ref()?.reveal();
        (!self.access_key.is_empty() && !secret.is_empty()).then_some(Key { id: &self.access_key, secret })
    }
}

impl Registry for Nacos {
    const KIND: &'static str = "nacos";

    fn check(&self, errors: &mut Vec<ConfigError>) {
        check_hosts(&self.host, errors);
        self.tls.check("/tls", errors);
        let secret = self.secret_key.as_ref().is_some_and(|secret| !secret.reveal().is_empty());
        let mut pair = |field: &str, needs, missing: bool| {
            if missing {
                errors.push(ConfigError::new(
                    format!("/{field}"),
                    ErrorKind::Needs { field: field.to_owned(), needs },
                ));
            }
        };
        pair("access_key", "secret_key", !self.access_key.is_empty() && !secret);
        pair("secret_key", "access_key", self.access_key.is_empty() && secret);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::super::Discovery;

    fn read(written: &Value) -> (Discovery, Vec<String>) {
        let (discovery, errors) = Discovery::read(json!({ "nacos": written }).as_object().unwrap());
        (discovery, errors.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_keys_of_apisix_are_read_and_credentials_are_not_shown() {
        let (discovery, errors) = read(&json!({
            "host": ["http://nacos:p%40ss:w@10.0.0.1:8848", "https://nacos.example.com/"], "fetch_interval": 5,
            "weight": 1, "timeout": {"connect": 1, "read": 2}, "access_key": "ak", "secret_key": "sk",
        }));
        assert_eq!(errors, Vec::<String>::new());
        let nacos = discovery.nacos.unwrap();
        let hosts: Vec<_> = nacos.hosts().collect();
        let urls: Vec<&str> = hosts.iter().map(|host| &*host.url).collect();
        assert_eq!(urls, ["http://10.0.0.1:8848/nacos/v1", "https://nacos.example.com/nacos/v1"]);
        let credentials = hosts[0].credentials.as_ref().unwrap();
        assert_eq!((&*credentials.username, credentials.password.reveal()), ("nacos", "p%40ss:w"));
        assert_eq!(hosts[1].credentials, None);
        assert_eq!(nacos.timeout.whole().as_millis(), 2003);
        assert_eq!(nacos.key().map(|key| (key.id, key.secret)), Some(("ak", "sk")));
        let (shown, written) = (format!("{nacos:?}"), serde_json::to_string(&nacos).unwrap());
        assert!(!shown.contains("p%40ss") && !written.contains("p%40ss"), "{shown} {written}");
    }

    #[test]
    fn what_does_not_fit_is_told_without_credentials() {
        for (written, told) in [
            (json!({}), "/discovery/nacos: `host` is missing"),
            (json!({"host": []}), "/discovery/nacos/host"),
            (json!({"host": ["u:secret@nacos:8848"]}), "/discovery/nacos/host/0: write http(s)://"),
            (json!({"host": ["http://n"], "fetch_interval": 0}), "/discovery/nacos/fetch_interval"),
            (json!({"host": ["http://n"], "access_key": "ak"}), "/discovery/nacos/access_key"),
            (json!({"host": ["https://n"], "tls": {"key_file": "k"}}), "/discovery/nacos/tls/key_file"),
            (json!({"host": ["http://n"], "hosts": []}), "/discovery/nacos/hosts: unknown field"),
        ] {
            let (discovery, errors) = read(&written);
            assert!(discovery.nacos.is_none(), "{written}");
            assert!(errors.iter().any(|error| error.contains(told)), "{written}: {errors:?}");
            assert!(!errors.iter().any(|error| error.contains("secret@")), "{errors:?}");
        }
    }
}
