//! `traffic-split`: sends shares of a route's requests to other upstreams.
//!
//! Phase: `access`. The first rule that matches counts. Of any row of as many requests as the weights add up to, each
//! upstream gets exactly its weight, spread evenly, whichever worker serves them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use config::Id;
use config::error::{ConfigError, ErrorKind};
use config::expr::Expr;
use config::fields::Int;
use config::upstream::Upstream;
use layers::exchange::{Exchange, State};
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks};
use layers::upstream::cluster::Cluster;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Rules; the first that matches counts. A request that none matches goes to the route's upstream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rules: Option<Vec<Rule>>,
}

/// Who goes where.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Conditions, one of which has to hold. Without any the rule matches every request.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    matches: Option<Vec<Match>>,
    /// Upstreams and their shares.
    #[serde(default = "route_only")]
    #[schemars(length(min = 1, max = 20))]
    weighted_upstreams: Vec<Weighted>,
}

/// A condition.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Match {
    /// An expression over variables of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vars: Option<Vec<Value>>,
}

/// An upstream and its share. Without an upstream the route's own is meant.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Weighted {
    /// The id of an upstream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    upstream_id: Option<Id>,
    /// An upstream written here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    upstream: Option<Box<Upstream>>,
    /// The share, in proportion to the other weights; 0 gets nothing.
    #[serde(default)]
    weight: Int<0, { u32::MAX }, 1>,
}

fn route_only() -> Vec<Weighted> {
    vec![Weighted::default()]
}

/// The plugin.
pub struct TrafficSplit {
    rules: Box<[CompiledRule<Arc<Cluster>>]>,
}

struct CompiledRule<T> {
    /// Any of them; empty for every request.
    any: Option<Box<[Expr]>>,
    shares: Shares,
    /// Nothing is the route's own upstream.
    upstreams: Box<[Option<T>]>,
}

impl<T> CompiledRule<T> {
    fn matches(&self, x: &State) -> bool {
        self.any.as_ref().is_none_or(|any| any.iter().any(|rule| rule.eval(x)))
    }

    fn next(&self) -> Option<&T> {
        self.upstreams.get(self.shares.next()?)?.as_ref()
    }
}

/// Deals out requests by weight, in an order that repeats: whatever stretch of one period is looked at, everybody has
/// got his weight.
pub(crate) struct Shares {
    order: Order,
    number: AtomicU64,
}

enum Order {
    Nobody,
    Only(usize),
    /// The order of nginx's smooth round robin.
    Smooth(Box<[u8]>),
    /// For weights that make a long period. The number of the request, times a step that has no divisor in common with
    /// the sum of the weights, walks through all of `0..sum`; `bounds` are the ends of the entries' places. A step near
    /// the golden section of the sum spreads them evenly.
    Long { bounds: Box<[u64]>, sum: u64, step: u64 },
}

/// The longest period that is written out.
const PERIOD: u64 = 4096;

impl Shares {
    /// Dealt out in proportion to the weights.
    pub(crate) fn new(weights: impl Iterator<Item = u32>) -> Self {
        let weights: Vec<u64> = weights.map(u64::from).collect();
        let common = weights.iter().fold(0, |common, weight| divisor(common, *weight)).max(1);
        let weights: Vec<u64> = weights.iter().map(|weight| weight / common).collect();
        let sum: u64 = weights.iter().sum();
        let order = match weights.iter().filter(|weight| **weight > 0).count() {
            0 => Order::Nobody,
            1 => Order::Only(weights.iter().position(|weight| *weight > 0).unwrap_or_default()),
            _ if sum <= PERIOD => Order::Smooth(smooth(&weights, sum)),
            _ => {
                let near = (sum as f64 * 0.618_033_988_749_895) as u64;
                let step = (near.max(1)..).find(|step| divisor(*step, sum) == 1).unwrap_or(1);
                let bounds = weights.iter().scan(0, |end, weight| {
                    *end += weight;
                    Some(*end)
                });
                Order::Long { bounds: bounds.collect(), sum, step }
            }
        };
        Self { order, number: AtomicU64::new(0) }
    }

    /// The entry of the next request; nothing when nobody gets a share.
    /// Whose turn it is; nobody's if there are no weights.
    pub(crate) fn next(&self) -> Option<usize> {
        // Relaxed: numbers must differ, their order among workers does not matter.
        let number = || self.number.fetch_add(1, Ordering::Relaxed);
        match &self.order {
            Order::Nobody => None,
            Order::Only(entry) => Some(*entry),
            Order::Smooth(order) => order.get((number() % order.len() as u64) as usize).map(|e| usize::from(*e)),
            Order::Long { bounds, sum, step } => {
                let place = u128::from(number() % sum) * u128::from(*step) % u128::from(*sum);
                Some(bounds.partition_point(|bound| u128::from(*bound) <= place))
            }
        }
    }
}

