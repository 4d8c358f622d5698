//! `api-breaker`: answers in place of an upstream that fails, for a while that grows, until it works again.
//!
//! Phases: `access` refuses, `log` learns from what the upstream answered, or from why it did not. There is a circuit for
//! each route and host, shared by all workers and kept over changes of the configuration; metrics and the Control API
//! tell what they do. APISIX has one for each host and path, so that a wildcard route has as many as clients ask for.

use std::sync::Arc;
use std::time::Instant;

use config::error::ConfigError;
use config::fields::{Distinct, HttpStatus, Int};
use config::template::Template;
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue};
use layers::carry::Carry;
use layers::exchange::{Exchange, State as ExchangeState};
use layers::limits::breaker::{BreakerTable, Outcome, Rules, State};
use layers::limits::table::{Key, Owner};
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks, OnLog};
use layers::telemetry::exposition::Exposition;
use layers::telemetry::names;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::support::headers;
use crate::support::reply::{self, Canned};

/// Where the circuits are found.
const CARRIED: &str = "api-breaker";

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The status of the answer while the circuit is open.
    break_response_code: HttpStatus,
    /// The body of that answer. Without it there is the page of the status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    break_response_body: Option<String>,
    /// Header fields of that answer, if there is a body; values may hold variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    break_response_headers: Option<Vec<Field>>,
    /// The longest time in seconds that the circuit is open; by ratio, every time.
    #[serde(default = "five_minutes")]
    max_breaker_sec: Int<3, 2_147_483_647>,
    /// What opens the circuit.
    #[serde(default)]
    policy: Policy,
    /// What is a failure, and how many open the circuit.
    #[serde(default)]
    unhealthy: Unhealthy,
    /// What is a success, and how many close the circuit.
    #[serde(default)]
    healthy: Healthy,
}

fn five_minutes() -> Int<3, 2_147_483_647> {
    Int::new(300).unwrap_or_default()
}

/// A header field.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Field {
    /// Its name.
    key: config::fields::WideText<1, 4096>,
    /// Its value, with variables.
    value: config::fields::WideText<1, 65536>,
}

/// What opens the circuit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// A number of failures: for 2 seconds, after as many more for 4, and so on.
    #[default]
    UnhealthyCount,
    /// A share of failures in a window.
    UnhealthyRatio,
}

/// What is a failure.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Unhealthy {
    /// Statuses of the upstream that are failures.
    #[serde(default = "internal_error")]
    http_statuses: Distinct<Int<500, 599>>,
    /// By count: failures that open the circuit.
    #[serde(default = "three")]
    failures: Int<1, 2_147_483_647>,
    /// By ratio: the share of failures that opens the circuit. 0.5 where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    error_ratio: Option<f64>,
    /// By ratio: answers that have to be there before the circuit can open. 10 where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_request_threshold: Option<Int<1, 2_147_483_647>>,
    /// By ratio: the window in seconds. 300 where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sliding_window_size: Option<Int<10, 3600>>,
    /// By ratio: requests that try whether the circuit can close. 3 where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    half_open_max_calls: Option<Int<1, 20>>,
}

/// What is a success.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Healthy {
    /// Statuses of the upstream that are successes.
    #[serde(default = "fine")]
    http_statuses: Distinct<Int<200, 499>>,
    /// By count: successes that close the circuit.
    #[serde(default = "three")]
    successes: Int<1, 2_147_483_647>,
    /// By ratio: the share of successes that closes the circuit. 0.6 where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    success_ratio: Option<f64>,
}

fn statuses<const MIN: u32, const MAX: u32>(status: u32) -> Distinct<Int<MIN, MAX>> {
    Distinct::of_constants(vec![Int::new(status).unwrap_or_default()])
}

fn internal_error() -> Distinct<Int<500, 599>> {
    statuses(500)
}

fn fine() -> Distinct<Int<200, 499>> {
    statuses(200)
}

fn three() -> Int<1, 2_147_483_647> {
    Int::new(3).unwrap_or_default()
}

impl Default for Unhealthy {
    fn default() -> Self {
        Self {
            http_statuses: internal_error(),
            failures: three(),
            error_ratio: None,
            min_request_threshold: None,
            sliding_window_size: None,
            half_open_max_calls: None,
        }
    }
}

