//! The variables of an exchange, for `vars` predicates, `$var` templates, hash keys and log formats.
//!
//! Text that stands in the request is borrowed. Variables of the body have a value only when a reader has buffered
//! it (see [`BufferedBody`]), which the route look-up does where a predicate asks for one.

use std::borrow::Cow;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use config::var::{Var, Vars};
use http::{HeaderMap, HeaderName, Version, header};
use percent_encoding::percent_decode_str;
use serde_json::Value;

use crate::exchange::{Answered, State};

/// The request body, read for variables and predicates. It is still forwarded.
#[derive(Clone, Debug)]
pub struct BufferedBody {
    /// The bytes.
    pub bytes: Bytes,
    /// Parsed, if the content type says JSON and it is JSON.
    pub json: Option<Value>,
}

impl BufferedBody {
    /// Parses `bytes` as the content type says.
    pub fn new(bytes: Bytes, content_type: Option<&str>) -> Self {
        let json = content_type
            .filter(|kind| kind.contains("json"))
            .and_then(|_| serde_json::from_slice(&bytes).ok());
        Self { bytes, json }
    }
}

/// What plugins and log formats call a variable of their own.
#[derive(Default, Debug)]
pub struct OwnVars(pub Vec<(&'static str, String)>);

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter();
    let first = String::from_utf8_lossy(values.next()?.as_bytes());
    match values.next() {
        None => Some(first),
        Some(second) => {
            // nginx joins repeated fields; the parts of a cookie by a semicolon.
            let separator = if *name == header::COOKIE { "; " } else { ", " };
            let mut joined = first.into_owned();
            for value in std::iter::once(second).chain(values) {
                joined.push_str(separator);
                joined.push_str(&String::from_utf8_lossy(value.as_bytes()));
            }
            Some(Cow::Owned(joined))
        }
    }
}

/// The value of the first cookie of that name.
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get_all(header::COOKIE).iter().filter_map(|field| field.to_str().ok()).find_map(|field| {
        field.split(';').find_map(|pair| {
            let (key, value) = pair.trim().split_once('=')?;
            (key.trim() == name).then(|| value.trim().trim_matches('"'))
        })
    })
}

/// The value of the first argument of that name in a query or form. An argument without `=` is empty.
pub fn argument<'a>(query: &'a str, name: &str) -> Option<Cow<'a, str>> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let same = key == name || (key.contains(['%', '+']) && decode(key) == name);
        same.then(|| decode(value))
    })
}

fn decode(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let spaced = text.replace('+', " ");
    Cow::Owned(percent_decode_str(&spaced).decode_utf8_lossy().into_owned())
}

fn seconds(duration: std::time::Duration) -> String {
    format!("{}.{:03}", duration.as_secs(), duration.subsec_millis())
}

fn since_epoch() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Joined for all attempts, as nginx does: `10.0.0.1:80, 10.0.0.2:80`.
fn per_attempt(x: &State, part: impl Fn(&crate::exchange::Attempt) -> String) -> Option<Cow<'_, str>> {
    if x.attempts.is_empty() {
        return None;
    }
    let parts: Vec<_> = x.attempts.iter().map(part).collect();
    Some(Cow::Owned(parts.join(", ")))
}

impl State {
    /// Path and query as the client wrote them (`request_uri`).
    pub fn request_uri(&self) -> &str {
        let uri = self.original_uri.as_deref().unwrap_or(&self.request.uri);
        uri.path_and_query().map_or("/", |target| target.as_str())
    }

