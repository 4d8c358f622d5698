//! `limit-count`: so many requests in such a time, by client, consumer, header or anything a variable tells.
//!
//! Phase: `access`. Counts are exact for the process, whichever worker serves a request, and stay over changes of the
//! configuration as long as the plugin's own settings stay. They are not shared with other processes.

use std::borrow::Cow;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::error::{ConfigError, ErrorKind};
use config::fields::{HttpStatus, WideText};
use config::template::{Piece, Template};
use config::var::{Var, Vars};
use http::{HeaderName, HeaderValue, StatusCode};
use layers::exchange::{Exchange, State};
use layers::limits::window::{Key, Limit, Owner, Verdict, WindowKind, WindowTable};
use layers::plugin::{Access, BuildEnv, Definition, Extras, Flow, Hooks};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Number, json};

use crate::support::headers;
use crate::support::numbers::number;
use crate::support::reply::{self, Canned};

/// Settings. Either `count` and `time_window`, or `rules`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Requests allowed in `time_window`: a number, or text with variables that gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    count: Option<Amount>,
    /// The time in seconds: a number, or text with variables that gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    time_window: Option<Amount>,
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
    #[serde(default = "unavailable")]
    rejected_code: HttpStatus,
    /// The text of a refusal, sent as `{"error_msg": ...}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rejected_msg: Option<WideText<1, 4096>>,
    /// Where counts are kept.
    #[serde(default)]
    policy: Policy,
    /// Let requests pass when `count` or `time_window` give no number; otherwise they are answered with 500.
    #[serde(default)]
    allow_degradation: bool,
    /// Tell the client limit, rest and time in header fields.
    #[serde(default = "yes")]
    show_limit_quota_header: bool,
    /// Of use for counts in Redis only.
    #[serde(default = "no_interval")]
    sync_interval: Number,
}

fn remote_addr() -> String {
    "remote_addr".into()
}

fn unavailable() -> HttpStatus {
    HttpStatus::new(503).unwrap_or_default()
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
    count: Amount,
    /// The time in seconds.
    time_window: Amount,
    /// What requests are counted by: text with variables. Where none of them has a value, the rule does not apply.
    key: String,
    /// Stands in the names of the header fields, `X-PREFIX-RateLimit-Limit`; the number of the rule where it is
    /// missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header_prefix: Option<String>,
}

/// A number from 1, or text that gives one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Amount {
    /// A number.
    Number(NonZeroU64),
    /// Text with variables.
    Text(String),
}

impl JsonSchema for Amount {
    fn schema_name() -> Cow<'static, str> {
        "Amount".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["integer", "string"], "exclusiveMinimum": 0})
    }
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

/// Where counts are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// In this process.
    #[default]
    Local,
}

const POLICY_RULE: &str = "`local`: counts in Redis are not offered yet";

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let policy = Cow::<str>::deserialize(deserializer)?;
        if policy == "local" { Ok(Self::Local) } else { Err(de::Error::custom(format!("write {POLICY_RULE}"))) }
    }
}

impl JsonSchema for Policy {
    fn schema_name() -> Cow<'static, str> {
        "Policy".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^local$", "x-expected": POLICY_RULE})
    }
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

impl Default for Metadata {
    fn default() -> Self {
        Self { limit_header: limit_header(), remaining_header: remaining_header(), reset_header: reset_header() }
    }
}

/// The plugin.
pub struct LimitCount {
    table: Arc<WindowTable>,
    rules: Box<[CompiledRule]>,
    kind: WindowKind,
    refusal: Canned,
    failure: Canned,
    allow_degradation: bool,
    show_quota: bool,
}

struct CompiledRule {
    owner: Owner,
    count: CompiledAmount,
    window: CompiledAmount,
    key: CompiledKey,
    headers: [HeaderName; 3],
}

enum CompiledAmount {
    Known(u64),
    Asked(Template),
}

enum CompiledKey {
    Constant(Key),
    RemoteAddr,
    Var(Var),
    Combination(Template),
    /// A combination that decides whether its rule applies.
    Optional(Template),
}

