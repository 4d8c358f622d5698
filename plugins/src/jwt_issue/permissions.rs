//! Which application may ask for which resource: a table that is polled, and asked without leaving the process.
//!
//! The source gives the whole table, or what changed since a version. A table stays when its source is away; how old it
//! is can be seen, and a limit can be set. Before the first answer there is no table, and nothing is allowed.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use config::error::ConfigError;
use config::fields::Int;
use http::{Request, StatusCode, Uri};
use layers::plugin::BuildEnv;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::support::http_call::{self, HttpClient};

/// The largest answer of a source.
const MAX_TABLE: usize = 64 << 20;
/// The pause after a first question that failed; it doubles up to the interval.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Where the table comes from.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The URL that gives the table. From the second time on it is asked with `since=VERSION`.
    pub uri: String,
    /// Seconds between questions.
    #[serde(default)]
    pub interval: Int<1, 86_400, 30>,
    /// Milliseconds to wait for the whole answer.
    #[serde(default)]
    pub timeout: Int<1, 60_000, 5_000>,
    /// Check the certificate of the source.
    #[serde(default = "yes")]
    pub ssl_verify: bool,
    /// Seconds after which a table that could not be confirmed allows nothing any more; never, if it is not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Int<1, { u32::MAX }>>,
    /// The name of the resource, with variables.
    #[serde(default = "route_id")]
    pub resource: String,
}

fn yes() -> bool {
    true
}

fn route_id() -> String {
    "$route_id".to_owned()
}

/// What a source answers.
#[derive(Debug, Deserialize)]
struct Update {
    version: Value,
    /// The version that this is a change of; without it, it is the whole table.
    #[serde(default)]
    base: Option<Value>,
    #[serde(default)]
    apps: HashMap<Box<str>, HashSet<Box<str>>>,
    #[serde(default)]
    removed: Vec<Box<str>>,
}

/// One state of the table.
#[derive(Debug, Default)]
struct Grants {
    version: String,
    apps: HashMap<Box<str>, Arc<HashSet<Box<str>>>>,
}

fn version(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

impl Grants {
    /// This table with an update; nothing if the update is of another version than this.
    fn updated(&self, update: Update) -> Option<Self> {
        let mut apps = match &update.base {
            None => HashMap::new(),
            Some(base) if version(base) == self.version => self.apps.clone(),
            Some(_) => return None,
        };
        apps.extend(update.apps.into_iter().map(|(app, resources)| (app, Arc::new(resources))));
        for app in update.removed {
            apps.remove(&app);
        }
        Some(Self { version: version(&update.version), apps })
    }

    fn allow(&self, app: &str, resource: &str) -> bool {
        self.apps.get(app).is_some_and(|all| all.contains(resource) || all.contains("*"))
    }
}

/// What requests see. A lock for the length of a look-up; it is written once a poll.
#[derive(Debug, Default)]
struct Shared {
    uri: String,
    state: RwLock<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    grants: Option<Arc<Grants>>,
    confirmed: Option<Instant>,
    failure: Option<Arc<str>>,
}

impl Shared {
    fn state(&self) -> State {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn view(&self) -> Value {
        let state = self.state();
        json!({
            "uri": self.uri,
            "version": state.grants.as_ref().map(|grants| grants.version.as_str()),
            "apps": state.grants.as_ref().map_or(0, |grants| grants.apps.len()),
            "age": state.confirmed.map(|at| at.elapsed().as_secs()),
            "error": state.failure.as_deref(),
        })
    }
}

/// Why a resource may not be had.
#[derive(Debug, PartialEq, Eq)]
pub enum Denied {
    /// There is no table, or it is too old.
    NoTable,
    /// The table does not allow it.
    NotAllowed,
}

/// A table that follows its source as long as somebody holds it.
#[derive(Debug)]
pub struct Permissions {
    shared: Arc<Shared>,
    poll: AbortHandle,
    /// Held, so that the list lives as long as a table on it.
    _tables: Arc<Tables>,
}

impl Drop for Permissions {
    fn drop(&mut self) {
        self.poll.abort();
    }
}

/// Every table of the process, for people who want to know how old they are.
#[derive(Debug, Default)]
pub struct Tables(Mutex<Vec<Weak<Shared>>>);

impl Tables {
    /// What is known of each table.
    pub fn view(&self) -> Value {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tables.retain(|table| table.strong_count() > 0);
        tables.iter().filter_map(Weak::upgrade).map(|table| table.view()).collect()
    }

    /// The tables of the process.
    pub fn of(env: &BuildEnv<'_>) -> Arc<Self> {
        env.carry.get_or("jwt-issue/tables", Self::default)
    }
}

impl Permissions {
    /// The table of these settings; those with equal settings share it.
    ///
    /// # Errors
    /// The URL is none.
    pub fn follow(config: &Config, env: &BuildEnv<'_>) -> Result<Arc<Self>, ConfigError> {
        let uri = http_call::url(&config.uri, "/permissions/uri")?;
        let settings = http_call::Settings {
            max_body: MAX_TABLE,
            ..http_call::Settings::of(config.ssl_verify, config.timeout.get(), Some((1, 60_000)))
        };
        let client = HttpClient::new(&settings, env)?;
        let interval = Duration::from_secs(config.interval.get().into());
        // Asked for here: the table of what is carried over is locked while something is made for it.
        let tables = Tables::of(env);
        let key = format!("jwt-issue/{uri}/{interval:?}/{settings:?}");
        Ok(env.carry.get_or(&key, || {
            let shared = Arc::new(Shared { uri: told(&uri), ..Shared::default() });
            tables.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&shared));
            let poll = env.control.spawn(follow(shared.clone(), client, uri, interval)).abort_handle();
            Self { shared, poll, _tables: tables }
        }))
    }

    /// Whether `app` may have `resource`.
    ///
    /// # Errors
    /// It may not.
    pub fn check(&self, app: &str, resource: &str, max_age: Option<Duration>) -> Result<(), Denied> {
        let state = self.shared.state();
        let age = state.confirmed.map(|at| at.elapsed());
        let fresh = state.grants.filter(|_| match (max_age, age) {
            (Some(limit), Some(age)) => age <= limit,
            (Some(_), None) => false,
            (None, _) => true,
        });
        let (denied, version) = match fresh {
            None => (Denied::NoTable, None),
            Some(grants) if grants.allow(app, resource) => return Ok(()),
            Some(grants) => (Denied::NotAllowed, Some(grants)),
        };
        let version = version.as_ref().map(|grants| grants.version.as_str());
        tracing::warn!(app, resource, ?denied, version, ?age, "jwt-issue: permission denied");
        Err(denied)
    }
}

