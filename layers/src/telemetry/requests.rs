//! Requests counted by route, service and consumer: the numbers behind the `prometheus` plugin.
//!
//! Each worker adds to series of its own, found by one look-up in a table that no other worker uses, so counting a
//! request touches no shared cache line. A scrape sums the workers' series from the control side. The number of label
//! sets has a limit; what comes after it is counted under the label value `other`.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use config::template::Template;
use config::var::Vars;
use hashbrown::HashMap;

use super::counter::{CELLS, Counter, Padded, cell};
use super::exposition::{Exposition, Thousandths};
use super::names;

/// A family of the request metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `http_status`
    Status,
    /// `http_latency`
    Latency,
    /// `bandwidth`
    Bandwidth,
}

impl Family {
    /// All of them, in the order in which settings hold them.
    pub const ALL: [Family; 3] = [Family::Status, Family::Latency, Family::Bandwidth];

    /// The metric's name, without prefix.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Status => names::HTTP_STATUS.name,
            Family::Latency => names::HTTP_LATENCY.name,
            Family::Bandwidth => names::BANDWIDTH.name,
        }
    }

    /// The labels that every series of the family has.
    pub const fn labels(self) -> &'static [Label] {
        use Label::{
            Code, Consumer, LlmModel, MatchedHost, MatchedUri, Node, RequestLlmModel, RequestType, Route,
            Service, Type,
        };
        match self {
            Family::Status => &[
                Code,
                Route,
                MatchedUri,
                MatchedHost,
                Service,
                Consumer,
                Node,
                RequestType,
                RequestLlmModel,
                LlmModel,
            ],
            Family::Latency | Family::Bandwidth => {
                &[Type, Route, Service, Consumer, Node, RequestType, RequestLlmModel, LlmModel]
            }
        }
    }
}

macro_rules! labels {
    ($($id:ident $name:literal),* $(,)?) => {
        /// A label of the request metrics.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "the names say it")]
        pub enum Label { $($id),* }

        impl Label {
            /// As it stands in the text.
            pub const fn name(self) -> &'static str {
                match self { $(Label::$id => $name),* }
            }
        }
    };
}

labels! {
    Code "code", Type "type", Route "route", MatchedUri "matched_uri", MatchedHost "matched_host", Service "service",
    Consumer "consumer", Node "node", RequestType "request_type", RequestLlmModel "request_llm_model",
    LlmModel "llm_model",
}

/// Labels whose values are left empty, by family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DisabledLabels(u64);

/// Bits of a family in [`DisabledLabels`]; there are fewer labels.
const FAMILY_BITS: u32 = 16;

impl DisabledLabels {
    /// Adds a label of a family.
    pub fn disable(&mut self, family: Family, label: Label) {
        self.0 |= 1 << (family as u32 * FAMILY_BITS + label as u32);
    }

    fn contains(self, family: Family, label: Label) -> bool {
        self.0 & (1 << (family as u32 * FAMILY_BITS + label as u32)) != 0
    }

    /// No family that has the label shows it, so it need not be told apart.
    fn everywhere(self, label: Label) -> bool {
        Family::ALL.iter().all(|family| !family.labels().contains(&label) || self.contains(*family, label))
    }
}

/// A label with a value of the operator's choice.
#[derive(Clone, Debug)]
pub struct ExtraLabel {
    /// Its name.
    pub name: Box<str>,
    /// Its value, rendered for each request.
    pub value: Template,
}

/// How request metrics are kept and shown. Fixed at the start of the process.
#[derive(Clone, Debug)]
pub struct RequestSettings {
    /// Stands before the names of APISIX's metrics.
    pub prefix: Box<str>,
    /// Upper bounds of the latency buckets in milliseconds, ascending.
    pub buckets: Box<[f64]>,
    /// Labels added by the operator, by family in the order of [`Family::ALL`].
    pub extra: [Vec<ExtraLabel>; 3],
    /// How long a series without requests is shown, by family; for ever where there is nothing.
    pub expire: [Option<Duration>; 3],
    /// Whether the label `node` tells the upstream node's address. Off, because in a place where nodes come and go it
    /// multiplies the series without end.
    pub node_label: bool,
    /// Label sets that are told apart.
    pub series_limit: usize,
}

