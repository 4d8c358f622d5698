//! `batch-requests`: several requests in one, answered together.
//!
//! No phase: `POST /apisix/batch-requests`, where `public-api` exposes it. The requests go one after another through
//! the gateway's own stack in this process, as the same client: address, certificate and forwarding fields are those of
//! the batch, whatever its parts say. Parts, bytes and time are bounded; a batch has no batches in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use config::error::ConfigError;
use config::fields::Int;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use layers::body::{Body, TooLarge};
use layers::endpoint::{Endpoint, Offers};
use layers::exchange::{Exchange, State};
use layers::http::forwarded::is_ours;
use layers::plugin::{BuildEnv, Definition, Extras, Hooks};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::support::reply::Canned;

/// Settings: none, limits are in the metadata.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The largest batch, in bytes.
    #[serde(default)]
    max_body_size: Int<1, { u32::MAX }, 1_048_576>,
    /// The most requests in one. Not of APISIX.
    #[serde(default)]
    max_requests: Int<1, 1000, 100>,
    /// The most bytes of all answers' bodies together. Not of APISIX.
    #[serde(default)]
    max_response_size: Int<1, { u32::MAX }, 16_777_216>,
}

/// The plugin.
pub struct BatchRequests;

impl Definition for BatchRequests {
    const NAME: &'static str = "batch-requests";
    const PRIORITY: i32 = 4010;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::Placement::Edge("it answers under paths of the gateway, and a sidecar has none");
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn build(_: Config, _: &BuildEnv<'_>, _: &mut Hooks) -> Result<(), ConfigError> {
        Ok(())
    }

    fn offer(env: &BuildEnv<'_>, offers: &mut Offers) -> Result<(), ConfigError> {
        let limits = env.metadata.and_then(|value| Metadata::deserialize(value).ok()).unwrap_or_default();
        let batches = Batches { limits, control: env.control.clone() };
        offers.serve(Method::POST, "/apisix/batch-requests", &Arc::new(batches));
        Ok(())
    }
}

struct Batches {
    limits: Metadata,
    control: Handle,
}

/// What a client sends.
#[derive(Debug, Deserialize, JsonSchema)]
struct Batch {
    /// For every request that does not have them itself.
    #[serde(default)]
    query: Map<String, Value>,
    /// For every request that does not have them itself.
    #[serde(default)]
    headers: BTreeMap<String, Value>,
    /// Milliseconds for all.
    #[serde(default = "timeout_ms")]
    timeout: u64,
    pipeline: Vec<Part>,
}

fn timeout_ms() -> u64 {
    30_000
}

/// One request of a batch.
#[derive(Debug, Deserialize, JsonSchema)]
struct Part {
    #[serde(default = "version")]
    version: f64,
    #[serde(default)]
    method: AskedMethod,
    path: String,
    #[serde(default)]
    query: Map<String, Value>,
    #[serde(default)]
    headers: BTreeMap<String, Value>,
    #[serde(default)]
    body: String,
    /// There is no connection whose certificate could be verified.
    #[serde(default, rename = "ssl_verify")]
    _ssl_verify: bool,
}

fn version() -> f64 {
    1.1
}

#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
enum AskedMethod {
    #[default]
    Get,
    Post,
    Put,
    Delete,
    Patch,
    Head,
    Options,
    Connect,
    Trace,
}

impl From<AskedMethod> for Method {
    fn from(method: AskedMethod) -> Self {
        match method {
            AskedMethod::Get => Self::GET,
            AskedMethod::Post => Self::POST,
            AskedMethod::Put => Self::PUT,
            AskedMethod::Delete => Self::DELETE,
            AskedMethod::Patch => Self::PATCH,
            AskedMethod::Head => Self::HEAD,
            AskedMethod::Options => Self::OPTIONS,
            AskedMethod::Connect => Self::CONNECT,
            AskedMethod::Trace => Self::TRACE,
        }
    }
}

/// How long the batch itself may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(60);
/// The longest time for all requests of a batch.
const LONGEST: Duration = Duration::from_secs(300);
/// Larger batches are not parsed on a worker, nor are such answers written there.
const LARGE: usize = 32 << 10;

