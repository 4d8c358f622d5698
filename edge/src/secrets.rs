//! Secrets of secret managers: asked on the control side, kept in memory, put into objects when these are read.
//!
//! An object that refers to a secret nobody has told yet is set aside; when the answer comes it is read again. A secret
//! that was told stays in use while its manager cannot be asked, and is asked for again every five minutes, so that a
//! changed one takes effect without a restart. Nothing of it is written to disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use config::graph::Graph;
use config::secret::{Secret, Vault};
use config::secret_ref::manager_path;
use config::{Env, Kind, ProcessEnv, Resource};
use futures_util::stream::{self, StreamExt};
use http::{HeaderName, HeaderValue, Request, StatusCode};
use plugins::support::http_call::HttpClient;
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::running::Running;

/// How long a secret is taken as current. As in APISIX.
const FRESH: Duration = Duration::from_secs(300);
/// The first wait after a failure; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Records that are asked for at the same time.
const AT_ONCE: usize = 8;
/// Records that are kept. More of them is a mistake or an attack on the Admin API.
const RECORDS: usize = 10_000;

/// The secrets of one record, by their keys.
type Fields = HashMap<String, Zeroizing<String>>;

/// The secrets that objects refer to. Clones are the same.
#[derive(Clone, Default)]
pub struct Secrets {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to ask for.
    wanted: Notify,
    /// Counts answers, and failures to get one.
    told: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// Managers by `vault/1`.
    managers: BTreeMap<Box<str>, Arc<Secret>>,
    /// What managers keep, by `vault/1/path/of/record`.
    records: HashMap<Box<str>, Record>,
}

/// What one request to a manager tells: some secrets by their keys.
struct Record {
    secrets: Option<Fields>,
    /// Why it could not be asked for, the last time.
    problem: Option<String>,
    due: Instant,
    wait: Duration,
}

/// The parts of `vault/1/path/of/record/key`.
fn split(path: &str) -> Option<(&str, &str, &str)> {
    let (record, key) = path.rsplit_once('/')?;
    let manager_end = record.match_indices('/').nth(1)?.0;
    let manager = record.get(..manager_end)?;
    let complete = record.len() > manager_end + 1 && !key.is_empty();
    complete.then_some((manager, record, key))
}

fn no_manager(manager: &str) -> String {
    format!("there is no secrets/{manager}: create it")
}

impl Env for Secrets {
    fn var(&self, name: &str) -> Option<String> {
        ProcessEnv.var(name)
    }

    fn secret(&self, path: &str) -> Result<String, String> {
        let (manager, record, key) = split(path)
            .ok_or("write it as `$secret://MANAGER/ID/NAME/KEY`, like `$secret://vault/1/jack/key`")?;
        let mut state = self.state();
        let full = state.records.len() >= RECORDS;
        let known = state.managers.contains_key(manager);
        let pending =
            || if known { format!("secrets/{manager} is being asked") } else { no_manager(manager) };
        let Some(found) = state.records.get(record) else {
            if full {
                return Err(format!("more than {RECORDS} records of secrets are referred to"));
            }
            state.records.insert(record.into(), Record::default());
            drop(state);
            self.shared.wanted.notify_one();
            return Err(pending());
        };
        match (&found.secrets, &found.problem) {
            (Some(secrets), _) => match secrets.get(key) {
                Some(secret) => Ok(secret.to_string()),
                None => Err(format!("`{key}` is not in what secrets/{manager} keeps there")),
            },
            (None, Some(problem)) => Err(problem.clone()),
            (None, None) => Err(pending()),
        }
    }
}

impl Default for Record {
    fn default() -> Self {
        Self { secrets: None, problem: None, due: Instant::now(), wait: FIRST_WAIT }
    }
}

impl Secrets {
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the managers of a configuration. Records of one that is new or changed are asked for at once.
    pub fn managers(&self, graph: &Graph) {
        let mut managers = BTreeMap::new();
        for item in graph.iter(Kind::Secret) {
            if let Resource::Secret(secret) = &item.resource {
                managers.insert(Box::from(&*item.key.id), Arc::new(secret.clone()));
            }
        }
        let mut guard = self.state();
        let state = &mut *guard;
        let mut touched = false;
        for (path, record) in &mut state.records {
            let manager = split_manager(path);
            if state.managers.get(manager) != managers.get(manager) {
                record.due = Instant::now();
                record.wait = FIRST_WAIT;
                record.problem = None;
                touched = true;
            }
        }
        state.managers = managers;
        drop(guard);
        if touched {
            self.shared.wanted.notify_one();
        }
    }