impl Default for RequestSettings {
    fn default() -> Self {
        Self {
            prefix: "apisix_".into(),
            buckets: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000]
                .map(f64::from)
                .into(),
            extra: Default::default(),
            expire: [None; 3],
            node_label: false,
            series_limit: 10_000,
        }
    }
}

/// One request that is over.
#[derive(Clone, Copy, Debug)]
pub struct Observation<'a> {
    /// The route's id or name; empty when none matched.
    pub route: &'a str,
    /// The URI pattern that matched.
    pub matched_uri: &'a str,
    /// The host pattern that matched.
    pub matched_host: &'a str,
    /// The service's id or name.
    pub service: &'a str,
    /// The consumer's name.
    pub consumer: &'a str,
    /// The node's address.
    pub node: &'a str,
    /// The status that was sent.
    pub code: u16,
    /// From the request's head to its end.
    pub total: Duration,
    /// The part of it that the upstream took, if it was asked.
    pub upstream: Option<Duration>,
    /// Bytes received.
    pub ingress: u64,
    /// Bytes sent.
    pub egress: u64,
}

/// Between the values of a key. No header field, host or id holds it.
const SEPARATOR: char = '\u{1f}';
/// Longest value of an extra label, in bytes: it may come from the client.
const EXTRA_LENGTH: usize = 128;
/// Status codes kept without a lock.
const CODES: usize = 8;
/// Idle series go after this time when the limit is near.
const IDLE: Duration = Duration::from_secs(3600);
/// What stands for everything over the limit.
const OTHER: &str = "other";

#[derive(Debug)]
struct Histogram {
    /// Counts by bucket, not cumulated; the last one is for all that is larger.
    buckets: Box<[AtomicU64]>,
    micros: AtomicU64,
}

impl Histogram {
    fn new(buckets: usize) -> Self {
        Self { buckets: (0..=buckets).map(|_| AtomicU64::new(0)).collect(), micros: AtomicU64::new(0) }
    }

