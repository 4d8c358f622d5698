//! `redirect`: sends the client elsewhere.
//!
//! Phase: `rewrite`. Exactly one of `http_to_https`, `uri` and `regex_uri` says where to.

use std::sync::Arc;

use config::error::{ConfigError, ErrorKind};
use config::fields::{Int, WideText};
use config::template::Template;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Rewrite};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::captures::{RegexUri, Replacement, Text};
use crate::support::reply::{self, Canned};
use crate::support::uri;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Redirect requests that came over HTTP to HTTPS, with 301, or 308 where the method has to be kept. Excludes
    /// `uri`, `regex_uri` and `append_query_string`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    http_to_https: Option<bool>,
    /// Where to, with variables (`$uri/index.html`, `https://$host/`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uri: Option<WideText<2, 4096>>,
    /// A pattern, and what replaces its match in the path, with captures (`$1`). A request whose path does not match
    /// is not redirected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 2))]
    regex_uri: Option<Vec<String>>,
    /// The status.
    #[serde(default)]
    ret_code: Int<200, 599, 302>,
    /// Escape the path of the new address.
    #[serde(default)]
    encode_uri: bool,
    /// Put the query of the request behind the new address.
    #[serde(default)]
    append_query_string: bool,
}

/// The plugin.
pub struct Redirect {
    to: To,
    answer: Canned,
    permanent: [Canned; 2],
    encode: bool,
    append_query: bool,
}

enum To {
    /// The same address over HTTPS, on this port.
    Https(Option<u16>),
    /// `http_to_https: false`
    Nowhere,
    Uri(Template),
    Matched(RegexUri),
}

impl Definition for Redirect {
    const NAME: &'static str = "redirect";
    const PRIORITY: i32 = 900;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config, None).err().into_iter().collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let port = env.attr.and_then(|attr| attr.get("https_port")).and_then(Value::as_u64);
        let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| !matches!(port, 0 | 443));
        hooks.rewrite(&Arc::new(compile(&config, port)?));
        Ok(())
    }
}

fn compile(config: &Config, https_port: Option<u16>) -> Result<Redirect, ConfigError> {
    let exclusive = |one, other| Err(ConfigError::new("", ErrorKind::Exclusive { one, other }));
    let to = match (&config.http_to_https, &config.uri, &config.regex_uri) {
        (Some(_), Some(_), _) => return exclusive("http_to_https", "uri"),
        (Some(_), _, Some(_)) => return exclusive("http_to_https", "regex_uri"),
        (_, Some(_), Some(_)) => return exclusive("uri", "regex_uri"),
        (Some(true), ..) if config.append_query_string => {
            return exclusive("http_to_https", "append_query_string");
        }
        (Some(true), ..) => To::Https(https_port),
        (Some(false), ..) => To::Nowhere,
        // A name ends at a dot, as in nginx: `$uri.html` is a path and `.html`.
        (_, Some(uri), _) => To::Uri(Template::parse_log_format(uri)),
        (_, _, Some(pair)) => {
            let [pattern, replacement] = pair.as_slice() else {
                let problem = "write two elements: a pattern, and what replaces its match";
                return Err(ConfigError::invalid("/regex_uri", problem));
            };
            To::Matched(RegexUri::new(pattern, Replacement::captures(replacement), "/regex_uri/0")?)
        }
        (None, None, None) => {
            let fields = vec!["http_to_https", "uri", "regex_uri"];
            return Err(ConfigError::new("", ErrorKind::NoneOf { fields }));
        }
    };
    Ok(Redirect {
        to,
        answer: Canned::status(reply::status(config.ret_code.get())),
        permanent: [StatusCode::MOVED_PERMANENTLY, StatusCode::PERMANENT_REDIRECT].map(Canned::status),
        encode: config.encode_uri,
        append_query: config.append_query_string,
    })
}

