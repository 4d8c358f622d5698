//! The first look at a request: what is ambiguous is refused, what remains is brought into one form.
//!
//! Runs before anything is matched, so that routes, plugins and the upstream see the same host and path. It settles
//! `x.host`, `x.request.uri` (normal form), `x.decoded_path`, and the limits on the target, the fields and the body.

use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready as now};
use http::header::{self, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Uri, Version};
use http_body::Body as HttpBody;
use tower::{Layer, Service};

use crate::error::{Error, Fault, Reason};
use crate::exchange::{Exchange, State};
use crate::http::normalize::{self, normalize, normalize_query};
use crate::stack::HttpService;
use crate::upstream::fields;

/// Limits on one request. `postern.limits` and nginx's client limits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the request target.
    pub uri: usize,
    /// Header fields, each cookie crumb counted.
    pub header_count: usize,
    /// Bytes of names and values of all header fields.
    pub header_bytes: usize,
    /// Bytes of the body; none is no limit. `client_max_body_size`.
    pub body: Option<u64>,
}

/// Makes [`Sanitize`].
#[derive(Clone)]
pub struct SanitizeLayer {
    limits: Limits,
    options: normalize::Options,
}

impl SanitizeLayer {
    /// With these limits; `options` say how paths are read.
    pub fn new(limits: Limits, options: normalize::Options) -> Self {
        Self { limits, options }
    }
}

impl<S> Layer<S> for SanitizeLayer {
    type Service = Sanitize<S>;

    fn layer(&self, inner: S) -> Sanitize<S> {
        Sanitize { inner, limits: self.limits, options: self.options }
    }
}

/// Refuses ambiguous requests and brings the others into one form.
#[derive(Clone)]
pub struct Sanitize<S> {
    inner: S,
    limits: Limits,
    options: normalize::Options,
}

impl<S: HttpService> Service<Exchange> for Sanitize<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = Either<S::Future, Ready<Result<Exchange, Fault>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        match sanitize(&mut x, &self.limits, self.options) {
            Ok(()) => Either::Left(self.inner.call(x)),
            Err(error) => Either::Right(now(Err(Fault { exchange: x, error }))),
        }
    }
}

/// Settles host and path of a request, as the layer does; `postern explain` uses it without a connection.
///
/// # Errors
/// Why the request is refused.
pub fn sanitize(x: &mut State, limits: &Limits, options: normalize::Options) -> Result<(), Error> {
    if let Some(error) = x.refused.take() {
        return Err(*error);
    }
    settle_method(x)?;
    settle_fields(x, limits)?;
    // Before our own fields are added, so that a client cannot have them taken off again.
    fields::drop_named(&mut x.request.headers);
    settle_host(x)?;
    settle_target(x, limits, options)?;
    settle_body(x, limits)
}

fn settle_method(x: &State) -> Result<(), Error> {
    match x.request.method {
        // A gateway is no forward proxy, and TRACE shows a client what we added for the upstream.
        Method::CONNECT | Method::TRACE => Err(Error::new(Reason::MethodNotAllowed)),
        _ => Ok(()),
    }
}

fn settle_fields(x: &State, limits: &Limits) -> Result<(), Error> {
    let headers = &x.request.headers;
    if headers.len() > limits.header_count {
        return Err(Error::new(Reason::HeadersTooLarge).detail("too many header fields"));
    }
    let (mut bytes, mut chunked, mut length) = (0, false, false);
    for (name, value) in headers {
        bytes += name.as_str().len() + value.len();
        chunked |= *name == header::TRANSFER_ENCODING;
        length |= *name == header::CONTENT_LENGTH;
    }
    if bytes > limits.header_bytes {
        return Err(Error::new(Reason::HeadersTooLarge).detail("header fields too large"));
    }
    if x.request.version < Version::HTTP_2 && chunked && (length || x.request.version == Version::HTTP_10) {
        return Err(
            Error::new(Reason::BadRequest).detail("Transfer-Encoding with Content-Length or HTTP/1.0")
        );
    }
    Ok(())
}

