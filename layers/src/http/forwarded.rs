//! Who the client is, and what the upstream is told about it.
//!
//! Fields that carry trust are removed from clients that are not trusted, in every spelling, before anything reads
//! them; then our own are set. APISIX `trusted_addresses` and nginx `real_ip_*` say who is trusted and which field
//! names the client.

use std::net::IpAddr;
use std::rc::Rc;
use std::task::{Context, Poll};

use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, header};
use ipnet::IpNet;
use tower::{Layer, Service};

use crate::error::Fault;
use crate::exchange::{Exchange, State};
use crate::stack::HttpService;

const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");

/// Prefixes and names, with `-` for `_`, of fields that only the gateway may set.
const OURS: &[&str] = &[
    "x-consumer-",
    "x-credential-",
    "x-userinfo",
    "x-forwarded-client-cert",
    "x-real-ip",
    "x-forwarded-",
    "x-postern-protocol",
];

/// How the client's address is found. nginx `real_ip_header`, `real_ip_recursive`, `set_real_ip_from`.
#[derive(Clone, Debug)]
pub struct RealIp {
    /// The field that names the client.
    pub header: HeaderName,
    /// Peers whose field is believed.
    pub from: Vec<IpNet>,
    /// Look past trusted addresses in a list, from the right.
    pub recursive: bool,
}

/// What the layer needs to know.
#[derive(Clone, Debug, Default)]
pub struct Forwarding {
    /// Peers whose `X-Forwarded-*` are kept. APISIX `trusted_addresses`.
    pub trusted: Vec<IpNet>,
    /// Where the client's address comes from.
    pub real_ip: Option<RealIp>,
    /// Fields with `_` in their names pass. nginx `underscores_in_headers`.
    pub underscores: bool,
}

/// Makes [`Forwarded`].
#[derive(Clone)]
pub struct ForwardedLayer(Rc<Forwarding>);

impl ForwardedLayer {
    /// By these rules.
    pub fn new(forwarding: Forwarding) -> Self {
        Self(Rc::new(forwarding))
    }
}

impl<S> Layer<S> for ForwardedLayer {
    type Service = Forwarded<S>;

    fn layer(&self, inner: S) -> Forwarded<S> {
        Forwarded { inner, forwarding: self.0.clone() }
    }
}

/// Settles the client's address and the forwarding fields.
#[derive(Clone)]
pub struct Forwarded<S> {
    inner: S,
    forwarding: Rc<Forwarding>,
}

impl<S: HttpService> Service<Exchange> for Forwarded<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = S::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> S::Future {
        settle(&mut x, &self.forwarding);
        self.inner.call(x)
    }
}

/// Settles the client's address and the forwarding fields of one request.
pub fn settle(x: &mut State, forwarding: &Forwarding) {
    if x.nested {
        if !forwarding.underscores {
            remove(&mut x.request.headers, |name| name.contains('_'));
        }
        return;
    }
    let peer = x.conn.peer.ip();
    // One look at the names tells of nearly every request that it has neither.
    let names = Names::of(&x.request.headers);
    if let Some(rule) = &forwarding.real_ip
        && (names.ours || !is_ours(rule.header.as_str()))
        && contains(&rule.from, peer)
        && let Some(client) = client_of(&x.request.headers, rule)
    {
        x.remote_addr = client;
    }
    if names.underscores && !forwarding.underscores {
        remove(&mut x.request.headers, |name| name.contains('_'));
    }
    let mut before = None;
    let mut trusted = false;
    if names.ours {
        trusted = contains(&forwarding.trusted, peer);
        set_apart(x, trusted);
        if trusted {
            before = joined(&x.request.headers, &X_FORWARDED_FOR);
        } else {
            remove(&mut x.request.headers, is_ours);
        }
    }
    let State { request, conn, remote_addr, .. } = x;
    let headers = &mut request.headers;
    let real_ip = if *remote_addr == peer { conn.forwarded.peer.clone() } else { address(*remote_addr) };
    let host = headers.get(header::HOST).cloned();
    headers.insert(X_FORWARDED_FOR, appended(before.as_ref(), &real_ip));
    headers.insert(X_REAL_IP, real_ip);
    // A trusted proxy in front of us knows better than we do how the client came.
    let mut settle = |name: HeaderName, value: HeaderValue| {
        if trusted {
            headers.entry(name).or_insert(value);
        } else {
            headers.insert(name, value);
        }
    };
    settle(X_FORWARDED_PROTO, HeaderValue::from_static(conn.scheme()));
    if let Some(host) = host {
        settle(X_FORWARDED_HOST, host);
    }
    settle(X_FORWARDED_PORT, conn.forwarded.port.clone());
}

