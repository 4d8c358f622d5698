//! `elasticsearch-logger`: writes entries into an index of Elasticsearch by its bulk interface.
//!
//! Phases: `access` and `body_filter` where bodies are told, and `log`. The answer is looked at entry by entry: what
//! was too much for the server is sent again, what it does not want is not.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use config::error::{ConfigError, escape};
use config::sensitive::Sensitive;
use config::template::Template;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use layers::telemetry::time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::support::batch::{self, Failure, Sink};
use crate::support::log_entry::{Fields, Logger, Make, Metadata, Recorder, View, line, weight};
use crate::support::log_http::{Call, Post, credential, is_passing, listed, refused, servers};
use crate::support::log_settings::logger_settings;

logger_settings! {
    queue_name: "elasticsearch-logger";
    /// The URL of the server; `endpoint_addrs` is its newer form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    endpoint_addr: Option<String>,
    /// URLs of the servers; each batch goes to one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    endpoint_addrs: Option<Vec<String>>,
    /// Where entries are written.
    field: Target,
    /// A user and a password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    auth: Option<Auth>,
    /// Further header fields.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    headers: BTreeMap<String, String>,
    /// Seconds that a call may take.
    #[serde(default = "timeout")]
    timeout: NonZeroU32,
    /// Check the certificate of the server.
    #[serde(default = "crate::support::log_settings::yes")]
    ssl_verify: bool,
}

fn timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(9)
}

/// Where entries are written.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The index: text with variables, and the time in braces as `strftime` writes it: `edge-{%Y.%m.%d}`.
    index: String,
    /// The type, for servers up to version 8.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
}

/// A user and a password.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    /// The user.
    #[schemars(length(min = 1))]
    username: String,
    /// The password.
    #[schemars(extend("x-encrypted" = true))]
    password: Sensitive,
}

/// The plugin.
pub struct ElasticsearchLogger;

impl Definition for ElasticsearchLogger {
    const NAME: &'static str = "elasticsearch-logger";
    const PRIORITY: i32 = 413;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = config.entry_settings().check();
        errors.extend(addresses(config).and_then(|list| servers(list, "")).err());
        errors.extend(Index::new(&config.field.index).err());
        if config.auth.as_ref().is_some_and(|auth| auth.username.is_empty()) {
            errors.push(ConfigError::invalid("/auth/username", "write a name"));
        }
        errors.extend(fields(config).err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = Metadata::of(env);
        let recorder = Recorder::new(config.entry_settings(), metadata.formats(), env)?;
        let index = Index::new(&config.field.index)?;
        let call = Call::within(config.ssl_verify, Duration::from_secs(config.timeout.get().into()));
        let post = |path: &str| {
            let post = Post::new(servers(addresses(&config)?, path)?, call, env)?.fields(fields(&config)?);
            match &config.auth {
                None => Ok(post),
                Some(Auth { username, password }) => {
                    let both = BASE64_STANDARD.encode(format!("{username}:{}", password.reveal()));
                    post.credential(header::AUTHORIZATION, &format!("Basic {both}"), "/auth")
                }
            }
        };
        let (bulk, root) = (post("/_bulk")?, post("/")?.method(http::Method::GET));
        let sink = Elasticsearch { bulk, root, kind: config.field.kind.clone(), version: OnceLock::new() };
        // The first batch asks for the version, too.
        let settings = config.batch_settings(metadata.max_pending_entries, call.attempt() * 2);
        let queue = batch::shared(env, Self::NAME, &config, settings, sink)?;
        Logger::register(recorder, index, queue, hooks);
        Ok(())
    }
}

/// The fields of every call.
fn fields(config: &Config) -> Result<HeaderMap, ConfigError> {
    let field = |(name, value): (&String, &String)| {
        let pointer = format!("/headers/{}", escape(name));
        let name = HeaderName::try_from(name.as_str())
            .map_err(|_| ConfigError::invalid(&*pointer, "it is no header field"))?;
        Ok((name, credential(value, &pointer)?))
    };
    config.headers.iter().map(field).collect()
}

