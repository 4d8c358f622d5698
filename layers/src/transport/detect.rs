//! What a connection speaks, told by the first bytes of whoever speaks first.
//!
//! Nothing waits here: as long as the bytes may still become another protocol the answer is that more are needed, and the
//! caller decides how long it waits and what it does meanwhile. In doubt bytes are opaque: those are carried as they are,
//! so a wrong guess costs what HTTP would have offered and breaks nothing.

use rustls::server::Acceptor;

use crate::worker::serve::PREFACE;

/// A connection's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// A request line of HTTP/1.
    Http1,
    /// The preface of HTTP/2.
    Http2,
    /// A TLS handshake.
    Tls,
    /// Something else.
    Opaque,
}

/// Bytes within which the request line of HTTP/1 has to be recognised.
pub const MAX_FIRST: usize = 16 * 1024;

/// Methods that need no look at what follows them.
const METHODS: [&[u8]; 9] =
    [b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE"];

/// The longest method that is taken for one.
const MAX_METHOD: usize = 24;

/// What `bytes`, the first of a connection, are; none while more are needed to tell.
pub fn detect(bytes: &[u8]) -> Option<First> {
    match bytes {
        [] => return None,
        // A handshake record, and the major version of every TLS.
        [0x16, 0x03, ..] => return Some(First::Tls),
        [0x16] => return None,
        _ => {}
    }
    if bytes.starts_with(PREFACE) {
        return Some(First::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    // Parsers of HTTP/1 pass over empty lines before a request.
    let rest = match bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')) {
        Some(start) => bytes.get(start..).unwrap_or_default(),
        None if bytes.len() <= 4 => return None,
        None => return Some(First::Opaque),
    };
    http1(rest)
}

fn http1(bytes: &[u8]) -> Option<First> {
    let is_method = |byte: &u8| byte.is_ascii_uppercase() || *byte == b'-' || *byte == b'_';
    let length = bytes.iter().position(|byte| !is_method(byte));
    let Some(length) = length else {
        return (bytes.len() > MAX_METHOD).then_some(First::Opaque);
    };
    let (method, rest) = bytes.split_at_checked(length).unwrap_or_default();
    if method.is_empty() || method.len() > MAX_METHOD || rest.first() != Some(&b' ') {
        return Some(First::Opaque);
    }
    if METHODS.contains(&method) {
        return Some(First::Http1);
    }
    // A word of another protocol, or a method that is not usual: the end of its line tells.
    let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
        return (bytes.len() > MAX_FIRST).then_some(First::Opaque);
    };
    let line = rest.get(..end).unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let is_http = line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0");
    Some(if is_http { First::Http1 } else { First::Opaque })
}

/// What a ClientHello asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// The server's name, in lower case.
    pub name: Option<Box<str>>,
    /// The protocols that are offered, in the order of preference.
    pub alpn: Vec<Vec<u8>>,
}

/// What the first bytes of a TLS connection say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HelloRead {
    /// Not all of it has come.
    Partial,
    /// All of it.
    Whole(Hello),
    /// It only looked like TLS, or is one that nobody understands.
    Broken,
}

/// Reads a ClientHello without answering it. The bytes stay what they are, for whoever the handshake is with.
pub fn hello(bytes: &[u8]) -> HelloRead {
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        match acceptor.read_tls(&mut rest) {
            Ok(1..) => {}
            _ => return HelloRead::Broken,
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                return HelloRead::Whole(Hello {
                    name: hello.server_name().map(|name| name.to_ascii_lowercase().into()),
                    alpn: hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect(),
                });
            }
            Ok(None) => {}
            Err(_) => return HelloRead::Broken,
        }
    }
    if bytes.len() > MAX_FIRST { HelloRead::Broken } else { HelloRead::Partial }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    #[test]
    fn the_first_bytes_tell_and_every_shorter_piece_waits_or_tells_the_same() {
        let cases: [(&[u8], First, &str); 16] = [
            (b"GET / HTTP/1.1\r\n", First::Http1, "a usual method"),
            (b"\r\nPOST /a HTTP/1.1\r\n", First::Http1, "after an empty line"),
            (b"PROPFIND /a HTTP/1.1\r\n", First::Http1, "an unusual method"),
            (b"MKCOL /a HTTP/1.0\n", First::Http1, "an unusual method, a bare line end"),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", First::Http2, "HTTP/2"),
            (b"\x16\x03\x01\x00", First::Tls, "TLS"),
            (b"\x16\x16", First::Opaque, "not TLS after all"),
            (b"EHLO there\r\n", First::Opaque, "SMTP"),
            (b"PING\r\n", First::Opaque, "Redis, inline"),
            (b"*1\r\n$4\r\nPING\r\n", First::Opaque, "Redis"),
            (b"get key\r\n", First::Opaque, "memcached"),
            (b"SELECT 1 FROM a HTTP\n", First::Opaque, "a word in capitals is no method"),
            (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", First::Opaque, "PostgreSQL"),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", First::Opaque, "too long for a method"),
            (b"\r\n\r\n\r\n", First::Opaque, "nothing but line ends"),
            (b"PRI * HTTP/2.0\r\n\r\nXX", First::Opaque, "nearly HTTP/2"),
        ];
        for (bytes, expected, case) in cases {
            assert_eq!(detect(bytes), Some(expected), "{case}");
            for end in 0..bytes.len() {
                let part = detect(&bytes[..end]);
                assert!(part.is_none() || part == Some(expected), "{case}: {end} bytes are {part:?}");
            }
        }
    }

    fn client_hello(alpn: &[&[u8]]) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let name = ServerName::try_from("Api.Test").unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_hello_is_read_when_it_is_whole() {
        let bytes = client_hello(&[b"postern-h2", b"h2"]);
        let expected =
            Hello { name: Some("api.test".into()), alpn: vec![b"postern-h2".to_vec(), b"h2".to_vec()] };
        assert_eq!(hello(&bytes), HelloRead::Whole(expected));
        for end in 0..bytes.len() {
            assert_eq!(hello(&bytes[..end]), HelloRead::Partial, "{end} bytes");
        }
        assert_eq!(hello(b"\x16\x03\x01\x00\x05hello"), HelloRead::Broken);
        assert_eq!(
            hello(&client_hello(&[])),
            HelloRead::Whole(Hello { alpn: Vec::new(), name: Some("api.test".into()) })
        );
    }
}
