//! The metrics of the process, shared by workers and the control side.
//!
//! Workers add to sharded atomics; [`Metrics::render`] sums them up on the control side and makes no worker wait. What
//! lives elsewhere (health of nodes, items of the configuration) is written by collectors that its owner registers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::counter::{Counter, Gauge};
use super::exposition::Exposition;
use super::log_shipping::LogShipping;
use super::names::{self, Metric};
use super::requests::{RequestMetrics, RequestSettings};
use crate::error::Reason;

/// What the workers have seen at the door: totals since the start, except where said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Door {
    /// Connections taken from the listening sockets.
    pub accepted: u64,
    /// Of those, closed at once because there are too many.
    pub refused: u64,
    /// Of those, closed because the TLS handshake or the PROXY protocol header failed.
    pub failed: u64,
    /// Open now.
    pub active: u64,
    /// Requests received.
    pub received: u64,
    /// Requests at work now: from the head to the end of the answer.
    pub in_flight: u64,
}

/// Answers by the gateway itself, by reason.
#[derive(Debug)]
pub struct Answers(Vec<(Reason, Counter)>);

impl Default for Answers {
    fn default() -> Self {
        Self(Reason::ALL.iter().map(|reason| (*reason, Counter::default())).collect())
    }
}

impl Answers {
    /// Counts one.
    pub fn inc(&self, reason: Reason) {
        if let Some((_, counter)) = self.0.get(reason as usize) {
            counter.inc();
        }
    }
}

/// The configuration in use.
#[derive(Debug, Default)]
pub struct Configuration {
    /// The store's revision.
    pub revision: Gauge,
    /// Publications.
    pub published: Counter,
    /// Seconds since 1970, 0 while there is contact to the store.
    stale_since: AtomicU64,
}

impl Configuration {
    /// Contact to the store was lost at `since`.
    pub fn stale(&self, since: SystemTime) {
        let seconds = since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.stale_since.store(seconds.max(1), Ordering::Relaxed);
    }

    /// There is contact to the store.
    pub fn fresh(&self) {
        self.stale_since.store(0, Ordering::Relaxed);
    }
}

/// What became of copies of requests.
#[derive(Debug, Default)]
pub struct Mirrored {
    /// They were answered, whatever the answer was.
    pub sent: Counter,
    /// They were not: no connection, no answer in time.
    pub failed: Counter,
    /// They were not made because there is no room for them, or a body is too large or did not come to its end.
    pub dropped: Counter,
}

type Collector = Box<dyn Fn(&mut Exposition) + Send + Sync>;
type DoorReader = Box<dyn Fn() -> Door + Send + Sync>;

/// All metrics.
#[derive(Default)]
pub struct Metrics {
    /// How many requests may be at work.
    pub in_flight_limit: Gauge,
    /// Answers by the gateway itself.
    pub answers: Answers,
    /// Panics that were caught while a request was handled.
    pub panics: Counter,
    /// Further attempts after a failed one.
    pub retries: Counter,
    /// Retries that the budget did not allow.
    pub retry_budget_exhausted: Counter,
    /// Copies of requests, by what became of them.
    pub mirrored: Mirrored,
    /// The configuration in use.
    pub configuration: Configuration,
    /// Requests by route, service and consumer: what the `prometheus` plugin counts.
    pub by_route: RequestMetrics,
    /// Log entries on their way out.
    pub logs: LogShipping,
    collectors: Mutex<Vec<Collector>>,
    door: OnceLock<DoorReader>,
}

impl Default for RequestMetrics {
    fn default() -> Self {
        Self::new(RequestSettings::default())
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Metrics whose request families are set up like this.
    pub fn new(settings: RequestSettings) -> Self {
        Self { by_route: RequestMetrics::new(settings), ..Self::default() }
    }

    /// Lets `collect` write families of its own into every exposition. It runs on the control side and must not wait.
    /// Names come from [`names`].
    pub fn collector(&self, collect: impl Fn(&mut Exposition) + Send + Sync + 'static) {
        self.collectors.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(collect));
    }

    /// Asks `read` for the workers' own counters whenever metrics are rendered. The first one given stays.
    pub fn watch_door(&self, read: impl Fn() -> Door + Send + Sync + 'static) {
        let _ = self.door.set(Box::new(read));
    }

    /// What the workers have seen at the door.
    pub fn door(&self) -> Door {
        self.door.get().map(|read| read()).unwrap_or_default()
    }

    /// The prefix of APISIX's names.
    pub fn prefix(&self) -> &str {
        &self.by_route.settings().prefix
    }

