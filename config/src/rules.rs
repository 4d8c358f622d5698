//! Which fields of an object go together: one of two, one with another, one when another has a value.
//!
//! A rule is written once. It checks the JSON of an object, whether or not the rest of the object could be
//! read, and it becomes a part of the JSON Schema that people and tools see.

use schemars::Schema;
use schemars::transform::Transform;
use serde_json::{Map, Value, json};

use crate::error::{ConfigError, ErrorKind};

/// A rule about the presence of fields.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    /// One of the two, and not both.
    ExactlyOne(&'static str, &'static str),
    /// Not both.
    AtMostOne(&'static str, &'static str),
    /// At least one of them.
    AnyOf(&'static [&'static str]),
    /// At least one of them, unless a field has a value.
    AnyOfUnless { field: &'static str, is: &'static str, of: &'static [&'static str] },
    /// One with another.
    Needs { field: &'static str, needs: &'static str },
    /// One when another has a value, unless a third has a value.
    When {
        field: &'static str,
        is: &'static str,
        needs: &'static str,
        unless: Option<(&'static str, &'static str)>,
    },
}

/// Check the object at `at`.
pub(crate) fn check(rules: &[Rule], object: &Map<String, Value>, at: &str, errors: &mut Vec<ConfigError>) {
    let has = |field: &str| object.contains_key(field);
    let is = |field: &str, value: &str| object.get(field).and_then(Value::as_str) == Some(value);
    for rule in rules {
        let kind = match *rule {
            Rule::ExactlyOne(one, other) if has(one) == has(other) => {
                if has(one) {
                    ErrorKind::Exclusive { one, other }
                } else {
                    ErrorKind::NoneOf { fields: vec![one, other] }
                }
            }
            Rule::AtMostOne(one, other) if has(one) && has(other) => ErrorKind::Exclusive { one, other },
            Rule::AnyOf(fields) if !fields.iter().any(|field| has(field)) => {
                ErrorKind::NoneOf { fields: fields.to_vec() }
            }
            Rule::AnyOfUnless { field, is: value, of } if !is(field, value) && !of.iter().any(|f| has(f)) => {
                ErrorKind::NoneOf { fields: of.to_vec() }
            }
            Rule::Needs { field, needs } if has(field) && !has(needs) => {
                ErrorKind::Needs { field: field.to_owned(), needs }
            }
            Rule::When { field, is: value, needs, unless }
                if is(field, value) && !has(needs) && !unless.is_some_and(|(f, v)| is(f, v)) =>
            {
                ErrorKind::Needs { field: format!("{field}: {value}"), needs }
            }
            _ => continue,
        };
        errors.push(ConfigError::new(at, kind));
    }
}

/// The rules as a part of a schema that a type describes.
#[derive(Clone)]
pub(crate) struct Rules(pub &'static [Rule]);

impl Transform for Rules {
    fn transform(&mut self, schema: &mut Schema) {
        describe(schema, self.0);
    }
}

/// Write the rules into the schema of the object.
pub(crate) fn describe(schema: &mut Schema, rules: &[Rule]) {
    let required = |field: &str| json!({"required": [field]});
    let any =
        |fields: &[&str]| json!({"anyOf": fields.iter().map(|field| required(field)).collect::<Vec<_>>()});
    let is = |field: &str, value: &str| json!({"properties": {field: {"const": value}}, "required": [field]});
    let parts: Vec<Value> = rules
        .iter()
        .map(|rule| match *rule {
            Rule::ExactlyOne(one, other) => json!({"oneOf": [required(one), required(other)]}),
            Rule::AtMostOne(one, other) => json!({"not": {"required": [one, other]}}),
            Rule::AnyOf(fields) => any(fields),
            Rule::AnyOfUnless { field, is: value, of } => {
                json!({"if": {"not": is(field, value)}, "then": any(of)})
            }
            Rule::Needs { field, needs } => json!({"dependentRequired": {field: [needs]}}),
            Rule::When { field, is: value, needs, unless: None } => {
                json!({"if": is(field, value), "then": required(needs)})
            }
            Rule::When { field, is: value, needs, unless: Some((other, except)) } => json!({
                "if": {"allOf": [is(field, value), {"not": is(other, except)}]},
                "then": required(needs),
            }),
        })
        .collect();
    schema.insert("allOf".to_owned(), Value::Array(parts));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_schema_says_what_the_check_says() {
        let rules: &[Rule] = &[
            Rule::ExactlyOne("a", "b"),
            Rule::AtMostOne("c", "d"),
            Rule::AnyOf(&["a", "c"]),
            Rule::AnyOfUnless { field: "type", is: "x", of: &["b", "d"] },
            Rule::Needs { field: "c", needs: "e" },
            Rule::When { field: "type", is: "y", needs: "e", unless: Some(("f", "z")) },
            Rule::When { field: "type", is: "z", needs: "f", unless: None },
        ];
        for rule in rules {
            let mut schema = Schema::default();
            describe(&mut schema, std::slice::from_ref(rule));
            let validator = jsonschema::validator_for(schema.as_value()).unwrap();
            // Every subset of the fields, with every value that a rule looks at.
            for bits in 0..32_u32 {
                for kind in ["", "x", "y", "z"] {
                    for f in ["", "y", "z"] {
                        let mut object = Map::new();
                        for (bit, field) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
                            if bits >> bit & 1 == 1 {
                                object.insert(field.to_owned(), json!(1));
                            }
                        }
                        for (field, value) in [("type", kind), ("f", f)] {
                            if !value.is_empty() {
                                object.insert(field.to_owned(), json!(value));
                            }
                        }
                        let mut errors = Vec::new();
                        check(std::slice::from_ref(rule), &object, "", &mut errors);
                        let object = Value::Object(object);
                        assert_eq!(errors.is_empty(), validator.is_valid(&object), "{rule:?} {object}");
                    }
                }
            }
        }
    }
}