/// `plugin_attr.redirect` with the port of the HTTPS listener, where no other is written.
pub fn attr(written: Option<&Value>, https_port: Option<u16>) -> Option<Value> {
    let mut attr = written.and_then(Value::as_object).cloned().unwrap_or_default();
    if let (Some(port), None) = (https_port, attr.get("https_port")) {
        attr.insert("https_port".into(), port.into());
    }
    Some(Value::Object(attr)).filter(|attr| attr.get("https_port").is_some())
}

const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Whether the client spoke plain HTTP, to us or to a proxy whose word counts.
fn came_by_http(x: &State) -> bool {
    // The field was removed from others before plugins see it.
    let told = x.request.headers.get(X_FORWARDED_PROTO).map(HeaderValue::as_bytes);
    told.unwrap_or_else(|| x.conn.scheme().as_bytes()) == b"http"
}

impl Rewrite for Redirect {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        let mut path = Text::new();
        let mut query = None;
        let mut answer = &self.answer;
        match &self.to {
            To::Nowhere => return Flow::Next,
            To::Https(port) => {
                if !came_by_http(x) {
                    return Flow::Next;
                }
                path.extend_from_slice(b"https://");
                path.extend_from_slice(x.host.as_bytes());
                if let Some(port) = port {
                    path.extend_from_slice(format!(":{port}").as_bytes());
                }
                path.extend_from_slice(x.request_uri().as_bytes());
                let [moved, kept] = &self.permanent;
                let keeps_method = !matches!(x.request.method, Method::GET | Method::HEAD);
                answer = if keeps_method { kept } else { moved };
            }
            To::Uri(template) => path.extend_from_slice(template.to_text(&**x).as_bytes()),
            To::Matched(rule) => {
                let subject = x.path().as_bytes();
                let Some(captures) = rule.captures(subject) else { return Flow::Next };
                (path, query) = rule.replace(subject, &captures, &**x);
            }
        }
        let location = self.location(&path, query.as_deref(), x);
        let mut response = answer.response();
        if let Ok(location) = HeaderValue::from_bytes(&location) {
            response.headers_mut().insert(header::LOCATION, location);
        }
        Flow::Reply(response)
    }
}