impl Endpoint for Batches {
    async fn answer(&self, x: &mut Exchange) -> Response<Body> {
        let batch = match self.batch(x).await {
            Ok(batch) => batch,
            Err(refusal) => return refusal,
        };
        let Some(stack) = x.conn.stack.0.clone() else {
            return refused(StatusCode::INTERNAL_SERVER_ERROR, "requests cannot be sent here");
        };
        let deadline = Instant::now() + Duration::from_millis(batch.timeout).min(LONGEST);
        let common = Common { headers: readable(batch.headers), query: batch.query };
        let mut left = self.limits.max_response_size.get() as usize;
        let mut answers = Vec::with_capacity(batch.pipeline.len());
        for part in batch.pipeline {
            let answer = match exchange(x, part, &common) {
                Err(status) => alone(status),
                Ok(part) => {
                    let sent = async { collected(stack.send(part).await, &mut left).await };
                    timeout_at(deadline, sent).await.unwrap_or_else(|_| late())
                }
            };
            answers.push(answer);
        }
        let spent = self.limits.max_response_size.get() as usize - left;
        let answers = Value::Array(answers);
        if spent < LARGE {
            return Canned::json(StatusCode::OK, &answers).response();
        }
        let written = self.control.spawn_blocking(move || Canned::json(StatusCode::OK, &answers));
        match written.await {
            Ok(answer) => answer.response(),
            Err(_) => refused(StatusCode::INTERNAL_SERVER_ERROR, "the answers cannot be written"),
        }
    }
}

impl Batches {
    /// The batch of a request.
    ///
    /// # Errors
    /// What is answered instead.
    async fn batch(&self, x: &mut Exchange) -> Result<Batch, Response<Body>> {
        let bad = |message: &str| refused(StatusCode::BAD_REQUEST, message);
        if x.nested {
            return Err(bad("a batch cannot be part of a batch"));
        }
        let limit = self.limits.max_body_size.get() as usize;
        let body = match timeout(ARRIVAL, x.request_body.collect_up_to(limit)).await {
            Ok(Ok(body)) => body,
            Ok(Err(error)) if error.is::<TooLarge>() => {
                let message = format!("the request is larger than the {limit} bytes that are allowed");
                return Err(refused(StatusCode::PAYLOAD_TOO_LARGE, &message));
            }
            Ok(Err(_)) | Err(_) => return Err(bad("the request body did not arrive")),
        };
        if body.is_empty() {
            return Err(bad("no request body, you should give at least one pipeline setting"));
        }
        let batch = if body.len() < LARGE {
            parse(&body)
        } else {
            let parsed = self.control.spawn_blocking(move || parse(&body)).await;
            parsed.unwrap_or_else(|_| Err("invalid request body".to_owned()))
        };
        let batch = batch.map_err(|message| bad(&message))?;
        let most = self.limits.max_requests.get() as usize;
        match batch.pipeline.len() {
            0 => Err(bad("bad request body: property \"pipeline\" validation failed: expect array to have at least 1 items")),
            many if many > most => Err(bad(&format!("bad request body: `pipeline` has {many} requests, {most} are allowed"))),
            _ => Ok(batch),
        }
    }
}

fn parse(body: &Bytes) -> Result<Batch, String> {
    let value: Value =
        serde_json::from_slice(body).map_err(|error| format!("invalid request body, err: {error}"))?;
    let batch = config::typed::parse::<Batch>(&value).map_err(|errors| {
        let told: Vec<_> = errors.iter().map(ToString::to_string).collect();
        format!("bad request body: {}", told.join("; "))
    })?;
    for (index, part) in batch.pipeline.iter().enumerate() {
        if part.path.is_empty() {
            return Err(format!("bad request body: /pipeline/{index}/path: it is empty"));
        }
        if part.version != 1.0 && part.version != 1.1 {
            return Err(format!("bad request body: /pipeline/{index}/version: write 1.0 or 1.1"));
        }
    }
    Ok(batch)
}

fn refused(status: StatusCode, message: &str) -> Response<Body> {
    Canned::json(status, &json!({ "error_msg": message })).response()
}

/// What all requests of a batch share.
struct Common {
    headers: Vec<(HeaderName, HeaderValue)>,
    query: Map<String, Value>,
}

/// Fields that can be sent. What says who the client is, or how the message is framed, is not for parts to say.
fn readable(fields: BTreeMap<String, Value>) -> Vec<(HeaderName, HeaderValue)> {
    let field = |(name, value): (String, Value)| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok().filter(|name| !is_ours(name.as_str()))?;
        if is_of_connection(&name) || name == header::CONTENT_LENGTH {
            return None;
        }
        Some((name, HeaderValue::from_bytes(plain(&value)?.as_bytes()).ok()?))
    };
    fields.into_iter().filter_map(field).collect()
}

