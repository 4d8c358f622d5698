//! One cluster of Consul, and questions to it that wait for a change.
//!
//! The rules of `X-Consul-Index`, of stale answers and of connections are here, the same for services and keys.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use config::discovery::consul::Timeout;
use config::discovery::tls::RegistryTls;
use config::sensitive::Sensitive;
use http::{HeaderName, HeaderValue, StatusCode};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use super::pulse::{Pulse, Shared};
use crate::http::{Answer, Connection, Options, Question, SecretFile, Server, Tls};
use crate::source::{Again, SourceError, Standing};

/// The field of the ACL token.
const TOKEN: HeaderName = HeaderName::from_static("x-consul-token");
/// Questions that do not wait, at a time.
const BRIEF: usize = 8;
/// Those who were waiting for a cluster ask again spread over this long, for each that waits; and over half a second at most.
const SPREAD: Duration = Duration::from_micros(200);
const MAX_SPREAD: Duration = Duration::from_millis(500);
/// What a token has to be allowed.
const RIGHTS: &str = "it needs service:read and node:read, or key:read for keys";
/// How long nobody asks a cluster that seems to be gone.
const ASK_ANYWAY: Duration = Duration::from_secs(30);

/// What of the settings concerns the cluster and not what is asked of it.
pub(crate) struct Manner<'a> {
    pub(crate) token: Option<&'a Sensitive<0, 4096>>,
    pub(crate) token_file: Option<&'a PathBuf>,
    pub(crate) timeout: Timeout,
    pub(crate) tls: &'a RegistryTls,
    pub(crate) keepalive: bool,
    pub(crate) fetch_interval: u32,
    pub(crate) stale: bool,
    pub(crate) max_stale: Duration,
    pub(crate) max_watches: u32,
}

/// The manner of settings, which `consul` and `consul_kv` write in the same words.
macro_rules! manner {
    ($settings:expr) => {
        $crate::consul::cluster::Manner {
            token: $settings.token.as_ref(),
            token_file: $settings.token_file.as_ref(),
            timeout: $settings.timeout,
            tls: &$settings.tls,
            keepalive: $settings.keepalive,
            fetch_interval: $settings.fetch_interval.get(),
            stale: $settings.stale,
            max_stale: $settings.max_stale.duration(),
            max_watches: $settings.max_watches.get(),
        }
    };
}
pub(crate) use manner;

impl Manner<'_> {
    /// How a server is spoken to.
    pub(crate) fn options(&self) -> Result<Options, String> {
        let mut headers = Vec::new();
        if let Some(token) = self.token.map(Sensitive::reveal).filter(|token| !token.is_empty()) {
            let mut value = HeaderValue::from_str(token)
                .map_err(|_| "the token holds what no header can carry".to_owned())?;
            value.set_sensitive(true);
            headers.push((TOKEN, value));
        }
        let secret = self.token_file.map(|path| SecretFile { field: TOKEN, scheme: "", path: path.clone() });
        let (connect, tls) = (self.timeout.connect(), Tls::from(self.tls));
        Ok(Options { connect, headers, secret, tls, ..Options::default() })
    }
}

/// One of `servers`.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) server: Arc<Server>,
    timeout: Timeout,
    keepalive: bool,
    interval: Duration,
    stale: bool,
    max_stale: Duration,
    /// Questions that may wait at the same time.
    watches: Arc<Semaphore>,
    max_watches: usize,
    brief: Semaphore,
    pulse: Shared,
}

impl Cluster {
    /// # Errors
    /// What of the settings cannot be used.
    pub(crate) fn new(server: &str, manner: &Manner<'_>) -> Result<Arc<Self>, String> {
        let max_watches = usize::try_from(manner.max_watches).unwrap_or(usize::MAX);
        Ok(Arc::new(Self {
            server: Server::new(server, manner.options()?)?,
            timeout: manner.timeout,
            keepalive: manner.keepalive,
            interval: Duration::from_secs(manner.fetch_interval.into()),
            stale: manner.stale,
            max_stale: manner.max_stale,
            watches: Arc::new(Semaphore::new(max_watches)),
            max_watches,
            brief: Semaphore::new(BRIEF),
            pulse: Shared::default(),
        }))
    }

    /// For one answer that nobody waits in.
    pub(crate) fn read(&self) -> Duration {
        self.timeout.read()
    }

