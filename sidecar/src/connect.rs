//! The head of a `CONNECT` request, as clients of an HTTP proxy send it first on a connection.

use layers::transport::framing::{HeadLimits, HeadReader};

/// What a proxy is asked for first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Not all of the head has come.
    Partial,
    /// A way to this host and port; so many bytes were its head.
    Connect { host: String, port: u16, length: usize },
    /// No `CONNECT`, or a broken one: a request like others, which is answered as such.
    Request,
}

/// How large the head may be.
const LIMITS: HeadLimits = HeadLimits { line: 1024, head: 16 * 1024, fields: 64 };

/// What `bytes`, the first of a connection, ask for.
pub fn read(bytes: &[u8]) -> Asked {
    const METHOD: &[u8] = b"CONNECT ";
    let seen = bytes.get(..METHOD.len().min(bytes.len())).unwrap_or_default();
    if !METHOD.starts_with(seen) {
        return Asked::Request;
    }
    let mut reader = HeadReader::new(LIMITS);
    match reader.read(bytes) {
        Ok(None) => Asked::Partial,
        Ok(Some(length)) => {
            let target = reader.request_line().and_then(|(_, target)| bytes.get(target));
            match target.and_then(|target| authority(std::str::from_utf8(target).ok()?)) {
                Some((host, port)) => Asked::Connect { host, port, length },
                None => Asked::Request,
            }
        }
        Err(_) => Asked::Request,
    }
}

/// `host:port`, the host in lower case, without brackets and the dot at its end.
pub fn authority(text: &str) -> Option<(String, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port > 0)?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|host| host.parse::<std::net::Ipv6Addr>().is_ok())?,
        // A name is the same with its last dot, whoever is asked about it.
        None => Some(host.strip_suffix('.').unwrap_or(host)).filter(|host| is_name(host))?,
    };
    Some((host.to_ascii_lowercase(), port))
}

/// Whether this can be a host: a name or an address of IPv4.
pub fn is_name(host: &str) -> bool {
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    !host.is_empty() && host.len() <= 253 && host.bytes().all(valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_asked_for_and_everything_else_is_a_request() {
        let connect = |host: &str, port, length| Asked::Connect { host: host.to_owned(), port, length };
        let cases: [(&str, Asked); 9] = [
            ("CONNECT Api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\nrest", connect("api.test", 443, 53)),
            ("CONNECT api.test.:443 HTTP/1.1\r\nHost: a\r\n\r\n", connect("api.test", 443, 43)),
            ("CONNECT [::1]:80 HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", connect("::1", 80, 45)),
            ("CONN", Asked::Partial),
            ("CONNECT a:1 HTTP/1.1\r\nHost:", Asked::Partial),
            ("GET http://a/ HTTP/1.1\r\n", Asked::Request),
            ("CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", Asked::Request),
            ("CONNECT a:0 HTTP/1.1\r\nHost: a:0\r\n\r\n", Asked::Request),
            ("CONNECT a b:1 HTTP/1.1\r\n\r\n", Asked::Request),
        ];
        for (text, expected) in cases {
            assert_eq!(read(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn an_authority_has_a_host_and_a_port() {
        for text in ["a", ".:1", "a:", "a:x", ":1", "a b:1", "[::1:1", "[a]:1", "a/b:1", "a@b:1"] {
            assert_eq!(authority(text), None, "{text}");
        }
        assert_eq!(authority("10.0.0.1:80"), Some(("10.0.0.1".to_owned(), 80)));
    }
}
