//! Counts, for each exchange that is over, why the gateway answered by itself.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use tower::{Layer, Service};

use crate::error::Fault;
use crate::exchange::{Exchange, Finish};
use crate::stack::HttpService;
use crate::telemetry::metrics::Metrics;

struct Count(Arc<Metrics>);

impl Finish for Count {
    fn finish(&self, x: &Exchange) {
        if let Some(reason) = x.reason() {
            self.0.answers.inc(reason);
        }
    }
}

/// Makes [`Counted`].
#[derive(Clone)]
pub struct MetricsLayer(Rc<Count>);

impl MetricsLayer {
    /// Counts into `metrics`.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self(Rc::new(Count(metrics)))
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, count: self.0.clone() }
    }
}

/// Counts each exchange.
#[derive(Clone)]
pub struct Counted<S> {
    inner: S,
    count: Rc<Count>,
}

impl<S: HttpService> Service<Exchange> for Counted<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = S::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> S::Future {
        x.on_finish(self.count.clone());
        self.inner.call(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Reason};
    use crate::testing::{exchange, service};

    #[tokio::test]
    async fn an_answer_of_our_own_is_counted_once_by_its_reason() {
        let metrics = Arc::new(Metrics::default());
        let layer = MetricsLayer::new(metrics.clone());
        let mut served = layer.layer(service(|x| {
            x.complete = true;
            Ok(())
        }));
        drop(served.call(exchange("GET", "http://a/").build()).await.unwrap());
        let mut refused = layer.layer(service(|x| {
            crate::rescue::rescue(x, Error::new(Reason::NoNodes));
            Err(Error::new(Reason::NoNodes))
        }));
        drop(refused.call(exchange("GET", "http://a/").build()).await.unwrap_err());
        let told = metrics.render();
        assert!(told.contains("{reason=\"no_nodes\"} 1\n"));
        assert!(told.contains("{reason=\"client_closed\"} 0\n"));
    }
}
