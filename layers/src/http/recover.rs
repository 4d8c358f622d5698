//! The outermost layer: a panic or a failure that nobody answered becomes an answer, and every answer gets our
//! `Server` field. One bad request must never take its worker down.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{HeaderValue, header};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use crate::error::{Error, Fault, Reason};
use crate::exchange::{Conn, Exchange};
use crate::rescue;
use crate::stack::HttpService;
use crate::telemetry::metrics::Metrics;

/// Makes [`Recover`].
#[derive(Clone)]
pub struct RecoverLayer {
    server: Option<HeaderValue>,
    metrics: Arc<Metrics>,
}

impl RecoverLayer {
    /// `server` is the `Server` field of every answer; the upstream's own stays where there is none.
    pub fn new(server: Option<HeaderValue>, metrics: Arc<Metrics>) -> Self {
        Self { server, metrics }
    }
}

impl<S> Layer<S> for RecoverLayer {
    type Service = Recover<S>;

    fn layer(&self, inner: S) -> Recover<S> {
        Recover { inner, shared: Rc::new(self.clone()) }
    }
}

/// Answers panics and failures.
#[derive(Clone)]
pub struct Recover<S> {
    inner: S,
    shared: Rc<RecoverLayer>,
}

impl<S: HttpService> Service<Exchange> for Recover<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = RecoverFuture<S::Future>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, x: Exchange) -> Self::Future {
        let conn = x.conn.clone();
        match catch_unwind(AssertUnwindSafe(|| self.inner.call(x))) {
            Ok(future) => RecoverFuture::Inner { future, shared: self.shared.clone(), conn },
            Err(panic) => RecoverFuture::Panicked { exchange: Some(panicked(&*panic, conn, &self.shared)) },
        }
    }
}

/// A panic took the exchange with it (its end has been told); this one carries the answer.
fn panicked(panic: &(dyn Any + Send), conn: Rc<Conn>, shared: &RecoverLayer) -> Exchange {
    shared.metrics.panics.inc();
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(panic = message, "a request panicked; it was answered with 500");
    let mut x = Exchange::new(http::Request::new(crate::body::Body::Empty), conn);
    rescue::rescue(&mut x, Error::new(Reason::Internal));
    rescue::proxy_status(&mut x);
    x
}

pin_project! {
    /// The future of [`Recover`].
    #[project = RecoverProjection]
    pub enum RecoverFuture<F> {
        /// At work.
        Inner { #[pin] future: F, shared: Rc<RecoverLayer>, conn: Rc<Conn> },
        /// The call itself panicked.
        Panicked { exchange: Option<Exchange> },
    }
}

impl<F: Future<Output = Result<Exchange, Fault>>> Future for RecoverFuture<F> {
    type Output = Result<Exchange, Fault>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            RecoverProjection::Panicked { exchange } => match exchange.take() {
                Some(x) => Poll::Ready(Ok(x)),
                None => Poll::Pending,
            },
            RecoverProjection::Inner { future, shared, conn } => {
                let mut x = match catch_unwind(AssertUnwindSafe(|| future.poll(cx))) {
                    Ok(Poll::Pending) => return Poll::Pending,
                    Ok(Poll::Ready(Ok(x))) => x,
                    Ok(Poll::Ready(Err(Fault { mut exchange, error }))) => {
                        rescue::rescue(&mut exchange, error);
                        rescue::proxy_status(&mut exchange);
                        exchange
                    }
                    Err(panic) => panicked(&*panic, conn.clone(), shared),
                };
                if let Some(server) = &shared.server {
                    x.response.headers_mut().insert(header::SERVER, server.clone());
                }
                Poll::Ready(Ok(x))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{exchange, service};

    #[tokio::test]
    async fn a_panic_is_answered_with_500() {
        let mut recover = RecoverLayer::new(None, Arc::default()).layer(service(|_| panic!("boom")));
        let x = recover.call(exchange("GET", "http://a/").build()).await.unwrap();
        assert_eq!(x.response.status(), 500);
        assert_eq!(x.reason(), Some(Reason::Internal));
    }

    #[tokio::test]
    async fn every_answer_has_our_server_field() {
        let layer = RecoverLayer::new(Some(HeaderValue::from_static("postern")), Arc::default());
        let mut recover = layer.layer(service(|_| Ok(())));
        let x = recover.call(exchange("GET", "http://a/").build()).await.unwrap();
        assert_eq!(x.response.headers()[header::SERVER], "postern");
    }
}