fn is_of_connection(name: &HeaderName) -> bool {
    matches!(
        *name,
        header::CONNECTION
            | header::UPGRADE
            | header::TE
            | header::TRAILER
            | header::TRANSFER_ENCODING
            | header::EXPECT
            | header::PROXY_AUTHORIZATION
    ) || matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings")
}

/// Text and numbers as they are written in a field or query.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

/// The exchange of one part.
///
/// # Errors
/// The status of a part that cannot be a request.
fn exchange(whole: &State, part: Part, common: &Common) -> Result<Exchange, StatusCode> {
    let mut headers = HeaderMap::new();
    for (name, value) in readable(part.headers) {
        headers.insert(name, value);
    }
    for (name, value) in &common.headers {
        headers.entry(name).or_insert_with(|| value.clone());
    }
    let own: Vec<HeaderName> = headers.keys().cloned().collect();
    for (name, value) in &whole.request.headers {
        if is_inherited(name) && !own.contains(name) {
            headers.append(name, value.clone());
        }
    }
    let target = target(&part.path, part.query, &common.query).ok_or(StatusCode::BAD_REQUEST)?;
    let request = Request::builder()
        .method(Method::from(part.method))
        .uri(target)
        .version(if part.version < 1.1 { Version::HTTP_10 } else { Version::HTTP_11 })
        .body(Body::from(part.body))
        .map_err(|_| StatusCode::BAD_REQUEST)?;
    let mut x = Exchange::new(request, whole.conn.clone());
    x.request.headers = headers;
    x.remote_addr = whole.remote_addr;
    x.remote_port = whole.remote_port;
    x.nested = true;
    Ok(x)
}

/// Whether a part has this field of the batch: not what belongs to the message or its connection, and of what the
/// gateway has said of the client only where it is, not who it was found to be on the batch's route.
fn is_inherited(name: &HeaderName) -> bool {
    let text = name.as_str();
    let of_client = is_ours(text)
        && (text == "x-forwarded-client-cert" || !(text.starts_with("x-forwarded-") || text == "x-real-ip"));
    !text.starts_with("content-") && !is_of_connection(name) && !of_client
}

/// What is written raw in an argument.
const ARGUMENT: &AsciiSet = &CONTROLS
    .add(b' ').add(b'"').add(b'#').add(b'%').add(b'&').add(b'+').add(b'<').add(b'=').add(b'>').add(b'?').add(b'`');

fn target(path: &str, own: Map<String, Value>, common: &Map<String, Value>) -> Option<String> {
    if !path.starts_with('/') {
        return None;
    }
    let mut target = path.split('#').next()?.to_owned();
    let shared = common.iter().filter(|(name, _)| !own.contains_key(*name));
    for (name, value) in own.iter().chain(shared) {
        let values = match value {
            Value::Array(values) => values.iter().filter_map(plain).collect(),
            value => plain(value).into_iter().collect::<Vec<_>>(),
        };
        for value in values {
            let sign = if target.contains('?') { '&' } else { '?' };
            let (name, value) = (utf8_percent_encode(name, ARGUMENT), utf8_percent_encode(&value, ARGUMENT));
            // Writing to a String cannot fail.
            let _ = write!(target, "{sign}{name}={value}");
        }
    }
    Some(target)
}

/// A part that was not sent.
fn alone(status: StatusCode) -> Value {
    json!({"status": status.as_u16(), "reason": status.canonical_reason().unwrap_or_default()})
}

fn late() -> Value {
    json!({"status": 504, "reason": "upstream timeout"})
}

/// The answer of a part, its body taken from what is left of the bytes for all.
async fn collected(x: Exchange, left: &mut usize) -> Value {
    let is_head = x.request.method == Method::HEAD;
    let (head, body) = x.into_response().into_parts();
    let mut body = Body::boxed(body);
    let body = match body.collect_up_to(*left).await {
        Ok(body) => body,
        Err(error) if error.is::<TooLarge>() => {
            return json!({"status": 502, "reason": "the answers are too large"});
        }
        Err(_) => return json!({"status": 502, "reason": "the answer broke off"}),
    };
    *left -= body.len().min(*left);
    let mut answer = alone(head.status);
    let Some(fields) = answer.as_object_mut() else { return answer };
    fields.insert("headers".into(), written(&head.headers));
    if !is_head && !body.is_empty() {
        fields.insert("body".into(), String::from_utf8_lossy(&body).into());
    }
    answer
}