    fn observe(&self, bounds: &[f64], took: Duration) {
        let millis = took.as_secs_f64() * 1e3;
        let bucket = bounds.partition_point(|bound| *bound < millis);
        if let Some(count) = self.buckets.get(bucket) {
            bump(count, 1);
        }
        bump(&self.micros, u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }
}

/// Adds to a value that only the holder of the shard's lock writes: no read-modify-write is needed.
fn bump(value: &AtomicU64, n: u64) {
    value.store(value.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// The numbers of one label set and one worker. Written under the shard's lock, read without.
#[derive(Debug)]
struct Series {
    key: Box<str>,
    cell: usize,
    codes: [(AtomicU32, AtomicU64); CODES],
    more_codes: Mutex<Vec<(u16, u64)>>,
    /// `request`, `upstream`, `apisix`.
    latency: [Histogram; 3],
    ingress: AtomicU64,
    egress: AtomicU64,
    /// Milliseconds since the table was made.
    touched: AtomicU64,
}

const LATENCY_TYPES: [&str; 3] = ["request", "upstream", "apisix"];

impl Series {
    fn new(key: &str, cell: usize, buckets: usize) -> Self {
        Self {
            key: key.into(),
            cell,
            codes: Default::default(),
            more_codes: Mutex::default(),
            latency: std::array::from_fn(|_| Histogram::new(buckets)),
            ingress: AtomicU64::new(0),
            egress: AtomicU64::new(0),
            touched: AtomicU64::new(0),
        }
    }

    fn count(&self, code: u16) {
        for (slot, count) in &self.codes {
            let known = slot.load(Ordering::Relaxed);
            if known == 0 {
                bump(count, 1);
                // The reader takes the count only after it has seen the code.
                slot.store(u32::from(code), Ordering::Release);
                return;
            }
            if known == u32::from(code) {
                bump(count, 1);
                return;
            }
        }
        let mut more = lock(&self.more_codes);
        match more.iter_mut().find(|(known, _)| *known == code) {
            Some((_, count)) => *count += 1,
            None => more.push((code, 1)),
        }
    }

    fn observe(&self, o: &Observation<'_>, bounds: &[f64], now: u64) {
        self.count(o.code);
        let [request, upstream, gateway] = &self.latency;
        request.observe(bounds, o.total);
        if let Some(took) = o.upstream {
            upstream.observe(bounds, took);
        }
        gateway.observe(bounds, o.total.saturating_sub(o.upstream.unwrap_or_default()));
        bump(&self.ingress, o.ingress);
        bump(&self.egress, o.egress);
        self.touched.store(now, Ordering::Relaxed);
    }

    fn counts(&self) -> Vec<(u16, u64)> {
        let mut counts: Vec<(u16, u64)> = self
            .codes
            .iter()
            .filter_map(|(code, count)| {
                let code = u16::try_from(code.load(Ordering::Acquire)).ok().filter(|code| *code != 0)?;
                Some((code, count.load(Ordering::Relaxed)))
            })
            .collect();
        counts.extend(lock(&self.more_codes).iter());
        counts
    }
}

/// A worker's series, by key.
#[derive(Debug, Default)]
struct Shard {
    series: HashMap<Box<str>, Arc<Series>>,
    /// The key of the request at hand; kept for its memory.
    key: String,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The table of all series.
#[derive(Debug)]
pub struct RequestMetrics {
    settings: RequestSettings,
    disabled: AtomicU64,
    shards: [Padded<Mutex<Shard>>; CELLS],
    /// Every series of every shard, by key. Taken when a series is made or dropped and for a moment by a scrape.
    all: Mutex<HashMap<Box<str>, Vec<Arc<Series>>>>,
    overflow: Counter,
    start: Instant,
}

impl RequestMetrics {
    /// An empty table.
    pub fn new(settings: RequestSettings) -> Self {
        Self {
            settings,
            disabled: AtomicU64::new(0),
            shards: Default::default(),
            all: Mutex::default(),
            overflow: Counter::default(),
            start: Instant::now(),
        }
    }

    /// How it was set up.
    pub fn settings(&self) -> &RequestSettings {
        &self.settings
    }

    /// Leaves the values of these labels empty from now on, in what was counted before too.
    pub fn disable_labels(&self, labels: DisabledLabels) {
        self.disabled.store(labels.0, Ordering::Relaxed);
    }

    /// Requests that were counted under `other` because of the limit.
    pub fn overflowed(&self) -> u64 {
        self.overflow.value()
    }

    /// Label sets there are now.
    pub fn series(&self) -> usize {
        lock(&self.all).len()
    }

    /// Counts a request that ended at `now`. `vars` gives the values of extra labels.
    pub fn observe<V: Vars + ?Sized>(&self, o: &Observation<'_>, vars: &V, now: Instant) {
        let cell = cell();
        let Some(Padded(shard)) = self.shards.get(cell) else { return };
        let mut shard = lock(shard);
        let Shard { series, key } = &mut *shard;
        self.write_key(key, o, vars);
        let now = self.millis(now);
        match series.get(key.as_str()) {
            Some(known) => known.observe(o, &self.settings.buckets, now),
            None => self.add(series, key, cell).observe(o, &self.settings.buckets, now),
        }
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.start).as_millis()).unwrap_or(u64::MAX)
    }

    fn write_key<V: Vars + ?Sized>(&self, key: &mut String, o: &Observation<'_>, vars: &V) {
        let disabled = DisabledLabels(self.disabled.load(Ordering::Relaxed));
        key.clear();
        for (label, value) in [
            (Label::Route, o.route),
            (Label::MatchedUri, o.matched_uri),
            (Label::MatchedHost, o.matched_host),
            (Label::Service, o.service),
            (Label::Consumer, o.consumer),
            (Label::Node, o.node),
        ] {
            if disabled == DisabledLabels::default() || !disabled.everywhere(label) {
                key.push_str(value);
            }
            key.push(SEPARATOR);
        }
        for extra in self.settings.extra.iter().flatten() {
            let before = key.len();
            extra.value.render(vars, key);
            if let Some(value) = key.get(before..)
                && (value.len() > EXTRA_LENGTH || value.contains(SEPARATOR))
            {
                let value = value.replace(SEPARATOR, " ");
                key.truncate(before);
                key.push_str(truncated(&value));
            }
            key.push(SEPARATOR);
        }
    }

    /// Makes the worker's series of a label set, or finds the one that stands for all others.
    fn add(&self, series: &mut HashMap<Box<str>, Arc<Series>>, key: &str, cell: usize) -> Arc<Series> {
        let mut all = lock(&self.all);
        let full = all.len() >= self.settings.series_limit && !all.contains_key(key);
        let key = if full { self.other() } else { key.into() };
        if full {
            self.overflow.inc();
            if let Some(other) = series.get(&key) {
                return other.clone();
            }
        }
        let made = Arc::new(Series::new(&key, cell, self.settings.buckets.len()));
        all.entry(key.clone()).or_default().push(made.clone());
        series.insert(key, made.clone());
        made
    }

    fn other(&self) -> Box<str> {
        let mut key = String::from(OTHER);
        let extras: usize = self.settings.extra.iter().map(Vec::len).sum();
        key.extend(std::iter::repeat_n(SEPARATOR, 6 + extras));
        key.into()
    }

    /// Drops series that no family shows any more, and idle ones when the limit is near. For the control side.
    pub fn sweep(&self, now: Instant) {
        let now = self.millis(now);
        let limit = self.limit_of_idleness();
        let Some(limit) = limit else { return };
        let idle = |series: &[Arc<Series>]| {
            series.iter().all(|one| now.saturating_sub(one.touched.load(Ordering::Relaxed)) > limit)
        };
        let candidates: Vec<(Box<str>, Vec<Arc<Series>>)> = lock(&self.all)
            .iter()
            .filter(|(_, series)| idle(series))
            .map(|(key, series)| (key.clone(), series.clone()))
            .collect();
        for (key, series) in candidates {
            let mut cells: Vec<usize> = series.iter().map(|one| one.cell).collect();
            cells.sort_unstable();
            // In ascending order, so that two sweeps cannot wait for each other.
            let mut shards: Vec<_> = cells
                .iter()
                .filter_map(|cell| self.shards.get(*cell))
                .map(|Padded(shard)| lock(shard))
                .collect();
            let mut all = lock(&self.all);
            // A worker may have counted, or another may have joined, since the look from outside.
            let unchanged = all.get(&key).is_some_and(|known| known.len() == series.len() && idle(known));
            if unchanged {
                all.remove(&key);
                shards.iter_mut().for_each(|shard| {
                    shard.series.remove(&key);
                });
            }
        }
    }

    /// After how many milliseconds without a request a series may go; nothing while none may.
    fn limit_of_idleness(&self) -> Option<u64> {
        let expired = self
            .settings
            .expire
            .iter()
            .copied()
            .collect::<Option<Vec<Duration>>>()
            .and_then(|all| all.into_iter().max());
        let crowded = self.series() * 10 >= self.settings.series_limit * 9;
        let limit = match (expired, crowded) {
            (Some(expire), true) => Some(expire.min(IDLE)),
            (Some(expire), false) => Some(expire),
            (None, true) => Some(IDLE),
            (None, false) => None,
        };
        limit.map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX))
    }

