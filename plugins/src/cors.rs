//! `cors`: tells browsers which other sites may use a route.
//!
//! Phases: `rewrite`, which answers every `OPTIONS` request itself, and `header_filter`. Fields of the upstream with the
//! same names are replaced.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use config::error::{ConfigError, ErrorKind};
use config::pattern;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Extras, Flow, Hooks, OnResponse, Rewrite};
use regex::bytes::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Sites that may use the route, `scheme://host:port`, separated by commas. `*` is every site, without
    /// credentials; `**` is every site also with credentials, which lets any page act for its visitor.
    #[serde(default = "star")]
    allow_origins: String,
    /// Methods that may be used, separated by commas; `*` or `**` for all.
    #[serde(default = "star")]
    allow_methods: String,
    /// Header fields that may be sent, separated by commas; `*` for all, `**` for those that the browser asks for.
    #[serde(default = "star")]
    allow_headers: String,
    /// Header fields of the answer that scripts may read, separated by commas. Without it the field is not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expose_headers: Option<String>,
    /// How long a browser may remember the answer, in seconds; -1 for not at all.
    #[serde(default = "max_age")]
    max_age: i64,
    /// Whether cookies and other credentials may be sent. Then no other setting may be `*`.
    #[serde(default)]
    allow_credential: bool,
    /// Patterns of sites. With them `allow_origins` does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    allow_origins_by_regex: Option<Vec<String>>,
    /// Names of lists of sites in the plugin's metadata; they count where the others do not match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    allow_origins_by_metadata: Option<Vec<String>>,
    /// Sites that may see how long things took, written as `allow_origins`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timing_allow_origins: Option<String>,
    /// Patterns of sites that may see how long things took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    timing_allow_origins_by_regex: Option<Vec<String>>,
}

fn star() -> String {
    "*".into()
}

fn max_age() -> i64 {
    5
}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// Lists of sites by name, each written as `allow_origins`.
    #[serde(default)]
    allow_origins: BTreeMap<String, String>,
}

/// Which sites are meant.
#[derive(Debug)]
enum Origins {
    /// `*`
    Every,
    /// `**`: every site, by its name.
    EveryNamed,
    Listed(HashSet<Box<[u8]>>),
    Matching(Box<[Regex]>),
}

impl Origins {
    fn parse(list: &str, pointer: &str) -> Result<Self, ConfigError> {
        let is_origin = |origin: &str| {
            origin.split_once("://").is_some_and(|(scheme, rest)| {
                let word = scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
                !scheme.is_empty() && word && !rest.is_empty()
            })
        };
        match list {
            "*" => Ok(Self::Every),
            "**" => Ok(Self::EveryNamed),
            "null" => Ok(Self::Listed([Box::from(&b"null"[..])].into())),
            list if list.split(',').all(is_origin) => {
                Ok(Self::Listed(list.split(',').map(|origin| origin.as_bytes().into()).collect()))
            }
            list => {
                let expected = "`*`, `**`, `null`, or sites such as https://a.com separated by commas";
                let kind = ErrorKind::BadFormat { found: list.into(), expected: expected.into() };
                Err(ConfigError::new(pointer, kind))
            }
        }
    }

    fn matching(patterns: &[String], pointer: &str) -> Result<Self, ConfigError> {
        let compiled = patterns.iter().enumerate().map(|(index, source)| {
            pattern::compile(source, false)
                .map_err(|error| ConfigError::invalid(format!("{pointer}/{index}"), error.to_string()))
        });
        compiled.collect::<Result<_, _>>().map(Self::Matching)
    }

    /// What is answered to a page of the site `origin`; nothing if it is not meant.
    fn allowed(&self, origin: Option<&HeaderValue>) -> Option<HeaderValue> {
        const STAR: HeaderValue = HeaderValue::from_static("*");
        match self {
            Self::Every => Some(STAR),
            Self::EveryNamed => Some(origin.cloned().unwrap_or(STAR)),
            Self::Listed(list) => origin.filter(|origin| list.contains(origin.as_bytes())).cloned(),
            Self::Matching(patterns) => {
                origin.filter(|origin| patterns.iter().any(|p| p.is_match(origin.as_bytes()))).cloned()
            }
        }
    }
}

/// The plugin.
pub struct Cors {
    origins: Origins,
    from_metadata: Box<[Origins]>,
    timing: Option<Origins>,
    /// Whether answers differ by site.
    varies: bool,
    methods: HeaderValue,
    /// Nothing stands for "what the browser asks for".
    headers: Option<HeaderValue>,
    expose: Option<HeaderValue>,
    max_age: HeaderValue,
    credentials: bool,
}