/// The servers, with pointers to where they stand.
fn addresses(config: &Config) -> Result<Vec<(String, &str)>, ConfigError> {
    let list: Vec<_> = match (&config.endpoint_addr, &config.endpoint_addrs) {
        (Some(one), None) => vec![("/endpoint_addr".to_owned(), one.as_str())],
        (None, Some(list)) if !list.is_empty() => listed("/endpoint_addrs", list).collect(),
        (None, Some(_)) => return Err(ConfigError::invalid("/endpoint_addrs", "write at least one URL")),
        (None, None) => return Err(ConfigError::invalid("", "write `endpoint_addrs`")),
        (Some(_), Some(_)) => {
            return Err(ConfigError::invalid("", "write one of `endpoint_addr` and `endpoint_addrs`"));
        }
    };
    match list.iter().find(|(_, address)| address.ends_with('/')) {
        Some((pointer, _)) => Err(ConfigError::invalid(pointer, "leave out the `/` at the end")),
        None => Ok(list),
    }
}

/// The name of an index, with the time and variables in it.
#[derive(Debug)]
struct Index(Vec<Part>);

#[derive(Debug)]
enum Part {
    Text(Template),
    Time(String),
}

impl Index {
    fn new(text: &str) -> Result<Self, ConfigError> {
        if text.is_empty() {
            return Err(ConfigError::invalid("/field/index", "write the name of an index"));
        }
        let (mut parts, mut rest, mut plain) = (Vec::new(), text, String::new());
        while let Some(at) = rest.find('{') {
            let (before, after) = rest.split_at(at);
            let Some(end) = after.find('}') else { break };
            let (braces, behind) = after.split_at(end + 1);
            plain.push_str(before);
            if before.ends_with('$') {
                // `${name}` is a variable.
                plain.push_str(braces);
            } else {
                let format = braces.trim_start_matches('{').trim_end_matches('}');
                if time::strftime(SystemTime::UNIX_EPOCH, format).is_none() {
                    let problem = format!("`{braces}` is no time: write `%Y`, `%m`, `%d`, `%H` and the like");
                    return Err(ConfigError::invalid("/field/index", problem));
                }
                parts.push(Part::Text(Template::parse(&std::mem::take(&mut plain))));
                parts.push(Part::Time(format.to_owned()));
            }
            rest = behind;
        }
        plain.push_str(rest);
        parts.push(Part::Text(Template::parse(&plain)));
        Ok(Self(parts))
    }

    fn name(&self, view: &View<'_>, now: SystemTime) -> String {
        let mut name = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => text.render(view, &mut name),
                Part::Time(format) => name.push_str(&time::strftime(now, format).unwrap_or_default()),
            }
        }
        name
    }
}

impl Make for Index {
    type Entry = (String, Fields);

    fn make(&self, recorder: &Recorder, view: &View<'_>) -> ((String, Fields), usize) {
        let (index, fields) = (self.name(view, SystemTime::now()), recorder.fields(view));
        let bytes = weight(&fields) + index.len();
        ((index, fields), bytes)
    }
}

struct Elasticsearch {
    bulk: Post,
    root: Post,
    kind: Option<String>,
    /// The server's major version.
    version: OnceLock<u32>,
}

impl Elasticsearch {
    /// What the servers speak, asked once.
    async fn version(&self) -> Result<u32, Failure> {
        if let Some(known) = self.version.get() {
            return Ok(*known);
        }
        let answer = self.root.send("").await?;
        if answer.status() != StatusCode::OK {
            return Err(refused(&answer));
        }
        let told: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
        let number = told.pointer("/version/number").and_then(Value::as_str);
        let number = number.and_then(|number| number.split('.').next()?.parse().ok());
        let Some(number) = number else { return Err(Failure::retryable("the server tells no version")) };
        Ok(*self.version.get_or_init(|| number))
    }
}

impl Sink for Elasticsearch {
    type Entry = (String, Fields);

