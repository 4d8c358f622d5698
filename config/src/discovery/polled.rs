//! What registries have in common that are asked again and again at one of several hosts, as APISIX writes it.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ConfigError;
use crate::fields::{Int, Url};
use crate::sensitive::Sensitive;

/// How long is waited for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Timeout {
    /// Milliseconds to a connection.
    pub connect: Int<1, 600_000, 2000>,
    /// Milliseconds to the end of the question.
    pub send: Int<1, 600_000, 2000>,
    /// Milliseconds to the end of the answer.
    pub read: Int<1, 600_000, 5000>,
}

impl Timeout {
    /// `connect`.
    #[must_use]
    pub fn connect(&self) -> Duration {
        Duration::from_millis(self.connect.get().into())
    }

    /// For all of it together.
    #[must_use]
    pub fn whole(&self) -> Duration {
        let parts = [self.connect, self.send].map(|part| Duration::from_millis(part.get().into()));
        parts.iter().sum::<Duration>() + Duration::from_millis(self.read.get().into())
    }
}

/// `http(s)://[user:password@]host[:port]`, which is not shown.
pub type HostUrl = Sensitive<8, 512>;

/// Hosts have to be addresses.
pub(super) fn check_hosts(hosts: &[HostUrl], errors: &mut Vec<ConfigError>) {
    if hosts.is_empty() {
        errors.push(ConfigError::invalid("/host", "write at least one host"));
    }
    for (index, _) in hosts.iter().enumerate().filter(|(_, host)| Url::new(host.reveal()).is_none()) {
        let form = "write http(s)://[user:password@]host[:port]";
        errors.push(ConfigError::invalid(format!("/host/{index}"), form));
    }
}

/// One host as it is written: `http(s)://[user:password@]host[:port]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The URL with the path, without credentials.
    pub url: String,
    /// What stands before the `@`.
    pub credentials: Option<Credentials>,
}

/// A name and a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The name.
    pub username: String,
    /// The password.
    pub password: Sensitive<0>,
}

impl Host {
    /// Splits a host; `prefix` is the path below which everything is.
    #[must_use]
    pub(super) fn parse(written: &str, prefix: &str) -> Self {
        let (scheme, rest) = written.split_once("://").unwrap_or(("http", written));
        let (credentials, address) = match rest.rsplit_once('@') {
            Some((credentials, address)) => (Some(credentials), address),
            None => (None, rest),
        };
        let credentials = credentials.and_then(|pair| {
            let (username, password) = pair.split_once(':').unwrap_or((pair, ""));
            Some(Credentials { username: username.to_owned(), password: Sensitive::new(password)? })
        });
        let prefix = prefix.trim_matches('/');
        let url = format!("{scheme}://{}/{prefix}", address.trim_end_matches('/'));
        Self { url: url.trim_end_matches('/').to_owned(), credentials }
    }
}
