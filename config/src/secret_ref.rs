//! References to secrets inside objects: `$env://NAME`, `$ENV://NAME/sub`, `$secret://vault/1/path/key`.
//!
//! They are replaced before an object is checked, so checks and whoever uses the object see the secret, while
//! [`Literals`] remember what was written for whoever shows or stores it. A reference that cannot be replaced
//! refuses the object: running with the reference as the secret would let in whoever knows the configuration.

use std::borrow::Cow;

use serde_json::Value;

use crate::env::Env;
use crate::error::{ConfigError, ErrorKind, escape};

/// The references of one object by their pointers, for writing them back. One pointer wide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Literals(
    #[expect(clippy::box_collection, reason = "almost always absent")] Option<Box<Vec<Literal>>>,
);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Literal {
    pointer: Box<str>,
    text: Box<str>,
}

impl Literals {
    /// Whether the object refers to no secret.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The pointers of the fields that hold a reference.
    pub fn pointers(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|literals| literals.iter()).map(|literal| &*literal.pointer)
    }

    /// The references, as they were written.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|literals| literals.iter()).map(|literal| &*literal.text)
    }

    /// Put the references back into `value` in place of the secrets.
    pub fn restore(&self, value: &mut Value) {
        for literal in self.0.iter().flat_map(|literals| literals.iter()) {
            if let Some(place) = value.pointer_mut(&literal.pointer) {
                *place = Value::String(literal.text.to_string());
            }
        }
    }

    fn push(&mut self, pointer: &str, text: &str) {
        self.0.get_or_insert_default().push(Literal { pointer: pointer.into(), text: text.into() });
    }
}

/// Replace every reference inside `value`. Without any the value is borrowed as it is.
///
/// # Errors
/// One error for each reference that cannot be replaced.
pub fn resolve<'a>(value: &'a Value, env: &dyn Env) -> Result<(Cow<'a, Value>, Literals), Vec<ConfigError>> {
    let (resolved, literals, errors) = resolve_all(value, env);
    if errors.is_empty() { Ok((resolved, literals)) } else { Err(errors) }
}

/// As [`resolve`]; references that cannot be replaced are left as they are beside their errors.
pub(crate) fn resolve_all<'a>(
    value: &'a Value,
    env: &dyn Env,
) -> (Cow<'a, Value>, Literals, Vec<ConfigError>) {
    let (mut literals, mut errors) = (Literals::default(), Vec::new());
    if !has_reference(value) {
        return (Cow::Borrowed(value), literals, errors);
    }
    let mut resolved = value.clone();
    replace(&mut resolved, &mut String::new(), env, &mut literals, &mut errors);
    (Cow::Owned(resolved), literals, errors)
}

fn has_reference(value: &Value) -> bool {
    match value {
        Value::String(text) => Reference::parse(text).is_some(),
        Value::Array(list) => list.iter().any(has_reference),
        Value::Object(map) => map.values().any(has_reference),
        _ => false,
    }
}

fn replace(
    value: &mut Value,
    pointer: &mut String,
    env: &dyn Env,
    literals: &mut Literals,
    errors: &mut Vec<ConfigError>,
) {
    let depth = pointer.len();
    match value {
        Value::String(text) => {
            let Some(reference) = Reference::parse(text) else { return };
            match reference.look_up(env) {
                Ok(secret) => {
                    literals.push(pointer, text);
                    *text = secret;
                }
                Err(reason) => {
                    let kind = ErrorKind::UnresolvedSecret { reference: text.clone(), reason };
                    errors.push(ConfigError::new(pointer.as_str(), kind));
                }
            }
        }
        Value::Array(list) => {
            for (index, item) in list.iter_mut().enumerate() {
                pointer.push('/');
                pointer.push_str(&index.to_string());
                replace(item, pointer, env, literals, errors);
                pointer.truncate(depth);
            }
        }
        Value::Object(map) => {
            for (name, item) in map.iter_mut() {
                pointer.push('/');
                pointer.push_str(&escape(name));
                replace(item, pointer, env, literals, errors);
                pointer.truncate(depth);
            }
        }
        _ => {}
    }
}

enum Reference<'a> {
    /// The name of a variable, and the member of the JSON object in it.
    Env { name: &'a str, member: Option<&'a str> },
    /// A path in a secret manager.
    Manager { path: &'a str },
}

/// The path in a secret manager that `text` refers to, if it does.
#[must_use]
pub fn manager_path(text: &str) -> Option<&str> {
    text.strip_prefix("$secret://")
}

