//! From a head that was read to a request: one copy of its bytes, which the target and all values share.

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Uri, Version};

use crate::body::Body;
use crate::spare;
use crate::transport::framing::{HeadReader, Violation, encoded};

/// Room for the fields that the gateway and its plugins add: without it nearly every map would grow once.
const ADDED: usize = 8;

/// The request whose head is `bytes`, as `reader` has read it.
///
/// # Errors
/// The target is no URI.
pub(crate) fn request(reader: &HeadReader, bytes: &Bytes) -> Result<Request<Body>, Violation> {
    let (method, target) = reader.request_line().ok_or(Violation::RequestLine)?;
    let method = bytes.get(method).and_then(|method| Method::from_bytes(method).ok());
    let target = bytes.get(target.clone()).map(|_| bytes.slice(target)).unwrap_or_default();
    let facts = reader.facts();
    let mut fields = spare::fields(reader.fields().len() + ADDED);
    for place in reader.fields() {
        let name = bytes.get(place.name()).and_then(field_name).ok_or(Violation::FieldName)?;
        let value = bytes.get(place.value()).map(|_| bytes.slice(place.value())).unwrap_or_default();
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| Violation::Control)?;
        fields.append(name, value);
    }
    let mut request = Request::new(Body::Empty);
    *request.method_mut() = method.ok_or(Violation::RequestLine)?;
    *request.uri_mut() = uri(target, facts.encode)?;
    *request.version_mut() = if facts.http10 { Version::HTTP_10 } else { Version::HTTP_11 };
    *request.headers_mut() = fields;
    Ok(request)
}

/// What stands in for a request that is refused: its line for the log, as far as that is good, and no field.
pub(crate) fn refused(reader: &HeadReader, bytes: &[u8]) -> Request<Body> {
    let mut request = Request::new(Body::Empty);
    let line = reader.request_line().filter(|_| !reader.facts().connect);
    let line = line.and_then(|(method, target)| {
        let method = Method::from_bytes(bytes.get(method)?).ok()?;
        let target = Bytes::copy_from_slice(bytes.get(target)?);
        Some((method, uri(target, reader.facts().encode).ok()?))
    });
    if let Some((method, uri)) = line {
        *request.method_mut() = method;
        *request.uri_mut() = uri;
    }
    request
}

fn uri(target: Bytes, encode: bool) -> Result<Uri, Violation> {
    let target = if encode { encoded(&target).into() } else { target };
    Uri::from_maybe_shared(target).map_err(|_| Violation::Target)
}

