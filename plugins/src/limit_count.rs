//! `limit-count`: so many requests in such a time, by client, consumer, header or anything a variable tells.
//!
//! Phase: `access`. Counts of this process are exact whichever worker serves a request, and stay over changes of the
//! configuration as long as the plugin's own settings stay. Counts in Redis are shared by all gateways with the same
//! settings in the same place, each one taken by one script, or told every `sync_interval`.

mod delayed;
mod shared;

use std::sync::Arc;
use std::time::{Duration, Instant};

use config::error::{ConfigError, ErrorKind};
use config::fields::HttpStatus;
use http::{HeaderName, HeaderValue};
use layers::exchange::Exchange;
use layers::limits::table::Owner;
use layers::limits::window::{Limit, Verdict, WindowKind, WindowTable};
use layers::plugin::{Access, AccessWaits, BuildEnv, Definition, Extras, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use crate::support::headers;
use crate::support::limiting::{self, Amount, Answers, CompiledAmount, KeySource, Message};
use crate::support::numbers::number;
use crate::support::redis::{Policy, Redis, with_redis};

use self::delayed::Ledger;

type Whole = Amount<true, false>;

with_redis! {
    /// Settings. Either `count` and `time_window`, or `rules`.
    #[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    pub struct Config {
        /// Requests allowed in `time_window`: a number, or text with variables that gives one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        count: Option<Whole>,
        /// The time in seconds: a number, or text with variables that gives one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        time_window: Option<Whole>,
        /// How time is cut.
        #[serde(default)]
        window_type: WindowType,
        /// Several limits; the first that is reached refuses the request.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(length(min = 1))]
        rules: Option<Vec<Rule>>,
        /// Objects with the same group and otherwise equal settings share their counts.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        group: Option<String>,
        /// What requests are counted by, see `key_type`. Where it has no value, the client's address stands for it.
        #[serde(default = "remote_addr")]
        key: String,
        /// How `key` is read.
        #[serde(default)]
        key_type: KeyType,
        /// The status of a refusal.
        #[serde(default = "limiting::unavailable")]
        rejected_code: HttpStatus,
        /// The text of a refusal, sent as `{"error_msg": ...}`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rejected_msg: Option<Message>,
        /// Where counts are kept.
        #[serde(default)]
        policy: Policy,
        /// Let requests pass when Redis does not answer, or `count` or `time_window` give no number; otherwise they are
        /// answered with 500.
        #[serde(default)]
        allow_degradation: bool,
        /// Tell the client limit, rest and time in header fields.
        #[serde(default = "yes")]
        show_limit_quota_header: bool,
        /// Seconds between two times at which Redis is told what was counted here; -1 to ask it for each request.
        #[serde(default = "no_interval")]
        sync_interval: Number,
    }
}

fn remote_addr() -> String {
    "remote_addr".into()
}

fn yes() -> bool {
    true
}

fn no_interval() -> Number {
    Number::from(-1)
}

/// One limit of several.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Requests allowed in `time_window`.
    count: Whole,
    /// The time in seconds.
    time_window: Whole,
    /// What requests are counted by: text with variables. Where none of them has a value, the rule does not apply.
    key: String,
    /// Stands in the names of the header fields, `X-PREFIX-RateLimit-Limit`; the number of the rule where it is
    /// missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header_prefix: Option<String>,
}

/// How time is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WindowType {
    /// A time starts with its first request and counts from zero.
    #[default]
    Fixed,
    /// The time before counts in proportion, so that there is no burst at the border of two.
    Sliding,
}

/// How `key` is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeyType {
    /// As the name of a variable.
    #[default]
    Var,
    /// As text with variables.
    VarCombination,
    /// As it is: all requests together.
    Constant,
}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The header field that tells the limit.
    #[serde(default = "limit_header")]
    limit_header: String,
    /// The header field that tells how many requests are left.
    #[serde(default = "remaining_header")]
    remaining_header: String,
    /// The header field that tells in how many seconds there is room again.
    #[serde(default = "reset_header")]
    reset_header: String,
}