fn settle_host(x: &mut State) -> Result<(), Error> {
    let bad = |why: &'static str| Error::new(Reason::BadHost).detail(why);
    let mut fields = x.request.headers.get_all(header::HOST).iter();
    let field = fields.next();
    if fields.next().is_some() {
        return Err(bad("more than one Host field"));
    }
    let authority = match (x.request.uri.authority(), field) {
        // An absolute target or `:authority` wins over the field (RFC 9112 3.2.2); over HTTP/2 they may not differ.
        (Some(authority), Some(field))
            if x.request.version == Version::HTTP_2
                && !authority.as_str().as_bytes().eq_ignore_ascii_case(field.as_bytes()) =>
        {
            return Err(bad(":authority and Host differ"));
        }
        (Some(authority), _) => {
            let value = HeaderValue::from_str(authority.as_str()).map_err(|_| bad("malformed authority"))?;
            let host = host_of(authority.as_str()).ok_or_else(|| bad("malformed authority"))?;
            (host, Some(value))
        }
        (None, Some(field)) => {
            let text = field.to_str().map_err(|_| bad("malformed Host field"))?;
            (host_of(text).ok_or_else(|| bad("malformed Host field"))?, None)
        }
        (None, None) if x.request.version == Version::HTTP_10 => ((Box::default(), None), None),
        (None, None) => return Err(bad("no Host field")),
    };
    let (asked, from_target) = authority;
    (x.host, x.port) = asked;
    if let Some(value) = from_target {
        x.request.headers.insert(header::HOST, value);
    }
    Ok(())
}

/// The host of `host[:port]` in lower case and without trailing dot, and the port. None when it is malformed.
fn host_of(authority: &str) -> Option<(Box<str>, Option<u16>)> {
    if authority.len() > 255 + 6 {
        return None;
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']')?;
            address.parse::<std::net::Ipv6Addr>().ok()?;
            let host = authority.get(..address.len() + 2)?;
            (host, if after.is_empty() { None } else { Some(after.strip_prefix(':')?) })
        }
        None => match authority.bytes().position(|byte| byte == b':') {
            Some(colon) => (authority.get(..colon)?, Some(authority.get(colon + 1..)?)),
            None => (authority, None),
        },
    };
    let port = match port {
        None | Some("") => None,
        Some(digits) => Some(number(digits)?),
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    let valid = host.starts_with('[')
        || host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~'));
    (!host.is_empty() && valid && host.len() <= 255).then(|| (host.to_ascii_lowercase().into(), port))
}

/// The number of a port.
fn number(digits: &str) -> Option<u16> {
    let digit = |number: u16, byte: u8| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        number.checked_mul(10)?.checked_add(u16::from(digit))
    };
    digits.bytes().try_fold(0, digit)
}

fn settle_target(x: &mut State, limits: &Limits, options: normalize::Options) -> Result<(), Error> {
    let target = x.request.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    if target.len() > limits.uri {
        return Err(Error::new(Reason::UriTooLong));
    }
    let bad = |why: &'static str| Error::new(Reason::BadUri).detail(why);
    let uri = &x.request.uri;
    if uri.scheme_str().is_some_and(|scheme| !matches!(scheme, "http" | "https")) {
        return Err(bad("a scheme that is not spoken here"));
    }
    let normal = normalize(uri.path().as_bytes(), options).map_err(|error| bad(error.code()))?;
    let query = uri.query().map(|query| normalize_query(query.as_bytes()));
    let decoded = (*normal.decoded != *uri.path().as_bytes())
        .then(|| String::from_utf8_lossy(&normal.decoded).into_owned().into_boxed_str());
    let same_path = normal.sent == uri.path();
    let same_query = query.as_deref() == uri.query();
    let absolute = uri.authority().is_some();
    let rewritten = if same_path && same_query && !absolute {
        None
    } else {
        let target = match &query {
            Some(query) => format!("{}?{query}", normal.sent),
            None => normal.sent.into_owned(),
        };
        Some(Uri::try_from(target).map_err(|_| bad("malformed target"))?)
    };
    x.decoded_path = decoded;
    if let Some(rewritten) = rewritten {
        x.original_uri = Some(Box::new(std::mem::replace(&mut x.request.uri, rewritten)));
    }
    Ok(())
}

