//! `data-mask`: takes parts of a request out of what loggers and the access log tell.
//!
//! Runs when the request is over, before every logger, and changes neither what the upstream gets nor what other
//! plugins see before. A body that is not of the format of any rule, or too large to look into, is not told at all.

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use config::error::{ConfigError, ErrorKind};
use config::pattern;
use config::var::{Var, Vars};
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Uri};
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Hide, Hooks};
use layers::vars::BufferedBody;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use regex::bytes::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::captures::{Replacement, Text};
use crate::support::headers;
use crate::support::json_path::JsonPath;
use crate::support::log_entry::{Mask, Masked, Masks};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is hidden of requests, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    request: Vec<Rule>,
    /// The largest body that is looked into, in bytes. Of a larger one nothing is told.
    #[serde(default = "max_body_size")]
    #[schemars(range(min = 1))]
    max_body_size: u64,
    /// The arguments of a form that are looked at. Those behind them are not told.
    #[serde(default = "max_req_post_args")]
    max_req_post_args: u32,
}

fn max_body_size() -> u64 {
    1 << 20
}

fn max_req_post_args() -> u32 {
    100
}

/// One part that is hidden.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Which part.
    #[serde(rename = "type")]
    part: Part,
    /// How the body is written; with `type` `body`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body_format: Option<BodyFormat>,
    /// The name of the argument or field; in a JSON body its place as a JSONPath, such as `$.users[*].token`.
    name: String,
    /// What is done with the value.
    action: Action,
    /// The pattern whose first match in the value is replaced; with `action` `regex`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    regex: Option<String>,
    /// What is told instead; with `action` `regex` it may hold captures (`$1`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
}

/// A part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// An argument of the query.
    Query,
    /// A header field.
    Header,
    /// Something in the body.
    Body,
}

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BodyFormat {
    /// JSON.
    Json,
    /// A form.
    Urlencoded,
}

/// What is done with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// A part of it is replaced.
    Regex,
    /// It is replaced.
    Replace,
    /// It is taken out.
    Remove,
}

/// The plugin.
pub struct DataMask {
    query: Box<[(Box<str>, Change)]>,
    headers: Box<[(HeaderName, Change)]>,
    /// Nothing is hidden of bodies where there is nothing.
    body: Option<Arc<BodyRules>>,
}

/// What is hidden of bodies.
struct BodyRules {
    json: Box<[(JsonPath, Change)]>,
    form: Box<[(Box<str>, Change)]>,
    max_body: u64,
    max_arguments: usize,
}

/// What is done with a value, compiled.
enum Change {
    Remove,
    Replace(Box<str>),
    Regex(Regex, Replacement),
}

/// A replacement takes captures only.
struct NoVars;

impl Vars for NoVars {
    fn get<'a>(&'a self, _: &Var) -> Option<std::borrow::Cow<'a, str>> {
        None
    }
}

impl Change {
    fn new(rule: &Rule, at: &str) -> Result<Self, ConfigError> {
        let missing = |field: &str| ConfigError::new(at, ErrorKind::MissingField { field: field.to_owned() });
        match rule.action {
            Action::Remove => Ok(Self::Remove),
            Action::Replace => Ok(Self::Replace(rule.value.as_deref().ok_or_else(|| missing("value"))?.into())),
            Action::Regex => {
                let source = rule.regex.as_deref().ok_or_else(|| missing("regex"))?;
                let value = rule.value.as_deref().ok_or_else(|| missing("value"))?;
                let pattern = pattern::compile(source, false)
                    .map_err(|error| ConfigError::invalid(format!("{at}/regex"), error.to_string()))?;
                Ok(Self::Regex(pattern, Replacement::captures(value)))
            }
        }
    }

    /// What is told in place of `value`; nothing takes it out.
    fn apply(&self, value: &[u8]) -> Option<Text> {
        match self {
            Self::Remove => None,
            Self::Replace(instead) => Some(Text::from_slice(instead.as_bytes())),
            Self::Regex(pattern, replacement) => {
                let Some(captures) = pattern.captures(value) else { return Some(Text::from_slice(value)) };
                let (start, end) = captures.get(0).map_or((0, 0), |found| (found.start(), found.end()));
                let mut out = Text::from_slice(value.get(..start).unwrap_or_default());
                replacement.render(&NoVars, Some(&captures), &mut out);
                out.extend_from_slice(value.get(end..).unwrap_or_default());
                Some(out)
            }
        }
    }

    /// As [`apply`](Self::apply), for a JSON value. A pattern is matched on text; what is none is taken as it is written.
    fn apply_json(&self, value: &Value) -> Option<Value> {
        let changed = match value {
            Value::String(text) => self.apply(text.as_bytes()),
            other => self.apply(other.to_string().as_bytes()),
        };
        changed.map(|text| String::from_utf8_lossy(&text).into_owned().into())
    }
}