fn limit_header() -> String {
    "X-RateLimit-Limit".into()
}

fn remaining_header() -> String {
    "X-RateLimit-Remaining".into()
}

fn reset_header() -> String {
    "X-RateLimit-Reset".into()
}

impl Metadata {
    /// Reads what was checked when it was stored.
    pub(crate) fn read(metadata: Option<&Value>) -> Self {
        metadata.and_then(|value| Self::deserialize(value).ok()).unwrap_or_default()
    }
}

impl Default for Metadata {
    fn default() -> Self {
        Self { limit_header: limit_header(), remaining_header: remaining_header(), reset_header: reset_header() }
    }
}

/// The plugin.
pub struct LimitCount {
    counts: Counts,
    rules: Box<[CompiledRule]>,
    kind: WindowKind,
    answers: Answers,
    show_quota: bool,
}

/// Where counts are kept.
enum Counts {
    Local(Arc<WindowTable>),
    Shared(Arc<Redis>),
    /// In Redis, told now and then; and how often.
    Delayed(Arc<Ledger>, Duration),
}

struct CompiledRule {
    /// Whose counts they are in this process.
    owner: Owner,
    /// What their names in Redis begin with.
    prefix: Box<str>,
    count: CompiledAmount<true, false>,
    window: CompiledAmount<true, false>,
    key: KeySource,
    headers: [HeaderName; 3],
}

impl Definition for LimitCount {
    const NAME: &'static str = "limit-count";
    const PRIORITY: i32 = 1002;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.checked_metadata::<Metadata>(|metadata| {
            header_names(metadata, None).err().into_iter().collect()
        });
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let own = [("count", config.count.is_some()), ("time_window", config.time_window.is_some())];
        let rules = config.rules.as_ref().map(|rules| rules.iter().map(|rule| &*rule.key));
        let mut errors = limiting::check_rules(&own, rules);
        if config.group.is_some() && config.rules.is_some() {
            errors.push(ConfigError::new("", ErrorKind::Exclusive { one: "group", other: "rules" }));
        }
        errors.extend(config.redis_settings().err());
        errors.extend(interval(config).err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::read(env.metadata);
        let plugin = Arc::new(LimitCount::new(&config, &metadata, env, &env.owner.to_string())?);
        if plugin.waits() {
            hooks.access_waits(&plugin);
        } else {
            hooks.access(&plugin);
        }
        Ok(())
    }
}

/// The time between two syncs; nothing if Redis is asked for each request.
fn interval(config: &Config) -> Result<Option<Duration>, ConfigError> {
    let seconds = config.sync_interval.as_f64().unwrap_or(-1.0);
    if config.policy == Policy::Local || seconds == -1.0 {
        return Ok(None);
    }
    let error = |what: &str| ConfigError::invalid("/sync_interval", what);
    if seconds < 0.1 {
        return Err(error("write -1, or 0.1 and more"));
    }
    if config.time_window.as_ref().and_then(Amount::known).is_some_and(|window| seconds >= window) {
        return Err(error("write less than `time_window`"));
    }
    Duration::try_from_secs_f64(seconds).map(Some).map_err(|_| error("write fewer seconds"))
}

impl Config {
    /// Whether counts are shared with other objects.
    pub(crate) fn has_group(&self) -> bool {
        self.group.is_some()
    }
}