    /// Waits until every one of `paths` is known or was asked for in vain, at most for `limit`.
    pub async fn ask(&self, paths: &[&str], limit: Duration) {
        if paths.is_empty() {
            return;
        }
        let mut told = self.shared.told.subscribe();
        let settled = async {
            loop {
                for path in paths {
                    let _ = self.secret(path);
                }
                if paths.iter().all(|path| self.is_settled(path)) || told.changed().await.is_err() {
                    return;
                }
            }
        };
        // Whoever asked sees what is missing when the object is read.
        let _ = tokio::time::timeout(limit, settled).await;
    }

    /// Waits until everything that was asked for so far has an answer, at most for `limit`.
    pub async fn settled(&self, limit: Duration) {
        let mut told = self.shared.told.subscribe();
        let settled = async {
            while self.state().records.values().any(|record| !record.is_settled()) {
                if told.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(limit, settled).await;
    }

    fn is_settled(&self, path: &str) -> bool {
        let Some((manager, record, _)) = split(path) else { return true };
        let state = self.state();
        // A manager that was written a moment ago may be on its way here.
        state.records.get(record).is_none_or(|record| {
            record.secrets.is_some() || record.is_settled() && state.managers.contains_key(manager)
        })
    }

    /// Asks managers for as long as the process lives, and has objects read again when an answer is another one.
    pub async fn run(self, client: HttpClient, running: Running) {
        loop {
            let due = self.due();
            let answers: Vec<_> = stream::iter(due)
                .map(|(path, manager)| {
                    let client = client.clone();
                    async move {
                        let answer = match manager {
                            Some(manager) => fetch(&client, &manager, record_name(&path)).await,
                            None => Err(no_manager(split_manager(&path))),
                        };
                        (path, answer)
                    }
                })
                .buffer_unordered(AT_ONCE)
                .collect()
                .await;
            let changed = self.take(answers);
            if !changed.is_empty() {
                let running = running.clone();
                // Reading and compiling is work for a thread that may block.
                let again = tokio::task::spawn_blocking(move || {
                    running.read_again(|path| {
                        split(path).is_some_and(|(_, record, _)| changed.contains(record))
                    });
                });
                if let Err(error) = again.await {
                    tracing::error!(%error, "objects with secrets were not read again");
                }
            }
            self.shared.told.send_modify(|count| *count += 1);
            let next = self.state().records.values().map(|record| record.due).min();
            let sleep = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.shared.wanted.notified() => {}
                () = sleep => self.forget_unused(&running),
            }
        }
    }

    fn due(&self) -> Vec<(Box<str>, Option<Arc<Secret>>)> {
        let state = self.state();
        let now = Instant::now();
        let due = state.records.iter().filter(|(_, record)| record.due <= now);
        due.map(|(path, _)| (path.clone(), state.managers.get(split_manager(path)).cloned())).collect()
    }

    /// Keeps answers; the records that are now different.
    fn take(&self, answers: Vec<(Box<str>, Result<Fields, String>)>) -> BTreeSet<Box<str>> {
        let mut changed = BTreeSet::new();
        let mut state = self.state();
        for (path, answer) in answers {
            let Some(record) = state.records.get_mut(&path) else { continue };
            match answer {
                Ok(secrets) => {
                    if record.secrets.as_ref() != Some(&secrets) {
                        record.secrets = Some(secrets);
                        changed.insert(path);
                    }
                    record.problem = None;
                    record.wait = FIRST_WAIT;
                    record.due = Instant::now() + FRESH;
                }
                Err(problem) => {
                    tracing::warn!(secret = %path, problem, kept = record.secrets.is_some(), "not told");
                    if record.secrets.is_none() && record.problem.as_ref() != Some(&problem) {
                        // The object tells the new reason.
                        changed.insert(path);
                    }
                    record.problem = Some(problem);
                    record.due = Instant::now() + record.wait;
                    record.wait = (record.wait * 2).min(LONGEST_WAIT);
                }
            }
        }
        changed
    }

    /// Drops what no object refers to any more.
    fn forget_unused(&self, running: &Running) {
        let mut used = BTreeSet::new();
        let configuration = running.configuration();
        configuration.graph.visit_secret_references(&mut |text| {
            if let Some((_, record, _)) = manager_path(text).and_then(split) {
                used.insert(Box::<str>::from(record));
            }
        });
        drop(configuration);
        self.state()
            .records
            .retain(|path, record| used.contains(path) || record.due > Instant::now() + FRESH / 2);
    }
}

impl Record {
    fn is_settled(&self) -> bool {
        self.secrets.is_some() || self.problem.is_some()
    }
}

/// `vault/1` of `vault/1/path/of/record`.
fn split_manager(record: &str) -> &str {
    record.match_indices('/').nth(1).and_then(|(end, _)| record.get(..end)).unwrap_or(record)
}

/// `path/of/record` of `vault/1/path/of/record`.
fn record_name(record: &str) -> &str {
    record.get(split_manager(record).len() + 1..).unwrap_or_default()
}

async fn fetch(client: &HttpClient, manager: &Secret, name: &str) -> Result<Fields, String> {
    match manager {
        Secret::Vault(vault) => ask_vault(client, vault, name).await,
        Secret::Aws(_) => Err("AWS Secrets Manager is not asked: use vault, or `$env://NAME`".to_owned()),
        Secret::Gcp(_) => {
            Err("Google Cloud Secret Manager is not asked: use vault, or `$env://NAME`".to_owned())
        }
    }
}

/// Vault's KV engine, version 1 (`kv/apisix` as the prefix) or 2 (`kv/data/apisix`).
async fn ask_vault(client: &HttpClient, vault: &Vault, name: &str) -> Result<Fields, String> {
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(format!("`{name}` is not the name of a secret"));
    }
    let prefix = vault.prefix.trim_matches('/');
    let mut uri = format!("{}/v1/{prefix}/", vault.uri.trim_end_matches('/'));
    uri.extend(percent_encoding::utf8_percent_encode(name, UNSAFE));
    let mut request = Request::get(&uri).body(Bytes::new()).map_err(|error| format!("{uri}: {error}"))?;
    let fields =
        [("x-vault-token", Some(vault.token.reveal())), ("x-vault-namespace", vault.namespace.as_deref())];
    for (field, value) in fields.into_iter().filter_map(|(field, value)| Some((field, value?))) {
        let mut value = HeaderValue::from_str(value)
            .map_err(|_| format!("{field} cannot be sent: it has control characters"))?;
        value.set_sensitive(true);
        request.headers_mut().insert(HeaderName::from_static(field), value);
    }
    let answer = client.call(request).await.map_err(|error| format!("vault cannot be asked: {error}"))?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Err(format!("vault has nothing at {prefix}/{name}")),
        StatusCode::FORBIDDEN => return Err(format!("vault does not let this token read {prefix}/{name}")),
        status => return Err(format!("vault answered {status} for {prefix}/{name}")),
    }
    let body: Value =
        serde_json::from_slice(answer.body()).map_err(|_| "vault's answer is not JSON".to_owned())?;
    let data = body.get("data").ok_or("vault's answer has no `data`")?;
    // Version 2 wraps what was written once more and has metadata beside it.
    let second = data.get("data").filter(|inner| inner.is_object() && data.get("metadata").is_some());
    let fields = second.unwrap_or(data).as_object().ok_or("`data` in vault's answer is not an object")?;
    Ok(fields
        .iter()
        .filter_map(|(key, value)| Some((key.clone(), Zeroizing::new(value.as_str()?.to_owned()))))
        .collect())
}

