//! `proxy-mirror`: sends a copy of requests to another host and forgets about the answer.
//!
//! Phases: `rewrite`, where the copy gets its path as in APISIX, and around the upstream call, when nothing refuses the
//! request any more. The body is copied while the upstream reads it; the copy goes out when it is complete. Copies are
//! bounded in number, in bytes each and in bytes together: one too many is left out, and the request never waits for one.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use config::error::{ConfigError, ErrorKind};
use config::pattern;
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Uri, Version, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use layers::body::{Body, BodyError};
use layers::error::Fault;
use layers::exchange::Exchange;
use layers::plugin::{Around, BuildEnv, Definition, Flow, Hooks, Next, Rewrite};
use layers::telemetry::metrics::Metrics;
use layers::upstream::fields;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::support::http_call::{self, HttpClient};

/// The largest body that is copied.
const MAX_BODY: usize = 1 << 20;
/// The most of an answer that is read before its connection is given up.
const MAX_ANSWER: usize = 1 << 20;
/// Copies that are under way at once, for each host.
const MAX_COPIES: usize = 512;
/// Copies that are under way at once, to all hosts.
const MAX_ALL: usize = 8 * MAX_COPIES;
/// Bytes of bodies that all copies hold at once.
const MAX_HELD: usize = 64 << 20;

/// Bytes of bodies that copies hold now.
static HELD: AtomicUsize = AtomicUsize::new(0);

const HOST: &str = r"^(http|grpc)s?://([0-9a-zA-Z.-]+|\[[0-9a-fA-F:]+\])(:\d+)?$";
const PATH: &str = r"^/[^?&]+$";

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where copies go: scheme, host and port, like `http://127.0.0.1:8081`. `grpc` and `grpcs` speak HTTP/2.
    #[schemars(regex(pattern = HOST))]
    host: String,
    /// The path of copies; that of the request if it is absent. gRPC keeps its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = PATH))]
    path: Option<String>,
    /// What `path` does.
    #[serde(default)]
    path_concat_mode: Concat,
    /// The share of requests that are copied.
    #[serde(default = "all")]
    #[schemars(range(min = 0.00001, max = 1.0))]
    sample_ratio: f64,
}

/// What `path` does to the path of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Concat {
    /// It takes its place.
    #[default]
    Replace,
    /// It stands before it.
    Prefix,
}

fn all() -> f64 {
    1.0
}

/// `plugin_attr.proxy-mirror` of `config.yaml`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Attr {
    timeout: Limits,
}

/// Time limits of copies: seconds, or text like `2000ms`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Limits {
    connect: Option<Value>,
    read: Option<Value>,
    send: Option<Value>,
}

/// The plugin.
pub struct ProxyMirror {
    client: HttpClient,
    control: Handle,
    metrics: Arc<Metrics>,
    /// Room for copies to this host, whoever sends them: a slow one must not take that of others.
    places: Arc<Semaphore>,
    /// `http://host:port`.
    origin: Box<str>,
    grpc: bool,
    path: Option<Box<str>>,
    mode: Concat,
    ratio: f64,
}

/// The target of the copy of this request.
struct Copied(Uri);

impl Definition for ProxyMirror {
    const NAME: &'static str = "proxy-mirror";
    const PRIORITY: i32 = 1010;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let mut fits = |place: &str, text: &str, rule: &str, expected: &str| {
            if !pattern::compile(rule, false).is_ok_and(|rule| rule.is_match(text.as_bytes())) {
                let kind = ErrorKind::BadFormat { found: text.to_owned(), expected: expected.to_owned() };
                errors.push(ConfigError::new(place, kind));
            }
        };
        fits("/host", &config.host, HOST, "scheme, host and port: http://127.0.0.1:8081");
        if let Some(path) = &config.path {
            fits("/path", path, PATH, "a path from / without ? and &");
        }
        if !(0.00001..=1.0).contains(&config.sample_ratio) {
            errors.push(ConfigError::invalid("/sample_ratio", "write a number from 0.00001 to 1"));
        }
        errors
    }

    fn check_attr(_: &Config, attr: Option<&Value>) -> Vec<ConfigError> {
        limits(attr).err().into_iter().collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let limits = limits(env.attr)?;
        let grpc = config.host.starts_with("grpc");
        let settings = http_call::Settings {
            // Copies go where the administrator says; their answers are not used.
            verify: false,
            timeout: limits.1,
            connect_timeout: limits.0,
            pool: 64,
            max_body: MAX_ANSWER,
            in_flight: MAX_ALL,
            http2: grpc,
            ..http_call::Settings::default()
        };
        let origin = config.host.replacen("grpc", "http", 1);
        let plugin = Arc::new(Self {
            client: HttpClient::new(&settings, env)?,
            control: env.control.clone(),
            metrics: env.metrics.clone(),
            places: env.carry.get_or(&format!("proxy-mirror/{}", config.host), || Semaphore::new(MAX_COPIES)),
            origin: origin.into(),
            grpc,
            path: config.path.filter(|_| !grpc).map(Into::into),
            mode: config.path_concat_mode,
            ratio: config.sample_ratio,
        });
        hooks.rewrite(&plugin);
        hooks.around(&plugin);
        Ok(())
    }
}

