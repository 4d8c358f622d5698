//! What PATCH does to an object: merge one into it, or replace what is at a path inside it.
//!
//! Merging follows APISIX: members of objects are merged one by one, `null` takes a member out, arrays and
//! plain values are replaced whole.

use serde_json::{Map, Value};

/// Deepest object that is merged; a deeper one is replaced. Far beyond any real configuration.
const MAX_DEPTH: usize = 64;

/// A path that leads nowhere: into a text, a number or a place that an array does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid sub-path: /{0}")]
pub struct InvalidPath(pub String);

/// Merge `patch` into `target`.
pub fn merge(target: &mut Value, patch: Value) {
    merge_at(target, patch, 0);
}

fn merge_at(target: &mut Value, patch: Value, depth: usize) {
    let Value::Object(members) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() || depth >= MAX_DEPTH {
        *target = Value::Object(Map::new());
    }
    let Some(object) = target.as_object_mut() else { return };
    for (name, value) in members {
        if value.is_null() {
            object.shift_remove(&name);
        } else {
            merge_at(object.entry(name).or_insert(Value::Null), value, depth + 1);
        }
    }
}

/// Replace what is at `path` (segments between slashes) by `value`; `null` takes it out. Objects on the way
/// are made if they are not there; elements of arrays are counted from 0, one more than the last appends.
///
/// # Errors
/// If the path leads through something that has no members.
pub fn set(target: &mut Value, path: &str, value: Value) -> Result<(), InvalidPath> {
    let invalid = || InvalidPath(path.to_owned());
    let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
    let Some((last, way)) = names.split_last() else {
        *target = value;
        return Ok(());
    };
    let mut place = target;
    for name in way {
        place = match place {
            Value::Object(object) => object.entry(*name).or_insert_with(|| Value::Object(Map::new())),
            Value::Array(elements) => {
                let index: usize = name.parse().map_err(|_| invalid())?;
                elements.get_mut(index).ok_or_else(invalid)?
            }
            _ => return Err(invalid()),
        };
    }
    match place {
        Value::Object(object) if value.is_null() => drop(object.shift_remove(*last)),
        Value::Object(object) => drop(object.insert((*last).to_owned(), value)),
        Value::Array(elements) => {
            let index: usize = last.parse().map_err(|_| invalid())?;
            match (index.cmp(&elements.len()), value.is_null()) {
                (std::cmp::Ordering::Less, true) => drop(elements.remove(index)),
                (std::cmp::Ordering::Less, false) => {
                    elements.get_mut(index).map(|element| *element = value).ok_or_else(invalid)?;
                }
                (std::cmp::Ordering::Equal, false) => elements.push(value),
                _ => return Err(invalid()),
            }
        }
        _ => return Err(invalid()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn merging() {
        for (what, target, patch, expected) in [
            ("a member is added", json!({"a": 1}), json!({"b": 2}), json!({"a": 1, "b": 2})),
            ("a member is replaced", json!({"a": 1}), json!({"a": "x"}), json!({"a": "x"})),
            ("null takes out", json!({"a": 1, "b": 2}), json!({"a": null}), json!({"b": 2})),
            ("null of nothing is nothing", json!({"a": 1}), json!({"b": null}), json!({"a": 1})),
            (
                "objects are merged deep down",
                json!({"u": {"nodes": {"a:1": 1, "b:1": 1}, "type": "roundrobin"}}),
                json!({"u": {"nodes": {"a:1": null, "c:1": 5}}}),
                json!({"u": {"nodes": {"b:1": 1, "c:1": 5}, "type": "roundrobin"}}),
            ),
            ("arrays are replaced", json!({"a": [1, 2]}), json!({"a": [3]}), json!({"a": [3]})),
            ("an array by an object", json!({"a": [1]}), json!({"a": {"b": 1}}), json!({"a": {"b": 1}})),
            (
                "nulls of a new object stay out",
                json!({}),
                json!({"a": {"b": null, "c": 1}}),
                json!({"a": {"c": 1}}),
            ),
        ] {
            let mut merged = target;
            merge(&mut merged, patch);
            assert_eq!(merged, expected, "{what}");
        }
    }

    #[test]
    fn setting_at_a_path() {
        let object =
            json!({"uri": "/a", "hosts": ["a", "b"], "upstream": {"nodes": [{"host": "x", "weight": 1}]}});
        for (path, value, expected) in [
            ("uri", json!("/b"), Some(("/uri", Some(json!("/b"))))),
            ("uri", Value::Null, Some(("/uri", None))),
            ("labels/env", json!("dev"), Some(("/labels", Some(json!({"env": "dev"}))))),
            ("upstream/nodes", json!({"y:1": 1}), Some(("/upstream/nodes", Some(json!({"y:1": 1}))))),
            ("upstream/nodes/0/weight", json!(9), Some(("/upstream/nodes/0/weight", Some(json!(9))))),
            ("hosts/2", json!("c"), Some(("/hosts", Some(json!(["a", "b", "c"]))))),
            ("hosts/0", Value::Null, Some(("/hosts", Some(json!(["b"]))))),
            ("hosts/7", json!("c"), None),
            ("hosts/x", json!("c"), None),
            ("uri/deeper", json!(1), None),
            ("uri/deeper/still", json!(1), None),
        ] {
            let mut changed = object.clone();
            match (set(&mut changed, path, value), expected) {
                (Ok(()), Some((pointer, expected))) => {
                    assert_eq!(changed.pointer(pointer), expected.as_ref(), "{path}");
                }
                (Err(error), None) => assert_eq!(error.to_string(), format!("invalid sub-path: /{path}")),
                (result, expected) => assert_eq!((result, path), (Ok(()), "?"), "{expected:?}"),
            }
        }
        let mut changed = object;
        set(&mut changed, "/", json!({})).unwrap();
        assert_eq!(changed, json!({}));
    }
}
