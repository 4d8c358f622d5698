//! `workflow`: the first case that fits a request says what becomes of it: an answer, or a limit.
//!
//! Phase: `access`. A limit is the plugin of that name with settings of its own; its counts are those of the rule. As
//! in APISIX only the first action of a rule is taken; the others are checked and have no effect.

use std::sync::Arc;

use config::error::{ConfigError, ErrorKind};
use config::expr::Expr;
use config::fields::Int;
use http::StatusCode;
use layers::exchange::Exchange;
use layers::plugin::{Access, AccessWaits, BuildEnv, Definition, Extras, Flow, Hooks};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::limit_conn::{self, LimitConn};
use crate::limit_count::{self, LimitCount, Metadata};
use crate::limit_req::{self, LimitReq};
use crate::support::limiting::at_least_one;
use crate::support::reply::{self, Canned};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Rules; the first whose case fits is taken.
    rules: Vec<Rule>,
}

/// A case and what to do.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// An expression, as in `vars` of a route. Every request fits where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    case: Option<Vec<Value>>,
    /// What to do, `[name, settings]`: `return` with a `code`, `limit-count`, `limit-conn` or `limit-req`. The first one
    /// is taken.
    #[schemars(length(min = 1))]
    actions: Vec<Action>,
}

/// A name and settings.
#[derive(Clone, Serialize, Deserialize)]
pub struct Action(String, Value);

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The settings may hold a password.
        f.debug_tuple("Action").field(&self.0).finish()
    }
}

impl JsonSchema for Action {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Action".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "array", "minItems": 2, "maxItems": 2})
    }
}

/// Settings of `return`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Return {
    /// The status of the answer.
    code: Int<200, 599>,
}

/// An action whose settings were read.
enum Settings {
    Return(Return),
    Count(Box<limit_count::Config>),
    Conn(Box<limit_conn::Config>),
    Req(Box<limit_req::Config>),
}

impl Settings {
    fn read(action: &Action) -> Result<Self, Vec<ConfigError>> {
        let settings = &action.1;
        let read = match action.0.as_str() {
            "return" => config::typed::parse(settings).map(Self::Return),
            LimitCount::NAME => {
                checked::<LimitCount, _>(settings).and_then(ungrouped).map(|limit| Self::Count(Box::new(limit)))
            }
            LimitConn::NAME => checked::<LimitConn, _>(settings).map(|limit| Self::Conn(Box::new(limit))),
            LimitReq::NAME => checked::<LimitReq, _>(settings).map(|limit| Self::Req(Box::new(limit))),
            _ => return Err(vec![unknown(&action.0)]),
        };
        read.map_err(|errors| errors.into_iter().map(|error| error.under("/1")).collect())
    }
}

/// A limit of a rule counts for the rule alone, as in APISIX.
fn ungrouped(limit: limit_count::Config) -> Result<limit_count::Config, Vec<ConfigError>> {
    let error = || ConfigError::invalid("/group", "a limit of a rule has no group: take it out");
    if limit.has_group() { Err(vec![error()]) } else { Ok(limit) }
}

fn checked<D: Definition<Config = C>, C: DeserializeOwned + JsonSchema + 'static>(
    settings: &Value,
) -> Result<C, Vec<ConfigError>> {
    let settings = config::typed::parse::<C>(settings)?;
    let errors = D::check(&settings);
    if errors.is_empty() { Ok(settings) } else { Err(errors) }
}

fn unknown(name: &str) -> ConfigError {
    let allowed = ["return", LimitCount::NAME, LimitConn::NAME, LimitReq::NAME].map(str::to_owned).to_vec();
    ConfigError::new("/0", ErrorKind::NotOneOf { found: name.to_owned(), allowed, nearest: None })
}

/// The plugin.
pub struct Workflow {
    rules: Box<[Compiled]>,
}

struct Compiled {
    case: Option<Expr>,
    step: Step,
}

enum Step {
    Return(Canned),
    Count(LimitCount),
    Conn(LimitConn),
    Req(LimitReq),
}