    /// Writes the three families as they are at `now`.
    pub fn expose(&self, out: &mut Exposition, now: Instant) {
        let now = self.millis(now);
        let all: Vec<Vec<Arc<Series>>> = lock(&self.all).values().cloned().collect();
        for family in Family::ALL {
            let expire = self.settings.expire.get(family as usize).copied().flatten();
            let shown = all.iter().filter(|series| {
                let last = series.iter().map(|one| one.touched.load(Ordering::Relaxed)).max().unwrap_or(0);
                expire.is_none_or(|limit| u128::from(now.saturating_sub(last)) <= limit.as_millis())
            });
            match family {
                Family::Status => self.expose_status(out, shown.flatten()),
                Family::Latency => self.expose_latency(out, shown.flatten()),
                Family::Bandwidth => self.expose_bandwidth(out, shown.flatten()),
            }
        }
    }

    fn expose_status<'a>(&self, out: &mut Exposition, series: impl Iterator<Item = &'a Arc<Series>>) {
        let mut sums = std::collections::BTreeMap::<String, u64>::new();
        for one in series {
            for (code, count) in one.counts() {
                let labels = self.labels(Family::Status, &one.key, &code.to_string());
                *sums.entry(labels).or_default() += count;
            }
        }
        out.family(&self.settings.prefix, &names::HTTP_STATUS);
        for (labels, sum) in sums {
            out.sample_of(&self.settings.prefix, names::HTTP_STATUS.name, &labels, sum);
        }
    }

    fn expose_bandwidth<'a>(&self, out: &mut Exposition, series: impl Iterator<Item = &'a Arc<Series>>) {
        let mut sums = std::collections::BTreeMap::<String, u64>::new();
        for one in series {
            for (kind, bytes) in [("ingress", &one.ingress), ("egress", &one.egress)] {
                let labels = self.labels(Family::Bandwidth, &one.key, kind);
                *sums.entry(labels).or_default() += bytes.load(Ordering::Relaxed);
            }
        }
        out.family(&self.settings.prefix, &names::BANDWIDTH);
        for (labels, sum) in sums {
            out.sample_of(&self.settings.prefix, names::BANDWIDTH.name, &labels, sum);
        }
    }

    fn expose_latency<'a>(&self, out: &mut Exposition, series: impl Iterator<Item = &'a Arc<Series>>) {
        let mut sums = std::collections::BTreeMap::<String, (Vec<u64>, u64)>::new();
        for one in series {
            for (kind, histogram) in LATENCY_TYPES.iter().zip(&one.latency) {
                let counts: Vec<u64> =
                    histogram.buckets.iter().map(|count| count.load(Ordering::Relaxed)).collect();
                if counts.iter().all(|count| *count == 0) {
                    continue;
                }
                let labels = self.labels(Family::Latency, &one.key, kind);
                let (sum, micros) = sums.entry(labels).or_insert_with(|| (vec![0; counts.len()], 0));
                sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                *micros += histogram.micros.load(Ordering::Relaxed);
            }
        }
        let (prefix, name) = (&*self.settings.prefix, names::HTTP_LATENCY.name);
        out.family(prefix, &names::HTTP_LATENCY);
        let bounds: Vec<String> = self.settings.buckets.iter().map(f64::to_string).collect();
        for (labels, (counts, micros)) in sums {
            let mut below = 0;
            let bounds = bounds.iter().map(String::as_str).chain(["+Inf"]);
            for (bound, count) in bounds.zip(&counts) {
                below += count;
                out.sample_of(prefix, &format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), below);
            }
            out.sample_of(prefix, &format!("{name}_sum"), &labels, Thousandths(micros));
            out.sample_of(prefix, &format!("{name}_count"), &labels, below);
        }
    }

    /// The labels of a series, as they stand between the braces. `first` is the value of `code` or `type`.
    fn labels(&self, family: Family, key: &str, first: &str) -> String {
        let disabled = DisabledLabels(self.disabled.load(Ordering::Relaxed));
        let mut values = key.split(SEPARATOR);
        let mut fixed: [&str; 6] = [""; 6];
        fixed.iter_mut().for_each(|value| *value = values.next().unwrap_or_default());
        let [route, matched_uri, matched_host, service, consumer, node] = fixed;
        let mut text = String::with_capacity(key.len() + 160);
        for label in family.labels() {
            let value = match label {
                Label::Code | Label::Type => first,
                Label::Route => route,
                Label::MatchedUri => matched_uri,
                Label::MatchedHost => matched_host,
                Label::Service => service,
                Label::Consumer => consumer,
                Label::Node => node,
                Label::RequestType => "traditional_http",
                Label::RequestLlmModel | Label::LlmModel => "",
            };
            let value = if disabled.contains(family, *label) { "" } else { value };
            Exposition::label(&mut text, label.name(), value);
        }
        for (of, extra) in
            self.settings.extra.iter().enumerate().flat_map(|(i, e)| e.iter().map(move |e| (i, e)))
        {
            let value = values.next().unwrap_or_default();
            if of == family as usize {
                Exposition::label(&mut text, &extra.name, value);
            }
        }
        text
    }
}