impl Default for Healthy {
    fn default() -> Self {
        Self { http_statuses: fine(), successes: three(), success_ratio: None }
    }
}

/// The plugin.
pub struct ApiBreaker {
    table: Arc<BreakerTable>,
    owner: Owner,
    rules: Rules,
    /// The longest time open, in milliseconds.
    longest: u64,
    failures: Box<[u16]>,
    successes: Box<[u16]>,
    answer: Canned,
    fields: Box<[(HeaderName, Template)]>,
}

impl Definition for ApiBreaker {
    const NAME: &'static str = "api-breaker";
    const PRIORITY: i32 = 1005;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let share = |pointer: &str, share: Option<f64>| {
            let wrong = share.is_some_and(|share| !(0.0..=1.0).contains(&share));
            wrong.then(|| ConfigError::invalid(pointer, "a share is a number from 0 to 1"))
        };
        let shares = [
            share("/unhealthy/error_ratio", config.unhealthy.error_ratio),
            share("/healthy/success_ratio", config.healthy.success_ratio),
        ];
        shares.into_iter().flatten().chain(fields(config).err()).collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let table = env.carry.get_or(CARRIED, BreakerTable::default);
        let status = reply::status(config.break_response_code.get());
        let Config { unhealthy, healthy, .. } = &config;
        let plugin = Arc::new(Self {
            owner: table.owner((env.owner.to_string(), config.policy == Policy::UnhealthyRatio)),
            table,
            rules: match config.policy {
                Policy::UnhealthyCount => Rules::Count {
                    failures: unhealthy.failures.get().into(),
                    successes: healthy.successes.get().into(),
                },
                Policy::UnhealthyRatio => Rules::Ratio {
                    failures: unhealthy.error_ratio.unwrap_or(0.5),
                    least: unhealthy.min_request_threshold.map_or(10, Int::get).into(),
                    window: u64::from(unhealthy.sliding_window_size.map_or(300, Int::get)) * 1000,
                    probes: unhealthy.half_open_max_calls.map_or(3, Int::get).into(),
                    successes: healthy.success_ratio.unwrap_or(0.6),
                },
            },
            longest: u64::from(config.max_breaker_sec.get()) * 1000,
            failures: codes(&unhealthy.http_statuses),
            successes: codes(&healthy.http_statuses),
            answer: match &config.break_response_body {
                Some(body) => Canned::text(status, body),
                None => Canned::status(status),
            },
            fields: if config.break_response_body.is_some() { fields(&config)? } else { Box::default() },
        });
        hooks.access(&plugin);
        hooks.log(&plugin);
        Ok(())
    }
}

fn codes<const MIN: u32, const MAX: u32>(statuses: &[Int<MIN, MAX>]) -> Box<[u16]> {
    statuses.iter().filter_map(|status| u16::try_from(status.get()).ok()).collect()
}

fn fields(config: &Config) -> Result<Box<[(HeaderName, Template)]>, ConfigError> {
    let fields = config.break_response_headers.iter().flatten().enumerate();
    fields
        .map(|(index, field)| {
            let name = headers::name(&field.key, "").map_err(|error| {
                ConfigError::new(format!("/break_response_headers/{index}/key"), error.kind)
            })?;
            Ok((name, Template::parse(&field.value)))
        })
        .collect()
}

impl ApiBreaker {
    fn key(&self, x: &ExchangeState) -> Key {
        let route = x.target.as_ref().map(|target| &*target.route_id);
        self.table.key(self.owner, (route, &*x.host))
    }
}

impl Access for ApiBreaker {
    fn access(&self, x: &mut Exchange) -> Flow {
        let now = self.table.time(Instant::now());
        if self.table.admit(self.key(x), &self.rules, self.longest, now) {
            return Flow::Next;
        }
        let mut response = self.answer.response();
        for (name, template) in &self.fields {
            // A value of a client's that no field can have is left out.
            let Ok(value) = HeaderValue::try_from(&*template.to_text(&**x)) else { continue };
            if *name == CONTENT_TYPE {
                response.headers_mut().insert(name, value);
            } else {
                response.headers_mut().append(name, value);
            }
        }
        Flow::Reply(response)
    }
}