/// Time to connect, and for the whole copy.
fn limits(attr: Option<&Value>) -> Result<(Duration, Duration), ConfigError> {
    let attr = match attr.filter(|attr| !attr.is_null()) {
        Some(attr) => Attr::deserialize(attr).map_err(|error| {
            ConfigError::invalid("", format!("plugin_attr.proxy-mirror of config.yaml: {error}"))
        })?,
        None => Attr::default(),
    };
    let time = |name: &str, value: Option<&Value>| {
        let Some(value) = value else { return Ok(Duration::from_secs(60)) };
        duration(value).ok_or_else(|| {
            let problem =
                format!("plugin_attr.proxy-mirror.timeout.{name} of config.yaml: write a time, like 60s");
            ConfigError::invalid("", problem)
        })
    };
    let connect = time("connect", attr.timeout.connect.as_ref())?;
    let read = time("read", attr.timeout.read.as_ref())?;
    Ok((connect, connect + read + time("send", attr.timeout.send.as_ref())?))
}

/// A number of seconds, or text with `ms`, `s`, `m` or `h`.
fn duration(value: &Value) -> Option<Duration> {
    let (number, unit) = match value {
        Value::Number(number) => (number.as_f64()?, 1.0),
        Value::String(text) => {
            let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
            let (number, unit) = text.split_at_checked(end)?;
            let unit = match unit {
                "ms" => 0.001,
                "" | "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
            (number.trim().parse().ok()?, unit)
        }
        _ => return None,
    };
    Duration::try_from_secs_f64(number * unit).ok().filter(|time| !time.is_zero())
}

impl Rewrite for ProxyMirror {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        if self.ratio < 1.0 && fastrand::f64() >= self.ratio {
            return Flow::Next;
        }
        let asked = x.forward.uri.as_ref().or_else(|| x.request.uri.path_and_query());
        let asked = asked.map_or("/", PathAndQuery::as_str);
        let target = match (&self.path, self.mode) {
            (None, _) => format!("{}{asked}", self.origin),
            (Some(path), Concat::Prefix) => format!("{}{path}{asked}", self.origin),
            (Some(path), Concat::Replace) => match x.request.uri.query() {
                Some(query) => format!("{}{path}?{query}", self.origin),
                None => format!("{}{path}", self.origin),
            },
        };
        if let Ok(target) = Uri::try_from(target) {
            x.put_slot(Copied(target));
        }
        Flow::Next
    }
}

impl Around for ProxyMirror {
    async fn around(&self, mut x: Exchange, next: Next) -> Result<Exchange, Fault> {
        if let Some(copy) = self.copy(&x) {
            x.request_body = match std::mem::take(&mut x.request_body) {
                body if body.is_empty() => {
                    copy.send(Bytes::new());
                    body
                }
                Body::Full(bytes) => {
                    copy.take(std::slice::from_ref(&bytes));
                    Body::Full(bytes)
                }
                body => Body::boxed(Tee { body, copy: Some(Kept::new(copy)) }),
            };
        }
        next.run(x).await
    }
}

