//! `limit-conn`: so many requests at work at once; some more wait, the rest are refused.
//!
//! Phase: `access`. A request gives its place back when all is over, after the log phase: also when the client goes
//! away or the upstream fails, and for an upgraded connection when its tunnel ends. Places in Redis that nobody could give back end after
//! `key_ttl`. A change of the settings leaves the places of this process as they are.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use config::error::ConfigError;
use config::fields::{HttpStatus, Int, Seconds};
use layers::exchange::Exchange;
use layers::limits::in_use::{InUse, Use};
use layers::plugin::{Access, AccessWaits, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::support::limiting::{
    self, Amount, Answers, CompiledAmount, KeySource, KeyType, Message, Shown, redis_prefix,
};
use crate::support::redis::{Failure, Policy, Redis, Script, with_redis};

/// Shorter waits are not worth a timer.
const SHORTEST: Duration = Duration::from_millis(1);
/// How often Redis is told that a place is free, and the pause between two times.
const TELL: (u32, Duration) = (5, Duration::from_secs(1));

with_redis! {
    /// Settings. Either `conn`, `burst` and `key`, or `rules`.
    #[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    pub struct Config {
        /// Requests at work at once: a number, or text with variables that gives one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        conn: Option<Amount<true, false>>,
        /// Requests above `conn` that are let in after a wait: a number, or text with variables that gives one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        burst: Option<Amount<true, true>>,
        /// The wait in seconds of the first requests above `conn`; it grows with each multiple of `conn`.
        default_conn_delay: Seconds,
        /// Do not adapt the wait to how long requests take.
        #[serde(default)]
        only_use_default_delay: bool,
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
        /// Where places are counted.
        #[serde(default)]
        policy: Policy,
        /// Seconds after which Redis forgets a place that was not given back.
        #[serde(default = "hour")]
        key_ttl: Int<1, 2_147_483_647>,
        /// The status of a refusal.
        #[serde(default = "limiting::unavailable")]
        rejected_code: HttpStatus,
        /// The text of a refusal, sent as `{"error_msg": ...}`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rejected_msg: Option<Message>,
        /// Let requests pass when Redis does not answer, or `conn` or `burst` give no number; otherwise they are answered
        /// with 500.
        #[serde(default)]
        allow_degradation: bool,
    }
}

fn hour() -> Int<1, 2_147_483_647> {
    Int::new(3600).unwrap_or_default()
}

/// One limit of several.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Requests at work at once.
    conn: Amount<true, false>,
    /// Requests above `conn` that are let in after a wait.
    burst: Amount<true, true>,
    /// What requests are counted by: text with variables. Where none of them has a value, the rule does not apply.
    key: String,
}

/// KEYS: the places. ARGV: how many there are, the seconds after which one is forgotten, who takes one. Answers whether
/// it was free, and how many are taken. Places are kept with the time at which they end.
static ENTER: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local taken = redis.call('ZCARD', KEYS[1])
if redis.call('ZSCORE', KEYS[1], ARGV[3]) then
    return {1, taken}
end
if taken >= tonumber(ARGV[1]) then
    return {0, taken}
end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {1, taken + 1}
",
    )
});

/// The plugin.
pub struct LimitConn {
    places: Places,
    rules: Box<[CompiledRule]>,
    delay: Arc<Delay>,
    /// Whether some requests may have to wait for others.
    delays: bool,
    answers: Answers,
}

/// Where places are counted.
enum Places {
    Local(Arc<InUse>),
    Shared(Arc<Redis>, u32, Handle),
}

struct CompiledRule {
    /// What the names of places begin with, here and in Redis.
    prefix: Box<str>,
    conn: CompiledAmount<true, false>,
    burst: CompiledAmount<true, true>,
    key: KeySource,
}

/// How long requests above `conn` wait, for each multiple of it.
struct Delay {
    /// Seconds, as the bits of a float.
    seconds: AtomicU64,
    adapts: bool,
}

impl Delay {
    fn of(&self, number: u64, conn: u64) -> Duration {
        let unit = f64::from_bits(self.seconds.load(Ordering::Relaxed));
        let times = number.saturating_sub(1) / conn.max(1);
        Duration::try_from_secs_f64(unit * times as f64).unwrap_or(Duration::MAX)
    }

    /// A request took so long: half of what comes next. That two at once may forget one of them does no harm.
    fn learn(&self, took: Duration) {
        if self.adapts {
            let unit = f64::from_bits(self.seconds.load(Ordering::Relaxed));
            self.seconds.store(((unit + took.as_secs_f64()) / 2.0).to_bits(), Ordering::Relaxed);
        }
    }
}

