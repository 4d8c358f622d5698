//! `forward-auth`: asks a service of one's own whether a request may pass.
//!
//! Phase: `rewrite`, so that a consumer named by the service brings its plugins. The service is told of the request by
//! `X-Forwarded-*` fields; a status below 300 lets it pass, any other is the answer. Without an answer in time the
//! request is refused, unless `allow_degradation` says otherwise; what only the service may set is taken out in any
//! case.

use std::sync::Arc;

use bytes::Bytes;
use config::error::ConfigError;
use config::fields::{HttpStatus, Int};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use layers::body::Body;
use layers::consumer::Consumers;
use layers::exchange::{Exchange, State};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, RewriteWaits};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::headers::{self, Fields, Value};
use crate::support::http_call::{self, HttpClient};
use crate::support::reply::{self, Canned};
use crate::support::{consumer, request_body};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The URL of the service.
    uri: String,
    /// Let requests pass while the service gives no answer.
    #[serde(default)]
    allow_degradation: bool,
    /// The status of a refusal because the service gives no answer.
    #[serde(default = "forbidden")]
    status_on_error: HttpStatus,
    /// Check the certificate of the service.
    #[serde(default = "yes")]
    ssl_verify: bool,
    /// How the service is asked; with `POST` it gets the body of the request.
    #[serde(default)]
    request_method: AskBy,
    /// With `POST`, the largest body that the service gets, in bytes. A larger one is answered with 413.
    #[serde(default)]
    max_req_body_size: Int<1, { u32::MAX }, 67_108_864>,
    /// Fields of the request that the service gets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    request_headers: Vec<String>,
    /// Fields of the service's answer that the upstream gets. A client's own are taken out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    upstream_headers: Vec<String>,
    /// Fields of the service's answer that the client gets with a refusal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    client_headers: Vec<String>,
    /// More fields that the service gets, with variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1))]
    extra_headers: Option<Fields>,
    /// The field of the service's answer that names the consumer; without it the request is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    consumer_header: Option<String>,
    /// Milliseconds to wait for the whole answer.
    #[serde(default)]
    timeout: Int<1, 60_000, 3_000>,
    /// Keep connections to the service.
    #[serde(default = "yes")]
    keepalive: bool,
    /// Milliseconds that a connection may be idle.
    #[serde(default)]
    keepalive_timeout: Int<1_000, { u32::MAX }, 60_000>,
    /// Idle connections that are kept.
    #[serde(default)]
    keepalive_pool: Int<1, { u32::MAX }, 5>,
}

/// The method of the question.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
enum AskBy {
    #[default]
    Get,
    Post,
}

fn forbidden() -> HttpStatus {
    HttpStatus::new(403).unwrap_or_default()
}

fn yes() -> bool {
    true
}

/// The plugin.
pub struct ForwardAuth {
    client: HttpClient,
    uri: Uri,
    method: Method,
    longest: usize,
    degrade: bool,
    request_headers: Box<[HeaderName]>,
    upstream_headers: Box<[HeaderName]>,
    client_headers: Box<[HeaderName]>,
    extra: Box<[(HeaderName, Value)]>,
    consumer: Option<HeaderName>,
    consumers: Consumers,
    failed: Canned,
    nobody: Canned,
    unknown: Canned,
}

