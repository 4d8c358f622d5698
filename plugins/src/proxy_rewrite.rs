//! `proxy-rewrite`: what the upstream is asked for, in place of what the client asked for.
//!
//! Phase: `rewrite`. Routes, logs and other plugins still see the client's path and method. The path is put together
//! decoded and escaped once; the client's query stays behind it.

use std::collections::BTreeMap;
use std::sync::Arc;

use config::error::{ConfigError, ErrorKind};
use config::fields::WideText;
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Method};
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Rewrite};
use regex::bytes::Captures;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::captures::{RegexUri, Replacement, Text};
use crate::support::headers::{self, Scalar, Value};
use crate::support::uri;

/// Settings. At least one of them has to be there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("minProperties" = 1))]
pub struct Config {
    /// The path to ask for, with variables; a query may follow. Goes before `regex_uri`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uri: Option<WideText<1, 4096>>,
    /// The method to ask with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    method: Option<AskedMethod>,
    /// Pairs of a pattern and what replaces its match in the path, with captures (`$1`) and variables. The first
    /// pattern that matches counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2))]
    regex_uri: Option<Vec<String>>,
    /// The host to ask for (`Host` header), with an optional port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    /// Header fields to add, set and remove; or, without these words, to set. Values may hold variables and captures
    /// of `regex_uri`; an empty one removes the field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    headers: Option<HeaderActions>,
    /// Ask for the target as the client wrote it, not in its normal form. Two readers may understand such a target
    /// differently; access rules then protect nothing.
    #[serde(default)]
    use_real_request_uri_unsafe: bool,
}

/// A method to ask with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "the names say it")]
pub enum AskedMethod {
    Get,
    Post,
    Put,
    Head,
    Delete,
    Options,
    Mkcol,
    Copy,
    Move,
    Propfind,
    Lock,
    Unlock,
    Patch,
    Trace,
}

impl AskedMethod {
    fn method(self) -> Option<Method> {
        let name = match self {
            Self::Get => return Some(Method::GET),
            Self::Post => return Some(Method::POST),
            Self::Put => return Some(Method::PUT),
            Self::Head => return Some(Method::HEAD),
            Self::Delete => return Some(Method::DELETE),
            Self::Options => return Some(Method::OPTIONS),
            Self::Patch => return Some(Method::PATCH),
            Self::Trace => return Some(Method::TRACE),
            Self::Mkcol => "MKCOL",
            Self::Copy => "COPY",
            Self::Move => "MOVE",
            Self::Propfind => "PROPFIND",
            Self::Lock => "LOCK",
            Self::Unlock => "UNLOCK",
        };
        Method::from_bytes(name.as_bytes()).ok()
    }
}

/// What is done to header fields.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum HeaderActions {
    /// By action.
    Actions(Actions),
    /// Fields to set.
    Set(BTreeMap<String, Values>),
}

/// What is done to header fields, in this order: add, set, remove.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Actions {
    /// Fields put beside those that are there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    add: BTreeMap<String, Values>,
    /// Fields put in place of those that are there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    set: BTreeMap<String, Values>,
    /// Fields taken out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    remove: Vec<String>,
}

/// One value, or several fields of the same name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Values {
    /// One value.
    One(Scalar),
    /// Several.
    Many(Vec<Scalar>),
}

impl Values {
    fn all(&self) -> &[Scalar] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// The plugin.
pub struct ProxyRewrite {
    path: Path,
    /// The target is not normalised, and the client's query is part of it already.
    raw: bool,
    host: Option<HeaderValue>,
    method: Option<Method>,
    add: Box<[(HeaderName, Value)]>,
    set: Box<[Field]>,
    remove: Box<[HeaderName]>,
}

enum Path {
    Same,
    /// A path that is always the same, escaped.
    Fixed(PathAndQuery),
    Made(Replacement, Option<Replacement>),
    Matched(Box<[RegexUri]>),
}

impl Definition for ProxyRewrite {
    const NAME: &'static str = "proxy-rewrite";
    const PRIORITY: i32 = 1008;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        hooks.rewrite(&Arc::new(compile(&config)?));
        Ok(())
    }
}