    /// The host field for an upstream with `pass_host: pass`: the authority that the client asked for, with its port.
    pub fn authority(&self) -> Option<Cow<'_, str>> {
        match self.request.headers.get(header::HOST) {
            Some(host) => Some(String::from_utf8_lossy(host.as_bytes())),
            None => self.request.uri.authority().map(|authority| Cow::Borrowed(authority.as_str())),
        }
    }

    /// Why the gateway answered by itself: `route_not_found`, `plugin:key-auth`.
    fn reason_code(&self) -> Option<Cow<'_, str>> {
        let reason = self.reason()?;
        match self.answered_by_plugin() {
            Some(plugin) => Some(Cow::Owned(format!("{}:{plugin}", reason.code()))),
            None => Some(Cow::Borrowed(reason.code())),
        }
    }

    fn protocol(&self) -> &'static str {
        match self.request.version {
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2.0",
            _ => "HTTP/1.1",
        }
    }

    fn fixed(&self, var: &Var) -> Option<Cow<'_, str>> {
        let owned = |text: String| Some(Cow::Owned(text));
        match var {
            Var::Uri => Some(Cow::Borrowed(self.path())),
            Var::RequestUri => Some(Cow::Borrowed(self.request_uri())),
            Var::Args => Some(Cow::Borrowed(self.request.uri.query().unwrap_or_default())),
            Var::IsArgs => Some(Cow::Borrowed(if self.request.uri.query().is_some() { "?" } else { "" })),
            Var::Host | Var::ServerName => Some(Cow::Borrowed(&self.host)),
            Var::Hostname => Some(Cow::Borrowed(hostname())),
            Var::Request => {
                owned(format!("{} {} {}", self.request.method, self.request_uri(), self.protocol()))
            }
            Var::RequestMethod => Some(Cow::Borrowed(self.request.method.as_str())),
            Var::RequestLength => owned(self.request_length().to_string()),
            Var::RequestTime => owned(seconds(self.started.elapsed())),
            Var::RequestId => text(&self.request.headers, &REQUEST_ID),
            Var::RequestBody => self.slot::<BufferedBody>().map(|body| String::from_utf8_lossy(&body.bytes)),
            Var::RequestCompletion => Some(Cow::Borrowed(if self.complete { "OK" } else { "" })),
            Var::ContentType => text(&self.request.headers, &header::CONTENT_TYPE),
            Var::ContentLength => text(&self.request.headers, &header::CONTENT_LENGTH),
            Var::Scheme => Some(Cow::Borrowed(self.conn.scheme())),
            Var::Https => Some(Cow::Borrowed(if self.conn.tls.is_some() { "on" } else { "" })),
            Var::ServerProtocol => Some(Cow::Borrowed(self.protocol())),
            Var::ServerAddr => owned(self.conn.local.ip().to_string()),
            Var::ServerPort => owned(self.conn.local.port().to_string()),
            Var::RemoteAddr if self.remote_addr != self.conn.peer.ip() => owned(self.remote_addr.to_string()),
            Var::RemoteAddr | Var::RealipRemoteAddr | Var::ProxyProtocolAddr => {
                self.conn.forwarded.peer.to_str().ok().map(Cow::Borrowed)
            }
            Var::RemotePort => owned(self.remote_port.to_string()),
            Var::RealipRemotePort | Var::ProxyProtocolPort => owned(self.conn.peer.port().to_string()),
            Var::ProxyAddXForwardedFor => {
                let name = HeaderName::from_static("x-forwarded-for");
                match text(&self.request.headers, &name) {
                    Some(before) => owned(format!("{before}, {}", self.remote_addr)),
                    None => owned(self.remote_addr.to_string()),
                }
            }
            Var::ConnectionRequests => owned(self.conn.requests.get().to_string()),
            Var::Pid => owned(std::process::id().to_string()),
            Var::Time => owned(since_epoch().as_secs().to_string()),
            Var::Msec => owned(seconds(since_epoch())),
            Var::TimeIso8601 => owned(crate::telemetry::time::iso8601(SystemTime::now())),
            Var::TimeLocal => owned(crate::telemetry::time::common_log(SystemTime::now())),
            Var::Status => owned(self.status().to_string()),
            Var::BytesSent | Var::BodyBytesSent => owned(self.bytes_sent.to_string()),
            _ => self.upstream_or_route(var),
        }
    }

    fn upstream_or_route(&self, var: &Var) -> Option<Cow<'_, str>> {
        let owned = |text: String| Some(Cow::Owned(text));
        let target = self.target.as_deref();
        match var {
            Var::UpstreamAddr => per_attempt(self, |attempt| attempt.address.to_string()),
            Var::UpstreamStatus => {
                per_attempt(self, |attempt| attempt.status.map_or_else(|| "-".to_owned(), |s| s.to_string()))
            }
            Var::UpstreamResponseTime | Var::UpstreamHeaderTime => {
                per_attempt(self, |attempt| seconds(attempt.took))
            }
            Var::UpstreamConnectTime => per_attempt(self, |attempt| seconds(attempt.connect)),
            Var::UpstreamScheme => self.cluster().map(|cluster| Cow::Borrowed(cluster.scheme())),
            Var::UpstreamHost => self
                .forward
                .host
                .as_ref()
                .map(|host| String::from_utf8_lossy(host.as_bytes()))
                .or_else(|| self.authority()),
            Var::UpstreamUri => Some(Cow::Borrowed(match &self.forward.uri {
                Some(uri) => uri.as_str(),
                None => self.request.uri.path_and_query().map_or("/", |target| target.as_str()),
            })),
            Var::BalancerIp => self.balancer.and_then(|address| owned(address.ip().to_string())),
            Var::BalancerPort => self.balancer.and_then(|address| owned(address.port().to_string())),
            Var::ConsumerName => self.consumer.as_ref().map(|consumer| Cow::Borrowed(&*consumer.name)),
            Var::ConsumerGroupId => self.consumer.as_ref()?.group_id.as_deref().map(Cow::Borrowed),
            Var::RouteId => target.map(|target| Cow::Borrowed(&*target.route_id)),
            Var::RouteName => target?.route_name.as_deref().map(Cow::Borrowed),
            Var::ServiceId => target?.service_id.as_deref().map(Cow::Borrowed),
            Var::ServiceName => target?.service_name.as_deref().map(Cow::Borrowed),
            Var::MatchedUri => self.matched_uri.as_deref().map(Cow::Borrowed),
            Var::MatchedHost => self.matched_host.as_deref().map(Cow::Borrowed),
            _ => self.tls_var(var),
        }
    }

    fn tls_var(&self, var: &Var) -> Option<Cow<'_, str>> {
        let tls = self.conn.tls.as_ref()?;
        match var {
            Var::SslServerName => tls.sni.as_deref().map(Cow::Borrowed),
            Var::SslProtocol => Some(Cow::Borrowed(tls.version)),
            Var::SslCipher => Some(Cow::Borrowed(tls.cipher)),
            Var::SslClientVerify => {
                Some(Cow::Borrowed(if tls.client.is_some() { "SUCCESS" } else { "NONE" }))
            }
            Var::SslClientSDn => tls.client.as_ref().map(|client| Cow::Borrowed(&*client.subject)),
            Var::SslClientIDn => tls.client.as_ref().map(|client| Cow::Borrowed(&*client.issuer)),
            Var::SslClientSerial => tls.client.as_ref().map(|client| Cow::Borrowed(&*client.serial)),
            Var::SslClientFingerprint => {
                tls.client.as_ref().map(|client| Cow::Borrowed(&*client.fingerprint))
            }
            _ => None,
        }
    }

    /// Bytes of the request as far as they are known: line, fields, announced body.
    pub fn request_length(&self) -> u64 {
        let line = self.request.method.as_str().len() + self.request_uri().len() + " HTTP/1.1\r\n".len() + 1;
        let fields: usize =
            self.request.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        let body = self
            .request
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<u64>().ok())
            .unwrap_or(0);
        (line + fields + 2) as u64 + body
    }

    /// Bytes of the answer: the head as HTTP/1.1 writes it, and what was sent of the body.
    pub fn response_length(&self) -> u64 {
        let head = if self.head_sent == 0 { self.head_length() } else { self.head_sent };
        head + self.bytes_sent
    }

    /// Bytes of the answer's head as HTTP/1.1 writes it.
    pub(crate) fn head_length(&self) -> u64 {
        let line = "HTTP/1.1 200 OK\r\n".len() + "\r\n".len();
        let fields: usize =
            self.response.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        (line + fields) as u64
    }

    /// What the upstream took until `now`, when all is over: its attempts up to the head of the answer, and the body if
    /// it was the upstream's. Nothing where no upstream was asked.
    pub fn upstream_time(&self, now: Instant) -> Option<Duration> {
        if self.attempts.is_empty() {
            return None;
        }
        let heads: Duration = self.attempts.iter().map(|attempt| attempt.took).sum();
        let body = match (self.answered, self.responded) {
            (Answered::Upstream, Some(responded)) => now.saturating_duration_since(responded),
            _ => Duration::ZERO,
        };
        Some(heads + body)
    }
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

