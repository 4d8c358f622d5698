//! JSON to a settings type and back, with a pointer to what does not fit.
//!
//! Used for plugin settings and whatever else has a type and a schema of its own. The typed reading is the fast path;
//! only when it fails is the type's JSON Schema asked, which finds every error instead of the first.

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::document::{Document, LocatedError};
use crate::env::{self, Env, Typing};
use crate::error::{ConfigError, escape};
use crate::schema;
use crate::strict::Strict;

/// Reads `value` as a `T`.
///
/// # Errors
/// Everything that does not fit, by its pointer in `value`.
pub fn parse<T: DeserializeOwned + JsonSchema + 'static>(value: &Value) -> Result<T, Vec<ConfigError>> {
    let error = match serde_path_to_error::deserialize(Strict(value)) {
        Ok(typed) => return Ok(typed),
        Err(error) => error,
    };
    let mut errors = schema::errors::<T>(value);
    if errors.is_empty() {
        errors.push(ConfigError::invalid(pointer(error.path()), error.inner().to_string()));
    }
    Err(errors)
}

/// Reads a settings file: variables of the environment are put in, keys without a value are as good as absent, a file
/// with nothing in it is `empty`, and `check` says what the type does not.
///
/// # Errors
/// All that is wrong, in the order of the file.
pub(crate) fn settings<T: DeserializeOwned + JsonSchema + 'static>(
    document: &mut Document,
    env: &dyn Env,
    empty: Value,
    check: impl FnOnce(&mut T) -> Vec<ConfigError>,
) -> Result<T, Vec<LocatedError>> {
    env::substitute(document, env, Typing::Quotes)?;
    let mut value = document.value().clone();
    match &mut value {
        Value::Null => value = empty,
        Value::Object(members) => members.retain(|_, member| !member.is_null()),
        _ => {}
    }
    let checked = parse::<T>(&value).and_then(|mut read| {
        let errors = check(&mut read);
        if errors.is_empty() { Ok(read) } else { Err(errors) }
    });
    checked.map_err(|errors| {
        let mut errors: Vec<_> = errors.into_iter().map(|error| document.error(error)).collect();
        errors.sort_by_key(|error| (error.line, error.column));
        errors
    })
}

/// Writes `typed` as JSON, defaults filled in.
///
/// # Errors
/// The type has a map with keys that are not text; a defect of the type.
pub fn to_value<T: Serialize>(typed: &T) -> Result<Value, ConfigError> {
    serde_json::to_value(typed).map_err(|error| ConfigError::invalid("", error.to_string()))
}

/// The JSON Schema of `T`.
pub fn schema_of<T: JsonSchema>() -> Value {
    schema::of::<T>()
}

/// A path of serde as an RFC 6901 pointer.
pub(crate) fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .map(|segment| match segment {
            Segment::Seq { index } => format!("/{index}"),
            Segment::Map { key } => format!("/{}", escape(key)),
            Segment::Enum { variant } => format!("/{}", escape(variant)),
            Segment::Unknown => String::new(),
        })
        .collect()
}
