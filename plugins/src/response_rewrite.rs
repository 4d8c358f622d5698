//! `response-rewrite`: another status, other header fields, another body, for answers of the upstream and our own.
//!
//! Phases: `header_filter`, `body_filter`; with `filters` also `rewrite`, where the request stops asking for a compressed
//! answer, because patterns are matched on text. A filtered body is held back in pieces of at most 1 MiB.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use config::error::{ConfigError, ErrorKind};
use config::expr::Expr;
use config::fields::{Int, WideText};
use config::pattern;
use http::{HeaderName, StatusCode, header};
use layers::body::BodyFilter;
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, OnBody, OnResponse, Rewrite};
use regex::bytes::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::support::captures::Replacement;
use crate::support::encoding;
use crate::support::headers::{self, Fields, Value};
use crate::support::reply;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The status in place of the answer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status_code: Option<Int<200, 598>>,
    /// The body in place of the answer's. Excludes `filters`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    /// Whether `body` is written in base64.
    #[serde(default)]
    body_base64: bool,
    /// Header fields to add (`"Name: value"`), set and remove; or, without these words, to set. Values may hold
    /// variables; an empty one removes the field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    headers: Option<HeaderActions>,
    /// An expression: answers for which it does not hold stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vars: Option<Vec<serde_json::Value>>,
    /// Replacements in the body, in this order. Excludes `body`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    filters: Option<Vec<Filter>>,
    /// Taken and not used: no body is cut off, `filters` go over it in pieces.
    #[serde(default)]
    max_resp_body_size: Int<1, { u32::MAX }, 67_108_864>,
}

/// What is done to header fields.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum HeaderActions {
    /// By action.
    Actions(Actions),
    /// Fields to set.
    Set(Fields),
}

/// What is done to header fields, in this order: add, set, remove.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Actions {
    /// Fields put beside those that are there, each `"Name: value"`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    add: Vec<String>,
    /// Fields put in place of those that are there.
    #[serde(default, skip_serializing_if = "Fields::is_empty")]
    set: Fields,
    /// Fields taken out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    remove: Vec<String>,
}

/// A replacement in the body.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// The pattern.
    regex: WideText<1, 16384>,
    /// Which matches are replaced.
    #[serde(default)]
    scope: Scope,
    /// What replaces a match, with captures (`$1`).
    replace: String,
    /// Letters: `i` ignores case, `m` lets `^` and `$` match at lines, `s` lets `.` match line ends, `x` ignores white
    /// space in the pattern. `j`, `o` and `u` change nothing.
    #[serde(default = "options")]
    options: String,
}

fn options() -> String {
    "jo".into()
}

/// Which matches are replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// The first.
    #[default]
    Once,
    /// All.
    Global,
}

/// The plugin.
pub struct ResponseRewrite {
    status: Option<StatusCode>,
    add: Box<[(HeaderName, Value)]>,
    set: Box<[(HeaderName, Value)]>,
    remove: Box<[HeaderName]>,
    vars: Option<Expr>,
    body: Option<Bytes>,
    filters: Option<Arc<[CompiledFilter]>>,
}

struct CompiledFilter {
    pattern: Regex,
    replacement: Replacement,
    scope: Scope,
}

impl Definition for ResponseRewrite {
    const NAME: &'static str = "response-rewrite";
    const PRIORITY: i32 = 899;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        compile(config).err().into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let plugin = Arc::new(compile(&config)?);
        if plugin.filters.is_some() {
            hooks.rewrite(&plugin);
        }
        hooks.response(&plugin);
        if plugin.body.is_some() || plugin.filters.is_some() {
            hooks.body(&plugin);
        }
        Ok(())
    }
}

