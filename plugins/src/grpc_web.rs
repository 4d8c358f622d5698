//! `grpc-web`: lets browsers call gRPC services.
//!
//! Phases: `access` turns the request into a gRPC call, around the upstream the trailers of the answer become a last
//! frame of its body, and the response phase sets the fields that browsers ask for. Messages pass as they come, in both
//! forms (binary and text) and for calls that stream answers.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use config::error::ConfigError;
use config::fields::Int;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body::{Body as HttpBody, Frame};
use layers::body::{Body, BodyError};
use layers::error::Fault;
use layers::exchange::{Exchange, State};
use layers::plugin::{Access, Around, BuildEnv, Definition, Flow, Hooks, Next, OnResponse};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::grpc;
use crate::support::reply::Canned;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Header fields that a script of another site may send, separated by commas.
    #[serde(default = "allow_headers")]
    cors_allow_headers: String,
    /// The largest body of a request, in bytes. A larger one is answered with 413, or broken off when it has become so.
    #[serde(default)]
    max_req_body_size: Int<1, { u32::MAX }, 67_108_864>,
}

fn allow_headers() -> String {
    "content-type,x-grpc-web,x-user-agent".into()
}

/// The plugin.
pub struct GrpcWeb {
    allow_headers: HeaderValue,
    longest: u64,
    preflight: Canned,
    wrong_method: Canned,
    wrong_request: Canned,
    too_large: Canned,
}

/// What a call is, from its request to its answer.
#[derive(Clone)]
struct Call {
    /// The media type of request and answer.
    kind: HeaderValue,
    /// Whether bodies are in base64.
    text: bool,
}

impl Definition for GrpcWeb {
    const NAME: &'static str = "grpc-web";
    const PRIORITY: i32 = 505;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        fields(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let plugin = Arc::new(Self {
            allow_headers: fields(&config)?,
            longest: config.max_req_body_size.get().into(),
            preflight: Canned::status(StatusCode::NO_CONTENT),
            wrong_method: Canned::status(StatusCode::METHOD_NOT_ALLOWED),
            wrong_request: Canned::status(StatusCode::BAD_REQUEST),
            too_large: Canned::status(StatusCode::PAYLOAD_TOO_LARGE),
        });
        hooks.access(&plugin);
        hooks.around(&plugin);
        hooks.response(&plugin);
        Ok(())
    }
}

fn fields(config: &Config) -> Result<HeaderValue, ConfigError> {
    HeaderValue::from_str(&config.cors_allow_headers)
        .map_err(|_| ConfigError::invalid("/cors_allow_headers", "write names of header fields"))
}

/// Whether the media type is one of gRPC-Web, and of its form in text.
fn form(kind: &HeaderValue) -> Option<bool> {
    let kind = kind.as_bytes().split(|byte| *byte == b';').next()?.trim_ascii();
    let rest = kind.strip_prefix(b"application/grpc-web")?;
    match rest {
        b"" | b"+proto" => Some(false),
        b"-text" | b"-text+proto" => Some(true),
        _ => None,
    }
}

/// The path of the method: what the `*` of the route's pattern stands for, or the whole path.
fn method_path(x: &State) -> Option<PathAndQuery> {
    let pattern = x.matched_uri.as_deref().unwrap_or_default();
    let prefix = pattern.strip_suffix('*').filter(|prefix| !prefix.contains([':', '{']));
    let path = x.request.uri.path();
    let rest = prefix.and_then(|prefix| path.strip_prefix(prefix)).unwrap_or(path);
    if rest.starts_with('/') { rest.parse().ok() } else { format!("/{rest}").parse().ok() }
}

impl Access for GrpcWeb {
    fn access(&self, x: &mut Exchange) -> Flow {
        if x.request.method == Method::OPTIONS {
            return self.preflight.flow();
        }
        if x.request.method != Method::POST {
            return self.wrong_method.flow();
        }
        let Some(kind) = x.request.headers.get(header::CONTENT_TYPE).cloned() else {
            return self.wrong_request.flow();
        };
        let (Some(text), Some(path)) = (form(&kind), method_path(x)) else { return self.wrong_request.flow() };
        let size = x.request_body.size_hint();
        if size.lower() > self.longest {
            return self.too_large.flow();
        }
        if size.upper().is_none_or(|upper| upper > self.longest) {
            x.request_body = std::mem::take(&mut x.request_body).limited(self.longest);
        }
        x.forward.uri = Some(path);
        x.request.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        x.request.headers.remove(header::ACCEPT_ENCODING);
        if text {
            x.request.headers.remove(header::CONTENT_LENGTH);
            let body = std::mem::take(&mut x.request_body);
            x.request_body = Body::boxed(FromText { body, held: BytesMut::new() });
        }
        x.put_slot(Call { kind, text });
        Flow::Next
    }
}

