//! `mocking`: answers with an example, or with values made up after a schema, without an upstream.
//!
//! Phase: `access`.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use config::error::{ConfigError, ErrorKind};
use config::fields::Int;
use config::template::Template;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use layers::body::Body;
use layers::exchange::{Exchange, State};
use layers::plugin::{Access, AccessWaits, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use crate::support::headers::{self, Fields, Value};
use crate::support::reply;

/// Settings. `response_example` or `response_schema` has to be there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Seconds to wait before answering.
    #[serde(default)]
    delay: Int<0, 86400>,
    /// The status.
    #[serde(default)]
    response_status: Int<200, 999>,
    /// The `Content-Type`: one of `application/json`, `application/xml`, `text/xml`, `text/html` and `text/plain`,
    /// parameters may follow.
    #[serde(default = "content_type")]
    content_type: String,
    /// The body, with variables. Goes before `response_schema`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    response_example: Option<String>,
    /// A JSON Schema with `type`, `properties`, `items` and `example`, after which a body is made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    response_schema: Option<Map<String, Json>>,
    /// Whether the answer says by `x-mock-by` that it is made up.
    #[serde(default = "yes")]
    with_mock_header: bool,
    /// Header fields to set, with variables.
    #[serde(default, skip_serializing_if = "Fields::is_empty")]
    response_headers: Fields,
}

fn content_type() -> String {
    "application/json;charset=utf8".into()
}

fn yes() -> bool {
    true
}

/// The plugin.
pub struct Mocking {
    delay: Duration,
    status: StatusCode,
    content_type: HeaderValue,
    content: Content,
    with_mock_header: bool,
    headers: Box<[(HeaderName, Value)]>,
}

enum Content {
    Example(Template),
    Json(Shape),
    Xml(Shape),
}

/// What a schema asks for.
#[derive(Debug)]
enum Shape {
    Object(Vec<(String, Shape)>),
    List(Box<Shape>),
    /// Nothing: a list without `items`.
    Nothing,
    Text(Option<String>),
    Number(Option<f64>),
    Integer(Option<i64>),
    Boolean(Option<bool>),
}

/// Schemas nested deeper are no description of an answer.
const DEPTH: usize = 32;

impl Shape {
    fn of(schema: &Map<String, Json>, pointer: &str, depth: usize) -> Result<Self, ConfigError> {
        if depth > DEPTH {
            return Err(ConfigError::invalid(pointer, format!("the schema is nested deeper than {DEPTH} levels")));
        }
        let example = schema.get("example");
        let kind = schema.get("type").and_then(Json::as_str).unwrap_or_default().to_ascii_lowercase();
        match &*kind {
            "object" => Self::object(schema, pointer, depth),
            "array" => match schema.get("items") {
                Some(Json::Object(items)) => {
                    Ok(Self::List(Box::new(Self::of(items, &format!("{pointer}/items"), depth + 1)?)))
                }
                _ => Ok(Self::Nothing),
            },
            "string" => Ok(Self::Text(example.and_then(Json::as_str).map(str::to_owned))),
            "number" => Ok(Self::Number(example.and_then(Json::as_f64))),
            "integer" => Ok(Self::Integer(example.and_then(Json::as_f64).map(|example| example.floor() as i64))),
            "boolean" => Ok(Self::Boolean(example.and_then(Json::as_bool))),
            other => {
                let allowed = ["object", "array", "string", "number", "integer", "boolean"].map(Into::into);
                let kind = ErrorKind::NotOneOf { found: other.into(), allowed: allowed.into(), nearest: None };
                Err(ConfigError::new(format!("{pointer}/type"), kind))
            }
        }
    }

    fn object(schema: &Map<String, Json>, pointer: &str, depth: usize) -> Result<Self, ConfigError> {
        let Some(Json::Object(properties)) = schema.get("properties") else {
            return Ok(Self::Object(Vec::new()));
        };
        let shapes = properties.iter().map(|(name, schema)| {
            let pointer = format!("{pointer}/properties/{}", config::error::escape(name));
            match schema {
                Json::Object(schema) => Ok((name.clone(), Self::of(schema, &pointer, depth + 1)?)),
                _ => Err(ConfigError::invalid(pointer, "write a schema, which is an object")),
            }
        });
        shapes.collect::<Result<_, _>>().map(Self::Object)
    }