fn compile(config: &Config) -> Result<ResponseRewrite, ConfigError> {
    let Config { status_code, body, body_base64, headers, vars, filters, max_resp_body_size: _ } = config;
    if body.is_some() && filters.is_some() {
        return Err(ConfigError::new("", ErrorKind::Exclusive { one: "body", other: "filters" }));
    }
    let body = match (body, body_base64) {
        (Some(body), true) => {
            let decoded = STANDARD.decode(body.trim()).ok().filter(|decoded| !decoded.is_empty());
            let problem = "the body is not in base64; write it so, or take `body_base64` out";
            Some(decoded.ok_or_else(|| ConfigError::invalid("/body", problem))?.into())
        }
        (Some(body), false) => Some(body.clone().into()),
        (None, true) => {
            let (field, needs) = ("body_base64".to_owned(), "body");
            return Err(ConfigError::new("", ErrorKind::Needs { field, needs }));
        }
        (None, false) => None,
    };
    if filters.as_ref().is_some_and(Vec::is_empty) {
        return Err(ConfigError::invalid("/filters", "write at least one filter"));
    }
    let actions = match headers {
        Some(HeaderActions::Actions(actions)) => actions.clone(),
        Some(HeaderActions::Set(set)) => Actions { set: set.clone(), ..Actions::default() },
        None => Actions::default(),
    };
    let under = if matches!(headers, Some(HeaderActions::Actions(_))) { "/headers/set" } else { "/headers" };
    let vars = vars.as_ref().map(|vars| Expr::parse(&serde_json::Value::Array(vars.clone()))).transpose();
    let filters = filters.as_ref().map(|filters| {
        filters.iter().enumerate().map(|(index, f)| filter(f, &format!("/filters/{index}"))).collect()
    });
    Ok(ResponseRewrite {
        status: status_code.map(|code| reply::status(code.get())),
        add: actions.add.iter().enumerate().map(|(index, line)| added(line, index)).collect::<Result<_, _>>()?,
        set: headers::compile(&actions.set, under)?.into(),
        remove: (actions.remove.iter().map(|name| headers::name(name, "/headers/remove")))
            .collect::<Result<_, _>>()?,
        vars: vars.map_err(|error| error.under("/vars"))?,
        body,
        filters: filters.transpose()?,
    })
}

/// `"Name: value"`
fn added(line: &str, index: usize) -> Result<(HeaderName, Value), ConfigError> {
    let pointer = format!("/headers/add/{index}");
    let (name, value) = line
        .split_once(':')
        .ok_or_else(|| ConfigError::invalid(&*pointer, "write the name of a field, a colon, and its value"))?;
    let name = headers::name(name, &pointer).map_err(|error| ConfigError::new(&*pointer, error.kind))?;
    Ok((name, Value::new(value.trim(), &pointer)?))
}

fn filter(filter: &Filter, pointer: &str) -> Result<CompiledFilter, ConfigError> {
    let mut flags = String::new();
    for letter in filter.options.chars() {
        match letter {
            'i' | 'm' | 's' | 'x' if !flags.contains(letter) => flags.push(letter),
            'i' | 'm' | 's' | 'x' | 'j' | 'o' | 'u' | 'J' | 'U' | 'D' | 'd' => {}
            other => {
                let problem = format!("the option `{other}` is not offered: write letters of `imsx`");
                return Err(ConfigError::invalid(format!("{pointer}/options"), problem));
            }
        }
    }
    let ignore_case = flags.contains('i');
    flags.retain(|letter| letter != 'i');
    let source = if flags.is_empty() { filter.regex.to_string() } else { format!("(?{flags}){}", &*filter.regex) };
    let pattern = pattern::compile(&source, ignore_case)
        .map_err(|error| ConfigError::invalid(format!("{pointer}/regex"), error.to_string()))?;
    Ok(CompiledFilter { pattern, replacement: Replacement::captures(&filter.replace), scope: filter.scope })
}

/// The objects of this plugin whose `vars` held for the answer: judged once, before the status is changed.
#[derive(Default)]
struct Matched(SmallVec<[usize; 2]>);

