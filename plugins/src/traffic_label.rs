//! `traffic-label`: sets fields of the request by the first rule that fits, dealt out by weight.
//!
//! Phase: `access`. An action without fields leaves its share of the requests as they are. All workers deal from one
//! order, so that shares are exact for the process.

use std::sync::Arc;

use config::error::ConfigError;
use config::expr::Expr;
use config::fields::Int;
use config::template::Template;
use http::{HeaderName, HeaderValue};
use layers::exchange::Exchange;
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::headers::{self, Fields};
use crate::support::limiting::at_least_one;
use crate::traffic_split::Shares;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Rules; the first that fits is taken.
    #[schemars(length(min = 1))]
    rules: Vec<Rule>,
}

/// Which requests, and what to do with them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// An expression, as in `vars` of a route. Every request fits where it is missing.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    cases: Option<Vec<Value>>,
    /// What to do, dealt out by weight.
    #[schemars(length(min = 1))]
    actions: Vec<Action>,
}

/// A share of the requests.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// Fields to set on the request; values may hold variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1))]
    set_headers: Option<Fields>,
    /// The share, in proportion to the other weights.
    #[serde(default)]
    weight: Int<1, { u32::MAX }>,
}

/// The plugin.
pub struct TrafficLabel {
    rules: Box<[Compiled]>,
}

struct Compiled {
    cases: Option<Expr>,
    shares: Shares,
    actions: Box<[Box<[Field]>]>,
}

struct Field {
    name: HeaderName,
    value: FieldValue,
}

enum FieldValue {
    Known(HeaderValue),
    Asked(Template),
}

impl Definition for TrafficLabel {
    const NAME: &'static str = "traffic-label";
    const PRIORITY: i32 = 967;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        if config.rules.is_empty() {
            return vec![at_least_one("/rules")];
        }
        let rules = config.rules.iter().enumerate();
        rules.filter_map(|(index, rule)| Some(compile(rule).err()?.under(&format!("/rules/{index}")))).collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let rules = config.rules.iter().map(compile).collect::<Result<_, _>>()?;
        hooks.access(&Arc::new(Self { rules }));
        Ok(())
    }
}

fn compile(rule: &Rule) -> Result<Compiled, ConfigError> {
    if rule.actions.is_empty() {
        return Err(at_least_one("/actions"));
    }
    let cases = rule.cases.as_ref().map(|cases| Expr::parse(&Value::Array(cases.clone()))).transpose();
    let mut actions = Vec::with_capacity(rule.actions.len());
    for (index, action) in rule.actions.iter().enumerate() {
        let at = format!("/actions/{index}/set_headers");
        if action.set_headers.as_ref().is_some_and(|fields| fields.is_empty()) {
            return Err(ConfigError::invalid(at, "name a field, or take `set_headers` out"));
        }
        let fields = action.set_headers.iter().flatten().map(|(name, value)| {
            let text = value.text();
            let template = Template::parse(&text);
            let value = match template.as_literal() {
                Some(text) => FieldValue::Known(HeaderValue::try_from(text).map_err(|_| {
                    let pointer = format!("{at}/{}", config::error::escape(name));
                    ConfigError::invalid(pointer, "a field cannot have this value")
                })?),
                None => FieldValue::Asked(template),
            };
            Ok(Field { name: headers::name(name, &at)?, value })
        });
        actions.push(fields.collect::<Result<_, ConfigError>>()?);
    }
    Ok(Compiled {
        cases: cases.map_err(|error| error.under("/match"))?,
        shares: Shares::new(rule.actions.iter().map(|action| action.weight.get())),
        actions: actions.into(),
    })
}

