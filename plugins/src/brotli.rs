//! `brotli`: compresses answers for clients that take brotli.
//!
//! Phase: `encode`, after all filters of the body and before `gzip`, so that a client that takes both gets brotli. The
//! body is compressed as it passes; what is compressed already, is a part of something or must not be transformed is
//! left alone. Unlike APISIX, a strong `ETag` is made weak instead of taken out.

use std::borrow::Cow;
use std::io::Write;
use std::sync::Arc;

use ::brotli::CompressorWriter;
use ::brotli::enc::BrotliEncoderParams;
use ::brotli::enc::backward_references::BrotliEncoderMode;
use config::ConfigError;
use config::fields::Int;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Encode, Hooks};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};

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
    /// What the content is: 0 anything, 1 text, 2 a font.
    #[serde(default)]
    mode: Int<0, 2>,
    /// The level: 0 is the fastest, 11 the smallest.
    #[serde(default)]
    comp_level: Int<0, 11, 6>,
    /// How far back repetitions are looked for, as a power of two: 10 to 24, or 0 for the compressor's choice.
    #[serde(default)]
    lgwin: Power<10, 19>,
    /// How much is compressed at once, as a power of two: 16 to 24, or 0 for the compressor's choice.
    #[serde(default)]
    lgblock: Power<16, 0>,
    /// The least version of HTTP that the client speaks.
    #[serde(default)]
    http_version: LeastVersion,
    /// Add `Accept-Encoding` to `Vary` of what is or could be compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vary: Option<bool>,
}

/// 0, or a power of two from `MIN` to 24.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(transparent)]
pub struct Power<const MIN: u8, const DEFAULT: u8>(u8);

impl<const MIN: u8, const DEFAULT: u8> Default for Power<MIN, DEFAULT> {
    fn default() -> Self {
        Self(DEFAULT)
    }
}

impl<'de, const MIN: u8, const DEFAULT: u8> Deserialize<'de> for Power<MIN, DEFAULT> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u64::deserialize(deserializer)? {
            0 => Ok(Self(0)),
            power => u8::try_from(power)
                .ok()
                .filter(|power| (MIN..=24).contains(power))
                .map(Self)
                .ok_or_else(|| de::Error::custom(format!("write 0, or a number from {MIN} to 24"))),
        }
    }
}

impl<const MIN: u8, const DEFAULT: u8> JsonSchema for Power<MIN, DEFAULT> {
    fn schema_name() -> Cow<'static, str> {
        format!("Power{MIN}").into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let all: Vec<u8> = std::iter::once(0).chain(MIN..=24).collect();
        json_schema!({"type": "integer", "enum": all})
    }
}

/// The plugin.
pub struct Brotli {
    rules: Rules,
    params: Params,
}

/// What the compressor is made with.
#[derive(Clone, Copy)]
struct Params {
    mode: u32,
    level: u32,
    window: u8,
    block: u8,
}

/// The window that the compressor chooses when it is left to it: as long as its own default.
const WINDOW: i32 = 22;

impl Definition for Brotli {
    const NAME: &'static str = "brotli";
    const PRIORITY: i32 = 996;
    type Config = Config;

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let rules = Rules {
            coding: "br",
            types: config.types,
            min_length: config.min_length.get(),
            http_version: config.http_version,
            vary: config.vary.unwrap_or_default(),
            statuses: &[],
        };
        let params = Params {
            mode: config.mode.get(),
            level: config.comp_level.get(),
            window: config.lgwin.0,
            block: config.lgblock.0,
        };
        hooks.encode(&Arc::new(Self { rules, params }));
        Ok(())
    }
}

impl Encode for Brotli {
    fn encode(&self, x: &mut Exchange) {
        if self.rules.apply(x) {
            self.rules.encode(x, Box::new(Compressing { params: self.params, writer: None }));
        }
    }
}