/// The URL without its query, which may hold a token.
fn told(uri: &Uri) -> String {
    uri.to_string().split('?').next().unwrap_or_default().to_owned()
}

/// Polls for ever.
async fn follow(shared: Arc<Shared>, client: HttpClient, uri: Uri, interval: Duration) {
    let mut pause = FIRST_PAUSE;
    loop {
        let known = shared.state().grants;
        match poll(&client, &uri, known.as_ref()).await {
            Ok(grants) => {
                shared.change(|state| {
                    *state = State { grants: Some(grants), confirmed: Some(Instant::now()), failure: None };
                });
                pause = FIRST_PAUSE;
                tokio::time::sleep(interval).await;
            }
            Err(failure) => {
                tracing::warn!(uri = %shared.uri, %failure, "jwt-issue: the table of permissions stays as it is");
                shared.change(|state| state.failure = Some(failure.into()));
                tokio::time::sleep(pause.min(interval)).await;
                pause = pause.saturating_mul(2).min(interval);
            }
        }
    }
}

/// Asks once; for the whole table, when the changes do not fit the one that is known.
async fn poll(client: &HttpClient, uri: &Uri, known: Option<&Arc<Grants>>) -> Result<Arc<Grants>, String> {
    let mut since = known;
    loop {
        let target = match since {
            Some(grants) => with_version(uri, &grants.version)?,
            None => uri.clone(),
        };
        let question = Request::get(target).body(Bytes::new()).map_err(|error| error.to_string())?;
        let answer = client.call(question).await.map_err(|error| error.to_string())?;
        match (answer.status(), since) {
            (StatusCode::NOT_MODIFIED, Some(known)) => return Ok(known.clone()),
            (StatusCode::OK, _) => {}
            (status, _) => return Err(format!("the source answers {status}")),
        }
        let (body, base) = (answer.into_body(), since.cloned());
        // A table of many thousands takes milliseconds to read.
        let read = tokio::task::spawn_blocking(move || {
            let update: Update = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
            Ok::<_, String>(base.unwrap_or_default().updated(update).map(Arc::new))
        });
        match read.await.map_err(|error| error.to_string())?? {
            Some(grants) => return Ok(grants),
            None if since.is_some() => since = None,
            None => return Err("the source gives changes where the whole table was asked for".to_owned()),
        }
    }
}

fn with_version(uri: &Uri, version: &str) -> Result<Uri, String> {
    let separator = if uri.query().is_some() { '&' } else { '?' };
    let version = percent_encoding::utf8_percent_encode(version, percent_encoding::NON_ALPHANUMERIC);
    let mut text = uri.to_string();
    if uri.query().is_none() && uri.path() == "/" && !text.ends_with('/') {
        text.push('/');
    }
    format!("{text}{separator}since={version}").parse().map_err(|_| "the version makes no URL".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(value: Value) -> Update {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_change_is_of_one_version_and_the_whole_table_of_any() {
        let first = Grants::default()
            .updated(update(json!({"version": 1, "apps": {"a": ["r1", "r2"], "b": ["*"]}})))
            .unwrap();
        for (app, resource, allowed) in
            [("a", "r1", true), ("a", "r3", false), ("b", "r3", true), ("c", "r1", false), ("", "", false)]
        {
            assert_eq!(first.allow(app, resource), allowed, "{app} {resource}");
        }
        assert!(first.updated(update(json!({"version": 3, "base": 2, "apps": {"a": []}}))).is_none());
        let second = first
            .updated(update(json!({"version": "2", "base": "1", "apps": {"a": ["r3"]}, "removed": ["b"]})))
            .unwrap();
        assert_eq!(second.version, "2");
        assert!(second.allow("a", "r3") && !second.allow("a", "r1") && !second.allow("b", "r3"));
        let whole = second.updated(update(json!({"version": 9, "apps": {"c": ["r1"]}}))).unwrap();
        assert!(whole.allow("c", "r1") && !whole.allow("a", "r3"));
    }

    #[test]
    fn the_version_is_added_to_the_url() {
        for (uri, expected) in [
            ("http://a", "http://a/?since=1%2F2"),
            ("http://a/t", "http://a/t?since=1%2F2"),
            ("http://a/t?x=1", "http://a/t?x=1&since=1%2F2"),
        ] {
            assert_eq!(with_version(&uri.parse().unwrap(), "1/2").unwrap().to_string(), expected);
        }
    }
}
