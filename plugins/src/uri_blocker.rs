//! `uri-blocker`: refuses requests whose target fits one of some patterns.
//!
//! Phase: `rewrite`. The target is matched as the client wrote it and, unlike in APISIX, in its normal decoded form
//! too, so that another spelling of a blocked path is blocked as well.

use std::sync::Arc;

use config::error::ConfigError;
use config::fields::{Int, List, WideText};
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Rewrite};
use regex::bytes::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::support::lists;
use crate::support::reply::{self, Canned};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Patterns of targets, path and query, that are refused.
    block_rules: List<WideText<1, 4096>, 0, true>,
    /// The status of a refusal.
    #[serde(default)]
    rejected_code: Int<200, 999, 403>,
    /// The message of a refusal. Without it the page of the status is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rejected_msg: Option<WideText<1, { u32::MAX as usize }>>,
    /// Whether the case of letters does not matter.
    #[serde(default)]
    case_insensitive: bool,
}

/// The plugin.
pub struct UriBlocker {
    rules: Box<[Regex]>,
    refusal: Canned,
}

impl Definition for UriBlocker {
    const NAME: &'static str = "uri-blocker";
    const PRIORITY: i32 = 2900;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        hooks.rewrite(&Arc::new(compile(&config)?));
        Ok(())
    }
}

fn compile(config: &Config) -> Result<UriBlocker, ConfigError> {
    let status = reply::status(config.rejected_code.get());
    let sources = config.block_rules.iter().map(|rule| &**rule);
    Ok(UriBlocker {
        rules: lists::patterns(sources, config.case_insensitive, "/block_rules")?,
        refusal: match &config.rejected_msg {
            Some(message) => Canned::json(status, &json!({ "error_msg": &**message })),
            None => Canned::status(status),
        },
    })
}

impl UriBlocker {
    fn blocks(&self, x: &State) -> bool {
        let fits = |target: &str| self.rules.iter().any(|rule| rule.is_match(target.as_bytes()));
        if fits(x.request_uri()) {
            return true;
        }
        // As it was written is as it is: nothing else to look at.
        if x.original_uri.is_none() && x.decoded_path.is_none() {
            return false;
        }
        match x.request.uri.query() {
            Some(query) => fits(&format!("{}?{query}", x.path())),
            None => fits(x.path()),
        }
    }
}

impl Rewrite for UriBlocker {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        if self.blocks(x) { self.refusal.flow() } else { Flow::Next }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, field, text};

    use super::*;

    #[tokio::test]
    async fn what_fits_a_rule_is_refused_in_every_spelling() {
        let rules = json!({"block_rules": ["^/admin", "root.(exe|m+)", "[?&]x="]});
        let caseless = json!({"block_rules": ["/SELECT"], "case_insensitive": true});
        // (settings, as written, decoded path if it differs)
        let cases = [
            (&rules, "/", None, 200),
            (&rules, "/admin/x", None, 403),
            (&rules, "/a/admin", None, 200),
            (&rules, "/%61dmin/x", Some("/admin/x"), 403),
            (&rules, "/b/../admin", Some("/admin"), 403),
            (&rules, "/a?x=1", None, 403),
            (&rules, "/%62?x=1", Some("/b"), 403),
            (&rules, "/a?xx=1", None, 200),
            (&rules, "/root.exe", None, 403),
            (&caseless, "/select", None, 403),
            (&json!({"block_rules": []}), "/", None, 200),
        ];
        for (config, target, decoded, status) in cases {
            let mut chain = TestEnv::default().chain::<UriBlocker, _>(config, |_| Ok(())).unwrap();
            let mut x = exchange("GET", &format!("http://a{target}")).build();
            x.decoded_path = decoded.map(Into::into);
            let mut x = chain.run(x).await;
            assert_eq!(x.response.status(), status, "{target}: {}", text(&mut x).await);
        }
    }

    #[tokio::test]
    async fn the_refusal_can_be_chosen() {
        for (config, status, kind, body) in [
            (json!({}), 403, "text/html; charset=utf-8", "<title>403 Forbidden</title>"),
            (json!({"rejected_code": 401, "rejected_msg": "no"}), 401, "text/plain; charset=utf-8", "{\"error_msg\":\"no\"}\n"),
        ] {
            let mut config = config;
            config["block_rules"] = json!(["."]);
            let mut chain = TestEnv::default().chain::<UriBlocker, _>(&config, |_| Ok(())).unwrap();
            let mut x = chain.run(exchange("GET", "http://a/").build()).await;
            assert_eq!((x.response.status().as_u16(), field(&x, "content-type")), (status, kind));
            assert!(text(&mut x).await.contains(body), "{config}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"block_rules": ["a", "("]}), "/block_rules/1"),
            (json!({"block_rules": ["a", "a"]}), "/block_rules"),
            (json!({"block_rules": [""]}), "/block_rules/0"),
            (json!({"block_rules": ["a"], "rejected_code": 199}), "/rejected_code"),
            (json!({"block_rules": ["a"], "rejected_msg": ""}), "/rejected_msg"),
            (json!({"block_rules": ["a"], "case": true}), "/case"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<UriBlocker>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