impl Definition for ForwardAuth {
    const NAME: &'static str = "forward-auth";
    const PRIORITY: i32 = 2002;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let empty = config.extra_headers.as_ref().is_some_and(Fields::is_empty);
        let mut errors: Vec<_> = http_call::url(&config.uri, "/uri").err().into_iter().collect();
        if empty {
            errors.push(ConfigError::invalid("/extra_headers", "at least one field is needed"));
        }
        for (list, pointer) in [
            (&config.request_headers, "/request_headers"),
            (&config.upstream_headers, "/upstream_headers"),
            (&config.client_headers, "/client_headers"),
        ] {
            errors.extend(names(list, pointer).err());
        }
        errors.extend(config.extra_headers.iter().filter_map(|fields| headers::compile(fields, "/extra_headers").err()));
        errors.extend(consumer_header(config).err());
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let settings = http_call::Settings::of(
            config.ssl_verify,
            config.timeout.get(),
            config.keepalive.then(|| (config.keepalive_pool.get(), config.keepalive_timeout.get())),
        );
        hooks.rewrite_waits(&Arc::new(Self {
            client: HttpClient::new(&settings, env)?,
            uri: http_call::url(&config.uri, "/uri")?,
            method: match config.request_method {
                AskBy::Get => Method::GET,
                AskBy::Post => Method::POST,
            },
            longest: usize::try_from(config.max_req_body_size.get()).unwrap_or(usize::MAX),
            degrade: config.allow_degradation,
            request_headers: names(&config.request_headers, "/request_headers")?,
            upstream_headers: names(&config.upstream_headers, "/upstream_headers")?,
            client_headers: names(&config.client_headers, "/client_headers")?,
            extra: headers::compile(&config.extra_headers.clone().unwrap_or_default(), "/extra_headers")?.into(),
            consumer: consumer_header(&config)?,
            consumers: env.consumers.clone(),
            failed: Canned::status(reply::status(config.status_on_error.get())),
            nobody: Canned::text(StatusCode::FORBIDDEN, "consumer header missing in auth response"),
            unknown: Canned::text(StatusCode::FORBIDDEN, "consumer not found"),
        }));
        Ok(())
    }
}

/// Fields that belong to one connection or one message, whatever the settings say.
pub(crate) fn is_own(name: &HeaderName) -> bool {
    [
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::TE,
        header::TRAILER,
        header::EXPECT,
    ]
    .contains(name)
        || name == "keep-alive"
        || name == "proxy-connection"
}

fn consumer_header(config: &Config) -> Result<Option<HeaderName>, ConfigError> {
    let name = config.consumer_header.as_ref().map(|name| headers::name(name, ""));
    name.transpose().map_err(|error| ConfigError::new("/consumer_header", error.kind))
}

fn names(list: &[String], pointer: &str) -> Result<Box<[HeaderName]>, ConfigError> {
    let names = list
        .iter()
        .enumerate()
        .map(|(index, name)| {
            headers::name(name, "").map_err(|error| ConfigError::new(format!("{pointer}/{index}"), error.kind))
        })
        .filter(|name| !name.as_ref().is_ok_and(is_own));
    names.collect()
}

/// Puts `from`'s fields of these names in place of `to`'s.
fn replace(to: &mut HeaderMap, from: &HeaderMap, names: &[HeaderName]) {
    for name in names {
        to.remove(name);
        for value in from.get_all(name) {
            to.append(name.clone(), value.clone());
        }
    }
}

impl ForwardAuth {
    fn question(&self, x: &State, body: Bytes) -> Request<Bytes> {
        let mut question = Request::new(body);
        *question.method_mut() = self.method.clone();
        *question.uri_mut() = self.uri.clone();
        let told = question.headers_mut();
        let mut tell = |name: &'static str, value: &str| {
            // Bytes that no field can hold do not get through the request line either.
            if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
                told.insert(HeaderName::from_static(name), value);
            }
        };
        tell("x-forwarded-proto", x.conn.scheme());
        tell("x-forwarded-method", x.request.method.as_str());
        tell("x-forwarded-host", &x.host);
        tell("x-forwarded-uri", x.request_uri());
        tell("x-forwarded-for", &x.remote_addr.to_string());
        if self.method == Method::POST
            && let Some(coding) = x.request.headers.get(header::CONTENT_ENCODING)
        {
            told.insert(header::CONTENT_ENCODING, coding.clone());
        }
        for (name, value) in &self.extra {
            headers::set(told, name, value.render(x, None));
        }
        for name in &self.request_headers {
            if told.contains_key(name) {
                continue;
            }
            for value in x.request.headers.get_all(name) {
                told.append(name.clone(), value.clone());
            }
        }
        question
    }

    fn refusal(&self, verdict: Response<Bytes>) -> Flow {
        let (head, body) = verdict.into_parts();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = head.status;
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, plain);
        for name in &self.client_headers {
            if head.headers.contains_key(name) {
                replace(response.headers_mut(), &head.headers, std::slice::from_ref(name));
            }
        }
        Flow::Reply(response)
    }
}

