//! `grpc-transcode`: lets HTTP clients call gRPC services with JSON.
//!
//! Phase `access` makes a gRPC message of path, query and body; around the upstream its answer becomes JSON, and the
//! status of the call an HTTP status. Definitions are compiled when the plugin is built, with their imports. Messages
//! have 4 MiB at most; a stream of answers is sent on message by message, as a JSON array, as lines or as events.

mod definition;
mod streamed;

use std::borrow::Cow;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use bytes::Bytes;
use config::ConfigError;
use config::fields::Int;
use config::id::Id;
use config::var::{Var, Vars};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use layers::body::{Body, BodyError, TooLarge};
use layers::error::{Error, Fault, Reason};
use layers::exchange::{Answered, Exchange, State};
use layers::plugin::{AccessWaits, Around, BuildEnv, Definition, Flow, Hooks, Next};
use prost::Message;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, SerializeOptions,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::support::encoding;
use crate::support::grpc::{self, Broken, LARGEST, Messages};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The proto resource that defines the service.
    proto_id: Id,
    /// The full name of the service.
    service: String,
    /// The name of the method. One that takes a stream of requests cannot be called.
    method: String,
    /// Milliseconds that the service has for the call; 0 for as long as it wants.
    #[serde(default = "no_deadline")]
    deadline: serde_json::Number,
    /// How messages are written as JSON.
    #[serde(default = "pb_options")]
    #[schemars(length(min = 1))]
    pb_option: Vec<PbOption>,
    /// Write the details of a failed call (`grpc-status-details-bin`) into the body.
    #[serde(default)]
    show_status_in_body: bool,
    /// The type of the messages in these details. Without it they stay encoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status_detail_type: Option<String>,
    /// Taken and not used: an answer is not cut off, and a message has 4 MiB at most.
    #[serde(default)]
    max_resp_body_size: Int<1, { u32::MAX }, 67_108_864>,
}

fn no_deadline() -> serde_json::Number {
    serde_json::Number::from(0)
}

fn pb_options() -> Vec<PbOption> {
    vec![PbOption::EnumAsName, PbOption::Int64AsNumber, PbOption::AutoDefaultValues, PbOption::DisableHooks]
}

/// How messages are written as JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PbOption {
    /// 64-bit numbers as numbers.
    Int64AsNumber,
    /// 64-bit numbers as text.
    Int64AsString,
    /// Not offered: an error.
    Int64AsHexstring,
    /// Enums by name.
    EnumAsName,
    /// Enums by number.
    EnumAsValue,
    /// Fields that are not set have their defaults, in proto3.
    AutoDefaultValues,
    /// Fields that are not set are left out.
    NoDefaultValues,
    /// Fields that are not set have their defaults.
    UseDefaultValues,
    /// Fields that are not set are left out.
    UseDefaultMetatable,
    /// Changes nothing.
    EnableHooks,
    /// Changes nothing.
    DisableHooks,
}

/// The plugin.
pub struct GrpcTranscode {
    input: MessageDescriptor,
    output: MessageDescriptor,
    streams: bool,
    path: PathAndQuery,
    timeout: Option<HeaderValue>,
    options: SerializeOptions,
    show_status: bool,
    detail: Option<MessageDescriptor>,
    /// Keeps the compiled definitions for other objects that use the same.
    _pool: Arc<Result<DescriptorPool, String>>,
}