impl Access for TrafficLabel {
    fn access(&self, x: &mut Exchange) -> Flow {
        let fits = |rule: &&Compiled| rule.cases.as_ref().is_none_or(|cases| cases.eval(&**x));
        let Some(rule) = self.rules.iter().find(fits) else { return Flow::Next };
        let action = rule.shares.next().and_then(|index| rule.actions.get(index));
        for field in action.into_iter().flatten() {
            let value = match &field.value {
                FieldValue::Known(value) => Some(value.clone()),
                // What a client wrote may hold bytes that a field cannot have; then there is no label.
                FieldValue::Asked(template) => HeaderValue::try_from(&*template.to_text(&**x)).ok(),
            };
            match value {
                Some(value) => _ = x.request.headers.insert(field.name.clone(), value),
                None => _ = x.request.headers.remove(&field.name),
            }
        }
        Flow::Next
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{ExchangeBuilder, TestEnv, exchange};
    use serde_json::json;

    use super::*;

    fn get(path: &str) -> ExchangeBuilder {
        exchange("GET", &format!("http://a.com{path}"))
    }

    /// The field `x-label` of each request, as the upstream gets it.
    async fn labels(config: Value, requests: Vec<ExchangeBuilder>) -> Vec<String> {
        let mut chain = TestEnv::default().chain::<TrafficLabel, _>(&config, |_| Ok(())).unwrap();
        let mut labels = Vec::new();
        for request in requests {
            let x = chain.run(request.build()).await;
            let label = x.request.headers.get("x-label").map(|value| value.to_str().unwrap().to_owned());
            labels.push(label.unwrap_or_default());
        }
        labels
    }

    #[tokio::test]
    async fn the_first_rule_that_fits_sets_fields() {
        let config = json!({"rules": [
            {"match": [["arg_v", "==", "1"]], "actions": [{"set_headers": {"X-Label": "one", "x-n": 7}}]},
            {"match": ["OR", ["arg_v", "==", "2"], ["arg_v", "==", "3"]],
             "actions": [{"set_headers": {"X-Label": "$remote_addr-$arg_v"}}]},
            {"match": [["arg_v", "==", "4"]], "actions": [{"weight": 1}]},
            {"actions": [{"set_headers": {"X-Label": "rest"}}]},
        ]});
        let requests = ["/?v=1", "/?v=3", "/?v=4", "/"].map(|path| get(path).header("x-label", "client's")).into();
        assert_eq!(labels(config, requests).await, ["one", "127.0.0.1-3", "client's", "rest"]);
    }

    #[tokio::test]
    async fn shares_are_exact() {
        let config = json!({"rules": [{"actions": [
            {"set_headers": {"X-Label": "a"}, "weight": 3}, {"set_headers": {"X-Label": "b"}, "weight": 2}, {"weight": 5}]}]});
        let told = labels(config, (0..20).map(|_| get("/")).collect()).await;
        for (label, count) in [("a", 6), ("b", 4), ("", 10)] {
            assert_eq!(told.iter().filter(|told| *told == label).count(), count, "{label}: {told:?}");
        }
    }

    #[tokio::test]
    async fn a_value_that_no_field_can_have_takes_the_field_away() {
        let config = json!({"rules": [{"actions": [{"set_headers": {"X-Label": "$arg_v"}}]}]});
        let requests = vec![get("/?v=%0Aevil").header("x-label", "client's")];
        assert_eq!(labels(config, requests).await, [""]);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), "rules"),
            (json!({"rules": []}), "/rules"),
            (json!({"rules": [{}]}), "actions"),
            (json!({"rules": [{"actions": []}]}), "/rules/0/actions"),
            (json!({"rules": [{"actions": [{"weight": 0}]}]}), "/rules/0/actions/0/weight"),
            (json!({"rules": [{"actions": [{"set_body": {}}]}]}), "set_body"),
            (json!({"rules": [{"actions": [{"set_headers": {}}]}]}), "/rules/0/actions/0/set_headers"),
            (json!({"rules": [{"actions": [{"set_headers": {"a b": "1"}}]}]}), "/rules/0/actions/0/set_headers/a b"),
            (json!({"rules": [{"actions": [{"set_headers": {"a": "1\n2"}}]}]}), "/rules/0/actions/0/set_headers/a"),
            (json!({"rules": [{"match": [["a", "~~~", "b"]], "actions": [{}]}]}), "/rules/0/match"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<TrafficLabel>(&config).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(told.contains(words), "{config}: {told}");
        }
    }
}
