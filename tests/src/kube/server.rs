//! The HTTP of the API server.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::objects::{Filter, Kind, merge, place};
use super::{Kept, Manner, State};

type Body = UnsyncBoxBody<Bytes, io::Error>;

pub(super) async fn serve(listener: TcpListener, state: Arc<State>, tls: Option<Arc<ServerConfig>>) {
    // Connections end with the server.
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => continue,
            },
            Some(_) = connections.join_next() => continue,
        };
        let (state, tls) = (Arc::clone(&state), tls.clone());
        state.connections.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&state));
        connections.spawn(async move {
            let _counted = counted;
            let service = service_fn(move |request| {
                let state = Arc::clone(&state);
                async move { Ok::<_, Infallible>(answer(&state, request).await) }
            });
            let http = hyper::server::conn::http1::Builder::new();
            // How a connection ends is not of interest here.
            let _ = match tls {
                None => http.serve_connection(TokioIo::new(stream), service).await,
                Some(tls) => match TlsAcceptor::from(tls).accept(stream).await {
                    Ok(stream) => http.serve_connection(TokioIo::new(stream), service).await,
                    Err(_) => Ok(()),
                },
            };
        });
    }
}

/// A connection, for as long as it is open.
struct Counted(Arc<State>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a path and a query say.
struct Asked {
    kind: Option<Kind>,
    plural: String,
    name: Option<String>,
    filter: Filter,
    watch: bool,
    version: Option<String>,
    bookmarks: bool,
    initial_events: bool,
    timeout: Duration,
    limit: usize,
    proceed: Option<String>,
}

impl Asked {
    fn read(uri: &http::Uri) -> Asked {
        let segments: Vec<&str> = uri.path().split('/').filter(|segment| !segment.is_empty()).collect();
        let groups = if segments.first() == Some(&"apis") { 3 } else { 2 };
        let (group, rest) = segments.split_at(groups.min(segments.len()));
        let (namespace, rest) = match *rest {
            ["namespaces", namespace, ref rest @ ..] if !rest.is_empty() => {
                (Some(namespace.to_owned()), rest)
            }
            _ => (None, rest),
        };
        let mut asked = Asked {
            kind: None,
            plural: rest.first().copied().unwrap_or_default().to_owned(),
            name: rest.get(1).map(|name| (*name).to_owned()),
            filter: Filter { namespace, ..Filter::default() },
            watch: false,
            version: None,
            bookmarks: false,
            initial_events: false,
            timeout: Duration::from_secs(1800),
            limit: 0,
            proceed: None,
        };
        asked.kind = Kind::find(&format!("/{}", group.join("/")), &asked.plural);
        for pair in uri.query().unwrap_or_default().split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decode(value);
            match name {
                "watch" => asked.watch = matches!(value.as_str(), "1" | "true"),
                "allowWatchBookmarks" => asked.bookmarks = value == "true",
                "sendInitialEvents" => asked.initial_events = value == "true",
                "resourceVersion" if !value.is_empty() => asked.version = Some(value),
                "labelSelector" => asked.filter.labels = value,
                "fieldSelector" => asked.filter.fields = value,
                "limit" => asked.limit = value.parse().unwrap_or(0),
                "continue" => asked.proceed = Some(value),
                "timeoutSeconds" => asked.timeout = Duration::from_secs(value.parse().unwrap_or(1800)),
                _ => {}
            }
        }
        asked
    }
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(out).expect("UTF-8 in a query")
}