impl Definition for GrpcTranscode {
    const NAME: &'static str = "grpc-transcode";
    const PRIORITY: i32 = 506;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::Placement::Edge("definitions (`protos`) are resources of the edge");
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if config.pb_option.is_empty() {
            errors.push(ConfigError::invalid("/pb_option", "the list is empty: write at least one option"));
        }
        for (index, option) in config.pb_option.iter().enumerate() {
            if *option == PbOption::Int64AsHexstring {
                let problem = "`int64_as_hexstring` is not offered: write `int64_as_string`";
                errors.push(ConfigError::invalid(format!("/pb_option/{index}"), problem));
            }
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let shared = definition::compile(&config.proto_id.to_string(), env)?;
        let pool = match &*shared {
            Ok(pool) => pool,
            Err(problem) => {
                return Err(ConfigError::invalid(
                    "/proto_id",
                    format!("protos/{} cannot be compiled: {problem}", config.proto_id),
                ));
            }
        };
        let Some(service) = pool.get_service_by_name(&config.service) else {
            let names: Vec<_> = pool.services().map(|service| format!("`{}`", service.full_name())).collect();
            let problem =
                format!("there is no service `{}` in the definition, which has {}", config.service, names.join(", "));
            return Err(ConfigError::invalid("/service", problem));
        };
        let Some(method) = service.methods().find(|method| method.name() == config.method) else {
            let names: Vec<_> = service.methods().map(|method| format!("`{}`", method.name())).collect();
            let problem =
                format!("`{}` has no method `{}`: it has {}", config.service, config.method, names.join(", "));
            return Err(ConfigError::invalid("/method", problem));
        };
        if method.is_client_streaming() {
            let problem = "the method takes a stream of requests, and an HTTP request is one message";
            return Err(ConfigError::invalid("/method", problem));
        }
        let detail = match &config.status_detail_type {
            Some(name) => Some(pool.get_message_by_name(name).ok_or_else(|| {
                ConfigError::invalid("/status_detail_type", format!("there is no message `{name}` in the definition"))
            })?),
            None => None,
        };
        let deadline = config.deadline.as_f64().filter(|deadline| *deadline > 0.0 && *deadline < 99_999_999.0);
        let path = format!("/{}/{}", config.service, config.method);
        let plugin = Arc::new(Self {
            input: method.input(),
            output: method.output(),
            streams: method.is_server_streaming(),
            path: path.parse().map_err(|_| ConfigError::invalid("/method", "no path can have that name"))?,
            timeout: deadline.and_then(|ms| HeaderValue::try_from(format!("{}m", ms.ceil())).ok()),
            options: options(&config.pb_option),
            show_status: config.show_status_in_body,
            detail,
            _pool: shared,
        });
        hooks.access_waits(&plugin);
        hooks.around(&plugin);
        Ok(())
    }
}

fn options(chosen: &[PbOption]) -> SerializeOptions {
    let has = |option| chosen.contains(&option);
    SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(has(PbOption::Int64AsString))
        .use_enum_numbers(has(PbOption::EnumAsValue))
        .skip_default_fields(has(PbOption::NoDefaultValues) || has(PbOption::UseDefaultMetatable))
}

/// The request became a call.
struct Called;

/// Messages from this size on are translated outside the worker, in bytes.
const HEAVY: usize = 16 << 10;

/// Does work of a size here or elsewhere.
async fn offload<T: Send + 'static>(size: usize, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    if size < HEAVY { Some(work()) } else { tokio::task::spawn_blocking(work).await.ok() }
}

