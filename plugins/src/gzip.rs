//! `gzip`: compresses answers for clients that take gzip.
//!
//! Phase: `encode`, after all filters of the body. The body is compressed as it passes; what is compressed already, is
//! a part of something or must not be transformed is left alone. Unlike APISIX, `buffers` changes nothing, and a strong
//! `ETag` is made weak.

use std::io::Write;
use std::sync::Arc;

use config::ConfigError;
use config::fields::Int;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::StatusCode;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Encode, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::encoding::{Coder, LeastVersion, Rules, Then, Types};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Media types that are compressed, or `"*"` for all.
    #[serde(default)]
    types: Types,
    /// The least `Content-Length` that is compressed. An answer that has none is compressed.
    #[serde(default)]
    min_length: Int<1, { u32::MAX }, 20>,
    /// The level: 1 is the fastest, 9 the smallest.
    #[serde(default)]
    comp_level: Int<1, 9>,
    /// The least version of HTTP that the client speaks.
    #[serde(default)]
    http_version: LeastVersion,
    /// Taken and not used: compressed bytes leave as they are made.
    #[serde(default)]
    buffers: Buffers,
    /// Add `Accept-Encoding` to `Vary` of what is or could be compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vary: Option<bool>,
}

/// Buffers of APISIX's server.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Buffers {
    /// How many.
    #[serde(default)]
    number: Int<1, { u32::MAX }, 32>,
    /// Bytes of each.
    #[serde(default)]
    size: Int<1, { u32::MAX }, 4096>,
}

/// Answers with other statuses are small, or no content.
const STATUSES: [StatusCode; 3] = [StatusCode::OK, StatusCode::FORBIDDEN, StatusCode::NOT_FOUND];

/// The plugin.
pub struct Gzip {
    rules: Rules,
    level: u32,
}

impl Definition for Gzip {
    const NAME: &'static str = "gzip";
    const PRIORITY: i32 = 995;
    type Config = Config;

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let rules = Rules {
            coding: "gzip",
            types: config.types,
            min_length: config.min_length.get(),
            http_version: config.http_version,
            vary: config.vary.unwrap_or_default(),
            statuses: &STATUSES,
        };
        hooks.encode(&Arc::new(Self { rules, level: config.comp_level.get() }));
        Ok(())
    }
}

impl Encode for Gzip {
    fn encode(&self, x: &mut Exchange) {
        if self.rules.apply(x) {
            self.rules.encode(x, Box::new(Gzipping::new(self.level)));
        }
    }
}

struct Gzipping {
    encoder: GzEncoder<Vec<u8>>,
    level: u32,
}

impl Gzipping {
    fn new(level: u32) -> Self {
        Self { encoder: GzEncoder::new(Vec::new(), Compression::new(level)), level }
    }
}

impl Coder for Gzipping {
    fn code(&mut self, piece: &[u8], then: Then, out: &mut Vec<u8>) -> std::io::Result<()> {
        self.encoder.write_all(piece)?;
        match then {
            Then::Continue => {}
            Then::Flush => self.encoder.flush()?,
            Then::Finish => self.encoder.try_finish()?,
        }
        out.append(self.encoder.get_mut());
        Ok(())
    }

