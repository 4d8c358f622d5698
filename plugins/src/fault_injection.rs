//! `fault-injection`: delays requests, or answers them with an error, to see what others make of it.
//!
//! Phase: rewrite. The delay comes first. As in APISIX.

use std::sync::Arc;
use std::time::Duration;

use config::template::Template;
use config::{ConfigError, Expr};
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use indexmap::IndexMap;
use layers::body::Body;
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Rewrite, RewriteWaits};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Settings of `fault-injection`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Answers in place of the upstream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<Abort>,
    /// Holds requests back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<Delay>,
}

/// An answer in place of the upstream's.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Abort {
    /// Status of the answer, 200 to 599.
    #[schemars(range(min = 200, max = 599))]
    pub http_status: u16,
    /// Body of the answer; `$` variables are filled in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Header fields of the answer; `$` variables are filled in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headers: Option<IndexMap<String, Value>>,
    /// Share of the requests in percent; all of them if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub percentage: Option<u8>,
    /// Lists of conditions; requests that fulfil one of the lists are meant. All of them if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vars: Option<Vec<Value>>,
}

/// A pause before a request goes on.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delay {
    /// Length in seconds; fractions are allowed.
    #[schemars(range(min = 0))]
    pub duration: f64,
    /// Share of the requests in percent; all of them if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub percentage: Option<u8>,
    /// Lists of conditions; requests that fulfil one of the lists are meant. All of them if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vars: Option<Vec<Value>>,
}

/// Which requests are meant.
struct Aim {
    percentage: u8,
    vars: Vec<Expr>,
}

impl Aim {
    fn build(at: &str, percentage: Option<u8>, vars: Option<&[Value]>) -> Result<Self, ConfigError> {
        let percentage = percentage.unwrap_or(100);
        if percentage > 100 {
            return Err(ConfigError::invalid(format!("{at}/percentage"), "write a number from 0 to 100"));
        }
        let vars = vars
            .into_iter()
            .flatten()
            .enumerate()
            .map(|(index, list)| {
                Expr::parse(list).map_err(|error| error.under(&format!("{at}/vars/{index}")))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { percentage, vars })
    }

    fn hits(&self, x: &Exchange) -> bool {
        let chosen = self.percentage == 100 || fastrand::u8(0..100) < self.percentage;
        chosen && (self.vars.is_empty() || self.vars.iter().any(|expr| expr.eval(&**x)))
    }
}

struct Answer {
    aim: Aim,
    status: StatusCode,
    body: Template,
    headers: Vec<(HeaderName, Template)>,
}

impl Answer {
    fn build(abort: &Abort) -> Result<Self, ConfigError> {
        let status =
            StatusCode::from_u16(abort.http_status).ok().filter(|s| (200..600).contains(&s.as_u16()));
        let headers = abort.headers.iter().flatten().map(|(name, value)| {
            let at = format!("/abort/headers/{}", config::error::escape(name));
            let field = HeaderName::try_from(name.as_str())
                .map_err(|_| ConfigError::invalid(at.clone(), "no header field can have this name"))?;
            match value {
                Value::String(text) => Ok((field, Template::parse(text))),
                Value::Number(number) => Ok((field, Template::parse(&number.to_string()))),
                _ => Err(ConfigError::invalid(at, "write text or a number")),
            }
        });
        Ok(Self {
            aim: Aim::build("/abort", abort.percentage, abort.vars.as_deref())?,
            status: status.ok_or_else(|| {
                ConfigError::invalid("/abort/http_status", "write a status from 200 to 599")
            })?,
            body: Template::parse(abort.body.as_deref().unwrap_or_default()),
            headers: headers.collect::<Result<_, _>>()?,
        })
    }
}

/// Delays and answers.
pub struct FaultInjection {
    delay: Option<(Aim, Duration)>,
    abort: Option<Answer>,
}

impl FaultInjection {
    fn new(config: &Config) -> Result<Self, ConfigError> {
        let delay = config.delay.as_ref().map(|delay| {
            let aim = Aim::build("/delay", delay.percentage, delay.vars.as_deref())?;
            let duration = Duration::try_from_secs_f64(delay.duration)
                .map_err(|_| ConfigError::invalid("/delay/duration", "write seconds, 0 or more"))?;
            Ok((aim, duration))
        });
        Ok(Self { delay: delay.transpose()?, abort: config.abort.as_ref().map(Answer::build).transpose()? })
    }

