//! The offline check of a configuration directory: `config.yaml`, and `apisix.yaml` or `apisix.json` beside it.
//!
//! Everything that is wrong is told, with file, line and pointer, and nothing is started: no socket, no store. What is
//! found here is what would be refused or set aside at run time, dangling references among it.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::apisix_yaml::{ApisixYaml, FILES};
use crate::discovery::not_configured;
use crate::document::LocatedError;
use crate::env::Env;
use crate::error::{ConfigError, ErrorKind};
use crate::graph::Graph;
use crate::id::{Kind, ResourceKey};
use crate::listed_plugins::ListedPlugins;
use crate::plugin_catalog::PluginCatalog;
use crate::process::{CONFIG_FILE, Notice, Process, Provider};
use crate::resource::Resource;
use crate::upstream::Upstream;
use crate::upstream::discovery::{Origin, Part};

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// The files that were read.
    pub files: Vec<PathBuf>,
    /// Everything that is wrong, by file and line.
    pub errors: Vec<LocatedError>,
    /// Settings of `config.yaml` that change nothing here.
    pub notices: Vec<Notice>,
    /// Resources that were read.
    pub resources: usize,
    /// The same, one by one.
    pub objects: Vec<CheckedObject>,
}

/// A resource of a file, and how it stands.
#[derive(Clone, Debug)]
pub struct CheckedObject {
    /// Its address.
    pub key: ResourceKey,
    /// Its file and line.
    pub file: Arc<str>,
    /// From 1; 0 where it is not known.
    pub line: u32,
    /// As it is written.
    pub value: Value,
    /// What is wrong with it.
    pub errors: Vec<LocatedError>,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }
}

impl fmt::Display for Report {
    /// The errors, a line each, and a summary.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for error in &self.errors {
            writeln!(f, "{error}")?;
        }
        write!(f, "{} errors in {} files, {} resources", self.errors.len(), self.files.len(), self.resources)
    }
}

/// Check a directory, or the one a `config.yaml` stands in.
///
/// The file the settings name is checked; if they name another provider, or cannot be read, whichever of `apisix.yaml`
/// and `apisix.json` is there.
pub fn check_directory(path: &Path, catalog: &dyn PluginCatalog, env: &Arc<dyn Env + Send + Sync>) -> Report {
    let mut report = Report::default();
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let config = if path.is_dir() { path.join(CONFIG_FILE) } else { path.to_owned() };
    if config.exists() {
        report.files.push(config);
    }
    let process = match Process::load(path, &**env) {
        Ok(process) => Some(process),
        Err(errors) => {
            report.errors.extend(errors);
            None
        }
    };
    let named = match process.as_ref().map(|process| &process.provider) {
        Some(Provider::File { path }) => Some(path.clone()),
        _ => None,
    };
    let plugins = process.as_ref().and_then(|process| process.plugins.clone());
    let kinds = process.as_ref().map(|process| process.discovery.asked());
    let pools = process
        .as_ref()
        .map(|process| process.signers.iter().map(|pool| pool.name.clone()).collect::<Vec<_>>());
    let acme = process.as_ref().map(|process| process.acme.is_some());
    report.notices = process.map(|process| process.not_applicable).unwrap_or_default();
    let candidates = FILES.map(|name| dir.join(name)).into_iter();
    let files: Vec<PathBuf> = match named {
        Some(file) => vec![file],
        None => candidates.filter(|file| file.exists()).collect(),
    };
    for file in files {
        let configured = Configured {
            plugins: plugins.as_deref(),
            kinds: kinds.as_deref(),
            signers: pools.as_deref(),
            acme,
        };
        check_file(&file, catalog, configured, env, &mut report);
    }
    report.errors.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    report
}

/// What of `config.yaml` resources depend on; none of it where the file cannot be read.
#[derive(Clone, Copy)]
struct Configured<'a> {
    plugins: Option<&'a [String]>,
    /// Kinds of discovery.
    kinds: Option<&'a [&'static str]>,
    /// Pools of signers.
    signers: Option<&'a [String]>,
    /// Whether an ACME authority is.
    acme: Option<bool>,
}