    fn quick(&self) -> usize {
        match self.level {
            ..=3 => 16 << 10,
            4..=6 => 6 << 10,
            _ => 3 << 10,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use bytes::Bytes;
    use flate2::read::GzDecoder;
    use http::HeaderValue;
    use http_body_util::BodyExt;
    use layers::body::Body;
    use layers::testing::{TestEnv, exchange, field};
    use serde_json::{Value, json};

    use super::*;

    fn unzip(bytes: &[u8]) -> String {
        let mut text = String::new();
        GzDecoder::new(bytes).read_to_string(&mut text).unwrap();
        text
    }

    async fn run(settings: Value, accept: &str, fields: Vec<(&'static str, &'static str)>, body: &'static str) -> Exchange {
        let answer = move |x: &mut Exchange| {
            *x.response.body_mut() = Body::from(body);
            for (name, value) in &fields {
                if *name == "status" {
                    *x.response.status_mut() = StatusCode::from_bytes(value.as_bytes()).unwrap();
                } else {
                    x.response.headers_mut().insert(*name, HeaderValue::from_static(value));
                }
            }
            Ok(())
        };
        let mut chain = TestEnv::default().chain::<Gzip, _>(&settings, answer).unwrap();
        chain.run(exchange("GET", "http://a/").header("accept-encoding", accept).build()).await
    }

    #[tokio::test]
    async fn an_answer_is_compressed_where_everything_agrees() {
        let html = ("content-type", "text/html; charset=utf-8");
        let cases = [
            (json!({}), "gzip", vec![html], true),
            (json!({}), "deflate", vec![html], false),
            (json!({}), "gzip", vec![], false),
            (json!({}), "gzip", vec![("content-type", "text/css")], false),
            (json!({"types": ["text/css"]}), "gzip", vec![("content-type", "TEXT/CSS")], true),
            (json!({"types": "*"}), "gzip", vec![("content-type", "image/png")], true),
            (json!({"types": "*"}), "gzip", vec![("content-type", "application/grpc")], false),
            (json!({}), "gzip", vec![html, ("content-length", "19")], false),
            (json!({}), "gzip", vec![html, ("content-length", "20")], true),
            (json!({"min_length": 21}), "gzip", vec![html, ("content-length", "20")], false),
            (json!({}), "gzip", vec![html, ("content-encoding", "br")], false),
            (json!({}), "gzip", vec![html, ("cache-control", "public, No-Transform")], false),
            (json!({}), "gzip", vec![html, ("status", "206")], false),
            (json!({}), "gzip", vec![html, ("status", "500")], false),
            (json!({}), "gzip", vec![html, ("status", "404")], true),
        ];
        for (settings, accept, fields, expected) in cases {
            let told = format!("{settings} {accept} {fields:?}");
            let body = "twenty bytes of text";
            let mut x = run(settings, accept, fields, body).await;
            assert_eq!(field(&x, "content-encoding") == "gzip", expected, "{told}");
            let bytes = x.response.body_mut().collect_up_to(1 << 20).await.unwrap();
            let text = if expected { unzip(&bytes) } else { String::from_utf8(bytes.to_vec()).unwrap() };
            assert_eq!(text, body, "{told}");
            assert!(!expected || field(&x, "content-length").is_empty(), "{told}");
        }
    }

    #[tokio::test]
    async fn head_and_old_clients_get_it_plain() {
        let answer = |x: &mut Exchange| {
            *x.response.body_mut() = Body::from("twenty bytes of text");
            x.response.headers_mut().insert("content-type", HeaderValue::from_static("text/html"));
            Ok(())
        };
        let cases = [
            (json!({}), "GET", http::Version::HTTP_10, false),
            (json!({"http_version": 1.0}), "GET", http::Version::HTTP_10, true),
            (json!({"http_version": 1.1}), "GET", http::Version::HTTP_2, true),
            (json!({}), "HEAD", http::Version::HTTP_11, false),
        ];
        for (settings, method, version, expected) in cases {
            let mut chain = TestEnv::default().chain::<Gzip, _>(&settings, answer).unwrap();
            let mut x = exchange(method, "http://a/").header("accept-encoding", "gzip").build();
            x.request.version = version;
            let x = chain.run(x).await;
            assert_eq!(field(&x, "content-encoding") == "gzip", expected, "{settings} {method} {version:?}");
        }
    }

    #[tokio::test]
    async fn vary_is_for_every_client_and_a_strong_tag_gets_weak() {
        let fields = vec![("content-type", "text/html"), ("etag", "\"x\""), ("accept-ranges", "bytes")];
        let x = run(json!({"vary": true}), "gzip", fields.clone(), "twenty bytes of text").await;
        assert_eq!(["vary", "etag", "accept-ranges"].map(|name| field(&x, name)), ["Accept-Encoding", "W/\"x\"", ""]);
        let x = run(json!({"vary": true}), "", fields, "twenty bytes of text").await;
        assert_eq!(["vary", "etag", "accept-ranges"].map(|name| field(&x, name)), ["Accept-Encoding", "\"x\"", "bytes"]);
    }

    #[tokio::test]
    async fn a_long_body_is_the_same_after_all() {
        let text: &'static str = Box::leak((0..200_000).map(|n| n.to_string()).collect::<String>().into_boxed_str());
        for level in [1, 5, 9] {
            let mut x = run(json!({"comp_level": level}), "gzip", vec![("content-type", "text/html")], text).await;
            let bytes = x.response.body_mut().collect_up_to(1 << 24).await.unwrap();
            assert!(bytes.len() < text.len() * 3 / 4);
            assert!(unzip(&bytes) == text);
        }
    }

    /// A body whose pieces come when they are sent.
    struct Pieces(tokio::sync::mpsc::UnboundedReceiver<Bytes>);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
            self.0.poll_recv(cx).map(|piece| piece.map(|piece| Ok(http_body::Frame::data(piece))))
        }
    }

    #[tokio::test]
    async fn an_event_leaves_when_the_upstream_pauses() {
        let (send, receive) = tokio::sync::mpsc::unbounded_channel();
        let receive = std::cell::RefCell::new(Some(Pieces(receive)));
        let receive = std::rc::Rc::new(receive);
        let answer = move |x: &mut Exchange| {
            *x.response.body_mut() = Body::boxed(receive.borrow_mut().take().unwrap());
            x.response.headers_mut().insert("content-type", HeaderValue::from_static("text/event-stream"));
            Ok(())
        };
        let settings = json!({"types": ["text/event-stream"]});
        let mut chain = TestEnv::default().chain::<Gzip, _>(&settings, answer).unwrap();
        let mut x = chain.run(exchange("GET", "http://a/").header("accept-encoding", "gzip").build()).await;
        let mut decoder = flate2::write::GzDecoder::new(Vec::new());
        for event in ["data: one\n\n", "data: two\n\n"] {
            send.send(Bytes::from_static(event.as_bytes())).unwrap();
            while !decoder.get_ref().ends_with(event.as_bytes()) {
                let frame = x.response.body_mut().frame().await.unwrap().unwrap();
                decoder.write_all(frame.data_ref().unwrap()).unwrap();
                decoder.flush().unwrap();
            }
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"comp_level": 0}), "/comp_level"),
            (json!({"comp_level": 10}), "/comp_level"),
            (json!({"min_length": 0}), "/min_length"),
            (json!({"http_version": 2}), "/http_version"),
            (json!({"types": []}), "/types"),
            (json!({"types": "text/html"}), "/types"),
            (json!({"buffers": {"number": 0}}), "/buffers/number"),
            (json!({"level": 1}), "level"),
        ];
        for (settings, place) in cases {
            let errors = TestEnv::default().build::<Gzip>(&settings).err().unwrap_or_default();
            assert!(errors.iter().any(|error| error.to_string().contains(place) || error.pointer.contains(place)), "{settings}: {errors:?}");
        }
    }
}
