//! The parts of the documentation that follow from the code: tables of settings, the index of plugins, the metrics.
//!
//! They stand between markers in pages that people write, so that a page cannot lag behind its plugin. `postern docs`
//! brings them up to date; a test says when somebody forgot to.

use std::fmt::Write;
use std::io;
use std::path::Path;

use layers::plugin::Registration;
use layers::telemetry::names;
use serde_json::{Map, Value};

use crate::{absent, pages, registrations};

const BEGIN: &str = "<!-- made by `postern docs`: begin -->";
const END: &str = "<!-- made by `postern docs`: end -->";
/// The page that lists all others.
const INDEX: &str = "README.md";
/// The page that lists the metrics, seen from the folder of the plugin pages.
const METRICS: &str = "../operations.md";

/// The tables of a plugin's settings: its own, those of consumers, those for the whole gateway.
pub fn attribute_table(registration: &Registration) -> String {
    let extras = (registration.extras)();
    let mut out = table(&(registration.schema)());
    if let Some(schema) = extras.consumer_schema() {
        let _ = write!(out, "\nOn a consumer or credential:\n\n{}", table(&schema));
    }
    if let Some(schema) = extras.metadata_schema() {
        let name = registration.name;
        let _ = write!(out, "\nFor the whole gateway (`plugin_metadata/{name}`):\n\n{}", table(&schema));
    }
    out
}

/// Brings the pages in `folder` up to date.
///
/// # Errors
/// A page is missing, has no markers, or cannot be written.
pub fn write(folder: &Path) -> io::Result<()> {
    for (name, text) in pages(folder)? {
        std::fs::write(folder.join(&name), text)?;
    }
    Ok(())
}

/// Every page as it should be, by file name.
fn pages(folder: &Path) -> io::Result<Vec<(String, String)>> {
    let mut pages = Vec::new();
    let mut purposes = Vec::new();
    for registration in registrations() {
        let name = format!("{}.md", registration.name);
        let text = read(folder, &name)?;
        purposes.push((registration, purpose(&text)));
        pages.push((name.clone(), replaced(&text, &attribute_table(registration), &name)?));
    }
    let text = read(folder, INDEX)?;
    pages.push((INDEX.to_owned(), replaced(&text, &index(&purposes), INDEX)?));
    let text = read(folder, METRICS)?;
    pages.push((METRICS.to_owned(), replaced(&text, &metrics(), METRICS)?));
    Ok(pages)
}

fn read(folder: &Path, name: &str) -> io::Result<String> {
    std::fs::read_to_string(folder.join(name))
        .map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
}

/// `text` with something else between its markers.
fn replaced(text: &str, made: &str, name: &str) -> io::Result<String> {
    let parts = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = parts.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{name}: the lines `{BEGIN}` and `{END}` are missing"),
        )
    })?;
    Ok(format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", made.trim_end()))
}

