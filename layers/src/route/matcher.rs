//! The predicates of one route, compiled: method, client address, host, `vars`.
//!
//! Everything that can be prepared is (bit sets, merged address ranges, compiled expressions); trying a route
//! compares and never allocates. [`Route::admits`] decides, and [`Route::refusal`] says the same in words.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use config::Expr;
use config::var::{Var, Vars};
use http::Method;
use ipnet::IpNet;
use serde_json::Value;
use smallvec::SmallVec;

use super::host::HostPattern;
use super::uri::{Params, Uri};
use super::{Entry, Mode, Request};

/// A set of the methods a route may name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MethodSet(u16);

impl MethodSet {
    /// The methods of APISIX, in its order.
    pub const NAMES: [&'static str; 10] =
        ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "TRACE", "PURGE"];

    pub const EMPTY: MethodSet = MethodSet(0);

    /// The set of this one method; empty if no route can name it.
    pub fn of(method: &Method) -> Self {
        match *method {
            Method::GET => MethodSet(1),
            Method::POST => MethodSet(1 << 1),
            _ => Self::named(method.as_str()),
        }
    }

    /// As [`MethodSet::of`]; names are in upper case.
    pub fn named(name: &str) -> Self {
        match Self::NAMES.iter().position(|known| *known == name) {
            Some(position) => MethodSet(1 << position),
            None => Self::EMPTY,
        }
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[must_use]
    pub fn union(self, other: Self) -> Self {
        MethodSet(self.0 | other.0)
    }

    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The members, each as a number below ten.
    pub(super) fn positions(self) -> impl Iterator<Item = u8> {
        (0..16).filter(move |position| self.0 & (1 << position) != 0)
    }
}

impl<'a> FromIterator<&'a str> for MethodSet {
    /// The set of these names; unknown ones are left out.
    fn from_iter<I: IntoIterator<Item = &'a str>>(names: I) -> Self {
        names.into_iter().map(Self::named).fold(Self::EMPTY, Self::union)
    }
}

impl fmt::Display for MethodSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (position, name) in Self::NAMES.iter().enumerate() {
            if self.0 & (1 << position) != 0 {
                write!(f, "{separator}{name}")?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

/// A set of client addresses. Asking costs the logarithm of its size.
///
/// An IPv4 address inside IPv6 (`::ffff:1.2.3.4`) counts as IPv4, in the set and in the question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddrSet {
    /// First and last address of each range; ordered, apart from each other.
    v4: Box<[(u32, u32)]>,
    v6: Box<[(u128, u128)]>,
}

impl AddrSet {
    pub fn contains(&self, address: IpAddr) -> bool {
        fn within<A: Ord + Copy>(ranges: &[(A, A)], address: A) -> bool {
            let behind = ranges.partition_point(|(first, _)| *first <= address);
            behind.checked_sub(1).and_then(|at| ranges.get(at)).is_some_and(|(_, last)| address <= *last)
        }
        match address.to_canonical() {
            IpAddr::V4(address) => within(&self.v4, address.into()),
            IpAddr::V6(address) => within(&self.v6, address.into()),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

impl FromIterator<IpNet> for AddrSet {
    fn from_iter<I: IntoIterator<Item = IpNet>>(networks: I) -> Self {
        fn merged<A: Ord + Copy>(mut ranges: Vec<(A, A)>) -> Box<[(A, A)]> {
            ranges.sort_unstable();
            ranges.dedup_by(|next, kept| {
                let overlaps = next.0 <= kept.1;
                if overlaps {
                    kept.1 = kept.1.max(next.1);
                }
                overlaps
            });
            ranges.into()
        }
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for network in networks {
            let (first, last) = (network.network(), network.broadcast());
            match (first.to_canonical(), last.to_canonical()) {
                (IpAddr::V4(first), IpAddr::V4(last)) => v4.push((first.into(), last.into())),
                _ => {
                    if let (IpAddr::V6(first), IpAddr::V6(last)) = (first, last) {
                        v6.push((first.into(), last.into()));
                    }
                }
            }
        }
        AddrSet { v4: merged(v4), v6: merged(v6) }
    }
}

/// What can keep a route whose URI is at the right place in the tree from being taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Predicate {
    Method,
    /// The segments behind the static front of the pattern.
    Uri,
    RemoteAddr,
    Host,
    Vars,
}

impl Predicate {
    /// The field of the route it comes from.
    pub fn field(self) -> &'static str {
        match self {
            Predicate::Method => "methods",
            Predicate::Uri => "uri",
            Predicate::RemoteAddr => "remote_addr",
            Predicate::Host => "host",
            Predicate::Vars => "vars",
        }
    }
}

impl fmt::Display for Predicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.field())
    }
}