impl ProxyMirror {
    /// The copy of this request, if one is to be made: all but the body.
    fn copy(&self, x: &Exchange) -> Option<Copy> {
        let Copied(target) = x.slot::<Copied>()?;
        // A copy cannot take part in a tunnel.
        if x.request.headers.contains_key(header::UPGRADE) {
            return None;
        }
        let mut request = Request::new(());
        *request.method_mut() = x.forward.method.as_ref().unwrap_or(&x.request.method).clone();
        *request.uri_mut() = target.clone();
        let mut headers = fields::forwarded(&x.request.headers);
        // The copy has a length of its own, and its authority is in the target or set below.
        headers.remove(header::CONTENT_LENGTH);
        headers.remove(header::HOST);
        *request.headers_mut() = headers;
        if self.grpc {
            *request.version_mut() = Version::HTTP_2;
            request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
        } else if let Some(host) =
            x.forward.host.as_ref().or_else(|| x.request.headers.get(header::HOST))
        {
            request.headers_mut().insert(header::HOST, host.clone());
        }
        Some(Copy {
            request,
            client: self.client.clone(),
            control: self.control.clone(),
            metrics: self.metrics.clone(),
            places: self.places.clone(),
        })
    }
}

/// A copy that waits for its body.
struct Copy {
    request: Request<()>,
    client: HttpClient,
    control: Handle,
    metrics: Arc<Metrics>,
    places: Arc<Semaphore>,
}

impl Copy {
    /// Sends a body that is here already, if there is room for it.
    fn take(self, pieces: &[Bytes]) {
        let mut kept = Kept::new(self);
        if pieces.iter().all(|piece| kept.add(piece)) {
            kept.send();
        } else {
            kept.give_up();
        }
    }

    fn send(self, body: Bytes) {
        self.send_holding(body, Held(0));
    }

    /// Sends it from the control side; nobody waits.
    fn send_holding(self, body: Bytes, held: Held) {
        let Self { request, client, control, metrics, places } = self;
        let Ok(place) = places.try_acquire_owned() else {
            metrics.mirrored.dropped.inc();
            return;
        };
        control.spawn(async move {
            let outcome = client.call(request.map(|()| body)).await;
            drop((held, place));
            match outcome {
                // An answer that is too long is one.
                Ok(_) | Err(http_call::CallError::TooLarge(_)) => metrics.mirrored.sent.inc(),
                Err(http_call::CallError::Busy) => metrics.mirrored.dropped.inc(),
                Err(error) => {
                    tracing::debug!(%error, "a copy of a request failed");
                    metrics.mirrored.failed.inc();
                }
            }
        });
    }
}

/// So many bytes of the common bound.
struct Held(usize);

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// A copy and what of its body has passed.
struct Kept {
    copy: Copy,
    pieces: Vec<Bytes>,
    held: Held,
}

impl Kept {
    fn new(copy: Copy) -> Self {
        Self { copy, pieces: Vec::new(), held: Held(0) }
    }

    /// Keeps a piece. False if there is no room for it.
    fn add(&mut self, piece: &Bytes) -> bool {
        let size = piece.len();
        if self.held.0 + size > MAX_BODY {
            return false;
        }
        if HELD.fetch_add(size, Ordering::Relaxed) + size > MAX_HELD {
            HELD.fetch_sub(size, Ordering::Relaxed);
            return false;
        }
        self.held.0 += size;
        self.pieces.push(piece.clone());
        true
    }

    fn send(self) {
        let Self { copy, pieces, held } = self;
        let body = match pieces.as_slice() {
            [whole] => whole.clone(),
            pieces => {
                let mut body = BytesMut::with_capacity(held.0);
                pieces.iter().for_each(|piece| body.extend_from_slice(piece));
                body.freeze()
            }
        };
        copy.send_holding(body, held);
    }

    fn give_up(self) {
        self.copy.metrics.mirrored.dropped.inc();
    }
}

/// A body of which a copy is kept as it passes.
struct Tee {
    body: Body,
    /// There until the copy is sent or given up.
    copy: Option<Kept>,
}

impl Tee {
    fn finish(&mut self) {
        if let Some(copy) = self.copy.take() {
            copy.send();
        }
    }
}