impl Redirect {
    fn location(&self, path: &[u8], query: Option<&[u8]>, x: &State) -> Text {
        let (path, query) = match query {
            Some(query) => (path, Some(query)),
            None => uri::split_query(path),
        };
        let mut out = Text::new();
        if self.encode {
            uri::escape_path(&mut out, path);
        } else {
            // What no header field can hold is escaped in any case: a path may hold a line end in disguise.
            uri::escape_controls(&mut out, path);
        }
        if let Some(query) = query {
            out.push(b'?');
            uri::escape_controls(&mut out, query);
        }
        if self.append_query
            && let Some(own) = x.request.uri.query()
        {
            out.push(if query.is_some() { b'&' } else { b'?' });
            out.extend_from_slice(own.as_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{ExchangeBuilder, TestEnv, exchange, field, text};
    use serde_json::json;

    use super::*;

    async fn run(config: serde_json::Value, request: ExchangeBuilder) -> Exchange {
        let mut chain = TestEnv::default().chain::<Redirect, _>(&config, |_| Ok(())).unwrap();
        chain.run(request.build()).await
    }

    #[tokio::test]
    async fn requests_are_sent_where_the_settings_say() {
        let get = |uri: &str| exchange("GET", uri);
        let cases = [
            ("a path", json!({"uri": "/b", "ret_code": 301}), get("http://a.com/a?q=1"), 301, "/b"),
            ("variables", json!({"uri": "$uri/index.html"}), get("http://a.com/a"), 302, "/a/index.html"),
            ("a name ends at a dot", json!({"uri": "$uri.html"}), get("http://a.com/a"), 302, "/a.html"),
            ("braces", json!({"uri": "https://${host}/$arg_x-$nothing"}), get("http://a.com/?x=7"), 302, "https://a.com/7-"),
            ("the query follows", json!({"uri": "/b", "append_query_string": true}), get("http://a.com/a?q=1"), 302, "/b?q=1"),
            ("behind another", json!({"uri": "/b?c=d", "append_query_string": true}), get("http://a.com/a?q=1"), 302, "/b?c=d&q=1"),
            ("there is none", json!({"uri": "/b", "append_query_string": true}), get("http://a.com/a"), 302, "/b"),
            ("a pattern", json!({"regex_uri": ["^/t/(.*)/(.*)", "http://b.com/$2?x=$1"]}), get("http://a.com/t/1/2"), 302, "http://b.com/2?x=1"),
            ("no match", json!({"regex_uri": ["^/t", "/"]}), get("http://a.com/a"), 200, ""),
            ("to https", json!({"http_to_https": true}), get("http://a.com/a?q=1"), 301, "https://a.com/a?q=1"),
            ("to https, keeping the method", json!({"http_to_https": true}), exchange("POST", "http://a.com/a"), 308, "https://a.com/a"),
            ("is https for a proxy", json!({"http_to_https": true}), get("http://a.com/a").header("x-forwarded-proto", "https"), 200, ""),
            ("not to https", json!({"http_to_https": false}), get("http://a.com/a"), 200, ""),
        ];
        for (name, config, request, status, location) in cases {
            let x = run(config, request).await;
            assert_eq!((x.response.status().as_u16(), field(&x, "location")), (status, location), "{name}");
        }
    }

    #[test]
    fn the_port_is_the_listeners_unless_another_is_written() {
        assert_eq!(attr(None, Some(9443)), Some(json!({"https_port": 9443})));
        assert_eq!(attr(Some(&json!({"https_port": 8443})), Some(9443)), Some(json!({"https_port": 8443})));
        assert_eq!(attr(None, None), None);
    }

    #[tokio::test]
    async fn an_answer_has_the_page_of_its_status() {
        let mut x = run(json!({"uri": "/b"}), exchange("GET", "http://a/")).await;
        assert!(text(&mut x).await.contains("<h1>302 Found</h1>"));
        assert_eq!(field(&x, "content-type"), "text/html; charset=utf-8");
    }

    #[tokio::test]
    async fn no_line_end_gets_into_the_location() {
        let mut x = exchange("GET", "http://a.com/").build();
        x.decoded_path = Some("/a\r\nX: y \u{e9}".into());
        let mut chain = TestEnv::default().chain::<Redirect, _>(&json!({"uri": "$uri?b c"}), |_| Ok(())).unwrap();
        let x = chain.run(x).await;
        assert_eq!(field(&x, "location"), "/a%0D%0AX:%20y%20%C3%A9?b%20c");
    }

    #[tokio::test]
    async fn a_path_is_escaped_when_asked() {
        let x = run(json!({"uri": "/%41<b>?c=%41", "encode_uri": true}), exchange("GET", "http://a/")).await;
        assert_eq!(field(&x, "location"), "/%2541%3Cb%3E?c=%41");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), "none of"),
            (json!({"uri": "/a", "regex_uri": ["a", "b"]}), "exclude each other"),
            (json!({"uri": "/a", "http_to_https": true}), "exclude each other"),
            (json!({"http_to_https": true, "append_query_string": true}), "exclude each other"),
            (json!({"uri": "/"}), "/uri"),
            (json!({"regex_uri": ["("]}), "/regex_uri"),
            (json!({"regex_uri": ["(", "b"]}), "/regex_uri/0"),
            (json!({"uri": "/a", "ret_code": 100}), "/ret_code"),
        ];
        for (config, words) in cases {
            let errors = TestEnv::default().build::<Redirect>(&config).unwrap_err();
            assert!(errors[0].to_string().contains(words), "{config}: {errors:?}");
        }
    }
}
