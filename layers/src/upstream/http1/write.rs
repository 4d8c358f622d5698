//! The head of a request, written straight from the fields of the exchange.
//!
//! `Host` and the length of the body are settled here; fields of the client's connection, and those that `Connection`
//! names, are passed over. Names are in lower case. What is written is already valid: the types it comes from hold no
//! CR, LF or NUL.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::sending::Length;
use crate::exchange::State;
use crate::upstream::send::Route;
use crate::upstream::{fields, mesh};

/// Appends the head of the request that `x` sends.
pub(super) fn head(out: &mut Vec<u8>, x: &State, route: &Route<'_>, length: Option<Length>) {
    let method = x.forward.method.as_ref().unwrap_or(&x.request.method);
    let target = x.forward.uri.as_ref().or(x.request.uri.path_and_query());
    out.extend_from_slice(method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(target.map_or("/", |target| target.as_str()).as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    field(out, &header::HOST, route.host);
    fields(out, &x.request.headers);
    match length {
        None => {}
        Some(Length::Known(length)) => {
            out.extend_from_slice(b"content-length: ");
            out.extend_from_slice(itoa::Buffer::new().format(length).as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        Some(Length::Chunked) => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
    }
    if let Some(spoken) = &route.spoken {
        field(out, &mesh::SPOKEN, spoken);
    }
    if let Some(protocol) = route.upgrade {
        out.extend_from_slice(b"connection: upgrade\r\n");
        field(out, &header::UPGRADE, protocol);
    }
    out.extend_from_slice(b"\r\n");
}

/// The fields that go on. `Expect` stays here: the client is told to go on when the connection takes the body.
fn fields(out: &mut Vec<u8>, headers: &HeaderMap) {
    let named = fields::named(headers);
    for (name, value) in headers {
        let stays = fields::own(name.as_str().as_bytes()).is_some()
            || matches!(*name, header::HOST | header::EXPECT)
            || named.contains(name);
        if !stays {
            field(out, name, value);
        }
    }
}

pub(super) fn field(out: &mut Vec<u8>, name: &HeaderName, value: &HeaderValue) {
    let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
    out.reserve(name.len() + value.len() + 4);
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}
