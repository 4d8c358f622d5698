//! `opa`: asks an Open Policy Agent whether a request may pass.
//!
//! Phase: `access`. The agent gets the request as JSON, with the route, the service, the consumer or the body where
//! the settings say so, and answers with `allow`. Without a verdict the request is refused: 403 when there is no answer
//! in time, 503 when the answer is no verdict. Secrets of a consumer are not told.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use config::error::ConfigError;
use config::fields::Int;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use layers::body::Body;
use layers::exchange::{Exchange, State};
use layers::plugin::{AccessWaits, BuildEnv, Definition, Flow, Hooks};
use percent_encoding::percent_decode_str;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::runtime::Handle;

use crate::support::http_call::{self, HttpClient};
use crate::support::reply::Canned;
use crate::support::{headers, request_body};

/// The largest request body that is sent to the agent.
const MAX_BODY: usize = 1 << 20;
/// A body from which on the question is written down by a thread that may take its time.
const LARGE: usize = 32 * 1024;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The URL of the agent, without a path.
    host: String,
    /// Check the agent's certificate.
    #[serde(default = "yes")]
    ssl_verify: bool,
    /// The policy: its package, and the decision where the package gives more than one, `example/allow`.
    #[schemars(length(max = 256))]
    policy: String,
    /// Milliseconds to wait for the whole answer.
    #[serde(default)]
    timeout: Int<1, 60_000, 3_000>,
    /// Keep connections to the agent.
    #[serde(default = "yes")]
    keepalive: bool,
    /// Milliseconds that a connection may be idle.
    #[serde(default)]
    keepalive_timeout: Int<1_000, { u32::MAX }, 60_000>,
    /// Idle connections that are kept.
    #[serde(default)]
    keepalive_pool: Int<1, { u32::MAX }, 5>,
    /// Tell the agent the route as it is stored, without its upstream.
    #[serde(default)]
    with_route: bool,
    /// Tell the agent the service as it is stored, without its upstream.
    #[serde(default)]
    with_service: bool,
    /// Tell the agent the consumer.
    #[serde(default)]
    with_consumer: bool,
    /// Extension: tell the agent the body, as `request.body`.
    #[serde(default)]
    with_body: bool,
    /// Fields of the verdict's `headers` that the upstream gets. A client's own are taken out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    send_headers_upstream: Option<Vec<String>>,
}

fn yes() -> bool {
    true
}

/// The plugin.
pub struct Opa {
    client: HttpClient,
    uri: Uri,
    control: Handle,
    route: bool,
    service: bool,
    consumer: bool,
    body: bool,
    upstream: Box<[HeaderName]>,
    no_answer: Canned,
    no_verdict: Canned,
}

impl Definition for Opa {
    const NAME: &'static str = "opa";
    const PRIORITY: i32 = 2001;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors: Vec<_> = http_call::url(&config.host, "/host").err().into_iter().collect();
        if errors.is_empty() {
            errors.extend(endpoint(config).err());
        }
        errors.extend(upstream_fields(config).filter_map(Result::err));
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let settings = http_call::Settings::of(
            config.ssl_verify,
            config.timeout.get(),
            config.keepalive.then(|| (config.keepalive_pool.get(), config.keepalive_timeout.get())),
        );
        hooks.access_waits(&Arc::new(Self {
            client: HttpClient::new(&settings, env)?,
            uri: endpoint(&config)?,
            control: env.control.clone(),
            route: config.with_route,
            service: config.with_service,
            consumer: config.with_consumer,
            body: config.with_body,
            upstream: upstream_fields(&config).collect::<Result<_, _>>()?,
            no_answer: Canned::status(StatusCode::FORBIDDEN),
            no_verdict: Canned::status(StatusCode::SERVICE_UNAVAILABLE),
        }));
        Ok(())
    }
}

fn upstream_fields(config: &Config) -> impl Iterator<Item = Result<HeaderName, ConfigError>> {
    config.send_headers_upstream.iter().flatten().enumerate().map(|(index, name)| {
        let pointer = format!("/send_headers_upstream/{index}");
        headers::name(name, "").map_err(|error| ConfigError::new(pointer, error.kind))
    })
}

fn endpoint(config: &Config) -> Result<Uri, ConfigError> {
    let host = config.host.trim_end_matches('/');
    http_call::url(&format!("{host}/v1/data/{}", config.policy), "/policy")
}

