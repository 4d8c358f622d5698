//! Turns failures into answers, and marks every answer of our own with `Proxy-Status` (RFC 9209).
//!
//! Bodies are those an APISIX user knows: JSON for an unmatched route, the plain error page of its server for what
//! fails on the way to the upstream. A gRPC client gets a gRPC status.

use http::{HeaderValue, Response, StatusCode, Version, header};

use crate::body::Body;
use crate::error::{Blame, Error, Reason};
use crate::exchange::{Answered, Exchange};

/// The name of this hop in `Proxy-Status`.
const HOP: &str = "postern";

/// Answers `x` because of `error`.
pub fn rescue(x: &mut Exchange, error: Error) {
    let reason = error.reason();
    match reason.blame() {
        Blame::Client => tracing::debug!(reason = reason.code(), %error, "request refused"),
        Blame::Gateway | Blame::Upstream => tracing::warn!(
            reason = reason.code(),
            route = x.target.as_ref().map_or("", |target| &target.route_id),
            host = %x.host,
            %error,
            "request failed"
        ),
    }
    let response = if is_grpc(x) { grpc(reason) } else { http(reason) };
    x.reply(response, reason);
    x.error = Some(Box::new(error));
}

/// Marks an answer of our own. An answer of the upstream keeps the marks that upstream proxies made.
pub(crate) fn proxy_status(x: &mut Exchange) {
    let Answered::Gateway(reason) = x.answered else { return };
    let value = match (x.answered_by_plugin(), x.response.status().as_u16()) {
        (Some(plugin), ..400) => format!("{HOP}; details=\"plugin:{plugin}\""),
        (Some(plugin), _) => format!("{HOP}; error={}; details=\"plugin:{plugin}\"", reason.proxy_status()),
        (None, _) => {
            let (error, code) = (reason.proxy_status(), reason.code());
            match x.policy.as_ref().filter(|_| matches!(reason, Reason::PolicyDenied | Reason::EgressDenied))
            {
                Some(policy) => format!("{HOP}; error={error}; details=\"{code}:{policy}\""),
                None => format!("{HOP}; error={error}; details=\"{code}\""),
            }
        }
    };
    if let Ok(value) = HeaderValue::try_from(value) {
        x.response.headers_mut().insert("proxy-status", value);
    }
}

fn is_grpc(x: &Exchange) -> bool {
    x.request.version == Version::HTTP_2
        && x.request.headers.get(header::CONTENT_TYPE).is_some_and(|kind| {
            kind.as_bytes().starts_with(b"application/grpc")
                && !kind.as_bytes().starts_with(b"application/grpc-web")
        })
}

fn http(reason: Reason) -> Response<Body> {
    let status = reason.status();
    let (kind, body) = match reason {
        Reason::RouteNotFound | Reason::ServiceNotFound => {
            ("text/plain; charset=utf-8", Body::from("{\"error_msg\":\"404 Route Not Found\"}\n"))
        }
        Reason::LookupUnknown => {
            ("text/plain; charset=utf-8", Body::from("{\"error_msg\":\"404 Unknown Lookup Key\"}\n"))
        }
        _ => ("text/html; charset=utf-8", Body::from(page(status))),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if closes(reason) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// After these the rest of the connection cannot be trusted or is not wanted.
fn closes(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::BadRequest
            | Reason::BadHost
            | Reason::BadUri
            | Reason::HeadersTooLarge
            | Reason::UriTooLong
            | Reason::BodyTooLarge
            | Reason::RequestTimeout
    )
}

/// The error page, in the form that users of nginx know.
pub fn page(status: StatusCode) -> String {
    let title = format!("{} {}", status.as_u16(), status.canonical_reason().unwrap_or("Error"));
    format!(
        "<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n\
         <hr><center>postern</center>\r\n</body>\r\n</html>\r\n"
    )
}

/// A gRPC answer without messages: status and message in the head (Trailers-Only).
fn grpc(reason: Reason) -> Response<Body> {
    // Codes of the gRPC specification; the mapping from HTTP is that of its http-grpc-status-mapping page.
    let code = match reason.status().as_u16() {
        400 => "13",
        401 => "16",
        403 => "7",
        404 => "12",
        429 | 502 | 503 => "14",
        504 => "4",
        _ => "2",
    };
    let mut response = Response::new(Body::Empty);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from_static(code));
    headers.insert("grpc-message", HeaderValue::from_static(reason.code()));
    response
}
