//! `consumer-restriction`: lets in, or keeps out, consumers, consumer groups, services or routes by name.
//!
//! Phase: `access`. `blacklist` goes first; who stands in `whitelist` is let in; for the others `allowed_by_methods` says
//! with which methods. Where there is nothing to look at, the request is refused.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use config::error::ConfigError;
use config::fields::{Int, List, Method};
use http::StatusCode;
use layers::exchange::{Exchange, State};
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::reply::{self, Canned};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is looked at.
    #[serde(default, rename = "type")]
    subject: Subject,
    /// Who is let in; all others are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    whitelist: Option<List<String>>,
    /// Who is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blacklist: Option<List<String>>,
    /// With which methods some are let in. Who is not named here may use all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allowed_by_methods: Option<Vec<ByMethods>>,
    /// The status of a refusal.
    #[serde(default)]
    rejected_code: Int<200, 599, 403>,
    /// The message of a refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rejected_msg: Option<String>,
}

/// What is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Subject {
    /// The name of the consumer.
    #[default]
    ConsumerName,
    /// The id of the consumer's group.
    ConsumerGroupId,
    /// The id of the service.
    ServiceId,
    /// The id of the route.
    RouteId,
}

impl Subject {
    const fn name(self) -> &'static str {
        match self {
            Self::ConsumerName => "consumer_name",
            Self::ConsumerGroupId => "consumer_group_id",
            Self::ServiceId => "service_id",
            Self::RouteId => "route_id",
        }
    }

    fn of(self, x: &State) -> Option<&str> {
        match self {
            Self::ConsumerName => Some(&x.consumer.as_ref()?.name),
            Self::ConsumerGroupId => x.consumer.as_ref()?.group_id.as_deref(),
            Self::ServiceId => x.target.as_ref()?.service_id.as_deref(),
            Self::RouteId => Some(&x.target.as_ref()?.route_id),
        }
    }
}

/// The methods that one may use.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ByMethods {
    /// Who.
    user: String,
    /// The methods.
    methods: List<Method>,
}

/// The plugin.
pub struct ConsumerRestriction {
    subject: Subject,
    whitelist: Option<HashSet<Box<str>>>,
    blacklist: HashSet<Box<str>>,
    methods: HashMap<Box<str>, Vec<Method>>,
    nobody: Canned,
    forbidden: Canned,
}

fn set(list: &List<String>) -> HashSet<Box<str>> {
    list.iter().map(|name| name.as_str().into()).collect()
}

impl Definition for ConsumerRestriction {
    const NAME: &'static str = "consumer-restriction";
    const PRIORITY: i32 = 2400;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::NEEDS_CONSUMERS;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let restricts =
            config.whitelist.is_some() || config.blacklist.is_some() || config.allowed_by_methods.is_some();
        let words = "write `whitelist`, `blacklist` or `allowed_by_methods`";
        (!restricts).then(|| ConfigError::invalid("", words)).into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let subject = config.subject.name();
        let mut methods = HashMap::new();
        for allowed in config.allowed_by_methods.unwrap_or_default() {
            // The first of two for the same user counts.
            methods.entry(allowed.user.into()).or_insert_with(|| allowed.methods.to_vec());
        }
        let own = config.rejected_msg.unwrap_or_else(|| format!("The {subject} is forbidden."));
        hooks.access(&Arc::new(Self {
            subject: config.subject,
            whitelist: config.whitelist.as_ref().map(set),
            blacklist: config.blacklist.as_ref().map(set).unwrap_or_default(),
            methods,
            nobody: Canned::message(
                StatusCode::UNAUTHORIZED,
                &format!("The request is rejected, please check the {subject} for this request"),
            ),
            forbidden: Canned::message(reply::status(config.rejected_code.get()), &own),
        }));
        Ok(())
    }
}

impl Access for ConsumerRestriction {
    fn access(&self, x: &mut Exchange) -> Flow {
        match self.subject.of(x) {
            None => self.nobody.flow(),
            Some(name) if self.lets_in(name, x.request.method.as_str()) => Flow::Next,
            Some(_) => self.forbidden.flow(),
        }
    }
}

impl ConsumerRestriction {
    fn lets_in(&self, name: &str, method: &str) -> bool {
        if self.blacklist.contains(name) {
            return false;
        }
        if let Some(whitelist) = &self.whitelist {
            return whitelist.contains(name);
        }
        self.methods.get(name).is_none_or(|methods| methods.iter().any(|allowed| allowed.as_str() == method))
    }
}

