//! A configuration directory compiled without serving: for `postern explain --dir`.

use std::path::Path;
use std::sync::Arc;

use config::Graph;
use config::env::ProcessEnv;
use config::process::Process;
use layers::telemetry::metrics::Metrics;
use layers::worker::turns::Turns;

use crate::compile::{Compiler, Env};
use crate::explain::{self, Explanation, Question};
use crate::settings;

/// Explains a request against the files of `dir`.
///
/// # Errors
/// In words: the files that cannot be used, or what is wrong with the question.
pub fn explain(dir: &Path, question: &Question) -> Result<Explanation, String> {
    let lines = |errors: Vec<config::LocatedError>| {
        errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    let process = Process::load(dir, &ProcessEnv).map_err(lines)?;
    let (changes, errors) = config::apisix_yaml::read_directory(dir, &ProcessEnv);
    if !errors.is_empty() {
        tracing::warn!(errors = lines(errors), "left out");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime: {error}"))?;
    let _context = runtime.enter();
    let catalog = Arc::new(settings::catalog(&process));
    let mut graph = Graph::new();
    let changed = graph.replace_all(changes, &*catalog);
    let turns = Turns::default();
    let env = Env::new(&process, catalog, Arc::new(Metrics::default()), runtime.handle().clone(), &turns)
        .map_err(|bad| bad.to_string())?;
    let snapshot = Compiler::new(env).compile(&graph, changed);
    explain::explain(question, &settings::rules(&process), &snapshot)
}