impl Around for GrpcWeb {
    async fn around(&self, x: Exchange, next: Next) -> Result<Exchange, Fault> {
        let mut x = next.run(x).await?;
        let Some(call) = x.slot::<Call>().cloned() else { return Ok(x) };
        // Something else than a gRPC answer, such as the page of a proxy on the way, is passed on as it is.
        if !grpc::is_grpc(x.response.headers().get(header::CONTENT_TYPE)) {
            return Ok(x);
        }
        // An answer without messages tells its end in the head.
        let ended = x.response.headers().contains_key(grpc::STATUS).then(|| x.response.headers().clone());
        let headers = x.response.headers_mut();
        headers.insert(header::CONTENT_TYPE, call.kind);
        for name in [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::TRAILER] {
            headers.remove(name);
        }
        let body = std::mem::take(x.response.body_mut());
        *x.response.body_mut() = Body::boxed(ToWeb { body, text: call.text, ended, over: false });
        Ok(x)
    }
}

impl OnResponse for GrpcWeb {
    fn response(&self, x: &mut Exchange) {
        let options = x.request.method == Method::OPTIONS;
        let headers = x.response.headers_mut();
        if options {
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("POST"));
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, self.allow_headers.clone());
        }
        // What `cors` has set is more exact.
        if !headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        }
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("grpc-message,grpc-status"));
    }
}

/// A request body in base64, decoded as it comes. It may be padded wherever the client has flushed.
struct FromText {
    body: Body,
    /// Fewer than four characters.
    held: BytesMut,
}

#[derive(Debug, thiserror::Error)]
#[error("the body is not base64")]
struct NotText;

impl FromText {
    fn decode(&mut self, piece: &[u8]) -> Result<Bytes, NotText> {
        self.held.extend(piece.iter().filter(|byte| !byte.is_ascii_whitespace()));
        let whole = self.held.split_to(self.held.len() / 4 * 4);
        let mut out = Vec::with_capacity(whole.len() / 4 * 3);
        let mut rest = &whole[..];
        while !rest.is_empty() {
            // Up to the end of the group in which the next padding stands.
            let until = rest.iter().position(|byte| *byte == b'=').map_or(rest.len(), |at| at / 4 * 4 + 4);
            let (part, after) = rest.split_at_checked(until).ok_or(NotText)?;
            STANDARD.decode_vec(part, &mut out).map_err(|_| NotText)?;
            rest = after;
        }
        Ok(out.into())
    }
}

impl HttpBody for FromText {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        loop {
            return Poll::Ready(match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => match this.decode(&piece) {
                        Ok(out) if out.is_empty() => continue,
                        Ok(out) => Some(Ok(Frame::data(out))),
                        Err(error) => Some(Err(error.into())),
                    },
                    // gRPC requests have no trailers.
                    Err(_) => continue,
                },
                Some(Err(error)) => Some(Err(error)),
                None if this.held.is_empty() => None,
                None => {
                    this.held.clear();
                    Some(Err(NotText.into()))
                }
            });
        }
    }
}

/// The answer's body: its trailers become a frame.
struct ToWeb {
    body: Body,
    text: bool,
    /// The fields that tell how the call ended, if they stand in the head.
    ended: Option<HeaderMap>,
    over: bool,
}

/// The flag of the frame that holds trailers.
const TRAILERS: u8 = 0x80;

/// The frame that tells how a call ended.
fn trailers(fields: Option<&HeaderMap>) -> Bytes {
    let mut text = Vec::new();
    match fields.filter(|fields| fields.contains_key(grpc::STATUS)) {
        Some(fields) => {
            for (name, value) in fields {
                // Of the head only what tells of the end.
                if name.as_str().starts_with("grpc-status") || *name == grpc::MESSAGE {
                    text.extend_from_slice(name.as_str().as_bytes());
                    text.push(b':');
                    text.extend_from_slice(value.as_bytes());
                    text.extend_from_slice(b"\r\n");
                }
            }
        }
        None => text.extend_from_slice(b"grpc-status:2\r\ngrpc-message:the answer has no status\r\n"),
    }
    grpc::frame(TRAILERS, &text)
}

