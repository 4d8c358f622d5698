//! `body-transformer`: writes the body of a request or an answer anew, after a template.
//!
//! Phases: `rewrite` for the request, around the upstream for its answer. Templates have the form of lua-resty-template
//! and are limited to expressions over the decoded body and `_ctx.var`; Lua statements are refused when the plugin is
//! built. Bodies are read up to a bound, and large ones are transformed outside the worker.

mod decode;
mod template;

use std::borrow::Cow;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use config::ConfigError;
use config::fields::Int;
use config::var::Vars;
use http::{HeaderValue, Method, StatusCode, header};
use layers::body::{Body, TooLarge};
use layers::error::{Error, Fault, Reason};
use layers::exchange::{Answered, Exchange, State};
use layers::plugin::{Around, BuildEnv, Definition, Flow, Hooks, Next, RewriteWaits};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::decode::Format;
use self::template::Template;
use crate::support::encoding;
use crate::support::headers;

/// Settings. One of `request` and `response` has to be there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What becomes of the request's body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<Transform>,
    /// What becomes of the answer's body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    response: Option<Transform>,
    /// The longest body of a request, in bytes. A longer one is answered with 413.
    #[serde(default)]
    max_req_body_size: Int<1, { u32::MAX }, 67_108_864>,
    /// The longest body of an answer, in bytes. In place of a longer one the client gets a 502.
    #[serde(default)]
    max_resp_body_size: Int<1, { u32::MAX }, 67_108_864>,
}

/// How a body is written anew.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Transform {
    /// The form of the body. Without it `Content-Type` tells; a `GET` has its query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    input_format: Option<Format>,
    /// The template.
    template: String,
    /// Whether the template is written in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    template_is_base64: Option<bool>,
}

/// The plugin.
pub struct BodyTransformer {
    request: Option<Compiled>,
    response: Option<Compiled>,
    longest_request: usize,
    longest_response: usize,
}

struct Compiled {
    format: Option<Format>,
    template: Arc<Template>,
}

impl Definition for BodyTransformer {
    const NAME: &'static str = "body-transformer";
    const PRIORITY: i32 = 1080;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let neither = config.request.is_none() && config.response.is_none();
        let neither = neither.then(|| ConfigError::invalid("", "write `request` or `response`, or both"));
        let templates = [compiled(&config.request, "request").err(), compiled(&config.response, "response").err()];
        neither.into_iter().chain(templates.into_iter().flatten()).collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let longest = |size: u32| usize::try_from(size).unwrap_or(usize::MAX);
        let plugin = Arc::new(Self {
            request: compiled(&config.request, "request")?,
            response: compiled(&config.response, "response")?,
            longest_request: longest(config.max_req_body_size.get()),
            longest_response: longest(config.max_resp_body_size.get()),
        });
        hooks.rewrite_waits(&plugin);
        if plugin.response.is_some() {
            hooks.around(&plugin);
        }
        Ok(())
    }
}

fn compiled(transform: &Option<Transform>, name: &str) -> Result<Option<Compiled>, ConfigError> {
    transform.as_ref().map(|transform| compile(transform, &format!("/{name}/template"))).transpose()
}

fn compile(transform: &Transform, pointer: &str) -> Result<Compiled, ConfigError> {
    let decoded = || STANDARD.decode(&transform.template).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let text: Cow<'_, str> = if transform.template_is_base64 == Some(true) {
        decoded().ok_or_else(|| ConfigError::invalid(pointer, "the template is not base64 of text"))?.into()
    } else if matches!(transform.input_format, None | Some(Format::Encoded | Format::Args)) {
        transform.template.as_str().into()
    } else {
        // As APISIX does: with these forms a template may be base64 without saying so.
        decoded().map_or_else(|| transform.template.as_str().into(), Into::into)
    };
    let template = Template::compile(&text).map_err(|problem| ConfigError::invalid(pointer, problem))?;
    Ok(Compiled { format: transform.input_format, template: Arc::new(template) })
}

/// Bodies from this size on are transformed outside the worker, in bytes.
const HEAVY: usize = 8 << 10;

/// Why a body cannot be written anew.
enum Failure {
    /// It is not what it should be.
    Decode(String),
    /// The template does not fit it.
    Render(String),
}

impl Compiled {
    async fn apply(&self, x: &State, format: Option<Format>, kind: &[u8], body: Bytes) -> Result<Bytes, Failure> {
        let vars: Vec<Option<String>> =
            self.template.vars().iter().map(|var| x.get(var).map(Cow::into_owned)).collect();
        let query = x.request.uri.query().unwrap_or_default().to_owned();
        let (template, kind) = (self.template.clone(), kind.to_vec());
        let size = body.len() + query.len();
        let work = move || {
            let root = match format {
                Some(format) => decode::decode(format, &body, &query, &kind).map_err(Failure::Decode)?,
                None => Value::Object(serde_json::Map::new()),
            };
            let text = String::from_utf8_lossy(&body);
            template.render(&root, &text, &vars).map(Bytes::from).map_err(Failure::Render)
        };
        if size < HEAVY {
            return work();
        }
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(Failure::Render(error.to_string())))
    }
}

