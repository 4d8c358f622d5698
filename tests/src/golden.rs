//! Golden files: text pairs under `tests/golden`, compared as text and rewritten with `UPDATE_GOLDEN=1`.

use std::path::PathBuf;

use serde_json::Value;

/// Compares `actual` with `tests/golden/<name>`; with `UPDATE_GOLDEN=1` in the environment writes it instead.
#[track_caller]
pub fn assert_golden(name: &str, actual: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().expect("a golden file has a folder")).expect("the folder");
        std::fs::write(&path, actual).expect("the golden file can be written");
        return;
    }
    let expected = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; make it with UPDATE_GOLDEN=1", path.display()));
    if expected != actual {
        let line = expected.lines().zip(actual.lines()).position(|(want, got)| want != got);
        let line =
            line.map_or_else(|| expected.lines().count().min(actual.lines().count()) + 1, |index| index + 1);
        panic!("{} differs from line {line}\n--- expected\n{expected}\n--- actual\n{actual}", path.display());
    }
}

/// Replaces what changes from run to run (times and revisions) by their names, everywhere inside `value`.
pub fn without_times(value: &Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields
                .iter()
                .map(|(name, value)| {
                    let value = match name.as_str() {
                        "create_time" | "update_time" | "modifiedIndex" | "createdIndex"
                            if value.is_u64() =>
                        {
                            Value::String(format!("<{name}>"))
                        }
                        _ => without_times(value),
                    };
                    (name.clone(), value)
                })
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.iter().map(without_times).collect()),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_and_revisions_are_named() {
        let value = json!({"value": {"create_time": 5, "uri": "/a"}, "list": [{"modifiedIndex": 9}]});
        let expected = json!({"value": {"create_time": "<create_time>", "uri": "/a"},
                              "list": [{"modifiedIndex": "<modifiedIndex>"}]});
        assert_eq!(without_times(&value), expected);
    }
}