/// The name of a field. Usual ones in their usual spelling are told at a glance.
fn field_name(name: &[u8]) -> Option<HeaderName> {
    Some(match name {
        b"Host" | b"host" => header::HOST,
        b"Accept" | b"accept" => header::ACCEPT,
        b"Cookie" | b"cookie" => header::COOKIE,
        b"Origin" | b"origin" => header::ORIGIN,
        b"Referer" | b"referer" => header::REFERER,
        b"Connection" | b"connection" => header::CONNECTION,
        b"User-Agent" | b"user-agent" => header::USER_AGENT,
        b"Content-Type" | b"content-type" => header::CONTENT_TYPE,
        b"Authorization" | b"authorization" => header::AUTHORIZATION,
        b"Cache-Control" | b"cache-control" => header::CACHE_CONTROL,
        b"Content-Length" | b"content-length" => header::CONTENT_LENGTH,
        b"Accept-Encoding" | b"accept-encoding" => header::ACCEPT_ENCODING,
        b"Accept-Language" | b"accept-language" => header::ACCEPT_LANGUAGE,
        other => return HeaderName::from_bytes(other).ok(),
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use proptest::prelude::*;

    use super::*;
    use crate::transport::framing::HeadLimits;

    fn read(text: &str) -> Result<Request<Body>, Violation> {
        let mut reader = HeadReader::new(HeadLimits::default());
        let length = reader.read(text.as_bytes())?.expect("a whole head");
        request(&reader, &Bytes::copy_from_slice(&text.as_bytes()[..length]))
    }

    #[test]
    fn a_head_becomes_a_request() {
        let text = "\r\nPATCH /a?b=c HTTP/1.1\r\nHost: h\r\nX-One:  1 \r\nuser-AGENT: x\r\nX-One:\t2\r\nEmpty:\r\n\r\n";
        let request = read(text).unwrap();
        assert_eq!((request.method().as_str(), request.version()), ("PATCH", Version::HTTP_11));
        assert_eq!(request.uri(), "/a?b=c");
        let fields: Vec<_> =
            request.headers().iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(
            fields,
            [("host", "h"), ("x-one", "1"), ("x-one", "2"), ("user-agent", "x"), ("empty", "")]
        );
        assert_eq!(read("GET / HTTP/1.0\r\n\r\n").unwrap().version(), Version::HTTP_10);
    }

    #[test]
    fn every_form_of_a_target_is_taken() {
        for (target, expected) in [
            ("/", "/"),
            ("*", "*"),
            ("http://a/b", "http://a/b"),
            ("/\u{e9}?f={\"a\":1}&g=<`>", "/%C3%A9?f={%22a%22:1}&g=%3C%60%3E"),
        ] {
            let request = read(&format!("OPTIONS {target} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
            assert_eq!(request.uri(), expected);
        }
        let connect = read("CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n").unwrap();
        assert_eq!(connect.uri().authority().unwrap(), "a:443");
        let refused = read("GET http:// HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(refused.unwrap_err(), Violation::Target);
    }

    #[test]
    fn no_byte_that_passes_in_a_target_makes_it_no_uri() {
        for byte in 0x21..=0x7eu8 {
            for target in [format!("/a{}b", char::from(byte)), format!("/a?b{}c", char::from(byte))] {
                let read = read(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"));
                match byte {
                    b'#' => assert_eq!(read.unwrap_err(), Violation::Target),
                    b'"' | b'<' | b'>' | b'`' => assert!(read.unwrap().uri().to_string().contains('%')),
                    _ => assert_eq!(read.unwrap().uri().to_string(), target),
                }
            }
        }
    }

    #[test]
    fn a_refused_head_keeps_its_good_request_line_for_the_log() {
        for (text, method, target) in [
            ("PUT /x?y HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", "PUT", "/x?y"),
            ("PUT /x y HTTP/1.1\r\n", "GET", "/"),
            ("CONNECT a:1 HTTP/1.1\r\n\r\n", "GET", "/"),
            ("GET /a\"b HTTP/1.1\r\n\r\n", "GET", "/a%22b"),
        ] {
            let mut reader = HeadReader::new(HeadLimits::default());
            assert!(reader.read(text.as_bytes()).is_err(), "{text}");
            let request = refused(&reader, text.as_bytes());
            assert_eq!((request.method().as_str(), request.uri().to_string().as_str()), (method, target));
            assert!(request.headers().is_empty());
        }
    }

    proptest! {
        /// Another parser reads the same of what passes.
        #[test]
        fn what_passes_is_what_others_read(
            method in "[A-Z]{1,8}",
            target in "/[a-zA-Z0-9/?&=%._~!$'()*+,;:@-]{0,40}",
            fields in prop::collection::vec(("[A-Za-z][A-Za-z0-9_-]{0,20}", "[ \t]{0,2}([!-~]([ -~]{0,20}[!-~])?)?[ \t]{0,2}"), 0..12),
        ) {
            let mut text = format!("{method} {target} HTTP/1.1\r\nHost: a\r\n");
            for (name, value) in &fields {
                text.push_str(&format!("{name}:{value}\r\n"));
            }
            text.push_str("\r\n");
            let Ok(request) = read(&text) else { return Ok(()) };
            let mut places = [httparse::EMPTY_HEADER; 32];
            let mut other = httparse::Request::new(&mut places);
            prop_assert_eq!(other.parse(text.as_bytes()), Ok(httparse::Status::Complete(text.len())));
            prop_assert_eq!(Some(request.method().as_str()), other.method);
            prop_assert_eq!(other.path.map(str::to_owned), Some(request.uri().to_string()));
            prop_assert_eq!(request.headers().len(), other.headers.len());
            let mut expected = HeaderMap::new();
            for field in other.headers {
                expected.append(
                    HeaderName::from_bytes(field.name.as_bytes()).unwrap(),
                    HeaderValue::from_bytes(field.value).unwrap(),
                );
            }
            prop_assert_eq!(request.headers(), &expected);
        }
    }
}