impl Vars for State {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        match var {
            Var::Arg(name) => argument(self.request.uri.query()?, name),
            Var::Http(name) if *name == header::HOST => self.authority(),
            Var::Http(name) => text(&self.request.headers, name),
            Var::Cookie(name) => cookie(&self.request.headers, name).map(Cow::Borrowed),
            Var::SentHttp(name) | Var::UpstreamHttp(name) => text(self.response.headers(), name),
            Var::PostArg(name) => {
                let body = self.slot::<BufferedBody>()?;
                argument(std::str::from_utf8(&body.bytes).ok()?, name)
            }
            Var::UriParam(name) => {
                self.uri_params.value(name, self.path().as_bytes()).map(String::from_utf8_lossy)
            }
            // The code of an answer of our own; APISIX has no such variable.
            Var::Other(name) if &**name == "reason" => self.reason_code(),
            Var::Other(name) if &**name == "policy" && self.policy.is_some() => {
                self.policy.as_deref().map(Cow::Borrowed)
            }
            Var::Other(name) => {
                let own = self.slot::<OwnVars>()?;
                own.0.iter().find(|(key, _)| **key == **name).map(|(_, value)| Cow::Borrowed(value.as_str()))
            }
            Var::PostArgPath(_) => match self.value(var)? {
                Value::String(text) => Some(Cow::Owned(text)),
                Value::Null => None,
                other => Some(Cow::Owned(other.to_string())),
            },
            fixed => self.fixed(fixed),
        }
    }

    fn value(&self, var: &Var) -> Option<Value> {
        let Var::PostArgPath(path) = var else { return None };
        let body = self.slot::<BufferedBody>()?;
        match &body.json {
            Some(json) => json_path(json, path),
            None => argument(std::str::from_utf8(&body.bytes).ok()?, path)
                .map(|text| Value::String(text.into_owned())),
        }
    }
}