    async fn send(&self, batch: &[(String, Fields)]) -> Result<(), Failure> {
        let version = self.version().await?;
        let mut body = String::new();
        for (index, fields) in batch {
            let create = match self.kind.as_ref().filter(|_| version < 9) {
                Some(kind) => json!({"_index": index, "_type": kind}),
                None => json!({"_index": index}),
            };
            body.push_str(&json!({ "create": create }).to_string());
            body.push('\n');
            body.push_str(&line(fields));
            body.push('\n');
        }
        let compatible = match version {
            8 => ";compatible-with=7",
            9 => ";compatible-with=8",
            _ => "",
        };
        let kind = |name: &str| HeaderValue::try_from(format!("{name}{compatible}"));
        let (Ok(sent), Ok(wanted)) =
            (kind("application/vnd.elasticsearch+x-ndjson"), kind("application/vnd.elasticsearch+json"))
        else {
            return Err(Failure::permanent("no header field can be made"));
        };
        let sent = if compatible.is_empty() { HeaderValue::from_static("application/x-ndjson") } else { sent };
        let wanted =
            if compatible.is_empty() { HeaderValue::from_static("application/json") } else { wanted };
        let answer =
            self.bulk.send_with(body, [(header::CONTENT_TYPE, sent), (header::ACCEPT, wanted)]).await?;
        if answer.status() != StatusCode::OK {
            return Err(refused(&answer));
        }
        judge(answer.body(), batch.len())
    }
}

/// The answer to a bulk of `count` entries.
#[derive(Debug, Deserialize)]
struct Bulk {
    errors: bool,
    #[serde(default)]
    items: Vec<BTreeMap<String, Item>>,
}

#[derive(Debug, Deserialize)]
struct Item {
    status: u16,
    #[serde(default)]
    error: Value,
}

fn judge(answer: &[u8], count: usize) -> Result<(), Failure> {
    let bulk: Bulk = serde_json::from_slice(answer)
        .map_err(|error| Failure::permanent(format!("the answer to a bulk cannot be read: {error}")))?;
    if !bulk.errors {
        return Ok(());
    }
    let (mut again, mut refused, mut problem) = (Vec::new(), 0, String::new());
    for (place, item) in bulk.items.iter().take(count).enumerate() {
        let Some(item) = item.values().next().filter(|item| item.status >= 300) else { continue };
        let passing = StatusCode::from_u16(item.status).is_ok_and(is_passing);
        if passing { again.push(place) } else { refused += 1 }
        if problem.is_empty() {
            let reason = item.error.get("reason").and_then(Value::as_str).unwrap_or_default();
            problem = format!("status {}: {reason}", item.status);
        }
    }
    Err(Failure::partial(problem, again, refused))
}

#[cfg(test)]
mod tests {
    use layers::telemetry::log_shipping::Loss;
    use layers::testing::{TestEnv, exchange};

    use super::*;
    use crate::support::log_sink::{Got, HttpSink, answered};

    /// A server of that version that answers bulks as `bulk` says.
    async fn server(version: &str, bulk: impl Fn(&Got) -> Value + Send + Sync + 'static) -> HttpSink {
        let root = json!({"version": {"number": version}}).to_string();
        HttpSink::answering(move |got| match got.target.as_str() {
            "/" => (200, root.clone()),
            _ => (200, bulk(got).to_string()),
        })
        .await
    }

    async fn log(env: &TestEnv, config: &Value, count: usize) {
        let mut chain = env.chain::<ElasticsearchLogger, _>(config, answered).unwrap();
        for number in 0..count {
            drop(chain.run(exchange("GET", &format!("http://a.com/{number}")).build()).await);
        }
    }