impl OnLog for ApiBreaker {
    fn log(&self, x: &Exchange) {
        // What was not sent to the upstream, by this plugin or another, says nothing about it.
        let Some(last) = x.attempts.last() else { return };
        let status = last.status.or_else(|| last.failed.map(|reason| reason.status().as_u16()));
        let outcome = match status {
            Some(status) if self.failures.contains(&status) => Outcome::Failure,
            Some(status) if self.successes.contains(&status) => Outcome::Success,
            _ => Outcome::Other,
        };
        let now = self.table.time(Instant::now());
        self.table.note(self.key(x), &self.rules, self.longest, outcome, now, || {
            let route = x.target.as_ref().map_or_else(|| "".into(), |target| target.route_id.clone());
            (route, x.host.clone())
        });
    }
}

/// Circuits that have seen failures, for the Control API: route, host, state, failures since it was closed, and how
/// often it has opened.
pub fn report(carry: &Carry) -> Value {
    let Some(table) = carry.find::<BreakerTable>(CARRIED) else { return json!([]) };
    let now = table.time(Instant::now());
    let mut circuits = Vec::new();
    table.each(|circuit| {
        circuits.push(((circuit.route.clone(), circuit.host.clone()), json!({
            "route": &*circuit.route,
            "host": &*circuit.host,
            "state": circuit.state(now).as_str(),
            "failures": circuit.failures,
            "opened": circuit.opened,
        })));
    });
    circuits.sort_by(|(a, _), (b, _)| a.cmp(b));
    circuits.into_iter().map(|(_, circuit)| circuit).collect()
}