/// Made with its first piece: the compressor takes some hundred KiB.
struct Compressing {
    params: Params,
    writer: Option<CompressorWriter<Vec<u8>>>,
}

impl Params {
    fn writer(self) -> CompressorWriter<Vec<u8>> {
        let params = BrotliEncoderParams {
            quality: i32::try_from(self.level).unwrap_or(6),
            lgwin: if self.window == 0 { WINDOW } else { i32::from(self.window) },
            lgblock: i32::from(self.block),
            mode: match self.mode {
                1 => BrotliEncoderMode::BROTLI_MODE_TEXT,
                2 => BrotliEncoderMode::BROTLI_MODE_FONT,
                _ => BrotliEncoderMode::BROTLI_MODE_GENERIC,
            },
            ..BrotliEncoderParams::default()
        };
        CompressorWriter::with_params(Vec::new(), 4096, &params)
    }
}

impl Coder for Compressing {
    fn code(&mut self, piece: &[u8], then: Then, out: &mut Vec<u8>) -> std::io::Result<()> {
        let params = self.params;
        let writer = self.writer.get_or_insert_with(|| params.writer());
        writer.write_all(piece)?;
        if then == Then::Flush {
            writer.flush()?;
        }
        out.append(writer.get_mut());
        if then == Then::Finish
            && let Some(writer) = self.writer.take()
        {
            out.append(&mut writer.into_inner());
        }
        Ok(())
    }

    fn quick(&self) -> usize {
        match self.params.level {
            ..=2 => 16 << 10,
            3..=5 => 6 << 10,
            6..=9 => 2 << 10,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use http::HeaderValue;
    use layers::body::Body;
    use layers::testing::{TestEnv, exchange, field};
    use serde_json::{Value, json};

    use super::*;

    async fn run(settings: Value, accept: &str, body: &'static str) -> Exchange {
        let answer = move |x: &mut Exchange| {
            *x.response.body_mut() = Body::from(body);
            x.response.headers_mut().insert("content-type", HeaderValue::from_static("text/html"));
            Ok(())
        };
        let mut chain = TestEnv::default().chain::<Brotli, _>(&settings, answer).unwrap();
        chain.run(exchange("GET", "http://a/").header("accept-encoding", accept).build()).await
    }

    async fn text(x: &mut Exchange) -> String {
        let bytes = x.response.body_mut().collect_up_to(1 << 24).await.unwrap();
        let mut text = String::new();
        ::brotli::Decompressor::new(&*bytes, 4096).read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn what_is_compressed_reads_the_same() {
        let long: &'static str = Box::leak((0..50_000).map(|n| n.to_string()).collect::<String>().into_boxed_str());
        let cases = [
            (json!({}), "br", "twenty bytes of text"),
            (json!({"comp_level": 11}), "gzip, br", "twenty bytes of text"),
            (json!({"comp_level": 0, "lgwin": 0}), "*", long),
            (json!({"comp_level": 9, "lgwin": 24, "lgblock": 16, "mode": 1}), "br;q=0.1", long),
        ];
        for (settings, accept, body) in cases {
            let mut x = run(settings.clone(), accept, body).await;
            assert_eq!(field(&x, "content-encoding"), "br", "{settings}");
            assert!(text(&mut x).await == body, "{settings}");
        }
        let x = run(json!({}), "gzip", "twenty bytes of text").await;
        assert_eq!(field(&x, "content-encoding"), "");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"comp_level": 12}), "/comp_level"),
            (json!({"lgwin": 9}), "/lgwin"),
            (json!({"lgwin": 25}), "/lgwin"),
            (json!({"lgblock": 15}), "/lgblock"),
            (json!({"mode": 3}), "/mode"),
        ];
        for (settings, place) in cases {
            let errors = TestEnv::default().build::<Brotli>(&settings).err().unwrap_or_default();
            assert!(errors.iter().any(|error| error.pointer == place), "{settings}: {errors:?}");
        }
    }
}