/// What stands in a path only escaped. Slashes part the name.
const UNSAFE: &percent_encoding::AsciiSet =
    &percent_encoding::NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_a_manager_a_record_and_a_key() {
        assert_eq!(split("vault/1/jack/key"), Some(("vault/1", "vault/1/jack", "key")));
        assert_eq!(split("vault/1/a/b/key"), Some(("vault/1", "vault/1/a/b", "key")));
        for wrong in ["vault", "vault/1", "vault/1/key", "vault/1//", "vault/1/a/", ""] {
            assert_eq!(split(wrong), None, "{wrong}");
        }
        assert_eq!(record_name("vault/1/a/b"), "a/b");
    }

    #[test]
    fn a_secret_stays_when_its_manager_is_away() {
        let secrets = Secrets::default();
        for _ in 0..2 {
            assert!(secrets.secret("vault/1/jack/key").unwrap_err().contains("there is no secrets/vault/1"));
        }
        let told = HashMap::from([("key".to_owned(), Zeroizing::new("s3cret".to_owned()))]);
        let record: Box<str> = "vault/1/jack".into();
        assert_eq!(secrets.take(vec![(record.clone(), Ok(told.clone()))]).len(), 1);
        assert!(secrets.take(vec![(record.clone(), Ok(told))]).is_empty(), "nothing changed");
        assert!(secrets.take(vec![(record, Err("away".to_owned()))]).is_empty());
        assert_eq!(secrets.secret("vault/1/jack/key").unwrap(), "s3cret");
        assert!(secrets.secret("vault/1/jack/other").unwrap_err().contains("`other` is not in"));
    }
}
