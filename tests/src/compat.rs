//! Cases as text: a configuration, requests, and what must come of them; read here and held against a gateway.
//!
//! The format is told in `tests/compat/README.md`. Text only, so that a case can be written by somebody who
//! knows APISIX and no Rust.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use regex::Regex;
use serde_json::Value;

use crate::client::{Answer, Raw};
use crate::eventually::PATIENCE;
use crate::sink::Sinks;

/// One configuration with its requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Case {
    /// `file.txt:line`
    pub place: String,
    pub name: String,
    /// A patch for `config.yaml`, as JSON.
    pub process: Option<Value>,
    /// The text of `apisix.yaml`, with placeholders.
    pub resources: String,
    pub steps: Vec<Step>,
}

/// One request and what must come of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Request line and header lines.
    pub request: String,
    pub request_body: String,
    /// Status line and header rules of the answer.
    pub answer: Vec<Rule>,
    pub body: Option<Match>,
    /// Request line and header rules of what the origin got.
    pub upstream: Vec<Rule>,
    pub upstream_body: Option<Match>,
    /// Patterns that must be found, in time, in what has arrived at a place for logs, by its name.
    pub logged: Vec<(String, Vec<String>)>,
}

/// A rule about one line of a head.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// The status code, or the request line.
    First(String),
    /// A header with exactly this value.
    Header(String, String),
    /// A header with a value that matches the pattern.
    Like(String, String),
    /// No such header.
    Absent(String),
}

/// How a body is compared.
#[derive(Clone, Debug, PartialEq)]
pub enum Match {
    Exact(String),
    Contains(String),
    Like(String),
    Json(Value),
}

/// Every case of every file in `folder`, files in alphabetical order.
pub fn read_folder(folder: &Path) -> Vec<Case> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    files.sort();
    files
        .iter()
        .flat_map(|path| {
            let name = path.file_name().expect("a file name").to_string_lossy().into_owned();
            let text = std::fs::read_to_string(path).expect("a readable case file");
            let cases = parse(&name, &text);
            assert!(!cases.is_empty(), "{name} has no case");
            cases
        })
        .collect()
}

/// The cases of one file; panics with `file:line` where the text is not understood.
pub fn parse(file: &str, text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut sections: Vec<(usize, String, String)> = Vec::new();
    let finish = |case: Option<&mut Case>, sections: &mut Vec<(usize, String, String)>| {
        if let Some(case) = case {
            for (line, head, body) in sections.drain(..) {
                section(case, &format!("{file}:{line}"), &head, &body);
            }
            assert!(!case.steps.is_empty(), "{}: no request", case.place);
        }
    };
    for (index, line) in text.lines().enumerate() {
        let place = index + 1;
        if let Some(name) = line.strip_prefix("=== ") {
            finish(cases.last_mut(), &mut sections);
            cases.push(Case {
                place: format!("{file}:{place}"),
                name: name.trim().to_owned(),
                ..Case::default()
            });
        } else if let Some(head) = line.strip_prefix("--- ") {
            assert!(!cases.is_empty(), "{file}:{place}: a section before the first `===`");
            sections.push((place, head.trim().to_owned(), String::new()));
        } else if let Some((_, _, body)) = sections.last_mut() {
            body.push_str(line);
            body.push('\n');
        } else {
            let ignorable = line.trim().is_empty() || line.starts_with('#');
            assert!(ignorable, "{file}:{place}: text outside a section: {line}");
        }
    }
    finish(cases.last_mut(), &mut sections);
    cases
}

