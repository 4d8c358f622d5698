//! `fault-injection`: answers, or makes wait, a share of the requests, to see what callers make of it.
//!
//! Phase: `rewrite`, before nearly everything else. Each share is drawn for itself.

use std::sync::Arc;
use std::time::Duration;

use config::error::{ConfigError, ErrorKind};
use config::expr::Expr;
use config::fields::{Int, Seconds};
use config::template::Template;
use http::{HeaderName, HeaderValue, header};
use layers::body::Body;
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Rewrite, RewriteWaits};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::support::headers::{self, Fields, Value};
use crate::support::reply::{self, Canned};

/// Settings. At least one of the two has to be there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Answer at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    abort: Option<Abort>,
    /// Wait before going on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delay: Option<Delay>,
}

/// An answer in place of the upstream's.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Abort {
    /// The status.
    http_status: Int<200, 999>,
    /// The body, with variables. Without it the page of the status is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    /// Header fields, with variables.
    #[serde(default, skip_serializing_if = "Fields::is_empty")]
    headers: Fields,
    /// The share of requests, in per cent; all where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    percentage: Option<Int<0, 100>>,
    /// Expressions: only requests for which one of them holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Vec<Json>>>")]
    vars: Option<Vec<Json>>,
}

/// Time to wait.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delay {
    /// How long, in seconds.
    duration: Seconds<true>,
    /// The share of requests, in per cent; all where it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    percentage: Option<Int<0, 100>>,
    /// Expressions: only requests for which one of them holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Vec<Json>>>")]
    vars: Option<Vec<Json>>,
}

/// The plugin.
pub struct FaultInjection {
    abort: Option<CompiledAbort>,
    delay: Option<(Which, Duration)>,
}

struct CompiledAbort {
    which: Which,
    answer: Canned,
    body: Option<Template>,
    headers: Box<[(HeaderName, Value)]>,
}

/// Which requests are meant.
struct Which {
    percentage: Option<u32>,
    any: Option<Box<[Expr]>>,
}

impl Which {
    fn new(percentage: Option<Int<0, 100>>, vars: Option<&[Json]>, at: &str) -> Result<Self, ConfigError> {
        let parse = |(index, rule): (usize, &Json)| {
            Expr::parse(rule).map_err(|error| error.under(&format!("{at}/vars/{index}")))
        };
        Ok(Self {
            percentage: percentage.map(Int::get),
            any: vars.map(|vars| vars.iter().enumerate().map(parse).collect()).transpose()?,
        })
    }

    fn meant(&self, x: &State) -> bool {
        self.percentage.is_none_or(|share| fastrand::u32(1..=100) <= share)
            && self.any.as_ref().is_none_or(|any| any.is_empty() || any.iter().any(|rule| rule.eval(x)))
    }
}

impl Definition for FaultInjection {
    const NAME: &'static str = "fault-injection";
    const PRIORITY: i32 = 11000;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let plugin = Arc::new(compile(&config)?);
        if plugin.delay.is_some() { hooks.rewrite_waits(&plugin) } else { hooks.rewrite(&plugin) }
        Ok(())
    }
}

fn compile(config: &Config) -> Result<FaultInjection, ConfigError> {
    if config.abort.is_none() && config.delay.is_none() {
        return Err(ConfigError::new("", ErrorKind::NoneOf { fields: vec!["abort", "delay"] }));
    }
    let abort = config.abort.as_ref().map(|abort| {
        Ok::<_, ConfigError>(CompiledAbort {
            which: Which::new(abort.percentage, abort.vars.as_deref(), "/abort")?,
            answer: Canned::status(reply::status(abort.http_status.get())),
            body: abort.body.as_deref().map(Template::parse),
            headers: headers::compile(&abort.headers, "/abort/headers")?.into(),
        })
    });
    let delay = config.delay.as_ref().map(|delay| {
        let which = Which::new(delay.percentage, delay.vars.as_deref(), "/delay")?;
        Ok::<_, ConfigError>((which, delay.duration.duration()))
    });
    Ok(FaultInjection { abort: abort.transpose()?, delay: delay.transpose()? })
}