fn compile(config: &Config) -> Result<ProxyRewrite, ConfigError> {
    let Config { uri, method, regex_uri, host, headers, use_real_request_uri_unsafe } = config;
    let nothing = uri.is_none() && method.is_none() && regex_uri.is_none() && host.is_none();
    if nothing && headers.is_none() && !use_real_request_uri_unsafe {
        let fields = vec!["uri", "method", "regex_uri", "host", "headers"];
        return Err(ConfigError::new("", ErrorKind::NoneOf { fields }));
    }
    let path = match (uri, regex_uri) {
        (Some(uri), _) => fixed_or_made(uri, *use_real_request_uri_unsafe)?,
        (None, Some(pairs)) => Path::Matched(matched(pairs)?),
        (None, None) => Path::Same,
    };
    let actions = match headers {
        Some(HeaderActions::Actions(actions)) => actions.clone(),
        Some(HeaderActions::Set(set)) => Actions { set: set.clone(), ..Actions::default() },
        None => Actions::default(),
    };
    let under = if matches!(headers, Some(HeaderActions::Actions(_))) { "/headers/set" } else { "/headers" };
    let add = fields(&actions.add, "/headers/add")?;
    let add = add.into_iter().flat_map(|(name, values)| {
        values.into_iter().map(move |value| (name.clone(), value)).collect::<Vec<_>>()
    });
    Ok(ProxyRewrite {
        path,
        raw: *use_real_request_uri_unsafe,
        host: host.as_deref().map(host_field).transpose()?,
        method: method.and_then(AskedMethod::method),
        add: add.collect(),
        set: fields(&actions.set, under)?.into_iter().collect(),
        remove: (actions.remove.iter().map(|name| headers::name(name, "/headers/remove")))
            .collect::<Result<_, _>>()?,
    })
}

fn fixed_or_made(source: &str, raw: bool) -> Result<Path, ConfigError> {
    if !source.starts_with('/') {
        return Err(ConfigError::invalid("/uri", "a path begins with `/`"));
    }
    let (path, query) = Replacement::with_variables(source).split_query();
    if let (Some(literal), None, false) = (path.as_literal(), &query, raw) {
        let mut escaped = Text::new();
        uri::escape_path(&mut escaped, literal.as_bytes());
        if let Ok(fixed) = PathAndQuery::try_from(&*escaped) {
            return Ok(Path::Fixed(fixed));
        }
    }
    Ok(Path::Made(path, query))
}

fn matched(pairs: &[String]) -> Result<Box<[RegexUri]>, ConfigError> {
    let (chunks, rest) = pairs.as_chunks::<2>();
    if chunks.is_empty() || !rest.is_empty() {
        let problem = "write pairs: a pattern, and what replaces its match";
        return Err(ConfigError::invalid("/regex_uri", problem));
    }
    chunks
        .iter()
        .enumerate()
        .map(|(index, [pattern, replacement])| {
            let pointer = format!("/regex_uri/{}", index * 2);
            RegexUri::new(pattern, Replacement::with_variables(replacement), &pointer)
        })
        .collect()
}

/// `host` or `host:port`, as it may stand in a request.
fn host_field(host: &str) -> Result<HeaderValue, ConfigError> {
    let (name, port) = host.rsplit_once(':').map_or((host, None), |(name, port)| (name, Some(port)));
    let name_fits = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    let port_fits = port.is_none_or(|port| (1..=5).contains(&port.len()) && port.parse::<u16>().is_ok());
    let wrong = || ErrorKind::BadFormat { found: host.into(), expected: "a host with an optional port".into() };
    (name_fits && port_fits)
        .then(|| HeaderValue::from_str(host).ok())
        .flatten()
        .ok_or_else(|| ConfigError::new("/host", wrong()))
}

/// A field and its values.
type Field = (HeaderName, Box<[Value]>);

fn fields(fields: &BTreeMap<String, Values>, pointer: &str) -> Result<Vec<Field>, ConfigError> {
    fields
        .iter()
        .map(|(key, values)| {
            let place = format!("{pointer}/{}", config::error::escape(key));
            let values = values.all().iter().map(|value| Value::new(&value.text(), &place));
            Ok((headers::name(key, pointer)?, values.collect::<Result<_, _>>()?))
        })
        .collect()
}

impl Rewrite for ProxyRewrite {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        if let Some(host) = &self.host {
            x.forward.host = Some(host.clone());
        }
        match &self.path {
            // Captures borrow the path, which fields are not allowed to change meanwhile: it is copied.
            Path::Matched(rules) => {
                let subject = Text::from_slice(if self.raw { x.request_uri() } else { x.path() }.as_bytes());
                let matched = rules.iter().find_map(|rule| Some((rule, rule.captures(&subject)?)));
                if let Some((rule, captures)) = &matched {
                    let (path, query) = rule.replace(&subject, captures, &**x);
                    x.forward.uri = self.target(&path, query.as_deref(), x);
                } else if self.raw {
                    x.forward.uri = PathAndQuery::try_from(&*subject).ok();
                }
                self.change_fields(x, matched.as_ref().map(|(_, captures)| captures));
            }
            Path::Same => {
                if self.raw {
                    x.forward.uri = PathAndQuery::try_from(x.request_uri()).ok();
                }
                self.change_fields(x, None);
            }
            Path::Fixed(fixed) => {
                x.forward.uri = match x.request.uri.query() {
                    None => Some(fixed.clone()),
                    Some(query) => PathAndQuery::try_from(format!("{fixed}?{query}")).ok(),
                };
                self.change_fields(x, None);
            }
            Path::Made(path, query) => {
                let mut rendered = Text::new();
                path.render(&**x, None, &mut rendered);
                let query = query.as_ref().map(|query| {
                    let mut rendered = Text::new();
                    query.render(&**x, None, &mut rendered);
                    rendered
                });
                x.forward.uri = self.target(&rendered, query.as_deref(), x);
                self.change_fields(x, None);
            }
        }
        if let Some(method) = &self.method {
            x.forward.method = Some(method.clone());
        }
        Flow::Next
    }
}