fn section(case: &mut Case, place: &str, head: &str, body: &str) {
    let text = body.trim_end_matches('\n').to_owned();
    let json = |text: &str| -> Value {
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{place}: {error}"))
    };
    match head {
        "config.yaml" => {
            case.process = Some(json(&text));
            return;
        }
        "config" => {
            case.resources = body.to_owned();
            return;
        }
        "request" => {
            let (request, request_body) = text.split_once("\n\n").unwrap_or((&text, ""));
            let request_body = request_body.to_owned();
            case.steps.push(Step { request: request.to_owned(), request_body, ..Step::default() });
            return;
        }
        _ => {}
    }
    let step = case.steps.last_mut().unwrap_or_else(|| panic!("{place}: `{head}` before a request"));
    match head {
        "answer" => step.answer = rules(place, &text),
        "upstream" => step.upstream = rules(place, &text),
        "body" => step.body = Some(Match::Exact(text)),
        "body contains" => step.body = Some(Match::Contains(text)),
        "body like" => step.body = Some(Match::Like(text)),
        "body json" => step.body = Some(Match::Json(json(&text))),
        "upstream body" => step.upstream_body = Some(Match::Exact(text)),
        "upstream body json" => step.upstream_body = Some(Match::Json(json(&text))),
        _ => match head.strip_prefix("logged ") {
            Some(sink) => {
                let patterns = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned);
                step.logged.push((sink.to_owned(), patterns.collect()));
            }
            None => panic!("{place}: no such section: {head}"),
        },
    }
}

fn rules(place: &str, text: &str) -> Vec<Rule> {
    let mut rules = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let field = |line: &str| -> (String, String) {
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("{place}: no header: {line}"));
            (name.trim().to_ascii_lowercase(), value.trim().to_owned())
        };
        rules.push(if rules.is_empty() {
            Rule::First(line.trim().to_owned())
        } else if let Some(name) = line.strip_prefix('!') {
            Rule::Absent(name.trim().to_ascii_lowercase())
        } else if let Some(line) = line.strip_prefix('~') {
            let (name, pattern) = field(line);
            Rule::Like(name, pattern)
        } else {
            let (name, value) = field(line);
            Rule::Header(name, value)
        });
    }
    rules
}

/// Makes one request on a connection of its own and tells everything that is not as the step says.
pub async fn check(addr: SocketAddr, step: &Step) -> Vec<String> {
    let mut raw = Raw::connect(addr).await;
    raw.write(wire(step)).await;
    let answer = match raw.answer().await {
        Ok(answer) => answer,
        Err(end) => return vec![format!("no answer: {end:?}")],
    };
    let mut failures = Vec::new();
    let header =
        |name: &str| -> Vec<String> { answer.header_values(name).into_iter().map(str::to_owned).collect() };
    head(&step.answer, "the answer", &answer.status.to_string(), header, &mut failures);
    if let Some(expected) = &step.body {
        body(expected, "the body", &answer.text(), &mut failures);
    }
    if !step.upstream.is_empty() || step.upstream_body.is_some() {
        upstream(step, &answer, &mut failures);
    }
    if !failures.is_empty() {
        failures.push(format!("got {} {:?} {}", answer.status, answer.headers, answer.text()));
    }
    failures
}

/// Waits until everything was logged that the step asks for, and tells what was not.
pub async fn check_logs(sinks: &Sinks, step: &Step) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    let mut failures = Vec::new();
    for (sink, patterns) in &step.logged {
        for pattern in patterns {
            let wanted = Regex::new(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}"));
            let found = loop {
                let arrived = sinks.arrived(sink);
                if wanted.is_match(&arrived) {
                    break None;
                }
                if Instant::now() >= deadline {
                    break Some(arrived);
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            };
            failures.extend(found.map(|arrived| format!("{sink} got {arrived:?}, nothing like {pattern}")));
        }
    }
    failures
}

/// What the origin says it got.
fn upstream(step: &Step, answer: &Answer, failures: &mut Vec<String>) {
    let Ok(seen) = serde_json::from_slice::<Value>(&answer.body) else {
        failures.push("the answer is not that of the origin".to_owned());
        return;
    };
    let text = |name: &str| seen[name].as_str().unwrap_or_default().to_owned();
    let query = seen["query"].as_str().map(|query| format!("?{query}")).unwrap_or_default();
    let line = format!("{} {}{query}", text("method"), text("path"));
    let header = |name: &str| -> Vec<String> {
        let values = seen["headers"][name].as_array().cloned().unwrap_or_default();
        values.iter().filter_map(|value| value.as_str().map(str::to_owned)).collect()
    };
    head(&step.upstream, "the origin", &line, header, failures);
    if let Some(expected) = &step.upstream_body {
        body(expected, "the body at the origin", &text("body"), failures);
    }
}

