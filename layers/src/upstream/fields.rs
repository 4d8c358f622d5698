//! Which header fields cross the gateway.
//!
//! Fields that belong to one connection (RFC 9110, section 7.6.1) stay on it, in both directions, together with
//! the ones a `Connection` field names. A peer cannot use that to strip what the gateway itself added, nor the
//! fields that frame the message. Whatever crosses is already valid: the parser on each side saw to it.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use smallvec::SmallVec;

/// Fields that a `Connection` field cannot take away: framing, routing, and what the gateway adds.
fn is_protected(name: &str) -> bool {
    const NAMES: [&str; 6] =
        ["content-length", "content-type", "host", "x-real-ip", "x-request-id", "x-userinfo"];
    const PREFIXES: [&str; 3] = ["x-forwarded-", "x-consumer-", "x-credential-"];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// A field of one connection or of its framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    Connection,
    ContentLength,
    KeepAlive,
    TransferEncoding,
    Upgrade,
    /// One that nobody asks what it says.
    Hop,
}

/// Which of these a field is, whatever the case of its name.
pub(crate) fn own(name: &[u8]) -> Option<Own> {
    // The length and the first letter tell nearly all others apart.
    match (name.len(), name.first()? | 0x20) {
        (2, b't') => is(name, b"te", Own::Hop),
        (7, b'u') => is(name, b"upgrade", Own::Upgrade),
        (10, b'c') => is(name, b"connection", Own::Connection),
        (10, b'k') => is(name, b"keep-alive", Own::KeepAlive),
        (14, b'c') => is(name, b"content-length", Own::ContentLength),
        (14, b'h') => is(name, b"http2-settings", Own::Hop),
        (16, b'p') => is(name, b"proxy-connection", Own::Hop),
        (17, b't') => is(name, b"transfer-encoding", Own::TransferEncoding),
        (18, b'p') => is(name, b"proxy-authenticate", Own::Hop),
        (19, b'p') => is(name, b"proxy-authorization", Own::Hop),
        _ => None,
    }
}

/// `own` if the name is this one. A length that is known lets it be compared at once.
fn is<const N: usize>(name: &[u8], wanted: &[u8; N], own: Own) -> Option<Own> {
    let name: &[u8; N] = name.try_into().ok()?;
    let lower = name.map(|byte| byte.to_ascii_lowercase());
    (lower == *wanted).then_some(own)
}

/// Fields of one connection. `content-length` and `host` are settled elsewhere, `te` and `upgrade` too.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    own(name.as_str().as_bytes()).is_some_and(|own| own != Own::ContentLength)
}

/// The tokens of every `Connection` field.
fn connection_tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// The field that an option of `Connection` takes off the message. Nearly always it is `keep-alive` or `close`, and then
/// nothing is looked up; `upgrade` is settled elsewhere.
pub(crate) fn droppable(option: &[u8]) -> Option<HeaderName> {
    if [&b"keep-alive"[..], b"close", b"upgrade"].iter().any(|known| option.eq_ignore_ascii_case(known)) {
        return None;
    }
    HeaderName::from_bytes(option).ok().filter(|name| !is_protected(name.as_str()))
}

/// The fields that `Connection` names.
pub(crate) fn named(headers: &HeaderMap) -> SmallVec<[HeaderName; 2]> {
    if !headers.contains_key(header::CONNECTION) {
        return SmallVec::new();
    }
    connection_tokens(headers).filter_map(|token| droppable(token.as_bytes())).collect()
}

/// Take off the fields that a client's `Connection` names, and the names themselves. Done before anything is
/// added to a request, so that a client cannot name what the gateway adds later.
pub(crate) fn drop_named(headers: &mut HeaderMap) {
    if !headers.contains_key(header::CONNECTION) {
        return;
    }
    named(headers).iter().for_each(|name| drop(headers.remove(name)));
    let upgrade = connection_tokens(headers).any(|token| token.eq_ignore_ascii_case("upgrade"));
    match upgrade {
        true => headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade")),
        false => headers.remove(header::CONNECTION),
    };
}

/// The protocol that a request asks to switch to, if its `Connection` says so. `h2c` is not offered: the
/// bytes behind such a switch would pass every check unseen.
pub(crate) fn wanted_upgrade(headers: &HeaderMap) -> Option<&HeaderValue> {
    let upgrade = headers.get(header::UPGRADE)?;
    let h2c = upgrade.as_bytes().split(|byte| *byte == b',').any(|part| part.trim_ascii().starts_with(b"h2"));
    let asked = connection_tokens(headers).any(|token| token.eq_ignore_ascii_case("upgrade"));
    (asked && !h2c).then_some(upgrade)
}

/// Whether trailers are understood (`TE: trailers`).
pub(crate) fn takes_trailers(headers: &HeaderMap) -> bool {
    headers.get_all(header::TE).iter().any(|value| {
        value.as_bytes().split(|byte| *byte == b',').any(|part| {
            part.split(|byte| *byte == b';')
                .next()
                .is_some_and(|name| name.trim_ascii().eq_ignore_ascii_case(b"trailers"))
        })
    })
}

/// The fields of a request that go on to the upstream, in their order. `Host` and `Content-Length` are among them and
/// are for the caller to settle. `Expect` stays here: the client is told to go on when the upstream connection takes
/// the body.
pub fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let stays = |name: &HeaderName| is_hop_by_hop(name) || *name == header::EXPECT;
    if !headers.keys().any(stays) {
        return headers.clone();
    }
    let named = named(headers);
    let mut out = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers.iter().filter(|(name, _)| !stays(name) && !named.contains(name)) {
        out.append(name, value.clone());
    }
    out
}