/// Fields or arguments: a value, or a list where the name stands more than once.
fn add(to: &mut Map<String, Value>, name: String, value: Value) {
    match to.get_mut(&name) {
        None => {
            to.insert(name, value);
        }
        Some(Value::Array(list)) => list.push(value),
        Some(first) => *first = Value::Array(vec![first.take(), value]),
    }
}

fn fields(headers: &HeaderMap) -> Map<String, Value> {
    let mut fields = Map::new();
    for (name, value) in headers {
        add(&mut fields, name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into());
    }
    fields
}

fn arguments(query: &str) -> Map<String, Value> {
    let decode =
        |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let mut arguments = Map::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some((name, value)) => add(&mut arguments, decode(name), decode(value).into()),
            None => add(&mut arguments, decode(pair), true.into()),
        }
    }
    arguments
}

impl Opa {
    /// What the agent is told, but for the body.
    fn input(&self, x: &State) -> Map<String, Value> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let host = x.request.headers.get(header::HOST).is_none().then(|| x.authority()).flatten();
        let mut headers = fields(&x.request.headers);
        if let Some(host) = host {
            headers.insert("host".to_owned(), host.into_owned().into());
        }
        let mut input = Map::new();
        input.insert("type".to_owned(), "http".into());
        input.insert(
            "request".to_owned(),
            json!({
                "scheme": x.conn.scheme(),
                "method": x.request.method.as_str(),
                "host": &*x.host,
                "port": x.conn.local.port(),
                "path": x.path(),
                "headers": headers,
                "query": arguments(x.request.uri.query().unwrap_or_default()),
            }),
        );
        input.insert(
            "var".to_owned(),
            json!({
                "server_addr": x.conn.local.ip().to_string(),
                "server_port": x.conn.local.port().to_string(),
                "remote_addr": x.remote_addr.to_string(),
                "remote_port": x.conn.peer.port().to_string(),
                "timestamp": now,
            }),
        );
        let target = x.target.as_deref();
        let stored = [
            ("route", self.route, target.and_then(|target| target.route.as_ref())),
            ("service", self.service, target.and_then(|target| target.service.as_ref())),
        ];
        for (name, wanted, item) in stored {
            if let Some(item) = item.filter(|_| wanted) {
                let mut object = item.to_value();
                if let Some(fields) = object.as_object_mut() {
                    fields.remove("upstream");
                }
                input.insert(name.to_owned(), object);
            }
        }
        if let Some(consumer) = x.consumer.as_deref().filter(|_| self.consumer) {
            let labels: Map<String, Value> =
                consumer.labels.iter().map(|(name, value)| (name.to_string(), (**value).into())).collect();
            input.insert(
                "consumer".to_owned(),
                json!({
                    "username": &*consumer.name,
                    "consumer_name": &*consumer.name,
                    "group_id": consumer.group_id.as_deref(),
                    "custom_id": consumer.custom_id.as_deref(),
                    "credential_id": consumer.credential_id.as_deref(),
                    "labels": labels,
                }),
            );
        }
        input
    }

    /// The question as it is sent.
    async fn question(&self, x: &mut Exchange) -> Result<Request<Bytes>, Flow> {
        let body = if self.body { Some(request_body::read(x, MAX_BODY).await?) } else { None };
        let mut input = self.input(x);
        let large = body.as_ref().is_some_and(|body| body.len() > LARGE);
        let mut write = move || {
            if let Some(body) = &body
                && let Some(request) = input.get_mut("request").and_then(Value::as_object_mut)
            {
                request.insert("body".to_owned(), String::from_utf8_lossy(body).into());
            }
            json!({ "input": input }).to_string()
        };
        let text = if large {
            self.control.spawn_blocking(write).await.map_err(|_| self.no_answer.flow())?
        } else {
            write()
        };
        let mut question = Request::post(self.uri.clone()).body(Bytes::from(text)).unwrap_or_default();
        question
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(question)
    }

    fn obey(&self, x: &mut State, verdict: &Value) -> Flow {
        let said = verdict.get("headers").and_then(Value::as_object);
        // Whatever is not `true` is a refusal, as `false` and `null` are.
        if verdict.get("allow").and_then(Value::as_bool) == Some(true) {
            for name in &self.upstream {
                let value = said.and_then(|said| find(said, name)).and_then(value);
                headers::set(&mut x.request.headers, name, value);
            }
            return Flow::Next;
        }
        let status = verdict
            .get("status_code")
            .and_then(Value::as_u64)
            .and_then(|code| StatusCode::from_u16(u16::try_from(code).ok()?).ok())
            .filter(|status| status.as_u16() >= 200)
            .unwrap_or(StatusCode::FORBIDDEN);
        let reason = match verdict.get("reason") {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => Some(other.to_string()),
        };
        let refusal = match &reason {
            Some(reason) => Canned::text(status, reason),
            None => Canned::status(status),
        };
        let mut response = refusal.response();
        for (name, said) in said.into_iter().flatten() {
            let name = HeaderName::from_bytes(name.as_bytes());
            if let (Ok(name), Some(value)) = (name, value(said))
                && !crate::forward_auth::is_own(&name)
            {
                response.headers_mut().insert(name, value);
            }
        }
        if reason.is_none() && status.is_redirection() {
            *response.body_mut() = Body::Empty;
        }
        Flow::Reply(response)
    }
}