impl AccessWaits for GrpcTranscode {
    async fn access(&self, x: &mut Exchange) -> Flow {
        let body = match x.request_body.collect_up_to(LARGEST).await {
            Ok(body) => body,
            Err(error) if error.is::<TooLarge>() => {
                return Flow::message(StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than 4 MiB");
            }
            Err(error) => {
                tracing::debug!(%error, "the body of a request cannot be read");
                return Flow::message(StatusCode::BAD_REQUEST, "the body cannot be read");
            }
        };
        let input = self.input.clone();
        let source = Source::of(x, body);
        let params = path_params(x, &input);
        let size = source.size();
        let encoded = offload(size, move || encode(&input, source, params)).await;
        let message = match encoded {
            Some(Ok(message)) if message.len() <= LARGEST => message,
            Some(Ok(_)) => return Flow::message(StatusCode::PAYLOAD_TOO_LARGE, "the message is larger than 4 MiB"),
            Some(Err(problem)) => return Flow::message(StatusCode::BAD_REQUEST, &problem),
            None => return Flow::status(StatusCode::INTERNAL_SERVER_ERROR),
        };
        x.request_body = Body::from(grpc::frame(0, &message));
        x.forward.method = Some(Method::POST);
        x.forward.uri = Some(self.path.clone());
        encoding::ask_plainly(x);
        let headers = &mut x.request.headers;
        for name in [header::CONTENT_LENGTH, header::CONTENT_ENCODING] {
            headers.remove(name);
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.remove("grpc-timeout");
        if let Some(timeout) = &self.timeout {
            headers.insert("grpc-timeout", timeout.clone());
        }
        x.put_slot(Called);
        Flow::Next
    }
}

/// Where the fields of the message stand.
enum Source {
    Json(Bytes),
    /// `a=1&b.c=2`
    Pairs(Box<[u8]>),
}

impl Source {
    /// As APISIX chooses: a JSON body, a form in the body of a `POST`, else the query.
    fn of(x: &State, body: Bytes) -> Self {
        let kind = x.request.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        let json = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        let json = json.eq_ignore_ascii_case(b"application/json") || json.ends_with(b"+json");
        match x.request.method {
            Method::POST | Method::PUT | Method::PATCH if json && !body.is_empty() => Self::Json(body),
            Method::POST if !body.is_empty() => Self::Pairs(body.to_vec().into()),
            _ => Self::Pairs(x.request.uri.query().unwrap_or_default().as_bytes().into()),
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Json(body) => body.len(),
            Self::Pairs(pairs) => pairs.len(),
        }
    }
}

/// The parameters of the route's path that are fields of the message.
fn path_params(x: &State, input: &MessageDescriptor) -> Vec<(String, String)> {
    input
        .fields()
        .filter(|field| !matches!(field.kind(), Kind::Message(_)) && !field.is_list())
        .filter_map(|field| {
            let value = x.get(&Var::UriParam(field.name().into()))?;
            Some((field.name().to_owned(), value.into_owned()))
        })
        .collect()
}

/// The message of a request.
fn encode(input: &MessageDescriptor, source: Source, params: Vec<(String, String)>) -> Result<Vec<u8>, String> {
    let mut value = match source {
        Source::Json(body) => {
            serde_json::from_slice(&body).map_err(|error| format!("the body is not JSON: {error}"))?
        }
        Source::Pairs(pairs) => {
            let mut object = Map::new();
            for pair in pairs.split(|byte| *byte == b'&').filter(|pair| !pair.is_empty()) {
                let mut parts = pair.splitn(2, |byte| *byte == b'=');
                let (name, text) = (decoded(parts.next()), decoded(parts.next()));
                put(input, &mut object, &name, &text, 0);
            }
            Value::Object(object)
        }
    };
    let Value::Object(object) = &mut value else {
        return Err(format!("the request is not a message `{}`: write an object", input.full_name()));
    };
    for (name, text) in &params {
        object.remove(name);
        put(input, object, name, text, 0);
    }
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    DynamicMessage::deserialize_with_options(input.clone(), value, &options)
        .map(|message| message.encode_to_vec())
        .map_err(|error| format!("the request is not a message `{}`: {error}", input.full_name()))
}

fn decoded(text: Option<&[u8]>) -> String {
    let text = text.unwrap_or_default();
    let text: Cow<'_, [u8]> =
        if text.contains(&b'+') { text.iter().map(|b| if *b == b'+' { b' ' } else { *b }).collect() } else { text.into() };
    percent_encoding::percent_decode(&text).decode_utf8_lossy().into_owned()
}

/// Arguments nested deeper name no field.
const DEPTH: usize = 16;

/// Puts an argument where its name says; one that names no field is left out.
fn put(message: &MessageDescriptor, object: &mut Map<String, Value>, name: &str, text: &str, depth: usize) {
    let (first, rest) = match name.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (name, None),
    };
    let Some(field) = message.get_field_by_name(first).or_else(|| message.get_field_by_json_name(first)) else {
        return;
    };
    let key = field.name().to_owned();
    match (field.kind(), rest) {
        (Kind::Message(inner), Some(rest)) if !field.is_list() && !field.is_map() && depth < DEPTH => {
            if let Value::Object(object) = object.entry(key).or_insert_with(|| Value::Object(Map::new())) {
                put(&inner, object, rest, text, depth + 1);
            }
        }
        (_, Some(_)) => {}
        (_, None) if field.is_list() => {
            if let Value::Array(list) = object.entry(key).or_insert_with(|| Value::Array(Vec::new())) {
                list.push(scalar(&field, text));
            }
        }
        // The first counts, as for variables.
        (_, None) => {
            object.entry(key).or_insert_with(|| scalar(&field, text));
        }
    }
}

/// The JSON value of an argument. Numbers may stay text: the mapping of protobuf takes them so.
fn scalar(field: &FieldDescriptor, text: &str) -> Value {
    match field.kind() {
        Kind::Bool => match text {
            "true" | "1" => Value::Bool(true),
            "false" | "0" | "" => Value::Bool(false),
            _ => text.into(),
        },
        Kind::Enum(_) => text.parse::<i32>().map_or_else(|_| text.into(), Value::from),
        // A map, a list or a message may be written as JSON.
        Kind::Message(_) => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
        _ => text.into(),
    }
}

/// An answer cannot be translated.
#[derive(Debug, thiserror::Error)]
enum Untranslated {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("there is more than one message, or none")]
    NotOne,
    #[error("the upstream does not speak gRPC")]
    NotGrpc,
    #[error("a message is not `{0}`")]
    NotMessage(String),
    #[error("the upstream broke off: {0}")]
    Read(BodyError),
}

