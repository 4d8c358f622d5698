//! The documents say what the code says: every reason and metric stands in its table, and every link leads somewhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use regex::Regex;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a pattern")
}

/// What the groups of a pattern match, in every place.
fn found<const N: usize>(pattern: &str, text: &str) -> BTreeSet<[String; N]> {
    regex(pattern).captures_iter(text).map(|found| found.extract().1.map(str::to_owned)).collect()
}

#[test]
fn every_reason_stands_in_the_table_with_its_status() {
    let code = read("layers/src/error.rs");
    let code =
        found::<4>(r#"(?m)^    \w+ "(\w+)" (\d{3}) (\w+) "(\w+)",$"#, &code).into_iter().map(|mut reason| {
            reason[2].make_ascii_lowercase();
            reason
        });
    let told = found(r"(?m)^\| `(\w+)` \| (\d{3}) \| (\w+) \| `(\w+)` \|", &read("docs/request.md"));
    assert_eq!(code.collect::<BTreeSet<_>>(), told);
}

#[test]
fn every_metric_stands_in_the_table_with_its_kind() {
    let code = read("layers/src/telemetry/names.rs");
    let code = found::<2>(r#"(?m)^    [A-Z_]+ (Counter|Gauge|Histogram) "(\w+)""#, &code);
    let code = code.into_iter().map(|[kind, name]| {
        let name = if name.starts_with("postern_") { name } else { format!("apisix_{name}") };
        [name, kind.to_lowercase()]
    });
    let told = found(r"(?m)^\| `(\w+)` \| (counter|gauge|histogram) \|", &read("docs/operations.md"));
    assert_eq!(code.collect::<BTreeSet<_>>(), told);
}

/// The pages, from the root.
fn pages() -> Vec<String> {
    let mut pages: Vec<String> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"]
            .map(str::to_owned)
            .to_vec();
    let mut folders = vec!["docs".to_owned(), "examples".to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(root().join(&folder)).expect("a folder") {
            let entry = entry.expect("an entry");
            let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                folders.push(path);
            } else if path.ends_with(".md") {
                pages.push(path);
            }
        }
    }
    pages
}

/// The name under which a heading can be linked to.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_leads_somewhere() {
    let links = regex(r"\]\(([^)\s]+)\)");
    let headings = regex(r"(?m)^#+ (.*)$");
    let mut dead = Vec::new();
    for page in pages() {
        let text = read(&page);
        for [link] in links.captures_iter(&text).map(|found| found.extract().1) {
            if link.contains("://") {
                continue;
            }
            let (path, place) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                root().join(&page)
            } else {
                root().join(&page).parent().expect("a folder").join(path)
            };
            let there = target.exists()
                && (place.is_empty() || {
                    let target = std::fs::read_to_string(&target).unwrap_or_default();
                    headings.captures_iter(&target).any(|found| anchor(&found[1]) == place)
                });
            if !there {
                dead.push(format!("{page}: {link}"));
            }
        }
    }
    assert!(dead.is_empty(), "{}", dead.join("\n"));
}
