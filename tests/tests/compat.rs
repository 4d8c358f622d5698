//! Runs every case of `tests/compat`: what APISIX does with a configuration and a request, Postern does.

use std::path::Path;
use std::sync::Arc;

use e2e::client::Raw;
use e2e::compat::{Case, Match, Rule, Step, read_folder};
use e2e::origin::{Origin, echo};
use e2e::{Answer, Edge, Value};
use regex::Regex;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_holds() {
    let cases = read_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("compat"));
    // COMPAT=text runs only the cases whose place or name contains it.
    let chosen = std::env::var("COMPAT").unwrap_or_default();
    let cases: Vec<Case> = cases
        .into_iter()
        .filter(|case| case.place.contains(&chosen) || case.name.contains(&chosen))
        .collect();
    assert!(!cases.is_empty(), "no case is named {chosen:?}");
    let count = cases.len();
    let room = Arc::new(Semaphore::new(4));
    let mut running = JoinSet::new();
    for case in cases {
        let room = Arc::clone(&room);
        running.spawn(async move {
            let _permit = room.acquire_owned().await;
            let failures = run(&case).await;
            (case, failures)
        });
    }
    let mut failed = Vec::new();
    while let Some(done) = running.join_next().await {
        let (case, failures) = done.expect("a case does not panic; see the output of its gateway above");
        if !failures.is_empty() {
            failed.push(format!("{} {}\n    {}", case.place, case.name, failures.join("\n    ")));
        }
    }
    failed.sort();
    assert!(failed.is_empty(), "{} of {count} cases failed:\n{}", failed.len(), failed.join("\n"));
}

async fn run(case: &Case) -> Vec<String> {
    let origins = [echo::named("one").await, echo::named("two").await];
    let text = format!("{}\n#END\n", fill(&case.resources, &origins));
    let mut builder = Edge::file().text(&text);
    if let Some(process) = &case.process {
        builder = builder.config(process.clone());
    }
    let edge = builder.start().await;
    let mut failures = Vec::new();
    for (index, step) in case.steps.iter().enumerate() {
        let mut step = step.clone();
        step.request = fill(&step.request, &origins);
        for failure in check(&edge, &step).await {
            failures.push(format!("request {}: {failure}", index + 1));
        }
    }
    failures
}

/// `@one@` and `@two@` are the nodes of the origins.
fn fill(text: &str, origins: &[Origin; 2]) -> String {
    text.replace("@one@", &origins[0].node()).replace("@two@", &origins[1].node())
}

async fn check(edge: &Edge, step: &Step) -> Vec<String> {
    let mut raw = Raw::connect(edge.http).await;
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