/// One period: each time everybody gains his weight, and whoever has most is chosen and pays the sum.
fn smooth(weights: &[u64], sum: u64) -> Box<[u8]> {
    let mut credit = vec![0_i64; weights.len()];
    (0..sum)
        .map(|_| {
            credit.iter_mut().zip(weights).for_each(|(credit, weight)| *credit += *weight as i64);
            // The first of equals, as nginx does.
            let (entry, most) = credit
                .iter_mut()
                .enumerate()
                .rev()
                .max_by_key(|(_, credit)| **credit)
                .map_or((0, None), |(entry, credit)| (entry, Some(credit)));
            if let Some(credit) = most {
                *credit -= sum as i64;
            }
            entry as u8
        })
        .collect()
}

/// The greatest common divisor.
fn divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { divisor(b, a % b) }
}

impl Definition for TrafficSplit {
    const NAME: &'static str = "traffic-split";
    const PRIORITY: i32 = 966;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config, |_, _| Ok(())).err().into_iter().collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let rules = compile(&config, |entry, place| match entry {
            Wanted::Id(id) => env.upstreams.by_id(id.as_str()),
            Wanted::Inline(upstream) => env.upstreams.inline(&format!("{}{place}", Self::NAME), upstream),
        })?;
        hooks.access(&Arc::new(Self { rules }));
        Ok(())
    }
}