impl RewriteWaits for ForwardAuth {
    async fn rewrite(&self, x: &mut Exchange) -> Flow {
        let body = if self.method == Method::POST {
            match request_body::read(x, self.longest).await {
                Ok(body) => body,
                Err(flow) => return flow,
            }
        } else {
            Bytes::new()
        };
        let verdict = match self.client.call(self.question(x, body)).await {
            Ok(verdict) => verdict,
            Err(error) => {
                tracing::warn!(host = %x.host, %error, "forward-auth: no answer");
                if !self.degrade {
                    return self.failed.flow();
                }
                // Nobody has vouched for what the client wrote into these.
                replace(&mut x.request.headers, &HeaderMap::new(), &self.upstream_headers);
                return Flow::Next;
            }
        };
        if verdict.status().as_u16() >= 300 {
            return self.refusal(verdict);
        }
        if let Some(field) = &self.consumer {
            let name = verdict.headers().get(field).and_then(|name| name.to_str().ok()).unwrap_or_default();
            if name.is_empty() {
                tracing::warn!(%field, "forward-auth: the answer names no consumer");
                return self.nobody.flow();
            }
            let Some(known) = self.consumers.named(name) else {
                tracing::warn!(%field, name, "forward-auth: there is no such consumer");
                return self.unknown.flow();
            };
            consumer::attach(x, known);
        }
        replace(&mut x.request.headers, verdict.headers(), &self.upstream_headers);
        Flow::Next
    }
}

#[cfg(test)]
mod tests {
    use layers::consumer::{Consumer, ConsumerTable};
    use layers::testing::{ExchangeBuilder, TestEnv, exchange, field, text};
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::support::peer::Peer;

    /// Says what it was asked in `X-Asked`, and decides by the field `x-token`.
    async fn service() -> Peer {
        Peer::start(|request| {
            let mut told: Vec<_> = request
                .headers()
                .iter()
                .filter(|(name, _)| !["host", "user-agent", "content-length"].contains(&name.as_str()))
                .map(|(name, value)| format!("{name}={}", String::from_utf8_lossy(value.as_bytes())))
                .collect();
            told.sort();
            let asked = format!("{} {} {}", request.method(), request.uri(), told.join(" "));
            let answer = Response::builder()
                .header("x-asked", asked)
                .header("x-body", request.body().as_ref())
                .header("x-user", "ann")
                .header("location", "/login");
            match request.headers().get("x-token").map(HeaderValue::as_bytes) {
                Some(b"good") => answer.status(204).body(Bytes::new()),
                Some(b"see") => answer.status(302).body(Bytes::new()),
                _ => answer.status(401).body("who?".into()),
            }
            .unwrap()
        })
        .await
    }

    async fn run(env: &TestEnv, config: &Json, request: ExchangeBuilder) -> Exchange {
        env.chain::<ForwardAuth, _>(config, |_| Ok(())).unwrap().run(request.build()).await
    }

    fn get(token: &str) -> ExchangeBuilder {
        exchange("GET", "http://Shop.example/a?b=c").header("x-token", token).header("x-user", "mallory")
    }

    #[tokio::test]
    async fn the_service_is_told_of_the_request_and_decides() {
        let peer = service().await;
        let config = json!({
            "uri": peer.url("/auth?x=1"),
            "request_headers": ["X-Token", "X-Missing", "Content-Length"],
            "upstream_headers": ["X-User", "X-Asked", "X-Other"],
            "client_headers": ["Location", "X-Nothing"],
            "extra_headers": {"X-Route": "$uri", "X-Forwarded-Method": "ask", "X-Void": "$http_void"},
        });
        let env = TestEnv::default();
        let x = run(&env, &config, get("good").header("x-other", "mine")).await;
        assert_eq!(x.response.status(), 200);
        assert_eq!(x.request.headers["x-user"], "ann");
        assert!(!x.request.headers.contains_key("x-other"), "what the service did not say goes");
        assert_eq!(
            x.request.headers["x-asked"],
            "GET /auth?x=1 x-forwarded-for=127.0.0.1 x-forwarded-host=shop.example x-forwarded-method=ask \
             x-forwarded-proto=http x-forwarded-uri=/a?b=c x-route=/a x-token=good"
        );
        for (token, status, body) in [("bad", 401, "who?"), ("see", 302, "")] {
            let mut x = run(&env, &config, get(token)).await;
            assert_eq!(x.response.status(), status);
            assert_eq!((field(&x, "location"), field(&x, "x-user")), ("/login", ""), "{token}");
            assert_eq!(text(&mut x).await, body, "{token}");
        }
        assert_eq!(peer.connections(), 1);
    }