    #[tokio::test]
    async fn a_bulk_names_its_index_and_speaks_as_the_server_does() {
        let cases = [
            ("7.17.0", "application/x-ndjson", true),
            ("8.15.0", "application/vnd.elasticsearch+x-ndjson;compatible-with=7", true),
            ("9.0.0", "application/vnd.elasticsearch+x-ndjson;compatible-with=8", false),
        ];
        for (version, kind, typed) in cases {
            let server = server(version, |_| json!({"errors": false})).await;
            let config = json!({
                "endpoint_addrs": [server.url("")], "field": {"index": "edge-$host-${request_method}", "type": "t"},
                "auth": {"username": "elastic", "password": "123456"}, "batch_max_size": 2,
                "log_format": {"uri": "$uri"},
            });
            log(&TestEnv::default(), &config, 2).await;
            let got = server.requests(2).await;
            assert_eq!((got[0].method.as_str(), got[0].target.as_str()), ("GET", "/"));
            assert_eq!((got[1].method.as_str(), got[1].target.as_str()), ("POST", "/_bulk"));
            assert_eq!(got[1].field("authorization"), "Basic ZWxhc3RpYzoxMjM0NTY=");
            assert_eq!(got[1].field("content-type"), kind);
            let mut create = json!({"create": {"_index": "edge-a.com-GET"}});
            if typed {
                create["create"]["_type"] = "t".into();
            }
            let expected = format!("{create}\n{{\"uri\":\"/0\"}}\n{create}\n{{\"uri\":\"/1\"}}\n");
            assert_eq!(got[1].text(), expected);
        }
    }

    #[tokio::test]
    async fn each_entry_of_an_answer_is_judged() {
        let server = server("8.0.0", |got| match got.text().matches("\"create\"").count() {
            3 => json!({"errors": true, "items": [
                {"create": {"status": 201}},
                {"create": {"status": 400, "error": {"reason": "mapper"}}},
                {"create": {"status": 429, "error": {"reason": "busy"}}},
            ]}),
            _ => json!({"errors": false}),
        })
        .await;
        let env = TestEnv::default();
        let config = json!({
            "endpoint_addr": server.url(""), "field": {"index": "i"}, "batch_max_size": 3, "max_retry_count": 1,
            "retry_delay": 0, "log_format": {"uri": "$uri"},
        });
        log(&env, &config, 3).await;
        let got = server.requests(3).await;
        assert!(got[2].text().ends_with("\n{\"uri\":\"/2\"}\n"), "{}", got[2].text());
        let counts = env.metrics.logs.counts("elasticsearch-logger");
        server.until(|| counts.sent.value() == 2).await;
        assert_eq!(counts.losses(Loss::Refused), 1);
    }

    #[test]
    fn an_index_may_hold_the_time() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_763_694_245);
        let x = exchange("GET", "http://a.com/").build();
        let runtime = crate::support::peer::runtime();
        let _inside = runtime.enter();
        let config: Config =
            serde_json::from_value(json!({"endpoint_addr": "http://a", "field": {"index": "i"}})).unwrap();
        let recorder = TestEnv::default()
            .with(|env| Recorder::new(config.entry_settings(), Metadata::default().formats(), env))
            .unwrap();
        let view = recorder.view(0, &x);
        for (text, expected) in [
            ("edge", "edge"),
            ("edge-{%Y.%m.%d}", "edge-2025.11.21"),
            ("{%Y}-$host-{%H%M%S}", "2025-a.com-030405"),
            ("${host}-{%y}", "a.com-25"),
            ("open-{", "open-{"),
        ] {
            assert_eq!(Index::new(text).unwrap().name(&view, at), expected);
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let field = json!({"index": "i"});
        let cases = [
            (json!({"field": field}), ""),
            (json!({"field": field, "endpoint_addr": "http://a", "endpoint_addrs": ["http://b"]}), ""),
            (json!({"field": field, "endpoint_addrs": []}), "/endpoint_addrs"),
            (json!({"field": field, "endpoint_addrs": ["http://a/"]}), "/endpoint_addrs/0"),
            (json!({"field": field, "endpoint_addrs": ["a"]}), "/endpoint_addrs/0"),
            (json!({"field": {"index": "a-{%Q}"}, "endpoint_addr": "http://a"}), "/field/index"),
            (json!({"field": {}, "endpoint_addr": "http://a"}), "/field"),
            (json!({"field": field, "endpoint_addr": "http://a", "timeout": 0}), "/timeout"),
            (json!({"field": field, "endpoint_addr": "http://a", "auth": {"username": "u"}}), "/auth"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<ElasticsearchLogger>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
