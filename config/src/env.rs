//! Environment variables in configuration files: `${{NAME}}` and `${{NAME:=default}}`, in values and keys.
//!
//! As in APISIX, a value that is a number or a boolean after substitution becomes one. Unlike there, text that would not
//! print the same again as a number (`007`, `1e5`, twenty digits) stays text: keys and tokens are often digits. A
//! variable that is missing and has no default is an error with its place, never an empty string.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::{Map, Number, Value};

use crate::document::{Document, LocatedError};
use crate::error::{ConfigError, escape};

/// Where variables come from.
pub trait Env {
    /// The value of a variable; `None` if it is not set.
    fn var(&self, name: &str) -> Option<String>;
}

/// The environment of this process. Variables that are not UTF-8 count as not set.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessEnv;

impl Env for ProcessEnv {
    fn var(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }
}

impl Env for BTreeMap<String, String> {
    fn var(&self, name: &str) -> Option<String> {
        self.get(name).cloned()
    }
}

/// Substitute all variables of a document. Places stay as they are.
///
/// # Errors
/// All variables that are missing or cannot be read, and keys that become equal.
pub fn substitute(document: &mut Document, env: &dyn Env) -> Result<(), Vec<LocatedError>> {
    if !document.may_substitute() {
        return Ok(());
    }
    let mut errors = Vec::new();
    // Pointers of errors are those of the file, so the old keys are kept until all is said.
    let mut value = document.value().clone();
    in_value(&mut value, &mut String::new(), env, &mut errors);
    if errors.is_empty() {
        *document.value_mut() = value;
        return Ok(());
    }
    Err(errors.into_iter().map(|error| document.error(error)).collect())
}

fn in_value(value: &mut Value, pointer: &mut String, env: &dyn Env, errors: &mut Vec<ConfigError>) {
    let length = pointer.len();
    match value {
        Value::String(text) => match expand(text, env) {
            Ok(Cow::Borrowed(_)) => {}
            Ok(Cow::Owned(expanded)) => *value = typed(expanded),
            Err(problem) => errors.push(ConfigError::invalid(pointer.as_str(), problem)),
        },
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                pointer.push('/');
                pointer.push_str(&index.to_string());
                in_value(item, pointer, env, errors);
                pointer.truncate(length);
            }
        }
        Value::Object(members) => {
            let mut renamed = false;
            for (key, item) in members.iter_mut() {
                pointer.push('/');
                pointer.push_str(&escape(key));
                in_value(item, pointer, env, errors);
                renamed |= key.contains("${{");
                pointer.truncate(length);
            }
            if renamed {
                *members = in_keys(std::mem::take(members), pointer, env, errors);
            }
        }
        _ => {}
    }
}

/// The same members in the same order, under their new keys.
fn in_keys(
    members: Map<String, Value>,
    pointer: &str,
    env: &dyn Env,
    errors: &mut Vec<ConfigError>,
) -> Map<String, Value> {
    let mut result = Map::with_capacity(members.len());
    for (key, value) in members {
        let at = || format!("{pointer}/{}", escape(&key));
        match expand(&key, env) {
            Ok(expanded) => {
                let expanded = expanded.into_owned();
                if result.contains_key(&expanded) {
                    let problem = format!("the key becomes `{expanded}`, which is there already");
                    errors.push(ConfigError::invalid(at(), problem));
                }
                result.insert(expanded, value);
            }
            Err(problem) => errors.push(ConfigError::invalid(at(), problem)),
        }
    }
    result
}

/// The text with its variables put in; borrowed if it has none.
fn expand<'a>(text: &'a str, env: &dyn Env) -> Result<Cow<'a, str>, String> {
    if !text.contains("${{") {
        return Ok(Cow::Borrowed(text));
    }
    let mut out = String::with_capacity(text.len());
    let mut found = false;
    let mut rest = text;
    while let Some((before, inner)) = rest.split_once("${{") {
        out.push_str(before);
        match inner.split_once("}}").and_then(|(inside, after)| Some((reference(inside)?, after))) {
            Some(((name, default), after)) => {
                let value = env.var(name).or_else(|| default.map(str::to_owned));
                let value = value.ok_or_else(|| {
                    format!(
                        "environment variable {name} is not set: set it, or write ${{{{{name}:=default}}}}"
                    )
                })?;
                out.push_str(&value);
                found = true;
                rest = after;
            }
            // Not a reference: APISIX leaves it alone.
            None => {
                out.push_str("${{");
                rest = inner;
            }
        }
    }
    if !found {
        return Ok(Cow::Borrowed(text));
    }
    out.push_str(rest);
    Ok(Cow::Owned(out))
}

/// `NAME` or `NAME:=default`, with blanks around; `None` if it is neither.
fn reference(inside: &str) -> Option<(&str, Option<&str>)> {
    let (name, default) = match inside.split_once(":=") {
        Some((name, default)) => (name.trim(), Some(default.trim())),
        None => (inside.trim(), None),
    };
    let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    is_name.then_some((name, default))
}