impl Definition for LimitCount {
    const NAME: &'static str = "limit-count";
    const PRIORITY: i32 = 1002;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let Config { count, time_window, rules, group, .. } = config;
        let exclusive = |one, other| ConfigError::new("", ErrorKind::Exclusive { one, other });
        let missing = |field: &str| ConfigError::new("", ErrorKind::MissingField { field: field.into() });
        let mut errors = Vec::new();
        match (count, time_window, rules) {
            (None, None, None) => {
                let fields = vec!["count", "rules"];
                errors.push(ConfigError::new("", ErrorKind::NoneOf { fields }));
            }
            (Some(_), None, None) => errors.push(missing("time_window")),
            (None, Some(_), None) => errors.push(missing("count")),
            (Some(_), _, Some(_)) => errors.push(exclusive("count", "rules")),
            (_, Some(_), Some(_)) => errors.push(exclusive("time_window", "rules")),
            _ => {}
        }
        if group.is_some() && rules.is_some() {
            errors.push(exclusive("group", "rules"));
        }
        for (index, rule) in rules.iter().flatten().enumerate() {
            if rules.iter().flatten().take(index).any(|earlier| earlier.key == rule.key) {
                errors.push(ConfigError::new(format!("/rules/{index}/key"), ErrorKind::Duplicate));
            }
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = env.metadata.and_then(|value| Metadata::deserialize(value).ok()).unwrap_or_default();
        // One table for all limits: a limit that nobody reaches costs no table of its own.
        let table = env.carry.get_or("limit-count", WindowTable::default);
        hooks.access(&Arc::new(compile(&config, &metadata, table, &env.owner.to_string())?));
        Ok(())
    }
}

fn compile(
    config: &Config,
    metadata: &Metadata,
    table: Arc<WindowTable>,
    owner: &str,
) -> Result<LimitCount, ConfigError> {
    // The settings are part of the name, so that counts begin anew when they change and only then.
    let settings = serde_json::to_string(config).unwrap_or_default();
    let place = config.group.as_deref().map_or(("owner", owner), |group| ("group", group));
    let owner = |rule: usize| table.owner(("limit-count", place, &settings, rule));
    let rules = match &config.rules {
        None => {
            let (Some(count), Some(window)) = (&config.count, &config.time_window) else {
                return Err(ConfigError::invalid("", "write `count` and `time_window`, or `rules`"));
            };
            let owner = owner(0);
            let key = match config.key_type {
                KeyType::Constant => CompiledKey::Constant(table.key(owner, &config.key)),
                KeyType::VarCombination => CompiledKey::Combination(Template::parse(&config.key)),
                KeyType::Var => match Var::parse(&config.key) {
                    Var::RemoteAddr => CompiledKey::RemoteAddr,
                    var => CompiledKey::Var(var),
                },
            };
            let headers = header_names(metadata, None)?;
            vec![CompiledRule { owner, count: amount(count), window: amount(window), key, headers }]
        }
        Some(rules) => rules
            .iter()
            .enumerate()
            .map(|(index, rule)| {
                let number = (index + 1).to_string();
                let prefix = rule.header_prefix.as_deref().unwrap_or(&number);
                Ok(CompiledRule {
                    owner: owner(index),
                    count: amount(&rule.count),
                    window: amount(&rule.time_window),
                    key: CompiledKey::Optional(Template::parse(&rule.key)),
                    headers: header_names(metadata, Some(prefix)).map_err(|error| {
                        ConfigError::new(format!("/rules/{index}/header_prefix"), error.kind)
                    })?,
                })
            })
            .collect::<Result<_, ConfigError>>()?,
    };
    let status = reply::status(config.rejected_code.get());
    Ok(LimitCount {
        table,
        rules: rules.into(),
        kind: match config.window_type {
            WindowType::Fixed => WindowKind::Fixed,
            WindowType::Sliding => WindowKind::Sliding,
        },
        refusal: match &config.rejected_msg {
            Some(message) => Canned::json(status, &json!({ "error_msg": &**message })),
            None => Canned::status(status),
        },
        failure: Canned::status(StatusCode::INTERNAL_SERVER_ERROR),
        allow_degradation: config.allow_degradation,
        show_quota: config.show_limit_quota_header,
    })
}

fn amount(amount: &Amount) -> CompiledAmount {
    match amount {
        Amount::Number(number) => CompiledAmount::Known(number.get()),
        Amount::Text(text) => {
            let template = Template::parse(text);
            match template.as_literal().and_then(positive) {
                Some(number) => CompiledAmount::Known(number),
                None => CompiledAmount::Asked(template),
            }
        }
    }
}

/// A whole number from 1 that every JSON reader keeps exactly.
fn positive(text: &str) -> Option<u64> {
    const LARGEST: f64 = 9_007_199_254_740_991.0;
    let number: f64 = text.trim().parse().ok()?;
    let whole = number.fract() == 0.0 && (1.0..=LARGEST).contains(&number);
    whole.then_some(number as u64)
}