impl Definition for Workflow {
    const NAME: &'static str = "workflow";
    const PRIORITY: i32 = 1006;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.reads_metadata(LimitCount::NAME);
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        for (index, rule) in config.rules.iter().enumerate() {
            errors.extend(case(rule).err().map(|error| error.under(&format!("/rules/{index}/case"))));
            if rule.actions.is_empty() {
                errors.push(at_least_one(&format!("/rules/{index}/actions")));
            }
            for (number, action) in rule.actions.iter().enumerate() {
                let found = Settings::read(action).err().unwrap_or_default();
                let at = format!("/rules/{index}/actions/{number}");
                errors.extend(found.into_iter().map(|error| error.under(&at)));
            }
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::read(env.upstreams.metadata(LimitCount::NAME).as_ref());
        let mut rules = Vec::with_capacity(config.rules.len());
        for (index, rule) in config.rules.iter().enumerate() {
            let Some(action) = rule.actions.first() else { continue };
            let at = |error: ConfigError| error.under(&format!("/rules/{index}/actions/0"));
            let settings = Settings::read(action).map_err(|errors| {
                let first = errors.into_iter().next();
                at(first.unwrap_or_else(|| ConfigError::invalid("", "the settings cannot be read")))
            })?;
            let place = format!("{}/workflow/{index}", env.owner);
            let step = match settings {
                Settings::Return(settings) => {
                    let status = reply::status(settings.code.get());
                    Ok(Step::Return(rejection(status)))
                }
                Settings::Count(limit) => {
                    LimitCount::new(&limit, &metadata, env, &place).map(Step::Count)
                }
                Settings::Conn(limit) => LimitConn::new(&limit, env, &place).map(Step::Conn),
                Settings::Req(limit) => LimitReq::new(&limit, env, &place).map(Step::Req),
            };
            rules.push(Compiled { case: case(rule)?, step: step.map_err(at)? });
        }
        let waits = rules.iter().any(|rule| rule.step.waits());
        let plugin = Arc::new(Self { rules: rules.into() });
        if waits {
            hooks.access_waits(&plugin);
        } else {
            hooks.access(&plugin);
        }
        Ok(())
    }
}

fn case(rule: &Rule) -> Result<Option<Expr>, ConfigError> {
    rule.case.as_ref().map(|case| Expr::parse(&Value::Array(case.clone()))).transpose()
}

fn rejection(status: StatusCode) -> Canned {
    Canned::json(status, &json!({"error_msg": "rejected by workflow"}))
}

impl Step {
    fn waits(&self) -> bool {
        match self {
            Self::Return(_) => false,
            Self::Count(limit) => limit.waits(),
            Self::Conn(limit) => limit.waits(),
            Self::Req(limit) => limit.waits(),
        }
    }
}

impl Workflow {
    fn step(&self, x: &Exchange) -> Option<&Step> {
        let fits = |rule: &&Compiled| rule.case.as_ref().is_none_or(|case| case.eval(&**x));
        self.rules.iter().find(fits).map(|rule| &rule.step)
    }
}

impl Access for Workflow {
    fn access(&self, x: &mut Exchange) -> Flow {
        match self.step(x) {
            None => Flow::Next,
            Some(Step::Return(answer)) => answer.flow(),
            Some(Step::Count(limit)) => Access::access(limit, x),
            Some(Step::Conn(limit)) => Access::access(limit, x),
            Some(Step::Req(limit)) => Access::access(limit, x),
        }
    }
}