impl LimitCount {
    /// A limit of `place`, which names the object that holds the settings.
    pub(crate) fn new(
        config: &Config,
        metadata: &Metadata,
        env: &BuildEnv<'_>,
        place: &str,
    ) -> Result<Self, ConfigError> {
        // One table for all limits: a limit that nobody reaches costs no table of its own.
        let table = env.carry.get_or("limit-count", WindowTable::default);
        // The settings are part of the name, so that counts begin anew when they change and only then.
        let settings = serde_json::to_string(config).unwrap_or_default();
        let place = config.group.as_deref().map_or_else(|| place.to_owned(), |group| format!("group/{group}"));
        let rule = |index: usize, count: &Whole, window: &Whole, key, headers| CompiledRule {
            owner: table.owner((&place, &settings, index)),
            prefix: limiting::redis_prefix(Self::NAME, &place, &settings, index).into(),
            count: count.compile(),
            window: window.compile(),
            key,
            headers,
        };
        let rules = match &config.rules {
            None => {
                let (Some(count), Some(window)) = (&config.count, &config.time_window) else {
                    return Err(ConfigError::invalid("", "write `count` and `time_window`, or `rules`"));
                };
                let key = match config.key_type {
                    KeyType::Constant => KeySource::Constant(config.key.as_str().into()),
                    KeyType::VarCombination => {
                        KeySource::new(&config.key, limiting::KeyType::VarCombination)
                    }
                    KeyType::Var => KeySource::new(&config.key, limiting::KeyType::Var),
                };
                vec![rule(0, count, window, key, header_names(metadata, None)?)]
            }
            Some(rules) => rules
                .iter()
                .enumerate()
                .map(|(index, own)| {
                    let number = (index + 1).to_string();
                    let prefix = own.header_prefix.as_deref().unwrap_or(&number);
                    let headers = header_names(metadata, Some(prefix)).map_err(|error| {
                        ConfigError::new(format!("/rules/{index}/header_prefix"), error.kind)
                    })?;
                    Ok(rule(index, &own.count, &own.time_window, KeySource::of_rule(&own.key), headers))
                })
                .collect::<Result<_, ConfigError>>()?,
        };
        let counts = match config.redis_settings()? {
            None => Counts::Local(table),
            Some(redis) => {
                let redis = Redis::open(&redis, env)?;
                match interval(config)? {
                    None => Counts::Shared(redis),
                    Some(interval) => {
                        let name = limiting::redis_prefix(Self::NAME, &place, &settings, 0);
                        Counts::Delayed(Ledger::open(&name, &redis, interval, env), interval)
                    }
                }
            }
        };
        let rejected = (config.rejected_code, config.rejected_msg.as_ref());
        let failure = matches!(counts, Counts::Shared(_) | Counts::Delayed(..)).then_some("failed to limit count");
        Ok(Self {
            counts,
            rules: rules.into(),
            kind: match config.window_type {
                WindowType::Fixed => WindowKind::Fixed,
                WindowType::Sliding => WindowKind::Sliding,
            },
            answers: Answers::new(Self::NAME, rejected, failure, config.allow_degradation),
            show_quota: config.show_limit_quota_header,
        })
    }

    /// Whether a request has to wait for Redis.
    pub(crate) fn waits(&self) -> bool {
        !matches!(self.counts, Counts::Local(_))
    }

    /// The limit of a rule for this request; nothing if the settings give no number.
    fn limit(&self, rule: &CompiledRule, x: &Exchange) -> Option<Limit> {
        let (count, seconds) = (rule.count.value(x)?, rule.window.value(x)?);
        // Both are whole and in range.
        Some(Limit { count: count as u64, window: Duration::from_secs(seconds as u64), kind: self.kind })
    }

    fn unclear(&self, x: &Exchange) -> Flow {
        self.answers.fail(x, &"no rule applies, or count or time_window give no number")
    }

    fn tell(&self, x: &mut Exchange, rule: &CompiledRule, limit: Limit, verdict: &Verdict) {
        if self.show_quota {
            tell(x, &rule.headers, limit, verdict);
        }
    }
}

impl Access for LimitCount {
    fn access(&self, x: &mut Exchange) -> Flow {
        let Counts::Local(table) = &self.counts else { return self.unclear(x) };
        let now = Instant::now();
        let mut applied = false;
        for rule in &self.rules {
            let Some(key) = rule.key.shown(x).map(|shown| shown.key(table, rule.owner)) else { continue };
            applied = true;
            let Some(limit) = self.limit(rule, x) else { return self.unclear(x) };
            let verdict = table.take(key, limit, now);
            self.tell(x, rule, limit, &verdict);
            if !verdict.allowed {
                return self.answers.refuse();
            }
        }
        // A request that no rule applies to has no limit, which APISIX takes for a fault of the settings.
        if applied { Flow::Next } else { self.unclear(x) }
    }
}