impl ProxyRewrite {
    fn target(&self, path: &[u8], query: Option<&[u8]>, x: &State) -> Option<PathAndQuery> {
        if !self.raw {
            return uri::target(path, query, x);
        }
        let mut out = Text::new();
        uri::escape_controls(&mut out, path);
        if let Some(query) = query {
            out.push(b'?');
            uri::escape_controls(&mut out, query);
        }
        PathAndQuery::try_from(&*out).ok()
    }

    fn change_fields(&self, x: &mut Exchange, captures: Option<&Captures<'_>>) {
        for (name, value) in &self.add {
            if let Some(value) = value.render(&**x, captures) {
                x.request.headers.append(name, value);
            }
        }
        for (name, values) in &self.set {
            let mut first = true;
            for value in values {
                let value = value.render(&**x, captures);
                match (value, first) {
                    (Some(value), false) => {
                        x.request.headers.append(name, value);
                    }
                    (None, false) => {}
                    (value, true) => headers::set(&mut x.request.headers, name, value),
                }
                first = false;
            }
        }
        for name in &self.remove {
            x.request.headers.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{ExchangeBuilder, TestEnv, exchange};
    use serde_json::json;

    use super::*;

    async fn run(config: serde_json::Value, request: ExchangeBuilder) -> Exchange {
        let mut chain = TestEnv::default().chain::<ProxyRewrite, _>(&config, |_| Ok(())).unwrap();
        chain.run(request.build()).await
    }

    #[tokio::test]
    async fn the_target_is_what_the_settings_say() {
        let cases = [
            ("a fixed path", json!({"uri": "/new"}), "/old", "/new"),
            ("the query stays", json!({"uri": "/new"}), "/old?a=1", "/new?a=1"),
            ("a query of its own", json!({"uri": "/new?b=2"}), "/old?a=1", "/new?b=2&a=1"),
            ("variables", json!({"uri": "/$arg_to/$host${uri}"}), "/o?to=x", "/x/a.com/o?to=x"),
            ("a variable is part of the path", json!({"uri": "/$arg_to"}), "/o?to=a%3Fb%26c", "/a%3Fb&c?to=a%3Fb%26c"),
            ("a percent sign is one", json!({"uri": "/a%20b c"}), "/", "/a%2520b%20c"),
            ("a pattern", json!({"regex_uri": ["^/a/(.*)/(.*)$", "/$1-$2"]}), "/a/b/c", "/b-c"),
            ("the first pattern that matches", json!({"regex_uri": ["^/x", "/1", "^/a", "/2", "^/a/b", "/3"]}), "/a/b", "/2/b"),
            ("no pattern matches", json!({"regex_uri": ["^/x", "/1"]}), "/a?b=c", ""),
            ("a pattern and a variable", json!({"regex_uri": ["^/a", "/$arg_v"]}), "/a/b?v=9", "/9/b?v=9"),
            ("a pattern and a query", json!({"regex_uri": ["^/a/(.*)$", "/b?x=$1"]}), "/a/c?d=e", "/b?x=c&d=e"),
            ("uri goes first", json!({"uri": "/u", "regex_uri": ["^/", "/r"]}), "/a", "/u"),
            ("neither", json!({"method": "POST"}), "/a", ""),
        ];
        for (name, config, target, expected) in cases {
            let x = run(config, exchange("GET", &format!("http://a.com{target}"))).await;
            let asked = x.forward.uri.as_ref().map_or("", PathAndQuery::as_str);
            assert_eq!(asked, expected, "{name}");
        }
    }

    #[tokio::test]
    async fn the_decoded_path_is_matched_and_escaped_again() {
        let mut x = exchange("GET", "http://a.com/a/%C3%A9%20?q").build();
        x.decoded_path = Some("/a/\u{e9} ".into());
        let config = json!({"regex_uri": ["^/a/(.*)", "/b/$1"]});
        let mut chain = TestEnv::default().chain::<ProxyRewrite, _>(&config, |_| Ok(())).unwrap();
        assert_eq!(chain.run(x).await.forward.uri.as_ref().unwrap().as_str(), "/b/%C3%A9%20?q");
    }

    #[tokio::test]
    async fn the_real_request_uri_passes_as_it_came() {
        let cases = [
            (json!({"use_real_request_uri_unsafe": true}), "/a//b/../c?d=%41"),
            (json!({"use_real_request_uri_unsafe": true, "regex_uri": ["^/a/", "/x/"]}), "/x//b/../c?d=%41"),
            (json!({"use_real_request_uri_unsafe": true, "uri": "/x%20y"}), "/x%20y"),
        ];
        for (config, expected) in cases {
            let mut x = exchange("GET", "http://a.com/a/c?d=A").build();
            x.original_uri = Some(Box::new("/a//b/../c?d=%41".parse().unwrap()));
            let mut chain = TestEnv::default().chain::<ProxyRewrite, _>(&config, |_| Ok(())).unwrap();
            assert_eq!(chain.run(x).await.forward.uri.as_ref().unwrap().as_str(), expected);
        }
    }

    #[tokio::test]
    async fn fields_are_added_set_and_removed() {
        let request = || exchange("GET", "http://a.com/p/7").header("x-a", "1").header("x-b", "2");
        let cases = [
            (json!({"add": {"x-a": "new"}}), "x-a", vec!["1", "new"]),
            (json!({"add": {"x-a": ["n", 2]}}), "x-a", vec!["1", "n", "2"]),
            (json!({"set": {"x-a": "$host"}}), "x-a", vec!["a.com"]),
            (json!({"set": {"x-a": ["n", "m"]}}), "x-a", vec!["n", "m"]),
            (json!({"set": {"x-n": 7.5}}), "x-n", vec!["7.5"]),
            (json!({"set": {"x-a": ""}}), "x-a", vec![]),
            (json!({"set": {"x-a": "$arg_none"}}), "x-a", vec![]),
            (json!({"set": {"x-a": "id-$1-$9"}}), "x-a", vec!["id-7-"]),
            (json!({"remove": ["X-A"]}), "x-a", vec![]),
            (json!({"set": {"x-b": "new"}, "remove": ["x-b"]}), "x-b", vec![]),
            (json!({"x-a": "plain", "x-c": 3}), "x-c", vec!["3"]),
            (json!({"x-a": "plain"}), "x-a", vec!["plain"]),
        ];
        for (headers, name, expected) in cases {
            let config = json!({"headers": headers, "regex_uri": ["^/p/(\\d+)", "/q/$1"]});
            let x = run(config.clone(), request()).await;
            let values: Vec<_> = x.request.headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect();
            assert_eq!(values, expected, "{config}");
        }
    }

    #[tokio::test]
    async fn captures_are_empty_where_no_pattern_matched() {
        let config = json!({"regex_uri": ["^/x/(.*)", "/"], "headers": {"set": {"x-a": "<$1>"}}});
        let x = run(config, exchange("GET", "http://a.com/p/7")).await;
        assert_eq!(x.request.headers["x-a"], "<>");
    }

    #[tokio::test]
    async fn host_and_method_are_changed_for_the_upstream_only() {
        let config = json!({"host": "b.com:8080", "method": "PROPFIND"});
        let x = run(config, exchange("GET", "http://a.com/")).await;
        assert_eq!(x.forward.host.as_ref().unwrap(), "b.com:8080");
        assert_eq!(x.forward.method.as_ref().unwrap(), "PROPFIND");
        assert_eq!((&x.request.method, &*x.host), (&Method::GET, "a.com"));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"uri": "new"}), "/uri"),
            (json!({"uri": ""}), "/uri"),
            (json!({"method": "FETCH"}), "/method"),
            (json!({"regex_uri": ["^/a"]}), "/regex_uri"),
            (json!({"regex_uri": ["^/a", "/b", "^/c"]}), "/regex_uri"),
            (json!({"regex_uri": ["^/a", "/b", "(", "/d"]}), "/regex_uri/2"),
            (json!({"host": "a b"}), "/host"),
            (json!({"host": "a:99999"}), "/host"),
            (json!({"headers": {"set": {"a b": "c"}}}), "/headers/set/a b"),
            (json!({"headers": {"x-a": "c\nd"}}), "/headers/x-a"),
            (json!({"headers": {"x-a": true}}), "/headers"),
            (json!({"scheme": "https"}), "/scheme"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<ProxyRewrite>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }

    #[test]
    fn settings_are_stored_as_they_were_written() {
        let written = json!({"uri": "/a", "headers": {"x-a": 3}, "use_real_request_uri_unsafe": false});
        let check = layers::plugin::Registration::of::<ProxyRewrite>().check;
        assert_eq!(check(&written).unwrap(), written);
    }
}