async fn answer(state: &Arc<State>, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let asked = Asked::read(&head.uri);
    let manner = {
        let mut kept = state.kept();
        kept.requests.push(format!("{} {}", head.method, head.uri));
        if let Some(refusal) = refused(&kept, &head, &asked) {
            return refusal;
        }
        kept.manner
    };
    match manner {
        Manner::Errors => {
            return status(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "etcdserver: no leader");
        }
        Manner::Silent => {
            // Until somebody says otherwise, or the client has gone.
            let mut changes = state.changes.subscribe();
            while state.kept().manner == Manner::Silent {
                let _ = changes.changed().await;
            }
        }
        Manner::SlowBody => return broken(vec![Ok(r#"{"kind":"List","#.into())], true),
        Manner::HalfBody => {
            let cut = io::Error::other("cut");
            return broken(
                vec![
                    Ok(r#"{"kind":"List","metadata":{"resourceVersion":"7"},"items":[{"meta"#.into()),
                    Err(cut),
                ],
                false,
            );
        }
        Manner::Garbage => return ok(Bytes::from_static(b"<html>a captive portal</html>\n")),
        Manner::FirstPages if asked.proceed.is_some() => {
            return status(
                StatusCode::INTERNAL_SERVER_ERROR,
                "InternalError",
                "etcdserver: request timed out",
            );
        }
        Manner::Well | Manner::FirstPages => {}
    }
    if head.uri.path() == "/version" {
        return ok_json(&json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0-postern-tests"}));
    }
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let sent: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    if asked.plural == "tokenreviews" {
        return review(state, &sent);
    }
    let Some(kind) = asked.kind else {
        return status(StatusCode::NOT_FOUND, "NotFound", "the server could not find it");
    };
    match (&head.method, &asked.name) {
        (&Method::GET, None) if asked.watch => watch(state, kind, asked),
        (&Method::GET, None) => list(state, kind, &asked),
        _ => write(state, kind, &head, &asked, sent),
    }
}

fn refused(kept: &Kept, head: &http::request::Parts, asked: &Asked) -> Option<Response<Body>> {
    if let Some(tokens) = &kept.tokens {
        let shown = head.headers.get("authorization").and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|value| value.strip_prefix("Bearer "));
        if !shown.is_some_and(|shown| tokens.iter().any(|token| token == shown)) {
            return Some(status(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized"));
        }
    }
    if kept.forbidden.contains(&asked.plural) {
        let message = format!("{} is forbidden", asked.plural);
        return Some(status(StatusCode::FORBIDDEN, "Forbidden", &message));
    }
    if kept.missing.contains(&asked.plural) {
        return Some(status(
            StatusCode::NOT_FOUND,
            "NotFound",
            "the server could not find the requested resource",
        ));
    }
    None
}

fn list(state: &State, kind: Kind, asked: &Asked) -> Response<Body> {
    let kept = state.kept();
    // A page begins at an index of the list at a version.
    let (version, from) = match asked.proceed.as_deref().map(|proceed| proceed.split_once('@')) {
        None => (kept.objects.version, 0),
        Some(Some((from, version))) => match (version.parse::<u64>(), from.parse::<usize>()) {
            (Ok(version), Ok(from))
                if version > kept.objects.compacted || version == kept.objects.version =>
            {
                (version, from)
            }
            _ => return expired(),
        },
        Some(None) => return expired(),
    };
    let all = kept.objects.list(kind, &asked.filter);
    let limit = if asked.limit == 0 { usize::MAX } else { asked.limit };
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if all.len() > from.saturating_add(limit) {
        metadata["continue"] = json!(format!("{}@{version}", from + limit));
        metadata["remainingItemCount"] = json!(all.len() - from - limit);
    }
    let items: Vec<Value> = all.into_iter().skip(from).take(limit).collect();
    let list = json!({
        "kind": format!("{}List", kind.name), "apiVersion": kind.api_version(), "metadata": metadata, "items": items,
    });
    ok_json(&list)
}

fn watch(state: &Arc<State>, kind: Kind, asked: Asked) -> Response<Body> {
    let kept = state.kept();
    let mut first = Vec::new();
    let mut from = kept.objects.version;
    match asked.version.as_deref().map(str::parse::<u64>) {
        Some(Ok(version)) if version < kept.objects.compacted => {
            if !kept.expire_in_stream {
                return expired();
            }
            let event = json!({"type": "ERROR", "object": failure(StatusCode::GONE, "Expired", "too old resource version")});
            return broken(vec![Ok(format!("{event}\n").into())], false);
        }
        Some(Ok(version)) if version > kept.objects.version => {
            let message = format!("Too large resource version: {version}, current: {}", kept.objects.version);
            return status(StatusCode::GATEWAY_TIMEOUT, "Timeout", &message);
        }
        Some(Ok(version)) if version > 0 => from = version,
        Some(Err(_)) => return status(StatusCode::BAD_REQUEST, "BadRequest", "invalid resource version"),
        // Without a version, a watch begins with what there is.
        _ => {
            let objects = kept.objects.list(kind, &asked.filter);
            first.extend(objects.into_iter().map(|object| json!({"type": "ADDED", "object": object})));
            if asked.initial_events {
                let end = json!({"k8s.io/initial-events-end": "true"});
                first.push(bookmark(kind, from, end));
            }
        }
    }
    let watching = Watching {
        changes: state.changes.subscribe(),
        state: Arc::clone(state),
        kind,
        from,
        first: Some(first),
        era: kept.era,
        until: Instant::now() + asked.timeout,
        bookmark_at: Instant::now() + kept.bookmark_every,
        bookmarks: asked.bookmarks,
        deaf: kept.deaf_watches,
        filter: asked.filter,
    };
    drop(kept);
    let events = stream::unfold(watching, |mut watching| async move {
        let text = watching.next().await?;
        Some((text.map(|text| Frame::data(Bytes::from(text))), watching))
    });
    let body = StreamBody::new(events).boxed_unsync();
    Response::builder().header("content-type", "application/json").body(body).expect("an answer")
}

struct Watching {
    state: Arc<State>,
    changes: tokio::sync::watch::Receiver<u64>,
    kind: Kind,
    filter: Filter,
    from: u64,
    first: Option<Vec<Value>>,
    era: u64,
    until: Instant,
    bookmarks: bool,
    bookmark_at: Instant,
    deaf: bool,
}

impl Watching {
    async fn next(&mut self) -> Option<io::Result<String>> {
        if let Some(first) = self.first.take().filter(|first| !first.is_empty()) {
            return Some(Ok(lines(&first)));
        }
        loop {
            self.changes.borrow_and_update();
            {
                let kept = self.state.kept();
                let silent = self.deaf || kept.manner == Manner::Silent;
                if kept.era != self.era {
                    return match kept.manner {
                        Manner::HalfBody => cut(&mut self.until),
                        Manner::Well if kept.expire_in_stream && self.from < kept.objects.compacted => {
                            self.from = kept.objects.compacted;
                            let said = failure(StatusCode::GONE, "Expired", "too old resource version");
                            Some(Ok(lines(&[json!({"type": "ERROR", "object": said})])))
                        }
                        _ => None,
                    };
                }
                if !silent {
                    let (events, version) = kept.objects.after(self.from, self.kind, &self.filter);
                    self.from = version;
                    if !events.is_empty() {
                        return Some(Ok(lines(&events)));
                    }
                    if self.bookmarks && Instant::now() >= self.bookmark_at {
                        self.bookmark_at = Instant::now() + kept.bookmark_every;
                        return Some(Ok(lines(&[bookmark(self.kind, self.from, json!({}))])));
                    }
                    if Instant::now() >= self.until {
                        return None;
                    }
                }
            }
            let next = if self.deaf {
                Instant::now() + Duration::from_secs(3600)
            } else {
                self.until.min(self.bookmark_at)
            };
            let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let _ = timeout(wait, self.changes.changed()).await;
        }
    }
}

/// Half an event and then the end of the connection.
fn cut(until: &mut Instant) -> Option<io::Result<String>> {
    if *until <= Instant::now() {
        return Some(Err(io::Error::other("cut")));
    }
    *until = Instant::now();
    Some(Ok(r#"{"type":"DELETED","object":{"kind":"Endpo"#.to_owned()))
}

fn lines(events: &[Value]) -> String {
    events.iter().map(|event| format!("{event}\n")).collect()
}

fn bookmark(kind: Kind, version: u64, annotations: Value) -> Value {
    let metadata = json!({"resourceVersion": version.to_string(), "annotations": annotations});
    json!({"type": "BOOKMARK", "object": {"kind": kind.name, "apiVersion": kind.api_version(), "metadata": metadata}})
}

fn write(
    state: &State,
    kind: Kind,
    head: &http::request::Parts,
    asked: &Asked,
    mut sent: Value,
) -> Response<Body> {
    let mut kept = state.kept();
    let namespace = asked.filter.namespace.clone().unwrap_or_default();
    let name = asked.name.clone().unwrap_or_else(|| place(&sent).1);
    let current = kept.objects.get(kind, &namespace, &name);
    let missing =
        || status(StatusCode::NOT_FOUND, "NotFound", &format!("{} \"{name}\" not found", kind.plural));
    if sent.is_object() && head.method != Method::DELETE {
        if !sent["metadata"].is_object() {
            sent["metadata"] = json!({});
        }
        sent["metadata"]["name"] = json!(name);
        if !namespace.is_empty() {
            sent["metadata"]["namespace"] = json!(namespace);
        }
    }
    let answer = match (&head.method, current) {
        (&Method::GET, Some(object)) => return ok_json(&object),
        (&Method::POST, Some(_)) => {
            return status(StatusCode::CONFLICT, "AlreadyExists", &format!("\"{name}\" already exists"));
        }
        (&Method::POST, None) => (StatusCode::CREATED, kept.objects.put(kind, sent)),
        (&Method::PUT, Some(object)) => {
            let (shown, held) =
                (&sent["metadata"]["resourceVersion"], &object["metadata"]["resourceVersion"]);
            if shown.is_string() && shown != held {
                return status(StatusCode::CONFLICT, "Conflict", "the object has been modified");
            }
            (StatusCode::OK, kept.objects.put(kind, sent))
        }
        (&Method::PATCH, current) => {
            let apply = head
                .headers
                .get("content-type")
                .is_some_and(|value| value.as_bytes().starts_with(b"application/apply-patch"));
            let code = if current.is_none() { StatusCode::CREATED } else { StatusCode::OK };
            let Some(mut object) = current.or_else(|| apply.then(|| json!({}))) else { return missing() };
            merge(&mut object, &sent);
            (code, kept.objects.put(kind, object))
        }
        (&Method::DELETE, Some(_)) => match kept.objects.delete(kind, &namespace, &name) {
            Some(object) => (StatusCode::OK, object),
            None => return missing(),
        },
        (_, None) => return missing(),
        _ => return status(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", "not allowed"),
    };
    drop(kept);
    state.changed();
    let mut response = ok_json(&answer.1);
    *response.status_mut() = answer.0;
    response
}

fn review(state: &State, sent: &Value) -> Response<Body> {
    let kept = state.kept();
    let token = sent["spec"]["token"].as_str().unwrap_or_default();
    let user = kept.users.iter().find(|(known, _)| known == token);
    let said = match user {
        Some((_, name)) => {
            // Every token is bound to one pod of its service account.
            let pod = format!("{}-0", name.rsplit(':').next().unwrap_or_default());
            let extra = json!({"authentication.kubernetes.io/pod-name": [pod]});
            json!({
                "authenticated": true, "user": {"username": name, "extra": extra},
                "audiences": sent["spec"]["audiences"],
            })
        }
        None => json!({"authenticated": false, "error": "the token is not known"}),
    };
    let mut response = ok_json(&json!({
        "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "spec": sent["spec"], "status": said,
    }));
    *response.status_mut() = StatusCode::CREATED;
    response
}

fn failure(code: StatusCode, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16(),
    })
}

fn status(code: StatusCode, reason: &str, message: &str) -> Response<Body> {
    let mut response = ok_json(&failure(code, reason, message));
    *response.status_mut() = code;
    response
}

fn expired() -> Response<Body> {
    status(StatusCode::GONE, "Expired", "too old resource version")
}

fn ok_json(value: &Value) -> Response<Body> {
    ok(Bytes::from(value.to_string()))
}

fn ok(text: Bytes) -> Response<Body> {
    let body = Full::new(text).map_err(|never| match never {}).boxed_unsync();
    Response::builder().header("content-type", "application/json").body(body).expect("an answer")
}

/// Pieces of a body, and then its end; or nothing more for ever.
fn broken(pieces: Vec<io::Result<Bytes>>, hang: bool) -> Response<Body> {
    let events = stream::unfold(pieces.into_iter(), move |mut pieces| async move {
        match pieces.next() {
            Some(piece) => Some((piece.map(Frame::data), pieces)),
            None if hang => std::future::pending().await,
            None => None,
        }
    });
    Response::builder().body(StreamBody::new(events).boxed_unsync()).expect("an answer")
}