impl HttpBody for Tee {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(data), Some(copy)) = (frame.data_ref(), &mut this.copy)
                    && !copy.add(data)
                    && let Some(copy) = this.copy.take()
                {
                    copy.give_up();
                }
                // Nobody asks again after the last piece.
                if this.body.is_end_stream() {
                    this.finish();
                }
            }
            None => this.finish(),
            Some(Err(_)) => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Tee {
    fn drop(&mut self) {
        // The client or the upstream went away before the end.
        if let Some(copy) = self.copy.take() {
            copy.give_up();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http::Response;
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;
    use crate::support::peer::Peer;

    type Seen = Arc<Mutex<Vec<(String, String, Bytes)>>>;

    /// A host that notes method and target, `Host` and body of what it gets.
    async fn mirror() -> (Peer, Seen) {
        let seen = Seen::default();
        let noted = seen.clone();
        let peer = Peer::start(move |request| {
            let target = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
            let host = request.headers().get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
            let line = format!("{} {target}", request.method());
            noted.lock().unwrap().push((line, host.to_owned(), request.body().clone()));
            Response::default()
        })
        .await;
        (peer, seen)
    }

    async fn until(what: &str, done: impl Fn() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(std::time::Instant::now() < deadline, "not in time: {what}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A body that comes in pieces and whose length is known.
    struct Pieces(Vec<&'static str>);

    impl HttpBody for Pieces {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            if self.0.is_empty() {
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Ok(Frame::data(self.0.remove(0).into()))))
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_empty()
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
        }
    }

    fn pieces(pieces: &[&'static str]) -> Body {
        Body::boxed(Pieces(pieces.to_vec()))
    }

    /// The whole of a body that never has to be waited for, as an upstream reads it: not asked again at its end.
    fn read(mut body: Body) -> String {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut text = String::new();
        while !body.is_end_stream() {
            let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut body).poll_frame(&mut cx) else { break };
            text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
        text
    }

    #[tokio::test]
    async fn copies_go_out_with_the_path_that_was_asked_for() {
        let (peer, seen) = mirror().await;
        let host = peer.url("");
        let host = host.trim_end_matches('/');
        for (settings, uri, wanted) in [
            (json!({}), "/a%20b?c=1", "/a%20b?c=1"),
            (json!({"path": "/m"}), "/a?c=1", "/m?c=1"),
            (json!({"path": "/m"}), "/a", "/m"),
            (json!({"path": "/m", "path_concat_mode": "prefix"}), "/a?c=1", "/m/a?c=1"),
        ] {
            let mut all = json!({"host": host});
            all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
            let mut chain = TestEnv::default().chain::<ProxyMirror, _>(&all, |_| Ok(())).unwrap();
            let x = exchange("POST", &format!("http://a.test{uri}"))
                .header("host", "a.test")
                .header("connection", "x-hop")
                .header("x-hop", "1")
                .header("content-length", "5")
                .body("order");
            let before = seen.lock().unwrap().len();
            assert_eq!(chain.run(x.build()).await.status(), 200);
            until("the copy is there", || seen.lock().unwrap().len() > before).await;
            let last = seen.lock().unwrap().last().cloned().unwrap();
            let wanted = (format!("POST {wanted}"), "a.test".to_owned(), Bytes::from_static(b"order"));
            assert_eq!(last, wanted, "{settings}");
        }
    }

    #[tokio::test]
    async fn a_streamed_body_is_copied_as_it_passes_and_keeps_its_length() {
        let (peer, seen) = mirror().await;
        let env = TestEnv::default();
        let settings = json!({"host": peer.url("").trim_end_matches('/')});
        let passed = Arc::new(Mutex::new(String::new()));
        let taken = passed.clone();
        let mut chain = env
            .chain::<ProxyMirror, _>(&settings, move |x| {
                let body = std::mem::take(&mut x.request_body);
                assert_eq!(body.size_hint().exact(), Some(7));
                *taken.lock().unwrap() = read(body);
                Ok(())
            })
            .unwrap();
        chain.run(exchange("PUT", "http://a/").body(pieces(&["one ", "two"])).build()).await;
        until("the copy is there", || !seen.lock().unwrap().is_empty()).await;
        assert_eq!(seen.lock().unwrap().first().unwrap().2, "one two");
        until("it is counted", || env.metrics.mirrored.sent.value() == 1).await;
        assert_eq!(*passed.lock().unwrap(), "one two");
    }

    #[tokio::test]
    async fn what_is_too_large_or_breaks_off_is_not_copied_and_passes_all_the_same() {
        let (peer, seen) = mirror().await;
        let env = TestEnv::default();
        let settings = json!({"host": peer.url("").trim_end_matches('/')});
        let mut chain = env.chain::<ProxyMirror, _>(&settings, |_| Ok(())).unwrap();
        let large = Bytes::from(vec![b'x'; MAX_BODY + 1]);
        assert_eq!(chain.run(exchange("PUT", "http://a/").body(large).build()).await.status(), 200);
        // Nobody reads the body.
        assert_eq!(chain.run(exchange("PUT", "http://a/").body(pieces(&["a"])).build()).await.status(), 200);
        until("both are counted", || env.metrics.mirrored.dropped.value() == 2).await;
        assert!(seen.lock().unwrap().is_empty());
        until("nothing is held", || HELD.load(Ordering::Relaxed) == 0).await;
    }

    #[tokio::test]
    async fn a_host_that_is_away_changes_nothing() {
        let env = TestEnv::default();
        let mut chain =
            env.chain::<ProxyMirror, _>(&json!({"host": "http://127.0.0.1:1"}), |_| Ok(())).unwrap();
        assert_eq!(chain.run(exchange("GET", "http://a/").build()).await.status(), 200);
        until("it is counted", || env.metrics.mirrored.failed.value() == 1).await;
    }

    #[tokio::test]
    async fn a_sample_is_copied() {
        let (peer, _) = mirror().await;
        let env = TestEnv::default();
        let settings = json!({"host": peer.url("").trim_end_matches('/'), "sample_ratio": 0.3});
        let mut chain = env.chain::<ProxyMirror, _>(&settings, |_| Ok(())).unwrap();
        let mut copied = 0;
        for _ in 0..1000 {
            let x = chain.run(exchange("GET", "http://a/").build()).await;
            copied += usize::from(x.slot::<Copied>().is_some());
        }
        assert!((220..380).contains(&copied), "{copied} of 1,000");
    }

    #[tokio::test]
    async fn settings_that_cannot_work_are_refused_at_their_place() {
        for (settings, place) in [
            (json!({}), ""),
            (json!({"host": "127.0.0.1:80"}), "/host"),
            (json!({"host": "http://127.0.0.1:80/"}), "/host"),
            (json!({"host": "ftp://a"}), "/host"),
            (json!({"host": "http://a", "path": "a"}), "/path"),
            (json!({"host": "http://a", "path": "/a?b"}), "/path"),
            (json!({"host": "http://a", "path": "/"}), "/path"),
            (json!({"host": "http://a", "path_concat_mode": "append"}), "/path_concat_mode"),
            (json!({"host": "http://a", "sample_ratio": 0}), "/sample_ratio"),
            (json!({"host": "http://a", "sample_ratio": 1.1}), "/sample_ratio"),
        ] {
            let errors = TestEnv::default().build::<ProxyMirror>(&settings).unwrap_err();
            assert_eq!(errors[0].pointer, place, "{settings} {errors:?}");
        }
        for host in ["http://a", "https://a.test:443", "http://[::1]:80", "grpc://a:1", "grpcs://a"] {
            assert!(TestEnv::default().build::<ProxyMirror>(&json!({"host": host})).is_ok(), "{host}");
        }
    }

    #[test]
    fn times_of_config_yaml_are_read() {
        for (value, seconds) in [
            (json!("60s"), Some(60.0)),
            (json!("2000ms"), Some(2.0)),
            (json!("1m"), Some(60.0)),
            (json!(1.5), Some(1.5)),
            (json!("5"), Some(5.0)),
            (json!("0s"), None),
            (json!("soon"), None),
            (json!(true), None),
        ] {
            assert_eq!(duration(&value).map(|time| time.as_secs_f64()), seconds, "{value}");
        }
        let attr = json!({"timeout": {"connect": "2000ms", "read": "1s", "send": 1}});
        assert_eq!(limits(Some(&attr)).unwrap(), (Duration::from_secs(2), Duration::from_secs(4)));
        assert_eq!(limits(None).unwrap().0, Duration::from_secs(60));
        assert!(limits(Some(&json!({"timeout": {"read": []}}))).is_err());
    }
}