fn header_names(metadata: &Metadata, prefix: Option<&str>) -> Result<[HeaderName; 3], ConfigError> {
    let name = |base: &str| {
        let name = match prefix {
            Some(prefix) => base.replacen("RateLimit-", &format!("{prefix}-RateLimit-"), 1),
            None => base.to_owned(),
        };
        headers::name(&name, "").map_err(|error| ConfigError::new("", error.kind))
    };
    Ok([name(&metadata.limit_header)?, name(&metadata.remaining_header)?, name(&metadata.reset_header)?])
}

impl CompiledAmount {
    fn value(&self, x: &State) -> Option<u64> {
        match self {
            Self::Known(number) => Some(*number),
            Self::Asked(template) => positive(&template.to_text(x)),
        }
    }
}

impl CompiledRule {
    /// Whose count it is; nothing if the rule does not apply.
    fn key(&self, table: &WindowTable, x: &State) -> Option<Key> {
        let text = |value: Cow<'_, str>| table.key(self.owner, &*value);
        let address = || table.key(self.owner, x.remote_addr);
        match &self.key {
            CompiledKey::Constant(key) => Some(*key),
            CompiledKey::RemoteAddr => Some(address()),
            CompiledKey::Var(var) => Some(x.get(var).map_or_else(address, text)),
            CompiledKey::Combination(template) => Some(combined(template, x).map_or_else(address, text)),
            CompiledKey::Optional(template) => combined(template, x).map(text),
        }
    }
}

/// The text of a template of which at least one variable has a value.
fn combined<'t>(template: &'t Template, x: &State) -> Option<Cow<'t, str>> {
    let known = |piece: &Piece| match piece {
        Piece::Var(var, default) => default.is_some() || x.get(var).is_some(),
        Piece::Text(_) => false,
    };
    template.pieces().iter().any(known).then(|| template.to_text(x))
}

impl Access for LimitCount {
    fn access(&self, x: &mut Exchange) -> Flow {
        let now = Instant::now();
        let mut applied = false;
        for rule in &self.rules {
            let Some(key) = rule.key(&self.table, x) else { continue };
            applied = true;
            let (Some(count), Some(seconds)) = (rule.count.value(x), rule.window.value(x)) else {
                return self.failed(x);
            };
            let limit = Limit { count, window: Duration::from_secs(seconds), kind: self.kind };
            let verdict = self.table.take(key, limit, now);
            if self.show_quota {
                tell(x, &rule.headers, count, &verdict, self.kind);
            }
            if !verdict.allowed {
                return self.refusal.flow();
            }
        }
        // A request that no rule applies to has no limit, which APISIX takes for a fault of the settings.
        if applied { Flow::Next } else { self.failed(x) }
    }
}

impl LimitCount {
    fn failed(&self, x: &Exchange) -> Flow {
        if self.allow_degradation {
            return Flow::Next;
        }
        tracing::warn!(host = %x.host, "limit-count: no rule applies, or count or time_window give no number");
        self.failure.flow()
    }
}

/// Tells the client where it stands.
fn tell(x: &mut Exchange, names: &[HeaderName; 3], count: u64, verdict: &Verdict, kind: WindowKind) {
    let reset = match kind {
        WindowKind::Fixed => number(verdict.reset.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)),
        WindowKind::Sliding => hundredths(verdict.reset),
    };
    let [limit, remaining, at] = names;
    for (name, value) in [(limit, number(count)), (remaining, number(verdict.remaining)), (at, reset)] {
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
    use serde_json::Value;

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
        let cases = [
            (json!({}), "none of `count`, `rules`"),
            (json!({"count": 1}), "`time_window` is missing"),
            (json!({"count": 0, "time_window": 1}), "/count"),
            (json!({"count": 1, "time_window": 1, "rules": [rule]}), "exclude each other"),
            (json!({"group": "g", "rules": [rule]}), "exclude each other"),
            (json!({"rules": [rule, rule]}), "/rules/1/key: an element is written twice"),
            (json!({"count": 1, "time_window": 1, "rejected_code": 199}), "/rejected_code"),
            (json!({"count": 1, "time_window": 1, "policy": "redis"}), "/policy: `redis` is not `local`: counts in Redis"),
            (json!({"count": 1, "time_window": 1, "key_type": "vars"}), "/key_type"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<LimitCount>(&config).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(told.contains(words), "{config}: {told}");
        }
        let redis = json!({"count": 1, "time_window": 1, "policy": "redis", "redis_host": "127.0.0.1"});
        let errors = TestEnv::default().build::<LimitCount>(&redis).unwrap_err();
        assert!(errors.iter().any(|error| error.pointer == "/policy"), "{errors:?}");
    }
}
