//! `limit-req`: so many requests a second, evenly; what comes faster waits for its turn, and no more than `burst` wait.
//!
//! Phase: `access`. Each key has a leaky bucket, in this process or in Redis. A change of the settings leaves buckets
//! as they are. Redis reads the clock itself, and forgets a bucket that has leaked out; APISIX keeps it for ever.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use config::error::ConfigError;
use config::fields::HttpStatus;
use layers::exchange::Exchange;
use layers::limits::bucket::{BucketTable, Leak};
use layers::limits::table::Owner;
use layers::plugin::{Access, AccessWaits, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::limiting::{
    self, Amount, Answers, CompiledAmount, KeySource, KeyType, Message, redis_prefix,
};
use crate::support::redis::{Failure, Policy, Redis, Script, with_redis};

/// Shorter waits are not worth a timer.
const SHORTEST: Duration = Duration::from_millis(1);

with_redis! {
    /// Settings. Either `rate`, `burst` and `key`, or `rules`.
    #[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    pub struct Config {
        /// Requests a second: a number, or text with variables that gives one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rate: Option<Amount<false, false>>,
        /// Requests above the rate that may wait for their turn: a number, or text with variables that gives one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        burst: Option<Amount<false, true>>,
        /// What requests are counted by, see `key_type`. Where it has no value, the client's address stands for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<String>,
        /// How `key` is read.
        #[serde(default)]
        key_type: KeyType,
        /// Several limits; the first that is reached refuses the request.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(length(min = 1))]
        rules: Option<Vec<Rule>>,
        /// Where buckets are kept.
        #[serde(default)]
        policy: Policy,
        /// The status of a refusal.
        #[serde(default = "limiting::unavailable")]
        rejected_code: HttpStatus,
        /// The text of a refusal, sent as `{"error_msg": ...}`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rejected_msg: Option<Message>,
        /// Let requests within `burst` pass without a wait.
        #[serde(default)]
        nodelay: bool,
        /// Let requests pass when Redis does not answer, or `rate` or `burst` give no number; otherwise they are
        /// answered with 500.
        #[serde(default)]
        allow_degradation: bool,
    }
}

/// One limit of several.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Requests a second.
    rate: Amount<false, false>,
    /// Requests above the rate that may wait for their turn.
    burst: Amount<false, true>,
    /// What requests are counted by: text with variables. Where none of them has a value, the rule does not apply.
    key: String,
}

/// KEYS: the bucket. ARGV: requests a second, and those that may wait. Answers whether the request fits, and how many
/// milliseconds it has to wait.
static POUR: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HMGET', KEYS[1], 'excess', 'last')
local excess, last = tonumber(known[1]), tonumber(known[2])
if excess and last then
    excess = math.max(excess - rate * math.max(now - last, 0) / 1000 + 1, 0)
else
    excess = 0
end
if excess > burst then
    return {0, 0}
end
redis.call('HSET', KEYS[1], 'excess', string.format('%.17g', excess), 'last', string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.min(math.ceil((excess + 1) / rate * 1000), 4503599627370496)))
return {1, math.min(math.floor(excess / rate * 1000), 4503599627370496)}
",
    )
});

/// The plugin.
pub struct LimitReq {
    buckets: Buckets,
    rules: Box<[CompiledRule]>,
    delays: bool,
    answers: Answers,
}

/// Where buckets are kept.
enum Buckets {
    Local(Arc<BucketTable>),
    Shared(Arc<Redis>),
}

struct CompiledRule {
    owner: Owner,
    prefix: Box<str>,
    rate: CompiledAmount<false, false>,
    burst: CompiledAmount<false, true>,
    key: KeySource,
}

impl Definition for LimitReq {
    const NAME: &'static str = "limit-req";
    const PRIORITY: i32 = 1001;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let own = [
            ("rate", config.rate.is_some()),
            ("burst", config.burst.is_some()),
            ("key", config.key.is_some()),
        ];
        let rules = config.rules.as_ref().map(|rules| rules.iter().map(|rule| &*rule.key));
        let mut errors = limiting::check_rules(&own, rules);
        errors.extend(config.redis_settings().err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let plugin = Arc::new(LimitReq::new(&config, env, &env.owner.to_string())?);
        if plugin.waits() {
            hooks.access_waits(&plugin);
        } else {
            hooks.access(&plugin);
        }
        Ok(())
    }
}

