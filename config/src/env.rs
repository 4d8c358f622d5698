//! Environment variables in configuration files: `${{NAME}}` and `${{NAME:=default}}`, in values and keys.
//!
//! What a value becomes is as in APISIX, see [`Typing`], with one exception: text that would not print the same again as
//! a number (`007`, `1e5`, twenty digits) stays text, for keys and tokens are often digits. Substitution happens after
//! parsing, so a variable cannot add structure, and places stay. A variable that is missing and has no default is an
//! error with its place, never an empty string.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::{Map, Number, Value};

use crate::document::{Document, LocatedError, plain_scalar};
use crate::error::{ConfigError, escape};

/// Where variables come from.
pub trait Env {
    /// The value of a variable; `None` if it is not set.
    fn var(&self, name: &str) -> Option<String>;

    /// The secret at `path` of a secret manager: `vault/1/jack/key` for `$secret://vault/1/jack/key`.
    ///
    /// # Errors
    /// Why it is not known, for the operator.
    fn secret(&self, path: &str) -> Result<String, String> {
        let _ = path;
        Err("secret managers are asked by a running gateway only".to_owned())
    }
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

/// What a value becomes when its variables are put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typing {
    /// As in `config.yaml`: a number or boolean if it reads as one, quoted or not.
    Guess,
    /// As in `apisix.yaml`: in quotes it is text, without them it is what YAML makes of it.
    Quotes,
}

/// Substitute all variables of a document. Places stay as they are.
///
/// # Errors
/// All variables that are missing, and keys that become equal.
pub fn substitute(document: &mut Document, env: &dyn Env, typing: Typing) -> Result<(), Vec<LocatedError>> {
    if !document.may_substitute() {
        return Ok(());
    }
    // Pointers of errors are those of the file, so the old keys are kept until all is said.
    let mut value = document.value().clone();
    let mut walk = Walk { document, env, typing, index: 0, pointer: String::new(), errors: Vec::new() };
    walk.value(&mut value);
    let errors = walk.errors;
    if errors.is_empty() {
        *document.value_mut() = value;
        return Ok(());
    }
    Err(errors.into_iter().map(|error| document.error(error)).collect())
}

struct Walk<'a> {
    document: &'a Document,
    env: &'a dyn Env,
    typing: Typing,
    /// Number of the next node, in the order of the file.
    index: usize,
    pointer: String,
    errors: Vec<ConfigError>,
}

impl Walk<'_> {
    fn value(&mut self, value: &mut Value) {
        let length = self.pointer.len();
        let plain = self.document.is_plain(self.index);
        self.index += 1;
        match value {
            Value::String(text) => match expand(text, self.env) {
                Ok(Cow::Borrowed(_)) => {}
                Ok(Cow::Owned(expanded)) => {
                    *value = match self.typing {
                        Typing::Guess => guess(expanded),
                        Typing::Quotes if plain => keep_digits(plain_scalar(&expanded), expanded),
                        Typing::Quotes => Value::String(expanded),
                    }
                }
                Err(problem) => self.errors.push(ConfigError::invalid(self.pointer.as_str(), problem)),
            },
            Value::Array(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.pointer.push('/');
                    self.pointer.push_str(&index.to_string());
                    self.value(item);
                    self.pointer.truncate(length);
                }
            }
            Value::Object(members) => {
                let mut renamed = false;
                for (key, item) in members.iter_mut() {
                    self.pointer.push('/');
                    self.pointer.push_str(&escape(key));
                    self.value(item);
                    renamed |= key.contains("${{");
                    self.pointer.truncate(length);
                }
                if renamed {
                    *members = self.keys(std::mem::take(members));
                }
            }
            _ => {}
        }
    }

    /// The same members in the same order, under their new keys.
    fn keys(&mut self, members: Map<String, Value>) -> Map<String, Value> {
        let mut result = Map::with_capacity(members.len());
        for (key, value) in members {
            let problem = match expand(&key, self.env) {
                Ok(expanded) if result.contains_key(&*expanded) => {
                    format!("the key becomes `{expanded}`, which is there already")
                }
                Ok(expanded) => {
                    result.insert(expanded.into_owned(), value);
                    continue;
                }
                Err(problem) => problem,
            };
            let pointer = format!("{}/{}", self.pointer, escape(&key));
            self.errors.push(ConfigError::invalid(pointer, problem));
        }
        result
    }
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