#[cfg(test)]
mod tests {
    use layers::consumer::Consumer;
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::{Value, json};

    use super::*;

    async fn run(config: &Value, method: &str, consumer: Option<Consumer>) -> Exchange {
        let mut x = exchange(method, "http://a/").build();
        x.consumer = consumer.map(Arc::new);
        TestEnv::default().chain::<ConsumerRestriction, _>(config, |_| Ok(())).unwrap().run(x).await
    }

    #[tokio::test]
    async fn lists_say_who_is_let_in() {
        let jack_posts = json!([{"user": "jack", "methods": ["POST"]}, {"user": "jack", "methods": ["GET"]}]);
        let cases = [
            (json!({"whitelist": ["jack"]}), "GET", "jack", 200),
            (json!({"whitelist": ["jack"]}), "GET", "jill", 403),
            (json!({"whitelist": ["jack"]}), "GET", "Jack", 403),
            (json!({"blacklist": ["jack"]}), "GET", "jack", 403),
            (json!({"blacklist": ["jack"]}), "GET", "jill", 200),
            (json!({"blacklist": ["jack"], "whitelist": ["jack"]}), "GET", "jack", 403),
            (json!({"allowed_by_methods": jack_posts}), "POST", "jack", 200),
            (json!({"allowed_by_methods": jack_posts}), "GET", "jack", 403),
            (json!({"allowed_by_methods": jack_posts}), "GET", "jill", 200),
            (json!({"allowed_by_methods": jack_posts, "whitelist": ["jack"]}), "GET", "jack", 200),
            (json!({"allowed_by_methods": jack_posts, "whitelist": ["jill"]}), "POST", "jack", 403),
            (json!({"whitelist": ["jack"], "rejected_code": 418}), "GET", "jill", 418),
        ];
        for (config, method, name, status) in cases {
            let x = run(&config, method, Some(Consumer::new(name))).await;
            assert_eq!(x.status(), status, "{config} {method} {name}");
        }
    }

    #[tokio::test]
    async fn what_is_looked_at_can_be_chosen() {
        let grouped = || Consumer { group_id: Some("g".into()), ..Consumer::new("jack") };
        for (kind, consumer, status) in [
            ("consumer_name", None, 401),
            ("consumer_group_id", Some(Consumer::new("jack")), 401),
            ("consumer_group_id", Some(grouped()), 200),
            ("service_id", Some(grouped()), 401),
            ("route_id", Some(grouped()), 401),
        ] {
            let config = json!({"type": kind, "whitelist": ["g"]});
            let mut x = run(&config, "GET", consumer).await;
            assert_eq!(x.status(), status, "{kind}");
            if status == 401 {
                let words = format!("The request is rejected, please check the {kind} for this request");
                assert_eq!(text(&mut x).await, format!("{{\"message\":\"{words}\"}}\n"));
            }
        }
    }

    #[tokio::test]
    async fn a_refusal_has_its_words() {
        let jill = || Some(Consumer::new("jill"));
        let mut x = run(&json!({"whitelist": ["jack"]}), "GET", jill()).await;
        assert_eq!(text(&mut x).await, "{\"message\":\"The consumer_name is forbidden.\"}\n");
        let mut x = run(&json!({"whitelist": ["jack"], "rejected_msg": "go away"}), "GET", jill()).await;
        assert_eq!(text(&mut x).await, "{\"message\":\"go away\"}\n");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (settings, pointer) in [
            (json!({}), ""),
            (json!({"whitelist": []}), "/whitelist"),
            (json!({"blacklist": []}), "/blacklist"),
            (json!({"type": "ip", "whitelist": ["a"]}), "/type"),
            (json!({"whitelist": ["a"], "rejected_code": 100}), "/rejected_code"),
            (json!({"allowed_by_methods": [{"user": "a", "methods": []}]}), "/allowed_by_methods/0/methods"),
            (json!({"allowed_by_methods": [{"user": "a", "methods": ["FLY"]}]}), "/allowed_by_methods/0/methods/0"),
        ] {
            let errors = TestEnv::default().build::<ConsumerRestriction>(&settings).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{settings}: {errors:?}");
        }
    }
}