impl LimitReq {
    /// A limit of `place`, which names the object that holds the settings.
    pub(crate) fn new(config: &Config, env: &BuildEnv<'_>, place: &str) -> Result<Self, ConfigError> {
        let table = env.carry.get_or("limit-req", BucketTable::default);
        let settings = serde_json::to_string(config).unwrap_or_default();
        let rule = |index: usize, rate: &Amount<false, false>, burst: &Amount<false, true>, key| CompiledRule {
            owner: table.owner((place, index)),
            prefix: redis_prefix(Self::NAME, place, &settings, index).into(),
            rate: rate.compile(),
            burst: burst.compile(),
            key,
        };
        let rules: Vec<_> = match (&config.rules, &config.rate, &config.burst, &config.key) {
            (Some(rules), ..) => rules
                .iter()
                .enumerate()
                .map(|(index, own)| rule(index, &own.rate, &own.burst, KeySource::of_rule(&own.key)))
                .collect(),
            (None, Some(rate), Some(burst), Some(key)) => {
                vec![rule(0, rate, burst, KeySource::new(key, config.key_type))]
            }
            _ => return Err(ConfigError::invalid("", "write `rate`, `burst` and `key`, or `rules`")),
        };
        let never = |rule: &CompiledRule| matches!(rule.burst, CompiledAmount::Known(0.0));
        let rejected = (config.rejected_code, config.rejected_msg.as_ref());
        Ok(Self {
            buckets: match config.redis_settings()? {
                None => Buckets::Local(table),
                Some(redis) => Buckets::Shared(Redis::open(&redis, env)?),
            },
            delays: !config.nodelay && !rules.iter().all(never),
            rules: rules.into(),
            answers: Answers::new(Self::NAME, rejected, None, config.allow_degradation),
        })
    }

    /// Whether a request may have to wait, for its turn or for Redis.
    pub(crate) fn waits(&self) -> bool {
        self.delays || matches!(self.buckets, Buckets::Shared(_))
    }

    fn leak(rule: &CompiledRule, x: &Exchange) -> Option<Leak> {
        Some(Leak { rate: rule.rate.value(x)?, burst: rule.burst.value(x)? })
    }

    fn unclear(&self, x: &Exchange) -> Flow {
        self.answers.fail(x, &"no rule applies, or rate or burst give no number")
    }
}

impl Access for LimitReq {
    fn access(&self, x: &mut Exchange) -> Flow {
        let Buckets::Local(table) = &self.buckets else { return self.unclear(x) };
        let now = Instant::now();
        let mut applied = false;
        for rule in &self.rules {
            let Some(key) = rule.key.shown(x).map(|shown| shown.key(table, rule.owner)) else { continue };
            applied = true;
            let Some(leak) = Self::leak(rule, x) else { return self.unclear(x) };
            if table.pour(key, leak, now).is_none() {
                return self.answers.refuse();
            }
        }
        if applied { Flow::Next } else { self.unclear(x) }
    }
}

impl AccessWaits for LimitReq {
    async fn access(&self, x: &mut Exchange) -> Flow {
        let mut applied = false;
        for rule in &self.rules {
            let Some(shown) = rule.key.shown(x) else { continue };
            applied = true;
            let Some(leak) = Self::leak(rule, x) else { return self.unclear(x) };
            let wait = match &self.buckets {
                Buckets::Local(table) => table.pour(shown.key(table, rule.owner), leak, Instant::now()),
                Buckets::Shared(redis) => match pour(redis, &shown.name(&rule.prefix), leak).await {
                    Ok(wait) => wait,
                    Err(failure) => return self.answers.fail(x, &failure),
                },
            };
            match wait {
                None => return self.answers.refuse(),
                Some(wait) if self.delays && wait >= SHORTEST => tokio::time::sleep(wait).await,
                Some(_) => {}
            }
        }
        if applied { Flow::Next } else { self.unclear(x) }
    }
}

