//! `request-validation`: lets in requests whose fields and body fit a JSON Schema.
//!
//! Phase: `rewrite`. A body is read as a whole, up to a bound, and is JSON unless its type says that it is a form. JSON
//! with a member twice is refused, because the upstream might read the other one; defaults of the schema are filled in.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use config::error::{ConfigError, ErrorKind};
use config::fields::{HttpStatus, Int, WideText};
use http::{HeaderMap, StatusCode, header};
use jsonschema::error::{TypeKind, ValidationErrorKind};
use jsonschema::paths::LocationSegment;
use jsonschema::{Draft, PatternOptions, ValidationError, Validator};
use layers::body::{Body, TooLarge};
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Rewrite, RewriteWaits};
use percent_encoding::percent_decode_str;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::runtime::Handle;

use crate::support::doubles;
use crate::support::reply::{self, Canned};

/// Settings. At least one of the two schemas has to be there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The JSON Schema (draft 7) of the header fields, as an object. How names are written does not matter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header_schema: Option<Map<String, Value>>,
    /// The JSON Schema (draft 7) of the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body_schema: Option<Map<String, Value>>,
    /// The status of a refusal.
    #[serde(default = "bad_request")]
    rejected_code: HttpStatus,
    /// The body of a refusal, in place of what is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rejected_msg: Option<WideText<1, 256>>,
    /// The largest body that is looked into, in bytes; a larger one is answered with 413.
    #[serde(default)]
    max_req_body_size: Int<1, { u32::MAX }, 67_108_864>,
}

fn bad_request() -> HttpStatus {
    #[expect(clippy::expect_used, reason = "a constant within its limits")]
    HttpStatus::new(400).expect("200 to 599")
}

/// The plugin.
pub struct RequestValidation {
    headers: Option<HeaderCheck>,
    body: Option<Arc<BodyCheck>>,
    status: StatusCode,
    message: Option<Box<str>>,
    limit: usize,
    too_large: Canned,
    control: Handle,
}

struct HeaderCheck {
    validator: Validator,
    /// The names of the schema by their lower case.
    spelled: BTreeMap<String, Vec<String>>,
}

struct BodyCheck {
    validator: Validator,
    schema: Value,
    /// The schema has defaults.
    fills_in: bool,
}

impl Definition for RequestValidation {
    const NAME: &'static str = "request-validation";
    const PRIORITY: i32 = 2800;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let none = config.header_schema.is_none() && config.body_schema.is_none();
        let none = none.then(|| {
            ConfigError::new("", ErrorKind::NoneOf { fields: vec!["header_schema", "body_schema"] })
        });
        let wrong = |schema: &Option<Map<String, Value>>, pointer| {
            schema.as_ref().and_then(|schema| compile(schema, pointer).err())
        };
        none.into_iter()
            .chain(wrong(&config.header_schema, "/header_schema"))
            .chain(wrong(&config.body_schema, "/body_schema"))
            .collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let headers = config.header_schema.map(|schema| {
            let (validator, schema) = compile(&schema, "/header_schema")?;
            let mut spelled = BTreeMap::<String, Vec<String>>::new();
            names(&schema, &mut |name| {
                let all = spelled.entry(name.to_ascii_lowercase()).or_default();
                if all.iter().all(|other| other != name) {
                    all.push(name.to_owned());
                }
            });
            Ok(HeaderCheck { validator, spelled })
        });
        let body = config.body_schema.map(|schema| {
            let (validator, schema) = compile(&schema, "/body_schema")?;
            let fills_in = has_defaults(&schema);
            Ok(Arc::new(BodyCheck { validator, schema, fills_in }))
        });
        let plugin = Arc::new(Self {
            headers: headers.transpose()?,
            body: body.transpose()?,
            status: reply::status(config.rejected_code.get()),
            message: config.rejected_msg.map(|message| Box::from(&*message)),
            limit: config.max_req_body_size.get() as usize,
            too_large: Canned::status(StatusCode::PAYLOAD_TOO_LARGE),
            control: env.control.clone(),
        });
        if plugin.body.is_some() { hooks.rewrite_waits(&plugin) } else { hooks.rewrite(&plugin) }
        Ok(())
    }
}

