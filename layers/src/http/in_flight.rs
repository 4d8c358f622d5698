//! Counts the requests at work, and answers 503 at once when there are more than allowed.
//!
//! A request counts until its response has left, so a slow download counts as long as it lasts.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use tower::{Layer, Service};

use crate::error::{Error, Fault, Reason};
use crate::exchange::{Exchange, Finish};
use crate::stack::HttpService;

/// Requests at work, shared by all workers.
#[derive(Clone, Debug, Default)]
pub struct InFlightCount(Arc<AtomicUsize>);

impl InFlightCount {
    /// How many there are now.
    pub fn now(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Gives its place back when the exchange is over.
struct Place(InFlightCount);

impl Finish for Place {
    fn finish(&self, _: &Exchange) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Makes [`InFlight`].
#[derive(Clone)]
pub struct InFlightLayer {
    count: InFlightCount,
    limit: usize,
}

impl InFlightLayer {
    /// At most `limit` requests in all workers together.
    pub fn new(count: InFlightCount, limit: usize) -> Self {
        Self { count, limit }
    }
}

impl<S> Layer<S> for InFlightLayer {
    type Service = InFlight<S>;

    fn layer(&self, inner: S) -> InFlight<S> {
        InFlight { inner, place: Rc::new(Place(self.count.clone())), limit: self.limit }
    }
}

/// Counts requests at work.
#[derive(Clone)]
pub struct InFlight<S> {
    inner: S,
    place: Rc<Place>,
    limit: usize,
}

impl<S: HttpService> Service<Exchange> for InFlight<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = Either<S::Future, Ready<Result<Exchange, Fault>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        let before = self.place.0.0.fetch_add(1, Ordering::Relaxed);
        x.on_finish(self.place.clone());
        if before >= self.limit {
            return Either::Right(ready(Err(Fault { exchange: x, error: Error::new(Reason::Overloaded) })));
        }
        Either::Left(self.inner.call(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{exchange, service};

    #[tokio::test]
    async fn one_more_than_allowed_is_refused_until_a_place_is_free() {
        let count = InFlightCount::default();
        let mut layer = InFlightLayer::new(count.clone(), 1).layer(service(|_| Ok(())));
        let first = layer.call(exchange("GET", "http://a/").build()).await.unwrap();
        let refused = layer.call(exchange("GET", "http://a/").build()).await.unwrap_err();
        assert_eq!(refused.error.reason(), Reason::Overloaded);
        drop(refused);
        drop(first);
        assert_eq!(count.now(), 0);
        layer.call(exchange("GET", "http://a/").build()).await.unwrap();
    }
}