    /// The name of a service as it is asked for here: as it is written, or what follows this cluster's URL and one of
    /// `paths` in it. None: the URL is that of another cluster.
    pub(crate) fn own<'a>(&self, service: &'a str, paths: &[&str]) -> Option<&'a str> {
        if !service.starts_with("http://") && !service.starts_with("https://") {
            return Some(service);
        }
        let rest = service.strip_prefix(self.server.name())?;
        paths.iter().find_map(|path| rest.strip_prefix(path)).filter(|name| !name.is_empty())
    }

    /// A question that is asked again and again. `path` is escaped, `parameters` are not.
    pub(crate) fn poll(self: &Arc<Self>, path: &str, parameters: &[(&str, Cow<'_, str>)]) -> Poll {
        let mut parts: Vec<String> =
            parameters.iter().map(|(name, value)| format!("{name}={}", escape(value))).collect();
        if self.stale {
            parts.push("stale".to_owned());
        }
        let query = parts.join("&");
        let target = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        Poll {
            cluster: Arc::clone(self),
            connection: self.server.connection(),
            target: target.into(),
            index: None,
            last: 0,
            before: 0,
            failed: false,
            slot: None,
            pulse: None,
        }
    }
}

/// As a part of a path or a query.
pub(crate) fn escape(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// A question that waits for a change.
pub(crate) struct Poll {
    cluster: Arc<Cluster>,
    connection: Connection,
    /// Path and query.
    target: Box<str>,
    /// What is waited beyond; none asks at once.
    index: Option<u64>,
    /// The index of the last answer.
    last: u64,
    /// The index of the answer before it.
    before: u64,
    /// The last question had no answer that counts.
    failed: bool,
    slot: Option<OwnedSemaphorePermit>,
    pulse: Option<Arc<Pulse>>,
}

/// An answer that counts.
pub(crate) struct Told {
    pub(crate) answer: Answer,
    pub(crate) standing: Standing,
    pub(crate) again: Again,
    /// It is the first one after an error.
    pub(crate) after_failure: bool,
}

impl Poll {
    pub(crate) fn restart(&mut self) {
        self.index = None;
        self.connection.close();
    }

    /// The next answer with a status for which `known` holds. May be dropped before it is ready.
    pub(crate) async fn next(&mut self, known: fn(StatusCode) -> bool) -> Result<Told, SourceError> {
        let cluster = Arc::clone(&self.cluster);
        let pulse = self.pulse.get_or_insert_with(|| cluster.pulse.feel(&cluster.server, cluster.read()));
        let pulse = Arc::clone(pulse);
        // An error was told already, and while the cluster is gone there is nothing to ask; when it is back, everybody wants
        // to. It is asked now and then all the same, for the pulse may be wrong.
        if self.failed && timeout(ASK_ANYWAY, pulse.there()).await == Ok(true) {
            let waiting = cluster.max_watches - cluster.watches.available_permits().min(cluster.max_watches);
            let spread = SPREAD.saturating_mul(u32::try_from(waiting).unwrap_or(u32::MAX)).min(MAX_SPREAD);
            sleep(spread.mul_f64(fastrand::f64())).await;
        }
        if self.slot.is_none() && cluster.keepalive {
            self.slot = Arc::clone(&cluster.watches).try_acquire_owned().ok();
        }
        let losses = pulse.losses();
        let outcome = tokio::select! {
            answer = self.ask() => answer,
            reason = pulse.lost(losses) => Err(SourceError::new(reason)),
        };
        let told = outcome.and_then(|answer| self.judge(answer, known));
        if told.is_err() {
            self.failed = true;
            self.restart();
            pulse.doubt();
        }
        told
    }

    /// An answer that counted is not what it should be.
    pub(crate) fn unreadable(&mut self, error: &dyn fmt::Display) -> SourceError {
        self.failed = true;
        self.last = self.before;
        self.restart();
        SourceError::new(format!("{}: not an answer of Consul: {error}", self.cluster.server.name()))
    }

    async fn ask(&mut self) -> Result<Answer, SourceError> {
        let Timeout { wait, .. } = self.cluster.timeout;
        let read = self.cluster.timeout.read();
        if self.slot.is_none() {
            let _turn = self.cluster.brief.acquire().await;
            let answer = self.connection.ask(&Question::get(&self.target, read)).await;
            // Others need the place among the connections that Consul takes from one address.
            self.connection.close();
            return Ok(answer?);
        }
        match self.index {
            None => Ok(self.connection.ask(&Question::get(&self.target, read)).await?),
            Some(index) => {
                let next = if self.target.contains('?') { '&' } else { '?' };
                let target = format!("{}{next}index={index}&wait={}s", self.target, wait.get());
                // The server waits up to a sixteenth longer, so that not all wake at once.
                let wait = self.cluster.timeout.wait();
                let deadline = wait + wait / 16 + read;
                Ok(self.connection.ask(&Question::get(&target, deadline)).await?)
            }
        }
    }

    /// What an answer is worth.
    fn judge(&mut self, answer: Answer, known: fn(StatusCode) -> bool) -> Result<Told, SourceError> {
        let server = &self.cluster.server;
        if !known(answer.status) {
            return Err(refusal(&answer, server));
        }
        if answer.field("x-consul-knownleader") == Some("false") {
            return Err(SourceError::new(format!(
                "{}: the server that answered knows no leader",
                server.name()
            )));
        }
        let contact = answer
            .field("x-consul-lastcontact")
            .and_then(|text| text.parse().ok())
            .map(Duration::from_millis);
        if let Some(ago) = contact.filter(|ago| self.cluster.stale && *ago > self.cluster.max_stale) {
            let name = server.name();
            return Err(SourceError::new(format!(
                "{name}: the server that answered heard of its leader {ago:?} ago"
            )));
        }
        // What a token may not see is left out in silence: by newer versions with a word about it.
        let filtered = answer.field("x-consul-results-filtered-by-acls") == Some("true");
        if filtered && answer.body.trim_ascii() == b"[]" {
            let name = server.name();
            return Err(SourceError::new(format!("{name}: the token may not see the service: {RIGHTS}")));
        }
        // Without an index there is nothing to wait beyond but the beginning: answers come at once.
        let index: u64 = answer.field("x-consul-index").and_then(|text| text.parse().ok()).unwrap_or(0);
        let backwards = index < self.last;
        self.before = std::mem::replace(&mut self.last, index);
        self.index = (!backwards).then_some(index.max(1));
        let standing = if backwards { Standing::Restarted } else { Standing::Continued };
        let again = if self.slot.is_some() { Again::Now } else { Again::After(self.cluster.interval) };
        let after_failure = std::mem::take(&mut self.failed);
        Ok(Told { answer, standing, again, after_failure })
    }
}

/// Why there is no answer, and what to do where that can be known.
pub(crate) fn refusal(answer: &Answer, server: &Server) -> SourceError {
    let mut error = answer.refusal(server);
    if answer.status == StatusCode::FORBIDDEN {
        let reason = &error.reason;
        error.reason =
            format!("{reason} (the token needs service:read and node:read, or key:read for keys)").into();
    }
    error
}
