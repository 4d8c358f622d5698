//! Keeps the store of a cluster true: list, watch, and everything that ends a watch.
//!
//! One feed for the slices and one for the services of a cluster, however many services are followed. The old state stays
//! until a whole new list has been read. A resource version is text that is handed back; no order is read into it. The
//! crate `kube` has a watcher of its own, which keeps bookmarks and the ends of watches to itself: whether a watch is
//! alive could not be seen.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use config::discovery::kubernetes::{Cluster, NamespaceSelector};
use http::Uri;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use regex::bytes::Regex;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::api::{Api, ApiError};
use super::name::Key;
use super::objects::{Bookmark, EndpointSlice, Endpoints, Event, List, Meta, Service, Status};
use super::store::{Object, Store, Table};
use crate::backoff::Backoff;
use crate::source::SourceError;

/// Objects in one answer of a list.
const PAGE: usize = 500;
/// Bytes in one answer of a list; an object has up to 1.5 MiB.
const LONGEST_PAGE: usize = 256 << 20;
/// Bytes in one line of a watch.
const LONGEST_LINE: usize = 16 << 20;
/// The first pause after a failure, where the settings do not say.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A place that has expired for one has expired for all: they do not come back together.
const RELIST_SPREAD: Duration = Duration::from_secs(1);
/// When everything is read again after the API server was away, and as much again at random.
const AFTER_FAILURE: Duration = Duration::from_secs(5);
/// Pauses between lists that fail while a watch goes on: what is known is as good as the watch.
const FIRST_RELIST: Duration = Duration::from_secs(1);
const LONGEST_RELIST: Duration = Duration::from_secs(60);
/// Services that cannot be read are mostly those that may not be.
const SERVICES_PAUSE: Duration = Duration::from_secs(10);
/// Lists that somebody asked for are at least this far apart.
const ASKED_APART: Duration = Duration::from_secs(1);
/// What the end of a watch may be late.
const GRACE: Duration = Duration::from_secs(10);
/// A watch that ends sooner without having said anything is not begun again at once.
const TOO_SHORT: Duration = Duration::from_secs(1);

const SPACE: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// What the feeds of a cluster share.
#[derive(Debug)]
pub(super) struct Shared {
    pub api: Arc<Api>,
    pub store: Arc<Store>,
    pub selection: Arc<Selection>,
    pub timing: Timing,
    /// `watch_endpoint_slices` as written.
    pub slices: Option<bool>,
    /// The number of the list that somebody waits for.
    pub wanted: AtomicU64,
    pub asked: Notify,
    /// The cluster's id, for messages.
    pub id: Arc<str>,
}

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub watch: Duration,
    pub watch_jitter: Duration,
    pub first_pause: Duration,
    pub longest_pause: Duration,
    pub relist: Duration,
}

/// Which objects are wanted.
#[derive(Debug)]
pub(super) struct Selection {
    namespace: Option<String>,
    query: String,
    admit: Admit,
}

#[derive(Debug)]
enum Admit {
    All,
    One(String),
    NotOne(String),
    Match(Vec<Regex>),
    NotMatch(Vec<Regex>),
}

/// An object of the API that is followed.
pub(super) trait Followed: DeserializeOwned + Send + 'static {
    const GROUP: &'static str;
    const PLURAL: &'static str;
    const TABLE: Table;

    fn meta(&self) -> &Meta;

    /// None if it is of no use here.
    fn object(self) -> Option<Object>;
}

/// Why a watch is over.
enum End {
    /// The server ended it, or it has been silent for too long.
    Over,
    /// Its place in the history is gone.
    Expired,
    Failed(SourceError),
}

impl Shared {
    /// Asks for a new list, and gives its number.
    pub(super) fn ask(&self) -> u64 {
        let number = self.store.status().borrow().begun + 1;
        self.wanted.fetch_max(number, Ordering::Relaxed);
        self.asked.notify_one();
        number
    }

    fn is_asked(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > self.store.status().borrow().begun
    }

    /// Until somebody waits for a list that was not begun.
    async fn until_asked(&self) {
        while !self.is_asked() {
            self.asked.notified().await;
        }
    }
}