async fn pour(redis: &Redis, key: &str, leak: Leak) -> Result<Option<Duration>, Failure> {
    let arguments = [leak.rate, leak.burst];
    let (fits, wait): (u8, u64) = redis.run(&POUR, &[key], &arguments, redis.deadline()).await?;
    Ok((fits == 1).then(|| Duration::from_millis(wait)))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use layers::testing::{ExchangeBuilder, TestEnv, exchange, text};
    use serde_json::{Value, json};

    use super::*;

    fn get() -> ExchangeBuilder {
        exchange("GET", "http://a.com/")
    }

    /// Sends requests one after the other; the status of each, and the last answer's text.
    async fn run(config: Value, requests: Vec<ExchangeBuilder>) -> (Vec<u16>, String) {
        let mut chain = TestEnv::default().chain::<LimitReq, _>(&config, |_| Ok(())).unwrap();
        let (mut told, mut last) = (Vec::new(), String::new());
        for request in requests {
            let mut x = chain.run(request.build()).await;
            told.push(x.response.status().as_u16());
            last = text(&mut x).await;
        }
        (told, last)
    }

    #[tokio::test]
    async fn what_comes_faster_than_the_rate_is_refused() {
        let limit = |more: Value| {
            let mut config = json!({"rate": 0.01, "burst": 0, "key": "remote_addr", "rejected_code": 429});
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            config
        };
        let with = |value: &str| get().header("x-a", value);
        let cases = [
            ("the address", limit(json!({})), vec![get(), get(), get().peer("10.0.0.1")], vec![200, 429, 200]),
            ("no delay", limit(json!({"burst": 2, "nodelay": true})), vec![get(), get(), get(), get()], vec![200, 200, 200, 429]),
            ("a variable", limit(json!({"key": "http_x_a"})), vec![with("1"), with("2"), with("1")], vec![200, 200, 429]),
            ("without a value: the address", limit(json!({"key": "http_x_a"})), vec![get(), get()], vec![200, 429]),
            (
                "a combination",
                limit(json!({"key": "$remote_addr $http_x_a", "key_type": "var_combination"})),
                vec![with("1"), with("2"), with("1")],
                vec![200, 200, 429],
            ),
            (
                "a burst that the request tells",
                limit(json!({"burst": "${http_x_a ?? 0}", "nodelay": true})),
                vec![with("1"), with("1"), with("1"), with("x")],
                vec![200, 200, 429, 500],
            ),
            (
                "rules",
                json!({"rejected_code": 429, "rules": [
                    {"rate": 0.01, "burst": 0, "key": "$http_x_a"}, {"rate": 0.01, "burst": 0, "key": "$http_x_b"}]}),
                vec![with("1"), with("1").header("x-b", "1"), get().header("x-b", "1"), get()],
                vec![200, 429, 200, 500],
            ),
        ];
        for (name, config, requests, expected) in cases {
            assert_eq!(run(config, requests).await.0, expected, "{name}");
        }
    }

    #[tokio::test]
    async fn a_burst_waits_for_its_turn() {
        let config = json!({"rate": 20, "burst": 2, "key": "remote_addr"});
        let mut chain = TestEnv::default().chain::<LimitReq, _>(&config, |_| Ok(())).unwrap();
        let start = Instant::now();
        let first = chain.run(get().build()).now_or_never().expect("the first does not wait");
        assert_eq!(first.response.status(), 200);
        for _ in 0..2 {
            assert_eq!(chain.run(get().build()).await.response.status(), 200);
        }
        // Two turns of 50 ms each after the first; a late machine makes it later, never earlier.
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(98), "{took:?}");
    }

    #[tokio::test]
    async fn a_refusal_has_the_message() {
        let config = json!({"rate": 0.01, "burst": 0, "key": "remote_addr", "rejected_msg": "slow down"});
        let (told, text) = run(config, vec![get(), get()]).await;
        assert_eq!((told, &*text), (vec![200, 503], "{\"error_msg\":\"slow down\"}\n"));
    }

    #[tokio::test]
    async fn a_bucket_stays_when_the_settings_change() {
        let env = TestEnv::default();
        let _held = env.carry.get_or("limit-req", BucketTable::default);
        let status = async |config: &Value| {
            let mut chain = env.chain::<LimitReq, _>(config, |_| Ok(())).unwrap();
            chain.run(get().build()).await.response.status().as_u16()
        };
        let config = json!({"rate": 0.01, "burst": 0, "key": "remote_addr"});
        assert_eq!([status(&config).await, status(&config).await], [200, 503]);
        let changed = json!({"rate": 0.02, "burst": 0, "key": "remote_addr"});
        assert_eq!(status(&changed).await, 503);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), "none of `rate`, `rules`"),
            (json!({"rate": 1, "key": "a"}), "`burst` is missing"),
            (json!({"rules": []}), "/rules"),
            (json!({"rate": 0, "burst": 0, "key": "a"}), "/rate"),
            (json!({"rate": 1, "burst": -1, "key": "a"}), "/burst"),
            (json!({"rate": 1, "burst": 0, "key": "a", "key_type": "constant"}), "/key_type"),
            (json!({"rate": 1, "burst": 0, "key": "a", "policy": "redis"}), "`redis_host` is missing"),
            (json!({"rate": 1, "burst": 0, "key": "a", "rules": [{"rate": 1, "burst": 0, "key": "a"}]}), "exclude"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<LimitReq>(&config).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(told.contains(words), "{config}: {told}");
        }
    }
}