fn settle_body(x: &mut State, limits: &Limits) -> Result<(), Error> {
    let Some(limit) = limits.body else { return Ok(()) };
    let hint = x.request_body.size_hint();
    if hint.lower() > limit {
        return Err(Error::new(Reason::BodyTooLarge));
    }
    if hint.upper().is_none_or(|upper| upper > limit) {
        let body = std::mem::take(&mut x.request_body);
        x.request_body = body.limited(limit);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use bytes::Bytes;
    use http_body::Frame;

    use super::*;
    use crate::body::{Body, BodyError, TooLarge};
    use crate::testing::{ExchangeBuilder, exchange};

    const LIMITS: Limits = Limits { uri: 64, header_count: 4, header_bytes: 64, body: Some(10) };

    fn verdict(x: ExchangeBuilder) -> Result<Exchange, Reason> {
        let mut x = x.build();
        match sanitize(&mut x, &LIMITS, normalize::Options::default()) {
            Ok(()) => Ok(x),
            Err(error) => Err(error.reason()),
        }
    }

    #[test]
    fn the_host_is_the_one_that_was_asked_for_or_the_request_is_refused() {
        let cases = [
            ("a.com", Some(("a.com", None))),
            ("A.com:9080", Some(("a.com", Some(9080)))),
            ("a.com.", Some(("a.com", None))),
            ("a.com:", Some(("a.com", None))),
            ("[::1]:80", Some(("[::1]", Some(80)))),
            ("a_b.com", Some(("a_b.com", None))),
            ("a.com:x", None),
            ("a.com:99999", None),
            ("u@a.com", None),
            ("a b", None),
            ("a/b", None),
            ("[::1", None),
            ("", None),
        ];
        for (field, host) in cases {
            let got = verdict(exchange("GET", "/").header("host", field));
            assert_eq!(got.as_ref().ok().map(|x| (&*x.host, x.port)), host, "{field}");
        }
        assert_eq!(verdict(exchange("GET", "/")).unwrap_err(), Reason::BadHost);
        let twice = exchange("GET", "/").header("host", "a").header("host", "a");
        assert_eq!(verdict(twice).unwrap_err(), Reason::BadHost);
    }

    #[test]
    fn an_absolute_target_wins_over_the_host_field() {
        let x = verdict(exchange("GET", "http://b.com:81/x").header("host", "a.com")).unwrap();
        assert_eq!((&*x.host, x.port), ("b.com", Some(81)));
        assert_eq!(x.request.headers[header::HOST], "b.com:81");
        assert_eq!(x.request.uri, "/x");
    }

    #[test]
    fn the_path_is_normal_and_the_original_is_kept() {
        let x = verdict(exchange("GET", "/a/./b%20c?q=%zz").header("host", "a")).unwrap();
        assert_eq!(x.path(), "/a/b c");
        assert_eq!(x.request.uri, "/a/b%20c?q=%zz");
        assert_eq!(x.request_uri(), "/a/./b%20c?q=%zz");
        let x = verdict(exchange("GET", "/plain?q=1").header("host", "a")).unwrap();
        assert!(x.original_uri.is_none() && x.decoded_path.is_none());
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let long = format!("/{}", "a".repeat(64));
        assert_eq!(verdict(exchange("GET", &long).header("host", "a")).unwrap_err(), Reason::UriTooLong);
        let body = exchange("POST", "/").header("host", "a").body("12345678901");
        assert_eq!(verdict(body).unwrap_err(), Reason::BodyTooLarge);
        let field = "b".repeat(64);
        let fields = exchange("GET", "/").header("host", "a").header("x", &field);
        assert_eq!(verdict(fields).unwrap_err(), Reason::HeadersTooLarge);
        let mut many = exchange("GET", "/").header("host", "a");
        for name in ["a", "b", "c", "d"] {
            many = many.header(name, "");
        }
        assert_eq!(verdict(many).unwrap_err(), Reason::HeadersTooLarge);
    }

    #[tokio::test]
    async fn a_body_of_unknown_length_ends_at_the_limit() {
        struct Drip(u8);
        impl HttpBody for Drip {
            type Data = Bytes;
            type Error = BodyError;
            fn poll_frame(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
                self.0 -= 1;
                Poll::Ready((self.0 > 0).then(|| Ok(Frame::data(Bytes::from_static(b"abc")))))
            }
        }
        let mut fits = verdict(exchange("POST", "/").header("host", "a").body(Body::boxed(Drip(4)))).unwrap();
        assert_eq!(fits.request_body.collect_up_to(100).await.unwrap().len(), 9);
        let mut over = verdict(exchange("POST", "/").header("host", "a").body(Body::boxed(Drip(5)))).unwrap();
        assert!(over.request_body.collect_up_to(100).await.unwrap_err().is::<TooLarge>());
    }

    #[test]
    fn tunnels_and_ambiguous_framing_are_refused() {
        assert_eq!(
            verdict(exchange("TRACE", "/").header("host", "a")).unwrap_err(),
            Reason::MethodNotAllowed
        );
        let both = exchange("POST", "/")
            .header("host", "a")
            .header("transfer-encoding", "chunked")
            .header("content-length", "3");
        assert_eq!(verdict(both).unwrap_err(), Reason::BadRequest);
    }
}
