//! The status API: whether the process lives, and whether it should get requests.
//!
//! `/status` answers 200 as long as the control runtime runs. `/status/ready` answers 503 with the reason
//! until the first configuration is served, and again from the moment the process drains.

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
                Readiness::Ready => ok(),
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