    /// Everything in the text format of Prometheus. For the control side; drops expired series on the way.
    pub fn render(&self) -> String {
        let now = Instant::now();
        self.by_route.sweep(now);
        let mut out = Exposition::default();
        self.apisix(&mut out, now);
        self.postern(&mut out);
        self.logs.expose(&mut out, self.prefix());
        for collect in self.collectors.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            collect(&mut out);
        }
        out.finish()
    }

    fn apisix(&self, out: &mut Exposition, now: Instant) {
        let prefix = self.prefix();
        self.by_route.expose(out, now);
        let Door { accepted, refused, active, received, in_flight, .. } = self.door();
        out.single(prefix, &names::HTTP_REQUESTS_TOTAL, received);
        let busy = in_flight.min(active);
        // nginx's words: `writing` has a request at work, `waiting` is kept open for the next one. Heads are read
        // between two polls, so nothing is ever seen `reading`.
        let states = [
            ("accepted", accepted),
            ("active", active),
            ("handled", accepted.saturating_sub(refused)),
            ("reading", 0),
            ("waiting", active - busy),
            ("writing", busy),
        ];
        labelled(out, prefix, &names::CONNECTIONS, "state", states);
        out.single(prefix, &names::METRIC_ERRORS_TOTAL, self.by_route.overflowed());
        out.family(prefix, &names::NODE_INFO);
        out.sample(prefix, names::NODE_INFO.name, [("hostname", crate::vars::hostname())], 1);
    }

    fn postern(&self, out: &mut Exposition) {
        out.family("", &names::BUILD_INFO);
        out.sample("", names::BUILD_INFO.name, [("version", env!("CARGO_PKG_VERSION"))], 1);
        let Door { accepted, refused, failed, active, in_flight, .. } = self.door();
        let busy = in_flight.min(active);
        labelled(out, "", &names::CLIENT_CONNECTIONS, "state", [("busy", busy), ("idle", active - busy)]);
        let outcomes = [("accepted", accepted), ("failed", failed), ("refused", refused)];
        labelled(out, "", &names::CLIENT_CONNECTIONS_TOTAL, "outcome", outcomes);
        out.single("", &names::REQUESTS_IN_FLIGHT, in_flight);
        out.single("", &names::REQUESTS_IN_FLIGHT_LIMIT, self.in_flight_limit.value());
        let reasons = self.answers.0.iter().map(|(reason, counter)| (reason.code(), counter.value()));
        labelled(out, "", &names::ANSWERS_TOTAL, "reason", reasons);
        out.single("", &names::PANICS_TOTAL, self.panics.value());
        out.single("", &names::RETRIES_TOTAL, self.retries.value());
        out.single("", &names::RETRY_BUDGET_EXHAUSTED_TOTAL, self.retry_budget_exhausted.value());
        let Mirrored { sent, failed, dropped } = &self.mirrored;
        let outcomes = [("sent", sent.value()), ("failed", failed.value()), ("dropped", dropped.value())];
        labelled(out, "", &names::MIRRORED_TOTAL, "outcome", outcomes);
        out.single("", &names::CONFIG_REVISION, self.configuration.revision.value());
        out.single("", &names::CONFIG_STALE_SINCE, self.configuration.stale_since.load(Ordering::Relaxed));
        out.single("", &names::CONFIG_RELOADS_TOTAL, self.configuration.published.value());
        out.single("", &names::SERIES, self.by_route.series());
        out.single("", &names::SERIES_LIMIT, self.by_route.settings().series_limit);
    }
}

/// A family with one label.
fn labelled<'a>(
    out: &mut Exposition,
    prefix: &str,
    metric: &Metric,
    label: &'a str,
    samples: impl IntoIterator<Item = (&'a str, u64)>,
) {
    out.family(prefix, metric);
    for (value, number) in samples {
        out.sample(prefix, metric.name, [(label, value)], number);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn every_reason_has_its_counter() {
        let metrics = Metrics::default();
        metrics.answers.inc(Reason::RouteNotFound);
        metrics.answers.inc(Reason::Internal);
        let text = metrics.render();
        for reason in Reason::ALL {
            let count = u8::from(matches!(reason, Reason::RouteNotFound | Reason::Internal));
            let line = format!("postern_gateway_answers_total{{reason=\"{}\"}} {count}\n", reason.code());
            assert!(text.contains(&line), "{line}");
        }
    }

    #[test]
    fn connections_are_told_in_the_words_of_nginx() {
        let metrics = Metrics::default();
        metrics.watch_door(|| Door { accepted: 5, refused: 1, active: 4, in_flight: 1, ..Door::default() });
        let text = metrics.render();
        for (state, count) in [("accepted", 5), ("active", 4), ("handled", 4), ("waiting", 3), ("writing", 1)]
        {
            let line = format!("apisix_nginx_http_current_connections{{state=\"{state}\"}} {count}\n");
            assert!(text.contains(&line), "{line}");
        }
    }

    #[test]
    fn staleness_is_a_time_or_nothing() {
        let metrics = Metrics::default();
        metrics.configuration.stale(UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000));
        assert!(metrics.render().contains("postern_config_stale_since_seconds 1700000000\n"));
        metrics.configuration.fresh();
        assert!(metrics.render().contains("postern_config_stale_since_seconds 0\n"));
    }

    #[test]
    fn collectors_add_families() {
        let metrics = Metrics::default();
        metrics.collector(|out| out.single("", &names::CONFIG_ITEMS, 7));
        assert!(metrics.render().ends_with("postern_config_items 7\n"));
    }

    /// The only remarks are about names that APISIX chose.
    #[test]
    fn promtool_reads_the_text() {
        let metrics = Metrics::default();
        let observation = super::super::requests::Observation {
            route: "1",
            matched_uri: "/",
            matched_host: "",
            service: "",
            consumer: "",
            node: "",
            code: 200,
            total: std::time::Duration::from_millis(1),
            upstream: None,
            ingress: 1,
            egress: 1,
        };
        let request = crate::testing::exchange("GET", "http://a/").build();
        metrics.by_route.observe(&observation, &*request, Instant::now());
        let spawned = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut promtool) = spawned else {
            eprintln!("promtool is not installed: its part of the test is left out");
            return;
        };
        promtool.stdin.take().unwrap().write_all(metrics.render().as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let remarks = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let ours: Vec<&str> = remarks
            .lines()
            .filter(|line| !line.is_empty())
            .filter(|line| !["apisix_http_status ", "apisix_bandwidth "].iter().any(|n| line.starts_with(n)))
            .collect();
        assert!(ours.is_empty(), "{ours:?}");
    }
}