impl ResponseRewrite {
    fn id(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

impl Rewrite for ResponseRewrite {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        encoding::ask_plainly(x);
        Flow::Next
    }
}

impl OnResponse for ResponseRewrite {
    fn response(&self, x: &mut Exchange) {
        if self.vars.as_ref().is_some_and(|vars| !vars.eval(&**x)) {
            return;
        }
        // An upstream that compresses unasked: a pattern would find nothing in it, or the wrong thing.
        let opaque = self.filters.is_some() && is_encoded(x);
        if opaque {
            tracing::warn!(host = %x.host, "response-rewrite: filters do not see into a compressed body");
        } else if self.body.is_some() || self.filters.is_some() {
            if let Some(matched) = x.slot_mut::<Matched>() {
                matched.0.push(self.id());
            }
            headers::body_changes(x.response.headers_mut());
        }
        if let Some(status) = self.status {
            *x.response.status_mut() = status;
        }
        for (name, value) in &self.add {
            if let Some(value) = value.render(&**x, None) {
                x.response.headers_mut().append(name, value);
            }
        }
        for (name, value) in &self.set {
            let value = value.render(&**x, None);
            headers::set(x.response.headers_mut(), name, value);
        }
        for name in &self.remove {
            x.response.headers_mut().remove(name);
        }
    }
}

fn is_encoded(x: &State) -> bool {
    let encoding = x.response.headers().get(header::CONTENT_ENCODING);
    encoding.is_some_and(|encoding| !encoding.is_empty() && encoding != "identity")
}

impl OnBody for ResponseRewrite {
    fn body(&self, x: &mut Exchange) -> Option<Box<dyn BodyFilter>> {
        x.slot::<Matched>().filter(|matched| matched.0.contains(&self.id()))?;
        match (&self.body, &self.filters) {
            (Some(body), _) => Some(Box::new(Replaced(Some(body.clone())))),
            (None, Some(filters)) => {
                Some(Box::new(Filtered::new(filters)))
            }
            (None, None) => None,
        }
    }
}

/// Puts another body in place. What the upstream sends is read to its end, so that its connection can be used again.
struct Replaced(Option<Bytes>);

impl BodyFilter for Replaced {
    fn data(&mut self, _: Bytes) -> Bytes {
        self.0.take().unwrap_or_default()
    }

    fn end(&mut self) -> Bytes {
        self.0.take().unwrap_or_default()
    }
}

/// What a filter holds back at most. Longer bodies are filtered in pieces, so that the worker is not kept for long: a
/// match over a border is not seen.
const HELD: usize = 1 << 20;

/// Replaces in the text of a body.
struct Filtered {
    filters: Arc<[CompiledFilter]>,
    /// The filters that have replaced what they replace once, by their place.
    spent: SmallVec<[usize; 4]>,
    held: BytesMut,
}

impl Filtered {
    fn new(filters: &Arc<[CompiledFilter]>) -> Self {
        Self { filters: filters.clone(), spent: SmallVec::new(), held: BytesMut::new() }
    }

    fn apply(&mut self) -> Bytes {
        let mut text = std::mem::take(&mut self.held).freeze();
        for (place, filter) in self.filters.iter().enumerate() {
            if !self.spent.contains(&place)
                && let Some(changed) = filter.apply(&text)
            {
                text = changed.into();
                if filter.scope == Scope::Once {
                    self.spent.push(place);
                }
            }
        }
        text
    }
}

impl CompiledFilter {
    /// The text with its matches replaced; nothing if there are none.
    fn apply(&self, text: &[u8]) -> Option<Vec<u8>> {
        let limit = if self.scope == Scope::Once { 1 } else { usize::MAX };
        let mut out = Vec::new();
        let mut done = 0;
        for captures in self.pattern.captures_iter(text).take(limit) {
            let found = captures.get(0)?;
            out.extend_from_slice(text.get(done..found.start())?);
            self.replacement.pieces(&NoVars, Some(&captures), |piece| out.extend_from_slice(piece));
            done = found.end();
        }
        // Without a match nothing was written; a match of nothing at the start writes its replacement.
        if done == 0 && out.is_empty() {
            return None;
        }
        out.extend_from_slice(text.get(done..)?);
        Some(out)
    }
}

/// A replacement in a body takes captures only.
struct NoVars;

impl config::var::Vars for NoVars {
    fn get<'a>(&'a self, _: &config::var::Var) -> Option<std::borrow::Cow<'a, str>> {
        None
    }
}

