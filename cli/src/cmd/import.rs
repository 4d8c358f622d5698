//! `postern import report`: how much of an APISIX configuration runs here as it runs there, object by object.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, Subcommand};
use config::check::{CheckedObject, Report};
use config::env::{Env, ProcessEnv};
use config::process::Process;
use config::{Kind, PluginCatalog};
use serde::Serialize;
use serde_json::{Value, json};

use crate::output::{self, Colour, Format, line, painted};

/// Arguments of `postern import`.
#[derive(Args)]
pub struct Import {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Class each object of a configuration directory as exact, approximated or refused.
    Report(ImportReport),
}

/// Arguments of `postern import report`.
#[derive(Args)]
#[command(
    after_help = "Nothing is started and nothing is changed.\n\n  exact         runs as in APISIX\n  approximated  \
                        runs, with the differences that are told\n  refused       does not run; the reason is told\n\n\
                        Exit codes: 0 nothing is refused, 1 something is."
)]
struct ImportReport {
    /// The directory of config.yaml and apisix.yaml, or its config.yaml.
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Text or JSON.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// How a part of a configuration runs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Class {
    Exact,
    Approximated,
    Refused,
}

/// An object, or a key of `config.yaml`, and its class.
#[derive(Debug, Serialize)]
struct Classed {
    class: Class,
    /// `routes/1`, or a pointer into `config.yaml`.
    object: String,
    file: String,
    line: u32,
    /// Why it is not exact, or what is done otherwise to the same effect.
    reasons: Vec<String>,
}

impl Import {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let What::Report(report) = self.what;
        report.run()
    }
}

impl ImportReport {
    fn run(self) -> Result<ExitCode> {
        anyhow::ensure!(
            self.dir.exists(),
            "{} does not exist: name the directory of config.yaml",
            self.dir.display()
        );
        let process = Process::load(&self.dir, &ProcessEnv).ok();
        let catalog = process.as_ref().map_or_else(plugins::Catalog::default, edge::settings::catalog);
        let env: Arc<dyn Env + Send + Sync> = Arc::new(ProcessEnv);
        let report = config::check_directory(&self.dir, &catalog, &env);
        let classed = classify(&report, &catalog);
        let count = |class| classed.iter().filter(|item| item.class == class).count();
        let (exact, approximated, refused) =
            (count(Class::Exact), count(Class::Approximated), count(Class::Refused));
        match self.output {
            Format::Json => output::json(&json!({
                "exact": exact,
                "approximated": approximated,
                "refused": refused,
                "items": classed,
            })),
            Format::Text => {
                for item in &classed {
                    let (word, colour) = match item.class {
                        Class::Exact => ("exact       ", Colour::Green),
                        Class::Approximated => ("approximated", Colour::Dim),
                        Class::Refused => ("refused     ", Colour::Red),
                    };
                    line(format_args!(
                        "{} {} ({}:{})",
                        painted(word, colour),
                        item.object,
                        item.file,
                        item.line
                    ));
                    for reason in &item.reasons {
                        line(format_args!("             - {reason}"));
                    }
                }
                line(format_args!(
                    "{}: {exact} exact, {approximated} approximated, {refused} refused",
                    self.dir.display()
                ));
            }
        }
        Ok(ExitCode::from(if refused == 0 { output::OK } else { output::FOUND }))
    }
}

/// Every object of the report with its class, the settings of `config.yaml` first.
fn classify(report: &Report, catalog: &plugins::Catalog) -> Vec<Classed> {
    let mut told: Vec<_> = report.objects.iter().flat_map(|object| object.errors.iter()).collect();
    let mut classed = Vec::new();
    for error in &report.errors {
        // What is wrong with an object is told with the object.
        if let Some(place) = told.iter().position(|other| *other == error) {
            told.swap_remove(place);
            continue;
        }
        classed.push(Classed {
            class: Class::Refused,
            object: error.error.pointer.clone(),
            file: error.file.to_string(),
            line: error.line,
            reasons: vec![error.error.kind.to_string()],
        });
    }
    let config = report.files.iter().find(|file| file.ends_with(config::process::CONFIG_FILE));
    for notice in &report.notices {
        classed.push(Classed {
            class: Class::Approximated,
            object: notice.pointer.clone(),
            file: config.map_or_else(String::new, |file| file.display().to_string()),
            line: notice.line,
            reasons: vec![notice.reason.to_owned()],
        });
    }
    let mut known = Differences::default();
    classed.extend(report.objects.iter().map(|object| classify_object(object, catalog, &mut known)));
    classed
}

/// The differences of plugins that were asked for.
#[derive(Default)]
struct Differences(BTreeMap<String, Vec<plugins::pages::Difference>>);

impl Differences {
    fn of(&mut self, name: &str) -> &[plugins::pages::Difference] {
        self.0.entry(name.to_owned()).or_insert_with(|| {
            let plugin = plugins::registrations().iter().find(|plugin| plugin.name == name);
            plugin.map(plugins::pages::differences).unwrap_or_default()
        })
    }
}

fn classify_object(object: &CheckedObject, catalog: &plugins::Catalog, known: &mut Differences) -> Classed {
    let mut reasons: Vec<String> = Vec::new();
    let mut class = Class::Exact;
    if object.errors.is_empty() {
        reasons.extend(differences(&object.value, known));
        if !reasons.is_empty() {
            class = Class::Approximated;
        }
        reasons.extend(left_out(&object.value, catalog));
        if object.key.kind == Kind::StreamRoute {
            class = Class::Refused;
            reasons.push("TCP and UDP are not proxied: the object is checked and kept".to_owned());
        }
    } else {
        class = Class::Refused;
        reasons.extend(
            object.errors.iter().map(|error| format!("{}: {}", error.error.pointer, error.error.kind)),
        );
    }
    Classed {
        class,
        object: object.key.to_string(),
        file: object.file.to_string(),
        line: object.line,
        reasons,
    }
}

/// Plugins that do nothing here because nothing is left for them to do.
fn left_out(object: &Value, catalog: &plugins::Catalog) -> Vec<String> {
    let used = object.get("plugins").and_then(Value::as_object).into_iter().flatten();
    let idle = used.filter(|(name, _)| catalog.is_harmless(name));
    idle.filter_map(|(name, _)| Some(format!("{name}: {}", plugins::absent::why_harmless(name)?))).collect()
}

fn differences(object: &Value, known: &mut Differences) -> Vec<String> {
    let mut found = Vec::new();
    let Some(Value::Object(used)) = object.get("plugins") else { return found };
    for (name, settings) in used {
        let concerned = known.of(name).iter().filter(|difference| difference.concerns(settings));
        found.extend(concerned.map(|difference| format!("{name}: {}", difference.text)));
    }
    found
}