/// A place that an exchange holds. It is given back when this is dropped.
struct Place {
    _taken: Taken,
    since: Instant,
    delay: Arc<Delay>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.delay.learn(self.since.elapsed());
    }
}

enum Taken {
    Here { _entered: Use },
    InRedis { _place: SharedPlace },
}

/// A place in Redis, given back in the background.
struct SharedPlace {
    redis: Arc<Redis>,
    control: Handle,
    key: String,
    id: String,
    /// It was free, or nobody knows.
    taken: bool,
}

impl SharedPlace {
    fn new(redis: &Arc<Redis>, control: &Handle, key: String) -> Self {
        Self { redis: redis.clone(), control: control.clone(), key, id: uuid::Uuid::now_v7().to_string(), taken: true }
    }

    async fn enter(&mut self, most: u64, seconds: u32) -> Result<(bool, u64), Failure> {
        let arguments = [most.to_string(), seconds.to_string(), self.id.clone()];
        let (free, taken): (u8, u64) =
            self.redis.run(&ENTER, &[&*self.key], &arguments, self.redis.deadline()).await?;
        self.taken = free == 1;
        Ok((self.taken, taken))
    }
}

impl Drop for SharedPlace {
    fn drop(&mut self) {
        if !self.taken {
            return;
        }
        let (redis, key, id) = (self.redis.clone(), std::mem::take(&mut self.key), std::mem::take(&mut self.id));
        self.control.spawn(async move {
            let mut command = redis::cmd("ZREM");
            command.arg(key).arg(id);
            for _ in 0..TELL.0 {
                if redis.query::<redis::Value>(&command).await.is_ok() {
                    return;
                }
                tokio::time::sleep(TELL.1).await;
            }
        });
    }
}

impl Definition for LimitConn {
    const NAME: &'static str = "limit-conn";
    const PRIORITY: i32 = 1003;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let own = [
            ("conn", config.conn.is_some()),
            ("burst", config.burst.is_some()),
            ("key", config.key.is_some()),
        ];
        let rules = config.rules.as_ref().map(|rules| rules.iter().map(|rule| &*rule.key));
        let mut errors = limiting::check_rules(&own, rules);
        errors.extend(config.redis_settings().err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let plugin = Arc::new(LimitConn::new(&config, env, &env.owner.to_string())?);
        if plugin.waits() {
            hooks.access_waits(&plugin);
        } else {
            hooks.access(&plugin);
        }
        Ok(())
    }
}

impl LimitConn {
    /// A limit of `place`, which names the object that holds the settings.
    pub(crate) fn new(config: &Config, env: &BuildEnv<'_>, place: &str) -> Result<Self, ConfigError> {
        let redis = config.redis_settings()?;
        let settings = if redis.is_some() { serde_json::to_string(config).unwrap_or_default() } else { String::new() };
        let rule = |index: usize, conn: &Amount<true, false>, burst: &Amount<true, true>, key| CompiledRule {
            prefix: redis_prefix(Self::NAME, place, &settings, index).into(),
            conn: conn.compile(),
            burst: burst.compile(),
            key,
        };
        let rules: Vec<_> = match (&config.rules, &config.conn, &config.burst, &config.key) {
            (Some(rules), ..) => rules
                .iter()
                .enumerate()
                .map(|(index, own)| rule(index, &own.conn, &own.burst, KeySource::of_rule(&own.key)))
                .collect(),
            (None, Some(conn), Some(burst), Some(key)) => {
                vec![rule(0, conn, burst, KeySource::new(key, config.key_type))]
            }
            _ => return Err(ConfigError::invalid("", "write `conn`, `burst` and `key`, or `rules`")),
        };
        let never = |rule: &CompiledRule| matches!(rule.burst, CompiledAmount::Known(0.0));
        let rejected = (config.rejected_code, config.rejected_msg.as_ref());
        Ok(Self {
            places: match redis {
                None => Places::Local(env.carry.get_or("limit-conn", InUse::default)),
                Some(redis) => {
                    Places::Shared(Redis::open(&redis, env)?, config.key_ttl.get(), env.control.clone())
                }
            },
            delays: !rules.iter().all(never),
            rules: rules.into(),
            delay: Arc::new(Delay {
                seconds: AtomicU64::new(config.default_conn_delay.as_f64().to_bits()),
                adapts: !config.only_use_default_delay,
            }),
            answers: Answers::new(Self::NAME, rejected, None, config.allow_degradation),
        })
    }

