//! `discovery.dns`: services by their name in DNS.
//!
//! The keys of APISIX mean what they mean there; keys that are ours are marked as extensions. Names of configured nodes are
//! resolved by the settings of `apisix.dns_resolver` and its neighbours, not by these.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Registry;
use crate::error::{ConfigError, ErrorKind};
use crate::fields::{Distinct, Int, List, Seconds};

/// Name servers and how services are looked for in them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Dns {
    /// Addresses of the name servers, with or without a port. Those of `resolv_conf` if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub servers: Option<List<NameServer>>,
    /// Where the name servers and the search list stand; read again when it changes. `/etc/resolv.conf` if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolv_conf: Option<PathBuf>,
    /// Which records are asked for. The first type that a name has is used; `last` is the one that has answered before, and
    /// aliases are followed with or without `CNAME`.
    pub order: Distinct<Record>,
    /// Extension: seconds that one question to one server may take.
    pub timeout: Seconds,
    /// Extension: rounds over the servers before a question counts as failed, the first over UDP and the others over TCP.
    pub attempts: Int<1, 10, 2>,
    /// Extension: an answer is kept at least so long, in seconds, whatever its own time to live.
    pub min_ttl: Int<1, 86_400, 1>,
    /// Extension: an answer is kept at most so long, in seconds.
    pub max_ttl: Int<1, 86_400, 300>,
    /// Extension: addresses that an answer leaves out stay for so long, in seconds: for servers that give a part of the
    /// set at a time. Not at all if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<Int<1, 86_400>>,
    /// Extension: apply the search list of `resolv_conf` to names that do not end in a dot.
    pub search: bool,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            servers: None,
            resolv_conf: None,
            order: Distinct::of_constants(vec![
                Record::Last,
                Record::Srv,
                Record::A,
                Record::Aaaa,
                Record::Cname,
            ]),
            timeout: Seconds::whole(2),
            attempts: Int::default(),
            min_ttl: Int::default(),
            max_ttl: Int::default(),
            accumulate: None,
            search: true,
        }
    }
}

impl Dns {
    /// The addresses of the name servers; none means those of a file.
    #[must_use]
    pub fn servers(&self) -> Vec<SocketAddr> {
        self.servers.iter().flatten().map(|server| server.0).collect()
    }

    /// `accumulate`.
    #[must_use]
    pub fn accumulate(&self) -> Option<Duration> {
        self.accumulate.map(|seconds| Duration::from_secs(seconds.get().into()))
    }
}

impl Registry for Dns {
    const KIND: &'static str = "dns";

    fn check(&self, errors: &mut Vec<ConfigError>) {
        if self.order.iter().all(|record| matches!(record, Record::Last | Record::Cname)) {
            let what = "no type of record leads to an address: write one or more of SRV, A and AAAA as well";
            errors.push(ConfigError::invalid("/order", what));
        }
        if self.max_ttl.get() < self.min_ttl.get() {
            let found = self.max_ttl.get().to_string();
            let allowed = format!("at least `min_ttl`, which is {}", self.min_ttl.get());
            errors
                .push(ConfigError::new("/max_ttl", ErrorKind::OutOfRange { what: "value", found, allowed }));
        }
    }
}

/// A type of record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Record {
    /// The type that has answered before goes first.
    #[serde(rename = "last")]
    Last,
    /// Hosts with ports, priorities and weights.
    Srv,
    /// IPv4.
    A,
    /// IPv6.
    Aaaa,
    /// Aliases, which are followed in any case.
    Cname,
}

/// The address of a name server, port 53 unless it is written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct NameServer(SocketAddr);

impl FromStr for NameServer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bare = || text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        let address = text.parse().ok().or_else(|| Some(SocketAddr::new(bare().parse::<IpAddr>().ok()?, 53)));
        address.map(Self).ok_or_else(|| format!("`{text}` is not the address of a name server"))
    }
}

impl TryFrom<String> for NameServer {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<NameServer> for String {
    fn from(server: NameServer) -> Self {
        server.0.to_string()
    }
}

impl fmt::Debug for NameServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::super::Discovery;

    fn read(written: &Value) -> (Discovery, Vec<String>) {
        let (discovery, errors) = Discovery::read(json!({ "dns": written }).as_object().unwrap());
        (discovery, errors.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_keys_of_apisix_and_ours_are_read() {
        let (discovery, errors) = read(&json!({
            "servers": ["127.0.0.1:8600", "10.0.0.53", "[::1]:5353", "::1"], "order": ["SRV", "A"],
            "min_ttl": 2, "accumulate": 300,
        }));
        assert_eq!(errors, Vec::<String>::new());
        let dns = discovery.dns.unwrap();
        let servers: Vec<String> = dns.servers().iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["127.0.0.1:8600", "10.0.0.53:53", "[::1]:5353", "[::1]:53"]);
        assert_eq!(dns.accumulate().map(|time| time.as_secs()), Some(300));
        assert_eq!((dns.min_ttl.get(), dns.max_ttl.get()), (2, 300));
        let (discovery, _) = read(&json!({}));
        assert_eq!(discovery.dns.unwrap().servers(), []);
    }

    #[test]
    fn what_does_not_fit_is_told() {
        for (written, told) in [
            (json!({"servers": []}), "/discovery/dns/servers"),
            (json!({"servers": ["ns.example.com"]}), "`ns.example.com` is not the address of a name server"),
            (json!({"order": ["last", "CNAME"]}), "/discovery/dns/order: no type of record leads"),
            (json!({"order": ["A", "A"]}), "/discovery/dns/order"),
            (json!({"order": ["MX"]}), "/discovery/dns/order/0"),
            (json!({"min_ttl": 500}), "/discovery/dns/max_ttl: value 300 is out of range"),
            (json!({"server": ["127.0.0.1"]}), "/discovery/dns/server: unknown field"),
        ] {
            let (discovery, errors) = read(&written);
            assert!(discovery.dns.is_none(), "{written}");
            assert!(errors.iter().any(|error| error.contains(told)), "{written}: {errors:?}");
        }
    }
}
