//! `referer-restriction`: lets in, or keeps out, requests by the site whose page made them.
//!
//! Phase: `access`. A `Referer` that cannot be read counts as missing. Browsers send it, other clients write what they
//! like: this keeps others from embedding what is served, and authenticates nobody.

use std::collections::HashSet;
use std::sync::Arc;

use config::error::ConfigError;
use config::fields::{Host, List, WideText};
use http::{HeaderValue, StatusCode, header};
use layers::exchange::Exchange;
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::lists;
use crate::support::reply::Canned;

/// Settings. One of the two lists has to be there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Let in requests without a `Referer`.
    #[serde(default)]
    bypass_missing: bool,
    /// Hosts that are let in, `*.foo.com` for all below one; all others are refused. Excludes `blacklist`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    whitelist: Option<List<Host>>,
    /// Hosts that are refused. Excludes `whitelist`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blacklist: Option<List<Host>>,
    /// The message of a refusal.
    #[serde(default = "message")]
    message: WideText<1, 1024>,
}

fn message() -> WideText<1, 1024> {
    #[expect(clippy::expect_used, reason = "a constant within its limits")]
    WideText::new("Your referer host is not allowed").expect("1 to 1024 characters")
}

/// The plugin.
pub struct RefererRestriction {
    hosts: HashSet<Box<str>>,
    /// What stands behind the `*` of patterns.
    suffixes: Box<[Box<str>]>,
    /// Whether the hosts are let in; they are kept out otherwise.
    lets_in: bool,
    bypass_missing: bool,
    refusal: Canned,
}

impl Definition for RefererRestriction {
    const NAME: &'static str = "referer-restriction";
    const PRIORITY: i32 = 2990;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        hooks.access(&Arc::new(compile(&config)?));
        Ok(())
    }
}

fn compile(config: &Config) -> Result<RefererRestriction, ConfigError> {
    let (list, lets_in) =
        lists::one_of(("whitelist", config.whitelist.as_ref()), ("blacklist", config.blacklist.as_ref()))?;
    let lower = |host: &str| host.to_ascii_lowercase().into_boxed_str();
    Ok(RefererRestriction {
        hosts: list.iter().filter(|host| !host.is_wildcard()).map(|host| lower(host)).collect(),
        suffixes: list.iter().filter_map(|host| host.strip_prefix('*')).map(lower).collect(),
        lets_in,
        bypass_missing: config.bypass_missing,
        refusal: Canned::message(StatusCode::FORBIDDEN, &config.message),
    })
}

impl Access for RefererRestriction {
    fn access(&self, x: &mut Exchange) -> Flow {
        let allowed = match x.request.headers.get(header::REFERER).and_then(host_of) {
            None => self.bypass_missing,
            Some(host) => self.names(&host.to_ascii_lowercase()) == self.lets_in,
        };
        if allowed { Flow::Next } else { self.refusal.flow() }
    }
}

impl RefererRestriction {
    fn names(&self, host: &str) -> bool {
        self.hosts.contains(host) || self.suffixes.iter().any(|suffix| host.ends_with(&**suffix))
    }
}

/// The host of `http://host:port/path`; nothing where it is not clear.
fn host_of(referer: &HeaderValue) -> Option<&str> {
    let (scheme, rest) = referer.to_str().ok()?.split_once("://")?;
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return None;
    }
    let authority = rest.split(['/', '?', '#', '\\']).next()?;
    if authority.contains('@') {
        return None;
    }
    let host = match authority.find(']') {
        Some(end) if authority.starts_with('[') => authority.get(..=end)?,
        _ => authority.split(':').next()?,
    };
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn sites_are_let_in_or_kept_out() {
        let white = json!({"whitelist": ["xx.com", "*.yy.com", "[::1]"]});
        let black = json!({"blacklist": ["xx.com", "*.yy.com"], "bypass_missing": true, "message": "no"});
        let cases: [(_, Option<&[u8]>, _); 21] = [
            (&white, Some(b"http://xx.com/uri"), 200),
            (&white, Some(b"https://XX.com"), 200),
            (&white, Some(b"http://xx.com:8080?a"), 200),
            (&white, Some(b"http://[::1]:80/"), 200),
            (&white, Some(b"http://a.yy.com/uri"), 200),
            (&white, Some(b"http://yy.com/uri"), 403),
            (&white, Some(b"http://zyy.com/uri"), 403),
            (&white, Some(b"http://xx.com.evil.com/"), 403),
            (&white, Some(b"http://evil.com/?http://xx.com"), 403),
            (&white, Some(b"http://evil.com#.yy.com"), 403),
            (&white, Some(b"http://evil.com\\.yy.com"), 403),
            (&white, Some(b"http://xx.com@evil.com/"), 403),
            (&white, Some(b"ftp://xx.com/"), 403),
            (&white, Some(b"xx.com"), 403),
            (&white, Some(b"\xff"), 403),
            (&white, None, 403),
            (&black, Some(b"http://xx.com/"), 403),
            (&black, Some(b"http://b.a.yy.com/"), 403),
            (&black, Some(b"http://zz.com/"), 200),
            (&black, Some(b"nonsense"), 200),
            (&black, None, 200),
        ];
        for (config, referer, status) in cases {
            let mut chain = TestEnv::default().chain::<RefererRestriction, _>(config, |_| Ok(())).unwrap();
            let mut x = exchange("GET", "http://a/").build();
            if let Some(referer) = referer {
                x.request.headers.insert("referer", HeaderValue::from_bytes(referer).unwrap());
            }
            let mut x = chain.run(x).await;
            assert_eq!(x.response.status(), status, "{config} {referer:?}");
            if status == 403 {
                let message = config.get("message").and_then(|m| m.as_str());
                let message = message.unwrap_or("Your referer host is not allowed");
                assert_eq!(text(&mut x).await, format!("{{\"message\":\"{message}\"}}\n"));
            }
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"whitelist": ["a"], "blacklist": ["a"]}), ""),
            (json!({"whitelist": []}), "/whitelist"),
            (json!({"whitelist": ["a.*"]}), "/whitelist/0"),
            (json!({"blacklist": ["a", "b c"]}), "/blacklist/1"),
            (json!({"blacklist": ["a"], "message": ""}), "/message"),
            (json!({"blacklist": ["a"], "bypass": true}), "/bypass"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<RefererRestriction>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