/// A number or boolean if the text reads as one.
fn guess(text: String) -> Value {
    let value = match text.as_str() {
        "true" => return Value::Bool(true),
        "false" => return Value::Bool(false),
        text => text.parse::<i64>().map(Number::from).ok().or_else(|| Number::from_f64(text.parse().ok()?)),
    };
    match value {
        Some(number) => keep_digits(Value::Number(number), text),
        None => Value::String(text),
    }
}

/// The value, unless a number lost something of the text it was. Lua numbers are exact up to 2^53 only; APISIX would
/// change a longer token.
fn keep_digits(value: Value, text: String) -> Value {
    const EXACT: u64 = 1 << 53;
    match value {
        Value::Number(number)
            if number.to_string() != text || number.as_u64().is_some_and(|it| it > EXACT) =>
        {
            Value::String(text)
        }
        value => value,
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
            substitute(&mut document, &env(), Typing::Guess).unwrap();
            assert_eq!(document.value()["x"], expected, "{text}");
        }
    }

    #[test]
    fn in_resources_quotes_decide() {
        let text = "\
a: ${{PORT}}
b: \"${{PORT}}\"
c: &x ${{FLAG:=yes}}
d: [*x, '${{FLAG:=yes}}', \"a\"]
e: {<<: {f: ${{ZEROS}}}, g: ${{EMPTY}}}
h: |
  ${{PORT}}
";
        let mut document = Document::yaml("apisix.yaml", text).unwrap();
        substitute(&mut document, &env(), Typing::Quotes).unwrap();
        let expected = json!({
            "a": 1980, "b": "1980", "c": true, "d": [true, "yes", "a"], "e": {"g": null, "f": "007"}, "h": "1980\n",
        });
        assert_eq!(document.value(), &expected);
    }

    #[test]
    fn json_has_references_in_and_out_of_quotes() {
        let text = r#"{"a": ${{PORT}}, "b": "${{PORT}}", "c": [${{ON}}]}"#;
        let mut document = Document::json("apisix.json", text).unwrap();
        substitute(&mut document, &env(), Typing::Quotes).unwrap();
        assert_eq!(document.value(), &json!({"a": 1980, "b": "1980", "c": [true]}));
        for text in ["[${{PORT]", "[$]", "[${{A\n}}]"] {
            assert!(Document::json("apisix.json", text).is_err(), "{text}");
        }
    }

    #[test]
    fn flow_mappings_hold_references() {
        let text = "nodes: {${{HOST}}:${{PORT}}: ${{ONE:=1}}, \"b\": 2}\nx: [${{ON}}, '}}']\n";
        let mut document = Document::yaml("apisix.yaml", text).unwrap();
        substitute(&mut document, &env(), Typing::Quotes).unwrap();
        assert_eq!(document.value(), &json!({"nodes": {"10.0.0.1:1980": 1, "b": 2}, "x": [true, "}}"]}));
        assert_eq!(document.line_of("/nodes/b"), Some((1, 43)));
    }

    #[test]
    fn keys_are_substituted_and_places_stay() {
        let text = "nodes:\n  \"${{HOST}}:${{PORT}}\": ${{ONE:=1}}\n  b: 2\n${{KEY}}: 3\n";
        let mut document = Document::yaml("apisix.yaml", text).unwrap();
        substitute(&mut document, &env(), Typing::Guess).unwrap();
        assert_eq!(document.value(), &json!({"nodes": {"10.0.0.1:1980": 1, "b": 2}, "a/b": 3}));
        assert_eq!(document.line_of("/nodes/10.0.0.1:1980"), Some((2, 3)));
        assert_eq!(document.line_of("/nodes/b"), Some((3, 3)));
        assert_eq!(document.line_of("/a~1b"), Some((4, 1)));
    }

    #[test]
    fn all_missing_variables_are_named_with_their_place() {
        let text = "a: ${{NONE}}\nb:\n  - ok\n  - x${{ GONE }}\nc:\n  ${{AWAY}}: 1\n";
        let mut document = Document::yaml("conf/config.yaml", text).unwrap();
        let errors = substitute(&mut document, &env(), Typing::Guess).unwrap_err();
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
        let errors = substitute(&mut document, &env(), Typing::Guess).unwrap_err();
        assert_eq!(errors.len(), 1);
        assert_eq!(errors.first().map(|error| error.line), Some(3));
    }
}