/// Fields by their names as HTTP/1 servers write them; several of a name as a list.
fn written(headers: &HeaderMap) -> Value {
    let mut fields = Map::new();
    for name in headers.keys() {
        let mut values: Vec<Value> =
            headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into()).collect();
        let value = if values.len() == 1 { values.remove(0) } else { Value::Array(values) };
        fields.insert(title_case(name.as_str()), value);
    }
    Value::Object(fields)
}

fn title_case(name: &str) -> String {
    let mut first = true;
    name.chars()
        .map(|c| {
            let written = if first { c.to_ascii_uppercase() } else { c };
            first = c == '-';
            written
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use layers::local::LocalBox;
    use layers::stack::Requests;
    use layers::testing::{ExchangeBuilder, TestEnv, exchange as start};

    use super::*;

    /// Tells in its answer what it was asked; `/slow` never answers, `/big` answers much.
    struct Echo;

    impl Requests for Echo {
        fn send(&self, mut x: Exchange) -> LocalBox<'static, Exchange> {
            Box::pin(async move {
                let path = x.request.uri.path().to_owned();
                if path == "/slow" {
                    std::future::pending::<()>().await;
                }
                let body = x.request_body.collect_up_to(100).await.unwrap();
                let fields: Vec<String> = x
                    .request
                    .headers
                    .iter()
                    .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
                    .collect();
                let told = match path.as_str() {
                    "/big" => "x".repeat(60),
                    _ => format!(
                        "{} {} {:?} [{}] {:?} {} nested={}",
                        x.request.method, x.request.uri, x.request.version, fields.join(", "), body, x.remote_addr, x.nested
                    ),
                };
                x.response = Response::new(Body::from(told));
                x.response.headers_mut().insert("x-own-field", HeaderValue::from_static("1"));
                x.response.headers_mut().append("set-cookie", HeaderValue::from_static("a"));
                x.response.headers_mut().append("set-cookie", HeaderValue::from_static("b"));
                x
            })
        }
    }

    async fn send(env: &TestEnv, x: ExchangeBuilder) -> (u16, Value) {
        env.offer::<BatchRequests>().unwrap();
        let endpoint = env.endpoints.find(&Method::POST, "/apisix/batch-requests").unwrap();
        let mut x = x.stack(Rc::new(Echo)).build();
        x.remote_addr = "9.9.9.9".parse().unwrap();
        let mut response = endpoint.answer(&mut x).await;
        let body = response.body_mut().collect_up_to(1 << 20).await.unwrap();
        (response.status().as_u16(), serde_json::from_slice(&body).unwrap())
    }

    fn batch(batch: &Value) -> ExchangeBuilder {
        start("POST", "http://a/apisix/batch-requests").body(batch.to_string())
    }

    #[tokio::test]
    async fn every_request_is_answered_in_its_place() {
        let asked = json!({
            "query": {"base": "a b", "own": "no"},
            "headers": {"X-Base": "1", "X-Own": "no", "X-Real-IP": "6.6.6.6", "Connection": "x"},
            "pipeline": [
                {"path": "/a", "headers": {"X-OWN": 2, "X_Forwarded_For": "6.6.6.6", "content-length": "9"}, "query": {"own": [1, "2&3"]}},
                {"path": "/b?x=1", "method": "POST", "body": "text", "version": 1.0},
                {"path": "b"},
            ],
        });
        let x = batch(&asked)
            .header("x-outer", "o")
            .header("x-own", "outer")
            .header("content-type", "application/json")
            .header("x-forwarded-for", "9.9.9.9")
            .header("x-consumer-username", "jack");
        let (status, answers) = send(&TestEnv::default(), x).await;
        assert_eq!(status, 200);
        let told = |n: usize| answers[n]["body"].as_str().unwrap();
        assert_eq!(
            told(0),
            "GET /a?own=1&own=2%263&base=a%20b HTTP/1.1 [x-own: 2, x-base: 1, x-outer: o, x-forwarded-for: 9.9.9.9] b\"\" 9.9.9.9 nested=true"
        );
        assert_eq!(
            told(1),
            "POST /b?x=1&base=a%20b&own=no HTTP/1.0 [x-base: 1, x-own: no, x-outer: o, x-forwarded-for: 9.9.9.9] b\"text\" 9.9.9.9 nested=true"
        );
        assert_eq!(answers[2], json!({"status": 400, "reason": "Bad Request"}));
        assert_eq!((&answers[0]["status"], &answers[0]["reason"]), (&json!(200), &json!("OK")));
        assert_eq!(answers[0]["headers"], json!({"X-Own-Field": "1", "Set-Cookie": ["a", "b"]}));
    }

    #[tokio::test(start_paused = true)]
    async fn time_and_bytes_are_bounded_for_all_together() {
        let asked = json!({"timeout": 500, "pipeline": [{"path": "/a"}, {"path": "/slow"}, {"path": "/slow"}]});
        let (status, answers) = send(&TestEnv::default(), batch(&asked)).await;
        let statuses: Vec<_> = answers.as_array().unwrap().iter().map(|answer| answer["status"].clone()).collect();
        assert_eq!((status, statuses), (200, vec![json!(200), json!(504), json!(504)]));
        assert_eq!(answers[1]["reason"], "upstream timeout");

        let env = TestEnv { metadata: Some(json!({"max_response_size": 100})), ..TestEnv::default() };
        let asked = json!({"pipeline": [{"path": "/big"}, {"path": "/big"}, {"path": "/big"}]});
        let (_, answers) = send(&env, batch(&asked)).await;
        let statuses: Vec<_> = answers.as_array().unwrap().iter().map(|answer| answer["status"].clone()).collect();
        assert_eq!(statuses, [200, 502, 502]);
    }

    #[tokio::test]
    async fn what_is_no_batch_is_refused() {
        let limits = json!({"max_body_size": 200, "max_requests": 2});
        let cases = [
            (String::new(), 400, "no request body, you should give at least one pipeline setting"),
            ("{".into(), 400, "invalid request body"),
            ("[]".into(), 400, "bad request body"),
            (json!({"x": 1}).to_string(), 400, "pipeline"),
            (json!({"pipeline": []}).to_string(), 400, "expect array to have at least 1 items"),
            (json!({"pipeline": [{}]}).to_string(), 400, "path"),
            (json!({"pipeline": [{"path": ""}]}).to_string(), 400, "/pipeline/0/path"),
            (json!({"pipeline": [{"path": "/", "method": "get"}]}).to_string(), 400, "/pipeline/0/method"),
            (json!({"pipeline": [{"path": "/", "version": 2}]}).to_string(), 400, "/pipeline/0/version"),
            (json!({"pipeline": [{"path": "/"}, {"path": "/"}, {"path": "/"}]}).to_string(), 400, "3 requests, 2 are allowed"),
            ("x".repeat(201), 413, "200 bytes"),
        ];
        for (body, status, words) in cases {
            let env = TestEnv { metadata: Some(limits.clone()), ..TestEnv::default() };
            let x = start("POST", "http://a/apisix/batch-requests").body(body.clone());
            let (got, answer) = send(&env, x).await;
            let message = answer["error_msg"].as_str().unwrap_or_default();
            assert!(got == status && message.contains(words), "{body}: {got} {message}");
        }
    }

    #[tokio::test]
    async fn a_batch_is_no_part_of_a_batch() {
        let env = TestEnv::default();
        env.offer::<BatchRequests>().unwrap();
        let endpoint = env.endpoints.find(&Method::POST, "/apisix/batch-requests").unwrap();
        let mut x = batch(&json!({"pipeline": [{"path": "/"}]})).build();
        x.nested = true;
        assert_eq!(endpoint.answer(&mut x).await.status(), 400);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        assert!(TestEnv::default().build::<BatchRequests>(&json!({})).is_ok());
        assert!(TestEnv::default().build::<BatchRequests>(&json!({"max_body_size": 1})).is_err());
        let mut extras = Extras::default();
        BatchRequests::extend(&mut extras);
        for (metadata, pointer) in [
            (json!({"max_body_size": 0}), "/max_body_size"),
            (json!({"max_requests": 1001}), "/max_requests"),
            (json!({"max": 1}), "/max"),
        ] {
            let errors = extras.check_metadata(&metadata).unwrap().unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{metadata}");
        }
    }
}