fn compile(schema: &Map<String, Value>, pointer: &str) -> Result<(Validator, Value), ConfigError> {
    let schema = Value::Object(schema.clone());
    // Patterns without back-tracking, so that none can be made to hang; nothing is fetched.
    let options = jsonschema::options()
        .with_draft(Draft::Draft7)
        .with_pattern_options(PatternOptions::regex())
        .should_validate_formats(true)
        .offline();
    match options.build(&schema) {
        Ok(validator) => Ok((validator, schema)),
        Err(error) => Err(ConfigError::invalid(pointer, format!("not a JSON Schema of draft 7: {error}"))),
    }
}

/// Tells every name that the schema asks for.
fn names(schema: &Value, tell: &mut impl FnMut(&str)) {
    match schema {
        Value::Object(members) => {
            for (keyword, value) in members {
                match (keyword.as_str(), value) {
                    ("properties", Value::Object(properties)) => {
                        properties.keys().for_each(|name| tell(name));
                    }
                    ("required", Value::Array(required)) => {
                        required.iter().filter_map(Value::as_str).for_each(&mut *tell);
                    }
                    _ => {}
                }
                names(value, tell);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| names(item, tell)),
        _ => {}
    }
}

fn has_defaults(schema: &Value) -> bool {
    match schema {
        Value::Object(members) => members.contains_key("default") || members.values().any(has_defaults),
        Value::Array(items) => items.iter().any(has_defaults),
        _ => false,
    }
}

/// Puts defaults where members are missing. Returns whether there was one.
fn fill_in(schema: &Value, value: &mut Value) -> bool {
    let mut filled = false;
    if let (Some(Value::Object(properties)), Value::Object(members)) = (schema.get("properties"), &mut *value) {
        for (name, schema) in properties {
            match (members.get_mut(name), schema.get("default")) {
                (Some(member), _) => filled |= fill_in(schema, member),
                (None, Some(default)) => {
                    members.insert(name.clone(), default.clone());
                    filled = true;
                }
                (None, None) => {}
            }
        }
    }
    if let (Some(of), Value::Array(items)) = (schema.get("items").filter(|of| of.is_object()), value) {
        for item in items {
            filled |= fill_in(of, item);
        }
    }
    filled
}

impl HeaderCheck {
    fn check(&self, headers: &HeaderMap) -> Result<(), String> {
        let mut fields = Map::new();
        for name in headers.keys() {
            let mut values: Vec<Value> = headers
                .get_all(name)
                .iter()
                .map(|value| String::from_utf8_lossy(value.as_bytes()).into())
                .collect();
            let value = if values.len() == 1 { values.remove(0) } else { Value::Array(values) };
            for spelled in self.spelled.get(name.as_str()).into_iter().flatten() {
                fields.insert(spelled.clone(), value.clone());
            }
            fields.insert(name.as_str().to_owned(), value);
        }
        self.validator.validate(&Value::Object(fields)).map_err(|error| words(&error))
    }
}

impl BodyCheck {
    /// What is sent in place of the body, if it is not the body itself.
    ///
    /// # Errors
    /// What is wrong with it.
    fn check(&self, body: &Bytes, is_form: bool) -> Result<Option<Bytes>, String> {
        if is_form {
            let form = std::str::from_utf8(body).map_err(|_| "the form is not text".to_owned())?;
            return self.validator.validate(&arguments(form)).map(|()| None).map_err(|error| words(&error));
        }
        let mut json: Value = serde_json::from_slice(body).map_err(|error| format!("not JSON: {error}"))?;
        if let Some(name) = doubles::first(body) {
            return Err(format!("property \"{name}\" is written twice"));
        }
        self.validator.validate(&json).map_err(|error| words(&error))?;
        let filled = self.fills_in && fill_in(&self.schema, &mut json);
        Ok(filled.then(|| json.to_string().into()))
    }
}

/// A form as an object: several values of a name as a list, a name without a value as `true`.
fn arguments(form: &str) -> Value {
    let decode =
        |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let mut members = Map::new();
    for pair in form.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = match pair.split_once('=') {
            Some((name, value)) => (name, Value::String(decode(value))),
            None => (pair, Value::Bool(true)),
        };
        match members.entry(decode(name)) {
            serde_json::map::Entry::Vacant(place) => {
                place.insert(value);
            }
            serde_json::map::Entry::Occupied(mut place) => match place.get_mut() {
                Value::Array(values) => values.push(value),
                first => *first = Value::Array(vec![first.take(), value]),
            },
        }
    }
    Value::Object(members)
}

