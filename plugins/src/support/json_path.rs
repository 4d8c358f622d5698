//! JSONPath, as far as it names places: `$.a.b`, `$['a']`, `$.a[0]`, `$.a[*].b`, `$.*`, `$..a`.
//!
//! Filters and scripts are refused when the configuration is read.

use serde_json::Value;

/// A path, compiled.
#[derive(Debug, PartialEq)]
pub struct JsonPath(Box<[Step]>);

#[derive(Debug, PartialEq)]
enum Step {
    Name(Box<str>),
    Index(usize),
    Every,
    /// The value itself and everything in it.
    Deep,
}

impl JsonPath {
    /// Reads a path; nothing if it is none, or has more than places.
    pub fn parse(text: &str) -> Option<Self> {
        let mut rest = text.strip_prefix('$')?;
        let mut steps = Vec::new();
        while !rest.is_empty() {
            let bracket = if let Some(after) = rest.strip_prefix("..") {
                steps.push(Step::Deep);
                rest = after;
                rest.starts_with('[')
            } else if let Some(after) = rest.strip_prefix('.') {
                rest = after;
                false
            } else {
                true
            };
            let (step, after) = if bracket { bracketed(rest)? } else { named(rest)? };
            steps.push(step);
            rest = after;
        }
        Some(Self(steps.into()))
    }

    /// Gives every place of the path in `root` to `change`, which says what stands there now; nothing takes it out.
    /// Returns whether there is such a place.
    pub fn change(&self, root: &mut Value, change: &dyn Fn(&Value) -> Option<Value>) -> bool {
        if self.0.is_empty() {
            *root = change(root).unwrap_or_default();
            return true;
        }
        walk(root, &self.0, change)
    }
}

fn named(text: &str) -> Option<(Step, &str)> {
    let end = text.find(['.', '[']).unwrap_or(text.len());
    let (name, rest) = text.split_at_checked(end)?;
    match name {
        "" => None,
        "*" => Some((Step::Every, rest)),
        name => Some((Step::Name(name.into()), rest)),
    }
}

fn bracketed(text: &str) -> Option<(Step, &str)> {
    let inner = text.strip_prefix('[')?;
    if let Some(quote) = inner.chars().next().filter(|c| matches!(c, '\'' | '"')) {
        let (name, rest) = inner.get(1..)?.split_once(quote)?;
        return Some((Step::Name(name.into()), rest.strip_prefix(']')?));
    }
    let (inner, rest) = inner.split_once(']')?;
    match inner {
        "*" => Some((Step::Every, rest)),
        index => Some((Step::Index(index.parse().ok()?), rest)),
    }
}

fn walk(value: &mut Value, steps: &[Step], change: &dyn Fn(&Value) -> Option<Value>) -> bool {
    let Some((step, rest)) = steps.split_first() else { return false };
    if *step == Step::Deep {
        let mut found = false;
        // What is below first: the place itself may go.
        match value {
            Value::Object(members) => {
                members.values_mut().for_each(|member| found |= walk(member, steps, change));
            }
            Value::Array(items) => items.iter_mut().for_each(|item| found |= walk(item, steps, change)),
            _ => {}
        }
        return walk(value, rest, change) | found;
    }
    if rest.is_empty() {
        return change_children(value, step, change);
    }
    match (value, step) {
        (Value::Object(members), Step::Name(name)) => {
            members.get_mut(&**name).is_some_and(|member| walk(member, rest, change))
        }
        (Value::Array(items), Step::Index(index)) => {
            items.get_mut(*index).is_some_and(|item| walk(item, rest, change))
        }
        (Value::Object(members), Step::Every) => {
            members.values_mut().fold(false, |found, member| walk(member, rest, change) | found)
        }
        (Value::Array(items), Step::Every) => {
            items.iter_mut().fold(false, |found, item| walk(item, rest, change) | found)
        }
        _ => false,
    }
}

fn change_children(value: &mut Value, step: &Step, change: &dyn Fn(&Value) -> Option<Value>) -> bool {
    let mut found = false;
    match value {
        Value::Object(members) => members.retain(|name, member| {
            let meant = match step {
                Step::Name(wanted) => **wanted == **name,
                Step::Every => true,
                Step::Index(_) | Step::Deep => false,
            };
            if !meant {
                return true;
            }
            found = true;
            change(member).map(|changed| *member = changed).is_some()
        }),
        Value::Array(items) => {
            let mut index = 0;
            items.retain_mut(|item| {
                let meant = *step == Step::Every || *step == Step::Index(index);
                index += 1;
                if !meant {
                    return true;
                }
                found = true;
                change(item).map(|changed| *item = changed).is_some()
            });
        }
        _ => {}
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn places_are_changed_or_taken_out() {
        let document = || {
            json!({"password": "p", "a b": 1, "users": [
                {"token": "1", "card": {"no": "c", "token": "3"}}, {"token": "2"}, 7
            ]})
        };
        let x = || json!("x");
        let cases: [(&str, Option<Value>, &str, Value); 10] = [
            ("$.password", None, "", json!({"a b": 1, "users": document()["users"]})),
            ("$['a b']", Some(x()), "/a b", x()),
            (
                "$.users[*].token",
                Some(x()),
                "/users",
                json!([{"token": "x", "card": {"no": "c", "token": "3"}}, {"token": "x"}, 7]),
            ),
            ("$.users[1]", None, "/users/1", json!(7)),
            ("$..token", None, "/users", json!([{"card": {"no": "c"}}, {}, 7])),
            ("$.users[0].card.*", Some(x()), "/users/0/card", json!({"no": "x", "token": "x"})),
            ("$..['no']", Some(x()), "/users/0/card/no", x()),
            ("$", Some(x()), "", x()),
            ("$.nothing.here", Some(x()), "", document()),
            ("$.users.token", Some(x()), "", document()),
        ];
        for (path, instead, at, expected) in cases {
            let mut changed = document();
            let found = JsonPath::parse(path).unwrap().change(&mut changed, &|_| instead.clone());
            assert_eq!(changed.pointer(at), Some(&expected), "{path}: {changed}");
            assert_eq!(found, changed != document(), "{path}");
        }
    }

    #[test]
    fn what_is_no_place_is_no_path() {
        for text in ["", "a", "$a", "$.", "$..", "$.a[", "$.a[x]", "$.a[?(@.b)]", "$['a'", "$.a..", "$.a[-1]"]
        {
            assert_eq!(JsonPath::parse(text), None, "{text}");
        }
    }
}