/// The paths in secret managers that are referred to anywhere in `value`.
pub fn manager_paths<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => found.extend(manager_path(text)),
        Value::Array(list) => list.iter().for_each(|item| manager_paths(item, found)),
        Value::Object(map) => map.values().for_each(|item| manager_paths(item, found)),
        _ => {}
    }
}

impl Reference<'_> {
    fn parse(text: &str) -> Option<Reference<'_>> {
        // Every string of a configuration comes by here: one look decides.
        let rest = text.strip_prefix('$')?;
        if let Some(path) = rest.strip_prefix("secret://") {
            return Some(Reference::Manager { path });
        }
        let path = rest.strip_prefix("env://").or_else(|| rest.strip_prefix("ENV://"))?;
        match path.split_once('/') {
            Some((name, member)) => Some(Reference::Env { name, member: Some(member) }),
            None => Some(Reference::Env { name: path, member: None }),
        }
    }

    fn look_up(&self, env: &dyn Env) -> Result<String, String> {
        let (name, member) = match self {
            Reference::Env { name, member } => (*name, *member),
            Reference::Manager { path } => return env.secret(path),
        };
        // `env::var` panics on neither of these, but no variable has such a name.
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err("this is not the name of a variable: write `$env://NAME`".to_owned());
        }
        let Some(content) = env.var(name) else {
            return Err(format!("the environment variable {name} is not set: set it and start again"));
        };
        let Some(member) = member else { return Ok(content) };
        let parsed: Value = serde_json::from_str(&content)
            .map_err(|_| format!("the environment variable {name} does not hold a JSON object"))?;
        let found = member.split('/').try_fold(&parsed, |value, key| value.get(key));
        match found {
            Some(Value::String(secret)) => Ok(secret.clone()),
            Some(_) => Err(format!("`{member}` in the environment variable {name} is not text")),
            None => Err(format!("the environment variable {name} has no member `{member}`")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn env() -> BTreeMap<String, String> {
        let json = r#"{"a": "one", "deep": {"b": "two"}, "n": 1}"#;
        [("KEY", "s3cret"), ("JSON", json)].map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    #[test]
    fn references_are_replaced_wherever_they_stand() {
        for (written, secret) in [
            ("$env://KEY", "s3cret"),
            ("$ENV://KEY", "s3cret"),
            ("$ENV://JSON/a", "one"),
            ("$env://JSON/deep/b", "two"),
            ("$Env://KEY", "$Env://KEY"),
            ("env://KEY", "env://KEY"),
            ("x$env://KEY", "x$env://KEY"),
        ] {
            let value = json!({"a/b": [{"key": written}]});
            let (resolved, literals) = resolve(&value, &env()).unwrap();
            assert_eq!(*resolved, json!({"a/b": [{"key": secret}]}), "{written}");
            let mut shown = resolved.into_owned();
            literals.restore(&mut shown);
            assert_eq!(shown, value, "{written}");
        }
    }

    #[test]
    fn a_reference_that_cannot_be_replaced_is_an_error_at_its_place() {
        for (written, reason) in [
            ("$env://MISSING", "MISSING is not set"),
            ("$env://", "not the name of a variable"),
            ("$env://A=B", "not the name of a variable"),
            ("$ENV://KEY/sub", "does not hold a JSON object"),
            ("$ENV://JSON/nothing", "has no member `nothing`"),
            ("$ENV://JSON/n", "is not text"),
            ("$secret://vault/1/jack/key", "asked by a running gateway only"),
        ] {
            let value = json!({"plugins": {"key-auth": {"key": written}}});
            let errors = resolve(&value, &env()).unwrap_err();
            let [error] = errors.as_slice() else { unreachable!("{errors:?}") };
            assert_eq!(error.pointer, "/plugins/key-auth/key");
            assert!(error.to_string().contains(reason), "{error}");
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn references_to_secret_managers_are_found() {
        let value = json!({"a": ["$secret://vault/1/b/c", "$env://KEY"], "d": {"e": "$secret://aws/2/f"}});
        let mut found = Vec::new();
        manager_paths(&value, &mut found);
        assert_eq!(found, ["vault/1/b/c", "aws/2/f"]);
    }

    #[test]
    fn a_value_without_references_is_not_copied() {
        let value = json!({"uri": "/a", "list": ["$", "$arg_x"]});
        let (resolved, literals) = resolve(&value, &env()).unwrap();
        assert!(matches!(resolved, Cow::Borrowed(_)));
        assert!(literals.is_empty());
    }
}