enum Wanted<'a> {
    Id(&'a Id),
    Inline(&'a Upstream),
}

fn compile<T>(
    config: &Config,
    find: impl Fn(Wanted<'_>, &str) -> Result<T, ConfigError>,
) -> Result<Box<[CompiledRule<T>]>, ConfigError> {
    let rules = config.rules.iter().flatten().enumerate();
    rules.map(|(index, rule)| compile_rule(rule, &format!("/rules/{index}"), &find)).collect()
}

fn compile_rule<T>(
    rule: &Rule,
    pointer: &str,
    find: impl Fn(Wanted<'_>, &str) -> Result<T, ConfigError>,
) -> Result<CompiledRule<T>, ConfigError> {
    if !(1..=20).contains(&rule.weighted_upstreams.len()) {
        let kind = ErrorKind::OutOfRange {
            what: "the number of elements",
            found: rule.weighted_upstreams.len().to_string(),
            allowed: "1 to 20 elements".into(),
        };
        return Err(ConfigError::new(format!("{pointer}/weighted_upstreams"), kind));
    }
    let any = rule.matches.as_ref().map(|matches| {
        let parse = |(index, condition): (usize, &Match)| match &condition.vars {
            None => Ok(Expr::default()),
            Some(vars) => Expr::parse(&Value::Array(vars.clone()))
                .map_err(|error| error.under(&format!("{pointer}/match/{index}/vars"))),
        };
        matches.iter().enumerate().map(parse).collect::<Result<Box<[_]>, _>>()
    });
    let upstreams = rule.weighted_upstreams.iter().enumerate().map(|(index, entry)| {
        let place = format!("{pointer}/weighted_upstreams/{index}");
        match (&entry.upstream_id, &entry.upstream) {
            (Some(_), Some(_)) => {
                Err(ConfigError::new(place, ErrorKind::Exclusive { one: "upstream_id", other: "upstream" }))
            }
            (Some(id), None) => find(Wanted::Id(id), &place)
                .map(Some)
                .map_err(|error| error.under(&format!("{place}/upstream_id"))),
            (None, Some(upstream)) => find(Wanted::Inline(upstream), &place)
                .map(Some)
                .map_err(|error| error.under(&format!("{place}/upstream"))),
            (None, None) => Ok(None),
        }
    });
    Ok(CompiledRule {
        any: any.transpose()?,
        shares: Shares::new(rule.weighted_upstreams.iter().map(|entry| entry.weight.get())),
        upstreams: upstreams.collect::<Result<_, _>>()?,
    })
}

impl Access for TrafficSplit {
    fn access(&self, x: &mut Exchange) -> Flow {
        let rule = self.rules.iter().find(|rule| rule.matches(x));
        if let Some(cluster) = rule.and_then(CompiledRule::next) {
            x.chosen = Some(cluster.clone());
        }
        Flow::Next
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;

    fn dealt(weights: &[u32], count: usize) -> Vec<usize> {
        let shares = Shares::new(weights.iter().copied());
        (0..count).filter_map(|_| shares.next()).collect()
    }

    #[test]
    fn any_row_as_long_as_the_sum_gives_everybody_his_weight() {
        for weights in
            [&[3, 1][..], &[1, 1], &[5, 1, 1], &[0, 2, 3], &[7, 11, 13], &[100, 1], &[60, 40], &[4096, 1]]
        {
            let sum = weights.iter().sum::<u32>() as usize;
            let row = dealt(weights, 3 * sum);
            for window in row.windows(sum) {
                for (entry, weight) in weights.iter().enumerate() {
                    let count = window.iter().filter(|dealt| **dealt == entry).count();
                    assert_eq!(count, *weight as usize, "{weights:?}");
                }
            }
        }
    }

    #[test]
    fn an_entry_does_not_come_in_bursts() {
        let row = dealt(&[50, 50], 100);
        let longest = row.chunk_by(|a, b| a == b).map(<[usize]>::len).max();
        assert!(longest <= Some(2), "{row:?}");
        assert_eq!(dealt(&[5, 1, 1], 7), [0, 0, 1, 0, 2, 0, 0]);
        for (weights, gaps) in [([90, 10], 10..=10), ([90_001, 10_000], 5..=20)] {
            let row = dealt(&weights, 1000);
            let rare: Vec<_> = row.iter().enumerate().filter(|(_, e)| **e == 1).map(|(i, _)| i).collect();
            assert!(rare.windows(2).all(|pair| gaps.contains(&(pair[1] - pair[0]))), "{rare:?}");
        }
    }

    #[test]
    fn huge_weights_and_none_at_all_do_not_stop_anything() {
        let row = dealt(&[u32::MAX, u32::MAX, 1], 10_000);
        let first = row.iter().filter(|entry| **entry == 0).count();
        assert!((4_950..=5_050).contains(&first), "{first}");
        assert!(dealt(&[0, 0], 10).is_empty());
    }

    /// Where requests go by these settings; `-` is the route's own upstream.
    fn sent(config: serde_json::Value, uris: &[&str]) -> Vec<String> {
        let config: Config = serde_json::from_value(config).unwrap();
        let rules = compile(&config, |wanted, place| {
            Ok(match wanted {
                Wanted::Id(id) => id.to_string(),
                Wanted::Inline(_) => format!("inline{place}"),
            })
        })
        .unwrap_or_else(|error| panic!("{error}"));
        let mut sent = Vec::new();
        for uri in uris {
            let x = exchange("GET", uri).build();
            let rule = rules.iter().find(|rule| rule.matches(&x));
            sent.push(rule.and_then(CompiledRule::next).map_or("-", String::as_str).to_owned());
        }
        sent
    }

    #[test]
    fn the_first_rule_that_matches_counts() {
        let rules = json!({"rules": [
            {"match": [{"vars": [["arg_a", "==", "1"], ["arg_b", "==", "1"]]}, {"vars": [["arg_c", "==", "1"]]}],
             "weighted_upstreams": [{"upstream_id": 1}]},
            {"match": [{"vars": [["arg_a", "==", "1"]]}], "weighted_upstreams": [{"upstream_id": "2"}]},
            {"match": [{"vars": [["arg_d", "==", "1"]]}]},
        ]});
        let uris = ["http://h/?a=1&b=1", "http://h/?c=1", "http://h/?a=1", "http://h/?d=1", "http://h/"];
        assert_eq!(sent(rules, &uris), ["1", "1", "2", "-", "-"]);
    }

    #[test]
    fn an_entry_without_an_upstream_is_the_routes_own() {
        let rules = json!({"rules": [{"weighted_upstreams": [
            {"upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}}, "weight": 3}, {"weight": 1},
        ]}]});
        let mut sent = sent(rules, &["http://h/"; 4]);
        sent.sort();
        assert_eq!(sent, ["-", "inline/rules/0/weighted_upstreams/0", "inline/rules/0/weighted_upstreams/0", "inline/rules/0/weighted_upstreams/0"]);
        assert_eq!(self::sent(json!({}), &["http://h/"]), ["-"]);
        assert_eq!(self::sent(json!({"rules": [{"weighted_upstreams": [{"weight": 0}]}]}), &["http://h/"]), ["-"]);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let upstream = json!({"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}});
        let cases = [
            (json!({"rules": [{"weighted_upstreams": []}]}), "/rules/0/weighted_upstreams"),
            (json!({"rules": [{"weighted_upstreams": [{"upstream_id": "1", "upstream": upstream}]}]}), "/rules/0/weighted_upstreams/0"),
            (json!({"rules": [{"weighted_upstreams": [{"weight": -1}]}]}), "/rules/0/weighted_upstreams/0/weight"),
            (json!({"rules": [{"match": [{"vars": [["a", "=", "b"]]}]}]}), "/rules/0/match/0/vars/0/1"),
            (json!({"rules": [{"weighted_upstreams": [{"upstream_id": "9"}]}]}), "/rules/0/weighted_upstreams/0/upstream_id"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<TrafficSplit>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