impl Definition for Cors {
    const NAME: &'static str = "cors";
    const PRIORITY: i32 = 4000;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.checked_metadata::<Metadata>(|metadata| {
            let wrong = |(name, list): (&String, &String)| {
                Origins::parse(list, &format!("/allow_origins/{}", config::error::escape(name))).err()
            };
            metadata.allow_origins.iter().filter_map(wrong).collect()
        });
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors: Vec<ConfigError> = compile(config, &Metadata::default()).err().into_iter().collect();
        if config.allow_credential {
            let stars = [
                ("allow_origins", Some(&config.allow_origins)),
                ("allow_methods", Some(&config.allow_methods)),
                ("allow_headers", Some(&config.allow_headers)),
                ("expose_headers", config.expose_headers.as_ref()),
                ("timing_allow_origins", config.timing_allow_origins.as_ref()),
            ];
            errors.extend(stars.into_iter().filter(|(_, value)| value.is_some_and(|v| v == "*")).map(
                |(name, _)| {
                    let problem = "with `allow_credential` write the allowed values, not `*`";
                    ConfigError::invalid(format!("/{name}"), problem)
                },
            ));
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = env.metadata.and_then(|value| Metadata::deserialize(value).ok()).unwrap_or_default();
        let plugin = Arc::new(compile(&config, &metadata)?);
        hooks.rewrite(&plugin);
        hooks.response(&plugin);
        Ok(())
    }
}

fn compile(config: &Config, metadata: &Metadata) -> Result<Cors, ConfigError> {
    let field = |text: &str, name: &str| {
        HeaderValue::from_str(text)
            .map_err(|_| ConfigError::invalid(format!("/{name}"), "a header field has no control characters"))
    };
    let origins = match &config.allow_origins_by_regex {
        Some(patterns) => Origins::matching(patterns, "/allow_origins_by_regex")?,
        None => Origins::parse(&config.allow_origins, "/allow_origins")?,
    };
    let from_metadata = config
        .allow_origins_by_metadata
        .iter()
        .flatten()
        .filter_map(|name| metadata.allow_origins.get(name))
        .map(|list| Origins::parse(list, "/allow_origins_by_metadata"))
        .collect::<Result<Box<[_]>, _>>()?;
    let timing = match (&config.timing_allow_origins_by_regex, &config.timing_allow_origins) {
        (Some(patterns), _) => Some(Origins::matching(patterns, "/timing_allow_origins_by_regex")?),
        (None, Some(list)) => Some(Origins::parse(list, "/timing_allow_origins")?),
        (None, None) => None,
    };
    Ok(Cors {
        varies: !matches!(origins, Origins::Every),
        origins,
        from_metadata,
        timing,
        methods: match &*config.allow_methods {
            "**" => HeaderValue::from_static("GET,POST,PUT,DELETE,PATCH,HEAD,OPTIONS,CONNECT,TRACE"),
            methods => field(methods, "allow_methods")?,
        },
        headers: match &*config.allow_headers {
            "**" => None,
            headers => Some(field(headers, "allow_headers")?),
        },
        expose: match config.expose_headers.as_deref() {
            None | Some("") => None,
            Some(expose) => Some(field(expose, "expose_headers")?),
        },
        max_age: HeaderValue::from(config.max_age),
        credentials: config.allow_credential,
    })
}

/// The site that the client named, before another plugin may change the field.
#[derive(Default)]
struct Origin(Option<HeaderValue>);

impl Rewrite for Cors {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        if let Some(origin) = x.request.headers.get(header::ORIGIN).cloned() {
            x.put_slot(Origin(Some(origin)));
        }
        if x.request.method == Method::OPTIONS { Flow::status(StatusCode::OK) } else { Flow::Next }
    }
}

const TIMING_ALLOW_ORIGIN: HeaderName = HeaderName::from_static("timing-allow-origin");

impl OnResponse for Cors {
    fn response(&self, x: &mut Exchange) {
        let origin = x.slot::<Origin>().and_then(|origin| origin.0.clone());
        let origin = origin.as_ref();
        let timing = self.timing.as_ref().and_then(|timing| timing.allowed(origin));
        let allowed = self
            .origins
            .allowed(origin)
            .or_else(|| self.from_metadata.iter().find_map(|origins| origins.allowed(origin)));
        let asked = x.request.headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
        let headers = x.response.headers_mut();
        if self.varies && !varies_by_origin(headers) {
            headers.append(header::VARY, HeaderValue::from_static("Origin"));
        }
        if let Some(timing) = timing {
            headers.insert(TIMING_ALLOW_ORIGIN, timing);
        }
        let Some(allowed) = allowed else { return };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, self.methods.clone());
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, self.max_age.clone());
        if let Some(expose) = &self.expose {
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
        if let Some(value) = self.headers.clone().or(asked) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, value);
        }
        if self.credentials {
            headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }
}