impl AccessWaits for Workflow {
    async fn access(&self, x: &mut Exchange) -> Flow {
        match self.step(x) {
            None => Flow::Next,
            Some(Step::Return(answer)) => answer.flow(),
            Some(Step::Count(limit)) => AccessWaits::access(limit, x).await,
            Some(Step::Conn(limit)) => AccessWaits::access(limit, x).await,
            Some(Step::Req(limit)) => AccessWaits::access(limit, x).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{ExchangeBuilder, TestEnv, exchange, text};

    use super::*;

    fn get(path: &str) -> ExchangeBuilder {
        exchange("GET", &format!("http://a.com{path}"))
    }

    async fn statuses(config: Value, requests: Vec<ExchangeBuilder>) -> Vec<u16> {
        let mut chain = TestEnv::default().chain::<Workflow, _>(&config, |_| Ok(())).unwrap();
        let mut statuses = Vec::new();
        for request in requests {
            statuses.push(chain.run(request.build()).await.response.status().as_u16());
        }
        statuses
    }

    #[tokio::test]
    async fn the_first_case_that_fits_is_taken() {
        let config = json!({"rules": [
            {"case": [["uri", "==", "/no"]], "actions": [["return", {"code": 403}], ["return", {"code": 404}]]},
            {"case": ["OR", ["uri", "==", "/a"], ["uri", "==", "/b"]],
             "actions": [["limit-count", {"count": 1, "time_window": 60, "rejected_code": 429}]]},
            {"case": [["uri", "==", "/c"]],
             "actions": [["limit-req", {"rate": 0.01, "burst": 0, "key": "remote_addr", "rejected_code": 429}]]},
            {"case": [["uri", "==", "/d"]],
             "actions": [["limit-count", {"count": 1, "time_window": 60, "rejected_code": 429}]]},
        ]});
        let paths = ["/no", "/a", "/b", "/c", "/c", "/d", "/other"];
        let requests = paths.iter().map(|path| get(path)).collect();
        assert_eq!(statuses(config, requests).await, [403, 200, 429, 200, 429, 200, 200], "each rule counts for itself");
        let config = json!({"rules": [{"actions": [["return", {"code": 410}]]}]});
        assert_eq!(statuses(config, vec![get("/")]).await, [410]);
        assert_eq!(statuses(json!({"rules": []}), vec![get("/")]).await, [200]);
    }

    #[tokio::test]
    async fn a_limit_may_wait_and_holds_places() {
        let config = json!({"rules": [
            {"case": [["arg_x", "==", "1"]], "actions": [
                ["limit-conn", {"conn": 1, "burst": 1, "default_conn_delay": 0.01, "key": "remote_addr", "rejected_code": 429}]]},
            {"actions": [["return", {"code": 404}]]},
        ]});
        let mut chain = TestEnv::default().chain::<Workflow, _>(&config, |_| Ok(())).unwrap();
        let mut held = Vec::new();
        for expected in [200, 200, 429] {
            let x = chain.run(get("/?x=1").build()).await;
            assert_eq!(x.response.status(), expected);
            held.push(x);
        }
        assert_eq!(chain.run(get("/").build()).await.response.status(), 404);
        held.clear();
        assert_eq!(chain.run(get("/?x=1").build()).await.response.status(), 200);
    }

    #[tokio::test]
    async fn an_answer_says_who_gave_it() {
        let config = json!({"rules": [{"actions": [["return", {"code": 403}]]}]});
        let mut chain = TestEnv::default().chain::<Workflow, _>(&config, |_| Ok(())).unwrap();
        let mut x = chain.run(get("/").build()).await;
        assert_eq!(text(&mut x).await, "{\"error_msg\":\"rejected by workflow\"}\n");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let rule = |action: Value| json!({"rules": [{"actions": [action]}]});
        let cases = [
            (json!({}), "rules"),
            (json!({"rules": [{"case": [["uri", "==", "/"]]}]}), "actions"),
            (json!({"rules": [{"actions": []}]}), "/rules/0/actions"),
            (json!({"rules": [{"case": [["uri", "~~~", "/"]], "actions": [["return", {"code": 403}]]}]}), "/rules/0/case"),
            (rule(json!(["fault-injection", {}])), "/rules/0/actions/0/0: `fault-injection` is not known"),
            (rule(json!(["return"])), "/rules/0/actions/0"),
            (rule(json!(["return", {}])), "/rules/0/actions/0/1: `code` is missing"),
            (rule(json!(["return", {"code": 600}])), "/rules/0/actions/0/1/code"),
            (rule(json!(["limit-count", {"count": 1}])), "/rules/0/actions/0/1: `time_window` is missing"),
            (rule(json!(["limit-count", {"count": 1, "time_window": 1, "group": "g"}])), "/rules/0/actions/0/1/group"),
            (rule(json!(["limit-conn", {"conn": 1, "burst": 0, "key": "a"}])), "default_conn_delay"),
            (rule(json!(["limit-req", {"rate": 1, "burst": 0, "key": "a", "policy": "redis"}])), "`redis_host` is missing"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<Workflow>(&config).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(told.contains(words), "{config}: {told}");
        }
    }
}