impl Timing {
    pub(super) fn new(cluster: &Cluster) -> Self {
        let seconds = Duration::from_secs;
        let first_pause = seconds(cluster.watch_retry_interval_seconds).max(FIRST_PAUSE);
        Self {
            watch: seconds(cluster.watch_timeout_seconds),
            watch_jitter: seconds(cluster.watch_jitter_seconds),
            first_pause,
            longest_pause: seconds(cluster.watch_retry_max_seconds).max(first_pause),
            relist: seconds(cluster.relist_seconds),
        }
    }
}

impl Selection {
    pub(super) fn new(cluster: &Cluster) -> Result<Self, String> {
        let NamespaceSelector { equal, not_equal, r#match, not_match } = &cluster.namespace_selector;
        let patterns = |patterns: &[String]| {
            let whole = patterns.iter().map(|pattern| {
                // APISIX wants the first match to be the whole name.
                config::pattern::compile(&format!("^(?:{pattern})$"), false)
                    .map_err(|error| error.to_string())
            });
            whole.collect::<Result<Vec<_>, _>>()
        };
        let admit = match (equal, not_equal, r#match, not_match) {
            (Some(name), ..) => Admit::One(name.clone()),
            (_, Some(name), ..) => Admit::NotOne(name.clone()),
            (_, _, Some(list), _) => Admit::Match(patterns(list)?),
            (_, _, _, Some(list)) => Admit::NotMatch(patterns(list)?),
            _ => Admit::All,
        };
        let mut query = String::new();
        if let Some(labels) =
            cluster.label_selector.as_deref().map(str::trim).filter(|labels| !labels.is_empty())
        {
            // Quotes around values are APISIX's example; Kubernetes has none.
            let labels = labels.replace('"', "");
            query.push_str(&format!("&labelSelector={}", utf8_percent_encode(&labels, SPACE)));
        }
        if let Some(name) = not_equal {
            let field = format!("metadata.namespace!={name}");
            query.push_str(&format!("&fieldSelector={}", utf8_percent_encode(&field, SPACE)));
        }
        Ok(Self { namespace: equal.clone(), query, admit })
    }

    pub(super) fn admits(&self, namespace: &str) -> bool {
        let fits = |patterns: &[Regex]| patterns.iter().any(|pattern| pattern.is_match(namespace.as_bytes()));
        match &self.admit {
            Admit::All => true,
            Admit::One(name) => name == namespace,
            Admit::NotOne(name) => name != namespace,
            Admit::Match(patterns) => fits(patterns),
            Admit::NotMatch(patterns) => !fits(patterns),
        }
    }

    fn path(&self, group: &str, plural: &str, query: &str) -> String {
        let path = match &self.namespace {
            Some(namespace) => format!("{group}/namespaces/{namespace}/{plural}"),
            None => format!("{group}/{plural}"),
        };
        // Labels of services are not those of slices where slices are made by hand.
        let own = if plural == Service::PLURAL { "" } else { self.query.as_str() };
        let path = format!("{path}?{query}{own}");
        debug_assert!(path.parse::<Uri>().is_ok(), "{path}");
        path
    }
}

impl Followed for EndpointSlice {
    const GROUP: &'static str = "/apis/discovery.k8s.io/v1";
    const PLURAL: &'static str = "endpointslices";
    const TABLE: Table = Table::Slices;

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn object(self) -> Option<Object> {
        let (name, service) = (key(&self.metadata), self.metadata.labels.service_name.as_deref()?);
        let service = Key { namespace: Arc::clone(&name.namespace), name: service.into() };
        Some(Object::Slices { name, service, slices: Arc::from([self.keep()]) })
    }
}

impl Followed for Endpoints {
    const GROUP: &'static str = "/api/v1";
    const PLURAL: &'static str = "endpoints";
    const TABLE: Table = Table::Slices;

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn object(self) -> Option<Object> {
        let name = key(&self.metadata);
        if self.metadata.annotations.over_capacity.as_deref() == Some("truncated") {
            let (namespace, name) = (&name.namespace, &name.name);
            warn!(%namespace, %name, "the Endpoints object lacks what exceeds 1000 endpoints: watch EndpointSlices");
        }
        Some(Object::Slices { service: name.clone(), name, slices: self.keep().into() })
    }
}

impl Followed for Service {
    const GROUP: &'static str = "/api/v1";
    const PLURAL: &'static str = "services";
    const TABLE: Table = Table::Services;

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn object(self) -> Option<Object> {
        Some(Object::Service { name: key(&self.metadata), known: self.keep() })
    }
}

fn key(meta: &Meta) -> Key {
    Key { namespace: meta.namespace.as_str().into(), name: meta.name.as_str().into() }
}

/// Follows the slices, or what there was before them, for ever.
pub(super) async fn slices(shared: Arc<Shared>) {
    loop {
        match shared.slices {
            Some(true) => Feed::<EndpointSlice>::new(&shared).run(false).await,
            Some(false) => Feed::<Endpoints>::new(&shared).run(false).await,
            None => {
                Feed::<EndpointSlice>::new(&shared).run(true).await;
                info!(cluster = %shared.id, "no EndpointSlices here: Endpoints are watched");
                Feed::<Endpoints>::new(&shared).run(true).await;
            }
        }
    }
}

/// Follows the services for ever.
pub(super) async fn services(shared: Arc<Shared>) {
    Feed::<Service>::new(&shared).run(false).await;
}

struct Feed<'a, T> {
    shared: &'a Shared,
    backoff: Backoff,
    /// Pauses between lists that fail while a watch goes on.
    relists: Backoff,
    /// Where the watch goes on.
    version: String,
    relist_at: Instant,
    asked_at: Instant,
    /// The last failure has been told in the log.
    told: AtomicBool,
    kind: std::marker::PhantomData<fn() -> T>,
}