fn truncated(value: &str) -> &str {
    let end = (0..=EXTRA_LENGTH.min(value.len())).rev().find(|end| value.is_char_boundary(*end)).unwrap_or(0);
    value.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use config::var::Var;

    use super::*;

    struct Request(&'static str);

    impl Vars for Request {
        fn get<'a>(&'a self, _: &Var) -> Option<Cow<'a, str>> {
            Some(Cow::Borrowed(self.0))
        }
    }

    fn observation(route: &str, code: u16) -> Observation<'_> {
        Observation {
            route,
            matched_uri: "/a*",
            matched_host: "",
            service: "s",
            consumer: "jack",
            node: "",
            code,
            total: Duration::from_micros(3_500),
            upstream: Some(Duration::from_micros(3_000)),
            ingress: 100,
            egress: 2_000,
        }
    }

    fn text(metrics: &RequestMetrics, now: Instant) -> String {
        let mut out = Exposition::default();
        metrics.expose(&mut out, now);
        out.finish()
    }

    #[test]
    fn a_request_is_told_as_in_apisix() {
        let metrics = RequestMetrics::new(RequestSettings::default());
        metrics.observe(&observation("1", 200), &Request(""), metrics.start);
        let text = text(&metrics, metrics.start);
        let rest = "service=\"s\",consumer=\"jack\",node=\"\",request_type=\"traditional_http\",\
                    request_llm_model=\"\",llm_model=\"\"";
        for line in [
            format!(
                "apisix_http_status{{code=\"200\",route=\"1\",matched_uri=\"/a*\",matched_host=\"\",{rest}}} 1"
            ),
            format!("apisix_http_latency_bucket{{type=\"request\",route=\"1\",{rest},le=\"2\"}} 0"),
            format!("apisix_http_latency_bucket{{type=\"request\",route=\"1\",{rest},le=\"5\"}} 1"),
            format!("apisix_http_latency_bucket{{type=\"upstream\",route=\"1\",{rest},le=\"+Inf\"}} 1"),
            format!("apisix_http_latency_sum{{type=\"apisix\",route=\"1\",{rest}}} 0.5"),
            format!("apisix_http_latency_count{{type=\"request\",route=\"1\",{rest}}} 1"),
            format!("apisix_bandwidth{{type=\"ingress\",route=\"1\",{rest}}} 100"),
            format!("apisix_bandwidth{{type=\"egress\",route=\"1\",{rest}}} 2000"),
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let metrics = RequestMetrics::new(RequestSettings::default());
        let exact = Observation { total: Duration::from_millis(5), upstream: None, ..observation("1", 200) };
        metrics.observe(&exact, &Request(""), metrics.start);
        let text = text(&metrics, metrics.start);
        assert!(text.contains("le=\"2\"} 0") && text.contains("le=\"5\"} 1"), "{text}");
        assert!(!text.contains("type=\"upstream\""), "no upstream was asked");
    }

    #[test]
    fn workers_add_up_exactly_and_every_code_is_kept() {
        let metrics = RequestMetrics::new(RequestSettings::default());
        std::thread::scope(|scope| {
            for _ in 0..CELLS + 2 {
                scope.spawn(|| {
                    for n in 0..600_u16 {
                        metrics.observe(&observation("1", 200 + n % 30), &Request(""), metrics.start);
                    }
                });
            }
        });
        let text = text(&metrics, metrics.start);
        let counts: Vec<u64> = text
            .lines()
            .filter(|line| line.starts_with("apisix_http_status{"))
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(counts, [(CELLS as u64 + 2) * 20; 30]);
    }

    #[test]
    fn series_over_the_limit_are_counted_as_other() {
        let metrics = RequestMetrics::new(RequestSettings { series_limit: 2, ..Default::default() });
        for route in ["1", "2", "3", "4", "1"] {
            metrics.observe(&observation(route, 200), &Request(""), metrics.start);
        }
        let text = text(&metrics, metrics.start);
        assert!(text.contains("code=\"200\",route=\"other\",matched_uri=\"\""), "{text}");
        assert!(!text.contains("route=\"3\""));
        assert_eq!(metrics.overflowed(), 2);
        assert_eq!(metrics.series(), 3);
    }

    #[test]
    fn extra_labels_belong_to_their_family_and_are_cut() {
        let extra = ExtraLabel { name: "x".into(), value: Template::parse("$http_x") };
        let settings = RequestSettings { extra: [vec![extra], vec![], vec![]], ..Default::default() };
        let metrics = RequestMetrics::new(settings);
        let long: &'static str = "é".repeat(100).leak();
        metrics.observe(&observation("1", 200), &Request(long), metrics.start);
        metrics.observe(&observation("1", 200), &Request("a\u{1f}b"), metrics.start);
        let text = text(&metrics, metrics.start);
        assert!(text.contains(&format!("llm_model=\"\",x=\"{}\"}} 1", "é".repeat(64))), "{text}");
        assert!(text.contains("x=\"a b\"} 1"));
        assert!(text.lines().filter(|line| line.starts_with("apisix_bandwidth{")).count() == 2, "{text}");
    }

    #[test]
    fn disabled_labels_are_empty_and_their_series_are_one() {
        let metrics = RequestMetrics::new(RequestSettings::default());
        metrics.observe(&observation("1", 200), &Request(""), metrics.start);
        let mut disabled = DisabledLabels::default();
        Family::ALL.into_iter().for_each(|family| disabled.disable(family, Label::Route));
        metrics.disable_labels(disabled);
        metrics.observe(&observation("2", 200), &Request(""), metrics.start);
        metrics.observe(&observation("3", 200), &Request(""), metrics.start);
        assert_eq!(metrics.series(), 2);
        let text = text(&metrics, metrics.start);
        assert!(text.contains("apisix_http_status{code=\"200\",route=\"\",matched_uri=\"/a*\""), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("apisix_http_status{")).count(), 1);
    }

    #[test]
    fn a_series_without_requests_goes_when_its_time_is_over() {
        let hour = Duration::from_secs(3600);
        let settings = RequestSettings { expire: [Some(hour); 3], ..Default::default() };
        let metrics = RequestMetrics::new(settings);
        metrics.observe(&observation("1", 200), &Request(""), metrics.start);
        metrics.observe(&observation("2", 200), &Request(""), metrics.start + hour);
        let later = metrics.start + hour + Duration::from_secs(1);
        assert!(!text(&metrics, later).contains("route=\"1\""));
        metrics.sweep(later);
        assert_eq!(metrics.series(), 1);
        metrics.observe(&observation("1", 200), &Request(""), later);
        assert!(text(&metrics, later).contains("route=\"1\""));
    }

    #[test]
    fn without_an_expiry_idle_series_go_only_when_the_limit_is_near() {
        let metrics = RequestMetrics::new(RequestSettings { series_limit: 2, ..Default::default() });
        metrics.observe(&observation("1", 200), &Request(""), metrics.start);
        metrics.sweep(metrics.start + IDLE * 2);
        assert_eq!(metrics.series(), 1);
        metrics.observe(&observation("2", 200), &Request(""), metrics.start + IDLE * 2);
        metrics.sweep(metrics.start + IDLE * 2);
        assert_eq!(metrics.series(), 1);
        assert!(text(&metrics, metrics.start).contains("route=\"2\""));
    }
}