fn wire(step: &Step) -> String {
    let mut lines: Vec<String> = step.request.lines().map(str::to_owned).collect();
    let has = |lines: &[String], name: &str| {
        lines.iter().any(|line| line.split(':').next().is_some_and(|field| field.eq_ignore_ascii_case(name)))
    };
    if !has(&lines, "host") {
        lines.insert(1, "Host: localhost".to_owned());
    }
    if !step.request_body.is_empty() && !has(&lines, "transfer-encoding") {
        lines.push(format!("Content-Length: {}", step.request_body.len()));
    }
    format!("{}\r\n\r\n{}", lines.join("\r\n"), step.request_body)
}

fn head(
    rules: &[Rule],
    what: &str,
    first: &str,
    header: impl Fn(&str) -> Vec<String>,
    failures: &mut Vec<String>,
) {
    for rule in rules {
        match rule {
            Rule::First(expected) if expected != first => {
                failures.push(format!("{what} is {first:?}, not {expected:?}"));
            }
            Rule::Header(name, value) if !header(name).contains(value) => {
                failures.push(format!("{what} has {name}: {:?}, not {value:?}", header(name)));
            }
            Rule::Like(name, pattern) => {
                let pattern_of = Regex::new(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}"));
                if !header(name).iter().any(|value| pattern_of.is_match(value)) {
                    failures.push(format!("{what} has {name}: {:?}, not like {pattern}", header(name)));
                }
            }
            Rule::Absent(name) if !header(name).is_empty() => {
                failures.push(format!("{what} has {name}: {:?}", header(name)));
            }
            _ => {}
        }
    }
}

fn body(expected: &Match, what: &str, actual: &str, failures: &mut Vec<String>) {
    let holds = match expected {
        Match::Exact(text) => actual.trim_end_matches('\n') == text,
        Match::Contains(text) => actual.contains(text.as_str()),
        Match::Like(pattern) => {
            Regex::new(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}")).is_match(actual)
        }
        Match::Json(value) => serde_json::from_str::<Value>(actual).is_ok_and(|actual| actual == *value),
    };
    if !holds {
        failures.push(format!("{what} is {actual:?}, not {expected:?}"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_case_is_read_in_all_its_parts() {
        let text = "# a comment\n\n\
            === first case\n--- config\nroutes:\n  - uri: /a\n--- request\nPOST /a HTTP/1.1\nX-A: b\n\nhello\n\
            --- answer\n200\nX-Out: yes\n!X-Not\n~Date: GMT$\n--- body json\n{\"a\": 1}\n\
            --- upstream\nPOST /b\nX-A: b\n=== second\n--- request\nGET / HTTP/1.1\n--- answer\n404\n";
        let cases = parse("t.txt", text);
        assert_eq!(cases.len(), 2);
        let first = &cases[0];
        assert_eq!((first.place.as_str(), first.name.as_str()), ("t.txt:3", "first case"));
        assert_eq!(first.resources, "routes:\n  - uri: /a\n");
        let step = &first.steps[0];
        assert_eq!(
            (step.request.as_str(), step.request_body.as_str()),
            ("POST /a HTTP/1.1\nX-A: b", "hello")
        );
        assert_eq!(
            step.answer,
            [
                Rule::First("200".into()),
                Rule::Header("x-out".into(), "yes".into()),
                Rule::Absent("x-not".into()),
                Rule::Like("date".into(), "GMT$".into()),
            ]
        );
        assert_eq!(step.body, Some(Match::Json(json!({"a": 1}))));
        assert_eq!(step.upstream[0], Rule::First("POST /b".into()));
    }

    #[test]
    #[should_panic(expected = "t.txt:2: `answer` before a request")]
    fn an_answer_without_a_request_is_refused() {
        parse("t.txt", "=== a\n--- answer\n200\n");
    }
}