fn check_file(
    path: &Path,
    catalog: &dyn PluginCatalog,
    Configured { plugins, kinds, signers, acme }: Configured<'_>,
    env: &Arc<dyn Env + Send + Sync>,
    report: &mut Report,
) {
    report.files.push(path.to_owned());
    let file = match ApisixYaml::load(path, &**env) {
        Ok(file) => file,
        Err(errors) => {
            report.errors.extend(errors);
            return;
        }
    };
    report.errors.extend(file.errors.iter().cloned());
    report.resources += file.items().len();
    let listed = file.plugins.as_ref().map(|list| list.iter().map(|plugin| plugin.name.clone()).collect());
    let names: Option<Vec<String>> = listed.or_else(|| plugins.map(<[String]>::to_vec));
    let catalog = ListedPlugins::new(catalog, names.as_deref());
    let mut graph = Graph::with_env(Arc::clone(env));
    graph.replace_all(file.changes(1), &catalog);
    let mut found: HashMap<ResourceKey, Vec<LocatedError>> = HashMap::new();
    for rejected in graph.rejected() {
        // Nothing is asked here; a running gateway sets the object aside if the secret cannot be had.
        let told = |error: &&ConfigError| error.is_unasked_secret() || error.is_told_by_file(&rejected.key);
        let errors = rejected.errors.iter().filter(|error| !told(error)).cloned();
        let errors = errors.map(|error| file.locate(&rejected.key, error));
        found.entry(rejected.key.clone()).or_default().extend(errors);
    }
    for item in Kind::ALL.into_iter().flat_map(|kind| graph.iter(kind)) {
        let unasked = |error: &ConfigError| match &error.kind {
            ErrorKind::MissingReference { target } => graph
                .rejected_at(target)
                .is_some_and(|rejected| rejected.errors.iter().all(ConfigError::is_unasked_secret)),
            _ => false,
        };
        let errors = graph.check_references(&item.key, &item.resource).into_iter();
        let errors = errors.filter(|error| !unasked(error));
        let errors = errors.chain(kinds.into_iter().flat_map(|kinds| unknown_kinds(&item.resource, kinds)));
        let errors = errors.chain(signers.and_then(|pools| unknown_signers(&item.resource, pools)));
        let errors = errors.chain(acme.and_then(|acme| unknown_authority(&item.resource, acme)));
        let errors = errors.map(|error| file.locate(&item.key, error));
        found.entry(item.key.clone()).or_default().extend(errors);
    }
    report.errors.extend(found.values().flatten().cloned());
    report.objects.extend(file.items().iter().map(|item| {
        let place = file.locate(&item.key, ConfigError::invalid("", ""));
        CheckedObject {
            key: item.key.clone(),
            file: place.file,
            line: place.line,
            value: item.value(),
            errors: found.remove(&item.key).unwrap_or_default(),
        }
    }));
}

/// The pool of signers of a certificate, if it is not configured.
fn unknown_signers(resource: &Resource, pools: &[String]) -> Option<ConfigError> {
    match resource {
        Resource::Ssl(ssl) => ssl.check_signers(pools.iter().map(String::as_str)),
        _ => None,
    }
}

/// What is wrong with a certificate that nobody gives.
fn unknown_authority(resource: &Resource, is_configured: bool) -> Option<ConfigError> {
    match resource {
        Resource::Ssl(ssl) => ssl.check_acme(is_configured),
        _ => None,
    }
}

