//! The pages about plugins, inside the binary: what differs from APISIX is told once, on the page, and read from there.

use std::collections::BTreeSet;

use include_dir::{Dir, include_dir};
use layers::plugin::Registration;
use serde_json::Value;

static PAGES: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/../docs/plugins");

const HEADING: &str = "## Differences from APISIX";

/// One way in which a plugin is not as in APISIX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// In words, as on the page.
    pub text: String,
    /// The attributes it is about. Without any it is about every use of the plugin.
    pub attributes: BTreeSet<String>,
}

impl Difference {
    /// Whether it is about a use of the plugin with these settings.
    pub fn concerns(&self, settings: &Value) -> bool {
        let set = |name: &String| has_member(settings, name);
        self.attributes.is_empty() || self.attributes.iter().any(set)
    }
}

fn has_member(value: &Value, name: &str) -> bool {
    match value {
        Value::Object(members) => {
            members.contains_key(name) || members.values().any(|member| has_member(member, name))
        }
        Value::Array(list) => list.iter().any(|item| has_member(item, name)),
        _ => false,
    }
}

/// The page of a plugin.
pub fn page(name: &str) -> Option<&'static str> {
    PAGES.get_file(format!("{name}.md"))?.contents_utf8()
}

/// In what a plugin is not as in APISIX.
pub fn differences(plugin: &Registration) -> Vec<Difference> {
    let names = attributes(&(plugin.schema)());
    let section = page(plugin.name).and_then(|text| text.split_once(HEADING));
    let section = section.map_or("", |(_, rest)| rest.split("\n## ").next().unwrap_or_default());
    let mut found: Vec<String> = Vec::new();
    for line in section.lines() {
        match (line.strip_prefix("- "), found.last_mut()) {
            (Some(first), _) => found.push(first.to_owned()),
            (None, Some(text)) if line.starts_with("  ") => {
                text.push(' ');
                text.push_str(line.trim());
            }
            _ => {}
        }
    }
    let difference = |text: String| {
        // What stands between backquotes: every second part.
        let words = text.split('`').skip(1).step_by(2);
        let attributes = words.filter(|word| names.contains(*word)).map(str::to_owned).collect();
        Difference { text, attributes }
    };
    found.into_iter().map(difference).collect()
}

/// The names of all attributes of a schema, nested ones among them.
fn attributes(schema: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    collect(schema, &mut names);
    names
}

fn collect(schema: &Value, names: &mut BTreeSet<String>) {
    match schema {
        Value::Object(members) => {
            if let Some(Value::Object(properties)) = members.get("properties") {
                names.extend(properties.keys().cloned());
            }
            members.values().for_each(|member| collect(member, names));
        }
        Value::Array(list) => list.iter().for_each(|item| collect(item, names)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::registrations;

    fn of(name: &str) -> Vec<Difference> {
        differences(registrations().iter().find(|plugin| plugin.name == name).unwrap())
    }

    #[test]
    fn every_plugin_has_its_page_inside() {
        for plugin in registrations() {
            assert!(page(plugin.name).is_some_and(|text| text.contains(HEADING)), "{}", plugin.name);
        }
    }

    #[test]
    fn a_difference_counts_for_settings_that_it_is_about() {
        let found = of("redirect");
        let encode = found.iter().find(|difference| difference.attributes.contains("encode_uri")).unwrap();
        assert!(encode.text.starts_with("Spaces") && encode.text.ends_with('.'), "{}", encode.text);
        assert!(encode.concerns(&json!({"uri": "/", "encode_uri": true})));
        assert!(!encode.concerns(&json!({"uri": "/"})));
    }
}