impl Definition for DataMask {
    const NAME: &'static str = "data-mask";
    const PRIORITY: i32 = 1500;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let size = (config.max_body_size == 0).then(|| {
            let kind = ErrorKind::OutOfRange { what: "the number", found: "0".into(), allowed: "1 or more".into() };
            ConfigError::new("/max_body_size", kind)
        });
        size.into_iter().chain(compile(config).err()).collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        hooks.hide(&Arc::new(compile(&config)?));
        Ok(())
    }
}

fn compile(config: &Config) -> Result<DataMask, ConfigError> {
    let (mut query, mut fields, mut json, mut form) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, rule) in config.request.iter().enumerate() {
        let at = format!("/request/{index}");
        let change = Change::new(rule, &at)?;
        match (rule.part, rule.body_format) {
            (Part::Query, _) => query.push((rule.name.as_str().into(), change)),
            (Part::Header, _) => {
                let name = headers::name(&rule.name, "")
                    .map_err(|error| ConfigError::new(format!("{at}/name"), error.kind))?;
                fields.push((name, change));
            }
            (Part::Body, Some(BodyFormat::Urlencoded)) => form.push((rule.name.as_str().into(), change)),
            (Part::Body, Some(BodyFormat::Json)) => {
                let path = JsonPath::parse(&rule.name).ok_or_else(|| {
                    let problem = "write a JSONPath of names and places, such as `$.users[*].token`";
                    ConfigError::invalid(format!("{at}/name"), problem)
                })?;
                json.push((path, change));
            }
            (Part::Body, None) => {
                return Err(ConfigError::new(at, ErrorKind::MissingField { field: "body_format".to_owned() }));
            }
        }
    }
    let body = (!json.is_empty() || !form.is_empty()).then(|| {
        Arc::new(BodyRules {
            json: json.into(),
            form: form.into(),
            max_body: config.max_body_size,
            max_arguments: config.max_req_post_args as usize,
        })
    });
    Ok(DataMask { query: query.into(), headers: fields.into(), body })
}

impl Hide for DataMask {
    fn hide(&self, x: &mut Exchange) {
        if !self.query.is_empty() {
            self.hide_arguments(x);
        }
        for (name, change) in &self.headers {
            let values: Vec<_> = x.request.headers.get_all(name).iter().cloned().collect();
            x.request.headers.remove(name);
            for value in values {
                if let Some(value) = change.apply(value.as_bytes()).and_then(|v| HeaderValue::from_bytes(&v).ok()) {
                    x.request.headers.append(name, value);
                }
            }
        }
        let Some(rules) = &self.body else { return };
        if let Some(body) = x.slot::<BufferedBody>().and_then(|body| rules.masked(&body.bytes)) {
            let kind = if rules.json.is_empty() { None } else { Some("application/json") };
            x.put_slot(BufferedBody::new(body, kind));
        }
        // The copies that loggers keep are theirs: they ask.
        if let Some(masks) = x.slot_mut::<Masks>() {
            masks.0.push(Rc::new(BodyMask(rules.clone())));
        }
    }
}

/// Hides parts of the body that a logger has kept.
struct BodyMask(Arc<BodyRules>);

impl Mask for BodyMask {
    fn mask(&self, _: &State, shown: &mut Masked) {
        if let Some(body) = shown.body.as_ref().and_then(|body| self.0.masked(body)) {
            shown.body = Some(body);
        }
    }
}

impl DataMask {
    fn hide_arguments(&self, x: &mut State) {
        if let Some(uri) = self.masked_uri(&x.request.uri) {
            x.request.uri = uri;
        }
        if let Some(uri) = x.original_uri.as_ref().and_then(|uri| self.masked_uri(uri)) {
            x.original_uri = Some(Box::new(uri));
        }
        if let Some(target) = x.forward.uri.as_ref().and_then(|target| self.masked_target(target)) {
            x.forward.uri = Some(target);
        }
    }

    fn masked_uri(&self, uri: &Uri) -> Option<Uri> {
        let target = self.masked_target(uri.path_and_query()?)?;
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = Some(target);
        Uri::from_parts(parts).ok()
    }

    /// The target with its arguments hidden; nothing if there is nothing to hide.
    fn masked_target(&self, target: &PathAndQuery) -> Option<PathAndQuery> {
        let query = masked_form(target.query()?, &self.query, usize::MAX)?;
        let path = target.path();
        let masked = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        // Nothing is told of a query that cannot be written.
        PathAndQuery::try_from(masked).or_else(|_| PathAndQuery::try_from(path)).ok()
    }

}

