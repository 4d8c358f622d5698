//! Host patterns of routes: `foo.com`, `*.foo.com`, either with `:port`.
//!
//! A pattern that begins with `*` matches by the bytes behind the star, as in APISIX: `*.foo.com` matches one or
//! more labels (`a.foo.com`, `a.b.foo.com`) but not `foo.com` itself. Hosts compare without regard to ASCII case
//! and to one trailing dot.

use std::sync::Arc;

use smallvec::SmallVec;

/// One entry of a route's or service's `hosts`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern {
    /// As configured, for `explain` and the matched-host variable.
    text: Arc<str>,
    /// Lower case, without star, port and trailing dot.
    name: Box<str>,
    wildcard: bool,
    port: Option<u16>,
}

impl HostPattern {
    /// Reads a pattern. Every text is one: a star elsewhere than in front stands for itself and never matches a
    /// valid host.
    pub fn new(text: &str) -> Self {
        let (wildcard, name) = match text.strip_prefix('*') {
            Some(name) => (true, name),
            None => (false, text),
        };
        let (name, port) = split_port(name);
        HostPattern {
            text: Arc::from(text),
            name: without_dot(name).to_ascii_lowercase().into_boxed_str(),
            wildcard,
            port,
        }
    }

    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    pub(super) fn is_wildcard(&self) -> bool {
        self.wildcard
    }

    /// The pattern's place in a tree of hosts.
    pub(super) fn key(&self) -> HostKey {
        HostKey::new(&self.name, self.port)
    }

    pub(super) fn matches(&self, host: &str, port: Option<u16>) -> bool {
        if self.port.is_some() && self.port != port {
            return false;
        }
        let (host, name) = (without_dot(host).as_bytes(), self.name.as_bytes());
        let Some(front) = host.len().checked_sub(name.len()) else { return false };
        (front == 0 || self.wildcard) && host.get(front..).is_some_and(|end| end.eq_ignore_ascii_case(name))
    }
}

/// A port and a host, as bytes that order hosts for a tree: `*.foo.com` is a prefix of the hosts it matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostKey {
    /// Two bytes of port, zero for none; then the host in lower case, last byte first. On the stack for every
    /// name of ordinary length.
    bytes: SmallVec<[u8; 64]>,
}

impl HostKey {
    pub(super) fn new(host: &str, port: Option<u16>) -> Self {
        let mut bytes = SmallVec::from_slice(&port.unwrap_or(0).to_be_bytes());
        bytes.extend(without_dot(host).bytes().rev().map(|byte| byte.to_ascii_lowercase()));
        HostKey { bytes }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The same host without its port.
    pub(super) fn clear_port(&mut self) {
        self.bytes.iter_mut().take(2).for_each(|byte| *byte = 0);
    }
}

fn without_dot(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

/// Takes `:port` off, but not the tail of a bare IPv6 address.
fn split_port(host: &str) -> (&str, Option<u16>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => match port.parse() {
            Ok(port) => (name, Some(port)),
            Err(_) => (host, None),
        },
        _ => (host, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_hosts() {
        let cases: &[(&str, &str, Option<u16>, bool)] = &[
            ("foo.com", "foo.com", None, true),
            ("foo.com", "www.foo.com", None, false),
            ("foo.com", "oo.com", None, false),
            ("Foo.COM", "fOO.com", None, true),
            ("foo.com", "foo.com.", None, true),
            ("foo.com.", "foo.com", None, true),
            // One label or more, but at least one.
            ("*.foo.com", "www.foo.com", None, true),
            ("*.foo.com", "www.bar.foo.com", None, true),
            ("*.foo.com", "foo.com", None, false),
            ("*.foo.com", "barfoo.com", None, false),
            ("*.Foo.com", "www.fOO.com.", None, true),
            // Without a dot behind it, the star ends inside a label.
            ("*foo.com", "foo.com", None, true),
            ("*foo.com", "barfoo.com", None, true),
            ("*", "anything", None, true),
            ("*", "", None, true),
            // A port in the pattern must be the request's.
            ("foo.com:9080", "foo.com", Some(9080), true),
            ("foo.com:9080", "foo.com", Some(9081), false),
            ("foo.com:9080", "foo.com", None, false),
            ("*.foo.com:9080", "a.foo.com", Some(9080), true),
            ("foo.com", "foo.com", Some(9080), true),
            ("[::1]", "[::1]", None, true),
            ("[::1]:80", "[::1]", Some(80), true),
            ("[::1]:80", "[::1]", Some(81), false),
        ];
        for (pattern, host, port, expected) in cases {
            let matches = HostPattern::new(pattern).matches(host, *port);
            assert_eq!(matches, *expected, "{pattern} against {host} {port:?}");
        }
    }

    #[test]
    fn a_wildcard_is_a_prefix_of_the_hosts_it_matches() {
        let pattern = HostPattern::new("*.Foo.com").key();
        let is_prefix_of = |host| HostKey::new(host, None).as_bytes().starts_with(pattern.as_bytes());
        assert!(is_prefix_of("WWW.foo.com."));
        assert!(!is_prefix_of("foo.com"));

        let mut key = HostKey::new("a.com", Some(8080));
        assert_eq!(key, HostPattern::new("A.com:8080").key());
        key.clear_port();
        assert_eq!(key, HostPattern::new("a.com").key());
    }
}