fn kind(headers: &http::HeaderMap) -> Vec<u8> {
    headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default().to_vec()
}

impl RewriteWaits for BodyTransformer {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        if self.response.is_some() {
            // The answer has to be readable.
            encoding::ask_plainly(x);
        }
        let Some(compiled) = &self.request else { return Flow::Next };
        let body = match x.request_body.collect_up_to(self.longest_request).await {
            Ok(body) => body,
            Err(error) if error.is::<TooLarge>() => {
                return Flow::message(StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than max_req_body_size");
            }
            Err(error) => {
                tracing::debug!(%error, "the body of a request cannot be read");
                return Flow::message(StatusCode::BAD_REQUEST, "the body cannot be read");
            }
        };
        let kind = kind(&x.request.headers);
        let format = if x.request.method == Method::GET && compiled.format != Some(Format::Plain) {
            Some(Format::Args)
        } else {
            compiled.format.or_else(|| Format::of(&kind))
        };
        match compiled.apply(x, format, &kind, body).await {
            Ok(body) => {
                x.request.headers.remove(header::CONTENT_LENGTH);
                x.request.headers.remove(header::CONTENT_ENCODING);
                x.request_body = Body::from(body);
                Flow::Next
            }
            Err(Failure::Decode(problem)) => {
                Flow::message(StatusCode::BAD_REQUEST, &format!("request body decode: {problem}"))
            }
            Err(Failure::Render(problem)) => {
                Flow::message(StatusCode::SERVICE_UNAVAILABLE, &format!("request template rendering: {problem}"))
            }
        }
    }
}

impl Around for BodyTransformer {
    async fn around(&self, x: Exchange, next: Next) -> Result<Exchange, Fault> {
        let mut x = next.run(x).await?;
        let Some(compiled) = &self.response else { return Ok(x) };
        let status = x.response.status();
        let has_body = x.request.method != Method::HEAD
            && !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED | StatusCode::SWITCHING_PROTOCOLS);
        if x.answered != Answered::Upstream || !has_body {
            return Ok(x);
        }
        match self.transform(compiled, &mut x).await {
            Ok(body) => {
                headers::body_changes(x.response.headers_mut());
                *x.response.body_mut() = Body::from(body);
                Ok(x)
            }
            Err(error) => {
                *x.response.body_mut() = Body::Empty;
                Err(Fault { exchange: x, error })
            }
        }
    }
}