/// The first paragraph of a page.
fn purpose(text: &str) -> String {
    let lines = text.lines().skip_while(|line| line.is_empty() || line.starts_with('#'));
    lines.take_while(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Every plugin of APISIX, and those that only this gateway has: what becomes of it here.
fn index(purposes: &[(&Registration, String)]) -> String {
    let mut out = String::from("| plugin | priority | state | what it does |\n|---|---|---|---|\n");
    for (plugin, purpose) in purposes {
        let Registration { name, priority, .. } = plugin;
        let state = match pages::differences(plugin).len() {
            _ if absent::OURS.contains(name) => "ours".to_owned(),
            0 => "served".to_owned(),
            count => format!("served, [differs](%PAGE%#differences-from-apisix) ({count})"),
        };
        let state = state.replace("%PAGE%", &format!("{name}.md"));
        let _ = writeln!(out, "| [{name}]({name}.md) | {priority} | {state} | {purpose} |");
    }
    out.push_str(
        "\nPlugins of APISIX that are not here:\n\n| plugin | state | instead, or why not |\n|---|---|---|\n",
    );
    let mut rows: Vec<(&str, &str, &str)> = Vec::new();
    rows.extend(absent::HARMLESS.iter().map(|(name, why)| (*name, "taken and left out", *why)));
    rows.extend(absent::REPLACED.iter().map(|(name, by)| (*name, "replaced", *by)));
    rows.extend(absent::NOT_PLANNED.iter().map(|(name, why)| (*name, "not planned", *why)));
    rows.sort_unstable();
    for (name, state, why) in rows {
        let _ = writeln!(out, "| {name} | {state} | {why} |");
    }
    out
}

fn metrics() -> String {
    let mut out = String::from("| metric | kind | meaning |\n|---|---|---|\n");
    let apisix = names::APISIX.iter().map(|metric| ("apisix_", metric));
    for (prefix, metric) in apisix.chain(names::POSTERN.iter().map(|metric| ("", metric))) {
        let _ = writeln!(out, "| `{prefix}{}` | {} | {} |", metric.name, metric.kind.as_str(), metric.help);
    }
    out
}

fn table(schema: &Value) -> String {
    let mut rows = String::from("| name | type | default | values | meaning |\n|---|---|---|---|---|\n");
    members(&mut rows, "", schema, 0);
    rows
}

/// Settings nested deeper belong to an object with a page of its own.
const DEPTH: usize = 2;

/// The rows of an object's members.
fn members(rows: &mut String, prefix: &str, schema: &Value, depth: usize) {
    let Some(Value::Object(properties)) = schema.get("properties") else { return };
    let required = schema.get("required").and_then(Value::as_array);
    for (name, member) in properties {
        let needed = required.is_some_and(|required| required.iter().any(|other| other == name));
        let path = format!("{prefix}{name}");
        row(rows, &path, member, needed);
        if depth < DEPTH && name != "upstream" {
            let (of, step) = inner(member);
            members(rows, &format!("{path}{step}."), of, depth + 1);
        }
    }
}

/// The object inside a list or a choice, and how it is told in a path.
fn inner(schema: &Value) -> (&Value, &'static str) {
    if let Some(items) = schema.get("items") {
        return (items, "[]");
    }
    let has_members = |form: &&Value| form.get("properties").is_some();
    let form = schema.get("anyOf").and_then(Value::as_array).and_then(|forms| forms.iter().find(has_members));
    (form.unwrap_or(schema), "")
}

fn row(rows: &mut String, path: &str, schema: &Value, required: bool) {
    let default = match schema.get("default") {
        Some(default) => format!("`{}`", cell(&default.to_string())),
        None if required => "required".to_owned(),
        None => String::new(),
    };
    let meaning = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    let meaning = cell(&meaning.replace("\n- ", "<br>- ").replace('\n', " "));
    let secret = if schema.get("x-encrypted").is_some() { " Secret." } else { "" };
    let values = cell(&values(schema));
    let _ = writeln!(rows, "| `{path}` | {} | {default} | {values} | {meaning}{secret} |", kind(schema));
}

/// Text that does not end a cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn kind(schema: &Value) -> String {
    let of = |schema: &Value| match schema.get("type") {
        Some(Value::String(name)) => name.clone(),
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or "),
        _ => String::new(),
    };
    let mut kinds = vec![of(schema)];
    if let Some(Value::Array(forms)) = schema.get("anyOf") {
        kinds = forms.iter().map(of).collect();
    }
    kinds.retain(|kind| !kind.is_empty());
    kinds.dedup();
    match (kinds.join(" or ").as_str(), schema.get("items")) {
        ("array", Some(items)) if !kind(items).is_empty() => format!("array of {}", kind(items)),
        ("", _) => "any".to_owned(),
        (kind, _) => kind.to_owned(),
    }
}

/// What may be written, where the type does not say it.
fn values(schema: &Value) -> String {
    if let Some(Value::Array(options)) = schema.get("enum") {
        return options.iter().map(|option| format!("`{}`", plain(option))).collect::<Vec<_>>().join(", ");
    }
    let Some(object) = schema.as_object() else { return String::new() };
    let mut told = Vec::new();
    let bounds = [
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " elements"),
    ];
    told.extend(bounds.into_iter().filter_map(|(low, high, unit)| range(object, low, high, unit)));
    if let Some(low) = object.get("exclusiveMinimum") {
        told.push(format!("more than {low}"));
    }
    if object.get("uniqueItems") == Some(&Value::Bool(true)) {
        told.push("no element twice".to_owned());
    }
    if let Some(pattern) = object.get("pattern").and_then(Value::as_str) {
        told.push(format!("`{pattern}`"));
    }
    if let Some(items) = object.get("items") {
        let items = values(items);
        told.extend((!items.is_empty()).then(|| format!("each {items}")));
    }
    told.join("; ")
}

fn range(object: &Map<String, Value>, low: &str, high: &str, unit: &str) -> Option<String> {
    match (object.get(low), object.get(high)) {
        (Some(low), Some(high)) => Some(format!("{low} to {high}{unit}")),
        (Some(low), None) => Some(format!("from {low}{unit}")),
        (None, Some(high)) => Some(format!("up to {high}{unit}")),
        (None, None) => None,
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/plugins")
    }

    #[test]
    fn the_pages_are_up_to_date() {
        for (name, text) in pages(&folder()).unwrap() {
            assert!(read(&folder(), &name).unwrap() == text, "docs/plugins/{name} is old: run `make docs`");
        }
    }

    #[test]
    fn every_page_has_a_purpose_and_an_example() {
        for registration in registrations() {
            let text = read(&folder(), &format!("{}.md", registration.name)).unwrap();
            assert!(text.starts_with(&format!("# {}\n\n", registration.name)), "{}", registration.name);
            assert!(
                purpose(&text).ends_with('.'),
                "{}: the first paragraph is a sentence",
                registration.name
            );
            assert!(text.contains("curl "), "{} has no example", registration.name);
            assert!(text.contains("## Differences from APISIX"), "{}", registration.name);
        }
    }

    #[test]
    fn a_table_tells_type_default_values_and_meaning() {
        let registration = registrations().iter().find(|r| r.name == "limit-count").unwrap();
        let table = attribute_table(registration);
        for row in [
            "| `rejected_code` | integer | `503` | 200 to 599 | The status of a refusal. |",
            "| `rules[].key` | string | required |",
            "| `window_type` | string | `\"fixed\"` | `fixed`, `sliding` | How time is cut.<br>- `fixed`:",
            "| `count` | integer or string |  | more than 0 |",
            "(`plugin_metadata/limit-count`)",
        ] {
            assert!(table.contains(row), "{row}\n{table}");
        }
    }
}