/// Follows `a.b[0].c` into a JSON value; `[*]` stands for every element, and what is found then is a list.
pub fn json_path(json: &Value, path: &str) -> Option<Value> {
    let mut found = vec![json];
    for step in path.split('.') {
        let (name, indices) = step.split_once('[').unwrap_or((step, ""));
        if !name.is_empty() {
            found = found.into_iter().filter_map(|value| value.get(name)).collect();
        }
        for index in
            indices.split('[').filter(|index| !index.is_empty()).map(|index| index.trim_end_matches(']'))
        {
            found = match index {
                "*" => found.into_iter().filter_map(Value::as_array).flatten().collect(),
                _ => {
                    let index: usize = index.parse().ok()?;
                    found.into_iter().filter_map(|value| value.get(index)).collect()
                }
            };
        }
    }
    match &found[..] {
        [] => None,
        [one] if !path.contains("[*]") => Some((*one).clone()),
        all => Some(all.iter().copied().cloned().collect()),
    }
}

/// The name of this machine.
pub fn hostname() -> &'static str {
    static NAME: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    NAME.get_or_init(|| {
        std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_found_and_decoded() {
        let cases = [
            ("a=1&b=2", "b", Some("2")),
            ("a=1&a=2", "a", Some("1")),
            ("a", "a", Some("")),
            ("a=x%20y+z", "a", Some("x y z")),
            ("a%5B0%5D=1", "a[0]", Some("1")),
            ("ab=1", "a", None),
            ("", "a", None),
        ];
        for (query, name, expected) in cases {
            assert_eq!(argument(query, name).as_deref(), expected, "{query} {name}");
        }
    }

    #[test]
    fn a_json_path_goes_through_objects_and_arrays() {
        let json = serde_json::json!({"a": {"b": [{"c": 7}, 8]}});
        assert_eq!(json_path(&json, "a.b[0].c").unwrap(), 7);
        assert_eq!(json_path(&json, "a.b[1]").unwrap(), 8);
        assert_eq!(json_path(&json, "a.b[*]").unwrap(), serde_json::json!([{"c": 7}, 8]));
        assert_eq!(json_path(&json, "a.b[*].c").unwrap(), serde_json::json!([7]));
        assert!(json_path(&json, "a.x").is_none());
        assert!(json_path(&json, "a.b[9]").is_none());
    }
}
