//! JSON values written as YAML, for clients that ask for it.
//!
//! Block style; texts are plain where no reader could take them for anything else, and JSON strings (which
//! YAML has too) everywhere else.

use std::fmt::Write;

use serde_json::Value;

/// `value` as one YAML document, without markers.
pub(super) fn to_string(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(members) if !members.is_empty() => write(&mut text, value, 0),
        Value::Array(elements) if !elements.is_empty() => write(&mut text, value, 0),
        other => {
            text.push_str(&scalar(other));
            text.push('\n');
        }
    }
    text
}

fn write(text: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                pad(text, indent);
                text.push_str(&string(name));
                text.push(':');
                below(text, member, indent + 2, false);
            }
        }
        Value::Array(elements) => {
            for element in elements {
                pad(text, indent);
                text.push('-');
                below(text, element, indent + 2, true);
            }
        }
        _ => {}
    }
}

/// What follows `name:` or `-`: on the same line, or below it.
fn below(text: &mut String, value: &Value, indent: usize, in_list: bool) {
    let is_empty = match value {
        Value::Object(members) => members.is_empty(),
        Value::Array(elements) => elements.is_empty(),
        _ => true,
    };
    if is_empty {
        let _ = writeln!(text, " {}", scalar(value));
    } else if in_list && value.is_object() {
        // The first member stands beside the dash.
        text.push(' ');
        let start = text.len();
        write(text, value, indent);
        text.replace_range(start..start + indent, "");
    } else {
        text.push('\n');
        write(text, value, indent);
    }
}

fn pad(text: &mut String, indent: usize) {
    for _ in 0..indent {
        text.push(' ');
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => string(text),
        other => other.to_string(),
    }
}

fn string(text: &str) -> String {
    let plain = text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '/')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '-' | '.' | '*'))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&text.to_ascii_lowercase().as_str());
    if plain { text.to_owned() } else { Value::String(text.to_owned()).to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use config::document::Document;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let value = json!({
            "routes": [
                {"id": "r1", "uri": "/r1", "vars": [["arg_a", "==", "1"], []], "plugins": {"key-auth": {}}, "n": null},
                {"id": "2", "desc": "two\nlines: and # more", "upstream": {"nodes": {"127.0.0.1:80": 1}, "x": 1.5}},
                "yes", "", "- a", true, ["a", {"b": "1e3"}]
            ],
            "routes_conf_version": 3,
            "empty": [],
        });
        let text = to_string(&value);
        assert!(text.contains("routes:\n  - id: r1\n    uri: /r1\n"), "{text}");
        assert_eq!(*Document::parse("x.yaml", &text).unwrap().value(), value, "{text}");
        assert_eq!(to_string(&json!({})), "{}\n");
    }
}