/// All trailers of an answer, those of the application included.
fn all_trailers(fields: &HeaderMap) -> Bytes {
    if !fields.contains_key(grpc::STATUS) {
        return trailers(None);
    }
    let mut text = Vec::new();
    for (name, value) in fields {
        text.extend_from_slice(name.as_str().as_bytes());
        text.push(b':');
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    grpc::frame(TRAILERS, &text)
}

impl HttpBody for ToWeb {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let out = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(piece) => piece,
                Err(frame) => {
                    this.over = true;
                    all_trailers(&frame.into_trailers().unwrap_or_default())
                }
            },
            Some(Err(error)) => {
                this.over = true;
                return Poll::Ready(Some(Err(error)));
            }
            None => {
                this.over = true;
                trailers(this.ended.as_ref())
            }
        };
        // Each piece is padded: a client decodes by pieces, and nothing is held back.
        Poll::Ready(Some(Ok(Frame::data(if this.text { STANDARD.encode(&out).into() } else { out }))))
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, field};
    use serde_json::json;

    use super::*;

    #[test]
    fn text_is_decoded_wherever_it_is_cut_and_padded() {
        let encoded = [STANDARD.encode("one"), STANDARD.encode("fo"), STANDARD.encode("x"), STANDARD.encode("three")].concat();
        for size in 1..=encoded.len() {
            let mut body = FromText { body: Body::Empty, held: BytesMut::new() };
            let decoded: Vec<u8> =
                encoded.as_bytes().chunks(size).flat_map(|piece| body.decode(piece).unwrap()).collect();
            assert_eq!(decoded, b"onefoxthree", "{size}");
            assert!(body.held.is_empty());
        }
        let mut body = FromText { body: Body::Empty, held: BytesMut::new() };
        assert!(body.decode(b"a-b=").is_err());
        assert!(body.decode(b"====").is_err());
    }

    async fn run(kind: &str, path: &str, pattern: &str, answer: Vec<(&'static str, &'static str)>, body: Vec<u8>) -> Exchange {
        let answer = move |x: &mut Exchange| {
            assert_eq!(x.request.headers["content-type"], "application/grpc");
            let path = x.forward.uri.as_ref().map(ToString::to_string).unwrap_or_default();
            x.response.headers_mut().insert("x-path", path.parse().unwrap());
            for (name, value) in &answer {
                x.response.headers_mut().insert(*name, HeaderValue::from_static(value));
            }
            *x.response.body_mut() = std::mem::take(&mut x.request_body);
            Ok(())
        };
        let mut chain = TestEnv::default().chain::<GrpcWeb, _>(&json!({}), answer).unwrap();
        let mut x = exchange("POST", &format!("http://a{path}"))
            .header("content-type", kind)
            .body(Bytes::from(body))
            .build();
        x.matched_uri = Some(pattern.into());
        chain.run(x).await
    }

    #[tokio::test]
    async fn a_call_goes_to_the_method_and_comes_back_in_its_own_form() {
        let message = grpc::frame(0, b"hello");
        let grpc_answer = vec![("content-type", "application/grpc"), ("grpc-status", "0")];
        let end = b"\x80\0\0\0\x0fgrpc-status:0\r\n";
        for (kind, text) in [
            ("application/grpc-web", false),
            ("application/grpc-web+proto", false),
            ("application/grpc-web-text", true),
            ("application/grpc-web-text+proto", true),
        ] {
            let body = if text { STANDARD.encode(&message).into_bytes() } else { message.to_vec() };
            let mut x = run(kind, "/grpc/web/a.B/C", "/grpc/web/*", grpc_answer.clone(), body).await;
            assert_eq!([field(&x, "content-type"), field(&x, "x-path")], [kind, "/a.B/C"]);
            assert_eq!(field(&x, "access-control-allow-origin"), "*");
            assert_eq!(field(&x, "access-control-expose-headers"), "grpc-message,grpc-status");
            let bytes = x.response.body_mut().collect_up_to(1 << 20).await.unwrap();
            let expected = if text {
                [STANDARD.encode(&message), STANDARD.encode(end)].concat().into_bytes()
            } else {
                [&message[..], end].concat()
            };
            assert_eq!(bytes, expected, "{kind}");
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_is_refused() {
        let settings = json!({"max_req_body_size": 9});
        for (body, status) in [("nine byte", 200), ("ten bytes.", 413)] {
            let mut chain = TestEnv::default().chain::<GrpcWeb, _>(&settings, |_| Ok(())).unwrap();
            let request = exchange("POST", "http://a/a.B/C").header("content-type", "application/grpc-web");
            assert_eq!(chain.run(request.body(body).build()).await.response.status(), status, "{body}");
        }
    }

    #[tokio::test]
    async fn paths_and_other_answers() {
        let html = vec![("content-type", "text/html")];
        for (path, pattern, expected) in
            [("/a.B/C", "/*", "/a.B/C"), ("/a.B/C", "/a.B/C", "/a.B/C"), ("/x/a.B/C", "/x*", "/a.B/C")]
        {
            let mut x = run("application/grpc-web", path, pattern, html.clone(), b"<p>".to_vec()).await;
            assert_eq!([field(&x, "content-type"), field(&x, "x-path")], ["text/html", expected]);
            assert_eq!(x.response.body_mut().collect_up_to(100).await.unwrap(), "<p>");
        }
    }

    #[tokio::test]
    async fn what_is_no_call_is_refused_and_browsers_may_ask_first() {
        let mut chain = TestEnv::default().chain::<GrpcWeb, _>(&json!({"cors_allow_headers": "x-a"}), |_| Ok(())).unwrap();
        for (method, kind, status) in [
            ("OPTIONS", "", 204),
            ("GET", "application/grpc-web", 405),
            ("POST", "application/json", 400),
            ("POST", "application/grpc", 400),
            ("POST", "application/grpc-web+json", 400),
        ] {
            let x = chain.run(exchange(method, "http://a/").header("content-type", kind).build()).await;
            assert_eq!(x.response.status(), status, "{method} {kind}");
            let allowed = if method == "OPTIONS" { ["POST", "x-a"] } else { ["", ""] };
            let fields = ["access-control-allow-methods", "access-control-allow-headers"];
            assert_eq!(fields.map(|name| field(&x, name)), allowed);
        }
    }
}