/// What does not fit, in the words that APISIX has for it.
fn words(error: &ValidationError<'_>) -> String {
    let mut out = String::new();
    for segment in error.instance_path() {
        match segment {
            LocationSegment::Property(name) => out += &format!("property \"{name}\" validation failed: "),
            LocationSegment::Index(index) => out += &format!("failed to validate item {}: ", index + 1),
        }
    }
    let instance = error.instance();
    let length = || instance.as_str().map_or(0, |text| text.chars().count());
    out += &match error.kind() {
        ValidationErrorKind::Required { property } => format!("property {property} is required"),
        ValidationErrorKind::Type { kind } => {
            let expected = match kind {
                TypeKind::Single(kind) => kind.to_string(),
                TypeKind::Multiple(kinds) => {
                    kinds.iter().map(|kind| kind.to_string()).collect::<Vec<_>>().join(" or ")
                }
            };
            format!("wrong type: expected {expected}, got {}", kind_of(instance))
        }
        ValidationErrorKind::Enum { .. } => "matches none of the enum values".to_owned(),
        ValidationErrorKind::Pattern { pattern } => {
            let text: String = instance.as_str().unwrap_or_default().chars().take(200).collect();
            format!("failed to match pattern \"{pattern}\" with \"{text}\"")
        }
        ValidationErrorKind::Minimum { limit } => format!("expected {instance} to be at least {limit}"),
        ValidationErrorKind::Maximum { limit } => format!("expected {instance} to be at most {limit}"),
        ValidationErrorKind::ExclusiveMinimum { limit } => {
            format!("expected {instance} to be greater than {limit}")
        }
        ValidationErrorKind::ExclusiveMaximum { limit } => {
            format!("expected {instance} to be smaller than {limit}")
        }
        ValidationErrorKind::MinLength { limit } => {
            format!("string too short, expected at least {limit}, got {}", length())
        }
        ValidationErrorKind::MaxLength { limit } => {
            format!("string too long, expected at most {limit}, got {}", length())
        }
        ValidationErrorKind::MinItems { limit } => format!("expect array to have at least {limit} items"),
        ValidationErrorKind::MaxItems { limit } => format!("expect array to have at most {limit} items"),
        ValidationErrorKind::AdditionalProperties { unexpected } => {
            format!("additional properties forbidden, found {}", unexpected.join(", "))
        }
        _ => error.to_string().chars().take(500).collect(),
    };
    out
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Larger bodies are not parsed on a worker.
const LARGE: usize = 16 << 10;

impl RequestValidation {
    fn refused(&self, why: String) -> Flow {
        tracing::debug!(why, "request-validation");
        Flow::text(self.status, self.message.as_deref().map_or(why, str::to_owned))
    }

    fn check_headers(&self, x: &Exchange) -> Flow {
        match self.headers.as_ref().map(|check| check.check(&x.request.headers)) {
            Some(Err(why)) => self.refused(why),
            _ => Flow::Next,
        }
    }
}

impl Rewrite for RequestValidation {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        self.check_headers(x)
    }
}