fn varies_by_origin(headers: &HeaderMap) -> bool {
    headers.get_all(header::VARY).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').any(|name| {
            let name = name.trim();
            name == "*" || name.eq_ignore_ascii_case("origin")
        })
    })
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, field};
    use serde_json::{Value, json};

    use super::*;

    async fn run(config: &Value, origin: Option<&str>, method: &str) -> Exchange {
        let env = TestEnv {
            metadata: Some(json!({"allow_origins": {"shop": "https://shop.com,https://s.com"}})),
            ..TestEnv::default()
        };
        let mut chain = env
            .chain::<Cors, _>(config, |x| {
                x.response.headers_mut().insert("access-control-allow-origin", "upstream".parse().unwrap());
                Ok(())
            })
            .unwrap();
        let mut request = exchange(method, "http://a/").header("access-control-request-headers", "X-Asked");
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        chain.run(request.build()).await
    }

    #[tokio::test]
    async fn the_allowed_site_is_told() {
        let https = Some("https://a.com");
        let cases = [
            ("every site", json!({}), https, "*"),
            ("no site named", json!({}), None, "*"),
            ("every site by name", json!({"allow_origins": "**"}), https, "https://a.com"),
            ("every site by name, none named", json!({"allow_origins": "**"}), None, "*"),
            ("a list", json!({"allow_origins": "https://b.com,https://a.com"}), https, "https://a.com"),
            ("not in the list", json!({"allow_origins": "https://b.com"}), https, "upstream"),
            ("a list, none named", json!({"allow_origins": "https://a.com"}), None, "upstream"),
            ("no part of a name", json!({"allow_origins": "https://a.com"}), Some("https://a.com.evil"), "upstream"),
            ("null", json!({"allow_origins": "null"}), Some("null"), "null"),
            ("a pattern", json!({"allow_origins_by_regex": [".*\\.a\\.com$"]}), Some("https://x.a.com"), "https://x.a.com"),
            ("patterns count alone", json!({"allow_origins_by_regex": ["b"]}), https, "upstream"),
            ("metadata", json!({"allow_origins": "https://b.com", "allow_origins_by_metadata": ["shop"]}), Some("https://s.com"), "https://s.com"),
            ("not in metadata", json!({"allow_origins": "https://b.com", "allow_origins_by_metadata": ["shop", "x"]}), https, "upstream"),
        ];
        for (name, config, origin, expected) in cases {
            let x = run(&config, origin, "GET").await;
            assert_eq!(field(&x, "access-control-allow-origin"), expected, "{name}");
        }
    }

    #[tokio::test]
    async fn the_other_fields_follow_from_the_settings() {
        let x = run(&json!({}), None, "GET").await;
        let fields = ["access-control-allow-methods", "access-control-allow-headers", "access-control-max-age"];
        assert_eq!(fields.map(|name| field(&x, name)), ["*", "*", "5"]);
        let rest = ["access-control-expose-headers", "access-control-allow-credentials", "vary"];
        assert_eq!(rest.map(|name| field(&x, name)), ["", "", ""]);
        let config = json!({
            "allow_origins": "**", "allow_methods": "**", "allow_headers": "**", "expose_headers": "X-A,X-B",
            "max_age": -1, "allow_credential": true,
        });
        let x = run(&config, Some("https://a.com"), "GET").await;
        assert_eq!(
            fields.map(|name| field(&x, name)),
            ["GET,POST,PUT,DELETE,PATCH,HEAD,OPTIONS,CONNECT,TRACE", "X-Asked", "-1"]
        );
        assert_eq!(rest.map(|name| field(&x, name)), ["X-A,X-B", "true", "Origin"]);
    }

    #[tokio::test]
    async fn a_preflight_is_answered_here() {
        let x = run(&json!({"allow_methods": "GET,PUT"}), Some("https://a.com"), "OPTIONS").await;
        assert_eq!(x.response.status(), 200);
        assert_eq!(x.answered_by_plugin(), Some("cors"));
        assert_eq!(field(&x, "access-control-allow-methods"), "GET,PUT");
    }

    #[tokio::test]
    async fn timing_has_sites_of_its_own() {
        let cases = [
            (json!({}), ""),
            (json!({"timing_allow_origins": "*"}), "*"),
            (json!({"timing_allow_origins": "https://a.com"}), "https://a.com"),
            (json!({"timing_allow_origins": "https://b.com"}), ""),
            (json!({"timing_allow_origins_by_regex": ["a\\.com$"]}), "https://a.com"),
        ];
        for (config, expected) in cases {
            let x = run(&config, Some("https://a.com"), "GET").await;
            assert_eq!(field(&x, "timing-allow-origin"), expected, "{config}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"allow_origins": "a.com"}), "/allow_origins"),
            (json!({"allow_origins": "https://a.com,"}), "/allow_origins"),
            (json!({"allow_credential": true}), "/allow_origins"),
            (json!({"allow_credential": true, "allow_origins": "**", "allow_methods": "GET", "allow_headers": "*"}), "/allow_headers"),
            (json!({"allow_origins_by_regex": ["("]}), "/allow_origins_by_regex/0"),
            (json!({"max_age": "5"}), "/max_age"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<Cors>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