    /// A value of this shape; made up where the schema has no example.
    fn value(&self) -> Option<Json> {
        Some(match self {
            Self::Object(members) => Json::Object(
                members.iter().filter_map(|(name, shape)| Some((name.clone(), shape.value()?))).collect(),
            ),
            Self::List(item) => (0..fastrand::usize(1..=3)).filter_map(|_| item.value()).collect(),
            Self::Nothing => return None,
            Self::Text(Some(example)) => Json::String(example.clone()),
            Self::Text(None) => (0..fastrand::usize(1..=10)).map(|_| fastrand::lowercase()).collect::<String>().into(),
            Self::Number(example) => json!(example.unwrap_or_else(|| fastrand::f64() * 10_000.0)),
            Self::Integer(example) => json!(example.unwrap_or_else(|| fastrand::i64(1..=10_000))),
            Self::Boolean(example) => json!(example.unwrap_or_else(fastrand::bool)),
        })
    }
}

/// `value` as an XML element; the items of a list are elements of the list's name.
fn xml(out: &mut String, name: &str, value: &Json) {
    match value {
        Json::Array(items) => items.iter().for_each(|item| xml(out, name, item)),
        Json::Object(members) => {
            let _ = write!(out, "<{name}>");
            members.iter().for_each(|(name, value)| xml(out, name, value));
            let _ = write!(out, "</{name}>");
        }
        Json::String(text) => {
            let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            let _ = write!(out, "<{name}>{text}</{name}>");
        }
        other => {
            let _ = write!(out, "<{name}>{other}</{name}>");
        }
    }
}

impl Definition for Mocking {
    const NAME: &'static str = "mocking";
    const PRIORITY: i32 = 10900;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let plugin = Arc::new(compile(&config)?);
        if plugin.delay.is_zero() { hooks.access(&plugin) } else { hooks.access_waits(&plugin) }
        Ok(())
    }
}

fn compile(config: &Config) -> Result<Mocking, ConfigError> {
    let kind = config.content_type.split(';').next().unwrap_or_default().trim();
    let is_xml = matches!(kind, "application/xml" | "text/xml");
    let is_json = matches!(kind, "application/json" | "text/plain");
    if !is_xml && !is_json && kind != "text/html" {
        let allowed = ["application/json", "application/xml", "text/xml", "text/html", "text/plain"];
        let allowed = allowed.map(Into::into).into();
        let kind = ErrorKind::NotOneOf { found: kind.into(), allowed, nearest: None };
        return Err(ConfigError::new("/content_type", kind));
    }
    let content = match (&config.response_example, &config.response_schema) {
        (Some(example), _) => Content::Example(Template::parse(example)),
        // The schema itself is an object, whatever its type says.
        (None, Some(schema)) => match (is_xml, is_json) {
            (true, _) => Content::Xml(Shape::object(schema, "/response_schema", 0)?),
            (_, true) => Content::Json(Shape::object(schema, "/response_schema", 0)?),
            _ => {
                let problem = "values made up after a schema are JSON or XML; write one of their types";
                return Err(ConfigError::invalid("/content_type", problem));
            }
        },
        (None, None) => {
            let fields = vec!["response_example", "response_schema"];
            return Err(ConfigError::new("", ErrorKind::NoneOf { fields }));
        }
    };
    Ok(Mocking {
        delay: Duration::from_secs(config.delay.get().into()),
        status: reply::status(config.response_status.get()),
        content_type: HeaderValue::from_str(&config.content_type)
            .map_err(|_| ConfigError::invalid("/content_type", "a header field has no control characters"))?,
        content,
        with_mock_header: config.with_mock_header,
        headers: headers::compile(&config.response_headers, "/response_headers")?.into(),
    })
}

const MOCK_BY: HeaderName = HeaderName::from_static("x-mock-by");

