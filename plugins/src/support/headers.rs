//! Header fields that the configuration sets: names checked once, values with variables and captures.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use config::error::ConfigError;
use config::var::Vars;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use regex::bytes::Captures;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::captures::{Replacement, Text};

/// A value as it is written: text or a number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    /// Text, with variables.
    Text(String),
    /// A number.
    Number(serde_json::Number),
}

impl Scalar {
    /// The value as text.
    pub fn text(&self) -> String {
        match self {
            Scalar::Text(text) => text.clone(),
            Scalar::Number(number) => number.to_string(),
        }
    }
}

impl JsonSchema for Scalar {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Scalar".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["string", "number"]})
    }
}

/// Fields by name.
pub type Fields = BTreeMap<String, Scalar>;

/// The name of a field, ready for look-up.
///
/// # Errors
/// No field can have that name. The error stands at `pointer`.
pub fn name(name: &str, pointer: &str) -> Result<HeaderName, ConfigError> {
    HeaderName::from_bytes(name.trim().as_bytes()).map(lasting).map_err(|_| {
        let pointer = format!("{pointer}/{}", config::error::escape(name));
        ConfigError::invalid(pointer, format!("`{name}` is not the name of a header field"))
    })
}

/// Names that are kept for as long as the process lives.
const LASTING: usize = 4096;

/// The same name, of which a copy touches no counter that workers share: the first few thousand that any
/// configuration writes live as long as the process.
fn lasting(name: HeaderName) -> HeaderName {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name.as_str()) {
        return HeaderName::from_static(known);
    }
    if names.len() >= LASTING || name.as_str().len() > 128 {
        return name;
    }
    let known: &'static str = Box::leak(name.as_str().into());
    names.insert(known);
    HeaderName::from_static(known)
}

/// The value of a field, compiled.
#[derive(Clone, Debug)]
pub enum Value {
    /// Always the same.
    Literal(HeaderValue),
    /// Made for each request.
    Made(Replacement),
}

impl Value {
    /// Reads variables and captures.
    ///
    /// # Errors
    /// No field can have that value. The error stands at `pointer`.
    pub fn new(source: &str, pointer: &str) -> Result<Self, ConfigError> {
        let replacement = Replacement::with_variables(source);
        match replacement.as_literal() {
            Some(literal) => HeaderValue::from_str(literal)
                .or_else(|_| HeaderValue::from_bytes(literal.as_bytes()))
                .map(Value::Literal)
                .map_err(|_| ConfigError::invalid(pointer, "a header field has no control characters")),
            None => Ok(Value::Made(replacement)),
        }
    }

    /// The value for a request; nothing when it is empty, which no field is set to.
    pub fn render<V: Vars + ?Sized>(&self, vars: &V, captures: Option<&Captures<'_>>) -> Option<HeaderValue> {
        match self {
            Value::Literal(value) if value.is_empty() => None,
            // A copy, not a clone: a clone counts references where all workers do.
            Value::Literal(value) => HeaderValue::from_bytes(value.as_bytes()).ok(),
            Value::Made(replacement) => {
                let mut out = Text::new();
                replacement.render(vars, captures, &mut out);
                // Variables may hold what the client sent: no line ends in a field.
                out.retain(|byte| *byte >= 0x20 && *byte != 0x7f);
                if out.is_empty() { None } else { HeaderValue::from_bytes(&out).ok() }
            }
        }
    }
}

/// Compiles fields that stand at `pointer`.
///
/// # Errors
/// The first that cannot be a field.
pub fn compile(fields: &Fields, pointer: &str) -> Result<Vec<(HeaderName, Value)>, ConfigError> {
    fields
        .iter()
        .map(|(key, value)| {
            let place = format!("{pointer}/{}", config::error::escape(key));
            Ok((name(key, pointer)?, Value::new(&value.text(), &place)?))
        })
        .collect()
}

/// Sets or, with nothing to set, removes a field.
pub fn set(headers: &mut HeaderMap, name: &HeaderName, value: Option<HeaderValue>) {
    match value {
        Some(value) => {
            headers.insert(name, value);
        }
        None => {
            headers.remove(name);
        }
    }
}

/// Takes out what is true of a body only as long as nobody changes it.
pub fn body_changes(headers: &mut HeaderMap) {
    for name in [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::LAST_MODIFIED, header::ETAG] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::exchange;

    use super::*;

    #[test]
    fn values_are_rendered_without_line_ends() {
        let x = exchange("GET", "http://a.com/?q=a%0D%0AX:%20y").build();
        let cases = [
            ("plain", Some("plain")),
            ("", None),
            ("$host/$nothing", Some("a.com/")),
            ("$arg_q", Some("aX: y")),
            ("$nothing", None),
        ];
        for (source, expected) in cases {
            let value = Value::new(source, "").unwrap().render(&*x, None);
            assert_eq!(value.as_ref().and_then(|value| value.to_str().ok()), expected, "{source}");
        }
        assert!(Value::new("a\nb", "").is_err());
        assert!(name("a b", "").is_err());
    }
}
