//! `ua-restriction`: lets in, or keeps out, clients by what they say they are.
//!
//! Phase: `access`. A request with several `User-Agent` fields is let in only if each of them is: which one the
//! upstream reads is not known. In APISIX one that is allowed is enough.

use std::sync::Arc;

use config::error::ConfigError;
use config::fields::{List, WideText};
use http::{StatusCode, header};
use layers::exchange::Exchange;
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks};
use regex::bytes::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::lists;
use crate::support::reply::Canned;

/// Settings. One of the two lists has to be there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Let in requests without a `User-Agent`.
    #[serde(default)]
    bypass_missing: bool,
    /// Patterns of agents that are let in; all others are refused. Excludes `denylist`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allowlist: Option<List<WideText<1, 4096>>>,
    /// Patterns of agents that are refused. Excludes `allowlist`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    denylist: Option<List<WideText<1, 4096>>>,
    /// The message of a refusal.
    #[serde(default = "message")]
    message: WideText<1, 1024>,
}

fn message() -> WideText<1, 1024> {
    #[expect(clippy::expect_used, reason = "a constant within its limits")]
    WideText::new("Not allowed").expect("1 to 1024 characters")
}

/// The plugin.
pub struct UaRestriction {
    patterns: Box<[Regex]>,
    /// Whether the patterns let in; they keep out otherwise.
    lets_in: bool,
    bypass_missing: bool,
    refusal: Canned,
}

impl Definition for UaRestriction {
    const NAME: &'static str = "ua-restriction";
    const PRIORITY: i32 = 2999;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        hooks.access(&Arc::new(compile(&config)?));
        Ok(())
    }
}

fn compile(config: &Config) -> Result<UaRestriction, ConfigError> {
    let (list, lets_in) =
        lists::one_of(("allowlist", config.allowlist.as_ref()), ("denylist", config.denylist.as_ref()))?;
    let pointer = if lets_in { "/allowlist" } else { "/denylist" };
    Ok(UaRestriction {
        patterns: lists::patterns(list.iter().map(|source| &**source), false, pointer)?,
        lets_in,
        bypass_missing: config.bypass_missing,
        refusal: Canned::message(StatusCode::FORBIDDEN, &config.message),
    })
}

impl Access for UaRestriction {
    fn access(&self, x: &mut Exchange) -> Flow {
        let mut agents = x.request.headers.get_all(header::USER_AGENT).iter().peekable();
        let allowed = match agents.peek() {
            None => self.bypass_missing,
            Some(_) => agents.all(|agent| {
                let agent = agent.as_bytes().trim_ascii();
                self.patterns.iter().any(|pattern| pattern.is_match(agent)) == self.lets_in
            }),
        };
        if allowed { Flow::Next } else { self.refusal.flow() }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn agents_are_let_in_or_kept_out() {
        let allow = json!({"allowlist": ["my-bot1", "(Baiduspider)/(\\d+)\\.(\\d+)"]});
        let deny = json!({"denylist": ["my-bot2", "^Twitterspider/"], "bypass_missing": true, "message": "no"});
        let cases: [(_, &[&[u8]], _); 13] = [
            (&allow, &[b"my-bot1"], 200),
            (&allow, &[b" xx my-bot1 "], 200),
            (&allow, &[b"Baiduspider/3.0"], 200),
            (&allow, &[b"baiduspider/3.0"], 403),
            (&allow, &[b"curl"], 403),
            (&allow, &[], 403),
            (&allow, &[b"my-bot1", b"curl"], 403),
            (&allow, &[b"\xff\xfe"], 403),
            (&deny, &[b"my-bot2"], 403),
            (&deny, &[b"curl", b"my-bot2"], 403),
            (&deny, &[b"Twitterspider/2.0"], 403),
            (&deny, &[b"a Twitterspider/2.0"], 200),
            (&deny, &[], 200),
        ];
        for (config, agents, status) in cases {
            let mut chain = TestEnv::default().chain::<UaRestriction, _>(config, |_| Ok(())).unwrap();
            let mut x = exchange("GET", "http://a/").build();
            for agent in agents {
                x.request.headers.append("user-agent", HeaderValue::from_bytes(agent).unwrap());
            }
            let mut x = chain.run(x).await;
            assert_eq!(x.response.status(), status, "{config} {agents:?}");
            if status == 403 {
                let message = config.get("message").and_then(|m| m.as_str()).unwrap_or("Not allowed");
                assert_eq!(text(&mut x).await, format!("{{\"message\":\"{message}\"}}\n"));
            }
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"allowlist": ["a"], "denylist": ["a"]}), ""),
            (json!({"allowlist": []}), "/allowlist"),
            (json!({"allowlist": ["a", "("]}), "/allowlist/1"),
            (json!({"denylist": [""]}), "/denylist/0"),
            (json!({"denylist": [1]}), "/denylist/0"),
            (json!({"denylist": ["a"], "message": ""}), "/message"),
            (json!({"denylist": ["a"], "bypass_missing": "yes"}), "/bypass_missing"),
            (json!({"denylist": ["a"], "rejected": 1}), "/rejected"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<UaRestriction>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