impl BodyTransformer {
    async fn transform(&self, compiled: &Compiled, x: &mut Exchange) -> Result<Bytes, Error> {
        let bad = |problem: String| Error::new(Reason::UpstreamProtocol).detail(problem);
        let coding = x.response.headers().get(header::CONTENT_ENCODING);
        if coding.is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
            return Err(bad("the answer is compressed, though nobody asked for it".into()));
        }
        let body = x.response.body_mut().collect_up_to(self.longest_response).await;
        let body = body.map_err(|error| {
            let large = error.is::<TooLarge>();
            let problem = if large { "the answer is larger than max_resp_body_size" } else { "the answer broke off" };
            bad(problem.to_owned()).because(error)
        })?;
        let kind = kind(x.response.headers());
        let format = compiled.format.or_else(|| Format::of(&kind));
        compiled.apply(x, format, &kind, body).await.map_err(|failure| match failure {
            Failure::Decode(problem) => bad(format!("response body decode: {problem}")),
            Failure::Render(problem) => {
                Error::new(Reason::PluginFailed).detail(format!("response template rendering: {problem}"))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, field, text};
    use serde_json::json;

    use super::*;

    /// Sends a request; the upstream answers with what it got, or with `answer`.
    async fn run(settings: Value, request: Exchange, answer: Option<(&'static str, &'static str)>) -> Exchange {
        let upstream = move |x: &mut Exchange| {
            let headers = x.response.headers_mut();
            match answer {
                Some((kind, body)) => {
                    headers.insert("content-type", HeaderValue::from_static(kind));
                    headers.insert("etag", HeaderValue::from_static("\"1\""));
                    *x.response.body_mut() = body.into();
                }
                None => *x.response.body_mut() = std::mem::take(&mut x.request_body),
            }
            Ok(())
        };
        let mut chain = TestEnv::default().chain::<BodyTransformer, _>(&settings, upstream).unwrap();
        chain.run(request).await
    }

    fn post(kind: &str, body: &'static str) -> Exchange {
        exchange("POST", "http://a/?name=query").header("content-type", kind).body(body).build()
    }

    #[tokio::test]
    async fn a_request_is_written_anew() {
        let json = "application/json";
        let form = "application/x-www-form-urlencoded";
        let base64 = "eyJhIjp7e25hbWV9fX0=";
        let cases = [
            (json!({"template": "{\"foo\":\"{{name}}\"}"}), post(json, r#"{"name":"x"}"#), 200, "{\"foo\":\"x\"}"),
            (json!({"template": "{{name}} {{age+1}}"}), post(form, "name=x&age=2"), 200, "x 3"),
            (json!({"template": "{{a.b}}", "input_format": "xml"}), post(json, "<a><b>x</b></a>"), 200, "x"),
            (json!({"template": "[{*_body*}]", "input_format": "plain"}), post(json, "a<b"), 200, "[a<b]"),
            (json!({"template": "{{name}}"}), exchange("GET", "http://a/?name=q").build(), 200, "q"),
            (json!({"template": "{{_ctx.var.arg_name}}"}), post("text/odd", "x"), 200, "query"),
            (json!({"template": base64, "template_is_base64": true}), post(json, r#"{"name":1}"#), 200, "{\"a\":1}"),
            (json!({"template": base64, "input_format": "json"}), post(json, r#"{"name":1}"#), 200, "{\"a\":1}"),
            (json!({"template": "x", "input_format": "json"}), post(json, "{"), 400, "request body decode"),
            (json!({"template": "{{a.b}}"}), post(json, "{}"), 503, "request template rendering"),
        ];
        for (request, exchange, status, expected) in cases {
            let mut x = run(json!({ "request": request }), exchange, None).await;
            let text = text(&mut x).await;
            assert_eq!(x.response.status(), status, "{request}: {text}");
            assert!(if status == 200 { text == expected } else { text.contains(expected) }, "{request}: {text}");
            assert!(status != 200 || !x.request.headers.contains_key("content-length"));
        }
        let settings = json!({"request": {"template": "x"}, "max_req_body_size": 3});
        assert_eq!(run(settings, post(json, "1234"), None).await.response.status(), 413);
    }

    #[tokio::test]
    async fn an_answer_is_written_anew() {
        let cases = [
            (json!({"template": "{{a}} {{_ctx.var.status}}"}), "application/json", r#"{"a":1}"#, 200, "1 200"),
            (json!({"template": "{{a.b}}"}), "text/xml", "<a><b>x</b></a>", 200, "x"),
            (json!({"template": "{{a}}"}), "application/json", "<", 502, ""),
            (json!({"template": "{{a.b.c}}"}), "application/json", "{}", 500, ""),
        ];
        for (response, kind, body, status, expected) in cases {
            let request = exchange("GET", "http://a/").header("accept-encoding", "gzip").build();
            let mut x = run(json!({ "response": response }), request, Some((kind, body))).await;
            assert!(!x.request.headers.contains_key("accept-encoding"));
            assert_eq!(x.response.status(), status, "{response}");
            if status == 200 {
                assert_eq!((&*text(&mut x).await, field(&x, "etag")), (expected, ""), "{response}");
            }
        }
        let settings = json!({"response": {"template": "x"}, "max_resp_body_size": 3});
        let x = run(settings, exchange("GET", "http://a/").build(), Some(("text/plain", "1234"))).await;
        assert_eq!(x.response.status(), 502);
        let settings = json!({"response": {"template": "x"}});
        let x = run(settings, exchange("HEAD", "http://a/").build(), Some(("text/plain", ""))).await;
        assert_eq!(field(&x, "etag"), "\"1\"");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), "", "`request` or `response`"),
            (json!({"request": {"template": "{% if x then %}{% end %}"}}), "/request/template", "Lua"),
            (json!({"response": {"template": "{{a(}}"}}), "/response/template", "expression"),
            (json!({"response": {"template": "%", "template_is_base64": true}}), "/response/template", "base64"),
            (json!({"request": {"template": "x", "input_format": "yaml"}}), "/request/input_format", "yaml"),
            (json!({"request": {}}), "/request", "template"),
            (json!({"request": {"template": "x"}, "max_req_body_size": 0}), "/max_req_body_size", ""),
        ];
        for (settings, place, words) in cases {
            let errors = TestEnv::default().build::<BodyTransformer>(&settings).err().unwrap_or_default();
            assert!(
                errors.iter().any(|error| error.pointer.starts_with(place) && error.to_string().contains(words)),
                "{settings}: {errors:?}"
            );
        }
    }
}