fn find<'a>(said: &'a Map<String, Value>, name: &HeaderName) -> Option<&'a Value> {
    said.iter().find(|(key, _)| key.eq_ignore_ascii_case(name.as_str())).map(|(_, value)| value)
}

fn value(said: &Value) -> Option<HeaderValue> {
    match said {
        Value::String(text) => HeaderValue::from_bytes(text.as_bytes()).ok(),
        Value::Number(number) => HeaderValue::try_from(number.to_string()).ok(),
        Value::Bool(bool) => Some(HeaderValue::from_static(if *bool { "true" } else { "false" })),
        _ => None,
    }
}

impl AccessWaits for Opa {
    async fn access(&self, x: &mut Exchange) -> Flow {
        let question = match self.question(x).await {
            Ok(question) => question,
            Err(flow) => return flow,
        };
        let answer = match self.client.call(question).await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::warn!(host = %x.host, %error, "opa: no answer");
                return self.no_answer.flow();
            }
        };
        let answered: Option<Value> = serde_json::from_slice(answer.body()).ok();
        match answered.as_ref().and_then(|answer| answer.get("result")) {
            Some(verdict) => self.obey(x, verdict),
            None => {
                tracing::warn!(host = %x.host, status = answer.status().as_u16(), "opa: the answer has no `result`");
                self.no_verdict.flow()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::Response;
    use layers::consumer::Consumer;
    use layers::testing::{TestEnv, exchange, field, text};

    use super::*;
    use crate::support::peer::Peer;

    /// Answers by the path of the policy; `echo` refuses and says what it was asked.
    async fn agent() -> Peer {
        Peer::start(|request| {
            let asked: Value = serde_json::from_slice(request.body()).unwrap();
            let answer = match request.uri().path().strip_prefix("/v1/data/").unwrap() {
                "yes" => json!({"result": {"allow": true, "headers": {"X-User": "ann", "X-Age": 7}}}),
                "no" => json!({"result": {"allow": false}}),
                "go" => json!({"result": {"allow": false, "status_code": 302, "headers": {"Location": "/login"}}}),
                "why" => json!({"result": {"allow": false, "reason": {"code": 1}, "status_code": 401}}),
                "words" => json!({"result": {"allow": false, "reason": "not today"}}),
                "echo" => json!({"result": {"allow": false, "reason": asked}}),
                "odd" => json!({"result": {"allow": "true"}}),
                "bare" => json!({"result": true}),
                _ => json!({}),
            };
            Response::new(answer.to_string().into())
        })
        .await
    }

    async fn run(config: &Value, x: Exchange) -> Exchange {
        TestEnv::default().chain::<Opa, _>(config, |_| Ok(())).unwrap().run(x).await
    }

    #[tokio::test]
    async fn the_agent_decides() {
        let agent = agent().await;
        for (policy, status, body) in [
            ("yes", 200, ""),
            ("no", 403, "403 Forbidden"),
            ("go", 302, ""),
            ("why", 401, "{\"code\":1}"),
            ("words", 403, "not today"),
            ("odd", 403, ""),
            ("bare", 403, ""),
            ("missing", 503, ""),
        ] {
            let config = json!({"host": agent.url("/"), "policy": policy});
            let mut x = run(&config, exchange("GET", "http://a/").build()).await;
            assert_eq!(x.response.status(), status, "{policy}");
            let text = text(&mut x).await;
            assert!(text.contains(body), "{policy}: {text}");
            assert_eq!(field(&x, "location"), if policy == "go" { "/login" } else { "" });
        }
    }

    #[tokio::test]
    async fn the_agent_is_told_of_the_request_and_what_the_settings_add() {
        let agent = agent().await;
        let config = json!({"host": agent.url(""), "policy": "echo", "with_consumer": true, "with_body": true,
                            "with_route": true});
        let post = || {
            exchange("POST", "http://Shop.example/a%20b?x=1&x=2&y&z=%41").header("x-a", "1").header("x-a", "2")
        };
        let mut x = post().body("text").build();
        x.decoded_path = Some("/a b".into());
        x.consumer = Some(Arc::new(Consumer::new("ann")));
        let mut x = run(&config, x).await;
        let asked: Value = serde_json::from_str(&text(&mut x).await).unwrap();
        let input = &asked["input"];
        assert_eq!(
            input["request"],
            json!({"scheme": "http", "method": "POST", "host": "shop.example", "port": 9080, "path": "/a b",
                   "headers": {"host": "Shop.example", "x-a": ["1", "2"]}, "body": "text",
                   "query": {"x": ["1", "2"], "y": true, "z": "A"}})
        );
        assert_eq!((&input["type"], &input["consumer"]["username"]), (&json!("http"), &json!("ann")));
        assert_eq!(
            (&input["var"]["remote_addr"], &input["var"]["server_port"]),
            (&json!("127.0.0.1"), &json!("9080"))
        );
        assert!(input["var"]["timestamp"].as_u64().is_some_and(|time| time > 1_700_000_000));
        // Large ones go the same way, and the upstream still gets them.
        let mut x = run(&config, post().body("x".repeat(LARGE + 1)).build()).await;
        let asked: Value = serde_json::from_str(&text(&mut x).await).unwrap();
        assert_eq!(asked["input"]["request"]["body"].as_str().map(str::len), Some(LARGE + 1));
        assert_eq!(x.request_body.collect_up_to(MAX_BODY).await.unwrap().len(), LARGE + 1);
        assert_eq!(run(&config, post().body("x".repeat(MAX_BODY + 1)).build()).await.response.status(), 413);
    }

    #[tokio::test]
    async fn the_upstream_gets_what_the_agent_says_and_not_what_the_client_says() {
        let agent = agent().await;
        let config = json!({"host": agent.url(""), "policy": "yes",
                            "send_headers_upstream": ["x-user", "X-Age", "X-Role"]});
        let request = exchange("GET", "http://a/").header("x-user", "mallory").header("x-role", "admin");
        let x = run(&config, request.build()).await;
        assert_eq!((&x.request.headers["x-user"], &x.request.headers["x-age"]), (&"ann".parse().unwrap(), &"7".parse().unwrap()));
        assert!(!x.request.headers.contains_key("x-role"));
    }

    #[tokio::test]
    async fn without_an_answer_the_request_is_refused() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("http://{}", silent.local_addr().unwrap());
        let x = run(&json!({"host": host, "policy": "p", "timeout": 50}), exchange("GET", "http://a/").build()).await;
        assert_eq!(x.response.status(), 403);
        let garbage = Peer::start(|_| Response::new("<html>".into())).await;
        let x = run(&json!({"host": garbage.url(""), "policy": "p"}), exchange("GET", "http://a/").build()).await;
        assert_eq!(x.response.status(), 503);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (config, place) in [
            (json!({"policy": "p"}), ""),
            (json!({"host": "http://a"}), ""),
            (json!({"host": "a", "policy": "p"}), "/host"),
            (json!({"host": "http://a", "policy": "a b"}), "/policy"),
            (json!({"host": "http://a", "policy": "p", "timeout": 60_001}), "/timeout"),
            (json!({"host": "http://a", "policy": "p", "keepalive_pool": 0}), "/keepalive_pool"),
            (json!({"host": "http://a", "policy": "p", "send_headers_upstream": ["a b"]}), "/send_headers_upstream/0"),
        ] {
            let errors = TestEnv::default().build::<Opa>(&config).unwrap_err();
            assert!(errors.iter().any(|error| error.pointer == place), "{config}: {errors:?}");
        }
    }
}
