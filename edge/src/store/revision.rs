//! Numbered revisions: who changed which object, when, and what inside it.
//!
//! A difference is structural: a pointer with what was there and what is there now, so that it can be read,
//! shown and turned around. Objects are compared member by member, arrays as wholes.

use config::error::escape;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// One revision of a store that keeps a log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Revision {
    /// Its number.
    pub revision: u64,
    /// When it was written: milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
    /// Who wrote it: the name of the admin key, or `ttl`.
    pub author: String,
    /// The object, as [`config::ResourceKey`] prints it.
    pub key: String,
    /// What changed inside the object.
    pub diff: Vec<Difference>,
}

/// One difference between two states of an object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// RFC 6901 pointer inside the object; empty for the object itself.
    pub pointer: String,
    /// What was there. `None`: nothing.
    #[serde(skip_serializing_if = "Option::is_none", default, deserialize_with = "present")]
    pub before: Option<Value>,
    /// What is there now. `None`: nothing.
    #[serde(skip_serializing_if = "Option::is_none", default, deserialize_with = "present")]
    pub after: Option<Value>,
}

/// A member that is there, `null` included.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// What leads from `before` to `after`; nothing if they are equal.
#[must_use]
pub fn difference(before: Option<&Value>, after: Option<&Value>) -> Vec<Difference> {
    let mut found = Vec::new();
    compare(&mut String::new(), before, after, &mut found);
    found
}

fn compare(pointer: &mut String, before: Option<&Value>, after: Option<&Value>, found: &mut Vec<Difference>) {
    if before == after {
        return;
    }
    let (Some(Value::Object(old)), Some(Value::Object(new))) = (before, after) else {
        found.push(Difference { pointer: pointer.clone(), before: before.cloned(), after: after.cloned() });
        return;
    };
    let length = pointer.len();
    let added = new.keys().filter(|name| !old.contains_key(*name));
    for name in old.keys().chain(added) {
        pointer.push('/');
        pointer.push_str(&escape(name));
        compare(pointer, old.get(name), new.get(name), found);
        pointer.truncate(length);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_differs_is_told() {
        let before =
            json!({"uri": "/a", "plugins": {"a/b": {"x": 1}, "gone": {}}, "hosts": ["a"], "same": [1]});
        let after =
            json!({"uri": "/a", "plugins": {"a/b": {"x": null}, "new": {}}, "hosts": ["b"], "same": [1]});
        let found = difference(Some(&before), Some(&after));
        let text: Vec<String> =
            found.iter().map(|d| format!("{} {:?} {:?}", d.pointer, d.before, d.after)).collect();
        let one = |pointer: &str, before: Option<Value>, after: Option<Value>| {
            format!("{pointer} {before:?} {after:?}")
        };
        assert_eq!(
            text,
            [
                one("/plugins/a~1b/x", Some(json!(1)), Some(Value::Null)),
                one("/plugins/gone", Some(json!({})), None),
                one("/plugins/new", None, Some(json!({}))),
                one("/hosts", Some(json!(["a"])), Some(json!(["b"]))),
            ]
        );
        let back: Vec<Difference> = serde_json::from_value(serde_json::to_value(&found).unwrap()).unwrap();
        assert_eq!(back, found);
    }

    #[test]
    fn an_object_that_comes_or_goes_is_one_difference() {
        let value = json!({"uri": "/"});
        assert_eq!(difference(None, Some(&value)).len(), 1);
        assert_eq!(difference(Some(&value), None).len(), 1);
        assert!(difference(Some(&value), Some(&value)).is_empty());
        assert!(difference(None, None).is_empty());
    }
}