/// What the names of a request's fields are about.
#[derive(Clone, Copy, Debug, Default)]
struct Names {
    underscores: bool,
    ours: bool,
}

impl Names {
    fn of(headers: &HeaderMap) -> Self {
        headers.keys().fold(Self::default(), |names, name| {
            let name = name.as_str();
            Self {
                underscores: names.underscores || name.as_bytes().contains(&b'_'),
                ours: names.ours || is_ours(name),
            }
        })
    }
}

/// What the client, or who stood before it, said of its address, and nobody is told any more. The plugin `real-ip` may
/// have been told to believe it.
#[derive(Debug, Default)]
pub struct SetApart {
    /// `X-Forwarded-For`, of a peer that is not trusted.
    pub forwarded_for: Option<HeaderValue>,
    /// `X-Real-IP`.
    pub real_ip: Option<HeaderValue>,
    /// Whether `trusted_addresses` has the peer.
    pub trusted: bool,
}

fn set_apart(x: &mut State, trusted: bool) {
    let headers = &x.request.headers;
    let forwarded_for = if trusted { None } else { joined(headers, &X_FORWARDED_FOR) };
    let real_ip = headers.get(&X_REAL_IP).cloned();
    if forwarded_for.is_some() || real_ip.is_some() {
        x.put_slot(SetApart { forwarded_for, real_ip, trusted });
    }
}

/// The client is another than it seemed: the fields that tell of it are set anew. `before` is whom the request passed.
pub fn tell_client(x: &mut State, client: IpAddr, before: Option<&HeaderValue>) {
    x.remote_addr = client;
    let value = address(client);
    x.request.headers.insert(X_FORWARDED_FOR, appended(before, &value));
    x.request.headers.insert(X_REAL_IP, value);
}

/// All values of a field as one list.
fn joined(headers: &HeaderMap, name: &HeaderName) -> Option<HeaderValue> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.clone();
    Some(values.fold(first, |list, value| appended(Some(&list), value)))
}

fn appended(list: Option<&HeaderValue>, value: &HeaderValue) -> HeaderValue {
    let Some(list) = list else { return value.clone() };
    HeaderValue::from_bytes(&[list.as_bytes(), b", ", value.as_bytes()].concat())
        .unwrap_or_else(|_| value.clone())
}

fn contains(nets: &[IpNet], address: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&address))
}

fn address(address: IpAddr) -> HeaderValue {
    HeaderValue::try_from(address.to_string()).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
}

/// The client's address as the believed field says it: the last of the list, or with `recursive` the last one that
/// is not itself trusted.
fn client_of(headers: &HeaderMap, rule: &RealIp) -> Option<IpAddr> {
    let mut client = None;
    for field in headers.get_all(&rule.header).iter().rev() {
        for part in field.to_str().ok()?.rsplit(',') {
            let address = parse_address(part.trim())?;
            client = Some(address);
            if !rule.recursive || !contains(&rule.from, address) {
                return client;
            }
        }
    }
    client
}

/// An address with or without port: `10.0.0.1`, `10.0.0.1:80`, `::1`, `[::1]:80`.
fn parse_address(text: &str) -> Option<IpAddr> {
    text.parse()
        .ok()
        .or_else(|| text.parse::<std::net::SocketAddr>().ok().map(|address| address.ip()))
        .or_else(|| text.strip_prefix('[')?.strip_suffix(']')?.parse().ok())
}

/// Whether only the gateway may set this field. `_` and `-` are the same to many servers behind us.
pub fn is_ours(name: &str) -> bool {
    name.starts_with(['x', 'X'])
        && OURS.iter().any(|ours| {
            name.len() >= ours.len()
                && name.bytes().zip(ours.bytes()).all(|(a, b)| a == b || (a == b'_' && b == b'-'))
                && (ours.ends_with('-') || name.len() == ours.len())
        })
}