/// An [`Entry`] as the table keeps it, once, however many places in the tree lead to it.
#[derive(Debug)]
pub(super) struct Route<T> {
    pub(super) id: Arc<str>,
    pub(super) hosts: Box<[HostPattern]>,
    /// Nearly always one, which is then found without another step through memory.
    pub(super) uris: SmallVec<[Uri; 1]>,
    /// Empty means every method.
    pub(super) methods: MethodSet,
    /// No tree of hosts answers for them: they have to be compared.
    hosts_decide: bool,
    remote_addrs: Option<Box<AddrSet>>,
    pub(super) vars: Option<Box<Expr>>,
    /// `vars` asks for what the URI captured.
    asks_for_params: bool,
    pub(super) priority: i64,
    pub(super) order: u64,
    pub(super) value: Arc<T>,
}

/// The variables of a request while a route is tried: its parameters are those this route would capture.
struct WithParams<'r> {
    params: Params,
    request: &'r Request<'r>,
}

impl Vars for WithParams<'_> {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        match var {
            Var::UriParam(name) => self.params.value(name, self.request.path).map(String::from_utf8_lossy),
            _ => self.request.vars.get(var),
        }
    }

    fn value(&self, var: &Var) -> Option<Value> {
        self.request.vars.value(var)
    }
}

impl<T> Route<T> {
    pub(super) fn new(entry: Entry<T>, mode: Mode) -> Self {
        let mut uris: SmallVec<[Uri; 1]> = SmallVec::with_capacity(entry.uris.len());
        for text in &entry.uris {
            // Written twice, a URI would be tried twice.
            if !uris.iter().any(|uri| **uri.text() == **text) {
                uris.push(Uri::new(text, mode));
            }
        }
        let asks = |vars: &Expr| vars.vars().iter().any(|var| matches!(var, Var::UriParam(_)));
        Route {
            id: entry.id,
            asks_for_params: entry.vars.as_ref().is_some_and(asks),
            hosts_decide: mode != Mode::HostUri && !entry.hosts.is_empty(),
            hosts: entry.hosts.into(),
            uris,
            methods: entry.methods.unwrap_or_default(),
            remote_addrs: entry.remote_addrs.map(Box::new),
            vars: entry.vars.filter(|vars| !vars.is_always()).map(Box::new),
            priority: entry.priority,
            order: entry.order,
            value: entry.value,
        }
    }

    /// Tries the route under the given of its URIs, cheapest predicate first: the order decides nothing but
    /// what `explain` names.
    pub(super) fn admits(&self, uri: &Uri, request: &Request<'_>) -> Result<(), Predicate> {
        if !self.methods.is_empty() && !self.methods.intersects(request.method) {
            return Err(Predicate::Method);
        }
        if !uri.fits(request.path) {
            return Err(Predicate::Uri);
        }
        if self.remote_addrs.as_ref().is_some_and(|addresses| !addresses.contains(request.peer)) {
            return Err(Predicate::RemoteAddr);
        }
        if self.hosts_decide && self.matched_host(request).is_none() {
            return Err(Predicate::Host);
        }
        if self.vars.as_ref().is_some_and(|vars| !self.with_params(uri, request, |of| vars.eval(of))) {
            return Err(Predicate::Vars);
        }
        Ok(())
    }

