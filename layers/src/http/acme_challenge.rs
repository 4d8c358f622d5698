//! Answers what an ACME authority asks for by HTTP (RFC 8555, section 8.3) while a certificate is ordered.
//!
//! Runs before routing and answers for tokens that are pending; whatever else is below this path goes the way of every
//! request, so an upstream may have an ACME client of its own. Pending tokens are looked up in memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::{Either, Ready, ready as now};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Method, Response};
use tower::{Layer, Service};

use crate::body::Body;
use crate::error::{Fault, Reason};
use crate::exchange::{Exchange, State};
use crate::stack::HttpService;

const PATH: &str = "/.well-known/acme-challenge/";

/// Tokens that are pending, and what is answered; replaced as a whole by the control side.
pub type Pending = Arc<ArcSwap<HashMap<Box<str>, Bytes>>>;

/// Makes [`AcmeChallenge`].
#[derive(Clone, Debug, Default)]
pub struct AcmeChallengeLayer(Pending);

impl AcmeChallengeLayer {
    /// Which answers for these.
    pub fn new(pending: Pending) -> Self {
        Self(pending)
    }
}

impl<S> Layer<S> for AcmeChallengeLayer {
    type Service = AcmeChallenge<S>;

    fn layer(&self, inner: S) -> AcmeChallenge<S> {
        AcmeChallenge { inner, pending: self.0.clone() }
    }
}

/// Answers challenges that are pending.
#[derive(Clone)]
pub struct AcmeChallenge<S> {
    inner: S,
    pending: Pending,
}

impl<S: HttpService> Service<Exchange> for AcmeChallenge<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = Either<S::Future, Ready<Result<Exchange, Fault>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        match answer(&x, &self.pending) {
            None => Either::Left(self.inner.call(x)),
            Some(answer) => {
                let mut response = Response::new(Body::from(answer));
                let headers = response.headers_mut();
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
                headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
                x.reply(response, Reason::AcmeChallenge);
                Either::Right(now(Ok(x)))
            }
        }
    }
}

fn answer(x: &State, pending: &Pending) -> Option<Bytes> {
    let token = x.path().strip_prefix(PATH)?;
    if !matches!(x.request.method, Method::GET | Method::HEAD) {
        return None;
    }
    pending.load().get(token).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::Answered;
    use crate::testing::{exchange, service, text};

    #[tokio::test]
    async fn tokens_that_are_pending_are_answered_and_nothing_else() {
        let pending = Pending::default();
        let mut layer = AcmeChallengeLayer::new(pending.clone()).layer(service(|x| {
            x.reply(Response::new(Body::from("routed")), Reason::RouteNotFound);
            Ok(())
        }));
        let token = [("abc".into(), Bytes::from_static(b"abc.thumb"))];
        pending.store(Arc::new(token.into_iter().collect()));
        for (what, method, path, expected) in [
            ("the token", "GET", "/.well-known/acme-challenge/abc", "abc.thumb"),
            ("another token", "GET", "/.well-known/acme-challenge/abd", "routed"),
            ("a part of it", "GET", "/.well-known/acme-challenge/ab", "routed"),
            ("more than it", "GET", "/.well-known/acme-challenge/abc/", "routed"),
            ("no token", "GET", "/.well-known/acme-challenge/", "routed"),
            ("another method", "POST", "/.well-known/acme-challenge/abc", "routed"),
            ("another path", "GET", "/abc", "routed"),
        ] {
            let request = exchange(method, &format!("http://a.test{path}")).build();
            let mut answered = layer.call(request).await.unwrap();
            assert_eq!(text(&mut answered).await, expected, "{what}");
        }
        let head = exchange("HEAD", "http://a.test/.well-known/acme-challenge/abc").build();
        let answered = layer.call(head).await.unwrap();
        assert_eq!(answered.answered, Answered::Gateway(Reason::AcmeChallenge));
        pending.store(Arc::default());
        let late = exchange("GET", "http://a.test/.well-known/acme-challenge/abc").build();
        assert_eq!(text(&mut layer.call(late).await.unwrap()).await, "routed");
    }
}