impl Around for GrpcTranscode {
    async fn around(&self, x: Exchange, next: Next) -> Result<Exchange, Fault> {
        let mut x = next.run(x).await?;
        if x.slot::<Called>().is_none() || x.answered != Answered::Upstream {
            return Ok(x);
        }
        match self.translate(&mut x).await {
            Ok(()) => Ok(x),
            Err(problem) => {
                *x.response.body_mut() = Body::Empty;
                let error = Error::new(Reason::UpstreamProtocol).detail(problem.to_string());
                Err(Fault { exchange: x, error })
            }
        }
    }
}

impl GrpcTranscode {
    async fn translate(&self, x: &mut Exchange) -> Result<(), Untranslated> {
        if !grpc::is_grpc(x.response.headers().get(header::CONTENT_TYPE)) {
            // A failure of something on the way says so by itself.
            return if x.response.status() == StatusCode::OK { Err(Untranslated::NotGrpc) } else { Ok(()) };
        }
        let mut body = std::mem::take(x.response.body_mut());
        let mut messages = Messages::default();
        let mut end = grpc::status(x.response.headers()).is_some().then(|| x.response.headers().clone());
        // Of a stream the first message, so that a call that fails at once is answered with its status.
        let mut first = None;
        let mut over = false;
        while !over {
            if let Some(message) = messages.read()? {
                if first.is_some() {
                    return Err(Untranslated::NotOne);
                }
                first = Some(message);
                if self.streams {
                    break;
                }
                continue;
            }
            match body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => messages.take(&piece),
                    Err(frame) => {
                        end = frame.into_trailers().ok().filter(|end| grpc::status(end).is_some()).or(end);
                        over = true;
                    }
                },
                Some(Err(error)) => return Err(Untranslated::Read(error)),
                None => over = true,
            }
        }
        if over && !messages.is_empty() {
            return Err(Untranslated::Broken(Broken::Cut));
        }
        if over {
            let end = end.unwrap_or_default();
            match grpc::status(&end) {
                Some(0) => {}
                status => return self.failed(x, status.unwrap_or(2), &end),
            }
            set_status(x.response.headers_mut(), &end);
        }
        let form = self.streams.then(|| streamed::Form::of(&x.request.headers));
        let headers = x.response.headers_mut();
        for name in [header::CONTENT_LENGTH, header::TRAILER] {
            headers.remove(name);
        }
        headers.remove("grpc-encoding");
        headers.remove("grpc-accept-encoding");
        let kind = form.map_or("application/json", streamed::Form::kind);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        match form {
            Some(form) => {
                let rest = (!over).then_some((body, messages));
                *x.response.body_mut() = streamed::body(form, self.output.clone(), self.options.clone(), first, rest);
            }
            None => {
                let message = first.ok_or(Untranslated::NotOne)?;
                let (output, options) = (self.output.clone(), self.options.clone());
                let json = offload(message.len(), move || decode(&output, &options, message)).await;
                let unread = || Untranslated::NotMessage(self.output.full_name().to_owned());
                *x.response.body_mut() = Bytes::from(json.flatten().ok_or_else(unread)?).into();
            }
        }
        Ok(())
    }

    /// The answer of a call that has failed.
    fn failed(&self, x: &mut Exchange, status: u32, end: &HeaderMap) -> Result<(), Untranslated> {
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = http_status(status);
        std::mem::swap(response.headers_mut(), x.response.headers_mut());
        let headers = response.headers_mut();
        set_status(headers, end);
        for name in [header::CONTENT_LENGTH, header::TRAILER] {
            headers.remove(name);
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.show_status
            && let Some(details) = self.details(end)
        {
            *response.body_mut() = json!({"error": details}).to_string().into();
        }
        x.response = response;
        Ok(())
    }

    /// What `grpc-status-details-bin` holds.
    fn details(&self, end: &HeaderMap) -> Option<Value> {
        let text = end.get("grpc-status-details-bin")?.as_bytes();
        let text = text.strip_suffix(b"==").or(text.strip_suffix(b"=")).unwrap_or(text);
        let status = Status::decode(&*STANDARD_NO_PAD.decode(text).ok()?).ok()?;
        let details: Vec<Value> = status.details.iter().map(|any| self.detail(any)).collect();
        let mut shown = json!({"code": status.code, "message": status.message});
        if let (false, Some(shown)) = (details.is_empty(), shown.as_object_mut()) {
            shown.insert("details".into(), details.into());
        }
        Some(shown)
    }

    fn detail(&self, any: &Any) -> Value {
        let known = self.detail.as_ref().and_then(|kind| {
            let message = DynamicMessage::decode(kind.clone(), &*any.value).ok()?;
            message.serialize_with_options(serde_json::value::Serializer, &self.options).ok()
        });
        known.unwrap_or_else(|| json!({"type_url": any.type_url, "value": STANDARD.encode(&any.value)}))
    }
}