    /// Whether a request may have to wait, for others or for Redis.
    pub(crate) fn waits(&self) -> bool {
        self.delays || matches!(self.places, Places::Shared(..))
    }

    /// `conn`, and `conn` with `burst`.
    fn limit(rule: &CompiledRule, x: &Exchange) -> Option<(u64, u64)> {
        let (conn, burst) = (rule.conn.value(x)? as u64, rule.burst.value(x)? as u64);
        Some((conn, conn.saturating_add(burst)))
    }

    fn unclear(&self, x: &Exchange) -> Flow {
        self.answers.fail(x, &"no rule applies, or conn or burst give no number")
    }

    /// The exchange holds the place from now on. How long it has to wait before it goes on.
    fn hold(&self, x: &mut Exchange, taken: Taken, number: u64, conn: u64) -> Duration {
        let wait = if number > conn { self.delay.of(number, conn) } else { Duration::ZERO };
        let place = Place { _taken: taken, since: Instant::now() + wait, delay: self.delay.clone() };
        x.keep(place);
        wait
    }
}

fn enter(table: &Arc<InUse>, rule: &CompiledRule, shown: &Shown<'_>, most: u64) -> Option<Use> {
    match shown {
        Shown::Address(address) => table.enter((&*rule.prefix, address), most),
        Shown::Text(text) => table.enter((&*rule.prefix, &**text), most),
    }
}

impl Access for LimitConn {
    fn access(&self, x: &mut Exchange) -> Flow {
        let Places::Local(table) = &self.places else { return self.unclear(x) };
        let mut applied = false;
        for rule in &self.rules {
            let Some(shown) = rule.key.shown(x) else { continue };
            applied = true;
            let Some((conn, most)) = Self::limit(rule, x) else { return self.unclear(x) };
            let Some(entered) = enter(table, rule, &shown, most) else { return self.answers.refuse() };
            let number = entered.number();
            self.hold(x, Taken::Here { _entered: entered }, number, conn);
        }
        if applied { Flow::Next } else { self.unclear(x) }
    }
}

