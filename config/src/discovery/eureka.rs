//! `discovery.eureka`: Eureka by its HTTP API.
//!
//! The keys of APISIX mean what they mean there.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Registry;
use super::polled::{HostUrl, Timeout, check_hosts};
use super::tls::RegistryTls;
use crate::error::ConfigError;
use crate::fields::Int;

/// The hosts of one Eureka, and how they are asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Eureka {
    /// `http(s)://[user:password@]host[:port]`. All know the same; one of them is asked.
    #[serde(skip_serializing)]
    #[schemars(length(min = 1, max = 64))]
    pub host: Vec<HostUrl>,
    /// Where the API is: `/eureka/`.
    #[serde(default)]
    pub prefix: String,
    /// Seconds between two questions for an application.
    #[serde(default)]
    pub fetch_interval: Int<1, 86_400, 30>,
    /// The weight of instances without `weight` in their metadata.
    #[serde(default)]
    pub weight: Int<0, 65_535, 100>,
    /// How long is waited for what.
    #[serde(default)]
    pub timeout: Timeout,
    /// Extension: TLS to `https` hosts.
    #[serde(default)]
    pub tls: RegistryTls,
}

impl Eureka {
    /// The hosts with the prefix, and with credentials.
    pub fn hosts(&self) -> impl Iterator<Item = String> {
        let prefix = self.prefix.trim_matches('/');
        self.host.iter().map(move |host| format!("{}/{prefix}", host.reveal().trim_end_matches('/')))
    }

    /// `weight`.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.weight.get()
    }

    /// `fetch_interval`.
    #[must_use]
    pub fn interval(&self) -> Duration {
        Duration::from_secs(self.fetch_interval.get().into())
    }
}

impl Registry for Eureka {
    const KIND: &'static str = "eureka";

    fn check(&self, errors: &mut Vec<ConfigError>) {
        check_hosts(&self.host, errors);
        self.tls.check("/tls", errors);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::super::Discovery;

    #[test]
    fn the_keys_of_apisix_are_read() {
        let written = json!({"eureka": {
            "host": ["http://user:word@127.0.0.1:8761", "http://127.0.0.1:8762/"], "prefix": "/eureka/",
            "fetch_interval": 10, "weight": 0, "timeout": {"connect": 100, "send": 100, "read": 100},
        }});
        let (discovery, errors) = Discovery::read(written.as_object().unwrap());
        assert!(errors.is_empty(), "{errors:?}");
        let eureka = discovery.eureka.unwrap();
        let hosts: Vec<String> = eureka.hosts().collect();
        assert_eq!(hosts, ["http://user:word@127.0.0.1:8761/eureka", "http://127.0.0.1:8762/eureka"]);
        assert_eq!((eureka.weight(), eureka.interval().as_secs()), (0, 10));

        let wrong = json!({"eureka": {"host": ["eureka:8761"], "weight": -1}});
        let (discovery, errors) = Discovery::read(wrong.as_object().unwrap());
        assert!(discovery.eureka.is_none() && !errors.is_empty());
    }
}