impl BodyFilter for Filtered {
    fn data(&mut self, piece: Bytes) -> Bytes {
        self.held.extend_from_slice(&piece);
        if self.held.len() < HELD { Bytes::new() } else { self.apply() }
    }

    fn end(&mut self) -> Bytes {
        self.apply()
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use layers::body::Body;
    use layers::testing::{TestEnv, exchange, field, text};
    use serde_json::json;

    use super::*;

    async fn run(config: serde_json::Value) -> Exchange {
        let answer = |x: &mut Exchange| {
            *x.response.body_mut() = Body::from("hello world, hello");
            let headers = x.response.headers_mut();
            headers.insert("x-a", HeaderValue::from_static("1"));
            headers.insert("etag", HeaderValue::from_static("\"e\""));
            headers.insert("content-length", HeaderValue::from_static("18"));
            Ok(())
        };
        let mut chain = TestEnv::default().chain::<ResponseRewrite, _>(&config, answer).unwrap();
        chain.run(exchange("GET", "http://a.com/?q=1").header("accept-encoding", "gzip").build()).await
    }

    #[tokio::test]
    async fn status_fields_and_body_are_rewritten() {
        let mut x = run(json!({"status_code": 403, "body": "no", "headers": {"X-B": "$host", "x-a": ""}})).await;
        assert_eq!(x.response.status(), 403);
        assert_eq!(["x-b", "x-a", "etag", "content-length"].map(|name| field(&x, name)), ["a.com", "", "", ""]);
        assert_eq!(text(&mut x).await, "no");
        let mut x = run(json!({"body": "aGk=", "body_base64": true})).await;
        assert_eq!(text(&mut x).await, "hi");
        let mut x = run(json!({"headers": {"set": {"x-n": 3}}})).await;
        assert_eq!([field(&x, "x-n"), field(&x, "etag")], ["3", "\"e\""], "the body is the same");
        assert_eq!(text(&mut x).await, "hello world, hello");
        assert!(x.request.headers.contains_key("accept-encoding"));
    }

    #[tokio::test]
    async fn fields_are_added_set_and_removed() {
        let cases = [
            (json!({"add": ["x-a: 2", "X-A:$arg_q"]}), "x-a", vec!["1", "2", "1"]),
            (json!({"add": ["x-u: http://b.com:80/"]}), "x-u", vec!["http://b.com:80/"]),
            (json!({"set": {"x-a": "2"}}), "x-a", vec!["2"]),
            (json!({"remove": ["X-A"]}), "x-a", vec![]),
            (json!({"set": {"x-c": "1"}, "remove": ["x-c"]}), "x-c", vec![]),
        ];
        for (headers, name, expected) in cases {
            let x = run(json!({"headers": headers})).await;
            let values: Vec<_> = x.response.headers().get_all(name).iter().map(|v| v.to_str().unwrap()).collect();
            assert_eq!(values, expected, "{headers}");
        }
    }

    #[tokio::test]
    async fn filters_replace_once_or_everywhere() {
        let cases = [
            (json!([{"regex": "hello", "replace": "bye"}]), "bye world, hello"),
            (json!([{"regex": "hello", "replace": "bye", "scope": "global"}]), "bye world, bye"),
            (json!([{"regex": "(h)(e)", "replace": "$2$1", "scope": "global"}]), "ehllo world, ehllo"),
            (json!([{"regex": "HELLO", "replace": "x", "options": "ijo"}]), "x world, hello"),
            (json!([{"regex": "none", "replace": "x"}]), "hello world, hello"),
            (json!([{"regex": "hello", "replace": "a"}, {"regex": "a", "replace": "b"}]), "b world, hello"),
            (json!([{"regex": "^", "replace": "> "}]), "> hello world, hello"),
            (json!([{"regex": "l{2}o", "replace": "", "scope": "global"}]), "he world, he"),
        ];
        for (filters, expected) in cases {
            let mut x = run(json!({"filters": filters})).await;
            assert_eq!(text(&mut x).await, expected, "{filters}");
            assert_eq!(field(&x, "etag"), "");
            assert!(!x.request.headers.contains_key("accept-encoding"));
        }
    }

    #[tokio::test]
    async fn vars_are_judged_on_the_answer_as_it_came() {
        let rewritten = json!({"status_code": 500, "body": "b", "vars": [["status", "==", 200]]});
        let mut x = run(rewritten).await;
        assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (500, "b"));
        let kept = json!({"status_code": 500, "body": "b", "vars": [["status", "==", 404]]});
        let mut x = run(kept).await;
        assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (200, "hello world, hello"));
        assert_eq!(field(&x, "etag"), "\"e\"");
    }

    #[tokio::test]
    async fn a_compressed_body_is_left_alone_by_filters() {
        let config = json!({"filters": [{"regex": "hello", "replace": "x"}]});
        let answer = |x: &mut Exchange| {
            *x.response.body_mut() = Body::from("hello");
            x.response.headers_mut().insert("content-encoding", HeaderValue::from_static("gzip"));
            Ok(())
        };
        let mut chain = TestEnv::default().chain::<ResponseRewrite, _>(&config, answer).unwrap();
        let mut x = chain.run(exchange("GET", "http://a/").build()).await;
        assert_eq!((field(&x, "content-encoding").to_owned(), &*text(&mut x).await), ("gzip".into(), "hello"));
    }

    #[test]
    fn a_long_body_is_filtered_in_pieces() {
        for (scope, expected) in [("global", ["b", "b", "b"]), ("once", ["b", "a", "a"])] {
            let settings = json!({"regex": "a+", "replace": "b", "scope": scope});
            let filters: Arc<[CompiledFilter]> =
                [filter(&serde_json::from_value(settings).unwrap(), "").unwrap()].into();
            let mut body = Filtered::new(&filters);
            let piece = Bytes::from(vec![b'a'; 1 << 18]);
            let mut out: Vec<Bytes> = (0..9).map(|_| body.data(piece.clone())).collect();
            out.push(body.end());
            let pieces: Vec<_> = out.iter().filter_map(|piece| piece.get(..1)).collect();
            assert_eq!(pieces, expected.map(str::as_bytes), "{scope}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"body": "a", "filters": [{"regex": "a", "replace": "b"}]}), "exclude each other"),
            (json!({"body": "%", "body_base64": true}), "/body"),
            (json!({"body_base64": true}), "needs `body`"),
            (json!({"status_code": 199}), "/status_code"),
            (json!({"filters": []}), "/filters"),
            (json!({"filters": [{"regex": "(", "replace": ""}]}), "/filters/0/regex"),
            (json!({"filters": [{"regex": "a", "replace": "", "options": "jq"}]}), "/filters/0/options"),
            (json!({"headers": {"add": ["no colon"]}}), "/headers/add/0"),
            (json!({"vars": [["a", "=", "b"]]}), "/vars"),
        ];
        for (config, words) in cases {
            let found = TestEnv::default().build::<ResponseRewrite>(&config);
            let told = found.err().unwrap_or_default();
            assert!(told.iter().any(|error| error.to_string().contains(words)), "{config}: {told:?}");
        }
    }
}