/// Text after substitution: a number or boolean if it is one and loses nothing by it.
fn typed(text: String) -> Value {
    match text.as_str() {
        "true" => return Value::Bool(true),
        "false" => return Value::Bool(false),
        _ => {}
    }
    // Beyond 2^53 a Lua number is not exact; APISIX would change such a token.
    let integer = text.parse::<i64>().ok().filter(|value| value.unsigned_abs() <= 1 << 53);
    if let Some(integer) = integer.filter(|value| value.to_string() == text) {
        return integer.into();
    }
    let number =
        text.parse::<f64>().ok().filter(|value| value.to_string() == text).and_then(Number::from_f64);
    match number {
        Some(number) if text.contains('.') => Value::Number(number),
        _ => Value::String(text),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn env() -> BTreeMap<String, String> {
        let vars = [
            ("HOST", "10.0.0.1"),
            ("PORT", "1980"),
            ("RATIO", "0.5"),
            ("ON", "true"),
            ("EMPTY", ""),
            ("ZEROS", "007"),
            ("LONG", "12345678901234567890"),
            ("EXP", "1e5"),
            ("KEY", "a/b"),
        ];
        vars.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn values_are_substituted_and_typed() {
        let cases = [
            ("${{HOST}}", json!("10.0.0.1")),
            ("${{PORT}}", json!(1980)),
            ("${{ PORT }}", json!(1980)),
            ("1${{PORT}}", json!(11980)),
            ("${{HOST}}:${{PORT}}", json!("10.0.0.1:1980")),
            ("${{RATIO}}", json!(0.5)),
            ("${{ON}}", json!(true)),
            ("${{EMPTY}}", json!("")),
            ("${{EMPTY:=x}}", json!("")),
            ("${{ZEROS}}", json!("007")),
            ("${{LONG}}", json!("12345678901234567890")),
            ("${{EXP}}", json!("1e5")),
            ("${{NONE:=80}}", json!(80)),
            ("${{NONE:= a b }}", json!("a b")),
            ("${{NONE:=}}", json!("")),
            ("${{NONE:=http://x:=y}}", json!("http://x:=y")),
            ("${{a-b}}", json!("${{a-b}}")),
            ("${{PORT", json!("${{PORT")),
            ("$host ${uri}", json!("$host ${uri}")),
            ("80", json!("80")),
        ];
        for (text, expected) in cases {
            let mut document = Document::json("a", &json!({ "x": text }).to_string()).unwrap();
            substitute(&mut document, &env()).unwrap();
            assert_eq!(document.value()["x"], expected, "{text}");
        }
    }

    #[test]
    fn keys_are_substituted_and_places_stay() {
        let text = "nodes:\n  \"${{HOST}}:${{PORT}}\": ${{ONE:=1}}\n  b: 2\n${{KEY}}: 3\n";
        let mut document = Document::yaml("apisix.yaml", text).unwrap();
        substitute(&mut document, &env()).unwrap();
        assert_eq!(document.value(), &json!({"nodes": {"10.0.0.1:1980": 1, "b": 2}, "a/b": 3}));
        assert_eq!(document.line_of("/nodes/10.0.0.1:1980"), Some((2, 3)));
        assert_eq!(document.line_of("/nodes/b"), Some((3, 3)));
        assert_eq!(document.line_of("/a~1b"), Some((4, 1)));
    }

    #[test]
    fn all_missing_variables_are_named_with_their_place() {
        let text = "a: ${{NONE}}\nb:\n  - ok\n  - x${{ GONE }}\nc:\n  ${{AWAY}}: 1\n";
        let mut document = Document::yaml("conf/config.yaml", text).unwrap();
        let errors = substitute(&mut document, &env()).unwrap_err();
        let errors: Vec<String> = errors.iter().map(LocatedError::to_string).collect();
        assert_eq!(
            errors,
            [
                "conf/config.yaml:1:1: /a: environment variable NONE is not set: set it, or write ${{NONE:=default}}",
                "conf/config.yaml:4:5: /b/1: environment variable GONE is not set: set it, or write ${{GONE:=default}}",
                "conf/config.yaml:6:3: /c/${{AWAY}}: environment variable AWAY is not set: set it, or write \
                 ${{AWAY:=default}}",
            ]
        );
    }

    #[test]
    fn keys_that_become_equal_are_an_error() {
        let mut document = Document::yaml("a", "x:\n  '1980': 1\n  ${{PORT}}: 2\n").unwrap();
        let errors = substitute(&mut document, &env()).unwrap_err();
        assert_eq!(errors.len(), 1);
        assert_eq!(errors.first().map(|error| error.line), Some(3));
    }
}