impl AccessWaits for LimitCount {
    async fn access(&self, x: &mut Exchange) -> Flow {
        let redis = match &self.counts {
            Counts::Local(_) => return Access::access(self, x),
            Counts::Shared(redis) => redis,
            Counts::Delayed(ledger, _) => ledger.redis(),
        };
        let deadline = redis.deadline();
        let mut applied = false;
        for rule in &self.rules {
            let Some(key) = rule.key.shown(x).map(|shown| shown.name(&rule.prefix)) else { continue };
            applied = true;
            let Some(limit) = self.limit(rule, x) else { return self.unclear(x) };
            let verdict = match &self.counts {
                // A time shorter than the interval would be over before Redis is told.
                Counts::Delayed(ledger, interval) if limit.window > *interval => {
                    ledger.take(key, limit, deadline).await
                }
                _ => shared::take(redis, &key, limit, 1, deadline).await,
            };
            let verdict = match verdict {
                Ok(verdict) => verdict,
                Err(failure) => return self.answers.fail(x, &failure),
            };
            self.tell(x, rule, limit, &verdict);
            if !verdict.allowed {
                return self.answers.refuse();
            }
        }
        if applied { Flow::Next } else { self.unclear(x) }
    }
}

fn header_names(metadata: &Metadata, prefix: Option<&str>) -> Result<[HeaderName; 3], ConfigError> {
    let name = |base: &str, pointer: &str| {
        let name = match prefix {
            Some(prefix) => base.replacen("RateLimit-", &format!("{prefix}-RateLimit-"), 1),
            None => base.to_owned(),
        };
        headers::name(&name, "").map_err(|error| ConfigError::new(pointer, error.kind))
    };
    Ok([
        name(&metadata.limit_header, "/limit_header")?,
        name(&metadata.remaining_header, "/remaining_header")?,
        name(&metadata.reset_header, "/reset_header")?,
    ])
}

/// Tells the client where it stands.
fn tell(x: &mut Exchange, names: &[HeaderName; 3], limit: Limit, verdict: &Verdict) {
    let reset = match limit.kind {
        WindowKind::Fixed => number(verdict.reset.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)),
        WindowKind::Sliding => hundredths(verdict.reset),
    };
    let [quota, remaining, at] = names;
    for (name, value) in [(quota, number(limit.count)), (remaining, number(verdict.remaining)), (at, reset)] {
        x.response_headers.push((name.clone(), value));
    }
}

/// Seconds with at most two decimals.
fn hundredths(time: Duration) -> HeaderValue {
    let hundredths = time.as_millis().div_ceil(10);
    if hundredths.is_multiple_of(100) {
        return number((hundredths / 100).try_into().unwrap_or(u64::MAX));
    }
    let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
    HeaderValue::try_from(text.trim_end_matches('0')).unwrap_or_else(|_| number(0))
}

#[cfg(test)]
mod tests {
    use layers::testing::{ExchangeBuilder, TestEnv, exchange, field, text};
    use serde_json::json;

    use super::*;

    /// Sends requests through one plugin object; statuses in order.
    async fn statuses(config: Value, requests: Vec<ExchangeBuilder>) -> Vec<u16> {
        let mut chain = TestEnv::default().chain::<LimitCount, _>(&config, |_| Ok(())).unwrap();
        let mut statuses = Vec::new();
        for request in requests {
            statuses.push(chain.run(request.build()).await.response.status().as_u16());
        }
        statuses
    }

    fn get() -> ExchangeBuilder {
        exchange("GET", "http://a.com/")
    }

    fn with(name: &str, value: &str) -> ExchangeBuilder {
        get().header(name, value)
    }

