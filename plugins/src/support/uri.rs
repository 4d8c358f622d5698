//! URIs that plugins write: put together from text, variables and captures, and safe to send.

use http::uri::PathAndQuery;
use layers::exchange::State;
use layers::http::normalize::normalize_query;

use super::captures::Text;

/// What nginx escapes when it writes a path: what would end the path or is never sent raw.
fn is_safe(byte: u8) -> bool {
    byte.is_ascii_graphic()
        && !matches!(byte, b'"' | b'#' | b'%' | b'<' | b'>' | b'?' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}')
}

const HEX: &[u8; 16] = b"0123456789ABCDEF";

fn push_escaped(out: &mut Text, byte: u8) {
    out.push(b'%');
    for digit in [byte >> 4, byte & 15] {
        out.push(HEX.get(usize::from(digit)).copied().unwrap_or(b'0'));
    }
}

/// Appends a decoded path in the form in which it is sent. A percent sign is a percent sign: `%` becomes `%25`.
pub fn escape_path(out: &mut Text, path: &[u8]) {
    for byte in path {
        if is_safe(*byte) {
            out.push(*byte);
        } else {
            push_escaped(out, *byte);
        }
    }
}

/// Appends text that is a URI already; only what no header field can hold is escaped.
pub fn escape_controls(out: &mut Text, text: &[u8]) {
    for byte in text {
        if byte.is_ascii_graphic() {
            out.push(*byte);
        } else {
            push_escaped(out, *byte);
        }
    }
}

/// Splits at the first question mark.
pub fn split_query(uri: &[u8]) -> (&[u8], Option<&[u8]>) {
    match uri.iter().position(|byte| *byte == b'?') {
        Some(at) => (uri.get(..at).unwrap_or_default(), uri.get(at + 1..)),
        None => (uri, None),
    }
}

/// The target to send: the decoded `path`, the `query` that the configuration wrote, and the request's own query
/// behind it.
pub fn target(path: &[u8], query: Option<&[u8]>, x: &State) -> Option<PathAndQuery> {
    let own = x.request.uri.query();
    let mut out = Text::new();
    if path.first() != Some(&b'/') {
        out.push(b'/');
    }
    escape_path(&mut out, path);
    if let Some(query) = query {
        out.push(b'?');
        out.extend_from_slice(normalize_query(query).as_bytes());
    }
    if let Some(own) = own {
        out.push(if query.is_some() { b'&' } else { b'?' });
        out.extend_from_slice(own.as_bytes());
    }
    PathAndQuery::try_from(&*out).ok()
}

#[cfg(test)]
mod tests {
    use layers::testing::exchange;

    use super::*;

    #[test]
    fn a_target_keeps_the_query_of_the_request() {
        let cases = [
            ("/a b", None, "http://h/x", "/a%20b"),
            ("/a%20b", None, "http://h/x", "/a%2520b"),
            ("/a", Some("c=d"), "http://h/x", "/a?c=d"),
            ("/a", None, "http://h/x?q=1", "/a?q=1"),
            ("/a", Some("c=d"), "http://h/x?q=1", "/a?c=d&q=1"),
            ("/\u{e9}\n", None, "http://h/x", "/%C3%A9%0A"),
            ("a", None, "http://h/", "/a"),
            ("/a?b", None, "http://h/", "/a%3Fb"),
        ];
        for (path, query, request, expected) in cases {
            let x = exchange("GET", request).build();
            let target = target(path.as_bytes(), query.map(str::as_bytes), &x).unwrap();
            assert_eq!(target.as_str(), expected);
        }
    }

    #[test]
    fn controls_do_not_get_into_a_field() {
        let mut out = Text::new();
        escape_controls(&mut out, "https://a/b%20c?d=\r\nX: y\u{e9}".as_bytes());
        assert_eq!(&*out, b"https://a/b%20c?d=%0D%0AX:%20y%C3%A9");
    }
}