impl Mocking {
    fn answer(&self, x: &State) -> Flow {
        let body = match &self.content {
            Content::Example(template) => template.to_text(x).into_owned(),
            Content::Json(shape) => shape.value().unwrap_or_default().to_string(),
            Content::Xml(shape) => {
                let mut text = String::new();
                xml(&mut text, "data", &shape.value().unwrap_or_default());
                text
            }
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let fields = response.headers_mut();
        fields.insert(header::CONTENT_TYPE, self.content_type.clone());
        if self.with_mock_header {
            fields.insert(MOCK_BY, HeaderValue::from_static(concat!("Postern/", env!("CARGO_PKG_VERSION"))));
        }
        for (name, value) in &self.headers {
            headers::set(fields, name, value.render(x, None));
        }
        Flow::Reply(response)
    }
}

impl Access for Mocking {
    fn access(&self, x: &mut Exchange) -> Flow {
        self.answer(x)
    }
}

impl AccessWaits for Mocking {
    async fn access(&self, x: &mut Exchange) -> Flow {
        tokio::time::sleep(self.delay).await;
        self.answer(x)
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, field, text};

    use super::*;

    async fn run(config: Json) -> Exchange {
        let mut chain = TestEnv::default().chain::<Mocking, _>(&config, |_| Ok(())).unwrap();
        chain.run(exchange("GET", "http://a.com/?a=1").build()).await
    }

    fn schema() -> Json {
        json!({"type": "object", "properties": {
            "text": {"type": "string", "example": "a<b"},
            "made": {"type": "string"},
            "number": {"type": "number", "example": 1.5},
            "integer": {"type": "Integer", "example": 155.55},
            "flag": {"type": "boolean", "example": true},
            "list": {"type": "array", "items": {"type": "integer", "example": 7}},
            "nothing": {"type": "array"},
            "inner": {"type": "object", "properties": {"x": {"type": "boolean"}}},
        }})
    }

    #[tokio::test]
    async fn an_example_is_answered() {
        let config = json!({
            "response_example": "{\"a\":$arg_a}", "response_status": 201, "response_headers": {"x-h": "$host", "x-n": 1},
        });
        let mut x = run(config).await;
        assert_eq!(x.response.status(), 201);
        let fields = ["content-type", "x-h", "x-n"].map(|name| field(&x, name));
        assert_eq!(fields, ["application/json;charset=utf8", "a.com", "1"]);
        assert!(field(&x, "x-mock-by").starts_with("Postern/"));
        assert_eq!(text(&mut x).await, "{\"a\":1}");
        let x = run(json!({"response_example": "a", "with_mock_header": false})).await;
        assert_eq!(field(&x, "x-mock-by"), "");
    }

    #[tokio::test]
    async fn values_are_made_up_after_a_schema() {
        let mut x = run(json!({"response_schema": schema()})).await;
        let value: Json = serde_json::from_str(&text(&mut x).await).unwrap();
        assert_eq!(value["text"], "a<b");
        assert!((1..=10).contains(&value["made"].as_str().unwrap().len()));
        assert_eq!((&value["number"], &value["integer"], &value["flag"]), (&json!(1.5), &json!(155), &json!(true)));
        let list = value["list"].as_array().unwrap();
        assert!((1..=3).contains(&list.len()) && list.iter().all(|item| *item == 7));
        assert!(value.get("nothing").is_none() && value["inner"]["x"].is_boolean());
    }

    #[tokio::test]
    async fn values_may_be_xml() {
        let config = json!({"content_type": "application/xml", "response_schema": schema()});
        let mut x = run(config).await;
        let body = text(&mut x).await;
        assert!(body.starts_with("<data>") && body.ends_with("</data>"), "{body}");
        assert!(body.contains("<text>a&lt;b</text>") && body.contains("<list>7</list>"), "{body}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_answer_may_wait() {
        let before = tokio::time::Instant::now();
        run(json!({"response_example": "a", "delay": 2})).await;
        assert_eq!(before.elapsed().as_secs(), 2);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), "none of"),
            (json!({"response_example": "a", "content_type": "image/png"}), "/content_type"),
            (json!({"response_schema": {}, "content_type": "text/html"}), "/content_type"),
            (json!({"response_schema": {"properties": {"a": {"type": "date"}}}}), "/response_schema/properties/a/type"),
            (json!({"response_schema": {"properties": {"a": 1}}}), "/response_schema/properties/a"),
            (json!({"response_example": "a", "response_status": 99}), "/response_status"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<Mocking>(&config).unwrap_err();
            assert!(errors[0].to_string().contains(words), "{config}: {errors:?}");
        }
    }
}
