//! Which route a request takes.
//!
//! [`Table`] holds every enabled route of one configuration and answers with the first whose URI, host, method,
//! client address and `vars` fit, in APISIX's order. A table is an immutable version: workers look up in the one
//! their snapshot holds while the control thread makes the next by inserting and removing single routes, which
//! copies only the nodes on the way. Looking up does not allocate or wait, and its cost follows the length of
//! the path and host, not the number of routes.

mod bucket;
mod host;
mod matcher;
mod radix;
mod table;
#[cfg(test)]
mod tests;
mod uri;

use std::net::IpAddr;
use std::sync::Arc;

use config::var::Vars;

pub use self::host::HostPattern;
pub use self::matcher::{AddrSet, MethodSet, Predicate};
pub use self::table::Table;
pub use self::uri::Params;

/// Which part of a request is looked at first: `apisix.router.http` in config.yaml.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// `radixtree_uri`: the URI chooses; the host is one more condition.
    Uri,
    /// `radixtree_host_uri`: the most specific host of which a route fits chooses, then the URI. Routes without
    /// a host are tried when none with a host fits.
    #[default]
    HostUri,
    /// `radixtree_uri_with_parameter`: as [`Mode::Uri`], and `:name` is a parameter in every segment.
    UriWithParameter,
}

/// A route as the compiler hands it in: everything that decides whether it matches, and what it stands for.
#[derive(Clone, Debug)]
pub struct Entry<T> {
    /// Unique in the table.
    pub id: Arc<str>,
    /// The route's hosts, or its service's if it has none itself. Empty: every host.
    pub hosts: Vec<HostPattern>,
    /// `/a` matches itself; `/a*` everything that begins with `/a`; `*name` and, by mode, `:name` segments
    /// capture. Matched against the decoded path.
    pub uris: Vec<String>,
    /// `None`: every method, also those without a place in [`MethodSet`].
    pub methods: Option<MethodSet>,
    /// `None`: every client.
    pub remote_addrs: Option<AddrSet>,
    pub vars: Option<config::Expr>,
    /// Among routes at the same URI the higher is tried first.
    pub priority: i64,
    /// Decides between equal priorities, lower first: the position in a file, or the creation index.
    pub order: u64,
    pub value: Arc<T>,
}

/// What a look-up needs to know of a request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Without port; case and one trailing dot do not matter. Empty if the request names none.
    pub host: &'a str,
    /// The port of the Host header or authority, if it has one.
    pub port: Option<u16>,
    /// In normal form: `Normal::decoded` of [`crate::http::normalize`].
    pub path: &'a [u8],
    /// The method as a set of one; empty for a method routes cannot name.
    pub method: MethodSet,
    /// The client, after PROXY protocol and trusted headers.
    pub peer: IpAddr,
    pub vars: &'a dyn Vars,
}

/// The route a request takes.
#[derive(Debug)]
pub struct Found<'t, T> {
    pub id: &'t Arc<str>,
    pub value: &'t Arc<T>,
    /// The pattern of its hosts that matched, if it has any.
    pub host: Option<&'t Arc<str>>,
    uri: &'t uri::Uri,
}

impl<'t, T> Found<'t, T> {
    /// The pattern of the route's `uris` that matched, as configured.
    pub fn uri(&self) -> &'t Arc<str> {
        self.uri.text()
    }

    /// Where in `path`, the path that was matched, the parameters of the pattern stand. Apart from the look-up,
    /// because few requests ask for them.
    pub fn params(&self, path: &[u8]) -> Params {
        self.uri.capture(path).unwrap_or_default()
    }
}

/// One route that was tried for a request, for `postern explain`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub id: Arc<str>,
    pub uri: Arc<str>,
    /// The pattern under which the route was found; `None` for routes that have no host, and where the host is
    /// only a condition.
    pub host: Option<Arc<str>>,
    pub priority: i64,
    pub verdict: Verdict,
}

/// What came of trying a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Matched,
    /// `predicate` was the first that did not hold; `detail` says why in words.
    Failed {
        predicate: Predicate,
        detail: String,
    },
}