    fn answer(&self, x: &Exchange) -> Flow {
        let Some(abort) = self.abort.as_ref().filter(|abort| abort.aim.hits(x)) else { return Flow::Next };
        let mut response = Response::new(Body::from(abort.body.to_text(&**x).into_owned()));
        *response.status_mut() = abort.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        for (name, value) in &abort.headers {
            // A variable may hold what a field cannot; the field is then left out.
            if let Ok(value) = HeaderValue::from_str(&value.to_text(&**x)) {
                headers.insert(name.clone(), value);
            }
        }
        Flow::Reply(response)
    }
}

impl Definition for FaultInjection {
    const NAME: &'static str = "fault-injection";
    const PRIORITY: i32 = 11_000;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        if config.abort.is_none() && config.delay.is_none() {
            return vec![ConfigError::new("", config::ErrorKind::NoneOf { fields: vec!["abort", "delay"] })];
        }
        Self::new(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let plugin = Arc::new(Self::new(&config)?);
        if plugin.delay.is_some() {
            hooks.rewrite_waits(&plugin);
        } else {
            hooks.rewrite(&plugin);
        }
        Ok(())
    }
}

impl Rewrite for FaultInjection {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        self.answer(x)
    }
}

impl RewriteWaits for FaultInjection {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        if let Some((aim, duration)) = &self.delay
            && aim.hits(x)
        {
            tokio::time::sleep(*duration).await;
        }
        self.answer(x)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use layers::testing::{TestEnv, exchange, field, text};
    use serde_json::json;

    use super::*;

    async fn run(settings: Value, uri: &str) -> Exchange {
        let mut chain = TestEnv::default().chain::<FaultInjection, _>(&settings, |_| Ok(())).unwrap();
        chain.run(exchange("GET", uri).build()).await
    }

    #[tokio::test]
    async fn an_abort_answers_with_status_body_and_fields() {
        let settings = json!({"abort": {"http_status": 403, "body": "no $arg_who", "headers": {"X-Why": "$host", "X-N": 7}}});
        let mut x = run(settings, "http://a/?who=jack").await;
        assert_eq!((x.status(), field(&x, "x-why"), field(&x, "x-n")), (403, "a", "7"));
        assert_eq!(text(&mut x).await, "no jack");
    }

    #[tokio::test]
    async fn only_the_requests_that_are_meant_are_hit() {
        let cases = [
            (json!({"http_status": 403, "percentage": 0}), 200),
            (json!({"http_status": 403, "percentage": 100}), 403),
            (json!({"http_status": 403, "vars": [[["arg_who", "==", "jack"]]]}), 403),
            (
                json!({"http_status": 403, "vars": [[["arg_who", "==", "rose"]], [["arg_who", "==", "jack"]]]}),
                403,
            ),
            (json!({"http_status": 403, "vars": [[["arg_who", "==", "rose"]]]}), 200),
        ];
        for (abort, status) in cases {
            let x = run(json!({ "abort": abort }), "http://a/?who=jack").await;
            assert_eq!(x.status(), status, "{abort}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_holds_the_request_back() {
        let before = tokio::time::Instant::now();
        let x = run(json!({"delay": {"duration": 1.5}, "abort": {"http_status": 201}}), "http://a/").await;
        assert_eq!(before.elapsed(), Duration::from_millis(1500));
        assert_eq!(x.status(), 201);
    }

    #[tokio::test]
    async fn settings_that_cannot_work_are_refused() {
        for settings in [
            json!({}),
            json!({"abort": {"http_status": 100}}),
            json!({"abort": {"http_status": 200, "percentage": 101}}),
            json!({"delay": {"duration": -1}}),
            json!({"abort": {"http_status": 200, "vars": [["arg_who", "??", "jack"]]}}),
        ] {
            assert!(TestEnv::default().build::<FaultInjection>(&settings).is_err(), "{settings}");
        }
    }
}