    #[tokio::test]
    async fn requests_are_counted_by_what_the_key_says() {
        let limit = |more: Value| {
            let mut config = json!({"count": 1, "time_window": 60, "rejected_code": 429});
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            config
        };
        let cases = [
            ("the address", limit(json!({})), vec![get(), get(), get().peer("10.0.0.1")], vec![200, 429, 200]),
            (
                "a variable",
                limit(json!({"key": "http_x_a"})),
                vec![with("x-a", "1"), with("x-a", "2"), with("x-a", "1")],
                vec![200, 200, 429],
            ),
            (
                "a variable without a value: the address",
                limit(json!({"key": "http_x_a"})),
                vec![get(), get(), get().peer("10.0.0.1")],
                vec![200, 429, 200],
            ),
            (
                "an empty value is a value",
                limit(json!({"key": "http_x_a"})),
                vec![with("x-a", ""), get(), with("x-a", "")],
                vec![200, 200, 429],
            ),
            (
                "a combination",
                limit(json!({"key": "$remote_addr $http_x_a", "key_type": "var_combination"})),
                vec![with("x-a", "1"), with("x-a", "2"), with("x-a", "1"), with("x-a", "1").peer("10.0.0.1")],
                vec![200, 200, 429, 200],
            ),
            (
                "a combination without values: the address",
                limit(json!({"key": "$http_x_a $http_x_b", "key_type": "var_combination"})),
                vec![get(), get(), get().peer("10.0.0.1")],
                vec![200, 429, 200],
            ),
            (
                "everybody together",
                limit(json!({"key": "all", "key_type": "constant"})),
                vec![get(), get().peer("10.0.0.1")],
                vec![200, 429],
            ),
        ];
        for (name, config, requests, expected) in cases {
            assert_eq!(statuses(config, requests).await, expected, "{name}");
        }
    }

    #[tokio::test]
    async fn the_client_is_told_where_it_stands() {
        let config = json!({"count": 2, "time_window": 60});
        let mut chain = TestEnv::default().chain::<LimitCount, _>(&config, |_| Ok(())).unwrap();
        for (status, remaining) in [(200, "1"), (200, "0"), (503, "0")] {
            let x = chain.run(get().build()).await;
            assert_eq!(x.response.status(), status);
            assert_eq!(field(&x, "x-ratelimit-limit"), "2");
            assert_eq!(field(&x, "x-ratelimit-remaining"), remaining);
            assert_eq!(field(&x, "x-ratelimit-reset"), "60");
        }
        let config = json!({"count": 2, "time_window": 60, "show_limit_quota_header": false});
        let mut chain = TestEnv::default().chain::<LimitCount, _>(&config, |_| Ok(())).unwrap();
        assert_eq!(field(&chain.run(get().build()).await, "x-ratelimit-limit"), "");
    }