impl FaultInjection {
    fn abort(&self, x: &State) -> Flow {
        let Some(abort) = self.abort.as_ref().filter(|abort| abort.which.meant(x)) else { return Flow::Next };
        let mut response = abort.answer.response();
        if let Some(body) = &abort.body {
            *response.body_mut() = Body::from(body.to_text(x).into_owned());
            let kind = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
        }
        for (name, value) in &abort.headers {
            headers::set(response.headers_mut(), name, value.render(x, None));
        }
        Flow::Reply(response)
    }
}

impl Rewrite for FaultInjection {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        self.abort(x)
    }
}

impl RewriteWaits for FaultInjection {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        if let Some((which, time)) = &self.delay
            && which.meant(x)
        {
            tokio::time::sleep(*time).await;
        }
        self.abort(x)
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, field, text};
    use serde_json::json;

    use super::*;

    async fn run(config: Json, uri: &str) -> Exchange {
        let mut chain = TestEnv::default().chain::<FaultInjection, _>(&config, |_| Ok(())).unwrap();
        chain.run(exchange("GET", uri).build()).await
    }

    #[tokio::test]
    async fn requests_are_answered_here() {
        let config = json!({"abort": {"http_status": 403, "body": "$arg_a!", "headers": {"x-h": "$host"}}});
        let mut x = run(config, "http://a.com/?a=1").await;
        assert_eq!((x.response.status().as_u16(), field(&x, "x-h")), (403, "a.com"));
        assert_eq!(field(&x, "content-type"), "text/plain; charset=utf-8");
        assert_eq!(text(&mut x).await, "1!");
        let mut x = run(json!({"abort": {"http_status": 503}}), "http://a/").await;
        assert!(text(&mut x).await.contains("503 Service Unavailable"));
        let mut x = run(json!({"abort": {"http_status": 200}}), "http://a/").await;
        assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (200, ""));
    }

    #[tokio::test]
    async fn only_the_requests_that_are_meant() {
        let vars = json!([[["arg_name", "==", "jack"], ["arg_age", "==", 18]], [["arg_name2", "==", "allen"]]]);
        let cases = [
            ("http://a/?name=jack&age=18", 403),
            ("http://a/?name=jack", 200),
            ("http://a/?name2=allen", 403),
            ("http://a/", 200),
        ];
        for (uri, status) in cases {
            let x = run(json!({"abort": {"http_status": 403, "vars": vars}}), uri).await;
            assert_eq!(x.response.status(), status, "{uri}");
        }
    }

    #[tokio::test]
    async fn a_share_of_the_requests() {
        for (percentage, expected) in [(0, 0..=0), (100, 1000..=1000), (30, 200..=400)] {
            let config = json!({"abort": {"http_status": 403, "percentage": percentage}});
            let mut chain = TestEnv::default().chain::<FaultInjection, _>(&config, |_| Ok(())).unwrap();
            let mut refused = 0;
            for _ in 0..1000 {
                let x = chain.run(exchange("GET", "http://a/").build()).await;
                refused += u32::from(x.response.status() == 403);
            }
            assert!(expected.contains(&refused), "{percentage} %: {refused}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_wait() {
        let before = tokio::time::Instant::now();
        let config = json!({"delay": {"duration": 1.5}, "abort": {"http_status": 503}});
        assert_eq!(run(config, "http://a/").await.response.status(), 503);
        assert_eq!(before.elapsed().as_millis() / 100, 15);
        run(json!({"delay": {"duration": 60, "percentage": 0}}), "http://a/").await;
        run(json!({"delay": {"duration": 60, "vars": [[["arg_a", "==", "1"]]]}}), "http://a/").await;
        assert_eq!(before.elapsed().as_millis() / 100, 15);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), "none of"),
            (json!({"abort": {}}), "`http_status` is missing"),
            (json!({"abort": {"http_status": 100}}), "/abort/http_status"),
            (json!({"abort": {"http_status": 500, "percentage": 101}}), "/abort/percentage"),
            (json!({"abort": {"http_status": 500, "vars": [["a", "==", "b"]]}}), "/abort/vars/0"),
            (json!({"abort": {"http_status": 500, "headers": {"a b": 1}}}), "/abort/headers/a b"),
            (json!({"delay": {"duration": -1}}), "/delay/duration"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<FaultInjection>(&config).unwrap_err();
            assert!(errors[0].to_string().contains(words), "{config}: {errors:?}");
        }
    }
}