/// Writes how many hosts of each route have a circuit that is not closed.
pub fn expose(carry: &Carry, out: &mut Exposition) {
    let Some(table) = carry.find::<BreakerTable>(CARRIED) else { return };
    let now = table.time(Instant::now());
    let mut routes = std::collections::BTreeMap::<Arc<str>, [u64; 2]>::new();
    table.each(|circuit| {
        let counts = routes.entry(circuit.route.clone()).or_default();
        match circuit.state(now) {
            State::Open => counts[0] += 1,
            State::HalfOpen => counts[1] += 1,
            State::Closed => {}
        }
    });
    out.family("", &names::BREAKER_HOSTS);
    for (route, [open, half]) in &routes {
        for (state, count) in [(State::Open, open), (State::HalfOpen, half)] {
            let labels = [("route", &**route), ("state", state.as_str())];
            out.sample("", names::BREAKER_HOSTS.name, labels, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use layers::error::{Error, Reason};
    use layers::exchange::Attempt;
    use layers::testing::{TestChain, TestEnv, exchange, field, text};

    use super::*;

    type Answer = fn(&mut Exchange) -> Result<(), Error>;

    /// An upstream that answers what the header field `x-status` says, or cannot be reached.
    fn upstream(x: &mut Exchange) -> Result<(), Error> {
        let status = x.request.headers.get("x-status").and_then(|status| status.to_str().ok()?.parse().ok());
        x.attempts.push(Attempt {
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            started: Instant::now(),
            status,
            took: Duration::ZERO,
            connect: Duration::ZERO,
            failed: status.is_none().then_some(Reason::ConnectFailed),
        });
        match status {
            Some(status) => {
                *x.response.status_mut() = http::StatusCode::from_u16(status).unwrap();
                Ok(())
            }
            None => Err(Error::new(Reason::ConnectFailed)),
        }
    }

    async fn ask(chain: &mut TestChain<Answer>, host: &str, status: &str) -> Exchange {
        let mut request = exchange("GET", &format!("http://{host}/"));
        if !status.is_empty() {
            request = request.header("x-status", status);
        }
        chain.run(request.build()).await
    }

    fn breaks(more: Value) -> Value {
        let mut config = json!({"break_response_code": 599});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    #[tokio::test]
    async fn failures_of_a_host_open_its_circuit_alone() {
        let cases = [
            ("the default", breaks(json!({})), "500", 3),
            ("other statuses", breaks(json!({"unhealthy": {"http_statuses": [503], "failures": 2}})), "503", 2),
            ("nobody reached", breaks(json!({"unhealthy": {"http_statuses": [502], "failures": 1}})), "", 1),
        ];
        for (name, config, status, failures) in cases {
            let env = TestEnv::default();
            let mut chain = env.chain::<ApiBreaker, Answer>(&config, upstream).unwrap();
            for _ in 0..failures {
                assert_ne!(ask(&mut chain, "a", status).await.response.status(), 599, "{name}");
            }
            assert_eq!(ask(&mut chain, "a", "200").await.response.status(), 599, "{name}");
            assert_eq!(ask(&mut chain, "b", "200").await.response.status(), 200, "{name}: another host");
            let told = report(&env.carry);
            assert_eq!((&told[0]["host"], &told[0]["state"]), (&json!("a"), &json!("open")), "{name}: {told}");
            let mut out = Exposition::default();
            expose(&env.carry, &mut out);
            assert!(out.finish().contains("{route=\"\",state=\"open\"} 1\n"), "{name}");
            // A change of the configuration closes no circuit.
            let mut changed = config.clone();
            changed["max_breaker_sec"] = 77.into();
            let mut again = env.chain::<ApiBreaker, Answer>(&changed, upstream).unwrap();
            assert_eq!(ask(&mut again, "a", "200").await.response.status(), 599, "{name}");
        }
    }

    #[tokio::test]
    async fn what_is_no_failure_opens_nothing() {
        let mut chain = TestEnv::default().chain::<ApiBreaker, Answer>(&breaks(json!({})), upstream).unwrap();
        for status in ["502", "", "404", "502", ""] {
            assert_ne!(ask(&mut chain, "a", status).await.response.status(), 599);
        }
        for status in ["500", "500", "200", "200", "200", "500", "500"] {
            assert_eq!(ask(&mut chain, "a", status).await.response.status().as_str(), status, "three successes forgive");
        }
    }

    #[tokio::test]
    async fn a_share_of_failures_opens_it_too() {
        let config = breaks(json!({"policy": "unhealthy-ratio", "unhealthy": {"error_ratio": 0.5, "min_request_threshold": 4}}));
        let mut chain = TestEnv::default().chain::<ApiBreaker, Answer>(&config, upstream).unwrap();
        for status in ["200", "500", "200", "500"] {
            assert_eq!(ask(&mut chain, "a", status).await.response.status().as_str(), status);
        }
        assert_eq!(ask(&mut chain, "a", "200").await.response.status(), 599);
    }

    #[tokio::test]
    async fn the_answer_can_be_chosen() {
        let config = breaks(json!({
            "unhealthy": {"failures": 1},
            "break_response_body": "{\"later\": true}",
            "break_response_headers": [
                {"key": "Content-Type", "value": "application/json"}, {"key": "X-Host", "value": "$host"}],
        }));
        let mut chain = TestEnv::default().chain::<ApiBreaker, Answer>(&config, upstream).unwrap();
        ask(&mut chain, "a", "500").await;
        let mut x = ask(&mut chain, "a", "200").await;
        assert_eq!((field(&x, "content-type"), field(&x, "x-host")), ("application/json", "a"));
        assert_eq!(text(&mut x).await, "{\"later\": true}");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), "break_response_code"),
            (json!({"break_response_code": 199}), "/break_response_code"),
            (breaks(json!({"max_breaker_sec": 2})), "/max_breaker_sec"),
            (breaks(json!({"unhealthy": {"http_statuses": []}})), "/unhealthy/http_statuses"),
            (breaks(json!({"unhealthy": {"http_statuses": [499]}})), "/unhealthy/http_statuses/0"),
            (breaks(json!({"unhealthy": {"http_statuses": [500, 500]}})), "/unhealthy/http_statuses"),
            (breaks(json!({"unhealthy": {"failures": 0}})), "/unhealthy/failures"),
            (breaks(json!({"healthy": {"http_statuses": [500]}})), "/healthy/http_statuses/0"),
            (breaks(json!({"healthy": {"success_ratio": 1.5}})), "/healthy/success_ratio"),
            (breaks(json!({"policy": "x"})), "/policy"),
            (breaks(json!({"break_response_headers": [{"key": "a b", "value": "1"}]})), "/break_response_headers/0/key"),
            (breaks(json!({"break_response_headers": [{"key": "a"}]})), "value"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<ApiBreaker>(&config).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(told.contains(words), "{config}: {told}");
        }
    }
}