    #[tokio::test]
    async fn with_post_the_service_gets_the_body_and_so_does_the_upstream() {
        let peer = service().await;
        let config = json!({"uri": peer.url("/"), "request_method": "POST",
                            "request_headers": ["x-token"], "upstream_headers": ["x-body"], "max_req_body_size": 9});
        let post = || exchange("POST", "http://a/").header("x-token", "good");
        let mut x = run(&TestEnv::default(), &config, post().body("form")).await;
        assert_eq!((x.response.status().as_u16(), &x.request.headers["x-body"]), (200, &"form".parse().unwrap()));
        assert_eq!(x.request_body.collect_up_to(10).await.unwrap(), "form");
        let x = run(&TestEnv::default(), &config, post().body("ten bytes.")).await;
        assert_eq!(x.response.status(), 413);
    }

    #[tokio::test]
    async fn without_an_answer_the_request_is_refused_unless_the_settings_say_otherwise() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = |more: Json| {
            let mut config = json!({"uri": format!("http://{}/", silent.local_addr().unwrap()), "timeout": 50,
                                    "upstream_headers": ["x-user"]});
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            config
        };
        let cases = [(json!({}), 403), (json!({"status_on_error": 503}), 503), (json!({"allow_degradation": true}), 200)];
        for (more, status) in cases {
            let x = run(&TestEnv::default(), &config(more.clone()), get("good")).await;
            assert_eq!(x.response.status(), status, "{more}");
            if status == 200 {
                assert!(!x.request.headers.contains_key("x-user"), "nobody vouched for it");
            }
        }
    }

    #[tokio::test]
    async fn the_service_may_name_the_consumer() {
        let peer = service().await;
        let env = TestEnv::default();
        let config = |header: &str| json!({"uri": peer.url("/"), "request_headers": ["x-token"], "consumer_header": header});
        let mut x = run(&env, &config("x-user"), get("good")).await;
        assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (403, "consumer not found"));
        let mut x = run(&env, &config("x-nobody"), get("good")).await;
        assert_eq!(
            (x.response.status().as_u16(), &*text(&mut x).await),
            (403, "consumer header missing in auth response")
        );
        let mut table = ConsumerTable::default();
        table.insert_named(Arc::new(Consumer::new("ann")));
        env.consumers.publish(table);
        let x = run(&env, &config("x-user"), get("good")).await;
        assert_eq!(x.response.status(), 200);
        assert_eq!(x.request.headers["x-consumer-username"], "ann");
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (config, place) in [
            (json!({}), ""),
            (json!({"uri": "auth"}), "/uri"),
            (json!({"uri": "http://a", "timeout": 0}), "/timeout"),
            (json!({"uri": "http://a", "timeout": 60_001}), "/timeout"),
            (json!({"uri": "http://a", "request_method": "PUT"}), "/request_method"),
            (json!({"uri": "http://a", "status_on_error": 199}), "/status_on_error"),
            (json!({"uri": "http://a", "upstream_headers": ["a b"]}), "/upstream_headers/0"),
            (json!({"uri": "http://a", "extra_headers": {}}), "/extra_headers"),
            (json!({"uri": "http://a", "keepalive_timeout": 999}), "/keepalive_timeout"),
        ] {
            let errors = TestEnv::default().build::<ForwardAuth>(&config).unwrap_err();
            assert!(errors.iter().any(|error| error.pointer == place), "{config}: {errors:?}");
        }
    }
}
