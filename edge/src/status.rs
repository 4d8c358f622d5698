//! The status API: whether the process lives, and whether it should get requests.
//!
//! `/status` answers 200 as long as the control runtime runs. `/status/ready` answers 503 with the reason
//! until the first configuration is served, and again from the moment the process drains; while it answers 200 it tells
//! what somebody should look at all the same.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::json;

use crate::admin::reply::{Reply, ReplyBody};
use crate::endpoint::Handler;
use crate::live::{LiveState, Readiness};
use crate::store::BoxFuture;

/// The status API.
pub struct Status {
    live: Arc<dyn LiveState>,
}

impl Status {
    /// A status API that tells about `live`.
    #[must_use]
    pub fn new(live: Arc<dyn LiveState>) -> Status {
        Status { live }
    }

    /// The answer to a method and a path.
    #[must_use]
    pub fn answer(&self, method: &Method, path: &str) -> Reply {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return Reply::method_not_allowed("please use GET method", "GET, HEAD");
        }
        let ok = || Reply::json(StatusCode::OK, &json!({"status": "ok"}));
        let unavailable = |reason: &str| {
            Reply::json(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": "error", "error": reason}))
        };
        match path {
            "/status" => ok(),
            "/status/ready" => match self.live.readiness() {
                Readiness::Ready => match self.live.warnings() {
                    warnings if warnings.is_empty() => ok(),
                    warnings => Reply::json(StatusCode::OK, &json!({"status": "ok", "warnings": warnings})),
                },
                Readiness::NotReady(reason) => unavailable(&reason),
                Readiness::Draining => unavailable("draining: the process is about to end"),
            },
            _ => Reply::error(StatusCode::NOT_FOUND, "404 Route Not Found"),
        }
    }
}

impl Handler for Status {
    fn handle(&self, _: SocketAddr, request: Request<Incoming>) -> BoxFuture<'_, Response<ReplyBody>> {
        let reply = self.answer(request.method(), request.uri().path());
        Box::pin(async move { reply.into_response() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use http_body_util::BodyExt;

    use super::*;
    use crate::live::fake::Fake;

    #[tokio::test]
    async fn it_lives_and_is_ready_only_when_it_is() {
        let waiting = Readiness::NotReady("no configuration yet: etcd: connection refused".to_owned());
        let live = Arc::new(Fake::default());
        let status = Status::new(Arc::clone(&live) as Arc<dyn LiveState>);
        for (readiness, method, path, code, contains) in [
            (waiting.clone(), Method::GET, "/status", 200, r#"{"status":"ok"}"#),
            (
                waiting,
                Method::GET,
                "/status/ready",
                503,
                r#"{"status":"error","error":"no configuration yet: etcd"#,
            ),
            (Readiness::Ready, Method::GET, "/status/ready", 200, r#"{"status":"ok"}"#),
            (Readiness::Draining, Method::GET, "/status/ready", 503, "draining"),
            (Readiness::Draining, Method::GET, "/status", 200, "ok"),
            (Readiness::Ready, Method::POST, "/status", 405, "GET"),
            (Readiness::Ready, Method::GET, "/", 404, "404"),
        ] {
            *live.readiness.lock().unwrap() = readiness;
            let response = status.answer(&method, path).into_response();
            assert_eq!(response.status().as_u16(), code, "{method} {path}");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let body = String::from_utf8_lossy(&body);
            assert!(body.contains(contains), "{method} {path}: {body}");
        }
    }

    #[tokio::test]
    async fn what_somebody_should_look_at_is_told_beside_being_ready() {
        let live = Arc::new(Fake::default());
        live.warnings.lock().unwrap().push("look".to_owned());
        let status = Status::new(live);
        let response = status.answer(&Method::GET, "/status/ready").into_response();
        assert_eq!(response.status().as_u16(), 200);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, "{\"status\":\"ok\",\"warnings\":[\"look\"]}\n");
    }
}