/// Take the fields of the upstream's connection off a response.
pub(crate) fn sanitize_response(headers: &mut HeaderMap) {
    named(headers).iter().for_each(|name| drop(headers.remove(name)));
    // One look at each field instead of a search for each name: responses have few of them or none.
    let own: SmallVec<[HeaderName; 2]> = headers.keys().filter(|name| is_hop_by_hop(name)).cloned().collect();
    own.iter().for_each(|name| drop(headers.remove(name)));
}

/// `timeout=N` of a `Keep-Alive` field, in seconds: how long the peer keeps an idle connection.
pub(crate) fn keep_alive_timeout(value: &[u8]) -> Option<u64> {
    let value = std::str::from_utf8(value).ok()?;
    value.split(',').find_map(|part| part.trim().strip_prefix("timeout=")?.trim().parse().ok())
}

/// Whether a field may stand behind a body. What frames a message, says how to read it or carries trust has no
/// business there (RFC 9110, section 6.5.1).
pub(crate) fn is_trailer(name: &HeaderName) -> bool {
    let refused = matches!(
        *name,
        header::AUTHORIZATION
            | header::CACHE_CONTROL
            | header::CONTENT_ENCODING
            | header::CONTENT_RANGE
            | header::EXPECT
            | header::MAX_FORWARDS
            | header::SET_COOKIE
            | header::TRAILER
    );
    !refused && own(name.as_str().as_bytes()).is_none() && !is_protected(name.as_str())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn fields(text: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for line in text.split('|').filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap();
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        headers
    }

    fn text(headers: &HeaderMap) -> String {
        let lines: Vec<String> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.join("|")
    }

    #[test]
    fn fields_of_the_connection_stay_on_it() {
        let cases = [
            ("a: 1|b: 2|a: 3", "a: 1|a: 3|b: 2", "others pass with every value"),
            ("connection: keep-alive|keep-alive: timeout=5|a: 1", "a: 1", "the classic ones"),
            ("connection: X-Secret, close|x-secret: 1|a: 1", "a: 1", "named ones, whatever their case"),
            ("connection: x-forwarded-for|x-forwarded-for: 1.1.1.1", "x-forwarded-for: 1.1.1.1", "not ours"),
            ("connection: content-type|content-type: a/b", "content-type: a/b", "not the framing"),
            ("te: trailers|transfer-encoding: chunked|upgrade: h2c|http2-settings: AA", "", "the rest"),
            ("proxy-connection: close|proxy-authorization: x|expect: 100-continue", "", "of the proxy hop"),
            ("te: a|host: a|content-length: 5", "host: a|content-length: 5", "these the caller sets anew"),
            ("trailer: x-sum", "trailer: x-sum", "what follows the body is announced to the end"),
        ];
        for (given, wanted, case) in cases {
            assert_eq!(text(&forwarded(&fields(given))), wanted, "{case}");
        }
    }

    #[test]
    fn what_a_client_names_is_gone_before_anything_is_added() {
        let cases = [
            ("connection: x-api-key, keep-alive|x-api-key: 1|a: 1", "a: 1"),
            ("connection: Upgrade, a|upgrade: websocket|a: 1", "connection: upgrade|upgrade: websocket"),
            ("connection: host, content-length|host: a|content-length: 1", "host: a|content-length: 1"),
            ("a: 1", "a: 1"),
        ];
        for (given, wanted) in cases {
            let mut headers = fields(given);
            drop_named(&mut headers);
            // Taking one field off may move another.
            let sorted = |text: &str| {
                let mut fields: Vec<_> = text.split('|').map(str::to_owned).collect();
                fields.sort();
                fields
            };
            assert_eq!(sorted(&text(&headers)), sorted(wanted), "{given}");
        }
    }

    #[test]
    fn a_response_loses_the_upstreams_connection_fields_and_keeps_its_length() {
        let mut headers = fields(
            "connection: x-hop, close|x-hop: 1|keep-alive: timeout=5|transfer-encoding: chunked|\
             upgrade: h2|content-length: 5|a: 1",
        );
        sanitize_response(&mut headers);
        assert_eq!(text(&headers), "content-length: 5|a: 1");
    }

    #[test]
    fn only_a_real_switch_is_forwarded_and_never_h2c() {
        let cases = [
            ("connection: Upgrade|upgrade: websocket", Some("websocket")),
            ("connection: keep-alive, upgrade|upgrade: websocket", Some("websocket")),
            ("upgrade: websocket", None),
            ("connection: upgrade", None),
            ("connection: upgrade, http2-settings|upgrade: h2c", None),
            ("connection: upgrade|upgrade: websocket, h2c", None),
        ];
        for (given, wanted) in cases {
            let headers = fields(given);
            let upgrade = wanted_upgrade(&headers).map(|value| value.to_str().unwrap());
            assert_eq!(upgrade, wanted, "{given}");
        }
    }

    #[test]
    fn small_facts_are_read() {
        assert!(takes_trailers(&fields("te: gzip, Trailers;q=0.5")));
        assert!(!takes_trailers(&fields("te: gzip")));
        assert_eq!(keep_alive_timeout(b"max=10, timeout=5"), Some(5));
        assert_eq!(keep_alive_timeout(b"timeout=soon"), None);
    }
}