impl BodyRules {
    /// What is told of a body; nothing if that is the body itself.
    fn masked(&self, body: &Bytes) -> Option<Bytes> {
        if body.is_empty() {
            return None;
        }
        if body.len() as u64 > self.max_body {
            return Some(Bytes::new());
        }
        let is_json = matches!(body.trim_ascii_start().first(), Some(b'{' | b'['));
        if is_json && !self.json.is_empty() {
            let Ok(mut json) = serde_json::from_slice::<Value>(body) else { return Some(Bytes::new()) };
            let mut masked = false;
            for (path, change) in &self.json {
                masked |= path.change(&mut json, &|value| change.apply_json(value));
            }
            return masked.then(|| json.to_string().into());
        }
        if !is_json && !self.form.is_empty() {
            let Ok(form) = std::str::from_utf8(body) else { return Some(Bytes::new()) };
            return masked_form(form, &self.form, self.max_arguments).map(Bytes::from);
        }
        Some(Bytes::new())
    }
}

/// Characters that would end a value, or are not told raw.
const VALUE: &AsciiSet = &CONTROLS.add(b' ').add(b'&').add(b'#').add(b'%').add(b'+').add(b'"').add(b'<').add(b'>');

/// A query or form with the rules applied, at most so many arguments of it; nothing if it stays as it is.
fn masked_form(form: &str, rules: &[(Box<str>, Change)], limit: usize) -> Option<String> {
    let mut out = String::with_capacity(form.len());
    let mut changed = false;
    for (index, pair) in form.split('&').enumerate() {
        if index >= limit {
            changed = true;
            break;
        }
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let decoded = percent_decode_str(&key.replace('+', " ")).decode_utf8_lossy().into_owned();
        let mut shown = Some(None);
        for (_, change) in rules.iter().filter(|(name, _)| **name == *decoded) {
            changed = true;
            let before = match &shown {
                None => break,
                Some(Some(value)) => Text::clone(value),
                Some(None) => percent_decode_str(&value.replace('+', " ")).collect(),
            };
            shown = change.apply(&before).map(Some);
        }
        let Some(instead) = shown else { continue };
        if !out.is_empty() {
            out.push('&');
        }
        match instead {
            None => out.push_str(pair),
            Some(value) => {
                out.push_str(key);
                out.push('=');
                out.extend(utf8_percent_encode(&String::from_utf8_lossy(&value), VALUE));
            }
        }
    }
    changed.then_some(out)
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;

    fn mask(config: &Value) -> DataMask {
        compile(&serde_json::from_value(config.clone()).unwrap()).unwrap()
    }

    const CARD: &str = "(\\d+)\\-\\d+\\-\\d+\\-(\\d+)";

    #[tokio::test]
    async fn arguments_and_fields_are_hidden_from_every_variable() {
        let rules = json!({"request": [
            {"type": "query", "name": "password", "action": "remove"},
            {"type": "query", "name": "token", "action": "replace", "value": "*****"},
            {"type": "query", "name": "card", "action": "regex", "regex": CARD, "value": "$1-****-****-$2"},
            {"type": "header", "name": "Authorization", "action": "remove"},
            {"type": "header", "name": "X-Key", "action": "replace", "value": "[REDACTED]"},
            {"type": "header", "name": "X-Card", "action": "regex", "regex": CARD, "value": "$1-****-****-$2"},
        ]});
        let target = "/a?password=x&a=1&t%6Fken=secret&token=again&card=1234-5678-9012-3456&password=y";
        let mut x = exchange("GET", &format!("http://a{target}"))
            .header("authorization", "Bearer x")
            .header("x-key", "k")
            .header("x-card", "1234-5678-9012-3456")
            .header("x-other", "o")
            .build();
        x.original_uri = Some(Box::new(format!("/%61?{}", &target[3..]).parse().unwrap()));
        x.forward.uri = Some("/b?password=x".parse().unwrap());
        mask(&rules).hide(&mut x);
        let query = "a=1&t%6Fken=*****&token=*****&card=1234-****-****-3456";
        assert_eq!(x.request_uri(), format!("/%61?{query}"));
        let told = |name: &str| x.get(&Var::parse(name)).map(|value| value.into_owned());
        assert_eq!(told("args").as_deref(), Some(query));
        assert_eq!(told("arg_token").as_deref(), Some("*****"));
        assert_eq!(told("arg_password"), None);
        assert_eq!(told("upstream_uri").as_deref(), Some("/b"));
        assert_eq!(told("http_authorization"), None);
        assert_eq!(told("http_x_key").as_deref(), Some("[REDACTED]"));
        assert_eq!(told("http_x_card").as_deref(), Some("1234-****-****-3456"));
        assert_eq!(told("http_x_other").as_deref(), Some("o"));
    }

    #[tokio::test]
    async fn the_upstream_gets_everything() {
        let rules = json!({"request": [{"type": "query", "name": "a", "action": "remove"}]});
        let mut chain = TestEnv::default()
            .chain::<DataMask, _>(&rules, |x| {
                assert_eq!(x.request.uri.query(), Some("a=1"));
                Ok(())
            })
            .unwrap();
        assert_eq!(chain.run(exchange("GET", "http://a/?a=1").build()).await.status(), 200);
    }

    #[test]
    fn bodies_are_hidden_in_their_format() {
        let json_rules = json!({"max_body_size": 60, "request": [
            {"type": "body", "body_format": "json", "name": "$.password", "action": "remove"},
            {"type": "body", "body_format": "json", "name": "$.users[*].token", "action": "replace", "value": "***"},
            {"type": "body", "body_format": "json", "name": "$..card", "action": "regex", "regex": "\\d+$", "value": "?"},
        ]});
        let form_rules = json!({"max_req_post_args": 3, "request": [
            {"type": "body", "body_format": "urlencoded", "name": "a", "action": "replace", "value": "x y&z"},
            {"type": "body", "body_format": "urlencoded", "name": "b", "action": "remove"},
        ]});
        // (rules, body, what is told; nothing for the body itself)
        let cases: [(&Value, &str, Option<&str>); 14] = [
            (&json_rules, r#"{"password":"p","x":1}"#, Some(r#"{"x":1}"#)),
            (&json_rules, r#"{"users":[{"token":"t"},{"u":1}]}"#, Some(r#"{"users":[{"token":"***"},{"u":1}]}"#)),
            (&json_rules, r#"[{"card":"12-34"},{"card":56}]"#, Some(r#"[{"card":"12-?"},{"card":"?"}]"#)),
            (&json_rules, r#"{"x":1}"#, None),
            (&json_rules, "", None),
            (&json_rules, r#"{"password":"p"#, Some("")),
            (&json_rules, "password=p", Some("")),
            (&json_rules, &format!("{{\"x\":\"{}\"}}", "y".repeat(60)), Some("")),
            (&form_rules, "a=1&b=2&c=3", Some("a=x%20y%26z&c=3")),
            (&form_rules, "c=3&%61=1", Some("c=3&%61=x%20y%26z")),
            (&form_rules, "c=3", None),
            (&form_rules, "c=1&d=2&e=3&a=4", Some("c=1&d=2&e=3")),
            (&form_rules, r#"{"a":1}"#, Some("")),
            (&json!({}), "a=1", None),
        ];
        for (rules, body, told) in cases {
            let body_rules = mask(rules).body;
            let masked = body_rules.and_then(|rules| rules.masked(&Bytes::from(body.to_owned())));
            assert_eq!(masked.as_deref(), told.map(str::as_bytes), "{body}");
        }
    }

    #[test]
    fn the_variable_of_the_body_is_hidden() {
        let rules = json!({"request": [
            {"type": "body", "body_format": "json", "name": "$.a", "action": "replace", "value": "*"},
        ]});
        let mut x = exchange("POST", "http://a/").build();
        x.put_slot(BufferedBody::new(Bytes::from_static(br#"{"a":"secret"}"#), Some("application/json")));
        mask(&rules).hide(&mut x);
        assert_eq!(x.get(&Var::parse("request_body")).as_deref(), Some(r#"{"a":"*"}"#));
        assert_eq!(x.get(&Var::parse("post_arg.a")).as_deref(), Some("*"));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let rule = |rule: Value| json!({"request": [rule]});
        let cases = [
            (rule(json!({"type": "query", "name": "a"})), "/request/0"),
            (rule(json!({"type": "cookie", "name": "a", "action": "remove"})), "/request/0/type"),
            (rule(json!({"type": "query", "name": "a", "action": "drop"})), "/request/0/action"),
            (rule(json!({"type": "query", "name": "a", "action": "replace"})), "/request/0"),
            (rule(json!({"type": "query", "name": "a", "action": "regex", "value": "x"})), "/request/0"),
            (rule(json!({"type": "query", "name": "a", "action": "regex", "regex": "(", "value": "x"})), "/request/0/regex"),
            (rule(json!({"type": "header", "name": "a b", "action": "remove"})), "/request/0/name"),
            (rule(json!({"type": "body", "name": "$.a", "action": "remove"})), "/request/0"),
            (rule(json!({"type": "body", "body_format": "json", "name": "a", "action": "remove"})), "/request/0/name"),
            (rule(json!({"type": "body", "body_format": "xml", "name": "a", "action": "remove"})), "/request/0/body_format"),
            (json!({"max_body_size": 0}), "/max_body_size"),
            (json!({"max_req_post_args": -1}), "/max_req_post_args"),
            (json!({"response": []}), "/response"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<DataMask>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