impl AccessWaits for LimitConn {
    async fn access(&self, x: &mut Exchange) -> Flow {
        let mut applied = false;
        for rule in &self.rules {
            let Some(shown) = rule.key.shown(x) else { continue };
            applied = true;
            let Some((conn, most)) = Self::limit(rule, x) else { return self.unclear(x) };
            let (taken, number) = match &self.places {
                Places::Local(table) => {
                    let Some(entered) = enter(table, rule, &shown, most) else { return self.answers.refuse() };
                    let number = entered.number();
                    (Taken::Here { _entered: entered }, number)
                }
                Places::Shared(redis, seconds, control) => {
                    // Given back after a failure too: it may have been taken although no answer came.
                    let mut place = SharedPlace::new(redis, control, shown.name(&rule.prefix));
                    match place.enter(most, *seconds).await {
                        Ok((true, number)) => (Taken::InRedis { _place: place }, number),
                        Ok((false, _)) => return self.answers.refuse(),
                        Err(failure) => return self.answers.fail(x, &failure),
                    }
                }
            };
            let wait = self.hold(x, taken, number, conn);
            if wait >= SHORTEST {
                tokio::time::sleep(wait).await;
            }
        }
        if applied { Flow::Next } else { self.unclear(x) }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{ExchangeBuilder, TestChain, TestEnv, exchange, text};
    use serde_json::{Value, json};

    use super::*;

    fn get() -> ExchangeBuilder {
        exchange("GET", "http://a.com/")
    }

    fn limit(more: Value) -> Value {
        let mut config =
            json!({"conn": 1, "burst": 0, "default_conn_delay": 0.1, "key": "remote_addr", "rejected_code": 429});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    type Chain = TestChain<fn(&mut Exchange) -> Result<(), layers::error::Error>>;

    fn ok(_: &mut Exchange) -> Result<(), layers::error::Error> {
        Ok(())
    }

    fn chain(config: &Value) -> Chain {
        TestEnv::default().chain::<LimitConn, _>(config, ok as _).unwrap()
    }

    /// Sends requests that all stay at work; their statuses in order.
    async fn together(config: Value, requests: Vec<ExchangeBuilder>) -> Vec<u16> {
        let mut chain = chain(&config);
        let mut held = Vec::new();
        for request in requests {
            held.push(chain.run(request.build()).await);
        }
        held.iter().map(|x| x.response.status().as_u16()).collect()
    }

    #[tokio::test]
    async fn requests_at_work_are_counted_by_what_the_key_says() {
        let with = |value: &str| get().header("x-a", value);
        let cases = [
            ("the address", limit(json!({})), vec![get(), get(), get().peer("10.0.0.1")], vec![200, 429, 200]),
            ("two", limit(json!({"conn": 2})), vec![get(), get(), get()], vec![200, 200, 429]),
            (
                "a burst, after a wait",
                limit(json!({"burst": 1, "default_conn_delay": 0.001})),
                vec![get(), get(), get()],
                vec![200, 200, 429],
            ),
            ("a variable", limit(json!({"key": "http_x_a"})), vec![with("1"), with("2"), with("1")], vec![200, 200, 429]),
            (
                "a combination",
                limit(json!({"key": "$host $http_x_a", "key_type": "var_combination"})),
                vec![with("1"), with("2"), with("1")],
                vec![200, 200, 429],
            ),
            (
                "a limit that the request tells",
                limit(json!({"conn": "${http_x_a}"})),
                vec![with("2"), with("2"), with("2"), with("0")],
                vec![200, 200, 429, 500],
            ),
            (
                "rules",
                json!({"default_conn_delay": 0.1, "rejected_code": 429, "rules": [
                    {"conn": 1, "burst": 0, "key": "$http_x_a"}, {"conn": 1, "burst": 0, "key": "$http_x_b"}]}),
                vec![with("1"), with("1"), get().header("x-b", "1"), get()],
                vec![200, 429, 200, 500],
            ),
        ];
        for (name, config, requests, expected) in cases {
            assert_eq!(together(config, requests).await, expected, "{name}");
        }
    }

    #[tokio::test]
    async fn a_place_is_given_back_when_the_exchange_ends_however_it_ends() {
        let mut chain = chain(&limit(json!({})));
        for _ in 0..3 {
            let x = chain.run(get().build()).await;
            assert_eq!(x.response.status(), 200);
            assert_eq!(chain.run(get().build()).await.response.status(), 429);
            // Given up in the midst, as when the client goes away.
            drop(x);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_grows_with_each_multiple_of_the_limit_and_who_gives_up_waiting_leaves() {
        let config =
            limit(json!({"conn": 2, "burst": 4, "default_conn_delay": 1, "only_use_default_delay": true}));
        let mut chain = chain(&config);
        let mut held = Vec::new();
        let mut waits = Vec::new();
        for _ in 0..5 {
            let start = tokio::time::Instant::now();
            held.push(chain.run(get().build()).await);
            waits.push(start.elapsed().as_millis() / 1000);
        }
        assert_eq!(waits, [0, 0, 1, 1, 2]);
        let gives_up = tokio::time::timeout(Duration::from_millis(100), chain.run(get().build())).await;
        assert!(gives_up.is_err());
        let start = tokio::time::Instant::now();
        held.push(chain.run(get().build()).await);
        assert_eq!(start.elapsed().as_millis() / 1000, 2, "the sixth place was free again");
        assert_eq!(chain.run(get().build()).await.response.status(), 429);
    }

    #[test]
    fn the_wait_learns_from_how_long_requests_take() {
        for (adapts, expected) in [(true, 2.0), (false, 1.0)] {
            let delay = Delay { seconds: AtomicU64::new(1.0_f64.to_bits()), adapts };
            delay.learn(Duration::from_secs(3));
            assert_eq!(delay.of(2, 1).as_secs_f64(), expected);
        }
    }

    #[tokio::test]
    async fn a_refusal_has_the_message() {
        let mut chain = chain(&limit(json!({"rejected_msg": "slow down", "rejected_code": 503})));
        let _held = chain.run(get().build()).await;
        let mut x = chain.run(get().build()).await;
        assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (503, "{\"error_msg\":\"slow down\"}\n"));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"default_conn_delay": 1}), "none of `conn`, `rules`"),
            (json!({"conn": 1, "burst": 0, "key": "a"}), "default_conn_delay"),
            (limit(json!({"conn": 0})), "/conn"),
            (limit(json!({"burst": -1})), "/burst"),
            (limit(json!({"burst": 0.5})), "/burst"),
            (limit(json!({"default_conn_delay": 0})), "/default_conn_delay"),
            (limit(json!({"key_type": "constant"})), "/key_type"),
            (limit(json!({"policy": "redis-cluster"})), "`redis_cluster_name` is missing"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<LimitConn>(&config).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(told.contains(words), "{config}: {told}");
        }
    }
}