impl<'a, T: Followed> Feed<'a, T> {
    fn new(shared: &'a Shared) -> Self {
        let timing = shared.timing;
        Self {
            shared,
            backoff: Backoff::new(timing.first_pause, timing.longest_pause),
            relists: Backoff::new(FIRST_RELIST, LONGEST_RELIST),
            version: String::new(),
            relist_at: Instant::now(),
            asked_at: Instant::now(),
            told: AtomicBool::new(false),
            kind: std::marker::PhantomData,
        }
    }

    /// Runs for ever, unless there are no such objects and it is to end then.
    async fn run(mut self, end_if_missing: bool) {
        loop {
            match self.list().await {
                Ok(()) => {}
                Err(ApiError::Missing) if end_if_missing => {
                    // Nor of the other kind, perhaps: not without a pause.
                    return self.pause(None).await;
                }
                Err(error) => {
                    let error = self.error(error);
                    let wanted = error.retry_after;
                    self.fail(error);
                    self.pause(wanted).await;
                    continue;
                }
            }
            loop {
                let begun = Instant::now();
                let heard = self.shared.store.heard();
                match self.watch().await {
                    End::Over => {
                        if begun.elapsed() < TOO_SHORT && heard == self.shared.store.heard() {
                            self.pause(None).await;
                        }
                    }
                    End::Expired => {
                        debug!(cluster = %self.shared.id, kind = T::PLURAL, "the watch has expired: listing again");
                        sleep(spread(RELIST_SPREAD)).await;
                        break;
                    }
                    End::Failed(error) => {
                        let wanted = error.retry_after;
                        self.fail(error);
                        self.pause(wanted).await;
                        // The watch goes on where it was, which is quick and cheap. But who was away may have come back
                        // with an older state, and does not say so: everything is read again soon.
                        self.relist_at =
                            self.relist_at.min(Instant::now() + AFTER_FAILURE + spread(AFTER_FAILURE));
                        if T::TABLE == Table::Slices && self.shared.is_asked() {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Reads everything and puts it in place of what was known.
    async fn list(&mut self) -> Result<(), ApiError> {
        let shared = self.shared;
        let number = if T::TABLE == Table::Slices { shared.store.begin() } else { 0 };
        let mut objects = Vec::new();
        let mut proceed = String::new();
        // A list that breaks off must not move the watch past changes that it has not told yet.
        let version = loop {
            let mut query = format!("limit={PAGE}");
            if !proceed.is_empty() {
                query.push_str(&format!("&continue={}", utf8_percent_encode(&proceed, SPACE)));
            }
            let path = shared.selection.path(T::GROUP, T::PLURAL, &query);
            let body = shared.api.get(&path).await?;
            let text = shared.api.read(body, LONGEST_PAGE).await?;
            let page = serde_json::from_slice::<List<T>>(&text);
            let page = page.map_err(|error| shared.api.failed(format!("{path}: not a list: {error}")))?;
            if page.metadata.resource_version.is_empty() {
                return Err(shared.api.failed(format!("{path}: a list without a version")));
            }
            objects.extend(page.items.into_iter().filter_map(|item| self.admit(item)));
            proceed = page.metadata.proceed;
            if proceed.is_empty() {
                // The version of the last page is as good as that of the first: all are from the same moment.
                break page.metadata.resource_version;
            }
        };
        self.version = version;
        shared.store.replace(T::TABLE, objects, number);
        self.relists.reset();
        self.relist_at =
            Instant::now() + shared.timing.relist.mul_f64(2.0 / 3.0 + fastrand::f64() * 2.0 / 3.0);
        self.asked_at = Instant::now() + ASKED_APART;
        self.recover();
        Ok(())
    }

    fn admit(&self, item: T) -> Option<Object> {
        self.shared.selection.admits(&item.meta().namespace).then(|| item.object())?
    }

    /// Follows changes until the server or something else ends it. Lists again meanwhile when it is time.
    async fn watch(&mut self) -> End {
        let Shared { api, timing, .. } = self.shared;
        let length = timing.watch + spread(timing.watch_jitter);
        let version = utf8_percent_encode(&self.version, SPACE);
        let seconds = length.as_secs().max(1);
        let query =
            format!("watch=1&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={seconds}");
        let path = self.shared.selection.path(T::GROUP, T::PLURAL, &query);
        let mut body = match api.get(&path).await {
            Ok(body) => body,
            Err(error) => return self.end(error),
        };
        self.backoff.reset();
        self.recover();
        // A server that is there ends the watch by itself; one that is not says nothing, and the connection may be kept
        // open by something in between.
        let over = Instant::now() + length + GRACE;
        let mut lines = Lines::default();
        loop {
            let left = over.saturating_duration_since(Instant::now());
            // Between events there may be any time; in the middle of one there is none.
            let patience = if lines.rest() > 0 { api.patience } else { Duration::MAX };
            let piece = tokio::select! {
                piece = timeout(left, api.piece(&mut body, patience)) => piece,
                () = self.due() => {
                    match self.list().await {
                        Ok(()) => return End::Over,
                        Err(ApiError::Expired) => return End::Expired,
                        Err(error) => {
                            // The watch goes on; it is the list that failed.
                            let error = self.error(error);
                            warn!(cluster = %self.shared.id, kind = T::PLURAL, %error, "could not list again");
                            self.relist_at = Instant::now() + self.relists.pause();
                            self.asked_at = Instant::now() + ASKED_APART;
                            self.fail(error);
                            continue;
                        }
                    }
                }
            };
            let chunk = match piece {
                Err(_) => return End::Over,
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) => return End::Over,
                Ok(Err(error)) => return self.end(error),
            };
            lines.push(&chunk);
            while let Some(line) = lines.next() {
                if let Err(end) = self.event(&line) {
                    return end;
                }
            }
            if lines.rest() > LONGEST_LINE {
                return self
                    .end(api.failed(format!("a line of a watch is longer than {LONGEST_LINE} bytes")));
            }
        }
    }

    /// It is time to list again: the period is over, or somebody asks.
    async fn due(&self) {
        let asked = async {
            if T::TABLE != Table::Slices {
                std::future::pending::<()>().await;
            }
            self.shared.until_asked().await;
            sleep_until(self.asked_at).await;
        };
        tokio::select! {
            () = sleep_until(self.relist_at) => {}
            () = asked => {}
        }
    }

    /// Takes in one line of a watch.
    fn event(&mut self, line: &[u8]) -> Result<(), End> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let broken = |error: serde_json::Error| {
            // What it said is lost, so the state may be wrong from here on: everything is read again.
            warn!(cluster = %self.shared.id, kind = T::PLURAL, %error, "a watch sent something that is no event");
            End::Expired
        };
        let event: Event<'_> = serde_json::from_slice(line).map_err(broken)?;
        self.shared.store.hear();
        let text = event.object.get();
        match event.kind {
            "ERROR" => {
                let said: Status = serde_json::from_str(text).unwrap_or_default();
                return Err(self.end(self.shared.api.refusal(said.code, &said, None)));
            }
            "BOOKMARK" => {
                let bookmark: Bookmark = serde_json::from_str(text).map_err(broken)?;
                self.move_on(bookmark.metadata.resource_version);
            }
            "ADDED" | "MODIFIED" | "DELETED" => {
                let item: T = serde_json::from_str(text).map_err(broken)?;
                let (name, version) = (key(item.meta()), item.meta().resource_version.clone());
                let put = if event.kind == "DELETED" { None } else { self.admit(item) };
                match put {
                    Some(object) => self.shared.store.put(object),
                    // It was deleted, or it is of no service any more.
                    None => self.shared.store.remove(T::TABLE, &name),
                }
                self.move_on(version);
            }
            kind => debug!(cluster = %self.shared.id, kind, "an event of an unknown kind"),
        }
        Ok(())
    }

    fn move_on(&mut self, version: String) {
        if !version.is_empty() {
            self.version = version;
        }
        // Lists may fail while the watch lives: what the watch says is true all the same.
        self.recover();
    }

    fn end(&self, error: ApiError) -> End {
        match error {
            ApiError::Expired => End::Expired,
            error => End::Failed(self.error(error)),
        }
    }

    fn error(&self, error: ApiError) -> SourceError {
        match error {
            ApiError::Failed(error) => error,
            ApiError::Expired => SourceError::new(format!(
                "API server {}: 410: the list has expired",
                self.shared.api.address()
            )),
            ApiError::Missing => {
                SourceError::new(format!("API server {}: 404: no {}", self.shared.api.address(), T::PLURAL))
            }
        }
    }

    fn fail(&mut self, error: SourceError) {
        let first = !self.told.swap(true, Ordering::Relaxed);
        match T::TABLE {
            Table::Slices => self.shared.store.fail(error),
            // Endpoints are known without them.
            Table::Services if first => {
                warn!(cluster = %self.shared.id, %error, "services are not known: their ports cannot be named by number");
            }
            Table::Services => {}
        }
    }

    fn recover(&self) {
        if self.told.swap(false, Ordering::Relaxed) && T::TABLE == Table::Slices {
            self.shared.store.recover();
        }
    }

    async fn pause(&mut self, wanted: Option<Duration>) {
        let pause = self.backoff.pause().max(wanted.unwrap_or_default());
        if T::TABLE == Table::Services {
            return sleep(pause.max(SERVICES_PAUSE)).await;
        }
        tokio::select! {
            () = sleep(pause) => {}
            // Somebody wants to know now: the pause is cut short, but not to nothing.
            () = async { self.shared.until_asked().await; sleep(FIRST_PAUSE).await } => {}
        }
    }
}

fn spread(most: Duration) -> Duration {
    most.mul_f64(fastrand::f64())
}

/// Bytes as they come, lines as they are complete.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to here there is no end of a line.
    looked: usize,
}

impl Lines {
    fn push(&mut self, chunk: &[u8]) {
        self.bytes.drain(..self.start);
        self.looked -= self.start;
        self.start = 0;
        self.bytes.extend_from_slice(chunk);
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let found = self.bytes.get(self.looked..)?.iter().position(|byte| *byte == b'\n');
        let Some(found) = found else {
            self.looked = self.bytes.len();
            return None;
        };
        let end = self.looked + found;
        let line = self.bytes.get(self.start..end)?.to_vec();
        self.start = end + 1;
        self.looked = self.start;
        Some(line)
    }

    /// Bytes of the line that is not complete.
    fn rest(&self) -> usize {
        self.bytes.len() - self.start
    }
}