/// `google.rpc.Status`, of which the details of a failure are made.
#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// A message as JSON.
fn decode(kind: &MessageDescriptor, options: &SerializeOptions, message: Bytes) -> Option<Vec<u8>> {
    let message = DynamicMessage::decode(kind.clone(), message).ok()?;
    let mut json = Vec::new();
    message.serialize_with_options(&mut serde_json::Serializer::new(&mut json), options).ok()?;
    Some(json)
}

/// Tells in the head how the call ended.
fn set_status(headers: &mut HeaderMap, end: &HeaderMap) {
    for name in [grpc::STATUS, grpc::MESSAGE, http::HeaderName::from_static("grpc-status-details-bin")] {
        if let Some(value) = end.get(&name) {
            headers.insert(name, value.clone());
        }
    }
}

/// The HTTP status for the end of a call, as APISIX translates it.
fn http_status(status: u32) -> StatusCode {
    let status = match status {
        0 => 200,
        1 => 499,
        2 | 13 | 15 => 500,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 599,
    };
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use layers::testing::{TestEnv, exchange, field, text};

    use super::*;

    const PROTO: &str = r#"
        syntax = "proto3";
        package test;
        import "kinds.proto";
        import "google/protobuf/timestamp.proto";
        service Greeter {
            rpc Greet (Request) returns (Answer) {}
            rpc Many (Request) returns (stream Answer) {}
            rpc Upload (stream Request) returns (Answer) {}
        }
        message Request {
            string name = 1;
            int64 big = 2;
            bool yes = 3;
            Colour colour = 4;
            repeated string items = 5;
            Inner inner = 6;
            google.protobuf.Timestamp at = 7;
            double ratio = 8;
            map<string, int32> counts = 9;
        }
        message Answer { string text = 1; int64 big = 2; Colour colour = 3; repeated int32 list = 4; }
        message Detail { string why = 1; }
    "#;
    const KINDS: &str = r#"
        syntax = "proto3";
        package test;
        enum Colour { RED = 0; GREEN = 1; }
        message Inner { string word = 1; Inner inner = 2; }
    "#;

    fn env() -> TestEnv {
        TestEnv { protos: vec![("1", PROTO), ("kinds", KINDS), ("bad", "message {"), ("alone", "syntax = \"proto3\"; import \"none.proto\";")], ..TestEnv::default() }
    }

    fn settings(more: Value) -> Value {
        let mut settings = json!({"proto_id": "1", "service": "test.Greeter", "method": "Greet"});
        for (name, value) in more.as_object().unwrap() {
            settings[name] = value.clone();
        }
        settings
    }

    #[derive(Clone, PartialEq, Message)]
    struct Answer {
        #[prost(string, tag = "1")]
        text: String,
        #[prost(int64, tag = "2")]
        big: i64,
        #[prost(int32, tag = "3")]
        colour: i32,
    }

    fn answer(text: &str, big: i64, colour: i32) -> Bytes {
        grpc::frame(0, &Answer { text: text.into(), big, colour }.encode_to_vec())
    }

    /// What came to the upstream, as JSON.
    type Seen = Rc<RefCell<Option<Value>>>;

    /// Sends a request; the upstream answers with `body` and these fields in the head.
    async fn run(more: Value, request: Exchange, fields: Vec<(&'static str, &'static str)>, body: Bytes) -> (Exchange, Option<Value>) {
        let seen = Seen::default();
        let sees = seen.clone();
        let env = env();
        let input = env.with(|env| definition::compile("1", env).unwrap());
        let input = input.as_ref().as_ref().unwrap().get_message_by_name("test.Request").unwrap();
        let upstream = move |x: &mut Exchange| {
            let Body::Full(sent) = &x.request_body else { panic!("a message") };
            let mut messages = Messages::default();
            messages.take(sent);
            let json = decode(&input, &SerializeOptions::new().use_proto_field_name(true), messages.read().unwrap().unwrap());
            *sees.borrow_mut() = serde_json::from_slice(&json.unwrap()).ok();
            assert_eq!(x.request.headers["content-type"], "application/grpc");
            x.response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
            for (name, value) in &fields {
                x.response.headers_mut().insert(*name, HeaderValue::from_static(value));
            }
            *x.response.body_mut() = body.clone().into();
            Ok(())
        };
        let mut chain = env.chain::<GrpcTranscode, _>(&settings(more), upstream).unwrap();
        let x = chain.run(request).await;
        let seen = seen.borrow().clone();
        (x, seen)
    }

    const OK: (&str, &str) = ("grpc-status", "0");

    #[tokio::test]
    async fn a_message_is_made_of_query_form_or_json() {
        let json = |method: &str, body: &'static str| {
            exchange(method, "http://a/?name=query").header("content-type", "application/json").body(body).build()
        };
        let form = |body: &'static str| exchange("POST", "http://a/?name=query").body(body).build();
        let cases = [
            (exchange("GET", "http://a/?name=a+b%21&big=9007199254740993&yes=true&colour=GREEN").build(), json!({"name": "a b!", "big": "9007199254740993", "yes": true, "colour": "GREEN"})),
            (exchange("GET", "http://a/?items=x&items=y&inner.word=w&inner.inner.word=v&ratio=0.5").build(), json!({"items": ["x", "y"], "inner": {"word": "w", "inner": {"word": "v"}}, "ratio": 0.5})),
            (exchange("GET", "http://a/?name=1&name=2&nothing=3&name.x=4&=5&colour=1").build(), json!({"name": "1", "colour": "GREEN"})),
            (exchange("GET", "http://a/").build(), json!({})),
            (form("name=form&yes=1"), json!({"name": "form", "yes": true})),
            (json("POST", r#"{"name": "json", "big": 7, "unknown": 1, "inner": {"word": "w"}, "counts": {"a": 1}}"#), json!({"name": "json", "big": "7", "inner": {"word": "w"}, "counts": {"a": 1}})),
            (json("PUT", r#"{"at": "2020-01-02T03:04:05Z"}"#), json!({"at": "2020-01-02T03:04:05Z"})),
            (json("GET", r#"{"name": "ignored"}"#), json!({"name": "query"})),
        ];
        for (request, expected) in cases {
            let told = format!("{request:?}");
            let (x, seen) = run(json!({}), request, vec![OK], answer("hi", 1, 0)).await;
            assert_eq!((x.response.status().as_u16(), seen), (200, Some(expected)), "{told}");
        }
    }

    #[tokio::test]
    async fn what_is_no_message_is_refused() {
        let json = |body: &'static str| exchange("POST", "http://a/").header("content-type", "application/json").body(body).build();
        let cases = [
            (json("{"), "not JSON"),
            (json("[1]"), "not a message"),
            (json(r#"{"big": "x"}"#), "not a message"),
            (json(r#"{"name": 1}"#), "not a message"),
            (exchange("GET", "http://a/?yes=maybe").build(), "not a message"),
        ];
        for (request, words) in cases {
            let (mut x, seen) = run(json!({}), request, vec![OK], Bytes::new()).await;
            let text = text(&mut x).await;
            assert_eq!((x.response.status().as_u16(), seen), (400, None), "{text}");
            assert!(text.contains(words), "{text}");
        }
        let long = Box::leak("x".repeat(LARGEST + 1).into_boxed_str());
        let (x, _) = run(json!({}), json(long), vec![OK], Bytes::new()).await;
        assert_eq!(x.response.status(), 413);
    }

    #[tokio::test]
    async fn answers_are_written_as_the_options_say() {
        let cases = [
            (json!({}), json!({"text": "hi", "big": 5, "colour": "GREEN", "list": []})),
            (json!({"pb_option": ["int64_as_string", "enum_as_value", "no_default_values"]}), json!({"text": "hi", "big": "5", "colour": 1})),
        ];
        for (more, expected) in cases {
            let (mut x, _) = run(more.clone(), exchange("GET", "http://a/").build(), vec![OK], answer("hi", 5, 1)).await;
            assert_eq!(field(&x, "content-type"), "application/json");
            assert_eq!(serde_json::from_str::<Value>(&text(&mut x).await).unwrap(), expected, "{more}");
        }
    }

    #[tokio::test]
    async fn a_failed_call_has_its_status_and_details() {
        for (code, status) in [("3", 400), ("5", 404), ("16", 401), ("1", 499), ("99", 599), ("x", 500)] {
            let fields = vec![("grpc-status", code), ("grpc-message", "no")];
            let (mut x, _) = run(json!({}), exchange("GET", "http://a/").build(), fields, Bytes::new()).await;
            assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (status, ""), "{code}");
            assert_eq!([field(&x, "grpc-status"), field(&x, "grpc-message")], [code, "no"]);
        }
        // Status 5 with the message "gone" and one detail: a test.Detail that says "moved".
        let details = "CAUSBGdvbmUaJQoadHlwZS5nb29nbGVhcGlzLmNvbS90ZXN0LkQSBwoFbW92ZWQ";
        let fields = vec![("grpc-status", "5"), ("grpc-status-details-bin", details)];
        let shown = |detail: Value| json!({"error": {"code": 5, "message": "gone", "details": [detail]}});
        for (more, expected) in [
            (json!({"show_status_in_body": true, "status_detail_type": "test.Detail"}), shown(json!({"why": "moved"}))),
            (json!({"show_status_in_body": true}), shown(json!({"type_url": "type.googleapis.com/test.D", "value": "CgVtb3ZlZA=="}))),
        ] {
            let (mut x, _) = run(more, exchange("GET", "http://a/").build(), fields.clone(), Bytes::new()).await;
            assert_eq!(serde_json::from_str::<Value>(&text(&mut x).await).unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_no_message_is_a_bad_gateway() {
        let cases = [
            (vec![("content-type", "text/html"), OK], answer("hi", 1, 0)),
            (vec![OK], Bytes::new()),
            (vec![OK], [answer("a", 1, 0), answer("b", 1, 0)].concat().into()),
            (vec![OK], Bytes::from_static(b"\0\0\0\0\x09x")),
            (vec![OK], Bytes::from_static(b"\x01\0\0\0\x01x")),
            (vec![OK], Bytes::from_static(b"\0\0\0\0\x01\xff")),
        ];
        for (fields, body) in cases {
            let told = format!("{fields:?} {body:?}");
            let (x, _) = run(json!({}), exchange("GET", "http://a/").build(), fields, body).await;
            assert_eq!(x.response.status(), 502, "{told}");
        }
    }

    #[tokio::test]
    async fn a_stream_is_written_as_the_client_accepts() {
        let body: Bytes = [answer("a", 1, 0), answer("b", 2, 1)].concat().into();
        let more = json!({"method": "Many", "pb_option": ["no_default_values"]});
        let (a, b) = (r#"{"text":"a","big":1}"#, r#"{"text":"b","big":2,"colour":"GREEN"}"#);
        for (accept, kind, expected) in [
            ("*/*", "application/json", format!("[{a},{b}]")),
            ("application/x-ndjson", "application/x-ndjson", format!("{a}\n{b}\n")),
            ("text/event-stream", "text/event-stream", format!("data: {a}\n\ndata: {b}\n\n")),
        ] {
            let request = exchange("GET", "http://a/").header("accept", accept).build();
            let (mut x, _) = run(more.clone(), request, vec![], body.clone()).await;
            assert_eq!(field(&x, "content-type"), kind);
            let text = text(&mut x).await;
            let error = r#"{"error":{"code":2,"message":"the answer has no status"}}"#;
            let expected = match kind {
                "application/json" => expected.replace(']', &format!(",{error}]")),
                "text/event-stream" => format!("{expected}event: error\ndata: {error}\n\n"),
                _ => format!("{expected}{error}\n"),
            };
            assert_eq!(text, expected);
        }
        let (mut x, _) = run(more.clone(), exchange("GET", "http://a/").build(), vec![OK], Bytes::new()).await;
        assert_eq!(text(&mut x).await, "[]");
        let (x, _) = run(more, exchange("GET", "http://a/").build(), vec![("grpc-status", "14")], Bytes::new()).await;
        assert_eq!(x.response.status(), 503);
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"proto_id": "9"}), "/proto_id", "protos/9"),
            (json!({"proto_id": "bad"}), "/proto_id", "cannot be compiled"),
            (json!({"proto_id": "alone"}), "/proto_id", "none.proto"),
            (json!({"service": "Greeter"}), "/service", "`test.Greeter`"),
            (json!({"method": "Meet"}), "/method", "`Greet`"),
            (json!({"method": "Upload"}), "/method", "stream"),
            (json!({"status_detail_type": "x.Y"}), "/status_detail_type", "x.Y"),
            (json!({"pb_option": ["int64_as_hexstring"]}), "/pb_option/0", "int64_as_string"),
            (json!({"pb_option": []}), "/pb_option", "empty"),
        ];
        for (more, place, words) in cases {
            let errors = env().build::<GrpcTranscode>(&settings(more.clone())).err().unwrap_or_default();
            assert!(errors.iter().any(|error| error.pointer == place && error.to_string().contains(words)), "{more}: {errors:?}");
        }
    }

    #[tokio::test]
    async fn a_descriptor_set_is_a_definition() {
        let pool = env().with(|env| definition::compile("1", env).unwrap());
        let set = STANDARD.encode(pool.as_ref().as_ref().unwrap().encode_to_vec());
        let env = TestEnv { protos: vec![("set", Box::leak(set.into_boxed_str()))], ..TestEnv::default() };
        assert!(env.build::<GrpcTranscode>(&settings(json!({"proto_id": "set"}))).is_ok());
    }
}