    #[tokio::test]
    async fn a_refusal_has_the_page_of_its_status_or_the_message() {
        let mut config = json!({"count": 1, "time_window": 60});
        let mut chain = TestEnv::default().chain::<LimitCount, _>(&config, |_| Ok(())).unwrap();
        chain.run(get().build()).await;
        let mut x = chain.run(get().build()).await;
        assert!(text(&mut x).await.contains("503 Service Unavailable"));
        config["rejected_msg"] = "slow down".into();
        config["rejected_code"] = 429.into();
        let mut chain = TestEnv::default().chain::<LimitCount, _>(&config, |_| Ok(())).unwrap();
        chain.run(get().build()).await;
        let mut x = chain.run(get().build()).await;
        assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (429, "{\"error_msg\":\"slow down\"}\n"));
    }

    #[tokio::test]
    async fn every_rule_that_applies_has_to_allow() {
        let config = json!({"rejected_code": 429, "rules": [
            {"count": 1, "time_window": 10, "key": "$http_x_a"},
            {"count": "${http_x_limit ?? 2}", "time_window": "60", "key": "${http_x_b}", "header_prefix": "b"},
        ]});
        let mut chain = TestEnv::default().chain::<LimitCount, _>(&config, |_| Ok(())).unwrap();
        let x = chain.run(with("x-a", "1").header("x-b", "1").build()).await;
        assert_eq!(x.response.status(), 200);
        assert_eq!((field(&x, "x-1-ratelimit-limit"), field(&x, "x-b-ratelimit-remaining")), ("1", "1"));
        let x = chain.run(with("x-b", "1").build()).await;
        assert_eq!((x.response.status().as_u16(), field(&x, "x-1-ratelimit-limit")), (200, ""));
        assert_eq!(chain.run(with("x-b", "1").build()).await.response.status(), 429);
        assert_eq!(chain.run(with("x-b", "1").header("x-limit", "5").build()).await.response.status(), 200);
        assert_eq!(chain.run(with("x-a", "1").build()).await.response.status(), 429);
        assert_eq!(chain.run(get().build()).await.response.status(), 500, "no rule applies");
    }

    #[tokio::test]
    async fn a_client_cannot_switch_a_rule_off_by_a_number_it_spoils() {
        let config = json!({"rules": [
            {"count": "$http_x_n", "time_window": 60, "key": "$remote_addr"},
            {"count": 100, "time_window": 60, "key": "$remote_addr $host"},
        ]});
        let requests = vec![with("x-n", "5"), with("x-n", "a"), with("x-n", "0"), get()];
        assert_eq!(statuses(config, requests).await, [200, 500, 500, 500]);
    }

    #[tokio::test]
    async fn an_amount_that_is_no_number_refuses_unless_the_settings_say_otherwise() {
        let mut config = json!({"count": "$http_x_n", "time_window": 60});
        let bad = || Vec::from(["", "0", "-1", "1.5", "a", "1e30"].map(|n| with("x-n", n)));
        assert_eq!(statuses(config.clone(), bad()).await, [500; 6]);
        let good = vec![with("x-n", "2"), with("x-n", "2.0"), with("x-n", "2")];
        assert_eq!(statuses(config.clone(), good).await, [200, 200, 503]);
        config["allow_degradation"] = true.into();
        assert_eq!(statuses(config, bad()).await, [200; 6]);
    }

    #[tokio::test]
    async fn a_sliding_window_tells_fractions_of_seconds() {
        let config = json!({"count": 10, "time_window": 60, "window_type": "sliding"});
        let mut chain = TestEnv::default().chain::<LimitCount, _>(&config, |_| Ok(())).unwrap();
        let x = chain.run(get().build()).await;
        assert_eq!(field(&x, "x-ratelimit-remaining"), "9");
        let reset: f64 = field(&x, "x-ratelimit-reset").parse().unwrap();
        assert!((0.0..=60.0).contains(&reset));
        for (millis, told) in [(0, "0"), (1, "0.01"), (1_500, "1.5"), (2_000, "2"), (12_340, "12.34")] {
            assert_eq!(hundredths(Duration::from_millis(millis)), told);
        }
    }

    #[tokio::test]
    async fn counts_stay_while_the_settings_stay() {
        let env = TestEnv::default();
        let status = async |config: &Value| {
            let mut chain = env.chain::<LimitCount, _>(config, |_| Ok(())).unwrap();
            chain.run(get().build()).await.response.status().as_u16()
        };
        // Something holds the table over the reload, as the plugin's old object does until it is dropped.
        let _held = env.carry.get_or("limit-count", WindowTable::default);
        let config = json!({"count": 1, "time_window": 60});
        assert_eq!([status(&config).await, status(&config).await], [200, 503]);
        let changed = json!({"count": 1, "time_window": 61});
        assert_eq!([status(&changed).await, status(&config).await], [200, 503]);
        let grouped = json!({"count": 1, "time_window": 60, "group": "g"});
        assert_eq!([status(&grouped).await, status(&grouped).await], [200, 503]);
    }

    #[tokio::test]
    async fn names_of_fields_come_from_metadata() {
        let env = TestEnv {
            metadata: Some(json!({"limit_header": "X-Quota", "reset_header": "X-AI-RateLimit-Reset"})),
            ..TestEnv::default()
        };
        let config = json!({"rules": [{"count": 5, "time_window": 9, "key": "$host"}]});
        let x = env.chain::<LimitCount, _>(&config, |_| Ok(())).unwrap().run(get().build()).await;
        assert_eq!((field(&x, "x-quota"), field(&x, "x-ai-1-ratelimit-reset")), ("5", "9"));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let rule = json!({"count": 1, "time_window": 1, "key": "$host"});
        // Settings that are good, but for one field.
        let sentinel = |wrong: Value| {
            let mut settings = json!({
                "count": 1, "time_window": 1, "policy": "redis-sentinel", "redis_master_name": "m",
                "redis_sentinels": [{"host": "aa", "port": 1}], "redis_keepalive_timeout": 1,
            });
            let members = settings.as_object_mut().unwrap();
            members.extend(wrong.as_object().unwrap().clone());
            members.retain(|_, value| !value.is_null());
            settings
        };
        assert!(TestEnv::default().build::<LimitCount>(&sentinel(json!({"redis_role": "master"}))).is_ok());
        let cases = [
            (json!({}), "none of `count`, `rules`"),
            (json!({"count": 1}), "`time_window` is missing"),
            (json!({"count": 0, "time_window": 1}), "/count"),
            (json!({"count": 1, "time_window": 1, "rules": [rule]}), "exclude each other"),
            (json!({"group": "g", "rules": [rule]}), "exclude each other"),
            (json!({"rules": [rule, rule]}), "/rules/1/key: an element is written twice"),
            (json!({"count": 1, "time_window": 1, "rejected_code": 199}), "/rejected_code"),
            (json!({"rules": []}), "/rules"),
            (
                json!({"count": 1, "time_window": 1, "policy": "redis-cluster", "redis_cluster_name": "c", "redis_cluster_nodes": []}),
                "/redis_cluster_nodes",
            ),
            (json!({"count": 1, "time_window": 1, "policy": "memcached"}), "/policy"),
            (json!({"count": 1, "time_window": 1, "policy": "redis"}), "`redis_host` is missing"),
            (sentinel(json!({"redis_sentinels": null})), "`redis_sentinels` is missing"),
            (sentinel(json!({"redis_sentinels": []})), "/redis_sentinels"),
            (sentinel(json!({"redis_sentinels": [{"host": "aa", "port": 0}]})), "/redis_sentinels/0/port"),
            (sentinel(json!({"redis_sentinels": [{"host": "aa"}]})), "/redis_sentinels/0: `port` is missing"),
            (sentinel(json!({"redis_master_name": null})), "`redis_master_name` is missing"),
            (sentinel(json!({"redis_role": "slave"})), "/redis_role"),
            (sentinel(json!({"policy": "redis", "redis_host": "aa"})), "/redis_keepalive_timeout"),
            (
                json!({"count": 1, "time_window": 1, "policy": "redis-cluster", "redis_cluster_nodes": ["a:1"]}),
                "`redis_cluster_name` is missing",
            ),
            (
                json!({"count": 1, "time_window": 1, "policy": "redis-cluster", "redis_cluster_name": "c",
                    "redis_cluster_nodes": ["a:1", "nowhere"]}),
                "/redis_cluster_nodes/1",
            ),
            (
                json!({"count": 1, "time_window": 5, "policy": "redis", "redis_host": "a.b", "sync_interval": 5}),
                "/sync_interval",
            ),
            (
                json!({"count": 1, "time_window": 5, "policy": "redis", "redis_host": "a.b", "sync_interval": 0}),
                "/sync_interval",
            ),
            (json!({"count": 1, "time_window": 1, "key_type": "vars"}), "/key_type"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<LimitCount>(&config).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(told.contains(words), "{config}: {told}");
        }
        let redis = json!({"count": 1, "time_window": 1, "policy": "redis", "redis_host": "127.0.0.1"});
        assert!(TestEnv::default().build::<LimitCount>(&redis).is_ok(), "Redis need not be there");
    }
}
