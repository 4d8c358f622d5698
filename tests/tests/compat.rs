//! Runs every case of `tests/compat`: what APISIX does with a configuration and a request, Postern does.

use std::path::Path;
use std::sync::Arc;

use e2e::Edge;
use e2e::compat::{Case, check, check_logs, read_folder};
use e2e::origin::{Origin, echo};
use e2e::sink::Sinks;
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
    let sinks = Sinks::start().await;
    let text = format!("{}\n#END\n", sinks.fill(&fill(&case.resources, &origins)));
    let mut builder = Edge::file().text(&text);
    if let Some(process) = &case.process {
        builder = builder.config(process.clone());
    }
    let edge = builder.start().await;
    let mut failures = Vec::new();
    for (index, step) in case.steps.iter().enumerate() {
        let mut step = step.clone();
        step.request = fill(&step.request, &origins);
        for failure in check(edge.http, &step).await {
            failures.push(format!("request {}: {failure}", index + 1));
        }
        for failure in check_logs(&sinks, &step).await {
            failures.push(format!("request {}: {failure}", index + 1));
        }
    }
    failures
}

/// `@one@` and `@two@` are the nodes of the origins.
fn fill(text: &str, origins: &[Origin; 2]) -> String {
    text.replace("@one@", &origins[0].node()).replace("@two@", &origins[1].node())
}