/// The services of kinds that are not configured, in whatever upstream the object has.
fn unknown_kinds(resource: &Resource, kinds: &[&'static str]) -> Vec<ConfigError> {
    let (at, upstream) = match resource {
        Resource::Upstream(upstream) => ("", Some(&**upstream)),
        Resource::Route(route) => ("/upstream", route.upstream.as_deref()),
        Resource::Service(service) => ("/upstream", service.upstream.as_deref()),
        Resource::LookupEntry(entry) => ("/upstream", entry.upstream.as_deref()),
        _ => ("", None),
    };
    let parts = upstream.map(Upstream::parts).unwrap_or_default();
    let unknown = |part: Part<'_>| match part.origin {
        Origin::Service { kind, .. } if !kinds.contains(&kind) => {
            Some(ConfigError::invalid(format!("{at}{}", part.place.of_kind()), not_configured(kind)))
        }
        _ => None,
    };
    parts.into_iter().filter_map(unknown).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeMap;

    use super::*;
    use crate::testing::TestCatalog;

    fn check(files: &[(&str, &str)]) -> (Report, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let vars = BTreeMap::from([("PORT".to_owned(), "9080".to_owned())]);
        let env: Arc<dyn Env + Send + Sync> = Arc::new(vars);
        let report = check_directory(dir.path(), &TestCatalog, &env);
        let prefix = format!("{}/", dir.path().display());
        let errors = report.errors.iter().map(|error| error.to_string().replace(&prefix, "")).collect();
        (report, errors)
    }

    const FILE_PROVIDER: &str = "deployment: {role: data_plane, role_data_plane: {config_provider: yaml}}\n";

    #[test]
    fn kinds_of_discovery_that_are_not_configured_are_told() {
        let config = format!(
            "discovery: {{consul: {{servers: [\"http://a:1\"]}}, postern: {{servers: [\"b:1\"], kinds: [nacos]}}}}\n{FILE_PROVIDER}"
        );
        let resources = "upstreams:
  - {id: 1, type: roundrobin, service_name: a, discovery_type: consul}
  - {id: 2, type: roundrobin, service_name: a, discovery_type: dns}
  - {id: 3, type: roundrobin, service_name: a, discovery_type: nacos}
  - {id: 4, type: roundrobin, service_name: consul/a, discovery_type: postern}
  - {id: 5, type: roundrobin, service_name: a, discovery_type: eureka}
routes:
  - id: 1
    uri: /a
    upstream:
      type: roundrobin
      nodes: {\"127.0.0.1:80\": 1}
      discovery: {sources: [{type: kubernetes, service: a/b}]}
#END
";
        let (_, errors) = check(&[("config.yaml", &config), ("apisix.yaml", resources)]);
        let told = "is configured: add `discovery.";
        assert_eq!(errors.len(), 2, "{errors:?}");
        assert!(errors[0].contains("/upstreams/4/discovery_type") && errors[0].contains(told), "{errors:?}");
        assert!(errors[1].contains("/upstream/discovery/sources/0/type"), "{errors:?}");
    }

    #[test]
    fn pools_of_signers_that_are_not_configured_are_told() {
        let pool = "{name: main, nodes: ['a:7443'], cert_file: c, key_file: k, ca_file: r}";
        let config = format!("postern: {{signers: [{pool}]}}\n{FILE_PROVIDER}");
        let ssl = |id: u32, key: &str| {
            let cert = "c".repeat(128);
            format!("  - {{id: {id}, sni: a.test, cert: {cert}, key: {key}}}\n")
        };
        let resources =
            format!("ssls:\n{}{}#END\n", ssl(1, "signer://main/shop"), ssl(2, "signer://mian/shop"));
        let (_, errors) = check(&[("config.yaml", &config), ("apisix.yaml", &resources)]);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains("/ssls/1/key") && errors[0].contains("`mian`"), "{errors:?}");
        assert!(errors[0].contains("has main"), "{errors:?}");
    }

    #[test]
    fn certificates_that_nobody_gives_are_told() {
        let acme = "postern: {acme: {directory: letsencrypt, accept_terms: true}}\n";
        let resources =
            "ssls: [{id: 1, sni: a.test, acme: {}}, {id: 2, snis: [b.test, '*.b.test'], acme: {}}]\n#END\n";
        let with = format!("{acme}{FILE_PROVIDER}");
        let (_, errors) = check(&[("config.yaml", &with), ("apisix.yaml", resources)]);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains("/ssls/1/snis/1") && errors[0].contains("DNS-01"), "{errors:?}");
        let (_, errors) = check(&[("config.yaml", FILE_PROVIDER), ("apisix.yaml", resources)]);
        assert_eq!(errors.len(), 2, "{errors:?}");
        assert!(errors[0].contains("/ssls/0/acme") && errors[0].contains("postern.acme"), "{errors:?}");
    }

    #[test]
    fn a_good_directory_is_clean() {
        let config =
            format!("apisix: {{node_listen: ${{{{PORT}}}}, enable_reuseport: true}}\n{FILE_PROVIDER}");
        let resources = "upstreams:
  - {id: 1, type: roundrobin, nodes: {\"127.0.0.1:80\": 1}}
routes:
  - {id: 1, uri: /a, upstream_id: 1, plugins: {limit-count: {count: 1}}}
consumers:
  - {username: jack}
  - {id: jack/credentials/a, plugins: {key-auth: {key: k}}}
#END
";
        let (report, errors) = check(&[("config.yaml", &config), ("apisix.yaml", resources)]);
        assert!(report.is_clean(), "{errors:?}");
        assert_eq!((report.files.len(), report.resources, report.notices.len()), (2, 4, 1));
        assert_eq!(report.to_string(), "0 errors in 2 files, 4 resources");
        assert!(check(&[]).0.is_clean());
    }

    #[test]
    fn everything_wrong_in_both_files_is_told() {
        let config = "apisix:\n  node_listn: 1\n";
        let resources = "routes:
  - id: 1
    uri: /a
    upstream_id: 7
  - id: 2
    uri: /b
    upstreem_id: 7
    plugins: {}
  - id: 3
    uri: /c
    upstream: {type: roundrobin, nodes: {\"127.0.0.1:80\": 1}}
    plugins:
      limit-count:
        count: many
      no-such-plugin: {}
consumers:
  - {id: ann/credentials/a, plugins: {key-auth: {key: k}}}
rutes: []
#END
";
        let (_, errors) = check(&[("config.yaml", config), ("apisix.yaml", resources)]);
        let expected = [
            ("apisix.yaml:4:5: /routes/0/upstream_id: ", "upstreams/7 does not exist"),
            ("apisix.yaml:7:5: /routes/1/upstreem_id: ", "did you mean `upstream_id`?"),
            ("apisix.yaml:14:9: /routes/2/plugins/limit-count/count: ", "write a number"),
            ("apisix.yaml:15:7: /routes/2/plugins/no-such-plugin: ", "does not exist here"),
            ("apisix.yaml:17:5: /consumers/0: ", "consumers/ann does not exist"),
            ("apisix.yaml:18:1: /rutes: ", "did you mean `routes`?"),
            ("config.yaml:2:3: /apisix/node_listn: ", "did you mean `node_listen`?"),
        ];
        for (error, (place, text)) in errors.iter().zip(expected) {
            assert!(error.starts_with(place) && error.contains(text), "{error}\n{place}{text}");
        }
        assert_eq!(errors.len(), expected.len(), "{}", errors.join("\n"));
    }

    #[test]
    fn the_list_of_plugins_holds() {
        let config = format!("plugins: [key-auth]\n{FILE_PROVIDER}");
        let resources = "global_rules:\n  - {id: 1, plugins: {limit-count: {count: 1}}}\n#END";
        let (_, errors) = check(&[("config.yaml", &config), ("apisix.yaml", resources)]);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors.iter().all(|error| error.contains("not in the list `plugins`")), "{errors:?}");
        let resources = format!("plugins: [{{name: limit-count}}]\n{resources}");
        let (report, errors) = check(&[("config.yaml", &config), ("apisix.yaml", &resources)]);
        assert!(report.is_clean(), "{errors:?}");
    }

    #[test]
    fn a_file_that_should_be_there_is_missed() {
        let (_, errors) = check(&[("config.yaml", FILE_PROVIDER)]);
        assert!(errors.iter().all(|error| error.starts_with("apisix.yaml: cannot be read")), "{errors:?}");
        assert_eq!(errors.len(), 1);
        let (_, errors) = check(&[("config.yaml", "a: [\n"), ("apisix.json", "{")]);
        assert_eq!(errors.len(), 2, "{errors:?}");
    }
}