fn remove(headers: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) {
    if !headers.keys().any(|name| unwanted(name.as_str())) {
        return;
    }
    let names: Vec<_> = headers.keys().filter(|name| unwanted(name.as_str())).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::exchange;

    fn nets(text: &str) -> Vec<IpNet> {
        text.split_whitespace().map(|net| net.parse().unwrap()).collect()
    }

    fn got<'a>(x: &'a Exchange, name: &str) -> &'a str {
        x.request.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    #[test]
    fn a_client_that_is_not_trusted_cannot_say_who_it_is() {
        for spelling in [
            "x-forwarded-for",
            "x_forwarded_for",
            "x-real-ip",
            "x_real-ip",
            "x-consumer-username",
            "x_userinfo",
        ] {
            let mut x = exchange("GET", "http://a/").header(spelling, "6.6.6.6").peer("9.9.9.9").build();
            settle(&mut x, &Forwarding { underscores: true, ..Forwarding::default() });
            let values: Vec<_> = x.request.headers.values().filter(|v| *v == "6.6.6.6").collect();
            assert!(values.is_empty(), "{spelling} passed: {:?}", x.request.headers);
            assert_eq!(got(&x, "x-forwarded-for"), "9.9.9.9");
            assert_eq!(got(&x, "x-real-ip"), "9.9.9.9");
            assert_eq!(got(&x, "x-forwarded-proto"), "http");
            assert_eq!(got(&x, "x-forwarded-port"), "9080");
        }
    }

    #[test]
    fn a_part_of_another_request_has_its_client() {
        let forwarding = Forwarding {
            real_ip: Some(RealIp { header: X_REAL_IP, from: nets("127.0.0.0/8"), recursive: false }),
            ..Forwarding::default()
        };
        let mut x = exchange("GET", "http://a/").header("x-real-ip", "6.6.6.6").header("a_b", "1").build();
        x.nested = true;
        x.remote_addr = "9.9.9.9".parse().unwrap();
        settle(&mut x, &forwarding);
        assert_eq!(x.remote_addr.to_string(), "9.9.9.9");
        assert!(!x.request.headers.contains_key("a_b"));
    }

    #[test]
    fn lists_in_several_fields_become_one_in_their_order() {
        let forwarding = Forwarding { trusted: nets("10.0.0.0/8"), ..Forwarding::default() };
        let mut x = exchange("GET", "http://a/")
            .header("x-forwarded-for", "6.6.6.6")
            .header("x-forwarded-for", "1.2.3.4")
            .peer("10.1.1.1")
            .build();
        settle(&mut x, &forwarding);
        assert_eq!(got(&x, "x-forwarded-for"), "6.6.6.6, 1.2.3.4, 10.1.1.1");
        assert_eq!(x.request.headers.get_all("x-forwarded-for").iter().count(), 1);
    }

    #[test]
    fn a_trusted_proxy_is_believed_and_appended_to() {
        let forwarding = Forwarding { trusted: nets("10.0.0.0/8"), ..Forwarding::default() };
        let mut x = exchange("GET", "http://a/")
            .header("x-forwarded-for", "1.2.3.4")
            .header("x-forwarded-proto", "https")
            .peer("10.1.1.1")
            .build();
        settle(&mut x, &forwarding);
        assert_eq!(got(&x, "x-forwarded-for"), "1.2.3.4, 10.1.1.1");
        assert_eq!(got(&x, "x-forwarded-proto"), "https");
    }

    #[test]
    fn the_client_is_the_last_address_that_is_not_a_proxy() {
        let rule = |recursive| RealIp { header: X_FORWARDED_FOR, from: nets("10.0.0.0/8"), recursive };
        let cases = [
            ("1.1.1.1, 2.2.2.2, 10.0.0.9", true, "2.2.2.2"),
            ("1.1.1.1, 2.2.2.2, 10.0.0.9", false, "10.0.0.9"),
            ("[2001:db8::1]:443, 10.0.0.9", true, "2001:db8::1"),
            ("10.0.0.7, 10.0.0.9", true, "10.0.0.7"),
            ("nonsense", true, "10.0.0.1"),
        ];
        for (list, recursive, client) in cases {
            let forwarding =
                Forwarding { trusted: nets("10.0.0.0/8"), real_ip: Some(rule(recursive)), underscores: true };
            let mut x = exchange("GET", "http://a/").header("x-forwarded-for", list).peer("10.0.0.1").build();
            settle(&mut x, &forwarding);
            assert_eq!(x.remote_addr.to_string(), client, "{list} recursive {recursive}");
        }
    }
}