    /// Shows `look` the variables of the request, with what this URI captures if the route asks for it.
    fn with_params<R>(&self, uri: &Uri, request: &Request<'_>, look: impl FnOnce(&dyn Vars) -> R) -> R {
        if self.asks_for_params {
            let params = uri.capture(request.path).unwrap_or_default();
            look(&WithParams { params, request })
        } else {
            look(request.vars)
        }
    }

    /// The first of the route's host patterns that matches.
    pub(super) fn matched_host(&self, request: &Request<'_>) -> Option<&HostPattern> {
        self.hosts.iter().find(|host| host.matches(request.host, request.port))
    }

    /// Why [`Route::admits`] said no.
    pub(super) fn refusal(&self, predicate: Predicate, uri: &Uri, request: &Request<'_>) -> String {
        match predicate {
            Predicate::Method if request.method.is_empty() => {
                format!("the request's method is none of {}", self.methods)
            }
            Predicate::Method => format!("{} is none of {}", request.method, self.methods),
            Predicate::Uri => {
                format!("{:?} does not fit {}", String::from_utf8_lossy(request.path), uri.text())
            }
            Predicate::RemoteAddr => format!("{} is outside the allowed addresses", request.peer),
            Predicate::Host => {
                let hosts: Vec<&str> = self.hosts.iter().map(|host| &**host.text()).collect();
                let port = request.port.map(|port| format!(":{port}")).unwrap_or_default();
                format!("{:?} is none of {}", format!("{}{port}", request.host), hosts.join(", "))
            }
            Predicate::Vars => {
                let vars = self.vars.as_ref();
                vars.and_then(|vars| self.with_params(uri, request, |of| vars.first_failed(of)))
                    .unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn every_method_of_apisix_has_a_place_and_no_other() {
        for name in MethodSet::NAMES {
            let method = Method::from_bytes(name.as_bytes()).unwrap();
            assert_eq!(MethodSet::of(&method), MethodSet::named(name));
            assert_eq!(MethodSet::of(&method).to_string(), name);
        }
        assert!(MethodSet::of(&Method::from_bytes(b"BREW").unwrap()).is_empty());
        assert!(MethodSet::named("get").is_empty(), "methods are case-sensitive");
        let set: MethodSet = ["PURGE", "GET", "BREW"].into_iter().collect();
        assert_eq!(set.to_string(), "GET, PURGE");
        assert_eq!(set.positions().collect::<Vec<_>>(), [0, 9]);
    }

    #[test]
    fn address_sets_merge_ranges_and_see_through_mapped_addresses() {
        let networks = ["10.0.0.0/8", "10.1.0.0/16", "192.168.1.7/32", "fd00::/8", "::ffff:1.2.3.0/120"];
        let set: AddrSet = networks.iter().map(|text| text.parse::<IpNet>().unwrap()).collect();
        let cases = [
            ("10.0.0.0", true),
            ("10.255.255.255", true),
            ("11.0.0.0", false),
            ("9.255.255.255", false),
            ("192.168.1.7", true),
            ("192.168.1.8", false),
            ("::ffff:10.1.2.3", true),
            ("1.2.3.200", true),
            ("fd12::1", true),
            ("fe80::1", false),
            ("::", false),
        ];
        for (address, expected) in cases {
            assert_eq!(set.contains(address.parse().unwrap()), expected, "{address}");
        }
        assert!(!AddrSet::default().contains("10.0.0.1".parse().unwrap()));
        let all: AddrSet = ["0.0.0.0/0".parse::<IpNet>().unwrap()].into_iter().collect();
        assert!(all.contains("255.255.255.255".parse().unwrap()));
        assert!(!all.contains("::1".parse().unwrap()));
    }
}