impl RewriteWaits for RequestValidation {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        if let Flow::Reply(refusal) = self.check_headers(x) {
            return Flow::Reply(refusal);
        }
        let Some(check) = &self.body else { return Flow::Next };
        let kind = x.request.headers.get(header::CONTENT_TYPE).map(|kind| kind.as_bytes());
        let kind = kind.and_then(|kind| kind.split(|byte| *byte == b';').next()).unwrap_or_default();
        let is_form = kind.trim_ascii().eq_ignore_ascii_case(b"application/x-www-form-urlencoded");
        // The client's own deadlines hold while the body comes.
        let body = match x.request_body.collect_up_to(self.limit).await {
            Ok(body) => body,
            Err(error) if error.is::<TooLarge>() => return self.too_large.flow(),
            Err(_) => return self.refused("the request body did not arrive".to_owned()),
        };
        if body.is_empty() {
            return self.refused("no request body".to_owned());
        }
        let checked = if body.len() < LARGE {
            check.check(&body, is_form)
        } else {
            let (check, body) = (check.clone(), body.clone());
            let checked = self.control.spawn_blocking(move || check.check(&body, is_form)).await;
            checked.unwrap_or_else(|_| Err("the request body cannot be checked".to_owned()))
        };
        match checked {
            Ok(changed) => {
                x.request_body = Body::from(changed.unwrap_or(body));
                Flow::Next
            }
            Err(why) => self.refused(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::json;

    use super::*;

    async fn send(config: &Value, kind: &str, body: &str) -> (u16, String, String) {
        let mut chain = TestEnv::default().chain::<RequestValidation, _>(config, |_| Ok(())).unwrap();
        let x = exchange("POST", "http://a/").header("content-type", kind).body(body.to_owned()).build();
        let mut x = chain.run(x).await;
        let sent = x.request_body.collect_up_to(1 << 20).await.unwrap();
        (x.response.status().as_u16(), text(&mut x).await, String::from_utf8_lossy(&sent).into_owned())
    }

    const JSON: &str = "application/json";
    const FORM: &str = "application/x-www-form-urlencoded";

    #[tokio::test]
    async fn bodies_fit_the_schema_or_are_refused() {
        let schema = json!({"body_schema": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": false,
            "properties": {
                "name": {"type": "string", "minLength": 2, "maxLength": 4, "pattern": "^[a-z]+$"},
                "age": {"type": "integer", "minimum": 1, "maximum": 9},
                "kind": {"type": "string", "enum": ["a", "b"]},
                "list": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "number", "exclusiveMinimum": 0}},
            },
        }});
        let cases = [
            (r#"{"name":"ann"}"#, 200, ""),
            (r#"{"name":"ann","age":9,"kind":"a","list":[1.5]}"#, 200, ""),
            (r#"{}"#, 400, "property \"name\" is required"),
            (r#"[]"#, 400, "wrong type: expected object, got array"),
            (r#"{"name":1}"#, 400, "property \"name\" validation failed: wrong type: expected string, got number"),
            (r#"{"name":"a"}"#, 400, "property \"name\" validation failed: string too short, expected at least 2, got 1"),
            (r#"{"name":"abcde"}"#, 400, "property \"name\" validation failed: string too long, expected at most 4, got 5"),
            (r#"{"name":"A1"}"#, 400, "property \"name\" validation failed: failed to match pattern \"^[a-z]+$\" with \"A1\""),
            (r#"{"name":"ann","age":0}"#, 400, "property \"age\" validation failed: expected 0 to be at least 1"),
            (r#"{"name":"ann","age":10}"#, 400, "property \"age\" validation failed: expected 10 to be at most 9"),
            (r#"{"name":"ann","kind":"c"}"#, 400, "property \"kind\" validation failed: matches none of the enum values"),
            (r#"{"name":"ann","list":[]}"#, 400, "property \"list\" validation failed: expect array to have at least 1 items"),
            (r#"{"name":"ann","list":[1,0]}"#, 400, "property \"list\" validation failed: failed to validate item 2: expected 0 to be greater than 0"),
            (r#"{"name":"ann","x":1}"#, 400, "additional properties forbidden, found x"),
            (r#"{"name":"ann","name":"bob"}"#, 400, "property \"name\" is written twice"),
            (r#"{"name""#, 400, "not JSON: EOF while parsing an object at line 1 column 7"),
            ("", 400, "no request body"),
        ];
        for (body, status, told) in cases {
            let (got, answer, sent) = send(&schema, JSON, body).await;
            assert_eq!((got, &*answer), (status, told), "{body}");
            if status == 200 {
                assert_eq!(sent, body, "what fits is not changed");
            }
        }
    }

    #[tokio::test]
    async fn forms_are_objects() {
        let schema = json!({"body_schema": {
            "required": ["a"], "properties": {"a": {"type": "string", "enum": ["x y"]}, "b": {"type": "array"}},
        }});
        let cases = [
            (FORM, "a=x+y&b=1&b=2", 200),
            ("application/x-www-form-urlencoded; charset=utf-8", "%61=x%20y", 200),
            (FORM, "a=z", 400),
            (FORM, "a", 400),
            (FORM, "b=1", 400),
            (FORM, "a=x+y&b=1", 400),
            (JSON, "a=x+y", 400),
            (JSON, r#"{"a":"x y"}"#, 200),
        ];
        for (kind, body, status) in cases {
            let (got, answer, sent) = send(&schema, kind, body).await;
            assert_eq!(got, status, "{body}: {answer}");
            assert!(status != 200 || sent == body);
        }
    }

    #[tokio::test]
    async fn defaults_are_filled_in() {
        let schema = json!({"body_schema": {"properties": {
            "a": {"type": "integer", "default": 7},
            "b": {"type": "object", "properties": {"c": {"default": "x"}}},
            "d": {"type": "array", "items": {"properties": {"e": {"default": true}}}},
        }}});
        let (status, _, sent) = send(&schema, JSON, r#"{"b":{},"d":[{},{"e":false}]}"#).await;
        let expected = json!({"a": 7, "b": {"c": "x"}, "d": [{"e": true}, {"e": false}]});
        assert_eq!((status, serde_json::from_str::<Value>(&sent).unwrap()), (200, expected));
    }

    #[tokio::test]
    async fn header_fields_are_found_however_they_are_written() {
        let schema = json!({"header_schema": {
            "type": "object",
            "required": ["X-Test", "Content-Type"],
            "properties": {
                "X-Test": {"type": "string", "pattern": "^t"},
                "content-TYPE": {"enum": ["application/json"]},
            },
        }});
        let cases: [(&[u8], &str, u16, &str); 4] = [
            (b"test", JSON, 200, ""),
            (b"best", JSON, 400, "property \"X-Test\" validation failed: failed to match pattern \"^t\" with \"best\""),
            (b"test", FORM, 400, "property \"content-TYPE\" validation failed: matches none of the enum values"),
            (b"\xff", JSON, 400, "property \"X-Test\" validation failed: failed to match pattern \"^t\" with \"\u{fffd}\""),
        ];
        for (value, kind, status, told) in cases {
            let mut chain = TestEnv::default().chain::<RequestValidation, _>(&schema, |_| Ok(())).unwrap();
            let mut x = exchange("POST", "http://a/").header("content-type", kind).build();
            x.request.headers.insert("x-test", HeaderValue::from_bytes(value).unwrap());
            let mut x = chain.run(x).await;
            assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (status, told));
        }
        let (status, told, _) = send(&schema, JSON, "").await;
        assert_eq!((status, &*told), (400, "property \"X-Test\" is required"));
    }

    #[tokio::test]
    async fn the_refusal_can_be_chosen_and_bodies_are_bounded() {
        let config = json!({
            "body_schema": {"required": ["a"]}, "rejected_code": 403, "rejected_msg": "customized", "max_req_body_size": 40_000,
        });
        assert_eq!(send(&config, JSON, "{}").await.0, 403);
        assert_eq!(send(&config, JSON, "{}").await.1, "customized");
        assert_eq!(send(&config, JSON, &" ".repeat(40_001)).await.0, 413);
        let large = format!("{{\"a\":\"{}\"}}", "x".repeat(39_000));
        assert_eq!(send(&config, JSON, &large).await, (200, String::new(), large));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"body_schema": {"type": "objet"}}), "/body_schema"),
            (json!({"body_schema": {"properties": {"a": {"pattern": "("}}}}), "/body_schema"),
            (json!({"body_schema": {"$ref": "http://a.com/schema.json"}}), "/body_schema"),
            (json!({"header_schema": {"required": "a"}}), "/header_schema"),
            (json!({"header_schema": []}), "/header_schema"),
            (json!({"header_schema": {}, "rejected_code": 199}), "/rejected_code"),
            (json!({"header_schema": {}, "rejected_code": 600}), "/rejected_code"),
            (json!({"header_schema": {}, "rejected_msg": ""}), "/rejected_msg"),
            (json!({"header_schema": {}, "rejected_msg": "x".repeat(257)}), "/rejected_msg"),
            (json!({"header_schema": {}, "schema": {}}), "/schema"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<RequestValidation>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
